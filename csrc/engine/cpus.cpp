// SPDX-License-Identifier: Apache-2.0
// How many CPUs this process may use: those it is bound to, and no more than its control group's quota pays for, which
// are both Linux's; elsewhere, all that the machine has.
#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "engine/crew.h"

namespace tidegate {
namespace {

#if defined(__linux__)

// An OpenMP runtime that binds its threads has bound the calling one to a single CPU, which says nothing of the process.
bool is_thread_bound() {
    for (const char* name : {"OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY"})
        if (const char* value = std::getenv(name); value && *value) return true;
    return false;
}

int cpus_of_affinity() {
    for (int most = 1024; most <= 1 << 20; most *= 2) {   // the kernel refuses a set smaller than its own
        std::vector<unsigned long> set(static_cast<size_t>(most) / (8 * sizeof(unsigned long)));
        cpu_set_t* const cpus = reinterpret_cast<cpu_set_t*>(set.data());
        const size_t bytes = set.size() * sizeof(unsigned long);
        if (sched_getaffinity(0, bytes, cpus) == 0) return CPU_COUNT_S(bytes, cpus);
    }
    return 0;
}

// CPUs' worth of time, rounded up; 0 if there is no limit. One file says "quota period" (v2), or two say one each.
int cpus_of(std::istream& quota, std::istream& period) {
    double of_quota = 0, of_period = 0;
    if (!(quota >> of_quota) || !(period >> of_period) || of_quota <= 0 || of_period <= 0) return 0;
    return static_cast<int>((of_quota + of_period - 1) / of_period);
}
int cpus_of_directory(const std::string& directory) {
    if (std::ifstream both(directory + "/cpu.max"); both) return cpus_of(both, both);
    std::ifstream quota(directory + "/cpu.cfs_quota_us"), period(directory + "/cpu.cfs_period_us");
    return quota && period ? cpus_of(quota, period) : 0;
}

// The least of a group's limit and those of the groups around it.
int cpus_of_group(const std::string& root, std::string path) {
    int least = 0;
    while (true) {
        const int cpus = cpus_of_directory(root + path);
        if (cpus > 0 && (least == 0 || cpus < least)) least = cpus;
        if (path.empty()) return least;
        path.erase(std::min(path.rfind('/'), path.size()));
    }
}

// 0 if there is no limit. Lines are "id:controllers:path", with no controllers in version 2. In a container the path may
// be the host's, which is not there; then the root is this group.
int cpus_of_quota() {
    std::ifstream groups("/proc/self/cgroup");
    int least = 0;
    for (std::string line; std::getline(groups, line);) {
        const size_t first = line.find(':'), second = line.find(':', first + 1);
        if (second == std::string::npos) continue;
        const std::string controllers = line.substr(first + 1, second - first - 1);
        const bool has_cpu = ("," + controllers + ",").find(",cpu,") != std::string::npos;
        if (!controllers.empty() && !has_cpu) continue;
        std::string path = line.substr(second + 1);
        if (path == "/" || path.find("..") != std::string::npos) path.clear();
        for (const char* const root : {"", "/cpu", "/cpu,cpuacct", "/unified"}) {
            const int cpus = cpus_of_group(std::string("/sys/fs/cgroup") + root, path);
            if (cpus > 0 && (least == 0 || cpus < least)) least = cpus;
        }
    }
    return least;
}

#else

bool is_thread_bound() { return false; }
int cpus_of_affinity() { return 0; }
int cpus_of_quota() { return 0; }

#endif

int count_cpus() {
    const int bound = is_thread_bound() ? 0 : cpus_of_affinity(), paid = cpus_of_quota();
    const int cpus = bound > 0 ? bound : static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    return paid > 0 ? std::min(cpus, paid) : cpus;
}

}  // namespace

int available_cpus() {
    static const int cpus = count_cpus();
    return cpus;
}

}  // namespace tidegate
