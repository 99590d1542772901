// Contrastive representation distillation: draws, loss, bank update.
#include "schemas/schemas.h"

KD_SCHEMAS(m) {
  // [B, negatives + 1] int64, column 0 is ids
  m.def("draw_negatives(Tensor labels, Tensor class_offsets, Tensor? order, Tensor ids,"
        " int negatives, int key) -> Tensor");

  // mean [2]: mean of exp(score / temperature) / Z of either side. slopes: the gradients of the
  // loss, [B, d] each, or [0, d] when not asked for; they are made with the loss because the bank
  // rows are at hand then.
  m.def("contrastive_loss(Tensor student, Tensor teacher, Tensor student_bank,"
        " Tensor teacher_bank, Tensor indices, Tensor z_student, Tensor z_teacher,"
        " float temperature, bool slopes) -> (Tensor loss, Tensor mean, Tensor student_slope,"
        " Tensor teacher_slope)");
  // slope * grad. The embeddings are arguments so that a second derivative comes by here.
  m.def("contrastive_loss_backward(Tensor grad, Tensor student, Tensor teacher,"
        " Tensor student_slope, Tensor teacher_slope) -> (Tensor, Tensor)");

  m.def("contrastive_update_(Tensor(a!) student_bank, Tensor(b!) teacher_bank, Tensor student,"
        " Tensor teacher, Tensor index, float momentum) -> ()");
}
