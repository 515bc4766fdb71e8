// Readers of the small files in which Linux describes itself (/proc, /sys).
#pragma once

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <string>

namespace stoker {

// Returns the line without its newline; it is empty where there is no such file.
inline std::string first_line(const std::string& path) {
  std::ifstream in(path);
  std::string line;
  std::getline(in, line);
  return line;
}

// Returns the number that the first line begins with; -1 where there is none.
inline int64_t first_number(const std::string& path) {
  const std::string line = first_line(path);
  char* end = nullptr;
  const long long value = std::strtoll(line.c_str(), &end, 10);
  return end == line.c_str() ? -1 : value;
}

}  // namespace stoker
