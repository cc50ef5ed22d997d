// The interface of every instruction-set variant, and its data types. Plain C++17.
//
// A weight is a code of `bits` planes that selects an entry of its row's table. Table entries and activations
// are split into two digits of base 255, each within -127..127, so that every product is an 8-bit one and no
// pair of products can overflow 16 bits: value = scale * (255 * high + low). The low digit of either side may be
// left out; the rest is plain int8.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace dpllm {

constexpr int kGroup = 32;      // activations that share a scale; also the weights in one word of a plane
constexpr int kBase = 255;      // of the digits
constexpr int kMaxBits = 8;
constexpr int kBlock = 512;     // columns that the widest kernel takes at once; activations are padded to a multiple

// A [rows, columns] matrix. Planes are as the overlay stores them: most significant first, bit i of word w is column
// 32 w + i.
struct Matrix {
  const uint8_t* planes;  // plane p of row n starts at planes + p * plane_bytes + n * row_bytes
  int64_t plane_bytes, row_bytes;
  const int8_t* tables[kMaxBits + 1];  // per width: [rows / rows_per_table][high, low][2^bits]
  const float* scales[kMaxBits + 1];   // per width: [rows / rows_per_table], of the low digit
  const float* row_scale;              // [rows], or null
  const float* bias;                   // [rows], or null
  int32_t rows, columns, rows_per_table;
  int32_t x_digits;  // 2: activations have both digits, whatever the accuracy; 0: as the accuracy says
};

// A row of activations, quantised in groups of 32 and laid out as the kernel needs it (by Isa::quantize).
struct Activation {
  int8_t* high;      // [padded columns]
  int8_t* low;       // [padded columns], used when digits is 2
  float* scale;      // of the low digit (of `high` when digits is 1); 4 floats of room per group
  float correction;  // 128 * sum of the quantised values, which unsigned table digits (+128) add to a product
  int32_t digits;    // 1: int8, 2: 16-bit
};

// A whole prompt, quantised to int8 for `Isa::matmul`. Rows are kept in tiles; the last one has room for a whole tile.
struct Prompt {
  static constexpr int kTileTokens = 6;
  static constexpr int kPanelRows = 32;  // rows of weights that `matmul` takes at once

  int8_t* digits;     // [tiles][padded columns / 4][kTileTokens][4]
  float* scale;       // [tiles][padded columns / 32][kTileTokens]
  float* correction;  // [rows], as in Activation
  int32_t rows;
};

// For functions that must be inlined into one loop body, whatever their size.
#define DPLLM_INLINE inline __attribute__((always_inline))

// Zeroed memory on a 64-byte boundary.
class AlignedBytes {
 public:
  AlignedBytes() = default;
  explicit AlignedBytes(size_t n) : bytes_(new uint8_t[n + 64]()) {}
  uint8_t* data() const {
    return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(bytes_.get()) + 63) & ~uintptr_t(63));
  }

 private:
  std::unique_ptr<uint8_t[]> bytes_;
};

inline int padded(int columns) { return (columns + kBlock - 1) / kBlock * kBlock; }

// How keys and values are stored.
enum class Storage : int32_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

inline int storage_bytes(Storage s) { return s == Storage::kFloat32 ? 4 : 2; }

// A stretch of one KV head's pairs and the query heads that read it.
struct Run {
  const void *k, *v;  // [length, dim]
  const float* q;     // [group, dim]
  int32_t length, group, dim;
  float scale;
  Storage storage;
};

// Up to kMost queries of one KV head's group, and its run of keys, which ends with the tokens' own keys. Queries are
// counted token by token, and head by head within a token.
struct PromptQueries {
  static constexpr int kMost = 64;
  static constexpr int kKeys = 96;  // keys that are processed together

  const void *k, *v;     // [length, dim]
  const float* q;        // [tokens, heads, dim], from the group's first head on
  float* out;            // likewise
  int32_t first, count;  // queries first .. first + count - 1
  int32_t group, heads, dim;
  int32_t before;  // keys before the first token's own
  int32_t window;  // keys that a token sees, its own included; 0: all up to its own
  float scale;
  Storage storage;

  int64_t offset(int i) const { return (int64_t((first + i) / group) * heads + (first + i) % group) * dim; }
  int32_t own(int i) const { return before + (first + i) / group; }
};

// Floats of scratch for Isa::attend_prompt and, with all keys, Isa::attention_peaks.
inline size_t prompt_scratch(int dim) {
  using P = PromptQueries;
  return size_t(P::kMost) * (2 * size_t(dim) + P::kKeys + 3) + size_t(P::kKeys) * size_t(dim);
}
inline size_t peak_scratch(int dim, int keys) {
  using P = PromptQueries;
  return size_t(P::kMost) * (size_t(dim) + size_t(keys) + 1) + size_t(P::kKeys) * size_t(dim);
}

// One block of columns of a coordinate descent on nested codes. Every width reads a prefix of the same code. A weight takes
// the parent code with the least sum over widths of (root * (value - optimum))^2.
struct Descent {
  static constexpr int kBlock = 64;  // the most columns of a block

  const float* weight;   // [rows, columns]
  uint8_t* codes;        // [rows, columns], of parent_bits
  float* error;          // [rows, widths, columns]: value minus weight
  const float* pull;     // [rows, widths, columns]: error times hessian
  const float* hessian;  // [columns, columns], with a positive diagonal
  const float* leaf;     // [rows / rows_per_table, widths, 2^parent_bits]: each width's value per parent code
  const float* root;     // [widths]
  float* change;         // [rows, widths, last - first]: written; what was added to the error
  int32_t columns, widths, parent_bits, rows_per_table, first, last;
};

struct Isa {
  const char* name;
  const char* needs;  // processor features, for people
  bool (*supported)();

  // x [columns] -> digits and scales. A non-finite value makes every product with this row NaN.
  void (*quantize)(const float* x, int columns, int digits, Activation* out);

  // y[i][n] for rows n0 <= n < n1 of the weights and `count` activations that all read `bits` planes (and have
  // the same number of digits). table_digits 1 reads only the high digits of the tables.
  void (*gemv)(const Matrix& w, int bits, int table_digits, const Activation* const* x, int count,
               float* const* y, int n0, int n1);

  // Rows n0..n1 at `bits` planes, as bfloat16 or float32 [n1 - n0, columns].
  void (*dequantize)(const Matrix& w, int bits, bool bf16, void* out, int n0, int n1);

  // y[n] = scale[n] * sum_k w[n, k] x[k], rows n0..n1. scale in float16.
  void (*int8_gemv)(const int8_t* w, const uint16_t* scale, const float* x, int columns, float* y, int n0, int n1);
  void (*float_gemv)(const float* w, const float* x, int columns, float* y, int n0, int n1);

  void (*rms_norm)(const float* x, const float* weight, float eps, int n, float* y);
  void (*silu_mul)(const float* gate, const float* up, int n, float* out);
  void (*add)(const float* x, int n, float* y);                        // y += x
  void (*rope)(float* x, const float* cos, const float* sin, int dim);  // one head in place, halves paired

  // sum_k diagonal[k] x[k]^2, diagonal in float16.
  float (*weighted_square)(const float* x, const uint16_t* diagonal, int n);

  // Attention over one run: out [group, dim] unnormalised, top [group] the largest score, sum [group] of
  // exp(score - top). scratch: group * length floats.
  void (*attend)(const Run& run, float* scratch, float* out, float* top, float* sum);

  // Attention of many queries at once, to out; see prompt_attention.h.
  void (*attend_prompt)(const PromptQueries& p, float* scratch);

  // best[c] = the largest of its old value and of any query's log-attention to key column + c, minus the query's offset
  // (null: none). Queries with NaN are ignored.
  void (*attention_peaks)(const PromptQueries& p, const float* offset, int column, int columns, float* scratch,
                          float* best);

  // For drawing a token, see draw.h. NaN counts as the smallest value there is.
  void (*block_largest)(const float* x, int n, float* out);  // of each kDrawBlock values
  // Weights exp((x - top) * inverse), 0 below kLeastScore, to out. Returns their sum.
  double (*exponentials)(const float* x, int n, float top, float inverse, float* out);
  double (*sum_above)(const float* x, const float* weights, int n, float least);  // of weights[i] where x[i] >= least
  // The index of the largest weights[i] / -log(1 - u), with a random u for each token ids[i] (null: i); -1 where all
  // weights are 0.
  int (*race)(const int32_t* ids, const float* weights, int n, uint64_t seed, uint32_t number);

  void (*store)(const float* x, Storage storage, void* y, int n);  // n values to a cache
  float (*from_half)(uint16_t h);

  // Many rows at once in float32. x [count, columns] -> out [columns][PromptQueries::kMost], zero after `count`;
  // y [tokens, rows of the weights], rows n0..n1, from blocks of `tokens` tokens. scratch: (n1 - n0) * (columns + kMost).
  void (*transpose_tokens)(const float* x, int columns, int count, float* out);
  void (*float_matmul)(const Matrix& w, int bits, const float* blocks, int tokens, float* scratch, float* y, int n0,
                       int n1);

  // The same from high table digits and int8 activations; null where float32 is equally fast. Columns are padded
  // to kBlock in the quantised prompt; y is [rows of the prompt, rows of the weights], rows n0..n1 of the weights, at
  // most kPanelRows. panel: scratch, kPanelRows * padded columns bytes on a 64-byte boundary.
  void (*quantize_prompt)(const float* x, int columns, int row, Prompt* out);
  void (*matmul)(const Matrix& w, int bits, const Prompt& x, uint8_t* panel, float* y, int n0, int n1);

  void (*descend)(const Descent& d, int n0, int n1);
};

extern const Isa kAvx512, kAvx512Bw, kAvx2Vnni, kAvx2, kNeonDot, kNeon, kPortable;

}  // namespace dpllm
