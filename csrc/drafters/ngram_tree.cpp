#include "drafters/ngram_tree.hpp"

#include <algorithm>

#include "drafters/ngram_index.hpp"

namespace foretoken::drafters {
namespace {

constexpr int32_t kNone = -1;
constexpr int kMostOccurrences = 32;
constexpr int kMostVisits = 96;  // of occurrences, those known from longer matches included
constexpr double kWeightOfToken =
    4.0;  // an occurrence weighs so much more for every token its match is longer

}  // namespace

void ContinuationTree::begin(const Budget& budget) {
  budget_ = budget;
  nodes_.clear();
  nodes_.push_back({0, 0.0, 1.0, kNone, 0, kNone, kNone, 0, true});
  first_path_ = taken_ = 0;
  least_ = 0.0;
}

int32_t ContinuationTree::child_of(int32_t parent, int64_t token) {
  int32_t last = kNone;
  for (int32_t child = nodes_[parent].first_child; child != kNone; child = nodes_[child].next_sibling) {
    if (nodes_[child].token == token) return child;
    last = child;
  }
  const int32_t added = static_cast<int32_t>(nodes_.size());
  nodes_.push_back({token, 0.0, 0.0, parent, nodes_[parent].depth + 1, kNone, kNone, 0, false});
  (last == kNone ? nodes_[parent].first_child : nodes_[last].next_sibling) = added;
  return added;
}

void ContinuationTree::add(const int64_t* tokens, int64_t count, double weight) {
  const bool first = nodes_.size() == 1;
  least_ = first ? weight : std::min(least_, weight);
  int32_t node = 0;
  nodes_[0].weight += weight;
  for (int64_t i = 0; i < std::min(count, budget_.depth); ++i) {
    node = child_of(node, tokens[i]);
    nodes_[node].weight += weight;
  }
  if (first) first_path_ = nodes_[node].depth;
}

void ContinuationTree::take(int32_t node) {
  Node& taken = nodes_[node];
  Node& parent = nodes_[taken.parent];
  taken.taken = true;
  ++parent.taken_children;
  ++taken_;
  for (int32_t child = taken.first_child; child != kNone; child = nodes_[child].next_sibling) {
    nodes_[child].worth = taken.worth * nodes_[child].weight / (taken.weight + least_);
  }
}

int32_t ContinuationTree::best_open() const {
  int32_t best = kNone;
  for (int32_t node = 1; node < static_cast<int32_t>(nodes_.size()); ++node) {
    const Node& open = nodes_[node];
    const Node& parent = nodes_[open.parent];
    if (open.taken || !parent.taken || parent.taken_children >= budget_.branches) continue;
    if (best == kNone || open.worth > nodes_[best].worth) best = node;
  }
  return best;
}

int64_t ContinuationTree::finish(int64_t* tokens, int32_t* parents) {
  const Node& root = nodes_[0];
  for (int32_t child = root.first_child; child != kNone; child = nodes_[child].next_sibling) {
    nodes_[child].worth = nodes_[child].weight / (root.weight + least_);
  }
  // The first continuation's nodes were made first, one behind the other.
  for (int64_t i = 1; i <= first_path_ && taken_ < budget_.nodes; ++i) take(static_cast<int32_t>(i));
  while (taken_ < budget_.nodes) {
    const int32_t best = best_open();
    if (best == kNone) break;
    take(best);
  }
  numbers_.assign(nodes_.size(), 0);
  waiting_.assign(1, 0);
  int32_t count = 0;
  while (!waiting_.empty()) {
    const int32_t node = waiting_.back();
    waiting_.pop_back();
    if (node != 0) {
      tokens[count] = nodes_[node].token;
      parents[count] = numbers_[nodes_[node].parent];
      numbers_[node] = ++count;
    }
    // Siblings stand in the order they came in, the first continuation's before all; the last is taken first.
    const size_t begin = waiting_.size();
    for (int32_t child = nodes_[node].first_child; child != kNone; child = nodes_[child].next_sibling) {
      if (nodes_[child].taken) waiting_.push_back(child);
    }
    const auto better = [this](int32_t a, int32_t b) {
      const bool first_a = a <= first_path_, first_b = b <= first_path_;
      if (first_a != first_b) return first_b;
      if (nodes_[a].worth != nodes_[b].worth) return nodes_[a].worth < nodes_[b].worth;
      return a > b;
    };
    std::sort(waiting_.begin() + static_cast<std::ptrdiff_t>(begin), waiting_.end(), better);
  }
  return count;
}

// Occurrences from the longest match down, each order from the most recent on; each counts once, by its
// longest match. How many are visited is bounded, so repetition cannot blow the work up.
int64_t NgramIndex::propose_tree(const ContinuationTree::Budget& budget, ContinuationTree& tree,
                                 int64_t* tokens, int32_t* parents) const {
  int64_t nearest = 0;
  const int longest = longest_match(&nearest);
  if (longest == 0 || budget.nodes <= 0 || budget.depth <= 0) return 0;
  const int64_t depth = std::min(budget.depth, budget.nodes);
  tree.begin({budget.nodes, budget.branches, depth});
  int64_t distances_seen[kMostOccurrences];
  int64_t continuation[256];
  int seen = 0, visits = 0;
  double weight = 1.0;
  for (int n = min_ngram_; n < longest; ++n) weight *= kWeightOfToken;
  for (int n = longest; n >= min_ngram_; --n, weight /= kWeightOfToken) {
    uint32_t place = last_;
    int64_t end = length_ - 1;
    while (seen < kMostOccurrences && visits < kMostVisits) {
      const int64_t step = distances(place)[n - min_ngram_];
      if (step == 0 || end - step - n + 1 < start_) break;
      place = back(place, step);
      end -= step;
      ++visits;
      const int64_t distance = length_ - 1 - end;
      if (std::find(distances_seen, distances_seen + seen, distance) != distances_seen + seen) continue;
      distances_seen[seen++] = distance;
      copy_from(distance, depth, continuation);
      tree.add(continuation, depth, weight);
    }
  }
  return tree.finish(tokens, parents);
}

}  // namespace foretoken::drafters
