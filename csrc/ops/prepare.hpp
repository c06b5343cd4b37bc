// Contract of preparation: rows that something edits before their law is taken, edited into a workspace.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "math/tree_index.hpp"
#include "ops/logit_edits.hpp"
#include "ops/verify.hpp"

namespace foretoken {

// Rows as verification and sampling read them. Pointers into the workspace; null: the caller's as they are.
// Rows that are never read are not written: of nodes behind num_drafts or with an impossible way to the root,
// of padded requests and unknown slots, and of draft laws that no child was drawn from.
struct PreparedRows {
  const float* target = nullptr;  // [B, T, V]; of sample: [B, V]
  const float* draft = nullptr;   // [B, R, E] draft logits in the drafter's order
  const float* mapped = nullptr;  // [B, R, V] draft logits or probabilities by target id; absent: -inf or 0
  const uint8_t* draft_unsound = nullptr;     // [B, R] two columns share an id, or padding has mass
  const uint8_t* history_unusable = nullptr;  // [B] the history does not reach base: kBadRow
  int64_t draft_rows = 0;                     // R: T if draft_by_node, else M
  int64_t draft_size = 0;                     // E: Vd with a map, min(Vd, V) without
  bool draft_by_node = false;  // nodes may share a law row and differ in what it becomes on their path

  FORETOKEN_HD int64_t draft_row_of(int64_t b, int64_t node, int64_t law_row) const {
    return b * draft_rows + (draft_by_node ? node : law_row);
  }
};

// What has to be prepared, known without looking at any data: whether tables have constraints is known before
// they are on the device.
struct Preparation {
  bool target = false, draft = false, mapped = false, padding = false, history = false;
  bool inverse = false;  // constraints speak of target ids, the rows of the drafter's
  bool draft_by_node = false;
  int64_t batch = 0, target_rows = 0, target_size = 0, draft_rows = 0, draft_size = 0, vocab = 0;
  int64_t bytes = 0;  // of workspace, aligned to 16

  bool any() const { return target || draft || mapped || padding || history; }
};

// One kind of rows, R of each request.
struct EditJob {
  TensorView source;  // [B, rows, >= size], or [rows of all, size] where the request has row offsets
  TensorView bitmask;
  const Constraints* constraints = nullptr;  // [S]
  int64_t rows = 0, size = 0;
  int64_t groups = 1;  // blocks that share the rows of a request
  float* out = nullptr;
};

// What the blocks of a preparation read and write.
struct PrepareArgs {
  int64_t batch = 0, nodes = 1, vocab = 0, slots_there = 0;
  int64_t target_rows_there = 0;  // of all requests, where they have row offsets
  TensorView draft_tokens, parents, num_drafts, row_offsets;
  TensorView path;  // of sample, in place of a tree
  TensorView base, slots, draft_row, rules, vocab_map;
  const float* temperature = nullptr;  // [S]; 0: no draft law is read
  HistoryView history;
  const Constraints* judged[2] = {};  // whose history has to reach the base
  EditJob target, draft;
  bool mapped_target = false;  // the map is of the target's rows: sample
  bool draft_by_node = false;
  int64_t law_rows = 0, draft_rows = 0;  // M; R
  TensorView probs;                      // [B, M, Vd]
  bool padding = false;
  int32_t* inverse = nullptr;           // [vocab] element of each id; -1: none
  float* mapped = nullptr;              // [B, R, vocab]
  uint8_t* made = nullptr;              // [B, R] the draft row has been written
  uint8_t* unsound = nullptr;           // [B, R]
  uint8_t* history_unusable = nullptr;  // [B]
};

namespace preparing {

struct Places {
  float *target = nullptr, *draft = nullptr, *mapped = nullptr;
  uint8_t *made = nullptr, *unsound = nullptr, *history_unusable = nullptr;
  int32_t* inverse = nullptr;
  int64_t bytes = 0;
};

inline Places places_in(const Preparation& what, void* workspace) {
  Places places;
  const auto next = [&](bool wanted, auto*& place, int64_t count) {
    if (!wanted) return;
    using Element = std::remove_reference_t<decltype(*place)>;
    place = reinterpret_cast<Element*>(reinterpret_cast<uintptr_t>(workspace) +
                                       static_cast<uintptr_t>(places.bytes));
    places.bytes += (count * static_cast<int64_t>(sizeof(Element)) + 255) / 256 * 256;
  };
  const int64_t draft_rows = what.batch * what.draft_rows;
  next(what.target, places.target, what.batch * what.target_rows * what.target_size);
  next(what.draft, places.draft, draft_rows * what.draft_size);
  next(what.mapped, places.mapped, draft_rows * what.vocab);
  next(what.draft, places.made, draft_rows);
  next(what.mapped || what.padding, places.unsound, draft_rows);
  next(what.history, places.history_unusable, what.batch);
  next(what.inverse, places.inverse, what.vocab);
  return places;
}

// As the rules have it: a deterministic draw has no law, and these two read none.
inline bool reads_draft_laws(const VerifyArgs& args) {
  const bool never = !args.rules && (args.rule == Rule::target_only || args.rule == Rule::coupled);
  return args.draw != Draw::deterministic && !never;
}

inline PreparedRows rows_of(const Preparation& what, const Places& places) {
  PreparedRows rows;
  rows.target = places.target;
  rows.draft = places.draft;
  rows.mapped = places.mapped;
  rows.draft_unsound = places.unsound;
  rows.history_unusable = places.history_unusable;
  rows.draft_rows = what.draft_rows;
  rows.draft_size = what.draft_size;
  rows.draft_by_node = what.draft_by_node;
  return rows;
}

}  // namespace preparing

inline Preparation preparation_of(const VerifyArgs& args) {
  Preparation what;
  const bool target_constrained = args.target_constrained || args.sampling.constraints != nullptr;
  const bool draft_constrained =
      args.draft_logits && (args.draft_constrained || args.draft_sampling.constraints != nullptr);
  const bool reads_laws = preparing::reads_draft_laws(args);
  const TensorView& laws = args.draft_logits ? args.draft_logits : args.draft_probs;
  what.batch = args.draft_tokens.shape[0];
  what.vocab = what.target_size = args.target_logits.shape[args.target_logits.rank - 1];
  what.target_rows = args.draft_tokens.shape[1] + 1;
  what.target = target_constrained || args.bitmask;
  what.history = target_constrained || draft_constrained;
  if (reads_laws && laws) {
    what.draft = args.draft_logits && (args.vocab_map || draft_constrained);
    what.mapped = static_cast<bool>(args.vocab_map);
    what.padding = args.draft_probs && !args.vocab_map && laws.shape[2] > what.vocab;
    what.inverse = args.vocab_map && draft_constrained;
    what.draft_by_node = draft_constrained && args.draft_row;
    what.draft_rows = what.draft_by_node ? what.target_rows : laws.shape[1];
    what.draft_size = args.vocab_map || laws.shape[2] < what.vocab ? laws.shape[2] : what.vocab;
  }
  what.bytes = preparing::places_in(what, nullptr).bytes;
  return what;
}

inline Preparation preparation_of(const SampleArgs& args) {
  const bool constrained = args.constrained || args.sampling.constraints != nullptr;
  if (constrained && args.path && args.path.shape[1] > kMaxNodes) {
    throw std::invalid_argument("path: expected at most " + std::to_string(kMaxNodes) +
                                " drafted tokens a row, got " + std::to_string(args.path.shape[1]));
  }
  Preparation what;
  what.batch = args.logits.shape[0];
  what.target_rows = 1;
  what.target_size = args.logits.shape[1];
  what.vocab = args.emitted_vocab;
  what.target = constrained || args.bitmask || args.vocab_map;
  what.history = constrained;
  what.inverse = constrained && args.vocab_map;
  what.bytes = preparing::places_in(what, nullptr).bytes;
  return what;
}

inline PrepareArgs prepare_args(const VerifyArgs& args, const Preparation& what, void* workspace) {
  const preparing::Places places = preparing::places_in(what, workspace);
  PrepareArgs to;
  to.batch = what.batch;
  to.nodes = args.draft_tokens.shape[1] + 1;
  to.vocab = what.vocab;
  to.slots_there =
      args.sampling.size < args.draft_sampling.size ? args.sampling.size : args.draft_sampling.size;
  to.draft_tokens = args.draft_tokens;
  to.parents = args.parents;
  to.num_drafts = args.num_drafts;
  to.row_offsets = args.row_offsets;
  to.target_rows_there = args.target_logits.shape[0];
  to.base = args.base;
  to.slots = args.slots;
  to.draft_row = args.draft_row;
  to.rules = args.rules;
  to.vocab_map = args.vocab_map;
  to.temperature = args.sampling.temperature;
  to.history = args.history;
  to.judged[0] = args.sampling.constraints;
  to.judged[1] = args.draft_logits ? args.draft_sampling.constraints : nullptr;
  if (what.target) {
    to.target.source = args.target_logits;
    to.target.bitmask = args.bitmask;
    to.target.constraints = args.sampling.constraints;
    to.target.rows = what.target_rows;
    to.target.size = what.target_size;
    to.target.out = places.target;
  }
  if (what.draft) {
    to.draft.source = args.draft_logits;
    to.draft.constraints = args.draft_sampling.constraints;
    to.draft.rows = what.draft_rows;
    to.draft.size = what.draft_size;
    to.draft.out = places.draft;
  }
  to.draft_by_node = what.draft_by_node;
  to.law_rows = args.draft_logits ? args.draft_logits.shape[1] : args.draft_probs.shape[1];
  to.draft_rows = what.draft_rows;
  if (what.mapped || what.padding) to.probs = args.draft_probs;
  to.padding = what.padding;
  to.inverse = places.inverse;
  to.mapped = places.mapped;
  to.made = places.made;
  to.unsound = places.unsound;
  to.history_unusable = places.history_unusable;
  return to;
}

inline PrepareArgs prepare_args(const SampleArgs& args, const Preparation& what, void* workspace) {
  const preparing::Places places = preparing::places_in(what, workspace);
  PrepareArgs to;
  to.batch = what.batch;
  to.vocab = what.vocab;
  to.slots_there = args.sampling.size;
  if (what.history) to.path = args.path;
  to.base = args.base;
  to.slots = args.slots;
  to.vocab_map = args.vocab_map;
  to.mapped_target = static_cast<bool>(args.vocab_map);
  to.temperature = args.sampling.temperature;
  to.history = args.history;
  to.judged[0] = args.sampling.constraints;
  if (what.target) {
    to.target.source = args.logits;
    to.target.bitmask = args.bitmask;
    to.target.constraints = args.sampling.constraints;
    to.target.rows = 1;
    to.target.size = what.target_size;
    to.target.out = places.target;
  }
  to.inverse = places.inverse;
  to.history_unusable = places.history_unusable;
  return to;
}

}  // namespace foretoken
