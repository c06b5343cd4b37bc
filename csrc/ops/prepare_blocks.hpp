// The blocks of a preparation, phase by phase: what all threads of a block do between two barriers. On the
// host one thread after another does the same, so that the proofs need no device.
#pragma once

#include "math/half.hpp"
#include "math/tree_index.hpp"
#include "ops/prepare.hpp"

namespace foretoken::preparing {

constexpr int kThreads = 512;
constexpr int64_t kSlice = 4096;        // neighbours in a row that one block edits
constexpr uint32_t kInText = 1u << 31;  // in prompt or output; below it: how often it was generated
constexpr uint32_t kNoBias = 1u << 31;  // the bits of -0.0f: adding it changes nothing
constexpr float kMasked = -__builtin_inff();
constexpr int32_t kNotThere = -1;

// phase(t) for every thread t of a block, then a barrier.
template <class Phase>
FORETOKEN_INLINE void all_threads(const Phase& phase) {
#if defined(__CUDA_ARCH__)
  phase(static_cast<int>(threadIdx.x));
  __syncthreads();
#else
  for (int thread = 0; thread < kThreads; ++thread) phase(thread);
#endif
}

FORETOKEN_INLINE void add_to(uint32_t& place, uint32_t value) {
#if defined(__CUDA_ARCH__)
  atomicAdd(&place, value);
#else
  place += value;
#endif
}

FORETOKEN_INLINE void or_into(uint32_t& place, uint32_t bits) {
#if defined(__CUDA_ARCH__)
  atomicOr(&place, bits);
#else
  place |= bits;
#endif
}

FORETOKEN_INLINE void raise_to(int32_t& place, int32_t value) {
#if defined(__CUDA_ARCH__)
  atomicMax(&place, value);
#else
  place = place < value ? value : place;
#endif
}

// Puts `value` in a place that holds `absent`; false if something was there already.
FORETOKEN_INLINE bool settle(float& place, float absent, float value) {
#if defined(__CUDA_ARCH__)
  auto* bits = reinterpret_cast<unsigned*>(&place);
  return atomicCAS(bits, bits_of(absent), bits_of(value)) == bits_of(absent);
#else
  const bool free = bits_of(place) == bits_of(absent);
  if (free) place = value;
  return free;
#endif
}

struct alignas(16) Quad {
  uint32_t word[4];
};

struct alignas(8) Pair {
  uint32_t word[2];
};

template <class Words>
FORETOKEN_INLINE Words words_at(const void* address) {
#if defined(__CUDA_ARCH__)
  return *static_cast<const Words*>(address);
#else
  Words words;
  std::memcpy(&words, address, sizeof words);
  return words;
#endif
}

FORETOKEN_INLINE bool aligned_to(const void* address, size_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

FORETOKEN_INLINE float element_at(const void* row, DType dtype, int64_t index) {
  if (dtype == DType::float32) return static_cast<const float*>(row)[index];
  const uint32_t bits = static_cast<const uint16_t*>(row)[index];
  return dtype == DType::bfloat16 ? float_of_bfloat(bits) : float_of_half(bits);
}

// Four neighbours, in one access where the address allows it; `count` of them are there.
FORETOKEN_INLINE void load_four(const void* row, DType dtype, int64_t first, int64_t count, float* x) {
  const char* const at = static_cast<const char*>(row) + first * (dtype == DType::float32 ? 4 : 2);
  if (count == 4 && dtype == DType::float32 && aligned_to(at, 16)) {
    const Quad quad = words_at<Quad>(at);
    for (int i = 0; i < 4; ++i) x[i] = float_of(quad.word[i]);
  } else if (count == 4 && dtype != DType::float32 && aligned_to(at, 8)) {
    const Pair pair = words_at<Pair>(at);
    for (int i = 0; i < 4; ++i) {
      const uint32_t bits = pair.word[i / 2] >> (i % 2 * 16) & 0xFFFFu;
      x[i] = dtype == DType::bfloat16 ? float_of_bfloat(bits) : float_of_half(bits);
    }
  } else {
    for (int i = 0; i < 4; ++i) x[i] = i < count ? element_at(row, dtype, first + i) : 0.0f;
  }
}

FORETOKEN_INLINE void store_four(float* to, int64_t count, const float* x) {
  if (count == 4 && aligned_to(to, 16)) {
    Quad quad;
    for (int i = 0; i < 4; ++i) quad.word[i] = bits_of(x[i]);
#if defined(__CUDA_ARCH__)
    *reinterpret_cast<Quad*>(to) = quad;
#else
    std::memcpy(to, &quad, sizeof quad);
#endif
  } else {
    for (int i = 0; i < 4 && i < count; ++i) to[i] = x[i];
  }
}

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

// ---- facts about requests, and rows that later blocks add to ----

struct Share {  // which block of its kind this is, of how many
  int64_t block, blocks;
};

FORETOKEN_INLINE void note_facts(const PrepareArgs& args, const Share& share) {
  all_threads([&](int thread) {
    const int64_t step = share.blocks * kThreads;
    for (int64_t b = share.block * kThreads + thread; b < args.batch; b += step) {
      if (args.history_unusable != nullptr) {
        Request request;
        const bool unusable =
            find_request(args, b, request) &&
            !(history_suits(args, args.judged[0], request) && history_suits(args, args.judged[1], request));
        args.history_unusable[b] = unusable ? 1 : 0;
      }
      for (int64_t row = 0; args.mapped != nullptr && row < args.draft_rows; ++row) {
        args.unsound[b * args.draft_rows + row] = 0;
      }
    }
  });
}

FORETOKEN_INLINE void fill_mapped(const PrepareArgs& args, const Share& share) {
  const int64_t elements = args.batch * args.draft_rows * args.vocab;
  const float absent = args.probs ? 0.0f : kMasked;
  const float four[4] = {absent, absent, absent, absent};
  all_threads([&](int thread) {
    for (int64_t at = (share.block * kThreads + thread) * 4; at < elements;
         at += share.blocks * kThreads * 4) {
      store_four(args.mapped + at, elements - at < 4 ? elements - at : 4, four);
    }
  });
}

// Columns of probabilities beyond the target's vocabulary are padding.
FORETOKEN_INLINE void check_padding(const PrepareArgs& args, const Share& share, uint32_t& found) {
  const int64_t b = share.block / args.draft_rows, row = share.block % args.draft_rows;
  const TensorView& probs = args.probs;
  const int64_t offset = b * probs.strides[0] + row * probs.strides[1];
  const char* const data =
      static_cast<const char*>(probs.data) + offset * (probs.dtype == DType::float32 ? 4 : 2);
  all_threads([&](int thread) {
    if (thread == 0) found = 0;
  });
  all_threads([&](int thread) {
    uint32_t mass = 0;
    for (int64_t at = args.vocab + thread; at < probs.shape[2]; at += kThreads) {
      mass |= element_at(data, probs.dtype, at) != 0.0f ? 1u : 0u;
    }
    if (mass != 0) or_into(found, 1);
  });
  all_threads([&](int thread) {
    if (thread == 0) args.unsound[share.block] = found != 0 ? 1 : 0;
  });
}

// ---- edited rows ----

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

// ---- vocabulary maps ----

FORETOKEN_INLINE void invert_map(const PrepareArgs& args, const Share& share) {
  all_threads([&](int thread) {
    for (int64_t element = share.block * kThreads + thread; element < args.vocab_map.shape[0];
         element += share.blocks * kThreads) {
      const int64_t id = index_at(args.vocab_map, element);
      if (id >= 0 && id < args.vocab) raise_to(args.inverse[id], static_cast<int32_t>(element));
    }
  });
}

// A slice of a draft row, put where the target's ids have it. After all edits.
FORETOKEN_INLINE void scatter(const PrepareArgs& args, const Share& share) {
  const int64_t size = args.vocab_map.shape[0], slices = (size + kSlice - 1) / kSlice;
  const int64_t place = share.block / slices, b = place / args.draft_rows;
  const int64_t first = share.block % slices * kSlice;
  const int64_t last = first + kSlice < size ? first + kSlice : size;
  const bool of_probs = static_cast<bool>(args.probs);
  const float absent = of_probs ? 0.0f : kMasked;
  const char* from = nullptr;
  if (of_probs) {
    Request request;
    if (!find_request(args, b, request) || !reads_draft_laws(args, request)) return;
    const int64_t offset = b * args.probs.strides[0] + place % args.draft_rows * args.probs.strides[1];
    from = static_cast<const char*>(args.probs.data) + offset * (args.probs.dtype == DType::float32 ? 4 : 2);
  } else {
    if (args.made[place] == 0) return;
    from = reinterpret_cast<const char*>(args.draft.out + place * size);
  }
  const DType dtype = of_probs ? args.probs.dtype : DType::float32;
  float* const to = args.mapped + place * args.vocab;
  all_threads([&](int thread) {
    for (int64_t element = first + thread; element < last; element += kThreads) {
      const float value = element_at(from, dtype, element);
      if (value == absent) continue;
      const int64_t id = index_at(args.vocab_map, element);
      const bool known = id >= 0 && id < args.vocab;
      // A logit without an id has been masked; a probability without one is mass that nobody drew from.
      if (known ? !settle(to[id], absent, value) : of_probs) args.unsound[place] = 1;
    }
  });
}

// ---- all of it ----

// Blocks of each kind of a pass, one kind behind the other.
struct Plan {
  int64_t facts = 0, fill = 0, padding = 0, target = 0, draft = 0;

  FORETOKEN_HD int64_t blocks() const { return facts + fill + padding + target + draft; }
};

// `least`: blocks that keep the processor busy; rows of a request are shared out to reach it. Results do not
// depend on it.
inline Plan plan_edits(PrepareArgs& args, int64_t least) {
  const auto blocks_of = [&](EditJob& job) {
    const int64_t slices = args.batch * ((job.size + kSlice - 1) / kSlice);
    if (slices == 0 || job.rows == 0) return int64_t{0};
    job.groups = (least + slices - 1) / slices;
    job.groups = job.groups < 1 ? 1 : job.groups > job.rows ? job.rows : job.groups;
    return slices * job.groups;
  };
  const auto blocks_for = [](int64_t items, int64_t each) { return (items + each - 1) / each; };
  Plan plan;
  if (args.history_unusable != nullptr || args.mapped != nullptr) {
    plan.facts = blocks_for(args.batch, kThreads);
  }
  if (args.mapped != nullptr) {
    plan.fill = blocks_for(args.batch * args.draft_rows * args.vocab, 4 * kSlice);
  }
  if (args.padding) plan.padding = args.batch * args.draft_rows;
  plan.target = blocks_of(args.target);
  plan.draft = blocks_of(args.draft);
  return plan;
}

inline int64_t scatter_blocks(const PrepareArgs& args) {
  if (args.mapped == nullptr) return 0;
  return args.batch * args.draft_rows * ((args.vocab_map.shape[0] + kSlice - 1) / kSlice);
}

inline int64_t inverse_blocks(const PrepareArgs& args) {
  return args.inverse == nullptr ? 0 : (args.vocab_map.shape[0] + kThreads - 1) / kThreads;
}

FORETOKEN_INLINE void edit_block(const PrepareArgs& args, const Plan& plan, int64_t block,
                                 EditScratch& scratch) {
  if (block < plan.facts) return note_facts(args, {block, plan.facts});
  block -= plan.facts;
  if (block < plan.fill) return fill_mapped(args, {block, plan.fill});
  block -= plan.fill;
  if (block < plan.padding) return check_padding(args, {block, plan.padding}, scratch.found);
  block -= plan.padding;
  const bool of_draft = block >= plan.target;
  edit_rows(args, {of_draft ? block - plan.target : block, 0}, of_draft, scratch);
}

}  // namespace foretoken::preparing
