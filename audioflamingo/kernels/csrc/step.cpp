#include "step.h"

#include <cstring>

#include "buffer.h"
#include "layer.h"
#include "parallel.h"
#include "rows.h"

namespace af3 {
namespace {

constexpr int kItemOutputs = 16;  // outputs of a work item: all rows pass over their weights in a core's cache

class StepRun {
  public:
    StepRun(const Kernels& kernels, const Step& step)
        : all_(kernels), kernels_(*kernels.step), step_(step), longest_(longest(step)),
          memory_(size_t(step.rows) * (2 * step.width + 2 * queries() + 2 * keys() + 2 * step.inner + widest()) +
                  size_t(longest_) * step.threads + step.width + queries() + 2 * keys()) {
        normed_ = memory_.get();
        sums_ = normed_ + size_t(step.rows) * step.width;
        q_ = sums_ + size_t(step.rows) * step.width;
        attended_ = q_ + size_t(step.rows) * queries();
        k_ = attended_ + size_t(step.rows) * queries();
        v_ = k_ + size_t(step.rows) * keys();
        gate_ = v_ + size_t(step.rows) * keys();
        up_ = gate_ + size_t(step.rows) * step.inner;
        smoothed_ = up_ + size_t(step.rows) * step.inner;
        scores_ = smoothed_ + size_t(step.rows) * widest();
        gain_ = scores_ + size_t(longest_) * step.threads;
        bias_ = gain_ + step.width;
    }

    void run(const StepLayer& layer) {
        norm(layer.input_norm);
        float *k_bias = bias_ + queries(), *v_bias = k_bias + keys();
        const Matrix inputs[] = {{layer.q, wide(layer.q_bias, queries(), bias_), q_, queries()},
                                 {layer.k, wide(layer.k_bias, keys(), k_bias), k_, keys()},
                                 {layer.v, wide(layer.v_bias, keys(), v_bias), v_, keys()}};
        multiply(inputs, 3, normed_, step_.width);
        for (int row = 0; row < step_.rows; ++row) store(layer, row);
        attend(layer);
        round_all(attended_, step_.rows * queries());
        add(layer.o, attended_, queries());
        norm(layer.post_norm);
        const Matrix inner[] = {{layer.gate, nullptr, gate_, step_.inner}, {layer.up, nullptr, up_, step_.inner}};
        multiply(inner, 2, normed_, step_.width);
        if (!is_rounded()) {
            kernels_.swiglu(gate_, up_, step_.rows * step_.inner);
        } else {
            swiglu();
        }
        add(layer.down, gate_, step_.inner);
    }

  private:
    int queries() const { return step_.heads * step_.head_dim; }
    int keys() const { return step_.key_heads * step_.head_dim; }
    int widest() const {
        const int most = step_.inner > step_.width ? step_.inner : step_.width;
        return queries() > most ? queries() : most;
    }

    static int longest(const Step& step) {
        int64_t most = 0;
        for (int row = 0; row < step.rows; ++row) most = step.ends[row] > most ? step.ends[row] : most;
        return ceil_div(int(most), kPanel) * kPanel;
    }

    const float* ones(int count) {
        for (int i = 0; i < count; ++i) smoothed_[i] = 1.0f;
        return smoothed_;
    }

    // In bfloat16 what layers hand on is rounded as they round it. Float16 has three bits more: not rounding is exact
    // enough, and quicker.
    bool is_rounded() const { return step_.dtype == kBFloat16; }
    float rounded(float value) const { return is_rounded() ? widen(narrow(value)) : value; }

    // In bfloat16: silu and its product are rounded each.
    void swiglu() {
        const int count = step_.rows * step_.inner;
        kernels_.swiglu(gate_, ones(count), count);
        for (int i = 0; i < count; ++i) gate_[i] = rounded(rounded(gate_[i]) * up_[i]);
    }

    // As floats: in place, or written to `room`.
    const float* wide(const void* values, int count, float* room) const {
        if (step_.dtype == kFloat32 || !values) return static_cast<const float*>(values);
        for (int i = 0; i < count; ++i) room[i] = at(values, i);
        return room;
    }

    float at(const void* values, int i) const {
        if (step_.dtype == kFloat32) return static_cast<const float*>(values)[i];
        return step_.dtype == kFloat16 ? widen(static_cast<const Half*>(values)[i])
                                       : widen(static_cast<const uint16_t*>(values)[i]);
    }

    void norm(const void* weight) {
        const float* gain = wide(weight, step_.width, gain_);
        for (int row = 0; row < step_.rows; ++row) {
            const size_t first = size_t(row) * step_.width;
            if (!is_rounded()) {
                kernels_.norm(step_.x + first, gain, step_.epsilon, step_.width, normed_ + first);
                continue;
            }
            kernels_.norm(step_.x + first, ones(step_.width), step_.epsilon, step_.width, normed_ + first);
            for (int i = 0; i < step_.width; ++i) normed_[first + i] = rounded(gain[i] * rounded(normed_[first + i]));
        }
    }

    // As the layers one by one, which hand on nothing but their dtype.
    void round_all(float* values, int count) const {
        if (!is_rounded()) return;
        for (int i = 0; i < count; ++i) values[i] = rounded(values[i]);
    }

    void multiply(const Matrix* matrices, int count, const float* x, int columns) {
        if (step_.kind == kPacked) {
            for (int m = 0; m < count; ++m) multiply_packed(matrices[m], x, columns);
        } else {
            run_product(all_, matrices, count, step_.kind == kHalves, x, step_.rows, columns, false, step_.threads);
        }
    }

    // Adds a product to the stream.
    void add(const StepMatrix& matrix, const float* x, int columns) {
        if (step_.kind == kPacked) {
            multiply_packed({matrix, nullptr, sums_, step_.width}, x, columns);
            for (int i = 0; i < step_.rows * step_.width; ++i) step_.x[i] += sums_[i];
            round_all(step_.x, step_.rows * step_.width);
        } else {
            const Matrix sum = {matrix, nullptr, step_.x, step_.width};
            run_product(all_, &sum, 1, step_.kind == kHalves, x, step_.rows, columns, true, step_.threads);
        }
    }

    void multiply_packed(const Matrix& matrix, const float* x, int columns) {
        const StepMatrix& stored = matrix.stored;
        if (stored.smoothing) {
            for (int row = 0; row < step_.rows; ++row) smooth(stored.smoothing, x, columns, size_t(row) * columns);
            x = smoothed_;
        }
        run_layer(all_, {x, static_cast<const uint8_t*>(stored.weights), stored.scales, matrix.bias, matrix.out,
                         kFloat32, step_.rows, matrix.outputs, columns, step_.group, step_.threads});
        round_all(matrix.out, step_.rows * matrix.outputs);
    }

    void smooth(const void* smoothing, const float* x, int columns, size_t first) {
        float* out = smoothed_ + first;
        for (int i = 0; i < columns; ++i) out[i] = x[first + i] * at(smoothing, i);
    }

    // Turns a row's query and key by its position, and puts key and value where later tokens look.
    void store(const StepLayer& layer, int row) {
        const size_t place = size_t(step_.slots[row]) * step_.head_dim;
        for (int head = 0; head < step_.heads; ++head) rotate(q_ + (row * step_.heads + head) * step_.head_dim, row);
        for (int head = 0; head < step_.key_heads; ++head) {
            float* key = k_ + (row * step_.key_heads + head) * step_.head_dim;
            rotate(key, row);
            keep(key, layer.keys, head * step_.head_stride + place);
            keep(v_ + (row * step_.key_heads + head) * step_.head_dim, layer.values, head * step_.head_stride + place);
        }
    }

    void keep(const float* from, void* to, size_t place) const {
        if (step_.dtype == kFloat32) {
            memcpy(static_cast<float*>(to) + place, from, step_.head_dim * sizeof(float));
        } else if (step_.dtype == kFloat16) {
            for (int e = 0; e < step_.head_dim; ++e) static_cast<Half*>(to)[place + e] = narrow_half(from[e]);
        } else {
            for (int e = 0; e < step_.head_dim; ++e) static_cast<uint16_t*>(to)[place + e] = narrow(from[e]);
        }
    }

    void rotate(float* x, int row) const {
        const int half = step_.head_dim / 2;
        const float* cosines = step_.cosines + row * step_.head_dim;
        const float* sines = step_.sines + row * step_.head_dim;
        for (int e = 0; e < half; ++e) {
            const float first = x[e], second = x[e + half];
            x[e] = rounded(rounded(first * cosines[e]) - rounded(second * sines[e]));
            x[e + half] = rounded(rounded(second * cosines[e + half]) + rounded(first * sines[e + half]));
        }
    }

    void attend(const StepLayer& layer) {
        const float scale = 1.44269504f / __builtin_sqrtf(float(step_.head_dim));  // exp(x) is 2**(x log2 e)
        const size_t bytes = step_.dtype == kFloat32 ? sizeof(float) : sizeof(uint16_t);
        parallel_for(step_.threads, int64_t(step_.rows) * step_.heads, [&](int64_t item, int slot) {
            const int row = int(item) / step_.heads, head = int(item) % step_.heads;
            const size_t first = head / (step_.heads / step_.key_heads) * step_.head_stride +
                                 size_t(step_.starts[row]) * step_.head_dim;
            kernels_.look(q_ + item * step_.head_dim, static_cast<const uint8_t*>(layer.keys) + first * bytes,
                          static_cast<const uint8_t*>(layer.values) + first * bytes, step_.dtype,
                          int(step_.ends[row]), step_.head_dim, scale, scores_ + size_t(slot) * longest_,
                          attended_ + item * step_.head_dim);
        });
    }

    const Kernels& all_;
    const StepKernels& kernels_;
    const Step& step_;
    const int longest_;
    const Buffer<float> memory_;
    float *normed_, *sums_, *q_, *attended_, *k_, *v_, *gate_, *up_, *smoothed_, *scores_, *gain_, *bias_;
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
        const auto* weights = static_cast<const uint8_t*>(matrix->stored.weights) +
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
