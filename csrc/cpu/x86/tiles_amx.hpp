// The tiles of a processor with AMX. What begins on a thread has to end on it.
#pragma once

#include <immintrin.h>

#include "cpu/tiles.hpp"

namespace foretoken::cpu {

class AmxTiles {
 public:
  static void begin() {
    alignas(64) static const Shapes shapes;
    _tile_loadconfig(&shapes);
  }
  static void end() { _tile_release(); }

  // The compiler's own functions take the tile's number as text that they put into the instruction, which a
  // template's argument is not.
  template <int tile>
  static void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(tile));
  }
  template <int tile>
  static void load(const void* memory, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(memory), "r"(stride), "i"(tile) : "memory");
  }
  template <int tile>
  static void store(void* memory, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(memory), "r"(stride), "i"(tile) : "memory");
  }
  template <int to, int left, int right>
  static void multiply() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(to), "i"(left), "i"(right));
  }

 private:
  struct Shapes {  // as LDTILECFG reads it
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    Shapes() {
      for (int tile = 0; tile < 8; ++tile) {
        row_bytes[tile] = kTileRowBytes;
        rows[tile] = kTileRows;
      }
    }
  };
};

}  // namespace foretoken::cpu
