// Activation encodings: rows of f32 to int8 codes per group, or to bf16.
#include "kernels.h"
#include "vec/vec.h"

namespace gm::GM_LEVEL {
namespace {

void encode_group(const float* x, int64_t n, int64_t padded, float limit, int8_t* q, float* scale,
                  int32_t* sum) {
  vf largest = vf_zero();
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) largest = vf_max(vf_abs(vf_load(x + i)), largest);
  const int tail = static_cast<int>(n - i);
  if (tail > 0) largest = vf_max(vf_abs(vf_load_n(x + i, tail)), largest);
  const float top = vf_max_lane(largest);
  // The reciprocal of a denormal would be infinite: such a group is as good as zero.
  const float inverse = top > 1e-30f ? limit / top : 0.0f;
  *scale = top > 1e-30f ? top / limit : 0.0f;
  const vf factor = vf_set1(inverse);
  vi total = vi_set1(0);
  for (i = 0; i + 16 <= n; i += 16) {
    const vi code = vf_round(vf_load(x + i) * factor);
    total = total + code;
    vi_store_i8(q + i, code);
  }
  if (tail > 0) {
    const vi code = vf_round(vf_load_n(x + i, tail) * factor);
    total = total + code;
    int8_t last[16];
    vi_store_i8(last, code);
    memcpy(q + i, last, static_cast<size_t>(tail));
    i += tail;
  }
  if (i < padded) memset(q + i, 0, static_cast<size_t>(padded - i));
  *sum = vi_sum(total);
}

}  // namespace

void encode_int8(const float* x, int64_t ldx, int64_t rows, int64_t k, int64_t group, int64_t kp,
                 const Rounding& rounding, int8_t* q, float* scale, int32_t* sum, float* gathered) {
  const int64_t groups = (k + group - 1) / group;
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = x + r * ldx;
    if (rounding.order != nullptr) {
      for (int64_t c = 0; c < k; ++c) gathered[c] = row[rounding.order[c]];
      row = gathered;
    }
    int8_t* out = q + r * kp;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * group;
      const int64_t n = k - begin < group ? k - begin : group;
      const int64_t padded = g + 1 == groups ? kp - begin : group;
      const float limit = rounding.limit == nullptr ? 127.0f : rounding.limit[g];
      encode_group(row + begin, n, padded, limit, out + begin, scale + r * groups + g, sum + r * groups + g);
    }
  }
}

void encode_fp8(const float* x, int64_t ldx, int64_t rows, int64_t k, int64_t kp, const int32_t* order,
                uint16_t* out, float* scale, float* gathered) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = x + r * ldx;
    if (order != nullptr) {
      for (int64_t c = 0; c < k; ++c) gathered[c] = row[order[c]];
      row = gathered;
    }
    const auto load = [&](int64_t i) {
      return k - i < 16 ? vf_load_n(row + i, static_cast<int>(k - i)) : vf_load(row + i);
    };
    vf largest = vf_zero();
    for (int64_t i = 0; i < k; i += 16) largest = vf_max(vf_abs(load(i)), largest);
    const float top = vf_max_lane(largest);
    const bool some = top > 1e-30f;
    scale[r] = some ? top / 448.0f : 1.0f;
    const vf factor = vf_set1(some ? 448.0f / top : 0.0f);
    uint16_t* to = out + r * kp;
    for (int64_t i = 0; i < k; i += 16) {
      uint16_t values[16];
      vf_store_bf16(values, vf_round_e4m3(load(i) * factor));
      memcpy(to + i, values, static_cast<size_t>(k - i < 16 ? k - i : 16) * 2);
    }
    memset(to + k, 0, static_cast<size_t>(kp - k) * 2);
  }
}

void encode_bf16(const float* x, int64_t ldx, int64_t rows, int64_t k, int64_t kp, uint16_t* out) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = x + r * ldx;
    uint16_t* to = out + r * kp;
    int64_t i = 0;
    for (; i + 16 <= k; i += 16) vf_store_bf16(to + i, vf_load(row + i));
    for (; i < k; ++i) to[i] = float_to_bf16(row[i]);
    for (; i < kp; ++i) to[i] = 0;
  }
}

uint64_t read_all(const void* data, int64_t bytes) {
  const uint8_t* p = static_cast<const uint8_t*>(data);
  vi sum[4] = {vi_set1(0), vi_set1(0), vi_set1(0), vi_set1(0)};
  for (int64_t i = 0; i + 256 <= bytes; i += 256) {
    for (int j = 0; j < 4; ++j) {
      prefetch(p + i + 64 * j + 4096);
      sum[j] = sum[j] + vi_load(reinterpret_cast<const int32_t*>(p + i + 64 * j));
    }
  }
  int32_t lanes[16];
  vi_store(lanes, (sum[0] + sum[1]) + (sum[2] + sum[3]));
  uint64_t total = 0;
  for (int lane = 0; lane < 16; ++lane) total += static_cast<uint32_t>(lanes[lane]);
  return total;
}

}  // namespace gm::GM_LEVEL
