// Checks of the bindings. Python has said everything by then (hdrops/ops/<family>.py); these guard memory against a
// direct call of torch.ops.hdrops. A failed check is a ValueError in Python.
#pragma once
#include <sstream>
#include <stdexcept>

namespace hdrops {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

}  // namespace hdrops

// HDROPS_CHECK(condition, "deform_conv2d: ", ...) throws with the text of the rest.
#define HDROPS_CHECK(condition, ...)               \
  do {                                             \
    if (!(condition)) ::hdrops::fail(__VA_ARGS__); \
  } while (false)
