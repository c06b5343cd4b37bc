// What the blocks of a cluster keep of the chain, or of the tree, that they verify together.
#pragma once

#include "cuda/chain_args.hpp"
#include "cuda/draw.cuh"
#include "cuda/filter.cuh"
#include "cuda/mass.cuh"
#include "cuda/tile_stream.cuh"
#include "cuda/together.cuh"
#include "math/acceptance.hpp"
#include "math/tree_index.hpp"

namespace foretoken::cuda {

// Of a chain: of the target, then of the drafts. Of a tree: of the target.
constexpr int kMostChainRows = kMaxNodes;
static_assert(2 * kMostChainDrafts + 1 <= kMostChainRows);

// What is known of a node before any law is.
struct ChainNode {
  uint64_t closing_bits;
  int32_t token;  // that was drafted; -1: outside the vocabulary
  uint32_t coin;
  float of_target, of_draft;  // the element of its token in its parent's rows
};

// What the cluster does next; every block decides the same.
struct ChainStep {
  bool close;       // draw, and write the verdict down; else the mass of a residual is wanted
  bool summed;      // the masses of the residual's tiles are there already
  int32_t node;     // whose row it is
  int32_t status;   //
  double gain;      // of [target - gain * draft]+; < 0: the target's row alone
  int64_t removed;  // the one token that is not left of the row; -1: none
  uint64_t removed_mass;
  int64_t closing;  // -1: to be drawn ...
  uint64_t bits;    // ... by these
  // Of the mass of a residual: the one that will be wanted next if this one is not enough; -1: none.
  int32_t other = -1;
  double other_gain = 0.0;
  int32_t which = 0;   // of those two that was summed
  bool exact = false;  // without a draft's row: the masses are wanted, as the row's statistics do not decide
  bool whole = false;  // the residual had no mass
  bool together = false;  // its masses are told in global memory
};

// Of what this block has added up. Two buffers in turns: whoever is late may still read the one before.
struct DrawScratch {
  uint64_t masses[2][2][kMaxTiles];  // of a residual's tiles, to the last unit; of another's
  uint64_t sums[2][2][kWarps];       // of each warp's, as the sums of weights in float32 have it
  uint64_t warp_words[kWarps];
};

// The mass of a residual that all blocks of a cluster have added up. By one warp; the same in every lane.
__device__ __forceinline__ uint64_t mass_of_turn(DrawScratch& draw, int turn, int32_t which) {
  uint64_t mass = 0;
  for (uint32_t i = static_cast<uint32_t>(lane_id()); i < cluster_size() * kWarps; i += kWarpSize)
    mass += of_block(&draw, i / kWarps)->sums[turn % 2][which][i % kWarps];
  return sum_of_masses(mass);
}

// Where the threshold of a filtered row is.
enum class Threshold : int32_t {
  settled,    // nothing is left to do, or there is no row
  known,      // the tiles are to be counted anew
  in_window,  // most likely
  anywhere,
};

// The row whose law a block makes, for all blocks of its cluster.
struct alignas(16) FilterTurn {
  RowLaw law;  // cut: the floor, until the threshold is known
  WindowFilter::Window window;
  uint32_t row;
  Threshold threshold;
  uint32_t above[3];  // mass of what lies above the window, in parts of 22 bits

  __device__ uint64_t mass_above() const {
    return above[0] + (static_cast<uint64_t>(above[1]) << 22) + (static_cast<uint64_t>(above[2]) << 44);
  }
};

struct ChainShared {
  union {
    FilterScratch filter;  // while laws are made
    DrawScratch draw;      // behind that
  };
  ChainRecord records[kMostChainRows];
  ChainNode nodes[kWarpSize];  // in the first block
  RowReading reading[2];       // of the target, and of the drafts
  Filters filters[2];
  ChainStep step;
  int64_t drawn;
  uint64_t left;  // of a draw: what is left of its number in the tile that it fell into
  int32_t tile;
  int32_t is_last;
  Part part;
  FilterTurn turns[2];           // one is read while the other is written
  FilterTurn seen[kMaxCluster];  // of all blocks
};

// A node of a tree; what is known of it before any law is.
struct alignas(16) TreeNode {
  int32_t token;    // -1: outside the vocabulary
  int32_t parent;   // -1: no smaller node
  uint32_t coin;    //
  float of_target;  // the element of its token in its parent's row
};

struct RemovedToken {
  uint64_t mass;
  int32_t token;
};

// Of trees; each block has all of it for itself. What all threads know lies here rather than in registers,
// which the reading of rows needs.
struct TreeShared {
  ChainShared rows;
  TreeNode nodes[kMaxNodes];
  RemovedToken removed[kMaxNodes];  // distinct tokens of rejected children
  int16_t path[kMaxNodes];
  float warp_highs[kWarps];
  uint64_t warp_masses[kWarps];
  uint64_t seed, base, closing_bits;
  int32_t status;
  int32_t length;   // drafts that count
  int32_t read;     // rows below were read first ...
  int32_t guessed;  // ... this one beside the last; -1: none
  int32_t made;     // of filtered rows those below have laws
  int32_t node, depth;
  int32_t num_removed;
  int32_t next;   // the child that is kept; -1: none
  int32_t guess;  // the first child of that; -1: none
  bool unread;
};

constexpr int64_t kLaneTiles = 256;  // of rows that long the lanes' largest elements find room

// Behind ChainShared, where there is no scratch in global memory. Of the one row that is read; in the first
// block.
struct RowScratch {
  TileStats stats[kMaxTiles];
  float lanes[kLaneTiles * kWarpSize];
};

__device__ __forceinline__ int64_t read_number(const Numbers& view, int64_t i, int64_t j = 0) {
  const int64_t offset = i * view.strides[0] + j * view.strides[1];
  return view.wide ? static_cast<const int64_t*>(view.data)[offset]
                   : static_cast<const int32_t*>(view.data)[offset];
}

__device__ __forceinline__ void write_number(const Numbers& view, int64_t value, int64_t i, int64_t j = 0) {
  const int64_t offset = i * view.strides[0] + j * view.strides[1];
  if (view.wide) {
    static_cast<int64_t*>(view.data)[offset] = value;
  } else {
    static_cast<int32_t*>(view.data)[offset] = static_cast<int32_t>(value);
  }
}

}  // namespace foretoken::cuda
