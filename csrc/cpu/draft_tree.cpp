#include "cpu/draft_tree.hpp"

#include <algorithm>
#include <functional>
#include <limits>

#include "cpu/filters.hpp"
#include "cpu/parallel.hpp"
#include "cpu/tree.hpp"
#include "cpu/views.hpp"
#include "math/draft_tree.hpp"
#include "math/tree_index.hpp"

namespace foretoken::cpu {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

float read_float(const TensorView& view, int64_t i, int64_t j) {
  return static_cast<const float*>(view.data)[offset_of(view, i, j)];
}

// The best children found so far, best first.
class Best {
 public:
  explicit Best(int wanted) : wanted_(wanted) {}

  int size() const { return size_; }
  uint64_t operator[](int i) const { return words_[i]; }
  // An element has to be larger to come in, as later ones lose ties.
  float bound() const { return size_ < wanted_ ? -kInfinity : value_in(words_[size_ - 1]); }

  void add(float value, int64_t id) {
    const uint64_t word = rank_word(value, static_cast<uint32_t>(id));
    if (size_ < wanted_) ++size_;
    int at = size_ - 1;
    for (; at > 0 && words_[at - 1] < word; --at) words_[at] = words_[at - 1];
    words_[at] = word;
  }

 private:
  int wanted_, size_ = 0;
  uint64_t words_[kMaxChildren];
};

// k tiles hold an element of at least the k-th largest maximum: the others need not be looked into.
float kth_largest_maximum(const RowSummary& summary, int64_t tiles, int k) {
  if (tiles < k) return -kInfinity;
  float largest[kMaxChildren];
  std::fill_n(largest, k, -kInfinity);
  for (int64_t index = 0; index < tiles; ++index) {
    const float max = summary.tiles[index].max;
    if (!(max > largest[k - 1])) continue;
    int at = k - 1;
    for (; at > 0 && largest[at - 1] < max; --at) largest[at] = largest[at - 1];
    largest[at] = max;
  }
  return largest[k - 1];
}

Best largest_of(const Row& row, const RowSummary& summary, int k) {
  const RowKernels& kernels = row_kernels();
  const float least = kth_largest_maximum(summary, tiles_of(row.size), k);
  Best best(k);
  Tile tile;
  for (int64_t index = 0; index < tiles_of(row.size); ++index) {
    const float max = summary.tiles[index].max;
    if (max < least || !(max > best.bound())) continue;
    const float* x = tile.of(kernels, row, index, -kInfinity);
    for (int e = 0; e < kTile; ++e) {
      if (x[e] > best.bound()) best.add(x[e], index * kTile + e);
    }
  }
  return best;
}

uint64_t mass_of_row(const RowLaw& law, const RowSummary& summary, int64_t tiles) {
  uint64_t mass = 0;
  for (int64_t index = 0; index < tiles; ++index) {
    const LogitsTile& tile = summary.tiles[index];
    if (!(tile.max >= law.cut)) continue;
    mass += mass_of_tile(tile.sum, weight_of_logit(tile.max, law.max, law.scale, law.cut));
  }
  return mass;
}

void write_child(const DraftTopkArgs& args, int64_t b, int64_t i, int64_t child, int64_t token, float score) {
  const int64_t entry = args.entries ? read_index(args.entries, b, i) : kNoNode;
  const bool there = score > -kInfinity;
  write_index(args.tokens, there ? token : -1, b, i, child);
  write_float(args.children_scores, there ? score : -kInfinity, b, i, child);
  write_index(args.parents, entry, b, i, child);
}

// The children of one frontier node; returns how many of them were written.
int expand(const DraftTopkArgs& args, int64_t b, int64_t i, float score, int32_t& status) {
  const Row row = row_at(args.logits, offset_of(args.logits, b, i));
  RowLaw law;
  law.kind = LawKind::logits;
  law.scale = logits_scale(1.0f);
  RowSummary summary;
  if (!summarise(row, law, summary)) {
    status = kLawLost;
    return 0;
  }
  law.cut = logits_floor(law.max, law.scale);
  law.mass = mass_of_row(law, summary, tiles_of(row.size));
  const double log_mass = log_of_mass(law.mass);
  const Best best = largest_of(row, summary, static_cast<int>(args.tokens.shape[2]));
  for (int child = 0; child < best.size(); ++child) {
    const float value = value_in(best[child]);
    write_child(args, b, i, child, index_in(best[child]), child_score(score, value, law, log_mass));
  }
  return best.size();
}

void expand_node(const DraftTopkArgs& args, int64_t b, int64_t i) {
  const float score = args.scores ? read_float(args.scores, b, i) : 0.0f;
  int32_t status = score == -kInfinity || is_finite(score) ? 0 : kBadDraft;
  int written = 0;
  if (is_finite(score)) written = expand(args, b, i, score, status);
  for (int64_t child = written; child < args.tokens.shape[2]; ++child) {
    write_child(args, b, i, child, -1, -kInfinity);
  }
  write_index(args.status, status, b, i);
}

// What is kept of a row, by rank: the root is rank 0, the best candidate rank 1. Ranks of parents are lower.
struct Kept {
  int32_t drafts = 0;
  int32_t source[kMaxNodes];  // candidate index
  int32_t parent[kMaxNodes];  // rank
  int32_t size[kMaxNodes];    // nodes of the subtree
  int32_t node[kMaxNodes];    // number in the tree
};

bool is_candidate(const FinalizeTreeArgs& args, int64_t b, int64_t i) {
  return read_float(args.scores, b, i) != -kInfinity;
}

bool is_usable(const FinalizeTreeArgs& args, int64_t b, int64_t i) {
  const float score = read_float(args.scores, b, i);
  const int64_t parent = read_index(args.parents, b, i);
  return is_finite(score) && read_index(args.candidates, b, i) >= 0 && parent >= -1 && parent < i &&
         (parent < 0 || score <= read_float(args.scores, b, parent));
}

// False if a candidate is unusable. Parents come before their children and have no lower scores, so the best
// candidates always hold the parents of them all.
bool choose(const FinalizeTreeArgs& args, int64_t b, int64_t most, Kept& kept) {
  uint64_t words[kMaxCandidates];
  int64_t found = 0;
  for (int64_t i = 0; i < args.candidates.shape[1]; ++i) {
    if (!is_candidate(args, b, i)) continue;
    if (!is_usable(args, b, i)) return false;
    words[found++] = rank_word(read_float(args.scores, b, i), static_cast<uint32_t>(i));
  }
  const int64_t drafts = std::min(found, most);
  std::partial_sort(words, words + drafts, words + found, std::greater<>());
  int32_t rank_of[kMaxCandidates];
  for (int32_t rank = 1; rank <= drafts; ++rank) {
    const int64_t candidate = index_in(words[rank - 1]), parent = read_index(args.parents, b, candidate);
    rank_of[candidate] = rank;
    kept.source[rank] = static_cast<int32_t>(candidate);
    kept.parent[rank] = parent < 0 ? 0 : rank_of[parent];
  }
  kept.drafts = static_cast<int32_t>(drafts);
  return true;
}

// Depth first, the best child first: what the drafter believes in most is one run of nodes behind the root.
void number(Kept& kept) {
  std::fill_n(kept.size, kept.drafts + 1, 1);
  for (int32_t rank = kept.drafts; rank >= 1; --rank) kept.size[kept.parent[rank]] += kept.size[rank];
  int32_t next[kMaxNodes];  // number of the next child
  kept.node[0] = 0;
  next[0] = 1;
  for (int32_t rank = 1; rank <= kept.drafts; ++rank) {
    const int32_t node = next[kept.parent[rank]];
    next[kept.parent[rank]] += kept.size[rank];
    kept.node[rank] = node;
    next[rank] = node + 1;
  }
}

void write_drafts(const FinalizeTreeArgs& args, int64_t b, const Kept& kept) {
  for (int32_t rank = 1; rank <= kept.drafts; ++rank) {
    const int64_t at = kept.node[rank] - 1, candidate = kept.source[rank];
    write_index(args.tokens, read_index(args.candidates, b, candidate), b, at);
    write_index(args.source, candidate, b, at);
    write_index(args.index.parents, kept.node[kept.parent[rank]], b, at);
  }
  for (int64_t at = kept.drafts; at < args.tokens.shape[1]; ++at) {
    write_index(args.tokens, 0, b, at);
    write_index(args.source, -1, b, at);
    write_index(args.index.parents, 0, b, at);
  }
}

void finalize_row(const FinalizeTreeArgs& args, int64_t b) {
  const int64_t nodes = args.tokens.shape[1];
  const int64_t budget = args.budget ? read_index(args.budget, b) : nodes;
  Kept kept;
  const bool usable = budget >= -1 && (budget < 0 || choose(args, b, std::min(budget, nodes), kept));
  if (!usable) kept.drafts = 0;
  number(kept);
  write_drafts(args, b, kept);
  write_index(args.index.num_drafts, budget == -1 ? -1 : kept.drafts, b);
  index_row(args.index, b);
  write_index(args.index.status, usable ? 0 : kBadDraft, b);
}

}  // namespace

void draft_topk(const DraftTopkArgs& args) {
  const int64_t frontier = args.logits.shape[1];
  parallel_for(args.logits.shape[0] * frontier, args.logits.shape[2],
               [&](int64_t row) { expand_node(args, row / frontier, row % frontier); });
}

void finalize_tree(const FinalizeTreeArgs& args) {
  constexpr int64_t kElementsPerCandidate = 32;  // a candidate costs about as much as reading so many logits
  const int64_t work = args.candidates.shape[1] + args.tokens.shape[1];
  parallel_for(args.candidates.shape[0], work * kElementsPerCandidate,
               [&](int64_t b) { finalize_row(args, b); });
}

}  // namespace foretoken::cpu
