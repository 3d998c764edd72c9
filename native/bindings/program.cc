// Program, pool, KV views: what the native executor is made of.
#include "runtime/program.h"

#include <fcntl.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <map>

#include "bindings/bind.h"
#include "runtime/isa.h"

using namespace nb::literals;

namespace {

template <class T>
using Array = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;

// One allocation on huge pages for all weights; slots are 64-byte aligned copies of arrays.
class WeightArena {
 public:
  explicit WeightArena(int64_t bytes) : arena_(static_cast<size_t>(bytes), true) {}
  int64_t put(Array<uint8_t> bytes) {
    const int64_t at = used_;
    const auto n = static_cast<int64_t>(bytes.nbytes());
    if (at + n > static_cast<int64_t>(arena_.bytes()))
      throw std::invalid_argument("the weight arena is full");
    {
      nb::gil_scoped_release release;
      std::memcpy(arena_.data() + at, bytes.data(), static_cast<size_t>(n));
    }
    used_ = (at + n + 63) / 64 * 64;
    return reinterpret_cast<int64_t>(arena_.data() + at);
  }
  // Reads bytes of a file into the arena, past the page tables: a map's pages would count as the process's
  // own.
  int64_t read(const std::string& path, int64_t offset, int64_t bytes) {
    const int64_t at = used_;
    if (bytes < 0 || at + bytes > static_cast<int64_t>(arena_.bytes())) {
      throw std::invalid_argument("the weight arena is full");
    }
    int failure = 0;
    {
      nb::gil_scoped_release release;
      const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
      failure = file < 0 ? errno : 0;
      for (int64_t done = 0; failure == 0 && done < bytes;) {
        const ssize_t n =
            pread(file, arena_.data() + at + done, static_cast<size_t>(bytes - done), offset + done);
        if (n > 0) done += n;
        if (n == 0) failure = ENODATA;
        if (n < 0 && errno != EINTR) failure = errno;
      }
      if (file >= 0) close(file);
    }
    if (failure != 0) {
      errno = failure;
      PyErr_SetFromErrno(PyExc_OSError);
      throw nb::python_error();
    }
    used_ = (at + bytes + 63) / 64 * 64;
    return reinterpret_cast<int64_t>(arena_.data() + at);
  }
  int64_t used() const { return used_; }

 private:
  gm::Arena arena_;
  int64_t used_ = 0;
};

}  // namespace

void bind_isa(nb::module_& m) {
  m.def("available_levels", &gm::available_levels, "Instruction-set levels this machine can run, ascending.");
  m.def("compiled_levels", &gm::compiled_levels);
  m.def("default_level", &gm::default_level,
        "The level in use: the highest, or the one GRISTMILL_ISA names.");
}

void bind_program(nb::module_& m) {
  nb::class_<gm::Pool>(m, "Pool")
      .def(nb::init<int>(), "threads"_a)
      .def_prop_ro("threads", &gm::Pool::threads);

  nb::class_<WeightArena>(m, "WeightArena")
      .def(nb::init<int64_t>(), "bytes"_a)
      .def("put", &WeightArena::put, nb::arg("bytes").noconvert(), "Copies the bytes in; their address.")
      .def("read", &WeightArena::read, "path"_a, "offset"_a, "bytes"_a,
           "Reads part of a file in; its address.")
      .def_prop_ro("used", &WeightArena::used);

  nb::exception<gm::KvExhausted>(m, "KvExhausted");
  nb::enum_<gm::KvPlacement>(m, "KvPlacement")
      .value("TABLE", gm::KvPlacement::kTable)
      .value("MAPPED", gm::KvPlacement::kMapped);
  nb::class_<gm::KvSpan>(m, "KvSpan", "The memory of 256 tokens, kept as long as this object.")
      .def_prop_ro(
          "held",
          [](const gm::KvSpan& span) {
            std::vector<bool> out;
            for (const gm::FrameRef& frame : span.frames) out.push_back(frame != nullptr);
            return out;
          },
          "By window, in the order of the first layers that have it: whether the tokens are still kept.")
      .def_prop_ro(
          "shared",
          [](const gm::KvSpan& span) {
            int64_t most = 0;
            for (const gm::FrameRef& frame : span.frames) {
              if (frame != nullptr) most = std::max<int64_t>(most, frame.use_count());
            }
            return most;
          },
          "References to it, this one included.");
  nb::class_<gm::KvView>(m, "KvView")
      .def_prop_ro("capacity", &gm::KvView::capacity)
      .def_prop_ro("length", &gm::KvView::length)
      .def_prop_ro("reserved_bytes", &gm::KvView::reserved_bytes)
      .def("used_bytes", &gm::KvView::used_bytes)
      .def("wanted_bytes", &gm::KvView::wanted_bytes, "tokens"_a)
      .def("prepare", &gm::KvView::prepare, "tokens"_a)
      .def("truncate", &gm::KvView::truncate, "length"_a)
      .def(
          "fork",
          [](const gm::KvView& v, int64_t length, int64_t capacity) {
            return v.fork(length, capacity).release();
          },
          "length"_a, "capacity"_a, nb::rv_policy::take_ownership)
      .def("span", &gm::KvView::span, "index"_a)
      .def("adopt", &gm::KvView::adopt, "spans"_a, "length"_a);
  nb::class_<gm::KvPool>(m, "KvPool")
      .def_prop_ro("backing", &gm::KvPool::backing)
      .def_prop_ro("limit", &gm::KvPool::limit)
      .def_prop_ro("used", &gm::KvPool::used)
      .def_prop_ro("frame_bytes",
                   [](const gm::KvPool& pool) {
                     int64_t bytes = 0;
                     for (const auto& range : pool.ranges()) bytes += range.frame_bytes;
                     return bytes;
                   })
      .def_prop_ro("windows",
                   [](const gm::KvPool& pool) {
                     std::vector<int64_t> out;
                     for (const auto& range : pool.ranges()) out.push_back(range.window);
                     return out;
                   })
      .def("trim", &gm::KvPool::trim, "keep"_a, "Gives back the pages of free frames, all but `keep` bytes.")
      .def("stats",
           [](const gm::KvPool& pool) {
             const gm::KvPool::Stats s = pool.stats();
             std::map<std::string, int64_t> out{{"limit", s.limit},
                                                {"used", s.used},
                                                {"committed", s.committed},
                                                {"reserved", s.reserved},
                                                {"frames", s.frames},
                                                {"mappings", s.mappings},
                                                {"mapping_limit", s.mapping_limit}};
             return out;
           })
      .def(
          "allocate",
          [](std::shared_ptr<gm::KvPool> pool, int64_t capacity) {
            return new gm::KvView(std::move(pool), capacity);
          },
          "capacity"_a, nb::rv_policy::take_ownership);

  nb::enum_<gm::Storage>(m, "Storage")
      .value("F32", gm::Storage::kF32)
      .value("BF16", gm::Storage::kBf16)
      .value("F16", gm::Storage::kF16)
      .value("INT4", gm::Storage::kInt4)
      .value("INT8", gm::Storage::kInt8)
      .value("INT2", gm::Storage::kInt2)
      .value("INT3", gm::Storage::kInt3)
      .value("INT5", gm::Storage::kInt5)
      .value("INT6", gm::Storage::kInt6)
      .value("SPARSE24", gm::Storage::kSparse24);
  nb::enum_<gm::Encoding>(m, "Encoding")
      .value("F32", gm::Encoding::kF32)
      .value("BF16", gm::Encoding::kBf16)
      .value("INT8", gm::Encoding::kInt8)
      .value("FP8", gm::Encoding::kFp8);
  nb::enum_<gm::KvFormat>(m, "KvFormat")
      .value("F32", gm::KvFormat::kF32)
      .value("BF16", gm::KvFormat::kBf16)
      .value("INT4", gm::KvFormat::kInt4)
      .value("INT4_CHANNEL", gm::KvFormat::kInt4Channel);

  using Factors = std::tuple<int64_t, int64_t, int64_t>;
  using Term = std::tuple<std::vector<Factors>, int64_t, int64_t, bool>;
  nb::class_<gm::Program>(m, "Program")
      .def(
          "__init__",
          [](gm::Program* self, const std::string& level, std::shared_ptr<gm::Pool> pool) {
            new (self) gm::Program(gm::kernel_table(level), std::move(pool));
          },
          "level"_a, "pool"_a)
      .def(
          "add_weight",
          [](gm::Program& p, gm::Storage storage, int64_t n, int64_t k, int64_t kp, int64_t group,
             int64_t groups, int offset, bool wide_scales, int exponent, bool rounded, int64_t values,
             int64_t scales, int64_t mins) {
            gm::Weight w;
            w.storage = storage;
            w.n = n;
            w.k = k;
            w.kp = kp;
            w.group = group;
            w.groups = groups;
            w.offset = offset;
            w.wide_scales = wide_scales;
            w.e4m3_scales = exponent >= 0;
            w.unit = std::ldexp(1.0f, -std::max(exponent, 0));
            w.rounded = rounded;
            w.values = reinterpret_cast<const void*>(values);
            w.scales = reinterpret_cast<const void*>(scales);
            w.mins = reinterpret_cast<const void*>(mins);
            return p.add_weight(w);
          },
          "storage"_a, "n"_a, "k"_a, "kp"_a, "group"_a, "groups"_a, "offset"_a, "wide_scales"_a, "exponent"_a,
          "rounded"_a, "values"_a, "scales"_a, "mins"_a,
          "Registers a packed weight by the addresses of its arrays, which must outlive the program.\n"
          "exponent: of the power of two that E4M3 scales go with, -1 for other scales; rounded: products to "
          "E4M3.")
      .def(
          "add_vector",
          [](gm::Program& p, Array<float> v) {
            return p.add_vector(std::vector<float>(v.data(), v.data() + v.size()));
          },
          nb::arg("values").noconvert())
      .def(
          "add_buffer",
          [](gm::Program& p, gm::Encoding encoding, bool logits, int64_t width, int64_t padded, int64_t group,
             bool private_copies) {
            gm::BufferSpec s;
            s.encoding = encoding;
            s.rows = logits ? gm::Rows::kLogits : gm::Rows::kTokens;
            s.width = width;
            s.padded = padded;
            s.group = group;
            s.private_copies = private_copies;
            return p.add_buffer(s);
          },
          "encoding"_a, "logits"_a, "width"_a, "padded"_a, "group"_a, "private_copies"_a)
      .def("add_rope", &gm::Program::add_rope)
      .def(
          "set_rope",
          [](gm::Program& p, int64_t index, Array<float> cos, Array<float> sin) {
            if (cos.ndim() != 2) throw std::invalid_argument("rope tables must be [positions][half]");
            p.set_rope(index, std::vector<float>(cos.data(), cos.data() + cos.size()),
                       std::vector<float>(sin.data(), sin.data() + sin.size()),
                       static_cast<int64_t>(cos.shape(1)));
          },
          "index"_a, nb::arg("cos").noconvert(), nb::arg("sin").noconvert())
      .def(
          "add_embedding",
          [](gm::Program& p, const std::string& name, int64_t weight, int64_t out, float scale) {
            gm::Node n;
            n.op = gm::Op::kEmbedding;
            n.name = name;
            n.weight = weight;
            n.out = {out};
            n.scale = scale;
            p.add_node(n);
          },
          "name"_a, "weight"_a, "out"_a, "scale"_a)
      .def(
          "add_rmsnorm",
          [](gm::Program& p, const std::string& name, int64_t in, int64_t out, int64_t vector, float eps,
             int64_t heads) {
            gm::Node n;
            n.op = gm::Op::kRmsNorm;
            n.name = name;
            n.in = {in};
            n.out = {out};
            n.vector = vector;
            n.eps = eps;
            n.heads = heads;
            p.add_node(n);
          },
          "name"_a, "in_"_a, "out"_a, "vector"_a, "eps"_a, "heads"_a)
      .def(
          "add_add",
          [](gm::Program& p, const std::string& name, int64_t in, int64_t out) {
            gm::Node n;
            n.op = gm::Op::kAdd;
            n.name = name;
            n.in = {in};
            n.out = {out};
            p.add_node(n);
          },
          "name"_a, "in_"_a, "out"_a, "out += in")
      .def(
          "add_encode",
          [](gm::Program& p, const std::string& name, int64_t in, int64_t out, int phase, int64_t group,
             std::vector<float> limits, std::vector<int32_t> order, bool fp8) {
            gm::Node n;
            n.op = gm::Op::kEncode;
            n.name = name;
            n.in = {in};
            n.out = {out};
            n.phase = static_cast<gm::Phase>(phase);
            n.group = group;
            n.limits = std::move(limits);
            n.order = std::move(order);
            n.fp8 = fp8;
            p.add_node(std::move(n));
          },
          "name"_a, "in_"_a, "out"_a, "phase"_a, "group"_a = 0, "limits"_a = std::vector<float>{},
          "order"_a = std::vector<int32_t>{}, "fp8"_a = false,
          "phase: -1 all rows, 0 those of prompts, 1 generated ones. group: of the rounding that an f32 "
          "output\n"
          "gets, 0 for none. limits: the largest code of each group, empty for 127. order: the column of "
          "`in_`\n"
          "that each one is taken from, empty for its own. fp8: an f32 output gets the values of E4M3.")
      .def(
          "add_linears",
          [](gm::Program& p, const std::string& name, const std::vector<Term>& terms, int gate) {
            gm::Node n;
            n.op = gm::Op::kLinears;
            n.name = name;
            for (const Term& t : terms) {
              gm::LinearTerm term;
              std::vector<Factors> products;
              std::tie(products, term.output, term.bias, term.accumulate) = t;
              for (const auto& [weight, input, prompt_input] : products) {
                term.products.push_back({weight, input, prompt_input});
              }
              n.terms.push_back(std::move(term));
            }
            n.gate = gate >= 0;
            if (n.gate) n.activation = static_cast<gm::Activation>(gate);
            p.add_node(n);
          },
          "name"_a, "terms"_a, "gate"_a,
          "Terms (products, output, bias or -1, accumulate); products (weight, input, input of prompts or "
          "-1).\n"
          "gate: -1, or 0 silu, 1 tanh-gelu of terms 0 and 1.")
      .def(
          "add_attention",
          [](gm::Program& p, const std::string& name, int64_t layer, int64_t q, int64_t k, int64_t v,
             int64_t out, int heads, int kv_heads, int head_dim, float scale, int64_t window, int64_t rope,
             int64_t key_scale, bool bf16_math) {
            gm::Node n;
            n.op = gm::Op::kAttention;
            n.name = name;
            n.layer = layer;
            n.in = {q, k, v};
            n.out = {out};
            n.rope = rope;
            n.key_scale = key_scale;
            n.attention.heads = heads;
            n.attention.kv_heads = kv_heads;
            n.attention.head_dim = head_dim;
            n.attention.scale = scale;
            n.attention.window = window;
            n.attention.kv = p.geometry().layers.at(static_cast<size_t>(layer)).format;
            n.attention.bf16_math = bf16_math;
            p.add_node(n);
          },
          "name"_a, "layer"_a, "q"_a, "k"_a, "v"_a, "out"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "scale"_a,
          "window"_a, "rope"_a, "key_scale"_a, "bf16_math"_a)
      .def(
          "add_select_rows",
          [](gm::Program& p, const std::string& name, int64_t in, int64_t out) {
            gm::Node n;
            n.op = gm::Op::kSelectRows;
            n.name = name;
            n.in = {in};
            n.out = {out};
            p.add_node(n);
          },
          "name"_a, "in_"_a, "out"_a)
      .def(
          "set_geometry",
          [](gm::Program& p, const std::vector<std::tuple<int64_t, int, int, gm::KvFormat>>& layers) {
            gm::KvGeometry g;
            for (const auto& [window, kv_heads, head_dim, format] : layers)
              g.layers.push_back({window, kv_heads, head_dim, format});
            p.set_geometry(g);
          },
          "layers"_a, "Layers as (window, kv_heads, head_dim, format).")
      .def("set_logits", &gm::Program::set_logits, "buffer"_a)
      .def(
          "kv_pool",
          [](const gm::Program& p, int64_t limit, gm::KvPlacement placement, bool memfd) {
            return std::make_shared<gm::KvPool>(p.geometry(), limit, placement, -1, memfd);
          },
          "limit"_a, "placement"_a, "memfd"_a = true,
          "Memory for keys and values, of at most `limit` bytes (0: the machine's).")
      .def_prop_ro("progress", &gm::Program::progress, "Nodes that have been run since the start.")
      .def(
          "run",
          [](gm::Program& p, Array<int32_t> tokens, Array<uint8_t> phases,
             const std::vector<gm::KvView*>& views, const std::vector<int64_t>& lengths,
             Array<int32_t> logit_rows, nb::ndarray<float, nb::c_contig, nb::device::cpu> logits,
             Array<int32_t> cancel) {
            gm::StepInput in;
            in.tokens = tokens.data();
            if (phases.size() != tokens.size()) throw std::invalid_argument("one phase per token is needed");
            in.phases = phases.data();
            in.token_count = static_cast<int64_t>(tokens.size());
            in.views = views;
            in.lengths = lengths;
            in.logit_rows = logit_rows.data();
            in.logit_count = static_cast<int64_t>(logit_rows.size());
            in.logits = logits.data();
            if (static_cast<int64_t>(logits.size()) != in.logit_count * p.vocabulary()) {
              throw std::invalid_argument("the logits array must be [logit rows][vocabulary]");
            }
            in.cancel = cancel.size() > 0 ? cancel.data() : nullptr;
            nb::gil_scoped_release release;
            return p.run(in);
          },
          nb::arg("tokens").noconvert(), nb::arg("phases").noconvert(), "views"_a, "lengths"_a,
          nb::arg("logit_rows").noconvert(), nb::arg("logits").noconvert(), nb::arg("cancel").noconvert(),
          "One step; false if cancelled. The GIL is released.")
      .def("set_profiling", &gm::Program::set_profiling, "on"_a)
      .def("profile",
           [](const gm::Program& p) {
             std::vector<std::tuple<std::string, double>> out;
             for (const gm::NodeTime& t : p.profile()) out.emplace_back(t.name, t.seconds);
             return out;
           })
      .def_prop_ro("prompts_in_bf16", [](const gm::Program& p) { return p.kernels()->prompts_in_bf16; })
      .def_prop_ro("level", [](const gm::Program& p) { return p.kernels()->level; });
}
