// Random matrices and what their products should be.
#pragma once

#include "check.h"

namespace test {

using dpllm::kMaxBits;

struct Shape {
  int rows, columns, rows_per_table;
  bool extras;  // scales per row, and a bias
};

// A matrix with a table for each width, its planes exactly as long as they must be. Bits after the last column
// are random: they must not matter.
class RandomMatrix {
 public:
  RandomMatrix(const Shape& s, Random& random) : shape(s) {
    const size_t words = size_t(s.columns + 31) / 32, tables = size_t(s.rows + s.rows_per_table - 1) / s.rows_per_table;
    planes_ = Buffer<uint32_t>(kMaxBits * s.rows * words);
    for (size_t i = 0; i < planes_.size(); i++) planes_[i] = random.word();
    row_scale_ = Buffer<float>(size_t(s.rows));
    bias_ = Buffer<float>(size_t(s.rows));
    for (int n = 0; n < s.rows; n++) row_scale_[n] = random.uniform(0.5f, 2), bias_[n] = random.normal();
    matrix = Matrix{};
    for (int b = 2; b <= kMaxBits; b++) {
      digits_[b] = Buffer<int8_t>((tables * 2) << b);
      scales_[b] = Buffer<float>(tables);
      for (size_t i = 0; i < digits_[b].size(); i++) digits_[b][i] = int8_t(random.below(255) - 127);
      for (size_t i = 0; i < tables; i++) scales_[b][i] = random.uniform(0.5e-4f, 2e-4f);
      matrix.tables[b] = digits_[b].data(), matrix.scales[b] = scales_[b].data();
    }
    matrix.planes = reinterpret_cast<const uint8_t*>(planes_.data());
    matrix.row_bytes = int64_t(words) * 4, matrix.plane_bytes = matrix.row_bytes * s.rows;
    matrix.row_scale = s.extras ? row_scale_.data() : nullptr;
    matrix.bias = s.extras ? bias_.data() : nullptr;
    matrix.rows = s.rows, matrix.columns = s.columns, matrix.rows_per_table = s.rows_per_table;
  }

  // All weights at `bits` planes.
  std::vector<double> dense(int bits) const {
    const size_t words = size_t(shape.columns + 31) / 32;
    std::vector<double> values;
    for (int n = 0; n < shape.rows; n++) {
      const int table = n / shape.rows_per_table;
      const int8_t* digits = digits_[bits].data() + (size_t(table) * 2 << bits);
      const double scale = double(scales_[bits][table]) * (shape.extras ? row_scale_[n] : 1);
      for (int k = 0; k < shape.columns; k++) {
        int code = 0;
        for (int p = 0; p < bits; p++)
          code = code << 1 | (planes_[(size_t(p) * shape.rows + n) * words + k / 32] >> k % 32 & 1);
        values.push_back((255. * digits[code] + digits[code + (1 << bits)]) * scale);
      }
    }
    return values;
  }

  double bias(int n) const { return shape.extras ? bias_[n] : 0; }

  Shape shape;
  Matrix matrix;

 private:
  Buffer<uint32_t> planes_;
  Buffer<int8_t> digits_[kMaxBits + 1];
  Buffer<float> scales_[kMaxBits + 1], row_scale_, bias_;
};

// The error of y = x W^T + bias for one row x, relative to what the result would be if the signs of its terms were
// random: cancellation in a single element does not count. NaN if any element is.
inline double product_error(const RandomMatrix& w, const std::vector<double>& dense, const float* x, const float* y) {
  double error = 0, size = 0;
  for (int n = 0; n < w.shape.rows; n++) {
    double sum = w.bias(n);
    size += sum * sum;
    for (int k = 0; k < w.shape.columns; k++) {
      const double term = dense[size_t(n) * w.shape.columns + k] * x[k];
      sum += term, size += term * term;
    }
    error += (y[n] - sum) * (y[n] - sum);
  }
  return size > 0 ? std::sqrt(error / size) : std::sqrt(error);
}

}  // namespace test
