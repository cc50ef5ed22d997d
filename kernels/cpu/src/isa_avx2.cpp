// AVX2. Compiled twice: with AVX-VNNI (Alder Lake, Zen 5) where __AVXVNNI__ is on, and without (Haswell, Zen).
#include "vec_avx2.h"
//
#include "float_prompt.h"

namespace dpllm {
namespace {
bool base() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#ifdef __AVXVNNI__
bool supported() {  // CPUID leaf 7.1, EAX bit 4; compilers of 2022 have no name for it
  uint32_t eax = 1, ebx, ecx = 1, edx;
  __asm__("cpuid" : "=a"(eax), "=b"(ebx), "=c"(ecx), "=d"(edx) : "a"(7), "c"(1));
  return base() && (eax >> 4 & 1);
}
#else
bool supported() { return base(); }
#endif
}  // namespace

#ifdef __AVXVNNI__
extern const Isa kAvx2Vnni = bitplane_isa<Vec>("avx2vnni", "AVX2 FMA F16C AVX-VNNI", supported);
#else
extern const Isa kAvx2 = bitplane_isa<Vec>("avx2", "AVX2 FMA F16C", supported);
#endif

}  // namespace dpllm
