// draw TEMPERATURE TOP_K TOP_P SEED COUNT LOGIT…: prints how often each token is drawn.
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <vector>

#include "sampler.h"

int main(int argc, char** argv) {
  if (argc < 7) {
    std::fprintf(stderr, "draw TEMPERATURE TOP_K TOP_P SEED COUNT LOGIT...\n");
    return 2;
  }
  Sampling sampling;
  sampling.temperature = std::atof(argv[1]);
  sampling.top_k = std::atoll(argv[2]);
  sampling.top_p = std::atof(argv[3]);
  sampling.seed = std::strtoull(argv[4], nullptr, 10);
  std::vector<float> logits;
  for (int i = 6; i < argc; ++i) logits.push_back(static_cast<float>(std::atof(argv[i])));
  std::vector<int64_t> counts(logits.size());
  Sampler sampler(sampling);
  try {
    for (long long i = std::atoll(argv[5]); i > 0; --i) ++counts[static_cast<size_t>(sampler.draw(logits))];
  } catch (const std::runtime_error& error) {
    std::fprintf(stderr, "draw: %s\n", error.what());
    return 1;
  }
  for (const int64_t count : counts) std::printf("%" PRId64 " ", count);
  std::printf("\n");
  return 0;
}
