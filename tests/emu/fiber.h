// Fibers: stacks of their own within one thread of the processor, each of which runs until it switches to another.
// The switch is some instructions on x86-64 and swapcontext elsewhere; AddressSanitizer is told of every switch.
#pragma once
#include <cstddef>

#if defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)  // define it to try the other way here
#define EMULATOR_SWITCH 1
#else
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define EMULATOR_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATOR_ASAN 1
#endif
#endif

namespace emulator {

// Default-constructed, it stands for the processor thread's own stack, which is left by the first switch.
class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber();

  // Gives it a stack. `main` must never return. `number` staggers the stacks, so that the frames of the many fibers
  // that run the same function do not compete for the same cache lines.
  void create(void (*main)(), unsigned number);

  // Leaves this fiber, which must be the running one, for another; returns when something switches back to it.
  void switch_to(Fiber& other);

  // To be called first by the main function of a fiber.
  static void started();

 private:
#if EMULATOR_SWITCH
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
  void* mapping_ = nullptr;
  void* stack_ = nullptr;  // lowest address
  size_t stack_bytes_ = 0;
  void* fake_stack_ = nullptr;
};

}  // namespace emulator
