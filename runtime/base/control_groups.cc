#include "runtime/base/control_groups.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "runtime/base/system_file.h"

namespace stoker {

namespace {

struct Mount {
  std::string root;   // path of the group that is mounted
  std::string point;  // where
};

bool listed(const std::string& names, const std::string& name) {
  std::istringstream rest(names);
  for (std::string one; std::getline(rest, one, ',');) {
    if (one == name) return true;
  }
  return false;
}

// Decodes octal escapes: the system writes a space as \040.
std::string unescaped(const std::string& text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    const auto octal = [&](size_t at) { return text[at] >= '0' && text[at] <= '7'; };
    if (text[i] == '\\' && i + 3 < text.size() && octal(i + 1) && octal(i + 2) && octal(i + 3)) {
      out +=
          static_cast<char>((text[i + 1] - '0') * 64 + (text[i + 2] - '0') * 8 + text[i + 3] - '0');
      i += 3;
    } else {
      out += text[i];
    }
  }
  return out;
}

bool is_folder(const std::string& path) {
  std::error_code error;
  return std::filesystem::is_directory(path, error);
}

// Finds the mount of a controller. Lines are: id parent device root point options [tags] - type
// source options.
Mount mount_of(int version, const std::string& controller, const ControlGroupFiles& files) {
  std::ifstream in(files.mounts);
  for (std::string line; std::getline(in, line);) {
    std::istringstream words(line);
    std::string word, root, point, type, source, options;
    words >> word >> word >> word >> root >> point;
    while (words >> word && word != "-") {
    }
    if (!(words >> type >> source >> options)) continue;
    if (version == 1 ? type == "cgroup" && listed(options, controller) : type == "cgroup2") {
      return {unescaped(root), unescaped(point)};
    }
  }
  if (version == 1) return {"/", files.root + "/" + controller};
  const std::string unified = files.root + "/unified";
  return {"/", is_folder(unified) ? unified : files.root};
}

// Returns the path below the mount; "/" where it lies outside of what is mounted.
std::string below(const Mount& mount, const std::string& path) {
  std::string rest = path;
  if (mount.root != "/" && path.starts_with(mount.root) &&
      (path.size() == mount.root.size() || path[mount.root.size()] == '/')) {
    rest = path.substr(mount.root.size());
  }
  while (!rest.empty() && rest.back() == '/') rest.pop_back();
  const bool outside = (rest + "/").find("/../") != std::string::npos;
  return rest.empty() || outside || !is_folder(mount.point + rest) ? "/" : rest;
}

}  // namespace

std::vector<ControlGroup> control_groups(const std::string& controller,
                                         const ControlGroupFiles& files) {
  // Lines are number:controllers:path; version 2 has one without controllers.
  std::ifstream in(files.groups);
  int version = 0;
  std::string own;
  for (std::string line; std::getline(in, line);) {
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string names = line.substr(first + 1, second - first - 1);
    if (listed(names, controller)) {
      version = 1;
      own = line.substr(second + 1);
      break;
    }
    if (names.empty()) {
      version = 2;
      own = line.substr(second + 1);
    }
  }
  std::vector<ControlGroup> found;
  if (version == 0) return found;
  const Mount mount = mount_of(version, controller, files);
  for (std::string path = below(mount, own); path != "/";) {
    found.push_back({version, path, mount.point + path});
    const size_t slash = path.rfind('/');
    path = slash == 0 || slash == std::string::npos ? "/" : path.substr(0, slash);
  }
  found.push_back({version, "/", mount.point});
  return found;
}

int cpu_quota(const ControlGroupFiles& files) {
  int tightest = 0;
  for (const ControlGroup& group : control_groups("cpu", files)) {
    long long quota = -1, period = -1;  // microseconds; version 2: "max" without a quota
    if (group.version == 2) {
      const std::string line = first_line(group.folder + "/cpu.max");
      if (std::sscanf(line.c_str(), "%lld %lld", &quota, &period) != 2) continue;
    } else {
      quota = first_number(group.folder + "/cpu.cfs_quota_us");
      period = first_number(group.folder + "/cpu.cfs_period_us");
    }
    if (quota <= 0 || period <= 0) continue;
    const long long whole = (quota + period - 1) / period;
    const int processors = static_cast<int>(std::clamp(whole, 1LL, 1LL << 20));
    tightest = tightest == 0 ? processors : std::min(tightest, processors);
  }
  return tightest;
}

}  // namespace stoker
