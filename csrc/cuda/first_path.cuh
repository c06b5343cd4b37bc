// The leading warp's part of gbv: cpu/first_path.hpp on a device.
#pragma once

#include "cuda/verify_rows.cuh"

namespace foretoken::cuda {

// The children of the nodes that the best prefix ends in, in the CPU's order; returns their number.
inline __device__ int32_t VerifyRows::list_followers(int32_t nodes) {
  int32_t count = 0;
  for (int32_t i = 0; i < nodes; ++i) {
    int32_t child = tree().first_child[shared_.prefix[i]];
    for (; child != kNoNode; child = tree().next_sibling[child], ++count) {
      if (lane_id() == 0) shared_.followers[count] = static_cast<int16_t>(child);
    }
  }
  __syncwarp();
  return count;
}

inline __device__ uint64_t VerifyRows::draft_mass(int32_t node, int64_t token) const {
  const RowLaw& law = shared_.draft[node];
  if (law.kind == LawKind::point) return token == law.top ? 1 : 0;
  const int64_t law_row = shared_.law_row[node];
  if (request_.has_row_laws()) {
    const DeviceRow row = request_.draft_row(node, law_row);
    return token < row.size ? mass_of(weight_in(law, element_at(row, token))) : 0;
  }
  for (int64_t i = 0; i < args_.topk_ids.shape[2]; ++i) {
    if (counts(law_row, i) && list_id(law_row, i) == token)
      return mass_of(weight_in(law, list_prob(law_row, i)));
  }
  return 0;
}

// Of the followers' tokens the one that ranks highest by the laws of `node`; of equals the larger id.
inline __device__ int64_t VerifyRows::best_follower(int32_t node, int32_t followers) {
  const RowLaw& law = target_law(node);
  uint64_t most = 0;
  int64_t best = -1;
  const auto offer = [&](uint64_t key, int64_t id) {
    if (key < most || (key == most && id <= best)) return;
    most = key;
    best = id;
  };
  for (int32_t i = lane_id(); i < followers; i += kWarpSize) {
    const int64_t id = token(shared_.followers[i]);
    const float of_target = weight_in(law, element_at(target_row(node), id));
    offer(rank_key(of_target, draft_mass(node, id)), id);
  }
#pragma unroll
  for (int lanes = 16; lanes >= 1; lanes /= 2) {
    const uint64_t key = __shfl_xor_sync(kAllLanes, most, lanes);
    const int64_t id = __shfl_xor_sync(kAllLanes, best, lanes);
    offer(key, id);
  }
  return best;
}

// A short list as a row, in the place of the law that is made from it.
inline __device__ void VerifyRows::spread_list(int32_t node, int32_t level) {
  const int64_t law_row = shared_.law_row[node];
  float* const row = request_.first_law_data(level);
  for (int64_t id = lane_id(); id < request_.vocab(); id += kWarpSize) row[id] = 0.0f;
  __syncwarp();
  for (int64_t i = lane_id(); i < args_.topk_ids.shape[2]; i += kWarpSize) {
    if (counts(law_row, i)) row[list_id(law_row, i)] = list_prob(law_row, i);
  }
}

// The law of being first behind `node`, in the row of its depth; the interval of the prefix that goes on with
// `best`.
inline __device__ PathInterval VerifyRows::rank_tokens(int32_t node, int32_t level, const PathInterval& at,
                                                       int64_t best) {
  Command command = about(Task::rank, node);
  command.level = level;
  command.at = at;
  command.token = best;
  command.draft_law = shared_.draft[node];
  command.with_draft = request_.has_row_laws();
  if (!command.with_draft) spread_list(node, level);
  if (lane_id() == 0) shared_.part[0] = 0;  // what is never drawn ranks before all others
  call(command);
  const double total = static_cast<double>(shared_.part[1]);
  return at.narrowed(static_cast<double>(shared_.part[0]) / total,
                     static_cast<double>(draft_mass(node, best)) / total);
}

// The nodes of the path get the laws of their depths, and it is all that is left of the tree.
inline __device__ void VerifyRows::keep_ranked_path(int32_t last, int32_t depth) {
  if (depth > 0) {
    Command command;
    command.task = Task::first_laws;
    command.count = depth;
    call(command);
  }
  __syncwarp();
  if (lane_id() == 0) {
    int16_t* const path = shared_.prefix;
    path_to(shared_.tree, last, path);
    for (int32_t i = depth - 1; i >= 0; --i) {  // a node's number is no less than its depth
      const int32_t child = path[i], parent = i > 0 ? path[i - 1] : 0;
      const RowLaw law = shared_.draft[i];
      shared_.draft[parent] = law;
      shared_.draft_prob[child] = law.kind == LawKind::point
                                      ? (token(child) == law.top ? 1.0 : 0.0)
                                      : probability_in(law, element_at(request_.first_law(i), token(child)));
    }
    keep_path(shared_.tree, path, depth);
  }
  __syncwarp();
  ranked_ = true;
}

inline __device__ __noinline__ void VerifyRows::keep_first_path(int32_t num_paths) {
  PathInterval at{0.0, 1.0, num_paths};
  int32_t nodes = 1, level = 0;  // how many the best prefix ends in, and how long it is
  if (lane_id() == 0) shared_.prefix[0] = 0;
  __syncwarp();
  while (usable(shared_.prefix[0])) {
    const int32_t followers = list_followers(nodes);
    if (followers == 0) break;
    const int32_t node = shared_.prefix[0];
    const int64_t best = best_follower(node, followers);
    at = rank_tokens(node, level++, at, best);
    nodes = 0;
    for (int32_t i = 0; i < followers; ++i) {
      if (token(shared_.followers[i]) != best) continue;
      if (lane_id() == 0) shared_.prefix[nodes] = shared_.followers[i];
      ++nodes;
    }
    __syncwarp();
  }
  keep_ranked_path(shared_.prefix[0], level);
}

}  // namespace foretoken::cuda
