#include "runtime/program.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <limits>
#include <set>
#include <stdexcept>

namespace gm {
namespace {

// Values of a row set that every thread computes for itself rather than wait for the others.
constexpr int64_t kPrivateValues = 8192;

// Rows of a gate and its partner that are computed before they are combined: six tiles of 12.
constexpr int64_t kGateRows = 72;

// What a thread takes at once of rows at least, and normalises before it encodes them, and of weights in
// units: fours of blocks, as kernels work on two or four at a time, or single ones where all threads would
// not get some otherwise, or where all rows are int8 and there are no tiles: that kernel takes one block at a
// time, and shares are even; pairs where many bf16 rows meet tiles as they lie. Kernels that pack their rows
// do so in every call, so with many rows they get more.
constexpr int64_t kLeastRows = 8, kTwo = 2, kFour = 4, kFours = 1, kPackedFours = 4;
constexpr int64_t kManyRows = AmxFewShape::kMostRows;

int64_t align64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

Rounding rounding_of(const Node& node) {
  return {node.limits.empty() ? nullptr : node.limits.data(),
          node.order.empty() ? nullptr : node.order.data()};
}

float float_of_bf16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

Program::Program(const KernelTable* kernels, std::shared_ptr<Pool> pool)
    : kernels_(kernels), pool_(std::move(pool)) {}

int64_t Program::add_weight(const Weight& weight) {
  weights_.push_back(weight);
  return static_cast<int64_t>(weights_.size()) - 1;
}

int64_t Program::add_vector(std::vector<float> values) {
  vectors_.push_back(std::move(values));
  return static_cast<int64_t>(vectors_.size()) - 1;
}

int64_t Program::add_buffer(const BufferSpec& spec) {
  Buffer b;
  b.spec = spec;
  if (b.spec.padded < b.spec.width) b.spec.padded = b.spec.width;
  // Rows a large power of two apart would all meet in the same few lines of a cache; a line more spreads
  // them.
  const int64_t element = element_bytes(spec.encoding);
  if (b.spec.padded * element % 1024 == 0) b.spec.padded += 64 / element;
  buffers_.push_back(b);
  reserved_tokens_ = reserved_logits_ = 0;
  return static_cast<int64_t>(buffers_.size()) - 1;
}

int64_t Program::add_rope() {
  ropes_.emplace_back();
  return static_cast<int64_t>(ropes_.size()) - 1;
}

void Program::set_rope(int64_t index, std::vector<float> cos, std::vector<float> sin, int64_t half) {
  Rope& r = ropes_.at(static_cast<size_t>(index));
  if (half < 1 || cos.size() != sin.size() || cos.size() % static_cast<size_t>(half) != 0) {
    throw std::invalid_argument("rope tables must be [positions][half]");
  }
  r.positions = static_cast<int64_t>(cos.size()) / half;
  r.half = half;
  r.cos = std::move(cos);
  r.sin = std::move(sin);
}

void Program::set_logits(int64_t buffer) {
  BufferSpec& spec = buffers_.at(static_cast<size_t>(buffer)).spec;
  spec.padded = spec.width;  // the caller's array
  logits_ = buffer;
}

void Program::add_node(Node node) {
  auto known = [this](int64_t b) { return b >= 0 && b < static_cast<int64_t>(buffers_.size()); };
  bool good = true;
  for (const int64_t b : node.in) good &= known(b);
  for (const int64_t b : node.out) good &= known(b);
  for (const LinearTerm& t : node.terms) {
    good &= known(t.output) && t.bias < static_cast<int64_t>(vectors_.size()) && !t.products.empty();
    for (const Product& p : t.products) {
      good &= known(p.input) && p.weight >= 0 && p.weight < static_cast<int64_t>(weights_.size()) &&
              (p.prompt_input < 0 || known(p.prompt_input));
      // The blocks of a term are cut once for all of its products.
      good = good && weight_of(p).n == weight_of(t.products[0]).n;
      good = good && !(weight_of(p).e4m3_scales &&
                       buffers_[static_cast<size_t>(p.input)].spec.encoding == Encoding::kInt8);
    }
  }
  if (good && node.op == Op::kEncode) {
    const BufferSpec& from = buffers_[static_cast<size_t>(node.in[0])].spec;
    const BufferSpec& to = buffers_[static_cast<size_t>(node.out[0])].spec;
    const int64_t group = to.encoding == Encoding::kInt8 ? to.group : node.group;
    const auto groups = static_cast<size_t>(group > 0 ? (to.width + group - 1) / group : 0);
    good = (node.limits.empty() || node.limits.size() == groups) &&
           (node.order.empty() || node.order.size() == static_cast<size_t>(to.width)) &&
           (to.encoding != Encoding::kF32 || group > 0 || node.fp8 || !node.order.empty()) &&
           from.width == to.width;
    for (const float limit : node.limits) good = good && limit >= 1 && limit <= 127;
    for (const int32_t c : node.order) good = good && c >= 0 && c < from.width;
    if (!good) throw std::invalid_argument("node '" + node.name + "' rounds what it cannot");
  }
  if (!good) throw std::invalid_argument("node '" + node.name + "' names an unknown buffer or weight");
  // Threads share the rows or blocks of these, whatever else they do with copies of their own.
  const auto shared = [this](int64_t b) { return !buffers_[static_cast<size_t>(b)].spec.private_copies; };
  for (const LinearTerm& t : node.terms) good &= shared(t.output);
  if (node.op == Op::kAdd || node.op == Op::kEmbedding) good &= shared(node.out[0]);
  if (!good) throw std::invalid_argument("node '" + node.name + "' writes to a buffer with private copies");
  for (const LinearTerm& t : node.terms) {
    for (const Product& p : t.products) phased_ |= p.prompt_input >= 0;
  }
  nodes_.push_back(std::move(node));
  times_.push_back({nodes_.back().name, 0.0});
  reserved_tokens_ = reserved_logits_ = 0;
}

void Program::check(const StepInput& in) const {
  if (logits_ < 0) throw std::invalid_argument("the program has no logits buffer");
  if (in.views.size() != in.lengths.size()) throw std::invalid_argument("one length per view is needed");
  int64_t total = 0;
  for (size_t s = 0; s < in.views.size(); ++s) {
    const int64_t n = in.lengths[s];
    const KvView& v = *in.views[s];
    if (n < 0) throw std::invalid_argument("negative number of tokens");
    if (v.length() + n > v.capacity()) {
      throw std::invalid_argument("sequence of " + std::to_string(v.length()) + " tokens plus " +
                                  std::to_string(n) + " exceeds its capacity of " +
                                  std::to_string(v.capacity()));
    }
    for (const Rope& r : ropes_) {
      if (v.length() + n > r.positions) throw std::invalid_argument("position beyond the rope table");
    }
    for (size_t other = 0; other < s; ++other) {
      if (in.views[other] == in.views[s]) throw std::invalid_argument("a view appears twice in one step");
    }
    total += n;
  }
  if (total != in.token_count) throw std::invalid_argument("lengths do not add up to the tokens given");
  for (int64_t i = 0; i < in.logit_count; ++i) {
    if (in.logit_rows[i] < 0 || in.logit_rows[i] >= in.token_count) {
      throw std::invalid_argument("logit row out of range");
    }
  }
  for (const Node& node : nodes_) {
    if (node.op != Op::kEmbedding) continue;
    const int64_t n = weights_[static_cast<size_t>(node.weight)].n;
    for (int64_t i = 0; i < in.token_count; ++i) {
      if (in.tokens[i] < 0 || in.tokens[i] >= n) {
        throw std::invalid_argument("token " + std::to_string(in.tokens[i]) +
                                    " is outside the vocabulary of " + std::to_string(n));
      }
    }
  }
}

void Program::reserve(int64_t tokens, int64_t logits) {
  if (tokens <= reserved_tokens_ && logits <= reserved_logits_) return;
  shares_.resize(nodes_.size(), pool_->threads());
  reserved_tokens_ = std::max(tokens, reserved_tokens_);
  reserved_logits_ = std::max(logits, reserved_logits_);
  const int threads = pool_->threads();
  int64_t total = 0;
  std::vector<int64_t> offsets;
  for (size_t i = 0; i < buffers_.size(); ++i) {
    Buffer& b = buffers_[i];
    if (static_cast<int64_t>(i) == logits_) {  // the caller's memory
      offsets.push_back(0);
      continue;
    }
    const int64_t rows = b.spec.rows == Rows::kTokens ? reserved_tokens_ : reserved_logits_;
    const int64_t groups = b.spec.group > 0 ? (b.spec.width + b.spec.group - 1) / b.spec.group : 0;
    auto bytes_of = [&](int64_t n) -> int64_t {
      const int64_t scales = b.spec.encoding == Encoding::kFp8 ? align64(n * 4) : 2 * align64(n * groups * 4);
      return align64(n * b.spec.padded * element_bytes(b.spec.encoding)) + scales;
    };
    const int64_t few =
        std::min(rows, std::max<int64_t>(1, kPrivateValues / std::max<int64_t>(1, b.spec.padded)));
    b.copy_bytes = bytes_of(few) + 64;
    // Slack after the last row: kernels may read a full vector there.
    const int64_t bytes = std::max(bytes_of(rows), b.spec.private_copies ? b.copy_bytes * threads : 0) + 128;
    offsets.push_back(total);
    total += align64(bytes);
  }
  workspace_ = Arena();
  workspace_ = Arena(static_cast<size_t>(total), true);
  for (size_t i = 0; i < buffers_.size(); ++i) buffers_[i].data = workspace_.data() + offsets[i];

  scratch_bytes_ = 4096;
  for (const Node& node : nodes_) {
    for (const LinearTerm& t : node.terms) {
      const Buffer& out = buffers_[static_cast<size_t>(t.output)];
      const int64_t rows = out.spec.rows == Rows::kTokens ? reserved_tokens_ : reserved_logits_;
      for (const Product& p : t.products) {
        scratch_bytes_ = std::max(scratch_bytes_, linear_scratch_bytes(weight_of(p), rows));
      }
    }
    if (node.op == Op::kEncode) {
      const int64_t width = buffers_[static_cast<size_t>(node.out[0])].spec.width;
      scratch_bytes_ = std::max(scratch_bytes_, align64(4 * width) + align64(width) + 8 * width);
    }
  }
}

// Decides for this step's shape which buffers are private and where the threads must meet.
void Program::plan(int64_t tokens, int64_t logits, bool long_sequences) {
  if (tokens == tokens_ && logits == logit_rows_ && long_sequences == long_sequences_ &&
      barrier_before_.size() == nodes_.size()) {
    return;
  }
  long_sequences_ = long_sequences;
  tokens_ = tokens;
  logit_rows_ = logits;
  for (Buffer& b : buffers_) {
    b.replicated =
        pool_->threads() > 1 && b.spec.private_copies && rows_of(b) * b.spec.padded <= kPrivateValues;
    const int64_t groups = b.spec.group > 0 ? (b.spec.width + b.spec.group - 1) / b.spec.group : 0;
    const int64_t rows = rows_of(b);
    b.scale_at = align64(rows * b.spec.padded * element_bytes(b.spec.encoding));
    b.sum_at = b.scale_at + align64(rows * groups * 4);
  }
  // A long sequence's results are written by the thread that has the item; only merged ones can be private.
  for (const Node& node : nodes_) {
    if (node.op == Op::kAttention && long_sequences)
      buffers_[static_cast<size_t>(node.out[0])].replicated = false;
  }
  joined_.assign(nodes_.size(), 0);
  for (size_t i = 1; i < nodes_.size(); ++i) joined_[i] = joins(i) ? 1 : 0;
  barrier_before_.assign(nodes_.size(), 0);
  std::set<int64_t> read, written;
  for (size_t i = 0; i < nodes_.size(); ++i) {
    if (joined_[i] != 0) continue;
    const Node& node = nodes_[i];
    std::set<int64_t> r(node.in.begin(), node.in.end()), w(node.out.begin(), node.out.end());
    for (size_t j = i + 1; j < nodes_.size() && joined_[j] != 0; ++j) {
      w.insert(nodes_[j].out.begin(), nodes_[j].out.end());
    }
    for (const LinearTerm& t : node.terms) {
      for (const Product& p : t.products) {
        r.insert(p.input);
        if (p.prompt_input >= 0) r.insert(p.prompt_input);
      }
      w.insert(t.output);
    }
    auto shared = [this](int64_t b) { return !buffers_[static_cast<size_t>(b)].replicated; };
    auto meets = [&](const std::set<int64_t>& a, const std::set<int64_t>& b) {
      return std::any_of(a.begin(), a.end(), [&](int64_t x) { return shared(x) && b.count(x) != 0; });
    };
    if (meets(r, written) || meets(w, read) || meets(w, written)) {
      barrier_before_[i] = 1;
      read.clear();
      written.clear();
    }
    read.insert(r.begin(), r.end());
    written.insert(w.begin(), w.end());
  }
}

// Whether an encoding is of the norm before it (or of the norm whose other encodings are before it), and rows
// are cut alike: the norm's rows are then encoded as they come, while they are in the nearest cache.
bool Program::joins(size_t i) const {
  const Node& node = nodes_[i];
  if (node.op != Op::kEncode) return false;
  size_t first = i - 1;
  while (joined_[first] != 0) --first;
  const Node& norm = nodes_[first];
  if (norm.op != Op::kRmsNorm || norm.out[0] != node.in[0]) return false;
  const Buffer &from = buffers_[static_cast<size_t>(norm.out[0])],
               &to = buffers_[static_cast<size_t>(node.out[0])];
  return from.spec.rows == to.spec.rows && from.replicated == to.replicated;
}

// Cuts this step's rows into runs of one phase; one run where no node asks.
void Program::find_runs() {
  for (const Rows kind : {Rows::kTokens, Rows::kLogits}) {
    std::vector<Run>& runs = runs_[static_cast<size_t>(kind)];
    const int64_t rows = kind == Rows::kTokens ? input_->token_count : input_->logit_count;
    runs.clear();
    if (!phased_) {
      runs.push_back({0, rows, Phase::kAll});
      continue;
    }
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t token = kind == Rows::kTokens ? i : input_->logit_rows[i];
      const Phase phase = input_->phases[token] == 0 ? Phase::kPrompt : Phase::kGenerated;
      if (runs.empty() || runs.back().phase != phase) runs.push_back({i, i, phase});
      runs.back().end = i + 1;
    }
  }
}

Int8Rows Program::int8(const Buffer& b, int thread) const {
  Int8Rows x;
  char* base = at(b, thread);
  x.q = reinterpret_cast<int8_t*>(base);
  x.scale = reinterpret_cast<float*>(base + b.scale_at);
  x.sum = reinterpret_cast<int32_t*>(base + b.sum_at);
  x.kp = b.spec.padded;
  x.groups = (b.spec.width + b.spec.group - 1) / b.spec.group;
  return x;
}

bool Program::run(const StepInput& input) {
  check(input);
  if (input.token_count == 0) return true;
  for (size_t s = 0; s < input.views.size(); ++s) input.views[s]->prepare(input.lengths[s]);
  reserve(input.token_count, input.logit_count);
  input_ = &input;
  find_runs();
  buffers_[static_cast<size_t>(logits_)].data = reinterpret_cast<char*>(input.logits);

  const size_t count = input.views.size();
  sequences_.resize(geometry_.layers.size() * count);
  for (size_t layer = 0; layer < geometry_.layers.size(); ++layer) {
    int64_t row = 0;
    for (size_t s = 0; s < count; ++s) {
      AttentionSequence& a = sequences_[layer * count + s];
      a.kv = input.views[s]->segment(static_cast<int64_t>(layer));
      a.row = row;
      a.rows = input.lengths[s];
      a.start = input.views[s]->length();
      row += input.lengths[s];
    }
  }
  int64_t partials = 0, scratch = scratch_bytes_;
  bool long_sequences = false;
  for (const Node& node : nodes_) {
    if (node.op != Op::kAttention) continue;
    AttentionArgs a = node.attention;
    a.sequences = sequences_.data() + static_cast<size_t>(node.layer) * count;
    a.sequence_count = static_cast<int64_t>(count);
    partials = std::max(partials, kernels_->attention_partial_floats(a));
    scratch = std::max(scratch, kernels_->attention_scratch_bytes(a));
    long_sequences |= kernels_->attention_long(a);
  }
  plan(input.token_count, input.logit_count, long_sequences);
  scratch = align64(scratch);
  const auto scratch_total = static_cast<size_t>(scratch * pool_->threads());
  if (scratch_total > scratch_.bytes()) {
    scratch_ = Arena();
    scratch_ = Arena(scratch_total, true);
  }
  scratch_bytes_ = scratch;
  if (static_cast<size_t>(partials) * 4 > partials_.bytes()) {
    partials_ = Arena();
    partials_ = Arena(static_cast<size_t>(partials) * 8, true);
  }

  stop_[0] = stop_[1] = 0;
  shares_.renew();
  pool_->run([this](int thread) { run_thread(thread); });
  const bool cancelled = stop_[0] != 0 || stop_[1] != 0;
  input_ = nullptr;
  if (cancelled) return false;
  for (size_t s = 0; s < count; ++s) input.views[s]->append(input.lengths[s]);
  return true;
}

void Program::run_thread(int thread) {
  uint32_t meeting = 0;
  double last = profiling_ && thread == 0 ? now() : 0;
  for (size_t i = 0; i < nodes_.size(); ++i) {
    if (barrier_before_[i] != 0) {
      // Thread 0 alone looks at the flag; the slot it writes is read by all after the barrier and reused only
      // after the next one, so every thread leaves at the same node.
      int32_t& stop = stop_[meeting++ & 1];
      if (thread == 0) stop = input_->cancel != nullptr && *input_->cancel != 0 ? 1 : 0;
      pool_->barrier();
      if (stop != 0) return;
    }
    if (joined_[i] == 0) run_node(nodes_[i], thread);
    if (thread == 0) progress_.fetch_add(1, std::memory_order_relaxed);
    if (profiling_ && thread == 0) {
      const double t = now();
      times_[i].seconds += t - last;
      last = t;
    }
  }
}

// Calls fn with ranges of `units` until all are taken.
template <class Fn>
void Program::share(const Node& node, int64_t units, int64_t least, int thread, Fn fn) {
  const auto piece = static_cast<size_t>(&node - nodes_.data());
  for (;;) {
    const Range r = shares_.take(piece, units, least, thread);
    if (r.begin == r.end) return;
    fn(r);
  }
}

// The rows of `to`, all of them where every thread has a copy.
template <class Fn>
void Program::share(const Node& node, const Buffer& to, int thread, Fn fn) {
  if (to.replicated) {
    fn(Range{0, rows_of(to)});
  } else {
    share(node, rows_of(to), kLeastRows, thread, fn);
  }
}

void Program::run_node(const Node& node, int thread) {
  switch (node.op) {
    case Op::kEmbedding: {
      const Weight& w = weights_[static_cast<size_t>(node.weight)];
      const int64_t ld = buffers_[static_cast<size_t>(node.out[0])].spec.padded;
      share(node, tokens_, kLeastRows, thread, [&](Range r) {
        for (int64_t i = r.begin; i < r.end; ++i) {
          float* out = f32(node.out[0], thread) + i * ld;
          kernels_->decode_row(w, input_->tokens[i], out);
          if (node.scale != 1.0f) {
            for (int64_t c = 0; c < w.k; ++c) out[c] *= node.scale;
          }
        }
      });
      return;
    }
    case Op::kRmsNorm: {
      const Buffer& to = buffers_[static_cast<size_t>(node.out[0])];
      const int64_t part = to.spec.width / node.heads;
      const int64_t ldx = buffers_[static_cast<size_t>(node.in[0])].spec.padded, ldy = to.spec.padded;
      const float* x = f32(node.in[0], thread);
      float* y = f32(node.out[0], thread);
      const float* w = vectors_[static_cast<size_t>(node.vector)].data();
      const size_t next = static_cast<size_t>(&node - nodes_.data()) + 1;
      share(node, to, thread, [&](Range all) {
        for (Range r = all; r.begin < all.end; r.begin = r.end) {
          r.end = std::min(r.begin + kLeastRows, all.end);
          if (node.heads == 1) {
            kernels_->rmsnorm(x + r.begin * ldx, ldx, w, y + r.begin * ldy, ldy, r.end - r.begin, part,
                              node.eps);
          } else {
            for (int64_t i = r.begin; i < r.end; ++i) {
              kernels_->rmsnorm(x + i * ldx, part, w, y + i * ldy, part, node.heads, part, node.eps);
            }
          }
          for (size_t i = next; i < nodes_.size() && joined_[i] != 0; ++i) run_encode(nodes_[i], r, thread);
        }
      });
      return;
    }
    case Op::kAdd: {
      const Buffer& to = buffers_[static_cast<size_t>(node.out[0])];
      const int64_t ldx = to.spec.padded, ldy = buffers_[static_cast<size_t>(node.in[0])].spec.padded;
      share(node, rows_of(to), kLeastRows, thread, [&](Range r) {
        kernels_->add(f32(node.out[0], thread) + r.begin * ldx, ldx, f32(node.in[0], thread) + r.begin * ldy,
                      ldy, r.end - r.begin, to.spec.width);
      });
      return;
    }
    case Op::kEncode:
      share(node, buffers_[static_cast<size_t>(node.out[0])], thread,
            [&](Range r) { run_encode(node, r, thread); });
      return;
    case Op::kLinears:
      run_linears(node, thread);
      return;
    case Op::kAttention:
      run_attention(node, thread);
      return;
    case Op::kSelectRows: {
      const int64_t ldx = buffers_[static_cast<size_t>(node.in[0])].spec.padded;
      const float* x = f32(node.in[0], thread);
      float* y = f32(node.out[0], thread);
      const Buffer& to = buffers_[static_cast<size_t>(node.out[0])];
      share(node, to, thread, [&](Range r) {
        for (int64_t i = r.begin; i < r.end; ++i) {
          std::memcpy(y + i * to.spec.padded, x + input_->logit_rows[i] * ldx,
                      static_cast<size_t>(to.spec.width) * 4);
        }
      });
      return;
    }
  }
}

void Program::run_encode(const Node& node, Range mine, int thread) {
  const Buffer& to = buffers_[static_cast<size_t>(node.out[0])];
  const int64_t ldx = buffers_[static_cast<size_t>(node.in[0])].spec.padded;
  const Rounding rounding = rounding_of(node);
  auto* gathered = reinterpret_cast<float*>(scratch_.data() + thread * scratch_bytes_);
  for (const Run& run : runs_of(to)) {
    if (node.phase != Phase::kAll && run.phase != node.phase) continue;
    const int64_t begin = std::max(run.begin, mine.begin), count = std::min(run.end, mine.end) - begin;
    if (count <= 0) continue;
    const float* x = f32(node.in[0], thread) + begin * ldx;
    if (to.spec.encoding == Encoding::kBf16) {
      auto* out = reinterpret_cast<uint16_t*>(at(to, thread)) + begin * to.spec.padded;
      kernels_->encode_bf16(x, ldx, count, to.spec.width, to.spec.padded, out);
      continue;
    }
    if (to.spec.encoding == Encoding::kFp8) {
      auto* out = reinterpret_cast<uint16_t*>(at(to, thread)) + begin * to.spec.padded;
      kernels_->encode_fp8(x, ldx, count, to.spec.width, to.spec.padded, rounding.order, out,
                           row_scales(to, thread) + begin, gathered);
      continue;
    }
    if (to.spec.encoding == Encoding::kF32) {
      round_rows(node, x, ldx, count, f32(node.out[0], thread) + begin * to.spec.padded, thread);
      continue;
    }
    const Int8Rows q = int8(to, thread);
    kernels_->encode_int8(x, ldx, count, to.spec.width, to.spec.group, to.spec.padded, rounding,
                          const_cast<int8_t*>(q.q) + begin * q.kp,
                          const_cast<float*>(q.scale) + begin * q.groups,
                          const_cast<int32_t*>(q.sum) + begin * q.groups, gathered);
  }
}

// The values that the codes of `rows` rows stand for.
void Program::round_rows(const Node& node, const float* x, int64_t ldx, int64_t rows, float* out,
                         int thread) {
  const BufferSpec& to = buffers_[static_cast<size_t>(node.out[0])].spec;
  const int64_t width = to.width;
  const Rounding rounding = rounding_of(node);
  if (node.fp8) {
    auto* gathered = reinterpret_cast<float*>(scratch_.data() + thread * scratch_bytes_);
    auto* values = reinterpret_cast<uint16_t*>(gathered + width);
    for (int64_t r = 0; r < rows; ++r) {
      float scale;
      kernels_->encode_fp8(x + r * ldx, ldx, 1, width, width, rounding.order, values, &scale, gathered);
      for (int64_t c = 0; c < width; ++c) out[r * to.padded + c] = scale * float_of_bf16(values[c]);
    }
    return;
  }
  if (node.group == 0) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < width; ++c) out[r * to.padded + c] = x[r * ldx + rounding.order[c]];
    }
    return;
  }
  char* scratch = scratch_.data() + thread * scratch_bytes_;
  auto* q = reinterpret_cast<int8_t*>(scratch + align64(4 * width));
  auto* scale = reinterpret_cast<float*>(scratch + align64(4 * width) + align64(width));
  auto* sum = reinterpret_cast<int32_t*>(scale + width);
  for (int64_t r = 0; r < rows; ++r) {
    kernels_->encode_int8(x + r * ldx, ldx, 1, width, node.group, width, rounding, q, scale, sum,
                          reinterpret_cast<float*>(scratch));
    for (int64_t c = 0; c < width; ++c) {
      out[r * to.padded + c] = scale[c / node.group] * static_cast<float>(q[c]);
    }
  }
}

void Program::run_linears(const Node& node, int thread) {
  if (node.gate) {
    run_gate(node, thread);
    return;
  }
  // The blocks of all terms in one line.
  const Cut cut = cut_of(node);
  int64_t total = 0;
  for (const LinearTerm& t : node.terms) total += units_of(t, cut.unit);
  share(node, total, cut.least, thread, [&](Range mine) {
    int64_t before = 0;
    for (const LinearTerm& t : node.terms) {
      const int64_t units = units_of(t, cut.unit);
      const Range blocks = blocks_of(t, cut.unit,
                                     {std::clamp<int64_t>(mine.begin - before, 0, units),
                                      std::clamp<int64_t>(mine.end - before, 0, units)});
      before += units;
      const int64_t rows = rows_of(buffers_[static_cast<size_t>(t.output)]);
      if (blocks.begin < blocks.end) run_linear(t, blocks.begin, blocks.end, 0, rows, thread);
    }
  });
}

Range Program::blocks_of(const LinearTerm& t, int64_t unit, Range units) const {
  const int64_t blocks = weight_of(t.products[0]).blocks();
  return {std::min(unit * units.begin, blocks), std::min(unit * units.end, blocks)};
}

Program::Cut Program::cut_of(const Node& node) const {
  int64_t blocks = 0;
  for (const LinearTerm& t : node.terms) blocks += weight_of(t.products[0]).blocks();
  if (blocks < kFour * kFours * pool_->threads()) return {1, 1};
  const bool tiles = kernels_->prompts_in_bf16;
  int64_t unit = kFour;
  bool single = !tiles;
  const auto packs = [&](const Weight& w, int64_t rows, int64_t input, bool as_values) {
    if (rows <= kManyRows) return false;
    const Encoding encoding = buffers_[static_cast<size_t>(input)].spec.encoding;
    if (encoding == Encoding::kF32) return false;
    if (encoding == Encoding::kInt8) return w.integer() && tiles;
    if (tiles) unit = kTwo;
    // On tiles, weights in smaller groups become bf16 themselves, and rows are loaded where they lie.
    return w.integer() && (!tiles || (w.group >= 64 && !as_values));
  };
  for (const LinearTerm& t : node.terms) {
    const Buffer& to = buffers_[static_cast<size_t>(t.output)];
    const int64_t rows = rows_of(to);
    int64_t prompt = 0;
    for (const Run& run : runs_of(to)) prompt += run.phase == Phase::kPrompt ? run.end - run.begin : 0;
    for (const Product& p : t.products) {
      single &= buffers_[static_cast<size_t>(p.input)].spec.encoding == Encoding::kInt8;
      const int64_t apart = p.prompt_input >= 0 ? prompt : 0;
      const Weight& w = weight_of(p);
      if (packs(w, rows - apart, p.input, false) || packs(w, apart, p.prompt_input, true)) {
        return {kFour, kPackedFours};
      }
    }
  }
  if (single) return {1, kFour * kFours};
  return {unit, kFours};
}

// Gate and up are cut alike, so that a thread has both; few rows at a time, so that they are still in the
// cache when they are combined. Arithmetics that decode the weights first take all rows at once.
void Program::run_gate(const Node& node, int thread) {
  const LinearTerm &gate = node.terms[0], &up = node.terms[1];
  const Weight& w = weight_of(gate.products[0]);
  const Buffer& to = buffers_[static_cast<size_t>(gate.output)];
  // The tiles of `prompts_in_bf16` decode int8's weights as well.
  const bool in_place =
      !kernels_->prompts_in_bf16 &&
      buffers_[static_cast<size_t>(gate.products[0].input)].spec.encoding == Encoding::kInt8;
  const int64_t rows = rows_of(to), panel = in_place ? kGateRows : std::max<int64_t>(1, rows);
  const Cut cut = cut_of(node);
  share(node, units_of(gate, cut.unit), cut.least, thread, [&](Range units) {
    const Range blocks = blocks_of(gate, cut.unit, units);
    const int64_t begin = blocks.begin * 16, end = std::min(blocks.end * 16, w.n);
    for (int64_t row = 0; row < rows; row += panel) {
      const int64_t count = std::min(panel, rows - row);
      run_linear(gate, blocks.begin, blocks.end, row, count, thread);
      run_linear(up, blocks.begin, blocks.end, row, count, thread);
      float* g = f32(gate.output, thread) + row * to.spec.padded + begin;
      const float* u = f32(up.output, thread) + row * to.spec.padded + begin;
      kernels_->gated(g, u, g, to.spec.padded, count, end - begin, node.activation);
    }
  });
}

void Program::run_linear(const LinearTerm& t, int64_t block_begin, int64_t block_end, int64_t row,
                         int64_t rows, int thread) {
  char* scratch = scratch_.data() + thread * scratch_bytes_;
  const Buffer& to = buffers_[static_cast<size_t>(t.output)];
  for (const Run& run : runs_of(to)) {
    const int64_t begin = std::max(run.begin, row), count = std::min(run.end, row + rows) - begin;
    if (count <= 0) continue;
    LinearOut out;
    out.ld = to.spec.padded;
    out.out = f32(t.output, thread) + begin * out.ld;
    out.bias = t.bias < 0 ? nullptr : vectors_[static_cast<size_t>(t.bias)].data();
    out.accumulate = t.accumulate;
    for (const Product& p : t.products) {
      Weight w = weight_of(p);
      w.as_values = run.phase == Phase::kPrompt && p.prompt_input >= 0;
      const int64_t input = w.as_values ? p.prompt_input : p.input;
      const Buffer& from = buffers_[static_cast<size_t>(input)];
      const int64_t ldx = from.spec.padded;
      switch (from.spec.encoding) {
        case Encoding::kInt8: {
          Int8Rows x = int8(from, thread);
          x.q += begin * x.kp;
          x.scale += begin * x.groups;
          x.sum += begin * x.groups;
          kernels_->linear_int8(w, x, count, block_begin, block_end, out, scratch);
          break;
        }
        case Encoding::kFp8:
          out.row_scale = row_scales(from, thread) + begin;
          [[fallthrough]];
        case Encoding::kBf16:
          kernels_->linear_bf16(w, reinterpret_cast<const uint16_t*>(at(from, thread)) + begin * ldx, ldx,
                                count, block_begin, block_end, out, scratch);
          break;
        case Encoding::kF32:
          kernels_->linear_f32(w, f32(input, thread) + begin * ldx, ldx, count, block_begin, block_end, out,
                               scratch);
          break;
      }
      out.bias = nullptr;
      out.accumulate = true;
      out.row_scale = nullptr;
    }
  }
}

void Program::run_attention(const Node& node, int thread) {
  const int threads = pool_->threads();
  const size_t count = input_->views.size();
  AttentionArgs a = node.attention;
  auto width = [this](int64_t b) { return buffers_[static_cast<size_t>(b)].spec.padded; };
  a.q = f32(node.in[0], thread);
  a.ldq = width(node.in[0]);
  a.k = f32(node.in[1], thread);
  a.ldk = width(node.in[1]);
  a.v = f32(node.in[2], thread);
  a.ldv = width(node.in[2]);
  a.out = f32(node.out[0], thread);
  a.ldo = width(node.out[0]);
  if (node.rope >= 0) {
    const Rope& r = ropes_[static_cast<size_t>(node.rope)];
    a.cos = r.cos.data();
    a.sin = r.sin.data();
    a.rope_dim = 2 * r.half;
  }
  if (node.key_scale >= 0) a.key_scale = vectors_[static_cast<size_t>(node.key_scale)].data();
  a.sequences = sequences_.data() + static_cast<size_t>(node.layer) * count;
  a.sequence_count = static_cast<int64_t>(count);
  a.partials = reinterpret_cast<float*>(partials_.data());

  char* scratch = scratch_.data() + thread * scratch_bytes_;
  const Range rows = split(tokens_, thread, threads);
  if (kernels_->attention_long(a)) {
    kernels_->attention_prepare(a, rows.begin, rows.end, scratch);
    pool_->barrier();
  }

  share(node, kernels_->attention_items(a), 1, thread,
        [&](Range items) { kernels_->attention_spans(a, items.begin, items.end, scratch); });
  pool_->barrier();
  const bool alone = buffers_[static_cast<size_t>(node.out[0])].replicated;
  kernels_->attention_commit(a, rows.begin, rows.end, scratch);
  kernels_->attention_merge(a, alone ? 0 : rows.begin, alone ? tokens_ : rows.end);
}

void Program::set_profiling(bool on) {
  profiling_ = on;
  for (NodeTime& t : times_) t.seconds = 0;
}

std::vector<NodeTime> Program::profile() const { return times_; }

}  // namespace gm
