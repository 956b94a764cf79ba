// Four lanes in the compiler's own vectors: SSE2 on x86, NEON on aarch64, plain code elsewhere.
#pragma once

#include <stdint.h>
#include <string.h>

#include "kernels.h"

namespace {

using fipo::cpu::kMagic;

struct Lanes {
  static constexpr int kWidth = 4;
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t M __attribute__((vector_size(16)));  // -1 where true
  typedef uint32_t U __attribute__((vector_size(16)));

  static F set(float x) { return F{x, x, x, x}; }
  static F load(const float* p) {
    F x;
    memcpy(&x, p, sizeof x);
    return x;
  }
  static void store(float* p, F x) { memcpy(p, &x, sizeof x); }
  static F load_bfloat16(const uint16_t* p) { return (F)(U{p[0], p[1], p[2], p[3]} << 16); }
  // Rounds to nearest even; NaN is kept.
  static void store_bfloat16(uint16_t* p, F x) {
    const U bits = (U)x;
    const U rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const U result = (U)is_number(x) ? rounded : bits >> 16 | 0x40;
    for (int i = 0; i < kWidth; ++i) p[i] = (uint16_t)result[i];
  }
  static M load_mask(const uint8_t* p) { return M{p[0], p[1], p[2], p[3]} != 0; }

  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F fma(F a, F b, F c) { return a * b + c; }
  static F abs(F a) { return (F)((M)a & 0x7fffffff); }
  static F negate(F a) { return -a; }
  // A NaN x stays NaN, a NaN bound is ignored.
  static F at_least(F x, F bound) { return bound > x ? bound : x; }
  static F at_most(F x, F bound) { return bound < x ? bound : x; }

  static M greater(F a, F b) { return a > b; }
  static M less(F a, F b) { return a < b; }
  static M not_less(F a, F b) { return a >= b; }
  static M is_number(F a) { return a == a; }
  static M bit_and(M a, M b) { return a & b; }
  static M bit_or(M a, M b) { return a | b; }
  static M and_not(M a, M b) { return a & ~b; }
  static F select(M m, F a, F b) { return m ? a : b; }
  static int count(M m) { return -(m[0] + m[1] + m[2] + m[3]); }
  static bool any(M m) { return (m[0] | m[1] | m[2] | m[3]) != 0; }
  // Over the lanes in m: a sum, and extrema that ignore NaN.
  static F add_where(F sum, M m, F x) { return sum + select(m, x, set(0.0f)); }
  static F least_where(F least, M m, F x) { return m & (x < least) ? x : least; }
  static F largest_where(F largest, M m, F x) { return m & (x > largest) ? x : largest; }

  // x 2^n for integer n in [-152, 130], in two steps since 2^n may not be a normal number.
  static F scale(F x, F n) {
    const M whole = __builtin_convertvector(n, M);
    const M half = whole >> 1;
    const M one = {127, 127, 127, 127};
    return x * (F)((half + one) << 23) * (F)((whole - half + one) << 23);
  }
  // x 2^n for integer n, given n + kMagic, if both x and the result are normal.
  static F add_exponent(F x, F magic_sum) { return (F)((U)x + ((U)magic_sum << 23)); }
  // Rounds |x| <= 2^22 to nearest even.
  static void store_indices(int32_t* p, F x) {
    const F magic = set(kMagic), whole = (x + magic) - magic;
    for (int i = 0; i < kWidth; ++i) p[i] = (int32_t)whole[i];
  }
  static float first(F x) { return x[0]; }
  // Lane i: sum over j >= i of gamma^(j - i) x_j.
  template <class Powers>
  static F reverse_scan(F x, const Powers& gamma) {
    x = x + gamma.by_one * F{x[1], x[2], x[3], 0};
    return x + gamma.by_two * F{x[2], x[3], 0, 0};
  }
  static double sum(F x) { return ((double)x[0] + (double)x[1]) + ((double)x[2] + (double)x[3]); }
  static float smallest(F x) {
    float least = x[0];
    for (int i = 1; i < kWidth; ++i) least = x[i] < least ? x[i] : least;
    return least;
  }
  static float largest(F x) {
    float most = x[0];
    for (int i = 1; i < kWidth; ++i) most = x[i] > most ? x[i] : most;
    return most;
  }
};

}  // namespace
