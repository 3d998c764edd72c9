// Passes over a row of logits for the sampler.
#include <float.h>

#include "kernels.h"
#include "vec/vec.h"

namespace gm::GM_LEVEL {

bool row_maxima(const float* x, int64_t n, float* maxima) {
  const vf lowest = vf_set1(-FLT_MAX);
  // 0 times what is not finite is NaN and stays so. vf_max gives its second operand where one is NaN.
  vf poison = vf_zero();
  for (int64_t begin = 0; begin < n; begin += kMaximaBlock) {
    const int64_t end = begin + kMaximaBlock < n ? begin + kMaximaBlock : n;
    vf top = lowest;
    int64_t i = begin;
    for (; i + 16 <= end; i += 16) {
      const vf v = vf_max(lowest, vf_load(x + i));
      poison = vf_fma(v, vf_zero(), poison);
      top = vf_max(top, v);
    }
    float m = vf_max_lane(top);
    for (; i < end; ++i) {
      const float v = x[i] < -FLT_MAX ? -FLT_MAX : x[i];
      poison = vf_fma(vf_set1(v), vf_zero(), poison);
      m = v > m ? v : m;
    }
    *maxima++ = m;
  }
  return vf_sum(poison) == 0.0f;
}

void row_exponentials(const float* x, int64_t n, float top, float inverse, float* out, double* sums) {
  const vf shift = vf_set1(top), scale = vf_set1(inverse);
  for (int64_t begin = 0; begin < n; begin += kSumBlock) {
    const int64_t end = begin + kSumBlock < n ? begin + kSumBlock : n;
    vf sum = vf_zero();
    for (int64_t i = begin; i < end; i += 16) {
      const int lanes = static_cast<int>(end - i < 16 ? end - i : 16);
      const vf e = vf_exp((vf_load_n(x + i, lanes) - shift) * scale);
      vf_store_n(out + i, e, lanes);
      // The lanes that were not loaded are not zero after the exponential.
      sum = sum + (lanes == 16 ? e : vf_load_n(out + i, lanes));
    }
    *sums++ = static_cast<double>(vf_sum(sum));
  }
}

}  // namespace gm::GM_LEVEL
