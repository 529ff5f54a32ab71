// What a warp does together on the host: the last lane to arrive does it for all 32.
#include <cmath>
#include <cstring>

#include "host.h"

namespace cgpt::cuda::host {
namespace {

const Thread& lane_of(int lane) { return current[lane - current->lane]; }

// ---- shuffle and ballot -------------------------------------------------------------------------

struct ShuffleLane {
  uint32_t x;
  int operand;
  uint32_t result;
};

template <Shuffle kind>
void perform_shuffle(void* const* lanes) {
  for (int i = 0; i < 32; ++i) {
    auto& mine = *static_cast<ShuffleLane*>(lanes[i]);
    int from = mine.operand & 31;
    if (kind == Shuffle::exclusive_or) from = i ^ from;
    if (kind == Shuffle::down) from = i + mine.operand;
    if (kind == Shuffle::up) from = i - mine.operand;
    if (from < 0 || from > 31) from = i;  // a lane beyond the end: one's own value
    mine.result = static_cast<ShuffleLane*>(lanes[from])->x;
  }
}

struct BallotLane {
  bool x;
  uint32_t result;
};

void perform_ballot(void* const* lanes) {
  uint32_t all = 0;
  for (int i = 0; i < 32; ++i) all |= uint32_t{static_cast<BallotLane*>(lanes[i])->x} << i;
  for (int i = 0; i < 32; ++i) static_cast<BallotLane*>(lanes[i])->result = all;
}

void perform_barrier(void* const*) { shadow_warp_barrier(current->warp); }

// ---- mma ----------------------------------------------------------------------------------------

struct MmaLane {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

float from_bf16(uint16_t bits) { return __builtin_bit_cast(float, uint32_t{bits} << 16); }

// The fragment layouts of csrc/cuda/device.cuh: PTX ISA, mma.m16n8k16.
template <float (*convert)(uint16_t)>
void perform_mma(void* const* lanes) {
  float a[16][16], b[16][8], d[16][8];
  for (int i = 0; i < 32; ++i) {
    const auto& mine = *static_cast<const MmaLane*>(lanes[i]);
    const int g = i / 4, t = i % 4;
    for (int half = 0; half < 2; ++half) {
      const auto value = [half](uint32_t r) {
        return convert(static_cast<uint16_t>(r >> (16 * half)));
      };
      a[g][2 * t + half] = value(mine.a[0]);
      a[g + 8][2 * t + half] = value(mine.a[1]);
      a[g][2 * t + 8 + half] = value(mine.a[2]);
      a[g + 8][2 * t + 8 + half] = value(mine.a[3]);
      b[2 * t + half][g] = value(mine.b[0]);
      b[2 * t + 8 + half][g] = value(mine.b[1]);
      d[g][2 * t + half] = mine.d[half];
      d[g + 8][2 * t + half] = mine.d[2 + half];
    }
  }
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
  for (int i = 0; i < 32; ++i) {
    float* mine = static_cast<const MmaLane*>(lanes[i])->d;
    const int g = i / 4, t = i % 4;
    for (int half = 0; half < 2; ++half) {
      mine[half] = d[g][2 * t + half];
      mine[2 + half] = d[g + 8][2 * t + half];
    }
  }
}

// ---- ldmatrix -----------------------------------------------------------------------------------

struct MatrixLane {
  uint32_t* r;
  const void* row;
};

template <int kMatrices, bool kTrans>
void perform_ldmatrix(void* const* lanes) {
  for (int matrix = 0; matrix < kMatrices; ++matrix) {
    uint16_t m[8][8];
    for (int row = 0; row < 8; ++row) {
      const int lane = matrix * 8 + row;
      const void* p = static_cast<const MatrixLane*>(lanes[lane])->row;
      if (reinterpret_cast<uintptr_t>(p) % 16 != 0)
        misuse("ldmatrix wants rows aligned to 16 bytes", &lane_of(lane));
      if (p < window || p >= window + kWindow)
        misuse("ldmatrix reads shared memory only", &lane_of(lane));
      touch(lane_of(lane), p, 16, Access::read);
      std::memcpy(m[row], p, 16);
    }
    for (int i = 0; i < 32; ++i) {
      const int g = i / 4, t = i % 4;
      const uint16_t low = kTrans ? m[2 * t][g] : m[g][2 * t];
      const uint16_t high = kTrans ? m[2 * t + 1][g] : m[g][2 * t + 1];
      static_cast<const MatrixLane*>(lanes[i])->r[matrix] = low | uint32_t{high} << 16;
    }
  }
}

}  // namespace

uint32_t shuffle(Shuffle kind, uint32_t x, int operand) {
  ShuffleLane mine{x, operand, 0};
  switch (kind) {
    case Shuffle::index: warp_collective("shuffle", &perform_shuffle<Shuffle::index>, &mine); break;
    case Shuffle::exclusive_or:
      warp_collective("shuffle_xor", &perform_shuffle<Shuffle::exclusive_or>, &mine);
      break;
    case Shuffle::down:
      warp_collective("shuffle_down", &perform_shuffle<Shuffle::down>, &mine);
      break;
    case Shuffle::up: warp_collective("shuffle_up", &perform_shuffle<Shuffle::up>, &mine); break;
  }
  return mine.result;
}

uint32_t ballot(bool x) {
  BallotLane mine{x, 0};
  warp_collective("ballot", &perform_ballot, &mine);
  return mine.result;
}

void warp_barrier() { warp_collective("warp_barrier", &perform_barrier, nullptr); }

void mma_bf16(float* d, const uint32_t* a, const uint32_t* b) {
  MmaLane mine{d, a, b};
  warp_collective("mma<bf16>", &perform_mma<&from_bf16>, &mine);
}
void mma_f16(float* d, const uint32_t* a, const uint32_t* b) {
  MmaLane mine{d, a, b};
  warp_collective("mma<f16>", &perform_mma<&to_float>, &mine);
}

void ldmatrix(uint32_t* r, int matrices, bool trans, const void* row) {
  MatrixLane mine{r, row};
  if (matrices == 1 && !trans) warp_collective("ldmatrix.x1", &perform_ldmatrix<1, false>, &mine);
  if (matrices == 2 && !trans) warp_collective("ldmatrix.x2", &perform_ldmatrix<2, false>, &mine);
  if (matrices == 4 && !trans) warp_collective("ldmatrix.x4", &perform_ldmatrix<4, false>, &mine);
  if (matrices == 1 && trans)
    warp_collective("ldmatrix_trans.x1", &perform_ldmatrix<1, true>, &mine);
  if (matrices == 2 && trans)
    warp_collective("ldmatrix_trans.x2", &perform_ldmatrix<2, true>, &mine);
  if (matrices == 4 && trans)
    warp_collective("ldmatrix_trans.x4", &perform_ldmatrix<4, true>, &mine);
}

// The bytes arrive at the wait that asks for them, as late as the hardware may bring them.
void copy_async(void* shared, const void* global, int bytes, bool valid) {
  if (shared < window || shared >= window + kWindow) misuse("copy_async writes shared memory only");
  touch(*current, shared, bytes, Access::copy_issued);
  current->copies.push_back({shared, global, bytes, current->groups, valid});
}

void copy_async_commit() { ++current->groups; }

namespace {

void finish_copies(Thread& t, int groups_left) {
  size_t done = 0;
  for (; done < t.copies.size() && t.copies[done].group < t.groups - groups_left; ++done) {
    const Copy& copy = t.copies[done];
    touch(t, copy.shared, copy.bytes, Access::copy_done);
    if (copy.valid) std::memcpy(copy.shared, copy.global, static_cast<size_t>(copy.bytes));
    else std::memset(copy.shared, 0, static_cast<size_t>(copy.bytes));
  }
  t.copies.erase(t.copies.begin(), t.copies.begin() + static_cast<std::ptrdiff_t>(done));
}

}  // namespace

void copy_async_wait(int groups) { finish_copies(*current, groups); }

void copy_async_at_end() {
  ++current->groups;
  finish_copies(*current, 0);
  current->groups = 0;
}

int atomic_add(int* p, int n) {
  const int before = *p;
  *p = before + n;
  return before;
}

// ---- fp16 ---------------------------------------------------------------------------------------

float to_float(uint16_t bits) { return static_cast<float>(__builtin_bit_cast(_Float16, bits)); }
uint16_t to_f16(float x) { return __builtin_bit_cast(uint16_t, static_cast<_Float16>(x)); }

}  // namespace cgpt::cuda::host
