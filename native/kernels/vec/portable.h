// Sixteen-lane vectors in plain C++: the definition that the SIMD headers must match bit for bit.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace gm::GM_LEVEL {

struct vf {
  float v[16];
};
struct vi {
  int32_t v[16];
};
struct vb {  // 64 unsigned bytes
  uint8_t v[64];
};
struct vh {  // 32 bf16 values, pairs per lane
  uint16_t v[32];
};

#define GM_EACH for (int i = 0; i < 16; ++i)

inline vf vf_set1(float x) {
  vf r;
  GM_EACH r.v[i] = x;
  return r;
}
inline vf vf_zero() { return vf_set1(0.0f); }
inline vf vf_load(const float* p) {
  vf r;
  memcpy(r.v, p, 64);
  return r;
}
inline void vf_store(float* p, vf a) { memcpy(p, a.v, 64); }
inline vf vf_load_n(const float* p, int n) {
  vf r = vf_zero();
  memcpy(r.v, p, 4 * static_cast<size_t>(n));
  return r;
}
inline void vf_store_n(float* p, vf a, int n) { memcpy(p, a.v, 4 * static_cast<size_t>(n)); }
inline vf operator+(vf a, vf b) {
  GM_EACH a.v[i] += b.v[i];
  return a;
}
inline vf operator-(vf a, vf b) {
  GM_EACH a.v[i] -= b.v[i];
  return a;
}
inline vf operator*(vf a, vf b) {
  GM_EACH a.v[i] *= b.v[i];
  return a;
}
inline vf operator/(vf a, vf b) {
  GM_EACH a.v[i] /= b.v[i];
  return a;
}
inline vf vf_fma(vf a, vf b, vf c) {
  GM_EACH c.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return c;
}
// As the x86 instruction: the second operand where either is NaN or both are zero.
inline vf vf_max(vf a, vf b) {
  GM_EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
inline vf vf_min(vf a, vf b) {
  GM_EACH a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return a;
}
inline vf vf_abs(vf a) {
  GM_EACH a.v[i] = fabsf(a.v[i]);
  return a;
}
// x where a > b, else 0.
inline vf vf_where_above(vf a, vf b, vf x) {
  GM_EACH x.v[i] = a.v[i] > b.v[i] ? x.v[i] : 0.0f;
  return x;
}
// Rounds to the nearest integer, ties to even; |a| below 2^31.
inline vi vf_round(vf a) {
  vi r;
  GM_EACH r.v[i] = static_cast<int32_t>(nearbyintf(a.v[i]));
  return r;
}
inline vf vi_float(vi a) {
  vf r;
  GM_EACH r.v[i] = static_cast<float>(a.v[i]);
  return r;
}
inline vi vf_bits(vf a) {
  vi r;
  memcpy(r.v, a.v, 64);
  return r;
}
inline vf vi_as_float(vi a) {
  vf r;
  memcpy(r.v, a.v, 64);
  return r;
}

inline vi vi_set1(int32_t x) {
  vi r;
  GM_EACH r.v[i] = x;
  return r;
}
inline vi vi_load(const int32_t* p) {
  vi r;
  memcpy(r.v, p, 64);
  return r;
}
inline void vi_store(int32_t* p, vi a) { memcpy(p, a.v, 64); }
inline vi operator+(vi a, vi b) {
  GM_EACH a.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) + static_cast<uint32_t>(b.v[i]));
  return a;
}
template <int kShift>
inline vi vi_shl(vi a) {
  GM_EACH a.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << kShift);
  return a;
}
// Zeros come in from the left.
template <int kShift>
inline vi vi_shr(vi a) {
  GM_EACH a.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) >> kShift);
  return a;
}
inline vi operator&(vi a, vi b) {
  GM_EACH a.v[i] &= b.v[i];
  return a;
}
// Saturates to int8 and stores 16 bytes.
inline void vi_store_i8(int8_t* p, vi a) {
  GM_EACH p[i] = static_cast<int8_t>(a.v[i] < -128 ? -128 : a.v[i] > 127 ? 127 : a.v[i]);
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 0x1f;
  const uint32_t mantissa = h & 0x3ffu;
  float out;
  if (exponent == 0) {
    out = static_cast<float>(mantissa) * 0x1p-24f;
    uint32_t bits;
    memcpy(&bits, &out, 4);
    bits |= sign;
    memcpy(&out, &bits, 4);
    return out;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (mantissa << 13);
  memcpy(&out, &bits, 4);
  return out;
}
inline vf vf_load_f16(const uint16_t* p) {
  vf r;
  GM_EACH r.v[i] = half_to_float(p[i]);
  return r;
}
inline vf vf_load_bf16(const uint16_t* p) {
  vf r;
  GM_EACH {
    const uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
    memcpy(&r.v[i], &bits, 4);
  }
  return r;
}
// Rounds to bf16, nearest even (NaN stays NaN), and stores 16 values.
inline uint16_t float_to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  bits += 0x7fffu + ((bits >> 16) & 1u);
  return static_cast<uint16_t>(bits >> 16);
}
inline void vf_store_bf16(uint16_t* p, vf a) { GM_EACH p[i] = float_to_bf16(a.v[i]); }
inline void vh_store(uint16_t* p, vh a) { memcpy(p, a.v, 64); }
// Pairs (even, odd) of each lane, rounded to bf16.
inline vh vh_pack(vf even, vf odd) {
  vh r;
  GM_EACH {
    r.v[2 * i] = float_to_bf16(even.v[i]);
    r.v[2 * i + 1] = float_to_bf16(odd.v[i]);
  }
  return r;
}

inline vb vb_load(const uint8_t* p) {
  vb r;
  memcpy(r.v, p, 64);
  return r;
}
inline vb vb_set1(uint8_t x) {
  vb r;
  memset(r.v, x, 64);
  return r;
}
inline vb operator|(vb a, vb b) {
  for (int i = 0; i < 64; ++i) a.v[i] |= b.v[i];
  return a;
}
inline vb operator^(vb a, vb b) {
  for (int i = 0; i < 64; ++i) a.v[i] ^= b.v[i];
  return a;
}
// Bits of every byte: shifted to the right (to the left where kShift is negative) and masked. The mask takes
// no bit that a shift of the whole vector would bring in from the next byte.
template <int kShift, int kMask>
inline vb vb_field(vb a) {
  for (int i = 0; i < 64; ++i) {
    a.v[i] = static_cast<uint8_t>(
        (kShift < 0 ? a.v[i] << (kShift < 0 ? -kShift : 0) : a.v[i] >> (kShift < 0 ? 0 : kShift)) & kMask);
  }
  return a;
}
// The same without a mask: what comes in from the next byte is anything.
template <int kShift>
inline vb vb_shift(vb a) {
  return vb_field<kShift, 255>(a);
}
// The bits of kMask from a, the others from b.
template <int kMask>
inline vb vb_merge(vb a, vb b) {
  for (int i = 0; i < 64; ++i) a.v[i] = static_cast<uint8_t>((a.v[i] & kMask) | (b.v[i] & ~kMask));
  return a;
}
// Each lane's four bytes as a number, the first byte lowest.
inline vi vb_lanes(vb a) {
  vi r;
  memcpy(r.v, a.v, 64);
  return r;
}
// Bytes kFirst and kFirst + 1 of every lane, put where the low three bits of the lane in `pairs` say.
template <int kFirst>
inline vb vb_spread(vb a, vi pairs) {
  // Factors that shift the first and the second byte to their places.
  constexpr uint32_t kOne[8] = {1, 1, 1, 1 << 8, 1 << 8, 1 << 16, 0, 0};
  constexpr uint32_t kTwo[8] = {1 << 8, 1 << 16, 1 << 24, 1 << 16, 1 << 24, 1 << 24, 0, 0};
  uint32_t lanes[16];
  memcpy(lanes, a.v, 64);
  GM_EACH {
    const int pair = pairs.v[i] & 7;
    const uint32_t two = lanes[i] >> (8 * kFirst);
    lanes[i] = (two & 255) * kOne[pair] | (two >> 8 & 255) * kTwo[pair];
  }
  memcpy(a.v, lanes, 64);
  return a;
}
// acc[lane] += sum over j < 4 of w[4 * lane + j] * a[j], a four signed bytes; exact.
inline vi vi_dot(vi acc, vb w, const int8_t* a) {
  GM_EACH {
    int32_t s = acc.v[i];
    for (int j = 0; j < 4; ++j) s += static_cast<int32_t>(w.v[4 * i + j]) * a[j];
    acc.v[i] = s;
  }
  return acc;
}

inline vh vh_load(const uint16_t* p) {
  vh r;
  memcpy(r.v, p, 64);
  return r;
}
// The low four bits of each 16-bit word, -8..7, as bf16; and the words with the next four bits lowest.
inline vh vh_codes(vh words) {
  for (uint16_t& x : words.v) x = kCodeTable[x & 15];
  return words;
}
inline vh vh_next_codes(vh words) {
  for (uint16_t& x : words.v) x = static_cast<uint16_t>(x >> 4);
  return words;
}
// Pairs (even, odd) of values that bf16 holds.
inline vh vh_exact(vf even, vf odd) { return vh_pack(even, odd); }
// What codes of kBits bits are, less the offset: bf16 by byte (64 of them below 8 bits); bits of the byte
// from kBits on do not count.
struct vt {
  const uint16_t* values;
};
template <int kBits>
inline vt vt_load(const uint16_t* values, int) {
  return {values};
}
// The four columns of a lane as two pairs: 0 and 2, 1 and 3.
template <int kBits>
inline void vb_pairs(vb codes, vt table, vh& first, vh& second) {
  constexpr int kMask = kBits < 8 ? 63 : 255;
  for (int i = 0; i < 32; ++i) {
    const int byte = i / 2 * 4 + i % 2 * 2;
    first.v[i] = table.values[codes.v[byte] & kMask];
    second.v[i] = table.values[codes.v[byte + 1] & kMask];
  }
}
// The even or the odd elements, read as f16.
inline vf vh_even_f16(vh a) {
  vf r;
  GM_EACH r.v[i] = half_to_float(a.v[2 * i]);
  return r;
}
inline vf vh_odd_f16(vh a) {
  vf r;
  GM_EACH r.v[i] = half_to_float(a.v[2 * i + 1]);
  return r;
}
// The even (low) and the odd (high) value of each lane's pair, widened.
inline vf vh_even(vh a) {
  vf r;
  GM_EACH {
    const uint32_t bits = static_cast<uint32_t>(a.v[2 * i]) << 16;
    memcpy(&r.v[i], &bits, 4);
  }
  return r;
}
inline vf vh_odd(vh a) {
  vf r;
  GM_EACH {
    const uint32_t bits = static_cast<uint32_t>(a.v[2 * i + 1]) << 16;
    memcpy(&r.v[i], &bits, 4);
  }
  return r;
}
inline float bf16_to_float(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float r;
  memcpy(&r, &bits, 4);
  return r;
}
// acc += w.odd * a[1], then acc += w.even * a[0], each one fused step: the order of vdpbf16ps.
inline vf vf_dot_bf16(vf acc, vh w, const uint16_t* a) {
  acc = vf_fma(vh_odd(w), vf_set1(bf16_to_float(a[1])), acc);
  return vf_fma(vh_even(w), vf_set1(bf16_to_float(a[0])), acc);
}

// Sum of the sixteen lanes in one order: halves are folded onto each other (8, 4, 2, 1).
inline float vf_sum(vf a) {
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
  }
  return a.v[0];
}
// The largest lane; of a vector with NaN any lane.
inline float vf_max_lane(vf a) {
  float m = a.v[0];
  GM_EACH m = m < a.v[i] ? a.v[i] : m;
  return m;
}
inline int32_t vi_sum(vi a) {
  uint32_t s = 0;
  GM_EACH s += static_cast<uint32_t>(a.v[i]);
  return static_cast<int32_t>(s);
}

#undef GM_EACH

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
// Into the second-level cache.
inline void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace gm::GM_LEVEL
