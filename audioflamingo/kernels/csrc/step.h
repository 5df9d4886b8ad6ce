// One new token of each of a few rows through all layers of the language model, in float32, in one call.

#pragma once

#include "kernels.h"

namespace af3 {

// In the order of fused_step.py. Weights are outputs x inputs, float or half; keys and values key_heads x slots x head_dim.
struct StepLayer {
    const void *q, *k, *v, *o, *gate, *up, *down;
    const float *q_bias, *k_bias, *v_bias;
    const float *input_norm, *post_norm;
    float *keys, *values;
};

struct Step {
    const StepLayer* layers;
    const int64_t* slots;   // rows: where each new token's key and value go
    const int64_t* starts;  // rows: the slot of the first key
    const int64_t* ends;    // rows: how many keys, the new one included
    const float* cosines;   // rows x head_dim
    const float* sines;
    float* x;               // rows x width: embeddings, and then what the last layer gives
    int num_layers, rows, width, heads, key_heads, head_dim, inner, threads;
    bool is_half;
    float epsilon;
    ptrdiff_t head_stride;  // elements from one key head to the next
};

// A linear layer on the same rows as others.
struct Matrix {
    const void* weights;
    const float* bias;  // or null
    float* out;         // rows x outputs
    int outputs;
};

// Several matrices times the same rows (at most 16), in one go; `is_added`: to what `out` holds, without a bias.
void run_product(const Kernels& kernels, const Matrix* matrices, int count, bool is_half, const float* x, int rows,
                 int columns, bool is_added, int threads);
void run_step(const Kernels& kernels, const Step& step);

}  // namespace af3
