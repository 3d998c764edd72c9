// Sampling: per-sequence state and one call per step.
#include "runtime/sampler.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <stdexcept>

#include "bindings/bind.h"
#include "runtime/isa.h"

using namespace nb::literals;

namespace {

template <class T>
using Array = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;

using Scored = std::tuple<float, std::vector<std::tuple<int32_t, float>>>;

Scored scored(const gm::SampleRow::Draw& draw) {
  std::vector<std::tuple<int32_t, float>> top;
  for (size_t i = 0; i < draw.top.size(); ++i) top.emplace_back(draw.top[i], draw.top_logprobs[i]);
  return {draw.logprob, std::move(top)};
}

// The kernels of a level, of the one in use if it has no name.
const gm::KernelTable* kernels_of(const std::string& level) {
  static const gm::KernelTable* const usual = gm::kernel_table(gm::default_level());
  return level.empty() ? usual : gm::kernel_table(level);
}

}  // namespace

void bind_sampler(nb::module_& m) {
  nb::class_<gm::SampleRow>(m, "SampleRow", "Sampling state of one sequence.")
      .def(
          "__init__",
          [](gm::SampleRow* self, Array<int32_t> prompt, float temperature, int64_t top_k, float top_p,
             float min_p, float repetition, float presence, float frequency, uint64_t seed, int logprobs) {
            gm::SamplingOptions o;
            o.temperature = temperature;
            o.top_k = top_k;
            o.top_p = top_p;
            o.min_p = min_p;
            o.repetition = repetition;
            o.presence = presence;
            o.frequency = frequency;
            o.seed = seed;
            o.logprobs = logprobs;
            if (!(temperature >= 0) || top_k < 0 || !(top_p > 0) || !(min_p >= 0) || !(repetition > 0) ||
                !std::isfinite(presence) || !std::isfinite(frequency) || logprobs < -1) {
              throw std::invalid_argument("a sampling value is out of range");
            }
            new (self) gm::SampleRow(o, prompt.data(), static_cast<int64_t>(prompt.size()));
          },
          nb::arg("prompt").noconvert(), "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "repetition"_a,
          "presence"_a, "frequency"_a, "seed"_a, "logprobs"_a)
      .def_prop_ro("position", &gm::SampleRow::position, "Tokens so far: the position of the next one.")
      .def("push", &gm::SampleRow::push, "token"_a, "Appends a token that was not drawn here.")
      .def("bias", &gm::SampleRow::bias, "tokens"_a, "values"_a, "Added to the logits of tokens, always.")
      .def(
          "mask",
          [](gm::SampleRow& row, Array<int32_t> words) {
            row.mask(std::vector<uint32_t>(words.data(), words.data() + words.size()));
          },
          nb::arg("words").noconvert(),
          "Allows only tokens whose bit is set, until the next call; an empty array allows all.")
      .def(
          "logprobs", [](const gm::SampleRow& row) { return scored(row.draw); },
          "Of the last draw: the log probability of its token, and (id, log probability) of the most "
          "probable.");

  m.def(
      "sample",
      [](Array<float> logits, const std::vector<gm::SampleRow*>& rows,
         nb::ndarray<int32_t, nb::c_contig, nb::device::cpu> tokens, const std::shared_ptr<gm::Pool>& pool,
         const std::string& level) {
        if (logits.ndim() != 2 || logits.shape(0) != rows.size() || tokens.size() != rows.size()) {
          throw std::invalid_argument("logits must be [rows][vocabulary], tokens [rows]");
        }
        const auto vocabulary = static_cast<int64_t>(logits.shape(1));
        const gm::KernelTable* kernels = kernels_of(level);
        nb::gil_scoped_release release;
        gm::sample(*kernels, logits.data(), static_cast<int64_t>(rows.size()), vocabulary, rows.data(),
                   tokens.data(), pool.get());
      },
      nb::arg("logits").noconvert(), "rows"_a, nb::arg("tokens").noconvert(), "pool"_a.none(), "level"_a = "",
      "Draws the next token of every row (all different) into `tokens` and appends it to the row. The result "
      "is the same "
      "at every level.");

  m.def(
      "score",
      [](Array<float> logits, Array<int32_t> tokens, int64_t top, const std::shared_ptr<gm::Pool>& pool) {
        if (logits.ndim() != 2 || logits.shape(0) != tokens.size()) {
          throw std::invalid_argument("logits must be [rows][vocabulary], tokens [rows]");
        }
        std::vector<gm::SampleRow::Draw> draws(tokens.size());
        const auto count = static_cast<int64_t>(tokens.size());
        {
          nb::gil_scoped_release release;
          gm::score(*kernels_of(""), logits.data(), count, static_cast<int64_t>(logits.shape(1)),
                    tokens.data(), top, draws.data(), pool.get());
        }
        std::vector<Scored> out;
        for (const gm::SampleRow::Draw& draw : draws) out.push_back(scored(draw));
        return out;
      },
      nb::arg("logits").noconvert(), nb::arg("tokens").noconvert(), "top"_a, "pool"_a.none(),
      "Of every row: the log probability of its token, and (id, log probability) of the most probable.");

  m.def(
      "philox",
      [](uint64_t key, uint64_t low, uint64_t high) {
        const auto words = gm::philox(key, low, high);
        return std::make_tuple(words[0], words[1], words[2], words[3]);
      },
      "key"_a, "counter_low"_a, "counter_high"_a);
}
