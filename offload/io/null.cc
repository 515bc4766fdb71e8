// This backend reads the true bytes, with scripted delays, orders and faults: "null:SCRIPT", or
// "null" for none.
// SCRIPT is a list of items between commas:
//   delay=A..Bms    each read takes A to B ms longer, uniformly ("delay=3ms": always 3)
//   spike=Dms@P     with probability P a read takes D ms longer
//   reorder         the next read is any of those that wait in its priority, not the oldest
//   eio=P           with probability P a read fails with EIO before a byte has arrived
//   short=P         with probability P a read ends early, as at the end of a truncated file
//   fail=N          read number N (from 1, in the order in which reads begin) fails with EIO
//   seed=S          of all these draws; 0
// What happens to read number N follows from S and N alone, so that a failure can be repeated; with
// several readers, which bytes are read as number N depends on their timing.
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <utility>

#include "offload/io/backends.h"
#include "offload/io/reader_pool.h"
#include "runtime/base/errors.h"

namespace stoker {

namespace {

constexpr double kMaxDelayMs = 60e3;

struct Script {
  double delay_min_ms = 0;
  double delay_max_ms = 0;
  double spike_ms = 0;
  double spike = 0;  // probabilities
  double eio = 0;
  double cut = 0;
  bool reorder = false;
  int64_t fail = 0;  // 0: none
  uint64_t seed = 0;
};

[[noreturn]] void refuse(std::string_view item) {
  throw Error(ErrorKind::kOption,
              "io backend null: expected delay=A..Bms, spike=Dms@P, reorder, eio=P, short=P, "
              "fail=N or seed=S, found \"" +
                  std::string(item) + "\"");
}

// std::from_chars has no floating point in some libraries, and strtod reads the locale, so this
// function replaces both.
double number(std::string_view text, std::string_view item) {
  double value = 0, scale = 1;
  bool fraction = false, digits = false;
  for (const char c : text) {
    if (c == '.' && !fraction) {
      fraction = true;
    } else if (c >= '0' && c <= '9') {
      digits = true;
      value = value * 10 + (c - '0');
      if (fraction) scale *= 10;
    } else {
      refuse(item);
    }
  }
  if (!digits) refuse(item);
  return value / scale;
}

double milliseconds(std::string_view text, std::string_view item) {
  if (text.size() >= 2 && text.substr(text.size() - 2) == "ms") text.remove_suffix(2);
  const double ms = number(text, item);
  if (ms > kMaxDelayMs) refuse(item);
  return ms;
}

double probability(std::string_view text, std::string_view item) {
  const double p = number(text, item);
  if (p > 1) refuse(item);
  return p;
}

template <typename T>
T integer(std::string_view text, std::string_view item) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size()) refuse(item);
  return value;
}

void parse_item(std::string_view item, Script* script) {
  const size_t equals = item.find('=');
  const std::string_view key = item.substr(0, equals);
  const std::string_view value = equals == item.npos ? "" : item.substr(equals + 1);
  if (item == "reorder") {
    script->reorder = true;
  } else if (key == "delay") {
    const size_t dots = value.find("..");
    script->delay_min_ms = milliseconds(value.substr(0, dots), item);
    script->delay_max_ms =
        dots == value.npos ? script->delay_min_ms : milliseconds(value.substr(dots + 2), item);
    if (script->delay_max_ms < script->delay_min_ms) refuse(item);
  } else if (key == "spike") {
    const size_t at = value.find('@');
    if (at == value.npos) refuse(item);
    script->spike_ms = milliseconds(value.substr(0, at), item);
    script->spike = probability(value.substr(at + 1), item);
  } else if (key == "eio") {
    script->eio = probability(value, item);
  } else if (key == "short") {
    script->cut = probability(value, item);
  } else if (key == "fail") {
    script->fail = integer<int64_t>(value, item);
    if (script->fail < 1) refuse(item);
  } else if (key == "seed") {
    script->seed = integer<uint64_t>(value, item);
  } else {
    refuse(item);
  }
}

Script parse(std::string_view text) {
  Script script;
  while (!text.empty()) {
    const size_t comma = text.find(',');
    parse_item(text.substr(0, comma), &script);
    text = comma == text.npos ? "" : text.substr(comma + 1);
  }
  return script;
}

class Scripted final : public ReadMethod {
 public:
  Scripted(std::shared_ptr<const IoFiles> files, const Script& script)
      : files_(std::move(files)), script_(script) {}

  ReadOutcome read(const Read& r, int64_t number) override {
    double ms = script_.delay_min_ms +
                (script_.delay_max_ms - script_.delay_min_ms) * draw(number, Draw::kDelay);
    if (draw(number, Draw::kSpike) < script_.spike) ms += script_.spike_ms;
    if (ms > 0) std::this_thread::sleep_for(std::chrono::duration<double, std::milli>(ms));
    ReadOutcome outcome;
    if (number + 1 == script_.fail || draw(number, Draw::kEio) < script_.eio) {
      outcome.error = files_->failure(r, 0, std::strerror(EIO));
      return outcome;
    }
    if (draw(number, Draw::kShort) < script_.cut && r.needed > 0) {
      // Some of the bytes arrive, as in a real short read.
      Read part = r;
      part.needed = static_cast<uint64_t>(draw(number, Draw::kLength) * double(r.needed));
      part.bytes = (part.needed + kIoAlign - 1) / kIoAlign * kIoAlign;
      if (part.bytes > 0) outcome = files_->read(part);
      outcome.error = files_->failure(r, part.needed, "");
      return outcome;
    }
    return files_->read(r);
  }

  bool reorders() const override { return script_.reorder; }
  int choose(int waiting, int64_t number) const override {
    return static_cast<int>(draw(number, Draw::kOrder) * waiting);
  }

 private:
  enum class Draw : uint64_t { kDelay = 1, kSpike, kEio, kShort, kLength, kOrder };

  // Returns a number uniform in [0, 1): a hash of seed, read and purpose (the finalizer of
  // SplitMix64, twice).
  double draw(int64_t number, Draw purpose) const {
    const uint64_t n = static_cast<uint64_t>(number) * 8 + static_cast<uint64_t>(purpose);
    return static_cast<double>(mix(mix(script_.seed) ^ n) >> 11) * 0x1p-53;
  }
  static uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
  }

  const std::shared_ptr<const IoFiles> files_;
  const Script script_;
};

}  // namespace

std::unique_ptr<IoBackend> open_null(std::shared_ptr<const IoFiles> files, const IoOptions& options,
                                     IoListener* listener) {
  const size_t colon = options.backend.find(':');
  const Script script =
      parse(colon == std::string::npos ? "" : std::string_view(options.backend).substr(colon + 1));
  auto method = std::make_unique<Scripted>(files, script);
  return std::make_unique<ReaderPool>(options.backend, std::move(files), std::move(method),
                                      options.readers, listener);
}

}  // namespace stoker
