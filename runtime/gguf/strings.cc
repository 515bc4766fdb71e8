#include "runtime/gguf/strings.h"

#include <bit>
#include <cstring>
#include <functional>

namespace stoker {

std::shared_ptr<const Strings> Strings::of(std::shared_ptr<const GgufFile> file,
                                           std::string_view key) {
  const GgufValue* value = file->find(key);
  if (!value || !value->is_array() || value->element_type() != GgufValue::Type::string) {
    return nullptr;
  }
  std::shared_ptr<Strings> s(new Strings);
  const std::vector<std::string_view> all = value->as_string_array();
  s->file_ = std::move(file);
  if (all.empty()) return s;
  s->data_ = reinterpret_cast<const uint8_t*>(all.front().data()) - sizeof(uint64_t);
  s->offset_.reserve(all.size());
  for (const std::string_view text : all) {
    const auto* begin = reinterpret_cast<const uint8_t*>(text.data()) - sizeof(uint64_t);
    const auto offset = static_cast<uint64_t>(begin - s->data_);
    if (offset > UINT32_MAX) {
      throw Error(ErrorKind::kModelFile, s->file_->path() + ": " + std::string(key) +
                                             ": expected less than 4 GiB of text, found more");
    }
    s->offset_.push_back(static_cast<uint32_t>(offset));
  }
  s->slot_.assign(std::bit_ceil(2 * all.size()), -1);
  const size_t mask = s->slot_.size() - 1;
  for (size_t i = 0; i < all.size(); ++i) {
    size_t at = std::hash<std::string_view>{}(all[i]) & mask;
    while (s->slot_[at] >= 0 && s->at(s->slot_[at]) != all[i]) at = (at + 1) & mask;
    s->slot_[at] = static_cast<int32_t>(i);
  }
  return s;
}

std::string_view Strings::at(int64_t i) const {
  const uint8_t* entry = data_ + offset_[static_cast<size_t>(i)];
  uint64_t length;
  std::memcpy(&length, entry, sizeof length);
  return {reinterpret_cast<const char*>(entry) + sizeof length, static_cast<size_t>(length)};
}

int64_t Strings::find(std::string_view text) const {
  if (slot_.empty()) return -1;
  const size_t mask = slot_.size() - 1;
  size_t at = std::hash<std::string_view>{}(text)&mask;
  for (; slot_[at] >= 0; at = (at + 1) & mask) {
    if (this->at(slot_[at]) == text) return slot_[at];
  }
  return -1;
}

}  // namespace stoker
