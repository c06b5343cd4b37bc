// Registers what the other files define; nothing else.
#include <pybind11/pybind11.h>

namespace foretoken {
void register_attention(pybind11::module_& module);
void register_cache(pybind11::module_& module);
void register_commit(pybind11::module_& module);
void register_draft_tree(pybind11::module_& module);
void register_drafters(pybind11::module_& module);
void register_info(pybind11::module_& module);
void register_loop(pybind11::module_& module);
void register_loop_graph(pybind11::module_& module);
void register_pages(pybind11::module_& module);
void register_sampling(pybind11::module_& module);
void register_state_ring(pybind11::module_& module);
void register_testing(pybind11::module_& module);
void register_tile_stats(pybind11::module_& module);
void register_tree(pybind11::module_& module);
void register_verify(pybind11::module_& module);
}  // namespace foretoken

PYBIND11_MODULE(_core, module) {
  module.doc() = "Native core of foretoken.";
  foretoken::register_attention(module);
  foretoken::register_cache(module);
  foretoken::register_commit(module);
  foretoken::register_drafters(module);
  foretoken::register_info(module);
  foretoken::register_loop(module);
  foretoken::register_loop_graph(module);
  foretoken::register_pages(module);
  foretoken::register_sampling(module);
  foretoken::register_state_ring(module);
  foretoken::register_tile_stats(module);
  foretoken::register_tree(module);
  foretoken::register_draft_tree(module);
  foretoken::register_verify(module);
  foretoken::register_testing(module);
}
