#include "api.h"

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>

#include "attention.h"

namespace dpllm {
namespace {

const Isa* const kIsas[] = {
#if defined(__x86_64__)
    &kAvx512, &kAvx2Vnni, &kAvx512Bw, &kAvx2,
#elif defined(__aarch64__)
    &kNeonDot, &kNeon,
#endif
    &kPortable,
};
constexpr int kIsaCount = sizeof kIsas / sizeof kIsas[0];

}  // namespace

uint8_t* thread_scratch(size_t bytes) {
  static thread_local AlignedBytes memory;
  static thread_local size_t room = 0;
  if (room < bytes) memory = AlignedBytes(room = bytes);
  return memory.data();
}

// All rows of x that read `bits` planes, for rows n0..n1 of the matrix.
static void gemm_rows(Context& c, const Matrix& w, int bits, const std::vector<Activation*>& x,
                      const std::vector<float*>& y, int n0, int n1) {
  c.isa.gemv(w, bits, c.accuracy.table_digits[bits], x.data(), int(x.size()), y.data(), n0, n1);
}

}  // namespace dpllm

using namespace dpllm;

int dpllm_interface() { return 3; }
const char* dpllm_isa_name(int i) { return i < kIsaCount ? kIsas[i]->name : nullptr; }
const char* dpllm_isa_needs(int i) { return i < kIsaCount ? kIsas[i]->needs : nullptr; }
int dpllm_isa_supported(int i) { return kIsas[i]->supported(); }

Context* dpllm_open(int isa, int threads, int pin, const Accuracy* accuracy) {
  return new Context{*kIsas[isa], {threads, pin != 0}, *accuracy};
}

void dpllm_close(Context* c) { delete c; }

void dpllm_digits(const float* values, int64_t tables, int entries, int8_t* digits, float* scales) {
  constexpr float kLargest = 127.f * kBase + 127.f, kRound = 12582912.f;  // adding 1.5 * 2^23 rounds to an integer
  for (int64_t t = 0; t < tables; t++, values += entries, digits += 2 * entries) {
    float top = 0;
    for (int i = 0; i < entries; i++) top = std::max(top, std::fabs(values[i]));
    bool finite = top < INFINITY;  // fmax-style comparisons pass NaN over
    for (int i = 0; i < entries; i++) finite = finite && values[i] == values[i];
    const float inverse = finite && top > 0 ? kLargest / top : 0.f;
    scales[t] = finite ? top / kLargest : NAN;  // a table that is not finite makes every product NaN
    if (!finite) {
      std::memset(digits, 0, size_t(2) * size_t(entries));
      continue;
    }
    for (int i = 0; i < entries; i++) {
      const float v = (values[i] * inverse + kRound) - kRound, high = (v * (1.f / kBase) + kRound) - kRound;
      digits[i] = int8_t(int(high));
      digits[entries + i] = int8_t(int(v - high * kBase));
    }
  }
}

void dpllm_gemm(Context* c, const Matrix* w, const float* x, const int32_t* bits, int m, float* y) {
  static thread_local std::vector<ActivationBuffer> buffers;
  if (buffers.size() < size_t(m)) buffers.resize(size_t(m));
  std::vector<Activation*> rows[kMaxBits + 1];
  std::vector<float*> outs[kMaxBits + 1];
  int widest = 0;
  std::vector<Activation*> all(static_cast<size_t>(m));
  for (int i = 0; i < m; i++) {
    all[size_t(i)] = buffers[size_t(i)].reserve(w->columns);
    rows[bits[i]].push_back(all[size_t(i)]);
    outs[bits[i]].push_back(y + int64_t(i) * w->rows);
    widest = std::max(widest, bits[i]);
  }
  c->pool.run(m, [&](int i) {
    c->isa.quantize(x + int64_t(i) * w->columns, w->columns, c->accuracy.x_digits[bits[i]], all[size_t(i)]);
  });
  parallel_rows(*c, w->rows, w->row_bytes * widest, [&](int n0, int n1) {
    for (int b = 0; b <= kMaxBits; b++)
      if (!rows[b].empty()) gemm_rows(*c, *w, b, rows[b], outs[b], n0, n1);
  });
}

static void int8_matmul(Context& c, const Matrix& w, const float* x, int bits, int m, float* y) {
  const size_t width = size_t(padded(w.columns));
  const size_t room = size_t(m + Prompt::kTileTokens - 1) / Prompt::kTileTokens * Prompt::kTileTokens;
  const AlignedBytes digits(room * width), scale(room * width / kGroup * 4), correction(size_t(m) * 4);
  Prompt prompt{reinterpret_cast<int8_t*>(digits.data()), reinterpret_cast<float*>(scale.data()),
                reinterpret_cast<float*>(correction.data()), m};
  c.pool.run(m, [&](int i) { c.isa.quantize_prompt(x + int64_t(i) * w.columns, w.columns, i, &prompt); });
  constexpr int kRows = Prompt::kPanelRows;
  c.pool.run((w.rows + kRows - 1) / kRows, [&](int i) {
    uint8_t* panel = thread_scratch(width * kRows);
    c.isa.matmul(w, bits, prompt, panel, y, i * kRows, std::min(w.rows, (i + 1) * kRows));
  });
}

constexpr int kTokens = PromptQueries::kMost;  // tokens of a block in float32

static void float_pass(Context& c, const Matrix& w, const float* x, int bits, int m, float* y) {
  constexpr int kRows = 24;  // whole tiles of any instruction set
  const int64_t columns = w.columns;
  const AlignedBytes memory(size_t((m + kTokens - 1) / kTokens * kTokens * columns) * sizeof(float));
  float* blocks = reinterpret_cast<float*>(memory.data());
  c.pool.run((m + kTokens - 1) / kTokens, [&](int i) {
    const int64_t first = int64_t(i) * kTokens * columns;
    c.isa.transpose_tokens(x + first, w.columns, std::min(kTokens, m - i * kTokens), blocks + first);
  });
  c.pool.run((w.rows + kRows - 1) / kRows, [&](int i) {
    float* scratch = reinterpret_cast<float*>(thread_scratch(kRows * size_t(columns + kTokens) * sizeof(float)));
    c.isa.float_matmul(w, bits, blocks, m, scratch, y, i * kRows, std::min(w.rows, (i + 1) * kRows));
  });
}

// Every few rows of weights are multiplied by all tokens of a pass, so the tokens should stay in a cache. With 4 MB of
// tokens the product takes twice the time that it takes with 2 MB, far more than dequantising the matrix for each pass.
static void float_matmul(Context& c, const Matrix& w, const float* x, int bits, int m, float* y) {
  constexpr int64_t kTogether = 2 << 20;  // bytes of a pass
  const int most = int(std::max<int64_t>(kTogether / (int64_t(w.columns) * 4 * kTokens), 1));  // blocks of a pass
  const int blocks = (m + kTokens - 1) / kTokens, passes = (blocks + most - 1) / most;
  const int tokens = passes ? (blocks + passes - 1) / passes * kTokens : 0;
  for (int t = 0; t < m; t += tokens)
    float_pass(c, w, x + int64_t(t) * w.columns, bits, std::min(tokens, m - t), y + int64_t(t) * w.rows);
}

void dpllm_matmul(Context* c, const Matrix* w, const float* x, int bits, int m, int exact, float* y) {
  constexpr int kFew = 24;  // the most tokens that are multiplied one by one instead of dequantising a matrix
  if (exact) return float_matmul(*c, *w, x, bits, m, y);
  if (c->isa.matmul) return int8_matmul(*c, *w, x, bits, m, y);
  if (m > kFew) return float_matmul(*c, *w, x, bits, m, y);
  const std::vector<int32_t> widths(size_t(m), bits);
  dpllm_gemm(c, w, x, widths.data(), m, y);
}

void dpllm_dequantize(Context* c, const Matrix* w, int bits, int bf16, void* out, int n0, int n1) {
  const int64_t row = int64_t(w->columns) * (bf16 ? 2 : 4);
  parallel_rows(*c, n1 - n0, row, [&](int a, int b) {
    c->isa.dequantize(*w, bits, bf16 != 0, static_cast<char*>(out) + a * row, n0 + a, n0 + b);
  });
}

void dpllm_int8_gemm(Context* c, const int8_t* w, const uint16_t* scale, int rows, int columns, const float* x,
                     int m, float* y) {
  parallel_rows(*c, rows, columns, [&](int n0, int n1) {
    for (int i = 0; i < m; i++)
      c->isa.int8_gemv(w, scale, x + int64_t(i) * columns, columns, y + int64_t(i) * rows, n0, n1);
  });
}

void dpllm_weighted_square(Context* c, const float* x, const uint16_t* diagonal, int m, int columns, float* out) {
  for (int i = 0; i < m; i++) out[i] = c->isa.weighted_square(x + int64_t(i) * columns, diagonal, columns);
}

void dpllm_attention(Context* c, const float* q, const void* k, const void* v, int storage, const int64_t* start,
                     const int32_t* length, int heads, int kv_heads, int dim, float scale, float* out) {
  static thread_local AttentionBuffer buffer;
  buffer.run(*c, Attention{q, static_cast<const char*>(k), static_cast<const char*>(v), start, length, heads,
                           kv_heads, dim, scale, Storage(storage), out});
}

void dpllm_prompt_attention(Context* c, const float* q, const void* k, const void* v, int storage, const int64_t* start,
                            const int32_t* length, int tokens, int heads, int kv_heads, int dim, int window, float scale,
                            float* out) {
  const int group = heads / kv_heads, rows = tokens * group;
  const int blocks = (rows + PromptQueries::kMost - 1) / PromptQueries::kMost;
  const int64_t bytes = storage_bytes(Storage(storage));
  c->pool.run(kv_heads * blocks, [&](int i) {
    const int h = i % kv_heads, first = (blocks - 1 - i / kv_heads) * PromptQueries::kMost;  // the longest ones begin
    const int64_t at = start[h] * dim * bytes;
    const PromptQueries p{static_cast<const char*>(k) + at, static_cast<const char*>(v) + at,
                          q + int64_t(h) * group * dim, out + int64_t(h) * group * dim, first,
                          std::min(PromptQueries::kMost, rows - first), group, heads, dim, length[h] - tokens, window,
                          scale, Storage(storage)};
    c->isa.attend_prompt(p, reinterpret_cast<float*>(thread_scratch(prompt_scratch(dim) * sizeof(float))));
  });
}

void dpllm_attention_peaks(Context* c, const float* q, const void* k, int storage, int tokens, int heads, int kv_heads,
                           int dim, int length, int column, int columns, float scale, const float* offset, float* best) {
  const int64_t run = int64_t(length) * dim * storage_bytes(Storage(storage));
  c->pool.run(heads, [&](int h) {
    float* own = best + int64_t(h) * columns;
    std::fill_n(own, columns, -INFINITY);
    for (int first = 0; first < tokens; first += PromptQueries::kMost) {
      const PromptQueries p{static_cast<const char*>(k) + h / (heads / kv_heads) * run, nullptr, q + int64_t(h) * dim,
                            nullptr, first, std::min(PromptQueries::kMost, tokens - first), 1, heads, dim,
                            length - tokens, 0, scale, Storage(storage)};
      float* scratch = reinterpret_cast<float*>(thread_scratch(peak_scratch(dim, length) * sizeof(float)));
      c->isa.attention_peaks(p, offset ? offset + first : nullptr, column, columns, scratch, own);
    }
  });
}

double dpllm_read_bandwidth(Context* c, const void* memory, int64_t bytes) {
  constexpr int64_t kChunk = 1 << 20;
  std::atomic<uint64_t> sink{0};
  const auto began = std::chrono::steady_clock::now();
  c->pool.run(int(bytes / kChunk), [&](int i) {
    typedef uint64_t Words __attribute__((vector_size(64)));
    const char* p = static_cast<const char*>(memory) + i * kChunk;
    Words s[4] = {};
    for (int64_t at = 0; at < kChunk; at += 256)
      for (int j = 0; j < 4; j++) {
        Words w;
        std::memcpy(&w, p + at + 64 * j, 64);
        s[j] |= w;
        __builtin_prefetch(p + at + 64 * j + 4096);
      }
    s[0] |= s[1] | s[2] | s[3];
    sink += s[0][0] | s[0][7];
  });
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
  return double(bytes / kChunk * kChunk) / took.count();
}
