// csrc/fipo.h served by the emulated CUDA kernels, its CPU functions included: they run on the host's memory.
// FIPO_EMULATED_SHAPE names the kernel's shape, small ones so that little data crosses every border.
#include "../../csrc/cuda/lm_head_kernel.cuh"
#include "../../csrc/cuda/loss_kernel.cuh"
#include "../../csrc/cuda/scan_kernel.cuh"

namespace fipo {
namespace {

using namespace cuda;

// Bytes that no kernel may count on, and a margin behind them that none may touch.
class Workspace {
 public:
  explicit Workspace(int64_t size) : size_(size), bytes_(size + kMargin + alignof(WorkspaceHead), kPoison) {}
  ~Workspace() {
    for (int64_t i = size_; i < size_ + kMargin; ++i)
      if (data()[i] != kPoison) {
        fprintf(stderr, "emulation: a kernel wrote behind its workspace\n");
        abort();
      }
  }
  unsigned char* data() {
    const uintptr_t at = reinterpret_cast<uintptr_t>(bytes_.data()), unit = alignof(WorkspaceHead);
    return bytes_.data() + (unit - at % unit) % unit;
  }

 private:
  static constexpr int64_t kMargin = 4096;
  static constexpr unsigned char kPoison = 0xff;
  int64_t size_;
  std::vector<unsigned char> bytes_;
};

// Calls run(shape) with a value of the shape that the environment names.
template <class Run>
void with_shape(Run run) {
  const char* const name = getenv("FIPO_EMULATED_SHAPE");
  const std::string shape = name ? name : "";
  if (shape == "2x2x2") return run(Shape<2, 2, 2>());
  if (shape == "3x1x4") return run(Shape<3, 1, 4>());
  if (shape == "2x2x1") return run(Shape<2, 2, 1>());
  if (shape == "cluster") return run(ClusterShape());
  if (shape == "block") return run(BlockShape());
  throw std::runtime_error("FIPO_EMULATED_SHAPE=" + shape + " is not known");
}

}  // namespace

void scan_cuda(const Tokens& tokens, const Constants& constants, const float* carry_in, const ScanOutput& out, void*,
               void*) {
  with_shape([&](auto shape) { cuda::scan<decltype(shape)>(tokens, constants, carry_in, out, nullptr); });
}

void loss_cuda(const Tokens& tokens, const Constants& constants, const Shard& shard, const LossOutput& out, void*,
               void*) {
  with_shape([&](auto shape) {
    using S = decltype(shape);
    const int64_t blocks = num_clusters<S>(Kernel<LossWork<S>>(loss_kernel<S>), tokens) * S::kBlocks;
    Workspace workspace(workspace_size(blocks));
    cuda::loss<S>(tokens, constants, shard, out, workspace.data(), nullptr);
  });
}

int64_t scan_cuda_workspace(int64_t, int64_t) { return 0; }
int64_t loss_cuda_workspace(int64_t num_tokens, int64_t num_segments) {
  return cuda::loss_workspace(num_tokens, num_segments);
}

void scan_cpu(const Tokens& tokens, const Constants& constants, const float* carry_in, const ScanOutput& out, int) {
  scan_cuda(tokens, constants, carry_in, out, nullptr, nullptr);
}
void loss_cpu(const Tokens& tokens, const Constants& constants, const Shard& shard, const LossOutput& out, int) {
  loss_cuda(tokens, constants, shard, out, nullptr, nullptr);
}

// Rows of logits have a shape of their own: two warps with little in flight, or what GPUs run.
template <class Small, class OfGpus, class Run>
void with_row_shape(Run run) {
  const char* const name = getenv("FIPO_EMULATED_SHAPE");
  if (name && strcmp(name, "gpu rows") == 0) return run(OfGpus());
  run(Small());
}

void logit_statistics_cuda(const Logits& logits, const LogitStatistics& out, void*) {
  with_row_shape<RowShape<64, 2>, StatisticsShape>(
      [&](auto shape) { cuda::logit_statistics<decltype(shape)>(logits, out, nullptr); });
}
void logit_gradient_cuda(const Logits& logits, const LogitGradient& out, void*) {
  with_row_shape<RowShape<64, 2>, GradientShape>(
      [&](auto shape) { cuda::logit_gradient<decltype(shape)>(logits, out, nullptr); });
}
void logit_statistics_cpu(const Logits& logits, const LogitStatistics& out, int) {
  logit_statistics_cuda(logits, out, nullptr);
}
void logit_gradient_cpu(const Logits& logits, const LogitGradient& out, int) {
  logit_gradient_cuda(logits, out, nullptr);
}

const char* cpu_isa() { return "emulated CUDA"; }

}  // namespace fipo
