#include "cpu/draft_laws.hpp"

#include <algorithm>
#include <limits>

namespace foretoken::cpu {

namespace {

constexpr float kNothing = -std::numeric_limits<float>::infinity();

// Columns beyond the target's vocabulary are padding, and ids that map to nothing were masked.
bool padding_is_empty(const Row& row, const TensorView& map, int64_t vocab) {
  for (int64_t element = map ? 0 : vocab; element < row.size; ++element) {
    const int64_t id = map ? read_index(map, element) : element;
    if ((id < 0 || id >= vocab) && row.at(element) != 0.0f) return false;
  }
  return true;
}

// Puts the elements of a row in the order of the target's ids; what nothing maps to has `absent`. False: two
// columns have mass for one id, so that a token's probability is neither's.
bool reorder(DraftLaw& law, const TensorView& map, int64_t vocab, float absent) {
  std::vector<float> ordered(static_cast<size_t>(vocab), absent);
  bool injective = true;
  for (int64_t element = 0; element < law.row.size; ++element) {
    const int64_t id = read_index(map, element);
    const float value = law.row.at(element);
    if (id < 0 || id >= vocab || value == absent) continue;
    float& place = ordered[static_cast<size_t>(id)];
    injective &= place == absent;
    place = value;
  }
  law.storage = std::move(ordered);
  law.row = {law.storage.data(), DType::float32, vocab};
  return injective;
}

RowLaw recorded_law(const VerifyArgs& args, int64_t b, int64_t law_row, int64_t size) {
  const TensorView& records = args.draft_records;
  const int64_t* record = static_cast<const int64_t*>(records.data) + offset_of(records, b, law_row);
  return read_record(record, records.strides[2], size);
}

DraftLaw logits_law_at(const VerifyArgs& args, int64_t b, int64_t law_row, const Processing& processing,
                       const LogitEdits& edits, const std::vector<int64_t>& path, int64_t vocab) {
  DraftLaw result;
  result.row = row_at(args.draft_logits, offset_of(args.draft_logits, b, law_row));
  if (!args.vocab_map) result.row.size = std::min(result.row.size, vocab);
  if (edits.any() || args.vocab_map) {
    edits.edit(result.row, path, nullptr, 0, result.storage);
    result.row = {result.storage.data(), DType::float32, result.row.size};
  }
  result.law = args.draft_records ? recorded_law(args, b, law_row, result.row.size)
                                  : law_of_logits(result.row, processing);
  if (args.vocab_map) {
    if (result.law.top >= 0) result.law.top = read_index(args.vocab_map, result.law.top);
    result.law.usable &= reorder(result, args.vocab_map, vocab, kNothing);
  }
  return result;
}

DraftLaw probs_law_at(const VerifyArgs& args, int64_t b, int64_t law_row, int64_t vocab) {
  DraftLaw result;
  result.row = row_at(args.draft_probs, offset_of(args.draft_probs, b, law_row));
  bool sound = padding_is_empty(result.row, args.vocab_map, vocab);
  if (args.vocab_map) {
    sound &= reorder(result, args.vocab_map, vocab, 0.0f);
  } else {
    result.row.size = std::min(result.row.size, vocab);
  }
  result.law = law_of_probs(result.row);
  result.law.usable &= sound;
  return result;
}

DraftLaw list_law_at(const VerifyArgs& args, int64_t b, int64_t law_row, int64_t vocab) {
  DraftLaw result;
  result.law.kind = LawKind::probs;
  result.law.cut = std::numeric_limits<float>::min();
  double total = 0.0;
  for (int64_t i = 0; i < args.topk_ids.shape[2]; ++i) {
    int64_t id = read_index(args.topk_ids, b, law_row, i);
    if (id < 0) continue;
    if (args.vocab_map) id = id < args.vocab_map.shape[0] ? read_index(args.vocab_map, id) : -1;
    const int64_t offset = offset_of(args.topk_probs, b, law_row, i);
    const float prob = static_cast<const float*>(args.topk_probs.data)[offset];
    const bool known = id >= 0 && id < vocab;
    if (!known && prob == 0.0f) continue;  // padding, as in a row of probabilities
    result.law.usable &= known && prob >= 0.0f && prob < 2.0f;
    result.ids.push_back(id);
    result.probs.push_back(prob);
    result.law.max = std::max(result.law.max, prob);
    total += static_cast<double>(prob);
  }
  std::vector<int64_t> sorted = result.ids;
  std::sort(sorted.begin(), sorted.end());
  result.law.usable &= std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end();
  result.law.usable &= result.law.max > 0x1p-24f && total > 0.98 && total < 1.02;
  if (!result.law.usable) return result;
  result.law.scale = 1.0f / result.law.max;
  for (float prob : result.probs) result.law.mass += mass_of(weight_in(result.law, prob));
  return result;
}

}  // namespace

float DraftLaw::element(int64_t token) const {
  if (row.data == nullptr) {
    const auto found = std::find(ids.begin(), ids.end(), token);
    return found != ids.end() ? probs[static_cast<size_t>(found - ids.begin())] : 0.0f;
  }
  if (token < row.size) return row.at(token);
  return law.kind == LawKind::probs ? 0.0f : kNothing;
}

double DraftLaw::probability(int64_t token) const {
  if (law.kind == LawKind::point) return token == law.top ? 1.0 : 0.0;
  return probability_in(law, element(token));
}

double DraftLaw::share_without(const std::vector<int64_t>& tokens) const {
  const auto taken = [&](int64_t id) { return std::find(tokens.begin(), tokens.end(), id) != tokens.end(); };
  if (law.kind == LawKind::point) return taken(law.top) ? 0.0 : 1.0;
  if (row.data != nullptr) return cpu::share_without(row, law, tokens);
  double left = 0.0;
  for (size_t i = 0; i < ids.size(); ++i) {
    if (!taken(ids[i])) left += static_cast<double>(weight_in(law, probs[i]));
  }
  return left * kMassUnit / static_cast<double>(law.mass);
}

DraftLaw draft_law_at(const VerifyArgs& args, int64_t b, int64_t law_row, const Processing& processing,
                      const LogitEdits& edits, const std::vector<int64_t>& path, int64_t vocab) {
  if (args.topk_ids) return list_law_at(args, b, law_row, vocab);
  if (args.draft_probs) return probs_law_at(args, b, law_row, vocab);
  return logits_law_at(args, b, law_row, processing, edits, path, vocab);
}

DraftLaw law_of_probabilities(const std::vector<double>& probs) {
  DraftLaw result;
  for (double prob : probs) result.storage.push_back(static_cast<float>(prob));
  result.row = {result.storage.data(), DType::float32, static_cast<int64_t>(probs.size())};
  result.law = law_of_probs(result.row);
  return result;
}

}  // namespace foretoken::cpu
