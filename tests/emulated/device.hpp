// A device for the kernels of csrc/cuda where there is none: every thread of a launch is a fiber of this one
// thread of the host, and a schedule is drawn from a seed. Threads change where CUDA lets them wait for each
// other: at barriers, among the lanes of a warp, and where a word in global memory is looked at in order.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulated {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

struct Fiber;

// So many fibers wait for each other, again and again.
struct Meeting {
  int arrived = 0;
  uint64_t times = 0;
  std::vector<Fiber*> parked;
};

struct Warp {
  Meeting meeting;
  uint64_t words[2][32];
};

struct Cluster {
  Meeting meeting;
  int threads = 0;
};

struct Block {
  Index index;
  Meeting meeting;
  Cluster* cluster = nullptr;
  int threads = 0;
  unsigned rank = 0, size = 1;
  unsigned slowness = 0;  // how often others go on in its place
  char* shared = nullptr;
  bool against[4] = {};            // of a vote; by times that the block has met
  std::vector<Block*> neighbours;  // of the cluster, by rank
};

struct Fiber {
  void* stack_pointer = nullptr;
  Index thread;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int lane = 0;
  int parity = 0;
  uint64_t cluster_times = 0;  // of its cluster's meeting when it arrived last
};

extern Fiber* current;
extern Index grid, threads_of_block;

struct Launch {
  unsigned blocks = 0, threads = 0, cluster = 1;
  size_t shared = 0;
};

extern Launch last;  // that was run

// Throws std::runtime_error if threads wait for what never comes.
void run(const Launch& launch, const std::function<void()>& kernel);
void seed(uint64_t number);
uint32_t random();

void pause();  // others may go on
void wait(Meeting& meeting, int all);
void arrive(Meeting& meeting, int all);  // without waiting
void wait_behind(Meeting& meeting, uint64_t times);

// Cycles. One look in so many finds that long has passed.
long long clock();
void set_impatience(unsigned one_in);

inline void block_barrier() { wait(current->block->meeting, current->block->threads); }
inline void cluster_barrier() { wait(current->block->cluster->meeting, current->block->cluster->threads); }

// What every lane of the warp gave.
template <class T>
const uint64_t* exchange(unsigned mask, T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (mask != 0xFFFFFFFFu) throw std::runtime_error("emulated: some lanes of a warp alone");
  Warp& warp = *current->warp;
  uint64_t* const words = warp.words[current->parity];
  current->parity ^= 1;
  words[current->lane] = 0;
  std::memcpy(words + current->lane, &value, sizeof value);
  wait(warp.meeting, 32);
  return words;
}

template <class T>
T from_word(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

}  // namespace emulated
