// layer_statistics for layers that one cluster of blocks reads at once: no workspace, one launch.
//
// Layout:        a cluster of eight blocks a layer. Each block takes an eighth of the rows over all
//                columns, so that row sums are complete in it; column sums meet in distributed
//                shared memory, where every block merges an eighth of the columns.
// Determinism:   blocks, warps and rows are merged in a fixed order.
// Limits:        compute capability 9.0; see fits_one_cluster.
#pragma once

#include <cooperative_groups.h>

#include "copies.cuh"
#include "lane_sums.cuh"
#include "statistics_table.h"

namespace fadiag {

constexpr int kClusterBlocks = 8;
constexpr int64_t kClusterRows = 512;
// Beyond this a cluster's eight blocks would read for longer than the launch that they save.
constexpr int64_t kClusterBytes = 512 << 10;

// Whether a layer goes this way: a function of its shape and type alone.
inline bool fits_one_cluster(int64_t rows, int64_t columns, int64_t element_size) {
  const int64_t widest = kWarps * kWarpSize * kVectorBytes / element_size;
  return columns <= widest && rows <= kClusterRows &&
         2 * rows * columns * element_size <= kClusterBytes;
}

template <typename Element, int kCapacity>
__global__ void __launch_bounds__(kThreads, 2)
    small_layers_kernel(const __grid_constant__ StatisticsTable<kCapacity> table) {
  using Lanes = LaneSums<Element>;
  using Sums = typename Lanes::Sums;
  constexpr int kWords = Lanes::kWords;
  constexpr int kColumnWords = Lanes::kColumnWords;
  constexpr int kSize = Lanes::kSize;
  constexpr int kRowSlots = kClusterRows / kClusterBlocks;
  constexpr int kRowDoubles = 2 * kRowSlots * kWords * kWarps;
  constexpr int kColumnDoubles = kThreads * kSize * kColumnWords;
  // Row sums first, the warps' column sums after them; the block's own merged ones beside both.
  __shared__ double shared[kRowDoubles > kColumnDoubles ? kRowDoubles : kColumnDoubles];
  __shared__ double merged[kColumnDoubles];

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  // A launch behind this one that waits by itself, as step_row's, may get ready.
  cudaTriggerProgrammaticLaunchCompletion();
  const auto cluster = cooperative_groups::this_cluster();
  const int rank = static_cast<int>(cluster.block_rank());
  const StatisticsEntry& entry = table.entries[blockIdx.x / kClusterBlocks];
  const Layer& layer = entry.layer;
  const int rows = static_cast<int>(table.rows);
  const int rows_per_block = (rows + kClusterBlocks - 1) / kClusterBlocks;
  const int row_begin = rank * rows_per_block;
  const int block_rows = max(0, min(rows_per_block, rows - row_begin));
  const int columns = static_cast<int>(layer.columns);

  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int warp_columns = entry.warp_columns;
  const int warp_rows = kWarps / warp_columns;
  const int warp_column = warp % warp_columns;
  const int warp_row = warp / warp_columns;
  const int tile_lanes = warp_columns * kWarpSize;
  const int tile_lane = warp_column * kWarpSize + lane;
  const int column = tile_lane * kSize;
  const int valid = max(0, min(kSize, columns - column));
  const auto* hidden = static_cast<const Element*>(layer.hidden) + column;
  const auto* grad = static_cast<const Element*>(layer.grad) + column;

  Lanes sums;
  for (int first_row = warp_row * kRowGroup; first_row < block_rows;
       first_row += warp_rows * kRowGroup) {
    Vector<Element> h[kRowGroup];
    Vector<Element> g[kRowGroup];
#pragma unroll
    for (int i = 0; i < kRowGroup; ++i) {
      const int64_t row = row_begin + first_row + i;
      const int count = first_row + i < block_rows ? valid : 0;
      h[i].load(hidden + row * layer.hidden_row_stride, count, entry.aligned);
      g[i].load(grad + row * layer.grad_row_stride, count, entry.aligned);
    }
#pragma unroll
    for (int i = 0; i < kRowGroup; ++i) sums.add_row(i, h[i], g[i]);
    sums.store_squares(shared, kRowSlots, first_row, block_rows, warp_columns, warp_column, lane);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * block_rows; i += kThreads) {
    const int which = i >= block_rows;
    const int row = which ? i - block_rows : i;
    double words[kWords];
    Lanes::load_squares(shared, kRowSlots, which, row, warp_columns, words);
    table.norms[which][layer.norm_offset + row_begin + row] = Sums::norm(words);
  }
  __syncthreads();
  if (layer.mean_offset == kNoMean) return;

  sums.store_columns(shared, tile_lanes, tile_lane, warp_rows, warp_row);
  __syncthreads();
  for (int c = threadIdx.x; c < columns; c += kThreads) {
    double words[kColumnWords];
    Lanes::load_columns(shared, tile_lanes, warp_rows, c, words);
#pragma unroll
    for (int w = 0; w < kColumnWords; ++w) merged[w * columns + c] = words[w];
  }
  __syncthreads();
  cluster.sync();
  const int share = (columns + kClusterBlocks - 1) / kClusterBlocks;
  const int share_end = min(columns, (rank + 1) * share);
  for (int c = rank * share + threadIdx.x; c < share_end; c += kThreads) {
    double words[kColumnWords] = {};
#pragma unroll
    for (int block = 0; block < kClusterBlocks; ++block) {
      const double* other = cluster.map_shared_rank(merged, block);
#pragma unroll
      for (int w = 0; w < kColumnWords; ++w) words[w] += other[w * columns + c];
    }
    write_mean<Sums>(table.means, layer.mean_offset + c, words, table.divisor);
  }
  // No block may end while another still reads its shared memory.
  cluster.sync();
#endif
}

// Launches the kernel for up to kCapacity layers of one element type that fit a cluster each.
template <typename Element, int kCapacity>
cudaError_t launch_small_layers(const StatisticsTable<kCapacity>& table, cudaStream_t stream) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {kClusterBlocks, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(table.count * kClusterBlocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, small_layers_kernel<Element, kCapacity>, table);
}

}  // namespace fadiag
