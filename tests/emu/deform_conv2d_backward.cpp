// Entry points of deform_conv2d's backward pass on the emulator.
#include <cstdlib>
#include <memory>

#include "arrays.h"
#include "deform_conv2d/backward_cuda.cuh"

namespace hdrops::deform_conv2d {
namespace {

// As torch's allocator hands it out: aligned, and full of whatever (here: NaN).
std::unique_ptr<void, decltype(&std::free)> allocate(size_t bytes) {
  size_t rounded = round_up<size_t>(bytes, 256);
  void* memory = rounded == 0 ? nullptr : std::aligned_alloc(256, rounded);
  if (memory != nullptr) std::memset(memory, 0xff, rounded);
  return {memory, &std::free};
}

// Offset, mask and their gradients: T's or floats.
template <class T, class Pointer>
Pointer coordinates(const py::object& array, bool is_float) {
  if constexpr (std::is_const_v<std::remove_pointer_t<Pointer>>) {
    return is_float ? static_cast<Pointer>(emulator::pointer<const float>(array)) : emulator::pointer<const T>(array);
  } else {
    return is_float ? static_cast<Pointer>(emulator::pointer<float>(array)) : emulator::pointer<T>(array);
  }
}

// `sizes` are Params' integers from batch to offset_groups in their order; `tensors` maps the pointers' names to arrays
// or None. Returns the workspace's size in bytes.
template <class T>
size_t backward(const std::vector<int64_t>& sizes, bool channels_last, bool offset_is_float, bool mask_is_float,
                bool deterministic, bool allow_tf32, const py::dict& tensors) {
  Params p{};
  int64_t* const fields[] = {&p.batch,     &p.in_channels, &p.height,     &p.width,    &p.out_channels, &p.out_height,
                             &p.out_width, &p.kernel_h,    &p.kernel_w,   &p.stride_h, &p.stride_w,     &p.pad_h,
                             &p.pad_w,     &p.dilation_h,  &p.dilation_w, &p.groups,   &p.offset_groups};
  if (sizes.size() != std::size(fields)) throw std::invalid_argument("wrong number of sizes");
  for (size_t i = 0; i < sizes.size(); ++i) *fields[i] = sizes[i];
  p.channels_last = channels_last;
  p.offset_is_float = offset_is_float, p.mask_is_float = mask_is_float;
  p.deterministic = deterministic, p.allow_tf32 = allow_tf32;
  p.input = emulator::pointer<const T>(tensors["input"]);
  p.weight = emulator::pointer<const T>(tensors["weight"]);
  p.grad_output = emulator::pointer<const T>(tensors["grad_output"]);
  p.offset = coordinates<T, const void*>(tensors["offset"], offset_is_float);
  p.mask = coordinates<T, const void*>(tensors["mask"], mask_is_float);
  p.grad_input = emulator::pointer<T>(tensors["grad_input"]);
  p.grad_weight = emulator::pointer<T>(tensors["grad_weight"]);
  p.grad_bias = emulator::pointer<T>(tensors["grad_bias"]);
  p.grad_offset = coordinates<T, void*>(tensors["grad_offset"], offset_is_float);
  p.grad_mask = coordinates<T, void*>(tensors["grad_mask"], mask_is_float);
  size_t bytes = backward_workspace_bytes<T>(p);
  auto workspace = allocate(bytes);
  backward_cuda<T>(p, workspace.get(), nullptr);
  return bytes;
}

}  // namespace
}  // namespace hdrops::deform_conv2d

REGISTER_FAMILY(module) {
  module.def("deform_conv2d_backward",
             [](const std::string& dtype, const std::vector<int64_t>& sizes, bool channels_last, bool offset_is_float,
                bool mask_is_float, bool deterministic, bool allow_tf32, const py::dict& tensors) {
               return emulator::with_type(dtype, [&](auto tag) {
                 return hdrops::deform_conv2d::backward<typename decltype(tag)::type>(
                     sizes, channels_last, offset_is_float, mask_is_float, deterministic, allow_tf32, tensors);
               });
             });
}
