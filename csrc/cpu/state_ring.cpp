#include "cpu/state_ring.hpp"

#include <algorithm>

#include "cpu/views.hpp"
#include "ops/sampling.hpp"

namespace foretoken::cpu {

namespace {

// The slot of row b if its entry is one of the ring's, else -1.
int64_t sound_slot(const StateRingArgs& args, int64_t b) {
  const int64_t slot = slot_of(args.slots, b, args.current.shape[0]);
  if (slot < 0) return -1;
  const int64_t current = read_index(args.current, slot);
  return current >= 0 && current < args.entries ? slot : -1;
}

int64_t parent_of(const StateRingArgs& args, int64_t b, int64_t node) {
  return args.parents ? read_index(args.parents, b, node - 1) : node - 1;
}

// Nodes of row b, or -1 if they are too many or one's parent does not stand before it.
int64_t sound_nodes(const StateRingArgs& args, int64_t b) {
  const int64_t columns = args.write.shape[1];
  const int64_t given = args.num_nodes ? read_index(args.num_nodes, b) : columns;
  if (given > columns) return -1;
  for (int64_t node = 1; node < given; ++node) {
    const int64_t parent = parent_of(args, b, node);
    if (parent < 0 || parent >= node) return -1;
  }
  return std::max<int64_t>(given, 0);
}

// The last accepted node of row b, or -1 if it is none of the round's `nodes`.
int64_t last_node(const StateRingArgs& args, int64_t b, int64_t nodes) {
  const int64_t accepted = read_index(args.num_accepted, b);
  if (accepted == 0) return 0;
  if (accepted < 0 || accepted >= nodes) return -1;
  if (!args.path) return accepted;
  if (accepted > args.path.shape[1]) return -1;
  const int64_t node = read_index(args.path, b, accepted - 1);
  return node >= accepted && node < nodes ? node : -1;
}

}  // namespace

void reserve_states(const StateRingArgs& args) {
  for (int64_t b = 0; b < args.write.shape[0]; ++b) {
    const int64_t slot = sound_slot(args, b);
    const int64_t nodes = slot < 0 ? -1 : sound_nodes(args, b);
    write_index(args.status, nodes < 0 ? kBadRow : 0, b);
    const int64_t current = slot < 0 ? 0 : read_index(args.current, slot);
    for (int64_t node = 0; node < args.write.shape[1]; ++node) {
      NodeEntries found;
      if (node < nodes) {
        const int64_t parent = node == 0 ? 0 : parent_of(args, b, node);
        found = entries_of(slot, current, node, parent, args.entries);
      }
      write_index(args.read, found.from, b, node);
      write_index(args.write, found.to, b, node);
    }
    if (slot >= 0) write_index(args.reserved, std::max<int64_t>(nodes, 0), slot);
  }
}

void commit_states(const StateRingArgs& args) {
  for (int64_t b = 0; b < args.num_accepted.shape[0]; ++b) {
    const int64_t slot = sound_slot(args, b);
    const int64_t nodes = slot < 0 ? 0 : read_index(args.reserved, slot);
    const bool sound = slot >= 0 && nodes >= 0 && nodes < args.entries;
    const int64_t node = sound ? last_node(args, b, nodes) : -1;
    write_index(args.status, node < 0 ? kBadRow : 0, b);
    if (node < 0 || nodes == 0) continue;
    write_index(args.current, ring_entry(read_index(args.current, slot), node, args.entries), slot);
    write_index(args.reserved, 0, slot);
  }
}

}  // namespace foretoken::cpu
