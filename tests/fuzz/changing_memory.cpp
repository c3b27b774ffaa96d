#include "changing_memory.h"

#include <csignal>
#include <cstdlib>
#include <utility>

#if defined(__linux__) && defined(__x86_64__)

#include <sys/mman.h>
#include <ucontext.h>

namespace efa_ep::fuzzing {
namespace {

constexpr greg_t kTrapFlag = 0x100;  // of EFLAGS: a trap after the next instruction

// What signal handlers need; of the one instance.
std::vector<std::span<std::byte>> locked;
ChangingMemory::Change changes;
std::byte* touched = nullptr;
struct sigaction old_fault;
struct sigaction old_trap;

void protect(int protection) {
  for (const std::span<std::byte> memory : locked) {
    if (mprotect(memory.data(), memory.size(), protection) != 0) std::abort();
  }
}

bool is_locked(const std::byte* address) {
  for (const std::span<std::byte> memory : locked) {
    if (address >= memory.data() && address < memory.data() + memory.size()) return true;
  }
  return false;
}

void on_fault(int, siginfo_t* info, void* context) {
  auto* address = static_cast<std::byte*>(info->si_addr);
  if (!is_locked(address)) {
    // A real fault: it happens again, to whoever handled faults before.
    sigaction(SIGSEGV, &old_fault, nullptr);
    return;
  }
  touched = address;
  protect(PROT_READ | PROT_WRITE);
  static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_EFL] |= kTrapFlag;
}

void on_trap(int, siginfo_t*, void* context) {
  changes(touched);
  protect(PROT_NONE);
  static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_EFL] &= ~kTrapFlag;
}

}  // namespace

bool ChangingMemory::supported() { return true; }

ChangingMemory::ChangingMemory(std::vector<std::span<std::byte>> memory, Change change) {
  locked = std::move(memory);
  changes = std::move(change);
  struct sigaction action{};
  action.sa_flags = SA_SIGINFO;
  action.sa_sigaction = on_fault;
  sigaction(SIGSEGV, &action, &old_fault);
  action.sa_sigaction = on_trap;
  sigaction(SIGTRAP, &action, &old_trap);
  protect(PROT_NONE);
}

ChangingMemory::~ChangingMemory() {
  protect(PROT_READ | PROT_WRITE);
  sigaction(SIGSEGV, &old_fault, nullptr);
  sigaction(SIGTRAP, &old_trap, nullptr);
  locked.clear();
}

}  // namespace efa_ep::fuzzing

#else

namespace efa_ep::fuzzing {

bool ChangingMemory::supported() { return false; }
ChangingMemory::ChangingMemory(std::vector<std::span<std::byte>>, Change) {}
ChangingMemory::~ChangingMemory() = default;

}  // namespace efa_ep::fuzzing

#endif
