// Row-wise operations between the linears: norms, residual additions, gated activations.
#include "kernels.h"
#include "vec/vec.h"

namespace gm::GM_LEVEL {

void rmsnorm(const float* x, int64_t ldx, const float* w, float* y, int64_t ldy, int64_t rows, int64_t n,
             float eps) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = x + r * ldx;
    float* to = y + r * ldy;
    // Four chains hide the latency of the fused step; they are folded in one order at every level.
    vf sum[4] = {vf_zero(), vf_zero(), vf_zero(), vf_zero()};
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
      for (int j = 0; j < 4; ++j) {
        const vf v = vf_load(from + i + 16 * j);
        sum[j] = vf_fma(v, v, sum[j]);
      }
    }
    for (int j = 0; i < n; i += 16, ++j) {
      const vf v = vf_load_n(from + i, static_cast<int>(n - i < 16 ? n - i : 16));
      sum[j] = vf_fma(v, v, sum[j]);
    }
    const float mean = vf_sum((sum[0] + sum[1]) + (sum[2] + sum[3])) / static_cast<float>(n);
    const vf scale = vf_set1(1.0f / __builtin_sqrtf(mean + eps));
    for (i = 0; i + 16 <= n; i += 16) vf_store(to + i, vf_load(from + i) * scale * vf_load(w + i));
    if (i < n) {
      const int tail = static_cast<int>(n - i);
      vf_store_n(to + i, vf_load_n(from + i, tail) * scale * vf_load_n(w + i, tail), tail);
    }
  }
}

void add(float* x, int64_t ldx, const float* y, int64_t ldy, int64_t rows, int64_t n) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < n; i += 16) {
      const int lanes = static_cast<int>(n - i < 16 ? n - i : 16);
      float* to = x + r * ldx + i;
      vf_store_n(to, vf_load_n(to, lanes) + vf_load_n(y + r * ldy + i, lanes), lanes);
    }
  }
}

namespace {

// x * sigmoid(z)
vf gate_by(vf x, vf z) { return x / (vf_set1(1.0f) + vf_exp(vf_zero() - z)); }

vf activate(vf x, Activation act) {
  if (act == Activation::kSilu) return gate_by(x, x);
  // 0.5 x (1 + tanh u) = x sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3)
  const vf cubic = vf_fma(x * x * x, vf_set1(0.044715f), x);
  return gate_by(x, cubic * vf_set1(1.5957691216057308f));
}

}  // namespace

void gated(const float* gate, const float* up, float* out, int64_t ld, int64_t rows, int64_t n,
           Activation act) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < n; i += 16) {
      const int lanes = static_cast<int>(n - i < 16 ? n - i : 16);
      const int64_t at = r * ld + i;
      vf_store_n(out + at, activate(vf_load_n(gate + at, lanes), act) * vf_load_n(up + at, lanes), lanes);
    }
  }
}

}  // namespace gm::GM_LEVEL
