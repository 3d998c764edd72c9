// Any weight times f32 or bf16 rows.
//
// f32 rows, and float weights times bf16 rows: a strip of at most 256 columns of one block is decoded into
// the L1 cache and multiplied by all rows, so that every storage shares one arithmetic. f32: one FMA chain
// per output, columns ascending. bf16: per pair of columns, the odd then the even product, each a fused step
// into the same f32 accumulator (what vdpbf16ps does), pairs ascending.
//
// Integer weights times bf16 rows: further down.
#include "codes.h"
#include "kernels.h"
#include "linear_out.h"
#include "numbers.h"
#include "vec/vec.h"

namespace gm::GM_LEVEL {
namespace {

constexpr int64_t kStrip = 256;
constexpr int64_t kPanelRows = kLinearPanelRows;

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
          vf value = scaled(w, scale, vi_float((bits & mask) + offset));
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

  // Of float weights.
  void to_bf16(int64_t k0, int64_t n, uint16_t* strip) const {
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
        vf_store(value, scaled(w, vf_set1(scale), vi_float(vi_set1(code - w.offset))));
        out[i] = w.mins == nullptr ? value[0] : value[0] + low;
      }
    });
  }
}

// ---- Integer weights times bf16 rows -----------------------------------------------------------------
//
// Codes less their offset are bf16 numbers exactly, and are multiplied as such. One order of operations for
// one row, whatever the number of rows and the level: within a group, from zero, a chain of fused steps as
// for the float weights, but of every four columns 0 and 2 are the first pair, 1 and 3 the second, as they
// lie in 16-bit words; then, groups ascending, y = fma(scale, dot, y) and, for weights with minimums, y =
// fma(min, sum of the group's x, y), that sum taken in sixteen chains, column c in chain c % 16, folded.
//
// Few rows: a tile is one or some blocks of 16 output rows by at most 8 rows of activations; what a vector of
// codes becomes is used for all of them at once and kept nowhere. Few rows take two blocks, as one chain
// would wait for its products; with four, memory is read more slowly. More rows: strips as above, whose
// numbers lack the scales still.
//
// Zen 4 starts a product of 32 weights every cycle, and has six cycles to wait for it; shifts, shuffles and
// look-ups are one per cycle, too, partly on the same ports. 64 bytes of 4-bit codes (128 weights) take 3
// shifts, 4 look-ups and 4 products per row: some 7 cycles with one row, faster than one core reads memory,
// 16 at least with four, 64 with sixteen.

// A linear layer as far as its tiles need it.
struct Job {
  const Weight* w;
  const uint16_t* x;  // [rows][ldx], zero from column k to kp
  int64_t ldx;
  const float* sums;  // of x, [rows][groups]; null without minimums
  const uint16_t* numbers;

  int64_t columns(int64_t group) const { return columns_of(*w, group); }
};

// Rows from `row` on in the order in which a tile of `height` rows reads them: [kp / 2][height][2], pairs as
// above. Rows apart by a power of two would push each other out of the cache.
const uint16_t* pack(const Job& job, int64_t row, int64_t height, uint16_t* to) {
  const uint16_t* from = job.x + row * job.ldx;
  for (int64_t r = 0; r < height; ++r) {
    for (int64_t c = 0; c < job.w->kp; c += 4) {
      uint64_t four;
      memcpy(&four, from + r * job.ldx + c, 8);
      const uint64_t inner = (four >> 16 & 0xffff0000u) | (four & 0xffff0000u) << 16;
      four = (four & 0xffff00000000ffffu) | inner;
      memcpy(to + c * height + r * 2, &four, 4);
      four >>= 32;
      memcpy(to + (c + 2) * height + r * 2, &four, 4);
    }
  }
  return to;
}

// y[block][row] of a group that is complete, by the blocks' scales and minimums.
template <int kRows, int kBlocks>
__attribute__((always_inline)) inline void add_group(const Job& job, int64_t group, int64_t row,
                                                     const vf* scale, const vf* low, const vf* dot, vf* y) {
  GM_UNROLL(12)
  for (int i = 0; i < kBlocks * kRows; ++i) y[i] = vf_fma(scale[i / kRows], dot[i], y[i]);
  if (job.sums != nullptr) {
    const int64_t groups = job.w->groups;
    const float* sums = job.sums + row * groups + group;
    GM_UNROLL(12)
    for (int i = 0; i < kBlocks * kRows; ++i) {
      y[i] = vf_fma(low[i / kRows], vf_set1(sums[i % kRows * groups]), y[i]);
    }
  }
}

// Rows that are multiplied without a strip, at most; rows of their tiles, and blocks.
constexpr int kFewRows = kTileRows >= 12 ? 24 : kTileRows;
constexpr int kFewHeight = kTileRows >= 12 ? 8 : kTileRows;
constexpr int blocks_of(int rows) {
  if (kTileRows >= 12) return rows <= 4 ? 2 : 1;
  return kTileRows >= 4 && rows == 1 ? 2 : 1;
}

// Adds a group's columns of some blocks to dot[block][row]. Its scales are those from number `scales` on, for
// the first block, its codes in `codes` from byte `at` on.
template <int kRows, int kBlocks, class Numbers>
__attribute__((always_inline)) inline void dot_group(const Job& job, const Numbers& numbers, int64_t scales,
                                                     const uint16_t* x, const uint8_t* codes, int64_t at,
                                                     int64_t columns, vf* dot) {
  using Codes = typename Numbers::Codes;
  const Weight& w = *job.w;
  const int64_t bytes = w.kp / Codes::kColumns * Codes::kBytes;
  typename Numbers::Group group[kBlocks];
  GM_UNROLL(4)
  for (int b = 0; b < kBlocks; ++b) {
    const int64_t first = scales + b * w.groups * 16;
    group[b] = numbers.group(w, first);
    ask_for_scales(w, w.scales, first);
    if (job.sums != nullptr) ask_for_scales(w, w.mins, first);
  }
  for (int64_t c = 0; c < columns; c += Codes::kColumns, at += Codes::kBytes, x += Codes::kColumns * kRows) {
    // As in linear_int.cc; behind the end of these blocks the next ones begin. Several blocks' codes would
    // push each other out of the first-level cache.
    int64_t ahead = at + 3072;
    if (ahead >= bytes) ahead += (kBlocks - 1) * bytes;
    GM_UNROLL(4)
    for (int b = 0; b < kBlocks; ++b) {
      GM_UNROLL(5)
      for (int i = 0; i < Codes::kBytes; i += 64) prefetch_far(codes + b * bytes + ahead + i);
    }
    const auto vector = [&]<int kVector>() __attribute__((always_inline)) {
      GM_UNROLL(4)
      for (int b = 0; b < kBlocks; ++b) {
        vh first, second;
        numbers.template pairs<kVector>(w, codes + b * bytes + at, group[b], first, second);
        GM_UNROLL(8)
        for (int r = 0; r < kRows; ++r) {
          const uint16_t* four = x + 4 * kVector * kRows + 2 * r;
          vf& sum = dot[b * kRows + r];
          sum = vf_dot_bf16(vf_dot_bf16(sum, first, four), second, four + 2 * kRows);
        }
      }
    };
    [&]<int... kVector>(std::integer_sequence<int, kVector...>) __attribute__((always_inline)) {
      (vector.template operator()<kVector>(), ...);
    }(std::make_integer_sequence<int, Codes::kColumns / 4>());
  }
}

// Blocks from `block` on by packed rows, those from `row` on: out[block][row][16].
template <int kRows, int kBlocks, class Numbers>
void tile_codes(const Job& job, const uint16_t* x, int64_t block, int64_t row, float* out) {
  using Codes = typename Numbers::Codes;
  const Weight& w = *job.w;
  const Numbers numbers(w, job.numbers);
  const uint8_t* codes = w.codes(block);
  vf y[kBlocks * kRows];
  GM_UNROLL(8)
  for (int i = 0; i < kBlocks * kRows; ++i) y[i] = vf_zero();
  int64_t at = 0;
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t columns = job.columns(g), scales = (block * w.groups + g) * 16;
    vf dot[kBlocks * kRows];
    GM_UNROLL(8)
    for (int i = 0; i < kBlocks * kRows; ++i) dot[i] = vf_zero();
    bool has = true;
    if constexpr (requires { typename Numbers::Defined; }) {
      for (int b = 0; b < kBlocks; ++b) has = has && numbers.has(w, scales + b * w.groups * 16);
      if (!has) {
        const typename Numbers::Defined defined(w, job.numbers);
        dot_group<kRows, kBlocks>(job, defined, scales, x, codes, at, columns, dot);
      }
    }
    if (has) dot_group<kRows, kBlocks>(job, numbers, scales, x, codes, at, columns, dot);
    vf scale[kBlocks], low[kBlocks];
    GM_UNROLL(1)  // there are many kinds of scales
    for (int b = 0; b < kBlocks; ++b) {
      scale[b] = group_scale(w, scales + b * w.groups * 16);
      low[b] = group_min(w, scales + b * w.groups * 16);
    }
    add_group<kRows, kBlocks>(job, g, row, scale, low, dot, y);
    at += columns / Codes::kColumns * Codes::kBytes;
    x += columns * kRows;
  }
  GM_UNROLL(8)
  for (int i = 0; i < kBlocks * kRows; ++i) vf_store(out + i * 16, y[i]);
}

// Columns of a block as numbers, with the scales and minimums of the groups that they are in.
struct Strip {
  int64_t begin, columns;
  uint16_t* numbers;
  alignas(64) float scales[kStrip / 8 + 1][16];
  alignas(64) float lows[kStrip / 8 + 1][16];
};

template <class Numbers>
void fill_strip(const Job& job, int64_t block, int64_t begin, Strip& strip) {
  const Weight& w = *job.w;
  strip.begin = begin;
  strip.columns = w.kp - begin < kStrip ? w.kp - begin : kStrip;
  int64_t group = begin / w.group;
  for (int64_t c = 0, i = 0; c < strip.columns; ++group, ++i) {
    const int64_t end = group * w.group + job.columns(group) - begin;
    const int64_t stop = end < strip.columns ? end : strip.columns;
    decode_numbers<Numbers>(w, job.numbers, block, begin + c, stop - c, strip.numbers + c * 16);
    vf_store(strip.scales[i], group_scale(w, (block * w.groups + group) * 16));
    vf_store(strip.lows[i], group_min(w, (block * w.groups + group) * 16));
    c = stop;
  }
}

// A strip times packed rows, those from `row` on, added to their sums [kRows][2][16]: of y, and of the group
// that is not complete.
template <int kRows>
void tile_strip(const Job& job, const uint16_t* x, const Strip& strip, int64_t row, float* at) {
  const Weight& w = *job.w;
  const int64_t k0 = strip.begin, n = strip.columns;
  x += k0 * kRows;
  vf y[kRows], dot[kRows];
  GM_UNROLL(12)
  for (int r = 0; r < kRows; ++r) {
    y[r] = vf_load(at + r * 32);
    dot[r] = vf_load(at + r * 32 + 16);
  }
  int64_t group = k0 / w.group;
  const auto *scales = strip.scales, *lows = strip.lows;
  for (int64_t c = 0; c < n; ++group) {
    const int64_t end = group * w.group + job.columns(group) - k0, stop = end < n ? end : n;
    for (; c < stop; c += 2) {
      const vh pair = vh_load(strip.numbers + c * 16);
      GM_UNROLL(12)
      for (int r = 0; r < kRows; ++r) dot[r] = vf_dot_bf16(dot[r], pair, x + c * kRows + 2 * r);
    }
    if (c < end) break;
    const vf scale = vf_load(*scales++), low = vf_load(*lows++);
    add_group<kRows, 1>(job, group, row, &scale, &low, dot, y);
    GM_UNROLL(12)
    for (int r = 0; r < kRows; ++r) dot[r] = vf_zero();
  }
  GM_UNROLL(12)
  for (int r = 0; r < kRows; ++r) {
    vf_store(at + r * 32, y[r]);
    vf_store(at + r * 32 + 16, dot[r]);
  }
}

using TileCodes = void (*)(const Job&, const uint16_t*, int64_t, int64_t, float*);
using TileStrip = void (*)(const Job&, const uint16_t*, const Strip&, int64_t, float*);

template <int... kRows>
TileStrip pick_strip(int64_t rows, std::integer_sequence<int, kRows...>) {
  static constexpr TileStrip tiles[] = {tile_strip<kRows + 1>...};
  return tiles[rows - 1];
}

// [rows - 1][whether one block]
template <class Numbers, int... kRows>
TileCodes pick_tile(int64_t rows, bool single, std::integer_sequence<int, kRows...>) {
  static constexpr TileCodes tiles[][2] = {
      {tile_codes<kRows + 1, blocks_of(kRows + 1), Numbers>, tile_codes<kRows + 1, 1, Numbers>}...};
  return tiles[rows - 1][single];
}

template <class Numbers>
void linear_few(const Job& job, int64_t rows, int64_t block_begin, int64_t block_end, const LinearOut& out,
                float* scratch) {
  constexpr auto heights = std::make_integer_sequence<int, kFewHeight>();
  // Tiles as even as they can be: one of few rows would wait for its own products.
  const int64_t tiles = (rows + kFewHeight - 1) / kFewHeight;
  const int64_t most = tiles == 1 ? blocks_of(static_cast<int>(rows)) : 1;
  auto* packed = reinterpret_cast<uint16_t*>(scratch + most * rows * 16);
  const uint16_t* x[kFewRows];
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = rows * t / tiles, height = rows * (t + 1) / tiles - first;
    x[t] = pack(job, first, height, packed + first * job.w->kp);
  }
  for (int64_t b = block_begin; b < block_end;) {
    const int64_t blocks = block_end - b < most ? 1 : most;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = rows * t / tiles, height = rows * (t + 1) / tiles - first;
      pick_tile<Numbers>(height, blocks == 1, heights)(job, x[t], b, first, scratch + first * 16);
    }
    for (int64_t i = 0; i < blocks; ++i) finish(scratch + i * rows * 16, 0, rows, b + i, job.w->n, out);
    b += blocks;
  }
}

// Rows from `row` on, more than a few.
template <class Numbers>
void linear_panel(const Job& job, int64_t row, int64_t rows, int64_t block_begin, int64_t block_end,
                  const LinearOut& out, float* scratch) {
  const Weight& w = *job.w;
  Strip strip;
  strip.numbers = reinterpret_cast<uint16_t*>(scratch);
  float* sums = scratch + kStrip * 8;
  float* acc = sums + rows * 32;
  auto* packed = reinterpret_cast<uint16_t*>(acc + rows * 16);
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  const uint16_t* x[kPanelRows];
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = rows * t / tiles, height = rows * (t + 1) / tiles - first;
    x[t] = pack(job, row + first, height, packed + first * w.kp);
  }
  for (int64_t b = block_begin; b < block_end; ++b) {
    memset(sums, 0, static_cast<size_t>(rows) * 128);
    for (int64_t k0 = 0; k0 < w.kp; k0 += kStrip) {
      fill_strip<Numbers>(job, b, k0, strip);
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t first = rows * t / tiles, height = rows * (t + 1) / tiles - first;
        const TileStrip tile = pick_strip(height, std::make_integer_sequence<int, kTileRows>());
        tile(job, x[t], strip, row + first, sums + first * 32);
      }
    }
    for (int64_t r = 0; r < rows; ++r) memcpy(acc + r * 16, sums + r * 32, 64);
    finish(acc, row, rows, b, w.n, out);
  }
}

template <class Numbers>
void linear_codes(Job job, int64_t rows, int64_t block_begin, int64_t block_end, const LinearOut& out,
                  float* scratch) {
  const Weight& w = *job.w;
  uint16_t numbers[kNumbers];
  Numbers::fill(w, numbers);
  job.numbers = numbers;
  if (w.mins != nullptr) {
    sum_groups(w, job.x, job.ldx, rows, scratch);
    job.sums = scratch;
    scratch += (rows * w.groups + 15) / 16 * 16;  // whole cache lines
  }
  if (rows <= kFewRows) {
    linear_few<Numbers>(job, rows, block_begin, block_end, out, scratch);
    return;
  }
  for (int64_t p = 0; p < rows; p += kPanelRows) {
    const int64_t height = rows - p < kPanelRows ? rows - p : kPanelRows;
    linear_panel<Numbers>(job, p, height, block_begin, block_end, out, scratch);
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
    finish(acc, 0, rows, b, w.n, out);
  }
}

void linear_bf16(const Weight& w, const uint16_t* x, int64_t ldx, int64_t rows, int64_t block_begin,
                 int64_t block_end, const LinearOut& out, void* scratch) {
  if (rows == 0) return;
  if (w.integer()) {
    Job job{&w, x, ldx, nullptr, nullptr};
    with_codes(w.storage, [&](auto storage) {
      using Codes = decltype(storage);
      auto* floats = static_cast<float*>(scratch);
      w.rounded ? linear_codes<Rounded<Codes>>(job, rows, block_begin, block_end, out, floats)
                : linear_codes<Plain<Codes>>(job, rows, block_begin, block_end, out, floats);
    });
    return;
  }
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
    finish(acc, 0, rows, b, w.n, out);
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
