/* SPDX-License-Identifier: MIT */
/* Members of a document: a whole server whose sockets, clock, disk and threads
 * are made up, and editors that write, read, fall behind, leave and come back
 * while the disk fills up and memory runs dry.  After every turn, or now and
 * then while documents are long, collabd_check runs, and each document's own
 * sums are compared.  Besides:
 *   - what a member is sent are whole messages of the protocol: updates that
 *     y_check accepts, awareness that y_aware_check accepts;
 *   - what a member was sent is never taken back;
 *   - when all is quiet, who reads everything has everything, to the byte if
 *     nothing is cleaned; who writes and was asked again has lost nothing;
 *   - who comes last gets, in one SyncStep2, what all the others have;
 *   - when all have left, the documents close, their memory is all given back,
 *     and the disk has what they had.
 *
 *   first byte     settings: 1 on a disk, 2 --fsync always, 4 + 8 --gc,
 *                  16 --coalesce, 32 little memory, 64 short documents,
 *                  128 short messages
 *   then           one byte per event: xxxyyzzz, z the event, y the member
 *                  (2 may only read), x its parameter; most events have bytes
 *                  of their own
 */
#include "fuzz.h"

#define MEMBERS 4
#define READER 2
#define PEERS 48
#define FIRST_FD 100000
#define DISK_FD 200000 /* the folder; + 1 its lock; from + 10 on, files */

static struct collabd *s;
static int64_t clock_ms;

/* ----- bytes that grow -------------------------------------------------- */

struct bytes {
    uint8_t *at;
    size_t len, room;
};

static void
bytes_add(struct bytes *b, const void *from, size_t len)
{
    if (b->len + len > b->room) {
        b->room = 2 * (b->len + len);
        b->at = realloc(b->at, b->room);
        assert(b->at != NULL);
    }
    if (len > 0)
        memcpy(b->at + b->len, from, len);
    b->len += len;
}

static struct span
bytes_span(const struct bytes *b)
{
    return span_of(b->at, b->len);
}

static void
bytes_free(struct bytes *b)
{
    free(b->at);
    *b = (struct bytes){ NULL, 0, 0 };
}

/* Adds an update to a run. */
static void
run_add(struct bytes *run, struct span update)
{
    uint8_t head[10];
    struct out o = out_over(head, sizeof head);

    out_uint(&o, span_len(update));
    bytes_add(run, head, (size_t)(o.at - head));
    bytes_add(run, update.at, span_len(update));
}

/* ----- a made-up disk --------------------------------------------------- */

struct disk_file {
    char name[JRNL_PATH]; /* empty: it has none any more */
    struct bytes data;
    unsigned fds;
};

static struct disk_file files[16];
static struct disk_file *fds[64];
static size_t disk_room; /* bytes that it still takes */
static bool disk_opens, disk_renames, disk_syncs, disk_cuts, memory_is_dry;

static void
disk_heal(void)
{
    disk_room = SIZE_MAX;
    disk_opens = disk_renames = disk_syncs = disk_cuts = true;
    memory_is_dry = false;
}

static struct disk_file *
file_of(int fd)
{
    assert(fd >= DISK_FD + 10 && fd < DISK_FD + 10 + 64);
    assert(fds[fd - DISK_FD - 10] != NULL);
    return fds[fd - DISK_FD - 10];
}

static struct disk_file *
file_named(const char *name)
{
    for (size_t i = 0; i < sizeof files / sizeof *files; i++)
        if (strcmp(files[i].name, name) == 0)
            return &files[i];
    return NULL;
}

static void
file_unname(struct disk_file *f)
{
    f->name[0] = '\0';
    if (f->fds == 0)
        bytes_free(&f->data);
}

static int
fake_openat(int folder, const char *name, int how, ...)
{
    struct disk_file *f;
    int fd = 0;

    if (folder != DISK_FD) {
        va_list args;
        mode_t mode;
        va_start(args, how);
        mode = (how & O_CREAT) != 0 ? va_arg(args, mode_t) : 0;
        va_end(args);
        return openat(folder, name, how, mode);
    }
    f = file_named(name);
    errno = f == NULL && (how & O_CREAT) == 0 ? ENOENT : EIO;
    if (!disk_opens || (f == NULL && (how & O_CREAT) == 0))
        return -1;
    for (size_t i = 0; f == NULL; i++) {
        assert(i < sizeof files / sizeof *files);
        if (files[i].name[0] == '\0' && files[i].fds == 0)
            f = &files[i];
    }
    (void)snprintf(f->name, sizeof f->name, "%s", name);
    if ((how & O_TRUNC) != 0)
        f->data.len = 0;
    while (fds[fd] != NULL)
        fd++;
    fds[fd] = f;
    f->fds++;
    return DISK_FD + 10 + fd;
}

static ssize_t
fake_pread(int fd, void *to, size_t len, off_t at)
{
    struct disk_file *f = file_of(fd);

    if ((size_t)at >= f->data.len)
        return 0;
    len = len < f->data.len - (size_t)at ? len : f->data.len - (size_t)at;
    memcpy(to, f->data.at + at, len);
    return (ssize_t)len;
}

static ssize_t
fake_pwritev(int fd, const struct iovec *parts, int count, off_t at)
{
    struct disk_file *f = file_of(fd);
    size_t done = 0;

    assert((size_t)at == f->data.len);
    for (int i = 0; i < count; i++) {
        size_t n = parts[i].iov_len < disk_room ? parts[i].iov_len : disk_room;
        bytes_add(&f->data, parts[i].iov_base, n);
        done += n;
        disk_room -= disk_room == SIZE_MAX ? 0 : n;
    }
    errno = ENOSPC;
    return done > 0 ? (ssize_t)done : -1;
}

static int
disk_answer(bool good)
{
    errno = EIO;
    return good ? 0 : -1;
}

static int
fake_ftruncate(int fd, off_t len)
{
    struct disk_file *f = file_of(fd);

    assert((size_t)len <= f->data.len);
    if (disk_cuts)
        f->data.len = (size_t)len;
    return disk_answer(disk_cuts);
}

static int
fake_sync(int fd)
{
    (void)fd;
    return disk_answer(disk_syncs);
}

static int
fake_renameat(int from_fd, const char *from, int to_fd, const char *to)
{
    struct disk_file *f = file_named(from), *old = file_named(to);

    (void)from_fd, (void)to_fd;
    if (disk_renames && f == NULL) {
        errno = ENOENT;
        return -1;
    }
    if (disk_renames && old != NULL)
        file_unname(old);
    if (disk_renames)
        (void)snprintf(f->name, sizeof f->name, "%s", to);
    return disk_answer(disk_renames);
}

static int
fake_unlinkat(int folder, const char *name, int how)
{
    struct disk_file *f = file_named(name);

    (void)folder, (void)how;
    if (f == NULL) {
        errno = ENOENT;
        return -1;
    }
    file_unname(f);
    return 0;
}

static int
fake_faccessat(int folder, const char *name, int mode, int how)
{
    (void)folder, (void)mode, (void)how;
    errno = ENOENT;
    return file_named(name) == NULL ? -1 : 0;
}

static int
fake_fstat(int fd, struct stat *st)
{
    struct disk_file *f = file_of(fd);

    *st = (struct stat){ .st_mode = S_IFREG | 0600,
                         .st_size = (off_t)f->data.len,
                         .st_nlink = f->name[0] != '\0' };
    return 0;
}

static void *
fake_mmap(void *at, size_t len, int prot, int how, int fd, off_t from)
{
    return memory_is_dry ? MAP_FAILED : mmap(at, len, prot, how, fd, from);
}

static void *
fake_mremap(void *at, size_t old, size_t len, int how, ...)
{
    return memory_is_dry ? MAP_FAILED : mremap(at, old, len, how);
}

/* ----- made-up threads --------------------------------------------------
 * They run when the input says so: each takes one job, and is done. */

static int
fake_pthread_create(pthread_t *id, const pthread_attr_t *attr,
                    void *(*run)(void *), void *lane)
{
    (void)id, (void)attr, (void)run, (void)lane;
    return 0;
}

static bool
thread_runs(void)
{
    bool ran = false;

    for (unsigned i = 0; i < WORK_LANES; i++) {
        struct work_list *todo = &s->work.lane[i].todo;
        struct work *w = todo->first;
        if (w == NULL)
            continue;
        todo->first = w->next;
        w->run(w);
        work_list_add(&s->work.done, w);
        ran = true;
    }
    return ran;
}

/* ----- members ---------------------------------------------------------- */

struct peer {
    bool accepted, shut; /* the server has taken it, has closed it */
    bool ended, reset;   /* the peer's side has ended, or broken */
    bool closed;         /* it was sent a Close */
    bool writes;
    bool asked;          /* for what the server lacks */
    bool plain;          /* has asked for everything once, and sent nothing */
    bool lied;           /* about what it has, perhaps */
    unsigned synced;     /* SyncStep2 it was sent */
    char doc;
    struct bytes in;     /* what the server is yet to read, from in_at on */
    size_t in_at;
    size_t window;       /* bytes the peer still takes */
    struct bytes out;    /* of a head or frame that is not whole yet */
    bool upgraded;
    struct bytes run;    /* the updates that it has, as they came */
};

static struct peer peers[PEERS]; /* in the order of their connecting */
static unsigned peers_used, peers_accepted;
static int current[MEMBERS];     /* who plays that member now; -1: nobody */
static int ready_last;           /* what poll answered */

static struct peer *
peer_of(int fd)
{
    assert(fd >= FIRST_FD && fd < FIRST_FD + (int)peers_used);
    return &peers[fd - FIRST_FD];
}

static void
say(struct peer *p, const void *bytes, size_t len)
{
    if (!p->ended && !p->reset && !p->shut && p->in.len + len < 16 << 20)
        bytes_add(&p->in, bytes, len);
}

/* A frame whose mask is zero. */
static void
say_frame(struct peer *p, uint8_t first, struct span payload)
{
    uint8_t header[WS_HEADER_MAX + 4];
    struct out o = out_over(header, sizeof header);

    ws_header(&o, first & 15, span_len(payload));
    header[0] = first;
    header[1] |= 0x80;
    out_bytes(&o, "\0\0\0\0", 4);
    say(p, header, (size_t)(o.at - header));
    say(p, payload.at, span_len(payload));
}

static bool
is_update(struct span update)
{
    struct y_report r;

    return y_check(update, &r);
}

/* A sync message; what a writer sends it has. */
static void
say_sync(struct peer *p, uint8_t step, struct span body, bool in_parts)
{
    struct bytes m = { NULL, 0, 0 };
    size_t half;

    bytes_add(&m, (const uint8_t[]){ SYNC_SYNC, step }, 2);
    run_add(&m, body);
    half = in_parts ? m.len / 2 : m.len;
    if (in_parts) {
        say_frame(p, WSLAY_BINARY_FRAME, span_of(m.at, half));
        say_frame(p, 0x80, span_of(m.at + half, m.len - half));
    } else {
        say_frame(p, 0x80 | WSLAY_BINARY_FRAME, bytes_span(&m));
    }
    if (step != SYNC_STEP1 && p->writes && is_update(body))
        run_add(&p->run, body);
    if (step != SYNC_STEP1 || span_len(body) != 1 || p->synced > 0 ||
        !p->plain)
        p->plain = false;
    bytes_free(&m);
}

/* ----- what a member makes of what it gets ------------------------------ */

static void
peer_takes_sync(struct peer *p, struct span m)
{
    const char *fault;
    uint64_t step;

    assert(y_uint(&m, &step) && step <= SYNC_UPDATE && sync_body(&m));
    if (step == SYNC_STEP1) {
        assert(y_sv_check(m, &fault) && p->writes);
        p->asked = true;
        return;
    }
    p->synced += step == SYNC_STEP2;
    assert(is_update(m));
    run_add(&p->run, m);
}

static void
peer_takes_message(struct peer *p, struct span m)
{
    const char *fault;
    uint64_t type, code;

    assert(y_uint(&m, &type));
    switch (type) {
    case SYNC_SYNC:
        peer_takes_sync(p, m);
        break;
    case SYNC_AWARENESS:
        assert(sync_body(&m) && y_aware_check(m, &fault));
        break;
    case SYNC_AUTH:
        assert(y_uint(&m, &code) && code == 0 && sync_body(&m));
        break;
    default:
        assert(false);
    }
}

/* One frame, if it is whole.  Answers how many bytes it had, or 0. */
static size_t
peer_takes_frame(struct peer *p, struct span in)
{
    size_t need, len = 0;

    if (span_len(in) < 2)
        return 0;
    need = in.at[1] < 126 ? 2 : in.at[1] == 126 ? 4 : 10;
    if (span_len(in) < need)
        return 0;
    for (size_t i = 2; i < need; i++)
        len = len << 8 | in.at[i];
    if (need == 2)
        len = in.at[1];
    if (span_len(in) - need < len)
        return 0;
    assert(!p->closed);
    switch (in.at[0]) {
    case 0x80 | WSLAY_BINARY_FRAME:
        peer_takes_message(p, span_of(in.at + need, len));
        break;
    case 0x80 | WSLAY_PING:
        say_frame(p, 0x80 | WSLAY_PONG, span_of(in.at + need, len));
        break;
    case 0x80 | WSLAY_PONG:
        break;
    case 0x80 | WSLAY_CONNECTION_CLOSE:
        p->closed = true;
        say_frame(p, 0x80 | WSLAY_CONNECTION_CLOSE,
                  span_of(in.at + need, len < 2 ? 0 : 2));
        break;
    default:
        assert(false);
    }
    return need + len;
}

static void
peer_takes(struct peer *p, const void *from, size_t len)
{
    size_t at = 0, n;

    bytes_add(&p->out, from, len);
    if (!p->upgraded) {
        const uint8_t *end = memmem(p->out.at, p->out.len, "\r\n\r\n", 4);
        if (end == NULL)
            return;
        at = (size_t)(end + 4 - p->out.at);
        p->upgraded = memcmp(p->out.at, "HTTP/1.1 101", 12) == 0;
        p->closed = !p->upgraded;
    }
    while (p->upgraded && (n = peer_takes_frame(p, span_of(p->out.at + at,
                                                    p->out.len - at))) > 0)
        at += n;
    p->out.len -= at;
    memmove(p->out.at, p->out.at + at, p->out.len);
}

/* ----- made-up sockets and clock ---------------------------------------- */

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

    if (p->in_at < p->in.len || p->ended)
        got |= POLLIN;
    if (p->window > 0)
        got |= POLLOUT;
    got &= want;
    if (p->reset)
        got |= POLLERR | POLLHUP;
    return got;
}

static int
fake_ppoll(struct pollfd *all, nfds_t n, const struct timespec *t,
           const sigset_t *mask)
{
    (void)t, (void)mask;
    ready_last = 0;
    for (nfds_t i = 0; i < n; i++) {
        bool due;
        if (all[i].fd >= FIRST_FD) {
            all[i].revents = peer_events(peer_of(all[i].fd), all[i].events);
        } else {
            due = all[i].fd < 0 ? false
                  : all[i].fd == s->work.wake
                      ? s->work.done.first != NULL
                      : peers_accepted < peers_used;
            all[i].revents = due ? all[i].events & POLLIN : 0;
        }
        ready_last += all[i].revents != 0;
    }
    return ready_last;
}

static int
fake_accept4(int fd, struct sockaddr *at, socklen_t *len, int flags)
{
    struct sockaddr_in v4 = { .sin_family = AF_INET,
                              .sin_addr = { htonl(0x0a000001) } };

    (void)fd, (void)flags;
    if (peers_accepted == peers_used) {
        errno = EAGAIN;
        return -1;
    }
    if (at != NULL) {
        memcpy(at, &v4, sizeof v4);
        *len = sizeof v4;
    }
    peers[peers_accepted].accepted = true;
    return FIRST_FD + (int)peers_accepted++;
}

static ssize_t
fake_recv(int fd, void *to, size_t len, int flags)
{
    struct peer *p = peer_of(fd);
    size_t n = p->in.len - p->in_at;

    (void)flags;
    assert(p->accepted && !p->shut && len > 0);
    errno = p->reset ? ECONNRESET : EAGAIN;
    if (p->reset || (n == 0 && !p->ended))
        return -1;
    n = n < len ? n : len;
    if (n > 0)
        memcpy(to, p->in.at + p->in_at, n);
    p->in_at += n;
    return (ssize_t)n;
}

static ssize_t
fake_sendmsg(int fd, const struct msghdr *m, int flags)
{
    struct peer *p = peer_of(fd);
    size_t sent = 0;

    (void)flags;
    assert(p->accepted && !p->shut);
    errno = p->reset ? EPIPE : EAGAIN;
    if (p->reset || p->window == 0)
        return -1;
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
    struct disk_file *f;

    if (fd == DISK_FD || fd == DISK_FD + 1)
        return 0;
    if (fd >= DISK_FD) {
        f = file_of(fd);
        fds[fd - DISK_FD - 10] = NULL;
        if (--f->fds == 0 && f->name[0] == '\0')
            bytes_free(&f->data);
        return 0;
    }
    if (fd < FIRST_FD)
        return close(fd);
    assert(peer_of(fd)->accepted && !peer_of(fd)->shut);
    peer_of(fd)->shut = true;
    return 0;
}

/* ----- stores compared -------------------------------------------------- */

static uint8_t *lent[1024];
static size_t lent_n;

static uint8_t *
lend(uint64_t n)
{
    uint8_t *p = malloc(n > 0 ? (size_t)n : 1);

    assert(p != NULL && lent_n < sizeof lent / sizeof *lent);
    lent[lent_n++] = p;
    return p;
}

static void
lent_back(void)
{
    while (lent_n > 0)
        free(lent[--lent_n]);
}

struct sums {
    uint64_t structs, ranges, clients;
};

static struct sums
sums_of(const struct y_store *store)
{
    struct sums sum = { 0, 0, 0 };
    struct span tail = store->tail, update = store->snapshot;
    struct y_report r;

    if (span_is_empty(update) && !y_run_next(&tail, &update))
        return sum;
    do {
        assert(y_check(update, &r));
        sum.structs += r.structs;
        sum.ranges += r.ranges;
        sum.clients += r.clients;
    } while (y_run_next(&tail, &update));
    return sum;
}

static struct y_known
know(const struct y_store *store)
{
    struct y_known k = { .seed = 1 };
    struct span tail = store->tail, update = store->snapshot;
    struct y_report r;

    if (span_is_empty(update) && !y_run_next(&tail, &update))
        return k;
    do {
        assert(y_check(update, &r));
        if (!y_known_fits(&k, r.clients, r.stretches)) {
            size_t slots = y_known_slots(k.used + r.clients,
                                         k.n_islands + r.stretches);
            y_known_move(&k, lend(y_known_bytes(slots)), slots);
        }
        y_known_add(&k, update);
    } while (y_run_next(&tail, &update));
    return k;
}

static struct span
write_result(struct y_result *r)
{
    uint8_t *at = lend(r->bytes);
    struct out o = out_over(at, r->bytes);

    y_write(r, &o);
    assert(!o.full && o.at == o.end);
    return span_of(at, r->bytes);
}

static struct span
merge(const struct y_store *store)
{
    struct sums sum = sums_of(store);
    size_t n = (size_t)y_work_size(sum.structs, sum.ranges, sum.clients);
    struct y_result r;

    assert(y_merge(store, Y_GC_OFF, (struct y_work){ lend(n), n }, &r) == Y_OK);
    return write_result(&r);
}

static struct y_store
run_store(const struct bytes *run)
{
    return (struct y_store){ .tail = bytes_span(run) };
}

/* Does `all` hold every struct and every deletion of `some`?  Where the server
 * cleans, it may know of deletions that follow from others. */
static bool
holds(const struct y_store *all, const struct y_store *some, bool cleaned)
{
    struct span update = merge(some);
    struct y_known k = know(all);
    struct y_report report;
    struct y_result r;
    size_t n;

    assert(y_check(update, &report));
    n = (size_t)y_minus_size(&k, &report, sums_of(all).ranges);
    assert(y_minus(all, &k, update, (struct y_work){ lend(n), n }, &r) ==
           Y_OK);
    return r.empty || (cleaned && r.structs == 0);
}

/* ----- what must hold after every turn ---------------------------------- */

static void
check_known(const struct doc *d)
{
    struct y_store store = doc_store(d, d->tail_len);
    struct y_known k = know(&store);
    struct sums sum = sums_of(&store);

    assert(sum.structs == d->structs && sum.ranges == d->ranges &&
           sum.clients == d->clients);
    assert(k.used == d->known.used && k.n_islands == d->known.n_islands);
    for (size_t i = 0; i < k.slots; i++) {
        const struct y_known_client *c;
        if (k.at[i].end == 0)
            continue;
        c = y_known_get(&d->known, k.at[i].client);
        assert(c != NULL && c->next == k.at[i].next && c->end == k.at[i].end);
    }
    lent_back();
}

static uint64_t changes; /* seen by the last check */

static void
check_doc(const struct doc *d, unsigned pins)
{
    assert(d->shown <= d->written && d->written <= d->tail_len &&
           d->tail_len <= d->tail.size);
    assert(d->now.len <= d->now.memory.size);
    pins += d->job.busy && (d->job.kind == DOC_JOB_WRITE ||
                            d->job.kind == DOC_JOB_MERGE);
    assert(pins == (unsigned)d->now.pins + d->before.pins);
    assert(d->before.memory.at == NULL || d->before.pins > 0);
    for (size_t at = 0; at < d->aware_len; at += aware_size(aware_at(d, at)))
        assert(aware_at(d, at)->len <= aware_at(d, at)->room);
}

/* The extents of all documents and members, and who pins what. */
static void
check_documents(void)
{
    uint64_t used = 0, now = s->count.doc_updates + s->count.doc_merges +
                             s->count.doc_refused;
    bool changed = now != changes;

    changes = now;
    for (unsigned i = 0; i < s->rooms_fresh; i++) {
        const struct doc *d = &s->docs[i];
        unsigned pins = 0;
        if (!s->rooms[i].used || d->state != DOC_OPEN)
            continue;
        for (uint16_t m = s->rooms[i].first; m != NONE;
             m = s->conns[m].in.next) {
            const struct sync *y = &s->syncs[m];
            used += y->memory.size + y->source.size + y->sv.size +
                    y->message.size;
            pins += y->pins;
        }
        used += d->now.memory.size + d->before.memory.size + d->tail.size +
                d->known_memory.size + d->aware.size + d->job.buffer.size +
                d->job.bench.size;
        if (d->job.busy && d->job.kind == DOC_JOB_MERGE)
            used += d->job.promised;
        check_doc(d, pins);
        if (changed)
            check_known(d);
    }
    assert(used == s->doc_used);
    assert(used <= s->cfg->doc_memory);
}

/* Long documents take long to be checked: not in every turn. */
static bool
is_to_be_checked(void)
{
    size_t len = 0;

    for (unsigned i = 0; i < s->rooms_fresh; i++)
        if (s->rooms[i].used && s->docs[i].state == DOC_OPEN)
            len += s->docs[i].now.len + s->docs[i].tail_len;
    return len < 1 << 16 || s->count.turns % 64 == 0;
}

static void
turn(int64_t ms)
{
    int answer;

    clock_ms += ms;
    answer = collabd_step(s, 0);
    assert(answer == 0);
    if (is_to_be_checked()) {
        collabd_check(s);
        check_documents();
    }
}

/* ----- events ----------------------------------------------------------- */

static struct span input;
static uint64_t clocks[4]; /* of the clients that write, where each goes on */

static uint8_t
next(void)
{
    return span_is_empty(input) ? 0 : *input.at++;
}

static struct span
next_bytes(size_t n)
{
    struct span taken = input;

    if (n < span_len(taken))
        taken.end = taken.at + n;
    input.at = taken.end;
    return taken;
}

static int
connect_peer(char doc, bool writes)
{
    char head[300];
    int n;

    if (peers_used == PEERS)
        return -1;
    n = snprintf(head, sizeof head,
                 "GET /yjs/%c?token=%c HTTP/1.1\r\nHost: localhost\r\n"
                 "Upgrade: websocket\r\nConnection: Upgrade\r\n"
                 "Sec-WebSocket-Version: 13\r\n"
                 "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
                 doc, writes ? 'w' : 'r');
    peers[peers_used] = (struct peer){ .window = SIZE_MAX / 2, .doc = doc,
                                       .writes = writes, .plain = true };
    say(&peers[peers_used], head, (size_t)n);
    return (int)peers_used++;
}

static void
come_and_go(int member, unsigned how)
{
    struct peer *p = current[member] < 0 ? NULL : &peers[current[member]];

    switch (how) {
    case 0:
    case 1:
    case 2:
    case 3: /* into a document; it says SyncStep1, or says nothing yet */
        if (p != NULL)
            p->ended = true;
        current[member] = connect_peer(how & 1 ? 'b' : 'a', member != READER);
        if (current[member] >= 0 && how < 2)
            say_sync(&peers[current[member]], SYNC_STEP1, span_of("", 1),
                     false);
        break;
    case 4:
    case 5:
        if (p != NULL)
            say_frame(p, 0x80 | WSLAY_CONNECTION_CLOSE, span_of("\3\350", 2));
        if (how == 4)
            current[member] = -1;
        break;
    case 6:
        if (p != NULL)
            p->ended = true;
        break;
    default:
        if (p != NULL)
            p->reset = true;
    }
}

/* One section of an update: `kind` says what a client with this id does. */
static void
out_section(struct out *o, unsigned kind, uint64_t id, size_t n)
{
    static const char text[] = "abcdefghijklmnopqrstuvwxyz\xf0\x9f\x98\x80";
    uint64_t *clock = &clocks[id & 3], at = *clock, len = n % 26 + 1;

    if (kind == 1)
        at += n % 5; /* ahead of what is missing */
    if (kind == 2)
        at -= at < n % 7 ? at : n % 7; /* over what is there, perhaps */
    out_uint(o, 1);
    out_uint(o, id);
    out_uint(o, at);
    if (kind == 3) { /* GC */
        out_u8(o, 0);
        out_uint(o, len);
    } else {
        bool pair = kind == 4, dead = kind == 5, type = kind == 6;
        out_u8(o, (uint8_t)((at > 0 ? 0x80 : 0) | (dead ? 1 : type ? 7 : 4)));
        if (at > 0) {
            out_uint(o, id);
            out_uint(o, at - 1);
        } else {
            out_text(o, "\1\1t");
        }
        if (dead || type) {
            len = type ? 1 : len;
            out_uint(o, dead ? len : 1);
        } else {
            out_uint(o, len + (pair ? 4 : 0));
            out_bytes(o, text + 26 - len, (size_t)len + (pair ? 4 : 0));
            len += pair ? 2 : 0;
        }
    }
    if (at + len > *clock)
        *clock = at + len;
}

/* An update that is well-formed: up to three sections, up to three ranges. */
static struct span
make_update(uint8_t *to, size_t room, unsigned kind)
{
    struct out o = out_over(to, room);
    uint8_t shape = next();
    unsigned sections = kind == 7 ? 0 : 1 + (shape & 3) % 3;
    unsigned ranges = kind == 7 ? 1 + (shape >> 2 & 1) : (shape >> 2 & 3) % 3;
    uint64_t id = 1 + (shape >> 4 & 3);

    out_uint(&o, sections);
    for (unsigned i = 0; i < sections; i++) /* descending, or not */
        out_section(&o, kind, 1 + (id + 3 - i) % 4, next());
    out_uint(&o, ranges);
    for (unsigned i = 0; i < ranges; i++) {
        uint8_t b = next();
        out_uint(&o, 1 + (id + 3 - i) % 4);
        out_uint(&o, 1);
        out_uint(&o, b >> 3);
        out_uint(&o, 1 + (b & 7));
    }
    assert(!o.full);
    return (struct span){ to, o.at };
}

/* Says a state for one of a few clients. */
static void
say_awareness(struct peer *p)
{
    static const char *const states[] = { "{}", "null", "{\"u\":[1,{}]}",
                                          "{\"a\":\"b\"}" };
    uint8_t shape = next(), text[64], m[80];
    const char *json = states[shape & 3];
    struct out o = out_over(text, sizeof text), all = out_over(m, sizeof m);

    out_u8(&o, 1);
    out_uint(&o, 1 + (shape >> 2 & 7));
    out_uint(&o, shape >> 5);
    out_uint(&o, strlen(json));
    out_text(&o, json);
    out_u8(&all, SYNC_AWARENESS);
    out_uint(&all, (uint64_t)(o.at - text));
    out_bytes(&all, text, (size_t)(o.at - text));
    say_frame(p, 0x80 | WSLAY_BINARY_FRAME, (struct span){ m, all.at });
}

/* A message whose body is bytes of the input. */
static void
say_input(struct peer *p, unsigned how)
{
    size_t n = next();
    struct span body = next_bytes(how & 1 ? n * 8 : n);
    struct bytes m = { NULL, 0, 0 };

    p->plain = false;
    p->lied |= how < 2 || how == 7;
    if (how < 6) {
        say_sync(p, (uint8_t)(how / 2), body, false);
        return;
    }
    if (how == 6)
        bytes_add(&m, (const uint8_t[]){ SYNC_AWARENESS }, 1);
    if (how == 6)
        run_add(&m, body);
    else
        bytes_add(&m, body.at, span_len(body));
    say_frame(p, (n & 15) == 15 ? 0x81 : 0x82, bytes_span(&m));
    if (how == 7 && span_len(body) > 2 && body.at[0] == 0 && p->writes) {
        struct span u = body; /* it may have been an update */
        u.at += 2;
        if (sync_body(&u) && is_update(u))
            run_add(&p->run, u);
    }
    bytes_free(&m);
}

/* Answers a SyncStep1 with all there is. */
static void
answer(struct peer *p)
{
    struct y_store store = run_store(&p->run);

    p->asked = false;
    say_sync(p, SYNC_STEP2, merge(&store), false);
    lent_back();
}

static void
ask(struct peer *p)
{
    struct y_store store = run_store(&p->run);
    struct y_known k = know(&store);
    size_t n = y_known_write_sv(&k, NULL);
    uint8_t *at = lend(n);
    struct out o = out_over(at, n);

    (void)y_known_write_sv(&k, &o);
    say_sync(p, SYNC_STEP1, span_of(at, n), false);
    lent_back();
}

/* Some keystrokes; or two kilobytes and more, pasted. */
static void
type(struct peer *p, unsigned n)
{
    static uint8_t text[65536 + 64];
    size_t len = n < 224 ? 1 : (n - 223) * 2048;

    for (n = n < 224 ? n & 31 : 1; n > 0; n--) {
        struct out o = out_over(text, sizeof text);
        out_text(&o, "\1\1\2");
        out_uint(&o, clocks[2]);
        out_u8(&o, clocks[2] > 0 ? 0x84 : 4);
        if (clocks[2] > 0) {
            out_u8(&o, 2);
            out_uint(&o, clocks[2] - 1);
        } else {
            out_text(&o, "\1\1t");
        }
        out_uint(&o, len);
        assert((size_t)(o.end - o.at) > len);
        memset(o.at, 'x', len);
        o.at += len;
        out_u8(&o, 0);
        say_sync(p, SYNC_UPDATE, (struct span){ text, o.at }, n == 2);
        clocks[2] += len;
    }
}

static void
speak(struct peer *p, unsigned how)
{
    uint8_t twice[6];
    struct out o = out_over(twice, sizeof twice);

    switch (how) {
    case 0:
        say_sync(p, SYNC_STEP1, span_of("", 1), false);
        break;
    case 1:
        ask(p);
        break;
    case 2:
        answer(p);
        break;
    case 3:
    case 4:
        say_awareness(p);
        break;
    case 5:
        say_frame(p, 0x82, span_of("\3", 1));
        break;
    case 6: /* a state vector of the input's */
        p->lied = true;
        out_uint(&o, 2);
        for (int i = 0; i < 2; i++) {
            uint8_t b = next();
            out_uint(&o, b >> 6);
            out_uint(&o, b & 63);
        }
        say_sync(p, SYNC_STEP1, (struct span){ twice, o.at }, false);
        break;
    default: /* many keystrokes, or a large text */
        type(p, next());
    }
}

static void
accident(unsigned how)
{
    switch (how) {
    case 0: disk_heal(); break;
    case 1: disk_room = 0; break;
    case 2: disk_room = next(); break;
    case 3: disk_syncs = false; break;
    case 4: disk_opens = false; break;
    case 5: disk_renames = false; break;
    case 6: disk_cuts = false; break;
    default: memory_is_dry = true; break;
    }
}

static void
event(uint8_t b)
{
    static const size_t windows[8] = { 0, 1, 7, 100, 4096, 20000, 100000,
                                       SIZE_MAX / 2 };
    static const int64_t times[8] = { 0, 1, 50, 1000, 2000, 5000, 11000,
                                      26000 };
    int member = b >> 3 & 3;
    unsigned how = b >> 5;
    struct peer *p = current[member] < 0 ? NULL : &peers[current[member]];
    uint8_t text[256];
    struct span update;

    switch (b & 7) {
    case 0:
        come_and_go(member, how);
        break;
    case 1:
    case 2: /* an Update, or in the shape of an answer */
        update = make_update(text, sizeof text, how);
        if (p != NULL)
            say_sync(p, (b & 7) == 1 ? SYNC_UPDATE : SYNC_STEP2, update,
                     (span_len(update) & 7) == 7);
        break;
    case 3:
        if (p != NULL)
            say_input(p, how);
        break;
    case 4:
        turn(times[how]);
        break;
    case 5:
        accident(how);
        break;
    case 6:
        if (p != NULL)
            p->window = windows[how];
        break;
    default:
        if (member == 3 && how < 2)
            (void)thread_runs();
        else if (member == 3 && how < 4)
            turn(0);
        else if (p != NULL)
            speak(p, how);
    }
}

/* ----- what must hold when all is quiet --------------------------------- */

/* Turns until the server would sleep; threads run. */
static void
settle(void)
{
    for (int i = 0; i < 2000; i++) {
        bool ran = thread_runs();
        turn(0);
        if (!ran && ready_last == 0 && loop_timeout(s, -1) != 0)
            return;
    }
    assert(false); /* it spins */
}

static void
settle_for(int64_t ms)
{
    settle();
    for (; ms > 0; ms -= 500) {
        turn(500);
        settle();
    }
}

/* The connection of a peer that is a member still; NULL: it is none. */
static const struct conn *
conn_of(const struct peer *p)
{
    for (unsigned i = 0; i < s->conns_fresh; i++)
        if (s->conns[i].state == CONN_OPEN &&
            s->conns[i].fd == FIRST_FD + (int)(p - peers) &&
            conn_is_member(s, &s->conns[i]))
            return &s->conns[i];
    return NULL;
}

static void
check_member(const struct peer *p, const struct conn *c)
{
    const struct sync *y = sync_of(s, c);
    const struct doc *d = sync_doc(s, c);
    struct y_store store = doc_store(d, d->tail_len);
    struct y_store has = run_store(&p->run);

    assert(d->shown == d->tail_len);
    assert(!c->starved && p->in_at == p->in.len);
    assert(y->head_len == 0 && !y->joining);
    assert(c->in.outside == (p->synced == 0));
    if (p->synced > 0 && !p->lied)
        assert(holds(&has, &store, s->cfg->gc != 2));
    if (!p->writes || !y->refused)
        assert(holds(&store, &has, false));
    if (p->plain && !p->writes && p->synced == 1 && s->cfg->gc == 2)
        assert(span_equals(merge(&has), merge(&store)));
    lent_back();
}

static void
heal(void)
{
    disk_heal();
    changes = UINT64_MAX; /* what was taken back does not always count */
    for (unsigned i = 0; i < peers_used; i++)
        peers[i].window = SIZE_MAX / 2;
    for (int i = 0; i < 4; i++) {
        settle_for(2500);
        for (unsigned k = 0; k < peers_used; k++)
            if (peers[k].asked && conn_of(&peers[k]) != NULL)
                answer(&peers[k]);
        settle();
    }
}

/* Somebody comes who has nothing. */
static void
check_newcomer(char doc)
{
    int i = connect_peer(doc, false);

    if (i < 0)
        return;
    say_sync(&peers[i], SYNC_STEP1, span_of("", 1), false);
    settle_for(3000); /* it may wait for a merge */
    if (conn_of(&peers[i]) != NULL) {
        assert(peers[i].synced == 1);
        check_member(&peers[i], conn_of(&peers[i]));
    }
}

/* What was in the documents is on the disk; with --fsync always perhaps also
 * what was written, but taken back before it was synced. */
static void
check_disk(const struct bytes *was, char doc)
{
    uint8_t name[1] = { (uint8_t)doc };
    struct y_store before = run_store(was), now;
    struct doc d;

    d.state = DOC_CLOSED;
    assert(doc_open(s, &d, span_of(name, 1)) == DOC_OPENED);
    assert(!d.aside);
    now = doc_store(&d, d.tail_len);
    assert(holds(&now, &before, false));
    assert(s->cfg->fsync || holds(&before, &now, s->cfg->gc != 2));
    lent_back();
    doc_close(s, &d);
}

static void
finish(void)
{
    struct bytes was[2] = { { NULL, 0, 0 }, { NULL, 0, 0 } };

    heal();
    check_newcomer('a');
    check_newcomer('b');
    for (unsigned i = 0; i < peers_used; i++)
        if (conn_of(&peers[i]) != NULL)
            check_member(&peers[i], conn_of(&peers[i]));
    for (unsigned i = 0; i < s->rooms_fresh; i++) {
        struct y_store store = doc_store(&s->docs[i], s->docs[i].tail_len);
        if (s->rooms[i].used && s->docs[i].state == DOC_OPEN)
            run_add(&was[s->rooms[i].name[0] - 'a'], merge(&store));
        lent_back();
    }
    for (unsigned i = 0; i < peers_used; i++)
        peers[i].ended = true;
    settle_for(12000);
    assert(s->conns_used == 0);
    if (s->data.fd >= 0) {
        while (room_close_oldest(s, false))
            ;
        assert(s->rooms_used == 0);
        for (int i = 0; i < 2; i++)
            if (was[i].len > 0)
                check_disk(&was[i], (char)('a' + i));
    } else {
        for (unsigned i = 0; i < s->rooms_fresh; i++)
            if (s->rooms[i].used && s->docs[i].state == DOC_OPEN)
                sync_finish(s, &s->rooms[i]);
    }
    assert(s->doc_used == 0);
    bytes_free(&was[0]);
    bytes_free(&was[1]);
}

/* ----- the server ------------------------------------------------------- */

static struct tokens tokens = { .on = true, .count = 2 };

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
    sys.openat = fake_openat;
    sys.pread = fake_pread;
    sys.pwritev = fake_pwritev;
    sys.ftruncate = fake_ftruncate;
    sys.fsync = sys.fdatasync = fake_sync;
    sys.renameat = fake_renameat;
    sys.unlinkat = fake_unlinkat;
    sys.faccessat = fake_faccessat;
    sys.fstat = fake_fstat;
    sys.mmap = fake_mmap;
    sys.mremap = fake_mremap;
    sys.pthread_create = fake_pthread_create;
    for (int i = 0; i < 2; i++) {
        struct token *t = &tokens.token[i];
        *t = (struct token){ .right = i == 0 ? RIGHT_READ : RIGHT_WRITE,
                             .pattern_len = 1, .pattern = { '*' } };
        sys_hash(MBEDTLS_MD_SHA256, span_of(i == 0 ? "r" : "w", 1), t->hash);
    }
    return 0;
}

static void
begin(uint8_t how)
{
    static const char *const gc[] = { "--gc=auto", "--gc=full", "--gc=off",
                                      "--gc=off" };
    char *argv[20] = { "collabd", "--listen=127.0.0.1:0", "--max-clients=60",
                       "--max-rooms=2", "--max-requests=2",
                       "--doc-memory=64M",
                       "--receive-buffers=4", "--message-memory=140000",
                       "--syslog", "--log-level=debug" };
    int argc = 10;

    argv[argc++] = (char *)(uintptr_t)gc[how >> 2 & 3];
    if (how & 2)
        argv[argc++] = "--fsync=always";
    if (how & 16)
        argv[argc++] = "--coalesce=50";
    if (how & 32)
        argv[argc++] = "--doc-memory=1M";
    if (how & 64)
        argv[argc++] = "--max-doc=500";
    argv[argc++] = how & 128 ? "--max-message=300" : "--max-message=70000";
    s = collabd_init(argc, argv);
    assert(s != NULL);
    s->tokens = &tokens;
    if (how & 1)
        s->data = (struct jrnl_folder){ DISK_FD, DISK_FD + 1 };
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    input = span_of(data, len);
    clock_ms = 1000000;
    peers_used = peers_accepted = 0;
    memset(clocks, 0, sizeof clocks);
    for (int i = 0; i < MEMBERS; i++)
        current[i] = -1;
    disk_heal();
    begin(next());
    while (!span_is_empty(input))
        event(next());
    finish();
    for (unsigned i = 0; i < WORK_LANES; i++)
        s->work.lane[i].runs = false; /* nobody to wait for */
    collabd_free(s);
    for (unsigned i = 0; i < peers_used; i++) {
        assert(peers[i].accepted == peers[i].shut);
        bytes_free(&peers[i].in);
        bytes_free(&peers[i].out);
        bytes_free(&peers[i].run);
    }
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        assert(files[i].fds == 0);
        file_unname(&files[i]);
    }
    return 0;
}
