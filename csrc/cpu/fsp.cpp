// Gram matrices of feature maps on the CPU. One task is one sample of all pairs and both networks.
//
// Every product, forward and backward, is one loop: C[r][v] += sum over k of A[r][k] * B[k][v],
// where A is read an element at a time at any stride and B in vectors. A feature map serves as A
// from where it lies; as B it does so where its vector dimension is the dense one, and else is
// transposed, or pooled, or widened, a tile at a time, into a buffer of the first-level cache.
#include <algorithm>
#include <vector>

#include "cpu/buffers.h"
#include "cpu/product.h"
#include "fsp_check.h"

namespace kdfast::cpu {
namespace {

constexpr int64_t kGrain = 32768;       // elements that are worth a thread
constexpr int64_t kTileElements = 4096;  // of both feature maps of a Gram matrix

template <bool Max, typename A>
KD_HD A pooled_with(A value, A next) {
  if constexpr (Max) {
    return replaces(next, value) ? next : value;
  } else {
    return value + next;
  }
}

// Walks the grid positions [start, start + count) in pieces of one grid row:
// body(offset in the tile, first feature position, length).
template <typename Body>
KD_HD void for_grid_rows(const Grid& grid, int64_t start, int64_t count, const Body& body) {
  int64_t row = start / grid.width, column = start % grid.width;
  for (int64_t at = 0; at < count; ++row, column = 0) {
    const int64_t length = std::min(grid.width - column, count - at);
    body(at, row * grid.rows * grid.feature_width() + column * grid.columns, length);
    at += length;
  }
}

// One channel of an NCHW feature: to[i] = the average or maximum of the window of grid position
// start + i. C is the window's width, 0 for any.
template <typename A, typename T, bool Max, int C>
KD_CLONES void pool_channel(const Grid& grid, const T* __restrict__ x, int64_t start,
                            int64_t count, A* __restrict__ to) {
  const int64_t columns = C > 0 ? C : grid.columns, width = grid.feature_width();
  const A factor = Max ? A(1) : A(1) / A(grid.window());
  for_grid_rows(grid, start, count, [&](int64_t at, int64_t first, int64_t length) {
    A* out = to + at;
    for (int64_t row = 0; row < grid.rows; ++row) {
      const T* from = x + first + row * width;
      if constexpr (C == 2) {
        for (int64_t i = 0; i < length; ++i) {
          const A both = pooled_with<Max>(A(widen(from[2 * i])), A(widen(from[2 * i + 1])));
          out[i] = row == 0 ? both : pooled_with<Max>(out[i], both);
        }
        continue;
      }
      for (int64_t i = 0; i < length; ++i) {
        const A value = A(widen(from[i * columns]));
        out[i] = row == 0 ? value : pooled_with<Max>(out[i], value);
      }
      for (int64_t column = 1; column < columns; ++column) {
        for (int64_t i = 0; i < length; ++i) {
          out[i] = pooled_with<Max>(out[i], A(widen(from[i * columns + column])));
        }
      }
    }
    if (!Max) {
      for (int64_t i = 0; i < length; ++i) out[i] *= factor;
    }
  });
}

// channels_last: to[i * channels + c] likewise.
template <typename A, typename T, bool Max>
KD_CLONES void pool_positions(const Grid& grid, const T* __restrict__ x, int64_t start,
                              int64_t count, A* __restrict__ to) {
  const int64_t channels = grid.feature.channels, width = grid.feature_width();
  const A factor = Max ? A(1) : A(1) / A(grid.window());
  for (int64_t i = 0; i < count; ++i, to += channels) {
    const T* corner = x + grid.corner(start + i) * channels;
    for (int64_t c = 0; c < channels; ++c) to[c] = A(widen(corner[c]));
    for (int64_t place = 1; place < grid.window(); ++place) {
      const T* from =
          corner + (place / grid.columns * width + place % grid.columns) * channels;
      for (int64_t c = 0; c < channels; ++c) to[c] = pooled_with<Max>(to[c], A(widen(from[c])));
    }
    if (!Max) {
      for (int64_t c = 0; c < channels; ++c) to[c] *= factor;
    }
  }
}

// A tile of a grid: element (channel, position) at data[channel * channel + position * position].
template <typename A>
struct Tile {
  const A* data;
  int64_t channel, position;
};

// Positions [start, start + count) of a sample: in place where that is possible, else in `buffer`
// (channels * count), in the feature's own order.
template <typename A>
Tile<A> tile_of(const Grid& grid, int64_t sample, int64_t start, int64_t count, bool maximum,
                A* buffer) {
  const Feature& feature = grid.feature;
  const int64_t channels = feature.channels;
  Tile<A> tile{};
  with_storage<A>(feature.storage, [&](auto element) {
    using T = decltype(element);
    const T* x = static_cast<const T*>(feature.data) + sample * feature.sample_stride;
    tile = feature.channels_last ? Tile<A>{buffer, 1, channels} : Tile<A>{buffer, count, 1};
    if (!grid.pooled()) {
      if constexpr (std::is_same_v<T, A>) {
        tile = feature.channels_last ? Tile<A>{x + start * channels, 1, channels}
                                     : Tile<A>{x + start, grid.positions, 1};
      } else if (feature.channels_last) {
        widen_rows<A, T>(x + start * channels, 0, 1, count * channels, buffer, 0);
      } else {
        widen_rows<A, T>(x + start, grid.positions, channels, count, buffer, count);
      }
      return;
    }
    if (feature.channels_last) {
      (maximum ? pool_positions<A, T, true> : pool_positions<A, T, false>)(grid, x, start, count,
                                                                          buffer);
      return;
    }
    const int64_t positions = grid.positions * grid.window();
    auto* pool = grid.columns == 2 ? (maximum ? pool_channel<A, T, true, 2>
                                              : pool_channel<A, T, false, 2>)
                                   : (maximum ? pool_channel<A, T, true, 0>
                                              : pool_channel<A, T, false, 0>);
    for (int64_t c = 0; c < channels; ++c) {
      pool(grid, x + c * positions, start, count, buffer + c * count);
    }
  });
  return tile;
}

// `tile` with its elements dense along channels or along positions, transposed into `buffer` if
// they are not; rows are then `padded` long.
template <typename A>
Tile<A> dense_along_channels(const Tile<A>& tile, int64_t channels, int64_t count, A* buffer) {
  if (tile.channel == 1) return tile;
  const int64_t padded = round_up(channels, kLanes<A>);
  transpose(tile.data, tile.channel, channels, count, buffer, padded, padded);
  return {buffer, 1, padded};
}

template <typename A>
Tile<A> dense_along_positions(const Tile<A>& tile, int64_t channels, int64_t count, A* buffer) {
  if (tile.position == 1) return tile;
  transpose(tile.data, tile.position, count, channels, buffer, count, count);
  return {buffer, count, 1};
}

// How many positions are handled at a time, so that both tiles fit the first-level cache.
int64_t tile_positions(const Grid& grid, int64_t channels) {
  const int64_t fitting = std::clamp<int64_t>(kTileElements / channels / 32 * 32, 64, kDepth);
  return std::min(grid.positions, fitting);
}

// What a thread works in.
template <typename A>
struct Scratch {
  std::vector<A> first, second, turned, own, other, result;

  static A* at_least(std::vector<A>& buffer, int64_t size) {
    if (int64_t(buffer.size()) < size) buffer.resize(size);
    return buffer.data();
  }
};

// out[i * channels of the second + j] = mean over positions of first[i] * second[j], one sample.
template <typename A>
void gram(const GramPair& pair, int64_t sample, bool maximum, Scratch<A>& scratch, A* out) {
  // The map with fewer channels is the vector side: it is the one that may have to be transposed.
  const int right = pair.channels(0) < pair.channels(1) ? 0 : 1;
  const Grid &a = pair.grid[1 - right], &b = pair.grid[right];
  const int64_t rows = a.feature.channels, columns = b.feature.channels;
  const int64_t padded = round_up(columns, kLanes<A>), positions = a.positions;
  const int64_t step = tile_positions(pair.grid[0], rows + columns);
  A* left_tile = scratch.at_least(scratch.first, rows * step);
  A* right_tile = scratch.at_least(scratch.second, columns * step);
  A* turned = scratch.at_least(scratch.turned, padded * step);
  A* sums = scratch.at_least(scratch.result, rows * padded);
  for (int64_t start = 0; start < positions; start += step) {
    const int64_t count = std::min(step, positions - start);
    const Tile<A> l = tile_of(a, sample, start, count, maximum, left_tile);
    const Tile<A> r = dense_along_channels(tile_of(b, sample, start, count, maximum, right_tile),
                                           columns, count, turned);
    multiply(rows, r.data == turned ? padded : columns, count, l.data, l.channel, l.position,
             r.data, r.position, sums, padded, start > 0);
  }
  const A factor = A(1) / A(positions);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      const int64_t to = right == 1 ? row * columns + column : column * rows + row;
      out[to] = factor * sums[row * padded + column];
    }
  }
}

// own -= other; the sum of the squares of what is left.
template <typename A>
KD_CLONES double subtract(A* __restrict__ own, const A* __restrict__ other, int64_t count) {
  double lane[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (int k = 0; k < 8; ++k) {
      const A difference = own[i + k] - other[i + k];
      own[i + k] = difference;
      lane[k] += double(difference) * double(difference);
    }
  }
  for (int k = 0; i < count; ++i, ++k) {
    own[i] -= other[i];
    lane[k] += double(own[i]) * double(own[i]);
  }
  return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

// An NCHW channel's gradient from that of its pooled tile; avg.
template <typename A, int C>
KD_CLONES void spread_channel(const Grid& grid, const A* __restrict__ from, int64_t start,
                              int64_t count, A* __restrict__ to, bool add) {
  const int64_t columns = C > 0 ? C : grid.columns, width = grid.feature_width();
  for_grid_rows(grid, start, count, [&](int64_t at, int64_t first, int64_t length) {
    const A* value = from + at;
    for (int64_t row = 0; row < grid.rows; ++row) {
      A* out = to + first + row * width;
      if (add) {
        for (int64_t i = 0; i < length; ++i) {
          for (int64_t c = 0; c < columns; ++c) out[i * columns + c] += value[i];
        }
      } else {
        for (int64_t i = 0; i < length; ++i) {
          for (int64_t c = 0; c < columns; ++c) out[i * columns + c] = value[i];
        }
      }
    }
  });
}

template <typename A>
KD_CLONES void spread_positions(const Grid& grid, const A* __restrict__ from, int64_t start,
                                int64_t count, A* __restrict__ to, bool add) {
  const int64_t channels = grid.feature.channels, width = grid.feature_width();
  for (int64_t i = 0; i < count; ++i, from += channels) {
    A* corner = to + grid.corner(start + i) * channels;
    for (int64_t place = 0; place < grid.window(); ++place) {
      A* out = corner + (place / grid.columns * width + place % grid.columns) * channels;
      if (add) {
        for (int64_t c = 0; c < channels; ++c) out[c] += from[c];
      } else {
        for (int64_t c = 0; c < channels; ++c) out[c] = from[c];
      }
    }
  }
}

// The gradient of a pooled tile goes to the maximum of each window, or to all of it.
template <typename A>
void spread(const Grid& grid, int64_t sample, int64_t start, int64_t count, bool maximum,
            const A* from, A* to, bool add) {
  const Feature& feature = grid.feature;
  const int64_t channels = feature.channels, positions = grid.positions * grid.window();
  if (!maximum) {
    if (feature.channels_last) {
      spread_positions(grid, from, start, count, to, add);
      return;
    }
    for (int64_t c = 0; c < channels; ++c) {
      (grid.columns == 2 ? spread_channel<A, 2> : spread_channel<A, 0>)(
          grid, from + c * count, start, count, to + c * positions, add);
    }
    return;
  }
  const int64_t channel_step = feature.channels_last ? 1 : positions;
  const int64_t position_step = feature.channels_last ? channels : 1;
  with_storage<A>(feature.storage, [&](auto element) {
    using T = decltype(element);
    const T* x = static_cast<const T*>(feature.data) + sample * feature.sample_stride;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t corner = grid.corner(start + i);
      for (int64_t c = 0; c < channels; ++c) {
        int64_t best = corner;
        A most = A(widen(x[c * channel_step + corner * position_step]));
        for (int64_t place = 0; place < grid.window(); ++place) {
          const int64_t at = corner + place / grid.columns * grid.feature_width() +
                             place % grid.columns;
          const A value = A(widen(x[c * channel_step + at * position_step]));
          if (replaces(value, most)) {
            most = value;
            best = at;
          }
          if (!add) to[c * channel_step + at * position_step] = A(0);
        }
        to[c * channel_step + best * position_step] +=
            feature.channels_last ? from[i * channels + c] : from[c * count + i];
      }
    }
  });
}

// The gradient of one side of a pair, one sample: to (+)= factor * the product of `matrix` (the
// gradient of the Gram matrix) with the pair's other side.
template <typename A>
void gram_gradient(const GramPair& pair, int side, int64_t sample, bool maximum, const A* matrix,
                   A factor, Scratch<A>& scratch, A* to, bool add) {
  const Grid &own = pair.grid[side], &other = pair.grid[1 - side];
  const int64_t channels = own.feature.channels, partners = other.feature.channels;
  const int64_t positions = own.positions;
  const bool channels_last = own.feature.channels_last;
  factor /= A(positions) * (own.pooled() && !maximum ? A(own.window()) : A(1));

  // NCHW needs [channels, partners], channels_last [partners, channels].
  A* weights = scratch.at_least(scratch.own, channels * partners);
  const bool as_given = (side == 0) != channels_last;
  const int64_t rows = as_given ? pair.channels(0) : pair.channels(1);
  const int64_t columns = channels * partners / rows;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      weights[row * columns + column] =
          factor * matrix[as_given ? row * columns + column : column * rows + row];
    }
  }

  const int64_t step = tile_positions(pair.grid[0], channels + partners);
  A* buffer = scratch.at_least(scratch.first, partners * step);
  A* turned = scratch.at_least(scratch.turned, partners * step);
  A* result = own.pooled() ? scratch.at_least(scratch.result, channels * step) : nullptr;
  for (int64_t start = 0; start < positions; start += step) {
    const int64_t count = std::min(step, positions - start);
    Tile<A> partner = tile_of(other, sample, start, count, maximum, buffer);
    const bool plus = add && !own.pooled();
    if (channels_last) {
      A* out = own.pooled() ? result : to + start * channels;
      multiply(count, channels, partners, partner.data, partner.position, partner.channel, weights,
               channels, out, channels, plus);
    } else {
      partner = dense_along_positions(partner, partners, count, turned);
      A* out = own.pooled() ? result : to + start;
      multiply(channels, count, partners, weights, partners, int64_t(1), partner.data,
               partner.channel, out, own.pooled() ? count : positions, plus);
    }
    if (own.pooled()) spread(own, sample, start, count, maximum, result, to, add);
  }
}

// A gradient to form: the features' place, and the parts it takes in pairs.
struct Part {
  size_t pair;
  int side;
};

// out[i] = the gradient of features[wanted[i]]; matrices[p] [samples, ...] is that of pair p's Gram
// matrix but for its factor.
template <typename A>
void gram_gradients(const std::vector<DenseFeature>& features, const std::vector<GramPair>& pairs,
                    const std::vector<const A*>& matrices, const std::vector<A>& factors,
                    bool maximum, const std::vector<int64_t>& wanted,
                    std::vector<Tensor>& gradients) {
  std::vector<std::vector<Part>> parts(wanted.size());
  int64_t elements = 1;
  for (size_t i = 0; i < wanted.size(); ++i) {
    for (size_t p = 0; p < pairs.size(); ++p) {
      if (pairs[p].second == wanted[i]) parts[i].push_back({p, 1});
      if (pairs[p].first == wanted[i]) parts[i].push_back({p, 0});
    }
    elements += features[wanted[i]].view.channels * features[wanted[i]].view.positions;
  }
  std::vector<void*> outputs;
  for (Tensor& gradient : gradients) outputs.push_back(gradient.mutable_data_ptr());
  const int64_t samples = features[0].view.samples;
  torch::stable::parallel_for(
      0, samples, std::max<int64_t>(1, kGrain / elements), [&](int64_t begin, int64_t end) {
        Scratch<A> scratch;
        for (int64_t sample = begin; sample < end; ++sample) {
          for (size_t i = 0; i < wanted.size(); ++i) {
            const Feature& feature = features[wanted[i]].view;
            const int64_t size = feature.channels * feature.positions;
            with_storage<A>(feature.storage, [&](auto element) {
              using T = decltype(element);
              T* out = static_cast<T*>(outputs[i]) + sample * size;
              A* sums = nullptr;
              if constexpr (std::is_same_v<T, A>) {
                sums = out;
              } else {
                sums = scratch.at_least(scratch.other, size);
              }
              bool add = false;
              for (const Part& part : parts[i]) {
                const GramPair& pair = pairs[part.pair];
                const A* matrix =
                    matrices[part.pair] + sample * pair.channels(0) * pair.channels(1);
                gram_gradient(pair, part.side, sample, maximum, matrix, factors[part.pair],
                              scratch, sums, add);
                add = true;
              }
              if (!add) std::fill_n(sums, size, A(0));
              if constexpr (!std::is_same_v<T, A>) narrow_row<A, T>(sums, size, out);
            });
          }
        }
      });
}

Tensor fsp_matrix(Tensor first, Tensor second, bool maximum) {
  const DenseFeature a("fsp_matrix", first), b("fsp_matrix", second);
  const GramPair pair = gram_pair("fsp_matrix", a, b);
  const int64_t samples = a.view.samples, size = pair.channels(0) * pair.channels(1);
  Tensor matrix = empty_on(first, {samples, pair.channels(0), pair.channels(1)},
                           accumulate_type(first));
  const int64_t elements = a.view.channels * a.view.positions + b.view.channels * b.view.positions;
  with_accumulator(first, [&](auto zero) {
    using A = decltype(zero);
    A* out = matrix.mutable_data_ptr<A>();
    torch::stable::parallel_for(0, samples, std::max<int64_t>(1, kGrain / elements),
                                [&](int64_t begin, int64_t end) {
                                  Scratch<A> scratch;
                                  for (int64_t sample = begin; sample < end; ++sample) {
                                    gram(pair, sample, maximum, scratch, out + sample * size);
                                  }
                                });
  });
  return matrix;
}

std::vector<Tensor> fsp_matrix_backward(Tensor grad, Tensor first, Tensor second, bool maximum,
                                        std::vector<int64_t> wanted) {
  const char* op = "fsp_matrix_backward";
  const std::vector<DenseFeature> features = dense_features(op, {first, second});
  const std::vector<GramPair> pairs = gram_pairs(op, features, {0, 1});
  const Tensor dense_grad = torch::stable::contiguous(grad);
  check_matrix(op, dense_grad, pairs[0]);
  check_wanted(op, wanted, features);
  std::vector<Tensor> gradients;
  for (int64_t place : wanted) gradients.push_back(reused_gradient(features[place]));
  with_accumulator(grad, [&](auto zero) {
    using A = decltype(zero);
    gram_gradients<A>(features, pairs, {dense_grad.const_data_ptr<A>()}, {A(1)}, maximum, wanted,
                      gradients);
  });
  return gradients;
}

std::tuple<Tensor, std::vector<Tensor>> fsp_loss(std::vector<Tensor> student,
                                                 std::vector<Tensor> teacher,
                                                 std::vector<int64_t> pairs, bool maximum) {
  const std::vector<DenseFeature> students = dense_features("fsp_loss", student);
  const std::vector<DenseFeature> teachers = dense_features("fsp_loss", teacher);
  const std::vector<GramPair> networks[2] = {gram_pairs("fsp_loss", students, pairs),
                                             gram_pairs("fsp_loss", teachers, pairs)};
  check_networks("fsp_loss", networks[0], networks[1]);
  const std::vector<GramPair>& shapes = networks[0];
  const int64_t samples = students[0].view.samples, count = int64_t(shapes.size());

  const ScalarType type = accumulate_type(student[0]);
  Tensor loss = empty_on(student[0], {}, type);
  std::vector<Tensor> differences;
  int64_t elements = 0, largest = 0;
  for (const GramPair& pair : shapes) {
    differences.push_back(empty_on(student[0], {samples, pair.channels(0), pair.channels(1)}, type));
    largest = std::max(largest, pair.channels(0) * pair.channels(1));
  }
  for (const auto* network : {&students, &teachers}) {
    for (const DenseFeature& f : *network) elements += f.view.channels * f.view.positions;
  }
  with_accumulator(student[0], [&](auto zero) {
    using A = decltype(zero);
    std::vector<A*> out;
    for (Tensor& difference : differences) out.push_back(difference.mutable_data_ptr<A>());
    std::vector<double> squares(samples * count);
    torch::stable::parallel_for(
        0, samples, std::max<int64_t>(1, kGrain / elements), [&](int64_t begin, int64_t end) {
          Scratch<A> scratch;
          std::vector<A> other(largest);
          for (int64_t sample = begin; sample < end; ++sample) {
            for (int64_t p = 0; p < count; ++p) {
              const int64_t size = shapes[p].channels(0) * shapes[p].channels(1);
              A* own = out[p] + sample * size;
              gram(networks[0][p], sample, maximum, scratch, own);
              gram(networks[1][p], sample, maximum, scratch, other.data());
              squares[p * samples + sample] = subtract(own, other.data(), size);
            }
          }
        });
    double total = 0;
    for (int64_t p = 0; p < count; ++p) {
      double sum = 0;
      for (int64_t sample = 0; sample < samples; ++sample) sum += squares[p * samples + sample];
      total += sum / (double(samples) * double(shapes[p].channels(0) * shapes[p].channels(1)));
    }
    *loss.mutable_data_ptr<A>() = A(total);
  });
  return {loss, differences};
}

std::vector<Tensor> fsp_loss_backward(Tensor grad, std::vector<Tensor> features,
                                      std::vector<Tensor> differences, std::vector<int64_t> places,
                                      bool maximum, std::vector<int64_t> wanted, double sign) {
  const char* op = "fsp_loss_backward";
  const std::vector<DenseFeature> dense = dense_features(op, features);
  const std::vector<GramPair> pairs = gram_pairs(op, dense, places);
  check_wanted(op, wanted, dense);
  KD_CHECK(differences.size() == pairs.size(), op, ": expected a difference for every pair");
  std::vector<Tensor> gradients;
  for (int64_t place : wanted) gradients.push_back(reused_gradient(dense[place]));
  with_accumulator(grad, [&](auto zero) {
    using A = decltype(zero);
    const double upstream = double(*grad.const_data_ptr<A>());
    std::vector<const A*> matrices;
    std::vector<A> factors;
    for (size_t p = 0; p < pairs.size(); ++p) {
      check_matrix(op, differences[p], pairs[p]);
      matrices.push_back(differences[p].const_data_ptr<A>());
      factors.push_back(A(2 * sign * upstream / double(differences[p].numel())));
    }
    gram_gradients<A>(dense, pairs, matrices, factors, maximum, wanted, gradients);
  });
  return gradients;
}

}  // namespace
}  // namespace kdfast::cpu

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("fsp_matrix", TORCH_BOX(&kdfast::cpu::fsp_matrix));
  m.impl("fsp_matrix_backward", TORCH_BOX(&kdfast::cpu::fsp_matrix_backward));
  m.impl("fsp_loss", TORCH_BOX(&kdfast::cpu::fsp_loss));
  m.impl("fsp_loss_backward", TORCH_BOX(&kdfast::cpu::fsp_loss_backward));
}
