// One bf16 row times integer weights of large groups, without tiles but with their order of sums.
//
// Tiles of one row take as long as tiles of sixteen, for numbers that have to be stored before. Here codes
// become float32 numbers in registers and meet the row's in fused steps: of 32 columns a chain over columns 0
// and 1 of every four, from zero, and one over columns 2 and 3, then their sum to the group's
// (linear_amx_codes.cc). Tiles take denormal numbers for zero, float32 steps do not. A row goes this way if
// its numbers are zero or between 2^-96 and 2^96: then no sum is denormal, as all are multiples of the lowest
// bits of a number of the row (2^-103) and of a rounded product (2^-17), and none overflows.
//
// Expected, per core: 64 bytes of 4-bit codes (128 weights) take 7 shifts, 8 look-ups and 8 fused steps on
// two ports, 11.5 cycles; memory takes 12 to 14 (26 to 32 GB/s for two cores at 2.9 GHz). Measured with codes
// in the L2 cache: 12.5, as with tiles; the demo model's linear layers take two thirds of the tiles' time all
// the same. With two rows it is 17.5, for which tiles need no more than with one.
#include <immintrin.h>

#include <type_traits>

#include "kernels.h"
#include "linear_amx.h"
#include "linear_out.h"
#include "numbers.h"

namespace gm::GM_LEVEL {
namespace {

constexpr int64_t kStep = 32, kAhead = 3072;

// Bytes of four columns as float32, less `offset`: 2^23 + byte is a number whose last bits are the byte's.
void bytes_less(__m512i bytes, int offset, vf* to) {
  const __m512i byte = _mm512_set1_epi32(255), large = _mm512_set1_epi32(0x4b000000);
  const __m512 less = _mm512_set1_ps(0x1p23f + static_cast<float>(offset));
  const auto number = [&](__m512i bits) -> vf {
    return {_mm512_sub_ps(_mm512_castsi512_ps(_mm512_ternarylogic_epi32(bits, byte, large, 0xea)), less)};
  };
  to[0] = number(bytes);
  to[1] = number(_mm512_srli_epi32(bytes, 8));
  to[2] = number(_mm512_srli_epi32(bytes, 16));
  to[3] = number(_mm512_srli_epi32(bytes, 24));
}

// The numbers of numbers.h as float32, kTimes as large.
template <class Numbers>
struct Floats {
  using Codes = typename Numbers::Codes;
  using Group = typename Numbers::Group;
  static constexpr float kTimes = 1.0f;
  uint16_t table[kNumbers];
  Numbers numbers;

  explicit Floats(const Weight& w) : numbers(w, (Numbers::fill(w, table), table)) {}
  // Whether a group's numbers are what `four` gives; else they are Products.
  bool has(const Weight& w, int64_t at) const {
    if constexpr (requires { typename Numbers::Defined; }) return numbers.has(w, at);
    return true;
  }
  Group group(const Weight& w, int64_t at) const { return numbers.group(w, at); }
  // Columns 4 kVector to 4 kVector + 3 of a piece.
  template <int kVector>
  void four(const Weight& w, const uint8_t* piece, const Group& group, vf* to) const {
    vh first, second;
    numbers.template pairs<kVector>(w, piece, group, first, second);
    to[0] = vh_even(first);
    to[1] = vh_even(second);
    to[2] = vh_odd(first);
    to[3] = vh_odd(second);
  }
};

// Codes of at most four bits from one register.
template <class C>
  requires(C::kBits <= 4)
struct Floats<Plain<C>> {
  using Codes = C;
  struct Group {};
  static constexpr float kTimes = 1.0f;
  __m512 table;

  explicit Floats(const Weight& w)
      : table(vi_float(code_range(0, (1 << C::kBits) - 1) + vi_set1(-w.offset)).v) {}
  bool has(const Weight&, int64_t) const { return true; }
  Group group(const Weight&, int64_t) const { return {}; }
  template <int kVector>
  void four(const Weight&, const uint8_t* piece, const Group&, vf* to) const {
    const __m512i codes = C::template loose<kVector>(piece).v;
    to[0] = {_mm512_permutexvar_ps(codes, table)};
    to[1] = {_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 8), table)};
    to[2] = {_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 16), table)};
    to[3] = {_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 24), table)};
  }
};

template <>
struct Floats<Plain<PlaneCodes<8>>> {
  using Codes = PlaneCodes<8>;
  struct Group {};
  static constexpr float kTimes = 1.0f;

  explicit Floats(const Weight&) {}
  bool has(const Weight&, int64_t) const { return true; }
  Group group(const Weight&, int64_t) const { return {}; }
  template <int kVector>
  void four(const Weight& w, const uint8_t* piece, const Group&, vf* to) const {
    bytes_less(Codes::at<kVector>(piece).v, w.offset, to);
  }
};

// Rounded products of 4-bit codes, eight times: whole numbers up to 120 where no code is more than eight away
// from the offset. A table has them, plus 128, by the three bits of the scale's mantissa and the code.
struct alignas(64) EighthsTable {
  uint8_t numbers[128];

  constexpr explicit EighthsTable(int offset) : numbers() {
    for (int i = 0; i < 128; ++i) {
      const int code = i % 16 - offset, size = (8 + i / 16) * (code < 0 ? -code : code);
      // To four bits, nearest, ties to even.
      int bits = 0;
      while (size >> bits >= 16) ++bits;
      const int half = bits == 0 ? 0 : 1 << (bits - 1), rest = size & ((1 << bits) - 1);
      int kept = size >> bits;
      if (rest > half || (bits > 0 && rest == half && kept % 2 == 1)) ++kept;
      numbers[i] = static_cast<uint8_t>(128 + (code < 0 ? -1 : 1) * (kept << bits));
    }
  }
};
constexpr EighthsTable kEighths7(7), kEighths8(8);

struct Eighths {
  using Codes = PlaneCodes<4>;
  using Group = __m512i;  // sixteen times the lane's three bits, in all four bytes
  static constexpr float kTimes = 8.0f;
  __m512i low, high;

  static bool fit(const Weight& w) { return w.offset == 7 || w.offset == 8; }
  explicit Eighths(const Weight& w) {
    const EighthsTable& table = w.offset == 7 ? kEighths7 : kEighths8;
    low = _mm512_load_si512(table.numbers);
    high = _mm512_load_si512(table.numbers + 64);
  }
  // No product beyond E4M3.
  bool has(const Weight& w, int64_t at) const { return !vf_any_above(load_scales(w, w.scales, at), 56.0f); }
  Group group(const Weight& w, int64_t at) const {
    const __m512i bits = _mm512_srli_epi32(vf_bits(load_scales(w, w.scales, at)).v, 16);
    return _mm512_mullo_epi32(_mm512_and_si512(bits, _mm512_set1_epi32(0x70)), _mm512_set1_epi32(0x01010101));
  }
  template <int kVector>
  void four(const Weight&, const uint8_t* piece, const Group& group, vf* to) const {
    const __m512i codes = Codes::loose<kVector>(piece).v;
    const __m512i at = _mm512_ternarylogic_epi32(codes, _mm512_set1_epi8(15), group, 0xea);
    bytes_less(_mm512_permutex2var_epi8(low, at, high), 128, to);
  }
};

// Adds kColumns columns of a block to the two chains.
template <int kColumns, class F>
__attribute__((always_inline)) inline void add_columns(const Weight& w, const F& floats,
                                                       const typename F::Group& group, const uint8_t* codes,
                                                       const float* x, vf& first, vf& second) {
  using Codes = typename F::Codes;
  constexpr int kVectors = Codes::kColumns / 4;
  const auto vector = [&]<int kAt>() __attribute__((always_inline)) {
    vf number[4];
    floats.template four<kAt % kVectors>(w, codes + kAt / kVectors * Codes::kBytes, group, number);
    const float* four = x + kAt * 4;
    first = vf_fma(number[1], vf_set1(four[1]), vf_fma(number[0], vf_set1(four[0]), first));
    second = vf_fma(number[3], vf_set1(four[3]), vf_fma(number[2], vf_set1(four[2]), second));
  };
  [&]<int... kAt>(std::integer_sequence<int, kAt...>) __attribute__((always_inline)) {
    (vector.template operator()<kAt>(), ...);
  }(std::make_integer_sequence<int, kColumns / 4>());
}

// A group's columns by the row's.
template <class F>
__attribute__((always_inline)) inline vf dot_group(const Weight& w, const F& floats, int64_t scales,
                                                   const uint8_t* codes, const float* x, int64_t columns) {
  using Codes = typename F::Codes;
  const typename F::Group group = floats.group(w, scales);
  constexpr int64_t kBytes = kStep / Codes::kColumns * Codes::kBytes;
  vf dot = vf_zero();
  for (int64_t c = 0; c < columns; c += kStep, codes += kBytes) {
    vf first = vf_zero(), second = vf_zero();
    if (columns - c >= kStep) {
      GM_UNROLL(16)
      for (int64_t i = 0; i < kBytes; i += 64) prefetch_far(codes + kAhead + i);
      add_columns<kStep>(w, floats, group, codes, x + c, first, second);
    } else {
      for (int64_t i = 0; i < columns - c; i += Codes::kColumns) {
        const uint8_t* piece = codes + i / Codes::kColumns * Codes::kBytes;
        add_columns<Codes::kColumns>(w, floats, group, piece, x + c + i, first, second);
      }
    }
    dot = dot + (first + second);
  }
  return F::kTimes == 1.0f ? dot : dot * vf_set1(1.0f / F::kTimes);
}

// x: kp numbers; sums: of x by groups, null without minimums.
template <class F>
void run(const Weight& w, const float* x, const float* sums, int64_t block_begin, int64_t block_end,
         const LinearOut& out) {
  using Codes = typename F::Codes;
  const F floats(w);
  for (int64_t block = block_begin; block < block_end; ++block) {
    const uint8_t* codes = w.codes(block);
    vf y = vf_zero();
    for (int64_t g = 0; g < w.groups; ++g) {
      const int64_t columns = columns_of(w, g), at = (block * w.groups + g) * 16;
      ask_for_scales(w, w.scales, at);
      if (sums != nullptr) ask_for_scales(w, w.mins, at);
      const float* columns_of_x = x + g * w.group;
      const vf dot = floats.has(w, at)
                         ? dot_group(w, floats, at, codes, columns_of_x, columns)
                         : dot_group(w, Floats<Products<Codes>>(w), at, codes, columns_of_x, columns);
      y = vf_fma(group_scale(w, at), dot, y);
      if (sums != nullptr) y = vf_fma(group_min(w, at), vf_set1(sums[g]), y);
      codes += columns / Codes::kColumns * Codes::kBytes;
    }
    float sum[16];
    vf_store(sum, y);
    finish(sum, 0, 1, block, w.n, out);
  }
}

// A row as float32, and whether all of its numbers are zero or between 2^-96 and 2^96.
bool widen(const uint16_t* x, int64_t n, float* to) {
  const __m512i no_sign = _mm512_set1_epi32(0x7fffffff), least = _mm512_set1_epi32((127 - 96) << 23);
  const __m512i range = _mm512_set1_epi32(192 << 23);
  __mmask16 beyond = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const auto there = static_cast<__mmask16>(first_bytes(n - i < 16 ? n - i : 16));
    const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, x + i)), 16);
    const __m512i size = _mm512_and_si512(bits, no_sign);
    beyond |= _mm512_mask_cmpge_epu32_mask(_mm512_test_epi32_mask(size, size), _mm512_sub_epi32(size, least),
                                           range);
    _mm512_mask_storeu_epi32(to + i, there, bits);
  }
  return beyond == 0;
}

}  // namespace

bool linear_bf16_row(const Weight& w, const uint16_t* x, int64_t block_begin, int64_t block_end,
                     const LinearOut& out, void* scratch) {
  auto* wide = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(scratch) + 63) / 64 * 64);
  float* sums = w.mins == nullptr ? nullptr : wide + w.kp;
  if (!widen(x, w.kp, wide)) return false;
  if (sums != nullptr) sum_groups(w, x, 0, 1, sums);
  with_codes(w.storage, [&](auto storage) {
    using Codes = decltype(storage);
    if constexpr (std::is_same_v<Codes, Eighths::Codes>) {
      if (w.rounded && Eighths::fit(w)) return run<Eighths>(w, wide, sums, block_begin, block_end, out);
    }
    w.rounded ? run<Floats<Rounded<Codes>>>(w, wide, sums, block_begin, block_end, out)
              : run<Floats<Plain<Codes>>>(w, wide, sums, block_begin, block_end, out);
  });
  return true;
}

}  // namespace gm::GM_LEVEL
