// The one way to start a CUDA kernel. Under nvcc it launches on a stream and checks the launch; in the tests' host
// emulator (HDROPS_EMULATED, tests/emu) it runs the same kernel, block after block, on the CPU.
//
// A kernel is a __global__ function template over plain values and pointers; torch is known to the bindings only. Its
// host function (deform_conv2d/forward_cuda.cuh: forward_cuda<T>(params, stream)) computes the grid and calls launch,
// and is compiled by both. A grid's x extent may be 2^31 - 1 blocks, y and z only 65535: put what grows into x.
#pragma once
#include <cstddef>
#include <sstream>
#include <stdexcept>

#if defined(HDROPS_EMULATED)
#include "cuda_on_cpu.h"
#else
#include <cuda_runtime.h>
#endif

namespace hdrops {

struct Grid {
  dim3 blocks;
  dim3 threads;
  size_t shared_bytes = 0;  // dynamic shared memory of a block
};

#if !defined(HDROPS_EMULATED)
inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::ostringstream message;
  message << "hdrops: " << what << " failed: " << cudaGetErrorString(status);
  if (status == cudaErrorNoKernelImageForDevice) {
    message << "; the CUDA library was built for other GPUs: build it anew with HDROPS_CUDA_ARCH naming this one";
  }
  throw std::runtime_error(message.str());
}
#endif

// A grid without blocks is no error and starts nothing.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream, const Arguments&... arguments) {
  if (grid.blocks.x == 0 || grid.blocks.y == 0 || grid.blocks.z == 0) return;
#if defined(HDROPS_EMULATED)
  (void)stream;
  emulator::run(grid.blocks, grid.threads, grid.shared_bytes, [&] { kernel(Parameters(arguments)...); });
#else
  constexpr size_t kSharedWithoutAsking = 48 << 10;
  if (grid.shared_bytes > kSharedWithoutAsking) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(grid.shared_bytes)),
               "asking for shared memory");
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid.blocks;
  config.blockDim = grid.threads;
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), "launching a kernel");
#endif
}

// What a host function asks the current device, to choose between kernels. The emulator answers for the device that a
// test sets.
#if defined(HDROPS_EMULATED)
inline int device_compute_capability() { return emulator::device().compute_capability; }
inline int device_multiprocessors() { return emulator::device().multiprocessors; }
#else
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device), "asking for the device");
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "asking for a device attribute");
  return value;
}
inline int device_multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
// 10 * major + minor: 80 for sm_80.
inline int device_compute_capability() {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) + device_attribute(cudaDevAttrComputeCapabilityMinor);
}
#endif

}  // namespace hdrops
