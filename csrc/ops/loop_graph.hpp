// Contract of rounds that the device repeats by itself.
#pragma once

#include "ops/tensor_view.hpp"

namespace foretoken {

// Why it stopped; none: it runs. vacant: fewer texts go on than were asked for; full: the ring is.
enum class LoopEnd : int32_t { none, finished, limit, cancelled, vacant, full };

// What a launch leaves behind. The last three are kept from launch to launch.
enum LoopField : int32_t { kLoopRounds, kLoopEnd, kLoopTier, kLoopWritten, kLoopFields };

enum LoopLimit : int32_t { kMostRounds, kLeastLive, kLoopLimits };  // of a launch

// In front of the records of a round: the tier that drafted.
enum LoopEntry : int32_t { kEntryTier, kEntryFields = 4 };

// In front of a ring's entries; apart, as one is written by the device and the other by the host. Both count
// modulo 2^32 and are never reset.
enum RingField : int32_t { kRingWritten = 0, kRingRead = 32, kRingFields = 64 };

constexpr int kMostTiers = 8;

struct LoopTier {      // one of the rounds that a loop chooses from
  TensorView record;   // [B, W_i] int32: of a round, written anew by each; may be null
  int32_t drafts = 0;  // ascending from tier to tier
  int32_t cost = 1;    // of a round, in any unit, up to kMostCost
};

struct LoopGraphArgs {      // B rows, S slots, records of up to W numbers a row
  TensorView next_drafts;   // [S] int32: below 0 where nobody is decoding
  TensorView slots;         // [B] int32
  TensorView acceptance;    // [S, 2] int32 in, out: what AcceptanceRate keeps; null with one tier
  TensorView history;       // [R, kEntryFields + B W] int32 out: of all rounds of a launch; may be null
  TensorView limits;        // [kLoopLimits] int32 in
  TensorView progress;      // [kLoopFields] int32 in, out
  int32_t* ring = nullptr;  // [kRingFields + ring_rounds (kEntryFields + B W)], in mapped memory; may be null
  int64_t ring_rounds = 0;
  int64_t width = 0;  // W
  int32_t tier_count = 1;
  LoopTier tiers[kMostTiers];
};

}  // namespace foretoken
