// A persistent team of threads that share the units of one op at a time.
//
// Owns threads and how units reach them; knows nothing of what a unit computes. Members take units one by one
// from a common counter, so a slow core takes fewer of them. Nobody waits for a member that has not woken up:
// an op ends when its last unit does. A member waits by spinning, where every member has a CPU, then sleeps.
//
// Where every member has a CPU they are bound to a core each, as long as nobody else wants it
// (team_binding.h).

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "cpus.h"
#include "team_binding.h"

namespace kvfold {

// The system starts no more threads.
struct ThreadsRefused : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Lets the body of a unit know which one its member does next.
class NextUnit {
 public:
  // -1: none is left. The member's from now on, even where others are idle: ask once, near the unit's end.
  int64_t take() {
    ticket_ = tickets_.fetch_add(1);
    is_taken_ = true;
    return is_valid(ticket_) ? unit_of(ticket_) : -1;
  }

 private:
  friend class ThreadTeam;
  explicit NextUnit(std::atomic<uint64_t>& tickets) : tickets_(tickets) {}

  // A unit in its low half, the number of units in its high one.
  static uint64_t ticket(int64_t count, int64_t unit) {
    return static_cast<uint64_t>(count) << 32 | static_cast<uint64_t>(unit);
  }
  static int64_t unit_of(uint64_t ticket) { return static_cast<uint32_t>(ticket); }
  static int64_t count_of(uint64_t ticket) { return static_cast<int64_t>(ticket >> 32); }
  static bool is_valid(uint64_t ticket) { return unit_of(ticket) < count_of(ticket); }

  // Of the next unit, now at the latest.
  uint64_t ticket() {
    if (!is_taken_) take();
    return ticket_;
  }

  std::atomic<uint64_t>& tickets_;
  uint64_t ticket_ = 0;
  bool is_taken_ = false;
};

class ThreadTeam {
 public:
  // `size` members, the calling thread included: member 0 is whoever calls for_each. Throws ThreadsRefused.
  explicit ThreadTeam(int size) {
    // With more members than CPUs a spinning member keeps a working one from its CPU.
    if (size <= usable_cpus()) spins_ = kSpins;
    members_.reserve(size - 1);
    try {
      for (int member = 1; member < size; member++) {
        members_.emplace_back([this, member] { work(member); });
      }
    } catch (const std::system_error& error) {
      const int started = this->size();
      stop();
      throw ThreadsRefused("threads: " + std::to_string(size) + ", the system started " +
                           std::to_string(started) + " (" + error.code().message() + "): ask for fewer.");
    } catch (...) {
      stop();
      throw;
    }
  }

  ~ThreadTeam() { stop(); }

  ThreadTeam(const ThreadTeam&) = delete;
  ThreadTeam& operator=(const ThreadTeam&) = delete;

  int size() const { return static_cast<int>(members_.size()) + 1; }
  bool spins() const { return spins_ > 0; }

  // Calls body(unit, member) once for each unit of [0, count), in any order, and returns when all are done.
  // An exception of a unit is thrown again here, after the others. One caller at a time.
  template <typename Body>
  void for_each(int64_t count, const Body& body) {
    for_each_with_next(count, [&](int64_t unit, int member, NextUnit&) { body(unit, member); });
  }

  // The same for body(unit, member, next).
  template <typename Body>
  void for_each_with_next(int64_t count, const Body& body) {
    if (count <= 0) return;
    if (count == 1 || members_.empty()) {
      for (int64_t unit = 0; unit < count; unit++) {
        std::atomic<uint64_t> tickets{NextUnit::ticket(count, unit + 1)};
        NextUnit next(tickets);
        body(unit, 0, next);
      }
      return;
    }
    body_ = &body;
    call_ = [](const void* erased, int64_t unit, int member, NextUnit& next) {
      (*static_cast<const Body*>(erased))(unit, member, next);
    };
    finished_.store(0, std::memory_order_relaxed);
    tickets_.store(NextUnit::ticket(count, 0));
    if (sleeping_.load() > 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_members_.notify_all();
    }
    take_units(0);
    wait_finished(count);
    if (spins()) binding_.caller_looks();
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  // About 50 us at 40 cycles a pause: longer than the gap between two ops, shorter than that between two
  // steps.
  static constexpr int kSpins = 4000;

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
  }

  // A ticket holds the count of the op it was drawn from, so a member that comes late draws an invalid one;
  // while a valid ticket is out its op cannot end, so body_ and call_ belong to it.
  void take_units(int member) {
    uint64_t ticket = NextUnit(tickets_).ticket();
    while (NextUnit::is_valid(ticket)) {
      NextUnit next(tickets_);
      try {
        call_(body_, NextUnit::unit_of(ticket), member, next);
      } catch (...) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (!error_) error_ = std::current_exception();
      }
      if (finished_.fetch_add(1) + 1 == NextUnit::count_of(ticket) && caller_sleeps_.load()) {
        std::lock_guard<std::mutex> lock(mutex_);
        wake_caller_.notify_one();
      }
      ticket = next.ticket();
    }
  }

  void work(int member) {
    for (;;) {
      for (int spin = 0; spin < spins_ && !NextUnit::is_valid(tickets_.load(std::memory_order_relaxed));
           spin++)
        pause();
      if (!NextUnit::is_valid(tickets_.load())) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleeping_.fetch_add(1);
        wake_members_.wait(lock, [this] { return stop_.load() || NextUnit::is_valid(tickets_.load()); });
        sleeping_.fetch_sub(1);
        if (stop_.load()) return;
      }
      take_units(member);
      if (spins()) binding_.member_looks();
    }
  }

  void stop() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_.store(true);
    }
    wake_members_.notify_all();
    for (std::thread& member : members_) member.join();
  }

  void wait_finished(int64_t count) {
    for (int spin = 0; spin < spins_ && finished_.load() != count; spin++) pause();
    if (finished_.load() == count) return;
    std::unique_lock<std::mutex> lock(mutex_);
    caller_sleeps_.store(true);
    wake_caller_.wait(lock, [this, count] { return finished_.load() == count; });
    caller_sleeps_.store(false);
  }

  int spins_ = 0;
  TeamBinding binding_;
  std::vector<std::thread> members_;
  const void* body_ = nullptr;
  void (*call_)(const void*, int64_t, int, NextUnit&) = nullptr;
  // High half: units of the op. Low half: the next one to be taken.
  alignas(64) std::atomic<uint64_t> tickets_{0};
  alignas(64) std::atomic<int64_t> finished_{0};
  alignas(64) std::atomic<int> sleeping_{0};
  std::atomic<bool> caller_sleeps_{false};
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::condition_variable wake_members_, wake_caller_;
  std::exception_ptr error_;
};

}  // namespace kvfold
