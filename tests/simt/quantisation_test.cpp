// Fused quantisation: bf16 tokens become fp8 rows with scales on their way out. The reference quantises on
// the CPU from the formats' definitions, one number at a time, and the oracle then expects its bytes.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

#include "cpu/quantise.h"
#include "cuda/quantise.cuh"
#include "cuda_world.h"
#include "test_environment.h"

namespace efa_ep {
namespace {

constexpr uint32_t kGroup = 128;
constexpr float kLargest = 448.0f;

/// The number that an e4m3 code without sign stands for: 4 exponent bits with bias 7, 3 fraction bits.
double decode_e4m3(uint32_t code) {
  const int exponent = static_cast<int>(code >> 3);
  const double fraction = (code & 7) / 8.0;
  return exponent == 0 ? std::ldexp(fraction, -6) : std::ldexp(1 + fraction, exponent - 7);
}

/// The nearest code, ties to the even one, by trying all.
uint8_t encode_e4m3(float value) {
  const double magnitude = std::fabs(static_cast<double>(value));
  uint32_t best = 0;
  for (uint32_t code = 1; code <= 0x7E; ++code) {
    const double distance = std::fabs(decode_e4m3(code) - magnitude);
    const double so_far = std::fabs(decode_e4m3(best) - magnitude);
    if (distance < so_far || (distance == so_far && code % 2 == 0)) best = code;
  }
  return static_cast<uint8_t>(best | (std::signbit(value) ? 0x80u : 0u));
}

uint32_t scale_size(Quantisation kind) { return kind == Quantisation::kFp8Ue8m0 ? 1 : sizeof(float); }

/// Quantises one token: codes, and scales behind each other.
void quantise(const std::vector<float>& values, Quantisation kind, std::byte* codes, std::byte* scales) {
  for (size_t group = 0; group < values.size() / kGroup; ++group) {
    const float* block = values.data() + group * kGroup;
    float largest = 1e-10f;
    for (uint32_t i = 0; i < kGroup; ++i) largest = std::max(largest, std::fabs(block[i]));
    float scale = largest / kLargest;
    int exponent = 0;
    if (std::frexp(scale, &exponent) == 0.5f) --exponent;
    if (kind != Quantisation::kFp8) scale = std::ldexp(1.0f, exponent);
    if (kind == Quantisation::kFp8Ue8m0) {
      scales[group] = static_cast<std::byte>(exponent + 127);
    } else {
      std::memcpy(scales + group * sizeof scale, &scale, sizeof scale);
    }
    for (uint32_t i = 0; i < kGroup; ++i)
      codes[group * kGroup + i] = std::byte(encode_e4m3(block[i] / scale));
  }
}

/// What the CPU's device makes of the same row.
void expect_equal_on_cpu(const std::byte* bf16, Quantisation kind, uint32_t hidden, const std::byte* codes,
                         const std::byte* scales) {
  const size_t scale_bytes = hidden / kGroup * scale_size(kind);
  Bytes own_codes(hidden);
  Bytes own_scales(scale_bytes);
  quantise_row(bf16, hidden, kind, own_codes.data(), own_scales.data());
  EXPECT_TRUE(std::equal(own_codes.begin(), own_codes.end(), codes));
  EXPECT_TRUE(std::equal(own_scales.begin(), own_scales.end(), scales));
}

class FusedQuantisation : public testing::TestWithParam<Quantisation> {};

TEST_P(FusedQuantisation, MakesTheBytesOfTheReference) {
  constexpr uint32_t kHidden = 9 * kGroup;  // not a whole number of passes of a warp
  WorldConfig config;
  config.layout.topology = {4, 2};
  config.layout.row = {.top_k = 2,
                       .payload_bytes = kHidden,
                       .scale_bytes = kHidden / kGroup * scale_size(GetParam()),
                       .combine_bytes = 64};
  config.layout.max_tokens = 12;
  for (uint32_t expert = 0; expert < 8; ++expert) config.expert_owner.push_back(expert / 2);
  config.routing = Routing::kDistinct;
  config.proxy_threads = false;
  config.seed = test_seed(5);
  // The plan's rows are the reference's codes: planned as bytes, then the inputs become what they come from.
  std::mt19937_64 random(config.seed);
  std::vector<Bytes> inputs(config.world());
  std::vector<RankRound> round = Planner(config).plan([&](uint32_t rank, RankRound& plan) {
    inputs[rank].resize(size_t{plan.tokens} * kHidden * 2);
    for (uint32_t token = 0; token < plan.tokens; ++token) {
      std::vector<float> values(kHidden);
      for (size_t i = 0; i < values.size(); ++i) {
        const auto size = static_cast<int>(random() % 20) - 12 - (i < kGroup ? 100 : 0);
        float value = std::ldexp(static_cast<float>(random() % 512) - 256, size);
        if (i / kGroup == 3) value = 0;
        uint32_t bits = 0;
        std::memcpy(&bits, &value, sizeof bits);
        const auto half = static_cast<uint16_t>(bits >> 16);
        bits &= 0xFFFF0000u;
        std::memcpy(&values[i], &bits, sizeof bits);
        std::memcpy(inputs[rank].data() + (size_t{token} * kHidden + i) * 2, &half, sizeof half);
      }
      quantise(values, GetParam(), plan.x.data() + size_t{token} * kHidden,
               plan.scales.data() + size_t{token} * config.layout.row.scale_bytes);
      expect_equal_on_cpu(inputs[rank].data() + size_t{token} * kHidden * 2, GetParam(), kHidden,
                          plan.x.data() + size_t{token} * kHidden,
                          plan.scales.data() + size_t{token} * config.layout.row.scale_bytes);
    }
  });
  for (uint32_t rank = 0; rank < config.world(); ++rank) round[rank].x = inputs[rank];
  CudaRank::Options options;
  options.quantisation = GetParam();
  CudaWorld(config, options).run({{round}});
}

// Every bf16 number, in groups of several largest ones: the kernels convert with NVIDIA's own functions.
TEST_P(FusedQuantisation, OfEveryNumberIsEqualOnBothDevices) {
  constexpr uint32_t kPerGroup = kGroup - 1;
  constexpr uint32_t kGroups = (1 << 16) / kPerGroup + 1;
  constexpr uint32_t kValues = kGroups * kGroup;
  const size_t scale_bytes = kGroups * scale_size(GetParam());
  for (const uint32_t largest :
       {0x43E0, 0x4380, 0x3F81, 0x0001, 0x7F7F, 0x7F80}) {  // 448, 256, ..., infinity
    TestMemory row(kValues * 2);
    for (uint32_t i = 0; i < kValues; ++i) {
      const uint32_t number = i % kGroup == 0 ? largest : i / kGroup * kPerGroup + i % kGroup - 1;
      const auto bits = static_cast<uint16_t>(number);
      std::memcpy(row.data() + i * 2, &bits, sizeof bits);
    }
    const TestMemory made(kValues + scale_bytes);
    const simt::stream_t stream = simt::stream_create(0);
    simt::launch_raw(
        stream, dim3(1), dim3(32),
        [&] {
          DP_SHARED(cuda::RowList, rows);
          if (cuda::lane_id() == 0) rows.row[0] = made.data();
          __syncwarp();
          const auto quantise_row = GetParam() == Quantisation::kFp8 ? cuda::quantise_row<Quantisation::kFp8>
                                    : GetParam() == Quantisation::kFp8PowerOf2
                                        ? cuda::quantise_row<Quantisation::kFp8PowerOf2>
                                        : cuda::quantise_row<Quantisation::kFp8Ue8m0>;
          quantise_row(row.data(), rows, 1, 0, kValues, kValues);
        },
        "quantise");
    simt::stream_sync(stream);
    expect_equal_on_cpu(row.data(), GetParam(), kValues, made.data(), made.data() + kValues);
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, FusedQuantisation,
                         testing::Values(Quantisation::kFp8, Quantisation::kFp8PowerOf2,
                                         Quantisation::kFp8Ue8m0));

}  // namespace
}  // namespace efa_ep
