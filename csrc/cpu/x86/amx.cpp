#include "cpu/x86/amx.hpp"

#include <cpuid.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace foretoken::cpu {

namespace {

constexpr uint32_t bit(int number) { return uint32_t{1} << number; }

bool processor_has_tiles() {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  constexpr uint32_t kBfloatTiles = bit(22), kTiles = bit(24);
  return (d & kBfloatTiles) != 0 && (d & kTiles) != 0;
}

// What the system saves and restores of a thread: without tiles in it, their use is an illegal instruction.
bool system_saves_tiles() {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & bit(27)) == 0) return false;  // no XGETBV
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr uint32_t kTileState = bit(17) | bit(18);
  return (low & kTileState) == kTileState;
}

bool ask_the_system() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

bool has_avx512_bf16() {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & bit(5)) != 0;
}

bool amx_is_usable() {
  static const bool usable =
      has_avx512_bf16() && processor_has_tiles() && system_saves_tiles() && ask_the_system();
  return usable;
}

}  // namespace foretoken::cpu
