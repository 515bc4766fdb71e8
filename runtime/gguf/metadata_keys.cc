#include "runtime/gguf/metadata_keys.h"

#include <charconv>

#include "runtime/base/errors.h"
#include "runtime/base/printable.h"

namespace stoker {

namespace {

constexpr std::string_view kArchitecture = "{arch}";

constexpr MetadataKey kKeys[] = {
#define STOKER_METADATA_KEY(key, use, neutral, why) {key, KeyUse::use, neutral, why},
#include "runtime/gguf/metadata_keys.inc"
#undef STOKER_METADATA_KEY
};

// Returns whether `key` matches a key of the list, with {...} for one or more characters.
bool matches(std::string_view pattern, std::string_view key) {
  const size_t open = pattern.find('{');
  if (open == std::string_view::npos) return pattern == key;
  const std::string_view before = pattern.substr(0, open);
  const std::string_view after = pattern.substr(pattern.find('}', open) + 1);
  return key.size() > before.size() + after.size() && key.starts_with(before) &&
         key.ends_with(after);
}

// Returns the key as the list writes it.
std::string listed(std::string_view key, std::string_view architecture) {
  if (!architecture.empty() && key.size() > architecture.size() && key.starts_with(architecture) &&
      key[architecture.size()] == '.') {
    return std::string(kArchitecture) + std::string(key.substr(architecture.size()));
  }
  return std::string(key);
}

// Returns whether the value equals `text`, a word or a whole number.
bool equals(const GgufValue& v, std::string_view text) {
  if (v.is_string()) return v.as_string() == text;
  if (v.is_bool()) return v.as_bool() == (text == "true" || text == "1");
  int64_t number = 0;
  const char* const end = text.data() + text.size();
  const auto read = std::from_chars(text.data(), end, number);
  if (read.ec != std::errc{} || read.ptr != end) return false;
  return (v.is_int() || v.is_float()) && v.as_float() == static_cast<double>(number);
}

bool is_neutral(const GgufValue& v, std::string_view neutral) {
  if (v.is_array()) {
    for (const GgufValue& item : v.as_array()) {
      if (!is_neutral(item, neutral)) return false;
    }
    return true;
  }
  while (!neutral.empty()) {
    const size_t bar = neutral.find('|');
    if (equals(v, neutral.substr(0, bar))) return true;
    if (bar == std::string_view::npos) break;
    neutral.remove_prefix(bar + 1);
  }
  return false;
}

std::string shown(const GgufValue& v) {
  if (v.is_string()) return printable(v.as_string());
  if (v.is_bool()) return v.as_bool() ? "true" : "false";
  if (v.is_int()) return std::to_string(v.as_int());
  return v.is_float() ? std::to_string(v.as_float()) : v.describe();
}

std::string alternatives(std::string_view neutral) {
  if (neutral.empty()) return "none";
  std::string text;
  for (const char c : neutral) text += c == '|' ? std::string(" or ") : std::string(1, c);
  return text;
}

void check(const GgufFile& file, std::string_view architecture, KeyUse use, ErrorKind kind) {
  for (const auto& [key, value] : file.metadata()) {
    const MetadataKey* row = find_metadata_key(key, architecture);
    if (!row || row->use != use || is_neutral(value, row->neutral)) continue;
    throw Error(kind, file.path() + ": " + key + ": expected " + alternatives(row->neutral) +
                          ", found " + shown(value) + ": " + row->why);
  }
}

}  // namespace

const char* key_use_name(KeyUse use) {
  constexpr const char* kNames[] = {"used", "harmless", "refused", "no model"};
  return kNames[static_cast<int>(use)];
}

std::span<const MetadataKey> metadata_keys() { return kKeys; }

const MetadataKey* find_metadata_key(std::string_view key, std::string_view architecture) {
  const std::string name = listed(key, architecture);
  for (const MetadataKey& row : kKeys) {
    // The architecture's part is literal in both; only what follows may be a pattern.
    std::string_view pattern = row.key, rest = name;
    if (pattern.starts_with(kArchitecture)) {
      if (!rest.starts_with(kArchitecture)) continue;
      pattern.remove_prefix(kArchitecture.size());
      rest.remove_prefix(kArchitecture.size());
    }
    if (matches(pattern, rest)) return &row;
  }
  return nullptr;
}

void check_is_model(const GgufFile& file) {
  check(file, "", KeyUse::kNoModel, ErrorKind::kModelFile);
}

void check_computation(const GgufFile& file, std::string_view architecture) {
  check(file, architecture, KeyUse::kRefused, ErrorKind::kUnsupported);
}

std::vector<std::string> unknown_metadata(const GgufFile& file) {
  const std::string_view architecture = file.get_string("general.architecture", "");
  std::vector<std::string> unknown;
  if (architecture.empty()) return unknown;
  const std::string own = std::string(architecture) + ".";
  for (const auto& entry : file.metadata()) {
    if (entry.first.starts_with(own) && !find_metadata_key(entry.first, architecture)) {
      unknown.push_back(entry.first);
    }
  }
  return unknown;
}

}  // namespace stoker
