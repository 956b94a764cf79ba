#include "lm_head_kernel.cuh"

namespace fipo {

void logit_statistics_cuda(const Logits& logits, const LogitStatistics& out, void* stream) {
  cuda::logit_statistics<cuda::StatisticsShape>(logits, out, static_cast<cudaStream_t>(stream));
}

void logit_gradient_cuda(const Logits& logits, const LogitGradient& out, void* stream) {
  cuda::logit_gradient<cuda::GradientShape>(logits, out, static_cast<cudaStream_t>(stream));
}

}  // namespace fipo
