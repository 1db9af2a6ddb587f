/* Chapters Connections, The turn, The program: a whole server driven turn by
 * turn in this one thread, with real sockets, a clock that the test moves, and
 * collabd_check after every turn; and a machine that fails at every system
 * call in turn.
 *
 * SPDX-License-Identifier: MIT
 */
#include "test.h"

#include <dirent.h>

/* ----- the clock -------------------------------------------------------- */

static int64_t clock_ms = 5000000;

static int
fake_clock(clockid_t id, struct timespec *t)
{
    if (id != CLOCK_MONOTONIC)
        return clock_gettime(id, t);
    *t = (struct timespec){ .tv_sec = clock_ms / 1000,
                            .tv_nsec = clock_ms % 1000 * 1000000 };
    return 0;
}

/* ----- a machine that fails at the n-th call ---------------------------- */

enum call {
    CALL_PPOLL, CALL_ACCEPT4, CALL_RECV, CALL_SEND, CALL_SENDMSG, CALL_OPENAT,
    CALL_READ, CALL_PREAD, CALL_CLOSE, CALL_CALLOC, CALLS
};

static const char *const call_names[CALLS] = {
    "ppoll", "accept4", "recv", "send", "sendmsg", "openat", "read", "pread",
    "close", "calloc"
};

static enum call failing = CALLS;
static int fail_at;    /* the n-th call of that kind; 0: never */
static int fail_for;   /* so many calls in a row */
static int fail_errno;
static bool failed;    /* it has failed */
static unsigned failed_port; /* of the peer whose call it was; 0: none's */
static unsigned calls[CALLS];

static unsigned
port_of(int fd, int (*ask)(int, struct sockaddr *, socklen_t *))
{
    struct sockaddr_in at = { .sin_port = 0 };
    socklen_t len = sizeof at;

    if (fd < 0 || ask(fd, (struct sockaddr *)&at, &len) != 0)
        return 0;
    return ntohs(at.sin_port);
}

static bool
fails(enum call call, int fd)
{
    int n = (int)++calls[call];

    if (call != failing || fail_at == 0 || n < fail_at ||
        n >= fail_at + fail_for)
        return false;
    failed = true;
    failed_port = port_of(fd, getpeername);
    errno = fail_errno;
    return true;
}

static int
failing_ppoll(struct pollfd *fds, nfds_t n, const struct timespec *t,
              const sigset_t *mask)
{
    return fails(CALL_PPOLL, 0) ? -1 : ppoll(fds, n, t, mask);
}

static int
failing_accept4(int fd, struct sockaddr *at, socklen_t *len, int flags)
{
    return fails(CALL_ACCEPT4, fd) ? -1 : accept4(fd, at, len, flags);
}

static ssize_t
failing_recv(int fd, void *to, size_t len, int flags)
{
    return fails(CALL_RECV, fd) ? -1 : recv(fd, to, len, flags);
}

/* So many bytes the sockets take, all together, then none. */
static size_t room_to_send = SIZE_MAX;

static ssize_t
failing_send(int fd, const void *from, size_t len, int flags)
{
    if (fails(CALL_SEND, fd))
        return -1;
    if (room_to_send < SIZE_MAX) {
        len = len < room_to_send ? len : room_to_send;
        room_to_send -= len;
        if (len == 0) {
            errno = EAGAIN;
            return -1;
        }
    }
    return send(fd, from, len, flags);
}

static ssize_t
failing_sendmsg(int fd, const struct msghdr *m, int flags)
{
    return fails(CALL_SENDMSG, fd) ? -1 : sendmsg(fd, m, flags);
}

static int
failing_openat(int fd, const char *path, int flags, ...)
{
    return fails(CALL_OPENAT, fd) ? -1 : openat(fd, path, flags, 0600);
}

static ssize_t
failing_read(int fd, void *to, size_t len)
{
    return fails(CALL_READ, fd) ? -1 : read(fd, to, len);
}

static ssize_t
failing_pread(int fd, void *to, size_t len, off_t at)
{
    return fails(CALL_PREAD, fd) ? -1 : pread(fd, to, len, at);
}

static int
failing_close(int fd)
{
    /* Linux closes whatever close() answers */
    int n = close(fd);

    return fails(CALL_CLOSE, fd) ? -1 : n;
}

static void *
failing_calloc(size_t n, size_t each)
{
    return fails(CALL_CALLOC, -1) ? NULL : calloc(n, each);
}

static void
nothing_fails(void)
{
    failing = CALLS;
    fail_at = 0;
    failed = false;
    failed_port = 0;
    memset(calls, 0, sizeof calls);
}

static void
let_fail(enum call call, int at, int in_a_row, int error)
{
    nothing_fails();
    failing = call;
    fail_at = at;
    fail_for = in_a_row;
    fail_errno = error;
}

/* ----- a folder --------------------------------------------------------- */

static char folder[64];

static const char *
path_of(const char *name)
{
    static char path[4][200];
    static unsigned turn;
    char *p = path[turn++ % 4];

    (void)snprintf(p, sizeof path[0], "%s/%s", folder, name);
    return p;
}

static void
put_file(const char *name, const char *text, size_t len)
{
    FILE *f = fopen(path_of(name), "w");

    assert_non_null(f);
    assert_int_equal(fwrite(text, 1, len, f), len);
    (void)fclose(f);
}

static void
put_text(const char *name, const char *text)
{
    put_file(name, text, strlen(text));
}

static unsigned
count_fds(void)
{
    DIR *d = opendir("/proc/self/fd");
    unsigned n = 0;

    assert_non_null(d);
    while (readdir(d) != NULL)
        n++;
    (void)closedir(d);
    return n;
}

/* ----- the server ------------------------------------------------------- */

static struct collabd *s;
static unsigned fds_before;

#define ARGS 40
static char *args[ARGS];

/* Starts a server with small pools and these flags on top; false: it did not
 * start. */
static bool
try_start(const char *flags[])
{
    const char *small[] = { "collabd", "--listen", "127.0.0.1:0",
                            "--max-clients", "8", "--max-rooms", "2",
                            "--max-requests", "4", "--receive-buffers", "4",
                            "--max-message", "64K", "--message-memory", "1M" };
    int n = 0;

    for (size_t i = 0; i < sizeof small / sizeof *small; i++)
        args[n++] = (char *)(uintptr_t)small[i];
    for (size_t i = 0; flags[i] != NULL; i++)
        args[n++] = (char *)(uintptr_t)flags[i];
    assert_true(n < ARGS);
    args[n] = NULL;
    fds_before = count_fds();
    s = collabd_init(n, args);
    if (s != NULL)
        collabd_check(s);
    return s != NULL;
}

#define start_with(...)                                                      \
    assert_true(try_start((const char *[]){ __VA_ARGS__, NULL }))

static void
start_plain(void)
{
    const char *none[] = { NULL };

    assert_true(try_start(none));
}

/* A turn: 0, 1 when drained, -1. */
static int
turn(void)
{
    int answer = collabd_step(s, 0);

    collabd_check(s);
    return answer;
}

static void
turns(int n)
{
    while (n-- > 0)
        (void)turn();
}

/* Time passes, in turns of 100 ms at most. */
static void
pass(int64_t ms)
{
    while (ms > 0) {
        int64_t step = ms > 100 ? 100 : ms;
        clock_ms += step;
        ms -= step;
        turns(2);
    }
}

/* ----- peers ------------------------------------------------------------ */

static struct peer {
    int fd;             /* -1: not connected */
    bool ended, failed; /* the server's side has ended; with an error */
    size_t at, len;     /* of in: what was looked at, what arrived */
    size_t out_at, out_len;
    uint8_t in[400000], out[200000];
} peers[12];

static struct peer *
dial(int i)
{
    struct peer *p = &peers[i];
    struct sockaddr_in at = { .sin_family = AF_INET,
                              .sin_port = htons((uint16_t)collabd_port(s, 0)),
                              .sin_addr = { htonl(INADDR_LOOPBACK) } };
    int one = 1;

    assert_int_equal(p->fd, -1);
    p->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    (void)setsockopt(p->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    assert_int_equal(connect(p->fd, (struct sockaddr *)&at, sizeof at), 0);
    p->ended = p->failed = false;
    p->at = p->len = p->out_at = p->out_len = 0;
    return p;
}

static void
hang_up(struct peer *p)
{
    if (p->fd >= 0)
        (void)close(p->fd);
    p->fd = -1;
}

static void
stop_all(void)
{
    for (size_t i = 0; i < sizeof peers / sizeof *peers; i++)
        hang_up(&peers[i]);
    nothing_fails();
    if (s == NULL)
        return;
    collabd_free(s);
    s = NULL;
    assert_int_equal(count_fds(), fds_before);
}

/* Sends what the server has room for; the rest goes with the next look. */
static void
push(struct peer *p)
{
    ssize_t n;

    if (p->fd < 0 || p->out_at == p->out_len)
        return;
    n = send(p->fd, p->out + p->out_at, p->out_len - p->out_at,
             MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n > 0)
        p->out_at += (size_t)n;
    else if (errno != EAGAIN)
        p->failed = true;
    if (p->out_at == p->out_len)
        p->out_at = p->out_len = 0;
}

static void
say(struct peer *p, const void *bytes, size_t len)
{
    assert_true(p->out_len + len <= sizeof p->out);
    memcpy(p->out + p->out_len, bytes, len);
    p->out_len += len;
    push(p);
}

static void
say_text(struct peer *p, const char *text)
{
    say(p, text, strlen(text));
}

/* A masked frame; the mask is zero. */
static void
say_frame(struct peer *p, unsigned first, const void *payload, size_t len)
{
    static uint8_t frame[100000];
    struct out o = out_over(frame, sizeof frame);

    out_u8(&o, (uint8_t)first);
    if (len < 126) {
        out_u8(&o, (uint8_t)(0x80 | len));
    } else {
        int bytes = len < 65536 ? 2 : 8;
        out_u8(&o, bytes == 2 ? 0xfe : 0xff);
        while (bytes-- > 0)
            out_u8(&o, (uint8_t)(len >> (8 * bytes)));
    }
    out_bytes(&o, "\0\0\0\0", 4);
    out_bytes(&o, payload, len);
    assert_false(o.full);
    say(p, frame, (size_t)(o.at - frame));
}

static void
hear(struct peer *p)
{
    ssize_t n;
    int one = 1;

    if (p->fd < 0)
        return;
    push(p);
    /* the server's turns are faster than delayed acknowledgements */
    (void)setsockopt(p->fd, IPPROTO_TCP, TCP_QUICKACK, &one, sizeof one);
    if (p->at > sizeof p->in / 2) {
        memmove(p->in, p->in + p->at, p->len - p->at);
        p->len -= p->at;
        p->at = 0;
    }
    while ((n = recv(p->fd, p->in + p->len, sizeof p->in - p->len,
                     MSG_DONTWAIT)) > 0)
        p->len += (size_t)n;
    if (n == 0 && p->len < sizeof p->in)
        p->ended = true;
    if (n < 0 && errno != EAGAIN)
        p->ended = p->failed = true;
}

/* The next response's head as text (its body is left), or NULL. */
static const char *
hear_head(struct peer *p)
{
    static char text[5000];
    uint8_t *end;
    size_t n;

    hear(p);
    end = memmem(p->in + p->at, p->len - p->at, "\r\n\r\n", 4);
    if (end == NULL)
        return NULL;
    n = (size_t)(end - (p->in + p->at)) + 4;
    assert_true(n < sizeof text);
    memcpy(text, p->in + p->at, n);
    text[n] = '\0';
    p->at += n;
    return text;
}

/* The status of the next response, its body passed over; 0: none yet. */
static int
hear_status(struct peer *p)
{
    size_t before = p->at;
    const char *head = hear_head(p), *length;

    if (head == NULL)
        return 0;
    length = strstr(head, "Content-Length: ");
    if (length != NULL)
        p->at += strtoul(length + 16, NULL, 10);
    if (p->at > p->len) {
        p->at = before;
        return 0;
    }
    return atoi(head + 9);
}

/* The next whole frame's first byte, its payload in *payload; 0: none yet. */
static unsigned
hear_frame(struct peer *p, struct span *payload)
{
    struct span in;
    uint64_t len;
    size_t header = 2;

    hear(p);
    in = span_of(p->in + p->at, p->len - p->at);
    if (span_len(in) < 2)
        return 0;
    len = in.at[1];
    assert_true(len < 128); /* no mask */
    if (len >= 126) {
        header = len == 126 ? 4 : 10;
        if (span_len(in) < header)
            return 0;
        len = 0;
        for (size_t i = 2; i < header; i++)
            len = len << 8 | in.at[i];
    }
    if (span_len(in) - header < len)
        return 0;
    *payload = span_of(in.at + header, (size_t)len);
    p->at += header + (size_t)len;
    return in.at[0];
}

#define UPGRADE(path)                                                        \
    "GET " path " HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"     \
    "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"                   \
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"

static struct peer *
join_path(int i, const char *path)
{
    struct peer *p = dial(i);
    char text[600];
    const char *head;

    (void)snprintf(text, sizeof text, UPGRADE("%s"), path);
    say_text(p, text);
    turns(3);
    head = hear_head(p);
    assert_non_null(head);
    assert_memory_equal(head, "HTTP/1.1 101 ", 13);
    assert_non_null(strstr(head, "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"));
    return p;
}

static struct peer *
join(int i)
{
    return join_path(i, "/ws/room");
}

static void
expect_frame(struct peer *p, unsigned first, const char *text)
{
    struct span payload;

    assert_int_equal(hear_frame(p, &payload), first);
    assert_span_is(payload, text);
}

static void
expect_nothing(struct peer *p)
{
    hear(p);
    assert_int_equal(p->len, p->at);
    assert_false(p->ended);
}

static void
expect_close(struct peer *p, unsigned code)
{
    struct span payload;

    assert_int_equal(hear_frame(p, &payload), 0x88);
    if (code == 1005) {
        assert_true(span_is_empty(payload));
        return;
    }
    assert_true(span_len(payload) >= 2);
    assert_int_equal(payload.at[0] << 8 | payload.at[1], code);
}

static void
expect_status(struct peer *p, int status)
{
    turns(3);
    assert_int_equal(hear_status(p), status);
}

#define GET(path) "GET " path " HTTP/1.1\r\nHost: localhost\r\n\r\n"

static unsigned
clients_now(void)
{
    struct collabd_stats stats;

    collabd_stats(s, &stats);
    return stats.clients;
}

/* ----- facts: exchange -------------------------------------------------- */

static void
what_one_says_the_others_hear(void **state)
{
    struct peer *a, *b, *c;

    (void)state;
    start_plain();
    a = join(0);
    b = join(1);
    c = join_path(2, "/ws/room?echo=1");
    say_frame(a, 0x81, "hello", 5);
    turns(2);
    expect_frame(b, 0x81, "hello");
    expect_frame(c, 0x81, "hello");
    expect_nothing(a);
    say_frame(c, 0x01, "in ", 3);
    say_frame(b, 0x89, "ping", 4);
    say_frame(c, 0x80, "two", 3);
    turns(2);
    expect_frame(a, 0x81, "in two");
    expect_frame(c, 0x81, "in two");
    expect_frame(b, 0x8a, "ping");
    expect_frame(b, 0x81, "in two");
    assert_int_equal(clients_now(), 3);
}

static void
bytes_behind_the_head_are_part_of_the_stream(void **state)
{
    static const char both[] = UPGRADE("/ws/room") "\x81\x83\0\0\0\0one"
                                                   "\x81\x83\0\0\0\0two"
                                                   "\x81\x85\0\0\0\0th";
    struct peer *a, *b;

    (void)state;
    start_plain();
    b = join(0);
    a = dial(1);
    say(a, both, sizeof both - 1);
    turns(3);
    expect_frame(b, 0x81, "one");
    expect_frame(b, 0x81, "two");
    expect_nothing(b);
    say_text(a, "ree");
    turns(2);
    expect_frame(b, 0x81, "three");
}

static void
every_split_of_a_conversation_gives_the_same(void **state)
{
    static const char text[] = UPGRADE("/ws/room") "\x81\x83\0\0\0\0one"
                                                   "\x01\x81\0\0\0\0t"
                                                   "\x89\x80\0\0\0\0"
                                                   "\x80\x82\0\0\0\0wo";
    struct peer *b;

    (void)state;
    start_plain();
    b = join(0);
    for (size_t split = 1; split < sizeof text; split++) {
        struct peer *a = dial(1);
        say(a, text, split);
        turns(2);
        if (sizeof text - 1 > split)
            say(a, text + split, sizeof text - 1 - split);
        turns(3);
        assert_non_null(hear_head(a));
        expect_frame(a, 0x8a, "");
        expect_frame(b, 0x81, "one");
        expect_frame(b, 0x81, "two");
        hang_up(a);
        turns(2);
        assert_int_equal(clients_now(), 1);
    }
}

static void
a_conversation_byte_by_byte_is_understood(void **state)
{
    static const char text[] = GET("/healthz") UPGRADE("/ws/room")
        "\x81\x83\0\0\0\0one" "\x88\x82\0\0\0\0\x03\xe8";
    struct peer *a, *b;

    (void)state;
    start_plain();
    b = join(0);
    a = dial(1);
    for (size_t i = 0; i < sizeof text - 1; i++) {
        say(a, text + i, 1);
        turns(1);
    }
    turns(3);
    assert_int_equal(hear_status(a), 200);
    assert_non_null(hear_head(a));
    expect_frame(b, 0x81, "one");
    expect_close(a, 1000);
    hear(a);
    assert_true(a->ended);
}

static void
a_close_is_answered_with_its_code_and_ends(void **state)
{
    static const struct {
        unsigned code;
        size_t len;
        const char *payload;
    } cases[] = {
        { 1000, 2, "\x03\xe8" },
        { 4999, 4, "\x13\x87ok" },
        { 1005, 0, "" },
        { 1002, 1, "\x03" },
        { 1002, 2, "\x03\xed" },
        { 1007, 3, "\x03\xe8\xff" },
    };

    (void)state;
    start_plain();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct peer *a = join(0);
        say_frame(a, 0x88, cases[i].payload, cases[i].len);
        turns(3);
        expect_close(a, cases[i].code);
        hear(a);
        assert_true(a->ended && !a->failed);
        hang_up(a);
        turns(2);
        assert_int_equal(clients_now(), 0);
    }
}

static void
each_offence_is_closed_with_its_code_and_hurts_nobody(void **state)
{
    static const struct {
        unsigned code;
        size_t len;
        const char *bytes;
    } cases[] = {
        { 1002, 3, "\x81\x01x" },
        { 1002, 7, "\xc1\x81\0\0\0\0x" },
        { 1002, 6, "\x83\x80\0\0\0\0" },
        { 1002, 6, "\x80\x80\0\0\0\0" },
        { 1007, 7, "\x81\x81\0\0\0\0\xff" },
        { 1009, 15, "\x82\xff\0\0\0\0\0\1\0\1\0\0\0\0x" },
    };
    struct peer *b, *c;

    (void)state;
    start_plain();
    b = join(1);
    c = join(2);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct peer *a = join(0);
        say(a, cases[i].bytes, cases[i].len);
        turns(3);
        expect_close(a, cases[i].code);
        hang_up(a);
        say_frame(b, 0x81, "still here", 10);
        turns(3);
        expect_frame(c, 0x81, "still here");
    }
}

static void
nothing_comes_between_the_parts_of_a_close(void **state)
{
    struct peer *a, *b;

    (void)state;
    start_plain();
    for (size_t sent = 0; sent < 34; sent++) {
        a = join(0);
        b = join(1);
        room_to_send = sent;
        say(b, "\x81\x01x", 3);
        turns(2);
        say_frame(a, 0x81, "hello", 5);
        turns(2);
        room_to_send = SIZE_MAX;
        turns(3);
        hear(b);
        /* one that was not begun may wait for the message */
        if (sent == 0 && b->in[b->at] == 0x81)
            expect_frame(b, 0x81, "hello");
        expect_close(b, 1002);
        hear(b);
        assert_true(b->ended && b->at == b->len);
        hang_up(a);
        hang_up(b);
        turns(3);
    }
}

static void
a_client_that_is_closing_keeps_no_memory(void **state)
{
    struct peer *a;

    (void)state;
    start_plain();
    a = join(0);
    say(a, "\x01\x83\0\0\0\0abc\x00\x83\0\0\0\0\xff", 16);
    room_to_send = 0; /* its Close must wait */
    turns(3);
    assert_int_equal(clients_now(), 1);
    assert_int_equal(s->receivers_used, 0);
    assert_int_equal(s->chunks.used, 0);
    room_to_send = SIZE_MAX;
    turns(3);
    expect_close(a, 1007);
}

static void
a_message_of_the_most_passes_and_one_more_byte_does_not(void **state)
{
    static char text[65537];
    struct peer *a, *b;
    struct span payload;
    unsigned first = 0;

    (void)state;
    start_plain();
    a = join(0);
    b = join(1);
    memset(text, 'x', sizeof text);
    say_frame(a, 0x81, text, 65536);
    for (int i = 0; i < 50 && first == 0; i++) {
        turns(1);
        first = hear_frame(b, &payload);
    }
    assert_int_equal(first, 0x81);
    assert_int_equal(span_len(payload), 65536);
    say_frame(a, 0x81, text, 65537);
    turns(5);
    expect_close(a, 1009);
    expect_nothing(b);
}

/* ----- facts: HTTP ------------------------------------------------------ */

static void
requests_in_one_packet_are_answered_in_order(void **state)
{
    struct peer *a;

    (void)state;
    start_plain();
    a = dial(0);
    say_text(a, GET("/healthz") GET("/nothing") "\r\n" GET("/metrics")
                    "HEAD / HTTP/1.1\r\nHost: localhost\r\n"
                    "Connection: close\r\n\r\n" GET("/healthz"));
    turns(8);
    assert_int_equal(hear_status(a), 200);
    assert_int_equal(hear_status(a), 404);
    assert_int_equal(hear_status(a), 200);
    assert_non_null(strstr(hear_head(a), "Connection: close"));
    hear(a);
    assert_true(a->ended && a->at == a->len);
    hang_up(a);
    pass(2100);
    assert_int_equal(clients_now(), 0);
}

static void
a_refusal_that_leaves_bytes_unread_ends_the_connection(void **state)
{
    static const struct {
        int status;
        const char *text;
    } cases[] = {
        { 400, "GET / HTTP/1.1\r\n\r\n" },
        { 413, "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello" },
        { 405, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello" },
        { 501, "BREW / HTTP/1.1\r\nHost: a\r\n\r\n" },
        { 505, "GET / HTTP/3.0\r\nHost: a\r\n\r\n" },
    };

    (void)state;
    start_plain();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct peer *a = dial(0);
        say_text(a, cases[i].text);
        say_text(a, GET("/healthz"));
        turns(5);
        assert_int_equal(hear_status(a), cases[i].status);
        hear(a);
        assert_true(a->ended && a->at == a->len);
        hang_up(a);
        turns(2);
    }
    assert_int_equal(clients_now(), 0);
    assert_int_equal(s->requests_used, 0);
}

static void
the_longest_metrics_fit_into_a_reply(void **state)
{
    static const int used[] = { 101, 200, 204, 206, 301, 303, 304, 400, 401,
                                403, 404, 405, 408, 413, 414, 416, 421, 426,
                                429, 431, 501, 503, 505 };
    struct peer *a;

    (void)state;
    start_plain();
    a = dial(0);
    memset(&s->count, 0x7f, offsetof(struct counters, statuses));
    for (size_t i = 0; i < sizeof used / sizeof *used; i++)
        s->count.statuses[used[i] - 100] = INT64_MAX;
    say_text(a, GET("/metrics"));
    turns(3);
    assert_int_equal(hear_status(a), 200);
    assert_memory_equal(a->in + a->at - 1, "\n", 1);
    assert_non_null(memmem(a->in, a->len, "collabd_turn_seconds_total ", 27));
}

static void
a_slow_head_gets_408_and_silence_gets_nothing(void **state)
{
    struct peer *a, *b;

    (void)state;
    start_with("--request-timeout", "3");
    a = dial(0);
    b = dial(1);
    for (int i = 0; i < 4; i++) {
        say_text(a, "G"); /* a byte a second does not help */
        pass(990);
    }
    assert_int_equal(hear_status(a), 408);
    hear(b);
    assert_true(b->ended && b->len == 0);
    pass(2100);
    assert_int_equal(clients_now(), 0);
}

static void
a_reply_does_not_hold_its_buffer_while_it_lingers(void **state)
{
    (void)state;
    start_with("--max-requests", "1");
    for (int i = 0; i < 5; i++) {
        struct peer *p = dial(i);
        say_text(p, "GET / HTTP/1.0\r\n\r\n");
        turns(3);
        assert_int_equal(hear_status(p), 200);
    }
}

static void
who_waits_too_long_for_a_request_buffer_gets_503(void **state)
{
    struct peer *a, *b;

    (void)state;
    start_with("--max-requests", "1", "--request-timeout", "1");
    a = dial(0);
    say_text(a, "GET / HT");
    turns(2);
    b = dial(1);
    say_text(b, GET("/"));
    turns(3);
    hear(b);
    assert_int_equal(b->len, 0);
    pass(1000);
    assert_int_equal(hear_status(a), 408);
    (void)b; /* gets its turn or a 503, but nothing is stuck */
    pass(3000);
    hear(b);
    assert_true(b->len > 0);
    hang_up(a);
    hang_up(b);
    pass(3000);
    assert_int_equal(clients_now(), 0);
}

/* ----- facts: time ------------------------------------------------------ */

static void
a_silent_client_is_pinged_and_then_dropped(void **state)
{
    struct peer *a, *b;
    struct span payload;

    (void)state;
    start_plain();
    a = join(0);
    b = join(1);
    pass(23500);
    expect_nothing(a);
    pass(2500);
    expect_frame(a, 0x89, "");
    expect_frame(b, 0x89, "");
    say_frame(b, 0x8a, "", 0);
    pass(22000);
    assert_int_equal(clients_now(), 2);
    pass(2500);
    hear(a);
    assert_true(a->ended);
    assert_int_equal(clients_now(), 1);
    (void)hear_frame(b, &payload);
    assert_false(b->ended);
}

static void
any_byte_is_a_sign_of_life(void **state)
{
    struct peer *a;

    (void)state;
    start_plain();
    a = join(0);
    say(a, "\x82\xfe\x40\x00\0\0\0\0", 8);
    for (int i = 0; i < 11; i++) { /* 55 s, and --dead-after is 50 */
        pass(5000);
        say(a, "x", 1);
        turns(1);
    }
    expect_nothing(a);
    assert_int_equal(clients_now(), 1);
}

/* Signs of life are not enough: whoever never finishes holds memory. */
static void
a_message_that_trickles_for_ever_ends_by_its_deadline(void **state)
{
    struct peer *a;

    (void)state;
    start_plain();
    a = join(0);
    say(a, "\x82\xfe\x40\x00\0\0\0\0", 8);
    for (int i = 0; i < 19; i++) {
        pass(5000);
        say(a, "x", 1);
        turns(1);
    }
    turns(3);
    expect_close(a, 1008);
    assert_int_equal(s->chunks.used, 0);
    assert_int_equal(s->receivers_used, 0);
}

/* Many whole messages, each cut anywhere, are no message without end. */
static void
a_stream_that_is_never_between_messages_may_go_on(void **state)
{
    struct peer *a;

    (void)state;
    start_plain();
    a = join(0);
    say(a, "\x82\x81\0\0\0\0", 6); /* all but its only byte */
    for (int i = 0; i < 30; i++) {
        pass(5000);
        say(a, "x\x82\x81\0\0\0\0", 7);
        turns(1);
    }
    expect_nothing(a);
    assert_int_equal(clients_now(), 1);
}

static void
without_clients_it_sleeps_for_ever(void **state)
{
    struct peer *a;

    (void)state;
    start_plain();
    turns(2);
    assert_int_equal(loop_timeout(s, -1), -1);
    a = join(0);
    turns(2);
    assert_in_range(loop_timeout(s, -1), 900, 25000);
    hang_up(a);
    turns(3);
    pass(60000);
    turns(2);
    assert_int_equal(loop_timeout(s, -1), -1);
}

static void
who_is_over_its_rate_waits_and_is_read_later(void **state)
{
    struct peer *a, *b;
    struct span payload;
    unsigned heard = 0;

    (void)state;
    start_with("--rate-messages", "10");
    b = join(1);
    a = join(0);
    for (int i = 0; i < 40; i++) {
        say_frame(a, 0x81, "x", 1);
        turns(2);
    }
    while (hear_frame(b, &payload) != 0)
        heard++;
    assert_in_range(heard, 8, 12);
    pass(1000);
    while (hear_frame(b, &payload) != 0)
        heard++;
    assert_in_range(heard, 8, 40);
    pass(10000);
    while (hear_frame(b, &payload) != 0)
        heard++;
    assert_int_equal(heard, 40);
    assert_false(a->ended);
}

/* ----- facts: the end --------------------------------------------------- */

static void
a_drain_says_1001_to_all_and_is_over_when_they_are_gone(void **state)
{
    struct peer *a, *b, *c;
    int answer = 0;

    (void)state;
    start_plain();
    a = join(0);
    b = join(1);
    c = dial(2);
    say_frame(a, 0x81, "last words", 10);
    turns(1);
    collabd_stop(s);
    collabd_stop(s);
    assert_int_equal(turn(), 0);
    expect_frame(b, 0x81, "last words");
    expect_close(a, 1001);
    expect_close(b, 1001);
    hear(c);
    assert_true(c->ended);
    say_frame(a, 0x88, "\x03\xe9", 2);
    say_frame(b, 0x88, "\x03\xe9", 2);
    for (int i = 0; i < 10 && answer == 0; i++)
        answer = turn();
    assert_int_equal(answer, 1);
    assert_int_equal(clients_now(), 0);
}

static void
a_drain_takes_two_seconds_at_most(void **state)
{
    int answer = 0, ms = 0;

    (void)state;
    start_plain();
    (void)join(0);
    (void)dial(1);
    turns(2);
    collabd_stop(s);
    for (; answer == 0 && ms < 3000; ms += 50) {
        clock_ms += 50;
        answer = turn();
    }
    assert_int_equal(answer, 1);
    assert_in_range(ms, 0, 2000);
}

static void
free_ends_everything_at_any_moment(void **state)
{
    (void)state;
    start_plain();
    (void)join(0);
    say(&peers[0], "\x81\xfe\x10\x00\0\0\0\0half", 12);
    (void)dial(1);
    say_text(&peers[1], "GET / HT");
    (void)dial(2);
    say_text(&peers[2], GET("/healthz"));
    (void)join(3);
    say_frame(&peers[3], 0x88, "\x03\xe8", 2);
    turns(1);
    stop_all();
    collabd_free(NULL);
}

/* ----- facts: limits ---------------------------------------------------- */

static void
one_client_too_many_gets_503_and_then_a_place(void **state)
{
    (void)state;
    start_with("--max-clients", "2");
    (void)join(0);
    (void)join(1);
    (void)dial(2);
    turns(2);
    assert_int_equal(hear_status(&peers[2]), 503);
    hang_up(&peers[2]);
    assert_int_equal(clients_now(), 2);
    hang_up(&peers[0]);
    turns(3);
    (void)join(3);
    say_frame(&peers[1], 0x81, "hi", 2);
    turns(2);
    expect_frame(&peers[3], 0x81, "hi");
}

static void
ten_refusals_a_second_and_then_the_listener_rests(void **state)
{
    unsigned refused = 0;

    (void)state;
    start_with("--max-clients", "1");
    (void)join(0);
    for (int i = 0; i < 30; i++) {
        (void)dial(1);
        turns(2);
        refused += hear_status(&peers[1]) == 503;
        hang_up(&peers[1]);
    }
    assert_int_equal(refused, 10);
    turns(2);
    assert_in_range(loop_timeout(s, -1), 1, 1000);
    hang_up(&peers[0]);
    pass(3300); /* those that had hung up are refused, too */
    (void)join(2);
}

static void
out_of_descriptors_it_refuses_by_the_spare_one(void **state)
{
    (void)state;
    start_plain();
    (void)join(0);
    /* the call that accepts fails, the one after the spare was closed not */
    let_fail(CALL_ACCEPT4, 1, 1, EMFILE);
    (void)dial(1);
    turns(2);
    nothing_fails();
    assert_int_equal(hear_status(&peers[1]), 503);
    assert_true(s->spare_fd >= 0);
    assert_true(test_said("out of file descriptors"));
    /* all fail: it rests and does not spin */
    let_fail(CALL_ACCEPT4, 1, 1000, ENFILE);
    (void)dial(2);
    turns(10);
    assert_true(calls[CALL_ACCEPT4] <= 4);
    assert_in_range(loop_timeout(s, -1), 1, 1000);
    nothing_fails();
    pass(1100);
    say_text(&peers[2], GET("/healthz"));
    expect_status(&peers[2], 200);
    assert_true(s->spare_fd >= 0);
}

static void
a_machine_short_of_buffers_is_left_alone_for_a_second(void **state)
{
    (void)state;
    start_plain();
    (void)join(0);
    let_fail(CALL_ACCEPT4, 1, 1000, ENOBUFS);
    (void)dial(1);
    turns(10);
    assert_int_equal(calls[CALL_ACCEPT4], 1);
    nothing_fails();
    pass(1100);
    say_text(&peers[1], GET("/healthz"));
    expect_status(&peers[1], 200);
}

static void
one_room_too_many_gets_503(void **state)
{
    struct peer *a;

    (void)state;
    start_plain();
    (void)join_path(0, "/ws/a");
    (void)join_path(1, "/ws/b");
    a = dial(2);
    say_text(a, UPGRADE("/ws/c"));
    expect_status(a, 503);
    say_text(a, GET("/healthz")); /* it may go on */
    expect_status(a, 200);
    hang_up(&peers[0]);
    turns(2);
    (void)join_path(3, "/ws/c");
}

static void
a_coalescing_room_may_lose_its_members_and_its_slot(void **state)
{
    (void)state;
    start_with("--coalesce", "1000", "--max-rooms", "1");
    for (int round = 0; round < 3; round++) {
        (void)join_path(0, round % 2 ? "/ws/a" : "/ws/b");
        say_frame(&peers[0], 0x81, "one", 3);
        turns(1);
        say_frame(&peers[0], 0x81, "two", 3);
        turns(1);
        hang_up(&peers[0]);
        turns(2);
    }
}

static void
coalesced_messages_come_together_when_they_are_due(void **state)
{
    struct peer *a, *b;

    (void)state;
    start_with("--coalesce", "50");
    a = join(0);
    b = join(1);
    say_frame(a, 0x81, "1", 1);
    turns(2);
    expect_frame(b, 0x81, "1"); /* after a quiet spell: at once */
    clock_ms += 10;
    say_frame(a, 0x81, "2", 1);
    turns(2);
    say_frame(a, 0x81, "3", 1);
    turns(2);
    expect_nothing(b);
    assert_in_range(loop_timeout(s, -1), 1, 50);
    clock_ms += 45;
    turns(2);
    expect_frame(b, 0x81, "2");
    expect_frame(b, 0x81, "3");
}

static void
memory_touched_at_start_is_still_good(void **state)
{
    struct peer *a, *b;

    (void)state;
    start_with("--prefault");
    a = join(0);
    b = join(1);
    say_frame(a, 0x81, "hello", 5);
    turns(2);
    expect_frame(b, 0x81, "hello");
}

static void
a_dry_pool_of_receivers_starves_nobody_for_long(void **state)
{
    struct peer *a, *b;
    struct span payload;
    unsigned first;

    (void)state;
    start_with("--receive-buffers", "1", "--request-timeout", "10");
    a = join(0);
    b = join(1);
    say(a, "\x81\x85\0\0\0\0he", 8); /* holds the only one */
    turns(2);
    say_frame(b, 0x81, "waiting", 7);
    turns(2);
    hear(a);
    assert_int_equal(a->len, a->at);
    pass(2500); /* the holder has said nothing for two seconds */
    first = hear_frame(a, &payload);
    if (first == 0x81) /* what was said is for it, too */
        first = hear_frame(a, &payload);
    assert_int_equal(first, 0x88);
    assert_int_equal(payload.at[0] << 8 | payload.at[1], 1013);
    say_frame(b, 0x89, "x", 1);
    turns(2);
    expect_frame(b, 0x8a, "x");
    assert_true(s->count.evicted == 1 && s->count.starved >= 1);
}

static void
who_stops_reading_is_cut_loose_and_the_others_hear_all(void **state)
{
    static char text[3000];
    struct peer *a, *b;
    struct span payload;
    unsigned heard = 0;

    (void)state;
    start_with("--socket-buffer", "4096");
    (void)join(2); /* never reads */
    a = join(0);
    b = join(1);
    for (unsigned i = 0; i < 300; i++) {
        (void)snprintf(text, sizeof text, "%08u", i);
        say_frame(a, 0x82, text, sizeof text);
        for (int k = 0; k < 20; k++) {
            clock_ms += 1;
            turns(1);
            while (hear_frame(b, &payload) != 0) {
                assert_int_equal(span_len(payload), sizeof text);
                (void)snprintf(text, sizeof text, "%08u", heard);
                assert_memory_equal(payload.at, text, 8);
                heard++;
            }
            if (heard == i + 1)
                break;
        }
    }
    pass(3000);
    while (hear_frame(b, &payload) != 0)
        heard++;
    assert_int_equal(heard, 300);
    assert_true(s->count.closes[CLOSE_SLOW] == 1);
    assert_int_equal(clients_now(), 2);
}

/* ----- facts: control frames that wait ---------------------------------- */

static struct conn
conn_with_control(const char *bytes, size_t len, uint16_t sent)
{
    struct conn c = { .control_at = sent, .control_end = (uint16_t)len };

    memcpy(c.control, bytes, len);
    return c;
}

static void
unsent_pongs_are_forgotten_and_nothing_else(void **state)
{
    /* [Ping][Pong 3][Pong 2][Ping] */
    static const char bytes[] = "\x89\x00" "\x8a\x03" "abc" "\x8a\x02" "xy"
                                "\x89\x00";
    static const struct {
        uint16_t sent, at;
        const char *left;
        size_t len;
    } cases[] = {
        { 0, 0, "\x89\x00\x89\x00", 4 },
        { 1, 1, "\x89\x00\x89\x00", 4 },
        { 2, 0, "\x89\x00", 2 },
        { 3, 1, "\x8a\x03" "abc\x89\x00", 7 },
        { 6, 4, "\x8a\x03" "abc\x89\x00", 7 },
        { 7, 0, "\x89\x00", 2 },
        { 10, 3, "\x8a\x02xy\x89\x00", 6 },
        { 11, 0, "\x89\x00", 2 },
        { 12, 1, "\x89\x00", 2 },
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct conn c = conn_with_control(bytes, sizeof bytes - 1,
                                          cases[i].sent);
        conn_drop_pongs(&c);
        assert_int_equal(c.control_end, cases[i].len);
        assert_int_equal(c.control_at, cases[i].at);
        assert_memory_equal(c.control, cases[i].left, cases[i].len);
    }
}

static void
a_flood_of_pings_costs_pongs_but_never_the_close(void **state)
{
    char payload[125];
    struct peer *a, *b;
    struct span data;
    unsigned first, pongs = 0;

    (void)state;
    start_with("--socket-buffer", "4096");
    a = join(0);
    b = join(1);
    memset(payload, 'p', sizeof payload);
    for (int i = 0; i < 2000; i++) {
        say_frame(a, 0x89, payload, sizeof payload);
        if (a->out_len > 0)
            break;
        turns(1);
    }
    say_frame(b, 0x81, "hi", 2);
    turns(2);
    while ((first = hear_frame(a, &data)) != 0 || turn() > 0) {
        turns(1);
        if (first == 0x8a)
            pongs++;
        else
            assert_int_equal(first, 0x81);
    }
    assert_true(pongs >= 1);
    say_frame(a, 0x88, "\x03\xe8", 2);
    turns(4);
    do
        first = hear_frame(a, &data);
    while (first == 0x8a);
    assert_int_equal(first, 0x88);
}

/* ----- facts: reload ---------------------------------------------------- */

/* SHA-256 of "one" and "two" */
#define HASH_ONE                                                             \
    "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
#define HASH_TWO                                                             \
    "3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3"

static char config_text[600];

static const char *
config_with(const char *lines)
{
    (void)snprintf(config_text, sizeof config_text, "%s", lines);
    put_text("config", config_text);
    return path_of("config");
}

static void
a_reload_cuts_off_whose_right_is_gone(void **state)
{
    char tokens[300];
    struct peer *a, *b, *c;

    (void)state;
    put_text("tokens", HASH_ONE " write ws/*\n" HASH_TWO " admin *\n");
    (void)snprintf(tokens, sizeof tokens, "%s", path_of("tokens"));
    start_with("--tokens", tokens);
    a = join_path(0, "/ws/room?token=one");
    b = join_path(1, "/ws/room?token=two");
    c = join_path(2, "/ws/room?token=one");
    put_text("tokens", HASH_ONE " read ws/*\n" HASH_TWO " admin *\n");
    assert_int_equal(collabd_reload(s), 0);
    turns(3);
    expect_nothing(a);
    say_frame(b, 0x81, "hi", 2);
    turns(2);
    expect_frame(a, 0x81, "hi");
    expect_frame(c, 0x81, "hi");
    say_frame(a, 0x81, "may I?", 6);
    turns(2);
    expect_close(a, 4403);
    expect_nothing(b);
    put_text("tokens", HASH_ONE " read ws/other\n");
    assert_int_equal(collabd_reload(s), 0);
    turns(3);
    expect_close(b, 4401);
    expect_close(c, 4403);
}

static void
a_bad_reload_changes_nothing_and_says_why(void **state)
{
    char tokens[300];
    struct peer *a, *b;

    (void)state;
    put_text("tokens", HASH_ONE " write *\n");
    (void)snprintf(tokens, sizeof tokens, "%s", path_of("tokens"));
    start_with("--tokens", tokens);
    a = join_path(0, "/ws/room?token=one");
    (void)test_said("");
    put_text("tokens", HASH_ONE " write *\nrubbish\n");
    assert_int_equal(collabd_reload(s), -1);
    assert_true(test_said("tokens:2: the first word"));
    assert_int_equal(unlink(tokens), 0);
    assert_int_equal(collabd_reload(s), -1);
    assert_true(test_said("reload failed"));
    b = join_path(1, "/ws/room?token=one");
    say_frame(a, 0x81, "hi", 2);
    turns(2);
    expect_frame(b, 0x81, "hi");
    assert_true(s->count.reloads_failed == 2 && s->count.reloads == 0);
}

static void
a_bad_config_file_leaves_the_old_settings(void **state)
{
    (void)state;
    start_with("--config", config_with("ping-interval = 7\n"));
    assert_true(s->cfg->ping_interval == 7);
    (void)config_with("ping-interval = 8\nping-interval = nine\n");
    assert_int_equal(collabd_reload(s), -1);
    assert_true(test_said("config:2: ping-interval is \"nine\""));
    assert_true(s->cfg->ping_interval == 7);
    (void)config_with("ping-interval = 60\n"); /* more than dead-after */
    assert_int_equal(collabd_reload(s), -1);
    assert_true(s->cfg->ping_interval == 7);
    assert_int_equal(unlink(path_of("config")), 0);
    assert_int_equal(collabd_reload(s), -1);
    (void)config_with("ping-interval = 8\n");
    assert_int_equal(collabd_reload(s), 0);
    assert_true(s->cfg->ping_interval == 8);
}

static void
what_needs_a_restart_keeps_its_value_and_is_said(void **state)
{
    (void)state;
    start_with("--config", config_with("socket-buffer = 32K\n"));
    (void)config_with("socket-buffer = 64K\nping-interval = 9\n");
    assert_int_equal(collabd_reload(s), 0);
    assert_true(test_said("socket-buffer has changed; that takes a restart"));
    assert_true(s->cfg->socket_buffer == 32768);
    assert_true(s->cfg->ping_interval == 9);
    turns(2);
}

/* Settings are read into two structs in turn, so what was named at start must
 * not be looked up in either. */
static void
files_are_found_again_however_often_the_config_grows(void **state)
{
    char text[600];

    (void)state;
    put_text("tokens", HASH_ONE " write *\n");
    (void)snprintf(text, sizeof text, "tokens = %s\n", path_of("tokens"));
    start_with("--config", config_with(text));
    for (int i = 0; i < 5; i++) {
        (void)snprintf(text, sizeof text,
                       "%.*shost = a%d.example\ntokens = %s\n", i * 20,
                       "host = b.example   \n"
                       "host = c.example   \n"
                       "host = d.example   \n"
                       "host = e.example   \n"
                       "host = f.example   \n", i, path_of("tokens"));
        (void)config_with(text);
        assert_int_equal(collabd_reload(s), 0);
        collabd_check(s);
        (void)join_path(i, "/ws/room?token=one");
    }
}

static void
tokens_that_vanish_from_the_config_stay_in_force(void **state)
{
    char text[600];
    struct peer *a;

    (void)state;
    put_text("tokens", HASH_ONE " write *\n");
    (void)snprintf(text, sizeof text, "tokens = %s\n", path_of("tokens"));
    start_with("--config", config_with(text));
    (void)config_with("ping-interval = 9\n");
    for (int i = 0; i < 3; i++) {
        assert_int_equal(collabd_reload(s), 0);
        turns(1);
        a = dial(0);
        say_text(a, UPGRADE("/ws/room"));
        turns(3);
        assert_non_null(hear_head(a));
        expect_close(a, 4401);
        hang_up(a);
        turns(2);
        (void)join_path(1, "/ws/room?token=one");
        hang_up(&peers[1]);
        turns(2);
    }
}

static void
rates_that_are_lifted_forgive_all_debts(void **state)
{
    struct peer *a;

    (void)state;
    start_with("--config", config_with("rate-messages = 1\n"));
    a = dial(0);
    for (int i = 0; i < 6; i++) {
        say_text(a, GET("/healthz"));
        turns(3);
    }
    while (hear_status(a) == 200)
        ;
    say_text(a, GET("/healthz"));
    expect_status(a, 429);
    (void)config_with("ping-interval = 9\n");
    assert_int_equal(collabd_reload(s), 0);
    turns(2);
    while (hear_status(a) != 0)
        ;
    say_text(a, GET("/healthz"));
    expect_status(a, 200);
}

/* ----- facts: start ----------------------------------------------------- */

static void
what_cannot_start_says_so_and_leaves_nothing(void **state)
{
    static const struct {
        const char *flag, *value, *said;
    } cases[] = {
        { "--listen", "1.2.3.4:1", "listen 1.2.3.4:1: " },
        { "--listen", "x", "give PORT" },
        { "--listen", "127.0.0.1:99999", "give PORT" },
        { "--tokens", "/nonexistent/tokens", "tokens file /nonexistent" },
        { "--www", "/nonexistent", "www /nonexistent: " },
        { "--config", "/nonexistent/config", "config file /nonexistent" },
        { "--memory", "1M", "--memory allows 1048576" },
        { "--check", NULL, "--check is not for an embedded server" },
        { "--max-clients", "0", "--max-clients: max-clients is \"0\"; it may" },
        { "--nonsense", NULL, "--nonsense: there is no such flag" },
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *flags[] = { cases[i].flag, cases[i].value, NULL };
        assert_false(try_start(flags));
        assert_int_equal(count_fds(), fds_before);
        if (!test_said(cases[i].said))
            fail_msg("%s %s did not say \"%s\"", cases[i].flag, cases[i].value,
                     cases[i].said);
    }
}

static void
a_unix_socket_is_made_and_taken_away(void **state)
{
    char flag[300];
    struct sockaddr_un at = { .sun_family = AF_UNIX };
    struct stat st;
    struct peer *p = &peers[0];

    (void)state;
    (void)snprintf(at.sun_path, sizeof at.sun_path, "%s", path_of("socket"));
    (void)snprintf(flag, sizeof flag, "unix:%s", at.sun_path);
    start_with("--listen", flag, "--unix-mode", "0600");
    assert_int_equal(collabd_port(s, 0) > 0, 1);
    assert_int_equal(collabd_port(s, 1), 0);
    assert_int_equal(collabd_port(s, 2), -1);
    assert_int_equal(stat(at.sun_path, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0600);
    p->fd = socket(AF_UNIX, SOCK_STREAM, 0);
    p->ended = p->failed = false;
    p->at = p->len = p->out_at = p->out_len = 0;
    assert_int_equal(connect(p->fd, (struct sockaddr *)&at, sizeof at), 0);
    say_text(p, GET("/healthz"));
    expect_status(p, 200);
    stop_all();
    assert_int_equal(stat(at.sun_path, &st), -1);
}

/* ----- every call fails once -------------------------------------------- */

enum { SENDER, FIRST, SECOND, FETCHER, ACTORS };

#define SMALL_MESSAGES 12
#define FILE_SIZE 40000

struct outcome {
    bool started, reloaded, drained;
    bool fine[ACTORS];        /* got all that was for it */
    unsigned messages[ACTORS];
};

static char file_text[FILE_SIZE];
static char big_text[40000];

/* A turn, in which 10 ms pass; failures of poll are seen and lived with. */
static int
hard_turn(void)
{
    int answer;

    clock_ms += 10;
    answer = turn();
    for (int i = 0; i < ACTORS; i++)
        hear(&peers[i]);
    return answer;
}

/* Takes the messages a member has; each must be the next. */
static void
take_messages(int i, struct outcome *o)
{
    struct span payload;
    unsigned first;

    while ((first = hear_frame(&peers[i], &payload)) != 0) {
        unsigned n = o->messages[i];
        if (first == 0x8a) {
            o->fine[i] = span_is(payload, "alive");
        } else if (first == 0x82) {
            assert_true(n <= SMALL_MESSAGES);
            if (n < SMALL_MESSAGES) {
                assert_int_equal(span_len(payload), 3000);
                assert_int_equal(*payload.at, 'a' + n);
            } else {
                assert_true(span_equals(
                    payload, span_of(big_text, sizeof big_text)));
            }
            o->messages[i]++;
        } else {
            assert_int_equal(first, 0x88);
        }
    }
}

/* A server's whole life: four clients, messages, a file, a reload, the end. */
static struct outcome
live(void)
{
    struct outcome o = { .started = false };
    char text[3000], www[200], config[200];
    bool upgraded[ACTORS] = { false }, got_head = false;
    size_t body = 0;
    int answer = 0;

    (void)snprintf(www, sizeof www, "%s", path_of("www"));
    (void)snprintf(config, sizeof config, "%s", path_of("config"));
    o.started = try_start((const char *[]){ "--www", www, "--config", config,
                                            "--socket-buffer", "16K", NULL });
    if (!o.started)
        return o;
    for (int i = 0; i < ACTORS; i++) {
        (void)dial(i);
        say_text(&peers[i], i == FETCHER ? GET("/file.txt")
                                         : UPGRADE("/ws/room"));
    }
    for (int t = 0; t < 150; t++) {
        (void)hard_turn();
        for (int i = 0; i < FETCHER; i++)
            if (!upgraded[i] && hear_head(&peers[i]) != NULL)
                upgraded[i] = peers[i].in[9] == '1';
        if (upgraded[0] && upgraded[1] && upgraded[2])
            break;
    }
    for (unsigned i = 0; i <= SMALL_MESSAGES; i++) {
        memset(text, (int)('a' + i), sizeof text);
        if (i < SMALL_MESSAGES)
            say_frame(&peers[SENDER], 0x82, text, sizeof text);
        else
            say_frame(&peers[SENDER], 0x82, big_text, sizeof big_text);
        (void)hard_turn();
        take_messages(FIRST, &o);
        take_messages(SECOND, &o);
    }
    for (int i = 0; i < FETCHER; i++)
        say_frame(&peers[i], 0x89, "alive", 5);
    for (int t = 0; t < 150; t++) {
        (void)hard_turn();
        for (int i = 0; i < FETCHER; i++)
            if (upgraded[i])
                take_messages(i, &o);
        if (!got_head)
            got_head = hear_head(&peers[FETCHER]) != NULL;
        if (got_head)
            body = peers[FETCHER].len - peers[FETCHER].at;
        if (o.fine[0] && o.fine[1] && o.fine[2] && body == FILE_SIZE)
            break;
    }
    o.fine[FETCHER] = body == FILE_SIZE &&
                      memcmp(peers[FETCHER].in + peers[FETCHER].at, file_text,
                             FILE_SIZE) == 0;
    for (int i = FIRST; i < FETCHER; i++)
        o.fine[i] &= o.messages[i] == SMALL_MESSAGES + 1;
    o.reloaded = collabd_reload(s) == 0;
    collabd_check(s);
    (void)hard_turn();
    collabd_stop(s);
    for (int t = 0; t < 250 && answer <= 0; t++)
        answer = hard_turn();
    o.drained = answer == 1;
    return o;
}

static void
prepare_life(void)
{
    (void)mkdir(path_of("www"), 0700);
    for (size_t i = 0; i < sizeof file_text; i++)
        file_text[i] = (char)('!' + i % 90);
    for (size_t i = 0; i < sizeof big_text; i++)
        big_text[i] = (char)('#' + i % 87);
    put_file("www/file.txt", file_text, sizeof file_text);
    put_text("config", "ping-interval = 9\n");
}

static void
a_life_without_failures_is_fine(void **state)
{
    struct outcome o;

    (void)state;
    prepare_life();
    nothing_fails();
    o = live();
    assert_true(o.started && o.reloaded && o.drained);
    for (int i = 0; i < ACTORS; i++)
        assert_true(o.fine[i]);
    for (enum call c = 0; c < CALLS; c++)
        if (calls[c] == 0)
            fail_msg("%s was not called", call_names[c]);
}

/* Every call is failed; under valgrind, which is fifty times slower, one of
 * some. */
static int
every_nth(void)
{
    return getenv("COLLABD_SLOW") == NULL ? 1 : 23;
}

/* Fails one call at a time.  `harmless`: nobody may notice.  Otherwise whose
 * call failed may suffer, and if that is the sender, its hearers may miss what
 * it did not say; everybody else gets everything. */
static void
fail_each(enum call call, int error, bool harmless)
{
    for (int n = 1;; n += every_nth()) {
        struct outcome o;
        int victim = -1;
        let_fail(call, n, 1, error);
        o = live();
        if (!failed) {
            stop_all();
            assert_true(n > 1);
            return; /* a life has no more calls of this kind */
        }
        if (o.started) {
            for (int i = 0; i < ACTORS; i++)
                if (failed_port != 0 &&
                    port_of(peers[i].fd, getsockname) == failed_port)
                    victim = i;
            for (int i = 0; i < ACTORS; i++) {
                bool may_suffer = !harmless &&
                                  (i == victim || victim == SENDER);
                if (!o.fine[i] && !may_suffer)
                    fail_msg("%s no. %d fails with %s: %d suffers (victim %d)",
                             call_names[call], n, strerror(error), i, victim);
            }
            assert_true(o.drained);
        } else {
            assert_false(harmless);
        }
        stop_all();
        (void)test_said("");
    }
}

static void
a_poll_that_fails_hurts_nobody(void **state)
{
    (void)state;
    prepare_life();
    fail_each(CALL_PPOLL, EINTR, true);
    fail_each(CALL_PPOLL, ENOMEM, true);
}

static void
an_accept_that_fails_hurts_nobody(void **state)
{
    (void)state;
    prepare_life();
    fail_each(CALL_ACCEPT4, EINTR, true);
    fail_each(CALL_ACCEPT4, ECONNABORTED, true);
    fail_each(CALL_ACCEPT4, EPERM, true);
    fail_each(CALL_ACCEPT4, ENOMEM, true);
}

static void
a_recv_that_fails_hurts_its_client_only(void **state)
{
    (void)state;
    prepare_life();
    fail_each(CALL_RECV, EAGAIN, true);
    fail_each(CALL_RECV, EINTR, true);
    fail_each(CALL_RECV, ECONNRESET, false);
}

static void
a_send_that_fails_hurts_its_client_only(void **state)
{
    (void)state;
    prepare_life();
    fail_each(CALL_SEND, EAGAIN, true);
    fail_each(CALL_SEND, ENOBUFS, true);
    fail_each(CALL_SEND, EPIPE, false);
    fail_each(CALL_SENDMSG, EAGAIN, true);
    fail_each(CALL_SENDMSG, ECONNRESET, false);
}

/* Files: a start that fails, a reload that fails, one file that is not sent. */
static void
fail_each_file_call(enum call call, int error)
{
    for (int n = 1;; n += every_nth()) {
        struct outcome o;
        let_fail(call, n, 1, error);
        o = live();
        if (!failed) {
            stop_all();
            assert_true(n > 1);
            return;
        }
        if (o.started) {
            assert_true(o.drained);
            for (int i = 0; i < FETCHER; i++)
                assert_true(o.fine[i]);
        }
        stop_all();
        (void)test_said("");
    }
}

static void
a_file_that_cannot_be_had_hurts_no_channel(void **state)
{
    (void)state;
    prepare_life();
    fail_each_file_call(CALL_OPENAT, EMFILE);
    fail_each_file_call(CALL_OPENAT, EACCES);
    fail_each_file_call(CALL_READ, EIO);
    fail_each_file_call(CALL_PREAD, EIO);
}

static void
a_close_that_fails_is_a_close(void **state)
{
    (void)state;
    prepare_life();
    fail_each_file_call(CALL_CLOSE, EIO);
    fail_each_file_call(CALL_CLOSE, EINTR);
}

static void
without_memory_it_does_not_start_and_says_so(void **state)
{
    (void)state;
    prepare_life();
    for (int n = 1; n <= 2; n++) {
        struct outcome o;
        let_fail(CALL_CALLOC, n, 1, ENOMEM);
        o = live();
        assert_false(o.started);
        assert_int_equal(count_fds(), fds_before);
        assert_true(test_said("memory"));
        stop_all();
    }
    fail_each_file_call(CALL_CALLOC, ENOMEM);
}

/* ----- beginning and end ------------------------------------------------ */

static int
begin_all(void **state)
{
    (void)state;
    (void)strcpy(folder, "/tmp/collabd-test-XXXXXX");
    assert_non_null(mkdtemp(folder));
    for (size_t i = 0; i < sizeof peers / sizeof *peers; i++)
        peers[i].fd = -1;
    sys.clock_gettime = fake_clock;
    sys.ppoll = failing_ppoll;
    sys.accept4 = failing_accept4;
    sys.recv = failing_recv;
    sys.send = failing_send;
    sys.sendmsg = failing_sendmsg;
    sys.openat = failing_openat;
    sys.read = failing_read;
    sys.pread = failing_pread;
    sys.close = failing_close;
    sys.calloc = failing_calloc;
    nothing_fails();
    test_listen_in();
    return 0;
}

static int
end_all(void **state)
{
    static const char *const files[] = { "www/file.txt", "tokens", "config",
                                         "socket" };

    (void)state;
    test_listen_no_more();
    for (size_t i = 0; i < sizeof files / sizeof *files; i++)
        (void)unlink(path_of(files[i]));
    (void)rmdir(path_of("www"));
    return rmdir(folder);
}

static int
end_one(void **state)
{
    (void)state;
    stop_all();
    (void)test_said("");
    return 0;
}

#define fact(f) cmocka_unit_test_teardown(f, end_one)

int
main(void)
{
    const struct CMUnitTest tests[] = {
        fact(what_one_says_the_others_hear),
        fact(bytes_behind_the_head_are_part_of_the_stream),
        fact(every_split_of_a_conversation_gives_the_same),
        fact(a_conversation_byte_by_byte_is_understood),
        fact(a_close_is_answered_with_its_code_and_ends),
        fact(each_offence_is_closed_with_its_code_and_hurts_nobody),
        fact(nothing_comes_between_the_parts_of_a_close),
        fact(a_client_that_is_closing_keeps_no_memory),
        fact(a_message_of_the_most_passes_and_one_more_byte_does_not),
        fact(requests_in_one_packet_are_answered_in_order),
        fact(a_refusal_that_leaves_bytes_unread_ends_the_connection),
        fact(the_longest_metrics_fit_into_a_reply),
        fact(a_slow_head_gets_408_and_silence_gets_nothing),
        fact(a_reply_does_not_hold_its_buffer_while_it_lingers),
        fact(who_waits_too_long_for_a_request_buffer_gets_503),
        fact(a_silent_client_is_pinged_and_then_dropped),
        fact(any_byte_is_a_sign_of_life),
        fact(a_message_that_trickles_for_ever_ends_by_its_deadline),
        fact(a_stream_that_is_never_between_messages_may_go_on),
        fact(without_clients_it_sleeps_for_ever),
        fact(who_is_over_its_rate_waits_and_is_read_later),
        fact(a_drain_says_1001_to_all_and_is_over_when_they_are_gone),
        fact(a_drain_takes_two_seconds_at_most),
        fact(free_ends_everything_at_any_moment),
        fact(one_client_too_many_gets_503_and_then_a_place),
        fact(ten_refusals_a_second_and_then_the_listener_rests),
        fact(out_of_descriptors_it_refuses_by_the_spare_one),
        fact(a_machine_short_of_buffers_is_left_alone_for_a_second),
        fact(one_room_too_many_gets_503),
        fact(a_coalescing_room_may_lose_its_members_and_its_slot),
        fact(coalesced_messages_come_together_when_they_are_due),
        fact(memory_touched_at_start_is_still_good),
        fact(a_dry_pool_of_receivers_starves_nobody_for_long),
        fact(who_stops_reading_is_cut_loose_and_the_others_hear_all),
        fact(unsent_pongs_are_forgotten_and_nothing_else),
        fact(a_flood_of_pings_costs_pongs_but_never_the_close),
        fact(a_reload_cuts_off_whose_right_is_gone),
        fact(a_bad_reload_changes_nothing_and_says_why),
        fact(a_bad_config_file_leaves_the_old_settings),
        fact(what_needs_a_restart_keeps_its_value_and_is_said),
        fact(files_are_found_again_however_often_the_config_grows),
        fact(tokens_that_vanish_from_the_config_stay_in_force),
        fact(rates_that_are_lifted_forgive_all_debts),
        fact(what_cannot_start_says_so_and_leaves_nothing),
        fact(a_unix_socket_is_made_and_taken_away),
        fact(a_life_without_failures_is_fine),
        fact(a_poll_that_fails_hurts_nobody),
        fact(an_accept_that_fails_hurts_nobody),
        fact(a_recv_that_fails_hurts_its_client_only),
        fact(a_send_that_fails_hurts_its_client_only),
        fact(a_file_that_cannot_be_had_hurts_no_channel),
        fact(a_close_that_fails_is_a_close),
        fact(without_memory_it_does_not_start_and_says_so),
    };
    return cmocka_run_group_tests(tests, begin_all, end_all);
}
