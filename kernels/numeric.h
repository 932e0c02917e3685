// The arithmetic of the kernels, written once for the CPU and the GPU: conversions, the sign, the box and Philox.
// Not for memory layout or threads. Every function must give the same bits on both: compile with -ffp-contract=off
// (g++) and --fmad=false (nvcc), never with fast math.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define DAT_INLINE __host__ __device__ __forceinline__
#else
#define DAT_INLINE inline __attribute__((always_inline))
#endif

namespace distributed_at {

// Element types as the Python side numbers them.
enum ElementType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kUInt8 = 3 };

// Distinct scalar types, not structs: g++ vectorises loops over the former only.
enum class BFloat16 : uint16_t {};
enum class Float16 : uint16_t {};

DAT_INLINE float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

DAT_INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

DAT_INLINE float to_float(float value) { return value; }
DAT_INLINE float to_float(BFloat16 value) { return as_float(static_cast<uint32_t>(value) << 16); }
DAT_INLINE float to_float(Float16 value) {
  // Shifted into place, an fp16 number is a float32 whose exponent is 112 too small; the product is exact and also
  // normalises fp16 subnormals. The top exponent means infinity or NaN and is kept.
  const uint32_t bits = static_cast<uint32_t>(value);
  const uint32_t sign = (bits & 0x8000u) << 16;
  const uint32_t magnitude = (bits & 0x7fffu) << 13;
  const bool special = (bits & 0x7c00u) == 0x7c00u;
  const float scaled = as_float(magnitude) * as_float(0x77800000u);  // 2^112
  return as_float(sign | (special ? (magnitude | 0x7f800000u) : as_bits(scaled)));
}

// A clean image in [0, 1]: bytes are divided by 255, correctly rounded (not multiplied by a rounded 1/255).
DAT_INLINE float to_pixel(float value) { return value; }
DAT_INLINE float to_pixel(uint8_t value) { return static_cast<float>(value) / 255.0f; }

// +1, -1, or 0 for zero and NaN; +-infinity counts as +-1.
DAT_INLINE float sign_of(float value) {
  return (value > 0.0f ? 1.0f : 0.0f) - (value < 0.0f ? 1.0f : 0.0f);
}

// Maximum and minimum with a bound, which must be a number; a NaN value stays. Written as the comparison that is one
// instruction on most processors.
DAT_INLINE float at_least(float value, float bound) { return bound > value ? bound : value; }
DAT_INLINE float at_most(float value, float bound) { return bound < value ? bound : value; }

struct Ball {
  float eps;
  float low;
  float high;
};

// The next float above and below a number other than zero.
DAT_INLINE float above_nonzero(float value) {
  const uint32_t bits = as_bits(value);
  return as_float(bits + 1u - 2u * (bits >> 31));  // away from zero above it, towards zero below
}
DAT_INLINE float below_nonzero(float value) { return -above_nonzero(-value); }
DAT_INLINE float next_above(float value) { return value == 0.0f ? as_float(1u) : above_nonzero(value); }
DAT_INLINE float next_below(float value) { return -next_above(-value); }

// (a + b) - sum exactly, sum being the rounded a + b (Knuth's two-sum).
DAT_INLINE float rounding_error(float a, float b, float sum) {
  const float b_part = sum - a;
  return (a - (sum - b_part)) + (b - b_part);
}

// x clipped to the tightest interval of floats inside both [clean - eps, clean + eps] and the box, which wins where the
// clean image lies outside it. A bound that rounded out of the ball moves one float inwards, so the ball holds exactly;
// a bound of zero is never rounded. The difference added last turns -0 into +0 and makes NaN of a clean pixel that is
// not finite.
DAT_INLINE float clip_to_ball(float x, float clean, Ball ball) {
  float lower = clean - ball.eps;
  lower = rounding_error(clean, -ball.eps, lower) > 0.0f ? above_nonzero(lower) : lower;
  float upper = clean + ball.eps;
  upper = rounding_error(clean, ball.eps, upper) < 0.0f ? below_nonzero(upper) : upper;
  lower = at_most(at_least(lower, ball.low), ball.high);
  upper = at_most(at_least(upper, ball.low), ball.high);
  return at_most(at_least(x, lower), upper) + (clean - clean);
}

DAT_INLINE float linf_element(float x, float clean, float gradient, float signed_step, Ball ball) {
  return clip_to_ball(x - signed_step * sign_of(gradient), clean, ball);
}

// A gradient that can be squared and summed in double: NaN counts as 0, +-infinity as the largest float.
DAT_INLINE float finite_gradient(float value) {
  const float largest = 3.402823466e+38f;
  const float bounded = at_most(at_least(value, -largest), largest);
  return value != value ? 0.0f : bounded;
}

// What a perturbation of this norm is multiplied with to lie in the ball: 1 inside, and outside a little less than
// eps / norm, a margin for the rounding of the norm itself.
DAT_INLINE double l2_ratio(double norm, float eps) {
  return norm > eps ? eps * (1.0 - 4.0 * 1.1920928955078125e-07) / norm : 1.0;
}

// clean + ratio * (x - clean), rounded towards the clean image, then the box. A ratio of 1 leaves x as it is.
DAT_INLINE float l2_project(float x, float clean, double ratio, Ball ball) {
  const double delta = ratio * (static_cast<double>(x) - static_cast<double>(clean));
  const float near = static_cast<float>(static_cast<double>(clean) + delta);
  const double moved = static_cast<double>(near) - static_cast<double>(clean);
  const bool too_far = (moved < 0.0 ? -moved : moved) > (delta < 0.0 ? -delta : delta);
  const float rounded = too_far ? (moved < 0.0 ? next_above(near) : next_below(near)) : near;
  const float inside = ratio < 1.0 ? rounded : x;
  return at_most(at_least(inside, ball.low), ball.high) + 0.0f;
}

// What a gradient of this norm is multiplied with to make the step; a zero gradient stays zero.
DAT_INLINE double l2_scale(double signed_step, double norm) { return norm > 0.0 ? signed_step / norm : 0.0; }

struct Words {
  uint32_t word[4];
};

DAT_INLINE void philox_round(uint32_t* c0, uint32_t* c1, uint32_t* c2, uint32_t* c3, uint32_t key0, uint32_t key1) {
  const uint64_t product0 = static_cast<uint64_t>(0xD2511F53u) * *c0;
  const uint64_t product1 = static_cast<uint64_t>(0xCD9E8D57u) * *c2;
  const uint32_t mixed0 = static_cast<uint32_t>(product1 >> 32) ^ *c1 ^ key0;
  const uint32_t mixed2 = static_cast<uint32_t>(product0 >> 32) ^ *c3 ^ key1;
  *c0 = mixed0;
  *c1 = static_cast<uint32_t>(product1);
  *c2 = mixed2;
  *c3 = static_cast<uint32_t>(product0);
}

DAT_INLINE void next_philox_keys(uint32_t* key0, uint32_t* key1) {
  *key0 += 0x9E3779B9u;
  *key1 += 0xBB67AE85u;
}

// Philox4x32-10 with counter (block, sample, epoch, purpose + 256 * draw): Salmon et al., SC 2011.
DAT_INLINE Words philox(uint32_t block, uint32_t sample, uint32_t epoch, uint32_t purpose, uint64_t seed) {
  Words words{{block, sample, epoch, purpose}};
  uint32_t* c = words.word;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    philox_round(c, c + 1, c + 2, c + 3, key0, key1);
    next_philox_keys(&key0, &key1);
  }
  return words;
}

// The top 24 bits as a float32 in [0, 1), exact.
DAT_INLINE float to_uniform(uint32_t word) { return static_cast<float>(static_cast<int32_t>(word >> 8)) * 5.9604644775390625e-08f; }

struct StartDraw {
  uint64_t seed;
  uint32_t epoch;
  uint32_t noise_purpose;
  uint32_t coin_purpose;
  float clean_probability;
};

DAT_INLINE bool starts_clean(uint32_t coin_id, StartDraw draw) {
  return to_uniform(philox(0, coin_id, draw.epoch, draw.coin_purpose, draw.seed).word[0]) < draw.clean_probability;
}

DAT_INLINE float start_element(float clean, uint32_t word, Ball ball) {
  return clip_to_ball(clean + ball.eps * (2.0f * to_uniform(word) - 1.0f), clean, ball);
}

// Where element i of a sample in (C, H, W) order lies in memory.
DAT_INLINE int64_t offset_in_sample(int64_t i, int64_t channels, int64_t pixels, int channels_last) {
  return channels_last ? (i % pixels) * channels + i / pixels : i;
}

}  // namespace distributed_at
