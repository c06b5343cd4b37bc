#include "cpu/residual.hpp"

#include <algorithm>
#include <limits>

#include "cpu/parallel.hpp"

namespace foretoken::cpu {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kTilesPerRun = 16;  // of a row that several threads share
constexpr int64_t kUndecided = -2;

float pad_of(const RowLaw& law) { return law.kind == LawKind::probs ? 0.0f : -kInfinity; }

// The two tiles that a residual reads side by side.
class ResidualTiles {
 public:
  explicit ResidualTiles(const Residual& residual)
      : residual_(residual),
        kernels_(row_kernels()),
        draft_law_(residual.draft.data != nullptr ? *residual.draft_law : *residual.target_law) {}

  float sum(int64_t index) {
    read(index);
    return kernels_.sum_residual(target_, *residual_.target_law, draft_, draft_law_, residual_.gain);
  }

  uint64_t mass(int64_t index) {
    if (first_edit(index) == first_edit(index + 1)) {
      read(index);
      return kernels_.sum_masses(target_, *residual_.target_law, draft_, draft_law_, residual_.gain);
    }
    uint64_t masses[kTile];
    return fill(index, masses);
  }

  uint64_t fill(int64_t index, uint64_t* masses) {
    read(index);
    kernels_.masses(target_, *residual_.target_law, draft_, draft_law_, residual_.gain, masses);
    for (size_t i = first_edit(index); i < first_edit(index + 1); ++i) {
      masses[residual_.edits[i].token - index * kTile] = residual_.edits[i].mass;
    }
    uint64_t total = 0;
    for (int e = 0; e < kTile; ++e) total += masses[e];
    return total;
  }

 private:
  void read(int64_t index) {
    const Row &target = residual_.target, &draft = residual_.draft;
    if (draft.data == nullptr || draft.dtype == target.dtype) {
      target_ = target_tile_.ref(kernels_, target, index, -kInfinity);
      if (draft.data != nullptr) draft_ = draft_tile_.ref(kernels_, draft, index, pad_of(draft_law_));
    } else {
      target_ = {target_tile_.of(kernels_, target, index, -kInfinity), DType::float32};
      draft_ = {draft_tile_.of(kernels_, draft, index, pad_of(draft_law_)), DType::float32};
    }
  }

  size_t first_edit(int64_t index) const {
    const auto before = [](const Residual::Edit& edit, int64_t token) { return edit.token < token; };
    const auto& edits = residual_.edits;
    return static_cast<size_t>(std::lower_bound(edits.begin(), edits.end(), index * kTile, before) -
                               edits.begin());
  }

  const Residual& residual_;
  const RowKernels& kernels_;
  const RowLaw& draft_law_;
  Tile target_tile_, draft_tile_;
  TileRef target_, draft_;
};

// body(tiles, index) for every tile of the residual, in runs that threads may share.
template <class Body>
void for_each_tile(const Residual& residual, Body body) {
  const int64_t tiles = tiles_of(residual.target.size);
  const int64_t runs = (tiles + kTilesPerRun - 1) / kTilesPerRun;
  const int64_t rows = residual.draft.data != nullptr ? 2 : 1;
  parallel_for(runs, rows * kTilesPerRun * kTile, [&](int64_t run) {
    ResidualTiles reader(residual);
    const int64_t last = std::min(tiles, (run + 1) * kTilesPerRun);
    for (int64_t index = run * kTilesPerRun; index < last; ++index) body(reader, index);
  });
}

uint64_t total_of(const uint64_t* masses, int64_t tiles) {
  uint64_t total = 0;
  for (int64_t index = 0; index < tiles; ++index) total += masses[index];
  return total;
}

void sum_tiles(const Residual& residual, uint64_t* masses) {
  for_each_tile(residual, [=](ResidualTiles& tiles, int64_t index) {
    masses[index] = mass_of_tile(tiles.sum(index), 1.0f);
  });
}

// Element `left` counted in masses from the front; -1 if there is not as much.
int64_t element_at(const uint64_t* masses, uint64_t left) {
  for (int64_t e = 0; e < kTile; ++e) {
    if (left < masses[e]) return e;
    left -= masses[e];
  }
  return -1;
}

int64_t draw_exactly(const Residual& residual, uint64_t bits) {
  uint64_t masses[kMaxTiles];
  for_each_tile(residual, [&](ResidualTiles& tiles, int64_t index) { masses[index] = tiles.mass(index); });
  const uint64_t total = total_of(masses, tiles_of(residual.target.size));
  if (total == 0) return -1;
  uint64_t left = multiply_high(bits, total);  // uniform in [0, total)
  int64_t index = 0;
  while (left >= masses[index]) left -= masses[index++];
  uint64_t elements[kTile];
  ResidualTiles(residual).fill(index, elements);
  return index * kTile + element_at(elements, left);
}

// The masses of a draw are whole numbers, each rounded by itself; those of tiles are float32 sums. What is
// known of the sums' error decides nearly every draw from them, and one tile then gives the token that all
// exact masses would have given.
//
// A tile's sum has ten additions, 6e-7 of it, and half a unit for every element that the exact masses round.
// Where the sum was taken relative to the tile's own largest element, three exponentials stand in for
// one, 1.7e-7 each, and the exponents differ by 2^-23 of themselves: 1.7e-6 up to an exponent of 20. Of what
// lies below, at most 2^24 units an element, 1.2e-5 up to the last exponent of 125.
constexpr double kErrorOfSums = 6.5e-7, kErrorOfLaws = 3.0e-6;
constexpr uint64_t kUnitsOfSums = 2 * kTile, kUnitsOfLaws = 256 * kTile;

// False if nothing is known. `slack` bounds the error of every sum of the masses.
bool estimate(const Residual& residual, uint64_t* masses, uint64_t& slack) {
  const bool with_draft = residual.draft.data != nullptr;
  const int64_t tiles = tiles_of(residual.target.size);
  if (residual.tile_masses != nullptr) {
    std::copy(residual.tile_masses, residual.tile_masses + tiles, masses);
  } else if (with_draft) {
    sum_tiles(residual, masses);
  } else {
    return false;
  }
  const double relative = with_draft ? kErrorOfSums : kErrorOfLaws;
  slack = static_cast<uint64_t>(static_cast<double>(total_of(masses, tiles)) * relative) +
          (with_draft ? kUnitsOfSums : kUnitsOfLaws) * static_cast<uint64_t>(tiles);
  for (const Residual::Edit& edit : residual.edits) {
    uint64_t& mass = masses[edit.token / kTile];
    const uint64_t removed = edit.before - edit.mass;
    mass = mass > removed ? mass - removed : 0;
  }
  return true;
}

// The exact total is within slack of the estimate, so the drawn place is too, and so is each tile's
// beginning: a place that is further from both ends of what it falls into falls into it exactly.
int64_t draw_by_estimate(const Residual& residual, const uint64_t* masses, uint64_t slack, uint64_t bits) {
  const int64_t tiles = tiles_of(residual.target.size);
  const uint64_t total = total_of(masses, tiles), reach = 2 * slack + 2;
  if (total / 4 < reach) return kUndecided;
  uint64_t left = multiply_high(bits, total);
  int64_t index = 0;
  while (left >= masses[index]) left -= masses[index++];
  const bool first = index == 0, last = index == tiles - 1;
  if ((!first && left < reach) || (!last && masses[index] - left <= reach)) return kUndecided;
  uint64_t elements[kTile];
  const uint64_t of_tile = ResidualTiles(residual).fill(index, elements);
  if (left >= of_tile) return kUndecided;
  uint64_t before = 0;
  int64_t e = 0;
  for (; left - before >= elements[e]; ++e) before += elements[e];
  const uint64_t behind = before + elements[e];
  const bool from_start = before == 0, to_end = behind == of_tile;
  if ((!from_start && left - before < reach) || (!to_end && behind - left <= reach)) return kUndecided;
  return index * kTile + e;
}

}  // namespace

Residual whole_of(const Row& row, const RowLaw& law, const uint64_t* tile_masses) {
  Residual residual;
  residual.target = row;
  residual.target_law = &law;
  residual.tile_masses = tile_masses;
  return residual;
}

void Residual::exclude(int64_t token) { subtract(token, 3e38f, 1.0f); }

void Residual::subtract(int64_t token, float gain_, float weight) {
  const float of_target = weight_in(*target_law, target.at(token));
  const float left = fused(-gain_, weight, of_target);
  edits.push_back({token, mass_of(left > 0.0f ? left : 0.0f), mass_of(of_target)});
}

void Residual::sort_edits() {
  std::stable_sort(edits.begin(), edits.end(),
                   [](const Edit& a, const Edit& b) { return a.token < b.token; });
  const auto same = [](const Edit& a, const Edit& b) { return a.token == b.token; };
  edits.erase(std::unique(edits.begin(), edits.end(), same), edits.end());
}

double residual_fraction(const Residual& residual, uint64_t* tile_masses) {
  const uint64_t whole = residual.target_law->mass;
  if (residual.draft.data == nullptr) {
    uint64_t removed = 0;
    for (const Residual::Edit& edit : residual.edits) removed += edit.before - edit.mass;
    return removed < whole ? static_cast<double>(whole - removed) / static_cast<double>(whole) : 0.0;
  }
  uint64_t masses[kMaxTiles];
  sum_tiles(residual, tile_masses != nullptr ? tile_masses : masses);
  const uint64_t mass =
      total_of(tile_masses != nullptr ? tile_masses : masses, tiles_of(residual.target.size));
  return static_cast<double>(mass) / static_cast<double>(whole);
}

int64_t draw(const Residual& residual, uint64_t bits) {
  uint64_t masses[kMaxTiles];
  uint64_t slack = 0;
  if (estimate(residual, masses, slack)) {
    const int64_t token = draw_by_estimate(residual, masses, slack, bits);
    if (token != kUndecided) return token;
  }
  return draw_exactly(residual, bits);
}

void all_masses(const Residual& residual, uint64_t* out) {
  ResidualTiles tiles(residual);
  uint64_t masses[kTile];
  for (int64_t index = 0; index < tiles_of(residual.target.size); ++index) {
    tiles.fill(index, masses);
    const int64_t first = index * kTile, count = std::min<int64_t>(kTile, residual.target.size - first);
    std::copy(masses, masses + count, out + first);
  }
}

}  // namespace foretoken::cpu
