// What every linear kernel does with its finished sums.
#pragma once

#include "gristmill/kernel.h"
#include "vec/vec.h"

namespace gm::GM_LEVEL {

// The sums of rows [first, first + rows) of one block, [rows][16], with bias and residual, to their place.
inline void finish(const float* y, int64_t first, int64_t rows, int64_t block, int64_t n,
                   const LinearOut& out) {
  const int lanes = static_cast<int>(n - block * 16 < 16 ? n - block * 16 : 16);
  const vf bias = out.bias == nullptr ? vf_zero() : vf_load_n(out.bias + block * 16, lanes);
  for (int64_t r = 0; r < rows; ++r) {
    float* to = out.out + (first + r) * out.ld + block * 16;
    vf value = vf_load(y + r * 16);
    if (out.row_scale != nullptr) value = value * vf_set1(out.row_scale[first + r]);
    value = value + bias;
    if (out.accumulate) value = vf_load_n(to, lanes) + value;
    vf_store_n(to, value, lanes);
  }
}

}  // namespace gm::GM_LEVEL
