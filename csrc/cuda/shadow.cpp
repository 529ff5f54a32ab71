// Who touched which byte of shared memory, and when: finds accesses that no barrier orders.
//
// Kernels are compiled with g++'s -fsanitize=thread, which puts a call of __tsan_read4(address) and
// its siblings before every access; this file defines those calls instead of the sanitizer's own
// library, which knows no fibers. Accesses of ldmatrix and copy_async are told by collectives.cpp.
//
// Each pair of bytes remembers its last writer and its readers since the last block barrier. Two
// accesses by different threads, one a write, are a race unless a block barrier lies between them,
// or, within a warp, a warp_barrier. Single bytes share the memory of their pair, so a race between
// threads that also wrote the neighbouring byte may go unseen.
#include <algorithm>
#include <vector>

#include "host.h"

namespace cgpt::cuda::host {
namespace {

enum class Kind : uint8_t { thread, warp, block, copy };  // who read; or a copy that is under way

struct Tag {
  uint32_t epoch = 0;  // block barriers passed, over all blocks of the launch; 0: never touched
  uint16_t sync = 0;   // warp barriers passed since
  uint16_t thread = 0;
  uint8_t bytes = 0;  // bit 0: the lower one of the pair
  Kind kind = Kind::thread;
};

struct Cell {
  Tag write, read;
};

std::vector<std::vector<Cell>> all_cells;  // by block
Cell* cells = nullptr;                     // of the block that runs
uint32_t epoch = 0;
uint16_t syncs[32] = {};

// Whether what tag says happened before what the thread does now.
bool ordered(const Tag& tag, const Thread& t) {
  if (tag.kind == Kind::copy) return false;
  if (tag.epoch != epoch) return true;
  if (tag.kind == Kind::block) return false;
  if (tag.kind == Kind::thread && tag.thread == t.index) return true;
  return tag.thread / 32 == t.warp && tag.sync < syncs[t.warp];
}

[[noreturn]] void race(const Tag& tag, const Thread& t, int64_t at, const char* did,
                       const char* does) {
  const std::string what = std::string(" shared memory at byte ") + std::to_string(at);
  if (tag.kind == Kind::copy)
    misuse(std::string(does) + what + " while a copy_async into it by thread " +
               std::to_string(tag.thread) + " is under way",
           &t);
  misuse("race: " + std::string(does) + what + ", which thread " + std::to_string(tag.thread) +
             " " + did + " with no barrier in between",
         &t);
}

void touch_read(Cell& cell, const Thread& t, int64_t at, uint8_t bytes) {
  const Tag& w = cell.write;
  if (w.bytes & bytes && !ordered(w, t)) race(w, t, at, "wrote", "reads");
  Tag& r = cell.read;
  if (r.epoch != epoch) {
    r = {epoch, syncs[t.warp], static_cast<uint16_t>(t.index), bytes, Kind::thread};
    return;
  }
  if (r.thread / 32 != t.warp) r.kind = Kind::block;
  else if (r.thread != t.index && r.kind == Kind::thread) r.kind = Kind::warp;
  r.sync = syncs[t.warp];
  r.bytes |= bytes;
}

void touch_write(Cell& cell, const Thread& t, int64_t at, uint8_t bytes, Access access) {
  Tag& w = cell.write;
  const bool own_copy = access == Access::copy_done && w.kind == Kind::copy && w.thread == t.index;
  if (w.bytes & bytes && !own_copy && !ordered(w, t)) race(w, t, at, "wrote", "writes");
  const Tag& r = cell.read;
  if (r.bytes & bytes && !ordered(r, t)) race(r, t, at, "read", "writes");
  w = {epoch, syncs[t.warp], static_cast<uint16_t>(t.index), bytes,
       access == Access::copy_issued ? Kind::copy : Kind::thread};
}

}  // namespace

void touch(const Thread& t, const void* p, int64_t bytes, Access access) {
  const int64_t from_window = static_cast<const unsigned char*>(p) - window;
  if (from_window < 0 || from_window >= kWindow) return;
  const int64_t at = from_window - kMargin;
  if (at < 0 || at + bytes > place.shared_bytes)
    misuse(std::string(access == Access::read ? "reads " : "writes ") + std::to_string(bytes) +
               " bytes at byte " + std::to_string(at) + " of shared memory, which has " +
               std::to_string(place.shared_bytes),
           &t);
  for (int64_t pair = at / 2; pair * 2 < at + bytes; ++pair) {
    const int low = pair * 2 >= at, high = pair * 2 + 1 < at + bytes;
    const auto mask = static_cast<uint8_t>(low | high << 1);
    if (access == Access::read) touch_read(cells[pair], t, pair * 2, mask);
    else touch_write(cells[pair], t, pair * 2, mask, access);
  }
}

void shadow_new_launch(int64_t blocks) {
  if (all_cells.size() < static_cast<size_t>(blocks))
    all_cells.resize(static_cast<size_t>(blocks), std::vector<Cell>(kMostShared / 2));
  for (int64_t b = 0; b < blocks; ++b)
    std::fill_n(all_cells[static_cast<size_t>(b)].begin(), (place.shared_bytes + 1) / 2, Cell{});
  epoch = 0;
}
void shadow_block(int64_t block) {
  cells = all_cells[static_cast<size_t>(block)].data();
  shadow_barrier();  // a block starts, or goes on behind a barrier
}
void shadow_barrier() {
  ++epoch;
  std::fill_n(syncs, 32, uint16_t{0});
}
void shadow_warp_barrier(int warp) { ++syncs[warp]; }

}  // namespace cgpt::cuda::host

// ---- what instrumented kernels call -------------------------------------------------------------

namespace {

using cgpt::cuda::host::Access;

inline void instrumented(const void* p, int64_t bytes, Access access) {
  using namespace cgpt::cuda::host;
  const auto at = reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(window);
  if (at < static_cast<uintptr_t>(kWindow) && current) touch(*current, p, bytes, access);
}

}  // namespace

#define CGPT_HOOKS(bytes)                                                              \
  void __tsan_read##bytes(void* p) { instrumented(p, bytes, Access::read); }           \
  void __tsan_write##bytes(void* p) { instrumented(p, bytes, Access::write); }         \
  void __tsan_unaligned_read##bytes(void* p) { instrumented(p, bytes, Access::read); } \
  void __tsan_unaligned_write##bytes(void* p) { instrumented(p, bytes, Access::write); }
extern "C" {
CGPT_HOOKS(1)
CGPT_HOOKS(2)
CGPT_HOOKS(4)
CGPT_HOOKS(8)
CGPT_HOOKS(16)
void __tsan_read_range(void* p, int64_t bytes) { instrumented(p, bytes, Access::read); }
void __tsan_write_range(void* p, int64_t bytes) { instrumented(p, bytes, Access::write); }
void __tsan_vptr_update(void*, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
