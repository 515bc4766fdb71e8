// The control groups (Linux, versions 1 and 2) that bound this process, as far as it can see them.
#pragma once

#include <string>
#include <vector>

namespace stoker {

struct ControlGroup {
  int version = 0;     // 1 or 2
  std::string path;    // below the mount; "/" for its root
  std::string folder;  // with the group's files
};

// The files in which the system describes the groups; a test names others.
struct ControlGroupFiles {
  std::string groups = "/proc/self/cgroup";
  std::string mounts = "/proc/self/mountinfo";
  std::string root = "/sys/fs/cgroup";  // for systems whose mounts cannot be read
};

// Returns the process's own group for a controller ("cpu", "memory"), then those above it up to the
// root of the mount; nothing where there is no group. A group's limit bounds all groups below it.
//
// In a container the names in `groups` may be the host's while only a part of its tree is mounted;
// the mount then says which part. Where that does not help (a namespace of its own), the root of
// the mount is the nearest group that can be seen.
std::vector<ControlGroup> control_groups(const std::string& controller,
                                         const ControlGroupFiles& files = {});

// Returns the number of processors whose time the tightest quota grants, rounded up; 0 without a
// quota.
int cpu_quota(const ControlGroupFiles& files = {});

}  // namespace stoker
