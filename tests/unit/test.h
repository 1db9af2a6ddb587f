/* test.h - what every unit test begins with: the server itself, whose statics
 * are what is tested, then cmocka, then a few helpers.
 *
 * It must be included first: system headers ahead of it would fix the feature
 * macros.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef TEST_H
#define TEST_H

#define COLLABD_NO_MAIN
#include "../../collabd.c"

#include <setjmp.h>

#include <cmocka.h>

/* ----- numbers that look random and are the same every time ------------- */

static uint64_t test_seed = 1;

static uint64_t
test_random(uint64_t below)
{
    test_seed ^= test_seed << 13;
    test_seed ^= test_seed >> 7;
    test_seed ^= test_seed << 17;
    return below == 0 ? test_seed : test_seed % below;
}

/* ----- what is said to stderr ----------------------------------------------
 * From test_listen_in on, log lines go to a file; test_said asks whether a text
 * was said since the last question, and forgets everything. */

static int test_stderr = -1, test_heard = -1;
#ifdef __GLIBC__
static FILE *test_old_stderr;
#endif

/* Only there with -fsanitize. */
extern void __sanitizer_set_report_fd(void *) __attribute__((weak));

static void
test_report_to(int fd)
{
    if (__sanitizer_set_report_fd != NULL)
        __sanitizer_set_report_fd((void *)(intptr_t)fd);
}

static void
test_listen_in(void)
{
    FILE *f = tmpfile();

    assert_non_null(f);
    test_heard = dup(fileno(f));
    (void)fclose(f);
    (void)fcntl(test_heard, F_SETFL, O_APPEND);
    test_stderr = dup(STDERR_FILENO);
    (void)dup2(test_heard, STDERR_FILENO);
    /* cmocka, assert and sanitizers still speak to whoever runs the tests */
    test_report_to(test_stderr);
#ifdef __GLIBC__
    test_old_stderr = stderr;
    stderr = fdopen(dup(test_stderr), "w");
    (void)setvbuf(stderr, NULL, _IONBF, 0);
#endif
}

static void
test_listen_no_more(void)
{
#ifdef __GLIBC__
    (void)fclose(stderr);
    stderr = test_old_stderr;
#endif
    (void)dup2(test_stderr, STDERR_FILENO);
    test_report_to(STDERR_FILENO);
    (void)close(test_stderr);
    (void)close(test_heard);
    test_stderr = test_heard = -1;
}

static bool
test_said(const char *what)
{
    static char text[65536];
    ssize_t n = pread(test_heard, text, sizeof text - 1, 0);

    text[n < 0 ? 0 : n] = '\0';
    assert_int_equal(ftruncate(test_heard, 0), 0);
    return strstr(text, what) != NULL;
}

static int
test_group_listen_in(void **state)
{
    (void)state;
    test_listen_in();
    return 0;
}

static int
test_group_listen_no_more(void **state)
{
    (void)state;
    test_listen_no_more();
    return 0;
}

/* ----- the end of the world ------------------------------------------------
 * Bytes that end exactly where an unreadable page begins: one step too far is a
 * crash. */

static uint8_t *test_edge; /* the first byte that must not be touched */

#define TEST_EDGE_MAX 65536

static const uint8_t *
test_at_edge(const void *from, size_t len)
{
    if (test_edge == NULL) {
        size_t page = (size_t)sysconf(_SC_PAGESIZE);
        uint8_t *map = mmap(NULL, TEST_EDGE_MAX + page, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        assert_ptr_not_equal(map, MAP_FAILED);
        assert_int_equal(mprotect(map + TEST_EDGE_MAX, page, PROT_NONE), 0);
        test_edge = map + TEST_EDGE_MAX;
    }
    assert_true(len <= TEST_EDGE_MAX);
    if (len > 0)
        memcpy(test_edge - len, from, len);
    return test_edge - len;
}

/* A span over such bytes. */
static struct span
test_span_at_edge(const void *from, size_t len)
{
    return span_of(test_at_edge(from, len), len);
}

#define assert_span_is(s, text)                                              \
    do {                                                                     \
        struct span span_is_ = (s);                                          \
        assert_int_equal(span_len(span_is_), strlen(text));                  \
        assert_memory_equal(span_is_.at, (text), strlen(text));              \
    } while (0)

#endif
