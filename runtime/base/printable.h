// Functions that make bytes from files fit for a one-line message.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace stoker {

// Returns at most about `limit` bytes of `text`; control characters and invalid UTF-8 become \xNN.
std::string printable(std::string_view text, size_t limit = 100);
// Does the same with a whole path.
std::string printable_path(std::string_view path);
// Returns a key or name from a file between single quotes.
std::string in_quotes(std::string_view text);

}  // namespace stoker
