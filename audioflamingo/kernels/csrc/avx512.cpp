// AVX-512 with VNNI, and with BF16 where the processor has it.
//
// vpdpbusd multiplies four unsigned bytes (the stored weights: value + 128, or value + 8 of a 4-bit one) with four
// signed ones (a row's values, the same four for all sixteen outputs) and adds to 32 bits. What the offsets add,
// 128 or 8 times the sum of the row's values, is taken off outside or set as the start of the sum.

#if defined(__x86_64__)

#include <immintrin.h>

#include <utility>

#include "rows.h"

#define VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")))
#define BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma")))

namespace af3 {
namespace {

constexpr int kTileRows = 6;           // 6 rows x 4 blocks of sums fill 24 of the 32 registers
constexpr int kPrefetchBytes = 2048;   // how far ahead of the decode streams

VNNI float quantize_row(const void* x, DType dtype, int columns, int group, int8_t* values, int32_t* sums) {
    return quantize_row_any(x, dtype, columns, group, values, sums);
}

VNNI void finish(const int32_t* sums, int count, float row_scale, const float* scales, const float* bias, void* out,
                 DType dtype) {
    finish_any(sums, count, row_scale, scales, bias, out, dtype);
}

VNNI AF3_INLINE __m512i load(const void* bytes) { return _mm512_loadu_si512(bytes); }

VNNI AF3_INLINE __m512i broadcast_quad(const int8_t* values) {
    int32_t quad;
    memcpy(&quad, values, sizeof quad);
    return _mm512_set1_epi32(quad);
}

template <int R, int P>
VNNI void multiply_tile(const uint8_t* const* panels, const int8_t* values, ptrdiff_t stride, int quads,
                        int32_t* sums, ptrdiff_t ld) {
    __m512i total[R][P];
    AF3_UNROLL for (int r = 0; r < R; ++r) {
        AF3_UNROLL for (int p = 0; p < P; ++p) total[r][p] = load(sums + r * ld + p * kBlockRows);
    }
    for (ptrdiff_t q = 0; q < quads; ++q) {
        __m512i weights[P];
        AF3_UNROLL for (int p = 0; p < P; ++p) weights[p] = load(panels[p] + q * kLine);
        AF3_UNROLL for (int r = 0; r < R; ++r) {
            const __m512i x = broadcast_quad(values + r * stride + q * 4);
            AF3_UNROLL for (int p = 0; p < P; ++p) total[r][p] = _mm512_dpbusd_epi32(total[r][p], weights[p], x);
        }
    }
    AF3_UNROLL for (int r = 0; r < R; ++r) {
        AF3_UNROLL for (int p = 0; p < P; ++p) _mm512_storeu_si512(sums + r * ld + p * kBlockRows, total[r][p]);
    }
}

void multiply(const uint8_t* const* panels, int num_panels, const int8_t* values, ptrdiff_t stride, int rows,
              int quads, int32_t* sums, ptrdiff_t ld) {
#define AF3_ROW(R) {multiply_tile<R, 1>, multiply_tile<R, 2>, multiply_tile<R, 3>, multiply_tile<R, 4>}
    constexpr decltype(&multiply_tile<1, 1>) tiles[kTileRows][kMaxTileBlocks] = {
        AF3_ROW(1), AF3_ROW(2), AF3_ROW(3), AF3_ROW(4), AF3_ROW(5), AF3_ROW(6)};
#undef AF3_ROW
    tiles[rows - 1][num_panels - 1](panels, values, stride, quads, sums, ld);
}

// value * scale + 128 for 64 values in 0..15 (stored: value + 8). Even and odd bytes are multiplied as 16-bit numbers.
VNNI AF3_INLINE __m512i scaled(__m512i nibbles, __m512i scales, __m512i offsets) {
    const __m512i low = _mm512_set1_epi16(0x000f);
    const __m512i even = _mm512_mullo_epi16(_mm512_and_si512(nibbles, low), scales);
    const __m512i odd = _mm512_mullo_epi16(_mm512_and_si512(nibbles, _mm512_slli_epi16(low, 8)), scales);
    const __m512i bytes = _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaa, even, odd);
    return _mm512_add_epi8(bytes, offsets);
}

VNNI void expand(const uint8_t* scales, const uint8_t* nibbles, int num_groups, int group, uint8_t* panel) {
    for (int g = 0; g < num_groups; ++g, scales += kBlockRows) {
        const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales)));
        const __m512i words = _mm512_or_si512(wide, _mm512_slli_epi32(wide, 16));
        const __m512i eights = _mm512_slli_epi16(words, 3);  // below 1024, so that a byte of it wraps as it should
        const __m512i low_bytes = _mm512_and_si512(eights, _mm512_set1_epi16(0x00ff));
        const __m512i repeated = _mm512_or_si512(low_bytes, _mm512_slli_epi16(low_bytes, 8));
        const __m512i offsets = _mm512_sub_epi8(_mm512_set1_epi8(-128), repeated);
        for (int pair = 0; pair < group / 8; ++pair, nibbles += kLine, panel += 2 * kLine) {
            const __m512i both = load(nibbles);
            _mm512_storeu_si512(panel, scaled(both, words, offsets));
            _mm512_storeu_si512(panel + kLine, scaled(_mm512_srli_epi16(both, 4), words, offsets));
        }
    }
}

template <int R, int B>
VNNI void decode_int8_tile(const uint8_t* const* blocks, const Activations& x, int quads,
                           int32_t (*sums)[kMaxDecodeRows][kBlockRows]) {
    __m512i total[B][R] = {};
    for (ptrdiff_t q = 0; q < quads; ++q) {
        AF3_UNROLL for (int b = 0; b < B; ++b) {
            _mm_prefetch(reinterpret_cast<const char*>(blocks[b] + q * kLine + kPrefetchBytes), _MM_HINT_T0);
            const __m512i weights = load(blocks[b] + q * kLine);
            AF3_UNROLL for (int r = 0; r < R; ++r) {
                total[b][r] =
                    _mm512_dpbusd_epi32(total[b][r], weights, broadcast_quad(x.values + r * x.stride + q * 4));
            }
        }
    }
    AF3_UNROLL for (int b = 0; b < B; ++b) {
        AF3_UNROLL for (int r = 0; r < R; ++r) _mm512_storeu_si512(sums[b][r], total[b][r]);
    }
}

template <int R, int B>
VNNI void decode_int4_tile(const uint8_t* const* blocks, const Activations& x, int group,
                           int32_t (*sums)[kMaxDecodeRows][kBlockRows]) {
    const __m512i low = _mm512_set1_epi8(15);
    const uint8_t* nibbles[B];
    AF3_UNROLL for (int b = 0; b < B; ++b) nibbles[b] = blocks[b] + scale_bytes(x.num_groups);
    const int8_t* values = x.values;
    __m512i total[B][R] = {};
    for (int g = 0; g < x.num_groups; ++g) {
        __m512i dot[B][R];
        AF3_UNROLL for (int r = 0; r < R; ++r) {
            const __m512i start = _mm512_set1_epi32(-8 * x.group_sums[r * x.num_groups + g]);
            AF3_UNROLL for (int b = 0; b < B; ++b) dot[b][r] = start;
        }
        for (int pair = 0; pair < group / 8; ++pair, values += 8) {
            AF3_UNROLL for (int b = 0; b < B; ++b, nibbles[b - 1] += kLine) {
                _mm_prefetch(reinterpret_cast<const char*>(nibbles[b] + kPrefetchBytes), _MM_HINT_T0);
                const __m512i both = load(nibbles[b]);
                const __m512i first = _mm512_and_si512(both, low);
                const __m512i second = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
                AF3_UNROLL for (int r = 0; r < R; ++r) {
                    dot[b][r] = _mm512_dpbusd_epi32(dot[b][r], first, broadcast_quad(values + r * x.stride));
                    dot[b][r] = _mm512_dpbusd_epi32(dot[b][r], second, broadcast_quad(values + r * x.stride + 4));
                }
            }
        }
        AF3_UNROLL for (int b = 0; b < B; ++b) {
            const auto* bytes = reinterpret_cast<const __m128i*>(blocks[b] + g * kBlockRows);
            const __m512i scales = _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes));
            AF3_UNROLL for (int r = 0; r < R; ++r) {
                total[b][r] = _mm512_add_epi32(total[b][r], _mm512_mullo_epi32(dot[b][r], scales));
            }
        }
    }
    AF3_UNROLL for (int b = 0; b < B; ++b) {
        AF3_UNROLL for (int r = 0; r < R; ++r) _mm512_storeu_si512(sums[b][r], total[b][r]);
    }
}

// Beyond four rows, the sums of two blocks at once would need more registers than there are.
template <int R>
void decode_int8_rows(const uint8_t* const* blocks, int num_blocks, const Activations& x, int quads,
                      int32_t (*sums)[kMaxDecodeRows][kBlockRows]) {
    if (num_blocks == 2) return decode_int8_tile<R, 2>(blocks, x, quads, sums);
    for (int b = 0; b < num_blocks; ++b) decode_int8_tile<R, 1>(blocks + b, x, quads, sums + b);
}

template <int R>
void decode_int4_rows(const uint8_t* const* blocks, int num_blocks, const Activations& x, int group,
                      int32_t (*sums)[kMaxDecodeRows][kBlockRows]) {
    if (num_blocks == 2) return decode_int4_tile<R, 2>(blocks, x, group, sums);
    for (int b = 0; b < num_blocks; ++b) decode_int4_tile<R, 1>(blocks + b, x, group, sums + b);
}

void decode_int8(const uint8_t* const* blocks, int num_blocks, const Activations& x, int rows, int quads,
                 int32_t (*sums)[kMaxDecodeRows][kBlockRows]) {
    constexpr decltype(&decode_int8_rows<1>) tiles[kMaxDecodeRows] = {
        decode_int8_rows<1>, decode_int8_rows<2>, decode_int8_rows<3>, decode_int8_rows<4>,
        decode_int8_rows<5>, decode_int8_rows<6>, decode_int8_rows<7>, decode_int8_rows<8>};
    tiles[rows - 1](blocks, num_blocks, x, quads, sums);
}

void decode_int4(const uint8_t* const* blocks, int num_blocks, const Activations& x, int rows, int group,
                 int32_t (*sums)[kMaxDecodeRows][kBlockRows]) {
    constexpr decltype(&decode_int4_rows<1>) tiles[kMaxDecodeRows] = {
        decode_int4_rows<1>, decode_int4_rows<2>, decode_int4_rows<3>, decode_int4_rows<4>,
        decode_int4_rows<5>, decode_int4_rows<6>, decode_int4_rows<7>, decode_int4_rows<8>};
    tiles[rows - 1](blocks, num_blocks, x, group, sums);
}

// Every (row, output) pair has its own sums, filled in the order of K: a result does not depend on R or O.
template <int R, int O>
BF16 void dot_tile(const uint16_t* const* weights, const uint16_t* x, ptrdiff_t columns, float* out) {
    __m512 total[R][O] = {};
    ptrdiff_t k = 0;
    for (; k + 32 <= columns; k += 32) {
        __m512bh w[O];
        AF3_UNROLL for (int o = 0; o < O; ++o) {
            _mm_prefetch(reinterpret_cast<const char*>(weights[o] + k) + kPrefetchBytes, _MM_HINT_T0);
            w[o] = (__m512bh)_mm512_loadu_si512(weights[o] + k);
        }
        AF3_UNROLL for (int r = 0; r < R; ++r) {
            const auto row = (__m512bh)_mm512_loadu_si512(x + r * columns + k);
            AF3_UNROLL for (int o = 0; o < O; ++o) total[r][o] = _mm512_dpbf16_ps(total[r][o], w[o], row);
        }
    }
    const auto rest = __mmask32((uint64_t(1) << (columns - k)) - 1);
    AF3_UNROLL for (int r = 0; r < R; ++r) {
        const auto row = (__m512bh)_mm512_maskz_loadu_epi16(rest, x + r * columns + k);
        AF3_UNROLL for (int o = 0; o < O; ++o) {
            const auto w = (__m512bh)_mm512_maskz_loadu_epi16(rest, weights[o] + k);
            total[r][o] = _mm512_dpbf16_ps(total[r][o], w, row);
            out[o * kMaxDotRows + r] = _mm512_reduce_add_ps(total[r][o]);
        }
    }
}

// A line of bfloat16 as floats: those at even places, and those at odd places.
VNNI AF3_INLINE __m512 even_floats(__m512i line) { return _mm512_castsi512_ps(_mm512_slli_epi32(line, 16)); }
VNNI AF3_INLINE __m512 odd_floats(__m512i line) {
    return _mm512_castsi512_ps(_mm512_and_si512(line, _mm512_set1_epi32(int32_t(0xffff0000))));
}

// Adds the products of the places k..k + 32 that `places` names.
template <int R, int O>
VNNI AF3_INLINE void add_line(__m512 (&total)[R][O], const uint16_t* const* weights, const uint16_t* x,
                              ptrdiff_t columns, ptrdiff_t k, __mmask32 places) {
    __m512 even[O], odd[O];
    AF3_UNROLL for (int o = 0; o < O; ++o) {
        const __m512i line = _mm512_maskz_loadu_epi16(places, weights[o] + k);
        even[o] = even_floats(line);
        odd[o] = odd_floats(line);
    }
    AF3_UNROLL for (int r = 0; r < R; ++r) {
        const __m512i row = _mm512_maskz_loadu_epi16(places, x + r * columns + k);
        AF3_UNROLL for (int o = 0; o < O; ++o) {
            total[r][o] = _mm512_fmadd_ps(even[o], even_floats(row), total[r][o]);
            total[r][o] = _mm512_fmadd_ps(odd[o], odd_floats(row), total[r][o]);
        }
    }
}

// `dot_tile` with float32 multiply-adds: twice as fast where the processor takes its time over bfloat16 ones.
template <int R, int O>
VNNI void dot_float_tile(const uint16_t* const* weights, const uint16_t* x, ptrdiff_t columns, float* out) {
    __m512 total[R][O] = {};
    ptrdiff_t k = 0;
    for (; k + 32 <= columns; k += 32) {
        AF3_UNROLL for (int o = 0; o < O; ++o) {
            _mm_prefetch(reinterpret_cast<const char*>(weights[o] + k) + kPrefetchBytes, _MM_HINT_T0);
        }
        add_line<R, O>(total, weights, x, columns, k, __mmask32(-1));
    }
    add_line<R, O>(total, weights, x, columns, k, __mmask32((uint64_t(1) << (columns - k)) - 1));
    AF3_UNROLL for (int r = 0; r < R; ++r) {
        AF3_UNROLL for (int o = 0; o < O; ++o) out[o * kMaxDotRows + r] = _mm512_reduce_add_ps(total[r][o]);
    }
}

using DotTile = void (*)(const uint16_t* const*, const uint16_t*, ptrdiff_t, float*);

// Cuts the rows into tiles of equal size.
void dot_rows(const DotTile (*tiles)[kDotOutputs], const uint16_t* const* weights, int num_outputs, const uint16_t* x,
              int rows, int columns, float* out) {
    const int step = ceil_div(rows, ceil_div(rows, kTileRows));
    for (int r = 0; r < rows; r += step) {
        const int tile = rows - r < step ? rows - r : step;
        tiles[tile - 1][num_outputs - 1](weights, x + ptrdiff_t(r) * columns, columns, out + r);
    }
}

#define AF3_ROW(TILE, R) {TILE<R, 1>, TILE<R, 2>, TILE<R, 3>, TILE<R, 4>}
#define AF3_ROWS(TILE) \
    {AF3_ROW(TILE, 1), AF3_ROW(TILE, 2), AF3_ROW(TILE, 3), AF3_ROW(TILE, 4), AF3_ROW(TILE, 5), AF3_ROW(TILE, 6)}

void dot_bf16(const uint16_t* const* weights, int num_outputs, const uint16_t* x, int rows, int columns,
              float* out) {
    constexpr DotTile tiles[kTileRows][kDotOutputs] = AF3_ROWS(dot_tile);
    dot_rows(tiles, weights, num_outputs, x, rows, columns, out);
}

void dot_float(const uint16_t* const* weights, int num_outputs, const uint16_t* x, int rows, int columns,
               float* out) {
    constexpr DotTile tiles[kTileRows][kDotOutputs] = AF3_ROWS(dot_float_tile);
    dot_rows(tiles, weights, num_outputs, x, rows, columns, out);
}

#undef AF3_ROWS
#undef AF3_ROW

#define AF3_TARGET VNNI
#define AF3_LANES 16
#define AF3_ATTEND_ROWS 12
#define AF3_FMA(a, b, c) Floats(_mm512_fmadd_ps(a, b, c))
#define AF3_SPLAT(x) Floats(_mm512_set1_ps(x))
#define AF3_LOAD_HALF(from) Floats(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))))
#define AF3_LOAD_BF16(from)                                                                                           \
    Floats(_mm512_castsi512_ps(                                                                                       \
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), 16)))
#include "attention_tile.h"
#include "step_tile.h"

void attend(const AttentionTile& tile, int rows) { attend_rows<Singles>(tile, rows, AttendRows()); }

namespace pairs {

#undef AF3_TARGET
#define AF3_TARGET BF16
#include "attention_tile.h"

// Factors as pairs of bfloat16, products and sums in float32.
struct Pairs {
    static constexpr bool kIsPairs = true;
    AF3_TARGET AF3_INLINE Floats add(Floats sum, Floats a, Floats b) {
        return Floats(_mm512_dpbf16_ps(__m512(sum), (__m512bh)a, (__m512bh)b));
    }
    AF3_TARGET AF3_INLINE void save_weights(float* to, int place, Floats weights) {
        const __m256bh narrow = _mm512_cvtneps_pbh(__m512(weights));
        memcpy(reinterpret_cast<uint16_t*>(to) + place, &narrow, sizeof narrow);
    }
};

void attend(const AttentionTile& tile, int rows) { attend_rows<Pairs>(tile, rows, AttendRows()); }

}  // namespace pairs

constexpr Kernels with_bf16(Kernels kernels) {
    kernels.dot_bf16 = dot_bf16;
    kernels.attend_pairs = pairs::attend;
    return kernels;
}

}  // namespace

const Kernels kAvx512Vnni = {128,         kTileRows,   quantize_row,  finish, multiply, expand,
                             decode_int8, decode_int4, dot_float,     AF3_ATTEND_ROWS, attend, nullptr,
                             &kStep};
const Kernels kAvx512Bf16 = with_bf16(kAvx512Vnni);

}  // namespace af3

#endif
