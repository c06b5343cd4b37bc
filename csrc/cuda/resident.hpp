// Laws of filtered rows by a kernel that keeps each row in the shared memory of a cluster.
#pragma once

#include "cuda/chain_args.hpp"

namespace foretoken::cuda {

// For verification: the records and statistics of all rows that `args` asks for, into args.laws and
// args.stats, filtered or not. For sampling: everything. False: the device cannot keep such rows, and nothing
// is launched.
bool launch_resident(DType dtype, const ChainArgs& args, int64_t requests, Device device, Stream stream);

}  // namespace foretoken::cuda
