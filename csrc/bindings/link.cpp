#include <nanobind/stl/string.h>

#include "bindings/common.h"
#include "fabric/link_measurement.h"
#include "memory/arena.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace efa_ep::bindings {

void bind_link(nb::module_& m) {
  m.def("link_memory_bytes", &link_memory_bytes, "fabric"_a, "write_bytes"_a);
  m.def(
      "measure_link",
      [](Fabric& fabric, const Arena& arena, uint32_t peer, bool starts, uint32_t session,
         uint32_t round_trips, uint32_t stream_writes, uint32_t write_bytes,
         double timeout_s) -> nb::typed<nb::dict, std::string, double> {
        LinkTimes times;
        {
          const nb::gil_scoped_release unlock;
          times = measure_link(fabric, {arena.data(), arena.bytes()},
                               {.peer = peer,
                                .starts = starts,
                                .session = session,
                                .round_trips = round_trips,
                                .stream_writes = stream_writes,
                                .write_bytes = write_bytes,
                                .timeout = seconds(timeout_s)});
        }
        nb::dict result;
        result["latency_s"] = times.latency_s;
        result["bytes_per_second"] = times.bytes_per_second;
        return result;
      },
      nb::kw_only(), "fabric"_a, "arena"_a, "peer"_a, "starts"_a, "session"_a, "round_trips"_a,
      "stream_writes"_a, "write_bytes"_a, "timeout_s"_a,
      "Both ends call it; see csrc/fabric/link_measurement.h.");
}

}  // namespace efa_ep::bindings
