#include "loss_kernel.cuh"

namespace fipo {

int64_t loss_cuda_workspace(int64_t num_tokens, int64_t num_segments) {
  return cuda::loss_workspace(num_tokens, num_segments);
}

void loss_cuda(const Tokens& tokens, const Constants& constants, const Shard& shard, const LossOutput& out,
               void* workspace, void* stream) {
  const auto loss = cuda::takes_clusters(tokens) ? cuda::loss<cuda::ClusterShape> : cuda::loss<cuda::BlockShape>;
  loss(tokens, constants, shard, out, workspace, static_cast<cudaStream_t>(stream));
}

}  // namespace fipo
