#include "cuda/state_ring.hpp"

#include "cuda/errors.hpp"
#include "cuda/views.cuh"
#include "ops/sampling.hpp"

namespace foretoken::cuda {

namespace {

constexpr int kLanes = 32;
constexpr int kRowsPerBlock = 4;
constexpr int kRowsOfCommit = 128;
constexpr unsigned kWholeWarp = 0xffffffffu;

// As cpu/state_ring.cpp has them.
__device__ int64_t sound_slot(const StateRingArgs& args, int64_t b, int64_t& current) {
  const int64_t slot = slot_of(args.slots, b, args.current.shape[0]);
  current = slot < 0 ? 0 : read_index(args.current, slot);
  return slot >= 0 && current >= 0 && current < args.entries ? slot : -1;
}

__device__ int64_t parent_of(const StateRingArgs& args, int64_t b, int64_t node) {
  return args.parents ? read_index(args.parents, b, node - 1) : node - 1;
}

// All lanes of a warp with the same b come out with the same answer.
__device__ int64_t sound_nodes(const StateRingArgs& args, int64_t b, int lane) {
  const int64_t columns = args.write.shape[1];
  const int64_t given = args.num_nodes ? read_index(args.num_nodes, b) : columns;
  if (given > columns) return -1;
  bool bad = false;
  for (int64_t node = 1 + lane; args.parents && node < given; node += kLanes) {
    const int64_t parent = parent_of(args, b, node);
    bad = bad || parent < 0 || parent >= node;
  }
  if (__any_sync(kWholeWarp, bad)) return -1;
  return given > 0 ? given : 0;
}

__device__ int64_t last_node(const StateRingArgs& args, int64_t b, int64_t nodes) {
  const int64_t accepted = read_index(args.num_accepted, b);
  if (accepted == 0) return 0;
  if (accepted < 0 || accepted >= nodes) return -1;
  if (!args.path) return accepted;
  if (accepted > args.path.shape[1]) return -1;
  const int64_t node = read_index(args.path, b, accepted - 1);
  return node >= accepted && node < nodes ? node : -1;
}

// One warp a row; rows of a batch never share a slot.
__global__ void __launch_bounds__(kLanes* kRowsPerBlock)
    reserve_kernel(const __grid_constant__ StateRingArgs args) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kLanes;
  if (b >= args.write.shape[0]) return;  // the same for the whole warp
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  int64_t current = 0;
  const int64_t slot = sound_slot(args, b, current);
  const int64_t nodes = slot < 0 ? -1 : sound_nodes(args, b, lane);
  for (int64_t node = lane; node < args.write.shape[1]; node += kLanes) {
    NodeEntries found;
    if (node < nodes) {
      const int64_t parent = node == 0 ? 0 : parent_of(args, b, node);
      found = entries_of(slot, current, node, parent, args.entries);
    }
    write_index(args.read, found.from, b, node);
    write_index(args.write, found.to, b, node);
  }
  if (lane != 0) return;
  write_index(args.status, nodes < 0 ? kBadRow : 0, b);
  if (slot >= 0) write_index(args.reserved, nodes > 0 ? nodes : 0, slot);
}

// One thread a row.
__global__ void __launch_bounds__(kRowsOfCommit) commit_kernel(const __grid_constant__ StateRingArgs args) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kRowsOfCommit + threadIdx.x;
  if (b >= args.num_accepted.shape[0]) return;
  int64_t current = 0;
  const int64_t slot = sound_slot(args, b, current);
  const int64_t nodes = slot < 0 ? 0 : read_index(args.reserved, slot);
  const bool sound = slot >= 0 && nodes >= 0 && nodes < args.entries;
  const int64_t node = sound ? last_node(args, b, nodes) : -1;
  write_index(args.status, node < 0 ? kBadRow : 0, b);
  if (node < 0 || nodes == 0) return;
  write_index(args.current, ring_entry(current, node, args.entries), slot);
  write_index(args.reserved, 0, slot);
}

}  // namespace

void reserve_states(const StateRingArgs& args, Stream stream) {
  const int64_t rows = args.write.shape[0];
  if (rows == 0) return;
  const auto blocks = static_cast<unsigned>((rows + kRowsPerBlock - 1) / kRowsPerBlock);
  reserve_kernel<<<blocks, kLanes * kRowsPerBlock, 0, static_cast<cudaStream_t>(stream.handle)>>>(args);
  throw_if_failed(cudaGetLastError(), "launch");
}

void commit_states(const StateRingArgs& args, Stream stream) {
  const int64_t rows = args.num_accepted.shape[0];
  if (rows == 0) return;
  const auto blocks = static_cast<unsigned>((rows + kRowsOfCommit - 1) / kRowsOfCommit);
  commit_kernel<<<blocks, kRowsOfCommit, 0, static_cast<cudaStream_t>(stream.handle)>>>(args);
  throw_if_failed(cudaGetLastError(), "launch");
}

}  // namespace foretoken::cuda
