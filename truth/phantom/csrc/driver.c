/* CUDA's driver, as far as torch asks it itself: contexts, and memory that is mapped page by page. */
#include "phantom.h"

#include <cuda.h>
#include <stdint.h>
#include <stdlib.h>

#undef cuDevicePrimaryCtxRelease
#undef cuMemGetAddressRange
#undef cuCtxPushCurrent
#undef cuCtxPopCurrent

static int context;
#define CONTEXT ((CUcontext)(void *)&context)

CUresult cuInit(unsigned flags) { return (void)flags, CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *to, int ordinal) { return *to = ordinal, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *to) { return *to = 1, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *to) { return *to = CONTEXT, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext it) { return (void)it, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *to, CUdevice device) { return (void)device, *to = CONTEXT, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    (void)device;
    *flags = 0;
    *active = 1;
    return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char **to) {
    return *to = error == CUDA_ERROR_OUT_OF_MEMORY ? "out of memory" : "phantom error", CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *to, CUdevice_attribute which, CUdevice device) {
    extern int cudaDeviceGetAttribute(int *, int, int);
    if (which == CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED)
        return *to = 1, CUDA_SUCCESS;
    return (CUresult)cudaDeviceGetAttribute(to, (int)which, device);
}
CUresult cuPointerGetAttribute(void *to, CUpointer_attribute which, CUdeviceptr address) {
    switch (which) {
    case CU_POINTER_ATTRIBUTE_CONTEXT:
        *(CUcontext *)to = CONTEXT;
        return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
        *(int *)to = 0;
        return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
        *(CUdeviceptr *)to = address;
        return CUDA_SUCCESS;
    default:
        return CUDA_ERROR_NOT_SUPPORTED;
    }
}
CUresult cuMemGetAddressRange(CUdeviceptr *base, size_t *bytes, CUdeviceptr address) {
    void *begin;
    if (!phantom_is_device((void *)(uintptr_t)address, &begin, bytes))
        return CUDA_ERROR_NOT_FOUND;
    *base = (CUdeviceptr)(uintptr_t)begin;
    return CUDA_SUCCESS;
}

CUresult cuMemAddressReserve(CUdeviceptr *to, size_t bytes, size_t aligned, CUdeviceptr at, unsigned long long flags) {
    (void)aligned, (void)at, (void)flags;
    *to = (CUdeviceptr)(uintptr_t)phantom_range(bytes);
    return CUDA_SUCCESS;
}
CUresult cuMemAddressFree(CUdeviceptr address, size_t bytes) {
    (void)bytes;
    return phantom_unrange((void *)(uintptr_t)address) > 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuMemGetAllocationGranularity(size_t *to, const CUmemAllocationProp *of,
                                       CUmemAllocationGranularity_flags which) {
    (void)of, (void)which;
    return *to = (size_t)2 << 20, CUDA_SUCCESS;
}
CUresult cuMemCreate(CUmemGenericAllocationHandle *to, size_t bytes, const CUmemAllocationProp *of,
                     unsigned long long flags) {
    (void)of, (void)flags;
    if (!phantom_take(bytes))
        return CUDA_ERROR_OUT_OF_MEMORY;
    size_t *it = malloc(sizeof *it);
    *it = bytes;
    *to = (CUmemGenericAllocationHandle)(uintptr_t)it;
    return CUDA_SUCCESS;
}
CUresult cuMemRelease(CUmemGenericAllocationHandle it) {
    size_t *bytes = (size_t *)(uintptr_t)it;
    phantom_give(*bytes);
    free(bytes);
    return CUDA_SUCCESS;
}
CUresult cuMemMap(CUdeviceptr at, size_t bytes, size_t offset, CUmemGenericAllocationHandle it,
                  unsigned long long flags) {
    (void)at, (void)bytes, (void)offset, (void)it, (void)flags;
    return CUDA_SUCCESS;
}
CUresult cuMemSetAccess(CUdeviceptr at, size_t bytes, const CUmemAccessDesc *to, size_t count) {
    (void)at, (void)bytes, (void)to, (void)count;
    return CUDA_SUCCESS;
}
CUresult cuMemUnmap(CUdeviceptr at, size_t bytes) { return (void)at, (void)bytes, CUDA_SUCCESS; }

CUresult cuLogsRegisterCallback(CUlogsCallback call, void *with, CUlogsCallbackHandle *to) {
    (void)call, (void)with;
    if (to != NULL)
        *to = NULL;
    return CUDA_SUCCESS;
}
CUresult cuLogsUnregisterCallback(CUlogsCallbackHandle it) { return (void)it, CUDA_SUCCESS; }

/* Kernels that are compiled while running: they do nothing either. */
CUresult cuModuleLoadData(CUmodule *to, const void *image) { return (void)image, *to = malloc(8), CUDA_SUCCESS; }
CUresult cuModuleLoadDataEx(CUmodule *to, const void *image, unsigned n, CUjit_option *options, void **values) {
    (void)n, (void)options, (void)values;
    return cuModuleLoadData(to, image);
}
CUresult cuModuleGetFunction(CUfunction *to, CUmodule of, const char *name) {
    return (void)name, *to = (CUfunction)of, CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction it, unsigned a, unsigned b, unsigned c, unsigned d, unsigned e, unsigned f,
                        unsigned shared, CUstream on, void **args, void **extra) {
    (void)it, (void)a, (void)b, (void)c, (void)d, (void)e, (void)f, (void)shared, (void)on, (void)args, (void)extra;
    return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction it, CUfunc_cache how) { return (void)it, (void)how, CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction it, CUfunction_attribute which, int to) {
    return (void)it, (void)which, (void)to, CUDA_SUCCESS;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap *to, CUtensorMapDataType type, cuuint32_t rank, void *at,
                                const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave a, CUtensorMapSwizzle b,
                                CUtensorMapL2promotion c, CUtensorMapFloatOOBfill d) {
    (void)to, (void)type, (void)rank, (void)at, (void)dims, (void)strides, (void)box, (void)steps, (void)a, (void)b;
    (void)c, (void)d;
    return CUDA_SUCCESS;
}

/* NVML, as far as torch asks it for the fabric between cards, which there is none of. */
int nvmlInit_v2(void) { return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *to) { return *to = 13000, 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char *of, void **to) { return (void)of, *to = &context, 0; }
int nvmlDeviceGetGpuFabricInfoV(void *of, void *to) { return (void)of, (void)to, 3; }
int nvmlDeviceGetComputeRunningProcesses(void *of, unsigned *count, void *to) {
    return (void)of, (void)to, *count = 0, 0;
}
int nvmlDeviceGetNvLinkRemoteDeviceType(void *of, unsigned link, void *to) { return (void)of, (void)link, (void)to, 3; }
int nvmlDeviceGetNvLinkRemotePciInfo_v2(void *of, unsigned link, void *to) { return (void)of, (void)link, (void)to, 3; }

/* The compiler that kernels are made with while running. */
int nvrtcVersion(int *major, int *minor) { return *major = 13, *minor = 0, 0; }
int nvrtcCreateProgram(void **to, const char *source, const char *name, int n, const char *const *headers,
                       const char *const *names) {
    (void)source, (void)name, (void)n, (void)headers, (void)names;
    return *to = &context, 0;
}
int nvrtcAddNameExpression(void *of, const char *name) { return (void)of, (void)name, 0; }
int nvrtcCompileProgram(void *it, int n, const char *const *options) { return (void)it, (void)n, (void)options, 0; }
int nvrtcGetLoweredName(void *of, const char *name, const char **to) { return (void)of, *to = name, 0; }
static int nothing(void *of, size_t *bytes) { return (void)of, *bytes = 16, 0; }
static int nothing_at(void *of, char *to) {
    (void)of;
    for (int i = 0; i < 16; i++)
        to[i] = 0;
    return 0;
}
int nvrtcGetCUBINSize(void *of, size_t *bytes) { return nothing(of, bytes); }
int nvrtcGetCUBIN(void *of, char *to) { return nothing_at(of, to); }
int nvrtcGetPTXSize(void *of, size_t *bytes) { return nothing(of, bytes); }
int nvrtcGetPTX(void *of, char *to) { return nothing_at(of, to); }
int nvrtcGetProgramLogSize(void *of, size_t *bytes) { return nothing(of, bytes); }
int nvrtcGetProgramLog(void *of, char *to) { return nothing_at(of, to); }
const char *nvrtcGetErrorString(int error) { return error == 0 ? "success" : "phantom error"; }
int nvrtcDestroyProgram(void **it) { return *it = NULL, 0; }
