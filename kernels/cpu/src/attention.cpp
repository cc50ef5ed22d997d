#include "attention.h"

#include <cstring>
#include <numeric>

namespace dpllm {
namespace {
constexpr int kStretch = 256;  // positions per part; fixed, so that results do not depend on the number of threads
}

void AttentionBuffer::split(const Attention& a) {
  parts_.clear();
  for (int h = 0; h < a.kv_heads; h++)
    for (int at = 0; at < a.length[h]; at += kStretch)
      parts_.push_back({h, a.start[h] + at, std::min(kStretch, a.length[h] - at)});
  order_.resize(parts_.size());
  std::iota(order_.begin(), order_.end(), 0);
  // Heads of several tokens read the same pairs one after another, while the pairs are in the core's cache.
  const auto before = [&](int i, int j) { return parts_[size_t(i)].first < parts_[size_t(j)].first; };
  if (!std::is_sorted(order_.begin(), order_.end(), before)) std::stable_sort(order_.begin(), order_.end(), before);
}

void AttentionBuffer::run(Context& c, const Attention& a) {
  split(a);
  const int group = a.heads / a.kv_heads;
  const size_t bytes = size_t(storage_bytes(a.storage));
  scratch_.resize(parts_.size() * size_t(group) * kStretch);
  out_.resize(parts_.size() * size_t(group) * a.dim);
  top_.resize(parts_.size() * size_t(group));
  sum_.resize(parts_.size() * size_t(group));
  c.pool->run(int(parts_.size()), [&](int next) {
    const int i = order_[size_t(next)];
    const Part& p = parts_[size_t(i)];
    const size_t at = size_t(p.first) * a.dim * bytes, row = size_t(i) * group;
    const Run run{a.k + at, a.v + at, a.q + size_t(p.head) * group * a.dim, p.length, group, a.dim, a.scale,
                  a.storage};
    c.isa.attend(run, &scratch_[row * kStretch], &out_[row * a.dim], &top_[row], &sum_[row]);
  });
  size_t part = 0;
  for (int h = 0; h < a.kv_heads; h++) merge(a, h, part);
}

// Joins the softmax of all parts of a head. A head without pairs gives zeros.
void AttentionBuffer::merge(const Attention& a, int head, size_t& part) const {
  const int group = a.heads / a.kv_heads;
  const size_t first = part;
  while (part < parts_.size() && parts_[part].head == head) part++;
  for (int g = 0; g < group; g++) {
    float* out = a.out + (size_t(head) * group + g) * a.dim;
    std::memset(out, 0, sizeof(float) * a.dim);
    float top = -INFINITY, total = 0;
    for (size_t p = first; p < part; p++) top = std::max(top, top_[p * group + g]);
    for (size_t p = first; p < part; p++) {
      const float weight = std::exp(top_[p * group + g] - top);
      total += weight * sum_[p * group + g];
      const float* partial = &out_[(p * group + g) * a.dim];
      for (int d = 0; d < a.dim; d++) out[d] += weight * partial[d];
    }
    if (part > first)
      for (int d = 0; d < a.dim; d++) out[d] /= total;
  }
}

}  // namespace dpllm
