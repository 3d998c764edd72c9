// Ctrl-C during native steps.
#include "runtime/interrupt.h"

#include <nanobind/ndarray.h>

#include <stdexcept>

#include "bindings/bind.h"

using namespace nb::literals;

void bind_interrupt(nb::module_& m) {
  m.def(
      "watch_interrupt",
      [](nb::ndarray<int32_t, nb::c_contig, nb::device::cpu> word) {
        if (word.size() != 1) throw std::invalid_argument("the word must be one int32");
        return gm::watch_interrupt(word.data());
      },
      nb::arg("word").noconvert(),
      "From now on SIGINT also sets `word`, which must outlive the watch, to 1 at once. Call from the main "
      "thread; "
      "false, with nothing changed, where SIGINT has no handler.");
  m.def("unwatch_interrupt", &gm::unwatch_interrupt, "Ends the watch.");
}
