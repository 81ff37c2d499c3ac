// layer_statistics on the GPU: one pass over the hiddens and grads of all layers, by the kernel
// that suits their rows (stream_kernel.cuh, team_kernel.cuh), and a second kernel that merges what
// units left, in a fixed order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "dependent_launch.cuh"
#include "stream_kernel.cuh"
#include "team_kernel.cuh"

namespace fadiag {

// Where every worker has so many units, and a block's first ones so many bytes that its start does
// not count, the last ones go to whoever is ready.
constexpr int kSharedTurnsFrom = 2;
constexpr int64_t kOwnBlockBytes = 96 << 10;
constexpr int kSharedTenths = 8;

constexpr int kFinishThreads = 512;
// Up to this many partial results one thread adds by itself; more are shared by several.
constexpr int kFewPartials = 8;
constexpr int kManyPartials = 512;

// One kind of partial results of a layer: `count` of each of `values` figures.
struct Partials {
  int64_t count;
  int64_t values;

  // A power of two; what is left of a block's threads share the partial results of one value.
  FADIAG_HOST_DEVICE int values_per_block() const {
    if (count <= kFewPartials) return kFinishThreads;
    int width = count <= kManyPartials ? kWarpSize : 8;
    while (width / 2 >= values && width > 1) width /= 2;
    return width;
  }
  // One partial result needs no merging: its unit wrote the figure itself.
  FADIAG_HOST_DEVICE int64_t blocks() const {
    return count > 1 ? (values + values_per_block() - 1) / values_per_block() : 0;
  }
};

FADIAG_HOST_DEVICE Partials row_partials(const StatisticsEntry& entry, int64_t rows) {
  return {entry.num_partials, 2 * rows};
}
FADIAG_HOST_DEVICE Partials column_partials(const StatisticsEntry& entry) {
  return {entry.layer.mean_offset == kNoMean ? 0 : entry.num_splits, entry.layer.columns};
}

// Merges the words of block `block`'s values; all its threads call it together. Returns the value
// whose words this thread has, -1 if it has none. Partial result p, word w of value v lies at
// data[p * partial_stride + v * value_stride + w * word_stride].
template <int kWords>
__device__ __forceinline__ int64_t merge(const Partials& partials, int64_t block,
                                         const double* data, int64_t partial_stride,
                                         int64_t value_stride, int64_t word_stride,
                                         double (&shared)[kWords][kFinishThreads],
                                         double (&words)[kWords]) {
  const int width = partials.values_per_block();
  const int parts = kFinishThreads / width;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t value = block * width + thread % width;
#pragma unroll
  for (int w = 0; w < kWords; ++w) words[w] = 0.0;
  if (value < partials.values) {
    const double* own = data + value * value_stride;
#pragma unroll 8
    for (int64_t p = thread / width; p < partials.count; p += parts) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) words[w] += own[p * partial_stride + w * word_stride];
    }
  }
  // Halves onto halves.
  for (int left = kFinishThreads / 2; left >= width; left /= 2) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if (thread < 2 * left) shared[w][thread] = words[w];
    }
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if (thread < left) words[w] += shared[w][thread + left];
    }
    __syncthreads();
  }
  return thread < width && value < partials.values ? value : -1;
}

// Merges the partial results of all rows and columns. Block (x, y) does its share x of layer y.
template <typename Sums, int kCapacity>
__global__ void __launch_bounds__(kFinishThreads)
    finish_statistics_kernel(const __grid_constant__ StatisticsTable<kCapacity> table) {
  constexpr int kWords = Sums::kSquareWords;
  constexpr int kColumnWords = Sums::kColumnWords;
  __shared__ double shared[kWords][kFinishThreads];
  static_assert(kColumnWords <= kWords);
  const StatisticsEntry& entry = table.entries[blockIdx.y];
  const int64_t rows = table.rows;
  wait_for_previous_kernel();

  const Partials squares = row_partials(entry, rows);
  int64_t block = blockIdx.x;
  if (block < squares.blocks()) {
    double words[kWords];
    const int64_t value = merge<kWords>(squares, block, table.workspace + entry.squares_offset,
                                        2 * rows * kWords, kWords, 1, shared, words);
    if (value >= 0) {
      const int64_t which = value / rows;
      table.norms[which][entry.layer.norm_offset + value - which * rows] = Sums::norm(words);
    }
    return;
  }
  block -= squares.blocks();
  const Partials sums = column_partials(entry);
  if (block >= sums.blocks()) return;
  double words[kColumnWords];
  auto& of_columns = reinterpret_cast<double (&)[kColumnWords][kFinishThreads]>(shared);
  const int64_t column =
      merge<kColumnWords>(sums, block, table.workspace + entry.sums_offset,
                          kColumnWords * sums.values, 1, sums.values, of_columns, words);
  if (column >= 0) {
    write_mean<Sums>(table.means, entry.layer.mean_offset + column, words, table.divisor);
  }
}

// What a launch needs to know of its device.
struct Chip {
  int multiprocessors;
  int shared_bytes;            // of a multiprocessor
  int shared_bytes_per_block;  // at most
  int compute_major;           // for which the code that runs was compiled
};

// Shares the units out; returns the number of blocks.
template <int kCapacity>
int plan_blocks(StatisticsTable<kCapacity>& table, int resident, int workers_per_block,
                int multiprocessors) {
  const int turn = resident * workers_per_block;
  const int turns = table.num_units / turn;
  const int64_t block_bytes = table.bytes / std::max(1, table.num_units) * workers_per_block;
  if (turns < kSharedTurnsFrom || block_bytes < kOwnBlockBytes) {
    table.shared_units = table.num_units;
    // Few units go to as many multiprocessors as there are.
    const int filled = static_cast<int>(ceil_div(table.num_units, workers_per_block));
    table.resident =
        std::min(resident, std::max(filled, std::min(table.num_units, multiprocessors)));
    return table.resident;
  }
  table.resident = resident;
  table.shared_units = std::max(1, turns * kSharedTenths / 10) * turn;
  return resident +
         static_cast<int>(ceil_div(table.num_units - table.shared_units, workers_per_block));
}

template <typename Kernel>
cudaError_t allow_shared_memory(Kernel kernel, int bytes) {
  // It holds for the current device alone, hence with every launch.
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

template <typename Element, Walk kWalk, int kCapacity>
cudaError_t launch_streams(StatisticsTable<kCapacity>& table, const Chip& chip,
                           cudaStream_t stream) {
  constexpr int kReserved = 1024;  // by the system, of every block
  const auto bytes = [](int stages) { return kSlotMemory<kWalk> + kWarps * stages * kStageBytes; };
  const auto fitting = [&](int stages) {
    return std::min(chip.shared_bytes / (bytes(stages) + kReserved), kBlocksPerMultiprocessor);
  };
  table.stages = fitting(kMostStages) == kBlocksPerMultiprocessor ? kMostStages : kMostStages - 1;
  const auto kernel = stream_layers_kernel<Element, kWalk, kCapacity>;
  const cudaError_t allowed = allow_shared_memory(kernel, bytes(table.stages));
  if (allowed != cudaSuccess) return allowed;
  const int resident = std::max(1, fitting(table.stages)) * chip.multiprocessors;
  const int blocks = plan_blocks(table, resident, kWarps, chip.multiprocessors);
  kernel<<<blocks, kThreads, bytes(table.stages), stream>>>(table);
  return cudaGetLastError();
}

template <typename Element, bool kRing, int kCapacity>
cudaError_t launch_teams(StatisticsTable<kCapacity>& table, const Chip& chip, cudaStream_t stream) {
  const auto kernel = team_layers_kernel<Element, kCapacity, kRing>;
  constexpr int kBytes = SharedLayout<kRing>::kBytes;
  const cudaError_t allowed = allow_shared_memory(kernel, kBytes);
  if (allowed != cudaSuccess) return allowed;
  const int resident = kBlocksPerMultiprocessor * chip.multiprocessors;
  const int blocks = plan_blocks(table, resident, 1, chip.multiprocessors);
  kernel<<<blocks, kTeamThreads, kBytes, stream>>>(table);
  return cudaGetLastError();
}

// Launches both kernels for up to kCapacity layers of one element type and walk.
template <typename Element, int kCapacity>
cudaError_t launch_layer_statistics(StatisticsTable<kCapacity>& table, Walk walk, const Chip& chip,
                                    cudaStream_t stream) {
  using Sums = typename SumsOf<Element>::type;
  const auto launch = [&](auto walk) {
    return launch_streams<Element, decltype(walk)::value, kCapacity>(table, chip, stream);
  };
  cudaError_t launched = cudaSuccess;
  if (walk == Walk::kTeam) {
    launched = has_room_for_ring(chip.compute_major, chip.shared_bytes_per_block)
                   ? launch_teams<Element, true, kCapacity>(table, chip, stream)
                   : launch_teams<Element, false, kCapacity>(table, chip, stream);
  } else if (walk == Walk::kStream) {
    launched = launch(std::integral_constant<Walk, Walk::kStream>{});
  } else if constexpr (sizeof(Element) < 8) {
    launched = walk == Walk::kFew1   ? launch(std::integral_constant<Walk, Walk::kFew1>{})
               : walk == Walk::kFew2 ? launch(std::integral_constant<Walk, Walk::kFew2>{})
                                     : launch(std::integral_constant<Walk, Walk::kFew4>{});
  }
  if (launched != cudaSuccess) return launched;
  int64_t finish_blocks = 0;
  for (int i = 0; i < table.count; ++i) {
    const StatisticsEntry& entry = table.entries[i];
    finish_blocks = std::max(
        finish_blocks, row_partials(entry, table.rows).blocks() + column_partials(entry).blocks());
  }
  if (finish_blocks > 0) {
    const dim3 grid(static_cast<unsigned>(finish_blocks), static_cast<unsigned>(table.count));
    return launch_dependent(finish_statistics_kernel<Sums, kCapacity>, chip.compute_major >= 9,
                            grid, dim3(kFinishThreads), 0, stream, table);
  }
  return cudaSuccess;
}

// Fills in what depends on where a layer's data are.
template <typename Element>
void describe_memory(StatisticsEntry& entry, int64_t rows, const void* means) {
  constexpr int64_t kItem = sizeof(Element);
  const auto is_aligned = [&](int64_t bytes) {
    const Layer& layer = entry.layer;
    return reinterpret_cast<uintptr_t>(layer.hidden) % bytes == 0 &&
           reinterpret_cast<uintptr_t>(layer.grad) % bytes == 0 &&
           (rows == 1 || (layer.hidden_row_stride * kItem % bytes == 0 &&
                          layer.grad_row_stride * kItem % bytes == 0));
  };
  entry.aligned = is_aligned(kVectorBytes);
  entry.copy_bytes = static_cast<int8_t>(entry.aligned   ? kVectorBytes
                                         : is_aligned(8) ? 8
                                         : is_aligned(4) ? 4
                                                         : 0);
  entry.bulk = entry.aligned && entry.layer.columns * kItem % kVectorBytes == 0;
  entry.packed_rows = entry.num_tiles == 1 &&
                      entry.layer.hidden_row_stride == entry.layer.columns &&
                      entry.layer.grad_row_stride == entry.layer.columns;
  constexpr int64_t kMeanItem = kItem == 8 ? 8 : 4;
  entry.aligned_means =
      (reinterpret_cast<uintptr_t>(means) + entry.layer.mean_offset * kMeanItem) % kVectorBytes ==
      0;
}

// Fills in the plans of the layers that the table's entries name. Returns the size of the workspace
// in doubles, or -1 for more units than can be counted.
template <typename Element, int kCapacity>
int64_t plan_table(StatisticsTable<kCapacity>& table) {
  using Sums = typename SumsOf<Element>::type;
  const int64_t rows = table.rows;
  int64_t num_units = 0;
  int64_t workspace_size = 0;
  table.bytes = 0;
  for (int i = 0; i < table.count; ++i) {
    StatisticsEntry& entry = table.entries[i];
    const StatisticsPlan plan(rows, entry.layer.columns, sizeof(Element), Sums::kSquareWords);
    entry.first_unit = static_cast<int>(num_units);
    entry.num_tiles = static_cast<int>(plan.num_tiles);
    entry.num_partials = static_cast<int>(plan.num_partials);
    entry.num_splits = static_cast<int>(plan.num_splits);
    entry.rows_per_unit = static_cast<int>(plan.rows_per_unit);
    entry.vector_shift = static_cast<int8_t>(plan.vectors / 2);
    entry.warp_columns = static_cast<int8_t>(plan.warp_columns);
    describe_memory<Element>(entry, rows, table.means);
    entry.squares_offset = workspace_size;
    if (plan.num_partials > 1) {
      workspace_size += plan.num_partials * 2 * rows * Sums::kSquareWords;
    }
    entry.sums_offset = workspace_size;
    if (plan.num_splits > 1 && entry.layer.mean_offset != kNoMean) {
      workspace_size += plan.num_splits * entry.layer.columns * Sums::kColumnWords;
    }
    num_units += plan.num_units;
    table.bytes += 2 * rows * entry.layer.columns * static_cast<int64_t>(sizeof(Element));
    if (num_units > std::numeric_limits<int>::max()) return -1;
  }
  table.num_units = static_cast<int>(num_units);
  return workspace_size;
}

}  // namespace fadiag
