// Threads: how work is shared out, how threads are woken and wait for each other, and memory for the call.
#pragma once

#include <omp.h>
#include <sched.h>

#include <cstdlib>
#include <new>

#include "cpu/isa/contract.h"

namespace bitfuse::BITFUSE_ISA {

// Not std::min: a weak symbol of a wide level must not be what the linker gives to a narrow one.
BITFUSE_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
BITFUSE_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
BITFUSE_INLINE int64_t round_up(int64_t a, int64_t multiple) {
  return (a + multiple - 1) / multiple * multiple;
}

// Part `index` of `parts` near-equal contiguous ranges of [0, count).
struct Range {
  int64_t begin, end;
};
BITFUSE_INLINE Range share(int64_t count, int64_t index, int64_t parts) {
  int64_t each = count / parts, more = count % parts;
  int64_t begin = index * each + least(index, more);
  return {begin, begin + each + (index < more)};
}

// Threads that stay awake between one `parallel` and the next, for a caller with hundreds of short ones in a
// row: handing out a job and collecting it costs two cache lines' ways between cores, some 0.2 us, where a
// region of OpenMP costs a microsecond or more.
class Crew {
 public:
  // f() on the calling thread, and `threads` - 1 others that take part in each `parallel` inside of it.
  template <class F>
  static void work(int threads, F f) {
    if (threads <= 1) return f();
    Crew crew;
    bool failed = false;
#pragma omp parallel num_threads(threads)
    {
      const int thread = omp_get_thread_num();
      Crew*& mine = current();
      mine = &crew;
      if (thread == 0) {
        crew.size_ = omp_get_num_threads();
        try {
          f();
        } catch (...) {  // of a kernel, which throws where memory ends and nowhere else
          failed = true;
        }
        crew.dismiss();
      } else {
        crew.serve(thread);
      }
      mine = nullptr;
    }
    if (failed) throw std::bad_alloc();
  }

  // Of the calling thread; null where it works alone.
  static Crew*& current() {
    thread_local Crew* crew = nullptr;
    return crew;
  }

  int size() const { return size_; }

  // f(thread, team) on `team` threads, from the one that `work` was called on.
  template <class F>
  void run(int team, F& f) {
    team = int(least(team, size_));
    if (team == 1) return f(0, 1);
    hand_out([](void* closure, int thread, int of) { (*static_cast<F*>(closure))(thread, of); }, &f, team);
    f(0, team);
    spin([&] { return __atomic_load_n(&done_, __ATOMIC_ACQUIRE) == size_ - 1; });
    __atomic_store_n(&done_, 0, __ATOMIC_RELAXED);
  }

  // Until all of a team are here.
  void wait(int team) {
    const uint32_t phase = __atomic_load_n(&phase_, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&here_, 1, __ATOMIC_ACQ_REL) == team) {
      __atomic_store_n(&here_, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&phase_, phase + 1, __ATOMIC_RELEASE);
    } else {
      spin([&] { return __atomic_load_n(&phase_, __ATOMIC_ACQUIRE) != phase; });
    }
  }

 private:
  using Job = void (*)(void*, int, int);

  void hand_out(Job job, void* closure, int team) {
    job_ = job, closure_ = closure, team_ = team;
    __atomic_store_n(&jobs_, jobs_ + 1, __ATOMIC_RELEASE);
  }
  void dismiss() { hand_out(nullptr, nullptr, 0); }

  void serve(int thread) {
    for (uint32_t seen = 0;;) {
      spin([&] { return __atomic_load_n(&jobs_, __ATOMIC_ACQUIRE) != seen; });
      ++seen;
      if (!job_) return;
      if (thread < team_) job_(closure_, thread, team_);
      // who has no part says so too: nobody may still look at this job when the next one is written
      __atomic_add_fetch(&done_, 1, __ATOMIC_ACQ_REL);
    }
  }

  // Where there are more threads than cores, whoever is waited for must get one.
  template <class F>
  static void spin(F ready) {
    for (int tries = 0; !ready(); ++tries) {
      if (tries < kTries) {
        pause();
      } else {
        sched_yield();
      }
    }
  }
  static constexpr int kTries = 2000;

  int size_ = 1;
  alignas(64) uint32_t jobs_ = 0;  // handed out so far
  Job job_ = nullptr;
  void* closure_ = nullptr;
  int team_ = 0;
  alignas(64) int done_ = 0;
  alignas(64) int here_ = 0;
  uint32_t phase_ = 0;
};

// f(thread, threads) on each of at most `threads` threads. All of them see the same `threads`, which can be
// fewer than asked for; no result depends on it.
template <class F>
void parallel(int threads, F f) {
  if (threads <= 1) return f(0, 1);
  if (Crew* crew = Crew::current()) return crew->run(threads, f);
#pragma omp parallel num_threads(threads)
  f(omp_get_thread_num(), omp_get_num_threads());
}

// Inside of `parallel`: until all threads of the team are here.
inline void wait_for_team(int team) {
  if (team == 1) return;
  if (Crew* crew = Crew::current()) return crew->wait(team);
#pragma omp barrier
}

// Threads worth waking for this many multiply-adds: a region costs about as much as 2^18 of them, a job of a
// crew as 2^14.
inline int threads_for(int64_t multiply_adds) {
  const Crew* crew = Crew::current();
  if (crew) return int(least(most(multiply_adds >> 14, 1), crew->size()));
  return int(least(most(multiply_adds >> 18, 1), omp_get_max_threads()));
}

// Memory of the calling thread that outlives the call, 64-byte aligned; its contents are whatever the last
// call left. Workers use slices of the caller's. It grows to the largest call's need, which every kernel
// bounds and states.
inline char* scratch(size_t bytes) {
  struct Block {
    char* data = nullptr;
    size_t size = 0;
    ~Block() { std::free(data); }
  };
  thread_local Block block;
  if (bytes > block.size) {
    std::free(block.data);
    block.size = 0;
    size_t rounded = (bytes + 4095) & ~size_t(4095);
    block.data = static_cast<char*>(std::aligned_alloc(64, rounded));
    if (!block.data) throw std::bad_alloc();
    block.size = rounded;
  }
  return block.data;
}

// Hands out 64-byte aligned arrays from one block of scratch. With a null block it only adds up the need.
class Carver {
 public:
  explicit Carver(char* block = nullptr) : block_(block) {}
  template <class T>
  T* take(int64_t count) {
    size_t at = used_;
    used_ += (size_t(count) * sizeof(T) + 63) & ~size_t(63);
    return reinterpret_cast<T*>(block_ ? block_ + at : nullptr);
  }
  size_t used() const { return used_; }

 private:
  char* block_;
  size_t used_ = 0;
};

}  // namespace bitfuse::BITFUSE_ISA
