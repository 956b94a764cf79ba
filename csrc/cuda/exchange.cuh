// Exchange between the warps that share a segment: one summary each, folded from right to left.
#pragma once

#include "segments.cuh"

namespace fipo {
namespace cuda {

// Of a range of tokens.
struct Summary {
  float first;           // S of its first token; with carry 0 unless stated otherwise
  int32_t loss_tokens;
  int32_t dual_clipped;
};

struct Exchanged {
  float carry;    // S of the token after this warp's range
  Summary whole;  // of all ranges together, with the incoming carry
};

// Double buffer: a block that is ahead writes one while the other is still being read.
template <class Shape>
struct ExchangeMemory {
  Summary warps[2][Shape::kWarps];
  Summary blocks[2][Shape::kBlocks];
};

// Combines the summaries of `count` equal ranges, given the carry after the last. *carry: carry into range `index`.
template <int count>
__device__ Summary fold(const Summary* stretches, float decay, float incoming, int index, float* carry) {
  Summary whole = {incoming, 0, 0};
#pragma unroll
  for (int i = count - 1; i >= 0; --i) {
    if (i == index) *carry = whole.first;
    whole.first = fmaf(decay, whole.first, stretches[i].first);
    whole.loss_tokens += stretches[i].loss_tokens;
    whole.dual_clipped += stretches[i].dual_clipped;
  }
  return whole;
}

template <class Shape>
class Exchange {
 public:
  __device__ Exchange(const Decay<Shape>& decay, const ThreadCoords<Shape>& coords, ExchangeMemory<Shape>* memory)
      : decay_(decay), coords_(coords), memory_(memory) {}

  // Called by all threads of the level; `rows` is the number of rows per warp.
  __device__ Exchanged all(Level level, const Summary& local, float incoming, int rows) {
    const float over_warp = decay_.warp[rows];
    if (level == Level::kWarp)
      return {incoming, {fmaf(over_warp, incoming, local.first), local.loss_tokens, local.dual_clipped}};

    turn_ ^= 1;
    Summary* const warps = memory_->warps[turn_];
    if (coords_.lane == 0) warps[coords_.warp] = local;
    __syncthreads();
    Exchanged result;
    if (level == Level::kBlock) {
      result.whole = fold<Shape::kWarps>(warps, over_warp, incoming, coords_.warp, &result.carry);
      return result;
    }

    Summary* const blocks = memory_->blocks[turn_];
    const Summary block = fold<Shape::kWarps>(warps, over_warp, 0.0f, coords_.warp, &result.carry);
    if (threadIdx.x < Shape::kBlocks) of_peer<Shape>(blocks, threadIdx.x)[coords_.block] = block;
    cluster_sync<Shape>();
    float behind_block = incoming;
    result.whole = fold<Shape::kBlocks>(blocks, decay_.block[rows], incoming, coords_.block, &behind_block);
    fold<Shape::kWarps>(warps, over_warp, behind_block, coords_.warp, &result.carry);
    return result;
  }

 private:
  const Decay<Shape>& decay_;
  const ThreadCoords<Shape>& coords_;
  ExchangeMemory<Shape>* const memory_;
  int turn_ = 0;
};

}  // namespace cuda
}  // namespace fipo
