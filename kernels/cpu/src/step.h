// One decode step of a Llama-family decoder: tokens in, logits out, every group of matrices at its own width.
//
// A step takes one token, or several of one sequence behind each other: weights are then read once for all of them, and
// each gets, bit for bit, the numbers that a step of its own would give it. The structures are filled by the caller,
// which keeps all memory they point to. Float arrays are float32.
#pragma once

#include "attention.h"
#include "context.h"

namespace dpllm {

constexpr int kMaxRows = 16;  // tokens of one step

// Matrices that share an input and a decision (q/k/v, gate/up), stacked; or one of them.
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
  int32_t window;    // 0: attends to everything
  int32_t uses_rope;
};

// A dense matrix for embedding look-up and head: int8 with a float16 scale a row, or float32, or planes.
struct Table {
  const int8_t* int8;
  const uint16_t* scale;
  const float* dense;
  Matrix planes;
  int32_t planes_bits;  // 0 unless planes are used
};

struct Model {
  int32_t layers, hidden, intermediate, heads, kv_heads, head_dim, vocab, groups;
  float eps, rope_scale;
  const float* inv_freq;  // [head_dim / 2]
  const float* norm;
  Table embedding, head;
  const Layer* layer;
};

// Who decides how many planes a group reads. One of three: fixed widths; thresholds on the token's multiplier times a
// weighted square of the group's input (seed plus the number of thresholds exceeded); or a call back.
struct Selection {
  const int32_t* fixed;               // [groups] of the first row, or null
  int32_t fixed_stride;               // from one row's widths to the next one's; 0: all rows read the same
  const uint16_t* const* diagonal;    // [groups] of float16 [columns], or null
  const float* thresholds;            // [groups, steps], ascending: rewriting them retargets
  int32_t steps, seed;
  // A token's multiplier, exp(clamp(probe . input of group 0 + offset, +-limit) + correction); 1 without a probe.
  const float* probe;                 // [hidden], or null
  const float* correction;            // [rows]
  float offset, limit;
  int32_t (*choose)(int32_t group, const float* x);  // or null; called group after group, row after row
  // Where thresholds decide, every token costs at most `allowance` beyond the seed width: extra [groups, steps], what each
  // width costs beyond it (null: no limit). So that the last groups are not left without, a token's multiplier is kept to
  // (what is left / rest) ^ gain, rest [groups] being what a group and those behind it cost as a rule.
  const int64_t* extra;
  int64_t allowance;
  const float* rest;
  float gain;
};

// The key-value cache of one sequence: layer l, KV head h owns length[l, h] slots from start[l, h] of the
// layer's flat [slots, head_dim]; the step writes the new pair behind them.
struct Cache {
  void *const *k, *const *v;  // [layers]
  const int64_t* start;
  int32_t* length;      // advanced by the step, by its rows
  Storage storage;
};

// A row is a token; the cache needs room for all of them.
struct Request {
  int32_t rows;           // 1..kMaxRows
  int32_t position;       // of the first
  const int32_t* tokens;  // [rows]
  float* logits;          // [rows, vocab]
  int32_t* bits;          // [rows, groups] chosen
  int32_t* greedy;        // [rows], out: the token of the largest logit
  int64_t* read_bits;     // [rows], out: sum over all groups of weights times chosen bits
  int64_t read_bytes;     // out: bytes of the groups' matrices that all rows together read, each group once
};

// What goes into the products of one group: activations by the width at which their rows read.
struct Reads {
  int32_t count[kMaxBits + 1];
  int32_t row[kMaxBits + 1][kMaxRows];
  const Activation* x[kMaxBits + 1][kMaxRows];
};

class Step {
 public:
  Step(Context& c, const Model& m);
  // False if a callback refused (returned a width below 1).
  bool run(const Selection& s, Cache& cache, Request& request);

 private:
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
  int rows_ = 0, room_ = 0;                                     // of this step; that the vectors hold
  std::vector<float> x_, h_, qkv_, q_, mixed_, gate_up_, act_;  // a line a row
  std::vector<float> cos_, sin_, multiplier_;
  std::vector<int64_t> allowance_;  // of each row, what is left
  std::vector<int64_t> start_;
  std::vector<int32_t> length_;
  Reads reads_[3];                        // by group under decision
  ActivationBuffer buffer_[3][kMaxRows];  // by digits
  AttentionBuffer attention_;
};

}  // namespace dpllm

#include "api.h"

DPLLM_EXPORT dpllm::Step* dpllm_step_open(Context* c, const dpllm::Model* m);
DPLLM_EXPORT void dpllm_step_close(dpllm::Step* s);
DPLLM_EXPORT int dpllm_step_rows(dpllm::Step* s, const dpllm::Selection* selection, dpllm::Cache* cache,
                                 dpllm::Request* request);
