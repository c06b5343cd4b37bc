// What rejected drafts leave of a target's row, and tokens drawn from it.
#pragma once

#include <vector>

#include "cpu/rows.hpp"

namespace foretoken::cpu {

// The target itself, [target - gain * draft]+ with a draft row, or the target with the masses of some tokens
// changed.
struct Residual {
  Row target;
  const RowLaw* target_law = nullptr;
  Row draft;  // data == nullptr: none
  const RowLaw* draft_law = nullptr;
  float gain = 0.0f;  // in weights
  struct Edit {
    int64_t token;
    uint64_t mass;    // of the token now
    uint64_t before;  // and in the target's law
  };
  std::vector<Edit> edits;  // ascending tokens, once sort_edits() ran; without a draft row only
  // What the tiles weigh, as law_of_logits (without a draft row) or residual_fraction (with one) found; null:
  // not known. A draw that knows it reads a single tile.
  const uint64_t* tile_masses = nullptr;

  void exclude(int64_t token);
  void subtract(int64_t token, float gain, float weight);  // [weight of the target - gain * weight]+
  void sort_edits();                                       // drops all but the first of each token
};

Residual whole_of(const Row& row, const RowLaw& law, const uint64_t* tile_masses = nullptr);

// Mass of the residual over the target's mass. `tile_masses`, if given: of a residual with a draft row, how
// its mass is made up.
double residual_fraction(const Residual& residual, uint64_t* tile_masses = nullptr);

// A token drawn by 64 random bits on integer masses; -1 if the residual has no mass at all.
int64_t draw(const Residual& residual, uint64_t bits);

// All integer masses of a (small) residual, for the tests that enumerate instead of drawing.
void all_masses(const Residual& residual, uint64_t* masses);

}  // namespace foretoken::cpu
