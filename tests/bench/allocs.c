/* allocs.c - counts the calls of malloc and its relatives in a process.
 *
 * SPDX-License-Identifier: MIT
 *
 *   ALLOCS=FILE LD_PRELOAD=allocs.so PROGRAM
 *
 * FILE then holds two numbers of 8 bytes in host order, always up to date:
 * allocations (growing with realloc is one) and frees.  free(NULL) is none.
 * Whoever wants to know what some work cost reads FILE before and after it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

struct counters {
    _Atomic uint64_t allocs, frees;
};

static struct counters nowhere, *counters = &nowhere;

static void *(*real_malloc)(size_t);
static void *(*real_calloc)(size_t, size_t);
static void *(*real_realloc)(void *, size_t);
static int (*real_posix_memalign)(void **, size_t, size_t);
static void *(*real_aligned_alloc)(size_t, size_t);
static void (*real_free)(void *);

/* What dlsym itself allocates while it looks for malloc; never given back. */
static _Alignas(max_align_t) unsigned char nursery[4096];
static size_t nursery_used;

static void *
nursery_take(size_t size)
{
    size_t at = nursery_used, step = _Alignof(max_align_t);

    if (size > sizeof nursery - at)
        abort();
    nursery_used += (size + step - 1) / step * step;
    return nursery + at;
}

static int
nursery_has(const void *memory)
{
    uintptr_t at = (uintptr_t)memory, from = (uintptr_t)nursery;

    return at >= from && at < from + sizeof nursery;
}

/* ISO C knows no way from dlsym's object pointer to a function pointer. */
static void
find(const char *name, void *function)
{
    void *symbol = dlsym(RTLD_NEXT, name);

    if (!symbol)
        abort();
    memcpy(function, &symbol, sizeof symbol);
}

__attribute__((constructor)) static void
start(void)
{
    const char *path = getenv("ALLOCS");
    void *map;
    int fd;

    find("malloc", &real_malloc);
    find("calloc", &real_calloc);
    find("realloc", &real_realloc);
    find("posix_memalign", &real_posix_memalign);
    find("aligned_alloc", &real_aligned_alloc);
    find("free", &real_free);
    if (!path)
        return;
    fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0 || ftruncate(fd, sizeof nowhere) < 0)
        abort();
    map = mmap(NULL, sizeof nowhere, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED)
        abort();
    close(fd);
    counters = map;
}

void *
malloc(size_t size)
{
    if (!real_malloc)
        return nursery_take(size);
    counters->allocs++;
    return real_malloc(size);
}

void *
calloc(size_t count, size_t size)
{
    if (!real_calloc) /* the nursery is zeroed and used once */
        return nursery_take(count * size);
    counters->allocs++;
    return real_calloc(count, size);
}

void *
realloc(void *memory, size_t size)
{
    if (!real_realloc || nursery_has(memory))
        abort();
    counters->allocs++;
    return real_realloc(memory, size);
}

int
posix_memalign(void **memory, size_t alignment, size_t size)
{
    if (!real_posix_memalign)
        return ENOMEM;
    counters->allocs++;
    return real_posix_memalign(memory, alignment, size);
}

void *
aligned_alloc(size_t alignment, size_t size)
{
    if (!real_aligned_alloc)
        return NULL;
    counters->allocs++;
    return real_aligned_alloc(alignment, size);
}

void
free(void *memory)
{
    if (!memory || nursery_has(memory) || !real_free)
        return;
    counters->frees++;
    real_free(memory);
}
