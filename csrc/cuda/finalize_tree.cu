// One block a row: candidate i is thread i's until they are sorted, rank r is thread r's from then on. The
// root is rank 0, the best candidate rank 1, and a parent's rank is lower than its children's.
#include <algorithm>

#include "cuda/draft_tree.hpp"
#include "cuda/errors.hpp"
#include "cuda/views.cuh"
#include "math/draft_tree.hpp"
#include "math/tree_index.hpp"

namespace foretoken::cuda {

namespace {

constexpr unsigned kAll = 0xFFFFFFFFu;
constexpr int kWords = kMaxNodes / 64;  // of ancestor bits
constexpr int kLeastThreads = kMaxNodes;
static_assert(kLeastThreads >= kMaxDrafts + 1 && kMaxCandidates <= 1024);

struct TreeScratch {
  uint64_t words[kMaxCandidates];  // sorted: rank words, the best first
  int64_t token[kMaxCandidates];
  float score[kMaxCandidates];
  int16_t parent[kMaxCandidates];    // candidate index, -1: the root
  int16_t rank[kMaxCandidates];      // of the kept ones
  uint64_t path[kWords][kMaxNodes];  // by rank: ranks of the node and its ancestors
  int16_t jump[kMaxNodes];           // by rank: an ancestor, all below which are in `path`; -1: none is left
  int16_t above[kMaxNodes];          // by rank: rank of the parent
  int16_t size[kMaxNodes];           // by rank: nodes of the subtree
  int16_t step[kMaxNodes];           // by rank: from the parent's number to the node's
  int16_t node[kMaxNodes];           // by rank: number in the tree
};

// What thread `rank` knows of its node.
struct Node {
  uint64_t path[kWords] = {};  // bits of ranks
  int32_t parent = -1;         // rank
  int32_t source = -1;         // candidate
};

// body(rank) for the ranks on the way from the root to the node.
template <class Body>
__device__ inline void for_path(const uint64_t (&path)[kWords], Body body) {
#pragma unroll
  for (int word = 0; word < kWords; ++word) {
    for (uint64_t left = path[word]; left != 0; left &= left - 1) {
      body(word * 64 + __ffsll(static_cast<long long>(left)) - 1);
    }
  }
}

// Reads candidate threadIdx.x; returns its rank word, 0 where there is none. Every thread has to call.
__device__ uint64_t take_candidate(const FinalizeTreeArgs& args, int64_t b, TreeScratch& scratch, bool& bad) {
  const int i = static_cast<int>(threadIdx.x);
  const bool inside = i < args.candidates.shape[1];
  const float none = -__int_as_float(0x7F800000);
  float score = none;
  int64_t parent = -1, token = 0;
  if (inside) {
    score = static_cast<const float*>(args.scores.data)[offset_of(args.scores, b, i)];
    parent = read_index(args.parents, b, i);
    token = read_index(args.candidates, b, i);
    scratch.score[i] = score;
    scratch.token[i] = token;
    scratch.parent[i] = static_cast<int16_t>(parent);
  }
  __syncthreads();
  if (!inside || score == none) return 0;
  const bool usable = is_finite(score) && token >= 0 && parent >= -1 && parent < i &&
                      (parent < 0 || score <= scratch.score[parent]);
  bad = !usable;
  return rank_word(score, static_cast<uint32_t>(i));
}

// Bitonic, the largest first; one word a thread, as many threads as a power of two.
__device__ uint64_t sorted(uint64_t mine, uint64_t* words) {
  const unsigned i = threadIdx.x;
  for (unsigned size = 2; size <= blockDim.x; size *= 2) {
    for (unsigned apart = size / 2; apart >= 1; apart /= 2) {
      uint64_t other;
      if (apart >= 32) {
        words[i] = mine;
        __syncthreads();
        other = words[i ^ apart];
        __syncthreads();
      } else {
        other = __shfl_xor_sync(kAll, mine, static_cast<int>(apart));
      }
      const bool keeps_larger = ((i & size) == 0) == ((i & apart) == 0);
      if ((other > mine) == keeps_larger) mine = other;
    }
  }
  return mine;
}

// Ancestors of every rank in as many steps as the depth has binary digits: what is known of an ancestor is
// added to what is known of the node, and its ancestor is next.
__device__ void find_paths(Node& node, int drafts, TreeScratch& scratch) {
  const int rank = static_cast<int>(threadIdx.x);
  const bool there = rank <= drafts;
  int jump = there ? node.parent : -1;
  if (there) {
#pragma unroll
    for (int word = 0; word < kWords; ++word) node.path[word] = with_node(0, rank, word);
  }
  while (true) {
    if (there) {
#pragma unroll
      for (int word = 0; word < kWords; ++word) scratch.path[word][rank] = node.path[word];
      scratch.jump[rank] = static_cast<int16_t>(jump);
    }
    if (__syncthreads_or(jump >= 0) == 0) return;
    int next = -1;
    if (jump >= 0) {
#pragma unroll
      for (int word = 0; word < kWords; ++word) node.path[word] |= scratch.path[word][jump];
      next = scratch.jump[jump];
    }
    __syncthreads();
    jump = next;
  }
}

// Sizes of subtrees, then the numbers: a node comes behind its parent and its better siblings' subtrees.
__device__ void number(const Node& node, int drafts, TreeScratch& scratch) {
  const int rank = static_cast<int>(threadIdx.x);
  const bool there = rank <= drafts;
  if (there) {
    int size = 0;
    for (int other = 0; other <= drafts; ++other) {
      size += static_cast<int>(scratch.path[rank / 64][other] >> (rank % 64) & 1);
    }
    scratch.size[rank] = static_cast<int16_t>(size);
    scratch.above[rank] = static_cast<int16_t>(node.parent);
  }
  __syncthreads();
  if (there) {
    int step = rank > 0 ? 1 : 0;
    for (int elder = 1; elder < rank; ++elder) {
      if (scratch.above[elder] == node.parent) step += scratch.size[elder];
    }
    scratch.step[rank] = static_cast<int16_t>(step);
  }
  __syncthreads();
  if (there) {
    int number = 0;
    for_path(node.path, [&](int ancestor) { number += scratch.step[ancestor]; });
    scratch.node[rank] = static_cast<int16_t>(number);
  }
  __syncthreads();
}

// Numbered depth first, a subtree is a run of numbers: its root, then its first child; behind it its sibling.
__device__ void write_node(const FinalizeTreeArgs& args, int64_t b, const Node& node,
                           const TreeScratch& scratch) {
  const int rank = static_cast<int>(threadIdx.x);
  const TreeIndexArgs& index = args.index;
  const int number = scratch.node[rank], behind = number + scratch.size[rank];
  uint64_t ancestors[kWords] = {};
  int depth = -1;
  for_path(node.path, [&](int ancestor) {
    ++depth;
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      ancestors[word] = with_node(ancestors[word], scratch.node[ancestor], word);
    }
  });
  int sibling = kNoNode;
  if (rank > 0) {
    const int parent = scratch.node[node.parent];
    if (behind < parent + scratch.size[node.parent]) sibling = behind;
    write_index(args.tokens, scratch.token[node.source], b, number - 1);
    write_index(args.source, node.source, b, number - 1);
    write_index(index.parents, parent, b, number - 1);
  }
  write_index(index.depth, depth, b, number);
  write_index(index.first_child, scratch.size[rank] > 1 ? number + 1 : kNoNode, b, number);
  write_index(index.next_sibling, sibling, b, number);
#pragma unroll
  for (int word = 0; word < kWords; ++word) {
    if (word >= index.ancestors.shape[2]) break;
    write_index(index.ancestors, static_cast<int64_t>(ancestors[word]), b, number, word);
  }
  if (!index.positions) return;
  const uint64_t length = static_cast<uint64_t>(read_index(index.lengths, b));
  write_index(index.positions, static_cast<int64_t>(length + static_cast<uint64_t>(depth)), b, number);
}

// Node threadIdx.x lies behind the row's nodes.
__device__ void write_nothing(const FinalizeTreeArgs& args, int64_t b) {
  const int64_t number = threadIdx.x;
  const TreeIndexArgs& index = args.index;
  if (number > 0) {
    write_index(args.tokens, 0, b, number - 1);
    write_index(args.source, -1, b, number - 1);
    write_index(index.parents, 0, b, number - 1);
  }
  write_index(index.depth, -1, b, number);
  write_index(index.first_child, kNoNode, b, number);
  write_index(index.next_sibling, kNoNode, b, number);
  for (int64_t word = 0; word < index.ancestors.shape[2]; ++word) {
    write_index(index.ancestors, 0, b, number, word);
  }
  if (index.positions) write_index(index.positions, 0, b, number);
}

__device__ void write_row(const FinalizeTreeArgs& args, int64_t b, int drafts, bool bad) {
  if (threadIdx.x != 0) return;
  write_index(args.index.num_drafts, drafts, b);
  write_index(args.index.status, bad ? kBadDraft : 0, b);
}

__global__ void __launch_bounds__(kMaxCandidates)
    finalize_tree_kernel(const __grid_constant__ FinalizeTreeArgs args) {
  __shared__ TreeScratch scratch;
  const int64_t b = blockIdx.x;
  const int rank = static_cast<int>(threadIdx.x);
  const int most = static_cast<int>(args.tokens.shape[1]);
  const int budget =
      args.budget ? static_cast<const int32_t*>(args.budget.data)[b * args.budget.strides[0]] : most;
  if (budget == -1) {  // the same for the whole block
    if (rank <= most) write_nothing(args, b);
    write_row(args, b, -1, false);
    return;
  }
  bool bad = false;
  uint64_t word = take_candidate(args, b, scratch, bad);
  const int found = __syncthreads_count(word != 0);
  bad = __syncthreads_or(bad || budget < -1) != 0;
  const int drafts = bad ? 0 : min(found, min(budget, most));

  word = sorted(word, scratch.words);
  scratch.words[rank] = word;
  if (rank < drafts) scratch.rank[index_in(word)] = static_cast<int16_t>(rank + 1);
  __syncthreads();
  Node node;
  if (rank > 0 && rank <= drafts) {
    node.source = static_cast<int32_t>(index_in(scratch.words[rank - 1]));
    const int parent = scratch.parent[node.source];
    node.parent = parent < 0 ? 0 : scratch.rank[parent];
  }
  find_paths(node, drafts, scratch);
  number(node, drafts, scratch);
  if (rank <= drafts) {
    write_node(args, b, node, scratch);
  } else if (rank <= most) {
    write_nothing(args, b);
  }
  write_row(args, b, drafts, bad);
}

}  // namespace

void finalize_tree(const FinalizeTreeArgs& args, Stream stream) {
  const int64_t rows = args.candidates.shape[0];
  if (rows == 0) return;
  unsigned threads = kLeastThreads;
  while (threads < args.candidates.shape[1]) threads *= 2;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(rows));
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream.handle);
  throw_if_failed(cudaLaunchKernelEx(&config, finalize_tree_kernel, args), "finalize_tree");
}

}  // namespace foretoken::cuda
