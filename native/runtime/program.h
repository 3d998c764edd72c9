// A lowered program: nodes over buffers, run by a team of threads in one call per step.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "gristmill/kernel.h"
#include "runtime/arena.h"
#include "runtime/kv.h"
#include "runtime/pool.h"
#include "runtime/shares.h"

namespace gm {

enum class Rows : int32_t { kTokens = 0, kLogits = 1 };
enum class Encoding : int32_t { kF32 = 0, kBf16 = 1, kInt8 = 2, kFp8 = 3 };

// Bytes of a value. kFp8 rows are E4M3 values kept as bf16, which every kernel of bf16 multiplies, and a
// scale.
constexpr int64_t element_bytes(Encoding e) { return e == Encoding::kF32 ? 4 : e == Encoding::kInt8 ? 1 : 2; }

// A matrix with one row per token or per wanted logit row.
struct BufferSpec {
  Encoding encoding = Encoding::kF32;
  Rows rows = Rows::kTokens;
  int64_t width = 0;   // columns used
  int64_t padded = 0;  // columns stored at least, the distance of rows (encodings pad with zeros)
  int64_t group = 0;   // of int8
  // Small results may be computed by every thread into a copy of its own, which is cheaper than a barrier.
  bool private_copies = false;
};

enum class Op : int32_t {
  kEmbedding,
  kRmsNorm,
  kAdd,
  kEncode,
  kLinears,
  kAttention,
  kSelectRows,
};

// A packed weight of a kLinears node and what it is multiplied with.
struct Product {
  int64_t weight = 0;         // index of the weight
  int64_t input = 0;          // buffer: f32, bf16, int8 or fp8; its encoding names the arithmetic
  int64_t prompt_input = -1;  // buffer that rows of prompts take instead of `input`, or -1
};

// output = sum of the products, in order, the bias after the first; or output += that sum.
struct LinearTerm {
  std::vector<Product> products;
  int64_t output = 0;  // f32 buffer
  int64_t bias = -1;   // index of a vector, or -1
  bool accumulate = false;
};

// Which rows a node concerns itself with.
enum class Phase : int32_t { kAll = -1, kPrompt = 0, kGenerated = 1 };

struct Node {
  Op op = Op::kAdd;
  std::string name;
  std::vector<int64_t> in, out;
  std::vector<LinearTerm> terms;  // kLinears
  bool gate = false;              // kLinears: terms 0 and 1 are gate and up; output 0 becomes act(gate) * up
  Activation activation = Activation::kSilu;
  int64_t weight = -1;  // kEmbedding: packed weight
  int64_t vector = -1;  // kRmsNorm: index of the weight vector
  float eps = 0, scale = 1;
  int64_t heads = 1;          // kRmsNorm: the row is normalised in `heads` equal parts
  int64_t layer = 0;          // kAttention
  AttentionArgs attention;    // kAttention: constants only
  int64_t rope = -1;          // kAttention: index of the rope table
  int64_t key_scale = -1;     // kAttention: index of a vector, or -1
  Phase phase = Phase::kAll;  // kEncode
  // kEncode: the codes' largest absolute value per group (empty: 127), and the column that each one is taken
  // from (empty: its own). An f32 output gets the rounded values; where `group` is 0, the columns alone.
  std::vector<float> limits;
  std::vector<int32_t> order;
  int64_t group = 0;
  bool fp8 = false;  // kEncode: an f32 output gets the values of E4M3
};

struct StepInput {
  const int32_t* tokens = nullptr;
  const uint8_t* phases = nullptr;  // [token_count]: 0 of a prompt, 1 generated
  int64_t token_count = 0;
  std::vector<KvView*> views;
  std::vector<int64_t> lengths;  // new tokens per view
  const int32_t* logit_rows = nullptr;
  int64_t logit_count = 0;
  float* logits = nullptr;                   // [logit_count][vocabulary]
  const volatile int32_t* cancel = nullptr;  // polled between nodes; may be null
};

// Seconds per node, summed over the steps since the last reset. Encodings that a norm takes along count as
// its.
struct NodeTime {
  std::string name;
  double seconds = 0;
};

class Program {
 public:
  Program(const KernelTable* kernels, std::shared_ptr<Pool> pool);

  int64_t add_weight(const Weight& weight);
  int64_t add_vector(std::vector<float> values);
  int64_t add_buffer(const BufferSpec& spec);
  int64_t add_rope();
  // Replaces a table: cos and sin, [positions][half].
  void set_rope(int64_t index, std::vector<float> cos, std::vector<float> sin, int64_t half);
  void add_node(Node node);
  void set_geometry(const KvGeometry& geometry) { geometry_ = geometry; }
  const KvGeometry& geometry() const { return geometry_; }
  // The f32 buffer whose rows are the logits.
  void set_logits(int64_t buffer);

  // Runs one step and appends its tokens to the views; false if cancelled, which leaves the views' lengths
  // alone. Throws std::invalid_argument for a step that does not fit, KvExhausted without memory for its keys
  // and values. The GIL is not needed.
  bool run(const StepInput& input);

  // Nodes run so far, to be read from other threads: whether a step goes on.
  int64_t progress() const { return progress_.load(std::memory_order_relaxed); }
  void set_profiling(bool on);
  std::vector<NodeTime> profile() const;
  int threads() const { return pool_->threads(); }
  const KernelTable* kernels() const { return kernels_; }
  int64_t vocabulary() const { return buffers_[static_cast<size_t>(logits_)].spec.width; }

 private:
  struct Buffer {
    BufferSpec spec;
    char* data = nullptr;    // copy 0
    int64_t copy_bytes = 0;  // distance between copies
    int64_t row_bytes = 0;
    int64_t scale_at = 0, sum_at = 0;  // int8 and fp8: offsets of scales and sums within a copy
    bool replicated = false;           // in the step being run
  };

  void check(const StepInput& input) const;
  void reserve(int64_t tokens, int64_t logits);
  void plan(int64_t tokens, int64_t logits, bool long_sequences);
  bool joins(size_t node) const;
  struct Run {  // of rows of one phase
    int64_t begin, end;
    Phase phase;
  };
  void find_runs();
  const std::vector<Run>& runs_of(const Buffer& b) const {
    return runs_[b.spec.rows == Rows::kTokens ? 0 : 1];
  }
  int64_t rows_of(const Buffer& b) const { return b.spec.rows == Rows::kTokens ? tokens_ : logit_rows_; }
  char* at(const Buffer& b, int thread) const { return b.data + (b.replicated ? thread * b.copy_bytes : 0); }
  float* f32(int64_t buffer, int thread) const {
    return reinterpret_cast<float*>(at(buffers_[static_cast<size_t>(buffer)], thread));
  }
  Int8Rows int8(const Buffer& b, int thread) const;
  float* row_scales(const Buffer& b, int thread) const {
    return reinterpret_cast<float*>(at(b, thread) + b.scale_at);
  }
  void run_thread(int thread);
  template <class Fn>
  void share(const Node& node, int64_t units, int64_t least, int thread, Fn fn);
  template <class Fn>
  void share(const Node& node, const Buffer& to, int thread, Fn fn);
  void run_node(const Node& node, int thread);
  void run_encode(const Node& node, Range mine, int thread);
  void round_rows(const Node& node, const float* x, int64_t ldx, int64_t rows, float* out, int thread);
  void run_linears(const Node& node, int thread);
  void run_gate(const Node& node, int thread);
  void run_linear(const LinearTerm& t, int64_t block_begin, int64_t block_end, int64_t row, int64_t rows,
                  int thread);
  const Weight& weight_of(const Product& p) const { return weights_[static_cast<size_t>(p.weight)]; }
  struct Cut {  // of a node's blocks
    int64_t unit, least;
  };
  Cut cut_of(const Node& node) const;
  int64_t units_of(const LinearTerm& t, int64_t unit) const {
    return (weight_of(t.products[0]).blocks() + unit - 1) / unit;
  }
  Range blocks_of(const LinearTerm& t, int64_t unit, Range units) const;
  void run_attention(const Node& node, int thread);

  const KernelTable* kernels_;
  std::shared_ptr<Pool> pool_;
  std::vector<Weight> weights_;
  std::vector<std::vector<float>> vectors_;
  std::vector<Buffer> buffers_;
  struct Rope {
    std::vector<float> cos, sin;
    int64_t half = 0, positions = 0;
  };
  std::vector<Rope> ropes_;
  std::vector<Node> nodes_;
  KvGeometry geometry_;
  int64_t logits_ = -1;

  // State of the step being run.
  const StepInput* input_ = nullptr;
  int64_t tokens_ = 0, logit_rows_ = 0;
  bool phased_ = false;       // some node treats prompts otherwise
  std::vector<Run> runs_[2];  // of the tokens and of the logit rows, ascending
  bool long_sequences_ = false;
  int64_t reserved_tokens_ = 0, reserved_logits_ = 0;
  std::vector<char> barrier_before_;
  std::vector<char> joined_;                  // nodes that the norm before them does
  std::vector<AttentionSequence> sequences_;  // [layer][sequence]
  Shares shares_;                             // of the nodes
  Arena workspace_, scratch_, partials_;
  int64_t scratch_bytes_ = 0;
  int32_t stop_[2] = {0, 0};
  std::atomic<int64_t> progress_{0};
  bool profiling_ = false;
  std::vector<NodeTime> times_;
};

}  // namespace gm
