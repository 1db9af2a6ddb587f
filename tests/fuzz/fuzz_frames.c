/* SPDX-License-Identifier: MIT */
/* A whole server whose sockets and clock are made up.  The input is a list of
 * things that happen; collabd_check runs after every turn.  Besides, whatever
 * the peers do:
 *   - each gets responses, then frames, as the RFCs say, and nothing behind a
 *     Close;
 *   - when nothing happens the server sleeps;
 *   - when all peers read, all of them get everything, and what they sent is
 *     read;
 *   - at the end everything is given back.
 *
 *   first byte     settings: 1 coalesce, 2 rates, 4 max-per-ip, 8 a long ring
 *                  of small pools
 *   then           one byte per event: xxxyyzzz, z the event, y the client, x
 *                  its parameter; some events have bytes of their own
 */
#include "fuzz.h"

#define CLIENTS 4
#define FIRST_FD 100000

/* ----- made-up sockets -------------------------------------------------- */

enum phase { PHASE_HEAD, PHASE_BODY, PHASE_FRAMES, PHASE_CLOSED };

struct peer {
    bool used;           /* it has tried to connect */
    bool accepted, shut; /* the server has taken it, has closed it */
    bool ended, reset;   /* the peer's side has ended, or broken */
    uint8_t *in;         /* what the server is yet to read */
    size_t in_at, in_len, in_room;
    size_t window;       /* bytes the peer still takes */
    /* what the server has sent, as the peer sees it */
    enum phase phase;
    uint8_t head[16384]; /* a response's head, or a frame's */
    size_t head_len;
    uint64_t left;       /* of a body, or of a frame */
    uint8_t opcode;
    struct utf8 utf8;
};

static struct peer peers[64]; /* in the order of their connecting */
static unsigned peers_used;
static int current[CLIENTS];  /* who plays that client now; -1: nobody */

static unsigned pending[64], pending_at, pending_len; /* not yet accepted */

static unsigned failing_accepts, failing_sends, failing_recvs;
static int64_t clock_ms;
static int ready_last; /* what poll answered */

static struct peer *
peer_of(int fd)
{
    assert(fd >= FIRST_FD && fd < FIRST_FD + (int)peers_used);
    return &peers[fd - FIRST_FD];
}

static int
fake_clock(clockid_t id, struct timespec *t)
{
    (void)id;
    *t = (struct timespec){ .tv_sec = clock_ms / 1000,
                            .tv_nsec = clock_ms % 1000 * 1000000 };
    return 0;
}

static short
peer_events(const struct peer *p, short want)
{
    short got = 0;

    if (p->in_at < p->in_len || p->ended)
        got |= POLLIN;
    if (p->window > 0)
        got |= POLLOUT;
    got &= want;
    if (p->reset)
        got |= POLLERR | POLLHUP;
    return got;
}

static int
fake_ppoll(struct pollfd *fds, nfds_t n, const struct timespec *t,
           const sigset_t *mask)
{
    (void)t, (void)mask;
    ready_last = 0;
    for (nfds_t i = 0; i < n; i++) {
        if (fds[i].fd < 0)
            fds[i].revents = 0;
        else if (fds[i].fd < FIRST_FD)
            fds[i].revents = pending_at < pending_len ? fds[i].events & POLLIN
                                                      : 0;
        else
            fds[i].revents = peer_events(peer_of(fds[i].fd), fds[i].events);
        ready_last += fds[i].revents != 0;
    }
    return ready_last;
}

static int
fake_accept4(int fd, struct sockaddr *at, socklen_t *len, int flags)
{
    unsigned i;

    (void)fd, (void)flags;
    if (failing_accepts > 0) {
        failing_accepts--;
        errno = EMFILE;
        return -1;
    }
    if (pending_at == pending_len) {
        errno = EAGAIN;
        return -1;
    }
    i = pending[pending_at++];
    if (at != NULL) {
        struct sockaddr_in v4 = { .sin_family = AF_INET,
                                  .sin_addr = { htonl(0x0a000000 + i % 2) } };
        memcpy(at, &v4, sizeof v4);
        *len = sizeof v4;
    }
    peers[i].accepted = true;
    return FIRST_FD + (int)i;
}

static ssize_t
fake_recv(int fd, void *to, size_t len, int flags)
{
    struct peer *p = peer_of(fd);
    size_t n = p->in_len - p->in_at;

    (void)flags;
    assert(p->accepted && !p->shut && len > 0);
    if (failing_recvs > 0 && n > 0) {
        failing_recvs--;
        errno = failing_recvs % 2 == 0 ? EAGAIN : EINTR;
        return -1;
    }
    if (p->reset) {
        errno = ECONNRESET;
        return -1;
    }
    if (n == 0 && p->ended)
        return 0;
    if (n == 0) {
        errno = EAGAIN;
        return -1;
    }
    if (n > len)
        n = len;
    memcpy(to, p->in + p->in_at, n);
    p->in_at += n;
    return (ssize_t)n;
}

/* ----- what a peer makes of what it gets -------------------------------- */

static void
peer_takes_head(struct peer *p, uint8_t b)
{
    const char *text = (const char *)p->head, *length;
    int status;

    assert(p->head_len + 1 < sizeof p->head);
    p->head[p->head_len++] = b;
    p->head[p->head_len] = '\0';
    if (p->head_len == 9)
        assert(memcmp(text, "HTTP/1.1 ", 9) == 0);
    if (p->head_len < 4 || memcmp(text + p->head_len - 4, "\r\n\r\n", 4) != 0)
        return;
    status = atoi(text + 9);
    assert(status >= 101 && status < 600);
    p->head_len = 0;
    if (status == 101) {
        p->phase = PHASE_FRAMES;
        return;
    }
    length = strstr(text, "\r\nContent-Length: ");
    assert(length != NULL || status == 204 || status == 304);
    p->left = length == NULL ? 0 : strtoull(length + 18, NULL, 10);
    p->phase = p->left > 0 ? PHASE_BODY : PHASE_HEAD;
}

static void
peer_ends_frame(struct peer *p)
{
    if (p->opcode == WSLAY_TEXT_FRAME)
        assert(utf8_is_complete(&p->utf8));
    p->phase = p->opcode == WSLAY_CONNECTION_CLOSE ? PHASE_CLOSED
                                                    : PHASE_FRAMES;
    p->head_len = 0;
}

/* RFC 6455 5.2, as a client must see it: final, no RSV, no mask, the shortest
 * length. */
static void
peer_takes_frame_head(struct peer *p, uint8_t b)
{
    size_t need;

    p->head[p->head_len++] = b;
    if (p->head_len < 2)
        return;
    need = p->head[1] < 126 ? 2 : p->head[1] == 126 ? 4 : 10;
    if (p->head_len < need)
        return;
    p->opcode = p->head[0] & 15;
    assert(p->head[0] >> 4 == 8);
    assert(p->head[1] < 128);
    assert(p->opcode == 1 || p->opcode == 2 ||
           (p->opcode >= 8 && p->opcode <= 10 && p->head[1] < 126));
    p->left = need == 2 ? p->head[1] : 0;
    for (size_t i = 2; i < need; i++)
        p->left = p->left << 8 | p->head[i];
    assert(need == ws_header_len(p->left));
    p->utf8 = (struct utf8){ 0, 0, 0 };
    if (p->opcode == WSLAY_CONNECTION_CLOSE)
        assert(p->left != 1);
    if (p->left == 0)
        peer_ends_frame(p);
    else
        p->head_len = 100; /* in the payload */
}

static void
peer_takes(struct peer *p, const uint8_t *from, size_t len)
{
    for (const uint8_t *end = from + len; from < end;) {
        size_t n = (size_t)(end - from);
        switch (p->phase) {
        case PHASE_HEAD:
            peer_takes_head(p, *from++);
            continue;
        case PHASE_CLOSED:
            assert(false); /* nothing comes behind a Close */
            return;
        case PHASE_BODY:
            n = p->left < n ? (size_t)p->left : n;
            p->left -= n;
            p->phase = p->left > 0 ? PHASE_BODY : PHASE_HEAD;
            from += n;
            continue;
        case PHASE_FRAMES:
            if (p->head_len < 100) {
                peer_takes_frame_head(p, *from++);
                continue;
            }
            n = p->left < n ? (size_t)p->left : n;
            if (p->opcode == WSLAY_TEXT_FRAME)
                assert(utf8_check(&p->utf8, span_of(from, n)));
            p->left -= n;
            from += n;
            if (p->left == 0)
                peer_ends_frame(p);
            continue;
        }
    }
}

static ssize_t
fake_sendmsg(int fd, const struct msghdr *m, int flags)
{
    struct peer *p = peer_of(fd);
    size_t sent = 0;

    (void)flags;
    assert(p->accepted && !p->shut);
    if (p->reset) {
        errno = EPIPE;
        return -1;
    }
    if (failing_sends > 0 || p->window == 0) {
        failing_sends -= failing_sends > 0;
        errno = failing_sends % 2 == 0 ? EAGAIN : ENOBUFS;
        return -1;
    }
    for (size_t i = 0; i < m->msg_iovlen && p->window > 0; i++) {
        size_t n = m->msg_iov[i].iov_len;
        n = n < p->window ? n : p->window;
        peer_takes(p, m->msg_iov[i].iov_base, n);
        p->window -= n;
        sent += n;
    }
    return (ssize_t)sent;
}

static ssize_t
fake_send(int fd, const void *from, size_t len, int flags)
{
    struct iovec v = { (void *)(uintptr_t)from, len };
    struct msghdr m = { .msg_iov = &v, .msg_iovlen = 1 };

    return fake_sendmsg(fd, &m, flags);
}

static int
fake_close(int fd)
{
    struct peer *p;

    if (fd < FIRST_FD)
        return close(fd);
    p = peer_of(fd);
    assert(p->accepted && !p->shut);
    p->shut = true;
    return 0;
}

/* ----- events ----------------------------------------------------------- */

static struct collabd *s;
static bool over; /* collabd_step has said so */

/* Lists that live only within a turn, or over turns with --coalesce. */
static void
check_lists(void)
{
    unsigned dirty = 0;

    assert(s->flush_first == NONE || over);
    for (uint16_t i = s->dirty_first; i != NONE; i = s->rooms[i].dirty_next) {
        assert(s->rooms[i].used && s->rooms[i].dirty);
        assert(++dirty <= s->rooms_fresh);
    }
    for (unsigned i = 0; i < s->rooms_fresh; i++)
        dirty -= s->rooms[i].used && s->rooms[i].dirty;
    assert(dirty == 0);
}

static void
turn(int64_t ms)
{
    int answer;

    if (over)
        return;
    clock_ms += ms;
    answer = collabd_step(s, 0);
    assert(answer == 0 || (answer == 1 && s->stopping));
    over = answer == 1;
    collabd_check(s);
    check_lists();
}

static void
say(int client, const void *bytes, size_t len)
{
    struct peer *p;

    if (current[client] < 0)
        return;
    p = &peers[current[client]];
    if (len == 0 || p->ended || p->reset || p->in_len + len > 1 << 18)
        return;
    if (p->in_len + len > p->in_room) {
        p->in_room = 2 * (p->in_len + len);
        p->in = realloc(p->in, p->in_room);
    }
    memcpy(p->in + p->in_len, bytes, len);
    p->in_len += len;
}

#define REQUEST(target, more)                                                \
    "GET " target " HTTP/1.1\r\nHost: localhost\r\n" more "\r\n"
#define UPGRADE(target)                                                      \
    REQUEST(target, "Upgrade: websocket\r\nConnection: Upgrade\r\n"          \
                    "Sec-WebSocket-Version: 13\r\n"                          \
                    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n")

static void
connect_client(int client, unsigned how)
{
    static const char *const words[8] = {
        "", UPGRADE("/ws/a"), UPGRADE("/ws/a?echo=1&history=99"),
        UPGRADE("/ws/b"), UPGRADE("/ws/a") "\x81\x83\0\0\0\0abc",
        REQUEST("/healthz", ""), REQUEST("/metrics", ""),
        REQUEST("/", "Connection: close\r\n"),
    };

    if (peers_used == sizeof peers / sizeof *peers)
        return;
    current[client] = (int)peers_used;
    peers[peers_used] = (struct peer){ .used = true, .window = SIZE_MAX / 2 };
    pending[pending_len++] = peers_used++;
    say(client, words[how],
        how == 4 ? sizeof UPGRADE("/ws/a") - 1 + 9 : strlen(words[how]));
}

/* A masked frame of a chosen length; its bytes are ASCII, or not. */
static void
say_frame(int client, uint8_t first, uint8_t shape)
{
    static const uint32_t lengths[16] = { 0,    1,     2,     5,     125,  126,
                                          127,  200,   1000,  4096,  16379,
                                          16380, 40000, 65535, 65536, 70001 };
    uint32_t len = lengths[shape & 15];
    uint8_t header[14], *payload;
    struct out o = out_over(header, sizeof header);

    ws_header(&o, first & 15, len);
    header[0] = first;
    header[1] |= 0x80;
    out_bytes(&o, "\1\2\3\4", 4);
    assert(!o.full);
    payload = malloc(len + 1);
    for (uint32_t i = 0; i < len; i++)
        payload[i] = (uint8_t)(((shape & 16) != 0 ? 0xc3 - (i & 1) * 0x20
                                                  : 'a' + i % 26) ^
                               (1 + i % 4));
    say(client, header, (size_t)(o.at - header));
    say(client, payload, len);
    free(payload);
}

static uint8_t
next(struct span *in)
{
    return span_is_empty(*in) ? 0 : *in->at++;
}

static void
end_client(int client, unsigned how)
{
    struct peer *p;

    if (current[client] < 0)
        return;
    p = &peers[current[client]];
    if (how & 1)
        p->reset = true;
    else
        p->ended = true;
    if (how & 2)
        current[client] = -1;
}

static void
event(uint8_t b, struct span *in)
{
    static const size_t windows[8] = { 0, 1, 7, 100, 4096, 20000, 100000,
                                       SIZE_MAX / 2 };
    static const int64_t times[8] = { 0, 1, 10, 100, 1000, 3000, 11000, 26000 };
    int client = b >> 3 & 3;
    unsigned how = b >> 5;
    size_t n;

    switch (b & 7) {
    case 0:
        connect_client(client, how);
        break;
    case 1: /* bytes as they are */
        n = next(in);
        n = n < span_len(*in) ? n : span_len(*in);
        say(client, in->at, n);
        in->at += n;
        if (how & 1)
            turn(0);
        break;
    case 2: /* a frame */
        b = next(in);
        say_frame(client, b, next(in));
        break;
    case 3: /* many small messages */
        for (n = 1u << how; n > 0; n--)
            say(client, "\x82\x81\0\0\0\0x", 7);
        break;
    case 4:
        turn(times[how]);
        break;
    case 5:
        end_client(client, how);
        break;
    case 6:
        if (current[client] >= 0)
            peers[current[client]].window = windows[how];
        break;
    case 7:
        if (how == 0)
            failing_accepts = 3;
        else if (how == 1)
            failing_sends = 3;
        else if (how == 2)
            failing_recvs = 3;
        else if (how == 3)
            (void)collabd_reload(s);
        else if (how == 4)
            collabd_stop(s);
        else
            turn(0);
        break;
    }
}

/* ----- what must hold when all is quiet --------------------------------- */

/* Turns until the server would sleep. */
static void
let_it_settle(void)
{
    for (int i = 0; i < 2000; i++) {
        turn(0);
        if (over || (ready_last == 0 && loop_timeout(s, -1) != 0))
            return;
    }
    assert(false); /* it spins */
}

static void
check_delivery(void)
{
    for (unsigned i = 0; i < s->conns_fresh; i++) {
        const struct conn *c = &s->conns[i];
        const struct peer *p;
        if (c->state != CONN_OPEN || c->in.room == NONE)
            continue;
        p = peer_of(c->fd);
        assert(!c->blocked);
        assert(room_lag(&s->rooms[c->in.room], c) == 0);
        if (!c->starved && !conn_is_in_debt(c))
            assert(p->in_at == p->in_len);
    }
}

static void
finish(void)
{
    failing_accepts = failing_sends = failing_recvs = 0;
    let_it_settle();
    for (unsigned i = 0; i < peers_used; i++)
        peers[i].window = SIZE_MAX / 2;
    let_it_settle();
    for (int i = 0; i < 5; i++) { /* what was gathered, or held, is due */
        turn(100);
        let_it_settle();
    }
    if (!s->stopping)
        check_delivery();
    collabd_stop(s);
    for (int i = 0; i < 25; i++)
        turn(100);
    assert(over); /* two seconds at most */
    collabd_free(s);
    for (unsigned i = 0; i < peers_used; i++) {
        assert(peers[i].accepted == peers[i].shut);
        free(peers[i].in);
    }
}

int
LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc, (void)argv;
    fuzz_quiet();
    sys.clock_gettime = fake_clock;
    sys.ppoll = fake_ppoll;
    sys.accept4 = fake_accept4;
    sys.recv = fake_recv;
    sys.send = fake_send;
    sys.sendmsg = fake_sendmsg;
    sys.close = fake_close;
    return 0;
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    char *argv[40] = { "collabd", "--listen=127.0.0.1:0", "--max-clients=3",
                       "--max-rooms=2", "--max-requests=2",
                       "--receive-buffers=2", "--max-message=70000",
                       "--message-memory=210000" };
    struct span in = span_of(data, len);
    uint8_t how = next(&in);
    int argc = 8;

    if (how & 1)
        argv[argc++] = "--coalesce=50";
    if (how & 2) {
        argv[argc++] = "--rate-messages=5";
        argv[argc++] = "--rate-bytes=100K";
    }
    if (how & 4)
        argv[argc++] = "--max-per-ip=1";
    if (how & 8) {
        argv[argc++] = "--receive-buffers=1";
        argv[argc++] = "--max-requests=1";
        argv[argc++] = "--max-rooms=1";
    }
    argv[argc++] = "--syslog";
    argv[argc++] = "--log-level=debug";
    clock_ms = 1000000;
    over = false;
    peers_used = pending_at = pending_len = 0;
    failing_accepts = failing_sends = failing_recvs = 0;
    for (int i = 0; i < CLIENTS; i++)
        current[i] = -1;
    s = collabd_init(argc, argv);
    assert(s != NULL);
    while (!span_is_empty(in))
        event(next(&in), &in);
    finish();
    return 0;
}
