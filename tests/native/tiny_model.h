// A random decoder of two unlike layers, and its arithmetic in double precision.
#pragma once

#include "matrix.h"
#include "step.h"

namespace test {

using Numbers = std::vector<double>;

struct Sizes {
  static constexpr int layers = 2, hidden = 64, heads = 4, kv_heads = 2, dim = 16, inner = 96, vocab = 50, slots = 40;
};

// Layer 0 decides once for q, k, v and once for gate and up; layer 1 for each of them, normalises q and k, and looks
// back three positions. Group indices count through both.
class TinyModel : public Sizes {
 public:
  // planes_head: embedding in int8 and a head of planes, instead of float32 and int8.
  explicit TinyModel(bool planes_head, Random& random) : planes_head_(planes_head) {
    const int q = heads * dim, kv = kv_heads * dim;
    for (const int rows : {q + 2 * kv, hidden, 2 * inner, hidden, q, kv, kv, hidden, inner, inner, hidden}) {
      const size_t i = weights.size();
      weights.emplace_back(Shape{rows, i == 3 || i == 10 ? inner : hidden, 1, false}, random);
    }
    for (Buffer<float>& n : norms_) {
      n = normals(hidden, random);
      for (size_t i = 0; i < n.size(); i++) n[i] *= 0.06f;
    }
    for (Buffer<float>& n : head_norms_) n = normals(dim, random);
    for (int i = 0; i < dim / 2; i++) inv_freq_[i] = std::pow(1000.f, -2.f * i / dim);
    embedding_ = normals(size_t(vocab) * hidden, random);
    int8_ = Buffer<int8_t>(size_t(vocab) * hidden);
    scale_ = Buffer<uint16_t>(vocab);
    for (size_t i = 0; i < int8_.size(); i++) int8_[i] = int8_t(random.below(255) - 127);
    for (int i = 0; i < vocab; i++) scale_[i] = half_of(random.uniform(0.005f, 0.02f));
    head_.emplace_back(Shape{vocab, hidden, 1, false}, random);
    describe();
  }
  TinyModel(const TinyModel&) = delete;

  dpllm::Model model{};
  std::vector<RandomMatrix> weights;  // [groups]

  static constexpr int groups() { return 11; }
  int64_t bytes_at[11][dpllm::kMaxBits + 1];  // of each group: any numbers that tell groups and widths apart
  static constexpr int head_bits() { return 6; }

  const float* norm() const { return norms_[4].data(); }  // [hidden] of ordinary numbers

  // Logits after one more token; `keys` and `values` grow by one position per layer.
  Numbers forward(int token, int position, const int32_t* bits) {
    Numbers x;
    for (int i = 0; i < hidden; i++) x.push_back(embedding(token, i));
    for (int l = 0; l < layers; l++) {
      const int first = l ? 4 : 0, o = l ? 7 : 1, gate = l ? 8 : 2, down = l ? 10 : 3;
      Numbers h = norm(x, norms_[2 * l]), qkv, both;
      for (int g = first; g < o; g++) append(qkv, product(weights[size_t(g)], bits[g], h));
      add(x, product(weights[size_t(o)], bits[o], attention(l, position, qkv)));
      h = norm(x, norms_[2 * l + 1]);
      for (int g = gate; g < down; g++) append(both, product(weights[size_t(g)], bits[g], h));
      for (int i = 0; i < inner; i++) both[i] *= both[inner + i] / (1 + std::exp(-both[i]));
      both.resize(inner);
      add(x, product(weights[size_t(down)], bits[down], both));
    }
    return logits(norm(x, norms_[4]));
  }

  void forget() {
    for (auto& layer : keys_) layer.clear();
    for (auto& layer : values_) layer.clear();
  }

 private:
  static void append(Numbers& all, const Numbers& more) { all.insert(all.end(), more.begin(), more.end()); }
  static void add(Numbers& x, const Numbers& y) {
    for (size_t i = 0; i < x.size(); i++) x[i] += y[i];
  }
  static Numbers product(const RandomMatrix& w, int bits, const Numbers& x) {
    const Numbers dense = w.dense(bits);
    Numbers y(size_t(w.shape.rows));
    for (size_t i = 0; i < dense.size(); i++) y[i / x.size()] += dense[i] * x[i % x.size()];
    return y;
  }
  static Numbers norm(const Numbers& x, const Buffer<float>& weight) {
    double squares = 0;
    Numbers y;
    for (const double v : x) squares += v * v;
    for (size_t i = 0; i < x.size(); i++) y.push_back(x[i] / std::sqrt(squares / double(x.size()) + 1e-5) * weight[i]);
    return y;
  }
  double embedding(int token, int i) const {
    const size_t at = size_t(token) * hidden + i;
    return planes_head_ ? int8_[at] * half_value(scale_[token]) : embedding_[at];
  }
  Numbers logits(const Numbers& h) const {
    if (planes_head_) return product(head_[0], head_bits(), h);
    Numbers y(vocab);
    for (size_t i = 0; i < int8_.size(); i++)
      y[i / hidden] += int8_[i] * half_value(scale_[i / hidden]) * h[i % hidden];
    return y;
  }

  // One head of q or k, ready to be multiplied.
  Numbers turned(const Numbers& qkv, int head, int layer, int position, const Buffer<float>& weight) const {
    Numbers v(qkv.begin() + head * dim, qkv.begin() + (head + 1) * dim), y(dim);
    if (layer) v = norm(v, weight);
    for (int i = 0; i < dim / 2; i++) {
      const double angle = position * double(inv_freq_[i]), c = 1.25 * std::cos(angle), s = 1.25 * std::sin(angle);
      y[i] = v[i] * c - v[i + dim / 2] * s;
      y[i + dim / 2] = v[i + dim / 2] * c + v[i] * s;
    }
    return y;
  }

  Numbers attention(int layer, int position, const Numbers& qkv) {
    const auto value = qkv.begin() + (heads + kv_heads) * dim;
    for (int h = 0; h < kv_heads; h++) keys_[layer].push_back(turned(qkv, heads + h, layer, position, head_norms_[1]));
    values_[layer].push_back(Numbers(value, value + kv_heads * dim));
    const int count = int(values_[layer].size()), first = layer && count > 3 ? count - 3 : 0;
    Numbers out(heads * dim);
    for (int h = 0; h < heads; h++) {
      const int kv = h / (heads / kv_heads);
      const Numbers q = turned(qkv, h, layer, position, head_norms_[0]);
      Numbers weight;
      double total = 0;
      for (int i = first; i < count; i++) {
        double score = 0;
        for (int d = 0; d < dim; d++) score += q[d] * keys_[layer][size_t(i) * kv_heads + kv][d];
        weight.push_back(std::exp(score / std::sqrt(double(dim))));
        total += weight.back();
      }
      for (int i = first; i < count; i++)
        for (int d = 0; d < dim; d++) out[h * dim + d] += weight[i - first] / total * values_[layer][i][kv * dim + d];
    }
    return out;
  }

  void describe() {
    for (int l = 0; l < layers; l++) {
      dpllm::Layer& y = layer_[l];
      y.input_norm = norms_[2 * l].data(), y.post_norm = norms_[2 * l + 1].data();
      y.q_norm = l ? head_norms_[0].data() : nullptr, y.k_norm = l ? head_norms_[1].data() : nullptr;
      y.qkv_groups = l ? 3 : 1, y.gate_up_groups = l ? 2 : 1, y.window = l ? 3 : 0, y.uses_rope = 1;
      int next = l ? 4 : 0;
      const auto take = [&] {
        const int i = next++;
        const dpllm::Matrix& w = weights[size_t(i)].matrix;
        for (int bits = 0; bits <= dpllm::kMaxBits; bits++) bytes_at[i][bits] = 1000 * i + bits;
        return dpllm::Group{w, i, int64_t(w.rows) * w.columns, bytes_at[i]};
      };
      for (int i = 0; i < y.qkv_groups; i++) y.qkv[i] = take();
      y.o = take();
      for (int i = 0; i < y.gate_up_groups; i++) y.gate_up[i] = take();
      y.down = take();
    }
    dpllm::Table &embedding = model.embedding, &head = model.head;
    embedding.dense = planes_head_ ? nullptr : embedding_.data();
    embedding.int8 = planes_head_ ? int8_.data() : nullptr, embedding.scale = scale_.data();
    head.int8 = planes_head_ ? nullptr : int8_.data(), head.scale = scale_.data();
    head.planes = head_[0].matrix, head.planes_bits = planes_head_ ? head_bits() : 0;
    model.layers = layers, model.hidden = hidden, model.intermediate = inner, model.heads = heads;
    model.kv_heads = kv_heads, model.head_dim = dim, model.vocab = vocab, model.groups = groups();
    model.eps = 1e-5f, model.rope_scale = 1.25f, model.inv_freq = inv_freq_, model.norm = norms_[4].data();
    model.layer = layer_;
  }

  bool planes_head_;
  dpllm::Layer layer_[layers]{};
  Buffer<float> norms_[5], head_norms_[2], embedding_;
  float inv_freq_[dim / 2];
  Buffer<int8_t> int8_;
  Buffer<uint16_t> scale_;
  std::vector<RandomMatrix> head_;
  std::vector<Numbers> keys_[layers], values_[layers];
};

}  // namespace test
