// Kernel launch on the framework's current stream, with errors that name the op.
#pragma once

#include <stdexcept>
#include <string>

#include "../common/tensor_view.h"

#ifdef CGPT_CUDA_HOST
  #include "host.h"
#else
  #include <cuda_runtime.h>
#endif

namespace cgpt::cuda {

// One launch. Blocks are grid_x * grid_y * grid_z, of `threads` (a multiple of 32, at most 1024).
struct Launch {
  int64_t grid_x = 1;  // below 2^31
  int64_t grid_y = 1;  // below 2^16, as grid_z
  int64_t grid_z = 1;
  int threads = 0;
  int64_t shared = 0;      // bytes of shared memory of a block
  const TensorView& like;  // a tensor of the call: gives device and stream
  // Whether all blocks run side by side, as grid_barrier needs: at most most_blocks of them, along
  // x only.
  bool cooperative = false;
};

inline void check_launch(const char* op, const Launch& l) {
  const auto wrong = [&](const std::string& what) {
    throw std::invalid_argument(std::string(op) + ": " + what);
  };
  if (l.threads < 32 || l.threads > 1024 || l.threads % 32 != 0)
    wrong("a launch takes 32 to 1024 threads, a multiple of 32, got " + std::to_string(l.threads));
  if (l.grid_x >= int64_t{1} << 31 || l.grid_y >= 1 << 16 || l.grid_z >= 1 << 16)
    wrong("the grid (" + std::to_string(l.grid_x) + ", " + std::to_string(l.grid_y) + ", " +
          std::to_string(l.grid_z) + ") is beyond what a launch takes: pass fewer rows or batches");
}

// Whether p and a stride in elements of T keep every row on a multiple of kBytes.
template <int kBytes, class T>
bool aligned(const T* p, int64_t stride = 0) {
  return reinterpret_cast<uintptr_t>(p) % kBytes == 0 &&
         stride * static_cast<int64_t>(sizeof(T)) % kBytes == 0;
}

#ifdef CGPT_CUDA_HOST

template <class... P, class... A>
void launch(const char* op, const Launch& l, void (*kernel)(P...), const A&... args) {
  check_launch(op, l);
  const auto body = [&] { kernel(args...); };
  host::run(
      op, l.grid_x, l.grid_y, l.grid_z, l.threads, l.shared, l.cooperative,
      [](const void* f) { (*static_cast<decltype(&body)>(f))(); }, &body);
}

template <class... P>
int64_t most_blocks(const char*, const Launch&, void (*)(P...)) {
  return host::most_blocks();
}

#else

inline void require(cudaError_t status, const char* op) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": CUDA error: " + cudaGetErrorString(status));
}

// Makes a tensor's device current for the length of a launch: torch may be on another one.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* op) {
    require(cudaGetDevice(&previous_), op);
    if (device != previous_) require(cudaSetDevice(device), op);
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

// What a kernel may use without asking is 48 KB; more is granted per kernel and device.
template <class... P>
void grant_shared(const char* op, const Launch& l, void (*kernel)(P...)) {
  if (l.shared > 48 * 1024)
    require(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(l.shared)),
            op);
}

// Blocks of a cooperative launch: as many as there are multiprocessors.
template <class... P>
int64_t most_blocks(const char* op, const Launch& l, void (*kernel)(P...)) {
  const DeviceGuard guard(l.like.device_index, op);
  grant_shared(op, l, kernel);
  int processors = 0, each = 0;
  require(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, l.like.device_index),
          op);
  require(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, l.threads,
                                                        static_cast<size_t>(l.shared)),
          op);
  return each > 0 ? processors : 0;
}

template <class... P, class... A>
void launch(const char* op, const Launch& l, void (*kernel)(P...), const A&... args) {
  check_launch(op, l);
  if (l.grid_x * l.grid_y * l.grid_z == 0) return;
  const DeviceGuard guard(l.like.device_index, op);
  grant_shared(op, l, kernel);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(l.grid_x), static_cast<unsigned>(l.grid_y),
                        static_cast<unsigned>(l.grid_z));
  config.blockDim = dim3(static_cast<unsigned>(l.threads));
  config.dynamicSmemBytes = static_cast<size_t>(l.shared);
  config.stream = static_cast<cudaStream_t>(l.like.stream);
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  config.attrs = &together;
  config.numAttrs = l.cooperative ? 1 : 0;
  require(cudaLaunchKernelEx(&config, kernel, args...), op);
}

#endif

}  // namespace cgpt::cuda
