// What followed the last time: an index from the last few tokens of a text to their previous occurrence.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "drafters/ngram_tree.hpp"

namespace foretoken::drafters {

// One request's text and, for every n in [min_ngram, max_ngram], where each n-gram ended last.
//
// propose() takes the longest suffix of the text (at most max_ngram tokens) that occurred before, its most
// recent earlier occurrence, and copies what followed. A copy that reaches the end of the text goes on
// reading from itself, so a text with period d is continued with period d.
//
// Cost. Because every append looks its n-grams up anyway, the answer to propose() is known before it is
// asked: it follows one stored distance and copies k tokens. An append is one table visit per n, whatever the
// text: no chain of occurrences is ever walked (by propose_tree(): 96 of them), so repetition cannot blow the
// work up. Tables are hashed with a key drawn once per process, and every hit is verified token by token, so
// hashing never changes an answer.
//
// Memory. At most max_bytes, also while growing. When the text outgrows them, the oldest token is forgotten
// for every one that comes in: matches lie in the last capacity() tokens, and what has been forgotten stays
// so after a truncate().
//
// Exceptions. A call that throws (std::bad_alloc, std::invalid_argument) leaves the index as it was; append()
// of several tokens may have taken a prefix of them, which length() tells.
class NgramIndex {
 public:
  static constexpr int kMaxNgram = 15;
  static constexpr size_t kMinBytes = 4096;

  NgramIndex(int min_ngram, int max_ngram, size_t max_bytes);

  void append(const int64_t* tokens, size_t count);

  // Writes k tokens when some suffix occurred before, otherwise none. Returns how many.
  int64_t propose(int64_t k, int64_t* out) const;

  // Merges what followed the latest occurrences of every suffix into a tree, whose first path is what
  // propose() writes: tokens and parents of its nodes from 1 on. Returns how many; 0 when there is no match.
  int64_t propose_tree(const ContinuationTree::Budget& budget, ContinuationTree& tree, int64_t* tokens,
                       int32_t* parents) const;

  // Length of the suffix that propose() would match now; 0 when none.
  int match_length() const;

  // Keeps the first `length` tokens. Exact: the index is what it would be had the others never come, except
  // that tokens forgotten meanwhile stay forgotten.
  void truncate(int64_t length);

  // Makes room for a text of `length` tokens, as far as the budget allows, so that no append has to.
  void reserve(int64_t length);

  void clear();  // gives the memory back

  int64_t length() const { return length_; }
  int64_t forgotten() const { return start_; }  // first position that is still remembered
  int64_t capacity() const { return max_capacity_; }
  size_t bytes() const;

 private:
  struct Entry {
    uint32_t tag;    // hash bits with n in the top four; its low bits are the entry's home
    uint32_t place;  // 1 + ring place of the n-gram's last token; 0: empty
  };

  int kinds() const { return max_ngram_ - min_ngram_ + 1; }
  uint32_t back(uint32_t place, int64_t steps) const;
  uint32_t place_of(int64_t position) const;
  uint32_t* distances(uint32_t place) { return &distances_[size_t(place) * kinds()]; }
  const uint32_t* distances(uint32_t place) const { return &distances_[size_t(place) * kinds()]; }

  void tags_ending_at(uint32_t place, int64_t available, uint32_t* tags) const;
  bool same_ngram(uint32_t a, uint32_t b, int n) const;
  size_t find(uint32_t tag, uint32_t place, int n) const;
  void erase(size_t hole);

  void append_one(int64_t token);
  void forget_oldest();
  void remove_newest();
  void grow(uint32_t wanted);
  int longest_match(int64_t* distance) const;
  void copy_from(int64_t distance, int64_t k, int64_t* out) const;

  int min_ngram_;
  int max_ngram_;
  uint32_t max_capacity_ = 0;  // tokens
  uint32_t capacity_ = 0;      // tokens the ring has room for now
  uint32_t mask_ = 0;          // table entries - 1
  uint32_t max_entries_ = 0;
  int64_t start_ = 0;
  int64_t length_ = 0;
  uint32_t last_ = 0;                // ring place of position length_ - 1
  std::vector<int64_t> tokens_;      // ring
  std::vector<uint32_t> distances_;  // [ring, kinds]: how far back the same n-gram ended before; 0: nowhere
  std::vector<Entry> table_;
};

// One index per request slot, made when the slot is first named.
class NgramPool {
 public:
  static constexpr int64_t kMaxSlot = (1 << 20) - 1;

  NgramPool(int min_ngram, int max_ngram, size_t max_bytes)
      : min_ngram_(min_ngram),
        max_ngram_(max_ngram),
        max_bytes_(max_bytes),
        indexes_(1, {min_ngram, max_ngram, max_bytes}) {}

  NgramIndex& at(int64_t slot);
  ContinuationTree& scratch() { return scratch_; }

 private:
  int min_ngram_, max_ngram_;
  size_t max_bytes_;
  std::vector<NgramIndex> indexes_;
  ContinuationTree scratch_;
};

}  // namespace foretoken::drafters
