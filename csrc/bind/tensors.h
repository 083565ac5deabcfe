// Tensors of torch as native code sees them. An argument that is named a tensor is a torch.Tensor, or a
// descriptor of the class Tensor, made of integers, which are not trusted.
#pragma once

#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "bind/bind.h"
#include "bind/dlpack.h"
#include "common/tensor.h"

namespace bitfuse {

// What of torch is asked for by name, once.
struct Torch {
  PyTypeObject *tensor, *parameter;
  const dlpack::ExchangeApi* api = nullptr;  // null: torch before 2.10, whose tensors are asked by attributes
  PyObject *data_ptr, *stride, *shape, *dtype, *device, *type, *index, *is_neg, *new_empty;  // names
  PyObject *float32, *dtype_only;  // a dtype, and the names of arguments of which the dtype is the only one
  PyObject* dtypes;                // to numbers

  Torch() {
    py::module_ torch = py::module_::import("torch");
    tensor = reinterpret_cast<PyTypeObject*>(py::object(torch.attr("Tensor")).release().ptr());
    parameter =
        reinterpret_cast<PyTypeObject*>(py::object(torch.attr("nn").attr("Parameter")).release().ptr());
    if (py::hasattr(torch.attr("Tensor"), "__dlpack_c_exchange_api__")) {
      const py::object capsule = torch.attr("Tensor").attr("__dlpack_c_exchange_api__");
      const void* found = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
      if (!found) throw py::error_already_set();
      api = static_cast<const dlpack::ExchangeApi*>(found);
      if (api->major != 1) api = nullptr;
    }
    data_ptr = PyUnicode_InternFromString("data_ptr");
    stride = PyUnicode_InternFromString("stride");
    shape = PyUnicode_InternFromString("shape");
    dtype = PyUnicode_InternFromString("dtype");
    device = PyUnicode_InternFromString("device");
    type = PyUnicode_InternFromString("type");
    index = PyUnicode_InternFromString("index");
    is_neg = PyUnicode_InternFromString("is_neg");
    new_empty = PyUnicode_InternFromString("new_empty");
    float32 = py::object(torch.attr("float32")).release().ptr();
    dtype_only = PyTuple_Pack(1, dtype);
    py::dict numbers;
    constexpr std::pair<const char*, Dtype> kDtypes[] = {
        {"float32", Dtype::kFloat32},    {"float16", Dtype::kFloat16},    {"bfloat16", Dtype::kBfloat16},
        {"uint8", Dtype::kUint8},        {"int8", Dtype::kInt8},          {"int32", Dtype::kInt32},
        {"int64", Dtype::kInt64},        {"float64", Dtype::kFloat64},    {"bool", Dtype::kBool},
        {"float8_e4m3fn", Dtype::kE4m3}, {"float8_e8m0fnu", Dtype::kE8m0}};
    for (const auto& [name, number] : kDtypes) numbers[torch.attr(name)] = int(number);
    dtypes = numbers.release().ptr();
  }
};

inline const Torch& torch() {
  static const Torch* found = new Torch;  // for good: the interpreter may go first
  return *found;
}

inline Dtype dtype_of(dlpack::Type t) {
  if (t.lanes != 1) return Dtype::kOther;
  switch (t.code << 8 | t.bits) {
    case dlpack::kFloat << 8 | 32:
      return Dtype::kFloat32;
    case dlpack::kFloat << 8 | 16:
      return Dtype::kFloat16;
    case dlpack::kBfloat << 8 | 16:
      return Dtype::kBfloat16;
    case dlpack::kUint << 8 | 8:
      return Dtype::kUint8;
    case dlpack::kInt << 8 | 8:
      return Dtype::kInt8;
    case dlpack::kInt << 8 | 32:
      return Dtype::kInt32;
    case dlpack::kInt << 8 | 64:
      return Dtype::kInt64;
    case dlpack::kFloat << 8 | 64:
      return Dtype::kFloat64;
    case dlpack::kBool << 8 | 8:
      return Dtype::kBool;
    case dlpack::kE4m3fn << 8 | 8:
      return Dtype::kE4m3;
    case dlpack::kE8m0fnu << 8 | 8:
      return Dtype::kE8m0;
    default:
      return Dtype::kOther;
  }
}

// Whether an object is a tensor of torch's own two classes, whose memory is what it seems.
inline bool is_plain(PyObject* object) {
  const Torch& t = torch();
  return Py_TYPE(object) == t.tensor || Py_TYPE(object) == t.parameter;
}

// Dimensions that a Tensor has no room for.
constexpr int kTooManyDims = -1;

// A dense tensor of more than kMaxDims dimensions becomes one of two: its last, and all before it.
inline void set_dims(Tensor& out, int dims, const int64_t* shape, const int64_t* strides) {
  if (dims <= kMaxDims) {
    out.dims = dims;
    for (int i = 0; i < dims; ++i) out.shape[i] = shape[i], out.strides[i] = strides[i];
    return;
  }
  int64_t step = 1, rows = 1;
  out.dims = kTooManyDims;
  for (int i = dims - 1; i >= 0; --i) {
    if (shape[i] != 1 && strides[i] != step) return;
    step *= shape[i];
    if (i + 1 < dims) rows *= shape[i];
  }
  out.dims = 2;
  out.shape[0] = rows, out.shape[1] = out.strides[0] = shape[dims - 1], out.strides[1] = 1;
}

// The layout of a torch tensor; dims is kTooManyDims where a Tensor can't hold it. False with a Python error
// set.
inline bool layout_of(PyObject* object, Tensor& out) {
  const Torch& names = torch();
  if (names.api) {
    dlpack::Tensor t;
    if (names.api->layout_of(object, &t) != 0) return false;
    const bool gpu = t.device.type == dlpack::kCuda;
    if (!gpu && t.device.type != dlpack::kCpu && t.device.type != dlpack::kCudaHost) {
      PyErr_SetString(PyExc_ValueError, "a tensor is neither in host memory nor on a GPU");
      return false;
    }
    out.data = static_cast<char*>(t.data) + t.byte_offset;
    out.dtype = dtype_of(t.dtype);
    out.device = gpu ? t.device.number : kHost;
    set_dims(out, t.dims, t.shape, t.strides);
    return true;
  }
  try {
    const py::handle t(object);
    out.data = reinterpret_cast<void*>(t.attr(names.data_ptr)().cast<uintptr_t>());
    PyObject* number = PyDict_GetItemWithError(names.dtypes, py::object(t.attr(names.dtype)).ptr());
    out.dtype = number ? Dtype(PyLong_AsLong(number)) : Dtype::kOther;
    const py::object device = t.attr(names.device), index = device.attr(names.index);
    const auto type = py::object(device.attr(names.type)).cast<std::string>();
    if (type != "cpu" && type != "cuda") throw py::value_error("a tensor is on " + type);
    out.device = type == "cpu" ? kHost : index.is_none() ? 0 : index.cast<int>();
    const auto shape = py::object(t.attr(names.shape)).cast<std::vector<int64_t>>();
    const auto strides = py::object(t.attr(names.stride)()).cast<std::vector<int64_t>>();
    set_dims(out, int(shape.size()), shape.data(), strides.data());
    return true;
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  }
  return false;
}

inline std::string text_of(const int64_t* sizes, int count) {
  std::string text = "[";
  for (int i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}
inline std::string shape_of(const Tensor& t) { return text_of(t.shape, t.dims); }

// Sizes and strides that may be anybody's are countable, and the address is a multiple of the element's size
// and not null where there are elements.
inline void check_layout(const char* name, const Tensor& t) {
  int64_t last = 0, part = 0;
  bool any = true;
  for (int i = 0; i < t.dims; ++i) {
    require(t.shape[i] >= 0, name, t.shape[i], i + 1 < t.dims ? "0 rows or more" : "0 columns or more");
    require(t.strides[i] >= 0, name, t.strides[i], "a row stride of 0 or more");
    any = any && t.shape[i] > 0;
  }
  for (int i = 0; i < t.dims; ++i)
    if (__builtin_mul_overflow(t.shape[i], t.strides[i], &part) || __builtin_add_overflow(last, part, &last))
      refuse(name, "larger than memory", "sizes whose product is below 2^63");
  if (__builtin_mul_overflow(last, int64_t{8}, &part))
    refuse(name, "larger than memory", "sizes whose product is below 2^63");
  int64_t bytes = 8;
  for (int i = 0; i < t.dims; ++i)
    if (__builtin_mul_overflow(bytes, t.shape[i], &bytes))
      refuse(name, "larger than memory", "sizes whose product is below 2^63");
  const auto alignment = uintptr_t(size_of(t.dtype));
  address<void>(name, reinterpret_cast<uintptr_t>(t.data), alignment ? alignment : 1, any);
}

// The tensor that an argument is. Raises what torch raises for one without memory of its own.
inline Tensor read(const char* name, py::handle object) {
  Tensor t;
  if (py::isinstance<Tensor>(object)) {
    t = *object.cast<const Tensor*>();
  } else {
    if (!PyObject_TypeCheck(object.ptr(), torch().tensor))
      throw py::type_error(std::string(name) + " is a " + Py_TYPE(object.ptr())->tp_name +
                           ", expected a tensor");
    if (!layout_of(object.ptr(), t)) throw py::error_already_set();
    if (t.dims == kTooManyDims)
      refuse(name, "of more dimensions", "at most " + std::to_string(kMaxDims) + " dimensions");
  }
  check_layout(name, t);
  return t;
}

inline Tensor read_or_none(const char* name, py::handle object) {
  return object.is_none() ? Tensor{} : read(name, object);
}

inline const char* name_of(Dtype dtype) {
  constexpr const char* kNames[] = {"float32", "float16",       "bfloat16",       "uint8",
                                    "int8",    "int32",         "int64",          "float64",
                                    "bool",    "float8_e4m3fn", "float8_e8m0fnu", "another"};
  return kNames[int(dtype)];
}

inline void require_dtype(const char* name, const Tensor& t, Dtype dtype) {
  if (t.dtype != dtype) refuse(name, std::string("of dtype ") + name_of(t.dtype), name_of(dtype));
}

inline void require_float(const char* name, const Tensor& t) {
  if (!is_float(t.dtype))
    refuse(name, std::string("of dtype ") + name_of(t.dtype), "float32, float16 or bfloat16");
}

inline void require_device(const char* name, const Tensor& t, int device) {
  if (t.device == device) return;
  auto text = [](int number) {
    return number == kHost ? std::string("cpu") : "cuda:" + std::to_string(number);
  };
  refuse(name, "on " + text(t.device), text(device));
}

// An array without gaps: the array's address, null where it holds nothing.
template <class T>
T* dense(const char* name, const Tensor& t, Dtype dtype, std::initializer_list<int64_t> shape) {
  require_dtype(name, t, dtype);
  bool fits = t.dims == int(shape.size());
  for (int i = 0; fits && i < t.dims; ++i) fits = t.shape[i] == shape.begin()[i];
  if (!fits) refuse(name, "of shape " + shape_of(t), text_of(shape.begin(), int(shape.size())));
  if (!is_dense(t)) refuse(name, "of strides " + text_of(t.strides, t.dims), "a contiguous tensor");
  return static_cast<T*>(t.data);
}

// Whether numbers of the last dimension lie side by side, where there are two.
inline bool has_dense_rows(const Tensor& t) {
  const int last = t.dims - 1;
  return t.shape[last] <= 1 || t.strides[last] == 1 || is_dense(t);
}

// [..., columns] as rows.
inline Matrix rows_of(const char* name, const Tensor& t) {
  Matrix m;
  if (!fold_rows(t, m))
    refuse(name, "of shape " + shape_of(t) + " and strides " + text_of(t.strides, t.dims),
           "rows one stride apart");
  return m;
}

}  // namespace bitfuse
