// Any processor.
#include "vec_portable.h"
//
#include "float_prompt.h"

namespace dpllm {
namespace {
bool supported() { return true; }
}  // namespace

extern const Isa kPortable = bitplane_isa<Vec>("portable", "nothing", supported);

}  // namespace dpllm
