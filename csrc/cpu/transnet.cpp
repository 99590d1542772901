// The gated nonlinearity on the CPU. A channel of a sample (NCHW) or a group of channels of one
// (channels_last) is read from memory once, for its scale, and from the caches after that.
#include <algorithm>

#include "check.h"
#include "cpu/buffers.h"
#include "cpu/lanes.h"
#include "transnet.h"

namespace kdfast::cpu {
namespace {

constexpr int64_t kTile = 1024;                     // elements handled at a time
constexpr int64_t kStreamFrom = int64_t(16) << 20;  // results that no cache would keep, in bytes
constexpr int64_t kGrain = 32768;                   // elements that are worth a thread
constexpr int64_t kChannels = 128;                  // of a channels_last group
constexpr int64_t kBlock = 64;  // positions summed before they join the sum, for accuracy

// value where `condition`, else 0; by masks, because a branch would stop the vectoriser.
KD_HD float kept(bool condition, float value) {
  return bits_as<float>(bits_as<uint32_t>(value) & (0u - uint32_t(condition)));
}
KD_HD double kept(bool condition, double value) {
  return bits_as<double>(bits_as<uint64_t>(value) & (uint64_t(0) - uint64_t(condition)));
}

template <typename A>
KD_HD A lane_sum(const A* lane) {
  return (((lane[0] + lane[8]) + (lane[4] + lane[12])) +
          ((lane[2] + lane[10]) + (lane[6] + lane[14]))) +
         (((lane[1] + lane[9]) + (lane[5] + lane[13])) +
          ((lane[3] + lane[11]) + (lane[7] + lane[15])));
}

// The scale of a row. The mean is rounded, so the deviations' own mean is taken off their squares;
// a constant row would otherwise have the rounding error of its mean as its standard deviation.
template <typename A, typename T>
KD_CLONES A row_scale(const T* __restrict__ x, int64_t count) {
  if (count == 1) return A(1);
  A lane[16] = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    for (int k = 0; k < 16; ++k) lane[k] += A(widen(x[i + k]));
  }
  for (int k = 0; i < count; ++i, ++k) lane[k] += A(widen(x[i]));
  const A mean = lane_sum(lane) / A(count);

  A sum[16] = {}, square[16] = {};
  for (i = 0; i + 16 <= count; i += 16) {
    for (int k = 0; k < 16; ++k) {
      const A deviation = A(widen(x[i + k])) - mean;
      sum[k] += deviation;
      square[k] += deviation * deviation;
    }
  }
  for (int k = 0; i < count; ++i, ++k) {
    const A deviation = A(widen(x[i])) - mean;
    sum[k] += deviation;
    square[k] += deviation * deviation;
  }
  return gate_scale(lane_sum(square), lane_sum(sum), count);
}

// scale[c] likewise of x[i * stride + c], channels_last.
template <typename A, typename T>
KD_CLONES void column_scales(const T* __restrict__ x, int64_t stride, int64_t positions,
                             int64_t channels, A* __restrict__ scale) {
  alignas(64) A mean[kChannels] = {}, sum[kChannels] = {}, square[kChannels] = {};
  for (int64_t start = 0; start < positions; start += kBlock) {
    alignas(64) A part[kChannels] = {};
    for (int64_t i = start; i < std::min(positions, start + kBlock); ++i) {
      for (int64_t c = 0; c < channels; ++c) part[c] += A(widen(x[i * stride + c]));
    }
    for (int64_t c = 0; c < channels; ++c) mean[c] += part[c];
  }
  for (int64_t c = 0; c < channels; ++c) mean[c] /= A(positions);
  for (int64_t start = 0; start < positions; start += kBlock) {
    alignas(64) A part[kChannels] = {}, squares[kChannels] = {};
    for (int64_t i = start; i < std::min(positions, start + kBlock); ++i) {
      for (int64_t c = 0; c < channels; ++c) {
        const A deviation = A(widen(x[i * stride + c])) - mean[c];
        part[c] += deviation;
        squares[c] += deviation * deviation;
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      sum[c] += part[c];
      square[c] += squares[c];
    }
  }
  for (int64_t c = 0; c < channels; ++c) scale[c] = gate_scale(square[c], sum[c], positions);
}

// out = x + factor * relu(hidden).
template <typename A, typename T>
KD_CLONES void gate_row(const T* __restrict__ x, const T* __restrict__ hidden, A factor,
                        int64_t count, T* __restrict__ out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = narrow_to<T>(A(widen(x[i])) + factor * rectified(A(widen(hidden[i]))));
  }
}

template <typename A, typename T>
KD_CLONES void gate_columns(const T* __restrict__ x, const T* __restrict__ hidden,
                            const A* __restrict__ factor, int64_t count, T* __restrict__ out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = narrow_to<T>(A(widen(x[i])) + factor[i] * rectified(A(widen(hidden[i]))));
  }
}

// out = factor * grad where hidden > 0, else 0; returns the sum of grad * relu(hidden).
template <typename A, typename T>
KD_CLONES A slope_row(const T* __restrict__ grad, const T* __restrict__ hidden, A factor,
                      int64_t count, T* __restrict__ out) {
  A lane[16] = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    for (int k = 0; k < 16; ++k) {
      const A g = A(widen(grad[i + k])), h = A(widen(hidden[i + k]));
      out[i + k] = narrow_to<T>(kept(h > 0, factor * g));
      lane[k] += g * kept(!(h < 0), h);
    }
  }
  for (int k = 0; i < count; ++i, ++k) {
    const A g = A(widen(grad[i])), h = A(widen(hidden[i]));
    out[i] = narrow_to<T>(kept(h > 0, factor * g));
    lane[k] += g * kept(!(h < 0), h);
  }
  return lane_sum(lane);
}

template <typename A, typename T>
KD_CLONES void slope_columns(const T* __restrict__ grad, const T* __restrict__ hidden,
                             const A* __restrict__ factor, int64_t count, T* __restrict__ out,
                             A* __restrict__ sum) {
  for (int64_t i = 0; i < count; ++i) {
    const A g = A(widen(grad[i])), h = A(widen(hidden[i]));
    out[i] = narrow_to<T>(kept(h > 0, factor[i] * g));
    sum[i] += g * kept(!(h < 0), h);
  }
}

// Two maps of one shape, dtype and memory format; at one position a sample is a single row.
struct Maps {
  Feature first, hidden;
  int64_t length;  // of a row, NCHW
  int64_t rows;    // of a sample, NCHW
  int64_t groups;  // of channels, channels_last
  bool stream;

  Maps(const char* op, const DenseFeature& a, const DenseFeature& b) : first(a.view), hidden(b.view) {
    KD_CHECK(first.samples == hidden.samples && first.channels == hidden.channels &&
                 first.positions == hidden.positions && first.storage == hidden.storage &&
                 first.channels_last == hidden.channels_last,
             op, ": expected maps of one shape, dtype and memory format");
    length = first.positions == 1 ? first.channels : first.positions;
    rows = first.channels * first.positions / length;
    groups = (first.channels + kChannels - 1) / kChannels;
    stream = a.tensor.numel() * int64_t(a.tensor.element_size()) >= kStreamFrom;
  }

  // Tasks a sample, and the elements of one.
  int64_t tasks() const { return first.channels_last ? groups : rows; }
  int64_t elements() const {
    return first.channels_last ? std::min(kChannels, first.channels) * first.positions : length;
  }
};

// Calls body(task, sample, task of the sample) for all tasks, in parallel.
template <typename Body>
void for_tasks(const Maps& maps, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kGrain / maps.elements());
  torch::stable::parallel_for(0, maps.first.samples * maps.tasks(), grain,
                              [&](int64_t begin, int64_t end) {
                                for (int64_t task = begin; task < end; ++task) {
                                  body(task, task / maps.tasks(), task % maps.tasks());
                                }
                                stream_fence();
                              });
}

// Runs write(offset, count, to) over [0, count) so that `out` is written past the caches if `stream`.
template <typename T, typename Write>
void write_tiles(bool stream, int64_t count, T* out, const Write& write) {
  alignas(64) T buffer[kTile];
  for (int64_t start = 0; start < count; start += kTile) {
    const int64_t some = std::min(kTile, count - start);
    write(start, some, stream ? buffer : out + start);
    if (stream) stream_copy(out + start, buffer, some * sizeof(T));
  }
}

std::tuple<Tensor, Tensor> gated_relu(Tensor x, Tensor hidden, Tensor gate) {
  const DenseFeature a("gated_relu", x), b("gated_relu", hidden);
  const Maps maps("gated_relu", a, b);
  const Feature& feature = maps.first;
  Tensor out = reused_gradient(b);
  Tensor scale = empty_on(x, {feature.samples, feature.channels}, accumulate_type(x));
  with_accumulator(x, [&](auto zero) {
    using A = decltype(zero);
    const A p = *gate.const_data_ptr<A>();
    A* scales = scale.mutable_data_ptr<A>();
    with_storage<A>(feature.storage, [&](auto element) {
      using T = decltype(element);
      const int64_t channels = feature.channels, size = channels * feature.positions;
      for_tasks(maps, [&](int64_t, int64_t sample, int64_t task) {
        const T* from = static_cast<const T*>(feature.data) + sample * feature.sample_stride;
        const T* h = static_cast<const T*>(maps.hidden.data) + sample * maps.hidden.sample_stride;
        T* to = static_cast<T*>(out.mutable_data_ptr()) + sample * size;
        if (!feature.channels_last) {
          const int64_t at = task * maps.length;
          const A s = feature.positions == 1 ? A(1) : row_scale<A, T>(h + at, maps.length);
          std::fill_n(scales + sample * channels + task, channels / maps.rows, s);
          write_tiles(maps.stream, maps.length, to + at, [&](int64_t i, int64_t count, T* result) {
            gate_row<A, T>(from + at + i, h + at + i, p / s, count, result);
          });
          return;
        }
        const int64_t first = task * kChannels, count = std::min(kChannels, channels - first);
        A* own = scales + sample * channels + first;
        column_scales<A, T>(h + first, channels, feature.positions, count, own);
        alignas(64) A factor[kChannels];
        for (int64_t c = 0; c < count; ++c) factor[c] = p / own[c];
        for (int64_t i = 0; i < feature.positions; ++i) {
          const int64_t at = i * channels + first;
          write_tiles(maps.stream, count, to + at, [&](int64_t, int64_t, T* result) {
            gate_columns<A, T>(from + at, h + at, factor, count, result);
          });
        }
      });
    });
  });
  return {out, scale};
}

std::tuple<Tensor, Tensor> gated_relu_backward(Tensor grad, Tensor hidden, Tensor gate,
                                               Tensor scale) {
  const DenseFeature a("gated_relu_backward", grad), b("gated_relu_backward", hidden);
  const Maps maps("gated_relu_backward", a, b);
  const Feature& feature = maps.first;
  Tensor grad_hidden = reused_gradient(b);
  Tensor grad_gate = empty_on(grad, {1}, accumulate_type(grad));
  with_accumulator(grad, [&](auto zero) {
    using A = decltype(zero);
    const A p = *gate.const_data_ptr<A>();
    const A* scales = scale.const_data_ptr<A>();
    std::vector<A> sums(feature.samples * maps.tasks());
    with_storage<A>(feature.storage, [&](auto element) {
      using T = decltype(element);
      const int64_t channels = feature.channels, size = channels * feature.positions;
      for_tasks(maps, [&](int64_t number, int64_t sample, int64_t task) {
        const T* from = static_cast<const T*>(feature.data) + sample * feature.sample_stride;
        const T* h = static_cast<const T*>(maps.hidden.data) + sample * maps.hidden.sample_stride;
        T* to = static_cast<T*>(grad_hidden.mutable_data_ptr()) + sample * size;
        A sum = 0;
        if (!feature.channels_last) {
          const int64_t at = task * maps.length;
          const A s = scales[sample * channels + task];
          write_tiles(maps.stream, maps.length, to + at, [&](int64_t i, int64_t count, T* result) {
            sum += slope_row<A, T>(from + at + i, h + at + i, p / s, count, result);
          });
          sums[number] = sum / s;
          return;
        }
        const int64_t first = task * kChannels, count = std::min(kChannels, channels - first);
        const A* own = scales + sample * channels + first;
        alignas(64) A factor[kChannels], total[kChannels] = {};
        for (int64_t c = 0; c < count; ++c) factor[c] = p / own[c];
        for (int64_t i = 0; i < feature.positions; ++i) {
          const int64_t at = i * channels + first;
          write_tiles(maps.stream, count, to + at, [&](int64_t, int64_t, T* result) {
            slope_columns<A, T>(from + at, h + at, factor, count, result, total);
          });
        }
        for (int64_t c = 0; c < count; ++c) sum += total[c] / own[c];
        sums[number] = sum;
      });
    });
    double total = 0;
    for (A sum : sums) total += double(sum);
    *grad_gate.mutable_data_ptr<A>() = A(total);
  });
  return {grad_hidden, grad_gate};
}

}  // namespace
}  // namespace kdfast::cpu

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("gated_relu", TORCH_BOX(&kdfast::cpu::gated_relu));
  m.impl("gated_relu_backward", TORCH_BOX(&kdfast::cpu::gated_relu_backward));
}
