// Hopper's barriers, copies of boxes and products of warp groups on the host: hopper.cuh says what
// they are, hopper_emulated.h when they happen here.
#include <cstring>
#include <vector>

#include "host.h"

namespace cgpt::cuda::host {
namespace {

// Within an atom of 1024 bytes, bits 4 to 6 of an address are mixed with bits 7 to 9.
uint32_t mixed(uint32_t offset) { return offset ^ (offset >> 7 & 7) << 4; }

unsigned char* shared_byte(uint32_t offset, int64_t bytes) {
  if (offset + bytes > place.shared_bytes)
    misuse("an operand ends at byte " + std::to_string(offset + bytes) +
           " of shared memory, which has " + std::to_string(place.shared_bytes));
  return place.shared + offset;
}

bool end_phase(Barrier& b) {
  if (b.arrived < b.arrivals || b.bytes != 0) return false;
  b.arrived = 0;
  b.phase ^= 1;
  wake(&b);
  return true;
}

struct Box {
  uint32_t to;
  TensorMap map;  // the thread may end before its copies have come
  Barrier* barrier;
  int column, row, head, batch;
};
std::vector<Box> boxes;  // under way
bool late = false;

void bring(const Box& box) {
  const TensorMap& map = box.map;
  for (int r = 0; r < map.rows; ++r)
    for (int c = 0; c < 64; ++c) {
      const bool there = box.row + r < map.shape[2] && box.column + c < map.shape[3];
      const uint16_t bits =
          there ? map.data[box.batch * map.strides[0] + box.head * map.strides[1] +
                           (box.row + r) * map.strides[2] + (box.column + c) * map.strides[3]]
                : uint16_t{0};
      const auto offset = box.to + static_cast<uint32_t>(r * 128 + c * 2);
      std::memcpy(shared_byte(mixed(offset), 2), &bits, 2);
    }
  box.barrier->bytes -= map.rows * 128;
  end_phase(*box.barrier);
}

struct Groups {
  std::vector<Wgmma> pending;  // in the order of issue
  std::vector<size_t> ends;    // of each committed group
};
Groups& groups_of(int thread) {
  static Groups all[1024];
  return all[thread];
}

float value_at(uint32_t offset, bool is_bf16) {
  uint16_t bits;
  std::memcpy(&bits, shared_byte(mixed(offset), 2), 2);
  return is_bf16 ? __builtin_bit_cast(float, uint32_t{bits} << 16) : to_float(bits);
}
float register_value(uint32_t r, int half, bool is_bf16) {
  const auto bits = static_cast<uint16_t>(r >> (16 * half));
  return is_bf16 ? __builtin_bit_cast(float, uint32_t{bits} << 16) : to_float(bits);
}

// One product of a warp: ops[i] is what lane i asked for.
void multiply(const Wgmma* const* ops, int warp) {
  const Wgmma& op = *ops[0];
  const auto start = [](uint64_t operand) { return static_cast<uint32_t>(operand & 0x3fff) << 4; };
  const auto next = [](uint64_t operand) {
    return static_cast<uint32_t>(operand >> 16 & 0x3fff) << 4;
  };
  // line `row` of an operand whose lines run along the summed dimension
  const auto along = [&](uint64_t operand, int row, int k) {
    return value_at(start(operand) + row / 8 * 1024 + row % 8 * 128 + k * 2, op.is_bf16);
  };
  static float a[16][16], b[16][256];
  for (int k = 0; k < 16; ++k)
    for (int n = 0; n < op.N; ++n)
      b[k][n] = op.a_registers ? value_at(start(op.b) + n / 64 * next(op.b) + k / 8 * 1024 +
                                              k % 8 * 128 + n % 64 * 2,
                                          op.is_bf16)
                               : along(op.b, n, k);
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      a[row][k] =
          op.a_registers
              ? register_value(ops[row % 8 * 4 + k % 8 / 2]->a_registers[row / 8 + k / 8 * 2],
                               k % 2, op.is_bf16)
              : along(op.a, warp % 4 * 16 + row, k);
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < op.N / 2; ++i) {
      const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      float& d = ops[lane]->d[i];
      float sum = op.add ? d : 0.0f;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      d = sum;
    }
}

struct WaitLane {
  int groups;
};

void perform_wait(void* const* lanes) {
  const int warp = current->warp, left = static_cast<const WaitLane*>(lanes[0])->groups;
  Groups* all[32];
  for (int i = 0; i < 32; ++i) all[i] = &groups_of(warp * 32 + i);
  while (static_cast<int>(all[0]->ends.size()) > left) {
    const size_t count = all[0]->ends.front();
    for (size_t op = 0; op < count; ++op) {
      const Wgmma* ops[32];
      for (int i = 0; i < 32; ++i) {
        if (all[i]->ends.empty() || all[i]->ends.front() != count)
          misuse("its lanes asked for different products of wgmma");
        ops[i] = &all[i]->pending[op];
      }
      multiply(ops, warp);
    }
    for (Groups* g : all) {
      g->pending.erase(g->pending.begin(), g->pending.begin() + static_cast<std::ptrdiff_t>(count));
      g->ends.erase(g->ends.begin());
      for (size_t& end : g->ends) end -= count;
    }
  }
}

struct Meeting {
  int arrived = 0;
};
Meeting meetings[16];  // of group_barrier, by id

}  // namespace

uint32_t shared_offset(const void* p) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - place.shared);
}

void barrier_init(Barrier& b, int arrivals) { b = {static_cast<int16_t>(arrivals), 0, 0, 0, 0}; }

void barrier_arrive(Barrier& b, int bytes) {
  b.bytes += bytes;
  ++b.arrived;
  if (end_phase(b)) step_aside();  // who waited for it may be faster than what comes next here
}

void barrier_wait(Barrier& b, int parity) {
  while (b.phase == parity) sleep("barrier_wait", &b);
}

void copy_box(void* shared, const TensorMap& map, Barrier& b, int column, int row, int head,
              int batch) {
  const Box box{shared_offset(shared), map, &b, column, row, head, batch};
  if (box.to % 1024 != 0) misuse("copy_box writes to multiples of 1024 bytes");
  if (late) boxes.push_back(box);
  else bring(box);
}

bool late_copy() {
  if (boxes.empty()) return false;
  const Box box = boxes.back();  // the hardware promises no order
  boxes.pop_back();
  bring(box);
  return true;
}

void group_barrier(int id, int threads) {
  Meeting& m = meetings[id];
  if (++m.arrived < threads) return sleep("group_barrier", &m);
  m.arrived = 0;
  wake(&m);
}

void wgmma(const Wgmma& op) { groups_of(current->index).pending.push_back(op); }
void wgmma_end() {
  Groups& g = groups_of(current->index);
  g.ends.push_back(g.pending.size());
}
void wgmma_wait(int groups) {
  WaitLane mine{groups};
  warp_collective("wgmma_wait", &perform_wait, &mine);
}
void hopper_new_block(int threads, bool late_copies) {
  late = late_copies;
  boxes.clear();
  for (int i = 0; i < threads; ++i) groups_of(i) = {};
  for (Meeting& m : meetings) m = {};
}

}  // namespace cgpt::cuda::host
