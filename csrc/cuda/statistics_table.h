// What the kernels of layer_statistics get by value, and how the work is cut up. No torch, no
// device code.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../accumulate.h"
#include "../layer_table.h"

namespace fadiag {

constexpr int kVectorBytes = 16;
constexpr int kWarpSize = 32;
constexpr int kWarps = 8;
// A turn of the row sums: so many rows of h and of g go through one transposed warp sum.
constexpr int kRowGroup = 4;
// A warp's stage in shared memory: four vectors of 16 bytes per lane, of either tensor.
constexpr int kStageVectors = 4;

// One layer of the table.
struct StatisticsEntry {
  Layer layer;
  int64_t squares_offset;  // into the workspace: [partials, 2, rows, words]; unused for one partial
  int64_t sums_offset;     // into the workspace: [splits, words, columns]; unused for one split
  int first_unit;
  int num_tiles;     // of columns
  int num_partials;  // units that share a row
  int num_splits;    // units that share a column
  int rows_per_unit;
  int8_t vector_shift;  // a lane has 1 << this many vectors side by side in a tile
  int8_t copy_bytes;  // of an asynchronous copy: 16, 8 or 4 by alignment, 0 where none is possible
  int8_t warp_columns;     // warps side by side in a tile of small_layers_kernel and of a team
  bool aligned : 1;        // 16-byte loads are possible in every row
  bool aligned_means : 1;  // and 16-byte stores of the means
  bool bulk : 1;           // and bulk copies: rows are whole vectors
  bool packed_rows : 1;    // a tile's rows follow one another in memory without a gap
};

template <int kCapacity>
struct StatisticsTable {
  StatisticsEntry entries[kCapacity];
  int count;
  int num_units;
  int64_t bytes;     // of all data
  int shared_units;  // the first ones, and by how many blocks they are shared: units.cuh
  int resident;
  int stages;  // of a warp's ring
  int64_t rows;
  Divisor divisor{1.0};  // by the rows
  double* norms[2];      // of hiddens and of grads
  void* means;
  double* workspace;
};

// Kernel parameters end at 32,764 bytes; most calls need far fewer, and fewer launch faster.
constexpr int kSmallTable = 32;
constexpr int kLargeTable = 280;
static_assert(sizeof(StatisticsTable<kLargeTable>) <= 32764);

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How warps walk over a layer, by its rows.
//   few     up to four: a warp streams tiles of columns and keeps the sums of all rows in registers
//   stream  up to 32, or 8 where tiles are few: the same, with the rows' sums in shared memory
//   team    more: a block's warps share a tile's rows and merge their column sums
enum class Walk { kFew1, kFew2, kFew4, kStream, kTeam };
constexpr int kStreamRows = 32;

#if defined(__CUDACC__)
#define FADIAG_CONSTEXPR __host__ __device__ constexpr
#else
#define FADIAG_CONSTEXPR constexpr
#endif

// Rows whose sums stay in registers; zero for the other walks.
FADIAG_CONSTEXPR int few_rows(Walk walk) {
  return walk == Walk::kFew1 ? 1 : walk == Walk::kFew2 ? 2 : walk == Walk::kFew4 ? 4 : 0;
}
FADIAG_CONSTEXPR int few_shift(int rows) { return rows == 1 ? 2 : 1; }

// The plan of a layer: a function of rows, columns and element type alone, so that the order in
// which elements are added is one too, whatever the chip and the other layers of the call.
struct StatisticsPlan {
  // Streams of a layer: enough to fill a chip with one layer.
  static constexpr int64_t kMostStreams = 1024;
  // A stream of up to this many bytes a tile is short enough for a layer of few tiles.
  static constexpr int64_t kShortTileBytes = 8 << 10;
  static constexpr int64_t kManyTiles = 256;
  // Units of a 64th of a layer spread even one layer over many multiprocessors; above the upper
  // bound the tail would show, below the lower one the cost of a unit's end.
  static constexpr int64_t kUnitsPerLayer = 64;
  static constexpr int64_t kMinUnitBytes = 16 << 10;
  static constexpr int64_t kMaxUnitBytes = 1 << 20;
  static constexpr int64_t kLargeLayerBytes = 16 << 20;

  // A block's row sums in shared memory: rows of a unit times warp_columns.
  static constexpr int kRowSlots = 1024;

  Walk walk;
  int vectors = 1;
  int warp_columns = 1;
  int64_t rows_per_unit;
  int64_t num_tiles;
  int64_t num_partials;
  int64_t num_splits;
  int64_t num_units;

  static Walk walk_of(int64_t rows, int64_t columns, int64_t element_size) {
    if (rows > kStreamRows) return Walk::kTeam;
    if (rows <= 4 && element_size < 8) {
      return rows == 1 ? Walk::kFew1 : rows == 2 ? Walk::kFew2 : Walk::kFew4;
    }
    // One warp would be long at many rows, and few warps cannot keep the memory busy.
    const int64_t widest = most_vectors(element_size) * kWarpSize * kVectorBytes / element_size;
    const bool has_many_tiles = columns >= kManyTiles * widest;
    return rows <= kShortStreamRows || has_many_tiles ? Walk::kStream : Walk::kTeam;
  }

  StatisticsPlan(int64_t rows, int64_t columns, int64_t element_size, int64_t square_words)
      : walk(walk_of(rows, columns, element_size)) {
    if (walk == Walk::kTeam) {
      plan_team(rows, columns, element_size, square_words);
    } else {
      plan_streams(rows, columns, element_size);
    }
  }

 private:
  static constexpr int64_t kShortStreamRows = 8;

  // Sixteen doubles a lane for the column sums, whatever the type.
  static int most_vectors(int64_t element_size) {
    return element_size == 8 ? 1 : element_size == 4 ? 4 : 2;
  }

  void plan_streams(int64_t rows, int64_t columns, int64_t element_size) {
    const int64_t warp_width = kWarpSize * kVectorBytes / element_size;
    const auto tiles = [&](int64_t v) {
      // A layer without columns still has norms (zero) to write.
      return std::max<int64_t>(1, ceil_div(columns, v * warp_width));
    };
    if (walk == Walk::kStream) {
      vectors = most_vectors(element_size);
      const auto tile_bytes = [&] { return 2 * rows * vectors * kWarpSize * kVectorBytes; };
      while (vectors > 1 && tile_bytes() > kShortTileBytes && tiles(vectors) < kManyTiles) {
        vectors /= 2;
      }
    } else {
      vectors = 1 << few_shift(few_rows(walk));
    }
    num_tiles = tiles(vectors);
    rows_per_unit = rows;
    num_splits = 1;
    num_partials = ceil_div(num_tiles, ceil_div(num_tiles, kMostStreams));
    num_units = num_partials;
  }

  void plan_team(int64_t rows, int64_t columns, int64_t element_size, int64_t square_words) {
    const int64_t warp_width = kWarpSize * kVectorBytes / element_size;
    const int64_t layer_bytes = 2 * rows * columns * element_size;
    // Few rows: warps side by side, so that each still has several groups of rows to walk. Large
    // layers: wide tiles, because every tile writes a partial sum for each of its rows.
    warp_columns = rows <= 64 || layer_bytes >= kLargeLayerBytes ? 4 : 2;
    while (warp_columns > 1 && (warp_columns / 2) * warp_width >= columns) warp_columns /= 2;
    const int64_t tile_width = warp_columns * warp_width;
    num_tiles = std::max<int64_t>(1, ceil_div(columns, tile_width));
    const int64_t row_bytes =
        std::max<int64_t>(1, 2 * std::min(columns, tile_width) * element_size);
    const int64_t unit_bytes =
        std::clamp(layer_bytes / kUnitsPerLayer, kMinUnitBytes, kMaxUnitBytes);
    const int64_t step = kRowGroup * (kWarps / warp_columns);
    const int64_t wanted = ceil_div(std::max<int64_t>(1, unit_bytes / row_bytes), step) * step;
    const int64_t slots = kRowSlots / square_words / warp_columns / step * step;
    rows_per_unit = std::min<int64_t>({wanted, slots, ceil_div(rows, step) * step});
    num_splits = ceil_div(rows, rows_per_unit);
    num_partials = num_tiles;
    num_units = num_tiles * num_splits;
  }
};

}  // namespace fadiag
