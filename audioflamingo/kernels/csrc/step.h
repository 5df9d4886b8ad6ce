// One new token of each of a few rows through all layers of the language model in one call: activations in float32,
// weights in float, half, or packed integers; norms, biases, keys and values in the model's dtype.

#pragma once

#include "kernels.h"

namespace af3 {

enum Weights : int32_t { kFloats = 0, kHalves = 1, kPacked = 2 };

// A linear layer's weights, outputs x inputs, or as layer.h has them.
struct StepMatrix {
    const void* weights;
    const float* scales;    // packed: of the outputs
    const void* smoothing;  // packed: factors of the inputs, or null
};

// In the order of fused_step.py; keys and values are key_heads x slots x head_dim.
struct StepLayer {
    StepMatrix q, k, v, o, gate, up, down;
    const void *q_bias, *k_bias, *v_bias;  // or null
    const void *input_norm, *post_norm;
    void *keys, *values;
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
    Weights kind;
    int group;    // packed: of int4, 0 for int8
    DType dtype;  // of norms, biases, smoothing, keys and values
    float epsilon;
    ptrdiff_t head_stride;  // elements from one key head to the next
};

// A linear layer on the same rows as others.
struct Matrix {
    StepMatrix stored;
    const float* bias;  // or null
    float* out;         // rows x outputs
    int outputs;
};

// Several matrices times the same rows (at most 16), in one go; `is_added`: to what `out` holds, without a bias.
void run_product(const Kernels& kernels, const Matrix* matrices, int count, bool is_half, const float* x, int rows,
                 int columns, bool is_added, int threads);
void run_step(const Kernels& kernels, const Step& step);

}  // namespace af3
