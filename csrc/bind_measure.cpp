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
#include <iterator>
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
      : arrays_(std::move(arrays)), team_(checked_threads(threads)) {
    choose_streams();
  }

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
      add_pieces(arrays_[static_cast<size_t>(index)]);
    }
    return read_pieces(0, pieces_.size());
  }

  int streams() const { return streams_; }
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
  void add_pieces(const Bytes& array) {
    const auto size = static_cast<int64_t>(array.nbytes());
    for (int64_t at = 0; at < size; at += kPieceBytes)
      pieces_.emplace_back(array.data() + at, std::min(kPieceBytes, size - at));
  }

  double read_pieces(size_t first, size_t count) {
    const nb::gil_scoped_release released;
    const kvfold::ReadLoop loop = kvfold::read_loop(streams_);
    const auto start = Clock::now();
    team_.for_each(static_cast<int64_t>(count), [&](int64_t piece, int) {
      const auto& [data, size] = pieces_[first + static_cast<size_t>(piece)];
      sum_.fetch_add(loop(data, size), std::memory_order_relaxed);
    });
    return seconds_since(start);
  }

  // The faster number of streams here, on up to 512 MiB of the arrays, no piece twice. In turns, since what a
  // machine reads changes from moment to moment.
  void choose_streams() {
    constexpr int kTurns[] = {4, 1, 1, 4, 4, 1, 1, 4};
    for (const Bytes& array : arrays_) add_pieces(array);
    const size_t count = std::min<size_t>(64, pieces_.size() / std::size(kTurns));
    double one = 0, four = 0;
    for (size_t turn = 0; turn < std::size(kTurns); turn++) {
      streams_ = kTurns[turn];
      (streams_ == 1 ? one : four) += read_pieces(turn * count, count);
    }
    streams_ = count > 0 && one < four ? 1 : 4;
    sum_ = 0;
  }

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
  int streams_ = 4;
  kvfold::ThreadTeam team_;
};

}  // namespace

void bind_measure(nb::module_& m) {
  nb::class_<Meter>(m, "Meter",
                    "The ceilings of this machine, measured by a team of threads over given arrays.")
      .def(nb::init<std::vector<Bytes>, int>(), "arrays"_a, "threads"_a)
      .def("read", &Meter::read, "indices"_a.noconvert(),
           "Seconds to read the arrays of these indices once, with the widest loads.")
      .def_prop_ro("streams", &Meter::streams,
                   "How many streams a thread reads at once: 1 or 4, whichever was faster on these arrays.")
      .def_prop_ro("checksum", &Meter::checksum,
                   "The sum, modulo 2^64, of all 64-bit words read so far: shows that they were read.")
      .def(
          "multiply_adds", &Meter::multiply_adds, "kind"_a, "seconds"_a,
          "(instruction set, multiply-adds a second) of 'int8', 'bf16' or 'f32' operands held in registers, "
          "or of 'int8_tiles', over about `seconds`; ('', 0.0) where the machine has no instruction for it.");
}
