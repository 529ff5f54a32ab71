// Blocks on the host: one fiber per thread, switched by hand, one block after the other.
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

struct Machine {
  std::mutex one_launch;
  Thread threads[kMaxThreads];
  Waiting warps[kMaxThreads / 32];
  const char* at[kMaxThreads] = {};     // what each thread waits for; nullptr: it runs or is ready
  const void* thing[kMaxThreads] = {};  // of sleep()
  bool finished[kMaxThreads] = {};
  int at_barrier = 0, done = 0;

  // Ready threads, a ring.
  uint16_t ready[kMaxThreads];
  unsigned head = 0, count = 0;
  bool newest_first = false;

  void* outside = nullptr;  // stack pointer of run()
  const char* op = nullptr;
  void (*body)(const void*) = nullptr;
  const void* closure = nullptr;
  std::string error;

  uint64_t random = 0;
  bool shuffled = false;
  uint16_t order[kMaxThreads];
  uint8_t lane_orders[16][32];
  const void* outside_stack = nullptr;
  size_t outside_size = 0;
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

void push(Machine& m, int thread) {
  m.ready[(m.head + m.count++) % kMaxThreads] = static_cast<uint16_t>(thread);
}

Thread& pop(Machine& m) {
  const unsigned at = m.newest_first ? m.head + --m.count : (--m.count, m.head++);
  return m.threads[m.ready[at % kMaxThreads]];
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
  const Thread* waiting = nullptr;
  for (int i = 0; i < place.threads && !waiting; ++i)
    if (m.at[i]) waiting = &m.threads[i];
  if (m.thing[waiting->index])
    misuse(std::string("waits at ") + m.at[waiting->index] + " for what nobody brings", waiting);
  const bool barrier = std::strcmp(m.at[waiting->index], "block_barrier") == 0;
  // A warp collective concerns its own lanes: name one of those.
  const int begin = barrier ? 0 : waiting->warp * 32;
  const int end = barrier ? place.threads : begin + 32;
  std::string other;
  for (int i = begin; i < end && other.empty(); ++i) {
    if (m.finished[i]) other = threads_text(m.threads[i]) + " has finished";
    else if (std::strcmp(m.at[i], m.at[waiting->index]) != 0)
      other = threads_text(m.threads[i]) + " waits at " + m.at[i];
  }
  misuse(std::string("waits at ") + m.at[waiting->index] + ", which " +
             (barrier ? "all threads" : "all 32 lanes") + " must reach, but " + other,
         waiting);
}

// Hands over to a ready thread; returns when this one is resumed.
void hand_over(Machine& m) {
  while (m.count == 0 && late_copy()) {
  }
  if (m.count == 0) {
    if (m.done == place.threads) leave(m);
    stuck(m);
  }
  Thread* self = current;
  Thread& next = pop(m);
  current = &next;
  if (&next == self) return;
  void* fake = nullptr;
  before_switch(m, &next, &fake, m.finished[self->index]);
  switch_stacks(&self->stack_pointer, next.stack_pointer);
  after_switch(fake, nullptr, nullptr);
}

void entry() {
  Machine& m = machine();
  after_switch(nullptr, m.outside_stack ? nullptr : &m.outside_stack,
               m.outside_stack ? nullptr : &m.outside_size);
  m.body(m.closure);
  copy_async_at_end();
  m.finished[current->index] = true;
  ++m.done;
  hand_over(m);
  __builtin_unreachable();
}

void allocate_stacks(Machine& m, int threads) {
  for (int i = 0; i < threads; ++i) {
    Thread& t = m.threads[i];
    if (t.stack) continue;
    void* p = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    mprotect(p, kGuardBytes, PROT_NONE);  // a kernel with too large local arrays stops here
    t.stack = static_cast<unsigned char*>(p) + kGuardBytes;
    t.index = i, t.warp = i / 32, t.lane = i % 32;
  }
}

void run_block(Machine& m) {
  m.at_barrier = m.done = 0;
  m.head = m.count = 0;
  for (int w = 0; w < place.threads / 32; ++w) m.warps[w].arrived = 0;
  std::fill_n(m.at, place.threads, nullptr);
  std::fill_n(m.thing, place.threads, nullptr);
  std::fill_n(m.finished, place.threads, false);
  std::memset(place.shared, 0xff, static_cast<size_t>(place.shared_bytes));
  shadow_new_block();
  if (m.shuffled) {
    m.newest_first = draw(m) >> 63;
    shuffle_order(m, m.order, place.threads);
  }
  hopper_new_block(place.threads, m.shuffled && draw(m) >> 63);
  for (int i = 0; i < place.threads; ++i) {
    Thread& t = m.threads[m.order[i]];
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(t.stack, kStackBytes);
#endif
    t.stack_pointer = fresh_stack(t, &entry);
    push(m, t.index);
  }
  Thread& first = pop(m);
  current = &first;
  void* fake = nullptr;
  before_switch(m, &first, &fake, false);
  switch_stacks(&m.outside, first.stack_pointer);
  after_switch(fake, nullptr, nullptr);
  current = nullptr;
}

void prepare(Machine& m, int threads) {
  allocate_stacks(m, threads);
  if (!window) {
    void* p = mmap(nullptr, kWindow, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    window = static_cast<unsigned char*>(p);
  }
  const char* text = std::getenv("CGPT_CUDA_HOST_SEED");
  const uint64_t seed = text ? std::strtoull(text, nullptr, 10) : 0;
  m.shuffled = seed != 0;
  m.newest_first = false;
  m.random = seed * 0x9E3779B97F4A7C15ull | 1;
  for (int i = 0; i < threads; ++i) m.order[i] = static_cast<uint16_t>(i);
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
         int64_t shared_bytes, void (*body)(const void*), const void* closure) {
  Machine& m = machine();
  const std::lock_guard lock(m.one_launch);
  if (shared_bytes > kMostShared)
    throw std::invalid_argument(std::string(op) + ": a block has at most " +
                                std::to_string(kMostShared) + " bytes of shared memory, got " +
                                std::to_string(shared_bytes));
  prepare(m, threads);
  m.op = op, m.body = body, m.closure = closure;
  m.error.clear();
  place.grid[0] = static_cast<unsigned>(grid_x);
  place.grid[1] = static_cast<unsigned>(grid_y);
  place.grid[2] = static_cast<unsigned>(grid_z);
  place.threads = threads;
  place.shared = window + kMargin;
  place.shared_bytes = shared_bytes;
  copy_async_forget(threads);
  shadow_new_launch();
#ifdef __SANITIZE_ADDRESS__
  m.outside_stack = nullptr;
  __asan_poison_memory_region(window, kWindow);
  __asan_unpoison_memory_region(place.shared, static_cast<size_t>(shared_bytes));
#endif
  const int64_t blocks = grid_x * grid_y * grid_z;
  std::vector<int64_t> order(static_cast<size_t>(m.shuffled ? blocks : 0));
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
  shuffle_order(m, order.data(), static_cast<int>(order.size()));
  for (int64_t i = 0; i < blocks && m.error.empty(); ++i) {
    const int64_t b = m.shuffled ? order[static_cast<size_t>(i)] : i;
    place.block[0] = static_cast<unsigned>(b % grid_x);
    place.block[1] = static_cast<unsigned>(b / grid_x % grid_y);
    place.block[2] = static_cast<unsigned>(b / grid_x / grid_y);
    run_block(m);
  }
  if (!m.error.empty()) throw std::runtime_error(m.error);
}

void block_barrier() {
  Machine& m = machine();
  const int self = current->index;
  if (++m.at_barrier < place.threads) {
    m.at[self] = "block_barrier";
    hand_over(m);
    return;
  }
  m.at_barrier = 0;
  shadow_barrier();
  if (m.shuffled) shuffle_order(m, m.order, place.threads);
  for (int i = 0; i < place.threads; ++i) {
    m.at[m.order[i]] = nullptr;
    push(m, m.order[i]);
  }
  hand_over(m);
}

void sleep(const char* name, const void* thing) {
  Machine& m = machine();
  m.at[current->index] = name, m.thing[current->index] = thing;
  hand_over(m);
}

void wake(const void* thing) {
  Machine& m = machine();
  for (int i = 0; i < place.threads; ++i) {
    const int thread = m.order[i];
    if (m.thing[thread] != thing) continue;
    m.at[thread] = nullptr, m.thing[thread] = nullptr;
    push(m, thread);
  }
}

void step_aside() {
  Machine& m = machine();
  // at the end that is taken last
  if (m.newest_first) {
    m.head = (m.head + kMaxThreads - 1) % kMaxThreads;
    m.ready[m.head] = static_cast<uint16_t>(current->index);
    ++m.count;
  } else {
    push(m, current->index);
  }
  hand_over(m);
}

void warp_collective(const char* name, void (*perform)(void* const*), void* mine) {
  Machine& m = machine();
  const Thread& self = *current;
  Waiting& w = m.warps[self.warp];
  if (w.arrived > 0 && w.perform != perform)
    misuse(std::string("is at ") + name + " while other lanes of its warp wait at " + w.name);
  w.name = name, w.perform = perform;
  w.lanes[self.lane] = mine;
  if (++w.arrived < 32) {
    m.at[self.index] = name;
    hand_over(m);
    return;
  }
  w.arrived = 0;
  perform(w.lanes);
  const uint8_t* lanes = m.lane_orders[m.shuffled ? draw(m) >> 60 : 0];
  for (int i = 0; i < 32; ++i) {
    const int thread = self.warp * 32 + lanes[i];
    m.at[thread] = nullptr;
    push(m, thread);
  }
  hand_over(m);
}

}  // namespace cgpt::cuda::host
