// One cluster of blocks a row. The row is read once for its law; the same pass leaves the largest element
// that each of 32 groups of it holds. k groups reach the k-th largest of these numbers, so nothing below it
// is among the k best: the few elements at or above it are listed in the first block, ranked by counting.
#include "cuda/cluster.cuh"
#include "cuda/draft_tree.hpp"
#include "cuda/launch.hpp"
#include "cuda/tile_stats.cuh"
#include "cuda/views.cuh"
#include "math/draft_tree.hpp"

namespace foretoken::cuda {

namespace {

constexpr int kTopkThreads = 512;
constexpr int kTopkWarps = kTopkThreads / kWarpSize;
constexpr int kRowTiles = static_cast<int>((kMaxVocab + kTile - 1) / kTile);
constexpr int kListed = kTopkThreads;  // one entry a thread

// Shared memory of a block. Tile t belongs to block t % size, there to warp t / size % kTopkWarps.
struct TopkScratch {
  TileStats stats[kRowTiles];  // of this block's tiles, by t / size
  float warp_high[kTopkWarps][kWarpSize];
  float group_high[kMaxCluster][kWarpSize];  // from each block of the cluster
  uint64_t list[kListed];                    // first block: rank words of what may be a child
  uint64_t warp_best[kTopkWarps];            // first block, where the list was too short
  unsigned long long mass;                   // first block
  int32_t listed;                            // first block: more than kListed: the list is of no use
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// The two halves of a barrier of the cluster: that every block of it has begun, before one writes to another.
__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

#else

__device__ inline void cluster_arrive() {}
__device__ inline void cluster_wait() {}

#endif

// What is known of a row once all its tiles have been seen; the same in every thread of the cluster.
struct RowTop {
  float max;    // infinity: NaN or infinity in the row; -infinity: nothing finite
  float bound;  // no child is below
};

template <DType kType>
class TopkRow {
 public:
  __device__ TopkRow(const DraftTopkArgs& args, int64_t b, int64_t i, TopkScratch& scratch)
      : scratch_(scratch),
        rank_(static_cast<int>(cluster_rank())),
        size_(static_cast<int>(cluster_size())),
        warp_(static_cast<int>(threadIdx.x / kWarpSize)),
        data_(static_cast<const char*>(args.logits.data) +
              offset_of(args.logits, b, i) * RawTile<kType>::kBytes),
        vocab_(args.logits.shape[2]),
        tiles_(static_cast<int>((vocab_ + kTile - 1) / kTile)) {}

  // Largest element and sum of each tile of this block. If `skip`, for nothing: the score that says so comes
  // from memory too, and is not waited for.
  __device__ void summarise(bool skip) {
    const RowReading reading = RowReading::of_logits(1.0f);
    const DeviceRow row = this->row();
    float high = -infinity();
    for (int slot = warp_; tile_in(slot) < tiles_; slot += kTopkWarps) {
      RawTile<kType> tile;
      tile.load(row, tile_in(slot), minus_infinity_bits<kType>());
      if (skip) return;
      float mine;
      TileStats stats = stats_of_logits(tile, reading, mine);
      if (stats.sum == kAgain) stats = stats_slowly(row, reading, tile_in(slot), mine);
      const bool regular = stats.max < infinity() && stats.sum <= static_cast<float>(kTile + 1);
      high = regular ? fmaxf(high, mine) : infinity();
      if (lane_id() == 0) scratch_.stats[slot] = stats;
    }
    scratch_.warp_high[warp_][lane_id()] = high;
  }

  // Two barriers: behind them the tiles of this block, and the groups of all blocks, are known.
  __device__ RowTop exchange(int k) {
    const int lane = lane_id();
    __syncthreads();
    for (int to = warp_; to < size_; to += kTopkWarps) {
      float high = scratch_.warp_high[0][lane];
      for (int warp = 1; warp < kTopkWarps; ++warp) high = fmaxf(high, scratch_.warp_high[warp][lane]);
      *of_block(&scratch_.group_high[rank_][lane], to) = high;
    }
    cluster_sync();
    float group = scratch_.group_high[0][lane];
    for (int from = 1; from < size_; ++from) group = fmaxf(group, scratch_.group_high[from][lane]);
    int better = 0;
#pragma unroll
    for (int other = 0; other < kWarpSize; ++other) {
      const float theirs = __shfl_sync(kAllLanes, group, other);
      better += theirs > group || (theirs == group && other < lane) ? 1 : 0;
    }
    const unsigned kth = __ballot_sync(kAllLanes, better == k - 1);
    return {max_of_warp(group), __shfl_sync(kAllLanes, group, __ffs(static_cast<int>(kth)) - 1)};
  }

  // Adds this block's share to what the first block knows: the mass, and who may be a child.
  __device__ void contribute(const RowTop& top) {
    const float scale = logits_scale(1.0f), cut = logits_floor(top.max, scale);
    uint64_t mass = 0;
    for (int slot = static_cast<int>(threadIdx.x); tile_in(slot) < tiles_; slot += kTopkThreads) {
      const TileStats& tile = scratch_.stats[slot];
      if (!(tile.max >= cut)) continue;
      mass += mass_of_tile(tile.sum, weight_of_logit(tile.max, top.max, scale, cut));
    }
    if (__any_sync(kAllLanes, mass != 0)) {
      mass = sum_of_warp(mass);
      if (lane_id() == 0) atomicAdd(of_block(&scratch_.mass, 0), static_cast<unsigned long long>(mass));
    }
    for (int slot = warp_; tile_in(slot) < tiles_; slot += kTopkWarps) {
      const float high = scratch_.stats[slot].max;
      if (high >= top.bound && high > -infinity()) list_tile(tile_in(slot), top.bound);
    }
    __syncwarp();  // lanes have listed different numbers of elements, and a barrier comes next
  }

  // In the first block: how many words are in the list, the best among them, in any order. Where it was too
  // short, k of them are found one after another in the row.
  __device__ int children(int k) {
    const int listed = scratch_.listed;
    if (listed <= kListed) return listed;
    uint64_t last = ~uint64_t{0};
    int found = 0;
    for (; found < k; ++found) {
      last = largest_below(last);
      if (last == 0) break;
      if (threadIdx.x == 0) scratch_.list[found] = last;
    }
    __syncthreads();
    return found;
  }

  __device__ RowLaw law(const RowTop& top) const {
    RowLaw law;
    law.kind = LawKind::logits;
    law.max = top.max;
    law.scale = logits_scale(1.0f);
    law.mass = scratch_.mass;
    return law;
  }

 private:
  __device__ DeviceRow row() const { return {data_, kType, vocab_}; }
  __device__ int tile_in(int slot) const { return slot * size_ + rank_; }

  __device__ void load(int64_t index, LaneTile& tile) const {
    RawTile<kType> raw;
    raw.load(row(), index, minus_infinity_bits<kType>());
    raw.unpack(tile);
  }

  __device__ void list_tile(int64_t index, float bound) {
    LaneTile tile;
    load(index, tile);
    uint32_t hits = 0;
#pragma unroll
    for (int i = 0; i < 32; ++i) hits |= tile.x[i] >= bound && tile.x[i] > -infinity() ? 1u << i : 0u;
    for (; hits != 0; hits &= hits - 1) {
      const int64_t id = index * kTile + LaneTile::element_of(__ffs(static_cast<int>(hits)) - 1);
      const int32_t place = atomicAdd(of_block(&scratch_.listed, 0), 1);
      if (place >= kListed) continue;
      *of_block(&scratch_.list[place], 0) = rank_word(element_at(row(), id), static_cast<uint32_t>(id));
    }
  }

  // The largest word of a finite element below `bound`, 0 if there is none; by one block, over the whole row.
  __device__ uint64_t largest_below(uint64_t bound) {
    uint64_t best = 0;
    for (int index = warp_; index < tiles_; index += kTopkWarps) {
      LaneTile tile;
      load(index, tile);
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const uint32_t id = static_cast<uint32_t>(int64_t{index} * kTile + LaneTile::element_of(i));
        const uint64_t word = rank_word(tile.x[i], id);
        if (tile.x[i] > -infinity() && word < bound && word > best) best = word;
      }
    }
#pragma unroll
    for (int step = 16; step >= 1; step /= 2) {
      const uint64_t other = __shfl_xor_sync(kAllLanes, best, step);
      best = other > best ? other : best;
    }
    __syncthreads();  // the words of the call before have been read
    if (lane_id() == 0) scratch_.warp_best[warp_] = best;
    __syncthreads();
    for (int warp = 0; warp < kTopkWarps; ++warp) {
      best = scratch_.warp_best[warp] > best ? scratch_.warp_best[warp] : best;
    }
    return best;
  }

  TopkScratch& scratch_;
  int rank_, size_, warp_;
  const char* data_;
  int64_t vocab_;
  int tiles_;
};

__device__ void write_child(const DraftTopkArgs& args, int64_t b, int64_t i, int child, int64_t token,
                            float score) {
  const bool there = score > -infinity();
  write_index(args.tokens, there ? token : -1, b, i, child);
  write_float(args.children_scores, there ? score : -infinity(), b, i, child);
  write_index(args.parents, args.entries ? read_index(args.entries, b, i) : -1, b, i, child);
}

// By one block: children `from` .. k - 1 do not exist.
__device__ void write_none(const DraftTopkArgs& args, int64_t b, int64_t i, int from, int32_t status) {
  const int child = static_cast<int>(threadIdx.x);
  if (child >= from && child < args.tokens.shape[2]) write_child(args, b, i, child, -1, -infinity());
  if (child == 0) write_index(args.status, status, b, i);
}

template <DType kType>
__global__ void __launch_bounds__(kTopkThreads, 2)
    draft_topk_kernel(const __grid_constant__ DraftTopkArgs args) {
  __shared__ TopkScratch scratch;
  const int64_t node = blockIdx.x / cluster_size();
  const int64_t b = node / args.logits.shape[1], i = node % args.logits.shape[1];
  const int k = static_cast<int>(args.tokens.shape[2]);
  const bool first = cluster_rank() == 0;
  if (threadIdx.x == 0) {
    scratch.mass = 0;
    scratch.listed = 0;
  }
  __syncwarp();
  cluster_arrive();
  const float score =
      args.scores ? static_cast<const float*>(args.scores.data)[offset_of(args.scores, b, i)] : 0.0f;
  TopkRow<kType> row(args, b, i, scratch);
  row.summarise(!is_finite(score));
  cluster_wait();
  if (!is_finite(score)) {  // the same for the whole cluster, here and below
    if (first) write_none(args, b, i, 0, score == -infinity() ? 0 : kBadDraft);
    return;
  }
  const RowTop top = row.exchange(k);
  if (!is_finite(top.max)) {
    if (first) write_none(args, b, i, 0, kLawLost);
    return;
  }
  row.contribute(top);
  cluster_sync();
  if (!first) return;
  const int found = row.children(k);
  if (static_cast<int>(threadIdx.x) < found) {
    const uint64_t mine = scratch.list[threadIdx.x];
    int better = 0;
    for (int other = 0; other < found; ++other) better += scratch.list[other] > mine ? 1 : 0;
    if (better < k) {
      const RowLaw law = row.law(top);
      write_child(args, b, i, better, index_in(mine),
                  child_score(score, value_in(mine), law, log_of_mass(law.mass)));
    }
  }
  write_none(args, b, i, found, 0);
}

// Blocks that share a row, by how long it will take: rounds of tiles, and what a block costs besides, as
// often as blocks have to wait for a place. Results do not depend on it.
int blocks_for(Device device, int64_t rows, int64_t tiles) {
  constexpr int64_t kBlockRounds = 2;
  const DeviceLimits limits = limits_of(device);
  if (!limits.has_clusters) return 1;
  const int64_t places = 2 * static_cast<int64_t>(limits.multiprocessors);
  int64_t least = INT64_MAX;
  int best = 1;
  for (int blocks = 1; blocks <= kMaxCluster && blocks <= tiles; blocks *= 2) {
    const int64_t waves = (rows * blocks + places - 1) / places;
    const int64_t rounds = (tiles + blocks * kTopkWarps - 1) / (blocks * kTopkWarps);
    if (waves * (rounds + kBlockRounds) >= least) continue;
    least = waves * (rounds + kBlockRounds);
    best = blocks;
  }
  return best;
}

template <DType kType>
void launch_topk(const DraftTopkArgs& args, Device device, Stream stream) {
  const int64_t rows = args.logits.shape[0] * args.logits.shape[1];
  const int blocks = blocks_for(device, rows, (args.logits.shape[2] + kTile - 1) / kTile);
  if (blocks > 8) {
    throw_if_failed(
        cudaFuncSetAttribute(draft_topk_kernel<kType>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
        "draft_topk");
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(blocks);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(rows * blocks));
  config.blockDim = dim3(kTopkThreads);
  config.stream = static_cast<cudaStream_t>(stream.handle);
  config.attrs = &attribute;
  config.numAttrs = blocks > 1 ? 1 : 0;
  throw_if_failed(cudaLaunchKernelEx(&config, draft_topk_kernel<kType>, args), "draft_topk");
}

}  // namespace

void draft_topk(const DraftTopkArgs& args, Device device, Stream stream) {
  if (args.logits.shape[0] * args.logits.shape[1] == 0) return;
  switch (args.logits.dtype) {
    case DType::float32: return launch_topk<DType::float32>(args, device, stream);
    case DType::bfloat16: return launch_topk<DType::bfloat16>(args, device, stream);
    default: return launch_topk<DType::float16>(args, device, stream);
  }
}

}  // namespace foretoken::cuda
