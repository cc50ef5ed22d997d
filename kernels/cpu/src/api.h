// The C interface of the CPU kernels. No exceptions cross it; the caller checks shapes and widths.
//
// Arrays are contiguous and row-major unless a comment says otherwise; float16 travels as uint16_t. Threads may share a
// handle and the steps that are opened with it: their calls are served in turn.
#pragma once

#include "context.h"
#include "draw.h"

#define DPLLM_EXPORT extern "C" __attribute__((visibility("default")))

using dpllm::Context;
using dpllm::Matrix;

// The number of this interface: another one for every change of a function or a structure. library.py has it, too.
DPLLM_EXPORT int dpllm_interface();

// The names of instruction sets in this library, the fastest first, and null after the last one.
DPLLM_EXPORT const char* dpllm_isa_name(int index);
DPLLM_EXPORT const char* dpllm_isa_needs(int index);
DPLLM_EXPORT int dpllm_isa_supported(int index);

DPLLM_EXPORT Context* dpllm_open(int isa, int threads, int pin, const dpllm::Accuracy* accuracy);
DPLLM_EXPORT void dpllm_close(Context* c);

// For a process that forks: hold every handle before, so that no call is under way; then release it in the parent, and
// call dpllm_forked in the child, which gives the handle threads of the child's own.
DPLLM_EXPORT void dpllm_hold(Context* c);
DPLLM_EXPORT void dpllm_release(Context* c);
DPLLM_EXPORT void dpllm_forked(Context* c);

// values [tables, entries] -> digits [tables][high, low][entries] and scales [tables]: value = scale * (255 high + low).
DPLLM_EXPORT void dpllm_digits(const float* values, int64_t tables, int entries, int8_t* digits, float* scales);

// y [m, rows] = x [m, columns] times the matrix, row i of x at bits[i] planes.
DPLLM_EXPORT void dpllm_gemm(Context* c, const Matrix* w, const float* x, const int32_t* bits, int m, float* y);

// y [m, rows] = x [m, columns] times the matrix at `bits` planes, for a prompt. The product is float32 where it must be
// exact, or where this instruction set has no int8 kernel for it. A few tokens are computed as by dpllm_gemm.
DPLLM_EXPORT void dpllm_matmul(Context* c, const Matrix* w, const float* x, int bits, int m, int exact, float* y);

// Rows n0..n1 at `bits` planes to out [n1 - n0, columns], float32 or bfloat16.
DPLLM_EXPORT void dpllm_dequantize(Context* c, const Matrix* w, int bits, int bf16, void* out, int n0, int n1);

// y [m, rows] = x [m, columns] w^T * scale for an int8 matrix.
DPLLM_EXPORT void dpllm_int8_gemm(Context* c, const int8_t* w, const uint16_t* scale, int rows, int columns,
                                  const float* x, int m, float* y);

// out [m] = sum_k diagonal[k] x[m, k]^2.
DPLLM_EXPORT void dpllm_weighted_square(Context* c, const float* x, const uint16_t* diagonal, int m, int columns,
                                        float* out);

// Attention of one token over per-head runs of a flat cache [slots, dim]: KV head h owns length[h] slots from start[h].
// q, out: [heads, dim]; storage: dpllm::Storage.
DPLLM_EXPORT void dpllm_attention(Context* c, const float* q, const void* k, const void* v, int storage,
                                  const int64_t* start, const int32_t* length, int heads, int kv_heads, int dim,
                                  float scale, float* out);

// Attention of many tokens, whose pairs are the last of each run: token t of `tokens` sees the run's pairs up to its own,
// or the last `window` of these (0: all). q, out: [tokens, heads, dim].
DPLLM_EXPORT void dpllm_prompt_attention(Context* c, const float* q, const void* k, const void* v, int storage,
                                         const int64_t* start, const int32_t* length, int tokens, int heads,
                                         int kv_heads, int dim, int window, float scale, float* out);

// best [heads, columns] = the largest attention that any token pays to keys column, column + 1, ..., as a logarithm minus
// offset [tokens] (or null). q: [tokens, heads, dim]; k: [kv_heads, length, dim], where the last `tokens` are their own.
DPLLM_EXPORT void dpllm_attention_peaks(Context* c, const float* q, const void* k, int storage, int tokens, int heads,
                                        int kv_heads, int dim, int length, int column, int columns, float scale,
                                        const float* offset, float* best);

// The token that is drawn from logits [n]. Any number of threads may call this with one handle at a time.
DPLLM_EXPORT int dpllm_draw(const Context* c, const float* logits, int n, const dpllm::Draw* how);

// Bytes per second of a plain parallel read of `bytes` from memory.
DPLLM_EXPORT double dpllm_read_bandwidth(Context* c, const void* memory, int64_t bytes);
