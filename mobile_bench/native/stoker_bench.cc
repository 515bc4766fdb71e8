// stoker-bench: measures a GGUF model on this device, without Python. See options.cc.
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <random>
#include <string>

#include "kernels_cpu/kernel.h"
#include "mobile_bench/native/device.h"
#include "mobile_bench/native/model_run.h"
#include "mobile_bench/native/options.h"
#include "mobile_bench/native/system_facts.h"
#include "runtime/base/errors.h"
#include "runtime/base/printable.h"

namespace {

using stoker::Error;
using stoker::ErrorKind;
using stoker::bench::Json;

[[noreturn]] void cannot_write(const std::string& path) {
  throw Error(ErrorKind::kOption,
              stoker::printable_path(path) + ": cannot be written: " + std::strerror(errno));
}

void write_all(int descriptor, const std::string& text, const std::string& path) {
  for (size_t at = 0; at < text.size();) {
    const ssize_t wrote = write(descriptor, text.data() + at, text.size() - at);
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote <= 0) cannot_write(path);
    at += static_cast<size_t>(wrote);
  }
}

void write_file(const std::string& path, const std::string& text, int mode) {
  const int descriptor = open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC | mode, 0644);
  if (descriptor < 0) cannot_write(path);
  write_all(descriptor, text, path);
  if (close(descriptor) != 0) cannot_write(path);
}

// The JSON that f returns in a separate process: its memory is not in the next one's peak, and if
// the system kills it the others go on. Throws Error(kDevice) if the process died.
std::string in_process(const std::function<Json()>& f) {
  int ends[2];
  if (pipe(ends) != 0) throw Error(ErrorKind::kDevice, std::strerror(errno));
  const pid_t child = fork();
  if (child < 0) throw Error(ErrorKind::kDevice, std::string("fork: ") + std::strerror(errno));
  if (child == 0) {
    close(ends[0]);
    int status = 0;
    try {
      write_all(ends[1], f().text, "pipe");
    } catch (const std::exception& error) {
      std::fprintf(stderr, "stoker-bench: %s\n", error.what());
      status = 1;
    }
    _exit(status);
  }
  close(ends[1]);
  std::string text;
  char buffer[65536];
  for (;;) {
    const ssize_t got = read(ends[0], buffer, sizeof(buffer));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) break;
    text.append(buffer, static_cast<size_t>(got));
  }
  close(ends[0]);
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  if (WIFSIGNALED(status)) {
    const int number = WTERMSIG(status);
    throw Error(ErrorKind::kDevice, number == SIGKILL
                                        ? "killed, as the system does where memory runs out"
                                        : "ended by signal " + std::to_string(number));
  }
  if (WEXITSTATUS(status) != 0) {
    throw Error(ErrorKind::kDevice, "ended with exit code " + std::to_string(WEXITSTATUS(status)));
  }
  return text;
}

int run(int argc, char** argv) {
  const stoker::bench::Options options = stoker::bench::parse_options(argc, argv);
  const auto file = stoker::GgufFile::open(options.model);
  stoker::active_isa();  // an unusable STOKER_ISA is refused here
  const auto emit = [&](const std::string& line) {
    if (options.out.empty()) {
      write_all(STDOUT_FILENO, line + "\n", "standard output");
    } else {
      write_file(options.out, line + "\n", O_APPEND);
    }
  };
  const std::string profile =
      in_process([&] { return stoker::bench::device_profile(options, *file); });
  if (!options.device.empty()) write_file(options.device, profile + "\n", O_TRUNC);
  emit(profile);

  std::random_device random;
  char id[16];
  std::snprintf(id, sizeof(id), "%08x%04x", random(), random() & 0xffff);
  stoker::bench::RunPlace place{id, stoker::bench::device_id(), 0, 0};
  int failed = 0;
  for (place.repeat = 0; place.repeat < options.repeats; ++place.repeat) {
    for (const int64_t memory : options.memory) {
      place.memory = memory;
      std::string line;
      try {
        line = in_process([&] { return stoker::bench::measure_run(options, file, place); });
      } catch (const Error& error) {
        line = stoker::bench::failed_run(options, *file, place, error.what()).text;
      }
      if (line.find("\"error\": null") == std::string::npos) ++failed;
      emit(line);
    }
  }
  return failed == 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const Error& error) {
    std::fprintf(stderr, "stoker-bench: %s\n", error.what());
    return error.kind() == ErrorKind::kDevice ? 1 : 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "stoker-bench: %s\n", error.what());
    return 1;
  }
}
