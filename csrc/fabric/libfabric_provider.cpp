#include "fabric/libfabric_provider.h"

#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_errno.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <new>
#include <set>
#include <string_view>
#include <system_error>
#include <tuple>

#include "errors.h"
#include "fabric/libfabric_compat.h"

namespace efa_ep {
namespace {

constexpr uint32_t kMaxNics = 64;

/// What to ask fi_getinfo for.
struct Candidate {
  std::string provider;
  std::string fabric;  // empty: any
  std::string note;
};

/// Providers that open without complaint and then break the contract of fabric.h (seen with libfabric 1.17
/// and 2.5.1), and how.
struct Unusable {
  std::string_view provider;
  const char* reason;
};
constexpr std::array<Unusable, 2> kUnusable = {{
    {"sockets", "it reports the immediate of a rank's own write to that rank, as if it had arrived there"},
    {"shm",
     "its writes to a process that has died stay pending for ever, or succeed; ranks of one host need no "
     "provider anyway, since they map each other's memory"},
}};

void refuse_unusable(const std::string& provider) {
  const auto found = std::ranges::find(kUnusable, provider, &Unusable::provider);
  if (found == kUnusable.end()) return;
  throw ConfigurationError("EFA_EP_PROVIDER is \"" + provider + "\", which cannot carry this protocol: " +
                           found->reason + ". Use auto, or tcp on machines without EFA.");
}

Candidate candidate_named(const std::string& name, const LibfabricLibrary& library) {
  if (name == "efa-direct") return {"efa", "efa-direct", ""};
  if (name == "efa") return {"efa", "efa", ""};
  const bool before_1_18 = library.major() == 1 && library.minor() < 18;
  if (name == "tcp" && before_1_18) {
    // "tcp" would give ofi_rxm over tcp here: another wire protocol, and slow to connect.
    return {"net", "", "\"tcp\" is named \"net\" in this libfabric"};
  }
  return {name, "", ""};
}

/// A copy of one entry of a list; of null, an empty one.
InfoPtr duplicate(const fi_info* info) {
  InfoPtr copy(fi_dupinfo(info));
  if (!copy) throw std::bad_alloc();
  return copy;
}

InfoPtr make_hints(const Candidate& candidate, uint64_t capabilities, uint64_t mode) {
  // EFA grants FI_HMEM only together with FI_MR_HMEM, which says that such memory will be registered as such.
  const int device_memory_mode = (capabilities & FI_HMEM) != 0 ? FI_MR_HMEM : 0;
  InfoPtr hints = duplicate(nullptr);
  hints->caps = capabilities;
  hints->mode = mode;
  hints->ep_attr->type = FI_EP_RDM;
  hints->domain_attr->mr_mode =
      FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY | device_memory_mode;
  hints->domain_attr->threading = FI_THREAD_DOMAIN;
  hints->domain_attr->data_progress = FI_PROGRESS_MANUAL;  // poll() makes it; no thread of the provider's
  hints->domain_attr->av_type = FI_AV_TABLE;
  hints->domain_attr->cq_data_size = sizeof(uint32_t);
  hints->fabric_attr->prov_name = strdup(candidate.provider.c_str());
  if (!candidate.fabric.empty()) hints->fabric_attr->name = strdup(candidate.fabric.c_str());
  return hints;
}

std::vector<InfoPtr> query(const LibfabricLibrary& library, const Candidate& candidate, uint64_t capabilities,
                           uint64_t mode, int& result) {
  const InfoPtr hints = make_hints(candidate, capabilities, mode);
  fi_info* list = nullptr;
  result = fi_getinfo(library.api_version(), nullptr, nullptr, 0, hints.get(), &list);
  const InfoPtr owner(result == 0 ? list : nullptr);
  std::vector<InfoPtr> found;
  for (const fi_info* info = owner.get(); info != nullptr; info = info->next) {
    // libfabric also offers its own layers over the provider asked for, and other fabrics of it: not the same
    // wire.
    if (candidate.provider != info->fabric_attr->prov_name) continue;
    if (!candidate.fabric.empty() && candidate.fabric != info->fabric_attr->name) continue;
    found.push_back(duplicate(info));
  }
  if (result == 0 && found.empty()) result = -FI_ENODATA;
  return found;
}

/// All interfaces on which the candidate works, with fences if they are asked for and granted; if there are
/// none, `tried` gets the reason.
std::vector<InfoPtr> find_interfaces(const LibfabricLibrary& library, const Candidate& candidate,
                                     const LibfabricOptions& options, std::string& tried) {
  const bool fence = options.fence;
  const uint64_t needed = FI_MSG | FI_RMA | (options.device_memory ? FI_HMEM : 0);
  // Offering FI_RX_CQ_DATA turns EFA's unsolicited write receive off, and every immediate would consume a
  // posted receive. So it is offered only to devices that cannot do without.
  int result = 0;
  std::vector<InfoPtr> found;
  if (fence) found = query(library, candidate, needed | FI_FENCE, FI_CONTEXT2, result);
  if (found.empty()) found = query(library, candidate, needed, FI_CONTEXT2, result);
  if (result == -FI_ENODATA) found = query(library, candidate, needed, FI_CONTEXT2 | FI_RX_CQ_DATA, result);
  if (found.empty()) {
    const std::string& name = candidate.fabric.empty() ? candidate.provider : candidate.fabric;
    tried += (tried.empty() ? "" : ", ") + name + (options.device_memory ? " for GPU memory: " : ": ") +
             libfabric_error(result);
  }
  return found;
}

std::set<std::string> known_providers(const LibfabricLibrary& library) {
  fi_info* list = nullptr;
  if (fi_getinfo(library.api_version(), nullptr, nullptr, FI_PROV_ATTR_ONLY, nullptr, &list) != 0) return {};
  const InfoPtr owner(list);
  std::set<std::string> names;
  for (const fi_info* info = list; info != nullptr; info = info->next)
    names.insert(info->fabric_attr->prov_name);
  return names;
}

std::string join(const auto& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

std::string describe(const LibfabricLibrary& library) {
  return "libfabric " + library.version() + " (" + library.path() + ")";
}

/// Hosts number GPUs in PCI order, so NICs in PCI order go to the ranks that are near them.
auto pci_order(const InfoPtr& info) {
  fi_pci_attr pci{};
  if (info->nic != nullptr && info->nic->bus_attr != nullptr && info->nic->bus_attr->bus_type == FI_BUS_PCI) {
    pci = info->nic->bus_attr->attr.pci;
  }
  return std::tuple(pci.domain_id, pci.bus_id, pci.device_id, pci.function_id,
                    std::string(info->domain_attr->name));
}

std::vector<InfoPtr> choose_efa_nics(std::vector<InfoPtr> found, const LibfabricOptions& options,
                                     std::string& note) {
  std::ranges::sort(found, {}, pci_order);
  const auto repeated = std::ranges::unique(found, {}, pci_order);
  found.erase(repeated.begin(), repeated.end());
  std::vector<std::string> domains;
  for (const InfoPtr& info : found) domains.emplace_back(info->domain_attr->name);
  std::vector<size_t> indices = near_nics(domains, options);
  if (indices.empty()) {
    if (!options.rdma_devices.empty())
      note = "none of the NICs near this rank's GPU (" + join(options.rdma_devices) + ") is usable here";
    indices = share_of_nics(found.size(), options);
  }
  std::vector<InfoPtr> chosen;
  for (const size_t index : indices) chosen.push_back(duplicate(found[index].get()));
  return chosen;
}

std::vector<InfoPtr> choose_interface(const std::vector<InfoPtr>& found, const LibfabricOptions& options) {
  const auto wanted = std::ranges::find_if(found, [&](const InfoPtr& info) {
    return options.interface.empty() || options.interface == info->domain_attr->name;
  });
  if (wanted == found.end()) {
    std::set<std::string> names;
    for (const InfoPtr& info : found) names.insert(info->domain_attr->name);
    throw ConfigurationError("EFA_EP_INTERFACE is \"" + options.interface + "\", but provider " +
                             found.front()->fabric_attr->prov_name + " has only " + join(names) + ".");
  }
  std::vector<InfoPtr> chosen;
  for (uint32_t i = 0; i < std::max(options.nics, 1U); ++i) chosen.push_back(duplicate(wanted->get()));
  return chosen;
}

ProviderChoice choose_nics(const Candidate& candidate, std::vector<InfoPtr> found,
                           const LibfabricOptions& options) {
  ProviderChoice choice;
  choice.provider = candidate.provider;
  choice.fabric = found.front()->fabric_attr->name;
  choice.fabric_matters = !candidate.fabric.empty();
  choice.note = candidate.note;
  choice.nics = candidate.provider == "efa" ? choose_efa_nics(std::move(found), options, choice.note)
                                            : choose_interface(found, options);
  return choice;
}

ProviderChoice choose_automatically(const LibfabricLibrary& library, const LibfabricOptions& options) {
  std::string tried;
  for (const char* name : {"efa-direct", "efa"}) {
    const Candidate candidate = candidate_named(name, library);
    auto found = find_interfaces(library, candidate, options, tried);
    if (!found.empty()) return choose_nics(candidate, std::move(found), options);
  }
  const std::vector<std::string> devices = efa_devices(options.sysfs_class);
  if (!devices.empty()) {
    throw FabricUnavailableError(
        "this machine has EFA devices (" + join(devices) + "), but " + describe(library) +
        " cannot use them: " + tried +
        ". Check `fi_info -p efa`, access to /dev/infiniband/uverbs* and `ulimit -l unlimited`; set " +
        "EFA_EP_PROVIDER=tcp to accept TCP instead.");
  }
  const Candidate candidate = candidate_named("tcp", library);
  auto found = find_interfaces(library, candidate, options, tried);
  if (!found.empty()) return choose_nics(candidate, std::move(found), options);
  throw FabricUnavailableError(
      "no provider of " + describe(library) + " works on this machine: " + tried +
      ". Check the output of `fi_info` and the variables FI_PROVIDER and FI_PROVIDER_PATH.");
}

void check_options(const LibfabricOptions& options) {
  if (options.ranks_on_host == 0 || options.local_rank >= options.ranks_on_host) {
    throw ConfigurationError("local rank " + std::to_string(options.local_rank) + " of " +
                             std::to_string(options.ranks_on_host) + " ranks on this host does not exist");
  }
  if (options.nics > kMaxNics) {
    throw ConfigurationError("EFA_EP_NICS_PER_RANK is " + std::to_string(options.nics) + "; use at most " +
                             std::to_string(kMaxNics));
  }
}

}  // namespace

ProviderChoice choose_provider(const LibfabricLibrary& library, const LibfabricOptions& options) {
  check_options(options);
  if (options.provider == "auto") return choose_automatically(library, options);
  refuse_unusable(options.provider);
  const Candidate candidate = candidate_named(options.provider, library);
  std::string tried;
  auto found = find_interfaces(library, candidate, options, tried);
  if (!found.empty()) return choose_nics(candidate, std::move(found), options);
  const std::set<std::string> known = known_providers(library);
  if (!known.contains(candidate.provider.substr(0, candidate.provider.find(';')))) {
    throw ConfigurationError("EFA_EP_PROVIDER is \"" + options.provider + "\", but " + describe(library) +
                             " has only " + join(known) +
                             ". Use auto, efa-direct, efa, tcp or one of those.");
  }
  throw FabricUnavailableError("EFA_EP_PROVIDER is \"" + options.provider + "\", but " + describe(library) +
                               " finds no interface for it (" + tried +
                               "). Check `fi_info`, or use EFA_EP_PROVIDER=auto.");
}

std::vector<size_t> share_of_nics(size_t available, const LibfabricOptions& options) {
  const size_t wanted =
      options.nics > 0 ? options.nics : std::max<size_t>(1, available / options.ranks_on_host);
  if (wanted > available) {
    throw ConfigurationError("EFA_EP_NICS_PER_RANK is " + std::to_string(wanted) + ", but this host has " +
                             std::to_string(available) + " EFA NICs. Use 0 to divide them among the host's " +
                             std::to_string(options.ranks_on_host) + " ranks.");
  }
  const size_t first = options.local_rank * available / options.ranks_on_host;
  std::vector<size_t> share;
  for (size_t i = 0; i < wanted; ++i) share.push_back((first + i) % available);
  return share;
}

std::vector<size_t> near_nics(const std::vector<std::string>& domains, const LibfabricOptions& options) {
  std::vector<size_t> indices;
  for (size_t i = 0; i < domains.size(); ++i) {
    const std::string device = domains[i].substr(0, domains[i].rfind('-'));
    if (std::ranges::find(options.rdma_devices, device) != options.rdma_devices.end()) indices.push_back(i);
  }
  if (options.nics == 0 || indices.empty()) return indices;
  if (options.nics > indices.size()) {
    throw ConfigurationError("EFA_EP_NICS_PER_RANK is " + std::to_string(options.nics) + ", but only " +
                             std::to_string(indices.size()) +
                             " of this host's EFA NICs are near this rank's GPU (" +
                             join(options.rdma_devices) + "). Use 0 for all of those, or at most that many.");
  }
  indices.resize(options.nics);
  return indices;
}

std::vector<std::string> efa_devices(const std::filesystem::path& sysfs_class) {
  std::vector<std::string> names;
  for (const char* device_class : {"infiniband", "infiniband_verbs"}) {
    std::error_code ignored;  // a class that does not exist has no devices
    for (const auto& entry : std::filesystem::directory_iterator(sysfs_class / device_class, ignored)) {
      const auto driver = std::filesystem::read_symlink(entry.path() / "device" / "driver", ignored);
      if (driver.filename() == "efa") names.push_back(entry.path().filename());
    }
  }
  std::ranges::sort(names);
  return names;
}

std::string libfabric_error(int64_t result) {
  return std::string(fi_strerror(static_cast<int>(-result))) + " (" + std::to_string(result) + ")";
}

}  // namespace efa_ep
