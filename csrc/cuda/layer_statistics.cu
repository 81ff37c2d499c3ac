// layer_statistics for CUDA tensors: plans, workspace, launches, registration.
#include <array>
#include <limits>
#include <mutex>

#include "../prepared.h"
#include "glue.h"
#include "layer_statistics_kernel.cuh"
#include "small_layers_kernel.cuh"

namespace fadiag {
namespace {

// What all launches of a call share.
struct Target {
  const StatisticsCall& call;
  Chip chip;
  bool has_clusters;
  int32_t device;
  cudaStream_t stream;
};

template <int kCapacity>
void point_at_outputs(const StatisticsCall& call, size_t count, StatisticsTable<kCapacity>& table) {
  table.count = static_cast<int>(count);
  table.rows = call.rows;
  table.divisor = Divisor(static_cast<double>(call.rows));
  table.norms[0] = call.norms[0];
  table.norms[1] = call.norms[1];
  table.means = call.means;
  table.workspace = nullptr;
}

// Launches for layers that fit a cluster each.
template <typename Element, int kCapacity>
void launch_small(const Target& target, const Layer* layers, size_t count) {
  StatisticsTable<kCapacity> table;
  point_at_outputs(target.call, count, table);
  constexpr int64_t kWarpWidth = kWarpSize * kVectorBytes / sizeof(Element);
  for (size_t i = 0; i < count; ++i) {
    StatisticsEntry& entry = table.entries[i];
    entry.layer = layers[i];
    describe_memory<Element>(entry, target.call.rows, target.call.means);
    entry.warp_columns = 1;
    while (entry.warp_columns * kWarpWidth < layers[i].columns) entry.warp_columns *= 2;
  }
  STD_CUDA_CHECK((launch_small_layers<Element, kCapacity>(table, target.stream)));
}

// Launches for all others.
template <typename Element, int kCapacity>
void launch_large(const Target& target, Walk walk, const Layer* layers, size_t count) {
  StatisticsTable<kCapacity> table;
  point_at_outputs(target.call, count, table);
  for (size_t i = 0; i < count; ++i) table.entries[i].layer = layers[i];
  const int64_t workspace_size = plan_table<Element>(table);
  if (workspace_size < 0) fail("layer_statistics: expected at most 2^31 units of work in a call");
  Tensor workspace;
  if (workspace_size > 0) {
    workspace =
        empty_on(target.call.device_type, target.device, {workspace_size}, ScalarType::Double);
    table.workspace = static_cast<double*>(workspace.mutable_data_ptr());
  }
  STD_CUDA_CHECK(
      (launch_layer_statistics<Element, kCapacity>(table, walk, target.chip, target.stream)));
}

// Calls small(begin, count) or large(begin, count) for stretches that a kernel's table holds.
template <typename Small, typename Large>
void for_each_table(size_t total, Small&& small, Large&& large) {
  for (size_t begin = 0; begin < total;) {
    const size_t left = total - begin;
    const size_t count = std::min<size_t>(left, kLargeTable);
    left <= kSmallTable ? small(begin, left) : large(begin, count);
    begin += count;
  }
}

// What a launch needs to know of a device; asked for once.
Chip chip_of(int32_t device) {
  constexpr int32_t kDevices = 64;
  static std::array<std::once_flag, kDevices> asked;
  static std::array<Chip, kDevices> chips;
  const auto ask = [device] {
    const auto get = [device](cudaDeviceAttr attribute) {
      int value = 0;
      STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
      return value;
    };
    cudaFuncAttributes attributes{};
    STD_CUDA_CHECK(cudaFuncGetAttributes(&attributes, small_layers_kernel<float, kSmallTable>));
    return Chip{get(cudaDevAttrMultiProcessorCount),
                get(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
                get(cudaDevAttrMaxSharedMemoryPerBlockOptin), attributes.ptxVersion / 10};
  };
  if (device >= kDevices) return ask();
  std::call_once(asked[device], [&] { chips[device] = ask(); });
  return chips[device];
}

void run(const StatisticsCall& checked) {
  StatisticsCall call = checked;
  if (call.rows > std::numeric_limits<int>::max()) {
    fail("layer_statistics: expected at most 2^31 - 1 samples on CUDA, got ", call.rows);
  }
  const int32_t device = call.device_index;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Chip chip = chip_of(device);
  const Target target{call, chip, chip.compute_major >= 9, device, current_stream(device)};
  for (int type = 0; type < kNumElementTypes; ++type) {
    std::vector<Layer>& layers = call.layers[type];
    if (layers.empty()) continue;
    with_element<__half, __nv_bfloat16>(type, [&](auto* tag) {
      using Element = std::remove_pointer_t<decltype(tag)>;
      const auto first_large =
          std::stable_partition(layers.begin(), layers.end(), [&](const Layer& layer) {
            return target.has_clusters &&
                   fits_one_cluster(call.rows, layer.columns, sizeof(Element));
          });
      const auto walk_of = [&](const Layer& layer) {
        return StatisticsPlan::walk_of(call.rows, layer.columns, sizeof(Element));
      };
      // At one number of rows there are at most two walks.
      const Walk first_walk = first_large < layers.end() ? walk_of(*first_large) : Walk::kTeam;
      const auto other_walk =
          std::stable_partition(first_large, layers.end(),
                                [&](const Layer& layer) { return walk_of(layer) == first_walk; });
      const Layer* data = layers.data();
      for_each_table(
          first_large - layers.begin(),
          [&](size_t b, size_t n) { launch_small<Element, kSmallTable>(target, data + b, n); },
          [&](size_t b, size_t n) { launch_small<Element, kLargeTable>(target, data + b, n); });
      for (const auto& [begin, end] :
           {std::pair(first_large, other_walk), std::pair(other_walk, layers.end())}) {
        if (begin == end) continue;
        const Walk walk = walk_of(*begin);
        const Layer* large = data + (begin - layers.begin());
        for_each_table(
            end - begin,
            [&](size_t b, size_t n) {
              launch_large<Element, kSmallTable>(target, walk, large + b, n);
            },
            [&](size_t b, size_t n) {
              launch_large<Element, kLargeTable>(target, walk, large + b, n);
            });
      }
    });
  }
}

Tensor layer_statistics(std::vector<Tensor> hiddens, std::vector<Tensor> grads, bool stacked,
                        std::vector<int64_t> without_mean) {
  return layer_statistics_with(run, hiddens, grads, stacked, without_mean);
}

}  // namespace
}  // namespace fadiag

FADIAG_PREPARED_STATISTICS(fadiag::run)

STABLE_TORCH_LIBRARY_IMPL(fadiag, CUDA, m) {
  m.impl("layer_statistics", TORCH_BOX(&fadiag::layer_statistics));
}
