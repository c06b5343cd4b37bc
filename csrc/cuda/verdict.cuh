// Writing down what a verification decided, by the leading warp.
#pragma once

#include "cuda/verify_rows.cuh"

namespace foretoken::cuda {

class VerdictWriter {
 public:
  __device__ VerdictWriter(const VerifyArgs& args, int64_t b) : args_(args), b_(b) {}

  // Nothing was emitted.
  __device__ __noinline__ void none(int32_t status) const {
    if (lane_id() == 0) numbers(0, 0, -1, status);
    for (int64_t i = lane_id(); i < args_.tokens.shape[1]; i += kWarpSize) {
      write_index(args_.tokens, -1, b_, i);
      if (args_.path && i > 0) write_index(args_.path, -1, b_, i - 1);
      if (args_.path_rows) write_index(args_.path_rows, -1, b_, i);
    }
    for (int64_t i = 0; i < args_.tokens.shape[1]; ++i) {
      no_logprobs(args_.processed, i, 0.0f);
      no_logprobs(args_.raw, i, 0.0f);
    }
  }

  __device__ __noinline__ void verdict(const Request& request, VerifyRows& rows, int32_t last,
                                       int64_t closing, int32_t status) const {
    const TreeIndex& tree = rows.tree();
    const int32_t accepted = tree.depth[last];
    if (lane_id() == 0) numbers(accepted, accepted + 1, closing, status);
    const int32_t columns = static_cast<int32_t>(args_.tokens.shape[1]);
    for (int32_t i = lane_id(); i < columns; i += kWarpSize) {
      const int32_t node = i <= accepted ? ancestor(tree, last, i) : 0;
      const int64_t token = i < accepted    ? rows.token(ancestor(tree, last, i + 1))
                            : i == accepted ? closing
                                            : -1;
      write_index(args_.tokens, token, b_, i);
      if (args_.path && i > 0) write_index(args_.path, i <= accepted ? node : -1, b_, i - 1);
      if (args_.path_rows)
        write_index(args_.path_rows, i <= accepted ? request.target_row_index(node) : -1, b_, i);
    }
    const bool processed = args_.processed.chosen || args_.processed.top_tokens;
    const bool raw = args_.raw.chosen || args_.raw.top_tokens;
    if (!processed && !raw) return;
    for (int32_t i = 0; i < columns; ++i) {
      if (i > accepted) {
        no_logprobs(args_.processed, i, 0.0f);
        no_logprobs(args_.raw, i, 0.0f);
        continue;
      }
      const int32_t node = ancestor(tree, last, i);
      const int64_t token = i < accepted ? rows.token(ancestor(tree, last, i + 1)) : closing;
      if (processed)
        logprobs(rows, args_.processed, i, rows.about(Task::best, node), rows.target_row(node), token);
      if (!raw) continue;
      Command command;
      command.task = Task::best;
      command.first = node;
      command.raw = true;
      command.target_law = rows.raw_law(node);
      logprobs(rows, args_.raw, i, command, request.raw_target_row(node), token);
    }
  }

 private:
  // The node of the path to `last` at a depth.
  __device__ static int32_t ancestor(const TreeIndex& tree, int32_t last, int32_t depth) {
    int32_t node = last;
    while (tree.depth[node] > depth) node = tree.parent[node];
    return node;
  }

  __device__ void numbers(int32_t accepted, int32_t emitted, int64_t closing, int32_t status) const {
    write_index(args_.num_emitted, emitted, b_);
    write_index(args_.num_accepted, accepted, b_);
    write_index(args_.next_token, closing, b_);
    // Unsigned, where any base of a damaged row has a result.
    const uint64_t base = static_cast<uint64_t>(read_index(args_.base, b_));
    write_index(args_.next_lengths, static_cast<int64_t>(base - 1 + static_cast<uint64_t>(emitted)), b_);
    write_index(args_.status, status, b_);
  }

  __device__ void no_logprobs(const VerifyArgs::Logprobs& out, int64_t i, float logprob) const {
    if (lane_id() != 0) return;
    if (out.chosen) write_float(out.chosen, logprob, b_, i);
    for (int64_t j = 0; out.top_tokens && j < out.top_tokens.shape[2]; ++j) top(out, i, j, -1, -infinity());
  }

  __device__ void top(const VerifyArgs::Logprobs& out, int64_t i, int64_t j, int64_t token,
                      float logprob) const {
    write_index(out.top_tokens, token, b_, i, j);
    write_float(out.top, logprob, b_, i, j);
  }

  // `command`: about the row, with its law.
  __device__ __noinline__ void logprobs(VerifyRows& rows, const VerifyArgs::Logprobs& out, int64_t i,
                                        Command command, const DeviceRow& row, int64_t token) const {
    const RowLaw& law = command.target_law;
    if (!law.usable) return no_logprobs(out, i, -infinity());
    if (out.chosen && lane_id() == 0) {
      write_float(out.chosen, log_probability(law, token, element_at(row, token)), b_, i);
    }
    if (!out.top_tokens) return;
    command.bound = infinity();
    for (int64_t j = 0; j < out.top_tokens.shape[2]; ++j) {
      int64_t found = -1;
      if (law.kind == LawKind::point) {
        found = j == 0 ? law.top : -1;
      } else if (const uint64_t entry = rows.most(command)) {
        found = static_cast<int64_t>(0xFFFFFFFFull - (entry & 0xFFFFFFFFull));
        command.bound = value_of(static_cast<uint32_t>(entry >> 32));
        command.below = found;
      }
      if (found < 0) command.bound = -infinity();
      const float logprob = found < 0 ? -infinity() : log_probability(law, found, element_at(row, found));
      if (lane_id() == 0) top(out, i, j, found, logprob);
    }
  }

  const VerifyArgs& args_;
  const int64_t b_;
};

}  // namespace foretoken::cuda
