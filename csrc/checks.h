// Turns the tensor lists of a call into plain layer tables, or says which layer is wrong and how.
//
// The Python layer checks first only where no native kernel will: a message from here reaches the
// user as it is, re-raised as ValueError or TypeError by fadiag_fast.ops.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

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

inline std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << ']';
  return text.str();
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  const auto sizes_a = a.sizes();
  const auto sizes_b = b.sizes();
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (sizes_a[d] != sizes_b[d]) return false;
  }
  return true;
}

// The element types the kernels know, as an index into per-type tables.
constexpr std::array<ScalarType, 4> kDtypes = {ScalarType::Half, ScalarType::BFloat16,
                                               ScalarType::Float, ScalarType::Double};

inline int dtype_index(ScalarType dtype) {
  for (int i = 0; i < static_cast<int>(kDtypes.size()); ++i) {
    if (kDtypes[i] == dtype) return i;
  }
  return -1;
}

// Whether dimensions [first, dim) fill their block of memory without gaps, in any order.
inline bool is_dense(const Tensor& tensor, int64_t first) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  int64_t expected = 1;
  int64_t seen = 0;
  const int64_t dims = tensor.dim();
  for (int64_t step = first; step < dims; ++step) {
    bool found = false;
    for (int64_t d = first; d < dims && !found; ++d) {
      if (sizes[d] == 0) return true;
      if (seen >> d & 1) continue;
      if (sizes[d] == 1 || strides[d] == expected) {
        seen |= int64_t{1} << d;
        expected *= sizes[d];
        found = true;
      }
    }
    if (!found) return false;
  }
  return true;
}

inline Tensor dense(const Tensor& tensor, int64_t first) {
  return is_dense(tensor, first) ? tensor : torch::stable::contiguous(tensor);
}

// An uninitialised, contiguous tensor on the device of `like`.
inline Tensor empty_on(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d] > 0 ? sizes[d] : 1;
  }
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), static_cast<int32_t>(dtype),
                                                  device_type, like.get_device(), &handle));
  return Tensor(handle);
}

// One checked call of layer_statistics, ready for a kernel.
struct StatisticsCall {
  std::array<std::vector<Layer>, kDtypes.size()> layers;  // by element type
  int64_t rows = 0;
  Tensor norms;                // [2, (C,) L, B] float64
  Tensor grad_mean;            // [(C,) sum of D_l] float32, or float64 where the layers are
  std::vector<Tensor> copies;  // of inputs whose samples are not dense
};

inline StatisticsCall check_statistics_call(const std::vector<Tensor>& hiddens,
                                            const std::vector<Tensor>& grads, bool stacked) {
  constexpr const char* op = "layer_statistics: ";
  if (hiddens.empty()) fail(op, "expected at least one layer, got an empty list");
  if (hiddens.size() != grads.size()) {
    fail(op, "expected one grad per hidden, got ", hiddens.size(), " hiddens and ", grads.size(),
         " grads");
  }
  const int64_t num_layers = static_cast<int64_t>(hiddens.size());
  const int64_t batch_dim = stacked ? 1 : 0;
  const Tensor& first = hiddens[0];
  std::vector<int64_t> columns(num_layers);
  int64_t total_columns = 0;
  bool has_double = false;
  for (int64_t l = 0; l < num_layers; ++l) {
    const Tensor& hidden = hiddens[l];
    const Tensor& grad = grads[l];
    if (dtype_index(hidden.scalar_type()) < 0) {
      fail(op, "layer ", l, ": expected float16, bfloat16, float32 or float64, got ",
           dtype_name(hidden.scalar_type()));
    }
    if (hidden.dim() <= batch_dim) {
      fail(op, "layer ", l, ": expected a ", stacked ? "stack and a batch" : "batch",
           " dimension, got shape ", shape_text(hidden));
    }
    if (grad.scalar_type() != hidden.scalar_type()) {
      fail(op, "layer ", l, ": expected a grad of the hidden's dtype ",
           dtype_name(hidden.scalar_type()), ", got ", dtype_name(grad.scalar_type()));
    }
    if (!same_shape(hidden, grad)) {
      fail(op, "layer ", l, ": expected a grad of the hidden's shape ", shape_text(hidden),
           ", got ", shape_text(grad));
    }
    if (hidden.device() != first.device() || grad.device() != first.device()) {
      fail(op, "layer ", l, ": expected hidden and grad on the device of layer 0");
    }
    if (hidden.size(batch_dim) != first.size(batch_dim)) {
      fail(op, "layer ", l, ": expected ", first.size(batch_dim), " samples like layer 0, got ",
           hidden.size(batch_dim));
    }
    if (stacked && hidden.size(0) != first.size(0)) {
      fail(op, "layer ", l, ": expected a stack of ", first.size(0), " like layer 0, got ",
           hidden.size(0));
    }
    const bool is_double = hidden.scalar_type() == ScalarType::Double;
    if (l > 0 && is_double != has_double) {
      fail(op, "layer ", l, ": expected float64 in all layers or in none, got ",
           dtype_name(hidden.scalar_type()), " beside ", dtype_name(first.scalar_type()));
    }
    has_double = is_double;
    columns[l] = 1;
    for (int64_t d = batch_dim + 1; d < hidden.dim(); ++d) columns[l] *= hidden.size(d);
    total_columns += columns[l];
  }

  StatisticsCall call;
  call.rows = first.size(batch_dim);
  const int64_t stack = stacked ? first.size(0) : 1;
  std::vector<int64_t> norm_sizes = {2, num_layers, call.rows};
  std::vector<int64_t> mean_sizes = {total_columns};
  if (stacked) {
    norm_sizes.insert(norm_sizes.begin() + 1, stack);
    mean_sizes.insert(mean_sizes.begin(), stack);
  }
  call.norms = empty_on(first, norm_sizes, ScalarType::Double);
  call.grad_mean = empty_on(first, mean_sizes, has_double ? ScalarType::Double : ScalarType::Float);
  // The mean of no samples is undefined; there is nothing left for a kernel to do.
  if (call.rows == 0) {
    torch::stable::fill_(call.grad_mean, std::numeric_limits<double>::quiet_NaN());
    return call;
  }

  int64_t mean_offset = 0;
  for (int64_t l = 0; l < num_layers; ++l) {
    const Tensor hidden = dense(hiddens[l], batch_dim + 1);
    const Tensor grad = dense(grads[l], batch_dim + 1);
    if (hidden.get() != hiddens[l].get()) call.copies.push_back(hidden);
    if (grad.get() != grads[l].get()) call.copies.push_back(grad);
    const int64_t item = static_cast<int64_t>(hidden.element_size());
    const auto* hidden_data = static_cast<const char*>(hidden.const_data_ptr());
    const auto* grad_data = static_cast<const char*>(grad.const_data_ptr());
    auto& table = call.layers[dtype_index(hidden.scalar_type())];
    for (int64_t c = 0; c < stack; ++c) {
      Layer layer{};
      layer.hidden = hidden_data + (stacked ? c * hidden.stride(0) * item : 0);
      layer.grad = grad_data + (stacked ? c * grad.stride(0) * item : 0);
      layer.hidden_row_stride = hidden.stride(batch_dim);
      layer.grad_row_stride = grad.stride(batch_dim);
      layer.columns = columns[l];
      layer.mean_offset = c * total_columns + mean_offset;
      layer.norm_offset = (c * num_layers + l) * call.rows;
      table.push_back(layer);
    }
    mean_offset += columns[l];
  }
  return call;
}

// One checked call of direction_cosines. Tables hold one group per (stack member, layer).
struct CosinesCall {
  std::vector<const void*> directions;  // [groups, K]
  std::vector<int64_t> columns;         // [groups]
  int64_t num_batches = 0;
  ScalarType dtype = ScalarType::Float;
  Tensor cosines;  // [(C,) L, K, K] float64
  std::vector<Tensor> copies;
};

inline CosinesCall check_cosines_call(const std::vector<Tensor>& grad_means, int64_t num_batches,
                                      bool stacked) {
  constexpr const char* op = "direction_cosines: ";
  if (grad_means.empty()) fail(op, "expected at least one direction, got an empty list");
  const int64_t count = static_cast<int64_t>(grad_means.size());
  if (num_batches < 1 || count % num_batches != 0) {
    fail(op, "expected the same number of layers in each of ", num_batches, " batches, got ", count,
         " directions in all");
  }
  const int64_t num_layers = count / num_batches;
  const int64_t sample_dim = stacked ? 1 : 0;
  const Tensor& first = grad_means[0];
  for (int64_t i = 0; i < count; ++i) {
    const Tensor& direction = grad_means[i];
    const Tensor& reference = grad_means[i % num_layers];
    const int64_t batch = i / num_layers;
    const int64_t layer = i % num_layers;
    if (dtype_index(direction.scalar_type()) < 0) {
      fail(op, "batch ", batch, ", layer ", layer,
           ": expected float16, bfloat16, float32 or float64, got ",
           dtype_name(direction.scalar_type()));
    }
    if (direction.scalar_type() != first.scalar_type()) {
      fail(op, "batch ", batch, ", layer ", layer, ": expected dtype ",
           dtype_name(first.scalar_type()), " like batch 0, layer 0, got ",
           dtype_name(direction.scalar_type()));
    }
    if (direction.dim() <= sample_dim - 1 || (stacked && direction.size(0) != first.size(0))) {
      fail(op, "batch ", batch, ", layer ", layer, ": expected a stack of ", first.size(0),
           ", got shape ", shape_text(direction));
    }
    if (!same_shape(direction, reference)) {
      fail(op, "batch ", batch, ", layer ", layer, ": expected shape ", shape_text(reference),
           " like batch 0, got ", shape_text(direction));
    }
    if (direction.device() != first.device()) {
      fail(op, "batch ", batch, ", layer ", layer,
           ": expected the device of batch 0, layer 0, got another");
    }
  }

  CosinesCall call;
  call.num_batches = num_batches;
  call.dtype = first.scalar_type();
  const int64_t stack = stacked ? first.size(0) : 1;
  std::vector<int64_t> sizes = {num_layers, num_batches, num_batches};
  if (stacked) sizes.insert(sizes.begin(), stack);
  call.cosines = empty_on(first, sizes, ScalarType::Double);
  call.directions.resize(stack * count);
  call.columns.resize(stack * num_layers);
  for (int64_t l = 0; l < num_layers; ++l) {
    // A dot product may take the elements in any order, as long as it is the same in all batches.
    const auto layout = grad_means[l].strides();
    bool shared_layout = is_dense(grad_means[l], sample_dim);
    for (int64_t k = 1; k < num_batches && shared_layout; ++k) {
      const auto strides = grad_means[k * num_layers + l].strides();
      for (int64_t d = sample_dim; d < grad_means[l].dim(); ++d) {
        shared_layout = shared_layout && strides[d] == layout[d];
      }
    }
    for (int64_t k = 0; k < num_batches; ++k) {
      Tensor direction = grad_means[k * num_layers + l];
      if (!shared_layout) {
        direction = torch::stable::contiguous(direction);
        call.copies.push_back(direction);
      }
      const int64_t item = static_cast<int64_t>(direction.element_size());
      const auto* data = static_cast<const char*>(direction.const_data_ptr());
      for (int64_t c = 0; c < stack; ++c) {
        const int64_t group = c * num_layers + l;
        call.directions[group * num_batches + k] =
            data + (stacked ? c * direction.stride(0) * item : 0);
        if (k == 0) {
          int64_t columns = 1;
          for (int64_t d = sample_dim; d < direction.dim(); ++d) columns *= direction.size(d);
          call.columns[group] = columns;
        }
      }
    }
  }
  return call;
}

}  // namespace fadiag
