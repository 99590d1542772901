// Glue of the split reset kernel.
#include <algorithm>

#include "check.h"
#include "cuda/launch.cuh"
#include "cuda/split_reset.cuh"
#include "split_reset_check.h"

namespace kdfast::cuda {
namespace {

void split_reset_(std::vector<Tensor> weights, Tensor runs, std::vector<Tensor> bits,
                  std::vector<int64_t> rows, std::vector<int64_t> columns, int64_t key) {
  const CurrentDevice device(weights[0]);
  const std::vector<SplitLayer> layers = split_layers(weights, runs, bits, rows, columns);
  const int64_t count = int64_t(layers.size());
  for (int64_t first = 0; first < count; first += kResetLayers) {
    ResetTable table{};
    table.first_layer = first;
    table.count = std::min<int64_t>(kResetLayers, count - first);
    int64_t blocks = 0;
    for (int64_t i = 0; i < table.count; ++i) {
      table.layer[i] = layers[first + i];
      table.layer[i].first_block = blocks;
      blocks += (layers[first + i].elements() + kResetTile - 1) / kResetTile;
    }
    launch(split_reset, blocks, kResetThreads, 0, device.stream, table, uint64_t(key));
  }
}

}  // namespace

KD_CUDA_LIBRARY(m) { m.impl("split_reset_", TORCH_BOX(&split_reset_)); }

}  // namespace kdfast::cuda
