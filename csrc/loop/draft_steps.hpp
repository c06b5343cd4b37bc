// The drafter's side of a round, when the drafter is a model with a cache of its own.
#pragma once

#include <cstdint>
#include <vector>

#include "loop/step.hpp"

namespace foretoken::loop {

// The one owner of the drafter's cache lengths, and the builder of its forward passes.
//
// held(slot) rows of a slot's cache are those of committed tokens. They lag behind the text by one token
// after a rejection, by two after full acceptance (the last draft was never fed), by more when rounds were
// skipped or a prompt is new. A proposal is
//   begin()                        which rows draft, and how many
//   feed() .. fed()                prefill steps, as long as a row lags by more than two tokens
//   feed()                         a decode step of one or two tokens; its last logits give the first draft
//   drawn() for k = 0 .. most-1    after every draw; the step for the next draft
//   or, where drafts form trees, rooted(): what is fed from there on is the caller's, who says with keep()
//   how much of it was accepted
// A forward pass that throws loses nothing: begin() starts over from what is committed.
class DraftSteps {
 public:
  DraftSteps(int64_t max_batch, int64_t max_length, int64_t chunk);

  void reset(int64_t slot);
  void truncate(int64_t slot, int64_t length);

  // Rows draft min(budget, cache rows that are left). Returns the most that any row drafts.
  int64_t begin(int64_t rows, const int32_t* slots, const int64_t* lengths, const int32_t* budget);

  // tokens [rows, width], counts [rows]: the text from held(slot) on, for rows as in begin(), maybe cut
  // short.
  const Step& feed(const int64_t* tokens, int64_t width, const int32_t* counts);
  void fed();

  // draws[i] is the next draft of row active()[i]. kind none: all have been drawn.
  const Step& drawn(const int64_t* draws);

  // The decode step of feed() has run, and its last tokens are the roots of trees.
  void rooted();

  // After a verdict on trees: the cache of row b's slot holds lengths[b] rows of committed tokens.
  void keep(int64_t rows, const int32_t* slots, const int64_t* lengths);

  // After a verdict: of row b, the cache keeps no more than next_lengths[b] rows.
  void observe(int64_t rows, const int32_t* slots, const int64_t* next_lengths);

  const Step& step() const { return step_; }
  int64_t rows() const { return rows_; }  // as given to begin()
  // Sized once: the binding hands out views.
  Step& step() { return step_; }
  std::vector<int64_t>& held() { return held_; }              // [max_batch], by slot
  std::vector<int32_t>& num_drafts() { return num_drafts_; }  // [B]
  std::vector<int64_t>& active() { return active_; }          // rows of the step among those of begin()
  std::vector<int64_t>& base() { return base_; }              // [active] committed tokens

 private:
  void check_slot(int64_t slot) const;
  void choose_active(int64_t drawn);
  void hold_step();
  bool prefill(const int64_t* tokens, int64_t width, const int32_t* counts);
  void decode(const int64_t* tokens, int64_t width, const int32_t* counts);

  const int64_t max_length_;
  const int64_t chunk_;
  Step step_;
  std::vector<int64_t> held_;
  int64_t rows_ = 0;
  int64_t drawn_ = 0;
  bool drawing_ = false;
  std::vector<int32_t> slots_, num_drafts_;
  std::vector<int64_t> lengths_, active_, base_;
  int64_t num_active_ = 0;
};

}  // namespace foretoken::loop
