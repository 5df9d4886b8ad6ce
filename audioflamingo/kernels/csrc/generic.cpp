// Plain C++: any processor. Also the readable form of what the vector paths compute.

#include <utility>

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

// Weights are copied out of the layout first, one output after the other: compilers vectorize a sum of 16-bit products
// of neighbours, whatever the instruction set.
void multiply(const uint8_t* const* panels, int num_panels, const int8_t* values, ptrdiff_t stride, int rows,
              int quads, int32_t* sums, ptrdiff_t ld) {
    constexpr int kRun = 256;  // quads: 32 KB of weights
    int16_t weights[kBlockRows][kRun * 4];
    uint8_t stored[kRun * 4];
    for (int p = 0; p < num_panels; ++p) {
        for (int first = 0; first < quads; first += kRun) {
            const int run = quads - first < kRun ? quads - first : kRun;
            const uint8_t* panel = panels[p] + ptrdiff_t(first) * kLine;
            for (int lane = 0; lane < kBlockRows; ++lane) {
                for (int q = 0; q < run; ++q) memcpy(stored + q * 4, panel + q * kLine + lane * 4, 4);
                for (int k = 0; k < run * 4; ++k) weights[lane][k] = int16_t(stored[k] - 128);
            }
            for (int r = 0; r < rows; ++r) {
                const int8_t* x = values + r * stride + first * 4;
                for (int lane = 0; lane < kBlockRows; ++lane) {
                    int32_t dot = 0;
                    for (int k = 0; k < run * 4; ++k) dot += weights[lane][k] * x[k];
                    sums[r * ld + p * kBlockRows + lane] += dot;
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
    constexpr int kMaxGroup = 128;
    uint8_t panel[kMaxGroup * kBlockRows];
    const uint8_t* const panels[] = {panel};
    for (int b = 0; b < num_blocks; ++b) {
        memset(sums[b], 0, sizeof sums[b]);
        const uint8_t* nibbles = blocks[b] + scale_bytes(x.num_groups);
        for (int g = 0; g < x.num_groups; ++g, nibbles += group * kBlockRows / 2) {
            expand(blocks[b] + g * kBlockRows, nibbles, 1, group, panel);
            multiply(panels, 1, x.values + g * group, x.stride, rows, group / 4, sums[b][0], kBlockRows);
        }
    }
}

#define AF3_TARGET
#define AF3_LANES 4
#define AF3_ATTEND_ROWS 2
#define AF3_FMA(a, b, c) ((a) * (b) + (c))
#define AF3_SPLAT(x) splat(x)
typedef float FourFloats __attribute__((vector_size(16)));
AF3_INLINE FourFloats splat(float x) { return FourFloats{x, x, x, x}; }
#include "attention_tile.h"

void attend(const AttentionTile& tile, int rows) { attend_rows<Singles>(tile, rows, AttendRows()); }

}  // namespace

const Kernels kGeneric = {0,           24,          quantize_row, finish,          multiply, expand,
                          decode_int8, decode_int4, nullptr,      AF3_ATTEND_ROWS, attend,   nullptr};

}  // namespace af3
