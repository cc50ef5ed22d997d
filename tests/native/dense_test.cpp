// The small operations: int8 products, weighted squares, float16, norms, rotations, activations.
#include "check.h"

namespace test {
namespace {

const std::vector<int> kLengths = {1, 3, 8, 16, 31, 64, 65, 130, 1000};

double largest_error(const Buffer<float>& y, const std::vector<double>& right) {
  double worst = 0, size = 1e-30;
  for (size_t i = 0; i < right.size(); i++) {
    worst = std::fmax(worst, std::isnan(y[i]) ? INFINITY : std::fabs(y[i] - right[i]));
    size = std::fmax(size, std::fabs(right[i]));
  }
  return worst / size;
}

void check_int8(const Variant& v, Random& random) {
  for (int rows : {1, 7, 133})
    for (int columns : kLengths) {
      Buffer<int8_t> w(size_t(rows) * columns);
      Buffer<uint16_t> scale{size_t(rows)};
      const Buffer<float> x = normals(size_t(2) * columns, random);
      for (size_t i = 0; i < w.size(); i++) w[i] = int8_t(random.word());
      for (int n = 0; n < rows; n++) scale[n] = half_of(random.uniform(0.01f, 1));
      std::vector<double> right;
      for (int i = 0; i < 2; i++)
        for (int n = 0; n < rows; n++) {
          double sum = 0;
          for (int k = 0; k < columns; k++) sum += double(w[size_t(n) * columns + k]) * x[size_t(i) * columns + k];
          right.push_back(sum * half_value(scale[n]));
        }
      Buffer<float> first;
      for (int threads : kThreads) {
        const Handle h(v.index, threads);
        Buffer<float> y(right.size());
        dpllm_int8_gemm(h, w.data(), scale.data(), rows, columns, x.data(), 2, y.data());
        const double error = largest_error(y, right);
        CHECK(error < 1e-5, text("%d x %d: error %g", rows, columns, error));
        if (threads == 1) first = std::move(y);
        else CHECK(y == first, text("%d threads differ from one", threads));
      }
    }
}

void check_weighted_square(const Handle& h, Random& random) {
  for (int columns : kLengths) {
    const Buffer<float> x = normals(size_t(3) * columns, random);
    Buffer<uint16_t> diagonal{size_t(columns)};
    for (int k = 0; k < columns; k++) diagonal[k] = half_of(random.uniform(0.001f, 3));
    Buffer<float> y(3);
    std::vector<double> right(3);
    for (size_t i = 0; i < x.size(); i++) right[i / columns] += half_value(diagonal[i % columns]) * x[i] * x[i];
    dpllm_weighted_square(h, x.data(), diagonal.data(), 3, columns, y.data());
    const double error = largest_error(y, right);
    CHECK(error < 1e-5, text("weighted square of %d: error %g", columns, error));
  }
}

// All float16 values there and back; then rounding to nearest, ties to even, between neighbours.
void check_half(const dpllm::Isa& isa) {
  for (uint32_t h = 0; h < 0x10000; h++) {
    const double right = half_value(uint16_t(h));
    const float x = isa.from_half(uint16_t(h));
    CHECK(x == right || (std::isnan(x) && std::isnan(right)), text("half %04x is %g, not %g", h, x, right));
    if (h % 0x400 == 0x3ff || (h & 0x7c00) == 0x7c00) continue;  // the next one has another exponent, or there is none
    const float next = float(half_value(uint16_t(h + 1))), x0 = float(right);
    Buffer<float> values(4 * 17);
    Buffer<uint16_t> halves(values.size());
    const float steps[] = {0, 0.25f, 0.5f, 0.75f};
    for (size_t i = 0; i < values.size(); i++) values[i] = x0 + (next - x0) * steps[i % 4];
    isa.store(values.data(), Storage::kFloat16, halves.data(), int(values.size()));
    const uint32_t rounded[] = {h, h, h + h % 2, h + 1};
    for (size_t i = 0; i < values.size(); i++)
      CHECK(halves[i] == rounded[i % 4], text("%.9g becomes half %04x", values[i], halves[i]));
  }
}

// Ends of the ranges, and NaN.
void check_storage(const dpllm::Isa& isa) {
  const float odd[] = {65519.f, 65520.f, 1e30f, -INFINITY, 1e-30f, -1e-8f, 1.00390625f, 1.01171875f, NAN};
  constexpr int kCount = int(sizeof odd / sizeof odd[0]);
  const uint16_t half[] = {0x7bff, 0x7c00, 0x7c00, 0xfc00, 0, 0x8000, 0x3c04, 0x3c0c};
  const uint16_t brain[] = {0x4780, 0x4780, 0x714a, 0xff80, 0x0da2, 0xb22c, 0x3f80, 0x3f82};
  uint16_t y[2][kCount];
  isa.store(odd, Storage::kFloat16, y[0], kCount);
  isa.store(odd, Storage::kBfloat16, y[1], kCount);
  for (int i = 0; i + 1 < kCount; i++) {
    CHECK(y[0][i] == half[i], text("%g becomes half %04x", odd[i], y[0][i]));
    CHECK(y[1][i] == brain[i], text("%g becomes bfloat16 %04x", odd[i], y[1][i]));
  }
  CHECK(std::isnan(half_value(y[0][kCount - 1])), text("NaN becomes half %04x", y[0][kCount - 1]));
  CHECK(std::isnan(brain_value(y[1][kCount - 1])), text("NaN becomes bfloat16 %04x", y[1][kCount - 1]));
}

void check_norm_and_sum(const dpllm::Isa& isa, int n, Random& random) {
  const Buffer<float> x = normals(size_t(n), random), weight = normals(size_t(n), random);
  Buffer<float> y{size_t(n)}, total = normals(size_t(n), random);
  double squares = 0;
  for (int i = 0; i < n; i++) squares += double(x[i]) * x[i];
  std::vector<double> norm, sum;
  for (int i = 0; i < n; i++) {
    norm.push_back(x[i] / std::sqrt(squares / n + 1e-5) * weight[i]);
    sum.push_back(double(total[i]) + x[i]);
  }
  isa.rms_norm(x.data(), weight.data(), 1e-5f, n, y.data());
  CHECK(largest_error(y, norm) < 1e-6, text("norm of %d: error %g", n, largest_error(y, norm)));
  isa.add(x.data(), n, total.data());
  CHECK(largest_error(total, sum) < 1e-6, text("sum of %d: error %g", n, largest_error(total, sum)));
}

void check_silu_and_rope(const dpllm::Isa& isa, int n, Random& random) {
  Buffer<float> gate = normals(size_t(n), random), y{size_t(n)};
  const Buffer<float> up = normals(size_t(n), random);
  std::vector<double> right;
  for (int i = 0; i < n; i++) gate[i] *= i % 7 == 3 ? 40.f : 3.f;
  for (int i = 0; i < n; i++) right.push_back(gate[i] / (1 + std::exp(-double(gate[i]))) * up[i]);
  isa.silu_mul(gate.data(), up.data(), n, y.data());
  CHECK(largest_error(y, right) < 1e-6, text("silu of %d: error %g", n, largest_error(y, right)));
  gate[size_t(n) / 2] = NAN;
  isa.silu_mul(gate.data(), up.data(), n, y.data());
  CHECK(std::isnan(y[size_t(n) / 2]), text("silu of %d: NaN becomes %g", n, y[size_t(n) / 2]));

  Buffer<float> x = normals(size_t(2) * n, random), cosine{size_t(n)}, sine{size_t(n)};
  std::vector<double> turned(size_t(2) * n);
  for (int i = 0; i < n; i++) {
    cosine[i] = std::cos(float(i)), sine[i] = std::sin(float(i));
    turned[i] = double(x[i]) * cosine[i] - double(x[size_t(i) + n]) * sine[i];
    turned[size_t(i) + n] = double(x[size_t(i) + n]) * cosine[i] + double(x[i]) * sine[i];
  }
  isa.rope(x.data(), cosine.data(), sine.data(), 2 * n);
  CHECK(largest_error(x, turned) < 1e-6, text("rotation of %d: error %g", 2 * n, largest_error(x, turned)));
}

// The digits of a table give it back to half a step; zeros and values that are not finite do no harm.
void check_digits(Random& random) {
  constexpr int kTables = 5, kEntries = 64;
  Buffer<float> values = normals(kTables * kEntries, random), scale(kTables);
  for (int i = 0; i < kEntries; i++) values[3 * kEntries + i] = 0;
  Buffer<int8_t> digits(2 * kTables * kEntries);
  dpllm_digits(values.data(), kTables, kEntries, digits.data(), scale.data());
  for (int i = 0; i < kTables * kEntries; i++) {
    const int table = i / kEntries, at = table * 2 * kEntries + i % kEntries;
    const double value = (255. * digits[at] + digits[at + kEntries]) * scale[table];
    CHECK(std::fabs(value - values[i]) <= 0.501 * scale[table], text("entry %d: %g is %g", i, values[i], value));
    CHECK(digits[at] != -128 && digits[at + kEntries] != -128, text("entry %d", i));
  }
}

}  // namespace

void test_dense(const Options& o) {
  Random random(2);
  where = "tables to digits";
  check_digits(random);
  for (const Variant& v : supported_variants()) {
    where = v.name;
    const Handle h(v.index, 1);
    check_int8(v, random);
    check_weighted_square(h, random);
    if (!o.quick || v.index % 2) check_half(h.isa());
    check_storage(h.isa());
    for (int n : kLengths) check_norm_and_sum(h.isa(), n, random), check_silu_and_rope(h.isa(), n, random);
  }
}

}  // namespace test
