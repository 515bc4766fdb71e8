#include "mobile_bench/native/options.h"

#include <cctype>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>

#include "runtime/base/errors.h"
#include "runtime/base/printable.h"

namespace stoker::bench {

namespace {

constexpr const char* kHelp = R"(stoker-bench MODEL.gguf [options]

Measures a GGUF model on this device, without Python: load, time to the first token, prompt and
decode tokens/s, bytes read from flash, hit rate, peak memory. Writes JSON lines that `stoker
report` reads (one of the device, one a run, each run in a process of its own); says on stderr what
it does, and which tokens came.

  --ids 1,2,3 | --ids-file F  token ids of the prompt (of any length: it is repeated where it is
                              too short); default: made up, which no router has seen
  --prompts 16,64,256         lengths whose time to the first token is measured ("none")
  --decode-prompt 64          tokens of prompt before those that are decoded
  --tokens 128                tokens to decode, greedily
  --memory none,500MB,1GiB    budgets of the whole process, one run each
  --repeat 1                  runs of each budget, by turns
  --threads N --context N     default: performance cores; what the prompts and tokens take
  --precision fast|balanced|high   --kv f16|f32
  --policy P --predictor P --prefetch auto|on|off --io BACKEND --readers N --buffered
  --load-twice                load again with a warm page cache
  --profile facts|quick|full  how much of the device itself is measured [default: quick]
  --out FILE                  append the results here instead of writing them to stdout
  --device FILE               write the device's profile here, for `stoker plan --device`
)";

[[noreturn]] void refuse(const std::string& message) { throw Error(ErrorKind::kOption, message); }

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == ',') {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

int64_t whole(const std::string& option, const std::string& text, int64_t low, int64_t high) {
  int64_t value = 0;
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc() || stop != end || value < low || value > high) {
    refuse(option + ": expected a number from " + std::to_string(low) + " to " +
           std::to_string(high) + ", found " + in_quotes(text));
  }
  return value;
}

// Bytes of "500MB", "1.5GiB" or "123"; "none" is 0.
int64_t byte_count(const std::string& option, const std::string& text) {
  if (text == "none") return 0;
  char* end = nullptr;
  const double number = std::strtod(text.c_str(), &end);
  std::string unit;
  for (; *end != '\0'; ++end) unit += static_cast<char>(std::tolower(*end));
  double scale = 0;
  const std::string prefixes = "kmgt";
  const size_t power = unit.empty() ? std::string::npos : prefixes.find(unit[0]);
  if (unit.empty() || unit == "b") {
    scale = 1;
  } else if (power != std::string::npos) {
    const std::string rest = unit.substr(1);
    if (rest == "b") scale = std::pow(1000.0, static_cast<double>(power + 1));
    if (rest.empty() || rest == "ib") scale = std::pow(1024.0, static_cast<double>(power + 1));
  }
  const double bytes = number * scale;
  if (std::isdigit(static_cast<unsigned char>(text[0])) == 0 || !(bytes >= 1) || bytes >= 0x1p62) {
    refuse(option + ": expected bytes such as 500MB or 1.5GiB, or none, found " + in_quotes(text));
  }
  return static_cast<int64_t>(bytes);
}

// Parses ids separated by commas or white space, with optional brackets around them.
std::vector<int32_t> parse_ids(const std::string& where, const std::string& text) {
  std::vector<int32_t> ids;
  std::string word;
  const auto take = [&] {
    if (word.empty()) return;
    ids.push_back(static_cast<int32_t>(whole(where, word, 0, INT32_MAX)));
    word.clear();
  };
  for (const char c : text) {
    if (c == ',' || c == '[' || c == ']' || std::isspace(static_cast<unsigned char>(c)) != 0) {
      take();
    } else {
      word += c;
    }
  }
  take();
  if (ids.empty()) refuse(where + ": expected token ids, found none");
  return ids;
}

std::vector<int32_t> read_ids(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) refuse(printable_path(path) + ": cannot be read");
  const std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  return parse_ids(printable_path(path), text);
}

// The index of `text` in names.
int choice(const std::string& option, const std::string& text, std::vector<std::string> names) {
  std::string known;
  for (size_t i = 0; i < names.size(); ++i) {
    if (text == names[i]) return static_cast<int>(i);
    known += (i ? ", " : "") + names[i];
  }
  refuse(option + ": expected " + known + ", found " + in_quotes(text));
}

}  // namespace

Options parse_options(int argc, char** argv) {
  Options o;
  bool prompts_given = false;
  for (int i = 0; i < argc; ++i) {
    std::string word = argv[i];
    if (word.empty() || word.find_first_of(" \t\"'\\$*") != std::string::npos)
      word = "'" + word + "'";
    o.command += (i ? " " : "") + word;
  }
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--help" || name == "-h") {
      std::fputs(kHelp, stdout);
      std::exit(0);
    }
    if (name.rfind("--", 0) != 0) {
      if (!o.model.empty()) refuse("expected one model, found " + in_quotes(name) + " as well");
      o.model = name;
      continue;
    }
    const auto named = [&](const std::string& value) {
      o.changed.emplace_back(name.substr(2), value);
    };
    if (name == "--buffered") {
      o.engine.offload.io.direct = false;
      named("true");
      continue;
    }
    if (name == "--load-twice") {
      o.load_twice = true;
      continue;
    }
    if (i + 1 == argc) refuse(name + ": expected a value (--help lists the options)");
    const std::string value = argv[++i];
    OffloadOptions& offload = o.engine.offload;
    if (name == "--ids") {
      o.ids = parse_ids(name, value);
    } else if (name == "--ids-file") {
      o.ids = read_ids(value);
    } else if (name == "--prompts") {
      prompts_given = true;
      if (value == "none") continue;
      for (const std::string& n : split(value)) o.prompts.push_back(whole(name, n, 1, 1 << 20));
    } else if (name == "--decode-prompt") {
      o.decode_prompt = whole(name, value, 1, 1 << 20);
    } else if (name == "--tokens") {
      o.tokens = whole(name, value, 1, 1 << 20);
    } else if (name == "--memory") {
      o.memory.clear();
      for (const std::string& bytes : split(value)) o.memory.push_back(byte_count(name, bytes));
    } else if (name == "--repeat") {
      o.repeats = static_cast<int>(whole(name, value, 1, 1000));
    } else if (name == "--threads") {
      o.engine.threads = static_cast<int>(whole(name, value, 1, 1024));
    } else if (name == "--context") {
      o.engine.context = whole(name, value, 1, INT32_MAX);
    } else if (name == "--precision") {
      o.engine.precision =
          static_cast<Precision>(choice(name, value, {"fast", "balanced", "high"}));
      named(value);
    } else if (name == "--kv") {
      o.engine.kv_type = static_cast<KvType>(
          choice(name, value, {std::begin(kKvTypeNames), std::end(kKvTypeNames)}));
      named(value);
    } else if (name == "--policy") {
      offload.policy = value;
      named(value);
    } else if (name == "--predictor") {
      offload.predictor = value;
      named(value);
    } else if (name == "--prefetch") {
      offload.prefetch = static_cast<PrefetchMode>(choice(name, value, {"off", "on", "auto"}));
      named(value);
    } else if (name == "--io") {
      offload.io.backend = value;
      named(value);
    } else if (name == "--readers") {
      offload.io.readers = static_cast<int>(whole(name, value, 1, 256));
      named(value);
    } else if (name == "--profile") {
      o.profile = static_cast<ProfileKind>(choice(name, value, {"facts", "quick", "full"}));
    } else if (name == "--out") {
      o.out = value;
    } else if (name == "--device") {
      o.device = value;
    } else {
      refuse(name + ": no such option (--help lists them)");
    }
  }
  if (o.model.empty()) refuse("expected a model: stoker-bench MODEL.gguf (--help tells more)");
  if (!prompts_given) o.prompts = {16, 64, 256};
  return o;
}

}  // namespace stoker::bench
