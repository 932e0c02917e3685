// The random start on a GPU: one thread draws one Philox block, four elements of one sample in (C, H, W) order,
// so that a sample's start depends on its id and the counters alone, never on its batch or its memory layout.
#include "launch.h"

namespace distributed_at {
namespace {

template <typename Clean>
__global__ void random_start(float* __restrict__ out, const Clean* __restrict__ clean, const int64_t* __restrict__ ids,
                             const int64_t* __restrict__ coin_ids, StartDraw draw, const float* __restrict__ eps,
                             float low, float high, int64_t samples, int64_t channels, int64_t pixels,
                             int channels_last) {
  const Ball ball{*eps, low, high};
  const int64_t count = channels * pixels;
  const int64_t blocks = (count + 3) / 4;
  DAT_GRID_STRIDE_LOOP(index, samples * blocks) {
    const int64_t sample = index / blocks;
    const int64_t block = index % blocks;
    const bool stay = draw.clean_probability > 0.0f && starts_clean(static_cast<uint32_t>(coin_ids[sample]), draw);
    const Words words = philox(static_cast<uint32_t>(block), static_cast<uint32_t>(ids[sample]), draw.epoch,
                               draw.noise_purpose, draw.seed);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int64_t i = block * 4 + w;
      if (i < count) {
        const int64_t at = sample * count + offset_in_sample(i, channels, pixels, channels_last);
        out[at] = stay ? to_pixel(clean[at]) + 0.0f : start_element(to_pixel(clean[at]), words.word[w], ball);
      }
    }
  }
}

}  // namespace
}  // namespace distributed_at

using namespace distributed_at;

extern "C" int dat_cuda_random_start(float* out, const void* clean, int clean_type, const int64_t* ids,
                                     const int64_t* coin_ids, uint64_t seed, uint32_t epoch, uint32_t noise_purpose,
                                     uint32_t coin_purpose, float clean_probability, const float* eps,
                                     float low, float high, int64_t samples, int64_t channels, int64_t pixels,
                                     int channels_last, void* stream) {
  const int64_t work = samples * ((channels * pixels + 3) / 4);
  if (work == 0) return 0;
  const StartDraw draw{seed, epoch, noise_purpose, coin_purpose, clean_probability};
  const bool known = with_clean_type(clean_type, clean, [&](const auto* typed) {
    DAT_LAUNCH(random_start, blocks_for(work), kThreads, stream, out, typed, ids, coin_ids, draw, eps, low, high,
               samples, channels, pixels, channels_last);
  });
  return known ? DAT_LAST_ERROR() : kUnknownType;
}
