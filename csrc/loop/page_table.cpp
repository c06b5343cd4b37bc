#include "loop/page_table.hpp"

#include <algorithm>
#include <string>

namespace foretoken::loop {

namespace {

using Shared = std::vector<int32_t>;

constexpr int64_t kMostPageSize = 256;
constexpr int64_t kMostNumber = INT32_MAX;

std::string expected(const std::string& name, const std::string& what, int64_t got) {
  return name + ": expected " + what + ", got " + std::to_string(got);
}

void check_size(const char* name, int64_t value, int64_t least, int64_t most) {
  if (value >= least && value <= most) return;
  throw std::invalid_argument(expected(name, std::to_string(least) + " to " + std::to_string(most), value));
}

const PageTableConfig& checked(const PageTableConfig& config) {
  check_size("pages", config.pages, 1, kMostNumber);
  check_size("page_size", config.page_size, 1, kMostPageSize);
  check_size("max_slots", config.slots, 1, kMostNumber);
  check_size("max_length", config.max_length, 1, kMostNumber);
  check_size("window", config.window, 0, kMostNumber);
  return config;
}

}  // namespace

PageTable::PageTable(const PageTableConfig& config)
    : config_(checked(config)),
      columns_(columns_for(config.max_length)),
      allocator_(config.pages),
      slots_(static_cast<size_t>(config.slots)),
      row_slots_(static_cast<size_t>(config.slots), 0),
      seen_in_(static_cast<size_t>(config.slots), 0),
      leaving_(static_cast<size_t>(config.pages), 0) {}

const PageTable::Slot& PageTable::at(int64_t slot) const {
  if (slot < 0 || slot >= config_.slots) {
    throw std::invalid_argument(expected("slot", "0 to " + std::to_string(config_.slots - 1), slot));
  }
  return slots_[static_cast<size_t>(slot)];
}

void PageTable::note_once(int32_t slot) {
  int64_t& seen_in = seen_in_[static_cast<size_t>(slot)];
  if (seen_in == number_) {
    throw std::invalid_argument(expected("slots", "each once", slot) + " twice");
  }
  seen_in = number_;
}

void PageTable::check_round(const int32_t* slots, const int32_t* counts, int64_t rows) {
  ++number_;
  for (int64_t b = 0; b < rows; ++b) {
    const Slot& slot = at(slots[b]);
    note_once(slots[b]);
    if (counts[b] < 0) throw std::invalid_argument(expected("num_tokens", "0 or more", counts[b]));
    if (slot.high + counts[b] > config_.max_length) {
      throw std::invalid_argument(expected("num_tokens",
                                           "at most " + std::to_string(config_.max_length - slot.high) +
                                               " rows of slot " + std::to_string(slots[b]) + " (max_length " +
                                               std::to_string(config_.max_length) + ")",
                                           counts[b]));
    }
  }
}

int64_t PageTable::pages_needed(const int32_t* slots, const int32_t* counts, int64_t rows) {
  int64_t needed = 0;
  const auto walk = [&](auto visit) {
    for (int64_t b = 0; b < rows; ++b) {
      const Slot& slot = slots_[static_cast<size_t>(slots[b])];
      if (counts[b] == 0) continue;
      const int64_t last = column_of(slot.high + counts[b] - 1),
                    held = static_cast<int64_t>(slot.pages.size());
      for (int64_t column = column_of(slot.low); column <= last; ++column) {
        visit(column < held ? slot.pages[static_cast<size_t>(column)] : kNoPage);
      }
    }
  };
  walk([&](int32_t page) {
    if (page == kNoPage) {
      ++needed;
    } else if (allocator_.users(page) - leaving_[static_cast<size_t>(page)] > 1) {
      ++needed;
      ++leaving_[static_cast<size_t>(page)];
    }
  });
  walk([&](int32_t page) {
    if (page != kNoPage) leaving_[static_cast<size_t>(page)] = 0;
  });
  return needed;
}

void PageTable::own_pages(int32_t number, int32_t count) {
  Slot& slot = slots_[static_cast<size_t>(number)];
  const int64_t last = column_of(slot.high + count - 1);
  for (int64_t column = column_of(slot.low); column <= last; ++column) {
    if (column >= static_cast<int64_t>(slot.pages.size())) {
      slot.pages.push_back(allocator_.take());
    } else {
      int32_t& page = slot.pages[static_cast<size_t>(column)];
      if (allocator_.users(page) == 1) continue;
      const int32_t shared = page;
      page = allocator_.take();
      allocator_.drop(shared);
      if (column * config_.page_size < slot.high) copies_.push_back({shared, page});
    }
    edit(number, column, slot.pages[static_cast<size_t>(column)]);
  }
}

void PageTable::set_rows(const int32_t* slots, const int32_t* counts, int64_t rows) {
  in_order_ = true;
  for (int64_t b = 0; b < rows; ++b) in_order_ = in_order_ && slots[b] == b;
  round_.clear();
  for (int64_t b = 0; b < rows; ++b) {
    Slot& slot = slots_[static_cast<size_t>(slots[b])];
    if (slot.count != counts[b]) edit(slots[b], kEditCount, counts[b]);
    slot.count = slot.reserved = counts[b];
    round_.push_back({slots[b], static_cast<int32_t>(b), counts[b], slot.tenancy});
    int32_t& row_slot = row_slots_[static_cast<size_t>(b)];
    if (!in_order_ && row_slot != slots[b]) edit(b, kEditRow, row_slot = slots[b]);
  }
}

void PageTable::reserve(const int32_t* slots, const int32_t* counts, int64_t rows) {
  if (open_) throw std::logic_error("reserve: a round is open; commit or cancel it first");
  check_round(slots, counts, rows);
  take_pages(slots, counts, rows);
  set_rows(slots, counts, rows);
  open_ = true;
}

void PageTable::check_free(int64_t needed) const {
  if (needed <= allocator_.free()) return;
  throw OutOfPages(expected("num_tokens",
                            "rows for which the " + std::to_string(allocator_.free()) + " free of " +
                                std::to_string(allocator_.total()) + " pages are enough",
                            needed) +
                   " pages' worth");
}

void PageTable::take_pages(const int32_t* slots, const int32_t* counts, int64_t rows) {
  check_free(pages_needed(slots, counts, rows));
  for (int64_t b = 0; b < rows; ++b) {
    if (counts[b] > 0) own_pages(slots[b], counts[b]);
  }
}

void PageTable::resize(const int32_t* counts, int64_t rows) {
  if (!open_ || rows != this->rows()) throw std::logic_error("reserve: no such round is open");
  std::vector<int32_t> slots;
  for (const Entry& entry : round_) slots.push_back(entry.slot);
  check_round(slots.data(), counts, rows);
  take_pages(slots.data(), counts, rows);
  set_rows(slots.data(), counts, rows);
  for (const int32_t slot : slots) return_pages(slot);
}

int32_t PageTable::checked_page(int32_t page) const {
  check_size("page", page, 0, config_.pages - 1);
  return page;
}

void PageTable::keep(int32_t page) { allocator_.keep(checked_page(page)); }

void PageTable::check_shared(const std::vector<std::vector<int32_t>>& shared, int64_t rows) const {
  if (shared.empty()) return;
  if (static_cast<int64_t>(shared.size()) != rows) {
    throw std::invalid_argument(expected("shared", "pages of " + std::to_string(rows) + " rows",
                                         static_cast<int64_t>(shared.size())));
  }
  for (size_t b = 0; b < shared.size(); ++b) {
    for (const int32_t page : shared[b]) {
      check_size("shared", page, -static_cast<int64_t>(b), config_.pages - 1);
    }
  }
}

// Free pages that the round takes although it does not need their space. Each counts once.
int64_t PageTable::revived(const std::vector<std::vector<int32_t>>& shared) {
  int64_t count = 0;
  const auto walk = [&](auto visit) {
    for (const std::vector<int32_t>& pages : shared) {
      for (const int32_t page : pages) {
        if (page >= 0 && allocator_.users(page) == 0) visit(leaving_[static_cast<size_t>(page)]);
      }
    }
  };
  walk([&](int32_t& seen) { count += seen++ == 0; });
  walk([](int32_t& seen) { seen = 0; });
  return count;
}

void PageTable::add_page(int32_t number, int32_t page) {
  Slot& slot = slots_[static_cast<size_t>(number)];
  slot.pages.push_back(page);
  edit(number, static_cast<int64_t>(slot.pages.size()) - 1, page);
}

void PageTable::hold(const int32_t* slots, const int32_t* ends, int64_t rows,
                     const std::vector<std::vector<int32_t>>& shared) {
  if (open_ || !closed_.empty()) throw std::logic_error("hold: a round of reserve() is under way");
  check_shared(shared, rows);
  ++number_;
  for (int64_t b = 0; b < rows; ++b) {
    at(slots[b]);
    note_once(slots[b]);
    check_size("ends", ends[b], 0, config_.max_length);
  }
  int64_t needed = 0;
  for (int64_t b = 0; b < rows; ++b) {
    Slot& slot = slots_[static_cast<size_t>(slots[b])];
    const int64_t held = static_cast<int64_t>(slot.pages.size()), wanted = columns_for(ends[b]);
    slot.low = slot.high = std::min<int64_t>(ends[b], held * config_.page_size);
    return_pages(slots[b]);
    const int64_t lent = shared.empty() ? 0 : static_cast<int64_t>(shared[static_cast<size_t>(b)].size());
    if (lent > 0) check_size("shared", lent, 0, std::max<int64_t>(wanted - held, 0));
    needed += std::max<int64_t>(wanted - held - lent, 0);
  }
  check_free(needed + revived(shared));
  // Before any page is taken: what comes back to life must not go to somebody else.
  for (size_t b = 0; b < shared.size(); ++b) {
    for (const int32_t page : shared[b]) {
      if (page < 0) break;
      allocator_.users(page) == 0 ? allocator_.revive(page) : allocator_.share(page);
      add_page(slots[b], page);
    }
  }
  for (int64_t b = 0; b < rows; ++b) {
    Slot& slot = slots_[static_cast<size_t>(slots[b])];
    slot.low = slot.high = ends[b];
    for (const int32_t source : shared.empty() ? Shared() : shared[static_cast<size_t>(b)]) {
      if (source >= 0) continue;
      const Slot& from = slots_[static_cast<size_t>(slots[-1 - source])];
      const int32_t page = from.pages.at(slot.pages.size());
      allocator_.share(page);
      add_page(slots[b], page);
    }
    while (static_cast<int64_t>(slot.pages.size()) < columns_for(ends[b])) {
      add_page(slots[b], allocator_.take());
    }
  }
}

void PageTable::close() {
  if (!open_) throw std::logic_error("commit: no round is open; reserve first");
  for (const Entry& entry : round_) {
    Slot& slot = slots_[static_cast<size_t>(entry.slot)];
    if (slot.tenancy != entry.tenancy) continue;
    slot.high += entry.count;
    slot.reserved = 0;
  }
  closed_.push_back(std::move(round_));
  round_ = {};
  open_ = false;
}

void PageTable::cancel() {
  if (!open_) throw std::logic_error("cancel: no round is open; reserve first");
  open_ = false;
  for (const Entry& entry : round_) {
    Slot& slot = slots_[static_cast<size_t>(entry.slot)];
    if (slot.tenancy != entry.tenancy) continue;
    slot.reserved = 0;
    return_pages(entry.slot);
  }
  round_.clear();
}

void PageTable::settle(const int32_t* kept, int64_t rows) {
  if (closed_.empty()) throw std::logic_error("settle: no round is waiting for its numbers");
  const Round round = std::move(closed_.front());
  closed_.pop_front();
  for (const Entry& entry : round) {
    Slot& slot = slots_[static_cast<size_t>(entry.slot)];
    if (slot.tenancy != entry.tenancy || entry.row >= rows) continue;
    const int32_t stay = std::clamp(kept[entry.row], 0, entry.count);
    slot.low += stay;
    slot.high -= entry.count - stay;
    return_pages(entry.slot);
  }
}

void PageTable::return_pages(int32_t number) {
  Slot& slot = slots_[static_cast<size_t>(number)];
  const int64_t keep = std::max(columns_for(slot.high + slot.reserved), slot.first_column);
  if (keep < static_cast<int64_t>(slot.pages.size())) edit(number, keep, kNoPageFromHere);
  while (static_cast<int64_t>(slot.pages.size()) > keep) {
    allocator_.drop(slot.pages.back());
    slot.pages.pop_back();
  }
  // The oldest query yet to come is at position `low` or behind it.
  const int64_t seen_from = config_.window > 0 ? slot.low - config_.window + 1 : 0;
  for (; seen_from > 0 && slot.first_column < column_of(seen_from); ++slot.first_column) {
    int32_t& page = slot.pages[static_cast<size_t>(slot.first_column)];
    allocator_.drop(page);
    page = kNoPage;
    edit(number, slot.first_column, kNoPage);
  }
}

void PageTable::fork(int64_t source, int64_t target, int64_t length) {
  const Slot& from = at(source);
  const bool whole = length < 0;
  Slot made;
  made.low = whole ? from.low : length;
  made.high = whole ? from.high : length;
  made.tenancy = at(target).tenancy + 1;
  made.count = at(target).count;
  made.first_column = from.first_column;
  if (at(target).high > 0 || !at(target).pages.empty() || source == target) {
    throw std::invalid_argument(expected("target", "an empty slot", target));
  }
  if (length > from.low) {
    throw std::invalid_argument(expected("length", "at most " + std::to_string(from.low), length));
  }
  const int64_t seen_from = std::max<int64_t>(made.low - config_.window + 1, 0);
  if (config_.window > 0 && made.low > 0 && column_of(seen_from) < from.first_column) {
    throw std::invalid_argument(expected("length", "a prefix whose window is still in the cache", length));
  }
  made.pages.assign(from.pages.begin(), from.pages.begin() + columns_for(made.high));
  made.first_column = std::min<int64_t>(made.first_column, static_cast<int64_t>(made.pages.size()));
  for (size_t column = 0; column < made.pages.size(); ++column) {
    if (made.pages[column] == kNoPage) continue;
    allocator_.share(made.pages[column]);
    edit(target, static_cast<int64_t>(column), made.pages[column]);
  }
  edit(target, whole ? kEditLengthFrom : kEditLength, whole ? source : length);
  for (Round& round : closed_) {
    for (size_t i = 0, size = round.size(); whole && i < size; ++i) {
      Entry entry = round[i];
      if (entry.slot != source || entry.tenancy != from.tenancy) continue;
      entry.slot = static_cast<int32_t>(target);
      entry.tenancy = made.tenancy;
      round.push_back(entry);
    }
  }
  slots_[static_cast<size_t>(target)] = std::move(made);
}

// Of pages that are kept, the first are to go last: without them the others are of no use.
void PageTable::drop_all(const std::vector<int32_t>& pages) {
  for (const int32_t page : pages) {
    if (page != kNoPage && !allocator_.kept(page)) allocator_.drop(page);
  }
  for (auto page = pages.rbegin(); page != pages.rend(); ++page) {
    if (*page != kNoPage && allocator_.kept(*page)) allocator_.drop(*page);
  }
}

void PageTable::free(int64_t number) {
  at(number);
  Slot& slot = slots_[static_cast<size_t>(number)];
  drop_all(slot.pages);
  Slot empty;
  empty.tenancy = slot.tenancy + 1;
  slot = std::move(empty);
  edit(number, 0, kNoPageFromHere);
  edit(number, kEditLength, 0);
  edit(number, kEditCount, 0);
}

}  // namespace foretoken::loop
