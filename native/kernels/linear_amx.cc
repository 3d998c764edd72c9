// Linear layers on AMX tiles: integer weights times many int8 rows, and any weights times bf16 rows (further
// down); and the level's table, which is that of avx512bf16 but for these.
//
// The order of operations is that of linear_int.cc, so the bits are the same: an exact int32 dot of a group,
// then, groups ascending, y = fma(float(dot), w_scale * x_scale, y) and y = fma(w_min, x_sum, y).
//
// Schedule. A panel of rows is packed into tiles of 16 rows, as many rows as fill about half of the L2 cache.
// For every pair of blocks (32 output rows) the codes are decoded once into a strip of bytes, and 32 x 32
// outputs at a time are computed over all groups: four accumulators c(i,j) in tiles 0-3, two tiles of rows in
// 4-5 and two of codes in 6-7. A step is at most 64 columns, so that a tile load feeds two products:
//
//     load a0, b0; c00 += a0 b0; load b1; c01 += a0 b1; load a1; c10 += a1 b0; c11 += a1 b1
//
// After each group the four accumulators are stored, and the products of the next group are issued before the
// float32 part of this one, so that the tile unit and the vector units work at the same time.
//
// Expected, per core, by counting against the published rates (a product of full tiles every 16 cycles, two
// 64-byte loads and two 512-bit operations per cycle): four products of 64 columns are 65,536 multiply-adds
// in 64 cycles, 1024 per cycle. The float32 part of one group of 32 x 32 outputs is 64 times (convert,
// multiply, fma; load dot, scale and sum; store sum): 96 cycles of arithmetic, 96 of loads. With the tile
// loads on the same ports a group takes about 120 cycles (groups of 32: 32,768 multiply-adds, 270 per cycle)
// to 130 (groups of 64: 500 per cycle), against 93 and 108 of the VNNI kernel: groups that small are bound by
// scales, not by tiles. Whole-row groups come near 1024. These are counts, not measurements.
//
// Codes become signed bytes (code - offset) where those fit: no correction is needed then. Else they stay
// unsigned and -offset * sum(q) is added to the dot.
//
// Fewer than 16 rows leave tiles partly empty, and go to the VNNI kernel.
#include "linear_amx.h"

#include <immintrin.h>

#include "codes.h"
#include "gristmill/kernel.h"
#include "kernels.h"
#include "linear_out.h"
#include "vec/tiles.h"
#include "vec/vec.h"

namespace gm {

const KernelTable* kernel_table_avx512bf16();

namespace GM_LEVEL {
namespace {

constexpr int64_t kMinRows = 16;

enum class Codes { kSigned, kUnsigned, kCorrected };

// What the float32 part needs of 16 rows and one group.
struct alignas(64) Side {
  float scale[16];
  int32_t start[16];  // -offset * sum
  float sum[16];      // scale * sum
};
static_assert(sizeof(Side) == kAmxSideBytes * 16);

// 32 x 32 outputs or fewer.
struct Job {
  const int8_t* a[2];     // packed rows
  const Side* side[2];    // [groups]
  const uint8_t* b[2];    // strips
  const char* scales[2];  // of the block
  const char* mins[2];
  int64_t rows[2];
  int64_t groups, steps, step;
  bool wide;
};

inline vf load_scale(const char* p, int64_t group, bool wide) {
  return wide ? vf_load(reinterpret_cast<const float*>(p) + group * 16)
              : vf_load_f16(reinterpret_cast<const uint16_t*>(p) + group * 16);
}

// Sixteen rows (or fewer: the others are zero) as [groups][steps][16][step].
void pack(const Weight& w, const AmxShape& s, const Int8Rows& x, int64_t first, int64_t rows, int8_t* to,
          Side* side) {
  const __mmask64 whole = first_bytes(s.step);
  for (int64_t r = 0; r < 16; ++r) {
    int8_t* out = to + r * s.step;
    for (int64_t g = 0; g < w.groups; ++g) {
      const int8_t* from = x.q + (first + r) * x.kp + g * w.group;
      const int64_t columns = r < rows ? columns_of(w, g) : 0;
      for (int64_t i = 0; i < s.steps; ++i, out += 16 * s.step) {
        const __mmask64 there = first_bytes(columns - i * s.step) & whole;
        _mm512_mask_storeu_epi8(
            out, whole, there ? _mm512_maskz_loadu_epi8(there, from + i * s.step) : _mm512_setzero_si512());
      }
      const int64_t at = (first + r) * w.groups + g;
      const int32_t sum = r < rows ? x.sum[at] : 0;
      const float scale = r < rows ? x.scale[at] : 0.0f;
      side[g].scale[r] = scale;
      side[g].start[r] = -w.offset * sum;
      side[g].sum[r] = scale * static_cast<float>(sum);
    }
  }
}

// The codes of a block less `shift`, as [groups][steps][step / 4][16 lanes][4]. The columns that fill a step
// are left as they are: they meet zeros in the packed rows.
template <class Codes>
void decode(const Weight& w, const AmxShape& s, int64_t block, int shift, uint8_t* strip) {
  const uint8_t* piece = w.codes(block);
  const __m512i less = _mm512_set1_epi8(static_cast<char>(shift));
  for (int64_t g = 0; g < w.groups; ++g, strip += s.width * 16) {
    for (int64_t c = 0; c < columns_of(w, g); c += Codes::kColumns, piece += Codes::kBytes) {
      each_vector<Codes>(piece, [&](vb codes, int64_t at) {
        _mm512_store_si512(strip + (c + at) * 16, _mm512_sub_epi8(codes.v, less));
      });
    }
  }
}

// The products of one group, into tiles 0 to 3.
template <int kTiles, int kBlocks, bool kSigned>
inline void products(Tiles& tiles, const Job& job, int64_t group) {
  tiles.template zero<0>();
  if constexpr (kBlocks == 2) tiles.template zero<1>();
  if constexpr (kTiles == 2) tiles.template zero<2>();
  if constexpr (kTiles == 2 && kBlocks == 2) tiles.template zero<3>();
  for (int64_t i = group * job.steps; i < (group + 1) * job.steps; ++i) {
    const int64_t at = i * job.step * 16;
    tiles.template load<4>(job.a[0] + at, job.step);
    tiles.template load<6>(job.b[0] + at, 64);
    tiles.template dot<0, 4, 6, kSigned>();
    if constexpr (kBlocks == 2) {
      tiles.template load<7>(job.b[1] + at, 64);
      tiles.template dot<1, 4, 7, kSigned>();
    }
    if constexpr (kTiles == 2) {
      tiles.template load<5>(job.a[1] + at, job.step);
      tiles.template dot<2, 5, 6, kSigned>();
    }
    if constexpr (kTiles == 2 && kBlocks == 2) tiles.template dot<3, 5, 7, kSigned>();
  }
}

// y: [2 tiles][2 blocks][16 rows][16 lanes].
template <int kTiles, int kBlocks, Codes kCodes, bool kMins>
void compute(Tiles& tiles, const Job& job, float* y) {
  constexpr bool kSigned = kCodes == Codes::kSigned;
  alignas(64) int32_t dots[4 * 256];
  memset(y, 0, 4 * 256 * sizeof(float));
  products<kTiles, kBlocks, kSigned>(tiles, job, 0);
  for (int64_t g = 0; g < job.groups; ++g) {
    tiles.template store<0>(dots, 64);
    if constexpr (kBlocks == 2) tiles.template store<1>(dots + 256, 64);
    if constexpr (kTiles == 2) tiles.template store<2>(dots + 512, 64);
    if constexpr (kTiles == 2 && kBlocks == 2) tiles.template store<3>(dots + 768, 64);
    if (g + 1 < job.groups) products<kTiles, kBlocks, kSigned>(tiles, job, g + 1);
    for (int j = 0; j < kBlocks; ++j) {
      const vf scale = load_scale(job.scales[j], g, job.wide);
      const vf low = kMins ? load_scale(job.mins[j], g, job.wide) : vf_zero();
      for (int i = 0; i < kTiles; ++i) {
        const Side& side = job.side[i][g];
        const int32_t* dot = dots + (2 * i + j) * 256;
        float* sum = y + (2 * i + j) * 256;
        for (int64_t r = 0; r < job.rows[i]; ++r) {
          vi exact = vi_load(dot + r * 16);
          if constexpr (kCodes == Codes::kCorrected) exact = exact + vi_set1(side.start[r]);
          vf value = vf_fma(vi_float(exact), scale * vf_set1(side.scale[r]), vf_load(sum + r * 16));
          if constexpr (kMins) value = vf_fma(low, vf_set1(side.sum[r]), value);
          vf_store(sum + r * 16, value);
        }
      }
    }
  }
}

using Compute = void (*)(Tiles&, const Job&, float*);

template <Codes kCodes, bool kMins>
Compute pick_shape(int tiles, int blocks) {
  if (tiles == 2) return blocks == 2 ? compute<2, 2, kCodes, kMins> : compute<2, 1, kCodes, kMins>;
  return blocks == 2 ? compute<1, 2, kCodes, kMins> : compute<1, 1, kCodes, kMins>;
}

template <Codes kCodes>
Compute pick_mins(bool mins, int tiles, int blocks) {
  return mins ? pick_shape<kCodes, true>(tiles, blocks) : pick_shape<kCodes, false>(tiles, blocks);
}

Compute pick(Codes codes, bool mins, int tiles, int blocks) {
  switch (codes) {
    case Codes::kSigned:
      return pick_mins<Codes::kSigned>(mins, tiles, blocks);
    case Codes::kUnsigned:
      return pick_mins<Codes::kUnsigned>(mins, tiles, blocks);
    case Codes::kCorrected:
      return pick_mins<Codes::kCorrected>(mins, tiles, blocks);
  }
  __builtin_unreachable();
}

}  // namespace

void linear_int8(const Weight& w, const Int8Rows& x, int64_t rows, int64_t block_begin, int64_t block_end,
                 const LinearOut& out, void* scratch) {
  if (rows < kMinRows) {
    kernel_table_avx512bf16()->linear_int8(w, x, rows, block_begin, block_end, out, scratch);
    return;
  }
  Codes codes = w.offset == 0 ? Codes::kUnsigned : Codes::kCorrected;
  int shift = 0;
  if (w.storage == Storage::kInt8 ? w.offset == 128 : w.offset <= 128) {
    codes = Codes::kSigned;
    shift = w.offset;
  }
  const AmxShape s(w);
  const int64_t panel = s.panel(rows);
  const int64_t tile_bytes = s.columns * 16;  // 16 packed rows, or the strip of a block
  char* base = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(scratch) + 63) / 64 * 64);
  uint8_t* strips = reinterpret_cast<uint8_t*>(base);
  int8_t* packed = reinterpret_cast<int8_t*>(base + 2 * tile_bytes);
  Side* sides = reinterpret_cast<Side*>(base + (2 + panel / 16) * tile_bytes);
  alignas(64) float y[4 * 256];
  const int64_t scale_bytes = w.groups * 16 * (w.wide_scales ? 4 : 2);

  TileConfig config;
  for (int t = 0; t < 4; ++t) config.shape(t, 16, 64);
  for (int t = 4; t < 6; ++t) config.shape(t, 16, s.step);
  for (int t = 6; t < 8; ++t) config.shape(t, s.step / 4, 64);
  Tiles tiles(config);

  Job job;
  job.groups = w.groups;
  job.steps = s.steps;
  job.step = s.step;
  job.wide = w.wide_scales;
  for (int64_t p = 0; p < rows; p += panel) {
    const int64_t height = rows - p < panel ? rows - p : panel;
    const int64_t count = (height + 15) / 16;
    auto valid = [height](int64_t tile) { return height - tile * 16 < 16 ? height - tile * 16 : 16; };
    for (int64_t t = 0; t < count; ++t) {
      pack(w, s, x, p + t * 16, valid(t), packed + t * tile_bytes, sides + t * w.groups);
    }
    for (int64_t b = block_begin; b < block_end; b += 2) {
      const int blocks = block_end - b < 2 ? 1 : 2;
      for (int j = 0; j < blocks; ++j) {
        job.b[j] = strips + j * tile_bytes;
        job.scales[j] = static_cast<const char*>(w.scales) + (b + j) * scale_bytes;
        job.mins[j] = w.mins == nullptr ? nullptr : static_cast<const char*>(w.mins) + (b + j) * scale_bytes;
        with_codes(w.storage, [&](auto storage) {
          decode<decltype(storage)>(w, s, b + j, shift, strips + j * tile_bytes);
        });
      }
      for (int64_t t = 0; t < count; t += 2) {
        const int high = count - t < 2 ? 1 : 2;
        for (int i = 0; i < high; ++i) {
          job.a[i] = packed + (t + i) * tile_bytes;
          job.side[i] = sides + (t + i) * w.groups;
          job.rows[i] = valid(t + i);
        }
        pick(codes, w.mins != nullptr, high, blocks)(tiles, job, y);
        for (int i = 0; i < high; ++i) {
          for (int j = 0; j < blocks; ++j) {
            finish(y + (2 * i + j) * 256, p + (t + i) * 16, job.rows[i], b + j, w.n, out);
          }
        }
      }
    }
  }
}

namespace {

// ---- bf16 -------------------------------------------------------------------------------------------------
//
// Weights of any storage times bf16 rows, but for integers of large groups (linear_amx_codes.cc). The order
// of sums is that of TDPBF16PS at every number of rows: 32 columns at a time, a chain of fused steps over the
// even columns from zero, one over the odd ones, the two added, and their sum to the output; steps ascending.
// Columns past the last are zero. So the bits are not those of the other levels, whose single chain the tiles
// cannot follow.
//
// Two blocks are decoded to a strip of [step][16 pairs][16 outputs][2], which is a block's own order: bf16
// weights are loaded where they lie. 32 x 32 outputs stay in tiles 0-3 over all columns.

// Rounds to nearest even; denormals become zero, as which the tiles read them anyway.
inline __m512i bf16_pair(vf even, vf odd) {
  // Lanes 0 to 15 are the even columns, 16 to 31 the odd ones.
  const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd.v, even.v));
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                         22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, both);
}

template <class Codes, bool kMins>
void integers_to_bf16(const Weight& w, int64_t block, uint16_t* strip) {
  const uint8_t* piece = w.codes(block);
  const vi mask = vi_set1(255), offset = vi_set1(-w.offset);
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t at = (block * w.groups + g) * 16;
    const vf scale = load_scales(w, w.scales, at);
    const vf low = kMins ? load_scales(w, w.mins, at) : vf_zero();
    const auto value = [&](vi bits) {
      const vf x = scaled(w, scale, (bits & mask) + offset);
      return kMins ? x + low : x;
    };
    for (int64_t c = 0; c < columns_of(w, g); c += Codes::kColumns, piece += Codes::kBytes) {
      each_vector<Codes>(piece, [&](vb codes, int64_t) {
        const vi lanes = vb_lanes(codes);
        _mm512_storeu_si512(strip, bf16_pair(value(lanes), value(vi_shr<8>(lanes))));
        _mm512_storeu_si512(strip + 32, bf16_pair(value(vi_shr<16>(lanes)), value(vi_shr<24>(lanes))));
        strip += 64;
      });
    }
  }
}

// A block's columns as bf16, and zeros up to whole steps; or where they lie, if that is what they are.
const uint16_t* to_bf16(const Weight& w, int64_t steps, int64_t block, uint16_t* strip) {
  const int64_t kp = w.kp;
  const uint16_t* halves = static_cast<const uint16_t*>(w.values) + block * kp * 16;
  if (w.storage == Storage::kBf16 && kp % 32 == 0) return halves;
  memset(strip + kp * 16, 0, static_cast<size_t>(steps * 32 - kp) * 32);
  switch (w.storage) {
    case Storage::kBf16:
      memcpy(strip, halves, static_cast<size_t>(kp) * 32);
      break;
    case Storage::kF16:
      for (int64_t c = 0; c < kp; c += 2) {
        const vh pair = vh_load(halves + c * 16);
        _mm512_storeu_si512(strip + c * 16, bf16_pair(vh_even_f16(pair), vh_odd_f16(pair)));
      }
      break;
    case Storage::kF32: {
      const float* from = static_cast<const float*>(w.values) + block * kp * 16;
      for (int64_t c = 0; c < kp; c += 2) {
        const vf odd = c + 1 < kp ? vf_load(from + (c + 1) * 16) : vf_zero();
        _mm512_storeu_si512(strip + c * 16, bf16_pair(vf_load(from + c * 16), odd));
      }
      break;
    }
    default:
      with_codes(w.storage, [&](auto storage) {
        using Codes = decltype(storage);
        w.mins ? integers_to_bf16<Codes, true>(w, block, strip)
               : integers_to_bf16<Codes, false>(w, block, strip);
      });
  }
  return strip;
}

// Sixteen rows or fewer: where their first step begins, bytes between rows, numbers between steps.
struct Bf16Tile {
  const uint16_t* at;
  int64_t stride, step;
};

// y: [2 tiles][2 blocks][16 rows][16 lanes]. kAhead: fetch weights that are read once, from memory.
template <int kTiles, int kBlocks, bool kAhead>
void compute_bf16(Tiles& tiles, const Bf16Tile* a, const uint16_t* const* b, int64_t steps, float* y) {
  tiles.template zero<0>();
  if constexpr (kBlocks == 2) tiles.template zero<1>();
  if constexpr (kTiles == 2) tiles.template zero<2>();
  if constexpr (kTiles == 2 && kBlocks == 2) tiles.template zero<3>();
  for (int64_t i = 0; i < steps; ++i) {
    const int64_t at = i * 512;
    if constexpr (kAhead) {
      for (int64_t line = 0; line < 512; line += 32) {
        for (int j = 0; j < kBlocks; ++j) prefetch(b[j] + at + line + 2048);
      }
    }
    tiles.template load<4>(a[0].at + i * a[0].step, a[0].stride);
    tiles.template load<6>(b[0] + at, 64);
    tiles.template dot_bf16<0, 4, 6>();
    if constexpr (kBlocks == 2) {
      tiles.template load<7>(b[1] + at, 64);
      tiles.template dot_bf16<1, 4, 7>();
    }
    if constexpr (kTiles == 2) {
      tiles.template load<5>(a[1].at + i * a[1].step, a[1].stride);
      tiles.template dot_bf16<2, 5, 6>();
    }
    if constexpr (kTiles == 2 && kBlocks == 2) tiles.template dot_bf16<3, 5, 7>();
  }
  tiles.template store<0>(y, 64);
  if constexpr (kBlocks == 2) tiles.template store<1>(y + 256, 64);
  if constexpr (kTiles == 2) tiles.template store<2>(y + 512, 64);
  if constexpr (kTiles == 2 && kBlocks == 2) tiles.template store<3>(y + 768, 64);
}

using ComputeBf16 = void (*)(Tiles&, const Bf16Tile*, const uint16_t* const*, int64_t, float*);

ComputeBf16 pick_bf16(int tiles, int blocks, bool ahead) {
  if (ahead) return blocks == 2 ? compute_bf16<1, 2, true> : compute_bf16<1, 1, true>;
  if (tiles == 2) return blocks == 2 ? compute_bf16<2, 2, false> : compute_bf16<2, 1, false>;
  return blocks == 2 ? compute_bf16<1, 2, false> : compute_bf16<1, 1, false>;
}

// `high` rows of which `rows` are there, as [step][high][32]. x ends at an even column at least, the weights'
// padding meets zeros there.
void pack_bf16(const Weight& w, const uint16_t* x, int64_t ldx, int64_t rows, int64_t high, int64_t steps,
               uint16_t* to) {
  for (int64_t r = 0; r < high; ++r) {
    for (int64_t i = 0; i < steps; ++i) {
      const __mmask64 there = r < rows ? first_bytes((w.k + 1) / 2 * 4 - i * 64) : 0;
      _mm512_storeu_si512(to + (i * high + r) * 32, there
                                                        ? _mm512_maskz_loadu_epi8(there, x + r * ldx + i * 32)
                                                        : _mm512_setzero_si512());
    }
  }
}

}  // namespace

void linear_bf16(const Weight& w, const uint16_t* x, int64_t ldx, int64_t rows, int64_t block_begin,
                 int64_t block_end, const LinearOut& out, void* scratch) {
  if (rows == 0) return;
  if (has_large_groups(w)) {
    linear_bf16_codes(w, x, ldx, rows, block_begin, block_end, out, scratch);
    return;
  }
  const AmxBf16Shape s(w);
  const int64_t panel = s.panel(rows), tile_size = s.steps * 512;  // values of 16 rows, or of a block
  auto* strips = reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(scratch) + 63) / 64 * 64);
  uint16_t* packed = strips + 2 * tile_size;
  alignas(64) float y[4 * 256];

  // Fewer rows than a tile has make smaller tiles; of many, the last are filled with zeros.
  const int64_t high = rows < 16 ? rows : 16;
  TileConfig config;
  for (int t = 0; t < 6; ++t) config.shape(t, high, 64);
  for (int t = 6; t < 8; ++t) config.shape(t, 16, 64);
  Tiles tiles(config);

  for (int64_t p = 0; p < rows; p += panel) {
    const int64_t height = rows - p < panel ? rows - p : panel;
    const int64_t count = (height + 15) / 16;
    // Tiles are loaded from the rows themselves where those are whole.
    Bf16Tile tile[AmxBf16Shape::kMostTiles];
    for (int64_t t = 0; t < count; ++t) {
      const int64_t first = t * 16, there = height - first < high ? height - first : high;
      const uint16_t* from = x + (p + first) * ldx;
      if (w.k % 32 == 0 && w.kp == w.k && there == high) {
        tile[t] = {from, ldx * 2, 32};
        continue;
      }
      uint16_t* to = packed + t * tile_size;
      pack_bf16(w, from, ldx, there, high, s.steps, to);
      tile[t] = {to, 64, high * 32};
    }
    for (int64_t b = block_begin; b < block_end; b += 2) {
      const int blocks = block_end - b < 2 ? 1 : 2;
      const uint16_t* columns[2] = {};
      for (int j = 0; j < blocks; ++j) columns[j] = to_bf16(w, s.steps, b + j, strips + j * tile_size);
      const bool ahead = count == 1 && columns[0] != strips;
      for (int64_t t = 0; t < count; t += 2) {
        const int used = count - t < 2 ? 1 : 2;
        pick_bf16(used, blocks, ahead)(tiles, tile + t, columns, s.steps, y);
        for (int i = 0; i < used; ++i) {
          const int64_t first = (t + i) * 16, left = height - first < 16 ? height - first : 16;
          for (int j = 0; j < blocks; ++j) finish(y + (2 * i + j) * 256, p + first, left, b + j, w.n, out);
        }
      }
    }
  }
}

}  // namespace GM_LEVEL

#define GM_CONCAT2(a, b) a##b
#define GM_CONCAT(a, b) GM_CONCAT2(a, b)
#define GM_STRING2(a) #a
#define GM_STRING(a) GM_STRING2(a)

const KernelTable* GM_CONCAT(kernel_table_, GM_LEVEL)() {
  static const KernelTable table = [] {
    KernelTable t = *kernel_table_avx512bf16();
    t.level = GM_STRING(GM_LEVEL);
    t.prompts_in_bf16 = true;
    t.linear_int8 = GM_LEVEL::linear_int8;
    t.linear_bf16 = GM_LEVEL::linear_bf16;
    t.attention_long = GM_LEVEL::attention_long;
    t.attention_prepare = GM_LEVEL::attention_prepare;
    t.attention_items = GM_LEVEL::attention_items;
    t.attention_costs = GM_LEVEL::attention_costs;
    t.attention_partial_floats = GM_LEVEL::attention_partial_floats;
    t.attention_spans = GM_LEVEL::attention_spans;
    t.attention_commit = GM_LEVEL::attention_commit;
    t.attention_merge = GM_LEVEL::attention_merge;
    t.attention_scratch_bytes = GM_LEVEL::attention_scratch_bytes;
    return t;
  }();
  return &table;
}

}  // namespace gm
