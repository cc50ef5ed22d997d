#include "quantize.h"

#include <algorithm>
#include <cstring>
#include <numeric>

using namespace dpllm;

void dpllm_descend(Context* c, const Descent* d, int rows) {
  const Turn turn(c->pool->turn);
  parallel_rows(*c, rows, int64_t(d->last - d->first) * d->widths * 8, [&](int n0, int n1) { c->isa.descend(*d, n0, n1); });
}

void dpllm_table_values(Context* c, const uint8_t* codes, const float* tables, int rows, int columns, int seed_bits,
                        int parent_bits, int rows_per_table, float* out) {
  const Turn turn(c->pool->turn);
  const int widths = parent_bits - seed_bits + 1, entries = 1 << parent_bits;
  parallel_rows(*c, rows, int64_t(columns) * widths * 4, [&](int n0, int n1) {
    for (int n = n0; n < n1; n++)
      for (int b = 0; b < widths; b++) {
        const uint8_t* code = codes + int64_t(n) * columns;
        const float* table = tables + (int64_t(n / rows_per_table) * widths + b) * entries;
        float* to = out + (int64_t(n) * widths + b) * columns;
        const int shift = widths - 1 - b;
        for (int k = 0; k < columns; k++) to[k] = table[code[k] >> shift];
      }
  });
}

void dpllm_table_sums(Context* c, const uint8_t* codes, const float* values, const float* scale, int rows, int columns,
                      int seed_bits, int parent_bits, int rows_per_table, float* out) {
  const Turn turn(c->pool->turn);
  constexpr int kChains = 4;  // separate sums, because neighbouring weights often have the same code
  const int widths = parent_bits - seed_bits + 1, entries = 1 << parent_bits, tables = rows / rows_per_table;
  parallel_rows(*c, tables, int64_t(rows_per_table) * columns * widths * 4, [&](int t0, int t1) {
    for (int t = t0; t < t1; t++)
      for (int b = 0; b < widths; b++) {
        float sums[kChains][1 << 6] = {};
        const int shift = widths - 1 - b;
        for (int n = t * rows_per_table; n < (t + 1) * rows_per_table; n++) {
          const uint8_t* code = codes + int64_t(n) * columns;
          const float* value = values + (int64_t(n) * widths + b) * columns;
          int k = 0;
          for (; k + kChains <= columns; k += kChains)
            for (int i = 0; i < kChains; i++) sums[i][code[k + i] >> shift] += value[k + i] * scale[n];
          for (; k < columns; k++) sums[0][code[k] >> shift] += value[k] * scale[n];
        }
        float* to = out + (int64_t(t) * widths + b) * entries;
        for (int i = 0; i < entries; i++) to[i] = (sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]);
      }
  });
}

namespace {

// One row in ascending order. A cluster is an interval of positions; sums of it are differences of prefix sums.
class SortedRow {
 public:
  SortedRow(const float* values, const float* weights, int count) : count_(count), order_(size_t(count)),
      value_(size_t(count)), weight_(size_t(count) + 1), moment_(size_t(count) + 1) {
    std::vector<uint64_t> keys(static_cast<size_t>(count));
    for (int i = 0; i < count; i++) {
      uint32_t bits;
      const float v = values[i] + 0.f;  // -0 counts as 0
      std::memcpy(&bits, &v, 4);
      bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;  // ordered as the floats are
      keys[size_t(i)] = uint64_t(bits) << 32 | uint32_t(i);
    }
    std::sort(keys.begin(), keys.end());
    for (int i = 0; i < count; i++) {
      const int from = int(uint32_t(keys[size_t(i)]));
      order_[size_t(i)] = from;
      value_[size_t(i)] = values[from];
      weight_[size_t(i) + 1] = weight_[size_t(i)] + double(weights[from]);
      moment_[size_t(i) + 1] = moment_[size_t(i)] + double(weights[from]) * value_[size_t(i)];
    }
  }

  // Weighted means of the intervals. An empty one takes its parent's mean (parent: half as many), or a neighbouring value.
  std::vector<double> centres(const std::vector<int>& bounds, const double* parent) const {
    std::vector<double> mean(bounds.size() - 1);
    for (size_t i = 0; i < mean.size(); i++) {
      const int a = bounds[i], b = bounds[i + 1];
      if (a == b) {
        mean[i] = parent ? parent[i / 2] : value_[size_t(std::min(a, count_ - 1))];
        continue;
      }
      // Rounding in the prefix sums must not take a mean out of its interval, nor out of order.
      const double m = (moment_[size_t(b)] - moment_[size_t(a)]) / (weight_[size_t(b)] - weight_[size_t(a)]);
      mean[i] = std::min(std::max(m, value_[size_t(a)]), value_[size_t(b) - 1]);
    }
    return mean;
  }

  // Cuts each interval where two weighted means fit it best.
  std::vector<int> split(const std::vector<int>& bounds) const {
    std::vector<int> out(2 * bounds.size() - 1);
    for (size_t i = 0; i + 1 < bounds.size(); i++) {
      out[2 * i] = bounds[i];
      out[2 * i + 1] = cut(bounds[i], bounds[i + 1]);
    }
    out.back() = bounds.back();
    return out;
  }

  // Lloyd's algorithm from these intervals, until no value changes its cluster.
  void settle(std::vector<int>& bounds, int iterations) const {
    for (int round = 0; round < iterations; round++) {
      const std::vector<double> mean = centres(bounds, nullptr);
      bool moved = false;
      for (size_t i = 1; i < mean.size(); i++) {
        const double middle = (mean[i] + mean[i - 1]) / 2;
        const int at = int(std::lower_bound(value_.begin(), value_.end(), middle) - value_.begin());
        moved = moved || at != bounds[i];
        bounds[i] = at;
      }
      if (!moved) return;
    }
  }

  void label(const std::vector<int>& bounds, uint8_t* codes) const {
    for (size_t i = 0; i + 1 < bounds.size(); i++)
      for (int p = bounds[i]; p < bounds[i + 1]; p++) codes[order_[size_t(p)]] = uint8_t(i);
  }

 private:
  // Position i puts [a, i) to the left and [i, b) to the right. The first of the best positions; an empty side scores 0.
  int cut(int a, int b) const {
    if (a == b) return a;
    double best = -1;
    int at = a;
    const double w0 = weight_[size_t(a)], w1 = weight_[size_t(b)], m0 = moment_[size_t(a)], m1 = moment_[size_t(b)];
    for (int i = a; i < b; i++) {
      const double left = weight_[size_t(i)] - w0, right = w1 - weight_[size_t(i)];
      const double l = moment_[size_t(i)] - m0, r = m1 - moment_[size_t(i)];
      const double score = (left > 0 ? l * l / left : 0.) + (right > 0 ? r * r / right : 0.);
      if (score > best) best = score, at = i;
    }
    return at;
  }

  int count_;
  std::vector<int> order_;
  std::vector<double> value_, weight_, moment_;
};

}  // namespace

void dpllm_nested_codes(Context* c, const float* values, const float* weights, int rows, int count, int seed_bits,
                        int parent_bits, int seed_iterations, uint8_t* codes, double* centres) {
  const Turn turn(c->pool->turn);
  const int widths = parent_bits - seed_bits + 1, entries = 1 << parent_bits;
  c->pool->run(rows, [&](int n) {
    const SortedRow row(values + int64_t(n) * count, weights + int64_t(n) * count, count);
    std::vector<int> bounds{0, count};
    for (int b = 0; b < seed_bits; b++) bounds = row.split(bounds);
    row.settle(bounds, seed_iterations);
    std::vector<double> mean = row.centres(bounds, nullptr);
    double* to = centres + int64_t(n) * widths * entries;
    std::copy(mean.begin(), mean.end(), to);
    for (int b = 1; b < widths; b++) {
      bounds = row.split(bounds);
      mean = row.centres(bounds, mean.data());
      std::copy(mean.begin(), mean.end(), to + b * entries);
    }
    row.label(bounds, codes + int64_t(n) * count);
  });
}
