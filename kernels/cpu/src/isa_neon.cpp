// aarch64. Compiled twice: with the dot-product extension (Cortex-A76, Apple, Jetson Orin) and without.
#include <sys/auxv.h>

#include "vec_neon.h"
//
#include "bitplane.h"
#include "ops.h"

namespace dpllm {
namespace {
#ifdef __ARM_FEATURE_DOTPROD
bool supported() { return getauxval(AT_HWCAP) >> 20 & 1; }  // HWCAP_ASIMDDP
#else
bool supported() { return true; }
#endif
}  // namespace

#ifdef __ARM_FEATURE_DOTPROD
extern const Isa kNeonDot =
    make_isa<Bitplane<Vec>::Layout, Bitplane<Vec>::Rows>("neondot", "NEON with dot products", supported);
#else
extern const Isa kNeon = make_isa<Bitplane<Vec>::Layout, Bitplane<Vec>::Rows>("neon", "NEON", supported);
#endif

}  // namespace dpllm
