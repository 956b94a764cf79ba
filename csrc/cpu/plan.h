// How packed segments are cut into work for threads. The cut depends on the segments alone, never on the number of
// threads, so neither do the results.
#pragma once

#include <vector>

#include "kernels.h"

namespace fipo {
namespace cpu {

constexpr int64_t kTokensPerRun = 4096;     // short segments are grouped up to this
constexpr int64_t kSegmentsPerRun = 1024;
constexpr int64_t kTileTokens = 16384;      // a long segment's tiles, counted from its end
constexpr int64_t kLongSegment = 2 * kTileTokens;  // from more tokens on, threads share a segment

// A long segment's tiles, from its last to its first, and what a first reading found out about them.
struct LongSegment {
  int64_t segment;
  std::vector<Piece> tiles;
  std::vector<PieceSummary> summaries;  // of each tile alone: with carry 0

  // Gives the tiles their carries, given that of the segment; returns the summary of the whole segment.
  PieceSummary link(double carry, double half_life);
};

struct Plan {
  std::vector<Run> runs;  // of whole segments; no run holds a long one
  std::vector<LongSegment> long_segments;
};

Plan make_plan(const Tokens& tokens);

// Fills the summaries of every tile of the plan.
void summarize_tiles(const ScanJob& job, std::vector<LongSegment>* long_segments, int threads);

// How many threads are worth starting for so many tokens.
int useful_threads(int64_t num_tokens, int threads);

}  // namespace cpu
}  // namespace fipo
