// How efaemu gets between an application and its carrier: it replaces the operation tables on the carrier's
// own objects. The replaced `fid.ops` table is the first part of efaemu's state of the object, which finds it
// again.
#pragma once

#include <rdma/fabric.h>

#include <algorithm>
#include <cstring>

namespace efaemu {

/// A copy of a carrier's table. Tables of other libfabric releases are shorter or longer than the headers
/// say.
template <typename Table>
Table copy_of(const Table& carrier) {
  Table copy{};
  const size_t size = std::min(carrier.size, sizeof copy);
  std::memcpy(&copy, &carrier, size);
  copy.size = size;
  return copy;
}

/// An operation that EFA has and this emulation does not need.
template <typename Result, typename... Arguments>
Result not_emulated(Arguments...) {
  return -FI_ENOSYS;
}

/// Base of efaemu's state of one object.
struct Interposed : fi_ops {
  explicit Interposed(const fi_ops& carrier) : fi_ops(copy_of(carrier)), carrier(&carrier) {}
  const fi_ops* carrier;
};

template <typename State>
State& state_of(fid& object) {
  return *static_cast<State*>(object.ops);
}

/// `close` of an object with that state.
template <typename State>
int close(fid* object) {
  State* state = &state_of<State>(*object);
  if (const int result = state->carrier->close(object)) return result;
  delete state;
  return 0;
}

}  // namespace efaemu
