// How many CPUs this process may keep busy: its affinity mask, and the quota of its cgroup.
//
// Linux; elsewhere every CPU of the machine. Starts and pins no thread.

#pragma once

#include <string>

namespace kvfold {

// At least 1. The smaller of the affinity mask's CPUs and the whole CPUs of the quota.
int usable_cpus();

// The CPUs' worth of time that a cgroup and those above it grant, at least 1; a huge number where none is
// limited. `own`: the file that names the process's cgroups (/proc/self/cgroup); `root`: where cgroup file
// systems are mounted (/sys/fs/cgroup). Reads cpu.max (version 2) and cpu.cfs_quota_us (version 1).
int quota_cpus(const std::string& own, const std::string& root);

}  // namespace kvfold
