#include "execution.h"

#include <sys/mman.h>

#include <bit>
#include <cstring>
#include <exception>
#include <memory>
#include <numeric>
#include <sstream>

#if defined(__BMI2__)
#include <immintrin.h>
#endif

#if EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace emulator {

Launch launch;
Thread* current = nullptr;

namespace {

constexpr unsigned kWarpThreads = 32, kMaxThreads = 1024, kMaxWarps = kMaxThreads / kWarpThreads;
constexpr size_t kSharedCapacity = 227 << 10, kRedzone = 1 << 10;
constexpr unsigned char kNan = 0xff;     // a NaN in every floating-point format
constexpr unsigned char kCanary = 0xc5;  // follows the shared memory

// Lanes of one mask that wait for one another.
struct Meeting {
  const char* name;
  uint32_t mask, arrived;
  Operate operate;
  Place place;
};

struct Warp {
  uint32_t alive = 0;  // lanes that have not exited
  uint32_t ready = 0;  // lanes that can run
  Meeting meetings[kWarpThreads];
  unsigned meeting_count = 0;
  void* brought[kWarpThreads] = {};
};

struct Barrier {
  const char* name;
  Place place;
  unsigned arrived;
  int value;
};

// Thrown in the threads that still wait when the run has failed, to unwind them.
struct Cancelled {};

struct Block {
  Warp warps[kMaxWarps];
  unsigned thread_count = 0, warp_count = 0, alive = 0;
  uint32_t ready_warps = 0;
  std::vector<Barrier> barriers;
  int barrier_value = 0;
  bool ahead = false;
  bool cancelled = false;
  std::exception_ptr failure;
};

Block block;
Device the_device;
Schedule the_schedule = Schedule::kAny;
uint64_t random_state = 0;
std::vector<std::unique_ptr<Thread>> threads;  // kept from block to block and from run to run
Fiber host;

void (*kernel_body)(const void*);
const void* kernel_argument;

// splitmix64
uint64_t random_bits() {
  uint64_t bits = random_state += 0x9e3779b97f4a7c15u;
  bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9u;
  bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebu;
  return bits ^ (bits >> 31);
}

// One of the set bits, each as likely.
unsigned choose_bit(uint32_t bits, uint32_t random) {
  uint32_t before = uint32_t(uint64_t(random) * unsigned(std::popcount(bits)) >> 32);
#if defined(__BMI2__)
  return unsigned(std::countr_zero(_pdep_u32(1u << before, bits)));
#else
  for (; before > 0; --before) bits &= bits - 1;
  return unsigned(std::countr_zero(bits));
#endif
}

Thread* choose_thread(bool same_warp) {
  if (block.ready_warps == 0) return nullptr;
  uint64_t random = random_bits();
  unsigned warp = current->warp();
  if (!same_warp || block.warps[warp].ready == 0) warp = choose_bit(block.ready_warps, uint32_t(random));
  unsigned lane = choose_bit(block.warps[warp].ready, uint32_t(random >> 32));
  block.warps[warp].ready &= ~(1u << lane);
  if (block.warps[warp].ready == 0) block.ready_warps &= ~(1u << warp);
  return threads[warp * kWarpThreads + lane].get();
}

void make_ready(unsigned warp, uint32_t lanes) {
  block.warps[warp].ready |= lanes;
  if (block.warps[warp].ready != 0) block.ready_warps |= 1u << warp;
}

// Goes to a thread that can run, or to the host if there is none; returns when this thread is chosen again.
void leave(bool same_warp) {
  Thread* from = current;
  Thread* next = choose_thread(same_warp);
  if (next == from) return;
  current = next != nullptr ? next : from;
  from->fiber.switch_to(next != nullptr ? next->fiber : host);
}

void wait() {
  leave(block.ahead);
  current->waits_at = nullptr;
  if (block.cancelled) throw Cancelled();
}

bool same_place(const Place& a, const Place& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || strcmp(a.file_name(), b.file_name()) == 0);
}

void release_barrier_if_full() {
  for (Barrier& barrier : block.barriers) {
    if (barrier.arrived != block.alive) continue;
    block.barrier_value = barrier.value;
    block.barriers.clear();
    for (unsigned warp = 0; warp < block.warp_count; ++warp) make_ready(warp, block.warps[warp].alive);
    return;
  }
}

void release_meeting_if_full(unsigned warp_number, unsigned i) {
  Warp& warp = block.warps[warp_number];
  Meeting meeting = warp.meetings[i];
  if ((meeting.mask & warp.alive & ~meeting.arrived) != 0) return;
  warp.meetings[i] = warp.meetings[--warp.meeting_count];
  meeting.operate(warp.brought, meeting.arrived, meeting.place);
  make_ready(warp_number, meeting.arrived);
}

// The running thread has returned from the kernel, or was unwound.
void exit_thread() {
  unsigned warp = current->warp();
  current->copies.forget();
  block.warps[warp].alive &= ~(1u << current->lane());
  --block.alive;
  if (block.cancelled) return;
  release_barrier_if_full();
  for (unsigned i = block.warps[warp].meeting_count; i-- > 0;) release_meeting_if_full(warp, i);
}

void guarded(void (*action)()) {
  try {
    action();
  } catch (const Cancelled&) {
  } catch (...) {
    if (!block.failure) block.failure = std::current_exception();
  }
}

// A fiber runs the kernel for its thread in one block after another.
void fiber_main() {
  Fiber::started();
  for (;;) {
    guarded([] { kernel_body(kernel_argument); });
    guarded(exit_thread);
    if (block.failure) {
      current->fiber.switch_to(host);
    } else {
      leave(block.ahead);
    }
  }
}

std::string text_of(uint3 index) {
  std::ostringstream text;
  text << '(' << index.x << ", " << index.y << ", " << index.z << ')';
  return text.str();
}

std::string text_of(const Place& place) {
  std::string file = place.file_name();
  return file.substr(file.rfind('/') + 1) + ':' + std::to_string(place.line());
}

bool is_alive(unsigned thread) { return block.warps[thread / kWarpThreads].alive >> thread % kWarpThreads & 1; }

// What a thread is doing, the same text for threads that wait together.
std::string state_of(unsigned number) {
  const Thread& thread = *threads[number];
  std::ostringstream text;
  if (!is_alive(number)) return "exited";
  if (thread.waits_at == nullptr) return "could run";
  text << "at " << thread.waits_at;
  if (thread.waits_mask != 0) text << " (mask 0x" << std::hex << thread.waits_mask << ")";
  text << " in " << text_of(thread.waits_place);
  return text.str();
}

std::string describe_deadlock() {
  bool warp_diverges = false;
  for (unsigned warp = 0; warp < block.warp_count; ++warp) warp_diverges |= block.warps[warp].meeting_count != 0;
  std::ostringstream text;
  text << (warp_diverges               ? "divergent warp"
           : block.barriers.size() > 1 ? "divergent barrier of the block"
                                       : "deadlock")
       << ": in block " << text_of(launch.block_index) << " no thread can go on";
  for (unsigned first = 0; first < block.thread_count;) {
    unsigned end = first + 1;
    while (end < block.thread_count && state_of(end) == state_of(first)) ++end;
    text << "\n  thread" << (end - first > 1 ? "s " : " ") << first;
    if (end - first > 1) text << '-' << end - 1;
    text << ' ' << state_of(first);
    first = end;
  }
  return text.str();
}

// Dynamic shared memory lies before a page that cannot be read, with poisoned or watched bytes between.
unsigned char* shared_memory_mapping() {
  static unsigned char* mapping = [] {
    void* mapped =
        mmap(nullptr, kSharedCapacity + kRedzone, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    return static_cast<unsigned char*>(mapped);
  }();
  return mapping;
}

void prepare_shared_memory() {
#if EMULATOR_ASAN
  ASAN_UNPOISON_MEMORY_REGION(launch.shared, kSharedCapacity + kRedzone);
#endif
  memset(launch.shared, kNan, launch.shared_bytes);
  memset(launch.shared + launch.shared_bytes, kCanary, kRedzone);
#if EMULATOR_ASAN
  ASAN_POISON_MEMORY_REGION(launch.shared + launch.shared_bytes, kSharedCapacity + kRedzone - launch.shared_bytes);
#endif
}

void check_canary() {
#if !EMULATOR_ASAN
  const unsigned char* end = launch.shared + launch.shared_bytes;
  for (size_t i = 0; i < kRedzone; ++i) {
    if (end[i] == kCanary) continue;
    throw Error("block " + text_of(launch.block_index) + " wrote byte " + std::to_string(i) + " past the end of its " +
                std::to_string(launch.shared_bytes) + " bytes of dynamic shared memory");
  }
#endif
}

size_t shared_memory_limit() {
  switch (the_device.compute_capability) {
    case 75:
      return 64 << 10;
    case 80:
    case 87:
      return 163 << 10;
    case 90:
    case 100:
    case 103:
      return 227 << 10;
    default:
      return 99 << 10;
  }
}

void check_launch(dim3 grid, dim3 threads_of_block, size_t shared_bytes) {
  auto refuse = [](const std::string& what) { throw Error("launch refused: " + what); };
  uint64_t count = uint64_t(threads_of_block.x) * threads_of_block.y * threads_of_block.z;
  if (current != nullptr) refuse("a kernel starts a kernel");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    refuse("a grid of " + text_of(grid) + " blocks");
  }
  if (count == 0 || count > kMaxThreads || threads_of_block.z > 64) {
    refuse("blocks of " + text_of(threads_of_block) + " threads");
  }
  if (shared_bytes > shared_memory_limit()) {
    refuse(std::to_string(shared_bytes) + " bytes of shared memory, of " + std::to_string(shared_memory_limit()) +
           " on sm_" + std::to_string(the_device.compute_capability));
  }
}

void prepare_threads(dim3 size) {
  block.thread_count = size.x * size.y * size.z;
  block.warp_count = (block.thread_count + kWarpThreads - 1) / kWarpThreads;
  for (unsigned i = 0; i < block.thread_count; ++i) {
    if (i == threads.size()) {
      threads.push_back(std::make_unique<Thread>());
      threads[i]->number = i;
      threads[i]->fiber.create(fiber_main, i);
    }
    threads[i]->index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
  }
}

// Ends the threads that have not exited.
void unwind_threads() {
  block.cancelled = true;
  for (unsigned warp = 0; warp < block.warp_count; ++warp) block.warps[warp].ready = 0;
  block.ready_warps = 0;
  for (unsigned i = 0; i < block.thread_count; ++i) {
    if (!is_alive(i)) continue;
    current = threads[i].get();
    if (current->waits_at == nullptr) {  // not begun, so that there is nothing to unwind
      exit_thread();
    } else {
      host.switch_to(current->fiber);
    }
  }
}

void run_block() {
  prepare_shared_memory();
  block.alive = block.thread_count;
  block.barriers.clear();
  block.cancelled = false;
  block.failure = nullptr;
  block.ahead = the_schedule == Schedule::kAny ? random_bits() >> 63 : the_schedule == Schedule::kAhead;
  block.ready_warps = 0;
  for (unsigned warp = 0; warp < block.warp_count; ++warp) {
    unsigned lanes = std::min(kWarpThreads, block.thread_count - warp * kWarpThreads);
    block.warps[warp].alive = ~0u >> (kWarpThreads - lanes);
    block.warps[warp].ready = 0;
    block.warps[warp].meeting_count = 0;
    make_ready(warp, block.warps[warp].alive);
  }
  for (unsigned i = 0; i < block.thread_count; ++i) threads[i]->waits_at = nullptr;

  current = threads[0].get();
  current = choose_thread(false);
  host.switch_to(current->fiber);
  if (!block.failure && block.alive != 0) block.failure = std::make_exception_ptr(Error(describe_deadlock()));
  if (block.alive != 0) unwind_threads();
  current = nullptr;
  if (block.failure) std::rethrow_exception(block.failure);
  check_canary();
}

}  // namespace

Device& device() { return the_device; }
void set_schedule(Schedule schedule) { the_schedule = schedule; }
void set_seed(uint64_t seed) { random_state = seed; }

void AsyncCopies::start(void* to, const void* from, bool valid) {
  memset(to, kNan, 16);
  copies_.push_back({to, from, valid});
}

void AsyncCopies::wait(size_t pending) {
  if (group_ends_.size() <= pending) return;
  size_t groups = group_ends_.size() - pending, count = group_ends_[groups - 1];
  for (size_t i = 0; i < count; ++i) {
    if (copies_[i].valid) {
      memcpy(copies_[i].to, copies_[i].from, 16);
    } else {
      memset(copies_[i].to, 0, 16);
    }
  }
  copies_.erase(copies_.begin(), copies_.begin() + count);
  group_ends_.erase(group_ends_.begin(), group_ends_.begin() + groups);
  for (size_t& end : group_ends_) end -= count;
}

void AsyncCopies::forget() {
  copies_.clear();
  group_ends_.clear();
}

void fail(const std::string& what, const Place& place) {
  throw Error("block " + text_of(launch.block_index) + ", thread " + text_of(current->index) + ": " + what + " in " +
              text_of(place));
}

bool in_shared_memory(const void* from, size_t bytes) {
  uintptr_t begin = uintptr_t(from), shared = uintptr_t(launch.shared);
  return begin >= shared && begin + bytes <= shared + launch.shared_bytes;
}

int block_barrier(const char* name, int value, Combine combine, const Place& place) {
  current->waits_at = name;
  current->waits_mask = 0;
  current->waits_place = place;
  Barrier* mine = nullptr;
  for (Barrier& barrier : block.barriers) {
    if (barrier.name == name && same_place(barrier.place, place)) mine = &barrier;
  }
  if (mine != nullptr) {
    ++mine->arrived;
    mine->value = combine(mine->value, value);
  } else {
    block.barriers.push_back({name, place, 1, value});
  }
  release_barrier_if_full();
  wait();
  return block.barrier_value;
}

void meet(const char* name, uint32_t mask, void* mine, Operate operate, const Place& place) {
  Warp& warp = block.warps[current->warp()];
  uint32_t me = 1u << current->lane();
  if ((mask & me) == 0) fail(std::string("the mask of ") + name + " does not name the calling lane", place);
  current->waits_at = name;
  current->waits_mask = mask;
  current->waits_place = place;
  warp.brought[current->lane()] = mine;
  unsigned i = 0;
  while (i < warp.meeting_count && !(warp.meetings[i].mask == mask && warp.meetings[i].operate == operate &&
                                     same_place(warp.meetings[i].place, place))) {
    ++i;
  }
  if (i == warp.meeting_count) warp.meetings[warp.meeting_count++] = {name, mask, 0, operate, place};
  warp.meetings[i].arrived |= me;
  release_meeting_if_full(current->warp(), i);
  wait();
}

void yield() {
  current->waits_at = "a failed atomicCAS";
  current->waits_mask = 0;
  make_ready(current->warp(), 1u << current->lane());
  leave(false);
  current->waits_at = nullptr;
  if (block.cancelled) throw Cancelled();
}

void run_body(dim3 grid, dim3 threads_of_block, size_t shared_bytes, void (*body)(const void*), const void* argument) {
  check_launch(grid, threads_of_block, shared_bytes);
  launch = {grid, threads_of_block, {}, shared_memory_mapping(), shared_bytes};
  kernel_body = body;
  kernel_argument = argument;
  prepare_threads(threads_of_block);

  // The blocks in the order of a random arithmetic sequence modulo their number.
  uint64_t count = uint64_t(grid.x) * grid.y * grid.z;
  uint64_t number = random_bits() % count, step = random_bits() % count;
  while (std::gcd(step, count) != 1) step = (step + 1) % count;
  for (uint64_t i = 0; i < count; ++i, number = (number + step) % count) {
    launch.block_index = {unsigned(number % grid.x), unsigned(number / grid.x % grid.y),
                          unsigned(number / (uint64_t(grid.x) * grid.y))};
    run_block();
  }
}

}  // namespace emulator
