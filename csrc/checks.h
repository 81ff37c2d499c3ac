// Turns the tensor lists of a call into plain layer tables, or says which layer is wrong and how.
//
// The Python layer checks first only where no native kernel will: a message from here reaches the
// user as it is, re-raised as ValueError or TypeError by fadiag_fast.ops.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "element_types.h"
#include "layer_table.h"

namespace fadiag {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    default:
      return torch::headeronly::toString(dtype);
  }
}

// What a check or a kernel needs of a tensor, fetched once: with a hundred layers, calls into torch
// are what a small operator costs.
struct TensorInfo {
  int64_t dim = 0;
  int64_t* sizes = nullptr;
  int64_t* strides = nullptr;
  int32_t dtype = 0;
  int32_t device_type = 0;
  int32_t device_index = 0;

  TensorInfo() = default;
  explicit TensorInfo(const Tensor& tensor) {
    AtenTensorHandle handle = tensor.get();
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device_type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &device_index));
  }

  bool same_device(const TensorInfo& other) const {
    return device_type == other.device_type && device_index == other.device_index;
  }
  bool same_shape(const TensorInfo& other) const {
    return dim == other.dim && std::equal(sizes, sizes + dim, other.sizes);
  }
  int64_t columns(int64_t first) const {
    int64_t product = 1;
    for (int64_t d = first; d < dim; ++d) product *= sizes[d];
    return product;
  }
  // Whether dimensions [first, dim) fill their block of memory without gaps, in any order.
  bool is_dense(int64_t first) const {
    // Nearly always the last dimension is the fastest.
    int64_t expected = 1;
    int64_t d = dim - 1;
    while (d >= first && (strides[d] == expected || sizes[d] == 1)) expected *= sizes[d--];
    if (d < first) return true;
    expected = 1;
    int64_t seen = 0;
    for (int64_t step = first; step < dim; ++step) {
      bool found = false;
      for (int64_t e = first; e < dim && !found; ++e) {
        if (sizes[e] == 0) return true;
        if (seen >> e & 1) continue;
        if (sizes[e] == 1 || strides[e] == expected) {
          seen |= int64_t{1} << e;
          expected *= sizes[e];
          found = true;
        }
      }
      if (!found) return false;
    }
    return true;
  }
  std::string shape_text() const {
    std::ostringstream text;
    text << '[';
    for (int64_t d = 0; d < dim; ++d) text << (d ? ", " : "") << sizes[d];
    text << ']';
    return text.str();
  }
};

// Returns the ElementType of torch's dtype code, -1 for all others.
inline int element_type(int32_t dtype) {
  switch (static_cast<ScalarType>(dtype)) {
    case ScalarType::Half:
      return kHalf;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Float:
      return kFloat;
    case ScalarType::Double:
      return kDouble;
    default:
      return -1;
  }
}

inline const char* data_of(const Tensor& tensor) {
  void* data = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor.get(), &data));
  return static_cast<const char*>(data);
}

// An uninitialised, contiguous tensor.
inline Tensor empty_on(int32_t device_type, int32_t device_index,
                       std::initializer_list<int64_t> sizes, ScalarType dtype) {
  std::array<int64_t, 4> strides{};
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(1, sizes.begin()[d]);
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(),
                                                  strides.data(), static_cast<int32_t>(dtype),
                                                  device_type, device_index, &handle));
  return Tensor(handle);
}

// The same on the device of `like`.
inline Tensor empty_on(const TensorInfo& like, std::initializer_list<int64_t> sizes,
                       ScalarType dtype) {
  return empty_on(like.device_type, like.device_index, sizes, dtype);
}

// What the shapes, strides and types of a call of layer_statistics decide, its data aside.
struct StatisticsLayout {
  struct Source {
    Layer layer;  // without data and offsets of a stack's member
    int type;     // ElementType
    int64_t hidden_stack_stride;
    int64_t grad_stack_stride;
  };
  std::vector<Source> sources;
  int64_t rows = 0;
  int64_t stack = 1;
  int64_t width = 0;  // of the packed figures of one member
  bool stacked = false;
  bool wide = false;  // whether the layers are float64
  int32_t device_type = 0;
  int32_t device_index = 0;

  ScalarType dtype() const { return wide ? ScalarType::Double : ScalarType::Float; }
};

// Checks a call. infos holds the hiddens' tensors, then the grads'.
inline StatisticsLayout check_statistics_layout(const std::vector<TensorInfo>& infos,
                                                int64_t num_hiddens, bool stacked,
                                                const std::vector<int64_t>& without_mean) {
  constexpr const char* op = "layer_statistics: ";
  const int64_t num_layers = num_hiddens;
  const int64_t num_grads = static_cast<int64_t>(infos.size()) - num_hiddens;
  if (num_layers == 0) fail(op, "expected at least one layer, got an empty list");
  if (num_grads != num_layers) {
    fail(op, "expected one grad per hidden, got ", num_layers, " hiddens and ", num_grads,
         " grads");
  }
  const int64_t batch_dim = stacked ? 1 : 0;
  const TensorInfo& first = infos[0];
  const auto name = [](int32_t dtype) { return dtype_name(static_cast<ScalarType>(dtype)); };

  StatisticsLayout layout;
  layout.stacked = stacked;
  layout.wide = element_type(first.dtype) == kDouble;
  layout.device_type = first.device_type;
  layout.device_index = first.device_index;
  layout.sources.resize(num_layers);
  for (const int64_t l : without_mean) {
    if (l < 0 || l >= num_layers) {
      fail(op, "without_mean: expected layers from 0 to ", num_layers - 1, ", got ", l);
    }
    layout.sources[l].layer.mean_offset = kNoMean;
  }
  int64_t total_columns = 0;
  for (int64_t l = 0; l < num_layers; ++l) {
    const TensorInfo& hidden = infos[l];
    const TensorInfo& grad = infos[num_layers + l];
    const int type = element_type(hidden.dtype);
    if (type < 0) {
      fail(op, "layer ", l, ": expected float16, bfloat16, float32 or float64, got ",
           name(hidden.dtype));
    }
    if (hidden.dim <= batch_dim) {
      fail(op, "layer ", l, ": expected ", stacked ? "a stack and a batch" : "a batch",
           " dimension, got shape ", hidden.shape_text());
    }
    if (grad.dtype != hidden.dtype) {
      fail(op, "layer ", l, ": expected a grad of the hidden's dtype ", name(hidden.dtype),
           ", got ", name(grad.dtype));
    }
    if (!grad.same_shape(hidden)) {
      fail(op, "layer ", l, ": expected a grad of the hidden's shape ", hidden.shape_text(),
           ", got ", grad.shape_text());
    }
    if (!hidden.same_device(first) || !grad.same_device(first)) {
      fail(op, "layer ", l, ": expected hidden and grad on the device of layer 0");
    }
    if (hidden.sizes[batch_dim] != first.sizes[batch_dim]) {
      fail(op, "layer ", l, ": expected ", first.sizes[batch_dim], " samples like layer 0, got ",
           hidden.sizes[batch_dim]);
    }
    if (stacked && hidden.sizes[0] != first.sizes[0]) {
      fail(op, "layer ", l, ": expected a stack of ", first.sizes[0], " like layer 0, got ",
           hidden.sizes[0]);
    }
    if ((type == kDouble) != layout.wide) {
      fail(op, "layer ", l, ": expected float64 in all layers or in none, got ", name(hidden.dtype),
           " beside ", name(first.dtype));
    }
    StatisticsLayout::Source& source = layout.sources[l];
    source.type = type;
    source.layer.columns = hidden.columns(batch_dim + 1);
    if (source.layer.mean_offset != kNoMean) {
      source.layer.mean_offset = total_columns;
      total_columns += source.layer.columns;
    }
    source.layer.hidden_row_stride = hidden.strides[batch_dim];
    source.layer.grad_row_stride = grad.strides[batch_dim];
    source.hidden_stack_stride = hidden.strides[0];
    source.grad_stack_stride = grad.strides[0];
  }
  layout.rows = first.sizes[batch_dim];
  layout.stack = stacked ? first.sizes[0] : 1;
  // One tensor for all figures: an allocation costs as much as a small kernel.
  layout.width = (layout.wide ? 2 : 4) * num_layers * layout.rows + total_columns;
  // In a stack, every member's norms have to be aligned like doubles.
  if (stacked && !layout.wide) layout.width += layout.width % 2;
  return layout;
}

// One checked call of layer_statistics, ready for a kernel.
struct StatisticsCall {
  std::array<std::vector<Layer>, kNumElementTypes> layers;
  int64_t rows = 0;
  double* norms[2] = {};  // of hiddens and of grads; Layer::norm_offset counts from here
  void* means = nullptr;  // float, or double where the layers are; likewise mean_offset
  int32_t device_type = 0;
  int32_t device_index = 0;
};

// Binds a layout to its data: of the hiddens, then of the grads; `packed` takes the figures.
inline StatisticsCall bind_statistics(const StatisticsLayout& layout,
                                      const std::vector<const char*>& data, void* packed) {
  const auto num_layers = static_cast<int64_t>(layout.sources.size());
  const int64_t norms_size = num_layers * layout.rows;
  StatisticsCall call;
  call.rows = layout.rows;
  call.device_type = layout.device_type;
  call.device_index = layout.device_index;
  call.norms[0] = static_cast<double*>(packed);
  call.norms[1] = call.norms[0] + norms_size;
  call.means = call.norms[1] + norms_size;
  const int64_t stack_norms = layout.wide ? layout.width : layout.width / 2;
  call.layers[layout.sources[0].type].reserve(layout.stack * num_layers);
  for (int64_t c = 0; c < layout.stack; ++c) {
    for (int64_t l = 0; l < num_layers; ++l) {
      const StatisticsLayout::Source& source = layout.sources[l];
      const int64_t item = kElementSizes[source.type];
      Layer layer = source.layer;
      layer.hidden = data[l] + c * source.hidden_stack_stride * item;
      layer.grad = data[num_layers + l] + c * source.grad_stack_stride * item;
      if (layer.mean_offset != kNoMean) layer.mean_offset += c * layout.width;
      layer.norm_offset = c * stack_norms + l * layout.rows;
      call.layers[source.type].push_back(layer);
    }
  }
  return call;
}

// The operator of a device whose kernels `run` starts. Samples with gaps are copied.
template <typename Run>
Tensor layer_statistics_with(const Run& run, const std::vector<Tensor>& hiddens,
                             const std::vector<Tensor>& grads, bool stacked,
                             const std::vector<int64_t>& without_mean) {
  const auto num_hiddens = static_cast<int64_t>(hiddens.size());
  const int64_t sample_dim = stacked ? 2 : 1;
  std::vector<TensorInfo> infos;
  infos.reserve(hiddens.size() + grads.size());
  for (const Tensor& hidden : hiddens) infos.emplace_back(hidden);
  for (const Tensor& grad : grads) infos.emplace_back(grad);
  StatisticsLayout layout = check_statistics_layout(infos, num_hiddens, stacked, without_mean);
  std::vector<Tensor> copies;
  std::vector<const char*> data(infos.size());
  for (size_t i = 0; i < infos.size(); ++i) {
    const bool is_grad = i >= hiddens.size();
    const size_t l = is_grad ? i - hiddens.size() : i;
    const Tensor& tensor = is_grad ? grads[l] : hiddens[l];
    if (infos[i].is_dense(sample_dim)) {
      data[i] = data_of(tensor);
      continue;
    }
    copies.push_back(torch::stable::contiguous(tensor));
    data[i] = data_of(copies.back());
    const TensorInfo copy(copies.back());
    StatisticsLayout::Source& source = layout.sources[l];
    (is_grad ? source.layer.grad_row_stride : source.layer.hidden_row_stride) =
        copy.strides[sample_dim - 1];
    (is_grad ? source.grad_stack_stride : source.hidden_stack_stride) = copy.strides[0];
  }
  Tensor packed = stacked ? empty_on(infos[0], {layout.stack, layout.width}, layout.dtype())
                          : empty_on(infos[0], {layout.width}, layout.dtype());
  if (layout.rows == 0) {
    // The mean of no samples is undefined; there is nothing for a kernel to do.
    torch::stable::fill_(packed, std::numeric_limits<double>::quiet_NaN());
  } else {
    run(bind_statistics(layout, data, packed.mutable_data_ptr()));
  }
  return packed;
}

// One checked call of direction_cosines. Tables hold one group per (stack member, layer).
struct CosinesCall {
  std::vector<const void*> directions;  // [groups, K]
  std::vector<int64_t> columns;         // [groups]
  int64_t num_batches = 0;
  int type = kFloat;  // ElementType
  Tensor cosines;     // [(C,) L, K, K] float64
  std::vector<Tensor> copies;
};

inline CosinesCall check_cosines_call(const std::vector<Tensor>& grad_means, int64_t num_batches,
                                      bool stacked) {
  constexpr const char* op = "direction_cosines: ";
  if (grad_means.empty()) fail(op, "expected at least one direction, got an empty list");
  const auto count = static_cast<int64_t>(grad_means.size());
  if (num_batches < 1 || count % num_batches != 0) {
    fail(op, "expected the same number of layers in each of ", num_batches, " batches, got ", count,
         " directions in all");
  }
  const int64_t num_layers = count / num_batches;
  const int64_t sample_dim = stacked ? 1 : 0;
  const auto name = [](int32_t dtype) { return dtype_name(static_cast<ScalarType>(dtype)); };
  std::vector<TensorInfo> infos;
  infos.reserve(count);
  for (const Tensor& direction : grad_means) infos.emplace_back(direction);
  const TensorInfo& first = infos[0];
  for (int64_t i = 0; i < count; ++i) {
    const TensorInfo& direction = infos[i];
    const TensorInfo& reference = infos[i % num_layers];
    const int64_t batch = i / num_layers;
    const int64_t layer = i % num_layers;
    if (element_type(direction.dtype) < 0) {
      fail(op, "batch ", batch, ", layer ", layer,
           ": expected float16, bfloat16, float32 or float64, got ", name(direction.dtype));
    }
    if (direction.dtype != first.dtype) {
      fail(op, "batch ", batch, ", layer ", layer, ": expected dtype ", name(first.dtype),
           " like batch 0, layer 0, got ", name(direction.dtype));
    }
    if (stacked && (direction.dim < 1 || direction.sizes[0] != first.sizes[0])) {
      fail(op, "batch ", batch, ", layer ", layer,
           ": expected a stack like batch 0, layer 0, got shape ", direction.shape_text());
    }
    if (!direction.same_shape(reference)) {
      fail(op, "batch ", batch, ", layer ", layer, ": expected shape ", reference.shape_text(),
           " like batch 0, got ", direction.shape_text());
    }
    if (!direction.same_device(first)) {
      fail(op, "batch ", batch, ", layer ", layer,
           ": expected the device of batch 0, layer 0, got another");
    }
  }

  CosinesCall call;
  call.num_batches = num_batches;
  call.type = element_type(first.dtype);
  const int64_t item = kElementSizes[call.type];
  const int64_t stack = stacked ? first.sizes[0] : 1;
  if (stacked) {
    call.cosines =
        empty_on(first, {stack, num_layers, num_batches, num_batches}, ScalarType::Double);
  } else {
    call.cosines = empty_on(first, {num_layers, num_batches, num_batches}, ScalarType::Double);
  }
  call.directions.resize(stack * count);
  call.columns.resize(stack * num_layers);
  for (int64_t l = 0; l < num_layers; ++l) {
    // A dot product may take the elements in any order, as long as it is the same in all batches.
    const TensorInfo& layout = infos[l];
    bool shared_layout = layout.is_dense(sample_dim);
    for (int64_t k = 1; k < num_batches && shared_layout; ++k) {
      const int64_t* strides = infos[k * num_layers + l].strides;
      shared_layout = std::equal(layout.strides + sample_dim, layout.strides + layout.dim,
                                 strides + sample_dim);
    }
    for (int64_t c = 0; c < stack; ++c) {
      call.columns[c * num_layers + l] = layout.columns(sample_dim);
    }
    for (int64_t k = 0; k < num_batches; ++k) {
      const Tensor* direction = &grad_means[k * num_layers + l];
      int64_t stack_stride = stacked ? infos[k * num_layers + l].strides[0] : 0;
      if (!shared_layout) {
        call.copies.push_back(torch::stable::contiguous(*direction));
        direction = &call.copies.back();
        stack_stride = stacked ? TensorInfo(*direction).strides[0] : 0;
      }
      const char* data = data_of(*direction);
      for (int64_t c = 0; c < stack; ++c) {
        call.directions[(c * num_layers + l) * num_batches + k] = data + c * stack_stride * item;
      }
    }
  }
  return call;
}

}  // namespace fadiag
