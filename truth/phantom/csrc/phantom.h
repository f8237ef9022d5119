/* What the parts of the phantom device share: its card, its memory, and what it remembers of both. */
#ifndef PHANTOM_H
#define PHANTOM_H

#include <stddef.h>

struct phantom_card {
    const char *name;
    int major, minor;
    int built_for;         /* the newest architecture of torch's wheels that runs on it, as major * 10 + minor */
    int processors;        /* streaming multiprocessors */
    int threads;           /* resident threads a multiprocessor */
    size_t shared_bytes;   /* shared memory a block, at most, when asked for */
    size_t cache_bytes;    /* L2 */
    size_t memory_bytes;
};

const struct phantom_card *phantom_card(void);

/* Memory of the device: addresses that nobody need ever touch, in pages of 2 MiB. NULL when the capacity is used up. */
void *phantom_malloc(size_t bytes);
/* 0 when the address is not one that phantom_malloc gave. */
int phantom_free(void *address);
int phantom_is_device(const void *address, void **base, size_t *bytes);
size_t phantom_free_bytes(void);
size_t phantom_capacity(void);
void phantom_set_capacity(size_t bytes); /* for who loads the library: a process can have many cards, one after another */
/* Physical memory without an address, for memory that is mapped later. */
int phantom_take(size_t bytes);
void phantom_give(size_t bytes);
void *phantom_range(size_t bytes);
size_t phantom_unrange(void *address);

/* Pinned memory of the host. What is large has one small piece of memory behind all of it. */
void *phantom_pinned(size_t bytes);
int phantom_unpin(void *address);
int phantom_is_pinned(const void *address);

/* Small copies are real: what the host reads is what it wrote. Large ones touch nothing. */
void phantom_copy(void *to, const void *from, size_t bytes);
/* What the next reads of the device by the host give: read in the order given, each of as many bytes. */
void phantom_answer(const void *value, size_t bytes);
size_t phantom_answers(void); /* how many are left */
void phantom_mute(int muted); /* while weights move: what lies there is what they are */
size_t phantom_misses(void);  /* how many reads found none, or one of another size */
void phantom_set(void *to, int value, size_t bytes);

void phantom_unplayed(const char *function);
void *phantom_entry(const char *function);
size_t phantom_number(const char *variable, size_t otherwise);

#endif
