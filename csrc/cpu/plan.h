// Partition of packed segments into work for threads. It depends only on the segments, not on the number of
// threads, and so do the results.
#pragma once

#include <vector>

#include "kernels.h"

namespace fipo {
namespace cpu {

constexpr int64_t kTokensPerRun = 4096;     // short segments are grouped up to this
constexpr int64_t kSegmentsPerRun = 1024;
constexpr int64_t kTileTokens = 16384;      // tile size of long segments, counted from the end
constexpr int64_t kLongSegment = 2 * kTileTokens;  // minimum size of segments that threads share

// A long segment's tiles, from last to first, with the results of a first pass.
struct LongSegment {
  int64_t segment;
  std::vector<Piece> tiles;
  std::vector<PieceSummary> summaries;  // of each tile separately: with carry 0

  // Sets the tiles' carries, given that of the segment; returns the summary of the whole segment.
  PieceSummary link(double carry, double half_life);
};

struct Plan {
  std::vector<Run> runs;  // of whole segments; none contains a long one
  std::vector<LongSegment> long_segments;
};

Plan make_plan(const Tokens& tokens);

// Computes the summaries of all tiles of the plan.
void summarize_tiles(const ScanJob& job, std::vector<LongSegment>* long_segments, int threads);

// Number of threads that is worthwhile for this many tokens.
int useful_threads(int64_t num_tokens, int threads);

}  // namespace cpu
}  // namespace fipo
