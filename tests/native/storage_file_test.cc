// Files whose reads are measured: what is read, how often, what is refused, and that a scratch file
// leaves nothing behind.
#include "mobile_bench/native/storage_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <string>
#include <vector>

#include "mobile_bench/native/peak.h"
#include "tests/native/io_fixture.h"

namespace {

using io_fixture::check;
using io_fixture::contains;
using io_fixture::error_of;
using io_fixture::TestFile;
using stoker::ErrorKind;
using stoker::ReadLoad;
using stoker::ReadMode;
using stoker::ReadSpeed;
using stoker::StorageFile;

constexpr uint64_t kMiB = uint64_t{1} << 20;

std::vector<uint8_t> bytes_of(const StorageFile& file) {
  std::vector<uint8_t> bytes(file.nbytes());
  const ssize_t n = ::pread(file.descriptor(), bytes.data(), bytes.size(), 0);
  check(n == static_cast<ssize_t>(bytes.size()), "the file holds what it says");
  return bytes;
}

void test_scratch() {
  const std::string folder = TestFile::folder();
  StorageFile file = StorageFile::scratch(folder);
  check(std::filesystem::is_empty(folder), "a scratch file has no name");
  check(file.nbytes() == 0, "it is empty");
  file.append(5 * kMiB);  // more than one piece
  file.append(4096);
  check(file.nbytes() == 5 * kMiB + 4096, "its size");
  const std::vector<uint8_t> bytes = bytes_of(file);
  int64_t same = 0;
  for (size_t i = 0; i + 8192 <= bytes.size(); i += 4096) {
    same += std::memcmp(&bytes[i], &bytes[i + 4096], 4096) == 0;
  }
  check(same == 0, "its pages differ");
  check(contains(error_of(ErrorKind::kOption, [&] { file.append(100); }), "4096"), "whole pages");

  const int descriptor = file.descriptor();
  {
    const StorageFile moved = std::move(file);
    check(moved.nbytes() == 5 * kMiB + 4096 && moved.descriptor() == descriptor, "it moves");
  }
  check(::fcntl(descriptor, F_GETFD) < 0, "closed once");
}

// Without an end in time, each block is read once.
void test_counts() {
  StorageFile file = StorageFile::scratch(TestFile::folder());
  file.append(3 * kMiB);
  for (const int depth : {1, 3, 16}) {
    for (const uint64_t block : {uint64_t{4096}, 64 * uint64_t{1024}, 2 * kMiB}) {
      for (const ReadMode mode : {ReadMode::kDirect, ReadMode::kBuffered, ReadMode::kMapped}) {
        if (mode == ReadMode::kDirect && !file.direct()) continue;
        ReadSpeed speed = file.read({mode, block, depth, 600, 1});
        const int64_t places = static_cast<int64_t>(3 * kMiB / block);
        const std::string name = "mode " + std::to_string(static_cast<int>(mode)) + ", block " +
                                 std::to_string(block) + ", depth " + std::to_string(depth);
        if (mode == ReadMode::kDirect) {
          check(speed.reads == places, name + ": " + std::to_string(speed.reads) + " reads");
        } else {  // read-ahead takes some of the places away; in memory, all of them
          check(speed.reads <= places, name + ": none twice");
        }
        check(speed.bytes == speed.reads * static_cast<int64_t>(block), name + ": bytes");
        check((speed.seconds > 0) == (speed.reads > 0), name + ": seconds");
      }
    }
  }
  const ReadSpeed none = file.read({ReadMode::kBuffered, 4096, 4, 0, 1});
  check(none.reads == 0 && none.seconds == 0, "no time, no reads");
}

void test_refusals() {
  StorageFile file = StorageFile::scratch(TestFile::folder());
  const auto refused = [&](const ReadLoad& load) {
    return !error_of(ErrorKind::kOption, [&] { file.read(load); }).empty();
  };
  check(refused({ReadMode::kBuffered, 4096, 1, 0.1, 1}), "an empty file");
  file.append(kMiB);
  check(refused({ReadMode::kBuffered, 0, 1, 0.1, 1}), "no block");
  check(refused({ReadMode::kBuffered, 5000, 1, 0.1, 1}), "half a page");
  check(refused({ReadMode::kBuffered, 2 * kMiB, 1, 0.1, 1}), "more than the file");
  check(refused({ReadMode::kBuffered, 4096, 0, 0.1, 1}), "no depth");
  check(refused({ReadMode::kBuffered, 4096, 257, 0.1, 1}), "too many threads");
  const std::string absent = error_of(ErrorKind::kDevice, [] { StorageFile("/not/there"); });
  check(contains(absent, "/not/there"), absent);
  const std::string folder = TestFile::folder();
  check(!error_of(ErrorKind::kDevice, [&] { StorageFile{folder}; }).empty(), "a folder");
  check(!error_of(ErrorKind::kDevice, [] { StorageFile::scratch("/not/there"); }).empty(),
        "a scratch file nowhere");
}

// A file that becomes shorter while it is open fails the reads of what is gone.
void test_shrunk() {
  StorageFile file = StorageFile::scratch(TestFile::folder());
  file.append(kMiB);
  if (::ftruncate(file.descriptor(), 4096) != 0) return;
  const std::string error = error_of(ErrorKind::kDevice, [&] {
    file.read({ReadMode::kBuffered, 65536, 4, 600, 1});
  });
  check(contains(error, "cannot read"), "a file that shrank: " + error);
}

void test_peaks() {
  for (int i = 0; i < stoker::kIsaCount; ++i) {
    const stoker::Isa isa = static_cast<stoker::Isa>(i);
    if (stoker::isa_usable(isa)) {
      check(stoker::float32_peak(isa, 1) > 0 && stoker::int8_peak(isa, 2) > 0,
            std::string("peaks of ") + stoker::isa_name(isa));
      continue;
    }
    check(!error_of(ErrorKind::kOption, [&] { stoker::float32_peak(isa, 1); }).empty(),
          std::string("no peak of ") + stoker::isa_name(isa));
  }
  check(!error_of(ErrorKind::kOption, [] { stoker::int8_peak(stoker::Isa::scalar, 0); }).empty(),
        "no threads");
  check(stoker::read_bandwidth(3, 1000001) > 0 && stoker::read_bandwidth(2, 1) >= 0, "odd sizes");
  check(!error_of(ErrorKind::kOption, [] { stoker::read_bandwidth(0, 1); }).empty(), "no threads");
}

}  // namespace

int main() {
  test_scratch();
  test_counts();
  test_refusals();
  test_shrunk();
  test_peaks();
  return io_fixture::report("storage_file_test");
}
