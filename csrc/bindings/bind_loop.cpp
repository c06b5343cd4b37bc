// The round: Session and DraftSteps. Per-row arrays that Python only reads are handed out once, as views.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/boundary.hpp"
#include "bindings/views.hpp"
#include "loop/draft_steps.hpp"
#include "loop/session.hpp"
#include "ops/commit.hpp"

namespace foretoken {

namespace py = pybind11;

namespace {

using boundary::Dim;
using boundary::Intake;
using boundary::Layout;
using boundary::view_of;
using loop::DraftSteps;
using loop::Finish;
using loop::Session;
using loop::Step;

template <typename T>
T* data(const TensorView& view) {
  return static_cast<T*>(view.data);
}

// (kind, rows, columns, uniform, max_length_after, first slot if slots are contiguous else -1, of trees)
py::tuple shape_of(const Step& step) {
  return py::make_tuple(static_cast<int>(step.kind), step.rows, step.columns, step.uniform,
                        step.max_length_after, step.contiguous_slots() ? step.slots[0] : -1, step.tree);
}

py::dict arrays_of(Step& step, py::handle owner) {
  py::dict arrays;
  arrays["tokens"] = view_of(step.tokens, owner);
  arrays["positions"] = view_of(step.positions, owner);
  arrays["lengths"] = view_of(step.lengths, owner);
  arrays["slots"] = view_of(step.slots, owner);
  arrays["num_tokens"] = view_of(step.num_tokens, owner);
  arrays["visible"] = view_of(step.visible, owner);
  arrays["ancestors"] = view_of(step.ancestors, owner);
  return arrays;
}

py::dict dict_of(const loop::Counters& counters) {
  py::dict sums;
  sums["rounds"] = counters.rounds;
  sums["drafts"] = counters.drafts;
  sums["draft_tokens"] = counters.draft_tokens;
  sums["accepted_tokens"] = counters.accepted_tokens;
  sums["emitted_tokens"] = counters.emitted_tokens;
  sums["rollbacks"] = counters.rollbacks;
  sums["moved_rows"] = counters.moved_rows;
  sums["bad_draft_rounds"] = counters.bad_draft_rounds;
  sums["law_lost_rounds"] = counters.law_lost_rounds;
  sums["accepted_tokens_per_pos"] = counters.accepted_per_pos;
  sums["rounds_by_drafts"] = counters.rounds_by_drafts;
  return sums;
}

Finish finish_of(int code) {
  if (code < 1 || code > static_cast<int>(Finish::cancelled))
    throw py::value_error("reason: not a finish reason");
  return static_cast<Finish>(code);
}

int64_t admit(Session& session, py::handle prompt_ids, int64_t max_new_tokens, int64_t min_new_tokens,
              int64_t num_drafts, std::vector<int64_t> eos_ids, std::vector<int64_t> stop_ids) {
  Intake intake("admit");
  int64_t count = 0;
  const TensorView prompt =
      intake.read(prompt_ids, "prompt_ids", DType::int64, {Dim::bind(count, "L")}, Layout::contiguous);
  loop::Limits limits;
  limits.max_new_tokens = max_new_tokens;
  limits.min_new_tokens = min_new_tokens;
  limits.num_drafts = num_drafts;
  limits.eos_ids = std::move(eos_ids);
  limits.stop_ids = std::move(stop_ids);
  return session.admit(data<const int64_t>(prompt), count, std::move(limits));
}

// (shape of the step, the outstanding one again, needs drafts, most drafts of a row, version of the rows, any
// held open, any got a slot)
py::tuple plan(Session& session, bool drafting) {
  const bool again = session.plan(drafting);
  return py::make_tuple(shape_of(session.step()), again, session.needs_drafts(), session.max_budget(),
                        session.rows_version(), session.any_held_open(), !session.assigned().empty());
}

py::tuple draft(Session& session, py::handle tokens, py::handle num_drafts, py::handle parents) {
  Intake intake("draft");
  const int64_t rows = session.step().rows;
  int64_t columns = 0;
  const TensorView drafts =
      intake.read(tokens, "proposal.tokens", DType::int64, {rows, Dim::bind(columns, "K")});
  const TensorView counts =
      intake.read(num_drafts, "proposal.num_drafts", DType::int32, {rows}, Layout::contiguous);
  const TensorView above = intake.read_or_null(parents, "proposal.parents", DType::int32, {rows, columns});
  session.draft({data<const int64_t>(drafts), drafts.strides[0], columns, data<const int32_t>(counts),
                 data<const int32_t>(above), above.strides[0]});
  return shape_of(session.step());
}

// (shape of the step, the outstanding one again, most drafts of a row, version of the rows, any held open,
// any got a slot)
py::tuple plan_ahead(Session& session, bool admits) {
  const bool again = session.plan_ahead(admits);
  return py::make_tuple(shape_of(session.step()), again, session.max_budget(), session.rows_version(),
                        session.any_held_open(), !session.assigned().empty());
}

void settle(Session& session, py::handle record, int64_t columns) {
  Intake intake("settle");
  if (session.in_flight() == 0) throw std::logic_error("settle: no round is in flight");
  const int64_t width = record_width(columns, session.config().logprobs);
  const TensorView lines = intake.read(record, "record", DType::int32, {session.rows_in_flight(), width});
  session.settle(data<const int32_t>(lines), lines.strides[0], columns);
}

int64_t tokens_from(Session& session, py::handle starts) {
  Intake intake("tokens_from");
  int64_t slots = 0;
  const TensorView view =
      intake.read(starts, "starts", DType::int64, {Dim::bind(slots, "max_batch")}, Layout::contiguous);
  return session.tokens_from(data<const int64_t>(view), slots);
}

void commit_decode(Session& session, py::handle tokens, py::handle num_emitted, py::handle num_accepted,
                   py::handle status, py::handle logprobs, py::handle path) {
  Intake intake("commit");
  const int64_t rows = session.step().rows, columns = session.step().columns;
  const TensorView ids =
      intake.read(tokens, "verdict.tokens", DType::int64, {rows, columns}, Layout::contiguous);
  const TensorView emitted =
      intake.read(num_emitted, "verdict.num_emitted", DType::int32, {rows}, Layout::contiguous);
  const TensorView accepted =
      intake.read(num_accepted, "verdict.num_accepted", DType::int32, {rows}, Layout::contiguous);
  const TensorView flags = intake.read(status, "verdict.status", DType::int32, {rows}, Layout::contiguous);
  const TensorView probs =
      intake.read_or_null(logprobs, "verdict.logprobs", DType::float32, {rows, columns}, Layout::contiguous);
  const TensorView nodes =
      intake.read(path, "verdict.path", DType::int32, {rows, columns - 1}, Layout::contiguous);
  session.commit_decode({data<const int64_t>(ids), columns, data<const int32_t>(emitted),
                         data<const int32_t>(accepted), data<const int32_t>(flags), data<const float>(probs),
                         data<const int32_t>(nodes)});
}

py::list list_of(const int64_t* first, const int64_t* last) {
  py::list items(last - first);
  for (py::ssize_t i = 0; first + i != last; ++i) items[i] = first[i];
  return items;
}

// (request, reason, retracted, num_drafts, tokens, kinds as bytes, logprobs or None); None: nothing to tell.
py::object take_event(Session& session) {
  loop::Event event;
  if (!session.take_event(event)) return py::none();
  const int64_t* const first = event.tokens.data();
  py::object logprobs = py::none();
  if (session.config().logprobs) logprobs = py::cast(event.logprobs);
  return py::make_tuple(event.id, static_cast<int>(event.finish), event.retracted, event.num_drafts,
                        list_of(first, first + event.tokens.size()),
                        py::bytes(reinterpret_cast<const char*>(event.kinds.data()), event.kinds.size()),
                        logprobs);
}

py::list tokens(const Session& session, int64_t id, int64_t start) {
  const auto& all = session.record(id).tokens;
  const int64_t size = static_cast<int64_t>(all.size());
  return list_of(all.data() + std::min(start, size), all.data() + size);
}

// (phase, finish, slot or -1, prompt length, generated tokens, status bits)
py::tuple state(const Session& session, int64_t id) {
  const loop::Record& record = session.record(id);
  const bool live = record.phase == loop::Phase::prefill || record.phase == loop::Phase::decode;
  return py::make_tuple(static_cast<int>(record.phase), static_cast<int>(record.finish),
                        live ? record.slot : -1, record.prompt_length, record.generated(), record.status);
}

py::dict counters(const Session& session) {
  py::dict sums = dict_of(session.counters());
  sums["steps"] = session.steps();
  sums["bad_drafts"] = session.bad_drafts();
  return sums;
}

py::dict session_arrays(py::object self) {
  Session& session = self.cast<Session&>();
  py::dict arrays = arrays_of(session.step(), self);
  arrays["base"] = view_of(session.base(), self);
  arrays["limits"] = view_of(session.limits(), self);
  arrays["budget"] = view_of(session.budget(), self);
  arrays["nodes"] = view_of(session.nodes(), self);
  arrays["num_drafts"] = view_of(session.num_drafts(), self);
  arrays["drafts"] = view_of(session.drafts(), self);
  arrays["parents"] = view_of(session.parents(), self);
  arrays["from_tokens"] = view_of(session.from_tokens(), self);
  arrays["from_counts"] = view_of(session.from_counts(), self);
  arrays["slot_lengths"] = view_of(session.lengths(), self);
  arrays["shortfall"] = view_of(session.step().shortfall, self);
  return arrays;
}

// (tokens [max_batch * max_length], prompt lengths [max_batch]) by slot, kept up to date from now on.
py::tuple keep_history(py::object self) {
  Session& session = self.cast<Session&>();
  session.keep_history();
  return py::make_tuple(view_of(session.history(), self), view_of(session.prompt_lengths(), self));
}

void bind_session(py::module_& module) {
  py::class_<Session>(module, "Session", "State machine behind foretoken.Session.")
      .def(py::init([](int64_t max_batch, int64_t vocab_size, int64_t max_length, int64_t num_drafts,
                       int64_t nodes, int64_t prefill_chunk, bool logprobs) {
             return std::make_unique<Session>(loop::SessionConfig{
                 max_batch, vocab_size, max_length, num_drafts, nodes, prefill_chunk, logprobs});
           }),
           py::kw_only(), py::arg("max_batch"), py::arg("vocab_size"), py::arg("max_length"),
           py::arg("num_drafts"), py::arg("nodes"), py::arg("prefill_chunk"), py::arg("logprobs"))
      .def("arrays", &session_arrays, "Views of the per-row arrays, by name; valid for the session's life.")
      .def("admit", &admit, py::arg("prompt_ids"), py::arg("max_new_tokens"), py::arg("min_new_tokens"),
           py::arg("num_drafts"), py::arg("eos_ids"), py::arg("stop_ids"))
      .def("plan", &plan, py::arg("drafting"))
      .def("draft", &draft, py::arg("tokens"), py::arg("num_drafts"), py::arg("parents"))
      .def("plan_ahead", &plan_ahead, py::arg("admits") = true)
      .def("launch", &Session::launch)
      .def("settle", &settle, py::arg("record"), py::arg("columns"))
      .def_property_readonly("in_flight", &Session::in_flight, "Rounds issued and not settled.")
      .def("tokens_from", &tokens_from, py::arg("starts"))
      .def("keep_history", &keep_history)
      .def("commit_prefill", &Session::commit_prefill)
      .def("commit_decode", &commit_decode, py::arg("tokens"), py::arg("num_emitted"),
           py::arg("num_accepted"), py::arg("status"), py::arg("logprobs"), py::arg("path"))
      .def(
          "finish", [](Session& session, int64_t id, int reason) { session.finish(id, finish_of(reason)); },
          py::arg("request"), py::arg("reason"))
      .def(
          "truncate",
          [](Session& session, int64_t id, int64_t n, int reason) {
            return session.truncate(id, n, finish_of(reason));
          },
          py::arg("request"), py::arg("n"), py::arg("reason"))
      .def("release", &Session::release, py::arg("request"))
      .def("take_event", &take_event)
      .def("tokens", &tokens, py::arg("request"), py::arg("start"))
      .def("state", &state, py::arg("request"))
      .def("counters", &counters)
      .def(
          "request_counters",
          [](const Session& session, int64_t id) { return dict_of(session.record(id).counters); },
          py::arg("request"))
      .def("row_ids", &Session::row_ids)
      .def("kept_rows", &Session::kept_rows)
      .def("held_open", &Session::held_open)
      .def("assigned", &Session::assigned)
      .def("forget_assigned", &Session::forget_assigned)
      .def_property_readonly("live", &Session::live)
      .def_property_readonly("waiting", &Session::waiting);
}

int64_t begin(DraftSteps& steps, py::handle slots, py::handle lengths, py::handle budget) {
  Intake intake("propose");
  int64_t rows = 0;
  const TensorView s = intake.read(slots, "slots", DType::int32, {Dim::bind(rows, "B")}, Layout::contiguous);
  const TensorView l = intake.read(lengths, "lengths", DType::int64, {rows}, Layout::contiguous);
  const TensorView k = intake.read(budget, "budget", DType::int32, {rows}, Layout::contiguous);
  return steps.begin(rows, data<const int32_t>(s), data<const int64_t>(l), data<const int32_t>(k));
}

py::tuple feed(DraftSteps& steps, py::handle tokens, py::handle counts) {
  Intake intake("propose");
  const int64_t rows = steps.rows();
  int64_t width = 0;
  const TensorView ids =
      intake.read(tokens, "tokens", DType::int64, {rows, Dim::bind(width, "W")}, Layout::contiguous);
  const TensorView n = intake.read(counts, "counts", DType::int32, {rows}, Layout::contiguous);
  return shape_of(steps.feed(data<const int64_t>(ids), width, data<const int32_t>(n)));
}

// `out` [B, K] takes the draws as draft number `k` of their rows.
py::tuple drawn(DraftSteps& steps, py::handle draws, py::handle out, int64_t k) {
  Intake intake("propose");
  const int64_t active = steps.step().rows;
  int64_t columns = 0;
  const TensorView ids = intake.read(draws, "draws", DType::int64, {active}, Layout::contiguous);
  const TensorView drafts =
      intake.write(out, "drafts", DType::int64, {steps.rows(), Dim::bind(columns, "K", k + 1)});
  for (int64_t i = 0; i < active; ++i) {
    data<int64_t>(drafts)[steps.active()[i] * drafts.strides[0] + k] = data<const int64_t>(ids)[i];
  }
  return shape_of(steps.drawn(data<const int64_t>(ids)));
}

void keep(DraftSteps& steps, py::handle slots, py::handle lengths) {
  Intake intake("observe");
  int64_t rows = 0;
  const TensorView s = intake.read(slots, "slots", DType::int32, {Dim::bind(rows, "B")}, Layout::contiguous);
  const TensorView l = intake.read(lengths, "lengths", DType::int64, {rows}, Layout::contiguous);
  steps.keep(rows, data<const int32_t>(s), data<const int64_t>(l));
}

void observe(DraftSteps& steps, py::handle slots, py::handle next_lengths) {
  Intake intake("observe");
  int64_t rows = 0;
  const TensorView s = intake.read(slots, "slots", DType::int32, {Dim::bind(rows, "B")}, Layout::contiguous);
  const TensorView l = intake.read(next_lengths, "next_lengths", DType::int64, {rows}, Layout::contiguous);
  steps.observe(rows, data<const int32_t>(s), data<const int64_t>(l));
}

py::dict draft_arrays(py::object self) {
  DraftSteps& steps = self.cast<DraftSteps&>();
  py::dict arrays = arrays_of(steps.step(), self);
  arrays["base"] = view_of(steps.base(), self);
  arrays["held"] = view_of(steps.held(), self);
  arrays["num_drafts"] = view_of(steps.num_drafts(), self);
  arrays["active"] = view_of(steps.active(), self);
  return arrays;
}

void bind_draft_steps(py::module_& module) {
  py::class_<DraftSteps>(module, "DraftSteps", "Cache lengths and forward passes of a model drafter.")
      .def(py::init<int64_t, int64_t, int64_t>(), py::kw_only(), py::arg("max_batch"), py::arg("max_length"),
           py::arg("chunk"))
      .def("arrays", &draft_arrays, "Views of the per-row arrays, by name; valid for the object's life.")
      .def("reset", &DraftSteps::reset, py::arg("slot"))
      .def("truncate", &DraftSteps::truncate, py::arg("slot"), py::arg("length"))
      .def("begin", &begin, py::arg("slots"), py::arg("lengths"), py::arg("budget"))
      .def("feed", &feed, py::arg("tokens"), py::arg("counts"))
      .def("fed", &DraftSteps::fed)
      .def("drawn", &drawn, py::arg("draws"), py::arg("out"), py::arg("k"))
      .def("rooted", &DraftSteps::rooted)
      .def("keep", &keep, py::arg("slots"), py::arg("lengths"))
      .def("observe", &observe, py::arg("slots"), py::arg("next_lengths"));
}

}  // namespace

void register_loop(py::module_& module) {
  bind_session(module);
  bind_draft_steps(module);
}

}  // namespace foretoken
