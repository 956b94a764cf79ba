#include "plan.h"

#include <math.h>

#include <algorithm>

namespace fipo {
namespace cpu {

namespace {

LongSegment cut(int64_t segment, int64_t begin, int64_t end) {
  LongSegment result = {segment, {}, {}};
  for (; end > begin; end -= kTileTokens)
    result.tiles.push_back({segment, std::max(begin, end - kTileTokens), end, 0.0f});
  result.summaries.resize(result.tiles.size());
  return result;
}

}  // namespace

PieceSummary LongSegment::link(double carry, double half_life) {
  PieceSummary whole = {carry, 0, 0};
  for (size_t i = 0; i < tiles.size(); ++i) {
    tiles[i].carry = whole.first;
    const double decay = exp2(-static_cast<double>(tiles[i].end - tiles[i].begin) / half_life);
    whole.first = summaries[i].first + decay * whole.first;
    whole.dual_clipped += summaries[i].dual_clipped;
    whole.loss_tokens += summaries[i].loss_tokens;
  }
  return whole;
}

Plan make_plan(const Tokens& tokens) {
  Plan plan;
  Run open = {};
  int64_t open_tokens = 0;
  const auto close = [&](int64_t next) {
    if (open.first < open.last) plan.runs.push_back(open);
    open.first = open.last = next;
    open_tokens = 0;
  };
  for (int64_t i = 0; i < tokens.num_segments; ++i) {
    const int64_t begin = tokens.offsets[i], end = tokens.offsets[i + 1];
    if (end - begin > kLongSegment) {
      close(i + 1);
      plan.long_segments.push_back(cut(i, begin, end));
      continue;
    }
    open.last = i + 1;
    open_tokens += end - begin;
    if (open_tokens >= kTokensPerRun || open.last - open.first >= kSegmentsPerRun) close(i + 1);
  }
  close(tokens.num_segments);
  return plan;
}

void summarize_tiles(const ScanJob& job, std::vector<LongSegment>* long_segments, int threads) {
  std::vector<std::pair<LongSegment*, size_t>> tiles;
  for (LongSegment& segment : *long_segments)
    for (size_t i = 0; i < segment.tiles.size(); ++i) tiles.emplace_back(&segment, i);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (size_t i = 0; i < tiles.size(); ++i) {
    LongSegment& segment = *tiles[i].first;
    segment.summaries[tiles[i].second] = kernels().scan(job, segment.tiles[tiles[i].second]);
  }
}

int useful_threads(int64_t num_tokens, int threads) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, num_tokens / kTokensPerRun)));
}

}  // namespace cpu
}  // namespace fipo
