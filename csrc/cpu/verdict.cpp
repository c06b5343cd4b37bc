#include "cpu/verdict.hpp"

#include <limits>
#include <vector>

namespace foretoken::cpu {

namespace {

constexpr float kImpossible = -std::numeric_limits<float>::infinity();

void write_numbers(const VerifyArgs& args, int64_t b, int32_t accepted, int32_t emitted, int64_t closing,
                   int32_t status) {
  write_index(args.num_emitted, emitted, b);
  write_index(args.num_accepted, accepted, b);
  write_index(args.next_token, closing, b);
  // Unsigned, where any base of a damaged row has a result.
  const uint64_t base = static_cast<uint64_t>(read_index(args.base, b));
  write_index(args.next_lengths, static_cast<int64_t>(base - 1 + static_cast<uint64_t>(emitted)), b);
  write_index(args.status, status, b);
}

void write_top(const VerifyArgs::Logprobs& out, int64_t b, int64_t i, const int64_t* tokens,
               const float* logprobs) {
  for (int64_t j = 0; j < out.top_tokens.shape[2]; ++j) {
    write_index(out.top_tokens, tokens[j], b, i, j);
    write_float(out.top, logprobs[j], b, i, j);
  }
}

void write_no_logprobs(const VerifyArgs::Logprobs& out, int64_t b, int64_t i, float logprob) {
  if (out.chosen) write_float(out.chosen, logprob, b, i);
  if (!out.top_tokens) return;
  const std::vector<int64_t> tokens(static_cast<size_t>(out.top_tokens.shape[2]), -1);
  const std::vector<float> logprobs(tokens.size(), kImpossible);
  write_top(out, b, i, tokens.data(), logprobs.data());
}

void write_logprobs(const VerifyArgs::Logprobs& out, int64_t b, int64_t i, const Row& row, const RowLaw& law,
                    int64_t token) {
  if (!law.usable) {
    write_no_logprobs(out, b, i, kImpossible);
    return;
  }
  if (out.chosen) write_float(out.chosen, log_probability(row, law, token), b, i);
  if (!out.top_tokens) return;
  std::vector<int64_t> tokens(static_cast<size_t>(out.top_tokens.shape[2]));
  std::vector<float> logprobs(tokens.size());
  likeliest(row, law, static_cast<int64_t>(tokens.size()), tokens.data(), logprobs.data());
  write_top(out, b, i, tokens.data(), logprobs.data());
}

}  // namespace

void write_no_verdict(const VerifyArgs& args, int64_t b, int32_t status) {
  write_numbers(args, b, 0, 0, -1, status);
  for (int64_t i = 0; i < args.tokens.shape[1]; ++i) {
    write_index(args.tokens, -1, b, i);
    if (args.path && i > 0) write_index(args.path, -1, b, i - 1);
    if (args.path_rows) write_index(args.path_rows, -1, b, i);
    write_no_logprobs(args.processed, b, i, 0.0f);
    write_no_logprobs(args.raw, b, i, 0.0f);
  }
}

void write_verdict(const VerifyArgs& args, int64_t b, TreeRows& rows, int32_t last, int64_t closing,
                   int32_t status) {
  int16_t path[kMaxNodes];
  const int32_t accepted = path_to(rows.tree(), last, path);
  write_numbers(args, b, accepted, accepted + 1, closing, status);
  for (int32_t i = 0; i < static_cast<int32_t>(args.tokens.shape[1]); ++i) {
    const bool emitted = i <= accepted;
    const int32_t node = i == 0 || !emitted ? 0 : path[i - 1];
    const int64_t token = i < accepted ? rows.token(path[i]) : emitted ? closing : -1;
    write_index(args.tokens, token, b, i);
    if (args.path && i > 0) write_index(args.path, emitted ? node : -1, b, i - 1);
    if (args.path_rows) write_index(args.path_rows, emitted ? rows.target_row_index(node) : -1, b, i);
    if (!emitted) {
      write_no_logprobs(args.processed, b, i, 0.0f);
      write_no_logprobs(args.raw, b, i, 0.0f);
      continue;
    }
    if (args.processed.chosen || args.processed.top_tokens) {
      write_logprobs(args.processed, b, i, rows.target_row(node), rows.target_law(node), token);
    }
    if (args.raw.chosen || args.raw.top_tokens) {
      const Row raw = rows.raw_target_row(node);
      write_logprobs(args.raw, b, i, raw, law_of_logits(raw, Processing{}), token);
    }
  }
}

}  // namespace foretoken::cpu
