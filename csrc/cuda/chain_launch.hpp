// What the launches of chains and of trees share.
#pragma once

#include "cuda/launch.hpp"
#include "cuda/verify_chain.hpp"

namespace foretoken::cuda {

inline Numbers numbers_of(const TensorView& view) {
  Numbers numbers;
  numbers.data = view.data;
  for (int d = 0; d < view.rank && d < 2; ++d) numbers.strides[d] = view.strides[d];
  numbers.wide = view.dtype == DType::int64;
  return numbers;
}

// Whether all rows begin and end at multiples of 16 bytes.
inline bool aligned(const TensorView& logits) {
  const int64_t bytes = bytes_of(logits.dtype);
  bool whole =
      reinterpret_cast<uintptr_t>(logits.data) % 16 == 0 && logits.shape[logits.rank - 1] * bytes % 16 == 0;
  for (int d = 0; d + 1 < logits.rank; ++d) whole = whole && logits.strides[d] * bytes % 16 == 0;
  return whole;
}

inline ChainRowsView rows_of(const TensorView& view) {
  return {view.data, {view.strides[0], view.strides[1]}};
}

// All but where the rows lie, and what only one of them asks for.
inline ChainArgs chain_args_of(const VerifyArgs& args, const ChainScratch& scratch) {
  ChainArgs chain;
  chain.vocab = args.target_logits.shape[args.target_logits.rank - 1];
  chain.most_drafts = static_cast<int32_t>(args.draft_tokens.shape[1]);
  chain.rule = args.rule;
  chain.draft_tokens = numbers_of(args.draft_tokens);
  chain.num_drafts = numbers_of(args.num_drafts);
  chain.base = numbers_of(args.base);
  chain.slots = numbers_of(args.slots);
  chain.sampling = args.sampling;
  chain.draft_sampling = args.draft_sampling;
  chain.tokens = numbers_of(args.tokens);
  chain.path = numbers_of(args.path);
  chain.num_emitted = numbers_of(args.num_emitted);
  chain.num_accepted = numbers_of(args.num_accepted);
  chain.next_token = numbers_of(args.next_token);
  chain.next_lengths = numbers_of(args.next_lengths);
  chain.status = numbers_of(args.status);
  chain.stats = scratch.stats;
  chain.lanes = scratch.lanes;
  chain.laws = scratch.laws;
  chain.arrivals = scratch.arrivals;
  return chain;
}

}  // namespace foretoken::cuda
