// As much of CUDA as csrc/cuda uses, on the CPU: a block is one thread of the host, its threads take turns on it and
// change over where they wait for each other. Clusters run one after the other. For tests only, and slow.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local
#define __grid_constant__
#define __launch_bounds__(...)
#define __noinline__

namespace emulation {

struct Index {
  unsigned x;
};

class Block;

struct Thread {
  Index index;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool is_done = false;
  Block* block = nullptr;
};

struct Meeting {
  int size = 0, arrived = 0;
  unsigned long times = 0;
};

// What the blocks of a cluster share.
struct Cluster {
  explicit Cluster(int blocks) : barrier(blocks), anchors(blocks) {}
  std::barrier<> barrier;
  std::vector<char*> anchors;  // an address in each block's shared memory
};

inline thread_local Thread* current = nullptr;
inline thread_local char anchor;

class Block {
 public:
  Block(Cluster& cluster, int rank, unsigned index, unsigned grid, int threads, std::function<void()> body)
      : cluster(cluster), rank(rank), index{index}, grid{grid}, body_(std::move(body)), threads_(threads),
        warps_((threads + 31) / 32), slots(threads), all_{threads} {
    for (Meeting& warp : warps_) warp.size = 32;
    cluster.anchors[rank] = &anchor;
  }

  void run() {
    constexpr size_t kStack = 128 * 1024;
    for (size_t i = 0; i < threads_.size(); ++i) {
      Thread& thread = threads_[i];
      thread.index.x = static_cast<unsigned>(i);
      thread.block = this;
      thread.stack.reset(new char[kStack]);
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.get();
      thread.context.uc_stack.ss_size = kStack;
      thread.context.uc_link = nullptr;
      makecontext(&thread.context, reinterpret_cast<void (*)()>(&Block::enter), 0);
    }
    current = &threads_[0];
    swapcontext(&home_, &current->context);
    current = nullptr;
  }

  void meet(Meeting& meeting) {
    const unsigned long now = meeting.times;
    if (++meeting.arrived == meeting.size) {
      meeting.arrived = 0;
      ++meeting.times;
      idle_turns_ = 0;
      return;
    }
    while (meeting.times == now) change_over();
  }
  void meet_all() { meet(all_); }
  void meet_warp() { meet(warps_[current->index.x / 32]); }
  void meet_cluster() {
    meet_all();
    if (current->index.x == 0) cluster.barrier.arrive_and_wait();
    meet_all();
  }

  Cluster& cluster;
  const int rank;
  const Index index, grid;

 private:
  static void enter() {
    Block& block = *current->block;
    block.body_();
    current->is_done = true;
    ++block.num_done_;
    block.idle_turns_ = 0;
    if (block.num_done_ == block.threads_.size()) setcontext(&block.home_);
    block.change_over();
  }

  void change_over() {
    if (++idle_turns_ > 4 * threads_.size()) {
      fprintf(stderr, "emulation: threads of a block wait for each other in different places\n");
      abort();
    }
    Thread* const from = current;
    size_t next = from->index.x;
    do next = (next + 1) % threads_.size();
    while (threads_[next].is_done);
    current = &threads_[next];
    if (current != from) swapcontext(&from->context, &current->context);
  }

  const std::function<void()> body_;
  std::vector<Thread> threads_;
  std::vector<Meeting> warps_;

 public:
  std::vector<uint64_t> slots;  // what each thread shows to its warp

 private:
  Meeting all_;
  ucontext_t home_;
  size_t num_done_ = 0, idle_turns_ = 0;
};

inline int lane() { return current->index.x % 32; }

// The value of another lane of the warp; one's own where there is no such lane.
template <class T>
T from_lane(T value, int other) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Block& block = *current->block;
  const int first = current->index.x / 32 * 32;
  memcpy(&block.slots[current->index.x], &value, sizeof value);
  block.meet_warp();
  if (other >= 0 && other < 32) memcpy(&value, &block.slots[first + other], sizeof value);
  block.meet_warp();
  return value;
}

inline unsigned ballot(bool condition) {
  Block& block = *current->block;
  const int first = current->index.x / 32 * 32;
  block.slots[current->index.x] = condition;
  block.meet_warp();
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<unsigned>(block.slots[first + i] != 0) << i;
  block.meet_warp();
  return bits;
}

template <class Kernel>
void run_grid(unsigned grid, unsigned blocks, unsigned threads, Kernel kernel) {
  Cluster cluster(static_cast<int>(blocks));
  std::vector<std::thread> hosts;
  for (unsigned rank = 0; rank < blocks; ++rank)
    hosts.emplace_back([&, rank] {
      // The same host thread for every cluster: a block finds shared memory as the one before left it.
      for (unsigned first = 0; first < grid; first += blocks) {
        Block block(cluster, static_cast<int>(rank), first + rank, grid, static_cast<int>(threads), kernel);
        cluster.barrier.arrive_and_wait();
        block.run();
        cluster.barrier.arrive_and_wait();
      }
    });
  for (std::thread& host : hosts) host.join();
}

inline int num_launches = 0;

}  // namespace emulation

// ---- device side ----

// Objects whose x is looked up where it is used.
inline const struct {
  struct {
    operator unsigned() const { return emulation::current->index.x; }
  } x;
} threadIdx;
inline const struct {
  struct {
    operator unsigned() const { return emulation::current->block->index.x; }
  } x;
} blockIdx;
inline const struct {
  struct {
    operator unsigned() const { return emulation::current->block->grid.x; }
  } x;
} gridDim;

inline void __syncthreads() { emulation::current->block->meet_all(); }
inline void __syncwarp() { emulation::current->block->meet_warp(); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulation::from_lane(value, lane);
}
template <class T>
T __shfl_down_sync(unsigned, T value, int by) {
  return emulation::from_lane(value, emulation::lane() + by);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int by) {
  return emulation::from_lane(value, emulation::lane() ^ by);
}
inline unsigned __ballot_sync(unsigned, bool condition) { return emulation::ballot(condition); }
inline bool __any_sync(unsigned, bool condition) { return emulation::ballot(condition) != 0; }
inline int __syncthreads_or(int condition) {
  static thread_local int any;
  any = 0;
  __syncthreads();
  if (condition) any = 1;
  __syncthreads();
  const int result = any;
  __syncthreads();
  return result;
}

template <class T>
T atomicAdd(T* to, T value) {
  return __atomic_fetch_add(to, value, __ATOMIC_SEQ_CST);
}
template <class T>
T __ldcg(const T* from) {
  return *from;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
using std::max;
using std::min;

// ---- host side ----

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrMultiProcessorCount };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };

struct dim3 {
  unsigned x = 1;
  dim3() = default;
  explicit dim3(unsigned x) : x(x) {}
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t) { return "error"; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 3;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel, const cudaLaunchConfig_t*) {
  *clusters = 3;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  memset(to, value, bytes);
  return cudaSuccess;
}
template <class Work>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(const Work), const Work& work) {
  const unsigned blocks = config->numAttrs ? config->attrs[0].val.clusterDim.x : 1;
  ++emulation::num_launches;
  emulation::run_grid(config->gridDim.x, blocks, config->blockDim.x, [kernel, &work] { kernel(work); });
  return cudaSuccess;
}
