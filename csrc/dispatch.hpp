// The one backend switch, and the only place that asks whether CUDA code was compiled in.
#pragma once

#include <stdexcept>
#include <string>

#include <memory>
#include <vector>

#include "cpu/cache.hpp"
#include "cpu/commit.hpp"
#include "cpu/draft_tree.hpp"
#include "cpu/pages.hpp"
#include "cpu/prepare.hpp"
#include "cpu/sampling.hpp"
#include "cpu/state_ring.hpp"
#include "cpu/step_inputs.hpp"
#include "cpu/tile_stats.hpp"
#include "cpu/tree.hpp"
#include "cpu/tree_attention.hpp"
#include "cpu/verify.hpp"
#include "ops/cache.hpp"
#include "ops/commit.hpp"
#include "ops/device.hpp"
#include "ops/draft_tree.hpp"
#include "ops/loop_graph.hpp"
#include "ops/pages.hpp"
#include "ops/sampling.hpp"
#include "ops/selfcheck.hpp"
#include "ops/state_ring.hpp"
#include "ops/step_inputs.hpp"
#include "ops/tile_stats.hpp"
#include "ops/tree.hpp"
#include "ops/tree_attention.hpp"
#include "ops/verify.hpp"
#ifdef FORETOKEN_HAS_CUDA
#include "cuda/cache.hpp"
#include "cuda/commit.hpp"
#include "cuda/draft_tree.hpp"
#include "cuda/loop_graph.hpp"
#include "cuda/on_device.hpp"
#include "cuda/pages.hpp"
#include "cuda/prepare.hpp"
#include "cuda/sampling.hpp"
#include "cuda/sampling_mirror.hpp"
#include "cuda/state_ring.hpp"
#include "cuda/step_inputs.hpp"
#include "cuda/tile_stats.hpp"
#include "cuda/tree.hpp"
#include "cuda/tree_attention.hpp"
#include "cuda/verify.hpp"
#endif

namespace foretoken {

#ifdef FORETOKEN_HAS_CUDA
constexpr bool kBuiltWithCuda = true;
#else
constexpr bool kBuiltWithCuda = false;
#endif

enum class Backend : uint8_t { cpu, cuda };

// Why CUDA tensors cannot be served, as a clause that follows the argument's name. Null: they can.
constexpr const char* why_no_cuda() {
  return kBuiltWithCuda
             ? nullptr
             : "this build of foretoken is CPU only (`foretoken info` says why); move the tensor to "
               "the CPU, or build with FORETOKEN_CUDA=ON";
}

inline Backend backend_for(Device device) {
  if (device.type == DeviceType::cpu) return Backend::cpu;
  if (!kBuiltWithCuda) throw std::invalid_argument(std::string("CUDA tensor: ") + why_no_cuda());
  return Backend::cuda;
}

namespace dispatch {

inline CudaReport cuda_report() {
#ifdef FORETOKEN_HAS_CUDA
  return cuda::report();
#else
  return {};
#endif
}

// Whether what is launched on the stream becomes part of a graph, or must not be launched for another
// capture.
inline bool is_capturing([[maybe_unused]] Device device, [[maybe_unused]] Stream stream) {
#ifdef FORETOKEN_HAS_CUDA
  if (device.type == DeviceType::cuda) return cuda::is_capturing(device, stream);
#endif
  return false;
}

// The device's results are filled in; false in a build without CUDA code.
inline bool cuda_self_check([[maybe_unused]] const SelfCheckInput* inputs,
                            [[maybe_unused]] SelfCheckOutput* outputs, [[maybe_unused]] int64_t count) {
#ifdef FORETOKEN_HAS_CUDA
  cuda::self_check(inputs, outputs, count);
#endif
  return kBuiltWithCuda;
}

// The copies of one sampling table on the devices that have asked for it.
class SamplingMirrors {
 public:
  // `version` tells whether the host's numbers have changed since.
  SamplingView view(const SamplingView& host, [[maybe_unused]] uint64_t version, Device device,
                    [[maybe_unused]] Stream stream) {
    if (backend_for(device) == Backend::cpu) return host;
#ifdef FORETOKEN_HAS_CUDA
    for (Kept& kept : kept_) {
      if (kept.mirror->device() != device) continue;
      if (kept.version == version) return kept.mirror->view();
      const cuda::OnDevice current(device);
      kept.mirror->update(host, stream);
      kept.version = version;
      return kept.mirror->view();
    }
    const cuda::OnDevice current(device);
    kept_.push_back({std::make_unique<cuda::SamplingMirror>(host, device, stream), version});
    return kept_.back().mirror->view();
#else
    return host;
#endif
  }

#ifdef FORETOKEN_HAS_CUDA
 private:
  struct Kept {
    std::unique_ptr<cuda::SamplingMirror> mirror;
    uint64_t version;
  };
  std::vector<Kept> kept_;
#endif
};

// A captured round that a CUDA device repeats by itself.
class LoopGraph {
 public:
  LoopGraph([[maybe_unused]] const LoopGraphArgs& args, [[maybe_unused]] const std::vector<void*>& rounds,
            Device device)
      : device_(device) {
    if (backend_for(device) == Backend::cpu) {
      throw std::invalid_argument("next_drafts: expected a tensor on cuda, where graphs are, got one on cpu");
    }
#ifdef FORETOKEN_HAS_CUDA
    const cuda::OnDevice current(device);
    graph_ = std::make_unique<cuda::LoopGraph>(args, rounds, device);
#endif
  }

  void launch([[maybe_unused]] Stream stream) {
#ifdef FORETOKEN_HAS_CUDA
    const cuda::OnDevice current(device_);
    graph_->launch(stream);
#endif
  }

  void cancel() {
#ifdef FORETOKEN_HAS_CUDA
    graph_->cancel();
#endif
  }

  bool is_done() const {
#ifdef FORETOKEN_HAS_CUDA
    return graph_->is_done();
#else
    return true;
#endif
  }

  static bool takes_tiers() {
#ifdef FORETOKEN_HAS_CUDA
    return cuda::LoopGraph::takes_tiers();
#else
    return false;
#endif
  }

  int64_t nodes() const {
#ifdef FORETOKEN_HAS_CUDA
    return graph_->nodes();
#else
    return 0;
#endif
  }

 private:
  [[maybe_unused]] Device device_;
#ifdef FORETOKEN_HAS_CUDA
  std::unique_ptr<cuda::LoopGraph> graph_;
#endif
};

// Bytes of device scratch that sample() needs, of any contents; 0: none.
inline int64_t sample_workspace([[maybe_unused]] const SampleArgs& args, Device device) {
  if (backend_for(device) == Backend::cpu) return 0;
#ifdef FORETOKEN_HAS_CUDA
  return cuda::sample_workspace(args);
#else
  return 0;
#endif
}

inline void sample(const SampleArgs& args, [[maybe_unused]] void* workspace, Device device,
                   [[maybe_unused]] Stream stream) {
  if (backend_for(device) == Backend::cpu) return cpu::sample(args);
#ifdef FORETOKEN_HAS_CUDA
  const cuda::OnDevice current(device);
  cuda::sample(args, workspace, device, stream);
#endif
}

// For the proofs: on the CPU the kernels' work is done thread by thread, in about `least_blocks` blocks.
template <class Args>
PreparedRows prepare(const Args& args, const Preparation& what, void* workspace, Device device,
                     [[maybe_unused]] Stream stream, int64_t least_blocks) {
  if (backend_for(device) == Backend::cpu) {
    return cpu::prepare(prepare_args(args, what, workspace), what, workspace, least_blocks);
  }
#ifdef FORETOKEN_HAS_CUDA
  const cuda::OnDevice current(device);
  return cuda::prepare(args, what, workspace, device, stream);
#else
  return {};
#endif
}

inline void tile_stats(const TileStatsArgs& args, Device device, [[maybe_unused]] Stream stream) {
  if (backend_for(device) == Backend::cpu) return cpu::tile_stats(args);
#ifdef FORETOKEN_HAS_CUDA
  const cuda::OnDevice current(device);
  cuda::tile_stats(args, stream);
#endif
}

// Bytes of device scratch that verify() needs, zero before its first use; 0: none.
inline int64_t verify_workspace([[maybe_unused]] const VerifyArgs& args, Device device) {
  if (backend_for(device) == Backend::cpu) return 0;
#ifdef FORETOKEN_HAS_CUDA
  return cuda::verify_workspace(args, device);
#else
  return 0;
#endif
}

inline void verify(const VerifyArgs& args, [[maybe_unused]] void* workspace, Device device,
                   [[maybe_unused]] Stream stream) {
  if (backend_for(device) == Backend::cpu) return cpu::verify(args);
#ifdef FORETOKEN_HAS_CUDA
  const cuda::OnDevice current(device);
  cuda::verify(args, workspace, device, stream);
#endif
}

inline void commit(const CommitArgs& args, Device device, [[maybe_unused]] Stream stream) {
  if (backend_for(device) == Backend::cpu) return cpu::commit(args);
#ifdef FORETOKEN_HAS_CUDA
  const cuda::OnDevice current(device);
  cuda::commit(args, device, stream);
#endif
}

inline void write_step_inputs(const StepInputsArgs& args, Device device, [[maybe_unused]] Stream stream) {
  if (backend_for(device) == Backend::cpu) return cpu::write_step_inputs(args);
#ifdef FORETOKEN_HAS_CUDA
  const cuda::OnDevice current(device);
  cuda::write_step_inputs(args, device, stream);
#endif
}

inline void draft_ngrams(const NgramDraftsArgs& args, Device device, [[maybe_unused]] Stream stream) {
  if (backend_for(device) == Backend::cpu) return cpu::draft_ngrams(args);
#ifdef FORETOKEN_HAS_CUDA
  const cuda::OnDevice current(device);
  cuda::draft_ngrams(args, device, stream);
#endif
}

inline void last_logits(const LastLogitsArgs& args, Device device, [[maybe_unused]] Stream stream) {
  if (backend_for(device) == Backend::cpu) return cpu::last_logits(args);
#ifdef FORETOKEN_HAS_CUDA
  const cuda::OnDevice current(device);
  cuda::last_logits(args, device, stream);
#endif
}

inline void reserve_states(const StateRingArgs& args, Device device, [[maybe_unused]] Stream stream) {
  if (backend_for(device) == Backend::cpu) return cpu::reserve_states(args);
#ifdef FORETOKEN_HAS_CUDA
  const cuda::OnDevice current(device);
  cuda::reserve_states(args, stream);
#endif
}

inline void commit_states(const StateRingArgs& args, Device device, [[maybe_unused]] Stream stream) {
  if (backend_for(device) == Backend::cpu) return cpu::commit_states(args);
#ifdef FORETOKEN_HAS_CUDA
  const cuda::OnDevice current(device);
  cuda::commit_states(args, stream);
#endif
}

inline void append(const AppendArgs& args, Device device, [[maybe_unused]] Stream stream) {
  if (backend_for(device) == Backend::cpu) return cpu::append(args);
#ifdef FORETOKEN_HAS_CUDA
  const cuda::OnDevice current(device);
  cuda::append(args, stream);
#endif
}

inline void compact(const CompactArgs& args, Device device, [[maybe_unused]] Stream stream) {
  if (backend_for(device) == Backend::cpu) return cpu::compact(args);
#ifdef FORETOKEN_HAS_CUDA
  const cuda::OnDevice current(device);
  cuda::compact(args, stream);
#endif
}

inline void edit_pages(const EditPagesArgs& args, Device device, [[maybe_unused]] Stream stream) {
  if (backend_for(device) == Backend::cpu) return cpu::edit_pages(args);
#ifdef FORETOKEN_HAS_CUDA
  const cuda::OnDevice current(device);
  cuda::edit_pages(args, stream);
#endif
}

inline void keep_rows(const KeepRowsArgs& args, Device device, [[maybe_unused]] Stream stream) {
  if (backend_for(device) == Backend::cpu) return cpu::keep_rows(args);
#ifdef FORETOKEN_HAS_CUDA
  const cuda::OnDevice current(device);
  cuda::keep_rows(args, stream);
#endif
}

inline void keep_apart(const KeepApartArgs& args, Device device, [[maybe_unused]] Stream stream) {
  if (backend_for(device) == Backend::cpu) return cpu::keep_apart(args);
#ifdef FORETOKEN_HAS_CUDA
  const cuda::OnDevice current(device);
  cuda::keep_apart(args, stream);
#endif
}

inline void gather_apart(const GatherApartArgs& args, Device device, [[maybe_unused]] Stream stream) {
  if (backend_for(device) == Backend::cpu) return cpu::gather_apart(args);
#ifdef FORETOKEN_HAS_CUDA
  const cuda::OnDevice current(device);
  cuda::gather_apart(args, stream);
#endif
}

inline void copy_pages(const CopyPagesArgs& args, Device device, [[maybe_unused]] Stream stream) {
  if (backend_for(device) == Backend::cpu) return cpu::copy_pages(args);
#ifdef FORETOKEN_HAS_CUDA
  const cuda::OnDevice current(device);
  cuda::copy_pages(args, stream);
#endif
}

inline void tree_index(const TreeIndexArgs& args, Device device, [[maybe_unused]] Stream stream) {
  if (backend_for(device) == Backend::cpu) return cpu::tree_index(args);
#ifdef FORETOKEN_HAS_CUDA
  const cuda::OnDevice current(device);
  cuda::tree_index(args, stream);
#endif
}

// Bytes of device scratch that tree_attention() needs, its first kAttentionCounterBytes zero before their
// first use and zero again behind every call; 0: none. From the shapes alone, as lengths are on the device.
inline int64_t tree_attention_workspace([[maybe_unused]] const TreeAttentionArgs& args, Device device) {
  if (backend_for(device) == Backend::cpu) return 0;
#ifdef FORETOKEN_HAS_CUDA
  return cuda::tree_attention_workspace(args, device);
#else
  return 0;
#endif
}

inline void tree_attention(const TreeAttentionArgs& args, [[maybe_unused]] void* workspace, Device device,
                           [[maybe_unused]] Stream stream) {
  if (backend_for(device) == Backend::cpu) return cpu::tree_attention(args);
#ifdef FORETOKEN_HAS_CUDA
  const cuda::OnDevice current(device);
  cuda::tree_attention(args, workspace, device, stream);
#endif
}

inline void merge(const MergeArgs& args, Device device, [[maybe_unused]] Stream stream) {
  if (backend_for(device) == Backend::cpu) return cpu::merge(args);
#ifdef FORETOKEN_HAS_CUDA
  const cuda::OnDevice current(device);
  cuda::merge(args, stream);
#endif
}

inline void draft_topk(const DraftTopkArgs& args, Device device, [[maybe_unused]] Stream stream) {
  if (backend_for(device) == Backend::cpu) return cpu::draft_topk(args);
#ifdef FORETOKEN_HAS_CUDA
  const cuda::OnDevice current(device);
  cuda::draft_topk(args, device, stream);
#endif
}

inline void finalize_tree(const FinalizeTreeArgs& args, Device device, [[maybe_unused]] Stream stream) {
  if (backend_for(device) == Backend::cpu) return cpu::finalize_tree(args);
#ifdef FORETOKEN_HAS_CUDA
  const cuda::OnDevice current(device);
  cuda::finalize_tree(args, stream);
#endif
}

}  // namespace dispatch

}  // namespace foretoken
