// CPUs: how many this process may keep busy, which are one core's, how long a thread waits for one, and on
// which one it runs.
//
// Linux; elsewhere every CPU of the machine, and what the system does not tell is empty. Starts no thread.

#pragma once

#include <bitset>
#include <cstdint>
#include <string>

namespace kvfold {

// At least 1. The smaller of the affinity mask's CPUs and the whole CPUs of the quota.
int usable_cpus();

// The CPUs' worth of time that a cgroup and those above it grant, at least 1; a huge number where none is
// limited. `own`: the file that names the process's cgroups (/proc/self/cgroup); `root`: where cgroup file
// systems are mounted (/sys/fs/cgroup). Reads cpu.max (version 2) and cpu.cfs_quota_us (version 1).
int quota_cpus(const std::string& own, const std::string& root);

// By number; on a larger machine the system answers no call below.
using CpuSet = std::bitset<1024>;

// Where the calling thread may run. Empty: the system does not tell.
CpuSet thread_cpus();
// Of the calling thread; threads that it starts afterwards inherit it. False: refused.
bool bind_thread(const CpuSet& cpus);
// That the calling thread runs on; below 0: the system does not tell.
int thread_cpu();

// A CPU with its hyper-threads where `topology` names them (a CPU's folder is cpu0 in it:
// /sys/devices/system/cpu). Empty: no set has this CPU.
CpuSet core_of(int cpu, const std::string& topology);

// How long the calling thread has run since it started, and how long it was ready to and had no CPU, ns.
// Zeros: the system does not tell.
struct CpuTimes {
  int64_t ran = 0, waited = 0;
};
CpuTimes thread_times();

}  // namespace kvfold
