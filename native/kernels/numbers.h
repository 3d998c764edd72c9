// Codes of integer weights as the bf16 numbers that are multiplied with bf16 rows.
//
// Codes less their offset are bf16 numbers exactly. Of every four columns 0 and 2 are the first pair, 1 and 3
// the second, as they lie in 16-bit words.
//
// Rounded products of codes and E4M3 scales are numbers R(s (code - offset)) / p, p the largest power of two
// in s, and the group's scale is unit * p (both with s = 2^-9 where it is 0, but the group's scale 0).
#pragma once

#include <string.h>

#include <utility>

#include "codes.h"
#include "gristmill/kernel.h"
#include "vec/vec.h"

namespace gm::GM_LEVEL {
namespace {

// Numbers by code (bf16), for vt or vm; in memory, where all tiles of a call find them.
constexpr int64_t kNumbers = 256;

inline vi code_range(int first, int mask) {
  int32_t codes[16];
  for (int i = 0; i < 16; ++i) codes[i] = (first + i) & mask;
  return vi_load(codes);
}

inline vf largest_power(vf positive) { return vi_as_float(vf_bits(positive) & vi_set1(0x7f800000)); }

// What a group's dot product and its sum of x are multiplied by; `at` counts scales.
__attribute__((always_inline)) inline vf group_min(const Weight& w, int64_t at) {
  return w.mins == nullptr ? vf_zero() : load_scales(w, w.mins, at);
}
__attribute__((always_inline)) inline vf group_scale(const Weight& w, int64_t at) {
  const vf scale = load_scales(w, w.scales, at);
  return w.rounded ? largest_power(scale) * vf_set1(w.unit) : scale;
}

// As load_scale of linear_int.cc does.
inline void ask_for_scales(const Weight& w, const void* base, int64_t at) {
  prefetch(static_cast<const char*>(base) + at * (w.e4m3_scales ? 1 : w.wide_scales ? 4 : 2) + 512);
}

// Codes less the offset.
template <class C>
struct Plain {
  using Codes = C;
  struct Group {};
  vt table;

  static void fill(const Weight& w, uint16_t* numbers) {
    constexpr int kCodes = C::kBits < 8 ? 64 : 256;
    for (int i = 0; i < kCodes; i += 16) {
      vf_store_bf16(numbers + i, vi_float(code_range(i, (1 << C::kBits) - 1) + vi_set1(-w.offset)));
    }
  }
  Plain(const Weight& w, const uint16_t* numbers) : table(vt_load<C::kBits>(numbers, w.offset)) {}
  Group group(const Weight&, int64_t) const { return {}; }
  template <int kVector>
  void pairs(const Weight&, const uint8_t* piece, const Group&, vh& first, vh& second) const {
    vb_pairs<C::kBits>(C::template loose<kVector>(piece), table, first, second);
  }
};

// Rounded products, as they are defined.
template <class C>
struct Products {
  using Codes = C;
  struct Group {
    vf scale, inverse;
  };

  static void fill(const Weight&, uint16_t*) {}
  Products(const Weight&, const uint16_t*) {}
  Group group(const Weight& w, int64_t at) const {
    const vf scale = vf_max(load_scales(w, w.scales, at), vf_set1(0x1p-9f));
    return {scale, vf_set1(1.0f) / largest_power(scale)};
  }
  template <int kVector>
  void pairs(const Weight& w, const uint8_t* piece, const Group& g, vh& first, vh& second) const {
    const vi codes = vb_lanes(C::template at<kVector>(piece));
    const auto number = [&](vi bits) {
      const vf code = vi_float((bits & vi_set1(255)) + vi_set1(-w.offset));
      return vf_round_e4m3(g.scale * code) * g.inverse;
    };
    first = vh_exact(number(codes), number(vi_shr<16>(codes)));
    second = vh_exact(number(vi_shr<8>(codes)), number(vi_shr<24>(codes)));
  }
};

template <class C>
struct Rounded : Products<C> {
  using Products<C>::Products;
};

#ifdef GM_PRODUCT_TABLE
// Those of 4 bits from a table by the scale's three bits of mantissa; groups with products beyond E4M3, which
// are not in it, as defined.
template <>
struct Rounded<PlaneCodes<4>> {
  using Codes = PlaneCodes<4>;
  using Defined = Products<Codes>;
  using Group = vn;
  vm table;
  float limit;

  static void fill(const Weight& w, uint16_t* numbers) {
    const vf codes = vi_float(code_range(0, 15) + vi_set1(-w.offset));
    for (int i = 0; i < 8; ++i) {
      vf_store_bf16(numbers + i * 16, vf_round_e4m3(vf_set1(static_cast<float>(8 + i) / 8) * codes));
    }
  }
  Rounded(const Weight& w, const uint16_t* numbers) : table(vm_load(numbers)) {
    limit = 448.0f / static_cast<float>(w.offset > 15 - w.offset ? w.offset : 15 - w.offset);
  }
  bool has(const Weight& w, int64_t at) const { return !vf_any_above(load_scales(w, w.scales, at), limit); }
  Group group(const Weight& w, int64_t at) const { return vn_of(load_scales(w, w.scales, at)); }
  template <int kVector>
  void pairs(const Weight&, const uint8_t* piece, const Group& g, vh& first, vh& second) const {
    vb_pairs(Codes::loose<kVector>(piece), table, g, first, second);
  }
};
#endif

// Columns from `begin` on, `n` of them, within one group, to [n / 2][16 rows][2]. `table` is what fill made.
template <class Numbers>
__attribute__((always_inline)) inline void decode_numbers(const Weight& w, const uint16_t* table,
                                                          int64_t block, int64_t begin, int64_t n,
                                                          uint16_t* to) {
  using Codes = typename Numbers::Codes;
  const Numbers numbers(w, table);
  const int64_t scales = (block * w.groups + begin / w.group) * 16;
  if constexpr (requires { typename Numbers::Defined; }) {
    if (!numbers.has(w, scales)) {
      decode_numbers<typename Numbers::Defined>(w, table, block, begin, n, to);
      return;
    }
  }
  const auto group = numbers.group(w, scales);
  const uint8_t* piece = w.codes(block) + begin / Codes::kColumns * Codes::kBytes;
  for (int64_t c = 0; c < n; c += Codes::kColumns, piece += Codes::kBytes) {
    [&]<int... kVector>(std::integer_sequence<int, kVector...>) __attribute__((always_inline)) {
      const auto vector = [&]<int kAt>() __attribute__((always_inline)) {
        vh first, second;
        numbers.template pairs<kAt>(w, piece, group, first, second);
        vh_store(to + (c + 4 * kAt) * 16, first);
        vh_store(to + (c + 4 * kAt + 2) * 16, second);
      };
      (vector.template operator()<kVector>(), ...);
    }(std::make_integer_sequence<int, Codes::kColumns / 4>());
  }
}

// Sums of the rows' groups, [rows][groups].
inline void sum_groups(const Weight& w, const uint16_t* rows_of_x, int64_t ldx, int64_t rows, float* sums) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t g = 0; g < w.groups; ++g) {
      const uint16_t* x = rows_of_x + r * ldx + g * w.group;
      const int64_t columns = columns_of(w, g), whole = columns / 16 * 16;
      vf sum = vf_zero();
      for (int64_t c = 0; c < whole; c += 16) sum = sum + vf_load_bf16(x + c);
      uint16_t rest[16] = {};
      memcpy(rest, x + whole, static_cast<size_t>(columns - whole) * 2);
      sums[r * w.groups + g] = vf_sum(sum + vf_load_bf16(rest));
    }
  }
}

}  // namespace
}  // namespace gm::GM_LEVEL
