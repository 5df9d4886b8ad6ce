#include "step.h"

#include <cstring>

#include "buffer.h"
#include "parallel.h"

namespace af3 {
namespace {

constexpr int kItemOutputs = 16;  // outputs of a work item: all rows pass over their weights in a core's cache

class StepRun {
  public:
    StepRun(const Kernels& kernels, const Step& step)
        : all_(kernels), kernels_(*kernels.step), step_(step), longest_(longest(step)),
          memory_(size_t(step.rows) * (step.width + 2 * queries() + 2 * keys() + 2 * step.inner) +
                  size_t(longest_) * step.threads) {
        normed_ = memory_.get();
        q_ = normed_ + size_t(step.rows) * step.width;
        attended_ = q_ + size_t(step.rows) * queries();
        k_ = attended_ + size_t(step.rows) * queries();
        v_ = k_ + size_t(step.rows) * keys();
        gate_ = v_ + size_t(step.rows) * keys();
        up_ = gate_ + size_t(step.rows) * step.inner;
        scores_ = up_ + size_t(step.rows) * step.inner;
    }

    void run(const StepLayer& layer) {
        norm(layer.input_norm);
        const Matrix inputs[] = {{layer.q, layer.q_bias, q_, queries()},
                                 {layer.k, layer.k_bias, k_, keys()},
                                 {layer.v, layer.v_bias, v_, keys()}};
        multiply(inputs, 3, normed_, step_.width, false);
        for (int row = 0; row < step_.rows; ++row) store(layer, row);
        attend(layer);
        const Matrix output = {layer.o, nullptr, step_.x, step_.width};
        multiply(&output, 1, attended_, queries(), true);
        norm(layer.post_norm);
        const Matrix inner[] = {{layer.gate, nullptr, gate_, step_.inner}, {layer.up, nullptr, up_, step_.inner}};
        multiply(inner, 2, normed_, step_.width, false);
        kernels_.swiglu(gate_, up_, step_.rows * step_.inner);
        const Matrix down = {layer.down, nullptr, step_.x, step_.width};
        multiply(&down, 1, gate_, step_.inner, true);
    }

  private:
    int queries() const { return step_.heads * step_.head_dim; }
    int keys() const { return step_.key_heads * step_.head_dim; }

    static int longest(const Step& step) {
        int64_t most = 0;
        for (int row = 0; row < step.rows; ++row) most = step.ends[row] > most ? step.ends[row] : most;
        return ceil_div(int(most), kPanel) * kPanel;
    }

    void norm(const float* weight) {
        for (int row = 0; row < step_.rows; ++row) {
            const size_t first = size_t(row) * step_.width;
            kernels_.norm(step_.x + first, weight, step_.epsilon, step_.width, normed_ + first);
        }
    }

    void multiply(const Matrix* matrices, int count, const float* x, int columns, bool is_added) {
        run_product(all_, matrices, count, step_.is_half, x, step_.rows, columns, is_added, step_.threads);
    }

    // Turns a row's query and key by its position, and puts key and value where later tokens look.
    void store(const StepLayer& layer, int row) {
        const size_t place = size_t(step_.slots[row]) * step_.head_dim;
        for (int head = 0; head < step_.heads; ++head) rotate(q_ + (row * step_.heads + head) * step_.head_dim, row);
        for (int head = 0; head < step_.key_heads; ++head) {
            float* key = k_ + (row * step_.key_heads + head) * step_.head_dim;
            const float* value = v_ + (row * step_.key_heads + head) * step_.head_dim;
            rotate(key, row);
            memcpy(layer.keys + head * step_.head_stride + place, key, step_.head_dim * sizeof(float));
            memcpy(layer.values + head * step_.head_stride + place, value, step_.head_dim * sizeof(float));
        }
    }

    void rotate(float* x, int row) const {
        const int half = step_.head_dim / 2;
        const float* cosines = step_.cosines + row * step_.head_dim;
        const float* sines = step_.sines + row * step_.head_dim;
        for (int e = 0; e < half; ++e) {
            const float first = x[e], second = x[e + half];
            x[e] = first * cosines[e] - second * sines[e];
            x[e + half] = second * cosines[e + half] + first * sines[e + half];
        }
    }

    void attend(const StepLayer& layer) {
        const float scale = 1.44269504f / __builtin_sqrtf(float(step_.head_dim));  // exp(x) is 2**(x log2 e)
        parallel_for(step_.threads, int64_t(step_.rows) * step_.heads, [&](int64_t item, int slot) {
            const int row = int(item) / step_.heads, head = int(item) % step_.heads;
            const size_t first = head / (step_.heads / step_.key_heads) * step_.head_stride +
                                 size_t(step_.starts[row]) * step_.head_dim;
            kernels_.look(q_ + item * step_.head_dim, layer.keys + first, layer.values + first, int(step_.ends[row]),
                          step_.head_dim, scale, scores_ + size_t(slot) * longest_,
                          attended_ + item * step_.head_dim);
        });
    }

    const Kernels& all_;
    const StepKernels& kernels_;
    const Step& step_;
    const int longest_;
    const Buffer<float> memory_;
    float *normed_, *q_, *attended_, *k_, *v_, *gate_, *up_, *scores_;
};

}  // namespace

void run_product(const Kernels& kernels, const Matrix* matrices, int count, bool is_half, const float* x, int rows,
                 int columns, bool is_added, int threads) {
    int64_t items = 0;
    for (int m = 0; m < count; ++m) items += ceil_div(matrices[m].outputs, kItemOutputs);
    parallel_for(threads, items, [&](int64_t item, int) {
        const Matrix* matrix = matrices;
        for (; item >= ceil_div(matrix->outputs, kItemOutputs); ++matrix) {
            item -= ceil_div(matrix->outputs, kItemOutputs);
        }
        const int first = int(item) * kItemOutputs;
        const int outputs = matrix->outputs - first < kItemOutputs ? matrix->outputs - first : kItemOutputs;
        const auto* weights = static_cast<const uint8_t*>(matrix->weights) +
                              size_t(first) * columns * (is_half ? sizeof(uint16_t) : sizeof(float));
        float sums[kMaxDotRows * kItemOutputs];
        kernels.step->product(weights, is_half, outputs, x, rows, columns, sums, kItemOutputs);
        for (int row = 0; row < rows; ++row) {
            float* out = matrix->out + size_t(row) * matrix->outputs + first;
            for (int o = 0; o < outputs; ++o) {
                const float sum = sums[row * kItemOutputs + o];
                out[o] = is_added ? out[o] + sum : matrix->bias ? sum + matrix->bias[first + o] : sum;
            }
        }
    });
}

void run_step(const Kernels& kernels, const Step& step) {
    StepRun run(kernels, step);
    for (int layer = 0; layer < step.num_layers; ++layer) run.run(step.layers[layer]);
}

}  // namespace af3
