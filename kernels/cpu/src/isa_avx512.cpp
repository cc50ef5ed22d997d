// AVX-512 with VBMI, GFNI and VNNI: Intel Ice Lake and later, AMD Zen 4 and later.
#include "simd_avx512.h"
//
#include "gemm_avx512.h"

namespace dpllm {
namespace {
bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("gfni");
}

void dequantize_lines(const Matrix& w, int bits, bool bf16, void* out, int n0, int n1) {
  if (!bf16) return kAvx512Bw.dequantize(w, bits, bf16, out, n0, n1);
  with_width(bits, [&](auto width) {
    dequantize_bf16<decltype(width)::value>(w, static_cast<uint16_t*>(out), n0, n1);
  });
}

// Every processor with VBMI can do what those without it do.
void float_matmul(const Matrix& w, int bits, const float* blocks, int tokens, float* scratch, float* y, int n0, int n1) {
  kAvx512Bw.float_matmul(w, bits, blocks, tokens, scratch, y, n0, n1);
}
}  // namespace

extern const Isa kAvx512 = [] {
  Isa isa = make_isa<Layout, Rows>("avx512", "AVX-512 F BW VL DQ VBMI VNNI GFNI", supported);
  isa.dequantize = dequantize_lines;
  isa.float_matmul = float_matmul;
  isa.quantize_prompt = quantize_prompt;
  isa.matmul = matmul;
  return isa;
}();

}  // namespace dpllm
