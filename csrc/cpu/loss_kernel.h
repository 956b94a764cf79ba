// The fused loss of one run of segments: each segment from its end to its start, every token read and written once.
#pragma once

#include "kernel_common.h"

namespace {

constexpr float kSafeLow = 0.8f, kSafeHigh = 1.0f;  // what the safety rule clips weights to
constexpr float kExactExp = 80.0f;  // nats; above, exp(S) is summed in float64, since float32 overflows soon
constexpr int kWindowsPerFlush = 16;  // float32 partial sums stay this short

// Sums and extrema of the tokens seen so far, one of each per lane. Minima only: a maximum is the minimum of negatives.
struct Accumulators {
  F log_ratio, future_kl, influence, raw, loss;
  F least_positive, least_future_kl, least_influence;
  F negated_abs, negated_negative, negated_positive, negated_future_kl, negated_influence;
};

template <bool kIsFipo>
class LossRun {
 public:
  LossRun(const LossJob& job, RunResult* result)
      : job_(job), constants_(job.constants), decay_(job.decay), result_(result), all_(window_of(job.tokens)) {
    all_.gradient = job.out.gradient;
    all_.future_kl = job.out.future_kl;
    all_.influence_weights = job.out.influence_weights;
    const F zero = Lanes::set(0.0f), most = Lanes::set(INFINITY);
    sums_ = {zero, zero, zero, zero, zero, most, most, most, most, most, most, most, most};
    for (int i = 0; i < kNumMetrics; ++i) result->metrics[i] = 0.0;
  }

  void segment(int64_t index) {
    const int64_t *offsets = job_.tokens.offsets, begin = offsets[index], end = offsets[index + 1];
    const Shard& shard = job_.shard;
    const double carry = shard.carry_in ? shard.carry_in[index] : 0.0f;
    const int64_t sequence_tokens = shard.sequence_tokens ? shard.sequence_tokens[index] : -1;
    const PieceSummary seen = piece({index, begin, end, carry}, sequence_tokens);
    const int64_t allowed = constants_.max_dual_clipped;
    const bool vetoed = shard.vetoed ? shard.vetoed[index] != 0 : allowed >= 0 && seen.dual_clipped > allowed;
    settle(begin, end, seen.loss_tokens, vetoed);
    job_.out.vetoed[index] = vetoed;
    const bool counts = !shard.counts_sequence || shard.counts_sequence[index];
    const bool has_tokens = (sequence_tokens >= 0 ? sequence_tokens : seen.loss_tokens) > 0;
    add(kLossSequences, counts && has_tokens);
    add(kNumSequences, counts && has_tokens && !vetoed);
    add(kVetoed, counts && vetoed);
  }

  void tile(const Run& run) {
    const PieceSummary seen = piece(run.tile, run.sequence_tokens);
    settle(run.tile.begin, run.tile.end, seen.loss_tokens, run.vetoed);
  }

  void finish() {
    flush();
    for (int i = 0; i < kFirstExtremum; ++i) result_->metrics[i] += static_cast<double>(counts_[i]);
    put_extremum(kLogRatioAbsMax, -Lanes::smallest(sums_.negated_abs));
    put_extremum(kNegativeRatioMax, exp(-(double)Lanes::smallest(sums_.negated_negative)));
    put_extremum(kPositiveRatioMin, exp((double)Lanes::smallest(sums_.least_positive)));
    put_extremum(kPositiveRatioMax, exp(-(double)Lanes::smallest(sums_.negated_positive)));
    put_extremum(kFutureKlMin, Lanes::smallest(sums_.least_future_kl));
    put_extremum(kFutureKlMax, -Lanes::smallest(sums_.negated_future_kl));
    put_extremum(kInfluenceMin, Lanes::smallest(sums_.least_influence));
    put_extremum(kInfluenceMax, -Lanes::smallest(sums_.negated_influence));
    // exp is monotone: its extrema are those of S. They turn into exp(S) when all runs are together.
    put_extremum(kInfluenceRawMin, result_->metrics[kFutureKlMin]);
    put_extremum(kInfluenceRawMax, result_->metrics[kFutureKlMax]);
  }

 private:
  // Everything of the piece but what a veto decides; that is kept in piece_loss_ for `settle`.
  PieceSummary piece(const Piece& piece, int64_t sequence_tokens) {
    scale_ = Lanes::set(coefficient(piece, sequence_tokens));
    if (!all_.advantages) advantage_ = Lanes::set(job_.tokens.advantages[piece.segment]);
    PieceSummary seen = {0.0, 0, 0};
    // Local copies stay in registers; members would be stored after every window.
    Accumulators sums = sums_;
    double carry = piece.carry;
    int64_t end = piece.end;
    while (end - piece.begin >= kWidth) {
      const int64_t windows = (end - piece.begin) / kWidth;
      const int64_t block = windows < kWindowsPerFlush ? windows : kWindowsPerFlush;
      for (int64_t i = 0; i < block; ++i, end -= kWidth) step(all_.at(end - kWidth), &seen, &sums, &carry);
      if ((windows_ += block) >= kWindowsPerFlush) {
        sums_ = sums;
        flush();
        sums = sums_;
      }
    }
    if (end > piece.begin) {
      Edge edge(all_.at(piece.begin), static_cast<int>(end - piece.begin));
      step(edge.window(), &seen, &sums, &carry);
      edge.write_back();
      ++windows_;
    }
    sums_ = sums;
    piece_loss_ += Lanes::sum(sums_.loss);
    sums_.loss = Lanes::set(0.0f);
    add(kLossTokens, seen.loss_tokens);
    add(kDualClipped, seen.dual_clipped);
    return seen;
  }

  void settle(int64_t begin, int64_t end, int64_t loss_tokens, bool vetoed) {
    if (vetoed) {
      memset(job_.out.gradient + begin, 0, (end - begin) * sizeof(float));
    } else {
      result_->metrics[kLossSum] += piece_loss_;
      add(kNumTokens, loss_tokens);
    }
    piece_loss_ = 0.0;
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

  FIPO_INLINE void step(const Window& window, PieceSummary* seen, Accumulators* sums, double* carry) {
    const F zero = Lanes::set(0.0f);
    const Shift shift = load_shift(window, Lanes::set(constants_.log_ratio_clamp), Lanes::set(constants_.log_dual_clip));
    const F d = shift.log_ratio, ratio = exponential(d);
    const M mask = shift.mask;
    const F advantage = window.advantages ? Lanes::load(window.advantages) : advantage_;
    const M negative = Lanes::both(mask, Lanes::less(advantage, zero));
    const M positive = Lanes::both(mask, Lanes::greater(advantage, zero));

    F weighted = advantage;
    if (kIsFipo) {
      const F future_kl = scan_window(shift, decay_, load_to_end(decay_), carry);
      weighted = Lanes::mul(influence(window, future_kl, ratio, mask, negative, sums), advantage);
    } else {
      if (window.future_kl) Lanes::store(window.future_kl, zero);
      if (window.influence_weights) Lanes::store(window.influence_weights, Lanes::set(1.0f));
    }
    surrogate(window, shift, ratio, weighted, sums);

    seen->loss_tokens += Lanes::count(mask);
    seen->dual_clipped += Lanes::count(Lanes::both(shift.extreme, negative));
    sums->log_ratio = Lanes::add(sums->log_ratio, Lanes::select(mask, d, zero));
    keep_least(&sums->negated_abs, mask, Lanes::negate(Lanes::abs(d)));
    keep_least(&sums->negated_negative, negative, Lanes::negate(d));
    keep_least(&sums->negated_positive, positive, Lanes::negate(d));
    keep_least(&sums->least_positive, positive, d);
    rare_ratios(ratio, negative, positive);
    histogram(d, negative, positive);
  }

  // f_t, its metrics and those of S_t.
  FIPO_INLINE F influence(const Window& window, F future_kl, F ratio, M mask, M negative, Accumulators* sums) {
    const F zero = Lanes::set(0.0f);
    const F raw = exponential(future_kl);
    F weight = clip(raw, constants_.influence_low, constants_.influence_high);
    const M unsafe = Lanes::both(negative, Lanes::greater(ratio, Lanes::set(constants_.safety_threshold)));
    weight = Lanes::select(unsafe, clip(weight, kSafeLow, kSafeHigh), weight);
    if (window.future_kl) Lanes::store(window.future_kl, future_kl);
    if (window.influence_weights) Lanes::store(window.influence_weights, weight);

    sums->future_kl = Lanes::add(sums->future_kl, Lanes::select(mask, future_kl, zero));
    sums->influence = Lanes::add(sums->influence, Lanes::select(mask, weight, zero));
    const M large = Lanes::both(mask, Lanes::greater(future_kl, Lanes::set(kExactExp)));
    sums->raw = Lanes::add(sums->raw, Lanes::select(Lanes::without(mask, large), raw, zero));
    if (__builtin_expect(Lanes::any(large), 0)) add_large_raw(Lanes::select(large, future_kl, zero));
    keep_least(&sums->least_future_kl, mask, future_kl);
    keep_least(&sums->negated_future_kl, mask, Lanes::negate(future_kl));
    keep_least(&sums->least_influence, mask, weight);
    keep_least(&sums->negated_influence, mask, Lanes::negate(weight));
    const M below_upper = Lanes::less(weight, Lanes::set(constants_.pinned_high));
    const M above_lower = Lanes::greater(weight, Lanes::set(constants_.pinned_low));
    const M number = Lanes::both(mask, Lanes::is_number(weight));
    add(kPinnedUpper, Lanes::count(Lanes::without(number, below_upper)));
    add(kPinnedLower, Lanes::count(Lanes::without(number, above_lower)));
    return weight;
  }

  // l_t and its derivative.
  FIPO_INLINE void surrogate(const Window& window, const Shift& shift, F ratio, F weighted, Accumulators* sums) {
    const F zero = Lanes::set(0.0f);
    const F negated = Lanes::negate(weighted);
    const F plain = Lanes::mul(negated, ratio);
    const F clipped = Lanes::mul(negated, clip(ratio, constants_.ratio_low, constants_.ratio_high));
    const F bound = Lanes::mul(negated, Lanes::set(constants_.dual_clip));
    const M is_clipped = Lanes::greater(clipped, plain);
    F loss = Lanes::select(is_clipped, clipped, plain);
    const M is_bounded = Lanes::both(Lanes::less(weighted, zero), Lanes::greater(loss, bound));
    loss = Lanes::select(is_bounded, bound, loss);
    const M is_clamped = Lanes::greater(Lanes::abs(shift.unclamped), Lanes::set(constants_.log_ratio_clamp));
    const M constant = Lanes::either(Lanes::either(is_clipped, is_bounded), is_clamped);

    F scale = scale_;
    if (window.token_weights) scale = Lanes::mul(scale, Lanes::load(window.token_weights));
    const F gradient = Lanes::mul(plain, scale);
    Lanes::store(window.gradient, Lanes::select(Lanes::without(shift.mask, constant), gradient, zero));
    sums->loss = Lanes::add(sums->loss, Lanes::select(shift.mask, Lanes::mul(loss, scale), zero));
    add(kPpoClipped, Lanes::count(Lanes::both(shift.mask, is_clipped)));
  }

  FIPO_INLINE void rare_ratios(F ratio, M negative, M positive) {
    const M high = Lanes::without(negative, Lanes::less(ratio, Lanes::set(2.0f)));
    const M tiny = Lanes::both(positive, Lanes::less(ratio, Lanes::set(1e-3f)));
    if (__builtin_expect(Lanes::any(high), 0)) {
      const M below3 = Lanes::less(ratio, Lanes::set(3.0f)), below4 = Lanes::less(ratio, Lanes::set(4.0f));
      const M below_dual = Lanes::less(ratio, Lanes::set(constants_.dual_clip));
      add(kNegative2To3, Lanes::count(Lanes::both(high, below3)));
      add(kNegative3To4, Lanes::count(Lanes::without(Lanes::both(high, below4), below3)));
      add(kNegative4ToDual, Lanes::count(Lanes::without(Lanes::both(high, below_dual), below4)));
    }
    if (__builtin_expect(Lanes::any(tiny), 0)) add(kPositiveBelow1e3, Lanes::count(tiny));
  }

  FIPO_INLINE void histogram(F d, M negative, M positive) {
    const F range = Lanes::set(kHistogramRange);
    const F nats = Lanes::at_most(Lanes::at_least(d, Lanes::negate(range)), range);
    const F bin = Lanes::round(Lanes::mul(Lanes::add(nats, range), Lanes::set(kHistogramBinsPerNat)));
    const M number = Lanes::is_number(d);
    F index = Lanes::set(2 * kHistogramBins);  // not counted
    index = Lanes::select(Lanes::both(positive, number), Lanes::add(bin, Lanes::set(kHistogramBins)), index);
    index = Lanes::select(Lanes::both(negative, number), bin, index);
    int32_t indices[kWidth];
    Lanes::store_indices(indices, index);
    for (int i = 0; i < kWidth; ++i) ++result_->histograms[indices[i]];
  }

  static FIPO_INLINE F clip(F x, float low, float high) {
    return Lanes::at_most(Lanes::at_least(x, Lanes::set(low)), Lanes::set(high));
  }
  static FIPO_INLINE void keep_least(F* least, M selected, F x) {
    *least = Lanes::at_most(*least, Lanes::select(selected, x, *least));
  }
  FIPO_INLINE void add(Metric metric, int64_t count) { counts_[metric] += count; }
  void put_extremum(Metric metric, double value) { result_->metrics[metric] = value; }

  __attribute__((noinline)) void add_large_raw(F future_kl) {
    float lanes[kWidth];
    Lanes::store(lanes, future_kl);
    for (int i = 0; i < kWidth; ++i)
      if (lanes[i] > 0.0f) result_->metrics[kInfluenceRaw] += exp(fmin((double)lanes[i], kMaxLogWeight));
  }

  void flush() {
    double* metrics = result_->metrics;
    metrics[kPolicyKl] -= Lanes::sum(sums_.log_ratio);
    metrics[kFutureKl] += Lanes::sum(sums_.future_kl);
    metrics[kInfluence] += Lanes::sum(sums_.influence);
    metrics[kInfluenceRaw] += Lanes::sum(sums_.raw);
    piece_loss_ += Lanes::sum(sums_.loss);
    sums_.log_ratio = sums_.future_kl = sums_.influence = sums_.raw = sums_.loss = Lanes::set(0.0f);
    windows_ = 0;
  }

  const LossJob& job_;
  const Constants constants_;
  const Decay decay_;
  RunResult* const result_;
  Window all_;
  Accumulators sums_;
  F scale_, advantage_;
  double piece_loss_ = 0.0;
  int64_t windows_ = 0;  // since the last flush
  int64_t counts_[kFirstExtremum] = {};
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
