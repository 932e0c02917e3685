// The l2 step on a GPU in three passes: piece sums of the gradient's squares; the step and the piece sums of the
// perturbation's squares; the projection. Sums are in double, in an order that depends on the shape alone: no atomics.
#include "launch.h"

namespace distributed_at {
namespace {

// Elements of one sample that one block sums. A sample of 3 x 224 x 224 has 74 pieces.
constexpr int64_t kPiece = 2048;

// Every thread returns the sum over the block, added as a tree of fixed shape.
__device__ double block_sum(double value) {
  __shared__ double sums[kThreads];
  sums[threadIdx.x] = value;
  __syncthreads();
  for (int width = kThreads / 2; width > 0; width /= 2) {
    if (threadIdx.x < static_cast<unsigned int>(width)) sums[threadIdx.x] += sums[threadIdx.x + width];
    __syncthreads();
  }
  const double total = sums[0];
  __syncthreads();
  return total;
}

__device__ double norm_of(const double* __restrict__ partial, int64_t sample, int64_t pieces) {
  double mine = 0.0;
  for (int64_t piece = threadIdx.x; piece < pieces; piece += kThreads) mine += partial[sample * pieces + piece];
  return sqrt(block_sum(mine));
}

template <typename Gradient>
__global__ void gradient_squares(double* __restrict__ partial, const Gradient* __restrict__ gradient, int64_t samples,
                                 int64_t count, int64_t pieces) {
  for (int64_t piece = blockIdx.x; piece < samples * pieces; piece += gridDim.x) {
    const int64_t first = (piece % pieces) * kPiece;
    const int64_t last = first + kPiece < count ? first + kPiece : count;
    double mine = 0.0;
    for (int64_t i = first + threadIdx.x; i < last; i += kThreads) {
      const double value = finite_gradient(to_float(gradient[(piece / pieces) * count + i]));
      mine += value * value;
    }
    const double total = block_sum(mine);
    if (threadIdx.x == 0) partial[piece] = total;
  }
}

template <typename Clean, typename Gradient>
__global__ void step_and_squares(float* __restrict__ out, double* __restrict__ delta_partial,
                                 const double* __restrict__ gradient_partial, const float* __restrict__ x,
                                 const Clean* __restrict__ clean, const Gradient* __restrict__ gradient,
                                 const float* __restrict__ step, float direction, int64_t samples, int64_t count,
                                 int64_t pieces) {
  const double signed_step = static_cast<double>(direction) * static_cast<double>(*step);
  for (int64_t piece = blockIdx.x; piece < samples * pieces; piece += gridDim.x) {
    const int64_t sample = piece / pieces;
    const double scale = l2_scale(signed_step, norm_of(gradient_partial, sample, pieces));
    const int64_t first = (piece % pieces) * kPiece;
    const int64_t last = first + kPiece < count ? first + kPiece : count;
    double mine = 0.0;
    for (int64_t j = first + threadIdx.x; j < last; j += kThreads) {
      const int64_t i = sample * count + j;
      const double move = static_cast<double>(finite_gradient(to_float(gradient[i]))) * scale;
      const float moved = x[i] - static_cast<float>(move);
      out[i] = moved;
      const double delta = static_cast<double>(moved) - static_cast<double>(to_pixel(clean[i]));
      mine += delta * delta;
    }
    const double total = block_sum(mine);
    if (threadIdx.x == 0) delta_partial[piece] = total;
  }
}

template <typename Clean>
__global__ void project(float* __restrict__ out, const double* __restrict__ delta_partial,
                        const Clean* __restrict__ clean, const float* __restrict__ eps, float low, float high,
                        int64_t samples, int64_t count, int64_t pieces) {
  const Ball ball{*eps, low, high};
  for (int64_t piece = blockIdx.x; piece < samples * pieces; piece += gridDim.x) {
    const int64_t sample = piece / pieces;
    const double norm = norm_of(delta_partial, sample, pieces);
    const double ratio = l2_ratio(norm, ball.eps);
    const int64_t first = (piece % pieces) * kPiece;
    const int64_t last = first + kPiece < count ? first + kPiece : count;
    for (int64_t j = first + threadIdx.x; j < last; j += kThreads) {
      const int64_t i = sample * count + j;
      out[i] = l2_project(out[i], to_pixel(clean[i]), ratio, ball);
    }
  }
}

}  // namespace
}  // namespace distributed_at

using namespace distributed_at;

// Doubles of scratch memory that dat_cuda_l2_step needs.
extern "C" int64_t dat_cuda_l2_scratch(int64_t samples, int64_t count) {
  return 2 * samples * ((count + kPiece - 1) / kPiece);
}

extern "C" int dat_cuda_l2_step(float* out, double* scratch, const float* x, const void* clean, int clean_type,
                                const void* gradient, int gradient_type, const float* eps, const float* step,
                                float direction, float low, float high, int64_t samples, int64_t count, void* stream) {
  const int64_t pieces = (count + kPiece - 1) / kPiece;
  if (samples * pieces == 0) return 0;
  double* gradient_partial = scratch;
  double* delta_partial = scratch + samples * pieces;
  const unsigned int blocks = static_cast<unsigned int>(samples * pieces < kMaxBlocks ? samples * pieces : kMaxBlocks);
  return launch_for_types(clean_type, clean, gradient_type, gradient, [&](const auto* c, const auto* g) {
    DAT_LAUNCH(gradient_squares, blocks, kThreads, stream, gradient_partial, g, samples, count, pieces);
    DAT_LAUNCH(step_and_squares, blocks, kThreads, stream, out, delta_partial, gradient_partial, x, c, g, step,
               direction, samples, count, pieces);
    DAT_LAUNCH(project, blocks, kThreads, stream, out, delta_partial, c, eps, low, high, samples, count, pieces);
  });
}
