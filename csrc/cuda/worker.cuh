// Iteration over one segment, common to the scan and the loss.
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
  bool aligned;           // all pointers in use are aligned to a quad
};

// A Task defines what is done with S:
//   counts()          whether it reads SegmentCounts
//   kCountsFirst      whether `finalize_segment` is called before the tokens or after them
//   finalize_segment(segment, counts, is_leader)     by all threads that work on the segment; one of them is the leader
//   row(window, row, segment)              by each warp, for its rows
//   end_tile()
template <class Shape, class Task>
class Worker {
 public:
  __device__ Worker(const Inputs<Shape>& inputs, const ThreadCoords<Shape>& coords, ExchangeMemory<Shape>* memory,
                    Task* task)
      : inputs_(inputs),
        coords_(coords),
        exchange_(inputs.decay, coords, memory),
        task_(*task),
        behind_lane_(inputs.decay.behind[coords.lane]) {}

  // Only a cluster's segments have several tiles. There, a task that needs the counts before it can write
  // gets them from a first pass, which leaves the segment in the L2 cache.
  __device__ void segment(Level level, int index) {
    const Tokens& tokens = inputs_.tokens;
    const int64_t begin = tokens.offsets[index], end = tokens.offsets[index + 1];
    const int span = static_cast<int>(end - aligned_down(begin));
    const int num_tiles = level == Level::kCluster ? (span - 1) / static_cast<int>(Shape::kClusterTokens) + 1 : 1;
    const int rows = num_tiles > 1 ? Shape::kRows : rows_for(level, span);
    const Stretch stretch = {level, index, begin, end, num_tiles, rows};
    advantage_ = tokens.advantages && !tokens.advantages_per_token ? tokens.advantages[index] : 0.0f;
    carry_in_ = inputs_.carry_in && inputs_.constants.influence ? inputs_.carry_in[index] : 0.0f;

    SegmentCounts counts;
    const bool counts_alone = Task::kCountsFirst && num_tiles > 1;
#pragma unroll 1  // a second copy of the walk would be too much code
    for (int pass = counts_alone ? 0 : 1; pass < 2; ++pass)
      walk(stretch, pass == 0 || !counts_alone, pass == 1, &counts);
    if (!Task::kCountsFirst) task_.finalize_segment(index, counts, is_leader(level));
  }

 private:
  // A segment and its partition: `num_tiles` tiles, in each of which a warp has `rows` rows.
  struct Stretch {
    Level level;
    int index;
    int64_t begin, end;
    int num_tiles, rows;
  };

  // From the last tile to the first.
  __device__ void walk(const Stretch& segment, bool counts_it, bool writes, SegmentCounts* counts) {
    // The carry is a term of the last tile, unless the segment ends with the tile.
    float carry = segment.end == first_position(segment, segment.num_tiles) ? carry_in_ : 0.0f;
#pragma unroll 1
    for (int i = segment.num_tiles - 1; i >= 0; --i) {
      Tile<Shape> tile;
      tile.load(inputs_.tokens, inputs_.constants, window(segment, i), carry_in_);
      Summary local = counts_of(tile);
      local.first = tile.scan(inputs_.decay, coords_.lane);
      const Exchanged exchanged = exchange_.all(segment.level, local, carry, segment.rows);
      carry = exchanged.whole.first;
      if (counts_it) counts->add(exchanged.whole);
      if (!writes) continue;
      if (Task::kCountsFirst && i == segment.num_tiles - 1)
        task_.finalize_segment(segment.index, *counts, is_leader(segment.level));
      tile.for_each_row(inputs_.decay, coords_.lane, behind_lane_, exchanged.carry,
                        [&](const Row& row) { task_.row(tile.window, row, segment.index); });
      task_.end_tile();
    }
  }

  __device__ static int num_warps(Level level) {
    return level == Level::kWarp ? 1 : level == Level::kBlock ? Shape::kWarps : Shape::kWarps * Shape::kBlocks;
  }
  __device__ static int tile_tokens(Level level, int rows) {
    return rows * kRowTokens * num_warps(level);
  }
  // The fewest rows per warp that hold the span, so that all warps have work; at least one, for the carry's term.
  __device__ static int rows_for(Level level, int span) {
    const int rows = (span + tile_tokens(level, 1) - 1) / tile_tokens(level, 1);
    return rows > 1 ? rows : 1;
  }
  __device__ bool is_leader(Level level) const {
    return coords_.lane == 0 && (level == Level::kWarp || coords_.warp == 0) &&
           (level != Level::kCluster || coords_.block == 0);
  }

  // Of a tile; that of the tile after the last one is where the last one ends.
  __device__ static int64_t first_position(const Stretch& segment, int tile) {
    return aligned_down(segment.begin) + static_cast<int64_t>(tile) * tile_tokens(segment.level, segment.rows);
  }

  __device__ Window window(const Stretch& segment, int tile) const {
    int warp = segment.level == Level::kWarp ? 0 : coords_.warp;
    if (segment.level == Level::kCluster) warp += coords_.block * Shape::kWarps;
    const int64_t position =
        first_position(segment, tile) + warp * segment.rows * kRowTokens + coords_.lane * kQuad;
    // Only the quad at the very end of the tokens may be incomplete, and only a segment's last quad can be that one.
    const bool vectors = inputs_.aligned && aligned_down(segment.end + kQuad - 1) <= inputs_.tokens.num_tokens;
    return {position, within_reach(segment.begin - position), within_reach(segment.end - position), segment.rows,
            vectors};
  }

  __device__ static int within_reach(int64_t distance) {
    constexpr int64_t beyond = Shape::kWarpTokens + kRowTokens;
    return static_cast<int>(distance < -1 ? -1 : distance > beyond ? beyond : distance);
  }

  __device__ Summary counts_of(const Tile<Shape>& tile) const {
    if (!task_.counts()) return {0.0f, 0, 0};
    const int loss_tokens = warp_sum(__popc(tile.mask));
    // Tokens above the dual clip are rare; without any in the warp, there is nothing to sum.
    const uint32_t dual_clipped = tile.dual_clipped(inputs_.tokens, advantage_);
    return {0.0f, loss_tokens, __any_sync(kAllLanes, dual_clipped != 0) ? warp_sum(__popc(dual_clipped)) : 0};
  }

  const Inputs<Shape>& inputs_;
  const ThreadCoords<Shape>& coords_;
  Exchange<Shape> exchange_;
  Task& task_;
  const float behind_lane_;
  float advantage_, carry_in_;  // of the segment
};

}  // namespace cuda
}  // namespace fipo
