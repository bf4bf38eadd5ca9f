// program.h for Python: arrays checked and borrowed here, the GIL released while segments run.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpus.h"
#include "dispatch.h"
#include "program.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace kvfold;

namespace {

template <typename T, size_t ndim>
using Array = nb::ndarray<const T, nb::ndim<ndim>, nb::c_contig, nb::device::cpu>;
using OutputArray = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

[[noreturn]] void refuse(const std::string& text) { throw nb::value_error(text.c_str()); }

// An array of exactly this number type, never a converted copy.
template <typename Wanted>
Wanted array_of(nb::handle object, const std::string& what, const char* expected) {
  Wanted array;
  if (!nb::try_cast(object, array, false)) {
    refuse(what + ": " + nb::cast<std::string>(nb::str(object.type())) +
           ", expected a C-contiguous array of " + expected + " on the CPU.");
  }
  return array;
}

template <typename T>
std::vector<T> numbers(nb::handle object, const char* what, const char* expected) {
  const auto array = array_of<Array<T, 1>>(object, what, expected);
  return std::vector<T>(array.data(), array.data() + array.size());
}

std::vector<float> angles(nb::handle object, const char* what) {
  const auto array = array_of<Array<float, 2>>(object, what, "float32 [T, rope / 2]");
  return std::vector<float>(array.data(), array.data() + array.size());
}

template <typename A>
std::string shape_of(const A& array) {
  std::string text = "(";
  for (size_t i = 0; i < array.ndim(); i++) text += (i ? ", " : "") + std::to_string(array.shape(i));
  return text + ")";
}

constexpr std::pair<const char*, OpKind> kKinds[] = {
    {"embed", OpKind::kEmbed},
    {"norm", OpKind::kNorm},
    {"linear", OpKind::kLinear},
    {"rope", OpKind::kRope},
    {"append_latent", OpKind::kAppendLatent},
    {"fold_q", OpKind::kFoldQ},
    {"attend_latent", OpKind::kAttendLatent},
    {"unfold_v", OpKind::kUnfoldV},
    {"attend_expanded", OpKind::kAttendExpanded},
    {"append_full", OpKind::kAppendFull},
    {"attend_full", OpKind::kAttendFull},
    {"swiglu", OpKind::kSwiglu},
    {"add", OpKind::kAdd},
    {"route", OpKind::kRoute},
    {"experts", OpKind::kExperts},
    {"take_outputs", OpKind::kTakeOutputs},
};

OpKind kind_of(const std::string& kind) {
  for (const auto& [name, value] : kKinds) {
    if (kind == name) return value;
  }
  refuse("op kind " + kind + ": the native backend has no such op.");
}

// The fields of model/program.py's dataclasses, in their order.
using ValueTuple = std::tuple<int32_t, int64_t, int64_t>;
using BufferTuple = std::tuple<int64_t, int, int32_t, int32_t>;
using OpTuple = std::tuple<std::string, std::string, std::vector<ValueTuple>, std::vector<ValueTuple>,
                           std::vector<int32_t>, std::vector<int64_t>, std::vector<double>>;
using SegmentTuple = std::tuple<std::string, std::vector<OpTuple>, std::vector<BufferTuple>,
                                std::optional<ValueTuple>, std::vector<std::pair<std::string, ValueTuple>>>;

Value value_of(const ValueTuple& tuple) {
  return {std::get<0>(tuple), std::get<1>(tuple), std::get<2>(tuple)};
}

Segment segment_of(const SegmentTuple& tuple) {
  const auto& [name, ops, buffers, x_out, outputs] = tuple;
  Segment segment{name, {}, {}, x_out ? value_of(*x_out) : Value{-1, 0, 0}, {}};
  for (const auto& [kind, op_name, inputs, op_outputs, weights, ints, floats] : ops) {
    Op op{kind_of(kind), op_name, {}, {}, weights, ints, floats};
    for (const ValueTuple& value : inputs) op.inputs.push_back(value_of(value));
    for (const ValueTuple& value : op_outputs) op.outputs.push_back(value_of(value));
    segment.ops.push_back(std::move(op));
  }
  for (const auto& [width, domain, first, last] : buffers) {
    if (domain < 0 || domain > static_cast<int>(Domain::kAbsorbed)) {
      refuse(name + ": domain " + std::to_string(domain) + ", expected 0 to 2.");
    }
    segment.buffers.push_back({width, static_cast<Domain>(domain), first, last});
  }
  for (const auto& [output, value] : outputs) segment.outputs.emplace_back(output, value_of(value));
  return segment;
}

// (uint8 [rows, row_bytes], scale or None)
using PartTuple = std::tuple<nb::object, nb::object>;

WeightPart part_of(const Weight& weight, const PartTuple& tuple) {
  const auto& [raw_object, scale_object] = tuple;
  const auto raw = array_of<Array<uint8_t, 2>>(raw_object, weight.name, "uint8 [rows, row_bytes]");
  const int64_t row_bytes = weight.type->row_bytes(weight.cols);
  if (static_cast<int64_t>(raw.shape(0)) != weight.part_rows ||
      static_cast<int64_t>(raw.shape(1)) != row_bytes) {
    refuse(weight.name + ": bytes " + shape_of(raw) + ", expected (" + std::to_string(weight.part_rows) +
           ", " + std::to_string(row_bytes) + ").");
  }
  if (scale_object.is_none()) return {raw.data(), nullptr};
  constexpr int32_t kFp8 = -1;  // quant/types.py: F8_E4M3
  if (weight.type->id != kFp8) refuse(weight.name + ": a scale, expected none for this type.");
  const auto scale =
      array_of<Array<float, 2>>(scale_object, weight.name + " scale", "float32 [rows / 128, cols / 128]");
  const auto squares = [](int64_t n) { return static_cast<size_t>((n + fp8_block - 1) / fp8_block); };
  if (scale.shape(0) != squares(weight.part_rows) || scale.shape(1) != squares(weight.cols)) {
    refuse(weight.name + ": scale " + shape_of(scale) + ", expected (" +
           std::to_string(squares(weight.part_rows)) + ", " + std::to_string(squares(weight.cols)) + ").");
  }
  return {raw.data(), scale.data()};
}

// (name, type number, rows of a part, cols, parts)
using WeightTuple = std::tuple<std::string, int, int64_t, int64_t, std::vector<PartTuple>>;

Weight weight_of(const WeightTuple& tuple) {
  const auto& [name, type_id, rows, cols, parts] = tuple;
  Weight weight{name, find_layout(type_id), rows, cols, {}, nullptr};
  if (weight.type == nullptr) refuse(name + ": type number " + std::to_string(type_id) + " has no decoder.");
  if (rows < 1 || cols < 1)
    refuse(name + ": shape (" + std::to_string(rows) + ", " + std::to_string(cols) + ").");
  for (const PartTuple& part : parts) weight.parts.push_back(part_of(weight, part));
  return weight;
}

CacheArray cache_array_of(nb::handle object, int type) {
  if (type < 0 || type > static_cast<int>(CacheType::kQ8_0)) {
    refuse("cache type " + std::to_string(type) + ", expected 0 (f32), 1 (f16), 2 (bf16) or 3 (q8_0).");
  }
  const auto cache_type = static_cast<CacheType>(type);
  const auto describe = [&](const auto& array) {
    if (array.shape(2) != static_cast<size_t>(kPageTokens)) {
      refuse("cache " + shape_of(array) + ", expected pages of " + std::to_string(kPageTokens) + " tokens.");
    }
    auto width = static_cast<int64_t>(array.shape(3));
    if (cache_type == CacheType::kQ8_0) {
      if (width % kQ8Bytes != 0) {
        refuse("cache " + shape_of(array) + ", expected rows of whole blocks of " + std::to_string(kQ8Bytes) +
               " bytes.");
      }
      width = width / kQ8Bytes * kQ8Block;
    }
    return CacheArray{array.data(), cache_type, static_cast<int64_t>(array.shape(0)),
                      static_cast<int64_t>(array.shape(1)), width};
  };
  using F32 = nb::ndarray<float, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
  using Half = nb::ndarray<uint16_t, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
  using Bytes = nb::ndarray<uint8_t, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
  if (cache_type == CacheType::kF32) return describe(array_of<F32>(object, "cache", "float32, writable"));
  if (cache_type == CacheType::kQ8_0) return describe(array_of<Bytes>(object, "cache", "uint8, writable"));
  return describe(array_of<Half>(object, "cache", "uint16, writable"));
}

// A Program and the arrays it points into.
struct BoundProgram {
  BoundProgram(const std::vector<SegmentTuple>& segments, const std::vector<WeightTuple>& weights,
               int cache_type, const std::vector<nb::object>& cache, int threads, int64_t workspace_bytes,
               bool rounds_activations, bool by_role, bool checks_numerics, bool times_ops)
      : program(segments_of(segments), weights_of(weights, rounds_activations ? &set : nullptr),
                cache_of(cache, cache_type), threads, workspace_bytes, {by_role, checks_numerics, times_ops}),
        cache_arrays(cache) {
    for (const auto& weight : weights) parts.push_back(std::get<4>(weight));
  }

  static std::vector<Segment> segments_of(const std::vector<SegmentTuple>& tuples) {
    std::vector<Segment> segments;
    for (const SegmentTuple& tuple : tuples) segments.push_back(segment_of(tuple));
    return segments;
  }
  // kernels_of: where products round, the set whose kernels they are.
  static std::vector<Weight> weights_of(const std::vector<WeightTuple>& tuples,
                                        const InstructionSet* kernels_of) {
    std::vector<Weight> weights;
    for (const WeightTuple& tuple : tuples) {
      weights.push_back(weight_of(tuple));
      if (kernels_of != nullptr) weights.back().kernels = kernels_of->find(weights.back().type->id);
    }
    return weights;
  }
  static std::vector<CacheArray> cache_of(const std::vector<nb::object>& arrays, int type) {
    std::vector<CacheArray> cache;
    for (const nb::object& array : arrays) cache.push_back(cache_array_of(array, type));
    return cache;
  }

  // (handle, type number, parts)
  using MovedTuple = std::tuple<int32_t, int, std::vector<PartTuple>>;

  MovedWeight moved_weight(const MovedTuple& tuple) const {
    const auto& [handle, type_id, moved] = tuple;
    if (handle < 0 || handle >= static_cast<int32_t>(parts.size())) {
      refuse("weight handle " + std::to_string(handle) + ", expected 0 to " +
             std::to_string(parts.size() - 1) + ".");
    }
    const Weight& weight = program.weights()[handle];
    if (moved.size() != parts[handle].size()) {
      refuse(weight.name + ": " + std::to_string(moved.size()) + " parts, expected " +
             std::to_string(parts[handle].size()) + ".");
    }
    MovedWeight place{handle, find_layout(type_id), weight.kernels, {}};
    if (place.type == nullptr)
      refuse(weight.name + ": type number " + std::to_string(type_id) + " has no decoder.");
    if (weight.kernels != nullptr) place.kernels = set.find(type_id);
    const bool as_before =
        weight.kernels == nullptr ||
        (place.kernels != nullptr && place.kernels->dot_bytes == weight.kernels->dot_bytes &&
         place.kernels->tile == weight.kernels->tile);
    if (!as_before) refuse(weight.name + ": type number " + std::to_string(type_id) + " has other kernels.");
    for (const PartTuple& part : moved) place.parts.push_back(part_of(weight, part));
    return place;
  }

  void move_weights(std::vector<MovedTuple> moved) {
    std::vector<MovedWeight> places;
    for (const MovedTuple& tuple : moved) places.push_back(moved_weight(tuple));
    // Pointers and references change together: of two moves of one weight, the same one is the last for both.
    std::unique_lock<std::mutex> lock(moving, std::defer_lock);
    {
      const nb::gil_scoped_release released;  // a segment or another move may be under way
      lock.lock();
      program.move_weights(places);
    }
    for (auto& [handle, type_id, arrays] : moved) parts[handle].swap(arrays);
    lock.unlock();  // before the old arrays go: freeing them may run Python code
  }

  // (path, whether it is fused, keys)
  using SequenceTuple = std::tuple<int, bool, int64_t>;

  static int64_t least_workspace(const std::vector<SegmentTuple>& segments,
                                 const std::vector<WeightTuple>& weights, int cache_type,
                                 const std::vector<nb::object>& cache, int threads, bool rounds_activations,
                                 const std::string& name, const std::vector<SequenceTuple>& sequences) {
    const InstructionSet* set = find_set(name.c_str());
    if (set == nullptr) refuse("isa: this processor has no " + name + ".");
    const ProgramFacts facts =
        check_program(segments_of(segments), weights_of(weights, rounds_activations ? set : nullptr),
                      cache_of(cache, cache_type));
    std::vector<PathKeys> longest;
    for (const auto& [path, fused, keys] : sequences) {
      if (path < 0 || path > 2) refuse("path " + std::to_string(path) + ", expected 0, 1 or 2.");
      longest.push_back({static_cast<Path>(path), fused, keys});
    }
    return kvfold::least_workspace(facts, threads, longest);
  }

  std::vector<std::pair<std::string, int64_t>> outputs() const {
    std::vector<std::pair<std::string, int64_t>> list;
    for (const OutputSpec& output : program.outputs()) list.emplace_back(output.name, output.width);
    return list;
  }

  std::map<std::string, std::pair<std::string, std::string>> kernels() const {
    std::map<std::string, std::pair<std::string, std::string>> names;
    for (const Weight& weight : program.weights()) {
      if (weight.kernels == nullptr) continue;
      const KernelNames of_weight = names_of(*weight.kernels);
      names.emplace(weight.name, std::pair(of_weight.dots, of_weight.tiles));
    }
    return names;
  }

  const InstructionSet& set = isa();  // whose kernels the program has, whatever is in use later
  Program program;
  std::mutex moving;  // held while a weight's pointers and its entry of `parts` change
  // By handle: keeps the bytes alive that `program` points at.
  std::vector<std::vector<PartTuple>> parts;
  std::vector<nb::object> cache_arrays;
};

// A StepRun and the arrays it writes to.
struct BoundRun {
  BoundRun(BoundProgram& bound, nb::handle token_ids, nb::handle slots, nb::handle row_starts,
           nb::handle kv_lens, nb::handle page_starts, nb::handle pages, nb::handle segments,
           nb::handle output_rows, nb::handle is_prompt, nb::handle cos, nb::handle sin,
           std::vector<nb::object> outputs)
      : output_arrays(std::move(outputs)),
        run(bound.program,
            step_of(token_ids, slots, row_starts, kv_lens, page_starts, pages, output_rows, is_prompt, cos,
                    sin),
            segments_of(segments),
            pointers(bound.program, output_arrays, nb::cast<size_t>(output_rows.attr("size")))) {}

  static Step step_of(nb::handle token_ids, nb::handle slots, nb::handle row_starts, nb::handle kv_lens,
                      nb::handle page_starts, nb::handle pages, nb::handle output_rows, nb::handle is_prompt,
                      nb::handle cos, nb::handle sin) {
    Step step;
    step.token_ids = numbers<int32_t>(token_ids, "token_ids", "int32 [T]");
    step.slots = numbers<int64_t>(slots, "slots", "int64 [T]");
    step.row_starts = numbers<int32_t>(row_starts, "row_starts", "int32 [S + 1]");
    step.kv_lens = numbers<int32_t>(kv_lens, "kv_lens", "int32 [S]");
    step.page_starts = numbers<int32_t>(page_starts, "page_starts", "int32 [S + 1]");
    step.pages = numbers<int32_t>(pages, "pages", "int32 [..]");
    step.output_rows = numbers<int32_t>(output_rows, "output_rows", "int32 [R]");
    step.is_prompt = numbers<int32_t>(is_prompt, "is_prompt", "int32 [S]");
    step.cos = angles(cos, "cos");
    step.sin = angles(sin, "sin");
    return step;
  }

  static std::vector<PathSegment> segments_of(nb::handle object) {
    const auto array = array_of<Array<int32_t, 2>>(object, "segments", "int32 [N, 4]");
    if (array.shape(1) != 4) refuse("segments: shape " + shape_of(array) + ", expected (N, 4).");
    std::vector<PathSegment> segments;
    for (size_t i = 0; i < array.shape(0); i++) {
      const int32_t* row = array.data() + 4 * i;
      segments.push_back({row[0], row[1], row[2], row[3]});
    }
    return segments;
  }

  static std::vector<float*> pointers(const Program& program, const std::vector<nb::object>& arrays,
                                      size_t rows) {
    const std::vector<OutputSpec>& specs = program.outputs();
    if (arrays.size() != specs.size()) {
      refuse("outputs: " + std::to_string(arrays.size()) + ", expected " + std::to_string(specs.size()) +
             ".");
    }
    std::vector<float*> data;
    for (size_t i = 0; i < specs.size(); i++) {
      const auto array = array_of<OutputArray>(arrays[i], specs[i].name, "float32 [R, width], writable");
      if (array.shape(0) != rows || static_cast<int64_t>(array.shape(1)) != specs[i].width) {
        refuse(specs[i].name + ": shape " + shape_of(array) + ", expected (" + std::to_string(rows) + ", " +
               std::to_string(specs[i].width) + ").");
      }
      data.push_back(array.data());
    }
    return data;
  }

  // Handlers of signals (Ctrl-C) run at cuts. The lock of Python is asked for no more often than this:
  // another thread may keep it for 5 ms.
  bool advance(int32_t last) {
    using Clock = std::chrono::steady_clock;
    constexpr std::chrono::milliseconds kBetweenSignals(100);
    Clock::time_point checked = Clock::now();
    const nb::gil_scoped_release released;
    return run.run(last, [&] {
      if (Clock::now() - checked < kBetweenSignals) return;
      checked = Clock::now();
      const nb::gil_scoped_acquire acquired;
      if (PyErr_CheckSignals() != 0) throw nb::python_error();
    });
  }

  std::vector<std::pair<int64_t, int64_t>> op_times() const {
    std::vector<std::pair<int64_t, int64_t>> times;
    for (const OpTime& time : run.op_times()) times.emplace_back(time.ns, time.experts);
    return times;
  }

  std::vector<nb::object> output_arrays;
  StepRun run;
};

}  // namespace

void bind_program(nb::module_& m) {
  nb::register_exception_translator([](const std::exception_ptr& error, void*) {
    try {
      std::rethrow_exception(error);
    } catch (const WorkspaceTooSmall& e) {
      PyErr_SetString(nb::module_::import_("kvfold.errors").attr("SettingError").ptr(), e.what());
    } catch (const NotFinite& e) {
      PyErr_SetString(nb::module_::import_("kvfold.errors").attr("NumericsError").ptr(), e.what());
    } catch (const ThreadsRefused& e) {
      PyErr_SetString(nb::module_::import_("kvfold.errors").attr("SettingError").ptr(), e.what());
    }
  });

  m.def("quota_cpus", &quota_cpus, "own"_a, "root"_a,
        "Whole CPUs that the cgroups named in file `own`, mounted at `root`, grant; 2**31 - 1: no limit.");

  m.def(
      "core_of",
      [](int number, const std::string& topology) {
        nb::set cpus;
        const CpuSet core = core_of(number, topology);
        for (size_t cpu = 0; cpu < core.size(); cpu++) {
          if (core[cpu]) cpus.add(nb::int_(cpu));
        }
        return cpus;
      },
      "cpu"_a, "topology"_a, "A CPU and those that its folder names as its siblings; none from 1024 on.");

  nb::class_<Calm>(m, "Calm", "Whether a team has its CPUs to itself. Times in ns.")
      .def(nb::init<int64_t>(), "now"_a)
      .def(
          "tell", [](Calm& calm, int64_t now, int64_t ran, int64_t waited) { calm.tell(now, {ran, waited}); },
          "now"_a, "ran"_a, "waited"_a, "Of one thread since it last told: on a CPU, and ready without one.")
      .def("holds", &Calm::holds, "now"_a);

  nb::class_<BoundProgram>(m, "Program", "A recorded model over one cache. See backends/native.py.")
      .def(nb::init<const std::vector<SegmentTuple>&, const std::vector<WeightTuple>&, int,
                    const std::vector<nb::object>&, int, int64_t, bool, bool, bool, bool>(),
           "segments"_a, "weights"_a, "cache_type"_a, "cache"_a, "threads"_a, "workspace_bytes"_a,
           "rounds_activations"_a = false, "by_role"_a = false, "checks_numerics"_a = false,
           "times_ops"_a = false,
           "ValueError where parts do not fit each other, SettingError where the workspace is too small or "
           "the system starts fewer threads.")
      .def_static("least_workspace", &BoundProgram::least_workspace, "segments"_a, "weights"_a,
                  "cache_type"_a, "cache"_a, "threads"_a, "rounds_activations"_a, "isa"_a, "sequences"_a,
                  "Bytes of workspace that a Program of these needs for sequences of [(path, fused, keys)].")
      .def("move_weights", &BoundProgram::move_weights, "moved"_a,
           "[(handle, type number, parts)]: the same weights in other arrays, all from the next cut on. "
           "ValueError where shapes differ, or what kernels make of activations.")
      .def_prop_ro(
          "spins", [](const BoundProgram& bound) { return bound.program.team().spins(); },
          "Whether members wait awake for the next op: only where each has a CPU of its own.")
      .def_prop_ro("kernels", &BoundProgram::kernels,
                   "{weight: (set, set)}: the instruction sets whose row dots and tiles multiply it.")
      .def_prop_ro("num_segments", [](const BoundProgram& bound) { return bound.program.num_segments(); })
      .def_prop_ro("outputs", &BoundProgram::outputs, "[(name, width)] of what the last segment hands over.");

  nb::class_<BoundRun>(m, "StepRun", "One step under way.")
      .def(nb::init<BoundProgram&, nb::handle, nb::handle, nb::handle, nb::handle, nb::handle, nb::handle,
                    nb::handle, nb::handle, nb::handle, nb::handle, nb::handle, std::vector<nb::object>>(),
           nb::keep_alive<1, 2>(), "program"_a, "token_ids"_a, "slots"_a, "row_starts"_a, "kv_lens"_a,
           "page_starts"_a, "pages"_a, "segments"_a, "output_rows"_a, "is_prompt"_a, "cos"_a, "sin"_a,
           "outputs"_a,
           "ValueError where the step is inconsistent, SettingError where it needs more workspace.")
      .def("run", &BoundRun::advance, "last"_a, "Runs to cut `last`; False: stopped at a cut by cancel().")
      .def("cancel", [](BoundRun& bound) { bound.run.cancel(); })
      .def_prop_ro("op_times", &BoundRun::op_times,
                   "[(nanoseconds, experts that had rows)] of every op that ran; empty unless times_ops.")
      .def_prop_ro("position", [](const BoundRun& bound) { return bound.run.position(); });
}
