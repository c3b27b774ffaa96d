// Errors of C++ become the classes of the same names in vllm_efa_ep.errors.
#include "errors.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <exception>

#include "bindings/common.h"

namespace nb = nanobind;

namespace efa_ep::bindings {

namespace {

nb::object python_error(const char* name) { return nb::module_::import_("vllm_efa_ep.errors").attr(name); }

void raise(const char* name, const std::exception& error) {
  PyErr_SetString(python_error(name).ptr(), error.what());
}

void raise(const nb::object& instance) {
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(instance.ptr())), instance.ptr());
}

// Most derived first.
void translate(const std::exception_ptr& pointer, void*) {
  try {
    std::rethrow_exception(pointer);
  } catch (const ConfigurationError& error) {
    raise("ConfigurationError", error);
  } catch (const FabricUnavailableError& error) {
    raise("FabricUnavailableError", error);
  } catch (const CudaError& error) {
    raise("CudaError", error);
  } catch (const TransportError& error) {
    raise(python_error("TransportError")(error.what(), error.peer));
  } catch (const RankTimeoutError& error) {
    raise(python_error("RankTimeoutError")(error.what(), error.half, error.round,
                                           nb::tuple(nb::cast(error.missing))));
  } catch (const ProtocolError& error) {
    raise("ProtocolError", error);
  }
}

}  // namespace

void register_errors() { nb::register_exception_translator(translate); }

}  // namespace efa_ep::bindings
