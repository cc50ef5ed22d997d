// The quantiser's kernels: nested k-means, sums over codes, and coordinate descent of each instruction set.
#include <algorithm>

#include "check.h"
#include "quantize.h"

namespace test {
namespace {

struct Shape {
  int rows, columns, seed_bits, parent_bits, share;
  int widths() const { return parent_bits - seed_bits + 1; }
  int entries() const { return 1 << parent_bits; }
  size_t tables() const { return size_t(rows / share * widths() * entries()); }
};

// Codes stay in range, ascend with the values, and each centre is the mean of its members.
void check_codes(Context* c, const Shape& s, Random& random) {
  const size_t count = size_t(s.rows * s.columns);
  const Buffer<float> values = normals(count, random);
  Buffer<float> weights(count);
  for (size_t i = 0; i < count; i++) weights[i] = random.uniform(0.1f, 2);
  Buffer<uint8_t> codes(count);
  Buffer<double> centres(size_t(s.rows * s.widths() * s.entries()));
  dpllm_nested_codes(c, values.data(), weights.data(), s.rows, s.columns, s.seed_bits, s.parent_bits, 50, codes.data(),
                     centres.data());
  for (int n = 0; n < s.rows; n++)
    for (int b = 0; b < s.widths(); b++)
      for (int code = 0; code < 1 << (s.seed_bits + b); code++) {
        double mass = 0, moment = 0;
        for (int k = 0; k < s.columns; k++) {
          const size_t at = size_t(n * s.columns + k);
          if (codes[at] >> (s.widths() - 1 - b) != code) continue;
          mass += double(weights[at]), moment += double(weights[at]) * double(values[at]);
        }
        const double centre = centres[size_t((n * s.widths() + b) * s.entries() + code)];
        if (mass > 0) CHECK(std::fabs(centre - moment / mass) < 1e-5, text("row %d, width %d, code %d", n, b, code));
      }
}

// One block of a descent, against its definition in double precision.
void check_descent(Context* c, const Shape& s, int first, int last, Random& random) {
  const int B = s.widths(), L = s.entries(), K = s.columns;
  const size_t count = size_t(s.rows * K);
  const Buffer<float> weight = normals(count, random);
  Buffer<float> leaf(s.tables()), hessian(size_t(K * K)), root(static_cast<size_t>(B)), values(count * size_t(B));
  for (size_t i = 0; i < s.tables(); i++) leaf[i] = random.normal();
  for (int i = 0; i < K; i++)
    for (int j = 0; j <= i; j++)
      hessian[size_t(i * K + j)] = hessian[size_t(j * K + i)] = i == j ? 1.5f : random.uniform(-0.1f, 0.1f);
  for (int b = 0; b < B; b++) root[size_t(b)] = random.uniform(0.5f, 2);
  Buffer<uint8_t> codes(count);
  for (size_t i = 0; i < count; i++) codes[i] = uint8_t(random.below(L));
  dpllm_table_values(c, codes.data(), leaf.data(), s.rows, K, s.seed_bits, s.parent_bits, s.share, values.data());
  Buffer<float> error = normals(values.size(), random), pull = normals(values.size(), random);
  Buffer<double> own(error.size()), drag(error.size());
  for (size_t i = 0; i < error.size(); i++) own[i] = error[i], drag[i] = pull[i];
  Buffer<float> change(size_t(s.rows * B * (last - first)));
  const dpllm::Descent d{weight.data(), codes.data(), error.data(), pull.data(), hessian.data(), leaf.data(),
                         root.data(), change.data(), K, B, s.parent_bits, s.share, first, last};
  dpllm_descend(c, &d, s.rows);
  for (int n = 0; n < s.rows; n++)
    for (int j = first; j < last; j++) {
      const auto at = [&](int b, int k) { return size_t((n * B + b) * K + k); };
      const auto value = [&](int b, int code) { return double(leaf[size_t((n / s.share * B + b) * L + code)]); };
      const auto cost = [&](int code) {
        double sum = 0;
        for (int b = 0; b < B; b++) {
          const double optimum =
              own[at(b, j)] + weight[size_t(n * K + j)] - drag[at(b, j)] / hessian[size_t(j * K + j)];
          sum += std::pow(root[size_t(b)] * (value(b, code) - optimum), 2);
        }
        return sum;
      };
      double least = INFINITY;
      for (int code = 0; code < L; code++) least = std::min(least, cost(code));
      const int chosen = codes[size_t(n * K + j)];
      CHECK(chosen < L && cost(chosen) <= least * (1 + 1e-4) + 1e-6, text("row %d, column %d: code %d", n, j, chosen));
      for (int b = 0; b < B; b++) {
        const double moved = value(b, chosen) - weight[size_t(n * K + j)] - own[at(b, j)];
        CHECK(std::fabs(change[size_t((n * B + b) * (last - first) + j - first)] - moved) < 1e-4, "change");
        own[at(b, j)] += moved;
        CHECK(std::fabs(error[at(b, j)] - own[at(b, j)]) < 1e-5, "error");
        for (int k = j + 1; k < last; k++) drag[at(b, k)] += moved * double(hessian[size_t(j * K + k)]);
      }
    }
}

// Sums over codes are the transpose of looking values up: <values(t), x> = <t, sums(x)>.
void check_sums(Context* c, const Shape& s, Random& random) {
  const size_t count = size_t(s.rows * s.columns), all = count * size_t(s.widths());
  Buffer<uint8_t> codes(count);
  for (size_t i = 0; i < count; i++) codes[i] = uint8_t(random.below(s.entries()));
  const Buffer<float> tables = normals(s.tables(), random), x = normals(all, random), scale = normals(size_t(s.rows), random);
  Buffer<float> values(all), sums(s.tables());
  dpllm_table_values(c, codes.data(), tables.data(), s.rows, s.columns, s.seed_bits, s.parent_bits, s.share, values.data());
  dpllm_table_sums(c, codes.data(), x.data(), scale.data(), s.rows, s.columns, s.seed_bits, s.parent_bits, s.share,
                   sums.data());
  double left = 0, right = 0, size = 0;
  for (size_t i = 0; i < all; i++) {
    const double part = double(values[i]) * double(x[i]) * double(scale[i / size_t(s.widths() * s.columns)]);
    left += part, size += std::fabs(part);
  }
  for (size_t i = 0; i < s.tables(); i++) right += double(tables[i]) * double(sums[i]);
  CHECK(std::fabs(left - right) < 1e-5 * size + 1e-6, text("%g, not %g", right, left));
}

}  // namespace

void test_quantize(const Options&) {
  Random random(13);
  for (const Variant& v : supported_variants()) {
    where = v.name;
    const Handle h(v.index, 2);
    for (const Shape& s : {Shape{1, 1, 2, 2, 1}, Shape{3, 7, 2, 3, 1}, Shape{4, 33, 3, 4, 2}, Shape{6, 70, 5, 5, 1},
                           Shape{5, 130, 2, 6, 1}, Shape{8, 65, 2, 6, 4}, Shape{2, 20, 6, 6, 2}}) {
      check_codes(h, s, random);
      check_sums(h, s, random);
      for (int first = 0; first < s.columns; first += dpllm::Descent::kBlock)
        check_descent(h, s, first, std::min(first + dpllm::Descent::kBlock, s.columns), random);
    }
  }
}

}  // namespace test
