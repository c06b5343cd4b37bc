#pragma once

#include "ops/commit.hpp"

namespace foretoken::cpu {

void commit(const CommitArgs& args);

}  // namespace foretoken::cpu
