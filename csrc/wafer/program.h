// What runs on the grid: instructions, tasks and routes, as cgpt_kernels/wafer/program.py lays them
// out in memory. All hardware constants arrive here as numbers; this side knows none.
//
// Letters: a core is y * width + x; ports are N, E, S, W and the ramp to the core.
#pragma once

#include <cstdint>

namespace cgpt::wafer {

enum Port : int { kNorth, kEast, kSouth, kWest, kRamp, kPorts };

enum class Op : int32_t {
  end,       // the task ends
  halt,      // the core has finished; a core that never gets here is deadlocked
  calc,      // `beats` cycles of scalar work
  vec,       // a vector instruction over descriptors, on the main thread or a microthread
  macs,      // a local tile product, `beats` cycles with its scalar loop
  wait,      // until microthread `thread` is free
  activate,  // local task `task`
  block,     // task `task` is not started until unblocked
  unblock,   //
  loop,      // the next instruction up to its `endloop`, `len` times
  endloop,   //
};

enum class Function : int32_t { move, add, mul, max };

enum Flags : int32_t {
  kAdvanceOwn = 1,   // the last wavelet advances the switch of the router it enters
  kAdvancePath = 2,  // the last wavelet advances every router it passes
};

// One operand: word address, stride in words, and what is added per round of the loop (step, see
// `wrap`), or in its odd rounds only (alt: double buffers). base < 0: absent.
struct Operand {
  int32_t base, stride, step, alt;
};

struct Instruction {
  Op op;
  Function function;
  int32_t len;      // words of a vector, rounds of a loop
  int32_t beats;    // cycles on the datapath of an instruction without fabric operands
  int32_t startup;  // cycles before the first beat
  int32_t thread;   // microthread, -1: the main thread
  int32_t in, out;  // colours of fabric operands, -1: none
  Operand dst, a, b;
  int32_t when;       // 0 always, else round / divisor ==, !=, <, > the parameter
  int32_t parameter;  // index into the core's parameters
  int32_t divisor;
  int32_t tag;  // phase, for the report
  int32_t flags;
  int32_t task;     // what `activate`, `block`, `unblock` mean, or what starts on completion
  int32_t m, k, n;  // of macs
  int32_t period;   // memory operands of a vector start over after so many words; 0: never
  // wrap > 0: steps are counted (round + ahead) % wrap, as in circular buffers, and flags go with
  // the last of them only.
  int32_t wrap, ahead;
};
static_assert(sizeof(Instruction) == 32 * sizeof(int32_t));

// A task: where it starts, the colour whose wavelets start it (-1: a local task), whether it is
// active at the beginning, and whether blocked.
struct Task {
  int32_t pc, colour, active, blocked;
};

struct Constants {
  int64_t width, height, colours, hop, ramp, stop, slots, router_queue, core_queue, task_start,
      words, parameters, tags, max_cycles;
};

constexpr int kSwitchPositions = 4;
constexpr int kMicrothreads = 8;
constexpr int kMain = kMicrothreads;  // index of the main thread among the core's threads

// One wavelet: its payload as fp32, the first cycle in which it can be used, its commands.
struct Wavelet {
  float value;
  int32_t flags;
  int64_t at;
};

}  // namespace cgpt::wafer
