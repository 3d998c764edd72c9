// The vector vocabulary of the level being compiled: sixteen f32 or int32 lanes, whatever the register width,
// so that one kernel source has one order of operations and the same bits at every level.
//
// vf: 16 f32; vi: 16 int32; vb: 64 unsigned bytes; vh: 32 bf16 as 16 pairs.
#pragma once

#include <stdint.h>

namespace gm::GM_LEVEL {

// bf16 of -8..7 by the number's low four bits; twice, for instructions that look at five.
#define GM_CODES                                                                                          \
  0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, \
      0xc040, 0xc000, 0xbf80
alignas(64) constexpr uint16_t kCodeTable[32] = {GM_CODES, GM_CODES};
#undef GM_CODES

// For vb_spread, by number of pair: which of two bytes each of a lane's four becomes, the first lowest; 128
// for none. The pairs are (0,1) (0,2) (0,3) (1,2) (1,3) (2,3); 6 and 7 are none.
inline constexpr uint32_t kSpread[8] = {0x80800100, 0x80018000, 0x01808000, 0x80010080,
                                        0x01800080, 0x01008080, 0x80808080, 0x80808080};

}  // namespace gm::GM_LEVEL

// Rows of activations that a register tile holds beside the weights, and loops the compiler must unroll to
// keep them there. The portable level has no registers to fill, and unrolling it only swells the code.
#if defined(GM_LEVEL_avx512) || defined(GM_LEVEL_avx512bf16) || defined(GM_LEVEL_amx)
#define GM_TILE_ROWS 12
#elif defined(GM_LEVEL_avx2)
#define GM_TILE_ROWS 4
#else
#define GM_TILE_ROWS 1
#endif
#define GM_PRAGMA(x) _Pragma(#x)
#if GM_TILE_ROWS > 1
#define GM_UNROLL(n) GM_PRAGMA(GCC unroll n)
#else
#define GM_UNROLL(n)
#endif

#if defined(GM_LEVEL_avx512) || defined(GM_LEVEL_avx512bf16) || defined(GM_LEVEL_amx)
#include "vec/avx512.h"
#elif defined(GM_LEVEL_avx2)
#include "vec/avx2.h"
#else
#include "vec/portable.h"
#endif

namespace gm::GM_LEVEL {

inline constexpr int kTileRows = GM_TILE_ROWS;

#if !defined(GM_LEVEL_avx2)
inline vi vi_dot_narrow(vi acc, vb w, const int8_t* a) { return vi_dot(acc, w, a); }
#endif

#if GM_TILE_ROWS < 12
// vf_store_bf16 of numbers that are not denormal, which an instruction may take to be zero.
inline void vf_store_bf16_normal(uint16_t* p, vf x) { vf_store_bf16(p, x); }
#endif

// `one` of each of n vectors, with room for sixteen at `x`, in its lane; what is beyond means nothing. `fn`
// of two vectors is what `one` folds a vector's halves with.
template <class One, class Fn>
inline vf vf_of_rows(const float* x, int64_t n, One one, [[maybe_unused]] Fn fn) {
#if GM_TILE_ROWS >= 12
  if (n > 4) return fold_rows(x, fn);
#endif
  float results[16] = {};
  for (int64_t r = 0; r < n; ++r) results[r] = one(vf_load(x + 16 * r));
  return vf_load(results);
}
inline vf vf_sum_rows(const float* x, int64_t n) {
  return vf_of_rows(x, n, [](vf a) { return vf_sum(a); }, [](vf a, vf b) { return a + b; });
}
inline vf vf_max_rows(const float* x, int64_t n) {
  return vf_of_rows(x, n, [](vf a) { return vf_max_lane(a); }, [](vf a, vf b) { return vf_max(a, b); });
}

// The nearest E4M3 values, ties to even, at most 448 in size.
inline vf vf_round_e4m3(vf x) {
  x = vf_min(vf_max(x, vf_set1(-448.0f)), vf_set1(448.0f));
  // 1.5 * 2^(e + 20): what is added to it keeps the bits from 2^(e - 3) on, and 2^-9 where e < -6.
  const vf power = vf_max(vi_as_float(vf_bits(x) & vi_set1(0x7f800000)), vf_set1(0.015625f));
  const vf base = power * vf_set1(1572864.0f);
  return (x + base) - base;
}
// Sixteen positive E4M3 codes.
inline vf vf_load_e4m3(const uint8_t* p) {
  int32_t bits[16];
  for (int i = 0; i < 16; ++i) bits[i] = p[i] << 20;
  return vi_as_float(vi_load(bits)) * vf_set1(0x1p120f);
}

// exp(x), about 1.5 ulp for x in [-87, 88]; 0 at -87 and below, and of NaN. vf_exp clamps what is above.
// Cody-Waite reduction by ln 2 in two parts, then a degree-6 polynomial, then the exponent field.
inline vf vf_exp_below_88(vf x) {
  const vf low = vf_set1(-87.0f), clamped = vf_max(x, low);
  const vi n = vf_round(clamped * vf_set1(1.44269504088896341f));
  const vf nf = vi_float(n);
  vf r = vf_fma(nf, vf_set1(-0.693359375f), clamped);
  r = vf_fma(nf, vf_set1(2.12194440e-4f), r);
  vf p = vf_set1(1.9875691500e-4f);
  p = vf_fma(p, r, vf_set1(1.3981999507e-3f));
  p = vf_fma(p, r, vf_set1(8.3334519073e-3f));
  p = vf_fma(p, r, vf_set1(4.1665795894e-2f));
  p = vf_fma(p, r, vf_set1(1.6666665459e-1f));
  p = vf_fma(p, r, vf_set1(5.0000001201e-1f));
  p = vf_fma(p, r * r, r) + vf_set1(1.0f);
  return vf_where_above(x, low, vi_as_float(vf_bits(p) + vi_shl<23>(n)));
}
inline vf vf_exp(vf x) { return vf_exp_below_88(vf_min(vf_set1(88.0f), x)); }

}  // namespace gm::GM_LEVEL
