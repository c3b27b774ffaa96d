#include "fabric/libfabric_library.h"

#include <dlfcn.h>
#include <link.h>
#include <rdma/fabric.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <vector>

#include "errors.h"

namespace {

// The functions behind the trampolines at the end of this file; filled once, before anybody can call them.
struct Functions {
  decltype(&::fi_getinfo) getinfo = nullptr;
  decltype(&::fi_freeinfo) freeinfo = nullptr;
  decltype(&::fi_dupinfo) dupinfo = nullptr;
  decltype(&::fi_fabric) fabric = nullptr;
  decltype(&::fi_version) version = nullptr;
  decltype(&::fi_strerror) strerror = nullptr;
  decltype(&::fi_tostr) tostr = nullptr;
} functions;

// 1.20 is the first version with FI_MR_DMABUF; from 1.18 on EFA's RDMA writes are done by every device.
constexpr uint32_t kWantedApiVersion = FI_VERSION(1, 20);

// fi_info and its attributes only ever grew at the end and this code uses only members of 1.17, whose binary
// interface is FABRIC_1.3; every later library still exports it.
template <typename Function>
bool resolve(void* handle, const char* name, const char* version, Function& function) {
  void* symbol = dlvsym(handle, name, version);
  if (symbol == nullptr) symbol = dlsym(handle, name);
  function = reinterpret_cast<Function>(symbol);
  return symbol != nullptr;
}

/// Fills `found`; returns the name of the first function that the library lacks, or null.
const char* resolve_all(void* handle, Functions& found) {
  if (!resolve(handle, "fi_getinfo", "FABRIC_1.3", found.getinfo)) return "fi_getinfo";
  if (!resolve(handle, "fi_freeinfo", "FABRIC_1.3", found.freeinfo)) return "fi_freeinfo";
  if (!resolve(handle, "fi_dupinfo", "FABRIC_1.3", found.dupinfo)) return "fi_dupinfo";
  if (!resolve(handle, "fi_fabric", "FABRIC_1.1", found.fabric)) return "fi_fabric";
  if (!resolve(handle, "fi_version", "FABRIC_1.0", found.version)) return "fi_version";
  if (!resolve(handle, "fi_strerror", "FABRIC_1.0", found.strerror)) return "fi_strerror";
  if (!resolve(handle, "fi_tostr", "FABRIC_1.0", found.tostr)) return "fi_tostr";
  return nullptr;
}

std::vector<std::string> candidates(const std::string& path) {
  if (!path.empty()) return {path};
  return {"/opt/amazon/efa/lib64/libfabric.so.1", "/opt/amazon/efa/lib/libfabric.so.1", "libfabric.so.1"};
}

}  // namespace

namespace efa_ep {

LibfabricLibrary::LibfabricLibrary(void* handle)
    : handle_(handle),
      version_(fi_tostr("", FI_TYPE_VERSION)),  // wants a pointer, and does not look behind it
      major_(FI_MAJOR(fi_version())),
      minor_(FI_MINOR(fi_version())) {
  link_map* map = nullptr;
  if (dlinfo(handle, RTLD_DI_LINKMAP, static_cast<void*>(&map)) == 0) path_ = map->l_name;
}

LibfabricLibrary* LibfabricLibrary::load(const std::string& path) {
  // Some builds pull in libinfinipath, whose constructor otherwise installs handlers for SIGTERM, SIGSEGV and
  // others; they break Python's faulthandler and can deadlock the process. Nothing else can be told to it.
  setenv("IPATH_NO_BACKTRACE", "1", /*overwrite=*/0);  // NOLINT(concurrency-mt-unsafe)
  std::string tried;
  for (const std::string& candidate : candidates(path)) {
    void* handle = dlopen(candidate.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
      // A thread's own in glibc and musl. NOLINTNEXTLINE(concurrency-mt-unsafe)
      tried += std::string(tried.empty() ? "" : "; ") + dlerror();
      continue;
    }
    Functions found;
    if (const char* missing = resolve_all(handle, found)) {
      tried += std::string(tried.empty() ? "" : "; ") + candidate + ": has no function " + missing;
      dlclose(handle);
      continue;
    }
    functions = found;
    return new LibfabricLibrary(handle);
  }
  throw FabricUnavailableError(
      "no usable libfabric: " + tried +
      ". Install the EFA installer or the libfabric package, or name the library in EFA_EP_LIBFABRIC.");
}

const LibfabricLibrary& LibfabricLibrary::open(const std::string& path) {
  static std::mutex mutex;
  static const LibfabricLibrary* opened = nullptr;  // never closed: providers keep threads and exit handlers
  const std::lock_guard lock(mutex);
  if (opened == nullptr) {
    opened = load(path);
  } else if (!path.empty()) {
    void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
    if (handle != nullptr) dlclose(handle);
    if (handle != opened->handle_) {
      throw FabricUnavailableError("cannot open libfabric " + path + ": this process already uses " +
                                   opened->path_ +
                                   ". Set EFA_EP_LIBFABRIC to one library for the whole process.");
    }
  }
  return *opened;
}

uint32_t LibfabricLibrary::api_version() const {
  return std::min<uint32_t>(FI_VERSION(major_, minor_), kWantedApiVersion);
}

}  // namespace efa_ep

// Trampolines: what the headers declare and the library would define. Hidden, so that nobody else binds to
// them.
#define EFA_EP_TRAMPOLINE extern "C" __attribute__((visibility("hidden")))

EFA_EP_TRAMPOLINE int fi_getinfo(uint32_t version, const char* node, const char* service, uint64_t flags,
                                 const fi_info* hints, fi_info** info) {
  return functions.getinfo(version, node, service, flags, hints, info);
}
EFA_EP_TRAMPOLINE void fi_freeinfo(fi_info* info) { functions.freeinfo(info); }
EFA_EP_TRAMPOLINE fi_info* fi_dupinfo(const fi_info* info) { return functions.dupinfo(info); }
EFA_EP_TRAMPOLINE int fi_fabric(fi_fabric_attr* attr, fid_fabric** fabric, void* context) {
  return functions.fabric(attr, fabric, context);
}
EFA_EP_TRAMPOLINE uint32_t fi_version() { return functions.version(); }
EFA_EP_TRAMPOLINE const char* fi_strerror(int error) { return functions.strerror(error); }
EFA_EP_TRAMPOLINE char* fi_tostr(const void* data, fi_type type) { return functions.tostr(data, type); }
