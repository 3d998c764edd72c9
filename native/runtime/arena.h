// Large zeroed memory on huge pages where the system grants them.
#pragma once

#include <cstddef>
#include <utility>

namespace gm {

class Arena {
 public:
  Arena() = default;
  // Reserves `bytes`; pages are committed when first written. Throws std::bad_alloc.
  Arena(size_t bytes, bool huge);
  ~Arena();
  Arena(Arena&& other) noexcept { *this = std::move(other); }
  Arena& operator=(Arena&& other) noexcept {
    std::swap(base_, other.base_);
    std::swap(mapped_, other.mapped_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* base_ = nullptr;
  size_t mapped_ = 0;
  char* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace gm
