#include "runtime/sampler.h"

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

namespace gm {
namespace {

// Blocks whose maximum is known can be skipped when looking for high logits.
constexpr int64_t kBlock = 64;
constexpr int64_t kLanes = 16;
// Up to this many candidates are kept in a heap; more are cut out of the whole row.
constexpr int64_t kHeapLimit = 1024;
// Top-p without top-k sums probabilities by distance to the maximum: 32 nats in steps of 1/64.
constexpr int64_t kBuckets = 2048;
constexpr float kBucketsPerNat = 64.0f;
constexpr int64_t kSumBlock = 1024;

struct Candidate {
  float logit;
  int32_t token;
};

// The order of preference: higher logit, then lower id.
inline bool before(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

struct Workspace {
  std::vector<float> logits, maxima, weights;
  std::vector<Candidate> candidates;
  std::vector<double> sums;
};

// exp(x) for x <= 0 to about 2 units in the last place; 0 below -87. Plain operations in one order, so that
// the result is the same however a compiler vectorises it.
inline float exp_negative(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = clamped * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23 rounds to an integer
  const float n = shifted - 12582912.0f;
  float r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  int32_t bits, exponent;
  std::memcpy(&bits, &p, 4);
  std::memcpy(&exponent, &shifted, 4);
  bits += (exponent - 0x4B400000) * (1 << 23);
  float result;
  std::memcpy(&result, &bits, 4);
  return x < -87.0f ? 0.0f : result;
}

// Maximum of every block; false if a logit is NaN or +inf.
bool block_maxima(const float* x, int64_t n, std::vector<float>& maxima) {
  maxima.resize(static_cast<size_t>((n + kBlock - 1) / kBlock));
  int32_t bad[kLanes] = {};
  for (int64_t b = 0; b < n / kBlock; ++b) {
    const float* v = x + b * kBlock;
    float m[kLanes];
    for (int64_t j = 0; j < kLanes; ++j) m[j] = v[j];
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      for (int64_t j = 0; j < kLanes; ++j) {
        m[j] = v[i + j] > m[j] ? v[i + j] : m[j];
        bad[j] |= v[i + j] <= FLT_MAX ? 0 : 1;
      }
    }
    float top = m[0];
    for (int64_t j = 1; j < kLanes; ++j) top = m[j] > top ? m[j] : top;
    maxima[static_cast<size_t>(b)] = top;
  }
  const int64_t tail = n / kBlock * kBlock;
  if (tail < n) {
    float top = x[tail];
    for (int64_t i = tail; i < n; ++i) {
      top = x[i] > top ? x[i] : top;
      bad[0] |= x[i] <= FLT_MAX ? 0 : 1;
    }
    maxima.back() = top;
  }
  int32_t any = 0;
  for (int32_t b : bad) any |= b;
  return any == 0;
}

// First token with the highest logit.
int32_t argmax(const float* x, const std::vector<float>& maxima) {
  const auto top = std::max_element(maxima.begin(), maxima.end());
  int64_t i = (top - maxima.begin()) * kBlock;
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
    const int64_t end = std::min(n, (i / kBlock + 1) * kBlock);
    if (maxima[static_cast<size_t>(i / kBlock)] > out.front().logit) {
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
double exponentials(const float* x, int64_t n, float top, float inverse, Workspace& w) {
  w.weights.resize(static_cast<size_t>(n));
  float* out = w.weights.data();
  for (int64_t i = 0; i < n; ++i) out[i] = exp_negative((x[i] - top) * inverse);
  w.sums.clear();
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kSumBlock) {
    const int64_t end = std::min(n, begin + kSumBlock);
    double lanes[kLanes] = {};
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      for (int64_t j = 0; j < kLanes; ++j) lanes[j] += static_cast<double>(out[i + j]);
    }
    for (; i < end; ++i) lanes[0] += static_cast<double>(out[i]);
    double sum = 0;
    for (double lane : lanes) sum += lane;
    w.sums.push_back(sum);
    total += sum;
  }
  return total;
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

// Draws among few candidates, which are in the order of preference.
int32_t draw_candidates(std::vector<Candidate>& c, const SamplingOptions& o, int64_t position, Workspace& w) {
  const float top = c.front().logit, inverse = 1.0f / o.temperature;
  w.sums.clear();
  double total = 0;
  for (const Candidate& one : c) {
    const auto weight = static_cast<double>(exp_negative((one.logit - top) * inverse));
    w.sums.push_back(weight);
    total += weight;
  }
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
  total = 0;
  for (size_t i = 0; i < kept; ++i) total += w.sums[i];
  const double target = uniform(o, position) * total;
  double sum = 0;
  size_t last = 0;
  for (size_t i = 0; i < kept; ++i) {
    if (w.sums[i] == 0) continue;
    sum += w.sums[i];
    last = i;
    if (sum > target) break;
  }
  return c[last].token;
}

// Draws from a whole row. The filters set the weights of what they drop to zero.
int32_t draw_row(const float* x, int64_t n, float top, const SamplingOptions& o, int64_t position,
                 Workspace& w) {
  const float inverse = 1.0f / o.temperature;
  exponentials(x, n, top, inverse, w);
  float* weights = w.weights.data();
  const auto drop_after = [&](const Candidate& last) {
    for (int64_t i = 0; i < n; ++i) {
      if (before(last, {x[i], static_cast<int32_t>(i)})) weights[i] = 0;
    }
  };
  if (o.top_k > 0 && o.top_k < n) {
    auto& c = w.candidates;
    c.clear();
    for (int64_t i = 0; i < n; ++i) c.push_back({x[i], static_cast<int32_t>(i)});
    const auto last = c.begin() + (o.top_k - 1);
    std::nth_element(c.begin(), last, c.end(), before);
    drop_after(*last);
  }
  if (o.top_p < 1.0f) {
    const auto bucket = [&](int64_t i) {
      const float distance = (top - x[i]) * inverse * kBucketsPerNat;
      return distance < static_cast<float>(kBuckets - 1) ? static_cast<int64_t>(distance) : kBuckets - 1;
    };
    w.sums.assign(kBuckets, 0.0);
    double total = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (weights[i] > 0) w.sums[static_cast<size_t>(bucket(i))] += static_cast<double>(weights[i]);
    }
    for (double s : w.sums) total += s;
    const double share = static_cast<double>(o.top_p) * total;
    double sum = 0;
    int64_t crossing = 0;
    while (crossing < kBuckets - 1 && sum + w.sums[static_cast<size_t>(crossing)] < share) {
      sum += w.sums[static_cast<size_t>(crossing++)];
    }
    auto& c = w.candidates;
    c.clear();
    for (int64_t i = 0; i < n; ++i) {
      if (weights[i] > 0 && bucket(i) == crossing) c.push_back({x[i], static_cast<int32_t>(i)});
    }
    std::sort(c.begin(), c.end(), before);
    for (const Candidate& one : c) {
      sum += static_cast<double>(weights[one.token]);
      if (sum >= share) {
        drop_after(one);
        break;
      }
    }
  }
  if (o.min_p > 0.0f) {
    const float floor = min_p_floor(o, top);
    for (int64_t i = 0; i < n; ++i) weights[i] = x[i] < floor && x[i] < top ? 0.0f : weights[i];
  }
  double total = 0;
  w.sums.clear();
  for (int64_t begin = 0; begin < n; begin += kSumBlock) {
    double sum = 0;
    for (int64_t i = begin; i < std::min(n, begin + kSumBlock); ++i) sum += static_cast<double>(weights[i]);
    w.sums.push_back(sum);
    total += sum;
  }
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
    if (weights[i] == 0) continue;
    token = i;
    sum += static_cast<double>(weights[i]);
    if (sum > target) break;
  }
  return static_cast<int32_t>(token);
}

// False if the logits are not numbers to draw from.
bool draw(const float* raw, int64_t n, SampleRow& row, Workspace& w) {
  const SamplingOptions& o = row.options();
  const float* x = raw;
  if (!block_maxima(raw, n, w.maxima)) return false;
  float top = *std::max_element(w.maxima.begin(), w.maxima.end());
  if (!(top >= -FLT_MAX)) return false;
  double log_total = 0;
  const float raw_top = top;
  if (o.logprobs >= 0) {
    log_total = std::log(exponentials(raw, n, top, 1.0f, w));
    highest(raw, n, w.maxima, std::min<int64_t>(o.logprobs, n), w.candidates);
    row.draw.top.clear();
    row.draw.top_logprobs.clear();
    for (const Candidate& c : w.candidates) {
      row.draw.top.push_back(c.token);
      row.draw.top_logprobs.push_back(static_cast<float>(double(c.logit) - double(raw_top) - log_total));
    }
  }
  if (row.penalised()) {
    w.logits.assign(raw, raw + n);
    row.penalise(w.logits.data(), n);
    x = w.logits.data();
    if (!block_maxima(x, n, w.maxima)) return false;
    top = *std::max_element(w.maxima.begin(), w.maxima.end());
    if (!(top >= -FLT_MAX)) return false;
  }
  if (o.temperature < kGreedyBelow) {
    row.draw.token = argmax(x, w.maxima);
  } else if (o.top_k > 0 && o.top_k <= kHeapLimit) {
    highest(x, n, w.maxima, std::min(o.top_k, n), w.candidates);
    row.draw.token = draw_candidates(w.candidates, o, row.position(), w);
  } else {
    row.draw.token = draw_row(x, n, top, o, row.position(), w);
  }
  if (o.logprobs >= 0) {
    row.draw.logprob = static_cast<float>(double(raw[row.draw.token]) - double(raw_top) - log_total);
  }
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

void SampleRow::penalise(float* logits, int64_t vocabulary) const {
  for (const auto& [token, count] : counts_) {
    if (token < 0 || token >= vocabulary) continue;
    float& x = logits[token];
    x = x > 0 ? x / options_.repetition : x * options_.repetition;
    if (count > 0) x -= options_.presence + static_cast<float>(count) * options_.frequency;
  }
}

void sample(const float* logits, int64_t count, int64_t vocabulary, SampleRow* const* rows, int32_t* tokens,
            Pool* pool) {
  if (vocabulary < 1) throw std::invalid_argument("there are no logits to sample from");
  std::atomic<int64_t> failed{-1};
  const auto some = [&](int64_t first, int64_t step) {
    thread_local Workspace workspace;
    for (int64_t r = first; r < count; r += step) {
      if (!draw(logits + r * vocabulary, vocabulary, *rows[r], workspace)) failed.store(r);
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
  for (int64_t r = 0; r < count; ++r) {
    tokens[r] = rows[r]->draw.token;
    rows[r]->push(tokens[r]);
  }
}

}  // namespace gm
