// 32 bytes of plane at once, with or without AVX-VNNI.
#pragma once

#include <immintrin.h>

#include "kernels.h"
#include "lanes.h"

namespace dpllm {
namespace {

struct Vec {
  __m256i v;

  static constexpr int kBytes = 32;
#ifdef __AVXVNNI__
  static constexpr bool kUnsigned = true;  // vpdpbusd: table entries are digit + 128
#else
  static constexpr bool kUnsigned = false;
#endif
  static constexpr bool kSingle = true;
  using Floats = __m256;

  static Vec load(const uint8_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
  static Vec load_part(const uint8_t* p, int bytes) {  // a multiple of 4
    const __m256i lane = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(bytes), lane);
    return {_mm256_maskload_epi32(reinterpret_cast<const int*>(p), mask)};
  }
  static Vec repeat(int byte) { return {_mm256_set1_epi8(char(byte))}; }
  static Vec select(Vec mask, Vec a, Vec b) {
    return {_mm256_or_si256(_mm256_and_si256(mask.v, a.v), _mm256_andnot_si256(mask.v, b.v))};
  }
  template <int n>  // shifts across byte borders: callers mask the bits of the neighbour
  Vec up() const {
    return {_mm256_slli_epi16(v, n)};
  }
  template <int n>
  Vec down() const {
    return {_mm256_srli_epi16(v, n)};
  }
  Vec low_nibbles() const { return {_mm256_and_si256(v, _mm256_set1_epi8(15))}; }

  template <int B>
  struct Table {
    static constexpr int kParts = B <= 4 ? 1 : 1 << (B - 4);
    __m256i part[kParts];

    DPLLM_INLINE void load(const int8_t* digits) {
      if constexpr (B <= 3) {
        int64_t eight = 0;
        __builtin_memcpy(&eight, digits, 1 << B);
        if constexpr (B == 2) eight |= eight << 32;
        part[0] = _mm256_set1_epi64x(eight);
      } else {
        for (int i = 0; i < kParts; i++)
          part[i] = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(digits + 16 * i)));
      }
      if (kUnsigned)
        for (__m256i& p : part) p = _mm256_xor_si256(p, _mm256_set1_epi8(char(0x80)));
    }

    // Entries of the codes at bit t: nibble from the low planes, bit t of `above` from the others.
    template <int t>
    DPLLM_INLINE Vec at(Vec nibble, const Vec* above) const {
      __m256i value[kParts];
      for (int i = 0; i < kParts; i++) value[i] = _mm256_shuffle_epi8(part[i], nibble.v);
      for (int plane = B - 5, pairs = kParts / 2; pairs >= 1; plane--, pairs /= 2) {
        const __m256i bit = _mm256_slli_epi16(above[plane].v, 7 - t);
        for (int i = 0; i < pairs; i++) value[i] = _mm256_blendv_epi8(value[2 * i], value[2 * i + 1], bit);
      }
      return {value[0]};
    }
  };

  struct Sum {
    __m256i s = _mm256_setzero_si256();

    DPLLM_INLINE void add(Vec table, Vec x) {
#ifdef __AVXVNNI__
      s = _mm256_dpbusd_avx_epi32(s, table.v, x.v);
#else  // |x| * sign(table, x): pairs stay within 16 bits, digits being within -127..127
      const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x.v), _mm256_sign_epi8(table.v, x.v));
      s = _mm256_add_epi32(s, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
    }
  };

  static Floats zero() { return _mm256_setzero_ps(); }
  static Floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
  static Floats multiply_add(Sum a, Floats b, Floats c) { return _mm256_fmadd_ps(_mm256_cvtepi32_ps(a.s), b, c); }
  static float reduce(Floats f) {
    __m128 r = _mm_add_ps(_mm256_castps256_ps128(f), _mm256_extractf128_ps(f, 1));
    r = _mm_add_ps(r, _mm_movehl_ps(r, r));
    return _mm_cvtss_f32(_mm_add_ss(r, _mm_movehdup_ps(r)));
  }
};

struct Simd : Lanes<8> {
  static Floats widen(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static Floats from_half_vector(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void to_half_vector(const float* x, uint16_t* y) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y), _mm256_cvtps_ph(_mm256_loadu_ps(x), 0));
  }
  static float sum(Floats v) { return Vec::reduce(v); }
  static void narrow(Ints v, int8_t* y) {
    const __m256i first = _mm256_setr_epi32(0x0c080400, -1, -1, -1, 0x0c080400, -1, -1, -1);
    const __m256i bytes = _mm256_shuffle_epi8(reinterpret_cast<__m256i>(v), first);
    const int32_t parts[2] = {_mm256_extract_epi32(bytes, 0), _mm256_extract_epi32(bytes, 4)};
    __builtin_memcpy(y, parts, 8);
  }
  static float from_half(uint16_t h) { return _cvtsh_ss(h); }
  static uint16_t to_half(float x) { return _cvtss_sh(x, 0); }
};

}  // namespace
}  // namespace dpllm
