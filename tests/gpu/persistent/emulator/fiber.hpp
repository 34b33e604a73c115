// Stacks that one thread switches between: each stands for a thread of a GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

inline constexpr size_t kStackBytes = 64 * 1024;

#if defined(__x86_64__)

// Keeps what a function must keep on the stack in use, whose pointer goes to *from, and goes on
// with the stack `to`. swapcontext would ask the kernel for the signal mask each time.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.globl emulator_switch
emulator_switch:
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
)");

class Context {
 public:
  void start(void (*entry)()) {
    if (!stack_) stack_ = std::make_unique<std::byte[]>(kStackBytes);
    auto top = reinterpret_cast<uintptr_t>(stack_.get() + kStackBytes) & ~uintptr_t{15};
    auto* slots = reinterpret_cast<void**>(top) - 2;
    slots[0] = reinterpret_cast<void*>(entry);  // where the first switch returns to
    for (int i = 1; i <= 6; ++i) slots[-i] = nullptr;
    pointer_ = slots - 6;
  }
  void switch_to(Context& other) { emulator_switch(&pointer_, other.pointer_); }

 private:
  std::unique_ptr<std::byte[]> stack_;
  void* pointer_ = nullptr;
};

#else

class Context {
 public:
  void start(void (*entry)()) {
    if (!stack_) stack_ = std::make_unique<std::byte[]>(kStackBytes);
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_.get();
    context_.uc_stack.ss_size = kStackBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  void switch_to(Context& other) { swapcontext(&context_, &other.context_); }

 private:
  std::unique_ptr<std::byte[]> stack_;
  ucontext_t context_;
};

#endif

}  // namespace emulator
