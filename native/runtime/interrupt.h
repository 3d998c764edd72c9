// Ctrl-C while Python is not running: a handler that stops the step in progress.
#pragma once

#include <cstdint>

namespace gm {

// From now on SIGINT also sets *word to 1, before the handler in place runs. False, with nothing changed,
// where SIGINT is ignored or left to the system. Main thread only, not nested.
bool watch_interrupt(int32_t* word);
// Puts the former handler back.
void unwatch_interrupt();

}  // namespace gm
