// Drafters that live in native code altogether.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/boundary.hpp"
#include "drafters/ngram_index.hpp"

namespace foretoken {

namespace py = pybind11;

namespace {

using boundary::Dim;
using boundary::Intake;
using boundary::Layout;
using drafters::ContinuationTree;
using drafters::NgramIndex;
using drafters::NgramPool;

template <typename T>
T* data(const TensorView& view) {
  return static_cast<T*>(view.data);
}

void append(NgramIndex& index, py::handle tokens) {
  if (py::isinstance<py::list>(tokens) || py::isinstance<py::tuple>(tokens)) {
    const auto ids = tokens.cast<std::vector<int64_t>>();
    index.append(ids.data(), ids.size());
    return;
  }
  Intake intake("append");
  int64_t count = 0;
  const TensorView ids =
      intake.read(tokens, "tokens", DType::int64, {Dim::bind(count, "L")}, Layout::contiguous);
  index.append(data<const int64_t>(ids), count);
}

std::vector<int64_t> propose(const NgramIndex& index, int64_t k) {
  if (k < 0 || k > 255) throw py::value_error("k: expected 0 to 255, got " + std::to_string(k));
  std::vector<int64_t> drafts(k);
  drafts.resize(index.propose(k, drafts.data()));
  return drafts;
}

void pool_reserve(NgramPool& pool, py::handle slots, py::handle lengths) {
  Intake intake("reserve");
  int64_t rows = 0;
  const TensorView s = intake.read(slots, "slots", DType::int32, {Dim::bind(rows, "B")}, Layout::contiguous);
  const TensorView l = intake.read(lengths, "lengths", DType::int64, {rows}, Layout::contiguous);
  for (int64_t b = 0; b < rows; ++b) pool.at(data<const int32_t>(s)[b]).reserve(data<const int64_t>(l)[b]);
}

// Rows take in tokens [B, W] (counts[b] of row b); taken[slot] is the length of the text afterwards.
void take_in(NgramPool& pool, Intake& intake, const TensorView& slots, int64_t rows, py::handle tokens,
             py::handle counts, py::handle taken) {
  int64_t width = 0, num_slots = 0;
  const TensorView ids =
      intake.read(tokens, "tokens", DType::int64, {rows, Dim::bind(width, "W")}, Layout::contiguous);
  const TensorView n = intake.read(counts, "counts", DType::int32, {rows}, Layout::contiguous);
  const TensorView lengths =
      intake.write(taken, "taken", DType::int64, {Dim::bind(num_slots, "slots")}, Layout::contiguous);
  for (int64_t b = 0; b < rows; ++b) {
    const int32_t slot = data<const int32_t>(slots)[b], count = data<const int32_t>(n)[b];
    if (count < 0 || count > width)
      throw py::value_error("counts: expected 0 to W, got " + std::to_string(count));
    if (slot < 0 || slot >= num_slots)
      throw py::value_error("taken: no entry for slot " + std::to_string(slot));
    NgramIndex& index = pool.at(slot);
    index.append(data<const int64_t>(ids) + b * width, count);
    data<int64_t>(lengths)[slot] = index.length();
  }
}

void pool_take_in(NgramPool& pool, py::handle slots, py::handle tokens, py::handle counts, py::handle taken) {
  Intake intake("take_in");
  int64_t rows = 0;
  const TensorView s = intake.read(slots, "slots", DType::int32, {Dim::bind(rows, "B")}, Layout::contiguous);
  take_in(pool, intake, s, rows, tokens, counts, taken);
}

void pool_propose(NgramPool& pool, py::handle slots, py::handle tokens, py::handle counts, py::handle taken,
                  py::handle budget, py::handle drafts, py::handle num_drafts) {
  Intake intake("propose");
  int64_t rows = 0, columns = 0;
  const TensorView s = intake.read(slots, "slots", DType::int32, {Dim::bind(rows, "B")}, Layout::contiguous);
  const TensorView k = intake.read(budget, "budget", DType::int32, {rows}, Layout::contiguous);
  const TensorView out =
      intake.write(drafts, "drafts", DType::int64, {rows, Dim::bind(columns, "K")}, Layout::contiguous);
  const TensorView n = intake.write(num_drafts, "num_drafts", DType::int32, {rows}, Layout::contiguous);
  take_in(pool, intake, s, rows, tokens, counts, taken);
  for (int64_t b = 0; b < rows; ++b) {
    const int64_t most = std::min<int64_t>(data<const int32_t>(k)[b], columns);
    const NgramIndex& index = pool.at(data<const int32_t>(s)[b]);
    data<int32_t>(n)[b] = static_cast<int32_t>(index.propose(most, data<int64_t>(out) + b * columns));
  }
}

ContinuationTree::Budget checked(int64_t nodes, int64_t branches, int64_t depth) {
  for (const auto& [name, value] : {std::pair{"nodes", nodes}, {"depth", depth}}) {
    if (value < 0 || value > 255) {
      throw py::value_error(std::string(name) + ": expected 0 to 255, got " + std::to_string(value));
    }
  }
  if (branches < 1) throw py::value_error("branches: expected at least 1, got " + std::to_string(branches));
  return {nodes, branches, depth};
}

py::tuple propose_tree(const NgramIndex& index, int64_t nodes, int64_t branches, int64_t depth) {
  const ContinuationTree::Budget budget = checked(nodes, branches, depth);
  std::vector<int64_t> tokens(nodes);
  std::vector<int32_t> parents(nodes);
  ContinuationTree tree;
  const int64_t count = index.propose_tree(budget, tree, tokens.data(), parents.data());
  tokens.resize(count);
  parents.resize(count);
  return py::make_tuple(tokens, parents);
}

// As pool_propose, for trees of up to nodes[b] drafts and paths of up to depth[b].
void pool_propose_tree(NgramPool& pool, py::handle slots, py::handle tokens, py::handle counts,
                       py::handle taken, py::handle nodes, py::handle depth, int64_t branches,
                       py::handle drafts, py::handle parents, py::handle num_drafts) {
  Intake intake("propose");
  int64_t rows = 0, columns = 0;
  const TensorView s = intake.read(slots, "slots", DType::int32, {Dim::bind(rows, "B")}, Layout::contiguous);
  const TensorView most = intake.read(nodes, "nodes", DType::int32, {rows}, Layout::contiguous);
  const TensorView deep = intake.read(depth, "depth", DType::int32, {rows}, Layout::contiguous);
  const TensorView out =
      intake.write(drafts, "drafts", DType::int64, {rows, Dim::bind(columns, "N")}, Layout::contiguous);
  const TensorView above =
      intake.write(parents, "parents", DType::int32, {rows, columns}, Layout::contiguous);
  const TensorView n = intake.write(num_drafts, "num_drafts", DType::int32, {rows}, Layout::contiguous);
  take_in(pool, intake, s, rows, tokens, counts, taken);
  for (int64_t b = 0; b < rows; ++b) {
    const int64_t count = std::min<int64_t>(data<const int32_t>(most)[b], columns);
    const auto budget = checked(count, branches, data<const int32_t>(deep)[b]);
    const NgramIndex& index = pool.at(data<const int32_t>(s)[b]);
    data<int32_t>(n)[b] = static_cast<int32_t>(index.propose_tree(
        budget, pool.scratch(), data<int64_t>(out) + b * columns, data<int32_t>(above) + b * columns));
  }
}

}  // namespace

void register_drafters(py::module_& module) {
  py::class_<NgramIndex>(
      module, "NgramIndex",
      "One request's text and the previous occurrence of its last n-grams. See foretoken.NgramDrafter.")
      .def(py::init<int, int, size_t>(), py::kw_only(), py::arg("min_ngram") = 1, py::arg("max_ngram"),
           py::arg("max_bytes"))
      .def("append", &append, py::arg("tokens"), "Take in tokens: a list of int, or an int64 tensor [L].")
      .def("propose", &propose, py::arg("k"),
           "The k tokens that followed the longest suffix the last time; [] if none.")
      .def("propose_tree", &propose_tree, py::arg("nodes"), py::arg("branches"), py::arg("depth"),
           "What followed several earlier occurrences, as one tree: tokens and parents of its drafts.")
      .def("truncate", &NgramIndex::truncate, py::arg("length"), "Keep the first `length` tokens.")
      .def("reserve", &NgramIndex::reserve, py::arg("length"), "Make room for a text of `length` tokens.")
      .def("clear", &NgramIndex::clear, "Forget everything and give the memory back.")
      .def("__len__", &NgramIndex::length)
      .def_property_readonly("match_length", &NgramIndex::match_length)
      .def_property_readonly("forgotten", &NgramIndex::forgotten)
      .def_property_readonly("capacity", &NgramIndex::capacity)
      .def_property_readonly("bytes", &NgramIndex::bytes);
  py::class_<NgramPool>(module, "NgramPool", "One NgramIndex per request slot.")
      .def(py::init<int, int, size_t>(), py::kw_only(), py::arg("min_ngram"), py::arg("max_ngram"),
           py::arg("max_bytes"))
      .def(
          "reset", [](NgramPool& pool, int64_t slot) { pool.at(slot).clear(); }, py::arg("slot"))
      .def(
          "truncate",
          [](NgramPool& pool, int64_t slot, int64_t length) {
            NgramIndex& index = pool.at(slot);
            index.truncate(length);
            return index.length();
          },
          py::arg("slot"), py::arg("length"))
      .def(
          "bytes", [](NgramPool& pool, int64_t slot) { return pool.at(slot).bytes(); }, py::arg("slot"))
      .def("reserve", &pool_reserve, py::arg("slots"), py::arg("lengths"))
      .def("take_in", &pool_take_in, py::arg("slots"), py::arg("tokens"), py::arg("counts"), py::arg("taken"))
      .def("propose_tree", &pool_propose_tree, py::arg("slots"), py::arg("tokens"), py::arg("counts"),
           py::arg("taken"), py::arg("nodes"), py::arg("depth"), py::arg("branches"), py::arg("drafts"),
           py::arg("parents"), py::arg("num_drafts"))
      .def("propose", &pool_propose, py::arg("slots"), py::arg("tokens"), py::arg("counts"), py::arg("taken"),
           py::arg("budget"), py::arg("drafts"), py::arg("num_drafts"));
}

}  // namespace foretoken
