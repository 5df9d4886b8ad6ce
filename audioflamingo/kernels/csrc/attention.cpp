// Attention as work items: one row's queries of one key head, a part at a time, pass over blocks of its keys.
//
// Keys and values of a block are laid out first as the inner loops read them; a part has enough queries to make that a
// small share of the work. All heads that share a key head are queries side by side, so keys are never repeated.

#include "attention.h"

#include <vector>

#include "buffer.h"
#include "parallel.h"
#include "rows.h"

namespace af3 {
namespace {

constexpr int kTileQueries = 12;  // a multiple of every level's tile
constexpr int kPartPlaces = 168 * 128;  // of a part's queries: with their sums and a block of keys they fit half a MB
constexpr int kMaxPartQueries = 336;

struct Item {
    int row, key_head, first, count;  // queries first..first + count, counted token by token, head by head
};

// What a thread works in.
struct Scratch {
    float *query, *keys, *values, *out, *scores, *weights, *most, *sums;
};

// Elements of `T` as the tile's 32-bit places: floats, or two bfloat16 side by side.
struct Sizes {
    Sizes(const Attention& call, bool is_pairs)
        : is_pairs(is_pairs),
          lines(is_pairs ? ceil_div(call.head_dim, 2) : call.head_dim),
          dim_panels(ceil_div(call.head_dim, kPanel)) {
        const int fitting = kPartPlaces / (dim_panels * kPanel) / kTileQueries * kTileQueries;
        part = fitting < kTileQueries ? kTileQueries : fitting < kMaxPartQueries ? fitting : kMaxPartQueries;
    }
    const bool is_pairs;
    const int lines, dim_panels;
    int part;  // queries of a work item
};

template <class T>
void pack_query(const Attention& call, const Sizes& sizes, const T* from, float* to) {
    if (sizes.is_pairs) {
        to[sizes.lines - 1] = 0.0f;
        memcpy(to, from, size_t(call.head_dim) * sizeof(T));
    } else {
        for (int e = 0; e < call.head_dim; ++e) to[e] = widen(from[e]);
    }
}

// Panels of sixteen keys: [panel][dimension][key], or pairs of dimensions side by side.
template <class T>
void pack_keys(const Attention& call, const Sizes& sizes, const T* from, int count, float* to) {
    const int padded = ceil_div(count, kPanel) * kPanel;
    if (count < padded || call.head_dim % 2) memset(to, 0, size_t(padded) * sizes.lines * sizeof(float));
    for (int k = 0; k < count; ++k, from += call.key_slot) {
        float* panel = to + (size_t(k) / kPanel * sizes.lines) * kPanel + k % kPanel;
        if (sizes.is_pairs) {
            T* pairs = reinterpret_cast<T*>(panel);
            for (int e = 0; e < call.head_dim; ++e) pairs[e / 2 * 2 * kPanel + e % 2] = from[e];
        } else {
            for (int e = 0; e < call.head_dim; ++e) panel[e * kPanel] = widen(from[e]);
        }
    }
}

// Panels of sixteen dimensions: [panel][key][dimension], or pairs of keys side by side.
template <class T>
void pack_values(const Attention& call, const Sizes& sizes, const T* from, int count, float* to) {
    if (sizes.is_pairs && count % 2) {
        for (int d = 0; d < sizes.dim_panels; ++d) {
            memset(to + (size_t(d) * kKeys / 2 + count / 2) * kPanel, 0, kPanel * sizeof(float));
        }
    }
    for (int d = 0; d < sizes.dim_panels; ++d, from += kPanel, to += size_t(kKeys) / (sizes.is_pairs ? 2 : 1) * kPanel) {
        const int width = call.head_dim - d * kPanel < kPanel ? call.head_dim - d * kPanel : kPanel;
        for (int k = 0; k < count; ++k) {
            const T* line = from + k * call.value_slot;
            if (sizes.is_pairs) {
                T* pairs = reinterpret_cast<T*>(to + size_t(k / 2) * kPanel) + k % 2;
                for (int e = 0; e < width; ++e) pairs[e * 2] = line[e];
            } else if (width == kPanel) {
                for (int e = 0; e < kPanel; ++e) to[size_t(k) * kPanel + e] = widen(line[e]);
            } else {
                for (int e = 0; e < width; ++e) to[size_t(k) * kPanel + e] = widen(line[e]);
            }
        }
    }
}

template <class T>
void attend_item(const Kernels& kernels, const Attention& call, const Sizes& sizes, const Item& item,
                 const Scratch& scratch) {
    const int group = call.heads / call.key_heads;
    const int first_token = call.offsets[item.row];
    const int num_keys = call.ends[item.row];
    const int past = num_keys - (call.offsets[item.row + 1] - first_token);
    const int width = sizes.dim_panels * kPanel;
    const auto seen = [&](int query) { return call.is_causal ? past + query / group + 1 : num_keys; };
    const auto head_of = [&](int query) { return item.key_head * group + query % group; };
    for (int i = 0; i < item.count; ++i) {
        const int query = item.first + i;
        const T* from = static_cast<const T*>(call.query) + (first_token + query / group) * call.query_token +
                        head_of(query) * call.query_head;
        pack_query(call, sizes, from, scratch.query + size_t(i) * sizes.lines);
        scratch.most[i] = kLowest;
        scratch.sums[i] = 0.0f;
    }
    memset(scratch.out, 0, size_t(item.count) * width * sizeof(float));
    const T* keys = static_cast<const T*>(call.keys) + item.key_head * call.key_head;
    const T* values = static_cast<const T*>(call.values) + item.key_head * call.value_head;
    const int end = seen(item.first + item.count - 1);
    for (int first = 0; first < end; first += kKeys) {
        const int count = end - first < kKeys ? end - first : kKeys;
        const ptrdiff_t slot = call.starts[item.row] + first;
        pack_keys(call, sizes, keys + slot * call.key_slot, count, scratch.keys);
        pack_values(call, sizes, values + slot * call.value_slot, count, scratch.values);
        for (int i = 0; i < item.count; i += kernels.attend_rows) {
            const int rows = item.count - i < kernels.attend_rows ? item.count - i : kernels.attend_rows;
            int limits[kMaxAttendRows];
            for (int r = 0; r < rows; ++r) {
                const int limit = seen(item.first + i + r) - first;
                limits[r] = limit < 0 ? 0 : limit < count ? limit : count;
            }
            if (limits[rows - 1] == 0) continue;
            const AttentionTile tile = {scratch.query + size_t(i) * sizes.lines, sizes.lines, scratch.keys,
                                        scratch.values, sizes.lines, sizes.dim_panels, limits[rows - 1], limits,
                                        call.scale * 1.44269504f,  // exp(x) is 2**(x log2 e)
                                        scratch.out + size_t(i) * width, scratch.most + i, scratch.sums + i,
                                        scratch.scores, scratch.weights};
            (sizes.is_pairs ? kernels.attend_pairs : kernels.attend)(tile, rows);
        }
    }
    for (int i = 0; i < item.count; ++i) {
        const int query = item.first + i;
        T* out = static_cast<T*>(call.out) +
                 (size_t(first_token + query / group) * call.heads + head_of(query)) * call.head_dim;
        for (int e = 0; e < call.head_dim; ++e) store(scratch.out[size_t(i) * width + e] / scratch.sums[i], out + e);
    }
}

// The longest first, so that no thread is left with one at the end.
std::vector<Item> cut(const Attention& call, int most) {
    std::vector<Item> items;
    for (int row = 0; row < call.rows; ++row) {
        const int queries = (call.offsets[row + 1] - call.offsets[row]) * (call.heads / call.key_heads);
        for (int part = ceil_div(queries, most) - 1; part >= 0; --part) {
            const int first = part * most;
            const int count = queries - first < most ? queries - first : most;
            for (int head = 0; head < call.key_heads; ++head) items.push_back({row, head, first, count});
        }
    }
    return items;
}

}  // namespace

void run_attention(const Kernels& kernels, const Attention& call) {
    const Sizes sizes(call, call.dtype == kBFloat16 && kernels.attend_pairs);
    const std::vector<Item> items = cut(call, sizes.part);
    const size_t width = size_t(sizes.dim_panels) * kPanel;
    const size_t parts[] = {size_t(sizes.part) * sizes.lines, size_t(kKeys) * sizes.lines, kKeys * width,
                            sizes.part * width, size_t(kMaxAttendRows) * kKeys, size_t(kMaxAttendRows) * kKeys,
                            size_t(sizes.part), size_t(sizes.part)};
    size_t starts[9] = {};
    for (int i = 0; i < 8; ++i) starts[i + 1] = starts[i] + (parts[i] + 15) / 16 * 16;
    const Buffer<float> memory(starts[8] * call.threads);
    // Dimensions that fill up the last panel are multiplied, too, and never written.
    for (int t = 0; t < call.threads; ++t) memset(memory.get() + t * starts[8] + starts[2], 0, parts[2] * sizeof(float));
    parallel_for(call.threads, int64_t(items.size()), [&](int64_t item, int slot) {
        float* mine = memory.get() + slot * starts[8];
        const Scratch scratch = {mine, mine + starts[1], mine + starts[2], mine + starts[3], mine + starts[4],
                                 mine + starts[5], mine + starts[6], mine + starts[7]};
        if (call.dtype == kFloat32) {
            attend_item<float>(kernels, call, sizes, items[item], scratch);
        } else {
            attend_item<uint16_t>(kernels, call, sizes, items[item], scratch);
        }
    });
}

}  // namespace af3
