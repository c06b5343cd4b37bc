// Rounds that the device repeats by itself: declarations, without a header of CUDA's.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "ops/loop_graph.hpp"

namespace foretoken::cuda {

class LoopGraph {
 public:
  // `rounds` are cudaGraph_t, one a tier, of which clones are taken. What their nodes read and write has to
  // stay.
  LoopGraph(const LoopGraphArgs& args, const std::vector<void*>& rounds, Device device);
  ~LoopGraph();
  LoopGraph(const LoopGraph&) = delete;
  LoopGraph& operator=(const LoopGraph&) = delete;

  void launch(Stream stream);
  void cancel();  // from any thread: the launch that runs, if one does, ends after its round
  bool is_done() const;
  int64_t nodes() const;

  static bool takes_tiers();  // whether build and driver can choose among rounds

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace foretoken::cuda
