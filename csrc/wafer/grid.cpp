// Set-up of a run, the calendar, and what is said when a program does not come to its end.
#include "grid.h"

#include <stdexcept>

namespace cgpt::wafer {

namespace {

constexpr int kOpposite[kPorts] = {kSouth, kWest, kNorth, kEast, kRamp};

}  // namespace

Grid::Grid(const Constants& constants, const ProgramView& program, Results& results)
    : k_(constants), program_(program), out_(results), cores_(k_.width * k_.height) {
  build_routes();
  router_visited_.assign(cores_, -1);
  router_scheduled_.assign(cores_, -1);
  core_.resize(cores_);
  ring_.resize(kRing);
  for (int64_t core = 0; core < cores_; ++core) {
    const int32_t own = program_.core_class[core];
    if (own < 0) {  // a core without a program
      core_[core].halted = true;
      continue;
    }
    const int32_t first = program_.first_task[own], end = program_.first_task[own + 1];
    for (int32_t t = first; t < end; ++t) {
      core_[core].active |= static_cast<uint32_t>(program_.tasks[t].active != 0) << (t - first);
      core_[core].blocked |= static_cast<uint32_t>(program_.tasks[t].blocked != 0) << (t - first);
    }
    wake(kCore, core, 0);
  }
}

Queue Grid::make_queue(int64_t room) {
  Queue q;
  q.begin = static_cast<int64_t>(pool_.size());
  q.room = static_cast<int32_t>(room);
  pool_.resize(pool_.size() + room);
  return q;
}

void Grid::build_routes() {
  route_index_.assign(cores_ * k_.colours, -1);
  first_channel_.assign(cores_ + 1, 0);
  for (int64_t core = 0; core < cores_; ++core) {
    first_channel_[core] = static_cast<int32_t>(channels_.size());
    for (int64_t colour = 0; colour < k_.colours; ++colour) {
      const int32_t* given = program_.routes + (core * k_.colours + colour) * kSwitchPositions;
      if (given[0] == 0) continue;
      Route r;
      r.core = static_cast<int32_t>(core);
      r.colour = static_cast<int16_t>(colour);
      unsigned ports = 0, sends = 0;
      for (int s = 0; s < kSwitchPositions && given[s]; ++s, ++r.positions) {
        r.receive[s] = given[s] & 0xff;
        r.send[s] = given[s] >> 8;
        ports |= r.receive[s], sends |= r.send[s];
      }
      const int32_t index = static_cast<int32_t>(routes_.size());
      for (int p = 0; p < kPorts; ++p) {
        r.channel[p] = r.destination[p] = -1;
        if (!(ports >> p & 1)) continue;
        r.channel[p] = static_cast<int32_t>(channels_.size());
        // Room for what is on its way besides what waits: else latency alone would cost bandwidth.
        const int64_t flying = (p == kRamp ? k_.stop + k_.ramp : k_.hop) - 1;
        channels_.push_back({make_queue(k_.router_queue + flying), index, static_cast<int8_t>(p)});
      }
      if (sends >> kRamp & 1) {
        r.destination[kRamp] = static_cast<int32_t>(inbox_.size());
        inbox_.push_back(make_queue(k_.core_queue + k_.ramp - 1));
      }
      route_index_[core * k_.colours + colour] = index;
      routes_.push_back(r);
    }
  }
  first_channel_[cores_] = static_cast<int32_t>(channels_.size());
  for (Route& r : routes_)
    for (int p = 0; p < kRamp; ++p) {
      unsigned sends = 0;
      for (int s = 0; s < r.positions; ++s) sends |= r.send[s];
      if (!(sends >> p & 1)) continue;
      const int64_t there = neighbour(r.core, p);
      const Route* other = there < 0 ? nullptr : route(there, r.colour);
      if (!other || other->channel[kOpposite[p]] < 0)
        throw std::invalid_argument("wafer: impossible route: colour " + std::to_string(r.colour) +
                                    " leaves " + at(r.core) + " by port " + "NESW"[p] +
                                    (there < 0 ? ", the edge of the grid"
                                               : ", where " + at(there) + " does not receive it"));
      r.destination[p] = other->channel[kOpposite[p]];
    }
}

void Grid::wake(Kind kind, int64_t core, int64_t cycle) {
  int64_t& scheduled = kind == kCore ? core_[core].scheduled : router_scheduled_[core];
  if (scheduled == cycle) return;
  scheduled = cycle;
  const uint32_t item = static_cast<uint32_t>(core) << 1 | kind;
  if (cycle - now_ < kRing) {
    ring_[cycle % kRing].push_back(item);
    ++in_ring_;
  } else {
    far_.push({cycle, item});
  }
}

void Grid::run() {
  std::vector<uint32_t> today;
  while (in_ring_ || !far_.empty()) {
    if (!in_ring_) now_ = far_.top().first;
    if (now_ > k_.max_cycles)
      throw std::runtime_error("wafer: the program runs beyond max_cycles = " +
                               std::to_string(k_.max_cycles));
    std::vector<uint32_t>& slot = ring_[now_ % kRing];
    while (!far_.empty() && far_.top().first == now_) {
      slot.push_back(far_.top().second);
      ++in_ring_;
      far_.pop();
    }
    today.swap(slot);
    for (const uint32_t item : today) {
      if ((item & 1) == kCore) visit_core(item >> 1);
      else visit_router(item >> 1);
    }
    in_ring_ -= static_cast<int64_t>(today.size());
    out_.events += static_cast<int64_t>(today.size());
    today.clear();
    ++now_;
  }
  check_the_end();
}

std::string Grid::at(int64_t core) const {
  return "core (px " + std::to_string(core % k_.width) + ", py " + std::to_string(core / k_.width) +
         ")";
}

std::string Grid::why_stuck(int64_t core) const {
  for (const Thread& t : core_[core].threads) {
    if (!t.instruction) continue;
    const Instruction& i = *t.instruction;
    const std::string where =
        " (word " + std::to_string(t.position) + " of " + std::to_string(i.len) + ")";
    if (i.in >= 0 && !inbox_[route(core, i.in)->destination[kRamp]].size)
      return "waits for a wavelet on colour " + std::to_string(i.in) + where;
    if (i.out >= 0) return "cannot send on colour " + std::to_string(i.out) + where;
  }
  return "has no task to run and has not halted";
}

void Grid::check_the_end() const {
  for (int64_t core = 0; core < cores_; ++core)
    if (!core_[core].halted)
      throw std::runtime_error("wafer: deadlock: " + at(core) + " " + why_stuck(core));
  for (const Channel& c : channels_)
    if (c.queue.size)
      throw std::runtime_error("wafer: nobody receives a wavelet of colour " +
                               std::to_string(routes_[c.route].colour) + " in the router of " +
                               at(routes_[c.route].core));
  for (const Route& r : routes_)
    if (r.destination[kRamp] >= 0 && inbox_[r.destination[kRamp]].size)
      throw std::runtime_error("wafer: nobody receives a wavelet of colour " +
                               std::to_string(r.colour) + " in " + at(r.core));
}

}  // namespace cgpt::wafer
