// Which segments a cluster works at, and which of its threads do. Nothing about the segments is known on the host, so
// each cluster finds its own on the device; the outcome depends on the offsets and the grid only, never on timing.
#pragma once

#include "place.cuh"

namespace fipo {
namespace cuda {

// Who works at a segment: the fewest threads that hold it in registers; a cluster walks longer ones.
enum class Level { kWarp, kBlock, kCluster };

struct Range {
  int first, last;  // segments; of them, as of tokens, there are fewer than 2^31: the caller checks that
};

constexpr int64_t kSegmentWeight = 128;  // tokens whose work is about that of starting a segment

__host__ __device__ inline int64_t total_weight(const Tokens& tokens) {
  return tokens.num_tokens + kSegmentWeight * tokens.num_segments;
}

// The first segment that begins at or behind `target`, in weight. By the whole warp, 33 times fewer candidates a round.
__device__ inline int first_segment_from(const Tokens& tokens, int64_t target, int lane) {
  int low = 0, high = static_cast<int>(tokens.num_segments);
  while (low < high) {
    const int step = (high - low + kLanes - 1) / kLanes;
    const int probe = low + lane * step;
    const bool before = probe < high && tokens.offsets[probe] + kSegmentWeight * probe < target;
    const int num_before = __popc(__ballot_sync(kAllLanes, before));  // the candidates ascend: these are the first ones
    if (num_before == 0) return low;
    high = min(high, low + num_before * step);
    low += (num_before - 1) * step + 1;
  }
  return low;
}

// The segments that begin within the cluster's equal share of the weight.
template <class Shape>
__device__ Range share_of_cluster(const Tokens& tokens, const Place<Shape>& place) {
  if (place.num_clusters == 1) return {0, static_cast<int>(tokens.num_segments)};
  const int64_t total = total_weight(tokens);
  const int64_t begin = total * place.cluster / place.num_clusters;
  const int64_t end = total * (place.cluster + 1) / place.num_clusters;
  return {first_segment_from(tokens, begin, place.lane), first_segment_from(tokens, end, place.lane)};
}

// Reads are aligned: a segment's first quad may begin up to three tokens before it.
__host__ __device__ inline int64_t aligned_down(int64_t token) { return token & ~static_cast<int64_t>(kQuad - 1); }

template <class Shape>
__device__ Level level_of(const Tokens& tokens, int segment) {
  const int64_t span = tokens.offsets[segment + 1] - aligned_down(tokens.offsets[segment]);
  return span <= Shape::kWarpTokens ? Level::kWarp : span <= Shape::kBlockTokens ? Level::kBlock : Level::kCluster;
}

// Which levels the range has, looked up by all threads of the block at once: most ranges hold one or two of the three.
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

// How the segments of a level are dealt out: candidates are every `stride`-th from `first` on; of those that are of the
// level, this thread works at every `turns`-th, from `turn` on.
struct Deal {
  int first;
  int stride;
  int turns, turn;
};

template <class Shape>
__device__ Deal deal(Level level, Range share, const Place<Shape>& place) {
  if (level == Level::kCluster) return {share.first, 1, 1, 0};
  if (level == Level::kBlock) return {share.first, 1, Shape::kBlocks, place.block};
  return {share.first + place.block * Shape::kWarps + place.warp, Shape::kBlocks * Shape::kWarps, 1, 0};
}

// Calls visit(level, segment) for every segment of the cluster's share, by all threads that work at it: long segments
// by the cluster, one after the other; then those of a block's size, dealt out to the blocks; then the rest, to the
// warps. Whole warps look for their segments together.
template <class Shape, class Visit>
__device__ void for_each_segment(const Tokens& tokens, const Place<Shape>& place, Visit visit) {
  const Range share = share_of_cluster(tokens, place);
  bool any_block, any_cluster;
  levels_in<Shape>(tokens, share, &any_block, &any_cluster);
#pragma unroll 1
  for (int i = 0; i < 3; ++i) {
    const Level level = i == 0 ? Level::kCluster : i == 1 ? Level::kBlock : Level::kWarp;
    if ((level == Level::kCluster && !any_cluster) || (level == Level::kBlock && !any_block)) continue;
    Deal mine = deal(level, share, place);
    for (int base = mine.first; base < share.last; base += kLanes * mine.stride) {
      const int candidate = base + place.lane * mine.stride;
      const bool matches = candidate < share.last && level_of<Shape>(tokens, candidate) == level;
      for (unsigned left = __ballot_sync(kAllLanes, matches); left; left &= left - 1) {
        if (mine.turn == 0) visit(level, base + (__ffs(left) - 1) * mine.stride);
        mine.turn = mine.turn == 0 ? mine.turns - 1 : mine.turn - 1;
      }
    }
  }
}

}  // namespace cuda
}  // namespace fipo
