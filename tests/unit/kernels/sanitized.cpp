// Runs the kernels on random shapes with buffers of the exact size, at odd addresses, on every level of this
// processor; the sanitizers that it is built with end it at the first byte read or written outside. Also: each level
// gives the bits of the plainest.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include <sys/mman.h>

extern "C" {
int af3_best_level();
int af3_linear(int level, int threads, int dtype, int group, int rows, int outputs, int columns, const void* x,
               const uint8_t* packed, const float* scales, const float* bias, void* out);
void af3_linear_bf16(int level, int threads, int rows, int outputs, int columns, const uint16_t* x,
                     const uint16_t* weight, const uint16_t* bias, uint16_t* out);
int af3_attention(int level, int threads, int dtype, int is_causal, float scale, const int* sizes,
                  const int64_t* strides, const int32_t* offsets, const int32_t* starts, const int32_t* ends,
                  const void* query, const void* keys, const void* values, void* out);
int af3_step(int level, int threads, float epsilon, int64_t head_stride, const int* sizes,
             const void* const* layers, const int64_t* slots, const int64_t* starts, const int64_t* ends,
             const float* cosines, const float* sines, float* x);
void af3_linear_half(int level, int threads, int rows, int outputs, int columns, const float* x,
                     const uint16_t* weight, const float* bias, float* out);
}

static uint32_t state = 1;

static int draw(int low, int high) {
    state = state * 1664525u + 1013904223u;
    return low + int((state >> 8) % uint32_t(high - low + 1));
}

// Exactly `size` bytes on the heap, `offset` bytes past an aligned address.
struct Bytes {
    explicit Bytes(size_t size, size_t offset = 0)
        : block(static_cast<uint8_t*>(malloc(size + offset))), data(block + offset), size(size) {}
    ~Bytes() { free(block); }
    Bytes(const Bytes&) = delete;
    uint8_t* block;
    uint8_t* data;
    size_t size;
};

// `size` bytes that end where an unreadable page starts: the address sanitizer does not see masked vector loads.
struct GuardedBytes {
    static constexpr size_t kPage = 4096;
    explicit GuardedBytes(size_t size) : size(size), span((size + kPage - 1) / kPage * kPage) {
        void* pages = mmap(nullptr, span + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        block = static_cast<uint8_t*>(pages);
        if (pages == MAP_FAILED || mprotect(block + span, kPage, PROT_NONE)) abort();
        data = block + span - size;
    }
    ~GuardedBytes() { munmap(block, span + kPage); }
    GuardedBytes(const GuardedBytes&) = delete;
    uint8_t *block, *data;
    size_t size, span;
};

template <class Memory>
static void fill_floats(Memory& bytes, int dtype) {
    for (size_t i = 0; i < bytes.size / (dtype ? 2 : 4); ++i) {
        const float value = float(draw(-1000, 1000)) / 37.0f;
        uint32_t bits;
        memcpy(&bits, &value, 4);
        if (dtype) bits >>= 16;
        memcpy(bytes.data + i * (dtype ? 2 : 4), &bits, dtype ? 2 : 4);
    }
}

template <class Memory>
static void fill_packed(Memory& bytes, int group, int blocks, int columns) {
    const size_t width = bytes.size / blocks;
    for (size_t i = 0; i < bytes.size; ++i) {
        const bool is_scale = group && i % width < size_t(columns / group) * 16;
        bytes.data[i] = uint8_t(is_scale ? draw(0, 15) : group ? draw(0, 255) : draw(1, 255));
    }
}

static int quantized(int best) {
    const int groups[] = {0, 32, 64, 128};
    const int group = groups[draw(0, 3)], dtype = draw(0, 1), threads = draw(1, 3);
    const int columns = group ? group * draw(1, 40) : draw(1, 2500);
    const int rows = draw(0, 3) ? draw(1, 20) : draw(129, 150), outputs = draw(1, 150);
    const int blocks = (outputs + 15) / 16, groups_of_row = group ? columns / group : 0;
    const size_t width = group ? size_t((groups_of_row * 16 + 63) / 64) * 64 + size_t(columns) * 8
                               : size_t((columns + 3) / 4) * 64;
    const size_t element = dtype ? 2 : 4;
    Bytes x(size_t(rows) * columns * element), packed(blocks * width, size_t(draw(0, 7)));
    Bytes scales(size_t(outputs) * 4), bias(size_t(outputs) * 4), expected(size_t(rows) * outputs * element);
    fill_floats(x, dtype), fill_floats(scales, 0), fill_floats(bias, 0);
    fill_packed(packed, group, blocks, columns);
    const auto* shift = draw(0, 1) ? reinterpret_cast<const float*>(bias.data) : nullptr;
    for (int level = 0; level <= best; ++level) {
        Bytes out(expected.size);
        memset(out.data, 0xa5, out.size);
        if (af3_linear(level, threads, dtype, group, rows, outputs, columns, x.data, packed.data,
                       reinterpret_cast<const float*>(scales.data), shift, out.data)) {
            return printf("level %d reports that memory ran out\n", level);
        }
        if (level == 0) memcpy(expected.data, out.data, out.size);
        if (memcmp(out.data, expected.data, out.size)) {
            return printf("level %d differs: group %d, dtype %d, %d rows, %d x %d\n", level, group, dtype, rows,
                          outputs, columns);
        }
    }
    return 0;
}

static void bfloat16(int best) {
    const int rows = draw(1, 16), outputs = draw(1, 70), columns = draw(1, 300);
    GuardedBytes x(size_t(rows) * columns * 2), weight(size_t(outputs) * columns * 2), bias(size_t(outputs) * 2);
    fill_floats(x, 1), fill_floats(weight, 1), fill_floats(bias, 1);
    for (int level = 1; level <= best; ++level) {
        Bytes out(size_t(rows) * outputs * 2);
        af3_linear_bf16(level, draw(1, 3), rows, outputs, columns, reinterpret_cast<uint16_t*>(x.data),
                        reinterpret_cast<uint16_t*>(weight.data),
                        draw(0, 1) ? reinterpret_cast<uint16_t*>(bias.data) : nullptr,
                        reinterpret_cast<uint16_t*>(out.data));
    }
}

// Two rows of unequal length, the second with a past, in a store of exactly so many slots.
static int attention(int best) {
    const int dtype = draw(0, 1), is_causal = draw(0, 1), key_heads = draw(1, 3), dims = draw(1, 70);
    const int heads = key_heads * draw(1, 4), first = draw(1, 40), second = draw(1, 300), past = draw(0, 30);
    const int tokens = first + second, slots = tokens + past, sizes[] = {2, heads, key_heads, dims};
    const int64_t strides[] = {heads * dims, dims, dims, slots * dims, key_heads * dims, dims};
    const int32_t offsets[] = {0, first, tokens}, starts[] = {second + past, 0}, ends[] = {first, second + past};
    const size_t element = dtype ? 2 : 4, stored = size_t(slots) * key_heads * dims * element;
    GuardedBytes query(size_t(tokens) * heads * dims * element), keys(stored), values(stored);
    fill_floats(query, dtype), fill_floats(keys, dtype), fill_floats(values, dtype);
    for (int level = 0; level <= best; ++level) {
        Bytes out(query.size);
        if (af3_attention(level, draw(1, 3), dtype, is_causal, 0.1f, sizes, strides, offsets, starts, ends, query.data,
                          keys.data, values.data, out.data)) {
            return printf("level %d reports that memory ran out\n", level);
        }
    }
    return 0;
}

static size_t packed_bytes(int outputs, int columns, int group) {
    const size_t scales = (size_t(columns) / (group ? group : columns) * 16 + 63) / 64 * 64;
    return size_t(outputs + 15) / 16 * (group ? scales + size_t(columns) * 8 : size_t(columns) * 16);
}

// Two layers; every weight in memory of its own, so that none is read past its end.
static int step(int best) {
    const int kind = draw(0, 2), group = kind == 2 ? 32 * draw(0, 1) : 0, dtype = kind == 2 ? draw(0, 1) : 0;
    const int rows = draw(1, 16), key_heads = draw(1, 2), heads = key_heads * draw(1, 3), dims = 64, past = draw(0, 20);
    const int width = 32 * draw(1, 4), inner = 32 * draw(1, 4), q = heads * dims, k = key_heads * dims;
    const int sizes[] = {2, rows, width, heads, key_heads, dims, inner, kind, group, dtype};
    const int shapes[7][2] = {{q, width}, {k, width}, {k, width}, {width, q}, {inner, width}, {inner, width}, {width, inner}};
    const size_t slots = size_t(rows) * (past + 1), element = dtype ? 2 : 4;
    const size_t others[] = {q * element, k * element, k * element, width * element, width * element,
                             k * slots * element, k * slots * element};
    std::vector<std::unique_ptr<GuardedBytes>> memory;
    std::vector<const void*> layers;
    auto add = [&](size_t bytes) -> GuardedBytes& {
        memory.push_back(std::make_unique<GuardedBytes>(bytes));
        layers.push_back(memory.back()->data);
        return *memory.back();
    };
    for (int layer = 0; layer < 2; ++layer) {
        for (const auto& shape : shapes) {
            if (kind == 2) {
                fill_packed(add(packed_bytes(shape[0], shape[1], group)), group, (shape[0] + 15) / 16, shape[1]);
                fill_floats(add(size_t(shape[0]) * 4), 0);
            } else {
                fill_floats(add(size_t(shape[0]) * shape[1] * (kind ? 2 : 4)), kind);
                layers.push_back(nullptr);
            }
            if (kind == 2 && draw(0, 1)) {
                fill_floats(add(shape[1] * element), dtype);
            } else {
                layers.push_back(nullptr);
            }
        }
        for (const size_t bytes : others) fill_floats(add(bytes), dtype);
    }
    int64_t slot[16], start[16], end[16];
    for (int r = 0; r < rows; ++r) start[r] = r * (past + 1), end[r] = past + 1, slot[r] = start[r] + past;
    GuardedBytes turns(size_t(rows) * dims * 4), x(size_t(rows) * width * 4);
    fill_floats(turns, 0);
    int failed = 0;
    for (int level = 1; level <= best; ++level) {
        fill_floats(x, 0);
        failed |= af3_step(level, draw(1, 3), 1e-6f, int64_t(slots) * dims, sizes, layers.data(), slot, start, end,
                           reinterpret_cast<float*>(turns.data), reinterpret_cast<float*>(turns.data),
                           reinterpret_cast<float*>(x.data));
        GuardedBytes weight(size_t(inner) * width * 2), out(size_t(rows) * inner * 4);
        fill_floats(weight, 1);
        af3_linear_half(level, draw(1, 3), rows, inner, width, reinterpret_cast<float*>(x.data),
                        reinterpret_cast<uint16_t*>(weight.data), nullptr, reinterpret_cast<float*>(out.data));
    }
    return failed ? printf("a step reports that memory ran out\n") : 0;
}

int main() {
    const int best = af3_best_level();
    for (int i = 0; i < 40; ++i) {
        if (quantized(best)) return 1;
        bfloat16(best);
        if (attention(best) || step(best)) return 1;
    }
    printf("levels 0 to %d\n", best);
}
