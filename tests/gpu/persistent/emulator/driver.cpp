// Stands in for CUDA's driver library: says how each function was called that loads and launches
// the persistent kernels. What cuda-bindings asks for besides does nothing.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

extern "C" {

int cuDeviceGet(int* device, int ordinal) {
  *device = 70 + ordinal;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = reinterpret_cast<void*>(static_cast<intptr_t>(100 * device));
  return 0;
}
int cuCtxPushCurrent(void* context) {
  std::printf("enter context %d\n", static_cast<int>(reinterpret_cast<intptr_t>(context)));
  return 0;
}
int cuCtxPopCurrent(void** context) {
  std::printf("leave context\n");
  *context = nullptr;
  return 0;
}
int cuModuleLoadData(void** module, const void* image) {
  std::printf("load %s\n", static_cast<const char*>(image));
  *module = reinterpret_cast<void*>(1);
  return 0;
}
int cuModuleGetFunction(void** function, void*, const char* name) {
  std::printf("function %s\n", name);
  *function = reinterpret_cast<void*>(2);
  return 0;
}
int cuFuncSetAttribute(void*, int attribute, int value) {
  std::printf("attribute %d %d\n", attribute, value);
  return 0;
}
// As many clusters fit as the environment says; 912 is CUDA_ERROR_INVALID_CLUSTER_SIZE.
int cuOccupancyMaxActiveClusters(int* clusters, void*, const unsigned* config) {
  std::printf("clusters of %u %u %u, %u %u %u, %u bytes\n", config[0], config[1], config[2],
              config[3], config[4], config[5], config[6]);
  *clusters = std::atoi(std::getenv("CLUSTERS"));
  return *clusters < 0 ? 912 : 0;
}
int cuLaunchKernel(void*, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared, void* stream,
                   void** arguments, void** extra) {
  std::printf("launch %u %u %u, %u %u %u, %u bytes, stream %d, first argument %d, extra %d\n",
              grid_x, grid_y, grid_z, block_x, block_y, block_z, shared,
              static_cast<int>(reinterpret_cast<intptr_t>(stream)),
              static_cast<int>(*static_cast<int64_t*>(arguments[0])), extra != nullptr);
  return 0;
}

static int nothing() { return 0; }
int cuGetProcAddress_v2(const char* name, void** function, int, uint64_t, int* status) {
  static void* const self = dlopen("libcuda.so.1", RTLD_LAZY);
  void* const found = dlsym(self, name);
  *function = found != nullptr ? found : reinterpret_cast<void*>(nothing);
  if (status != nullptr) *status = 0;
  return 0;
}
}
