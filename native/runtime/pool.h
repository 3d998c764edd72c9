// A persistent team of threads that runs one function at a time, with a barrier inside it.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace gm {

class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return threads_; }
  // Runs job(thread) on every thread, the caller being thread 0, and returns when all are done. Calls from
  // several threads queue up. The job must not throw.
  void run(const std::function<void(int)>& job);
  // Called by every thread of a running job: none goes on until all have come.
  void barrier();

 private:
  void work(int thread);

  const int threads_;
  std::mutex one_job_;
  const std::function<void(int)>* job_ = nullptr;
  alignas(64) std::atomic<uint32_t> epoch_{0};    // counts jobs
  alignas(64) std::atomic<uint32_t> done_{0};     // workers finished with this job
  alignas(64) std::atomic<uint32_t> arrived_{0};  // threads at the barrier
  alignas(64) std::atomic<uint32_t> phase_{0};    // counts barriers
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};

}  // namespace gm
