#pragma once

#include <pybind11/pybind11.h>

namespace xrl {

void bind_cuda(pybind11::module_& module);

}  // namespace xrl
