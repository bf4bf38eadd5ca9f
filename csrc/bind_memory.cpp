// file_guard.h and cpus.h for Python.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "cpus.h"
#include "file_guard.h"

namespace nb = nanobind;
using namespace nb::literals;

void bind_memory(nb::module_& m) {
  m.def(
      "guard_file",
      [](uintptr_t start, size_t size, const std::string& path) {
        return kvfold::guard_file(reinterpret_cast<const void*>(start), size, path);
      },
      "start"_a, "size"_a, "path"_a,
      "A SIGBUS in these addresses names the file and ends the process. False: the list is full.");
  m.def(
      "release_file", [](uintptr_t start) { kvfold::release_file(reinterpret_cast<const void*>(start)); },
      "start"_a, "The addresses from here on are not a guarded map any more.");
  m.def("usable_cpus", &kvfold::usable_cpus,
        "CPUs that this process may keep busy: of its affinity mask, and no more than the quota of its "
        "cgroups.");
}
