// Which units of work a block or a warp does.
#pragma once

#include "statistics_table.h"

namespace fadiag {

constexpr int kBlocksPerMultiprocessor = 2;

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

// A worker's units; workers are the warps of a block, or the block as a whole. The blocks that are
// resident from the start share the first units of the table evenly. The others have one unit a
// worker each, and start where a multiprocessor is ready for one: some are faster than others.
template <int kCapacity>
struct Units {
  const StatisticsTable<kCapacity>& table;
  int unit;
  int end;
  int stride;
  int entry = 0;

  __device__ Units(const StatisticsTable<kCapacity>& of, int worker, int workers_per_block)
      : table(of) {
    const int block = static_cast<int>(blockIdx.x);
    if (block < table.resident) {
      // Neighbouring units go to different multiprocessors.
      stride = workers_per_block * table.resident;
      unit = worker * table.resident + block;
      end = table.shared_units;
    } else {
      stride = table.num_units;
      unit = table.shared_units + (block - table.resident) * workers_per_block + worker;
      end = table.num_units;
    }
    if (left()) entry = find_entry(table, unit);
  }
  __device__ __forceinline__ bool left() const { return unit < end; }
  __device__ __forceinline__ void next() {
    unit += stride;
    if (!left()) return;
    while (entry + 1 < table.count && table.entries[entry + 1].first_unit <= unit) ++entry;
  }
  __device__ __forceinline__ const StatisticsEntry& layer() const { return table.entries[entry]; }
  __device__ __forceinline__ int local() const { return unit - layer().first_unit; }
};

}  // namespace fadiag
