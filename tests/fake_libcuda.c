/* The CUDA driver's functions that Triton's launcher links, without a GPU: everything succeeds, and
 * each launch leaves its grid, stream, function and first argument in `launches`. */
#include <stdint.h>
#include <string.h>

typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned count;
} Config;

typedef struct {
  uint64_t grid[3], threads, shared, stream, function, pointer;
} Launch;

enum { kMost = 1 << 10 };
Launch launches[kMost];
uint64_t launch_count = 0;
static uint64_t functions = 0;

int cuLaunchKernelEx(const Config* config, void* function, void** arguments, void** extra) {
  Launch* at = &launches[launch_count++ % kMost];
  for (int i = 0; i < 3; ++i) at->grid[i] = config->grid[i];
  at->threads = config->block[0];
  at->shared = config->shared;
  at->stream = (uint64_t)config->stream;
  at->function = (uint64_t)function;
  memcpy(&at->pointer, arguments[0], sizeof at->pointer);
  return 0;
}
int cuPointerGetAttribute(void* data, int attribute, uint64_t pointer) {
  *(uint64_t*)data = pointer;
  return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = 227 * 1024;
  return 0;
}
int cuFuncGetAttribute(int* value, int attribute, void* function) {
  *value = 1024;
  return 0;
}
int cuCtxGetCurrent(void** context) {
  *context = &functions;
  return 0;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = (void*)++functions;
  return 0;
}
#define SUCCEEDS(name) \
  int name(void) { return 0; }
SUCCEEDS(cuInit)
SUCCEEDS(cuCtxGetDevice)
SUCCEEDS(cuCtxGetLimit)
SUCCEEDS(cuCtxSetCurrent)
SUCCEEDS(cuCtxSetLimit)
SUCCEEDS(cuDeviceGet)
SUCCEEDS(cuDeviceGetCount)
SUCCEEDS(cuDevicePrimaryCtxRetain)
SUCCEEDS(cuDriverGetVersion)
SUCCEEDS(cuFuncSetAttribute)
SUCCEEDS(cuFuncSetCacheConfig)
SUCCEEDS(cuGetErrorString)
SUCCEEDS(cuModuleLoadData)
SUCCEEDS(cuModuleUnload)
SUCCEEDS(cuOccupancyMaxActiveClusters)
SUCCEEDS(cuPointerGetAttributes)
SUCCEEDS(cuStreamIsCapturing)
SUCCEEDS(cuTensorMapEncodeIm2col)
SUCCEEDS(cuTensorMapEncodeTiled)
