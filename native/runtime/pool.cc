#include "runtime/pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gm {
namespace {

// Spinning is bounded, so that idle threads cost nothing and two engines on two cores do not starve each
// other. About 50 microseconds inside a step, and as much between steps of a running generation.
constexpr int kSpins = 4000;

inline void pause_briefly() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Waits until `word` differs from `old`.
void await_change(std::atomic<uint32_t>& word, uint32_t old) {
  for (int i = 0; i < kSpins; ++i) {
    if (word.load(std::memory_order_acquire) != old) return;
    pause_briefly();
  }
  while (word.load(std::memory_order_acquire) == old) word.wait(old, std::memory_order_acquire);
}

}  // namespace

Pool::Pool(int threads) : threads_(threads < 1 ? 1 : threads) {
  for (int t = 1; t < threads_; ++t) workers_.emplace_back([this, t] { work(t); });
}

Pool::~Pool() {
  stop_.store(true, std::memory_order_release);
  epoch_.fetch_add(1, std::memory_order_acq_rel);
  epoch_.notify_all();
  for (auto& w : workers_) w.join();
}

void Pool::run(const std::function<void(int)>& job) {
  std::lock_guard<std::mutex> lock(one_job_);
  if (threads_ == 1) {
    job(0);
    return;
  }
  job_ = &job;
  done_.store(0, std::memory_order_relaxed);
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  job(0);
  const uint32_t all = static_cast<uint32_t>(threads_ - 1);
  for (uint32_t seen = done_.load(std::memory_order_acquire); seen != all;
       seen = done_.load(std::memory_order_acquire)) {
    await_change(done_, seen);
  }
}

void Pool::work(int thread) {
  uint32_t seen = 0;
  for (;;) {
    await_change(epoch_, seen);
    // Exactly one new job: run() waits for all workers before it publishes the next.
    ++seen;
    if (stop_.load(std::memory_order_acquire)) return;
    (*job_)(thread);
    done_.fetch_add(1, std::memory_order_release);
    done_.notify_all();
  }
}

void Pool::barrier() {
  if (threads_ == 1) return;
  const uint32_t phase = phase_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(threads_)) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.fetch_add(1, std::memory_order_release);
    phase_.notify_all();
    return;
  }
  await_change(phase_, phase);
}

}  // namespace gm
