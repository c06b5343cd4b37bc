// The native part of foretoken.cache.PagedCache.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

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

// A PageTable with the tensors that it describes on a device: checked once, never looked at by the host.
struct Pages {
  explicit Pages(const loop::PageTableConfig& config) : table(config) {}

  PageTable table;
  PageState state;
  TensorView record, status;  // [max_slots] int32, of the last round's rows
  Device device;
  py::object block_table;  // leads to the stream
  std::vector<py::object> kept_alive;

  bool bound() const { return !kept_alive.empty(); }
  const PageState& bound_state() const {
    if (!bound()) throw std::logic_error("pages: bind tensors first");
    return state;
  }
  Stream stream(Intake& intake) const {
    if (device.type == DeviceType::cpu) return {};
    intake.read(block_table, "block_table", DType::int32, {table.config().slots, table.columns()});
    return intake.stream();
  }
};

TensorView first_rows(TensorView view, int64_t rows) {
  view.shape[0] = rows;
  return view;
}

void bind(Pages& pages, const py::object& block_table, const py::object& lengths, const py::object& counts,
          const py::object& row_slots, const py::object& record, const py::object& status) {
  Intake intake("bind");
  const int64_t slots = pages.table.config().slots;
  const auto write = [&](py::handle object, const char* name, DType dtype) {
    return intake.write(object, name, dtype, {slots}, Layout::contiguous);
  };
  PageState state;
  state.block_table = intake.write(block_table, "block_table", DType::int32, {slots, pages.table.columns()},
                                   Layout::contiguous);
  state.lengths = write(lengths, "lengths", DType::int64);
  state.counts = write(counts, "counts", DType::int32);
  state.row_slots = write(row_slots, "row_slots", DType::int32);
  pages.record = write(record, "record", DType::int32);
  pages.status = write(status, "status", DType::int32);
  pages.state = state;
  pages.device = intake.device();
  pages.block_table = block_table;
  pages.kept_alive = {block_table, lengths, counts, row_slots, record, status};
}

void reserve(Pages& pages, const Numbers& slots, const Numbers& counts) {
  if (slots.size() != counts.size()) {
    throw py::value_error("num_tokens: expected one number for each of " + std::to_string(slots.size()) +
                          " slots, got " + std::to_string(counts.size()));
  }
  pages.table.reserve(slots.data(), counts.data(), static_cast<int64_t>(slots.size()));
}

void hold(Pages& pages, const Numbers& slots, const Numbers& ends, const std::vector<Numbers>& shared) {
  if (slots.size() != ends.size()) {
    throw py::value_error("ends: expected one number for each of " + std::to_string(slots.size()) +
                          " slots, got " + std::to_string(ends.size()));
  }
  pages.table.hold(slots.data(), ends.data(), static_cast<int64_t>(slots.size()), shared);
}

void settle(Pages& pages, py::handle record) {
  Intake intake("settle");
  int64_t rows = 0;
  const TensorView kept =
      intake.read(record, "record", DType::int32, {Dim::bind(rows, "B")}, Layout::contiguous);
  pages.table.settle(static_cast<const int32_t*>(kept.data), rows);
}

void apply_edits(Pages& pages) {
  std::vector<PageEdit>& edits = pages.table.edits();
  if (edits.empty()) return;
  Intake intake("reserve");
  EditPagesArgs args;
  args.state = pages.bound_state();
  args.edits = edits.data();
  args.num_edits = static_cast<int64_t>(edits.size());
  dispatch::edit_pages(args, pages.device, pages.stream(intake));
  edits.clear();
}

// Of each plan the same pages, of as many rows as the table's or of one.
void apply_copies(Pages& pages, const std::vector<const CachePlan*>& plans) {
  PageTable& table = pages.table;
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
  Intake intake("reserve");
  const Stream stream = pages.stream(intake);
  for (const CachePlan* const plan : plans) {
    CopyPagesArgs args;
    plan->describe(args);
    args.copies = table.copies().data();
    args.num_copies = static_cast<int64_t>(table.copies().size());
    py::gil_scoped_release unlocked;
    dispatch::copy_pages(args, plan->device(), stream);
  }
  table.copies().clear();
}

// The device's part of a round's end.
void keep_rows(const Pages& pages, py::handle kept, py::handle blocked) {
  const PageTable& table = pages.table;
  if (!table.open()) throw std::logic_error("commit: no round is open; reserve first");
  Intake intake("commit");
  KeepRowsArgs args;
  const int64_t rows = table.rows();
  args.state = pages.bound_state();
  args.by_row_slots = !table.in_order();
  args.kept = intake.read_or_null(kept, "verdict", DType::int32, {rows}, Layout::any);
  args.blocked = intake.read_or_null(blocked, "blocked", DType::int32, {rows}, Layout::any);
  if ((args.kept && args.kept.device != pages.device) ||
      (args.blocked && args.blocked.device != pages.device)) {
    throw py::value_error("verdict: expected tensors on the device of the cache, got others");
  }
  args.record = first_rows(pages.record, rows);
  args.status = first_rows(pages.status, rows);
  dispatch::keep_rows(args, pages.device, pages.stream(intake));
}

// Ends the open round; with `settles`, which the CPU alone can, also for the host.
void commit(Pages& pages, py::handle kept, py::handle blocked, bool settles) {
  PageTable& table = pages.table;
  keep_rows(pages, kept, blocked);
  const int64_t rows = table.rows();
  table.close();
  if (!settles) return;
  table.settle(static_cast<const int32_t*>(pages.record.data), rows);
  apply_edits(pages);
}

void resize(Pages& pages, const Numbers& counts) {
  pages.table.resize(counts.data(), static_cast<int64_t>(counts.size()));
}

void keep_apart(const Pages& pages, int64_t first, py::handle kept, py::handle path, py::handle num_accepted,
                py::handle apart, py::handle reached, py::handle status) {
  if (first < 0 || first >= kMostApart) {
    throw py::value_error("first: expected 0 to 63, got " + std::to_string(first));
  }
  Intake intake("commit", pages.device);
  KeepApartArgs args;
  const int64_t rows = pages.table.rows();
  int64_t depth = 0;
  args.state = pages.bound_state();
  args.by_row_slots = !pages.table.in_order();
  args.first = first;
  args.kept = intake.read(kept, "verdict.num_emitted", DType::int32, {rows}, Layout::any);
  args.path =
      intake.read(path, "verdict.path", boundary::kIndexDTypes, {rows, Dim::bind(depth, "D")}, Layout::any);
  args.num_accepted = intake.read(num_accepted, "verdict.num_accepted", DType::int32, {rows}, Layout::any);
  args.apart = intake.write(apart, "apart", DType::int64, {rows}, Layout::any);
  args.reached = intake.write(reached, "reached", DType::int64, {rows}, Layout::any);
  args.status = intake.write(status, "status", DType::int32, {rows}, Layout::any);
  dispatch::keep_apart(args, pages.device, intake.stream());
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
  py::class_<Pages>(module, "PageTable", "The host's side of foretoken.cache.PagedCache.")
      .def(py::init(
               [](int64_t pages, int64_t page_size, int64_t max_slots, int64_t max_length, int64_t window) {
                 return std::make_unique<Pages>(
                     loop::PageTableConfig{pages, page_size, max_slots, max_length, window});
               }),
           py::kw_only(), py::arg("pages"), py::arg("page_size"), py::arg("max_slots"), py::arg("max_length"),
           py::arg("window"))
      .def("bind", &bind, py::arg("block_table"), py::arg("lengths"), py::arg("counts"), py::arg("row_slots"),
           py::arg("record"), py::arg("status"))
      .def("reserve", &reserve, py::arg("slots"), py::arg("counts"))
      .def("hold", &hold, py::arg("slots"), py::arg("ends"), py::arg("shared") = std::vector<Numbers>())
      .def(
          "keep", [](Pages& pages, int32_t page) { pages.table.keep(page); }, py::arg("page"))
      .def(
          "content", [](const Pages& pages, int32_t page) { return pages.table.content(page); },
          py::arg("page"))
      .def("resize", &resize, py::arg("counts"))
      .def("keep_apart", &keep_apart, py::arg("first"), py::arg("kept"), py::arg("path"),
           py::arg("num_accepted"), py::arg("apart"), py::arg("reached"), py::arg("status"))
      .def("cancel", [](Pages& pages) { pages.table.cancel(); })
      .def("keep_rows", &keep_rows, py::arg("kept"), py::arg("blocked"))
      .def("commit", &commit, py::arg("kept"), py::arg("blocked"), py::arg("settles"))
      .def("settle", &settle, py::arg("record"))
      .def(
          "fork",
          [](Pages& pages, int64_t source, int64_t target, int64_t length) {
            pages.table.fork(source, target, length);
          },
          py::arg("source"), py::arg("target"), py::arg("length"))
      .def(
          "free", [](Pages& pages, int64_t slot) { pages.table.free(slot); }, py::arg("slot"))
      .def("apply_edits", &apply_edits)
      .def("apply_copies", &apply_copies, py::arg("plans"))
      .def(
          "bounds",
          [](const Pages& pages, int64_t slot) {
            return py::make_tuple(pages.table.low(slot), pages.table.high(slot));
          },
          py::arg("slot"))
      .def(
          "pages", [](const Pages& pages, int64_t slot) { return pages.table.pages(slot); }, py::arg("slot"))
      .def_property_readonly("columns", [](const Pages& pages) { return pages.table.columns(); })
      .def_property_readonly("free_pages", [](const Pages& pages) { return pages.table.free_pages(); })
      .def_property_readonly("open", [](const Pages& pages) { return pages.table.open(); })
      .def_property_readonly("rows", [](const Pages& pages) { return pages.table.rows(); })
      .def_property_readonly("in_order", [](const Pages& pages) { return pages.table.in_order(); })
      .def_property_readonly("unsettled", [](const Pages& pages) { return pages.table.unsettled(); });
  module.def("gather_apart", &gather_apart, py::arg("apart"), py::arg("lengths"), py::arg("starts"),
             py::arg("path"), py::arg("num_accepted"), py::arg("kept"));
}

}  // namespace foretoken
