// Linear layers on AMX tiles: integer weights times many int8 rows, and any weights times bf16 rows (further
// down); and the level's table, which is that of avx512bf16 but for these.
//
// The order of operations is that of linear_int.cc, so the bits are the same: an exact int32 dot of a group,
// then, groups ascending, y = fma(float(dot), w_scale * x_scale, y) and y = fma(w_min, x_sum, y).
//
// Schedule. A panel of rows is packed into tiles of 16 rows, as many rows as fill about half of the L2 cache.
// A unit of work is one block (16 output rows), a chunk of its groups (about 256 columns) and one tile of
// rows. Its codes are decoded into a strip of bytes, once for all tiles of rows; its dots, one product of
// tiles per step of at most 64 columns, are stored; and a unit later they are scaled and added, with the sums
// of its 16 x 16 outputs in registers. So three units are in work at a time, and the vector units need not
// wait for the tiles, nor decoding for memory, which is asked for a chunk before it is decoded.
//
// By the published rates (a product of full tiles every 16 cycles, two 512-bit operations and two loads per
// cycle, one store) a block and 16 rows take, in groups of 32 columns, 48 operations of arithmetic and 17 for
// decoding int4, 56 loads, 24 stores: at least 33 cycles, and 88 in the VNNI kernel. On a Xeon of the fifth
// generation whose other threads were idle, weights in its caches, they took 97 with 64 rows and 125 with 16,
// where a step of load, load, product and store took 29 by itself; the VNNI kernel 132 and 135. Within a
// model on the same processor, its other threads busy, weights coming from memory, 16 rows took less in the
// latter. The products of a group are one chain: in a group of 576 columns a step took 36 ns with 64 rows,
// where a load and a product by themselves took 7 to 9.
//
// Codes become signed bytes (code - offset) where those fit: no correction is needed then. Else they stay
// unsigned and -offset * sum(q) is added to the dot.
//
// Up to 24 rows go elsewhere: from 9 on to linear_amx_few.cc if groups are whole steps of 64 columns or the
// whole row, else to the VNNI kernel. In groups of 32, at 16 the layers of a model took 0.87 of the time
// there, at 32 1.1 to 1.35 of it.
#include "linear_amx.h"

#include <immintrin.h>

#include "ahead.h"
#include "codes.h"
#include "gristmill/kernel.h"
#include "kernels.h"
#include "linear_out.h"
#include "numbers.h"
#include "vec/tiles.h"
#include "vec/vec.h"

namespace gm {

const KernelTable* kernel_table_avx512bf16();

namespace GM_LEVEL {
namespace {

constexpr int64_t kMinRows = AmxFewShape::kMostRows + 1;

enum class Codes { kSigned, kUnsigned, kCorrected };

// What the float32 part needs of 16 rows and one group.
struct alignas(64) Side {
  float scale[16];
  int32_t start[16];  // -offset * sum
  float sum[16];      // scale * sum
};
static_assert(sizeof(Side) == kAmxSideBytes * 16);

// One block, a chunk of groups, one tile of rows; pointers are to the chunk's first group.
struct Unit {
  const int8_t* a;   // packed rows
  const uint8_t* b;  // strip
  const Side* side;
  const char *scales, *mins;
  int32_t* dots;       // [groups][16 rows][16 lanes]
  float* y;            // [16 rows][16 lanes]
  int64_t groups = 0;  // 0: nothing to do
  int64_t block, tile;
  bool first, last;  // of the block's chunks
};

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

// The codes of `groups` groups of a block less `shift`, as [groups][steps][step / 4][16 lanes][4]. The
// columns that fill a step are left as they are: they meet zeros in the packed rows.
template <class Codes>
void decode(const Weight& w, const AmxShape& s, int64_t block, int64_t first, int64_t groups, int shift,
            uint8_t* strip) {
  const uint8_t* piece =
      w.codes(block) + first * ((w.group + Codes::kColumns - 1) / Codes::kColumns) * Codes::kBytes;
  const __m512i less = _mm512_set1_epi8(static_cast<char>(shift));
  for (int64_t g = first; g < first + groups; ++g, strip += s.width * 16) {
    for (int64_t c = 0; c < columns_of(w, g); c += Codes::kColumns, piece += Codes::kBytes) {
      each_vector<Codes>(piece, [&](vb codes, int64_t at) {
        _mm512_store_si512(strip + (c + at) * 16, _mm512_sub_epi8(codes.v, less));
      });
    }
  }
}

// The dots of `next`, and y of `now`, whose dots are there.
template <Codes kCodes, bool kMins>
void compute(Tiles& tiles, const AmxShape& s, bool wide, const Unit& next, const Unit& now, Ahead* ahead) {
  constexpr int kRows = 16;
  vf y[kRows];
  if (now.groups > 0) {
    GM_UNROLL(16)
    for (int r = 0; r < kRows; ++r) y[r] = now.first ? vf_zero() : vf_load(now.y + r * 16);
  }
  const int64_t size = s.width * 16, groups = next.groups > now.groups ? next.groups : now.groups;
  for (int64_t g = 0; g < groups; ++g) {
    if (g < next.groups) {
      tiles.template zero<0>();
      for (int64_t at = g * size; at < (g + 1) * size; at += s.step * 16) {
        tiles.template load<4>(next.a + at, s.step);
        for (int i = 0; i < 3; ++i) ahead[i].fetch();
        tiles.template load<6>(next.b + at, 64);
        tiles.template dot<0, 4, 6, kCodes == Codes::kSigned>();
      }
      tiles.template store<0>(next.dots + g * 256, 64);
    }
    if (g < now.groups) {
      const vf scale = load_plain_scales(now.scales, g * 16, wide);
      const vf low = kMins ? load_plain_scales(now.mins, g * 16, wide) : vf_zero();
      const Side& side = now.side[g];
      GM_UNROLL(16)
      for (int r = 0; r < kRows; ++r) {
        vi exact = vi_load(now.dots + g * 256 + r * 16);
        if constexpr (kCodes == Codes::kCorrected) exact = exact + vi_set1(side.start[r]);
        y[r] = vf_fma(vi_float(exact), scale * vf_set1(side.scale[r]), y[r]);
        if constexpr (kMins) y[r] = vf_fma(low, vf_set1(side.sum[r]), y[r]);
      }
    }
  }
  if (now.groups > 0) {
    GM_UNROLL(16)
    for (int r = 0; r < kRows; ++r) vf_store(now.y + r * 16, y[r]);
  }
}

using Compute = void (*)(Tiles&, const AmxShape&, bool, const Unit&, const Unit&, Ahead*);

template <Codes kCodes>
Compute pick_mins(bool mins) {
  return mins ? compute<kCodes, true> : compute<kCodes, false>;
}

Compute pick(Codes codes, bool mins) {
  switch (codes) {
    case Codes::kSigned:
      return pick_mins<Codes::kSigned>(mins);
    case Codes::kUnsigned:
      return pick_mins<Codes::kUnsigned>(mins);
    case Codes::kCorrected:
      return pick_mins<Codes::kCorrected>(mins);
  }
  __builtin_unreachable();
}

}  // namespace

void linear_int8(const Weight& w, const Int8Rows& x, int64_t rows, int64_t block_begin, int64_t block_end,
                 const LinearOut& out, void* scratch) {
  if (rows < kMinRows) {
    if (linear_int8_few(w, x, rows, block_begin, block_end, out, scratch)) return;
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
  const int64_t panel = s.panel(rows), tile_bytes = s.columns * 16, chunk = s.chunk();
  char* at = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(scratch) + 63) / 64 * 64);
  auto take = [&at](int64_t bytes) {
    char* from = at;
    at += bytes;
    return from;
  };
  // Offsets within a page step back by a group from unit to unit, lest loads of the last unit's dots seem to
  // want what is being stored.
  const int64_t dots_bytes = (chunk * 1024 + 3 * 1024 + 4095) / 4096 * 4096;
  auto* dots = take(2 * dots_bytes);
  auto* strips = reinterpret_cast<uint8_t*>(take(2 * chunk * s.width * 16));
  auto* y = reinterpret_cast<float*>(take(panel * 64));
  auto* packed = reinterpret_cast<int8_t*>(take(panel / 16 * tile_bytes));
  auto* sides = reinterpret_cast<Side*>(at);
  const int64_t scale_bytes = w.groups * 16 * (w.wide_scales ? 4 : 2);
  const int64_t block_bytes = w.codes(1) - w.codes(0);

  TileConfig config;
  config.shape(0, 16, 64);
  config.shape(4, 16, s.step);
  config.shape(6, s.step / 4, 64);
  Tiles tiles(config);

  const int64_t chunks = (w.groups + chunk - 1) / chunk, all = (block_end - block_begin) * chunks;
  const auto decode_chunk = [&](int64_t n) {
    const int64_t first = n % chunks * chunk, left = w.groups - first;
    with_codes(w.storage, [&](auto storage) {
      decode<decltype(storage)>(w, s, block_begin + n / chunks, first, left < chunk ? left : chunk, shift,
                                strips + (n & 1) * chunk * s.width * 16);
    });
  };
  const Compute run = pick(codes, w.mins != nullptr);
  for (int64_t p = 0; p < rows; p += panel) {
    const int64_t height = rows - p < panel ? rows - p : panel;
    const int64_t count = (height + 15) / 16;
    auto valid = [height](int64_t tile) { return height - tile * 16 < 16 ? height - tile * 16 : 16; };
    for (int64_t t = 0; t < count; ++t) {
      pack(w, s, x, p + t * 16, valid(t), packed + t * tile_bytes, sides + t * w.groups);
    }
    Unit now;
    const auto step = [&](const Unit& next, Ahead* ahead) {
      run(tiles, s, w.wide_scales, next, now, ahead);
      if (now.groups > 0 && now.last) finish(now.y, p + now.tile * 16, valid(now.tile), now.block, w.n, out);
      now = next;
    };
    if (all > 0) decode_chunk(0);
    for (int64_t n = 0, unit = 0; n < all; ++n) {
      if (n + 1 < all) decode_chunk(n + 1);
      const int64_t block = block_begin + n / chunks, first = n % chunks * chunk;
      const int64_t left = w.groups - first, groups = left < chunk ? left : chunk;
      const int64_t scales_at = block * scale_bytes + first * (scale_bytes / w.groups);
      Unit next;
      next.b = strips + (n & 1) * chunk * s.width * 16;
      next.scales = static_cast<const char*>(w.scales) + scales_at;
      next.mins = w.mins == nullptr ? nullptr : static_cast<const char*>(w.mins) + scales_at;
      next.groups = groups;
      next.block = block;
      next.first = first == 0;
      next.last = first + groups == w.groups;
      // The chunk after the one that has just been decoded, and its scales.
      Ahead ahead[3];
      if (n + 2 < all) {
        const int64_t codes_at = first * block_bytes / w.groups, bytes = chunk * block_bytes / w.groups;
        const int64_t scales = chunk * (scale_bytes / w.groups), calls = groups * s.steps * count;
        ahead[0] = Ahead(w.codes(block) + codes_at + 2 * bytes, bytes, calls);
        ahead[1] = Ahead(next.scales + 2 * scales, scales, calls);
        if (w.mins != nullptr) ahead[2] = Ahead(next.mins + 2 * scales, scales, calls);
      }
      for (int64_t t = 0; t < count; ++t) {
        next.a = packed + t * tile_bytes + first * s.width * 16;
        next.side = sides + t * w.groups + first;
        next.y = y + t * 256;
        next.dots = reinterpret_cast<int32_t*>(dots + (unit & 1) * dots_bytes + (-unit & 3) * 1024);
        ++unit;
        next.tile = t;
        step(next, ahead);
      }
    }
    Ahead none[3];
    step(Unit(), none);
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

// Codes less their offset, those of at most four bits from a table: which needs neither the bits above them
// cleared nor the code converted.
template <class C>
class Numbers {
 public:
  explicit Numbers(const Weight& w)
      : offset_(vi_set1(-w.offset)), table_(vi_float(code_range(0, kMask) + offset_)) {}
  // Of a vector of codes the columns 0 to 3.
  template <int kVector, class Fn>
  __attribute__((always_inline)) void columns(const uint8_t* piece, Fn fn) const {
    if constexpr (C::kBits <= 4) {
      const vi lanes = vb_lanes(C::template loose<kVector>(piece));
      fn(of(lanes), of(vi_shr<8>(lanes)), of(vi_shr<16>(lanes)), of(vi_shr<24>(lanes)));
    } else {
      const vi lanes = vb_lanes(C::template at<kVector>(piece));
      fn(of(lanes & byte_), of(vi_shr<8>(lanes) & byte_), of(vi_shr<16>(lanes) & byte_),
         of(vi_shr<24>(lanes)));
    }
  }

 private:
  static constexpr int kMask = (1 << C::kBits) - 1;
  vf of(vi bits) const {
    if constexpr (C::kBits <= 4) return {_mm512_permutexvar_ps(bits.v, table_.v)};
    return vi_float(bits + offset_);
  }
  vi byte_ = vi_set1(255), offset_;
  vf table_;
};

template <class Codes, bool kMins>
void integers_to_bf16(const Weight& w, int64_t block, uint16_t* strip) {
  const uint8_t* piece = w.codes(block);
  const Numbers<Codes> numbers(w);
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t at = (block * w.groups + g) * 16;
    const vf scale = load_scales(w, w.scales, at);
    const vf low = kMins ? load_scales(w, w.mins, at) : vf_zero();
    const auto value = [&](vf number) {
      const vf x = scaled(w, scale, number);
      return kMins ? x + low : x;
    };
    const auto store = [&](vf a, vf b, vf c, vf d) __attribute__((always_inline)) {
      _mm512_storeu_si512(strip, bf16_pair(value(a), value(b)));
      _mm512_storeu_si512(strip + 32, bf16_pair(value(c), value(d)));
      strip += 64;
    };
    for (int64_t c = 0; c < columns_of(w, g); c += Codes::kColumns, piece += Codes::kBytes) {
      [&]<int... kVector>(std::integer_sequence<int, kVector...>) __attribute__((always_inline)) {
        (numbers.template columns<kVector>(piece, store), ...);
      }(std::make_integer_sequence<int, Codes::kColumns / 4>());
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

// What is fetched, bit by bit, while 32 x 32 outputs are computed: the weights of the next blocks, and the
// outputs' own lines, which lie a row apart and else are waited for when they are written.
struct Coming {
  Ahead weights;
  const float* out;
  int64_t ld, rows, lines, per_step;
  void fetch() {
    weights.fetch();
    const int64_t n = rows < per_step ? rows : per_step;
    for (int64_t i = 0; i < n; ++i, out += ld) {
      for (int64_t line = 0; line < lines; ++line) prefetch(out + 16 * line);
    }
    rows -= n;
  }
};

// Sixteen rows or fewer: where their first step begins, bytes between rows, numbers between steps.
struct Bf16Tile {
  const uint16_t* at;
  int64_t stride, step;
};

// y: [2 tiles][2 blocks][16 rows][16 lanes]. kAhead: fetch weights that are read once, from memory.
template <int kTiles, int kBlocks, bool kAhead>
void compute_bf16(Tiles& tiles, const Bf16Tile* a, const uint16_t* const* b, int64_t steps, Coming& coming,
                  float* y) {
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
    } else {
      coming.fetch();
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

using ComputeBf16 = void (*)(Tiles&, const Bf16Tile*, const uint16_t* const*, int64_t, Coming&, float*);

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
  const int64_t block_bytes =
      w.integer() ? w.codes(1) - w.codes(0) : w.kp * (w.storage == Storage::kF32 ? 64 : 32);

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
      const bool from_memory = count == 1 && columns[0] != strips;
      Coming coming;
      if (const int64_t next = block_end - b - 2 < 2 ? block_end - b - 2 : 2; next > 0) {
        const char* values = static_cast<const char*>(w.values) + (b + 2) * block_bytes;
        coming.weights = Ahead(values, next * block_bytes, (count + 1) / 2 * s.steps);
      }
      for (int64_t t = 0; t < count; t += 2) {
        const int used = count - t < 2 ? 1 : 2;
        coming.out = out.out + (p + t * 16) * out.ld + b * 16;
        coming.ld = out.ld;
        coming.rows = height - t * 16 < used * 16 ? height - t * 16 : used * 16;
        coming.lines = blocks;
        coming.per_step = (coming.rows + s.steps - 1) / s.steps;
        pick_bf16(used, blocks, from_memory)(tiles, tile + t, columns, s.steps, coming, y);
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
