#include "bindings/boundary_export.hpp"

#include <memory>
#include <vector>

#include "bindings/boundary_lazy_neg.hpp"

namespace foretoken::boundary {

namespace {

enum class Kind : uint8_t {
  torch_table,     // torch tensor, exchange table on its type
  torch_method,    // torch tensor of a torch without the table
  torch_opaque,    // torch tensor subclass that intercepts operations: FakeTensor, DTensor, nested
  foreign_method,  // anything else with __dlpack__
  not_a_tensor,
};

// What we know about a Python type. Entries live as long as the process and keep their type alive, so that
// its address cannot be taken by another type.
struct Source {
  PyTypeObject* type;
  Kind kind;
  const DLPackExchangeAPI* api;
};

py::object torch_module() {
  PyObject* modules = PyImport_GetModuleDict();  // borrowed
  PyObject* torch = PyDict_GetItemString(modules, "torch");
  return py::reinterpret_borrow<py::object>(torch);
}

py::object attribute_or_none(py::handle object, const char* name) {
  PyObject* value = PyObject_GetAttrString(object.ptr(), name);
  if (value == nullptr) {
    PyErr_Clear();
    return py::none();
  }
  return py::reinterpret_steal<py::object>(value);
}

const DLPackExchangeAPI* exchange_table_of(py::handle type) {
  const py::object capsule = attribute_or_none(type, "__dlpack_c_exchange_api__");
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  auto* header =
      static_cast<DLPackExchangeAPIHeader*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (header != nullptr && header->version.major != DLPACK_MAJOR_VERSION) header = header->prev_api;
  auto* api = reinterpret_cast<DLPackExchangeAPI*>(header);
  return api != nullptr && api->dltensor_from_py_object_no_sync != nullptr ? api : nullptr;
}

const LazyNegation*& lazy_negation() {
  static const LazyNegation* instance = nullptr;  // never freed: outlives every call
  return instance;
}

Source resolve(PyTypeObject* type) {
  const py::handle handle(reinterpret_cast<PyObject*>(type));
  const py::object torch = torch_module();
  const py::object tensor_type = torch ? attribute_or_none(torch, "Tensor") : py::none();
  const bool is_torch = PyType_Check(tensor_type.ptr()) &&
                        PyType_IsSubtype(type, reinterpret_cast<PyTypeObject*>(tensor_type.ptr()));
  if (!is_torch) {
    const bool exports = !attribute_or_none(handle, "__dlpack__").is_none();
    return {type, exports ? Kind::foreign_method : Kind::not_a_tensor, nullptr};
  }
  if (!attribute_or_none(handle, "__torch_dispatch__")
           .is(attribute_or_none(tensor_type, "__torch_dispatch__"))) {
    return {type, Kind::torch_opaque, nullptr};
  }
  if (lazy_negation() == nullptr) lazy_negation() = new LazyNegation(torch);
  const DLPackExchangeAPI* api = exchange_table_of(handle);
  return {type, api != nullptr ? Kind::torch_table : Kind::torch_method, api};
}

const Source& source_of(PyTypeObject* type) {
  static std::vector<std::unique_ptr<Source>> sources;
  static const Source* latest = nullptr;
  if (latest != nullptr && latest->type == type) return *latest;
  for (const auto& source : sources) {
    if (source->type == type) return *(latest = source.get());
  }
  Py_INCREF(type);
  sources.push_back(std::make_unique<Source>(resolve(type)));
  return *(latest = sources.back().get());
}

// The message of the Python error that is set, first line, and clears it.
std::string take_error_text() {
  py::error_already_set error;
  std::string text = py::str(error.value()).cast<std::string>();
  return text.substr(0, text.find('\n'));
}

bool truthy(py::handle object, const char* name) {
  const py::object value = attribute_or_none(object, name);
  return value.ptr() == Py_True;
}

// Why a torch tensor has no memory that we could look at.
std::string describe_odd_tensor(py::handle tensor, const std::string& otherwise) {
  const std::string type =
      py::handle(reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr()))).attr("__name__").cast<std::string>();
  if (truthy(tensor, "is_nested")) return "a nested tensor";
  if (truthy(tensor, "is_quantized")) return "a quantized tensor";
  if (truthy(tensor, "is_meta")) return "a meta tensor, which has no data";
  const py::object layout = attribute_or_none(tensor, "layout");
  const std::string layout_name = py::str(layout).cast<std::string>();
  if (layout_name.find("sparse") != std::string::npos) return "a sparse tensor (" + layout_name + ")";
  if (!layout.is_none() && layout_name != "torch.strided") return "a tensor of layout " + layout_name;
  if (source_of(Py_TYPE(tensor.ptr())).kind == Kind::torch_opaque) {
    return "a " + type + ", a tensor subclass that intercepts operations and has no plain memory";
  }
  return otherwise;
}

int64_t count_elements(const DLTensor& tensor) {
  int64_t count = 1;
  for (int i = 0; i < tensor.ndim; ++i) count *= tensor.shape[i];
  return count;
}

constexpr const char* kNegated = "a lazily negated view (call resolve_neg() on it)";
constexpr const char* kNoMemory = "a tensor without memory (fake, functional or freed)";

bool export_through_table(py::handle object, const Source& source, Exported& out, Refusal& refusal) {
  if (source.api->dltensor_from_py_object_no_sync(object.ptr(), &out.tensor) != 0) {
    const std::string text = take_error_text();
    refusal.got = describe_odd_tensor(object, "a tensor that cannot be exported: " + text);
    return false;
  }
  if (lazy_negation()->is_negated(object)) {
    refusal.got = kNegated;
    return false;
  }
  if (out.tensor.data == nullptr && count_elements(out.tensor) > 0) {
    refusal.got = describe_odd_tensor(object, kNoMemory);
    return false;
  }
  out.exchange = source.api;
  return true;
}

bool consume_capsule(py::handle capsule, Exported& out, Refusal& refusal) {
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
    auto* managed =
        static_cast<DLManagedTensorVersioned*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
    PyCapsule_SetName(capsule.ptr(), "used_dltensor_versioned");
    if (managed->version.major != DLPACK_MAJOR_VERSION) {
      release_managed(managed, true);
      refusal.got = "an array of an unknown DLPack version";
      return false;
    }
    out.managed = managed;
    out.versioned = true;
    out.tensor = managed->dl_tensor;
    out.read_only = (managed->flags & DLPACK_FLAG_BITMASK_READ_ONLY) != 0;
    return true;
  }
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor")) {
    auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    PyCapsule_SetName(capsule.ptr(), "used_dltensor");
    out.managed = managed;
    out.tensor = managed->dl_tensor;
    return true;
  }
  refusal.got = "an array whose __dlpack__ returns no DLPack capsule";
  return false;
}

// Producers before DLPack 1.0 know no max_version; those say so with a TypeError.
py::object call_dlpack(py::handle object) {
  try {
    return object.attr("__dlpack__")(py::arg("max_version") =
                                         py::make_tuple(DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
  }
  return object.attr("__dlpack__")();
}

bool export_through_method(py::handle object, Exported& out, Refusal& refusal) {
  try {
    const auto device = object.attr("__dlpack_device__")().cast<std::pair<int, int>>();
    if (device.first != kDLCPU && device.first != kDLCUDAHost) {
      // Described, not exported: which stream its data is ready on is for the exchange table to tell.
      out.tensor = DLTensor{};
      refusal.got = "an array on device " +
                    (device.first == kDLCUDA ? "cuda:" + std::to_string(device.second)
                                             : "type " + std::to_string(device.first)) +
                    "; only torch tensors may lie outside the CPU";
      return false;
    }
    return consume_capsule(call_dlpack(object), out, refusal);
  } catch (py::error_already_set& error) {
    refusal.got = "an array that cannot be exported: " + py::str(error.value()).cast<std::string>();
  } catch (const py::cast_error&) {
    refusal.got = "an array whose __dlpack_device__ returns no pair of integers";
  }
  return false;
}

bool export_older_torch(py::handle object, Exported& out, Refusal& refusal) {
  try {
    if (lazy_negation()->is_negated(object)) {
      refusal.got = kNegated;
      return false;
    }
    if (export_through_method(object.attr("detach")(), out, refusal)) {
      if (out.tensor.data != nullptr || count_elements(out.tensor) == 0) return true;
      release_managed(out.managed, out.versioned);
      out.managed = nullptr;
      refusal.got = kNoMemory;
    }
  } catch (py::error_already_set& error) {
    refusal.got = "a tensor that cannot be exported: " + py::str(error.value()).cast<std::string>();
  }
  refusal.got = describe_odd_tensor(object, refusal.got);
  return false;
}

}  // namespace

bool export_tensor(py::handle object, Exported& out, Refusal& refusal) {
  const Source& source = source_of(Py_TYPE(object.ptr()));
  switch (source.kind) {
    case Kind::torch_table: return export_through_table(object, source, out, refusal);
    case Kind::torch_method: return export_older_torch(object, out, refusal);
    case Kind::torch_opaque: refusal.got = describe_odd_tensor(object, kNoMemory); return false;
    case Kind::foreign_method: return export_through_method(object, out, refusal);
    case Kind::not_a_tensor: break;
  }
  refusal.wrong_kind = true;
  refusal.got = object.is_none() ? "None" : source.type->tp_name;
  return false;
}

void release_managed(void* managed, bool versioned) noexcept {
  if (versioned) {
    auto* tensor = static_cast<DLManagedTensorVersioned*>(managed);
    if (tensor->deleter != nullptr) tensor->deleter(tensor);
  } else {
    auto* tensor = static_cast<DLManagedTensor*>(managed);
    if (tensor->deleter != nullptr) tensor->deleter(tensor);
  }
}

std::string dtype_name(DLDataType dtype) {
  const std::string bits = std::to_string(dtype.bits);
  const std::string lanes = dtype.lanes == 1 ? "" : "x" + std::to_string(dtype.lanes);
  switch (dtype.code) {
    case kDLInt: return "int" + bits + lanes;
    case kDLUInt: return "uint" + bits + lanes;
    case kDLFloat: return "float" + bits + lanes;
    case kDLBfloat: return "bfloat" + bits + lanes;
    case kDLComplex: return "complex" + bits + lanes;
    case kDLBool: return "bool" + lanes;
    case kDLFloat8_e4m3fn: return "float8_e4m3fn" + lanes;
    case kDLFloat8_e5m2: return "float8_e5m2" + lanes;
    default: return "a dtype with DLPack code " + std::to_string(dtype.code) + lanes;
  }
}

}  // namespace foretoken::boundary
