#include "runtime/kv.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace gm {

KvView::KvView(const KvGeometry& geometry, int64_t capacity) : geometry_(geometry), capacity_(capacity) {
  if (capacity < 1) throw std::invalid_argument("a sequence needs a capacity of at least one token");
  const int64_t all_spans = (capacity + kSpanTokens - 1) / kSpanTokens;
  for (const KvLayer& layer : geometry_.layers) {
    auto at = std::find_if(ranges_.begin(), ranges_.end(),
                           [&](const Range& r) { return r.window == layer.window; });
    if (at == ranges_.end()) {
      Range r;
      r.window = layer.window;
      r.ring = geometry_.ring_spans(layer.window);
      // A window that never fills needs no ring.
      if (r.ring >= all_spans) r.ring = 0;
      r.spans = r.ring != 0 ? r.ring : all_spans;
      ranges_.push_back(r);
      at = ranges_.end() - 1;
    }
    layer_range_.push_back(at - ranges_.begin());
    layer_offset_.push_back(at->span_bytes);
    at->span_bytes += geometry_.layer_bytes(layer);
  }
  int64_t total = 0;
  for (Range& r : ranges_) {
    r.offset = total;
    total += r.spans * r.span_bytes;
  }
  keys_ = Arena(static_cast<size_t>(total), true);
  values_ = Arena(static_cast<size_t>(total), true);
}

int64_t KvView::used_bytes() const {
  int64_t total = 0;
  const int64_t spans = (length_ + kSpanTokens - 1) / kSpanTokens;
  for (const Range& r : ranges_) total += 2 * std::min(spans, r.spans) * r.span_bytes;
  return total;
}

void KvView::truncate(int64_t length) {
  if (length < 0 || length > length_) {
    throw std::invalid_argument("cannot truncate a sequence of " + std::to_string(length_) + " tokens to " +
                                std::to_string(length));
  }
  for (const Range& r : ranges_) {
    if (r.ring == 0 || length == 0) continue;
    // Oldest token that the ring still holds, and oldest that the next row will see.
    const int64_t held = highest_ - (r.ring - 1) * kSpanTokens;
    if (length != length_ && length - (r.window - 1) < held && held > 0) {
      throw std::invalid_argument("cannot truncate to " + std::to_string(length) +
                                  " tokens: the sliding window has moved on");
    }
  }
  length_ = length;
  if (length == 0) highest_ = 0;
}

void KvView::append(int64_t tokens) {
  length_ += tokens;
  highest_ = std::max(highest_, length_);
}

KvSegment KvView::segment(int64_t layer) const {
  const auto i = static_cast<size_t>(layer);
  const Range& r = ranges_[static_cast<size_t>(layer_range_[i])];
  KvSegment s;
  s.k = keys_.data() + r.offset + layer_offset_[i];
  s.v = values_.data() + r.offset + layer_offset_[i];
  s.span_bytes = r.span_bytes;
  s.head_bytes = KvGeometry::head_bytes(geometry_.layers[i]);
  s.tile_bytes = KvGeometry::tile_bytes(geometry_.layers[i]);
  s.scale_bytes = KvGeometry::scale_bytes(geometry_.layers[i]);
  s.ring = r.ring;
  return s;
}

}  // namespace gm
