// layer_statistics on the GPU: one pass over the hiddens and grads of all layers.
//
// What:          per-sample sums of squares of h and g, and column sums of g.
// Layout:        a work unit is (layer, column tile, row split). A block's eight consumer warps
//                form a grid of warp_rows x warp_columns; a lane owns 16 bytes of columns and keeps
//                their sums in registers while its warp walks down the rows, four at a time. Row
//                sums leave by a transposed warp shuffle.
// Loads:         blocks are persistent. Where the chip has bulk copies (9.0 and later) and shared
//                memory for them (kRing), a ninth warp runs ahead of the others, over the ends of
//                units, and fills a ring of stages; the memory never waits for arithmetic.
//                Elsewhere, and where rows are no multiple of 16 bytes apart, lanes load directly.
// Accumulation:  float64, accumulate.h.
// Determinism:   the plan is a function of (rows, columns, element type) alone; partial results are
//                merged in a fixed order by finish_statistics_kernel. No atomics.
// Limits:        any row stride and alignment; samples must be dense; 64-bit offsets throughout.
#pragma once

#include <algorithm>
#include <cstdint>

#include "lane_sums.cuh"
#include "ring.cuh"
#include "statistics_table.h"

namespace fadiag {

constexpr int kThreads = kConsumers + kWarpSize;  // and the warp that fills the ring
constexpr int kBlocksPerMultiprocessor = 2;
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
constexpr int64_t kLargeLayerBytes = 16 << 20;

struct StatisticsPlan {
  int warp_columns;  // warps side by side; kWarps / warp_columns walk down the rows
  int rows_per_unit;
  int64_t num_tiles;
  int64_t num_splits;

  StatisticsPlan(int64_t rows, int64_t columns, int64_t element_size, int64_t square_words) {
    const int64_t lane_columns = kVectorBytes / element_size;
    const int64_t warp_width = kWarpSize * lane_columns;
    const int64_t layer_bytes = 2 * rows * columns * element_size;
    // Few rows: warps side by side, so that each still has several groups of rows to walk. Large
    // layers: wide tiles, because every tile writes a partial sum for each of its rows.
    warp_columns = rows <= 16 ? 8 : rows <= 64 || layer_bytes >= kLargeLayerBytes ? 4 : 2;
    while (warp_columns > 1 && (warp_columns / 2) * warp_width >= columns) warp_columns /= 2;
    const int64_t tile_width = warp_columns * warp_width;
    // A layer without columns still has norms (zero) to write.
    num_tiles = std::max<int64_t>(1, ceil_div(columns, tile_width));
    const int64_t row_bytes =
        std::max<int64_t>(1, 2 * std::min(columns, tile_width) * element_size);
    const int64_t unit_bytes =
        std::clamp(layer_bytes / kUnitsPerLayer, kMinUnitBytes, kMaxUnitBytes);
    const int64_t step = kRowGroup * (kWarps / warp_columns);
    const int64_t wanted = ceil_div(std::max<int64_t>(1, unit_bytes / row_bytes), step) * step;
    const int64_t slots = kRowSlots / square_words / warp_columns / step * step;
    rows_per_unit =
        static_cast<int>(std::min<int64_t>({wanted, slots, ceil_div(rows, step) * step}));
    num_splits = rows_per_unit > 0 ? ceil_div(rows, rows_per_unit) : 0;
  }
};

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
  int pitch;         // elements between the rows of a stage

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
    pitch = entry.packed_rows ? tile_columns : tile_width;
  }
  __device__ int rows_per_step() const { return warp_rows * kRowGroup; }
  __device__ int steps() const { return (rows + rows_per_step() - 1) / rows_per_step(); }
};

// Shared memory of a block, in this order.
template <bool kRing>
struct SharedLayout {
  static constexpr int kStagesAt = 0;  // [stages, hidden and grad, kStageBytes]
  static constexpr int kSums = kStagesAt + (kRing ? kStages * 2 * kStageBytes : 0);
  // Row sums first, column sums after them: the two never live at the same time.
  static constexpr int kRowBytes = 2 * kRowSlots * sizeof(double);
  static constexpr int kColumnBytes = kConsumers * 8 * sizeof(double);
  static constexpr int kBarriers = kSums + (kRowBytes > kColumnBytes ? kRowBytes : kColumnBytes);
  static constexpr int kBytes = kBarriers + kStages * 2 * sizeof(uint64_t);
};
static_assert(kBlocksPerMultiprocessor * (SharedLayout<true>::kBytes + 1024) <= 228 * 1024);
static_assert(SharedLayout<false>::kBytes <= 48 * 1024, "every chip has this much");

// The ninth warp: copies every stage of every unit of this block, as far ahead as the ring allows.
template <typename Element, int kCapacity>
__device__ void fill_ring(const StatisticsTable<kCapacity>& table, Ring<kStages>& ring,
                          unsigned char* stages, int lane) {
  for (int u = blockIdx.x; u < table.num_units; u += gridDim.x) {
    const StatisticsEntry& entry = table.entries[find_entry(table, u)];
    if (!entry.bulk) continue;
    const Unit<Element> unit(entry, u - entry.first_unit, table.rows);
    const int row_bytes = unit.tile_columns * static_cast<int>(sizeof(Element));
    const int pitch_bytes = unit.pitch * static_cast<int>(sizeof(Element));
    for (int step = 0; step < unit.steps(); ++step) {
      const int first_row = step * unit.rows_per_step();
      const int rows = min(unit.rows_per_step(), unit.rows - first_row);
      // Rows without a gap between them are one copy.
      const int copies = entry.packed_rows ? 1 : rows;
      const int copy_bytes = entry.packed_rows ? rows * row_bytes : row_bytes;
      ring.wait_empty();
      if (lane == 0) ring.expect(2 * rows * row_bytes);
      __syncwarp();
      unsigned char* stage = stages + ring.stage() * 2 * kStageBytes;
      for (int copy = lane; copy < 2 * copies; copy += kWarpSize) {
        const bool is_grad = copy >= copies;
        const int row = is_grad ? copy - copies : copy;
        const void* base = is_grad ? entry.layer.grad : entry.layer.hidden;
        const int64_t stride =
            is_grad ? entry.layer.grad_row_stride : entry.layer.hidden_row_stride;
        const auto* source = static_cast<const Element*>(base) +
                             (unit.row_begin + first_row + row) * stride + unit.tile_begin;
        ring.copy(stage + (is_grad ? kStageBytes : 0) + row * pitch_bytes, source, copy_bytes);
      }
      ring.advance();
    }
  }
}

template <typename Element, int kCapacity, bool kRing>
__global__ void __launch_bounds__(kThreads, sizeof(Element) < 8 ? kBlocksPerMultiprocessor : 1)
    layer_statistics_kernel(const __grid_constant__ StatisticsTable<kCapacity> table) {
  using Lanes = LaneSums<Element>;
  using Sums = typename Lanes::Sums;
  constexpr int kWords = Lanes::kWords;
  constexpr int kColumnWords = Lanes::kColumnWords;
  constexpr int kSize = Lanes::kSize;

  extern __shared__ __align__(128) unsigned char memory[];
  using Shared = SharedLayout<kRing>;
  unsigned char* stages = memory + Shared::kStagesAt;
  auto* shared = reinterpret_cast<double*>(memory + Shared::kSums);
  Ring<kStages> ring(reinterpret_cast<uint64_t*>(memory + Shared::kBarriers), kConsumers);
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  if (warp == kWarps) {
    if constexpr (kRing) fill_ring<Element>(table, ring, stages, lane);
    return;
  }

  const int64_t rows = table.rows;
  for (int u = blockIdx.x; u < table.num_units; u += gridDim.x) {
    const StatisticsEntry& entry = table.entries[find_entry(table, u)];
    const Layer& layer = entry.layer;
    const Unit<Element> unit(entry, u - entry.first_unit, rows);
    const int warp_column = warp % unit.warp_columns;
    const int warp_row = warp / unit.warp_columns;
    const int tile_lanes = unit.warp_columns * kWarpSize;
    const int tile_lane = warp_column * kWarpSize + lane;
    const int tile_column = tile_lane * kSize;
    const int left = unit.tile_columns - tile_column;
    const int valid = left >= kSize ? kSize : left > 0 ? left : 0;
    const bool bulk = kRing && entry.bulk && kHasBulkCopies;

    Lanes sums;
    for (int step = 0; step < unit.steps(); ++step) {
      const int first_row = (step * unit.warp_rows + warp_row) * kRowGroup;
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
            const int offset = (warp_row * kRowGroup + i) * unit.pitch + tile_column;
            h.load_shared(stage + offset);
            g.load_shared(stage + kStageBytes / sizeof(Element) + offset);
          }
          sums.add_row(i, h, g);
        }
        ring.release();
        ring.advance();
      } else {
        const int64_t column = unit.tile_begin + tile_column;
        const auto* hidden = static_cast<const Element*>(layer.hidden) + column;
        const auto* grad = static_cast<const Element*>(layer.grad) + column;
        // Few rows at a time: loads in flight, and registers for no more.
        constexpr int kAtOnce = kWords == 1 ? 2 : 1;
#pragma unroll
        for (int first = 0; first < kRowGroup; first += kAtOnce) {
          Vector<Element> h[kAtOnce];
          Vector<Element> g[kAtOnce];
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            const int64_t row = unit.row_begin + first_row + first + i;
            const int count = first_row + first + i < unit.rows ? valid : 0;
            h[i].load(hidden + row * layer.hidden_row_stride, count, entry.aligned);
            g[i].load(grad + row * layer.grad_row_stride, count, entry.aligned);
          }
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) sums.add_row(first + i, h[i], g[i]);
        }
      }
      sums.store_squares(shared, entry.rows_per_unit, first_row, unit.rows, unit.warp_columns,
                         warp_column, lane);
    }
    sync_consumers<kConsumers>();

    for (int i = threadIdx.x; i < 2 * unit.rows; i += kConsumers) {
      const int which = i >= unit.rows;
      const int row = which ? i - unit.rows : i;
      double words[kWords];
      Lanes::load_squares(shared, entry.rows_per_unit, which, row, unit.warp_columns, words);
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

    sums.store_columns(shared, tile_lanes, tile_lane, unit.warp_rows, warp_row);
    sync_consumers<kConsumers>();
    for (int c = threadIdx.x; c < unit.tile_columns; c += kConsumers) {
      double words[kColumnWords];
      Lanes::load_columns(shared, tile_lanes, unit.warp_rows, c, words);
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
// Up to this many partial results one thread adds by itself; more are shared among the warps.
constexpr int kFewPartials = 8;

// One kind of partial results of a layer: `count` of each of `values` figures.
struct Partials {
  int64_t count;
  int64_t values;

  FADIAG_HOST_DEVICE bool shared_by_warps() const { return count > kFewPartials; }
  FADIAG_HOST_DEVICE int64_t values_per_block() const {
    return shared_by_warps() ? kWarpSize : kFinishThreads;
  }
  // One partial result needs no merging: its unit wrote the figure itself.
  FADIAG_HOST_DEVICE int64_t blocks() const {
    return count > 1 ? (values + values_per_block() - 1) / values_per_block() : 0;
  }
};

FADIAG_HOST_DEVICE Partials row_partials(const StatisticsEntry& entry, int64_t rows) {
  return {entry.num_tiles, 2 * rows};
}
FADIAG_HOST_DEVICE Partials column_partials(const StatisticsEntry& entry) {
  return {entry.num_splits, entry.layer.columns};
}

// Merges one value's words. With shared_by_warps all lanes of the block call it together, and the
// result is warp 0's. Partial result p, word w lies at data[p * partial_stride + w * word_stride].
template <int kWords>
__device__ __forceinline__ bool merge(const Partials& partials, const double* data,
                                      int64_t partial_stride, int64_t word_stride, bool exists,
                                      double (*shared)[kWords][kWarpSize],
                                      double (&words)[kWords]) {
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const bool together = partials.shared_by_warps();
  const int64_t step = together ? kFinishWarps : 1;
#pragma unroll
  for (int w = 0; w < kWords; ++w) words[w] = 0.0;
  if (exists) {
#pragma unroll 8
    for (int64_t p = together ? warp : 0; p < partials.count; p += step) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) words[w] += data[p * partial_stride + w * word_stride];
    }
  }
  if (!together) return exists;
#pragma unroll
  for (int w = 0; w < kWords; ++w) shared[warp][w][lane] = words[w];
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    words[w] = shared[0][w][lane];
    for (int other = 1; other < kFinishWarps; ++other) words[w] += shared[other][w][lane];
  }
  return exists && warp == 0;
}

// Merges the partial results of all tiles of a row, and of all splits of a column. Block (x, y)
// does its share x of layer y.
template <typename Sums, int kCapacity>
__global__ void __launch_bounds__(kFinishThreads)
    finish_statistics_kernel(const __grid_constant__ StatisticsTable<kCapacity> table) {
  constexpr int kWords = Sums::kSquareWords;
  constexpr int kColumnWords = Sums::kColumnWords;
  __shared__ double shared_squares[kFinishWarps][kWords][kWarpSize];
  __shared__ double shared_sums[kFinishWarps][kColumnWords][kWarpSize];
  wait_for_previous_kernel();
  const StatisticsEntry& entry = table.entries[blockIdx.y];
  const int64_t rows = table.rows;
  const auto value_of = [](const Partials& partials, int64_t block) {
    const int64_t within =
        partials.shared_by_warps() ? threadIdx.x % kWarpSize : static_cast<int>(threadIdx.x);
    return block * partials.values_per_block() + within;
  };

  const Partials squares = row_partials(entry, rows);
  int64_t block = blockIdx.x;
  if (block < squares.blocks()) {
    const int64_t value = value_of(squares, block);  // which * rows + row
    const double* data = table.workspace + entry.squares_offset + value * kWords;
    double words[kWords];
    if (merge(squares, data, 2 * rows * kWords, 1, value < squares.values, shared_squares, words)) {
      const int64_t which = value / rows;
      table.norms[which][entry.layer.norm_offset + value - which * rows] = Sums::norm(words);
    }
    return;
  }
  block -= squares.blocks();
  const Partials sums = column_partials(entry);
  if (block >= sums.blocks()) return;
  const int64_t column = value_of(sums, block);
  const double* data = table.workspace + entry.sums_offset + column;
  double words[kColumnWords];
  if (merge(sums, data, kColumnWords * sums.values, sums.values, column < sums.values, shared_sums,
            words)) {
    write_mean<Sums>(table.means, entry.layer.mean_offset + column, words, rows);
  }
}

// Whether a chip runs the variant with the ring.
inline bool has_room_for_ring(int compute_major, int shared_bytes_per_block) {
  return compute_major >= 9 && shared_bytes_per_block >= SharedLayout<true>::kBytes;
}

template <typename Element, int kCapacity, bool kRing>
cudaError_t launch_units(const StatisticsTable<kCapacity>& table, int multiprocessors,
                         cudaStream_t stream) {
  const auto kernel = layer_statistics_kernel<Element, kCapacity, kRing>;
  constexpr int kBytes = SharedLayout<kRing>::kBytes;
  // It holds for the current device alone, hence with every launch.
  const cudaError_t allowed =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (allowed != cudaSuccess) return allowed;
  const int blocks = std::min(table.num_units, kBlocksPerMultiprocessor * multiprocessors);
  kernel<<<blocks, kThreads, kBytes, stream>>>(table);
  return cudaGetLastError();
}

// Launches both kernels for up to kCapacity layers of one element type.
template <typename Element, int kCapacity>
cudaError_t launch_layer_statistics(const StatisticsTable<kCapacity>& table, bool ring,
                                    int multiprocessors, cudaStream_t stream) {
  using Sums = typename SumsOf<Element>::type;
  const cudaError_t launched =
      ring ? launch_units<Element, kCapacity, true>(table, multiprocessors, stream)
           : launch_units<Element, kCapacity, false>(table, multiprocessors, stream);
  if (launched != cudaSuccess) return launched;
  int64_t finish_blocks = 0;
  for (int i = 0; i < table.count; ++i) {
    const StatisticsEntry& entry = table.entries[i];
    finish_blocks = std::max(
        finish_blocks, row_partials(entry, table.rows).blocks() + column_partials(entry).blocks());
  }
  if (finish_blocks > 0) {
    const dim3 grid(static_cast<unsigned>(finish_blocks), static_cast<unsigned>(table.count));
    return launch_dependent(finish_statistics_kernel<Sums, kCapacity>, grid, dim3(kFinishThreads),
                            stream, table);
  }
  return cudaSuccess;
}

}  // namespace fadiag
