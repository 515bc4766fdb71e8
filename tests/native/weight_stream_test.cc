// Plans of streamed weights, and the ring that they go through: it hands out the bytes of the
// file whatever the order in which reads end, what fails, and where a forward pass is broken off.
#include "offload/weight_stream.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "tests/native/io_fixture.h"

namespace {

using namespace io_fixture;
using stoker::Extent;
using stoker::FlashReader;
using stoker::page_span;
using stoker::Phase;
using stoker::plan_stream;
using stoker::StreamPlan;
using stoker::StreamTensor;
using stoker::WeightStream;

struct Interrupted {};

constexpr int64_t kMebi = int64_t{1} << 20;

Files two_files() {
  Files files;
  files.push_back(std::make_unique<TestFile>("first", 7 * kMebi + 123, 1));
  files.push_back(std::make_unique<TestFile>("second", 3 * kMebi + 4567, 2));
  return files;
}

// Matrices one after the other in each file, in a forward pass that takes them in groups out of
// order, as layers do. The last one is the embeddings.
std::vector<StreamTensor> pass_over(const Files& files, std::mt19937_64& random) {
  std::vector<StreamTensor> order;
  for (int32_t shard = 0; shard < 2; ++shard) {
    uint64_t at = random() % 300;
    for (;;) {
      StreamTensor t;
      t.tensor = static_cast<int32_t>(order.size());
      const uint64_t stride = 100 + random() % 3000;
      t.rows = static_cast<int64_t>(1 + random() % 300);
      if (random() % 8 == 0) t.rows *= 4;
      t.extent = {shard, at, static_cast<uint64_t>(t.rows) * stride};
      at += t.extent.bytes;
      if (at > files[static_cast<size_t>(shard)]->size()) break;
      at += random() % 3 == 0 ? random() % 100'000 : random() % 64;
      order.push_back(t);
    }
  }
  for (size_t i = 0; i + 4 <= order.size(); i += 4) {
    std::shuffle(order.begin() + static_cast<int64_t>(i),
                 order.begin() + static_cast<int64_t>(i) + 4, random);
  }
  return order;
}

// What every plan is: the pieces of a tensor are its rows, each in one read; memory within `room`.
void check_plan(const std::vector<StreamTensor>& order, const StreamPlan& plan, int64_t room) {
  const StreamPlan least = plan_stream(order, 0);
  check(least.pinned_bytes == 0 && least.whole.empty(), "without room nothing is pinned");
  int64_t memory = plan.ring_bytes + plan.pinned_bytes, kept = 0, passing = 0;
  std::map<int32_t, int64_t> rows;
  for (const StreamTensor& t : order) {
    const bool whole = std::binary_search(plan.whole.begin(), plan.whole.end(), t.tensor);
    if (whole) memory += page_span(t.extent);
    rows[t.tensor] = whole ? t.rows : 0;
  }
  if (room >= least.ring_bytes) check(memory <= room, "a plan is within its room");
  for (size_t i = 0; i < plan.reads.size(); ++i) {
    const auto& r = plan.reads[i];
    (r.pinned ? kept : passing) += page_span(r.extent);
    if (!r.pinned) check(page_span(r.extent) * 2 <= plan.ring_bytes, "a ring holds two reads");
    for (int32_t p = r.first; p < r.last; ++p) {
      const auto& piece = plan.pieces[static_cast<size_t>(p)];
      check(piece.read == static_cast<int32_t>(i), "a piece knows its read");
      check(piece.extent.offset >= r.extent.offset &&
                piece.extent.offset + piece.extent.bytes <= r.extent.offset + r.extent.bytes,
            "a piece is inside its read");
      check(piece.row_begin == rows[piece.tensor], "the rows of a tensor in order");
      rows[piece.tensor] = piece.row_end;
    }
  }
  for (const StreamTensor& t : order) check(rows[t.tensor] == t.rows, "all rows of a tensor");
  check(kept == plan.pinned_bytes && passing == plan.streamed_bytes, "the sums of a plan");
}

void test_plans(const Files& files) {
  std::mt19937_64 random(1);
  for (int i = 0; i < 200; ++i) {
    const std::vector<StreamTensor> order = pass_over(files, random);
    int64_t all = 0;
    for (const StreamTensor& t : order) all += page_span(t.extent);
    for (int j = 0; j < 10; ++j) {
      const auto room = static_cast<int64_t>(random() % static_cast<uint64_t>(all));
      check_plan(order, plan_stream(order, room), room);
    }
    const StreamPlan whole = plan_stream(order, all);
    check(whole.active && whole.pieces.empty() && whole.whole.size() == order.size() &&
              whole.ring_bytes == 0,
          "with room for all of them all stay");
  }
  check(!StreamPlan().active, "a plan is not active unless it is made");
}

// A stream over the test files, and forward passes through it.
struct Passer {
  Passer(const Files& files, const std::string& backend, int readers, double share, uint64_t seed)
      : files(files), random(seed), order(pass_over(files, random)) {
    int64_t all = 0;
    for (const StreamTensor& t : order) all += page_span(t.extent);
    const auto room = static_cast<int64_t>(share * static_cast<double>(all));
    std::vector<std::string> paths;
    std::vector<uint64_t> sizes;
    for (const auto& f : files) {
      paths.push_back(f->path());
      sizes.push_back(f->size());
    }
    reader = std::make_shared<FlashReader>(paths, sizes, stoker::IoOptions{backend, readers, true});
    stream = std::make_unique<WeightStream>(reader, plan_stream(order, room), order.back(),
                                            std::function<void()>());
  }

  bool same(const Extent& e, const uint8_t* bytes) const {
    return files[static_cast<size_t>(e.shard)]->same(bytes, e.offset, e.bytes);
  }

  // Takes the pieces of some tensors as a product does: all that are ready, then their release.
  void take(size_t first, size_t last) {
    std::vector<int32_t> pieces;
    for (size_t i = first; i < last; ++i) {
      const WeightStream::Range range = stream->pieces(order[i].tensor);
      for (int32_t p = range.first; p < range.last; ++p) pieces.push_back(p);
    }
    std::vector<const uint8_t*> held;
    for (size_t next = 0; next < pieces.size();) {
      const size_t begin = next;
      held.clear();
      for (; next < pieces.size(); ++next) {
        const uint8_t* data = stream->get(pieces[next], held.empty());
        if (!data) break;
        held.push_back(data);
      }
      check(!held.empty(), "the first piece after a release is waited for");
      if (held.empty()) return;
      // Looked at last, when all are held: none may have been overwritten.
      for (size_t i = begin; i < next; ++i) {
        check(same(stream->piece(pieces[i]).extent, held[i - begin]), "the bytes of the file");
      }
      stream->release();
    }
  }

  void rows() {
    std::vector<int32_t> numbers;
    for (size_t i = 0; i < WeightStream::kLookupRows; ++i) {
      numbers.push_back(static_cast<int32_t>(random() % static_cast<uint64_t>(order.back().rows)));
    }
    numbers.resize(1 + random() % numbers.size());
    if (!whole(order.back().tensor)) {
      const auto found = stream->rows(numbers);
      for (size_t i = 0; i < numbers.size(); ++i) {
        Extent e = order.back().extent;
        e.bytes = static_cast<uint64_t>(order.back().row_bytes());
        e.offset += static_cast<uint64_t>(numbers[i]) * e.bytes;
        check(same(e, found[i]), "a row that was looked up");
      }
    }
  }

  bool whole(int32_t tensor) const {
    const auto& list = stream->plan().whole;
    return std::binary_search(list.begin(), list.end(), tensor);
  }

  // One forward pass; sometimes not to its end, or with a part left out or twice.
  void go(const std::function<void()>* poll, bool orderly) {
    stream->begin(random() % 2 == 0 ? Phase::kPrompt : Phase::kDecode, poll);
    rows();
    for (size_t i = 0; i < order.size();) {
      const size_t n = std::min<size_t>(1 + random() % 3, order.size() - i);
      take(i, i + n);
      i += n;
      if (orderly) continue;
      if (random() % 40 == 0) i = random() % order.size();
      if (random() % 60 == 0) return;
    }
  }

  const Files& files;
  std::mt19937_64 random;
  std::vector<StreamTensor> order;
  std::shared_ptr<FlashReader> reader;
  std::unique_ptr<WeightStream> stream;
};

constexpr const char* kDisorder = "null:delay=0..0.2ms,spike=3ms@0.01,reorder";

void test_walks(const Files& files) {
  uint64_t seed = 10;
  for (const char* backend : {"pread_pool", kDisorder}) {
    for (const double share : {0.0, 0.3, 0.6, 0.9}) {
      for (const int readers : {1, 4}) {
        Passer w(files, backend, readers, share, ++seed);
        for (int i = 0; i < 6; ++i) w.go(nullptr, i % 2 == 0);
      }
    }
  }
}

void test_a_walk_reads_once(const Files& files) {
  Passer w(files, kDisorder, 4, 0.4, 3);
  w.go(nullptr, true);
  for (int i = 0; i < 3; ++i) {
    const int64_t before = w.stream->statistics().bytes;
    w.stream->begin(Phase::kPrompt, nullptr);
    for (size_t t = 0; t < w.order.size(); ++t) w.take(t, t + 1);
    check(w.stream->statistics().bytes - before == w.stream->plan().streamed_bytes,
          "a forward pass in order reads the streamed weights, once");
  }
  check(w.stream->statistics().decode_bytes <= w.stream->statistics().bytes, "decode is a part");
}

void test_failures(const Files& files) {
  int failed = 0, passes = 0;
  for (uint64_t seed = 0; seed < 60; ++seed) {
    try {
      Passer w(files,
               "null:eio=0.01,short=0.01,delay=0..0.1ms,reorder,seed=" + std::to_string(seed), 3,
               0.3, seed);
      for (int i = 0; i < 10; ++i) {
        try {
          w.go(nullptr, true);
          ++passes;
        } catch (const stoker::Error& error) {
          check(error.kind() == stoker::ErrorKind::kDevice, "a device error");
          check(contains(error.what(), ": expected "), "what was expected");
          ++failed;
        }
      }
    } catch (const stoker::Error&) {
      ++failed;  // while it read the pinned weights
    }
  }
  check(failed > 20 && passes > 20, "some forward passes fail, some do not: " +
                                        std::to_string(failed) + ", " + std::to_string(passes));
}

void test_interruptions(const Files& files) {
  Passer w(files, "null:delay=0..30ms,reorder", 2, 0.2, 5);
  int interrupted = 0;
  const std::function<void()> poll = [&] {
    if (w.random() % 3 == 0) throw Interrupted();
  };
  for (int i = 0; i < 12; ++i) {
    try {
      w.go(&poll, true);
    } catch (const Interrupted&) {
      ++interrupted;
    }
  }
  check(interrupted > 3, "some forward passes are interrupted");
}

void test_closing(const Files& files) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    Passer w(files, "null:delay=0..3ms", 4, 0.2, seed);
    if (seed % 2 == 0) w.take(0, 1);
  }
}

void test_bandwidth_between_walks(const Files& files) {
  Passer w(files, "pread_pool", 4, 0.3, 8);
  for (uint64_t i = 0; i < 4; ++i) {
    check(w.stream->flash_bandwidth(8 * kMebi, i) > 0, "a bandwidth");
    w.go(nullptr, true);
  }
}

void test_watched(const Files& files) {
  Passer w(files, kDisorder, 4, 0.5, 9);
  std::atomic<bool> done{false};
  bool rises = true;
  std::thread watcher([&] {
    int64_t last = 0;
    while (!done.load()) {
      const stoker::StreamCounters s = w.stream->statistics();
      rises &= s.bytes >= last && s.stall_s >= 0;
      last = s.bytes;
    }
  });
  for (int i = 0; i < 5; ++i) w.go(nullptr, false);
  done.store(true);
  watcher.join();
  check(rises, "counters only rise");
}

}  // namespace

int main() {
  {
    const Files files = two_files();
    test_plans(files);
    test_walks(files);
    test_a_walk_reads_once(files);
    test_failures(files);
    test_interruptions(files);
    test_closing(files);
    test_bandwidth_between_walks(files);
    test_watched(files);
  }
  return report("weight_stream_test");
}
