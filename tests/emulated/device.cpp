#include "device.hpp"

#include <sys/mman.h>

#include <memory>

// Saves what a function has to keep, and goes on where another stack was left.
asm(R"(
.text
.globl emulated_switch
.type emulated_switch, @function
emulated_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulated_switch, .-emulated_switch
)");
extern "C" void emulated_switch(void** save, void* load);

namespace emulated {

Fiber* current = nullptr;
Index grid, threads_of_block;
Launch last;

namespace {

constexpr size_t kStack = 64 << 10;
constexpr uint64_t kMostSwitches = 400'000'000;

uint64_t state = 1;
unsigned impatience = 0;
long long ticks = 0;
void* scheduler = nullptr;
std::deque<Fiber*> ready;
size_t left = 0;
const std::function<void()>* body = nullptr;
std::string failure;

void leave() { emulated_switch(&current->stack_pointer, scheduler); }

void enter() {
  try {
    (*body)();
  } catch (const std::exception& error) {
    failure = error.what();
  }
  --left;
  leave();
}

void prepare(Fiber& fiber, char* stack) {
  void** top = reinterpret_cast<void**>(stack + kStack) - 1;  // 8 beside a multiple of 16, as behind a call
  *top = nullptr;
  *--top = reinterpret_cast<void*>(&enter);
  top -= 6;
  std::memset(top, 0, 6 * sizeof(void*));
  fiber.stack_pointer = top;
}

void schedule() {
  for (uint64_t switches = 0; left > 0 && failure.empty(); ++switches) {
    if (ready.empty()) failure = "emulated: all threads wait";
    if (switches > kMostSwitches) failure = "emulated: it does not end";
    if (!failure.empty()) break;
    if (random() % 8 == 0) std::swap(ready.front(), ready[random() % ready.size()]);
    current = ready.front();
    ready.pop_front();
    if (current->block->slowness != 0 && random() % current->block->slowness != 0) {
      ready.push_back(current);
      continue;
    }
    emulated_switch(&scheduler, current->stack_pointer);
  }
  ready.clear();
}

}  // namespace

void seed(uint64_t number) { state = number * 2 + 1; }

uint32_t random() {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<uint32_t>(state >> 33);
}

void set_impatience(unsigned one_in) { impatience = one_in; }

long long clock() {
  ticks += impatience != 0 && random() % impatience == 0 ? 1'000'000 : 1;
  return ticks;
}

void pause() {
  ready.push_back(current);
  leave();
}

void arrive(Meeting& meeting, int all) {
  if (++meeting.arrived < all) return;
  meeting.arrived = 0;
  ++meeting.times;
  for (Fiber* fiber : meeting.parked) ready.push_back(fiber);
  meeting.parked.clear();
}

void wait_behind(Meeting& meeting, uint64_t times) {
  if (meeting.times > times) return;
  meeting.parked.push_back(current);
  leave();
}

void wait(Meeting& meeting, int all) {
  const uint64_t times = meeting.times;
  arrive(meeting, all);
  wait_behind(meeting, times);
}

void run(const Launch& launch, const std::function<void()>& kernel) {
  last = launch;
  const unsigned warps = launch.threads / 32;
  std::vector<Block> blocks(launch.blocks);
  std::vector<Cluster> clusters(launch.blocks / launch.cluster);
  std::vector<Warp> all_warps(launch.blocks * warps);
  std::vector<Fiber> fibers(launch.blocks * launch.threads);
  std::vector<std::unique_ptr<char[]>> shared;
  const size_t bytes = fibers.size() * kStack;
  char* const stacks = static_cast<char*>(
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (stacks == MAP_FAILED) throw std::runtime_error("emulated: no memory");
  grid = {launch.blocks, 1, 1};
  threads_of_block = {launch.threads, 1, 1};
  for (unsigned b = 0; b < launch.blocks; ++b) {
    Block& block = blocks[b];
    block.index.x = b;
    block.threads = static_cast<int>(launch.threads);
    block.cluster = &clusters[b / launch.cluster];
    block.cluster->threads = static_cast<int>(launch.cluster * launch.threads);
    block.rank = b % launch.cluster;
    constexpr unsigned kSlowness[] = {0, 0, 4, 30};
    block.slowness = kSlowness[random() % 4];
    block.size = launch.cluster;
    shared.push_back(std::make_unique<char[]>(launch.shared + 16));
    std::memset(shared.back().get(), 0xA5, launch.shared + 16);  // nobody has written it
    block.shared = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(shared.back().get()) + 15) / 16 * 16);
    for (unsigned r = 0; r < launch.cluster; ++r) block.neighbours.push_back(&blocks[b - block.rank + r]);
    for (unsigned t = 0; t < launch.threads; ++t) {
      const size_t number = size_t{b} * launch.threads + t;
      Fiber& fiber = fibers[number];
      fiber.thread.x = t;
      fiber.block = &block;
      fiber.warp = &all_warps[b * warps + t / 32];
      fiber.lane = static_cast<int>(t % 32);
      prepare(fiber, stacks + number * kStack);
    }
  }
  // Blocks begin one after the other, in any order.
  std::vector<unsigned> order(launch.blocks);
  for (unsigned b = 0; b < launch.blocks; ++b) order[b] = b;
  for (unsigned b = launch.blocks; b > 1; --b) std::swap(order[b - 1], order[random() % b]);
  for (const unsigned b : order) {
    for (unsigned t = 0; t < launch.threads; ++t) ready.push_back(&fibers[size_t{b} * launch.threads + t]);
  }
  left = fibers.size();
  body = &kernel;
  failure.clear();
  schedule();
  munmap(stacks, bytes);
  if (!failure.empty()) throw std::runtime_error(failure);
}

}  // namespace emulated
