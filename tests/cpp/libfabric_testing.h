// What the tests of LibfabricFabric have in common.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <functional>
#include <memory>
#include <string>

#include "fabric/libfabric_fabric.h"

namespace efa_ep::testing {

/// Options for `provider` on the loopback interface; EFA_EP_LIBFABRIC chooses the libfabric.
inline LibfabricOptions options_for(const std::string& provider, uint32_t nics = 1) {
  LibfabricOptions options;
  options.provider = provider;
  options.interface = "lo";
  options.nics = nics;
  options.peers = 8;
  if (const char* library = std::getenv("EFA_EP_LIBFABRIC")) options.library = library;
  return options;
}

inline std::unique_ptr<LibfabricFabric> make_fabric(const std::string& provider, uint32_t nics = 1) {
  return std::make_unique<LibfabricFabric>(options_for(provider, nics));
}

/// Sets an environment variable for as long as it lives.
class Environment {
 public:
  Environment(const char* name, const std::string& value) : name_(name) { setenv(name, value.c_str(), 1); }
  ~Environment() { unsetenv(name_); }

 private:
  const char* name_;
};

/// The message of the Expected that `action` must throw.
template <typename Expected>
std::string message_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Expected& error) {
    return error.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return "";
}

inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace efa_ep::testing
