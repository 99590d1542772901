// Block copies and bit masks of split networks on the CPU.
#include <algorithm>
#include <type_traits>

#include "check.h"
#include "cpu/buffers.h"
#include "cpu/lanes.h"
#include "split_check.h"

namespace kdfast::cpu {
namespace {

constexpr int64_t kLine = 64;             // bytes, the unit in which threads share a line
constexpr int64_t kVector = 32;           // bytes copied by one instruction or two
constexpr int64_t kLongRun = 2048;        // bytes from which memcpy is called
constexpr int64_t kTileBytes = 16 << 10;  // of the target, written run after run
constexpr int64_t kLongLine = 64 << 10;   // bytes of a line that threads share
constexpr int64_t kCopyGrain = 64 << 10;  // bytes worth a thread
constexpr int64_t kGrain = 32768;         // weights worth a thread
constexpr int64_t kDrawGrain = 2048;      // bytes of bits worth a thread
constexpr int64_t kTile = 128;            // weights handled at a time

// Bytes [begin, end) of one line of the target.
void copy_part(const char* source, char* target, const std::vector<Run>& runs, int64_t begin,
               int64_t end) {
  int64_t done = begin;
  for (const Run& run : runs) {
    const int64_t from = std::max(done, run.target);
    const int64_t to = std::min(end, run.target + run.length);
    if (from >= to) continue;
    if (from > done) std::memset(target + done, 0, from - done);
    std::memcpy(target + from, source + run.source + (from - run.target), to - from);
    done = to;
  }
  if (done < end) std::memset(target + done, 0, end - done);
}

// `length` bytes, a multiple of kVector, of each line: copied, or zero without a source. Runs and
// the gaps between them are mostly a few hundred bytes, where calling memcpy costs as much as
// copying.
KD_CLONES void vector_column(const char* __restrict__ source, char* __restrict__ target,
                             int64_t lines, int64_t source_line, int64_t target_line,
                             int64_t length) {
  using Vector = char __attribute__((vector_size(kVector), aligned(1), may_alias));
  for (int64_t line = 0; line < lines; ++line) {
    auto* to = reinterpret_cast<Vector*>(target + line * target_line);
    if (source == nullptr) {
      for (int64_t i = 0; i < length / kVector; ++i) to[i] = Vector{};
    } else {
      const auto* from = reinterpret_cast<const Vector*>(source + line * source_line);
      for (int64_t i = 0; i < length / kVector; ++i) to[i] = from[i];
    }
  }
}

void any_column(const char* source, char* target, int64_t lines, int64_t source_line,
                int64_t target_line, int64_t length) {
  for (int64_t line = 0; line < lines; ++line, target += target_line) {
    if (source == nullptr) {
      std::memset(target, 0, length);
    } else {
      std::memcpy(target, source + line * source_line, length);
    }
  }
}

void copy_column(const char* source, char* target, int64_t lines, int64_t source_line,
                 int64_t target_line, int64_t length) {
  const auto copy = length % kVector == 0 && length <= kLongRun ? vector_column : any_column;
  if (length > 0) copy(source, target, lines, source_line, target_line, length);
}

// Whole lines, a few at a time, so that each is in the first-level cache until it is complete.
void copy_lines(const char* source, char* target, int64_t lines, int64_t source_line,
                int64_t target_line, const std::vector<Run>& runs) {
  const int64_t tile = std::max<int64_t>(1, kTileBytes / target_line);
  for (int64_t line = 0; line < lines; line += tile) {
    const int64_t count = std::min(tile, lines - line);
    const char* from = source + line * source_line;
    char* to = target + line * target_line;
    int64_t done = 0;
    for (const Run& run : runs) {
      copy_column(nullptr, to + done, count, 0, target_line, run.target - done);
      copy_column(from + run.source, to + run.target, count, source_line, target_line, run.length);
      done = run.target + run.length;
    }
    copy_column(nullptr, to + done, count, 0, target_line, target_line - done);
  }
}

// The source of a target sample, -1 if it is zero.
int64_t source_sample(const CopyPlan& plan, int64_t sample) {
  if (plan.rows.empty()) return sample;
  for (const Run& run : plan.rows) {
    if (sample >= run.target && sample < run.target + run.length) {
      return sample - run.target + run.source;
    }
  }
  return -1;
}

Tensor split_copy(Tensor source, std::vector<int64_t> rows, std::vector<int64_t> columns,
                  int64_t out_rows, int64_t out_columns, bool channels_last) {
  const CopyPlan plan = copy_plan(source, rows, columns, out_rows, out_columns, channels_last);
  Tensor out = reused_empty(source, {plan.samples, out_columns, source.size(2), source.size(3)},
                            channels_last);
  const char* from = static_cast<const char*>(plan.source.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t length = plan.target_line, lines = plan.samples * plan.lines;
  if (length <= kLongLine) {
    const int64_t grain = std::max<int64_t>(1, kCopyGrain / length);
    torch::stable::parallel_for(0, lines, grain, [&](int64_t first, int64_t last) {
      int64_t sample = first / plan.lines, skipped = first % plan.lines;
      for (int64_t line = first; line < last; ++sample, skipped = 0) {
        const int64_t count = std::min(plan.lines - skipped, last - line);
        const int64_t own = source_sample(plan, sample);
        if (own < 0) {
          std::memset(to + line * length, 0, count * length);
        } else {
          copy_lines(from + own * plan.source_sample + skipped * plan.source_line,
                     to + line * length, count, plan.source_line, length, plan.columns);
        }
        line += count;
      }
    });
    return out;
  }
  // Threads share a long line: one large sample in NCHW.
  const int64_t total = lines * length;
  torch::stable::parallel_for(
      0, (total + kLine - 1) / kLine, kCopyGrain / kLine, [&](int64_t first, int64_t last) {
        const int64_t end = std::min(total, last * kLine);
        for (int64_t at = first * kLine; at < end;) {
          const int64_t line = at / length, begin = at % length;
          const int64_t count = std::min(length - begin, end - at);
          const int64_t own = source_sample(plan, line / plan.lines);
          if (own < 0) {
            std::memset(to + at, 0, count);
          } else {
            copy_part(from + own * plan.source_sample + line % plan.lines * plan.source_line,
                      to + at - begin, plan.columns, begin, begin + count);
          }
          at += count;
        }
      });
  return out;
}

template <typename T>
using Word = std::conditional_t<
    sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;

template <typename To, typename From>
KD_HD Word<To> converted(From x) {
  if constexpr (std::is_same_v<To, From>) {
    return bits_as<Word<To>>(x);
  } else {
    return bits_as<Word<To>>(narrow_to<To>(widen(x)));
  }
}

// out[i] = x[i] where bit i of `bits` is set, else 0.
template <typename From, typename To>
KD_CLONES void mask_flat(const From* __restrict__ x, const uint8_t* __restrict__ bits,
                         int64_t count, To* __restrict__ out) {
  int64_t start = 0;
  for (; start + 32 <= count; start += 32) {
    uint32_t word;
    std::memcpy(&word, bits + start / 8, 4);
    for (int i = 0; i < 32; ++i) {
      const Word<To> keep = Word<To>(0) - Word<To>((word >> i) & 1u);
      out[start + i] = bits_as<To>(Word<To>(converted<To>(x[start + i]) & keep));
    }
  }
  for (; start < count; ++start) {
    const Word<To> keep = Word<To>(0) - Word<To>((bits[start / 8] >> (start % 8)) & 1u);
    out[start] = bits_as<To>(Word<To>(converted<To>(x[start]) & keep));
  }
}

// The same with a byte of mask an element, all ones or zeros.
template <typename From, typename To>
KD_CLONES void mask_bytes(const From* __restrict__ x, const int8_t* __restrict__ keep,
                          int64_t count, To* __restrict__ out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = bits_as<To>(
        Word<To>(converted<To>(x[i]) & Word<To>(std::make_signed_t<Word<To>>(keep[i]))));
  }
}

// keep[k * kTile + i] = -1 or 0, the bit of first + i * stride + k. `size` bytes of bits.
void transpose_bits(const uint8_t* bits, int64_t size, int64_t first, int64_t count,
                    int64_t stride, int8_t* keep) {
  int64_t start = 0;
  if (stride == 9) {
    // A 3x3 kernel: bits 9 apart are the diagonal of 8 bytes, so that after one load and a shift
    // byte i is zero or not as bit i is.
    for (; start + 8 <= count && (first + (start + 7) * 9 + 8) / 8 + 2 <= size; start += 8) {
      for (int64_t k = 0; k < 9; ++k) {
        const int64_t bit = first + start * 9 + k;
        const int shift = int(bit & 7);
        uint64_t word;
        std::memcpy(&word, bits + (bit >> 3), 8);
        // The ninth byte, shifted in two steps because 64 is too far for one.
        word = (word >> shift) | (uint64_t(bits[(bit >> 3) + 8]) << 1 << (63 - shift));
        word &= 0x8040201008040201u;
        word = ((word + 0x7f7f7f7f7f7f7f7fu) & 0x8080808080808080u) >> 7;
        word *= 0xff;
        std::memcpy(keep + k * kTile + start, &word, 8);
      }
    }
  }
  int64_t bit = first + start * stride;
  for (int64_t i = start; i < count; ++i) {
    for (int64_t k = 0; k < stride; ++k, ++bit) {
      keep[k * kTile + i] = int8_t(-((bits[bit >> 3] >> (bit & 7)) & 1));
    }
  }
}

template <typename From, typename To>
void mask_weight(const Feature& weight, const uint8_t* bits, To* out) {
  const int64_t channels = weight.channels, positions = weight.positions;
  const int64_t size = channels * positions, count = weight.samples * size;
  const From* data = static_cast<const From*>(weight.data);
  if (!weight.channels_last && (weight.samples == 1 || weight.sample_stride == size)) {
    // Whole bytes a thread, so that bit 0 of a part is bit 0 of a byte.
    const int64_t words = (count + 31) / 32;
    torch::stable::parallel_for(0, words, kGrain / 32, [&](int64_t first, int64_t last) {
      const int64_t start = first * 32, end = std::min(count, last * 32);
      mask_flat<From, To>(data + start, bits + start / 8, end - start, out + start);
    });
    return;
  }
  const int64_t grain = std::max<int64_t>(1, kGrain / size);
  torch::stable::parallel_for(0, weight.samples, grain, [&](int64_t first, int64_t last) {
    // In NCHW a sample that does not follow the last one is masked as one long column.
    const int64_t stride = weight.channels_last ? positions : 1;
    const int64_t length = weight.channels_last ? channels : size;
    std::vector<int8_t> keep(kTile * stride);
    for (int64_t sample = first; sample < last; ++sample) {
      const From* x = data + sample * weight.sample_stride;
      To* to = out + sample * size;
      for (int64_t start = 0; start < length; start += kTile) {
        const int64_t tile = std::min(kTile, length - start);
        transpose_bits(bits, (count + 7) / 8, sample * size + start * stride, tile, stride,
                       keep.data());
        for (int64_t k = 0; k < stride; ++k) {
          const int64_t at = k * length + start;
          mask_bytes<From, To>(x + at, keep.data() + k * kTile, tile, to + at);
        }
      }
    }
  });
}

Tensor split_mask(Tensor weight, Tensor bits, ScalarType dtype) {
  const DenseFeature dense("split_mask", weight);
  const Storage storage = storage_of_dtype("split_mask", dtype);
  check_mask(dense.view, bits, storage);
  const uint8_t* data = bits.const_data_ptr<uint8_t>();
  Tensor out = empty_on(weight, {weight.size(0), weight.size(1), weight.size(2), weight.size(3)},
                        dtype, dense.format());
  with_accumulator(dense.tensor, [&](auto zero) {
    using A = decltype(zero);
    with_storage<A>(dense.view.storage, [&](auto from) {
      with_storage<A>(storage, [&](auto to) {
        using To = decltype(to);
        mask_weight<decltype(from), To>(dense.view, data, static_cast<To*>(out.mutable_data_ptr()));
      });
    });
  });
  return out;
}

KD_CLONES void draw_bytes(uint64_t key, int64_t first, int64_t last, int64_t count,
                          uint32_t threshold, uint8_t* out) {
  for (int64_t byte = first; byte < last; ++byte) {
    out[byte] = drawn_bits(key, byte, count, threshold);
  }
}

Tensor split_draw(Tensor like, int64_t key, int64_t count, int64_t threshold) {
  KD_CHECK(count > 0 && count <= int64_t(1) << 34, "split_draw: expected 1 to 2^34 weights");
  const int64_t bytes = (count + 7) / 8;
  Tensor out = empty_on(like, {bytes}, ScalarType::Byte);
  uint8_t* data = out.mutable_data_ptr<uint8_t>();
  torch::stable::parallel_for(0, bytes, kDrawGrain, [&](int64_t first, int64_t last) {
    draw_bytes(uint64_t(key), first, last, count, uint32_t(threshold), data);
  });
  return out;
}

}  // namespace
}  // namespace kdfast::cpu

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("split_copy", TORCH_BOX(&kdfast::cpu::split_copy));
  m.impl("split_mask", TORCH_BOX(&kdfast::cpu::split_mask));
  m.impl("split_draw", TORCH_BOX(&kdfast::cpu::split_draw));
}
