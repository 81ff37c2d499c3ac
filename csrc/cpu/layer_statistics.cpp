// layer_statistics on the CPU: plans tiles, runs them on torch's threads, merges in a fixed order.
#include <memory>
#include <vector>

#include "../accumulate.h"
#include "../checks.h"
#include "../prepared.h"
#include "dispatch.h"

namespace fadiag {
namespace {

// 2048 column sums are 16 KB: with four open rows of either tensor they stay in a 32 KB L1 cache.
constexpr int64_t kTileColumns = 2048;
// Enough tasks for many cores, whatever the shape; a constant, so that bits do not depend on it.
constexpr int64_t kTasksPerLayer = 64;
constexpr int64_t kRowGroup = 4;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A function of rows and columns alone: the same layer gives the same bits in every call.
struct TilePlan {
  int64_t num_tiles;
  int64_t num_splits;
  int64_t rows_per_split;

  TilePlan(int64_t rows, int64_t columns) {
    num_tiles = ceil_div(columns, kTileColumns);
    const int64_t tile_elements = rows * std::min(columns, kTileColumns);
    const int64_t wanted = num_tiles > 0 ? ceil_div(kTasksPerLayer, num_tiles) : 1;
    const int64_t worthwhile = std::max<int64_t>(1, tile_elements / kSerialElements);
    const int64_t splits = std::min(wanted, worthwhile);
    rows_per_split = ceil_div(ceil_div(rows, splits), kRowGroup) * kRowGroup;
    num_splits = rows_per_split > 0 ? ceil_div(rows, rows_per_split) : 0;
  }
};

struct LayerWork {
  const Layer* layer;
  int type;
  TilePlan plan;
  int64_t first_task;
  // Into one workspace of the whole call.
  double* squares;      // [tiles, 2, rows, words]
  double* column_sums;  // [splits, words, columns]; unused for a single split
  bool with_mean;
};

void write_means(const LayerWork& work, int64_t column_begin, int64_t columns, int64_t rows,
                 const double* sums, int64_t word_stride, void* means) {
  const int64_t index = work.layer->mean_offset + column_begin;
  void* target = work.type == kDouble ? static_cast<void*>(static_cast<double*>(means) + index)
                                      : static_cast<float*>(means) + index;
  cpu_kernels().column_means(work.type, sums, word_stride, columns, rows, target);
}

template <typename Sums>
void run_tile(LayerWork& work, int64_t task, int64_t rows, void* means) {
  const int64_t tile = task % work.plan.num_tiles;
  const int64_t split = task / work.plan.num_tiles;
  const int64_t columns = work.layer->columns;
  Tile block;
  block.row_begin = split * work.plan.rows_per_split;
  block.row_end = std::min(rows, block.row_begin + work.plan.rows_per_split);
  block.column_begin = tile * kTileColumns;
  block.column_end = std::min(columns, block.column_begin + kTileColumns);
  const int64_t block_columns = block.column_end - block.column_begin;

  constexpr int kWords = Sums::kSquareWords;
  double* squares = work.squares + tile * 2 * rows * kWords + block.row_begin * kWords;
  alignas(64) double sums[Sums::kColumnWords * kTileColumns];
  cpu_kernels().statistics_tile(work.type, *work.layer, block, squares, squares + rows * kWords,
                                work.with_mean ? sums : nullptr);
  if (!work.with_mean) return;
  if (work.plan.num_splits == 1) {
    write_means(work, block.column_begin, block_columns, rows, sums, block_columns, means);
    return;
  }
  for (int w = 0; w < Sums::kColumnWords; ++w) {
    double* target =
        work.column_sums + (split * Sums::kColumnWords + w) * columns + block.column_begin;
    std::copy(sums + w * block_columns, sums + (w + 1) * block_columns, target);
  }
}

template <typename Sums>
void finish_layer(LayerWork& work, int64_t rows, double* const (&norms)[2], void* means) {
  constexpr int kWords = Sums::kSquareWords;
  for (int64_t which = 0; which < 2; ++which) {
    double* target = norms[which] + work.layer->norm_offset;
    for (int64_t r = 0; r < rows; ++r) {
      double words[kWords] = {};
      for (int64_t tile = 0; tile < work.plan.num_tiles; ++tile) {
        const double* partial = work.squares + ((tile * 2 + which) * rows + r) * kWords;
        for (int w = 0; w < kWords; ++w) words[w] += partial[w];
      }
      target[r] = Sums::norm(words);
    }
  }
  if (work.plan.num_splits <= 1 || !work.with_mean) return;
  const int64_t size = Sums::kColumnWords * work.layer->columns;
  double* total = work.column_sums;
  for (int64_t split = 1; split < work.plan.num_splits; ++split) {
    const double* partial = total + split * size;
    for (int64_t i = 0; i < size; ++i) total[i] += partial[i];
  }
  write_means(work, 0, work.layer->columns, rows, total, work.layer->columns, means);
}

void run(const StatisticsCall& call) {
  const int64_t rows = call.rows;
  std::vector<LayerWork> works;
  int64_t num_layers = 0;
  for (const auto& layers : call.layers) num_layers += static_cast<int64_t>(layers.size());
  works.reserve(num_layers);
  int64_t num_tasks = 0;
  int64_t elements = 0;
  int64_t workspace_size = 0;
  const auto squares_size = [&](const LayerWork& work) {
    const int words = work.type == kDouble ? WideSums::kSquareWords : NarrowSums::kSquareWords;
    return work.plan.num_tiles * 2 * rows * words;
  };
  const auto column_sums_size = [&](const LayerWork& work) {
    const int words = work.type == kDouble ? WideSums::kColumnWords : NarrowSums::kColumnWords;
    const bool needed = work.plan.num_splits > 1 && work.with_mean;
    return needed ? work.plan.num_splits * words * work.layer->columns : 0;
  };
  for (int type = 0; type < kNumElementTypes; ++type) {
    for (const Layer& layer : call.layers[type]) {
      works.push_back({&layer, type, TilePlan(rows, layer.columns), num_tasks, nullptr, nullptr,
                       layer.mean_offset != kNoMean});
      const LayerWork& work = works.back();
      num_tasks += work.plan.num_tiles * std::max<int64_t>(1, work.plan.num_splits);
      elements += 2 * rows * layer.columns;
      workspace_size += squares_size(work) + column_sums_size(work);
    }
  }
  // Not initialised: the tiles write every word of it.
  const std::unique_ptr<double[]> workspace(new double[workspace_size]);
  double* free_space = workspace.get();
  for (LayerWork& work : works) {
    work.squares = free_space;
    work.column_sums = work.squares + squares_size(work);
    free_space = work.column_sums + column_sums_size(work);
  }

  run_tasks(num_tasks, elements, [&](int64_t task) {
    const auto after = std::upper_bound(
        works.begin(), works.end(), task,
        [](int64_t value, const LayerWork& work) { return value < work.first_task; });
    LayerWork& work = *std::prev(after);
    const int64_t local = task - work.first_task;
    if (work.type == kDouble) {
      run_tile<WideSums>(work, local, rows, call.means);
    } else {
      run_tile<NarrowSums>(work, local, rows, call.means);
    }
  });
  run_tasks(num_layers, workspace_size, [&](int64_t index) {
    LayerWork& work = works[index];
    if (work.type == kDouble) {
      finish_layer<WideSums>(work, rows, call.norms, call.means);
    } else {
      finish_layer<NarrowSums>(work, rows, call.norms, call.means);
    }
  });
}

Tensor layer_statistics(std::vector<Tensor> hiddens, std::vector<Tensor> grads, bool stacked,
                        std::vector<int64_t> without_mean) {
  return layer_statistics_with(run, hiddens, grads, stacked, without_mean);
}

}  // namespace
}  // namespace fadiag

FADIAG_PREPARED_STATISTICS(fadiag::run)

STABLE_TORCH_LIBRARY_IMPL(fadiag, CPU, m) {
  m.impl("layer_statistics", TORCH_BOX(&fadiag::layer_statistics));
}
