// Arrays in from Python through DLPack, the framework-neutral exchange. The structures below are its C ABI (version
// 1.0, https://dmlc.github.io/dlpack/latest/c_api.html), declared here so that no framework's headers are needed.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <utility>

#include "core/views.hpp"

namespace cascade::python {

struct DLDevice {
  int32_t device_type;  // 1: the CPU
  int32_t device_id;
};

struct DLDataType {
  uint8_t code;  // 0 int, 1 uint, 2 float, 4 bfloat, 6 bool
  uint8_t bits;
  uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null for compact row-major
  uint64_t byte_offset;
};

struct DLManagedTensorVersioned {
  struct {
    uint32_t major;
    uint32_t minor;
  } version;
  void* manager_ctx;
  void (*deleter)(DLManagedTensorVersioned*);
  uint64_t flags;
  DLTensor dl_tensor;
};

// An array that came in: keeps its owner alive until destroyed.
class Imported {
 public:
  explicit Imported(const pybind11::handle& array) {
    const pybind11::object capsule =
        array.attr("__dlpack__")(pybind11::arg("max_version") = pybind11::make_tuple(1, 0));
    tensor_ = static_cast<DLManagedTensorVersioned*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
    if (tensor_ == nullptr) throw pybind11::error_already_set();
    PyCapsule_SetName(capsule.ptr(), "used_dltensor_versioned");
  }
  Imported(Imported&& other) noexcept : tensor_(std::exchange(other.tensor_, nullptr)) {}
  Imported& operator=(Imported&&) = delete;
  Imported(const Imported&) = delete;
  Imported& operator=(const Imported&) = delete;
  ~Imported() {
    if (tensor_ != nullptr && tensor_->deleter != nullptr) tensor_->deleter(tensor_);
  }

  const DLTensor& tensor() const { return tensor_->dl_tensor; }
  const void* data() const { return static_cast<const char*>(tensor().data) + tensor().byte_offset; }

  // The array as a matrix whose rows are contiguous. `bfloat16`: its 16-bit unsigned integers are bfloat16 bits.
  Matrix matrix(bool bfloat16) const {
    const DLTensor& t = tensor();
    const bool strided = t.strides != nullptr && t.ndim == 2 && t.shape[0] > 0 && t.shape[1] > 1 && t.strides[1] != 1;
    if (t.ndim != 2 || strided) fail("a matrix of contiguous rows");
    const bool floating = t.dtype.code == 2;
    DType dtype = DType::float32;
    if (floating && t.dtype.bits == 32)
      dtype = DType::float32;
    else if (floating && t.dtype.bits == 64)
      dtype = DType::float64;
    else if (floating && t.dtype.bits == 16)
      dtype = DType::float16;
    else if (bfloat16 && t.dtype.code == 1 && t.dtype.bits == 16)
      dtype = DType::bfloat16;
    else
      fail("float32, float64, float16 or bfloat16 bits");
    return {data(), t.shape[0], t.shape[1], t.strides != nullptr ? t.strides[0] : t.shape[1], dtype};
  }

  // A compact array of the given type code and width, as T.
  template <class T>
  const T* compact(uint8_t code, int ndim) const {
    const DLTensor& t = tensor();
    bool fits = t.ndim == ndim && t.dtype.code == code && t.dtype.bits == 8 * sizeof(T);
    bool empty = false;
    for (int d = 0; fits && d < ndim; ++d) empty = empty || t.shape[d] == 0;
    int64_t stride = 1;
    for (int d = ndim - 1; fits && !empty && d >= 0; --d) {
      fits = t.strides == nullptr || t.shape[d] <= 1 || t.strides[d] == stride;
      stride *= t.shape[d];
    }
    if (!fits) fail("a compact array of " + std::to_string(ndim) + " dimensions");
    return static_cast<const T*>(data());
  }

 private:
  [[noreturn]] static void fail(const std::string& expected) { throw pybind11::type_error("expected " + expected); }

  DLManagedTensorVersioned* tensor_ = nullptr;
};

}  // namespace cascade::python
