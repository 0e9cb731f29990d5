// Tensors come to the bindings as addresses.
#pragma once

#include <cstdint>

namespace xrl {

using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace xrl
