// The execution model: a grid runs block after block, in random order; the threads of a block are fibers, and between
// two points of waiting they run one after another, in random order.
//
// A thread waits in one of two ways. At a barrier of the block it waits for all threads of the block that have not
// exited; at a meeting (anything of a warp with a mask: __syncwarp, shuffles, votes, matrix products) for all lanes of
// the mask that have not exited. Both are known by their place in the source: threads that wait at different places
// never release one another. So every divergence that CUDA leaves undefined ends with no thread able to go on, and
// run() throws an Error that tells who waits where. A block's end, or a thread's, is no error while others wait:
// CUDA lets barriers and masks ignore threads that have exited; taking a value from an exited lane is an error.
//
// What a meeting does is done by its last thread, for all lanes at once, on what the lanes have laid out.
//
// Random numbers come from one seed: the same seed and the same launches give the same order. Two schedules: mixed
// (any thread that can run goes next) and ahead (a warp runs as far as it can before another does); a block takes
// either at random unless a test has chosen.
//
// Everything here is for one thread of the processor.
#pragma once
#include <cstddef>
#include <cstdint>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_types.h"
#include "fiber.h"

namespace emulator {

using Place = std::source_location;

// A kernel did what CUDA leaves undefined, or what the device would refuse.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The device that host functions and kernels see. Tests set it.
struct Device {
  int compute_capability = 90;
  int multiprocessors = 132;
};
Device& device();

enum class Schedule { kAny, kMixed, kAhead };
void set_schedule(Schedule schedule);
void set_seed(uint64_t seed);

// Copies that a thread has started and not yet waited for. They happen in wait().
class AsyncCopies {
 public:
  // 16 bytes, zeros if not `valid`. The destination is NaN until the copy happens.
  void start(void* to, const void* from, bool valid);
  void commit() { group_ends_.push_back(copies_.size()); }
  // Finishes all committed groups but the last `pending`.
  void wait(size_t pending);
  void forget();

 private:
  struct Copy {
    void* to;
    const void* from;
    bool valid;
  };
  std::vector<Copy> copies_;
  std::vector<size_t> group_ends_;
};

struct Thread {
  uint3 index{};
  unsigned number = 0;  // within the block, x fastest
  unsigned lane() const { return number % 32; }
  unsigned warp() const { return number / 32; }

  // Where it waits; nullptr while it does not.
  const char* waits_at = nullptr;
  uint32_t waits_mask = 0;  // zero at a barrier of the block
  Place waits_place;

  AsyncCopies copies;
  Fiber fiber;
};

// What the built-in variables of CUDA read.
struct Launch {
  dim3 grid, block;
  uint3 block_index{};
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
};
extern Launch launch;
extern Thread* current;

// Throws an Error that names the block and the running thread.
[[noreturn]] void fail(const std::string& what, const Place& place);

// Whether the bytes lie in the block's dynamic shared memory.
bool in_shared_memory(const void* from, size_t bytes);

// The running thread waits for the block. Returns what `combine` made of all threads' values, in any order.
using Combine = int (*)(int, int);
int block_barrier(const char* name, int value, Combine combine, const Place& place);

// The running thread waits for the lanes of the mask. The last one calls `operate` with what each lane brought
// (pointers to the lanes' own data; undefined for lanes that are not in `present`).
using Operate = void (*)(void* const (&lanes)[32], uint32_t present, const Place& place);
void meet(const char* name, uint32_t mask, void* mine, Operate operate, const Place& place);

// Lets other threads run first.
void yield();

// Runs body(argument) in every thread of the grid. An exception of a thread ends the run: all other threads are
// unwound, and the exception comes out.
void run_body(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void*), const void* argument);

template <class Body>
void run(dim3 grid, dim3 block, size_t shared_bytes, const Body& body) {
  run_body(grid, block, shared_bytes, [](const void* argument) { (*static_cast<const Body*>(argument))(); }, &body);
}

}  // namespace emulator
