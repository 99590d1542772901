// Counter-based normal noise. Keys are Key.signed.
#include "schemas/schemas.h"

KD_SCHEMAS(m) {
  // [N, samples, elements] for ids [N]
  m.def("standard_normal(Tensor ids, int samples, int elements, int first_sample, int key,"
        " ScalarType dtype) -> Tensor");
  // The elements of one row by the CPU loop of that name ("default", "avx2", "avx512f"), for
  // tests; `like` chooses the device. Empty where the CPU lacks the instructions.
  m.def("standard_normal_loop(Tensor like, str loop, int elements, int id, int sample, int key)"
        " -> Tensor");

  // image [N, C, H, W], sigma [N, 1, G, G] in the accumulation type of image, ids [N] or None
  m.def("sigma_noise(Tensor image, Tensor sigma, Tensor? ids, int samples, int first_sample,"
        " int key) -> Tensor");
  // d image (no elements unless wanted) and d sigma from grad [N, samples, C, H, W]
  m.def("sigma_noise_backward(Tensor grad, Tensor? ids, int first_sample, int key, int grid,"
        " bool want_image) -> (Tensor, Tensor)");
}
