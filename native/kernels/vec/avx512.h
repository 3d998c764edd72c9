// Sixteen-lane vectors on AVX-512 with VNNI; BF16 where the level has it.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace gm::GM_LEVEL {

struct vf {
  __m512 v;
};
struct vi {
  __m512i v;
};
struct vb {
  __m512i v;
};
struct vh {
  __m512i v;
};

inline __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline vf vf_set1(float x) { return {_mm512_set1_ps(x)}; }
inline vf vf_zero() { return {_mm512_setzero_ps()}; }
inline vf vf_load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void vf_store(float* p, vf a) { _mm512_storeu_ps(p, a.v); }
inline vf vf_load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
inline void vf_store_n(float* p, vf a, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), a.v); }
inline vf operator+(vf a, vf b) { return {_mm512_add_ps(a.v, b.v)}; }
inline vf operator-(vf a, vf b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline vf operator*(vf a, vf b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline vf operator/(vf a, vf b) { return {_mm512_div_ps(a.v, b.v)}; }
inline vf vf_fma(vf a, vf b, vf c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline vf vf_max(vf a, vf b) { return {_mm512_max_ps(a.v, b.v)}; }
inline vf vf_min(vf a, vf b) { return {_mm512_min_ps(a.v, b.v)}; }
inline vf vf_abs(vf a) { return {_mm512_abs_ps(a.v)}; }
inline vf vf_where_above(vf a, vf b, vf x) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), x.v)};
}
inline vi vf_round(vf a) {
  return {_mm512_cvt_roundps_epi32(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline vf vi_float(vi a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline vi vf_bits(vf a) { return {_mm512_castps_si512(a.v)}; }
inline vf vi_as_float(vi a) { return {_mm512_castsi512_ps(a.v)}; }

inline vi vi_set1(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline vi vi_load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline void vi_store(int32_t* p, vi a) { _mm512_storeu_si512(p, a.v); }
inline vi operator+(vi a, vi b) { return {_mm512_add_epi32(a.v, b.v)}; }
template <int kShift>
inline vi vi_shl(vi a) {
  return {_mm512_slli_epi32(a.v, kShift)};
}
template <int kShift>
inline vi vi_shr(vi a) {
  return {_mm512_srli_epi32(a.v, kShift)};
}
inline vi operator&(vi a, vi b) { return {_mm512_and_si512(a.v, b.v)}; }
inline void vi_store_i8(int8_t* p, vi a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(a.v));
}

inline float half_to_float(uint16_t h) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h))); }
inline vf vf_load_f16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline vf vf_load_bf16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline uint16_t float_to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  bits += 0x7fffu + ((bits >> 16) & 1u);
  return static_cast<uint16_t>(bits >> 16);
}
// bf16 in the low half of each lane. Not vcvtneps2bf16: that flushes denormals, and levels must agree.
inline __m512i round_bf16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i r =
      _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), lsb), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(r, nan, _mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
}
inline void vf_store_bf16(uint16_t* p, vf a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(round_bf16(a.v)));
}
inline void vf_store_bf16_normal(uint16_t* p, vf a) {
#if defined(__AVX512BF16__)
  const __m256bh rounded = _mm512_cvtneps_pbh(a.v);
  memcpy(p, &rounded, 32);
#else
  vf_store_bf16(p, a);
#endif
}
inline void vh_store(uint16_t* p, vh a) { _mm512_storeu_si512(p, a.v); }
inline vh vh_pack(vf even, vf odd) {
  return {_mm512_or_si512(round_bf16(even.v), _mm512_slli_epi32(round_bf16(odd.v), 16))};
}

inline vb vb_load(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline vb vb_set1(uint8_t x) { return {_mm512_set1_epi8(static_cast<char>(x))}; }
inline vb operator|(vb a, vb b) { return {_mm512_or_si512(a.v, b.v)}; }
inline vb operator^(vb a, vb b) { return {_mm512_xor_si512(a.v, b.v)}; }
template <int kShift, int kMask>
inline vb vb_field(vb a) {
  if constexpr (kShift > 0) a.v = _mm512_srli_epi16(a.v, kShift);
  if constexpr (kShift < 0) a.v = _mm512_slli_epi16(a.v, -kShift);
  return {_mm512_and_si512(a.v, _mm512_set1_epi8(static_cast<char>(kMask)))};
}
template <int kShift>
inline vb vb_shift(vb a) {
  if constexpr (kShift > 0) a.v = _mm512_srli_epi16(a.v, kShift);
  if constexpr (kShift < 0) a.v = _mm512_slli_epi16(a.v, -kShift);
  return a;
}
template <int kMask>
inline vb vb_merge(vb a, vb b) {
  return {_mm512_ternarylogic_epi32(_mm512_set1_epi8(static_cast<char>(kMask)), a.v, b.v, 0xca)};
}
inline vi vb_lanes(vb a) { return {a.v}; }
template <int kFirst>
inline vb vb_spread(vb a, vi pairs) {
  // Four bits of an index count here: the table is there twice.
  const __m512i table = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(kSpread)));
  const __m512i from = _mm512_permutexvar_epi32(pairs.v, table);
  constexpr int kBase = 0x01010101 * kFirst, kStep = 0x04040404;
  const __m512i lane =
      _mm512_broadcast_i32x4(_mm_setr_epi32(kBase, kBase + kStep, kBase + 2 * kStep, kBase + 3 * kStep));
  return {_mm512_shuffle_epi8(a.v, _mm512_or_si512(from, lane))};
}
inline vi vi_dot(vi acc, vb w, const int8_t* a) {
  int32_t four;
  memcpy(&four, a, 4);
  return {_mm512_dpbusd_epi32(acc.v, w.v, _mm512_set1_epi32(four))};
}

inline vh vh_load(const uint16_t* p) { return {_mm512_loadu_si512(p)}; }
// The low four bits of each 16-bit word, -8..7, as bf16; and the words with the next four bits lowest.
inline vh vh_codes(vh words) { return {_mm512_permutexvar_epi16(words.v, _mm512_load_si512(kCodeTable))}; }
inline vh vh_next_codes(vh words) { return {_mm512_srli_epi16(words.v, 4)}; }
inline vh vh_exact(vf even, vf odd) {
  return {_mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(even.v), 16), _mm512_castps_si512(odd.v))};
}
struct vt {
  __m512i low, high;  // the first 64 values; with codes of 8 bits: 2^23, and what 2^23 + code is too large by
};
template <int kBits>
inline vt vt_load(const uint16_t* values, int offset) {
  if constexpr (kBits == 8) {
    return {_mm512_set1_epi32(0x4b000000),
            _mm512_castps_si512(_mm512_set1_ps(8388608.0f + static_cast<float>(offset)))};
  }
  return {_mm512_loadu_si512(values), _mm512_loadu_si512(values + 32)};
}
template <int kBits>
inline __m512i look_up(__m512i words, const vt& table) {
  if constexpr (kBits <= 5) return _mm512_permutexvar_epi16(words, table.low);
  return _mm512_permutex2var_epi16(table.low, words, table.high);
}
template <int kBits>
inline void vb_pairs(vb codes, const vt& table, vh& first, vh& second) {
  if constexpr (kBits == 8) {
    const auto number = [&](__m512i column) -> vf {
      const __m512i bits = _mm512_ternarylogic_epi32(column, _mm512_set1_epi32(255), table.low, 0xea);
      return {_mm512_sub_ps(_mm512_castsi512_ps(bits), _mm512_castsi512_ps(table.high))};
    };
    first = vh_exact(number(codes.v), number(_mm512_srli_epi32(codes.v, 16)));
    second = vh_exact(number(_mm512_srli_epi32(codes.v, 8)), number(_mm512_srli_epi32(codes.v, 24)));
  } else {
    first = {look_up<kBits>(codes.v, table)};
    second = {look_up<kBits>(_mm512_srli_epi16(codes.v, 8), table)};
  }
}

// Codes of 4 bits times one of eight numbers, of which each lane has its own: bf16 [number][code].
#define GM_PRODUCT_TABLE 1
struct vm {
  __m512i values[4];
};
inline vm vm_load(const uint16_t* values) {
  return {{_mm512_loadu_si512(values), _mm512_loadu_si512(values + 32), _mm512_loadu_si512(values + 64),
           _mm512_loadu_si512(values + 96)}};
}
// The lanes' numbers, from the highest three bits of a float's mantissa.
struct vn {
  __m512i row;          // sixteen times the number modulo four, in both words of a lane
  __mmask32 low, high;  // words of numbers below four, and from four on
};
inline vn vn_of(vf a) {
  const __m512i top = _mm512_srli_epi32(_mm512_castps_si512(a.v), 16);
  const __m512i both = _mm512_or_si512(top, _mm512_slli_epi32(top, 16));
  const __m512i four = _mm512_set1_epi16(0x40);
  return {_mm512_and_si512(both, _mm512_set1_epi16(0x30)), _mm512_testn_epi16_mask(both, four),
          _mm512_test_epi16_mask(both, four)};
}
inline __m512i look_up(__m512i words, const vm& table, vn number) {
  const __m512i at = _mm512_ternarylogic_epi32(words, _mm512_set1_epi16(15), number.row, 0xea);
  // What one look-up leaves alone is still the index of the other.
  const __m512i low = _mm512_mask2_permutex2var_epi16(table.values[0], at, number.low, table.values[1]);
  return _mm512_mask2_permutex2var_epi16(table.values[2], low, number.high, table.values[3]);
}
inline void vb_pairs(vb codes, const vm& table, vn number, vh& first, vh& second) {
  first = {look_up(codes.v, table, number)};
  second = {look_up(_mm512_srli_epi16(codes.v, 8), table, number)};
}
inline bool vf_any_above(vf a, float limit) {
  return _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
}

// The even or the odd elements, read as f16.
inline vf vh_even_f16(vh a) { return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(a.v))}; }
inline vf vh_odd_f16(vh a) { return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(a.v, 16)))}; }
inline vf vh_even(vh a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16))}; }
inline vf vh_odd(vh a) {
  return {_mm512_castsi512_ps(_mm512_and_si512(a.v, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u))))};
}
inline float bf16_to_float(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float r;
  memcpy(&r, &bits, 4);
  return r;
}
inline vf vf_dot_bf16(vf acc, vh w, const uint16_t* a) {
#if defined(__AVX512BF16__)
  uint32_t pair;
  memcpy(&pair, a, 4);
  return {_mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(w.v),
                           reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int32_t>(pair))))};
#else
  acc = vf_fma(vh_odd(w), vf_set1(bf16_to_float(a[1])), acc);
  return vf_fma(vh_even(w), vf_set1(bf16_to_float(a[0])), acc);
#endif
}

inline __m128 fold_sum(__m128 x) {
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_add_ss(x, _mm_shuffle_ps(x, x, 1));
}
inline __m128 fold_max(__m128 x) {
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_max_ss(x, _mm_shuffle_ps(x, x, 1));
}
inline __m128i fold_add(__m128i x) {
  x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  return _mm_add_epi32(x, _mm_shuffle_epi32(x, 0xb1));
}
inline float vf_sum(vf x) {
  const __m256 y = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
  return _mm_cvtss_f32(fold_sum(_mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1))));
}
inline float vf_max_lane(vf x) {
  const __m256 y = _mm256_max_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
  return _mm_cvtss_f32(fold_max(_mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1))));
}
// fn over the lanes of sixteen vectors, of each in the order of vf_sum: the halves of all are folded at once.
template <class Fn>
inline vf fold_rows(const float* x, Fn fn) {
  __m512 a[8], b[4], c[2];
  const auto fold = [&](__m512 u, __m512 v) { return fn(vf{u}, vf{v}).v; };
  GM_UNROLL(8)
  for (int i = 0; i < 8; ++i) {
    const __m512 u = _mm512_loadu_ps(x + 16 * i), v = _mm512_loadu_ps(x + 16 * (i + 8));
    a[i] = fold(_mm512_shuffle_f32x4(u, v, 0x44), _mm512_shuffle_f32x4(u, v, 0xee));
  }
  GM_UNROLL(4)
  for (int i = 0; i < 4; ++i) {
    b[i] = fold(_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd));
  }
  GM_UNROLL(2)
  for (int i = 0; i < 2; ++i) {
    const __m512d u = _mm512_castps_pd(b[i]), v = _mm512_castps_pd(b[i + 2]);
    c[i] = fold(_mm512_castpd_ps(_mm512_unpacklo_pd(u, v)), _mm512_castpd_ps(_mm512_unpackhi_pd(u, v)));
  }
  const __m512 all = fold(_mm512_shuffle_ps(c[0], c[1], 0x88), _mm512_shuffle_ps(c[0], c[1], 0xdd));
  const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
  return {_mm512_permutexvar_ps(order, all)};
}
inline int32_t vi_sum(vi x) {
  const __m256i y = _mm256_add_epi32(_mm512_castsi512_si256(x.v), _mm512_extracti64x4_epi64(x.v, 1));
  return _mm_cvtsi128_si32(
      fold_add(_mm_add_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1))));
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
// Into the second-level cache.
inline void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

}  // namespace gm::GM_LEVEL
