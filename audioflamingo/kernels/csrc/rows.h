// Float work of a row, written once and compiled for each instruction set (the compiler vectorizes it).
//
// Built with -ffp-contract=off: a fused multiply-add would round once where the others round twice.

#pragma once

#include <cstring>

#include "kernels.h"

#define AF3_INLINE static inline __attribute__((always_inline))
// Before a loop over registers: GCC keeps an array of sums in registers only if the loops are unrolled early.
#define AF3_UNROLL _Pragma("GCC unroll 16")

namespace af3 {

AF3_INLINE float widen(uint16_t value) {
    const uint32_t bits = uint32_t(value) << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}
AF3_INLINE float widen(float value) { return value; }

// bfloat16, to nearest even; a NaN stays one.
AF3_INLINE uint16_t narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}
AF3_INLINE void store(float value, float* out) { *out = value; }
AF3_INLINE void store(float value, uint16_t* out) { *out = narrow(value); }

template <class T>
AF3_INLINE float quantize_row_as(const T* x, int columns, int8_t* values) {
    uint32_t largest_bits = 0;  // of |x|: the order of the bits is that of the numbers, with infinity and NaN on top
    for (int k = 0; k < columns; ++k) {
        const float value = widen(x[k]);
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        bits &= 0x7fffffff;
        largest_bits = bits > largest_bits ? bits : largest_bits;
    }
    float largest;
    memcpy(&largest, &largest_bits, sizeof largest);
    const float scale = largest / 127.0f;
    if (largest_bits >= 0x7f800000 || scale < 1.17549435e-38f) {
        memset(values, 0, size_t(columns));
        return largest_bits >= 0x7f800000 ? __builtin_nanf("") : 0.0f;
    }
    for (int k = 0; k < columns; ++k) {
        const float magic = 12582912.0f;  // 1.5 * 2**23: adding it rounds to an integer, ties to even
        float value = (widen(x[k]) / scale + magic) - magic;
        value = value > 127.0f ? 127.0f : value;
        value = value < -127.0f ? -127.0f : value;
        values[k] = int8_t(int32_t(value));
    }
    return scale;
}

template <class T>
AF3_INLINE void finish_as(const int32_t* sums, int count, float row_scale, const float* scales, const float* bias,
                          T* out) {
    if (bias) {
        for (int i = 0; i < count; ++i) store(float(sums[i]) * (row_scale * scales[i]) + bias[i], out + i);
    } else {
        for (int i = 0; i < count; ++i) store(float(sums[i]) * (row_scale * scales[i]), out + i);
    }
}

AF3_INLINE float quantize_row_any(const void* x, DType dtype, int columns, int group, int8_t* values, int32_t* sums) {
    const float scale = dtype == kFloat32 ? quantize_row_as(static_cast<const float*>(x), columns, values)
                                          : quantize_row_as(static_cast<const uint16_t*>(x), columns, values);
    for (int first = 0; first < columns; first += group) {
        int32_t sum = 0;
        for (int k = first; k < first + group; ++k) sum += values[k];
        *sums++ = sum;
    }
    return scale;
}

AF3_INLINE void finish_any(const int32_t* sums, int count, float row_scale, const float* scales, const float* bias,
                           void* out, DType dtype) {
    if (dtype == kFloat32) {
        finish_as(sums, count, row_scale, scales, bias, static_cast<float*>(out));
    } else {
        finish_as(sums, count, row_scale, scales, bias, static_cast<uint16_t*>(out));
    }
}

}  // namespace af3
