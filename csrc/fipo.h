// Interface of the kernels: FIPO's Future-KL scan and its fused loss
// (arXiv 2603.19835, eq. 6 to 8) on packed sequences. No torch header: plain pointers and sizes.
//
//     d_t = clamp(logp_t - logp_old_t),  r_t = exp(d_t)
//     S_t = M_t d_t + gamma S_{t+1},  M_t = mask_t and not d_t > ln c,  gamma = 2^(-1 / half_life)
//     f_t = clip(exp(S_t), low, high); where A_t < 0 and r_t > safety threshold, clipped again to [0.8, 1]
//     l_t = clipped surrogate of the weighted advantage f_t A_t
//
// Letters: N packed tokens, S segments. Segment i is [offsets[i], offsets[i + 1]), maybe empty, at any alignment.
// A segment is a whole sequence, or, if sequences are sharded, one contiguous chunk of one; `Shard` then provides
// the information about the rest of its sequence.
//
// For every function below:
// - If N or S is 0, the arrays of that size may be null, including required ones.
// - Outputs must not overlap inputs or each other. Pointers called optional may be null. Every element of an output
//   that is not null is written, regardless of its previous value.
// - Masked tokens may have any value, including NaN, in every input: they are selected away, never multiplied.
//   They still count as distance for the decay. A NaN at an unmasked token makes the sums it enters NaN.
// - Arithmetic is float32, sums over tokens are float64.
// - Same inputs, same bits. On CPU also for any number of threads, and the per-token outputs of a sequence (which is
//   one segment) do not depend on how it is packed with others.
// - Arguments are not checked here; `megatron_fipo/ops/extension.py`, the only caller, does.
#pragma once

#include <stdint.h>

namespace fipo {

enum class Float : int32_t { kFloat32 = 0, kBFloat16 = 1 };  // bf16 is read by CUDA kernels only

enum class Aggregation : int32_t {
  kTokenMean = 0,           // each token's loss unchanged
  kSeqMeanTokenSum = 1,     // the same
  kSeqMeanTokenMean = 2,    // divided by the number of loss tokens of its sequence
  kSeqMeanTokenSumNorm = 3  // divided by norm_length
};

// Histograms of d_t as in megatron_fipo/algorithm/metrics.py: bin k counts values in width 1/256 centred on
// k / 256 - 20; values beyond +-20 count in the end bins. [2][kHistogramBins]: tokens with A < 0, then with A > 0.
constexpr int32_t kHistogramBinsPerNat = 256;
constexpr int32_t kHistogramRange = 20;
constexpr int32_t kHistogramBins = 2 * kHistogramRange * kHistogramBinsPerNat + 1;

// Metrics tensor: [kNumMetrics] float64. Counts are exact. All are over loss tokens (unmasked ones), vetoed
// or not, except the three marked otherwise. Sums first, then extrema, which are +inf or -inf without
// data. The influence block is 0 (sums) or without data (extrema) if `Constants::influence` is 0.
enum Metric : int32_t {
  kLossSum,         // of surviving tokens, weighted by the aggregation
  kNumTokens,       // surviving
  kNumSequences,    // surviving, with a loss token
  kLossTokens,      // unmasked
  kLossSequences,   // sequences with a loss token, vetoed or not
  kVetoed,          // sequences
  kApproxKl,        // sum of -d
  kPpoClipped,      // tokens where the upper or lower ratio clip is active
  kDualClipped,     // tokens with A < 0 and d > ln c
  kNegative2To3,    // tokens with A < 0 and r in [2, 3)
  kNegative3To4,    // [3, 4)
  kNegative4ToDual, // [4, c)
  kPositiveBelow1e3,  // tokens with A > 0 and r < 1e-3
  kFutureKl,        // sum of S_t
  kInfluence,       // sum of f_t
  kInfluenceRaw,    // sum of exp(S_t), S_t bounded by kMaxLogWeight
  kInfluenceClippedUpper,  // tokens with f_t >= clipped_above
  kInfluenceClippedLower,  // tokens with f_t <= clipped_below
  kLogRatioAbsMax,  // of |d_t|
  kNegativeRatioMax,  // of r_t where A < 0
  kPositiveRatioMin,  // of r_t where A > 0
  kPositiveRatioMax,
  kFutureKlMin,
  kFutureKlMax,
  kInfluenceMin,
  kInfluenceMax,
  kInfluenceRawMin,
  kInfluenceRawMax,
  kNumMetrics
};
constexpr int32_t kFirstExtremum = kLogRatioAbsMax;

// Constants that megatron_fipo/config/loss.py has, too; a test compares them.
constexpr double kMaxLogWeight = 600.0;  // nats; exp of it, summed over any batch, is finite in float64
constexpr float kSafeLow = 0.8f, kSafeHigh = 1.0f;  // bounds of f_t where the safety rule is active

// Inputs of all functions. All pointers are on the device that the function runs on.
struct Tokens {
  const void* log_probs;      // [N] nats, of type `dtype`
  const void* old_log_probs;  // [N], optional: null means that log_probs holds log-ratios
  const uint8_t* mask;        // [N], nonzero for tokens that count
  const int64_t* offsets;     // [S + 1], from 0 to N, non-decreasing
  const float* advantages;    // [N] or [S]; not read by `scan`
  const float* token_weights; // [N], optional (1): multiplies each token's loss; read by `loss` only
  int64_t num_tokens;
  int64_t num_segments;
  int32_t advantages_per_token;  // 1: advantages is [N], 0: [S]
  Float dtype;
};

struct Constants {
  double half_life;         // tokens, > 0; powers of gamma are computed in float64
  float log_ratio_clamp;    // nats; +inf: none
  float log_dual_clip;      // ln c: larger ones are excluded from the scan; +inf: none. Below: read by `loss`
  float dual_clip;          // c
  float ratio_low;          // 1 - clip_ratio_low
  float ratio_high;         // 1 + clip_ratio_high
  float influence_low;      // 0 .. 10 if the recipe does not clip
  float influence_high;
  float safety_threshold;   // a ratio
  float clipped_below;      // f at or below counts as clipped at the lower bound
  float clipped_above;
  float norm_length;        // tokens
  int64_t max_dual_clipped; // sequences with more are vetoed; negative: never
  Aggregation aggregation;
  int32_t influence;        // 1: FIPO; 0: DAPO/GRPO: every weight is 1, S is not computed, its outputs are 0 and 1
};

// Information for segments that are chunks of sequences. Each is optional; null means that segments are whole
// sequences. `vetoed` replaces the count of dual-clipped tokens.
struct Shard {
  const float* carry_in;          // [S] S_t of the token after the segment's last one; null: 0
  const uint8_t* vetoed;          // [S] the segment's whole sequence is vetoed
  const int64_t* sequence_tokens; // [S] loss tokens of the segment's whole sequence
  const uint8_t* counts_sequence; // [S] the segment counts its sequence in kNumSequences, kLossSequences, kVetoed:
                                  // exactly one segment of each sequence does, on one rank. Needs sequence_tokens.
};

// Outputs of `scan`, each optional.
struct ScanOutput {
  float* future_kl;       // [N] S_t
  float* carry_out;       // [S] S_t of the segment's first token; the carry-in for an empty segment
  int64_t* dual_clipped;  // [S] tokens with A < 0 and d > ln c; the only output that reads `Tokens::advantages`
  int64_t* loss_tokens;   // [S] unmasked tokens
};

struct LossOutput {
  float* gradient;           // [N] d(loss sum) / d(logp_t); 0 if masked, clipped or vetoed
  float* future_kl;          // [N] optional
  float* influence_weights;  // [N] optional
  float* loss_sum;           // [1] metrics[kLossSum], rounded, for autograd
  double* metrics;           // [kNumMetrics]
  int64_t* histograms;       // [2][kHistogramBins]
  uint8_t* vetoed;           // [S] 0 or 1
};

// ---- CPU. `threads` >= 1: maximum number of threads. Both return after the outputs are written.

// S_t, and what the chunks of a sharded sequence exchange: a chunk's carry_out without carry-in, its length and its two
// counts suffice, since carry_out(with c) = carry_out(with 0) + gamma^length * c.
void scan_cpu(const Tokens& tokens, const Constants& constants, const float* carry_in, const ScanOutput& out,
              int threads);

// The whole loss in one pass over the data.
void loss_cpu(const Tokens& tokens, const Constants& constants, const Shard& shard, const LossOutput& out,
              int threads);

// "scalar", "avx2" or "avx512": the fastest of this machine, or the one named by MEGATRON_FIPO_ISA. Null if
// that is unknown or not available here. Read once.
const char* cpu_isa();

// ---- CUDA, if built. Both only enqueue on `stream`, a cudaStream_t: no host sync, no allocation.
// `workspace` is device memory of at least the requested size, with arbitrary contents.

int64_t scan_cuda_workspace(int64_t num_tokens, int64_t num_segments);
int64_t loss_cuda_workspace(int64_t num_tokens, int64_t num_segments);

void scan_cuda(const Tokens& tokens, const Constants& constants, const float* carry_in, const ScanOutput& out,
               void* workspace, void* stream);
void loss_cuda(const Tokens& tokens, const Constants& constants, const Shard& shard, const LossOutput& out,
               void* workspace, void* stream);

}  // namespace fipo
