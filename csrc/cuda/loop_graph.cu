// A graph whose WHILE node repeats a captured round until a kernel behind it says that this was the last.
#include "cuda/loop_graph.hpp"

#include <map>
#include <string>
#include <vector>

#include "cuda/errors.hpp"
#include "cuda/views.cuh"

namespace foretoken::cuda {

namespace {

constexpr int kEndThreads = 256;
constexpr int kOldestDriver = 12040;  // the first with WHILE nodes

// Behind each round, one block: keeps its record, and tells whether there is another.
__global__ void __launch_bounds__(kEndThreads)
    loop_end_kernel(const __grid_constant__ LoopGraphArgs args, const volatile int32_t* cancelled,
                    cudaGraphConditionalHandle handle) {
  const bool asked = threadIdx.x == 0 && *cancelled != 0;
  const int64_t round = read_index(args.progress, kLoopRounds);
  const int64_t rows = args.slots.shape[0];
  bool lives = false;
  for (int64_t b = threadIdx.x; b < rows; b += kEndThreads) {
    const int64_t slot = slot_of(args.slots, b, args.next_drafts.shape[0]);
    lives = lives || (slot >= 0 && read_index(args.next_drafts, slot) >= 0);
  }
  if (args.record && round < args.history.shape[0]) {
    const int64_t width = args.record.shape[1];
    for (int64_t i = threadIdx.x; i < rows * width; i += kEndThreads) {
      write_index(args.history, read_index(args.record, i / width, i % width), round, i / width, i % width);
    }
  }
  const bool more = __syncthreads_or(lives) != 0;  // and every thread has read how many rounds there were
  if (threadIdx.x != 0) return;
  LoopEnd end = LoopEnd::none;
  if (!more) {
    end = LoopEnd::finished;
  } else if (round + 1 >= read_index(args.most_rounds, 0)) {
    end = LoopEnd::limit;
  } else if (asked) {
    end = LoopEnd::cancelled;
  }
  write_index(args.progress, round + 1, kLoopRounds);
  write_index(args.progress, static_cast<int32_t>(end), kLoopEnd);
  cudaGraphSetConditional(handle, end == LoopEnd::none ? 1u : 0u);
}

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

void check_driver() {
  int version = 0;
  throw_if_failed(cudaDriverGetVersion(&version), "driver version");
  if (version < kOldestDriver) {
    throw std::invalid_argument("graph: repeating a round on the device needs a driver for CUDA 12.4, got " +
                                std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10));
  }
}

cudaGraphNode_t add_while(cudaGraph_t graph, cudaGraphNode_t before, cudaGraphConditionalHandle handle,
                          cudaGraph_t& body) {
  cudaGraphNodeParams params{};
  params.type = cudaGraphNodeTypeConditional;
  params.conditional.handle = handle;
  params.conditional.type = cudaGraphCondTypeWhile;
  params.conditional.size = 1;
  cudaGraphNode_t node = nullptr;
#if CUDART_VERSION >= 13000
  throw_if_failed(cudaGraphAddNode(&node, graph, &before, nullptr, 1, &params), "WHILE node");
#else
  throw_if_failed(cudaGraphAddNode(&node, graph, &before, 1, &params), "WHILE node");
#endif
  body = params.conditional.phGraph_out[0];
  return node;
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

  void build(cudaGraph_t round) {
    throw_if_failed(cudaGraphCreate(&graph, 0), "graph");
    cudaMemsetParams zeros{};
    zeros.dst = args.progress.data;
    zeros.elementSize = sizeof(int32_t);
    zeros.width = kLoopFields;
    zeros.height = 1;
    cudaGraphNode_t start = nullptr;
    throw_if_failed(cudaGraphAddMemsetNode(&start, graph, nullptr, 0, &zeros), "first node");
    cudaGraphConditionalHandle handle{};
    throw_if_failed(cudaGraphConditionalHandleCreate(&handle, graph, 1, cudaGraphCondAssignDefault),
                    "WHILE node");
    cudaGraph_t body = nullptr;
    add_while(graph, start, handle, body);
    cudaGraphNode_t clone = nullptr, last = nullptr;
    throw_if_failed(cudaGraphAddChildGraphNode(&clone, body, nullptr, 0, round), "clone of the round");
    void* mapped = nullptr;
    throw_if_failed(cudaHostGetDevicePointer(&mapped, const_cast<int32_t*>(cancelled), 0), "mapped memory");
    auto* flag = static_cast<const volatile int32_t*>(mapped);
    void* params[] = {&args, &flag, &handle};
    cudaKernelNodeParams kernel{};
    kernel.func = reinterpret_cast<void*>(loop_end_kernel);
    kernel.gridDim = dim3(1);
    kernel.blockDim = dim3(kEndThreads);
    kernel.kernelParams = params;
    throw_if_failed(cudaGraphAddKernelNode(&last, body, &clone, 1, &kernel), "last node");
    throw_if_failed(cudaGraphInstantiate(&executable, graph, 0), "instantiation of the loop");
  }
};

LoopGraph::LoopGraph(const LoopGraphArgs& args, void* round, Device device)
    : state_(std::make_unique<State>()) {
  check_driver();
  state_->args = args;
  state_->device = device;
  state_->nodes = checked_nodes(static_cast<cudaGraph_t>(round));
  void* flag = nullptr;
  throw_if_failed(cudaHostAlloc(&flag, sizeof(int32_t), cudaHostAllocMapped | cudaHostAllocPortable),
                  "mapped memory");
  state_->cancelled = static_cast<volatile int32_t*>(flag);
  *state_->cancelled = 0;
  throw_if_failed(cudaEventCreateWithFlags(&state_->done, cudaEventDisableTiming), "event");
  state_->build(static_cast<cudaGraph_t>(round));
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

void LoopGraph::cancel() { *state_->cancelled = 1; }

int64_t LoopGraph::nodes() const { return state_->nodes; }

}  // namespace foretoken::cuda
