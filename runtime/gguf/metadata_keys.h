// The use that the engine makes of each metadata key of a published file (metadata_keys.inc), so
// that nothing that a file says about its computation is ignored silently.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/gguf/gguf.h"

namespace stoker {

enum class KeyUse { kUsed, kHarmless, kRefused, kNoModel };
const char* key_use_name(KeyUse use);  // "used", "harmless", "refused", "no model"

struct MetadataKey {
  const char* key;  // with {arch} for the architecture, {name} for anything
  KeyUse use;
  const char* neutral;  // values that change nothing, separated by |
  const char* why;      // what another value asks for
};

std::span<const MetadataKey> metadata_keys();
// Returns null where the list has no such key; `architecture` is that of the file.
const MetadataKey* find_metadata_key(std::string_view key, std::string_view architecture);

// Throws Error(kModelFile) where a key says that the file is no model: an adapter, say.
void check_is_model(const GgufFile& file);
// Throws Error(kUnsupported) for a refused key whose value is not neutral.
void check_computation(const GgufFile& file, std::string_view architecture);

// Returns the keys of the file's architecture that the list does not have.
std::vector<std::string> unknown_metadata(const GgufFile& file);

}  // namespace stoker
