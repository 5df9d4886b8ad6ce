// bfloat16 layers for a few rows: the weights, in their usual layout, are read once.

#include "layer.h"
#include "parallel.h"
#include "rows.h"

namespace af3 {

void run_bf16(const Kernels& kernels, const uint16_t* x, const uint16_t* weight, const uint16_t* bias, uint16_t* out,
              int rows, int outputs, int columns, int threads) {
    const int quarter = ceil_div(outputs, kDotOutputs);  // four far-apart weight rows are read at once
    const int run = int((size_t(1) << 16) / (size_t(columns) * 2)) + 1;
    parallel_for(threads, ceil_div(quarter, run), [&](int64_t item, int) {
        const int end = int(item + 1) * run < quarter ? int(item + 1) * run : quarter;
        for (int first = int(item) * run; first < end; ++first) {
            const uint16_t* weights[kDotOutputs];
            int count = 0;
            for (int o = first; o < outputs; o += quarter) weights[count++] = weight + size_t(o) * columns;
            float sums[kDotOutputs * kMaxDotRows];
            kernels.dot_bf16(weights, count, x, rows, columns, sums);
            for (int c = 0; c < count; ++c) {
                const int o = first + c * quarter;
                const float shift = bias ? widen(bias[o]) : 0.0f;
                for (int r = 0; r < rows; ++r) {
                    out[size_t(r) * outputs + o] = narrow(sums[c * kMaxDotRows + r] + shift);
                }
            }
        }
    });
}

}  // namespace af3
