// Plain C++: any processor. Also the readable form of what the vector paths compute.

#include "rows.h"

namespace af3 {
namespace {

float quantize_row(const void* x, DType dtype, int columns, int group, int8_t* values, int32_t* sums) {
    return quantize_row_any(x, dtype, columns, group, values, sums);
}

void finish(const int32_t* sums, int count, float row_scale, const float* scales, const float* bias, void* out,
            DType dtype) {
    finish_any(sums, count, row_scale, scales, bias, out, dtype);
}

void multiply(const uint8_t* const* panels, int num_panels, const int8_t* values, ptrdiff_t stride, int rows,
              int quads, int32_t* sums, ptrdiff_t ld) {
    for (int p = 0; p < num_panels; ++p) {
        for (int r = 0; r < rows; ++r) {
            int32_t* total = sums + r * ld + p * kBlockRows;
            for (int q = 0; q < quads; ++q) {
                const uint8_t* weights = panels[p] + ptrdiff_t(q) * kLine;
                const int8_t* x = values + r * stride + q * 4;
                for (int lane = 0; lane < kBlockRows; ++lane) {
                    for (int j = 0; j < 4; ++j) total[lane] += (weights[lane * 4 + j] - 128) * x[j];
                }
            }
        }
    }
}

void expand(const uint8_t* scales, const uint8_t* nibbles, int num_groups, int group, uint8_t* panel) {
    for (int g = 0; g < num_groups; ++g) {
        for (int pair = 0; pair < group / 8; ++pair, nibbles += kLine, panel += 2 * kLine) {
            for (int i = 0; i < kLine; ++i) {
                const int scale = scales[g * kBlockRows + i / 4];
                panel[i] = uint8_t(((nibbles[i] & 15) - 8) * scale + 128);
                panel[kLine + i] = uint8_t(((nibbles[i] >> 4) - 8) * scale + 128);
            }
        }
    }
}

void decode_int8(const uint8_t* const* blocks, int num_blocks, const Activations& x, int rows, int quads,
                 int32_t (*sums)[kMaxDecodeRows][kBlockRows]) {
    for (int b = 0; b < num_blocks; ++b) {
        memset(sums[b], 0, sizeof sums[b]);
        multiply(blocks + b, 1, x.values, x.stride, rows, quads, sums[b][0], kBlockRows);
    }
}

void decode_int4(const uint8_t* const* blocks, int num_blocks, const Activations& x, int rows, int group,
                 int32_t (*sums)[kMaxDecodeRows][kBlockRows]) {
    for (int b = 0; b < num_blocks; ++b) {
        for (int r = 0; r < rows; ++r) {
            const uint8_t* nibbles = blocks[b] + scale_bytes(x.num_groups);
            const int8_t* row = x.values + r * x.stride;
            int32_t total[kBlockRows] = {};
            for (int g = 0; g < x.num_groups; ++g) {
                int32_t dot[kBlockRows] = {};
                for (int pair = 0; pair < group / 8; ++pair, nibbles += kLine, row += 8) {
                    for (int i = 0; i < kLine; ++i) {
                        dot[i / 4] += (nibbles[i] & 15) * row[i % 4] + (nibbles[i] >> 4) * row[4 + i % 4];
                    }
                }
                const int32_t shift = 8 * x.group_sums[r * x.num_groups + g];
                const uint8_t* scales = blocks[b] + g * kBlockRows;
                for (int lane = 0; lane < kBlockRows; ++lane) total[lane] += (dot[lane] - shift) * scales[lane];
            }
            memcpy(sums[b][r], total, sizeof total);
        }
    }
}

}  // namespace

const Kernels kGeneric = {0, 4, quantize_row, finish, multiply, expand, decode_int8, decode_int4, nullptr};

}  // namespace af3
