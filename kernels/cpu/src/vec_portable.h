// 16 bytes of plane at once in plain C++: correct everywhere, and what the compiler makes of it.
#pragma once

#include <cstring>

#include "kernels.h"
#include "lanes.h"

namespace dpllm {
namespace {

struct Vec {
  uint8_t v[16];

  static constexpr int kBytes = 16;
  static constexpr bool kUnsigned = false;
  struct Floats {
    float lane[4];
  };

  static Vec load(const uint8_t* p) { return load_part(p, 16); }
  static Vec load_part(const uint8_t* p, int bytes) {
    Vec r{};
    std::memcpy(r.v, p, size_t(bytes));
    return r;
  }
  static Vec repeat(int byte) {
    return each([=](int) { return byte; });
  }
  static Vec select(Vec mask, Vec a, Vec b) {
    return each([&](int i) { return (a.v[i] & mask.v[i]) | (b.v[i] & ~mask.v[i]); });
  }
  template <int n>
  Vec up() const {
    return each([&](int i) { return v[i] << n; });
  }
  template <int n>
  Vec down() const {
    return each([&](int i) { return v[i] >> n; });
  }
  Vec low_nibbles() const {
    return each([&](int i) { return v[i] & 15; });
  }

  template <int B>
  struct Table {
    uint8_t entries[B < 4 ? 16 : 1 << B];

    void load(const int8_t* digits) {
      for (int i = 0; i < int(sizeof entries); i++) entries[i] = uint8_t(digits[i % (1 << B)]);
    }
    template <int t>
    Vec at(Vec nibble, const Vec* above) const {
      return each([&](int i) {
        int high = 0;
        for (int plane = 0; plane < B - 4; plane++) high = high << 1 | (above[plane].v[i] >> t & 1);
        return entries[high << 4 | nibble.v[i]];
      });
    }
  };

  struct Sum {
    int32_t lane[4] = {};

    void add(const Vec& table, const Vec& x) {
      for (int i = 0; i < 16; i++) lane[i / 4] += int8_t(table.v[i]) * int8_t(x.v[i]);
    }
  };

  static Floats zero() { return {}; }
  static Floats load_floats(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }
  static Floats multiply_add(const Sum& a, Floats b, Floats c) {
    for (int i = 0; i < 4; i++) c.lane[i] += float(a.lane[i]) * b.lane[i];
    return c;
  }
  static float reduce(Floats f) { return (f.lane[0] + f.lane[2]) + (f.lane[1] + f.lane[3]); }

 private:
  template <class F>
  static Vec each(F f) {
    Vec r;
    for (int i = 0; i < 16; i++) r.v[i] = uint8_t(f(i));
    return r;
  }
};

struct Simd : Lanes<4> {
  static Floats widen(const int8_t* p) { return Floats{float(p[0]), float(p[1]), float(p[2]), float(p[3])}; }
  static Floats from_half_vector(const uint16_t* p) {
    return Floats{from_half(p[0]), from_half(p[1]), from_half(p[2]), from_half(p[3])};
  }
  static void to_half_vector(const float* x, uint16_t* y) {
    for (int i = 0; i < 4; i++) y[i] = to_half(x[i]);
  }
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
