// The walk through one segment that the scan and the loss have in common.
#pragma once

#include "tile.cuh"

namespace fipo {
namespace cuda {

struct SegmentCounts {
  int loss_tokens = 0, dual_clipped = 0;

  __device__ void add(const Summary& tile) {
    loss_tokens += tile.loss_tokens;
    dual_clipped += tile.dual_clipped;
  }
};

template <class Shape>
struct Inputs {
  Tokens tokens;
  Constants constants;
  Decay<Shape> decay;
  const float* carry_in;  // [S] optional
  bool aligned;           // all pointers in use are, to a quad
};

// A Task says what is done with S:
//   counts()          whether it reads SegmentCounts
//   kCountsFirst      whether `settle` comes before the tokens or after them
//   settle(segment, counts, is_leader)     by all threads that work at the segment; one of them is the leader
//   row(window, row, segment)              by each warp, for its rows
//   end_tile()
template <class Shape, class Task>
class Worker {
 public:
  __device__ Worker(const Inputs<Shape>& inputs, const Place<Shape>& place, ExchangeMemory<Shape>* memory, Task* task)
      : inputs_(inputs),
        place_(place),
        exchange_(inputs.decay, place, memory),
        task_(*task),
        behind_lane_(inputs.decay.behind[place.lane]) {}

  // From the last tile to the first. Only a cluster's segments have more than one. There, a task that has to know the
  // counts before it can write gets them from a first reading, which leaves the segment in the L2 cache.
  __device__ void segment(Level level, int index) {
    const int64_t begin = inputs_.tokens.offsets[index], end = inputs_.tokens.offsets[index + 1];
    const int span = static_cast<int>(end - aligned_down(begin));
    const int num_tiles = level == Level::kCluster ? (span - 1) / static_cast<int>(Shape::kClusterTokens) + 1 : 1;
    const int rows = num_tiles > 1 ? Shape::kRows : rows_for(level, span);
    advantage_ = inputs_.tokens.advantages && !inputs_.tokens.advantages_per_token ? inputs_.tokens.advantages[index] : 0.0f;
    carry_in_ = inputs_.carry_in && inputs_.constants.influence ? inputs_.carry_in[index] : 0.0f;

    SegmentCounts counts;
    const bool counts_alone = Task::kCountsFirst && num_tiles > 1;
#pragma unroll 1
    for (int pass = counts_alone ? 0 : 1; pass < 2; ++pass) {
      // The carry is a term of the last tile, unless the segment ends where the tile does.
      const int64_t last_tile_end = aligned_down(begin) + static_cast<int64_t>(num_tiles) * tile_tokens(level, rows);
      float carry = end == last_tile_end ? carry_in_ : 0.0f;
#pragma unroll 1
      for (int i = num_tiles - 1; i >= 0; --i) {
        Tile<Shape> tile;
        tile.load(inputs_.tokens, inputs_.constants, window(level, begin, end, i, rows), carry_in_);
        Summary mine = counts_of(tile);
        mine.first = tile.scan(inputs_.decay, place_.lane);
        const Exchanged exchanged = exchange_.all(level, mine, carry, rows);
        carry = exchanged.whole.first;
        if (pass == 0 || !counts_alone) counts.add(exchanged.whole);
        if (pass == 0) continue;
        if (Task::kCountsFirst && i == num_tiles - 1) task_.settle(index, counts, is_leader(level));
        tile.for_each_row(inputs_.decay, place_.lane, behind_lane_, exchanged.carry,
                          [&](const Row& row) { task_.row(tile.window, row, index); });
        task_.end_tile();
      }
    }
    if (!Task::kCountsFirst) task_.settle(index, counts, is_leader(level));
  }

 private:
  __device__ static int num_warps(Level level) {
    return level == Level::kWarp ? 1 : level == Level::kBlock ? Shape::kWarps : Shape::kWarps * Shape::kBlocks;
  }
  __device__ static int tile_tokens(Level level, int rows) {
    return rows * kRowTokens * num_warps(level);
  }
  // The fewest rows a warp that hold the span, so that all warps have work; at least one, for the carry's term.
  __device__ static int rows_for(Level level, int span) {
    const int rows = (span + tile_tokens(level, 1) - 1) / tile_tokens(level, 1);
    return rows > 1 ? rows : 1;
  }
  __device__ bool is_leader(Level level) const {
    return place_.lane == 0 && (level == Level::kWarp || place_.warp == 0) &&
           (level != Level::kCluster || place_.block == 0);
  }

  __device__ Window window(Level level, int64_t begin, int64_t end, int tile, int rows) const {
    const int warp = level == Level::kWarp    ? 0
                     : level == Level::kBlock ? place_.warp
                                              : place_.block * Shape::kWarps + place_.warp;
    const int64_t position = aligned_down(begin) + static_cast<int64_t>(tile) * tile_tokens(level, rows) +
                             warp * rows * kRowTokens + place_.lane * kQuad;
    // Only the quad at the very end of the tokens may be a part of one, and only a segment's last quad can be that.
    const bool vectors = inputs_.aligned && (end + kQuad - 1) / kQuad * kQuad <= inputs_.tokens.num_tokens;
    return {position, within_reach(begin - position), within_reach(end - position), rows, vectors};
  }

  __device__ static int within_reach(int64_t distance) {
    constexpr int64_t beyond = Shape::kWarpTokens + kRowTokens;
    return static_cast<int>(distance < -1 ? -1 : distance > beyond ? beyond : distance);
  }

  __device__ Summary counts_of(const Tile<Shape>& tile) const {
    if (!task_.counts()) return {0.0f, 0, 0};
    const int loss_tokens = warp_sum(__popc(tile.mask));
    // Extreme tokens are rare; where a warp has none, there is nothing to add up.
    const uint32_t dual_clipped = tile.dual_clipped(inputs_.tokens, advantage_);
    return {0.0f, loss_tokens, __any_sync(kAllLanes, dual_clipped != 0) ? warp_sum(__popc(dual_clipped)) : 0};
  }

  const Inputs<Shape>& inputs_;
  const Place<Shape>& place_;
  Exchange<Shape> exchange_;
  Task& task_;
  const float behind_lane_;
  float advantage_, carry_in_;  // of the segment
};

}  // namespace cuda
}  // namespace fipo
