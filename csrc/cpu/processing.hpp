// What happens to a row of logits before its law is taken: bias, penalties, bad words, minimum length,
// grammar. A row that nothing touches is never copied.
#pragma once

#include <vector>

#include "cpu/rows.hpp"
#include "cpu/views.hpp"

namespace foretoken::cpu {

// Everything about one request that changes its logits, gathered once; `edit` applies it node by node. Its
// text is read once, and only as far as a constraint asks for it.
class LogitEdits {
 public:
  // `vocab_map` (or null) gives the target id of each element of the rows; `vocab` is the number of target
  // ids. Views have to outlive the edits.
  LogitEdits(const SamplingView& sampling, int64_t slot, const HistoryView& history, int64_t base,
             int64_t vocab, const TensorView& vocab_map);

  bool usable() const { return usable_; }  // false: the history does not reach `base`
  bool any() const { return constraints_ != nullptr; }

  // Copies a row to `out` and edits it. `path`: the tokens drafted between `base` and this row.
  void edit(const Row& row, const std::vector<int64_t>& path, const int32_t* bitmask, int64_t bitmask_stride,
            std::vector<float>& out) const;

 private:
  // Element of a row for a target id, -1 if it has none.
  int64_t element_of(int64_t id) const;
  void count(int64_t prompt);
  void penalise(const std::vector<int64_t>& path, std::vector<float>& out) const;
  void ban_words(const std::vector<int64_t>& path, std::vector<float>& out) const;
  void mask(int64_t id, std::vector<float>& out) const;

  const Constraints* constraints_ = nullptr;
  const TensorView& map_;
  const TensorView& text_;
  int64_t slot_, base_, vocab_;
  bool usable_ = true;
  int64_t generated_ = 0;         // committed tokens that are not prompt
  std::vector<int32_t> inverse_;  // [vocab] element of each target id, with a map only
  std::vector<int64_t> seen_;     // distinct ids of prompt and output
  std::vector<int32_t> counts_;   // [vocab] how often each of them was generated; kUnseen: it is not there
};

}  // namespace foretoken::cpu
