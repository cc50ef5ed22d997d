// One decode step of a Llama-family decoder: token in, logits out, every group of matrices at its own width.
//
// The structures are filled by the caller, which keeps all memory they point to. Float arrays are float32.
#pragma once

#include "attention.h"
#include "context.h"

namespace dpllm {

// Matrices that share an input and a decision (q/k/v, gate/up), stacked; or one of them.
struct Group {
  Matrix weight;
  int32_t index;  // of its decision
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
  const int32_t* fixed;               // [groups], or null
  const uint16_t* const* diagonal;    // [groups] of float16 [columns], or null
  const float* thresholds;            // [groups, steps], ascending: rewriting them retargets
  int32_t steps, seed;
  // The token's multiplier, exp(clamp(probe . input of group 0 + offset, +-limit) + correction); 1 without a probe.
  const float* probe;                 // [hidden], or null
  float offset, limit, correction;
  int32_t (*choose)(int32_t group, const float* x);  // or null
  // Where thresholds decide, a token reads at most `allowance` bytes beyond the seed width: extra [groups, steps], what
  // each width costs beyond it. Groups that come too late for their planes get what is left. null: no limit.
  const int64_t* extra;
  int64_t allowance;
};

// The key-value cache of one sequence: layer l, KV head h owns length[l, h] slots from start[l, h] of the
// layer's flat [slots, head_dim]; the step writes the new pair behind them.
struct Cache {
  void *const *k, *const *v;  // [layers]
  const int64_t* start;
  int32_t* length;      // advanced by the step
  Storage storage;
};

struct Request {
  int32_t token, position;
  float* logits;     // [vocab]
  int32_t* bits;     // [groups] chosen
  int32_t greedy;    // out: the token of the largest logit
};

class Step {
 public:
  Step(Context& c, const Model& m);
  // False if a callback refused (returned a width below 1).
  bool run(const Selection& s, Cache& cache, Request& request);

 private:
  void embed(int token);
  void rotations(int position);
  bool attention(const Layer& l, int index, Cache& cache);
  bool mlp(const Layer& l);
  void store_pair(const Layer& l, int layer, Cache& cache);
  int choose(const Group& g, const float* x, int columns);
  bool decide(const Group* g, int count, const float* x, int columns, const Activation** out);
  void rows(const Group* g, int count, const Activation* const* x, float* y, int n0, int n1);
  int64_t row_bytes(const Group* g, int count) const;
  void project(const Group* g, int count, const Activation* const* x, float* y);
  void gated(const Layer& l, const Activation* const* x);
  void head();

  Context& c_;
  const Model& m_;
  const Selection* selection_ = nullptr;
  float multiplier_ = 1;
  int64_t allowance_ = 0;  // left of the token's
  Request* request_ = nullptr;
  std::vector<float> x_, h_, qkv_, mixed_, gate_up_, act_, cos_, sin_;
  std::vector<int64_t> start_;
  std::vector<int32_t> length_;
  ActivationBuffer buffer_[3];  // by digits
  AttentionBuffer attention_;
};

}  // namespace dpllm

#include "api.h"

DPLLM_EXPORT dpllm::Step* dpllm_step_open(Context* c, const dpllm::Model* m);
DPLLM_EXPORT void dpllm_step_close(dpllm::Step* s);
DPLLM_EXPORT int dpllm_step(dpllm::Step* s, const dpllm::Selection* selection, dpllm::Cache* cache,
                            dpllm::Request* request);
