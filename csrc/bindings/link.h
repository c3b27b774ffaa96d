#pragma once

#include <nanobind/nanobind.h>

namespace efa_ep {

/// Adds measure_link() to the module.
void bind_link(nanobind::module_& m);

}  // namespace efa_ep
