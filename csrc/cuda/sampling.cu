#include "cuda/sampling.hpp"

#include "cuda/cluster_filter.cuh"
#include "cuda/draw.cuh"
#include "cuda/launch.hpp"
#include "cuda/prepare.hpp"
#include "cuda/race.cuh"
#include "cuda/verify_chain.hpp"
#include "cuda/views.cuh"

namespace foretoken::cuda {

namespace {

constexpr int64_t kLaneTiles = 256;  // of rows that long the lanes' largest elements are kept

// Shared memory of a block. The statistics of the row are in the first block of its cluster.
struct SampleShared {
  FilterScratch filter;
  TileStats stats[kMaxTiles];
  float lanes[kLaneTiles * kWarpSize];
  RaceEntry warp_race[kWarps];
  RaceEntry race[kMaxCluster];
  WaveRow wave;
  RowLaw law;         // what the first block tells the others ...
  int32_t answer[2];  // ... and, in turn, whether there is something to do for them
};

struct SampleLaunch {
  SampleArgs args;
  PreparedRows prepared;
};

struct Drawn {
  int64_t token = -1;
  float logprob = -__builtin_inff();
  int32_t status = kBadRow;
};

// The id to emit for an element of a row. One without an id can only come up where the row has no law.
__device__ int64_t emitted_id(const SampleArgs& args, int64_t element) {
  if (!args.vocab_map || element < 0) return element;
  const int64_t id = read_index(args.vocab_map, element);
  return id >= 0 && id < args.emitted_vocab ? id : -1;
}

__device__ void write_row(const SampleArgs& args, int64_t b, const RowLaw& law, const Drawn& drawn) {
  write_index(args.tokens, emitted_id(args, drawn.token), b);
  if (args.logprobs) write_float(args.logprobs, drawn.logprob, b);
  if (args.status) write_index(args.status, drawn.status, b);
  if (args.records) {
    write_record(law, static_cast<int64_t*>(args.records.data) + offset_of(args.records, b),
                 args.records.strides[1]);
  }
}

// A row of logits and the cluster of blocks that samples it.
class RowSampler {
 public:
  __device__ RowSampler(const SampleLaunch& launch, int64_t b, const Filters& filters, SampleShared& shared)
      : filters_(filters), shared_(shared), rank_(cluster_rank()), size_(cluster_size()) {
    const TensorView& logits = launch.args.logits;
    const int64_t bytes = logits.dtype == DType::float32 ? 4 : 2;
    task_.row = {static_cast<const char*>(logits.data) + b * logits.strides[0] * bytes, logits.dtype,
                 logits.shape[1]};
    if (launch.prepared.target != nullptr) {
      task_.row = {launch.prepared.target + b * logits.shape[1], DType::float32, logits.shape[1]};
    }
    tiles_ = tiles_of(task_.row.size);
    filtered_ = filters.temperature != 0.0f && filters.any(task_.row.size);
    task_.reading = RowReading::of_logits(filters.temperature);
    task_.stats = of_block(shared.stats, 0);
    task_.lanes = filtered_ && tiles_ <= kLaneTiles ? of_block(shared.lanes, 0) : nullptr;
  }

  __device__ bool leads() const { return rank_ == 0 && threadIdx.x < kWarpSize; }
  __device__ const DeviceRow& row() const { return task_.row; }

  // Valid in the first block. Called by all threads of the cluster.
  __device__ RowLaw law() {
    cluster_sync();  // nobody's memory is written before everybody runs
    if (threadIdx.x == 0) shared_.wave = {task_.row.data, task_.stats, task_.lanes};
    __syncthreads();
    const Wave wave{&shared_.wave, 1, task_.row.dtype, task_.row.size, task_.reading};
    read_rows(wave, worker(), workers());
    cluster_sync();
    RowLaw law;
    bool solved = true;
    if (rank_ == 0) {
      if (!filtered_ && threadIdx.x >= kWarpSize) return law;
      law = law_of_stats(task_);
      if (filtered_ && law.usable) {
        __syncthreads();
        solved = BlockFilter(task_, shared_.filter).run(filters_, law);
      }
    }
    if (!filtered_) return law;
    if (!tell(!solved)) return finished(law);
    law.kind = LawKind::logits;
    law.scale = task_.reading.scale;
    law.max = extremes_of(task_.stats, tiles_, law.kind).max;
    ClusterFilter(task_, shared_.filter).run(filters_, law);
    return finished(law);
  }

  // The token of 64 random bits; valid in the leading warp. Called by all threads of the cluster.
  __device__ int64_t draw(const RowLaw& law, uint64_t bits) {
    Residual residual;
    residual.target = task_.row;
    residual.target_law = law;
    residual.stats = task_.stats;
    int64_t token = kUndecided;
    if (leads()) {
      TokenDraw draw(residual, shared_.filter.bins);
      draw.take_masses_of_row();
      token = law.usable ? draw.by_estimate(bits) : -1;
    }
    share_law(law);
    if (!tell(token == kUndecided)) return token;
    residual.target_law = shared_.law;
    for_own_tiles(tiles_, [&](int64_t index) {
      const uint64_t mass = exact_mass(residual, index);
      if (lane_id() == 0) of_block(shared_.filter.bins, 0)[index] = mass;
    });
    cluster_sync();
    return leads() ? TokenDraw(residual, shared_.filter.bins).exactly(bits) : token;
  }

  // The element that wins the race; valid in the first thread. Called by all threads of the cluster.
  __device__ int64_t race(const RowLaw& law, uint64_t seed, uint64_t position, const TensorView& vocab_map) {
    share_law(law);
    cluster_sync();
    RaceEntry best = race_in_block(task_.row, shared_.law, seed, position, vocab_map, shared_.warp_race);
    if (threadIdx.x == 0) of_block(shared_.race, 0)[rank_] = best;
    cluster_sync();
    if (!leads()) return -1;
    best = shared_.race[0];
    for (uint32_t rank = 1; rank < size_; ++rank) {
      if (finishes_first(shared_.race[rank], best)) best = shared_.race[rank];
    }
    return best.element;
  }

 private:
  __device__ int64_t worker() const {
    return rank_ + static_cast<int64_t>(size_) * (threadIdx.x / kWarpSize);
  }
  __device__ int64_t workers() const { return static_cast<int64_t>(size_) * kWarps; }

  __device__ RowLaw finished(RowLaw law) const {
    if (rank_ == 0 && law.kind == LawKind::logits) law.mass = mass_of_row(task_.stats, tiles_, law);
    return law;
  }

  __device__ void share_law(const RowLaw& law) {
    if (!leads()) return;
    if (static_cast<uint32_t>(lane_id()) < size_)
      of_block(&shared_, static_cast<uint32_t>(lane_id()))->law = law;
  }

  // What the leading warp answers, known to the whole cluster. Others may still read what it told them
  // before.
  __device__ bool tell(bool answer) {
    const int turn = turn_;
    turn_ ^= 1;
    if (leads() && static_cast<uint32_t>(lane_id()) < size_) {
      of_block(&shared_, static_cast<uint32_t>(lane_id()))->answer[turn] = answer ? 1 : 0;
    }
    cluster_sync();
    return shared_.answer[turn] != 0;
  }

  RowTask task_;
  const Filters filters_;
  SampleShared& shared_;
  const uint32_t rank_, size_;
  int64_t tiles_;
  bool filtered_;
  int turn_ = 0;
};

// One cluster a row.
__global__ void __launch_bounds__(kThreads, 1) sample_kernel(const __grid_constant__ SampleLaunch launch) {
  extern __shared__ __align__(16) unsigned char memory[];
  SampleShared& shared = *reinterpret_cast<SampleShared*>(memory);
  const SampleArgs& args = launch.args;
  const int64_t b = blockIdx.x / cluster_size();
  const bool writer = cluster_rank() == 0 && threadIdx.x == 0;
  const int64_t slot = slot_of(args.slots, b, args.sampling.size);
  Drawn drawn;
  if (slot < 0 || (launch.prepared.history_unusable != nullptr && launch.prepared.history_unusable[b] != 0)) {
    RowLaw none;
    none.usable = false;
    if (writer) write_row(args, b, none, drawn);
    return;  // the same for the whole cluster
  }
  const Filters filters{args.sampling.temperature[slot], args.sampling.top_k[slot], args.sampling.top_p[slot],
                        args.sampling.min_p[slot]};
  RowSampler sampler(launch, b, filters, shared);
  const uint64_t seed = args.sampling.seed[slot], base = static_cast<uint64_t>(read_index(args.base, b));
  const RowLaw law = sampler.law();
  const uint32_t step = static_cast<uint32_t>(args.step);
  int64_t token = law.top;
  if (filters.temperature != 0.0f) {
    token = args.method == SampleMethod::gumbel
                ? sampler.race(law, seed, base + step, args.vocab_map)
                : sampler.draw(law, random_bits(seed, base, args.purpose, step));
  }
  if (!writer) return;
  if (!law.usable) {
    drawn = {law.top, -infinity(), kLawLost};
  } else if (law.kind == LawKind::point) {
    drawn = {law.top, 0.0f, 0};
  } else {
    drawn = {token, log_probability(law, token, element_at(sampler.row(), token)), 0};
  }
  write_row(args, b, law, drawn);
}

}  // namespace

int64_t sample_workspace(const SampleArgs& args) { return preparation_of(args).bytes; }

void sample(const SampleArgs& args, void* workspace, Device device, Stream stream) {
  const int64_t rows = args.logits.shape[0];
  if (rows == 0) return;
  if (takes_rows(args)) return sample_rows(args, device, stream);
  const int64_t tiles = (args.logits.shape[1] + kTile - 1) / kTile;
  SampleLaunch launch;
  launch.args = args;
  const Preparation what = preparation_of(args);
  if (what.any()) launch.prepared = prepare(args, what, workspace, device, stream);
  launch_clusters(
      sample_kernel, rows,
      shape_for(room_for<sample_kernel>(sizeof(SampleShared), device), rows, tiles, false).cluster,
      sizeof(SampleShared), stream, launch);
}

}  // namespace foretoken::cuda
