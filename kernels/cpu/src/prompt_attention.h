// Attention of many queries at once, for prompts, questions and the repetition of a context. ops.h has the attention of
// one token.
//
// All matrices are transposed, with one query in each lane: scores [keys][queries] are products of key rows and query
// columns, outputs [dim][queries] are products of value columns and weights, and the softmax needs no sum across lanes.
// Both products are the same loop: broadcast an element of the cache, and multiply it by a stretch of queries.
#pragma once

#include "kernels.h"

namespace dpllm {
namespace {

constexpr int kQueries = PromptQueries::kMost;  // lanes of a block of queries, which is the row length of all matrices here
constexpr int kKeys = PromptQueries::kKeys;
constexpr int kTileRows = kLanes == 8 ? 6 : 12;  // 16 registers hold 6 x 2 sums, 32 hold 12 x 2
constexpr int kTileVectors = 2;
constexpr int kTileLanes = kTileVectors * kLanes;

// c [kRows][kTileLanes] (+)= a times b: a[r][i] at a + r * row + i * step, b [inner][kQueries].
template <int kRows>
DPLLM_INLINE void tile(const float* a, int64_t row, int64_t step, int inner, const float* b, float* c, bool add) {
  Floats total[kRows][kTileVectors];
  for (int r = 0; r < kRows; r++)
    for (int j = 0; j < kTileVectors; j++)
      total[r][j] = add ? load<Floats>(c + r * kQueries + j * kLanes) : all(0);
  for (int i = 0; i < inner; i++) {
    Floats column[kTileVectors];
    for (int j = 0; j < kTileVectors; j++) column[j] = load<Floats>(b + int64_t(i) * kQueries + j * kLanes);
    for (int r = 0; r < kRows; r++) {
      const float x = a[r * row + i * step];
      for (int j = 0; j < kTileVectors; j++) total[r][j] += column[j] * x;
    }
  }
  for (int r = 0; r < kRows; r++)
    for (int j = 0; j < kTileVectors; j++) store(c + r * kQueries + j * kLanes, total[r][j]);
}

// The same for any number of rows, and the first `lanes` queries.
void product(const float* a, int64_t row, int64_t step, int rows, int inner, const float* b, float* c, int lanes,
             bool add) {
  for (int j = 0; j < lanes; j += kTileLanes) {
    int r = 0;
    for (; r + kTileRows <= rows; r += kTileRows)
      tile<kTileRows>(a + r * row, row, step, inner, b + j, c + int64_t(r) * kQueries + j, add);
    for (; r + 4 <= rows; r += 4) tile<4>(a + r * row, row, step, inner, b + j, c + int64_t(r) * kQueries + j, add);
    for (; r < rows; r++) tile<1>(a + r * row, row, step, inner, b + j, c + int64_t(r) * kQueries + j, add);
  }
}

// x [count, columns] -> out [columns][kQueries]; lanes without a token are zero.
void transpose_tokens(const float* x, int columns, int count, float* out) {
  constexpr int kTogether = 16;  // columns, a cache line of each token
  for (int k = 0; k < columns; k += kTogether) {
    const int some = columns - k < kTogether ? columns - k : kTogether;
    for (int i = 0; i < kQueries; i++)
      for (int j = 0; j < some; j++) out[(k + j) * kQueries + i] = i < count ? x[int64_t(i) * columns + k + j] : 0;
  }
}

// n values of a cache from element `at` on, as floats: in place, or copied to `room`.
const float* widened(const void* base, int64_t at, int n, Storage storage, float* room) {
  if (storage == Storage::kFloat32) return static_cast<const float*>(base) + at;
  const auto convert = [&](auto kind) {
    constexpr Storage kStorage = decltype(kind)::value;
    sweep(
        n, [&](int i) { store(room + i, cached<kStorage>(base, at + i)); },
        [&](int i) { room[i] = cached_one(base, at + i, kStorage); });
  };
  if (storage == Storage::kFloat16) convert(std::integral_constant<Storage, Storage::kFloat16>());
  else convert(std::integral_constant<Storage, Storage::kBfloat16>());
  return room;
}

// columns [dim][kQueries] = scale * queries; lanes without a query are zero.
void transpose_queries(const PromptQueries& p, float* columns) {
  for (int i = 0; i < p.dim * kQueries; i++) columns[i] = 0;
  for (int r = 0; r < p.count; r++) {
    const float* q = p.q + p.offset(r);
    for (int d = 0; d < p.dim; d++) columns[d * kQueries + r] = q[d] * p.scale;
  }
}

// Sets -inf at keys that a query must not see: keys after its own, or outside its window.
void hide(const PromptQueries& p, int first, int keys, float* scores) {
  if (first + keys - 1 <= p.own(0) && (!p.window || p.own(p.count - 1) - first < p.window)) return;
  for (int i = 0; i < keys; i++)
    for (int r = 0; r < p.count; r++) {
      const int distance = p.own(r) - (first + i);
      if (distance < 0 || (p.window && distance >= p.window)) scores[i * kQueries + r] = -INFINITY;
    }
}

// Turns scores of a stretch of keys into weights exp(score - top). `fade` is the factor for earlier weights.
void soften_keys(float* scores, int keys, int lanes, float* top, float* sums, float* fade) {
  for (int j = 0; j < lanes; j += kLanes) {
    const Floats before = load<Floats>(top + j);
    Floats most = before;
    for (int i = 0; i < keys; i++) {
      const Floats v = load<Floats>(scores + i * kQueries + j);
      most = v > most ? v : most;
    }
    const Floats base = most == -INFINITY ? all(0) : most;  // a query that has seen no key yet
    Floats total{};
    for (int i = 0; i < keys; i++) {
      const Floats v = load<Floats>(scores + i * kQueries + j);
      const Floats e = v == -INFINITY ? all(0) : exp(v - base);
      store(scores + i * kQueries + j, e);
      total += e;
    }
    const Floats shrink = exp(before - base);
    store(fade + j, shrink);
    store(sums + j, load<Floats>(sums + j) * shrink + total);
    store(top + j, most);
  }
}

struct PromptScratch {
  float *queries, *scores, *out, *room, *top, *sums, *fade;

  PromptScratch(float* at, int dim)
      : queries(at), scores(queries + dim * kQueries), out(scores + kKeys * kQueries), room(out + dim * kQueries),
        top(room + kKeys * dim), sums(top + kQueries), fade(sums + kQueries) {}
};

// p.out = attention of a block of queries over their keys. scratch: prompt_scratch(dim) floats.
void attend_prompt(const PromptQueries& p, float* scratch) {
  const PromptScratch s(scratch, p.dim);
  const int lanes = (p.count + kTileLanes - 1) / kTileLanes * kTileLanes;
  transpose_queries(p, s.queries);
  for (int i = 0; i < p.dim * kQueries; i++) s.out[i] = 0;
  for (int r = 0; r < kQueries; r++) s.top[r] = -INFINITY, s.sums[r] = 0;

  const int from = p.window && p.own(0) >= p.window ? p.own(0) - p.window + 1 : 0, end = p.own(p.count - 1) + 1;
  for (int at = from; at < end; at += kKeys) {
    const int keys = end - at < kKeys ? end - at : kKeys;
    const float* k = widened(p.k, int64_t(at) * p.dim, keys * p.dim, p.storage, s.room);
    product(k, p.dim, 1, keys, p.dim, s.queries, s.scores, lanes, false);
    hide(p, at, keys, s.scores);
    soften_keys(s.scores, keys, lanes, s.top, s.sums, s.fade);
    for (int d = 0; d < p.dim; d++)
      for (int j = 0; j < lanes; j += kLanes) {
        float* out = s.out + d * kQueries + j;
        store(out, load<Floats>(out) * load<Floats>(s.fade + j));
      }
    const float* v = widened(p.v, int64_t(at) * p.dim, keys * p.dim, p.storage, s.room);
    product(v, 1, p.dim, p.dim, keys, s.scores, s.out, lanes, true);
  }
  for (int r = 0; r < p.count; r++) {
    float* out = p.out + p.offset(r);
    for (int d = 0; d < p.dim; d++) out[d] = s.out[d * kQueries + r] / s.sums[r];
  }
}

// best[c] = the largest of its old value and of the attention that any of a block of queries pays to key p.column + c, as
// a logarithm minus the query's own offset. scratch: peak_scratch(dim, keys) floats.
void attention_peaks(const PromptQueries& p, const float* offset, int column, int columns, float* scratch, float* best) {
  const int lanes = (p.count + kTileLanes - 1) / kTileLanes * kTileLanes, end = p.own(p.count - 1) + 1;
  float *queries = scratch, *room = queries + p.dim * kQueries, *less = room + kKeys * p.dim;
  float* scores = less + kQueries;  // [keys][kQueries]
  transpose_queries(p, queries);
  for (int at = 0; at < end; at += kKeys) {
    const int keys = end - at < kKeys ? end - at : kKeys;
    const float* k = widened(p.k, int64_t(at) * p.dim, keys * p.dim, p.storage, room);
    float* own = scores + int64_t(at) * kQueries;
    product(k, p.dim, 1, keys, p.dim, queries, own, lanes, false);
    hide(p, at, keys, own);
  }
  for (int j = 0; j < lanes; j += kLanes) {
    Floats most = all(-INFINITY), total{};
    for (int i = 0; i < end; i++) {
      const Floats v = load<Floats>(scores + int64_t(i) * kQueries + j);
      most = v > most ? v : most;
    }
    for (int i = 0; i < end; i++) {
      const Floats v = load<Floats>(scores + int64_t(i) * kQueries + j);
      total += v == -INFINITY ? all(0) : exp(v - most);
    }
    store(less + j, most);
    for (int r = j; r < j + kLanes; r++)
      less[r] = r < p.count ? less[r] + std::log(total[r - j]) + (offset ? offset[r] : 0.f) : INFINITY;
  }
  for (int c = 0; c < columns; c++) {
    const float* own = scores + int64_t(column + c) * kQueries;
    Floats most = all(-INFINITY);
    for (int j = 0; j < lanes; j += kLanes) {
      const Floats v = load<Floats>(own + j) - load<Floats>(less + j);
      most = v > most ? v : most;
    }
    for (int l = 0; l < kLanes; l++) best[c] = most[l] > best[c] ? most[l] : best[c];
  }
}

}  // namespace
}  // namespace dpllm
