// The session where the drafts of a round form trees.
#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>

#include "loop/session.hpp"

namespace foretoken::loop {
namespace {

constexpr int64_t kMostNodes = 256;

std::string text(int64_t number) { return std::to_string(number); }

}  // namespace

void Session::check_drafts(const Drafts& drafts) const {
  if (drafts.parents != nullptr && config_.num_nodes == 0) {
    throw std::invalid_argument("proposal.parents: expected None, as this session drafts chains, got a tree");
  }
  for (size_t b = 0; b < rows_.size(); ++b) {
    const int64_t budget = drafts.parents == nullptr ? budget_[b] : nodes_[b];
    const int64_t most = std::min(budget, drafts.columns), count = drafts.num_drafts[b];
    if (count < 0 || count > most) {
      throw std::invalid_argument("num_drafts: expected 0 to " + text(most) + " in row " + text(b) +
                                  ", got " + text(count));
    }
    if (drafts.parents == nullptr) continue;
    if (const int64_t depth = deepest(drafts, static_cast<int64_t>(b)); depth > budget_[b]) {
      throw std::invalid_argument("proposal.parents: expected paths of at most " + text(budget_[b]) +
                                  " drafts in row " + text(b) + ", got " + text(depth));
    }
  }
}

// The longest path of a row's tree.
int64_t Session::deepest(const Drafts& drafts, int64_t b) const {
  std::array<int32_t, kMostNodes> depth{};
  const int32_t* const parents = drafts.parents + b * drafts.parents_stride;
  int32_t most = 0;
  for (int32_t i = 0; i < drafts.num_drafts[b]; ++i) {
    if (parents[i] < 0 || parents[i] > i) {
      throw std::invalid_argument("proposal.parents: expected a node number in [0, " + text(i) +
                                  "] at entry " + text(i) + " of row " + text(b) + ", got " +
                                  text(parents[i]));
    }
    depth[i + 1] = depth[parents[i]] + 1;
    most = std::max(most, depth[i + 1]);
  }
  return most;
}

bool Session::are_chains(const Drafts& drafts) const {
  for (size_t b = 0; b < rows_.size(); ++b) {
    const int32_t* const parents = drafts.parents + static_cast<int64_t>(b) * drafts.parents_stride;
    for (int32_t i = 0; i < num_drafts_[b]; ++i) {
      if (parents[i] != i) return false;
    }
  }
  return true;
}

// Positions and ancestor words of the step that has just been built. Padding sees itself and what all see.
void Session::see_trees() {
  const int64_t columns = step_.columns, words = words_of(columns);
  step_.tree = true;
  std::fill_n(step_.ancestors.begin(), step_.rows * columns * words, int64_t{0});
  for (int64_t b = 0; b < step_.rows; ++b) {
    const int32_t* const parents = &parents_[b * drafted_columns_];
    int64_t* const positions = &step_.positions[b * columns];
    int64_t* const seen = &step_.ancestors[b * columns * words];
    step_.visible[b] = step_.lengths[b];
    for (int64_t node = 0; node < columns; ++node) {
      int64_t* const own = seen + node * words;
      const bool drafted = node > 0 && node <= num_drafts_[b];
      if (drafted) std::copy_n(seen + parents[node - 1] * words, words, own);
      own[node / kWordBits] |= static_cast<int64_t>(uint64_t{1} << (node % kWordBits));
      positions[node] = drafted ? positions[parents[node - 1]] + 1 : step_.lengths[b];
    }
  }
}

void Session::check_path(const Verdict& verdict, int64_t b) const {
  const int32_t* const path = verdict.path + b * (step_.columns - 1);
  int32_t node = 0;
  for (int32_t i = 0; i < verdict.num_accepted[b]; ++i) {
    const bool child =
        path[i] > node && path[i] <= num_drafts_[b] && parents_[b * drafted_columns_ + path[i] - 1] == node;
    if (!child) {
      throw std::runtime_error("verdict: row " + text(b) + " accepts node " + text(path[i]) +
                               ", which is no child of node " + text(node));
    }
    node = path[i];
  }
}

// Accepted nodes that do not stand where a chain would have put them.
int32_t Session::moved_rows(const Verdict& verdict, int64_t b) const {
  if (!trees_) return 0;
  const int32_t* const path = verdict.path + b * (step_.columns - 1);
  int32_t moved = 0;
  for (int32_t i = 0; i < verdict.num_accepted[b]; ++i) moved += path[i] != i + 1;
  return moved;
}

// Nothing was rejected: the path ends where the drafts do.
bool Session::closes_with_bonus(const Verdict& verdict, int64_t b) const {
  const int32_t accepted = verdict.num_accepted[b];
  if (!trees_) return accepted == num_drafts_[b];
  const int32_t last = accepted == 0 ? 0 : verdict.path[b * (step_.columns - 1) + accepted - 1];
  const auto parents = parents_.begin() + b * drafted_columns_;
  return std::find(parents, parents + num_drafts_[b], last) == parents + num_drafts_[b];
}

}  // namespace foretoken::loop
