// The eight matrix tiles of AMX, in two implementations with one interface: the instructions, and plain C++
// for the level `amx_emulated`, with which tests run the kernel on processors without tiles. A tile is up to
// 16 rows of up to 64 bytes; unconfigured rows and bytes read as zero. The emulation traps where the
// instruction would fault.
#pragma once

#include <stdint.h>
#include <string.h>

// Internal linkage: what is not inlined must not become a symbol that another level could share.
namespace gm::GM_LEVEL {
namespace {

// What ldtilecfg reads (palette 1).
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes[16] = {};  // per row
  uint8_t rows[16] = {};

  void shape(int tile, int64_t row_count, int64_t row_bytes) {
    rows[tile] = static_cast<uint8_t>(row_count);
    bytes[tile] = static_cast<uint16_t>(row_bytes);
  }
};
static_assert(sizeof(TileConfig) == 64);

#if !defined(GM_EMULATED_TILES)

// Instructions that do nothing, behind each load and product: tile instructions one after the other take 1.5
// times as long when another program keeps the core's other thread busy (Xeon of the fifth generation: 34 and
// 22 ns a product; alone 6 with or without). Fewer than six help less.
#define GM_GAP "\n nop\n nop\n nop\n nop\n nop\n nop\n nop\n nop"

// Written as assembly, not intrinsics: those take literal tile numbers only, and some compilers' versions do
// not tell the optimiser that a tile load reads memory.
class Tiles {
 public:
  // The calling thread's tiles. They are released at the end, so that the thread carries no tile state when
  // it leaves the kernel: no other kernel meets it, and context switches stay cheap.
  explicit Tiles(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" : : "m"(config) : "memory"); }
  ~Tiles() { __asm__ volatile("tilerelease" : : : "memory"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int kTile>
  void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  template <int kTile>
  void load(const void* from, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" GM_GAP
                     :
                     : "r"(from), "r"(stride), "i"(kTile)
                     : "memory");
  }
  template <int kTile>
  void store(void* to, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
  }
  // c[m][n] += sum over k of a[m][k] * b[k / 4][4 n + k % 4]: a is signed, b signed or unsigned bytes, c
  // int32.
  template <int kC, int kA, int kB, bool kSigned>
  void dot() {
    if constexpr (kSigned) {
      __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" GM_GAP : : "i"(kC), "i"(kA), "i"(kB));
    } else {
      __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" GM_GAP : : "i"(kC), "i"(kA), "i"(kB));
    }
  }
  // c[m][n] += (sum over even k of a[m][k] b[k][n]) + (sum over odd k): bf16 pairs, b as [k / 2][n][2], c
  // f32.
  template <int kC, int kA, int kB>
  void dot_bf16() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" GM_GAP : : "i"(kC), "i"(kA), "i"(kB));
  }
};

#else

class Tiles {
 public:
  explicit Tiles(const TileConfig& config) : config_(config) {
    check(config.palette == 1 && config.start_row == 0);
    for (int t = 0; t < 8; ++t) {
      check(config.rows[t] <= 16 && config.bytes[t] <= 64);
      check((config.rows[t] == 0) == (config.bytes[t] == 0));
    }
    for (int t = 8; t < 16; ++t) check(config.rows[t] == 0 && config.bytes[t] == 0);
    memset(data_, 0, sizeof data_);
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int kTile>
  void zero() {
    check(config_.rows[kTile] > 0);
    memset(data_[kTile], 0, sizeof data_[kTile]);
  }
  template <int kTile>
  void load(const void* from, int64_t stride) {
    zero<kTile>();
    for (int r = 0; r < config_.rows[kTile]; ++r) {
      memcpy(data_[kTile][r], static_cast<const char*>(from) + r * stride, config_.bytes[kTile]);
    }
  }
  template <int kTile>
  void store(void* to, int64_t stride) {
    check(config_.rows[kTile] > 0);
    for (int r = 0; r < config_.rows[kTile]; ++r) {
      memcpy(static_cast<char*>(to) + r * stride, data_[kTile][r], config_.bytes[kTile]);
    }
  }
  template <int kC, int kA, int kB, bool kSigned>
  __attribute__((noinline)) void dot() {
    static_assert(kC != kA && kC != kB && kA != kB);
    const int m_end = config_.rows[kC], n_end = config_.bytes[kC] / 4, k_end = config_.bytes[kA] / 4;
    check(config_.bytes[kC] % 4 == 0 && config_.bytes[kA] % 4 == 0);
    check(config_.rows[kA] == m_end && config_.bytes[kB] == config_.bytes[kC] && config_.rows[kB] == k_end);
    for (int m = 0; m < m_end; ++m) {
      uint32_t sum[16];  // dwords wrap around
      memcpy(sum, data_[kC][m], sizeof sum);
      for (int k = 0; k < k_end; ++k) {
        const uint8_t* a = data_[kA][m] + 4 * k;
        for (int n = 0; n < n_end; ++n) {
          const uint8_t* b = data_[kB][k] + 4 * n;
          for (int i = 0; i < 4; ++i) {
            const int value = kSigned ? static_cast<int8_t>(b[i]) : b[i];
            sum[n] += static_cast<uint32_t>(static_cast<int8_t>(a[i]) * value);
          }
        }
      }
      memcpy(data_[kC][m], sum, sizeof sum);
    }
  }
  // Both sums are chains of fused steps from zero, k ascending; then they are added, and their sum to c.
  // Denormal inputs and results are zero.
  template <int kC, int kA, int kB>
  __attribute__((noinline)) void dot_bf16() {
    const int m_end = config_.rows[kC], n_end = config_.bytes[kC] / 4, k_end = config_.bytes[kA] / 4;
    check(config_.rows[kA] == m_end && config_.bytes[kB] == config_.bytes[kC] && config_.rows[kB] == k_end);
    for (int m = 0; m < m_end; ++m) {
      float sum[16];
      memcpy(sum, data_[kC][m], sizeof sum);
      for (int n = 0; n < n_end; ++n) {
        float part[2] = {0.0f, 0.0f};
        for (int k = 0; k < k_end; ++k) {
          for (int i = 0; i < 2; ++i) {
            const float a = widen(data_[kA][m] + 4 * k + 2 * i), b = widen(data_[kB][k] + 4 * n + 2 * i);
            part[i] = flush(__builtin_fmaf(a, b, part[i]));
          }
        }
        sum[n] = flush(flush(sum[n]) + flush(part[0] + part[1]));
      }
      memcpy(data_[kC][m], sum, sizeof sum);
    }
  }

 private:
  static float flush(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7f800000u) == 0) bits &= 0x80000000u;
    memcpy(&x, &bits, 4);
    return x;
  }
  static float widen(const uint8_t* bf16) {
    uint16_t half;
    memcpy(&half, bf16, 2);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float x;
    memcpy(&x, &bits, 4);
    return flush(x);
  }
  static void check(bool ok) {
    if (!ok) __builtin_trap();
  }

  TileConfig config_;
  uint8_t data_[8][16][64];
};

#endif

}  // namespace
}  // namespace gm::GM_LEVEL
