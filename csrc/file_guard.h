// A file that something shortens while it is mapped: reading what is gone raises SIGBUS, which by default
// ends the process without a word. Here it ends with the file's name.
//
// Owns the handler of SIGBUS and the list of mapped ranges; maps nothing itself.

#pragma once

#include <cstddef>
#include <string>

namespace kvfold {

// From now on a fault in [start, start + size) names `path` on standard error and ends the process with
// code 1. Any other goes to whoever handled SIGBUS before. False where all places of the list are taken.
bool guard_file(const void* start, size_t size, const std::string& path);

// The range that starts here is not mapped any more.
void release_file(const void* start);

}  // namespace kvfold
