// Large results without page faults.
#pragma once

#include "check.h"

namespace kdfast::cpu {

// `empty_gradient` on the CPU.
//
// malloc maps large blocks afresh at every call (always above 32 MB, often below), and the kernel
// clears each page at its first write, which costs several times the gradient itself. Gradients of
// 8 MB and more come from a list of released buffers instead, which keeps at most 512 MB.
Tensor reused_gradient(const DenseFeature& feature);

// The same for sizes [N, C, H, W] of one's own; dtype and device of `like`.
Tensor reused_empty(const Tensor& like, const std::vector<int64_t>& sizes, bool channels_last);

// `empty_on` on the CPU, from the same list.
Tensor reused_empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype);

}  // namespace kdfast::cpu
