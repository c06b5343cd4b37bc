// Hooks for the project's own tests and benches. No part of the public interface.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "bindings/boundary.hpp"
#include "dispatch.hpp"
#include "math/draft_tiers.hpp"
#include "math/selfcheck.hpp"

namespace foretoken {

namespace py = pybind11;

void register_testing_ops(py::module_& testing);
void register_testing_prepare(py::module_& testing);

namespace {

// The arguments of a chain verification, taken in and checked as the real call does, with nothing done to
// them.
void intake8(py::handle target_logits, py::handle draft_tokens, py::handle num_drafts,
             py::handle draft_logits, py::handle base, py::handle tokens, py::handle num_emitted,
             py::handle logprobs) {
  using namespace boundary;
  Intake intake("intake8");
  int64_t batch = 0, rows = 0, vocab = 0, laws = 0;
  intake.read(target_logits, "target_logits", kRealDTypes,
              {Dim::bind(batch, "B"), Dim::bind(rows, "T", 1), Dim::bind(vocab, "V", 1)});
  intake.read(draft_tokens, "draft_tokens", kIndexDTypes, {batch, rows - 1});
  intake.read_or_null(num_drafts, "num_drafts", DType::int32, {batch});
  intake.read_or_null(draft_logits, "draft_logits", kRealDTypes, {batch, Dim::bind(laws, "M"), vocab});
  intake.read_or_null(base, "base", DType::int64, {batch});
  intake.write(tokens, "tokens", kIndexDTypes, {batch, rows});
  intake.write(num_emitted, "num_emitted", DType::int32, {batch});
  intake.write_or_null(logprobs, "logprobs", DType::float32, {batch, rows});
}

// What one argument of any dtype looks like after intake: (address, shape, strides). Rank up to 5.
py::tuple describe(py::handle tensor, const std::string& layout, bool write) {
  using namespace boundary;
  constexpr DTypes any = kRealDTypes | kIndexDTypes | DType::float64 | DType::uint8 | DType::boolean;
  const Layout as = layout == "rows" ? Layout::rows : layout == "any" ? Layout::any : Layout::contiguous;
  Intake intake("describe");
  int64_t n[kMaxRank];
  const auto take = [&](std::initializer_list<Dim> shape) {
    return write ? intake.write(tensor, "tensor", any, shape, as)
                 : intake.read(tensor, "tensor", any, shape, as);
  };
  TensorView view;
  switch (intake.rank_of(tensor, "tensor")) {
    case 0: view = take({}); break;
    case 1: view = take({Dim::bind(n[0])}); break;
    case 2: view = take({Dim::bind(n[0]), Dim::bind(n[1])}); break;
    case 3: view = take({Dim::bind(n[0]), Dim::bind(n[1]), Dim::bind(n[2])}); break;
    default: view = take({Dim::bind(n[0]), Dim::bind(n[1]), Dim::bind(n[2]), Dim::bind(n[3])}); break;
  }
  return py::make_tuple(reinterpret_cast<uintptr_t>(view.data),
                        std::vector<int64_t>(view.shape, view.shape + view.rank),
                        std::vector<int64_t>(view.strides, view.strides + view.rank));
}

// Arguments spread over the ranges the functions are used in; every eighth sits on an edge.
SelfCheckInput self_check_input(uint64_t seed, uint32_t index) {
  const PhiloxWords a = philox4x32(seed, index, 0, 0, 0);
  const PhiloxWords b = philox4x32(seed, index, 1, 0, 0);
  const auto wide = [](const PhiloxWords& words, int i) {
    return static_cast<uint64_t>(words.word[i + 1]) << 32 | words.word[i];
  };
  SelfCheckInput in;
  in.key = wide(a, 0);
  in.other = wide(a, 2);
  for (int i = 0; i < 4; ++i) in.counter[i] = b.word[i] ^ a.word[3 - i];
  const bool edge = index % 8 == 0;
  in.scale = logits_scale(std::exp2(static_cast<float>(b.word[0] % 4096) / 256.0f - 8.0f));
  in.distance = edge ? 0.0f : -125.0f / in.scale * (static_cast<float>(b.word[1] >> 8) * 0x1p-24f);
  in.positive =
      double_of((wide(b, 2) & 0x000FFFFFFFFFFFFFull) | static_cast<uint64_t>(1 + b.word[0] % 2046) << 52);
  in.target_prob = static_cast<float>(b.word[2] >> 8) * 0x1p-24f;
  in.draft_prob = edge ? in.target_prob + 0x1p-30f : static_cast<float>((b.word[3] >> 8) + 1) * 0x1p-24f;
  return in;
}

py::array_t<uint64_t> self_check_results(int64_t count, uint64_t seed, const std::string& device) {
  std::vector<SelfCheckInput> inputs;
  for (int64_t i = 0; i < count; ++i) inputs.push_back(self_check_input(seed, static_cast<uint32_t>(i)));
  std::vector<SelfCheckOutput> outputs(inputs.size());
  if (device == "cuda") {
    if (!dispatch::cuda_self_check(inputs.data(), outputs.data(), count)) {
      throw py::value_error(std::string("device: expected cpu, got cuda: ") + why_no_cuda());
    }
  } else {
    for (size_t i = 0; i < inputs.size(); ++i) outputs[i] = self_check(inputs[i]);
  }
  py::array_t<uint64_t> result({static_cast<py::ssize_t>(count), static_cast<py::ssize_t>(kSelfCheckWords)});
  std::memcpy(result.mutable_data(), outputs.data(), outputs.size() * sizeof(SelfCheckOutput));
  return result;
}

// After rounds of (drafted, accepted): trials, successes, the rate, and the tokens expected with so many
// drafts.
py::tuple draft_tiers(const std::vector<std::pair<int32_t, int32_t>>& rounds,
                      const std::vector<int64_t>& drafts) {
  AcceptanceRate rate{0, 0};
  for (const auto& [drafted, accepted] : rounds) rate.note(drafted, accepted);
  ExpectedTokens expected(rate.rate());
  std::vector<int64_t> tokens;
  for (const int64_t count : drafts) tokens.push_back(expected.with(count));
  return py::make_tuple(rate.trials, rate.successes, rate.rate(), tokens);
}

}  // namespace

void register_testing(py::module_& module) {
  py::module_ testing =
      module.def_submodule("testing", "Hooks for the project's own tests. Not an interface.");
  testing.def("intake8", &intake8, py::arg("target_logits"), py::arg("draft_tokens"), py::arg("num_drafts"),
              py::arg("draft_logits"), py::arg("base"), py::arg("tokens"), py::arg("num_emitted"),
              py::arg("logprobs"));
  testing.def("describe", &describe, py::arg("tensor"), py::arg("layout") = "rows", py::arg("write") = false);
  testing.def("draft_tiers", &draft_tiers, py::arg("rounds"), py::arg("drafts"));
  testing.def("self_check", &self_check_results, py::arg("count"), py::arg("seed"), py::arg("device"),
              "The shared arithmetic on `count` sets of arguments, as integers: uint64 [count, fields].");
  register_testing_ops(testing);
  register_testing_prepare(testing);
}

}  // namespace foretoken
