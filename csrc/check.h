// Checks at the border between Python and the kernels.
#pragma once

#include <stdexcept>
#include <string>

namespace xrl {

// Raises ValueError in Python.
inline void check(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

}  // namespace xrl
