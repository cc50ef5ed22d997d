// From run-time widths and digit counts to template arguments.
#pragma once

#include <type_traits>

#include "kernels.h"

namespace dpllm {
namespace {

template <int N>
using Constant = std::integral_constant<int, N>;

// The sum that unsigned tables (digit + 128) add to a dot product, in units of its lowest order.
template <int T>
inline float unsigned_correction(const Activation& x) {
  return x.correction * (T == 2 ? kBase + 1 : 1);
}

template <class F>
inline void with_width(int bits, F f) {
  switch (bits) {
    case 2: return f(Constant<2>());
    case 3: return f(Constant<3>());
    case 4: return f(Constant<4>());
    case 5: return f(Constant<5>());
    case 6: return f(Constant<6>());
    case 7: return f(Constant<7>());
    case 8: return f(Constant<8>());
  }
}

// Rows<B, T, X>::run(w, x, count, y, n0, n1): width, table digits, activation digits.
template <template <int, int, int> class Rows>
void gemv_by(const Matrix& w, int bits, int table_digits, const Activation* const* x, int count, float* const* y,
             int n0, int n1) {
  with_width(bits, [&](auto width) {
    constexpr int B = decltype(width)::value;
    const auto run = [&](auto t, auto d) {
      Rows<B, decltype(t)::value, decltype(d)::value>::run(w, x, count, y, n0, n1);
    };
    if (x[0]->digits == 2) run(Constant<2>(), Constant<2>());
    else if (table_digits == 2) run(Constant<2>(), Constant<1>());
    else run(Constant<1>(), Constant<1>());
  });
}

}  // namespace
}  // namespace dpllm
