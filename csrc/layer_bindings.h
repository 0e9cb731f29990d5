// Whole decoder layers: for decoding and for training.
#pragma once

#include <pybind11/pybind11.h>

namespace xrl {

void bind_layers(pybind11::module_& module);

}  // namespace xrl
