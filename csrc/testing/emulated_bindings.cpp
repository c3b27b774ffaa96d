// The Python module _emulated: worlds on an emulated network for property tests, never in a wheel. As in
// vllm_efa_ep._core, tensors pass as addresses.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstdint>
#include <exception>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "errors.h"
#include "testing/emulated_world.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace efa_ep;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

ScalarType scalar_type(const std::string& name) {
  if (name == "bfloat16") return ScalarType::kBfloat16;
  if (name == "float16") return ScalarType::kFloat16;
  if (name == "float32") return ScalarType::kFloat32;
  throw ConfigurationError("combine_type is \"" + name + "\"; use bfloat16, float16 or float32");
}

/// A Python object with the methods of EmulatedWorkload. What one of them raises ends its rank.
class PythonWorkload final : public EmulatedWorkload {
 public:
  explicit PythonWorkload(nb::object workload) : workload_(std::move(workload)) {}

  DispatchInput tokens(const EmulatedTurn& turn) override {
    using Input = std::tuple<uintptr_t, size_t, uintptr_t, uintptr_t, bool, uintptr_t, uint32_t>;
    const auto [x, x_stride, scales, ids, ids_are_64_bit, weights, tokens] =
        nb::cast<Input>(call("tokens", turn));
    return {.x = pointer<std::byte>(x),
            .x_stride = x_stride,
            .scales = pointer<std::byte>(scales),
            .ids = pointer<void>(ids),
            .ids_are_64_bit = ids_are_64_bit,
            .weights = pointer<float>(weights),
            .tokens = tokens};
  }
  DispatchOutput receive(const EmulatedTurn& turn, uint32_t rows) override {
    using Output = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>;
    const auto [x, scales, ids, weights, counts] = nb::cast<Output>(call("receive", turn, rows));
    return {.x = pointer<std::byte>(x),
            .scales = pointer<std::byte>(scales),
            .ids = pointer<int32_t>(ids),
            .weights = pointer<float>(weights),
            .tokens_per_expert = pointer<int32_t>(counts)};
  }
  CombineInput results(const EmulatedTurn& turn) override {
    using Results = std::tuple<uintptr_t, bool, bool>;
    const auto [rows, per_slot, weights_applied] = nb::cast<Results>(call("results", turn));
    return {.rows = pointer<std::byte>(rows), .per_slot = per_slot, .weights_applied = weights_applied};
  }
  std::byte* output(const EmulatedTurn& turn) override {
    return pointer<std::byte>(nb::cast<uintptr_t>(call("output", turn)));
  }
  void finished(const EmulatedTurn& turn) override { call("finished", turn); }

 private:
  template <class... Arguments>
  nb::object call(const char* method, const EmulatedTurn& turn, Arguments... arguments) const {
    return workload_.attr(method)(turn.rank, turn.channel, turn.round, arguments...);
  }

  const nb::object workload_;
};

EmulatedWorldOptions world_options(uint32_t world, uint32_t ranks_per_node, const RowShape& row,
                                   uint32_t max_tokens, uint32_t channels) {
  if (ranks_per_node == 0 || world == 0 || world % ranks_per_node != 0) {
    throw ConfigurationError(std::to_string(world) + " ranks do not divide into nodes of " +
                             std::to_string(ranks_per_node));
  }
  EmulatedWorldOptions options;
  options.layout.topology = {world, ranks_per_node};
  options.layout.row = row;
  options.layout.max_tokens = max_tokens;
  options.layout.channels = channels;
  // Both operations of every channel, a chunk per row and one more for pairs without rows.
  options.ring_commands =
      std::bit_ceil(kOperations * channels * options.layout.topology.nodes() * (max_tokens + 1));
  return options;
}

std::string error_text(const std::exception_ptr& error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const std::exception& caught) {
    return caught.what();
  }
  return "";
}

nb::dict counters(EmulatedWorld& world, uint32_t rank) {
  const ProxyCounters network =
      world.proxy(rank) == nullptr ? ProxyCounters{} : world.proxy(rank)->counters();
  const DeviceCounters device = world.device(rank).counters();
  nb::dict result;
  result["writes"] = network.writes;
  result["bytes"] = network.bytes;
  result["completions"] = network.completions;
  result["immediates"] = network.immediates;
  result["network_rows"] = device.network_rows;
  result["peer_rows"] = device.peer_rows;
  result["received_rows"] = device.received_rows;
  uint64_t host_ns = 0;
  for (const uint64_t half_ns : world.device(rank).times().half_ns) host_ns += half_ns;
  result["host_ns"] = host_ns;
  return result;
}

void bind_world(nb::module_& m) {
  nb::class_<EmulatedWorld>(m, "World")
      .def(
          "__init__",
          [](EmulatedWorld* self, uint32_t world, uint32_t ranks_per_node, uint32_t top_k,
             uint32_t payload_bytes, uint32_t scale_bytes, uint32_t combine_bytes, uint32_t max_tokens,
             uint32_t channels, std::vector<uint32_t> expert_owner, const std::string& combine_type,
             bool per_expert, const std::string& signal_policy, uint64_t chunk_bytes,
             const std::string& profile, uint32_t nics, uint64_t seed, double timeout_s, bool check_sources) {
            EmulatedWorldOptions options =
                world_options(world, ranks_per_node, {top_k, payload_bytes, scale_bytes, combine_bytes},
                              max_tokens, channels);
            options.expert_owner = std::move(expert_owner);
            options.combine_type = scalar_type(combine_type);
            options.per_expert = per_expert;
            options.signal_policy = signal_policy_named(signal_policy);
            options.chunk_bytes = chunk_bytes;
            options.timeout = std::chrono::duration_cast<std::chrono::nanoseconds>(
                std::chrono::duration<double>(timeout_s));
            options.network = {
                .profile = emulated_profile(profile), .seed = seed, .check_sources = check_sources};
            options.network.profile.nics = nics;
            // EFA has no fences. A network that is like it in all else shows what they would be good for.
            options.network.profile.honours_fence = options.signal_policy == SignalPolicyKind::kNicOrdered;
            new (self) EmulatedWorld(options);
          },
          nb::kw_only(), "world"_a, "ranks_per_node"_a, "top_k"_a, "payload_bytes"_a, "scale_bytes"_a,
          "combine_bytes"_a, "max_tokens"_a, "channels"_a, "expert_owner"_a, "combine_type"_a, "per_expert"_a,
          "signal_policy"_a, "chunk_bytes"_a, "profile"_a, "nics"_a, "seed"_a, "timeout_s"_a,
          "check_sources"_a)
      .def(
          "run",
          [](EmulatedWorld& self, nb::object workload, uint32_t rounds) {
            PythonWorkload python(std::move(workload));
            self.run(python, rounds);
          },
          "workload"_a, "rounds"_a)
      .def(
          "activations",
          [](EmulatedWorld& self, uint32_t rank, uint32_t channel) {
            return reinterpret_cast<uintptr_t>(self.device(rank).activations(channel));
          },
          "rank"_a, "channel"_a)
      .def(
          "results",
          [](EmulatedWorld& self, uint32_t rank, uint32_t channel) {
            return reinterpret_cast<uintptr_t>(self.device(rank).results(channel));
          },
          "rank"_a, "channel"_a)
      .def("counters", &counters, "rank"_a, "What the rank's proxy and device counted so far.")
      .def(
          "events", [](EmulatedWorld& self) { return self.network().trace().events(); },
          "Events of the network so far.")
      .def(
          "error", [](const EmulatedWorld& self, uint32_t rank) { return error_text(self.error(rank)); },
          "rank"_a, "What ended the rank, empty if nothing did.")
      .def("mask", &EmulatedWorld::mask, "server_of"_a, "Goes on without the ranks that another one serves.")
      .def(
          "kill_before",
          [](EmulatedWorld& self, const std::string& half, uint32_t rank, uint32_t round) {
            const auto name = std::find(kHalfNames.begin(), kHalfNames.end(), half);
            if (name == kHalfNames.end()) throw ConfigurationError("there is no half \"" + half + "\"");
            const auto index = static_cast<uint32_t>(name - kHalfNames.begin());
            self.inject_before(static_cast<Half>(index), {rank, 0, round},
                               {.kind = FaultKind::kDie, .rank = rank});
          },
          "half"_a, "rank"_a, "round"_a, "Ends a rank's process in the moment before a half, on channel 0.")
      .def(
          "now",
          [](EmulatedWorld& self) { return std::chrono::duration<double>(self.network().now()).count(); },
          "Virtual time, in seconds.")
      .def("finished_rounds", &EmulatedWorld::finished_rounds, "rank"_a, "channel"_a)
      .def(
          "changed_sources",
          [](EmulatedWorld& self, uint32_t rank) { return self.network().counters(rank).changed_sources; },
          "rank"_a, "Writes whose source bytes changed before their completion.");
}

}  // namespace

NB_MODULE(_emulated, m) { bind_world(m); }
