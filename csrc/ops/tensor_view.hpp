// What a tensor is below the border: a pointer and its layout. No ownership, no Python, no checks.
#pragma once

#include <cstdint>

#include "math/portability.hpp"

namespace foretoken {

enum class DType : uint8_t {
  float32,
  bfloat16,
  float16,
  float64,
  int32,
  int64,
  uint8,
  boolean,
  float8_e4m3,  // without infinities: torch.float8_e4m3fn
  float8_e5m2,
};

enum class DeviceType : uint8_t { cpu, cuda };

struct Device {
  DeviceType type = DeviceType::cpu;
  int32_t index = 0;
  friend bool operator==(Device a, Device b) { return a.type == b.type && a.index == b.index; }
  friend bool operator!=(Device a, Device b) { return !(a == b); }
};

struct Stream {
  void* handle = nullptr;  // cudaStream_t; always null on the CPU
};

constexpr int kMaxRank = 5;

struct TensorView {
  void* data = nullptr;  // null: the argument was None
  DType dtype = DType::float32;
  Device device;
  int32_t rank = 0;
  int64_t shape[kMaxRank] = {};
  int64_t strides[kMaxRank] = {};  // in elements

  FORETOKEN_HD explicit operator bool() const { return data != nullptr; }
};

constexpr int64_t bytes_of(DType dtype) {
  switch (dtype) {
    case DType::float64:
    case DType::int64: return 8;
    case DType::float32:
    case DType::int32: return 4;
    case DType::bfloat16:
    case DType::float16: return 2;
    case DType::uint8:
    case DType::boolean:
    case DType::float8_e4m3:
    case DType::float8_e5m2: return 1;
  }
  return 0;
}

}  // namespace foretoken
