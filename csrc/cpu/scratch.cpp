#include "scratch.h"

#include <cstdlib>
#include <new>

#include "pages.h"

namespace cgpt {
namespace {

struct Slot {
  void* data = nullptr;
  size_t bytes = 0;
  ~Slot() { std::free(data); }
};
thread_local Slot slots[kScratchSlots];

}  // namespace

void* thread_scratch(int slot, size_t bytes) {
  Slot& s = slots[slot];
  if (bytes > s.bytes) {
    std::free(s.data);
    s.data = nullptr, s.bytes = 0;
    // Rows and sums of a product are walked in strides: huge pages from a quarter of one on.
    const size_t page = bytes >= kHugePage / 4 ? kHugePage : 4096;
    const size_t rounded = (bytes + page - 1) / page * page;
    s.data = std::aligned_alloc(page, rounded);
    if (!s.data) throw std::bad_alloc();
    if (page == kHugePage) advise_huge_pages(s.data, rounded);
    s.bytes = rounded;
  }
  return s.data;
}

}  // namespace cgpt
