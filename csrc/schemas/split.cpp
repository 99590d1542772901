// Split networks: blocks of rows and columns, bit masks.
#include "schemas/schemas.h"

KD_SCHEMAS(m) {
  // Zeros [out_rows, out_columns, H, W], but for the runs copied from source [R, C, H, W]. rows and
  // columns are (source, target, length) each, ascending and disjoint in the target; without rows
  // every row keeps its place and out_rows is not read.
  m.def("split_copy(Tensor source, int[] rows, int[] columns, int out_rows, int out_columns,"
        " bool channels_last) -> Tensor");

  // weight where its bit is set, else 0. bits are packed, least significant first, in the order of
  // the contiguous weight.
  m.def("split_mask(Tensor weight, Tensor bits, ScalarType dtype) -> Tensor");

  // Packed bits on the device of `like`: bit i is set where the upper 24 bits of element i's
  // Philox word are at least `threshold`.
  m.def("split_draw(Tensor like, int key, int count, int threshold) -> Tensor");
}
