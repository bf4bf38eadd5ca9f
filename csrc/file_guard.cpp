#include "file_guard.h"

#include <atomic>
#include <cstdint>
#include <cstring>
#include <mutex>

#if defined(__unix__) || defined(__APPLE__)
#include <signal.h>
#include <unistd.h>
#endif

namespace kvfold {
namespace {

// A checkpoint has one file, or as many as shards: 163 in the largest released one.
constexpr int kPlaces = 1024;
constexpr size_t kPathBytes = 256;  // of a longer path the end

struct Place {
  std::atomic<uintptr_t> start{0};  // 0: free
  std::atomic<uintptr_t> stop{0};
  char path[kPathBytes];
};

// The handler reads it without a lock: `start` is written last when a range comes, first when it goes.
Place places[kPlaces];
std::mutex changing;

#if defined(__unix__) || defined(__APPLE__)

struct sigaction previous;

// Only what may be called in a handler of signals.
void say(const char* text, size_t size) {
  while (size > 0) {
    const ssize_t written = write(STDERR_FILENO, text, size);
    if (written <= 0) return;
    text += written;
    size -= static_cast<size_t>(written);
  }
}

void say(const char* text) { say(text, strlen(text)); }

void say(uintptr_t number) {
  char digits[20];
  size_t at = sizeof(digits);
  do {
    digits[--at] = static_cast<char>('0' + number % 10);
    number /= 10;
  } while (number > 0);
  say(digits + at, sizeof(digits) - at);
}

void on_sigbus(int signal, siginfo_t* info, void* context) {
  const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
  for (const Place& place : places) {
    const uintptr_t start = place.start.load();
    if (start == 0 || address < start || address >= place.stop.load()) continue;
    say("kvfold: ");
    say(place.path);
    say(": byte ");
    say(address - start);
    say(" cannot be read any more: something shortened the file, or its disk failed, while the model ran "
        "from its "
        "map. Fetch it again; with --mmap off weights are copied at load and their file is not needed "
        "after.\n");
    _exit(1);
  }
  if ((previous.sa_flags & SA_SIGINFO) != 0) {
    previous.sa_sigaction(signal, info, context);
  } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
    previous.sa_handler(signal);
  } else {
    sigaction(SIGBUS, &previous, nullptr);  // the fault comes again, and ends the process as it would have
  }
}

void install() {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action = {};
    action.sa_sigaction = on_sigbus;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, &previous);
  });
}

#else

void install() {}

#endif

}  // namespace

bool guard_file(const void* start, size_t size, const std::string& path) {
  const std::lock_guard<std::mutex> lock(changing);
  install();
  for (Place& place : places) {
    if (place.start.load() != 0) continue;
    const size_t skipped = path.size() < kPathBytes ? 0 : path.size() - kPathBytes + 1;
    memcpy(place.path, path.c_str() + skipped, path.size() - skipped + 1);
    place.stop.store(reinterpret_cast<uintptr_t>(start) + size);
    place.start.store(reinterpret_cast<uintptr_t>(start));
    return true;
  }
  return false;
}

void release_file(const void* start) {
  const std::lock_guard<std::mutex> lock(changing);
  for (Place& place : places) {
    if (place.start.load() == reinterpret_cast<uintptr_t>(start)) {
      place.start.store(0);
      return;
    }
  }
}

}  // namespace kvfold
