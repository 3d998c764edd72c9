#include "runtime/arena.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

namespace gm {

Arena::Arena(size_t bytes, bool huge) {
  constexpr size_t kHuge = size_t{2} << 20;
  if (bytes == 0) return;
  const size_t slack = huge ? kHuge : 0;
  if (bytes > SIZE_MAX - slack - kHuge) throw std::bad_alloc();
  // Whole huge pages, so that the end gets one too; never more than asked for where a page would be wasted.
  const size_t rounded = huge && bytes >= kHuge ? (bytes + 65535) / 65536 * 65536 : bytes;
  mapped_ = rounded + slack;
  base_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base_ == MAP_FAILED) {
    base_ = nullptr;
    throw std::bad_alloc();
  }
  data_ = static_cast<char*>(base_);
  if (huge) {
    data_ = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(base_) + kHuge - 1) / kHuge * kHuge);
#if defined(MADV_HUGEPAGE)
    madvise(data_, rounded, MADV_HUGEPAGE);  // advice: without it the pages are small, and that is all
#endif
  }
  bytes_ = bytes;
}

Arena::~Arena() {
  if (base_ != nullptr) munmap(base_, mapped_);
}

}  // namespace gm
