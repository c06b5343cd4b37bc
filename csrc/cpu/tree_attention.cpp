#include "cpu/tree_attention.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/parallel.hpp"
#include "cpu/views.hpp"
#include "math/float8.hpp"
#include "math/half.hpp"

namespace foretoken::cpu {

namespace {

constexpr float kNothing = -std::numeric_limits<float>::infinity();

float read_real(const TensorView& view, int64_t offset) {
  switch (view.dtype) {
    case DType::bfloat16: return float_of_bfloat(static_cast<const uint16_t*>(view.data)[offset]);
    case DType::float16: return float_of_half(static_cast<const uint16_t*>(view.data)[offset]);
    case DType::float8_e4m3: return float_of_e4m3(static_cast<const uint8_t*>(view.data)[offset]);
    case DType::float8_e5m2: return float_of_e5m2(static_cast<const uint8_t*>(view.data)[offset]);
    default: return static_cast<const float*>(view.data)[offset];
  }
}

uint16_t bfloat_of(float value) {
  const uint32_t bits = bits_of(value);
  if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

uint16_t half_of(float value) {
  const uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
  if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);
  if (magnitude < 0x38800000u) {  // a subnormal half: adding 0.5 rounds to multiples of 2^-24
    return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u));
  }
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13));
}

void write_real(const TensorView& view, int64_t offset, float value) {
  switch (view.dtype) {
    case DType::bfloat16: static_cast<uint16_t*>(view.data)[offset] = bfloat_of(value); break;
    case DType::float16: static_cast<uint16_t*>(view.data)[offset] = half_of(value); break;
    default: static_cast<float*>(view.data)[offset] = value;
  }
}

int64_t offset4(const TensorView& view, int64_t i, int64_t j, int64_t k) {
  return i * view.strides[0] + j * view.strides[1] + k * view.strides[2];
}

float scale_of(const TensorView& scales, int64_t kv_head) {
  if (!scales) return 1.0f;
  return static_cast<const float*>(scales.data)[scales.shape[0] > 1 ? kv_head * scales.strides[0] : 0];
}

// What one node and head have of a run of chunks.
struct Partial {
  float max = kNothing;
  float sum = 0.0f;
  float values[kMaxHeadSize] = {};
};

void merge_into(Partial& left, const Partial& right, int64_t size) {
  if (right.max == kNothing) return;
  if (left.max == kNothing) {
    left = right;
    return;
  }
  const float max = std::max(left.max, right.max);
  const float left_weight = std::exp(left.max - max), right_weight = std::exp(right.max - max);
  left.max = max;
  left.sum = left.sum * left_weight + right.sum * right_weight;
  for (int64_t d = 0; d < size; ++d) {
    left.values[d] = left.values[d] * left_weight + right.values[d] * right_weight;
  }
}

// The nodes of a row and what they see.
struct RowPlan {
  int64_t b, length, nodes;

  int64_t end() const { return length + nodes; }
};

struct Node {
  uint64_t words[kMaxNodes / 64] = {};
  int64_t depth = -1;
};

Node node_of(const TreeAttentionArgs& args, const RowPlan& row, int64_t r) {
  Node node;
  for (int64_t c = 0; c < row.nodes; c += 64) {
    const int64_t word = c / 64;
    const uint64_t there = row.nodes - c >= 64 ? ~uint64_t{0} : (uint64_t{1} << (row.nodes - c)) - 1;
    uint64_t bits = 0;
    if (args.ancestors) {
      bits = static_cast<uint64_t>(
          static_cast<const int64_t*>(args.ancestors.data)[offset_of(args.ancestors, row.b, r, word)]);
    } else if (r >= c) {
      bits = r - c >= 63 ? ~uint64_t{0} : (uint64_t{2} << (r - c)) - 1;
    }
    node.words[word] = bits & there;
    node.depth += __builtin_popcountll(node.words[word]);
  }
  return node;
}

bool plan_row(const TreeAttentionArgs& args, int64_t b, RowPlan& row) {
  const TensorView& cache = args.k_cache;
  row.b = b;
  row.length = read_index(args.lengths, b);
  row.nodes = args.num_nodes ? read_index(args.num_nodes, b) : args.q.shape[1];
  const int64_t slots = args.block_table ? args.block_table.shape[1] * cache.shape[1] : cache.shape[1];
  if (row.nodes < 0 || row.nodes > args.q.shape[1]) return false;
  return row.length >= 0 && row.length <= slots - row.nodes;
}

// Where a slot lies: a row or page of the cache, and a slot in it. False: on no page.
bool locate(const TreeAttentionArgs& args, const RowPlan& row, int64_t slot, int64_t& page, int64_t& within) {
  page = row.b;
  within = slot;
  if (!args.block_table) return true;
  const int64_t size = args.k_cache.shape[1];
  page = read_index(args.block_table, row.b, slot / size);
  within = slot % size;
  return page >= 0 && page < args.k_cache.shape[0];
}

bool sees(const TreeAttentionArgs& args, const RowPlan& row, const Node* nodes, int64_t r, int64_t slot) {
  const int64_t depth = nodes[r].depth;
  if (slot < row.length) return args.window == 0 || slot > row.length + depth - args.window;
  const int64_t c = slot - row.length;
  if (((nodes[r].words[c / 64] >> (c % 64)) & 1u) == 0) return false;
  return args.window == 0 || nodes[c].depth > depth - args.window;
}

void add_chunk(const TreeAttentionArgs& args, const RowPlan& row, const Node* nodes, int64_t r, int64_t head,
               int64_t chunk, Partial& partial, bool& usable) {
  const int64_t kv_head = head / (args.q.shape[2] / args.k_cache.shape[2]), size = args.q.shape[3];
  const float scale = args.scale * scale_of(args.k_scale, kv_head);
  const int64_t begin = chunk * kAttentionChunk, end = std::min(begin + kAttentionChunk, row.end());
  const int64_t query = offset4(args.q, row.b, r, head);
  float scores[kAttentionChunk];
  for (int64_t slot = begin; slot < end; ++slot) {
    float& score = scores[slot - begin] = kNothing;
    int64_t page = 0, within = 0;
    if (!sees(args, row, nodes, r, slot)) continue;
    if (!locate(args, row, slot, page, within)) {
      usable = false;
      return;
    }
    const int64_t key = offset4(args.k_cache, page, within, kv_head);
    float product = 0.0f;
    for (int64_t d = 0; d < size; ++d)
      product += read_real(args.q, query + d) * read_real(args.k_cache, key + d);
    score = product * scale;
    if (args.softcap > 0.0f) score = args.softcap * std::tanh(score / args.softcap);
    if (score > partial.max || score != score) partial.max = score;  // NaN stays
  }
  if (partial.max == kNothing) return;
  for (int64_t slot = begin; slot < end; ++slot) {
    int64_t page = 0, within = 0;
    if (!sees(args, row, nodes, r, slot) || !locate(args, row, slot, page, within)) continue;
    const float weight = std::exp(scores[slot - begin] - partial.max);
    const int64_t value = offset4(args.v_cache, page, within, kv_head);
    partial.sum += weight;
    for (int64_t d = 0; d < size; ++d) partial.values[d] += weight * read_real(args.v_cache, value + d);
  }
}

void write_result(const TreeAttentionArgs& args, int64_t b, int64_t r, int64_t head, const Partial& partial,
                  bool usable, bool there = true) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  const int64_t kv_head = head / (args.q.shape[2] / args.k_cache.shape[2]);
  float max = partial.max, sum = partial.sum, weight = 1.0f;
  if (args.sinks && usable && there) {
    const float sink = static_cast<const float*>(args.sinks.data)[head * args.sinks.strides[0]];
    const float top = std::max(max, sink);
    weight = max == kNothing ? 0.0f : std::exp(max - top);
    sum = sum * weight + std::exp(sink - top);
    max = top;
  }
  const float factor = sum == 0.0f ? 0.0f : weight * scale_of(args.v_scale, kv_head) / sum;
  const int64_t offset = offset4(args.out, b, r, head);
  for (int64_t d = 0; d < args.q.shape[3]; ++d) {
    write_real(args.out, offset + d, usable ? partial.values[d] * factor : kNan);
  }
  if (args.lse) {
    write_float(args.lse, !usable ? kNan : sum == 0.0f ? kNothing : max + std::log(sum), b, r, head);
  }
}

void attend(const TreeAttentionArgs& args, const RowPlan& row, const Node* nodes, int64_t r, int64_t head) {
  const int64_t chunks = (row.end() + kAttentionChunk - 1) / kAttentionChunk, size = args.q.shape[3];
  Partial runs[56];  // of 2^k chunks each, longest first: what is left of a binary counter
  int levels[56];
  int depth = 0;
  bool usable = true;
  for (int64_t chunk = 0; chunk < chunks && usable; ++chunk) {
    runs[depth] = Partial{};
    levels[depth] = 0;
    add_chunk(args, row, nodes, r, head, chunk, runs[depth++], usable);
    for (; depth > 1 && levels[depth - 2] == levels[depth - 1]; --depth) {
      merge_into(runs[depth - 2], runs[depth - 1], size);
      ++levels[depth - 2];
    }
  }
  for (; depth > 1; --depth) merge_into(runs[depth - 2], runs[depth - 1], size);
  write_result(args, row.b, r, head, depth > 0 ? runs[0] : Partial{}, usable);
}

}  // namespace

void tree_attention(const TreeAttentionArgs& args) {
  const int64_t most = args.q.shape[1], heads = args.q.shape[2];
  parallel_for(args.q.shape[0] * heads, most * args.k_cache.shape[1] * args.q.shape[3], [&](int64_t item) {
    const int64_t b = item / heads, head = item % heads;
    RowPlan row;
    Node nodes[kMaxNodes];
    if (!plan_row(args, b, row)) {
      for (int64_t r = 0; r < most; ++r) write_result(args, b, r, head, Partial{}, false);
      return;
    }
    for (int64_t r = 0; r < row.nodes; ++r) nodes[r] = node_of(args, row, r);
    for (int64_t r = 0; r < row.nodes; ++r) attend(args, row, nodes, r, head);
    for (int64_t r = row.nodes; r < most; ++r) write_result(args, b, r, head, Partial{}, true, false);
  });
}

void merge(const MergeArgs& args) {
  const int64_t nodes = args.out.shape[1], heads = args.out.shape[2], size = args.out.shape[3];
  parallel_for(args.out.shape[0] * nodes, heads * size, [&](int64_t item) {
    const int64_t b = item / nodes, r = item % nodes;
    for (int64_t head = 0; head < heads; ++head) {
      const float lse_a = static_cast<const float*>(args.lse_a.data)[offset_of(args.lse_a, b, r, head)];
      const float lse_b = static_cast<const float*>(args.lse_b.data)[offset_of(args.lse_b, b, r, head)];
      const float max = lse_a > lse_b || lse_a != lse_a ? lse_a : lse_b;  // NaN wins
      const float a = max == kNothing ? 0.0f : std::exp(lse_a - max);
      const float other = max == kNothing ? 0.0f : std::exp(lse_b - max);
      const float sum = a + other;
      const int64_t from_a = offset4(args.out_a, b, r, head), from_b = offset4(args.out_b, b, r, head);
      const int64_t to = offset4(args.out, b, r, head);
      for (int64_t d = 0; d < size; ++d) {
        const float left = a == 0.0f ? 0.0f : read_real(args.out_a, from_a + d) * a;
        const float right = other == 0.0f ? 0.0f : read_real(args.out_b, from_b + d) * other;
        write_real(args.out, to + d, sum == 0.0f ? 0.0f : (left + right) / sum);
      }
      write_float(args.lse, sum == 0.0f ? kNothing : max + std::log(sum), b, r, head);
    }
  });
}

}  // namespace foretoken::cpu
