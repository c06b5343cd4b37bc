#pragma once
#include <cstdint>
namespace foretoken::cuda {
struct PreparedRows {
  const float* target = nullptr;
  const float* draft = nullptr;
  const float* mapped = nullptr;
  const uint8_t* draft_unsound = nullptr;
  const uint8_t* history_unusable = nullptr;
};
}  // namespace foretoken::cuda
