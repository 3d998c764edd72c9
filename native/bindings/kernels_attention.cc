// Norms, activations and attention at a named level, for tests. Not used on the run path.
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <vector>

#include "bindings/bind.h"
#include "runtime/arena.h"
#include "runtime/isa.h"
#include "runtime/kv.h"

using namespace nb::literals;

namespace {

template <class T>
using In = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;
template <class T>
using Out = nb::ndarray<T, nb::c_contig, nb::device::cpu>;

// One attention layer with sequences of its own: new tokens are appended and attended to in one call, as in a
// step. key_scale [kv_heads * head_dim], or empty.
class AttentionLayer {
 public:
  AttentionLayer(std::string level, int heads, int kv_heads, int head_dim, float scale, int64_t window,
                 gm::KvFormat kv, bool bf16_math, In<float> key_scale)
      : level_(std::move(level)), key_scale_(key_scale.data(), key_scale.data() + key_scale.size()) {
    args_.heads = heads;
    args_.kv_heads = kv_heads;
    args_.head_dim = head_dim;
    args_.scale = scale;
    args_.window = window;
    args_.kv = kv;
    args_.bf16_math = bf16_math;
    geometry_.layers.push_back({window, kv_heads, head_dim, kv});
  }

  // Tests fill the cache with NaN, which must not leak from keys that nobody wrote.
  gm::KvView* allocate(int64_t capacity, int fill, bool mapped) const {
    const auto placement = mapped ? gm::KvPlacement::kMapped : gm::KvPlacement::kTable;
    const int64_t bytes =
        (capacity / gm::kSpanTokens + 2) * gm::kSpanTokens * args_.kv_heads * (args_.head_dim + 64) * 8;
    return new gm::KvView(std::make_shared<gm::KvPool>(geometry_, bytes, placement, fill), capacity);
  }

  // q [tokens][heads * head_dim], k and v [tokens][kv_heads * head_dim]; `parts` splits every phase into that
  // many ranges, run in descending order.
  void run(In<float> q, In<float> k, In<float> v, In<float> cos, In<float> sin, Out<float> out,
           const std::vector<gm::KvView*>& views, const std::vector<int64_t>& lengths, int64_t parts) {
    const gm::KernelTable* t = gm::kernel_table(level_);
    gm::AttentionArgs a = args_;
    const auto tokens = static_cast<int64_t>(q.shape(0));
    a.q = q.data();
    a.k = k.data();
    a.v = v.data();
    a.out = out.data();
    a.ldq = a.ldo = a.heads * a.head_dim;
    a.ldk = a.ldv = a.kv_heads * a.head_dim;
    a.cos = cos.data();
    a.sin = sin.data();
    a.rope_dim = 2 * static_cast<int64_t>(cos.shape(1));
    if (!key_scale_.empty()) a.key_scale = key_scale_.data();
    std::vector<gm::AttentionSequence> sequences;
    int64_t row = 0;
    for (size_t i = 0; i < views.size(); ++i) {
      views[i]->prepare(lengths[i]);
      sequences.push_back({views[i]->segment(0), row, lengths[i], views[i]->length()});
      row += lengths[i];
    }
    a.sequences = sequences.data();
    a.sequence_count = static_cast<int64_t>(sequences.size());
    gm::Arena partials(static_cast<size_t>(t->attention_partial_floats(a)) * 4 + 64, false);
    gm::Arena scratch(static_cast<size_t>(t->attention_scratch_bytes(a)), false);
    a.partials = reinterpret_cast<float*>(partials.data());
    auto in_parts = [parts](int64_t n, auto run) {
      for (int64_t p = parts - 1; p >= 0; --p) run(n * p / parts, n * (p + 1) / parts);
    };
    if (t->attention_long(a)) {
      in_parts(tokens, [&](int64_t b, int64_t e) { t->attention_prepare(a, b, e, scratch.data()); });
    }
    in_parts(t->attention_items(a),
             [&](int64_t b, int64_t e) { t->attention_spans(a, b, e, scratch.data()); });
    in_parts(tokens, [&](int64_t b, int64_t e) { t->attention_commit(a, b, e, scratch.data()); });
    in_parts(tokens, [&](int64_t b, int64_t e) { t->attention_merge(a, b, e); });
    for (size_t i = 0; i < views.size(); ++i) views[i]->append(lengths[i]);
  }

 private:
  std::string level_;
  std::vector<float> key_scale_;
  gm::AttentionArgs args_;
  gm::KvGeometry geometry_;
};

}  // namespace

void bind_attention_kernels(nb::module_& m) {
  nb::class_<AttentionLayer>(m, "AttentionLayer")
      .def(nb::init<std::string, int, int, int, float, int64_t, gm::KvFormat, bool, In<float>>(), "level"_a,
           "heads"_a, "kv_heads"_a, "head_dim"_a, "scale"_a, "window"_a, "kv"_a, "bf16_math"_a, "key_scale"_a)
      .def("allocate", &AttentionLayer::allocate, "capacity"_a, "fill"_a = 0, "mapped"_a = false,
           nb::rv_policy::take_ownership)
      .def("run", &AttentionLayer::run, "q"_a, "k"_a, "v"_a, "cos"_a, "sin"_a, "out"_a, "views"_a,
           "lengths"_a, "parts"_a = 1);

  m.def(
      "rmsnorm",
      [](const std::string& level, In<float> x, In<float> w, Out<float> y, float eps) {
        const auto n = static_cast<int64_t>(x.shape(1));
        gm::kernel_table(level)->rmsnorm(x.data(), n, w.data(), y.data(), n, static_cast<int64_t>(x.shape(0)),
                                         n, eps);
      },
      "level"_a, "x"_a, "w"_a, "y"_a, "eps"_a);
  m.def(
      "add",
      [](const std::string& level, Out<float> x, In<float> y) {
        const auto n = static_cast<int64_t>(x.shape(1));
        gm::kernel_table(level)->add(x.data(), n, y.data(), n, static_cast<int64_t>(x.shape(0)), n);
      },
      "level"_a, "x"_a, "y"_a);
  m.def(
      "gated",
      [](const std::string& level, In<float> gate, In<float> up, Out<float> out, int activation) {
        const auto n = static_cast<int64_t>(gate.shape(1));
        gm::kernel_table(level)->gated(gate.data(), up.data(), out.data(), n,
                                       static_cast<int64_t>(gate.shape(0)), n,
                                       static_cast<gm::Activation>(activation));
      },
      "level"_a, "gate"_a, "up"_a, "out"_a, "activation"_a);
}
