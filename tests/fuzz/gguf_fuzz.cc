// libFuzzer target: any bytes as a GGUF file give an Error or a file that can be read entirely.
// `make fuzz` builds and runs it; make_seeds.py writes the seed corpus.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "runtime/base/errors.h"
#include "runtime/gguf/gguf.h"

namespace {

using stoker::GgufFile;
using stoker::GgufValue;

volatile uint64_t sink;  // keeps the reads

void require(bool holds) {
  if (!holds) std::abort();
}

void read_bytes(std::string_view text) {
  uint64_t sum = 0;
  for (const char c : text) sum += static_cast<unsigned char>(c);
  sink = sum;
}

template <typename Call>
void tolerate(const Call& call) {
  try {
    call();
  } catch (const stoker::Error&) {
  }
}

void read_value(const GgufValue& value) {
  read_bytes(value.describe());
  tolerate([&] { sink = static_cast<uint64_t>(value.as_int()); });
  tolerate([&] { sink = value.as_uint(); });
  tolerate([&] { sink = value.as_float() > 0.0; });
  tolerate([&] { sink = value.as_bool(); });
  tolerate([&] { read_bytes(value.as_string()); });
  tolerate([&] { require(value.as_int_array().size() == value.size()); });
  tolerate([&] { require(value.as_float_array().size() == value.size()); });
  tolerate([&] { require(value.as_double_array().size() == value.size()); });
  tolerate([&] {
    for (const auto item : value.as_string_array()) read_bytes(item);
  });
  tolerate([&] {
    for (const auto& item : value.as_array()) read_value(item);
  });
}

void read_file(const GgufFile& file, uint64_t file_size) {
  require(file.version() == 2 || file.version() == 3);
  require(file.nbytes() == file_size);
  for (const auto& [key, value] : file.metadata()) {
    require(file.find(key) == &value);
    read_value(value);
  }
  for (const auto& tensor : file.tensors()) {
    require(file.tensor(tensor.name) == &tensor);
    require(tensor.offset <= file_size && tensor.nbytes <= file_size - tensor.offset);
    require(tensor.n_elements() > 0);
    read_bytes(stoker::gguf_tensor_type_name(tensor.type));
  }
  tolerate([&] { sink = static_cast<uint64_t>(file.get_int("general.alignment", 32)); });
  tolerate([&] { read_bytes(file.get_string("general.architecture", "")); });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  // The bytes are also the head of a longer file, so that directories need no data to pass.
  for (const uint64_t file_size : {uint64_t{size}, uint64_t{size} + (uint64_t{1} << 32)}) {
    try {
      read_file(*GgufFile::parse(data, size, file_size, "fuzz.gguf"), file_size);
    } catch (const stoker::Error& e) {
      const std::string_view what = e.what();
      require(!what.empty() && what.find('\n') == what.npos);
    }
  }
  return 0;
}
