// Every compiled-in instruction set that this processor runs, against sums in double precision.
//
// kernels_test [--quick] [products dense draw quantize attention step pool threads]: exit code 1 if anything is wrong.
#include "check.h"

int main(int count, char** arguments) {
  struct Part {
    const char* name;
    void (*run)(const test::Options&);
  };
  const Part parts[] = {{"products", test::test_products}, {"dense", test::test_dense}, {"draw", test::test_draw},
                        {"quantize", test::test_quantize},
                        {"attention", test::test_attention}, {"step", test::test_step}, {"pool", test::test_pool},
                        {"threads", test::test_threads}};
  test::Options options;
  std::vector<std::string> chosen;
  for (int i = 1; i < count; i++) {
    if (std::string(arguments[i]) == "--quick") options.quick = true;
    else chosen.push_back(arguments[i]);
  }
  for (int i = 0; dpllm_isa_name(i); i++)
    std::printf("%s: %s\n", dpllm_isa_name(i), dpllm_isa_supported(i) ? "supported" : "not on this processor");
  size_t known = 0;
  for (const Part& part : parts) {
    bool wanted = chosen.empty();
    for (const std::string& name : chosen) wanted |= name == part.name, known += name == part.name;
    if (!wanted) continue;
    const int before = test::failures;
    part.run(options);
    std::printf("%s: %s\n", part.name, test::failures == before ? "ok" : "FAILED");
    std::fflush(stdout);
  }
  if (known != chosen.size()) std::printf("unknown part; there are products dense draw quantize attention step pool threads\n");
  if (test::failures) std::printf("%d checks failed\n", test::failures);
  return test::failures || known != chosen.size() ? 1 : 0;
}
