// What runs in front of the first round of a launch, and behind a round that does not end in a commit: one
// block each.
#pragma once

#include "cuda/loop_round.cuh"

namespace foretoken::cuda {

constexpr int kEndThreads = 256;

__global__ void __launch_bounds__(kEndThreads)
    loop_begin_kernel(const __grid_constant__ LoopGraphArgs args, LoopHandles handles) {
  if (threadIdx.x == 0) {
    write_index(args.progress, 0, kLoopRounds);
    write_index(args.progress, static_cast<int32_t>(LoopEnd::none), kLoopEnd);
  }
  if (args.tier_count > 1) choose_tier(args, handles);
}

__global__ void __launch_bounds__(kEndThreads)
    loop_end_kernel(const __grid_constant__ LoopGraphArgs args, MappedWords mapped, LoopHandles handles) {
  __shared__ HostWords words;
  fetch(mapped, words);
  end_round(args, mapped, handles, words);
}

}  // namespace foretoken::cuda
