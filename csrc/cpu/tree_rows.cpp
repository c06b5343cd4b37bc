#include "cpu/tree_rows.hpp"

#include <algorithm>
#include <utility>

#include "cpu/first_path.hpp"

namespace foretoken::cpu {

namespace {

const TensorView kNoMap{};
const SamplingView kNoSampling{};

}  // namespace

TreeRows::TreeRows(const VerifyArgs& args, int64_t b, int64_t slot)
    : args_(args),
      batch_row_(b),
      vocab_(args.target_logits.shape[args.target_logits.rank - 1]),
      processing_(processing_of(args.sampling, slot)),
      draft_processing_(processing_of(args.draft_sampling, slot)),
      edits_(args.sampling, slot, args.history, read_index(args.base, b), vocab_, kNoMap),
      shares_edits_(!args.vocab_map && args.draft_sampling.constraints == args.sampling.constraints),
      draft_edits_(args.draft_logits && !shares_edits_ ? args.draft_sampling : kNoSampling, slot,
                   args.history, read_index(args.base, b), vocab_, args.vocab_map) {
  // A greedy row asks only whether a draft is the argmax; a deterministic draw has no law to ask for.
  ignore_draft_laws_ = greedy() || args.draw == Draw::deterministic;
  tree_usable(0);
}

// Ids and parents alone; sizes everything to the tree.
bool TreeRows::tree_usable(int32_t drafts) {
  const bool chain = !args_.parents;
  bool usable = build_tree(tree_, drafts + 1, [&](int32_t node) {
    return chain ? int64_t{node} - 1 : read_index(args_.parents, batch_row_, node - 1);
  });
  const size_t nodes = static_cast<size_t>(drafts) + 1;
  target_.resize(nodes);
  target_tiles_.resize(nodes);
  edited_.resize(nodes);
  draft_.resize(nodes);
  target_made_.resize(nodes, 0);
  draft_made_.resize(nodes, 0);
  for (int32_t node = 1; usable && node <= drafts; ++node) {
    usable = token(node) >= 0 && token(node) < vocab_ && tree_.depth[node] < args_.tokens.shape[1];
  }
  return usable;
}

bool TreeRows::take_proposal(int32_t drafts, Rule rule, bool share_row) {
  bool usable = tree_usable(drafts) && shape_suits(rule);
  const bool reads_laws = rule != Rule::target_only && rule != Rule::coupled;
  if (!reads_laws) ignore_draft_laws();
  share_row_ = share_row;
  if (usable && share_row) make_laws(0, true);
  for (int32_t node = 0; usable && node <= drafts; ++node) {
    if (tree_.first_child[node] != kNoNode && dense(node)) usable = law_usable(node);
  }
  if (!usable) tree_usable(0);
  return usable;
}

bool TreeRows::shape_suits(Rule rule) const {
  const bool paths = args_.draw == Draw::iid_paths;
  if (rule == Rule::gbv) return paths && has_even_leaves(tree_) && all_or_none_dense();
  if (rule == Rule::spectr && args_.draw == Draw::without_replacement) return false;
  // Any other rule reads paths as independent siblings at the root: each has to be there, with its own nodes.
  if (!paths || ignore_draft_laws_ || rule == Rule::target_only || rule == Rule::coupled) return true;
  for (int32_t node = 0; node < tree_.nodes; ++node) {
    const int32_t children = children_of(tree_, node);
    if (node == 0 ? children != 0 && children != args_.num_paths : children > 1) return false;
  }
  return true;
}

// Every child must be possible under the law it is said to come from, and no more than certain: a record may
// be that of another row.
bool TreeRows::law_usable(int32_t node) {
  if (law_row(node) >= laws().shape[1] || !draft_law(node).law.usable) return false;
  int32_t elders = 0;
  for (int32_t child = tree_.first_child[node]; child != kNoNode; child = tree_.next_sibling[child]) {
    const double prob = draft_prob(node, child);
    if (!(prob > 0.0 && prob < 1.001)) return false;
    if (args_.draw == Draw::without_replacement && removed(node, elders, child)) return false;
    ++elders;
  }
  return true;
}

// A chain is walked from its root, so of its rows only the next few are made: enough to give every thread the
// same number of them, the drafts' among them, and something to do at all.
void TreeRows::make_laws(int32_t first, bool with_drafts) {
  std::vector<int32_t> drafts;
  for (int32_t node = 0; with_drafts && node < tree_.nodes; ++node) {
    const bool read = tree_.first_child[node] != kNoNode && dense(node);
    if (read && law_row(node) < laws().shape[1]) drafts.push_back(node);
  }
  const int64_t before = static_cast<int64_t>(drafts.size());
  int64_t rows = tree_.nodes - first;
  if (!args_.parents) {
    const int64_t threads = max_threads();
    const int64_t least = std::max(before + 1, (kParallelElements + vocab_ - 1) / vocab_);
    rows = std::min(rows, (least + threads - 1) / threads * threads - before);
    if (threads_for(before + rows, vocab_) == 1) rows = 1;
  }
  parallel_for(before + rows, vocab_, [&](int64_t item) {
    if (item < before) {
      draft_law(drafts[static_cast<size_t>(item)]);
    } else {
      make_target_law(first + static_cast<int32_t>(item - before));
    }
  });
}

bool TreeRows::any_dense() const {
  for (int32_t node = 0; node < tree_.nodes; ++node) {
    if (tree_.first_child[node] != kNoNode && dense(node)) return true;
  }
  return false;
}

bool TreeRows::all_or_none_dense() const {
  bool any_point = false;
  for (int32_t node = 0; node < tree_.nodes; ++node) {
    any_point |= tree_.first_child[node] != kNoNode && !dense(node);
  }
  return !any_point || !any_dense();
}

std::vector<int64_t> TreeRows::path_tokens(int32_t node) const {
  int16_t path[kMaxNodes];
  const int32_t depth = path_to(tree_, node, path);
  std::vector<int64_t> tokens;
  for (int32_t i = 0; i < depth; ++i) tokens.push_back(token(path[i]));
  return tokens;
}

int64_t TreeRows::target_row_index(int32_t node) const {
  return args_.row_offsets ? read_index(args_.row_offsets, batch_row_) + node
                           : batch_row_ * args_.target_logits.shape[1] + node;
}

Row TreeRows::raw_target_row(int32_t node) const {
  const TensorView& logits = args_.target_logits;
  return row_at(logits, args_.row_offsets ? offset_of(logits, target_row_index(node))
                                          : offset_of(logits, batch_row_, node));
}

Row TreeRows::target_row(int32_t node) {
  const Row raw = raw_target_row(node);
  if (!edits_.any() && !args_.bitmask) return raw;
  std::vector<float>& edited = edited_[static_cast<size_t>(node)];
  if (edited.empty()) {
    const int32_t* bits = nullptr;
    int64_t stride = 0;
    if (const TensorView& mask = args_.bitmask) {
      stride = mask.strides[mask.rank - 1];
      bits =
          static_cast<const int32_t*>(mask.data) +
          (args_.row_offsets ? offset_of(mask, target_row_index(node)) : offset_of(mask, batch_row_, node));
    }
    edits_.edit(raw, edits_.any() ? path_tokens(node) : std::vector<int64_t>{}, bits, stride, edited);
  }
  return {edited.data(), DType::float32, vocab_};
}

const TileStats* TreeRows::given_stats(int32_t node) const {
  if (!args_.target_stats) return nullptr;
  return static_cast<const TileStats*>(args_.target_stats.data) + target_row_index(node) * tiles_of(vocab_);
}

void TreeRows::make_target_law(int32_t node) {
  const size_t index = static_cast<size_t>(node);
  if (target_made_[index]) return;
  if (!greedy()) target_tiles_[index].resize(static_cast<size_t>(tiles_of(vocab_)));
  target_[index] =
      law_of_logits(target_row(node), processing_, target_tiles_[index].data(), given_stats(node));
  target_made_[index] = 1;
}

const RowLaw& TreeRows::target_law(int32_t node) {
  const size_t index = static_cast<size_t>(node);
  if (!target_made_[index] && share_row_) {
    make_laws(node, false);
  } else {
    make_target_law(node);
  }
  return target_[index];
}

const DraftLaw& TreeRows::draft_law(int32_t node) {
  const size_t index = static_cast<size_t>(node);
  if (!draft_made_[index]) {
    const LogitEdits& edits = shares_edits_ ? edits_ : draft_edits_;
    const auto path = edits.any() ? path_tokens(node) : std::vector<int64_t>{};
    draft_[index] = draft_law_at(args_, batch_row_, law_row(node), draft_processing_, edits, path, vocab_);
    draft_made_[index] = 1;
  }
  return draft_[index];
}

const TensorView& TreeRows::laws() const {
  return args_.topk_ids ? args_.topk_ids : args_.draft_logits ? args_.draft_logits : args_.draft_probs;
}

int64_t TreeRows::law_row(int32_t node) const {
  if (!laws()) return -1;
  if (!args_.draft_row) return node;
  const int64_t row = read_index(args_.draft_row, batch_row_, node);
  return row >= -1 ? row : laws().shape[1];  // only -1 means a point law; the rest is out of range
}

double TreeRows::target_prob(int32_t node, int32_t child) {
  const RowLaw& law = target_law(node);
  const int64_t drafted = token(child);
  if (law.kind == LawKind::point) return drafted == law.top ? 1.0 : 0.0;
  return probability_in(law, target_row(node).at(drafted));
}

bool TreeRows::removed(int32_t node, int32_t count, int32_t child) const {
  int32_t elder = tree_.first_child[node];
  for (int32_t i = 0; i < count; ++i, elder = tree_.next_sibling[elder]) {
    if (token(elder) == token(child)) return true;
  }
  return false;
}

std::vector<int64_t> TreeRows::first_tokens(int32_t node, int32_t count) const {
  std::vector<int64_t> tokens;
  int32_t child = tree_.first_child[node];
  for (int32_t i = 0; i < count; ++i, child = tree_.next_sibling[child]) tokens.push_back(token(child));
  return tokens;
}

double TreeRows::relative_prob(int32_t node, int32_t child) {
  const RowLaw& law = target_law(node);
  if (law.kind == LawKind::point) return token(child) == law.top ? 1.0 : 0.0;
  return static_cast<double>(weight_in(law, target_row(node).at(token(child))));
}

bool TreeRows::among_top(int32_t node, int32_t child, int32_t k) {
  return count_likelier(target_row(node), target_law(node), token(child)) < k;
}

Residual TreeRows::whole(int32_t node) {
  const RowLaw& law = target_law(node);
  return whole_of(target_row(node), law, target_tiles_[static_cast<size_t>(node)].data());
}

double TreeRows::residual(int32_t node, double gain) {
  const Residual residual = residual_of(node, gain);
  if (residual.draft.data == nullptr) return residual_fraction(residual);
  residual_.node = node;
  residual_.gain = gain;
  residual_.tiles.resize(static_cast<size_t>(tiles_of(vocab_)));
  return residual_fraction(residual, residual_.tiles.data());
}

Residual TreeRows::residual_of(int32_t node, double gain) {
  const DraftLaw& draft = draft_law(node);
  Residual residual = whole(node);
  if (draft.law.kind == LawKind::point) {
    residual.exclude(draft.law.top);
    return residual;
  }
  const float in_weights = gain_in_weights(gain, residual.target_law->mass, draft.law.mass);
  if (draft.row.data != nullptr) {
    residual.draft = draft.row;
    residual.draft_law = &draft.law;
    residual.gain = in_weights;
    const bool known = residual_.node == node && residual_.gain == gain;
    residual.tile_masses = known ? residual_.tiles.data() : nullptr;
    return residual;
  }
  for (size_t i = 0; i < draft.ids.size(); ++i) {
    residual.subtract(draft.ids[i], in_weights, weight_in(draft.law, draft.probs[i]));
  }
  residual.sort_edits();
  return residual;
}

Residual TreeRows::closing_of(const TreeVerdict& verdict) {
  if (verdict.closing == Closing::bonus) return whole(verdict.node);
  if (dense(verdict.node)) return residual_of(verdict.node, verdict.state.gain);
  Residual residual = whole(verdict.node);
  for (int64_t token : first_tokens(verdict.node, verdict.state.rejected)) residual.exclude(token);
  residual.sort_edits();
  return residual;
}

std::vector<double> TreeRows::weights_of_target(int32_t node) {
  std::vector<double> weights(static_cast<size_t>(vocab_));
  const Row row = target_row(node);
  const RowLaw& law = target_law(node);
  for (int64_t id = 0; id < vocab_; ++id) {
    weights[static_cast<size_t>(id)] = static_cast<double>(weight_in(law, row.at(id)));
  }
  return weights;
}

// Whole numbers: their sums do not depend on who adds them in which order.
std::vector<uint64_t> TreeRows::weights_of_draft(int32_t node) {
  std::vector<uint64_t> weights(static_cast<size_t>(vocab_), 0);
  const DraftLaw& law = draft_law(node);
  if (law.law.kind == LawKind::point) {
    weights[static_cast<size_t>(law.law.top)] = 1;
  } else if (law.row.data == nullptr) {
    for (size_t i = 0; i < law.ids.size(); ++i) {
      weights[static_cast<size_t>(law.ids[i])] = mass_of(weight_in(law.law, law.probs[i]));
    }
  } else {
    for (int64_t id = 0; id < law.row.size; ++id) {
      weights[static_cast<size_t>(id)] = mass_of(weight_in(law.law, law.row.at(id)));
    }
  }
  return weights;
}

void TreeRows::set_draft_law(int32_t node, const std::vector<double>& law) {
  draft_[static_cast<size_t>(node)] = law_of_probabilities(law);
  draft_made_[static_cast<size_t>(node)] = 1;
}

void TreeRows::keep_first_path(int32_t num_paths) { cpu::keep_first_path(*this, tree_, num_paths); }

}  // namespace foretoken::cpu
