// A whole layer: rows are rounded, then a few rows walk the weights once (decode) or many run in tiles (prefill).

#pragma once

#include "kernels.h"

namespace af3 {

// One call of a quantized layer. `group` is 0 for int8.
struct Layer {
    const void* x;            // rows x columns of dtype
    const uint8_t* packed;
    const float* scales;      // outputs
    const float* bias;        // outputs, or null
    void* out;                // rows x outputs of dtype
    DType dtype;
    int rows, outputs, columns, group, threads;

    int num_blocks() const { return ceil_div(outputs, kBlockRows); }
    int num_groups() const { return group ? columns / group : 1; }
    size_t block_bytes() const {
        return group ? scale_bytes(num_groups()) + size_t(columns) * kBlockRows / 2
                     : size_t(ceil_div(columns, 4)) * kLine;
    }
    size_t element_bytes() const { return dtype == kFloat32 ? 4 : 2; }
};

// The layer's rows in int8, with the sums that take off the offsets of stored weights.
struct QuantizedRows {
    int8_t* values;
    ptrdiff_t stride;
    float* scales;        // rows
    int32_t* sums;        // rows
    int32_t* group_sums;  // rows x groups
};

void run_layer(const Kernels& kernels, const Layer& layer);
void run_bf16(const Kernels& kernels, const uint16_t* x, const uint16_t* weight, const uint16_t* bias, uint16_t* out,
              int rows, int outputs, int columns, int threads);

}  // namespace af3
