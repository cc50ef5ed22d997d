// The small operations of a decode step, written once over vectors of Simd::kLanes floats.
//
// Included by one translation unit per instruction set, after it has defined `Simd` (see lanes.h). Everything has internal linkage:
// the linker would otherwise merge same-named functions that were compiled for different processors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "dispatch.h"
#include "kernels.h"

namespace dpllm {
namespace {

constexpr int kLanes = Simd::kLanes;
typedef Simd::Floats Floats;
typedef Simd::Ints Ints;

template <class V, class T>
inline V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V, class T>
inline void store(T* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

inline Floats all(float x) { return Floats{} + x; }

inline float sum(Floats v) { return Simd::sum(v); }

// e^x to about 1 part in 10^7, saturating at the ends of the float range; NaN stays NaN.
inline Floats exp(Floats x) {
  x = x < -87.3f ? all(-87.3f) : x;
  x = x > 88.7f ? all(88.7f) : x;
  const Floats shifted = x * 1.44269504f + 12582912.f;  // adding 1.5 * 2^23 rounds to an integer
  const Floats n = shifted - 12582912.f;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const Ints exponent = (reinterpret_cast<Ints>(shifted) << 23) + 0x3f800000;
  return p * reinterpret_cast<Floats>(exponent);
}

// Calls body(i, n) over 0..n-1 in whole vectors, then tail(i) for the rest.
template <class Body, class Tail>
inline void sweep(int n, Body body, Tail tail) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i);
  for (; i < n; i++) tail(i);
}

inline float dot(const float* a, const float* b, int n) {
  Floats s0{}, s1{}, s2{}, s3{};
  int i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    s0 += load<Floats>(a + i) * load<Floats>(b + i);
    s1 += load<Floats>(a + i + kLanes) * load<Floats>(b + i + kLanes);
    s2 += load<Floats>(a + i + 2 * kLanes) * load<Floats>(b + i + 2 * kLanes);
    s3 += load<Floats>(a + i + 3 * kLanes) * load<Floats>(b + i + 3 * kLanes);
  }
  for (; i + kLanes <= n; i += kLanes) s0 += load<Floats>(a + i) * load<Floats>(b + i);
  float s = sum((s0 + s1) + (s2 + s3));
  for (; i < n; i++) s += a[i] * b[i];
  return s;
}

inline float dot(const int8_t* a, const float* b, int n) {
  Floats s0{}, s1{}, s2{}, s3{};
  const auto term = [&](int i) {
    return Simd::widen(a + i) * load<Floats>(b + i);
  };
  int i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    s0 += term(i), s1 += term(i + kLanes), s2 += term(i + 2 * kLanes), s3 += term(i + 3 * kLanes);
  }
  for (; i + kLanes <= n; i += kLanes) s0 += term(i);
  float s = sum((s0 + s1) + (s2 + s3));
  for (; i < n; i++) s += a[i] * b[i];
  return s;
}

void int8_gemv(const int8_t* w, const uint16_t* scale, const float* x, int columns, float* y, int n0, int n1) {
  for (int n = n0; n < n1; n++) {
    const int8_t* row = w + int64_t(n) * columns;
    for (int i = 0; i < columns; i += 64) __builtin_prefetch(row + i + 2048);
    y[n] = dot(row, x, columns) * Simd::from_half(scale[n]);
  }
}

void float_gemv(const float* w, const float* x, int columns, float* y, int n0, int n1) {
  for (int n = n0; n < n1; n++) y[n] = dot(w + int64_t(n) * columns, x, columns);
}

void rms_norm(const float* x, const float* weight, float eps, int n, float* y) {
  const float r = 1.f / std::sqrt(dot(x, x, n) / float(n) + eps);
  sweep(
      n, [&](int i) { store(y + i, load<Floats>(x + i) * r * load<Floats>(weight + i)); },
      [&](int i) { y[i] = x[i] * r * weight[i]; });
}

void silu_mul(const float* gate, const float* up, int n, float* out) {
  sweep(
      n,
      [&](int i) {
        const Floats g = load<Floats>(gate + i);
        store(out + i, g / (exp(-g) + 1.f) * load<Floats>(up + i));
      },
      [&](int i) { out[i] = gate[i] / (std::exp(-gate[i]) + 1.f) * up[i]; });
}

void add(const float* x, int n, float* y) {
  sweep(
      n, [&](int i) { store(y + i, load<Floats>(y + i) + load<Floats>(x + i)); }, [&](int i) { y[i] += x[i]; });
}

void rope(float* x, const float* cos, const float* sin, int dim) {
  float *a = x, *b = x + dim / 2;
  sweep(
      dim / 2,
      [&](int i) {
        const Floats p = load<Floats>(a + i), q = load<Floats>(b + i);
        const Floats c = load<Floats>(cos + i), s = load<Floats>(sin + i);
        store(a + i, p * c - q * s);
        store(b + i, q * c + p * s);
      },
      [&](int i) {
        const float p = a[i], q = b[i];
        a[i] = p * cos[i] - q * sin[i];
        b[i] = q * cos[i] + p * sin[i];
      });
}

float weighted_square(const float* x, const uint16_t* diagonal, int n) {
  Floats s{};
  float rest = 0;
  sweep(
      n,
      [&](int i) {
        const Floats v = load<Floats>(x + i);
        s += v * v * Simd::from_half_vector(diagonal + i);
      },
      [&](int i) { rest += x[i] * x[i] * Simd::from_half(diagonal[i]); });
  return sum(s) + rest;
}

inline uint16_t to_bf16(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t(u >> 16 | 0x40);
  return uint16_t((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}

inline float from_bf16(uint16_t h) {
  const uint32_t u = uint32_t(h) << 16;
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

void store_pair(const float* x, Storage storage, void* out, int n) {
  uint16_t* y = static_cast<uint16_t*>(out);
  if (storage == Storage::kFloat32) std::memcpy(out, x, sizeof(float) * n);
  else if (storage == Storage::kBfloat16)
    for (int i = 0; i < n; i++) y[i] = to_bf16(x[i]);
  else
    sweep(
        n, [&](int i) { Simd::to_half_vector(x + i, y + i); }, [&](int i) { y[i] = Simd::to_half(x[i]); });
}

// A vector, or one value, of a cache from element `at` on.
template <Storage kStorage>
DPLLM_INLINE Floats cached(const void* base, int64_t at) {
  if constexpr (kStorage == Storage::kFloat32) return load<Floats>(static_cast<const float*>(base) + at);
  const uint16_t* p = static_cast<const uint16_t*>(base) + at;
  if constexpr (kStorage == Storage::kFloat16) return Simd::from_half_vector(p);
  typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
  Floats out;
  uint32_t wide[kLanes];
  const Halves narrow = load<Halves>(p);
  for (int i = 0; i < kLanes; i++) wide[i] = uint32_t(narrow[i]) << 16;
  std::memcpy(&out, wide, sizeof out);
  return out;
}

inline float cached_one(const void* base, int64_t at, Storage storage) {
  if (storage == Storage::kFloat32) return static_cast<const float*>(base)[at];
  const uint16_t value = static_cast<const uint16_t*>(base)[at];
  return storage == Storage::kFloat16 ? Simd::from_half(value) : from_bf16(value);
}

// Scores to weights exp(score - top) in place; returns their sum.
inline float soften(float* scores, int n, float top) {
  Floats s{};
  float rest = 0;
  sweep(
      n,
      [&](int i) {
        const Floats e = exp(load<Floats>(scores + i) - top);
        store(scores + i, e);
        s += e;
      },
      [&](int i) { rest += scores[i] = std::exp(scores[i] - top); });
  return sum(s) + rest;
}

// out[g][d..d+kLanes*kVectors) = sum over positions of weight[g][i] * v[i][d..], for kHeads heads.
template <int kHeads, int kVectors, Storage kStorage>
inline void mix(const Run& run, const float* weights, int d, float* out) {
  Floats total[kHeads][kVectors] = {};
  for (int i = 0; i < run.length; i++) {
    for (int j = 0; j < kVectors; j++) {
      const int64_t at = int64_t(i) * run.dim + d + j * kLanes;
      const Floats v = cached<kStorage>(run.v, at);
      for (int g = 0; g < kHeads; g++) total[g][j] += v * weights[g * run.length + i];
    }
  }
  for (int g = 0; g < kHeads; g++)
    for (int j = 0; j < kVectors; j++) store(out + g * run.dim + d + j * kLanes, total[g][j]);
}

// The same for one column of one head, for the rest where the head size is not a multiple of the vector.
inline float mix_one(const Run& run, const float* weights, int d) {
  float total = 0;
  for (int i = 0; i < run.length; i++) {
    total += weights[i] * cached_one(run.v, int64_t(i) * run.dim + d, run.storage);
  }
  return total;
}

template <int kHeads, Storage kStorage>
inline void mix_heads(const Run& run, const float* weights, float* out) {
  int d = 0;
  for (; d + 2 * kLanes <= run.dim; d += 2 * kLanes) mix<kHeads, 2, kStorage>(run, weights, d, out);
  for (; d + kLanes <= run.dim; d += kLanes) mix<kHeads, 1, kStorage>(run, weights, d, out);
  for (; d < run.dim; d++)
    for (int g = 0; g < kHeads; g++) out[g * run.dim + d] = mix_one(run, weights + g * run.length, d);
}

template <Storage kStorage>
inline void mix_all(const Run& run, const float* weights, float* out) {
  int g = 0;
  for (; g + 4 <= run.group; g += 4) mix_heads<4, kStorage>(run, weights + g * run.length, out + g * run.dim);
  for (; g < run.group; g++) mix_heads<1, kStorage>(run, weights + g * run.length, out + g * run.dim);
}

// Scores of one position under kHeads heads, for head sizes that are a multiple of the vector.
template <int kHeads, Storage kStorage>
inline void score(const Run& run, int i, const float* q, float* scores) {
  Floats total[kHeads] = {};
  for (int d = 0; d < run.dim; d += kLanes) {
    const int64_t at = int64_t(i) * run.dim + d;
    const Floats k = cached<kStorage>(run.k, at);
    for (int g = 0; g < kHeads; g++) total[g] += k * load<Floats>(q + g * run.dim + d);
  }
  for (int g = 0; g < kHeads; g++) scores[g * run.length + i] = sum(total[g]) * run.scale;
}

template <Storage kStorage>
inline void score_all(const Run& run, float* scores) {
  const char* keys = static_cast<const char*>(run.k);
  const int64_t row = int64_t(run.dim) * storage_bytes(kStorage);
  for (int i = 0; i < run.length; i++) {
    for (int64_t at = 0; at < row; at += 64) __builtin_prefetch(keys + (i + 16) * row + at);
    int g = 0;
    for (; g + 4 <= run.group; g += 4) score<4, kStorage>(run, i, run.q + g * run.dim, scores + g * run.length);
    for (; g < run.group; g++) score<1, kStorage>(run, i, run.q + g * run.dim, scores + g * run.length);
  }
}

// The same for head sizes that are not a multiple of the vector.
inline void score_odd(const Run& run, float* scores) {
  for (int i = 0; i < run.length; i++)
    for (int g = 0; g < run.group; g++) {
      const float* q = run.q + g * run.dim;
      float total = 0;
      for (int d = 0; d < run.dim; d++) total += q[d] * cached_one(run.k, int64_t(i) * run.dim + d, run.storage);
      scores[g * run.length + i] = total * run.scale;
    }
}

// The largest value that is not NaN. A NaN takes effect later, when scores become weights.
inline float largest(const float* x, int n) {
  Floats most = all(-INFINITY);
  float top = -INFINITY;
  sweep(
      n,
      [&](int i) {
        const Floats v = load<Floats>(x + i);
        most = v > most ? v : most;
      },
      [&](int i) { top = x[i] > top ? x[i] : top; });
  float lanes[kLanes];
  store(lanes, most);
  for (float v : lanes) top = v > top ? v : top;
  return top;
}

template <Storage kStorage>
void attend_stored(const Run& run, float* scratch, float* out, float* top, float* sums) {
  if (run.dim % kLanes) score_odd(run, scratch);
  else score_all<kStorage>(run, scratch);
  for (int g = 0; g < run.group; g++) {
    float* scores = scratch + g * run.length;
    top[g] = largest(scores, run.length);
    sums[g] = soften(scores, run.length, top[g]);
  }
  mix_all<kStorage>(run, scratch, out);
}

void attend(const Run& run, float* scratch, float* out, float* top, float* sums) {
  switch (run.storage) {
    case Storage::kFloat32: return attend_stored<Storage::kFloat32>(run, scratch, out, top, sums);
    case Storage::kFloat16: return attend_stored<Storage::kFloat16>(run, scratch, out, top, sums);
    case Storage::kBfloat16: return attend_stored<Storage::kBfloat16>(run, scratch, out, top, sums);
  }
}

}  // namespace
}  // namespace dpllm

#include "draw_ops.h"
#include "prompt_attention.h"

namespace dpllm {
namespace {

// -- activations ---------------------------------------------------------------------------------------------------

struct Quantized {
  float scale;  // of the last digit
  int sum;      // of the values in units of the scale
};

// One group of 32 values to digits.
inline Quantized quantize_group(const float* x, int digits, int8_t* high, int8_t* low) {
  constexpr int kVectors = kGroup / kLanes;
  Ints largest{};
  for (int i = 0; i < kVectors; i++) {
    const Ints bits = load<Ints>(x + i * kLanes) & 0x7fffffff;  // |x|; NaN is above every number
    largest = bits > largest ? bits : largest;
  }
  int32_t lanes[kLanes], top_bits = 0;
  store(lanes, largest);
  for (int32_t b : lanes) top_bits = b > top_bits ? b : top_bits;
  float top;
  std::memcpy(&top, &top_bits, 4);
  if (top_bits >= 0x7f800000 || top < 1e-35f) {  // not finite, or too small
    std::memset(high, 0, kGroup);
    std::memset(low, 0, kGroup);
    return {top_bits >= 0x7f800000 ? NAN : 0.f, 0};
  }
  const float steps = digits == 1 ? 127.f : 127.f * kBase + 127.f;
  const float inverse = steps / top, round = 12582912.f;  // adding 1.5 * 2^23 rounds, and leaves an integer in the bits
  Ints total{};
  for (int i = 0; i < kVectors; i++) {
    const Floats v = (load<Floats>(x + i * kLanes) * inverse + round) - round;
    const Floats shifted = (digits == 1 ? v : v * (1.f / kBase)) + round;
    Simd::narrow(reinterpret_cast<Ints>(shifted), high + i * kLanes);
    const Floats rest = v - (shifted - round) * kBase;
    if (digits == 2) Simd::narrow(reinterpret_cast<Ints>(rest + round), low + i * kLanes);
    total += reinterpret_cast<Ints>(v + round) - 0x4b400000;
  }
  store(lanes, total);
  int sum = 0;
  for (int32_t t : lanes) sum += t;
  return {top / steps, sum};
}

// Layout::place(group, its digits, the memory of all digits) and place_scale() define the kernel's order.
template <class Layout>
void quantize_as(const float* x, int columns, int digits, Activation* out) {
  const bool twice = Layout::kTwice && (columns + kGroup - 1) / kGroup * kGroup == Layout::kTwice;
  const int groups = (twice ? Layout::kTwice : padded(columns)) / kGroup;
  double correction = 0;
  out->digits = digits;
  for (int g = 0; g < groups; g++) {
    alignas(64) int8_t high[kGroup], low[kGroup];
    float padded_values[kGroup];
    const float* values = x + g * kGroup;
    if (const int left = columns - g * kGroup; left < kGroup) {
      std::memset(padded_values, 0, sizeof padded_values);
      if (left > 0) std::memcpy(padded_values, values, sizeof(float) * left);
      values = padded_values;
    }
    const Quantized q = quantize_group(values, digits, high, low);
    for (int copy = g; copy <= g + groups * twice; copy += groups) {
      Layout::place(copy, high, out->high);
      if (digits == 2) Layout::place(copy, low, out->low);
      Layout::place_scale(copy, q.scale, out->scale);
    }
    correction += 128. * q.scale * q.sum;
  }
  out->correction = float(correction);
}

}  // namespace
}  // namespace dpllm

#include "descend.h"

namespace dpllm {
namespace {

// The table of functions. Functions that depend on the instruction set beyond vector types are arguments; products of many
// rows are added by the instruction sets that have them.
template <class Layout, template <int, int, int> class Rows>
constexpr Isa make_isa(const char* name, const char* needs, bool (*supported)()) {
  return Isa{name,     needs,      supported,  quantize_as<Layout>, gemv_by<Rows>, nullptr,
             int8_gemv, float_gemv, rms_norm,  silu_mul,            add,           rope,
             weighted_square, attend, attend_prompt, attention_peaks, block_largest, exponentials, sum_above, race,
             store_pair, Simd::from_half, transpose_tokens, nullptr, nullptr, nullptr, descend};
}

}  // namespace
}  // namespace dpllm
