// Attention maps and the attention transfer loss.
#include "schemas/schemas.h"

KD_SCHEMAS(m) {
  // map [N, H*W], norm [N]
  m.def("attention_map(Tensor feature, float power) -> (Tensor map, Tensor norm)");
  m.def("attention_map_backward(Tensor grad, Tensor feature, Tensor map, Tensor norm, float power)"
        " -> Tensor");

  // One map tensor [2, N, H*W] a pair (student, teacher: unnormalised) and products [P, N, 3]
  // float64 (s.s, t.t, s.t of each sample's maps). Slot 2*i is student i, slot 2*i + 1 teacher i.
  m.def("attention_loss(Tensor[] student, Tensor[] teacher, float power)"
        " -> (Tensor loss, Tensor[] maps, Tensor products)");
  m.def("attention_loss_backward(Tensor grad, Tensor[] features, Tensor[] maps, Tensor products,"
        " float power, int[] slots) -> Tensor[]");
}
