// kernels/decode.h for Python: shapes checked here, work spread over threads, the GIL released meanwhile.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "kernels/decode.h"
#include "kernels/side_by_side.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using kvfold::TypeLayout;
using Bytes = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using WritableBytes = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Scales = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <class Array>
std::string shape_of(const Array& array) {
  std::string text = "(";
  for (size_t i = 0; i < array.ndim(); ++i) text += (i ? ", " : "") + std::to_string(array.shape(i));
  return text + ")";
}

void expect(bool right, const std::string& what) {
  if (!right) throw nb::value_error(what.c_str());
}

const TypeLayout& layout_of(int type_id) {
  const TypeLayout* type = kvfold::find_layout(type_id);
  expect(type != nullptr, "decode: type number " + std::to_string(type_id) + " has no decoder.");
  return *type;
}

// Rows of `raw` must be those of a matrix with as many columns as `out`.
void check_columns(const TypeLayout& type, const Bytes& raw, const Floats& out) {
  const auto cols = static_cast<int64_t>(out.shape(1));
  expect(cols % type.block_elements == 0, "decode: out " + shape_of(out) +
                                              ", expected columns in blocks of " +
                                              std::to_string(type.block_elements) + ".");
  expect(static_cast<int64_t>(raw.shape(1)) == type.row_bytes(cols),
         "decode: raw " + shape_of(raw) + ", expected rows of " + std::to_string(type.row_bytes(cols)) +
             " bytes for out " + shape_of(out) + ".");
  expect(raw.shape(0) % static_cast<size_t>(type.interleaved_rows) == 0,
         "decode: raw " + shape_of(raw) + ", expected whole groups of " +
             std::to_string(type.interleaved_rows) + " rows.");
}

// Threads that are waited for also when starting one of them fails.
struct Team {
  std::vector<std::thread> members;
  ~Team() {
    for (std::thread& member : members) member.join();
  }
};

// work(first, last) over [0, rows), in `threads` pieces at multiples of `group` rows.
template <class Work>
void over_rows(int64_t rows, int64_t group, int threads, const Work& work) {
  const int64_t groups = rows / group;
  const int64_t pieces = std::max<int64_t>(1, std::min<int64_t>(threads, groups));
  const auto do_piece = [&](int64_t piece) {
    work(groups * piece / pieces * group, groups * (piece + 1) / pieces * group);
  };
  Team team;
  for (int64_t piece = 1; piece < pieces; ++piece) team.members.emplace_back(do_piece, piece);
  do_piece(0);
}

void check_threads(int threads) {
  expect(threads >= 1 && threads <= 1024,
         "decode: threads is " + std::to_string(threads) + ", expected 1 to 1024.");
}

void decode(int type_id, const Bytes& raw, const Floats& out, int threads) {
  const TypeLayout& type = layout_of(type_id);
  check_threads(threads);
  check_columns(type, raw, out);
  expect(raw.shape(0) == out.shape(0),
         "decode: raw " + shape_of(raw) + ", out " + shape_of(out) + ", expected equally many rows.");
  const auto rows = static_cast<int64_t>(out.shape(0)), cols = static_cast<int64_t>(out.shape(1));
  const nb::gil_scoped_release released;
  over_rows(rows, type.interleaved_rows, threads, [&](int64_t first, int64_t last) {
    kvfold::decode_rows(type, raw.data() + first * type.row_bytes(cols), last - first, cols,
                        out.data() + first * cols, cols);
  });
}

void decode_rows(int type_id, const Bytes& raw, const Rows& rows, const Floats& out) {
  const TypeLayout& type = layout_of(type_id);
  check_columns(type, raw, out);
  expect(rows.shape(0) == out.shape(0), "decode_rows: " + std::to_string(rows.shape(0)) + " rows for out " +
                                            shape_of(out) + ", expected equally many.");
  const auto num_rows = static_cast<int64_t>(rows.shape(0)), cols = static_cast<int64_t>(out.shape(1));
  for (int64_t i = 0; i < num_rows; ++i)
    if (rows.data()[i] < 0 || static_cast<size_t>(rows.data()[i]) >= raw.shape(0))
      expect(false, "decode_rows: row " + std::to_string(rows.data()[i]) + " of raw " + shape_of(raw) + ".");
  const nb::gil_scoped_release released;
  for (int64_t i = 0; i < num_rows; ++i)
    kvfold::decode_row_at(type, raw.data(), rows.data()[i], cols, out.data() + i * cols);
}

void decode_fp8(const Bytes& raw, const Scales& scale, const Floats& out, int threads) {
  check_threads(threads);
  expect(raw.shape(0) == out.shape(0) && raw.shape(1) == out.shape(1),
         "decode_fp8: raw " + shape_of(raw) + ", out " + shape_of(out) + ", expected the same shape.");
  const auto rows = static_cast<int64_t>(out.shape(0)), cols = static_cast<int64_t>(out.shape(1));
  const auto squares = [](int64_t n) {
    return static_cast<size_t>((n + kvfold::fp8_block - 1) / kvfold::fp8_block);
  };
  expect(scale.shape(0) == squares(rows) && scale.shape(1) == squares(cols),
         "decode_fp8: scale " + shape_of(scale) + ", expected (" + std::to_string(squares(rows)) + ", " +
             std::to_string(squares(cols)) + ") for " + shape_of(raw) + ".");
  const nb::gil_scoped_release released;
  over_rows(rows, 1, threads, [&](int64_t first, int64_t last) {
    kvfold::decode_fp8_rows(raw.data() + first * cols, first, last - first, cols, scale.data(),
                            static_cast<int64_t>(scale.shape(1)), out.data() + first * cols, cols);
  });
}

void put_side_by_side(int type_id, const WritableBytes& raw, int threads) {
  const TypeLayout& type = layout_of(type_id);
  check_threads(threads);
  const auto rows = static_cast<int64_t>(raw.shape(0)), row_bytes = static_cast<int64_t>(raw.shape(1));
  expect(rows % kvfold::kRowsSideBySide == 0 && row_bytes % type.block_bytes == 0 &&
             kvfold::find_layout(kvfold::side_by_side_id(type_id)) != nullptr,
         "put_side_by_side: raw " + shape_of(raw) + " of type number " + std::to_string(type_id) +
             ", expected whole groups of " + std::to_string(kvfold::kRowsSideBySide) +
             " rows of a type that has this layout.");
  const nb::gil_scoped_release released;
  over_rows(rows, kvfold::kRowsSideBySide, threads, [&](int64_t first, int64_t last) {
    std::vector<uint8_t> group(kvfold::kRowsSideBySide * row_bytes);
    for (int64_t row = first; row < last; row += kvfold::kRowsSideBySide) {
      uint8_t* place = raw.data() + row * row_bytes;
      std::memcpy(group.data(), place, group.size());
      kvfold::put_side_by_side(type_id, group.data(), kvfold::kRowsSideBySide, row_bytes, place);
    }
  });
}

// {number: (block_elements, block_bytes, interleaved_rows, row_meta_bytes)}
nb::dict decodable_types() {
  nb::dict types;
  for (const kvfold::TypeLayouts& list : {kvfold::standard_layouts(), kvfold::interleaved_layouts()})
    for (const TypeLayout& t : list)
      types[nb::int_(t.id)] =
          nb::make_tuple(t.block_elements, t.block_bytes, t.interleaved_rows, t.row_meta_bytes);
  return types;
}

}  // namespace

void bind_decode(nb::module_& m) {
  m.def("decode", &decode, "type_id"_a, "raw"_a.noconvert(), "out"_a.noconvert(), "threads"_a = 1,
        "raw uint8 [rows, row_bytes] of a ggml type to out float32 [rows, cols]. ValueError where shapes "
        "disagree.");
  m.def("decode_rows", &decode_rows, "type_id"_a, "raw"_a.noconvert(), "rows"_a.noconvert(),
        "out"_a.noconvert(),
        "Rows int32 [n] of raw uint8 [.., row_bytes] to out float32 [n, cols], as an embedding needs them.");
  m.def("decode_fp8", &decode_fp8, "raw"_a.noconvert(), "scale"_a.noconvert(), "out"_a.noconvert(),
        "threads"_a = 1,
        "F8_E4M3 raw uint8 [rows, cols] times the multiplier of its 128 x 128 square to out float32 [rows, "
        "cols].");
  m.def("put_side_by_side", &put_side_by_side, "type_id"_a, "raw"_a.noconvert(), "threads"_a = 1,
        "Rows uint8 [rows, row_bytes] of a file's type, in place, as kernels/side_by_side.h describes.");
  m.def("decodable_types", &decodable_types,
        "{number: (block_elements, block_bytes, interleaved_rows, row_meta_bytes)} of the types with a "
        "decoder.");
}
