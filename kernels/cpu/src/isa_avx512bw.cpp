// AVX-512 as in Skylake-X and Cascade Lake.
#include "simd_avx512.h"
#include "vec_avx512bw.h"
//
#include "float_prompt.h"

namespace dpllm {
namespace {
bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
}  // namespace

extern const Isa kAvx512Bw = bitplane_isa<Vec>("avx512bw", "AVX-512 F BW VL DQ", supported);

}  // namespace dpllm
