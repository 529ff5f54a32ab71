// Nothing a program names may lie outside what it was given: checked before the run, since the
// engine itself trusts its program.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "grid.h"

namespace cgpt::wafer {

namespace {

void require(bool ok, int64_t index, const char* what) {
  if (!ok)
    throw std::invalid_argument("wafer: instruction " + std::to_string(index) + " has a bad " +
                                what);
}

// Every address an operand can take, in a loop of `rounds` that counts `steps`.
bool inside(const Operand& o, int64_t length, int64_t steps, int64_t rounds, int64_t words) {
  if (o.base < 0) return true;
  int64_t low = o.base, high = o.base;
  for (const int64_t reach : {(length - 1) * int64_t{o.stride}, (steps - 1) * int64_t{o.step},
                              rounds > 1 ? int64_t{o.alt} : 0})
    (reach < 0 ? low : high) += reach;
  return low >= 0 && high < words;
}

}  // namespace

void check_program(const Constants& k, const ProgramView& p, int64_t tasks, bool values) {
  int64_t rounds = 1;
  for (int64_t n = 0; n < p.instructions; ++n) {
    const Instruction& i = p.code[n];
    require(i.op >= Op::end && i.op <= Op::endloop, n, "op");
    require(i.function >= Function::move && i.function <= Function::max, n, "function");
    require(i.thread >= -1 && i.thread < kMicrothreads, n, "microthread");
    require(i.op != Op::wait || i.thread >= 0, n, "microthread to wait for");
    require(i.in >= -1 && i.in < k.colours && i.out >= -1 && i.out < k.colours, n, "colour");
    require(i.tag >= 0 && i.tag < k.tags, n, "tag");
    require(i.task >= -1 && i.task < 32, n, "task");
    require(i.when >= 0 && i.when <= 4 && i.divisor > 0, n, "condition");
    require(!i.when || (i.parameter >= 0 && i.parameter < k.parameters), n, "parameter");
    require(i.startup >= 0 && i.period >= 0, n, "startup or period");
    require(i.wrap >= 0 && i.ahead >= 0, n, "circular buffer");
    if (i.op == Op::loop) require(i.len > 0, n, "number of rounds"), rounds = i.len;
    if (i.op == Op::endloop) rounds = 1;
    const bool fabric = i.op == Op::vec && (i.in >= 0 || i.out >= 0);
    if (i.op == Op::vec) require(i.len > 0, n, "length");
    if (!fabric && (i.op == Op::vec || i.op == Op::macs || i.op == Op::calc))
      require(i.beats > 0, n, "number of beats");
    if (i.op == Op::macs) require(i.m > 0 && i.k > 0 && i.n > 0, n, "tile");
    if (!values || (i.op != Op::vec && i.op != Op::macs)) continue;
    const bool vec = i.op == Op::vec;
    const int64_t reach = i.period ? std::min(i.len, i.period) : i.len;
    const int64_t steps = i.wrap ? i.wrap : rounds;
    const auto within = [&](const Operand& o, int64_t tile) {
      return inside(o, vec ? reach : tile, steps, rounds, k.words);
    };
    require(within(i.dst, int64_t{i.m} * i.n), n, "destination");
    require(within(i.a, int64_t{i.m} * i.k), n, "first operand");
    require(within(i.b, int64_t{i.k} * i.n), n, "second operand");
    require(i.in >= 0 || i.a.base >= 0, n, "first operand: neither memory nor fabric");
    require(fabric || i.dst.base >= 0, n, "destination: neither memory nor fabric");
    require(vec || i.b.base >= 0, n, "second operand");
  }
  for (int64_t c = 0; c < p.classes; ++c) {
    const int64_t first = p.first_task[c], end = p.first_task[c + 1];
    if (first < 0 || first > end || end > tasks || end - first > 32)
      throw std::invalid_argument("wafer: class " + std::to_string(c) + " has bad tasks");
  }
  for (int64_t t = 0; t < tasks; ++t)
    if (p.tasks[t].pc < 0 || p.tasks[t].pc >= p.instructions || p.tasks[t].colour >= k.colours)
      throw std::invalid_argument("wafer: task " + std::to_string(t) + " starts nowhere");
  for (int64_t core = 0; core < k.width * k.height; ++core)
    if (p.core_class[core] < -1 || p.core_class[core] >= p.classes)
      throw std::invalid_argument("wafer: core " + std::to_string(core) + " has no such class");
  check_ramps(k, p);
}

// Fabric operands need a route between router and core.
void check_ramps(const Constants& k, const ProgramView& p) {
  std::vector<std::pair<uint64_t, uint64_t>> used(p.classes);  // colours read, colours written
  for (int64_t c = 0; c < p.classes; ++c)
    for (int32_t t = p.first_task[c]; t < p.first_task[c + 1]; ++t)
      for (int64_t n = p.tasks[t].pc; n < p.instructions; ++n) {
        const Instruction& i = p.code[n];
        if (i.op == Op::vec && i.in >= 0) used[c].first |= uint64_t{1} << i.in;
        if (i.op == Op::vec && i.out >= 0) used[c].second |= uint64_t{1} << i.out;
        if (i.op == Op::end || i.op == Op::halt) break;
      }
  for (int64_t core = 0; core < k.width * k.height; ++core) {
    if (p.core_class[core] < 0) continue;
    const auto [reads, writes] = used[p.core_class[core]];
    for (int64_t colour = 0; colour < k.colours; ++colour) {
      unsigned receives = 0, sends = 0;
      for (int s = 0; s < kSwitchPositions; ++s) {
        const int32_t route = p.routes[(core * k.colours + colour) * kSwitchPositions + s];
        receives |= route & 0xff, sends |= route >> 8;
      }
      const bool no_read = (reads >> colour & 1) && !(sends >> kRamp & 1);
      const bool no_write = (writes >> colour & 1) && !(receives >> kRamp & 1);
      if (no_read || no_write)
        throw std::invalid_argument(
            "wafer: impossible route: core (px " + std::to_string(core % k.width) + ", py " +
            std::to_string(core / k.width) + ") " + (no_read ? "reads" : "sends") + " colour " +
            std::to_string(colour) + ", which has no route " + (no_read ? "to" : "from") +
            " its ramp");
    }
  }
}

}  // namespace cgpt::wafer
