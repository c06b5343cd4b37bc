#pragma once

#include "ops/verify.hpp"

namespace foretoken::cpu {

void verify(const VerifyArgs& args);

}  // namespace foretoken::cpu
