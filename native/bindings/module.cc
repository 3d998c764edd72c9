// The extension module: thin bindings, one file per area.
#include "bindings/bind.h"

NB_MODULE(_native, m) {
  m.doc() = "Native runtime and kernels of gristmill.";
  bind_isa(m);
  bind_program(m);
  bind_kernels(m);
  bind_attention_kernels(m);
  bind_sampler(m);
  bind_interrupt(m);
}
