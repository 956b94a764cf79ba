// Included once per instruction set: statistics and gradient of one row of logits, see ../lm_head.h.
#pragma once

#include <float.h>

#include "kernel_common.h"

namespace {

constexpr int64_t kBlockColumns = 2048;  // read twice, for maximum and sums: the second time from the cache
constexpr float kNoProbability = -104.0f;  // nats; exp of smaller values is 0 in float32

FIPO_INLINE F load_logits(const float* p) { return Lanes::load(p); }
FIPO_INLINE F load_logits(const uint16_t* p) { return Lanes::load_bfloat16(p); }
FIPO_INLINE void store_gradient(float* p, F x) { Lanes::store(p, x); }
FIPO_INLINE void store_gradient(uint16_t* p, F x) { Lanes::store_bfloat16(p, x); }

// The last columns of a row, fewer than kWidth, padded with logits of probability 0.
template <class T>
struct RowEnd {
  T lanes[kWidth];

  RowEnd(const T* from, int64_t count) {
    const float minus_infinity = -INFINITY;
    T nothing;  // the upper bytes: bfloat16 is the upper half of a float32
    memcpy(&nothing, reinterpret_cast<const char*>(&minus_infinity) + sizeof(float) - sizeof(T), sizeof(T));
    for (int i = 0; i < kWidth; ++i) lanes[i] = nothing;
    memcpy(lanes, from, count * sizeof(T));
  }
};

template <class T>
FIPO_INLINE float one_logit(const T* p) {
  return Lanes::first(load_logits(RowEnd<T>(p, 1).lanes));
}

// ---- statistics ----

struct RowSums {
  float maximum;
  double sum, shifted_sum;
};

// For the columns [begin, end) of a row; `end_lanes` has the columns after the last full vector.
template <class T>
class RowStatistics {
 public:
  RowStatistics(const T* row, int64_t columns, float inverse_temperature)
      : row_(row),
        whole_(columns / kWidth * kWidth),
        has_end_(columns > whole_),
        end_(row + whole_, columns - whole_),
        scale_(Lanes::set(inverse_temperature)) {}

  RowSums all() const {
    RowSums sums = {-FLT_MAX, 0.0, 0.0};
    for (int64_t begin = 0; begin < whole_; begin += kBlockColumns) {
      const int64_t count = whole_ - begin < kBlockColumns ? whole_ - begin : kBlockColumns;
      add(row_ + begin, count, &sums);
    }
    if (has_end_) add(end_.lanes, kWidth, &sums);
    return sums;
  }

 private:
  FIPO_INLINE F load(const T* p) const { return Lanes::mul(load_logits(p), scale_); }

  // Adds `count` columns (full vectors) to the sums, after rescaling these to the new maximum.
  void add(const T* block, int64_t count, RowSums* sums) const {
    F largest = Lanes::set(-FLT_MAX);
    for (int64_t i = 0; i < count; i += kWidth) largest = Lanes::at_least(largest, load(block + i));
    const float block_maximum = Lanes::largest(largest);
    if (block_maximum > sums->maximum) {
      const double shift = static_cast<double>(sums->maximum) - block_maximum, scale = exp(shift);
      if (sums->sum != 0.0) sums->shifted_sum = scale * (sums->shifted_sum + shift * sums->sum);
      sums->sum *= scale;
      sums->maximum = block_maximum;
    }
    const F maximum = Lanes::set(sums->maximum), least = Lanes::set(kNoProbability);
    F sum = Lanes::set(0.0f), shifted_sum = sum;
    for (int64_t i = 0; i < count; i += kWidth) {
      const F shifted = Lanes::at_least(Lanes::sub(load(block + i), maximum), least);
      const F weight = exponential<false>(shifted);
      sum = Lanes::add(sum, weight);
      shifted_sum = Lanes::fma(weight, shifted, shifted_sum);
    }
    sums->sum += Lanes::sum(sum);
    sums->shifted_sum += Lanes::sum(shifted_sum);
  }

  const T* row_;
  int64_t whole_;
  bool has_end_;
  RowEnd<T> end_;
  F scale_;
};

template <class T>
void row_statistics(const Logits& logits, int64_t row, const LogitStatistics& out) {
  const T* const values = static_cast<const T*>(logits.values) + row * logits.stride;
  const RowSums sums = RowStatistics<T>(values, logits.columns, logits.inverse_temperature).all();
  const int64_t target = logits.targets[row];
  const bool is_here = target >= 0 && target < logits.columns;
  out.maximum[row] = sums.maximum;
  out.sum_exp[row] = static_cast<float>(sums.sum);
  out.sum_exp_shifted[row] = static_cast<float>(sums.shifted_sum);
  out.target[row] = is_here ? one_logit(values + target) * logits.inverse_temperature : 0.0f;
}

void logit_statistics_row(const Logits& logits, int64_t row, const LogitStatistics& out) {
  if (logits.dtype == Float::kBFloat16)
    row_statistics<uint16_t>(logits, row, out);
  else
    row_statistics<float>(logits, row, out);
}

// ---- gradient ----

struct RowTerms {
  F scale, logsumexp, slope, minus_offset;
};

// -p (slope log p + offset)
FIPO_INLINE F gradient_of(F logits, const RowTerms& terms) {
  const F log_p = Lanes::at_least(Lanes::sub(Lanes::mul(logits, terms.scale), terms.logsumexp),
                                  Lanes::set(kNoProbability));
  const F factor = Lanes::sub(terms.minus_offset, Lanes::mul(terms.slope, log_p));
  return Lanes::mul(exponential<false>(log_p), factor);
}

template <class In, class Out>
void row_gradient(const Logits& logits, int64_t row, const LogitGradient& out) {
  const In* const from = static_cast<const In*>(logits.values) + row * logits.stride;
  Out* const to = static_cast<Out*>(out.values) + row * out.stride;
  const RowTerms terms = {Lanes::set(logits.inverse_temperature), Lanes::set(out.logsumexp[row]),
                          Lanes::set(out.slope ? out.slope[row] : 0.0f), Lanes::set(-out.offset[row])};
  const int64_t columns = logits.columns, whole = columns / kWidth * kWidth, target = logits.targets[row];
  const bool is_here = target >= 0 && target < columns;
  // Read before `to`, which may be the same memory, is written.
  const F at_target = is_here ? Lanes::add(gradient_of(Lanes::set(one_logit(from + target)), terms),
                                           Lanes::set(out.log_prob[row]))
                              : terms.scale;
  for (int64_t i = 0; i < whole; i += kWidth) store_gradient(to + i, gradient_of(load_logits(from + i), terms));
  if (columns > whole) {
    const RowEnd<In> end(from + whole, columns - whole);
    Out lanes[kWidth];
    store_gradient(lanes, gradient_of(load_logits(end.lanes), terms));
    memcpy(to + whole, lanes, (columns - whole) * sizeof(Out));
  }
  if (is_here) {
    Out lanes[kWidth];
    store_gradient(lanes, at_target);
    to[target] = lanes[0];
  }
}

void logit_gradient_row(const Logits& logits, int64_t row, const LogitGradient& out) {
  if (logits.dtype == Float::kBFloat16)
    row_gradient<uint16_t, uint16_t>(logits, row, out);
  else if (out.dtype == Float::kBFloat16)
    row_gradient<float, uint16_t>(logits, row, out);
  else
    row_gradient<float, float>(logits, row, out);
}

}  // namespace
