// How the CUDA sources launch a kernel and name their thread; the host emulator of the tests replaces this header.
#pragma once

#if defined(DAT_EMULATE)
#include "emulate.h"
#else
#include <cuda_runtime.h>
#define DAT_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<(grid), (block), 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define DAT_LAST_ERROR() static_cast<int>(cudaGetLastError())
#endif

#include "numeric.h"

namespace distributed_at {

constexpr int kThreads = 256;
// Enough blocks to fill the largest GPU several times over; longer work loops inside the kernel.
constexpr int64_t kMaxBlocks = 132 * 16;

inline unsigned int blocks_for(int64_t work) {
  const int64_t blocks = (work + kThreads - 1) / kThreads;
  return static_cast<unsigned int>(blocks < 1 ? 1 : blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

#define DAT_GRID_STRIDE_LOOP(i, count)                                                             \
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < (count); \
       i += static_cast<int64_t>(gridDim.x) * blockDim.x)

template <typename Function>
bool with_float_type(int type, const void* data, const Function& function) {
  switch (type) {
    case kFloat32: function(static_cast<const float*>(data)); return true;
    case kBFloat16: function(static_cast<const BFloat16*>(data)); return true;
    case kFloat16: function(static_cast<const Float16*>(data)); return true;
    default: return false;
  }
}

template <typename Function>
bool with_clean_type(int type, const void* data, const Function& function) {
  switch (type) {
    case kFloat32: function(static_cast<const float*>(data)); return true;
    case kUInt8: function(static_cast<const uint8_t*>(data)); return true;
    default: return false;
  }
}

// Entry points return 0, a cudaError_t, or this for a type number that they do not take.
constexpr int kUnknownType = -1;

template <typename Launch>
int launch_for_types(int clean_type, const void* clean, int gradient_type, const void* gradient, const Launch& launch) {
  bool known = false;
  with_clean_type(clean_type, clean, [&](const auto* clean_typed) {
    known = with_float_type(gradient_type, gradient,
                            [&](const auto* gradient_typed) { launch(clean_typed, gradient_typed); });
  });
  return known ? DAT_LAST_ERROR() : kUnknownType;
}

}  // namespace distributed_at
