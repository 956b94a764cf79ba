// The fused loss of one run of segments: each segment from its end to its start, in blocks that stay in the L1 cache.
// Several short loops go over a block rather than one long one, so that the processor has many tokens in flight.
#pragma once

#include "kernel_common.h"

namespace {

constexpr float kSafeLow = 0.8f, kSafeHigh = 1.0f;  // what the safety rule clips weights to
constexpr float kExactExp = 80.0f;     // nats; above, exp(S) is summed in float64, since float32 overflows soon
constexpr int kBlockWindows = 16;      // float32 partial sums are over one block
constexpr int kBlockTokens = kBlockWindows * kWidth;

// What the loops over a block hand to each other.
struct Block {
  float log_ratio[kBlockTokens];
  float ratio[kBlockTokens];
  float future_kl[kBlockTokens];
  float raw[kBlockTokens];     // exp(S)
  float weight[kBlockTokens];  // f
  int32_t bin[kBlockTokens];
};

// Of the tokens seen so far, one per lane.
struct Extrema {
  F log_ratio_abs_max, negative_max, positive_min, positive_max;
  F future_kl_min, future_kl_max, influence_min, influence_max;
};

template <bool kIsFipo>
class LossRun {
 public:
  LossRun(const LossJob& job, RunResult* result)
      : job_(job), constants_(job.constants), decay_(job.decay), result_(result), all_(window_of(job.tokens)) {
    all_.gradient = job.out.gradient;
    all_.future_kl = job.out.future_kl;
    all_.influence_weights = job.out.influence_weights;
    const F most = Lanes::set(INFINITY), least = Lanes::set(-INFINITY);
    extrema_ = {least, least, most, least, most, least, most, least};
    for (int i = 0; i < kNumMetrics; ++i) result->metrics[i] = 0.0;
  }

  void segment(int64_t index) {
    const int64_t *offsets = job_.tokens.offsets, begin = offsets[index], end = offsets[index + 1];
    const Shard& shard = job_.shard;
    const double carry = shard.carry_in ? shard.carry_in[index] : 0.0;
    const int64_t sequence_tokens = shard.sequence_tokens ? shard.sequence_tokens[index] : -1;
    const PieceLoss seen = piece({index, begin, end, carry}, sequence_tokens);
    const int64_t allowed = constants_.max_dual_clipped;
    const bool vetoed = shard.vetoed ? shard.vetoed[index] != 0 : allowed >= 0 && seen.dual_clipped > allowed;
    settle(begin, end, seen, vetoed);
    job_.out.vetoed[index] = vetoed;
    const bool counts = !shard.counts_sequence || shard.counts_sequence[index];
    const bool has_tokens = (sequence_tokens >= 0 ? sequence_tokens : seen.loss_tokens) > 0;
    add(kLossSequences, counts && has_tokens);
    add(kNumSequences, counts && has_tokens && !vetoed);
    add(kVetoed, counts && vetoed);
  }

  void tile(const Run& run) {
    const PieceLoss seen = piece(run.tile, run.sequence_tokens);
    settle(run.tile.begin, run.tile.end, seen, run.vetoed);
  }

  void finish() {
    double* metrics = result_->metrics;
    for (int i = 0; i < kFirstExtremum; ++i) metrics[i] += static_cast<double>(counts_[i]);
    metrics[kLogRatioAbsMax] = Lanes::largest(extrema_.log_ratio_abs_max);
    metrics[kNegativeRatioMax] = exp((double)Lanes::largest(extrema_.negative_max));
    metrics[kPositiveRatioMin] = exp((double)Lanes::smallest(extrema_.positive_min));
    metrics[kPositiveRatioMax] = exp((double)Lanes::largest(extrema_.positive_max));
    metrics[kFutureKlMin] = Lanes::smallest(extrema_.future_kl_min);
    metrics[kFutureKlMax] = Lanes::largest(extrema_.future_kl_max);
    metrics[kInfluenceMin] = Lanes::smallest(extrema_.influence_min);
    metrics[kInfluenceMax] = Lanes::largest(extrema_.influence_max);
    // Until all runs are together these are extrema of S, of which exp is monotone; no data differs from S = -inf.
    metrics[kInfluenceRawMin] = metrics[kFutureKlMin];
    metrics[kInfluenceRawMax] = metrics[kFutureKlMax];
    // exp turned "no data" into 0 for a maximum.
    if (metrics[kNegativeRatioMax] == 0.0) metrics[kNegativeRatioMax] = -INFINITY;
    if (metrics[kPositiveRatioMax] == 0.0) metrics[kPositiveRatioMax] = -INFINITY;
  }

 private:
  // What of a piece a veto decides about.
  struct PieceLoss {
    double loss;
    int64_t dual_clipped, loss_tokens;
  };

  PieceLoss piece(const Piece& piece, int64_t sequence_tokens) {
    scale_ = Lanes::set(coefficient(piece, sequence_tokens));
    // The flag decides, not the pointer: without tokens, per-token advantages are null while there may be segments.
    if (!job_.tokens.advantages_per_token) advantage_ = Lanes::set(job_.tokens.advantages[piece.segment]);
    carry_ = piece.carry;
    PieceLoss seen = {0.0, 0, 0};
    int64_t end = piece.end;
    while (end - piece.begin >= kWidth) {
      const int64_t windows = (end - piece.begin) / kWidth;
      const int count = windows < kBlockWindows ? static_cast<int>(windows) : kBlockWindows;
      end -= count * kWidth;
      block(all_.at(end), count, &seen);
    }
    if (end > piece.begin) {
      Edge edge(all_.at(piece.begin), static_cast<int>(end - piece.begin));
      block(edge.window(), 1, &seen);
      edge.write_back();
    }
    add(kLossTokens, seen.loss_tokens);
    add(kDualClipped, seen.dual_clipped);
    return seen;
  }

  void settle(int64_t begin, int64_t end, const PieceLoss& seen, bool vetoed) {
    if (vetoed) {
      memset(job_.out.gradient + begin, 0, (end - begin) * sizeof(float));
      return;
    }
    result_->metrics[kLossSum] += seen.loss;
    add(kNumTokens, seen.loss_tokens);
  }

  float coefficient(const Piece& piece, int64_t sequence_tokens) const {
    if (constants_.aggregation == Aggregation::kSeqMeanTokenSumNorm) return 1.0f / constants_.norm_length;
    if (constants_.aggregation != Aggregation::kSeqMeanTokenMean) return 1.0f;
    int64_t count = sequence_tokens;
    if (count < 0) {
      count = 0;
      for (int64_t t = piece.begin; t < piece.end; ++t) count += job_.tokens.mask[t] != 0;
    }
    return 1.0f / static_cast<float>(count > 1 ? count : 1);
  }

  void block(const Window& window, int count, PieceLoss* seen) {
    const bool moved = shifts(window, count);
    ratios(count);
    if (kIsFipo)
      influence(window, count);
    else
      store_no_influence(window, count);
    surrogate(window, count, seen);
    ratio_metrics(window, count, moved);
  }

  // d_t and S_t; whether any d_t is not 0.
  bool shifts(const Window& window, int count) {
    const F clamp = Lanes::set(constants_.log_ratio_clamp), log_dual_clip = Lanes::set(constants_.log_dual_clip);
    const F to_end = load_to_end(decay_), zero = Lanes::set(0.0f);
    const Decay decay = decay_;
    double carry = carry_;
    int at_zero = 0;
    for (int t = (count - 1) * kWidth; t >= 0; t -= kWidth) {
      const Shift shift = load_shift(window.at(t), clamp, log_dual_clip);
      Lanes::store(block_.log_ratio + t, shift.log_ratio);
      at_zero += Lanes::count(Lanes::without(shift.mask, Lanes::equal(shift.log_ratio, zero)));
      if (kIsFipo) Lanes::store(block_.future_kl + t, scan_window(shift, decay, to_end, &carry));
    }
    carry_ = carry;
    return at_zero != 0;
  }

  void ratios(int count) {
    for (int t = 0; t < count * kWidth; t += kWidth) {
      Lanes::store(block_.ratio + t, exponential(Lanes::load(block_.log_ratio + t)));
      if (kIsFipo) Lanes::store(block_.raw + t, exponential(Lanes::load(block_.future_kl + t)));
    }
  }

  // f_t, and the metrics of it and of S_t.
  void influence(const Window& window, int count) {
    const F zero = Lanes::set(0.0f);
    const F low = Lanes::set(constants_.influence_low), high = Lanes::set(constants_.influence_high);
    const F safety = Lanes::set(constants_.safety_threshold);
    const F pinned_low = Lanes::set(constants_.pinned_low), pinned_high = Lanes::set(constants_.pinned_high);
    F future_kl_sum = zero, weight_sum = zero, raw_sum = zero;
    Extrema extrema = extrema_;
    int64_t upper = 0, lower = 0;
    for (int t = 0; t < count * kWidth; t += kWidth) {
      const M mask = Lanes::load_mask(window.mask + t);
      const F raw = Lanes::load(block_.raw + t), future_kl = Lanes::load(block_.future_kl + t);
      F weight = clip(raw, low, high);
      const M negative = Lanes::both(mask, Lanes::less(advantage_at(window, t), zero));
      const M unsafe = Lanes::both(negative, Lanes::greater(Lanes::load(block_.ratio + t), safety));
      weight = Lanes::select(unsafe, clip(weight, Lanes::set(kSafeLow), Lanes::set(kSafeHigh)), weight);
      Lanes::store(block_.weight + t, weight);
      if (window.future_kl) Lanes::store(window.future_kl + t, future_kl);
      if (window.influence_weights) Lanes::store(window.influence_weights + t, weight);

      future_kl_sum = Lanes::add(future_kl_sum, Lanes::select(mask, future_kl, zero));
      weight_sum = Lanes::add(weight_sum, Lanes::select(mask, weight, zero));
      const M large = Lanes::both(mask, Lanes::greater(future_kl, Lanes::set(kExactExp)));
      raw_sum = Lanes::add(raw_sum, Lanes::select(Lanes::without(mask, large), raw, zero));
      if (__builtin_expect(Lanes::any(large), 0)) add_large_raw(Lanes::select(large, future_kl, zero));
      keep_least(&extrema.future_kl_min, mask, future_kl);
      keep_largest(&extrema.future_kl_max, mask, future_kl);
      keep_least(&extrema.influence_min, mask, weight);
      keep_largest(&extrema.influence_max, mask, weight);
      const M number = Lanes::both(mask, Lanes::is_number(weight));
      upper += Lanes::count(Lanes::without(number, Lanes::less(weight, pinned_high)));
      lower += Lanes::count(Lanes::without(number, Lanes::greater(weight, pinned_low)));
    }
    extrema_ = extrema;
    result_->metrics[kFutureKl] += Lanes::sum(future_kl_sum);
    result_->metrics[kInfluence] += Lanes::sum(weight_sum);
    result_->metrics[kInfluenceRaw] += Lanes::sum(raw_sum);
    add(kPinnedUpper, upper);
    add(kPinnedLower, lower);
  }

  void store_no_influence(const Window& window, int count) {
    for (int t = 0; t < count * kWidth; t += kWidth) {
      if (window.future_kl) Lanes::store(window.future_kl + t, Lanes::set(0.0f));
      if (window.influence_weights) Lanes::store(window.influence_weights + t, Lanes::set(1.0f));
    }
  }

  // l_t and its derivative.
  void surrogate(const Window& window, int count, PieceLoss* seen) {
    const F clamp = Lanes::set(constants_.log_ratio_clamp), log_dual_clip = Lanes::set(constants_.log_dual_clip);
    const F low = Lanes::set(constants_.ratio_low), high = Lanes::set(constants_.ratio_high);
    const F dual_clip = Lanes::set(constants_.dual_clip), zero = Lanes::set(0.0f);
    F loss_sum = zero;
    int64_t loss_tokens = 0, dual_clipped = 0, ppo_clipped = 0;
    for (int t = 0; t < count * kWidth; t += kWidth) {
      const Shift shift = load_shift(window.at(t), clamp, log_dual_clip);
      const F ratio = Lanes::load(block_.ratio + t), advantage = advantage_at(window, t);
      const F weighted = kIsFipo ? Lanes::mul(Lanes::load(block_.weight + t), advantage) : advantage;
      const F negated = Lanes::negate(weighted);
      const F plain = Lanes::mul(negated, ratio);
      const F clipped = Lanes::mul(negated, clip(ratio, low, high));
      const F bound = Lanes::mul(negated, dual_clip);
      const M is_clipped = Lanes::greater(clipped, plain);
      F loss = Lanes::select(is_clipped, clipped, plain);
      const M is_bounded = Lanes::both(Lanes::less(weighted, zero), Lanes::greater(loss, bound));
      loss = Lanes::select(is_bounded, bound, loss);
      const M is_clamped = Lanes::greater(Lanes::abs(shift.unclamped), clamp);
      const M constant = Lanes::either(Lanes::either(is_clipped, is_bounded), is_clamped);

      F scale = scale_;
      if (window.token_weights) scale = Lanes::mul(scale, Lanes::load(window.token_weights + t));
      const F gradient = Lanes::mul(plain, scale);
      Lanes::store(window.gradient + t, Lanes::select(Lanes::without(shift.mask, constant), gradient, zero));
      loss_sum = Lanes::add(loss_sum, Lanes::select(shift.mask, Lanes::mul(loss, scale), zero));
      loss_tokens += Lanes::count(shift.mask);
      dual_clipped += Lanes::count(Lanes::both(shift.extreme, Lanes::less(advantage, zero)));
      ppo_clipped += Lanes::count(Lanes::both(shift.mask, is_clipped));
    }
    seen->loss += Lanes::sum(loss_sum);
    seen->loss_tokens += loss_tokens;
    seen->dual_clipped += dual_clipped;
    add(kPpoClipped, ppo_clipped);
  }

  void ratio_metrics(const Window& window, int count, bool moved) {
    const F zero = Lanes::set(0.0f), range = Lanes::set(kHistogramRange);
    const F not_counted = Lanes::set(2 * kHistogramBins), bins = Lanes::set(kHistogramBins);
    const F per_nat = Lanes::set(kHistogramBinsPerNat);
    F log_ratio_sum = zero;
    Extrema extrema = extrema_;
    int64_t negatives = 0, positives = 0;
    for (int t = 0; t < count * kWidth; t += kWidth) {
      const F d = Lanes::load(block_.log_ratio + t), ratio = Lanes::load(block_.ratio + t);
      const M mask = Lanes::load_mask(window.mask + t);
      const F advantage = advantage_at(window, t);
      const M negative = Lanes::both(mask, Lanes::less(advantage, zero));
      const M positive = Lanes::both(mask, Lanes::greater(advantage, zero));
      negatives += Lanes::count(negative);
      positives += Lanes::count(positive);
      log_ratio_sum = Lanes::add(log_ratio_sum, Lanes::select(mask, d, zero));
      keep_largest(&extrema.log_ratio_abs_max, mask, Lanes::abs(d));
      keep_largest(&extrema.negative_max, negative, d);
      keep_largest(&extrema.positive_max, positive, d);
      keep_least(&extrema.positive_min, positive, d);
      rare_ratios(ratio, negative, positive);

      const F nats = Lanes::at_most(Lanes::at_least(d, Lanes::negate(range)), range);
      const F bin = Lanes::round(Lanes::mul(Lanes::add(nats, range), per_nat));
      const M number = Lanes::is_number(d);
      F index = Lanes::select(Lanes::both(positive, number), Lanes::add(bin, bins), not_counted);
      index = Lanes::select(Lanes::both(negative, number), bin, index);
      Lanes::store_indices(block_.bin + t, index);
    }
    extrema_ = extrema;
    result_->metrics[kPolicyKl] -= Lanes::sum(log_ratio_sum);
    uint32_t* histograms = result_->histograms;
    if (moved) {
      for (int t = 0; t < count * kWidth; ++t) ++histograms[block_.bin[t]];
    } else {  // as on the first mini-batch of every step: all in two bins, where increments would wait for each other
      constexpr int kCentre = kHistogramRange * kHistogramBinsPerNat;
      histograms[kCentre] += static_cast<uint32_t>(negatives);
      histograms[kHistogramBins + kCentre] += static_cast<uint32_t>(positives);
    }
  }

  FIPO_INLINE void rare_ratios(F ratio, M negative, M positive) {
    const M high = Lanes::without(negative, Lanes::less(ratio, Lanes::set(2.0f)));
    const M tiny = Lanes::both(positive, Lanes::less(ratio, Lanes::set(1e-3f)));
    if (__builtin_expect(Lanes::any(Lanes::either(high, tiny)), 0)) count_rare(ratio, high, tiny);
  }

  __attribute__((noinline)) void count_rare(F ratio, M high, M tiny) {
    high = Lanes::both(high, Lanes::is_number(ratio));
    const M below3 = Lanes::less(ratio, Lanes::set(3.0f)), below4 = Lanes::less(ratio, Lanes::set(4.0f));
    const M below_dual = Lanes::less(ratio, Lanes::set(constants_.dual_clip));
    add(kNegative2To3, Lanes::count(Lanes::both(high, below3)));
    add(kNegative3To4, Lanes::count(Lanes::without(Lanes::both(high, below4), below3)));
    add(kNegative4ToDual, Lanes::count(Lanes::without(Lanes::both(high, below_dual), below4)));
    add(kPositiveBelow1e3, Lanes::count(tiny));
  }

  __attribute__((noinline)) void add_large_raw(F future_kl) {
    float lanes[kWidth];
    Lanes::store(lanes, future_kl);
    for (int i = 0; i < kWidth; ++i)
      if (lanes[i] > 0.0f) result_->metrics[kInfluenceRaw] += exp(fmin((double)lanes[i], kMaxLogWeight));
  }

  FIPO_INLINE F advantage_at(const Window& window, int t) const {
    return window.advantages ? Lanes::load(window.advantages + t) : advantage_;
  }
  static FIPO_INLINE F clip(F x, F low, F high) { return Lanes::at_most(Lanes::at_least(x, low), high); }
  static FIPO_INLINE void keep_least(F* least, M selected, F x) {
    *least = Lanes::at_most(*least, Lanes::select(selected, x, *least));
  }
  static FIPO_INLINE void keep_largest(F* largest, M selected, F x) {
    *largest = Lanes::at_least(*largest, Lanes::select(selected, x, *largest));
  }
  FIPO_INLINE void add(Metric metric, int64_t count) { counts_[metric] += count; }

  const LossJob& job_;
  const Constants constants_;
  const Decay decay_;
  RunResult* const result_;
  Window all_;
  Extrema extrema_;
  F scale_, advantage_;
  double carry_ = 0.0;
  int64_t counts_[kFirstExtremum] = {};
  Block block_;
};

template <bool kIsFipo>
void run_loss(const LossJob& job, const Run& run, RunResult* result) {
  LossRun<kIsFipo> loss(job, result);
  if (run.is_tile) loss.tile(run);
  for (int64_t i = run.first; !run.is_tile && i < run.last; ++i) loss.segment(i);
  loss.finish();
}

void loss_run(const LossJob& job, const Run& run, RunResult* result) {
  if (job.constants.influence)
    run_loss<true>(job, run, result);
  else
    run_loss<false>(job, run, result);
}

}  // namespace
