#include "engine/ptx_registry.h"

#include <dlfcn.h>

#include <map>
#include <memory>
#include <string>

#include "engine/simt.h"

namespace simt::ptx {
namespace {

struct Entry {
  KernelFn fn;
  std::vector<Param> params;
};

std::map<std::string, Entry>& registry() {
  static std::map<std::string, Entry> entries;
  return entries;
}

}  // namespace

Registration::Registration(const char* mangled_name, KernelFn fn, std::vector<Param> params) {
  registry()[mangled_name] = Entry{fn, std::move(params)};
}

bool enabled() { return !registry().empty(); }

Body bind(void* host_function, const char* display_name, ParamPack params) {
  Dl_info info{};
  if (!dladdr(host_function, &info) || !info.dli_sname || info.dli_saddr != host_function) {
    die("no symbol name for kernel %s: give it external linkage and link with -rdynamic", display_name);
  }
  auto it = registry().find(info.dli_sname);
  if (it == registry().end()) die("kernel %s (%s) has no PTX version", display_name, info.dli_sname);
  const Entry& entry = it->second;
  bool same = entry.params.size() == params.layout().size();
  for (size_t i = 0; same && i < entry.params.size(); i++) {
    same = entry.params[i].offset == params.layout()[i].offset &&
           entry.params[i].bytes == params.layout()[i].bytes;
  }
  if (!same) die("parameter layout of %s differs between host and PTX", info.dli_sname);
  auto shared_params = std::make_shared<ParamPack>(std::move(params));
  return [fn = entry.fn, shared_params]() { fn(shared_params->data()); };
}

}  // namespace simt::ptx
