// aarch64. Compiled twice: with the dot-product extension (Cortex-A76, Apple, Jetson Orin) and without.
#include <sys/auxv.h>

#include "vec_neon.h"
//
#include "float_prompt.h"

namespace dpllm {
namespace {
#ifdef __ARM_FEATURE_DOTPROD
bool supported() { return getauxval(AT_HWCAP) >> 20 & 1; }  // HWCAP_ASIMDDP
#else
bool supported() { return true; }
#endif
}  // namespace

#ifdef __ARM_FEATURE_DOTPROD
extern const Isa kNeonDot = bitplane_isa<Vec>("neondot", "NEON with dot products", supported);
#else
extern const Isa kNeon = bitplane_isa<Vec>("neon", "NEON", supported);
#endif

}  // namespace dpllm
