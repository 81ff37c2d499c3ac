// What one lane accumulates while its warp walks down the rows, and how warps put it together.
#pragma once

#include "elements.cuh"

namespace fadiag {

constexpr int kThreads = kWarps * kWarpSize;

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

// A column's mean as it is stored.
template <typename Sums>
using MeanOf = std::conditional_t<std::is_same_v<Sums, WideSums>, double, float>;

template <typename Sums>
__device__ __forceinline__ MeanOf<Sums> mean_of(const double (&words)[Sums::kColumnWords],
                                                const Divisor& rows) {
  return static_cast<MeanOf<Sums>>(Sums::mean(words, rows));
}

template <typename Sums>
__device__ __forceinline__ void write_mean(void* means, int64_t index,
                                           const double (&words)[Sums::kColumnWords],
                                           const Divisor& rows) {
  static_cast<MeanOf<Sums>*>(means)[index] = mean_of<Sums>(words, rows);
}

// The sums of a lane's columns over all its rows, and of its share of four rows.
template <typename Element>
struct LaneSums {
  using Sums = typename SumsOf<Element>::type;
  static constexpr int kWords = Sums::kSquareWords;
  static constexpr int kColumnWords = Sums::kColumnWords;
  static constexpr int kSize = Vector<Element>::kSize;
  static_assert(kColumnWords * kSize <= 8, "a block's column sums fit their shared memory");

  double columns[kColumnWords][kSize] = {};
  double squares[kWords][2 * kRowGroup];  // of h, then of g

  // Adds row i of a group; all four are added, absent ones as zeros.
  __device__ __forceinline__ void add_row(int i, const Vector<Element>& h,
                                          const Vector<Element>& g) {
    double h_words[kWords] = {};
    double g_words[kWords] = {};
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      Sums::add_square(h_words, h[e]);
      const double x = g[e];
      Sums::add_square(g_words, x);
      double words[kColumnWords];
#pragma unroll
      for (int w = 0; w < kColumnWords; ++w) words[w] = columns[w][e];
      Sums::add_column(words, x);
#pragma unroll
      for (int w = 0; w < kColumnWords; ++w) columns[w][e] = words[w];
    }
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      squares[w][i] = h_words[w];
      squares[w][kRowGroup + i] = g_words[w];
    }
  }

  // Stores the group's row sums over this warp: [which, row, word, warp column].
  __device__ __forceinline__ void store_squares(double* shared, int slots, int first_row, int rows,
                                                int warp_columns, int warp_column, int lane) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const double total = sum_transposed(squares[w], lane);
      const int which = lane / 16;
      const int row = first_row + lane / 4 % 4;
      if (lane % 4 == 0 && row < rows) {
        shared[((which * slots + row) * kWords + w) * warp_columns + warp_column] = total;
      }
    }
  }

  // The merged words of one row.
  __device__ __forceinline__ static void load_squares(const double* shared, int slots, int which,
                                                      int row, int warp_columns,
                                                      double (&words)[kWords]) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const double* found = shared + ((which * slots + row) * kWords + w) * warp_columns;
      double total = found[0];
      for (int c = 1; c < warp_columns; ++c) total += found[c];
      words[w] = total;
    }
  }

  // Stores this lane's column sums: [element, word, warp row, lane of the tile], so that
  // consecutive lanes meet consecutive banks.
  __device__ __forceinline__ void store_columns(double* shared, int tile_lanes, int tile_lane,
                                                int warp_rows, int warp_row) const {
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
#pragma unroll
      for (int w = 0; w < kColumnWords; ++w) {
        shared[((e * kColumnWords + w) * warp_rows + warp_row) * tile_lanes + tile_lane] =
            columns[w][e];
      }
    }
  }

  // The merged words of column c of the tile.
  __device__ __forceinline__ static void load_columns(const double* shared, int tile_lanes,
                                                      int warp_rows, int c,
                                                      double (&words)[kColumnWords]) {
#pragma unroll
    for (int w = 0; w < kColumnWords; ++w) {
      const double* found =
          shared + (c % kSize * kColumnWords + w) * warp_rows * tile_lanes + c / kSize;
      double total = found[0];
      for (int r = 1; r < warp_rows; ++r) total += found[r * tile_lanes];
      words[w] = total;
    }
  }
};

}  // namespace fadiag
