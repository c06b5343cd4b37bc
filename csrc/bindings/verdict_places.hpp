// Where the outputs of a verification lie when they share one buffer: wide ones first, so that each is
// aligned.
#pragma once

#include <cstdint>

namespace foretoken {

struct VerdictPlaces {  // in bytes
  int64_t next_lengths = 0, tokens, next_token, num_emitted, num_accepted, status, path, bytes;

  // Of rows with `nodes` drafts whose ids have `id_bytes`, and paths of as many nodes.
  VerdictPlaces(int64_t batch, int64_t nodes, int64_t id_bytes) {
    constexpr int64_t kCount = sizeof(int32_t), kLength = sizeof(int64_t);
    tokens = next_lengths + batch * kLength;
    next_token = tokens + batch * (nodes + 1) * id_bytes;
    num_emitted = next_token + batch * id_bytes;
    num_accepted = num_emitted + batch * kCount;
    status = num_accepted + batch * kCount;
    path = status + batch * kCount;
    bytes = (path + batch * nodes * kCount + kLength - 1) / kLength * kLength;
  }
};

}  // namespace foretoken
