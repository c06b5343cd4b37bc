// A graph whose WHILE node repeats a captured round until a kernel behind it says that this was the last.
#include "cuda/loop_graph.hpp"

#include <map>
#include <string>
#include <vector>

#include "cuda/errors.hpp"
#include "cuda/loop_end.cuh"

namespace foretoken::cuda {

namespace {

constexpr int kOldestDriver = 12040;        // the first with WHILE nodes
constexpr int kOldestTieredDriver = 12080;  // the first with SWITCH nodes

// What a node is called that a conditional body may not hold; null: it may.
const char* fault_of(cudaGraphNodeType type) {
  switch (type) {
    case cudaGraphNodeTypeKernel:
    case cudaGraphNodeTypeMemcpy:
    case cudaGraphNodeTypeMemset:
    case cudaGraphNodeTypeGraph:
    case cudaGraphNodeTypeEmpty: return nullptr;
    case cudaGraphNodeTypeHost: return "host function";
    case cudaGraphNodeTypeWaitEvent: return "event wait";
    case cudaGraphNodeTypeEventRecord: return "event record";
    case cudaGraphNodeTypeExtSemaphoreSignal: return "semaphore signal";
    case cudaGraphNodeTypeExtSemaphoreWait: return "semaphore wait";
    case cudaGraphNodeTypeMemAlloc: return "memory allocation";
    case cudaGraphNodeTypeMemFree: return "memory release";
    case cudaGraphNodeTypeConditional: return "conditional";
    default: return "node of a kind unknown to this build";
  }
}

struct Census {
  int64_t nodes = 0;
  std::map<std::string, int64_t> faults;
};

void count_nodes(cudaGraph_t graph, Census& census) {
  size_t count = 0;
  throw_if_failed(cudaGraphGetNodes(graph, nullptr, &count), "nodes of the round");
  std::vector<cudaGraphNode_t> nodes(count);
  if (count > 0) throw_if_failed(cudaGraphGetNodes(graph, nodes.data(), &count), "nodes of the round");
  for (const cudaGraphNode_t node : nodes) {
    cudaGraphNodeType type{};
    throw_if_failed(cudaGraphNodeGetType(node, &type), "nodes of the round");
    ++census.nodes;
    if (const char* const fault = fault_of(type)) ++census.faults[fault];
    if (type != cudaGraphNodeTypeGraph) continue;
    cudaGraph_t child = nullptr;
    throw_if_failed(cudaGraphChildGraphNodeGetGraph(node, &child), "nodes of the round");
    count_nodes(child, census);
  }
}

int64_t checked_nodes(cudaGraph_t round) {
  Census census;
  count_nodes(round, census);
  if (census.nodes == 0) throw std::invalid_argument("graph: expected a captured round, got an empty graph");
  if (census.faults.empty()) return census.nodes;
  std::string told;
  for (const auto& [fault, count] : census.faults) {
    told += (told.empty() ? "" : ", ") + std::to_string(count) + " " + fault + (count == 1 ? "" : "s");
  }
  throw std::invalid_argument("graph: expected kernels, copies and fills, which a device can repeat, got " +
                              told + " among its " + std::to_string(census.nodes) + " nodes");
}

int driver_version() {
  int version = 0;
  throw_if_failed(cudaDriverGetVersion(&version), "driver version");
  return version;
}

void check_driver() {
  const int version = driver_version();
  if (version < kOldestDriver) {
    throw std::invalid_argument("graph: repeating a round on the device needs a driver for CUDA 12.4, got " +
                                std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10));
  }
}

cudaGraphConditionalHandle handle_in(cudaGraph_t graph, unsigned value, unsigned flags, const char* what) {
  cudaGraphConditionalHandle handle{};
  throw_if_failed(cudaGraphConditionalHandleCreate(&handle, graph, value, flags), what);
  return handle;
}

// Behind `before`, which may be null. Its bodies live as long as the graph.
cudaGraphNode_t add_conditional(cudaGraph_t graph, cudaGraphNode_t before, cudaGraphConditionalHandle handle,
                                cudaGraphConditionalNodeType type, unsigned size, const char* what,
                                cudaGraph_t*& bodies) {
  cudaGraphNodeParams params{};
  params.type = cudaGraphNodeTypeConditional;
  params.conditional.handle = handle;
  params.conditional.type = type;
  params.conditional.size = size;
  cudaGraphNode_t node = nullptr;
  const cudaGraphNode_t* const after = before == nullptr ? nullptr : &before;
  const size_t count = before == nullptr ? 0 : 1;
#if CUDART_VERSION >= 13000
  throw_if_failed(cudaGraphAddNode(&node, graph, after, nullptr, count, &params), what);
#else
  throw_if_failed(cudaGraphAddNode(&node, graph, after, count, &params), what);
#endif
  bodies = params.conditional.phGraph_out;
  return node;
}

// One block, behind `before`, which may be null.
cudaGraphNode_t add_kernel(cudaGraph_t graph, cudaGraphNode_t before, const void* function, void** params) {
  cudaKernelNodeParams kernel{};
  kernel.func = const_cast<void*>(function);
  kernel.gridDim = dim3(1);
  kernel.blockDim = dim3(kEndThreads);
  kernel.kernelParams = params;
  cudaGraphNode_t node = nullptr;
  throw_if_failed(
      cudaGraphAddKernelNode(&node, graph, before == nullptr ? nullptr : &before, before != nullptr, &kernel),
      "kernel around the rounds");
  return node;
}

template <typename T>
T* mapped_pointer(T* host) {
  void* mapped = nullptr;
  throw_if_failed(
      cudaHostGetDevicePointer(&mapped, const_cast<void*>(static_cast<const volatile void*>(host)), 0),
      "mapped memory");
  return static_cast<T*>(mapped);
}

}  // namespace

struct LoopGraph::State {
  LoopGraphArgs args;
  Device device;
  int64_t nodes = 0;
  bool launched = false;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  cudaEvent_t done = nullptr;
  volatile int32_t* cancelled = nullptr;  // in mapped memory

  ~State() {
    if (launched) {
      *cancelled = 1;
      cudaEventSynchronize(done);
    }
    if (executable != nullptr) cudaGraphExecDestroy(executable);
    if (graph != nullptr) cudaGraphDestroy(graph);
    if (done != nullptr) cudaEventDestroy(done);
    if (cancelled != nullptr) cudaFreeHost(const_cast<int32_t*>(cancelled));
    cudaGetLastError();  // the context may be gone
  }

  void build(const std::vector<void*>& rounds) {
    throw_if_failed(cudaGraphCreate(&graph, 0), "graph");
    LoopHandles handles;
    handles.again = handle_in(graph, 1, cudaGraphCondAssignDefault, "WHILE node");
    // Its value stays from round to round; the kernels around the rounds write it.
    if (rounds.size() > 1) handles.tier = handle_in(graph, 0, 0, "SWITCH node");
    MappedWords mapped;
    mapped.cancelled = mapped_pointer(cancelled);
    if (args.ring != nullptr) mapped.ring = mapped_pointer<volatile int32_t>(args.ring);
    void* begin_params[] = {&args, &handles};
    const cudaGraphNode_t begin =
        add_kernel(graph, nullptr, reinterpret_cast<const void*>(loop_begin_kernel), begin_params);
    cudaGraph_t* bodies = nullptr;
    add_conditional(graph, begin, handles.again, cudaGraphCondTypeWhile, 1, "WHILE node", bodies);
    const cudaGraph_t body = bodies[0];
    const cudaGraphNode_t work = add_rounds(body, rounds, handles.tier);
    void* end_params[] = {&args, &mapped, &handles};
    add_kernel(body, work, reinterpret_cast<const void*>(loop_end_kernel), end_params);
    throw_if_failed(cudaGraphInstantiate(&executable, graph, 0), "instantiation of the loop");
  }

  // A clone of the round; of several, one that the SWITCH node chooses.
  static cudaGraphNode_t add_rounds(cudaGraph_t body, const std::vector<void*>& rounds,
                                    [[maybe_unused]] cudaGraphConditionalHandle tier) {
    cudaGraphNode_t clone = nullptr;
    if (rounds.size() == 1) {
      throw_if_failed(
          cudaGraphAddChildGraphNode(&clone, body, nullptr, 0, static_cast<cudaGraph_t>(rounds[0])),
          "clone of the round");
      return clone;
    }
#if CUDART_VERSION >= 12080
    cudaGraph_t* tiers = nullptr;
    const cudaGraphNode_t choice =
        add_conditional(body, nullptr, tier, cudaGraphCondTypeSwitch, static_cast<unsigned>(rounds.size()),
                        "SWITCH node", tiers);
    for (size_t t = 0; t < rounds.size(); ++t) {
      throw_if_failed(
          cudaGraphAddChildGraphNode(&clone, tiers[t], nullptr, 0, static_cast<cudaGraph_t>(rounds[t])),
          "clone of a round");
    }
    return choice;
#else
    throw std::invalid_argument("rounds: expected one, as this build is older than CUDA 12.8");
#endif
  }
};

LoopGraph::LoopGraph(const LoopGraphArgs& args, const std::vector<void*>& rounds, Device device)
    : state_(std::make_unique<State>()) {
  check_driver();
  if (rounds.size() > 1 && !takes_tiers()) {
    throw std::invalid_argument("rounds: choosing among them on the device needs CUDA 12.8, got " +
                                std::to_string(rounds.size()) + " of them");
  }
  state_->args = args;
  state_->device = device;
  for (void* const round : rounds) state_->nodes += checked_nodes(static_cast<cudaGraph_t>(round));
  void* flag = nullptr;
  throw_if_failed(cudaHostAlloc(&flag, sizeof(int32_t), cudaHostAllocMapped | cudaHostAllocPortable),
                  "mapped memory");
  state_->cancelled = static_cast<volatile int32_t*>(flag);
  *state_->cancelled = 0;
  throw_if_failed(cudaEventCreateWithFlags(&state_->done, cudaEventDisableTiming), "event");
  state_->build(rounds);
}

bool LoopGraph::takes_tiers() {
#if CUDART_VERSION >= 12080
  return driver_version() >= kOldestTieredDriver;
#else
  return false;
#endif
}

LoopGraph::~LoopGraph() = default;

void LoopGraph::launch(Stream stream) {
  if (*state_->cancelled != 0) {
    if (state_->launched) throw_if_failed(cudaEventSynchronize(state_->done), "end of a cancelled launch");
    *state_->cancelled = 0;
  }
  const auto handle = static_cast<cudaStream_t>(stream.handle);
  throw_if_failed(cudaGraphLaunch(state_->executable, handle), "launch");
  state_->launched = true;
  throw_if_failed(cudaEventRecord(state_->done, handle), "launch");
}

bool LoopGraph::is_done() const {
  if (!state_->launched) return true;
  const cudaError_t state = cudaEventQuery(state_->done);
  if (state == cudaErrorNotReady) {
    cudaGetLastError();  // or it would be found by whoever asks next
    return false;
  }
  throw_if_failed(state, "rounds of a launch");
  return true;
}

void LoopGraph::cancel() { *state_->cancelled = 1; }

int64_t LoopGraph::nodes() const { return state_->nodes; }

}  // namespace foretoken::cuda
