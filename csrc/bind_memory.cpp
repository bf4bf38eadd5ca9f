// file_guard.h, weight_reader.h and cpus.h for Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include "cpus.h"
#include "file_guard.h"
#include "kernels/decode.h"
#include "kernels/side_by_side.h"
#include "weight_reader.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

int64_t read_weights(int descriptor, int64_t start,
                     const nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>& to, int type_id,
                     int64_t row_bytes) {
  const auto size = static_cast<int64_t>(to.size());
  if (row_bytes != 0) {
    const kvfold::TypeLayout* type = kvfold::find_layout(type_id);
    if (type == nullptr || kvfold::find_layout(kvfold::side_by_side_id(type_id)) == nullptr ||
        row_bytes < 0 || row_bytes % type->block_bytes != 0 ||
        size % (kvfold::kRowsSideBySide * row_bytes) != 0) {
      const std::string what = "read_weights: " + std::to_string(size) + " bytes in rows of " +
                               std::to_string(row_bytes) + " of type number " + std::to_string(type_id) +
                               ", expected whole groups of " + std::to_string(kvfold::kRowsSideBySide) +
                               " rows of a type that has this layout.";
      throw nb::value_error(what.c_str());
    }
  }
  int64_t got;
  {
    const nb::gil_scoped_release released;
    got = kvfold::read_weights(descriptor, start, size, to.data(), type_id, row_bytes);
  }
  if (got < 0) {
    PyErr_SetFromErrno(PyExc_OSError);
    throw nb::python_error();
  }
  return got;
}

}  // namespace

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
  m.def("read_weights", &read_weights, "descriptor"_a, "start"_a, "to"_a.noconvert(), "type_id"_a = 0,
        "row_bytes"_a = 0,
        "Fills uint8 [n] from byte `start` of an open file and returns the bytes there were. row_bytes: of "
        "rows of a file's type, which are put side by side on their way. OSError where the system cannot "
        "read.");
  m.def("usable_cpus", &kvfold::usable_cpus,
        "CPUs that this process may keep busy: of its affinity mask, and no more than the quota of its "
        "cgroups.");
}
