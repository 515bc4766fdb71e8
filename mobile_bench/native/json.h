// JSON objects and arrays as text, for lines of results.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <string_view>
#include <vector>

namespace stoker::bench {

// A value that is already JSON.
struct Json {
  std::string text;
};
inline const Json kNull{"null"};

inline Json to_json(const Json& value) { return value; }
inline Json to_json(bool value) { return {value ? "true" : "false"}; }
inline Json to_json(int value) { return {std::to_string(value)}; }
inline Json to_json(int64_t value) { return {std::to_string(value)}; }
inline Json to_json(double value) {
  if (!std::isfinite(value)) return kNull;
  char text[32];
  std::snprintf(text, sizeof(text), "%.9g", value);
  return {text};
}
// Bytes that are not ASCII are kept: results are UTF-8, as paths and names are.
inline Json to_json(std::string_view value) {
  std::string text = "\"";
  for (const char c : value) {
    if (c == '"' || c == '\\') {
      text += '\\';
      text += c;
    } else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
      char escape[8];
      std::snprintf(escape, sizeof(escape), "\\u%04x", static_cast<unsigned>(c));
      text += escape;
    } else {
      text += c;
    }
  }
  return {text + '"'};
}
inline Json to_json(const std::string& value) { return to_json(std::string_view(value)); }
inline Json to_json(const char* value) { return to_json(std::string_view(value)); }
template <class T>
Json to_json(const std::vector<T>& values) {
  std::string text = "[";
  for (const T& value : values) text += (text.size() > 1 ? ", " : "") + to_json(value).text;
  return {text + "]"};
}

class JsonObject {
 public:
  template <class T>
  JsonObject& set(const char* key, const T& value) {
    text_ += (text_.size() > 1 ? ", " : "") + to_json(key).text + ": " + to_json(value).text;
    return *this;
  }
  Json json() const { return {text_ + "}"}; }

 private:
  std::string text_ = "{";
};

}  // namespace stoker::bench
