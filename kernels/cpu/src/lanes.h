// The operations that ops.h needs from an instruction set, beyond the compiler's own vectors of floats.
//
// A translation unit defines `struct Simd : Lanes<n>` with
//   widen(const int8_t*), from_half_vector(const uint16_t*) -> Floats, to_half_vector(const float*, uint16_t*),
//   narrow(Ints, int8_t*): the low byte of each lane, sum(Floats): of all lanes, from_half(uint16_t), to_half(float).
#pragma once

#include <cstdint>

namespace dpllm {
namespace {

template <int n>
struct Lanes {
  static constexpr int kLanes = n;
  typedef float Floats __attribute__((vector_size(n * 4)));
  typedef int32_t Ints __attribute__((vector_size(n * 4)));
};

}  // namespace
}  // namespace dpllm
