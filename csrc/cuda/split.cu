// Glue of the split kernels: checks, outputs, launches.
#include <algorithm>

#include "check.h"
#include "cuda/launch.cuh"
#include "cuda/split.cuh"
#include "split_check.h"

namespace kdfast::cuda {
namespace {

// Calls body(Unit{}) with the unit of so many bytes.
template <typename Body>
void with_unit(int64_t bytes, Body&& body) {
  if (bytes == 16) {
    body(uint4{});
  } else if (bytes == 8) {
    body(uint2{});
  } else if (bytes == 4) {
    body(uint32_t{});
  } else {
    body(uint16_t{});
  }
}

// Runs [first, last) in units, and the part of the target that they are responsible for: from
// their start to that of the next run, so that the parts of all launches cover [0, size).
RunTable part_of(const std::vector<Run>& runs, size_t first, int64_t unit, int64_t size,
                 int64_t& begin, int64_t& end) {
  RunTable table{};
  table.count = int32_t(std::min<size_t>(kMaxRuns, runs.size() - first));
  for (int32_t i = 0; i < table.count; ++i) {
    const Run& run = runs[first + i];
    table.source[i] = int32_t(run.source / unit);
    table.target[i] = int32_t(run.target / unit);
    table.length[i] = int32_t(run.length / unit);
  }
  const size_t next = first + table.count;
  begin = first == 0 ? 0 : table.target[0];
  end = next < runs.size() ? runs[next].target / unit : size;
  return table;
}

Tensor split_copy(Tensor source, std::vector<int64_t> rows, std::vector<int64_t> columns,
                  int64_t out_rows, int64_t out_columns, bool channels_last) {
  const CurrentDevice device(source);
  const CopyPlan plan = copy_plan(source, rows, columns, out_rows, out_columns, channels_last);
  Tensor out = empty_on(source, {plan.samples, out_columns, source.size(2), source.size(3)},
                        source.scalar_type(),
                        channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  CopyTask task{};
  task.source = plan.source.const_data_ptr();
  task.target = out.mutable_data_ptr();
  int64_t all = int64_t(reinterpret_cast<uintptr_t>(task.source)) | 16 |
                int64_t(reinterpret_cast<uintptr_t>(task.target)) | plan.source_line |
                plan.target_line | plan.source_sample;
  for (const Run& run : plan.columns) all |= run.source | run.target | run.length;
  const int64_t unit = all & -all;
  task.source_sample = plan.source_sample / unit;
  task.source_line = plan.source_line / unit;
  task.target_line = plan.target_line / unit;
  task.lines = plan.lines;
  constexpr int64_t kLimit = int64_t(1) << 31;
  KD_CHECK(plan.samples < kLimit && std::max(task.source_line, task.target_line) < kLimit,
           "split_copy: expected rows and columns that 32 bits can count");
  for (size_t row = 0; row == 0 || row < plan.rows.size(); row += kMaxRuns) {
    int64_t first_sample, last_sample;
    task.rows = part_of(plan.rows, row, 1, plan.samples, first_sample, last_sample);
    task.first_line = first_sample * plan.lines;
    task.last_line = last_sample * plan.lines;
    for (size_t column = 0; column == 0 || column < plan.columns.size(); column += kMaxRuns) {
      task.columns = part_of(plan.columns, column, unit, task.target_line, task.first_unit,
                             task.last_unit);
      const int64_t units = task.last_unit - task.first_unit;
      task.lanes = 1;
      while (task.lanes < units && task.lanes < kSplitThreads) task.lanes *= 2;
      const int64_t tiles = (units + task.lanes - 1) / task.lanes;
      const int64_t lines = kSplitThreads / task.lanes * kSplitUnroll;
      const int64_t blocks = tiles * ((task.last_line - task.first_line + lines - 1) / lines);
      with_unit(unit, [&](auto zero) {
        launch(split_copy_units<decltype(zero)>, blocks, kSplitThreads, 0, device.stream, task);
      });
    }
  }
  return out;
}

// Calls body(T{}) with the storage type T accumulated in A, on the host.
template <typename A, typename Body>
void with_type(Storage storage, Body&& body) {
  if constexpr (sizeof(A) == sizeof(double)) {
    body(double{});
  } else if (storage == Storage::kHalf) {
    body(__half{});
  } else if (storage == Storage::kBFloat16) {
    body(__nv_bfloat16{});
  } else {
    body(float{});
  }
}

Tensor split_mask(Tensor weight, Tensor bits, ScalarType dtype) {
  const CurrentDevice device(weight);
  const DenseFeature dense("split_mask", weight);
  const Storage storage = storage_of_dtype("split_mask", dtype);
  check_mask(dense.view, bits, storage);
  const int64_t count = weight.numel();
  KD_CHECK(count < int64_t(1) << 31, "split_mask: expected fewer than 2^31 weights");
  Tensor out = empty_on(weight, {weight.size(0), weight.size(1), weight.size(2), weight.size(3)},
                        dtype, dense.format());
  constexpr int64_t kEach = kSplitThreads * kMaskEach;
  with_accumulator(dense.tensor, [&](auto zero) {
    using A = decltype(zero);
    with_type<A>(dense.view.storage, [&](auto from) {
      with_type<A>(storage, [&](auto to) {
        using To = decltype(to);
        launch(split_mask_weights<decltype(from), To>, (count + kEach - 1) / kEach, kSplitThreads,
               0, device.stream, dense.view, bits.const_data_ptr<uint8_t>(),
               static_cast<To*>(out.mutable_data_ptr()));
      });
    });
  });
  return out;
}

Tensor split_draw(Tensor like, int64_t key, int64_t count, int64_t threshold) {
  KD_CHECK(count > 0 && count <= int64_t(1) << 34, "split_draw: expected 1 to 2^34 weights");
  const CurrentDevice device(like);
  const int64_t bytes = (count + 7) / 8;
  Tensor out = empty_on(like, {bytes}, ScalarType::Byte);
  launch(split_draw_bits, (bytes + kSplitThreads - 1) / kSplitThreads, kSplitThreads, 0,
         device.stream, uint64_t(key), count, uint32_t(threshold), out.mutable_data_ptr<uint8_t>());
  return out;
}

}  // namespace

KD_CUDA_LIBRARY(m) {
  m.impl("split_copy", TORCH_BOX(&split_copy));
  m.impl("split_mask", TORCH_BOX(&split_mask));
  m.impl("split_draw", TORCH_BOX(&split_draw));
}

}  // namespace kdfast::cuda
