/* The memory of the phantom device, and of the host that is pinned for it. */
#define _GNU_SOURCE
#include "phantom.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE ((size_t)2 << 20)
#define DEVICE_RANGE ((size_t)32 << 40)
#define PINNED_RANGE ((size_t)4 << 40)
#define BACKING ((size_t)64 << 20)
#define MOST 65536

struct piece {
    char *begin;
    size_t bytes;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char *device, *device_top, *pinned, *pinned_top;
static struct piece pieces[MOST]; /* of the device, by address */
static size_t count, used;
static struct piece pins[MOST];
static size_t pin_count;
static int backing = -1;

/* Sources: the tables of the CUDA programming guide, by compute capability; the makers' data sheets. */
static const struct phantom_card cards[] = {
    {"Tesla T4", 7, 5, 75, 40, 1024, 65536, (size_t)4 << 20, (size_t)15 << 30},
    {"NVIDIA A100-SXM4-80GB", 8, 0, 80, 108, 2048, 166912, (size_t)40 << 20, (size_t)80 << 30},
    {"NVIDIA GeForce RTX 4090", 8, 9, 86, 128, 1536, 101376, (size_t)72 << 20, (size_t)24 << 30},
    {"NVIDIA H100 80GB HBM3", 9, 0, 90, 132, 2048, 232448, (size_t)50 << 20, (size_t)80 << 30},
};

size_t phantom_number(const char *variable, size_t otherwise) {
    const char *text = getenv(variable);
    return text != NULL && *text != '\0' ? strtoull(text, NULL, 0) : otherwise;
}

const struct phantom_card *phantom_card(void) {
    static const struct phantom_card *found;
    if (found == NULL) {
        const char *name = getenv("DG_PHANTOM_CARD");
        found = &cards[1];
        for (size_t i = 0; name != NULL && i < sizeof cards / sizeof *cards; i++)
            if (strstr(cards[i].name, name) != NULL)
                found = &cards[i];
    }
    return found;
}

static size_t capacity;

size_t phantom_capacity(void) {
    if (capacity == 0)
        capacity = phantom_number("DG_PHANTOM_BYTES", phantom_card()->memory_bytes);
    return capacity;
}

void phantom_set_capacity(size_t bytes) { capacity = bytes; }

static char *reserved(size_t bytes) {
    void *found = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) {
        perror("phantom: no addresses");
        abort();
    }
    return (char *)(((uintptr_t)found + PAGE - 1) / PAGE * PAGE);
}

static void begin(void) {
    if (device == NULL) {
        device = device_top = reserved(DEVICE_RANGE + PAGE);
        pinned = pinned_top = reserved(PINNED_RANGE + PAGE);
        madvise(device, DEVICE_RANGE, MADV_NOHUGEPAGE);
    }
}

static size_t whole(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

/* Where to put the next piece: above all that were, or at the lowest gap that fits. */
static size_t place(size_t bytes, char **address, int is_reserved) {
    static int is_lowest = -1;
    if (is_lowest < 0) {
        const char *how = getenv("DG_PHANTOM_ADDRESSES");
        is_lowest = how != NULL && strcmp(how, "lowest") == 0;
    }
    if (is_lowest || is_reserved) {
        char *at = device;
        for (size_t i = 0; i < count; i++) {
            if ((size_t)(pieces[i].begin - at) >= bytes) {
                *address = at;
                return i;
            }
            at = pieces[i].begin + pieces[i].bytes;
        }
        *address = at;
        return count;
    }
    *address = device_top;
    return count;
}

static void *range(size_t bytes, int is_reserved) {
    pthread_mutex_lock(&lock);
    begin();
    char *address;
    bytes = whole(bytes, PAGE);
    size_t i = place(bytes, &address, is_reserved);
    if (count == MOST || address + bytes > device + DEVICE_RANGE) {
        fprintf(stderr, "phantom: no addresses left\n");
        abort();
    }
    if (address + bytes > device_top)
        device_top = address + bytes;
    memmove(&pieces[i + 1], &pieces[i], (count - i) * sizeof *pieces);
    pieces[i] = (struct piece){address, bytes};
    count++;
    pthread_mutex_unlock(&lock);
    return address;
}

void *phantom_range(size_t bytes) { return range(bytes, 1); }

int phantom_take(size_t bytes) {
    pthread_mutex_lock(&lock);
    int fits = used + bytes <= phantom_capacity();
    if (fits)
        used += bytes;
    pthread_mutex_unlock(&lock);
    return fits;
}

void phantom_give(size_t bytes) {
    pthread_mutex_lock(&lock);
    used -= bytes;
    pthread_mutex_unlock(&lock);
}

void *phantom_malloc(size_t bytes) {
    bytes = whole(bytes, PAGE);
    return phantom_take(bytes) ? range(bytes, 0) : NULL;
}

/* The piece that an address lies in, or the count of pieces. */
static size_t find(const char *address) {
    size_t low = 0, high = count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (pieces[middle].begin + pieces[middle].bytes <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low < count && pieces[low].begin <= address ? low : count;
}

/* Return the bytes of a piece that is no more, 0 where there was none. */
size_t phantom_unrange(void *address) {
    pthread_mutex_lock(&lock);
    size_t i = find(address), bytes = 0;
    if (i < count && pieces[i].begin == address) {
        bytes = pieces[i].bytes;
        madvise(address, bytes, MADV_DONTNEED);
        memmove(&pieces[i], &pieces[i + 1], (--count - i) * sizeof *pieces);
    }
    pthread_mutex_unlock(&lock);
    return bytes;
}

int phantom_free(void *address) {
    size_t bytes = phantom_unrange(address);
    phantom_give(bytes);
    return bytes > 0;
}

int phantom_is_device(const void *address, void **base, size_t *bytes) {
    const char *at = address;
    if (device == NULL || at < device || at >= device + DEVICE_RANGE)
        return 0;
    pthread_mutex_lock(&lock);
    size_t i = find(at);
    if (i < count) {
        if (base != NULL)
            *base = pieces[i].begin;
        if (bytes != NULL)
            *bytes = pieces[i].bytes;
    }
    pthread_mutex_unlock(&lock);
    return i < count;
}

size_t phantom_free_bytes(void) { return phantom_capacity() > used ? phantom_capacity() - used : 0; }

void *phantom_pinned(size_t bytes) {
    pthread_mutex_lock(&lock);
    begin();
    char *found = pinned_top;
    size_t real = whole(bytes, 4096);
    pinned_top += whole(bytes, PAGE);
    if (bytes > (1 << 16)) {
        if (backing < 0) {
            backing = memfd_create("phantom", 0);
            if (backing < 0 || ftruncate(backing, BACKING) != 0)
                abort();
        }
        for (size_t at = 0; at < real; at += BACKING) {
            size_t here = real - at < BACKING ? real - at : BACKING;
            if (mmap(found + at, here, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, backing, 0) == MAP_FAILED) {
                perror("phantom: no pinned memory");
                abort();
            }
        }
    }
    if (pin_count < MOST)
        pins[pin_count++] = (struct piece){found, real};
    pthread_mutex_unlock(&lock);
    return found;
}

int phantom_unpin(void *address) {
    pthread_mutex_lock(&lock);
    int is_one = 0;
    for (size_t i = 0; i < pin_count; i++)
        if (pins[i].begin == address) {
            mmap(address, pins[i].bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
            pins[i] = pins[--pin_count];
            is_one = 1;
            break;
        }
    pthread_mutex_unlock(&lock);
    return is_one;
}

int phantom_is_pinned(const void *address) {
    const char *at = address;
    return pinned != NULL && at >= pinned && at < pinned_top;
}

static int is_small(size_t bytes) {
    static size_t most;
    if (most == 0)
        most = phantom_number("DG_PHANTOM_COPIED_BYTES", 1 << 16);
    return bytes <= most;
}

/* What a host that reads the device's memory is told, in the order of reading: nothing was computed there. */

struct answer {
    size_t bytes;
    void *value; /* NULL: whatever lies there */
    struct answer *next;
};
static struct answer *first_answer, *last_answer;
static size_t misses;

void phantom_answer(const void *value, size_t bytes) {
    struct answer *it = malloc(sizeof *it);
    *it = (struct answer){bytes, NULL, NULL};
    if (value != NULL) {
        it->value = malloc(bytes + 1);
        memcpy(it->value, value, bytes);
    }
    if (first_answer == NULL)
        first_answer = it;
    else
        last_answer->next = it;
    last_answer = it;
}

size_t phantom_answers(void) {
    size_t left = 0;
    for (struct answer *it = first_answer; it != NULL; it = it->next)
        left++;
    return left;
}

size_t phantom_misses(void) { return misses; }

static int is_muted;

void phantom_mute(int muted) { is_muted = muted; }

static int is_answered(void *to, size_t bytes) {
    struct answer *it = first_answer;
    if (is_muted)
        return 0;
    if (it == NULL || it->bytes != bytes) {
        misses++;
        return 0;
    }
    int is_known = it->value != NULL;
    if (is_known)
        memcpy(to, it->value, bytes);
    first_answer = it->next;
    free(it->value);
    free(it);
    return is_known;
}

void phantom_copy(void *to, const void *from, size_t bytes) {
    if (phantom_is_device(from, NULL, NULL) && !phantom_is_device(to, NULL, NULL) && is_answered(to, bytes))
        return;
    if (bytes > 0 && is_small(bytes) && to != NULL && from != NULL)
        memmove(to, from, bytes);
}

void phantom_set(void *to, int value, size_t bytes) {
    if (bytes > 0 && is_small(bytes) && to != NULL)
        memset(to, value, bytes);
}

void phantom_unplayed(const char *function) {
    static int is_told = -1;
    if (is_told < 0)
        is_told = getenv("DG_PHANTOM_QUIET") == NULL;
    if (is_told)
        fprintf(stderr, "phantom: %s is not played\n", function);
}

void *phantom_entry(const char *function) {
    static void *self;
    if (self == NULL) {
        Dl_info here;
        if (dladdr((void *)phantom_entry, &here) != 0)
            self = dlopen(here.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    }
    return self == NULL ? NULL : dlsym(self, function);
}
