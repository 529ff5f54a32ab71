// Aligned working memory of a thread that outlives the call: packing blocks of a megabyte would
// otherwise be mapped and faulted in again on every call, which costs more than small products.
#pragma once

#include <cstddef>

namespace cgpt {

// At least `bytes` bytes, aligned to 64, contents undefined, valid until the same thread asks for
// the same slot again. A buffer only grows; it is freed when the thread ends. Slots tell buffers
// apart that are in use at the same time. Throws std::bad_alloc.
void* thread_scratch(int slot, size_t bytes);
constexpr int kScratchSlots = 6;

}  // namespace cgpt
