// layer_statistics of more rows: the warps of a block share a tile of columns.
//
// What:          per-sample sums of squares of h and g, and column sums of g.
// Layout:        a work unit is (layer, column tile, row split). A block's eight consumer warps
//                form a grid of warp_rows x warp_columns; a lane owns 16 bytes of columns and keeps
//                their sums in registers while its warp walks down the rows, four at a time. Row
//                sums leave by a transposed warp shuffle.
// Loads:         where the chip has bulk copies (9.0 and later) and shared memory for them (kRing),
//                a ninth warp runs ahead of the others, over the ends of units, and fills a ring of
//                stages; the memory never waits for arithmetic. Elsewhere, and where rows are no
//                multiple of 16 bytes apart, lanes load directly.
// Accumulation:  float64, accumulate.h.
// Determinism:   units are a function of (rows, columns, element type) alone; which block does
// which
//                is not, and does not matter. No atomics.
// Limits:        any row stride and alignment; samples must be dense; 64-bit offsets throughout.
#pragma once

#include <algorithm>
#include <cstdint>

#include "lane_sums.cuh"
#include "ring.cuh"
#include "statistics_table.h"
#include "units.cuh"

namespace fadiag {

constexpr int kTeamThreads = kThreads + kWarpSize;  // and the warp that fills the ring
constexpr int kTeamStageBytes = kWarps * kRowGroup * kWarpSize * kVectorBytes;  // of either tensor
// Two blocks of three stages keep up to 192 KB in flight per multiprocessor; 40 KB cover the
// latency of the memory, the rest covers the ends of units.
constexpr int kStages = 3;
// A block's row sums wait in shared memory until all its column warps have theirs.
constexpr int kRowSlots = StatisticsPlan::kRowSlots;

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
  static constexpr int kStagesAt = 0;  // [stages, hidden and grad, kTeamStageBytes]
  static constexpr int kSums = kStagesAt + (kRing ? kStages * 2 * kTeamStageBytes : 0);
  // Row sums first, column sums after them: the two never live at the same time.
  static constexpr int kRowBytes = 2 * kRowSlots * sizeof(double);
  static constexpr int kColumnBytes = kThreads * 8 * sizeof(double);
  static constexpr int kBarriers = kSums + (kRowBytes > kColumnBytes ? kRowBytes : kColumnBytes);
  static constexpr int kBytes = kBarriers + kStages * 2 * sizeof(uint64_t);
};
static_assert(kBlocksPerMultiprocessor * (SharedLayout<true>::kBytes + 1024) <= 228 * 1024);
static_assert(SharedLayout<false>::kBytes <= 48 * 1024, "every chip has this much");

// The ninth warp: copies every stage of every unit of this block, as far ahead as the ring allows.
template <typename Element, int kCapacity>
__device__ void fill_ring(const StatisticsTable<kCapacity>& table, Ring<kStages>& ring,
                          unsigned char* stages, int lane) {
  for (Units<kCapacity> units(table, 0, 1); units.left(); units.next()) {
    const StatisticsEntry& entry = units.layer();
    if (!entry.bulk) continue;
    const Unit<Element> unit(entry, units.local(), table.rows);
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
      unsigned char* stage = stages + ring.stage() * 2 * kTeamStageBytes;
      for (int copy = lane; copy < 2 * copies; copy += kWarpSize) {
        const bool is_grad = copy >= copies;
        const int row = is_grad ? copy - copies : copy;
        const void* base = is_grad ? entry.layer.grad : entry.layer.hidden;
        const int64_t stride =
            is_grad ? entry.layer.grad_row_stride : entry.layer.hidden_row_stride;
        const auto* source = static_cast<const Element*>(base) +
                             (unit.row_begin + first_row + row) * stride + unit.tile_begin;
        ring.copy(stage + (is_grad ? kTeamStageBytes : 0) + row * pitch_bytes, source, copy_bytes);
      }
      ring.advance();
    }
  }
}

template <typename Element, int kCapacity, bool kRing>
__global__ void __launch_bounds__(kTeamThreads, sizeof(Element) < 8 ? kBlocksPerMultiprocessor : 1)
    team_layers_kernel(const __grid_constant__ StatisticsTable<kCapacity> table) {
  using Lanes = LaneSums<Element>;
  using Sums = typename Lanes::Sums;
  constexpr int kWords = Lanes::kWords;
  constexpr int kColumnWords = Lanes::kColumnWords;
  constexpr int kSize = Lanes::kSize;

  extern __shared__ __align__(128) unsigned char memory[];
  using Shared = SharedLayout<kRing>;
  unsigned char* stages = memory + Shared::kStagesAt;
  auto* shared = reinterpret_cast<double*>(memory + Shared::kSums);
  Ring<kStages> ring(reinterpret_cast<uint64_t*>(memory + Shared::kBarriers), kThreads);
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  if (warp == kWarps) {
    if constexpr (kRing) fill_ring<Element>(table, ring, stages, lane);
    return;
  }

  const int64_t rows = table.rows;
  for (Units<kCapacity> units(table, 0, 1); units.left(); units.next()) {
    const StatisticsEntry& entry = units.layer();
    const Layer& layer = entry.layer;
    const Unit<Element> unit(entry, units.local(), rows);
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
            reinterpret_cast<const Element*>(stages + ring.stage() * 2 * kTeamStageBytes);
#pragma unroll
        for (int i = 0; i < kRowGroup; ++i) {
          Vector<Element> h;
          Vector<Element> g;
          // Beyond the data a stage holds what an earlier one left there.
          if (first_row + i < unit.rows && valid != 0) {
            const int offset = (warp_row * kRowGroup + i) * unit.pitch + tile_column;
            h.load_vector(stage + offset);
            g.load_vector(stage + kTeamStageBytes / sizeof(Element) + offset);
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
    sync_consumers<kThreads>();

    for (int i = threadIdx.x; i < 2 * unit.rows; i += kThreads) {
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
    sync_consumers<kThreads>();

    if (layer.mean_offset == kNoMean) continue;
    sums.store_columns(shared, tile_lanes, tile_lane, unit.warp_rows, warp_row);
    sync_consumers<kThreads>();
    for (int c = threadIdx.x; c < unit.tile_columns; c += kThreads) {
      double words[kColumnWords];
      Lanes::load_columns(shared, tile_lanes, unit.warp_rows, c, words);
      if (entry.num_splits == 1) {
        write_mean<Sums>(table.means, layer.mean_offset + unit.tile_begin + c, words,
                         table.divisor);
      } else {
#pragma unroll
        for (int w = 0; w < kColumnWords; ++w) {
          table.workspace[entry.sums_offset + (unit.split * kColumnWords + w) * layer.columns +
                          unit.tile_begin + c] = words[w];
        }
      }
    }
    sync_consumers<kThreads>();
  }
}

// Whether a chip runs the variant with the ring.
inline bool has_room_for_ring(int compute_major, int shared_bytes_per_block) {
  return compute_major >= 9 && shared_bytes_per_block >= SharedLayout<true>::kBytes;
}

}  // namespace fadiag
