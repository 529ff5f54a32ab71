#include "scratch.h"

#include <cstdlib>
#include <new>

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
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    s.data = std::aligned_alloc(4096, rounded);
    if (!s.data) throw std::bad_alloc();
    s.bytes = rounded;
  }
  return s.data;
}

}  // namespace cgpt
