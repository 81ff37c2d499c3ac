// layer_statistics on the GPU: one pass over the hiddens and grads of all layers.
//
// What:          per-sample sums of squares of h and g, and column sums of g.
// Layout:        a work unit is (layer, column tile, row split). The eight consumer warps of a
// block
//                form a grid of warp_rows x warp_columns; a lane owns 16 bytes of columns and keeps
//                their sums in registers while its warp walks down the rows, four at a time. Row
//                sums leave by a transposed warp shuffle.
// Loads:         blocks are persistent. On compute capability 9.0 and later a ninth warp runs ahead
//                of the others, over the ends of units, and fills a ring of shared-memory stages
//                with bulk copies; the memory never waits for arithmetic. Rows that are no multiple
//                of 16 bytes apart, and older chips, are loaded directly.
// Accumulation:  float64, accumulate.h.
// Determinism:   the plan is a function of (rows, columns, element type) alone; partial results are
//                merged in a fixed order by finish_statistics_kernel. No atomics.
// Limits:        any row stride and alignment; samples must be dense; 64-bit offsets throughout.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../layer_table.h"
#include "elements.cuh"
#include "ring.cuh"

namespace fadiag {

constexpr int kWarpSize = 32;
constexpr int kWarps = 8;
constexpr int kConsumers = kWarps * kWarpSize;
constexpr int kThreads = kConsumers + kWarpSize;  // and the warp that fills the ring
constexpr int kBlocksPerMultiprocessor = 2;
// A warp's turn: four rows of h and of g, eight 16-byte vectors per lane.
constexpr int kRowGroup = 4;
constexpr int kStageBytes = kWarps * kRowGroup * kWarpSize * kVectorBytes;  // of either tensor
// Two blocks of three stages keep up to 192 KB in flight per multiprocessor; 40 KB cover the
// latency of the memory, the rest covers the ends of units.
constexpr int kStages = 3;
// A block's row sums wait in shared memory until all its column warps have theirs.
constexpr int kRowSlots = 1024;  // rows of a unit times warp_columns
// Units of a 64th of a layer spread even one layer over many multiprocessors; above the upper bound
// the tail would show, below the lower one the cost of a unit's end.
constexpr int64_t kUnitsPerLayer = 64;
constexpr int64_t kMinUnitBytes = 16 << 10;
constexpr int64_t kMaxUnitBytes = 1 << 20;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct StatisticsPlan {
  int warp_columns;  // warps side by side; kWarps / warp_columns walk down the rows
  int rows_per_unit;
  int64_t num_tiles;
  int64_t num_splits;

  StatisticsPlan(int64_t rows, int64_t columns, int64_t element_size, int64_t square_words) {
    const int64_t lane_columns = kVectorBytes / element_size;
    const int64_t warp_width = kWarpSize * lane_columns;
    // Few rows: warps side by side, so that each still has several groups of rows to walk.
    warp_columns = rows <= 16 ? 8 : rows <= 64 ? 4 : 2;
    while (warp_columns > 1 && (warp_columns / 2) * warp_width >= columns) warp_columns /= 2;
    const int64_t tile_width = warp_columns * warp_width;
    // A layer without columns still has norms (zero) to write.
    num_tiles = std::max<int64_t>(1, ceil_div(columns, tile_width));
    const int64_t row_bytes =
        std::max<int64_t>(1, 2 * std::min(columns, tile_width) * element_size);
    const int64_t unit_bytes = std::clamp(2 * rows * columns * element_size / kUnitsPerLayer,
                                          kMinUnitBytes, kMaxUnitBytes);
    const int64_t step = kRowGroup * (kWarps / warp_columns);
    const int64_t wanted = ceil_div(std::max<int64_t>(1, unit_bytes / row_bytes), step) * step;
    const int64_t slots = kRowSlots / square_words / warp_columns / step * step;
    rows_per_unit =
        static_cast<int>(std::min<int64_t>({wanted, slots, ceil_div(rows, step) * step}));
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
  bool aligned : 1;  // 16-byte loads are possible in every row
  bool bulk : 1;     // and so are bulk copies: rows are whole vectors
};

template <int kCapacity>
struct StatisticsTable {
  StatisticsEntry entries[kCapacity];
  int count;
  int num_units;
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

// Where one unit lies, and how this thread sees it.
template <typename Element>
struct Unit {
  static constexpr int kSize = Vector<Element>::kSize;
  static constexpr int kWarpWidth = kSize * kWarpSize;

  int64_t tile;
  int64_t split;
  int64_t row_begin;
  int rows;
  int warp_columns;
  int warp_rows;
  int tile_width;
  int64_t tile_begin;
  int tile_columns;  // those that exist

  __device__ Unit(const StatisticsEntry& entry, int unit, int64_t total_rows) {
    tile = unit % entry.num_tiles;
    split = unit / entry.num_tiles;
    row_begin = split * entry.rows_per_unit;
    const int64_t rows_left = total_rows - row_begin;
    rows = rows_left < entry.rows_per_unit ? static_cast<int>(rows_left) : entry.rows_per_unit;
    warp_columns = entry.warp_columns;
    warp_rows = kWarps / warp_columns;
    tile_width = warp_columns * kWarpWidth;
    tile_begin = tile * tile_width;
    const int64_t columns_left = entry.layer.columns - tile_begin;
    tile_columns = columns_left < tile_width ? static_cast<int>(columns_left) : tile_width;
  }
  __device__ int rows_per_step() const { return warp_rows * kRowGroup; }
  __device__ int steps() const { return (rows + rows_per_step() - 1) / rows_per_step(); }
};

// Shared memory of a block, in this order.
struct SharedLayout {
  static constexpr int kRing = 0;  // [stages, hidden and grad, kStageBytes]
  static constexpr int kSums = kRing + kStages * 2 * kStageBytes;
  // Row sums first, column sums after them: the two never live at the same time.
  static constexpr int kRowBytes = 2 * kRowSlots * sizeof(double);
  static constexpr int kColumnBytes = kConsumers * 8 * sizeof(double);
  static constexpr int kBarriers = kSums + (kRowBytes > kColumnBytes ? kRowBytes : kColumnBytes);
  static constexpr int kBytes = kBarriers + kStages * 2 * sizeof(uint64_t);
};
static_assert(kBlocksPerMultiprocessor * (SharedLayout::kBytes + 1024) <= 228 * 1024);

// The ninth warp: copies every stage of every unit of this block, as far ahead as the ring allows.
template <typename Element, int kCapacity>
__device__ void fill_ring(const StatisticsTable<kCapacity>& table, Ring<kStages>& ring,
                          unsigned char* stages, int lane) {
  for (int u = blockIdx.x; u < table.num_units; u += gridDim.x) {
    const StatisticsEntry& entry = table.entries[find_entry(table, u)];
    if (!entry.bulk) continue;
    const Unit<Element> unit(entry, u - entry.first_unit, table.rows);
    const int row_bytes = unit.tile_columns * static_cast<int>(sizeof(Element));
    const int pitch = unit.tile_width * static_cast<int>(sizeof(Element));
    for (int step = 0; step < unit.steps(); ++step) {
      const int first_row = step * unit.rows_per_step();
      const int rows = min(unit.rows_per_step(), unit.rows - first_row);
      ring.wait_empty();
      if (lane == 0) ring.expect(2 * rows * row_bytes);
      __syncwarp();
      unsigned char* stage = stages + ring.stage() * 2 * kStageBytes;
      for (int copy = lane; copy < 2 * rows; copy += kWarpSize) {
        const bool is_grad = copy >= rows;
        const int row = is_grad ? copy - rows : copy;
        const void* base = is_grad ? entry.layer.grad : entry.layer.hidden;
        const int64_t stride =
            is_grad ? entry.layer.grad_row_stride : entry.layer.hidden_row_stride;
        const auto* source = static_cast<const Element*>(base) +
                             (unit.row_begin + first_row + row) * stride + unit.tile_begin;
        ring.copy(stage + (is_grad ? kStageBytes : 0) + row * pitch, source, row_bytes);
      }
      ring.advance();
    }
  }
}

template <typename Element, int kCapacity>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    layer_statistics_kernel(const __grid_constant__ StatisticsTable<kCapacity> table) {
  using Sums = typename ElementTraits<Element>::Sums;
  constexpr int kWords = Sums::kSquareWords;
  constexpr int kColumnWords = Sums::kColumnWords;
  constexpr int kSize = Vector<Element>::kSize;
  constexpr int kWarpWidth = kSize * kWarpSize;
  static_assert(kColumnWords * kSize <= 8, "a lane's column sums fit their shared memory");

  extern __shared__ __align__(128) unsigned char memory[];
  unsigned char* stages = memory + SharedLayout::kRing;
  auto* shared = reinterpret_cast<double*>(memory + SharedLayout::kSums);
  Ring<kStages> ring(reinterpret_cast<uint64_t*>(memory + SharedLayout::kBarriers), kWarps);
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  if (warp == kWarps) {
    fill_ring<Element>(table, ring, stages, lane);
    return;
  }

  const int64_t rows = table.rows;
  for (int u = blockIdx.x; u < table.num_units; u += gridDim.x) {
    const StatisticsEntry& entry = table.entries[find_entry(table, u)];
    const Layer& layer = entry.layer;
    const Unit<Element> unit(entry, u - entry.first_unit, rows);
    const int warp_column = warp % unit.warp_columns;
    const int warp_row = warp / unit.warp_columns;
    const int tile_column = warp_column * kWarpWidth + lane * kSize;
    const int left = unit.tile_columns - tile_column;
    const int valid = left >= kSize ? kSize : left > 0 ? left : 0;
    const bool bulk = entry.bulk && kHasBulkCopies;

    double column_sums[kColumnWords][kSize] = {};
    for (int step = 0; step < unit.steps(); ++step) {
      const int first_row = (step * unit.warp_rows + warp_row) * kRowGroup;
      double squares[kWords][2 * kRowGroup] = {};
      const auto add_row = [&](int i, const Vector<Element>& h, const Vector<Element>& g) {
        double h_words[kWords] = {};
        double g_words[kWords] = {};
#pragma unroll
        for (int e = 0; e < kSize; ++e) {
          Sums::add_square(h_words, h[e]);
          const double x = g[e];
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
      };
      if (bulk) {
        ring.wait_full();
        const auto* stage =
            reinterpret_cast<const Element*>(stages + ring.stage() * 2 * kStageBytes);
#pragma unroll
        for (int i = 0; i < kRowGroup; ++i) {
          Vector<Element> h;
          Vector<Element> g;
          // Beyond the data a stage holds what an earlier one left there.
          if (first_row + i < unit.rows && valid != 0) {
            const int offset = (warp_row * kRowGroup + i) * unit.tile_width + tile_column;
            h.load_shared(stage + offset);
            g.load_shared(stage + kStageBytes / sizeof(Element) + offset);
          }
          add_row(i, h, g);
        }
        __syncwarp();
        if (lane == 0) ring.release();
        ring.advance();
      } else {
        const int64_t column = unit.tile_begin + tile_column;
        const auto* hidden = static_cast<const Element*>(layer.hidden) + column;
        const auto* grad = static_cast<const Element*>(layer.grad) + column;
        // Two rows at a time: four loads in flight, and registers for no more.
#pragma unroll
        for (int half = 0; half < kRowGroup; half += 2) {
          Vector<Element> h[2];
          Vector<Element> g[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int64_t row = unit.row_begin + first_row + half + i;
            const int count = first_row + half + i < unit.rows ? valid : 0;
            h[i].load(hidden + row * layer.hidden_row_stride, count, entry.aligned);
            g[i].load(grad + row * layer.grad_row_stride, count, entry.aligned);
          }
#pragma unroll
          for (int i = 0; i < 2; ++i) add_row(half + i, h[i], g[i]);
        }
      }
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const double total = sum_transposed(squares[w], lane);
        const int which = lane / 16;
        const int row = first_row + lane / 4 % 4;
        // [which, row, word, warp column]
        if (lane % 4 == 0 && row < unit.rows) {
          shared[((which * entry.rows_per_unit + row) * kWords + w) * unit.warp_columns +
                 warp_column] = total;
        }
      }
    }
    sync_consumers<kConsumers>();

    for (int i = threadIdx.x; i < 2 * unit.rows; i += kConsumers) {
      const int which = i >= unit.rows;
      const int row = which ? i - unit.rows : i;
      double words[kWords];
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const double* slots =
            shared + ((which * entry.rows_per_unit + row) * kWords + w) * unit.warp_columns;
        double total = slots[0];
        for (int c = 1; c < unit.warp_columns; ++c) total += slots[c];
        words[w] = total;
      }
      if (entry.num_tiles == 1) {
        table.norms[which][layer.norm_offset + unit.row_begin + row] = Sums::norm(words);
      } else {
        double* target = table.workspace + entry.squares_offset +
                         ((unit.tile * 2 + which) * rows + unit.row_begin + row) * kWords;
#pragma unroll
        for (int w = 0; w < kWords; ++w) target[w] = words[w];
      }
    }
    sync_consumers<kConsumers>();

    // [element, word, warp row, lane of the tile]: consecutive lanes, consecutive banks.
    const int tile_lanes = unit.warp_columns * kWarpSize;
    const int tile_lane = warp_column * kWarpSize + lane;
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
#pragma unroll
      for (int w = 0; w < kColumnWords; ++w) {
        shared[((e * kColumnWords + w) * unit.warp_rows + warp_row) * tile_lanes + tile_lane] =
            column_sums[w][e];
      }
    }
    sync_consumers<kConsumers>();
    for (int c = threadIdx.x; c < unit.tile_columns; c += kConsumers) {
      double words[kColumnWords];
#pragma unroll
      for (int w = 0; w < kColumnWords; ++w) {
        const double* slots =
            shared + (c % kSize * kColumnWords + w) * unit.warp_rows * tile_lanes + c / kSize;
        double total = slots[0];
        for (int r = 1; r < unit.warp_rows; ++r) total += slots[r * tile_lanes];
        words[w] = total;
      }
      if (entry.num_splits == 1) {
        write_mean<Sums>(table.means, layer.mean_offset + unit.tile_begin + c, words, rows);
      } else {
#pragma unroll
        for (int w = 0; w < kColumnWords; ++w) {
          table.workspace[entry.sums_offset + (unit.split * kColumnWords + w) * layer.columns +
                          unit.tile_begin + c] = words[w];
        }
      }
    }
    sync_consumers<kConsumers>();
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
  wait_for_previous_kernel();
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
cudaError_t launch_layer_statistics(const StatisticsTable<kCapacity>& table, int multiprocessors,
                                    cudaStream_t stream) {
  using Sums = typename ElementTraits<Element>::Sums;
  const auto kernel = layer_statistics_kernel<Element, kCapacity>;
  static const cudaError_t prepared = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SharedLayout::kBytes);
  if (prepared != cudaSuccess) return prepared;
  const int blocks = std::min(table.num_units, kBlocksPerMultiprocessor * multiprocessors);
  kernel<<<blocks, kThreads, SharedLayout::kBytes, stream>>>(table);
  int64_t finish_blocks = 0;
  for (int i = 0; i < table.count; ++i) {
    const StatisticsEntry& entry = table.entries[i];
    finish_blocks =
        std::max(finish_blocks, finish_row_blocks(entry, table.rows) + finish_column_blocks(entry));
  }
  if (finish_blocks > 0) {
    const dim3 grid(static_cast<unsigned>(finish_blocks), static_cast<unsigned>(table.count));
    return launch_dependent(finish_statistics_kernel<Sums, kCapacity>, grid, dim3(kFinishThreads),
                            stream, table);
  }
  return cudaGetLastError();
}

}  // namespace fadiag
