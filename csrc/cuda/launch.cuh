// Number of clusters of a kernel, and its launch. Host code.
#pragma once

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "segments.cuh"

namespace fipo {
namespace cuda {

constexpr int64_t kMaxBlocks = 2048;  // more than any GPU runs concurrently

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// One cluster for what fits in its registers, which needs no preparation and no waiting; otherwise shares
// small enough to spread over the GPU, up to the number of concurrent clusters.
template <class Shape>
int64_t wanted_clusters(int64_t num_tokens, int64_t num_segments) {
  const int64_t weight = num_tokens + kSegmentWeight * num_segments;
  if (weight <= Shape::kClusterTokens) return 1;
  constexpr int64_t share = Shape::kClusterTokens / 4;
  return std::min((weight + share - 1) / share, std::max<int64_t>(kMaxBlocks / Shape::kBlocks, 1));
}

// At least as many as a launch of any shape has.
inline int64_t most_blocks(int64_t num_tokens, int64_t num_segments) {
  return std::max(wanted_clusters<ClusterShape>(num_tokens, num_segments) * ClusterShape::kBlocks,
                  wanted_clusters<BlockShape>(num_tokens, num_segments) * BlockShape::kBlocks);
}

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

// Whether a cluster of blocks or one block works on each segment. A single cluster takes what fits in one go.
inline bool takes_clusters(const Tokens& tokens) {
  if (tokens.num_segments >= kManySegments && total_weight(tokens) > ClusterShape::kClusterTokens) return false;
  int major = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, current_device()), "cudaDeviceGetAttribute");
  return major >= 9;
}

template <class Work>
using Kernel = void (*)(const Work);

// Contains the launch's attribute, so it must not move.
template <class Shape>
struct LaunchConfig {
  cudaLaunchAttribute cluster = {};
  cudaLaunchConfig_t config = {};

  LaunchConfig(int64_t clusters, cudaStream_t stream) {
    config.gridDim = dim3(static_cast<unsigned>(clusters * Shape::kBlocks));
    config.blockDim = dim3(Shape::kThreads);
    config.stream = stream;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = Shape::kBlocks;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = Shape::kBlocks > 1 ? 1 : 0;
  }
  LaunchConfig(const LaunchConfig&) = delete;
};

// Number of clusters that the current device runs concurrently.
template <class Shape, class Work>
int64_t ask_resident_clusters(Kernel<Work> kernel, int device) {
  int count = 0;
  if (Shape::kBlocks > 1) {
    const LaunchConfig<Shape> launch(1, nullptr);
    check(cudaOccupancyMaxActiveClusters(&count, kernel, &launch.config), "cudaOccupancyMaxActiveClusters");
  } else {
    int processors = 0;
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, Shape::kThreads, 0),
          "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    count *= processors;
  }
  return std::max(count, 1);
}

// The same, cached per kernel (one per Shape and Work) and device.
template <class Shape, class Work>
int64_t resident_clusters(Kernel<Work> kernel) {
  constexpr int kDevices = 64;
  static std::atomic<int64_t> known[kDevices];
  const int device = current_device();
  if (device >= kDevices) return ask_resident_clusters<Shape>(kernel, device);
  int64_t count = known[device].load(std::memory_order_relaxed);
  if (count == 0) known[device].store(count = ask_resident_clusters<Shape>(kernel, device), std::memory_order_relaxed);
  return count;
}

template <class Shape, class Work>
int64_t num_clusters(Kernel<Work> kernel, const Tokens& tokens) {
  const int64_t wanted = wanted_clusters<Shape>(tokens.num_tokens, tokens.num_segments);
  return wanted == 1 ? 1 : std::min(wanted, resident_clusters<Shape>(kernel));
}

template <class Shape, class Work>
void launch(Kernel<Work> kernel, const Work& work, int64_t clusters, cudaStream_t stream) {
  const LaunchConfig<Shape> launch(clusters, stream);
  check(cudaLaunchKernelEx(&launch.config, kernel, work), "cudaLaunchKernelEx");
}

// Whether every pointer (null counts) is aligned to a quad of its elements.
template <class... T>
bool aligned_to_quads(const T*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % (kQuad * sizeof(T)) == 0) && ...);
}

inline bool inputs_aligned(const Tokens& tokens) {
  const auto aligned = [&](const void* pointer) {
    return tokens.dtype == Float::kBFloat16 ? aligned_to_quads(static_cast<const uint16_t*>(pointer))
                                            : aligned_to_quads(static_cast<const float*>(pointer));
  };
  return aligned(tokens.log_probs) && aligned(tokens.old_log_probs) && aligned_to_quads(tokens.mask);
}

}  // namespace cuda
}  // namespace fipo
