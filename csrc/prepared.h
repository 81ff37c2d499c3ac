// layer_statistics without torch's dispatcher: plain C entry points for Python's ctypes.
//
// What:      a prepared call knows the shapes, strides, types and device of its tensors. A run
// reads
//            those of the tensors it is given, compares, and starts the kernels on the current
//            stream; where one differs it starts nothing.
// Tensors:   Python objects, read through DLPack's exchange interface (the C table that
//            torch.Tensor.__dlpack_c_exchange_api__ holds), which takes some ten nanoseconds each
//            and fails for what has no memory of its own: tensors under vmap, fake ones. The caller
//            holds the GIL and its lists until the call returns.
// Python:    four functions of the limited API, looked up in the process, so that the library knows
//            no Python at build time and loads without one.
#pragma once

#include <dlfcn.h>

#include <cstring>
#include <memory>

#include "checks.h"

namespace fadiag {

// DLPack 1.x, as far as it is needed here.
struct DLTensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DLPackExchange {
  struct {
    uint32_t major;
    uint32_t minor;
    void* previous;
  } header;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void* object, DLTensor* out);
  void* current_stream;
};

struct PythonFunctions {
  int64_t (*list_size)(void*);
  void* (*list_item)(void*, int64_t);  // borrowed
  void* (*type_of)(void*);             // a new reference
  void (*release)(void*);

  static const PythonFunctions& get() {
    static const PythonFunctions found = [] {
      PythonFunctions functions{};
      const auto find = [](const char* name, auto& function) {
        void* symbol = dlsym(RTLD_DEFAULT, name);
        if (symbol == nullptr) fail("prepared statistics: no ", name, " in this process");
        std::memcpy(&function, &symbol, sizeof(function));
      };
      find("PyList_Size", functions.list_size);
      find("PyList_GetItem", functions.list_item);
      find("PyObject_Type", functions.type_of);
      find("Py_DecRef", functions.release);
      return functions;
    }();
    return found;
  }
};

// What a call returns; a tensor that cannot be read leaves a Python exception beside it.
enum PreparedResult : int { kDone = 0, kDiffers = 1, kFailed = 2 };

class PreparedStatistics {
 public:
  PreparedStatistics(const DLPackExchange* exchange, void* tensor_type, void* hiddens, void* grads,
                     bool stacked, const std::vector<int64_t>& without_mean)
      : exchange_(exchange), tensor_type_(tensor_type) {
    if (exchange->header.major != 1 || exchange->tensor_from_object == nullptr) {
      fail("prepared statistics: this torch offers no DLPack exchange of version 1");
    }
    const PythonFunctions& python = PythonFunctions::get();
    num_hiddens_ = python.list_size(hiddens);
    for (void* list : {hiddens, grads}) {
      const int64_t size = python.list_size(list);
      for (int64_t i = 0; i < size; ++i) {
        DLTensor tensor{};
        if (!read(python.list_item(list, i), tensor)) {
          fail(
              "prepared statistics: expected plain tensors of float16, bfloat16, float32 or "
              "float64");
        }
        specs_.emplace_back(tensor);
      }
    }
    std::vector<TensorInfo> infos;
    for (Spec& spec : specs_) infos.push_back(spec.info());
    layout_ = check_statistics_layout(infos, num_hiddens_, stacked, without_mean);
    for (const TensorInfo& info : infos) {
      if (!info.is_dense(stacked ? 2 : 1)) {
        fail("prepared statistics: expected samples without gaps in memory");
      }
    }
    if (layout_.rows == 0) fail("prepared statistics: expected at least one sample");
  }

  const StatisticsLayout& layout() const { return layout_; }

  // Runs the kernels over tensors like those prepared for. `packed` is [width] or [stack, width].
  template <typename Run>
  PreparedResult run(const Run& run, void* hiddens, void* grads, void* packed) const {
    const PythonFunctions& python = PythonFunctions::get();
    const auto count = static_cast<int64_t>(specs_.size());
    if (python.list_size(hiddens) != num_hiddens_ ||
        python.list_size(grads) != count - num_hiddens_) {
      return kDiffers;
    }
    std::vector<const char*> data(count);
    for (int64_t i = 0; i < count; ++i) {
      const bool is_grad = i >= num_hiddens_;
      void* object = python.list_item(is_grad ? grads : hiddens, is_grad ? i - num_hiddens_ : i);
      DLTensor tensor{};
      if (!read(object, tensor) || !specs_[i].equals(tensor)) return kDiffers;
      data[i] = static_cast<const char*>(tensor.data) + tensor.byte_offset;
    }
    DLTensor target{};
    if (!read(packed, target) || !is_packed(target)) return kDiffers;
    run(bind_statistics(layout_, data, static_cast<char*>(target.data) + target.byte_offset));
    return kDone;
  }

 private:
  // One tensor's metadata, of which two that are equal are read the same way.
  struct Spec {
    int32_t device_type;
    int32_t device_id;
    int32_t ndim;
    uint8_t code;
    uint8_t bits;
    std::vector<int64_t> extents;  // sizes, then strides

    explicit Spec(const DLTensor& tensor)
        : device_type(tensor.device_type),
          device_id(tensor.device_id),
          ndim(tensor.ndim),
          code(tensor.code),
          bits(tensor.bits),
          extents(tensor.shape, tensor.shape + tensor.ndim) {
      extents.insert(extents.end(), tensor.strides, tensor.strides + tensor.ndim);
    }

    bool equals(const DLTensor& tensor) const {
      const size_t bytes = ndim * sizeof(int64_t);
      return tensor.ndim == ndim && tensor.code == code && tensor.bits == bits &&
             tensor.device_type == device_type && tensor.device_id == device_id &&
             std::memcmp(tensor.shape, extents.data(), bytes) == 0 &&
             std::memcmp(tensor.strides, extents.data() + ndim, bytes) == 0;
    }

    TensorInfo info() {
      constexpr int kFloats = 2;  // kDLFloat
      constexpr int kBrain = 4;   // kDLBfloat
      TensorInfo found;
      found.dim = ndim;
      found.sizes = extents.data();
      found.strides = extents.data() + ndim;
      const ScalarType dtype = code == kBrain && bits == 16    ? ScalarType::BFloat16
                               : code == kFloats && bits == 16 ? ScalarType::Half
                               : code == kFloats && bits == 32 ? ScalarType::Float
                               : code == kFloats && bits == 64 ? ScalarType::Double
                                                               : ScalarType::Byte;
      found.dtype = static_cast<int32_t>(dtype);
      // torch's device types are DLPack's less one for the two that there are kernels for.
      found.device_type = device_type - 1;
      found.device_index = device_type == kCpu ? -1 : device_id;
      return found;
    }
  };
  static constexpr int kCpu = 1;  // kDLCPU; CUDA is 2

  // Reads an object that is a torch.Tensor and nothing derived from it.
  bool read(void* object, DLTensor& tensor) const {
    if (object == nullptr) return false;
    const PythonFunctions& python = PythonFunctions::get();
    void* type = python.type_of(object);
    python.release(type);
    return type == tensor_type_ && exchange_->tensor_from_object(object, &tensor) == 0 &&
           tensor.lanes == 1;
  }

  bool is_packed(const DLTensor& tensor) const {
    const int64_t width = layout_.stack * layout_.width;
    int64_t size = 1;
    for (int32_t d = tensor.ndim; d-- > 0;) {
      if (tensor.shape[d] != 1 && tensor.strides[d] != size) return false;
      size *= tensor.shape[d];
    }
    return size == width && tensor.code == 2 && tensor.bits == (layout_.wide ? 64 : 32) &&
           tensor.device_type - 1 == layout_.device_type &&
           (tensor.device_type == kCpu || tensor.device_id == layout_.device_index);
  }

  const DLPackExchange* exchange_;
  void* tensor_type_;
  int64_t num_hiddens_ = 0;
  std::vector<Spec> specs_;
  StatisticsLayout layout_;
};

// The message of the last call that failed in this thread.
inline std::string& last_error() {
  thread_local std::string message;
  return message;
}

template <typename Action>
bool succeeds(const Action& action) {
  try {
    action();
    return true;
  } catch (const std::exception& error) {
    last_error() = error.what();
    return false;
  }
}

}  // namespace fadiag

#define FADIAG_EXPORT extern "C" __attribute__((visibility("default")))

// Defines the entry points of a library whose kernels `run_kernels` starts.
#define FADIAG_PREPARED_STATISTICS(run_kernels)                                                    \
  FADIAG_EXPORT const char* fadiag_last_error() { return fadiag::last_error().c_str(); }           \
  FADIAG_EXPORT void* fadiag_prepare(const void* exchange, void* tensor_type, void* hiddens,       \
                                     void* grads, int stacked, const int64_t* without_mean,        \
                                     int64_t num_without_mean, int64_t* width) {                   \
    fadiag::PreparedStatistics* prepared = nullptr;                                                \
    fadiag::succeeds([&] {                                                                         \
      auto made = std::make_unique<fadiag::PreparedStatistics>(                                    \
          static_cast<const fadiag::DLPackExchange*>(exchange), tensor_type, hiddens, grads,       \
          stacked != 0, std::vector<int64_t>(without_mean, without_mean + num_without_mean));      \
      *width = made->layout().width;                                                               \
      prepared = made.release();                                                                   \
    });                                                                                            \
    return prepared;                                                                               \
  }                                                                                                \
  FADIAG_EXPORT int fadiag_run(const void* prepared, void* hiddens, void* grads, void* packed) {   \
    int result = fadiag::kFailed;                                                                  \
    fadiag::succeeds([&] {                                                                         \
      result = static_cast<const fadiag::PreparedStatistics*>(prepared)->run(run_kernels, hiddens, \
                                                                             grads, packed);       \
    });                                                                                            \
    return result;                                                                                 \
  }                                                                                                \
  FADIAG_EXPORT void fadiag_release(void* prepared) {                                              \
    delete static_cast<fadiag::PreparedStatistics*>(prepared);                                     \
  }
