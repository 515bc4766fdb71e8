#include "offload/weight_stream.h"

#include <algorithm>
#include <chrono>
#include <random>

#include "runtime/base/errors.h"

namespace stoker {

namespace {

// The weights being computed with take at most one part in this many of the ring.
constexpr uint64_t kGivenShare = 4;

double now() {
  using Clock = std::chrono::steady_clock;
  return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

Extent row_extent(const StreamTensor& t, int64_t row) {
  const auto bytes = static_cast<uint64_t>(t.row_bytes());
  return {t.extent.shard, t.extent.offset + static_cast<uint64_t>(row) * bytes, bytes};
}

int64_t lent_bytes(const StreamPlan& plan) {
  int64_t bytes = 0;
  for (const int32_t i : plan.lent) bytes += page_span(plan.reads[static_cast<size_t>(i)].extent);
  return bytes;
}

// Returns the bytes of the pages that a row may touch.
uint64_t row_span(const StreamTensor& t) {
  return (static_cast<uint64_t>(t.row_bytes()) + 2 * kIoAlign - 1) / kIoAlign * kIoAlign;
}

}  // namespace

WeightStream::WeightStream(std::shared_ptr<FlashReader> reader, StreamPlan plan,
                           const StreamTensor& lookup, const std::function<void()>& poll)
    : reader_(std::move(reader)),
      plan_(std::move(plan)),
      lookup_(lookup),
      kept_(static_cast<uint64_t>(plan_.pinned_bytes), "weights"),
      arena_(static_cast<uint64_t>(plan_.ring_bytes), "streamed weights"),
      lent_memory_(static_cast<uint64_t>(lent_bytes(plan_)), "weights"),
      pinned_(plan_.reads.size()),
      row_memory_(static_cast<uint64_t>(lookup_bytes(lookup)), "embeddings") {
  for (size_t i = 0; i < plan_.pieces.size(); ++i) {
    const auto number = static_cast<int32_t>(i);
    const auto tensor = static_cast<size_t>(plan_.pieces[i].tensor);
    if (tensor >= ranges_.size()) ranges_.resize(tensor + 1);
    if (ranges_[tensor].last == 0) ranges_[tensor].first = number;
    ranges_[tensor].last = number + 1;
  }
  std::vector<FlashReader::Piece> reads;
  uint8_t* at = lent_memory_.data();
  for (const int32_t i : plan_.lent) {
    const StreamRead& r = plan_.reads[static_cast<size_t>(i)];
    reads.push_back({r.extent, at});
    lent_at_.push_back(at);
    pinned_[static_cast<size_t>(i)] = at;
    at += page_span(r.extent);
  }
  at = kept_.data();
  for (size_t i = 0; i < plan_.reads.size(); ++i) {
    const StreamRead& r = plan_.reads[i];
    if (!r.pinned) {
      if (!pinned_[i]) streamed_.push_back(static_cast<int32_t>(i));
      continue;
    }
    reads.push_back({r.extent, at});
    pinned_[i] = at;
    at += page_span(r.extent);
  }
  reader_->read_all(reads, poll);
  kept_.protect();
  if (!streamed_.empty()) next_ = streamed_.front();
  pump();
}

WeightStream::~WeightStream() { drop(ring_.size()); }

void WeightStream::begin(Phase phase, const std::function<void()>* poll) {
  decode_ = phase != Phase::kPrompt;
  poll_ = poll;
  release();  // releases what a failed forward pass has left
}

const uint8_t* WeightStream::weights(int32_t i, const uint8_t* data) const {
  const StreamPiece& p = piece(i);
  const uint64_t begin = read(p.read).extent.offset / kIoAlign * kIoAlign;
  return data + (p.extent.offset - begin);
}

const uint8_t* WeightStream::get(int32_t i, bool wait) {
  const int32_t wanted = piece(i).read;
  if (const uint8_t* data = pinned_[static_cast<size_t>(wanted)]) return weights(i, data);
  const auto find = [&] {
    return std::find_if(ring_.begin(), ring_.end(),
                        [&](const Passing& p) { return p.read == wanted; });
  };
  const bool first = last_given_ < 0;
  auto it = find();
  if (it == ring_.end()) {
    if (!first) return nullptr;
    // The request is unexpected: a forward pass was interrupted, or leaves out the output.
    drop(ring_.size());
    next_ = wanted;
    pump();
    it = find();
  }
  IoStatus status = it->job.status.load(std::memory_order_acquire);
  if (status == IoStatus::kPending) {
    if (!wait || !first) return nullptr;
    reader_->io().promote(it->job);
    const double began = now();
    reader_->await(it->job, poll());
    count(0, now() - began);
    status = it->job.status.load(std::memory_order_acquire);
  }
  if (status != IoStatus::kDone) {
    const std::string error = it->job.error;
    drop(ring_.size());
    next_ = wanted;  // it will be read again
    throw Error(ErrorKind::kDevice, error);
  }
  const auto at = static_cast<size_t>(it - ring_.begin());
  if (at >= given_) {
    // Reads continue while the weights that were given are computed with.
    if (!first && given_bytes_ + it->taken > arena_.size() / kGivenShare) return nullptr;
    count(static_cast<int64_t>(it->job.reads[0].bytes), 0);
    given_bytes_ += it->taken;
    given_ = at + 1;
  }
  last_given_ = i;
  return weights(i, it->data);
}

void WeightStream::release() {
  if (last_given_ >= 0) {
    // A read whose last piece has not been asked for yet is kept.
    const bool more = last_given_ + 1 < read(ring_[given_ - 1].read).last;
    drop(given_ - (more ? 1 : 0));
  }
  last_given_ = -1;
  given_bytes_ = 0;
  pump();
}

int64_t WeightStream::lend(int64_t bytes) {
  int64_t total = 0;
  for (; given_up_ < plan_.lent.size() && total < bytes; ++given_up_) {
    const int32_t i = plan_.lent[given_up_];
    const int64_t span = page_span(read(i).extent);
    pinned_[static_cast<size_t>(i)] = nullptr;
    streamed_.insert(std::upper_bound(streamed_.begin(), streamed_.end(), i), i);
    lent_memory_.release(lent_at_[given_up_], static_cast<uint64_t>(span));
    total += span;
  }
  if (total > 0) restart();
  return total;
}

int64_t WeightStream::take_back(int64_t bytes) {
  int64_t total = 0;
  std::vector<FlashReader::Piece> reads;
  while (given_up_ > 0) {
    const int32_t i = plan_.lent[given_up_ - 1];
    const int64_t span = page_span(read(i).extent);
    if (total + span > bytes) break;
    --given_up_;
    total += span;
    reads.push_back({read(i).extent, lent_at_[given_up_]});
  }
  if (reads.empty()) return 0;
  drop(ring_.size());
  reader_->read_all(reads, none_);
  count(total, 0);
  const size_t first = given_up_;
  for (size_t k = first; k < first + reads.size(); ++k) {
    const int32_t i = plan_.lent[k];
    pinned_[static_cast<size_t>(i)] = lent_at_[k];
    std::erase(streamed_, i);
  }
  restart();
  return total;
}

void WeightStream::restart() {
  drop(ring_.size());
  if (streamed_.empty()) return;
  next_ = *streamed_.begin();
  pump();
}

std::span<const uint8_t* const> WeightStream::rows(std::span<const int32_t> numbers) {
  rows_.clear();
  const Range range = pieces(lookup_.tensor);
  std::vector<FlashReader::Piece> reads;
  uint8_t* at = row_memory_.data();
  for (const int32_t number : numbers) {
    const uint8_t* pinned = nullptr;
    for (int32_t i = range.first; i < range.last && !pinned; ++i) {
      const StreamPiece& p = piece(i);
      const uint8_t* data = pinned_[static_cast<size_t>(p.read)];
      if (!data || number < p.row_begin || number >= p.row_end) continue;
      pinned = weights(i, data) + (number - p.row_begin) * lookup_.row_bytes();
    }
    if (pinned) {
      rows_.push_back(pinned);
      continue;
    }
    const Extent extent = row_extent(lookup_, number);
    reads.push_back({extent, at});
    rows_.push_back(at + extent.offset % kIoAlign);
    at += row_span(lookup_);
  }
  if (reads.empty()) return rows_;
  const double began = now();
  reader_->read_all(reads, poll());
  int64_t bytes = 0;
  for (const auto& r : reads) bytes += page_span(r.extent);
  count(bytes, now() - began);
  return rows_;
}

int64_t WeightStream::lookup_bytes(const StreamTensor& lookup) {
  return static_cast<int64_t>(kLookupRows * row_span(lookup));
}

StreamCounters WeightStream::statistics() const {
  return {bytes_.load(), stall_s_.load(), decode_bytes_.load(), decode_stall_s_.load()};
}

double WeightStream::flash_bandwidth(int64_t bytes, uint64_t seed) {
  if (streamed_.empty()) return 0;
  begin(Phase::kPrompt, nullptr);
  drop(ring_.size());
  size_t i = std::mt19937_64(seed)() % streamed_.size();
  next_ = streamed_[i];
  int64_t total = 0;
  const double began = now();
  pump();
  for (; total < bytes; i = (i + 1) % streamed_.size()) {
    const StreamRead& r = read(streamed_[i]);
    get(r.last - 1, true);
    release();
    total += page_span(r.extent);
  }
  return static_cast<double>(total) / (now() - began);
}

int32_t WeightStream::streamed_after(int32_t i) const {
  const auto it = std::upper_bound(streamed_.begin(), streamed_.end(), i);
  return it == streamed_.end() ? streamed_.front() : *it;
}

void WeightStream::pump() {
  while (ring_.size() < streamed_.size()) {
    const Extent& extent = read(next_).extent;
    const auto span = static_cast<uint64_t>(page_span(extent));
    // A read must be contiguous; the end of the arena is skipped where it is too short.
    const bool wraps = head_ + span > arena_.size();
    const uint64_t skipped = wraps ? arena_.size() - head_ : 0;
    if (used_ + skipped + span > arena_.size()) return;
    if (wraps) head_ = 0;
    Passing& entry = ring_.emplace_back();
    entry.read = next_;
    entry.data = arena_.data() + head_;
    entry.taken = skipped + span;
    Read& into = entry.job.reads[0];
    into.file = extent.shard;
    into.offset = extent.offset / kIoAlign * kIoAlign;
    into.needed = extent.offset + extent.bytes - into.offset;
    into.bytes = span;
    into.into = entry.data;
    entry.job.n_reads = 1;
    reader_->io().submit(entry.job, false);
    head_ += span;
    used_ += entry.taken;
    next_ = streamed_after(next_);
  }
}

void WeightStream::drop(size_t n) {
  jobs_.clear();
  for (size_t i = 0; i < n; ++i) jobs_.push_back(&ring_[i].job);
  reader_->end(jobs_);
  for (size_t i = 0; i < n; ++i) {
    used_ -= ring_.front().taken;
    ring_.pop_front();
  }
  given_ -= std::min(n, given_);
  if (given_ == 0) last_given_ = -1;
  if (ring_.empty()) head_ = used_ = 0;
}

void WeightStream::count(int64_t bytes, double stall_s) {
  bytes_.fetch_add(bytes);
  stall_s_.store(stall_s_.load() + stall_s);
  if (!decode_) return;
  decode_bytes_.fetch_add(bytes);
  decode_stall_s_.store(decode_stall_s_.load() + stall_s);
}

}  // namespace stoker
