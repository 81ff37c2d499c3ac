// direction_cosines on the GPU: the Gram matrix of K directions per layer, then their cosines.
//
// Layout:        a work unit is (group, pair of 16-direction panels, chunk of columns), one block
//                each; a group is one layer of one network. A warp holds two 8-row halves of either
//                panel and multiplies them with the float64 tensor-core instruction m8n8k4. Its A
//                and B fragments have the same lane layout, so X * X^T needs each element once, and
//                a lane may take any columns as long as all lanes agree.
// Accumulation:  float64; products of fp16, bf16 and fp32 are exact in it but for their rounding.
//                float64 directions are scaled by a power of two each, from a first pass.
// Determinism:   warps and chunks are merged in a fixed order. No atomics.
#pragma once

#include <cstdint>

#include "elements.cuh"

namespace fadiag {

constexpr int kCosineWarps = 8;
constexpr int kCosineThreads = kCosineWarps * 32;
constexpr int kPanel = 16;
constexpr int kPanelProducts = kPanel * kPanel;
// A lane's turn: this many bytes of each direction in flight. Shorter elements make more doubles of
// the same bytes; half as many keep them in registers.
template <typename Element>
constexpr int kCosineUnroll = sizeof(Element) >= 4 ? 4 : 2;
constexpr int64_t kCosineChunk = 4096;  // columns: 256 KB of sixteen float32 directions

struct CosineGroup {
  int64_t columns;
  int first_unit;
  int num_chunks;
  int first_vector;  // into vectors[]; K follow one another
  int aligned;
};

template <int kVectors, int kGroups>
struct CosineTable {
  const void* vectors[kVectors];
  CosineGroup groups[kGroups];
  int num_groups;
  int num_batches;
  int num_pairs;         // of panels: P * (P + 1) / 2
  const double* scales;  // [groups * K], or null where no scaling is needed
  double* products;      // [units, 16, 16]
  double* cosines;       // [groups, K, K]
};

constexpr int kSmallVectors = 256;
constexpr int kSmallGroups = 64;
constexpr int kLargeVectors = 3072;
constexpr int kLargeGroups = 320;
static_assert(sizeof(CosineTable<kLargeVectors, kLargeGroups>) <= 32764);

__device__ __forceinline__ void multiply_add(double (&c)[2], double a, double b) {
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
      : "+d"(c[0]), "+d"(c[1])
      : "d"(a), "d"(b));
}

template <int kVectors, int kGroups>
__device__ __forceinline__ int find_group(const CosineTable<kVectors, kGroups>& table, int unit) {
  int low = 0;
  int high = table.num_groups;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.groups[middle].first_unit <= unit) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Panels (a, b), a <= b, of pair number `pair`, counted row by row of the upper triangle.
__device__ __forceinline__ void find_panels(int pair, int num_batches, int* a, int* b) {
  const int panels = (num_batches + kPanel - 1) / kPanel;
  int row = 0;
  while (pair >= panels - row) {
    pair -= panels - row;
    ++row;
  }
  *a = row;
  *b = row + pair;
}

template <typename Element, int kVectors, int kGroups>
__global__ void __launch_bounds__(kCosineThreads, sizeof(Element) == 4 ? 2 : 1)
    direction_products_kernel(const __grid_constant__ CosineTable<kVectors, kGroups> table) {
  constexpr int kSize = Vector<Element>::kSize;
  constexpr int kQuads = 4;  // lanes along the columns
  const CosineGroup& group = table.groups[find_group(table, blockIdx.x)];
  const int unit = blockIdx.x - group.first_unit;
  const int pair = unit % table.num_pairs;
  const int64_t chunk = unit / table.num_pairs;
  int panel_a;
  int panel_b;
  find_panels(pair, table.num_batches, &panel_a, &panel_b);
  const bool diagonal = panel_a == panel_b;

  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int quad = lane % kQuads;
  const int64_t begin = chunk * kCosineChunk;
  const int64_t end = group.columns < begin + kCosineChunk ? group.columns : begin + kCosineChunk;

  // Halves of panel a, then of panel b. A lane holds one direction of each.
  const Element* source[4];
  double scale[4];
  bool present[4];
#pragma unroll
  for (int half = 0; half < 4; ++half) {
    const int row = (half < 2 ? panel_a : panel_b) * kPanel + half % 2 * 8 + lane / kQuads;
    present[half] = row < table.num_batches && !(diagonal && half >= 2);
    const int vector = group.first_vector + (present[half] ? row : 0);
    source[half] = static_cast<const Element*>(table.vectors[vector]);
    scale[half] = table.scales && present[half] ? table.scales[vector] : 1.0;
  }
  const bool second_half = panel_b * kPanel + 8 < table.num_batches;

  double sums[2][2][2] = {};  // [half of a][half of b][element]
  constexpr int kUnroll = kCosineUnroll<Element>;
  constexpr int kStep = kUnroll * kQuads * kSize;
  for (int64_t first = begin + warp * kStep; first < end; first += kCosineWarps * kStep) {
    Vector<Element> x[4][kUnroll];
#pragma unroll
    for (int half = 0; half < 4; ++half) {
      if (half >= 2 && diagonal) continue;
      if (half % 2 == 1 && !second_half && diagonal) continue;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t column = first + (u * kQuads + quad) * kSize;
        const int64_t left = end - column;
        const int valid = !present[half] || left <= 0 ? 0
                          : left >= kSize             ? kSize
                                                      : static_cast<int>(left);
        x[half][u].load(source[half] + column, valid, group.aligned);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        double v[4];
#pragma unroll
        for (int half = 0; half < 4; ++half) v[half] = x[half][u][e] * scale[half];
        if (diagonal) {
          multiply_add(sums[0][0], v[0], v[0]);
          if (second_half) {
            multiply_add(sums[0][1], v[0], v[1]);
            multiply_add(sums[1][1], v[1], v[1]);
          }
        } else {
          multiply_add(sums[0][0], v[0], v[2]);
          multiply_add(sums[1][0], v[1], v[2]);
          if (second_half) {
            multiply_add(sums[0][1], v[0], v[3]);
            multiply_add(sums[1][1], v[1], v[3]);
          }
        }
      }
    }
  }

  __shared__ double shared[kCosineWarps][kPanelProducts];
#pragma unroll
  for (int a = 0; a < 2; ++a) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const int row = a * 8 + lane / kQuads;
      const int column = b * 8 + quad * 2;
      shared[warp][row * kPanel + column] = sums[a][b][0];
      shared[warp][row * kPanel + column + 1] = sums[a][b][1];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kPanelProducts; i += kCosineThreads) {
    double total = shared[0][i];
#pragma unroll
    for (int w = 1; w < kCosineWarps; ++w) total += shared[w][i];
    table.products[static_cast<int64_t>(blockIdx.x) * kPanelProducts + i] = total;
  }
}

template <int kVectors, int kGroups>
__device__ double merged_product(const CosineTable<kVectors, kGroups>& table,
                                 const CosineGroup& group, int i, int j) {
  const int panels = (table.num_batches + kPanel - 1) / kPanel;
  const int a = i / kPanel;
  const int b = j / kPanel;
  const int pair = a * panels - a * (a - 1) / 2 + (b - a);
  const int index = i % kPanel * kPanel + j % kPanel;
  double total = 0.0;
#pragma unroll 4
  for (int64_t chunk = 0; chunk < group.num_chunks; ++chunk) {
    total +=
        table
            .products[(group.first_unit + chunk * table.num_pairs + pair) * kPanelProducts + index];
  }
  return total;
}

// One block a group. Squares first: every cosine needs two of them.
template <int kVectors, int kGroups>
__global__ void finish_cosines_kernel(
    const __grid_constant__ CosineTable<kVectors, kGroups> table) {
  const CosineGroup& group = table.groups[blockIdx.x];
  const int count = table.num_batches;
  double* cosines = table.cosines + static_cast<int64_t>(blockIdx.x) * count * count;
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    cosines[static_cast<int64_t>(i) * count + i] = merged_product(table, group, i, i);
  }
  __syncthreads();
  for (int64_t p = threadIdx.x; p < static_cast<int64_t>(count) * count; p += blockDim.x) {
    const int i = static_cast<int>(p / count);
    const int j = static_cast<int>(p % count);
    if (i >= j) continue;
    const double value =
        cosine(merged_product(table, group, i, j), cosines[static_cast<int64_t>(i) * count + i],
               cosines[static_cast<int64_t>(j) * count + j]);
    cosines[static_cast<int64_t>(i) * count + j] = value;
    cosines[static_cast<int64_t>(j) * count + i] = value;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    double& diagonal = cosines[static_cast<int64_t>(i) * count + i];
    diagonal = self_cosine(diagonal);
  }
}

// One block a vector.
template <int kVectors, int kGroups>
__global__ void direction_scales_kernel(
    const __grid_constant__ CosineTable<kVectors, kGroups> table, double* scales) {
  const CosineGroup& group = table.groups[blockIdx.y];
  const int vector = group.first_vector + blockIdx.x;
  const double largest =
      largest_magnitude(static_cast<const double*>(table.vectors[vector]), group.columns);
  if (threadIdx.x == 0) scales[vector] = power_of_two_scale(largest);
}

// Launches all kernels for one table. `scales` is workspace of K doubles a group for float64
// directions, null for the others; table.scales points to it as well.
template <typename Element, int kVectors, int kGroups>
cudaError_t launch_direction_cosines(const CosineTable<kVectors, kGroups>& table, int64_t num_units,
                                     double* scales, cudaStream_t stream) {
  if (scales != nullptr) {
    const dim3 grid(table.num_batches, table.num_groups);
    direction_scales_kernel<kVectors, kGroups><<<grid, kCosineThreads, 0, stream>>>(table, scales);
  }
  if (num_units > 0) {
    direction_products_kernel<Element, kVectors, kGroups>
        <<<static_cast<unsigned>(num_units), kCosineThreads, 0, stream>>>(table);
  }
  finish_cosines_kernel<kVectors, kGroups><<<table.num_groups, kCosineThreads, 0, stream>>>(table);
  return cudaGetLastError();
}

}  // namespace fadiag
