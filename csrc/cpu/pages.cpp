#include "pages.h"

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
  #include <sys/mman.h>
#endif

namespace cgpt {
namespace {

constexpr size_t kShared = 16 * kHugePage;

struct Mapping {
  char* base;
  size_t size, used;
  int64_t live;  // blocks handed out and not yet freed
};

std::mutex mutex;
std::vector<Mapping>& mappings() {
  // Never destroyed: tensors may outlive static destructors.
  static auto* all = new std::vector<Mapping>;
  return *all;
}

size_t round_up(size_t n, size_t step) { return (n + step - 1) / step * step; }

#if defined(__linux__)
char* map(size_t size) {
  // One huge page more, for mmap aligns to 4 KiB; what sticks out goes back.
  void* raw =
      mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) throw std::bad_alloc();
  char* first = static_cast<char*>(raw);
  char* base = reinterpret_cast<char*>(round_up(reinterpret_cast<uintptr_t>(first), kHugePage));
  const size_t before = static_cast<size_t>(base - first), after = kHugePage - before;
  if (before > 0) munmap(first, before);
  if (after > 0) munmap(base + size, after);
  madvise(base, size, MADV_HUGEPAGE);  // a refusal leaves small pages: slower, not wrong
  return base;
}
void unmap(const Mapping& m) { munmap(m.base, m.size); }
#else
char* map(size_t size) {
  void* base = std::aligned_alloc(4096, size);
  if (!base) throw std::bad_alloc();
  __builtin_memset(base, 0, size);
  return static_cast<char*>(base);
}
void unmap(const Mapping& m) { std::free(m.base); }
#endif

}  // namespace

void* allocate_pages(size_t bytes) {
  bytes = round_up(bytes > 0 ? bytes : 1, 64);
  const std::lock_guard<std::mutex> lock(mutex);
  auto& all = mappings();
  const bool shares = bytes <= kShared / 2;
  if (shares)
    for (Mapping& m : all)
      if (m.size == kShared && m.size - m.used >= bytes) {
        char* data = m.base + m.used;
        m.used += bytes;
        ++m.live;
        return data;
      }
  const size_t size = shares ? kShared : round_up(bytes, kHugePage);
  all.reserve(all.size() + 1);
  all.push_back({map(size), size, bytes, 1});
  return all.back().base;
}

void free_pages(void* data) noexcept {
  const std::lock_guard<std::mutex> lock(mutex);
  auto& all = mappings();
  for (Mapping& m : all) {
    const char* p = static_cast<char*>(data);
    if (p < m.base || p >= m.base + m.size) continue;
    if (--m.live == 0) {
      unmap(m);
      m = all.back();
      all.pop_back();
    }
    return;
  }
}

void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) noexcept {
#if defined(__linux__)
  const uintptr_t begin = round_up(reinterpret_cast<uintptr_t>(data), kHugePage);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace cgpt
