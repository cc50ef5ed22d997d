// 16 bytes of plane at once for aarch64, with or without the dot-product extension.
#pragma once

#include <arm_neon.h>

#include "kernels.h"
#include "lanes.h"

namespace dpllm {
namespace {

struct Vec {
  uint8x16_t v;

  static constexpr int kBytes = 16;
  static constexpr bool kUnsigned = false;
  static constexpr bool kSingle = true;
  using Floats = float32x4_t;

  static Vec load(const uint8_t* p) { return {vld1q_u8(p)}; }
  static Vec load_part(const uint8_t* p, int bytes) {
    uint8_t part[16] = {};
    __builtin_memcpy(part, p, size_t(bytes));
    return {vld1q_u8(part)};
  }
  static Vec repeat(int byte) { return {vdupq_n_u8(uint8_t(byte))}; }
  static Vec select(Vec mask, Vec a, Vec b) { return {vbslq_u8(mask.v, a.v, b.v)}; }
  template <int n>
  Vec up() const {
    return {vshlq_n_u8(v, n)};
  }
  template <int n>
  Vec down() const {
    return {vshrq_n_u8(v, n)};
  }
  Vec low_nibbles() const { return {vandq_u8(v, vdupq_n_u8(15))}; }

  template <int B>
  struct Table {
    static constexpr int kParts = B <= 4 ? 1 : 1 << (B - 4);
    uint8x16_t part[kParts];

    DPLLM_INLINE void load(const int8_t* digits) {
      if constexpr (B <= 3) {
        uint64_t eight = 0;
        __builtin_memcpy(&eight, digits, 1 << B);
        if constexpr (B == 2) eight |= eight << 32;
        part[0] = vreinterpretq_u8_u64(vdupq_n_u64(eight));
      } else {
        for (int i = 0; i < kParts; i++) part[i] = vld1q_u8(reinterpret_cast<const uint8_t*>(digits + 16 * i));
      }
    }

    // Codes at bit t (nibble and up to four planes above it), then table look-ups of 16 to 64 entries; an index
    // outside a table leaves the entry that an earlier look-up found.
    template <int t>
    DPLLM_INLINE Vec at(Vec nibble, const Vec* above) const {
      if constexpr (B <= 4) {
        return {vqtbl1q_u8(part[0], nibble.v)};
      } else {
        uint8x16_t code = nibble.v;
        for (int plane = 0; plane < B - 4; plane++) {
          const int place = B - 1 - plane;  // of this plane's bit in the code
          const uint8x16_t bit = vandq_u8(above[plane].v, vdupq_n_u8(1 << t));
          const int8x16_t shift = vdupq_n_s8(int8_t(place - t));
          code = vorrq_u8(code, vshlq_u8(bit, shift));
        }
        if constexpr (B == 5) {
          return {vqtbl2q_u8(uint8x16x2_t{{part[0], part[1]}}, code)};
        } else {
          uint8x16_t value = vqtbl4q_u8(quad(0), code);
          for (int q = 1; q < kParts / 4; q++)
            value = vqtbx4q_u8(value, quad(q), vsubq_u8(code, vdupq_n_u8(uint8_t(64 * q))));
          return {value};
        }
      }
    }

    uint8x16x4_t quad(int q) const {
      return {{part[4 * q], part[4 * q + 1], part[4 * q + 2], part[4 * q + 3]}};
    }
  };

  struct Sum {
    int32x4_t s = vdupq_n_s32(0);

    DPLLM_INLINE void add(Vec table, Vec x) {
      const int8x16_t a = vreinterpretq_s8_u8(table.v), b = vreinterpretq_s8_u8(x.v);
#ifdef __ARM_FEATURE_DOTPROD
      s = vdotq_s32(s, a, b);
#else  // lanes of four columns, as the scales expect
      const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
      s = vaddq_s32(s, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
    }
  };

  static Floats zero() { return vdupq_n_f32(0); }
  static Floats load_floats(const float* p) { return vld1q_f32(p); }
  static Floats multiply_add(Sum a, Floats b, Floats c) { return vfmaq_f32(c, vcvtq_f32_s32(a.s), b); }
  static float reduce(Floats f) { return vaddvq_f32(f); }
};

struct Simd : Lanes<4> {
  static Floats widen(const int8_t* p) {
    int8_t bytes[8] = {p[0], p[1], p[2], p[3]};
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vld1_s8(bytes)))));
  }
  static Floats from_half_vector(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  static void to_half_vector(const float* x, uint16_t* y) {
    vst1_u16(y, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(x))));
  }
  static float sum(Floats v) { return vaddvq_f32(v); }
  static void narrow(Ints v, int8_t* y) {
    const uint8x16_t bytes = reinterpret_cast<uint8x16_t>(v);
    const uint8x16_t first = vreinterpretq_u8_u32(vdupq_n_u32(0x0c080400));
    const uint32_t four = vgetq_lane_u32(vreinterpretq_u32_u8(vqtbl1q_u8(bytes, first)), 0);
    __builtin_memcpy(y, &four, 4);
  }
  static float from_half(uint16_t h) { return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(h))), 0); }
  static uint16_t to_half(float x) { return vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32(x))), 0); }
};

}  // namespace
}  // namespace dpllm
