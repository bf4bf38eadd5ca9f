#include "cpus.h"

#include <algorithm>
#include <cstdio>
#include <limits>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

namespace kvfold {
namespace {

constexpr int kNoQuota = std::numeric_limits<int>::max();

int affinity_cpus() {
#if defined(__linux__)
  cpu_set_t mask;  // of 1024 CPUs: on a larger machine the call fails
  if (sched_getaffinity(0, sizeof(mask), &mask) == 0) return CPU_COUNT(&mask);
#endif
  return static_cast<int>(std::thread::hardware_concurrency());
}

int whole_cpus(double quota_us, double period_us) {
  if (quota_us <= 0 || period_us <= 0) return kNoQuota;
  return static_cast<int>(std::clamp(quota_us / period_us, 1.0, 1e6));
}

// Whole files through C, not iostreams: std::ifstream crashed where the extension's compiler and the
// process's libstdc++ were of different versions. Empty where there is no such file.
std::string text_of(const std::string& path) {
  std::string text;
  if (std::FILE* file = std::fopen(path.c_str(), "r")) {
    char piece[4096];
    for (size_t n; (n = std::fread(piece, 1, sizeof(piece), file)) > 0;) text.append(piece, n);
    std::fclose(file);
  }
  return text;
}

// Of the cgroup in this folder alone.
int folder_quota(const std::string& folder) {
  double quota, period;
  const std::string version2 = text_of(folder + "/cpu.max");  // "200000 100000", or "max 100000"
  if (std::sscanf(version2.c_str(), "%lf %lf", &quota, &period) == 2) return whole_cpus(quota, period);
  const std::string quota_text = text_of(folder + "/cpu.cfs_quota_us");  // -1: no quota
  const std::string period_text = text_of(folder + "/cpu.cfs_period_us");
  const bool has_both = std::sscanf(quota_text.c_str(), "%lf", &quota) == 1 &&
                        std::sscanf(period_text.c_str(), "%lf", &period) == 1;
  return has_both ? whole_cpus(quota, period) : kNoQuota;
}

// Of a cgroup and those above it. Inside a container the path may be the host's, of which only the root is
// mounted.
int path_quota(const std::string& mount, std::string path) {
  int cpus = folder_quota(mount);
  for (; path.size() > 1; path.resize(path.rfind('/'))) cpus = std::min(cpus, folder_quota(mount + path));
  return cpus;
}

}  // namespace

int quota_cpus(const std::string& own, const std::string& root) {
  int cpus = kNoQuota;
  const std::string text = text_of(own);
  for (size_t start = 0, end; start < text.size(); start = end + 1) {  // number:controllers:/path
    end = std::min(text.find('\n', start), text.size());
    const std::string line = text.substr(start, end - start);
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos || line.compare(second + 1, 1, "/") != 0) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const std::string path = line.substr(second + 1);
    if (controllers == ",,") cpus = std::min(cpus, path_quota(root, path));
    if (controllers.find(",cpu,") != std::string::npos)
      cpus = std::min(cpus, path_quota(root + "/cpu", path));
  }
  return cpus;
}

int usable_cpus() {
  return std::max(1, std::min(affinity_cpus(), quota_cpus("/proc/self/cgroup", "/sys/fs/cgroup")));
}

CpuSet thread_cpus() {
  CpuSet cpus;
#if defined(__linux__)
  cpu_set_t mask;
  if (sched_getaffinity(0, sizeof(mask), &mask) == 0) {
    for (size_t cpu = 0; cpu < cpus.size(); cpu++) cpus[cpu] = CPU_ISSET(cpu, &mask);
  }
#endif
  return cpus;
}

bool bind_thread(const CpuSet& cpus) {
#if defined(__linux__)
  cpu_set_t mask;
  CPU_ZERO(&mask);
  for (size_t cpu = 0; cpu < cpus.size(); cpu++) {
    if (cpus[cpu]) CPU_SET(cpu, &mask);
  }
  return sched_setaffinity(0, sizeof(mask), &mask) == 0;
#else
  return false;
#endif
}

CpuSet core_of(int cpu, const std::string& topology) {
  CpuSet core;
  if (cpu < 0 || static_cast<size_t>(cpu) >= core.size()) return core;
  core.set(cpu);
  const std::string list =  // "0,64", or "0-1"
      text_of(topology + "/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list");
  for (size_t start = 0, end; start < list.size(); start = end + 1) {
    end = std::min(list.find(',', start), list.size());
    size_t first, last;
    const int found = std::sscanf(list.c_str() + start, "%zu-%zu", &first, &last);
    for (size_t sibling = first; found > 0 && sibling <= (found == 2 ? last : first) && sibling < core.size();
         sibling++)
      core.set(sibling);
  }
  return core;
}

int thread_cpu() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

CpuTimes thread_times() {
  long long ran = 0, waited = 0;  // as schedstat(5) has them, then how often it ran
  const std::string text = text_of("/proc/thread-self/schedstat");
  if (std::sscanf(text.c_str(), "%lld %lld", &ran, &waited) != 2) return {};
  return {ran, waited};
}

}  // namespace kvfold
