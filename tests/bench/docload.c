/* docload.c - the load generator of `make bench` for documents.
 *
 * SPDX-License-Identifier: MIT
 *
 * Many clients of the y-websocket protocol in one thread.  Their edits were
 * made by the real Yjs before (trace.mjs), so that nothing but the server takes
 * time here.
 *
 *   docload MODE port=N pid=N path=/yjs/bench name=value ...
 *
 *   trace      one writer sends the edits of FILE, READERS members check that
 *              they get each of them, byte for byte and in order.  An edit is
 *              confirmed when all have it.  IN_FLIGHT edits are unconfirmed at
 *              any time (0: as many as the connection takes, many to a
 *              write), or RATE edits a second are sent
 *   big        the same in a document that already holds DOCUMENT, BATCH edits
 *              at a time: what the middle batch costs, and what all cost
 *   join       MEMBERS clients come at once to a document that holds DOCUMENT
 *   awareness  MEMBERS clients tell each other where they are, once a second
 *   memory     DOCS documents that hold DOCUMENT are open at a time
 *   fetch      what a newcomer gets goes to the file OUT
 *
 * What the server (PID) used is read from /proc.  The generator never sleeps:
 * waking a sleeping reader would be billed to the sender, and that is the
 * server.  Out come lines `name value`.
 *
 *    1  Options
 *    2  Stream  edits on file, framed beforehand
 *    3  Peers   frames out, frames in
 *    4  Room    who has what
 *    5  Modes   what is measured
 */
#define _GNU_SOURCE
#include "bench.h"

/* ===== 1  Options ====================================================== */

/* name, default, least, greatest, help */
#define NUMBERS(X)                                                             \
    X(port, 0, 1, 65535, "the server's port")                                  \
    X(pid, 0, 0, 1 << 22, "its process, to read what it uses")                 \
    X(readers, 3, 1, 1000, "members that get the edits (trace)")               \
    X(members, 50, 1, 1000, "clients (join, awareness)")                       \
    X(docs, 100, 1, 10000, "documents (memory)")                               \
    X(edits, 0, 0, 1 << 30, "the first so many edits of FILE, 0: all")         \
    X(warm, 0, 0, 1 << 30, "edits before measuring (trace)")                   \
    X(in_flight, 0, 0, 1 << 30, "unconfirmed edits, 0: no limit")              \
    X(rate, 0, 0, 1000000, "edits a second, 0: flat out")                      \
    X(batch, 100, 1, 100000, "edits at a time (big)")                          \
    X(warm_ms, 1500, 0, 60000, "awareness before measuring")                   \
    X(ms, 5000, 1, 60000, "awareness to measure")

/* name, default, help */
#define WORDS(X)                                                               \
    X(path, "/yjs/bench", "the document")                                      \
    X(file, NULL, "edits")                                                     \
    X(document, NULL, "updates that are there before")                         \
    X(out, NULL, "where fetch writes")

struct options {
#define X(name, value, least, greatest, help) int name;
    NUMBERS(X)
#undef X
#define X(name, value, help) const char *name;
    WORDS(X)
#undef X
};

_Noreturn static void
usage(void)
{
    fputs("usage: docload trace|big|join|awareness|memory|fetch "
          "name=value...\n",
          stderr);
#define X(name, value, least, greatest, help)                                  \
    fprintf(stderr, "  %-10s %-9d  %s\n", #name, value, help);
    NUMBERS(X)
#undef X
#define X(name, value, help) fprintf(stderr, "  %-21s %s\n", #name, help);
    WORDS(X)
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
#define X(name, value, help) .name = (value),
        WORDS(X)
#undef X
    };

    for (int i = 2; i < argc; i++) {
        if (0)
            ;
#define X(name, value, least, greatest, help)                                  \
    else if (strncmp(argv[i], #name "=", sizeof #name) == 0) o.name =          \
        number(argv[i], argv[i] + sizeof #name, least, greatest);
        NUMBERS(X)
#undef X
#define X(name, value, help)                                                   \
    else if (strncmp(argv[i], #name "=", sizeof #name) == 0) o.name =          \
        argv[i] + sizeof #name;
        WORDS(X)
#undef X
        else
            usage();
    }
    /* clang-format on */
    if (!o.port)
        usage();
    return o;
}

/* ===== 2  Stream =======================================================
 * A file of updates, each behind its length in 32 bits, becomes one row of
 * masked frames, so that sending many edits is one send().
 * ====================================================================== */

struct edit {
    const uint8_t *update;
    uint32_t length;
    size_t frame_end;
    uint64_t sent_ns, latency_ns;
    uint32_t missing; /* readers that have yet to get it */
};

struct stream {
    struct edit *edits;
    uint32_t count;
    uint64_t bytes; /* of all updates */
    uint8_t *frames;
};

static size_t
varuint_put(uint8_t *at, uint64_t n)
{
    size_t length = 0;

    for (; n > 127; n >>= 7)
        at[length++] = (uint8_t)(n | 128);
    at[length++] = (uint8_t)n;
    return length;
}

static uint64_t
varuint_get(const uint8_t **at, const uint8_t *end)
{
    uint64_t n = 0;

    for (unsigned shift = 0; *at < end && shift < 63; shift += 7) {
        uint8_t byte = *(*at)++;
        n |= (uint64_t)(byte & 127) << shift;
        if (byte < 128)
            return n;
    }
    die("a message ends within a number");
}

/* Writes a masked frame of two parts.  The mask is a constant: the server has
 * to undo it all the same. */
static size_t
frame_put(uint8_t *to, unsigned opcode, const uint8_t *head, size_t head_size,
          const uint8_t *body, size_t body_size)
{
    static const uint8_t mask[4] = {0x37, 0xfa, 0x21, 0x3d};
    size_t length = head_size + body_size;
    uint8_t *at = to;

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
        *at++ = (uint8_t)((i < head_size ? head[i] : body[i - head_size]) ^
                          mask[i % 4]);
    return (size_t)(at - to);
}

static uint8_t *
file_read(const char *path, size_t *size)
{
    FILE *file = path ? fopen(path, "rb") : NULL;
    uint8_t *bytes;
    long end;

    if (!file)
        die("%s: %s", path ? path : "file=", strerror(path ? errno : EINVAL));
    if (fseek(file, 0, SEEK_END) < 0 || (end = ftell(file)) < 0)
        die("%s: %s", path, strerror(errno));
    rewind(file);
    *size = (size_t)end;
    bytes = take(*size, 1);
    if (fread(bytes, 1, *size, file) != *size)
        die("%s cannot be read", path);
    fclose(file);
    return bytes;
}

/* Finds the next update of a file; NULL at its end. */
static const uint8_t *
stream_next(const uint8_t **at, const uint8_t *end, uint32_t *length)
{
    const uint8_t *update = *at + 4;

    if (*at == end)
        return NULL;
    if (end - *at < 4)
        die("a file of updates is cut");
    *length = (uint32_t)update[-4] | (uint32_t)update[-3] << 8 |
              (uint32_t)update[-2] << 16 | (uint32_t)update[-1] << 24;
    if ((size_t)(end - update) < *length)
        die("a file of updates is cut");
    *at = update + *length;
    return update;
}

/* limit 0: all of them. */
static struct stream *
stream_open(const char *path, int limit)
{
    struct stream *s = take(1, sizeof *s);
    size_t size, frames_end = 0;
    const uint8_t *bytes = file_read(path, &size), *at = bytes, *update;
    uint32_t length, count = 0;

    while (stream_next(&at, bytes + size, &length))
        count++;
    if (limit && count > (uint32_t)limit)
        count = (uint32_t)limit;
    s->edits = take(count, sizeof *s->edits);
    s->frames = take(size + (size_t)count * 32, 1);
    for (at = bytes; s->count < count; s->count++) {
        uint8_t head[16] = {0, 2};
        struct edit *e = &s->edits[s->count];
        update = stream_next(&at, bytes + size, &length);
        e->update = update;
        e->length = length;
        s->bytes += length;
        frames_end +=
            frame_put(s->frames + frames_end, 2, head,
                      2 + varuint_put(head + 2, length), update, length);
        e->frame_end = frames_end;
    }
    return s;
}

/* ===== 3  Peers ========================================================
 * What arrives is looked at where recv() put it; only a frame that is not whole
 * yet is carried over.  A peer's own words wait while it is within a frame of
 * the stream.
 * ====================================================================== */

struct peer {
    int fd;
    uint8_t *carry; /* the frame that is arriving */
    size_t got, carry_size;
    uint8_t words[4096]; /* frames on their way out */
    size_t words_at, words_end;
    bool watched;     /* its socket is full */
    bool mid_frame;   /* of the stream */
    bool synced;      /* it was sent the whole document ... */
    size_t sync_size; /* ... in so many bytes */
    uint32_t next;    /* the edit that is due */
    uint32_t clock;   /* of its awareness ... */
    uint32_t *seen;   /* ... and everyone's, as it was told */
};

struct room {
    const struct options *o;
    int epoll;
    struct peer *peers; /* the first is the writer */
    uint32_t count, most;
    uint64_t last_ns; /* when something arrived */
    /* What the writer sends. */
    struct stream *stream;
    uint32_t sent, confirmed;
    size_t sent_bytes;
    uint64_t states; /* of awareness, received by all */
    bool keeps;      /* the last SyncStep2, which is here: */
    uint8_t *document;
    uint8_t buffer[1 << 18];
};

#define PATIENCE_NS 60000000000u

static void
peer_watch(const struct room *r, struct peer *p, bool writable)
{
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = p};

    if (writable == p->watched)
        return;
    p->watched = writable;
    e.events |= writable ? EPOLLOUT : 0;
    if (epoll_ctl(r->epoll, EPOLL_CTL_MOD, p->fd, &e) < 0)
        die("epoll_ctl: %s", strerror(errno));
}

static size_t
peer_send(struct peer *p, const uint8_t *at, size_t length)
{
    ssize_t n = send(p->fd, at, length, MSG_NOSIGNAL | MSG_DONTWAIT);

    if (n < 0 && errno != EAGAIN)
        die("send: %s", strerror(errno));
    return n < 0 ? 0 : (size_t)n;
}

static void
peer_flush(struct room *r, struct peer *p)
{
    if (p->mid_frame || p->words_at == p->words_end)
        return;
    p->words_at +=
        peer_send(p, p->words + p->words_at, p->words_end - p->words_at);
    if (p->words_at == p->words_end)
        p->words_at = p->words_end = 0;
    if (p->words_end > 0)
        peer_watch(r, p, true);
}

static void
peer_say(struct room *r, struct peer *p, unsigned opcode, const void *bytes,
         size_t length)
{
    if (sizeof p->words - p->words_end < length + 14)
        die("the server does not read what peer %td says", p - r->peers);
    p->words_end +=
        frame_put(p->words + p->words_end, opcode, bytes, length, NULL, 0);
    peer_flush(r, p);
}

static void
peer_asks(struct room *r, struct peer *p)
{
    p->synced = false;
    peer_say(r, p, 2, (const uint8_t[]){0, 0, 1, 0}, 4);
}

/* An edit that came back to the writer is not counted. */
static void
peer_edited(struct room *r, struct peer *p, const uint8_t *update,
            size_t length)
{
    struct edit *e;

    if (!r->stream || p == r->peers)
        return;
    if (p->next >= r->sent)
        die("peer %td got an edit that nobody sent", p - r->peers);
    e = &r->stream->edits[p->next++];
    if (length != e->length || memcmp(update, e->update, length) != 0)
        die("peer %td got something else instead of edit %u", p - r->peers,
            p->next - 1);
    if (--e->missing > 0)
        return;
    e->latency_ns = r->last_ns - e->sent_ns;
    r->confirmed++;
}

static void
peer_aware(struct room *r, struct peer *p, const uint8_t *at,
           const uint8_t *end)
{
    uint64_t count = varuint_get(&at, end);

    while (count-- > 0) {
        uint64_t client = varuint_get(&at, end) & 0xffff;
        uint64_t clock = varuint_get(&at, end);
        uint64_t json = varuint_get(&at, end);
        if (json > (uint64_t)(end - at))
            die("an awareness message is cut");
        at += json;
        r->states++;
        if (p->seen && client < (uint64_t)r->o->members)
            p->seen[client] = (uint32_t)clock;
    }
}

static void
peer_message(struct room *r, struct peer *p, const uint8_t *at,
             const uint8_t *end)
{
    uint64_t kind = varuint_get(&at, end);
    uint64_t step = kind == 0 ? varuint_get(&at, end) : 0, size;

    if (kind > 1) {
        if (kind == 2)
            die("peer %td was refused", p - r->peers);
        return;
    }
    size = varuint_get(&at, end);
    if (size > (uint64_t)(end - at))
        die("a message is cut");
    if (kind == 1) {
        peer_aware(r, p, at, at + size);
    } else if (step == 0) {
        peer_say(r, p, 2, (const uint8_t[]){0, 1, 2, 0, 0}, 5);
    } else if (step == 1) {
        p->synced = true;
        p->sync_size = (size_t)size;
        if (r->keeps) {
            r->document = take((size_t)size, 1);
            memcpy(r->document, at, (size_t)size);
        }
    } else {
        peer_edited(r, p, at, (size_t)size);
    }
}

/* The size of the frame that begins here.  While too little of it is there, the
 * size of what tells more. */
static size_t
frame_size(const uint8_t *at, size_t got, size_t *header)
{
    uint64_t length = 0;
    unsigned code;

    if (got < 2)
        return 2;
    code = at[1] & 127;
    *header = code < 126 ? 2 : code == 126 ? 4 : 10;
    if (got < *header)
        return *header;
    if (code < 126)
        return *header + code;
    for (size_t i = 2; i < *header; i++)
        length = length << 8 | at[i];
    return *header + (size_t)length;
}

static void
peer_frame(struct room *r, struct peer *p, const uint8_t *at, size_t header,
           size_t size)
{
    const uint8_t *payload = at + header, *end = at + size;

    switch (at[0]) {
    case 0x82:
        peer_message(r, p, payload, end);
        break;
    case 0x88:
        die("the server closed peer %td: %d %.*s", p - r->peers,
            end - payload < 2 ? 1005 : payload[0] << 8 | payload[1],
            end - payload < 2 ? 0 : (int)(end - payload) - 2, payload + 2);
    case 0x89:
        peer_say(r, p, 10, payload, (size_t)(end - payload));
        break;
    case 0x8a:
        break;
    default:
        die("unexpected frame %02x %02x", at[0], at[1]);
    }
}

/* Adds to the carried frame.  Answers how many bytes it took. */
static size_t
peer_carry(struct room *r, struct peer *p, const uint8_t *at, size_t left)
{
    size_t header = 0, need = frame_size(p->carry, p->got, &header), took;

    if (need > p->carry_size) {
        p->carry_size = need;
        p->carry = realloc(p->carry, need);
        if (!p->carry)
            die("out of memory");
    }
    took = need - p->got < left ? need - p->got : left;
    memcpy(p->carry + p->got, at, took);
    p->got += took;
    if (p->got == frame_size(p->carry, p->got, &header)) {
        peer_frame(r, p, p->carry, header, p->got);
        p->got = 0;
    }
    return took;
}

static void
peer_receive(struct room *r, struct peer *p)
{
    ssize_t n = recv(p->fd, r->buffer, sizeof r->buffer, MSG_DONTWAIT);
    const uint8_t *at = r->buffer, *end = at + (n > 0 ? n : 0);

    if (n == 0)
        die("the server hung up on peer %td", p - r->peers);
    if (n < 0 && errno != EAGAIN)
        die("peer %td: %s", p - r->peers, strerror(errno));
    while (at < end) {
        size_t left = (size_t)(end - at), header = 0;
        size_t size = frame_size(at, left, &header);
        if (!p->got && header && size > header && size <= left) {
            peer_frame(r, p, at, header, size);
            at += size;
        } else {
            at += peer_carry(r, p, at, left);
        }
    }
}

/* ===== 4  Room ========================================================= */

static struct room *
room_open(const struct options *o, int most)
{
    struct room *r = take(1, sizeof *r);

    r->o = o;
    r->most = (uint32_t)most;
    r->peers = take(r->most, sizeof *r->peers);
    r->last_ns = clock_ns();
    r->epoll = epoll_create1(EPOLL_CLOEXEC);
    if (r->epoll < 0)
        die("epoll_create1: %s", strerror(errno));
    return r;
}

/* One more member, which asks for the document. */
static struct peer *
room_join(struct room *r, const char *path)
{
    struct peer *p = &r->peers[r->count++];
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = p};

    if (r->count > r->most)
        die("too many members");
    p->fd = join(r->o->port, path, 0);
    p->carry_size = 256;
    p->carry = take(p->carry_size, 1);
    if (epoll_ctl(r->epoll, EPOLL_CTL_ADD, p->fd, &e) < 0)
        die("epoll_ctl: %s", strerror(errno));
    peer_asks(r, p);
    return p;
}

/* Sends the stream, up to the edit before `until`. */
static void
room_write(struct room *r, uint32_t until)
{
    struct peer *p = &r->peers[0];
    struct edit *edits = r->stream->edits;
    size_t end;
    uint64_t now = clock_ns();

    if (until > r->stream->count)
        until = r->stream->count;
    if (until == r->sent || p->watched)
        return;
    end = edits[until - 1].frame_end;
    r->sent_bytes +=
        peer_send(p, r->stream->frames + r->sent_bytes, end - r->sent_bytes);
    for (; r->sent < until && edits[r->sent].frame_end <= r->sent_bytes;
         r->sent++) {
        edits[r->sent].sent_ns = now;
        edits[r->sent].missing = r->count - 1;
    }
    p->mid_frame =
        r->sent_bytes > (r->sent ? edits[r->sent - 1].frame_end : 0);
    peer_flush(r, p);
    if (r->sent_bytes < end)
        peer_watch(r, p, true);
}

static void
room_turn(struct room *r)
{
    struct epoll_event events[256];
    int n = epoll_wait(r->epoll, events, 256, 0);
    uint64_t now = clock_ns();

    if (n < 0 && errno != EINTR)
        die("epoll_wait: %s", strerror(errno));
    if (n > 0)
        r->last_ns = now;
    for (int i = 0; i < n; i++) {
        struct peer *p = events[i].data.ptr;
        if (events[i].events & EPOLLOUT) {
            peer_watch(r, p, false);
            peer_flush(r, p);
        }
        if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR))
            peer_receive(r, p);
    }
    if (now > r->last_ns && now - r->last_ns > PATIENCE_NS)
        die("nothing arrived for 60 s; %u of %u edits confirmed", r->confirmed,
            r->sent);
}

static void
room_synced(struct room *r)
{
    for (uint32_t i = 0; i < r->count; i++)
        while (!r->peers[i].synced)
            room_turn(r);
}

static void
room_run(struct room *r, int ms)
{
    uint64_t until = clock_ns() + (uint64_t)ms * 1000000u;

    while (clock_ns() < until)
        room_turn(r);
}

/* Until the server has nothing to do: it used less than 1 % for 100 ms. */
static struct use
room_settle(struct room *r)
{
    struct use was, is = use_now(r->o->pid);

    for (int i = 0; r->o->pid && i < 100; i++) {
        was = is;
        room_run(r, 100);
        is = use_now(r->o->pid);
        if (is.cpu_ns - was.cpu_ns < 1000000)
            break;
    }
    return is;
}

static void
room_begin(struct room *r, struct stream *s)
{
    r->stream = s;
    r->sent = r->confirmed = 0;
    r->sent_bytes = 0;
    for (uint32_t i = 0; i < r->count; i++)
        r->peers[i].next = 0;
}

/* Sends all edits before `until` and waits for their confirmation; while less
 * than `window` are unconfirmed, and no faster than the rate. */
static void
room_edit(struct room *r, uint32_t until, uint32_t window, int rate)
{
    uint64_t start = clock_ns();
    uint32_t from = r->confirmed;

    if (r->count < 2)
        die("nobody is there to confirm an edit");
    while (r->confirmed < until) {
        uint64_t to = until;
        if (window && to > (uint64_t)r->confirmed + window)
            to = (uint64_t)r->confirmed + window;
        if (rate) {
            uint64_t due = from + (clock_ns() - start) / 1000 *
                                      (uint64_t)rate / 1000000u;
            to = to > due ? due : to;
        }
        room_write(r, (uint32_t)to);
        room_turn(r);
    }
}

/* Fills a document; the last peer stays as its reader. */
static void
room_fill(struct room *r, const char *file)
{
    room_join(r, r->o->path);
    room_join(r, r->o->path);
    room_synced(r);
    if (file) {
        struct stream *s = stream_open(file, 0);
        room_begin(r, s);
        room_edit(r, s->count, 0, 0);
        r->stream = NULL;
    }
    room_settle(r);
}

/* ===== 5  Modes ======================================================== */

static int
ascending(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return (x > y) - (x < y);
}

/* The peak of memory counts from now. */
static void
use_peak_reset(int pid)
{
    char path[64];
    int fd;

    snprintf(path, sizeof path, "/proc/%d/clear_refs", pid);
    fd = pid ? open(path, O_WRONLY | O_CLOEXEC) : -1;
    if (pid && (fd < 0 || write(fd, "5", 1) != 1))
        die("%s: %s", path, strerror(errno));
    if (fd >= 0)
        close(fd);
}

/* What all modes say. */
static void
print_use(const struct use *a, const struct use *b, double seconds,
          double count)
{
    double cpu_us = (double)(b->cpu_ns - a->cpu_ns) / 1e3;

    printf("seconds %.3f\n", seconds);
    printf("per_s %.0f\n", count / seconds);
    printf("cpu_us %.4f\n", cpu_us / count);
    printf("cpu_ms %.3f\n", cpu_us / 1e3);
    printf("core_percent %.2f\n", cpu_us / seconds / 1e4);
    printf("waited_percent %.2f\n",
           (double)(b->waited_ns - a->waited_ns) / seconds / 1e7);
    printf("rss_before_kib %llu\n", (unsigned long long)a->rss);
    printf("rss_kib %llu\n", (unsigned long long)b->rss);
    printf("rss_anon_kib %llu\n", (unsigned long long)b->rss_anon);
    printf("peak_kib %llu\n", (unsigned long long)b->peak);
}

static void
run_trace(const struct options *o)
{
    struct stream *s = stream_open(o->file, o->edits);
    struct room *r = room_open(o, o->readers + 1);
    uint32_t warm = (uint32_t)o->warm, window = (uint32_t)o->in_flight;
    uint64_t *latency_ns = take(s->count, sizeof *latency_ns);
    size_t count = s->count - warm;
    struct use a, b;
    double seconds;

    if (s->count <= warm)
        die("%u edits are too few", s->count);
    for (int i = 0; i <= o->readers; i++)
        room_join(r, o->path);
    room_synced(r);
    room_begin(r, s);
    room_edit(r, warm, window, o->rate);
    a = room_settle(r);
    use_peak_reset(o->pid);
    a.at_ns = clock_ns();
    room_edit(r, s->count, window, o->rate);
    seconds = (double)(clock_ns() - a.at_ns) / 1e9;
    b = room_settle(r);

    print_use(&a, &b, seconds, (double)count);
    printf("edits %u\n", s->count);
    printf("update_bytes %llu\n", (unsigned long long)s->bytes);
    for (size_t i = 0; i < count; i++)
        latency_ns[i] = s->edits[warm + i].latency_ns;
    qsort(latency_ns, count, sizeof *latency_ns, ascending);
    printf("p50_us %.1f\n", (double)latency_ns[count / 2] / 1e3);
    printf("p99_us %.1f\n", (double)latency_ns[count / 100 * 99] / 1e3);
}

/* The same edits go to every document that is compared. */
static void
run_big(const struct options *o)
{
    struct stream *s = stream_open(o->file, o->edits);
    struct room *r = room_open(o, 2);
    uint32_t batch = (uint32_t)o->batch, batches = s->count / batch;
    uint64_t *costs = take(batches, sizeof *costs), start;
    struct use a, b, first;

    room_fill(r, o->document);
    if (!batches)
        die("%u edits are less than a batch", s->count);
    room_begin(r, s);
    use_peak_reset(o->pid);
    a = first = use_now(o->pid);
    start = clock_ns();
    for (uint32_t i = 0; i < batches; i++) {
        room_edit(r, (i + 1) * batch, 0, 0);
        room_run(r, 1); /* until it sleeps, and has been accounted for */
        b = use_now(o->pid);
        costs[i] = b.cpu_ns - a.cpu_ns;
        a = b;
    }
    b.at_ns = clock_ns();
    a = room_settle(r);
    print_use(&first, &a, (double)(b.at_ns - start) / 1e9,
              (double)batches * batch);
    qsort(costs, batches, sizeof *costs, ascending);
    printf("middle_cpu_us %.4f\n", (double)costs[batches / 2] / 1e3 / batch);
    printf("worst_batch_ms %.3f\n", (double)costs[batches - 1] / 1e6);
}

static void
run_join(const struct options *o)
{
    struct room *r = room_open(o, o->members + 2);
    struct use a, b;
    double seconds, limit;
    size_t size;

    room_fill(r, o->document);
    use_peak_reset(o->pid);
    a = use_now(o->pid);
    for (int i = 0; i < o->members; i++)
        room_join(r, o->path);
    room_synced(r);
    seconds = (double)(clock_ns() - a.at_ns) / 1e9;
    b = room_settle(r);

    size = r->peers[2].sync_size;
    for (uint32_t i = 2; i < r->count; i++)
        if (r->peers[i].sync_size != size)
            die("two clients got documents of %zu and %zu bytes", size,
                r->peers[i].sync_size);
    print_use(&a, &b, seconds, o->members);
    limit = (double)size / 1024 + 64.0 * o->members;
    printf("sync_bytes %zu\n", size);
    printf("grown_kib %.0f\n", (double)b.peak - (double)a.rss);
    printf("grown_part %.4f\n", ((double)b.peak - (double)a.rss) / limit);
}

/* Client ids are 0xbe000000 + member: five bytes. */
static void
aware_say(struct room *r, struct peer *p)
{
    uint8_t message[512] = {1}, entry[384];
    char json[256];
    uint32_t client = (uint32_t)(p - r->peers);
    size_t size = 0, at = 1;
    int length;

    length = snprintf(json, sizeof json,
                      "{\"user\":{\"name\":\"Member %u\","
                      "\"color\":\"#30bced\"},"
                      "\"cursor\":{\"anchor\":%u,\"head\":%u}}",
                      client, p->clock * 7 % 5000, p->clock * 7 % 5000 + 12);
    size += varuint_put(entry, 1);
    size += varuint_put(entry + size, 0xbe000000u + client);
    size += varuint_put(entry + size, ++p->clock);
    size += varuint_put(entry + size, (uint64_t)length);
    memcpy(entry + size, json, (size_t)length);
    size += (size_t)length;
    at += varuint_put(message + at, size);
    memcpy(message + at, entry, size);
    peer_say(r, p, 2, message, at + size);
}

/* Everyone speaks at a moment of its own in each second, evenly spread. */
static uint64_t
aware_run(struct room *r, int ms, uint64_t *made)
{
    uint64_t start = clock_ns(), began = *made, count = r->count;
    uint64_t until = began + count * (uint64_t)ms / 1000;

    while (*made < until) {
        uint64_t passed = clock_ns() - start;
        uint64_t due = began + passed * count / 1000000000u;
        for (; *made < due && *made < until; ++*made)
            aware_say(r, &r->peers[*made % count]);
        room_turn(r);
    }
    return until - began;
}

/* Does everyone know the last that everyone said? */
static bool
aware_complete(const struct room *r)
{
    for (uint32_t i = 0; i < r->count; i++)
        for (uint32_t j = 0; j < r->count; j++)
            if (r->peers[i].seen[j] != r->peers[j].clock)
                return false;
    return true;
}

static void
run_awareness(const struct options *o)
{
    struct room *r = room_open(o, o->members);
    uint64_t made = 0, states, count;
    struct use a, b;
    double seconds;

    for (int i = 0; i < o->members; i++) {
        struct peer *p = room_join(r, o->path);
        p->seen = take((size_t)o->members, sizeof *p->seen);
    }
    room_synced(r);
    aware_run(r, o->warm_ms, &made);
    states = r->states;
    a = use_now(o->pid);
    count = aware_run(r, o->ms, &made);
    b = use_now(o->pid);
    seconds = (double)(b.at_ns - a.at_ns) / 1e9;
    print_use(&a, &b, seconds, (double)count * o->members);
    printf("states %llu\n", (unsigned long long)(r->states - states));
    for (int i = 0; !aware_complete(r) && i < 100; i++)
        room_run(r, 50);
    if (!aware_complete(r))
        die("not everyone knows where everyone is");
}

/* One client in each document. */
static void
run_memory(const struct options *o)
{
    struct stream *s = stream_open(o->document, 0);
    struct use a = use_now(o->pid), b;
    struct room *r = NULL;
    char path[256];
    double docs = o->docs;

    for (int i = 0; i < o->docs; i++) {
        snprintf(path, sizeof path, "%s-%d", o->path, i);
        r = room_open(o, 1);
        room_join(r, path);
        room_synced(r);
        room_begin(r, s);
        while (r->sent < s->count) {
            room_write(r, s->count);
            room_turn(r);
        }
        peer_asks(r, &r->peers[0]);
        room_synced(r);
        if (r->peers[0].sync_size < s->bytes / 2)
            die("a document of %llu bytes came back as %zu",
                (unsigned long long)s->bytes, r->peers[0].sync_size);
    }
    b = room_settle(r);
    print_use(&a, &b, (double)(b.at_ns - a.at_ns) / 1e9, docs);
    printf("doc_kib %.2f\n", ((double)b.rss - (double)a.rss) / docs);
    printf("doc_anon_kib %.2f\n",
           ((double)b.rss_anon - (double)a.rss_anon) / docs);
}

static void
run_fetch(const struct options *o)
{
    struct room *r = room_open(o, 1);
    uint64_t start = clock_ns();
    FILE *file;

    r->keeps = o->out != NULL;
    room_join(r, o->path);
    room_synced(r);
    printf("fetch_us %.0f\n", (double)(clock_ns() - start) / 1e3);
    printf("sync_bytes %zu\n", r->peers[0].sync_size);
    if (!o->out)
        return;
    file = fopen(o->out, "wb");
    if (!file ||
        fwrite(r->document, 1, r->peers[0].sync_size, file) !=
            r->peers[0].sync_size ||
        fclose(file) != 0)
        die("%s: %s", o->out, strerror(errno));
}

int
main(int argc, char **argv)
{
    const char *mode = argc > 1 ? argv[1] : "";
    struct options o = options_read(argc, argv);

    raise_descriptors(1100);
    if (strcmp(mode, "trace") == 0)
        run_trace(&o);
    else if (strcmp(mode, "big") == 0)
        run_big(&o);
    else if (strcmp(mode, "join") == 0)
        run_join(&o);
    else if (strcmp(mode, "awareness") == 0)
        run_awareness(&o);
    else if (strcmp(mode, "memory") == 0)
        run_memory(&o);
    else if (strcmp(mode, "fetch") == 0)
        run_fetch(&o);
    else
        usage();
    return 0;
}
