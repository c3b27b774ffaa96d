// How compiled code looks at tensors, and makes some, without torch's libraries and without calls of Python:
// DLPack's C exchange API (https://dmlc.github.io/dlpack/latest/c_api.html), which torch has since 2.10.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <optional>

namespace efa_ep::bindings {

using DlTensor = nanobind::dlpack::dltensor;

/// A tensor that somebody owns (DLManagedTensorVersioned).
struct ManagedTensor {
  struct Version {
    uint32_t major = 1;
    uint32_t minor = 0;
  };
  Version version;
  void* context = nullptr;
  void (*deleter)(ManagedTensor* self) = nullptr;
  uint64_t flags = 0;
  DlTensor tensor;
};

class TensorExchange {
 public:
  /// `capsule` is torch.Tensor.__dlpack_c_exchange_api__, or None. With None, or of another major version, it
  /// knows no tensor.
  explicit TensorExchange(nanobind::handle capsule);

  bool available() const { return functions_ != nullptr; }

  /// What `object` is, without an owner; nothing if it is no tensor of the framework.
  std::optional<DlTensor> look(nanobind::handle object) const;
  /// A share in a tensor. Only if available().
  ManagedTensor* share(nanobind::handle tensor) const;
  /// A tensor of the framework, which calls the deleter when it is gone. Only if available().
  nanobind::object adopt(ManagedTensor* tensor) const;

 private:
  struct Functions {
    ManagedTensor::Version version;
    Functions* older;
    void* allocate;
    int (*share)(void* object, ManagedTensor** tensor);
    int (*adopt)(ManagedTensor* tensor, void** object);
    int (*look)(void* object, DlTensor* tensor);
    void* current_stream;
  };
  const Functions* functions_ = nullptr;
};

inline bool same_format(const DlTensor& a, const DlTensor& b) {
  return a.dtype.code == b.dtype.code && a.dtype.bits == b.dtype.bits && a.dtype.lanes == b.dtype.lanes &&
         a.device.device_type == b.device.device_type && a.device.device_id == b.device.device_id;
}

inline uintptr_t address_of(const DlTensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.data) + tensor.byte_offset;
}

/// Whether its elements lie in row-major order without gaps.
inline bool contiguous(const DlTensor& tensor) {
  int64_t stride = 1;
  for (int32_t i = tensor.ndim; i-- > 0;) {
    if (tensor.shape[i] != 1 && tensor.strides[i] != stride) return false;
    stride *= tensor.shape[i];
  }
  return true;
}

}  // namespace efa_ep::bindings
