// Integer weights of large groups times bf16 rows, on AMX tiles: 64 columns at least, in steps of 32.
//
// Codes are multiplied as the bf16 numbers that they are (numbers.h), scales come after the group. Within a
// group, of every 32 columns a chain of fused steps over the first of the pairs from zero, one over the
// second ones, the two added, and their sum to the group's (what TDPBF16PS does, with columns 0 2 1 3 of
// every four in this order); then, groups ascending, y = fma(scale, dot, y) and y = fma(min, sum of the
// group's x, y). Smaller groups would leave the tiles waiting for scales: linear_amx.cc rounds those weights
// to bf16.
//
// Schedule. Four blocks (64 output rows) of at most eight steps of a group are decoded into a strip that
// stays in the L1 cache; every 16 rows of activations meet it, with sums of the group in tiles 0 to 3, rows
// in 4 and numbers in 5 to 7. With 2 to 16 rows no strip is used twice: there a step of 32 columns is
// decoded while the one before is multiplied.
//
// Expected, per core: 64 bytes of 4-bit codes (128 weights) take 3 shifts and 4 look-ups on one port each and
// 4 stores, 4 to 5 cycles; four blocks of 128 columns 300, and as long as the tiles' 16 products of 16 rows
// (16 cycles each). A core that reads 20 GB/s at 2.5 GHz takes 510 for these 4 KB, so that memory is the
// limit up to 16 rows. The float32 part of 16 rows is 64 times (load, fma, store), 64 cycles. Measured, Xeon
// with AMX: decoding and multiplying alone 20 GB/s of codes in the cache with a core to itself; 6 to 10 while
// the other processor of the core uses the tile unit, too, as a tile load and its product then take 28 ns
// where they took 6.
#include <immintrin.h>

#include "kernels.h"
#include "linear_amx.h"
#include "linear_out.h"
#include "numbers.h"
#include "vec/tiles.h"

namespace gm::GM_LEVEL {
namespace {

constexpr int64_t kBlocks = 4, kStep = 32, kChunk = AmxCodesShape::kChunk;
constexpr int64_t kAhead = 2048;  // bytes of codes that are fetched ahead

// Sixteen rows or fewer of one call.
struct Rows {
  const uint16_t* packed;  // [step][rows][32]
  float* y;                // [block][16 rows][16 lanes]
  float* dot;              // the same, of a group that is not complete
  const float* sums;       // [rows][groups], of x; null without minimums
  int64_t rows;
};

// `high` rows of which `rows` are there, in steps: of every four columns 0 2 1 3.
void pack(const Weight& w, const uint16_t* x, int64_t ldx, int64_t rows, int64_t high, int64_t steps,
          uint16_t* to) {
  for (int64_t r = 0; r < high; ++r) {
    for (int64_t i = 0; i < steps; ++i) {
      const __mmask64 there = r < rows ? first_bytes(w.kp * 2 - i * 64) : 0;
      const __m512i as_is =
          there ? _mm512_maskz_loadu_epi8(there, x + r * ldx + i * kStep) : _mm512_setzero_si512();
      const __m512i low = _mm512_shufflelo_epi16(as_is, 0xd8);
      _mm512_store_si512(to + (i * high + r) * kStep, _mm512_shufflehi_epi16(low, 0xd8));
    }
  }
}

template <int kWide>
void zero(Tiles& tiles) {
  tiles.template zero<0>();
  if constexpr (kWide > 1) tiles.template zero<1>();
  if constexpr (kWide > 2) tiles.template zero<2>();
  if constexpr (kWide > 3) tiles.template zero<3>();
}
template <int kWide>
void store(Tiles& tiles, float* dot) {
  tiles.template store<0>(dot, 64);
  if constexpr (kWide > 1) tiles.template store<1>(dot + 256, 64);
  if constexpr (kWide > 2) tiles.template store<2>(dot + 512, 64);
  if constexpr (kWide > 3) tiles.template store<3>(dot + 768, 64);
}

// dot of kWide blocks: their strips [steps][16 pairs][16 rows][2], kChunk columns apart.
template <int kWide>
void products(Tiles& tiles, const uint16_t* x, int64_t high, const uint16_t* strips, int64_t steps,
              bool first, float* dot) {
  if (first) {
    zero<kWide>(tiles);
  } else {
    tiles.template load<0>(dot, 64);
    if constexpr (kWide > 1) tiles.template load<1>(dot + 256, 64);
    if constexpr (kWide > 2) tiles.template load<2>(dot + 512, 64);
    if constexpr (kWide > 3) tiles.template load<3>(dot + 768, 64);
  }
  constexpr int64_t kStrip = kChunk * 16;
  for (int64_t i = 0; i < steps; ++i) {
    const uint16_t* w = strips + i * kStep * 16;
    tiles.template load<4>(x + i * high * kStep, 64);
    tiles.template load<5>(w, 64);
    tiles.template dot_bf16<0, 4, 5>();
    if constexpr (kWide > 1) {
      tiles.template load<6>(w + kStrip, 64);
      tiles.template dot_bf16<1, 4, 6>();
    }
    if constexpr (kWide > 2) {
      tiles.template load<7>(w + 2 * kStrip, 64);
      tiles.template dot_bf16<2, 4, 7>();
    }
    if constexpr (kWide > 3) {
      tiles.template load<5>(w + 3 * kStrip, 64);
      tiles.template dot_bf16<3, 4, 5>();
    }
  }
  store<kWide>(tiles, dot);
}

using ProductsOf = void (*)(Tiles&, const uint16_t*, int64_t, const uint16_t*, int64_t, bool, float*);
constexpr ProductsOf kProducts[] = {products<1>, products<2>, products<3>, products<4>};

// Columns [at, at + n) of a block, at most a step, and zeros up to a whole one.
template <class Numbers>
__attribute__((always_inline)) inline void decode_step(const Weight& w, const uint16_t* table, int64_t block,
                                                       int64_t at, int64_t n, uint16_t* to) {
  using Codes = typename Numbers::Codes;
  const uint8_t* ahead = w.codes(block) + at / Codes::kColumns * Codes::kBytes + kAhead;
  for (int64_t i = 0; i < kStep / Codes::kColumns * Codes::kBytes; i += 64) prefetch(ahead + i);
  if (n == kStep) {
    decode_numbers<Numbers>(w, table, block, at, kStep, to);
  } else {
    decode_numbers<Numbers>(w, table, block, at, n, to);
    memset(to + n * 16, 0, static_cast<size_t>(kStep - n) * 32);
  }
}

// y += the scaled sums of a group.
template <int kWide>
void add_group(const Weight& w, const Rows& x, int64_t block, int64_t group) {
  for (int64_t b = 0; b < kWide; ++b) {
    const int64_t at = ((block + b) * w.groups + group) * 16;
    const vf scale = group_scale(w, at), low = group_min(w, at);
    float *y = x.y + b * 256, *dot = x.dot + b * 256;
    if (x.sums == nullptr) {
      for (int64_t r = 0; r < x.rows; ++r) {
        vf_store(y + r * 16, vf_fma(scale, vf_load(dot + r * 16), vf_load(y + r * 16)));
      }
      continue;
    }
    for (int64_t r = 0; r < x.rows; ++r) {
      const vf sum = vf_fma(scale, vf_load(dot + r * 16), vf_load(y + r * 16));
      vf_store(y + r * 16, vf_fma(low, vf_set1(x.sums[r * w.groups + group]), sum));
    }
  }
}

// One tile of rows: a step is decoded while the one before is multiplied, and a group's sums are scaled while
// the next one has begun. The two strips are a page and a half apart, lest a load seem to want what was just
// stored in the other.
template <class Numbers, int kWide>
void run_few(Tiles& tiles, const Weight& w, const uint16_t* table, const Rows& x, int64_t high, int64_t block,
             uint16_t* strips) {
  constexpr int64_t kOne = kStep * 16, kOther = kBlocks * kOne + 1024;
  const uint16_t* packed = x.packed;
  const int64_t steps = (w.kp + kStep - 1) / kStep;
  const auto width = [&](int64_t i) { return w.kp - i * kStep < kStep ? w.kp - i * kStep : kStep; };
  for (int64_t b = 0; b < kWide; ++b) {
    decode_step<Numbers>(w, table, block + b, 0, width(0), strips + b * kOne);
  }
  const int64_t group_steps = w.groups == 1 ? steps : w.group / kStep;
  int64_t done = -1;  // the group whose sums wait for their scales
  for (int64_t i = 0, g = 0, left = group_steps; i < steps; ++i) {
    if (left == group_steps) zero<kWide>(tiles);
    const uint16_t* from = strips + (i & 1) * kOther;
    uint16_t* to = strips + (~i & 1) * kOther;
    const int64_t at = (i + 1) * kStep, n = i + 1 < steps ? width(i + 1) : 0;
    tiles.template load<4>(packed + i * high * kStep, 64);
    tiles.template load<5>(from, 64);
    tiles.template dot_bf16<0, 4, 5>();
    if (n > 0) decode_step<Numbers>(w, table, block, at, n, to);
    if constexpr (kWide > 1) {
      tiles.template load<6>(from + kOne, 64);
      tiles.template dot_bf16<1, 4, 6>();
      if (n > 0) decode_step<Numbers>(w, table, block + 1, at, n, to + kOne);
    }
    if constexpr (kWide > 2) {
      tiles.template load<7>(from + 2 * kOne, 64);
      tiles.template dot_bf16<2, 4, 7>();
      if (n > 0) decode_step<Numbers>(w, table, block + 2, at, n, to + 2 * kOne);
    }
    if constexpr (kWide > 3) {
      tiles.template load<5>(from + 3 * kOne, 64);
      tiles.template dot_bf16<3, 4, 5>();
      if (n > 0) decode_step<Numbers>(w, table, block + 3, at, n, to + 3 * kOne);
    }
    if (done >= 0) add_group<kWide>(w, x, block, done);
    done = -1;
    if (--left > 0 && i + 1 < steps) continue;
    store<kWide>(tiles, x.dot);
    done = g++;
    left = group_steps;
  }
  if (done >= 0) add_group<kWide>(w, x, block, done);
}

using AddGroup = void (*)(const Weight&, const Rows&, int64_t, int64_t);
constexpr AddGroup kAddGroup[] = {add_group<1>, add_group<2>, add_group<3>, add_group<4>};

template <class Numbers>
void run_blocks(Tiles& tiles, const Weight& w, const uint16_t* table, const Rows* tile, int64_t tiles_of_rows,
                int64_t high, int64_t block, int64_t blocks, uint16_t* strips) {
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t columns = columns_of(w, g);
    for (int64_t begin = 0; begin < columns; begin += kChunk) {
      const int64_t n = columns - begin < kChunk ? columns - begin : kChunk;
      const int64_t steps = (n + kStep - 1) / kStep, at = g * w.group + begin;
      for (int64_t b = 0; b < blocks; ++b) {
        uint16_t* strip = strips + b * kChunk * 16;
        decode_numbers<Numbers>(w, table, block + b, at, n, strip);
        if (n < steps * kStep) memset(strip + n * 16, 0, static_cast<size_t>(steps * kStep - n) * 32);
      }
      for (int64_t t = 0; t < tiles_of_rows; ++t) {
        kProducts[blocks - 1](tiles, tile[t].packed + at / kStep * high * kStep, high, strips, steps,
                              begin == 0, tile[t].dot);
        if (begin + n < columns) continue;
        kAddGroup[blocks - 1](w, tile[t], block, g);
      }
    }
  }
}

using Few = void (*)(Tiles&, const Weight&, const uint16_t*, const Rows&, int64_t, int64_t, uint16_t*);

template <class Numbers>
void run(const Weight& w, const uint16_t* x, int64_t ldx, int64_t rows, int64_t block_begin,
         int64_t block_end, const LinearOut& out, void* scratch) {
  uint16_t table[kNumbers];
  Numbers::fill(w, table);
  const AmxCodesShape s(w);
  const int64_t panel = s.panel(rows), high = rows < 16 ? rows : 16;
  char* at = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(scratch) + 63) / 64 * 64);
  auto take = [&at](int64_t bytes) {
    char* from = at;
    at += bytes;
    return from;
  };
  auto* strips = reinterpret_cast<uint16_t*>(take(kBlocks * kChunk * 32));
  auto* packed = reinterpret_cast<uint16_t*>(take(panel * s.steps * 64));
  auto* y = reinterpret_cast<float*>(take(panel * kBlocks * 64));
  auto* dot = reinterpret_cast<float*>(take(panel * kBlocks * 64));
  auto* sums = reinterpret_cast<float*>(at);
  if (w.mins != nullptr) sum_groups(w, x, ldx, rows, sums);

  TileConfig config;
  for (int t = 0; t < 5; ++t) config.shape(t, high, 64);
  for (int t = 5; t < 8; ++t) config.shape(t, 16, 64);
  Tiles tiles(config);

  Rows tile[AmxCodesShape::kMostRows / 16];
  for (int64_t p = 0; p < rows; p += panel) {
    const int64_t height = rows - p < panel ? rows - p : panel, count = (height + 15) / 16;
    for (int64_t t = 0; t < count; ++t) {
      Rows& of = tile[t];
      of.rows = height - t * 16 < 16 ? height - t * 16 : 16;
      pack(w, x + (p + t * 16) * ldx, ldx, of.rows, high, s.steps, packed + t * 16 * s.steps * kStep);
      of.packed = packed + t * 16 * s.steps * kStep;
      of.y = y + t * kBlocks * 256;
      of.dot = dot + t * kBlocks * 256;
      of.sums = w.mins == nullptr ? nullptr : sums + (p + t * 16) * w.groups;
    }
    for (int64_t b = block_begin; b < block_end; b += kBlocks) {
      const int64_t blocks = block_end - b < kBlocks ? block_end - b : kBlocks;
      memset(y, 0, static_cast<size_t>(count * kBlocks) * 1024);
      if (count == 1) {
        constexpr Few kFew[] = {run_few<Numbers, 1>, run_few<Numbers, 2>, run_few<Numbers, 3>,
                                run_few<Numbers, 4>};
        kFew[blocks - 1](tiles, w, table, tile[0], high, b, strips);
      } else {
        run_blocks<Numbers>(tiles, w, table, tile, count, high, b, blocks, strips);
      }
      for (int64_t t = 0; t < count; ++t) {
        for (int64_t i = 0; i < blocks; ++i) {
          finish(tile[t].y + i * 256, p + t * 16, tile[t].rows, b + i, w.n, out);
        }
      }
    }
  }
}

}  // namespace

bool has_large_groups(const Weight& w) {
  return w.integer() && !w.as_values && w.group >= 64 && (w.group % kStep == 0 || w.groups == 1);
}

void linear_bf16_codes(const Weight& w, const uint16_t* x, int64_t ldx, int64_t rows, int64_t block_begin,
                       int64_t block_end, const LinearOut& out, void* scratch) {
  if (rows == 1 && linear_bf16_row(w, x, block_begin, block_end, out, scratch)) return;
  with_codes(w.storage, [&](auto storage) {
    using Codes = decltype(storage);
    w.rounded ? run<Rounded<Codes>>(w, x, ldx, rows, block_begin, block_end, out, scratch)
              : run<Plain<Codes>>(w, x, ldx, rows, block_begin, block_end, out, scratch);
  });
}

}  // namespace gm::GM_LEVEL
