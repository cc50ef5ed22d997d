// Attention over ragged runs of a cache: of one token, of many, and the peaks that pairs are scored by.
#include "check.h"

namespace test {
namespace {

struct Scene {
  int kv_heads, group, dim;
  Storage storage;
  std::vector<int32_t> length;  // [kv_heads]
};

// A cache whose runs lie in disorder and with gaps, the last one at the very end of the memory.
class Cache {
 public:
  Cache(const Scene& s, Random& random) : scene(s), start(s.length.size()) {
    int64_t slots = 0;
    for (size_t i = s.length.size(); i-- > 0;) start[i] = slots + 3, slots = start[i] + s.length[i];
    for (int which = 0; which < 2; which++) {
      values_[which].resize(size_t(slots) * s.dim);
      single_[which] = Buffer<float>(values_[which].size());
      half_[which] = Buffer<uint16_t>(values_[which].size());
      for (size_t i = 0; i < values_[which].size(); i++) {
        const float x = random.normal();
        if (s.storage == Storage::kFloat32) values_[which][i] = single_[which][i] = x;
        if (s.storage == Storage::kFloat16) values_[which][i] = half_value(half_[which][i] = half_of(x));
        if (s.storage == Storage::kBfloat16)  // below 2
          values_[which][i] = brain_value(half_[which][i] = uint16_t(random.word() & 0xbfff));
      }
    }
  }
  const void* data(int which) const {
    if (scene.storage == Storage::kFloat32) return single_[which].data();
    return half_[which].data();
  }
  const double* row(int which, int64_t slot) const { return &values_[which][size_t(slot) * scene.dim]; }

  Scene scene;
  std::vector<int64_t> start;

 private:
  std::vector<double> values_[2];
  Buffer<float> single_[2];
  Buffer<uint16_t> half_[2];
};

std::vector<double> expected(const Cache& cache, const std::vector<int64_t>& start, const std::vector<int32_t>& length,
                             const Buffer<float>& q, double scale) {
  const Scene& s = cache.scene;
  std::vector<double> out(q.size());
  for (int h = 0; h < s.kv_heads * s.group; h++) {
    const int kv = h / s.group;
    std::vector<double> weight;
    double total = 0;
    for (int i = 0; i < length[kv]; i++) {
      double score = 0;
      for (int d = 0; d < s.dim; d++) score += q[size_t(h) * s.dim + d] * cache.row(0, start[kv] + i)[d];
      weight.push_back(std::exp(score * scale));
      total += weight.back();
    }
    for (int i = 0; i < length[kv]; i++)
      for (int d = 0; d < s.dim; d++) out[size_t(h) * s.dim + d] += weight[i] / total * cache.row(1, start[kv] + i)[d];
  }
  return out;
}

Buffer<float> attend(const Variant& v, int threads, const Cache& cache, const Buffer<float>& q, float scale) {
  const Handle h(v.index, threads);
  const Scene& s = cache.scene;
  Buffer<float> out(q.size());
  for (size_t i = 0; i < out.size(); i++) out[i] = 7;  // what was there before must not matter
  dpllm_attention(h, q.data(), cache.data(0), cache.data(1), int(s.storage), cache.start.data(), s.length.data(),
                  s.kv_heads * s.group, s.kv_heads, s.dim, scale, out.data());
  return out;
}

void check_scene(const Variant& v, const Scene& s, Random& random) {
  where = text("%s, %d heads of %d, group %d, %s", v.name, s.kv_heads, s.dim, s.group, kStorageNames[int(s.storage)]);
  const Cache cache(s, random);
  Buffer<float> q = normals(size_t(s.kv_heads) * s.group * s.dim, random);
  const float scale = 1 / std::sqrt(float(s.dim));
  const Buffer<float> out = attend(v, 1, cache, q, scale);
  const std::vector<double> right = expected(cache, cache.start, s.length, q, scale);
  double worst = 0;
  for (size_t i = 0; i < right.size(); i++)
    worst = std::fmax(worst, std::isnan(out[i]) ? INFINITY : std::fabs(out[i] - right[i]));
  CHECK(worst < 1e-5, text("error %g", worst));
  for (int threads : kThreads) CHECK(attend(v, threads, cache, q, scale) == out, text("%d threads differ", threads));

  q[1] = NAN;  // of the first head
  const Buffer<float> with_nan = attend(v, 2, cache, q, scale);
  for (int d = 0; d < s.dim && s.length[0]; d++) CHECK(std::isnan(with_nan[d]), text("NaN becomes %g", with_nan[d]));
  for (size_t i = size_t(s.dim); i < out.size(); i++) CHECK(with_nan[i] == out[i], "NaN reached another head");
}

// The last `tokens` pairs of every run are the tokens' own.
void check_prompt(const Variant& v, const Scene& s, int tokens, int window, Random& random) {
  where = text("%s, %d tokens, window %d, %d heads of %d, group %d, %s", v.name, tokens, window, s.kv_heads, s.dim,
               s.group, kStorageNames[int(s.storage)]);
  const Cache cache(s, random);
  const int heads = s.kv_heads * s.group;
  const Buffer<float> q = normals(size_t(tokens) * heads * s.dim, random);
  const float scale = 1 / std::sqrt(float(s.dim));
  Buffer<float> out[2] = {Buffer<float>(q.size()), Buffer<float>(q.size())};
  for (int i = 0; i < 2; i++) {
    const Handle h(v.index, i ? 3 : 1);
    dpllm_prompt_attention(h, q.data(), cache.data(0), cache.data(1), int(s.storage), cache.start.data(),
                           s.length.data(), tokens, heads, s.kv_heads, s.dim, window, scale, out[i].data());
  }
  CHECK(out[0] == out[1], "threads differ");
  for (int t = 0; t < tokens; t++) {  // what one token sees is a cache of its own
    std::vector<int64_t> start = cache.start;
    std::vector<int32_t> length = s.length;
    for (int h = 0; h < s.kv_heads; h++) {
      const int end = s.length[size_t(h)] - tokens + t + 1, first = window ? std::max(0, end - window) : 0;
      start[size_t(h)] += first;
      length[size_t(h)] = end - first;
    }
    Buffer<float> own(size_t(heads) * s.dim);
    std::memcpy(own.data(), q.data() + size_t(t) * own.size(), own.size() * sizeof(float));
    const std::vector<double> right = expected(cache, start, length, own, scale);
    double worst = 0;
    for (size_t i = 0; i < right.size(); i++)
      worst = std::fmax(worst, std::fabs(out[0][size_t(t) * own.size() + i] - right[i]));
    CHECK(worst < 1e-5, text("token %d: error %g", t, worst));
  }
}

// All keys stand in one block; the run is the longest of the scene.
void check_peaks(const Variant& v, const Scene& s, int tokens, Random& random) {
  where = text("%s, peaks of %d tokens, %s", v.name, tokens, kStorageNames[int(s.storage)]);
  const Cache cache(s, random);
  const int heads = s.group, before = s.length[0] - tokens;
  const Buffer<float> q = normals(size_t(tokens) * heads * s.dim, random), cost = normals(size_t(tokens), random);
  Buffer<float> best(size_t(heads) * before);
  const Handle h(v.index, 2);
  const char* keys = static_cast<const char*>(cache.data(0)) +
                     size_t(cache.start[0]) * s.dim * size_t(storage_bytes(s.storage));
  dpllm_attention_peaks(h, q.data(), keys, int(s.storage), tokens, heads, 1, s.dim, s.length[0], 0, before, 1.f,
                        cost.data(), best.data());
  for (int g = 0; g < heads; g++) {
    std::vector<double> right(size_t(before), -INFINITY);
    for (int t = 0; t < tokens; t++) {
      std::vector<double> score;
      double total = 0;
      for (int i = 0; i <= before + t; i++) {
        double x = 0;
        for (int d = 0; d < s.dim; d++) x += q[(size_t(t) * heads + g) * s.dim + d] * cache.row(0, cache.start[0] + i)[d];
        score.push_back(x), total += std::exp(x);
      }
      for (int i = 0; i < before; i++)
        right[size_t(i)] = std::fmax(right[size_t(i)], score[size_t(i)] - std::log(total) - cost[size_t(t)]);
    }
    for (int i = 0; i < before; i++)
      CHECK(std::fabs(best[size_t(g) * before + i] - right[size_t(i)]) < 1e-3, text("key %d of head %d", i, g));
  }
}

}  // namespace

void test_attention(const Options& o) {
  Random random(3);
  for (const Variant& v : supported_variants())
    for (const Storage storage : kStorages) {
      check_scene(v, {3, 1, 64, storage, {1, 0, 257}}, random);
      check_scene(v, {2, 2, 80, storage, {256, 17}}, random);
      check_scene(v, {1, 4, 128, storage, {o.quick ? 300 : 1100}}, random);
      check_scene(v, {2, 8, 32, storage, {0, 33}}, random);
      check_scene(v, {2, 1, 6, storage, {5, 2}}, random);
      check_prompt(v, {2, 2, 80, storage, {130, 37}}, 37, 0, random);
      check_prompt(v, {1, 3, 6, storage, {70}}, 50, 9, random);
      check_prompt(v, {1, 1, 64, storage, {o.quick ? 100 : 400}}, o.quick ? 65 : 130, 0, random);
      check_peaks(v, {1, 3, 20, storage, {110}}, 67, random);
      check_peaks(v, {1, 1, 64, storage, {120}}, 1, random);
    }
}

}  // namespace test
