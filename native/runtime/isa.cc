#include "runtime/isa.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace gm {

#define GM_ISA_LEVEL(name, needs, hidden) const KernelTable* kernel_table_##name();
#include "isa_levels.inc"
#undef GM_ISA_LEVEL

namespace {

enum Feature : uint32_t {
  kAvx2 = 1,
  kFma = 2,
  kF16c = 4,
  kAvx512 = 8,  // F, BW, DQ, VL
  kVnni = 16,
  kBf16 = 32,
  kAmx = 64,  // TILE, INT8, BF16, with the permission of the operating system
  kVbmi = 128,
};

#if defined(__x86_64__)
uint64_t xcr0() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Linux lets a process use tiles only after it asked, once, for all its threads. It refuses where a thread's
// signal stack is too small for the larger state.
bool amx_permitted() {
#if defined(__linux__)
  constexpr long kArchReqXcompPerm = 0x1023, kXtileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXtileData) == 0;
#else
  return false;
#endif
}

// Palette 1 has what the kernels count on: eight tiles of 16 rows of 64 bytes.
bool tiles_as_expected() {
  uint32_t a, b, c, d;
  if (!__get_cpuid_count(0x1d, 0, &a, &b, &c, &d) || a < 1) return false;
  if (!__get_cpuid_count(0x1d, 1, &a, &b, &c, &d)) return false;
  return (b & 0xffff) >= 64 && (b >> 16) >= 8 && (c & 0xffff) >= 16;
}

uint32_t detect() {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
  const bool osxsave = c & (1u << 27);
  if (!osxsave || !(c & (1u << 28))) return 0;
  const bool fma = c & (1u << 12), f16c = c & (1u << 29);
  const uint64_t state = xcr0();
  if ((state & 0x6) != 0x6) return 0;
  uint32_t found = (fma ? kFma : 0u) | (f16c ? kF16c : 0u);
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
  if (b & (1u << 5)) found |= kAvx2;
  const bool zmm = (state & 0xe6) == 0xe6;
  const uint32_t wide = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);  // F, DQ, BW, VL
  if (zmm && (b & wide) == wide) {
    found |= kAvx512;
    if (c & (1u << 11)) found |= kVnni;
    if (c & (1u << 1)) found |= kVbmi;
    const uint32_t leaf7_d = d;
    uint32_t a1, b1, c1, d1;
    if (__get_cpuid_count(7, 1, &a1, &b1, &c1, &d1) && (a1 & (1u << 5))) found |= kBf16;
    const uint32_t tiles = (1u << 22) | (1u << 24) | (1u << 25);  // AMX BF16, TILE, INT8
    if ((leaf7_d & tiles) == tiles && (state & 0x60000) == 0x60000 && tiles_as_expected() &&
        amx_permitted()) {
      found |= kAmx;
    }
  }
  return found;
}
#else
uint32_t detect() { return 0; }
#endif

struct Level {
  const char* name;
  uint32_t needs;
  bool hidden;  // taken only when named
  const KernelTable* (*table)();
};

const Level kLevels[] = {
#define GM_ISA_LEVEL(name, needs, hidden) {#name, needs, hidden, kernel_table_##name},
#include "isa_levels.inc"
#undef GM_ISA_LEVEL
};

uint32_t features() {
  static const uint32_t found = detect();
  return found;
}

std::string joined(const std::vector<std::string>& names) {
  std::string out;
  for (const auto& n : names) out += (out.empty() ? "" : ", ") + n;
  return out;
}

}  // namespace

std::vector<std::string> available_levels() {
  std::vector<std::string> out;
  for (const Level& level : kLevels) {
    if (!level.hidden && (features() & level.needs) == level.needs) out.emplace_back(level.name);
  }
  return out;
}

std::vector<std::string> compiled_levels() {
  std::vector<std::string> out;
  for (const Level& level : kLevels) {
    if (!level.hidden) out.emplace_back(level.name);
  }
  return out;
}

const KernelTable* kernel_table(const std::string& name) {
  for (const Level& level : kLevels) {
    if (name != level.name) continue;
    if ((features() & level.needs) != level.needs) {
      throw std::invalid_argument(
          "instruction-set level '" + name +
          "' is not available on this machine (available: " + joined(available_levels()) + ")");
    }
    return level.table();
  }
  throw std::invalid_argument("unknown instruction-set level '" + name +
                              "' (known: " + joined(compiled_levels()) + ")");
}

std::string default_level() {
  const char* forced = std::getenv("GRISTMILL_ISA");
  if (forced != nullptr && *forced != '\0') {
    kernel_table(forced);
    return forced;
  }
  return available_levels().back();
}

}  // namespace gm
