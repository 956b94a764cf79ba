// Fused loss: one launch, preceded by two fills if the tokens exceed one cluster.
#pragma once

#include "launch.cuh"
#include "metrics.cuh"
#include "token.cuh"
#include "worker.cuh"

namespace fipo {
namespace cuda {

// Followed by the blocks' metrics, [blocks][kNumMetrics] float64.
struct alignas(64) WorkspaceHead {
  uint32_t blocks_done;
};

template <class Shape>
struct LossWork {
  Inputs<Shape> inputs;
  Shard shard;
  LossOutput out;
  WorkspaceHead* head;
  double* of_blocks;
};

template <class Shape>
class LossTask {
 public:
  static constexpr bool kCountsFirst = true;  // the veto affects the gradient

  Metrics<Shape> metrics;

  __device__ LossTask(const LossWork<Shape>& work, MetricsMemory<Shape>* memory)
      : metrics(memory, work.out.histograms), work_(work) {}

  __device__ bool counts() const { return true; }

  __device__ void finalize_segment(int segment, const SegmentCounts& counts, bool is_leader) {
    const Shard& shard = work_.shard;
    const int64_t allowed = constants().max_dual_clipped;
    vetoed_ = shard.vetoed ? shard.vetoed[segment] != 0 : allowed >= 0 && counts.dual_clipped > allowed;
    const int64_t sequence_tokens = shard.sequence_tokens ? shard.sequence_tokens[segment] : counts.loss_tokens;
    coefficient_ = coefficient(sequence_tokens);
    if (!tokens().advantages_per_token) advantage_ = tokens().advantages[segment];
    if (!is_leader) return;

    work_.out.vetoed[segment] = vetoed_;
    metrics.count(kLossTokens, counts.loss_tokens);
    metrics.count(kNumTokens, vetoed_ ? 0 : counts.loss_tokens);
    metrics.count(kDualClipped, counts.dual_clipped);
    if (shard.counts_sequence && !shard.counts_sequence[segment]) return;
    metrics.count(kLossSequences, sequence_tokens > 0);
    metrics.count(kNumSequences, sequence_tokens > 0 && !vetoed_);
    metrics.count(kVetoed, vetoed_);
  }

  __device__ void row(const Window& window, const Row& row, int) {
    Quad<float> advantage, token_weight, gradient, weight;
    if (tokens().advantages_per_token) advantage = read_quad(tokens().advantages, window, row.index);
    if (tokens().token_weights) token_weight = read_quad(tokens().token_weights, window, row.index);
#pragma unroll
    for (int i = kQuad - 1; i >= 0; --i) {
      const float raw = constants().influence ? expf(row.future_kl.at[i]) : 1.0f;
      gradient.at[i] = 0.0f;
      weight.at[i] = constants().influence ? clip(raw, constants().influence_low, constants().influence_high) : 1.0f;
      if (!(row.mask >> i & 1)) continue;
      const float a = tokens().advantages_per_token ? advantage.at[i] : advantage_;
      const float scale = tokens().token_weights ? coefficient_ * token_weight.at[i] : coefficient_;
      const float derivative = loss_token(row.log_ratio.at[i], row.future_kl.at[i], raw, a, scale, &weight.at[i]);
      if (!vetoed_ && !(row.clamped >> i & 1)) gradient.at[i] = derivative;
    }
    write_quad(work_.out.gradient, window, row, gradient);
    if (work_.out.future_kl) write_quad(work_.out.future_kl, window, row, row.future_kl);
    if (work_.out.influence_weights) write_quad(work_.out.influence_weights, window, row, weight);
  }

  __device__ void end_tile() { metrics.end_tile(); }

 private:
  __device__ const Tokens& tokens() const { return work_.inputs.tokens; }
  __device__ const Constants& constants() const { return work_.inputs.constants; }

  __device__ float coefficient(int64_t sequence_tokens) const {
    if (constants().aggregation == Aggregation::kSeqMeanTokenSumNorm) return 1.0f / constants().norm_length;
    if (constants().aggregation != Aggregation::kSeqMeanTokenMean) return 1.0f;
    return 1.0f / static_cast<float>(sequence_tokens > 1 ? sequence_tokens : 1);
  }

  // A loss token's metrics, its weight, and the derivative of its term in the loss sum.
  __device__ float loss_token(float log_ratio, float future_kl, float raw, float advantage, float scale,
                              float* weight) {
    const float ratio = expf(log_ratio);
    if (constants().influence) {
      *weight = influence_weight(raw, advantage, ratio, constants());
      metrics.add_influence(future_kl, raw, *weight, constants());
    }
    const Surrogate term = surrogate(*weight * advantage, ratio, constants());
    metrics.add_ratio(log_ratio, ratio, advantage, term.is_clipped, constants().dual_clip);
    if (!vetoed_) metrics.add_loss(term.loss * scale);
    return term.derivative * scale;
  }

  const LossWork<Shape>& work_;
  bool vetoed_;
  float coefficient_, advantage_;
};

// Called by all threads of the only cluster; a barrier must follow.
template <class Shape>
__device__ void clear_outputs(const LossWork<Shape>& work, const ThreadCoords<Shape>& coords) {
  constexpr int threads = Shape::kBlocks * Shape::kThreads;
  const int thread = coords.block * Shape::kThreads + threadIdx.x;
  for (int i = thread; i < 2 * kHistogramBins; i += threads) work.out.histograms[i] = 0;
  if (thread == 0) work.head->blocks_done = 0;
  __threadfence();
}

// Whether this block is the last of the grid to arrive; it sees the writes of the others.
__device__ inline bool is_last_block(uint32_t* blocks_done, bool* shared) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *shared = atomicAdd(blocks_done, 1u) == gridDim.x - 1;
  __syncthreads();
  __threadfence();
  return *shared;
}

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 2) loss_kernel(const __grid_constant__ LossWork<Shape> work) {
  if constexpr (kIsCompiled<Shape>) {
    __shared__ ExchangeMemory<Shape> exchange_memory;
    __shared__ MetricsMemory<Shape> metrics_memory;
    const ThreadCoords<Shape> coords;
    LossTask<Shape> task(work, &metrics_memory);
    if (coords.num_clusters == 1) clear_outputs(work, coords);
    task.metrics.clear_shared();
    cluster_sync<Shape>();  // also: a block's shared memory may be written to once the block runs

    Worker<Shape, LossTask<Shape>> worker(work.inputs, coords, &exchange_memory, &task);
    for_each_segment(work.inputs.tokens, coords, [&](Level level, int segment) { worker.segment(level, segment); });
    __syncthreads();

    task.metrics.write_block(work.of_blocks + static_cast<int64_t>(blockIdx.x) * kNumMetrics, coords.lane, coords.warp);
    if (is_last_block(&work.head->blocks_done, &metrics_memory.is_last_block))
      finish_metrics<Shape>(work.of_blocks, work.out, coords.lane, coords.warp);
  }
}

inline int64_t workspace_size(int64_t blocks) { return sizeof(WorkspaceHead) + blocks * kNumMetrics * sizeof(double); }

inline int64_t loss_workspace(int64_t num_tokens, int64_t num_segments) {
  return workspace_size(most_blocks(num_tokens, num_segments));
}

template <class Shape>
void loss(const Tokens& tokens, const Constants& constants, const Shard& shard, const LossOutput& out,
          void* workspace, cudaStream_t stream) {
  WorkspaceHead* const head = static_cast<WorkspaceHead*>(workspace);
  const Decay<Shape> decay = make_decay<Shape>(constants.half_life);
  LossWork<Shape> work = {{tokens, constants, decay, shard.carry_in, false}, shard, out, head,
                          reinterpret_cast<double*>(head + 1)};
  work.inputs.aligned =
      inputs_aligned(tokens) && (!tokens.advantages_per_token || aligned_to_quads(tokens.advantages)) &&
      aligned_to_quads(tokens.token_weights, out.gradient, out.future_kl, out.influence_weights);
  const Kernel<LossWork<Shape>> kernel = loss_kernel<Shape>;
  const int64_t clusters = num_clusters<Shape>(kernel, tokens);
  if (clusters > 1) {
    check(cudaMemsetAsync(&head->blocks_done, 0, sizeof head->blocks_done, stream), "cudaMemsetAsync");
    check(cudaMemsetAsync(out.histograms, 0, 2 * kHistogramBins * sizeof(int64_t), stream), "cudaMemsetAsync");
  }
  launch<Shape>(kernel, work, clusters, stream);
}

}  // namespace cuda
}  // namespace fipo
