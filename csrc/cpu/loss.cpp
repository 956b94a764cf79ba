#include <math.h>
#include <string.h>

#include <algorithm>
#include <memory>

#include "plan.h"

namespace fipo {
namespace cpu {
namespace {

// Values of a whole long segment that its tiles need, and its entries of the outputs.
void finalize_long_segment(const LossJob& job, LongSegment* segment, std::vector<Run>* runs, double* metrics) {
  const int64_t index = segment->segment;
  const Shard& shard = job.shard;
  const PieceSummary whole =
      segment->link(shard.carry_in ? shard.carry_in[index] : 0.0f, job.constants.half_life);
  const int64_t allowed = job.constants.max_dual_clipped;
  const bool vetoed = shard.vetoed ? shard.vetoed[index] != 0 : allowed >= 0 && whole.dual_clipped > allowed;
  const int64_t sequence_tokens = shard.sequence_tokens ? shard.sequence_tokens[index] : whole.loss_tokens;
  for (const Piece& tile : segment->tiles) runs->push_back({index, index + 1, true, tile, vetoed, sequence_tokens});
  job.out.vetoed[index] = vetoed;
  if (shard.counts_sequence && !shard.counts_sequence[index]) return;
  metrics[kLossSequences] += sequence_tokens > 0;
  metrics[kNumSequences] += sequence_tokens > 0 && !vetoed;
  metrics[kVetoed] += vetoed;
}

void clear(double* metrics) {
  for (int i = 0; i < kNumMetrics; ++i) metrics[i] = 0.0;
  for (int i : {kPositiveRatioMin, kFutureKlMin, kInfluenceMin, kInfluenceRawMin}) metrics[i] = INFINITY;
  for (int i : {kLogRatioAbsMax, kNegativeRatioMax, kPositiveRatioMax, kFutureKlMax, kInfluenceMax, kInfluenceRawMax})
    metrics[i] = -INFINITY;
}

void merge(double* into, const double* from) {
  for (int i = 0; i < kFirstExtremum; ++i) into[i] += from[i];
  for (int i = kFirstExtremum; i < kNumMetrics; ++i) {
    const bool is_min = i == kPositiveRatioMin || i == kFutureKlMin || i == kInfluenceMin || i == kInfluenceRawMin;
    into[i] = is_min ? std::min(into[i], from[i]) : std::max(into[i], from[i]);
  }
}

// Integers: their sum does not depend on the order of the threads.
void add_counts(const Counts& counts, int64_t* histograms) {
  for (int sign = 0; sign < 2; ++sign) {
    int64_t* near = histograms + sign * kHistogramBins + kCentreBin - kNearBins;
    for (int copy = 0; copy < kNearCopies; ++copy)
      for (int bin = 0; bin <= 2 * kNearBins; ++bin) near[bin] += counts.near[sign][copy][bin];
  }
  for (int bin = 0; counts.uses_all && bin < 2 * kHistogramBins; ++bin) histograms[bin] += counts.all[bin];
}

void finish(double* metrics, const Constants& constants) {
  if (!constants.influence) return;
  // Raw extrema are those of S (exp is monotone); -inf and +inf still mean no data.
  if (metrics[kInfluenceRawMin] == INFINITY) return;
  for (int i : {kInfluenceRawMin, kInfluenceRawMax}) metrics[i] = exp(std::min(metrics[i], kMaxLogWeight));
}

}  // namespace
}  // namespace cpu

void loss_cpu(const Tokens& tokens, const Constants& constants, const Shard& shard, const LossOutput& out,
              int threads) {
  using namespace cpu;
  threads = useful_threads(tokens.num_tokens, threads);
  const LossJob job = {tokens, constants, shard, out, make_decay(constants.half_life)};
  clear(out.metrics);
  Plan plan = make_plan(tokens);
  const ScanJob first_reading = {tokens, constants.log_ratio_clamp, constants.log_dual_clip, job.decay, nullptr, true};
  summarize_tiles(first_reading, &plan.long_segments, threads);
  std::vector<Run> runs;
  for (LongSegment& segment : plan.long_segments) finalize_long_segment(job, &segment, &runs, out.metrics);
  runs.insert(runs.end(), plan.runs.begin(), plan.runs.end());

  const int64_t num_runs = runs.size();
  std::vector<RunResult> results(num_runs);
  memset(out.histograms, 0, 2 * kHistogramBins * sizeof(int64_t));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const std::unique_ptr<Counts> counts(new Counts);
    memset(counts->near, 0, sizeof counts->near);
    counts->uses_all = false;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < num_runs; ++i) {
      results[i].counts = counts.get();
      kernels().loss(job, runs[i], &results[i]);
    }
#pragma omp critical
    add_counts(*counts, out.histograms);
  }
  for (const RunResult& result : results) merge(out.metrics, result.metrics);
  finish(out.metrics, constants);
  *out.loss_sum = static_cast<float>(out.metrics[kLossSum]);
}

}  // namespace fipo
