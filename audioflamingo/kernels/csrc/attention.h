// Attention of packed rows to keys that lie anywhere: softmax(scale * Q K^T) V, in blocks that stay in a core's cache.

#pragma once

#include "kernels.h"

namespace af3 {

// One call. Strides count elements; the last axis is contiguous.
struct Attention {
    const void* query;        // tokens x heads x head_dim
    const void* keys;         // slots x key_heads x head_dim, in any order of the first two axes
    const void* values;
    void* out;                // tokens x heads x head_dim, contiguous
    const int32_t* offsets;   // rows + 1: where each row's queries begin
    const int32_t* starts;    // rows: the slot of the first key
    const int32_t* ends;      // rows: how many keys
    DType dtype;
    int rows, heads, key_heads, head_dim, threads;
    ptrdiff_t query_token, query_head, key_slot, key_head, value_slot, value_head;
    bool is_causal;           // a row's last query stands at its last key, and all look back only
    float scale;
};

void run_attention(const Kernels& kernels, const Attention& call);

}  // namespace af3
