// Redrawing the reset part of split weights. Keys are Key.signed.
#include "schemas/schemas.h"

KD_SCHEMAS(m) {
  // Layer i keeps rows[i] runs of rows times columns[i] runs of columns, which stand in this order
  // in runs [R, 2] int64 (start, length) after those of the layers before it; or, with rows[i] -1,
  // the entries whose bit is set in bits[columns[i]] (uint8, least significant bit first).
  m.def("split_reset_(Tensor(a!)[] weights, Tensor runs, Tensor[] bits, int[] rows, int[] columns,"
        " int key) -> ()");
}
