// Every number has its public source beside it, or says that there is none.
//
//   NICs, line rate      AWS's instance tables: EFA devices and Gb/s per instance, divided by its 8 GPUs
//   MTU                  8,760 bytes on a p5 NIC (abcdabcd987/libfabric-efa-demo, data/fi_info.yaml); the
//                        other types are taken to be alike
//   queues               4,096 send work requests, 12,288 completions: libfabric's defaults for efa-direct
//                        (ofiwg/libfabric pull request 11337)
//   longest write        about 1 GB (libfabric, docs/efa_fabric_comparison.md)
//   latency              no vendor number. Half of the round trip of 15 to 25 us that arXiv 2512.19849
//                        reports for EFA (p5en, p6); half of 36.7 us for a 4 KB write between two p5
//                        (nixlbench, dmvevents/awsome-inference-1)
//   jitter, timeouts,    no public number: assumptions. The jitter is a quarter of the latency, so that
//   interleaving         neighbouring writes overtake each other
#include "fabric/emulated_profiles.h"

#include <array>

#include "errors.h"

namespace efa_ep {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;
using std::chrono::nanoseconds;
using std::chrono::seconds;

EmulatedProfile efa(const char* name) {
  EmulatedProfile profile;
  profile.name = name;
  profile.mtu = 8760;
  profile.interleaved_writes = 8;
  profile.send_queue_depth = 4096;
  profile.completion_queue_depth = 12288;
  profile.max_write_bytes = uint64_t{1} << 30;
  profile.latency = microseconds(10);
  profile.jitter = nanoseconds(2500);
  profile.retransmit_timeout = milliseconds(1);
  profile.unreachable_after = seconds(1);
  return profile;
}

EmulatedProfile p5() {
  EmulatedProfile profile = efa("p5");
  profile.nics = 4;                           // 32 of 100 Gb/s
  profile.bytes_per_second = 12'125'000'000;  // 97 Gb/s of one NIC (crazyguitar/Libefaxx)
  profile.latency = nanoseconds(18'350);
  profile.jitter = nanoseconds(4'600);
  profile.work_request_interval = nanoseconds(1'250);  // 0.80 M/s (libfabric-efa-demo, data/fi_rma_bw.txt)
  return profile;
}

EmulatedProfile p5en() {
  EmulatedProfile profile = efa("p5en");
  profile.nics = 2;                                  // 16 of 200 Gb/s
  profile.bytes_per_second = 23'625'000'000;         // 378 Gb/s of two NICs (arXiv 2510.27656, 32 MB writes)
  profile.work_request_interval = nanoseconds(948);  // 2.11 M/s of two NICs (the same, table 2)
  return profile;
}

EmulatedProfile p6_b200() {
  EmulatedProfile profile = efa("p6-b200");
  profile.nics = 1;                                  // 8 of 400 Gb/s
  profile.bytes_per_second = 37'750'000'000;         // 302 GB/s of a node (Mooncake Transfer Engine, 1 MB)
  profile.work_request_interval = nanoseconds(474);  // no public number: a rank's rate on p5en
  return profile;
}

EmulatedProfile p6_b300() {
  EmulatedProfile profile = efa("p6-b300");
  profile.nics = 2;                                  // 16 of 400 Gb/s
  profile.bytes_per_second = 48'750'000'000;         // 780 GB/s of a node (Mooncake Transfer Engine, 1 MB)
  profile.work_request_interval = nanoseconds(948);  // no public number: a rank's rate on p5en
  return profile;
}

// Everything that a fabric may do, often: pieces of a few rows, any order, losses, no room anywhere.
EmulatedProfile hostile() {
  EmulatedProfile profile;
  profile.name = "hostile";
  profile.nics = 3;
  profile.bytes_per_second = 1'000'000'000;
  profile.latency = microseconds(1);
  profile.jitter = microseconds(200);
  profile.work_request_interval = nanoseconds(100);
  profile.mtu = 64;
  profile.interleaved_writes = 4;
  profile.send_queue_depth = 4;
  profile.completion_queue_depth = 4 + 4 * 128;  // enough for two channels with 129 nodes
  profile.max_write_bytes = uint64_t{1} << 24;
  profile.retransmit_timeout = microseconds(300);
  profile.lost_pieces_per_million = 20'000;
  profile.unreachable_after = milliseconds(5);
  return profile;
}

}  // namespace

std::span<const EmulatedProfile> emulated_profiles() {
  static const std::array<EmulatedProfile, 5> kProfiles = {p5(), p5en(), p6_b200(), p6_b300(), hostile()};
  return kProfiles;
}

const EmulatedProfile& emulated_profile(std::string_view name) {
  std::string names;
  for (const EmulatedProfile& profile : emulated_profiles()) {
    if (profile.name == name) return profile;
    names += (names.empty() ? "" : ", ") + profile.name;
  }
  throw ConfigurationError("there is no emulated network \"" + std::string(name) + "\"; choose one of " +
                           names);
}

void require_valid(const EmulatedProfile& profile) {
  const auto require = [&](bool valid, const std::string& what) {
    if (!valid) throw ConfigurationError("the emulated network \"" + profile.name + "\" " + what);
  };
  require(profile.nics > 0, "has no NIC; set nics to at least 1");
  require(profile.bytes_per_second > 0, "moves no bytes; set bytes_per_second");
  // A piece's number has 24 bits beside its 8-bit count of attempts, and its time has to fit 64 bits.
  require(profile.mtu > 0 && profile.mtu <= 1 << 20, "needs an mtu from 1 to 1 MiB");
  require(profile.max_write_bytes / profile.mtu < 1 << 24,
          "cuts its longest write into more than 2^24 pieces; raise mtu or lower max_write_bytes");
  require(profile.max_write_bytes <= UINT32_MAX, "has max_write_bytes of more than 32 bits");
  require(profile.interleaved_writes > 0, "sends no write; set interleaved_writes to at least 1");
  require(profile.send_queue_depth > 0, "has no send queue; set send_queue_depth to at least 1");
  require(profile.completion_queue_depth > 0, "has no completion queue; set completion_queue_depth");
  require(profile.lost_pieces_per_million < 1'000'000, "loses every piece; lower lost_pieces_per_million");
  for (const std::chrono::nanoseconds time : {profile.latency, profile.jitter, profile.work_request_interval,
                                              profile.retransmit_timeout, profile.unreachable_after}) {
    require(time >= time.zero() && time <= std::chrono::hours(1), "needs times from 0 to an hour");
  }
}

}  // namespace efa_ep
