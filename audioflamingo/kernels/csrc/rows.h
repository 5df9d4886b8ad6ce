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

// By factors of two that bring a float16's exponent, those below the normal ones included, to a float's and back.
AF3_INLINE float widen(Half value) {
    const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, rest = value.bits & 0x7fff;
    const uint32_t bits = rest >= 0x7c00 ? 0x7f800000 | rest << 13 : rest << 13;  // infinity and NaN, or 2**-112 times
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    if (rest < 0x7c00) wide *= 5.192296858534828e33f;  // 2**112
    return sign ? -wide : wide;
}

// float16, to nearest even; what is too large becomes infinity, a NaN stays one.
AF3_INLINE Half narrow_half(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return {uint16_t(sign | 0x7e00)};
    if (bits >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // from 65520 on
    if (bits < 0x38800000) {                                   // below 2**-14: adding 0.5 rounds to steps of 2**-24
        float small;
        memcpy(&small, &bits, sizeof small);
        small += 0.5f;
        memcpy(&bits, &small, sizeof bits);
        return {uint16_t(sign | (bits - 0x3f000000))};
    }
    return {uint16_t(sign | ((bits + 0xfff + (bits >> 13 & 1) - 0x38000000) >> 13))};
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
