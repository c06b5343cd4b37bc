// Verification of plain chains and trees, and sampling of plain rows, by kernels of their own: a hundredth of
// the general one's instructions, which run once each and would take longer to fetch than the rows take to
// read.
#pragma once

#include "cuda/chain_args.hpp"

namespace foretoken::cuda {

// Whether verify_chains() can serve a call; judged from what the host knows of it.
bool takes_chains(const VerifyArgs& args);

// Memory of the caller's, as in ChainArgs.
struct ChainScratch {
  TileStats* stats;
  float* lanes;
  ChainRecord* laws;
  uint32_t* arrivals;
};

void verify_chains(const VerifyArgs& args, const ChainScratch& scratch, Device device, Stream stream);

// Trees whose drafts were drawn from laws of logits, one by one.
bool takes_drawn_trees(const VerifyArgs& args);
void verify_drawn_trees(const VerifyArgs& args, const ChainScratch& scratch, Device device, Stream stream);

// Trees of drafts that were chosen, not drawn, and what chains of such ask for beyond that.
bool takes_trees(const VerifyArgs& args);
void verify_trees(const VerifyArgs& args, const ChainScratch& scratch, Device device, Stream stream);

// The same of sampling.
bool takes_rows(const SampleArgs& args);
void sample_rows(const SampleArgs& args, Device device, Stream stream);

}  // namespace foretoken::cuda
