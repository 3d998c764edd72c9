// How the codes of integer storages lie, and how they become vectors of unsigned bytes (the layouts are
// described in formats/packed.py and formats/sparse24.py).
#pragma once

#include <utility>

#include "gristmill/kernel.h"
#include "vec/vec.h"

namespace gm::GM_LEVEL {

// A piece of a block's codes is kColumns columns in kBytes. at<v>(piece): its columns 4 v to 4 v + 3, one
// lane of four bytes per output row. loose<v>(piece): the same with anything in the bits from kBits on.
//
// Planes of kLow and kHigh bits (0: one plane only): the low and the high bits of every code.
template <int kLow, int kHigh = 0>
struct PlaneCodes {
  static constexpr int kColumns = 32 / (kHigh > 0 ? kHigh : kLow);
  static constexpr int kBits = kLow + kHigh;
  static constexpr int kBytes = kColumns * kBits * 2;
  static constexpr bool kNarrow = kBits < 8;

  template <int kVector>
  static vb at(const uint8_t* piece) {
    const vb low = field<kLow, 0, kVector>(piece);
    if constexpr (kHigh == 0) {
      return low;
    } else {
      return low | field<kHigh, kLow, kVector>(piece + kColumns * kLow * 2);
    }
  }

  template <int kVector>
  static vb loose(const uint8_t* piece) {
    const vb low = shifted<kLow, 0, kVector>(piece);
    if constexpr (kHigh == 0) {
      return low;
    } else {
      return vb_merge<(1 << kLow) - 1>(low, shifted<kHigh, kLow, kVector>(piece + kColumns * kLow * 2));
    }
  }

 private:
  template <int kWidth, int kVector>
  static vb load(const uint8_t* plane) {
    return vb_load(plane + kVector / (8 / kWidth) * 64);
  }
  // The bits of a plane that belong at bit kAt, by how much to the right they are.
  template <int kWidth, int kAt, int kVector>
  static constexpr int kShift = kVector % (8 / kWidth) * kWidth - kAt;

  template <int kWidth, int kAt, int kVector>
  static vb field(const uint8_t* plane) {
    const vb codes = load<kWidth, kVector>(plane);
    if constexpr (kWidth == 8) {
      return codes;
    } else {
      return vb_field<kShift<kWidth, kAt, kVector>, ((1 << kWidth) - 1) << kAt>(codes);
    }
  }
  template <int kWidth, int kAt, int kVector>
  static vb shifted(const uint8_t* plane) {
    return vb_shift<kShift<kWidth, kAt, kVector>>(load<kWidth, kVector>(plane));
  }
};

// 2:4: what is not kept becomes the offset's code, 8, and so adds exactly nothing.
struct SparseCodes {
  static constexpr int kBits = 4, kColumns = 32, kBytes = 192;
  static constexpr bool kNarrow = true;

  template <int kVector>
  static vb at(const uint8_t* piece) {
    return spread<kVector>(vb_field<kVector % 4 / 2 * 4, 15>(vb_load(piece + kVector / 4 * 64)), piece);
  }

  template <int kVector>
  static vb loose(const uint8_t* piece) {
    return spread<kVector>(vb_shift<kVector % 4 / 2 * 4>(vb_load(piece + kVector / 4 * 64)), piece);
  }

 private:
  template <int kVector>
  static vb spread(vb values, const uint8_t* piece) {
    const vi pairs = vi_shr<4 * kVector>(vb_lanes(vb_load(piece + 128)));
    return vb_spread<kVector % 2 * 2>(values, pairs) ^ vb_set1(8);
  }
};

// fn(codes, c) for every vector of a piece, c its first column in the piece.
template <class Codes, class Fn>
__attribute__((always_inline)) inline void each_vector(const uint8_t* piece, Fn fn) {
  [&]<int... kVector>(std::integer_sequence<int, kVector...>) __attribute__((always_inline)) {
    (fn(Codes::template at<kVector>(piece), 4 * kVector), ...);
  }(std::make_integer_sequence<int, Codes::kColumns / 4>());
}

// The columns of a group that are stored.
inline int64_t columns_of(const Weight& w, int64_t group) {
  return group + 1 == w.groups ? w.kp - group * w.group : w.group;
}

// The scales, or minimums, of 16 rows, kept as f32 (wide) or f16: those from number `at` on.
__attribute__((always_inline)) inline vf load_plain_scales(const void* base, int64_t at, bool wide) {
  return wide ? vf_load(static_cast<const float*>(base) + at)
              : vf_load_f16(static_cast<const uint16_t*>(base) + at);
}
// The same, or E4M3.
__attribute__((always_inline)) inline vf load_scales(const Weight& w, const void* base, int64_t at) {
  if (w.e4m3_scales) {
    const vf scale = vf_load_e4m3(static_cast<const uint8_t*>(base) + at);
    return w.rounded ? scale : scale * vf_set1(w.unit);
  }
  return load_plain_scales(base, at, w.wide_scales);
}
// The values, less the minimums, of codes less the offset.
inline vf scaled(const Weight& w, vf scale, vf codes) {
  const vf value = scale * codes;
  return w.rounded ? vf_round_e4m3(value) * vf_set1(w.unit) : value;
}

// fn(Codes()) with the codes of an integer storage.
template <class Fn>
auto with_codes(Storage storage, Fn fn) {
  switch (storage) {
    case Storage::kInt2:
      return fn(PlaneCodes<2>());
    case Storage::kInt3:
      return fn(PlaneCodes<2, 1>());
    case Storage::kInt4:
      return fn(PlaneCodes<4>());
    case Storage::kInt5:
      return fn(PlaneCodes<4, 1>());
    case Storage::kInt6:
      return fn(PlaneCodes<4, 2>());
    case Storage::kInt8:
      return fn(PlaneCodes<8>());
    case Storage::kSparse24:
      return fn(SparseCodes());
    default:
      __builtin_unreachable();
  }
}

}  // namespace gm::GM_LEVEL
