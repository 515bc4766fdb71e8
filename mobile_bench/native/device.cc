#include "mobile_bench/native/device.h"

#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <vector>

#include "kernels_cpu/isa/cpu.h"
#include "kernels_cpu/kernel.h"
#include "mobile_bench/native/kernel_speed.h"
#include "mobile_bench/native/peak.h"
#include "mobile_bench/native/sha256.h"
#include "mobile_bench/native/storage_file.h"
#include "mobile_bench/native/system_facts.h"
#include "runtime/base/system_file.h"

namespace stoker::bench {

namespace {

Json bytes_or_null(int64_t bytes) { return bytes < 0 ? kNull : to_json(bytes); }

// The processor's name: on many phones not the kernel but Android's properties give it.
std::string processor_name() {
  const std::string soc = first_line("/sys/devices/soc0/machine");
  const std::string board = first_line("/proc/device-tree/model");
  std::string name = cpu().name;
  if (name == "aarch64" && !soc.empty()) name = soc;
  if (name == "aarch64" && !board.empty()) name = board.c_str();  // it ends with a zero byte
  return name;
}

// Weight formats of the file's matrices, those with most bytes first.
std::vector<const Format*> formats_of(const GgufFile& file) {
  std::map<uint32_t, uint64_t> bytes;
  for (const GgufTensor& t : file.tensors()) {
    if (t.n_dims > 1) bytes[t.type] += t.nbytes;
  }
  std::vector<std::pair<uint64_t, const Format*>> found;
  for (const auto& [type, nbytes] : bytes) {
    const Format* f = find_format(static_cast<FormatId>(type));
    if (f) found.emplace_back(nbytes, f);
  }
  std::sort(found.begin(), found.end(), [](auto& a, auto& b) { return a.first > b.first; });
  std::vector<const Format*> formats;
  for (const auto& [nbytes, f] : found) formats.push_back(f);
  return formats;
}

Json format_speed(const Format& f, Isa isa, bool full) {
  constexpr int64_t kCols = 2048, kTileRows = 256, kTileTokens = 512;
  const int64_t bytes = int64_t{full ? 128 : 48} << 20;
  const int64_t rows = bytes / row_bytes(f, kCols) / 64 * 64;
  const double seconds = full ? 0.2 : 0.08;
  const double row = kernel_speed(f, isa, rows, kCols, 1, 1, seconds);
  const double tile = kernel_speed(f, isa, kTileRows, kCols, kTileTokens, 1, seconds);
  JsonObject speed;
  speed.set("format", f.name).set("isa", isa_name(isa));
  speed.set("row_weights_s", static_cast<double>(rows * kCols) / row);
  speed.set("tile_ops_s", 2.0 * static_cast<double>(kTileRows * kCols * kTileTokens) / tile);
  return speed.json();
}

// Random reads of the model's largest file.
std::vector<Json> storage_reads(const GgufFile& file, bool full) {
  std::vector<Json> lines;
  const auto& sizes = file.shard_nbytes();
  const auto largest = std::max_element(sizes.begin(), sizes.end()) - sizes.begin();
  StorageFile storage(file.shards()[static_cast<size_t>(largest)]);
  const auto measure = [&](const char* mode, ReadMode access, uint64_t block, int depth) {
    const ReadSpeed speed = storage.read({access, block, depth, full ? 0.4 : 0.15, 1});
    if (speed.reads < 4) return;  // the file is too small, or in memory
    JsonObject line;
    line.set("mode", mode).set("block", static_cast<int64_t>(block)).set("depth", depth);
    line.set("bytes_s", static_cast<double>(speed.bytes) / speed.seconds);
    lines.push_back(line.json());
  };
  for (const uint64_t block : {4096u, 65536u, 262144u, 1048576u}) {
    if (block > storage.nbytes() / 8) continue;
    for (const int depth : {1, 4, 16}) {
      // The quick probe keeps to the sizes around what offloading does: 256 KB, four at a time.
      if (!full && block != 262144 && depth != 4) continue;
      if (storage.direct()) measure("direct", ReadMode::kDirect, block, depth);
      if (!storage.direct() || full) measure("buffered", ReadMode::kBuffered, block, depth);
    }
  }
  return lines;
}

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < kIsaCount; ++i) {
    if (isa_usable(static_cast<Isa>(i))) names.emplace_back(isa_name(static_cast<Isa>(i)));
  }
  return names;
}

}  // namespace

std::string device_id() {
  // The same formula as device_id() in device_profile.py.
  const auto gigabytes =
      static_cast<int64_t>(std::nearbyint(static_cast<double>(meminfo_bytes("MemTotal:")) / 1e9));
  return sha256(processor_name() + "|" + std::to_string(cpu().physical) + "|" +
                std::to_string(gigabytes) + "|" + usable_isas().back())
      .substr(0, 12);
}

Json device_profile(const Options& options, const GgufFile& file) {
  const Isa isa = active_isa();
  const Cpu& c = cpu();
  const bool measures = options.profile != ProfileKind::kFacts;
  const bool full = options.profile == ProfileKind::kFull;
  std::set<int> threads = {1, default_threads()};
  std::vector<Json> reads, peaks, speeds, storage;
  if (measures) {
    for (const int n : threads) {
      const double bytes_s = read_bandwidth(n, int64_t{full ? 256 : 96} << 20);
      reads.push_back(JsonObject().set("threads", n).set("bytes_s", bytes_s).json());
      const auto peak = [&](const char* kind, double ops_s) {
        JsonObject line;
        line.set("kind", kind).set("isa", isa_name(isa)).set("threads", n).set("ops_s", ops_s);
        peaks.push_back(line.json());
      };
      peak("int8", int8_peak(isa, n));
      peak("float32", float32_peak(isa, n));
    }
    std::vector<const Format*> formats = formats_of(file);
    if (full) {
      int count = 0;
      const Format* const* all = all_formats(&count);
      formats.assign(all, all + count);
    }
    for (const Format* f : formats) speeds.push_back(format_speed(*f, isa, full));
    storage = storage_reads(file, full);
  }
  utsname system = {};
  uname(&system);
  const int64_t total = meminfo_bytes("MemTotal:");
  char name[192];
  std::snprintf(name, sizeof(name), "%s, %d cores, %.0f GB", processor_name().c_str(), c.physical,
                static_cast<double>(total) / 1e9);
  const bool android = access("/system/build.prop", F_OK) == 0;
  const double heat = hottest_celsius();
  const std::string charge = first_line("/sys/class/power_supply/battery/capacity");
  JsonObject power;
  power.set("battery", charge.empty() ? kNull : JsonObject().set("percent", charge).json());
  power.set("temperatures",
            std::isnan(heat) ? Json{"{}"} : JsonObject().set("hottest", heat).json());
  power.set("energy", kNull);
  JsonObject profile;
  profile.set("kind", "profile").set("version", 1).set("id", device_id()).set("name", name);
  profile.set("time", utc_now()).set("quick", !full).set("stoker", STOKER_VERSION);
  profile.set("platform", JsonObject()
                              .set("system", android ? "Android" : system.sysname)
                              .set("release", system.release)
                              .set("machine", system.machine)
                              .set("python", kNull)
                              .set("virtual", kNull)
                              .json());
  profile.set("cpu", JsonObject()
                         .set("model", processor_name())
                         .set("logical", c.logical)
                         .set("physical", c.physical)
                         .set("performance", c.performance)
                         .set("kinds", std::vector<Json>())
                         .set("caches", std::vector<Json>())
                         .set("quota", c.quota > 0 ? to_json(c.quota) : kNull)
                         .json());
  profile.set("isa", JsonObject().set("active", isa_name(isa)).set("usable", usable_isas()).json());
  profile.set("memory", JsonObject()
                            .set("total", bytes_or_null(total))
                            .set("available", bytes_or_null(meminfo_bytes("MemAvailable:")))
                            .set("limit", bytes_or_null(group_limit_bytes()))
                            .json());
  profile.set("memory_reads", reads).set("peaks", peaks).set("formats", speeds);
  profile.set(
      "storage",
      JsonObject().set("path", file.path()).set("filesystem", kNull).set("device", kNull).json());
  profile.set("storage_reads", storage).set("power", power.json());
  return profile.json();
}

Json model_facts(const GgufFile& file) {
  const std::string architecture(file.require_string("general.architecture"));
  const size_t slash = file.path().rfind('/');
  const std::vector<const Format*> formats = formats_of(file);
  JsonObject model;
  model.set("name", slash == std::string::npos ? file.path() : file.path().substr(slash + 1));
  model.set("nbytes", static_cast<int64_t>(file.nbytes())).set("architecture", architecture);
  model.set("type", formats.empty() ? kNull : to_json(formats[0]->name));
  model.set("n_layer", file.get_int(architecture + ".block_count", 0));
  model.set("n_expert", file.get_int(architecture + ".expert_count", 0));
  model.set("n_expert_used", file.get_int(architecture + ".expert_used_count", 0));
  return model.json();
}

}  // namespace stoker::bench
