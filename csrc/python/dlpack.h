// pybind11 caster from Python arrays to TensorView through DLPack.
//
// Fast way: a type that offers `__dlpack_c_exchange_api__` (torch >= 2.11) hands out a borrowed
// DLTensor without a Python call, about 0.1 us a tensor. The table is looked up once per type.
// Everything else (NumPy, JAX on CPU) goes through `__dlpack__()`, about 2 us a tensor; the capsule
// is kept until the call returns.
#pragma once

#include <dlpack/dlpack.h>
#include <pybind11/pybind11.h>

#include "../common/check.h"

namespace cgpt::python {

namespace py = pybind11;

inline TensorView view_of(const DLTensor& t) {
  TensorView v;
  if (t.ndim > TensorView::kMaxDims)
    fail("tensor has " + std::to_string(t.ndim) + " dimensions, at most " +
         std::to_string(TensorView::kMaxDims) + " are supported");
  v.data = static_cast<char*>(t.data) + t.byte_offset;
  v.ndim = t.ndim;
  int64_t dense = 1;
  for (int d = t.ndim - 1; d >= 0; --d) {
    v.shape[d] = t.shape[d];
    v.strides[d] = t.strides ? t.strides[d] : dense;
    dense *= t.shape[d];
  }
  const int code = t.dtype.code, bits = t.dtype.bits;
  if (t.dtype.lanes != 1) v.dtype = DType::other;
  else if (code == kDLFloat && bits == 32) v.dtype = DType::f32;
  else if (code == kDLBfloat && bits == 16) v.dtype = DType::bf16;
  else if (code == kDLFloat && bits == 16) v.dtype = DType::f16;
  else if (code == kDLFloat && bits == 64) v.dtype = DType::f64;
  else if (code == kDLInt && bits == 64) v.dtype = DType::i64;
  else if (code == kDLInt && bits == 32) v.dtype = DType::i32;
  else if (code == kDLInt && bits == 8) v.dtype = DType::i8;
  else if (code == kDLUInt && bits == 8) v.dtype = DType::u8;
  else if (code == kDLBool && bits == 8) v.dtype = DType::boolean;
  v.device = t.device.device_type == kDLCPU    ? Device::cpu
             : t.device.device_type == kDLCUDA ? Device::cuda
                                               : Device::other;
  v.device_index = t.device.device_id;
  return v;
}

// The exchange table of a type, or nullptr. Types are few: torch.Tensor, Parameter and a subclass
// or two share a handful of slots, filled in turn; the attribute lookup they save costs 0.1 us.
inline const DLPackExchangeAPI* exchange_api(PyTypeObject* type) {
  struct Slot {
    PyTypeObject* type = nullptr;
    const DLPackExchangeAPI* api = nullptr;
  };
  static Slot slots[4];
  static int next = 0;
  for (const Slot& slot : slots)
    if (slot.type == type) return slot.api;

  PyObject* capsule =
      PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  const DLPackExchangeAPI* api = nullptr;
  if (capsule) {
    api =
        static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    Py_DECREF(capsule);
  }
  PyErr_Clear();
  if (api &&
      (api->header.version.major != DLPACK_MAJOR_VERSION || !api->dltensor_from_py_object_no_sync))
    api = nullptr;
  // Held for good: a type freed and another allocated at its address would inherit the answer.
  Py_INCREF(type);
  slots[next] = {type, api};
  next = (next + 1) % 4;
  return api;
}

// A view, the Python object it was taken from, and whatever keeps its memory alive during the call.
struct __attribute__((visibility("hidden"))) BorrowedTensor : TensorView {
  py::handle source;
  py::object owner;
};

// like.new_empty(*like.shape[:-1], last): an output of like's framework, dtype and device. Asked
// for here, where the shape is at hand, it costs 0.25 us less than from Python.
inline py::object new_empty(const BorrowedTensor& like, int64_t last) {
  static PyObject* const name = PyUnicode_InternFromString("new_empty");
  PyObject* call[1 + TensorView::kMaxDims] = {like.source.ptr()};
  for (int d = 0; d < like.ndim; ++d)
    call[1 + d] = PyLong_FromLongLong(d + 1 < like.ndim ? like.shape[d] : last);
  PyObject* out =
      PyObject_VectorcallMethod(name, call, static_cast<size_t>(1 + like.ndim), nullptr);
  for (int d = 0; d < like.ndim; ++d) Py_XDECREF(call[1 + d]);
  if (!out) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(out);
}

// Whether a's and b's dimensions but the last `skip_a` and `skip_b` of them are equal.
inline bool same_leading(const TensorView& a, const TensorView& b, int skip_a, int skip_b) {
  const int n = a.ndim - skip_a;
  if (n != b.ndim - skip_b) return false;
  for (int d = 0; d < n; ++d)
    if (a.shape[d] != b.shape[d]) return false;
  return true;
}

// How the bound functions take a tensor; an absent one is Python's None.
using Tensor = const BorrowedTensor&;

inline void borrow_from_protocol(py::handle source, BorrowedTensor& out) {
  py::object capsule = source.attr("__dlpack__")();
  if (auto* m = static_cast<DLManagedTensorVersioned*>(
          PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")
              ? PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned")
              : nullptr)) {
    static_cast<TensorView&>(out) = view_of(m->dl_tensor);
  } else {
    auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    if (!managed) throw py::error_already_set();
    static_cast<TensorView&>(out) = view_of(managed->dl_tensor);
  }
  // Not renamed to "used_dltensor": the capsule still owns the tensor and frees it after the call.
  out.owner = std::move(capsule);
}

}  // namespace cgpt::python

namespace pybind11::detail {

template <>
struct type_caster<cgpt::python::BorrowedTensor> {
  PYBIND11_TYPE_CASTER(cgpt::python::BorrowedTensor, const_name("Tensor"));

  bool load(handle source, bool) {
    if (source.is_none()) return true;  // an absent optional tensor
    value.source = source;
    if (const DLPackExchangeAPI* api = cgpt::python::exchange_api(Py_TYPE(source.ptr()))) {
      DLTensor t;
      if (api->dltensor_from_py_object_no_sync(source.ptr(), &t) != 0) throw error_already_set();
      static_cast<cgpt::TensorView&>(value) = cgpt::python::view_of(t);
      if (value.device == cgpt::Device::cuda &&
          api->current_work_stream(t.device.device_type, t.device.device_id, &value.stream) != 0)
        throw error_already_set();
      return true;
    }
    if (!hasattr(source, "__dlpack__")) return false;
    cgpt::python::borrow_from_protocol(source, value);
    return true;
  }
};

}  // namespace pybind11::detail
