// Partition of a kernel: tokens to lanes, warps, blocks and clusters. The tests run the same kernels with tiny shapes.
#pragma once

#include <math.h>
#include <stdint.h>

#include "../fipo.h"

namespace fipo {
namespace cuda {

constexpr int kLanes = 32;
constexpr int kQuad = 4;                     // consecutive tokens that one lane reads and writes at once
constexpr int kRowTokens = kLanes * kQuad;   // a warp's adjacent quads

// A warp keeps up to `rows` rows in registers; a cluster has `blocks` blocks of `warps` warps.
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

// From this many segments on, one block each uses the GPU better than one cluster each: a block does not wait for
// others, and about 264 of them run on an H100, but only 33 clusters. Estimated from the latencies of a tile, which
// bound both; not measured.
constexpr int64_t kManySegments = 64;

// Whether this compiler pass needs kernels of a shape.
template <class Shape>
constexpr bool kIsCompiled =
#ifdef __CUDA_ARCH__
    Shape::kBlocks == 1 || __CUDA_ARCH__ >= 900;
#else
    true;
#endif

// Powers of gamma, each rounded once from float64. Ranges are `rows` rows per warp, 1 .. kRows.
template <class Shape>
struct Decay {
  float token;
  float quads[5];            // gamma^(kQuad 2^i)
  float behind[kLanes];      // over the quads after a lane's own, up to the end of its row
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
