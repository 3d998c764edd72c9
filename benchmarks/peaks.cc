// Products per second of registers alone: what no kernel with that instruction can exceed. One thread.
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdio>

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
#endif
#elif defined(__FMA__)
  std::printf("\"f32 vfmadd\": %.4g", rate(_mm256_setzero_ps(), _mm256_set1_ps(1.0f), 16,
                                           [](__m256 s, __m256 x) { return _mm256_fmadd_ps(x, x, s); }));
#endif
  std::printf("}\n");
}
