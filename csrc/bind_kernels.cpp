// dispatch.h for Python: instruction sets to choose from, and products by themselves for tests and
// benchmarks.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "dispatch.h"
#include "kernels/attention_tiles.h"
#include "kernels/decode.h"
#include "kernels/latent_kernels.h"
#include "kernels/pair_kernels.h"
#include "kernels/quant_product.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using RowsIn = nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>;
using RowsOut = nb::ndarray<float, nb::ndim<2>, nb::device::cpu>;

void expect(bool right, const std::string& what) {
  if (!right) throw nb::value_error(what.c_str());
}

// Uninitialised bytes at a cache line.
struct Lines {
  explicit Lines(int64_t bytes)
      : data(static_cast<uint8_t*>(::operator new(static_cast<size_t>(bytes), std::align_val_t{64}))) {}
  ~Lines() { ::operator delete(data, std::align_val_t{64}); }
  Lines(const Lines&) = delete;
  uint8_t* data;
};

const char* rounding_name(kvfold::Rounding rounding) {
  return rounding == kvfold::Rounding::kInt8   ? "int8"
         : rounding == kvfold::Rounding::kBf16 ? "bf16"
                                               : "float32";
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// A team and its memory, so that a benchmark times nothing else.
class Kernels {
 public:
  explicit Kernels(int threads) : team_((expect(threads > 0, "threads: expected at least 1."), threads)) {}

  // Returns the seconds of the product alone.
  double linear(int type_id, const Bytes& raw, const RowsIn& x, const RowsOut& out) {
    const kvfold::MatrixKernels* kernels = kvfold::isa().find(type_id);
    expect(kernels != nullptr, "linear: type number " + std::to_string(type_id) + " has no kernels.");
    const auto n = static_cast<int64_t>(raw.shape(0)), k = static_cast<int64_t>(x.shape(1)),
               rows = static_cast<int64_t>(x.shape(0));
    const kvfold::TypeLayout& type = *kvfold::find_layout(type_id);
    expect(k % type.block_elements == 0 && static_cast<int64_t>(raw.shape(1)) == type.row_bytes(k),
           "linear: raw has rows of " + std::to_string(raw.shape(1)) + " bytes, which are not " +
               std::to_string(k) + " weights.");
    expect(n % kernels->row_group == 0, "linear: raw has " + std::to_string(n) +
                                            " rows, expected whole groups of " +
                                            std::to_string(kernels->row_group) + ".");
    expect(static_cast<int64_t>(out.shape(0)) == rows && static_cast<int64_t>(out.shape(1)) == n,
           "linear: out has another shape than (" + std::to_string(rows) + ", " + std::to_string(n) + ").");
    expect((k == 1 || x.stride(1) == 1) && (n == 1 || out.stride(1) == 1),
           "linear: rows must be contiguous.");
    const int64_t own = kvfold::product_own_bytes(*kernels, k);
    const int64_t shared = kvfold::product_shared_bytes(*kernels, rows, k, kvfold::ProductForm::kBySize);
    if (bytes_ < shared + own * team_.size()) {
      memory_ = std::make_unique<Lines>(shared + own * team_.size());
      bytes_ = shared + own * team_.size();
    }
    const nb::gil_scoped_release released;
    const auto start = std::chrono::steady_clock::now();
    kvfold::product(team_, {kernels, raw.data(), static_cast<int64_t>(raw.shape(1)), n, k}, x.data(),
                    x.stride(0), rows, out.data(), out.stride(0),
                    {memory_->data, memory_->data + shared, own}, kvfold::ProductForm::kBySize);
    return seconds_since(start);
  }

 private:
  kvfold::ThreadTeam team_;
  std::unique_ptr<Lines> memory_;
  int64_t bytes_ = 0;
};

}  // namespace

void bind_kernels(nb::module_& m) {
  m.def(
      "isa_names",
      [] {
        std::vector<std::string> names;
        for (const kvfold::InstructionSet* set : kvfold::instruction_sets()) names.emplace_back(set->name);
        return names;
      },
      "The instruction sets this processor can run, the fastest first.");
  m.def("isa", [] { return std::string(kvfold::isa().name); }, "The instruction set in use.");
  m.def(
      "force_isa",
      [](const std::string& name) {
        expect(kvfold::force_isa(name.c_str()), "isa: this processor has no " + name + ".");
      },
      "name"_a, "Use this one of isa_names() from now on, or \"auto\".");
  m.def(
      "kernel_types",
      [] {
        nb::dict types;
        const kvfold::InstructionSet& set = kvfold::isa();
        for (int32_t i = 0; i < set.num_kernels; i++) {
          types[nb::int_(set.kernels[i].type)] = rounding_name(set.kernels[i].rounding);
        }
        return types;
      },
      "{number: \"int8\", \"bf16\" or \"float32\"}: the types with kernels and how they round activations.");
  m.def(
      "attention_numbers", [] { return std::string(kvfold::isa().pairs->numbers); },
      "\"int16\" or \"bf16\": what ordinary attention multiplies where products round.");
  m.def(
      "side_by_side_types",
      [](const std::string& name) {
        nb::set types;
        const kvfold::InstructionSet* set = kvfold::find_set(name.c_str());
        for (int32_t i = 0; set != nullptr && i < set->num_side_by_side; i++) {
          types.add(nb::int_(set->side_by_side[i].type));
        }
        return types;
      },
      "isa"_a, "Numbers of the types in memory (quant/types.py) that a set, or \"auto\", has kernels for.");
  m.def("absorbed_run_keys", &kvfold::absorbed_run_keys, "num_keys"_a,
        "Keys of each run that absorbed attention cuts a row's keys into.");
  m.attr("HEAD_LANES") = kvfold::kHeadLanes;
  nb::class_<Kernels>(m, "Kernels")
      .def(nb::init<int>(), "threads"_a)
      .def("linear", &Kernels::linear, "type_id"_a, "raw"_a.noconvert(), "x"_a.noconvert(),
           "out"_a.noconvert(),
           "x [M, K] times the transpose of raw uint8 [N, row_bytes] to out [M, N], both float32 with any "
           "row stride.");
}
