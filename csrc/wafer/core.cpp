// Cores: tasks, instructions, microthreads that share one datapath beat by beat.
#include <algorithm>
#include <bit>

#include "grid.h"

namespace cgpt::wafer {

namespace {

float apply(Function f, float x, float y) {
  switch (f) {
    case Function::move: return x;
    case Function::add: return x + y;
    case Function::mul: return x * y;
    case Function::max: return x > y ? x : y;
  }
  return x;
}

// Conditions: 1 equal, 2 not equal, 3 below, 4 above.
bool holds(int32_t when, int32_t turn, int32_t value) {
  return when == 1   ? turn == value
         : when == 2 ? turn != value
         : when == 3 ? turn < value
                     : turn > value;
}

int32_t in_round(const Operand& o, int32_t round, int32_t steps) {
  return o.base < 0 ? -1 : o.base + o.step * steps + (round & 1) * o.alt;
}

}  // namespace

void Grid::log(int64_t cycle, int64_t core, int thread, const Instruction* i, int what) {
  if (!out_.log) return;  // then two threads may come by
  if (out_.logged < out_.log_room) {
    int64_t* row = out_.log + 5 * out_.logged;
    row[0] = cycle, row[1] = core, row[2] = thread, row[3] = i - program_.code, row[4] = what;
  }
  ++out_.logged;
}

void Grid::book(Core& c, int64_t core, const Instruction& i, int64_t until) {
  out_.phases[core * k_.tags + i.tag] += until - c.mark;
  c.mark = until;
}

// A data task runs when its colour has a wavelet, a local task when active; lower numbers first.
bool Grid::pick_task(Core& c, int64_t core) {
  const int32_t own = program_.core_class[core];
  const int32_t first = program_.first_task[own], end = program_.first_task[own + 1];
  for (int32_t t = first; t < end; ++t) {
    const uint32_t bit = 1u << (t - first);
    if (c.blocked & bit) continue;
    const Task& task = program_.tasks[t];
    if (task.colour >= 0) {
      const Route* r = route(core, task.colour);
      const Queue* q = r && r->destination[kRamp] >= 0 ? &inbox_[r->destination[kRamp]] : nullptr;
      if (!q || !q->size || head(*q).at > now_) continue;
    } else if (!(c.active & bit)) {
      continue;
    }
    c.active &= ~bit;
    c.in_task = true;
    c.pc = task.pc;
    c.next = now_ + k_.task_start;
    return true;
  }
  return false;
}

// Takes instructions for the main thread until one occupies it.
void Grid::fetch(Core& c, int64_t core) {
  Thread& main = c.threads[kMain];
  while (!main.instruction && c.next <= now_ && !c.halted) {
    if (!c.in_task) {
      if (!pick_task(c, core)) return;
      continue;
    }
    const Instruction& i = program_.code[c.pc];
    const int32_t value = i.when ? program_.parameters[core * k_.parameters + i.parameter] : 0;
    if (i.when && !holds(i.when, c.round / i.divisor, value)) {
      ++c.pc;
      continue;
    }
    switch (i.op) {
      case Op::end: c.in_task = false; break;
      case Op::halt:
        c.halted = true;
        c.in_task = false;
        statistic(core, kFinish) = now_;
        break;
      case Op::activate: c.active |= 1u << i.task; break;
      case Op::block: c.blocked |= 1u << i.task; break;
      case Op::unblock: c.blocked &= ~(1u << i.task); break;
      case Op::wait:
        if (c.threads[i.thread].instruction) return;  // woken when that thread is done
        book(c, core, i, now_);
        break;
      case Op::loop: c.loop_start = c.pc + 1, c.loop_rounds = i.len, c.round = 0; break;
      case Op::endloop:
        if (++c.round < c.loop_rounds) {
          c.pc = c.loop_start;
          continue;
        }
        c.round = 0;
        break;
      case Op::calc:
      case Op::macs:
      case Op::vec:
        if (i.thread >= 0 && c.threads[i.thread].instruction) return;
        launch(c, core, i);
        break;
    }
    ++c.pc;
  }
}

void Grid::launch(Core& c, int64_t core, const Instruction& i) {
  const int index = i.thread < 0 ? kMain : i.thread;
  Thread& t = c.threads[index];
  t = Thread{};
  t.instruction = &i;
  t.ready = now_ + i.startup;
  t.remaining = i.beats;
  const int32_t steps = i.wrap ? (c.round + i.ahead) % i.wrap : c.round;
  t.dst = in_round(i.dst, c.round, steps);
  t.a = in_round(i.a, c.round, steps);
  t.b = in_round(i.b, c.round, steps);
  t.flags = !i.wrap || steps + 1 == i.wrap ? i.flags : 0;
  if (i.op == Op::vec && i.in >= 0) t.in = &inbox_[route(core, i.in)->destination[kRamp]];
  if (i.op == Op::vec && i.out >= 0) t.out = &channels_[route(core, i.out)->channel[kRamp]];
  c.busy |= 1u << index;
  log(now_, core, index, &i, 0);
  if (index != kMain) {
    c.next = now_ + 1;  // setting a microthread off takes the main thread one cycle
    book(c, core, i, c.next);
  }
}

bool Grid::ready(const Thread& t) const {
  if (t.done != kNever || t.ready > now_) return false;
  if (t.in && (!t.in->size || head(*t.in).at > now_)) return false;
  return !t.out || !t.out->queue.full(now_);
}

// What an instruction without fabric operands does to memory, all at once with its last beat.
void Grid::compute(Thread& t, float* m) {
  const Instruction& i = *t.instruction;
  if (i.op == Op::vec) {
    for (int32_t word = 0; word < i.len; ++word) {
      const int32_t n = i.period ? word % i.period : word;
      const float y = t.b >= 0 ? m[t.b + n * i.b.stride] : 0.0f;
      m[t.dst + n * i.dst.stride] = apply(i.function, m[t.a + n * i.a.stride], y);
    }
  } else if (i.op == Op::macs) {
    for (int32_t row = 0; row < i.m; ++row)
      for (int32_t k = 0; k < i.k; ++k) {
        const float x = m[t.a + row * i.k + k];
        for (int32_t col = 0; col < i.n; ++col)
          m[t.dst + row * i.n + col] += x * m[t.b + k * i.n + col];
      }
  }
}

void Grid::beat(Core& c, int64_t core, int index) {
  Thread& t = c.threads[index];
  const Instruction& i = *t.instruction;
  c.turn = static_cast<int8_t>(index == kMain ? 0 : index + 1);
  float* m = memory(core);
  if (!t.on_fabric()) {
    ++statistic(core, kComputeBeats);
    if (--t.remaining > 0) return;
    if (m) compute(t, m);
    statistic(core, kMacs) += i.op == Op::macs ? int64_t{i.m} * i.k * i.n : 0;
    finish(c, core, index);
    return;
  }
  ++statistic(core, kFabricBeats);
  const int32_t n = i.period ? t.position % i.period : t.position;
  float x = 0.0f;
  if (i.in >= 0) {
    if (t.in->size == t.in->room) wake(kRouter, core, now_ + 1);
    x = pop(*t.in).value;
    ++statistic(core, kReceived);
  } else if (m) {
    x = m[t.a + n * i.a.stride];
  }
  if (m && t.b >= 0) x = apply(i.function, x, m[t.b + n * i.b.stride]);
  if (m && t.dst >= 0) m[t.dst + n * i.dst.stride] = x;
  const bool last = ++t.position == i.len;
  if (i.out >= 0) {
    enter(static_cast<int32_t>(t.out - channels_.data()), x, last ? t.flags : 0,
          now_ + k_.stop + k_.ramp, core);
    wake(kRouter, core, now_ + k_.stop + k_.ramp);
    ++statistic(core, kSent);
  }
  if (last) finish(c, core, index);
}

void Grid::finish(Core& c, int64_t core, int index) {
  Thread& t = c.threads[index];
  log(now_ + 1, core, index, t.instruction, 1);
  if (index == kMain) {
    book(c, core, *t.instruction, now_ + 1);
    if (t.instruction->task >= 0) c.active |= 1u << t.instruction->task;
    t.instruction = nullptr;
    c.busy &= ~(1u << kMain);
    c.next = now_ + 1;
  } else {
    t.done = now_ + 1;
    c.ending |= 1u << index;
  }
}

void Grid::visit_core(int64_t core) {
  Core& c = core_[core];
  if (c.visited == now_) return;
  c.visited = now_;
  if (c.skip_from >= 0) {  // beats of the cycles in which one thread ran alone
    const int64_t beats = now_ - c.skip_from;
    c.threads[c.skip_thread].remaining -= static_cast<int32_t>(beats);
    statistic(core, kComputeBeats) += beats;
    if (beats) c.turn = static_cast<int8_t>(c.skip_thread == kMain ? 0 : c.skip_thread + 1);
    c.skip_from = -1;
  }
  for (uint32_t rest = c.ending; rest; rest &= rest - 1) {
    Thread& t = c.threads[std::countr_zero(rest)];
    if (t.done > now_) continue;
    if (t.instruction->task >= 0) c.active |= 1u << t.instruction->task;
    t.instruction = nullptr;
    c.busy &= ~(rest & -rest), c.ending &= ~(rest & -rest);
  }
  fetch(c, core);
  // A word of the fabric takes one slot of the datapath, an instruction in memory all of them; one
  // word enters the router per cycle.
  int64_t slots = k_.slots;
  bool sent = false;
  // in turns: from the thread after the last one served, round to it
  const uint32_t below = (1u << c.turn) - 1, busy = c.busy & ~c.ending;
  for (uint32_t half : {busy & ~below, busy & below})
    for (; half && slots > 0; half &= half - 1) {
      const int index = std::countr_zero(half);
      const Thread& t = c.threads[index];
      if (!ready(t)) continue;
      const bool sends = t.out, local = !t.on_fabric();
      if ((sends && sent) || (local && slots < k_.slots)) continue;
      slots -= local ? k_.slots : 1;
      sent |= sends;
      beat(c, core, index);
    }
  sleep(c, core);
}

// Schedules the next visit: the first cycle in which anything can change without outside help.
void Grid::sleep(Core& c, int64_t core) {
  int64_t next = kNever, alone = kNever;
  int local = -1, locals = 0;
  if (!c.threads[kMain].instruction && !c.halted && c.next > now_) next = c.next;
  for (uint32_t rest = c.busy; rest; rest &= rest - 1) {
    const int index = std::countr_zero(rest);
    const Thread& t = c.threads[index];
    if (t.done != kNever) {
      next = std::min(next, t.done);
      continue;
    }
    int64_t when = std::max(t.ready, now_ + 1);
    if (!t.on_fabric()) {
      local = index, ++locals;
      alone = std::min(alone, when);
      continue;
    }
    if (t.in) {
      if (!t.in->size) continue;  // woken by its arrival
      when = std::max(when, head(*t.in).at);
    }
    if (t.out && t.out->queue.size >= t.out->queue.room) continue;  // woken by the router
    next = std::min(next, when);
  }
  if (locals == 1 && alone == now_ + 1 && next > now_ + 1) {
    c.skip_from = now_ + 1;
    c.skip_thread = static_cast<int8_t>(local);
    next = std::min(next, now_ + c.threads[local].remaining);
  } else {
    next = std::min(next, alone);
  }
  if (next != kNever) wake(kCore, core, next);
}

}  // namespace cgpt::wafer
