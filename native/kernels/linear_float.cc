// Any weight times f32 or bf16 rows: a strip of at most 256 columns of one block is decoded into the L1 cache
// and multiplied by all rows, so that every storage shares one arithmetic.
//
// f32: one FMA chain per output, columns ascending. bf16: per pair of columns, the odd then the even product,
// each a fused step into the same f32 accumulator (what vdpbf16ps does), pairs ascending.
#include "codes.h"
#include "kernels.h"
#include "vec/vec.h"

namespace gm::GM_LEVEL {
namespace {

constexpr int64_t kStrip = 256;

// Columns [k0, k0 + n) of a block, as f32 [n][16]; padding columns decode to finite values that meet zeros in
// x.
struct Decoder {
  const Weight& w;
  int64_t block;

  vf scale_at(const void* base, int64_t g) const { return load_scales(w, base, (block * w.groups + g) * 16); }

  // Integer storage: scale * (code - offset) + min, in that order of rounding.
  template <class Codes, class Emit>
  void each_int(int64_t k0, int64_t n, Emit emit) const {
    const vi offset = vi_set1(-w.offset), mask = vi_set1(255);
    int64_t g = k0 / w.group, g_end = (g + 1) * w.group;
    vf scale = scale_at(w.scales, g);
    vf low = w.mins == nullptr ? vf_zero() : scale_at(w.mins, g);
    const uint8_t* piece = w.codes(block) + k0 / Codes::kColumns * Codes::kBytes;
    for (int64_t c = 0; c < n; c += Codes::kColumns, piece += Codes::kBytes) {
      if (k0 + c >= g_end && g + 1 < w.groups) {
        ++g;
        g_end += w.group;
        scale = scale_at(w.scales, g);
        low = w.mins == nullptr ? vf_zero() : scale_at(w.mins, g);
      }
      each_vector<Codes>(piece, [&](vb codes, int64_t at) {
        const vi lanes = vb_lanes(codes);
        const auto column = [&](vi bits, int64_t i) {
          vf value = scaled(w, scale, (bits & mask) + offset);
          if (w.mins != nullptr) value = value + low;
          emit(c + at + i, value);
        };
        column(lanes, 0);
        column(vi_shr<8>(lanes), 1);
        column(vi_shr<16>(lanes), 2);
        column(vi_shr<24>(lanes), 3);
      });
    }
  }

  template <class Emit>
  void each(int64_t k0, int64_t n, Emit emit) const {
    with_codes(w.storage, [&](auto codes) { each_int<decltype(codes)>(k0, n, emit); });
  }

  const uint16_t* pairs(int64_t k0) const {
    return static_cast<const uint16_t*>(w.values) + block * w.kp * 16 + k0 * 16;
  }

  void to_f32(int64_t k0, int64_t n, float* strip) const {
    if (w.integer()) {
      each(k0, n, [strip](int64_t c, vf value) { vf_store(strip + c * 16, value); });
      return;
    }
    for (int64_t c = 0; c < n; c += 2) {
      const vh pair = vh_load(pairs(k0 + c));
      const bool bf16 = w.storage == Storage::kBf16;
      vf_store(strip + c * 16, bf16 ? vh_even(pair) : vh_even_f16(pair));
      vf_store(strip + (c + 1) * 16, bf16 ? vh_odd(pair) : vh_odd_f16(pair));
    }
  }

  void to_bf16(int64_t k0, int64_t n, uint16_t* strip) const {
    if (w.integer()) {
      vf even = vf_zero();
      each(k0, n, [strip, &even](int64_t c, vf value) {
        if (c % 2 == 0) {
          even = value;
        } else {
          vh_store(strip + (c - 1) * 16, vh_pack(even, value));
        }
      });
      return;
    }
    for (int64_t c = 0; c < n; c += 2) {
      vf even, odd;
      if (w.storage == Storage::kF32) {
        const float* from = static_cast<const float*>(w.values) + (block * w.kp + k0 + c) * 16;
        even = vf_load(from);
        odd = vf_load(from + 16);
      } else {
        const vh pair = vh_load(pairs(k0 + c));
        even = vh_even_f16(pair);
        odd = vh_odd_f16(pair);
      }
      vh_store(strip + c * 16, vh_pack(even, odd));
    }
  }
};

template <int kRows>
void tile_f32(const float* strip, int64_t n, const float* x, int64_t ldx, float* acc) {
  vf y[kRows];
  GM_UNROLL(12)
  for (int r = 0; r < kRows; ++r) y[r] = vf_load(acc + r * 16);
  for (int64_t c = 0; c < n; ++c) {
    const vf w = vf_load(strip + c * 16);
    if constexpr (kRows == 1) prefetch(strip + c * 16 + 1024);
    GM_UNROLL(12)
    for (int r = 0; r < kRows; ++r) y[r] = vf_fma(w, vf_set1(x[r * ldx + c]), y[r]);
  }
  GM_UNROLL(12)
  for (int r = 0; r < kRows; ++r) vf_store(acc + r * 16, y[r]);
}

template <int kRows>
void tile_bf16(const uint16_t* strip, int64_t n, const uint16_t* x, int64_t ldx, float* acc) {
  vf y[kRows];
  GM_UNROLL(12)
  for (int r = 0; r < kRows; ++r) y[r] = vf_load(acc + r * 16);
  for (int64_t c = 0; c < n; c += 2) {
    const vh w = vh_load(strip + c * 16);
    if constexpr (kRows == 1) prefetch(strip + c * 16 + 2048);
    GM_UNROLL(12)
    for (int r = 0; r < kRows; ++r) y[r] = vf_dot_bf16(y[r], w, x + r * ldx + c);
  }
  GM_UNROLL(12)
  for (int r = 0; r < kRows; ++r) vf_store(acc + r * 16, y[r]);
}

template <class X, template <int> class Fn>
void all_rows(const X* strip, int64_t n, const X* x, int64_t ldx, int64_t rows, float* acc) {
  int64_t r = 0;
  if constexpr (kTileRows >= 12) {
    for (; r + 12 <= rows; r += 12) Fn<12>::run(strip, n, x + r * ldx, ldx, acc + r * 16);
    if (r + 8 <= rows) {
      Fn<8>::run(strip, n, x + r * ldx, ldx, acc + r * 16);
      r += 8;
    }
  }
  if constexpr (kTileRows >= 4) {
    for (; r + 4 <= rows; r += 4) Fn<4>::run(strip, n, x + r * ldx, ldx, acc + r * 16);
    if (r + 2 <= rows) {
      Fn<2>::run(strip, n, x + r * ldx, ldx, acc + r * 16);
      r += 2;
    }
  }
  for (; r < rows; ++r) Fn<1>::run(strip, n, x + r * ldx, ldx, acc + r * 16);
}

template <int kRows>
struct F32Tile {
  static void run(const float* s, int64_t n, const float* x, int64_t ldx, float* acc) {
    tile_f32<kRows>(s, n, x, ldx, acc);
  }
};
template <int kRows>
struct Bf16Tile {
  static void run(const uint16_t* s, int64_t n, const uint16_t* x, int64_t ldx, float* acc) {
    tile_bf16<kRows>(s, n, x, ldx, acc);
  }
};

template <class Codes>
void decode_codes(const Weight& w, int64_t block, int64_t lane, float* out) {
  const auto number = [&w, lane](const void* base, int64_t at) {
    float numbers[16];
    vf_store(numbers, load_scales(w, base, at));
    return numbers[lane];
  };
  const uint8_t* piece = w.codes(block);
  for (int64_t k = 0; k < w.k; k += Codes::kColumns, piece += Codes::kBytes) {
    const int64_t at = (block * w.groups + k / w.group) * 16;
    const float scale = number(w.scales, at);
    const float low = w.mins == nullptr ? 0.0f : number(w.mins, at);
    each_vector<Codes>(piece, [&](vb codes, int64_t c) {
      int32_t lanes[16];
      vi_store(lanes, vb_lanes(codes));
      for (int64_t i = k + c; i < k + c + 4 && i < w.k; ++i) {
        const int32_t code = lanes[lane] >> (i - k - c) * 8 & 255;
        float value[16];
        vf_store(value, scaled(w, vf_set1(scale), vi_set1(code - w.offset)));
        out[i] = w.mins == nullptr ? value[0] : value[0] + low;
      }
    });
  }
}

void finish(const float* acc, int64_t rows, int64_t block, int64_t n, const LinearOut& out) {
  const int lanes = static_cast<int>(n - block * 16 < 16 ? n - block * 16 : 16);
  const vf bias = out.bias == nullptr ? vf_zero() : vf_load_n(out.bias + block * 16, lanes);
  for (int64_t r = 0; r < rows; ++r) {
    float* to = out.out + r * out.ld + block * 16;
    vf value = vf_load(acc + r * 16);
    if (out.row_scale != nullptr) value = value * vf_set1(out.row_scale[r]);
    value = value + bias;
    if (out.accumulate) value = vf_load_n(to, lanes) + value;
    vf_store_n(to, value, lanes);
  }
}

}  // namespace

void linear_f32(const Weight& w, const float* x, int64_t ldx, int64_t rows, int64_t block_begin,
                int64_t block_end, const LinearOut& out, void* scratch) {
  float* strip = static_cast<float*>(scratch);
  float* acc = strip + kStrip * 16;
  for (int64_t b = block_begin; b < block_end; ++b) {
    memset(acc, 0, static_cast<size_t>(rows) * 64);
    const Decoder decoder{w, b};
    for (int64_t k0 = 0; k0 < w.k; k0 += kStrip) {
      const int64_t n = w.k - k0 < kStrip ? w.k - k0 : kStrip;
      const float* from;
      if (w.storage == Storage::kF32) {
        from = static_cast<const float*>(w.values) + (b * w.kp + k0) * 16;
      } else {
        // Whole code words are decoded; columns past k are not used.
        decoder.to_f32(k0, w.kp - k0 < kStrip ? w.kp - k0 : kStrip, strip);
        from = strip;
      }
      all_rows<float, F32Tile>(from, n, x + k0, ldx, rows, acc);
    }
    finish(acc, rows, b, w.n, out);
  }
}

void linear_bf16(const Weight& w, const uint16_t* x, int64_t ldx, int64_t rows, int64_t block_begin,
                 int64_t block_end, const LinearOut& out, void* scratch) {
  uint16_t* strip = static_cast<uint16_t*>(scratch);
  float* acc = reinterpret_cast<float*>(strip + kStrip * 16);
  for (int64_t b = block_begin; b < block_end; ++b) {
    memset(acc, 0, static_cast<size_t>(rows) * 64);
    const Decoder decoder{w, b};
    // x is padded with zeros to an even number of columns at least.
    const int64_t columns = (w.k + 1) / 2 * 2;
    for (int64_t k0 = 0; k0 < columns; k0 += kStrip) {
      const int64_t n = columns - k0 < kStrip ? columns - k0 : kStrip;
      const uint16_t* from;
      if (w.storage == Storage::kBf16) {
        from = decoder.pairs(k0);
      } else {
        decoder.to_bf16(k0, w.kp - k0 < kStrip ? w.kp - k0 : kStrip, strip);
        from = strip;
      }
      all_rows<uint16_t, Bf16Tile>(from, n, x + k0, ldx, rows, acc);
    }
    finish(acc, rows, b, w.n, out);
  }
}

void decode_row(const Weight& w, int64_t row, float* out) {
  const int64_t block = row / 16, lane = row % 16;
  if (w.integer()) {
    with_codes(w.storage, [&](auto storage) { decode_codes<decltype(storage)>(w, block, lane, out); });
    return;
  }
  for (int64_t k = 0; k < w.k; ++k) {
    if (w.storage == Storage::kF32) {
      out[k] = static_cast<const float*>(w.values)[(block * w.kp + k) * 16 + lane];
    } else {
      const uint16_t bits =
          static_cast<const uint16_t*>(w.values)[block * w.kp * 16 + (k / 2 * 16 + lane) * 2 + k % 2];
      out[k] = w.storage == Storage::kBf16 ? bf16_to_float(bits) : half_to_float(bits);
    }
  }
}

}  // namespace gm::GM_LEVEL
