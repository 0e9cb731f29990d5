// What moves weights between processes: sums over bytes as they are copied, and counters in shared memory.
#pragma once

#include <pybind11/pybind11.h>

namespace xrl {

void bind_weights(pybind11::module_& module);

}  // namespace xrl
