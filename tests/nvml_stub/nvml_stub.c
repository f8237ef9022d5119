/* A stand-in for libnvidia-ml.so.1: answers come from the text file that NVML_STUB_FILE names.
 *
 * A line is `SCOPE.FUNCTION=VALUE`. The scope is `sys`, `d0` (a card) or `d0.m1` (its MIG instance 1). VALUE is what the
 * function answers, fields separated by spaces; `!15` makes it return error 15. Several values separated by `|` are given
 * one a call, the last one for ever. A function without a line answers NVML_ERROR_NOT_SUPPORTED. Compiled with
 * -DOLD_DRIVER the library lacks what drivers before 510 lack.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };
enum { MAX_LINES = 4096, MAX_DEVICES = 64, MAX_MIG = 8 };

typedef struct { char scope[16]; } device;
static struct { char *key; char *value; int calls; } lines[MAX_LINES];
static int line_count, is_loaded;
static device devices[MAX_DEVICES], instances[MAX_DEVICES][MAX_MIG];

static int load(void) {
    if (is_loaded) return OK;
    const char *path = getenv("NVML_STUB_FILE");
    FILE *file = path ? fopen(path, "r") : NULL;
    if (!file) return 9; /* NVML_ERROR_DRIVER_NOT_LOADED */
    char text[4096];
    while (line_count < MAX_LINES && fgets(text, sizeof text, file)) {
        text[strcspn(text, "\n")] = 0;
        char *equals = strchr(text, '=');
        if (!equals) continue;
        *equals = 0;
        lines[line_count].key = strdup(text);
        lines[line_count++].value = strdup(equals + 1);
    }
    fclose(file);
    is_loaded = 1;
    return OK;
}

/* Forget everything, so that one process can be shown one topology after another. */
void stub_reset(void) {
    for (int i = 0; i < line_count; i++) { free(lines[i].key); free(lines[i].value); lines[i].calls = 0; }
    line_count = is_loaded = 0;
}

/* Copy the next answer for scope.function to `out`; return the code to answer with. */
static int answer(const char *scope, const char *function, char *out, size_t size) {
    char key[256];
    snprintf(key, sizeof key, "%s.%s", scope, function);
    for (int i = 0; i < line_count; i++) {
        if (strcmp(lines[i].key, key)) continue;
        const char *value = lines[i].value;
        for (int skip = lines[i].calls; skip > 0; skip--) {
            const char *next = strchr(value, '|');
            if (!next) break;
            value = next + 1;
        }
        lines[i].calls++;
        size_t length = strcspn(value, "|");
        if (length >= size) length = size - 1;
        memcpy(out, value, length);
        out[length] = 0;
        return out[0] == '!' ? atoi(out + 1) : OK;
    }
    return NOT_SUPPORTED;
}

static int text(const char *scope, const char *function, char *out, unsigned size) {
    char value[1024];
    int code = answer(scope, function, value, sizeof value);
    if (code == OK) snprintf(out, size, "%s", value);
    return code;
}

static int number(const char *scope, const char *function, unsigned *out) {
    char value[64];
    int code = answer(scope, function, value, sizeof value);
    if (code == OK) *out = (unsigned)strtoul(value, NULL, 0);
    return code;
}

static int pair(const char *scope, const char *function, unsigned *first, unsigned *second) {
    char value[64];
    int code = answer(scope, function, value, sizeof value);
    if (code == OK) sscanf(value, "%u %u", first, second);
    return code;
}

#define SCOPE(handle) (((device *)(handle))->scope)
#define TEXT(name) int name(void *d, char *out, unsigned size) { return text(SCOPE(d), #name, out, size); }
#define NUMBER(name) int name(void *d, unsigned *out) { return number(SCOPE(d), #name, out); }
#define PAIR(name) int name(void *d, unsigned *a, unsigned *b) { return pair(SCOPE(d), #name, a, b); }

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    char value[64];
    int code = load();
    if (code != OK) return code;
    code = answer("sys", "nvmlInit", value, sizeof value);
    return code == NOT_SUPPORTED ? OK : code;
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int code) { return code == 15 ? "GPU is lost" : "stub error"; }

int nvmlSystemGetDriverVersion(char *out, unsigned size) { return text("sys", "nvmlSystemGetDriverVersion", out, size); }
int nvmlSystemGetNVMLVersion(char *out, unsigned size) { return text("sys", "nvmlSystemGetNVMLVersion", out, size); }
int nvmlSystemGetCudaDriverVersion_v2(int *out) { return number("sys", "nvmlSystemGetCudaDriverVersion", (unsigned *)out); }
int nvmlSystemGetProcessName(unsigned pid, char *out, unsigned size) {
    char function[64];
    snprintf(function, sizeof function, "nvmlSystemGetProcessName.%u", pid);
    int code = text("sys", function, out, size);
    return code == NOT_SUPPORTED ? NOT_FOUND : code;
}

int nvmlDeviceGetCount_v2(unsigned *out) { return number("sys", "nvmlDeviceGetCount", out); }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **out) {
    if (index >= MAX_DEVICES) return INVALID_ARGUMENT;
    snprintf(devices[index].scope, sizeof devices[index].scope, "d%u", index);
    *out = &devices[index];
    char value[64];
    int code = answer(devices[index].scope, "nvmlDeviceGetHandleByIndex", value, sizeof value);
    return code == NOT_SUPPORTED ? OK : code;
}
int nvmlDeviceGetMigDeviceHandleByIndex(void *parent, unsigned index, void **out) {
    unsigned count = 0, card = (unsigned)atoi(SCOPE(parent) + 1);
    number(SCOPE(parent), "migDevices", &count);
    if (index >= MAX_MIG) return INVALID_ARGUMENT;
    if (index >= count) return NOT_FOUND;
    snprintf(instances[card][index].scope, sizeof instances[card][index].scope, "d%u.m%u", card, index);
    *out = &instances[card][index];
    return OK;
}

TEXT(nvmlDeviceGetName)
TEXT(nvmlDeviceGetUUID)
PAIR(nvmlDeviceGetCudaComputeCapability)
PAIR(nvmlDeviceGetDriverModel_v2)
NUMBER(nvmlDeviceGetCurrPcieLinkWidth)
NUMBER(nvmlDeviceGetMaxPcieLinkGeneration)
NUMBER(nvmlDeviceGetDisplayActive)
NUMBER(nvmlDeviceGetNumGpuCores)
NUMBER(nvmlDeviceGetMemoryBusWidth)

typedef struct { unsigned gpu, memory; } utilization;
int nvmlDeviceGetUtilizationRates(void *d, utilization *out) {
    return pair(SCOPE(d), "nvmlDeviceGetUtilizationRates", &out->gpu, &out->memory);
}
int nvmlDeviceGetMaxClockInfo(void *d, unsigned type, unsigned *out) {
    return number(SCOPE(d), type == 2 ? "nvmlDeviceGetMaxClockInfo.mem" : "nvmlDeviceGetMaxClockInfo.sm", out);
}
int nvmlDeviceGetNvLinkState(void *d, unsigned link, unsigned *out) {
    char function[64];
    snprintf(function, sizeof function, "nvmlDeviceGetNvLinkState.%u", link);
    int code = number(SCOPE(d), function, out);
    return code == NOT_SUPPORTED && link > 0 ? INVALID_ARGUMENT : code;
}

typedef struct { unsigned long long total, free, used; } memory_v1;
int nvmlDeviceGetMemoryInfo(void *d, memory_v1 *out) {
    char value[128];
    unsigned long long reserved;
    int code = answer(SCOPE(d), "memory", value, sizeof value);
    if (code == OK) sscanf(value, "%llu %llu %llu %llu", &out->total, &reserved, &out->used, &out->free);
    /* The first call counts what the driver keeps for itself as used. */
    if (code == OK) out->used += reserved;
    return code;
}

#ifndef OLD_DRIVER
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_v2;
int nvmlDeviceGetMemoryInfo_v2(void *d, memory_v2 *out) {
    char value[128];
    int code = answer(SCOPE(d), "memory", value, sizeof value);
    if (code == OK) sscanf(value, "%llu %llu %llu %llu", &out->total, &out->reserved, &out->used, &out->free);
    return code;
}
PAIR(nvmlDeviceGetMigMode)
NUMBER(nvmlDeviceGetMaxMigDeviceCount)

typedef struct { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; } process;
/* `processes` is "pid bytes pid bytes …". */
static int processes(void *d, const char *function, unsigned *count, process *out) {
    char value[1024], *rest = value;
    int code = answer(SCOPE(d), function, value, sizeof value);
    if (code == NOT_SUPPORTED) { *count = 0; return OK; }
    if (code != OK) return code;
    unsigned found = 0;
    for (;;) {
        char *end;
        unsigned pid = (unsigned)strtoul(rest, &end, 10);
        if (end == rest) break;
        unsigned long long used = strtoull(end, &rest, 10);
        if (out && found < *count) out[found] = (process){pid, used, ~0u, ~0u};
        found++;
    }
    code = found > (out ? *count : 0) ? INSUFFICIENT_SIZE : OK;
    *count = found;
    return code;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void *d, unsigned *count, process *out) {
    return processes(d, "computeProcesses", count, out);
}
int nvmlDeviceGetGraphicsRunningProcesses_v3(void *d, unsigned *count, process *out) {
    return processes(d, "graphicsProcesses", count, out);
}
#endif
