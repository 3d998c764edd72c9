// Products per second of registers alone: what no kernel with that instruction can exceed. One thread.
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <vector>
#if defined(__AMX_TILE__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int kChains = 12;  // enough to cover the latency
constexpr long kSteps = 20'000'000;

template <class Vector, class Step>
double rate(Vector zero, Vector operand, int operations, Step step) {
  double best = 0;
  for (int run = 0; run < 5; ++run) {
    Vector sum[kChains];
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) {
      sum[c] = zero;
      __asm__ volatile("" : "+v"(sum[c]));  // chains of their own, for all the compiler knows
    }
    const auto begin = std::chrono::steady_clock::now();
    for (long i = 0; i < kSteps; ++i) {
      __asm__ volatile("" : "+v"(operand));  // another one each time, for all the compiler knows
#pragma GCC unroll 12
      for (int c = 0; c < kChains; ++c) sum[c] = step(sum[c], operand);
    }
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) __asm__ volatile("" : : "v"(sum[c]));
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    best = std::max(best, kSteps * double(kChains) * operations / seconds);
  }
  return best;
}

#if defined(__AVX512VNNI__)
// Products of int8 whose sums are scaled after every 32 of them, by the weight's scale times the row's, and
// get the minimum times the row's sum, if there is one: what integer weights in groups of 32 need at least.
template <bool kMinimums>
double rate_in_groups() {
  double best = 0;
  __m512i codes = _mm512_set1_epi8(1);
  __m512 scale = _mm512_set1_ps(1.0f), low = scale, row = scale;
  for (int run = 0; run < 5; ++run) {
    __m512 sum[kChains];
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) {
      sum[c] = _mm512_setzero_ps();
      __asm__ volatile("" : "+v"(sum[c]));
    }
    const auto begin = std::chrono::steady_clock::now();
    for (long i = 0; i < kSteps / 8; ++i) {
      __m512i dot[kChains];
#pragma GCC unroll 12
      for (int c = 0; c < kChains; ++c) {
        dot[c] = _mm512_setzero_si512();
        __asm__ volatile("" : "+v"(dot[c]));
      }
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) {
        __asm__ volatile("" : "+v"(codes));
#pragma GCC unroll 12
        for (int c = 0; c < kChains; ++c) dot[c] = _mm512_dpbusd_epi32(dot[c], codes, codes);
      }
      __asm__ volatile("" : "+v"(scale), "+v"(low));
#pragma GCC unroll 12
      for (int c = 0; c < kChains; ++c) {
        __asm__ volatile("" : "+v"(row));
        sum[c] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[c]), _mm512_mul_ps(scale, row), sum[c]);
        if (kMinimums) sum[c] = _mm512_fmadd_ps(low, row, sum[c]);
      }
    }
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) __asm__ volatile("" : : "v"(sum[c]));
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    best = std::max(best, kSteps * double(kChains) * 128 / seconds);
  }
  return best;
}
#endif

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
// Linux lets a process have tiles that asks for them.
bool tiles_permitted() {
  constexpr long kArchReqXcompPerm = 0x1023, kXtileData = 18;
  if (syscall(SYS_arch_prctl, kArchReqXcompPerm, kXtileData) != 0) return false;
  alignas(64) unsigned char config[64] = {1};
  for (int t = 0; t < 8; ++t) {
    config[16 + 2 * t] = 64;  // bytes of a row
    config[48 + t] = 16;      // rows
  }
  __asm__ volatile("" : : "r"(config) : "memory");  // the intrinsic hides how much it reads
  _tile_loadconfig(config);
  return true;
}

struct Spread {
  double best, median;
};

// `step` makes four products of full tiles. Two processors of one core share the unit that makes them: what
// the other one does shows in the median.
template <class Step>
Spread rate_of_tiles(int operations, Step step) {
  std::vector<double> rates;
  for (int run = 0; run < 41; ++run) {
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < 200'000; ++i) step(i);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    rates.push_back(200'000.0 * 4 * operations / seconds);
  }
  std::sort(rates.begin(), rates.end());
  return {rates.back(), rates[rates.size() / 2]};
}

void print_tiles() {
  if (!tiles_permitted()) return;
  alignas(64) static char data[32768];
  const auto print = [](const char* name, Spread spread) {
    std::printf(", \"%s\": %.4g, \"%s, median\": %.4g", name, spread.best, name, spread.median);
  };
  print("bf16 tdpbf16ps", rate_of_tiles(16384, [](int) {
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }));
  print("int8 tdpbssd", rate_of_tiles(32768, [](int) {
          _tile_dpbssd(0, 4, 6);
          _tile_dpbssd(1, 4, 7);
          _tile_dpbssd(2, 5, 6);
          _tile_dpbssd(3, 5, 7);
        }));
  print("bf16 tdpbf16ps, tiles loaded", rate_of_tiles(16384, [](int i) {
          const char* from = data + i % 8 * 1024;
          _tile_loadd(4, from, 64);
          _tile_loadd(6, from + 8192, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_loadd(7, from + 16384, 64);
          _tile_dpbf16ps(1, 4, 7);
          _tile_loadd(5, from + 24576, 64);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }));
  _tile_release();
}
#endif

}  // namespace

int main() {
  std::printf("{");
#if defined(__AVX512F__)
  std::printf("\"f32 vfmadd\": %.4g", rate(_mm512_setzero_ps(), _mm512_set1_ps(1.0f), 32,
                                           [](__m512 s, __m512 x) { return _mm512_fmadd_ps(x, x, s); }));
#if defined(__AVX512BF16__)
  std::printf(", \"bf16 vdpbf16ps\": %.4g",
              rate(_mm512_setzero_ps(), _mm512_set1_ps(1.0f), 64,
                   [](__m512 s, __m512 x) { return _mm512_dpbf16_ps(s, (__m512bh)x, (__m512bh)x); }));
#endif
#if defined(__AVX512VNNI__)
  std::printf(", \"int8 vpdpbusd\": %.4g",
              rate(_mm512_setzero_si512(), _mm512_set1_epi8(1), 128,
                   [](__m512i s, __m512i x) { return _mm512_dpbusd_epi32(s, x, x); }));
  std::printf(", \"int8, scales per 32\": %.4g", rate_in_groups<false>());
  std::printf(", \"int8, scales and minimums per 32\": %.4g", rate_in_groups<true>());
#endif
#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
  print_tiles();
#endif
#elif defined(__FMA__)
  std::printf("\"f32 vfmadd\": %.4g", rate(_mm256_setzero_ps(), _mm256_set1_ps(1.0f), 16,
                                           [](__m256 s, __m256 x) { return _mm256_fmadd_ps(x, x, s); }));
#endif
  std::printf("}\n");
}
