// The memory of sequences' keys and values: static ranges per sequence, [span of 256 tokens][layer][KV
// head][256].
#pragma once

#include <cstdint>
#include <vector>

#include "gristmill/kernel.h"
#include "runtime/arena.h"

namespace gm {

// One layer's state. Layers of equal window share a range; window 0 keeps every token.
struct KvLayer {
  int64_t window = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
  KvFormat format = KvFormat::kBf16;
};

struct KvGeometry {
  std::vector<KvLayer> layers;
  int64_t max_step = 512;  // most tokens of one sequence in one step, for the rings of windowed layers

  static int64_t tile_bytes(const KvLayer& l) {
    const int64_t bits = l.format == KvFormat::kF32 ? 32 : l.format == KvFormat::kBf16 ? 16 : 4;
    return kTileTokens * l.head_dim * bits / 8;
  }
  static int64_t scale_bytes(const KvLayer& l) {
    return l.format == KvFormat::kInt4 ? kv_groups(l.head_dim) * kTileTokens * 2 : 0;
  }
  // Of one span, keys or values.
  static int64_t head_bytes(const KvLayer& l) {
    return kSpanTokens / kTileTokens * (tile_bytes(l) + scale_bytes(l));
  }
  static int64_t layer_bytes(const KvLayer& l) { return l.kv_heads * head_bytes(l); }
  // Spans that the ring of a window needs, 0 for a global layer.
  int64_t ring_spans(int64_t window) const {
    return window == 0 ? 0 : (window + max_step + kSpanTokens - 1) / kSpanTokens + 1;
  }
};

// One sequence's keys and values in every layer: a view of a single segment over memory of its own.
class KvView {
 public:
  KvView(const KvGeometry& geometry, int64_t capacity);

  int64_t capacity() const { return capacity_; }
  int64_t length() const { return length_; }
  int64_t reserved_bytes() const { return static_cast<int64_t>(keys_.bytes() + values_.bytes()); }
  // Bytes of the spans that hold tokens.
  int64_t used_bytes() const;
  // Forgets the tokens from `length` on. Throws std::invalid_argument where a sliding-window ring no longer
  // holds the keys that the shorter sequence would see.
  void truncate(int64_t length);
  void append(int64_t tokens);
  KvSegment segment(int64_t layer) const;

 private:
  struct Range {  // layers of one window
    int64_t window = 0, ring = 0, spans = 0, span_bytes = 0, offset = 0;
  };
  KvGeometry geometry_;
  int64_t capacity_ = 0, length_ = 0, highest_ = 0;
  std::vector<Range> ranges_;
  std::vector<int64_t> layer_range_, layer_offset_;
  Arena keys_, values_;
};

}  // namespace gm
