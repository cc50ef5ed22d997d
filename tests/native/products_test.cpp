// Products with bitplanes: every width, digits, odd shapes, batches of mixed widths, threads, odd values.
#include "matrix.h"

namespace test {
namespace {

struct Digits {
  int table, x;
  double bound;  // of the relative error of several elements
};
constexpr Digits kDigits[] = {{1, 1, 2e-2}, {2, 1, 2e-2}, {2, 2, 1e-4}};

// The relative error of n elements scatters by 1 / sqrt(2 n) of itself: 27% for the 7 rows of many shapes.
double room(int rows) { return rows < 4 ? 2 : rows < 16 ? 1.5 : 1; }

std::vector<Shape> shapes(bool quick) {
  std::vector<Shape> all;
  for (int columns : {32, 96, 224, 250, 256, 320, 480, 512, 544, 1000, 2080})
    for (int rows : {1, 7, 33})
      for (int per_table : {1, 4}) {
        if (quick && (rows != 7 || (columns + per_table) % 3 == 0)) continue;
        all.push_back({rows, columns, per_table, per_table == 4});
      }
  return all;
}

void gemm(const Handle& h, const RandomMatrix& w, const Buffer<float>& x, const std::vector<int32_t>& bits,
          Buffer<float>& y) {
  y = Buffer<float>(bits.size() * w.shape.rows);
  dpllm_gemm(h, &w.matrix, x.data(), bits.data(), int(bits.size()), y.data());
}

bool same(const float* a, const float* b, int n) { return std::memcmp(a, b, sizeof(float) * size_t(n)) == 0; }

// Each width alone; then one to six rows of mixed widths, which must give each row what it gets alone.
void check_shape(const Handle& h, const Digits& digits, const RandomMatrix& w, Random& random) {
  const int rows = w.shape.rows, columns = w.shape.columns;
  const Buffer<float> x = normals(size_t(6) * columns, random);
  const double bound = digits.bound * room(rows);
  Buffer<float> single[kMaxBits + 1], y;
  for (int b = 2; b <= kMaxBits; b++) {
    gemm(h, w, x, std::vector<int32_t>(6, b), single[b]);
    const std::vector<double> dense = w.dense(b);
    for (int i = 0; i < 6; i++) {
      const double error = product_error(w, dense, &x[size_t(i) * columns], &single[b][size_t(i) * rows]);
      CHECK(error < bound, text("row %d of 6 at %d bits: error %g", i, b, error));
    }
    gemm(h, w, x, {b}, y);
    CHECK(same(y.data(), single[b].data(), rows), text("%d bits: alone and among six differ", b));
  }
  for (int m = 1; m <= 6; m++) {
    std::vector<int32_t> bits;
    for (int i = 0; i < m; i++) bits.push_back(2 + random.below(7));
    gemm(h, w, x, bits, y);
    for (int i = 0; i < m; i++)
      CHECK(same(&y[size_t(i) * rows], &single[bits[i]][size_t(i) * rows], rows),
            text("row %d of %d at %d bits differs in a mixed batch", i, m, bits[i]));
  }
}

// The product of a prompt of few tokens and of more than a block of them, as quick as may be and exact.
void check_prompt(const Handle& h, const RandomMatrix& w, Random& random) {
  const int columns = w.shape.columns, rows = w.shape.rows;
  for (int tokens : {8, 71}) {
    const Buffer<float> x = normals(size_t(tokens) * columns, random);
    for (int b = 2; b <= kMaxBits; b++)
      for (int exact : {0, 1}) {
        Buffer<float> y(size_t(tokens) * rows);
        dpllm_matmul(h, &w.matrix, x.data(), b, tokens, exact, y.data());
        const std::vector<double> dense = w.dense(b);
        const double bound = exact ? 1e-5 : kDigits[0].bound * room(rows);
        for (int i = 0; i < tokens; i += 7) {
          const double error = product_error(w, dense, &x[size_t(i) * columns], &y[size_t(i) * rows]);
          CHECK(error < bound, text("token %d of %d at %d bits, exact %d: error %g", i, tokens, b, exact, error));
        }
      }
  }
}

void check_dequantize(const Handle& h, const RandomMatrix& w) {
  const int columns = w.shape.columns, first = w.shape.rows / 3, last = w.shape.rows;
  const size_t n = size_t(last - first) * columns;
  for (int b = 2; b <= kMaxBits; b++) {
    const std::vector<double> dense = w.dense(b);
    Buffer<float> single(n);
    Buffer<uint16_t> brain(n);
    dpllm_dequantize(h, &w.matrix, b, 0, single.data(), first, last);
    dpllm_dequantize(h, &w.matrix, b, 1, brain.data(), first, last);
    double worst = 0, worst_brain = 0;
    for (size_t i = 0; i < n; i++) {
      const double right = dense[size_t(first) * columns + i], size = std::fabs(right) + 1e-30;
      worst = std::fmax(worst, std::fabs(single[i] - right) / size);
      worst_brain = std::fmax(worst_brain, std::fabs(brain_value(brain[i]) - right) / size);
    }
    CHECK(worst < 1e-6, text("%d bits: error %g", b, worst));
    CHECK(worst_brain < 0x1.01p-8, text("%d bits in bfloat16: error %g", b, worst_brain));
  }
}

void check_threads(const Variant& v, const Digits& digits, Random& random) {
  const RandomMatrix w({203, 544, 1, true}, random);
  const Buffer<float> x = normals(size_t(3) * 544, random);
  Buffer<float> first;
  for (int threads : kThreads) {
    const Handle h(v.index, threads, digits.table, digits.x);
    Buffer<float> y;
    gemm(h, w, x, {3, 6, 8}, y);
    if (threads == 1) first = std::move(y);
    else CHECK(y == first, text("%d threads differ from one", threads));
  }
}

// Row 1 of three holds the odd values: its result is as it should be, and its neighbours' does not change.
void check_values(const Handle& h, const Digits& digits, const RandomMatrix& w, Random& random) {
  const int rows = w.shape.rows, columns = w.shape.columns;
  const Buffer<float> x = normals(size_t(3) * columns, random);
  const float odd[] = {NAN, INFINITY, -INFINITY, 0.f, 1e-40f, 1e-25f, 1e30f};
  for (int b = 2; b <= kMaxBits; b++) {
    Buffer<float> plain, y;
    gemm(h, w, x, {b, b, b}, plain);
    for (float value : odd) {
      Buffer<float> changed(x.size());
      for (size_t i = 0; i < x.size(); i++) changed[i] = x[i];
      float* row = &changed[size_t(columns)];
      const bool finite = std::isfinite(value);
      for (int k = 0; k < columns; k++) row[k] = finite ? row[k] * value : row[k];
      if (!finite) row[random.below(2) ? columns - 1 : random.below(columns)] = value;
      gemm(h, w, changed, {b, b, b}, y);
      const float* result = &y[size_t(rows)];
      for (int n = 0; n < rows && !finite; n++)
        CHECK(std::isnan(result[n]), text("%g at %d bits: %g", value, b, result[n]));
      if (value == 1e-40f) {  // as good as zero
        for (int n = 0; n < rows; n++) CHECK(std::fabs(result[n]) < 1e-30f, text("denormal at %d bits", b));
      } else if (finite) {
        const double error = product_error(w, w.dense(b), row, result);
        CHECK(error < digits.bound, text("times %g at %d bits: error %g", value, b, error));
      }
      CHECK(same(&y[0], &plain[0], rows) && same(&y[2 * size_t(rows)], &plain[2 * size_t(rows)], rows),
            text("%g at %d bits changed another row", value, b));
    }
  }
}

void check_variant(const Variant& v, const Digits& digits, const Options& o) {
  Random random(uint64_t(v.index * 10 + digits.table + digits.x));
  const Handle h(v.index, 2, digits.table, digits.x);
  for (const Shape& s : shapes(o.quick)) {
    where = text("%s, digits %d+%d, %d x %d, tables of %d", v.name, digits.table, digits.x, s.rows, s.columns,
                 s.rows_per_table);
    const RandomMatrix w(s, random);
    check_shape(h, digits, w, random);
    if (digits.x == 2) continue;
    check_dequantize(h, w);
    check_prompt(h, w, random);
  }
  where = text("%s, digits %d+%d", v.name, digits.table, digits.x);
  check_threads(v, digits, random);
  if (digits.x == 1) check_prompt(Handle(v.index, 3, digits.table, digits.x), RandomMatrix({61, 250, 1, true}, random), random);
  for (int columns : {250, 544}) check_values(h, digits, RandomMatrix({5, columns, 2, false}, random), random);
}

}  // namespace

void test_products(const Options& o) {
  for (const Variant& v : supported_variants())
    for (const Digits& digits : kDigits) check_variant(v, digits, o);
}

}  // namespace test
