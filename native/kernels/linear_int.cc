// Integer weights times int8 rows.
//
// One order of operations for one row, whatever the number of rows and the level: within a group an exact
// int32 dot of (code - offset) and q; then, groups ascending, y = fma(float(dot), w_scale * x_scale, y) and,
// for weights with minimums, y = fma(w_min, x_scale * float(sum of q), y).
//
// A tile is one block of 16 output rows (the lanes) by up to 12 rows of activations: 12 int32 and 12 f32
// accumulators fill 24 of the 32 AVX-512 registers, and every code vector is used 12 times.
#include "codes.h"
#include "kernels.h"
#include "vec/vec.h"

namespace gm::GM_LEVEL {
namespace {

struct Tile {
  const uint8_t* codes;  // of the block
  const char* scales;    // of the block
  const char* mins;      // of the block, or null
  const int8_t* q;       // first row
  const float* x_scale;  // [rows][groups]
  const int32_t* start;  // [rows][groups], -offset * sum
  const float* x_sum;    // [rows][groups], x_scale * sum
  int64_t ldq, group, groups, kp;
  float* out;         // of the first row and the block
  const float* bias;  // of the block, or null
  int64_t ld, lanes;
  int64_t skip;  // rows at the front that are not written
  bool accumulate;
};

// With kAhead those are asked for that come half a kilobyte later: no hardware prefetcher follows so slow a
// stream.
template <bool kWide, bool kAhead>
inline vf load_scale(const char* p, int64_t group) {
  if constexpr (kAhead) prefetch(p + group * (kWide ? 64 : 32) + 512);
  if constexpr (kWide) return vf_load(reinterpret_cast<const float*>(p) + group * 16);
  return vf_load_f16(reinterpret_cast<const uint16_t*>(p) + group * 16);
}

// kGroup: columns per group when known at compile time, else 0.
template <int kRows, class Codes, bool kWide, bool kMins, int kGroup>
void tile(const Tile& t) {
  constexpr bool kFew = kRows <= 4;  // bound by memory
  vf acc[kRows];
  GM_UNROLL(12)
  for (int r = 0; r < kRows; ++r) acc[r] = vf_zero();
  const int64_t group = kGroup ? kGroup : t.group;
  const uint8_t* codes = t.codes;
  for (int64_t g = 0; g < t.groups; ++g) {
    const int8_t* q = t.q + g * group;
    const int64_t columns = kGroup ? kGroup : (g + 1 == t.groups ? t.kp - g * group : group);
    vi dot[kRows];
    GM_UNROLL(12)
    for (int r = 0; r < kRows; ++r) dot[r] = vi_set1(t.start[r * t.groups + g]);
    const auto piece = [&](int64_t c) __attribute__((always_inline)) {
      // Well ahead of the hardware prefetcher, which stops at page borders. Few rows of 8-bit codes go so
      // fast that the first-level cache's outstanding misses would be the limit (Zen 4: 21 GB/s, else 29).
      GM_UNROLL(5)
      for (int i = 0; i < Codes::kBytes; i += 64) {
        if constexpr (kFew && Codes::kBits == 8) {
          prefetch_far(codes + i + 2048);
        } else {
          prefetch(codes + i + 3072);
        }
      }
      each_vector<Codes>(codes, [&](vb w, int64_t at) __attribute__((always_inline)) {
        GM_UNROLL(12)
        for (int r = 0; r < kRows; ++r) {
          const int8_t* four = q + r * t.ldq + c + at;
          dot[r] = Codes::kNarrow ? vi_dot_narrow(dot[r], w, four) : vi_dot(dot[r], w, four);
        }
      });
      codes += Codes::kBytes;
    };
    if constexpr (Codes::kColumns <= 8) {
      GM_UNROLL(8)
      for (int64_t c = 0; c < columns; c += Codes::kColumns) piece(c);
    } else {
      for (int64_t c = 0; c < columns; c += Codes::kColumns) piece(c);
    }
    const vf scale = load_scale<kWide, kFew>(t.scales, g);
    GM_UNROLL(12)
    for (int r = 0; r < kRows; ++r) {
      acc[r] = vf_fma(vi_float(dot[r]), scale * vf_set1(t.x_scale[r * t.groups + g]), acc[r]);
    }
    if constexpr (kMins) {
      const vf low = load_scale<kWide, kFew>(t.mins, g);
      GM_UNROLL(12)
      for (int r = 0; r < kRows; ++r) acc[r] = vf_fma(low, vf_set1(t.x_sum[r * t.groups + g]), acc[r]);
    }
  }
  const int lanes = static_cast<int>(t.lanes);
  const vf bias = t.bias == nullptr ? vf_zero() : vf_load_n(t.bias, lanes);
  float* to = t.out;
  GM_UNROLL(12)
  for (int r = 0; r < kRows; ++r, to += t.ld) {
    if (r < t.skip) continue;
    vf value = acc[r] + bias;
    if (lanes == 16) {
      if (t.accumulate) value = vf_load(to) + value;
      vf_store(to, value);
    } else {
      if (t.accumulate) value = vf_load_n(to, lanes) + value;
      vf_store_n(to, value, lanes);
    }
  }
}

using TileFn = void (*)(const Tile&);

template <class Codes, bool kWide, bool kMins, int kGroup>
TileFn pick_rows(int64_t rows) {
  if constexpr (kTileRows >= 12) {
    if (rows == 12) return tile<12, Codes, kWide, kMins, kGroup>;
    if (rows == 8) return tile<8, Codes, kWide, kMins, kGroup>;
  }
  if constexpr (kTileRows >= 4) {
    if (rows == 4) return tile<4, Codes, kWide, kMins, kGroup>;
    if (rows == 2) return tile<2, Codes, kWide, kMins, kGroup>;
  }
  return tile<1, Codes, kWide, kMins, kGroup>;
}

// Common group sizes are compiled in where pieces are short; f32 scales and ragged last groups take the
// general loop.
template <class Codes>
TileFn pick_format(const Weight& w, int64_t rows) {
  const bool mins = w.mins != nullptr;
  if (w.wide_scales) {
    return mins ? pick_rows<Codes, true, true, 0>(rows) : pick_rows<Codes, true, false, 0>(rows);
  }
  if constexpr (Codes::kColumns <= 8) {
    if (w.kp == w.group * w.groups) {
      if (mins && w.group == 32) return pick_rows<Codes, false, true, 32>(rows);
      if (!mins && w.group == 32) return pick_rows<Codes, false, false, 32>(rows);
      if (!mins && w.group == 64) return pick_rows<Codes, false, false, 64>(rows);
    }
  }
  return mins ? pick_rows<Codes, false, true, 0>(rows) : pick_rows<Codes, false, false, 0>(rows);
}

TileFn pick(const Weight& w, int64_t rows) {
  return with_codes(w.storage, [&](auto codes) { return pick_format<decltype(codes)>(w, rows); });
}

// How many of `left` rows the next tile takes, and its height. It is higher where rows before it are there to
// fill it up: they are computed once more.
struct Height {
  int64_t rows, height;
};
Height next_tile(int64_t left, int64_t before) {
  if (kTileRows >= 12) {
    if (left >= 12) return {12, 12};
    if (left > 8 && left + before >= 12) return {left, 12};
    if (left >= 8) return {8, 8};
    if (left > 4 && left + before >= 8) return {left, 8};
  }
  if (kTileRows >= 4) {
    if (left >= 4) return {4, 4};
    if (left > 2 && left + before >= 4) return {left, 4};
    if (left >= 2) return {2, 2};
  }
  return {1, 1};
}

}  // namespace

void linear_int8(const Weight& w, const Int8Rows& x, int64_t rows, int64_t block_begin, int64_t block_end,
                 const LinearOut& out, void* scratch) {
  const int64_t count = rows * w.groups;
  int32_t* start = static_cast<int32_t*>(scratch);
  float* x_sum = reinterpret_cast<float*>(start + count);
  for (int64_t i = 0; i < count; ++i) start[i] = -w.offset * x.sum[i];
  if (w.mins != nullptr) {
    for (int64_t i = 0; i < count; ++i) x_sum[i] = x.scale[i] * static_cast<float>(x.sum[i]);
  }
  const int64_t scale_bytes = w.groups * 16 * (w.wide_scales ? 4 : 2);
  // Rows in panels whose codes stay in the nearer caches while all blocks pass over them; not below 96, or
  // large weights would be read from memory too often.
  const int64_t fit = 98304 / (x.kp > 0 ? x.kp : 1) / 12 * 12;
  const int64_t panel = fit < 96 ? 96 : fit;
  Tile t;
  t.ldq = x.kp;
  t.group = w.group;
  t.groups = w.groups;
  t.kp = w.kp;
  t.ld = out.ld;
  t.accumulate = out.accumulate;
  for (int64_t p = 0; p < rows; p += panel) {
    const int64_t p_end = rows - p < panel ? rows : p + panel;
    for (int64_t b = block_begin; b < block_end; ++b) {
      t.lanes = w.n - b * 16 < 16 ? w.n - b * 16 : 16;
      t.codes = w.codes(b);
      t.scales = static_cast<const char*>(w.scales) + b * scale_bytes;
      t.mins = w.mins == nullptr ? nullptr : static_cast<const char*>(w.mins) + b * scale_bytes;
      t.bias = out.bias == nullptr ? nullptr : out.bias + b * 16;
      for (int64_t r = p; r < p_end;) {
        const Height h = next_tile(p_end - r, r);
        t.skip = h.height - h.rows;
        const int64_t first = r - t.skip;
        t.q = x.q + first * x.kp;
        t.x_scale = x.scale + first * w.groups;
        t.start = start + first * w.groups;
        t.x_sum = x_sum + first * w.groups;
        t.out = out.out + first * out.ld + b * 16;
        pick(w, h.height)(t);
        r += h.rows;
      }
    }
  }
}

}  // namespace gm::GM_LEVEL
