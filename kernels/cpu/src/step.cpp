#include "step.h"

#include <cmath>
#include <cstring>

namespace dpllm {

Step::Step(Context& c, const Model& m)
    : c_(c), m_(m), x_(size_t(m.hidden)), h_(size_t(m.hidden)),
      qkv_(size_t(m.heads + 2 * m.kv_heads) * m.head_dim), mixed_(size_t(m.heads) * m.head_dim),
      gate_up_(2 * size_t(m.intermediate)), act_(size_t(m.intermediate)), cos_(size_t(m.head_dim / 2)),
      sin_(size_t(m.head_dim / 2)), start_(size_t(m.kv_heads)), length_(size_t(m.kv_heads)) {}

bool Step::run(const Selection& s, Cache& cache, Request& request) {
  selection_ = &s;
  multiplier_ = 1;
  allowance_ = s.allowance;
  request_ = &request;
  embed(request.token);
  rotations(request.position);
  for (int i = 0; i < m_.layers; i++)
    if (!attention(m_.layer[i], i, cache) || !mlp(m_.layer[i])) return false;
  head();
  return true;
}

void Step::embed(int token) {
  const Table& t = m_.embedding;
  const size_t row = size_t(token) * m_.hidden;
  if (t.dense) {
    std::memcpy(x_.data(), t.dense + row, sizeof(float) * m_.hidden);
    return;
  }
  const float scale = c_.isa.from_half(t.scale[token]);
  for (int i = 0; i < m_.hidden; i++) x_[size_t(i)] = float(t.int8[row + size_t(i)]) * scale;
}

void Step::rotations(int position) {
  for (int i = 0; i < m_.head_dim / 2; i++) {
    const float angle = float(position) * m_.inv_freq[i];
    cos_[size_t(i)] = std::cos(angle) * m_.rope_scale;
    sin_[size_t(i)] = std::sin(angle) * m_.rope_scale;
  }
}

// The planes that a group reads for this input; below 1 if a callback refused.
int Step::choose(const Group& g, const float* x, int columns) {
  const Selection& s = *selection_;
  if (s.fixed) return s.fixed[g.index];
  if (s.choose) return s.choose(g.index, x);
  if (s.probe && g.index == 0) {
    float exponent;
    c_.isa.float_gemv(s.probe, x, columns, &exponent, 0, 1);
    exponent = std::min(std::max(exponent + s.offset, -s.limit), s.limit);
    multiplier_ = std::exp(exponent + s.correction);
  }
  int bits = s.seed;
  const float error = multiplier_ * c_.isa.weighted_square(x, s.diagonal[g.index], columns);
  const float* threshold = s.thresholds + int64_t(g.index) * s.steps;
  for (int i = 0; i < s.steps; i++) bits += error > threshold[i];
  if (s.extra) {
    const int64_t* extra = s.extra + int64_t(g.index) * s.steps - s.seed - 1;  // indexed by width
    while (bits > s.seed && extra[bits] > allowance_) bits--;
    if (bits > s.seed) allowance_ -= extra[bits];
  }
  return bits;
}

// Decides for groups that share an input, and quantises it; those that want the same digits share the result.
bool Step::decide(const Group* g, int count, const float* x, int columns, const Activation** out) {
  const Activation* made[3] = {};
  for (int i = 0; i < count; i++) {
    const int bits = request_->bits[g[i].index] = choose(g[i], x, columns);
    if (bits < 1) return false;
    const int digits = c_.accuracy.x_digits[bits];
    if (!made[digits]) {
      Activation* a = buffer_[digits].reserve(columns);
      c_.isa.quantize(x, columns, digits, a);
      made[digits] = a;
    }
    out[i] = made[digits];
  }
  return true;
}

// Rows n0..n1 of the stacked products of one to three matrices.
void Step::rows(const Group* g, int count, const Activation* const* x, float* y, int n0, int n1) {
  for (int i = 0; i < count; i++) {
    const Matrix& w = g[i].weight;
    const int bits = request_->bits[g[i].index], a = std::max(n0, 0), b = std::min(n1, int(w.rows));
    if (a < b) c_.isa.gemv(w, bits, c_.accuracy.table_digits[bits], &x[i], 1, &y, a, b);
    y += w.rows, n0 -= w.rows, n1 -= w.rows;
  }
}

int64_t Step::row_bytes(const Group* g, int count) const {
  int bits = 0;
  for (int i = 0; i < count; i++) bits = std::max(bits, request_->bits[g[i].index]);
  return g[0].weight.row_bytes * bits;
}

// y = all rows of the stacked products.
void Step::project(const Group* g, int count, const Activation* const* x, float* y) {
  int total = 0;
  for (int i = 0; i < count; i++) total += g[i].weight.rows;
  parallel_rows(c_, total, row_bytes(g, count), [&](int n0, int n1) { rows(g, count, x, y, n0, n1); });
}

// act = silu(gate) * up, each stretch as soon as both products are there.
void Step::gated(const Layer& l, const Activation* const* x) {
  const int inner = m_.intermediate, count = l.gate_up_groups;
  float *gate = gate_up_.data(), *up = gate + inner;
  parallel_rows(c_, inner, 2 * row_bytes(l.gate_up, count), [&](int n0, int n1) {
    rows(l.gate_up, count, x, gate, n0, n1);
    rows(l.gate_up, count, x, gate, inner + n0, inner + n1);
    c_.isa.silu_mul(gate + n0, up + n0, n1 - n0, &act_[size_t(n0)]);
  });
}

void Step::store_pair(const Layer& l, int layer, Cache& cache) {
  const int d = m_.head_dim;
  float *q = qkv_.data(), *k = q + m_.heads * d, *v = k + m_.kv_heads * d;
  for (int h = 0; h < m_.heads; h++) {
    if (l.q_norm) c_.isa.rms_norm(q + h * d, l.q_norm, m_.eps, d, q + h * d);
    if (l.uses_rope) c_.isa.rope(q + h * d, cos_.data(), sin_.data(), d);
  }
  for (int h = 0; h < m_.kv_heads; h++) {
    if (l.k_norm) c_.isa.rms_norm(k + h * d, l.k_norm, m_.eps, d, k + h * d);
    if (l.uses_rope) c_.isa.rope(k + h * d, cos_.data(), sin_.data(), d);
    const int i = layer * m_.kv_heads + h;
    const size_t at = size_t(cache.start[i] + cache.length[i]) * d;
    for (int which = 0; which < 2; which++) {
      char* flat = static_cast<char*>((which ? cache.v : cache.k)[layer]);
      c_.isa.store((which ? v : k) + h * d, cache.storage, flat + at * size_t(storage_bytes(cache.storage)), d);
    }
    cache.length[i]++;
  }
}

bool Step::attention(const Layer& l, int index, Cache& cache) {
  const Activation* input[3];
  c_.isa.rms_norm(x_.data(), l.input_norm, m_.eps, m_.hidden, h_.data());
  if (!decide(l.qkv, l.qkv_groups, h_.data(), m_.hidden, input)) return false;
  project(l.qkv, l.qkv_groups, input, qkv_.data());
  store_pair(l, index, cache);

  for (int h = 0; h < m_.kv_heads; h++) {
    const int i = index * m_.kv_heads + h;
    const int skip = l.window ? std::max(0, cache.length[i] - l.window) : 0;
    start_[size_t(h)] = cache.start[i] + skip;
    length_[size_t(h)] = cache.length[i] - skip;
  }
  attention_.run(c_, Attention{qkv_.data(), static_cast<const char*>(cache.k[index]),
                               static_cast<const char*>(cache.v[index]), start_.data(), length_.data(), m_.heads,
                               m_.kv_heads, m_.head_dim, 1.f / std::sqrt(float(m_.head_dim)), cache.storage,
                               mixed_.data()});
  if (!decide(&l.o, 1, mixed_.data(), m_.heads * m_.head_dim, input)) return false;
  project(&l.o, 1, input, h_.data());
  c_.isa.add(h_.data(), m_.hidden, x_.data());
  return true;
}

bool Step::mlp(const Layer& l) {
  const Activation* input[3];
  const int inner = m_.intermediate;
  c_.isa.rms_norm(x_.data(), l.post_norm, m_.eps, m_.hidden, h_.data());
  if (!decide(l.gate_up, l.gate_up_groups, h_.data(), m_.hidden, input)) return false;
  gated(l, input);
  if (!decide(&l.down, 1, act_.data(), inner, input)) return false;
  project(&l.down, 1, input, h_.data());
  c_.isa.add(h_.data(), m_.hidden, x_.data());
  return true;
}

void Step::head() {
  const Table& t = m_.head;
  float* y = request_->logits;
  c_.isa.rms_norm(x_.data(), m_.norm, m_.eps, m_.hidden, h_.data());
  if (t.planes_bits) {
    Activation* a = buffer_[c_.accuracy.x_digits[t.planes_bits]].reserve(m_.hidden);
    c_.isa.quantize(h_.data(), m_.hidden, c_.accuracy.x_digits[t.planes_bits], a);
    parallel_rows(c_, m_.vocab, t.planes.row_bytes * t.planes_bits, [&](int n0, int n1) {
      c_.isa.gemv(t.planes, t.planes_bits, c_.accuracy.table_digits[t.planes_bits], &a, 1, &y, n0, n1);
    });
  } else {
    parallel_rows(c_, m_.vocab, t.int8 ? m_.hidden : 4 * m_.hidden, [&](int n0, int n1) {
      if (t.int8) c_.isa.int8_gemv(t.int8, t.scale, h_.data(), m_.hidden, y, n0, n1);
      else c_.isa.float_gemv(t.dense, h_.data(), m_.hidden, y, n0, n1);
    });
  }
  int best = 0;
  for (int i = 1; i < m_.vocab; i++) best = y[i] > y[best] ? i : best;
  request_->greedy = best;
}

}  // namespace dpllm

dpllm::Step* dpllm_step_open(Context* c, const dpllm::Model* m) { return new dpllm::Step(*c, *m); }
void dpllm_step_close(dpllm::Step* s) { delete s; }
int dpllm_step(dpllm::Step* s, const dpllm::Selection* selection, dpllm::Cache* cache, dpllm::Request* request) {
  return s->run(*selection, *cache, *request) ? 0 : 1;
}
