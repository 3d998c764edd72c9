// Signatures of the kernels. Every instruction-set level fills one KernelTable; the runtime picks a table
// once.
//
// Row-major matrices are given as pointer and leading dimension (elements between rows). "Rows" are tokens.
#pragma once

#include <stdint.h>

namespace gm {

// How the values of a packed weight are stored (the layouts are described in formats/packed.py).
enum class Storage : int32_t {
  kF32 = 0,
  kBf16 = 1,
  kF16 = 2,
  kInt4 = 3,
  kInt8 = 4,
  kInt2 = 5,
  kInt3 = 6,
  kInt5 = 7,
  kInt6 = 8,
  kSparse24 = 9
};

// Bits that the codes of a column take; 0 for float storage.
constexpr int code_bits(Storage storage) {
  constexpr int kBits[] = {0, 0, 0, 4, 8, 2, 3, 5, 6, 3};
  return kBits[static_cast<int>(storage)];
}

// A packed weight of n output rows and k input columns, sixteen output rows interleaved per block.
// Integer storage: value = scale * (code - offset) + min, one scale (and min) per group of columns and row.
// With E4M3 scales: value = unit * R(scale * (code - offset)), R to E4M3 if `rounded`; no int8 arithmetic.
struct Weight {
  Storage storage = Storage::kF32;
  int32_t offset = 0;
  bool wide_scales = false;  // scales and mins are f32, else f16
  bool e4m3_scales = false;  // scales are bytes; there are no mins
  bool rounded = false;
  bool as_values = false;        // on tiles bf16 rows meet values rounded to bf16, whatever the groups
  float unit = 1.0f;             // a power of two
  const void* values = nullptr;  // codes, or float values
  const void* scales = nullptr;  // [blocks][groups][16]
  const void* mins = nullptr;    // as scales, or null
  int64_t n = 0, k = 0;
  int64_t kp = 0;                 // padded columns
  int64_t group = 0, groups = 0;  // columns per group; number of groups
  int64_t blocks() const { return (n + 15) / 16; }
  bool integer() const { return code_bits(storage) != 0; }
  // A block's codes, as far as `values` are codes.
  const uint8_t* codes(int64_t block) const {
    return static_cast<const uint8_t*>(values) + block * kp * code_bits(storage) * 2;
  }
};

// Rows of activations as int8 codes with one scale per group: x = scale * q.
struct Int8Rows {
  const int8_t* q = nullptr;     // [rows][kp], zero in the padding
  const float* scale = nullptr;  // [rows][groups]
  const int32_t* sum = nullptr;  // [rows][groups], sum of the group's codes
  int64_t kp = 0, groups = 0;
};

// How activations are rounded to integers.
struct Rounding {
  const float* limit = nullptr;    // [groups], the largest code; null: 127 everywhere
  const int32_t* order = nullptr;  // [k], the column that each one is taken from; null: its own
};

struct LinearOut {
  float* out = nullptr;
  int64_t ld = 0;
  const float* bias = nullptr;       // [n] or null
  bool accumulate = false;           // out += result (after the bias) instead of out = result
  const float* row_scale = nullptr;  // [rows] or null: of x, multiplied in before the bias (not by int8)
};

enum class Activation : int32_t { kSilu = 0, kGeluTanh = 1 };

// Attention works in spans of this many keys, and the cache keeps a head's keys of one span together, so that
// a step reads long runs: scattered tiles of 2 KB reach a third of the memory's bandwidth.
constexpr int64_t kSpanTokens = 256;
constexpr int64_t kTileTokens = 16;

// How keys and values are kept: as floats, or as 4-bit codes. kInt4: codes -8..7 and one bf16 scale per
// token, KV head and group of kKvGroup dimensions of the head (the last one may be smaller): s = max|x| / 7,
// rounded (1 where it is 0), code = round-to-even(x / s). kInt4Channel: codes 0..15 (stored less 8), a bf16
// scale and a bf16 minimum per KV head, dimension and group of kKvChannelGroup tokens of the sequence, x = s
// * code + m; tokens of a group that is not full yet stay in bf16.
enum class KvFormat : int32_t { kF32 = 0, kBf16 = 1, kInt4 = 2, kInt4Channel = 3 };
constexpr int64_t kKvChannelGroup = 64;
constexpr int64_t kKvGroup = 128;
constexpr int64_t kv_groups(int64_t head_dim) { return (head_dim + kKvGroup - 1) / kKvGroup; }

// Where one sequence's keys and values of one layer lie. Token p of KV head h is in the tile at
// `k + spans[p / 256] + h * head_bytes + p % 256 / 16 * tile_bytes`. Inside a tile of 16 tokens, keys: bf16
// [head_dim / 2][16 tokens][2], f32 [head_dim][16 tokens], codes [head_dim / 8][16 tokens] words of 32 bits;
// values: bf16 [16 / 2][head_dim][2] (pairs of tokens), f32 [16][head_dim], codes [16 / 8][head_dim] words. A
// word holds eight codes in two's complement, number 2 j + h (of dimensions or tokens) in the bits from 16 h
// + 4 j. After a head's tiles come their scales: kInt4: [tile][groups] [16 tokens]; kInt4Channel: [64
// tokens][2: scales, minimums][head_dim].
struct KvSegment {
  char* k = nullptr;
  char* v = nullptr;
  const int64_t* spans = nullptr;  // offsets in bytes; those behind a window mean nothing
  int64_t head_bytes = 0;
  int64_t tile_bytes = 0;
  int64_t scale_bytes = 0;  // of one tile
  // kInt4Channel: bf16 [kv heads][64][head_dim], the tokens of the group that the sequence is in, and where
  // those of the group go that it is in after the step, if that is another one.
  uint16_t* k_tail = nullptr;
  uint16_t* v_tail = nullptr;
  uint16_t* k_tail_after = nullptr;
  uint16_t* v_tail_after = nullptr;

  int64_t tile_at(int64_t position, int64_t head) const {
    return head_at(position, head) + position % kSpanTokens / kTileTokens * tile_bytes;
  }
  int64_t scales_at(int64_t position, int64_t head) const {
    return head_at(position, head) + kSpanTokens / kTileTokens * tile_bytes +
           position % kSpanTokens / kTileTokens * scale_bytes;
  }

 private:
  int64_t head_at(int64_t position, int64_t head) const {
    return spans[position / kSpanTokens] + head * head_bytes;
  }
};

constexpr int64_t kMaximaBlock = 64, kSumBlock = 256;

// One sequence's part of a step.
struct AttentionSequence {
  KvSegment kv;
  int64_t row = 0;    // first row in the flattened step
  int64_t rows = 0;   // new tokens
  int64_t start = 0;  // position of the first new token
};

struct AttentionArgs {
  const float* q = nullptr;  // [tokens][ldq], unrotated
  int64_t ldq = 0;
  const float* k = nullptr;  // [tokens][ldk], unrotated
  int64_t ldk = 0;
  const float* v = nullptr;  // [tokens][ldv]
  int64_t ldv = 0;
  float* out = nullptr;  // [tokens][ldo]
  int64_t ldo = 0;
  const float* cos = nullptr;  // [positions][rope_dim / 2]
  const float* sin = nullptr;
  int64_t rope_dim = 0;  // 0: no rotation
  // [kv_heads * head_dim] or null: rotated keys are multiplied by it, rotated queries divided.
  const float* key_scale = nullptr;
  int32_t heads = 0, kv_heads = 0, head_dim = 0;
  float scale = 1.0f;
  int64_t window = 0;  // visible keys, the row's own included; 0: all
  KvFormat kv = KvFormat::kBf16;
  bool bf16_math = true;  // queries and probabilities are rounded to bf16 (not with f32 keys), else f32
  const AttentionSequence* sequences = nullptr;
  int64_t sequence_count = 0;
  float* partials = nullptr;  // scratch, attention_partial_floats(args) long
};

struct KernelTable {
  const char* level;
  // Integer weights meet rows of prompts as bf16 rather than as int8: this level's bf16 is the faster one.
  bool prompts_in_bf16;

  // x [rows][ldx] of k columns -> int8 rows with groups of `group` columns. scale = max|x| / limit,
  // q = round-to-even(x * (limit / max|x|)); all zero where the group is zero. `gathered` holds k floats if
  // there is an order.
  void (*encode_int8)(const float* x, int64_t ldx, int64_t rows, int64_t k, int64_t group, int64_t kp,
                      const Rounding& rounding, int8_t* q, float* scale, int32_t* sum, float* gathered);
  // x [rows][ldx] of k columns -> E4M3 values, as bf16 [rows][kp], zero in the padding, and a scale per row:
  // max|x| / 448, value = E4M3(x * (448 / max|x|)); scale 1 where the row is zero. `gathered` holds k floats
  // if there is an order.
  void (*encode_fp8)(const float* x, int64_t ldx, int64_t rows, int64_t k, int64_t kp, const int32_t* order,
                     uint16_t* out, float* scale, float* gathered);
  // x [rows][ldx] of k columns -> bf16 [rows][kp], zero in the padding.
  void (*encode_bf16)(const float* x, int64_t ldx, int64_t rows, int64_t k, int64_t kp, uint16_t* out);

  // out[row][n] = sum over k of x[row][k] * w[n][k], for the weight's blocks [block_begin, block_end).
  // `scratch` holds linear_scratch_bytes(weight, rows).
  void (*linear_int8)(const Weight& w, const Int8Rows& x, int64_t rows, int64_t block_begin,
                      int64_t block_end, const LinearOut& out, void* scratch);
  // bf16 rows are zero in the padding of integer weights, from column k to kp.
  void (*linear_bf16)(const Weight& w, const uint16_t* x, int64_t ldx, int64_t rows, int64_t block_begin,
                      int64_t block_end, const LinearOut& out, void* scratch);
  void (*linear_f32)(const Weight& w, const float* x, int64_t ldx, int64_t rows, int64_t block_begin,
                     int64_t block_end, const LinearOut& out, void* scratch);
  // One row of a packed weight, decoded to f32 [k].
  void (*decode_row)(const Weight& w, int64_t row, float* out);

  // y = x / sqrt(mean(x^2) + eps) * w. x and y may be the same.
  void (*rmsnorm)(const float* x, int64_t ldx, const float* w, float* y, int64_t ldy, int64_t rows, int64_t n,
                  float eps);
  // x += y
  void (*add)(float* x, int64_t ldx, const float* y, int64_t ldy, int64_t rows, int64_t n);
  // out = act(gate) * up; out may be gate
  void (*gated)(const float* gate, const float* up, float* out, int64_t ld, int64_t rows, int64_t n,
                Activation act);

  // Attention runs in three phases with a barrier after each; within a phase any split of the items is right.
  // Whether some sequence has so many new tokens that its keys must be written by prepare; else prepare is
  // not needed.
  bool (*attention_long)(const AttentionArgs& a);
  // prepare: writes the keys and values of the long sequences' rows in [row_begin, row_end) into the cache.
  void (*attention_prepare)(const AttentionArgs& a, int64_t row_begin, int64_t row_end, void* scratch);
  // spans: items as counted by attention_items. Writes the results of long sequences, partial results of the
  // others.
  int64_t (*attention_items)(const AttentionArgs& a);
  int64_t (*attention_partial_floats)(const AttentionArgs& a);
  void (*attention_spans)(const AttentionArgs& a, int64_t item_begin, int64_t item_end, void* scratch);
  // commit, beside merge: writes the keys and values that stay as they are of the rows in [row_begin,
  // row_end).
  void (*attention_commit)(const AttentionArgs& a, int64_t row_begin, int64_t row_end, void* scratch);
  // merge: the results of the short sequences' rows in [row_begin, row_end), from their partial results.
  void (*attention_merge)(const AttentionArgs& a, int64_t row_begin, int64_t row_end);
  int64_t (*attention_scratch_bytes)(const AttentionArgs& a);  // per thread, for prepare, spans and commit

  // For the sampler, over one row of n logits. row_maxima: the highest of every kMaximaBlock (-inf counts as
  // -FLT_MAX); false if one is NaN or +inf. row_exponentials: out = exp((x - top) * inverse), and the sums of
  // every kSumBlock.
  bool (*row_maxima)(const float* x, int64_t n, float* maxima);
  void (*row_exponentials)(const float* x, int64_t n, float top, float inverse, float* out, double* sums);

  // Sum of all bytes read as 64-byte words: the bandwidth probe of the roofline.
  uint64_t (*read_all)(const void* data, int64_t bytes);
};

// How the AMX kernel cuts columns: every group into equal steps of at most 64 columns, filled with zeros.
constexpr int64_t kAmxSideBytes = 12;  // per row and group: scale, correction, minimum sum
struct AmxShape {
  int64_t steps, step;  // of a group
  int64_t width;        // columns of a group, filled
  int64_t columns;      // of all groups
  int64_t groups;

  explicit AmxShape(const Weight& w)
      : steps((w.group + 63) / 64),
        step((w.group + 4 * steps - 1) / (4 * steps) * 4),
        width(steps * step),
        columns(width * w.groups),
        groups(w.groups) {}
  // Rows that are packed at once: about a megabyte.
  int64_t panel(int64_t rows) const {
    const int64_t fit = (int64_t{1} << 20) / columns / 32 * 32;
    const int64_t most = fit < 32 ? 32 : fit, all = (rows + 15) / 16 * 16;
    return all < most ? all : most;
  }
  // Groups that are in work at a time: about 256 columns, chunks of one length where that can be.
  int64_t chunk() const {
    const int64_t chunks = (columns + 255) / 256;
    return (groups + chunks - 1) / chunks;
  }
  // Dots and strips of two chunks, and a panel's sums and packed rows. Dots have three groups' room to move
  // in and end with a page.
  int64_t scratch_bytes(int64_t rows) const {
    return 2 * (chunk() * (1024 + width * 16) + 7168) + panel(rows) * (64 + columns + groups * kAmxSideBytes);
  }
};

// How the AMX kernel cuts bf16: steps of 32 columns, filled with zeros.
struct AmxBf16Shape {
  static constexpr int64_t kMostTiles = 512;
  int64_t steps;

  explicit AmxBf16Shape(const Weight& w) : steps((w.kp + 31) / 32) {}
  // Rows that are packed at once: half a megabyte, which leaves most of the L2 cache to the strips.
  int64_t panel(int64_t rows) const {
    const int64_t fit = (int64_t{1} << 19) / (steps * 64) / 32 * 32;
    const int64_t most = fit < 32 ? 32 : fit, all = (rows + 15) / 16 * 16;
    return all < most ? all : most;
  }
  // Strips of two blocks, and the panel.
  int64_t scratch_bytes(int64_t rows) const { return steps * 2048 + panel(rows) * steps * 64; }
};

// How the AMX kernel cuts integer weights of large groups for bf16 rows.
struct AmxCodesShape {
  static constexpr int64_t kChunk = 256, kMostRows = 512;  // columns that are decoded at once; rows
  int64_t steps, groups;

  explicit AmxCodesShape(const Weight& w) : steps((w.kp + 31) / 32), groups(w.groups) {}
  // Rows that are packed at once: half a megabyte, but so many that decoding the weights takes less than
  // they.
  int64_t panel(int64_t rows) const {
    const int64_t fit = (int64_t{1} << 19) / (steps * 64) / 16 * 16;
    const int64_t most = fit < 64 ? 64 : fit > kMostRows ? kMostRows : fit, all = (rows + 15) / 16 * 16;
    return all < most ? all : most;
  }
  // Strips of four blocks; packed rows, with two sums for each output; sums of groups.
  int64_t scratch_bytes(int64_t rows) const {
    return 4 * kChunk * 32 + panel(rows) * (steps * 64 + 512) + rows * groups * 4;
  }
};

// How the AMX kernel for a few int8 rows cuts columns: steps of 64, filled with zeros. With fewer rows, or
// several groups that are not whole steps, the vector kernel is as fast.
struct AmxFewShape {
  static constexpr int64_t kStep = 64, kStripBytes = 8 * kStep * 16 + 2048;
  static constexpr int64_t kLeastRows = 9, kMostRows = 24;
  int64_t steps, groups;

  explicit AmxFewShape(const Weight& w) : steps((w.kp + kStep - 1) / kStep), groups(w.groups) {}
  static bool takes(const Weight& w, int64_t rows) {
    return rows >= kLeastRows && rows <= kMostRows && (w.group % kStep == 0 || w.groups == 1);
  }
  int64_t scratch_bytes() const { return kStripBytes + 2 * 8192 + steps * 32 * kStep + groups * 3 * 128; }
};

// Rows of bf16 that meet integer weights at once where there are no tiles.
constexpr int64_t kLinearPanelRows = 192;

// Scratch a thread needs for one linear of any kind.
inline int64_t linear_scratch_bytes(const Weight& w, int64_t rows) {
  int64_t bytes = 256 * 16 * 4 + rows * 16 * 12;  // decoded strip and accumulators (f32, bf16)
  if (w.integer() && w.groups > 0) {
    // Sums of groups, and packed rows (bf16).
    bytes += rows * w.groups * 4 + (rows < kLinearPanelRows ? rows : kLinearPanelRows) * w.kp * 2;
    const int64_t sums = rows * w.groups * 8;  // corrections and minimum sums (int8)
    const int64_t tiles = AmxShape(w).scratch_bytes(rows);
    if (sums > bytes) bytes = sums;
    if (tiles > bytes) bytes = tiles;
    const int64_t few = AmxFewShape(w).scratch_bytes();
    if (few > bytes) bytes = few;
    const int64_t numbers = AmxCodesShape(w).scratch_bytes(rows);
    if (numbers > bytes) bytes = numbers;
  }
  const int64_t bf16 = AmxBf16Shape(w).scratch_bytes(rows);
  return (bf16 > bytes ? bf16 : bytes) + 256;
}

}  // namespace gm
