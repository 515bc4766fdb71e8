// An array of strings in a file's metadata, found by number and by text without copies. It is for
// vocabularies and merges, whose hundreds of thousands of entries would be as many objects.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "runtime/gguf/gguf.h"

namespace stoker {

class Strings {
 public:
  // Returns the array of strings of this key; null if the file has none.
  static std::shared_ptr<const Strings> of(std::shared_ptr<const GgufFile> file,
                                           std::string_view key);

  int64_t size() const { return static_cast<int64_t>(offset_.size()); }
  std::string_view at(int64_t i) const;
  // Returns the number of this text (the last one's of equal texts), or -1 where there is none.
  int64_t find(std::string_view text) const;

 private:
  Strings() = default;

  std::shared_ptr<const GgufFile> file_;  // owns the bytes
  const uint8_t* data_ = nullptr;         // of the array: u64 length, bytes, ...
  std::vector<uint32_t> offset_;          // [size] of each entry's length
  std::vector<int32_t> slot_;             // open addressing, a power of two; -1: empty
};

}  // namespace stoker
