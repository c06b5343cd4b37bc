#include "cpu/prepare.hpp"

#include <algorithm>
#include <memory>

#include "ops/prepare_blocks.hpp"

namespace foretoken::cpu {

PreparedRows prepare(PrepareArgs args, const Preparation& what, void* workspace, int64_t least_blocks) {
  const auto scratch = std::make_unique<preparing::EditScratch>();
  if (args.inverse != nullptr) std::fill_n(args.inverse, args.vocab, preparing::kNotThere);
  const int64_t inverting = preparing::inverse_blocks(args);
  for (int64_t block = 0; block < inverting; ++block) preparing::invert_map(args, {block, inverting});
  const preparing::Plan plan = preparing::plan_edits(args, least_blocks);
  for (int64_t block = 0; block < plan.blocks(); ++block) preparing::edit_block(args, plan, block, *scratch);
  const int64_t scattering = preparing::scatter_blocks(args);
  for (int64_t block = 0; block < scattering; ++block) preparing::scatter(args, {block, scattering});
  return preparing::rows_of(what, preparing::places_in(what, workspace));
}

}  // namespace foretoken::cpu
