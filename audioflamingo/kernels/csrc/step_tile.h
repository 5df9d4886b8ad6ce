// The inner loops of a decode step in float32, written once as those of attention_tile.h, which comes before. Beside its
// macros: AF3_LOAD_HALF(from) and AF3_LOAD_BF16(from), a register of floats from float16 and from bfloat16.
//
// Every row has its own sums, filled in the order of the inputs: a result does not depend on the rows beside it.

// float, bfloat16 or float16
AF3_TARGET AF3_INLINE Floats load_wide(const float* from) { return load_floats(from); }
AF3_TARGET AF3_INLINE Floats load_wide(const Half* from) { return AF3_LOAD_HALF(&from->bits); }
AF3_TARGET AF3_INLINE Floats load_wide(const uint16_t* from) { return AF3_LOAD_BF16(from); }

AF3_TARGET AF3_INLINE float sum_lanes(Floats values) {
    float sum = 0.0f;
    for (int i = 0; i < AF3_LANES; ++i) sum += values[i];
    return sum;
}

template <int R, class Weight>
AF3_TARGET void product_tile(const Weight* weights, int outputs, const float* x, ptrdiff_t columns, float* out,
                             ptrdiff_t ld) {
    for (int o = 0; o < outputs; ++o, weights += columns) {
        Floats even[R] = {}, odd[R] = {};
        for (ptrdiff_t k = 0; k < columns; k += 2 * AF3_LANES) {
            __builtin_prefetch(reinterpret_cast<const char*>(weights + k) + kPrefetchBytes);
            const Floats first = load_wide(weights + k), second = load_wide(weights + k + AF3_LANES);
            AF3_UNROLL for (int r = 0; r < R; ++r) {
                even[r] = AF3_FMA(first, load_floats(x + r * columns + k), even[r]);
                odd[r] = AF3_FMA(second, load_floats(x + r * columns + k + AF3_LANES), odd[r]);
            }
        }
        AF3_UNROLL for (int r = 0; r < R; ++r) out[r * ld + o] = sum_lanes(even[r] + odd[r]);
    }
}

template <class Weight>
void product_as(const Weight* weights, int outputs, const float* x, int rows, int columns, float* out, ptrdiff_t ld) {
    constexpr decltype(&product_tile<1, Weight>) tiles[] = {product_tile<1, Weight>, product_tile<2, Weight>,
                                                            product_tile<3, Weight>, product_tile<4, Weight>};
    for (int r = 0; r < rows; r += 4) {
        tiles[(rows - r < 4 ? rows - r : 4) - 1](weights, outputs, x + ptrdiff_t(r) * columns, columns, out + r * ld, ld);
    }
}

void product(const void* weights, bool is_half, int outputs, const float* x, int rows, int columns, float* out,
             ptrdiff_t ld) {
    if (is_half) {
        product_as(static_cast<const Half*>(weights), outputs, x, rows, columns, out, ld);
    } else {
        product_as(static_cast<const float*>(weights), outputs, x, rows, columns, out, ld);
    }
}

AF3_TARGET void norm(const float* x, const float* weight, float epsilon, int width, float* out) {
    Floats squares = AF3_SPLAT(0.0f);
    for (int i = 0; i < width; i += AF3_LANES) squares = AF3_FMA(load_floats(x + i), load_floats(x + i), squares);
    const Floats scale = AF3_SPLAT(1.0f / __builtin_sqrtf(sum_lanes(squares) / float(width) + epsilon));
    for (int i = 0; i < width; i += AF3_LANES) {
        save_floats(out + i, load_floats(weight + i) * (load_floats(x + i) * scale));
    }
}

// gate[i] = silu(gate[i]) * up[i]
AF3_TARGET void swiglu(float* gate, const float* up, int width) {
    const Floats one = AF3_SPLAT(1.0f);
    for (int i = 0; i < width; i += AF3_LANES) {
        const Floats x = load_floats(gate + i);
        const Floats size = x < AF3_SPLAT(0.0f) ? -x : x;
        const Floats small = power_of_two(size * AF3_SPLAT(-1.44269504f));  // exp(-|x|)
        const Floats above = x < AF3_SPLAT(0.0f) ? small : one;
        save_floats(gate + i, x * above / (one + small) * load_floats(up + i));
    }
}

// A query's answer from the keys of one head, which lie one behind the other. `scores` holds num_keys, filled up to
// whole registers.
template <class Key>
AF3_TARGET void look_at(const float* query, const Key* keys, const Key* values, int num_keys, int head_dim, float scale,
                        float* scores, float* out) {
    float most = kLowest;
    for (ptrdiff_t k = 0; k < num_keys; ++k) {
        Floats sum = AF3_SPLAT(0.0f);
        for (int e = 0; e < head_dim; e += AF3_LANES) {
            sum = AF3_FMA(load_floats(query + e), load_wide(keys + k * head_dim + e), sum);
        }
        scores[k] = sum_lanes(sum) * scale;
        most = scores[k] > most ? scores[k] : most;
    }
    const int used = (num_keys + AF3_LANES - 1) / AF3_LANES * AF3_LANES;
    for (int k = num_keys; k < used; ++k) scores[k] = kLowest;
    Floats total = AF3_SPLAT(0.0f);
    for (int k = 0; k < used; k += AF3_LANES) {
        const Floats weight = power_of_two(load_floats(scores + k) - AF3_SPLAT(most));
        total += weight;
        save_floats(scores + k, weight);
    }
    const Floats share = AF3_SPLAT(1.0f / sum_lanes(total));
    constexpr int kRegisters = 4;
    for (int d = 0; d < head_dim; d += kRegisters * AF3_LANES) {
        Floats sums[kRegisters] = {};
        for (ptrdiff_t k = 0; k < num_keys; ++k) {
            const Floats weight = AF3_SPLAT(scores[k]);
            AF3_UNROLL for (int i = 0; i < kRegisters; ++i) {
                sums[i] = AF3_FMA(weight, load_wide(values + k * head_dim + d + i * AF3_LANES), sums[i]);
            }
        }
        AF3_UNROLL for (int i = 0; i < kRegisters; ++i) save_floats(out + d + i * AF3_LANES, sums[i] * share);
    }
}

void look(const float* query, const void* keys, const void* values, DType dtype, int num_keys, int head_dim, float scale,
          float* scores, float* out) {
    if (dtype == kFloat32) {
        look_at(query, static_cast<const float*>(keys), static_cast<const float*>(values), num_keys, head_dim, scale,
                scores, out);
    } else if (dtype == kFloat16) {
        look_at(query, static_cast<const Half*>(keys), static_cast<const Half*>(values), num_keys, head_dim, scale,
                scores, out);
    } else {
        look_at(query, static_cast<const uint16_t*>(keys), static_cast<const uint16_t*>(values), num_keys, head_dim,
                scale, scores, out);
    }
}

constexpr StepKernels kStep = {product, norm, swiglu, look};
