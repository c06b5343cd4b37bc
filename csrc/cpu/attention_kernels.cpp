#include "cpu/attention_kernels.hpp"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "cpu/row_kernels.hpp"
#include "cpu/tiles.hpp"
#if defined(FORETOKEN_HAS_AMX)
#include "cpu/x86/amx.hpp"
#endif

namespace foretoken::cpu {

extern const AttentionKernels kPortableAttention;
extern const AttentionKernels kEmulatedTileAttention;
void multiply_emulated_tiles(const void* left, const void* right, void* sum);
#if defined(__x86_64__)
extern const AttentionKernels kAvx2Attention;
extern const AttentionKernels kAvx512Attention;
#endif
#if defined(FORETOKEN_HAS_AMX)
extern const AttentionKernels kAmxAttention;
extern const AttentionKernels kEmulatedAmxAttention;
void multiply_amx_tiles(const void* left, const void* right, void* sum);
#endif

namespace {

struct Matrix {
  const AttentionKernels* kernels;  // null: none
  void (*multiply)(const void* left, const void* right, void* sum);
  bool emulated;
};

constexpr Matrix kNoMatrix = {nullptr, nullptr, false};
constexpr Matrix kEmulatedTiles = {&kEmulatedTileAttention, multiply_emulated_tiles, true};
#if defined(FORETOKEN_HAS_AMX)
constexpr Matrix kAmx = {&kAmxAttention, multiply_amx_tiles, false};
constexpr Matrix kEmulatedAmx = {&kEmulatedAmxAttention, multiply_emulated_tiles, true};
#endif

// Null: not here.
const Matrix* matrix_named(const char* name) {
  if (std::strcmp(name, "none") == 0) return &kNoMatrix;
  if (std::strcmp(name, kEmulatedTileAttention.name) == 0) return &kEmulatedTiles;
#if defined(FORETOKEN_HAS_AMX)
  const bool wide = row_kernels_named("avx512") != nullptr && has_avx512_bf16();
  if (std::strcmp(name, kAmxAttention.name) == 0 && wide && amx_is_usable()) return &kAmx;
  if (std::strcmp(name, kEmulatedAmxAttention.name) == 0 && wide) return &kEmulatedAmx;
#endif
  return nullptr;
}

const Matrix* find_matrix() {
  const Matrix* found = std::getenv("FORETOKEN_CPU") == nullptr ? matrix_named("amx") : nullptr;
  return found != nullptr ? found : &kNoMatrix;
}

std::atomic<const Matrix*> chosen{nullptr};

const Matrix& matrix() {
  const Matrix* found = chosen.load(std::memory_order_relaxed);
  if (found == nullptr) {
    found = find_matrix();
    chosen.store(found, std::memory_order_relaxed);
  }
  return *found;
}

const AttentionKernels& vector_kernels() {
#if defined(__x86_64__)
  const char* path = row_kernels().name;
  if (std::strcmp(path, kAvx512Attention.name) == 0) return kAvx512Attention;
  if (std::strcmp(path, kAvx2Attention.name) == 0) return kAvx2Attention;
#endif
  return kPortableAttention;
}

}  // namespace

const AttentionKernels& attention_kernels(DType queries, DType cache) {
  const AttentionKernels& vectors = vector_kernels();
  if (queries != DType::bfloat16 || cache != DType::bfloat16) return vectors;
  const Matrix& tiles = matrix();
  const bool serves = tiles.emulated || std::strcmp(vectors.name, "avx512") == 0;
  return tiles.kernels != nullptr && serves ? *tiles.kernels : vectors;
}

const char* matrix_kernels() {
  const Matrix& tiles = matrix();
  return tiles.kernels != nullptr ? tiles.kernels->name : "none";
}

bool force_matrix_kernels(const char* name) {
  const Matrix* found = std::strcmp(name, "auto") == 0 ? find_matrix() : matrix_named(name);
  if (found != nullptr) chosen.store(found, std::memory_order_relaxed);
  return found != nullptr;
}

bool multiply_tiles(const char* name, const void* left, const void* right, void* sum) {
  const Matrix* found = matrix_named(name);
  if (found == nullptr || found->multiply == nullptr) return false;
  found->multiply(left, right, sum);
  return true;
}

}  // namespace foretoken::cpu
