// Assignment of segments to clusters and their threads. The host knows nothing about the segments, so
// each cluster finds its own on the device; the result depends only on offsets and grid, never on timing.
#pragma once

#include "thread_coords.cuh"

namespace fipo {
namespace cuda {

// Threads that work on a segment: the fewest whose registers hold it; a cluster iterates over longer ones.
enum class Level { kWarp, kBlock, kCluster };

struct Range {
  int first, last;  // segments; like tokens, fewer than 2^31: checked by the caller
};

constexpr int64_t kSegmentWeight = 128;  // cost of starting a segment, in tokens

__host__ __device__ inline int64_t total_weight(const Tokens& tokens) {
  return tokens.num_tokens + kSegmentWeight * tokens.num_segments;
}

// First segment that begins at or after `target`, in weight. By the whole warp, 33 times fewer candidates a round.
__device__ inline int first_segment_from(const Tokens& tokens, int64_t target, int lane) {
  int low = 0, high = static_cast<int>(tokens.num_segments);
  while (low < high) {
    const int step = (high - low + kLanes - 1) / kLanes;
    const int probe = low + lane * step;
    const bool before = probe < high && tokens.offsets[probe] + kSegmentWeight * probe < target;
    const int num_before = __popc(__ballot_sync(kAllLanes, before));  // ascending: these are the first ones
    if (num_before == 0) return low;
    high = min(high, low + num_before * step);
    low += (num_before - 1) * step + 1;
  }
  return low;
}

// The segments that begin within the cluster's equal share of the weight.
template <class Shape>
__device__ Range share_of_cluster(const Tokens& tokens, const ThreadCoords<Shape>& coords) {
  if (coords.num_clusters == 1) return {0, static_cast<int>(tokens.num_segments)};
  const int64_t total = total_weight(tokens);
  const int64_t begin = total * coords.cluster / coords.num_clusters;
  const int64_t end = total * (coords.cluster + 1) / coords.num_clusters;
  return {first_segment_from(tokens, begin, coords.lane), first_segment_from(tokens, end, coords.lane)};
}

// Reads are aligned: a segment's first quad may begin up to three tokens before it.
__host__ __device__ inline int64_t aligned_down(int64_t token) { return token & ~static_cast<int64_t>(kQuad - 1); }

template <class Shape>
__device__ Level level_of(const Tokens& tokens, int segment) {
  const int64_t span = tokens.offsets[segment + 1] - aligned_down(tokens.offsets[segment]);
  return span <= Shape::kWarpTokens ? Level::kWarp : span <= Shape::kBlockTokens ? Level::kBlock : Level::kCluster;
}

// Levels that occur in the range, found by all threads of the block: most ranges contain one or two of three.
template <class Shape>
__device__ void levels_in(const Tokens& tokens, Range range, bool* any_block, bool* any_cluster) {
  bool block = false, cluster = false;
  for (int segment = range.first + threadIdx.x; segment < range.last; segment += Shape::kThreads) {
    const Level level = level_of<Shape>(tokens, segment);
    block |= level == Level::kBlock;
    cluster |= level == Level::kCluster;
  }
  *any_block = __syncthreads_or(block);
  *any_cluster = __syncthreads_or(cluster);
}

// Assignment of a level's segments: candidates are every `stride`-th from `first`; of those of the
// level, this thread works on every `turns`-th, from `turn`.
struct Deal {
  int first;
  int stride;
  int turns, turn;
};

template <class Shape>
__device__ Deal deal(Level level, Range share, const ThreadCoords<Shape>& coords) {
  if (level == Level::kCluster) return {share.first, 1, 1, 0};
  if (level == Level::kBlock) return {share.first, 1, Shape::kBlocks, coords.block};
  return {share.first + coords.block * Shape::kWarps + coords.warp, Shape::kBlocks * Shape::kWarps, 1, 0};
}

// Calls visit(level, segment) for every segment of the cluster's share, in all threads that work on it: long segments
// by the cluster, one by one; then block-sized ones, distributed over the blocks; then the rest, over the
// warps. Whole warps search for their segments together.
template <class Shape, class Visit>
__device__ void for_each_segment(const Tokens& tokens, const ThreadCoords<Shape>& coords, Visit visit) {
  const Range share = share_of_cluster(tokens, coords);
  bool any_block, any_cluster;
  levels_in<Shape>(tokens, share, &any_block, &any_cluster);
#pragma unroll 1
  for (int i = 0; i < 3; ++i) {
    const Level level = i == 0 ? Level::kCluster : i == 1 ? Level::kBlock : Level::kWarp;
    if ((level == Level::kCluster && !any_cluster) || (level == Level::kBlock && !any_block)) continue;
    Deal dealt = deal(level, share, coords);
    for (int base = dealt.first; base < share.last; base += kLanes * dealt.stride) {
      const int candidate = base + coords.lane * dealt.stride;
      const bool matches = candidate < share.last && level_of<Shape>(tokens, candidate) == level;
      for (unsigned left = __ballot_sync(kAllLanes, matches); left; left &= left - 1) {
        if (dealt.turn == 0) visit(level, base + (__ffs(left) - 1) * dealt.stride);
        dealt.turn = dealt.turn == 0 ? dealt.turns - 1 : dealt.turn - 1;
      }
    }
  }
}

}  // namespace cuda
}  // namespace fipo
