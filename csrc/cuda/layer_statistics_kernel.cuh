// layer_statistics on the GPU: one pass over the hiddens and grads of all layers.
//
// What:          per-sample sums of squares of h and g, and column sums of g.
// Layout:        a work unit is (layer, column tile, row split), one block each. The block's eight
//                warps form a grid of warp_rows x warp_columns; a lane owns 16 bytes of columns and
//                keeps their sums in registers while its warp walks down the rows, four at a time.
//                Row sums leave by a transposed warp shuffle.
// Accumulation:  float64, accumulate.h.
// Determinism:   the plan is a function of (rows, columns, element type) alone; partial results are
//                merged in a fixed order by finish_statistics_kernel. No atomics.
// Limits:        any row stride and alignment; samples must be dense; 64-bit offsets throughout.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../layer_table.h"
#include "elements.cuh"

namespace fadiag {

constexpr int kWarpSize = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
// Four rows of h and of g are eight independent 16-byte loads per lane in flight.
constexpr int kRowGroup = 4;
// A block's row sums wait in shared memory until all its column warps have theirs.
constexpr int kRowSlots = 512;  // rows of a unit times warp_columns
// Units of a 32nd of a layer spread even one small layer over many multiprocessors; above the
// upper bound the tail of the last wave would show, below the lower one the cost of a block.
constexpr int64_t kUnitsPerLayer = 32;
constexpr int64_t kMinUnitBytes = 16 << 10;
constexpr int64_t kMaxUnitBytes = 512 << 10;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct StatisticsPlan {
  int warp_columns;  // warps side by side; kWarps / warp_columns walk down the rows
  int rows_per_unit;
  int64_t num_tiles;
  int64_t num_splits;

  StatisticsPlan(int64_t rows, int64_t columns, int64_t element_size) {
    const int64_t lane_columns = kVectorBytes / element_size;
    const int64_t warp_width = kWarpSize * lane_columns;
    // Few rows: warps side by side, so that each still has several groups of rows to walk.
    warp_columns = rows <= 16 ? 8 : rows <= 64 ? 4 : 2;
    while (warp_columns > 1 && (warp_columns / 2) * warp_width >= columns) warp_columns /= 2;
    const int64_t tile_width = warp_columns * warp_width;
    // A layer without columns still has norms (zero) to write.
    num_tiles = std::max<int64_t>(1, ceil_div(columns, tile_width));
    const int64_t row_bytes = 2 * std::min(columns, tile_width) * element_size;
    const int64_t unit_bytes = std::clamp(2 * rows * columns * element_size / kUnitsPerLayer,
                                          kMinUnitBytes, kMaxUnitBytes);
    const int64_t step = kRowGroup * (kWarps / warp_columns);
    const int64_t wanted =
        ceil_div(std::max<int64_t>(1, unit_bytes / std::max<int64_t>(1, row_bytes)), step) * step;
    rows_per_unit = static_cast<int>(
        std::min<int64_t>({wanted, kRowSlots / warp_columns, ceil_div(rows, step) * step}));
    num_splits = rows_per_unit > 0 ? ceil_div(rows, rows_per_unit) : 0;
  }
};

// One row of the table that a kernel gets by value.
struct StatisticsEntry {
  Layer layer;
  int64_t squares_offset;  // into the workspace: [tiles, 2, rows, words]; unused for one tile
  int64_t sums_offset;     // into the workspace: [splits, words, columns]; unused for one split
  int first_unit;
  int num_tiles;
  int num_splits;
  int16_t rows_per_unit;
  int8_t warp_columns;
  int8_t aligned;  // 16-byte loads are possible in every row
};

template <int kCapacity>
struct StatisticsTable {
  StatisticsEntry entries[kCapacity];
  int count;
  int64_t rows;
  double* norms[2];  // of hiddens and of grads
  void* means;
  double* workspace;
};

// Kernel parameters end at 32,764 bytes; most calls need far fewer, and fewer launch faster.
constexpr int kSmallTable = 40;
constexpr int kLargeTable = 320;
static_assert(sizeof(StatisticsTable<kLargeTable>) <= 32764);

// Sums eight values over a warp, transposed: lane i returns the total of value i / 4.
__device__ __forceinline__ double sum_transposed(double (&v)[8], int lane) {
#pragma unroll
  for (int half = 4; half >= 1; half /= 2) {
    const int offset = half * 4;
    const bool upper = lane & offset;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const double send = upper ? v[i] : v[i + half];
      const double keep = upper ? v[i + half] : v[i];
      v[i] = keep + __shfl_xor_sync(0xffffffffu, send, offset);
    }
  }
  double total = v[0];
  total += __shfl_xor_sync(0xffffffffu, total, 2);
  total += __shfl_xor_sync(0xffffffffu, total, 1);
  return total;
}

template <typename Sums>
__device__ __forceinline__ void write_mean(void* means, int64_t index,
                                           const double (&words)[Sums::kColumnWords],
                                           int64_t rows) {
  const double mean = Sums::mean(words, static_cast<double>(rows));
  if constexpr (Sums::kColumnWords == WideSums::kColumnWords) {
    static_cast<double*>(means)[index] = mean;
  } else {
    static_cast<float*>(means)[index] = static_cast<float>(mean);
  }
}

template <int kCapacity>
__device__ __forceinline__ int find_entry(const StatisticsTable<kCapacity>& table, int unit) {
  int low = 0;
  int high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.entries[middle].first_unit <= unit) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

template <typename Element, int kCapacity>
__global__ void __launch_bounds__(kThreads, 2)
    layer_statistics_kernel(const __grid_constant__ StatisticsTable<kCapacity> table) {
  using Sums = typename ElementTraits<Element>::Sums;
  constexpr int kWords = Sums::kSquareWords;
  constexpr int kColumnWords = Sums::kColumnWords;
  constexpr int kSize = Vector<Element>::kSize;
  constexpr int kWarpWidth = kSize * kWarpSize;

  // Row sums first, column sums after them: the two never live at the same time.
  constexpr int kRowDoubles = 2 * kRowSlots * kWords;
  constexpr int kColumnDoubles = kWarps * kWarpWidth * kColumnWords;
  __shared__ double shared[kRowDoubles > kColumnDoubles ? kRowDoubles : kColumnDoubles];

  const StatisticsEntry& entry = table.entries[find_entry(table, blockIdx.x)];
  const Layer& layer = entry.layer;
  const int unit = blockIdx.x - entry.first_unit;
  const int64_t tile = unit % entry.num_tiles;
  const int64_t split = unit / entry.num_tiles;
  const int64_t rows = table.rows;
  const int64_t row_begin = split * entry.rows_per_unit;
  const int unit_rows = static_cast<int>(
      rows - row_begin < entry.rows_per_unit ? rows - row_begin : entry.rows_per_unit);

  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int warp_columns = entry.warp_columns;
  const int warp_rows = kWarps / warp_columns;
  const int warp_column = warp % warp_columns;
  const int warp_row = warp / warp_columns;
  const int tile_width = warp_columns * kWarpWidth;
  const int64_t tile_begin = tile * tile_width;
  const int64_t column = tile_begin + warp_column * kWarpWidth + lane * kSize;
  const int64_t left = layer.columns - column;
  const int valid = left >= kSize ? kSize : left > 0 ? static_cast<int>(left) : 0;
  const bool aligned = entry.aligned;
  const auto* hidden = static_cast<const Element*>(layer.hidden) + column;
  const auto* grad = static_cast<const Element*>(layer.grad) + column;

  double column_sums[kColumnWords][kSize] = {};
  for (int group = warp_row; group * kRowGroup < unit_rows; group += warp_rows) {
    const int first_row = group * kRowGroup;
    Vector<Element> h[kRowGroup];
    Vector<Element> g[kRowGroup];
#pragma unroll
    for (int i = 0; i < kRowGroup; ++i) {
      const int64_t row = row_begin + first_row + i;
      const int count = first_row + i < unit_rows ? valid : 0;
      h[i].load(hidden + row * layer.hidden_row_stride, count, aligned);
      g[i].load(grad + row * layer.grad_row_stride, count, aligned);
    }
    double squares[kWords][2 * kRowGroup] = {};
#pragma unroll
    for (int i = 0; i < kRowGroup; ++i) {
      double h_words[kWords] = {};
      double g_words[kWords] = {};
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        Sums::add_square(h_words, h[i][e]);
        const double x = g[i][e];
        Sums::add_square(g_words, x);
        double words[kColumnWords];
#pragma unroll
        for (int w = 0; w < kColumnWords; ++w) words[w] = column_sums[w][e];
        Sums::add_column(words, x);
#pragma unroll
        for (int w = 0; w < kColumnWords; ++w) column_sums[w][e] = words[w];
      }
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        squares[w][i] = h_words[w];
        squares[w][kRowGroup + i] = g_words[w];
      }
    }
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const double total = sum_transposed(squares[w], lane);
      const int which = lane / 16;
      const int row = first_row + lane / 4 % 4;
      // [which, row, word, warp column]
      if (lane % 4 == 0 && row < unit_rows) {
        shared[((which * entry.rows_per_unit + row) * kWords + w) * warp_columns + warp_column] =
            total;
      }
    }
  }
  __syncthreads();

  for (int i = threadIdx.x; i < 2 * unit_rows; i += kThreads) {
    const int which = i / unit_rows;
    const int row = i % unit_rows;
    double words[kWords];
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const double* slots =
          shared + ((which * entry.rows_per_unit + row) * kWords + w) * warp_columns;
      double total = slots[0];
      for (int c = 1; c < warp_columns; ++c) total += slots[c];
      words[w] = total;
    }
    if (entry.num_tiles == 1) {
      table.norms[which][layer.norm_offset + row_begin + row] = Sums::norm(words);
    } else {
      double* target = table.workspace + entry.squares_offset +
                       ((tile * 2 + which) * rows + row_begin + row) * kWords;
#pragma unroll
      for (int w = 0; w < kWords; ++w) target[w] = words[w];
    }
  }
  __syncthreads();

  // [warp row, word, tile column]
#pragma unroll
  for (int w = 0; w < kColumnWords; ++w) {
    double* target = shared + (warp_row * kColumnWords + w) * tile_width +
                     warp_column * kWarpWidth + lane * kSize;
#pragma unroll
    for (int e = 0; e < kSize; ++e) target[e] = column_sums[w][e];
  }
  __syncthreads();
  for (int c = threadIdx.x; c < tile_width && tile_begin + c < layer.columns; c += kThreads) {
    double words[kColumnWords];
#pragma unroll
    for (int w = 0; w < kColumnWords; ++w) {
      double total = shared[w * tile_width + c];
      for (int r = 1; r < warp_rows; ++r) {
        total += shared[(r * kColumnWords + w) * tile_width + c];
      }
      words[w] = total;
    }
    if (entry.num_splits == 1) {
      write_mean<Sums>(table.means, layer.mean_offset + tile_begin + c, words, rows);
    } else {
#pragma unroll
      for (int w = 0; w < kColumnWords; ++w) {
        table.workspace[entry.sums_offset + (split * kColumnWords + w) * layer.columns +
                        tile_begin + c] = words[w];
      }
    }
  }
}

constexpr int kFinishWarps = 16;
constexpr int kFinishThreads = kFinishWarps * kWarpSize;

// Blocks that an entry needs to merge its partial results: of rows, then of columns.
FADIAG_HOST_DEVICE int64_t finish_row_blocks(const StatisticsEntry& entry, int64_t rows) {
  return entry.num_tiles > 1 ? (2 * rows + kWarpSize - 1) / kWarpSize : 0;
}
FADIAG_HOST_DEVICE int64_t finish_column_blocks(const StatisticsEntry& entry) {
  return entry.num_splits > 1 ? (entry.layer.columns + kFinishThreads - 1) / kFinishThreads : 0;
}

// Merges the partial results of all tiles of a row, and of all splits of a column. Block (x, y)
// does its share x of layer y.
template <typename Sums, int kCapacity>
__global__ void __launch_bounds__(kFinishThreads)
    finish_statistics_kernel(const __grid_constant__ StatisticsTable<kCapacity> table) {
  constexpr int kWords = Sums::kSquareWords;
  constexpr int kColumnWords = Sums::kColumnWords;
  __shared__ double shared[kFinishWarps][kWords][kWarpSize];
  const StatisticsEntry& entry = table.entries[blockIdx.y];
  const Layer& layer = entry.layer;
  const int64_t rows = table.rows;
  const int64_t row_blocks = finish_row_blocks(entry, rows);
  int64_t block = blockIdx.x;

  if (block < row_blocks) {
    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;
    const int64_t value = block * kWarpSize + lane;  // which * rows + row
    double words[kWords] = {};
    if (value < 2 * rows) {
      const double* partial = table.workspace + entry.squares_offset + value * kWords;
      const int64_t stride = 2 * rows * kWords;
#pragma unroll 8
      for (int64_t tile = warp; tile < entry.num_tiles; tile += kFinishWarps) {
#pragma unroll
        for (int w = 0; w < kWords; ++w) words[w] += partial[tile * stride + w];
      }
    }
#pragma unroll
    for (int w = 0; w < kWords; ++w) shared[warp][w][lane] = words[w];
    __syncthreads();
    if (warp == 0 && value < 2 * rows) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        double total = shared[0][w][lane];
        for (int other = 1; other < kFinishWarps; ++other) total += shared[other][w][lane];
        words[w] = total;
      }
      const int64_t which = value / rows;
      table.norms[which][layer.norm_offset + value - which * rows] = Sums::norm(words);
    }
    return;
  }

  block -= row_blocks;
  if (block >= finish_column_blocks(entry)) return;
  const int64_t column = block * kFinishThreads + threadIdx.x;
  if (column >= layer.columns) return;
  double words[kColumnWords] = {};
#pragma unroll 4
  for (int64_t split = 0; split < entry.num_splits; ++split) {
#pragma unroll
    for (int w = 0; w < kColumnWords; ++w) {
      words[w] +=
          table.workspace[entry.sums_offset + (split * kColumnWords + w) * layer.columns + column];
    }
  }
  write_mean<Sums>(table.means, layer.mean_offset + column, words, rows);
}

// Launches both kernels for up to kCapacity layers of one element type.
template <typename Element, int kCapacity>
cudaError_t launch_layer_statistics(const StatisticsTable<kCapacity>& table, int64_t num_units,
                                    cudaStream_t stream) {
  using Sums = typename ElementTraits<Element>::Sums;
  if (num_units > 0) {
    layer_statistics_kernel<Element, kCapacity>
        <<<static_cast<unsigned>(num_units), kThreads, 0, stream>>>(table);
  }
  int64_t finish_blocks = 0;
  for (int i = 0; i < table.count; ++i) {
    const StatisticsEntry& entry = table.entries[i];
    finish_blocks =
        std::max(finish_blocks, finish_row_blocks(entry, table.rows) + finish_column_blocks(entry));
  }
  if (finish_blocks > 0) {
    const dim3 grid(static_cast<unsigned>(finish_blocks), static_cast<unsigned>(table.count));
    finish_statistics_kernel<Sums, kCapacity><<<grid, kFinishThreads, 0, stream>>>(table);
  }
  return cudaGetLastError();
}

}  // namespace fadiag
