// Pages of a cache, each with the number of slots whose tables name it.
#pragma once

#include <cstdint>
#include <vector>

namespace foretoken::loop {

// Free pages are a list: the one that came back last is the first to go, as it is in caches. Pages marked
// with keep() stand behind all others when they come back, the oldest of them first to go, and what they hold
// can be had again by revive() until then.
class BlockAllocator {
 public:
  explicit BlockAllocator(int64_t pages) : pages_(static_cast<size_t>(pages) + 1), end_(to_index(pages)) {
    pages_[static_cast<size_t>(end_)].before = pages_[static_cast<size_t>(end_)].after = end_;
    for (int32_t page = end_ - 1; page >= 0; --page) insert(page, pages_[static_cast<size_t>(end_)].before);
  }

  int64_t total() const { return end_; }
  int64_t free() const { return free_; }
  int32_t users(int32_t page) const { return at(page).users; }
  // Counts what the page has held: another number, another content.
  int64_t content(int32_t page) const { return at(page).content; }

  // There has to be a free one.
  int32_t take() {
    const int32_t page = at(end_).before;
    remove(page);
    Page& taken = at(page);
    taken.users = 1;
    taken.kept = false;
    ++taken.content;
    return page;
  }
  void share(int32_t page) { ++at(page).users; }
  void revive(int32_t page) {
    remove(page);
    at(page).users = 1;
  }
  void keep(int32_t page) { at(page).kept = true; }
  bool kept(int32_t page) const { return at(page).kept; }
  void drop(int32_t page) {
    if (--at(page).users == 0) insert(page, at(page).kept ? end_ : at(end_).before);
  }

 private:
  struct Page {
    int32_t users = 0;
    int32_t before = 0, after = 0;  // in the list of free pages, where it is one
    bool kept = false;
    int64_t content = 0;
  };

  static int32_t to_index(int64_t page) { return static_cast<int32_t>(page); }
  Page& at(int32_t page) { return pages_[static_cast<size_t>(page)]; }
  const Page& at(int32_t page) const { return pages_[static_cast<size_t>(page)]; }
  void insert(int32_t page, int32_t before) {
    Page& made = at(page);
    made.before = before;
    made.after = at(before).after;
    at(made.after).before = at(before).after = page;
    ++free_;
  }
  void remove(int32_t page) {
    const Page& taken = at(page);
    at(taken.before).after = taken.after;
    at(taken.after).before = taken.before;
    --free_;
  }

  std::vector<Page> pages_;  // and the end of the list
  int32_t end_;
  int64_t free_ = 0;
};

}  // namespace foretoken::loop
