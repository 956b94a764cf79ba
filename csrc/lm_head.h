// Interface of the LM head's kernels: the statistics of one chunk of logits that determine log-probability and entropy,
// and the gradient of the loss with respect to those logits. With z_j = x_j / temperature for the logits x of
// one row, and p = softmax(z) over the whole vocabulary, of which the row holds one shard:
//
//     statistics: max z,  sum_j exp(z_j - max z),  sum_j exp(z_j - max z) (z_j - max z),  z of the target
//     gradient:   [j = target] log_prob - p_j (slope log p_j + offset),  log p_j = z_j - logsumexp
//
// As in fipo.h: pointers are on the device that the function runs on, outputs do not overlap inputs unless stated
// otherwise, every element of an output is written, same inputs give the same bits (on CPU for any number of threads),
// and arguments are checked by the caller, `megatron_fipo/ops/lm_head.py`.
// Logits are read once from memory, in their own type; arithmetic is float32. A logit of -inf has probability 0. A
// NaN or +inf logit makes the statistics of its row NaN.
#pragma once

#include "fipo.h"

namespace fipo {

constexpr int64_t kLogitAlignment = 16;  // bytes, of every row of logits and of gradients

struct Logits {
  const void* values;      // [rows, columns] of type `dtype`; row i begins `i * stride` elements behind `values`
  const int64_t* targets;  // [rows] column of the target; any value outside [0, columns) if it is in another shard
  int64_t rows, columns, stride;
  float inverse_temperature;
  Float dtype;
};

// [rows] each.
struct LogitStatistics {
  float* maximum;          // max z
  float* sum_exp;          // sum exp(z - max z)
  float* sum_exp_shifted;  // sum exp(z - max z) (z - max z)
  float* target;           // z of the target; 0 if it is in another shard
};

struct LogitGradient {
  void* values;            // [rows, columns] of type `dtype`; may be the logits themselves, with their type and stride
  int64_t stride;
  Float dtype;             // that of the logits, or bfloat16 for float32 logits
  const float* logsumexp;  // [rows], as the three below: in units of z
  const float* log_prob;
  const float* slope;      // optional: null means 0
  const float* offset;
};

void logit_statistics_cpu(const Logits& logits, const LogitStatistics& out, int threads);
void logit_gradient_cpu(const Logits& logits, const LogitGradient& out, int threads);

#ifdef MEGATRON_FIPO_CUDA
// `stream` is a cudaStream_t. One launch each; a failed one throws std::runtime_error.
void logit_statistics_cuda(const Logits& logits, const LogitStatistics& out, void* stream);
void logit_gradient_cuda(const Logits& logits, const LogitGradient& out, void* stream);
#endif

}  // namespace fipo
