// Redrawing split weights on the CPU. A task is a tile of one layer; what is kept is not drawn
// where a whole step is.
#include <algorithm>

#include "check.h"
#include "cpu/lanes.h"
#include "cpu/random.h"
#include "split_reset_check.h"

namespace kdfast::cpu {
namespace {

constexpr int64_t kTile = 16384;  // elements of a task
constexpr int64_t kStep = 256;    // elements drawn at a time

template <typename A, typename T>
KD_CLONES void redraw(const uint32_t* __restrict__ words, int64_t count, A width,
                      T* __restrict__ out) {
  for (int64_t i = 0; i < count; ++i) out[i] = narrow_to<T>(redrawn(words[i], width));
}

// Calls reset(begin, end) for the elements of [begin, end) that are not kept, run by run.
template <typename Reset>
void for_reset(const SplitLayer& layer, int64_t begin, int64_t end, const Reset& reset) {
  if (layer.packed()) {
    for (int64_t i = begin; i < end; ++i) {
      if (!layer.bit(i)) reset(i, i + 1);
    }
    return;
  }
  const int64_t length = int64_t(layer.columns) * layer.inner;
  const int64_t* runs = layer.runs() + 2 * layer.row_runs;
  while (begin < end) {
    const int64_t row = begin / length, start = row * length;
    const int64_t stop = std::min(end, start + length);
    if (in_runs(layer.runs(), layer.row_runs, row)) {
      for (int32_t i = 0; i < layer.column_runs; ++i) {
        const int64_t kept = start + runs[2 * i] * layer.inner;
        if (begin < std::min(kept, stop)) reset(begin, std::min(kept, stop));
        begin = std::max(begin, kept + runs[2 * i + 1] * layer.inner);
      }
    }
    if (begin < stop) reset(begin, stop);
    begin = stop;
  }
}

template <typename A, typename T>
void redraw_tile(const SplitLayer& layer, uint64_t key, uint64_t number, int64_t begin,
                 int64_t end, const RandomLoops& random) {
  alignas(64) uint32_t words[kStep];
  alignas(64) T drawn[kStep];
  T* weight = static_cast<T*>(layer.weight);
  const int64_t length = int64_t(layer.columns) * layer.inner;
  for (; begin < end; begin += kStep) {
    const int64_t stop = std::min(end, begin + kStep);
    bool ready = false;
    for_reset(layer, begin, stop, [&](int64_t from, int64_t to) {
      if (!ready) {
        random.words(key, number, 0, uint32_t(begin / 4), stop - begin, words);
        redraw<A>(words, stop - begin, A(layer.width), drawn);
        ready = true;
      }
      if (!layer.channels_last) {
        std::copy(drawn + (from - begin), drawn + (to - begin), weight + from);
        return;
      }
      int64_t row = from / length, column = from % length / layer.inner, i = from % layer.inner;
      for (; from < to; ++from) {
        weight[row * length + i * layer.columns + column] = drawn[from - begin];
        if (++i < layer.inner) continue;
        i = 0;
        if (++column < layer.columns) continue;
        column = 0;
        ++row;
      }
    });
  }
}

void split_reset_(std::vector<Tensor> weights, Tensor runs, std::vector<Tensor> bits,
                  std::vector<int64_t> rows, std::vector<int64_t> columns, int64_t key) {
  std::vector<SplitLayer> layers = split_layers(weights, runs, bits, rows, columns);
  int64_t tasks = 0;
  for (SplitLayer& layer : layers) {
    layer.first_block = tasks;
    tasks += (layer.elements() + kTile - 1) / kTile;
  }
  const RandomLoops& random = random_loops();
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    size_t number = layers.size() - 1;
    while (layers[number].first_block > first) --number;
    for (int64_t task = first; task < last; ++task) {
      while (number + 1 < layers.size() && layers[number + 1].first_block <= task) ++number;
      const SplitLayer& layer = layers[number];
      const int64_t begin = (task - layer.first_block) * kTile;
      const int64_t end = std::min(begin + kTile, layer.elements());
      const auto tile = [&](auto zero) {
        using A = decltype(zero);
        with_storage<A>(Storage(layer.storage), [&](auto element) {
          redraw_tile<A, decltype(element)>(layer, uint64_t(key), number, begin, end, random);
        });
      };
      if (Storage(layer.storage) == Storage::kDouble) {
        tile(double{});
      } else {
        tile(float{});
      }
    }
  });
}

}  // namespace
}  // namespace kdfast::cpu

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("split_reset_", TORCH_BOX(&kdfast::cpu::split_reset_));
}
