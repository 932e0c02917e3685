// Threads and dispatch over element types for the CPU kernels. Threads are torch's own pool, handed over by the
// Python side as a function pointer, so that torch.set_num_threads holds and no second OpenMP runtime is started.
#pragma once

#include <cstdint>
#include <vector>

#include "numeric.h"

namespace distributed_at {

using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int (*)(int64_t begin, int64_t end, int64_t grain, RangeFunction function, void* context);

extern ParallelFor parallel_for_of_torch;

// Work smaller than this is not worth waking a thread for.
constexpr int64_t kGrain = 32768;

template <typename Function>
void parallel_range(int64_t begin, int64_t end, int64_t grain, const Function& function) {
  if (begin >= end) return;
  if (parallel_for_of_torch == nullptr || end - begin <= grain) {
    function(begin, end);
    return;
  }
  auto call = [](int64_t first, int64_t last, void* context) {
    (*static_cast<const Function*>(context))(first, last);
  };
  parallel_for_of_torch(begin, end, grain, call, const_cast<Function*>(&function));
}

template <typename Function>
bool with_gradient_type(int type, const void* data, const Function& function) {
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

}  // namespace distributed_at
