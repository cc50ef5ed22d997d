// Drawing tokens: the passes of each instruction set, and whole draws at every length and option.
#include <algorithm>

#include "check.h"

namespace test {
namespace {

void check_passes(const Variant& v, Random& random) {
  const Handle h(v.index, 1);
  for (int n : {1, 3, 15, 16, 17, 64, 1023, 1024, 1100, 5000}) {
    Buffer<float> x = normals(size_t(n), random), w{size_t(n)};
    x[random.below(n)] = NAN;
    float top = -INFINITY;
    for (int i = 0; i < n; i++) top = x[i] > top ? x[i] : top;
    Buffer<float> maxima{size_t(n + dpllm::kDrawBlock - 1) / dpllm::kDrawBlock};
    h.isa().block_largest(x.data(), n, maxima.data());
    for (size_t b = 0; b < maxima.size(); b++) {
      float most = -INFINITY;
      for (int i = int(b) * dpllm::kDrawBlock; i < std::min(n, int(b + 1) * dpllm::kDrawBlock); i++)
        most = x[i] > most ? x[i] : most;
      CHECK(maxima[b] == most, text("block %d of %d", int(b), n));
    }
    const double total = h.isa().exponentials(x.data(), n, top, 1.5f, w.data());
    const float least = top - 1;
    double sum = 0, above = 0;
    for (int i = 0; i < n; i++) {
      const double right = std::isnan(x[i]) ? 0 : std::exp((double(x[i]) - top) * 1.5);
      CHECK(std::fabs(w[i] - right) < 1e-6 * right + 1e-30, text("weight %d of %d: %g", i, n, w[i]));
      sum += right, above += x[i] >= least ? right : 0;
    }
    CHECK(std::fabs(total - sum) < 1e-5 * sum + 1e-30, text("sum of %d: %g", n, total));
    const double found = h.isa().sum_above(x.data(), w.data(), n, least);
    CHECK(std::fabs(found - above) < 1e-5 * above + 1e-30, text("sum of the largest of %d: %g", n, found));
  }
}

// Every instruction set draws the tokens of the first one, and no token that is ruled out.
void check_draws(const std::vector<Variant>& variants, Random& random, int rounds) {
  std::vector<std::unique_ptr<Handle>> handles;
  for (const Variant& v : variants) handles.push_back(std::make_unique<Handle>(v.index, 1));
  for (int n : {1, 2, 16, 17, 100, 3000}) {
    for (int round = 0; round < rounds; round++) {
      Buffer<float> x = normals(size_t(n), random);
      for (int i = 0; i < n / 3; i++) x[random.below(n)] = random.below(2) ? -INFINITY : std::round(random.uniform(-2, 2));
      x[random.below(n)] = 1;
      const Buffer<int64_t> seen = [&] {
        Buffer<int64_t> ids(2);
        ids[0] = random.below(n), ids[1] = n + 5;  // one beyond the logits
        return ids;
      }();
      const dpllm::Draw how{random.below(5) ? double(random.uniform(0.1f, 3)) : 0.0,
                            random.below(2) ? double(random.uniform(0.05f, 1)) : 1.0,
                            random.below(2) ? double(random.uniform(0, 0.5)) : 0.0,
                            random.below(2) ? 1.3 : 1.0, seen.data(), 2, uint64_t(random.word()) << 32 | random.word(),
                            random.word(), random.below(3) ? random.below(n + 2) : 0};
      int first = -1;
      for (const auto& h : handles) {
        const int token = dpllm_draw(*h, x.data(), n, &how);
        CHECK(token >= 0 && token < n, text("token %d of %d", token, n));
        if (token >= 0 && token < n) CHECK(x[token] > -INFINITY, text("token %d is ruled out", token));
        if (first < 0) first = token;
        CHECK(token == first, text("token %d, not %d", token, first));
      }
    }
  }
}

}  // namespace

void test_draw(const Options& options) {
  Random random(11);
  const std::vector<Variant> variants = supported_variants();
  for (const Variant& v : variants) {
    where = v.name;
    check_passes(v, random);
  }
  where = "draws";
  check_draws(variants, random, options.quick ? 20 : 200);
}

}  // namespace test
