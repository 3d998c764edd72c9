// Work cut among threads as it goes: processors do not keep one pace, least of all beside other programs.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace gm {

struct Range {
  int64_t begin, end;
};
inline Range split(int64_t n, int thread, int threads) {
  return {n * thread / threads, n * (thread + 1) / threads};
}

// Pieces of work, each of fewer than kMostUnits units. Every thread has an equal share of each, takes half of
// what is left of it from its front, and when nothing is left halves of others' shares from their backs. So
// what a thread reads lies together, and threads that keep the same pace do not meet each other. A thread
// that is over three times slower than another one still keeps it waiting, as half a share is the first that
// it takes; smaller parts would be more calls of the kernels.
class Shares {
 public:
  static constexpr int64_t kMostUnits = int64_t{1} << 24;

  void resize(size_t pieces, int threads) {
    threads_ = threads;
    count_ = pieces * static_cast<size_t>(threads);
    slots_.reset(new Slot[count_]);
    round_ = 0;
  }
  // All pieces are whole again. While no thread takes any.
  void renew() {
    if (++round_ != 0) return;
    for (size_t i = 0; i < count_; ++i) slots_[i].word.store(0, std::memory_order_relaxed);
    round_ = 1;
  }
  // At least `least` units, or all that is left of the first share that has any; none when all is taken. All
  // threads give the same `units`.
  Range take(size_t piece, int64_t units, int64_t least, int thread) {
    for (int i = 0; i < threads_; ++i) {
      const int owner = (thread + i) % threads_;
      const Range share = split(units, owner, threads_);
      if (share.begin == share.end) continue;
      std::atomic<uint64_t>& word =
          slots_[piece * static_cast<size_t>(threads_) + static_cast<size_t>(owner)].word;
      uint64_t seen = word.load(std::memory_order_relaxed);
      for (;;) {
        // A share that nobody has touched in this round is whole.
        const Range left = seen >> 48 == round_ ? unpack(seen) : share;
        if (left.begin == left.end) break;
        const int64_t n = left.end - left.begin;
        const int64_t part = threads_ == 1 || n < 2 * least ? n : std::max(least, (n + 1) / 2);
        const Range taken = i == 0 ? Range{left.begin, left.begin + part} : Range{left.end - part, left.end};
        const Range rest = i == 0 ? Range{taken.end, left.end} : Range{left.begin, taken.begin};
        // Pieces without a barrier between them share no data, so nothing is ordered by this.
        if (word.compare_exchange_weak(seen, pack(rest), std::memory_order_relaxed)) return taken;
      }
    }
    return {0, 0};
  }

 private:
  static constexpr uint64_t kMask = kMostUnits - 1;
  struct alignas(64) Slot {
    std::atomic<uint64_t> word{0};  // the round, 16 bits; begin, end
  };
  uint64_t pack(Range r) const {
    return static_cast<uint64_t>(round_) << 48 | static_cast<uint64_t>(r.begin) << 24 |
           static_cast<uint64_t>(r.end);
  }
  static Range unpack(uint64_t word) {
    return {static_cast<int64_t>(word >> 24 & kMask), static_cast<int64_t>(word & kMask)};
  }

  int threads_ = 1;
  size_t count_ = 0;
  uint16_t round_ = 0;
  std::unique_ptr<Slot[]> slots_;
};

}  // namespace gm
