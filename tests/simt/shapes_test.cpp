// Rounds in the shapes of real models, with few tokens: experts, top-k, hidden size and dispatch format are
// the models' own (their published config.json files).
#include <gtest/gtest.h>

#include <string>

#include "cuda_world.h"
#include "test_environment.h"

namespace efa_ep {
namespace {

struct Model {
  const char* name;
  uint32_t experts, top_k, hidden;
};

// Rows as they are dispatched.
struct Format {
  const char* name;
  uint32_t payload_bytes_per_128, scale_bytes_per_128;
};

constexpr Model kModels[] = {{"DeepSeekV3", 256, 8, 7168},
                             {"KimiK2", 384, 8, 7168},
                             {"Qwen3_235B", 128, 8, 4096},
                             {"GptOss120B", 128, 4, 2880},
                             {"Mixtral8x7B", 8, 2, 4096}};
constexpr Format kFormats[] = {{"Bf16", 256, 0}, {"Fp8", 128, 4}};

class Shapes : public testing::TestWithParam<std::tuple<Model, Format>> {};

TEST_P(Shapes, RunTheirRounds) {
  const auto& [model, format] = GetParam();
  WorldConfig config;
  config.layout.topology = {4, 2};
  const uint32_t blocks = model.hidden / 128;
  if (format.scale_bytes_per_128 > 0 && model.hidden % 128 != 0) GTEST_SKIP() << "no whole blocks of 128";
  config.layout.row = {.top_k = model.top_k,
                       .payload_bytes = model.hidden / 16 * (format.payload_bytes_per_128 / 8),
                       .scale_bytes = blocks * format.scale_bytes_per_128,
                       .combine_bytes = model.hidden * 2};
  config.layout.max_tokens = amount(8, 128);
  for (uint32_t expert = 0; expert < model.experts; ++expert) {
    config.expert_owner.push_back(expert / (model.experts / config.world()));
  }
  config.per_expert = format.scale_bytes_per_128 > 0;  // as the low-latency backend does
  config.weights_applied = !config.per_expert;
  config.routing = Routing::kDistinct;
  config.chunk_bytes = 64 * 1024;
  config.rails = 2;
  config.proxy_threads = false;
  config.rounds = 2;
  config.seed = test_seed(model.experts + model.hidden);
  CudaWorld(config, {}).run(plan_rounds(config));
}

INSTANTIATE_TEST_SUITE_P(Models, Shapes,
                         testing::Combine(testing::ValuesIn(kModels), testing::ValuesIn(kFormats)),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param).name) + std::get<1>(info.param).name;
                         });

}  // namespace
}  // namespace efa_ep
