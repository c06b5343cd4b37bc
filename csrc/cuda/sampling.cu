#include "cuda/sampling.hpp"

#include <algorithm>

#include "cuda/errors.hpp"
#include "cuda/launch.hpp"
#include "cuda/row_law.cuh"
#include "cuda/views.cuh"

namespace foretoken::cuda {

namespace {

struct Drawn {
  int64_t token = -1;
  float logprob = -__builtin_inff();
  int32_t status = kBadRow;
};

// As cpu/rows.cpp has it: the exponent is known exactly, so nothing is lost far below the top.
__device__ float log_probability(const RowLaw& law, float element) {
  if (!(element >= law.cut)) return -__builtin_inff();
  const double exponent =
      (static_cast<double>(element) - static_cast<double>(law.max)) * static_cast<double>(law.scale) * kLn2;
  return static_cast<float>(exponent - log_positive(static_cast<double>(law.mass) / kMassUnit));
}

__device__ void write_row(const SampleArgs& args, int64_t b, const RowLaw& law, const Drawn& drawn) {
  write_index(args.tokens, drawn.token, b);
  if (args.logprobs) static_cast<float*>(args.logprobs.data)[b * args.logprobs.strides[0]] = drawn.logprob;
  if (args.status) write_index(args.status, drawn.status, b);
  if (args.records) {
    write_record(law, static_cast<int64_t*>(args.records.data) + b * args.records.strides[0],
                 args.records.strides[1]);
  }
}

// One cluster a row.
template <DType kType>
__global__ void __launch_bounds__(kThreads) sample_kernel(const __grid_constant__ SampleArgs args) {
  __shared__ RowScratch scratch;
  const int64_t b = blockIdx.x / cluster_size();
  const bool writer = cluster_rank() == 0 && threadIdx.x == 0;
  const int64_t slot = args.slots ? read_index(args.slots, b) : b;
  Drawn drawn;
  RowLaw law;
  if (slot < 0 || slot >= args.sampling.size) {  // the same for the whole cluster
    law.usable = false;
    if (writer) write_row(args, b, law, drawn);
    return;
  }
  constexpr int kBytes = kType == DType::float32 ? 4 : 2;
  const char* data = static_cast<const char*>(args.logits.data) + b * args.logits.strides[0] * kBytes;
  ClusterRow<kType> row({data, args.logits.shape[1]}, scratch);
  law = row.law({args.sampling.temperature[slot], args.sampling.top_k[slot], args.sampling.top_p[slot],
                 args.sampling.min_p[slot]});
  if (!law.usable) {
    drawn = {law.top, -__builtin_inff(), kLawLost};
  } else if (law.kind == LawKind::point) {
    drawn = {law.top, 0.0f, 0};
  } else {
    const uint64_t bits =
        random_bits(args.sampling.seed[slot], static_cast<uint64_t>(read_index(args.base, b)), args.purpose,
                    static_cast<uint32_t>(args.step));
    drawn.token = row.draw(law, bits);
    drawn.status = 0;
    if (writer) drawn.logprob = log_probability(law, row.at(drawn.token));
  }
  if (writer) write_row(args, b, law, drawn);
}

}  // namespace

void sample(const SampleArgs& args, Device device, Stream stream) {
  const int64_t rows = args.logits.shape[0];
  if (rows == 0) return;
  const int64_t tiles = (args.logits.shape[1] + kTile - 1) / kTile;
  const int cluster = cluster_for(device, rows, tiles);
  switch (args.logits.dtype) {
    case DType::float32: launch(sample_kernel<DType::float32>, rows, cluster, stream, args); break;
    case DType::bfloat16: launch(sample_kernel<DType::bfloat16>, rows, cluster, stream, args); break;
    default: launch(sample_kernel<DType::float16>, rows, cluster, stream, args); break;
  }
}

}  // namespace foretoken::cuda
