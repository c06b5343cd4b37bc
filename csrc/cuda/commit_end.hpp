// Commits that also do what is to be done behind a round that a device repeats.
#pragma once

#include <cuda_runtime.h>

#include <vector>

#include "cuda/loop_round.cuh"

namespace foretoken::cuda {

// Makes the commits in which rounds end, one in each, end them. False: one of the rounds does not end in a
// commit of what the loop looks at, and nothing has changed. The graphs are not instantiated yet.
bool end_in_commits(const std::vector<cudaGraph_t>& rounds, LoopGraphArgs loop, MappedWords mapped,
                    LoopHandles handles);

}  // namespace foretoken::cuda
