// Included once per instruction set, after one of the lanes_*.h: operations of both kernels on a vector of tokens.
#pragma once

#include <math.h>
#include <string.h>

#include "kernels.h"

#define FIPO_INLINE inline __attribute__((always_inline))

namespace {

using namespace fipo;
using namespace fipo::cpu;

using F = Lanes::F;
using M = Lanes::M;
constexpr int kWidth = Lanes::kWidth;
constexpr float kOrdinaryExp = 80.0f;  // nats

// Rounds |x| <= 2^22 to nearest even.
FIPO_INLINE F nearest_whole(F x) { return Lanes::sub(Lanes::add(x, Lanes::set(kMagic)), Lanes::set(kMagic)); }

// exp; the largest error is 0.9 ulp if the result is normal, 1.2 without a fused multiply-add. For any x: the
// result is 0 below -104, +inf above 88.73, NaN for NaN. With `kOrdinary` |x| must be at most kOrdinaryExp; the bits
// are the same.
// Range reduction by ln 2 in two parts, then 1 + r + r^2 (...), a minimax polynomial of exp on [-ln 2 / 2, ln 2 / 2].
template <bool kOrdinary>
FIPO_INLINE F exponential(F x) {
  if (!kOrdinary) x = Lanes::at_most(Lanes::at_least(x, Lanes::set(-104.0f)), Lanes::set(89.0f));
  const F magic_sum = Lanes::fma(x, Lanes::set(1.44269504088896341f), Lanes::set(kMagic));
  const F n = Lanes::sub(magic_sum, Lanes::set(kMagic));
  F r = Lanes::fma(n, Lanes::set(-0.693359375f), x);
  r = Lanes::fma(n, Lanes::set(2.12194440e-4f), r);
  F p = Lanes::set(0x1.6a241ap-10f);
  p = Lanes::fma(p, r, Lanes::set(0x1.1239f2p-7f));
  p = Lanes::fma(p, r, Lanes::set(0x1.5558f2p-5f));
  p = Lanes::fma(p, r, Lanes::set(0x1.555492p-3f));
  p = Lanes::fma(p, r, Lanes::set(0x1.fffffcp-2f));
  p = Lanes::fma(p, r, Lanes::set(1.0f));
  p = Lanes::fma(p, r, Lanes::set(1.0f));
  return kOrdinary ? Lanes::add_exponent(p, magic_sum) : Lanes::scale(p, n);
}

// Addresses of the next kWidth tokens to read and write; null if absent.
struct Window {
  const float* log_probs;
  const float* old_log_probs;
  const uint8_t* mask;
  const float* advantages;
  const float* token_weights;
  float* gradient;
  float* future_kl;
  float* influence_weights;

  template <class T>
  static T* moved(T* pointer, int64_t by) {
    return pointer ? pointer + by : nullptr;
  }
  Window at(int64_t token) const {
    return {log_probs + token,
            moved(old_log_probs, token),
            mask + token,
            moved(advantages, token),
            moved(token_weights, token),
            moved(gradient, token),
            moved(future_kl, token),
            moved(influence_weights, token)};
  }
};

inline Window window_of(const Tokens& tokens) {
  return {static_cast<const float*>(tokens.log_probs),
          static_cast<const float*>(tokens.old_log_probs),
          tokens.mask,
          tokens.advantages_per_token ? tokens.advantages : nullptr,
          tokens.token_weights,
          nullptr,
          nullptr,
          nullptr};
}

// The fewer than kWidth tokens left at the start of a piece, as the last lanes of a separate window, so that
// the carry enters as in any other window. The lanes before them are masked.
class Edge {
 public:
  Edge(const Window& from, int count) : from_(from), skip_(kWidth - count) {
    window_ = {read(log_probs_, from.log_probs),
               read(old_log_probs_, from.old_log_probs),
               read(mask_, from.mask),
               read(advantages_, from.advantages),
               read(token_weights_, from.token_weights),
               from.gradient ? gradient_ : nullptr,
               future_kl_,
               from.influence_weights ? influence_weights_ : nullptr};
  }
  const Window& window() const { return window_; }
  float first_future_kl() const { return future_kl_[skip_]; }
  void write_back() const {
    write(from_.gradient, gradient_);
    write(from_.future_kl, future_kl_);
    write(from_.influence_weights, influence_weights_);
  }

 private:
  template <class T>
  const T* read(T* lanes, const T* from) const {
    if (!from) return nullptr;
    memset(lanes, 0, kWidth * sizeof(T));
    memcpy(lanes + skip_, from, (kWidth - skip_) * sizeof(T));
    return lanes;
  }
  void write(float* to, const float* lanes) const {
    if (to) memcpy(to, lanes + skip_, (kWidth - skip_) * sizeof(float));
  }

  Window from_, window_;
  int skip_;
  float log_probs_[kWidth], old_log_probs_[kWidth], advantages_[kWidth], token_weights_[kWidth];
  float gradient_[kWidth], future_kl_[kWidth], influence_weights_[kWidth];
  uint8_t mask_[kWidth];
};

struct Shift {
  F unclamped, log_ratio;  // log_ratio is clamped
  M mask, above_dual_clip;         // above_dual_clip: a loss token above the dual clip
};

FIPO_INLINE Shift load_shift(const Window& window, F clamp, F log_dual_clip) {
  F shift = Lanes::load(window.log_probs);
  if (window.old_log_probs) shift = Lanes::sub(shift, Lanes::load(window.old_log_probs));
  const F log_ratio = Lanes::at_most(Lanes::at_least(shift, Lanes::negate(clamp)), clamp);
  const M mask = Lanes::load_mask(window.mask);
  return {shift, log_ratio, mask, Lanes::bit_and(mask, Lanes::greater(log_ratio, log_dual_clip))};
}

// S_t of the window, given that of the token after it; `carry` is advanced to the window's first token.
FIPO_INLINE F scan_window(const Shift& shift, const Decay& decay, F to_end, double* carry) {
  const F terms = Lanes::select(Lanes::and_not(shift.mask, shift.above_dual_clip), shift.log_ratio, Lanes::set(0.0f));
  const F alone = Lanes::reverse_scan(terms, decay);
  const F future_kl = Lanes::fma(Lanes::set(static_cast<float>(*carry)), to_end, alone);
  *carry = static_cast<double>(Lanes::first(alone)) + decay.by_window[kWidth] * *carry;
  return future_kl;
}

FIPO_INLINE F load_to_end(const Decay& decay) { return Lanes::load(decay.to_end + kMaxLanes - kWidth); }

}  // namespace
