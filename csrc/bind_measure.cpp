// kernels/ceilings.h for Python: a Meter reads arrays and multiplies on a team of threads, the GIL released,
// and tells how long it took.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <string>
#include <utility>
#include <vector>

#include "kernels/ceilings.h"
#include "thread_team.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::c_contig, nb::device::cpu>;
using Indices = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Clock = std::chrono::steady_clock;

// What a member of the team reads at once: large enough that the prefetcher runs most of the time and a draw
// from the team's counter costs nothing, small enough that no member waits long for the last one.
constexpr int64_t kPieceBytes = 1 << 20;
constexpr int64_t kUnitRounds = 2000;  // about 10 us at 2 instructions a cycle

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

int checked_threads(int threads) {
  if (threads < 1 || threads > 1024) {
    const std::string what = "Meter: threads is " + std::to_string(threads) + ", expected 1 to 1024.";
    throw nb::value_error(what.c_str());
  }
  return threads;
}

class Meter {
 public:
  Meter(std::vector<Bytes> arrays, int threads)
      : arrays_(std::move(arrays)), team_(checked_threads(threads)) {}

  // Seconds to read the arrays of these indices once, in pieces that the members take in order.
  double read(const Indices& indices) {
    pieces_.clear();
    for (size_t i = 0; i < indices.shape(0); i++) {
      const int32_t index = indices.data()[i];
      if (index < 0 || static_cast<size_t>(index) >= arrays_.size()) {
        const std::string what = "Meter.read: index " + std::to_string(index) + ", expected 0 to " +
                                 std::to_string(arrays_.size()) + " (exclusive).";
        throw nb::value_error(what.c_str());
      }
      const auto& array = arrays_[static_cast<size_t>(index)];
      const auto size = static_cast<int64_t>(array.nbytes());
      for (int64_t at = 0; at < size; at += kPieceBytes)
        pieces_.emplace_back(array.data() + at, std::min(kPieceBytes, size - at));
    }
    const nb::gil_scoped_release released;
    const auto start = Clock::now();
    team_.for_each(static_cast<int64_t>(pieces_.size()), [this](int64_t piece, int) {
      const auto& [data, size] = pieces_[static_cast<size_t>(piece)];
      sum_.fetch_add(kvfold::read_all(data, size), std::memory_order_relaxed);
    });
    return seconds_since(start);
  }

  uint64_t checksum() const { return sum_.load(); }

  // (instruction set, multiply-adds a second) over about `seconds`; 0 where the machine has no instruction.
  std::pair<std::string, double> multiply_adds(const std::string& kind, double seconds) {
    const kvfold::Peak peak = named(kind);
    if (peak.run == nullptr) return {"", 0.0};
    const nb::gil_scoped_release released;
    // The number of units follows the time the last ones took; the longest run counts, which starts awake.
    int64_t units = 8 * team_.size();
    for (;;) {
      const auto start = Clock::now();
      team_.for_each(units, [&peak](int64_t, int) { peak.run(kUnitRounds); });
      const double took = seconds_since(start);
      const double rate = static_cast<double>(units * kUnitRounds * peak.round_madds) / took;
      if (took >= seconds / 2) return {peak.isa, rate};
      units = std::max(2 * units, static_cast<int64_t>(static_cast<double>(units) * seconds / took));
    }
  }

 private:
  static kvfold::Peak named(const std::string& kind) {
    if (kind == "int8") return kvfold::int8_peak();
    if (kind == "int8_tiles") return kvfold::int8_tiles_peak();
    if (kind == "bf16") return kvfold::bf16_peak();
    if (kind == "f32") return kvfold::f32_peak();
    const std::string what =
        "Meter.multiply_adds: kind is '" + kind + "', expected int8, int8_tiles, bf16 or f32.";
    throw nb::value_error(what.c_str());
  }

  std::vector<Bytes> arrays_;
  std::vector<std::pair<const uint8_t*, int64_t>> pieces_;
  std::atomic<uint64_t> sum_{0};
  kvfold::ThreadTeam team_;
};

}  // namespace

void bind_measure(nb::module_& m) {
  nb::class_<Meter>(m, "Meter",
                    "The ceilings of this machine, measured by a team of threads over given arrays.")
      .def(nb::init<std::vector<Bytes>, int>(), "arrays"_a, "threads"_a)
      .def("read", &Meter::read, "indices"_a.noconvert(),
           "Seconds to read the arrays of these indices once, with the widest loads.")
      .def_prop_ro("checksum", &Meter::checksum,
                   "The sum, modulo 2^64, of all 64-bit words read so far: shows that they were read.")
      .def(
          "multiply_adds", &Meter::multiply_adds, "kind"_a, "seconds"_a,
          "(instruction set, multiply-adds a second) of 'int8', 'bf16' or 'f32' operands held in registers, "
          "or of 'int8_tiles', over about `seconds`; ('', 0.0) where the machine has no instruction for it.");
}
