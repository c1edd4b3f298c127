// NumPy arrays as the pointers that host functions take, and registration of a family's entry points.
//
// A family's file, tests/emu/<family>.cpp:
//
//   REGISTER_FAMILY(module) {
//     module.def("crf_forward", [](const std::string& dtype, py::object x, py::object curve, py::object y) {
//       with_type(dtype, [&](auto tag) {
//         using T = typename decltype(tag)::type;
//         Params params{...};
//         forward_cuda<T>(params, pointer<const T>(x), pointer<const T>(curve), pointer<T>(y), nullptr);
//       });
//     });
//   }
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "common/half.h"

namespace py = pybind11;

namespace emulator {

// The element type of the array that holds values of type T: the 16-bit formats are bits.
template <class T>
struct Element {
  using type = T;
};
template <>
struct Element<hdrops::bfloat16> {
  using type = uint16_t;
};
template <>
struct Element<hdrops::float16> {
  using type = uint16_t;
};

// The array's first element; nullptr for None. The array must be of T's element type, and writeable unless T is const.
template <class T>
T* strided_pointer(const py::object& object) {
  if (object.is_none()) return nullptr;
  py::array array = py::cast<py::array>(object);
  py::dtype expected = py::dtype::of<typename Element<std::remove_const_t<T>>::type>();
  if (!array.dtype().is(expected) && !array.dtype().equal(expected)) {
    throw std::invalid_argument("array of " + std::string(py::str(array.dtype())) + ", expected " +
                                std::string(py::str(expected)));
  }
  if constexpr (std::is_const_v<T>) {
    return static_cast<T*>(array.data());
  } else {
    return static_cast<T*>(array.mutable_data());
  }
}

// The same of an array that must be C-contiguous.
template <class T>
T* pointer(const py::object& object) {
  if (!object.is_none() && (py::cast<py::array>(object).flags() & py::array::c_style) == 0) {
    throw std::invalid_argument("the array must be C-contiguous");
  }
  return strided_pointer<T>(object);
}

inline int64_t size(const py::array& array, int dim) { return array.shape(dim); }
// In elements.
inline int64_t stride(const py::array& array, int dim) { return array.strides(dim) / array.itemsize(); }

// Calls action(std::type_identity<T>()) for the storage type of that name.
template <class Action>
decltype(auto) with_type(const std::string& dtype, const Action& action) {
  if (dtype == "float32") return action(std::type_identity<float>());
  if (dtype == "float64") return action(std::type_identity<double>());
  if (dtype == "bfloat16") return action(std::type_identity<hdrops::bfloat16>());
  if (dtype == "float16") return action(std::type_identity<hdrops::float16>());
  throw std::invalid_argument("no storage type " + dtype);
}

using Registration = void (*)(py::module_&);
std::vector<Registration>& registrations();

struct Register {
  explicit Register(Registration registration) { registrations().push_back(registration); }
};

}  // namespace emulator

// Followed by the body of a function that defines the entry points of this file in `module`. Once in a file.
#define REGISTER_FAMILY(module)                                 \
  static void register_family(py::module_& module);             \
  static const emulator::Register kRegistered(register_family); \
  static void register_family([[maybe_unused]] py::module_& module)
