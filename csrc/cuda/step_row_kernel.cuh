// step_row on the GPU: all that a training step says, in one launch, or two for long directions.
//
// Layout:        blocks of the first launch are one median each, then one chunk of columns of one
//                direction each. A warp multiplies the direction with one vector that is kept.
//                Where a direction is one chunk, its block writes the cosines and keeps it; longer
//                ones leave their products, and the blocks of a second launch, again one a chunk,
//                merge them and keep their columns.
// Median:        of few samples the one that has half of the others below it, counted for all of
//                them at once; of more by radix selection, eight bits of the order-preserving key a
//                turn, over counts in shared memory, until one candidate is left.
// Accumulation:  float64; float64 directions are scaled by a power of two each, from a launch of
//                their own before.
// Determinism:   lanes and chunks are merged in a fixed order. The atomics count: candidates of a
//                median, and blocks that have read the places, whose last one moves them on.
// Overlap:       from compute capability 9.0 the first launch gets ready beside the kernel that is
//                before it in the stream, and waits for it before it touches memory.
#pragma once

#include <cstdint>

#include "dependent_launch.cuh"
#include "elements.cuh"

namespace fadiag {

constexpr int kStepLayers = 64;
constexpr int kStepExtras = 4;
constexpr int64_t kStepChunk = 4096;  // columns
constexpr int kStepWarps = 16;        // at most
constexpr int kDigits = 256;
constexpr int kCounted = 256;              // samples, no more than a block has threads
constexpr uint64_t kNoKey = ~uint64_t{0};  // of a NaN, which stands behind all numbers

struct StepEntry {
  const void* direction;
  void* kept;  // [K + 1, columns]
  int64_t columns;
  int first_unit;
  int num_chunks;
  bool aligned;  // the direction and every row of what is kept
};

// One launch: some layers, and in the first one the medians and the extras.
struct StepTable {
  StepEntry entries[kStepLayers];
  int num_layers;
  int window;
  double decay;

  const double* norms;  // [2, states, samples]
  int64_t states;
  int64_t samples;
  int num_medians;
  const double* extras[kStepExtras];
  int extra_counts[kStepExtras];
  int num_extras;

  double* rows;
  int64_t num_rows;
  int64_t row_stride;
  int64_t cosines_at;  // the first column of these layers
  int64_t extras_at;
  int64_t* places;

  double* sums;          // [units, K + 2, 2]
  const double* scales;  // [layers, K + 2], or null where no scaling is needed
  bool closes;           // no launch follows
  bool moves_direction;
};
static_assert(sizeof(StepTable) <= 4096);

// ---- places

// Which row of the ring is written, and which of the directions that are kept.
struct Places {
  int64_t row;
  int64_t direction;
};

// One thread of a block reads the places, from which the others learn them; the launch that closes
// moves them on. It is the last thread, for the first ones load figures meanwhile.
struct PlaceReader {
  Places read{};
  unsigned long long before = 0;  // blocks that had read them

  __device__ __forceinline__ static bool is_this() { return threadIdx.x + 1 == blockDim.x; }

  __device__ __forceinline__ explicit PlaceReader(const StepTable& table) {
    if (!is_this()) return;
    const volatile int64_t* places = table.places;
    read = {places[0], places[1]};
    if (!table.closes) return;
    // Counted once both are there: neither is negative, so that this is the count's address, which
    // is not known before. The answer is looked at when the work is done.
    auto* count = reinterpret_cast<unsigned long long*>(table.places + 2);
    before = atomicAdd(count + ((read.row | read.direction) >> 63), 1ull);
  }

  // The others may look behind the block's next barrier.
  __device__ __forceinline__ void tell(Places& shared) const {
    if (is_this()) shared = read;
  }

  // All blocks have read the places when the last one is counted.
  __device__ __forceinline__ void close(const StepTable& table) const {
    if (!table.closes || !is_this() || before + 1 < gridDim.x) return;
    table.places[2] = 0;
    table.places[0] = (read.row + 1) % table.num_rows;
    if (table.moves_direction) table.places[1] = (read.direction + 1) % table.window;
  }
};

// ---- medians

// Unsigned integers in the order of the numbers.
__device__ __forceinline__ uint64_t order_key(double x) {
  const auto bits = static_cast<uint64_t>(__double_as_longlong(x));
  return bits >> 63 ? ~bits : bits | uint64_t{1} << 63;
}

__device__ __forceinline__ double from_order_key(uint64_t key) {
  const uint64_t bits = key >> 63 ? key & ~(uint64_t{1} << 63) : ~key;
  return __longlong_as_double(static_cast<long long>(bits));
}

// A block's own.
struct Selection {
  union {
    unsigned counts[kDigits];
    uint64_t keys[kCounted];
  };
  uint64_t prefix;
  unsigned rank;
  unsigned left;
};

// Finds the digit of the candidate of the wanted rank. One warp; eight digits a lane.
__device__ __forceinline__ void choose_digit(Selection& found, bool first, int lane) {
  constexpr int kOfLane = kDigits / 32;
  unsigned own = 0;
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) own += found.counts[lane * kOfLane + i];
  unsigned through = own;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const unsigned other = __shfl_up_sync(0xffffffffu, through, offset);
    if (lane >= offset) through += other;
  }
  const unsigned total = __shfl_sync(0xffffffffu, through, 31);
  // The lower of the two middle ones, like torch.nanmedian.
  const unsigned rank = first ? (total - 1) / 2 : found.rank;
  __syncwarp();
  if (total == 0) {
    if (lane == 0) found.left = 0;
    return;
  }
  unsigned below = through - own;
  if (rank < below || rank >= through) return;
  int digit = lane * kOfLane;
  while (rank >= below + found.counts[digit]) below += found.counts[digit++];
  found.prefix = found.prefix << 8 | static_cast<uint64_t>(digit);
  found.rank = rank - below;
  found.left = found.counts[digit];
}

// Writes the median of value(0) ... value(count - 1), NaN left out; NaN if nothing else is there.
// Where to, target() knows behind the block's next barrier. As many threads as fit share the
// counting for one value: a power of two, so that a warp has all.
template <typename Value, typename Target>
__device__ void write_median_of_few(Value&& value, int count, Selection& found, Target&& target) {
  uint64_t (&keys)[kCounted] = found.keys;
  const int t = static_cast<int>(threadIdx.x);
  bool is_number = false;
  if (t < count) {
    const double x = value(t);
    is_number = x == x;
    keys[t] = is_number ? order_key(x) : kNoKey;
  }
  const int total = __syncthreads_count(is_number);
  if (total == 0) {
    if (t == 0) *target() = nan("");
    return;
  }
  // The lower of the two middle ones, like torch.nanmedian.
  const int rank = (total - 1) / 2;
  int parts = 1;
  while (parts < 32 && 2 * parts * count <= static_cast<int>(blockDim.x)) parts *= 2;
  const uint64_t key = t / parts < count ? keys[t / parts] : kNoKey;
  int below = 0;
  int through = 0;
#pragma unroll 8
  for (int i = t % parts; i < count; i += parts) {
    below += keys[i] < key;
    through += keys[i] <= key;
  }
  for (int offset = parts / 2; offset > 0; offset /= 2) {
    below += __shfl_xor_sync(0xffffffffu, below, offset);
    through += __shfl_xor_sync(0xffffffffu, through, offset);
  }
  // Equal numbers write the same.
  if (t % parts == 0 && key != kNoKey && below <= rank && rank < through) {
    *target() = from_order_key(key);
  }
}

// The same of any number of values.
template <typename Value, typename Target>
__device__ void write_median(Value&& value, int64_t count, Selection& found, Target&& target) {
  if (count <= kCounted) {
    write_median_of_few(value, static_cast<int>(count), found, target);
    return;
  }
  if (threadIdx.x == 0) found.prefix = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    for (int d = threadIdx.x; d < kDigits; d += blockDim.x) found.counts[d] = 0;
    __syncthreads();
    const uint64_t prefix = found.prefix;
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
      const double x = value(i);
      const uint64_t key = order_key(x);
      const bool candidate = x == x && (shift == 56 || key >> (shift + 8) == prefix);
      if (candidate) atomicAdd(&found.counts[key >> shift & (kDigits - 1)], 1u);
    }
    __syncthreads();
    if (threadIdx.x < 32) choose_digit(found, shift == 56, threadIdx.x);
    __syncthreads();
    const unsigned left = found.left;
    if (left == 0) {
      if (threadIdx.x == 0) *target() = nan("");
      return;
    }
    if (shift == 0) {
      if (threadIdx.x == 0) *target() = from_order_key(found.prefix);
      return;
    }
    if (left == 1) {
      for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
        const double x = value(i);
        if (x == x && order_key(x) >> shift == found.prefix) *target() = x;
      }
      return;
    }
  }
}

__device__ __forceinline__ void write_medians(const StepTable& table, int m, Selection& found,
                                              const Places& places) {
  const auto target = [&] { return table.rows + places.row * table.row_stride + m; };
  const int64_t samples = table.samples;
  const int64_t doubled = 2 * table.states;
  if (m < doubled) {
    const double* norms = table.norms + m * samples;
    write_median([&](int64_t i) { return norms[i]; }, samples, found, target);
  } else {
    const double* norms = table.norms + (m - table.states) * samples;
    const double* error = table.norms + (doubled - 1) * samples;
    write_median([&](int64_t i) { return norms[i] / error[i]; }, samples, found, target);
  }
}

// ---- directions

// A lane's part of a row of what is kept, beside the direction's.
template <typename Element>
__device__ void multiply(const Element* direction, const Element* vector, double direction_scale,
                         double vector_scale, int64_t columns, bool aligned, int lane,
                         double (&sums)[2]) {
  constexpr int kSize = Vector<Element>::kSize;
  constexpr int kUnroll = 4;
  constexpr int64_t kStep = 32 * kSize;
  for (int64_t first = lane * kSize; first < columns; first += kUnroll * kStep) {
    Vector<Element> x[kUnroll];
    Vector<Element> y[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t left = columns - (first + u * kStep);
      const int valid = left <= 0 ? 0 : left >= kSize ? kSize : static_cast<int>(left);
      x[u].load(direction + first + u * kStep, valid, aligned);
      y[u].load(vector + first + u * kStep, valid, aligned);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        const double a = x[u][e] * direction_scale;
        const double b = y[u][e] * vector_scale;
        sums[0] += a * b;
        sums[1] += b * b;
      }
    }
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    sums[0] += __shfl_xor_sync(0xffffffffu, sums[0], offset);
    sums[1] += __shfl_xor_sync(0xffffffffu, sums[1], offset);
  }
}

// Keeps columns [begin, end) of a direction, given its products and squares with all that is kept
// and with itself, [K + 2, 2]. The block of the first chunk writes the cosines.
template <typename Element>
__device__ void keep(const StepTable& table, int l, int64_t begin, int64_t end, const double* sums,
                     const Places& places) {
  const StepEntry& entry = table.entries[l];
  const int num_kept = table.window + 1;
  const double squares = sums[2 * num_kept];
  if (begin == 0) {
    double* cosines = table.rows + places.row * table.row_stride + table.cosines_at +
                      static_cast<int64_t>(l) * num_kept;
    for (int k = threadIdx.x; k < num_kept; k += blockDim.x) {
      cosines[k] = cosine(sums[2 * k], squares, sums[2 * k + 1]);
    }
  }
  const bool enters = self_cosine(squares) == 1.0;
  const auto* direction = static_cast<const Element*>(entry.direction);
  auto* past = static_cast<Element*>(entry.kept) + places.direction * entry.columns;
  auto* average = static_cast<Element*>(entry.kept) + table.window * entry.columns;
  const double weight = 1.0 - table.decay;
  for (int64_t c = begin + threadIdx.x; c < end; c += blockDim.x) {
    const Element x = direction[c];
    past[c] = x;
    if (enters) average[c] = moved_average<Element>(average[c], x, weight);
  }
}

__device__ __forceinline__ int find_layer(const StepTable& table, int unit) {
  int l = 0;
  while (l + 1 < table.num_layers && table.entries[l + 1].first_unit <= unit) ++l;
  return l;
}

template <typename Element>
__global__ void __launch_bounds__(kStepWarps * 32, 1)
    step_row_kernel(const __grid_constant__ StepTable table) {
  extern __shared__ double shared_sums[];  // [K + 2, 2]
  __shared__ Places places;
  wait_for_previous_kernel();
  const PlaceReader reader(table);
  if (blockIdx.x < table.num_medians) {
    __shared__ Selection found;
    reader.tell(places);
    write_medians(table, blockIdx.x, found, places);
    if (blockIdx.x == 0) {
      double* next = table.rows + places.row * table.row_stride + table.extras_at;
      for (int e = 0; e < table.num_extras; ++e) {
        for (int i = threadIdx.x; i < table.extra_counts[e]; i += blockDim.x) {
          next[i] = table.extras[e][i];
        }
        next += table.extra_counts[e];
      }
    }
  } else {
    const int unit = blockIdx.x - table.num_medians;
    const int l = find_layer(table, unit);
    const StepEntry& entry = table.entries[l];
    const int64_t begin = (unit - entry.first_unit) * kStepChunk;
    const int64_t end = min(entry.columns, begin + kStepChunk);
    const int num_vectors = table.window + 2;
    const bool alone = entry.num_chunks == 1;
    double* sums = alone ? shared_sums : table.sums + 2 * static_cast<int64_t>(unit) * num_vectors;
    const double* scales = table.scales ? table.scales + l * num_vectors : nullptr;
    const auto* direction = static_cast<const Element*>(entry.direction) + begin;
    const auto* kept = static_cast<const Element*>(entry.kept) + begin;
    const int lane = threadIdx.x % 32;
    for (int v = threadIdx.x / 32; v < num_vectors; v += blockDim.x / 32) {
      const Element* vector = v < num_vectors - 1 ? kept + v * entry.columns : direction;
      double own[2] = {};
      multiply(direction, vector, scales ? scales[num_vectors - 1] : 1.0, scales ? scales[v] : 1.0,
               end - begin, entry.aligned, lane, own);
      if (lane < 2) sums[2 * v + lane] = lane == 0 ? own[0] : own[1];
    }
    if (alone) {
      reader.tell(places);
      __syncthreads();
      keep<Element>(table, l, begin, end, shared_sums, places);
    }
  }
  reader.close(table);
}

// For directions of several chunks; a block a chunk, and none for the others.
template <typename Element>
__global__ void __launch_bounds__(kStepWarps * 32, 1)
    keep_directions_kernel(const __grid_constant__ StepTable table) {
  extern __shared__ double shared_sums[];
  __shared__ Places places;
  const PlaceReader reader(table);
  reader.tell(places);
  const int l = find_layer(table, blockIdx.x);
  const StepEntry& entry = table.entries[l];
  if (entry.num_chunks > 1) {
    const int64_t count = 2 * (table.window + 2);
    const double* sums = table.sums + entry.first_unit * count;
    const int lane = threadIdx.x % 32;
    for (int64_t i = threadIdx.x / 32; i < count; i += blockDim.x / 32) {
      double total = 0.0;
      for (int chunk = lane; chunk < entry.num_chunks; chunk += 32)
        total += sums[chunk * count + i];
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) {
        total += __shfl_xor_sync(0xffffffffu, total, offset);
      }
      if (lane == 0) shared_sums[i] = total;
    }
    __syncthreads();
    const int64_t begin = (blockIdx.x - entry.first_unit) * kStepChunk;
    keep<Element>(table, l, begin, min(entry.columns, begin + kStepChunk), shared_sums, places);
  }
  reader.close(table);
}

// Scales of float64 vectors, [layers, K + 2]: of what is kept, then of the direction. One block a
// vector; blockIdx.y is the layer.
__global__ void __launch_bounds__(kStepWarps * 32, 1)
    step_scales_kernel(const __grid_constant__ StepTable table, double* scales) {
  const StepEntry& entry = table.entries[blockIdx.y];
  const auto* vector = blockIdx.x + 1 < gridDim.x
                           ? static_cast<const double*>(entry.kept) + blockIdx.x * entry.columns
                           : static_cast<const double*>(entry.direction);
  const double largest = largest_magnitude(vector, entry.columns);
  if (threadIdx.x == 0) scales[blockIdx.y * gridDim.x + blockIdx.x] = power_of_two_scale(largest);
}

}  // namespace fadiag
