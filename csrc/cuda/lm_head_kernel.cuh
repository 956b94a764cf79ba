// Statistics and gradient of one chunk of logits, see ../lm_head.h: one block per row, each logit read once, 16 bytes
// per load. Sums are online: they are rescaled whenever a larger logit occurs.
#pragma once

#include <float.h>

#include "../lm_head.h"
#include "launch.cuh"
#include "tile.cuh"

namespace fipo {
namespace cuda {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLeastLogProb = -1e4f;  // nats; exp of less is 0, and 0 times this is 0, while 0 times -inf is NaN

// Partition of a row's columns: `unroll` packs of 16 bytes are in flight per thread.
template <int threads, int unroll>
struct RowShape {
  static constexpr int kThreads = threads, kUnroll = unroll;
  static constexpr int kWarps = threads / kLanes;
  static constexpr int kBlocks = 1;  // blocks per cluster, for `launch`
};

using StatisticsShape = RowShape<512, 4>;
using GradientShape = RowShape<256, 2>;

// 2^x with relative error 2^-22; 0 if not a normal number. NaN for NaN.
__device__ inline float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return exp2f(x);
#endif
}

template <class T, int size>
struct alignas(size * sizeof(T)) Pack {
  T at[size];
};

template <class T>
constexpr int kPackSize = kLogitAlignment / sizeof(T);

template <class T>
__device__ inline T minus_infinity();
template <>
__device__ inline float minus_infinity<float>() {
  return -INFINITY;
}
template <>
__device__ inline uint16_t minus_infinity<uint16_t>() {
  return 0xff80;
}

template <class T>
struct LogitRow {
  static constexpr int kPack = kPackSize<T>;

  const T* values;
  int columns;

  __device__ LogitRow(const Logits& logits)
      : values(static_cast<const T*>(logits.values) + blockIdx.x * logits.stride),
        columns(static_cast<int>(logits.columns)) {}

  __device__ int num_packs() const { return (columns + kPack - 1) / kPack; }

  // Columns after the last one have no probability.
  __device__ Pack<T, kPack> load(int pack) const {
    if (pack < columns / kPack) return reinterpret_cast<const Pack<T, kPack>*>(values)[pack];
    Pack<T, kPack> result;
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const int column = pack * kPack + i;
      result.at[i] = column < columns ? values[column] : minus_infinity<T>();
    }
    return result;
  }
};

// ---- statistics ----

struct StatisticsWork {
  Logits logits;
  LogitStatistics out;
};

// Of raw logits x, not yet divided by the temperature: max x, sum exp(z - max z), sum exp(z - max z) (x - max x).
struct OnlineSums {
  float maximum, sum, shifted_sum;
};

// The same sums, relative to a maximum that is not smaller; `scale` converts differences of logits to powers of two.
__device__ inline OnlineSums moved_to(const OnlineSums& sums, float maximum, float scale) {
  if (sums.sum == 0.0f) return {maximum, 0.0f, 0.0f};
  const float shift = sums.maximum - maximum, factor = exp2_fast(shift * scale);
  const float sum = sums.sum * factor;  // 0 or NaN if the factor is 0: then so is the other
  return {maximum, sum, factor == 0.0f ? sum : factor * fmaf(shift, sums.sum, sums.shifted_sum)};
}

__device__ inline OnlineSums joined(const OnlineSums& a, const OnlineSums& b, float scale) {
  const float maximum = fmaxf(a.maximum, b.maximum);
  const OnlineSums x = moved_to(a, maximum, scale), y = moved_to(b, maximum, scale);
  return {maximum, x.sum + y.sum, x.shifted_sum + y.shifted_sum};
}

// Called by a whole warp; all its lanes get the result.
__device__ inline OnlineSums joined_over_warp(OnlineSums sums, float scale) {
#pragma unroll
  for (int by = kLanes / 2; by > 0; by /= 2) {
    const OnlineSums other = {__shfl_xor_sync(kAllLanes, sums.maximum, by), __shfl_xor_sync(kAllLanes, sums.sum, by),
                              __shfl_xor_sync(kAllLanes, sums.shifted_sum, by)};
    sums = joined(sums, other, scale);
  }
  return sums;
}

template <int count>
__device__ inline void add_logits(const float (&x)[count], float scale, OnlineSums* sums) {
  float maximum = sums->maximum;
#pragma unroll
  for (int i = 0; i < count; ++i) maximum = fmaxf(maximum, x[i]);
  if (maximum > sums->maximum) *sums = moved_to(*sums, maximum, scale);
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const float difference = x[i] - maximum;  // a NaN is kept
    const float shift = difference < -FLT_MAX ? -FLT_MAX : difference;
    const float weight = exp2_fast(shift * scale);
    sums->sum += weight;
    sums->shifted_sum = fmaf(weight, shift, sums->shifted_sum);
  }
}

template <class Shape, class T>
__global__ void __launch_bounds__(Shape::kThreads, 2) statistics_kernel(const __grid_constant__ StatisticsWork work) {
  constexpr int kPack = kPackSize<T>;
  __shared__ OnlineSums of_warps[Shape::kWarps];
  const LogitRow<T> row(work.logits);
  const float scale = work.logits.inverse_temperature * kLog2E;
  OnlineSums sums = {-FLT_MAX, 0.0f, 0.0f};
  for (int first = threadIdx.x; first < row.num_packs(); first += Shape::kThreads * Shape::kUnroll) {
    Pack<T, kPack> packs[Shape::kUnroll];
#pragma unroll
    for (int u = 0; u < Shape::kUnroll; ++u) packs[u] = row.load(first + u * Shape::kThreads);
    float x[Shape::kUnroll * kPack];
#pragma unroll
    for (int u = 0; u < Shape::kUnroll; ++u)
#pragma unroll
      for (int i = 0; i < kPack; ++i) x[u * kPack + i] = as_float(packs[u].at[i]);
    add_logits(x, scale, &sums);
  }
  sums = joined_over_warp(sums, scale);
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  if (lane == 0) of_warps[warp] = sums;
  __syncthreads();
  if (warp != 0) return;
  const OnlineSums nothing = {-FLT_MAX, 0.0f, 0.0f};
  sums = joined_over_warp(lane < Shape::kWarps ? of_warps[lane] : nothing, scale);
  if (lane != 0) return;
  const int64_t target = work.logits.targets[blockIdx.x];
  const bool is_here = target >= 0 && target < work.logits.columns;
  const float inverse_temperature = work.logits.inverse_temperature;
  work.out.maximum[blockIdx.x] = sums.maximum * inverse_temperature;
  work.out.sum_exp[blockIdx.x] = sums.sum;
  work.out.sum_exp_shifted[blockIdx.x] = sums.shifted_sum * inverse_temperature;
  work.out.target[blockIdx.x] = is_here ? as_float(row.values[target]) * inverse_temperature : 0.0f;
}

// ---- gradient ----

struct GradientWork {
  Logits logits;
  LogitGradient out;
};

__device__ inline void store_as(float* to, float value) { *to = value; }
// Rounds to the nearest even bfloat16; NaN is kept.
__device__ inline void store_as(uint16_t* to, float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  *to = static_cast<uint16_t>(value == value ? rounded : bits >> 16 | 0x40);
}

template <class Shape, class In, class Out>
__global__ void __launch_bounds__(Shape::kThreads, 4) gradient_kernel(const __grid_constant__ GradientWork work) {
  constexpr int kPack = kPackSize<In>;
  const LogitRow<In> row(work.logits);
  Out* const to = static_cast<Out*>(work.out.values) + blockIdx.x * work.out.stride;
  const float scale = work.logits.inverse_temperature, logsumexp = work.out.logsumexp[blockIdx.x];
  const float slope = work.out.slope ? work.out.slope[blockIdx.x] : 0.0f, offset = work.out.offset[blockIdx.x];
  const float log_prob = work.out.log_prob[blockIdx.x];
  const int64_t target = work.logits.targets[blockIdx.x];
  for (int first = threadIdx.x; first < row.num_packs(); first += Shape::kThreads * Shape::kUnroll) {
    Pack<In, kPack> packs[Shape::kUnroll];
#pragma unroll
    for (int u = 0; u < Shape::kUnroll; ++u) packs[u] = row.load(first + u * Shape::kThreads);
#pragma unroll
    for (int u = 0; u < Shape::kUnroll; ++u) {
      const int64_t column = static_cast<int64_t>(first + u * Shape::kThreads) * kPack;
      Pack<Out, kPack> gradient;
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const float unbounded = fmaf(as_float(packs[u].at[i]), scale, -logsumexp);
        const float log_p = unbounded < kLeastLogProb ? kLeastLogProb : unbounded;  // a NaN is kept
        float value = exp2_fast(log_p * kLog2E) * -fmaf(slope, log_p, offset);
        if (column + i == target) value += log_prob;
        store_as(&gradient.at[i], value);
      }
      if (column + kPack <= row.columns) {
        *reinterpret_cast<Pack<Out, kPack>*>(to + column) = gradient;
        continue;
      }
#pragma unroll
      for (int i = 0; i < kPack; ++i)
        if (column + i < row.columns) to[column + i] = gradient.at[i];
    }
  }
}

// ---- launches ----

template <class Shape, class T>
void statistics(const Logits& logits, const LogitStatistics& out, cudaStream_t stream) {
  launch<Shape>(Kernel<StatisticsWork>(statistics_kernel<Shape, T>), StatisticsWork{logits, out}, logits.rows, stream);
}

template <class Shape, class In, class Out>
void gradient(const Logits& logits, const LogitGradient& out, cudaStream_t stream) {
  launch<Shape>(Kernel<GradientWork>(gradient_kernel<Shape, In, Out>), GradientWork{logits, out}, logits.rows, stream);
}

template <class Shape>
void logit_statistics(const Logits& logits, const LogitStatistics& out, cudaStream_t stream) {
  const bool narrow = logits.dtype == Float::kBFloat16;
  (narrow ? statistics<Shape, uint16_t> : statistics<Shape, float>)(logits, out, stream);
}

template <class Shape>
void logit_gradient(const Logits& logits, const LogitGradient& out, cudaStream_t stream) {
  if (logits.dtype == Float::kBFloat16)
    gradient<Shape, uint16_t, uint16_t>(logits, out, stream);
  else if (out.dtype == Float::kBFloat16)
    gradient<Shape, float, uint16_t>(logits, out, stream);
  else
    gradient<Shape, float, float>(logits, out, stream);
}

}  // namespace cuda
}  // namespace fipo
