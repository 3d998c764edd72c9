// The next token of each row of logits. What the parameters mean and in which order they apply is described
// in engine/sampling.py.
#pragma once

#include <array>
#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

#include "gristmill/kernel.h"
#include "runtime/pool.h"

namespace gm {

struct SamplingOptions {
  float temperature = 0;  // below kGreedyBelow: the highest logit
  int64_t top_k = 0;      // 0: all
  float top_p = 1, min_p = 0;
  float repetition = 1, presence = 0, frequency = 0;
  uint64_t seed = 0;
  int logprobs = -1;  // -1: none; n: the drawn token's and those of the n most probable
};

inline constexpr float kGreedyBelow = 1e-5f;

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
std::array<uint32_t, 4> philox(uint64_t key, uint64_t counter_low, uint64_t counter_high);

// One sequence's sampling state: its options, the tokens it has so far where a penalty needs them, and the
// last draw.
class SampleRow {
 public:
  SampleRow(const SamplingOptions& options, const int32_t* prompt, int64_t prompt_length);

  const SamplingOptions& options() const { return options_; }
  // Position of the token to be drawn: the number of tokens before it.
  int64_t position() const { return position_; }
  // Appends a token to the completion.
  void push(int32_t token);
  // Adds to the logits of these tokens, at every draw.
  void bias(std::vector<int32_t> tokens, std::vector<float> values);
  // Allows only tokens whose bit is set (bit i % 32 of word i / 32 for token i; none beyond the words), until
  // the next call. Empty: all.
  void mask(std::vector<uint32_t> words) { mask_ = std::move(words); }
  // Changes logits as the penalties, then the bias, then the mask say.
  void change(float* logits, int64_t vocabulary) const;
  bool changes() const { return penalised_ || !bias_.empty() || !mask_.empty(); }

  struct Draw {
    int32_t token = -1;
    float logprob = 0;
    std::vector<int32_t> top;
    std::vector<float> top_logprobs;
  };
  Draw draw;

 private:
  SamplingOptions options_;
  bool penalised_;
  int64_t position_;
  std::unordered_map<int32_t, int32_t>
      counts_;  // token -> occurrences in the completion, 0 if in the prompt only
  std::vector<std::pair<int32_t, float>> bias_;
  std::vector<uint32_t> mask_;
};

// Draws a token for every row of logits [count][vocabulary], writes it to tokens[count] and into the row, and
// appends it to the row. Throws std::invalid_argument, with no row changed, if logits are NaN or +inf or all
// -inf, or if no allowed token is left. With a pool, the rows are divided among its threads; the result
// depends neither on that nor on the kernels' level.
void sample(const KernelTable& kernels, const float* logits, int64_t count, int64_t vocabulary,
            SampleRow* const* rows, int32_t* tokens, Pool* pool);

// Log probabilities of one token of every row of logits, and of the `top` most probable: draws[count]. Throws
// std::invalid_argument as sample does.
void score(const KernelTable& kernels, const float* logits, int64_t count, int64_t vocabulary,
           const int32_t* tokens, int64_t top, SampleRow::Draw* draws, Pool* pool);

}  // namespace gm
