// Binds the members of a team to a core each while they have their cores to themselves.
//
// A bound member whose core is taken waits while another core is free, and all wait for its unit. So
// everybody looks now and then how long it waited for a CPU: while nobody does, members are bound to the core
// they run on, no two to one; once somebody does, all are free again, as they were before. The caller's
// thread is the user's, and threads that it starts inherit its CPUs: it looks and is never bound.
//
// What it costs and wins: docs/notes/cpu-kernels.md.

#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <utility>

#include "cpus.h"

namespace kvfold {

// Whether a team has its CPUs to itself, by what its threads tell.
class Calm {
 public:
  static constexpr int64_t kMs = 1'000'000;  // ns
  // How often a thread tells. Beside one that spins it waits for a third to a half of that; alone for 3 to 9
  // ms now and then, a time slice of somebody's.
  static constexpr int64_t kEvery = 100 * kMs;
  static constexpr int64_t kQuiet = 1000 * kMs;

  explicit Calm(int64_t now) : crowded_(now) {}

  // `times`: of one thread since it last told.
  void tell(int64_t now, CpuTimes times) {
    const bool told = times.ran > 0;  // else the system does not tell
    if (!told || times.waited > std::max(times.ran, kEvery / 2) / 5) crowded_.store(now);
  }
  bool holds(int64_t now) const { return now - crowded_.load() >= kQuiet; }

 private:
  std::atomic<int64_t> crowded_;  // when a thread last waited; there is no calm to start with
};

class TeamBinding {
 public:
  // Between two ops, on the caller's thread. A team may have several callers, in turn, each of which looks.
  // One that calls several teams tells whichever it calls when it is time.
  void caller_looks() {
    thread_local Look me{now(), thread_times()};
    looks(me);
  }
  // On that of another member.
  void member_looks() {
    thread_local Member me;
    if (!looks(me)) return;
    const bool calm = calm_.holds(me.looked);
    if (calm && me.core.none()) bind(me);
    if (!calm && me.core.any()) free(me);
  }

 private:
  struct Look {
    int64_t looked = 0;
    CpuTimes times;  // then
  };
  struct Member : Look {
    CpuSet core, before;  // what it is bound to, none where it is free; where it ran before that
  };

  static int64_t now() {
    using std::chrono::steady_clock, std::chrono::nanoseconds;
    return std::chrono::duration_cast<nanoseconds>(steady_clock::now().time_since_epoch()).count();
  }

  // False: it is too early.
  bool looks(Look& me) {
    const int64_t time = now();
    if (time - me.looked < Calm::kEvery) return false;
    me.looked = time;
    const CpuTimes before = std::exchange(me.times, thread_times());
    calm_.tell(time, {me.times.ran - before.ran, me.times.waited - before.waited});
    return true;
  }

  void bind(Member& me) {
    const CpuSet before = thread_cpus(), core = core_of(thread_cpu(), "/sys/devices/system/cpu") & before;
    const std::lock_guard<std::mutex> lock(mutex_);
    if ((taken_ & core).any() || !bind_thread(core)) return;
    taken_ |= core;
    me.core = core;
    me.before = before;
  }

  // CPUs that somebody else gave the thread meanwhile are left to it.
  void free(Member& me) {
    if (thread_cpus() == me.core) bind_thread(me.before);
    const std::lock_guard<std::mutex> lock(mutex_);
    taken_ &= ~me.core;
    me.core.reset();
  }

  Calm calm_{now()};
  std::mutex mutex_;
  CpuSet taken_;
};

}  // namespace kvfold
