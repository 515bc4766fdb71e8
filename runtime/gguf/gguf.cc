#include "runtime/gguf/gguf.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "runtime/base/errors.h"
#include "runtime/base/printable.h"

namespace stoker {
namespace {

using Type = GgufValue::Type;

struct ValueType {
  const char* name;
  int bytes;  // of a value of fixed size; 0: string or array
};
constexpr ValueType kValueTypes[kGgufValueTypes] = {
    {"u8", 1},   {"i8", 1},     {"u16", 2},   {"i16", 2}, {"u32", 4}, {"i32", 4}, {"f32", 4},
    {"bool", 1}, {"string", 0}, {"array", 0}, {"u64", 8}, {"i64", 8}, {"f64", 8}};

const ValueType& value_type(Type type) { return kValueTypes[static_cast<uint32_t>(type)]; }

bool is_int_type(Type type) {
  return type != Type::f32 && type != Type::f64 && type != Type::boolean &&
         value_type(type).bytes != 0;
}
bool is_float_type(Type type) { return type == Type::f32 || type == Type::f64; }

// The types that ggml defines. The first sixteen are the formats of formats.inc; the others are
// only named.
constexpr GgufTensorType kTensorTypes[] = {
#define STOKER_FORMAT(name, id, block, bytes) {#name, id, block, bytes},
#include "kernels_cpu/formats.inc"
#undef STOKER_FORMAT
    {"Q8_1", 9, 32, 36},     {"Q8_K", 15, 256, 292},   {"IQ2_XXS", 16, 256, 66},
    {"IQ2_XS", 17, 256, 74}, {"IQ3_XXS", 18, 256, 98}, {"IQ1_S", 19, 256, 50},
    {"IQ3_S", 21, 256, 110}, {"IQ2_S", 22, 256, 82},   {"I8", 24, 1, 1},
    {"I16", 25, 1, 2},       {"I32", 26, 1, 4},        {"I64", 27, 1, 8},
    {"F64", 28, 1, 8},       {"IQ1_M", 29, 256, 56},   {"TQ1_0", 34, 256, 54},
    {"TQ2_0", 35, 256, 66},  {"NVFP4", 40, 64, 36},    {"Q1_0", 41, 128, 18}};

template <typename T>
T load(const uint8_t* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

[[noreturn]] void wrong_type(const char* expected, const std::string& found) {
  throw Error(ErrorKind::kModelFile, std::string("expected ") + expected + ", found " + found);
}

int64_t load_int(Type type, const uint8_t* p) {
  switch (type) {
    case Type::u8:
      return load<uint8_t>(p);
    case Type::i8:
      return load<int8_t>(p);
    case Type::u16:
      return load<uint16_t>(p);
    case Type::i16:
      return load<int16_t>(p);
    case Type::u32:
      return load<uint32_t>(p);
    case Type::i32:
      return load<int32_t>(p);
    case Type::boolean:
      return load<uint8_t>(p);
    case Type::u64: {
      const auto value = load<uint64_t>(p);
      if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
        wrong_type("an integer below 2^63", std::to_string(value));
      }
      return static_cast<int64_t>(value);
    }
    default:
      return load<int64_t>(p);
  }
}

double load_float(Type type, const uint8_t* p) {
  if (type == Type::f32) return load<float>(p);
  if (type == Type::f64) return load<double>(p);
  if (type == Type::u64) return static_cast<double>(load<uint64_t>(p));
  return static_cast<double>(load_int(type, p));
}

}  // namespace

const char* gguf_value_type_name(Type type) { return value_type(type).name; }
int gguf_value_type_bytes(Type type) { return value_type(type).bytes; }

bool GgufValue::is_int() const { return is_int_type(type_); }
bool GgufValue::is_float() const { return is_float_type(type_); }

std::string GgufValue::describe() const {
  if (!is_array()) return value_type(type_).name;
  return std::string("array of ") + value_type(element_).name + " [" + std::to_string(count_) + "]";
}

int64_t GgufValue::as_int() const {
  if (!is_int()) wrong_type("an integer", describe());
  return load_int(type_, data_);
}

uint64_t GgufValue::as_uint() const {
  if (type_ == Type::u64) return load<uint64_t>(data_);
  const int64_t value = as_int();
  if (value < 0) wrong_type("an integer of 0 or more", std::to_string(value));
  return static_cast<uint64_t>(value);
}

double GgufValue::as_float() const {
  if (!is_int() && !is_float()) wrong_type("a number", describe());
  return load_float(type_, data_);
}

bool GgufValue::as_bool() const {
  if (!is_bool()) wrong_type("a bool", describe());
  return *data_ != 0;
}

std::string_view GgufValue::as_string() const {
  if (!is_string()) wrong_type("a string", describe());
  return {reinterpret_cast<const char*>(data_), static_cast<size_t>(count_)};
}

Type GgufValue::element_type() const {
  if (!is_array()) wrong_type("an array", describe());
  return element_;
}

uint64_t GgufValue::size() const {
  if (!is_array()) wrong_type("an array", describe());
  return count_;
}

std::vector<int64_t> GgufValue::as_int_array() const {
  if (!is_array() || !(is_int_type(element_) || element_ == Type::boolean)) {
    wrong_type("an array of integers", describe());
  }
  std::vector<int64_t> out(count_);
  const int bytes = value_type(element_).bytes;
  for (uint64_t i = 0; i < count_; ++i) out[i] = load_int(element_, data_ + i * bytes);
  return out;
}

std::vector<float> GgufValue::as_float_array() const {
  if (!is_array() || !(is_int_type(element_) || is_float_type(element_))) {
    wrong_type("an array of numbers", describe());
  }
  std::vector<float> out(count_);
  if (element_ == Type::f32) {
    if (count_ > 0) std::memcpy(out.data(), data_, count_ * sizeof(float));
    return out;
  }
  const int bytes = value_type(element_).bytes;
  for (uint64_t i = 0; i < count_; ++i) {
    out[i] = static_cast<float>(load_float(element_, data_ + i * bytes));
  }
  return out;
}

std::vector<double> GgufValue::as_double_array() const {
  if (!is_array() || !(is_int_type(element_) || is_float_type(element_))) {
    wrong_type("an array of numbers", describe());
  }
  std::vector<double> out(count_);
  const int bytes = value_type(element_).bytes;
  for (uint64_t i = 0; i < count_; ++i) out[i] = load_float(element_, data_ + i * bytes);
  return out;
}

std::vector<std::string_view> GgufValue::as_string_array() const {
  if (!is_array() || element_ != Type::string) wrong_type("an array of strings", describe());
  std::vector<std::string_view> out(count_);
  const uint8_t* p = data_;
  for (auto& element : out) {
    const auto length = load<uint64_t>(p);
    element = {reinterpret_cast<const char*>(p + 8), static_cast<size_t>(length)};
    p += 8 + length;
  }
  return out;
}

// Returns the end of the bytes of a checked value of `type`.
static const uint8_t* skip_value(Type type, const uint8_t* p) {
  if (type == Type::string) return p + 8 + load<uint64_t>(p);
  if (type != Type::array) return p + value_type(type).bytes;
  const auto element = static_cast<Type>(load<uint32_t>(p));
  const auto count = load<uint64_t>(p + 4);
  p += 12;
  if (const int bytes = value_type(element).bytes; bytes != 0) return p + count * bytes;
  for (uint64_t i = 0; i < count; ++i) p = skip_value(element, p);
  return p;
}

std::vector<GgufValue> GgufValue::as_array() const {
  if (!is_array()) wrong_type("an array", describe());
  std::vector<GgufValue> out(count_);
  const uint8_t* p = data_;
  for (auto& element : out) {
    element.type_ = element_;
    element.data_ = p;
    if (element_ == Type::string) {
      element.count_ = load<uint64_t>(p);
      element.data_ = p + 8;
    } else if (element_ == Type::array) {
      element.element_ = static_cast<Type>(load<uint32_t>(p));
      element.count_ = load<uint64_t>(p + 4);
      element.data_ = p + 12;
    }
    p = skip_value(element_, p);
  }
  return out;
}

const GgufTensorType* find_gguf_tensor_type(uint32_t id) {
  for (const auto& type : kTensorTypes) {
    if (type.id == id) return &type;
  }
  return nullptr;
}

std::string gguf_tensor_type_name(uint32_t id) {
  const GgufTensorType* type = find_gguf_tensor_type(id);
  return type != nullptr ? type->name : "type " + std::to_string(id);
}

// ----------------------------------------------------------------------------------- GgufFile

const GgufValue* GgufFile::find(std::string_view key) const {
  const auto at =
      std::lower_bound(metadata_by_key_.begin(), metadata_by_key_.end(), key,
                       [&](uint32_t i, std::string_view k) { return metadata_[i].first < k; });
  if (at == metadata_by_key_.end() || metadata_[*at].first != key) return nullptr;
  return &metadata_[*at].second;
}

const GgufTensor* GgufFile::tensor(std::string_view name) const {
  const auto at =
      std::lower_bound(tensors_by_name_.begin(), tensors_by_name_.end(), name,
                       [&](uint32_t i, std::string_view n) { return tensors_[i].name < n; });
  if (at == tensors_by_name_.end() || tensors_[*at].name != name) return nullptr;
  return &tensors_[*at];
}

uint64_t GgufFile::nbytes() const {
  uint64_t sum = 0;
  for (const uint64_t bytes : shard_nbytes_) sum += bytes;
  return sum;
}

[[noreturn]] static void fail(const GgufFile& file, const std::string& what) {
  throw Error(ErrorKind::kModelFile, printable_path(file.path()) + ": " + what);
}

const GgufValue& GgufFile::require(std::string_view key) const {
  const GgufValue* value = find(key);
  if (value == nullptr) fail(*this, "key " + in_quotes(key) + ": expected, found no such key");
  return *value;
}

const GgufTensor& GgufFile::require_tensor(std::string_view name) const {
  const GgufTensor* t = tensor(name);
  if (t == nullptr) {
    fail(*this, "tensor " + in_quotes(name) + ": expected, found no such tensor");
  }
  return *t;
}

namespace {

// Adds the file and the key to the message of a failed conversion.
template <typename Convert>
auto convert(const GgufFile& file, std::string_view key, const Convert& to) {
  try {
    return to(file.require(key));
  } catch (const Error& e) {
    if (file.find(key) == nullptr) throw;
    fail(file, "key " + in_quotes(key) + ": " + e.what());
  }
}

}  // namespace

int64_t GgufFile::require_int(std::string_view key) const {
  return convert(*this, key, [](const GgufValue& v) { return v.as_int(); });
}
double GgufFile::require_float(std::string_view key) const {
  return convert(*this, key, [](const GgufValue& v) { return v.as_float(); });
}
bool GgufFile::require_bool(std::string_view key) const {
  return convert(*this, key, [](const GgufValue& v) { return v.as_bool(); });
}
std::string_view GgufFile::require_string(std::string_view key) const {
  return convert(*this, key, [](const GgufValue& v) { return v.as_string(); });
}
int64_t GgufFile::get_int(std::string_view key, int64_t fallback) const {
  return find(key) == nullptr ? fallback : require_int(key);
}
double GgufFile::get_float(std::string_view key, double fallback) const {
  return find(key) == nullptr ? fallback : require_float(key);
}
bool GgufFile::get_bool(std::string_view key, bool fallback) const {
  return find(key) == nullptr ? fallback : require_bool(key);
}
std::string_view GgufFile::get_string(std::string_view key, std::string_view fallback) const {
  return find(key) == nullptr ? fallback : require_string(key);
}

}  // namespace stoker
