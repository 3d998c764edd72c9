#include "runtime/interrupt.h"

#include <signal.h>

#include <atomic>

namespace gm {
namespace {

std::atomic<int32_t*> watched{nullptr};
struct sigaction former;

// Everything here is safe in a signal handler. Python's own handler, called last, only notes the signal.
void on_interrupt(int number, siginfo_t* info, void* context) {
  if (int32_t* word = watched.load(std::memory_order_relaxed)) __atomic_store_n(word, 1, __ATOMIC_RELEASE);
  if (former.sa_flags & SA_SIGINFO) {
    former.sa_sigaction(number, info, context);
  } else {
    former.sa_handler(number);
  }
}

}  // namespace

bool watch_interrupt(int32_t* word) {
  if (watched.load() != nullptr) return false;
  if (sigaction(SIGINT, nullptr, &former) != 0) return false;
  const bool plain = !(former.sa_flags & SA_SIGINFO);
  if (plain && (former.sa_handler == SIG_DFL || former.sa_handler == SIG_IGN)) return false;
  watched.store(word);
  struct sigaction action = {};
  action.sa_sigaction = on_interrupt;
  action.sa_flags = SA_SIGINFO | (former.sa_flags & SA_ONSTACK);
  sigemptyset(&action.sa_mask);
  if (sigaction(SIGINT, &action, nullptr) == 0) return true;
  watched.store(nullptr);
  return false;
}

void unwatch_interrupt() {
  if (watched.load() == nullptr) return;
  sigaction(SIGINT, &former, nullptr);
  watched.store(nullptr);
}

}  // namespace gm
