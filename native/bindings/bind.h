#pragma once

#include <nanobind/nanobind.h>

namespace nb = nanobind;

void bind_isa(nb::module_& m);
void bind_program(nb::module_& m);
void bind_kernels(nb::module_& m);
void bind_attention_kernels(nb::module_& m);
void bind_sampler(nb::module_& m);
void bind_interrupt(nb::module_& m);
