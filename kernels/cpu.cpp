// CPU kernels of the attack: the l-infinity step, the l2 step and the random start, behind a plain C interface.
// No torch headers: pointers, sizes and type numbers come from distributed_at/ops, which owns shapes and memory.
#include "cpu.h"

#include <cmath>

namespace distributed_at {

ParallelFor parallel_for_of_torch = nullptr;

namespace {

template <typename Clean, typename Gradient>
void linf_range(float* __restrict__ out, const float* __restrict__ x, const Clean* __restrict__ clean,
                const Gradient* __restrict__ gradient, float signed_step, Ball ball, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    out[i] = linf_element(x[i], to_pixel(clean[i]), to_float(gradient[i]), signed_step, ball);
  }
}

// A sum of squares whose order depends on the element count alone: 16 lanes, then the lanes in order.
template <typename Value>
double sum_of_squares(int64_t begin, int64_t end, const Value& value) {
  constexpr int kLanes = 16;
  double lanes[kLanes] = {};
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const double element = value(i + lane);
      lanes[lane] += element * element;
    }
  }
  for (int lane = 0; i < end; ++i, ++lane) {
    const double element = value(i);
    lanes[lane] += element * element;
  }
  double total = 0.0;
  for (double lane : lanes) total += lane;
  return total;
}

// Samples are cut into fixed pieces, summed on their own and then in order: the result does not depend on threads.
constexpr int64_t kPiece = 8192;

template <typename Function>
void over_pieces(int64_t samples, int64_t count, const Function& function) {
  const int64_t pieces = (count + kPiece - 1) / kPiece;
  parallel_range(0, samples * pieces, 4, [&](int64_t first, int64_t last) {
    for (int64_t piece = first; piece < last; ++piece) {
      const int64_t sample = piece / pieces;
      const int64_t begin = (piece % pieces) * kPiece;
      const int64_t end = begin + kPiece < count ? begin + kPiece : count;
      function(piece, sample, sample * count + begin, sample * count + end);
    }
  });
}

double norm_of(const std::vector<double>& partial, int64_t sample, int64_t pieces) {
  double total = 0.0;
  for (int64_t piece = 0; piece < pieces; ++piece) total += partial[sample * pieces + piece];
  return std::sqrt(total);
}

template <typename Clean, typename Gradient>
void l2_step(float* out, const float* x, const Clean* clean, const Gradient* gradient, double signed_step, Ball ball,
             int64_t samples, int64_t count) {
  const int64_t pieces = (count + kPiece - 1) / kPiece;
  std::vector<double> gradient_sums(samples * pieces), delta_sums(samples * pieces);
  over_pieces(samples, count, [&](int64_t piece, int64_t, int64_t begin, int64_t end) {
    gradient_sums[piece] =
        sum_of_squares(begin, end, [&](int64_t i) { return double(finite_gradient(to_float(gradient[i]))); });
  });
  std::vector<double> scales(samples), ratios(samples);
  for (int64_t n = 0; n < samples; ++n) scales[n] = l2_scale(signed_step, norm_of(gradient_sums, n, pieces));
  over_pieces(samples, count, [&](int64_t piece, int64_t sample, int64_t begin, int64_t end) {
    const double scale = scales[sample];
    for (int64_t i = begin; i < end; ++i) {
      out[i] = x[i] - static_cast<float>(double(finite_gradient(to_float(gradient[i]))) * scale);
    }
    delta_sums[piece] = sum_of_squares(begin, end, [&](int64_t i) { return double(out[i]) - double(to_pixel(clean[i])); });
  });
  for (int64_t n = 0; n < samples; ++n) {
    const double norm = norm_of(delta_sums, n, pieces);
    ratios[n] = l2_ratio(norm, ball.eps);
  }
  over_pieces(samples, count, [&](int64_t, int64_t sample, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] = l2_project(out[i], to_pixel(clean[i]), ratios[sample], ball);
  });
}

constexpr int kBatch = 16;  // Philox blocks drawn side by side

// Not inlined: g++ would unroll the lanes into scalar code before it tries to vectorise them.
__attribute__((noinline)) void philox_round_of_lanes(uint32_t* __restrict__ c0, uint32_t* __restrict__ c1,
                                                     uint32_t* __restrict__ c2, uint32_t* __restrict__ c3,
                                                     uint32_t key0, uint32_t key1) {
  for (int lane = 0; lane < kBatch; ++lane) philox_round(&c0[lane], &c1[lane], &c2[lane], &c3[lane], key0, key1);
}

// The words of blocks [block, block + kBatch) in order: philox() of numeric.h with its lanes as the inner loop.
void draw_words(uint32_t* __restrict__ words, uint32_t block, uint32_t sample, uint32_t epoch, uint32_t purpose,
                uint64_t seed) {
  uint32_t c0[kBatch], c1[kBatch], c2[kBatch], c3[kBatch];
  for (int lane = 0; lane < kBatch; ++lane) {
    c0[lane] = block + static_cast<uint32_t>(lane);
    c1[lane] = sample;
    c2[lane] = epoch;
    c3[lane] = purpose;
  }
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    philox_round_of_lanes(c0, c1, c2, c3, key0, key1);
    next_philox_keys(&key0, &key1);
  }
  for (int lane = 0; lane < kBatch; ++lane) {
    words[4 * lane] = c0[lane];
    words[4 * lane + 1] = c1[lane];
    words[4 * lane + 2] = c2[lane];
    words[4 * lane + 3] = c3[lane];
  }
}

template <typename Clean>
void start_range(float* __restrict__ out, const Clean* __restrict__ clean, const uint32_t* __restrict__ words, Ball ball,
                 int64_t length) {
  for (int64_t k = 0; k < length; ++k) out[k] = start_element(to_pixel(clean[k]), words[k], ball);
}

template <typename Clean>
void random_start(float* out, const Clean* clean, const int64_t* ids, const int64_t* coin_ids, StartDraw draw, Ball ball,
                  int64_t samples, int64_t channels, int64_t pixels, int channels_last) {
  const int64_t count = channels * pixels;
  const int64_t blocks = (count + 3) / 4;
  parallel_range(0, samples * blocks, kGrain / 8, [&](int64_t first, int64_t last) {
    uint32_t words[4 * kBatch];
    for (int64_t begin = first; begin < last;) {
      const int64_t sample = begin / blocks;
      const int64_t block = begin % blocks;
      int64_t batch = blocks - block < last - begin ? blocks - block : last - begin;
      batch = batch < kBatch ? batch : kBatch;
      const bool stay = draw.clean_probability > 0.0f && starts_clean(static_cast<uint32_t>(coin_ids[sample]), draw);
      draw_words(words, static_cast<uint32_t>(block), static_cast<uint32_t>(ids[sample]), draw.epoch,
                 draw.noise_purpose, draw.seed);
      const int64_t from = block * 4;
      const int64_t length = (count - from < batch * 4 ? count - from : batch * 4);
      float* __restrict__ sample_out = out + sample * count;
      const Clean* __restrict__ sample_clean = clean + sample * count;
      if (stay) {
        for (int64_t k = 0; k < length; ++k) {
          const int64_t at = offset_in_sample(from + k, channels, pixels, channels_last);
          sample_out[at] = to_pixel(sample_clean[at]) + 0.0f;
        }
      } else if (channels_last) {
        int64_t channel = from / pixels, pixel = from % pixels;
        for (int64_t k = 0; k < length; ++k) {
          const int64_t at = pixel * channels + channel;
          sample_out[at] = start_element(to_pixel(sample_clean[at]), words[k], ball);
          if (++pixel == pixels) {
            pixel = 0;
            ++channel;
          }
        }
      } else {
        start_range(sample_out + from, sample_clean + from, words, ball, length);
      }
      begin += batch;
    }
  });
}

}  // namespace
}  // namespace distributed_at

using namespace distributed_at;

extern "C" {

void dat_cpu_use_threads_of_torch(void* parallel_for) {
  parallel_for_of_torch = reinterpret_cast<ParallelFor>(parallel_for);
}

// Elements [begin, end) of the flat step; 0 on success, 1 for a type number that this kernel does not take.
int dat_cpu_linf_step(float* out, const float* x, const void* clean, int clean_type, const void* gradient,
                      int gradient_type, const float* eps, const float* step, float direction, float low, float high,
                      int64_t begin, int64_t end) {
  const Ball ball{*eps, low, high};
  const float signed_step = direction * *step;
  bool known = false;
  with_clean_type(clean_type, clean, [&](const auto* clean_typed) {
    known = with_gradient_type(gradient_type, gradient, [&](const auto* gradient_typed) {
      parallel_range(begin, end, kGrain, [&](int64_t first, int64_t last) {
        linf_range(out, x, clean_typed, gradient_typed, signed_step, ball, first, last);
      });
    });
  });
  return known ? 0 : 1;
}

int dat_cpu_l2_step(float* out, const float* x, const void* clean, int clean_type, const void* gradient,
                    int gradient_type, const float* eps, const float* step, float direction, float low, float high,
                    int64_t samples, int64_t count) {
  const Ball ball{*eps, low, high};
  bool known = false;
  with_clean_type(clean_type, clean, [&](const auto* clean_typed) {
    known = with_gradient_type(gradient_type, gradient, [&](const auto* gradient_typed) {
      l2_step(out, x, clean_typed, gradient_typed, double(direction) * double(*step), ball, samples, count);
    });
  });
  return known ? 0 : 1;
}

int dat_cpu_random_start(float* out, const void* clean, int clean_type, const int64_t* ids, const int64_t* coin_ids,
                         uint64_t seed, uint32_t epoch, uint32_t noise_purpose, uint32_t coin_purpose,
                         float clean_probability, const float* eps, float low, float high, int64_t samples,
                         int64_t channels, int64_t pixels, int channels_last) {
  const StartDraw draw{seed, epoch, noise_purpose, coin_purpose, clean_probability};
  return with_clean_type(clean_type, clean, [&](const auto* typed) {
    random_start(out, typed, ids, coin_ids, draw, Ball{*eps, low, high}, samples, channels, pixels, channels_last);
  }) ? 0 : 1;
}

}  // extern "C"
