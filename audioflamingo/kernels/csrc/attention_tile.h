// The inner loops of attention, written once; each instruction set includes this inside its namespace, having defined
//   AF3_TARGET       the attribute that its functions carry
//   AF3_LANES        floats of a register
//   AF3_ATTEND_ROWS  queries of a tile
//   AF3_FMA(a, b, c) a * b + c on registers
//   AF3_SPLAT(x)     a register full of x
//
// Every query has its own sums, filled in the order of the keys: a result does not depend on the queries beside it.

typedef float Floats __attribute__((vector_size(AF3_LANES * 4)));
typedef uint32_t Ints __attribute__((vector_size(AF3_LANES * 4)));
constexpr int kPanelFloats = kPanel / AF3_LANES;  // registers of a panel's line

AF3_TARGET AF3_INLINE Floats load_floats(const float* from) {
    Floats value;
    memcpy(&value, from, sizeof value);
    return value;
}

AF3_TARGET AF3_INLINE void save_floats(float* to, Floats value) { memcpy(to, &value, sizeof value); }

// 2**x for x <= 0: relative error 2e-7; 0 from -125 down, NaN stays NaN.
AF3_TARGET AF3_INLINE Floats power_of_two(Floats x) {
    const Floats shifted = x + AF3_SPLAT(12582912.0f);  // 1.5 * 2**23: the integer lies in the low bits
    const Floats rest = x - (shifted - AF3_SPLAT(12582912.0f));
    Floats value = AF3_SPLAT(kPowers[0]);
    AF3_UNROLL for (int i = 1; i < kNumPowers; ++i) value = AF3_FMA(value, rest, AF3_SPLAT(kPowers[i]));
    const Ints exponent = ((Ints)shifted << 23) + 0x3f800000u;
    return (Floats)((Ints)(value * (Floats)exponent) & ~(Ints)(x <= AF3_SPLAT(-125.0f)));
}

// Factors as single floats.
struct Singles {
    static constexpr bool kIsPairs = false;
    AF3_TARGET AF3_INLINE Floats add(Floats sum, Floats a, Floats b) { return AF3_FMA(a, b, sum); }
    AF3_TARGET AF3_INLINE void save_weights(float* to, int place, Floats weights) { save_floats(to + place, weights); }
};

// sums[r] += a[r] times the lines of a panel.
template <int R, class Factors>
AF3_TARGET AF3_INLINE void add_panel(Floats (&sums)[R][kPanelFloats], const float* a, ptrdiff_t stride,
                                     const float* panel, int lines) {
    for (ptrdiff_t line = 0; line < lines; ++line) {
        Floats b[kPanelFloats];
        AF3_UNROLL for (int i = 0; i < kPanelFloats; ++i) b[i] = load_floats(panel + line * kPanel + i * AF3_LANES);
        AF3_UNROLL for (int r = 0; r < R; ++r) {
            const Floats factor = AF3_SPLAT(a[r * stride + line]);
            AF3_UNROLL for (int i = 0; i < kPanelFloats; ++i) sums[r][i] = Factors::add(sums[r][i], factor, b[i]);
        }
    }
}

// Turns a row's scores into weights: exp2(score - most), 0 from `limit` on; returns what earlier sums are scaled by.
template <class Factors>
AF3_TARGET AF3_INLINE float weigh(const AttentionTile& tile, int row, int padded) {
    float* scores = tile.scores + row * kKeys;
    float* weights = Factors::kIsPairs ? tile.weights + row * kKeys : scores;
    const int limit = tile.limits[row];
    const int used = (limit + AF3_LANES - 1) / AF3_LANES * AF3_LANES;
    for (int k = limit; k < used; ++k) scores[k] = kLowest;
    Floats most = AF3_SPLAT(tile.most[row]);
    for (int k = 0; k < used; k += AF3_LANES) {
        const Floats score = load_floats(scores + k);
        most = score > most ? score : most;
    }
    float largest = most[0];
    for (int i = 1; i < AF3_LANES; ++i) largest = most[i] > largest ? most[i] : largest;
    Floats total = AF3_SPLAT(0.0f);
    for (int k = 0; k < used; k += AF3_LANES) {
        const Floats weight = power_of_two(load_floats(scores + k) - AF3_SPLAT(largest));
        total += weight;
        Factors::save_weights(weights, k, weight);
    }
    for (int k = used; k < padded; k += AF3_LANES) Factors::save_weights(weights, k, AF3_SPLAT(0.0f));
    float sum = 0.0f;
    for (int i = 0; i < AF3_LANES; ++i) sum += total[i];
    const Floats scale = power_of_two(AF3_SPLAT(tile.most[row] - largest));
    tile.sums[row] = tile.sums[row] * scale[0] + sum;
    tile.most[row] = largest;
    return scale[0];
}

template <int R, class Factors>
AF3_TARGET void attend_tile(const AttentionTile& tile) {
    const int panels = (tile.num_keys + kPanel - 1) / kPanel;
    for (int p = 0; p < panels; ++p) {
        Floats sums[R][kPanelFloats] = {};
        add_panel<R, Factors>(sums, tile.query, tile.query_stride, tile.keys + ptrdiff_t(p) * tile.lines * kPanel,
                              tile.lines);
        AF3_UNROLL for (int r = 0; r < R; ++r) {
            AF3_UNROLL for (int i = 0; i < kPanelFloats; ++i) {
                save_floats(tile.scores + r * kKeys + p * kPanel + i * AF3_LANES, sums[r][i] * AF3_SPLAT(tile.scale));
            }
        }
    }
    float scales[R];
    for (int r = 0; r < R; ++r) scales[r] = weigh<Factors>(tile, r, panels * kPanel);
    const float* weights = Factors::kIsPairs ? tile.weights : tile.scores;
    const int lines = Factors::kIsPairs ? (tile.num_keys + 1) / 2 : tile.num_keys;
    const int value_lines = Factors::kIsPairs ? kKeys / 2 : kKeys;
    for (int d = 0; d < tile.dim_panels; ++d) {
        float* out = tile.out + d * kPanel;
        const ptrdiff_t out_stride = ptrdiff_t(tile.dim_panels) * kPanel;
        Floats sums[R][kPanelFloats];
        AF3_UNROLL for (int r = 0; r < R; ++r) {
            AF3_UNROLL for (int i = 0; i < kPanelFloats; ++i) {
                sums[r][i] = load_floats(out + r * out_stride + i * AF3_LANES) * AF3_SPLAT(scales[r]);
            }
        }
        add_panel<R, Factors>(sums, weights, kKeys, tile.values + ptrdiff_t(d) * value_lines * kPanel, lines);
        AF3_UNROLL for (int r = 0; r < R; ++r) {
            AF3_UNROLL for (int i = 0; i < kPanelFloats; ++i) {
                save_floats(out + r * out_stride + i * AF3_LANES, sums[r][i]);
            }
        }
    }
}

template <class Factors, int... R>
void attend_rows(const AttentionTile& tile, int rows, std::integer_sequence<int, R...>) {
    static constexpr void (*tiles[])(const AttentionTile&) = {attend_tile<R + 1, Factors>...};
    tiles[rows - 1](tile);
}

using AttendRows = std::make_integer_sequence<int, AF3_ATTEND_ROWS>;
