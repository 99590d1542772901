// What the CPU and the CUDA glue of the split ops share: checks and the geometry of a block copy.
#pragma once

#include <algorithm>

#include "check.h"
#include "split.h"

namespace kdfast {

// A block copy in bytes. Memory is lines: one a position in channels_last, one a sample in NCHW.
// Within each line `columns` move; `rows` move whole samples (none: every sample stays).
struct CopyPlan {
  Tensor source;  // dense in the format of the target
  int64_t samples, lines;  // of the target; lines a sample
  int64_t source_line, target_line, source_sample;
  std::vector<Run> rows, columns;
};

// Triples as runs, after a look at their order and limits.
inline std::vector<Run> runs_of(const char* name, const std::vector<int64_t>& triples,
                                int64_t source_size, int64_t target_size) {
  KD_CHECK(triples.size() % 3 == 0, "split_copy: expected triples in ", name);
  std::vector<Run> runs;
  int64_t end = 0;
  for (size_t i = 0; i < triples.size(); i += 3) {
    const Run run{triples[i], triples[i + 1], triples[i + 2]};
    KD_CHECK(run.length > 0 && run.source >= 0 && run.source <= source_size - run.length &&
                 run.target >= end && run.target <= target_size - run.length,
             "split_copy: ", name, " run ", i / 3, " does not fit ", source_size, " -> ",
             target_size);
    end = run.target + run.length;
    runs.push_back(run);
  }
  return runs;
}

inline CopyPlan copy_plan(const Tensor& source, const std::vector<int64_t>& rows,
                          const std::vector<int64_t>& columns, int64_t out_rows,
                          int64_t out_columns, bool channels_last) {
  KD_CHECK(source.dim() == 4 && source.numel() > 0,
           "split_copy: expected a non-empty [R, C, H, W]");
  storage_of("split_copy", source);
  const MemoryFormat format = channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  const bool dense =
      channels_last ? dense_in_order(source, 2, 3, 1) : dense_in_order(source, 1, 2, 3);
  CopyPlan plan{dense ? source : torch::stable::contiguous(source, format)};
  const int64_t positions = source.size(2) * source.size(3), element = source.element_size();
  const int64_t column = channels_last ? element : positions * element;
  plan.samples = rows.empty() ? source.size(0) : out_rows;
  KD_CHECK(plan.samples > 0 && out_columns > 0, "split_copy: expected a non-empty target");
  plan.lines = channels_last ? positions : 1;
  plan.source_line = source.size(1) * column;
  plan.target_line = out_columns * column;
  plan.source_sample = plan.source.size(0) == 1 ? plan.lines * plan.source_line
                                                : plan.source.stride(0) * element;
  plan.rows = runs_of("rows", rows, source.size(0), plan.samples);
  plan.columns = runs_of("columns", columns, source.size(1), out_columns);
  for (Run& run : plan.columns) {
    run = {run.source * column, run.target * column, run.length * column};
  }
  return plan;
}

// Checks of split_mask: the bits cover the weight, the accumulation types agree.
inline void check_mask(const Feature& weight, const Tensor& bits, Storage to) {
  const int64_t count = weight.samples * weight.channels * weight.positions;
  KD_CHECK(bits.scalar_type() == ScalarType::Byte && bits.dim() == 1 &&
               bits.numel() == (count + 7) / 8 && bits.is_contiguous(),
           "split_mask: expected ", (count + 7) / 8, " bytes of bits");
  KD_CHECK((weight.storage == Storage::kDouble) == (to == Storage::kDouble),
           "split_mask: expected float64 for weight and result or for none");
}

}  // namespace kdfast
