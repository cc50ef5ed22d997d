// A whole decode step: against double precision, for every way to decide the widths, for any number of threads, and for
// tokens taken together in every way.
#include <algorithm>

#include "tiny_model.h"

namespace test {
namespace {

constexpr int kGroups = TinyModel::groups();
constexpr int kTokens[] = {3, 17, 0, 49, 8, 8};
constexpr int kCount = int(sizeof kTokens / sizeof kTokens[0]);

int32_t width_of(int group) { return 2 + group % 7; }

int32_t choose_width(int32_t group, const float* x) { return x[0] == x[0] ? width_of(group) : 0; }
int32_t refuse_last(int32_t group, const float*) { return group == kGroups - 1 ? 0 : 4; }

// The three ways to choose the same widths, and a probe with which widths differ from token to token.
class Deciders {
 public:
  Deciders() : diagonal_(TinyModel::inner) {
    for (int i = 0; i < kCount; i++) corrections_[i] = 0.5f * float(i - 2);
    for (size_t k = 0; k < diagonal_.size(); k++) diagonal_[k] = half_of(0.5f);
    for (int g = 0; g < kGroups; g++) {
      fixed_[g] = width_of(g), diagonals_[g] = diagonal_.data();
      for (int i = 0; i < 6; i++) thresholds_[g * 6 + i] = i < g % 7 ? -1.f + 0.1f * float(i) : INFINITY;
      for (int i = 0; i < 6; i++) spread_[g * 6 + i] = 0.02f * float(1 << (2 * i));
    }
  }
  dpllm::Selection fixed() const { return {fixed_, nullptr, nullptr, 0, 0, nullptr, nullptr, 0, 0, nullptr, nullptr, 0}; }
  dpllm::Selection thresholds() const { return {nullptr, diagonals_, thresholds_, 6, 2, nullptr, nullptr, 0, 0, nullptr, nullptr, 0}; }
  // With a probe, and corrections that differ from token to token.
  dpllm::Selection probed(const float* probe) const {
    return {nullptr, diagonals_, spread_, 6, 2, probe, corrections_, 0.1f, 3, nullptr};
  }
  static dpllm::Selection callback(int32_t (*choose)(int32_t, const float*)) {
    return {nullptr, nullptr, nullptr, 0, 0, nullptr, nullptr, 0, 0, choose, nullptr, 0};
  }
  const int32_t* widths() const { return fixed_; }
  static dpllm::Selection after(dpllm::Selection s, int tokens) {
    if (s.correction) s.correction += tokens;
    return s;
  }

 private:
  Buffer<uint16_t> diagonal_;
  const uint16_t* diagonals_[kGroups];
  int32_t fixed_[kGroups];
  float spread_[kGroups * 6];
  float corrections_[kCount];
  float thresholds_[kGroups * 6];
};

// The memory of one sequence, its heads' runs with gaps between them.
class Memory : public Sizes {
 public:
  explicit Memory(Storage storage) {
    const size_t n = size_t(layers) * slots * dim * dpllm::storage_bytes(storage) / 2;  // in units of two bytes
    k_ = Buffer<float>((n + 1) / 2), v_ = Buffer<float>((n + 1) / 2);
    for (int i = 0; i < layers * kv_heads; i++) start_[i] = i % kv_heads * (slots / kv_heads) + 1, length_[i] = 0;
    const size_t layer = size_t(slots) * dim * dpllm::storage_bytes(storage);
    for (int l = 0; l < layers; l++) {
      layer_k_[l] = reinterpret_cast<char*>(k_.data()) + l * layer;
      layer_v_[l] = reinterpret_cast<char*>(v_.data()) + l * layer;
    }
    cache = {layer_k_, layer_v_, start_, length_, storage};
  }
  Memory(const Memory&) = delete;
  const int32_t* length() const { return length_; }
  dpllm::Cache cache;

 private:
  Buffer<float> k_, v_;
  void *layer_k_[layers], *layer_v_[layers];
  int64_t start_[layers * kv_heads];
  int32_t length_[layers * kv_heads];
};

struct Trace {
  std::vector<float> logits;  // of all tokens
  std::vector<int32_t> bits;
};

// The step's sums over groups are those of the widths that it says it has chosen.
void check_sums(const TinyModel& m, const dpllm::Request& request) {
  int64_t bytes = 0;
  for (int r = 0; r < request.rows; r++) {
    int64_t sum = 0;
    for (int g = 0; g < kGroups; g++) {
      const dpllm::Matrix& w = m.weights[size_t(g)].matrix;
      sum += int64_t(w.rows) * w.columns * request.bits[r * kGroups + g];
    }
    CHECK(sum == request.read_bits[r], text("row %d: bits times weights are %lld", r, (long long)sum));
  }
  for (int g = 0; g < kGroups; g++) {
    int widest = 0;
    for (int r = 0; r < request.rows; r++) widest = std::max(widest, request.bits[r * kGroups + g]);
    bytes += m.bytes_at[g][widest];
  }
  CHECK(bytes == request.read_bytes, text("the step reads %lld bytes", (long long)bytes));
}

// Tokens in steps of `sizes` each, the last one of what is left.
Trace decode(const Variant& v, int threads, const TinyModel& m, const dpllm::Selection& s, Storage storage,
             std::vector<int> sizes = std::vector<int>(kCount, 1)) {
  const Handle h(v.index, threads);
  Memory memory(storage);
  dpllm::Step* step = dpllm_step_open(h, &m.model);
  Trace trace;
  for (int i = 0, n; i < kCount; i += n) {
    n = sizes.empty() ? kCount - i : sizes.front();
    if (!sizes.empty()) sizes.erase(sizes.begin());
    Buffer<float> logits(size_t(n) * TinyModel::vocab);
    Buffer<int32_t> bits(size_t(n) * kGroups), greedy(static_cast<size_t>(n)), tokens(static_cast<size_t>(n));
    std::copy(kTokens + i, kTokens + i + n, tokens.data());
    Buffer<int64_t> read_bits(static_cast<size_t>(n));
    dpllm::Request request{n, i, tokens.data(), logits.data(), bits.data(), greedy.data(), read_bits.data(), 0};
    const dpllm::Selection own = Deciders::after(s, i);
    const int code = dpllm_step_rows(step, &own, &memory.cache, &request);
    CHECK(code == 0, text("token %d: code %d", i, code));
    check_sums(m, request);
    for (int j = 0; j < n * TinyModel::vocab; j++) {
      const int row = j / TinyModel::vocab;
      CHECK(logits[j] <= logits[row * TinyModel::vocab + greedy[row]], text("token %d: not the best", i + row));
    }
    trace.logits.insert(trace.logits.end(), logits.data(), logits.data() + logits.size());
    trace.bits.insert(trace.bits.end(), bits.data(), bits.data() + bits.size());
  }
  for (int i = 0; i < TinyModel::layers * TinyModel::kv_heads; i++)
    CHECK(memory.length()[i] == kCount, text("run %d holds %d pairs", i, memory.length()[i]));
  dpllm_step_close(step);
  return trace;
}

double error_of(const Trace& trace, const Numbers& right) {
  double error = 0, size = 0;
  for (size_t i = 0; i < right.size(); i++) {
    error += std::pow(trace.logits[i] - right[i], 2);
    size += right[i] * right[i];
  }
  return std::sqrt(error / size);
}

bool same(const Trace& a, const Trace& b) {
  return a.bits == b.bits && std::memcmp(a.logits.data(), b.logits.data(), a.logits.size() * sizeof(float)) == 0;
}

// A callback that refuses ends the step with code 1; the memory can be used again once the lengths are put back.
void check_refusal(const Variant& v, const TinyModel& m) {
  const Handle h(v.index, 2);
  Memory memory(Storage::kFloat32);
  dpllm::Step* step = dpllm_step_open(h, &m.model);
  Buffer<float> logits(TinyModel::vocab);
  int32_t bits[kGroups], token = 5, greedy;
  int64_t read_bits;
  dpllm::Request request{1, 0, &token, logits.data(), bits, &greedy, &read_bits, 0};
  const dpllm::Selection selection = Deciders::callback(refuse_last);
  const int code = dpllm_step_rows(step, &selection, &memory.cache, &request);
  CHECK(code == 1, text("code %d", code));
  dpllm_step_close(step);
}

// Tokens taken together give, bit for bit, what they give one by one.
void check_together(const Variant& v, const TinyModel& m, const dpllm::Selection& s, Storage storage, const char* name) {
  const Trace alone = decode(v, 1, m, s, storage);
  for (const std::vector<int>& sizes : {std::vector<int>{}, {2}, {1, 4}, {3, 2, 1}, {5, 1}})
    for (const int threads : kThreads)
      CHECK(same(alone, decode(v, threads, m, s, storage, sizes)),
            text("%s widths, %d threads, first %d together", name, threads, sizes.empty() ? kCount : sizes[0]));
}

void check_model(const Variant& v, TinyModel& m, const Numbers& right) {
  constexpr double kBounds[] = {5e-4, 3e-3, 3e-2};
  const Deciders deciders;
  for (const Storage storage : kStorages) {
    const Trace first = decode(v, 1, m, deciders.fixed(), storage);
    const double error = error_of(first, right);
    CHECK(error < (kBounds[int(storage)]), text("%s cache: error %g", kStorageNames[int(storage)], error));
    for (const int threads : kThreads)
      CHECK(same(first, decode(v, threads, m, deciders.fixed(), storage)), text("%d threads differ", threads));
    CHECK(same(first, decode(v, 2, m, deciders.thresholds(), storage)), "thresholds differ");
    CHECK(same(first, decode(v, 2, m, Deciders::callback(choose_width), storage)), "a callback differs");
    check_together(v, m, deciders.fixed(), storage, "fixed");
    check_together(v, m, deciders.probed(m.norm()), storage, "chosen");
  }
  check_refusal(v, m);
}

}  // namespace

void test_step(const Options&) {
  Random random(5);
  for (const bool planes_head : {false, true}) {
    TinyModel m(planes_head, random);
    Numbers right;
    const Deciders deciders;
    for (int i = 0; i < kCount; i++) {
      const Numbers logits = m.forward(kTokens[i], i, deciders.widths());
      right.insert(right.end(), logits.begin(), logits.end());
    }
    for (const Variant& v : supported_variants()) {
      where = text("%s, head of %s", v.name, planes_head ? "planes" : "int8");
      check_model(v, m, right);
    }
  }
}

}  // namespace test
