// Tree attention: which kernel serves a call, and how it is cut.
#include "cuda/tree_attention.hpp"

#include "cuda/tree_attention_launch.cuh"
#include "cuda/tree_attention_maps.hpp"
#include "cuda/tree_attention_plain.cuh"

namespace foretoken::cuda {

namespace {

using attend::LaunchPlan;
using attend::Task;

struct Limits {
  int multiprocessors = 0, shared_bytes = 0, major = 0;
  int shared_bytes_of_two = 0;  // of each of two blocks on a multiprocessor
  bool hopper = false;
};

Limits limits_on(int device) {
  constexpr int kKept = 16;
  static Limits kept[kKept];  // written with the same values by whoever comes first
  if (device < kKept && kept[device].shared_bytes > 0) return kept[device];
  Limits limits;
  throw_if_failed(cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device),
                  "device attributes");
  throw_if_failed(
      cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
      "device attributes");
  throw_if_failed(cudaDeviceGetAttribute(&limits.major, cudaDevAttrComputeCapabilityMajor, device),
                  "device attributes");
  limits.hopper = attend::runs_hopper_code();
  int all = 0, reserved = 0;
  throw_if_failed(cudaDeviceGetAttribute(&all, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
                  "device attributes");
  throw_if_failed(cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, device),
                  "device attributes");
  limits.shared_bytes_of_two = all / 2 - reserved;
  if (device < kKept) kept[device] = limits;
  return limits;
}

bool is_float8(DType dtype) { return dtype == DType::float8_e4m3 || dtype == DType::float8_e5m2; }

int64_t slots_of(const TreeAttentionArgs& args) {
  return args.block_table ? args.block_table.shape[1] * args.k_cache.shape[1] : args.k_cache.shape[1];
}

// Whether the rows of a cache can be copied 16 bytes at a time.
bool in_pieces(const TensorView& cache) {
  const int64_t unit = 16 / bytes_of(cache.dtype);
  if (reinterpret_cast<uintptr_t>(cache.data) % 16 != 0 || cache.shape[3] % unit != 0) return false;
  for (int dim = 0; dim < 3; ++dim) {
    if (cache.shape[dim] > 1 &&
        (cache.strides[dim] % unit != 0 || cache.strides[dim] / unit >= (1ll << 32))) {
      return false;
    }
  }
  return true;
}

// Whether the matrix units serve a call. From dtypes and layouts, never from how much there is of what.
bool for_matrix_units(const TreeAttentionArgs& args) {
  constexpr int64_t kMostSlots = int64_t{3} << 20;  // longer lists of partial results would not fit
  if (args.q.dtype == DType::float32) return false;
  if (args.k_cache.dtype != args.q.dtype && !is_float8(args.k_cache.dtype)) return false;
  return in_pieces(args.k_cache) && in_pieces(args.v_cache) && slots_of(args) <= kMostSlots;
}

constexpr bool all_aligned(const TensorView& view, int64_t bytes) {
  const int64_t unit = bytes / bytes_of(view.dtype);
  for (int dim = 0; dim < 3; ++dim) {
    if (view.shape[dim] > 1 && view.strides[dim] % unit != 0) return false;
  }
  return true;
}

LaunchPlan plan_of(const TreeAttentionArgs& args, int batch, const Limits& limits) {
  LaunchPlan plan;
  const int64_t kv_heads = args.k_cache.shape[2], queries = args.q.shape[1] * (args.q.shape[2] / kv_heads);
  plan.head_size = args.q.shape[3] <= 128 ? 128 : 256;
  plan.teams = plan.head_size == 128 && queries > attend::kTeamRows ? 2 : 1;
  const int64_t rows = plan.teams * attend::kTeamRows;
  plan.row_blocks = static_cast<int>((queries + rows - 1) / rows);
  const bool float8 = is_float8(args.k_cache.dtype);
  const bool two = limits.hopper && plan.head_size == 128 && plan.teams == 1 && !float8;
  const int blocks = std::min((two ? 2 : 1) * limits.multiprocessors, attend::kMostBlocks);
  plan.groups = std::max(1, blocks / plan.row_blocks);
  // A group's stretch, at most: pieces of it that do not begin a pair leave a partial result for each
  // segment, and for each chunk in front of the first.
  const int64_t tiles = (slots_of(args) + attend::kTile - 1) / attend::kTile;
  const int64_t stretch = 4 * (tiles * batch * kv_heads / plan.groups) / 3 + 32;
  const int64_t segment = attend::kChunkTiles * attend::kSegmentChunks;
  plan.partial_slots = static_cast<int>(std::min(tiles, stretch) / segment) + 2 + attend::kSegmentChunks + 2;
  if (plan.head_size == 256) {
    float8 ? attend::plan_shared<256, 1, true>(plan, limits.shared_bytes, batch, limits.hopper)
           : attend::plan_shared<256, 1, false>(plan, limits.shared_bytes, batch, limits.hopper);
  } else if (plan.teams == 1) {
    float8 ? attend::plan_shared<128, 1, true>(plan, limits.shared_bytes, batch, limits.hopper)
           : attend::plan_shared<128, 1, false>(plan, two ? limits.shared_bytes_of_two : limits.shared_bytes,
                                                batch, limits.hopper);
  } else {
    float8 ? attend::plan_shared<128, 2, true>(plan, limits.shared_bytes, batch, limits.hopper)
           : attend::plan_shared<128, 2, false>(plan, limits.shared_bytes, batch, limits.hopper);
  }
  return plan;
}

// Rows of one launch: tiles of all pairs are counted in 32 bits.
int rows_at_once(const TreeAttentionArgs& args) {
  const int64_t tiles = (slots_of(args) + attend::kTile - 1) / attend::kTile + 1;
  const int64_t most = ((int64_t{1} << 30) / (tiles * args.k_cache.shape[2]));
  return static_cast<int>(
      std::max<int64_t>(1, std::min<int64_t>({args.q.shape[0], most, attend::kMostRows})));
}

uint32_t pieces(int64_t stride, DType dtype) { return static_cast<uint32_t>(stride * bytes_of(dtype) / 16); }

void set_tensors(const TreeAttentionArgs& args, Task& task) {
  task.q = args.q.data;
  task.q_row = args.q.strides[0], task.q_node = args.q.strides[1], task.q_head = args.q.strides[2];
  const TensorView &k = args.k_cache, &v = args.v_cache;
  task.k_cache = static_cast<const uint4*>(k.data);
  task.v_cache = static_cast<const uint4*>(v.data);
  task.k_page = pieces(k.strides[0], k.dtype), task.k_slot = pieces(k.strides[1], k.dtype);
  task.k_head = pieces(k.strides[2], k.dtype);
  task.v_page = pieces(v.strides[0], v.dtype), task.v_slot = pieces(v.strides[1], v.dtype);
  task.v_head = pieces(v.strides[2], v.dtype);
  task.lengths = args.lengths.data, task.lengths_row = args.lengths.strides[0];
  task.num_nodes = static_cast<const int32_t*>(args.num_nodes.data);
  task.num_nodes_row = args.num_nodes.strides[0];
  task.ancestors = static_cast<const int64_t*>(args.ancestors.data);
  task.ancestors_row = args.ancestors.strides[0], task.ancestors_node = args.ancestors.strides[1];
  task.ancestors_word = args.ancestors.strides[2];
  task.block_table = static_cast<const int32_t*>(args.block_table.data);
  task.block_table_row = args.block_table.strides[0];
  task.block_table_entry = args.block_table.strides[1];
  task.sinks = static_cast<const float*>(args.sinks.data), task.sinks_head = args.sinks.strides[0];
  task.k_scale = static_cast<const float*>(args.k_scale.data);
  task.k_scale_head = args.k_scale.shape[0] == 1 ? 0 : args.k_scale.strides[0];
  task.v_scale = static_cast<const float*>(args.v_scale.data);
  task.v_scale_head = args.v_scale.shape[0] == 1 ? 0 : args.v_scale.strides[0];
  task.out = args.out.data;
  task.out_row = args.out.strides[0], task.out_node = args.out.strides[1];
  task.out_head = args.out.strides[2];
  task.lse = static_cast<float*>(args.lse.data);
  task.lse_row = args.lse.strides[0], task.lse_node = args.lse.strides[1];
  task.lse_head = args.lse.strides[2];
}

Task task_of(const TreeAttentionArgs& args) {
  Task task{};
  set_tensors(args, task);
  task.slots = slots_of(args);
  task.window = args.window;
  task.pages = static_cast<int32_t>(args.k_cache.shape[0]);
  task.page_size = static_cast<int32_t>(args.k_cache.shape[1]);
  task.page_shift = -1;
  for (int shift = 0; shift < 31; ++shift) {
    if (task.page_size == int32_t{1} << shift) task.page_shift = shift;
  }
  task.batch = static_cast<int32_t>(args.q.shape[0]);
  task.nodes = static_cast<int32_t>(args.q.shape[1]);
  task.kv_heads = static_cast<int32_t>(args.k_cache.shape[2]);
  task.group = static_cast<int32_t>(args.q.shape[2] / args.k_cache.shape[2]);
  task.head_size = static_cast<int32_t>(args.q.shape[3]);
  task.scale = args.scale, task.softcap = args.softcap;
  task.long_lengths = args.lengths.dtype == DType::int64;
  task.q_is_bfloat = args.q.dtype == DType::bfloat16;
  task.float8_e5m2 = args.k_cache.dtype == DType::float8_e5m2;
  task.aligned_q = reinterpret_cast<uintptr_t>(args.q.data) % 16 == 0 && all_aligned(args.q, 16);
  task.aligned_out = reinterpret_cast<uintptr_t>(args.out.data) % 4 == 0 && all_aligned(args.out, 4);
  return task;
}

// Boxes of a tile if the copy engine can bring it, else 0: pages are boxes or hold whole ones.
int boxes_of(const TreeAttentionArgs& args, const Task& task, const Limits& limits, attend::Maps& maps) {
  if (limits.major < 9) return 0;
  if (task.block_table && (task.page_shift < 3)) return 0;  // fewer slots than a box needs
  const int slots = task.block_table ? std::min(task.page_size, 16) : 16;
  // 8-bit columns are brought all at once, 16-bit ones as the matrix units expect them.
  const int columns = !is_float8(args.k_cache.dtype) ? 64 : task.head_size <= 128 ? 128 : 256;
  const bool told = attend::encode_cache(args.k_cache, columns, slots, maps.k) &&
                    attend::encode_cache(args.v_cache, columns, slots, maps.v);
  return told ? attend::kTile / slots : 0;
}

// The rows from `from` on, as a batch of their own. A contiguous cache's rows are its pages.
void skip_rows(Task& task, int64_t from, int64_t bytes) {
  task.q = static_cast<const char*>(task.q) + from * task.q_row * bytes;
  task.out = static_cast<char*>(task.out) + from * task.out_row * bytes;
  task.lengths =
      static_cast<const char*>(task.lengths) + from * task.lengths_row * (task.long_lengths ? 8 : 4);
  if (task.num_nodes) task.num_nodes += from * task.num_nodes_row;
  if (task.ancestors) task.ancestors += from * task.ancestors_row;
  if (task.lse) task.lse += from * task.lse_row;
  if (task.block_table) {
    task.block_table += from * task.block_table_row;
  } else {
    task.k_cache += from * static_cast<int64_t>(task.k_page);
    task.v_cache += from * static_cast<int64_t>(task.v_page);
  }
}

void launch_matrix(const TreeAttentionArgs& args, char* workspace, const Limits& limits, int device,
                   cudaStream_t stream) {
  const int rows = rows_at_once(args);
  const LaunchPlan plan = plan_of(args, rows, limits);
  attend::Maps maps{};
  const int boxes = boxes_of(args, task_of(args), limits, maps);
  for (int64_t from = 0; from < args.q.shape[0]; from += rows) {
    Task task = task_of(args);
    skip_rows(task, from, bytes_of(args.q.dtype));
    task.batch = static_cast<int32_t>(std::min<int64_t>(rows, args.q.shape[0] - from));
    task.row_blocks = plan.row_blocks, task.groups = plan.groups, task.ring = plan.ring;
    task.partial_slots = plan.partial_slots;
    task.boxes = args.block_table || rows == args.q.shape[0] ? boxes : 0;
    task.block_queries = plan.teams * attend::kTeamRows;
    task.counters = reinterpret_cast<uint32_t*>(workspace);
    task.partials = reinterpret_cast<float*>(workspace + kAttentionCounterBytes);
    char* const totals = workspace + kAttentionCounterBytes + plan.partial_bytes;
    task.totals = reinterpret_cast<float*>(totals);
    if (is_float8(args.k_cache.dtype)) {
      attend::launch_float8(plan, task, maps, device, stream);
    } else if (args.q.dtype == DType::bfloat16) {
      attend::launch_bfloat16(plan, task, maps, device, stream);
    } else {
      attend::launch_float16(plan, task, maps, device, stream);
    }
  }
}

__global__ void __launch_bounds__(attend::kPlainThreads)
    plain_attention_kernel(const __grid_constant__ attend::PlainTask all) {
  extern __shared__ float shared[];
  __shared__ attend::Queries queries;
  const Task& task = all.task;
  const int64_t pair = blockIdx.x / task.row_blocks;
  attend::PlainBlock(all, shared, queries, static_cast<int>(pair / task.kv_heads),
                     static_cast<int>(pair % task.kv_heads),
                     static_cast<int>(blockIdx.x % static_cast<unsigned>(task.row_blocks)))
      .run();
}

__global__ void __launch_bounds__(attend::kPlainThreads)
    plain_rest_kernel(const __grid_constant__ attend::PlainTask all) {
  attend::fill_plain_rest(all);
}

void launch_plain(const TreeAttentionArgs& args, cudaStream_t stream) {
  attend::PlainTask all{task_of(args), args.q, args.k_cache, args.v_cache, args.out};
  Task& task = all.task;
  const int64_t queries = int64_t{task.nodes} * task.group;
  task.row_blocks = static_cast<int32_t>((queries + attend::kPlainRows - 1) / attend::kPlainRows);
  const auto bytes = static_cast<int>(attend::plain_shared_bytes(task.head_size));
  throw_if_failed(
      cudaFuncSetAttribute(plain_attention_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
      "launch");
  const int64_t blocks = int64_t{task.batch} * task.kv_heads * task.row_blocks;
  plain_attention_kernel<<<static_cast<unsigned>(blocks), attend::kPlainThreads, static_cast<size_t>(bytes),
                           stream>>>(all);
  throw_if_failed(cudaGetLastError(), "launch");
  plain_rest_kernel<<<static_cast<unsigned>(task.batch), attend::kPlainThreads, 0, stream>>>(all);
  throw_if_failed(cudaGetLastError(), "launch");
}

}  // namespace

int64_t tree_attention_workspace(const TreeAttentionArgs& args, Device device) {
  if (args.q.shape[0] * args.q.shape[1] == 0 || !for_matrix_units(args)) return 0;
  return plan_of(args, rows_at_once(args), limits_on(device.index)).workspace();
}

void tree_attention(const TreeAttentionArgs& args, void* workspace, Device device, Stream stream) {
  if (args.q.shape[0] * args.q.shape[1] == 0) return;
  const auto handle = static_cast<cudaStream_t>(stream.handle);
  if (!for_matrix_units(args)) return launch_plain(args, handle);
  launch_matrix(args, static_cast<char*>(workspace), limits_on(device.index), device.index, handle);
}

}  // namespace foretoken::cuda
