// Glue of the contrastive distillation kernels: checks, outputs, launches.
#include "check.h"
#include "cuda/contrast.cuh"
#include "cuda/launch.cuh"

namespace kdfast::cuda {
namespace {

int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

bool aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

Tensor draw_negatives(Tensor labels, Tensor class_offsets, std::optional<Tensor> order, Tensor ids,
                      int64_t negatives, int64_t key) {
  const CurrentDevice device(labels);
  const int64_t batch = labels.numel(), tiles = parts(negatives, kTileDraws);
  KD_CHECK(negatives < int64_t(1) << 31, "draw_negatives: negatives must be less than 2^31, got ",
           negatives);
  Tensor indices = empty_on(labels, {batch, negatives + 1}, ScalarType::Long);
  launch(negatives_drawn, batch * tiles, kContrastThreads, 0, device.stream,
         labels.const_data_ptr<int64_t>(), class_offsets.const_data_ptr<int64_t>(),
         class_offsets.numel() - 1, order ? order->const_data_ptr<int64_t>() : nullptr,
         order ? order->numel() : int64_t(0), ids.const_data_ptr<int64_t>(), negatives, tiles,
         uint64_t(key), indices.mutable_data_ptr<int64_t>());
  return indices;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> contrastive_loss(
    Tensor student, Tensor teacher, Tensor student_bank, Tensor teacher_bank, Tensor indices,
    Tensor z_student, Tensor z_teacher, double temperature, bool slopes) {
  const CurrentDevice device(student);
  const int64_t batch = student.size(0), dim = student.size(1);
  const int64_t samples = student_bank.size(0), columns = indices.size(1);
  const ScalarType type = student.scalar_type();
  Tensor loss = empty_on(student, {}, type), mean = empty_on(student, {2}, type);
  Tensor student_slope = empty_on(student, {slopes ? batch : 0, dim}, type);
  Tensor teacher_slope = empty_on(student, {slopes ? batch : 0, dim}, type);
  with_accumulator(student, [&](auto zero) {
    using A = decltype(zero);
    ContrastTask<A> task{};
    task.side[0] = {student.const_data_ptr<A>(), teacher_bank.const_data_ptr<A>(),
                    z_student.const_data_ptr<A>()};
    task.side[1] = {teacher.const_data_ptr<A>(), student_bank.const_data_ptr<A>(),
                    z_teacher.const_data_ptr<A>()};
    task.indices = indices.const_data_ptr<int64_t>();
    task.batch = batch;
    task.columns = columns;
    task.dim = dim;
    task.samples = samples;
    task.tiles = parts(columns, kTileColumns);
    task.contrast = contrast_of<A>(temperature, columns - 1, samples);
    task.slopes = slopes;
    const bool in_registers = std::is_same_v<A, float> && dim % kLaneFloats == 0 &&
                              dim <= kRegisterDim && aligned(student) && aligned(teacher) &&
                              aligned(student_bank) && aligned(teacher_bank);
    task.slices = in_registers || !slopes ? 1 : parts(dim, kSlice);
    const int64_t tiles = 2 * batch * task.tiles;
    Tensor stats = empty_on(student, {tiles, 2}, type);
    Tensor partial = empty_on(student, {slopes ? tiles : 0, dim}, type);
    A* sums = stats.mutable_data_ptr<A>();
    A* gradients = partial.mutable_data_ptr<A>();
    bool done = false;
    if constexpr (std::is_same_v<A, float>) {
      if (in_registers) {
        launch(contrast_tiles, tiles, kContrastThreads, 0, device.stream, task, sums, gradients);
        done = true;
      }
    }
    if (!done) {
      launch(contrast_tiles_of_any<A>, tiles * task.slices, kContrastThreads,
             kContrastWarps * kSlice * sizeof(A), device.stream, task, sums, gradients);
    }
    launch(contrast_sum<A>, (slopes ? 2 * batch : 0) + 1, kContrastSumThreads, 0, device.stream,
           task, sums, gradients, A(1 / (temperature * double(batch))),
           student_slope.mutable_data_ptr<A>(), teacher_slope.mutable_data_ptr<A>(),
           loss.mutable_data_ptr<A>(), mean.mutable_data_ptr<A>());
  });
  return {loss, mean, student_slope, teacher_slope};
}

std::tuple<Tensor, Tensor> contrastive_loss_backward(Tensor grad, Tensor student, Tensor teacher,
                                                     Tensor student_slope, Tensor teacher_slope) {
  const CurrentDevice device(student);
  const int64_t batch = student.size(0), dim = student.size(1);
  Tensor first = empty_on(student, {batch, dim}, student.scalar_type());
  Tensor second = empty_on(student, {batch, dim}, student.scalar_type());
  with_accumulator(student, [&](auto zero) {
    using A = decltype(zero);
    launch(contrast_scale<A>, parts(batch * dim, kContrastThreads), kContrastThreads, 0,
           device.stream, grad.const_data_ptr<A>(), student_slope.const_data_ptr<A>(),
           teacher_slope.const_data_ptr<A>(), batch * dim, first.mutable_data_ptr<A>(),
           second.mutable_data_ptr<A>());
  });
  return {first, second};
}

void contrastive_update_(Tensor student_bank, Tensor teacher_bank, Tensor student, Tensor teacher,
                         Tensor index, double momentum) {
  const CurrentDevice device(student);
  const int64_t batch = index.numel();
  with_accumulator(student, [&](auto zero) {
    using A = decltype(zero);
    launch(contrast_blend<A>, parts(2 * batch, kContrastWarps), kContrastThreads, 0,
           device.stream, student_bank.mutable_data_ptr<A>(), teacher_bank.mutable_data_ptr<A>(),
           student.const_data_ptr<A>(), teacher.const_data_ptr<A>(),
           index.const_data_ptr<int64_t>(), batch, student.size(1), student_bank.size(0),
           A(momentum));
  });
}

}  // namespace

KD_CUDA_LIBRARY(m) {
  m.impl("draw_negatives", TORCH_BOX(&draw_negatives));
  m.impl("contrastive_loss", TORCH_BOX(&contrastive_loss));
  m.impl("contrastive_loss_backward", TORCH_BOX(&contrastive_loss_backward));
  m.impl("contrastive_update_", TORCH_BOX(&contrastive_update_));
}

}  // namespace kdfast::cuda
