#include "runtime/sampler.h"

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

namespace gm {
namespace {

// Up to this many candidates are kept in a heap; more are cut out of the whole row.
constexpr int64_t kHeapLimit = 1024;
// Top-p of many tokens sums weights by distance to the maximum: 32 nats in steps of 1/64.
constexpr size_t kBuckets = 2048;
constexpr float kBucketsPerNat = 64.0f;

struct Candidate {
  float logit;
  int32_t token;
};

// The order of preference: higher logit, then lower id.
inline bool before(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

struct Weighted {
  Candidate candidate;
  double weight;
};

struct Workspace {
  std::vector<float> logits, maxima, weights, gathered;
  std::vector<Candidate> candidates;
  std::vector<Weighted> ordered;
  std::vector<double> sums, buckets;
};

// First token with the highest logit.
int32_t argmax(const float* x, const std::vector<float>& maxima) {
  const auto top = std::max_element(maxima.begin(), maxima.end());
  int64_t i = (top - maxima.begin()) * kMaximaBlock;
  while (x[i] != *top) ++i;
  return static_cast<int32_t>(i);
}

// The k first candidates in the order of preference, in that order. k <= n.
void highest(const float* x, int64_t n, const std::vector<float>& maxima, int64_t k,
             std::vector<Candidate>& out) {
  out.clear();
  if (k == 0) return;
  for (int64_t i = 0; i < k; ++i) out.push_back({x[i], static_cast<int32_t>(i)});
  // `before` as the heap's order puts the least preferred candidate in front.
  std::make_heap(out.begin(), out.end(), before);
  for (int64_t i = k; i < n;) {
    const int64_t end = std::min(n, (i / kMaximaBlock + 1) * kMaximaBlock);
    if (maxima[static_cast<size_t>(i / kMaximaBlock)] > out.front().logit) {
      for (; i < end; ++i) {
        // An equal logit at a higher id loses.
        if (x[i] <= out.front().logit) continue;
        std::pop_heap(out.begin(), out.end(), before);
        out.back() = {x[i], static_cast<int32_t>(i)};
        std::push_heap(out.begin(), out.end(), before);
      }
    }
    i = end;
  }
  std::sort_heap(out.begin(), out.end(), before);
}

// weights[i] = exp((x[i] - top) * inverse), and their sum.
double exponentials(const KernelTable& kernels, const float* x, int64_t n, float top, float inverse,
                    Workspace& w) {
  w.weights.resize(static_cast<size_t>(n));
  w.sums.resize(static_cast<size_t>((n + kSumBlock - 1) / kSumBlock));
  kernels.row_exponentials(x, n, top, inverse, w.weights.data(), w.sums.data());
  double total = 0;
  for (double sum : w.sums) total += sum;
  return total;
}

// Maxima of the blocks and of the row; false if there is nothing to draw from.
bool maxima(const KernelTable& kernels, const float* x, int64_t n, Workspace& w, float* top) {
  w.maxima.resize(static_cast<size_t>((n + kMaximaBlock - 1) / kMaximaBlock));
  if (!kernels.row_maxima(x, n, w.maxima.data())) return false;
  *top = *std::max_element(w.maxima.begin(), w.maxima.end());
  return *top > -FLT_MAX;
}

// Lowest logit that min-p keeps: a token's probability is at least min_p times the highest one's.
float min_p_floor(const SamplingOptions& o, float top) {
  const double exact =
      static_cast<double>(top) + static_cast<double>(o.temperature) * std::log(double(o.min_p));
  auto floor = static_cast<float>(exact);
  if (static_cast<double>(floor) < exact)
    floor = std::nextafterf(floor, std::numeric_limits<float>::infinity());
  return floor;
}

double uniform(const SamplingOptions& o, int64_t position) {
  const auto words = philox(o.seed, static_cast<uint64_t>(position), 0);
  const uint64_t bits = (static_cast<uint64_t>(words[0]) << 32 | words[1]) >> 11;
  return static_cast<double>(bits) * 0x1.0p-53;
}

// Weights of candidates into w.sums; their sum.
double weigh(const KernelTable& kernels, const std::vector<Candidate>& c, float top, float inverse,
             Workspace& w) {
  w.gathered.clear();
  for (const Candidate& one : c) w.gathered.push_back(one.logit);
  exponentials(kernels, w.gathered.data(), static_cast<int64_t>(c.size()), top, inverse, w);
  w.sums.assign(w.weights.begin(), w.weights.end());
  double total = 0;
  for (double weight : w.sums) total += weight;
  return total;
}

// Draws one of the first `kept` candidates by the weights in w.sums.
int32_t draw_kept(const std::vector<Candidate>& c, size_t kept, const SamplingOptions& o, int64_t position,
                  const Workspace& w) {
  double total = 0;
  for (size_t i = 0; i < kept; ++i) total += w.sums[i];
  const double target = uniform(o, position) * total;
  double sum = 0;
  // Rounding may carry the target past the end: then the last one is drawn.
  size_t last = 0;
  for (size_t i = 0; i < kept; ++i) {
    if (w.sums[i] == 0) continue;
    sum += w.sums[i];
    last = i;
    if (sum > target) break;
  }
  return c[last].token;
}

// Top-k of few tokens: the candidates stay in the order of preference.
int32_t draw_few(const KernelTable& kernels, const float* x, int64_t n, float top, const SamplingOptions& o,
                 int64_t position, Workspace& w) {
  auto& c = w.candidates;
  highest(x, n, w.maxima, std::min(o.top_k, n), c);
  const double total = weigh(kernels, c, top, 1.0f / o.temperature, w);
  size_t kept = c.size();
  if (o.top_p < 1.0f) {
    const double share = static_cast<double>(o.top_p) * total;
    double sum = 0;
    for (size_t i = 0; i < kept; ++i) {
      sum += w.sums[i];
      if (sum >= share) kept = i + 1;
    }
  }
  if (o.min_p > 0.0f) {
    const float floor = min_p_floor(o, top);
    while (kept > 1 && c[kept - 1].logit < floor) --kept;
  }
  return draw_kept(c, kept, o, position, w);
}

// The tokens with at least this logit, by id.
void gather(const float* x, int64_t n, const std::vector<float>& maxima, float floor,
            std::vector<Candidate>& out) {
  out.clear();
  for (int64_t begin = 0; begin < n; begin += kMaximaBlock) {
    if (maxima[static_cast<size_t>(begin / kMaximaBlock)] < floor) continue;
    for (int64_t i = begin; i < std::min(n, begin + kMaximaBlock); ++i) {
      if (x[i] >= floor) out.push_back({x[i], static_cast<int32_t>(i)});
    }
  }
}

// Drops the candidates after the one that brings the weight to `share`. w.sums holds their weights on entry.
void cut_share(double share, float top, float inverse, std::vector<Candidate>& c, Workspace& w) {
  const auto bucket = [&](const Candidate& one) {
    const float distance = (top - one.logit) * inverse * kBucketsPerNat;
    return distance < static_cast<float>(kBuckets - 1) ? static_cast<size_t>(distance) : kBuckets - 1;
  };
  w.buckets.assign(kBuckets, 0.0);
  for (size_t i = 0; i < c.size(); ++i) w.buckets[bucket(c[i])] += w.sums[i];
  double sum = 0;
  size_t crossing = 0;
  while (crossing < kBuckets - 1 && sum + w.buckets[crossing] < share) sum += w.buckets[crossing++];
  w.ordered.clear();
  for (size_t i = 0; i < c.size(); ++i) {
    if (bucket(c[i]) == crossing) w.ordered.push_back({c[i], w.sums[i]});
  }
  std::sort(w.ordered.begin(), w.ordered.end(),
            [](const Weighted& a, const Weighted& b) { return before(a.candidate, b.candidate); });
  for (const Weighted& one : w.ordered) {
    sum += one.weight;
    if (sum >= share) {
      std::erase_if(c, [&](const Candidate& other) { return before(one.candidate, other); });
      return;
    }
  }
}

// Filters that may leave many tokens: the candidates stay in the order of their ids.
int32_t draw_filtered(const KernelTable& kernels, const float* x, int64_t n, float top,
                      const SamplingOptions& o, int64_t position, Workspace& w) {
  const float inverse = 1.0f / o.temperature;
  auto& c = w.candidates;
  double total = 0;
  if (o.top_k > 0 && o.top_k < n) {
    gather(x, n, w.maxima, -FLT_MAX, c);
    if (o.top_k < static_cast<int64_t>(c.size())) {
      std::nth_element(c.begin(), c.begin() + o.top_k, c.end(), before);
      c.resize(static_cast<size_t>(o.top_k));
      std::sort(c.begin(), c.end(), [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
    }
    total = weigh(kernels, c, top, inverse, w);
  } else if (o.top_p < 1.0f) {
    total = exponentials(kernels, x, n, top, inverse, w);
    // n tokens of less weight than this do not make up 1 - top_p together, so the cut lies above it.
    const double least = 0.99 * (1.0 - static_cast<double>(o.top_p)) * total / static_cast<double>(n);
    const double floor = static_cast<double>(top) + static_cast<double>(o.temperature) * std::log(least);
    gather(x, n, w.maxima, std::min(top, static_cast<float>(std::max(floor, -double{FLT_MAX}))), c);
    weigh(kernels, c, top, inverse, w);
  } else {
    gather(x, n, w.maxima, std::min(top, min_p_floor(o, top)), c);
  }
  if (o.top_p < 1.0f) cut_share(static_cast<double>(o.top_p) * total, top, inverse, c, w);
  if (o.min_p > 0.0f) {
    const float floor = std::min(top, min_p_floor(o, top));
    std::erase_if(c, [&](const Candidate& one) { return one.logit < floor; });
  }
  weigh(kernels, c, top, inverse, w);
  return draw_kept(c, c.size(), o, position, w);
}

// No filters.
int32_t draw_any(const KernelTable& kernels, const float* x, int64_t n, float top, const SamplingOptions& o,
                 int64_t position, Workspace& w) {
  const double total = exponentials(kernels, x, n, top, 1.0f / o.temperature, w);
  const double target = uniform(o, position) * total;
  // Rounding may carry the target past the last block, or past a block's last token: then that one is drawn.
  size_t final = w.sums.size() - 1;
  while (final > 0 && w.sums[final] == 0) --final;
  size_t block = 0;
  double sum = 0;
  while (block < final && sum + w.sums[block] <= target) sum += w.sums[block++];
  const int64_t begin = static_cast<int64_t>(block) * kSumBlock, end = std::min(n, begin + kSumBlock);
  int64_t token = begin;
  for (int64_t i = begin; i < end; ++i) {
    const float weight = w.weights[static_cast<size_t>(i)];
    if (weight == 0) continue;
    token = i;
    sum += static_cast<double>(weight);
    if (sum > target) break;
  }
  return static_cast<int32_t>(token);
}

float logprob(float logit, float top, double log_total) {
  return static_cast<float>(double(logit) - double(top) - log_total);
}

// The most probable tokens into a draw; the logarithm of the sum of all exp(x - top). w.maxima are x's.
double most_probable(const KernelTable& kernels, const float* x, int64_t n, float top, int64_t count,
                     SampleRow::Draw& draw, Workspace& w) {
  const double log_total = std::log(exponentials(kernels, x, n, top, 1.0f, w));
  highest(x, n, w.maxima, std::min(count, n), w.candidates);
  draw.top.clear();
  draw.top_logprobs.clear();
  for (const Candidate& c : w.candidates) {
    draw.top.push_back(c.token);
    draw.top_logprobs.push_back(logprob(c.logit, top, log_total));
  }
  return log_total;
}

// False if the logits are not numbers to draw from.
bool draw(const KernelTable& kernels, const float* raw, int64_t n, SampleRow& row, Workspace& w) {
  const SamplingOptions& o = row.options();
  const float* x = raw;
  float top = 0;
  if (!maxima(kernels, raw, n, w, &top)) return false;
  double log_total = 0;
  const float raw_top = top;
  if (o.logprobs >= 0) log_total = most_probable(kernels, raw, n, top, o.logprobs, row.draw, w);
  if (row.changes()) {
    w.logits.assign(raw, raw + n);
    row.change(w.logits.data(), n);
    x = w.logits.data();
    if (!maxima(kernels, x, n, w, &top)) return false;
  }
  if (o.temperature < kGreedyBelow) {
    row.draw.token = argmax(x, w.maxima);
  } else if (o.top_k > 0 && o.top_k <= kHeapLimit) {
    row.draw.token = draw_few(kernels, x, n, top, o, row.position(), w);
  } else if ((o.top_k > 0 && o.top_k < n) || o.top_p < 1.0f || o.min_p > 0.0f) {
    row.draw.token = draw_filtered(kernels, x, n, top, o, row.position(), w);
  } else {
    row.draw.token = draw_any(kernels, x, n, top, o, row.position(), w);
  }
  if (o.logprobs >= 0) row.draw.logprob = logprob(raw[row.draw.token], raw_top, log_total);
  return true;
}

}  // namespace

std::array<uint32_t, 4> philox(uint64_t key, uint64_t counter_low, uint64_t counter_high) {
  std::array<uint32_t, 4> c = {static_cast<uint32_t>(counter_low), static_cast<uint32_t>(counter_low >> 32),
                               static_cast<uint32_t>(counter_high),
                               static_cast<uint32_t>(counter_high >> 32)};
  auto k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c[0], b = uint64_t{0xCD9E8D57} * c[2];
    c = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(b),
         static_cast<uint32_t>(a >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(a)};
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return c;
}

SampleRow::SampleRow(const SamplingOptions& options, const int32_t* prompt, int64_t prompt_length)
    : options_(options),
      penalised_(options.repetition != 1.0f || options.presence != 0.0f || options.frequency != 0.0f),
      position_(prompt_length) {
  if (penalised_) {
    for (int64_t i = 0; i < prompt_length; ++i) counts_.emplace(prompt[i], 0);
  }
}

void SampleRow::push(int32_t token) {
  ++position_;
  if (penalised_) ++counts_[token];
}

void SampleRow::bias(std::vector<int32_t> tokens, std::vector<float> values) {
  bias_.clear();
  for (size_t i = 0; i < tokens.size(); ++i) bias_.emplace_back(tokens[i], values.at(i));
}

void SampleRow::change(float* logits, int64_t vocabulary) const {
  for (const auto& [token, count] : counts_) {
    if (token < 0 || token >= vocabulary) continue;
    float& x = logits[token];
    x = x > 0 ? x / options_.repetition : x * options_.repetition;
    if (count > 0) x -= options_.presence + static_cast<float>(count) * options_.frequency;
  }
  for (const auto& [token, value] : bias_) {
    if (token >= 0 && token < vocabulary) logits[token] += value;
  }
  if (mask_.empty()) return;
  constexpr float kNever = -std::numeric_limits<float>::infinity();
  for (int64_t begin = 0; begin < vocabulary; begin += 32) {
    const auto word = static_cast<size_t>(begin / 32);
    const uint32_t bits = word < mask_.size() ? mask_[word] : 0;
    if (bits == 0xffffffffu) continue;
    const int64_t end = std::min(vocabulary, begin + 32);
    for (int64_t i = begin; i < end; ++i) {
      if ((bits >> (i - begin) & 1) == 0) logits[i] = kNever;
    }
  }
}

namespace {

// Runs work(row, workspace), which says whether it could, for all rows; throws for one that could not.
template <class Fn>
void each_row(int64_t count, Pool* pool, Fn work) {
  std::atomic<int64_t> failed{-1};
  const auto some = [&](int64_t first, int64_t step) {
    thread_local Workspace workspace;
    for (int64_t r = first; r < count; r += step) {
      if (!work(r, workspace)) failed.store(r);
    }
  };
  if (pool != nullptr && count > 1) {
    pool->run([&](int thread) { some(thread, pool->threads()); });
  } else {
    some(0, 1);
  }
  if (failed.load() >= 0) {
    throw std::invalid_argument("row " + std::to_string(failed.load()) +
                                " of the logits has no highest value: it holds NaN or infinity");
  }
}

}  // namespace

void sample(const KernelTable& kernels, const float* logits, int64_t count, int64_t vocabulary,
            SampleRow* const* rows, int32_t* tokens, Pool* pool) {
  if (vocabulary < 1) throw std::invalid_argument("there are no logits to sample from");
  each_row(count, pool, [&](int64_t r, Workspace& w) {
    return draw(kernels, logits + r * vocabulary, vocabulary, *rows[r], w);
  });
  for (int64_t r = 0; r < count; ++r) {
    tokens[r] = rows[r]->draw.token;
    rows[r]->push(tokens[r]);
  }
}

void score(const KernelTable& kernels, const float* logits, int64_t count, int64_t vocabulary,
           const int32_t* tokens, int64_t top, SampleRow::Draw* draws, Pool* pool) {
  if (vocabulary < 1) throw std::invalid_argument("there are no logits to score");
  for (int64_t r = 0; r < count; ++r) {
    if (tokens[r] < 0 || tokens[r] >= vocabulary) throw std::invalid_argument("no such token to score");
  }
  each_row(count, pool, [&](int64_t r, Workspace& w) {
    const float* x = logits + r * vocabulary;
    float highest_logit = 0;
    if (!maxima(kernels, x, vocabulary, w, &highest_logit)) return false;
    const double log_total = most_probable(kernels, x, vocabulary, highest_logit, top, draws[r], w);
    draws[r].token = tokens[r];
    draws[r].logprob = logprob(x[tokens[r]], highest_logit, log_total);
    return true;
  });
}

}  // namespace gm
