#include "../lm_head.h"

#include <algorithm>

#include "kernels.h"

namespace fipo {
namespace {

constexpr int64_t kElementsPerThread = 1 << 14;  // with fewer, starting another thread does not pay off

int useful_threads(const Logits& logits, int threads) {
  const int64_t worth = std::min(logits.rows, logits.rows * logits.columns / kElementsPerThread);
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, worth)));
}

}  // namespace

void logit_statistics_cpu(const Logits& logits, const LogitStatistics& out, int threads) {
  threads = useful_threads(logits, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < logits.rows; ++row) cpu::kernels().logit_statistics(logits, row, out);
}

void logit_gradient_cpu(const Logits& logits, const LogitGradient& out, int threads) {
  threads = useful_threads(logits, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < logits.rows; ++row) cpu::kernels().logit_gradient(logits, row, out);
}

}  // namespace fipo
