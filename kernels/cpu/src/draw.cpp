// From logits to a token: what is not a plain pass over the vocabulary. Those are the instruction sets' (draw_ops.h).
//
// Bounds that are cheap to compute leave some candidates, and only these take part in the race. Nothing is sorted. Whether
// top-p keeps a token is asked about the winner alone: where it does not, the winner and all that are less likely leave
// the race, and the rest run again with the same clocks. The first to ring among the kept ones is found either way.
#include "draw.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <type_traits>

#include "api.h"

namespace dpllm {
namespace {

constexpr int kMany = 4;         // candidates are not gathered from more than one block in this number
constexpr float kSlack = 0.01f;  // by which bounds in float32 are lowered, in units of the score

class Drawing {
 public:
  Drawing(const Isa& isa, const float* logits, int n, const Draw& d)
      : isa_(isa), d_(d), n_(n), blocks_((n + kDrawBlock - 1) / kDrawBlock), count_(n) {
    uint8_t* memory = thread_scratch(4 * (4 * size_t(n) + size_t(blocks_)));
    const auto take = [&](auto*& part, int count) {
      part = reinterpret_cast<std::remove_reference_t<decltype(part)>>(memory);
      memory += 4 * size_t(count);
    };
    take(penalised_, n), take(ids_, n), take(gathered_, n), take(w_, n), take(maxima_, blocks_);
    x_ = logits_ = d.penalty == 1 || !d.seen_count ? logits : penalise(logits);
    isa.block_largest(logits_, n, maxima_);
    top_ = *std::max_element(maxima_, maxima_ + blocks_);
    temperature_ = std::min(std::max(d.temperature, 1e-37), double(FLT_MAX));
  }

  int token() {
    if (d_.temperature == 0) return likeliest();
    const bool some = d_.top_k > 0 && d_.top_k < n_, nucleus = d_.top_p < 1;
    if (some) keep_largest();
    double total = weigh();
    if (nucleus && !some) gather(bound(total * (1 - d_.top_p) / n_));  // those below have less than 1 - top_p in common
    if (d_.min_p > 0) drop_unlikely();
    int winner = race();
    while (nucleus && winner >= 0 && ahead_of(winner) >= d_.top_p * total) {
      keep_ahead_of(winner);
      winner = race();
    }
    return winner < 0 ? likeliest() : token_of(winner);
  }

 private:
  const float* penalise(const float* logits) {
    std::copy(logits, logits + n_, penalised_);
    const float penalty = float(d_.penalty);
    for (int64_t i = 0; i < d_.seen_count; i++) {
      if (d_.seen[i] < 0 || d_.seen[i] >= n_) continue;
      float& x = penalised_[d_.seen[i]];
      x = x < 0 ? x * penalty : x / penalty;
    }
    return penalised_;
  }

  // The first token of the largest logit; 0 where none is a number.
  int likeliest() const {
    const int at = int(std::find(logits_, logits_ + n_, top_) - logits_);
    return at < n_ ? at : 0;
  }

  bool whole() const { return x_ == logits_; }
  int token_of(int candidate) const { return whole() ? candidate : ids_[candidate]; }

  double weigh() { return isa_.exponentials(x_, count_, top_, float(1 / temperature_), w_); }

  int race() const { return isa_.race(whole() ? nullptr : ids_, w_, count_, d_.seed, d_.number); }

  // A logit that all tokens of at least this weight reach.
  float bound(double weight) const {
    return weight > 0 ? float(double(top_) + temperature_ * (std::log(weight) - kSlack)) : -INFINITY;
  }

  // Makes candidates of the tokens that reach a logit. Where that may be many, all tokens stay. NaN reaches nothing.
  void gather(float least) {
    const auto reach = std::count_if(maxima_, maxima_ + blocks_, [&](float x) { return x >= least; });
    if (reach * kMany <= blocks_) gather_all(least), weigh();
  }

  void gather_all(float least) {
    int n = 0;
    for (int b = 0; b < blocks_; b++) {
      if (!(maxima_[b] >= least)) continue;
      const int end = std::min(n_, (b + 1) * kDrawBlock);
      for (int i = b * kDrawBlock; i < end; i++) {
        ids_[n] = i, gathered_[n] = logits_[i];
        n += logits_[i] >= least;
      }
    }
    count_ = n, x_ = gathered_;
  }

  // As many as top_k, and those level with the last of them.
  void keep_largest() {
    const auto last_of = [&](const float* x, int n) {
      std::copy(x, x + n, w_);
      std::nth_element(w_, w_ + d_.top_k - 1, w_ + n, [](float a, float b) { return a > b; });
      return w_[d_.top_k - 1];
    };
    // top_k blocks have a token that reaches the first bound.
    gather_all(std::max(d_.top_k <= blocks_ ? last_of(maxima_, blocks_) : -FLT_MAX, -FLT_MAX));
    if (count_ <= d_.top_k) return;
    const float last = last_of(gathered_, count_);
    int n = 0;
    for (int i = 0; i < count_; i++) {
      const bool stays = gathered_[i] >= last;
      ids_[n] = ids_[i], gathered_[n] = gathered_[i];
      n += stays;
    }
    count_ = n;
  }

  void drop_unlikely() {
    if (whole()) gather(bound(d_.min_p));
    const float least = float(d_.min_p);
    for (int i = 0; i < count_; i++) w_[i] = w_[i] >= least ? w_[i] : 0.f;
  }

  // Weight of all that top-p counts before a candidate. Of level ones, later tokens come first: transformers sorts from the
  // least likely on, and drops from that end.
  double ahead_of(int candidate) const {
    const float x = x_[candidate];
    return isa_.sum_above(x_, w_, candidate, std::nextafter(x, INFINITY)) +
           isa_.sum_above(x_ + candidate + 1, w_ + candidate + 1, count_ - candidate - 1, x);
  }

  void keep_ahead_of(int candidate) {
    const float x = x_[candidate];
    int n = 0;
    for (int i = 0; i < count_; i++) {
      const bool stays = x_[i] > x || (x_[i] == x && i > candidate);
      ids_[n] = token_of(i), gathered_[n] = x_[i], w_[n] = w_[i];
      n += stays;
    }
    count_ = n, x_ = gathered_;
  }

  const Isa& isa_;
  const Draw& d_;
  const int n_, blocks_;
  const float* logits_;  // penalised
  float top_;            // the largest of them
  double temperature_;
  // Candidates: their number, tokens, logits and weights (1: as likely as the likeliest). First all tokens are.
  int count_;
  int32_t* ids_;
  const float* x_;
  float *w_, *gathered_;
  float *penalised_, *maxima_;
};

}  // namespace
}  // namespace dpllm

int dpllm_draw(const Context* c, const float* logits, int n, const dpllm::Draw* how) {
  return dpllm::Drawing(c->isa, logits, n, *how).token();
}
