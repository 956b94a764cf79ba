#include "scan_kernel.cuh"

namespace fipo {

int64_t scan_cuda_workspace(int64_t, int64_t) { return 0; }

void scan_cuda(const Tokens& tokens, const Constants& constants, const float* carry_in, const ScanOutput& out,
               void*, void* stream) {
  const auto scan = cuda::takes_clusters(tokens) ? cuda::scan<cuda::ClusterShape> : cuda::scan<cuda::BlockShape>;
  scan(tokens, constants, carry_in, out, static_cast<cudaStream_t>(stream));
}

}  // namespace fipo
