// The CPU kernels as plain functions, one set per instruction set; chosen once, at load time.
#pragma once

#include <cstdint>

#include "../layer_table.h"

namespace fadiag {

// A block of one layer: rows [row_begin, row_end) by columns [column_begin, column_end).
struct Tile {
  int64_t row_begin;
  int64_t row_end;
  int64_t column_begin;
  int64_t column_end;
};

// `type` is an ElementType: float16, bfloat16, float32 or float64.
struct CpuKernels {
  // Writes the words of each row's squares, [rows, words], and of each column's sum,
  // [words, columns], of one tile; the latter unless column_sums is null.
  void (*statistics_tile)(int type, const Layer& layer, const Tile& tile, double* hidden_squares,
                          double* grad_squares, double* column_sums);
  // Writes the means over `rows` of the columns whose sums are given, [words, columns] with
  // `word_stride` between words: as double where `type` is float64, else as float.
  void (*column_means)(int type, const double* sums, int64_t word_stride, int64_t columns,
                       int64_t rows, void* means);
  // Writes the largest magnitude of a vector (NaN if it holds one).
  double (*largest_magnitude)(int type, const void* vector, int64_t count);
  // Writes the dot products of vectors [0, num_vectors), scaled, over a range of columns:
  // [num_vectors, num_vectors], upper triangle.
  void (*dot_products)(int type, const void* const* vectors, const double* scales,
                       int64_t num_vectors, int64_t column_begin, int64_t column_end,
                       double* products);
  const char* instruction_set;
};

extern const CpuKernels kGenericKernels;
#if defined(__x86_64__)
extern const CpuKernels kAvx2Kernels;
extern const CpuKernels kAvx512Kernels;
#endif

}  // namespace fadiag
