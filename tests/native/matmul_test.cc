// Every matmul kernel against the scalar reference, bit for bit: each format x usable ISA x row
// lengths x rows x tokens x token lists x row slices x misalignments, on quantized and random
// weights. Weights, activations and scratch end (or start) at an unreadable page, so that reading
// a byte too many crashes. The scalar reference itself is checked against dequantize() in double.
//
//   matmul_test [format ...]     STOKER_TEST_QUICK=1 takes a sample of the sizes (emulators)
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels_cpu/fp16.h"
#include "kernels_cpu/kernel.h"
#include "runtime/base/errors.h"

namespace {

using stoker::ActKind;
using stoker::Format;
using stoker::FormatId;
using stoker::Isa;
using stoker::MatmulArgs;

constexpr int kMaxRows = 40;
constexpr int kMaxTokens = 20;
constexpr int kTokenPool = 24;  // tokens that a token_list picks from

char g_case[256] = "start";  // what runs now, for the crash report

void report_crash(int signal) {
  const char text[] = "\nmatmul_test: crashed (read or wrote outside its buffers) in: ";
  if (write(2, text, sizeof text - 1) < 0 || write(2, g_case, std::strlen(g_case)) < 0) _exit(3);
  (void)!write(2, "\n", 1);
  _exit(128 + signal);
}

// Readable and writable bytes between two unreadable pages.
class Guarded {
 public:
  explicit Guarded(size_t capacity) {
    page_ = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    size_ = (capacity + page_ - 1) / page_ * page_;
    void* p = mmap(nullptr, size_ + 2 * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) std::abort();
    map_ = static_cast<uint8_t*>(p);
    if (mprotect(begin(), size_, PROT_READ | PROT_WRITE) != 0) std::abort();
  }
  ~Guarded() { munmap(map_, size_ + 2 * page_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  uint8_t* begin() { return map_ + page_; }
  uint8_t* end() { return begin() + size_; }
  // n bytes that end `gap` bytes before the unreadable page.
  uint8_t* tail(size_t n, size_t gap = 0) {
    if (n + gap > size_) std::abort();
    return end() - n - gap;
  }

 private:
  size_t page_ = 0, size_ = 0;
  uint8_t* map_ = nullptr;
};

using Random = std::mt19937_64;

int uniform(Random& rng, int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(rng);
}

enum class Data { quantized, random_bytes, extreme };
const char* const kDataNames[] = {"quantized", "random bytes", "extreme"};

// True where a block dequantizes to finite numbers whose products cannot overflow f32.
bool sane(const Format& f, const uint8_t* block) {
  std::vector<float> w(f.block);
  f.dequantize(block, w.data(), f.block);
  for (float x : w) {
    if (!(std::fabs(x) < 1e15f)) return false;
  }
  return true;
}

std::vector<uint8_t> make_weights(const Format& f, int64_t rows, int64_t cols, Data data,
                                  Random& rng) {
  std::vector<uint8_t> w(rows * stoker::row_bytes(f, cols));
  if (data == Data::quantized && f.quantize != nullptr) {
    std::normal_distribution<float> normal;
    std::vector<float> x(rows * cols);
    for (float& v : x) v = normal(rng) * 0.05f;
    f.quantize(x.data(), w.data(), rows * cols, nullptr);
    return w;
  }
  const int64_t n = rows * cols / f.block;
  for (int64_t b = 0; b < n; ++b) {
    uint8_t* block = w.data() + b * f.block_bytes;
    do {
      const int fill = uniform(rng, 0, 3);
      for (int i = 0; i < f.block_bytes; ++i) {
        const int random = uniform(rng, 0, 255);
        // Extreme blocks: codes all at one end of their range, under random scales.
        const uint8_t ends[4] = {0x00, 0xff, 0x80, 0x7f};
        const bool scale = i < 2 || i >= f.block_bytes - 2;
        block[i] = static_cast<uint8_t>(data == Data::extreme && !scale ? ends[fill] : random);
      }
    } while (!sane(f, block));
  }
  return w;
}

// Activations of kTokenPool tokens; each array ends at an unreadable page.
struct Tokens {
  Tokens(const Format& f, int64_t cols, Data data, Random& rng)
      : x_(kTokenPool * (cols + 3) * 4),
        q_(kTokenPool * (cols + 63) / 64 * 64 + 64 * kTokenPool),
        scale_(kTokenPool * (cols / 32 + 1) * 4),
        sum16_(kTokenPool * (cols / 16 + 1) * 4) {
    std::normal_distribution<float> normal;
    view.kind = f.act;
    view.tokens = kTokenPool;
    view.cols = cols;
    if (f.act == ActKind::f32) {
      view.x_stride = cols + 3;
      const size_t n = (kTokenPool - 1) * view.x_stride + cols;
      auto* x = reinterpret_cast<float*>(x_.tail(n * 4));
      for (size_t i = 0; i < n; ++i) x[i] = normal(rng);
      view.x = x;
      return;
    }
    view.q_stride = (cols + 63) / 64 * 64;
    auto* q = reinterpret_cast<int8_t*>(q_.tail(kTokenPool * view.q_stride));
    auto* scale = reinterpret_cast<float*>(scale_.tail(kTokenPool * (cols / 32) * 4));
    auto* sum16 = reinterpret_cast<int32_t*>(sum16_.tail(kTokenPool * (cols / 16) * 4));
    for (int64_t t = 0; t < kTokenPool; ++t) {
      std::vector<float> x(cols);
      for (float& v : x) v = normal(rng);
      if (t % 5 == 4) std::fill(x.begin(), x.begin() + 32, 0.0f);
      if (data == Data::extreme) {
        for (float& v : x) v = t % 3 == 0 ? 1.0f : t % 3 == 1 ? -1.0f : v < 0 ? -1.0f : 1.0f;
      }
      stoker::quantize_act_kernel(Isa::scalar)(x.data(), cols, q + t * view.q_stride,
                                               scale + t * (cols / 32), sum16 + t * (cols / 16));
    }
    view.q = q;
    view.scale = scale;
    view.sum16 = sum16;
  }

  stoker::Activations view;

 private:
  Guarded x_, q_, scale_, sum16_;
};

// The product that a reader of kernel.h would compute, in double.
double exact_dot(const Format& f, const uint8_t* row, const stoker::Activations& x, int64_t token,
                 double* magnitude) {
  std::vector<float> w(x.cols);
  f.dequantize(row, w.data(), x.cols);
  double sum = 0;
  *magnitude = 0;
  for (int64_t k = 0; k < x.cols; ++k) {
    const double a = x.kind == ActKind::f32 ? x.x[token * x.x_stride + k]
                                            : static_cast<double>(x.q[token * x.q_stride + k]) *
                                                  x.scale[token * (x.cols / 32) + k / 32];
    sum += w[k] * a;
    *magnitude += std::fabs(w[k] * a);
  }
  return sum;
}

int g_failures = 0;
int64_t g_cases = 0;

bool check_scalar(const Format& f, const std::vector<uint8_t>& w, const stoker::Activations& x,
                  const std::vector<float>& y) {
  for (int64_t t = 0; t < kTokenPool; ++t) {
    for (int64_t r = 0; r < kMaxRows; ++r) {
      double magnitude;
      const double want =
          exact_dot(f, w.data() + r * stoker::row_bytes(f, x.cols), x, t, &magnitude);
      // Offsets and scales are applied to whole groups, whose terms may exceed their sum: 2^-16
      // leaves room for that and still shows any misplaced weight.
      if (!(std::fabs(y[t * kMaxRows + r] - want) <= 0x1p-16 * magnitude + 1e-35)) {
        std::fprintf(stderr, "%s scalar: cols %lld row %lld token %lld: %.9g, want %.9g\n", f.name,
                     static_cast<long long>(x.cols), static_cast<long long>(r),
                     static_cast<long long>(t), double{y[t * kMaxRows + r]}, want);
        ++g_failures;
        return false;
      }
    }
  }
  return true;
}

struct Shape {
  int row_begin, row_end, tokens;
  bool list;      // pick tokens through token_list
  bool at_start;  // weights start (rather than end) at an unreadable page
  int gap;        // bytes between the weights and that page
};

// Runs one kernel on one shape and compares every output, and the bytes between them.
void check_kernel(const Format& f, Isa isa, const std::vector<uint8_t>& w,
                  const stoker::Activations& x, const std::vector<float>& want, const Shape& s,
                  const char* data, Guarded& weights, Guarded& scratch, Random& rng) {
  std::snprintf(g_case, sizeof g_case,
                "%s %s cols %lld rows %d..%d tokens %d%s, weights %s page + %d, %s", f.name,
                stoker::isa_name(isa), static_cast<long long>(x.cols), s.row_begin, s.row_end,
                s.tokens, s.list ? " from a list" : "", s.at_start ? "at start of" : "at end of",
                s.gap, data);
  MatmulArgs args;
  args.row_bytes = stoker::row_bytes(f, x.cols);
  args.row_begin = s.row_begin;
  args.row_end = s.row_end;
  const size_t slice = static_cast<size_t>(args.row_bytes * (s.row_end - s.row_begin));
  uint8_t* first = s.at_start ? weights.begin() + s.gap : weights.tail(slice, s.gap);
  std::memcpy(first, w.data() + s.row_begin * args.row_bytes, slice);
  args.w = first - s.row_begin * args.row_bytes;
  args.x = x;
  int32_t list[kMaxTokens];
  for (int32_t& t : list) t = uniform(rng, 0, kTokenPool - 1);
  args.token_list = s.list ? list : nullptr;
  args.n_tokens = s.tokens;
  args.y_stride = kMaxRows + 5;
  const uint32_t untouched = 0x7fc12345;
  std::vector<uint32_t> y(kMaxTokens * args.y_stride, untouched);
  args.y = reinterpret_cast<float*>(y.data());
  const size_t scratch_bytes = (stoker::matmul_scratch_bytes(x.cols) + 63) / 64 * 64;
  args.scratch = scratch.tail(scratch_bytes);
  f.matmul[static_cast<int>(isa)](args);
  ++g_cases;
  for (int64_t t = 0; t < kMaxTokens; ++t) {
    for (int64_t r = 0; r < args.y_stride; ++r) {
      uint32_t expected = untouched;
      if (t < s.tokens && r >= s.row_begin && r < s.row_end) {
        const int64_t token = s.list ? list[t] : t;
        expected = stoker::f32_bits(want[token * kMaxRows + r]);
      }
      const uint32_t got = y[t * args.y_stride + r];
      if (got != expected) {
        std::fprintf(stderr, "%s: y[%lld][%lld] = %.9g (%08x), scalar %.9g (%08x)\n", g_case,
                     static_cast<long long>(t), static_cast<long long>(r),
                     double{stoker::f32_from_bits(got)}, got,
                     double{stoker::f32_from_bits(expected)}, expected);
        ++g_failures;
        return;
      }
    }
  }
}

std::vector<int64_t> row_lengths(const Format& f, bool quick) {
  std::vector<int64_t> lengths;
  if (f.act == ActKind::f32) {  // any length: around the multiples of the 16 lanes
    for (int64_t n = 1; n <= (quick ? 20 : 66); ++n) lengths.push_back(n);
    for (int64_t n : {127, 255, 1000, 1337}) lengths.push_back(n);
    return lengths;
  }
  for (int64_t n = 1; n <= 8; ++n) lengths.push_back(n * f.block);
  for (int64_t n : {1056, 2880}) {
    if (f.block == 32) lengths.push_back(n);
  }
  if (!quick) lengths.push_back(4096);
  return lengths;
}

void test_format(const Format& f, bool quick) {
  Random rng(static_cast<uint64_t>(f.id) + 1);
  const int64_t before = g_cases;
  std::string isas;
  for (const int64_t cols : row_lengths(f, quick)) {
    const int64_t bytes = stoker::row_bytes(f, cols);
    Guarded weights(static_cast<size_t>(kMaxRows * bytes + 4096));
    Guarded scratch((stoker::matmul_scratch_bytes(cols) + 63) / 64 * 64);
    for (const Data data : {Data::quantized, Data::random_bytes, Data::extreme}) {
      const char* data_name = kDataNames[static_cast<int>(data)];
      const std::vector<uint8_t> w = make_weights(f, kMaxRows, cols, data, rng);
      const Tokens tokens(f, cols, data, rng);
      std::vector<float> want(kTokenPool * kMaxRows);
      MatmulArgs all;
      all.w = w.data();
      all.row_bytes = bytes;
      all.row_end = kMaxRows;
      all.x = tokens.view;
      all.n_tokens = kTokenPool;
      all.y = want.data();
      all.y_stride = kMaxRows;
      f.matmul[static_cast<int>(Isa::scalar)](all);
      if (!check_scalar(f, w, tokens.view, want)) return;
      for (int i = 0; i < stoker::kIsaCount; ++i) {
        const Isa isa = static_cast<Isa>(i);
        if (f.matmul[i] == nullptr || !stoker::isa_usable(isa)) continue;
        if (isas.find(std::string(" ") + stoker::isa_name(isa) + " ") == std::string::npos) {
          isas += std::string(" ") + stoker::isa_name(isa) + " ";
        }
        const auto run = [&](const Shape& s) {
          check_kernel(f, isa, w, tokens.view, want, s, data_name, weights, scratch, rng);
        };
        // Every rows x tokens where that is cheap, else every rows and every tokens once.
        const bool cross = !quick && isa != Isa::scalar && data == Data::random_bytes &&
                           (cols == 2 * f.block || cols == 33);
        for (int rows = 1; rows <= kMaxRows; ++rows) {
          if (cross) {
            for (int n = 1; n <= kMaxTokens; ++n) run({0, rows, n, false, false, 0});
          } else if (!quick || rows % 4 == static_cast<int>(cols / f.block) % 4) {
            run({0, rows, 1 + (rows * 7 + static_cast<int>(cols / f.block)) % kMaxTokens, false,
                 false, 0});
          }
        }
        for (int n = 1; n <= kMaxTokens; n += quick ? 5 : 1) {
          run({0, uniform(rng, 1, kMaxRows), n, n % 2 == 0, false, 0});
        }
        // One token: the decode kernels, at each end of the mapping.
        for (int rows : {1, 3, 4, 8, 15, 16, 17, 33, kMaxRows}) {
          run({0, rows, 1, false, false, 0});
          if (!quick) run({0, rows, 1, false, true, 0});
        }
        for (int n = 0; n < (quick ? 4 : 16); ++n) {  // slices at odd addresses
          const int begin = uniform(rng, 0, kMaxRows - 1);
          const int end = uniform(rng, begin + 1, kMaxRows);
          run({begin, end, uniform(rng, 1, kMaxTokens), n % 2 == 1, n % 4 >= 2,
               uniform(rng, 0, 67)});
        }
        run({7, 7, 3, false, false, 0});  // nothing to do
        if (g_failures > 20) return;
      }
    }
  }
  std::printf("%-6s %7lld cases:%s\n", f.name, static_cast<long long>(g_cases - before),
              isas.c_str());
}

}  // namespace

int main(int argc, char** argv) {
  const char* quick_variable = std::getenv("STOKER_TEST_QUICK");
  const bool quick = quick_variable != nullptr && std::strcmp(quick_variable, "0") != 0;
  std::signal(SIGSEGV, report_crash);
  std::signal(SIGBUS, report_crash);
  std::signal(SIGILL, report_crash);
  int count = 0;
  const Format* const* formats = stoker::all_formats(&count);
  for (int i = 0; i < count; ++i) {
    bool wanted = argc == 1;
    for (int a = 1; a < argc; ++a) wanted |= std::strcmp(argv[a], formats[i]->name) == 0;
    if (wanted) test_format(*formats[i], quick);
  }
  std::printf("%lld cases, %d failures\n", static_cast<long long>(g_cases), g_failures);
  return g_failures == 0 ? 0 : 1;
}
