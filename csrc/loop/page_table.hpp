// Which pages hold the rows of which slot, and how many rows are valid: the host's side of a paged cache.
#pragma once

#include <cstdint>
#include <deque>
#include <stdexcept>
#include <vector>

#include "loop/block_allocator.hpp"
#include "ops/pages.hpp"

namespace foretoken::loop {

struct PageTableConfig {
  int64_t pages, page_size;
  int64_t slots;
  int64_t max_length;  // rows of a slot, of committed and new tokens together
  int64_t window;      // positions that a query sees, its own among them; 0: all
};

// Nothing has changed where it is thrown.
class OutOfPages : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A round: reserve() finds pages for the new rows of some slots; close() ends it, and settle() says, then or
// rounds later, how many rows of each stay. In between a slot's length is known by its bounds alone, and
// pages are kept for the upper one. With settle() right behind close() bounds are always equal.
//
// Rows below a length are never written again. So slots share pages up to their lengths, and reserve() gives
// a slot a page of its own, a copy, before rows of a shared one are written.
//
// Every call either does all it says or throws and changes nothing. What has to be done on the device is
// collected in edits() and copies(), in order.
class PageTable {
 public:
  explicit PageTable(const PageTableConfig& config);

  void reserve(const int32_t* slots, const int32_t* counts, int64_t rows);
  // The open round has so many rows of each slot instead, more or fewer; the first ones are the same.
  void resize(const int32_t* counts, int64_t rows);
  // For an owner that counts rows itself and opens no rounds: so many rows of each slot have pages, and what
  // is behind them goes back, that also where OutOfPages is thrown. The first of a row's new columns get the
  // pages of `shared[b]`, which may have come back since keep(), or where that is negative, -1 - r, the page
  // of that column of row r in front of it.
  void hold(const int32_t* slots, const int32_t* ends, int64_t rows,
            const std::vector<std::vector<int32_t>>& shared = {});
  // What the page holds may be wanted again when nobody has it any more: until another content() it is there.
  void keep(int32_t page);
  int64_t content(int32_t page) const { return allocator_.content(checked_page(page)); }
  void close();
  void cancel();                                   // the open round, as if nothing had been reserved
  void settle(const int32_t* kept, int64_t rows);  // of the oldest closed round; -1 counts as 0
  // An empty slot has the first `length` rows of another, or all of them: -1.
  void fork(int64_t source, int64_t target, int64_t length);
  void free(int64_t slot);

  const PageTableConfig& config() const { return config_; }
  int64_t columns() const { return columns_; }
  int64_t free_pages() const { return allocator_.free(); }
  bool open() const { return open_; }
  int64_t unsettled() const { return static_cast<int64_t>(closed_.size()); }
  int64_t rows() const { return static_cast<int64_t>(round_.size()); }  // of the open round
  bool in_order() const { return in_order_; }                           // row b of it is slot b
  int64_t low(int64_t slot) const { return at(slot).low; }
  int64_t high(int64_t slot) const { return at(slot).high; }
  // By column, -1 behind the window.
  const std::vector<int32_t>& pages(int64_t slot) const { return at(slot).pages; }

  std::vector<PageEdit>& edits() { return edits_; }
  std::vector<PageCopy>& copies() { return copies_; }

 private:
  struct Slot {
    std::vector<int32_t> pages;
    int64_t low = 0, high = 0;  // bounds of the committed rows, closed rounds included
    int64_t first_column = 0;   // in front of it the window has left the pages
    int64_t tenancy = 0;        // counts the requests that have had the slot
    int32_t reserved = 0;       // rows of the open round
    int32_t count = 0;          // as the device has it
  };
  struct Entry {
    int32_t slot, row, count;
    int64_t tenancy;
  };
  using Round = std::vector<Entry>;

  const Slot& at(int64_t slot) const;
  void note_once(int32_t slot);
  void check_free(int64_t needed) const;
  void check_shared(const std::vector<std::vector<int32_t>>& shared, int64_t rows) const;
  int64_t revived(const std::vector<std::vector<int32_t>>& shared);
  int32_t checked_page(int32_t page) const;
  void add_page(int32_t slot, int32_t page);
  void drop_all(const std::vector<int32_t>& pages);
  void check_round(const int32_t* slots, const int32_t* counts, int64_t rows);
  int64_t pages_needed(const int32_t* slots, const int32_t* counts, int64_t rows);
  void take_pages(const int32_t* slots, const int32_t* counts, int64_t rows);
  void own_pages(int32_t number, int32_t count);
  void set_rows(const int32_t* slots, const int32_t* counts, int64_t rows);
  void return_pages(int32_t number);  // surplus ones, and those behind the window
  int64_t column_of(int64_t row) const { return row / config_.page_size; }
  int64_t columns_for(int64_t rows) const { return (rows + config_.page_size - 1) / config_.page_size; }
  void edit(int64_t slot, int64_t column, int64_t value) {
    edits_.push_back({static_cast<int32_t>(slot), static_cast<int32_t>(column), static_cast<int32_t>(value)});
  }

  PageTableConfig config_;
  int64_t columns_;
  BlockAllocator allocator_;
  std::vector<Slot> slots_;
  Round round_;
  bool open_ = false, in_order_ = true;
  std::deque<Round> closed_;
  std::vector<int32_t> row_slots_;  // as the device has them
  std::vector<int64_t> seen_in_;    // number of the last round that a slot was checked for
  std::vector<int32_t> leaving_;    // per page: users that the round being reserved takes away; zeros between
  int64_t number_ = 0;
  std::vector<PageEdit> edits_;
  std::vector<PageCopy> copies_;
};

}  // namespace foretoken::loop
