// Anonymous memory in huge pages, which holds weights. It cannot change or vanish under a running
// model as a mapped file can.
#pragma once

#include <cstdint>

namespace stoker {

class HugeMemory {
 public:
  HugeMemory() = default;
  // The memory is zero-initialised and aligned to 2 MB; the system provides pages as they are first
  // touched. `what` names the purpose in Error(kBudget).
  HugeMemory(uint64_t bytes, const char* what);
  ~HugeMemory();
  HugeMemory(HugeMemory&& other) noexcept;
  HugeMemory& operator=(HugeMemory&& other) noexcept;

  uint8_t* data() const { return base_; }
  uint64_t size() const { return size_; }
  // Gives whole pages of [p, p + bytes) back to the system; they read as zeros afterwards.
  void release(uint8_t* p, uint64_t bytes);
  // Makes the memory read-only: later writes are faults.
  void protect();

 private:
  uint8_t* base_ = nullptr;
  uint64_t size_ = 0;
};

// Anonymous memory of whole pages of the system; null where there is none.
uint8_t* map_pages(uint64_t bytes);
void unmap_pages(uint8_t* p, uint64_t bytes);

}  // namespace stoker
