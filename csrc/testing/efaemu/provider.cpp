// efaemu, an external libfabric provider for tests: EFA's rules (fabric efa-direct) on top of a TCP provider.
//
// It refuses what EFA refuses, insists on what EFA insists on, delivers writes in seeded random order, bounds
// the queue, and answers misuse that EFA would ignore or corrupt silently with -FI_EINVAL. The carrier is
// tcp, which libfabric 1.17 calls net. Environment, read when libfabric asks for interfaces, opens an
// endpoint or registers memory:
//
//   EFAEMU_DEPTH=64       writes in flight per endpoint; -FI_EAGAIN beyond
//   EFAEMU_DELAY_US=20    how long a write waits before it may leave, plus
//   EFAEMU_JITTER_US=100  a uniformly random time below this
//   EFAEMU_SEED=1         seed of times and order
//   EFAEMU_UNSOLICITED=1  0: a device on which each arriving immediate consumes a posted receive
//   EFAEMU_PEER_MEMORY=0  1: "GPU memory" can be registered by address, as with a peer-memory module
//   EFAEMU_CORE           the carrier's name
//
// "GPU memory" is a memfd that the application has mapped, and a descriptor of it is its dma-buf
// (gpu_memory.h).
//
// Like EFA with FI_THREAD_DOMAIN, the objects of one domain must be used by one thread at a time. Unlike
// efa-direct, writes leave only while the application reads the completion queue.
#include <rdma/fi_errno.h>
#include <rdma/providers/fi_prov.h>

#include <cstdlib>
#include <random>
#include <unordered_map>

#include "testing/efaemu/endpoint.h"
#include "testing/efaemu/gpu_memory.h"
#include "testing/efaemu/interposition.h"

namespace efaemu {
namespace {

constexpr const char* kProviderName = "efaemu";
constexpr const char* kFabricName = "efaemu-direct";
constexpr int kRegistrationMode = FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY;

const char* carrier_name() {
  if (const char* name = std::getenv("EFAEMU_CORE")) return name;
  return fi_version() < FI_VERSION(1, 18) ? "net" : "tcp";
}

void replace(char*& text, const char* value) {
  std::free(text);
  text = value != nullptr ? strdup(value) : nullptr;
}

struct Domain : Interposed {
  Domain(fid_domain& domain, bool gpu_memory)
      : Interposed(*domain.fid.ops),
        gpu_memory(gpu_memory),
        carrier_domain(domain.ops),
        carrier_mr(domain.mr),
        ops(copy_of(*domain.ops)),
        mr(copy_of(*domain.mr)) {}

  const bool gpu_memory;  // the application asked for FI_HMEM
  const fi_ops_domain* carrier_domain;
  const fi_ops_mr* carrier_mr;
  fi_ops_domain ops;
  fi_ops_mr mr;
  // Keys of 32 bits as on EFA, and others in every domain: a key used with the wrong peer must not work by
  // luck.
  uint32_t next_key = std::random_device{}();
  std::unordered_map<const void*, iovec> registered;  // by descriptor
};

struct Region : Interposed {
  Region(fid_mr& region, Domain& domain) : Interposed(*region.fid.ops), domain(domain) {}
  Domain& domain;
};

struct Fabric : Interposed {
  explicit Fabric(fid_fabric& fabric)
      : Interposed(*fabric.fid.ops), carrier_fabric(fabric.ops), ops(copy_of(*fabric.ops)) {}
  const fi_ops_fabric* carrier_fabric;
  fi_ops_fabric ops;
};

int close_region(fid* region) {
  Domain& domain = state_of<Region>(*region).domain;
  const void* descriptor = fi_mr_desc(reinterpret_cast<fid_mr*>(region));
  const int result = close<Region>(region);
  if (result == 0) domain.registered.erase(descriptor);
  return result;
}

int register_memory(fid* domain, const fi_mr_attr* attributes, uint64_t flags, fid_mr** region) {
  Domain& state = state_of<Domain>(*domain);
  // The carrier reads as many fields as its own fi_mr_attr has; the caller's may be longer than these
  // headers' too.
  struct {
    fi_mr_attr attr;
    char newer_fields[64];
  } chosen{*attributes, {}};
  iovec range{};
  if (attributes->iface == FI_HMEM_SYSTEM) {
    range = attributes->mr_iov[0];
  } else {
    if (!state.gpu_memory || attributes->iface != FI_HMEM_CUDA) return -FI_EINVAL;
    if (const int result = find_gpu_memory(*attributes, flags, range)) return result;
    // To the carrier it is memory like any other.
    chosen.attr.iface = FI_HMEM_SYSTEM;
    chosen.attr.mr_iov = &range;
    flags = 0;
  }
  chosen.attr.requested_key = state.next_key++;
  if (const int result = state.carrier_mr->regattr(domain, &chosen.attr, flags, region)) return result;
  state.registered[fi_mr_desc(*region)] = range;
  auto* interposed = new Region(**region, state);
  interposed->fi_ops::close = close_region;
  (*region)->fid.ops = interposed;
  return 0;
}

/// What the carrier must see of an fi_info that getinfo() below made.
fi_info* carrier_info(const fi_info& info) {
  fi_info* carrier = fi_dupinfo(&info);
  if (carrier == nullptr) return nullptr;
  replace(carrier->fabric_attr->prov_name, carrier_name());
  carrier->mode = carrier->rx_attr->mode = 0;
  for (uint64_t* caps : {&carrier->caps, &carrier->tx_attr->caps, &carrier->rx_attr->caps}) *caps &= ~FI_HMEM;
  carrier->tx_attr->size = carrier->tx_attr->inject_size = 0;
  // TCP's registrations can be addressed by virtual address if one asks; their keys are then ours to choose.
  carrier->domain_attr->mr_mode = FI_MR_VIRT_ADDR;
  return carrier;
}

int open_endpoint(fid_domain* domain, fi_info* info, fid_ep** endpoint, void* context) {
  Domain& state = state_of<Domain>(domain->fid);
  // The carrier makes its connections' endpoints through this same table.
  if (info->ep_attr->type != FI_EP_RDM)
    return state.carrier_domain->endpoint(domain, info, endpoint, context);
  fi_info* carrier = carrier_info(*info);
  if (carrier == nullptr) return -FI_ENOMEM;
  const int result = state.carrier_domain->endpoint(domain, carrier, endpoint, context);
  fi_freeinfo(carrier);
  if (result == 0) interpose(**endpoint, *domain, (info->mode & FI_RX_CQ_DATA) != 0);
  return result;
}

int open_queue(fid_domain* domain, fi_cq_attr* attributes, fid_cq** queue, void* context) {
  if (attributes->format != FI_CQ_FORMAT_DATA) return -FI_ENOSYS;
  const int result =
      state_of<Domain>(domain->fid).carrier_domain->cq_open(domain, attributes, queue, context);
  if (result == 0) interpose(**queue);
  return result;
}

int open_domain(fid_fabric* fabric, fi_info* info, fid_domain** domain, void* context) {
  fi_info* carrier = carrier_info(*info);
  if (carrier == nullptr) return -FI_ENOMEM;
  const int result = state_of<Fabric>(fabric->fid).carrier_fabric->domain(fabric, carrier, domain, context);
  fi_freeinfo(carrier);
  if (result != 0) return result;
  auto* state = new Domain(**domain, (info->caps & FI_HMEM) != 0);
  state->fi_ops::close = close<Domain>;
  (*domain)->fid.ops = state;
  state->ops.endpoint = open_endpoint;
  state->ops.cq_open = open_queue;
  (*domain)->ops = &state->ops;
  state->mr.reg = not_emulated;
  state->mr.regv = not_emulated;
  state->mr.regattr = register_memory;
  (*domain)->mr = &state->mr;
  return 0;
}

int open_fabric(fi_fabric_attr* attributes, fid_fabric** fabric, void* context) {
  fi_fabric_attr carrier = *attributes;
  carrier.prov_name = const_cast<char*>(carrier_name());
  carrier.prov_version = 0;
  if (const int result = fi_fabric(&carrier, fabric, context)) return result;
  auto* state = new Fabric(**fabric);
  state->fi_ops::close = close<Fabric>;
  (*fabric)->fid.ops = state;
  state->ops.domain = open_domain;
  (*fabric)->ops = &state->ops;
  return 0;
}

/// Whether efa-direct would answer these hints.
bool acceptable(const fi_info& hints) {
  if (hints.fabric_attr->name != nullptr && std::strcmp(hints.fabric_attr->name, kFabricName) != 0)
    return false;
  if (hints.caps & (FI_ATOMIC | FI_FENCE | FI_TAGGED | FI_RMA_EVENT)) return false;
  if (hints.tx_attr->msg_order != 0 || hints.rx_attr->msg_order != 0) return false;
  if (!(hints.mode & FI_CONTEXT2)) return false;
  if (!(hints.mode & FI_RX_CQ_DATA) && !unsolicited_writes()) return false;
  if ((hints.caps & FI_HMEM) && !(hints.domain_attr->mr_mode & FI_MR_HMEM)) return false;
  return (hints.domain_attr->mr_mode & kRegistrationMode) == kRegistrationMode &&
         hints.domain_attr->cq_data_size <= kCqDataBytes;
}

int getinfo(uint32_t version, const char* node, const char* service, uint64_t flags, const fi_info* hints,
            fi_info** list) {
  if (hints == nullptr || hints->fabric_attr->prov_name == nullptr ||
      std::strcmp(hints->fabric_attr->prov_name, kProviderName) != 0 || !acceptable(*hints)) {
    return -FI_ENODATA;
  }
  fi_info* carrier = carrier_info(*hints);
  if (carrier == nullptr) return -FI_ENOMEM;
  replace(carrier->fabric_attr->name, nullptr);
  carrier->domain_attr->mr_mode = 0;
  const int result = fi_getinfo(version, node, service, flags, carrier, list);
  fi_freeinfo(carrier);
  if (result != 0) return result;
  for (fi_info* info = *list; info != nullptr; info = info->next) {
    replace(info->fabric_attr->prov_name, nullptr);  // libfabric fills in the name of who answers
    replace(info->fabric_attr->name, kFabricName);
    // Asked for or not, FI_RX_CQ_DATA in the hints makes efa-direct consume receives.
    info->mode = FI_CONTEXT2 | (hints->mode & FI_RX_CQ_DATA);
    info->rx_attr->mode = hints->mode & FI_RX_CQ_DATA;
    info->tx_attr->msg_order = info->rx_attr->msg_order = 0;
    info->tx_attr->inject_size = kInjectBytes;
    info->tx_attr->size = info->rx_attr->size = send_queue_depth();
    info->tx_attr->iov_limit = info->tx_attr->rma_iov_limit = 1;
    info->caps |= hints->caps & FI_HMEM;
    info->domain_attr->mr_mode = kRegistrationMode | ((hints->caps & FI_HMEM) ? FI_MR_HMEM : 0);
    info->domain_attr->mr_key_size = sizeof(uint32_t);
    info->domain_attr->cq_data_size = kCqDataBytes;
    info->ep_attr->max_msg_size = kMaxMessageBytes;
  }
  return 0;
}

void cleanup() {}

}  // namespace

bool is_registered(fid_domain& domain, const void* descriptor, const void* base, size_t bytes) {
  const auto& registered = state_of<Domain>(domain.fid).registered;
  const auto region = registered.find(descriptor);
  if (region == registered.end()) return false;
  const auto first = reinterpret_cast<uintptr_t>(region->second.iov_base);
  const auto start = reinterpret_cast<uintptr_t>(base);
  return start >= first && bytes <= region->second.iov_len && start - first <= region->second.iov_len - bytes;
}

}  // namespace efaemu

extern "C" __attribute__((visibility("default"))) fi_provider* fi_prov_ini() {
  static fi_provider provider;
  provider.version = FI_VERSION(1, 0);
  provider.fi_version = fi_version();
  provider.name = efaemu::kProviderName;
  provider.getinfo = efaemu::getinfo;
  provider.fabric = efaemu::open_fabric;
  provider.cleanup = efaemu::cleanup;
  return &provider;
}
