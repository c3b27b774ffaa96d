#include "cuda/stand_in.h"

#include <sched.h>
#include <sys/prctl.h>

#include "cuda/runtime.h"

namespace efa_ep::cuda {
namespace {

// The others wait for it in every round, so it looks often while rounds follow each other.
constexpr auto kYieldTime = std::chrono::milliseconds(50);
constexpr auto kNap = std::chrono::microseconds(50);

}  // namespace

StandIn::StandIn(CudaDevice& device, const HostBlock& server, int gpu)
    : device_(device), server_(server), gpu_(gpu), launched_(device.channels()) {
  use_gpu(gpu_);
  for (size_t channel = 0; channel < launched_.size(); ++channel) streams_.push_back(create_stream());
  thread_ = std::thread(&StandIn::serve, this);
}

StandIn::~StandIn() {
  stop();
  for (const Stream stream : streams_) destroy_stream(stream);
}

void StandIn::stop() {
  stop_.store(true, std::memory_order_relaxed);
  if (thread_.joinable()) thread_.join();
}

bool StandIn::wait_until_idle(std::chrono::nanoseconds most) {
  const auto end = std::chrono::steady_clock::now() + most;
  while (true) {
    throw_if_failed();
    if (idle()) return true;
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::sleep_for(kNap);
  }
}

void StandIn::throw_if_failed() {
  {
    const std::lock_guard lock(mutex_);
    if (failure_) std::rethrow_exception(failure_);
  }
  device_.throw_if_failed();
}

uint64_t StandIn::begun(uint32_t channel) const {
  auto& rounds = const_cast<uint64_t&>(server_.totals[channel].rounds);  // atomic_ref takes no const
  return std::atomic_ref(rounds).load(std::memory_order_relaxed);
}

bool StandIn::idle() {
  {
    const std::lock_guard lock(mutex_);
    for (uint32_t channel = 0; channel < launched_.size(); ++channel) {
      if (launched_[channel] < begun(channel)) return false;
    }
  }
  for (const Stream stream : streams_) {
    if (!is_done(stream)) return false;
  }
  return true;
}

void StandIn::serve() {
  prctl(PR_SET_NAME, "efa_ep_stand_in");
  auto last_round = std::chrono::steady_clock::now();
  try {
    use_gpu(gpu_);
    while (!stop_.load(std::memory_order_relaxed)) {
      const auto now = std::chrono::steady_clock::now();
      if (begin_due()) {
        last_round = now;
      } else if (now - last_round < kYieldTime) {
        sched_yield();
      } else {
        std::this_thread::sleep_for(kNap);
      }
    }
  } catch (...) {  // whatever it is, the live rank's thread rethrows it
    const std::lock_guard lock(mutex_);
    failure_ = std::current_exception();
  }
}

// Whether a round was due on any channel.
bool StandIn::begin_due() {
  bool any = false;
  for (uint32_t channel = 0; channel < streams_.size(); ++channel) {
    const std::lock_guard lock(mutex_);
    if (launched_[channel] == begun(channel)) continue;
    run_round(channel);
    ++launched_[channel];
    any = true;
  }
  return any;
}

void StandIn::run_round(uint32_t channel) {
  const Stream stream = streams_[channel];
  device_.dispatch_send(channel, stream, {});
  device_.dispatch_recv(channel, stream, {});
  device_.combine_send(channel, stream, {});
  device_.combine_recv(channel, stream, nullptr);
}

}  // namespace efa_ep::cuda
