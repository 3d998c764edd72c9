// What the files of AMX linear layers share.
#pragma once

#include <immintrin.h>

#include "gristmill/kernel.h"

namespace gm::GM_LEVEL {

inline __mmask64 first_bytes(int64_t n) {
  return n >= 64 ? ~static_cast<__mmask64>(0) : n <= 0 ? 0 : (static_cast<__mmask64>(1) << n) - 1;
}

// As linear_int8 for some weights and a few rows. False, and nothing put out, for others.
bool linear_int8_few(const Weight& w, const Int8Rows& x, int64_t rows, int64_t block_begin, int64_t block_end,
                     const LinearOut& out, void* scratch);
// Whether bf16 rows meet a weight's codes (linear_amx_codes.cc), not its values rounded to bf16.
bool has_large_groups(const Weight& w);
// As linear_bf16, for at least one row and such weights.
void linear_bf16_codes(const Weight& w, const uint16_t* x, int64_t ldx, int64_t rows, int64_t block_begin,
                       int64_t block_end, const LinearOut& out, void* scratch);
// The same for one row, without tiles. False, and nothing put out, where the bits might differ.
bool linear_bf16_row(const Weight& w, const uint16_t* x, int64_t block_begin, int64_t block_end,
                     const LinearOut& out, void* scratch);

}  // namespace gm::GM_LEVEL
