#include "plan.h"

namespace fipo {
namespace cpu {
namespace {

void put_summary(const ScanOutput& out, int64_t segment, const PieceSummary& summary) {
  if (out.carry_out) out.carry_out[segment] = static_cast<float>(summary.first);
  if (out.dual_clipped) out.dual_clipped[segment] = summary.dual_clipped;
  if (out.loss_tokens) out.loss_tokens[segment] = summary.loss_tokens;
}

void scan_segments(const ScanJob& job, const Run& run, const float* carry_in, const ScanOutput& out) {
  const int64_t* offsets = job.tokens.offsets;
  for (int64_t i = run.first; i < run.last; ++i) {
    const Piece piece = {i, offsets[i], offsets[i + 1], carry_in ? carry_in[i] : 0.0f};
    put_summary(out, i, kernels().scan(job, piece));
  }
}

}  // namespace
}  // namespace cpu

void scan_cpu(const Tokens& tokens, const Constants& constants, const float* carry_in, const ScanOutput& out,
              int threads) {
  using namespace cpu;
  threads = useful_threads(tokens.num_tokens, threads);
  const bool count = out.dual_clipped || out.loss_tokens;
  ScanJob job = {tokens,       constants.log_ratio_clamp, constants.log_dual_clip, make_decay(constants.half_life),
                 nullptr, count};
  Plan plan = make_plan(tokens);
  summarize_tiles(job, &plan.long_segments, threads);
  std::vector<Piece> tiles;
  for (LongSegment& segment : plan.long_segments) {
    const float carry = carry_in ? carry_in[segment.segment] : 0.0f;
    put_summary(out, segment.segment, segment.link(carry, constants.half_life));
    if (out.future_kl) tiles.insert(tiles.end(), segment.tiles.begin(), segment.tiles.end());
  }
  job.future_kl = out.future_kl;
  const int64_t num_runs = plan.runs.size(), num_tiles = tiles.size();
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < num_runs + num_tiles; ++i) {
    if (i < num_tiles)
      kernels().scan(job, tiles[i]);
    else
      scan_segments(job, plan.runs[i - num_tiles], carry_in, out);
  }
}

}  // namespace fipo
