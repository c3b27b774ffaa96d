// What the files of the module share.
#pragma once

#include <nanobind/nanobind.h>

#include <chrono>
#include <cstdint>
#include <string>
#include <utility>

#include "proxy/wait.h"

namespace efa_ep::bindings {

using ReleaseLock = nanobind::call_guard<nanobind::gil_scoped_release>;

inline std::chrono::nanoseconds seconds(double value) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::duration<double>(value));
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Runs Python's signal handlers while a thread waits, so that Ctrl-C and SIGTERM end the wait at once. What
// it waited for goes along as a note of the handler's exception.
inline void check_signals(const Wait& wait) {
  if (PyErr_CheckSignals() == 0) return;
  nanobind::python_error error;
  nanobind::list notes;
  notes.append(wait.describe());
  error.value().attr("__notes__") = notes;
  error.restore();
  nanobind::raise_python_error();
}

// `check_wait(half, round, description)` raises to end a wait.
using CheckWait = nanobind::typed<nanobind::callable, void(std::string, uint32_t, std::string)>;

inline InterruptCheck interrupt_check(CheckWait check_wait) {
  return [check_wait = std::move(check_wait)](const Wait& wait) {
    const nanobind::gil_scoped_acquire lock;
    check_signals(wait);
    check_wait(wait.half, wait.round, wait.describe());
  };
}

/// Lets C++ raise the classes of vllm_efa_ep.errors.
void register_errors();

/// The measurement of a link between two ranks.
void bind_link(nanobind::module_& m);

/// What halves are given and return.
void bind_tensors(nanobind::module_& m);

/// Halves on a GPU, and what they need.
void bind_cuda(nanobind::module_& m);

}  // namespace efa_ep::bindings
