// Fused loss of one run of segments: each segment from its end to its start, in blocks that stay in the L1 cache.
#pragma once

#include "loss_block.h"

namespace {

template <bool kIsFipo>
class LossRun {
 public:
  LossRun(const LossJob& job, Counts* histograms)
      : job_(job), tally_(histograms), block_(job.constants, job.decay, &tally_), all_(window_of(job.tokens)) {
    all_.gradient = job.out.gradient;
    all_.future_kl = job.out.future_kl;
    all_.influence_weights = job.out.influence_weights;
  }

  void segment(int64_t index) {
    const int64_t *offsets = job_.tokens.offsets, begin = offsets[index], end = offsets[index + 1];
    const Shard& shard = job_.shard;
    const double carry = shard.carry_in ? shard.carry_in[index] : 0.0;
    const int64_t sequence_tokens = shard.sequence_tokens ? shard.sequence_tokens[index] : -1;
    const PieceLoss seen = piece({index, begin, end, carry}, sequence_tokens);
    const int64_t allowed = job_.constants.max_dual_clipped;
    const bool vetoed = shard.vetoed ? shard.vetoed[index] != 0 : allowed >= 0 && seen.dual_clipped > allowed;
    finalize_segment(begin, end, seen, vetoed);
    job_.out.vetoed[index] = vetoed;
    const bool counts = !shard.counts_sequence || shard.counts_sequence[index];
    const bool has_tokens = (sequence_tokens >= 0 ? sequence_tokens : seen.loss_tokens) > 0;
    tally_.add(kLossSequences, counts && has_tokens);
    tally_.add(kNumSequences, counts && has_tokens && !vetoed);
    tally_.add(kVetoed, counts && vetoed);
  }

  void tile(const Run& run) {
    const PieceLoss seen = piece(run.tile, run.sequence_tokens);
    finalize_segment(run.tile.begin, run.tile.end, seen, run.vetoed);
  }

  void finish(double* metrics) const { tally_.finish(metrics); }

 private:
  PieceLoss piece(const Piece& piece, int64_t sequence_tokens) {
    // Use the flag, not the pointer: without tokens, per-token advantages are null while there may be segments.
    const bool per_token = job_.tokens.advantages_per_token != 0;
    block_.start(piece.carry, per_token ? 0.0f : job_.tokens.advantages[piece.segment],
                 coefficient(piece, sequence_tokens));
    PieceLoss seen = {0.0, 0, 0};
    int64_t end = piece.end;
    while (end - piece.begin >= kWidth) {
      const int64_t windows = (end - piece.begin) / kWidth;
      const int count = windows < kBlockWindows ? static_cast<int>(windows) : kBlockWindows;
      end -= count * kWidth;
      block_.run(all_.at(end), count, &seen);
    }
    if (end > piece.begin) {
      Edge edge(all_.at(piece.begin), static_cast<int>(end - piece.begin));
      block_.run(edge.window(), 1, &seen);
      edge.write_back();
    }
    tally_.add(kLossTokens, seen.loss_tokens);
    tally_.add(kDualClipped, seen.dual_clipped);
    return seen;
  }

  void finalize_segment(int64_t begin, int64_t end, const PieceLoss& seen, bool vetoed) {
    if (vetoed) {
      memset(job_.out.gradient + begin, 0, (end - begin) * sizeof(float));
      return;
    }
    tally_.sums[kLossSum] += seen.loss;
    tally_.add(kNumTokens, seen.loss_tokens);
  }

  float coefficient(const Piece& piece, int64_t sequence_tokens) const {
    const Constants& constants = job_.constants;
    if (constants.aggregation == Aggregation::kSeqMeanTokenSumNorm) return 1.0f / constants.norm_length;
    if (constants.aggregation != Aggregation::kSeqMeanTokenMean) return 1.0f;
    int64_t count = sequence_tokens;
    if (count < 0) {
      count = 0;
      for (int64_t t = piece.begin; t < piece.end; ++t) count += job_.tokens.mask[t] != 0;
    }
    return 1.0f / static_cast<float>(count > 1 ? count : 1);
  }

  const LossJob& job_;
  Tally tally_;
  LossBlock<kIsFipo> block_;
  Window all_;
};

template <bool kIsFipo>
void run_loss(const LossJob& job, const Run& run, RunResult* result) {
  LossRun<kIsFipo> loss(job, result->counts);
  if (run.is_tile) loss.tile(run);
  for (int64_t i = run.first; !run.is_tile && i < run.last; ++i) loss.segment(i);
  loss.finish(result->metrics);
}

void loss_run(const LossJob& job, const Run& run, RunResult* result) {
  if (job.constants.influence)
    run_loss<true>(job, run, result);
  else
    run_loss<false>(job, run, result);
}

}  // namespace
