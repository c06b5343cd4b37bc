// The law of one row by one cluster, the row lying in its shared memory: for verification the record and the
// statistics that it draws from, for sampling the token too.
#pragma once

#include "cuda/chain_shared.cuh"
#include "cuda/resident_guess.cuh"

namespace foretoken::cuda {

// The target's rows of a request, then the draft's.
__host__ __device__ inline int64_t rows_of_request(const ChainArgs& args) {
  return args.draft.data != nullptr ? 2 * args.most_drafts + 1 : args.most_drafts + 1;
}

template <DType kType>
class ResidentLaws : ResidentGuess<kType> {
 public:
  __device__ __forceinline__ ResidentLaws(const ChainArgs& args, unsigned char* memory)
      : Guess(args, memory) {}

  // A cluster takes every so-manyth of the `rows`.
  __device__ __forceinline__ void run(uint32_t rows) {
    uint32_t next = blockIdx.x / size_;
    // Before it is known whether anybody asks for the row, where nearly always somebody does.
    bool ahead = args_.num_drafts.data == nullptr;
    this->begin_barriers();
    if (threadIdx.x < 2) shared_.reached[threadIdx.x] = 0;
    if (ahead) this->begin_loading(place_of(next).data);
    bool wanted = false, loaded = false;  // of the row whose turn it is; none yet
#pragma unroll 1
    while (true) {
      __syncwarp();
      cluster_arrive();
      this->begin_search();
      this->clear_bins();
      cluster_wait();  // nobody's memory is written before everybody has done with it
      const bool more = next < rows;
      next_loaded_ = !more || ahead;
      if (more) take_row(next, task_ ^ 1);
      if (wanted) {
        settle_row();
      } else {
        if (loaded) for_own([&](uint32_t local, uint32_t) { this->wait_for_tile(local); });
        __syncthreads();
      }
      if (!more) return;
      task_ ^= 1;
      wanted = task().wanted;
      loaded = wanted || ahead;
      if (wanted && !next_loaded_) this->begin_loading(task().row.data);
      next += gridDim.x / size_;
      ahead = false;
    }
  }

 private:
  using Guess = ResidentGuess<kType>;
  using Guess::args_;
  using Guess::for_own;
  using Guess::mark;
  using Guess::masses_;
  using Guess::quarter_of;
  using Guess::rank_;
  using Guess::shared_;
  using Guess::size_;
  using Guess::stats_;
  using Guess::tiles_;
  using Guess::vocab_;
  using Guess::warp_;
  using typename Guess::Collected;
  using typename Guess::Window;

  __device__ __forceinline__ const ResidentTask& task() const { return shared_.tasks[task_]; }

  struct Place {
    uint32_t request, row;
    bool of_target;
    uint32_t node;
    const void* data;
  };
  __device__ __forceinline__ Place place_of(uint32_t number) const {
    const uint32_t most = static_cast<uint32_t>(args_.most_drafts);
    const uint32_t rows = static_cast<uint32_t>(rows_of_request(args_));
    Place place;
    place.request = number / rows;
    place.row = number % rows;
    place.of_target = place.row <= most;
    place.node = place.of_target ? place.row : place.row - most - 1;
    const ChainRowsView& view = place.of_target ? args_.target : args_.draft;
    const int64_t at = place.request * view.strides[0] + place.node * view.strides[1];
    place.data = static_cast<const char*>(view.data) + at * RawTile<kType>::kBytes;
    return place;
  }

  // By the thread that has the least to do with a row, for all that come behind a barrier.
  __device__ __forceinline__ void take_row(uint32_t number, uint32_t task) const {
    if (threadIdx.x != kRowThreads - 1) return;
    const Place place = place_of(number);
    ResidentTask& taken = shared_.tasks[task];
    taken.row = {place.data, kType, vocab_};
    taken.request = place.request;
    taken.number = place.request * (2 * args_.most_drafts + 3) + place.row;
    taken.wanted = find_reading(place, taken);
  }

  // How the row is read. False: nobody asks for it. The same in the whole cluster.
  __device__ __forceinline__ bool find_reading(const Place& place, ResidentTask& taken) const {
    const int64_t request = place.request,
                  slot = args_.slots.data ? read_number(args_.slots, request) : request;
    if (slot < 0 || slot >= args_.sampling.size || slot >= args_.draft_sampling.size) {
      if (args_.samples && rank_ == 0) {
        RowLaw none;
        none.usable = false;
        write_sample(request, none, -1, kBadRow, -infinity());
      }
      return false;
    }
    const int64_t most = args_.most_drafts;
    int64_t drafts = args_.num_drafts.data ? read_number(args_.num_drafts, request) : most;
    if (drafts == -1) return false;
    if (drafts < 0 || drafts > most) drafts = 0;
    const bool greedy = args_.sampling.temperature[slot] == 0.0f;
    if (place.of_target ? place.node > drafts : greedy || place.node >= drafts) return false;
    const SamplingView& sampling = place.of_target ? args_.sampling : args_.draft_sampling;
    const Filters filters{sampling.temperature[slot], sampling.top_k[slot], sampling.top_p[slot],
                          sampling.min_p[slot]};
    const RowReading reading = RowReading::of_logits(filters.temperature);
    const bool drafted = !args_.samples && place.node < drafts;
    taken.token = drafted ? read_number(args_.draft_tokens, request, place.node) : -1;
    if (args_.samples) {
      const uint64_t base = static_cast<uint64_t>(read_number(args_.base, request));
      taken.bits = random_bits(args_.sampling.seed[slot], base, args_.purpose, args_.step);
    }
    taken.filters = filters;
    taken.reading = reading;
    if (filters.min_p > 0.0f && reading.kind == LawKind::logits)
      taken.least_kept = distance_of_weight(static_cast<double>(filters.min_p), reading.scale);
    return true;
  }

  // By the whole cluster.
  __device__ __forceinline__ void settle_row() {
    TileStats* const out = args_.samples ? nullptr : args_.stats + task().number * tiles_;
    const bool cuts_count = task().filters.cuts_count(vocab_);
    const bool samples_masses = task().filters.top_p < 1.0f && !cuts_count;
    // Of what top-k leaves everything is counted anew.
    bool summed = task().reading.kind == LawKind::point || !cuts_count;
    RowLaw law;
    float high;
    bool weighs, filtered;
    while (true) {
      RowReading reading = task().reading;
      if (!summed) reading.kind = LawKind::point;
      this->leave_stats(reading, out, [&](uint32_t local, float largest) {
        if (samples_masses) this->sample(local, largest, reading.scale);
      });
      cluster_sync();
      bool sampled = samples_masses;
      law = law_of_stats(summed, high, sampled);
      weighs = law.usable && law.kind == LawKind::logits;
      filtered = weighs && task().filters.any(vocab_);
      if (!filtered && !(weighs && args_.samples)) break;
      if (find_cut(law, summed, sampled)) {
        if (args_.samples) this->add_list_to_tiles(law);
        leave_masses(law, filtered, out);
        cluster_sync();
        if (filtered) law.mass = this->told();
        break;
      }
      summed = true;
      cluster_sync();
      this->marked_from_ = infinity();
    }
    if (rank_ != 0) return;
    if (!weighs && warp_ == 0) {
      const DeviceRow row = task().row;  // whose address is passed on lives in memory
      law.top = lowest_of(row, stats_, high);
    }
    if (args_.samples) return finish_sample(law, weighs);
    if (threadIdx.x == 0) write_record(law);
  }

  // law_of() of cuda/chain_rows.cuh, in every block; of one that is not drawn from, `top` is left out.
  // `sampled`: the sample is summed up too, if it is of use.
  __device__ __forceinline__ RowLaw law_of_stats(bool summed, float& high, bool& sampled) {
    const LawKind kind = task().reading.kind;
    float least = infinity();
    high = -infinity();
    bool regular = true;
#pragma unroll 1
    for (uint32_t index = lane_id(); index < tiles_; index += kWarpSize) {
      const TileStats found = stats_[index];
      high = fmaxf(high, found.max);
      least = fminf(least, found.max > -infinity() ? found.max : infinity());
      regular = regular && found.sum <= static_cast<float>(kTile + 1) &&
                (kind == LawKind::point || found.max < infinity());
    }
    high = max_of_warp(high);
    RowLaw law;
    law.usable = __all_sync(kAllLanes, regular) != 0 && high > -infinity();
    if (kind == LawKind::point || !law.usable) return law;
    law.kind = LawKind::logits;
    law.max = high;
    law.scale = task().reading.scale;
    law.cut = task().reading.floor_below(high);
    if (!summed) return law;
    uint64_t mass = 0;
    for (uint32_t index = threadIdx.x; index < tiles_; index += kRowThreads) {
      mass += mass_of_stats(stats_[index], law);
    }
    mass = sum_of_masses(mass);
    if (lane_id() == 0) shared_.warp_words[warp_] = mass;
    sampled = sampled && !this->lies_far_apart(law, -max_of_warp(-least));
    if (sampled) this->sum_bins(law);
    __syncthreads();
    law.mass = sum_of_masses(shared_.warp_words[lane_id()]);
    return law;
  }

  // Sets law.cut, and for sampling masses_ to what lies above all that is listed. First top-k, then top-p,
  // then what sampling wants to know. False: the sums of tiles are wanted, which have not been `summed`.
  __device__ __forceinline__ bool find_cut(RowLaw& law, bool summed, bool sampled) {
    const float floor = law.cut, nothing = infinity();
    const bool cuts_count = task().filters.cuts_count(vocab_);
    float cut = -nothing;
    Window held{nothing, -nothing};  // of which list and masses are
    bool listed = false;             // ... and all from its low end on are listed
#pragma unroll 1
    for (int stage = 0; stage < 3; ++stage) {
      if (stage == 0 ? !cuts_count : stage == 1 && !(task().filters.top_p < 1.0f)) continue;
      const bool in_number = stage == 0, last = stage == 2;
      if (last) {
        if (task().filters.min_p > 0.0f) cut = fmaxf(cut, law.max + task().least_kept);
        law.cut = fmaxf(floor, cut) + 0.0f;  // as in cpu/rows.cpp: no negative zero
        if (!args_.samples || (held.low <= law.cut && law.cut <= held.high)) break;
      }
      RowLaw whole = law;
      whole.cut = fmaxf(floor, cut);
      uint64_t need = static_cast<uint64_t>(task().filters.top_k), total = law.mass;
      Window window{whole.cut, whole.cut};
      const bool guesses = !last && cut == -nothing;
      if (guesses) {
        if (!in_number) need = needed_mass(task().filters.top_p, total);
        window = this->guess(whole, in_number, need, sampled);
      }
      const bool collects = guesses ? window.low < window.high : last || !listed;
      Collected found{};
      if (collects) {
        found = this->collect(whole, window);
        listed = found.whole && window.high == nothing;
        held = found.whole ? window : Window{nothing, -nothing};
      }
      if (last) break;
      if (!guesses) {
        total = listed ? this->mass_of_list(whole, whole.cut) : found.mass;
        need = needed_mass(task().filters.top_p, total);
      }
      cut = fmaxf(cut, threshold(whole, in_number, need, guesses && collects, window, found, listed));
      listed = listed && cut >= held.low;
      if (!summed && !(cut > floor)) return false;
    }
    return true;
  }

  // Where the measure is reached: among what is listed if it is there, in the row otherwise.
  __device__ __forceinline__ float threshold(const RowLaw& whole, bool in_number, uint64_t need,
                                             bool in_window, const Window& window, const Collected& found,
                                             bool listed) {
    KeyRange range{key_of(in_number ? -infinity() : fminf(whole.cut, whole.max)),
                   key_of(whole.max + 0.0f)};  // of zeros the one with the larger key
    const uint32_t lowest = range.bottom;
    bool of_list = listed;
    if (in_window) {
      if (found.mass >= need && !in_number) {
        range.bottom = key_of(window.high);
      } else {
        need -= found.mass;
        if (window.high < infinity()) range.top = key_of(window.high) - 1;
        if (found.whole) range.bottom = key_of(window.low);
        of_list = found.whole;
      }
    }
    while (true) {
      const float reached = this->reaching(of_list, range, need, whole, in_number);
      if (reached > -infinity() || !of_list || range.bottom <= lowest) return reached;
      of_list = false;
      range.bottom = lowest;
    }
  }

  // Masses of the tiles under the law, the sums of the first pass containing what the filters have removed
  // since; behind a barrier of the cluster, and for sampling in the first block.
  __device__ __forceinline__ void leave_masses(const RowLaw& law, bool filtered, TileStats* out) {
    const ResidentTask& next = shared_.tasks[task_ ^ 1];
    const bool loads = !next_loaded_ && next.wanted;
    uint64_t of_warp = 0;
    for_own([&](uint32_t local, uint32_t index) {
      TileStats found = stats_[index];
      if (filtered && found.max >= law.cut) {
        const float cut = fmaxf(law.cut, task().reading.floor_below(found.max));
        if (law.cut > task().reading.floor_below(law.max))
          found.sum = sum_of_kept(local, law.cut >= this->marked_from_, found.max, law.scale, cut);
        of_warp += mass_of_stats(found, law);
        if (out != nullptr && lane_id() == 0) out[index].sum = found.sum;
      }
      if (args_.samples && lane_id() == 0) *of_block(masses_ + index, 0) = masses_[index];
      if (loads) this->begin_loading(next.row.data, local, index);
    });
    if (loads) this->loading_begun();
    next_loaded_ = true;
    if (filtered) this->tell(of_warp);
  }

  // `marked`: all of them are. Few are folded one by one in the order of sum_of_many(), which is that of a
  // tree over the marks' places: one that differs from the last in a higher place closes all that lies below.
  __device__ __forceinline__ float sum_of_kept(uint32_t local, bool marked, float anchor, float scale,
                                               float cut) const {
    uint32_t kept = marked ? this->marks_of(local) : mark(local, [&](float x) { return x >= cut; });
    const unsigned most = __reduce_max_sync(kAllLanes, static_cast<unsigned>(__popc(kept)));
    if (most > kFewMarks) return this->sum_of_many(local, anchor, scale, cut);
    constexpr int kLevels = 5;
    float open[kLevels] = {}, current = 0.0f;  // right sides of what is not closed yet
    int last = this->last_bit(kept);
#pragma unroll 1
    for (unsigned i = 0; i < most; ++i) {
      if (kept == 0) continue;
      const int place = this->last_bit(kept);
      kept ^= 1u << place;
      const float x = this->element_of_lane(local, place % 4, place / 4);
      const uint32_t apart = static_cast<uint32_t>(place ^ last);
#pragma unroll
      for (int level = 0; level < kLevels; ++level) {
        if (apart >> (level + 1) != 0) {
          current += open[level];
          open[level] = 0.0f;
        } else if (apart >> level != 0) {
          open[level] = current;
        }
      }
      current = weight_of_logit(x, anchor, scale, cut);
      last = place;
    }
#pragma unroll
    for (int level = 0; level < kLevels; ++level) current += open[level];
    return sum_of_warp(current);
  }

  __device__ __forceinline__ void write_record(const RowLaw& law) const {
    const int64_t token = task().token;
    double prob = 0.0;
    if (token >= 0 && token < static_cast<int64_t>(vocab_) && law.usable) {
      prob = law.kind == LawKind::point ? (token == law.top ? 1.0 : 0.0)
                                        : probability_in(law, element_at(task().row, token));
    }
    args_.laws[task().number] = {law, prob};
  }

  // By all threads of the first block.
  __device__ __forceinline__ void finish_sample(const RowLaw& law, bool weighs) {
    int64_t token = law.top;
    if (weighs) token = draw(law, task().bits);
    if (threadIdx.x != 0) return;
    float logprob = -infinity();
    if (args_.logprobs != nullptr && law.usable)
      logprob = weighs ? log_probability(law, token, shared_.of_drawn) : 0.0f;
    write_sample(task().request, law, token, law.usable ? 0 : kLawLost, logprob);
  }

  __device__ __forceinline__ void write_sample(int64_t request, const RowLaw& law, int64_t token,
                                               int32_t status, float logprob) const {
    write_number(args_.tokens, token, request);
    if (args_.status.data) write_number(args_.status, status, request);
    if (args_.records != nullptr) {
      foretoken::write_record(law, args_.records + request * args_.record_strides[0],
                              args_.record_strides[1]);
    }
    if (args_.logprobs != nullptr) args_.logprobs[request * args_.logprob_stride] = logprob;
  }

  struct Running {
    uint64_t before, total;  // of the threads before this one; of all
  };
  __device__ __forceinline__ Running sum_up_to_thread(uint64_t mine) {
    const uint64_t up_to = sum_up_to_lane(mine);
    __syncthreads();
    if (lane_id() == kWarpSize - 1) shared_.warp_words[warp_] = up_to;
    __syncthreads();
    const uint32_t lane = static_cast<uint32_t>(lane_id());
    const uint64_t word = lane < kRowWarps ? shared_.warp_words[lane] : 0;
    const uint64_t of_warps = sum_of_masses(lane < warp_ ? word : 0);
    return {of_warps + up_to - mine, sum_of_masses(word)};
  }

  // The token in whose interval the number falls, counted in exact masses from token 0: a tile a thread, then
  // an element.
  __device__ __forceinline__ int64_t draw(const RowLaw& law, uint64_t bits) {
    static_assert(kRowThreads == kTile && kRowThreads >= kMaxTiles);
    uint64_t mass = threadIdx.x < tiles_ ? masses_[threadIdx.x] : 0;
    const Running of_tiles = sum_up_to_thread(mass);
    const uint64_t left = multiply_high(bits, of_tiles.total);
    if (left >= of_tiles.before && left - of_tiles.before < mass) {
      shared_.tile = static_cast<int32_t>(threadIdx.x);
      shared_.left = left - of_tiles.before;
    }
    __syncthreads();
    const uint32_t at = static_cast<uint32_t>(shared_.tile) * kTile + threadIdx.x;
    const uint64_t in_tile = shared_.left;
    const float x = at < vocab_ ? element_at(task().row, at) : -infinity();
    mass = 0;
    if (at < vocab_) mass = mass_of(weight_of_logit(x, law.max, law.scale, law.cut));
    const uint64_t begin = sum_up_to_thread(mass).before;
    if (in_tile >= begin && in_tile - begin < mass) {
      shared_.drawn = static_cast<int32_t>(at);
      shared_.of_drawn = x;
    }
    __syncthreads();
    return shared_.drawn;
  }

  static constexpr unsigned kFewMarks = 8;

  uint32_t task_ = 0;
  bool next_loaded_ = true;  // the tiles of the next row are on their way; or there is none
};

}  // namespace foretoken::cuda
