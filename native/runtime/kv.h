// The memory of sequences' keys and values, after vAttention (Prabhu et al., ASPLOS 2025, arXiv 2405.04437):
// address space is reserved, pages are committed as they are written, and sequences with a common beginning
// share it.
//
// Memory is handed out in frames: one span of 256 tokens of all layers with the same window, [layer][KV
// head][256] keys and then values. A frame belongs to whoever refers to it, views and caches of prefixes;
// what is shared is copied by the view that wants to write over it.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "gristmill/kernel.h"
#include "runtime/arena.h"

namespace gm {

// One layer's state. Window 0 keeps every token.
struct KvLayer {
  int64_t window = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
  KvFormat format = KvFormat::kBf16;
};

struct KvGeometry {
  std::vector<KvLayer> layers;

  static int64_t tile_bytes(const KvLayer& l) {
    const int64_t bits = l.format == KvFormat::kF32 ? 32 : l.format == KvFormat::kBf16 ? 16 : 4;
    return kTileTokens * l.head_dim * bits / 8;
  }
  static int64_t scale_bytes(const KvLayer& l) {
    if (l.format == KvFormat::kInt4Channel) return 2 * 2 * l.head_dim * kTileTokens / kKvChannelGroup;
    return l.format == KvFormat::kInt4 ? kv_groups(l.head_dim) * kTileTokens * 2 : 0;
  }
  // Of one span, keys or values.
  static int64_t head_bytes(const KvLayer& l) {
    return kSpanTokens / kTileTokens * (tile_bytes(l) + scale_bytes(l));
  }
  static int64_t layer_bytes(const KvLayer& l) { return l.kv_heads * head_bytes(l); }
  // Of a layer's tail of one group.
  static int64_t tail_bytes(const KvLayer& l) {
    return l.format == KvFormat::kInt4Channel ? kKvChannelGroup * l.kv_heads * l.head_dim * 2 : 0;
  }
};

// No memory, or no mapping, is left for more keys and values.
class KvExhausted : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// How a view's frames come to be one after the other.
enum class KvPlacement : int32_t {
  // They need not: kernels look each span up. The memory is anonymous, on huge pages where they are granted.
  kTable = 0,
  // They are mapped so, page by page, from a memory file that all views share. Where there are no memory
  // files: from an unlinked file of shared memory.
  kMapped = 1,
};

class KvPool;

// One frame; gives itself back when the last reference goes. Only the thread that runs the steps makes and
// drops references.
class KvFrame {
 public:
  KvFrame(std::shared_ptr<KvPool> pool, size_t range, int64_t index)
      : pool_(std::move(pool)), range_(range), index_(index) {}
  ~KvFrame();
  KvFrame(const KvFrame&) = delete;
  KvFrame& operator=(const KvFrame&) = delete;

  char* data() const;
  int64_t index() const { return index_; }
  // Tokens that somebody has written or is about to: a view with this many may append in place although
  // others share the frame.
  int64_t filled = 0;

 private:
  std::shared_ptr<KvPool> pool_;
  size_t range_;
  int64_t index_;
};

using FrameRef = std::shared_ptr<KvFrame>;

// The frames of one span in all ranges of layers; a null one was given up, being behind the window.
struct KvSpan {
  std::vector<FrameRef> frames;
};

// All keys and values of a program's sequences.
class KvPool : public std::enable_shared_from_this<KvPool> {
 public:
  struct Range {  // layers of one window
    int64_t window = 0;
    int64_t half_bytes = 0;   // keys, or values, of a span
    int64_t frame_bytes = 0;  // in whole pages
    std::vector<int64_t> layers;
  };
  struct Stats {
    int64_t limit = 0;      // bytes that frames may take
    int64_t used = 0;       // bytes of frames that somebody refers to
    int64_t committed = 0;  // bytes of pages that the system has given
    int64_t reserved = 0;   // bytes of address space of all views, or of the table's memory
    int64_t frames = 0, mappings = 0, mapping_limit = 0;
  };

  // limit_bytes 0: all of the machine's memory. poison: -1, or a byte to fill frames with when they are
  // handed out. memfd: false uses the file that stands in where there is no memfd. Throws std::bad_alloc if
  // the address space cannot be reserved, and std::runtime_error if the file cannot be made.
  KvPool(const KvGeometry& geometry, int64_t limit_bytes, KvPlacement placement, int poison = -1,
         bool memfd = true);
  ~KvPool();
  KvPool(const KvPool&) = delete;
  KvPool& operator=(const KvPool&) = delete;

  const KvGeometry& geometry() const { return geometry_; }
  const std::vector<Range>& ranges() const { return ranges_; }
  size_t range_of(int64_t layer) const { return layer_range_[static_cast<size_t>(layer)]; }
  int64_t offset_of(int64_t layer) const { return layer_offset_[static_cast<size_t>(layer)]; }
  int64_t tail_offset_of(int64_t layer) const { return layer_tail_[static_cast<size_t>(layer)]; }
  int64_t tail_bytes() const { return tail_bytes_; }
  KvPlacement placement() const { return placement_; }
  // "memfd", "shm" or "anonymous".
  const std::string& backing() const { return backing_; }
  int64_t limit() const { return limit_; }
  // Bytes of frames that somebody refers to.
  int64_t used() const { return used_; }
  // Frames of a range that can still be had.
  bool has_room(int64_t bytes) const { return used_ + bytes <= limit_; }
  Stats stats() const;
  // Gives pages of frames that nobody refers to back to the system, all but `keep` bytes.
  void trim(int64_t keep);

  // Throws KvExhausted.
  FrameRef take(size_t range);
  // Mapped: takes the pool's own view of a frame, through which it was copied, out of the page tables, so
  // that it does not count as this process's memory any longer.
  void unsee(size_t range, const KvFrame& frame) const;
  // Maps a frame at an address, in place of another one or not, or (null) takes away what is mapped there.
  // Throws KvExhausted.
  void map(size_t range, char* at, const KvFrame* frame, bool replaces);

 private:
  friend class KvFrame;
  friend class KvView;
  struct Store {
    int file = -1;
    int64_t offset = 0;  // of the range in the file
    Arena arena;         // table
    char* base = nullptr;
    size_t base_bytes = 0;
    int64_t fresh = 0, most = 0;  // frames that were never handed out begin here; all frames
    std::vector<int64_t> warm;    // free, with pages
    std::vector<int64_t> cold;    // free, without
  };
  std::string no_mapping() const;
  void give_back(size_t range, int64_t index);
  void punch(size_t range, int64_t index);

  KvGeometry geometry_;
  KvPlacement placement_;
  std::string backing_;
  std::vector<Range> ranges_;
  std::vector<size_t> layer_range_;
  std::vector<int64_t> layer_offset_, layer_tail_;
  int64_t tail_bytes_ = 0;
  std::vector<Store> stores_;
  int64_t limit_ = 0, used_ = 0, warm_bytes_ = 0, frames_ = 0;
  int64_t reserved_ = 0, mappings_ = 0, mapping_limit_ = 0;
  int poison_;
  mutable std::mutex mutex_;
};

// One sequence's keys and values in every layer.
class KvView {
 public:
  // Throws std::bad_alloc if there is no address space for the capacity, KvExhausted without a mapping for
  // it.
  KvView(std::shared_ptr<KvPool> pool, int64_t capacity);
  ~KvView();
  KvView(const KvView&) = delete;
  KvView& operator=(const KvView&) = delete;

  int64_t capacity() const { return capacity_; }
  int64_t length() const { return length_; }
  int64_t reserved_bytes() const { return reserved_; }
  // Bytes of the frames that hold tokens, shared ones included, and of the tails.
  int64_t used_bytes() const;
  // Makes the places of the next tokens writable. Throws KvExhausted with nothing changed.
  void prepare(int64_t tokens);
  // Bytes of frames that `prepare` would take.
  int64_t wanted_bytes(int64_t tokens) const;
  // Counts the tokens of a completed step, and gives up what lies behind the windows.
  void append(int64_t tokens);
  // Forgets the tokens from `length` on. Throws std::invalid_argument where a sliding window no longer holds
  // the keys that the shorter sequence would see, and where groups of tokens that are encoded together would
  // have to be broken up.
  void truncate(int64_t length);
  // A view of the first `length` tokens that shares their memory until either writes. Throws as truncate
  // does.
  std::unique_ptr<KvView> fork(int64_t length, int64_t capacity) const;
  // The memory of tokens [256 * index, 256 * index + 256), to be kept beyond the view.
  KvSpan span(int64_t index) const;
  // Makes an empty view one of `length` tokens that lie in these spans. Throws std::invalid_argument if they
  // do not hold what the next token would see.
  void adopt(const std::vector<KvSpan>& spans, int64_t length);
  KvSegment segment(int64_t layer) const;
  const std::shared_ptr<KvPool>& pool() const { return pool_; }

 private:
  struct Part {  // of one range
    std::vector<FrameRef> frames;
    std::vector<int64_t> table;  // where the frames lie from `base` on
    char* base = nullptr;        // mapped: the reserved addresses
    int64_t held = 0;            // first span that still has a frame
  };
  // Tokens whose codes or values are in the frames: all, or whole groups.
  int64_t stored(int64_t length) const;
  static int64_t within(int64_t tokens, int64_t span);
  bool writable(const FrameRef& frame, int64_t span) const;
  void put(size_t range, int64_t span, FrameRef frame);
  void check_cut(int64_t length) const;
  void copy_tokens(size_t range, const KvFrame& from, const KvFrame& to, int64_t tokens) const;
  void drop_behind();

  std::shared_ptr<KvPool> pool_;
  int64_t capacity_ = 0, length_ = 0, reserved_ = 0;
  int64_t claimed_ = 0;  // tokens whose places `prepare` has made this view's own
  std::vector<Part> parts_;
  int64_t tail_ = 0;  // which of the two tails is the sequence's
  Arena key_tails_, value_tails_;
};

}  // namespace gm
