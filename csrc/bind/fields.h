// Fields of an object of Python, a named tuple of arguments, by their names.
#pragma once

#include <optional>

#include "bind/tensors.h"

namespace bitfuse {

// A torch.dtype's.
inline Dtype dtype_named(py::handle dtype) {
  PyObject* number = PyDict_GetItemWithError(torch().dtypes, dtype.ptr());
  if (!number && PyErr_Occurred()) throw py::error_already_set();
  return number ? static_cast<Dtype>(PyLong_AsLong(number)) : Dtype::kOther;
}

// The name of a field: one is made for good, as a static.
class Name {
 public:
  explicit Name(const char* text) : text_(text), object_(PyUnicode_InternFromString(text)) {}

  const char* text() const { return text_; }

  py::object of(py::handle object) const {
    PyObject* found = PyObject_GetAttr(object.ptr(), object_);
    if (!found) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(found);
  }
  // An int; one of more than 64 bits is the nearest of 64.
  int64_t integer(py::handle object) const {
    int over = 0;
    const int64_t value = PyLong_AsLongLongAndOverflow(of(object).ptr(), &over);
    if (over) return over > 0 ? INT64_MAX : INT64_MIN;
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }
  double number(py::handle object) const {
    const double value = PyFloat_AsDouble(of(object).ptr());
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }
  bool flag(py::handle object) const {
    const int value = PyObject_IsTrue(of(object).ptr());
    if (value < 0) throw py::error_already_set();
    return value != 0;
  }
  // In messages a tensor has the field's name, unless it is given another.
  Tensor tensor(py::handle object, const char* name = nullptr) const {
    return read(name ? name : text_, of(object));
  }
  std::optional<Tensor> tensor_or_none(py::handle object, const char* name = nullptr) const {
    const py::object found = of(object);
    if (found.is_none()) return std::nullopt;
    return read(name ? name : text_, found);
  }

 private:
  const char* text_;
  PyObject* object_;
};

}  // namespace bitfuse
