// Rounds in the shapes of real models, with few tokens: experts, top-k and hidden size are the models' own
// (their published config.json files), formats those that they are served in.
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

// A row as it is dispatched: bits of a value, and for how many values there is a scale, of how many bytes.
struct Format {
  const char* name;
  uint32_t bits, block, scale_bytes;
};

constexpr Model kDeepSeekV3 = {"DeepSeekV3", 256, 8, 7168};
constexpr Model kKimiK2 = {"KimiK2", 384, 8, 7168};
constexpr Model kQwen3 = {"Qwen3_235B", 128, 8, 4096};
constexpr Model kGptOss = {"GptOss120B", 128, 4, 2880};
constexpr Model kMixtral = {"Mixtral8x7B", 8, 2, 4096};

constexpr Format kBf16 = {"Bf16", 16, 0, 0};
constexpr Format kFp8 = {"Fp8", 8, 128, 4};
constexpr Format kMxfp8 = {"Mxfp8", 8, 32, 1};
constexpr Format kNvfp4 = {"Nvfp4", 4, 16, 1};

struct Shape {
  Model model;
  Format format;
};

constexpr Shape kShapes[] = {{kDeepSeekV3, kBf16}, {kDeepSeekV3, kFp8}, {kDeepSeekV3, kNvfp4},
                             {kKimiK2, kBf16},     {kKimiK2, kFp8},     {kQwen3, kBf16},
                             {kQwen3, kFp8},       {kGptOss, kBf16},    {kGptOss, kMxfp8},
                             {kMixtral, kBf16},    {kMixtral, kFp8}};

class Shapes : public testing::TestWithParam<Shape> {};

TEST_P(Shapes, RunTheirRounds) {
  const auto& [model, format] = GetParam();
  const bool has_scales = format.block > 0;
  WorldConfig config;
  config.layout.topology = {4, 2};
  config.layout.row = {.top_k = model.top_k,
                       .payload_bytes = model.hidden * format.bits / 8,
                       .scale_bytes = has_scales ? model.hidden / format.block * format.scale_bytes : 0,
                       .combine_bytes = model.hidden * 2};
  config.layout.max_tokens = amount(8, 128);
  for (uint32_t expert = 0; expert < model.experts; ++expert) {
    config.expert_owner.push_back(expert / (model.experts / config.world()));
  }
  config.per_expert = has_scales;  // as the low-latency backend does
  config.weights_applied = !config.per_expert;
  config.routing = Routing::kDistinct;
  config.chunk_bytes = 64 * 1024;
  config.rails = 2;
  config.proxy_threads = false;
  config.rounds = 2;
  config.seed = test_seed(model.experts + model.hidden);
  CudaWorld(config, {}).run(plan_rounds(config));
}

INSTANTIATE_TEST_SUITE_P(Models, Shapes, testing::ValuesIn(kShapes), [](const auto& info) {
  return std::string(info.param.model.name) + info.param.format.name;
});

}  // namespace
}  // namespace efa_ep
