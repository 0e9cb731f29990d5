// One function a topic: each adds its kernels to the module, every argument by its name.
#pragma once

#include <pybind11/pybind11.h>

namespace xrl {

void bind_heads(pybind11::module_& module);
void bind_decode(pybind11::module_& module);
void bind_layers(pybind11::module_& module);
void bind_matmul(pybind11::module_& module);
void bind_weights(pybind11::module_& module);
void bind_cuda(pybind11::module_& module);

}  // namespace xrl
