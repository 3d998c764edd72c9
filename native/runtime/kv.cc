#include "runtime/kv.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>

namespace gm {
namespace {

// Free frames up to this many bytes keep their pages, so that the next sequence need not fault them in.
constexpr int64_t kWarmBytes = int64_t{64} << 20;

int64_t page_bytes() {
  static const int64_t bytes = sysconf(_SC_PAGESIZE);
  return bytes;
}

int64_t whole(int64_t bytes, int64_t unit) { return (bytes + unit - 1) / unit * unit; }

int64_t machine_bytes() { return static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * page_bytes(); }

int64_t read_mapping_limit() {
  long long limit = 0;
  FILE* file = std::fopen("/proc/sys/vm/max_map_count", "re");
  if (file == nullptr) return 0;
  if (std::fscanf(file, "%lld", &limit) != 1) limit = 0;
  std::fclose(file);
  return limit;
}

// A file of memory without a name, -1 if there is no way to have one.
int memory_file(bool memfd, std::string* backing) {
#if defined(MFD_CLOEXEC)
  const int file = memfd ? memfd_create("gristmill-kv", MFD_CLOEXEC) : -1;
  if (file >= 0) {
    *backing = "memfd";
    return file;
  }
#endif
  const std::string name = "/gristmill-kv-" + std::to_string(getpid());
  const int shared = shm_open(name.c_str(), O_RDWR | O_CREAT | O_EXCL, 0600);
  if (shared >= 0) {
    shm_unlink(name.c_str());
    fcntl(shared, F_SETFD, FD_CLOEXEC);
    *backing = "shm";
  }
  return shared;
}

constexpr int kReserve = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

}  // namespace

KvFrame::~KvFrame() { pool_->give_back(range_, index_); }

char* KvFrame::data() const {
  return pool_->stores_[range_].base + index_ * pool_->ranges_[range_].frame_bytes;
}

KvPool::KvPool(const KvGeometry& geometry, int64_t limit_bytes, KvPlacement placement, int poison, bool memfd)
    : geometry_(geometry), placement_(placement), backing_("anonymous"), poison_(poison) {
  for (int64_t i = 0; i < static_cast<int64_t>(geometry_.layers.size()); ++i) {
    const KvLayer& layer = geometry_.layers[static_cast<size_t>(i)];
    auto at = std::find_if(ranges_.begin(), ranges_.end(),
                           [&](const Range& r) { return r.window == layer.window; });
    if (at == ranges_.end()) at = ranges_.insert(ranges_.end(), Range{layer.window, 0, 0, {}});
    at->layers.push_back(i);
    layer_range_.push_back(static_cast<size_t>(at - ranges_.begin()));
    layer_offset_.push_back(at->half_bytes);
    at->half_bytes += KvGeometry::layer_bytes(layer);
    layer_tail_.push_back(tail_bytes_);
    tail_bytes_ += KvGeometry::tail_bytes(layer);
  }
  limit_ = limit_bytes > 0 ? limit_bytes : machine_bytes();
  mapping_limit_ = read_mapping_limit();
  int file = -1;
  int64_t file_bytes = 0;
  if (placement_ == KvPlacement::kMapped) {
    file = memory_file(memfd, &backing_);
    if (file < 0) throw std::runtime_error(std::string("no memory file can be made: ") + strerror(errno));
  }
  for (Range& r : ranges_) {
    r.half_bytes = whole(r.half_bytes, 64);
    r.frame_bytes = whole(2 * r.half_bytes, page_bytes());
    Store& s = stores_.emplace_back();
    s.most = std::max<int64_t>(limit_ / r.frame_bytes, 1);
    s.base_bytes = static_cast<size_t>(s.most * r.frame_bytes);
    s.file = file;
    s.offset = file_bytes;
    file_bytes += static_cast<int64_t>(s.base_bytes);
  }
  int64_t least = 0;
  for (const Range& r : ranges_) least += r.frame_bytes;
  limit_ = std::max(limit_, least);
  if (file >= 0 && ftruncate(file, file_bytes) != 0) {
    const int why = errno;
    close(file);
    throw std::runtime_error(std::string("the memory file cannot grow: ") + strerror(why));
  }
  for (Store& s : stores_) {
    if (file < 0) {
      s.arena = Arena(s.base_bytes, true);
      s.base = s.arena.data();
      reserved_ += static_cast<int64_t>(s.base_bytes);
      continue;
    }
    void* at =
        mmap(nullptr, s.base_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, s.offset);
    if (at == MAP_FAILED) {
      for (Store& other : stores_) {
        if (other.base != nullptr) munmap(other.base, other.base_bytes);
      }
      close(file);
      throw std::bad_alloc();
    }
    s.base = static_cast<char*>(at);
    ++mappings_;
  }
}

KvPool::~KvPool() {
  int file = -1;
  for (Store& s : stores_) {
    file = s.file;
    if (file >= 0 && s.base != nullptr) munmap(s.base, s.base_bytes);
  }
  if (file >= 0) close(file);
}

KvPool::Stats KvPool::stats() const {
  std::lock_guard<std::mutex> lock(mutex_);
  Stats out;
  out.limit = limit_;
  out.used = used_;
  out.reserved = reserved_;
  out.frames = frames_;
  out.mappings = mappings_;
  out.mapping_limit = mapping_limit_;
  if (placement_ == KvPlacement::kMapped) {
    struct stat info;
    if (!stores_.empty() && fstat(stores_[0].file, &info) == 0) out.committed = info.st_blocks * 512;
    return out;
  }
  for (size_t i = 0; i < stores_.size(); ++i) {
    const Store& s = stores_[i];
    const int64_t bytes = whole(s.fresh * ranges_[i].frame_bytes, page_bytes());
    if (bytes == 0) continue;
    std::vector<unsigned char> present(static_cast<size_t>(bytes / page_bytes()));
    if (mincore(s.base, static_cast<size_t>(bytes), present.data()) != 0) continue;
    for (const unsigned char one : present) out.committed += (one & 1) * page_bytes();
  }
  return out;
}

void KvPool::punch(size_t range, int64_t index) {
  const Store& s = stores_[range];
  const int64_t bytes = ranges_[range].frame_bytes;
  if (placement_ == KvPlacement::kTable) {
    madvise(s.base + index * bytes, static_cast<size_t>(bytes), MADV_DONTNEED);
    return;
  }
#if defined(FALLOC_FL_PUNCH_HOLE)
  fallocate(s.file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, s.offset + index * bytes, bytes);
#else
  madvise(s.base + index * bytes, static_cast<size_t>(bytes), MADV_REMOVE);
#endif
}

void KvPool::give_back(size_t range, int64_t index) {
  std::lock_guard<std::mutex> lock(mutex_);
  const int64_t bytes = ranges_[range].frame_bytes;
  used_ -= bytes;
  --frames_;
  if (warm_bytes_ + bytes <= kWarmBytes) {
    stores_[range].warm.push_back(index);
    warm_bytes_ += bytes;
  } else {
    punch(range, index);
    stores_[range].cold.push_back(index);
  }
}

void KvPool::trim(int64_t keep) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (size_t r = 0; r < stores_.size(); ++r) {
    Store& s = stores_[r];
    while (warm_bytes_ > keep && !s.warm.empty()) {
      punch(r, s.warm.front());
      s.cold.push_back(s.warm.front());
      s.warm.erase(s.warm.begin());
      warm_bytes_ -= ranges_[r].frame_bytes;
    }
  }
}

FrameRef KvPool::take(size_t range) {
  int64_t index = -1;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    Store& s = stores_[range];
    const int64_t bytes = ranges_[range].frame_bytes;
    if (used_ + bytes <= limit_) {
      if (!s.warm.empty()) {
        index = s.warm.back();
        s.warm.pop_back();
        warm_bytes_ -= bytes;
      } else if (!s.cold.empty()) {
        index = s.cold.back();
        s.cold.pop_back();
      } else if (s.fresh < s.most) {
        index = s.fresh++;
      }
    }
    if (index < 0) {
      throw KvExhausted("the KV memory of " + std::to_string(limit_ >> 20) + " MiB is in use");
    }
    used_ += bytes;
    ++frames_;
  }
  auto frame = std::make_shared<KvFrame>(shared_from_this(), range, index);
  if (poison_ >= 0) {
    std::memset(frame->data(), poison_, static_cast<size_t>(ranges_[range].frame_bytes));
  }
  return frame;
}

void KvPool::unsee(size_t range, const KvFrame& frame) const {
  if (placement_ == KvPlacement::kTable) return;
  madvise(frame.data(), static_cast<size_t>(ranges_[range].frame_bytes), MADV_DONTNEED);
}

void KvPool::map(size_t range, char* at, const KvFrame* frame, bool replaces) {
  const Store& s = stores_[range];
  const auto bytes = static_cast<size_t>(ranges_[range].frame_bytes);
  void* got = MAP_FAILED;
  if (frame == nullptr) {
    got = mmap(at, bytes, PROT_NONE, kReserve | MAP_FIXED, -1, 0);
  } else {
    got = mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE, s.file,
               s.offset + frame->index() * static_cast<int64_t>(bytes));
  }
  std::lock_guard<std::mutex> lock(mutex_);
  if (got != MAP_FAILED) {
    mappings_ += (frame == nullptr ? 0 : 1) - (replaces ? 1 : 0);
    return;
  }
  // Taking a mapping out of the middle needs one more; without it, it stays until the view goes.
  if (frame == nullptr) return;
  throw KvExhausted(no_mapping());
}

std::string KvPool::no_mapping() const {
  return "the system grants no further mapping for the KV memory: " + std::to_string(mappings_) +
         " are in use and vm.max_map_count is " + std::to_string(mapping_limit_);
}

KvView::KvView(std::shared_ptr<KvPool> pool, int64_t capacity) : pool_(std::move(pool)), capacity_(capacity) {
  if (capacity < 1) throw std::invalid_argument("a sequence needs a capacity of at least one token");
  const int64_t spans = (capacity + kSpanTokens - 1) / kSpanTokens;
  for (const KvPool::Range& r : pool_->ranges()) {
    Part& part = parts_.emplace_back();
    part.frames.resize(static_cast<size_t>(spans));
    part.table.assign(static_cast<size_t>(spans), 0);
    if (pool_->placement() == KvPlacement::kTable) continue;
    if (spans > INT64_MAX / r.frame_bytes) throw std::bad_alloc();
    void* at = mmap(nullptr, static_cast<size_t>(spans * r.frame_bytes), PROT_NONE, kReserve, -1, 0);
    if (at == MAP_FAILED) {
      for (size_t i = 0; i + 1 < parts_.size(); ++i) {
        munmap(parts_[i].base, static_cast<size_t>(spans * pool_->ranges()[i].frame_bytes));
      }
      std::lock_guard<std::mutex> lock(pool_->mutex_);
      // A view takes two mappings and more: the limit is near, not the end of the addresses.
      if (4 * pool_->mappings_ > pool_->mapping_limit_) throw KvExhausted(pool_->no_mapping());
      throw std::bad_alloc();
    }
    part.base = static_cast<char*>(at);
    for (int64_t s = 0; s < spans; ++s) part.table[static_cast<size_t>(s)] = s * r.frame_bytes;
    reserved_ += spans * r.frame_bytes;
  }
  key_tails_ = Arena(static_cast<size_t>(2 * pool_->tail_bytes()), false);
  value_tails_ = Arena(static_cast<size_t>(2 * pool_->tail_bytes()), false);
  std::lock_guard<std::mutex> lock(pool_->mutex_);
  pool_->reserved_ += reserved_;
  pool_->mappings_ += pool_->placement() == KvPlacement::kMapped ? static_cast<int64_t>(parts_.size()) : 0;
}

KvView::~KvView() {
  int64_t mapped = 0;
  for (size_t i = 0; i < parts_.size(); ++i) {
    Part& part = parts_[i];
    if (part.base == nullptr) continue;
    for (const FrameRef& frame : part.frames) mapped += frame != nullptr;
    munmap(part.base, part.frames.size() * static_cast<size_t>(pool_->ranges()[i].frame_bytes));
    ++mapped;
  }
  std::lock_guard<std::mutex> lock(pool_->mutex_);
  pool_->reserved_ -= reserved_;
  pool_->mappings_ -= mapped;
}

int64_t KvView::used_bytes() const {
  int64_t total = 0;
  for (size_t i = 0; i < parts_.size(); ++i) {
    for (const FrameRef& frame : parts_[i].frames) {
      total += frame != nullptr ? pool_->ranges()[i].frame_bytes : 0;
    }
  }
  return length_ > 0 ? total + 4 * pool_->tail_bytes() : total;
}

int64_t KvView::stored(int64_t length) const {
  return pool_->tail_bytes() > 0 ? length / kKvChannelGroup * kKvChannelGroup : length;
}

void KvView::put(size_t range, int64_t span, FrameRef frame) {
  Part& part = parts_[range];
  const auto i = static_cast<size_t>(span);
  if (part.base != nullptr) {
    const bool replaces = part.frames[i] != nullptr;
    if (frame != nullptr || replaces) pool_->map(range, part.base + part.table[i], frame.get(), replaces);
  } else if (frame != nullptr) {
    part.table[i] = frame->data() - pool_->stores_[range].base;
  }
  part.frames[i] = std::move(frame);
}

// The part of the first `tokens` tokens that lies in a span.
int64_t KvView::within(int64_t tokens, int64_t span) {
  return std::clamp<int64_t>(tokens - span * kSpanTokens, 0, kSpanTokens);
}

// Whether the frame, if there is one, may be written from the view's own tokens on. Others may share it as
// long as none relies on tokens beyond them.
bool KvView::writable(const FrameRef& frame, int64_t span) const {
  return frame != nullptr &&
         (frame.use_count() == 1 || frame->filled <= within(stored(std::max(length_, claimed_)), span));
}

int64_t KvView::wanted_bytes(int64_t tokens) const {
  if (tokens <= 0) return 0;
  const int64_t last = (length_ + tokens - 1) / kSpanTokens;
  int64_t bytes = 0;
  for (size_t r = 0; r < parts_.size(); ++r) {
    for (int64_t s = stored(length_) / kSpanTokens; s <= last; ++s) {
      const bool good = writable(parts_[r].frames[static_cast<size_t>(s)], s);
      bytes += good ? 0 : pool_->ranges()[r].frame_bytes;
    }
  }
  return bytes;
}

void KvView::prepare(int64_t tokens) {
  if (tokens <= 0) return;
  if (!pool_->has_room(wanted_bytes(tokens))) {
    throw KvExhausted("the KV memory of " + std::to_string(pool_->limit() >> 20) + " MiB is in use");
  }
  const int64_t own = stored(length_), last = (length_ + tokens - 1) / kSpanTokens;
  const int64_t claim = std::max(length_ + tokens, claimed_);
  for (size_t r = 0; r < parts_.size(); ++r) {
    for (int64_t s = own / kSpanTokens; s <= last; ++s) {
      const FrameRef& frame = parts_[r].frames[static_cast<size_t>(s)];
      if (!writable(frame, s)) {
        FrameRef fresh = pool_->take(r);
        if (frame != nullptr) {
          copy_tokens(r, *frame, *fresh, within(own, s));
          pool_->unsee(r, *frame);
          pool_->unsee(r, *fresh);
        }
        put(r, s, std::move(fresh));
      }
    }
  }
  // From here on nobody else writes these places, were it in the same step.
  for (Part& part : parts_) {
    for (int64_t s = own / kSpanTokens; s <= last; ++s) {
      part.frames[static_cast<size_t>(s)]->filled = within(stored(claim), s);
    }
  }
  claimed_ = claim;
}

void KvView::copy_tokens(size_t range, const KvFrame& from, const KvFrame& to, int64_t tokens) const {
  const int64_t tiles = (tokens + kTileTokens - 1) / kTileTokens;
  const int64_t half = pool_->ranges()[range].half_bytes;
  for (const int64_t index : pool_->ranges()[range].layers) {
    const KvLayer& layer = pool_->geometry().layers[static_cast<size_t>(index)];
    const int64_t head = KvGeometry::head_bytes(layer), tile = KvGeometry::tile_bytes(layer);
    const int64_t scale = KvGeometry::scale_bytes(layer);
    for (int64_t h = 0; h < 2 * layer.kv_heads; ++h) {
      const int64_t at = h % layer.kv_heads * head + pool_->offset_of(index) + h / layer.kv_heads * half;
      const int64_t scales = at + kSpanTokens / kTileTokens * tile;
      std::memcpy(to.data() + at, from.data() + at, static_cast<size_t>(tiles * tile));
      std::memcpy(to.data() + scales, from.data() + scales, static_cast<size_t>(tiles * scale));
    }
  }
}

void KvView::append(int64_t tokens) {
  if (length_ / kKvChannelGroup != (length_ + tokens) / kKvChannelGroup) tail_ ^= 1;
  length_ += tokens;
  drop_behind();
}

void KvView::drop_behind() {
  for (size_t r = 0; r < parts_.size(); ++r) {
    const int64_t window = pool_->ranges()[r].window;
    if (window == 0) continue;
    // The next row sees the keys from length - window + 1 on.
    const int64_t needed = std::max<int64_t>(length_ - window + 1, 0) / kSpanTokens;
    for (int64_t& s = parts_[r].held; s < needed; ++s) put(r, s, nullptr);
  }
}

void KvView::check_cut(int64_t length) const {
  if (length < 0 || length > length_) {
    throw std::invalid_argument("cannot truncate a sequence of " + std::to_string(length_) + " tokens to " +
                                std::to_string(length));
  }
  if (length == length_) return;
  for (size_t r = 0; r < parts_.size() && length > 0; ++r) {
    const int64_t window = pool_->ranges()[r].window;
    if (window != 0 && std::max<int64_t>(length - window + 1, 0) / kSpanTokens < parts_[r].held) {
      throw std::invalid_argument("cannot truncate to " + std::to_string(length) +
                                  " tokens: the sliding window has moved on");
    }
  }
  if (pool_->tail_bytes() > 0 && length % kKvChannelGroup != 0 &&
      length / kKvChannelGroup != length_ / kKvChannelGroup) {
    throw std::invalid_argument("cannot truncate to " + std::to_string(length) +
                                " tokens: they are encoded in groups of " + std::to_string(kKvChannelGroup));
  }
}

void KvView::truncate(int64_t length) {
  check_cut(length);
  const int64_t keep = (stored(length) + kSpanTokens - 1) / kSpanTokens;
  for (size_t r = 0; r < parts_.size(); ++r) {
    Part& part = parts_[r];
    for (int64_t s = std::max(keep, part.held); s < static_cast<int64_t>(part.frames.size()); ++s) {
      if (part.frames[static_cast<size_t>(s)] == nullptr) break;
      put(r, s, nullptr);
    }
    if (length == 0) part.held = 0;
  }
  length_ = claimed_ = length;
}

KvSpan KvView::span(int64_t index) const {
  KvSpan out;
  for (const Part& part : parts_) {
    if (index < 0 || index >= static_cast<int64_t>(part.frames.size())) {
      throw std::invalid_argument("the sequence has no span " + std::to_string(index));
    }
    out.frames.push_back(part.frames[static_cast<size_t>(index)]);
  }
  return out;
}

void KvView::adopt(const std::vector<KvSpan>& spans, int64_t length) {
  const int64_t count = (length + kSpanTokens - 1) / kSpanTokens;
  if (length_ != 0 || length < 1 || length > capacity_ || static_cast<int64_t>(spans.size()) < count) {
    throw std::invalid_argument("spans of " + std::to_string(length) + " tokens do not fit the sequence");
  }
  if (stored(length) != length) {
    throw std::invalid_argument("tokens are shared in groups of " + std::to_string(kKvChannelGroup));
  }
  for (size_t r = 0; r < parts_.size(); ++r) {
    const int64_t window = pool_->ranges()[r].window;
    const int64_t first = window == 0 ? 0 : std::max<int64_t>(length - window + 1, 0) / kSpanTokens;
    for (int64_t s = first; s < count; ++s) {
      const auto& frames = spans[static_cast<size_t>(s)].frames;
      if (frames.size() != parts_.size() || frames[r] == nullptr || frames[r]->filled < within(length, s)) {
        throw std::invalid_argument("span " + std::to_string(s) + " does not hold the tokens");
      }
    }
  }
  try {
    for (size_t r = 0; r < parts_.size(); ++r) {
      const int64_t window = pool_->ranges()[r].window;
      parts_[r].held = window == 0 ? 0 : std::max<int64_t>(length - window + 1, 0) / kSpanTokens;
      for (int64_t s = parts_[r].held; s < count; ++s) put(r, s, spans[static_cast<size_t>(s)].frames[r]);
    }
  } catch (const KvExhausted&) {
    for (size_t r = 0; r < parts_.size(); ++r) {
      for (int64_t s = 0; s < count; ++s) put(r, s, nullptr);
      parts_[r].held = 0;
    }
    throw;
  }
  length_ = length;
}

std::unique_ptr<KvView> KvView::fork(int64_t length, int64_t capacity) const {
  check_cut(length);
  auto other = std::make_unique<KvView>(pool_, capacity);
  if (length == 0) return other;
  if (length > capacity) throw std::invalid_argument("the copy has no room for the tokens");
  const int64_t count = (stored(length) + kSpanTokens - 1) / kSpanTokens;
  for (size_t r = 0; r < parts_.size(); ++r) {
    const int64_t window = pool_->ranges()[r].window;
    other->parts_[r].held = window == 0 ? 0 : std::max<int64_t>(length - window + 1, 0) / kSpanTokens;
    for (int64_t s = other->parts_[r].held; s < count; ++s) {
      other->put(r, s, parts_[r].frames[static_cast<size_t>(s)]);
    }
  }
  if (stored(length) != length) {
    const auto bytes = static_cast<size_t>(pool_->tail_bytes());
    std::memcpy(other->key_tails_.data(), key_tails_.data() + static_cast<size_t>(tail_) * bytes, bytes);
    std::memcpy(other->value_tails_.data(), value_tails_.data() + static_cast<size_t>(tail_) * bytes, bytes);
  }
  other->length_ = length;
  return other;
}

KvSegment KvView::segment(int64_t layer) const {
  const size_t r = pool_->range_of(layer);
  const KvLayer& shape = pool_->geometry().layers[static_cast<size_t>(layer)];
  const Part& part = parts_[r];
  char* base = part.base != nullptr ? part.base : pool_->stores_[r].base;
  KvSegment s;
  s.k = base + pool_->offset_of(layer);
  s.v = s.k + pool_->ranges()[r].half_bytes;
  s.spans = part.table.data();
  s.head_bytes = KvGeometry::head_bytes(shape);
  s.tile_bytes = KvGeometry::tile_bytes(shape);
  s.scale_bytes = KvGeometry::scale_bytes(shape);
  auto tail = [&](const Arena& arena, int64_t which) {
    return reinterpret_cast<uint16_t*>(arena.data() + which * pool_->tail_bytes() +
                                       pool_->tail_offset_of(layer));
  };
  s.k_tail = tail(key_tails_, tail_);
  s.v_tail = tail(value_tails_, tail_);
  s.k_tail_after = tail(key_tails_, tail_ ^ 1);
  s.v_tail_after = tail(value_tails_, tail_ ^ 1);
  return s;
}

}  // namespace gm
