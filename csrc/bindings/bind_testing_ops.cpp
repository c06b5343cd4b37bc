// Hooks into the arithmetic of the ops, for the proofs. No part of the public interface.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "bindings/tolerance.hpp"
#include "cpu/attention_kernels.hpp"
#include "cpu/enumerate.hpp"
#include "cpu/parallel.hpp"
#include "cpu/residual.hpp"
#include "cpu/row_kernels.hpp"
#include "cpu/tiles.hpp"
#include "math/philox.hpp"

namespace foretoken {

namespace py = pybind11;

namespace {

using FilterTuple = std::tuple<double, int32_t, double, double>;  // temperature, top_k, top_p, min_p

cpu::Processing processing_from(const FilterTuple& filters) {
  return {static_cast<float>(std::get<0>(filters)), std::get<1>(filters),
          static_cast<float>(std::get<2>(filters)), static_cast<float>(std::get<3>(filters))};
}

WalkOptions options_from(Rule rule, Draw draw, int32_t num_paths) {
  WalkOptions options;
  options.rule = rule;
  options.draw = draw;
  options.num_paths = num_paths;
  return options;
}

py::list verify_law(const std::vector<std::vector<double>>& target_logits,
                    const std::vector<std::optional<std::vector<double>>>& draft_laws,
                    const std::vector<int64_t>& draft_tokens, const std::vector<int64_t>& parents, Rule rule,
                    Draw draw, int32_t num_paths, const FilterTuple& sampling,
                    const FilterTuple& draft_sampling, bool draft_is_probs, const std::string& precision,
                    const std::optional<ToleranceValues>& tolerance) {
  if (target_logits.size() != draft_tokens.size() + 1 || draft_laws.size() != target_logits.size() ||
      parents.size() != draft_tokens.size()) {
    throw py::value_error(
        "target_logits, draft_laws: expected a row for each node, one more than draft_tokens");
  }
  cpu::TreeCase tree;
  tree.target = target_logits;
  for (const auto& law : draft_laws) tree.draft.push_back(law.value_or(std::vector<double>{}));
  tree.tokens = draft_tokens;
  tree.parents = parents;
  tree.draft_is_probs = draft_is_probs;
  tree.processing = processing_from(sampling);
  tree.draft_processing = processing_from(draft_sampling);
  tree.options = options_from(rule, draw, num_paths);
  if (tolerance) tree.options.tolerance = tolerance->view();
  py::list result;
  for (const cpu::Branch& branch :
       precision == "float64" ? cpu::enumerate_float64(tree) : cpu::enumerate_float32(tree)) {
    result.append(py::make_tuple(branch.probability, branch.node, branch.closing));
  }
  return result;
}

py::tuple joint_law(const std::vector<std::vector<double>>& target_logits,
                    const std::vector<std::vector<double>>& draft_logits, const std::vector<int64_t>& parents,
                    const std::vector<bool>& point, Rule rule, Draw draw, int32_t num_paths,
                    const FilterTuple& sampling, const FilterTuple& draft_sampling,
                    const std::string& precision) {
  cpu::JointCase joint;
  joint.target = target_logits;
  joint.draft = draft_logits;
  joint.parents = parents;
  joint.point = point;
  joint.processing = processing_from(sampling);
  joint.draft_processing = processing_from(draft_sampling);
  joint.options = options_from(rule, draw, num_paths);
  const cpu::JointLaw law = [&] {
    py::gil_scoped_release unlocked;
    return cpu::joint_law(joint, precision == "float64");
  }();
  return py::make_tuple(py::array_t<double>(static_cast<py::ssize_t>(law.emitted.size()), law.emitted.data()),
                        law.accepted);
}

py::array_t<float> exp2_scaled_array(const std::vector<float>& distances, float scale) {
  py::array_t<float> result(static_cast<py::ssize_t>(distances.size()));
  for (size_t i = 0; i < distances.size(); ++i) {
    result.mutable_at(static_cast<py::ssize_t>(i)) = exp2_scaled(distances[i], scale);
  }
  return result;
}

py::array_t<double> log_array(const std::vector<double>& values) {
  py::array_t<double> result(static_cast<py::ssize_t>(values.size()));
  for (size_t i = 0; i < values.size(); ++i) {
    result.mutable_at(static_cast<py::ssize_t>(i)) = log_positive(values[i]);
  }
  return result;
}

// (max, scale, cut, mass, top, usable) of a float32 row: the record everything else follows from.
py::tuple row_law(const std::vector<float>& row, const FilterTuple& filters, bool probs) {
  const cpu::Row view{row.data(), DType::float32, static_cast<int64_t>(row.size())};
  const RowLaw law = probs ? cpu::law_of_probs(view) : cpu::law_of_logits(view, processing_from(filters));
  return py::make_tuple(law.max, law.scale, law.cut, law.mass, law.top, law.usable);
}

// Draws from a float32 row, from [row - gain * draft]+ (gain in weights) if there is a draft row, or without
// one token: all integer masses, and the token of each 64 random bits as a draw finds it that knows its
// tiles.
py::tuple draw_tokens(const std::vector<float>& row, const std::vector<float>& draft, float gain,
                      int64_t excluded, const FilterTuple& filters, const std::vector<uint64_t>& bits) {
  const int64_t size = static_cast<int64_t>(row.size());
  std::vector<uint64_t> tiles(static_cast<size_t>(tiles_of(size)));
  const cpu::Row view{row.data(), DType::float32, size};
  const RowLaw law = cpu::law_of_logits(view, processing_from(filters), tiles.data());
  cpu::Residual residual = cpu::whole_of(view, law, tiles.data());
  RowLaw draft_law;
  if (!draft.empty()) {
    residual.draft = {draft.data(), DType::float32, size};
    draft_law = cpu::law_of_logits(residual.draft, processing_from(filters));
    residual.draft_law = &draft_law;
    residual.gain = gain;
    cpu::residual_fraction(residual, tiles.data());
  }
  if (excluded >= 0) residual.exclude(excluded);
  py::array_t<uint64_t> masses(static_cast<py::ssize_t>(size));
  cpu::all_masses(residual, masses.mutable_data());
  std::vector<int64_t> tokens;
  for (uint64_t random : bits) tokens.push_back(cpu::draw(residual, random));
  return py::make_tuple(masses, tokens);
}

// Reads memory as fast as this library can, on as many threads as its kernels use.
float plain_read(const std::vector<std::pair<uintptr_t, int64_t>>& pieces) {
  const py::gil_scoped_release unlocked;
  const int threads = cpu::max_threads();
  std::vector<float> largest(static_cast<size_t>(threads), 0.0f);
  cpu::parallel_for(threads, int64_t{1} << 20, [&](int64_t thread) {
    for (const auto& [address, bytes] : pieces) {
      const int64_t count = bytes / 4, first = count * thread / threads;
      const float* elements = reinterpret_cast<const float*>(address) + first;
      float& most = largest[static_cast<size_t>(thread)];
      most = std::max(most, cpu::row_kernels().plain_read(elements, count * (thread + 1) / threads - first));
    }
  });
  return *std::max_element(largest.begin(), largest.end());
}

}  // namespace

void register_testing_ops(py::module_& testing) {
  testing.def(
      "philox4x32",
      [](uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
        const PhiloxWords words = philox4x32(key, c0, c1, c2, c3);
        return py::make_tuple(words.word[0], words.word[1], words.word[2], words.word[3]);
      },
      py::arg("key"), py::arg("c0"), py::arg("c1"), py::arg("c2"), py::arg("c3"));
  testing.def(
      "accepts_token",
      [](uint32_t coin, double target, double draft) { return accepts_token(coin, target, draft); },
      py::arg("coin"), py::arg("target_prob"), py::arg("draft_prob"));
  testing.def(
      "accepts_fraction", [](uint32_t coin, double h) { return accepts_fraction(coin, h); }, py::arg("coin"),
      py::arg("fraction"));
  testing.def("exp2_scaled", &exp2_scaled_array, py::arg("distances"), py::arg("scale"));
  testing.def("log_positive", &log_array, py::arg("values"));
  testing.def("row_law", &row_law, py::arg("row"), py::arg("filters"), py::arg("probs") = false);
  testing.def("plain_read", &plain_read, py::arg("pieces"),
              "Largest float32 in pieces of memory, each an address and its bytes: a read and nothing else.");
  testing.def("draw_tokens", &draw_tokens, py::arg("row"), py::arg("draft"), py::arg("gain"),
              py::arg("excluded"), py::arg("filters"), py::arg("bits"));
  testing.def("verify_law", &verify_law, py::arg("target_logits"), py::arg("draft_laws"),
              py::arg("draft_tokens"), py::arg("parents"), py::arg("rule"), py::arg("draw"),
              py::arg("num_paths"), py::arg("sampling"), py::arg("draft_sampling"),
              py::arg("draft_is_probs") = false, py::arg("precision") = "float64",
              py::arg("tolerance") = py::none(),
              "Every way a verification can end: [(probability, last node, closing probability per token)]; "
              "nothing for "
              "a proposal that is not usable. Row r of both laws is that of node r and its children.");
  testing.def("joint_law", &joint_law, py::arg("target_logits"), py::arg("draft_logits"), py::arg("parents"),
              py::arg("point"), py::arg("rule"), py::arg("draw"), py::arg("num_paths"), py::arg("sampling"),
              py::arg("draft_sampling"), py::arg("precision") = "float64",
              "(law of the first D + 1 tokens [V^(D + 1)], expected accepted drafts) over all drafts of one "
              "tree shape; "
              "rows are those of the contexts in order of depth, then of tokens.");
  testing.def("cpu_path", [] { return cpu::row_kernels().name; });
  testing.def(
      "force_cpu_path",
      [](const std::string& name) {
        const cpu::RowKernels* kernels = cpu::row_kernels_named(name.c_str());
        if (kernels != nullptr) cpu::force_row_kernels(*kernels);
        return kernels != nullptr;
      },
      py::arg("name"),
      "Switch to portable, avx2 or avx512; False if this machine or build has no such path.");
  testing.def("matrix_path", &cpu::matrix_kernels);
  testing.def(
      "force_matrix_path", [](const std::string& name) { return cpu::force_matrix_kernels(name.c_str()); },
      py::arg("name"),
      "Switch attention of bfloat16 to amx, emulated amx, emulated tiles, none or auto; False if this "
      "machine "
      "or build has no such path.");
  testing.def(
      "multiply_tiles",
      [](const std::string& name, py::bytes left, py::bytes right, py::bytes sum) -> py::object {
        std::string result = sum;
        const std::string of_left = left, of_right = right;
        const size_t size = static_cast<size_t>(cpu::kTileBytes);
        if (of_left.size() != size || of_right.size() != size || result.size() != size) {
          throw py::value_error("tiles: expected 1024 bytes each");
        }
        if (!cpu::multiply_tiles(name.c_str(), of_left.data(), of_right.data(), result.data()))
          return py::none();
        return py::bytes(result);
      },
      py::arg("name"), py::arg("left"), py::arg("right"), py::arg("sum"),
      "sum + left * right as a matrix path computes it; None if this machine or build has no such path.");
}

}  // namespace foretoken
