// Writing what a verification decided to its output tensors.
#pragma once

#include "cpu/tree_rows.hpp"

namespace foretoken::cpu {

// `last`: the last accepted node; `closing`: the token drawn from its row.
void write_verdict(const VerifyArgs& args, int64_t b, TreeRows& rows, int32_t last, int64_t closing,
                   int32_t status);

// For a padded row, or one that names nothing to read.
void write_no_verdict(const VerifyArgs& args, int64_t b, int32_t status);

}  // namespace foretoken::cpu
