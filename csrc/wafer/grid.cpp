// Set-up of a run, the calendar, and what is said when a program does not come to its end.
#include "grid.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <optional>
#include <stdexcept>
#include <thread>

namespace cgpt::wafer {

namespace {

constexpr int kOpposite[kPorts] = {kSouth, kWest, kNorth, kEast, kRamp};

// A thread that does the same work again at each start. Cycles are microseconds apart, so both
// sides look for a while before they sleep.
class Partner {
 public:
  template <class Work>
  explicit Partner(Work work)
      : thread_([this, work] {
          for (int64_t turn = 0; await(started_, turn) != kStop;) {
            work();
            finished_.store(++turn, std::memory_order_release);
            finished_.notify_one();
          }
        }) {}
  ~Partner() {
    started_.store(kStop, std::memory_order_release);
    started_.notify_one();
    thread_.join();
  }
  void start() {
    started_.store(++turn_, std::memory_order_release);
    started_.notify_one();
  }
  void finish() { await(finished_, turn_ - 1); }

 private:
  static constexpr int64_t kStop = -1;
  static constexpr int kLooks = 2000;
  static int64_t await(std::atomic<int64_t>& value, int64_t old) {
    for (int look = 0; look < kLooks; ++look) {
      if (value.load(std::memory_order_acquire) != old) break;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    value.wait(old, std::memory_order_acquire);
    return value.load(std::memory_order_acquire);
  }
  alignas(64) std::atomic<int64_t> started_{0};
  alignas(64) std::atomic<int64_t> finished_{0};
  int64_t turn_ = 0;
  std::thread thread_;
};

}  // namespace

Grid::Grid(const Constants& constants, const ProgramView& program, Results& results)
    : k_(constants), program_(program), out_(results), cores_(k_.width * k_.height) {
  build_routes();
  core_.resize(cores_);
  for (Calendar& c : calendar_) c.ring.resize(kRing);
  const int64_t middle = k_.height / 2;
  second_half_ = cores_;
  if (cores_ >= kCores && middle >= 2 && !out_.log && omp_get_max_threads() > 1) {
    second_half_ = middle * k_.width;
    edge_begin_ = second_half_ - k_.width, edge_end_ = second_half_ + k_.width;
  }
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
  if (pool_.size() + room > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("wafer: the queues of this grid hold more than 2^31 wavelets");
  q.begin = static_cast<int32_t>(pool_.size());
  q.room = static_cast<int32_t>(room);
  pool_.resize(pool_.size() + room);
  return q;
}

void Grid::build_routes() {
  route_index_.assign(cores_ * k_.colours, -1);
  routers_.resize(cores_);
  for (int64_t core = 0; core < cores_; ++core) {
    routers_[core].first = static_cast<int32_t>(channels_.size());
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
    routers_[core].end = static_cast<int32_t>(channels_.size());
  }
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
  int64_t& scheduled = kind == kCore ? core_[core].scheduled : routers_[core].scheduled;
  if (scheduled == cycle) return;
  scheduled = cycle;
  const uint32_t item = static_cast<uint32_t>(core) << 1 | kind;
  Calendar& calendar = calendar_[core >= second_half_];
  if (cycle - now_ < kRing) {
    calendar.ring[cycle % kRing].push_back(item);
    ++calendar.in_ring;
  } else {
    calendar.far.push({cycle, item});
  }
}

// Asks for what visits to come will need: first the core or router, then what it says is in use.
void Grid::fetch_early(const Calendar& calendar, size_t n) const {
  const std::vector<uint32_t>& today = calendar.today;
  if (n + 2 * kAhead < today.size()) {
    const uint32_t item = today[n + 2 * kAhead];
    if ((item & 1) == kCore) __builtin_prefetch(&core_[item >> 1]);
    else __builtin_prefetch(&routers_[item >> 1]);
  }
  if (n + kAhead >= today.size()) return;
  const uint32_t item = today[n + kAhead];
  if ((item & 1) == kCore) {
    const Core& c = core_[item >> 1];
    __builtin_prefetch(&c.threads[kMain]);
    for (uint32_t rest = c.busy; rest; rest &= rest - 1)
      __builtin_prefetch(&c.threads[std::countr_zero(rest)]);
  } else {
    const Router& router = routers_[item >> 1];
    for (int32_t n = router.first; n < router.end; ++n) {
      if (!(router.occupied & router.bit(n))) continue;
      __builtin_prefetch(&channels_[n]);
      __builtin_prefetch(&routes_[channels_[n].route]);
    }
  }
}

void Grid::take_today(Calendar& c) {
  std::vector<uint32_t>& slot = c.ring[now_ % kRing];
  while (!c.far.empty() && c.far.top().first == now_) {
    slot.push_back(c.far.top().second);
    ++c.in_ring;
    c.far.pop();
  }
  c.today.swap(slot);
}

void Grid::visit(uint32_t item) {
  if ((item & 1) == kCore) visit_core(item >> 1);
  else visit_router(item >> 1);
}

void Grid::work(Calendar& c) {
  try {
    for (size_t n = 0; n < c.today.size(); ++n) {
      fetch_early(c, n);
      const uint32_t item = c.today[n];
      const int64_t core = item >> 1;
      if ((item & 1) == kRouter && core >= edge_begin_ && core < edge_end_) c.edge.push_back(item);
      else visit(item);
    }
  } catch (...) {
    c.error = std::current_exception();
  }
}

void Grid::run() {
  Calendar &first = calendar_[0], &second = calendar_[1];
  std::optional<Partner> partner;
  if (second_half_ < cores_) partner.emplace([&] { work(second); });
  while (first.in_ring || second.in_ring || !first.far.empty() || !second.far.empty()) {
    if (!first.in_ring && !second.in_ring) {
      now_ = kNever;
      for (const Calendar& c : calendar_)
        if (!c.far.empty()) now_ = std::min(now_, c.far.top().first);
    }
    if (now_ > k_.max_cycles)
      throw std::runtime_error("wafer: the program runs beyond max_cycles = " +
                               std::to_string(k_.max_cycles));
    take_today(first);
    take_today(second);
    const bool together = partner && first.today.size() + second.today.size() >= kTogether;
    if (together) partner->start();
    work(first);
    if (together) partner->finish();
    else work(second);
    for (Calendar& c : calendar_) {
      if (c.error) std::rethrow_exception(c.error);
      for (const uint32_t item : c.edge) visit(item);
      c.edge.clear();
      c.in_ring -= static_cast<int64_t>(c.today.size());
      out_.events += static_cast<int64_t>(c.today.size());
      c.today.clear();
    }
    ++now_;
  }
  for (int64_t core = 0; core < cores_; ++core)
    out_.cycles = std::max(out_.cycles, statistic(core, kFinish));
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
