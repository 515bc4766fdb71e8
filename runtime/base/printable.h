// Bytes from files, made fit for a one-line message.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace stoker {

// At most about `limit` bytes of `text`; control characters and invalid UTF-8 as \xNN.
std::string printable(std::string_view text, size_t limit = 100);
// A path, whole.
std::string printable_path(std::string_view path);
// A key or name of a file, 'so'.
std::string in_quotes(std::string_view text);

}  // namespace stoker
