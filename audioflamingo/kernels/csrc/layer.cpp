#include "layer.h"

#include <cstring>

#include "buffer.h"
#include "parallel.h"

namespace af3 {
namespace {

constexpr int kTileColumns = 2048;                // inputs of a panel: four blocks of it stay in a core's cache
constexpr int kPartRows = 240;                    // rows of a work item: their sums stay in a core's cache
constexpr int kWalkRows = 128;                    // up to here, expanding int4 blocks costs more than it saves
constexpr size_t kDecodeChunk = size_t(1) << 19;  // bytes of each of the two streams of a decode item

void quantize_rows(const Kernels& kernels, const Layer& layer, const QuantizedRows& rows) {
    auto quantize = [&](int64_t row, int) {
        int8_t* values = rows.values + row * rows.stride;
        const auto* x = static_cast<const uint8_t*>(layer.x) + size_t(row) * layer.columns * layer.element_bytes();
        int32_t* sums = rows.group_sums + row * layer.num_groups();
        const int group = layer.group ? layer.group : layer.columns;
        rows.scales[row] = kernels.quantize_row(x, layer.dtype, layer.columns, group, values, sums);
        memset(values + layer.columns, 0, size_t(rows.stride - layer.columns));
        rows.sums[row] = 0;
        for (int g = 0; g < layer.num_groups(); ++g) rows.sums[row] += sums[g];
    };
    parallel_for(layer.rows < 8 ? 1 : layer.threads, layer.rows, quantize);
}

// Turns the sums of `blocks` blocks from `block` on, of one row, into outputs.
void finish_row(const Kernels& kernels, const Layer& layer, const QuantizedRows& rows, int row, int block, int blocks,
                const int32_t* sums) {
    const int first = block * kBlockRows;
    const int end = first + blocks * kBlockRows;
    const int count = (end < layer.outputs ? end : layer.outputs) - first;
    auto* out = static_cast<uint8_t*>(layer.out) + (size_t(row) * layer.outputs + first) * layer.element_bytes();
    kernels.finish(sums, count, rows.scales[row], layer.scales + first, layer.bias ? layer.bias + first : nullptr,
                   out, layer.dtype);
}

// A thread walks two far-apart runs of blocks at once: two streams keep the memory busier than one.
void decode(const Kernels& kernels, const Layer& layer, const QuantizedRows& quantized) {
    const int num_blocks = layer.num_blocks();
    const int half = ceil_div(num_blocks, 2);
    const size_t width = layer.block_bytes();
    const int fair = half / (4 * layer.threads) + 1;  // several items a thread, so that none waits long for another
    const int run = int(kDecodeChunk / width) < fair ? int(kDecodeChunk / width) + 1 : fair;
    auto walk = [&](int64_t item, int) {
        const int end = int(item + 1) * run < half ? int(item + 1) * run : half;
        for (int block = int(item) * run; block < end; ++block) {
            const uint8_t* blocks[2] = {layer.packed + block * width, layer.packed + (block + half) * width};
            const int count = block + half < num_blocks ? 2 : 1;
            int32_t sums[2][kMaxDecodeRows][kBlockRows];
            for (int row = 0; row < layer.rows; row += kMaxDecodeRows) {
                const int rows = layer.rows - row < kMaxDecodeRows ? layer.rows - row : kMaxDecodeRows;
                const Activations x = {quantized.values + row * quantized.stride, quantized.stride,
                                       quantized.group_sums + row * layer.num_groups(), layer.num_groups()};
                if (layer.group) {
                    kernels.decode_int4(blocks, count, x, rows, layer.group, sums);
                } else {
                    kernels.decode_int8(blocks, count, x, rows, ceil_div(layer.columns, 4), sums);
                }
                for (int b = 0; b < count; ++b) {
                    for (int r = 0; r < rows; ++r) {
                        if (!layer.group) {
                            const uint32_t offset = uint32_t(kernels.weight_offset * quantized.sums[row + r]);
                            for (int32_t& sum : sums[b][r]) sum = int32_t(uint32_t(sum) - offset);
                        }
                        finish_row(kernels, layer, quantized, row + r, block + b * half, 1, sums[b][r]);
                    }
                }
            }
        }
    };
    parallel_for(layer.threads, ceil_div(half, run), walk);
}

// The int8 form of inputs first..first + columns of four blocks at most: in place, or expanded into `scratch`.
void prepare_panels(const Kernels& kernels, const Layer& layer, int block, int blocks, int first, int columns,
                    uint8_t* scratch, const uint8_t** panels) {
    for (int b = 0; b < blocks; ++b) {
        const uint8_t* packed = layer.packed + (block + b) * layer.block_bytes();
        if (!layer.group) {
            panels[b] = packed + size_t(first) * kBlockRows;
            continue;
        }
        uint8_t* panel = scratch + size_t(b) * kTileColumns * kBlockRows;
        const int group = first / layer.group;
        const uint8_t* nibbles = packed + scale_bytes(layer.num_groups()) + size_t(first) * kBlockRows / 2;
        kernels.expand(packed + size_t(group) * kBlockRows, nibbles, columns / layer.group, layer.group, panel);
        panels[b] = panel;
    }
}

// Four blocks times a part of the rows: K runs in panels that stay in cache while all rows pass over them.
void multiply_part(const Kernels& kernels, const Layer& layer, const QuantizedRows& quantized, int block, int blocks,
                   int first_row, int rows, uint8_t* scratch, int32_t* sums) {
    const int ld = blocks * kBlockRows;
    for (int r = 0; r < rows; ++r) {
        const int32_t start = -kernels.weight_offset * quantized.sums[first_row + r];
        for (int i = 0; i < ld; ++i) sums[r * ld + i] = start;
    }
    for (int first = 0; first < layer.columns; first += kTileColumns) {
        const int columns = layer.columns - first < kTileColumns ? layer.columns - first : kTileColumns;
        const uint8_t* panels[kMaxTileBlocks];
        prepare_panels(kernels, layer, block, blocks, first, columns, scratch, panels);
        for (int r = 0; r < rows; r += kernels.tile_rows) {
            const int tile = rows - r < kernels.tile_rows ? rows - r : kernels.tile_rows;
            kernels.multiply(panels, blocks, quantized.values + (first_row + r) * quantized.stride + first,
                             quantized.stride, tile, ceil_div(columns, 4), sums + r * ld, ld);
        }
    }
    for (int r = 0; r < rows; ++r) {
        finish_row(kernels, layer, quantized, first_row + r, block, blocks, sums + r * ld);
    }
}

void prefill(const Kernels& kernels, const Layer& layer, const QuantizedRows& quantized) {
    const int tiles = ceil_div(layer.num_blocks(), kMaxTileBlocks);
    const int parts = ceil_div(layer.rows, kPartRows);
    const int part_rows = ceil_div(ceil_div(layer.rows, parts), kernels.tile_rows) * kernels.tile_rows;
    const size_t panel_bytes = layer.group ? size_t(kMaxTileBlocks) * kBlockRows * kTileColumns : 0;
    const size_t tile_sums = size_t(part_rows) * kMaxTileBlocks * kBlockRows;
    const Buffer<uint8_t> panels(panel_bytes * layer.threads);
    const Buffer<int32_t> sums(tile_sums * layer.threads);
    parallel_for(layer.threads, int64_t(tiles) * parts, [&](int64_t item, int slot) {
        const int block = int(item / parts) * kMaxTileBlocks;
        const int blocks = layer.num_blocks() - block < kMaxTileBlocks ? layer.num_blocks() - block : kMaxTileBlocks;
        const int row = int(item % parts) * part_rows;
        const int rows = layer.rows - row < part_rows ? layer.rows - row : part_rows;
        if (rows <= 0) return;
        multiply_part(kernels, layer, quantized, block, blocks, row, rows, panels.get() + panel_bytes * slot,
                      sums.get() + tile_sums * slot);
    });
}

}  // namespace

void run_layer(const Kernels& kernels, const Layer& layer) {
    // One line more than K needs: rows that lie a multiple of 4096 bytes apart would evict each other.
    const ptrdiff_t stride = (ceil_div(layer.columns, kLine) + 1) * ptrdiff_t(kLine);
    const Buffer<int8_t> values(size_t(stride) * layer.rows);
    const Buffer<float> scales(layer.rows);
    const Buffer<int32_t> sums(layer.rows);
    const Buffer<int32_t> group_sums(size_t(layer.rows) * layer.num_groups());
    const QuantizedRows rows = {values.get(), stride, scales.get(), sums.get(), group_sums.get()};
    quantize_rows(kernels, layer, rows);
    if (layer.rows <= kWalkRows) {
        decode(kernels, layer, rows);
    } else {
        prefill(kernels, layer, rows);
    }
}

}  // namespace af3
