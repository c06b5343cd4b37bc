// The edited rows of a preparation: a slice of some rows of one request for each block, phase by phase, where
// a phase is what all threads of a block do between two barriers.
#pragma once

#include "math/tree_index.hpp"
#include "ops/prepare.hpp"
#include "ops/prepare_access.hpp"

namespace foretoken::preparing {

constexpr uint32_t kInText = 1u << 31;  // in prompt or output; below it: how often it was generated
constexpr uint32_t kNoBias = 1u << 31;  // the bits of -0.0f: adding it changes nothing

struct Share {  // which block of its kind this is, of how many
  int64_t block, blocks;
};

struct Request {
  int64_t slot = 0, base = 0, first_row = 0;
  int32_t drafts = 0;
};

// False: nothing of it is to be read.
FORETOKEN_INLINE bool find_request(const PrepareArgs& args, int64_t b, Request& request) {
  request.slot = args.slots ? index_at(args.slots, b) : b;
  if (request.slot < 0 || request.slot >= args.slots_there) return false;
  request.base = index_at(args.base, b);
  const int64_t requested = args.num_drafts ? index_at(args.num_drafts, b) : args.nodes - 1;
  if (requested == -1) return false;
  int64_t rows_there = args.nodes;
  if (args.row_offsets) {
    const int64_t last = index_at(args.row_offsets, b + 1);
    request.first_row = index_at(args.row_offsets, b);
    if (request.first_row < 0 || last > args.target_rows_there) return false;
    rows_there = last - request.first_row;
  }
  if (rows_there < 1) return false;
  // A count that cannot be makes a plain draw of the row.
  const bool possible = requested >= 0 && requested < args.nodes && requested < rows_there;
  request.drafts = possible ? static_cast<int32_t>(requested) : 0;
  return true;
}

FORETOKEN_INLINE bool history_suits(const PrepareArgs& args, const Constraints* constraints,
                                    const Request& request) {
  if (constraints == nullptr || !constraints[request.slot].needs_history()) return true;
  return prompt_within(args.history, request.slot, request.base) >= 0;
}

// Whether the request's rule and temperature look at draft laws at all.
FORETOKEN_INLINE bool reads_draft_laws(const PrepareArgs& args, const Request& request) {
  if (args.temperature[request.slot] == 0.0f) return false;
  if (!args.rules) return true;
  if (request.slot >= args.rules.shape[0]) return false;
  const uint8_t code = static_cast<const uint8_t*>(args.rules.data)[request.slot * args.rules.strides[0]];
  return code < kRules && code != static_cast<uint8_t>(Rule::target_only) &&
         code != static_cast<uint8_t>(Rule::coupled);
}

// Shared memory of a block.
struct EditScratch {
  alignas(16) uint32_t counts[kSlice];
  alignas(16) float bias[kSlice];
  int64_t token[kMaxNodes];   // of each node, or of each entry of a path
  int32_t parent[kMaxNodes];  // kNotThere: none
  uint8_t has_child[kMaxNodes];
  int16_t climb[kMaxNodes];  // nodes from a row's own up to the root, which is left out
  int32_t climbed;           // their number; kNotThere: the row is not prepared
  uint32_t found;
};

struct EditWork {
  const EditJob* job;
  bool of_draft;
  Request request;
  const Constraints* rule = nullptr;  // null: nothing but a bitmask or a map
  int64_t b, first, count, first_row, last_row, generated = 0;
  const int32_t* inverse;
};

FORETOKEN_INLINE int64_t element_of(const PrepareArgs& args, const EditWork& work, int64_t id) {
  if (id < 0 || id >= args.vocab) return -1;
  return work.inverse != nullptr ? work.inverse[id] : id;
}

// Where in the slice an id is, -1 if elsewhere.
FORETOKEN_INLINE int64_t place_of(const PrepareArgs& args, const EditWork& work, int64_t id) {
  const int64_t place = element_of(args, work, id) - work.first;
  return place >= 0 && place < work.count ? place : -1;
}

// False: none of the rows is read by anyone.
FORETOKEN_INLINE bool find_work(const PrepareArgs& args, const Share& share, bool of_draft, EditWork& work) {
  const EditJob& job = of_draft ? args.draft : args.target;
  const int64_t slices = (job.size + kSlice - 1) / kSlice;
  const int64_t slice = share.block % slices, group = share.block / slices % job.groups;
  const int64_t rows = (job.rows + job.groups - 1) / job.groups;
  work.job = &job;
  work.of_draft = of_draft;
  work.b = share.block / slices / job.groups;
  work.first = slice * kSlice;
  work.count = job.size - work.first < kSlice ? job.size - work.first : kSlice;
  work.first_row = group * rows;
  work.last_row = work.first_row + rows < job.rows ? work.first_row + rows : job.rows;
  work.inverse = work.of_draft || args.mapped_target ? args.inverse : nullptr;
  if (!find_request(args, work.b, work.request)) return false;
  if (work.of_draft && !reads_draft_laws(args, work.request)) return false;
  if (!history_suits(args, job.constraints, work.request)) return false;
  if (job.constraints != nullptr && job.constraints[work.request.slot].any()) {
    work.rule = &job.constraints[work.request.slot];
    if (work.rule->needs_history()) {
      work.generated = work.request.base - prompt_within(args.history, work.request.slot, work.request.base);
    }
  }
  return true;
}

FORETOKEN_INLINE void clear(EditScratch& scratch, int thread) {
  for (int64_t at = thread; at < kSlice; at += kThreads) {
    scratch.counts[at] = 0;
    scratch.bias[at] = float_of(kNoBias);
  }
  for (int node = thread; node < kMaxNodes; node += kThreads) scratch.has_child[node] = 0;
}

template <class Index>
FORETOKEN_INLINE void count_text(const PrepareArgs& args, const EditWork& work, EditScratch& scratch,
                                 int thread) {
  const TensorView& tokens = args.history.tokens;
  const Index* text = static_cast<const Index*>(tokens.data) + work.request.slot * tokens.strides[0];
  const int64_t stride = tokens.strides[1], prompt = work.request.base - work.generated;
#if defined(__CUDA_ARCH__)
#pragma unroll 4
#endif
  for (int64_t i = thread; i < work.request.base; i += kThreads) {
    const int64_t place = place_of(args, work, text[i * stride]);
    if (place < 0) continue;
    if (i < prompt) {
      or_into(scratch.counts[place], kInText);
    } else {
      add_to(scratch.counts[place], 1);
    }
  }
}

// What holds for all rows of the request: its tree, its bias, and the tokens of its text.
FORETOKEN_INLINE void gather(const PrepareArgs& args, const EditWork& work, EditScratch& scratch,
                             int thread) {
  for (int32_t node = 1 + thread; node <= work.request.drafts; node += kThreads) {
    const int64_t parent = args.parents ? index_at(args.parents, work.b, node - 1) : node - 1;
    const bool possible = parent >= 0 && parent < node;
    scratch.token[node] = index_at(args.draft_tokens, work.b, node - 1);
    scratch.parent[node] = possible ? static_cast<int32_t>(parent) : kNotThere;
    if (possible) scratch.has_child[parent] = 1;
  }
  for (int64_t i = thread; args.path && i < args.path.shape[1]; i += kThreads) {
    scratch.token[i] = index_at(args.path, work.b, i);
  }
  if (work.rule == nullptr) return;
  for (int64_t i = thread; i < work.rule->num_bias; i += kThreads) {
    const int64_t place = place_of(args, work, work.rule->bias_ids[i]);
    if (place >= 0) scratch.bias[place] = work.rule->bias[i];
  }
  if (!work.rule->penalises()) return;
  if (args.history.tokens.dtype == DType::int64) {
    count_text<int64_t>(args, work, scratch, thread);
  } else {
    count_text<int32_t>(args, work, scratch, thread);
  }
}

// The node whose children a draft row is for, or whose own a target row is; kNotThere: nobody reads the row.
FORETOKEN_INLINE int32_t node_of(const PrepareArgs& args, const EditWork& work, const EditScratch& scratch,
                                 int64_t row) {
  if (!work.of_draft) return row <= work.request.drafts ? static_cast<int32_t>(row) : kNotThere;
  if (args.draft_row && !args.draft_by_node) return 0;                          // no path to look at
  if (row >= work.request.drafts || !scratch.has_child[row]) return kNotThere;  // the last node is a leaf
  if (args.draft_by_node) {
    const int64_t law_row = index_at(args.draft_row, work.b, row);
    if (law_row < 0 || law_row >= args.law_rows) return kNotThere;
  }
  return static_cast<int32_t>(row);
}

// One thread's work.
FORETOKEN_INLINE void climb_from(const PrepareArgs& args, const EditWork& work, EditScratch& scratch,
                                 int64_t row) {
  int32_t climbed = 0;
  int32_t node = node_of(args, work, scratch, row);
  for (; node > 0; node = scratch.parent[node]) scratch.climb[climbed++] = static_cast<int16_t>(node);
  for (int64_t i = args.path ? args.path.shape[1] - 1 : -1; i >= 0; --i) {
    if (scratch.token[i] >= 0) scratch.climb[climbed++] = static_cast<int16_t>(i);
  }
  scratch.climbed = node == kNotThere ? kNotThere : climbed;
}

// Tokens drafted on the way to a row count as generated.
FORETOKEN_INLINE void count_path(const PrepareArgs& args, const EditWork& work, EditScratch& scratch,
                                 int thread, uint32_t times) {
  for (int32_t i = thread; i < scratch.climbed; i += kThreads) {
    const int64_t place = place_of(args, work, scratch.token[scratch.climb[i]]);
    if (place >= 0) add_to(scratch.counts[place], times);
  }
}

FORETOKEN_INLINE const char* source_row(const PrepareArgs& args, const EditWork& work, int64_t row) {
  const TensorView& from = work.job->source;
  int64_t offset = 0;
  if (from.rank == 2) {  // flattened rows of a target, or the one row of a draw
    offset = (args.row_offsets ? work.request.first_row + row : work.b) * from.strides[0];
  } else {
    const int64_t law_row = work.of_draft && args.draft_by_node ? index_at(args.draft_row, work.b, row) : row;
    offset = work.b * from.strides[0] + law_row * from.strides[1];
  }
  return static_cast<const char*>(from.data) + offset * (from.dtype == DType::float32 ? 4 : 2);
}

// Whether the grammar allows each of four neighbours, in the low bits.
FORETOKEN_INLINE uint32_t allowed(const PrepareArgs& args, const EditWork& work, int64_t row, int64_t first) {
  const TensorView& mask = work.job->bitmask;
  if (!mask) return 0xFu;
  int64_t offset = first / 32 * mask.strides[mask.rank - 1];
  if (mask.rank == 2) {
    offset += (args.row_offsets ? work.request.first_row + row : work.b) * mask.strides[0];
  } else {
    offset += work.b * mask.strides[0] + row * mask.strides[1];
  }
  return static_cast<const uint32_t*>(mask.data)[offset] >> (first % 32);
}

FORETOKEN_INLINE void edit_slice(const PrepareArgs& args, const EditWork& work, const EditScratch& scratch,
                                 int64_t row, int thread) {
  const EditJob& job = *work.job;
  const bool mapped = args.vocab_map && (work.of_draft || args.mapped_target);
  const bool penalises = work.rule != nullptr && work.rule->penalises();
  const char* const from = source_row(args, work, row);
  float* const out = job.out + (work.b * job.rows + row) * job.size;
  for (int64_t at = int64_t{thread} * 4; at < work.count; at += kThreads * 4) {
    const int64_t element = work.first + at, left = work.count - at;
    const int64_t there = left < 4 ? left : 4;
    float x[4];
    load_four(from, job.source.dtype, element, there, x);
    if (work.rule != nullptr) {
      const Quad bias = words_at<Quad>(scratch.bias + at), counts = words_at<Quad>(scratch.counts + at);
      for (int i = 0; i < 4; ++i) {
        if (bias.word[i] != kNoBias) x[i] += float_of(bias.word[i]);
        if (penalises && counts.word[i] != 0) {
          x[i] = penalised(*work.rule, x[i], static_cast<int32_t>(counts.word[i] & ~kInText));
        }
      }
    }
    const uint32_t bits = allowed(args, work, row, element);
    for (int i = 0; i < 4; ++i) {
      if ((bits >> i & 1u) == 0) x[i] = kMasked;
      if (mapped && i < there) {
        const int64_t id = index_at(args.vocab_map, element + i);
        if (id < 0 || id >= args.vocab) x[i] = kMasked;
      }
    }
    store_four(out + element, there, x);
  }
}

// Bad words that the row's text would complete, and what may not be emitted yet.
FORETOKEN_INLINE void ban(const PrepareArgs& args, const EditWork& work, const EditScratch& scratch,
                          int64_t row, int thread) {
  const Constraints& rule = *work.rule;
  const int64_t base = work.request.base, length = base + scratch.climbed;
  float* const out = work.job->out + (work.b * work.job->rows + row) * work.job->size + work.first;
  const auto before = [&](int64_t back) {
    return back <= scratch.climbed ? scratch.token[scratch.climb[back - 1]]
                                   : index_at(args.history.tokens, work.request.slot, length - back);
  };
  for (int64_t word = thread; word < rule.num_bad_words; word += kThreads) {
    const int32_t first = word > 0 ? rule.bad_word_ends[word - 1] : 0, end = rule.bad_word_ends[word];
    const int64_t place = place_of(args, work, rule.bad_words[end - 1]);
    if (place >= 0 && ends_in_word(rule, first, end, length, before)) out[place] = kMasked;
  }
  if (work.generated + scratch.climbed >= rule.min_new_tokens) return;
  for (int64_t i = thread; i < rule.num_held; i += kThreads) {
    const int64_t place = place_of(args, work, rule.held_ids[i]);
    if (place >= 0) out[place] = kMasked;
  }
}

// A slice of some rows of one request. The branches are the same for all threads of the block.
FORETOKEN_INLINE void edit_rows(const PrepareArgs& args, const Share& share, bool of_draft,
                                EditScratch& scratch) {
  EditWork work;
  const bool any = find_work(args, share, of_draft, work);
  uint8_t* const made = of_draft && work.first == 0 ? args.made + work.b * work.job->rows : nullptr;
  if (!any) {
    all_threads([&](int thread) {
      for (int64_t row = work.first_row + thread; made != nullptr && row < work.last_row; row += kThreads) {
        made[row] = 0;
      }
    });
    return;
  }
  all_threads([&](int thread) { clear(scratch, thread); });
  all_threads([&](int thread) { gather(args, work, scratch, thread); });
  for (int64_t row = work.first_row; row < work.last_row; ++row) {
    all_threads([&](int thread) {
      if (thread == 0) climb_from(args, work, scratch, row);
    });
    const bool there = scratch.climbed != kNotThere, constrained = work.rule != nullptr;
    const bool penalises = there && constrained && work.rule->penalises();
    // Every phase ends in a barrier: the next row's climb overwrites what was read of this one's.
    all_threads([&](int thread) {
      if (penalises) count_path(args, work, scratch, thread, 1);
      if (made != nullptr && thread == 0) made[row] = there ? 1 : 0;
    });
    if (!there) continue;
    all_threads([&](int thread) { edit_slice(args, work, scratch, row, thread); });
    all_threads([&](int thread) {
      if (constrained) ban(args, work, scratch, row, thread);
      if (penalises) count_path(args, work, scratch, thread, ~0u);  // and not for the next row
    });
  }
}

}  // namespace foretoken::preparing
