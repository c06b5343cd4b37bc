#include "cuda/commit.hpp"

#include "cuda/overlap.cuh"
#include "cuda/views.cuh"
#include "ops/sampling.hpp"

namespace foretoken::cuda {

namespace {

constexpr int kLanes = 32;
constexpr int kRowsPerBlock = 4;
constexpr unsigned kWholeWarp = 0xffffffffu;

struct Outcome {
  int32_t emitted = 0, kept = 0;
  int32_t drafted = 0, accepted = 0, status = 0, end = 0;
  int32_t bonus = 0, moved = 0;
};

__device__ bool holds(const TensorView& ids, int64_t slot, int64_t token) {
  for (int64_t i = 0; i < ids.shape[1]; ++i) {
    if (read_index(ids, slot, i) == token) return token >= 0;
  }
  return false;
}

__device__ CommitEnd end_with(const CommitArgs& args, int64_t slot, int64_t token, bool full) {
  if (holds(args.eos_ids, slot, token)) return CommitEnd::eos;
  if (holds(args.stop_ids, slot, token)) return CommitEnd::stop;
  return full ? CommitEnd::length : CommitEnd::none;
}

// The first token at which a warp's row ends, with its reason in the two lowest bits.
__device__ int32_t first_end(const CommitArgs& args, int64_t b, int64_t slot, int32_t emitted, int64_t room,
                             int lane) {
  int32_t first = emitted << 2;
  for (int32_t i = lane; i < emitted; i += kLanes) {
    const CommitEnd end = end_with(args, slot, read_index(args.tokens, b, i), i + 1 >= room);
    if (end == CommitEnd::none) continue;
    first = min(first, (i << 2) | static_cast<int32_t>(end));
    break;
  }
  for (int reach = kLanes / 2; reach > 0; reach /= 2) {
    first = min(first, __shfl_xor_sync(kWholeWarp, first, reach));
  }
  return first;
}

__device__ int32_t within(int32_t value, int64_t most) {
  return value < 0 ? 0 : value < most ? value : static_cast<int32_t>(most);
}

// How the accepted path lies among its drafts; the whole warp, which has the same arguments but `lane`.
__device__ void look_at_path(const CommitArgs& args, int64_t b, int lane, Outcome& outcome) {
  if (!args.parents) {
    outcome.bonus = outcome.accepted == outcome.drafted;
    return;
  }
  const int32_t accepted = within(outcome.accepted, args.path.shape[1]);
  const int32_t drafted = within(outcome.drafted, args.parents.shape[1]);
  const int64_t last = accepted == 0 ? 0 : read_index(args.path, b, accepted - 1);
  int32_t moved = 0, children = 0;
  for (int32_t i = lane; i < accepted; i += kLanes) moved += read_index(args.path, b, i) != i + 1;
  for (int32_t i = lane; i < drafted; i += kLanes) children += read_index(args.parents, b, i) == last;
  for (int reach = kLanes / 2; reach > 0; reach /= 2) {
    moved += __shfl_xor_sync(kWholeWarp, moved, reach);
    children += __shfl_xor_sync(kWholeWarp, children, reach);
  }
  outcome.moved = moved;
  outcome.bonus = children == 0;
}

__device__ void add(const TensorView& sums, int64_t value, int64_t slot, int64_t column) {
  static_cast<int64_t*>(sums.data)[offset_of(sums, slot, column)] += value;
}

__device__ void add_sums(const CommitArgs& args, int64_t slot, const Outcome& outcome, int32_t accepted) {
  add_round(outcome, accepted,
            [&](CommitCounter column, int64_t amount) { add(args.sums, amount, slot, column); });
  if (outcome.drafted >= 0 && outcome.drafted < args.by_drafts.shape[1]) {
    add(args.by_drafts, 1, slot, outcome.drafted);
  }
}

// No other warp has the slot, so its sums need no atomics.
__device__ void count(const CommitArgs& args, int64_t slot, const Outcome& outcome, int lane) {
  const int32_t accepted = within(outcome.accepted, outcome.kept);
  if (lane == 0) {
    if (outcome.status & kBadDraft) add(args.sums, 1, slot, kCountBadDrafts);
    if (outcome.status & kLawLost) add(args.sums, 1, slot, kCountLawLost);
    if (outcome.status & kBadRow) add(args.sums, 1, slot, kCountBadRows);
    if (outcome.emitted > 0) add_sums(args, slot, outcome, accepted);
  }
  if (outcome.emitted == 0) return;
  for (int64_t i = lane; i < accepted && i < args.by_position.shape[1]; i += kLanes) {
    add(args.by_position, 1, slot, i);
  }
}

// As cpu/commit.cpp has it, a warp for the row; all lanes have the same arguments but `lane`.
__device__ Outcome append(const CommitArgs& args, int64_t b, int64_t slot, int64_t base, int lane) {
  Outcome outcome;
  const int64_t columns = args.tokens.shape[1];
  const int64_t given = read_index(args.num_emitted, b);
  outcome.emitted = static_cast<int32_t>(given < columns ? given : columns);
  outcome.drafted = static_cast<int32_t>(read_index(args.num_drafts, b));
  outcome.accepted = static_cast<int32_t>(read_index(args.num_accepted, b));
  outcome.status = static_cast<int32_t>(read_index(args.status, b));
  const int64_t asked = read_index(args.limits, slot), length = args.text.shape[1];
  const int64_t limit = asked < length ? asked : length;
  const int64_t room = limit > base ? limit - base : 0;
  const int32_t first = first_end(args, b, slot, outcome.emitted, room, lane);
  outcome.end = first & 3;
  outcome.kept = outcome.end == 0 ? outcome.emitted : (first >> 2) + 1;
  if (room == 0) {
    outcome.kept = 0;
    outcome.end = static_cast<int32_t>(CommitEnd::length);
  }
  for (int32_t i = lane; i < outcome.kept; i += kLanes) {
    write_index(args.text, static_cast<int32_t>(read_index(args.tokens, b, i)), slot, base + i);
  }
  const int64_t next = base + outcome.kept;
  int64_t drafts = -1;
  if (outcome.end == 0) {
    const int64_t budget = read_index(args.budgets, slot), left = limit - next - 1;
    const int64_t most = budget < left ? budget : left;
    drafts = most > 0 ? most : 0;
  }
  if (lane == 0) {
    write_index(args.base, next, slot);
    write_index(args.ends, outcome.end, slot);
    write_index(args.next_drafts, drafts, slot);
  }
  look_at_path(args, b, lane, outcome);
  return outcome;
}

__device__ Outcome settle(const CommitArgs& args, int64_t b, int lane) {
  Outcome idle;
  const int64_t slot = slot_of(args.slots, b, args.base.shape[0]);
  const int64_t base = slot < 0 ? 0 : read_index(args.base, slot);
  if (base < 1 || base > args.text.shape[1]) {
    idle.status = kBadRow;
    return idle;
  }
  const int64_t end = read_index(args.ends, slot);
  const bool ended = end != 0 || read_index(args.next_drafts, slot) < 0;
  __syncwarp();  // every lane has read what lane 0 is going to write
  Outcome outcome;
  if (!ended && read_index(args.num_emitted, b) > 0) {
    outcome = append(args, b, slot, base, lane);
  } else {
    outcome.status = static_cast<int32_t>(read_index(args.status, b));
    outcome.end = static_cast<int32_t>(end);
  }
  if (args.sums) count(args, slot, outcome, lane);
  return outcome;
}

// `posted`: of the round's place in the outbox, may be null.
__device__ void write_record(const CommitArgs& args, int64_t b, const Outcome& outcome, int lane,
                             int32_t* posted) {
  const int64_t width = record_width(args.tokens.shape[1], static_cast<bool>(args.logprobs));
  const auto field = [&](int64_t column, int32_t value) {
    if (args.record) write_index(args.record, value, b, column);
    if (posted != nullptr) posted[b * width + column] = value;
  };
  if (lane == 0) {
    field(kRecordDrafted, outcome.drafted);
    field(kRecordEmitted, outcome.emitted);
    field(kRecordAccepted, outcome.accepted);
    field(kRecordKept, outcome.kept);
    field(kRecordStatus, outcome.status);
    field(kRecordEnd, outcome.end);
    field(kRecordBonus, outcome.bonus);
    field(kRecordMoved, outcome.moved);
  }
  const int64_t columns = args.tokens.shape[1];
  for (int64_t i = lane; i < columns; i += kLanes) {
    const bool emitted = i < outcome.emitted;
    field(kRecordFields + i, emitted ? static_cast<int32_t>(read_index(args.tokens, b, i)) : -1);
    if (!args.logprobs) continue;
    const float* const logprob =
        static_cast<const float*>(args.logprobs.data) + offset_of(args.logprobs, b, i);
    field(kRecordFields + columns + i, emitted ? __float_as_int(*logprob) : 0);
  }
}

// The last block to get here moves the outbox on: by then every block knows the place it wrote to. Called by
// the whole block.
__device__ void move_outbox_on(const CommitArgs& args) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  const int32_t before = atomicAdd(&args.outbox_state[kOutboxArrived], 1);
  if (before + 1 != static_cast<int32_t>(gridDim.x)) return;
  args.outbox_state[kOutboxArrived] = 0;
  args.outbox_state[kOutboxWritten] =
      static_cast<int32_t>(static_cast<uint32_t>(args.outbox_state[kOutboxWritten]) + 1);
}

// One warp a row; rows of a batch never share a slot.
__global__ void __launch_bounds__(kLanes* kRowsPerBlock)
    commit_kernel(const __grid_constant__ CommitArgs args) {
  take_turn();
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kLanes;
  int32_t* const posted = outbox_of(args);
  if (b < args.tokens.shape[0]) {  // the same for the whole warp
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    const Outcome outcome = settle(args, b, lane);
    if (args.record || posted != nullptr) write_record(args, b, outcome, lane, posted);
  }
  if (posted != nullptr) move_outbox_on(args);
}

}  // namespace

void commit(const CommitArgs& args, Device device, Stream stream) {
  const int64_t rows = args.tokens.shape[0];
  if (rows == 0) return;
  const auto blocks = static_cast<unsigned>((rows + kRowsPerBlock - 1) / kRowsPerBlock);
  launch_in_turn<commit_kernel>(blocks, kLanes * kRowsPerBlock, device, stream, args);
}

}  // namespace foretoken::cuda
