// Any processor.
#include "vec_portable.h"
//
#include "bitplane.h"
#include "ops.h"

namespace dpllm {
namespace {
bool supported() { return true; }
}  // namespace

extern const Isa kPortable =
    make_isa<Bitplane<Vec>::Layout, Bitplane<Vec>::Rows>("portable", "nothing", supported);

}  // namespace dpllm
