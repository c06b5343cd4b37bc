// The law of being first of cpu/first_path.hpp, over a whole row, by all blocks of a cluster: the tokens are
// sorted by target / draft, and what ranks before a token is summed in integers. So the numbers are those of
// the CPU, however many blocks there are.
#pragma once

#include "cuda/request.cuh"

namespace foretoken::cuda {

struct RankedToken {
  uint64_t key = 0;  // larger for what ranks higher; 0: the drafter never draws it
  int32_t id = 0;
};

// Ratios are at most 1 and at least 2^-171, unless they are 0.
constexpr int kRankBits = 60;

__device__ inline uint64_t rank_key(float of_target, uint64_t of_draft) {
  if (of_draft == 0) return 0;
  const double ratio = static_cast<double>(of_target) / static_cast<double>(of_draft);
  return ratio > 0.0 ? bits_of(ratio) - bits_of(0x1p-200) : 1;
}

class TokenRanking {
 public:
  // `command`: about which row, and where its law goes.
  __device__ TokenRanking(const Request& request, const Command& command, RequestShared& shared)
      : request_(request),
        command_(command),
        target_(request.target_row(command.first)),
        draft_(command.with_draft ? request.draft_row(command.first, shared.law_row[command.first])
                                  : request.first_law(command.level)),
        law_(request.first_law_data(command.level)),
        shared_(shared),
        counts_(reinterpret_cast<uint32_t*>(shared.filter.bins)),
        totals_(reinterpret_cast<uint32_t*>(shared.filter.masses)),
        rank_(cluster_rank()),
        size_(cluster_size()),
        warp_(threadIdx.x / kWarpSize) {}

  // The leading block learns how much mass ranks before the token of the command, and how much there is.
  __device__ __noinline__ void run() {
    const auto of_row = [&](int64_t id) {
      const float of_target = weight_in(command_.target_law, element_at(target_, id));
      return RankedToken{rank_key(of_target, mass(id)), static_cast<int32_t>(id)};
    };
    const int64_t count = sort_by(0, request_.vocab(), of_row, 0);
    int now = 0;
    for (int shift = kDigitBits; shift < kRankBits; shift += kDigitBits, now ^= 1) {
      const uint64_t* const keys = request_.rank_keys(now);
      const int32_t* const ids = request_.rank_ids(now);
      sort_by(shift, count, [=](int64_t i) { return RankedToken{keys[i], ids[i]}; }, now ^ 1);
    }
    write_law(count, request_.rank_ids(now));
  }

 private:
  static constexpr int kDigitBits = 7, kDigits = 1 << kDigitBits, kNoDigit = -1;
  static_assert(kWarps * kDigits * sizeof(uint32_t) <= sizeof(FilterScratch::bins));
  static_assert(kMaxCluster * kDigits * sizeof(uint32_t) <= sizeof(FilterScratch::masses));
  static_assert(kDigits % kWarpSize == 0 && kDigits / kWarpSize <= kWarps);

  // Of a token in the draft's law, as TreeRows::weights_of_draft has it.
  __device__ uint64_t mass(int64_t id) const {
    const RowLaw& law = command_.draft_law;
    if (law.kind == LawKind::point) return id == law.top ? 1 : 0;
    return id < draft_.size ? mass_of(weight_in(law, element_at(draft_, id))) : 0;
  }

  // body(item, there) for this warp's share of all items, in their order, each lane with its own; shares too
  // are in the order of warps. The next items are asked for before these are worked on.
  template <class Read, class Body>
  __device__ void for_share(int64_t items, Read read, Body body) const {
    const int64_t warps = int64_t{size_} * kWarps;
    const int64_t share = (items + kWarpSize * warps - 1) / (kWarpSize * warps) * kWarpSize;
    const int64_t first = (int64_t{rank_} * kWarps + warp_) * share;
    const int64_t last = first + share < items ? first + share : items;
    RankedToken next;
    if (first + lane_id() < last) next = read(first + lane_id());
    for (int64_t at = first; at < last; at += kWarpSize) {
      const RankedToken item = next;
      if (at + kWarpSize + lane_id() < last) next = read(at + kWarpSize + lane_id());
      body(item, at + lane_id() < last);
    }
  }

  __device__ uint32_t* counts(int warp) const { return counts_ + warp * kDigits; }

  // Lanes with the same digit; those without an item stay among themselves.
  __device__ static unsigned peers_of(int digit) { return __match_any_sync(kAllLanes, digit); }
  __device__ static unsigned lanes_before() { return (1u << lane_id()) - 1; }

  // Puts the items in the order of a digit, equal ones as they were, and leaves out what is never drawn;
  // returns how many there are.
  template <class Read>
  __device__ __noinline__ int64_t sort_by(int shift, int64_t items, Read read, int to) {
    const auto digit_of = [=](const RankedToken& token, bool there) {
      return there && token.key != 0 ? static_cast<int>(token.key >> shift & (kDigits - 1)) : kNoDigit;
    };
    uint32_t* const mine = counts(static_cast<int>(warp_));
    for (int digit = lane_id(); digit < kDigits; digit += kWarpSize) mine[digit] = 0;
    __syncwarp();
    for_share(items, read, [&](const RankedToken& token, bool there) {
      const int digit = digit_of(token, there);
      const unsigned peers = peers_of(digit);
      if (digit != kNoDigit && (peers & lanes_before()) == 0)
        mine[digit] += static_cast<uint32_t>(__popc(peers));
      __syncwarp();
    });
    const int64_t count = find_places();
    uint64_t* const keys = request_.rank_keys(to);
    int32_t* const ids = request_.rank_ids(to);
    const float nothing = static_cast<float>(0.0 / command_.at.slope());
    for_share(items, read, [&](const RankedToken& token, bool there) {
      const int digit = digit_of(token, there);
      const unsigned peers = peers_of(digit);
      const uint32_t first = digit != kNoDigit ? mine[digit] : 0;
      __syncwarp();
      if (digit != kNoDigit) {
        const uint32_t place = first + static_cast<uint32_t>(__popc(peers & lanes_before()));
        keys[place] = token.key;
        ids[place] = token.id;
        if ((peers & lanes_before()) == 0) mine[digit] = first + static_cast<uint32_t>(__popc(peers));
      } else if (there) {
        law_[token.id] = nothing;
      }
      __syncwarp();
    });
    cluster_sync();
    return count;
  }

  // From every warp's counts of digits to where its items go; returns how many there are in all.
  __device__ int64_t find_places() {
    block_sync();
    const unsigned digit = threadIdx.x;
    uint32_t of_block_ = 0, of_all = 0, before = 0;
    if (digit < kDigits) {
      for (int warp = 0; warp < kWarps; ++warp) {
        const uint32_t count = counts(warp)[digit];
        counts(warp)[digit] = of_block_;
        of_block_ += count;
      }
      for (uint32_t rank = 0; rank < size_; ++rank)
        of_block(totals_, rank)[rank_ * kDigits + digit] = of_block_;
    }
    cluster_sync();
    if (digit < kDigits) {
      for (uint32_t rank = 0; rank < size_; ++rank) {
        const uint32_t count = totals_[rank * kDigits + digit];
        of_all += count;
        before += rank < rank_ ? count : 0;
      }
      const uint32_t up_to = sum_up_to_lane(of_all);
      before += up_to - of_all;
      if (lane_id() == kWarpSize - 1) shared_.filter.warp_words[warp_] = up_to;
    }
    block_sync();
    uint64_t all = 0;
    for (unsigned warp = 0; warp < kDigits / kWarpSize; ++warp) {
      const uint64_t of_warp = shared_.filter.warp_words[warp];
      before += warp < warp_ ? static_cast<uint32_t>(of_warp) : 0;
      all += of_warp;
    }
    if (digit < kDigits) {
      for (int warp = 0; warp < kWarps; ++warp) counts(warp)[digit] += before;
    }
    block_sync();
    return static_cast<int64_t>(all);
  }

  // From the sorted tokens to the probabilities with which they come first.
  __device__ __noinline__ void write_law(int64_t count, const int32_t* ids) {
    const auto read = [&](int64_t i) { return RankedToken{mass(ids[i]), ids[i]}; };
    uint64_t mine = 0, before = 0, all = 0;
    for_share(count, read, [&](const RankedToken& token, bool there) { mine += there ? token.key : 0; });
    mine = sum_of_warp(mine);
    if (lane_id() == 0) shared_.filter.warp_words[warp_] = mine;
    block_sync();
    for (unsigned warp = 0; warp < kWarps; ++warp) {
      before += warp < warp_ ? shared_.filter.warp_words[warp] : 0;
      all += shared_.filter.warp_words[warp];
    }
    if (threadIdx.x < size_) of_block(shared_.filter.part, threadIdx.x)[rank_] = all;
    cluster_sync();
    uint64_t total = 0;
    for (uint32_t rank = 0; rank < size_; ++rank) {
      total += shared_.filter.part[rank];
      before += rank < rank_ ? shared_.filter.part[rank] : 0;
    }
    const PathInterval at = command_.at;
    const double whole = at.slope(), of_total = static_cast<double>(total);
    for_share(count, read, [&](const RankedToken& token, bool there) {
      const uint64_t mass = there ? token.key : 0, up_to = sum_up_to_lane(mass);
      if (there) {
        const uint64_t start = before + up_to - mass;
        const double share = static_cast<double>(mass) / of_total;
        law_[token.id] = static_cast<float>(at.first(static_cast<double>(start) / of_total, share, whole));
        if (token.id == command_.token) of_block(shared_.part, 0)[0] = start;
      }
      before += __shfl_sync(kAllLanes, up_to, kWarpSize - 1);
    });
    if (rank_ == 0 && threadIdx.x == 0) shared_.part[1] = total;
  }

  const Request& request_;
  const Command& command_;
  const DeviceRow target_, draft_;
  float* const law_;
  RequestShared& shared_;
  uint32_t* const counts_;  // [kWarps, kDigits]
  uint32_t* const totals_;  // [kMaxCluster, kDigits] of each block
  const uint32_t rank_, size_, warp_;
};

}  // namespace foretoken::cuda
