// Entry points of deform_conv2d's forward pass on the emulator.
#include <cstdlib>
#include <cstring>
#include <memory>

#include "arrays.h"
#include "deform_conv2d/forward_cuda.cuh"

namespace hdrops::deform_conv2d {
namespace {

// As torch's allocator hands memory out: aligned, and full of whatever (here: NaN).
std::unique_ptr<void, decltype(&std::free)> allocate(size_t bytes) {
  size_t rounded = round_up<size_t>(bytes, 256);
  void* memory = std::aligned_alloc(256, rounded);
  std::memset(memory, 0xff, rounded);
  return {memory, &std::free};
}

template <class T>
const void* coordinates(const py::object& array, bool is_float) {
  if (is_float) return emulator::pointer<const float>(array);
  return emulator::pointer<const T>(array);
}

// `sizes` are Params' integers from batch to offset_groups in their order; `tensors` maps the pointers' names to arrays
// or None.
template <class T>
void forward(const std::vector<int64_t>& sizes, bool channels_last, bool offset_is_float, bool mask_is_float,
             bool allow_tf32, const py::dict& tensors) {
  Params p{};
  int64_t* const fields[] = {&p.batch,     &p.in_channels, &p.height,     &p.width,    &p.out_channels, &p.out_height,
                             &p.out_width, &p.kernel_h,    &p.kernel_w,   &p.stride_h, &p.stride_w,     &p.pad_h,
                             &p.pad_w,     &p.dilation_h,  &p.dilation_w, &p.groups,   &p.offset_groups};
  if (sizes.size() != std::size(fields)) throw std::invalid_argument("wrong number of sizes");
  for (size_t i = 0; i < sizes.size(); ++i) *fields[i] = sizes[i];
  p.channels_last = channels_last;
  p.offset_is_float = offset_is_float, p.mask_is_float = mask_is_float;
  p.allow_tf32 = allow_tf32;
  p.input = emulator::pointer<const T>(tensors["input"]);
  p.weight = emulator::pointer<const T>(tensors["weight"]);
  p.bias = emulator::pointer<const T>(tensors["bias"]);
  p.offset = coordinates<T>(tensors["offset"], offset_is_float);
  p.mask = coordinates<T>(tensors["mask"], mask_is_float);
  p.output = emulator::pointer<T>(tensors["output"]);
  auto workspace = allocate(forward_workspace_bytes<T>(p));
  forward_cuda<T>(p, workspace.get(), nullptr);
}

}  // namespace
}  // namespace hdrops::deform_conv2d

REGISTER_FAMILY(module) {
  module.def("deform_conv2d_forward",
             [](const std::string& dtype, const std::vector<int64_t>& sizes, bool channels_last, bool offset_is_float,
                bool mask_is_float, bool allow_tf32, const py::dict& tensors) {
               emulator::with_type(dtype, [&](auto tag) {
                 hdrops::deform_conv2d::forward<typename decltype(tag)::type>(sizes, channels_last, offset_is_float,
                                                                              mask_is_float, allow_tf32, tensors);
               });
             });
}
