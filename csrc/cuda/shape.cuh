// How a kernel is cut: tokens to lanes, warps, blocks and clusters. The tests run the same kernels with tiny shapes.
#pragma once

#include <math.h>
#include <stdint.h>

#include "../fipo.h"

namespace fipo {
namespace cuda {

constexpr int kLanes = 32;
constexpr int kQuad = 4;                     // neighbouring tokens that one lane reads and writes at once
constexpr int kRowTokens = kLanes * kQuad;   // a warp's quads, side by side

// A warp keeps up to `rows` rows in registers, a cluster of `blocks` blocks of `warps` warps that many times more.
template <int warps, int rows, int blocks>
struct Shape {
  static constexpr int kWarps = warps, kRows = rows, kBlocks = blocks;
  static constexpr int kThreads = warps * kLanes;
  static constexpr int64_t kWarpTokens = rows * kRowTokens;
  static constexpr int64_t kBlockTokens = warps * kWarpTokens;
  static constexpr int64_t kClusterTokens = blocks * kBlockTokens;
};

using ClusterShape = Shape<8, 4, 8>;  // sm_90 and later
using BlockShape = Shape<8, 4, 1>;

// From so many segments on, one block each keeps a GPU busier than one cluster each: a block waits for no other, and
// about 264 of them are at work on an H100, but only 33 clusters. Reckoned from the latencies of a tile, which is what
// bounds both, not measured.
constexpr int64_t kManySegments = 64;

// Whether this pass of the compiler needs kernels of a shape.
template <class Shape>
constexpr bool kIsCompiled =
#ifdef __CUDA_ARCH__
    Shape::kBlocks == 1 || __CUDA_ARCH__ >= 900;
#else
    true;
#endif

// Powers of gamma, each rounded once from float64. Stretches are `rows` rows a warp, 1 .. kRows.
template <class Shape>
struct Decay {
  float token;
  float quads[5];            // gamma^(kQuad 2^i)
  float behind[kLanes];      // over the quads behind a lane's own, up to the end of its row
  float row;
  float warp[Shape::kRows + 1];   // over a warp's stretch, by rows
  float block[Shape::kRows + 1];  // over a block's
};

template <class Shape>
Decay<Shape> make_decay(double half_life) {
  const auto power = [half_life](int64_t tokens) {
    return static_cast<float>(exp2(-static_cast<double>(tokens) / half_life));
  };
  Decay<Shape> decay;
  decay.token = power(1);
  for (int i = 0; i < 5; ++i) decay.quads[i] = power(kQuad << i);
  for (int lane = 0; lane < kLanes; ++lane) decay.behind[lane] = power(kQuad * (kLanes - 1 - lane));
  decay.row = power(kRowTokens);
  for (int rows = 0; rows <= Shape::kRows; ++rows) {
    decay.warp[rows] = power(rows * kRowTokens);
    decay.block[rows] = power(Shape::kWarps * rows * kRowTokens);
  }
  return decay;
}

}  // namespace cuda
}  // namespace fipo
