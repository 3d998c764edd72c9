// Declarations of every kernel of the level being compiled; table.cc collects them.
#pragma once

#include "gristmill/kernel.h"

namespace gm::GM_LEVEL {

void encode_int8(const float* x, int64_t ldx, int64_t rows, int64_t k, int64_t group, int64_t kp,
                 const Rounding& rounding, int8_t* q, float* scale, int32_t* sum, float* gathered);
void encode_fp8(const float* x, int64_t ldx, int64_t rows, int64_t k, int64_t kp, const int32_t* order,
                uint16_t* out, float* scale, float* gathered);
void encode_bf16(const float* x, int64_t ldx, int64_t rows, int64_t k, int64_t kp, uint16_t* out);

void linear_int8(const Weight& w, const Int8Rows& x, int64_t rows, int64_t block_begin, int64_t block_end,
                 const LinearOut& out, void* scratch);
void linear_bf16(const Weight& w, const uint16_t* x, int64_t ldx, int64_t rows, int64_t block_begin,
                 int64_t block_end, const LinearOut& out, void* scratch);
void linear_f32(const Weight& w, const float* x, int64_t ldx, int64_t rows, int64_t block_begin,
                int64_t block_end, const LinearOut& out, void* scratch);
void decode_row(const Weight& w, int64_t row, float* out);
uint64_t read_all(const void* data, int64_t bytes);

bool row_maxima(const float* x, int64_t n, float* maxima);
void row_exponentials(const float* x, int64_t n, float top, float inverse, float* out, double* sums);

void rmsnorm(const float* x, int64_t ldx, const float* w, float* y, int64_t ldy, int64_t rows, int64_t n,
             float eps);
void add(float* x, int64_t ldx, const float* y, int64_t ldy, int64_t rows, int64_t n);
void gated(const float* gate, const float* up, float* out, int64_t ld, int64_t rows, int64_t n,
           Activation act);

bool attention_long(const AttentionArgs& a);
void attention_prepare(const AttentionArgs& a, int64_t row_begin, int64_t row_end, void* scratch);
int64_t attention_items(const AttentionArgs& a);
int64_t attention_partial_floats(const AttentionArgs& a);
void attention_spans(const AttentionArgs& a, int64_t item_begin, int64_t item_end, void* scratch);
void attention_commit(const AttentionArgs& a, int64_t row_begin, int64_t row_end, void* scratch);
void attention_merge(const AttentionArgs& a, int64_t row_begin, int64_t row_end);
int64_t attention_scratch_bytes(const AttentionArgs& a);

}  // namespace gm::GM_LEVEL
