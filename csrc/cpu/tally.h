// Sums of a run of segments for the metrics.
#pragma once

#include "kernel_common.h"

namespace {

FIPO_INLINE void keep_least(F* least, F x) { *least = Lanes::at_most(*least, x); }
FIPO_INLINE void keep_largest(F* largest, F x) { *largest = Lanes::at_least(*largest, x); }

struct Tally {
  explicit Tally(Counts* histograms) : histograms(histograms) {
    const F most = Lanes::set(INFINITY), least = Lanes::set(-INFINITY);
    log_ratio_abs_max = negative_max = positive_max = future_kl_max = influence_max = least;
    positive_min = future_kl_min = influence_min = most;
  }

  FIPO_INLINE void add(Metric metric, int64_t count) { counts[metric] += count; }

  void finish(double* metrics) const {
    for (int i = 0; i < kFirstExtremum; ++i) metrics[i] = sums[i] + static_cast<double>(counts[i]);
    metrics[kLogRatioAbsMax] = Lanes::largest(log_ratio_abs_max);
    metrics[kNegativeRatioMax] = exp((double)Lanes::largest(negative_max));
    metrics[kPositiveRatioMin] = exp((double)Lanes::smallest(positive_min));
    metrics[kPositiveRatioMax] = exp((double)Lanes::largest(positive_max));
    metrics[kFutureKlMin] = Lanes::smallest(future_kl_min);
    metrics[kFutureKlMax] = Lanes::largest(future_kl_max);
    metrics[kInfluenceMin] = Lanes::smallest(influence_min);
    metrics[kInfluenceMax] = Lanes::largest(influence_max);
    // Until all runs are merged, these are extrema of S (exp is monotone); S = -inf differs from no data.
    metrics[kInfluenceRawMin] = metrics[kFutureKlMin];
    metrics[kInfluenceRawMax] = metrics[kFutureKlMax];
    // exp turned "no data" into 0 for a maximum.
    if (metrics[kNegativeRatioMax] == 0.0) metrics[kNegativeRatioMax] = -INFINITY;
    if (metrics[kPositiveRatioMax] == 0.0) metrics[kPositiveRatioMax] = -INFINITY;
  }

  double sums[kFirstExtremum] = {};
  int64_t counts[kFirstExtremum] = {};
  // One value per lane; ratios are stored as d.
  F log_ratio_abs_max, negative_max, positive_min, positive_max;
  F future_kl_min, future_kl_max, influence_min, influence_max;
  Counts* const histograms;
};

}  // namespace
