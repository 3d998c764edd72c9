// Integer weights of large groups times a few int8 rows, on AMX tiles: groups of whole steps of 64 columns,
// or one group of any width.
//
// The order of operations is that of linear_int.cc, so the bits are the same.
//
// Schedule. Up to 16 rows meet four blocks (64 output rows), more meet two, so that a group's dots are
// four tiles. A step of 64 columns is decoded into a strip while the step before it is multiplied, and a
// group's dots are scaled while the next group's first step is: memory, the vector units and the tiles are
// busy at once, and what lies between them stays in the L1 cache.
//
// Measured (Xeon with AMX, 4096 x 4096, one thread) in parts of the VNNI kernel's time: int4 in groups of 128
// at 8, 16 and 24 rows 0.93, 0.59 and 0.51; in groups of 64 1.16 at 4 rows, 0.97, 0.60 and 0.65; int8 in
// groups of 64 1.15, 0.63 and 0.55.
#include <immintrin.h>

#include "codes.h"
#include "kernels.h"
#include "linear_amx.h"
#include "linear_out.h"
#include "vec/tiles.h"
#include "vec/vec.h"

namespace gm::GM_LEVEL {
namespace {

constexpr int64_t kStep = AmxFewShape::kStep;
constexpr int64_t kAhead = 2048;  // bytes of codes that are fetched ahead

struct Rows {
  const int8_t* packed;  // [step][high][64]
  int64_t high;
  const float* scale;  // [groups][32]
  const int32_t* start;
  const float* sum;
  int32_t* dot;  // [block][32 rows][16 lanes]
  float* y;      // the same
  int64_t rows;
};

template <class Codes>
__attribute__((always_inline)) inline void decode_step(const Weight& w, int64_t block, int64_t at, int64_t n,
                                                       __m512i less, uint8_t* to) {
  const uint8_t* piece = w.codes(block) + at / Codes::kColumns * Codes::kBytes;
  const auto all = [&](int64_t columns) __attribute__((always_inline)) {
    GM_UNROLL(8)
    for (int64_t c = 0; c < columns; c += Codes::kColumns, piece += Codes::kBytes) {
      for (int64_t i = 0; i < Codes::kBytes; i += 64) prefetch(piece + kAhead + i);
      each_vector<Codes>(piece, [&](vb codes, int64_t v) __attribute__((always_inline)) {
        _mm512_store_si512(to + (c + v) * 16, _mm512_sub_epi8(codes.v, less));
      });
    }
  };
  n == kStep ? all(kStep) : all(n);
}

template <int kHigh, int kWide>
void zero(Tiles& tiles) {
  tiles.template zero<0>();
  if constexpr (kHigh * kWide > 1) tiles.template zero<1>();
  if constexpr (kHigh * kWide > 2) tiles.template zero<2>();
  if constexpr (kHigh * kWide > 3) tiles.template zero<3>();
}
// Tile kHigh * block + (tile of rows).
template <int kHigh, int kWide>
void store(Tiles& tiles, int32_t* dot) {
  constexpr int64_t kNext = kHigh == 2 ? 256 : 512;
  tiles.template store<0>(dot, 64);
  if constexpr (kHigh * kWide > 1) tiles.template store<1>(dot + kNext, 64);
  if constexpr (kHigh * kWide > 2) tiles.template store<2>(dot + 2 * kNext, 64);
  if constexpr (kHigh * kWide > 3) tiles.template store<3>(dot + 3 * kNext, 64);
}

// y += the scaled dots of a group.
template <int kWide, bool kCorrected, bool kMins>
void add_group(const Weight& w, const Rows& x, int64_t block, int64_t group) {
  const float* scales = x.scale + group * 32;
  for (int64_t b = 0; b < kWide; ++b) {
    const int64_t at = ((block + b) * w.groups + group) * 16;
    const vf scale = load_plain_scales(w.scales, at, w.wide_scales);
    const vf low = kMins ? load_plain_scales(w.mins, at, w.wide_scales) : vf_zero();
    const int32_t* dot = x.dot + b * 512;
    float* y = x.y + b * 512;
    for (int64_t r = 0; r < x.rows; ++r) {
      vi exact = vi_load(dot + r * 16);
      if constexpr (kCorrected) exact = exact + vi_set1(x.start[group * 32 + r]);
      vf sum = vf_fma(vi_float(exact), scale * vf_set1(scales[r]), vf_load(y + r * 16));
      if constexpr (kMins) sum = vf_fma(low, vf_set1(x.sum[group * 32 + r]), sum);
      vf_store(y + r * 16, sum);
    }
  }
}

template <class Codes, int kHigh, int kWide, bool kSigned, bool kCorrected, bool kMins>
void run(Tiles& tiles, const Weight& w, const Rows& x, int shift, int64_t block, uint8_t* strips) {
  constexpr int64_t kOne = kStep * 16, kOther = 4 * kOne + 2048;
  const __m512i less = _mm512_set1_epi8(static_cast<char>(shift));
  const int64_t steps = (w.kp + kStep - 1) / kStep;
  const auto width = [&](int64_t i) { return w.kp - i * kStep < kStep ? w.kp - i * kStep : kStep; };
  for (int64_t b = 0; b < kWide; ++b) {
    decode_step<Codes>(w, block + b, 0, width(0), less, strips + b * kOne);
  }
  const int64_t group_steps = w.groups == 1 ? steps : w.group / kStep;
  int64_t done = -1;  // the group whose dots wait for their scales
  for (int64_t i = 0, g = 0, left = group_steps; i < steps; ++i) {
    if (left == group_steps) zero<kHigh, kWide>(tiles);
    const uint8_t* from = strips + (i & 1) * kOther;
    uint8_t* to = strips + (~i & 1) * kOther;
    const int8_t* a = x.packed + i * x.high * kStep;
    const int64_t at = (i + 1) * kStep, n = i + 1 < steps ? width(i + 1) : 0;
    const auto decode = [&](int64_t b) __attribute__((always_inline)) {
      if (n > 0) decode_step<Codes>(w, block + b, at, n, less, to + b * kOne);
    };
    if constexpr (kHigh == 1) {
      tiles.template load<4>(a, 64);
      tiles.template load<5>(from, 64);
      tiles.template dot<0, 4, 5, kSigned>();
      decode(0);
      if constexpr (kWide > 1) {
        tiles.template load<6>(from + kOne, 64);
        tiles.template dot<1, 4, 6, kSigned>();
        decode(1);
      }
      if constexpr (kWide > 2) {
        tiles.template load<7>(from + 2 * kOne, 64);
        tiles.template dot<2, 4, 7, kSigned>();
        decode(2);
      }
      if constexpr (kWide > 3) {
        tiles.template load<5>(from + 3 * kOne, 64);
        tiles.template dot<3, 4, 5, kSigned>();
        decode(3);
      }
    } else {
      tiles.template load<4>(a, 64);
      tiles.template load<6>(from, 64);
      tiles.template dot<0, 4, 6, kSigned>();
      tiles.template load<5>(a + 16 * kStep, 64);
      tiles.template dot<1, 5, 6, kSigned>();
      decode(0);
      if constexpr (kWide > 1) {
        tiles.template load<7>(from + kOne, 64);
        tiles.template dot<2, 4, 7, kSigned>();
        tiles.template dot<3, 5, 7, kSigned>();
        decode(1);
      }
    }
    if (done >= 0) add_group<kWide, kCorrected, kMins>(w, x, block, done);
    done = -1;
    if (--left > 0 && i + 1 < steps) continue;
    store<kHigh, kWide>(tiles, x.dot);
    done = g++;
    left = group_steps;
  }
  if (done >= 0) add_group<kWide, kCorrected, kMins>(w, x, block, done);
}

using Run = void (*)(Tiles&, const Weight&, const Rows&, int, int64_t, uint8_t*);

template <class Codes, int kHigh, int kWide>
Run pick(bool is_signed, bool corrected, bool mins) {
  if (is_signed)
    return mins ? run<Codes, kHigh, kWide, true, false, true> : run<Codes, kHigh, kWide, true, false, false>;
  if (corrected)
    return mins ? run<Codes, kHigh, kWide, false, true, true> : run<Codes, kHigh, kWide, false, true, false>;
  return mins ? run<Codes, kHigh, kWide, false, false, true> : run<Codes, kHigh, kWide, false, false, false>;
}

// Rows as [step][high][64], zeros behind the last column.
void pack(const Weight& w, const Int8Rows& x, int64_t rows, int64_t high, int64_t steps, int8_t* to) {
  for (int64_t r = 0; r < high; ++r) {
    for (int64_t i = 0; i < steps; ++i) {
      const __mmask64 there = r < rows ? first_bytes(w.kp - i * kStep) : 0;
      _mm512_store_si512(
          to + (i * high + r) * kStep,
          there ? _mm512_maskz_loadu_epi8(there, x.q + r * x.kp + i * kStep) : _mm512_setzero_si512());
    }
  }
}

}  // namespace

bool linear_int8_few(const Weight& w, const Int8Rows& x, int64_t rows, int64_t block_begin, int64_t block_end,
                     const LinearOut& out, void* scratch) {
  if (!AmxFewShape::takes(w, rows)) return false;
  const bool is_signed = w.storage == Storage::kInt8 ? w.offset == 128 : w.offset <= 128;
  const bool corrected = !is_signed && w.offset != 0;
  const AmxFewShape s(w);
  char* at = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(scratch) + 63) / 64 * 64);
  auto take = [&at](int64_t bytes) {
    char* from = at;
    at += bytes;
    return from;
  };
  auto* strips = reinterpret_cast<uint8_t*>(take(AmxFewShape::kStripBytes));
  auto* dot = reinterpret_cast<int32_t*>(take(8192));
  auto* y = reinterpret_cast<float*>(take(8192));
  auto* packed = reinterpret_cast<int8_t*>(take(s.steps * 32 * kStep));
  auto* scale = reinterpret_cast<float*>(take(w.groups * 128));
  auto* start = reinterpret_cast<int32_t*>(take(w.groups * 128));
  auto* sum = reinterpret_cast<float*>(at);

  // Whole tiles but for the last rows, of which there may be any number.
  const int64_t high = rows <= 16 ? rows : 32;
  pack(w, x, rows, high, s.steps, packed);
  for (int64_t g = 0; g < w.groups; ++g) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t from = r * w.groups + g, to = g * 32 + r;
      scale[to] = x.scale[from];
      if (corrected) start[to] = -w.offset * x.sum[from];
      if (w.mins != nullptr) sum[to] = x.scale[from] * static_cast<float>(x.sum[from]);
    }
  }
  const Rows all = {packed, high, scale, start, sum, dot, y, rows};

  TileConfig config;
  const int64_t tile_rows = rows <= 16 ? rows : 16;
  for (int t = 0; t < 5; ++t) config.shape(t, tile_rows, 64);
  config.shape(5, rows <= 16 ? 16 : tile_rows, 64);
  for (int t = 6; t < 8; ++t) config.shape(t, 16, 64);
  Tiles tiles(config);

  with_codes(w.storage, [&](auto storage) {
    using Codes = decltype(storage);
    const bool mins = w.mins != nullptr;
    const int64_t wide = rows <= 16 ? 4 : 2;
    for (int64_t b = block_begin; b < block_end; b += wide) {
      const int64_t blocks = block_end - b < wide ? block_end - b : wide;
      memset(y, 0, 8192);
      Run of = nullptr;
      if (rows <= 16) {
        of = blocks == 1   ? pick<Codes, 1, 1>(is_signed, corrected, mins)
             : blocks == 2 ? pick<Codes, 1, 2>(is_signed, corrected, mins)
             : blocks == 3 ? pick<Codes, 1, 3>(is_signed, corrected, mins)
                           : pick<Codes, 1, 4>(is_signed, corrected, mins);
      } else {
        of = blocks == 1 ? pick<Codes, 2, 1>(is_signed, corrected, mins)
                         : pick<Codes, 2, 2>(is_signed, corrected, mins);
      }
      of(tiles, w, all, is_signed ? w.offset : 0, b, strips);
      for (int64_t i = 0; i < blocks; ++i) finish(y + i * 512, 0, rows, b + i, w.n, out);
    }
  });
  return true;
}

}  // namespace gm::GM_LEVEL
