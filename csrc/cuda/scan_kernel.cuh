// Future-KL scan: one launch, no workspace.
#pragma once

#include "launch.cuh"
#include "worker.cuh"

namespace fipo {
namespace cuda {

template <class Shape>
struct ScanWork {
  Inputs<Shape> inputs;
  ScanOutput out;
};

template <class Shape>
class ScanTask {
 public:
  static constexpr bool kCountsFirst = false;

  __device__ explicit ScanTask(const ScanOutput& out) : out_(out) {}

  __device__ bool counts() const { return out_.dual_clipped || out_.loss_tokens; }

  __device__ void finalize_segment(int segment, const SegmentCounts& counts, bool is_leader) const {
    if (!is_leader) return;
    if (out_.dual_clipped) out_.dual_clipped[segment] = counts.dual_clipped;
    if (out_.loss_tokens) out_.loss_tokens[segment] = counts.loss_tokens;
  }

  __device__ void row(const Window& window, const Row& row, int segment) const {
    if (out_.future_kl) write_quad(out_.future_kl, window, row, row.future_kl);
    if (!out_.carry_out) return;
    const int first = window.begin - row.index * kRowTokens;  // for an empty segment, the carry's term is there
#pragma unroll
    for (int i = 0; i < kQuad; ++i)
      if (first == i) out_.carry_out[segment] = row.future_kl.at[i];
  }

  __device__ void end_tile() const {}

 private:
  const ScanOutput& out_;
};

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 2) scan_kernel(const __grid_constant__ ScanWork<Shape> work) {
  if constexpr (kIsCompiled<Shape>) {
    __shared__ ExchangeMemory<Shape> memory;
    const ThreadCoords<Shape> coords;
    cluster_sync<Shape>();  // a block's shared memory may be written to only when the block runs
    ScanTask<Shape> task(work.out);
    Worker<Shape, ScanTask<Shape>> worker(work.inputs, coords, &memory, &task);
    for_each_segment(work.inputs.tokens, coords, [&](Level level, int segment) { worker.segment(level, segment); });
  }
}

template <class Shape>
void scan(const Tokens& tokens, const Constants& constants, const float* carry_in, const ScanOutput& out,
          cudaStream_t stream) {
  ScanWork<Shape> work = {{tokens, constants, make_decay<Shape>(constants.half_life), carry_in, false}, out};
  work.inputs.constants.influence = 1;  // the scan must be computed
  work.inputs.aligned = inputs_aligned(tokens) && aligned_to_quads(out.future_kl);
  const Kernel<ScanWork<Shape>> kernel = scan_kernel<Shape>;
  launch<Shape>(kernel, work, num_clusters<Shape>(kernel, tokens), stream);
}

}  // namespace cuda
}  // namespace fipo
