// Eight lanes of AVX2 with FMA. The meaning of each function is in lanes_scalar.h.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace {

struct Lanes {
  static constexpr int kWidth = 8;
  using F = __m256;
  using M = __m256;

  static F set(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F load_bfloat16(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static void store_bfloat16(uint16_t* p, F x) {
    const __m256i bits = _mm256_castps_si256(x), upper = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
    const __m256i result =
        _mm256_blendv_epi8(quiet, _mm256_srli_epi32(sum, 16), _mm256_castps_si256(is_number(x)));
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(result, result), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  static M load_mask(const uint8_t* p) {
    const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(wide, _mm256_setzero_si256()));
  }

  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static F negate(F a) { return _mm256_xor_ps(a, _mm256_set1_ps(-0.0f)); }
  static F at_least(F x, F bound) { return _mm256_max_ps(bound, x); }
  static F at_most(F x, F bound) { return _mm256_min_ps(bound, x); }

  static M greater(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
  static M less(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
  static M not_less(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
  static M is_number(F a) { return _mm256_cmp_ps(a, a, _CMP_ORD_Q); }
  static M bit_and(M a, M b) { return _mm256_and_ps(a, b); }
  static M bit_or(M a, M b) { return _mm256_or_ps(a, b); }
  static M and_not(M a, M b) { return _mm256_andnot_ps(b, a); }
  static F select(M m, F a, F b) { return _mm256_blendv_ps(b, a, m); }
  static int count(M m) { return __builtin_popcount(_mm256_movemask_ps(m)); }
  static bool any(M m) { return _mm256_movemask_ps(m) != 0; }
  static F add_where(F sum, M m, F x) { return _mm256_add_ps(sum, _mm256_and_ps(m, x)); }
  static F least_where(F least, M m, F x) { return _mm256_min_ps(select(m, x, least), least); }
  static F largest_where(F largest, M m, F x) { return _mm256_max_ps(select(m, x, largest), largest); }

  static F scale(F x, F n) {
    const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    return _mm256_mul_ps(_mm256_mul_ps(x, power_of_two(half)), power_of_two(_mm256_sub_epi32(whole, half)));
  }
  static F add_exponent(F x, F magic_sum) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(magic_sum), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), exponent));
  }
  static void store_indices(int32_t* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_cvtps_epi32(x));
  }
  static float first(F x) { return _mm256_cvtss_f32(x); }
  template <class Powers>
  static F reverse_scan(F x, const Powers& gamma) {
    const F zero = _mm256_setzero_ps();
    const F next = _mm256_permutevar8x32_ps(x, _mm256_setr_epi32(1, 2, 3, 4, 5, 6, 7, 7));
    x = fma(set(gamma.by_one), _mm256_blend_ps(next, zero, 0x80), x);
    const F second = _mm256_permutevar8x32_ps(x, _mm256_setr_epi32(2, 3, 4, 5, 6, 7, 7, 7));
    x = fma(set(gamma.by_two), _mm256_blend_ps(second, zero, 0xc0), x);
    return fma(set(gamma.by_four), _mm256_permute2f128_ps(x, x, 0x81), x);
  }
  static double sum(F x) {
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(x)), high = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
    const __m256d four = _mm256_add_pd(low, high);
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
  }
  static float smallest(F x) {
    __m128 four = _mm_min_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    four = _mm_min_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_min_ss(four, _mm_movehdup_ps(four)));
  }
  static float largest(F x) { return -smallest(negate(x)); }

 private:
  static F power_of_two(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }
};

}  // namespace
