// Rounds that the device repeats by itself: declarations, without a header of CUDA's.
#pragma once

#include <cstdint>
#include <memory>

#include "ops/loop_graph.hpp"

namespace foretoken::cuda {

class LoopGraph {
 public:
  // `round` is a cudaGraph_t, of which a clone is taken. What its nodes read and write has to stay.
  LoopGraph(const LoopGraphArgs& args, void* round, Device device);
  ~LoopGraph();
  LoopGraph(const LoopGraph&) = delete;
  LoopGraph& operator=(const LoopGraph&) = delete;

  void launch(Stream stream);
  void cancel();  // from any thread: the launch that runs, if one does, ends after its round
  int64_t nodes() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace foretoken::cuda
