#pragma once

#include "ops/prepare.hpp"

namespace foretoken::cpu {

// What the kernels of csrc/cuda do, block by block and thread by thread: the proofs hold it against the edits
// the CPU makes. `least_blocks`: how finely the work is cut.
PreparedRows prepare(PrepareArgs args, const Preparation& what, void* workspace, int64_t least_blocks);

}  // namespace foretoken::cpu
