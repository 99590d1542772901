// Contrastive representation distillation on the CPU.
//
// The loss reads each drawn bank row once: dot product, loss, slope, and slope * row added to the
// gradient while the row is in the first-level cache. In the order of the draws those rows would
// come from memory one by one; sorted into blocks of the bank that fit the second-level cache, and
// the blocks visited by all samples of a thread in turn, the bank comes from memory once. What a
// sample adds up, and in which order, does not depend on the other samples or on the threads.
#include <algorithm>
#include <atomic>

#include "check.h"
#include "contrast.h"
#include "cpu/lanes.h"

namespace kdfast::cpu {
namespace {

constexpr int kLanes = 256;                       // draws at a time
constexpr int kChunk = 64;                        // bank rows at a time; 32 KB at 128 floats
constexpr int kTogether = 8;                      // rows multiplied together
constexpr int64_t kBlockBytes = int64_t(1) << 18;  // of the bank, half a second-level cache
constexpr int64_t kBlockDraws = 32;               // that a block should hold, else it is larger

// ---- Draws

KD_CLONES void permute(Cell* cells, const Permutation& permutation) {
  const Permutation own = permutation;  // known not to change under the stores
  for (int k = 0; k < kLanes; ++k) cells[k] = permuted(cells[k], own);
}

// The values of places [0, count) of the permutation.
template <typename Write>
void for_permuted(const Permutation& permutation, int64_t count, const Write& write) {
  Cell cells[kLanes];
  Cell next{0, 0};
  for (int64_t start = 0; start < count; start += kLanes) {
    for (Cell& cell : cells) {
      cell = next;
      const bool wraps = ++next.column == permutation.columns;
      next.column = wraps ? 0 : next.column;
      next.row += wraps;
    }
    permute(cells, permutation);
    const int64_t left = std::min<int64_t>(kLanes, count - start);
    for (int64_t k = 0; k < left; ++k) write(start + k, walked(cells[k], permutation));
  }
}

Tensor draw_negatives(Tensor labels, Tensor class_offsets, std::optional<Tensor> order, Tensor ids,
                      int64_t negatives, int64_t key) {
  const int64_t batch = labels.numel(), classes = class_offsets.numel() - 1;
  const int64_t* label = labels.const_data_ptr<int64_t>();
  const int64_t* offsets = class_offsets.const_data_ptr<int64_t>();
  const int64_t* id = ids.const_data_ptr<int64_t>();
  const int64_t samples = offsets[classes];
  for (int64_t c = 0; c < classes; ++c) {
    KD_CHECK(offsets[c] <= offsets[c + 1], "draw_negatives: class_offsets must not decrease, got ",
             offsets[c], " before ", offsets[c + 1]);
  }
  KD_CHECK(offsets[0] == 0 && samples < int64_t(1) << 31,
           "draw_negatives: class_offsets must go from 0 to less than 2^31, got ", offsets[0],
           " to ", samples);
  KD_CHECK(!order || order->numel() == samples, "draw_negatives: order must have ", samples,
           " entries, the last of class_offsets, got ", order ? order->numel() : 0);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t c = label[b];
    KD_CHECK(c >= 0 && c < classes, "draw_negatives: labels must be in [0, ", classes, "), got ",
             c);
    KD_CHECK(offsets[c + 1] - offsets[c] < samples, "draw_negatives: class ", c,
             " has all samples, none is left to draw");
  }
  const int64_t* dataset = order ? order->const_data_ptr<int64_t>() : nullptr;
  Tensor indices = empty_on(labels, {batch, negatives + 1}, ScalarType::Long);
  int64_t* out = indices.mutable_data_ptr<int64_t>();
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = offsets[label[b]], own = offsets[label[b] + 1] - first;
      const Pool pool{uint32_t(first), uint32_t(own), uint32_t(samples - own)};
      int64_t* row = out + b * (negatives + 1);
      *row++ = id[b];
      const auto write = [&](int64_t j, uint32_t value) {
        const uint32_t place = pool.place(value);
        row[j] = dataset ? dataset[place] : int64_t(place);
      };
      if (negatives <= int64_t(pool.size)) {
        for_permuted(permutation_of(key, id[b], pool.size), negatives, write);
      } else {
        for (int64_t start = 0; start < negatives; start += 4) {
          const Bits4 bits = replacement_bits(key, id[b], uint32_t(start / 4));
          for (int64_t k = 0; k < 4 && start + k < negatives; ++k) {
            write(start + k, scaled(bits.word[k], pool.size));
          }
        }
      }
    }
  });
  return indices;
}

// ---- Loss

// out[i] = bank row rows[i] . anchor.
template <typename A>
KD_CLONES void dot_rows(const A* __restrict__ bank, int64_t dim, const A* __restrict__ anchor,
                        const int32_t* __restrict__ rows, int64_t count, A* __restrict__ out) {
  // A row ends in 8 partial sums; those of all rows are added together, across rows, because adding
  // up within one register is what costs.
  alignas(64) A partial[kChunk * 8];
  for (int64_t row = 0; row < count; ++row) {
    const A* x = bank + rows[row] * dim;
    A lane[16] = {};
    int64_t i = 0;
    for (; i + 16 <= dim; i += 16) {
      for (int k = 0; k < 16; ++k) lane[k] += x[i + k] * anchor[i + k];
    }
    for (int k = 0; i < dim; ++i, ++k) lane[k] += x[i] * anchor[i];
    for (int k = 0; k < 8; ++k) partial[row * 8 + k] = lane[k] + lane[k + 8];
  }
  for (int64_t row = 0; row < count; ++row) {
    const A* sum = partial + row * 8;
    out[row] = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
  }
}

// sum += factor[i] * bank row rows[i], `count` a multiple of kTogether.
template <typename A>
KD_CLONES void add_rows(const A* __restrict__ bank, int64_t dim, const int32_t* __restrict__ rows,
                        const A* __restrict__ factor, int64_t count, A* __restrict__ sum) {
  for (int64_t i = 0; i < count; i += kTogether) {
    const A* row[kTogether];
    A own[kTogether];
    for (int r = 0; r < kTogether; ++r) {
      row[r] = bank + rows[i + r] * dim;
      own[r] = factor[i + r];
    }
    for (int64_t x = 0; x < dim; ++x) {
      sum[x] += ((own[0] * row[0][x] + own[1] * row[1][x]) +
                 (own[2] * row[2][x] + own[3] * row[3][x])) +
                ((own[4] * row[4][x] + own[5] * row[5][x]) +
                 (own[6] * row[6][x] + own[7] * row[7][x]));
    }
  }
}

template <typename A>
KD_CLONES void add_to(double* __restrict__ total, A* __restrict__ sum, int64_t count) {
  for (int64_t i = 0; i < count; ++i) total[i] += double(sum[i]);
  for (int64_t i = 0; i < count; ++i) sum[i] = 0;
}

// From scores to slopes, in place; adds to the losses and to the x. Entries from `count` to kChunk
// are padding.
template <typename A>
KD_CLONES void negatives_of(const Contrast<A>& contrast, int64_t count, A* __restrict__ scores,
                            double* __restrict__ loss, double* __restrict__ sum) {
  const Contrast<A> own = contrast;
  alignas(64) A x[kChunk];
  for (int i = 0; i < kChunk; ++i) x[i] = exp_of(own.log_x(scores[i]));
  for (int64_t i = count; i < kChunk; ++i) x[i] = 0;
  for (int i = 0; i < kChunk; ++i) scores[i] = own.negative_slope(x[i]);
  for (int i = 0; i < kChunk; i += 8) {
    for (int k = 0; k < 8; ++k) sum[k] += double(x[i + k]);
  }
  alignas(64) A odds[kChunk];
  for (int i = 0; i < kChunk; ++i) odds[i] = own.odds(x[i]);
  for (int64_t i = count; i < kChunk; ++i) odds[i] = 0;
  // The sum of log(1 + odds) as the logarithm of products: in double eight factors of float size
  // do not overflow, and 1 + odds loses nothing that matters.
  constexpr int kFactors = sizeof(A) == sizeof(float) ? 8 : 1;
  for (int start = 0; start < kChunk; start += 8 * kFactors) {
    double product[8];
    for (int k = 0; k < 8; ++k) product[k] = 1 + double(odds[start + k]);
    for (int i = 1; i < kFactors; ++i) {
      for (int k = 0; k < 8; ++k) product[k] *= 1 + double(odds[start + 8 * i + k]);
    }
    for (int k = 0; k < 8; ++k) loss[k] += log_of(product[k]);
  }
}

double sum_of(const double (&lane)[8]) {
  return ((lane[0] + lane[4]) + (lane[1] + lane[5])) + ((lane[2] + lane[6]) + (lane[3] + lane[7]));
}

// The negatives of every sample sorted by block of the bank, in the order of the draws within one.
struct Blocks {
  int shift;       // rows of a block, as a power of two
  int64_t blocks;
  Tensor rows;     // [B, K] int32
  Tensor starts;   // [B, blocks + 1] int32
};

Blocks blocks_of(const Tensor& indices, int64_t samples, int64_t row_bytes) {
  const int64_t batch = indices.size(0), negatives = indices.size(1) - 1;
  int shift = 0;
  while (int64_t(2) << shift <= kBlockBytes / row_bytes) ++shift;
  const double wanted = double(kBlockDraws) * double(samples) / double(negatives);
  while (int64_t(1) << shift < samples && double(int64_t(1) << shift) < wanted) ++shift;
  const int64_t blocks = ((samples - 1) >> shift) + 1;
  Blocks sorted{shift, blocks, empty_on(indices, {batch, negatives}, ScalarType::Int),
                empty_on(indices, {batch, blocks + 1}, ScalarType::Int)};
  const int64_t* index = indices.const_data_ptr<int64_t>();
  int32_t* rows = sorted.rows.mutable_data_ptr<int32_t>();
  int32_t* starts = sorted.starts.mutable_data_ptr<int32_t>();
  std::atomic<int64_t> wrong{-1};  // place of an index that is not a row
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t* from = index + b * (negatives + 1);
      int32_t* to = rows + b * negatives;
      int32_t* start = starts + b * (blocks + 1);
      std::fill_n(start, blocks + 1, 0);
      for (int64_t j = 0; j <= negatives; ++j) {
        if (uint64_t(from[j]) >= uint64_t(samples)) {
          wrong = b * (negatives + 1) + j;
          return;
        }
      }
      ++from;
      // Counts, then the start of each block; writing moves a start to the next block's.
      for (int64_t j = 0; j < negatives; ++j) ++start[from[j] >> shift];
      int32_t place = 0;
      for (int64_t block = 0; block <= blocks; ++block) {
        const int32_t count = start[block];
        start[block] = place;
        place += count;
      }
      for (int64_t j = 0; j < negatives; ++j) to[start[from[j] >> shift]++] = int32_t(from[j]);
      for (int64_t block = blocks; block > 0; --block) start[block] = start[block - 1];
      start[0] = 0;
    }
  });
  KD_CHECK(wrong < 0, "contrastive_loss: indices must be in [0, ", samples, "), got ",
           index[wrong]);
  return sorted;
}

// One side: adds each sample's loss and sum of x to results[b], [B, 2], and writes the slopes.
template <typename A>
void contrast_side(const A* anchors, const A* bank, int64_t dim, const Tensor& indices,
                   const Blocks& sorted, const Contrast<A>& contrast, double* results, A* slopes,
                   double slope_scale) {
  const int64_t batch = indices.size(0), negatives = indices.size(1) - 1;
  const int64_t* index = indices.const_data_ptr<int64_t>();
  const int32_t* rows = sorted.rows.template const_data_ptr<int32_t>();
  const int32_t* starts = sorted.starts.template const_data_ptr<int32_t>();
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    const int64_t own = end - begin;
    std::vector<A> sum(dim);
    std::vector<double> gradient(slopes ? own * dim : 0);
    for (int64_t b = begin; b < end; ++b) {
      int32_t row[kTogether];
      std::fill_n(row, kTogether, int32_t(index[b * (negatives + 1)]));
      A score[kTogether], factor[kTogether] = {};
      dot_rows(bank, dim, anchors + b * dim, row, kTogether, score);
      const A log_x = contrast.log_x(score[0]), x = exp_of(log_x);
      results[2 * b] += double(contrast.positive_loss(log_x));
      results[2 * b + 1] += double(x);
      if (slopes) {
        factor[0] = contrast.positive_slope(x);
        add_rows(bank, dim, row, factor, kTogether, sum.data());
        add_to(gradient.data() + (b - begin) * dim, sum.data(), dim);
      }
    }
    for (int64_t block = 0; block < sorted.blocks; ++block) {
      for (int64_t b = begin; b < end; ++b) {
        const int32_t* start = starts + b * (sorted.blocks + 1) + block;
        double loss[8] = {}, total[8] = {};
        for (int32_t first = start[0]; first < start[1]; first += kChunk) {
          const int64_t count = std::min<int64_t>(kChunk, start[1] - first);
          const int64_t padded = (count + kTogether - 1) / kTogether * kTogether;
          const int32_t* from = rows + b * negatives + first;
          alignas(64) int32_t row[kChunk];
          alignas(64) A score[kChunk] = {};
          for (int64_t i = 0; i < padded; ++i) row[i] = from[std::min(i, count - 1)];
          dot_rows(bank, dim, anchors + b * dim, row, padded, score);
          negatives_of(contrast, count, score, loss, total);
          if (slopes) add_rows(bank, dim, row, score, padded, sum.data());
        }
        results[2 * b] += sum_of(loss);
        results[2 * b + 1] += sum_of(total);
        if (slopes) add_to(gradient.data() + (b - begin) * dim, sum.data(), dim);
      }
    }
    for (int64_t i = 0; slopes && i < own * dim; ++i) {
      slopes[begin * dim + i] = A(slope_scale * gradient[i]);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> contrastive_loss(
    Tensor student, Tensor teacher, Tensor student_bank, Tensor teacher_bank, Tensor indices,
    Tensor z_student, Tensor z_teacher, double temperature, bool slopes) {
  const int64_t batch = student.size(0), dim = student.size(1);
  const int64_t samples = student_bank.size(0), negatives = indices.size(1) - 1;
  const ScalarType type = student.scalar_type();
  KD_CHECK(samples < int64_t(1) << 31, "contrastive_loss: banks must have less than 2^31 rows");
  const Blocks sorted = blocks_of(indices, samples, dim * int64_t(student.element_size()));
  Tensor loss = empty_on(student, {}, type), mean = empty_on(student, {2}, type);
  Tensor student_slope = empty_on(student, {slopes ? batch : 0, dim}, type);
  Tensor teacher_slope = empty_on(student, {slopes ? batch : 0, dim}, type);
  with_accumulator(student, [&](auto zero) {
    using A = decltype(zero);
    double total = 0;
    for (int side = 0; side < 2; ++side) {
      const Tensor& anchors = side == 0 ? student : teacher;
      const Tensor& bank = side == 0 ? teacher_bank : student_bank;
      Tensor& slope = side == 0 ? student_slope : teacher_slope;
      const double z = double(*(side == 0 ? z_student : z_teacher).const_data_ptr<A>());
      Contrast<A> contrast = contrast_of<A>(temperature, negatives, samples);
      contrast.log_z = A(std::log(z));
      std::vector<double> results(2 * batch);
      contrast_side(anchors.const_data_ptr<A>(), bank.const_data_ptr<A>(), dim, indices, sorted,
                    contrast, results.data(), slopes ? slope.mutable_data_ptr<A>() : nullptr,
                    1 / (temperature * double(batch)));
      double sum = 0;
      for (int64_t b = 0; b < batch; ++b) {
        total += results[2 * b] / double(batch);
        sum += results[2 * b + 1];
      }
      mean.mutable_data_ptr<A>()[side] = A(sum / (double(batch) * double(negatives + 1)));
    }
    *loss.mutable_data_ptr<A>() = A(total);
  });
  return {loss, mean, student_slope, teacher_slope};
}

std::tuple<Tensor, Tensor> contrastive_loss_backward(Tensor grad, Tensor student, Tensor teacher,
                                                     Tensor student_slope, Tensor teacher_slope) {
  const int64_t batch = student.size(0), dim = student.size(1);
  Tensor first = empty_on(student, {batch, dim}, student.scalar_type());
  Tensor second = empty_on(student, {batch, dim}, student.scalar_type());
  with_accumulator(student, [&](auto zero) {
    using A = decltype(zero);
    const A factor = *grad.const_data_ptr<A>();
    for (int side = 0; side < 2; ++side) {
      const A* from = (side == 0 ? student_slope : teacher_slope).const_data_ptr<A>();
      A* to = (side == 0 ? first : second).mutable_data_ptr<A>();
      for (int64_t i = 0; i < batch * dim; ++i) to[i] = factor * from[i];
    }
  });
  return {first, second};
}

// ---- Bank update

template <typename A>
KD_CLONES void blend(A* __restrict__ row, const A* __restrict__ embedding, int64_t dim,
                     A momentum) {
  double square = 0;
  for (int64_t i = 0; i < dim; ++i) {
    row[i] = momentum * row[i] + (1 - momentum) * embedding[i];
    square += double(row[i]) * double(row[i]);
  }
  const A factor = A(1 / std::max(std::sqrt(square), kRowEpsilon));
  for (int64_t i = 0; i < dim; ++i) row[i] *= factor;
}

void contrastive_update_(Tensor student_bank, Tensor teacher_bank, Tensor student, Tensor teacher,
                         Tensor index, double momentum) {
  const int64_t batch = index.numel(), dim = student.size(1), samples = student_bank.size(0);
  const int64_t* at = index.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < batch; ++b) {
    KD_CHECK(at[b] >= 0 && at[b] < samples, "contrastive_update_: index must be in [0, ", samples,
             "), got ", at[b]);
  }
  with_accumulator(student, [&](auto zero) {
    using A = decltype(zero);
    for (int64_t b = 0; b < batch; ++b) {
      if (std::find(at + b + 1, at + batch, at[b]) != at + batch) continue;  // the last one counts
      blend(student_bank.mutable_data_ptr<A>() + at[b] * dim,
            student.const_data_ptr<A>() + b * dim, dim, A(momentum));
      blend(teacher_bank.mutable_data_ptr<A>() + at[b] * dim,
            teacher.const_data_ptr<A>() + b * dim, dim, A(momentum));
    }
  });
}

}  // namespace
}  // namespace kdfast::cpu

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("draw_negatives", TORCH_BOX(&kdfast::cpu::draw_negatives));
  m.impl("contrastive_loss", TORCH_BOX(&kdfast::cpu::contrastive_loss));
  m.impl("contrastive_loss_backward", TORCH_BOX(&kdfast::cpu::contrastive_loss_backward));
  m.impl("contrastive_update_", TORCH_BOX(&kdfast::cpu::contrastive_update_));
}
