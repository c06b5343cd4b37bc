// The path that ranks first among independent ones, see math/path_interval.hpp.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "math/path_interval.hpp"
#include "math/tree_index.hpp"

namespace foretoken::cpu {

// One level: the tokens in rank order, with the draft mass before each.
template <class Mass>
class RankedTokens {
 public:
  RankedTokens(const std::vector<double>& target, const std::vector<Mass>& draft)
      : draft_(draft), order_(target.size()), place_(target.size()), before_(target.size()) {
    std::iota(order_.begin(), order_.end(), int64_t{0});
    std::vector<double> ratio(target.size(), -1.0);  // what the drafter never draws ranks last
    for (size_t id = 0; id < target.size(); ++id) {
      if (draft[id] > Mass{0}) ratio[id] = target[id] / static_cast<double>(draft[id]);
    }
    std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) {
      return ratio[static_cast<size_t>(a)] < ratio[static_cast<size_t>(b)];
    });
    for (size_t i = 0; i < order_.size(); ++i) {
      const size_t id = static_cast<size_t>(order_[i]);
      place_[id] = i;
      before_[id] = total_;
      total_ += draft[id];
    }
  }

  size_t place(int64_t id) const { return place_[static_cast<size_t>(id)]; }

  std::vector<double> law_of_first(const PathInterval& at) const {
    const double whole = at.slope();
    std::vector<double> law(draft_.size());
    for (size_t id = 0; id < law.size(); ++id)
      law[id] = at.first(share(before_[id]), share(draft_[id]), whole);
    return law;
  }

  PathInterval narrowed(const PathInterval& at, int64_t id) const {
    const size_t index = static_cast<size_t>(id);
    return at.narrowed(share(before_[index]), share(draft_[index]));
  }

 private:
  double share(Mass mass) const { return static_cast<double>(mass) / static_cast<double>(total_); }

  const std::vector<Mass>& draft_;
  std::vector<int64_t> order_;
  std::vector<size_t> place_;
  std::vector<Mass> before_;
  Mass total_ = 0;
};

// Leaves of the tree the path that ranks first alone, and gives its nodes the law of being first as draft
// law. Paths may share the nodes of a common prefix or have their own.
template <class Rows>
void keep_first_path(Rows& rows, TreeIndex& tree, int32_t num_paths) {
  std::vector<int32_t> here{0};  // the nodes that the best prefix ends in
  std::vector<std::vector<double>> laws;
  PathInterval at{0.0, 1.0, num_paths};
  while (rows.usable(here[0])) {
    std::vector<int32_t> children;
    for (int32_t node : here) {
      for (int32_t child = tree.first_child[node]; child != kNoNode; child = tree.next_sibling[child]) {
        children.push_back(child);
      }
    }
    if (children.empty()) break;
    const auto draft = rows.weights_of_draft(here[0]);
    const RankedTokens ranked(rows.weights_of_target(here[0]), draft);
    int64_t best = rows.token(children[0]);
    for (int32_t child : children) {
      if (ranked.place(rows.token(child)) > ranked.place(best)) best = rows.token(child);
    }
    laws.push_back(ranked.law_of_first(at));
    at = ranked.narrowed(at, best);
    here.clear();
    for (int32_t child : children) {
      if (rows.token(child) == best) here.push_back(child);
    }
  }
  int16_t path[kMaxNodes];
  const int32_t depth = path_to(tree, here[0], path);
  for (int32_t i = 0; i < depth; ++i)
    rows.set_draft_law(i == 0 ? 0 : path[i - 1], laws[static_cast<size_t>(i)]);
  keep_path(tree, path, depth);
}

}  // namespace foretoken::cpu
