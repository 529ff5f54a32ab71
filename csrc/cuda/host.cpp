// Blocks on the host: one fiber per thread, switched by hand, one block after the other; those of a
// cooperative launch side by side, each until it waits at the grid's barrier.
//
// A thread runs until a rendezvous (block barrier, warp collective) or its end, and then hands over
// to another ready thread directly. Who is ready waits in a ring; CGPT_CUDA_HOST_SEED decides, for
// each block, in which order threads and lanes are put into it and from which end they are taken
// (one end runs threads in step, the other lets one run far ahead), and the order of the blocks.
#include "host.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
  #include <sanitizer/asan_interface.h>
  #include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
  #include <ucontext.h>
#endif

namespace cgpt::cuda::host {

Thread* current = nullptr;
Place place;
unsigned char* window = nullptr;

namespace {

constexpr int kMaxThreads = 1024;
constexpr const char* kBlockBarrier = "block_barrier";
constexpr const char* kGridBarrier = "grid_barrier";
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStackBytes = 256 * 1024;  // red zones around every local array
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif
constexpr size_t kGuardBytes = 4096;

// ---- switching ----------------------------------------------------------------------------------

#if defined(__x86_64__)

// Saves what a function must preserve on the stack in use and goes on with another one's.
extern "C" void cgpt_host_switch(void** save, void* load);
asm(R"(
.text
.type cgpt_host_switch, @function
cgpt_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cgpt_host_switch, .-cgpt_host_switch
)");

void switch_stacks(void** save, void* load) { cgpt_host_switch(save, load); }

void* fresh_stack(Thread& thread, void (*entry)()) {
  // Stacks lie a power of two apart: without this shift their tops would share one set of L1.
  unsigned char* top = thread.stack + kStackBytes - (thread.index % 64) * 64 - 64;
  void** slot = reinterpret_cast<void**>(top);
  *--slot = nullptr;  // where entry would return to; it never does
  *--slot = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--slot = nullptr;
  return slot;
}

#else  // the portable way: right, and a system call slower

void switch_stacks(void** save, void* load) {
  ucontext_t here;
  *save = &here;
  swapcontext(&here, static_cast<ucontext_t*>(load));
}

void* fresh_stack(Thread& thread, void (*entry)()) {
  static ucontext_t contexts[kMaxThreads];
  ucontext_t& c = contexts[thread.index];
  getcontext(&c);
  c.uc_stack.ss_sp = thread.stack;
  c.uc_stack.ss_size = kStackBytes;
  c.uc_link = nullptr;
  makecontext(&c, entry, 0);
  return &c;
}

#endif

// ---- the machine --------------------------------------------------------------------------------

struct Waiting {
  const char* name = nullptr;
  void (*perform)(void* const*) = nullptr;
  int arrived = 0;
  void* lanes[32] = {};
};

struct Block {
  Thread threads[kMaxThreads];
  Waiting warps[kMaxThreads / 32];
  const char* at[kMaxThreads] = {};     // what each thread waits for; nullptr: it runs or is ready
  const void* thing[kMaxThreads] = {};  // of sleep()
  bool finished[kMaxThreads] = {};
  int at_barrier = 0, at_grid = 0, done = 0;

  // Ready threads, a ring.
  uint16_t ready[kMaxThreads];
  unsigned head = 0, count = 0;
  bool newest_first = false;

  uint16_t order[kMaxThreads];
  unsigned coordinates[3] = {};
  unsigned char* window = nullptr;
};

struct Machine {
  std::mutex one_launch;
  std::vector<std::unique_ptr<Block>> blocks;  // one, or those of a cooperative launch
  size_t side_by_side = 1;                     // of them
  size_t running = 0;
  bool cooperative = false;

  void* outside = nullptr;  // stack pointer of run()
  const char* op = nullptr;
  void (*body)(const void*) = nullptr;
  const void* closure = nullptr;
  std::string error;

  uint64_t random = 0;
  bool shuffled = false;
  uint8_t lane_orders[16][32];
  const void* outside_stack = nullptr;
  size_t outside_size = 0;

  Block& block() { return *blocks[running]; }
};

Machine& machine() {
  static Machine m;
  return m;
}

uint64_t draw(Machine& m) {  // xorshift64*
  m.random ^= m.random >> 12;
  m.random ^= m.random << 25;
  m.random ^= m.random >> 27;
  return m.random * 0x2545F4914F6CDD1Dull;
}
int draw_below(Machine& m, int n) {
  return static_cast<int>((draw(m) >> 32) % static_cast<uint64_t>(n));
}

template <class T>
void shuffle_order(Machine& m, T* items, int n) {
  for (int i = n - 1; i > 0; --i) std::swap(items[i], items[draw_below(m, i + 1)]);
}

void push(Block& b, int thread) {
  b.ready[(b.head + b.count++) % kMaxThreads] = static_cast<uint16_t>(thread);
}

Thread& pop(Block& b) {
  const unsigned at = b.newest_first ? b.head + --b.count : (--b.count, b.head++);
  return b.threads[b.ready[at % kMaxThreads]];
}

// Makes all threads ready again, in another order.
void release(Machine& m, Block& b) {
  if (m.shuffled) shuffle_order(m, b.order, place.threads);
  for (int i = 0; i < place.threads; ++i) {
    b.at[b.order[i]] = nullptr;
    push(b, b.order[i]);
  }
}

// Block i runs from here on.
void go_on_with(Machine& m, size_t i) {
  m.running = i;
  const Block& b = m.block();
  std::copy_n(b.coordinates, 3, place.block);
  window = b.window;
  place.shared = window + kMargin;
  shadow_block(static_cast<int64_t>(i));
}

// Called around every switch; `to` is nullptr for the stack of run().
void before_switch([[maybe_unused]] Machine& m, [[maybe_unused]] Thread* to,
                   [[maybe_unused]] void** fake, [[maybe_unused]] bool for_good) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(for_good ? nullptr : fake, to ? to->stack : m.outside_stack,
                                 to ? kStackBytes : m.outside_size);
#endif
}
void after_switch([[maybe_unused]] void* fake, [[maybe_unused]] const void** from,
                  [[maybe_unused]] size_t* size) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake, from, size);
#endif
}

[[noreturn]] void leave(Machine& m) {
  Thread* self = current;
  before_switch(m, nullptr, nullptr, true);
  switch_stacks(&self->stack_pointer, m.outside);
  __builtin_unreachable();
}

std::string threads_text(const Thread& t) { return "thread " + std::to_string(t.index); }

// No thread can go on, yet not all have finished: says which waits for what, and who is not there.
[[noreturn]] void stuck(Machine& m) {
  const Block& b = m.block();
  const Thread* waiting = nullptr;
  for (int i = 0; i < place.threads && !waiting; ++i)
    if (b.at[i]) waiting = &b.threads[i];
  const char* what = b.at[waiting->index];
  if (b.thing[waiting->index])
    misuse(std::string("waits at ") + what + " for what nobody brings", waiting);
  const bool barrier =
      std::strcmp(what, kBlockBarrier) == 0 || std::strcmp(what, kGridBarrier) == 0;
  // A warp collective concerns its own lanes: name one of those.
  const int begin = barrier ? 0 : waiting->warp * 32;
  const int end = barrier ? place.threads : begin + 32;
  std::string other;
  for (int i = begin; i < end && other.empty(); ++i) {
    if (b.finished[i]) other = threads_text(b.threads[i]) + " has finished";
    else if (std::strcmp(b.at[i], what) != 0)
      other = threads_text(b.threads[i]) + " waits at " + b.at[i];
  }
  const char* who = barrier ? "all threads" : "all 32 lanes";
  if (other.empty()) who = "all blocks", other = "another block has finished";
  misuse(std::string("waits at ") + what + ", which " + who + " must reach, but " + other, waiting);
}

// The next block that can go on, after the one that cannot; that one itself where there is none.
size_t next_block(Machine& m) {
  for (size_t i = 1; i < m.side_by_side; ++i) {
    const size_t other = (m.running + i) % m.side_by_side;
    if (m.blocks[other]->count > 0) return other;
  }
  return m.running;
}

// Hands over to a ready thread; returns when this one is resumed.
void hand_over(Machine& m) {
  while (m.block().count == 0 && late_copy()) {
  }
  Thread* self = current;
  const bool over = m.block().finished[self->index];
  if (m.block().count == 0) {
    const Block& b = m.block();
    const size_t next = next_block(m);
    const bool waits = b.at_grid == place.threads;
    if (b.done < place.threads && !waits) stuck(m);
    if (next == m.running) {
      for (size_t i = 0; i < m.side_by_side; ++i)
        if (m.blocks[i]->done < place.threads) {
          go_on_with(m, i);
          stuck(m);
        }
      leave(m);
    }
    go_on_with(m, next);
  }
  Thread& next = pop(m.block());
  current = &next;
  if (&next == self) return;
  void* fake = nullptr;
  before_switch(m, &next, &fake, over);
  switch_stacks(&self->stack_pointer, next.stack_pointer);
  after_switch(fake, nullptr, nullptr);
}

void entry() {
  Machine& m = machine();
  after_switch(nullptr, m.outside_stack ? nullptr : &m.outside_stack,
               m.outside_stack ? nullptr : &m.outside_size);
  m.body(m.closure);
  copy_async_at_end();
  m.block().finished[current->index] = true;
  ++m.block().done;
  hand_over(m);
  __builtin_unreachable();
}

void allocate(Block& b, int threads) {
  for (int i = 0; i < threads; ++i) {
    Thread& t = b.threads[i];
    t.copies.clear();
    t.groups = 0;
    if (t.stack) continue;
    void* p = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    mprotect(p, kGuardBytes, PROT_NONE);  // a kernel with too large local arrays stops here
    t.stack = static_cast<unsigned char*>(p) + kGuardBytes;
    t.index = i, t.warp = i / 32, t.lane = i % 32;
  }
  if (!b.window) {
    void* p = mmap(nullptr, kWindow, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    b.window = static_cast<unsigned char*>(p);
  }
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(b.window, kWindow);
  __asan_unpoison_memory_region(b.window + kMargin, static_cast<size_t>(place.shared_bytes));
#endif
  for (int i = 0; i < threads; ++i) b.order[i] = static_cast<uint16_t>(i);
}

// Block `index` of the grid, with all its threads at their start.
void start(Machine& m, Block& b, int64_t index) {
  const int64_t x = place.grid[0], y = place.grid[1];
  b.coordinates[0] = static_cast<unsigned>(index % x);
  b.coordinates[1] = static_cast<unsigned>(index / x % y);
  b.coordinates[2] = static_cast<unsigned>(index / x / y);
  b.at_barrier = b.at_grid = b.done = 0;
  b.head = b.count = 0;
  for (int w = 0; w < place.threads / 32; ++w) b.warps[w].arrived = 0;
  std::fill_n(b.finished, place.threads, false);
  std::fill_n(b.thing, place.threads, nullptr);
  std::memset(b.window + kMargin, 0xff, static_cast<size_t>(place.shared_bytes));
  b.newest_first = m.shuffled && draw(m) >> 63;
  hopper_new_block(place.threads, m.shuffled && draw(m) >> 63);
  for (int i = 0; i < place.threads; ++i) {
    Thread& t = b.threads[i];
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(t.stack, kStackBytes);
#endif
    t.stack_pointer = fresh_stack(t, &entry);
  }
  release(m, b);
}

// Runs what `start` has prepared, the first block first.
void run_blocks(Machine& m) {
  go_on_with(m, 0);
  Thread& first = pop(m.block());
  current = &first;
  void* fake = nullptr;
  before_switch(m, &first, &fake, false);
  switch_stacks(&m.outside, first.stack_pointer);
  after_switch(fake, nullptr, nullptr);
  current = nullptr;
}

uint64_t seed_of_order() {
  const char* text = std::getenv("CGPT_CUDA_HOST_SEED");
  return text ? std::strtoull(text, nullptr, 10) : 0;
}

void prepare(Machine& m, int threads) {
  while (m.blocks.size() < m.side_by_side) m.blocks.push_back(std::make_unique<Block>());
  for (size_t i = 0; i < m.side_by_side; ++i) allocate(*m.blocks[i], threads);
  const uint64_t seed = seed_of_order();
  m.shuffled = seed != 0;
  m.random = seed * 0x9E3779B97F4A7C15ull | 1;
  for (auto& lanes : m.lane_orders) {
    for (int i = 0; i < 32; ++i) lanes[i] = static_cast<uint8_t>(i);
    if (m.shuffled) shuffle_order(m, lanes, 32);
  }
}

}  // namespace

void misuse(const std::string& what, const Thread* thread) {
  Machine& m = machine();
  m.error = std::string(m.op) + ": block (" + std::to_string(place.block[0]) + ", " +
            std::to_string(place.block[1]) + ", " + std::to_string(place.block[2]) + "), " +
            threads_text(thread ? *thread : *current) + ": " + what;
  leave(m);
}

void run(const char* op, int64_t grid_x, int64_t grid_y, int64_t grid_z, int threads,
         int64_t shared_bytes, bool cooperative, void (*body)(const void*), const void* closure) {
  Machine& m = machine();
  const std::lock_guard lock(m.one_launch);
  if (shared_bytes > kMostShared)
    throw std::invalid_argument(std::string(op) + ": a block has at most " +
                                std::to_string(kMostShared) + " bytes of shared memory, got " +
                                std::to_string(shared_bytes));
  const int64_t blocks = grid_x * grid_y * grid_z;
  if (blocks == 0) return;
  if (cooperative && blocks > most_blocks())
    throw std::invalid_argument(std::string(op) + ": at most " + std::to_string(most_blocks()) +
                                " blocks run side by side, got " + std::to_string(blocks));
  place.threads = threads;
  place.shared_bytes = shared_bytes;
  m.cooperative = cooperative;
  m.side_by_side = cooperative ? static_cast<size_t>(blocks) : 1;
  prepare(m, threads);
  m.op = op, m.body = body, m.closure = closure;
  m.error.clear();
  place.grid[0] = static_cast<unsigned>(grid_x);
  place.grid[1] = static_cast<unsigned>(grid_y);
  place.grid[2] = static_cast<unsigned>(grid_z);
  shadow_new_launch(static_cast<int64_t>(m.side_by_side));
#ifdef __SANITIZE_ADDRESS__
  m.outside_stack = nullptr;
#endif
  std::vector<int64_t> order(static_cast<size_t>(blocks));
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
  if (m.shuffled) shuffle_order(m, order.data(), static_cast<int>(order.size()));
  for (size_t i = 0; i < order.size() && m.error.empty(); i += m.side_by_side) {
    for (size_t j = 0; j < m.side_by_side; ++j) start(m, *m.blocks[j], order[i + j]);
    run_blocks(m);
  }
  if (!m.error.empty()) throw std::runtime_error(m.error);
}

int64_t most_blocks() { return 3 + static_cast<int64_t>(seed_of_order() % 3); }

void block_barrier() {
  Machine& m = machine();
  Block& b = m.block();
  if (++b.at_barrier < place.threads) {
    b.at[current->index] = kBlockBarrier;
    hand_over(m);
    return;
  }
  b.at_barrier = 0;
  shadow_barrier();
  release(m, b);
  hand_over(m);
}

void sleep(const char* name, const void* thing) {
  Machine& m = machine();
  m.block().at[current->index] = name, m.block().thing[current->index] = thing;
  hand_over(m);
}

void wake(const void* thing) {
  Block& b = machine().block();
  for (int i = 0; i < place.threads; ++i) {
    const int thread = b.order[i];
    if (b.thing[thread] != thing) continue;
    b.at[thread] = nullptr, b.thing[thread] = nullptr;
    push(b, thread);
  }
}

void step_aside() {
  Machine& m = machine();
  Block& b = m.block();
  // at the end that is taken last
  if (b.newest_first) {
    b.head = (b.head + kMaxThreads - 1) % kMaxThreads;
    b.ready[b.head] = static_cast<uint16_t>(current->index);
    ++b.count;
  } else {
    push(b, current->index);
  }
  hand_over(m);
}

void grid_barrier() {
  Machine& m = machine();
  if (!m.cooperative) misuse("grid_barrier needs a cooperative launch");
  Block& b = m.block();
  b.at[current->index] = kGridBarrier;
  bool all = ++b.at_grid == place.threads;
  for (size_t i = 0; all && i < m.side_by_side; ++i) all = m.blocks[i]->at_grid == place.threads;
  if (all) {
    for (size_t i = 0; i < m.side_by_side; ++i) {
      m.blocks[i]->at_grid = 0;
      release(m, *m.blocks[i]);
    }
    shadow_barrier();
  }
  hand_over(m);
}

void warp_collective(const char* name, void (*perform)(void* const*), void* mine) {
  Machine& m = machine();
  Block& b = m.block();
  const Thread& self = *current;
  Waiting& w = b.warps[self.warp];
  if (w.arrived > 0 && w.perform != perform)
    misuse(std::string("is at ") + name + " while other lanes of its warp wait at " + w.name);
  w.name = name, w.perform = perform;
  w.lanes[self.lane] = mine;
  if (++w.arrived < 32) {
    b.at[self.index] = name;
    hand_over(m);
    return;
  }
  w.arrived = 0;
  perform(w.lanes);
  const uint8_t* lanes = m.lane_orders[m.shuffled ? draw(m) >> 60 : 0];
  for (int i = 0; i < 32; ++i) {
    const int thread = self.warp * 32 + lanes[i];
    b.at[thread] = nullptr;
    push(b, thread);
  }
  hand_over(m);
}

}  // namespace cgpt::cuda::host
