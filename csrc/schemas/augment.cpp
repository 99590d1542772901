// On-device augmentation. Keys are Key.signed.
#include "schemas/schemas.h"

KD_SCHEMAS(m) {
  // images [n, H, W, 3] uint8, indices [B] int64 -> [B, 3, H, W]
  m.def("crop_flip(Tensor images, Tensor indices, float[] mean, float[] std, int padding,"
        " bool reflect, bool flip, ScalarType dtype, bool channels_last, int key) -> Tensor");
}
