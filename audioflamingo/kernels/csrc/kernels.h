// What the parts of the extension share: the layout's constants, the work of one layer, the table of inner loops.
//
// The layout is described in layout.py. "Quad": four inputs of the sixteen rows of a block, 64 bytes.

#pragma once

#include <cstddef>
#include <cstdint>

namespace af3 {

constexpr int kBlockRows = 16;
constexpr int kLine = 64;
constexpr int kMaxTileBlocks = 4;   // blocks that a tile of `multiply` covers
constexpr int kMaxDecodeRows = 8;   // rows that `decode_*` takes at once
constexpr int kMaxDotRows = 16;     // rows that linear_bf16 takes
constexpr int kDotOutputs = 4;      // outputs that `dot_bf16` computes at once
constexpr int kPanel = 16;          // keys, or dimensions, that lie side by side while queries attend
constexpr int kKeys = 256;          // keys of a block of attention
constexpr int kMaxAttendRows = 12;  // queries that `attend` takes at once
constexpr float kLowest = -1e30f;   // below every score
// 2**x for -0.5 <= x <= 0.5 as a polynomial, the highest power first: relative error 2e-9 before rounding.
constexpr int kNumPowers = 7;
constexpr float kPowers[kNumPowers] = {1.534580806e-4f, 1.339993090e-3f, 9.618489072e-3f, 5.550328643e-2f,
                                       2.402264625e-1f, 6.931471825e-1f, 1.0f};

enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };  // float16: of decode steps alone

// A float16 in memory; a bfloat16 is a plain uint16_t.
struct Half {
    uint16_t bits;
};

// Rows of activations, rounded to int8. K is filled up with zeros to a multiple of 4.
struct Activations {
    const int8_t* values;        // row r at values + r * stride
    ptrdiff_t stride;
    const int32_t* group_sums;   // sum of row r over group g at [r * num_groups + g]
    int num_groups;
};

// Some queries and a block of keys. A "place" is 32 bits: a float, or two bfloat16 side by side.
struct AttentionTile {
    const float* query;      // row r at query + r * query_stride places
    ptrdiff_t query_stride;
    const float* keys;       // [key / 16][dimension][key % 16] places
    const float* values;     // [dimension / 16][key, kKeys at most][dimension % 16] places
    int lines;               // places of a query
    int dim_panels;
    int num_keys;            // what the last query sees of the block
    const int* limits;       // what each query sees
    float scale;             // of the scores, whose exponential to base 2 is taken
    float* out;              // sums so far: row r at out + r * dim_panels * 16
    float* most;             // the largest score so far of each query
    float* sums;             // sum of the weights so far
    float* scores;           // kMaxAttendRows x kKeys to work in
    float* weights;          // likewise, for weights in bfloat16
};

// The inner loops of a decode step: float32, keys and values in any dtype.
struct StepKernels {
    // out[r * ld + o] = product of row r of x with row o of the weights, which are float or half; columns in 32s.
    void (*product)(const void* weights, bool is_half, int outputs, const float* x, int rows, int columns, float* out,
                    ptrdiff_t ld);
    void (*norm)(const float* x, const float* weight, float epsilon, int width, float* out);
    void (*swiglu)(float* gate, const float* up, int width);
    void (*look)(const float* query, const void* keys, const void* values, DType dtype, int num_keys, int head_dim,
                 float scale, float* scores, float* out);
};

// The inner loops of one instruction set. All integer results are exact; sums wrap at 32 bits only on the way.
struct Kernels {
    // Value that `multiply` and `decode_int8` leave in the weights: 128 if they multiply the stored byte as it is.
    int weight_offset;
    int tile_rows;  // rows that `multiply` takes at once

    // Rounds a row; returns its scale (see quantize_rows in reference.py). `sums`: of each `group` rounded values.
    float (*quantize_row)(const void* x, DType dtype, int columns, int group, int8_t* values, int32_t* sums);
    // out[i] = sums[i] * (row_scale * scales[i]) + bias[i], rounded to dtype. `bias` may be null.
    void (*finish)(const int32_t* sums, int count, float row_scale, const float* scales, const float* bias,
                   void* out, DType dtype);
    // sums[r * ld + 16 * b + lane] += products of `rows` rows with `num_panels` blocks over `quads` quads.
    void (*multiply)(const uint8_t* const* panels, int num_panels, const int8_t* values, ptrdiff_t stride, int rows,
                     int quads, int32_t* sums, ptrdiff_t ld);
    // Expands groups first..last of an int4 block to `value * scale + 128`, in the layout of int8.
    void (*expand)(const uint8_t* scales, const uint8_t* nibbles, int num_groups, int group, uint8_t* panel);
    // sums[b][r][lane] = products of 1..8 rows with one or two blocks; int8 leaves weight_offset in.
    void (*decode_int8)(const uint8_t* const* blocks, int num_blocks, const Activations& x, int rows, int quads,
                        int32_t (*sums)[kMaxDecodeRows][kBlockRows]);
    void (*decode_int4)(const uint8_t* const* blocks, int num_blocks, const Activations& x, int rows, int group,
                        int32_t (*sums)[kMaxDecodeRows][kBlockRows]);
    // out[o * 16 + r] = dot product of weight row o (of num_outputs <= 4) and row r, in float32.
    // Null in plain C++, which has nothing on F.linear.
    void (*dot_bf16)(const uint16_t* const* weights, int num_outputs, const uint16_t* x, int rows, int columns,
                     float* out);
    int attend_rows;  // queries that `attend` takes at once
    // Adds a block of keys to what 1..attend_rows queries have seen.
    void (*attend)(const AttentionTile& tile, int rows);
    // The same in pairs of bfloat16; null where the processor does not multiply them.
    void (*attend_pairs)(const AttentionTile& tile, int rows);
    const StepKernels* step;  // null in plain C++
};

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Bytes of a block's group scales, filled up to whole lines.
inline size_t scale_bytes(int num_groups) { return size_t(ceil_div(num_groups * kBlockRows, kLine)) * kLine; }

extern const Kernels kGeneric;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512Vnni;
extern const Kernels kAvx512Bf16;
#endif

}  // namespace af3
