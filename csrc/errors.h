// The errors this library throws, one class per thing a caller can do about them. The Python package
// mirrors them one to one (vllm_efa_ep/errors.py).
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace efa_ep {

/// Base of every error of this library.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// The caller asked for something that cannot work; nothing was sent. The text names value, limit, remedy.
class ConfigurationError : public Error {
 public:
  using Error::Error;
};

/// No usable libfabric, provider or network interface on this machine.
class FabricUnavailableError : public Error {
 public:
  using Error::Error;
};

/// The CUDA driver or runtime refused a call; the text has its reason.
class CudaError : public Error {
 public:
  using Error::Error;
};

/// The network reported a failed operation. `peer` is the rank at its other end, or -1 if unknown.
class TransportError : public Error {
 public:
  TransportError(const std::string& what, int64_t peer) : Error(what), peer(peer) {}
  int64_t peer;
};

/// "rank 3", "ranks 1, 2", "nobody"
inline std::string rank_names(const std::vector<uint32_t>& ranks) {
  if (ranks.empty()) return "nobody";
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (size_t i = 0; i < ranks.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(ranks[i]);
  return text;
}

/// Other ranks did not answer before the deadline.
class RankTimeoutError : public Error {
 public:
  RankTimeoutError(const std::string& what, std::string half, uint32_t round, std::vector<uint32_t> missing)
      : Error(what), half(std::move(half)), round(round), missing(std::move(missing)) {}
  std::string half;               ///< a half, "drain", or "link" (link_measurement.h)
  uint32_t round;                 ///< the round that could not finish; of a link its session, of a drain 0
  std::vector<uint32_t> missing;  ///< ranks whose data or signal this rank was waiting for
};

/// A peer sent something the protocol does not allow (a foreign or stale writer, or a bug).
class ProtocolError : public Error {
 public:
  using Error::Error;
};

}  // namespace efa_ep
