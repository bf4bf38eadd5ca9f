#include "cpus.h"

#include <algorithm>
#include <fstream>
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

// Of the cgroup in this folder alone.
int folder_quota(const std::string& folder) {
  double quota, period;
  std::ifstream version2(folder + "/cpu.max");  // "200000 100000", or "max 100000", which is no number
  if (version2 >> quota >> period) return whole_cpus(quota, period);
  std::ifstream quota_file(folder + "/cpu.cfs_quota_us"), period_file(folder + "/cpu.cfs_period_us");
  if (quota_file >> quota && period_file >> period) return whole_cpus(quota, period);  // -1: no quota
  return kNoQuota;
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
  std::ifstream file(own);
  for (std::string line; std::getline(file, line);) {  // number:controllers:/path
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

}  // namespace kvfold
