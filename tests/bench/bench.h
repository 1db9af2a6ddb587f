/* bench.h - what the load generators have in common.
 *
 * SPDX-License-Identifier: MIT
 *
 * Define _GNU_SOURCE before any include.  Whatever goes wrong ends the run
 * with one line on stderr and status 1.
 *
 *    1  Words    errors, the clock, numbers
 *    2  Usage    what /proc says about the server
 *    3  Joining  connect and upgrade
 */
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

/* ===== 1  Words ======================================================== */

_Noreturn static void
die(const char *format, ...)
{
    va_list args;

    fflush(stdout);
    fprintf(stderr, "%s: ", program_invocation_short_name);
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    exit(1);
}

static void *
take(size_t count, size_t size)
{
    void *memory = calloc(count ? count : 1, size);

    if (!memory)
        die("out of memory");
    return memory;
}

static uint64_t
clock_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static int
number(const char *word, const char *value, int least, int greatest)
{
    char *end;
    long n = strtol(value, &end, 10);

    if (end == value || *end || n < least || n > greatest)
        die("%s is not within %d to %d", word, least, greatest);
    return (int)n;
}

/* ===== 2  Usage ======================================================== */

struct use {
    uint64_t at_ns;         /* when */
    uint64_t cpu_ns;        /* on a CPU so far, all threads */
    uint64_t waited_ns;     /* its first thread, ready to run, had no CPU */
    uint64_t sleeps;        /* voluntary context switches, all threads */
    uint64_t rss, rss_anon; /* KiB */
    uint64_t peak;          /* KiB, of rss */
    uint64_t allocs, frees; /* as counted by allocs.so (load.c) */
};

/* What follows `name` in a /proc file of lines `name number`, and the number
 * after that in *second.  The name "" stands for the first line. */
static uint64_t
proc_number(const char *path, const char *name, uint64_t *second)
{
    char line[256], *end = line;
    size_t length = strlen(name);
    uint64_t n = 0;
    FILE *file = fopen(path, "r");

    if (!file)
        die("%s: %s (has the server died?)", path, strerror(errno));
    while (fgets(line, sizeof line, file)) {
        if (strncmp(line, name, length) == 0) {
            n = strtoull(line + length, &end, 10);
            break;
        }
    }
    fclose(file);
    if (second)
        *second = strtoull(end, NULL, 10);
    return n;
}

static void
use_threads(int pid, struct use *use)
{
    char path[512];
    uint64_t waited;
    struct dirent *entry;
    DIR *dir;

    snprintf(path, sizeof path, "/proc/%d/task", pid);
    dir = opendir(path);
    if (!dir)
        die("%s: %s (has the server died?)", path, strerror(errno));
    while ((entry = readdir(dir))) {
        if (entry->d_name[0] == '.')
            continue;
        snprintf(path, sizeof path, "/proc/%d/task/%s/schedstat", pid,
                 entry->d_name);
        use->cpu_ns += proc_number(path, "", &waited);
        if (atoi(entry->d_name) == pid)
            use->waited_ns += waited;
        snprintf(path, sizeof path, "/proc/%d/task/%s/status", pid,
                 entry->d_name);
        use->sleeps += proc_number(path, "voluntary_ctxt_switches:", NULL);
    }
    closedir(dir);
}

static struct use
use_now(int pid)
{
    struct use use = {.at_ns = clock_ns()};
    char path[64];

    if (!pid)
        return use;
    use_threads(pid, &use);
    snprintf(path, sizeof path, "/proc/%d/status", pid);
    use.rss = proc_number(path, "VmRSS:", NULL);
    use.rss_anon = proc_number(path, "RssAnon:", NULL);
    use.peak = proc_number(path, "VmHWM:", NULL);
    return use;
}

/* ===== 3  Joining ====================================================== */

static void
raise_descriptors(int wanted)
{
    struct rlimit limit;

    if (getrlimit(RLIMIT_NOFILE, &limit) < 0)
        die("getrlimit: %s", strerror(errno));
    limit.rlim_cur = limit.rlim_max;
    if (limit.rlim_max < (rlim_t)wanted || setrlimit(RLIMIT_NOFILE, &limit) < 0)
        die("%d descriptors needed, %llu allowed", wanted,
            (unsigned long long)limit.rlim_max);
}

/* Reads exactly one response head: what follows it is frames. */
static void
await_101(int fd)
{
    char head[2048] = "";
    size_t got = 0;

    do {
        ssize_t n = recv(fd, head + got, 1, 0);
        if (n < 0)
            die("no answer to the upgrade: %s", strerror(errno));
        if (n == 0)
            die("the server hung up during the upgrade");
        if (++got == sizeof head)
            die("the answer to the upgrade does not end");
    } while (got < 4 || memcmp(head + got - 4, "\r\n\r\n", 4) != 0);

    if (memcmp(head, "HTTP/1.1 101", 12) != 0)
        die("upgrade refused: %.*s", (int)strcspn(head, "\r"), head);
}

/* A socket that has been answered 101.  receive_buffer 0: the system's. */
static int
join(int port, const char *path, int receive_buffer)
{
    char request[512];
    struct sockaddr_in to = {.sin_family = AF_INET,
                             .sin_port = htons((uint16_t)port),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct timeval patience = {.tv_sec = 5};
    int on = 1, length, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (fd < 0)
        die("socket: %s", strerror(errno));
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (receive_buffer)
        setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &receive_buffer,
                   sizeof receive_buffer);
    if (connect(fd, (struct sockaddr *)&to, sizeof to) < 0)
        die("connect to port %d: %s", port, strerror(errno));

    length = snprintf(request, sizeof request,
                      "GET %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n"
                      "Connection: Upgrade\r\nUpgrade: websocket\r\n"
                      "Sec-WebSocket-Version: 13\r\n"
                      "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
                      path, port);
    if (length >= (int)sizeof request)
        die("the path is too long");
    if (send(fd, request, (size_t)length, MSG_NOSIGNAL) != length)
        die("sending the upgrade: %s", strerror(errno));
    await_101(fd);
    return fd;
}
