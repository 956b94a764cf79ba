// Declarations shared by the instruction-set-independent part (loss.cpp, scan.cpp) and the kernels per instruction set.
// Headers included by kernels define no inline functions that two instruction sets could share: the linker would keep
// one of the copies, possibly one that this machine cannot run.
#pragma once

#include "../fipo.h"
#include "../lm_head.h"

namespace fipo {
namespace cpu {

constexpr int kMaxLanes = 16;
constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: a float32 of at most 2^22 added to it has no fraction bits left

// Powers of gamma, rounded once from float64. The carry between windows is float64: near 1, the error of rounding
// gamma^16 to float32 would accumulate over a long sequence.
struct Decay {
  float by_one, by_two, by_four, by_eight;
  float to_end[kMaxLanes];  // to_end[i] = gamma^(kMaxLanes - i); the last W of them serve W lanes
  double by_window[kMaxLanes + 1];  // by_window[W] = gamma^W
};

// Consecutive tokens of one segment.
struct Piece {
  int64_t segment;
  int64_t begin, end;
  double carry;  // S_t of the token at `end`
};

struct PieceSummary {
  double first;          // S_t of the token at `begin`; the carry if the piece is empty
  int64_t dual_clipped;  // both counted only if the job requests it
  int64_t loss_tokens;
};

struct ScanJob {
  Tokens tokens;
  float log_ratio_clamp, log_dual_clip;
  Decay decay;
  float* future_kl;  // [N] optional
  bool count;        // the two counts of PieceSummary; reads advantages
};

struct LossJob {
  Tokens tokens;
  Constants constants;
  Shard shard;
  LossOutput out;
  Decay decay;
};

// Independent work of one thread: whole segments [first, last), or one tile of a long one.
struct Run {
  int64_t first, last;
  bool is_tile;
  // For tiles only:
  Piece tile;
  bool vetoed;
  int64_t sequence_tokens;
};

// Per-thread histogram counts. Most log-ratios are near 0, often in the same bin, and an increment has to wait for
// the previous one at the same address: neighbouring tokens use different copies.
constexpr int32_t kCentreBin = kHistogramRange * kHistogramBinsPerNat;
constexpr int32_t kNearBins = 192;  // in each direction from the centre, even: 0.75 nats
constexpr int32_t kNearSlots = 2 * kNearBins + 2;  // the last is for uncounted tokens
constexpr int32_t kNearCopies = 4;

struct Counts {
  uint32_t near[2][kNearCopies][kNearSlots];  // of A < 0, of A > 0
  bool uses_all;                              // `all` has been cleared, and holds what is not in `near`
  uint32_t all[2 * kHistogramBins + 1];       // the last is for uncounted tokens
};

struct RunResult {
  double metrics[kNumMetrics];  // sequence counts of a tile's segment are left to the caller
  Counts* counts;               // of the thread; added to
};

struct Kernels {
  PieceSummary (*scan)(const ScanJob& job, const Piece& piece);
  void (*loss)(const LossJob& job, const Run& run, RunResult* result);
  void (*logit_statistics)(const Logits& logits, int64_t row, const LogitStatistics& out);
  void (*logit_gradient)(const Logits& logits, int64_t row, const LogitGradient& out);
};

extern const Kernels kScalarKernels;
#ifdef __x86_64__
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

// Functions of the selected instruction set, see `cpu_isa`.
const Kernels& kernels();

Decay make_decay(double half_life);

}  // namespace cpu
}  // namespace fipo
