#include "cpu/sampling.hpp"

#include <limits>
#include <vector>

#include "cpu/gumbel.hpp"
#include "cpu/parallel.hpp"
#include "cpu/processing.hpp"
#include "cpu/residual.hpp"

namespace foretoken::cpu {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Drawn {
  int64_t token;
  float logprob;
  int32_t status;
};

// Tokens drafted since the round began; -1 stands for none.
std::vector<int64_t> path_of(const SampleArgs& args, int64_t b) {
  std::vector<int64_t> path;
  for (int64_t i = 0; args.path && i < args.path.shape[1]; ++i) {
    const int64_t token = read_index(args.path, b, i);
    if (token >= 0) path.push_back(token);
  }
  return path;
}

// The id to emit for an element of a row. One without an id can only come up where the row has no law.
int64_t emitted_id(const SampleArgs& args, int64_t element) {
  if (!args.vocab_map || element < 0) return element;
  const int64_t id = read_index(args.vocab_map, element);
  return id >= 0 && id < args.emitted_vocab ? id : -1;
}

void note_law(const SampleArgs& args, int64_t b, const RowLaw& law) {
  if (!args.records) return;
  int64_t* record = static_cast<int64_t*>(args.records.data) + offset_of(args.records, b);
  write_record(law, record, args.records.strides[1]);
}

Drawn sample_row(const SampleArgs& args, int64_t b, int64_t slot, const LogitEdits& edits) {
  Row row = row_at(args.logits, offset_of(args.logits, b));
  std::vector<float> edited;
  if (edits.any() || args.bitmask || args.vocab_map) {
    const TensorView& mask = args.bitmask;
    const int32_t* bits = mask ? static_cast<const int32_t*>(mask.data) + offset_of(mask, b) : nullptr;
    edits.edit(row, path_of(args, b), bits, mask ? mask.strides[1] : 0, edited);
    row = {edited.data(), DType::float32, row.size};
  }
  uint64_t tile_masses[kMaxTiles];
  const RowLaw law = law_of_logits(row, processing_of(args.sampling, slot), tile_masses);
  note_law(args, b, law);
  if (!law.usable) return {law.top, -kInfinity, kLawLost};
  if (law.kind == LawKind::point) return {law.top, 0.0f, 0};
  const uint64_t seed = args.sampling.seed[slot], base = static_cast<uint64_t>(read_index(args.base, b));
  const uint32_t step = static_cast<uint32_t>(args.step);
  const int64_t token =
      args.method == SampleMethod::gumbel
          ? gumbel_draw(row, law, seed, base + step, args.vocab_map)
          : draw(whole_of(row, law, tile_masses), random_bits(seed, base, args.purpose, step));
  return {token, log_probability(row, law, token), 0};
}

}  // namespace

void sample(const SampleArgs& args) {
  const int64_t batch = args.logits.shape[0];
  parallel_for(batch, args.logits.shape[1], [&](int64_t b) {
    const int64_t slot = slot_of(args.slots, b, args.sampling.size);
    Drawn drawn{-1, -kInfinity, kBadRow};
    if (slot >= 0) {
      const LogitEdits edits(args.sampling, slot, args.history, read_index(args.base, b), args.emitted_vocab,
                             args.vocab_map);
      if (edits.usable()) drawn = sample_row(args, b, slot, edits);
    }
    if (drawn.status == kBadRow) {
      RowLaw none;
      none.usable = false;
      note_law(args, b, none);
    }
    write_index(args.tokens, emitted_id(args, drawn.token), b);
    if (args.logprobs) write_float(args.logprobs, drawn.logprob, b);
    if (args.status) write_index(args.status, drawn.status, b);
  });
}

}  // namespace foretoken::cpu
