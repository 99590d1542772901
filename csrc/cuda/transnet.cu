// Glue of the gated nonlinearity's kernels: checks, outputs, launches.
#include "cuda/transnet.cuh"

#include "check.h"
#include "cuda/launch.cuh"

namespace kdfast::cuda {
namespace {

template <typename A>
GateTask<A> gate_task(const char* op, const DenseFeature& a, const DenseFeature& b) {
  const Feature &first = a.view, &hidden = b.view;
  KD_CHECK(first.samples == hidden.samples && first.channels == hidden.channels &&
               first.positions == hidden.positions && first.storage == hidden.storage &&
               first.channels_last == hidden.channels_last,
           op, ": expected maps of one shape, dtype and memory format");
  GateTask<A> task{};
  task.first = first;
  task.hidden = hidden;
  task.length = first.positions == 1 ? first.channels : first.positions;
  task.rows = first.channels * first.positions / task.length;
  return task;
}

int64_t gate_blocks(const Feature& feature, int64_t rows) {
  if (feature.channels_last) return feature.samples * gate_groups(feature.channels);
  return (feature.samples * rows + kGateWarps - 1) / kGateWarps;
}

std::tuple<Tensor, Tensor> gated_relu(Tensor x, Tensor hidden, Tensor gate) {
  const CurrentDevice device(x);
  const DenseFeature a("gated_relu", x), b("gated_relu", hidden);
  Tensor out = empty_gradient(b);
  Tensor scale = empty_on(x, {a.view.samples, a.view.channels}, accumulate_type(x));
  with_accumulator(x, [&](auto zero) {
    using A = decltype(zero);
    GateTask<A> task = gate_task<A>("gated_relu", a, b);
    task.out = out.mutable_data_ptr();
    task.scale = scale.mutable_data_ptr<A>();
    task.gate = gate.const_data_ptr<A>();
    launch(a.view.channels_last ? gate_channels<false, A> : gate_rows<false, A>,
           gate_blocks(a.view, task.rows), kGateThreads, 0, device.stream, task,
           static_cast<A*>(nullptr));
  });
  return {out, scale};
}

std::tuple<Tensor, Tensor> gated_relu_backward(Tensor grad, Tensor hidden, Tensor gate,
                                               Tensor scale) {
  const CurrentDevice device(grad);
  const DenseFeature a("gated_relu_backward", grad), b("gated_relu_backward", hidden);
  Tensor grad_hidden = empty_gradient(b);
  Tensor grad_gate = empty_on(grad, {1}, accumulate_type(grad));
  with_accumulator(grad, [&](auto zero) {
    using A = decltype(zero);
    GateTask<A> task = gate_task<A>("gated_relu_backward", a, b);
    task.out = grad_hidden.mutable_data_ptr();
    task.scale = const_cast<A*>(scale.const_data_ptr<A>());
    task.gate = gate.const_data_ptr<A>();
    const int64_t blocks = gate_blocks(a.view, task.rows);
    Tensor sums = empty_on(grad, {blocks}, accumulate_type(grad));
    A* parts = sums.mutable_data_ptr<A>();
    launch(a.view.channels_last ? gate_channels<true, A> : gate_rows<true, A>, blocks,
           kGateThreads, 0, device.stream, task, parts);
    launch(gate_sum<A>, 1, kGateSumThreads, 0, device.stream, parts, blocks,
           grad_gate.mutable_data_ptr<A>());
  });
  return {grad_hidden, grad_gate};
}

}  // namespace

KD_CUDA_LIBRARY(m) {
  m.impl("gated_relu", TORCH_BOX(&gated_relu));
  m.impl("gated_relu_backward", TORCH_BOX(&gated_relu_backward));
}

}  // namespace kdfast::cuda
