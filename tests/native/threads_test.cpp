// One handle and the steps that were opened with it, called by several threads at once: everybody gets what a single
// thread gets. That the calls do not collide is for the thread sanitizer to see.
#include <atomic>
#include <chrono>
#include <thread>

#include "matrix.h"
#include "tiny_model.h"

namespace test {
namespace {

constexpr int kCallers = 4, kRepeats = 3;
constexpr int kHeads = 8, kKvHeads = 2, kDim = 32, kPairs = 300, kTokens = 5;

using Result = std::vector<float>;

// What the threads share: a handle, weights, a model, and a step of it.
class Shared {
 public:
  Shared(int isa, int threads)
      : random_(9), handle(isa, threads), weight(Shape{200, 96, 1, false}, random_), model(false, random_),
        step(dpllm_step_open(handle, &model.model)), pairs_(normals(size_t(2) * kKvHeads * kPairs * kDim, random_)),
        int8_(size_t(64) * 96), scale_(64) {
    for (size_t i = 0; i < int8_.size(); i++) int8_[i] = int8_t(random_.below(255) - 127);
    for (size_t i = 0; i < scale_.size(); i++) scale_[i] = half_of(random_.uniform(0.005f, 0.02f));
  }
  ~Shared() { dpllm_step_close(step); }
  Shared(const Shared&) = delete;

  Result products(int caller) const {
    Random random(uint64_t(100 + caller));
    const Buffer<float> x = normals(3 * 96, random);
    const int32_t bits[] = {3, 6, 2 + caller % 5};
    Result y(3 * 200);
    dpllm_gemm(handle, &weight.matrix, x.data(), bits, 3, y.data());
    return y;
  }

  Result prompt_products(int caller) const {
    Random random(uint64_t(200 + caller));
    const int m = 20 + 10 * caller;  // both ways to multiply
    const Buffer<float> x = normals(size_t(m) * 96, random);
    Result y(size_t(m) * 200);
    dpllm_matmul(handle, &weight.matrix, x.data(), 4, m, caller % 2, y.data());
    return y;
  }

  Result dense(int caller) const {
    Random random(uint64_t(300 + caller));
    const Buffer<float> x = normals(2 * 96, random);
    Result y(2 * 64), weights(200 * 96);
    dpllm_int8_gemm(handle, int8_.data(), scale_.data(), 64, 96, x.data(), 2, y.data());
    dpllm_dequantize(handle, &weight.matrix, 2 + caller % 5, 0, weights.data(), 0, 200);
    y.insert(y.end(), weights.begin(), weights.end());
    return y;
  }

  Result attention(int caller) const {
    Random random(uint64_t(400 + caller));
    const Buffer<float> q = normals(size_t(kTokens) * kHeads * kDim, random);
    const float *k = pairs_.data(), *v = k + size_t(kKvHeads) * kPairs * kDim;
    const int64_t start[] = {0, kPairs};
    const int32_t length[] = {kPairs - caller, kPairs};
    Result one(kHeads * kDim), many(size_t(kTokens) * kHeads * kDim), peaks(size_t(kHeads) * 10);
    dpllm_attention(handle, q.data(), k, v, 0, start, length, kHeads, kKvHeads, kDim, 0.2f, one.data());
    dpllm_prompt_attention(handle, q.data(), k, v, 0, start, length, kTokens, kHeads, kKvHeads, kDim, 0, 0.2f,
                           many.data());
    dpllm_attention_peaks(handle, q.data(), k, 0, kTokens, kHeads, kKvHeads, kDim, kPairs, caller, 10, 0.2f, nullptr,
                          peaks.data());
    one.insert(one.end(), many.begin(), many.end());
    one.insert(one.end(), peaks.begin(), peaks.end());
    return one;
  }

  // A text of its own, decoded with the shared step; callers with odd numbers choose widths by a callback that makes
  // calls of its own, as policies in Python do.
  Result text_of(int caller) const {
    constexpr int groups = TinyModel::groups(), layers = TinyModel::layers, heads = TinyModel::kv_heads;
    const size_t slots = size_t(TinyModel::slots) * TinyModel::dim;
    Buffer<float> k(layers * slots), v(layers * slots);
    void *layer_k[layers], *layer_v[layers];
    for (int l = 0; l < layers; l++) layer_k[l] = k.data() + l * slots, layer_v[l] = v.data() + l * slots;
    int64_t start[layers * heads];
    int32_t length[layers * heads] = {}, fixed[groups];
    for (int i = 0; i < layers * heads; i++) start[i] = i % heads * (TinyModel::slots / heads);
    for (int g = 0; g < groups; g++) fixed[g] = 2 + (g + caller) % 5;
    dpllm::Cache cache{layer_k, layer_v, start, length, Storage::kFloat32};
    dpllm::Selection selection{};
    if (caller % 2) selection.choose = choose;
    else selection.fixed = fixed;
    asking = this;
    Result all;
    for (int i = 0; i < 4; i++) {
      Result logits(TinyModel::vocab);
      int32_t bits[groups], greedy, token = (7 * caller + i) % TinyModel::vocab;
      int64_t read_bits;
      dpllm::Request request{1, i, &token, logits.data(), bits, &greedy, &read_bits, 0};
      CHECK(dpllm_step_rows(step, &selection, &cache, &request) == 0, text("token %d", i));
      all.insert(all.end(), logits.begin(), logits.end());
      all.insert(all.end(), bits, bits + groups);
    }
    return all;
  }

 private:
  static int32_t choose(int32_t group, const float*) {
    return 3 + int32_t(asking->products(group)[0] > 0);
  }
  static inline thread_local const Shared* asking;

  Random random_;

 public:
  const Handle handle;
  const RandomMatrix weight;
  TinyModel model;
  dpllm::Step* const step;

 private:
  Buffer<float> pairs_;
  Buffer<int8_t> int8_;
  Buffer<uint16_t> scale_;
};

using Work = Result (Shared::*)(int) const;
constexpr Work kWork[] = {&Shared::products, &Shared::prompt_products, &Shared::dense, &Shared::attention,
                          &Shared::text_of};
constexpr int kKinds = int(sizeof kWork / sizeof kWork[0]);

void check_callers(const Shared& shared, int repeats) {
  std::vector<Result> alone;
  for (int i = 0; i < kCallers * kKinds; i++) alone.push_back((shared.*kWork[i % kKinds])(i / kKinds));
  std::atomic<int> waiting{kCallers}, wrong{0};
  const auto call = [&](int caller) {
    for (waiting--; waiting.load() > 0;) std::this_thread::yield();  // all begin together
    for (int n = 0; n < repeats * kKinds; n++) {
      const int kind = (n + caller) % kKinds;
      const Result found = (shared.*kWork[kind])(caller), &right = alone[size_t(caller * kKinds + kind)];
      wrong += found.size() != right.size() || std::memcmp(found.data(), right.data(), 4 * right.size()) != 0;
    }
  };
  std::vector<std::thread> callers;
  for (int i = 0; i < kCallers; i++) callers.emplace_back(call, i);
  for (std::thread& caller : callers) caller.join();
  CHECK(wrong == 0, text("%d results differ", wrong.load()));
}

// A handle that one thread holds keeps the others out until it is released.
void check_holding(const Shared& shared) {
  std::atomic<bool> done{false};
  dpllm_hold(shared.handle);
  std::thread other([&] {
    shared.products(0);
    done = true;
  });
  shared.products(1);  // the holder itself may call
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK(!done, "a call went ahead while the handle was held");
  dpllm_release(shared.handle);
  other.join();
}

}  // namespace

void test_threads(const Options& o) {
  for (const Variant& v : supported_variants())
    for (const int threads : {1, 3}) {
      where = text("%s, %d threads", v.name, threads);
      const Shared shared(v.index, threads);
      check_callers(shared, o.quick ? 1 : kRepeats);
      check_holding(shared);
    }
}

}  // namespace test
