// The modelled grid: routers with their queues, cores with their threads, and the calendar of
// events. Cycle by cycle, each part reads what the others had at the start of the cycle, so that
// the order in which parts are visited within a cycle changes nothing. Parts that cannot move are
// not visited: idle cores, and queues behind a full one, cost nothing.
//
// A wavelet's way: core -> (stop + ramp cycles) -> router queue -> (hop cycles per link) -> router
// queue
// -> (ramp cycles) -> core queue. One wavelet per port and cycle, the lowest colour first; a queue
// with no room holds its sender back.
#pragma once

#include <exception>
#include <limits>
#include <queue>
#include <string>
#include <utility>
#include <vector>

#include "program.h"

namespace cgpt::wafer {

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

// What a program is made of, borrowed from the caller.
struct ProgramView {
  const Instruction* code;
  const Task* tasks;
  const int32_t* first_task;  // [classes + 1]
  const int32_t* core_class;  // [cores]
  const int32_t* parameters;  // [cores, parameters]
  const int32_t* routes;      // [cores, colours, kSwitchPositions], receive mask | send mask << 8
  int64_t instructions, classes;
};

// What a run leaves behind, allocated by the caller.
struct Results {
  float* memory;    // [cores, words] in and out, or nullptr: no values are computed
  int64_t* cores;   // [cores, kStatistics]
  int64_t* phases;  // [cores, tags] cycles of the main thread
  int64_t* log;     // [log_room, 5]: cycle, core, thread, instruction, 0 launched | 1 done
  int64_t log_room;
  int64_t logged = 0, cycles = 0, events = 0;
};

enum Statistic : int {
  kFinish,        // the cycle in which the core had finished
  kComputeBeats,  // datapath cycles without fabric operands
  kFabricBeats,   // datapath cycles with
  kSent,          // words
  kReceived,      // words
  kHops,          // words that left this router over a link
  kMacs,          // multiply-adds
  kDeepest,       // most wavelets that waited in one queue of this core or its router
  kStatistics
};

// A visit waits for memory most of the time, since the whole grid is larger than a core's caches:
// what one needs lies in few lines of 64 bytes.

struct Queue {
  int32_t begin;  // into the pool of wavelets
  int32_t room, head = 0, size = 0;
  int64_t popped = -1;  // cycle of the last departure

  // A departure in this very cycle makes room only for the next one.
  bool full(int64_t now) const { return size + (popped == now) >= room; }
};

struct Channel {  // wavelets of one colour that entered a router by one port
  Queue queue;
  int32_t route;
  int8_t port;
};

struct alignas(64) Route {  // what a router does with one colour
  int32_t core;
  int16_t colour;
  int8_t positions = 0, current = 0;
  uint8_t receive[kSwitchPositions] = {}, send[kSwitchPositions] = {};
  int32_t channel[kPorts];      // by port, -1: none enters there
  int32_t destination[kPorts];  // channel of the neighbour; for the ramp a core queue
  int64_t moved = -1;
};

struct Router {
  int64_t visited = -1, scheduled = -1;
  uint64_t occupied = 0;  // which of its channels hold wavelets; beyond 64 channels it says nothing
  int32_t first = 0, end = 0;  // its channels

  uint64_t bit(int32_t channel) const { return uint64_t{1} << ((channel - first) & 63); }
};

struct alignas(64) Thread {
  const Instruction* instruction = nullptr;  // nullptr: free
  int64_t ready = 0;                         // first cycle with a beat
  int64_t done = kNever;
  Queue* in = nullptr;               // of its fabric operands
  Channel* out = nullptr;            //
  int32_t position = 0;              // words done
  int32_t remaining = 0;             // beats left, without fabric operands
  int32_t flags = 0;                 // commands of the last wavelet
  int32_t dst = -1, a = -1, b = -1;  // addresses in this round of the loop; -1: absent

  bool on_fabric() const { return in || out; }
};
static_assert(sizeof(Thread) == 64);

struct alignas(64) Core {
  int64_t visited = -1, scheduled = -1;
  int64_t next = 0;        // when the main thread takes its next instruction
  int64_t mark = 0;        // until when its time is booked on phases
  int64_t skip_from = -1;  // since when one thread without fabric operands has run alone
  int32_t pc = 0, round = 0;
  uint32_t active = 0, blocked = 0;  // masks of the class's tasks
  uint16_t busy = 0, ending = 0;     // masks of threads with an instruction, and with one just done
  int8_t turn = 0, skip_thread = 0;
  bool in_task = false, halted = false;
  int32_t loop_start = -1, loop_rounds = 0;
  Thread threads[kMicrothreads + 1];
};

class Grid {
 public:
  Grid(const Constants& constants, const ProgramView& program, Results& results);
  void run();

 private:
  enum Kind : uint32_t { kRouter, kCore };

  // The calendar of a half of the grid: a ring of the next cycles, and a heap for what is further
  // away. Large grids are run by two threads, each with the rows of one half. Within a cycle only
  // the routers of the two rows where they meet touch both: these are visited when all else is
  // done.
  struct Calendar {
    std::vector<std::vector<uint32_t>> ring;
    std::priority_queue<std::pair<int64_t, uint32_t>, std::vector<std::pair<int64_t, uint32_t>>,
                        std::greater<>>
        far;
    int64_t in_ring = 0;
    std::vector<uint32_t> today, edge;
    std::exception_ptr error;
  };

  void build_routes();
  Queue make_queue(int64_t room);
  int64_t neighbour(int64_t core, int port) const;
  std::string at(int64_t core) const;

  void visit_router(int64_t core);
  void advance(Route& route, Wavelet& wavelet);
  bool two_sources(const Route& route, int port) const;

  void visit_core(int64_t core);
  bool pick_task(Core& c, int64_t core);
  void fetch(Core& c, int64_t core);
  void launch(Core& c, int64_t core, const Instruction& instruction);
  bool ready(const Thread& thread) const;
  void beat(Core& c, int64_t core, int thread);
  void compute(Thread& thread, float* memory);
  void finish(Core& c, int64_t core, int thread);
  void sleep(Core& c, int64_t core);
  void book(Core& c, int64_t core, const Instruction& instruction, int64_t until);
  void log(int64_t cycle, int64_t core, int thread, const Instruction* instruction, int what);

  void push(Queue& queue, float value, int32_t flags, int64_t at, int64_t core);
  void enter(int32_t channel, float value, int32_t flags, int64_t at, int64_t core);
  Wavelet pop(Queue& queue);
  const Wavelet& head(const Queue& q) const { return pool_[q.begin + q.head]; }

  void wake(Kind kind, int64_t core, int64_t cycle);
  void take_today(Calendar& calendar);
  void visit(uint32_t item);
  void work(Calendar& calendar);
  void fetch_early(const Calendar& calendar, size_t n) const;
  void check_the_end() const;
  std::string why_stuck(int64_t core) const;

  int64_t& statistic(int64_t core, Statistic s) { return out_.cores[core * kStatistics + s]; }
  float* memory(int64_t core) { return out_.memory ? out_.memory + core * k_.words : nullptr; }
  Route* route(int64_t core, int colour) {
    const int32_t r = route_index_[core * k_.colours + colour];
    return r < 0 ? nullptr : &routes_[r];
  }
  const Route* route(int64_t core, int colour) const {
    return const_cast<Grid*>(this)->route(core, colour);
  }

  const Constants k_;
  const ProgramView program_;
  Results& out_;
  int64_t now_ = 0, cores_;

  std::vector<Wavelet> pool_;
  std::vector<Channel> channels_;
  std::vector<Route> routes_;
  std::vector<int32_t> route_index_;  // [cores, colours]
  std::vector<Router> routers_;
  std::vector<Queue> inbox_;  // core queues, by route
  std::vector<Core> core_;

  static constexpr int64_t kRing = 1024;
  static constexpr size_t kAhead = 4;       // visits between asking for memory and using it
  static constexpr size_t kTogether = 192;  // visits in a cycle that are worth a second thread
  static constexpr int64_t kCores = 1024;   // cores likewise
  Calendar calendar_[2];
  int64_t second_half_ = 0, edge_begin_ = 0, edge_end_ = 0;  // first cores of these
};

// Raise std::invalid_argument where a program names what it was not given.
void check_program(const Constants& k, const ProgramView& p, int64_t tasks, bool values);
void check_ramps(const Constants& k, const ProgramView& p);

}  // namespace cgpt::wafer
