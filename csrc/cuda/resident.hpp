// Laws of filtered rows by a kernel that keeps each row in the shared memory of a cluster.
#pragma once

#include "cuda/chain_args.hpp"

namespace foretoken::cuda {

// Whether launch_resident() can serve rows of so many elements on that device.
bool keeps_rows(DType dtype, int64_t vocab, Device device);

// For verification: the records and statistics of all rows that `args` asks for, into args.laws and
// args.stats, filtered or not. For sampling: everything.
void launch_resident(DType dtype, const ChainArgs& args, int64_t requests, Device device, Stream stream);

}  // namespace foretoken::cuda
