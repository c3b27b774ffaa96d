// ThreadSanitizer and AddressSanitizer hooks, resolved at run time through weak symbols.
//
// The engine itself is compiled WITHOUT -fsanitize=thread; it tells TSan by hand where CUDA gives a
// happens-before edge. Each CUDA thread is a TSan fiber, and switches use flag 1 ("no
// synchronisation"), so nothing is ordered merely because the emulator runs threads one by one.
#pragma once

#include <cstddef>
#include <mutex>

extern "C" {
__attribute__((weak)) void* __tsan_get_current_fiber(void);
__attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
__attribute__((weak)) void __tsan_destroy_fiber(void* fiber);
__attribute__((weak)) void __tsan_switch_to_fiber(void* fiber, unsigned flags);
__attribute__((weak)) void __tsan_set_fiber_name(void* fiber, const char* name);
__attribute__((weak)) void __tsan_acquire(void* address);
__attribute__((weak)) void __tsan_release(void* address);
__attribute__((weak)) void AnnotateIgnoreReadsBegin(const char* file, int line);
__attribute__((weak)) void AnnotateIgnoreReadsEnd(const char* file, int line);
__attribute__((weak)) void AnnotateIgnoreWritesBegin(const char* file, int line);
__attribute__((weak)) void AnnotateIgnoreWritesEnd(const char* file, int line);
__attribute__((weak)) void AnnotateIgnoreSyncBegin(const char* file, int line);
__attribute__((weak)) void AnnotateIgnoreSyncEnd(const char* file, int line);

__attribute__((weak)) void __sanitizer_start_switch_fiber(void** fake_stack_save, const void* bottom,
                                                          size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* fake_stack_save, const void** bottom_old,
                                                           size_t* size_old);
__attribute__((weak)) void __asan_unpoison_memory_region(void const volatile* p, size_t size);
__attribute__((weak)) void __asan_poison_memory_region(void const volatile* p, size_t size);
}

namespace simt {

constexpr unsigned kTsanNoSync = 1;

extern const bool g_tsan, g_asan;  // which of them looks on

// A synchronisation object for TSan. Only its address matters; it needs a unique one.
struct SyncPoint {
  char unused = 0;
};

inline void hb_release(SyncPoint* s) {
  if (g_tsan) __tsan_release(s);
}
inline void hb_acquire(SyncPoint* s) {
  if (g_tsan) __tsan_acquire(s);
}

// The TSan runtime of LLVM 14 and later (clang-19; gcc from 13 on) multiplexes threads over 255
// slots. A thread that lost its slot gets another one in its next synchronising operation, but only
// a release records that in the thread's history; the accesses in between cannot be attributed
// later, and races with them are dropped silently. Every switch to a fiber therefore ends in a
// release that nobody acquires.
#if defined(__clang__) || __GNUC__ >= 13
constexpr bool kTsanHasSlots = true;
#else
constexpr bool kTsanHasSlots = false;
#endif
extern SyncPoint g_tsan_anchor;

inline void tsan_switch(void* fiber) {
  __tsan_switch_to_fiber(fiber, kTsanNoSync);
  if (kTsanHasSlots) __tsan_release(&g_tsan_anchor);
}

// Engine bookkeeping that may call malloc or memmove while on a fiber: their interceptors must not
// reach the race detector, which would see the engine's own memory shared between CUDA threads.
struct QuietScope {
  QuietScope() {
    if (!g_tsan) return;
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~QuietScope() {
    if (!g_tsan) return;
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
  QuietScope(const QuietScope&) = delete;
  QuietScope& operator=(const QuietScope&) = delete;
};

// The lock of what all threads of the engine share. TSan sees neither the lock nor what is done under it:
// two ranks that launch kernels one after the other would be ordered by it, through their host threads and
// the workers, and races between their kernels would go unseen.
class EngineLock {
 public:
  explicit EngineLock(std::mutex& mutex) : unseen_(), lock_(mutex) {}
  std::unique_lock<std::mutex>& operator*() { return lock_; }

 private:
  struct Unseen : QuietScope {
    Unseen() {
      if (g_tsan) AnnotateIgnoreSyncBegin("", 0);
    }
    ~Unseen() {
      if (g_tsan) AnnotateIgnoreSyncEnd("", 0);
    }
  };
  Unseen unseen_;  // until the lock is given back
  std::unique_lock<std::mutex> lock_;
};

}  // namespace simt
