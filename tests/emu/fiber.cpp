#include "fiber.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <new>

#if EMULATOR_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {
namespace {

#if EMULATOR_ASAN
constexpr size_t kStackBytes = 512 << 10;
#else
constexpr size_t kStackBytes = 128 << 10;
#endif
constexpr size_t kGuardBytes = 64 << 10;  // below the stack: an overflow ends the process
constexpr size_t kStaggerBytes = 5 * 64;  // an odd number of cache lines
constexpr size_t kStaggerRange = 32 << 10;

}  // namespace

#if EMULATOR_SWITCH
// Pushes what a called function must preserve, stores the stack pointer in *from, takes `to`'s, and pops. It leaves by
// a jump: the processor would predict a return to where this stack was called from, always wrongly.
extern "C" void hdrops_emulator_switch(void** from, void* to);
asm(R"(
.text
.p2align 4
.globl hdrops_emulator_switch
.hidden hdrops_emulator_switch
.type hdrops_emulator_switch, @function
hdrops_emulator_switch:
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
  popq %rcx
  jmp *%rcx
.size hdrops_emulator_switch, .-hdrops_emulator_switch
)");
#endif

Fiber::~Fiber() {
  if (mapping_ != nullptr) munmap(mapping_, kGuardBytes + kStackBytes + kStaggerRange);
}

void Fiber::create(void (*main)(), unsigned number) {
  size_t stagger = number * kStaggerBytes % kStaggerRange;
  mapping_ = mmap(nullptr, kGuardBytes + kStackBytes + kStaggerRange, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping_ == MAP_FAILED) {
    mapping_ = nullptr;
    throw std::bad_alloc();
  }
  mprotect(mapping_, kGuardBytes, PROT_NONE);
  stack_ = static_cast<char*>(mapping_) + kGuardBytes;
  stack_bytes_ = kStackBytes + stagger;
#if EMULATOR_SWITCH
  // As if `main` had been called, with the stack aligned as a call leaves it, and had switched away at once.
  void** top = reinterpret_cast<void**>(static_cast<char*>(stack_) + stack_bytes_);
  *--top = nullptr;  // where `main` would return to
  *--top = reinterpret_cast<void*>(main);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  stack_pointer_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = stack_bytes_;
  context_.uc_link = nullptr;
  makecontext(&context_, main, 0);
#endif
}

void Fiber::switch_to(Fiber& other) {
#if EMULATOR_ASAN
  if (other.stack_ == nullptr) {  // the processor thread's own stack
    pthread_attr_t attributes;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &other.stack_, &other.stack_bytes_);
    pthread_attr_destroy(&attributes);
  }
  __sanitizer_start_switch_fiber(&fake_stack_, other.stack_, other.stack_bytes_);
#endif
#if EMULATOR_SWITCH
  hdrops_emulator_switch(&stack_pointer_, other.stack_pointer_);
#else
  swapcontext(&context_, &other.context_);
#endif
#if EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
}

void Fiber::started() {
#if EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

}  // namespace emulator
