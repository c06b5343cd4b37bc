// Matrix tiles of the processor, and beside them the same loops on emulated ones, whose bits are equal.
#include "cpu/x86/attention_vector_avx512.hpp"
#include "cpu/x86/tiles_amx.hpp"

#define FORETOKEN_ATTENTION_TILES
#include "cpu/attention_kernels.inl"

namespace foretoken::cpu {

namespace {

inline void zip_halves(const char* a, const char* b, char* low, char* high) {
  alignas(64) static constexpr uint16_t kLow[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                    37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                    11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i first = _mm512_loadu_si512(a), second = _mm512_loadu_si512(b);
  const __m512i order = _mm512_load_si512(kLow);
  _mm512_storeu_si512(low, _mm512_permutex2var_epi16(first, order, second));
  const __m512i upper = _mm512_add_epi16(order, _mm512_set1_epi16(16));
  _mm512_storeu_si512(high, _mm512_permutex2var_epi16(first, upper, second));
}

inline void narrow_weights(Vec weights, char* to) {
  const __m256bh narrow = _mm512_cvtneps_pbh(weights.lane);
  std::memcpy(to, &narrow, sizeof narrow);
}

}  // namespace

}  // namespace foretoken::cpu

#include "cpu/attention_tiles.inl"

namespace foretoken::cpu {

void multiply_amx_tiles(const void* left, const void* right, void* sum);
void multiply_amx_tiles(const void* left, const void* right, void* sum) {
  multiply_tiles_in_memory<AmxTiles>(left, right, sum);
}

extern const AttentionKernels kAmxAttention;
const AttentionKernels kAmxAttention = {"amx", attend_tiles<AmxTiles>, widen, arrange_tiles, merge, narrow,
                                        true};

extern const AttentionKernels kEmulatedAmxAttention;
const AttentionKernels kEmulatedAmxAttention = {
    "emulated amx", attend_tiles<EmulatedTiles>, widen, arrange_tiles, merge, narrow, true};

}  // namespace foretoken::cpu
