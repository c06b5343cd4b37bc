// Hooks for the project's own tests and benches. No part of the public interface.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "bindings/boundary.hpp"
#include "dispatch.hpp"
#include "math/draft_tiers.hpp"
#include "math/meeting.hpp"
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

// The word of math/meeting.hpp among threads, each of which is interrupted at random before it looks.
class ThreadsWord {
 public:
  ThreadsWord(std::atomic<uint32_t>& word, uint64_t random, uint32_t patience)
      : word_(word), random_(random), patience_(patience > 0 ? next() % patience : 0) {}

  uint32_t add(uint32_t amount) { return pause(), word_.fetch_add(amount); }
  uint32_t count(uint32_t amount) { return add(amount); }
  uint32_t read() { return pause(), word_.load(); }
  uint32_t swap(uint32_t expected, uint32_t desired) {
    pause();
    word_.compare_exchange_strong(expected, desired);
    return expected;
  }
  bool is_patient() { return patience_-- > 0; }
  void clear() { pause(), word_.store(0); }

 private:
  uint32_t next() {
    random_ = random_ * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<uint32_t>(random_ >> 33);
  }
  void pause() {
    if (next() % 4 == 0) std::this_thread::yield();
  }

  std::atomic<uint32_t>& word_;
  uint64_t random_;
  int64_t patience_;
};

// So many threads meet so many times. How often all went on together; raises where they did not agree, or
// left something behind.
int64_t meetings(uint32_t blocks, int64_t rounds, uint32_t patience, uint64_t seed) {
  std::atomic<uint32_t> word{0};
  std::atomic<int64_t> arrived{0}, together{0}, wrong{0};
  std::vector<Part> parts(blocks);
  const auto wait_for_all = [&](int64_t times) {
    arrived.fetch_add(1);
    while (arrived.load() < times * blocks) std::this_thread::yield();
  };
  const auto agree = [&] {
    const bool apart = parts[0] == Part::leaves || parts[0] == Part::alone;
    uint32_t last = 0;
    for (const Part part : parts) {
      last += part == (apart ? Part::alone : Part::leads) ? 1 : 0;
      if (apart != (part == Part::leaves || part == Part::alone)) return false;
    }
    together.fetch_add(apart ? 0 : 1);
    return last == 1 && word.load() == 0;
  };
  const auto block = [&](uint32_t rank) {
    for (int64_t round = 0; round < rounds; ++round) {
      ThreadsWord place(word, (seed + static_cast<uint64_t>(round)) * blocks + rank, patience);
      wait_for_all(3 * round + 1);
      parts[rank] = meet(place, blocks);
      leave_meeting(place, blocks);
      wait_for_all(3 * round + 2);
      if (rank == 0 && !agree()) wrong.fetch_add(1);
      wait_for_all(3 * round + 3);
    }
  };
  std::vector<std::thread> threads;
  for (uint32_t rank = 0; rank < blocks; ++rank) threads.emplace_back(block, rank);
  for (std::thread& thread : threads) thread.join();
  if (wrong.load() > 0) throw std::runtime_error(std::to_string(wrong.load()) + " meetings went wrong");
  return together.load();
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
  testing.def("meetings", &meetings, py::arg("blocks"), py::arg("rounds"), py::arg("patience"),
              py::arg("seed"), py::call_guard<py::gil_scoped_release>());
  testing.def("draft_tiers", &draft_tiers, py::arg("rounds"), py::arg("drafts"));
  testing.def("self_check", &self_check_results, py::arg("count"), py::arg("seed"), py::arg("device"),
              "The shared arithmetic on `count` sets of arguments, as integers: uint64 [count, fields].");
  register_testing_ops(testing);
  register_testing_prepare(testing);
}

}  // namespace foretoken
