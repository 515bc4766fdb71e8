#include "runtime/base/printable.h"

#include <cstdint>
#include <cstdio>

namespace stoker {
namespace {

// Returns the length of the UTF-8 sequence at s[i], 0 where there is none (RFC 3629).
size_t utf8_length(std::string_view s, size_t i) {
  const auto byte = [&](size_t j) { return j < s.size() ? static_cast<uint8_t>(s[j]) : 0; };
  const unsigned lead = byte(i);
  if (lead < 0x80) return 1;
  const size_t n = lead >= 0xc2 && lead < 0xe0 ? 2 : (lead >> 4) == 0xe ? 3 : 0;
  const size_t length = lead >= 0xf0 && lead < 0xf5 ? 4 : n;
  for (size_t j = 1; j < length; ++j) {
    if ((byte(i + j) & 0xc0) != 0x80) return 0;
  }
  if ((lead == 0xe0 && byte(i + 1) < 0xa0) || (lead == 0xed && byte(i + 1) > 0x9f) ||
      (lead == 0xf0 && byte(i + 1) < 0x90) || (lead == 0xf4 && byte(i + 1) > 0x8f)) {
    return 0;
  }
  return length;
}

}  // namespace

std::string printable(std::string_view text, size_t limit) {
  std::string out;
  for (size_t i = 0; i < text.size();) {
    if (out.size() >= limit) return out + "...";
    const auto byte = static_cast<uint8_t>(text[i]);
    const size_t length = byte < 0x20 || byte == 0x7f ? 0 : utf8_length(text, i);
    if (length == 0) {
      char escape[5];
      std::snprintf(escape, sizeof escape, "\\x%02x", byte);
      out += escape;
      ++i;
    } else {
      out += text.substr(i, length);
      i += length;
    }
  }
  return out;
}

std::string printable_path(std::string_view path) { return printable(path, path.size() * 4); }

std::string in_quotes(std::string_view text) {
  std::string out(1, '\'');
  out += printable(text);
  out += '\'';
  return out;
}

}  // namespace stoker
