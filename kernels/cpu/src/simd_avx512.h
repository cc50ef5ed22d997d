// Float vectors of 16 lanes, for both AVX-512 variants.
#pragma once

#include <immintrin.h>

#include "lanes.h"

namespace dpllm {
namespace {

struct Simd : Lanes<16> {
  static Floats widen(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static Floats from_half_vector(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void to_half_vector(const float* x, uint16_t* y) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), _mm512_cvtps_ph(_mm512_loadu_ps(x), 0));
  }
  static float sum(Floats v) { return _mm512_reduce_add_ps(v); }
  static void narrow(Ints v, int8_t* y) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(v)));
  }
  static float from_half(uint16_t h) { return _mm512_cvtss_f32(_mm512_cvtph_ps(_mm256_set1_epi16(short(h)))); }
  static uint16_t to_half(float x) {
    return uint16_t(_mm256_extract_epi16(_mm512_cvtps_ph(_mm512_set1_ps(x), 0), 0));
  }
};

}  // namespace
}  // namespace dpllm
