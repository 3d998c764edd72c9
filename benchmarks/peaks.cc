// Products per second of registers alone: what no kernel with that instruction can exceed. One thread.
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdio>

namespace {

constexpr int kChains = 12;  // enough to cover the latency
constexpr long kSteps = 20'000'000;

template <class Vector, class Step>
double rate(Vector zero, int operations, Step step) {
  double best = 0;
  for (int run = 0; run < 5; ++run) {
    Vector sum[kChains];
    for (Vector& s : sum) s = zero;
    const auto begin = std::chrono::steady_clock::now();
    for (long i = 0; i < kSteps; ++i) {
#pragma GCC unroll 12
      for (int c = 0; c < kChains; ++c) {
        sum[c] = step(sum[c]);
        __asm__ volatile("" : "+v"(sum[c]));  // every step counts
      }
    }
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    best = std::max(best, kSteps * double(kChains) * operations / seconds);
  }
  return best;
}

}  // namespace

int main() {
  std::printf("{");
#if defined(__AVX512F__)
  const __m512 one = _mm512_set1_ps(1.0f);
  std::printf("\"f32 vfmadd\": %.4g", rate(_mm512_setzero_ps(), 32, [&](__m512 s) {
                return _mm512_fmadd_ps(one, one, s);
              }));
#if defined(__AVX512BF16__)
  const __m512bh pairs = (__m512bh)_mm512_set1_epi16(0x3f80);
  std::printf(", \"bf16 vdpbf16ps\": %.4g", rate(_mm512_setzero_ps(), 64, [&](__m512 s) {
                return _mm512_dpbf16_ps(s, pairs, pairs);
              }));
#endif
#if defined(__AVX512VNNI__)
  const __m512i bytes = _mm512_set1_epi8(1);
  std::printf(", \"int8 vpdpbusd\": %.4g", rate(_mm512_setzero_si512(), 128, [&](__m512i s) {
                return _mm512_dpbusd_epi32(s, bytes, bytes);
              }));
#endif
#elif defined(__FMA__)
  const __m256 one = _mm256_set1_ps(1.0f);
  std::printf("\"f32 vfmadd\": %.4g", rate(_mm256_setzero_ps(), 16, [&](__m256 s) {
                return _mm256_fmadd_ps(one, one, s);
              }));
#endif
  std::printf("}\n");
}
