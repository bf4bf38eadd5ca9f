// The extension module kvfold._native: a list of what binds itself to it.
#include <nanobind/nanobind.h>

void bind_decode(nanobind::module_& m);
void bind_kernels(nanobind::module_& m);
void bind_measure(nanobind::module_& m);
void bind_memory(nanobind::module_& m);
void bind_program(nanobind::module_& m);

NB_MODULE(_native, m) {
  bind_decode(m);
  bind_kernels(m);
  bind_measure(m);
  bind_memory(m);
  bind_program(m);
}
