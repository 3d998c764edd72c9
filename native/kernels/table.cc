// The one exported symbol of a level: its table of kernels.
#include "kernels.h"

#define GM_CONCAT2(a, b) a##b
#define GM_CONCAT(a, b) GM_CONCAT2(a, b)
#define GM_STRING2(a) #a
#define GM_STRING(a) GM_STRING2(a)

namespace gm {

const KernelTable* GM_CONCAT(kernel_table_, GM_LEVEL)() {
  using namespace GM_LEVEL;
  static const KernelTable table = {
      .level = GM_STRING(GM_LEVEL),
      .prompts_in_bf16 = false,
      .encode_int8 = encode_int8,
      .encode_fp8 = encode_fp8,
      .encode_bf16 = encode_bf16,
      .linear_int8 = linear_int8,
      .linear_bf16 = linear_bf16,
      .linear_f32 = linear_f32,
      .decode_row = decode_row,
      .rmsnorm = rmsnorm,
      .add = add,
      .gated = gated,
      .attention_long = attention_long,
      .attention_prepare = attention_prepare,
      .attention_items = attention_items,
      .attention_partial_floats = attention_partial_floats,
      .attention_spans = attention_spans,
      .attention_commit = attention_commit,
      .attention_merge = attention_merge,
      .attention_scratch_bytes = attention_scratch_bytes,
      .row_maxima = row_maxima,
      .row_exponentials = row_exponentials,
      .read_all = read_all,
  };
  return &table;
}

}  // namespace gm
