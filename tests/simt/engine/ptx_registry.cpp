#include "engine/ptx_registry.h"

#include <map>
#include <memory>
#include <utility>

#include "engine/simt.h"

namespace simt::ptx {
namespace {

struct Entry {
  Kernel kernel;
  std::vector<Param> params;
  uint32_t max_threads;
};

std::map<HostKernel, Entry>& registry() {
  static std::map<HostKernel, Entry> entries;
  return entries;
}

}  // namespace

Registration::Registration(HostKernel host, const char* name, Kernel kernel, std::vector<Param> params,
                           uint32_t max_threads) {
  if (!registry().try_emplace(host, Entry{kernel, std::move(params), max_threads}).second) {
    die("kernel %s has two PTX versions", name);
  }
}

size_t registered() { return registry().size(); }

Body bind(HostKernel host, const char* name, ParamPack params, uint32_t threads) {
  const auto found = registry().find(host);
  if (found == registry().end()) die("kernel %s has no PTX version", name);
  const Entry& entry = found->second;
  if (threads > entry.max_threads) die("%s: %u threads, but at most %u", name, threads, entry.max_threads);
  bool same = entry.params.size() == params.layout().size();
  for (size_t i = 0; same && i < entry.params.size(); i++) {
    same = entry.params[i].offset == params.layout()[i].offset &&
           entry.params[i].bytes == params.layout()[i].bytes;
  }
  if (!same) die("the parameters of %s differ between host and PTX", name);
  const auto shared_params = std::make_shared<ParamPack>(std::move(params));
  return [kernel = entry.kernel, shared_params]() { kernel(shared_params->data()); };
}

}  // namespace simt::ptx
