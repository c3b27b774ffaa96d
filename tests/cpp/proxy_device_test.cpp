// What a proxy does for a device that is not the CPU: it takes commands from a ring that the device fills,
// and writes its signals where the device can see them, outside of the arena.
#include <gtest/gtest.h>

#include <sched.h>

#include <atomic>
#include <optional>

#include "cuda/device_ring.h"
#include "errors.h"
#include "proxy_fixture.h"

namespace efa_ep {
namespace {

class ProxyDeviceTest : public ProxyTest {
 protected:
  static constexpr uint32_t kCapacity = 4;

  ProxyDeviceTest() { proxy_options_.commands = &reader_; }
  ~ProxyDeviceTest() override { proxy_.reset(); }  // its thread reads the ring

  /// What a kernel does, by the definition of the ring and not with the reader's code.
  void push(const Command& command) {
    const auto [first, second] = command.encode();
    const uint64_t parity = (head_ / kCapacity) % 2 == 0 ? 1 : 0;
    cuda::RingEntry& entry = ring_[head_ % kCapacity];
    std::atomic_ref(entry.first).store(first | parity, std::memory_order_release);
    std::atomic_ref(entry.second).store(second | parity << 63, std::memory_order_release);
    ++head_;
  }
  /// One chunk of one dispatch row to node 1.
  Command command(uint32_t round) const {
    return {.immediate = immediate(0, {.round = round, .rows = 1}, 0).encode(),
            .destination_node = 1,
            .local_row = layout_.staged_row(0, 1),
            .rows = 1};
  }
  uint64_t signal(size_t offset) const {
    return *reinterpret_cast<const uint64_t*>(signals_.data() + offset);
  }

  std::vector<cuda::RingEntry> ring_ = std::vector<cuda::RingEntry>(kCapacity);
  uint64_t tail_ = 0;
  uint32_t stop_ = 0;
  uint64_t head_ = 0;
  cuda::DeviceRingReader reader_{ring_.data(), &tail_, &stop_, kCapacity};
  std::vector<std::byte> signals_;
};

TEST_F(ProxyDeviceTest, PostsWhatTheDeviceLeavesInItsRingLapAfterLap) {
  start(2);
  for (uint32_t round = 1; round <= 3 * kCapacity; ++round) {
    EXPECT_TRUE(reader_.empty());
    push(command(round));
    EXPECT_FALSE(reader_.empty());
    while (proxy_->counters().writes < round) proxy_->help();
    EXPECT_EQ(tail_, round);
  }
}

TEST_F(ProxyDeviceTest, EndsTheDevicesWaitsWhenItFails) {
  start(2);
  network_->set_rule([](uint32_t, const WriteRequest&) { return LoopbackNetwork::Fault::kFail; });
  push(command(1));
  EXPECT_EQ(std::atomic_ref(stop_).load(), 0u);
  const Patience patience;
  while (std::atomic_ref(stop_).load() == 0) {
    proxy_->help();
    patience.check();
  }
  EXPECT_THROW(proxy_->throw_if_failed(), TransportError);
}

TEST_F(ProxyDeviceTest, LeavesAnEntryThatIsOnlyHalfThere) {
  start(2);
  push(command(1));
  const cuda::RingEntry whole = ring_[0];
  for (const cuda::RingEntry& half : {cuda::RingEntry{whole.first, 0}, cuda::RingEntry{0, whole.second}}) {
    ring_[0] = half;
    proxy_->help();
    EXPECT_TRUE(reader_.empty());
    EXPECT_EQ(proxy_->counters().writes, 0u);
  }
  ring_[0] = whole;
  while (proxy_->counters().writes == 0) proxy_->help();
}

TEST_F(ProxyDeviceTest, DrainsWhatIsInTheRing) {
  start(2);
  push(command(1));
  proxy_->drain(kForever);
  EXPECT_EQ(proxy_->counters().completions, 1u);
}

TEST_F(ProxyDeviceTest, WritesItsSignalsWhereItIsToldAndLeavesTheArenaAlone) {
  for (const bool combine_writes : {false, true}) {
    proxy_.reset();
    signals_.assign(layout_.channels * size_t{64} << 10, std::byte{0});
    proxy_options_.signals = signals_.data();
    proxy_options_.signals_combine_writes = combine_writes;
    proxy_options_.commands = nullptr;
    start(2);
    const Shipment shipment{.channel = 1, .operation = Operation::kCombine, .rows = 5};
    submit(1, shipment);
    for (uint32_t chunk = 0; chunk < chunking(shipment).chunks; ++chunk) write_chunk(1, shipment, chunk);
    const uint64_t chunks = chunking(shipment).chunks;
    while (signal(layout_.completion(1, Operation::kCombine)) < chunks ||
           signal(layout_.arrival(1, Operation::kCombine, 1)) == 0) {
      proxy_->help();
    }
    EXPECT_EQ(signal(layout_.completion(1, Operation::kCombine)), chunks);
    EXPECT_EQ(signal(layout_.arrival(1, Operation::kCombine, 1)), (RoundWord{1, 5}.encode()));
    for (size_t i = 0; i < layout_.signal_bytes(); ++i) ASSERT_EQ(arenas_[0].data()[i], std::byte{0}) << i;
  }
}

TEST_F(ProxyDeviceTest, RunsItsThreadOnTheCpusItIsGiven) {
  proxy_options_.cpus = {0};
  start(2, true);
  push(command(1));
  while (proxy_->counters().writes == 0) sched_yield();
  proxy_->throw_if_failed();
}

TEST_F(ProxyDeviceTest, SaysWhenItMayNotRunThere) {
  proxy_options_.cpus = {CPU_SETSIZE - 1};
  start(2, true);
  std::string message;
  while (message.empty()) {
    try {
      proxy_->throw_if_failed();
      sched_yield();
    } catch (const ConfigurationError& error) {
      message = error.what();
    }
  }
  EXPECT_NE(message.find("CPUs near its GPU"), std::string::npos) << message;
}

}  // namespace
}  // namespace efa_ep
