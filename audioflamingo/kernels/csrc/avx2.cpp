// AVX2 with FMA: processors without AVX-512.
//
// vpmaddubsw saturates at 16 bits. With int8 weights (offset taken off) the sign goes to the row's values, so that a
// pair stays below 2 * 127 * 127; with 4-bit weights (0..15) eight pairs still fit into 16 bits.

#if defined(__x86_64__)

#include <immintrin.h>

#include <utility>

#include "rows.h"

#define AVX2 __attribute__((target("avx2,fma,f16c")))

namespace af3 {
namespace {

constexpr int kTileRows = 4;
constexpr int kPrefetchBytes = 2048;
constexpr int kHalves = 2;  // a 64-byte quad is two registers of eight outputs

AVX2 float quantize_row(const void* x, DType dtype, int columns, int group, int8_t* values, int32_t* sums) {
    return quantize_row_any(x, dtype, columns, group, values, sums);
}

AVX2 void finish(const int32_t* sums, int count, float row_scale, const float* scales, const float* bias, void* out,
                 DType dtype) {
    finish_any(sums, count, row_scale, scales, bias, out, dtype);
}

AVX2 AF3_INLINE __m256i load(const void* bytes) { return _mm256_loadu_si256(static_cast<const __m256i*>(bytes)); }

AVX2 AF3_INLINE void save(void* bytes, __m256i value) { _mm256_storeu_si256(static_cast<__m256i*>(bytes), value); }

AVX2 AF3_INLINE __m256i broadcast_quad(const int8_t* values) {
    int32_t quad;
    memcpy(&quad, values, sizeof quad);
    return _mm256_set1_epi32(quad);
}

// total + products of eight outputs with four inputs; weights are int8 without offset.
AVX2 AF3_INLINE __m256i add_products(__m256i total, __m256i weights, __m256i sizes, __m256i x) {
    const __m256i pairs = _mm256_maddubs_epi16(sizes, _mm256_sign_epi8(x, weights));
    return _mm256_add_epi32(total, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

template <int R>
AVX2 void multiply_tile(const uint8_t* panel, const int8_t* values, ptrdiff_t stride, int quads, int32_t* sums,
                        ptrdiff_t ld) {
    __m256i total[R][kHalves];
    AF3_UNROLL for (int r = 0; r < R; ++r) {
        AF3_UNROLL for (int h = 0; h < kHalves; ++h) total[r][h] = load(sums + r * ld + h * 8);
    }
    for (ptrdiff_t q = 0; q < quads; ++q) {
        _mm_prefetch(reinterpret_cast<const char*>(panel + q * kLine + kPrefetchBytes), _MM_HINT_T0);
        __m256i weights[kHalves], sizes[kHalves];
        AF3_UNROLL for (int h = 0; h < kHalves; ++h) {
            weights[h] = _mm256_xor_si256(load(panel + q * kLine + h * 32), _mm256_set1_epi8(-128));
            sizes[h] = _mm256_abs_epi8(weights[h]);
        }
        AF3_UNROLL for (int r = 0; r < R; ++r) {
            const __m256i x = broadcast_quad(values + r * stride + q * 4);
            AF3_UNROLL for (int h = 0; h < kHalves; ++h) {
                total[r][h] = add_products(total[r][h], weights[h], sizes[h], x);
            }
        }
    }
    AF3_UNROLL for (int r = 0; r < R; ++r) {
        AF3_UNROLL for (int h = 0; h < kHalves; ++h) save(sums + r * ld + h * 8, total[r][h]);
    }
}

void multiply(const uint8_t* const* panels, int num_panels, const int8_t* values, ptrdiff_t stride, int rows,
              int quads, int32_t* sums, ptrdiff_t ld) {
    constexpr decltype(&multiply_tile<1>) tiles[kTileRows] = {multiply_tile<1>, multiply_tile<2>, multiply_tile<3>,
                                                              multiply_tile<4>};
    for (int p = 0; p < num_panels; ++p) {
        tiles[rows - 1](panels[p], values, stride, quads, sums + p * kBlockRows, ld);
    }
}

// value * scale + 128 for 32 values in 0..15 (stored: value + 8). Even and odd bytes are multiplied as 16-bit numbers.
AVX2 AF3_INLINE __m256i scaled(__m256i nibbles, __m256i scales, __m256i offsets) {
    const __m256i even = _mm256_mullo_epi16(_mm256_and_si256(nibbles, _mm256_set1_epi16(0x000f)), scales);
    const __m256i odd = _mm256_mullo_epi16(_mm256_and_si256(nibbles, _mm256_set1_epi16(0x0f00)), scales);
    return _mm256_add_epi8(_mm256_blendv_epi8(even, odd, _mm256_set1_epi16(int16_t(0xff00))), offsets);
}

AVX2 AF3_INLINE __m256i widen_scales(const uint8_t* scales) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales)));
}

AVX2 void expand(const uint8_t* scales, const uint8_t* nibbles, int num_groups, int group, uint8_t* panel) {
    for (int g = 0; g < num_groups; ++g, scales += kBlockRows) {
        __m256i words[kHalves], offsets[kHalves];
        AF3_UNROLL for (int h = 0; h < kHalves; ++h) {
            const __m256i wide = widen_scales(scales + h * 8);
            words[h] = _mm256_or_si256(wide, _mm256_slli_epi32(wide, 16));
            const __m256i low = _mm256_and_si256(_mm256_slli_epi16(words[h], 3), _mm256_set1_epi16(0x00ff));
            const __m256i repeated = _mm256_or_si256(low, _mm256_slli_epi16(low, 8));
            offsets[h] = _mm256_sub_epi8(_mm256_set1_epi8(-128), repeated);
        }
        for (int pair = 0; pair < group / 8; ++pair, nibbles += kLine, panel += 2 * kLine) {
            AF3_UNROLL for (int h = 0; h < kHalves; ++h) {
                const __m256i both = load(nibbles + h * 32);
                save(panel + h * 32, scaled(both, words[h], offsets[h]));
                save(panel + kLine + h * 32, scaled(_mm256_srli_epi16(both, 4), words[h], offsets[h]));
            }
        }
    }
}

void decode_int8(const uint8_t* const* blocks, int num_blocks, const Activations& x, int rows, int quads,
                 int32_t (*sums)[kMaxDecodeRows][kBlockRows]) {
    for (int b = 0; b < num_blocks; ++b) {
        memset(sums[b], 0, sizeof sums[b]);
        for (int r = 0; r < rows; r += kTileRows) {
            const int tile = rows - r < kTileRows ? rows - r : kTileRows;
            multiply(blocks + b, 1, x.values + r * x.stride, x.stride, tile, quads, sums[b][r], kBlockRows);
        }
    }
}

// R rows with eight outputs of a block, over all groups.
template <int R>
AVX2 void decode_int4_tile(const uint8_t* block, int half, const Activations& x, int first_row, int group,
                           int32_t (*sums)[kBlockRows]) {
    constexpr int kPairs = 4;  // pairs of quads: eight products, each below 2 * 15 * 127, per 16-bit sum
    const __m256i low = _mm256_set1_epi8(15);
    const uint8_t* nibbles = block + scale_bytes(x.num_groups) + half * 32;
    const int8_t* values = x.values + first_row * x.stride;
    __m256i total[R] = {};
    for (int g = 0; g < x.num_groups; ++g) {
        __m256i dot[R];
        AF3_UNROLL for (int r = 0; r < R; ++r) {
            dot[r] = _mm256_set1_epi32(-8 * x.group_sums[(first_row + r) * x.num_groups + g]);
        }
        for (int run = 0; run < group / (8 * kPairs); ++run) {
            __m256i pairs[R] = {};
            for (int pair = 0; pair < kPairs; ++pair, nibbles += kLine, values += 8) {
                _mm_prefetch(reinterpret_cast<const char*>(nibbles + kPrefetchBytes), _MM_HINT_T0);
                const __m256i both = load(nibbles);
                const __m256i first = _mm256_and_si256(both, low);
                const __m256i second = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
                AF3_UNROLL for (int r = 0; r < R; ++r) {
                    const __m256i one = _mm256_maddubs_epi16(first, broadcast_quad(values + r * x.stride));
                    const __m256i two = _mm256_maddubs_epi16(second, broadcast_quad(values + r * x.stride + 4));
                    pairs[r] = _mm256_add_epi16(pairs[r], _mm256_add_epi16(one, two));
                }
            }
            AF3_UNROLL for (int r = 0; r < R; ++r) {
                dot[r] = _mm256_add_epi32(dot[r], _mm256_madd_epi16(pairs[r], _mm256_set1_epi16(1)));
            }
        }
        const __m256i scales = widen_scales(block + g * kBlockRows + half * 8);
        AF3_UNROLL for (int r = 0; r < R; ++r) {
            total[r] = _mm256_add_epi32(total[r], _mm256_mullo_epi32(dot[r], scales));
        }
    }
    AF3_UNROLL for (int r = 0; r < R; ++r) save(sums[r] + half * 8, total[r]);
}

void decode_int4(const uint8_t* const* blocks, int num_blocks, const Activations& x, int rows, int group,
                 int32_t (*sums)[kMaxDecodeRows][kBlockRows]) {
    constexpr decltype(&decode_int4_tile<1>) tiles[kTileRows] = {decode_int4_tile<1>, decode_int4_tile<2>,
                                                                 decode_int4_tile<3>, decode_int4_tile<4>};
    for (int b = 0; b < num_blocks; ++b) {
        for (int r = 0; r < rows; r += kTileRows) {
            const int tile = rows - r < kTileRows ? rows - r : kTileRows;
            for (int half = 0; half < kHalves; ++half) {
                tiles[tile - 1](blocks[b], half, x, r, group, sums[b] + r);
            }
        }
    }
}

AVX2 AF3_INLINE __m256 widen8(const uint16_t* values) {
    const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
}

AVX2 AF3_INLINE float sum8(__m256 values) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// Every (row, output) pair has its own sums, filled in the order of K: a result does not depend on R.
template <int R>
AVX2 void dot_tile(const uint16_t* const* weights, int num_outputs, const uint16_t* x, ptrdiff_t columns,
                   float* out) {
    for (int o = 0; o < num_outputs; ++o) {
        const uint16_t* w = weights[o];
        __m256 even[R] = {}, odd[R] = {};
        ptrdiff_t k = 0;
        for (; k + 16 <= columns; k += 16) {
            _mm_prefetch(reinterpret_cast<const char*>(w + k) + kPrefetchBytes, _MM_HINT_T0);
            const __m256 first = widen8(w + k), second = widen8(w + k + 8);
            AF3_UNROLL for (int r = 0; r < R; ++r) {
                even[r] = _mm256_fmadd_ps(first, widen8(x + r * columns + k), even[r]);
                odd[r] = _mm256_fmadd_ps(second, widen8(x + r * columns + k + 8), odd[r]);
            }
        }
        AF3_UNROLL for (int r = 0; r < R; ++r) {
            float sum = sum8(_mm256_add_ps(even[r], odd[r]));
            for (ptrdiff_t rest = k; rest < columns; ++rest) sum += widen(w[rest]) * widen(x[r * columns + rest]);
            out[o * kMaxDotRows + r] = sum;
        }
    }
}

void dot_bf16(const uint16_t* const* weights, int num_outputs, const uint16_t* x, int rows, int columns,
              float* out) {
    constexpr decltype(&dot_tile<1>) tiles[kTileRows] = {dot_tile<1>, dot_tile<2>, dot_tile<3>, dot_tile<4>};
    for (int r = 0; r < rows; r += kTileRows) {
        const int tile = rows - r < kTileRows ? rows - r : kTileRows;
        tiles[tile - 1](weights, num_outputs, x + ptrdiff_t(r) * columns, columns, out + r);
    }
}

#define AF3_TARGET AVX2
#define AF3_LANES 8
#define AF3_ATTEND_ROWS 6  // 6 queries x 16 keys of sums fill 12 of the 16 registers
#define AF3_FMA(a, b, c) Floats(_mm256_fmadd_ps(a, b, c))
#define AF3_SPLAT(x) Floats(_mm256_set1_ps(x))
#define AF3_LOAD_HALF(from) Floats(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))))
#define AF3_LOAD_BF16(from)                                                                                           \
    Floats(_mm256_castsi256_ps(                                                                                       \
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))), 16)))
#include "attention_tile.h"
#include "step_tile.h"

void attend(const AttentionTile& tile, int rows) { attend_rows<Singles>(tile, rows, AttendRows()); }

}  // namespace

const Kernels kAvx2 = {0,           kTileRows, quantize_row,    finish, multiply, expand, decode_int8,
                       decode_int4, dot_bf16,  AF3_ATTEND_ROWS, attend, nullptr,
                       &kStep};

}  // namespace af3

#endif
