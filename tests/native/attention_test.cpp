// Attention over ragged runs of a cache, in float32 and float16.
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
  const double* row(int which, int head, int i) const {
    return &values_[which][size_t(start[head] + i) * scene.dim];
  }

  Scene scene;
  std::vector<int64_t> start;

 private:
  std::vector<double> values_[2];
  Buffer<float> single_[2];
  Buffer<uint16_t> half_[2];
};

std::vector<double> expected(const Cache& cache, const Buffer<float>& q, double scale) {
  const Scene& s = cache.scene;
  std::vector<double> out(q.size());
  for (int h = 0; h < s.kv_heads * s.group; h++) {
    const int kv = h / s.group;
    std::vector<double> weight;
    double total = 0;
    for (int i = 0; i < s.length[kv]; i++) {
      double score = 0;
      for (int d = 0; d < s.dim; d++) score += q[size_t(h) * s.dim + d] * cache.row(0, kv, i)[d];
      weight.push_back(std::exp(score * scale));
      total += weight.back();
    }
    for (int i = 0; i < s.length[kv]; i++)
      for (int d = 0; d < s.dim; d++) out[size_t(h) * s.dim + d] += weight[i] / total * cache.row(1, kv, i)[d];
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
  const std::vector<double> right = expected(cache, q, scale);
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
    }
}

}  // namespace test
