#pragma once

#include "ops/cache.hpp"

namespace foretoken::cpu {

void append(const AppendArgs& args);
void compact(const CompactArgs& args);

}  // namespace foretoken::cpu
