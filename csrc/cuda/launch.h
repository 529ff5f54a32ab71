// Kernel launch with errors that name the op, on the framework's current stream.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace cgpt::cuda {

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

}  // namespace cgpt::cuda
