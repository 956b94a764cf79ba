// Metrics: each thread accumulates those of a tile in registers and its totals in shared memory; they are merged in
// one fixed order over lanes, warps and blocks.
#pragma once

#include "tile.cuh"

namespace fipo {
namespace cuda {

// Most log-ratios are close to 0; these bins are counted in the block's shared memory, [-kNearNats, kNearNats].
constexpr int kNearNats = 2;
constexpr int kNearBins = 2 * kNearNats * kHistogramBinsPerNat + 1;
constexpr int kFirstNearBin = (kHistogramRange - kNearNats) * kHistogramBinsPerNat;

constexpr float kExactExp = 80.0f;  // nats; above, exp(S) is summed in float64, since float32 could overflow

struct Counts {
  uint32_t ppo_clipped, clipped_upper, clipped_lower;
};

// The same for the few tokens of a thread in one tile: 10 bits each.
struct TileCounts {
  static constexpr uint32_t kPpoClipped = 1, kInfluenceClippedUpper = 1 << 10, kInfluenceClippedLower = 1 << 20;
  uint32_t packed = 0;

  __device__ void add(uint32_t one, bool condition) {
    if (condition) packed += one;
  }
  __device__ void move_to(Counts* counts) {
    counts->ppo_clipped += packed & 1023;
    counts->clipped_upper += packed >> 10 & 1023;
    counts->clipped_lower += packed >> 20;
    packed = 0;
  }
};

template <class T>
struct Sums {
  T log_ratio, future_kl, influence, influence_raw, loss;
};

struct Extrema {
  float log_ratio_abs_max, negative_ratio_max, positive_ratio_min, positive_ratio_max;
  float future_kl_min, future_kl_max, influence_min, influence_max;

  __device__ static Extrema none() {
    return {-INFINITY, -INFINITY, INFINITY, -INFINITY, INFINITY, -INFINITY, INFINITY, -INFINITY};
  }
  __device__ void merge(const Extrema& other) {
    log_ratio_abs_max = fmaxf(log_ratio_abs_max, other.log_ratio_abs_max);
    negative_ratio_max = fmaxf(negative_ratio_max, other.negative_ratio_max);
    positive_ratio_min = fminf(positive_ratio_min, other.positive_ratio_min);
    positive_ratio_max = fmaxf(positive_ratio_max, other.positive_ratio_max);
    future_kl_min = fminf(future_kl_min, other.future_kl_min);
    future_kl_max = fmaxf(future_kl_max, other.future_kl_max);
    influence_min = fminf(influence_min, other.influence_min);
    influence_max = fmaxf(influence_max, other.influence_max);
  }
};

template <class Shape>
struct MetricsMemory {
  uint32_t near_bins[2][kNearBins];
  uint32_t counts[kFirstExtremum];  // tokens and sequences of whole segments, and rare events
  Sums<double> sums[Shape::kThreads];
  Counts tokens[Shape::kThreads];
  Extrema extrema[Shape::kThreads];
  double of_warps[Shape::kWarps][kNumMetrics];
  bool is_last_block;
};

__host__ __device__ inline bool is_minimum(int metric) {
  return metric == kPositiveRatioMin || metric == kFutureKlMin || metric == kInfluenceMin || metric == kInfluenceRawMin;
}

__device__ inline double no_data(int metric) {
  return metric < kFirstExtremum ? 0.0 : is_minimum(metric) ? INFINITY : -INFINITY;
}

__device__ inline double combine(int metric, double a, double b) {
  return metric < kFirstExtremum ? a + b : is_minimum(metric) ? fmin(a, b) : fmax(a, b);
}

template <class Shape>
class Metrics {
 public:
  __device__ Metrics(MetricsMemory<Shape>* memory, int64_t* histograms) : memory_(*memory), histograms_(histograms) {}

  // Called by all threads of the block before counting; a barrier must follow.
  __device__ void clear_shared() {
    for (int i = threadIdx.x; i < 2 * kNearBins; i += Shape::kThreads)
      memory_.near_bins[i / kNearBins][i % kNearBins] = 0;
    for (int i = threadIdx.x; i < kFirstExtremum; i += Shape::kThreads) memory_.counts[i] = 0;
    sums() = {};
    memory_.tokens[threadIdx.x] = {};
    extrema() = Extrema::none();
  }

  __device__ void count(Metric metric, int64_t by) {
    if (by != 0) atomicAdd(&memory_.counts[metric], static_cast<uint32_t>(by));
  }

  // A loss token's log-ratio.
  __device__ void add_ratio(float log_ratio, float ratio, float advantage, bool is_clipped, float dual_clip) {
    tile_.log_ratio += log_ratio;
    tile_extrema_.log_ratio_abs_max = fmaxf(tile_extrema_.log_ratio_abs_max, fabsf(log_ratio));
    tile_counts_.add(TileCounts::kPpoClipped, is_clipped);
    if (advantage < 0.0f) {
      tile_extrema_.negative_ratio_max = fmaxf(tile_extrema_.negative_ratio_max, ratio);
      if (ratio >= 2.0f) count_high(ratio, dual_clip);
      add_to_histogram(0, log_ratio);
    } else if (advantage > 0.0f) {
      tile_extrema_.positive_ratio_min = fminf(tile_extrema_.positive_ratio_min, ratio);
      tile_extrema_.positive_ratio_max = fmaxf(tile_extrema_.positive_ratio_max, ratio);
      if (ratio < 1e-3f) count(kPositiveBelow1e3, 1);
      add_to_histogram(1, log_ratio);
    }
  }

  // A loss token's S, exp(S) and influence weight.
  __device__ void add_influence(float future_kl, float raw, float weight, const Constants& constants) {
    tile_.future_kl += future_kl;
    tile_.influence += weight;
    if (future_kl > kExactExp)
      sums().influence_raw += exp_in_double(future_kl);
    else
      tile_.influence_raw += raw;
    tile_counts_.add(TileCounts::kInfluenceClippedUpper, weight >= constants.clipped_above);
    tile_counts_.add(TileCounts::kInfluenceClippedLower, weight <= constants.clipped_below);
    tile_extrema_.future_kl_min = fminf(tile_extrema_.future_kl_min, future_kl);
    tile_extrema_.future_kl_max = fmaxf(tile_extrema_.future_kl_max, future_kl);
    tile_extrema_.influence_min = fminf(tile_extrema_.influence_min, weight);
    tile_extrema_.influence_max = fmaxf(tile_extrema_.influence_max, weight);
  }

  __device__ void add_loss(float loss) { tile_.loss += loss; }

  // A thread sums its few tokens of a tile in float32, everything beyond in float64.
  __device__ void end_tile() {
    sums().log_ratio += tile_.log_ratio;
    sums().future_kl += tile_.future_kl;
    sums().influence += tile_.influence;
    sums().influence_raw += tile_.influence_raw;
    sums().loss += tile_.loss;
    tile_ = {};
    tile_counts_.move_to(&memory_.tokens[threadIdx.x]);
    extrema().merge(tile_extrema_);
    tile_extrema_ = Extrema::none();
  }

  // Writes the block's metrics to `to` [kNumMetrics], and adds its histograms to the totals.
  __device__ void write_block(double* to, int lane, int warp) {
    double* const local = memory_.of_warps[warp];
    gather_sums(local, lane);
    gather_extrema(local, lane);
    __syncthreads();
    for (int metric = threadIdx.x; metric < kNumMetrics; metric += Shape::kThreads) {
      double value = metric < kFirstExtremum ? memory_.counts[metric] : no_data(metric);
      for (int i = 0; i < Shape::kWarps; ++i) value = combine(metric, value, memory_.of_warps[i][metric]);
      to[metric] = value;
    }
    for (int i = threadIdx.x; i < 2 * kNearBins; i += Shape::kThreads) {
      const uint32_t tokens = memory_.near_bins[i / kNearBins][i % kNearBins];
      if (tokens) add_to_global(i / kNearBins, kFirstNearBin + i % kNearBins, tokens);
    }
  }

 private:
  __device__ Extrema& extrema() { return memory_.extrema[threadIdx.x]; }
  __device__ Sums<double>& sums() { return memory_.sums[threadIdx.x]; }

  __device__ void count_high(float ratio, float dual_clip) {
    if (ratio < 3.0f)
      count(kNegative2To3, 1);
    else if (ratio < 4.0f)
      count(kNegative3To4, 1);
    else if (ratio < dual_clip)
      count(kNegative4ToDual, 1);
  }

  __device__ void add_to_histogram(int sign, float log_ratio) {
    if (fabsf(log_ratio) <= kNearNats)
      atomicAdd(&memory_.near_bins[sign][bin_of(log_ratio) - kFirstNearBin], 1u);
    else if (log_ratio == log_ratio)
      add_to_global(sign, bin_of(clip(log_ratio, -kHistogramRange, kHistogramRange)), 1);
  }
  __device__ static int bin_of(float log_ratio) {
    return static_cast<int>(rintf((log_ratio + kHistogramRange) * kHistogramBinsPerNat));
  }

  // Integers: their sum does not depend on the order.
  __device__ void add_to_global(int sign, int bin, uint32_t tokens) {
    auto* const at = reinterpret_cast<unsigned long long*>(histograms_ + sign * kHistogramBins + bin);
    atomicAdd(at, static_cast<unsigned long long>(tokens));
  }

  // exp is exact for powers of two: exp(S) = exp(S / 8)^8, and S / 8 is at most 75.
  __device__ static double exp_in_double(float future_kl) {
    const float bounded = future_kl > static_cast<float>(kMaxLogWeight) ? static_cast<float>(kMaxLogWeight) : future_kl;
    double power = expf(bounded / 8.0f);
    for (int i = 0; i < 3; ++i) power *= power;
    return power;
  }

  __device__ __noinline__ static void put(double* to, int lane, int metric, double value) {
    value = warp_reduce(value, [metric](double a, double b) { return combine(metric, a, b); });
    if (lane == 0) to[metric] = value;
  }

  __device__ void gather_sums(double* to, int lane) {
    for (int metric = lane; metric < kFirstExtremum; metric += kLanes) to[metric] = 0.0;
    __syncwarp();
    put(to, lane, kLossSum, sums().loss);
    put(to, lane, kApproxKl, -sums().log_ratio);
    put(to, lane, kPpoClipped, memory_.tokens[threadIdx.x].ppo_clipped);
    put(to, lane, kFutureKl, sums().future_kl);
    put(to, lane, kInfluence, sums().influence);
    put(to, lane, kInfluenceRaw, sums().influence_raw);
    put(to, lane, kInfluenceClippedUpper, memory_.tokens[threadIdx.x].clipped_upper);
    put(to, lane, kInfluenceClippedLower, memory_.tokens[threadIdx.x].clipped_lower);
  }

  __device__ void gather_extrema(double* to, int lane) {
    put(to, lane, kLogRatioAbsMax, extrema().log_ratio_abs_max);
    put(to, lane, kNegativeRatioMax, extrema().negative_ratio_max);
    put(to, lane, kPositiveRatioMin, extrema().positive_ratio_min);
    put(to, lane, kPositiveRatioMax, extrema().positive_ratio_max);
    put(to, lane, kFutureKlMin, extrema().future_kl_min);
    put(to, lane, kFutureKlMax, extrema().future_kl_max);
    put(to, lane, kInfluenceMin, extrema().influence_min);
    put(to, lane, kInfluenceMax, extrema().influence_max);
    // exp is monotone: these are extrema of S, converted to exp(S) when all blocks are merged.
    put(to, lane, kInfluenceRawMin, extrema().future_kl_min);
    put(to, lane, kInfluenceRawMax, extrema().future_kl_max);
  }

  MetricsMemory<Shape>& memory_;
  int64_t* const histograms_;
  Sums<float> tile_ = {};
  TileCounts tile_counts_;
  Extrema tile_extrema_ = Extrema::none();
};

// Merges all blocks' metrics [blocks][kNumMetrics] in the order of the blocks; called by the last block.
template <class Shape>
__device__ void finish_metrics(const double* of_blocks, const LossOutput& out, int lane, int warp) {
  const int num_blocks = gridDim.x;
  for (int metric = warp; metric < kNumMetrics; metric += Shape::kWarps) {
    double value = no_data(metric);
    for (int block = lane; block < num_blocks; block += kLanes)
      value = combine(metric, value, __ldcg(of_blocks + block * kNumMetrics + metric));
    value = warp_reduce(value, [metric](double a, double b) { return combine(metric, a, b); });
    const bool is_raw = metric == kInfluenceRawMin || metric == kInfluenceRawMax;
    if (is_raw && value != no_data(metric)) value = exp(fmin(value, kMaxLogWeight));
    if (lane == 0) out.metrics[metric] = value;
    if (lane == 0 && metric == kLossSum) *out.loss_sum = static_cast<float>(value);
  }
}

}  // namespace cuda
}  // namespace fipo
