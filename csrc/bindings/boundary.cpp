#include "bindings/boundary.hpp"

#include <string>

#include "bindings/boundary_export.hpp"
#include "dispatch.hpp"

namespace foretoken::boundary {

namespace {

struct DTypeRow {
  DType dtype;
  uint8_t code, bits;  // as DLPack writes it
  const char* name;
};

constexpr DTypeRow kDTypes[] = {
    {DType::float32, kDLFloat, 32, "float32"},
    {DType::bfloat16, kDLBfloat, 16, "bfloat16"},
    {DType::float16, kDLFloat, 16, "float16"},
    {DType::float64, kDLFloat, 64, "float64"},
    {DType::int32, kDLInt, 32, "int32"},
    {DType::int64, kDLInt, 64, "int64"},
    {DType::uint8, kDLUInt, 8, "uint8"},
    {DType::boolean, kDLBool, 8, "bool"},
    {DType::float8_e4m3, kDLFloat8_e4m3fn, 8, "float8_e4m3fn"},
    {DType::float8_e5m2, kDLFloat8_e5m2, 8, "float8_e5m2"},
};

// False: a dtype we have no name for.
bool dtype_from(DLDataType from, DType& to) {
  for (const DTypeRow& row : kDTypes) {
    if (from.code != row.code || from.bits != row.bits) continue;
    to = row.dtype;
    return from.lanes == 1;
  }
  return false;
}

// False: a device we cannot read from.
bool device_from(DLDevice from, Device& to) {
  switch (from.device_type) {
    case kDLCPU:
    case kDLCUDAHost: to = {DeviceType::cpu, 0}; return true;
    case kDLCUDA: to = {DeviceType::cuda, from.device_id}; return true;
    default: return false;
  }
}

std::string text_of(Device device) {
  return device.type == DeviceType::cpu ? "cpu" : "cuda:" + std::to_string(device.index);
}

std::string text_of(DLDevice device) {
  Device known;
  return device_from(device, known) ? text_of(known)
                                    : "DLPack device type " + std::to_string(device.device_type);
}

std::string text_of(DTypes dtypes) {
  std::vector<const char*> names;
  for (const DTypeRow& row : kDTypes) {
    if (dtypes.has(row.dtype)) names.push_back(row.name);
  }
  std::string text;
  for (size_t i = 0; i < names.size(); ++i) {
    if (i > 0) text += i + 1 == names.size() ? " or " : ", ";
    text += names[i];
  }
  return text;
}

std::string text_of(std::initializer_list<Dim> shape) {
  std::string text = "[";
  for (const Dim& dim : shape) {
    if (text.size() > 1) text += ", ";
    switch (dim.rule) {
      case Dim::Rule::equal: text += std::to_string(dim.value); break;
      case Dim::Rule::at_least: text += ">= " + std::to_string(dim.value); break;
      case Dim::Rule::bind:
        text += dim.label;
        if (dim.value > 0) text += " >= " + std::to_string(dim.value);
        break;
    }
  }
  return text + "]";
}

std::string text_of(const int64_t* numbers, int count) {
  std::string text = "[";
  for (int i = 0; i < count; ++i) text += (i > 0 ? ", " : "") + std::to_string(numbers[i]);
  return text + "]";
}

// What the caller asked for, kept together so that a refusal can spell it out.
struct Expected {
  const char* name;
  DTypes dtypes;
  std::initializer_list<Dim> shape;
  Device device;

  std::string text() const {
    return std::string(name) + ": expected " + text_of(dtypes) + " " + text_of(shape) + " on " +
           text_of(device);
  }
};

std::string text_of(const DLTensor& tensor) {
  return dtype_name(tensor.dtype) + " " + text_of(tensor.shape, tensor.ndim) + " on " +
         text_of(tensor.device);
}

[[noreturn, gnu::cold, gnu::noinline]] void refuse(const Expected& expected, const Refusal& refusal) {
  const std::string text = expected.text() + ", got " + refusal.got;
  if (refusal.wrong_kind) throw py::type_error(text);
  throw py::value_error(text);
}

[[noreturn, gnu::cold, gnu::noinline]] void refuse(const Expected& expected, const DLTensor& got,
                                                   const std::string& demand, const std::string& fault) {
  throw py::value_error(expected.text() + demand + ", got " + text_of(got) + fault);
}

bool shape_matches(const DLTensor& tensor, std::initializer_list<Dim> shape) {
  if (tensor.ndim != static_cast<int>(shape.size())) return false;
  const int64_t* size = tensor.shape;
  for (const Dim& dim : shape) {
    if (dim.rule == Dim::Rule::equal ? *size != dim.value : *size < dim.value) return false;
    ++size;
  }
  return true;
}

// Empty tensors have no address; a view's null means None.
alignas(64) char empty_tensor_memory[64];

// Fills in all but dtype and device, and hands the sizes to the dimensions that bind.
void fill_view(TensorView& view, const DLTensor& tensor, std::initializer_list<Dim> shape) {
  view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  view.rank = tensor.ndim;
  int64_t dense = 1;  // the stride without gaps, given to dimensions of size 0 and 1, where any would do
  bool empty = false;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    const int64_t size = tensor.shape[i];
    const Dim& dim = shape.begin()[i];
    if (dim.rule == Dim::Rule::bind) *dim.target = size;
    view.shape[i] = size;
    // DLPack before 1.2 leaves the strides of dense tensors out.
    view.strides[i] = size > 1 && tensor.strides != nullptr ? tensor.strides[i] : dense;
    if (size > 1) dense *= size;
    empty = empty || size == 0;
  }
  if (empty) view.data = empty_tensor_memory;
}

bool layout_matches(const TensorView& view, Layout layout) {
  int64_t dense = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    if (view.shape[i] == 0) return true;
    if (view.strides[i] < 0) return false;
    const bool must_be_dense = layout == Layout::contiguous || (layout == Layout::rows && i == view.rank - 1);
    if (must_be_dense && view.strides[i] != dense) return false;
    dense *= view.shape[i];
  }
  return true;
}

// True when no two elements can share memory: ordered by stride, each dimension steps over all smaller ones.
bool elements_are_apart(const TensorView& view) {
  int order[kMaxRank];  // dimensions by ascending stride
  int count = 0;
  for (int i = 0; i < view.rank; ++i) {
    if (view.shape[i] == 0) return true;
    if (view.shape[i] == 1) continue;
    int place = count++;
    for (; place > 0 && view.strides[order[place - 1]] > view.strides[i]; --place)
      order[place] = order[place - 1];
    order[place] = i;
  }
  int64_t reach = 0;  // largest offset within the dimensions seen so far
  for (int k = 0; k < count; ++k) {
    const int64_t stride = view.strides[order[k]];
    if (stride <= reach) return false;
    reach += (view.shape[order[k]] - 1) * stride;
  }
  return true;
}

}  // namespace

Intake::Intake(const char* op) : op_(op) {}

Intake::Intake(const char* op, Device device) : op_(op), device_(device), has_device_(true) {}

Intake::~Intake() {
  for (const Owner& owner : owners_) release_managed(owner.managed, owner.versioned);
}

TensorView Intake::read(py::handle object, const char* name, DTypes dtypes, std::initializer_list<Dim> shape,
                        Layout layout) {
  return take(object, name, dtypes, shape, layout, Access::read);
}

TensorView Intake::read_or_null(py::handle object, const char* name, DTypes dtypes,
                                std::initializer_list<Dim> shape, Layout layout) {
  return object.is_none() ? TensorView{} : take(object, name, dtypes, shape, layout, Access::read);
}

TensorView Intake::write(py::handle object, const char* name, DTypes dtypes, std::initializer_list<Dim> shape,
                         Layout layout) {
  return take(object, name, dtypes, shape, layout, Access::write);
}

TensorView Intake::write_or_null(py::handle object, const char* name, DTypes dtypes,
                                 std::initializer_list<Dim> shape, Layout layout) {
  return object.is_none() ? TensorView{} : take(object, name, dtypes, shape, layout, Access::write);
}

TensorView Intake::take(py::handle object, const char* name, DTypes dtypes, std::initializer_list<Dim> shape,
                        Layout layout, Access access) {
  const Expected expected{name, dtypes, shape, device_};
  Exported exported;
  Refusal refusal;
  if (!export_tensor(object, exported, refusal)) refuse(expected, refusal);
  if (exported.managed != nullptr) owners_.push_back({exported.managed, exported.versioned});
  const DLTensor& tensor = exported.tensor;

  TensorView view;
  const bool known = device_from(tensor.device, view.device) && dtype_from(tensor.dtype, view.dtype);
  if (!known || (has_device_ && view.device != device_) || !dtypes.has(view.dtype) ||
      !shape_matches(tensor, shape)) {
    refuse(expected, tensor, "", "");
  }
  if (!kBuiltWithCuda && view.device.type == DeviceType::cuda) {
    refuse(expected, tensor, "", std::string(": ") + why_no_cuda());
  }
  fill_view(view, tensor, shape);
  if (!layout_matches(view, layout)) {
    const char* demand = layout == Layout::rows ? " with neighbours in the last dimension side by side"
                         : layout == Layout::contiguous ? " without gaps"
                                                        : " with strides >= 0";
    refuse(expected, tensor, demand, " with strides " + text_of(view.strides, view.rank));
  }
  const int64_t alignment = bytes_of(view.dtype);  // a power of two
  if ((reinterpret_cast<uintptr_t>(view.data) & static_cast<uintptr_t>(alignment - 1)) != 0) {
    refuse(expected, tensor, " aligned to " + std::to_string(alignment) + " bytes", " at an odd address");
  }
  if (access == Access::write) {
    if (exported.read_only) refuse(expected, tensor, " to write to", " that is read-only");
    if (!elements_are_apart(view)) {
      refuse(expected, tensor, " to write to",
             " whose elements overlap in memory: strides " + text_of(view.strides, view.rank));
    }
  }
  note_span(view, name, access);
  if (!has_device_) {
    has_device_ = true;
    device_ = view.device;
  }
  if (exchange_ == nullptr) exchange_ = exported.exchange;
  return view;
}

// Bytes reached over when every step by a multiple of `pitch` counts as none.
uintptr_t Intake::Span::extent_modulo(uintptr_t pitch) const {
  uintptr_t extent = bytes;
  for (int i = 0; i < rank; ++i) {
    if (steps[i] % pitch != 0) extent += static_cast<uintptr_t>(shape[i] - 1) * steps[i];
  }
  return extent;
}

// Parts of one wider buffer (columns of its rows, the keys and values of its heads) interleave without
// touching: they repeat with the same pitch, and are apart modulo the pitch.
bool Intake::Span::apart_from(const Span& other) const {
  if (high <= other.low || other.high <= low) return true;
  for (int i = 0; i < rank; ++i) {
    const uintptr_t pitch = steps[i];
    if (shape[i] == 1 || pitch == 0) continue;
    const uintptr_t shift = (other.low % pitch + pitch - low % pitch) % pitch;
    if (extent_modulo(pitch) <= shift && shift + other.extent_modulo(pitch) <= pitch) return true;
  }
  return false;
}

void Intake::note_span(const TensorView& view, const char* name, Access access) {
  Span span;
  span.low = reinterpret_cast<uintptr_t>(view.data);
  span.bytes = static_cast<uintptr_t>(bytes_of(view.dtype));
  span.high = span.low + span.bytes;
  span.rank = view.rank;
  span.name = name;
  span.written = access == Access::write;
  for (int i = 0; i < view.rank; ++i) {
    if (view.shape[i] == 0) return;  // touches nothing
    span.shape[i] = view.shape[i];
    span.steps[i] = static_cast<uintptr_t>(view.strides[i]) * span.bytes;
    span.high += static_cast<uintptr_t>(view.shape[i] - 1) * span.steps[i];
  }
  for (int i = 0; i < num_spans_; ++i) {
    const Span& other = i < kInlineSpans ? spans_[i] : more_spans_[i - kInlineSpans];
    if ((!span.written && !other.written) || span.apart_from(other)) continue;
    throw py::value_error(std::string(name) + ": expected memory of its own, got memory shared with " +
                          other.name + (span.written ? "" : ", which is written"));
  }
  if (num_spans_ < kInlineSpans) {
    spans_[num_spans_] = span;
  } else {
    more_spans_.push_back(span);
  }
  ++num_spans_;
}

void Intake::peek(py::handle object, const char* name, Exported& exported) {
  Refusal refusal;
  if (!export_tensor(object, exported, refusal)) {
    const std::string text = std::string(name) + ": expected a tensor, got " + refusal.got;
    if (refusal.wrong_kind) throw py::type_error(text);
    throw py::value_error(text);
  }
  if (exported.managed != nullptr) owners_.push_back({exported.managed, exported.versioned});
}

int Intake::rank_of(py::handle object, const char* name) {
  Exported exported;
  peek(object, name, exported);
  return exported.tensor.ndim;
}

std::vector<int64_t> Intake::sizes_of(py::handle object, const char* name, int rank) {
  Exported exported;
  peek(object, name, exported);
  const DLTensor& tensor = exported.tensor;
  if (tensor.ndim != rank) {
    throw py::value_error(std::string(name) + ": expected " + std::to_string(rank) + " dimensions, got " +
                          text_of(tensor));
  }
  return {tensor.shape, tensor.shape + tensor.ndim};
}

Stream Intake::stream() const {
  Stream stream;
  if (device_.type == DeviceType::cuda && exchange_ != nullptr) {
    const auto* api = static_cast<const DLPackExchangeAPI*>(exchange_);
    if (api->current_work_stream(kDLCUDA, device_.index, &stream.handle) != 0) throw py::error_already_set();
  }
  return stream;
}

}  // namespace foretoken::boundary
