// Losses between the logits of a student and of one or several teachers.
#include "schemas/schemas.h"

KD_SCHEMAS(m) {
  // mean over rows of gamma * CE + temperature^2 * sum_j alpha[j] KL(teacher_j || student). Serves
  // soft_target_loss, distillation_loss and cohort_loss: student_logits [N, C]; teacher_logits
  // [N, C] or, for as many members as there are alphas, [M, N, C]; labels int64 [N] or
  // probabilities [N, C]. A term of weight 0 is left out.
  //
  // Slopes are the wanted gradients of the sum over rows, divided by `unit`, in the dtype and shape
  // of the logits; [0] where the gradient is not wanted.
  m.def("distillation_loss(Tensor student_logits, Tensor teacher_logits, Tensor? labels,"
        " float[] alpha, float gamma, float temperature, float label_smoothing, float unit,"
        " bool student_gradient, bool teacher_gradient)"
        " -> (Tensor loss, Tensor student_slope, Tensor teacher_slope)");
  // slope * grad * unit / N, grad the gradient of the loss, N the last but one size of slope. The
  // logits are not read: they tie the result to the graph.
  m.def("distillation_loss_backward(Tensor grad, Tensor slope, Tensor logits, float unit)"
        " -> Tensor");
}
