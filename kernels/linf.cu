// The l-infinity step on a GPU: one pass over the image. Elementwise, so the bits equal those of the CPU kernel.
#include "launch.h"

namespace distributed_at {
namespace {

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T item[4];
};

template <typename Clean, typename Gradient>
__global__ void linf_step(float* __restrict__ out, const float* __restrict__ x, const Clean* __restrict__ clean,
                          const Gradient* __restrict__ gradient, const float* __restrict__ eps,
                          const float* __restrict__ step, float direction, float low, float high, int64_t count) {
  const Ball ball{*eps, low, high};
  const float signed_step = direction * *step;
  const int64_t fours = count / 4;
  DAT_GRID_STRIDE_LOOP(i, fours) {
    const Four<float> four_x = reinterpret_cast<const Four<float>*>(x)[i];
    const Four<Clean> four_clean = reinterpret_cast<const Four<Clean>*>(clean)[i];
    const Four<Gradient> four_gradient = reinterpret_cast<const Four<Gradient>*>(gradient)[i];
    Four<float> result;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      result.item[k] = linf_element(four_x.item[k], to_pixel(four_clean.item[k]), to_float(four_gradient.item[k]),
                                    signed_step, ball);
    }
    reinterpret_cast<Four<float>*>(out)[i] = result;
  }
  DAT_GRID_STRIDE_LOOP(rest, count - fours * 4) {
    const int64_t i = fours * 4 + rest;
    out[i] = linf_element(x[i], to_pixel(clean[i]), to_float(gradient[i]), signed_step, ball);
  }
}

template <typename Clean, typename Gradient>
__global__ void linf_step_unaligned(float* __restrict__ out, const float* __restrict__ x,
                                    const Clean* __restrict__ clean, const Gradient* __restrict__ gradient,
                                    const float* __restrict__ eps, const float* __restrict__ step, float direction,
                                    float low, float high, int64_t count) {
  const Ball ball{*eps, low, high};
  const float signed_step = direction * *step;
  DAT_GRID_STRIDE_LOOP(i, count) {
    out[i] = linf_element(x[i], to_pixel(clean[i]), to_float(gradient[i]), signed_step, ball);
  }
}

bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

}  // namespace
}  // namespace distributed_at

using namespace distributed_at;

extern "C" int dat_cuda_linf_step(float* out, const float* x, const void* clean, int clean_type, const void* gradient,
                                  int gradient_type, const float* eps, const float* step, float direction, float low,
                                  float high, int64_t count, void* stream) {
  if (count == 0) return 0;
  return launch_for_types(clean_type, clean, gradient_type, gradient, [&](const auto* c, const auto* g) {
    const bool vector = aligned(out, 16) && aligned(x, 16) && aligned(c, 4 * sizeof(*c)) && aligned(g, 4 * sizeof(*g));
    if (vector) {
      DAT_LAUNCH(linf_step, blocks_for(count / 4), kThreads, stream, out, x, c, g, eps, step, direction, low, high,
                 count);
    } else {
      DAT_LAUNCH(linf_step_unaligned, blocks_for(count), kThreads, stream, out, x, c, g, eps, step, direction, low,
                 high, count);
    }
  });
}
