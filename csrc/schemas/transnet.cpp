// The gated nonlinearity of a Trans-Net.
#include "schemas/schemas.h"

KD_SCHEMAS(m) {
  // x, hidden [N, C, H, W] of one dtype and memory format; gate one element of the accumulation
  // type. scale [N, C]: the standard deviation (plus 1e-5) that hidden is divided by.
  m.def("gated_relu(Tensor x, Tensor hidden, Tensor gate) -> (Tensor out, Tensor scale)");
  // grad_gate [1]
  m.def("gated_relu_backward(Tensor grad, Tensor hidden, Tensor gate, Tensor scale)"
        " -> (Tensor grad_hidden, Tensor grad_gate)");
}
