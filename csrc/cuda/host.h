// The host implementation's machine: runs every thread of a block as a fiber. See host.cpp for the
// blocks, shadow.cpp for who touched which byte of shared memory.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace cgpt::cuda::host {

struct Copy {  // a copy_async that is under way
  void* shared;
  const void* global;
  int bytes, group;
  bool valid;
};

struct Thread {
  int index = 0, warp = 0, lane = 0;
  void* stack_pointer = nullptr;
  unsigned char* stack = nullptr;
  std::vector<Copy> copies;  // in the order of issue
  int groups = 0;            // committed so far
};

struct Place {
  unsigned block[3] = {}, grid[3] = {};
  int threads = 0;
  unsigned char* shared = nullptr;
  int64_t shared_bytes = 0;
};

extern Thread* current;  // the thread that runs; nullptr outside kernels
extern Place place;      // its block

// Runs body(closure) as every thread of every block; one block after the other, or, where they may
// meet at grid_barrier, all of them side by side. Throws std::runtime_error on misuse.
void run(const char* op, int64_t grid_x, int64_t grid_y, int64_t grid_z, int threads,
         int64_t shared_bytes, bool cooperative, void (*body)(const void*), const void* closure);

// Blocks that may meet: another number for every CGPT_CUDA_HOST_SEED.
int64_t most_blocks();

void block_barrier();
void grid_barrier();
void warp_barrier();

// A rendezvous of the 32 lanes: the last one to arrive calls perform(lanes), lanes[i] being what
// lane i passed as `mine`.
void warp_collective(const char* name, void (*perform)(void* const* lanes), void* mine);

// Lets the current thread wait for a thing, all go on that do, and others run first.
void sleep(const char* name, const void* thing);
void wake(const void* thing);
void step_aside();

// Ends the launch with an error that names op, block and thread (the current one by default).
[[noreturn]] void misuse(const std::string& what, const Thread* thread = nullptr);

// ---- collectives and copies ---------------------------------------------------------------------

enum class Shuffle : uint8_t { index, exclusive_or, down, up };
uint32_t shuffle(Shuffle kind, uint32_t x, int operand);
uint32_t ballot(bool x);
void mma_bf16(float* d, const uint32_t* a, const uint32_t* b);
void mma_f16(float* d, const uint32_t* a, const uint32_t* b);
void ldmatrix(uint32_t* r, int matrices, bool trans, const void* row);
void copy_async(void* shared, const void* global, int bytes, bool valid);
void copy_async_commit();
void copy_async_wait(int groups);
void copy_async_at_end();  // of a thread: what it never waited for arrives
int atomic_add(int* p, int n);

float to_float(uint16_t bits_of_f16);
uint16_t to_f16(float x);

// ---- Hopper (hopper.cuh) ------------------------------------------------------------------------

struct Barrier {
  int16_t arrivals, arrived, phase, unused;
  int bytes;  // that are expected and have not come
};
struct TensorMap {
  const uint16_t* data;
  int64_t shape[4], strides[4];
  int rows;  // of a box
};
struct Wgmma {
  float* d;
  const uint32_t* a_registers;  // or nullptr: then a describes shared memory
  uint64_t a, b;
  int N;
  bool add, is_bf16;
};
uint32_t shared_offset(const void* p);
void barrier_init(Barrier& b, int arrivals);
void barrier_arrive(Barrier& b, int bytes);
void barrier_wait(Barrier& b, int parity);
void copy_box(void* shared, const TensorMap& map, Barrier& b, int column, int row, int head,
              int batch);
void group_barrier(int id, int threads);
void wgmma(const Wgmma& op);
void wgmma_end();
void wgmma_wait(int groups);
void hopper_new_block(int threads, bool late);  // late: copies come when nobody can go on without
bool late_copy();                               // brings one; false: there is none

// ---- accesses to shared memory ------------------------------------------------------------------

enum class Access : uint8_t { read, write, copy_issued, copy_done };
// Checks an access by a thread where p lies in shared memory; nothing elsewhere.
void touch(const Thread& thread, const void* p, int64_t bytes, Access access);
void shadow_new_launch(int64_t blocks);  // of which each has shared memory of its own
void shadow_block(int64_t block);        // the one that runs from here on
void shadow_barrier();
void shadow_warp_barrier(int warp);

// The window of addresses that belongs to shared memory, larger than any launch's bytes.
constexpr int64_t kMargin = 64 * 1024, kMostShared = 163 * 1024;
extern unsigned char* window;
constexpr int64_t kWindow = 2 * kMargin + 192 * 1024;

}  // namespace cgpt::cuda::host
