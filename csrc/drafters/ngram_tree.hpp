// Several continuations of a text, merged into one tree of drafts.
#pragma once

#include <cstdint>
#include <vector>

namespace foretoken::drafters {

// What followed earlier occurrences, as a trie. An occurrence weighs the more the longer its match was; a
// node weighs what its occurrences do, and is worth its share of its parent's weight, times the parent's
// worth. The weakest occurrence is added to what a share is taken of: that of something yet unseen.
//
// The first continuation is always in the tree, as far as the budget goes, and comes first: nodes 1, 2, ...
// Sized once for the trees that were asked for, and used again.
class ContinuationTree {
 public:
  struct Budget {
    int64_t nodes;     // drafts
    int64_t branches;  // children of a node
    int64_t depth;     // drafts of a path
  };

  void begin(const Budget& budget);
  void add(const int64_t* tokens, int64_t count, double weight);

  // Writes the best nodes, depth first and the best child first: tokens and parents of drafts 1, 2, ...
  // Returns how many.
  int64_t finish(int64_t* tokens, int32_t* parents);

 private:
  struct Node {
    int64_t token;
    double weight;
    double worth;
    int32_t parent;
    int32_t depth;
    int32_t first_child;  // -1: none
    int32_t next_sibling;
    int32_t taken_children;
    bool taken;
  };

  int32_t child_of(int32_t parent, int64_t token);
  void take(int32_t node);
  int32_t best_open() const;

  Budget budget_{};
  double least_ = 0.0;
  int64_t first_path_ = 0;
  int64_t taken_ = 0;
  std::vector<Node> nodes_;
  std::vector<int32_t> waiting_;  // of a walk
  std::vector<int32_t> numbers_;  // of each node in the tree that comes out
};

}  // namespace foretoken::drafters
