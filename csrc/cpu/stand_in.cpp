#include "cpu/stand_in.h"

#include <sys/prctl.h>

#include <exception>
#include <utility>

namespace efa_ep {
namespace {

/// Ends the wait of a thread that is to end.
struct Stopped : std::exception {};

CpuDeviceOptions stoppable(CpuDeviceOptions options, const std::atomic<bool>& stop) {
  options.check_interrupt = [&stop](const Wait&) {
    if (stop.load(std::memory_order_relaxed)) throw Stopped();
  };
  return options;
}

}  // namespace

StandIn::StandIn(CpuDeviceOptions options, std::vector<std::byte*> arenas, Proxy* proxy)
    : channels_(options.layout.channels),
      device_(stoppable(std::move(options), stop_), std::move(arenas), proxy) {
  try {
    for (uint32_t channel = 0; channel < channels_.size(); ++channel) {
      threads_.emplace_back(&StandIn::serve, this, channel);
    }
  } catch (...) {  // no more threads: those that run have to end before their handles
    stop();
    throw;
  }
}

void StandIn::start_round(uint32_t channel) {
  const std::lock_guard lock(mutex_);
  ++channels_.at(channel).started;
  changed_.notify_all();
}

bool StandIn::wait_until_idle(std::chrono::nanoseconds most) {
  std::unique_lock lock(mutex_);
  const bool over = changed_.wait_for(lock, most, [&] { return failure_ != nullptr || idle(); });
  if (failure_) std::rethrow_exception(failure_);
  return over;
}

void StandIn::stop() {
  {
    const std::lock_guard lock(mutex_);
    stop_.store(true, std::memory_order_relaxed);
    changed_.notify_all();
  }
  for (std::thread& thread : threads_) {
    if (thread.joinable()) thread.join();
  }
}

void StandIn::throw_if_failed() {
  const std::lock_guard lock(mutex_);
  if (failure_) std::rethrow_exception(failure_);
}

void StandIn::serve(uint32_t index) {
  prctl(PR_SET_NAME, "efa_ep_stand_in");
  Channel& channel = channels_[index];
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return stop_ || channel.started > channel.finished; });
    if (stop_) return;
    lock.unlock();
    std::exception_ptr failure;
    try {
      run_round(index);
    } catch (const Stopped&) {
      return;
    } catch (...) {  // whatever it is, the live rank's thread rethrows it
      failure = std::current_exception();
    }
    lock.lock();
    ++channel.finished;
    if (failure && !failure_) failure_ = failure;
    changed_.notify_all();
    if (failure_) return;
  }
}

void StandIn::run_round(uint32_t channel) {
  device_.dispatch_send(channel, {});
  device_.dispatch_wait(channel);
  device_.dispatch_pack(channel, {});
  device_.combine_send(channel, {});
  device_.combine_recv(channel, nullptr);
}

bool StandIn::idle() const {
  for (const Channel& channel : channels_) {
    if (channel.finished < channel.started) return false;
  }
  return true;
}

}  // namespace efa_ep
