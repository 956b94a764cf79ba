// Thread coordinates, and the few operations over a warp or a cluster.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include "shape.cuh"

namespace fipo {
namespace cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

template <class Shape>
struct ThreadCoords {
  int lane, warp;             // index within the warp, within the block
  int block;                  // index within the cluster
  int cluster, num_clusters;  // index within the grid

  __device__ ThreadCoords()
      : lane(threadIdx.x % kLanes),
        warp(threadIdx.x / kLanes),
        block(blockIdx.x % Shape::kBlocks),
        cluster(blockIdx.x / Shape::kBlocks),
        num_clusters(gridDim.x / Shape::kBlocks) {}
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ inline void sync_blocks() { cooperative_groups::this_cluster().sync(); }
template <class T>
__device__ inline T* in_block(T* shared, int block) {
  return cooperative_groups::this_cluster().map_shared_rank(shared, block);
}
#else  // never called: kIsCompiled
__device__ inline void sync_blocks() {}
template <class T>
__device__ inline T* in_block(T* shared, int) {
  return shared;
}
#endif

// Synchronizes all threads of the cluster, and makes their writes visible to each other.
template <class Shape>
__device__ inline void cluster_sync() {
  if constexpr (Shape::kBlocks > 1)
    sync_blocks();
  else
    __syncthreads();
}

// Address of another block's copy of `local` in the cluster.
template <class Shape, class T>
__device__ inline T* of_peer(T* local, int block) {
  if constexpr (Shape::kBlocks > 1)
    return in_block(local, block);
  else
    return local;
}

// Reduction over the warp in one fixed order; every lane gets the result.
template <class T, class Combine>
__device__ inline T warp_reduce(T value, Combine combine) {
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
    value = combine(value, __shfl_xor_sync(kAllLanes, value, distance));
  return value;
}

__device__ inline int warp_sum(int value) {
  return warp_reduce(value, [](int a, int b) { return a + b; });
}

}  // namespace cuda
}  // namespace fipo
