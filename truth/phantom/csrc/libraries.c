/* cuBLAS, cuBLASLt and cuDNN, played: everything succeeds, nothing is computed, and no workspace is wanted.

   What torch itself allocates for them (workspaces of its own choice, copies of what is not laid out as wanted) is
   torch's code, and real. What cuDNN would ask for is not known here, and taken to be nothing. */
#include "phantom.h"

#include <cublasLt.h>
#include <cublas_v2.h>
#include <cudnn.h>
#include <stdlib.h>
#include <string.h>

/* cuBLAS. Its computing functions are among the rest: they return 0, which is success. */

cublasStatus_t cublasCreate_v2(cublasHandle_t *to) { return *to = calloc(1, 64), CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasDestroy_v2(cublasHandle_t it) { return free(it), CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasGetMathMode(cublasHandle_t it, cublasMath_t *to) {
    return (void)it, *to = CUBLAS_DEFAULT_MATH, CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t it, cublasPointerMode_t *to) {
    return (void)it, *to = CUBLAS_POINTER_MODE_HOST, CUBLAS_STATUS_SUCCESS;
}
size_t cublasLtGetVersion(void) { return CUBLAS_VERSION; }

#define MAKER(name, type)                                                                                              \
    cublasStatus_t name##Create(type *to) { return *to = calloc(1, 1024), CUBLAS_STATUS_SUCCESS; }                     \
    cublasStatus_t name##Destroy(type it) { return free(it), CUBLAS_STATUS_SUCCESS; }
MAKER(cublasLtMatmulPreference, cublasLtMatmulPreference_t)
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *to, cublasComputeType_t compute, cudaDataType_t scale) {
    (void)compute, (void)scale;
    return *to = calloc(1, 1024), CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t it) { return free(it), CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *to, cudaDataType type, uint64_t rows, uint64_t cols,
                                          int64_t ld) {
    (void)type, (void)rows, (void)cols, (void)ld;
    return *to = calloc(1, 1024), CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t it) { return free(it), CUBLAS_STATUS_SUCCESS; }

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t it, cublasLtMatmulDesc_t of, cublasLtMatrixLayout_t a,
                                              cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
                                              cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t as, int most,
                                              cublasLtMatmulHeuristicResult_t to[], int *count) {
    (void)it, (void)of, (void)a, (void)b, (void)c, (void)d, (void)as;
    *count = most > 0;
    if (most > 0) {
        memset(to, 0, sizeof *to);
        to->state = CUBLAS_STATUS_SUCCESS;
        to->wavesCount = 1;
    }
    return CUBLAS_STATUS_SUCCESS;
}

/* cuDNN. */

size_t cudnnGetVersion(void) { return phantom_number("DG_PHANTOM_CUDNN", CUDNN_VERSION); }
size_t cudnnGetCudartVersion(void) { return 13000; }
cudnnStatus_t cudnnGetProperty(libraryPropertyType which, int *to) {
    size_t version = cudnnGetVersion();
    *to = which == MAJOR_VERSION   ? (int)(version / 10000)
          : which == MINOR_VERSION ? (int)(version / 100 % 100)
                                   : (int)(version % 100);
    return CUDNN_STATUS_SUCCESS;
}
const char *cudnnGetErrorString(cudnnStatus_t status) { return status == 0 ? "success" : "phantom error"; }
void cudnnGetLastErrorString(char *to, size_t bytes) {
    if (bytes > 0)
        *to = '\0';
}
cudnnStatus_t cudnnCreate(cudnnHandle_t *to) { return *to = calloc(1, 64), CUDNN_STATUS_SUCCESS; }
cudnnStatus_t cudnnDestroy(cudnnHandle_t it) { return free(it), CUDNN_STATUS_SUCCESS; }
cudnnStatus_t cudnnSetStream(cudnnHandle_t it, cudaStream_t on) { return (void)it, (void)on, CUDNN_STATUS_SUCCESS; }
cudnnStatus_t cudnnGetStream(cudnnHandle_t it, cudaStream_t *to) { return (void)it, *to = 0, CUDNN_STATUS_SUCCESS; }

/* The graph API: descriptors that remember what they were told, and tell it when asked. */

#define ATTRIBUTES 48
struct descriptor {
    cudnnBackendDescriptorType_t type;
    size_t count;
    struct {
        cudnnBackendAttributeName_t name;
        cudnnBackendAttributeType_t type;
        int64_t count;
        void *values;
    } told[ATTRIBUTES];
};

static size_t width(cudnnBackendAttributeType_t type) {
    switch (type) {
    case CUDNN_TYPE_BOOLEAN:
    case CUDNN_TYPE_CHAR:
        return 1;
    case CUDNN_TYPE_INT64:
    case CUDNN_TYPE_DOUBLE:
    case CUDNN_TYPE_HANDLE:
    case CUDNN_TYPE_VOID_PTR:
    case CUDNN_TYPE_BACKEND_DESCRIPTOR:
        return 8;
    case CUDNN_TYPE_FRACTION:
        return 16;
    default:
        return 4;
    }
}

cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t type, cudnnBackendDescriptor_t *to) {
    struct descriptor *it = calloc(1, sizeof *it);
    it->type = type;
    *to = it;
    return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnBackendDestroyDescriptor(cudnnBackendDescriptor_t given) {
    struct descriptor *it = given;
    for (size_t i = 0; it != NULL && i < it->count; i++)
        free(it->told[i].values);
    free(it);
    return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnBackendFinalize(cudnnBackendDescriptor_t it) { return (void)it, CUDNN_STATUS_SUCCESS; }
cudnnStatus_t cudnnBackendExecute(cudnnHandle_t handle, cudnnBackendDescriptor_t plan, cudnnBackendDescriptor_t with) {
    (void)handle, (void)plan, (void)with;
    return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnBackendSetAttribute(cudnnBackendDescriptor_t given, cudnnBackendAttributeName_t name,
                                       cudnnBackendAttributeType_t type, int64_t count, const void *values) {
    struct descriptor *it = given;
    size_t i = 0;
    while (i < it->count && it->told[i].name != name)
        i++;
    if (i == ATTRIBUTES)
        return CUDNN_STATUS_NOT_SUPPORTED;
    if (i == it->count)
        it->count++;
    else
        free(it->told[i].values);
    size_t bytes = width(type) * (size_t)count;
    it->told[i].name = name;
    it->told[i].type = type;
    it->told[i].count = count;
    it->told[i].values = malloc(bytes + 1);
    memcpy(it->told[i].values, values, bytes);
    return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnBackendGetAttribute(cudnnBackendDescriptor_t given, cudnnBackendAttributeName_t name,
                                       cudnnBackendAttributeType_t type, int64_t most, int64_t *count, void *values) {
    struct descriptor *it = given;
    int64_t have = 0;
    switch (name) {
    case CUDNN_ATTR_ENGINEHEUR_RESULTS: /* one configuration of an engine; the caller has made its descriptor */
    case CUDNN_ATTR_OPERATIONGRAPH_ENGINE_GLOBAL_COUNT:
    case CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE:
    case CUDNN_ATTR_ENGINE_GLOBAL_INDEX:
    case CUDNN_ATTR_ENGINECFG_ENGINE:
        if (name == CUDNN_ATTR_OPERATIONGRAPH_ENGINE_GLOBAL_COUNT && values != NULL)
            *(int64_t *)values = 1;
        if (name == CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE && values != NULL)
            *(int64_t *)values = (int64_t)phantom_number("DG_PHANTOM_WORKSPACE", 0);
        if (name == CUDNN_ATTR_ENGINE_GLOBAL_INDEX && values != NULL)
            *(int64_t *)values = 0;
        have = 1;
        break;
    case CUDNN_ATTR_ENGINECFG_SHARED_MEMORY_USED:
        if (values != NULL)
            *(int32_t *)values = 0;
        have = 1;
        break;
    default:
        for (size_t i = 0; i < it->count; i++)
            if (it->told[i].name == name) {
                have = it->told[i].count;
                int64_t n = have < most ? have : most;
                if (values != NULL && n > 0)
                    memcpy(values, it->told[i].values, width(type) * (size_t)n);
            }
    }
    if (count != NULL)
        *count = have;
    return CUDNN_STATUS_SUCCESS;
}
