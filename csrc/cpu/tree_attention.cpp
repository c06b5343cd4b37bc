#include "cpu/tree_attention.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "cpu/attention_kernels.hpp"
#include "cpu/attention_plan.hpp"
#include "cpu/parallel.hpp"
#include "cpu/views.hpp"

namespace foretoken::cpu {

namespace {

constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.69314718055994530942;
constexpr float kNothing = -std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t kGroupRows = 256;  // rows that share one read of the cache
constexpr int64_t kItemsPerThread = 4;
// What parallel.hpp calls an element: packing costs two for each element of a slot, six rows' products one.
constexpr int64_t kPackingCost = 2, kRowsPerElement = 6;

char* element(const TensorView& view, int64_t i, int64_t j, int64_t k) {
  return static_cast<char*>(view.data) + offset_of(view, i, j, k) * bytes_of(view.dtype);
}

float scale_of(const TensorView& scales, int64_t kv_head) {
  if (!scales) return 1.0f;
  return static_cast<const float*>(scales.data)[scales.shape[0] > 1 ? kv_head * scales.strides[0] : 0];
}

constexpr int64_t whole_lines(int64_t floats) { return (floats + 15) / 16 * 16; }

// Memory in whole cache lines that a thread keeps between its calls.
float* scratch(int64_t floats) {
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local int64_t size = 0;
  if (floats > size) {
    size = 0;
    memory.reset(static_cast<float*>(
        std::aligned_alloc(64, static_cast<size_t>(whole_lines(floats)) * sizeof(float))));
    if (!memory) throw std::bad_alloc();
    size = floats;
  }
  return memory.get();
}

// What one pass over the cache serves: some nodes of a row with the query heads of one kv head. `runs` items
// that follow one another have its chunks between them, each an aligned run of 2^level chunks.
struct Item {
  int64_t row, kv_head, first_node, nodes;
  int64_t begin, end;  // chunks
  int64_t runs, partial;
};

class Attention {
 public:
  explicit Attention(const TreeAttentionArgs& args)
      : args_(args),
        kernels_(attention_kernels(args.q.dtype, args.k_cache.dtype)),
        size_(args.q.shape[3]),
        padded_(padded_size(size_)),
        group_(args.q.shape[2] / args.k_cache.shape[2]),
        nodes_at_once_(std::max<int64_t>(kGroupRows / group_, 1)),
        rows_at_once_(std::min(nodes_at_once_, args.q.shape[1]) * group_) {}

  void run();

 private:
  struct Work;  // of one thread, on one item

  void plan();
  void split_row(int64_t row);
  void leave(int64_t row, int64_t first_node, float value, float lse) const;
  void attend(const Item& item, float* memory) const;
  float factor_of(int64_t kv_head) const;  // from products to scores
  void read_queries(const Item& item, float* rows, float* out) const;
  bool reduce(Work& work, int64_t level, int64_t index, const PartialRows& to) const;
  void attend_chunk(Work& work, int64_t chunk, const PartialRows& to) const;
  void join(int64_t first_item) const;
  const PartialRows* join(int64_t first_item, int64_t level, int64_t index) const;
  void write(const Item& item, const PartialRows& rows) const;

  int64_t partial_floats() const { return 2 * whole_lines(rows_at_once_) + rows_at_once_ * padded_; }
  PartialRows partial_at(float* memory) const {
    return {memory, memory + whole_lines(rows_at_once_), memory + 2 * whole_lines(rows_at_once_)};
  }
  int64_t work_floats() const;

  const TreeAttentionArgs& args_;
  const AttentionKernels& kernels_;
  const int64_t size_, padded_, group_, nodes_at_once_, rows_at_once_;
  std::vector<RowPlan> rows_;
  std::vector<Item> items_;
  std::vector<int64_t> split_;  // the first items of those with several runs
  std::vector<PartialRows> partials_;
  int64_t run_level_ = 0;  // chunks of a run, as a power of two
  int64_t top_level_ = 0;  // of the longest row
  int64_t slots_ = 0;      // of all items
};

struct Attention::Work {
  const Item& item;
  const RowPlan& row;
  float* queries;
  ChunkScratch chunk;
  uint32_t* seen;
  float* partials;  // one for each level of a run
  NodeSight nodes[kMaxNodes];
  const void* keys[kAttentionChunk];
  const void* values[kAttentionChunk];
};

int64_t Attention::work_floats() const {
  return query_floats(rows_at_once_, padded_) + 2 * kAttentionChunk * padded_ + kRowBlock * kScoreStride +
         std::min(nodes_at_once_, args_.q.shape[1]) * kAttentionChunk + (run_level_ + 1) * partial_floats();
}

int64_t first_chunk(const RowPlan& row) { return row.first / kAttentionChunk; }
int64_t last_chunk(const RowPlan& row) { return (row.end() - 1) / kAttentionChunk; }

void Attention::run() {
  plan();
  int64_t partials = 0;
  for (int64_t first : split_) partials += items_[static_cast<size_t>(first)].runs;
  const int64_t each = whole_lines(work_floats()), count = static_cast<int64_t>(items_.size());
  float* memory = scratch(max_threads() * each + partials * partial_floats());
  float* next = memory + max_threads() * each;
  for (Item& item : items_) {
    if (item.runs == 1) continue;
    item.partial = static_cast<int64_t>(partials_.size());
    partials_.push_back(partial_at(next));
    next += partial_floats();
  }
  const int64_t cost =
      count == 0 ? 0 : slots_ / count * size_ * (kPackingCost + rows_at_once_ / kRowsPerElement);
  parallel_for(count, cost,
               [&](int64_t i) { attend(items_[static_cast<size_t>(i)], memory + thread_number() * each); });
  parallel_for(static_cast<int64_t>(split_.size()), rows_at_once_ * padded_,
               [&](int64_t i) { join(split_[static_cast<size_t>(i)]); });
}

// ---------------------------------------------------------------- what there is to do

void Attention::plan() {
  int64_t chunks = 0;
  for (int64_t b = 0; b < args_.q.shape[0]; ++b) {
    rows_.push_back(plan_row(args_, b));
    const RowPlan& row = rows_.back();
    if (!row.usable) {
      leave(b, 0, kNan, kNan);
      continue;
    }
    leave(b, row.nodes, 0.0f, kNothing);
    if (row.nodes == 0) continue;
    chunks += (last_chunk(row) - first_chunk(row) + 1) * args_.k_cache.shape[2];
    while ((int64_t{1} << top_level_) <= last_chunk(row)) ++top_level_;
  }
  while ((kItemsPerThread * max_threads()) << (run_level_ + 1) <= chunks) ++run_level_;
  for (const RowPlan& row : rows_) {
    if (row.usable && row.nodes > 0) split_row(row.b);
  }
}

void Attention::split_row(int64_t b) {
  const RowPlan& row = rows_[static_cast<size_t>(b)];
  const int64_t begin = first_chunk(row), end = last_chunk(row) + 1;
  const int64_t first_run = begin >> run_level_, last_run = (end - 1) >> run_level_;
  for (int64_t kv_head = 0; kv_head < args_.k_cache.shape[2]; ++kv_head) {
    for (int64_t node = 0; node < row.nodes; node += nodes_at_once_) {
      if (last_run > first_run) split_.push_back(static_cast<int64_t>(items_.size()));
      for (int64_t run = first_run; run <= last_run; ++run) {
        items_.push_back({b, kv_head, node, std::min(nodes_at_once_, row.nodes - node),
                          std::max(begin, run << run_level_), std::min(end, (run + 1) << run_level_),
                          last_run - first_run + 1, 0});
        slots_ += std::min((run + 1) * (kAttentionChunk << run_level_), row.end()) -
                  std::max(run * (kAttentionChunk << run_level_), row.first);
      }
    }
  }
}

// Nodes that nothing is computed for.
void Attention::leave(int64_t b, int64_t first_node, float value, float lse) const {
  const std::vector<float> values(static_cast<size_t>(size_), value);
  for (int64_t r = first_node; r < args_.q.shape[1]; ++r) {
    for (int64_t head = 0; head < args_.q.shape[2]; ++head) {
      kernels_.narrow(values.data(), size_, 1.0f, args_.out.dtype, element(args_.out, b, r, head));
      if (args_.lse) write_float(args_.lse, lse, b, r, head);
    }
  }
}

// ---------------------------------------------------------------- one item

void Attention::attend(const Item& item, float* memory) const {
  Work work{item, rows_[static_cast<size_t>(item.row)], memory, {}, nullptr, nullptr, {}, {}, {}};
  work.chunk.keys = work.queries + query_floats(rows_at_once_, padded_);
  work.chunk.values = work.chunk.keys + kAttentionChunk * padded_;
  work.chunk.scores = work.chunk.values + kAttentionChunk * padded_;
  work.seen = reinterpret_cast<uint32_t*>(work.chunk.scores + kRowBlock * kScoreStride);
  work.partials =
      reinterpret_cast<float*>(work.seen) + std::min(nodes_at_once_, args_.q.shape[1]) * kAttentionChunk;
  read_queries(item, partial_at(work.partials).values, work.queries);
  read_nodes(args_, work.row, work.nodes);
  if (item.runs > 1) {
    reduce(work, run_level_, item.begin >> run_level_, partials_[static_cast<size_t>(item.partial)]);
    return;
  }
  const PartialRows rows = partial_at(work.partials + run_level_ * partial_floats());
  reduce(work, run_level_, item.begin >> run_level_, rows);
  write(item, rows);
}

float Attention::factor_of(int64_t kv_head) const {
  const float factor = args_.scale * scale_of(args_.k_scale, kv_head);
  return args_.softcap > 0.0f ? factor / args_.softcap : factor * static_cast<float>(kLog2E);
}

void Attention::read_queries(const Item& item, float* rows, float* out) const {
  const float factor = kernels_.scales_scores ? 1.0f : factor_of(item.kv_head);
  for (int64_t r = 0; r < item.nodes; ++r) {
    for (int64_t head = 0; head < group_; ++head) {
      kernels_.widen(element(args_.q, item.row, item.first_node + r, item.kv_head * group_ + head),
                     args_.q.dtype, size_, padded_, factor, rows + (r * group_ + head) * padded_);
    }
  }
  kernels_.arrange(item.nodes * group_, padded_, rows, out);
}

// The item's share of run `index` of 2^level chunks. False: it has none, and `to` is untouched.
bool Attention::reduce(Work& work, int64_t level, int64_t index, const PartialRows& to) const {
  if ((index << level) >= work.item.end || ((index + 1) << level) <= work.item.begin) return false;
  if (level == 0) {
    attend_chunk(work, index, to);
    return true;
  }
  if (!reduce(work, level - 1, 2 * index, to)) return reduce(work, level - 1, 2 * index + 1, to);
  const PartialRows right = partial_at(work.partials + (level - 1) * partial_floats());
  if (reduce(work, level - 1, 2 * index + 1, right)) {
    kernels_.merge(work.item.nodes * group_, padded_, to, right);
  }
  return true;
}

void Attention::attend_chunk(Work& work, int64_t chunk, const PartialRows& to) const {
  const int64_t begin = chunk * kAttentionChunk;
  ChunkTask task;
  task.queries = work.queries;
  task.rows = work.item.nodes * group_;
  task.size = size_;
  task.padded = padded_;
  task.dtype = args_.k_cache.dtype;
  task.first = std::max<int64_t>(work.row.first - begin, 0);
  task.columns = std::min(kAttentionChunk, work.row.end() - begin);
  task.keys = work.keys;
  task.values = work.values;
  task.softcap = args_.softcap * static_cast<float>(kLog2E);
  task.factor = factor_of(work.item.kv_head);
  task.group = group_;
  task.out = to;
  const auto place = [&](const TensorView& cache, const void** places) {
    locate(args_, cache, work.row, work.item.kv_head, begin + task.first, begin + task.columns,
           places + task.first);
  };
  place(args_.k_cache, work.keys);
  place(args_.v_cache, work.values);
  const int64_t tree = std::max(work.row.length - begin, task.first);
  // Windows end at different slots for nodes of different depths.
  const int64_t widest = work.row.first + kMaxNodes + 1;
  const bool window_edge = args_.window > 0 && begin < widest;
  if (tree < task.columns || window_edge) {
    task.seen = work.seen;
    task.mask_from = window_edge ? task.first : tree;
    for (int64_t r = 0; r < work.item.nodes; ++r) {
      write_seen(args_, work.row, work.nodes, work.item.first_node + r, begin, task.mask_from, task.columns,
                 work.seen + r * kAttentionChunk);
    }
  }
  kernels_.attend(task, work.chunk);
}

// ---------------------------------------------------------------- results

void Attention::join(int64_t first_item) const {
  const Item& item = items_[static_cast<size_t>(first_item)];
  write(item, *join(first_item, std::max(top_level_, run_level_), 0));
}

// The same tree over runs, of which each item has one. Null: none is there.
const PartialRows* Attention::join(int64_t first_item, int64_t level, int64_t index) const {
  const Item& first = items_[static_cast<size_t>(first_item)];
  const int64_t first_run = first.begin >> run_level_;
  if (level == run_level_) {
    const int64_t i = index - first_run;
    return i >= 0 && i < first.runs ? &partials_[static_cast<size_t>(first.partial + i)] : nullptr;
  }
  const PartialRows* left = join(first_item, level - 1, 2 * index);
  const PartialRows* right = join(first_item, level - 1, 2 * index + 1);
  if (left == nullptr || right == nullptr) return left != nullptr ? left : right;
  kernels_.merge(first.nodes * group_, padded_, *left, *right);
  return left;
}

void Attention::write(const Item& item, const PartialRows& rows) const {
  const float* values = rows.values;
  for (int64_t row = 0; row < item.nodes * group_; ++row, values += padded_) {
    const int64_t r = item.first_node + row / group_, head = item.kv_head * group_ + row % group_;
    const bool nothing = rows.sums[row] == 0.0f;
    double max = nothing ? -std::numeric_limits<double>::infinity() : static_cast<double>(rows.maxima[row]);
    double sum = static_cast<double>(rows.sums[row]), weight = 1.0;
    if (args_.sinks) {
      const double sink =
          static_cast<double>(static_cast<const float*>(args_.sinks.data)[head * args_.sinks.strides[0]]) *
          kLog2E;
      const double top = std::max(max, sink);
      weight = nothing ? 0.0 : std::exp2(max - top);
      sum = sum * weight + std::exp2(sink - top);
      max = top;
    }
    const double factor =
        sum == 0.0 ? 0.0 : weight * static_cast<double>(scale_of(args_.v_scale, item.kv_head)) / sum;
    kernels_.narrow(values, size_, static_cast<float>(factor), args_.out.dtype,
                    element(args_.out, item.row, r, head));
    if (!args_.lse) continue;
    const double lse = sum == 0.0 ? -std::numeric_limits<double>::infinity() : (max + std::log2(sum)) * kLn2;
    write_float(args_.lse, static_cast<float>(lse), item.row, r, head);
  }
}

}  // namespace

void tree_attention(const TreeAttentionArgs& args) {
  if (args.q.shape[0] == 0 || args.q.shape[1] == 0) return;
  Attention(args).run();
}

}  // namespace foretoken::cpu
