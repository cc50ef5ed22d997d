// 16 bytes of plane at once in plain C++, which is correct everywhere and as fast as the compiler makes it.
#pragma once

#include <cstring>

#include "kernels.h"
#include "lanes.h"

namespace dpllm {
namespace {

struct Vec {
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  typedef int8_t Signed __attribute__((vector_size(16)));
  typedef int16_t Shorts __attribute__((vector_size(32)));
  typedef int32_t Pairs __attribute__((vector_size(32)));
  Bytes v;

  static constexpr int kBytes = 16;
  static constexpr bool kUnsigned = false, kSingle = false;
  typedef float Floats __attribute__((vector_size(16)));

  static Vec load(const uint8_t* p) { return load_part(p, 16); }
  static Vec load_part(const uint8_t* p, int bytes) {
    Vec r{};
    std::memcpy(&r.v, p, size_t(bytes));
    return r;
  }
  static Vec repeat(int byte) { return {Bytes{} + uint8_t(byte)}; }
  static Vec select(Vec mask, Vec a, Vec b) { return {(a.v & mask.v) | (b.v & ~mask.v)}; }
  template <int n>
  Vec up() const {
    return {v << n};
  }
  template <int n>
  Vec down() const {
    return {v >> n};
  }
  Vec low_nibbles() const { return {v & 15}; }

  template <int B>
  struct Table {
    uint8_t entries[B < 4 ? 16 : 1 << B];

    void load(const int8_t* digits) {
      for (int i = 0; i < int(sizeof entries); i++) entries[i] = uint8_t(digits[i % (1 << B)]);
    }
    template <int t>
    Vec at(Vec nibble, const Vec* above) const {
      Bytes code = nibble.v;
      for (int plane = 0; plane < B - 4; plane++) code |= (above[plane].v >> t & 1) << (B - 1 - plane);
      uint8_t index[16], value[16];
      std::memcpy(index, &code, 16);
      for (int i = 0; i < 16; i++) value[i] = entries[index[i]];
      return Vec::load(value);
    }
  };

  struct Sum {
    Pairs s{};  // two of them make a lane of Floats

    void add(const Vec& table, const Vec& x) {
      const Shorts products = widen(table) * widen(x);  // pairs stay within 16 bits, digits being within -127..127
      const Pairs both = reinterpret_cast<Pairs>(products);
      s += (both >> 16) + (both << 16 >> 16);
    }
    static Shorts widen(const Vec& a) { return __builtin_convertvector(reinterpret_cast<Signed>(a.v), Shorts); }
  };

  static Floats zero() { return Floats{}; }
  static Floats load_floats(const float* p) { return Floats{p[0], p[1], p[2], p[3]}; }
  static Floats multiply_add(const Sum& a, Floats b, Floats c) {
    for (int i = 0; i < 4; i++) c[i] += float(a.s[2 * i] + a.s[2 * i + 1]) * b[i];
    return c;
  }
  static float reduce(Floats f) { return (f[0] + f[2]) + (f[1] + f[3]); }
};

struct Simd : Lanes<4> {
  static Floats widen(const int8_t* p) { return Floats{float(p[0]), float(p[1]), float(p[2]), float(p[3])}; }
  static Floats from_half_vector(const uint16_t* p) {
    return Floats{from_half(p[0]), from_half(p[1]), from_half(p[2]), from_half(p[3])};
  }
  static void to_half_vector(const float* x, uint16_t* y) {
    for (int i = 0; i < 4; i++) y[i] = to_half(x[i]);
  }
  static float sum(Floats v) { return (v[0] + v[2]) + (v[1] + v[3]); }
  static void narrow(Ints v, int8_t* y) {
    for (int i = 0; i < 4; i++) y[i] = int8_t(uint8_t(v[i]));
  }
  static float from_half(uint16_t h) {
    const uint32_t exponent = h >> 10 & 31, fraction = h & 1023;
    uint32_t u;
    if (exponent == 31) u = 0x7f800000u | fraction << 13;
    else if (exponent) u = (exponent + 112) << 23 | fraction << 13;
    else {
      const float small = float(fraction) * 0x1p-24f;
      std::memcpy(&u, &small, 4);
    }
    u |= uint32_t(h & 0x8000) << 16;
    float x;
    std::memcpy(&x, &u, 4);
    return x;
  }
  static uint16_t to_half(float x) {  // round to nearest, ties to even
    uint32_t u;
    std::memcpy(&u, &x, 4);
    const uint32_t sign = u >> 16 & 0x8000;
    u &= 0x7fffffff;
    if (u > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (u >= 0x477ff000) return uint16_t(sign | 0x7c00);
    if (u < 0x38800000) {  // below the normal range: let a float addition round
      float magnitude;
      std::memcpy(&magnitude, &u, 4);
      magnitude += 0.5f;
      std::memcpy(&u, &magnitude, 4);
      return uint16_t(sign | (u - 0x3f000000));
    }
    return uint16_t(sign | ((u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13));
  }
};

}  // namespace
}  // namespace dpllm
