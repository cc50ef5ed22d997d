// What the tests share: checks, random numbers, buffers that end where they end, float16, the instruction sets.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "api.h"

namespace test {

inline int failures = 0;
inline std::string where;  // printed with a failure

constexpr int kShown = 20;  // failures printed; the others are counted

inline void report(const char* file, int line, const char* condition, const std::string& detail) {
  if (failures++ >= kShown) return;
  std::printf("FAILED %s:%d: %s [%s] %s\n", file, line, condition, where.c_str(), detail.c_str());
}

#define CHECK(condition, detail) \
  do { \
    if (!(condition)) test::report(__FILE__, __LINE__, #condition, detail); \
  } while (0)

// printf into a string.
template <class... Args>
std::string text(const char* format, Args... args) {
  char line[200];
  std::snprintf(line, sizeof line, format, args...);
  return line;
}
inline std::string text(const char* plain) { return plain; }

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2 + 1) {}

  uint32_t word() {  // splitmix64, upper half
    uint64_t z = state_ += 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return uint32_t((z ^ z >> 31) >> 32);
  }
  int below(int n) { return int(word() % uint32_t(n)); }
  float uniform(float low, float high) { return low + (high - low) * float(word() >> 8) * 0x1p-24f; }
  float normal() {  // near enough: a sum of uniform numbers
    float s = 0;
    for (int i = 0; i < 6; i++) s += uniform(-1, 1);
    return s * 0.7071f;
  }

 private:
  uint64_t state_;
};

// n elements aligned to no more than their type needs, with nothing after them: the address sanitizer sees every
// access past the end.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t n) : bytes_(new char[(n + 1) * sizeof(T)]), n_(n) { std::memset(data(), 0, n * sizeof(T)); }

  T* data() { return reinterpret_cast<T*>(bytes_.get() + sizeof(T)); }
  const T* data() const { return reinterpret_cast<const T*>(bytes_.get() + sizeof(T)); }
  T& operator[](size_t i) { return data()[i]; }
  const T& operator[](size_t i) const { return data()[i]; }
  size_t size() const { return n_; }
  bool operator==(const Buffer& other) const {
    return n_ == other.n_ && std::memcmp(data(), other.data(), n_ * sizeof(T)) == 0;
  }

 private:
  std::unique_ptr<char[]> bytes_;
  size_t n_ = 0;
};

inline Buffer<float> normals(size_t n, Random& random) {
  Buffer<float> x(n);
  for (size_t i = 0; i < n; i++) x[i] = random.normal();
  return x;
}

// float16, written without looking at the library.
inline double half_value(uint16_t h) {
  const int exponent = h >> 10 & 31, fraction = h & 1023;
  double value = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  if (exponent == 31) value = fraction ? NAN : INFINITY;
  return h & 0x8000 ? -value : value;
}

// The float16 of a magnitude between 2^-14 and 65504, cut off.
inline uint16_t half_of(float x) {
  int exponent;
  const double fraction = std::frexp(std::fabs(double(x)), &exponent);  // in [0.5, 1)
  if (exponent < -13) return 0;
  return uint16_t((x < 0 ? 0x8000 : 0) | (exponent + 14) << 10 | (int(fraction * 2048) - 1024));
}

inline float brain_value(uint16_t h) {
  const uint32_t bits = uint32_t(h) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

struct Variant {
  int index;
  const char* name;
};

inline std::vector<Variant> supported_variants() {
  std::vector<Variant> found;
  for (int i = 0; dpllm_isa_name(i); i++)
    if (dpllm_isa_supported(i)) found.push_back({i, dpllm_isa_name(i)});
  return found;
}

// An open library, with the same number of digits at every width.
class Handle {
 public:
  Handle(int isa, int threads, int table_digits = 2, int x_digits = 2) {
    dpllm::Accuracy accuracy;
    for (int b = 0; b <= dpllm::kMaxBits; b++)
      accuracy.table_digits[b] = table_digits, accuracy.x_digits[b] = x_digits;
    context_ = dpllm_open(isa, threads, 0, &accuracy);
  }
  ~Handle() { dpllm_close(context_); }
  Handle(const Handle&) = delete;
  operator Context*() const { return context_; }
  const dpllm::Isa& isa() const { return context_->isa; }

 private:
  Context* context_;
};

using dpllm::Storage;

constexpr Storage kStorages[] = {Storage::kFloat32, Storage::kFloat16, Storage::kBfloat16};
constexpr const char* kStorageNames[] = {"float32", "float16", "bfloat16"};

constexpr int kThreads[] = {1, 2, 3, 8};

struct Options {
  bool quick = false;  // fewer shapes, for an emulated processor
};

void test_products(const Options& o);
void test_dense(const Options& o);
void test_draw(const Options& o);
void test_quantize(const Options& o);
void test_attention(const Options& o);
void test_step(const Options& o);
void test_pool(const Options& o);
void test_threads(const Options& o);

}  // namespace test
