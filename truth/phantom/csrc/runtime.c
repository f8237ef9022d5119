/* CUDA's runtime, played: kernels do nothing, streams and events have always ended, memory is never touched. */
#include "phantom.h"

#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static __thread cudaError_t last;
static __thread int current;

static cudaError_t say(cudaError_t error) {
    if (error != cudaSuccess)
        last = error;
    return error;
}

/* Kernels are registered and launched, and that is all. */

struct launch {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
};
static __thread struct launch launches[16];
static __thread int depth;

void **__cudaRegisterFatBinary(void *binary) {
    void **handle = malloc(sizeof *handle);
    *handle = binary;
    return handle;
}
void __cudaRegisterFatBinaryEnd(void **handle) { (void)handle; }
void __cudaUnregisterFatBinary(void **handle) { (void)handle; }
char __cudaInitModule(void **handle) { return (void)handle, 1; }

#define KERNELS (1 << 20)
static struct {
    const void *host;
    const char *name;
} *kernels; /* by the address of the host's function, open addressing; only where launches are told */
static int is_telling = -1;

static size_t kernel(const void *host) {
    size_t i = ((size_t)host >> 4) * 2654435761u % KERNELS;
    while (kernels[i].host != NULL && kernels[i].host != host)
        i = (i + 1) % KERNELS;
    return i;
}

void __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name, int limit, uint3 *tid,
                            uint3 *bid, dim3 *block, dim3 *grid, int *warp) {
    (void)handle, (void)device, (void)limit, (void)tid, (void)bid, (void)block, (void)grid, (void)warp;
    if (is_telling < 0)
        is_telling = getenv("DG_PHANTOM_TELL") != NULL;
    if (is_telling) {
        if (kernels == NULL)
            kernels = calloc(KERNELS, sizeof *kernels);
        size_t i = kernel(host);
        kernels[i].host = host;
        kernels[i].name = name;
    }
}

void __cudaRegisterVar(void **handle, char *host, char *device, const char *name, int ext, size_t size, int constant,
                       int global) {
    (void)handle, (void)host, (void)device, (void)name, (void)ext, (void)size, (void)constant, (void)global;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    if (depth < 16)
        launches[depth++] = (struct launch){grid, block, shared, stream};
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    if (depth == 0)
        return say(cudaErrorMissingConfiguration);
    struct launch *it = &launches[--depth];
    *grid = it->grid, *block = it->block, *shared = it->shared, *(cudaStream_t *)stream = it->stream;
    return cudaSuccess;
}

static cudaError_t launched(const void *host) {
    if (is_telling > 0) {
        size_t i = kernel(host);
        fprintf(stderr, "phantom: > %s\n", kernels[i].name == NULL ? "?" : kernels[i].name);
    }
    return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t *found, const void *host) {
    *found = (cudaKernel_t)host;
    return cudaSuccess;
}
cudaError_t cudaGetFuncBySymbol(cudaFunction_t *found, const void *host) {
    *found = (cudaFunction_t)host;
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t it, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t on) {
    (void)grid, (void)block, (void)args, (void)shared, (void)on;
    return launched(it);
}
cudaError_t cudaLaunchKernel(const void *it, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t on) {
    (void)grid, (void)block, (void)args, (void)shared, (void)on;
    return launched(it);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *how, const void *it, void **args) {
    (void)how, (void)args;
    return launched(it);
}
cudaError_t cudaLaunchCooperativeKernel(const void *it, dim3 grid, dim3 block, void **args, size_t shared,
                                        cudaStream_t on) {
    (void)grid, (void)block, (void)args, (void)shared, (void)on;
    return launched(it);
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *to, const void *it) {
    (void)it;
    const struct phantom_card *card = phantom_card();
    memset(to, 0, sizeof *to);
    to->maxThreadsPerBlock = 1024;
    to->numRegs = 32;
    to->binaryVersion = to->ptxVersion = card->built_for;
    to->maxDynamicSharedSizeBytes = (int)card->shared_bytes;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *it, enum cudaFuncAttribute which, int value) {
    (void)it, (void)which, (void)value;
    return cudaSuccess;
}
cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t it, enum cudaFuncAttribute which, int value, int on) {
    (void)it, (void)which, (void)value, (void)on;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *it, int threads,
                                                                   size_t shared, unsigned flags) {
    (void)it, (void)shared, (void)flags;
    int most = threads > 0 ? phantom_card()->threads / threads : 1;
    *blocks = most < 1 ? 1 : most > 32 ? 32 : most;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *it, int threads, size_t shared) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, it, threads, shared, 0);
}
cudaError_t cudaGetSymbolAddress(void **to, const void *symbol) {
    static char *scratch;
    (void)symbol;
    if (scratch == NULL)
        scratch = phantom_range(1 << 20);
    *to = scratch;
    return cudaSuccess;
}
cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *from, size_t bytes, size_t at, enum cudaMemcpyKind k) {
    (void)symbol, (void)from, (void)bytes, (void)at, (void)k;
    return cudaSuccess;
}
cudaError_t cudaMemcpyToSymbolAsync(const void *symbol, const void *from, size_t bytes, size_t at,
                                    enum cudaMemcpyKind k, cudaStream_t on) {
    (void)on;
    return cudaMemcpyToSymbol(symbol, from, bytes, at, k);
}

/* The card. */

cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { return *device = current, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
    if (device != 0)
        return say(cudaErrorInvalidDevice);
    current = device;
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) { return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) {
    (void)a, (void)b;
    return *can = 0, cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least != NULL)
        *least = 0;
    if (greatest != NULL)
        *greatest = -5;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char *to, int bytes, int device) {
    (void)device;
    snprintf(to, (size_t)bytes, "0000:01:00.0");
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *to, int device) {
    const struct phantom_card *card = phantom_card();
    (void)device;
    memset(to, 0, sizeof *to);
    snprintf(to->name, sizeof to->name, "%s", card->name);
    memcpy(to->uuid.bytes, "phantom-device-0", 16);
    to->totalGlobalMem = phantom_capacity();
    to->sharedMemPerBlock = 49152;
    to->regsPerBlock = to->regsPerMultiprocessor = 65536;
    to->warpSize = 32;
    to->memPitch = 2147483647;
    to->maxThreadsPerBlock = to->maxThreadsDim[0] = to->maxThreadsDim[1] = 1024;
    to->maxThreadsDim[2] = 64;
    to->maxGridSize[0] = 2147483647;
    to->maxGridSize[1] = to->maxGridSize[2] = 65535;
    to->totalConstMem = 65536;
    to->major = card->major;
    to->minor = card->minor;
    to->textureAlignment = 512;
    to->texturePitchAlignment = 32;
    to->multiProcessorCount = card->processors;
    to->canMapHostMemory = to->concurrentKernels = to->unifiedAddressing = 1;
    to->asyncEngineCount = 2;
    to->pciBusID = 1;
    to->memoryBusWidth = 384;
    to->l2CacheSize = (int)card->cache_bytes;
    to->maxThreadsPerMultiProcessor = card->threads;
    to->streamPrioritiesSupported = to->globalL1CacheSupported = to->localL1CacheSupported = 1;
    to->sharedMemPerMultiprocessor = card->shared_bytes + 1024;
    to->managedMemory = to->concurrentManagedAccess = to->computePreemptionSupported = 1;
    to->canUseHostPointerForRegisteredMem = to->hostRegisterSupported = to->cooperativeLaunch = 1;
    to->sharedMemPerBlockOptin = card->shared_bytes;
    to->maxBlocksPerMultiProcessor = card->threads / 64;
    to->reservedSharedMemPerBlock = 1024;
    to->clusterLaunch = card->major >= 9;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *to, enum cudaDeviceAttr which, int device) {
    const struct phantom_card *card = phantom_card();
    (void)device;
    switch (which) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY:
        *to = 1024;
        break;
    case cudaDevAttrMaxBlockDimZ:
        *to = 64;
        break;
    case cudaDevAttrMaxGridDimX:
        *to = 2147483647;
        break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
        *to = 65535;
        break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
        *to = 49152;
        break;
    case cudaDevAttrWarpSize:
        *to = 32;
        break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor:
        *to = 65536;
        break;
    case cudaDevAttrMultiProcessorCount:
        *to = card->processors;
        break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
        *to = card->threads;
        break;
    case cudaDevAttrComputeCapabilityMajor:
        *to = card->major;
        break;
    case cudaDevAttrComputeCapabilityMinor:
        *to = card->minor;
        break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        *to = (int)card->shared_bytes;
        break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
        *to = (int)card->shared_bytes + 1024;
        break;
    case cudaDevAttrReservedSharedMemoryPerBlock:
        *to = 1024;
        break;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
        *to = card->threads / 64;
        break;
    case cudaDevAttrL2CacheSize:
        *to = (int)card->cache_bytes;
        break;
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrHostRegisterSupported:
    case cudaDevAttrCanUseHostPointerForRegisteredMem:
        *to = 1;
        break;
    default:
        *to = 0;
    }
    return cudaSuccess;
}

/* Memory. */

cudaError_t cudaMalloc(void **to, size_t bytes) {
    *to = bytes > 0 ? phantom_malloc(bytes) : NULL;
    return *to != NULL || bytes == 0 ? cudaSuccess : say(cudaErrorMemoryAllocation);
}
cudaError_t cudaFree(void *address) {
    return address == NULL || phantom_free(address) ? cudaSuccess : say(cudaErrorInvalidValue);
}
cudaError_t cudaMallocAsync(void **to, size_t bytes, cudaStream_t on) { return (void)on, cudaMalloc(to, bytes); }
cudaError_t cudaFreeAsync(void *address, cudaStream_t on) { return (void)on, cudaFree(address); }
cudaError_t cudaMemGetInfo(size_t *left, size_t *all) {
    *left = phantom_free_bytes();
    *all = phantom_capacity();
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void **to, size_t bytes, unsigned flags) {
    (void)flags;
    *to = phantom_pinned(bytes);
    return cudaSuccess;
}
cudaError_t cudaMallocHost(void **to, size_t bytes) { return cudaHostAlloc(to, bytes, 0); }
cudaError_t cudaFreeHost(void *address) {
    return address == NULL || phantom_unpin(address) ? cudaSuccess : say(cudaErrorInvalidValue);
}
cudaError_t cudaHostRegister(void *address, size_t bytes, unsigned flags) {
    (void)address, (void)bytes, (void)flags;
    return cudaSuccess;
}
cudaError_t cudaHostUnregister(void *address) { return (void)address, cudaSuccess; }
cudaError_t cudaHostGetDevicePointer(void **to, void *address, unsigned flags) {
    (void)flags;
    return *to = address, cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *to, const void *address) {
    memset(to, 0, sizeof *to);
    to->device = -2;
    to->type = cudaMemoryTypeUnregistered;
    if (phantom_is_device(address, NULL, NULL)) {
        to->type = cudaMemoryTypeDevice;
        to->device = 0;
        to->devicePointer = (void *)address;
    } else if (phantom_is_pinned(address)) {
        to->type = cudaMemoryTypeHost;
        to->device = 0;
        to->devicePointer = to->hostPointer = (void *)address;
    } else {
        to->hostPointer = (void *)address;
    }
    return cudaSuccess;
}

static void told(const void *to, const void *from, size_t bytes) {
    /* What the host reads of the device, where somebody wants to know: nothing was computed there. */
    if (is_telling > 0 && phantom_is_device(from, NULL, NULL) && !phantom_is_device(to, NULL, NULL))
        fprintf(stderr, "phantom: < %zu bytes\n", bytes);
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    (void)kind;
    told(to, from, bytes);
    phantom_copy(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t on) {
    (void)on;
    return cudaMemcpy(to, from, bytes, kind);
}
cudaError_t cudaMemcpyPeerAsync(void *to, int a, const void *from, int b, size_t bytes, cudaStream_t on) {
    (void)a, (void)b, (void)on;
    return cudaMemcpy(to, from, bytes, cudaMemcpyDefault);
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t pitch, size_t width, size_t height,
                              enum cudaMemcpyKind kind, cudaStream_t on) {
    (void)kind, (void)on;
    for (size_t i = 0; i < height && width * height <= (1 << 16); i++)
        phantom_copy((char *)to + i * to_pitch, (const char *)from + i * pitch, width);
    return cudaSuccess;
}
cudaError_t cudaMemset(void *to, int value, size_t bytes) { return phantom_set(to, value, bytes), cudaSuccess; }
cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t on) {
    (void)on;
    return cudaMemset(to, value, bytes);
}

/* Streams and events: whatever was asked for has been done. */

static void *thing(void) { return calloc(1, 64); }

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *to, unsigned flags, int priority) {
    (void)flags, (void)priority;
    return *to = thing(), cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *to, unsigned flags) {
    return cudaStreamCreateWithPriority(to, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t *to) { return cudaStreamCreateWithPriority(to, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t it) { return free(it), cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t it) { return (void)it, cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t it) { return (void)it, cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t it, int *to) { return (void)it, *to = 0, cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t it, cudaEvent_t event, unsigned flags) {
    (void)it, (void)event, (void)flags;
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t it, enum cudaStreamCaptureStatus *to) {
    (void)it;
    return *to = cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t it, enum cudaStreamCaptureStatus *to, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *count) {
    (void)it;
    *to = cudaStreamCaptureStatusNone;
    if (id != NULL)
        *id = 0;
    if (graph != NULL)
        *graph = NULL;
    if (nodes != NULL)
        *nodes = NULL;
    if (edges != NULL)
        *edges = NULL;
    if (count != NULL)
        *count = 0;
    return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) { return (void)mode, cudaSuccess; }
cudaError_t cudaStreamAddCallback(cudaStream_t it, cudaStreamCallback_t call, void *with, unsigned flags) {
    (void)flags;
    call(it, cudaSuccess, with);
    return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t it, cudaHostFn_t call, void *with) {
    (void)it;
    call(with);
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *to, unsigned flags) { return (void)flags, *to = thing(), cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t *to) { return *to = thing(), cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t it) { return free(it), cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t it) { return (void)it, cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t it) { return (void)it, cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t it, cudaStream_t on) { return (void)it, (void)on, cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t it, cudaStream_t on, unsigned flags) {
    (void)it, (void)on, (void)flags;
    return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float *to, cudaEvent_t a, cudaEvent_t b) {
    (void)a, (void)b;
    return *to = 0, cudaSuccess;
}

/* Errors, and doors to the driver. */

cudaError_t cudaGetLastError(void) {
    cudaError_t error = last;
    last = cudaSuccess;
    return error;
}
cudaError_t cudaPeekAtLastError(void) { return last; }
const char *cudaGetErrorName(cudaError_t error) {
    return error == cudaSuccess ? "cudaSuccess" : error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "?";
}
const char *cudaGetErrorString(cudaError_t error) {
    static __thread char text[64];
    snprintf(text, sizeof text, error == cudaErrorMemoryAllocation ? "out of memory" : "phantom error %d", (int)error);
    return text;
}
cudaError_t cudaProfilerStart(void) { return cudaSuccess; }
cudaError_t cudaProfilerStop(void) { return cudaSuccess; }

static int unplayed(void) {
    phantom_unplayed("a function of the driver");
    return cudaErrorNotSupported;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **to, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *status) {
    (void)version, (void)flags;
    *to = phantom_entry(symbol);
    if (*to == NULL) /* looked up in advance, all at once: it fails where it is called */
        *to = (void *)unplayed;
    if (status != NULL)
        *status = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPoint(const char *symbol, void **to, unsigned long long flags,
                                    enum cudaDriverEntryPointQueryResult *status) {
    return cudaGetDriverEntryPointByVersion(symbol, to, 13000, flags, status);
}
