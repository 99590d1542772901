// Arguments of split_reset_ as the kernels see them.
#pragma once

#include <cmath>
#include <vector>

#include "check.h"
#include "split_reset.h"

namespace kdfast {

inline std::vector<SplitLayer> split_layers(std::vector<Tensor>& weights, const Tensor& runs,
                                            const std::vector<Tensor>& bits,
                                            const std::vector<int64_t>& rows,
                                            const std::vector<int64_t>& columns) {
  const char* op = "split_reset_";
  KD_CHECK(rows.size() == weights.size() && columns.size() == weights.size(), op,
           ": expected a mask for every weight");
  KD_CHECK(runs.is_contiguous() && runs.scalar_type() == ScalarType::Long, op,
           ": expected contiguous int64 runs");
  std::vector<SplitLayer> layers;
  const int64_t* next = runs.const_data_ptr<int64_t>();
  int64_t left = runs.size(0);
  for (size_t i = 0; i < weights.size(); ++i) {
    Tensor& weight = weights[i];
    KD_CHECK(weight.dim() >= 2 && weight.numel() > 0 && weight.numel() <= int64_t(1) << 31, op,
             ": expected a weight of up to 2^31 entries, layer ", i);
    const bool channels_last = weight.dim() == 4 && !weight.is_contiguous();
    KD_CHECK(weight.is_contiguous() ||
                 (channels_last && dense_in_order(weight, 2, 3, 1) &&
                  (weight.size(0) == 1 || weight.stride(0) * weight.size(0) == weight.numel())),
             op, ": expected a dense weight, layer ", i);
    const int64_t inner = weight.numel() / (weight.size(0) * weight.size(1));
    SplitLayer layer{};
    layer.weight = weight.mutable_data_ptr();
    layer.width = 2 / std::sqrt(double(weight.size(1)) * double(inner));
    layer.rows = int32_t(weight.size(0));
    layer.columns = int32_t(weight.size(1));
    layer.inner = int32_t(inner);
    layer.storage = int16_t(storage_of(op, weight));
    layer.channels_last = channels_last;
    if (rows[i] < 0) {
      const Tensor& packed = bits.at(columns[i]);
      KD_CHECK(packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() &&
                   packed.numel() >= (weight.numel() + 7) / 8,
               op, ": expected packed bits, layer ", i);
      layer.mask = packed.const_data_ptr<uint8_t>();
      layer.row_runs = -1;
    } else {
      layer.mask = next;
      layer.row_runs = int32_t(rows[i]);
      layer.column_runs = int32_t(columns[i]);
      next += 2 * (rows[i] + columns[i]);
      left -= rows[i] + columns[i];
    }
    layers.push_back(layer);
  }
  KD_CHECK(left == 0, op, ": expected as many runs as rows and columns say");
  return layers;
}

}  // namespace kdfast
