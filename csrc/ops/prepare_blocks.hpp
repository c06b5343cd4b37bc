// All blocks of a preparation: facts about requests, edited rows, and rows in the order of the target's ids.
#pragma once

#include "ops/prepare_edits.hpp"

namespace foretoken::preparing {

// Facts about requests, and flags that later blocks raise.
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
