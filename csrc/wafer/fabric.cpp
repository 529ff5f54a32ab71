// Routers: static routes per colour with switch positions, multicast, back-pressure.
#include <algorithm>
#include <bit>
#include <stdexcept>

#include "grid.h"

namespace cgpt::wafer {

void Grid::push(Queue& q, float value, int32_t flags, int64_t at, int64_t core) {
  int32_t tail = q.head + q.size;
  if (tail >= q.room) tail -= q.room;
  pool_[q.begin + tail] = {value, flags, at};
  ++q.size;
  int64_t& deepest = statistic(core, kDeepest);
  deepest = std::max<int64_t>(deepest, q.size + (q.popped == now_));
}

// Into a router, by one of its channels.
void Grid::enter(int32_t channel, float value, int32_t flags, int64_t at, int64_t core) {
  push(channels_[channel].queue, value, flags, at, core);
  routers_[core].occupied |= routers_[core].bit(channel);
}

Wavelet Grid::pop(Queue& q) {
  const Wavelet w = pool_[q.begin + q.head];
  if (++q.head == q.room) q.head = 0;
  --q.size;
  q.popped = now_;
  return w;
}

int64_t Grid::neighbour(int64_t core, int port) const {
  const int64_t x = core % k_.width, y = core / k_.width;
  switch (port) {
    case kNorth: return y > 0 ? core - k_.width : -1;
    case kSouth: return y + 1 < k_.height ? core + k_.width : -1;
    case kWest: return x > 0 ? core - 1 : -1;
    case kEast: return x + 1 < k_.width ? core + 1 : -1;
    default: return core;
  }
}

// A switch at its last position stays there.
void Grid::advance(Route& r, Wavelet& w) {
  if (!(w.flags & (kAdvanceOwn | kAdvancePath))) return;
  if (r.current + 1 < r.positions) ++r.current;
  w.flags &= ~kAdvanceOwn;
}

// Whether another port that the route listens to also offers a wavelet now.
bool Grid::two_sources(const Route& r, int port) const {
  const unsigned others = r.receive[r.current] & ~(1u << port);
  for (int p = 0; others >> p; ++p) {
    if (!(others >> p & 1) || r.channel[p] < 0) continue;
    const Queue& q = channels_[r.channel[p]].queue;
    if (q.size && head(q).at <= now_) return true;
  }
  return false;
}

void Grid::visit_router(int64_t core) {
  Router& router = routers_[core];
  if (router.visited == now_) return;
  router.visited = now_;
  unsigned used = 0;
  int64_t next = kNever;
  for (int32_t n = router.first; n < router.end; ++n) {
    if (router.end - router.first <= 64) {
      const uint64_t rest = router.occupied >> (n - router.first);
      if (!rest) break;
      n += std::countr_zero(rest);
    }
    Channel& channel = channels_[n];
    Queue& q = channel.queue;
    if (q.size == 0) continue;
    if (head(q).at > now_) {
      next = std::min(next, head(q).at);
      continue;
    }
    Route& r = routes_[channel.route];
    if (!(r.receive[r.current] >> channel.port & 1)) continue;  // until the switch advances
    const unsigned receive = r.receive[r.current];
    if ((receive & (receive - 1)) && two_sources(r, channel.port))
      throw std::runtime_error("wafer: two sources deliver on one colour: colour " +
                               std::to_string(r.colour) + " at " + at(core) + " in cycle " +
                               std::to_string(now_));
    const unsigned send = r.send[r.current];
    if (r.moved == now_ || (used & send)) {
      next = now_ + 1;
      continue;
    }
    bool room = true;
    for (int p = 0; p < kPorts && room; ++p)
      if (send >> p & 1)
        room =
            !(p == kRamp ? inbox_[r.destination[p]] : channels_[r.destination[p]].queue).full(now_);
    if (!room) continue;  // the queue that is full wakes this router when it moves

    if (q.size == q.room) {  // whoever fed a full queue may go on
      if (channel.port == kRamp) wake(kCore, core, now_ + 1);
      else wake(kRouter, neighbour(core, channel.port), now_ + 1);
    }
    Wavelet w = pop(q);
    if (!q.size) router.occupied &= ~router.bit(n);
    const bool command = w.flags != 0;
    advance(r, w);
    for (int p = 0; p < kPorts; ++p) {
      if (!(send >> p & 1)) continue;
      if (p == kRamp) {
        push(inbox_[r.destination[p]], w.value, 0, now_ + k_.ramp, core);
        wake(kCore, core, now_ + k_.ramp);
      } else {
        const int64_t there = neighbour(core, p);
        enter(r.destination[p], w.value, w.flags, now_ + k_.hop, there);
        wake(kRouter, there, now_ + k_.hop);
        ++statistic(core, kHops);
      }
    }
    r.moved = now_;
    used |= send;
    if (command) next = now_ + 1;
    if (q.size) next = std::min(next, std::max(head(q).at, now_ + 1));
  }
  if (next != kNever) wake(kRouter, core, next);
}

}  // namespace cgpt::wafer
