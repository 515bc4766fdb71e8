// Reads GGUF files: every count, length and offset is checked against the file before use.

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <limits>
#include <system_error>

#include "runtime/base/errors.h"
#include "runtime/gguf/gguf.h"
#include "runtime/base/printable.h"

namespace stoker {

static_assert(std::endian::native == std::endian::little, "GGUF values are read in place");

namespace {

using Type = GgufValue::Type;
namespace fs = std::filesystem;

constexpr uint64_t kMaxHeaderBytes = uint64_t{256} << 20;  // a 256K vocabulary takes 10 MB
constexpr uint64_t kMaxMetadata = 1 << 16;                 // keys; models have about 50
constexpr uint64_t kMaxTensors = 1 << 20;                  // unmerged experts: about 60000
constexpr uint64_t kMaxKeyBytes = 65535;
constexpr uint64_t kMaxTensorNameBytes = 128;  // ggml itself stops at 64
constexpr int kMaxArrayDepth = 4;
constexpr int64_t kMaxShards = 99999;  // five digits in the file name

template <typename T>
T load(const uint8_t* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

[[noreturn]] void fail_file(const std::string& path, const std::string& what) {
  throw Error(ErrorKind::kModelFile, printable_path(path) + ": " + what);
}

// Returns what a file that is no GGUF seems to be by its first bytes; empty where that is unclear.
const char* guess_content(std::string_view head) {
  const auto starts = [&](std::string_view prefix) {
    return head.substr(0, prefix.size()) == prefix;
  };
  const auto at = [&](size_t i) { return i < head.size() ? static_cast<uint8_t>(head[i]) : 0; };
  size_t text = 0;
  while (text < head.size() && (at(text) <= ' ' || at(text) >= 0x80)) ++text;  // blanks, a BOM
  if (text < 16 && text < head.size() && head[text] == '<') {
    return "an HTML or XML page: the download failed";
  }
  if (starts("version https://git-lfs"))
    return "a Git LFS pointer: the file itself was not fetched";
  if (starts(std::string_view("PK\3\4", 4))) return "a ZIP archive or PyTorch checkpoint";
  if (starts("\x1f\x8b")) return "a gzip archive";
  if (starts("\x28\xb5\x2f\xfd")) return "a zstd archive";
  if (starts("\x89HDF")) return "an HDF5 file";
  if (head.size() >= 8 && head.substr(4, 4) == "TFL3") return "a TensorFlow Lite model";
  if (at(0) == 0x80 && at(1) >= 2 && at(1) <= 5) return "a Python pickle or PyTorch checkpoint";
  if (starts("lmgg") || starts("fmgg") || starts("tjgg") || starts("algg")) {
    return "a GGML file from before GGUF: convert the model again";
  }
  if (head.size() >= 9 && head[8] == '{' &&
      load<uint64_t>(reinterpret_cast<const uint8_t*>(head.data())) < (uint64_t{1} << 32)) {
    return "a safetensors file";
  }
  if (at(0) == 0x08 && at(1) >= 1 && at(1) < 32 &&
      (at(2) == 0x12 || at(2) == 0x1a || at(2) == 0x3a || at(2) == 0x42)) {
    return "an ONNX model";
  }
  if (starts("{")) return "JSON text";
  return "";
}

}  // namespace

// ------------------------------------------------------------------------------------- parser

// Reads one shard into a GgufFile. Bytes are read from the file as the parse needs them and stay in
// one buffer; values are kept as offsets while the buffer can still move.
class GgufParser {
 public:
  static std::shared_ptr<const GgufFile> open(const std::string& path);
  static std::shared_ptr<const GgufFile> parse(const uint8_t* data, size_t size, uint64_t file_size,
                                               const std::string& name);

 private:
  GgufParser(GgufFile* out, std::string name) : out_(out), name_(std::move(name)) {}

  void from_file();
  void read_shard();
  void read_magic();
  void read_metadata(uint64_t count, std::vector<std::pair<std::string, GgufValue>>* metadata);
  void read_value(const std::string& key, Type type, int depth, GgufValue* value);
  Type read_value_type(const std::string& key);
  void read_directory(uint64_t count);
  void place_tensors(uint64_t alignment);
  void check_overlap(size_t first) const;
  std::string_view read_string(const char* what, uint64_t limit);
  template <typename T>
  T read(const char* what) {
    need(sizeof(T), what);
    const T value = load<T>(bytes_.get() + pos_);
    pos_ += sizeof(T);
    return value;
  }

  // Ensures that the next n bytes are in the buffer.
  void need(uint64_t n, const char* what) {
    if (filled_ - pos_ < n) fill(n, what);
  }
  void fill(uint64_t n, const char* what);
  [[noreturn]] void ends_early(const char* what, uint64_t n) const;
  [[noreturn]] void fail(const std::string& what) const { fail_file(name_, what); }

  static void index(GgufFile* file);
  static int64_t split_key(const GgufFile& file, const char* key, int64_t fallback);
  static void open_other_shards(GgufFile* file, const std::string& path);

  GgufFile* out_;
  std::string name_;
  std::FILE* stream_ = nullptr;
  HeaderBytes bytes_;
  uint64_t capacity_ = 0;  // bytes allocated
  uint64_t filled_ = 0;    // bytes read
  uint64_t pos_ = 0;       // bytes parsed; pos_ <= filled_ <= limit_
  uint64_t limit_ = 0;     // bytes that can be read: the file's, or those given
  uint64_t file_size_ = 0;
  int64_t split_no_ = 0;
  int64_t split_count_ = 0;
  int64_t split_tensors_ = -1;
};

void GgufParser::ends_early(const char* what, uint64_t n) const {
  throw HeaderEndsEarly(printable_path(name_) + ": " + what + ": expected " + std::to_string(n) +
                        " bytes at offset " + std::to_string(pos_) +
                        ", found the end of the file at " + std::to_string(limit_));
}

void GgufParser::fill(uint64_t n, const char* what) {
  if (n > limit_ - pos_) ends_early(what, n);
  const uint64_t end = pos_ + n;
  if (end > kMaxHeaderBytes) {
    fail(std::string(what) + ": expected a header of at most " +
         std::to_string(kMaxHeaderBytes >> 20) + " MiB, found one of " + std::to_string(end >> 20) +
         " MiB or more");
  }
  // Doubling keeps the number of reads small; what was read beyond the header is given back.
  const uint64_t want = std::min(limit_, std::max({end, 2 * capacity_, uint64_t{1} << 16}));
  auto* grown = static_cast<uint8_t*>(std::realloc(bytes_.get(), want));
  if (grown == nullptr) throw std::bad_alloc();
  static_cast<void>(bytes_.release());
  bytes_.reset(grown);
  capacity_ = want;
  errno = 0;
  const size_t got = std::fread(grown + filled_, 1, want - filled_, stream_);
  filled_ += got;
  if (filled_ < end) {
    if (std::ferror(stream_) != 0) {
      throw Error(ErrorKind::kDevice, printable_path(name_) + ": read failed at offset " +
                                          std::to_string(filled_) + ": " +
                                          std::generic_category().message(errno));
    }
    fail("file changed while it was read: expected " + std::to_string(limit_) + " bytes, found " +
         std::to_string(filled_));
  }
}

std::string_view GgufParser::read_string(const char* what, uint64_t limit) {
  const auto length = read<uint64_t>(what);
  if (length > limit) {
    fail(std::string(what) + ": expected at most " + std::to_string(limit) + " bytes, found " +
         std::to_string(length));
  }
  need(length, what);
  const auto* p = reinterpret_cast<const char*>(bytes_.get() + pos_);
  pos_ += length;
  return {p, static_cast<size_t>(length)};
}

void GgufParser::read_magic() {
  if (limit_ == 0) fail("expected a GGUF file, found an empty file");
  fill(std::min<uint64_t>(limit_, 64), "magic");
  const std::string_view head(reinterpret_cast<const char*>(bytes_.get()),
                              std::min<size_t>(filled_, 64));
  if (head.substr(0, 4) != "GGUF") {
    const std::string guess = guess_content(head);
    fail("magic: expected 'GGUF', found " + in_quotes(head.substr(0, 4)) +
         (guess.empty() ? "" : " (" + guess + ")"));
  }
  pos_ = 4;
  const auto version = read<uint32_t>("version");
  const auto refuse = [&](const std::string& found) {
    throw Error(ErrorKind::kUnsupported, printable_path(name_) + ": GGUF version: expected 2 or 3" +
                                             " (little-endian), found " + found);
  };
  if (version == 1) refuse("1: convert the model again");
  if ((version & 0xffff) == 0 && version != 0) {
    refuse("a big-endian file: convert the model for little-endian machines");
  }
  if (version != 2 && version != 3) refuse(std::to_string(version));
  if (out_->version_ == 0) out_->version_ = static_cast<int>(version);
}

Type GgufParser::read_value_type(const std::string& key) {
  const auto id = read<uint32_t>("value type");
  if (id >= kGgufValueTypes) {
    fail("key " + in_quotes(key) + ": expected a value type of 0 to 12, found " +
         std::to_string(id));
  }
  return static_cast<Type>(id);
}

// Checks the value at pos_, sets *value (where not null; data_ is left alone) and moves past it.
void GgufParser::read_value(const std::string& key, Type type, int depth, GgufValue* value) {
  const char* what = "metadata value";
  const auto check_bools = [&](uint64_t begin, uint64_t count) {
    for (uint64_t i = begin; i < begin + count; ++i) {
      if (bytes_[i] > 1) {
        fail("key " + in_quotes(key) + ": expected a bool of 0 or 1, found " +
             std::to_string(bytes_[i]));
      }
    }
  };
  if (value != nullptr) value->type_ = type;
  if (const int bytes = gguf_value_type_bytes(type); bytes != 0) {
    need(bytes, what);
    if (type == Type::boolean) check_bools(pos_, 1);
    pos_ += bytes;
    return;
  }
  if (type == Type::string) {
    const std::string_view text = read_string(what, kMaxHeaderBytes);
    if (value != nullptr) value->count_ = text.size();
    return;
  }
  if (depth == kMaxArrayDepth) {
    fail("key " + in_quotes(key) + ": expected arrays nested at most " +
         std::to_string(kMaxArrayDepth) + " deep, found more");
  }
  const Type element = read_value_type(key);
  const auto count = read<uint64_t>("array length");
  if (value != nullptr) {
    value->element_ = element;
    value->count_ = count;
  }
  const int bytes = gguf_value_type_bytes(element);
  const int least = bytes != 0 ? bytes : element == Type::string ? 8 : 12;  // bytes an element
  if (count > (limit_ - pos_) / least) {
    fail("key " + in_quotes(key) + ": expected an array that fits the file, found " +
         std::to_string(count) + " elements of type " + gguf_value_type_name(element) + " with " +
         std::to_string(limit_ - pos_) + " bytes left");
  }
  if (bytes != 0) {
    need(count * bytes, what);
    if (element == Type::boolean) check_bools(pos_, count);
    pos_ += count * bytes;
  } else {
    for (uint64_t i = 0; i < count; ++i) read_value(key, element, depth + 1, nullptr);
  }
}

void GgufParser::read_metadata(uint64_t count,
                               std::vector<std::pair<std::string, GgufValue>>* metadata) {
  std::vector<uint64_t> offsets;  // of each value's bytes
  for (uint64_t i = 0; i < count; ++i) {
    const std::string key(read_string("metadata key", kMaxKeyBytes));
    if (key.empty()) fail("metadata key " + std::to_string(i) + ": expected a name, found ''");
    GgufValue value;
    const Type type = read_value_type(key);
    const uint64_t begin = pos_;
    read_value(key, type, 0, &value);
    offsets.push_back(begin + (type == Type::string ? 8 : type == Type::array ? 12 : 0));
    metadata->emplace_back(key, value);
  }
  // The buffer may still move while the directory is read, so read_shard() turns these offsets into
  // pointers later.
  for (size_t i = 0; i < metadata->size(); ++i) {
    (*metadata)[i].second.data_ = reinterpret_cast<const uint8_t*>(offsets[i]);
  }
}

void GgufParser::read_directory(uint64_t count) {
  const int shard = static_cast<int>(out_->shards_.size()) - 1;
  for (uint64_t i = 0; i < count; ++i) {
    GgufTensor t;
    t.name = read_string("tensor name", kMaxTensorNameBytes);
    t.shard = shard;
    if (t.name.empty()) fail("tensor " + std::to_string(i) + ": expected a name, found ''");
    const std::string label = "tensor " + in_quotes(t.name);
    const auto n_dims = read<uint32_t>("tensor dimensions");
    if (n_dims < 1 || n_dims > 4) {
      fail(label + ": expected 1 to 4 dimensions, found " + std::to_string(n_dims));
    }
    t.n_dims = static_cast<int>(n_dims);
    int64_t elements = 1;
    for (int d = 0; d < t.n_dims; ++d) {
      const auto ne = read<uint64_t>("tensor shape");
      constexpr auto kMax = std::numeric_limits<int64_t>::max();
      if (ne == 0 || ne > static_cast<uint64_t>(kMax / elements)) {
        fail(label + ": expected a shape of 1 to 2^63-1 elements, found dimension " +
             std::to_string(d) + " = " + std::to_string(ne));
      }
      t.ne[d] = static_cast<int64_t>(ne);
      elements *= t.ne[d];
    }
    t.type = read<uint32_t>("tensor type");
    t.offset = read<uint64_t>("tensor offset");
    if (const GgufTensorType* type = find_gguf_tensor_type(t.type); type != nullptr) {
      if (t.ne[0] % type->block != 0) {
        fail(label + ": expected rows of a multiple of " + std::to_string(type->block) +
             " weights (" + type->name + "), found " + std::to_string(t.ne[0]));
      }
      const uint64_t blocks = static_cast<uint64_t>(elements) / type->block;
      if (blocks > std::numeric_limits<uint64_t>::max() / type->block_bytes) {
        fail(label + ": expected data that fit the file, found " + std::to_string(elements) +
             " elements");
      }
      t.nbytes = blocks * type->block_bytes;
    }
    out_->tensors_.push_back(std::move(t));
  }
}

// Turns the directory's offsets, which count from the data section, into offsets in the file, and
// checks them.
void GgufParser::place_tensors(uint64_t alignment) {
  const uint64_t data_begin = (pos_ + alignment - 1) / alignment * alignment;
  const uint64_t room = file_size_ > data_begin ? file_size_ - data_begin : 0;
  size_t first = out_->tensors_.size();
  while (first > 0 &&
         out_->tensors_[first - 1].shard + 1 == static_cast<int>(out_->shards_.size())) {
    --first;
  }
  for (size_t i = first; i < out_->tensors_.size(); ++i) {
    GgufTensor& t = out_->tensors_[i];
    if (t.offset % alignment != 0) {
      fail("tensor " + in_quotes(t.name) + ": expected an offset that is a multiple of " +
           std::to_string(alignment) + ", found " + std::to_string(t.offset));
    }
    if (data_begin > file_size_ || t.offset > room || t.nbytes > room - t.offset) {
      fail("tensor " + in_quotes(t.name) + ": expected " + std::to_string(t.nbytes) +
           " bytes at offset " + std::to_string(t.offset) + " of the data section, found " +
           std::to_string(room) + " bytes of data: the file is truncated or corrupt");
    }
    t.offset += data_begin;
  }
  check_overlap(first);
}

void GgufParser::check_overlap(size_t first) const {
  std::vector<const GgufTensor*> order;
  for (size_t i = first; i < out_->tensors_.size(); ++i) {
    if (out_->tensors_[i].nbytes != 0) order.push_back(&out_->tensors_[i]);
  }
  std::sort(order.begin(), order.end(),
            [](const auto* a, const auto* b) { return a->offset < b->offset; });
  for (size_t i = 1; i < order.size(); ++i) {
    const uint64_t end = order[i - 1]->offset + order[i - 1]->nbytes;
    if (order[i]->offset < end) {
      fail("tensor " + in_quotes(order[i]->name) + ": expected data at offset " +
           std::to_string(end) + " or later, found " + std::to_string(order[i]->offset) +
           ", inside tensor " + in_quotes(order[i - 1]->name));
    }
  }
}

void GgufParser::read_shard() {
  read_magic();
  const auto n_tensors = read<uint64_t>("tensor count");
  const auto n_metadata = read<uint64_t>("metadata count");
  // 33 and 14 bytes are the least that an entry takes, so no count can ask for more than the
  // file has; the vectors grow with what is really there.
  const auto check_count = [&](const char* what, uint64_t count, uint64_t least, uint64_t most) {
    const uint64_t fit = std::min((limit_ - pos_) / least, most);
    if (count > fit) {
      fail(std::string(what) + ": expected at most " + std::to_string(fit) + ", found " +
           std::to_string(count));
    }
  };
  check_count("tensor count", n_tensors, 33, kMaxTensors);
  check_count("metadata count", n_metadata, 14, kMaxMetadata);

  std::vector<std::pair<std::string, GgufValue>> metadata;
  read_metadata(n_metadata, &metadata);
  read_directory(n_tensors);

  if (auto* trimmed = static_cast<uint8_t*>(std::realloc(bytes_.get(), pos_)); trimmed != nullptr) {
    static_cast<void>(bytes_.release());
    bytes_.reset(trimmed);
  }
  for (auto& [key, value] : metadata) {
    value.data_ = bytes_.get() + reinterpret_cast<uintptr_t>(value.data_);
  }
  int64_t alignment = 32;
  for (const auto& [key, value] : metadata) {
    int64_t* const target = key == "general.alignment"     ? &alignment
                            : key == "split.no"            ? &split_no_
                            : key == "split.count"         ? &split_count_
                            : key == "split.tensors.count" ? &split_tensors_
                                                           : nullptr;
    if (target == nullptr) continue;
    try {
      *target = value.as_int();
    } catch (const Error& e) {
      fail("key " + in_quotes(key) + ": " + e.what());
    }
  }
  if (alignment < 8 || alignment > (1 << 20) || !std::has_single_bit(uint64_t(alignment))) {
    fail("key 'general.alignment': expected a power of two of 8 to 1048576, found " +
         std::to_string(alignment));
  }
  place_tensors(static_cast<uint64_t>(alignment));
  if (out_->shards_.size() == 1) out_->metadata_ = std::move(metadata);
  out_->headers_.push_back(std::move(bytes_));
  out_->shard_nbytes_.push_back(file_size_);
}

void GgufParser::from_file() {
  const fs::path path(std::u8string(name_.begin(), name_.end()));  // UTF-8 on Windows, bytes else
  std::error_code reason;
  const fs::file_status status = fs::status(path, reason);
  if (status.type() == fs::file_type::not_found) fail("no such file");
  if (status.type() == fs::file_type::none) fail("cannot be opened: " + reason.message());
  if (status.type() != fs::file_type::regular) {
    fail(std::string("expected a file, found ") +
         (status.type() == fs::file_type::directory ? "a directory" : "a device, pipe or socket"));
  }
#ifdef _WIN32
  stream_ = _wfopen(path.c_str(), L"rb");
#else
  stream_ = std::fopen(path.c_str(), "rb");
#endif
  if (stream_ == nullptr) fail("cannot be opened: " + std::generic_category().message(errno));
  struct Closer {
    std::FILE*& stream;
    ~Closer() { std::fclose(std::exchange(stream, nullptr)); }
  } closer{stream_};
  std::setvbuf(stream_, nullptr, _IONBF, 0);
  file_size_ = limit_ = fs::file_size(path, reason);
  if (reason) fail("size unknown: " + reason.message());
  read_shard();
}

// Sorts the keys and names; refuses duplicates.
void GgufParser::index(GgufFile* file) {
  const auto sorted = [](size_t n, const auto& name) {
    std::vector<uint32_t> order(n);
    for (uint32_t i = 0; i < n; ++i) order[i] = i;
    std::sort(order.begin(), order.end(),
              [&](uint32_t a, uint32_t b) { return name(a) < name(b); });
    return order;
  };
  const auto key = [&](uint32_t i) -> const std::string& { return file->metadata_[i].first; };
  const auto name = [&](uint32_t i) -> const std::string& { return file->tensors_[i].name; };
  file->metadata_by_key_ = sorted(file->metadata_.size(), key);
  file->tensors_by_name_ = sorted(file->tensors_.size(), name);
  for (size_t i = 1; i < file->metadata_by_key_.size(); ++i) {
    const std::string& k = key(file->metadata_by_key_[i]);
    if (k == key(file->metadata_by_key_[i - 1])) {
      fail_file(file->path(), "key " + in_quotes(k) + ": expected once, found twice");
    }
  }
  for (size_t i = 1; i < file->tensors_by_name_.size(); ++i) {
    const uint32_t a = file->tensors_by_name_[i - 1];
    const uint32_t b = file->tensors_by_name_[i];
    if (name(a) == name(b)) {
      fail_file(file->shards_[file->tensors_[std::max(a, b)].shard],
                "tensor " + in_quotes(name(a)) + ": expected once, found twice");
    }
  }
}

namespace {

// The parts of <prefix>-00002-of-00003.gguf: prefix, 2, 3; count is 0 for a path of another form.
struct ShardName {
  std::string prefix;
  int64_t number = 0;  // from 1
  int64_t count = 0;
};

ShardName parse_shard_name(const std::string& path) {
  constexpr size_t kTail = 20;  // "-00002-of-00003.gguf"
  if (path.size() < kTail) return {};
  const std::string tail = path.substr(path.size() - kTail);
  if (tail[0] != '-' || tail.substr(6, 4) != "-of-" || tail.substr(15) != ".gguf") return {};
  const auto digits = [&](size_t begin) -> int64_t {
    int64_t value = 0;
    for (size_t i = begin; i < begin + 5; ++i) {
      if (tail[i] < '0' || tail[i] > '9') return 0;
      value = value * 10 + (tail[i] - '0');
    }
    return value;
  };
  ShardName out{path.substr(0, path.size() - kTail), digits(1), digits(10)};
  return out.number >= 1 && out.number <= out.count ? out : ShardName{};
}

std::string shard_path(const std::string& prefix, int64_t number, int64_t count) {
  char tail[32];
  std::snprintf(tail, sizeof tail, "-%05d-of-%05d.gguf", static_cast<int>(number),
                static_cast<int>(count));
  return prefix + tail;
}

}  // namespace

std::shared_ptr<const GgufFile> GgufParser::parse(const uint8_t* data, size_t size,
                                                  uint64_t file_size, const std::string& name) {
  std::shared_ptr<GgufFile> file(new GgufFile);
  file->shards_.push_back(name);
  GgufParser parser(file.get(), name);
  parser.bytes_.reset(static_cast<uint8_t*>(std::malloc(std::max<size_t>(size, 1))));
  if (parser.bytes_ == nullptr) throw std::bad_alloc();
  if (size > 0) std::memcpy(parser.bytes_.get(), data, size);
  parser.capacity_ = parser.filled_ = parser.limit_ = size;
  parser.file_size_ = file_size;
  parser.read_shard();
  index(file.get());
  return file;
}

std::shared_ptr<const GgufFile> GgufParser::open(const std::string& path) {
  std::shared_ptr<GgufFile> file(new GgufFile);
  file->shards_.push_back(path);
  GgufParser first(file.get(), path);
  first.from_file();
  const ShardName shard = parse_shard_name(path);
  const int64_t count = first.split_count_;
  const std::string by_key = "key 'split.count': expected ";
  if (count > kMaxShards || count < 0) {
    fail_file(path, by_key + "at most 99999 shards, found " + std::to_string(count));
  }
  if (first.split_no_ != 0) {
    const int64_t of = std::max(count, shard.count);
    fail_file(path, "expected the first shard, found shard " + std::to_string(first.split_no_ + 1) +
                        " of " + std::to_string(of) + ": open " +
                        (shard.count > 0 ? printable_path(shard_path(shard.prefix, 1, of))
                                         : "the file whose split.no is 0"));
  }
  if (shard.count > 1 && shard.count != count) {
    fail_file(path, by_key + std::to_string(shard.count) + " as in the file name, found " +
                        (count == 0 ? "no such key" : std::to_string(count)));
  }
  if (count > 1 && (shard.count == 0 || shard.number != 1)) {
    char tail[32];
    std::snprintf(tail, sizeof tail, "-00001-of-%05d.gguf", static_cast<int>(count));
    fail_file(path, std::string("file name: expected one ending in ") + tail + " (shard 1 of " +
                        std::to_string(count) +
                        "), found another: the other shards cannot be found");
  }
  for (int64_t i = 1; i < count; ++i) {
    const std::string next = shard_path(shard.prefix, i + 1, count);
    std::error_code ignored;
    if (!fs::exists(fs::path(std::u8string(next.begin(), next.end())), ignored)) {
      fail_file(next, "no such file: it is shard " + std::to_string(i + 1) + " of " +
                          std::to_string(count) + " of the model");
    }
    file->shards_.push_back(next);
    GgufParser parser(file.get(), next);
    parser.from_file();
    if (parser.split_count_ != count) {
      fail_file(next, by_key + std::to_string(count) + " as in the first shard, found " +
                          std::to_string(parser.split_count_));
    }
    if (parser.split_no_ != i) {
      fail_file(next, "key 'split.no': expected " + std::to_string(i) + ", found " +
                          std::to_string(parser.split_no_));
    }
    if (parser.split_tensors_ != first.split_tensors_ && parser.split_tensors_ >= 0) {
      fail_file(next, "key 'split.tensors.count': expected " +
                          std::to_string(first.split_tensors_) + " as in the first shard, found " +
                          std::to_string(parser.split_tensors_));
    }
  }
  if (count > 0 && first.split_tensors_ >= 0 &&
      static_cast<uint64_t>(first.split_tensors_) != file->tensors_.size()) {
    fail_file(path, "key 'split.tensors.count': expected " + std::to_string(first.split_tensors_) +
                        " tensors in all shards, found " + std::to_string(file->tensors_.size()));
  }
  index(file.get());
  return file;
}

std::shared_ptr<const GgufFile> GgufFile::open(const std::string& path) {
  return GgufParser::open(path);
}

std::shared_ptr<const GgufFile> GgufFile::parse(const uint8_t* data, size_t size,
                                                uint64_t file_size, const std::string& name) {
  return GgufParser::parse(data, size, file_size, name);
}

}  // namespace stoker
