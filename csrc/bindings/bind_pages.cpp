// The native part of foretoken.cache.PagedCache.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/boundary.hpp"
#include "bindings/cache_plan.hpp"
#include "dispatch.hpp"
#include "loop/page_table.hpp"

namespace foretoken {

namespace py = pybind11;

namespace {

using boundary::Dim;
using boundary::Intake;
using boundary::Layout;
using loop::PageTable;
using Numbers = std::vector<int32_t>;

// The tensors of a PageTable, made by its owner and never looked at by the host.
struct Tensors {
  py::handle block_table, lengths, counts, row_slots;
};

PageState read_state(Intake& intake, const PageTable& table, const Tensors& tensors) {
  const int64_t slots = table.config().slots;
  PageState state;
  state.block_table = intake.write(tensors.block_table, "block_table", DType::int32, {slots, table.columns()},
                                   Layout::contiguous);
  state.lengths = intake.write(tensors.lengths, "lengths", DType::int64, {slots}, Layout::contiguous);
  state.counts = intake.write(tensors.counts, "counts", DType::int32, {slots}, Layout::contiguous);
  state.row_slots = intake.write(tensors.row_slots, "row_slots", DType::int32, {slots}, Layout::contiguous);
  return state;
}

void reserve(PageTable& table, const Numbers& slots, const Numbers& counts) {
  if (slots.size() != counts.size()) {
    throw py::value_error("num_tokens: expected one number for each of " + std::to_string(slots.size()) +
                          " slots, got " + std::to_string(counts.size()));
  }
  table.reserve(slots.data(), counts.data(), static_cast<int64_t>(slots.size()));
}

void settle(PageTable& table, py::handle record) {
  Intake intake("settle");
  int64_t rows = 0;
  const TensorView kept =
      intake.read(record, "record", DType::int32, {Dim::bind(rows, "B")}, Layout::contiguous);
  table.settle(static_cast<const int32_t*>(kept.data), rows);
}

void apply_edits(PageTable& table, py::handle block_table, py::handle lengths, py::handle counts,
                 py::handle row_slots) {
  if (table.edits().empty()) return;
  Intake intake("reserve");
  EditPagesArgs args;
  args.state = read_state(intake, table, {block_table, lengths, counts, row_slots});
  args.edits = table.edits().data();
  args.num_edits = static_cast<int64_t>(table.edits().size());
  dispatch::edit_pages(args, intake.device(), intake.stream());
  table.edits().clear();
}

// Of each plan the same pages, of as many rows as the table's or of one.
void apply_copies(PageTable& table, const std::vector<const CachePlan*>& plans) {
  if (table.copies().empty()) return;
  for (const CachePlan* const plan : plans) {
    if (plan->needs_table()) {
      throw py::value_error("caches: expected a plan with its table, got one without");
    }
    const bool fits = plan->page_size() == table.config().page_size || plan->page_size() == 1;
    if (plan->pages() != table.config().pages || !fits) {
      throw py::value_error("caches: expected the pages of the table, got others");
    }
  }
  for (const CachePlan* const plan : plans) {
    Intake intake("reserve", plan->device());
    CopyPagesArgs args;
    plan->describe(args);
    args.copies = table.copies().data();
    args.num_copies = static_cast<int64_t>(table.copies().size());
    const Stream stream = intake.stream();
    py::gil_scoped_release unlocked;
    dispatch::copy_pages(args, plan->device(), stream);
  }
  table.copies().clear();
}

void keep_rows(const PageTable& table, py::handle block_table, py::handle lengths, py::handle counts,
               py::handle row_slots, py::handle kept, py::handle blocked, py::handle record,
               py::handle status) {
  Intake intake("commit");
  KeepRowsArgs args;
  const int64_t rows = table.rows();
  args.state = read_state(intake, table, {block_table, lengths, counts, row_slots});
  args.by_row_slots = !table.in_order();
  args.kept = intake.read_or_null(kept, "verdict", DType::int32, {rows}, Layout::any);
  args.blocked = intake.read_or_null(blocked, "blocked", DType::int32, {rows}, Layout::any);
  args.record = intake.write(record, "record", DType::int32, {rows}, Layout::any);
  args.status = intake.write(status, "status", DType::int32, {rows}, Layout::any);
  dispatch::keep_rows(args, intake.device(), intake.stream());
}

void resize(PageTable& table, const Numbers& counts) {
  table.resize(counts.data(), static_cast<int64_t>(counts.size()));
}

void keep_apart(const PageTable& table, py::handle block_table, py::handle lengths, py::handle counts,
                py::handle row_slots, int64_t first, py::handle kept, py::handle path,
                py::handle num_accepted, py::handle apart, py::handle reached, py::handle status) {
  if (first < 0 || first >= kMostApart) {
    throw py::value_error("first: expected 0 to 63, got " + std::to_string(first));
  }
  Intake intake("commit");
  KeepApartArgs args;
  const int64_t rows = table.rows();
  int64_t depth = 0;
  args.state = read_state(intake, table, {block_table, lengths, counts, row_slots});
  args.by_row_slots = !table.in_order();
  args.first = first;
  args.kept = intake.read(kept, "verdict.num_emitted", DType::int32, {rows}, Layout::any);
  args.path =
      intake.read(path, "verdict.path", boundary::kIndexDTypes, {rows, Dim::bind(depth, "D")}, Layout::any);
  args.num_accepted = intake.read(num_accepted, "verdict.num_accepted", DType::int32, {rows}, Layout::any);
  args.apart = intake.write(apart, "apart", DType::int64, {rows}, Layout::any);
  args.reached = intake.write(reached, "reached", DType::int64, {rows}, Layout::any);
  args.status = intake.write(status, "status", DType::int32, {rows}, Layout::any);
  dispatch::keep_apart(args, intake.device(), intake.stream());
}

void gather_apart(py::handle apart, py::handle lengths, py::handle starts, py::handle path,
                  py::handle num_accepted, py::handle kept) {
  Intake intake("commit");
  GatherApartArgs args;
  int64_t rows = 0;
  args.apart = intake.read(apart, "apart", DType::int64, {Dim::bind(rows, "B")}, Layout::any);
  args.lengths = intake.read(lengths, "lengths", DType::int64, {rows}, Layout::any);
  args.starts = intake.write(starts, "starts", DType::int64, {rows}, Layout::any);
  args.path = intake.write(path, "path", DType::int32, {rows, kMostApart}, Layout::any);
  args.num_accepted = intake.write(num_accepted, "num_accepted", DType::int32, {rows}, Layout::any);
  args.kept = intake.write(kept, "kept", DType::int32, {rows}, Layout::any);
  dispatch::gather_apart(args, intake.device(), intake.stream());
}

}  // namespace

void register_pages(py::module_& module) {
  py::register_exception<loop::OutOfPages>(module, "OutOfPagesError", PyExc_RuntimeError);
  py::class_<PageTable>(module, "PageTable", "The host's side of foretoken.cache.PagedCache.")
      .def(py::init(
               [](int64_t pages, int64_t page_size, int64_t max_slots, int64_t max_length, int64_t window) {
                 return PageTable({pages, page_size, max_slots, max_length, window});
               }),
           py::kw_only(), py::arg("pages"), py::arg("page_size"), py::arg("max_slots"), py::arg("max_length"),
           py::arg("window"))
      .def("reserve", &reserve, py::arg("slots"), py::arg("counts"))
      .def("resize", &resize, py::arg("counts"))
      .def("keep_apart", &keep_apart, py::arg("block_table"), py::arg("lengths"), py::arg("counts"),
           py::arg("row_slots"), py::arg("first"), py::arg("kept"), py::arg("path"), py::arg("num_accepted"),
           py::arg("apart"), py::arg("reached"), py::arg("status"))
      .def("close", &PageTable::close)
      .def("cancel", &PageTable::cancel)
      .def("settle", &settle, py::arg("record"))
      .def("fork", &PageTable::fork, py::arg("source"), py::arg("target"), py::arg("length"))
      .def("free", &PageTable::free, py::arg("slot"))
      .def("apply_edits", &apply_edits, py::arg("block_table"), py::arg("lengths"), py::arg("counts"),
           py::arg("row_slots"))
      .def("apply_copies", &apply_copies, py::arg("plans"))
      .def("keep_rows", &keep_rows, py::arg("block_table"), py::arg("lengths"), py::arg("counts"),
           py::arg("row_slots"), py::arg("kept"), py::arg("blocked"), py::arg("record"), py::arg("status"))
      .def(
          "bounds",
          [](const PageTable& table, int64_t slot) {
            return py::make_tuple(table.low(slot), table.high(slot));
          },
          py::arg("slot"))
      .def("pages", &PageTable::pages, py::arg("slot"))
      .def_property_readonly("columns", &PageTable::columns)
      .def_property_readonly("free_pages", &PageTable::free_pages)
      .def_property_readonly("open", &PageTable::open)
      .def_property_readonly("rows", &PageTable::rows)
      .def_property_readonly("in_order", &PageTable::in_order)
      .def_property_readonly("unsettled", &PageTable::unsettled);
  module.def("gather_apart", &gather_apart, py::arg("apart"), py::arg("lengths"), py::arg("starts"),
             py::arg("path"), py::arg("num_accepted"), py::arg("kept"));
}

}  // namespace foretoken
