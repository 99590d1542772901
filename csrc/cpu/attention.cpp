// Attention maps on the CPU. One task is one sample: it reads each feature once, in memory order,
// and the maps of a sample stay in the first-level cache until they are reduced.
#include <algorithm>

#include "check.h"
#include "cpu/buffers.h"
#include "cpu/lanes.h"
#include "arithmetic.h"

namespace kdfast::cpu {
namespace {

constexpr int64_t kTile = 1024;                   // positions or elements handled at a time
constexpr int64_t kStreamFrom = int64_t(16) << 20;  // gradients that no cache would keep, in bytes
constexpr int64_t kGrain = 32768;                 // elements that are worth a thread
constexpr int64_t kChannels = 64;  // channels summed before they join the map, for accuracy

// out[i] += sum over rows r of |x[r * stride + i]|^p, eight rows a pass: as many streams as the
// prefetchers follow, and an eighth of the traffic to `out`.
template <typename A, typename T, int P>
KD_CLONES void add_rows(const T* __restrict__ x, int64_t stride, int64_t rows, int64_t count,
                        A power, A* __restrict__ out) {
  int64_t row = 0;
  for (; row + 8 <= rows; row += 8, x += 8 * stride) {
    for (int64_t i = 0; i < count; ++i) {
      A term[8];
      for (int k = 0; k < 8; ++k) term[k] = energy<P>(A(widen(x[k * stride + i])), power);
      out[i] += ((term[0] + term[1]) + (term[2] + term[3])) +
                ((term[4] + term[5]) + (term[6] + term[7]));
    }
  }
  for (; row < rows; ++row, x += stride) {
    for (int64_t i = 0; i < count; ++i) out[i] += energy<P>(A(widen(x[i])), power);
  }
}

// out[r] += sum over i of |x[r * length + i]|^p. A row ends in 8 partial sums; those of 32 rows are
// added together, across rows, because adding up within one register is what costs.
template <typename A, typename T, int P>
KD_CLONES void sum_rows(const T* __restrict__ x, int64_t rows, int64_t length, A power,
                        A* __restrict__ out) {
  constexpr int64_t kRows = 32;
  alignas(64) A partial[kRows * 8];
  for (int64_t start = 0; start < rows; start += kRows, out += kRows) {
    const int64_t count = rows - start < kRows ? rows - start : kRows;
    for (int64_t row = 0; row < count; ++row, x += length) {
      A lane[16] = {};
      int64_t i = 0;
      for (; i + 16 <= length; i += 16) {
        for (int k = 0; k < 16; ++k) lane[k] += energy<P>(A(widen(x[i + k])), power);
      }
      for (int k = 0; i < length; ++i, ++k) lane[k] += energy<P>(A(widen(x[i])), power);
      for (int k = 0; k < 8; ++k) partial[row * 8 + k] = lane[k] + lane[k + 8];
    }
    for (int64_t row = 0; row < count; ++row) {
      const A* sum = partial + row * 8;
      out[row] += ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
    }
  }
}

template <typename A>
KD_CLONES void add_map(const A* from, int64_t count, A* map) {
  for (int64_t i = 0; i < count; ++i) map[i] += from[i];
}

template <typename A>
KD_CLONES void scale_map(A* map, int64_t count, A factor) {
  for (int64_t i = 0; i < count; ++i) map[i] *= factor;
}

// a.b in double, in 8 interleaved partial sums.
template <typename A>
KD_CLONES double product(const A* a, const A* b, int64_t count) {
  double lane[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (int k = 0; k < 8; ++k) lane[k] += double(a[i + k]) * double(b[i + k]);
  }
  for (int k = 0; i < count; ++i, ++k) lane[k] += double(a[i]) * double(b[i]);
  return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

// map = mean over channels of |F|^p for one sample; [positions].
template <typename A>
void channel_mean(const Feature& feature, int64_t sample, double power, A* map) {
  const int64_t channels = feature.channels, positions = feature.positions;
  std::fill_n(map, positions, A(0));
  with_storage<A>(feature.storage, [&](auto element) {
    using T = decltype(element);
    const T* x = static_cast<const T*>(feature.data) + sample * feature.sample_stride;
    with_power(power, [&](auto p) {
      if (!feature.channels_last) {
        alignas(64) A sums[kTile];
        for (int64_t start = 0; start < positions; start += kTile) {
          const int64_t count = std::min(kTile, positions - start);
          for (int64_t first = 0; first < channels; first += kChannels) {
            std::fill_n(sums, count, A(0));
            add_rows<A, T, p.value>(x + first * positions + start, positions,
                                    std::min(kChannels, channels - first), count, A(power), sums);
            add_map(sums, count, map + start);
          }
        }
      } else {
        sum_rows<A, T, p.value>(x, positions, channels, A(power), map);
      }
    });
  });
  scale_map(map, positions, A(1) / A(channels));
}

// out[r * stride + i] = slope[i] * energy_slope(x[r * stride + i]).
template <typename A, typename T, int P>
KD_CLONES void slope_rows(const T* __restrict__ x, int64_t stride, int64_t rows, int64_t count,
                          const A* __restrict__ slope, A power, T* __restrict__ out) {
  for (int64_t row = 0; row < rows; ++row, x += stride, out += stride) {
    for (int64_t i = 0; i < count; ++i) {
      out[i] = narrow_to<T>(slope[i] * energy_slope<P>(A(widen(x[i])), power));
    }
  }
}

// out[r * length + i] = slope[r] * energy_slope(x[r * length + i]).
template <typename A, typename T, int P>
KD_CLONES void slope_positions(const T* __restrict__ x, int64_t rows, int64_t length,
                               const A* __restrict__ slope, A power, T* __restrict__ out) {
  for (int64_t row = 0; row < rows; ++row, x += length, out += length) {
    const A factor = slope[row];
    for (int64_t i = 0; i < length; ++i) {
      out[i] = narrow_to<T>(factor * energy_slope<P>(A(widen(x[i])), power));
    }
  }
}

// gradient = slope of the map's position * energy_slope(F) for one sample. `slope(start, count,
// to)` writes the slopes of positions [start, start + count).
template <typename A, typename Slope>
void channel_gradient(const Feature& feature, int64_t sample, double power,
                           const Slope& slope, void* gradient) {
  const int64_t channels = feature.channels, positions = feature.positions;
  const int64_t size = channels * positions;
  alignas(64) A slopes[kTile];
  with_storage<A>(feature.storage, [&](auto element) {
    using T = decltype(element);
    const T* x = static_cast<const T*>(feature.data) + sample * feature.sample_stride;
    T* out = static_cast<T*>(gradient) + sample * size;
    const bool stream = feature.samples * size * int64_t(sizeof(T)) >= kStreamFrom;
    alignas(64) T rows_buffer[kTile];
    with_power(power, [&](auto p) {
      for (int64_t start = 0; start < positions; start += kTile) {
        const int64_t count = std::min(kTile, positions - start);
        slope(start, count, slopes);
        if (!feature.channels_last && !stream) {
          slope_rows<A, T, p.value>(x + start, positions, channels, count, slopes, A(power),
                                    out + start);
        } else if (!feature.channels_last) {
          for (int64_t c = 0; c < channels; ++c) {
            const int64_t offset = c * positions + start;
            slope_rows<A, T, p.value>(x + offset, 0, 1, count, slopes, A(power), rows_buffer);
            stream_copy(out + offset, rows_buffer, count * sizeof(T));
          }
        } else if (!stream || channels > kTile) {
          slope_positions<A, T, p.value>(x + start * channels, count, channels, slopes, A(power),
                                         out + start * channels);
        } else {
          const int64_t step = kTile / channels;
          for (int64_t row = 0; row < count; row += step) {
            const int64_t rows = std::min(step, count - row);
            const int64_t offset = (start + row) * channels;
            slope_positions<A, T, p.value>(x + offset, rows, channels, slopes + row, A(power),
                                           rows_buffer);
            stream_copy(out + offset, rows_buffer, rows * channels * sizeof(T));
          }
        }
      }
    });
  });
}

// Runs body(sample) over all samples, in parallel when there is enough work.
template <typename Body>
void for_samples(int64_t samples, int64_t elements_per_sample, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements_per_sample));
  torch::stable::parallel_for(0, samples, grain, [&](int64_t begin, int64_t end) {
    for (int64_t sample = begin; sample < end; ++sample) body(sample);
    stream_fence();
  });
}

std::tuple<Tensor, Tensor> attention_map(Tensor feature, double power) {
  const DenseFeature dense("attention_map", feature);
  const Feature& view = dense.view;
  const ScalarType type = accumulate_type(feature);
  Tensor map = empty_on(feature, {view.samples, view.positions}, type);
  Tensor norm = empty_on(feature, {view.samples}, type);
  with_accumulator(feature, [&](auto zero) {
    using A = decltype(zero);
    A* maps = map.mutable_data_ptr<A>();
    A* norms = norm.mutable_data_ptr<A>();
    for_samples(view.samples, view.channels * view.positions, [&](int64_t sample) {
      A* own = maps + sample * view.positions;
      channel_mean(view, sample, power, own);
      const double square = product(own, own, view.positions);
      norms[sample] = A(std::sqrt(square));
      scale_map(own, view.positions, A(1 / map_norm(square)));
    });
  });
  return {map, norm};
}

Tensor attention_map_backward(Tensor grad, Tensor feature, Tensor map, Tensor norm, double power) {
  const DenseFeature dense("attention_map_backward", feature);
  const Feature& view = dense.view;
  const Tensor dense_grad = torch::stable::contiguous(grad);
  Tensor gradient = reused_gradient(dense);
  with_accumulator(feature, [&](auto zero) {
    using A = decltype(zero);
    const A* grads = dense_grad.const_data_ptr<A>();
    const A* maps = map.const_data_ptr<A>();
    const A* norms = norm.const_data_ptr<A>();
    void* out = gradient.mutable_data_ptr();
    for_samples(view.samples, view.channels * view.positions, [&](int64_t sample) {
      const A* g = grads + sample * view.positions;
      const A* q = maps + sample * view.positions;
      // dL/dA = (g - (g.Q) Q) / norm, without the second term where the norm is clamped.
      const bool clamped = norms[sample] < A(kMapEpsilon);
      const A along = clamped ? A(0) : A(product(g, q, view.positions));
      const A factor =
          A(power / double(view.channels) / (clamped ? kMapEpsilon : double(norms[sample])));
      const auto slope = [&](int64_t start, int64_t count, A* to) {
        for (int64_t i = 0; i < count; ++i) to[i] = factor * (g[start + i] - along * q[start + i]);
      };
      channel_gradient<A>(view, sample, power, slope, out);
    });
  });
  return gradient;
}

std::tuple<Tensor, std::vector<Tensor>, Tensor> attention_loss(std::vector<Tensor> student,
                                                               std::vector<Tensor> teacher,
                                                               double power) {
  const std::vector<DenseFeature> students = dense_features("attention_loss", student);
  const std::vector<DenseFeature> teachers = dense_features("attention_loss", teacher);
  check_pairs("attention_loss", students, teachers);
  const int64_t pairs = int64_t(students.size()), samples = students[0].view.samples;

  const ScalarType type = accumulate_type(student[0]);
  Tensor loss = empty_on(student[0], {}, type);
  Tensor products = empty_on(student[0], {pairs, samples, 3}, ScalarType::Double);
  std::vector<Tensor> maps;
  int64_t elements = 0;
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const Feature &s = students[pair].view, &t = teachers[pair].view;
    maps.push_back(empty_on(student[0], {2, samples, s.positions}, type));
    elements += (s.channels + t.channels) * s.positions;
  }
  with_accumulator(student[0], [&](auto zero) {
    using A = decltype(zero);
    double* stats = products.mutable_data_ptr<double>();
    std::vector<A*> data;
    for (Tensor& map : maps) data.push_back(map.mutable_data_ptr<A>());
    for_samples(samples, elements, [&](int64_t sample) {
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const int64_t positions = students[pair].view.positions;
        A* s = data[pair] + sample * positions;
        A* t = s + samples * positions;
        channel_mean(students[pair].view, sample, power, s);
        channel_mean(teachers[pair].view, sample, power, t);
        double* row = stats + (pair * samples + sample) * 3;
        row[0] = product(s, s, positions);
        row[1] = product(t, t, positions);
        row[2] = product(s, t, positions);
      }
    });
    double total = 0;
    for (int64_t pair = 0; pair < pairs; ++pair) {
      double sum = 0;
      for (int64_t sample = 0; sample < samples; ++sample) {
        const double* row = stats + (pair * samples + sample) * 3;
        sum += map_distance({row[0], row[1], row[2]});
      }
      total += sum / (double(samples) * double(students[pair].view.positions));
    }
    *loss.mutable_data_ptr<A>() = A(total);
  });
  return {loss, maps, products};
}

std::vector<Tensor> attention_loss_backward(Tensor grad, std::vector<Tensor> features,
                                            std::vector<Tensor> maps, Tensor products,
                                            double power, std::vector<int64_t> slots) {
  const std::vector<DenseFeature> dense = dense_features("attention_loss_backward", features);
  std::vector<Tensor> gradients;
  int64_t elements = 0;
  for (const DenseFeature& feature : dense) {
    gradients.push_back(reused_gradient(feature));
    elements += feature.view.channels * feature.view.positions;
  }
  with_accumulator(grad, [&](auto zero) {
    using A = decltype(zero);
    const double upstream = double(*grad.const_data_ptr<A>());
    const double* stats = products.const_data_ptr<double>();
    std::vector<const A*> data;
    for (const Tensor& map : maps) data.push_back(map.const_data_ptr<A>());
    std::vector<void*> out;
    for (Tensor& gradient : gradients) out.push_back(gradient.mutable_data_ptr());
    for_samples(dense[0].view.samples, elements, [&](int64_t sample) {
      for (size_t i = 0; i < slots.size(); ++i) {
        const Feature& view = dense[i].view;
        const int64_t pair = slots[i] / 2, side = slots[i] % 2;
        const double* row = stats + (pair * view.samples + sample) * 3;
        const MapPair products{row[side], row[1 - side], row[2]};
        const double scale = upstream * power / double(view.channels) /
                             (double(view.samples) * double(view.positions));
        const MapSlope<A> slope_at = map_slope<A>(products, scale);
        const A* own = data[pair] + (side * view.samples + sample) * view.positions;
        const A* other = data[pair] + ((1 - side) * view.samples + sample) * view.positions;
        const auto slope = [&](int64_t start, int64_t count, A* to) {
          for (int64_t k = 0; k < count; ++k) to[k] = slope_at(own[start + k], other[start + k]);
        };
        channel_gradient<A>(view, sample, power, slope, out[i]);
      }
    });
  });
  return gradients;
}

}  // namespace
}  // namespace kdfast::cpu

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("attention_map", TORCH_BOX(&kdfast::cpu::attention_map));
  m.impl("attention_map_backward", TORCH_BOX(&kdfast::cpu::attention_map_backward));
  m.impl("attention_loss", TORCH_BOX(&kdfast::cpu::attention_loss));
  m.impl("attention_loss_backward", TORCH_BOX(&kdfast::cpu::attention_loss_backward));
}
