// What the kernels of layer_statistics get by value. No torch, no device code.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../layer_table.h"

namespace fadiag {

// One layer of the table.
struct StatisticsEntry {
  Layer layer;
  int64_t squares_offset;  // into the workspace: [tiles, 2, rows, words]; unused for one tile
  int64_t sums_offset;     // into the workspace: [splits, words, columns]; unused for one split
  int first_unit;
  int num_tiles;
  int num_splits;
  int16_t rows_per_unit;
  int8_t warp_columns;
  bool aligned : 1;      // 16-byte loads are possible in every row
  bool bulk : 1;         // and so are bulk copies: rows are whole vectors
  bool packed_rows : 1;  // a tile's rows follow one another in memory without a gap
};

template <int kCapacity>
struct StatisticsTable {
  StatisticsEntry entries[kCapacity];
  int count;
  int num_units;
  int64_t rows;
  double* norms[2];  // of hiddens and of grads
  void* means;
  double* workspace;
};

// Kernel parameters end at 32,764 bytes; most calls need far fewer, and fewer launch faster.
constexpr int kSmallTable = 40;
constexpr int kLargeTable = 320;
static_assert(sizeof(StatisticsTable<kLargeTable>) <= 32764);

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fadiag
