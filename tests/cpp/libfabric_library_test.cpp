// How libfabric is found. A process has one libfabric, so the order of the steps matters and they share one
// test.
#include "fabric/libfabric_library.h"

#include <gtest/gtest.h>
#include <rdma/fabric.h>

#include <cstdlib>
#include <string>

#include "errors.h"

namespace efa_ep {
namespace {

std::string failure(const std::string& path) {
  try {
    LibfabricLibrary::open(path);
  } catch (const FabricUnavailableError& error) {
    return error.what();
  }
  ADD_FAILURE() << path << " was accepted";
  return "";
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

TEST(LibfabricLibrary, FailsWithReasonsThenOpensThenStays) {
  const std::string missing = failure("/nonexistent/libfabric.so.1");
  EXPECT_TRUE(contains(missing, "/nonexistent/libfabric.so.1: cannot open shared object file")) << missing;
  EXPECT_TRUE(contains(missing, "EFA_EP_LIBFABRIC")) << missing;

  const std::string not_a_library = failure("/etc/passwd");
  EXPECT_TRUE(contains(not_a_library, "/etc/passwd: ")) << not_a_library;

  const std::string other_library = failure("libm.so.6");
  EXPECT_TRUE(contains(other_library, "libm.so.6: has no function fi_getinfo")) << other_library;

  const char* chosen = std::getenv("EFA_EP_LIBFABRIC");
  const LibfabricLibrary& library = LibfabricLibrary::open(chosen != nullptr ? chosen : "");
  EXPECT_TRUE(contains(library.path(), "libfabric.so")) << library.path();
  EXPECT_TRUE(
      library.version().starts_with(std::to_string(library.major()) + "." + std::to_string(library.minor())))
      << library.version();
  EXPECT_LE(library.api_version(), FI_VERSION(library.major(), library.minor()));
  EXPECT_STREQ(std::getenv("IPATH_NO_BACKTRACE"), "1");

  EXPECT_EQ(&LibfabricLibrary::open(""), &library);
  EXPECT_EQ(&LibfabricLibrary::open(library.path()), &library);
  const std::string second = failure("/nonexistent/libfabric.so.1");
  EXPECT_TRUE(contains(second, "already uses " + library.path())) << second;
}

}  // namespace
}  // namespace efa_ep
