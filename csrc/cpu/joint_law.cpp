#include <algorithm>
#include <numeric>

#include "cpu/enumerate.hpp"
#include "cpu/exact_rows.hpp"

namespace foretoken::cpu {

namespace {

int64_t power(int64_t base, int64_t exponent) {
  int64_t result = 1;
  for (int64_t i = 0; i < exponent; ++i) result *= base;
  return result;
}

class Joint {
 public:
  Joint(const JointCase& joint, bool float64)
      : joint_(joint), float64_(float64), vocab_(static_cast<int64_t>(joint.target[0].size())) {
    const int32_t nodes = static_cast<int32_t>(joint.parents.size()) + 1;
    build_tree(tree_, nodes, [&](int32_t node) { return joint.parents[static_cast<size_t>(node - 1)]; });
    depth_ = *std::max_element(tree_.depth, tree_.depth + nodes);
    for (const auto& row : joint.draft) draft_.push_back(exact_law(row, joint.draft_processing));
    for (const auto& row : joint.target) target_.push_back(exact_law(row, joint.processing));
    for (int64_t level = 0; level <= depth_ + 1; ++level) {
      ended_.emplace_back(static_cast<size_t>(power(vocab_, level)), 0.0);
    }
    tokens_.assign(joint.parents.size(), 0);
  }

  JointLaw law() {
    draw_node(1, 1.0);
    for (int64_t level = 1; level <= depth_; ++level) {
      for (int64_t prefix = 0; prefix < power(vocab_, level); ++prefix) {
        const auto& next = target_[static_cast<size_t>(first_context(level) + prefix)];
        for (int64_t token = 0; token < vocab_; ++token) {
          ended_[static_cast<size_t>(level + 1)][static_cast<size_t>(prefix * vocab_ + token)] +=
              ended_[static_cast<size_t>(level)][static_cast<size_t>(prefix)] *
              next[static_cast<size_t>(token)];
        }
      }
    }
    result_.emitted = ended_.back();
    return result_;
  }

 private:
  int64_t first_context(int64_t depth) const {
    int64_t sum = 0;
    for (int64_t d = 0; d < depth; ++d) sum += power(vocab_, d);
    return sum;
  }

  std::vector<int64_t> path_tokens(int32_t node) const {
    int16_t path[kMaxNodes];
    const int32_t depth = path_to(tree_, node, path);
    std::vector<int64_t> tokens;
    for (int32_t i = 0; i < depth; ++i) tokens.push_back(tokens_[static_cast<size_t>(path[i] - 1)]);
    return tokens;
  }

  size_t context(int32_t node) const { return static_cast<size_t>(context_index(path_tokens(node), vocab_)); }

  bool deterministic(int32_t parent) const {
    return joint_.options.draw == Draw::deterministic ||
           (!joint_.point.empty() && joint_.point[static_cast<size_t>(parent)]);
  }

  // The token a deterministic drafter puts at this place among its siblings: its likeliest, the next, ...
  int64_t ranked_token(const std::vector<double>& law, int32_t node) const {
    std::vector<int64_t> ids(law.size());
    std::iota(ids.begin(), ids.end(), int64_t{0});
    std::stable_sort(ids.begin(), ids.end(), [&](int64_t a, int64_t b) {
      return law[static_cast<size_t>(a)] > law[static_cast<size_t>(b)];
    });
    int64_t place = 0;
    for (int32_t elder = tree_.first_child[tree_.parent[node]]; elder != node;
         elder = tree_.next_sibling[elder]) {
      ++place;
    }
    return ids[static_cast<size_t>(place % vocab_)];
  }

  double probability_of(int64_t token, const std::vector<double>& law, int32_t node) const {
    std::vector<double> rest = law;
    if (joint_.options.draw == Draw::without_replacement) {
      for (int32_t elder = tree_.first_child[tree_.parent[node]]; elder != node;
           elder = tree_.next_sibling[elder]) {
        rest[static_cast<size_t>(tokens_[static_cast<size_t>(elder - 1)])] = 0.0;
      }
    }
    const double left = total_of(rest);
    return left > 0.0 ? rest[static_cast<size_t>(token)] / left : 0.0;
  }

  // Ascending nodes: parents and elder siblings have been drawn before.
  void draw_node(int32_t node, double probability) {
    if (node == tree_.nodes) return verify(probability);
    const int32_t parent = tree_.parent[node];
    const auto& law = draft_[context(parent)];
    int64_t& token = tokens_[static_cast<size_t>(node - 1)];
    if (deterministic(parent)) {
      token = ranked_token(law, node);
      return draw_node(node + 1, probability);
    }
    for (int64_t drawn = 0; drawn < vocab_; ++drawn) {
      const double chance = probability_of(drawn, law, node);
      tokens_[static_cast<size_t>(node - 1)] = drawn;
      if (chance > 0.0) draw_node(node + 1, probability * chance);
    }
  }

  void verify(double probability) {
    TreeCase tree;
    tree.tokens = tokens_;
    tree.parents = joint_.parents;
    tree.processing = joint_.processing;
    tree.draft_processing = joint_.draft_processing;
    tree.options = joint_.options;
    for (int32_t node = 0; node < tree_.nodes; ++node) {
      tree.target.push_back(joint_.target[context(node)]);
      const bool point = deterministic(node) || tree_.first_child[node] == kNoNode;
      tree.draft.push_back(point ? std::vector<double>{} : joint_.draft[context(node)]);
    }
    for (const Branch& branch : float64_ ? enumerate_float64(tree) : enumerate_float32(tree)) {
      const int32_t depth = tree_.depth[branch.node];
      const int64_t prefix = static_cast<int64_t>(context(branch.node)) - first_context(depth);
      result_.accepted += probability * branch.probability * depth;
      for (int64_t token = 0; token < vocab_; ++token) {
        ended_[static_cast<size_t>(depth) + 1][static_cast<size_t>(prefix * vocab_ + token)] +=
            probability * branch.probability * branch.closing[static_cast<size_t>(token)];
      }
    }
  }

  const JointCase& joint_;
  const bool float64_;
  const int64_t vocab_;
  int64_t depth_ = 0;
  TreeIndex tree_;
  std::vector<std::vector<double>> target_, draft_;
  std::vector<std::vector<double>> ended_;  // [D + 2][V^level] probability of a round that emits just this
  std::vector<int64_t> tokens_;
  JointLaw result_;
};

}  // namespace

int64_t context_index(const std::vector<int64_t>& path, int64_t vocab) {
  int64_t index = 0;
  for (int64_t token : path) index = index * vocab + token + 1;
  return index;
}

JointLaw joint_law(const JointCase& joint, bool float64) { return Joint(joint, float64).law(); }

}  // namespace foretoken::cpu
