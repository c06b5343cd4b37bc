// Pages of a cache, each with the number of slots whose tables name it.
#pragma once

#include <cstdint>
#include <vector>

namespace foretoken::loop {

class BlockAllocator {
 public:
  explicit BlockAllocator(int64_t pages) : users_(static_cast<size_t>(pages), 0) {
    free_.reserve(users_.size());
    for (int64_t page = pages - 1; page >= 0; --page) free_.push_back(static_cast<int32_t>(page));
  }

  int64_t total() const { return static_cast<int64_t>(users_.size()); }
  int64_t free() const { return static_cast<int64_t>(free_.size()); }
  int32_t users(int32_t page) const { return users_[static_cast<size_t>(page)]; }

  // There has to be a free one. The page that came back last is the first to go, as it is in caches.
  int32_t take() {
    const int32_t page = free_.back();
    free_.pop_back();
    users_[static_cast<size_t>(page)] = 1;
    return page;
  }
  void share(int32_t page) { ++users_[static_cast<size_t>(page)]; }
  void drop(int32_t page) {
    if (--users_[static_cast<size_t>(page)] == 0) free_.push_back(page);
  }

 private:
  std::vector<int32_t> users_;
  std::vector<int32_t> free_;
};

}  // namespace foretoken::loop
