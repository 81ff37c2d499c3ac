// layer_statistics of up to 32 rows: a warp streams over tiles of columns, with all rows of each.
//
// What:          per-sample sums of squares of h and g, and column sums of g.
// Layout:        a work unit is a warp's: a segment, every so many-th tile of a layer. A lane owns
// up
//                to four vectors of 16 bytes of a tile's columns, whose sums are complete when the
//                tile is. The squares of up to four rows stay in registers over all tiles of the
//                unit; of more rows they leave by a transposed warp sum, four rows at a time, for
//                shared memory.
// Loads:         warps go their own way. Each has a ring of stages in shared memory, which its
// lanes
//                fill by asynchronous copies, as far ahead as it holds, over the ends of tiles and
//                units.
// Accumulation:  float64, accumulate.h.
// Determinism:   segments are a function of (rows, columns, element type) alone; which warp adds
//                which is not, and does not matter. No atomics.
// Limits:        any row stride and alignment; samples must be dense.
#pragma once

#include <algorithm>
#include <cstdint>

#include "copies.cuh"
#include "lane_sums.cuh"
#include "statistics_table.h"
#include "units.cuh"

namespace fadiag {

constexpr int kSlotBytes = 16 << 10;  // row sums of a block's streams

// One warp's ring: fills stages in the order in which the warp empties them. A stage holds four
// vectors a lane of either tensor: of one row, or of two or four.
template <typename Element, int kCapacity, int kFixedShift>
class Feeder {
 public:
  static constexpr int kSize = Vector<Element>::kSize;
  static constexpr int kWarpWidth = kSize * kWarpSize;
  static constexpr int kWarpBytes = kVectorBytes * kWarpSize;

  __device__ Feeder(const StatisticsTable<kCapacity>& table, unsigned char* ring, int warp,
                    int lane)
      : units_(table, warp, kWarps), memory_(ring), lane_(lane) {
    enter();
#pragma unroll 1
    for (int s = 0; s < table.stages; ++s) fill();
  }

  // The oldest stage, once its data are there.
  __device__ __forceinline__ const unsigned char* acquire() {
    if (units_.table.stages == kMostStages) {
      wait_for_copies<kMostStages - 1>();
    } else {
      wait_for_copies<kMostStages - 2>();
    }
    __syncwarp();
    return memory_ + slot_ * kStageBytes;
  }

  // Gives it back; the warp has read it.
  __device__ __forceinline__ void release() {
    __syncwarp();
    fill();
  }

 private:
  // Goes to the first stage of the unit.
  __device__ __forceinline__ void enter() {
    if (units_.left()) tile_ = units_.local();
    row_ = 0;
  }

  // Starts the copies of the next stage; a group of them is committed even where none is left.
  __device__ __forceinline__ void fill() {
    if (units_.left()) {
      const StatisticsEntry& entry = units_.layer();
      const int shift = kFixedShift >= 0 ? kFixedShift : entry.vector_shift;
      const int rows = kStageVectors >> shift;
      const int64_t column = static_cast<int64_t>(tile_) * (kWarpWidth << shift);
      const bool whole =
          row_ + rows <= row_count() && column + (kWarpWidth << shift) <= entry.layer.columns;
      const uint32_t stage =
          static_cast<uint32_t>(__cvta_generic_to_shared(memory_)) + slot_ * kStageBytes;
      if (entry.copy_bytes != kVectorBytes) {
        copy_slowly(stage, entry, column, shift);
      } else if (whole) {
        const uint32_t target = stage + lane_ * kVectorBytes;
        copy_whole(target, entry.layer.hidden, entry.layer.hidden_row_stride, column, shift);
        copy_whole(target + kStageBytes / 2, entry.layer.grad, entry.layer.grad_row_stride, column,
                   shift);
      } else {
        copy_vectors(stage, entry, column, shift);
      }
      row_ += rows;
      if (row_ >= row_count()) leave_tile();
    }
    commit_copies();
    slot_ = slot_ + 1 == units_.table.stages ? 0 : slot_ + 1;
  }

  // Where the rows of a stage begin.
  __device__ __forceinline__ const Element* row_of(const void* data, int64_t row_stride,
                                                   int64_t column) const {
    return static_cast<const Element*>(data) + row_ * row_stride + column;
  }

  __device__ __forceinline__ void copy_whole(uint32_t target, const void* data, int64_t row_stride,
                                             int64_t column, int shift) const {
    const auto* source =
        reinterpret_cast<const char*>(row_of(data, row_stride, column)) + lane_ * kVectorBytes;
    const int64_t row_bytes = row_stride * static_cast<int64_t>(sizeof(Element));
    if (shift == 2) {
#pragma unroll
      for (int i = 0; i < kStageVectors; ++i) {
        copy_vector<kVectorBytes>(target + i * kWarpBytes, source + i * kWarpBytes);
      }
    } else if (shift == 1) {
#pragma unroll
      for (int i = 0; i < kStageVectors; i += 2) {
        copy_vector<kVectorBytes>(target + i * kWarpBytes, source);
        copy_vector<kVectorBytes>(target + (i + 1) * kWarpBytes, source + kWarpBytes);
        source += row_bytes;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kStageVectors; ++i) {
        copy_vector<kVectorBytes>(target + i * kWarpBytes, source);
        source += row_bytes;
      }
    }
  }

  // By the lanes, with zeros behind the ends of rows and of units.
  __device__ __forceinline__ void copy_vectors(uint32_t stage, const StatisticsEntry& entry,
                                               int64_t column, int shift) const {
    constexpr int kItem = static_cast<int>(sizeof(Element));
    const Layer& layer = entry.layer;
    const int64_t first = column + lane_ * kSize;
    const int64_t columns_left = layer.columns - first;
    const int bytes_left =
        static_cast<int>(columns_left < kStageVectors * kWarpWidth ? columns_left
                                                                   : kStageVectors * kWarpWidth) *
        kItem;
    const auto* h =
        reinterpret_cast<const char*>(row_of(layer.hidden, layer.hidden_row_stride, first));
    const auto* g = reinterpret_cast<const char*>(row_of(layer.grad, layer.grad_row_stride, first));
    const uint32_t target = stage + lane_ * kVectorBytes;
    const int last = (1 << shift) - 1;
    int row = row_;
#pragma unroll
    for (int i = 0; i < kStageVectors; ++i) {
      const int bytes = row < row_count() ? bytes_left - (i & last) * kWarpBytes : 0;
      copy_vector<kVectorBytes>(target + i * kWarpBytes, h, bytes);
      copy_vector<kVectorBytes>(target + i * kWarpBytes + kStageBytes / 2, g, bytes);
      if (((i + 1) & last) == 0) {
        h += layer.hidden_row_stride * kItem - last * kWarpBytes;
        g += layer.grad_row_stride * kItem - last * kWarpBytes;
        ++row;
      } else {
        h += kWarpBytes;
        g += kWarpBytes;
      }
    }
  }

  // Rows that are not 16 bytes apart.
  __device__ __forceinline__ void copy_slowly(uint32_t stage, const StatisticsEntry& entry,
                                              int64_t column, int shift) const {
    constexpr int kItem = static_cast<int>(sizeof(Element));
    const Layer& layer = entry.layer;
#pragma unroll 1
    for (int i = 0; i < 2 * kStageVectors; ++i) {
      const bool is_grad = i >= kStageVectors;
      const int row = row_ + (i % kStageVectors >> shift);
      const int64_t first =
          column + (i & ((1 << shift) - 1)) * kWarpWidth + static_cast<int64_t>(lane_) * kSize;
      const int64_t left = row < row_count() ? layer.columns - first : 0;
      const int count = left >= kSize ? kSize : left > 0 ? static_cast<int>(left) : 0;
      const auto* source = static_cast<const Element*>(is_grad ? layer.grad : layer.hidden) +
                           row * (is_grad ? layer.grad_row_stride : layer.hidden_row_stride) +
                           first;
      const uint32_t target = stage + i * kWarpBytes + lane_ * kVectorBytes;
      if (kItem <= 8 && entry.copy_bytes == 8) {
        copy_vector<8>(target, source, count * kItem);
      } else if (kItem <= 4 && entry.copy_bytes == 4) {
        copy_vector<4>(target, source, count * kItem);
      } else {
        Vector<Element> x;
        x.load(source, count, false);
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(target), "r"(x.bits.x),
                     "r"(x.bits.y), "r"(x.bits.z), "r"(x.bits.w)
                     : "memory");
      }
    }
  }

  __device__ __forceinline__ int row_count() const { return static_cast<int>(units_.table.rows); }

  __device__ __forceinline__ void leave_tile() {
    const StatisticsEntry& entry = units_.layer();
    tile_ += entry.num_partials;
    row_ = 0;
    if (tile_ < entry.num_tiles) return;
    units_.next();
    enter();
  }

  Units<kCapacity> units_;
  unsigned char* memory_;
  int lane_;
  int slot_ = 0;
  int tile_ = 0;
  int row_ = 0;
};

// A lane's column sums of a tile.
template <typename Element, int kVectors>
struct ColumnSums {
  using Sums = typename SumsOf<Element>::type;
  static constexpr int kWords = Sums::kColumnWords;
  static constexpr int kSize = Vector<Element>::kSize;
  static constexpr int kRun = Vector<Element>::kRun;
  static constexpr int kWarpWidth = kSize * kWarpSize;

  double words[kVectors][kSize][kWords] = {};

  // Calls figure(vector, element) for every column of the lane and writes what it returns, in runs
  // of 16 bytes where they are aligned.
  template <typename Figure>
  __device__ __forceinline__ static void write(void* means, const StatisticsEntry& entry,
                                               int64_t tile, int lane, Figure&& figure) {
    using Mean = MeanOf<Sums>;
    const int64_t begin = tile * (kVectors * kWarpWidth);
    auto* target = static_cast<Mean*>(means) + entry.layer.mean_offset;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int first = 0; first < kSize; first += kRun) {
        const int64_t column = begin + v * kWarpWidth + Vector<Element>::column(first, lane);
        Mean run[kRun];
#pragma unroll
        for (int e = 0; e < kRun; ++e) run[e] = figure(v, first + e);
        if (entry.aligned_means && column + kRun <= entry.layer.columns) {
          uint4 bits;
          static_assert(sizeof(run) == sizeof(bits));
          memcpy(&bits, run, sizeof(bits));
          // Not read again before the call ends.
          __stcs(reinterpret_cast<uint4*>(target + column), bits);
        } else {
#pragma unroll
          for (int e = 0; e < kRun; ++e) {
            if (column + e < entry.layer.columns) target[column + e] = run[e];
          }
        }
      }
    }
  }

  __device__ __forceinline__ void write_means(void* means, const StatisticsEntry& entry,
                                              int64_t tile, int lane, const Divisor& rows) const {
    write(means, entry, tile, lane, [&](int v, int e) { return mean_of<Sums>(words[v][e], rows); });
  }
};

// Adds one vector of h and of g to the squares of their rows and, where asked, g to the sums of its
// columns.
template <typename Element>
__device__ __forceinline__ void add_vectors(
    const Vector<Element>& h, const Vector<Element>& g, bool with_columns,
    double (&h_words)[SumsOf<Element>::type::kSquareWords],
    double (&g_words)[SumsOf<Element>::type::kSquareWords],
    double (&columns)[Vector<Element>::kSize][SumsOf<Element>::type::kColumnWords]) {
  using Sums = typename SumsOf<Element>::type;
  const Widened<Element> wide_h(h);
  const Widened<Element> wide_g(g);
#pragma unroll
  for (int e = 0; e < Vector<Element>::kSize; ++e) {
    Sums::add_square(h_words, wide_h.x[e]);
    Sums::add_square(g_words, wide_g.x[e]);
  }
  if (with_columns) {
#pragma unroll
    for (int e = 0; e < Vector<Element>::kSize; ++e) Sums::add_column(columns[e], wide_g.x[e]);
  }
}

// values[base + at + i] += of[i], where `at` is not known at compile time.
template <int kCount, int kSize>
__device__ __forceinline__ void add_at(double (&values)[kSize], int base, int at,
                                       const double (&of)[kCount]) {
#pragma unroll
  for (int slot = 0; slot < kRowGroup; slot += kCount) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (slot == at) values[base + slot + i] += of[i];
    }
  }
}

// What all parts of the kernel know.
template <int kCapacity>
struct Worker {
  const StatisticsTable<kCapacity>& table;
  double* slots;  // this warp's
  int lane;

  // Writes or leaves a row's squares; `partial` of entry.num_partials.
  template <typename Sums>
  __device__ __forceinline__ void write_squares(const StatisticsEntry& entry, int64_t partial,
                                                int which, int64_t row,
                                                const double (&words)[Sums::kSquareWords]) const {
    if (entry.num_partials == 1) {
      table.norms[which][entry.layer.norm_offset + row] = Sums::norm(words);
      return;
    }
    double* target = table.workspace + entry.squares_offset +
                     ((partial * 2 + which) * table.rows + row) * Sums::kSquareWords;
#pragma unroll
    for (int w = 0; w < Sums::kSquareWords; ++w) target[w] = words[w];
  }
};

// The vectors of h and of g in place `at` of a stage.
template <typename Element>
__device__ __forceinline__ void load_stage(const unsigned char* stage, int at, int lane,
                                           Vector<Element>& h, Vector<Element>& g) {
  constexpr int kBytes = kWarpSize * kVectorBytes;
  h.load_shared(stage + at * kBytes, lane);
  g.load_shared(stage + kStageBytes / 2 + at * kBytes, lane);
}

__device__ __forceinline__ float mean_of_one(float x) { return x + 0.0f; }  // zero has no sign
__device__ __forceinline__ float mean_of_one(__half x) { return mean_of_one(__half2float(x)); }
__device__ __forceinline__ float mean_of_one(__nv_bfloat16 x) {
  return mean_of_one(__bfloat162float(x));
}

// A unit of up to kRows rows, of a narrow type.
template <typename Element, int kRows, int kCapacity, typename Feed>
__device__ __forceinline__ void walk_few(const Worker<kCapacity>& worker, Feed& feeder,
                                         const StatisticsEntry& entry, int segment) {
  constexpr int kVectors = 1 << few_shift(kRows);
  constexpr int kStageRows = kStageVectors / kVectors;
  static_assert(kRows % kStageRows == 0);
  using Columns = ColumnSums<Element, kVectors>;
  const int rows = static_cast<int>(worker.table.rows);
  const bool with_means = entry.layer.mean_offset != kNoMean;
  double squares[2 * kRowGroup] = {};
#pragma unroll 1
  for (int tile = segment; tile < entry.num_tiles; tile += entry.num_partials) {
    Columns columns;
#pragma unroll 1
    for (int first = 0; first < rows; first += kStageRows) {
      const unsigned char* stage = feeder.acquire();
      double h_sums[kStageRows];
      double g_sums[kStageRows];
      Vector<Element> only[kVectors];
#pragma unroll
      for (int r = 0; r < kStageRows; ++r) {
        double h_words[1] = {};
        double g_words[1] = {};
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          Vector<Element> h;
          load_stage(stage, r * kVectors + v, worker.lane, h, only[v]);
          add_vectors<Element>(h, only[v], with_means && kRows != 1, h_words, g_words,
                               columns.words[v]);
        }
        h_sums[r] = h_words[0];
        g_sums[r] = g_words[0];
      }
      if constexpr (kRows == 1) {
        if (with_means) {
          Columns::write(worker.table.means, entry, tile, worker.lane,
                         [&](int v, int e) { return mean_of_one(only[v].elements[e]); });
        }
      }
      feeder.release();
      add_at(squares, 0, first, h_sums);
      add_at(squares, kRowGroup, first, g_sums);
    }
    if constexpr (kRows != 1) {
      if (with_means) {
        columns.write_means(worker.table.means, entry, tile, worker.lane, worker.table.divisor);
      }
    }
  }
  const double words[1] = {sum_transposed(squares, worker.lane)};
  const int row = worker.lane / 4 % 4;
  if (worker.lane % 4 == 0 && row < rows) {
    worker.template write_squares<NarrowSums>(entry, segment, worker.lane / 16, row, words);
  }
}

// Adds a group of rows, [row, row + 4) as far as they are before `end`, to the column sums; lane i
// returns the squares of h's (i < 16) or g's row i / 4 % 4.
template <typename Element, int kVectors, typename Feed>
__device__ __forceinline__ void add_group(Feed& feeder, int row, int end, int lane,
                                          bool with_columns, ColumnSums<Element, kVectors>& columns,
                                          double (&totals)[SumsOf<Element>::type::kSquareWords]) {
  constexpr int kWords = SumsOf<Element>::type::kSquareWords;
  constexpr int kStageRows = kStageVectors / kVectors;
  double squares[kWords][2 * kRowGroup] = {};
#pragma unroll 1
  for (int first = 0; first < kRowGroup && row + first < end; first += kStageRows) {
    const unsigned char* stage = feeder.acquire();
    double h_sums[kWords][kStageRows];
    double g_sums[kWords][kStageRows];
#pragma unroll
    for (int r = 0; r < kStageRows; ++r) {
      double h_words[kWords] = {};
      double g_words[kWords] = {};
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        Vector<Element> h;
        Vector<Element> g;
        load_stage(stage, r * kVectors + v, lane, h, g);
        add_vectors<Element>(h, g, with_columns, h_words, g_words, columns.words[v]);
      }
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        h_sums[w][r] = h_words[w];
        g_sums[w][r] = g_words[w];
      }
    }
    feeder.release();
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      add_at(squares[w], 0, first, h_sums[w]);
      add_at(squares[w], kRowGroup, first, g_sums[w]);
    }
  }
#pragma unroll
  for (int w = 0; w < kWords; ++w) totals[w] = sum_transposed(squares[w], lane);
}

// A unit of up to kStreamRows rows.
template <typename Element, int kVectors, int kCapacity, typename Feed>
__device__ __forceinline__ void walk_stream(const Worker<kCapacity>& worker, Feed& feeder,
                                            const StatisticsEntry& entry, int segment) {
  using Sums = typename SumsOf<Element>::type;
  constexpr int kWords = Sums::kSquareWords;
  const int rows = static_cast<int>(worker.table.rows);
  const bool with_means = entry.layer.mean_offset != kNoMean;
  double* slots = worker.slots;  // [2, kStreamRows, words]
#pragma unroll 1
  for (int tile = segment; tile < entry.num_tiles; tile += entry.num_partials) {
    ColumnSums<Element, kVectors> columns;
#pragma unroll 1
    for (int row = 0; row < rows; row += kRowGroup) {
      double totals[kWords];
      add_group<Element, kVectors>(feeder, row, rows, worker.lane, with_means, columns, totals);
      const int of = row + worker.lane / 4 % 4;
      if (worker.lane % 4 == 0 && of < rows) {
        double* slot = slots + (worker.lane / 16 * kStreamRows + of) * kWords;
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          slot[w] = tile == segment ? totals[w] : slot[w] + totals[w];
        }
      }
    }
    if (with_means) {
      columns.write_means(worker.table.means, entry, tile, worker.lane, worker.table.divisor);
    }
  }
  __syncwarp();
  for (int i = worker.lane; i < 2 * rows; i += kWarpSize) {
    const int which = i >= rows;
    const int row = which ? i - rows : i;
    double words[kWords];
#pragma unroll
    for (int w = 0; w < kWords; ++w) words[w] = slots[(which * kStreamRows + row) * kWords + w];
    worker.template write_squares<Sums>(entry, segment, which, row, words);
  }
  __syncwarp();
}

template <Walk kWalk>
constexpr int kSlotMemory = kWalk == Walk::kStream ? kSlotBytes : 0;

template <typename Element, Walk kWalk, int kCapacity>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    stream_layers_kernel(const __grid_constant__ StatisticsTable<kCapacity> table) {
  extern __shared__ __align__(128) unsigned char memory[];
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  auto* slots = reinterpret_cast<double*>(memory + warp * (kSlotMemory<kWalk> / kWarps));
  const Worker<kCapacity> worker{table, slots, lane};
  constexpr bool kIsFew = kWalk != Walk::kStream;
  constexpr int kShift = kIsFew ? few_shift(few_rows(kWalk)) : sizeof(Element) == 8 ? 0 : -1;
  Feeder<Element, kCapacity, kShift> feeder(
      table, memory + kSlotMemory<kWalk> + warp * table.stages * kStageBytes, warp, lane);
  Units<kCapacity> units(table, warp, kWarps);
#pragma unroll 1
  for (; units.left(); units.next()) {
    const StatisticsEntry& entry = units.layer();
    if constexpr (kIsFew) {
      walk_few<Element, few_rows(kWalk)>(worker, feeder, entry, units.local());
    } else if (sizeof(Element) == 8 || entry.vector_shift == 0) {
      walk_stream<Element, 1>(worker, feeder, entry, units.local());
    } else if constexpr (sizeof(Element) < 8) {
      // Wider, the column sums of 16-bit types would not fit the registers.
      if (sizeof(Element) == 2 || entry.vector_shift == 1) {
        walk_stream<Element, 2>(worker, feeder, entry, units.local());
      } else if constexpr (sizeof(Element) == 4) {
        walk_stream<Element, 4>(worker, feeder, entry, units.local());
      }
    }
  }
}

}  // namespace fadiag
