// Matrix tiles by plain arithmetic, on any processor: for tests alone.
#include "cpu/attention_vector_portable.hpp"
#include "cpu/tiles.hpp"

#define FORETOKEN_ATTENTION_TILES
#include "cpu/attention_kernels.inl"

namespace foretoken::cpu {

namespace {

void zip_halves(const char* a, const char* b, char* low, char* high) {
  for (int64_t i = 0; i < kTileDepth; ++i) {
    char* to = (i < kTileDepth / 2 ? low : high) + i % (kTileDepth / 2) * 4;
    std::memcpy(to, a + 2 * i, 2);
    std::memcpy(to + 2, b + 2 * i, 2);
  }
}

void narrow_weights(Vec weights, char* to) { weights.narrow(Kind<DType::bfloat16>{}, to); }

}  // namespace

}  // namespace foretoken::cpu

#include "cpu/attention_tiles.inl"

namespace foretoken::cpu {

void multiply_emulated_tiles(const void* left, const void* right, void* sum);
void multiply_emulated_tiles(const void* left, const void* right, void* sum) {
  multiply_tiles_in_memory<EmulatedTiles>(left, right, sum);
}

extern const AttentionKernels kEmulatedTileAttention;
const AttentionKernels kEmulatedTileAttention = {
    "emulated tiles", attend_tiles<EmulatedTiles>, widen, arrange_tiles, merge, narrow, true};

}  // namespace foretoken::cpu
