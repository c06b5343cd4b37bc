#include "cpu/gumbel.hpp"

#include <limits>

#include "cpu/views.hpp"
#include "math/gumbel.hpp"

namespace foretoken::cpu {

namespace {

// The elements of a row, each at its own time.
class Race {
 public:
  explicit Race(const RowLaw& law) : law_(law) {}

  void run(int64_t element, float logit, uint64_t bits) {
    const double weight = static_cast<double>(weight_of_logit(logit, law_.max, law_.scale, law_.cut));
    const double uniform = race_uniform(bits);
    // Only below weight * best E / best weight can it win, as E is never smaller than its uniform: for nearly
    // all elements one multiplication decides, and no logarithm is taken.
    if (uniform > weight * reach_) return;
    const double log_weight =
        (static_cast<double>(logit) - static_cast<double>(law_.max)) * static_cast<double>(law_.scale) * kLn2;
    const double time = race_time(uniform, log_weight);
    if (time >= best_time_) return;  // on ties the first stays
    winner_ = element;
    best_time_ = time;
    reach_ = race_exponential(uniform) / weight * 1.00001;  // the weight is only good to 1e-7
  }

  int64_t winner() const { return winner_; }

 private:
  const RowLaw& law_;
  int64_t winner_ = -1;
  double best_time_ = std::numeric_limits<double>::infinity();
  double reach_ = std::numeric_limits<double>::infinity();
};

}  // namespace

int64_t gumbel_draw(const Row& row, const RowLaw& law, uint64_t seed, uint64_t position,
                    const TensorView& vocab_map) {
  if (law.kind == LawKind::point) return law.top;
  const RowKernels& kernels = row_kernels();
  Tile tile;
  Race race(law);
  for (int64_t index = 0; index < tiles_of(row.size); ++index) {
    const float* x = tile.of(kernels, row, index, -std::numeric_limits<float>::infinity());
    for (int e = 0; e < kTile; e += 2) {
      if (!(x[e] >= law.cut || x[e + 1] >= law.cut)) continue;
      const int64_t first = index * kTile + e;
      const PhiloxWords pair = gumbel_words(seed, position, first);
      for (int64_t element = first; element < first + 2; ++element) {
        const float logit = x[element - index * kTile];
        if (!(logit >= law.cut)) continue;
        const int64_t id = vocab_map ? read_index(vocab_map, element) : element;
        race.run(element, logit, gumbel_bits(vocab_map ? gumbel_words(seed, position, id) : pair, id));
      }
    }
  }
  return race.winner();
}

}  // namespace foretoken::cpu
