// Attention over the tiled KV cache, one arithmetic for prefill and decode.
//
// A query row (one token, one head) meets its keys in tiles of 64 aligned to the sequence's own index, tiles
// in spans of 256. Within a span: s = scale * (q . k); m = running maximum; p = exp(s - m); l = running sum
// of p; o = running sum of p v, o and l being rescaled when m grows. Spans are then merged ascending: m' =
// max(m, m_s), o = o exp(m - m') + o_s exp(m_s - m'), l likewise; out = o / l. A masked key has p = 0
// exactly, and a tile or span without visible keys changes no bit, so rows may be grouped in any way.
//
// Int4 keys and values are multiplied as codes, which bf16 holds exactly: a key's scale multiplies its score,
// a value's the probability before that is rounded. A row sees its own key and value as they are kept.
//
// Int4 by channel: groups of tokens are the key tiles. A row at position p meets the tiles that end at or
// before p as codes: q is multiplied by the tile's scales before it is rounded, the score gets the minimums'
// product with q, o = o + scale * (p codes) + minimum * sum(p) per tile. It meets the tile that it is in
// itself as bf16. A group is encoded in the step that brings its last token; the tokens of an unfinished one
// are written last, by commit, as others still read the tokens that were there before.
//
// Sequences of few new tokens ("short": one block of rows) are cut into one item per KV head and span, whose
// partial results are merged afterwards; each item rotates its queries and writes the new keys and values of
// its own span, so that no thread waits for another. Longer ones are cut by blocks of rows, which run all
// their spans in order; their keys and values are written beforehand.
//
// With matrix tiles (level amx) bf16 queries and probabilities meet bf16 keys and values in tiles of at most
// 16 rows: of 32 dimensions for a score, of 32 tokens for an output (16 where 32 does not divide the head),
// in the order of sums of TDPBF16PS.
#include "ahead.h"
#include "kernels.h"
#include "vec/vec.h"
#ifdef GM_TILES
#include "vec/tiles.h"
#endif

namespace gm::GM_LEVEL {
namespace {

constexpr int64_t kTile = 64, kSpan = kSpanTokens, kBlock = kTileTokens;
static_assert(kTile == kKvChannelGroup);
constexpr float kMasked = -__builtin_inff();

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

int64_t group_of(const AttentionArgs& a) { return a.heads / a.kv_heads; }
// Tokens per block of rows: about 48 rows of queries share each key tile.
int64_t block_tokens(const AttentionArgs& a) { return most(1, 48 / group_of(a)); }
bool is_short(const AttentionArgs& a, const AttentionSequence& s) { return s.rows <= block_tokens(a); }
int64_t first_key(const AttentionArgs& a, int64_t position) {
  return a.window == 0 ? 0 : most(0, position - a.window + 1);
}
int64_t first_span(const AttentionArgs& a, const AttentionSequence& s) {
  return first_key(a, s.start) / kSpan;
}
int64_t span_count(const AttentionArgs& a, const AttentionSequence& s) {
  return (s.start + s.rows - 1) / kSpan - first_span(a, s) + 1;
}
// A partial: head_dim values, then m and l.
int64_t partial_stride(const AttentionArgs& a) { return a.head_dim + 16; }
int64_t partial_rows(const AttentionArgs& a, const AttentionSequence& s) {
  return s.rows == 0 || !is_short(a, s) ? 0 : span_count(a, s) * a.heads * s.rows;
}
int64_t items_of(const AttentionArgs& a, const AttentionSequence& s) {
  if (s.rows == 0) return 0;
  if (is_short(a, s)) return a.kv_heads * span_count(a, s);
  return a.kv_heads * ((s.rows + block_tokens(a) - 1) / block_tokens(a));
}

struct Item {
  const AttentionSequence* sequence;
  int64_t kv_head;
  int64_t token, tokens;  // new tokens of the sequence
  int64_t span_begin, span_end;
  int64_t partial;  // first row of its partials, -1: writes its result
};

template <class Fn>
void each_item(const AttentionArgs& a, int64_t begin, int64_t end, Fn fn) {
  int64_t before = 0, partial = 0;
  for (int64_t i = 0; i < a.sequence_count && before < end; ++i) {
    const AttentionSequence& s = a.sequences[i];
    const int64_t items = items_of(a, s);
    for (int64_t n = most(begin - before, 0); n < least(end - before, items); ++n) {
      Item item;
      item.sequence = &s;
      if (is_short(a, s)) {
        const int64_t spans = span_count(a, s);
        item.kv_head = n / spans;
        item.token = 0;
        item.tokens = s.rows;
        item.span_begin = first_span(a, s) + n % spans;
        item.span_end = item.span_begin + 1;
        // [span][kv head][row of the group]
        item.partial = partial + ((n % spans) * a.kv_heads + item.kv_head) * s.rows * group_of(a);
      } else {
        item.kv_head = n % a.kv_heads;
        item.token = n / a.kv_heads * block_tokens(a);
        item.tokens = least(block_tokens(a), s.rows - item.token);
        const int64_t p = s.start + item.token;
        item.span_begin = first_key(a, p) / kSpan;
        item.span_end = (p + item.tokens - 1) / kSpan + 1;
        item.partial = -1;
      }
      fn(item);
    }
    before += items;
    partial += partial_rows(a, s);
  }
}

// First key and end of the keys that an item's rows see within one of its spans, in whole tiles at the front.
int64_t span_from(const AttentionArgs& a, const Item& item, int64_t span) {
  return most(span * kSpan, first_key(a, item.sequence->start + item.token) / kTile * kTile);
}
int64_t span_to(const Item& item, int64_t span) {
  return least((span + 1) * kSpan, item.sequence->start + item.token + item.tokens);
}

// The rotation of one head's vector: pairs (i, i + half), half-split as in the published models.
void rotate(const AttentionArgs& a, const float* x, int64_t position, float* y) {
  const int64_t half = a.rope_dim / 2;
  const float* cos = a.cos + position * half;
  const float* sin = a.sin + position * half;
  for (int64_t i = 0; i < half; ++i) {
    const float low = x[i], high = x[i + half];
    y[i] = low * cos[i] - high * sin[i];
    y[i + half] = high * cos[i] + low * sin[i];
  }
  for (int64_t i = 2 * half; i < a.head_dim; ++i) y[i] = x[i];
}

void rotate_key(const AttentionArgs& a, const AttentionSequence& s, int64_t token, int64_t head, float* y) {
  rotate(a, a.k + (s.row + token) * a.ldk + head * a.head_dim, s.start + token, y);
  if (a.key_scale == nullptr) return;
  const float* scale = a.key_scale + head * a.head_dim;
  for (int64_t d = 0; d < a.head_dim; ++d) y[d] *= scale[d];
}

void rotate_query(const AttentionArgs& a, const AttentionSequence& s, int64_t token, int64_t head, float* y) {
  rotate(a, a.q + (s.row + token) * a.ldq + head * a.head_dim, s.start + token, y);
  if (a.key_scale == nullptr) return;
  const float* scale = a.key_scale + head / group_of(a) * a.head_dim;
  for (int64_t d = 0; d < a.head_dim; ++d) y[d] /= scale[d];
}

// Codes of one token's vector; scales are `stride` apart. A vector that is not finite gets the scale NaN.
void encode_int4(const float* x, int64_t n, int8_t* codes, uint16_t* scales, int64_t stride) {
  for (int64_t begin = 0; begin < n; begin += kKvGroup) {
    const int64_t end = least(n, begin + kKvGroup);
    vf top = vf_zero(), strange = vf_zero();
    for (int64_t d = begin; d < end; d += 16) {
      top = vf_max(vf_abs(vf_load(x + d)), top);
      strange = vf_fma(vf_load(x + d), vf_zero(), strange);
    }
    const uint16_t stored = float_to_bf16(vf_max_lane(top) / 7.0f + vf_sum(strange));
    const uint16_t scale = stored == 0 ? 0x3f80 : stored;
    const vf divisor = vf_set1(bf16_to_float(scale));
    for (int64_t d = begin; d < end; d += 16) {
      const vf wide = vf_load(x + d) / divisor;
      vi_store_i8(codes + d, vf_round(vf_min(vf_max(wide, vf_set1(-8.0f)), vf_set1(7.0f))));
    }
    scales[begin / kKvGroup * stride] = scale;
  }
}

// One token's codes into the words of a tile of keys, and of a tile of values: there the token before shares
// words with it, and what follows is cleared.
void put_key(const int8_t* codes, int64_t hd, int64_t slot, uint32_t* tile) {
  for (int64_t d = 0; d < hd; d += 8) {
    uint32_t word = 0;
    for (int64_t i = 0; i < 8; ++i) {
      word |= (static_cast<uint32_t>(codes[d + i]) & 15u) << (4 * (i / 2) + 16 * (i % 2));
    }
    tile[d / 8 * kBlock + slot] = word;
  }
}
void put_value(const int8_t* codes, int64_t hd, int64_t slot, uint32_t* tile) {
  uint32_t* words = tile + slot / 8 * hd;
  const int64_t j = slot % 8 / 2, h = slot % 2;
  const uint32_t before = (1u << 4 * j) - 1u;
  const uint32_t keep = before * 0x10001u | (h == 0 ? 0u : 15u << 4 * j);
  for (int64_t d = 0; d < hd; ++d) {
    words[d] = (words[d] & keep) | (static_cast<uint32_t>(codes[d]) & 15u) << (4 * j + 16 * h);
  }
}

bool by_channel(const AttentionArgs& a) { return a.kv == KvFormat::kInt4Channel; }

void round_bf16(float* x, int64_t n) {
  uint16_t rounded[16];
  for (int64_t d = 0; d < n; d += 16) {
    vf_store_bf16(rounded, vf_load(x + d));
    vf_store(x + d, vf_load_bf16(rounded));
  }
}

// Scratch of one tile of bf16 keys and values, and of its encoding.
struct Group {
  float* rows;  // [64][hd]
  uint16_t *k, *v;
  int8_t* codes;  // [64][hd]
  static int64_t floats(const AttentionArgs& a) { return by_channel(a) ? kTile * a.head_dim * 9 / 4 : 0; }
  Group(const AttentionArgs& a, float* memory) : rows(memory) {
    const int64_t size = kTile * a.head_dim;
    k = reinterpret_cast<uint16_t*>(rows + size);
    v = k + size;
    codes = reinterpret_cast<int8_t*>(v + size);
  }
};

// The keys or values of the tokens [first, to) of one head, as bf16 holds them; zeros up to 64 rows.
void group_rows(const AttentionArgs& a, const AttentionSequence& s, int64_t head, int64_t first, int64_t to,
                bool keys, float* rows) {
  const int64_t hd = a.head_dim;
  for (int64_t t = 0; t < kTile; ++t) {
    float* row = rows + t * hd;
    const int64_t token = first + t - s.start;
    if (first + t >= to) {
      memset(row, 0, static_cast<size_t>(hd) * 4);
    } else if (token < 0) {
      const uint16_t* kept = (keys ? s.kv.k_tail : s.kv.v_tail) + (head * kTile + t) * hd;
      for (int64_t d = 0; d < hd; d += 16) vf_store(row + d, vf_load_bf16(kept + d));
    } else {
      if (keys) {
        rotate_key(a, s, token, head, row);
      } else {
        memcpy(row, a.v + (s.row + token) * a.ldv + head * hd, static_cast<size_t>(hd) * 4);
      }
      round_bf16(row, hd);
    }
  }
}

// The tokens [first, to) of one head as a tile of bf16 keys and one of values.
void load_group(const AttentionArgs& a, const AttentionSequence& s, int64_t head, int64_t first, int64_t to,
                const Group& g) {
  const int64_t hd = a.head_dim;
  group_rows(a, s, head, first, to, true, g.rows);
  for (int64_t t = 0; t < kTile; ++t) {
    uint16_t* at = g.k + t / kBlock * kBlock * hd + t % kBlock * 2;
    for (int64_t d = 0; d < hd; ++d) at[d / 2 * 32 + d % 2] = float_to_bf16(g.rows[t * hd + d]);
  }
  group_rows(a, s, head, first, to, false, g.rows);
  for (int64_t t = 0; t < kTile; ++t) {
    for (int64_t d = 0; d < hd; ++d) {
      g.v[t / 2 * 2 * hd + d * 2 + t % 2] = float_to_bf16(g.rows[t * hd + d]);
    }
  }
}

// Rounds to bf16 away from zero, or towards it.
uint16_t outward_bf16(float x, bool outward) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + (outward ? 0xffffu : 0u)) >> 16);
}

// Codes -8..7 of 64 rows, and scales and minimums of their columns. The minimum is rounded down and the scale
// up, so that no code has to be cut off. A column that is not finite gets the scale NaN.
void encode_channels(const float* rows, int64_t hd, int8_t* codes, uint16_t* scales) {
  for (int64_t d = 0; d < hd; d += 16) {
    vf low = vf_load(rows + d), high = low, strange = vf_zero();
    for (int64_t t = 0; t < kTile; ++t) {
      const vf x = vf_load(rows + t * hd + d);
      low = vf_min(x, low);
      high = vf_max(x, high);
      strange = vf_fma(x, vf_zero(), strange);
    }
    alignas(64) float least_of[16], most_of[16], odd[16], s[16], m[16];
    vf_store(least_of, low);
    vf_store(most_of, high);
    vf_store(odd, strange);
    for (int i = 0; i < 16; ++i) {
      const uint16_t minimum = outward_bf16(least_of[i], least_of[i] < 0);
      m[i] = bf16_to_float(minimum);
      const uint16_t scale = outward_bf16((most_of[i] - m[i]) / 15.0f + odd[i], true);
      scales[d + i] = scale == 0 ? 0x3f80 : scale;
      s[i] = bf16_to_float(scales[d + i]);
      scales[hd + d + i] = minimum;
    }
    const vf divisor = vf_load(s), minimum = vf_load(m);
    for (int64_t t = 0; t < kTile; ++t) {
      const vf x = (vf_load(rows + t * hd + d) - minimum) / divisor;
      const vi code = vf_round(vf_min(vf_max(x, vf_zero()), vf_set1(15.0f)));
      vi_store_i8(codes + t * hd + d, code + vi_set1(-8));
    }
  }
}

// Encodes a full group of one head.
void write_group(const AttentionArgs& a, const AttentionSequence& s, int64_t head, int64_t first,
                 const Group& g) {
  const int64_t hd = a.head_dim, scales = s.kv.scales_at(first, head);
  auto encode = [&](bool keys) {
    char* base = keys ? s.kv.k : s.kv.v;
    group_rows(a, s, head, first, first + kTile, keys, g.rows);
    encode_channels(g.rows, hd, g.codes, reinterpret_cast<uint16_t*>(base + scales));
    for (int64_t t = 0; t < kTile; ++t) {
      auto* tile = reinterpret_cast<uint32_t*>(base + s.kv.tile_at(first + t, head));
      (keys ? put_key : put_value)(g.codes + t * hd, hd, t % kBlock, tile);
    }
  };
  encode(true);
  encode(false);
}

// Positions where the groups begin that the step fills: [begin, end), every 64.
struct Filled {
  int64_t begin, end;
  explicit Filled(const AttentionSequence& s)
      : begin(s.start / kTile * kTile), end((s.start + s.rows) / kTile * kTile) {}
};

// Writes the key and the value of one new token and head. `last`: nothing follows it in this step. `rotated`
// has room for 2 * head_dim.
void append(const AttentionArgs& a, const AttentionSequence& s, int64_t token, int64_t head, bool last,
            float* rotated) {
  const int64_t position = s.start + token, hd = a.head_dim, slot = position % kBlock;
  const int64_t at = s.kv.tile_at(position, head);
  rotate_key(a, s, token, head, rotated);
  const float* v = a.v + (s.row + token) * a.ldv + head * hd;
  // The partner that a pair of tokens does not have yet is cleared: it meets p = 0, which must not be 0 *
  // NaN.
  const bool clear = last && slot % 2 == 0;
  if (a.kv == KvFormat::kInt4) {
    const int64_t scales = s.kv.scales_at(position, head);
    auto* codes = reinterpret_cast<int8_t*>(rotated + hd);
    encode_int4(rotated, hd, codes, reinterpret_cast<uint16_t*>(s.kv.k + scales) + slot, kBlock);
    put_key(codes, hd, slot, reinterpret_cast<uint32_t*>(s.kv.k + at));
    auto* v_scale = reinterpret_cast<uint16_t*>(s.kv.v + scales) + slot;
    encode_int4(v, hd, codes, v_scale, kBlock);
    put_value(codes, hd, slot, reinterpret_cast<uint32_t*>(s.kv.v + at));
    for (int64_t g = 0; clear && g < kv_groups(hd); ++g) v_scale[g * kBlock + 1] = 0;
  } else if (a.kv == KvFormat::kBf16) {
    // Words of two: a key's pair of dimensions, a dimension of two tokens' values.
    auto* k_tile = reinterpret_cast<uint32_t*>(s.kv.k + at) + slot;
    auto* v_tile = reinterpret_cast<uint32_t*>(s.kv.v + at) + slot / 2 * hd;
    auto* half = reinterpret_cast<uint16_t*>(rotated + hd);
    for (int64_t d = 0; d < hd; d += 16) vf_store_bf16(half + d, vf_load(rotated + d));
    for (int64_t d = 0; d < hd; d += 2) memcpy(k_tile + d * 8, half + d, 4);
    for (int64_t d = 0; d < hd; d += 16) vf_store_bf16(half + d, vf_load(v + d));
    const uint32_t keep = slot % 2 == 1 ? 0x0000ffffu : clear ? 0u : 0xffff0000u;
    const int shift = slot % 2 == 1 ? 16 : 0;
    for (int64_t d = 0; d < hd; ++d) {
      v_tile[d] = (v_tile[d] & keep) | static_cast<uint32_t>(half[d]) << shift;
    }
  } else {
    auto* k_tile = reinterpret_cast<float*>(s.kv.k + at) + slot;
    auto* v_tile = reinterpret_cast<float*>(s.kv.v + at) + slot * hd;
    for (int64_t d = 0; d < hd; ++d) k_tile[d * 16] = rotated[d];
    memcpy(v_tile, v, static_cast<size_t>(hd) * 4);
    if (clear) memset(v_tile + hd, 0, static_cast<size_t>(hd) * 4);
  }
}

// The arithmetics: bf16 pairs as in linear_bf16; bf16 keys widened to f32; f32; and the first two over codes.
enum class Math { kBf16, kWide, kF32, kCodes, kWideCodes };
constexpr bool rounds(Math m) { return m == Math::kBf16 || m == Math::kCodes; }
constexpr bool codes(Math m) { return m == Math::kCodes || m == Math::kWideCodes; }

template <bool kFirst, class A, class B>
struct Choose {
  using type = A;
};
template <class A, class B>
struct Choose<false, A, B> {
  using type = B;
};
template <Math kMath>
struct Types {
  using Query = typename Choose<rounds(kMath), uint16_t, float>::type;
  using Stored = typename Choose<kMath == Math::kF32, float, uint16_t>::type;
};

// y += w * x for all rows and the blocks of w, two columns of bf16. Row by row: were it block by block, the
// broadcasts of all rows would be live at once, and sums would be spilled.
template <Math kMath, int kRows, int kWide>
inline void multiply(vf (&y)[kRows][kWide], const vh (&w)[kWide], const typename Types<kMath>::Query* x,
                     int64_t ldx) {
  if constexpr (rounds(kMath)) {
    GM_UNROLL(12)
    for (int r = 0; r < kRows; ++r) {
      GM_UNROLL(4)
      for (int b = 0; b < kWide; ++b) y[r][b] = vf_dot_bf16(y[r][b], w[b], x + r * ldx);
    }
  } else {
    GM_UNROLL(4)
    for (int b = 0; b < kWide; ++b) {
      const vf even = vh_even(w[b]), odd = vh_odd(w[b]);
      GM_UNROLL(12)
      for (int r = 0; r < kRows; ++r) {
        y[r][b] = vf_fma(odd, vf_set1(x[r * ldx + 1]), vf_fma(even, vf_set1(x[r * ldx]), y[r][b]));
      }
    }
  }
}

// Two columns of f32, ascending.
template <int kRows, int kWide>
inline void multiply_f32(vf (&y)[kRows][kWide], const float* (&w)[kWide], int64_t next_column, const float* x,
                         int64_t ldx) {
  GM_UNROLL(4)
  for (int b = 0; b < kWide; ++b) {
    const vf first = vf_load(w[b]), second = vf_load(w[b] + next_column);
    GM_UNROLL(12)
    for (int r = 0; r < kRows; ++r) {
      y[r][b] = vf_fma(second, vf_set1(x[r * ldx + 1]), vf_fma(first, vf_set1(x[r * ldx]), y[r][b]));
    }
  }
}

// One tile of keys, and the rows that meet it.
template <Math kMath>
struct Work {
  using Query = typename Types<kMath>::Query;
  using Stored = typename Types<kMath>::Stored;
  const Stored* k[4];  // blocks of the tile
  const Stored* v[4];
  const uint16_t* k_scale[4];  // int4: [groups][16] of each block
  const uint16_t* v_scale[4];
  // A tile to come, fetched line by line while this one is worked on; without one the tile at hand. Matrix
  // tiles then fetch nothing, and know the first pointers only: a tile's 64 keys lie together.
  const Stored* k_ahead[4];
  const Stored* v_ahead[4];
  int64_t ahead;  // keys there, in whole blocks; 0 without one
  int64_t keys;   // keys to look at, from the tile's first on
  int64_t hd;
  int64_t group;   // dimensions per scale, hd without scales
  const Query* q;  // [rows][hd]
  Query* p;        // [groups][row limit][64]
  int64_t ldp;     // between groups
  // Int4 by channel, else null. base: what the minimums add to the scores; sum: of p.
  const float *base, *sum;           // [rows]
  const float *v_scale_of, *v_base;  // [hd]
  float* s;                          // [rows][64]
  float* o;                          // [rows][hd]
  float* factor;                     // [rows], of o
  float scale;
};

// s = scale * q k for kWide blocks of keys from block b on.
template <Math kMath, int kRows, int kWide>
void scores(const Work<kMath>& w, int64_t row, int64_t b) {
  const typename Work<kMath>::Stored *k[kWide], *ahead[kWide];
  for (int i = 0; i < kWide; ++i) {
    k[i] = w.k[b + i];
    ahead[i] = row == 0 ? w.k_ahead[b + i] : k[i];
  }
  const auto* q = w.q + row * w.hd;
  const vf scale = vf_set1(w.scale);
  for (int64_t begin = 0; begin < w.hd; begin += w.group) {
    vf y[kRows][kWide];
    GM_UNROLL(12)
    for (int r = 0; r < kRows; ++r) {
      GM_UNROLL(4)
      for (int i = 0; i < kWide; ++i) y[r][i] = vf_zero();
    }
    const int64_t end = least(begin + w.group, w.hd);
    if constexpr (codes(kMath)) {
      for (int64_t d = begin; d < end; d += 8) {
        vh words[kWide];
        for (int i = 0; i < kWide; ++i) {
          words[i] = vh_load(k[i] + d * 4);
          if constexpr (kRows <= 4) prefetch_far(ahead[i] + d * 4);
        }
        GM_UNROLL(4)
        for (int64_t j = 0; j < 8; j += 2) {
          vh pair[kWide];
          GM_UNROLL(4)
          for (int i = 0; i < kWide; ++i) {
            pair[i] = vh_codes(words[i]);
            words[i] = vh_next_codes(words[i]);
          }
          multiply<kMath>(y, pair, q + d + j, w.hd);
        }
      }
    } else {
      for (int64_t d = begin; d < end; d += 2) {
        if constexpr (kRows <= 4) {
          for (int i = 0; i < kWide; ++i) prefetch_far(ahead[i] + d * 16);
        }
        if constexpr (kMath == Math::kF32) {
          const float* at[kWide];
          for (int i = 0; i < kWide; ++i) at[i] = k[i] + d * 16;
          multiply_f32(y, at, 16, q + d, w.hd);
        } else {
          vh pair[kWide];
          for (int i = 0; i < kWide; ++i) pair[i] = vh_load(k[i] + d * 16);
          multiply<kMath>(y, pair, q + d, w.hd);
        }
      }
    }
    GM_UNROLL(12)
    for (int r = 0; r < kRows; ++r) {
      GM_UNROLL(4)
      for (int i = 0; i < kWide; ++i) {
        float* s = w.s + (row + r) * kTile + (b + i) * 16;
        if constexpr (codes(kMath)) {
          if (w.base != nullptr) {
            vf_store(s, (y[r][i] + vf_set1(w.base[row + r])) * scale);
            continue;
          }
          // Groups ascending.
          const vf key = vf_load_bf16(w.k_scale[b + i] + begin / kKvGroup * kBlock);
          const vf sum = begin == 0 ? y[r][i] * key : vf_fma(y[r][i], key, vf_load(s));
          vf_store(s, end < w.hd ? sum : sum * scale);
        } else {
          vf_store(s, y[r][i] * scale);
        }
      }
    }
  }
}

// o = o * factor + p v for kWide blocks of 16 dimensions from dimension d on.
template <Math kMath, int kRows, int kWide>
void values(const Work<kMath>& w, int64_t row, int64_t d) {
  vf y[kRows][kWide];
  GM_UNROLL(12)
  for (int r = 0; r < kRows; ++r) {
    const vf factor = vf_set1(w.factor[row + r]);
    GM_UNROLL(4)
    for (int i = 0; i < kWide; ++i) {
      float* o = w.o + (row + r) * w.hd + d + 16 * i;
      y[r][i] = vf_load(o) * factor;
      if (codes(kMath) && w.sum != nullptr) {
        vf_store(o, vf_fma(vf_load(w.v_base + d + 16 * i), vf_set1(w.sum[row + r]), y[r][i]));
        y[r][i] = vf_zero();
      }
    }
  }
  const auto* all = w.p + d / w.group * w.ldp + row * kTile;
  for (int64_t first = 0; first < w.keys; first += kBlock) {
    const auto *v = w.v[first / kBlock], *ahead = row == 0 ? w.v_ahead[first / kBlock] : v;
    const auto* p = all + first;
    const int64_t n = least(kBlock, w.keys - first);
    if constexpr (codes(kMath)) {
      for (int64_t octet = 0; octet < n; octet += 8) {
        vh words[kWide];
        for (int i = 0; i < kWide; ++i) {
          const int64_t at = (octet / 8 * w.hd + d + 16 * i) * 2;
          words[i] = vh_load(v + at);
          if constexpr (kRows <= 4) prefetch_far(ahead + at);
        }
        GM_UNROLL(4)
        for (int64_t j = octet; j < octet + 8; j += 2) {
          if (j >= n) break;
          vh pair[kWide];
          GM_UNROLL(4)
          for (int i = 0; i < kWide; ++i) {
            pair[i] = vh_codes(words[i]);
            words[i] = vh_next_codes(words[i]);
          }
          multiply<kMath>(y, pair, p + j, kTile);
        }
      }
    } else {
      // bf16: a pair of tokens is [hd][2]; f32: two rows of [hd].
      constexpr int64_t kPair = kMath == Math::kF32 ? 1 : 2;
      for (int64_t j = 0; j < n; j += 2) {
        const typename Work<kMath>::Stored* at[kWide];
        for (int i = 0; i < kWide; ++i) at[i] = v + j * w.hd + (d + i * 16) * kPair;
        if constexpr (kRows <= 4) {
          for (int i = 0; i < kWide; ++i) prefetch_far(ahead + j * w.hd + (d + i * 16) * kPair);
        }
        if constexpr (kMath == Math::kF32) {
          multiply_f32(y, at, w.hd, p + j, kTile);
        } else {
          vh pair[kWide];
          for (int i = 0; i < kWide; ++i) pair[i] = vh_load(at[i]);
          multiply<kMath>(y, pair, p + j, kTile);
        }
      }
    }
  }
  GM_UNROLL(12)
  for (int r = 0; r < kRows; ++r) {
    GM_UNROLL(4)
    for (int i = 0; i < kWide; ++i) {
      float* o = w.o + (row + r) * w.hd + d + 16 * i;
      if (codes(kMath) && w.sum != nullptr) {
        y[r][i] = vf_fma(y[r][i], vf_load(w.v_scale_of + d + 16 * i), vf_load(o));
      }
      vf_store(o, y[r][i]);
    }
  }
}

template <Math kMath, int kRows>
void score_rows(const Work<kMath>& w, int64_t row) {
  const int64_t blocks = (w.keys + kBlock - 1) / kBlock;
  int64_t b = 0;
  if constexpr (kRows <= 4) {
    for (; b + 4 <= blocks; b += 4) scores<kMath, kRows, 4>(w, row, b);
  } else {
    for (; b + 2 <= blocks; b += 2) scores<kMath, kRows, 2>(w, row, b);
  }
  for (; b < blocks; ++b) scores<kMath, kRows, 1>(w, row, b);
}

template <Math kMath, int kRows>
void value_rows(const Work<kMath>& w, int64_t row) {
  int64_t d = 0;
  if constexpr (kRows <= 4) {
    for (; d + 64 <= w.hd; d += 64) values<kMath, kRows, 4>(w, row, d);
  } else {
    for (; d + 32 <= w.hd; d += 32) values<kMath, kRows, 2>(w, row, d);
  }
  for (; d < w.hd; d += 16) values<kMath, kRows, 1>(w, row, d);
}

template <Math kMath, template <Math, int> class Fn>
void in_tiles(const Work<kMath>& w, int64_t begin, int64_t rows) {
  int64_t r = begin;
  if constexpr (kTileRows >= 12) {
    for (; r + 12 <= rows; r += 12) Fn<kMath, 12>::run(w, r);
    for (; r + 6 <= rows; r += 6) Fn<kMath, 6>::run(w, r);
  }
  if constexpr (kTileRows >= 4) {
    for (; r + 4 <= rows; r += 4) Fn<kMath, 4>::run(w, r);
    for (; r + 3 <= rows; r += 3) Fn<kMath, 3>::run(w, r);
    for (; r + 2 <= rows; r += 2) Fn<kMath, 2>::run(w, r);
  }
  for (; r < rows; ++r) Fn<kMath, 1>::run(w, r);
}
template <Math kMath, int kRows>
struct ScoreTile {
  static void run(const Work<kMath>& w, int64_t row) { score_rows<kMath, kRows>(w, row); }
};
template <Math kMath, int kRows>
struct ValueTile {
  static void run(const Work<kMath>& w, int64_t row) { value_rows<kMath, kRows>(w, row); }
};

#ifdef GM_TILES
constexpr bool kHasTiles = true;

// Columns of a step, in pairs of which the tiles of keys and values consist.
int64_t tile_step(int64_t hd) { return hd % 32 == 0 ? 32 : 16; }

// Tiles 0 to 3 hold sums, 4 and 5 rows, 6 and 7 keys or values.
TileConfig tile_config(int64_t rows, int64_t step) {
  TileConfig config;
  for (int t = 0; t < 4; ++t) config.shape(t, least(rows, 16), 64);
  for (int t = 4; t < 6; ++t) config.shape(t, least(rows, 16), step * 2);
  for (int t = 6; t < 8; ++t) config.shape(t, step / 2, 64);
  return config;
}

// c(i, j) += a(i) b(j) over the steps; i < kHigh tiles of rows, j < kWide of columns. Strides in bytes.
struct Products {
  const uint16_t *a[2], *b[2];
  int64_t a_stride, b_stride;  // between rows
  int64_t a_step, b_step;      // between steps, in numbers
  int64_t steps;
};
template <int kHigh, int kWide>
inline void tile_products(Tiles& tiles, const Products& x, Ahead& ahead) {
  for (int64_t i = 0; i < x.steps; ++i) {
    tiles.template load<4>(x.a[0] + i * x.a_step, x.a_stride);
    ahead.fetch();
    tiles.template load<6>(x.b[0] + i * x.b_step, x.b_stride);
    tiles.template dot_bf16<0, 4, 6>();
    if constexpr (kWide == 2) {
      ahead.fetch();
      tiles.template load<7>(x.b[1] + i * x.b_step, x.b_stride);
      tiles.template dot_bf16<1, 4, 7>();
    }
    if constexpr (kHigh == 2) {
      tiles.template load<5>(x.a[1] + i * x.a_step, x.a_stride);
      tiles.template dot_bf16<2, 5, 6>();
    }
    if constexpr (kHigh == 2 && kWide == 2) tiles.template dot_bf16<3, 5, 7>();
  }
}
template <int kHigh, int kWide>
inline void zero(Tiles& tiles) {
  tiles.template zero<0>();
  if constexpr (kWide == 2) tiles.template zero<1>();
  if constexpr (kHigh == 2) tiles.template zero<2>();
  if constexpr (kHigh == 2 && kWide == 2) tiles.template zero<3>();
}
// Of [16 kHigh rows][ld floats], 16 kWide of a row.
template <int kHigh, int kWide>
inline void load(Tiles& tiles, const float* from, int64_t ld) {
  tiles.template load<0>(from, ld * 4);
  if constexpr (kWide == 2) tiles.template load<1>(from + 16, ld * 4);
  if constexpr (kHigh == 2) tiles.template load<2>(from + 16 * ld, ld * 4);
  if constexpr (kHigh == 2 && kWide == 2) tiles.template load<3>(from + 16 * ld + 16, ld * 4);
}
template <int kHigh, int kWide>
inline void store(Tiles& tiles, float* to, int64_t ld) {
  tiles.template store<0>(to, ld * 4);
  if constexpr (kWide == 2) tiles.template store<1>(to + 16, ld * 4);
  if constexpr (kHigh == 2) tiles.template store<2>(to + 16 * ld, ld * 4);
  if constexpr (kHigh == 2 && kWide == 2) tiles.template store<3>(to + 16 * ld + 16, ld * 4);
}

// Rows that fill a tile are loaded whole: there is room behind the last ones.
template <class Fn>
void in_squares(int64_t rows, int64_t columns, Fn fn) {
  for (int64_t r = 0; r < rows; r += 32) {
    for (int64_t c = 0; c < columns; c += 32) {
      const bool high = rows - r > 16, wide = columns - c > 16;
      if (high) {
        wide ? fn.template operator()<2, 2>(r, c) : fn.template operator()<2, 1>(r, c);
      } else {
        wide ? fn.template operator()<1, 2>(r, c) : fn.template operator()<1, 1>(r, c);
      }
    }
  }
}

// s = q k, not scaled yet.
void tile_scores(Tiles& tiles, const Work<Math::kBf16>& w, int64_t rows) {
  const int64_t step = tile_step(w.hd), blocks = (w.keys + kBlock - 1) / kBlock;
  Ahead ahead(w.k_ahead[0], w.ahead * w.hd * 2, kTile / kBlock * w.hd / step);
  in_squares(rows, blocks * kBlock, [&]<int kHigh, int kWide>(int64_t r, int64_t c) {
    const int64_t b = c / kBlock;
    const uint16_t* q = w.q + r * w.hd;
    zero<kHigh, kWide>(tiles);
    tile_products<kHigh, kWide>(
        tiles,
        {{q, q + 16 * w.hd}, {w.k[b], w.k[b + kWide - 1]}, w.hd * 2, 64, step, step * kBlock, w.hd / step},
        ahead);
    store<kHigh, kWide>(tiles, w.s + r * kTile + c, kTile);
  });
  ahead.fetch_all();
}

// o = o * factor + p v. The blocks of a tile lie one after the other; `edge` takes the step that the last
// keys do not fill, [step / 2][hd][2].
void tile_values(Tiles& tiles, const Work<Math::kBf16>& w, int64_t rows, uint16_t* edge) {
  const int64_t hd = w.hd, step = tile_step(hd), whole = w.keys / step, left = w.keys - whole * step;
  Ahead ahead(w.v_ahead[0], w.ahead * hd * 2, kTile / step * hd / 16);
  if (left > 0) {
    const size_t there = static_cast<size_t>((left + 1) / 2 * hd) * 4;
    memcpy(edge, w.v[0] + whole * step * hd, there);
    memset(reinterpret_cast<char*>(edge) + there, 0, static_cast<size_t>(step * hd) * 2 - there);
  }
  for (int64_t r = 0; r < rows; ++r) {
    if (w.factor[r] == 1.0f) continue;
    const vf factor = vf_set1(w.factor[r]);
    for (float* o = w.o + r * hd; o < w.o + (r + 1) * hd; o += 16) vf_store(o, vf_load(o) * factor);
  }
  in_squares(rows, hd, [&]<int kHigh, int kWide>(int64_t r, int64_t c) {
    const uint16_t* p = w.p + r * kTile;
    const uint16_t *v = w.v[0] + c * 2, *end = edge + c * 2;
    Products x = {
        {p, p + 16 * kTile}, {v, v + 32}, kTile * 2, hd * 4, step, step * hd, whole,
    };
    load<kHigh, kWide>(tiles, w.o + r * hd + c, hd);
    tile_products<kHigh, kWide>(tiles, x, ahead);
    if (left > 0) {
      for (int i = 0; i < 2; ++i) x.a[i] += whole * step;
      x.b[0] = end;
      x.b[1] = end + 32;
      x.steps = 1;
      tile_products<kHigh, kWide>(tiles, x, ahead);
    }
    store<kHigh, kWide>(tiles, w.o + r * hd + c, hd);
  });
  ahead.fetch_all();
}
#else
constexpr bool kHasTiles = false;
#endif

// The two products of an item: of rows from `begin` on with a tile's keys, and with its values.
template <Math kMath>
struct Multiply {
  static constexpr bool kScales = true;  // whether scores have their scale
  Multiply(int64_t, int64_t) {}
  void scores(const Work<kMath>& w, int64_t begin, int64_t rows) {
    in_tiles<kMath, ScoreTile>(w, begin, rows);
  }
  void values(const Work<kMath>& w, int64_t begin, int64_t rows, uint16_t*) {
    in_tiles<kMath, ValueTile>(w, begin, rows);
  }
};
#ifdef GM_TILES
template <>
struct Multiply<Math::kBf16> {
  static constexpr bool kScales = false;
  Tiles tiles;
  Multiply(int64_t rows, int64_t hd) : tiles(tile_config(rows, tile_step(hd))) {}
  void scores(const Work<Math::kBf16>& w, int64_t, int64_t rows) { tile_scores(tiles, w, rows); }
  void values(const Work<Math::kBf16>& w, int64_t, int64_t rows, uint16_t* edge) {
    tile_values(tiles, w, rows, edge);
  }
};
#endif

inline void store_p(uint16_t* p, vf x) { vf_store_bf16(p, x); }
inline void store_p(float* p, vf x) { vf_store(p, x); }
// Of vf_exp, which is 0 or at least exp(-87).
inline void store_exp(uint16_t* p, vf x) { vf_store_bf16_normal(p, x); }
inline void store_exp(float* p, vf x) { vf_store(p, x); }
inline vf load_p(const uint16_t* p) { return vf_load_bf16(p); }
inline vf load_p(const float* p) { return vf_load(p); }

int64_t row_limit(const AttentionArgs& a) { return block_tokens(a) * group_of(a); }
int64_t p_groups(const AttentionArgs& a) { return a.kv == KvFormat::kInt4 ? kv_groups(a.head_dim) : 1; }

// Scratch of one item, rows padded to whole vectors.
struct Scratch {
  void* q;
  float *rotated, *s, *o, *m, *l, *factor, *lanes;
  float *total, *total_m, *total_l;
  void* p;
  uint16_t* edge;
  // Int4 by channel: a group, queries as they are and times a tile's scales, and what Work names.
  float *group, *wide, *base, *sum, *k_scale, *k_base, *v_scale, *v_base;
  void* scaled;
  Scratch(const AttentionArgs& a, void* memory) {
    const int64_t rows = (row_limit(a) + 15) / 16 * 16, hd = a.head_dim;
    float* at = static_cast<float*>(memory);
    auto take = [&at](int64_t n) {
      float* r = at;
      at += (n + 15) / 16 * 16;
      return r;
    };
    q = take(rows * hd);
    rotated = take(2 * hd);
    s = take(rows * kTile);
    p = take(p_groups(a) * rows * kTile);
    o = take(rows * hd);
    m = take(rows);
    l = take(rows);
    factor = take(rows);
    lanes = take(256);
    total = take(rows * hd);
    total_m = take(rows);
    total_l = take(rows);
    edge = reinterpret_cast<uint16_t*>(kHasTiles ? take(16 * hd) : nullptr);
    if (!by_channel(a)) return;
    group = take(Group::floats(a));
    wide = take(rows * hd);
    scaled = take(rows * hd);
    base = take(rows);
    sum = take(rows);
    k_scale = take(hd);
    k_base = take(hd);
    v_scale = take(hd);
    v_base = take(hd);
  }
  static int64_t bytes(const AttentionArgs& a) {
    const int64_t rows = (row_limit(a) + 15) / 16 * 16;
    return 4 * (rows * (3 * a.head_dim + (1 + p_groups(a)) * kTile + 5) + 2 * a.head_dim + 256 + 12 * 16) +
           (kHasTiles ? 64 * a.head_dim : 0) + 64 +
           (by_channel(a) ? 4 * (Group::floats(a) + rows * (2 * a.head_dim + 2) + 4 * a.head_dim + 9 * 16)
                          : 0);
  }
};

// exp(from - to), and 0 where nothing has been seen yet (to = -inf).
void factors(vf from, vf to, float* out) {
  // -inf - -inf is NaN, which the maximum turns into its second operand.
  vf_store(out, vf_exp_below_88(vf_max(from - to, vf_set1(-1e30f))));
}

// Masks the scores of a tile that an item's rows do not see.
void mask(const AttentionArgs& a, const Item& item, int64_t tile, float* s) {
  const int64_t group = group_of(a);
  for (int64_t t = 0; t < item.tokens; ++t) {
    const int64_t position = item.sequence->start + item.token + t;
    const int64_t low = first_key(a, position) - tile, high = position + 1 - tile;
    if (low <= 0 && high >= kTile) continue;
    for (float* row = s + t * group * kTile; row < s + (t + 1) * group * kTile; row += kTile) {
      for (int64_t j = 0; j < kTile; j += 16) {
        if (low >= j + 16 || high <= j) {
          vf_store(row + j, vf_set1(kMasked));
          continue;
        }
        for (int64_t i = j; i < least(low, j + 16); ++i) row[i] = kMasked;
        for (int64_t i = most(high, j); i < j + 16; ++i) row[i] = kMasked;
      }
    }
  }
}

// Points at the tile two further on, in this item or the next: the hardware looks ahead within a run only.
// Without one the lines asked for are those at hand.
template <Math kMath>
void point_ahead(const AttentionArgs& a, const Item& item, const Item* next, int64_t n, int64_t tiles,
                 Work<kMath>& w) {
  using Stored = typename Types<kMath>::Stored;
  n += 2;
  const Item* of = &item;
  if (n >= tiles) {
    of = next;
    n -= tiles;
  }
  for (int64_t b = 0; b * kBlock < w.keys; ++b) {
    w.k_ahead[b] = w.k[b];
    w.v_ahead[b] = w.v[b];
  }
  w.ahead = 0;
  if (item.partial < 0 || of == nullptr) return;
  const int64_t begin = span_from(a, *of, of->span_begin), to = span_to(*of, of->span_begin);
  const int64_t from = begin + least(n, (to - begin - 1) / kTile) * kTile;
  w.ahead = least(kTile, (to - from + kBlock - 1) / kBlock * kBlock);
  for (int64_t b = 0; b * kBlock < w.keys && from + b * kBlock < to; ++b) {
    const int64_t at = of->sequence->kv.tile_at(from + b * kBlock, of->kv_head);
    w.k_ahead[b] = reinterpret_cast<const Stored*>(of->sequence->kv.k + at);
    w.v_ahead[b] = reinterpret_cast<const Stored*>(of->sequence->kv.v + at);
  }
}

// The same work over a tile of bf16.
template <class Plain, class Codes, class Query>
Plain as_plain(const Codes& w, const Query* q, const Group& g) {
  Plain plain;
  for (int64_t b = 0; b < kTile / kBlock; ++b) {
    plain.k[b] = plain.k_ahead[b] = g.k + b * kBlock * w.hd;
    plain.v[b] = plain.v_ahead[b] = g.v + b * kBlock * w.hd;
  }
  plain.keys = w.keys;
  plain.hd = plain.group = w.hd;
  plain.q = q;
  plain.p = w.p;
  plain.ldp = w.ldp;
  plain.s = w.s;
  plain.o = w.o;
  plain.factor = w.factor;
  plain.scale = w.scale;
  return plain;
}

// Queries times a tile's scales, and their products with its bases.
template <class Query>
void scale_queries(const Scratch& x, int64_t begin, int64_t end, int64_t hd, Query* scaled) {
  for (int64_t r = begin; r < end; ++r) {
    vf total = vf_zero();
    for (int64_t d = 0; d < hd; d += 16) {
      const vf q = vf_load(x.wide + r * hd + d);
      store_p(scaled + r * hd + d, q * vf_load(x.k_scale + d));
      total = vf_fma(q, vf_load(x.k_base + d), total);
    }
    x.base[r] = vf_sum(total);
  }
}

// Scales and bases of a tile's codes -8..7 by channel, as floats.
void tile_channels(const char* at, int64_t hd, float* scale, float* base) {
  const auto* stored = reinterpret_cast<const uint16_t*>(at);
  for (int64_t d = 0; d < hd; d += 16) {
    const vf s = vf_load_bf16(stored + d);
    vf_store(scale + d, s);
    vf_store(base + d, vf_fma(s, vf_set1(8.0f), vf_load_bf16(stored + hd + d)));
  }
}

template <Math kMath>
void run_item(const AttentionArgs& a, const Item& item, const Item* next, void* memory) {
  using Query = typename Types<kMath>::Query;
  using Stored = typename Types<kMath>::Stored;
  const AttentionSequence& s = *item.sequence;
  const Scratch x(a, memory);
  const int64_t hd = a.head_dim, group = group_of(a), rows = item.tokens * group;
  const int64_t padded = (rows + 15) / 16 * 16;
  auto* q = static_cast<Query*>(x.q);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t token = item.token + r / group;
    const int64_t head = item.kv_head * group + r % group;
    if (codes(kMath) && by_channel(a)) rotate_query(a, s, token, head, x.wide + r * hd);
    if constexpr (rounds(kMath)) {
      rotate_query(a, s, token, head, x.rotated);
      for (int64_t d = 0; d < hd; d += 16) vf_store_bf16(q + r * hd + d, vf_load(x.rotated + d));
    } else {
      rotate_query(a, s, token, head, q + r * hd);
    }
  }
  if (item.partial >= 0 && by_channel(a)) {
    const Filled filled(s);
    for (int64_t first = filled.begin; first < filled.end; first += kTile) {
      if (first / kSpan == item.span_begin) write_group(a, s, item.kv_head, first, Group(a, x.group));
    }
  } else if (item.partial >= 0) {
    for (int64_t t = 0; t < s.rows; ++t) {
      if ((s.start + t) / kSpan == item.span_begin) append(a, s, t, item.kv_head, t + 1 == s.rows, x.rotated);
    }
  }

  Work<kMath> w;
  w.hd = hd;
  w.q = q;
  w.group = codes(kMath) && !by_channel(a) ? kKvGroup : hd;
  w.base = w.sum = w.v_scale_of = w.v_base = nullptr;
  w.p = static_cast<Query*>(x.p);
  w.ldp = (row_limit(a) + 15) / 16 * 16 * kTile;
  w.s = x.s;
  w.o = x.o;
  w.factor = x.factor;
  w.scale = a.scale;
  constexpr Math kPlain = rounds(kMath) ? Math::kBf16 : Math::kWide;
  [[maybe_unused]] Work<kPlain> plain;
  if (codes(kMath) && by_channel(a)) {
    w.q = static_cast<Query*>(x.scaled);
    w.base = x.base;
    w.sum = x.sum;
    w.v_scale_of = x.v_scale;
    w.v_base = x.v_base;
  }
  Multiply<kMath> products(rows, hd);
  if (item.partial < 0) {
    for (int64_t r = 0; r < padded; ++r) x.total_m[r] = kMasked;
    memset(x.total_l, 0, static_cast<size_t>(padded) * 4);
    memset(x.total, 0, static_cast<size_t>(rows * hd) * 4);
  }
  for (int64_t span = item.span_begin; span < item.span_end; ++span) {
    for (int64_t r = 0; r < padded; ++r) x.m[r] = kMasked;
    memset(x.l, 0, static_cast<size_t>(padded) * 4);
    memset(x.o, 0, static_cast<size_t>(rows * hd) * 4);
    const int64_t from = span_from(a, item, span), to = span_to(item, span);
    const int64_t tiles = (to - from + kTile - 1) / kTile;
    for (int64_t tile = from; tile < to; tile += kTile) {
      w.keys = least(kTile, to - tile);
      for (int64_t b = 0; b * kBlock < w.keys; ++b) {
        const int64_t at = s.kv.tile_at(tile + b * kBlock, item.kv_head);
        w.k[b] = reinterpret_cast<const Stored*>(s.kv.k + at);
        w.v[b] = reinterpret_cast<const Stored*>(s.kv.v + at);
        const int64_t scales = s.kv.scales_at(tile + b * kBlock, item.kv_head);
        w.k_scale[b] = reinterpret_cast<const uint16_t*>(s.kv.k + scales);
        w.v_scale[b] = reinterpret_cast<const uint16_t*>(s.kv.v + scales);
      }
      point_ahead(a, item, next, (tile - from) / kTile, tiles, w);
      // Rows [0, own) meet the tile as bf16.
      int64_t own = 0;
      if constexpr (codes(kMath)) {
        if (by_channel(a)) {
          own = most(0, least(item.tokens, tile + kTile - s.start - item.token)) * group;
          if (own > 0) {
            const Group g(a, x.group);
            load_group(a, s, item.kv_head, tile, to, g);
            plain = as_plain<Work<kPlain>>(w, q, g);
            in_tiles<kPlain, ScoreTile>(plain, 0, own);
          }
          if (own < rows) {
            const int64_t scales = s.kv.scales_at(tile, item.kv_head);
            tile_channels(s.kv.k + scales, hd, x.k_scale, x.k_base);
            tile_channels(s.kv.v + scales, hd, x.v_scale, x.v_base);
            scale_queries(x, own, rows, hd, static_cast<Query*>(x.scaled));
          }
        }
      }
      products.scores(w, own, rows);
      // Sixteen rows at a time, so that what is one number of a row is one vector of all.
      mask(a, item, tile, x.s);
      for (int64_t r0 = 0; r0 < rows; r0 += 16) {
        const int64_t count = least(16, rows - r0);
        for (int64_t i = 0; i < count; ++i) {
          float* sr = x.s + (r0 + i) * kTile;
          vf part[4];
          GM_UNROLL(4)
          for (int j = 0; j < 4; ++j) {
            part[j] = vf_load(sr + 16 * j);
            if constexpr (!Multiply<kMath>::kScales) {
              part[j] = part[j] * vf_set1(a.scale);
              vf_store(sr + 16 * j, part[j]);
            }
          }
          vf_store(x.lanes + 16 * i, vf_max(vf_max(part[0], part[1]), vf_max(part[2], part[3])));
        }
        const vf before = vf_load(x.m + r0), m = vf_max(vf_max_rows(x.lanes, count), before);
        vf_store(x.m + r0, m);
        factors(before, m, x.factor + r0);
        alignas(64) float from[16];
        vf_store(from, vf_where_above(m, vf_set1(kMasked), m));
        for (int64_t i = 0; i < count; ++i) {
          const int64_t r = r0 + i;
          const vf top = vf_set1(from[i]);
          vf e[4];
          GM_UNROLL(4)
          for (int j = 0; j < 4; ++j) {
            // Above 0 only where the maximum was lost to a score that is no number.
            e[j] = vf_exp_below_88(vf_min(vf_zero(), vf_load(x.s + r * kTile + 16 * j) - top));
            Query* p = w.p + r * kTile + 16 * j;
            if (codes(kMath) && !by_channel(a)) {
              for (int64_t g = 0; 16 * j < w.keys && g < kv_groups(hd); ++g) {
                store_p(p + g * w.ldp, e[j] * vf_load_bf16(w.v_scale[j] + g * kBlock));
              }
            } else {
              store_exp(p, e[j]);
            }
          }
          vf_store(x.lanes + 16 * i, (e[0] + e[1]) + (e[2] + e[3]));
          if (codes(kMath) && r >= own && by_channel(a)) {
            const Query* p = w.p + r * kTile;
            x.sum[r] = vf_sum((load_p(p) + load_p(p + 16)) + (load_p(p + 32) + load_p(p + 48)));
          }
        }
        vf_store(x.l + r0, vf_load(x.l + r0) * vf_load(x.factor + r0) + vf_sum_rows(x.lanes, count));
      }
      if constexpr (codes(kMath)) {
        if (own > 0) in_tiles<kPlain, ValueTile>(plain, 0, own);
      }
      products.values(w, own, rows, x.edge);
    }
    if (item.partial >= 0) {
      for (int64_t r = 0; r < rows; ++r) {
        float* out = a.partials + (item.partial + r) * partial_stride(a);
        memcpy(out, x.o + r * hd, static_cast<size_t>(hd) * 4);
        out[hd] = x.m[r];
        out[hd + 1] = x.l[r];
      }
      return;
    }
    // The merge of attention_merge, with the spans at hand one after the other.
    float top[16], before[16], now[16];
    for (int64_t r0 = 0; r0 < rows; r0 += 16) {
      const vf m = vf_max(vf_load(x.total_m + r0), vf_load(x.m + r0));
      vf_store(top, m);
      factors(vf_load(x.total_m + r0), m, before);
      factors(vf_load(x.m + r0), m, now);
      for (int64_t r = r0; r < least(r0 + 16, rows); ++r) {
        const vf b = vf_set1(before[r - r0]), n = vf_set1(now[r - r0]);
        for (int64_t d = 0; d < hd; d += 16) {
          float* o = x.total + r * hd + d;
          vf_store(o, vf_fma(vf_load(x.o + r * hd + d), n, vf_load(o) * b));
        }
        x.total_l[r] = __builtin_fmaf(x.l[r], now[r - r0], x.total_l[r] * before[r - r0]);
        x.total_m[r] = top[r - r0];
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t token = item.token + r / group;
    float* out = a.out + (s.row + token) * a.ldo + (item.kv_head * group + r % group) * hd;
    const vf l = vf_set1(x.total_l[r]);
    for (int64_t d = 0; d < hd; d += 16) vf_store(out + d, vf_load(x.total + r * hd + d) / l);
  }
}

}  // namespace

bool attention_long(const AttentionArgs& a) {
  for (int64_t i = 0; i < a.sequence_count; ++i) {
    if (!is_short(a, a.sequences[i])) return true;
  }
  return false;
}

void attention_prepare(const AttentionArgs& a, int64_t row_begin, int64_t row_end, void* scratch) {
  for (int64_t i = 0; i < a.sequence_count; ++i) {
    const AttentionSequence& s = a.sequences[i];
    if (is_short(a, s)) continue;
    if (by_channel(a)) {
      // A group belongs to the range that its last token is in.
      const Filled filled(s);
      for (int64_t first = filled.begin; first < filled.end; first += kTile) {
        const int64_t last = s.row + first + kTile - 1 - s.start;
        if (last < row_begin || last >= row_end) continue;
        const Scratch x(a, scratch);
        for (int64_t h = 0; h < a.kv_heads; ++h) write_group(a, s, h, first, Group(a, x.group));
      }
      continue;
    }
    // Tokens of one tile share words: a tile belongs to the range that its first new token is in.
    auto cut = [&s](int64_t row) {
      const int64_t t = row - s.row;
      return t <= 0 ? 0 : least(s.rows, (s.start + t + kBlock - 1) / kBlock * kBlock - s.start);
    };
    for (int64_t t = cut(row_begin); t < cut(row_end); ++t) {
      for (int64_t h = 0; h < a.kv_heads; ++h)
        append(a, s, t, h, t + 1 == s.rows, static_cast<float*>(scratch));
    }
  }
}

int64_t attention_items(const AttentionArgs& a) {
  int64_t total = 0;
  for (int64_t i = 0; i < a.sequence_count; ++i) total += items_of(a, a.sequences[i]);
  return total;
}

int64_t attention_partial_floats(const AttentionArgs& a) {
  int64_t rows = 0;
  for (int64_t i = 0; i < a.sequence_count; ++i) rows += partial_rows(a, a.sequences[i]);
  return rows * partial_stride(a);
}

void attention_spans(const AttentionArgs& a, int64_t item_begin, int64_t item_end, void* scratch) {
  const bool plain = a.kv == KvFormat::kBf16;
  const auto run = a.kv == KvFormat::kF32 ? run_item<Math::kF32>
                   : a.bf16_math          ? (plain ? run_item<Math::kBf16> : run_item<Math::kCodes>)
                                          : (plain ? run_item<Math::kWide> : run_item<Math::kWideCodes>);
  // One more, which is not run: what is taken next most likely begins with it.
  Item item{};
  int64_t left = item_end - item_begin;
  bool first = true;
  each_item(a, item_begin, item_end + 1, [&](const Item& next) {
    if (!first) {
      run(a, item, next.partial >= 0 ? &next : nullptr, scratch);
      --left;
    }
    item = next;
    first = false;
  });
  if (left > 0) run(a, item, nullptr, scratch);
}

void attention_commit(const AttentionArgs& a, int64_t row_begin, int64_t row_end, void* scratch) {
  if (!by_channel(a)) return;
  const int64_t hd = a.head_dim;
  for (int64_t i = 0; i < a.sequence_count; ++i) {
    const AttentionSequence& s = a.sequences[i];
    const Filled filled(s);
    const bool same = filled.begin == filled.end;
    uint16_t *k_tail = same ? s.kv.k_tail : s.kv.k_tail_after,
             *v_tail = same ? s.kv.v_tail : s.kv.v_tail_after;
    const int64_t first = most(most(0, filled.end - s.start), row_begin - s.row);
    for (int64_t t = first; t < least(s.rows, row_end - s.row); ++t) {
      for (int64_t h = 0; h < a.kv_heads; ++h) {
        const int64_t at = (h * kTile + s.start + t - filled.end) * hd;
        auto* key = static_cast<float*>(scratch);
        rotate_key(a, s, t, h, key);
        for (int64_t d = 0; d < hd; d += 16) {
          vf_store_bf16(k_tail + at + d, vf_load(key + d));
          vf_store_bf16(v_tail + at + d, vf_load(a.v + (s.row + t) * a.ldv + h * hd + d));
        }
      }
    }
  }
}

void attention_merge(const AttentionArgs& a, int64_t row_begin, int64_t row_end) {
  const int64_t hd = a.head_dim, stride = partial_stride(a), group = group_of(a);
  int64_t partial = 0;
  for (int64_t i = 0; i < a.sequence_count; ++i) {
    const AttentionSequence& s = a.sequences[i];
    if (s.rows == 0 || !is_short(a, s)) continue;
    const int64_t spans = span_count(a, s), span_stride = a.heads * s.rows * stride;
    for (int64_t t = most(0, row_begin - s.row); t < least(s.rows, row_end - s.row); ++t) {
      for (int64_t h = 0; h < a.heads; ++h) {
        const float* first =
            a.partials + (partial + (h / group) * s.rows * group + t * group + h % group) * stride;
        float* out = a.out + (s.row + t) * a.ldo + h * hd;
        if (spans == 1) {
          const vf l = vf_set1(first[hd + 1]);
          // As merging with nothing: the factors are 0 and 1.
          for (int64_t d = 0; d < hd; d += 16) vf_store(out + d, vf_load(first + d) / l);
          continue;
        }
        alignas(64) float m[16], top[16], before[16], now[16];
        for (int j = 0; j < 16; ++j) m[j] = kMasked;
        float l = 0;
        for (int64_t d = 0; d < hd; d += 16) vf_store(out + d, vf_zero());
        for (int64_t n = 0; n < spans; ++n) {
          const float* from = first + n * span_stride;
          const vf m_span = vf_set1(from[hd]);
          const vf larger = vf_max(vf_load(m), m_span);
          vf_store(top, larger);
          factors(vf_load(m), larger, before);
          factors(m_span, larger, now);
          const vf b = vf_set1(before[0]), f = vf_set1(now[0]);
          for (int64_t d = 0; d < hd; d += 16) {
            vf_store(out + d, vf_fma(vf_load(from + d), f, vf_load(out + d) * b));
          }
          l = __builtin_fmaf(from[hd + 1], now[0], l * before[0]);
          memcpy(m, top, 64);
        }
        const vf total = vf_set1(l);
        for (int64_t d = 0; d < hd; d += 16) vf_store(out + d, vf_load(out + d) / total);
      }
    }
    partial += partial_rows(a, s);
  }
}

int64_t attention_scratch_bytes(const AttentionArgs& a) { return Scratch::bytes(a); }

}  // namespace gm::GM_LEVEL
