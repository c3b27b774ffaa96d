// libfabric, opened at run time. The code compiles against libfabric's headers and links nothing: a machine
// without libfabric can still import this package and gets an error text instead of a loader failure.
#pragma once

#include <cstdint>
#include <string>

namespace efa_ep {

/// The libfabric of this process. There is only one: after open() the seven functions that libfabric's
/// headers leave to the library (fi_getinfo, fi_freeinfo, fi_dupinfo, fi_fabric, fi_version, fi_strerror,
/// fi_tostr) may be called; all others are inline calls through tables of the objects that those return.
class LibfabricLibrary {
 public:
  /// Opens the library at `path`, or if that is empty the first of AWS's installation and the system's
  /// library. Thread-safe; later calls return the library that is open already. Throws FabricUnavailableError
  /// naming every path tried and why it failed, or if another library is open.
  static const LibfabricLibrary& open(const std::string& path);

  const std::string& path() const { return path_; }        ///< as the dynamic linker resolved it
  const std::string& version() const { return version_; }  ///< e.g. "2.5.1"
  uint32_t major() const { return major_; }
  uint32_t minor() const { return minor_; }

  /// The interface version to ask for: the newest that both this code and the library know (a library refuses
  /// versions above its own with -FI_ENOSYS).
  uint32_t api_version() const;

 private:
  explicit LibfabricLibrary(void* handle);
  static LibfabricLibrary* load(const std::string& path);

  void* handle_;
  std::string path_;
  std::string version_;
  uint32_t major_;
  uint32_t minor_;
};

}  // namespace efa_ep
