// Memory to fetch while other memory is worked on, some lines at a time: many at once would wait for each
// other, and the work with them.
#pragma once

#include <stdint.h>

#include "vec/vec.h"

namespace gm::GM_LEVEL {

class Ahead {
 public:
  Ahead() = default;
  // `at` to be fetched by `calls` calls.
  Ahead(const void* at, int64_t bytes, int64_t calls)
      : at_(static_cast<const char*>(at)),
        end_(at_ + bytes),
        step_(((bytes + calls - 1) / calls + 63) / 64 * 64) {}
  void fetch() {
    const char* to = end_ - at_ < step_ ? end_ : at_ + step_;
    for (; at_ < to; at_ += 64) prefetch_far(at_);
    if (at_ > end_) at_ = end_;
  }
  void fetch_all() {
    while (at_ < end_) fetch();
  }

 private:
  const char *at_ = nullptr, *end_ = nullptr;
  int64_t step_ = 0;
};

}  // namespace gm::GM_LEVEL
