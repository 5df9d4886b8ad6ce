// The functions that native.py calls. Its wrappers have checked every shape, dtype and device.

#include <new>

#include "attention.h"
#include "layer.h"
#include "step.h"

namespace {

// From the plainest to the fastest; native.py names them in this order.
const af3::Kernels* const kLevels[] = {
    &af3::kGeneric,
#if defined(__x86_64__)
    &af3::kAvx2,
    &af3::kAvx512Vnni,
    &af3::kAvx512Bf16,
#endif
};

constexpr int kOk = 0;
constexpr int kOutOfMemory = 1;

}  // namespace

#define AF3_API extern "C" __attribute__((visibility("default")))

// Which arguments the functions take: raised with every change of them, here and in native.py.
AF3_API int af3_interface() { return 3; }

// The fastest level that this processor (and its operating system) runs.
AF3_API int af3_best_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512vnni")) {
        return 1;
    }
    return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
#else
    return 0;
#endif
}

// x (rows, columns) and out (rows, outputs) of `dtype`; `group` 0 is int8; `bias` may be null.
AF3_API int af3_linear(int level, int threads, int dtype, int group, int rows, int outputs, int columns, const void* x,
                       const uint8_t* packed, const float* scales, const float* bias, void* out) {
    try {
        af3::run_layer(*kLevels[level], {x, packed, scales, bias, out, af3::DType(dtype), rows, outputs, columns,
                                         group, threads});
        return kOk;
    } catch (const std::bad_alloc&) {
        return kOutOfMemory;
    }
}

// All bfloat16; rows <= 16; `bias` may be null.
AF3_API void af3_linear_bf16(int level, int threads, int rows, int outputs, int columns, const uint16_t* x,
                             const uint16_t* weight, const uint16_t* bias, uint16_t* out) {
    af3::run_bf16(*kLevels[level], x, weight, bias, out, rows, outputs, columns, threads);
}

// Everything of `dtype`; the sizes are rows, heads, key heads and dimensions, the strides those of `Attention` in order.
AF3_API int af3_attention(int level, int threads, int dtype, int is_causal, float scale, const int* sizes,
                          const int64_t* strides, const int32_t* offsets, const int32_t* starts, const int32_t* ends,
                          const void* query, const void* keys, const void* values, void* out) {
    try {
        af3::run_attention(*kLevels[level],
                           {query, keys, values, out, offsets, starts, ends, af3::DType(dtype), sizes[0], sizes[1],
                            sizes[2], sizes[3], threads, strides[0], strides[1], strides[2], strides[3], strides[4],
                            strides[5], is_causal != 0, scale});
        return kOk;
    } catch (const std::bad_alloc&) {
        return kOutOfMemory;
    }
}

// Weights in float16, all else float; rows <= 16, columns in 32s; `bias` may be null. Not at level 0.
AF3_API void af3_linear_half(int level, int threads, int rows, int outputs, int columns, const float* x,
                             const uint16_t* weight, const float* bias, float* out) {
    const af3::Matrix matrix = {{weight, nullptr, nullptr}, bias, out, outputs};
    af3::run_product(*kLevels[level], &matrix, 1, true, x, rows, columns, false, threads);
}

// Sizes: layers, rows (at most 16), width, heads, key heads, head_dim, inner; then as Step has them: kind, group, dtype.
// Widths in 32s, head_dim in 64s. `layers` as StepLayer has them, the rest as Step. Not at level 0.
AF3_API int af3_step(int level, int threads, float epsilon, int64_t head_stride, const int* sizes,
                     const af3::StepLayer* layers, const int64_t* slots, const int64_t* starts, const int64_t* ends,
                     const float* cosines, const float* sines, float* x) {
    try {
        af3::run_step(*kLevels[level],
                      {layers, slots, starts, ends, cosines, sines, x, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4],
                       sizes[5], sizes[6], threads, af3::Weights(sizes[7]), sizes[8], af3::DType(sizes[9]), epsilon,
                       ptrdiff_t(head_stride)});
        return kOk;
    } catch (const std::bad_alloc&) {
        return kOutOfMemory;
    }
}
