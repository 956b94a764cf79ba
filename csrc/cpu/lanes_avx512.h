// Sixteen lanes of AVX-512 (F, BW, DQ, VL). The meaning of each function is in lanes_scalar.h.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace {

struct Lanes {
  static constexpr int kWidth = 16;
  using F = __m512;
  using M = __mmask16;

  static F set(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F load_bfloat16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static void store_bfloat16(uint16_t* p, F x) {
    const __m512i bits = _mm512_castps_si512(x), upper = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i quiet = _mm512_or_si512(upper, _mm512_set1_epi32(0x40));
    const __m512i result = _mm512_mask_blend_epi32(is_number(x), quiet, _mm512_srli_epi32(sum, 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(result));
  }
  static M load_mask(const uint8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm_test_epi8_mask(bytes, bytes);
  }

  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  static F negate(F a) { return _mm512_xor_ps(a, _mm512_set1_ps(-0.0f)); }
  static F at_least(F x, F bound) { return _mm512_max_ps(bound, x); }
  static F at_most(F x, F bound) { return _mm512_min_ps(bound, x); }

  static M greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static M less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static M not_less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
  static M is_number(F a) { return _mm512_cmp_ps_mask(a, a, _CMP_ORD_Q); }
  static M bit_and(M a, M b) { return a & b; }
  static M bit_or(M a, M b) { return a | b; }
  static M and_not(M a, M b) { return a & static_cast<M>(~b); }
  static F select(M m, F a, F b) { return _mm512_mask_blend_ps(m, b, a); }
  static int count(M m) { return __builtin_popcount(m); }
  static bool any(M m) { return m != 0; }
  static F add_where(F sum, M m, F x) { return _mm512_mask_add_ps(sum, m, sum, x); }
  static F least_where(F least, M m, F x) { return _mm512_mask_min_ps(least, m, x, least); }
  static F largest_where(F largest, M m, F x) { return _mm512_mask_max_ps(largest, m, x, largest); }

  static F scale(F x, F n) { return _mm512_scalef_ps(x, n); }
  static F add_exponent(F x, F magic_sum) {
    return _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_castps_si512(x), _mm512_slli_epi32(_mm512_castps_si512(magic_sum), 23)));
  }
  static void store_indices(int32_t* p, F x) { _mm512_storeu_si512(p, _mm512_cvtps_epi32(x)); }
  static float first(F x) { return _mm512_cvtss_f32(x); }
  template <class Powers>
  static F reverse_scan(F x, const Powers& gamma) {
    x = fma(set(gamma.by_one), shifted<1>(x), x);
    x = fma(set(gamma.by_two), shifted<2>(x), x);
    x = fma(set(gamma.by_four), shifted<4>(x), x);
    return fma(set(gamma.by_eight), shifted<8>(x), x);
  }
  static double sum(F x) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
    return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
  }
  static float smallest(F x) { return _mm512_reduce_min_ps(x); }
  static float largest(F x) { return _mm512_reduce_max_ps(x); }

 private:
  // Lane i holds x_{i + k}, 0 beyond the last.
  template <int k>
  static F shifted(F x) {
    return _mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_setzero_si512(), _mm512_castps_si512(x), k));
  }
};

}  // namespace
