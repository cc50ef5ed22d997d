// One decode step of a Llama-family decoder, which computes logits from tokens with every group of matrices at its own
// width.
//
// A step takes one token, or several consecutive tokens of one sequence. Several tokens share one read of the weights, and
// each gets bit for bit the result of a step of its own. The caller fills the structures, and owns all memory to which
// they point. Float arrays are float32.
#pragma once

#include "attention.h"
#include "context.h"

namespace dpllm {

constexpr int kMaxRows = 16;  // the most tokens of one step

// Matrices that share an input and a decision (q/k/v, gate/up), stacked; or one such matrix.
struct Group {
  Matrix weight;
  int32_t index;            // of its decision
  int64_t weights;          // elements of the group's matrices
  const int64_t* bytes_at;  // [kMaxBits + 1] bytes that one pass reads at each width
};

struct Layer {
  const float *input_norm, *post_norm;
  const float *q_norm, *k_norm;  // per head, or null
  Group qkv[3], gate_up[2], o, down;
  int32_t qkv_groups, gate_up_groups;
  int32_t window;    // pairs that a token sees; 0: all
  int32_t uses_rope;
};

// The matrix of embedding or head: int8 with one float16 scale for each row, or float32, or planes.
struct Table {
  const int8_t* int8;
  const uint16_t* scale;
  const float* dense;
  Matrix planes;
  int32_t planes_bits;  // 0 where planes are not used
};

struct Model {
  int32_t layers, hidden, intermediate, heads, kv_heads, head_dim, vocab, groups;
  float eps, rope_scale;
  const float* inv_freq;  // [head_dim / 2]
  const float* norm;
  Table embedding, head;
  const Layer* layer;
};

// How the number of planes that a group reads is chosen, in one of three ways: fixed widths; thresholds on the token's
// multiplier times a weighted square of the group's input (the seed width plus the number of thresholds exceeded); or a
// callback.
struct Selection {
  const int32_t* fixed;               // [groups], the same for all rows; or null
  const uint16_t* const* diagonal;    // [groups] of float16 [columns], or null
  const float* thresholds;            // [groups, steps], ascending; writing others changes the target
  int32_t steps, seed;
  // A token's multiplier, exp(clamp(probe . input of group 0 + offset, +-limit) + correction); 1 without a probe.
  const float* probe;                 // [hidden], or null
  const float* correction;            // [rows]
  float offset, limit;
  int32_t (*choose)(int32_t group, const float* x);  // or null; called for each group in turn, and each row of it
  // Where thresholds decide, every token costs at most `allowance` beyond the seed width. extra [groups, steps]: the cost
  // of each width beyond the seed width (null: no limit). So that something is left for the last groups, a token's
  // multiplier is limited to (what is left / rest) ^ gain, where rest [groups] is what a group and later ones usually cost.
  const int64_t* extra;
  int64_t allowance;
  const float* rest;
  float gain;
};

// The key-value cache of one sequence: layer l, KV head h owns length[l, h] slots from start[l, h] of the
// layer's flat [slots, head_dim]; the step writes the new pair after these.
struct Cache {
  void *const *k, *const *v;  // [layers]
  const int64_t* start;
  int32_t* length;      // the step adds its rows
  Storage storage;
};

// A row is a token. The cache must have room for all rows.
struct Request {
  int32_t rows;           // 1..kMaxRows
  int32_t position;       // of the first token
  const int32_t* tokens;  // [rows]
  float* logits;          // [rows, vocab]
  int32_t* bits;          // [rows, groups], out: the chosen widths
  int32_t* greedy;        // [rows], out: the token of the largest logit; -1 where a logit is not finite
  int64_t* read_bits;     // [rows], out: sum over all groups of weights times chosen bits
  int64_t read_bytes;     // out: bytes of the groups' matrices that all rows together read, each group once
};

// The activations that enter the products of one group, by the width that their rows read.
struct Reads {
  int32_t count[kMaxBits + 1];
  int32_t row[kMaxBits + 1][kMaxRows];
  const Activation* x[kMaxBits + 1][kMaxRows];
};

class Step {
 public:
  Step(Context& c, const Model& m);
  // Returns false where a callback stopped the step (returned a width below 1).
  bool run_in_turn(const Selection& s, Cache& cache, Request& request);

 private:
  bool run(const Selection& s, Cache& cache, Request& request);
  void reserve(int rows);
  void embed();
  void rotations();
  void norm(const float* weight);
  bool attention(const Layer& l, int index, Cache& cache);
  bool mlp(const Layer& l);
  void store_pairs(const Layer& l, int layer, Cache& cache);
  void turn(const Layer& l, const float* weight, float* head, int row);
  void attend(const Layer& l, int layer, const Cache& cache);
  int choose(const Group& g, int row, const float* x, int columns);
  bool decide(const Group* g, int count, const float* x, int columns);
  void products(const Group* g, int count, float* y, int stride, int n0, int n1);
  int64_t row_bytes(const Group* g, int count) const;
  void project(const Group* g, int count, float* y, int stride);
  void gated(const Layer& l);
  void head();
  void greedy();

  Context& c_;
  const Model& m_;
  const Selection* selection_ = nullptr;
  Request* request_ = nullptr;
  int rows_ = 0, room_ = 0;                                     // rows of this step; rows for which the vectors have room
  std::vector<float> x_, h_, qkv_, q_, mixed_, gate_up_, act_;  // one line for each row
  std::vector<float> cos_, sin_, multiplier_;
  std::vector<int64_t> allowance_;  // what each row may still cost
  std::vector<int64_t> start_;
  std::vector<int32_t> length_;
  Reads reads_[3];                        // for each group under decision
  ActivationBuffer buffer_[3][kMaxRows];  // for each number of digits
  AttentionBuffer attention_;
};

}  // namespace dpllm

#include "api.h"

DPLLM_EXPORT dpllm::Step* dpllm_step_open(Context* c, const dpllm::Model* m);
DPLLM_EXPORT void dpllm_step_close(dpllm::Step* s);
DPLLM_EXPORT int dpllm_step_rows(dpllm::Step* s, const dpllm::Selection* selection, dpllm::Cache* cache,
                                 dpllm::Request* request);
