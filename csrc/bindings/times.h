// What ranks record about time, as Python sees it.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cstdint>
#include <vector>

#include "half_times.h"
#include "protocol/half.h"
#include "trace_buffer.h"

namespace efa_ep {

namespace nb = nanobind;

using Seconds = nb::typed<nb::dict, std::string, double>;
using Buckets = nb::typed<nb::dict, std::string, std::vector<uint64_t>>;

inline Buckets buckets_by_half(const std::array<DurationCounts, kHalves>& histograms) {
  nb::dict result;
  for (size_t half = 0; half < kHalves; ++half) {
    result[kHalfNames[half]] = std::vector<uint64_t>(histograms[half].begin(), histograms[half].end());
  }
  return result;
}

using Spans = nb::typed<nb::list, nb::typed<nb::dict, std::string, nb::any>>;

inline Spans spans_of(const std::vector<TraceSpan>& spans) {
  static constexpr std::array kKinds = {"half", "wait", "write", "arrival"};
  static constexpr std::array kOperationNames = {"dispatch", "combine"};
  nb::list result;
  for (const TraceSpan& span : spans) {
    const bool device = span.kind == TraceSpan::Kind::kHalf || span.kind == TraceSpan::Kind::kWait;
    nb::dict entry;
    entry["kind"] = kKinds[static_cast<size_t>(span.kind)];
    entry["what"] = device ? kHalfNames[span.what] : kOperationNames[span.what];
    entry["channel"] = span.channel;
    entry["round"] = span.round;
    entry["peer"] = span.peer == TraceSpan::kNoPeer ? nb::object(nb::none()) : nb::cast(span.peer);
    entry["chunk"] = span.chunk;
    entry["bytes"] = span.bytes;
    entry["begin_ns"] = span.begin_ns;
    entry["end_ns"] = span.end_ns;
    result.append(entry);
  }
  return result;
}

inline Seconds seconds_by_half(const std::array<uint64_t, kHalves>& nanoseconds) {
  nb::dict result;
  for (size_t half = 0; half < kHalves; ++half) {
    result[kHalfNames[half]] = static_cast<double>(nanoseconds[half]) * 1e-9;
  }
  return result;
}

inline std::vector<double> seconds_by_rank(const std::vector<uint64_t>& nanoseconds) {
  std::vector<double> seconds;
  for (const uint64_t ns : nanoseconds) seconds.push_back(static_cast<double>(ns) * 1e-9);
  return seconds;
}

inline std::vector<double> duration_bounds() {
  std::vector<double> seconds;
  for (size_t bucket = 0; bucket + 1 < kDurationBuckets; ++bucket) {
    seconds.push_back(static_cast<double>(duration_bound(bucket)) * 1e-9);
  }
  return seconds;
}

/// What every kind of device says of HalfTimes.
template <class Device>
void bind_times(nb::class_<Device>& device) {
  device.def("half_seconds", [](const Device& d) { return seconds_by_half(d.times().half_ns); })
      .def("wait_seconds", [](const Device& d) { return seconds_by_half(d.times().wait_ns); })
      .def("half_buckets", [](const Device& d) { return buckets_by_half(d.times().half_histogram); })
      .def("wait_buckets", [](const Device& d) { return buckets_by_half(d.times().wait_histogram); })
      .def("waited_for_seconds", [](const Device& d) { return seconds_by_rank(d.times().waited_for_ns); });
}

}  // namespace efa_ep
