// Which libfabric provider and which network interfaces a rank uses.
#pragma once

#include <rdma/fabric.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "fabric/libfabric_library.h"

namespace efa_ep {

struct LibfabricOptions {
  /// "auto": efa-direct, efa, then tcp, but not tcp on a machine with EFA devices. Otherwise "efa-direct",
  /// "efa", "tcp", or any name that libfabric knows. "tcp" means libfabric's own reliable datagrams over TCP,
  /// which 1.17 and older call "net".
  std::string provider = "auto";
  std::string library;         ///< path of libfabric.so.1; empty: AWS's installation, then the system's
  std::string interface;       ///< e.g. "lo"; empty: the provider's first choice. Not used by EFA
  uint32_t nics = 0;           ///< NICs of this rank; 0: on EFA the host's NICs divided by its ranks, else 1
  uint32_t local_rank = 0;     ///< this rank's number on its host
  uint32_t ranks_on_host = 1;  ///< how many ranks share the host's NICs
  /// RDMA devices of this rank ("rdmap79s0"), instead of a share of the host's. Only for EFA; empty: a share.
  /// If the process may use none of them, it takes its share and says so in the description.
  std::vector<std::string> rdma_devices = {};
  bool fence = false;  ///< ask for FI_FENCE; whether it was granted is FabricDescription::honours_fence
  bool device_memory = false;  ///< memory of a GPU will be registered: ask for FI_HMEM
  uint32_t peers = 0;  ///< how many peers will be connected; sizes address vectors and completion queues

  /// Where the kernel lists devices; tests point it elsewhere.
  std::filesystem::path sysfs_class = "/sys/class";
};

struct InfoDeleter {
  void operator()(fi_info* info) const { fi_freeinfo(info); }
};
using InfoPtr = std::unique_ptr<fi_info, InfoDeleter>;

struct ProviderChoice {
  std::string provider;  ///< libfabric's name: "efa", "tcp", ...
  std::string fabric;    ///< libfabric's name: "efa-direct", "192.0.2.0/24", ...
  bool fabric_matters;   ///< the provider has several fabrics that cannot talk to each other
  std::string note;      ///< for people: why the provider is not the one asked for, or empty
  std::vector<InfoPtr> nics;
};

/// Chooses as `options` says. Throws ConfigurationError for options that can work nowhere (unknown provider
/// or interface, more NICs than there are) and FabricUnavailableError if the provider does not work on this
/// machine.
ProviderChoice choose_provider(const LibfabricLibrary& library, const LibfabricOptions& options);

/// Which of a host's `available` EFA NICs, in PCI order, are this rank's: neighbours, without overlap between
/// ranks as long as there are enough. Throws ConfigurationError if more are wanted than there are.
std::vector<size_t> share_of_nics(size_t available, const LibfabricOptions& options);

/// Which of the domains, by name, belong to options.rdma_devices, "rdmap79s0-rdm" to "rdmap79s0"; the first
/// options.nics of them, if that is not 0. Throws ConfigurationError if more are wanted than there are,
/// unless there are none.
std::vector<size_t> near_nics(const std::vector<std::string>& domains, const LibfabricOptions& options);

/// Names of the EFA devices that the kernel lists, usable or not.
std::vector<std::string> efa_devices(const std::filesystem::path& sysfs_class);

/// "Text of the error (-61)" for a negative libfabric result.
std::string libfabric_error(int64_t result);

}  // namespace efa_ep
