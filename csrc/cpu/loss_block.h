// Fused loss of a block of tokens. A first loop computes d_t and S_t and their bounds, a second one everything
// else. If the bounds are ordinary, as almost always in training, the second loop skips operations
// without effect; the result has the same bits either way.
#pragma once

#include "tally.h"

namespace {

constexpr int kBlockWindows = 64;  // float32 partial sums are over one block
constexpr int kBlockTokens = kBlockWindows * kWidth;
// Bounds on |d| in a fast-path block: this one keeps ratios below 2 and in the near bins. The recipe's bounds are
// lowered by a margin, so that they also hold for rounded ratios.
constexpr float kFastPathLogRatio = 0.69f, kFastPathMargin = 1e-3f;

// Results of a piece that depend on the veto.
struct PieceLoss {
  double loss;
  int64_t dual_clipped, loss_tokens;
};

// Statistics of a block's loss tokens from the first loop. `fast_path`: advantages have one sign or are all 0, no d is
// NaN or beyond the bounds above, and exp(S) is ordinary.
struct BlockStats {
  bool fast_path;
  bool negative, positive;  // in the fast path: the sign
  int64_t loss_tokens;
  F log_ratio_min, log_ratio_max;  // one value per lane
};

// Forms of the second loop.
enum class Form {
  kMinimal,  // fast path, and no optional inputs and outputs
  kFastPath,
  kAny
};

template <bool kIsFipo>
class LossBlock {
 public:
  LossBlock(const Constants& constants, const Decay& decay, Tally* tally)
      : constants_(constants), decay_(decay), tally_(*tally), fast_path_bound_(kFastPathLogRatio) {
    const float bounds[] = {constants.log_ratio_clamp, constants.log_dual_clip, logf(constants.safety_threshold)};
    for (const float bound : bounds)
      if (!(bound - kFastPathMargin > fast_path_bound_)) fast_path_bound_ = bound - kFastPathMargin;
    if (!(constants.ratio_low <= constants.dual_clip && constants.ratio_high <= constants.dual_clip))
      fast_path_bound_ = -1.0f;
  }

  // Of the piece whose blocks follow, from the last to the first. `advantage` is unused with per-token advantages.
  void start(double carry, float advantage, float coefficient) {
    carry_ = carry;
    advantage_ = advantage;
    coefficient_ = coefficient;
  }

  void run(const Window& window, int count, PieceLoss* seen) {
    const BlockStats stats = this->block_stats(window, count);
    seen->loss_tokens += stats.loss_tokens;
    if (!kIsFipo) store_no_influence(window, count);
    if (!stats.fast_path)
      finish<Form::kAny>(window, count, stats, seen);
    else if (window.advantages || window.token_weights || window.future_kl || window.influence_weights)
      finish<Form::kFastPath>(window, count, stats, seen);
    else
      finish<Form::kMinimal>(window, count, stats, seen);
  }

 private:
  // ---- the first loop ----

  // Sums and bounds, one value per lane; local variables, so that they stay in registers.
  struct Bounds {
    F sum, least, largest;
    FIPO_INLINE void add(M mask, F x) {
      sum = Lanes::add_where(sum, mask, x);
      least = Lanes::least_where(least, mask, x);
      largest = Lanes::largest_where(largest, mask, x);
    }
    // Extrema ignore NaN, the sum does not.
    FIPO_INLINE bool within(float bound) const {
      const M below = Lanes::less(least, Lanes::set(-bound)), above = Lanes::greater(largest, Lanes::set(bound));
      return !Lanes::any(Lanes::bit_or(below, above)) && !isnan(Lanes::sum(sum));
    }
  };

  BlockStats block_stats(const Window& window, int count) {
    const F clamp = Lanes::set(constants_.log_ratio_clamp), log_dual_clip = Lanes::set(constants_.log_dual_clip);
    const F to_end = load_to_end(decay_), zero = Lanes::set(0.0f), one = Lanes::set(1.0f);
    const Decay decay = decay_;
    Bounds log_ratios = {zero, Lanes::set(INFINITY), Lanes::set(-INFINITY)}, future_kls = log_ratios;
    F loss_tokens = zero;
    M not_negative = Lanes::less(zero, zero), not_positive = not_negative;
    const double carry_in = carry_;
    double carry = carry_in;
    for (int t = (count - 1) * kWidth; t >= 0; t -= kWidth) {
      const Shift shift = load_shift(window.at(t), clamp, log_dual_clip);
      Lanes::store(log_ratio_ + t, shift.log_ratio);
      log_ratios.add(shift.mask, shift.log_ratio);
      loss_tokens = Lanes::add_where(loss_tokens, shift.mask, one);
      if (window.advantages) {
        const F advantage = Lanes::load(window.advantages + t);
        not_negative = Lanes::bit_or(not_negative, Lanes::and_not(shift.mask, Lanes::less(advantage, zero)));
        not_positive = Lanes::bit_or(not_positive, Lanes::and_not(shift.mask, Lanes::greater(advantage, zero)));
      }
      if (kIsFipo) {
        const F future_kl = scan_window(shift, decay, to_end, &carry);
        Lanes::store(future_kl_ + t, future_kl);
        future_kls.add(shift.mask, future_kl);
      }
    }
    carry_ = carry;
    const bool negative = window.advantages ? !Lanes::any(not_negative) : advantage_ < 0;
    const bool positive = !negative && (window.advantages ? !Lanes::any(not_positive) : advantage_ > 0);
    const bool one_sign = !window.advantages || negative || positive;
    // Where masked, which the bounds exclude, S is the decayed S of what follows.
    const bool fast_path = one_sign && fast_path_bound_ >= 0.0f && log_ratios.within(fast_path_bound_) &&
                           future_kls.within(kOrdinaryExp) && fabs(carry_in) <= kOrdinaryExp;
    keep(log_ratios, future_kls);
    return {fast_path, negative, positive, total(loss_tokens), log_ratios.least, log_ratios.largest};
  }

  FIPO_INLINE void keep(const Bounds& log_ratios, const Bounds& future_kls) {
    tally_.sums[kApproxKl] -= Lanes::sum(log_ratios.sum);
    tally_.sums[kFutureKl] += Lanes::sum(future_kls.sum);
    keep_largest(&tally_.log_ratio_abs_max, log_ratios.largest);
    keep_largest(&tally_.log_ratio_abs_max, Lanes::negate(log_ratios.least));
    keep_least(&tally_.future_kl_min, future_kls.least);
    keep_largest(&tally_.future_kl_max, future_kls.largest);
  }

  void store_no_influence(const Window& window, int count) {
    for (int t = 0; t < count * kWidth; t += kWidth) {
      if (window.future_kl) Lanes::store(window.future_kl + t, Lanes::set(0.0f));
      if (window.influence_weights) Lanes::store(window.influence_weights + t, Lanes::set(1.0f));
    }
  }

  // ---- the second loop ----

  // Sums and constants, one value per lane; local variables, so that they stay in registers.
  struct Sums {
    F loss, weight, raw, influence_min, influence_max;
    F clipped_upper, clipped_lower, ppo_clipped, dual_clipped;  // counts
  };
  struct Levels {
    F influence_low, influence_high, clipped_below, clipped_above, ratio_low, ratio_high, zero, one;
  };

  FIPO_INLINE Levels levels() const {
    return {Lanes::set(constants_.influence_low), Lanes::set(constants_.influence_high),
            Lanes::set(constants_.clipped_below), Lanes::set(constants_.clipped_above),
            Lanes::set(constants_.ratio_low),     Lanes::set(constants_.ratio_high),
            Lanes::set(0.0f),                     Lanes::set(1.0f)};
  }

  template <Form kForm>
  void finish(const Window& window, int count, const BlockStats& stats, PieceLoss* seen) {
    constexpr bool kFastPath = kForm != Form::kAny;
    const Levels levels = this->levels();
    const F zero = levels.zero;
    Sums sums = {zero, zero, zero, tally_.influence_min, tally_.influence_max, zero, zero, zero, zero};
    const F same = Lanes::set(-advantage_ * coefficient_), minus_coefficient = Lanes::set(-coefficient_);
    NearCounts* const near = kFastPath ? near_counts(stats) : nullptr;
    for (int t = 0; t < count * kWidth; t += kWidth) {
      const M mask = Lanes::load_mask(window.mask + t);
      const F log_ratio = Lanes::load(log_ratio_ + t);
      const F ratio = exponential<kFastPath>(log_ratio);
      F weighted = same;
      if (kForm != Form::kMinimal && window.advantages)
        weighted = Lanes::mul(Lanes::load(window.advantages + t), minus_coefficient);
      if (kIsFipo) weighted = Lanes::mul(influence<kForm>(window, t, mask, ratio, levels, &sums), weighted);
      surrogate<kForm>(window, t, mask, ratio, weighted, levels, &sums);
      if (!kFastPath) uncommon_ratios(log_ratio, ratio, mask, advantage_at(window, t), &sums.dual_clipped);
      if (near) {
        store_bins(t, log_ratio, mask);
        if (t > 0) count_bins(near, t - kWidth);
      }
    }
    if (near) count_bins(near, (count - 1) * kWidth);
    seen->loss += Lanes::sum(sums.loss);
    seen->dual_clipped += total(sums.dual_clipped);
    keep(sums);
  }

  FIPO_INLINE void keep(const Sums& sums) {
    tally_.influence_min = sums.influence_min;
    tally_.influence_max = sums.influence_max;
    tally_.sums[kInfluence] += Lanes::sum(sums.weight);
    tally_.sums[kInfluenceRaw] += Lanes::sum(sums.raw);
    tally_.add(kInfluenceClippedUpper, total(sums.clipped_upper));
    tally_.add(kInfluenceClippedLower, total(sums.clipped_lower));
    tally_.add(kPpoClipped, total(sums.ppo_clipped));
  }

  // f_t and its metrics.
  template <Form kForm>
  FIPO_INLINE F influence(const Window& window, int t, M mask, F ratio, const Levels& levels, Sums* sums) {
    const F future_kl = Lanes::load(future_kl_ + t);
    const F raw = exponential<kForm != Form::kAny>(future_kl);
    F weight = clip(raw, levels.influence_low, levels.influence_high);
    M summed = mask;
    if (kForm == Form::kAny) {
      const M negative = Lanes::bit_and(mask, Lanes::less(advantage_at(window, t), levels.zero));
      const M unsafe = Lanes::bit_and(negative, Lanes::greater(ratio, Lanes::set(constants_.safety_threshold)));
      weight = Lanes::select(unsafe, clip(weight, Lanes::set(kSafeLow), Lanes::set(kSafeHigh)), weight);
      const M large = Lanes::bit_and(mask, Lanes::greater(future_kl, Lanes::set(kOrdinaryExp)));
      if (Lanes::any(large)) add_large_raw(Lanes::select(large, future_kl, levels.zero));
      summed = Lanes::and_not(mask, large);
    }
    if (kForm != Form::kMinimal && window.future_kl) Lanes::store(window.future_kl + t, future_kl);
    if (kForm != Form::kMinimal && window.influence_weights) Lanes::store(window.influence_weights + t, weight);
    sums->raw = Lanes::add_where(sums->raw, summed, raw);
    sums->weight = Lanes::add_where(sums->weight, mask, weight);
    sums->influence_min = Lanes::least_where(sums->influence_min, mask, weight);
    sums->influence_max = Lanes::largest_where(sums->influence_max, mask, weight);
    add_to(&sums->clipped_upper, Lanes::bit_and(mask, Lanes::not_less(weight, levels.clipped_above)), levels.one);
    add_to(&sums->clipped_lower, Lanes::bit_and(mask, Lanes::not_less(levels.clipped_below, weight)), levels.one);
    return weight;
  }

  // exp of S above kOrdinaryExp, in float64: the sum would overflow in float32.
  __attribute__((noinline)) void add_large_raw(F future_kl) {
    float lanes[kWidth];
    Lanes::store(lanes, future_kl);
    for (int i = 0; i < kWidth; ++i)
      if (lanes[i] > 0.0f) tally_.sums[kInfluenceRaw] += exp(fmin((double)lanes[i], kMaxLogWeight));
  }

  // l_t and its derivative; `weighted` is -f_t A_t times the coefficient of the piece.
  template <Form kForm>
  FIPO_INLINE void surrogate(const Window& window, int t, M mask, F ratio, F weighted, const Levels& levels,
                             Sums* sums) {
    const F plain = Lanes::mul(weighted, ratio);
    const F clipped = Lanes::mul(weighted, clip(ratio, levels.ratio_low, levels.ratio_high));
    const M is_clipped = Lanes::bit_and(mask, Lanes::greater(clipped, plain));
    M constant = is_clipped;
    F loss = Lanes::at_least(plain, clipped), gradient = plain;
    if (kForm == Form::kAny) {
      const F bound = Lanes::mul(weighted, Lanes::set(constants_.dual_clip));
      const M is_bounded = Lanes::bit_and(Lanes::greater(weighted, levels.zero), Lanes::greater(loss, bound));
      loss = Lanes::select(is_bounded, bound, loss);
      constant = Lanes::bit_or(Lanes::bit_or(constant, is_bounded), is_clamped(window, t));
    }
    if (kForm != Form::kMinimal && window.token_weights) {
      const F token_weight = Lanes::load(window.token_weights + t);
      loss = Lanes::mul(loss, token_weight);
      gradient = Lanes::mul(gradient, token_weight);
    }
    Lanes::store(window.gradient + t, Lanes::select(Lanes::and_not(mask, constant), gradient, levels.zero));
    sums->loss = Lanes::add_where(sums->loss, mask, loss);
    add_to(&sums->ppo_clipped, is_clipped, levels.one);
  }

  FIPO_INLINE M is_clamped(const Window& window, int t) const {
    F shift = Lanes::load(window.log_probs + t);
    if (window.old_log_probs) shift = Lanes::sub(shift, Lanes::load(window.old_log_probs + t));
    return Lanes::greater(Lanes::abs(shift), Lanes::set(constants_.log_ratio_clamp));
  }

  // ---- metrics of ratios ----

  using NearCounts = uint32_t[kNearSlots];  // one of kNearCopies in a row

  // In bins from the lowest near one, to be rounded. Only the first sum rounds, as in the definition.
  static FIPO_INLINE F near_bin(F log_ratio) {
    const F nats = Lanes::add(log_ratio, Lanes::set(kHistogramRange));
    return Lanes::fma(nats, Lanes::set(kHistogramBinsPerNat), Lanes::set(kNearBins - kCentreBin));
  }

  // Ratio metrics of a fast-path block without the histogram; returns where to count that, null if already counted.
  NearCounts* near_counts(const BlockStats& stats) {
    if (stats.negative) keep_largest(&tally_.negative_max, stats.log_ratio_max);
    if (stats.positive) keep_largest(&tally_.positive_max, stats.log_ratio_max);
    if (stats.positive) keep_least(&tally_.positive_min, stats.log_ratio_min);
    if (!(stats.negative || stats.positive) || stats.loss_tokens == 0) return nullptr;
    NearCounts* const near = tally_.histograms->near[stats.positive];
    int32_t first[kWidth], last[kWidth];
    Lanes::store_indices(first, near_bin(Lanes::set(Lanes::smallest(stats.log_ratio_min))));
    Lanes::store_indices(last, near_bin(Lanes::set(Lanes::largest(stats.log_ratio_max))));
    if (first[0] != last[0]) return near;
    near[0][first[0]] += static_cast<uint32_t>(stats.loss_tokens);  // as on the first mini-batch of every step
    return nullptr;
  }

  // A window's bins are counted during the arithmetic of the next one: reading a vector's lanes right after
  // storing it would stall.
  FIPO_INLINE void store_bins(int t, F log_ratio, M mask) {
    const F bin = Lanes::select(mask, near_bin(log_ratio), Lanes::set(kNearSlots - 1));
    Lanes::store_indices(bins_ + t % (2 * kWidth), bin);
  }
  FIPO_INLINE void count_bins(NearCounts* near, int t) const {
    const int32_t* const bins = bins_ + t % (2 * kWidth);
    for (int i = 0; i < kWidth; ++i) ++near[i % kNearCopies][static_cast<uint32_t>(bins[i])];
  }

  // Ratio metrics of a window of a block outside the fast path.
  void uncommon_ratios(F log_ratio, F ratio, M mask, F advantage, F* dual_clipped) {
    const F zero = Lanes::set(0.0f);
    const M negative = Lanes::bit_and(mask, Lanes::less(advantage, zero));
    const M positive = Lanes::bit_and(mask, Lanes::greater(advantage, zero));
    tally_.negative_max = Lanes::largest_where(tally_.negative_max, negative, log_ratio);
    tally_.positive_max = Lanes::largest_where(tally_.positive_max, positive, log_ratio);
    tally_.positive_min = Lanes::least_where(tally_.positive_min, positive, log_ratio);
    count_all(log_ratio, negative, positive);
    const M above_dual_clip = Lanes::bit_and(negative, Lanes::greater(log_ratio, Lanes::set(constants_.log_dual_clip)));
    add_to(dual_clipped, above_dual_clip, Lanes::set(1.0f));
    const M high = Lanes::bit_and(negative, Lanes::not_less(ratio, Lanes::set(2.0f)));
    const M tiny = Lanes::bit_and(positive, Lanes::less(ratio, Lanes::set(1e-3f)));
    if (Lanes::any(Lanes::bit_or(high, tiny))) count_rare(ratio, high, tiny);
  }

  FIPO_INLINE void count_all(F log_ratio, M negative, M positive) {
    Counts& histograms = *tally_.histograms;
    if (!histograms.uses_all) memset(histograms.all, 0, sizeof histograms.all);
    histograms.uses_all = true;
    const F range = Lanes::set(kHistogramRange), not_counted = Lanes::set(2 * kHistogramBins);
    const F nats = Lanes::add(Lanes::at_most(Lanes::at_least(log_ratio, Lanes::negate(range)), range), range);
    const F bin = nearest_whole(Lanes::mul(nats, Lanes::set(kHistogramBinsPerNat)));
    const M number = Lanes::is_number(log_ratio);
    F index = Lanes::select(Lanes::bit_and(positive, number), Lanes::add(bin, Lanes::set(kHistogramBins)), not_counted);
    index = Lanes::select(Lanes::bit_and(negative, number), bin, index);
    int32_t indices[kWidth];
    Lanes::store_indices(indices, index);
    for (int i = 0; i < kWidth; ++i) ++histograms.all[indices[i]];
  }

  __attribute__((noinline)) void count_rare(F ratio, M high, M tiny) {
    const M below3 = Lanes::less(ratio, Lanes::set(3.0f)), below4 = Lanes::less(ratio, Lanes::set(4.0f));
    const M below_dual = Lanes::less(ratio, Lanes::set(constants_.dual_clip));
    tally_.add(kNegative2To3, Lanes::count(Lanes::bit_and(high, below3)));
    tally_.add(kNegative3To4, Lanes::count(Lanes::and_not(Lanes::bit_and(high, below4), below3)));
    tally_.add(kNegative4ToDual, Lanes::count(Lanes::and_not(Lanes::bit_and(high, below_dual), below4)));
    tally_.add(kPositiveBelow1e3, Lanes::count(tiny));
  }

  FIPO_INLINE F advantage_at(const Window& window, int t) const {
    return window.advantages ? Lanes::load(window.advantages + t) : Lanes::set(advantage_);
  }
  static FIPO_INLINE void add_to(F* counts, M m, F one) { *counts = Lanes::add_where(*counts, m, one); }
  static int64_t total(F counts) { return static_cast<int64_t>(Lanes::sum(counts)); }
  static FIPO_INLINE F clip(F x, F low, F high) { return Lanes::at_most(Lanes::at_least(x, low), high); }

  const Constants constants_;
  const Decay decay_;
  Tally& tally_;
  float fast_path_bound_;  // maximum |d| of a fast-path block; negative: none
  double carry_ = 0.0;
  float advantage_ = 0.0f, coefficient_ = 1.0f;
  float log_ratio_[kBlockTokens], future_kl_[kBlockTokens];
  int32_t bins_[2 * kWidth];
};

}  // namespace
