#include "step.h"

#include <cmath>
#include <cstring>

namespace dpllm {

Step::Step(Context& c, const Model& m) : c_(c), m_(m) {}

bool Step::run(const Selection& s, Cache& cache, Request& request) {
  selection_ = &s;
  request_ = &request;
  reserve(rows_ = request.rows);
  std::fill(multiplier_.begin(), multiplier_.end(), 1.f);
  std::fill(allowance_.begin(), allowance_.end(), s.allowance);
  std::fill(request.read_bits, request.read_bits + rows_, 0);
  request.read_bytes = 0;
  embed();
  rotations();
  for (int i = 0; i < m_.layers; i++)
    if (!attention(m_.layer[i], i, cache) || !mlp(m_.layer[i])) return false;
  head();
  greedy();
  return true;
}

bool Step::run_in_turn(const Selection& s, Cache& cache, Request& request) {
  const Turn turn(c_.pool->turn);
  return run(s, cache, request);
}

void Step::reserve(int rows) {
  if (rows <= room_) return;
  const size_t n = size_t(room_ = rows), q = size_t(m_.heads) * m_.head_dim;
  for (std::vector<float>* v : {&x_, &h_}) v->resize(n * m_.hidden);
  qkv_.resize(n * (q + 2 * size_t(m_.kv_heads) * m_.head_dim));
  for (std::vector<float>* v : {&q_, &mixed_}) v->resize(n * q);
  gate_up_.resize(n * 2 * m_.intermediate);
  act_.resize(n * m_.intermediate);
  for (std::vector<float>* v : {&cos_, &sin_}) v->resize(n * (m_.head_dim / 2));
  multiplier_.resize(n);
  allowance_.resize(n);
  start_.resize(n * m_.kv_heads);
  length_.resize(n * m_.kv_heads);
}

void Step::embed() {
  const Table& t = m_.embedding;
  const size_t n = size_t(m_.hidden);
  for (int r = 0; r < rows_; r++) {
    const int token = request_->tokens[r];
    float* x = &x_[r * n];
    if (t.dense) {
      std::memcpy(x, t.dense + token * n, sizeof(float) * n);
      continue;
    }
    const float scale = c_.isa.from_half(t.scale[token]);
    for (size_t i = 0; i < n; i++) x[i] = float(t.int8[token * n + i]) * scale;
  }
}

void Step::rotations() {
  const int half = m_.head_dim / 2;
  for (int r = 0; r < rows_; r++)
    for (int i = 0; i < half; i++) {
      const float angle = float(request_->position + r) * m_.inv_freq[i];
      cos_[size_t(r * half + i)] = std::cos(angle) * m_.rope_scale;
      sin_[size_t(r * half + i)] = std::sin(angle) * m_.rope_scale;
    }
}

// h = norm of x.
void Step::norm(const float* weight) {
  for (size_t at = 0; at < size_t(rows_) * m_.hidden; at += size_t(m_.hidden))
    c_.isa.rms_norm(&x_[at], weight, m_.eps, m_.hidden, &h_[at]);
}

// Returns the planes that a group reads for this input; below 1 where a callback stopped the step.
int Step::choose(const Group& g, int row, const float* x, int columns) {
  const Selection& s = *selection_;
  if (s.fixed) return s.fixed[g.index];
  if (s.choose) return s.choose(g.index, x);
  float& multiplier = multiplier_[size_t(row)];
  if (s.probe && g.index == 0) {
    float exponent;
    c_.isa.float_gemv(s.probe, x, columns, &exponent, 0, 1);
    exponent = std::min(std::max(exponent + s.offset, -s.limit), s.limit);
    multiplier = std::exp(exponent + s.correction[row]);
  }
  int bits = s.seed;
  float allowed = multiplier;
  if (s.extra && s.rest[g.index] > 0)
    allowed = std::min(multiplier, std::pow(float(allowance_[size_t(row)]) / s.rest[g.index], s.gain));
  const float error = allowed * c_.isa.weighted_square(x, s.diagonal[g.index], columns);
  const float* threshold = s.thresholds + int64_t(g.index) * s.steps;
  for (int i = 0; i < s.steps; i++) bits += error > threshold[i];
  if (s.extra) {
    const int64_t* extra = s.extra + int64_t(g.index) * s.steps - s.seed - 1;  // indexed by width
    int64_t& left = allowance_[size_t(row)];
    while (bits > s.seed && extra[bits] > left) bits--;
    if (bits > s.seed) left -= extra[bits];
  }
  return bits;
}

// Chooses widths for groups that share inputs x [rows, columns], and quantises the inputs. Products that need the same
// digits of a row share the result.
bool Step::decide(const Group* g, int count, const float* x, int columns) {
  bool wanted[3][kMaxRows] = {};
  for (int i = 0; i < count; i++) {
    Reads& reads = reads_[i];
    int widest = 0;
    std::fill(std::begin(reads.count), std::end(reads.count), 0);
    for (int r = 0; r < rows_; r++) {
      const int bits = request_->bits[r * m_.groups + g[i].index] = choose(g[i], r, x + size_t(r) * columns, columns);
      if (bits < 1) return false;
      widest = std::max(widest, bits);
      request_->read_bits[r] += g[i].weights * bits;
      const int digits = c_.accuracy.digits_for(g[i].weight, bits), at = reads.count[bits]++;
      wanted[digits][r] = true;
      reads.row[bits][at] = r;
      reads.x[bits][at] = buffer_[digits][r].reserve(columns);
    }
    request_->read_bytes += g[i].bytes_at[widest];
  }
  c_.pool->run(rows_, [&](int r) {
    for (int digits = 1; digits <= 2; digits++)
      if (wanted[digits][r])
        c_.isa.quantize(x + size_t(r) * columns, columns, digits, buffer_[digits][r].reserve(columns));
  });
  return true;
}

// Rows n0..n1 of the stacked products of one to three matrices. y: one line of `stride` elements for each token.
void Step::products(const Group* g, int count, float* y, int stride, int n0, int n1) {
  for (int i = 0; i < count; i++) {
    const Matrix& w = g[i].weight;
    const Reads& reads = reads_[i];
    const int a = std::max(n0, 0), b = std::min(n1, int(w.rows));
    for (int bits = 1; bits <= kMaxBits && a < b; bits++) {
      float* out[kMaxRows];
      for (int j = 0; j < reads.count[bits]; j++) out[j] = y + size_t(reads.row[bits][j]) * stride;
      if (reads.count[bits])
        c_.isa.gemv(w, bits, c_.accuracy.table_digits[bits], reads.x[bits], reads.count[bits], out, a, b);
    }
    y += w.rows, n0 -= w.rows, n1 -= w.rows;
  }
}

int64_t Step::row_bytes(const Group* g, int count) const {
  int widest = 0;
  for (int i = 0; i < count; i++)
    for (int bits = 1; bits <= kMaxBits; bits++)
      if (reads_[i].count[bits]) widest = std::max(widest, bits);
  return g[0].weight.row_bytes * widest;
}

// y [tokens, stride] = all rows of the stacked products.
void Step::project(const Group* g, int count, float* y, int stride) {
  parallel_rows(c_, stride, row_bytes(g, count), [&](int n0, int n1) { products(g, count, y, stride, n0, n1); });
}

// act = silu(gate) * up, each stretch as soon as both products are computed.
void Step::gated(const Layer& l) {
  const int inner = m_.intermediate, count = l.gate_up_groups;
  parallel_rows(c_, inner, 2 * row_bytes(l.gate_up, count), [&](int n0, int n1) {
    products(l.gate_up, count, gate_up_.data(), 2 * inner, n0, n1);
    products(l.gate_up, count, gate_up_.data(), 2 * inner, inner + n0, inner + n1);
    for (int r = 0; r < rows_; r++) {
      const float *gate = &gate_up_[size_t(r) * 2 * inner], *up = gate + inner;
      c_.isa.silu_mul(gate + n0, up + n0, n1 - n0, &act_[size_t(r) * inner + n0]);
    }
  });
}

// Norms and rotates one head of q or k.
void Step::turn(const Layer& l, const float* weight, float* head, int row) {
  const int d = m_.head_dim;
  const size_t at = size_t(row) * (d / 2);
  if (weight) c_.isa.rms_norm(head, weight, m_.eps, d, head);
  if (l.uses_rope) c_.isa.rope(head, &cos_[at], &sin_[at], d);
}

// Queries to q, keys and values to the cache.
void Step::store_pairs(const Layer& l, int layer, Cache& cache) {
  const int d = m_.head_dim;
  const size_t queries = size_t(m_.heads) * d, line = queries + 2 * size_t(m_.kv_heads) * d;
  for (int r = 0; r < rows_; r++) {
    float *q = &qkv_[r * line], *k = q + queries, *v = k + m_.kv_heads * d;
    for (int h = 0; h < m_.heads; h++) turn(l, l.q_norm, q + h * d, r);
    std::memcpy(&q_[r * queries], q, sizeof(float) * queries);
    for (int h = 0; h < m_.kv_heads; h++) {
      turn(l, l.k_norm, k + h * d, r);
      const int i = layer * m_.kv_heads + h;
      const size_t at = size_t(cache.start[i] + cache.length[i]) * d;
      for (int which = 0; which < 2; which++) {
        char* flat = static_cast<char*>((which ? cache.v : cache.k)[layer]);
        c_.isa.store((which ? v : k) + h * d, cache.storage, flat + at * size_t(storage_bytes(cache.storage)), d);
      }
      cache.length[i]++;
    }
  }
}

// mixed = attention of each token to earlier tokens and to itself. Every head of every token is a run of its own. As many
// tokens are taken at once as the memory for partial results allows.
void Step::attend(const Layer& l, int layer, const Cache& cache) {
  constexpr int64_t kPairs = 1 << 19;  // the most pairs of all runs that are taken at once
  const int heads = m_.kv_heads, d = m_.head_dim;
  int64_t pairs = 1;  // pairs of the last token
  for (int r = 0; r < rows_; r++)
    for (int h = 0; h < heads; h++) {
      const int i = layer * heads + h, length = cache.length[i] - (rows_ - 1 - r);
      const int skip = l.window ? std::max(0, length - l.window) : 0;
      start_[size_t(r * heads + h)] = cache.start[i] + skip;
      length_[size_t(r * heads + h)] = length - skip;
      pairs += r == rows_ - 1 ? length - skip : 0;
    }
  const int together = int(std::min<int64_t>(rows_, std::max<int64_t>(1, kPairs / pairs)));
  for (int r = 0; r < rows_; r += together) {
    const int n = std::min(together, rows_ - r);
    const size_t at = size_t(r) * m_.heads * d, first = size_t(r) * heads;
    attention_.run(c_, Attention{&q_[at], static_cast<const char*>(cache.k[layer]),
                                 static_cast<const char*>(cache.v[layer]), &start_[first], &length_[first],
                                 n * m_.heads, n * heads, d, 1.f / std::sqrt(float(d)), cache.storage, &mixed_[at]});
  }
}

bool Step::attention(const Layer& l, int index, Cache& cache) {
  const int queries = m_.heads * m_.head_dim;
  norm(l.input_norm);
  if (!decide(l.qkv, l.qkv_groups, h_.data(), m_.hidden)) return false;
  project(l.qkv, l.qkv_groups, qkv_.data(), queries + 2 * m_.kv_heads * m_.head_dim);
  store_pairs(l, index, cache);
  attend(l, index, cache);
  if (!decide(&l.o, 1, mixed_.data(), queries)) return false;
  project(&l.o, 1, h_.data(), m_.hidden);
  c_.isa.add(h_.data(), rows_ * m_.hidden, x_.data());
  return true;
}

bool Step::mlp(const Layer& l) {
  norm(l.post_norm);
  if (!decide(l.gate_up, l.gate_up_groups, h_.data(), m_.hidden)) return false;
  gated(l);
  if (!decide(&l.down, 1, act_.data(), m_.intermediate)) return false;
  project(&l.down, 1, h_.data(), m_.hidden);
  c_.isa.add(h_.data(), rows_ * m_.hidden, x_.data());
  return true;
}

void Step::head() {
  const Table& t = m_.head;
  const int bits = t.planes_bits;
  norm(m_.norm);
  const Activation* x[kMaxRows];
  float* y[kMaxRows];
  for (int r = 0; r < rows_; r++) y[r] = request_->logits + int64_t(r) * m_.vocab;
  if (bits) {
    for (int r = 0; r < rows_; r++) {
      Activation* a = buffer_[c_.accuracy.x_digits[bits]][r].reserve(m_.hidden);
      c_.isa.quantize(&h_[size_t(r) * m_.hidden], m_.hidden, c_.accuracy.x_digits[bits], a);
      x[r] = a;
    }
    parallel_rows(c_, m_.vocab, t.planes.row_bytes * bits, [&](int n0, int n1) {
      c_.isa.gemv(t.planes, bits, c_.accuracy.table_digits[bits], x, rows_, y, n0, n1);
    });
    return;
  }
  parallel_rows(c_, m_.vocab, t.int8 ? m_.hidden : 4 * m_.hidden, [&](int n0, int n1) {
    for (int r = 0; r < rows_; r++) {  // a chunk of weights stays in the core's cache
      const float* h = &h_[size_t(r) * m_.hidden];
      if (t.int8) c_.isa.int8_gemv(t.int8, t.scale, h, m_.hidden, y[r], n0, n1);
      else c_.isa.float_gemv(t.dense, h, m_.hidden, y[r], n0, n1);
    }
  });
}

void Step::greedy() {
  for (int r = 0; r < rows_; r++) {
    const float* y = request_->logits + int64_t(r) * m_.vocab;
    int best = 0;
    for (int i = 1; i < m_.vocab; i++) best = y[i] > y[best] ? i : best;
    int32_t exponent = 0;  // the largest one; integers, because comparisons of floats pass NaN over
    for (int i = 0; i < m_.vocab; i++) {
      int32_t bits;
      std::memcpy(&bits, y + i, 4);
      exponent = std::max(exponent, bits & 0x7f800000);
    }
    request_->greedy[r] = exponent == 0x7f800000 ? -1 : best;
  }
}

}  // namespace dpllm

dpllm::Step* dpllm_step_open(Context* c, const dpllm::Model* m) { return new dpllm::Step(*c, *m); }
void dpllm_step_close(dpllm::Step* s) { delete s; }
int dpllm_step_rows(dpllm::Step* s, const dpllm::Selection* selection, dpllm::Cache* cache, dpllm::Request* request) {
  return s->run_in_turn(*selection, *cache, *request) ? 0 : 1;
}
