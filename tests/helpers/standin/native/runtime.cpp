// The CUDA runtime: device memory is host memory that is mapped when touched, kernels do nothing, everything is recorded.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>

#include "record.h"

using namespace standin;

// --- kernels

namespace {
std::mutex registry_mutex;
std::unordered_map<const void*, const char*>& registry() {
  static auto* one = new std::unordered_map<const void*, const char*>();
  return *one;
}
struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
thread_local Configuration configuration;

cudaError_t launch(const void* function, const void* stream) {
  const char* name = "unregistered kernel";
  {
    std::lock_guard<std::mutex> guard(registry_mutex);
    auto found = registry().find(function);
    if (found != registry().end()) name = found->second;
  }
  int owner = stream_device(stream);
  count(KERNEL, name, stream);
  return owner >= 0 && owner != device() ? cudaErrorInvalidResourceHandle : cudaSuccess;  // as CUDA does
}
}  // namespace

EXPORT void** __cudaRegisterFatBinary(void*) {
  static void* handle[4];
  return handle;
}
EXPORT void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  const char* kept = intern(name);
  std::lock_guard<std::mutex> guard(registry_mutex);
  registry()[host] = kept;
}
EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st* stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
EXPORT cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid, *block = configuration.block, *shared = configuration.shared;
  *static_cast<void**>(stream) = configuration.stream;
  return cudaSuccess;
}
EXPORT char __cudaInitModule(void**) { return 1; }
EXPORT cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = (cudaKernel_t)function;
  return cudaSuccess;
}
EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return launch(kernel, stream);
}
EXPORT cudaError_t cudaLaunchKernel(const void* function, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return launch(function, stream);
}
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void**) {
  return launch(function, config->stream);
}
EXPORT cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return launch(function, stream);
}
EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* data) {
  function(data);
  return cudaSuccess;
}
EXPORT cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void*) {
  memset(out, 0, sizeof *out);
  out->ptxVersion = out->binaryVersion = 90;
  out->maxThreadsPerBlock = 1024, out->numRegs = 32, out->maxDynamicSharedSizeBytes = 49152;
  return cudaSuccess;
}
EXPORT cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* out, const void*, int, size_t) {
  *out = 4;
  return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* out, const void*, int, size_t, unsigned) {
  *out = 4;
  return cudaSuccess;
}

// --- devices

EXPORT cudaError_t cudaGetDeviceCount(int* out) {
  *out = devices();
  return *out ? cudaSuccess : cudaErrorNoDevice;
}
EXPORT cudaError_t cudaGetDevice(int* out) {
  *out = device();
  return cudaSuccess;
}
EXPORT cudaError_t cudaSetDevice(int number) {
  if (number < 0 || number >= devices()) return cudaErrorInvalidDevice;
  device() = number;
  count(SELECT, "set device");  // since CUDA 12 it makes a context there
  return cudaSuccess;
}
EXPORT cudaError_t cudaDriverGetVersion(int* out) {
  *out = CUDART_VERSION;
  return cudaSuccess;
}
EXPORT cudaError_t cudaRuntimeGetVersion(int* out) {
  *out = CUDART_VERSION;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetDeviceProperties(cudaDeviceProp* out, int number) {
  memset(out, 0, sizeof *out);
  strcpy(out->name, "NVIDIA H100 80GB HBM3 (stand-in)");
  if (number < 0 || number >= devices()) return cudaErrorInvalidDevice;
  memset(out->uuid.bytes, host_number(number) + 1, sizeof out->uuid.bytes);
  out->major = 9, out->minor = 0, out->totalGlobalMem = 80UL << 30, out->multiProcessorCount = 132;
  out->warpSize = 32, out->maxThreadsPerBlock = 1024, out->maxThreadsPerMultiProcessor = 2048;
  out->sharedMemPerBlock = 49152, out->sharedMemPerBlockOptin = 232448, out->sharedMemPerMultiprocessor = 233472;
  out->regsPerBlock = out->regsPerMultiprocessor = 65536, out->maxBlocksPerMultiProcessor = 32;
  out->maxGridSize[0] = 2147483647, out->maxGridSize[1] = out->maxGridSize[2] = 65535;
  out->maxThreadsDim[0] = out->maxThreadsDim[1] = 1024, out->maxThreadsDim[2] = 64;
  out->l2CacheSize = 50 << 20, out->textureAlignment = 512, out->concurrentKernels = out->unifiedAddressing = 1;
  out->pciBusID = 16 + host_number(number);
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetAttribute(int* out, cudaDeviceAttr attribute, int) {
  static const std::map<int, int> known = {
      {cudaDevAttrMultiProcessorCount, 132},        {cudaDevAttrComputeCapabilityMajor, 9},
      {cudaDevAttrComputeCapabilityMinor, 0},       {cudaDevAttrMaxThreadsPerBlock, 1024},
      {cudaDevAttrMaxSharedMemoryPerBlock, 49152},  {cudaDevAttrMaxSharedMemoryPerBlockOptin, 232448},
      {cudaDevAttrWarpSize, 32},                    {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 233472},
      {cudaDevAttrMaxRegistersPerBlock, 65536},     {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
      {cudaDevAttrMaxGridDimX, 2147483647},         {cudaDevAttrMaxGridDimY, 65535},
      {cudaDevAttrMaxGridDimZ, 65535},              {cudaDevAttrL2CacheSize, 50 << 20},
  };
  auto found = known.find(attribute);
  *out = found == known.end() ? 1 : found->second;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetPCIBusId(char* out, int size, int number) {
  snprintf(out, size, "0000:%02x:00.0", 16 + number);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  *total = 80UL << 30, *free_bytes = 78UL << 30;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceCanAccessPeer(int* out, int, int) {
  *out = 0;
  return cudaSuccess;
}

// --- memory

namespace {
struct Span {
  size_t size;
  int device;
};
std::mutex memory_mutex;
std::map<const char*, Span>& on_device() {
  static auto* one = new std::map<const char*, Span>();
  return *one;
}
std::map<const char*, Span>& pinned() {
  static auto* one = new std::map<const char*, Span>();
  return *one;
}
const Span* find(const std::map<const char*, Span>& spans, const void* pointer) {
  auto after = spans.upper_bound(static_cast<const char*>(pointer));
  if (after == spans.begin()) return nullptr;
  --after;
  return static_cast<const char*>(pointer) < after->first + after->second.size ? &after->second : nullptr;
}
void* map_memory(std::map<const char*, Span>& spans, size_t size) {
  void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  std::lock_guard<std::mutex> guard(memory_mutex);
  spans[static_cast<const char*>(memory)] = {size, device()};
  return memory;
}
void unmap_memory(std::map<const char*, Span>& spans, void* memory) {
  std::lock_guard<std::mutex> guard(memory_mutex);
  auto found = spans.find(static_cast<const char*>(memory));
  if (found == spans.end()) return;
  munmap(memory, found->second.size);
  spans.erase(found);
}

constexpr size_t SMALL = 1 << 20;  // larger copies are counted, not made

cudaError_t copy(void* to, const void* from, size_t size, const void* stream, bool waits) {
  int to_device = -1, from_device = -1;
  bool host_is_pinned;
  {
    std::lock_guard<std::mutex> guard(memory_mutex);
    if (const Span* span = find(on_device(), to)) to_device = span->device;
    if (const Span* span = find(on_device(), from)) from_device = span->device;
    host_is_pinned = find(pinned(), to_device >= 0 ? from : to) != nullptr;
  }
  if (to_device >= 0 && from_device >= 0) {
    count(COPY, "device to device", stream, size);
    if (to_device != device()) count(COPY, "device to device", stream, size, to_device);
    if (from_device != device()) count(COPY, "device to device", stream, size, from_device);
    return cudaSuccess;
  }
  if (to_device < 0 && from_device < 0) {
    memcpy(to, from, size);
    return cudaSuccess;
  }
  bool inward = to_device >= 0;
  int place = inward ? to_device : from_device;
  if (inward && size <= SMALL) memcpy(to, from, size);
  // What kernels would have computed is not there, and what an earlier tensor left there must not decide anything: zeros. One byte
  // is nearly always the answer to a question (all finite?), and yes.
  if (!inward && size <= SMALL) memset(to, size == 1, size);
  const char* name = inward ? (host_is_pinned ? "host to device, pinned" : "host to device, pageable")
                            : (host_is_pinned ? "device to host, pinned" : "device to host, pageable");
  if (place != device()) count(COPY, name, stream, size, place);
  if (host_is_pinned && !waits)
    count(COPY, name, stream, size);
  else
    block(COPY, name, stream, size);
  return cudaSuccess;
}
}  // namespace

EXPORT cudaError_t cudaMalloc(void** out, size_t size) {
  *out = nullptr;
  if (!size) return cudaSuccess;
  count(ALLOCATION, "device memory", nullptr, size);
  *out = map_memory(on_device(), size);
  return *out ? cudaSuccess : cudaErrorMemoryAllocation;
}
EXPORT cudaError_t cudaMallocAsync(void** out, size_t size, cudaStream_t) { return cudaMalloc(out, size); }
EXPORT cudaError_t cudaFree(void* memory) {
  unmap_memory(on_device(), memory);
  return cudaSuccess;
}
EXPORT cudaError_t cudaFreeAsync(void* memory, cudaStream_t) { return cudaFree(memory); }
EXPORT cudaError_t cudaHostAlloc(void** out, size_t size, unsigned) {
  count(ALLOCATION, "pinned memory", nullptr, size);
  *out = map_memory(pinned(), size);
  return *out ? cudaSuccess : cudaErrorMemoryAllocation;
}
EXPORT cudaError_t cudaFreeHost(void* memory) {
  unmap_memory(pinned(), memory);
  return cudaSuccess;
}
EXPORT cudaError_t cudaHostRegister(void* memory, size_t size, unsigned) {
  count(ALLOCATION, "pinned memory", nullptr, size);
  std::lock_guard<std::mutex> guard(memory_mutex);
  pinned()[static_cast<const char*>(memory)] = {size, device()};
  return cudaSuccess;
}
EXPORT cudaError_t cudaHostUnregister(void* memory) {
  std::lock_guard<std::mutex> guard(memory_mutex);
  pinned().erase(static_cast<const char*>(memory));
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t stream) {
  return copy(to, from, size, stream, false);
}
EXPORT cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
  return copy(to, from, size, nullptr, true);
}
EXPORT cudaError_t cudaMemset(void*, int, size_t size) {
  count(FILL, "memset", nullptr, size);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemsetAsync(void*, int, size_t size, cudaStream_t stream) {
  count(FILL, "memset", stream, size);
  return cudaSuccess;
}
EXPORT cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* out, const void* pointer) {
  memset(out, 0, sizeof *out);
  std::lock_guard<std::mutex> guard(memory_mutex);
  const Span* span = find(on_device(), pointer);
  out->type = span ? cudaMemoryTypeDevice : find(pinned(), pointer) ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  out->device = span ? span->device : -1;
  out->devicePointer = const_cast<void*>(pointer);
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetSymbolAddress(void** out, const void* symbol) {
  *out = const_cast<void*>(symbol);
  return cudaSuccess;
}

// --- streams and events

namespace {
struct Event {
  int device;
  const void* stream;
};
}  // namespace

EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t* out, unsigned, int priority) {
  *out = static_cast<cudaStream_t>(new_stream(priority));
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t* out, unsigned flags) {
  return cudaStreamCreateWithPriority(out, flags, 0);
}
EXPORT cudaError_t cudaStreamCreate(cudaStream_t* out) { return cudaStreamCreateWithPriority(out, 0, 0); }
EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* out) {
  *out = stream_priority(stream);
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  block(WAIT, "for a stream", stream);
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceSynchronize() {
  block(WAIT, "for the device");
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  block(WAIT, "for an event", reinterpret_cast<Event*>(event)->stream);
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t* out, unsigned) {
  *out = reinterpret_cast<cudaEvent_t>(new Event{device(), nullptr});
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventCreate(cudaEvent_t* out) { return cudaEventCreateWithFlags(out, 0); }
EXPORT cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<Event*>(event);
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  Event* own = reinterpret_cast<Event*>(event);
  int owner = stream_device(stream);
  if (own->device != (owner < 0 ? device() : owner)) return cudaErrorInvalidResourceHandle;  // as CUDA does
  own->stream = stream;
  count(ORDER, "event record", stream);
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaEventRecordWithFlags(event, stream, 0); }
EXPORT cudaError_t cudaEventElapsedTime(float* out, cudaEvent_t, cudaEvent_t) {
  *out = 1.0f;
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t, unsigned) {
  count(ORDER, "stream waits for event", stream);
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* out) {
  *out = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* out, unsigned long long* number, cudaGraph_t*,
                                            const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
  *out = cudaStreamCaptureStatusNone;
  if (number) *number = 0;
  return cudaSuccess;
}

// --- the rest

EXPORT cudaError_t cudaGetLastError() { return cudaSuccess; }
EXPORT cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
EXPORT const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidResourceHandle ? "stream or event of another device (stand-in)" : "stand-in";
}
EXPORT const char* cudaGetErrorName(cudaError_t) { return "stand-in"; }
EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** out, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
  *out = dlsym(RTLD_DEFAULT, symbol);
  if (result) *result = *out ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
