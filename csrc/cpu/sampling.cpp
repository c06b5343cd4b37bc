#include "cpu/sampling.hpp"

#include "cpu/parallel.hpp"
#include "cpu/views.hpp"

namespace foretoken::cpu {

namespace {

struct Drawn {
  int64_t token;
  float logprob;
  int32_t status;
};

Drawn sample_row(const Row& row, const SamplingView& sampling, int64_t slot, uint64_t bits) {
  const RowLaw law = law_of_logits(row, processing_of(sampling, slot));
  if (!law.usable) return {law.top, -__builtin_inff(), kLawLost};
  if (law.kind == LawKind::point) return {law.top, 0.0f, 0};
  const int64_t token = draw(row, law, bits);
  return {token, log_probability(row, law, token), 0};
}

}  // namespace

void sample(const SampleArgs& args) {
  const int64_t batch = args.logits.shape[0];
  parallel_for(batch, args.logits.shape[1], [&](int64_t b) {
    const int64_t slot = slot_of(args.slots, b, args.sampling.size);
    Drawn drawn{-1, -__builtin_inff(), kBadRow};
    if (slot >= 0) {
      const uint64_t base = static_cast<uint64_t>(read_index(args.base, b));
      const uint64_t bits =
          random_bits(args.sampling.seed[slot], base, args.purpose, static_cast<uint32_t>(args.step));
      drawn = sample_row(row_at(args.logits, offset_of(args.logits, b)), args.sampling, slot, bits);
    }
    write_index(args.tokens, drawn.token, b);
    if (args.logprobs) write_float(args.logprobs, drawn.logprob, b);
    if (args.status) write_index(args.status, drawn.status, b);
  });
}

}  // namespace foretoken::cpu
