// Sixteen-lane vectors as two AVX2 registers.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace gm::GM_LEVEL {

struct vf {
  __m256 a, b;
};
struct vi {
  __m256i a, b;
};
struct vb {
  __m256i a, b;
};
struct vh {
  __m256i a, b;
};

inline __m256i lane_mask(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline vf vf_set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline vf vf_zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline vf vf_load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void vf_store(float* p, vf x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline vf vf_load_n(const float* p, int n) {
  return {_mm256_maskload_ps(p, lane_mask(n)), _mm256_maskload_ps(p + 8, lane_mask(n - 8))};
}
inline void vf_store_n(float* p, vf x, int n) {
  _mm256_maskstore_ps(p, lane_mask(n), x.a);
  _mm256_maskstore_ps(p + 8, lane_mask(n - 8), x.b);
}
inline vf operator+(vf x, vf y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline vf operator-(vf x, vf y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline vf operator*(vf x, vf y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline vf operator/(vf x, vf y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline vf vf_fma(vf x, vf y, vf z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline vf vf_max(vf x, vf y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline vf vf_min(vf x, vf y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline vf vf_abs(vf x) {
  const __m256 m = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(x.a, m), _mm256_and_ps(x.b, m)};
}
inline vf vf_where_above(vf a, vf b, vf x) {
  return {_mm256_and_ps(_mm256_cmp_ps(a.a, b.a, _CMP_GT_OQ), x.a),
          _mm256_and_ps(_mm256_cmp_ps(a.b, b.b, _CMP_GT_OQ), x.b)};
}
inline vi vf_round(vf x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline vf vi_float(vi x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline vi vf_bits(vf x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
inline vf vi_as_float(vi x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }

inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline vi vi_set1(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline vi vi_load(const int32_t* p) { return {load256(p), load256(p + 8)}; }
inline void vi_store(int32_t* p, vi x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), x.b);
}
inline vi operator+(vi x, vi y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
template <int kShift>
inline vi vi_shl(vi x) {
  return {_mm256_slli_epi32(x.a, kShift), _mm256_slli_epi32(x.b, kShift)};
}
template <int kShift>
inline vi vi_shr(vi x) {
  return {_mm256_srli_epi32(x.a, kShift), _mm256_srli_epi32(x.b, kShift)};
}
inline vi operator&(vi x, vi y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
inline void vi_store_i8(int8_t* p, vi x) {
  // packs works within 128-bit lanes; the permutation restores the order.
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

inline float half_to_float(uint16_t h) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h))); }
inline __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline vf vf_load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(load128(p)), _mm256_cvtph_ps(load128(p + 8))};
}
inline vf vf_load_bf16(const uint16_t* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(p)), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(p + 8)), 16))};
}
inline uint16_t float_to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  bits += 0x7fffu + ((bits >> 16) & 1u);
  return static_cast<uint16_t>(bits >> 16);
}
inline __m256i round_bf16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i lsb = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i r =
      _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), lsb), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
  return _mm256_blendv_epi8(r, quiet, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}
inline void vf_store_bf16(uint16_t* p, vf x) {
  const __m256i words = _mm256_packus_epi32(round_bf16(x.a), round_bf16(x.b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(words, 0xd8));
}

inline void vh_store(uint16_t* p, vh x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16), x.b);
}
inline vh vh_pack(vf even, vf odd) {
  return {_mm256_or_si256(round_bf16(even.a), _mm256_slli_epi32(round_bf16(odd.a), 16)),
          _mm256_or_si256(round_bf16(even.b), _mm256_slli_epi32(round_bf16(odd.b), 16))};
}

inline vb vb_load(const uint8_t* p) { return {load256(p), load256(p + 32)}; }
inline vb vb_set1(uint8_t x) {
  const __m256i all = _mm256_set1_epi8(static_cast<char>(x));
  return {all, all};
}
inline vb operator|(vb x, vb y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
inline vb operator^(vb x, vb y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }
template <int kShift>
inline __m256i shift256(__m256i x) {
  if constexpr (kShift > 0) x = _mm256_srli_epi16(x, kShift);
  if constexpr (kShift < 0) x = _mm256_slli_epi16(x, -kShift);
  return x;
}
template <int kShift, int kMask>
inline __m256i field256(__m256i x) {
  return _mm256_and_si256(shift256<kShift>(x), _mm256_set1_epi8(static_cast<char>(kMask)));
}
template <int kShift, int kMask>
inline vb vb_field(vb x) {
  return {field256<kShift, kMask>(x.a), field256<kShift, kMask>(x.b)};
}
template <int kShift>
inline vb vb_shift(vb x) {
  return {shift256<kShift>(x.a), shift256<kShift>(x.b)};
}
template <int kMask>
inline vb vb_merge(vb x, vb y) {
  const __m256i m = _mm256_set1_epi8(static_cast<char>(kMask));
  return {_mm256_or_si256(_mm256_and_si256(m, x.a), _mm256_andnot_si256(m, y.a)),
          _mm256_or_si256(_mm256_and_si256(m, x.b), _mm256_andnot_si256(m, y.b))};
}
inline vi vb_lanes(vb x) { return {x.a, x.b}; }
template <int kFirst>
inline __m256i spread256(__m256i x, __m256i pairs) {
  const __m256i from = _mm256_permutevar8x32_epi32(load256(kSpread), pairs);
  constexpr int kBase = 0x01010101 * kFirst, kStep = 0x04040404;
  const __m256i lane = _mm256_setr_epi32(kBase, kBase + kStep, kBase + 2 * kStep, kBase + 3 * kStep, kBase,
                                         kBase + kStep, kBase + 2 * kStep, kBase + 3 * kStep);
  return _mm256_shuffle_epi8(x, _mm256_or_si256(from, lane));
}
template <int kFirst>
inline vb vb_spread(vb x, vi pairs) {
  return {spread256<kFirst>(x.a, pairs.a), spread256<kFirst>(x.b, pairs.b)};
}
// Even and odd bytes are widened and multiplied apart: vpmaddubsw would saturate for codes above 127.
inline __m256i dot256(__m256i acc, __m256i w, __m256i even, __m256i odd) {
  const __m256i low = _mm256_and_si256(w, _mm256_set1_epi16(0x00ff));
  acc = _mm256_add_epi32(acc, _mm256_madd_epi16(low, even));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_srli_epi16(w, 8), odd));
}
inline vi vi_dot(vi acc, vb w, const int8_t* a) {
  int32_t four;
  memcpy(&four, a, 4);
  const __m256i bytes = _mm256_set1_epi32(four);
  const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8);
  const __m256i odd = _mm256_srai_epi16(bytes, 8);
  return {dot256(acc.a, w.a, even, odd), dot256(acc.b, w.b, even, odd)};
}
// The same for codes below 128, where pairs stay within 2 * 127 * 128 and vpmaddubsw is exact.
inline vi vi_dot_narrow(vi acc, vb w, const int8_t* a) {
  int32_t four;
  memcpy(&four, a, 4);
  const __m256i bytes = _mm256_set1_epi32(four);
  const __m256i ones = _mm256_set1_epi16(1);
  return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(_mm256_maddubs_epi16(w.a, bytes), ones)),
          _mm256_add_epi32(acc.b, _mm256_madd_epi16(_mm256_maddubs_epi16(w.b, bytes), ones))};
}

inline vh vh_load(const uint16_t* p) { return {load256(p), load256(p + 16)}; }
// The low four bits of each 16-bit word, -8..7, as bf16; and the words with the next four bits lowest. Low
// and high bytes are looked up apart; the table's first entry, 0, falls to the byte that is not asked for.
inline __m256i codes256(__m256i words) {
  const __m256i low = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, -128, 0, 0x40, -128, -96, -64, -32, 0, -32, -64, -96, -128, 0x40, 0, -128));
  const __m256i high = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 0x3f, 0x40, 0x40, 0x40, 0x40, 0x40, 0x40, -63, -64, -64, -64, -64, -64, -64, -65));
  const __m256i code = _mm256_and_si256(words, _mm256_set1_epi16(15));
  return _mm256_or_si256(_mm256_shuffle_epi8(low, code),
                         _mm256_shuffle_epi8(high, _mm256_slli_epi16(code, 8)));
}
inline vh vh_codes(vh words) { return {codes256(words.a), codes256(words.b)}; }
inline vh vh_next_codes(vh words) { return {_mm256_srli_epi16(words.a, 4), _mm256_srli_epi16(words.b, 4)}; }
inline __m256i exact256(__m256 even, __m256 odd) {
  return _mm256_or_si256(_mm256_srli_epi32(_mm256_castps_si256(even), 16), _mm256_castps_si256(odd));
}
inline vh vh_exact(vf even, vf odd) { return {exact256(even.a, odd.a), exact256(even.b, odd.b)}; }
struct vt {
  __m256 offset;
};
template <int kBits>
inline vt vt_load(const uint16_t*, int offset) {
  return {_mm256_set1_ps(static_cast<float>(offset))};
}
template <int kBits>
inline void pairs256(__m256i codes, __m256 offset, __m256i& first, __m256i& second) {
  const __m256i mask = _mm256_set1_epi32((1 << kBits) - 1);
  const auto number = [&](__m256i column) {
    return _mm256_sub_ps(_mm256_cvtepi32_ps(_mm256_and_si256(column, mask)), offset);
  };
  first = exact256(number(codes), number(_mm256_srli_epi32(codes, 16)));
  second = exact256(number(_mm256_srli_epi32(codes, 8)), number(_mm256_srli_epi32(codes, 24)));
}
template <int kBits>
inline void vb_pairs(vb codes, vt table, vh& first, vh& second) {
  pairs256<kBits>(codes.a, table.offset, first.a, second.a);
  pairs256<kBits>(codes.b, table.offset, first.b, second.b);
}
// Eight f16 in the low halves of 32-bit lanes; packing works within 128-bit lanes, the permutation restores
// order.
inline __m256 low_f16(__m256i x) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(x, x), 0x08);
  return _mm256_cvtph_ps(_mm256_castsi256_si128(words));
}
// The even or the odd elements, read as f16.
inline vf vh_even_f16(vh x) {
  const __m256i low = _mm256_set1_epi32(0xffff);
  return {low_f16(_mm256_and_si256(x.a, low)), low_f16(_mm256_and_si256(x.b, low))};
}
inline vf vh_odd_f16(vh x) {
  return {low_f16(_mm256_srli_epi32(x.a, 16)), low_f16(_mm256_srli_epi32(x.b, 16))};
}
inline vf vh_even(vh x) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(x.a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(x.b, 16))};
}
inline vf vh_odd(vh x) {
  const __m256i m = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u));
  return {_mm256_castsi256_ps(_mm256_and_si256(x.a, m)), _mm256_castsi256_ps(_mm256_and_si256(x.b, m))};
}
inline float bf16_to_float(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float r;
  memcpy(&r, &bits, 4);
  return r;
}
inline vf vf_dot_bf16(vf acc, vh w, const uint16_t* a) {
  acc = vf_fma(vh_odd(w), vf_set1(bf16_to_float(a[1])), acc);
  return vf_fma(vh_even(w), vf_set1(bf16_to_float(a[0])), acc);
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
  const __m256 y = _mm256_add_ps(x.a, x.b);
  return _mm_cvtss_f32(fold_sum(_mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1))));
}
inline float vf_max_lane(vf x) {
  const __m256 y = _mm256_max_ps(x.a, x.b);
  return _mm_cvtss_f32(fold_max(_mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1))));
}
inline int32_t vi_sum(vi x) {
  const __m256i y = _mm256_add_epi32(x.a, x.b);
  return _mm_cvtsi128_si32(
      fold_add(_mm_add_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1))));
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
// Into the second-level cache.
inline void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

}  // namespace gm::GM_LEVEL
