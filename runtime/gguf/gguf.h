// A GGUF model file, read and checked: the metadata and the tensor directory of every shard. The
// weights themselves are not read here; GgufTensor says where they lie.
//
// Layout of a file (versions 2 and 3, little-endian):
//     "GGUF"  u32 version  u64 n_tensors  u64 n_metadata
//     n_metadata x { string key, u32 type, value }         string = u64 length, bytes
//     n_tensors  x { string name, u32 n_dims, u64 ne[n_dims], u32 type, u64 offset }
//     padding to general.alignment (32), then the data section that the offsets count from
// A model may be cut into shards named <prefix>-00001-of-0000N.gguf; the first one has the
// metadata, each has its own directory. Source: the GGUF specification of the ggml project.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "runtime/base/errors.h"

namespace stoker {

// One metadata value: a view into the header bytes that its GgufFile owns, valid as long as that
// lives. Accessors convert with checks and throw Error(kModelFile) "expected X, found Y".
class GgufValue {
 public:
  enum class Type : uint32_t {  // the ids of the file format
    u8,
    i8,
    u16,
    i16,
    u32,
    i32,
    f32,
    boolean,
    string,
    array,
    u64,
    i64,
    f64
  };

  Type type() const { return type_; }
  bool is_array() const { return type_ == Type::array; }
  bool is_int() const;    // one of the eight integer types
  bool is_float() const;  // f32 or f64
  bool is_bool() const { return type_ == Type::boolean; }
  bool is_string() const { return type_ == Type::string; }

  int64_t as_int() const;              // integer types; u64 above INT64_MAX throws
  uint64_t as_uint() const;            // integer types; a negative one throws
  double as_float() const;             // f32, f64 and the integer types
  bool as_bool() const;                // boolean
  std::string_view as_string() const;  // string; bytes, not necessarily UTF-8

  // These are for arrays. Each call decodes anew, so callers keep the result.
  Type element_type() const;                              // throws where this is no array
  uint64_t size() const;                                  // elements
  std::vector<int64_t> as_int_array() const;              // [size()] integer or boolean elements
  std::vector<float> as_float_array() const;              // [size()] f32, f64 or integer elements
  std::vector<double> as_double_array() const;            // [size()] the same, f64 kept whole
  std::vector<std::string_view> as_string_array() const;  // [size()] views as above
  std::vector<GgufValue> as_array() const;                // [size()] elements of any type

  // Returns "u32", "string", "array of f32 [262144]" and the like, for messages and listings.
  std::string describe() const;

 private:
  friend class GgufParser;
  Type type_ = Type::u8;
  Type element_ = Type::u8;        // of an array
  uint64_t count_ = 1;             // elements of an array; bytes of a string
  const uint8_t* data_ = nullptr;  // the value's bytes, unaligned, checked when parsed
};

inline constexpr uint32_t kGgufValueTypes = 13;
const char* gguf_value_type_name(GgufValue::Type type);  // "u8" ... "f64"
int gguf_value_type_bytes(GgufValue::Type type);         // 0: string or array

// A tensor type of the file format, whether or not this build computes with it.
struct GgufTensorType {
  const char* name;
  uint32_t id;
  int block;        // weights a block
  int block_bytes;  // bytes a block
};
const GgufTensorType* find_gguf_tensor_type(uint32_t id);  // null where unknown
std::string gguf_tensor_type_name(uint32_t id);            // "Q4_K", or "type <id>" where unknown

struct GgufTensor {
  std::string name;
  uint32_t type = 0;             // GGUF id; may be unknown to us
  int n_dims = 1;                // 1..4
  int64_t ne[4] = {1, 1, 1, 1};  // ne[0] is contiguous; unused ones are 1
  uint64_t offset = 0;           // bytes from the start of its shard file
  uint64_t nbytes = 0;           // 0 where the type is unknown
  int shard = 0;                 // index into shards()

  int64_t n_elements() const { return ne[0] * ne[1] * ne[2] * ne[3]; }
};

// Header bytes come from malloc, so that they grow and shrink by realloc: the size of a header is
// unknown before its end.
struct HeaderFree {
  void operator()(uint8_t* p) const { std::free(p); }
};
using HeaderBytes = std::unique_ptr<uint8_t[], HeaderFree>;

// Thrown where the bytes end before the header does.
class HeaderEndsEarly : public Error {
 public:
  explicit HeaderEndsEarly(const std::string& message) : Error(ErrorKind::kModelFile, message) {}
};

// A file is immutable once opened, so that threads may share it.
// (enable_shared_from_this lets the Python binding hand out the same shared_ptr.)
class GgufFile : public std::enable_shared_from_this<GgufFile> {
 public:
  // Opens a file, or a first shard and with it all others. Throws Error(kModelFile) where a
  // file is missing, truncated or corrupt, Error(kUnsupported) for version 1 or big-endian files.
  static std::shared_ptr<const GgufFile> open(const std::string& path);
  // Parses one shard from memory: data[size] are the first bytes (all of the header) of a file of
  // `file_size` bytes; `name` is for messages. The data are copied.
  static std::shared_ptr<const GgufFile> parse(const uint8_t* data, size_t size, uint64_t file_size,
                                               const std::string& name);

  GgufFile(const GgufFile&) = delete;
  GgufFile& operator=(const GgufFile&) = delete;

  const GgufValue* find(std::string_view key) const;      // null where absent
  const GgufTensor* tensor(std::string_view name) const;  // null where absent

  // The tensors are in file order, shard after shard.
  const std::vector<GgufTensor>& tensors() const { return tensors_; }
  // The metadata are those of the first shard, in file order (the others repeat only the split.*
  // keys).
  const std::vector<std::pair<std::string, GgufValue>>& metadata() const { return metadata_; }

  const std::string& path() const { return shards_.front(); }                  // as given to open()
  const std::vector<std::string>& shards() const { return shards_; }           // paths
  const std::vector<uint64_t>& shard_nbytes() const { return shard_nbytes_; }  // file sizes
  int version() const { return version_; }
  uint64_t nbytes() const;  // of all shards

  // Each returns the value of `key`, or `fallback` where it is absent. A value of another type
  // throws Error(kModelFile), which names the file, the key, the expected and the found type.
  int64_t get_int(std::string_view key, int64_t fallback) const;
  double get_float(std::string_view key, double fallback) const;
  bool get_bool(std::string_view key, bool fallback) const;
  std::string_view get_string(std::string_view key, std::string_view fallback) const;
  // These do the same, but an absent key throws Error(kModelFile).
  int64_t require_int(std::string_view key) const;
  double require_float(std::string_view key) const;
  bool require_bool(std::string_view key) const;
  std::string_view require_string(std::string_view key) const;
  const GgufValue& require(std::string_view key) const;
  const GgufTensor& require_tensor(std::string_view name) const;

 private:
  friend class GgufParser;
  GgufFile() = default;

  std::vector<std::string> shards_;
  std::vector<uint64_t> shard_nbytes_;
  std::vector<HeaderBytes> headers_;  // of each shard; the metadata values point into them
  std::vector<std::pair<std::string, GgufValue>> metadata_;
  std::vector<GgufTensor> tensors_;
  std::vector<uint32_t> metadata_by_key_;  // indices of metadata_, sorted by key
  std::vector<uint32_t> tensors_by_name_;  // indices of tensors_, sorted by name
  int version_ = 0;
};

}  // namespace stoker
