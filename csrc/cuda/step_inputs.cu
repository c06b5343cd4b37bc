#include "cuda/step_inputs.hpp"

#include "cuda/overlap.cuh"
#include "cuda/views.cuh"

namespace foretoken::cuda {

namespace {

constexpr int kLanes = 32;
constexpr int kRowsPerBlock = 4;

// One warp a row; rows of a batch never share a slot, but those that are padded.
__global__ void __launch_bounds__(kLanes* kRowsPerBlock)
    step_inputs_kernel(const __grid_constant__ StepInputsArgs args) {
  take_turn();
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kLanes;
  if (b >= args.rows) return;  // the same for the whole warp
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const step_inputs::Row row = step_inputs::row_of(args, b);
  step_inputs::write_target(args, b, row, lane, kLanes);
  if (args.reach == nullptr) return;
  const int64_t held = step_inputs::held_of(args, row);
  __syncwarp();  // every lane has read what lane 0 is going to write
  step_inputs::write_draft(args, b, row, held, lane, kLanes);
}

constexpr int kSearchThreads = 512;
constexpr unsigned kWholeWarp = 0xffffffffu;

// One block a row.
__global__ void __launch_bounds__(kSearchThreads)
    draft_ngrams_kernel(const __grid_constant__ NgramDraftsArgs args) {
  take_turn();
  __shared__ int64_t of_warps[kSearchThreads / kLanes];
  const int64_t b = blockIdx.x;
  const ngram_drafts::Row row = ngram_drafts::row_of(args, b);
  int64_t best = -1;
  for (int64_t place = threadIdx.x; place < row.last; place += kSearchThreads) {
    best = step_inputs::at_least(best, ngram_drafts::rank_of(args, row, place));
  }
  for (int reach = kLanes / 2; reach > 0; reach /= 2) {
    best = step_inputs::at_least(best, __shfl_xor_sync(kWholeWarp, best, reach));
  }
  if (threadIdx.x % kLanes == 0) of_warps[threadIdx.x / kLanes] = best;
  __syncthreads();
  for (const int64_t of_warp : of_warps) best = step_inputs::at_least(best, of_warp);
  ngram_drafts::write_row(args, b, row, best, threadIdx.x, kSearchThreads);
}

constexpr int kCopyThreads = 256;
constexpr int kPiecesPerThread = 4;

// A row of `row_bytes` in pieces; blocks of a row lie in x, rows in y.
template <class Piece>
__global__ void __launch_bounds__(kCopyThreads)
    last_logits_kernel(const __grid_constant__ LastLogitsArgs args, int64_t row_bytes) {
  take_turn();
  const int64_t bytes = args.out.dtype == DType::float32 ? 4 : 2, columns = args.logits.shape[1];
  for (int64_t b = blockIdx.y; b < args.out.shape[0]; b += gridDim.y) {
    const int64_t column = last_column(args.used ? read_index(args.used, b) : columns, columns);
    const auto* const from = reinterpret_cast<const Piece*>(static_cast<const char*>(args.logits.data) +
                                                            offset_of(args.logits, b, column) * bytes);
    auto* const to =
        reinterpret_cast<Piece*>(static_cast<char*>(args.out.data) + offset_of(args.out, b) * bytes);
    const int64_t pieces = row_bytes / static_cast<int64_t>(sizeof(Piece));
    const int64_t first = static_cast<int64_t>(blockIdx.x) * (kCopyThreads * kPiecesPerThread) + threadIdx.x;
    Piece held[kPiecesPerThread];
#pragma unroll
    for (int i = 0; i < kPiecesPerThread; ++i) {
      if (first + i * kCopyThreads < pieces) held[i] = from[first + i * kCopyThreads];
    }
#pragma unroll
    for (int i = 0; i < kPiecesPerThread; ++i) {
      if (first + i * kCopyThreads < pieces) to[first + i * kCopyThreads] = held[i];
    }
  }
}

bool aligned_to(const LastLogitsArgs& args, int64_t row_bytes, int64_t size) {
  const int64_t bytes = bytes_of(args.out.dtype);
  const auto start = [](const TensorView& view) {
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(view.data));
  };
  return (start(args.logits) | start(args.out) | row_bytes | args.logits.strides[0] * bytes |
          args.logits.strides[1] * bytes | args.out.strides[0] * bytes) %
             size ==
         0;
}

template <class Piece>
void copy_rows(const LastLogitsArgs& args, int64_t row_bytes, Device device, Stream stream) {
  constexpr int64_t kMostRowsOfGrid = 65535;
  constexpr int64_t kBlockBytes =
      int64_t{kCopyThreads} * kPiecesPerThread * static_cast<int64_t>(sizeof(Piece));
  const int64_t rows = args.out.shape[0];
  const dim3 blocks(static_cast<unsigned>((row_bytes + kBlockBytes - 1) / kBlockBytes),
                    static_cast<unsigned>(rows < kMostRowsOfGrid ? rows : kMostRowsOfGrid));
  launch_in_turn<last_logits_kernel<Piece>>(blocks, kCopyThreads, device, stream, args, row_bytes);
}

}  // namespace

void write_step_inputs(const StepInputsArgs& args, Device device, Stream stream) {
  if (args.rows == 0) return;
  const auto blocks = static_cast<unsigned>((args.rows + kRowsPerBlock - 1) / kRowsPerBlock);
  launch_in_turn<step_inputs_kernel>(blocks, kLanes * kRowsPerBlock, device, stream, args);
}

void draft_ngrams(const NgramDraftsArgs& args, Device device, Stream stream) {
  if (args.rows == 0) return;
  launch_in_turn<draft_ngrams_kernel>(static_cast<unsigned>(args.rows), kSearchThreads, device, stream, args);
}

void last_logits(const LastLogitsArgs& args, Device device, Stream stream) {
  const int64_t row_bytes = args.out.shape[1] * bytes_of(args.out.dtype);
  if (args.out.shape[0] == 0 || row_bytes == 0) return;
  if (aligned_to(args, row_bytes, sizeof(uint4))) return copy_rows<uint4>(args, row_bytes, device, stream);
  if (aligned_to(args, row_bytes, sizeof(uint32_t)))
    return copy_rows<uint32_t>(args, row_bytes, device, stream);
  copy_rows<uint16_t>(args, row_bytes, device, stream);
}

}  // namespace foretoken::cuda
