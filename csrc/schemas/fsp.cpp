// Flow of solution procedure: Gram matrices of two feature maps, and the loss of their differences.
#include "schemas/schemas.h"

KD_SCHEMAS(m) {
  // [N, M, K] of first [N, M, H, W] and second [N, K, h, w]; h divides H and w divides W, and first
  // is pooled to h x w: by maximum or by average.
  m.def("fsp_matrix(Tensor first, Tensor second, bool maximum) -> Tensor");
  // wanted: 0 for the gradient of first, 1 for that of second.
  m.def("fsp_matrix_backward(Tensor grad, Tensor first, Tensor second, bool maximum, int[] wanted)"
        " -> Tensor[]");

  // pairs: first and second of every pair, as places in student and teacher alike; a feature of
  // several pairs is given once. differences: G_s - G_t of every pair.
  m.def("fsp_loss(Tensor[] student, Tensor[] teacher, int[] pairs, bool maximum)"
        " -> (Tensor loss, Tensor[] differences)");
  // The gradients of the `wanted` features of one network; sign is 1 for the student, -1 for the
  // teacher.
  m.def("fsp_loss_backward(Tensor grad, Tensor[] features, Tensor[] differences, int[] pairs,"
        " bool maximum, int[] wanted, float sign) -> Tensor[]");
}
