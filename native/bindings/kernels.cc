// Single kernels at a named level, for tests and probes. Not used on the run path.
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <vector>

#include "bindings/bind.h"
#include "runtime/arena.h"
#include "runtime/isa.h"
#include "runtime/pool.h"
#include "runtime/shares.h"

using namespace nb::literals;

namespace {

template <class T>
using In = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;
template <class T>
using Out = nb::ndarray<T, nb::c_contig, nb::device::cpu>;

gm::Weight weight(gm::Storage storage, int64_t n, int64_t k, int64_t kp, int64_t group, int64_t groups,
                  int offset, bool wide, int exponent, bool rounded, const In<uint8_t>& values,
                  const In<uint8_t>& scales, const In<uint8_t>& mins) {
  gm::Weight w;
  w.storage = storage;
  w.n = n;
  w.k = k;
  w.kp = kp;
  w.group = group;
  w.groups = groups;
  w.offset = offset;
  w.wide_scales = wide;
  w.e4m3_scales = exponent >= 0;
  w.unit = std::ldexp(1.0f, -std::max(exponent, 0));
  w.rounded = rounded;
  w.values = values.data();
  w.scales = scales.data();
  w.mins = mins.size() > 0 ? mins.data() : nullptr;
  return w;
}

}  // namespace

void bind_kernels(nb::module_& m) {
  nb::class_<gm::Shares>(m, "Shares")
      .def(
          "__init__",
          [](gm::Shares* self, size_t pieces, int threads) {
            new (self) gm::Shares();
            self->resize(pieces, threads);
          },
          "pieces"_a, "threads"_a)
      .def("renew", &gm::Shares::renew)
      .def(
          "take",
          [](gm::Shares& self, size_t piece, int64_t units, int64_t least, int thread) {
            const gm::Range r = self.take(piece, units, least, thread);
            return std::make_tuple(r.begin, r.end);
          },
          "piece"_a, "units"_a, "least"_a, "thread"_a)
      .def(
          "share_out",
          [](gm::Shares& self, gm::Pool& pool, int64_t units, int64_t least, int64_t rounds) {
            std::vector<std::atomic<int64_t>> taken(static_cast<size_t>(units));
            for (int64_t i = 0; i < rounds; ++i) {
              self.renew();
              pool.run([&](int thread) {
                for (;;) {
                  const gm::Range r = self.take(0, units, least, thread);
                  if (r.begin == r.end) return;
                  for (int64_t u = r.begin; u < r.end; ++u) ++taken[static_cast<size_t>(u)];
                }
              });
            }
            return std::vector<int64_t>(taken.begin(), taken.end());
          },
          "pool"_a, "units"_a, "least"_a, "rounds"_a,
          "How often each unit of piece 0 was taken in all rounds, by the pool's threads at once.");
  m.def(
      "encode_int8",
      [](const std::string& level, In<float> x, int64_t group, int64_t kp, In<float> limits,
         In<int32_t> order, Out<int8_t> q, Out<float> scale, Out<int32_t> sum) {
        const gm::Rounding rounding = {limits.size() > 0 ? limits.data() : nullptr,
                                       order.size() > 0 ? order.data() : nullptr};
        std::vector<float> gathered(x.shape(1));
        gm::kernel_table(level)->encode_int8(x.data(), x.shape(1), x.shape(0), x.shape(1), group, kp,
                                             rounding, q.data(), scale.data(), sum.data(), gathered.data());
      },
      "level"_a, "x"_a, "group"_a, "kp"_a, "limits"_a, "order"_a, "q"_a, "scale"_a, "sum"_a,
      "limits: the largest code of each group, or empty for 127; order: source columns, or empty.");

  m.def(
      "linear", [](const std::string& level, const std::string& arithmetic, gm::Storage storage, int64_t n,
                   int64_t k, int64_t kp, int64_t group, int64_t groups, int offset, bool wide, int exponent,
                   bool rounded, In<uint8_t> values, In<uint8_t> scales, In<uint8_t> mins, In<float> x,
                   In<float> bias, bool accumulate, Out<float> out, int64_t block_begin, int64_t block_end) {
        const gm::KernelTable* t = gm::kernel_table(level);
        const gm::Weight w =
            weight(storage, n, k, kp, group, groups, offset, wide, exponent, rounded, values, scales, mins);
        const auto rows = static_cast<int64_t>(x.shape(0)), ldx = static_cast<int64_t>(x.shape(1));
        // Poisoned: what scratch held before must not matter.
        std::vector<char> scratch(static_cast<size_t>(gm::linear_scratch_bytes(w, rows)) + 64, '\xff');
        void* aligned = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(scratch.data()) + 63) / 64 * 64);
        gm::LinearOut o;
        o.out = out.data();
        o.ld = static_cast<int64_t>(out.shape(1));
        o.bias = bias.size() > 0 ? bias.data() : nullptr;
        o.accumulate = accumulate;
        if (arithmetic == "int8") {
          std::vector<int8_t> q(static_cast<size_t>(rows * kp) + 64);
          std::vector<float> scale(static_cast<size_t>(rows * groups));
          std::vector<int32_t> sum(static_cast<size_t>(rows * groups));
          t->encode_int8(x.data(), ldx, rows, k, group, kp, {}, q.data(), scale.data(), sum.data(), nullptr);
          gm::Int8Rows r{q.data(), scale.data(), sum.data(), kp, groups};
          t->linear_int8(w, r, rows, block_begin, block_end, o, aligned);
        } else if (arithmetic == "fp8") {
          std::vector<uint16_t> b(static_cast<size_t>(rows * kp) + 64);
          std::vector<float> scale(static_cast<size_t>(rows));
          t->encode_fp8(x.data(), ldx, rows, k, kp, nullptr, b.data(), scale.data(), nullptr);
          o.row_scale = scale.data();
          t->linear_bf16(w, b.data(), kp, rows, block_begin, block_end, o, aligned);
        } else if (arithmetic == "bf16") {
          std::vector<uint16_t> b(static_cast<size_t>(rows * kp) + 64);
          t->encode_bf16(x.data(), ldx, rows, k, kp, b.data());
          t->linear_bf16(w, b.data(), kp, rows, block_begin, block_end, o, aligned);
        } else {
          t->linear_f32(w, x.data(), ldx, rows, block_begin, block_end, o, aligned);
        }
      });

  m.def("decode_row",
        [](const std::string& level, gm::Storage storage, int64_t n, int64_t k, int64_t kp, int64_t group,
           int64_t groups, int offset, bool wide, int exponent, bool rounded, In<uint8_t> values,
           In<uint8_t> scales, In<uint8_t> mins, int64_t row, Out<float> out) {
          gm::kernel_table(level)->decode_row(
              weight(storage, n, k, kp, group, groups, offset, wide, exponent, rounded, values, scales, mins),
              row, out.data());
        });

  m.def(
      "read_bandwidth",
      [](const std::string& level, std::shared_ptr<gm::Pool> pool, int64_t bytes, int rounds) {
        // Bytes per second of the fastest of `rounds` passes over one arena on huge pages.
        nb::gil_scoped_release release;
        const gm::KernelTable* t = gm::kernel_table(level);
        gm::Arena arena(static_cast<size_t>(bytes), true);
        const int threads = pool->threads();
        const int64_t share = bytes / threads / 256 * 256;
        pool->run([&](int thread) {
          for (int64_t i = 0; i < share; i += 4096) arena.data()[thread * share + i] = 1;
        });
        double best = 1e30;
        volatile uint64_t sink = 0;
        for (int r = 0; r < rounds; ++r) {
          const auto begin = std::chrono::steady_clock::now();
          pool->run([&](int thread) { sink = t->read_all(arena.data() + thread * share, share); });
          const double s = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
          best = s < best ? s : best;
        }
        return static_cast<double>(share * threads) / best;
      },
      "level"_a, "pool"_a, "bytes"_a, "rounds"_a);
}
