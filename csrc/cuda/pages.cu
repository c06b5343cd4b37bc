#include "cuda/pages.hpp"

#include <algorithm>
#include <vector>

#include "cuda/errors.hpp"
#include "cuda/views.cuh"
#include "ops/sampling.hpp"

namespace foretoken::cuda {

namespace {

constexpr int kLanes = 32;
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kLanes;
constexpr int64_t kMostBlocksAcross = 65535;  // in the second dimension of a grid

// --- edits ---

struct EditLaunch {
  PageState state;
  int32_t count = 0;
  PageEdit edits[kMostPageEdits];  // those of a slot together
};
static_assert(sizeof(EditLaunch) <= 4096, "arguments of a kernel");

// By a whole warp. Other edits of the slot, before and behind it, are this warp's too.
__device__ void apply(const PageState& state, const PageEdit& edit, int lane) {
  if (edit.column >= 0 && edit.value == kNoPageFromHere) {
    for (int64_t column = int64_t{edit.column} + lane; column < state.block_table.shape[1];
         column += kLanes) {
      write_index(state.block_table, kNoPage, edit.slot, column);
    }
    return;
  }
  if (lane != 0) return;
  switch (edit.column) {
    case kEditLength: return write_index(state.lengths, edit.value, edit.slot);
    case kEditLengthFrom: return write_index(state.lengths, read_index(state.lengths, edit.value), edit.slot);
    case kEditCount: return write_index(state.counts, edit.value, edit.slot);
    case kEditRow: return write_index(state.row_slots, edit.value, edit.slot);
    default: return write_index(state.block_table, edit.value, edit.slot, edit.column);
  }
}

// A warp where a slot's edits begin applies them in their order.
__global__ void __launch_bounds__(kThreads) edit_kernel(const __grid_constant__ EditLaunch launch) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  if (first >= launch.count) return;  // the same for the whole warp, as all that follows
  const int32_t slot = launch.edits[first].slot;
  if (first > 0 && launch.edits[first - 1].slot == slot) return;
  for (int64_t i = first; i < launch.count && launch.edits[i].slot == slot; ++i) {
    apply(launch.state, launch.edits[i], lane);
    __syncwarp();
  }
}

// --- lengths ---

__global__ void __launch_bounds__(kThreads) keep_kernel(const __grid_constant__ KeepRowsArgs args) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (b >= args.record.shape[0]) return;
  const int64_t slot = args.by_row_slots ? read_index(args.state.row_slots, b) : b;
  const int32_t kept = rows_kept(args, b, slot);
  if (kept > 0) write_index(args.state.lengths, read_index(args.state.lengths, slot) + kept, slot);
  write_index(args.record, kept, b);
  write_index(args.status, kept < 0 ? kBadRow : 0, b);
}

// --- rows kept where they are ---

__global__ void __launch_bounds__(kThreads) apart_kernel(const __grid_constant__ KeepApartArgs args) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (b < args.apart.shape[0]) keep_apart_row(args, b);
}

__global__ void __launch_bounds__(kThreads) gather_kernel(const __grid_constant__ GatherApartArgs args) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (b < args.apart.shape[0]) gather_apart_row(args, b);
}

// --- copies ---

struct CopyLaunch {
  const CacheUnit* units = nullptr;
  int64_t num_units = 0, page_size = 0;
  PageCopy copies[kMostPageCopies];
};
static_assert(sizeof(CopyLaunch) <= 4096, "arguments of a kernel");

template <class Word>
__device__ void copy_column(const char* from, char* to, int64_t row_stride, int64_t rows) {
#pragma unroll 4
  for (int64_t row = 0; row < rows; ++row) {
    __stcg(reinterpret_cast<Word*>(to + row * row_stride),
           __ldcg(reinterpret_cast<const Word*>(from + row * row_stride)));
  }
}

// A thread copies its column of every row of the page; source and target are different pages.
__device__ void copy_unit(const CacheUnit& unit, PageCopy copy, int64_t page_size, int lane) {
  const int32_t at = unit.first + lane;
  char* const column =
      unit.data + at / unit.per_part * unit.part_stride + int64_t{at % unit.per_part} * unit.width;
  const char* const from = column + copy.source * unit.page_stride;
  char* const to = column + copy.target * unit.page_stride;
  switch (unit.width) {
    case 16: return copy_column<uint4>(from, to, unit.row_stride, page_size);
    case 8: return copy_column<uint2>(from, to, unit.row_stride, page_size);
    case 4: return copy_column<unsigned>(from, to, unit.row_stride, page_size);
    case 2: return copy_column<unsigned short>(from, to, unit.row_stride, page_size);
    default: return copy_column<unsigned char>(from, to, unit.row_stride, page_size);
  }
}

// A warp for a unit of copy blockIdx.x.
__global__ void __launch_bounds__(kThreads) copy_kernel(const __grid_constant__ CopyLaunch launch) {
  const PageCopy copy = launch.copies[blockIdx.x];
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  int64_t index = static_cast<int64_t>(blockIdx.y) * kWarps + static_cast<int>(threadIdx.x) / kLanes;
  for (; index < launch.num_units; index += int64_t{gridDim.y} * kWarps) {
    const CacheUnit unit = launch.units[index];
    if (lane < unit.count) copy_unit(unit, copy, launch.page_size, lane);
  }
}

cudaStream_t handle_of(Stream stream) { return static_cast<cudaStream_t>(stream.handle); }

}  // namespace

void edit_pages(const EditPagesArgs& args, Stream stream) {
  EditLaunch launch;
  launch.state = args.state;
  for (int64_t done = 0; done < args.num_edits; done += kMostPageEdits) {
    const int64_t count = std::min(kMostPageEdits, args.num_edits - done);
    std::copy_n(args.edits + done, count, launch.edits);
    std::stable_sort(launch.edits, launch.edits + count,
                     [](const PageEdit& one, const PageEdit& other) { return one.slot < other.slot; });
    launch.count = static_cast<int32_t>(count);
    const auto blocks = static_cast<unsigned>((count + kWarps - 1) / kWarps);
    edit_kernel<<<blocks, kThreads, 0, handle_of(stream)>>>(launch);
    throw_if_failed(cudaGetLastError(), "reserve");
  }
}

void keep_rows(const KeepRowsArgs& args, Stream stream) {
  const int64_t rows = args.record.shape[0];
  if (rows == 0) return;
  const auto blocks = static_cast<unsigned>((rows + kThreads - 1) / kThreads);
  keep_kernel<<<blocks, kThreads, 0, handle_of(stream)>>>(args);
  throw_if_failed(cudaGetLastError(), "commit");
}

void keep_apart(const KeepApartArgs& args, Stream stream) {
  const int64_t rows = args.apart.shape[0];
  if (rows == 0) return;
  const auto blocks = static_cast<unsigned>((rows + kThreads - 1) / kThreads);
  apart_kernel<<<blocks, kThreads, 0, handle_of(stream)>>>(args);
  throw_if_failed(cudaGetLastError(), "commit");
}

void gather_apart(const GatherApartArgs& args, Stream stream) {
  const int64_t rows = args.apart.shape[0];
  if (rows == 0) return;
  const auto blocks = static_cast<unsigned>((rows + kThreads - 1) / kThreads);
  gather_kernel<<<blocks, kThreads, 0, handle_of(stream)>>>(args);
  throw_if_failed(cudaGetLastError(), "reserve");
}

void copy_pages(const CopyPagesArgs& args, Stream stream) {
  CopyLaunch launch;
  launch.units = args.units;
  launch.num_units = args.num_units;
  launch.page_size = args.page_size;
  const int64_t across = std::min((args.num_units + kWarps - 1) / kWarps, kMostBlocksAcross);
  for (int64_t done = 0; done < args.num_copies; done += kMostPageCopies) {
    const int64_t count = std::min(kMostPageCopies, args.num_copies - done);
    std::copy_n(args.copies + done, count, launch.copies);
    const dim3 grid(static_cast<unsigned>(count), static_cast<unsigned>(across));
    copy_kernel<<<grid, kThreads, 0, handle_of(stream)>>>(launch);
    throw_if_failed(cudaGetLastError(), "reserve");
  }
}

}  // namespace foretoken::cuda
