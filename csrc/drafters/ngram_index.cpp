#include "drafters/ngram_index.hpp"

#include <algorithm>
#include <random>
#include <stdexcept>
#include <string>

namespace foretoken::drafters {
namespace {

constexpr uint64_t kMultiplier = 0x9E3779B97F4A7C15u;
constexpr uint64_t kBase = 0xD1342543DE82EF95u;  // of the polynomial over a window's mixed tokens
constexpr uint32_t kEntriesAtStart = 256;

// Without a secret, a prompt could be built whose n-grams all share a home.
uint64_t process_key() {
  static const uint64_t key = [] {
    std::random_device device;
    return (uint64_t{device()} << 32) | device();
  }();
  return key;
}

uint64_t mix(int64_t token, uint64_t key) {
  const uint64_t x = (static_cast<uint64_t>(token) ^ key) * kMultiplier;
  return x ^ (x >> 29);
}

uint32_t tag_of(uint64_t hash, int n) {
  const uint64_t spread = (hash ^ (hash >> 32)) * kMultiplier;
  return (static_cast<uint32_t>(spread >> 32) & 0x0FFFFFFFu) | (static_cast<uint32_t>(n) << 28);
}

void prefetch([[maybe_unused]] const void* address) {
#if defined(__GNUC__) || defined(__clang__)
  __builtin_prefetch(address, 1);
#endif
}

}  // namespace

NgramIndex::NgramIndex(int min_ngram, int max_ngram, size_t max_bytes)
    : min_ngram_(min_ngram), max_ngram_(max_ngram) {
  if (min_ngram < 1 || max_ngram < min_ngram || max_ngram > kMaxNgram) {
    throw std::invalid_argument("expected 1 <= min_ngram <= max_ngram <= 15");
  }
  if (max_bytes < kMinBytes) throw std::invalid_argument("max_bytes: expected at least 4096");
  // Growing copies into twice the room, so the old half counts too; the table may be three quarters full.
  const size_t budget = std::min(max_bytes / 3 * 2, size_t{1} << 40);
  const size_t per_token = sizeof(int64_t) + sizeof(uint32_t) * kinds();
  for (size_t entries = 64; entries * sizeof(Entry) < budget && entries <= (size_t{1} << 28); entries *= 2) {
    const size_t by_bytes = (budget - entries * sizeof(Entry)) / per_token;
    const size_t room = std::min(by_bytes, entries / 4 * 3 / kinds());
    if (room > max_capacity_) {
      max_capacity_ = static_cast<uint32_t>(room);
      max_entries_ = static_cast<uint32_t>(entries);
    }
  }
  if (static_cast<int64_t>(max_capacity_) <= max_ngram_) {
    throw std::invalid_argument("max_bytes: too small for this max_ngram");
  }
}

size_t NgramIndex::bytes() const {
  return tokens_.capacity() * sizeof(int64_t) + distances_.capacity() * sizeof(uint32_t) +
         table_.capacity() * sizeof(Entry);
}

uint32_t NgramIndex::back(uint32_t place, int64_t steps) const {
  const int64_t at = static_cast<int64_t>(place) - steps;  // steps < capacity_
  return static_cast<uint32_t>(at < 0 ? at + capacity_ : at);
}

uint32_t NgramIndex::place_of(int64_t position) const { return back(last_, length_ - 1 - position); }

// tags[i] is that of the n-gram of n = min_ngram + i tokens that ends at `place`; `available` tokens can be
// read.
void NgramIndex::tags_ending_at(uint32_t place, int64_t available, uint32_t* tags) const {
  const uint64_t key = process_key();
  const int longest = static_cast<int>(std::min<int64_t>(available, max_ngram_));
  uint64_t hash = 0, power = 1;
  for (int n = 1; n <= longest; ++n) {
    hash += mix(tokens_[back(place, n - 1)], key) * power;
    power *= kBase;
    if (n >= min_ngram_) tags[n - min_ngram_] = tag_of(hash, n);
  }
}

bool NgramIndex::same_ngram(uint32_t a, uint32_t b, int n) const {
  for (int i = 0; i < n; ++i) {
    if (tokens_[back(a, i)] != tokens_[back(b, i)]) return false;
  }
  return true;
}

// The entry of the n-gram that ends at `place`, or the empty one where it would go.
size_t NgramIndex::find(uint32_t tag, uint32_t place, int n) const {
  size_t at = tag & mask_;
  while (table_[at].place != 0) {
    if (table_[at].tag == tag && same_ngram(table_[at].place - 1, place, n)) break;
    at = (at + 1) & mask_;
  }
  return at;
}

// Linear probing without tombstones: move back whatever the hole would hide.
void NgramIndex::erase(size_t hole) {
  size_t at = hole;
  for (;;) {
    at = (at + 1) & mask_;
    if (table_[at].place == 0) break;
    const size_t home = table_[at].tag & mask_;
    if (((at - home) & mask_) >= ((at - hole) & mask_)) {
      table_[hole] = table_[at];
      hole = at;
    }
  }
  table_[hole] = Entry{0, 0};
}

void NgramIndex::append(const int64_t* tokens, size_t count) {
  for (size_t i = 0; i < count; ++i) append_one(tokens[i]);
}

void NgramIndex::append_one(int64_t token) {
  if (length_ - start_ == capacity_) {
    if (capacity_ < max_capacity_) {
      grow(capacity_ + 1);
    } else {
      forget_oldest();
    }
  }
  const uint32_t place = length_ == 0 ? 0 : (last_ + 1 == capacity_ ? 0 : last_ + 1);
  tokens_[place] = token;
  const int64_t available = length_ + 1 - start_;
  const int longest = static_cast<int>(std::min<int64_t>(available, max_ngram_));
  uint32_t tags[kMaxNgram];
  tags_ending_at(place, available, tags);
  for (int n = min_ngram_; n <= longest; ++n) prefetch(&table_[tags[n - min_ngram_] & mask_]);
  uint32_t* const distance = distances(place);
  for (int n = min_ngram_; n <= longest; ++n) {
    const int i = n - min_ngram_;
    Entry& entry = table_[find(tags[i], place, n)];
    const uint32_t before = entry.place;
    distance[i] =
        before == 0 ? 0 : (place + 1 > before ? place + 1 - before : place + 1 + capacity_ - before);
    entry = Entry{tags[i], place + 1};
  }
  for (int n = std::max(longest + 1, min_ngram_); n <= max_ngram_; ++n) distance[n - min_ngram_] = 0;
  last_ = place;
  ++length_;
}

// Forgets the n-grams that begin with the oldest token, unless they occurred again.
void NgramIndex::forget_oldest() {
  const uint64_t key = process_key();
  const uint32_t oldest = place_of(start_);
  uint64_t hash = 0;
  uint32_t end = oldest;
  for (int n = 1; n <= max_ngram_ && start_ + n <= length_; ++n) {
    hash = hash * kBase + mix(tokens_[end], key);
    if (n >= min_ngram_) {
      const size_t at = find(tag_of(hash, n), end, n);
      if (table_[at].place == end + 1) erase(at);
    }
    end = end + 1 == capacity_ ? 0 : end + 1;
  }
  ++start_;
}

void NgramIndex::remove_newest() {
  const int64_t available = length_ - start_;
  const int longest = static_cast<int>(std::min<int64_t>(available, max_ngram_));
  uint32_t tags[kMaxNgram];
  tags_ending_at(last_, available, tags);
  const uint32_t* const distance = distances(last_);
  for (int n = min_ngram_; n <= longest; ++n) {
    const uint32_t step = distance[n - min_ngram_];
    const size_t at = find(tags[n - min_ngram_], last_, n);
    // An occurrence that reaches into what has been forgotten meanwhile is gone as well.
    if (step != 0 && static_cast<int64_t>(step) + n <= available) {
      table_[at].place = back(last_, step) + 1;
    } else {
      erase(at);
    }
  }
  last_ = back(last_, 1);
  --length_;
}

void NgramIndex::truncate(int64_t length) {
  if (length < 0) throw std::invalid_argument("length: expected at least 0");
  if (length <= start_) {
    // Nothing that is remembered would stay; positions go on from here.
    if (length < length_) {
      std::fill(table_.begin(), table_.end(), Entry{0, 0});
      start_ = length_ = length;
      last_ = capacity_ == 0 ? 0 : capacity_ - 1;
    }
    return;
  }
  while (length_ > length) remove_newest();
}

void NgramIndex::clear() {
  std::vector<int64_t>().swap(tokens_);
  std::vector<uint32_t>().swap(distances_);
  std::vector<Entry>().swap(table_);
  start_ = length_ = 0;
  last_ = capacity_ = mask_ = 0;
}

void NgramIndex::reserve(int64_t length) {
  const int64_t wanted = std::min<int64_t>(length, max_capacity_);
  if (wanted > capacity_) grow(static_cast<uint32_t>(wanted));
}

// Sizes are the largest ones halved, so that old and new together stay within the budget.
void NgramIndex::grow(uint32_t wanted) {
  uint32_t entries = max_entries_, capacity = max_capacity_;
  while (entries / 2 >= kEntriesAtStart && (capacity + 1) / 2 >= wanted &&
         (capacity + 1) / 2 > static_cast<uint32_t>(max_ngram_)) {
    entries /= 2;
    capacity = (capacity + 1) / 2;
  }
  std::vector<int64_t> tokens(capacity);
  std::vector<uint32_t> distances(size_t(capacity) * kinds());
  std::vector<Entry> table(entries, Entry{0, 0});
  std::copy(tokens_.begin(), tokens_.end(), tokens.begin());
  std::copy(distances_.begin(), distances_.end(), distances.begin());
  const uint32_t mask = entries - 1;
  for (const Entry& entry : table_) {
    if (entry.place == 0) continue;
    size_t at = entry.tag & mask;
    while (table[at].place != 0) at = (at + 1) & mask;
    table[at] = entry;
  }
  tokens_.swap(tokens);
  distances_.swap(distances);
  table_.swap(table);
  capacity_ = capacity;
  mask_ = mask;
}

int NgramIndex::longest_match(int64_t* distance) const {
  const int64_t available = length_ - start_;
  if (available == 0) return 0;
  const uint32_t* const steps = distances(last_);
  for (int n = static_cast<int>(std::min<int64_t>(available, max_ngram_)); n >= min_ngram_; --n) {
    const int64_t step = steps[n - min_ngram_];
    if (step != 0 && step + n <= available) {
      *distance = step;
      return n;
    }
  }
  return 0;
}

int NgramIndex::match_length() const {
  int64_t distance = 0;
  return longest_match(&distance);
}

int64_t NgramIndex::propose(int64_t k, int64_t* out) const {
  int64_t distance = 0;
  if (k <= 0 || longest_match(&distance) == 0) return 0;
  copy_from(distance, k, out);
  return k;
}

// The k tokens from `distance` back on, behind the end of the text those that were just copied.
void NgramIndex::copy_from(int64_t distance, int64_t k, int64_t* out) const {
  uint32_t place = back(last_, distance - 1);
  const int64_t copied = std::min(k, distance);
  for (int64_t i = 0; i < copied; ++i) {
    out[i] = tokens_[place];
    place = place + 1 == capacity_ ? 0 : place + 1;
  }
  for (int64_t i = copied; i < k; ++i) out[i] = out[i - distance];
}

NgramIndex& NgramPool::at(int64_t slot) {
  if (slot < 0 || slot > kMaxSlot) {
    throw std::invalid_argument("slot: expected 0 to " + std::to_string(kMaxSlot) + ", got " +
                                std::to_string(slot));
  }
  if (static_cast<size_t>(slot) >= indexes_.size()) {
    indexes_.resize(slot + 1, NgramIndex(min_ngram_, max_ngram_, max_bytes_));
  }
  return indexes_[slot];
}

}  // namespace foretoken::drafters
