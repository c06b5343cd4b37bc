// Matrix tiles: eight registers of 16 rows of 64 bytes, and the product of two of them added to a third.
//
// An engine is a class of static functions, `begin` and `end` around the use of its tiles, on one thread:
//   zero<t>(), load<t>(memory, stride), store<t>(memory, stride): tile t; strides in bytes
//   multiply<c, a, b>(): c, 16 x 16 float32, gains a, 16 x 32 bfloat16, times b, 32 x 16 bfloat16, of which
//   row k holds the pairs (b[2k][n], b[2k + 1][n]).
// The processor's own is in x86/tiles_amx.hpp. EmulatedTiles does the same with plain arithmetic, bit for bit
// ("Intel 64 and IA-32 Architectures Software Developer's Manual", TDPBF16PS): of each pair, the products of
// the first and of the second elements are summed apart, each with one rounding a step; then the two sums are
// added, and their sum to the tile. What is subnormal counts as zero, of what is read and of every result.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "math/half.hpp"

namespace foretoken::cpu {

constexpr int64_t kTileRows = 16, kTileRowBytes = 64, kTileBytes = kTileRows * kTileRowBytes;
constexpr int64_t kTileDepth = 32;  // bfloat16 of a tile's row
constexpr int64_t kTileColumns = 16;

// sum += left * right, of whole tiles.
template <class Tiles>
void multiply_tiles_in_memory(const void* left, const void* right, void* sum) {
  Tiles::begin();
  Tiles::template load<0>(sum, kTileRowBytes);
  Tiles::template load<1>(left, kTileRowBytes);
  Tiles::template load<2>(right, kTileRowBytes);
  Tiles::template multiply<0, 1, 2>();
  Tiles::template store<0>(sum, kTileRowBytes);
  Tiles::end();
}

class EmulatedTiles {
 public:
  static void begin() {}
  static void end() {}

  template <int tile>
  static void zero() {
    std::memset(tiles()[tile], 0, kTileBytes);
  }
  template <int tile>
  static void load(const void* memory, int64_t stride) {
    for (int64_t row = 0; row < kTileRows; ++row) {
      std::memcpy(tiles()[tile][row], static_cast<const char*>(memory) + row * stride, kTileRowBytes);
    }
  }
  template <int tile>
  static void store(void* memory, int64_t stride) {
    for (int64_t row = 0; row < kTileRows; ++row) {
      std::memcpy(static_cast<char*>(memory) + row * stride, tiles()[tile][row], kTileRowBytes);
    }
  }
  template <int to, int left, int right>
  static void multiply() {
    multiply_into(tiles()[to], tiles()[left], tiles()[right]);
  }

 private:
  typedef unsigned char Tile[kTileRows][kTileRowBytes];

  static Tile* tiles() {
    alignas(64) thread_local Tile tiles[8];
    return tiles;
  }

  static float flush(float value) {
    return std::fabs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value;
  }

  // The float32 next to a sum of two numbers that float64 holds exactly enough: a product of two bfloat16 has
  // 16 bits, so that what float64 rounds away never decides. Below the least normal number, before rounding
  // to it, the result is zero.
  static float rounded(double sum) {
    return std::fabs(sum) < 0x1p-126 - 0x1p-151 ? static_cast<float>(std::copysign(0.0, sum))
                                                : static_cast<float>(sum);
  }

  static void read_row(const unsigned char* row, float* elements) {
    for (int64_t i = 0; i < kTileDepth; ++i) {
      uint16_t bits;
      std::memcpy(&bits, row + 2 * i, sizeof bits);
      elements[i] = flush(float_of_bfloat(bits));
    }
  }

  static void multiply_into(Tile& to, const Tile& left, const Tile& right) {
    float pairs[kTileRows][kTileDepth];
    for (int64_t k = 0; k < kTileRows; ++k) read_row(right[k], pairs[k]);
    for (int64_t m = 0; m < kTileRows; ++m) {
      float factors[kTileDepth], sums[kTileDepth] = {};
      read_row(left[m], factors);
      for (int64_t k = 0; k < kTileRows; ++k) {
        for (int64_t n = 0; n < kTileDepth; ++n) {
          const double product =
              static_cast<double>(factors[2 * k + n % 2]) * static_cast<double>(pairs[k][n]);
          sums[n] = rounded(static_cast<double>(sums[n]) + product);
        }
      }
      for (int64_t n = 0; n < kTileColumns; ++n) {
        float sum;
        std::memcpy(&sum, to[m] + 4 * n, sizeof sum);
        sum = flush(flush(sum) + flush(sums[2 * n] + sums[2 * n + 1]));
        std::memcpy(to[m] + 4 * n, &sum, sizeof sum);
      }
    }
  }
};

}  // namespace foretoken::cpu
