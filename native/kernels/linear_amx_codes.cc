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
// in 4 and numbers in 5 to 7.
//
// Expected, per core: 64 bytes of 4-bit codes (128 weights) take 3 shifts and 4 look-ups on one port each and
// 4 stores, 4 to 5 cycles; four blocks of 128 columns 300, and as long as the tiles' 16 products of 16 rows
// (16 cycles each). A core that reads 20 GB/s at 2.5 GHz takes 510 for these 4 KB, so that memory is the
// limit up to 16 rows. The float32 part of 16 rows is 64 times (load, fma, store), 64 cycles.
#include <immintrin.h>

#include "kernels.h"
#include "linear_amx.h"
#include "linear_out.h"
#include "numbers.h"
#include "vec/tiles.h"

namespace gm::GM_LEVEL {
namespace {

constexpr int64_t kBlocks = 4, kStep = 32, kChunk = AmxCodesShape::kChunk;

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

// dot of kWide blocks: their strips [steps][16 pairs][16 rows][2], kChunk columns apart.
template <int kWide>
void products(Tiles& tiles, const uint16_t* x, int64_t high, const uint16_t* strips, int64_t steps,
              bool first, float* dot) {
  if (first) {
    tiles.template zero<0>();
    if constexpr (kWide > 1) tiles.template zero<1>();
    if constexpr (kWide > 2) tiles.template zero<2>();
    if constexpr (kWide > 3) tiles.template zero<3>();
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
  tiles.template store<0>(dot, 64);
  if constexpr (kWide > 1) tiles.template store<1>(dot + 256, 64);
  if constexpr (kWide > 2) tiles.template store<2>(dot + 512, 64);
  if constexpr (kWide > 3) tiles.template store<3>(dot + 768, 64);
}

using ProductsOf = void (*)(Tiles&, const uint16_t*, int64_t, const uint16_t*, int64_t, bool, float*);
constexpr ProductsOf kProducts[] = {products<1>, products<2>, products<3>, products<4>};

template <class Numbers>
void run_blocks(Tiles& tiles, const Weight& w, const uint16_t* table, const Rows* tile, int64_t tiles_of_rows,
                int64_t high, int64_t block, int64_t blocks, uint16_t* strips) {
  using Codes = typename Numbers::Codes;
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t columns = columns_of(w, g), scales = (block * w.groups + g) * 16;
    for (int64_t begin = 0; begin < columns; begin += kChunk) {
      const int64_t n = columns - begin < kChunk ? columns - begin : kChunk;
      const int64_t steps = (n + kStep - 1) / kStep, at = g * w.group + begin;
      for (int64_t b = 0; b < blocks; ++b) {
        uint16_t* strip = strips + b * kChunk * 16;
        const uint8_t* ahead = w.codes(block + b) + at / Codes::kColumns * Codes::kBytes + 2048;
        for (int64_t i = 0; i < n / Codes::kColumns * Codes::kBytes; i += 64) prefetch_far(ahead + i);
        decode_numbers<Numbers>(w, table, block + b, at, n, strip);
        memset(strip + n * 16, 0, static_cast<size_t>(steps * kStep - n) * 32);
      }
      for (int64_t t = 0; t < tiles_of_rows; ++t) {
        kProducts[blocks - 1](tiles, tile[t].packed + at / kStep * high * kStep, high, strips, steps,
                              begin == 0, tile[t].dot);
        if (begin + n < columns) continue;
        for (int64_t b = 0; b < blocks; ++b) {
          const vf scale = group_scale(w, scales + b * w.groups * 16);
          const vf low = group_min(w, scales + b * w.groups * 16);
          for (int64_t r = 0; r < tile[t].rows; ++r) {
            float* y = tile[t].y + (b * 16 + r) * 16;
            vf sum = vf_fma(scale, vf_load(tile[t].dot + (b * 16 + r) * 16), vf_load(y));
            if (w.mins != nullptr) sum = vf_fma(low, vf_set1(tile[t].sums[r * w.groups + g]), sum);
            vf_store(y, sum);
          }
        }
      }
    }
  }
}

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
      of.sums = sums + (p + t * 16) * w.groups;
    }
    for (int64_t b = block_begin; b < block_end; b += kBlocks) {
      const int64_t blocks = block_end - b < kBlocks ? block_end - b : kBlocks;
      memset(y, 0, static_cast<size_t>(count * kBlocks) * 1024);
      run_blocks<Numbers>(tiles, w, table, tile, count, high, b, blocks, strips);
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
  return w.integer() && w.kp > 0 && w.group >= 64 && (w.group % kStep == 0 || w.groups == 1);
}

void linear_bf16_codes(const Weight& w, const uint16_t* x, int64_t ldx, int64_t rows, int64_t block_begin,
                       int64_t block_end, const LinearOut& out, void* scratch) {
  with_codes(w.storage, [&](auto storage) {
    using Codes = decltype(storage);
    w.rounded ? run<Rounded<Codes>>(w, x, ldx, rows, block_begin, block_end, out, scratch)
              : run<Plain<Codes>>(w, x, ldx, rows, block_begin, block_end, out, scratch);
  });
}

}  // namespace gm::GM_LEVEL
