// The modelled grid without Python: latencies, sums along a line, what two threads leave, and what
// is said when a program is wrong.
#include "grid.h"

#include <omp.h>

#include <cstdio>
#include <cstdlib>
#include <stdexcept>

namespace {

using namespace cgpt::wafer;

void expect(bool ok, const std::string& what) {
  if (ok) return;
  std::fprintf(stderr, "grid: %s\n", what.c_str());
  std::exit(1);
}

constexpr int32_t port(int p) { return 1 << p; }
constexpr int32_t way(int32_t receive, int32_t send) { return receive | send << 8; }

Instruction blank(Op op) {
  Instruction i{};
  i.op = op, i.thread = i.in = i.out = i.task = -1, i.divisor = 1;
  i.dst.base = i.a.base = i.b.base = -1;
  return i;
}

// A grid with one colour; every core sends its word, or what came in and its own, one core west.
struct Line {
  static constexpr int64_t kWords = 2;
  Constants k{};
  std::vector<Instruction> code;
  std::vector<Task> tasks;
  std::vector<int32_t> first_task{0}, core_class, parameters, routes;
  std::vector<float> memory;
  std::vector<int64_t> cores, phases;
  Results out{};

  Line(int64_t width, int64_t height) {
    k.width = width, k.height = height, k.colours = 2, k.hop = 1, k.ramp = 2, k.stop = 1;
    k.slots = 2, k.router_queue = 2, k.core_queue = 4, k.words = kWords, k.parameters = 1;
    k.tags = 1, k.max_cycles = 100000;
    const int64_t n = width * height;
    core_class.assign(n, -1), parameters.assign(n, 0), memory.assign(n * kWords, 0.0f);
    routes.assign(n * k.colours * kSwitchPositions, 0);
    cores.assign(n * kStatistics, 0), phases.assign(n, 0);
  }
  int32_t add_class(std::vector<Instruction> body) {
    body.push_back(blank(Op::halt));
    tasks.push_back({static_cast<int32_t>(code.size()), -1, 1, 0});
    code.insert(code.end(), body.begin(), body.end());
    first_task.push_back(static_cast<int32_t>(tasks.size()));
    return static_cast<int32_t>(first_task.size()) - 2;
  }
  void route(int64_t core, int colour, int32_t mask, int position = 0) {
    routes[(core * k.colours + colour) * kSwitchPositions + position] = mask;
  }
  int64_t run() {
    const ProgramView p{code.data(),
                        tasks.data(),
                        first_task.data(),
                        core_class.data(),
                        parameters.data(),
                        routes.data(),
                        static_cast<int64_t>(code.size()),
                        static_cast<int64_t>(first_task.size()) - 1};
    out = Results{};
    out.memory = memory.data(), out.cores = cores.data(), out.phases = phases.data();
    check_program(k, p, static_cast<int64_t>(tasks.size()), true);
    Grid(k, p, out).run();
    return out.cycles;
  }
  std::string error() {
    try {
      run();
    } catch (const std::exception& e) {
      return e.what();
    }
    return "nothing";
  }
};

Instruction vector_of(int32_t words, int32_t in, int32_t out, int32_t a, int32_t dst,
                      Function function = Function::move, int32_t b = -1) {
  Instruction i = blank(Op::vec);
  i.function = function, i.len = words, i.startup = 2, i.in = in, i.out = out;
  i.a = {a, 1, 0, 0}, i.b = {b, 1, 0, 0}, i.dst = {dst, 1, 0, 0};
  return i;
}

// Rows that add up towards their west ends, on alternating colours.
Line chains(int64_t width, int64_t height) {
  Line line(width, height);
  std::vector<int32_t> middle, far;
  const int32_t root = line.add_class({vector_of(1, 0, -1, -1, 0, Function::add, 0)});
  for (int colour : {0, 1}) {
    middle.push_back(line.add_class({vector_of(1, 1 - colour, colour, -1, -1, Function::add, 0)}));
    far.push_back(line.add_class({vector_of(1, -1, colour, 0, -1)}));
  }
  for (int64_t y = 0; y < height; ++y)
    for (int64_t x = 0; x < width; ++x) {
      const int64_t core = y * width + x;
      const int out = static_cast<int>((x + 1) % 2);  // position 1 sends on colour 0
      line.memory[core * Line::kWords] = static_cast<float>(x + y);
      line.core_class[core] = x == 0 ? root : x + 1 < width ? middle[out] : far[out];
      if (x > 0) line.route(core, out, way(port(kRamp), port(kWest)));
      if (x + 1 < width) line.route(core, 1 - out, way(port(kEast), port(kRamp)));
    }
  return line;
}

void a_chain_adds_up_and_costs_what_its_stops_cost() {
  for (int64_t width : {2, 3, 10}) {
    Line line = chains(width, 2);
    const int64_t cycles = line.run();
    expect(line.memory[0] == static_cast<float>(width * (width - 1) / 2), "a wrong sum");
    // startup, then per stop: out by the ramp, a hop, in by the ramp, and through the core
    expect(cycles == 2 + (width - 1) * (1 + 2 + 1 + 2) + 1,
           "a chain of " + std::to_string(width) + " took " + std::to_string(cycles));
  }
}

void two_threads_leave_what_one_leaves() {
  Line one = chains(48, 64), two = chains(48, 64);
  const int threads = omp_get_max_threads();
  omp_set_num_threads(1);
  one.run();
  omp_set_num_threads(2);
  two.run();
  omp_set_num_threads(threads);
  expect(one.memory == two.memory && one.cores == two.cores && one.phases == two.phases &&
             one.out.cycles == two.out.cycles,
         "two threads leave something else than one");
}

void wrong_programs_are_named() {
  const auto names = [](Line& line, const char* what) {
    const std::string said = line.error();
    expect(said.find(what) != std::string::npos,
           "expected '" + std::string(what) + "' in: " + said);
  };
  Line starved = chains(4, 1);
  starved.core_class[3] = -1;
  names(starved, "deadlock: core (px 0, py 0) waits for a wavelet on colour 0");

  Line lost = chains(3, 1);
  lost.core_class[0] = lost.add_class({});
  names(lost, "nobody receives a wavelet of colour 0 in core (px 0, py 0)");

  Line both(3, 1);
  const int32_t sender = both.add_class({vector_of(2, -1, 0, 0, -1)});
  both.core_class = {sender, both.add_class({vector_of(2, 0, -1, -1, 0)}), sender};
  both.route(0, 0, way(port(kRamp), port(kEast)));
  both.route(2, 0, way(port(kRamp), port(kWest)));
  both.route(1, 0, way(port(kEast) | port(kWest), port(kRamp)));
  names(both, "two sources deliver on one colour: colour 0 at core (px 1, py 0)");

  Line edge = chains(3, 1);
  edge.route(0, 0, way(port(kEast), port(kRamp) | port(kNorth)));
  names(edge, "leaves core (px 0, py 0) by port N, the edge of the grid");

  Line outside = chains(2, 1);
  outside.code[0].b.base = 2;
  names(outside, "instruction 0 has a bad second operand");
}

}  // namespace

int main() {
  a_chain_adds_up_and_costs_what_its_stops_cost();
  two_threads_leave_what_one_leaves();
  wrong_programs_are_named();
}
