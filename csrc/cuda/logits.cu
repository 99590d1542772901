// Glue of the logit kernels.
#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/logits.cuh"
#include "logits_check.h"

namespace kdfast::cuda {
namespace {

// Calls body(A{}, T{}) with accumulation and storage types.
template <typename Body>
void with_types(Storage storage, const Body& body) {
  switch (storage) {
    case Storage::kHalf:
      return body(float{}, __half{});
    case Storage::kBFloat16:
      return body(float{}, __nv_bfloat16{});
    case Storage::kDouble:
      return body(double{}, double{});
    default:
      return body(float{}, float{});
  }
}

template <typename A, typename T, int G>
void launch_rows(const LogitsTable& table, const CurrentDevice& device) {
  const int64_t blocks = (table.rows + kRowsPerBlock<G> - 1) / kRowsPerBlock<G>;
  const size_t shared = kRowsPerBlock<G> * size_t(table.weights.members) * sizeof(MemberRow<A>);
  launch(logits_rows<A, T, G>, blocks, kRowBlock<G>, shared, device.stream, table);
}

void* slope_data(Tensor& slope) {
  return slope.numel() == 0 ? nullptr : slope.mutable_data_ptr();
}

std::tuple<Tensor, Tensor, Tensor> distillation_loss(Tensor student_logits, Tensor teacher_logits,
                                                     std::optional<Tensor> labels,
                                                     std::vector<double> alpha, double gamma,
                                                     double temperature, double label_smoothing,
                                                     double unit, bool student_gradient,
                                                     bool teacher_gradient) {
  const CurrentDevice device(student_logits);
  LogitsTask task("distillation_loss", student_logits, teacher_logits, labels, alpha, gamma,
                  temperature, label_smoothing, unit, student_gradient, teacher_gradient);
  Tensor loss = new_dense(task.student, {}, accumulate_type(task.student));
  Tensor losses = new_dense(task.student, {task.rows}, ScalarType::Double);
  with_types(task.storage, [&](auto accumulator, auto element) {
    using A = decltype(accumulator);
    using T = decltype(element);
    LogitsTable table{task.student.const_data_ptr(),
                      task.teacher.const_data_ptr(),
                      task.indices(),
                      task.probabilities<A>(),
                      slope_data(task.student_slope),
                      slope_data(task.teacher_slope),
                      losses.mutable_data_ptr<double>(),
                      task.rows,
                      task.classes,
                      false,
                      task.weights};
    uint64_t addresses = 0;
    for (const void* pointer : {table.student, table.teacher,
                                static_cast<const void*>(table.student_slope),
                                static_cast<const void*>(table.teacher_slope)}) {
      addresses |= reinterpret_cast<uint64_t>(pointer);
    }
    table.packs = task.classes % kVector<T> == 0 && addresses % 16 == 0;
    if (task.classes <= kWarpClasses) {
      launch_rows<A, T, 32>(table, device);
    } else if constexpr (sizeof(A) == sizeof(double)) {
      launch_rows<A, T, 256>(table, device);  // 1024 threads have too few registers for doubles
    } else if (task.classes <= kBlockClasses) {
      launch_rows<A, T, 256>(table, device);
    } else {
      launch_rows<A, T, 1024>(table, device);
    }
    launch(logits_mean<A>, 1, kLossThreads, 0, device.stream, table.losses, table.rows,
           loss.mutable_data_ptr<A>());
  });
  return {loss, task.student_slope, task.teacher_slope};
}

Tensor distillation_loss_backward(Tensor grad, Tensor slope, Tensor, double unit) {
  const CurrentDevice device(slope);
  const Tensor dense = contiguous_rows(slope);
  Tensor gradient = torch::stable::empty_like(dense);
  const int64_t count = dense.numel();
  with_types(storage_of("distillation_loss_backward", slope), [&](auto accumulator, auto element) {
    using A = decltype(accumulator);
    using T = decltype(element);
    const T* from = static_cast<const T*>(dense.const_data_ptr());
    T* to = static_cast<T*>(gradient.mutable_data_ptr());
    const bool packs =
        count % kVector<T> == 0 &&
        (reinterpret_cast<uint64_t>(from) | reinterpret_cast<uint64_t>(to)) % 16 == 0;
    const int64_t per_block = kScaleThreads * (packs ? kVector<T> : 1);
    const int64_t blocks = std::min<int64_t>((count + per_block - 1) / per_block, 4096);
    launch(logits_scale<A, T>, blocks, kScaleThreads, 0, device.stream, from, count,
           grad.const_data_ptr<A>(), unit / double(slope.size(-2)), packs, to);
  });
  return gradient;
}

}  // namespace

KD_CUDA_LIBRARY(m) {
  m.impl("distillation_loss", TORCH_BOX(&distillation_loss));
  m.impl("distillation_loss_backward", TORCH_BOX(&distillation_loss_backward));
}

}  // namespace kdfast::cuda
