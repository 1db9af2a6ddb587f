/* load.c - the load generator of `make bench`.
 *
 * SPDX-License-Identifier: MIT
 *
 * Many WebSocket clients in one thread, all in one room of a relay on
 * 127.0.0.1.  Each message carries a stamp, so that every member checks what
 * it gets: nothing lost, nothing twice, nothing out of order.  A message is
 * confirmed when all members have all of it.
 *
 *   load MODE port=N pid=N members=N size=N in_flight=N rate=N ms=N ...
 *
 *   fanout      one sender, MEMBERS receivers; flat out with IN_FLIGHT messages
 *               unconfirmed at any time, or RATE messages a second
 *   everyone    MEMBERS members, each sending RATE messages a second at a
 *               phase of its own
 *   stalled     fanout without and then with one more member that does not
 *               read; it is replaced twice a second, since it will be cut off
 *   handshakes  fanout without and then with BESIDE TLS handshakes under way
 *               at any time
 *   idle        MEMBERS silent clients: memory before and after, and how often
 *               the server wakes up in MS
 *
 * What the server (PID) used is read from /proc.  In the first three modes the
 * generator never sleeps: waking a sleeping reader would be billed to the
 * sender, and that is the server.
 *
 * Out come lines `name value`.  Whatever goes wrong ends the run with one line
 * on stderr and status 1.
 *
 *    1  Options
 *    2  Histogram  latencies in 1920 counters
 *    3  Usage      what the server used
 *    4  Room       frames out, frames in, who has what
 *    5  Modes      what is measured
 */
#define _GNU_SOURCE
#include "bench.h"
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>

/* ===== 1  Options ====================================================== */

/* name, default, least, greatest, help */
#define NUMBERS(X)                                                             \
    X(port, 0, 1, 65535, "the server's port")                                  \
    X(tls_port, 0, 0, 65535, "its TLS port (handshakes)")                      \
    X(pid, 0, 0, 1 << 22, "its process, to read what it uses")                 \
    X(members, 100, 0, 60000, "receivers")                                     \
    X(size, 64, 16, 1 << 20, "payload bytes of a message")                     \
    X(in_flight, 1, 1, 1024, "unconfirmed messages")                           \
    X(rate, 0, 0, 100000, "messages a second and sender, 0: flat out")         \
    X(beside, 20, 0, 256, "TLS handshakes at once")                            \
    X(warm_ms, 300, 0, 60000, "run this long before measuring")                \
    X(ms, 2000, 1, 60000, "measure this long")

struct options {
#define X(name, value, least, greatest, help) int name;
    NUMBERS(X)
#undef X
    const char *path;   /* the room */
    const char *allocs; /* file with the counters of allocs.c, or NULL */
};

_Noreturn static void
usage(void)
{
    fputs("usage: load fanout|everyone|stalled|handshakes|idle name=value...\n"
          "  path       /ws/bench  the room\n"
          "  allocs                counters of allocs.so\n",
          stderr);
#define X(name, value, least, greatest, help)                                  \
    fprintf(stderr, "  %-10s %-9d  %s\n", #name, value, help);
    NUMBERS(X)
#undef X
    exit(2);
}

static struct options
options_read(int argc, char **argv)
{
    /* clang-format off */
    struct options o = {
#define X(name, value, least, greatest, help) .name = (value),
        NUMBERS(X)
#undef X
        .path = "/ws/bench",
    };

    for (int i = 2; i < argc; i++) {
        if (strncmp(argv[i], "path=", 5) == 0)
            o.path = argv[i] + 5;
        else if (strncmp(argv[i], "allocs=", 7) == 0)
            o.allocs = argv[i] + 7;
#define X(name, value, least, greatest, help)                                  \
    else if (strncmp(argv[i], #name "=", sizeof #name) == 0) o.name =          \
        number(argv[i], argv[i] + sizeof #name, least, greatest);
        NUMBERS(X)
#undef X
        else
            usage();
    }
    /* clang-format on */
    if (!o.port)
        usage();
    return o;
}

/* ===== 2  Histogram ====================================================
 * Exact below 64 ns, then 32 counters per power of two: within 3 percent.
 * ====================================================================== */

#define HISTOGRAM_COUNTERS 1920

struct histogram {
    uint64_t count[HISTOGRAM_COUNTERS];
    uint64_t sum;
};

static void
histogram_add(struct histogram *h, uint64_t ns)
{
    unsigned shift = ns < 64 ? 0 : 58 - (unsigned)__builtin_clzll(ns);

    h->count[shift * 32 + (unsigned)(ns >> shift)]++;
    h->sum++;
}

/* The value in microseconds that `part` of all values do not exceed. */
static double
histogram_us(const struct histogram *h, double part)
{
    uint64_t left = (uint64_t)((double)h->sum * part);
    unsigned i = 0, shift;

    while (i + 1 < HISTOGRAM_COUNTERS && left >= h->count[i])
        left -= h->count[i++];
    shift = i < 64 ? 0 : i / 32 - 1;
    return ((double)(i - shift * 32) + 0.5) * (double)(1ull << shift) / 1e3;
}

/* ===== 3  Usage ========================================================
 * What bench.h knows, and what allocs.so counted.
 * ====================================================================== */

static void
use_allocs(const char *path, struct use *use)
{
    uint64_t counters[2];
    int fd = open(path, O_RDONLY | O_CLOEXEC);

    if (fd < 0 || read(fd, counters, sizeof counters) != sizeof counters)
        die("%s: no counters (is allocs.so loaded?)", path);
    close(fd);
    use->allocs = counters[0];
    use->frees = counters[1];
}

static struct use
load_use(const struct options *o)
{
    struct use use = use_now(o->pid);

    if (o->allocs)
        use_allocs(o->allocs, &use);
    return use;
}

/* ===== 4  Room =========================================================
 * Peers 0 to senders - 1 send, and all from first_member on receive.  next[]
 * says for each member and sender which message is due.
 *
 *   stamp, the first 16 bytes of a payload, in host order:
 *     sent_ns 8 | sender 4 | sequence 4
 *
 * Unconfirmed messages are counted in missing[], by sequence modulo WINDOW:
 * how many members have yet to get it.  As all get them in one order, they are
 * confirmed in that order.
 * ====================================================================== */

#define WINDOW 1024 /* the greatest in_flight, a power of two */
#define PATIENCE_NS 5000000000u

struct stamp {
    uint64_t sent_ns;
    uint32_t sender, sequence;
};

struct peer {
    int fd;
    /* The frame that is arriving: its header and as much of the payload as we
     * look at, then the rest, which is only counted. */
    uint8_t head[10 + 125];
    size_t got;
    uint64_t skip;
    /* Senders: frames on their way out, and how many were made. */
    uint8_t *out;
    size_t out_at, out_end, out_size;
    uint32_t sent;
};

struct room {
    const struct options *o;
    int epoll;
    bool sleeps; /* epoll_wait may wait */
    struct peer *peers;
    uint32_t count, senders, first_member;
    uint32_t *next;
    uint32_t missing[WINDOW], confirmed;
    uint64_t start_ns, last_ns, *phase_ns; /* phases ascend */
    uint64_t made;                         /* paced messages so far */
    struct histogram *latency;
    uint8_t buffer[1 << 16];
};

static void
peer_watch(const struct room *r, struct peer *p, int how, uint32_t events)
{
    struct epoll_event e = {.events = events, .data.ptr = p};

    if (epoll_ctl(r->epoll, how, p->fd, &e) < 0)
        die("epoll_ctl: %s", strerror(errno));
}

/* The sending half. */

static void
peer_flush(struct room *r, struct peer *p)
{
    ssize_t n = send(p->fd, p->out + p->out_at, p->out_end - p->out_at,
                     MSG_NOSIGNAL | MSG_DONTWAIT);

    if (n < 0 && errno != EAGAIN)
        die("send: %s", strerror(errno));
    p->out_at += n > 0 ? (size_t)n : 0;
    if (p->out_at == p->out_end)
        p->out_at = p->out_end = 0;
    else
        peer_watch(r, p, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
}

/* Appends a masked frame to what the peer will send.  The mask is a constant:
 * the server has to undo it all the same. */
static void
peer_frame(struct peer *p, unsigned opcode, const void *start, size_t known,
           size_t length)
{
    static const uint8_t mask[4] = {0x37, 0xfa, 0x21, 0x3d};
    const uint8_t *from = start;
    uint8_t *at = p->out + p->out_end;

    if (p->out_size - p->out_end < length + 14)
        die("the server does not read: %zu bytes wait to be sent",
            p->out_end - p->out_at);
    *at++ = (uint8_t)(0x80 | opcode);
    if (length < 126) {
        *at++ = (uint8_t)(0x80 | length);
    } else {
        unsigned bytes = length < 65536 ? 2 : 8;
        *at++ = (uint8_t)(0x80 | (bytes == 2 ? 126 : 127));
        while (bytes-- > 0)
            *at++ = (uint8_t)((uint64_t)length >> 8 * bytes);
    }
    memcpy(at, mask, 4);
    at += 4;
    for (size_t i = 0; i < length; i++)
        *at++ = (uint8_t)((i < known ? from[i] : 0) ^ mask[i % 4]);
    p->out_end = (size_t)(at - p->out);
}

/* Every message is a send() of its own, as when a program calls its library. */
static void
room_post(struct room *r, uint32_t sender)
{
    struct peer *p = &r->peers[sender];
    struct stamp stamp = {clock_ns(), sender, p->sent++};

    peer_frame(p, 2, &stamp, sizeof stamp, (size_t)r->o->size);
    peer_flush(r, p);
    r->missing[stamp.sequence % WINDOW] = r->count - r->first_member;
}

/* Flat out: keeps in_flight messages unconfirmed. */
static void
room_refill(struct room *r)
{
    if (r->o->rate)
        return;
    while (r->peers[0].sent - r->confirmed < (uint32_t)r->o->in_flight)
        room_post(r, 0);
}

/* When the next paced message is due. */
static uint64_t
room_due(const struct room *r)
{
    return r->start_ns + r->phase_ns[r->made % r->senders] +
           r->made / r->senders * 1000000000u / (uint64_t)r->o->rate;
}

/* Paced: posts what is due.  Answers for how many milliseconds nothing is. */
static int
room_pace(struct room *r)
{
    uint64_t now = clock_ns(), due;

    while ((due = room_due(r)) <= now)
        room_post(r, (uint32_t)(r->made++ % r->senders));
    return (int)((due - now) / 1000000u);
}

/* The receiving half. */

/* How many bytes of the frame's head are needed, as far as is known yet. */
static size_t
head_need(const struct peer *p, size_t *header, uint64_t *length)
{
    size_t keep;
    unsigned code;

    if (p->got < 2)
        return 2;
    code = p->head[1] & 127;
    *header = code < 126 ? 2 : code == 126 ? 4 : 10;
    if (p->got < *header)
        return *header;
    *length = code < 126 ? code : 0;
    for (size_t i = 2; i < *header; i++)
        *length = *length << 8 | p->head[i];
    keep = p->head[0] & 8 ? 125 : sizeof(struct stamp);
    return *header + (*length < keep ? (size_t)*length : keep);
}

static void
room_delivered(struct room *r, struct peer *p, const uint8_t *payload,
               uint64_t now)
{
    struct stamp stamp;
    size_t member = (size_t)(p - r->peers);
    uint32_t *next;

    memcpy(&stamp, payload, sizeof stamp);
    if (stamp.sender >= r->senders || member < r->first_member)
        die("peer %zu got a message that nobody sent to it", member);
    next = &r->next[member * r->senders + stamp.sender];
    if (stamp.sequence != *next)
        die("peer %zu got message %u of sender %u instead of %u", member,
            stamp.sequence, stamp.sender, *next);
    ++*next;
    histogram_add(r->latency, now - stamp.sent_ns);
    r->last_ns = now;
    if (r->senders > 1 || --r->missing[stamp.sequence % WINDOW] > 0)
        return;
    r->confirmed++;
    room_refill(r);
}

static void
peer_arrived(struct room *r, struct peer *p, size_t header, uint64_t length,
             uint64_t now)
{
    const uint8_t *payload = p->head + header;

    switch (p->head[0]) {
    case 0x81:
    case 0x82:
        if (length != (uint64_t)r->o->size)
            die("a message of %llu bytes came back",
                (unsigned long long)length);
        room_delivered(r, p, payload, now);
        break;
    case 0x88:
        die("the server closed peer %td: %d %.*s", p - r->peers,
            length < 2 ? 1005 : payload[0] << 8 | payload[1],
            length < 2 ? 0 : (int)length - 2, payload + 2);
        break;
    case 0x89:
        peer_frame(p, 10, payload, (size_t)length, (size_t)length);
        peer_flush(r, p);
        break;
    default:
        die("unexpected frame %02x %02x", p->head[0], p->head[1]);
    }
}

static void
peer_receive(struct room *r, struct peer *p)
{
    size_t header = 0, need;
    uint64_t length = 0, now;
    ssize_t n = recv(p->fd, r->buffer, sizeof r->buffer, MSG_DONTWAIT);
    const uint8_t *at = r->buffer, *end = at + (n > 0 ? n : 0);

    if (n == 0)
        die("the server hung up on peer %td", p - r->peers);
    if (n < 0 && errno != EAGAIN)
        die("peer %td: %s", p - r->peers, strerror(errno));

    now = clock_ns();
    while (at < end) {
        while (p->got < (need = head_need(p, &header, &length)) && at < end)
            p->head[p->got++] = *at++;
        if (p->got < need)
            return;
        if (!p->skip)
            p->skip = length - (need - header) + 1;
        /* skip is one more than what is left, so that 0 says: not begun. */
        if ((uint64_t)(end - at) < p->skip - 1) {
            p->skip -= (uint64_t)(end - at);
            return;
        }
        at += p->skip - 1;
        p->skip = 0;
        p->got = 0;
        peer_arrived(r, p, header, length, now);
    }
}

/* The room as a whole. */

static int
phase_order(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return (x > y) - (x < y);
}

/* Everyone: all send and receive.  Otherwise peer 0 sends to the others. */
static struct room *
room_open(const struct options *o, bool everyone)
{
    struct room *r = take(1, sizeof *r);

    r->o = o;
    r->senders = everyone ? (uint32_t)o->members : 1;
    r->first_member = everyone ? 0 : 1;
    r->count = r->first_member + (uint32_t)o->members;
    r->peers = take(r->count, sizeof *r->peers);
    r->next = take((size_t)r->count * r->senders, sizeof *r->next);
    r->phase_ns = take(r->senders, sizeof *r->phase_ns);
    r->latency = take(1, sizeof *r->latency);
    if (r->count <= r->first_member)
        die("a room needs members");
    r->epoll = epoll_create1(EPOLL_CLOEXEC);
    if (r->epoll < 0)
        die("epoll_create1: %s", strerror(errno));

    for (uint32_t i = 0; i < r->count; i++) {
        struct peer *p = &r->peers[i];
        size_t frames = i < r->senders ? (size_t)o->in_flight + 15 : 0;
        p->fd = join(o->port, o->path, 0);
        p->out_size = frames * ((size_t)o->size + 14) + 512;
        p->out = take(1, p->out_size);
        peer_watch(r, p, EPOLL_CTL_ADD, EPOLLIN);
    }
    srandom(1); /* the same phases for every server */
    for (uint32_t i = 0; o->rate && i < r->senders; i++)
        r->phase_ns[i] = (uint64_t)random() % (1000000000u / (uint64_t)o->rate);
    qsort(r->phase_ns, r->senders, sizeof *r->phase_ns, phase_order);
    r->start_ns = r->last_ns = clock_ns();
    return r;
}

static void
room_run(struct room *r, int ms)
{
    struct epoll_event events[256];
    uint64_t now = clock_ns(), until = now + (uint64_t)ms * 1000000u;

    room_refill(r);

    for (; now < until; now = clock_ns()) {
        int wait = r->o->rate ? room_pace(r) : 100;
        int n = epoll_wait(r->epoll, events, 256, r->sleeps ? wait : 0);
        if (n < 0 && errno != EINTR)
            die("epoll_wait: %s", strerror(errno));
        for (int i = 0; i < n; i++) {
            struct peer *p = events[i].data.ptr;
            if (events[i].events & EPOLLOUT) {
                peer_watch(r, p, EPOLL_CTL_MOD, EPOLLIN);
                peer_flush(r, p);
            }
            if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR))
                peer_receive(r, p);
        }
        if (now > r->last_ns && now - r->last_ns > PATIENCE_NS)
            die("nothing was delivered for 5 s; %u of %u messages confirmed",
                r->confirmed, r->peers[0].sent);
    }
}

/* ===== 5  Modes ======================================================== */

/* Runs, measures, prints; names get the suffix. */
static void
measure(struct room *r, const char *suffix)
{
    struct use a, b;
    double seconds, count;

    room_run(r, r->o->warm_ms);
    *r->latency = (struct histogram){.sum = 0};
    a = load_use(r->o);
    room_run(r, r->o->ms);
    b = load_use(r->o);

    seconds = (double)(b.at_ns - a.at_ns) / 1e9;
    count = (double)r->latency->sum;
    printf("deliveries%s %.0f\n", suffix, count);
    printf("deliveries_per_s%s %.0f\n", suffix, count / seconds);
    printf("p50_us%s %.1f\n", suffix, histogram_us(r->latency, 0.5));
    printf("p99_us%s %.1f\n", suffix, histogram_us(r->latency, 0.99));
    if (r->o->pid) {
        double cpu_us = (double)(b.cpu_ns - a.cpu_ns) / 1e3;
        printf("cpu_us%s %.4f\n", suffix, count > 0 ? cpu_us / count : 0.0);
        printf("core_percent%s %.2f\n", suffix, cpu_us / seconds / 1e4);
        printf("waited_percent%s %.2f\n", suffix,
               (double)(b.waited_ns - a.waited_ns) / seconds / 1e7);
        printf("rss_kib%s %llu\n", suffix, (unsigned long long)b.rss);
        printf("rss_anon_kib%s %llu\n", suffix, (unsigned long long)b.rss_anon);
    }
    if (r->o->allocs) {
        printf("allocs%s %llu\n", suffix,
               (unsigned long long)(b.allocs - a.allocs));
        printf("frees%s %llu\n", suffix,
               (unsigned long long)(b.frees - a.frees));
    }
}

/* A child that is always in the room and never reads. */
static pid_t
stall(const struct options *o)
{
    pid_t pid = fork();

    if (pid < 0)
        die("fork: %s", strerror(errno));
    if (pid > 0)
        return pid;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (;;) {
        int fd = join(o->port, o->path, 4096);
        usleep(500000);
        close(fd);
    }
}

static void
run_stalled(const struct options *o)
{
    struct room *r = room_open(o, false);
    int status;
    pid_t child;

    measure(r, "");
    child = stall(o);
    measure(r, "_with");
    if (waitpid(child, &status, WNOHANG) != 0)
        die("the client that does not read could not join");
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
}

/* `openssl s_time` connects, shakes hands, hangs up and starts anew.  It takes
 * only time that the server and we leave over, on any CPU, so that it is felt
 * as little as clients on machines of their own would be. */
static FILE *
shake(const struct options *o)
{
    char command[256];
    FILE *from;

    snprintf(command, sizeof command,
             "exec taskset -c 0-%ld chrt -i 0 openssl s_time -new"
             " -connect 127.0.0.1:%d -time %d 2>/dev/null",
             sysconf(_SC_NPROCESSORS_CONF) - 1, o->tls_port,
             (o->warm_ms + o->ms) / 1000 + 1);
    from = popen(command, "r");
    if (!from)
        die("openssl s_time: %s", strerror(errno));
    return from;
}

/* Reads "N connections in S real seconds" from the end of its report. */
static int
shaken(FILE *from)
{
    char line[256];
    int n, seconds, total = 0;

    while (fgets(line, sizeof line, from))
        if (sscanf(line, "%d connections in %d real", &n, &seconds) == 2)
            total = n;
    pclose(from);
    return total;
}

static void
run_handshakes(const struct options *o)
{
    FILE *from[256];
    struct room *r = room_open(o, false);
    int total = 0;

    if (!o->tls_port)
        die("handshakes need tls_port");
    r->sleeps = o->rate > 0;
    measure(r, "");
    for (int i = 0; i < o->beside; i++)
        from[i] = shake(o);
    measure(r, "_with");
    for (int i = 0; i < o->beside; i++)
        total += shaken(from[i]);
    if (o->beside && !total)
        die("no TLS handshake succeeded on port %d", o->tls_port);
    printf("handshakes %d\n", total);
}

static void
run_idle(const struct options *o)
{
    struct use before = load_use(o), joined, after;

    if (!o->pid)
        die("idle needs pid");
    for (int i = 0; i < o->members; i++)
        join(o->port, o->path, 0);
    usleep((useconds_t)o->warm_ms * 1000);
    joined = load_use(o);
    usleep((useconds_t)o->ms * 1000);
    after = load_use(o);

    printf("rss_before_kib %llu\n", (unsigned long long)before.rss);
    printf("rss_anon_before_kib %llu\n", (unsigned long long)before.rss_anon);
    printf("rss_kib %llu\n", (unsigned long long)joined.rss);
    printf("rss_anon_kib %llu\n", (unsigned long long)joined.rss_anon);
    if (o->members) {
        double n = o->members, old = (double)before.rss_anon;
        printf("client_kib %.3f\n", ((double)joined.rss_anon - old) / n);
        old = (double)before.rss;
        printf("client_rss_kib %.3f\n", ((double)joined.rss - old) / n);
    }
    printf("wakeups %llu\n",
           (unsigned long long)(after.sleeps - joined.sleeps));
    printf("wakeups_per_s %.2f\n",
           (double)(after.sleeps - joined.sleeps) / ((double)o->ms / 1e3));
}

int
main(int argc, char **argv)
{
    const char *mode = argc > 1 ? argv[1] : "";
    struct options o = options_read(argc, argv);

    raise_descriptors(o.members + 64);
    if (strcmp(mode, "fanout") == 0) {
        measure(room_open(&o, false), "");
    } else if (strcmp(mode, "everyone") == 0) {
        if (!o.rate)
            o.rate = 10;
        measure(room_open(&o, true), "");
    } else if (strcmp(mode, "stalled") == 0) {
        run_stalled(&o);
    } else if (strcmp(mode, "handshakes") == 0) {
        run_handshakes(&o);
    } else if (strcmp(mode, "idle") == 0) {
        run_idle(&o);
    } else {
        usage();
    }
    return 0;
}
