// The Python module of the emulated kernels: what steers the emulator, and the entry points of every family that has
// registered some (arrays.h).
#include "arrays.h"
#include "execution.h"

namespace emulator {

std::vector<Registration>& registrations() {
  static std::vector<Registration> all;
  return all;
}

}  // namespace emulator

PYBIND11_MODULE(hdrops_emulated, module) {
  module.def("set_seed", &emulator::set_seed, "Starts the random order of blocks and threads.");
  module.def(
      "set_device",
      [](int compute_capability, int multiprocessors) { emulator::device() = {compute_capability, multiprocessors}; },
      py::arg("compute_capability") = emulator::Device().compute_capability,
      py::arg("multiprocessors") = emulator::Device().multiprocessors,
      "The device that host functions see: compute_capability is 10 * major + minor.");
  module.def(
      "set_schedule",
      [](const std::string& name) {
        if (name == "any") return emulator::set_schedule(emulator::Schedule::kAny);
        if (name == "mixed") return emulator::set_schedule(emulator::Schedule::kMixed);
        if (name == "ahead") return emulator::set_schedule(emulator::Schedule::kAhead);
        throw std::invalid_argument("no schedule " + name);
      },
      "mixed: threads of all warps in random order; ahead: a warp at a time, as far as it can; any: either.");
  for (emulator::Registration registration : emulator::registrations()) registration(module);
}
