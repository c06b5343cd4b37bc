// The border: Python objects in, checked TensorViews out. Below it nothing checks an argument again.
//
// Every refusal is one sentence that names the argument, what was expected and what came:
//   ValueError: draft_tokens: expected int32 or int64 [4, 5] on cpu, got int64 [4, 6] on cpu
// A wrong kind of object is a TypeError, everything else a ValueError.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "ops/tensor_view.hpp"

namespace foretoken::boundary {

namespace py = pybind11;

struct Exported;

// A set of dtypes, in the order in which DType lists them.
class DTypes {
 public:
  constexpr DTypes(DType dtype) : bits_(1u << static_cast<unsigned>(dtype)) {}
  constexpr bool has(DType dtype) const { return (bits_ >> static_cast<unsigned>(dtype)) & 1u; }
  friend constexpr DTypes operator|(DTypes a, DTypes b) { return DTypes(a.bits_ | b.bits_); }

 private:
  constexpr explicit DTypes(uint32_t bits) : bits_(bits) {}
  uint32_t bits_;
};

constexpr DTypes operator|(DType a, DType b) { return DTypes(a) | DTypes(b); }

constexpr DTypes kRealDTypes = DTypes(DType::float32) | DType::bfloat16 | DType::float16;
constexpr DTypes kFloat8DTypes = DTypes(DType::float8_e4m3) | DType::float8_e5m2;
constexpr DTypes kIndexDTypes = DTypes(DType::int32) | DType::int64;

// What one dimension of an argument has to be. A plain number converts to is(number).
struct Dim {
  enum class Rule : uint8_t { equal, at_least, bind };

  Dim(int64_t size) : value(size) {}
  static Dim is(int64_t size) { return Dim(size); }
  static Dim at_least(int64_t size) { return Dim(Rule::at_least, size, nullptr, nullptr); }
  // Takes whatever is there, at least `minimum`, and stores it. `label` is the letter messages show for it.
  static Dim bind(int64_t& size, const char* label = "*", int64_t minimum = 0) {
    return Dim(Rule::bind, minimum, &size, label);
  }

  Rule rule = Rule::equal;
  int64_t value = 0;
  int64_t* target = nullptr;
  const char* label = nullptr;

 private:
  Dim(Rule rule, int64_t value, int64_t* target, const char* label)
      : rule(rule), value(value), target(target), label(label) {}
};

// Which strides an argument may have. Negative strides are refused always.
enum class Layout : uint8_t {
  rows,        // neighbours in the last dimension are neighbours in memory; rows may lie anywhere
  contiguous,  // no gaps
  any,
};

// One per call, on the stack, with the GIL held when it is made and when it dies: it keeps alive what was
// exported through __dlpack__. Views of torch tensors live as long as the tensors, hence as the call.
class Intake {
 public:
  explicit Intake(const char* op);
  Intake(const char* op, Device device);  // where all tensors have to be
  ~Intake();
  Intake(const Intake&) = delete;
  Intake& operator=(const Intake&) = delete;

  // A dense strided tensor of one of `dtypes` and the given shape, aligned to its elements, on the device of
  // the call's first tensor, not overlapping anything the call writes. requires_grad is ignored: reads are
  // detached.
  TensorView read(py::handle object, const char* name, DTypes dtypes, std::initializer_list<Dim> shape,
                  Layout layout = Layout::rows);
  // The same, or None: a view whose data is null.
  TensorView read_or_null(py::handle object, const char* name, DTypes dtypes,
                          std::initializer_list<Dim> shape, Layout layout = Layout::rows);
  // As read; besides not read-only, and no two of its elements share memory, with each other or with another
  // argument of the call.
  TensorView write(py::handle object, const char* name, DTypes dtypes, std::initializer_list<Dim> shape,
                   Layout layout = Layout::rows);
  TensorView write_or_null(py::handle object, const char* name, DTypes dtypes,
                           std::initializer_list<Dim> shape, Layout layout = Layout::rows);

  // Number of dimensions, for arguments that come in more than one rank. Checks the kind of object alone.
  int rank_of(py::handle object, const char* name);
  // Sizes of an argument of that rank, for wrappers that allocate before the checks run.
  std::vector<int64_t> sizes_of(py::handle object, const char* name, int rank);

  Device device() const { return device_; }  // of the first tensor
  Stream stream() const;                     // current stream of that device, as torch sees it
  const char* op() const { return op_; }

 private:
  // Bytes [low, high) an argument touches: elements of `bytes` bytes, `steps` bytes apart in each dimension.
  struct Span {
    uintptr_t low, high, bytes;
    uintptr_t steps[kMaxRank];
    int64_t shape[kMaxRank];
    int32_t rank;
    const char* name;
    bool written;

    uintptr_t extent_modulo(uintptr_t pitch) const;
    bool apart_from(const Span& other) const;
  };
  struct Owner {  // a tensor held through a DLPack capsule
    void* managed;
    bool versioned;
  };
  enum class Access : uint8_t { read, write };

  void peek(py::handle object, const char* name, Exported& exported);
  TensorView take(py::handle object, const char* name, DTypes dtypes, std::initializer_list<Dim> shape,
                  Layout layout, Access access);
  void note_span(const TensorView& view, const char* name, Access access);

  static constexpr int kInlineSpans = 24;

  const char* op_;
  Device device_;
  bool has_device_ = false;
  const void* exchange_ = nullptr;  // the exchange table the first CUDA tensor came through
  int num_spans_ = 0;
  Span spans_[kInlineSpans];
  std::vector<Span> more_spans_;
  std::vector<Owner> owners_;
};

}  // namespace foretoken::boundary
