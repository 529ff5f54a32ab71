#pragma once

#include "../wafer/grid.h"
#include "dlpack.h"

namespace cgpt::python {
namespace {

// A dense array of this dtype and these extents (-1: any).
template <class T>
T* dense(const char* name, Tensor t, DType dtype, std::initializer_list<int64_t> extents) {
  const Checker check{"wafer_run"};
  check.require(static_cast<bool>(t), [&] { return std::string(name) + " is missing"; });
  check.dtype(name, t, {dtype});
  bool ok = t.device == Device::cpu && t.ndim == static_cast<int>(extents.size());
  int64_t stride = 1;
  for (int d = t.ndim - 1; ok && d >= 0; stride *= t.shape[d], --d) {
    const int64_t wanted = extents.begin()[d];
    ok = (wanted < 0 || t.shape[d] == wanted) && (t.shape[d] == 1 || t.strides[d] == stride);
  }
  check.require(ok, [&] {
    return std::string(name) + " has a wrong shape or is not dense, got " + shape_text(t);
  });
  return t.as<T>();
}

py::tuple wafer_run(Tensor constants, Tensor code, Tensor tasks, Tensor first_task,
                    Tensor core_class, Tensor parameters, Tensor routes, Tensor memory,
                    Tensor cores, Tensor phases, Tensor log) {
  using namespace wafer;
  constexpr int64_t kConstants = sizeof(Constants) / sizeof(int64_t);
  const Constants k = *reinterpret_cast<const Constants*>(
      dense<int64_t>("constants", constants, DType::i64, {kConstants}));
  const Checker check{"wafer_run"};
  check.require(k.width > 0 && k.height > 0 && k.width * k.height < (int64_t{1} << 30) &&
                    k.colours > 0 && k.colours <= 64 && k.hop > 0 && k.ramp > 0 && k.stop >= 0 &&
                    k.slots > 0 && k.tags > 0 && k.hop < 1000 && k.ramp < 1000 &&
                    k.router_queue > 1 && k.core_queue > 1 && k.task_start >= 0 && k.words >= 0 &&
                    k.parameters > 0,
                "constants out of range");
  const int64_t n = k.width * k.height, classes = first_task.shape[0] - 1;
  ProgramView p;
  p.code = reinterpret_cast<const Instruction*>(
      dense<int32_t>("code", code, DType::i32, {-1, sizeof(Instruction) / 4}));
  p.tasks = reinterpret_cast<const Task*>(dense<int32_t>("tasks", tasks, DType::i32, {-1, 4}));
  p.first_task = dense<int32_t>("first_task", first_task, DType::i32, {-1});
  p.core_class = dense<int32_t>("core_class", core_class, DType::i32, {n});
  p.parameters = dense<int32_t>("parameters", parameters, DType::i32, {n, k.parameters});
  p.routes = dense<int32_t>("routes", routes, DType::i32, {n, k.colours, kSwitchPositions});
  p.instructions = code.shape[0];
  p.classes = classes;
  Results out;
  out.memory = memory ? dense<float>("memory", memory, DType::f32, {n, k.words}) : nullptr;
  out.cores = dense<int64_t>("cores", cores, DType::i64, {n, kStatistics});
  out.phases = dense<int64_t>("phases", phases, DType::i64, {n, k.tags});
  out.log = log ? dense<int64_t>("log", log, DType::i64, {-1, 5}) : nullptr;
  out.log_room = log ? log.shape[0] : 0;
  {
    py::gil_scoped_release release;
    check_program(k, p, tasks.shape[0], out.memory != nullptr);
    Grid(k, p, out).run();
  }
  return py::make_tuple(out.cycles, out.events, out.logged);
}

}  // namespace

inline void bind_wafer(py::module_& m) {
  m.def("wafer_run", &wafer_run,
        "Run a program on the modelled grid; cgpt_kernels/wafer/engine.py lays out the arrays.");
}

}  // namespace cgpt::python
