/* Chapters Documents and Sync: a whole server with members at the other end of
 * socket pairs, who hold what they were sent as editors do; a clock that the
 * test moves, collabd_check after every turn, and a disk that fails or takes
 * the process with it at any call.
 *
 * SPDX-License-Identifier: MIT
 */
#include "test.h"

#include <dirent.h>
#include <sys/wait.h>

/* ----- facts that also hold in a child ----------------------------------- */

static bool in_child;
static int case_no; /* of a loop, to be said when something is wrong */

static void
not_so(const char *fact, int line)
{
    if (!in_child)
        fail_msg("line %d, case %d: %s", line, case_no, fact);
    (void)dprintf(test_stderr < 0 ? STDERR_FILENO : test_stderr,
                  "line %d, case %d: not so: %s\n", line, case_no, fact);
    _exit(99);
}

#define sure(fact) ((fact) ? (void)0 : not_so(#fact, __LINE__))

/* ----- the clock --------------------------------------------------------- */

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

/* ----- a disk that fails or kills --------------------------------------------
 * Calls of the kinds in `mask` are counted; the one with number `at` does what
 * `how` says, and with `for_ever` all behind it. */

enum disk_call {
    DISK_OPENAT = 1, DISK_PWRITEV = 2, DISK_FTRUNCATE = 4, DISK_RENAMEAT = 8,
    DISK_UNLINKAT = 16, DISK_FDATASYNC = 32, DISK_FSYNC = 64, DISK_ALL = 127
};

enum disk_how {
    DISK_FAIL,      /* with `error` */
    DISK_SHORT,     /* writes take half */
    DISK_DIE,       /* before the call, */
    DISK_DIE_SHORT, /* in the middle of it, */
    DISK_DIE_AFTER  /* behind it */
};

#define DIED 77

static struct {
    unsigned mask, at, calls;
    enum disk_how how;
    bool for_ever;
    bool pages_too; /* from then on there is no memory, either */
    int error;
} disk;

static bool no_pages; /* mmap and mremap fail */

/* A gate that syncs in a thread wait at; who has a ticket goes through. */
static pthread_t the_turn;
static pthread_mutex_t gate_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t gate_changed = PTHREAD_COND_INITIALIZER;
static bool gate_shut;
static unsigned gate_waiting, gate_tickets;

static void
gate_set(bool shut)
{
    (void)pthread_mutex_lock(&gate_lock);
    gate_shut = shut;
    (void)pthread_cond_broadcast(&gate_changed);
    (void)pthread_mutex_unlock(&gate_lock);
}

/* Lets through who waits; the next one waits again. */
static void
gate_pass_one(void)
{
    (void)pthread_mutex_lock(&gate_lock);
    gate_tickets = 1;
    (void)pthread_cond_broadcast(&gate_changed);
    while (gate_tickets > 0)
        (void)pthread_cond_wait(&gate_changed, &gate_lock);
    (void)pthread_mutex_unlock(&gate_lock);
}

static void
gate_pass(void)
{
    if (pthread_equal(pthread_self(), the_turn))
        return;
    (void)pthread_mutex_lock(&gate_lock);
    gate_waiting++;
    (void)pthread_cond_broadcast(&gate_changed);
    while (gate_shut && gate_tickets == 0)
        (void)pthread_cond_wait(&gate_changed, &gate_lock);
    gate_tickets = 0;
    gate_waiting--;
    (void)pthread_cond_broadcast(&gate_changed);
    (void)pthread_mutex_unlock(&gate_lock);
}

static void
disk_is_fine(void)
{
    memset(&disk, 0, sizeof disk);
}

static void
disk_will(enum disk_how how, unsigned mask, unsigned at, bool for_ever,
          int error)
{
    disk_is_fine();
    disk.how = how;
    disk.mask = mask;
    disk.at = at;
    disk.for_ever = for_ever;
    disk.error = error;
}

/* Is it this call's turn? */
static bool
disk_hits(enum disk_call call)
{
    unsigned n;

    if ((disk.mask & (unsigned)call) == 0)
        return false;
    n = __atomic_add_fetch(&disk.calls, 1, __ATOMIC_SEQ_CST);
    return disk.at > 0 && (n == disk.at || (disk.for_ever && n > disk.at));
}

/* False: it has failed. */
static bool
disk_before(bool hit)
{
    if (!hit || disk.how == DISK_DIE_AFTER || disk.how == DISK_SHORT)
        return true;
    if (disk.how != DISK_FAIL)
        _exit(DIED);
    no_pages |= disk.pages_too;
    errno = disk.error;
    return false;
}

static int
disk_after(bool hit, int answer)
{
    if (hit && disk.how == DISK_DIE_AFTER)
        _exit(DIED);
    return answer;
}

static int
disk_openat(int fd, const char *path, int flags, ...)
{
    bool hit = disk_hits(DISK_OPENAT);

    return disk_before(hit) ? disk_after(hit, openat(fd, path, flags, 0600))
                            : -1;
}

static ssize_t
disk_pwritev(int fd, const struct iovec *v, int count, off_t at)
{
    bool hit = disk_hits(DISK_PWRITEV);
    struct iovec half[4];
    size_t left = 0;
    ssize_t n;

    if (hit && (disk.how == DISK_DIE_SHORT || disk.how == DISK_SHORT)) {
        for (int i = 0; i < count; i++)
            left += v[i].iov_len;
        left /= 2;
        for (int i = 0; i < count && i < 4; i++) {
            half[i] = v[i];
            half[i].iov_len = left < v[i].iov_len ? left : v[i].iov_len;
            left -= half[i].iov_len;
        }
        n = pwritev(fd, half, count, at);
        if (disk.how == DISK_DIE_SHORT)
            _exit(DIED);
        return n;
    }
    if (!disk_before(hit))
        return -1;
    n = pwritev(fd, v, count, at);
    (void)disk_after(hit, 0);
    return n;
}

static int
disk_ftruncate(int fd, off_t len)
{
    bool hit = disk_hits(DISK_FTRUNCATE);

    return disk_before(hit) ? disk_after(hit, ftruncate(fd, len)) : -1;
}

static int
disk_renameat(int from, const char *old, int to, const char *new)
{
    bool hit = disk_hits(DISK_RENAMEAT);

    return disk_before(hit) ? disk_after(hit, renameat(from, old, to, new))
                            : -1;
}

static int
disk_unlinkat(int fd, const char *path, int flags)
{
    bool hit = disk_hits(DISK_UNLINKAT);

    return disk_before(hit) ? disk_after(hit, unlinkat(fd, path, flags)) : -1;
}

static int
disk_fdatasync(int fd)
{
    bool hit = disk_hits(DISK_FDATASYNC);

    gate_pass();
    (void)fd; /* a crash of ours does not need it, and the tests are many */
    return disk_before(hit) ? disk_after(hit, 0) : -1;
}

static int
disk_fsync(int fd)
{
    bool hit = disk_hits(DISK_FSYNC);

    gate_pass();
    (void)fd;
    return disk_before(hit) ? disk_after(hit, 0) : -1;
}

static int
no_thread(pthread_t *id, const pthread_attr_t *attr, void *(*run)(void *),
          void *with)
{
    (void)id, (void)attr, (void)run, (void)with;
    return EAGAIN;
}

static unsigned mmaps;

static void *
scarce_mmap(void *at, size_t len, int prot, int flags, int fd, off_t off)
{
    (void)__atomic_add_fetch(&mmaps, 1, __ATOMIC_SEQ_CST);
    gate_pass(); /* a merge beside the turn takes its result's pages */
    if (!no_pages)
        return mmap(at, len, prot, flags, fd, off);
    errno = ENOMEM;
    return MAP_FAILED;
}

static void *
scarce_mremap(void *at, size_t old, size_t new, int flags, ...)
{
    if (!no_pages || new <= old)
        return mremap(at, old, new, flags);
    errno = ENOMEM;
    return MAP_FAILED;
}

/* ----- a folder ---------------------------------------------------------- */

static char folder[64];

static void
empty_folder(void)
{
    DIR *d = opendir(folder);
    struct dirent *e;

    sure(d != NULL);
    while ((e = readdir(d)) != NULL)
        if (strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0)
            (void)unlinkat(dirfd(d), e->d_name, 0);
    (void)closedir(d);
}

/* ----- updates ----------------------------------------------------------- */

/* Bytes that grow; of a run, or what a run comes to. */
struct blob {
    uint8_t *at;
    size_t len, size;
};

static void
blob_add(struct blob *b, struct span s)
{
    if (b->len + span_len(s) > b->size) {
        b->size = (b->len + span_len(s)) * 2;
        b->at = realloc(b->at, b->size);
        sure(b->at != NULL);
    }
    if (!span_is_empty(s))
        memcpy(b->at + b->len, s.at, span_len(s));
    b->len += span_len(s);
}

static void
blob_free(struct blob *b)
{
    free(b->at);
    *b = (struct blob){ NULL, 0, 0 };
}

static struct span
blob_span(const struct blob *b)
{
    return span_of(b->at, b->len);
}

/* Adds an update to a run. */
static void
run_add(struct blob *b, struct span update)
{
    uint8_t bytes[10];
    struct out o = out_over(bytes, sizeof bytes);

    out_uint(&o, span_len(update));
    blob_add(b, (struct span){ bytes, o.at });
    blob_add(b, update);
}

/* What a run comes to, as one canonical update. */
static struct blob
run_merge(struct span run)
{
    struct y_store store = { .tail = run };
    uint64_t structs = 0, ranges = 0, clients = 0;
    struct span update;
    struct y_work work;
    struct y_result result;
    struct y_report r;
    struct blob b;
    struct out o;

    while (y_run_next(&run, &update)) {
        sure(y_check(update, &r));
        structs += r.structs;
        ranges += r.ranges;
        clients += r.clients;
    }
    sure(span_is_empty(run));
    work.size = (size_t)y_work_size(structs, ranges, clients) + 8;
    work.at = malloc(work.size);
    sure(work.at != NULL);
    sure(y_merge(&store, Y_GC_OFF, work, &result) == Y_OK);
    b = (struct blob){ malloc(result.bytes), result.bytes, result.bytes };
    sure(b.at != NULL);
    o = out_over(b.at, b.len);
    y_write(&result, &o);
    sure(!o.full && o.at == b.at + b.len);
    free(work.at);
    return b;
}

/* Up to which clock a run has all of a client. */
static uint64_t
run_next_clock(struct span run, uint64_t client)
{
    struct blob b = run_merge(run);
    struct y_walk w = y_walk(blob_span(&b));
    struct y_stretch s;
    uint64_t next = 0;

    while (y_walk_stretch(&w, &s))
        if (s.client == client && s.from == 0)
            next = s.to;
    blob_free(&b);
    return next;
}

static uint64_t
run_ranges(struct span run)
{
    struct blob b = run_merge(run);
    struct y_report r;

    sure(y_check(blob_span(&b), &r));
    blob_free(&b);
    return r.ranges;
}

static bool
runs_are_equal(struct span a, struct span b)
{
    struct blob one = run_merge(a), other = run_merge(b);
    bool equal = span_equals(blob_span(&one), blob_span(&other));

    blob_free(&one);
    blob_free(&other);
    return equal;
}

#define TEXT_MAX 1000000u

static uint8_t made[TEXT_MAX + 64];

/* A client types `len` letters behind its last ones; which, the clock says.  It
 * stands until the next is made. */
static struct span
typed(uint64_t client, uint64_t clock, size_t len)
{
    struct out o = out_over(made, sizeof made);

    sure(len <= TEXT_MAX);
    out_bytes(&o, "\1\1", 2);
    out_uint(&o, client);
    out_uint(&o, clock);
    if (clock == 0) {
        out_bytes(&o, "\x04\x01\x01t", 4);
    } else {
        out_u8(&o, 0x84);
        out_uint(&o, client);
        out_uint(&o, clock - 1);
    }
    out_uint(&o, len);
    for (size_t i = 0; i < len; i++)
        out_u8(&o, (uint8_t)('a' + (clock + i) % 26));
    out_u8(&o, 0);
    sure(!o.full);
    return (struct span){ made, o.at };
}

static struct span
erased(uint64_t client, uint64_t clock, uint64_t len)
{
    struct out o = out_over(made, sizeof made);

    out_bytes(&o, "\0\1", 2);
    out_uint(&o, client);
    out_u8(&o, 1);
    out_uint(&o, clock);
    out_uint(&o, len);
    return (struct span){ made, o.at };
}

/* One letter each of so many clients from that one on. */
static struct span
crowd(uint64_t client, unsigned n)
{
    struct out o = out_over(made, sizeof made);

    out_uint(&o, n);
    while (n-- > 0) {
        out_u8(&o, 1);
        out_uint(&o, client + n);
        out_bytes(&o, "\0\x04\x01\x01t\1x", 7);
    }
    out_u8(&o, 0);
    sure(!o.full);
    return (struct span){ made, o.at };
}

/* ----- the server -------------------------------------------------------- */

static struct collabd *s;

#define ARGS 40
static char *args[ARGS];

static bool
try_start(const char *flags[])
{
    const char *small[] = { "collabd", "--listen", "127.0.0.1:0",
                            "--max-clients", "12", "--max-rooms", "4",
                            "--max-message", "64K", "--message-memory", "1M",
                            "--gc", "off" };
    int n = 0;

    for (size_t i = 0; i < sizeof small / sizeof *small; i++)
        args[n++] = (char *)(uintptr_t)small[i];
    for (size_t i = 0; flags[i] != NULL; i++)
        args[n++] = (char *)(uintptr_t)flags[i];
    sure(n < ARGS);
    args[n] = NULL;
    s = collabd_init(n, args);
    if (s != NULL)
        collabd_check(s);
    return s != NULL;
}

#define start_with(...) sure(try_start((const char *[]){ __VA_ARGS__, NULL }))

#define start_kept(...) start_with("--data", folder, __VA_ARGS__)

static struct room *
room_named(const char *name)
{
    struct room *room = room_find(s, ROOM_DOCUMENT, span_text(name));

    sure(room != NULL);
    return room;
}

static struct doc *
doc_named(const char *name)
{
    return room_doc(s, room_named(name));
}

/* What members may see of a document. */
static struct blob
doc_run(const struct doc *d)
{
    struct blob run = { NULL, 0, 0 };

    if (d->now.len > 0)
        run_add(&run, span_of(d->now.memory.at, d->now.len));
    blob_add(&run, span_of(d->tail.at, d->shown));
    return run;
}

/* ----- members ----------------------------------------------------------- */

#define PEERS 10

static struct peer {
    int fd; /* -1: none */
    struct conn_id conn;
    uint64_t client, clock; /* how it types */
    struct blob in;         /* not yet understood */
    struct blob holds;      /* its document, a run */
    bool upgraded, ended;
    bool mute; /* does not answer SyncStep1 */
    bool deaf; /* does not read; */
    size_t sips; /* or only so many bytes at a time; 0: all */
    uint16_t code; /* of a Close */
    unsigned step1, step2, updates, denied, keepalives, states, gone;
    size_t longest; /* message */
    uint64_t early; /* clocks of its own that came before the SyncStep2 */
    uint64_t their_clock; /* of the last awareness state */
    char denial[128], state[128];
} peers[PEERS];

/* Reads what there is; nothing is done about it yet. */
static void
drain(struct peer *p)
{
    static uint8_t bytes[1 << 18];
    size_t left = p->sips > 0 ? p->sips : SIZE_MAX;

    while (p->fd >= 0 && !p->deaf && left > 0) {
        size_t most = left < sizeof bytes ? left : sizeof bytes;
        ssize_t n = recv(p->fd, bytes, most, MSG_DONTWAIT);
        if (n == 0 || (n < 0 && errno != EAGAIN))
            p->ended = true;
        if (n <= 0)
            break;
        blob_add(&p->in, span_of(bytes, (size_t)n));
        left -= (size_t)n;
    }
}

/* While the server does not read, all others go on reading. */
static void
say_bytes(struct peer *p, const void *bytes, size_t len)
{
    const uint8_t *at = bytes;
    int tries = 0;

    while (len > 0) {
        ssize_t n = send(p->fd, at, len, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && errno == EAGAIN) {
            sure(tries++ < 10000);
            sure(collabd_step(s, 0) == 0);
            for (size_t i = 0; i < PEERS; i++)
                drain(&peers[i]);
            continue;
        }
        if (n < 0) {
            p->ended = true;
            return;
        }
        at += n;
        len -= (size_t)n;
    }
}

/* A masked frame; the mask is zero. */
static void
say(struct peer *p, struct span payload)
{
    uint8_t head[14];
    struct out o = out_over(head, sizeof head);
    size_t len = span_len(payload);
    int bytes = len < 126 ? 0 : len < 65536 ? 2 : 8;

    out_u8(&o, 0x82);
    out_u8(&o, (uint8_t)(0x80 | (bytes == 0 ? len : bytes == 2 ? 126 : 127)));
    while (bytes-- > 0)
        out_u8(&o, (uint8_t)(len >> (8 * bytes)));
    out_bytes(&o, "\0\0\0\0", 4);
    say_bytes(p, head, (size_t)(o.at - head));
    say_bytes(p, payload.at, len);
}

static void
say_sync(struct peer *p, enum sync_step step, struct span body)
{
    struct blob b = { NULL, 0, 0 };
    uint8_t head[12];
    struct out o = out_over(head, sizeof head);

    out_u8(&o, SYNC_SYNC);
    out_u8(&o, (uint8_t)step);
    out_uint(&o, span_len(body));
    blob_add(&b, (struct span){ head, o.at });
    blob_add(&b, body);
    say(p, blob_span(&b));
    blob_free(&b);
}

/* One awareness state; NULL: gone. */
static void
say_state(struct peer *p, uint64_t client, uint64_t clock, const char *json)
{
    uint8_t body[2000], message[2020];
    struct out o = out_over(body, sizeof body),
               m = out_over(message, sizeof message);

    json = json == NULL ? "null" : json;
    out_u8(&o, 1);
    out_uint(&o, client);
    out_uint(&o, clock);
    out_uint(&o, strlen(json));
    out_text(&o, json);
    out_u8(&m, SYNC_AWARENESS);
    out_uint(&m, (uint64_t)(o.at - body));
    out_bytes(&m, body, (size_t)(o.at - body));
    sure(!o.full && !m.full);
    say(p, (struct span){ message, m.at });
}

/* It asks for all it lacks. */
static void
say_step1(struct peer *p)
{
    struct blob b = run_merge(blob_span(&p->holds)), sv = { NULL, 0, 0 };
    size_t slots = y_known_slots(70000, 70000);
    void *memory = calloc(1, y_known_bytes(slots));
    struct y_known known = { .seed = 1 };
    struct out o;

    sure(memory != NULL);
    y_known_move(&known, memory, slots);
    y_known_add(&known, blob_span(&b));
    sv.len = sv.size = y_known_write_sv(&known, NULL);
    sv.at = malloc(sv.size);
    sure(sv.at != NULL);
    o = out_over(sv.at, sv.size);
    (void)y_known_write_sv(&known, &o);
    say_sync(p, SYNC_STEP1, blob_span(&sv));
    blob_free(&sv);
    blob_free(&b);
    free(memory);
}

/* It sends what that state vector lacks. */
static void
say_rest(struct peer *p, struct span sv)
{
    struct blob b = run_merge(blob_span(&p->holds)), rest = { NULL, 0, 0 };
    struct y_store store = { .snapshot = blob_span(&b) };
    struct y_result result;
    struct y_report r;
    struct y_work work;
    struct out o;

    sure(y_check(blob_span(&b), &r));
    store.snapshot_deletes_at = r.deletes_at;
    work.size = (size_t)y_work_size(r.structs, r.ranges,
                                    r.clients + span_len(sv)) + 8;
    work.at = malloc(work.size);
    sure(work.at != NULL);
    sure(y_diff(&store, sv, work, &result) == Y_OK);
    rest.at = malloc(result.bytes);
    sure(rest.at != NULL);
    o = out_over(rest.at, result.bytes);
    y_write(&result, &o);
    rest.len = result.bytes;
    say_sync(p, SYNC_STEP2, blob_span(&rest));
    blob_free(&rest);
    free(work.at);
    blob_free(&b);
}

/* It sends all it has. */
static void
say_all(struct peer *p)
{
    say_rest(p, span_of("", 1));
}

static void
peer_takes_update(struct peer *p, struct span update, bool answer)
{
    struct y_report r;

    sure(y_check(update, &r));
    if (!answer && p->step2 == 0) { /* it can only wait for what follows */
        struct y_walk w = y_walk(update);
        struct y_stretch stretch;
        while (y_walk_stretch(&w, &stretch))
            p->early += stretch.from == 0;
    }
    run_add(&p->holds, update);
}

static void
peer_understands(struct peer *p, struct span m)
{
    uint64_t type = 9, step = 9, left, len;
    struct y_aware entry;
    struct y_in in;

    p->longest = span_len(m) > p->longest ? span_len(m) : p->longest;
    sure(y_uint(&m, &type));
    if (type == SYNC_SYNC) {
        sure(y_uint(&m, &step) && y_uint(&m, &len) && len == span_len(m));
        if (step == SYNC_STEP1) {
            p->step1++;
            if (!p->mute)
                say_rest(p, m);
        } else {
            peer_takes_update(p, m, step == SYNC_STEP2);
            *(step == SYNC_STEP2 ? &p->step2 : &p->updates) += 1;
        }
    } else if (type == SYNC_AWARENESS) {
        sure(y_uint(&m, &len) && len == span_len(m));
        in = y_aware_open(m, &left);
        p->keepalives += left == 0;
        while (y_aware_next(&in, &left, &entry)) {
            *(entry.gone ? &p->gone : &p->states) += 1;
            p->their_clock = entry.clock;
            (void)snprintf(p->state, sizeof p->state, "%.*s",
                           (int)span_len(entry.json),
                           (const char *)entry.json.at);
        }
        sure(in.fault == NULL);
    } else {
        sure(type == SYNC_AUTH && *m.at == 0);
        m.at++;
        sure(y_uint(&m, &len) && len == span_len(m));
        p->denied++;
        (void)snprintf(p->denial, sizeof p->denial, "%.*s", (int)len,
                       (const char *)m.at);
    }
}

/* Cuts the next frame off what came in.  False: it is not whole. */
static bool
peer_cut_frame(struct peer *p, uint8_t *opcode, struct span *payload)
{
    size_t head = 2, len;

    if (p->in.len < 2)
        return false;
    len = p->in.at[1];
    head += len == 126 ? 2 : len == 127 ? 8 : 0;
    if (p->in.len < head)
        return false;
    if (head > 2) {
        len = 0;
        for (size_t i = 2; i < head; i++)
            len = len << 8 | p->in.at[i];
    }
    if (p->in.len < head + len)
        return false;
    *opcode = p->in.at[0];
    *payload = span_of(p->in.at + head, len);
    return true;
}

static void
peer_drop(struct peer *p, const uint8_t *end)
{
    size_t n = (size_t)(end - p->in.at);

    memmove(p->in.at, p->in.at + n, p->in.len - n);
    p->in.len -= n;
}

static void
hear(struct peer *p)
{
    struct span payload;
    uint8_t opcode;

    drain(p);
    if (p->fd < 0 || p->deaf)
        return;
    if (!p->upgraded && p->in.len > 4) {
        const uint8_t *end = memmem(p->in.at, p->in.len, "\r\n\r\n", 4);
        if (end == NULL)
            return;
        sure(memcmp(p->in.at, "HTTP/1.1 101", 12) == 0);
        p->upgraded = true;
        peer_drop(p, end + 4);
    }
    while (p->upgraded && peer_cut_frame(p, &opcode, &payload)) {
        struct blob message = { NULL, 0, 0 };
        blob_add(&message, payload);
        peer_drop(p, payload.end);
        if (opcode == 0x88)
            p->code = (uint16_t)(message.at[0] << 8 | message.at[1]);
        else if (opcode == 0x89)
            say_bytes(p, "\x8a\x80\0\0\0\0", 6);
        else
            peer_understands(p, blob_span(&message));
        blob_free(&message);
    }
}

static void
hear_all(void)
{
    for (size_t i = 0; i < PEERS; i++)
        hear(&peers[i]);
}

static int checks_every = 1; /* turn; long documents take long to check */

static void
turn(void)
{
    static int n;

    sure(collabd_step(s, 0) == 0);
    if (++n % checks_every == 0)
        collabd_check(s);
    hear_all();
}

static void
turns(int n)
{
    while (n-- > 0)
        turn();
}

/* Turns until the thread stands at the gate. */
static void
gate_await(void)
{
    for (int i = 0;; i++) {
        bool there;
        (void)pthread_mutex_lock(&gate_lock);
        there = gate_waiting > 0;
        (void)pthread_mutex_unlock(&gate_lock);
        if (there)
            return;
        sure(i < 5000);
        (void)usleep(200);
        turn();
    }
}

/* Time passes. */
static void
pass(int64_t ms)
{
    while (ms > 0) {
        int64_t step = ms > 500 ? 500 : ms;
        clock_ms += step;
        ms -= step;
        turns(3);
    }
}

static struct conn *
conn_of(const struct peer *p)
{
    struct conn *c = conn_at(s, p->conn.slot);

    sure(c->id.gen == p->conn.gen);
    return c;
}

static struct sync *
block_of(const struct peer *p)
{
    return sync_of(s, conn_of(p));
}

/* Connects, and comes into a document; it has not said anything yet, unless it
 * answers to the SyncStep1. */
static struct peer *
enter_quietly(unsigned i, const char *name, uint64_t client, bool mute)
{
    static const uint8_t here[16] = { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff,
                                      127, 0, 0, 1 };
    struct peer *p = &peers[i];
    char head[400];
    int pair[2], small = 16384;
    struct conn *c;

    sure(p->fd < 0);
    sure(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0,
                    pair) == 0);
    (void)setsockopt(pair[0], SOL_SOCKET, SO_SNDBUF, &small, sizeof small);
    c = conn_begin(s, pair[0], 0, here);
    sure(c != NULL);
    *p = (struct peer){ .fd = pair[1], .conn = c->id, .client = client,
                        .mute = mute };
    (void)snprintf(head, sizeof head,
                   "GET /yjs/%s HTTP/1.1\r\nHost: localhost\r\n"
                   "Connection: Upgrade\r\nUpgrade: websocket\r\n"
                   "Sec-WebSocket-Version: 13\r\n"
                   "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n", name);
    say_bytes(p, head, strlen(head));
    turns(2);
    return p;
}

static struct peer *
enter(unsigned i, const char *name, uint64_t client)
{
    return enter_quietly(i, name, client, false);
}

/* ... and asks for what there is. */
static struct peer *
join(unsigned i, const char *name, uint64_t client)
{
    struct peer *p = enter(i, name, client);

    say_step1(p);
    turns(3);
    return p;
}

/* The same with a state of awareness at once, as editors do. */
static struct peer *
join_seen(unsigned i, const char *name, uint64_t client, uint64_t clock,
          const char *json)
{
    struct peer *p = enter_quietly(i, name, client, true);

    say_step1(p);
    say_state(p, client, clock, json);
    turns(3);
    return p;
}

static void
forget(struct peer *p)
{
    if (p->fd >= 0)
        (void)close(p->fd);
    blob_free(&p->in);
    blob_free(&p->holds);
    p->fd = -1;
}

static void
leave(struct peer *p)
{
    forget(p);
    turns(3);
}

/* Types; the turn comes later. */
static void
type(struct peer *p, size_t len)
{
    struct span update = typed(p->client, p->clock, len);

    run_add(&p->holds, update);
    say_sync(p, SYNC_UPDATE, update);
    p->clock += len;
}

static void
erase(struct peer *p, uint64_t client, uint64_t clock, uint64_t len)
{
    struct span update = erased(client, clock, len);

    run_add(&p->holds, update);
    say_sync(p, SYNC_UPDATE, update);
}

/* Do these two and the server hold the same? */
static bool
agree(const struct peer *p, const struct peer *q, const char *name)
{
    struct blob b = doc_run(doc_named(name));
    bool equal = runs_are_equal(blob_span(&p->holds), blob_span(&q->holds)) &&
                 runs_are_equal(blob_span(&p->holds), blob_span(&b));

    blob_free(&b);
    return equal;
}

/* ----- beginning and end ------------------------------------------------- */

static int
begin(void **state)
{
    (void)state;
    disk_is_fine();
    no_pages = false;
    gate_shut = false;
    clock_ms = 5000000;
    checks_every = 1;
    the_turn = pthread_self();
    sys.clock_gettime = fake_clock;
    sys.openat = disk_openat;
    sys.pwritev = disk_pwritev;
    sys.ftruncate = disk_ftruncate;
    sys.renameat = disk_renameat;
    sys.unlinkat = disk_unlinkat;
    sys.fdatasync = disk_fdatasync;
    sys.fsync = disk_fsync;
    sys.mmap = scarce_mmap;
    sys.mremap = scarce_mremap;
    sys.pthread_create = no_thread;
    for (size_t i = 0; i < PEERS; i++)
        peers[i] = (struct peer){ .fd = -1 };
    (void)snprintf(folder, sizeof folder, "/tmp/collabd-docs-XXXXXX");
    return mkdtemp(folder) == NULL;
}

static void
stop(void)
{
    gate_set(false);
    for (size_t i = 0; i < PEERS; i++)
        forget(&peers[i]);
    collabd_free(s);
    s = NULL;
}

static int
end(void **state)
{
    (void)state;
    disk_is_fine();
    no_pages = false;
    stop();
    empty_folder();
    return rmdir(folder);
}

/* ----- documents: what is counted agrees with what is there -------------- */

static void
what_one_types_the_other_has(void **state)
{
    struct peer *a, *b;

    (void)state;
    start_kept("--fsync", "interval");
    a = join(0, "a", 1);
    b = join(1, "a", 2);
    sure(a->step1 == 1 && a->step2 == 1 && b->step2 == 1);
    for (int i = 0; i < 20; i++) {
        type(i % 3 == 0 ? b : a, 1 + (size_t)i);
        turns(2);
        sure(agree(a, b, "a"));
    }
    erase(a, 2, 3, 4);
    turns(2);
    sure(agree(a, b, "a"));
    sure(s->count.doc_updates == 21);
}

static int
compare_known(const void *a, const void *b)
{
    return memcmp(a, b, sizeof(struct y_known_client));
}

/* The table of what is known, in an order of its own. */
static struct blob
known_of(const struct doc *d)
{
    struct blob b = { NULL, 0, 0 };

    for (size_t i = 0; i < d->known.slots; i++)
        if (d->known.at[i].end > 0)
            blob_add(&b, span_of(&d->known.at[i], sizeof d->known.at[i]));
    if (b.len > 0)
        qsort(b.at, b.len / sizeof(struct y_known_client),
              sizeof(struct y_known_client), compare_known);
    blob_add(&b, span_of(d->known.islands,
                         d->known.n_islands * sizeof *d->known.islands));
    return b;
}

/* Three clients whose updates come twice, late, cut differently and with
 * holes; merged, counted anew and closed at any time. */
static void
random_updates_in_any_order_are_one_document(void **state)
{
    struct peer *p[3], *reader;

    (void)state;
    start_kept("--fsync", "interval");
    for (unsigned i = 0; i < 3; i++)
        p[i] = join(i, "a", 10 + i);
    reader = join(3, "a", 9);
    for (case_no = 0; case_no < 3000; case_no++) {
        struct peer *x = p[test_random(3)];
        struct doc *d = doc_named("a");
        uint64_t at = test_random(600), len = 1 + test_random(40);
        struct span update;
        switch (test_random(12)) {
        case 0:
            update = erased(10 + test_random(3), at, len);
            break;
        case 1:
            (void)doc_merge(s, d);
            continue;
        case 2: {
            struct blob before = known_of(d), after;
            sure(doc_recount(s, d, true));
            after = known_of(d);
            sure(span_equals(blob_span(&before), blob_span(&after)));
            blob_free(&before);
            blob_free(&after);
            continue;
        }
        case 3:
            say_all(x);
            turn();
            continue;
        default: /* as an own edit, or long known, or ahead of a gap */
            update = typed(x->client, at, (size_t)len);
            break;
        }
        run_add(&x->holds, update);
        say_sync(x, test_random(4) == 0 ? SYNC_STEP2 : SYNC_UPDATE, update);
        turn();
        pass(test_random(20) == 0 ? 1000 : 0);
    }
    for (unsigned i = 0; i < 3; i++)
        say_all(p[i]);
    turns(5);
    for (unsigned i = 0; i < 3; i++)
        sure(agree(p[i], reader, "a"));
}

static void
nothing_is_taken_twice(void **state)
{
    struct peer *a, *b;
    struct doc *d;
    size_t len;

    (void)state;
    start_kept("--fsync", "interval");
    a = join(0, "a", 1);
    b = join(1, "a", 2);
    type(a, 100);
    erase(a, 1, 20, 5);
    turns(2);
    d = doc_named("a");
    len = d->tail_len;
    for (int i = 0; i < 5; i++) {
        say_all(a);
        say_all(b);
        turns(2);
    }
    sure(d->tail_len == len && s->count.doc_updates == 2);
    sure(b->updates == 2);
}

/* ----- documents: memory ------------------------------------------------- */

static void
all_memory_comes_back(void **state)
{
    (void)state;
    start_kept("--fsync", "interval");
    for (unsigned i = 0; i < 3; i++) {
        static const char *const names[] = { "a", "b", "c" };
        struct peer *p = join(2 * i, names[i], 1), *q = join(2 * i + 1,
                                                             names[i], 2);
        say_state(q, 2, 1, "{\"name\":\"q\"}");
        for (int k = 0; k < 30; k++) {
            type(k % 2 == 0 ? p : q, 3000);
            turn();
        }
        leave(p);
        leave(q);
    }
    pass(3000);
    for (unsigned i = 0; i < 3; i++)
        sure(room_close_oldest(s, true));
    sure(!room_close_oldest(s, true));
    collabd_check(s);
    sure(s->doc_used == 0);
}

static void
a_document_has_a_longest_length(void **state)
{
    struct peer *a, *b;
    uint64_t full;

    (void)state;
    start_kept("--max-doc", "100K");
    a = join(0, "a", 1);
    b = join(1, "a", 2);
    a->mute = true;
    for (int i = 0; i < 30; i++) {
        type(a, 4000);
        turns(2);
    }
    sure(a->denied == 1 && strstr(a->denial, "--max-doc") != NULL);
    full = run_next_clock(blob_span(&b->holds), 1);
    sure(full >= 80000 && full < 102400);
    erase(b, 1, 0, 10); /* what deletes is taken */
    turns(2);
    sure(b->denied == 0);
    sure(run_ranges(blob_span(&a->holds)) == 1);
}

/* The fullest memory still lets every document be merged: each in turn is. */
static void
what_was_accepted_can_be_merged_in_full_memory(void **state)
{
    static const char *const names[] = { "a", "b", "c" };
    static const char *const gc[] = { "off", "auto", "full" };
    struct peer *p[3];

    (void)state;
    for (case_no = 0; case_no < 9; case_no++) {
        unsigned denied = 0;
        checks_every = case_no < 6 ? 3 : 200;
        start_with("--doc-memory", "1M", "--max-doc", "1M", "--gc",
                   gc[case_no % 3]);
        for (unsigned i = 0; i < 3; i++) {
            p[i] = join(i, names[i], 1);
            p[i]->mute = true;
        }
        while (denied < 6) {
            struct peer *x = p[test_random(3)];
            unsigned before = x->denied;
            size_t len = test_random(case_no < 6 ? 3000 : 40) + 1;
            if (x->clock > 0 && test_random(3) == 0)
                erase(x, 1, test_random(x->clock), 1);
            else
                type(x, len);
            turns(1);
            block_of(x)->refused = false; /* so that it is told again */
            denied += x->denied - before;
            if (x->denied > before)
                x->clock = run_next_clock(blob_span(&x->holds), 1);
        }
        for (unsigned i = 0; i < 3; i++)
            sure(doc_merge(s, doc_named(names[i])));
        collabd_check(s);
        stop();
    }
}

static void
a_document_has_so_many_clients_and_gaps(void **state)
{
    struct peer *a;
    struct doc *d;

    (void)state;
    start_with("--max-message", "1M", "--message-memory", "4M",
               "--doc-memory", "256M", "--max-clients", "4");
    checks_every = 300;
    a = join(0, "a", 1);
    a->mute = true;
    for (unsigned i = 0; i < 11; i++) {
        say_sync(a, SYNC_UPDATE, crowd(1000 + i * 9500, 9500));
        turns(3);
    }
    d = doc_named("a");
    sure(a->denied == 1 && strstr(a->denial, "too many clients") != NULL);
    sure(d->known.used == 95000);
    leave(a);
    a = join(0, "b", 1);
    a->mute = true;
    for (unsigned i = 0; a->denied == 0; i++) {
        sure(i < 5000);
        say_sync(a, SYNC_UPDATE, typed(1, 10 + 2 * i, 1));
        turn();
    }
    sure(strstr(a->denial, "gaps") != NULL);
    sure(doc_named("b")->known.n_islands >= 4000);
    block_of(a)->refused = false;
    say_sync(a, SYNC_UPDATE, typed(1, 0, 10)); /* makes one less */
    turns(2);
    sure(a->denied == 1);
}

static void
a_refused_update_leaves_no_memory_behind(void **state)
{
    struct peer *a;
    struct doc *d;
    size_t size;

    (void)state;
    start_with("--doc-memory", "1M", "--max-doc", "1M", "--max-message", "1M",
               "--message-memory", "4M");
    a = join(0, "a", 1);
    a->mute = true;
    d = doc_named("a");
    type(a, 10);
    turns(2);
    (void)doc_merge(s, d);
    size = d->tail.size;
    type(a, 500000);
    turns(3);
    if (a->denied > 0)
        sure(d->tail.size <= size);
}

/* What is held back follows the costliest document that is open. */
static void
what_is_held_back_comes_back(void **state)
{
    struct peer *a;

    (void)state;
    start_kept("--doc-memory", "4M", "--max-doc", "2M", "--max-message", "1M",
               "--message-memory", "4M");
    a = join(0, "a", 1);
    type(a, 900000);
    turns(3);
    sure(s->doc_reserve > 900000);
    leave(a);
    pass(3000);
    while (room_close_oldest(s, true))
        ;
    sure(s->doc_used == 0);
    a = join(0, "b", 1);
    type(a, 10);
    turns(3);
    sure(s->doc_reserve < 400000);
}

static void
a_document_that_is_full_does_not_close_others(void **state)
{
    struct peer *a;

    (void)state;
    start_kept("--max-doc", "50K");
    a = join(0, "b", 1);
    type(a, 100);
    turns(2);
    leave(a);
    pass(3000);
    sure(doc_named("b")->state == DOC_OPEN);
    a = join(0, "a", 1);
    a->mute = true;
    for (int i = 0; i < 20; i++) {
        type(a, 4000);
        turns(2);
    }
    sure(a->denied > 0);
    sure(doc_named("b")->state == DOC_OPEN);
}

/* It was refused for want of memory, and went before there was some. */
static void
who_was_refused_may_leave(void **state)
{
    struct peer *a;

    (void)state;
    start_kept("--max-doc", "50K");
    a = join(0, "a", 1);
    a->mute = true;
    for (int i = 0; i < 20; i++) {
        type(a, 4000);
        turns(1);
    }
    sure(a->denied > 0);
    leave(a);
    pass(20000);
    while (room_close_oldest(s, true))
        ;
    collabd_check(s);
    sure(s->doc_used == 0);
    a = join(0, "a", 3);
    type(a, 100);
    turns(3);
    sure(a->denied == 0 || a->denied == 1);
}

static void
who_was_refused_is_asked_again(void **state)
{
    struct peer *a, *b;

    (void)state;
    start_kept("--max-doc", "50K");
    a = join(0, "a", 1);
    b = join(1, "a", 2);
    for (int i = 0; i < 20; i++) {
        type(a, 3000);
        turns(1);
    }
    sure(a->denied > 0 && a->step1 == 1);
    s->cfg->max_doc = 200000; /* a reload */
    pass(3000);
    sure(a->step1 == 2);
    sure(agree(a, b, "a"));
}

/* ----- documents: being sent --------------------------------------------- */

/* Types until the document has that many bytes, quickly. */
static void
fill(struct peer *p, size_t bytes)
{
    while (bytes > 0) {
        size_t n = bytes < 60000 ? bytes : 60000;
        type(p, n);
        turn();
        bytes -= n;
    }
    turns(3);
}

static void
a_snapshot_that_is_being_sent_stays(void **state)
{
    struct peer *a, *b, *c, *e;
    struct doc *d;
    const uint8_t *first;

    (void)state;
    start_kept("--doc-memory", "32M");
    a = join(0, "a", 1);
    fill(a, 900000);
    d = doc_named("a");
    b = enter(1, "a", 2);
    b->deaf = true;
    say_step1(b);
    turns(3);
    first = d->now.memory.at;
    sure(d->now.pins == 1 && d->tail_len == 0);
    type(a, 1000);
    turns(2);
    sure(doc_merge(s, d)); /* b keeps the old one */
    collabd_check(s);
    sure(d->before.memory.at == first && d->before.pins == 1);
    sure(d->now.pins == 0);
    type(a, 1000);
    turns(2);
    sure(!doc_merge(s, d)); /* there is at most one such */
    c = enter(2, "a", 3);
    c->deaf = true;
    say_step1(c);
    turns(3);
    e = enter(3, "a", 4);
    e->deaf = true;
    say_step1(e);
    turns(3);
    leave(c);
    b->deaf = false;
    turns(100);
    sure(d->before.memory.at == NULL);
    sure(b->step2 == 1 && agree(a, b, "a"));
    e->deaf = false;
    turns(100);
    sure(agree(a, e, "a"));
    leave(e);
    leave(b);
    sure(d->now.pins == 0);
}

/* Two who read slowly begin with different snapshots, and leave halfway. */
static void
who_leaves_halfway_gives_its_pin_back(void **state)
{
    struct peer *a, *b, *c;
    struct doc *d;

    (void)state;
    start_kept("--doc-memory", "32M");
    a = join(0, "a", 1);
    fill(a, 900000);
    d = doc_named("a");
    for (case_no = 0; case_no < 4; case_no++) {
        b = enter(1, "a", 2);
        b->deaf = true;
        say_step1(b);
        turns(2);
        type(a, 10);
        turns(2);
        (void)doc_merge(s, d);
        c = enter(2, "a", 3);
        c->deaf = true;
        say_step1(c);
        turns(2);
        sure(d->before.pins == 1 && d->now.pins == 1);
        leave(case_no % 2 == 0 ? b : c);
        leave(case_no % 2 == 0 ? c : b);
        sure(d->before.pins == 0 && d->now.pins == 0);
        sure(d->before.memory.at == NULL);
    }
}

static void
a_joiner_goes_on_in_the_ring(void **state)
{
    struct peer *a, *b;

    (void)state;
    start_kept("--fsync", "interval");
    a = join(0, "a", 1);
    fill(a, 300000);
    b = enter(1, "a", 2);
    b->deaf = true;
    say_step1(b);
    turns(2);
    for (int i = 0; i < 5; i++) {
        type(a, 100);
        turns(2);
    }
    sure(conn_of(b)->in.outside);
    b->deaf = false;
    turns(60);
    sure(!conn_of(b)->in.outside && b->step2 == 1 && b->updates == 5);
    sure(agree(a, b, "a"));
    type(b, 10);
    turns(2);
    sure(agree(a, b, "a"));
}

static void
a_joiner_that_the_ring_has_left_gets_the_difference(void **state)
{
    struct peer *a, *b;

    (void)state;
    for (case_no = 0; case_no < 2; case_no++) {
        start_kept("--fsync", case_no == 0 ? "interval" : "always");
        a = join(0, "a", 1 + (uint64_t)case_no * 10);
        fill(a, 400000);
        b = enter(1, "a", 2);
        b->deaf = true;
        say_step1(b);
        turns(2);
        sure(block_of(b)->sv_len > 0); /* so long that it may be left behind */
        for (int i = 0; i < 40; i++) {
            type(a, 5000);
            turns(2);
        }
        sure(room_named("a")->ring.tail > block_of(b)->entry);
        b->deaf = false;
        turns(100);
        sure(!conn_of(b)->in.outside && b->step2 == 1);
        sure(b->updates == 1); /* the difference */
        sure(agree(a, b, "a"));
        type(a, 10);
        type(b, 10);
        turns(3);
        sure(agree(a, b, "a"));
        stop();
        empty_folder();
    }
}

/* While it gets the difference, the ring leaves it again, by blocks. */
static void
a_joiner_is_led_in_again_and_again(void **state)
{
    struct peer *a, *b;

    (void)state;
    start_kept("--doc-memory", "64M", "--fsync", "interval");
    a = join(0, "a", 1);
    fill(a, 400000);
    b = enter(1, "a", 2);
    b->sips = 20000;
    say_step1(b);
    for (int i = 0; i < 60; i++) {
        type(a, i < 40 ? 30000 : 10);
        turn();
    }
    b->sips = 0;
    turns(200);
    sure(!conn_of(b)->in.outside && b->code == 0);
    sure(agree(a, b, "a"));
}

static void
a_long_document_comes_in_pieces(void **state)
{
    struct peer *a, *b, *c, *e;

    (void)state;
    start_kept("--doc-memory", "96M", "--max-doc", "30M");
    checks_every = 50;
    a = join(0, "a", 1);
    fill(a, 5000000);
    b = join(1, "a", 2);
    type(b, 1000);
    c = join(2, "a", 3);
    turns(300);
    for (int i = 0; i < 50; i++) {
        type(c, 50000);
        type(a, 10);
        turn();
    }
    erase(c, 1, 100, 7000);
    erase(c, 3, 0, 1);
    turns(3);
    pass(6000);
    e = enter(4, "a", 4);
    e->sips = 300000;
    say_step1(e);
    for (int i = 0; i < 300 && e->step2 == 0; i++) {
        if (i % 5 == 0)
            type(a, 1000);
        turn();
    }
    e->sips = 0;
    sure(e->updates >= 7 && e->early == 0);
    sure(e->longest < (1u << 20) + 100000);
    turns(200);
    sure(e->step2 == 1 && !conn_of(e)->in.outside);
    sure(agree(a, e, "a"));
    sure(agree(b, c, "a"));
    leave(e);
    /* who has a part gets the rest, in pieces as well */
    e = enter(4, "a", 4);
    e->mute = true;
    run_add(&e->holds, typed(1, 0, 700000));
    say_step1(e);
    turns(800);
    sure(e->step2 == 1 && e->updates >= 6);
    sure(agree(a, e, "a"));
    /* and one leaves in the middle of it */
    leave(e);
    e = enter(4, "a", 4);
    e->sips = 50000;
    say_step1(e);
    turns(20);
    sure(block_of(e)->joining);
    leave(e);
    sure(doc_named("a")->now.pins == 0);
}

static void
a_joiner_gets_all_cursors_however_many_have_written(void **state)
{
    struct peer *a, *b;

    (void)state;
    start_kept("--fsync", "interval");
    a = join(0, "a", 1);
    say_state(a, 1, 1, "{\"name\":\"a\"}");
    turns(2);
    b = join(1, "a", 2);
    sure(b->states == 1 && strcmp(b->state, "{\"name\":\"a\"}") == 0);
    leave(b);
    say_sync(a, SYNC_UPDATE, crowd(100000, 300)); /* long state vectors */
    turns(2);
    b = join(1, "a", 2);
    turns(5);
    sure(b->step1 == 1 && b->step2 == 1);
    sure(b->states == 1);
}

/* A second SyncStep1 while the answer to the first is under way. */
static void
one_may_ask_again_at_any_time(void **state)
{
    struct peer *a, *b;

    (void)state;
    start_kept("--doc-memory", "32M");
    a = join(0, "a", 1);
    fill(a, 600000);
    b = enter(1, "a", 2);
    b->sips = 50000;
    for (int i = 0; i < 40; i++) {
        if (i % 3 == 0 && b->code == 0)
            say_sync(b, SYNC_STEP1, span_of("", 1));
        type(a, 4000);
        turns(1);
    }
    b->sips = 0;
    turns(400);
    sure(b->step2 == 14);
    sure(agree(a, b, "a"));
}

/* ----- the disk fails ---------------------------------------------------- */

/* Ring, tail and what is known are as before the edit. */
static void
what_cannot_be_kept_is_taken_back_exactly(void **state)
{
    static const char *const fsync[] = { "interval", "always" };
    struct peer *a, *b;

    (void)state;
    for (case_no = 0; case_no < 4; case_no++) {
        struct blob before, after;
        struct room *room;
        struct doc *d;
        struct ring ring;
        size_t tail;
        start_kept("--fsync", fsync[case_no % 2]);
        a = join(0, "a", 1);
        b = join(1, "a", 2);
        type(a, 100);
        turns(2);
        say_sync(a, SYNC_UPDATE, typed(1, 200, 10)); /* an island */
        turns(2);
        d = doc_named("a");
        room = room_named("a");
        before = known_of(d);
        ring = room->ring;
        tail = d->tail_len;
        disk_will(case_no < 2 ? DISK_FAIL : DISK_SHORT, DISK_PWRITEV, 1, false,
                  ENOSPC);
        b->mute = true;
        type(a, 50);
        type(b, 30);
        type(a, 60); /* closes the gap */
        turn();
        after = known_of(d);
        sure(span_equals(blob_span(&before), blob_span(&after)));
        blob_free(&before);
        blob_free(&after);
        sure(d->tail_len == tail && d->shown == tail && d->written == tail);
        sure(room->ring.head == ring.head && room->ring.shown == ring.shown &&
             room->ring.head_at == ring.head_at && room->ring.pos == ring.pos);
        turns(2);
        sure(a->denied == 1 && b->denied == 1 && b->updates == 2);
        sure(strstr(a->denial, "disk") != NULL);
        type(a, 5);
        turns(2); /* it is told once, and refused until the next trial */
        sure(a->denied == 1 && b->updates == 2 && a->step1 == 1);
        b->mute = false;
        pass(2500);
        sure(a->step1 == 2 && b->step1 == 2);
        sure(agree(a, b, "a"));
        stop();
        empty_folder();
    }
}

/* In a table as small as can be, and no page to be had. */
static void
taking_back_needs_no_memory(void **state)
{
    struct peer *a, *b;

    (void)state;
    start_kept("--fsync", "interval");
    a = join(0, "a", 1);
    b = join(1, "a", 2);
    for (unsigned i = 0; i < 60; i++) {
        say_sync(a, SYNC_UPDATE, typed(1000 + i, 0, 1));
        turn();
    }
    sure(doc_merge(s, doc_named("a")));
    disk_will(DISK_FAIL, DISK_PWRITEV, 1, false, ENOSPC);
    disk.pages_too = true;
    type(b, 10);
    turn();
    sure(no_pages);
    no_pages = false;
    turns(2);
    sure(b->denied == 1);
    pass(5000);
    sure(run_next_clock(blob_span(&a->holds), 2) == 10);
}

/* ----- the disk's thread ------------------------------------------------- */

static void
await_job(struct doc *d)
{
    for (int i = 0; d->job.busy; i++) {
        sure(i < 500);
        sure(collabd_step(s, 20) == 0);
        collabd_check(s);
    }
    turns(2);
}

static void
with_thread(void)
{
    sys.pthread_create = pthread_create;
}

/* With --fsync always nothing is seen before it is on the disk. */
static void
always_means_before_anybody_sees_it(void **state)
{
    struct peer *a, *b;
    struct doc *d;

    (void)state;
    with_thread();
    start_kept("--fsync", "always");
    a = join(0, "a", 1);
    b = join(1, "a", 2);
    d = doc_named("a");
    gate_set(true);
    type(a, 10);
    turns(3);
    gate_await();
    sure(b->updates == 0 && d->shown == 0 && d->written > 0);
    type(a, 20);
    turns(3);
    gate_pass_one(); /* fdatasync of the file, then of the folder */
    turns(3);
    sure(b->updates == 0);
    gate_await();
    gate_pass_one();
    for (int i = 0; i < 100 && b->updates == 0; i++) {
        (void)usleep(1000);
        turn();
    }
    sure(b->updates == 1 && d->shown < d->written);
    gate_set(false);
    await_job(d);
    turns(3);
    await_job(d);
    sure(b->updates == 2 && agree(a, b, "a"));
}

/* The disk becomes full while a sync is in flight. */
static void
a_sync_in_flight_shows_nothing_that_was_taken_back(void **state)
{
    static const char *const fsync[] = { "interval", "always" };
    struct peer *a, *b;
    struct doc *d;

    (void)state;
    with_thread();
    for (case_no = 0; case_no < 4; case_no++) {
        start_kept("--fsync", fsync[case_no % 2]);
        a = join(0, "a", 1);
        b = join(1, "a", 2);
        d = doc_named("a");
        type(a, 10);
        turns(3);
        pass(1500);
        await_job(d);
        gate_set(true);
        if (case_no >= 2) { /* in the turn in which the sync begins */
            type(a, 20);
            turns(2);
            clock_ms += 1500;
        }
        if (case_no != 2 || !d->job.busy) {
            type(a, 30);
            turns(1);
        }
        clock_ms += 1500;
        disk_will(DISK_FAIL, DISK_PWRITEV, 1, false, ENOSPC);
        type(a, 40);
        turns(3);
        if (d->job.busy)
            gate_await();
        sure(disk.calls > 0);
        gate_set(false);
        await_job(d);
        turns(3);
        pass(4000);
        await_job(d);
        sure(agree(a, b, "a"));
        stop();
        empty_folder();
    }
}

static void
a_merge_may_overtake_a_sync(void **state)
{
    struct peer *a, *b;
    struct doc *d;

    (void)state;
    with_thread();
    start_kept("--fsync", "interval");
    a = join(0, "a", 1);
    b = join(1, "a", 2);
    d = doc_named("a");
    type(a, 50000);
    turns(3);
    gate_set(true);
    clock_ms += 1100;
    turns(2);
    gate_await();
    sure(d->job.busy && d->job.kind == DOC_JOB_SYNC);
    sure(doc_merge(s, d));
    collabd_check(s);
    gate_set(false);
    (void)usleep(20000);
    /* in the turn in which it comes back, nothing can be written */
    disk_will(DISK_FAIL, DISK_PWRITEV, 1, false, ENOSPC);
    type(a, 10);
    turns(2);
    await_job(d);
    pass(4000);
    await_job(d);
    sure(agree(a, b, "a"));
}

/* Edits that come while the new file is written, and while it waits to take
 * the old one's place, are in it. */
static void
edits_during_a_compaction_are_kept(void **state)
{
    static const char *const fsync[] = { "interval", "always" };
    struct peer *a, *b;
    struct doc *d;
    uint64_t len;

    (void)state;
    with_thread();
    for (case_no = 0; case_no < 4; case_no++) {
        start_kept("--fsync", fsync[case_no % 2]);
        a = join(0, "a", 1);
        b = join(1, "a", 2);
        d = doc_named("a");
        type(a, 5000);
        turns(3);
        await_job(d);
        pass(1500);
        await_job(d);
        gate_set(true);
        sure(doc_compact(s, d, sync_job_done));
        gate_await();
        sure(d->job.kind == DOC_JOB_WRITE);
        type(a, 100);
        type(b, 10);
        turns(3);
        sure(case_no % 2 == 1 || agree(a, b, "a"));
        sure(case_no % 2 == 1 || !doc_merge(s, d));
        gate_pass_one();
        gate_await();
        sure(d->job.kind == DOC_JOB_INSTALL);
        type(a, 200);
        turns(3);
        if (case_no % 2 == 0) {
            sure(agree(a, b, "a"));
            sure(case_no == 0 || doc_merge(s, d));
        }
        type(b, 20);
        turns(3);
        gate_set(false);
        await_job(d);
        type(a, 1);
        turns(3);
        await_job(d);
        pass(1500);
        await_job(d);
        sure(s->count.doc_compactions == 1 && agree(a, b, "a"));
        len = a->clock;
        sure(len == 5301);
        stop();
        start_kept("--fsync", "interval");
        a = join(0, "a", 1);
        sure(run_next_clock(blob_span(&a->holds), 1) == len);
        sure(run_next_clock(blob_span(&a->holds), 2) == 30);
        stop();
        empty_folder();
    }
}

/* A long document is merged beside the turn.  What is shown meanwhile stays
 * shown, also if the disk becomes full in the turn in which the merge ends. */
static void
a_merge_beside_the_turn_loses_nothing(void **state)
{
    static const char *const fsync[] = { "interval", "always" };
    struct peer *a, *b, *c;
    struct doc *d;
    uint64_t clock;

    (void)state;
    with_thread();
    for (case_no = 0; case_no < 4; case_no++) {
        start_kept("--fsync", fsync[case_no % 2], "--doc-memory", "32M");
        checks_every = 20;
        a = join(0, "a", 1);
        b = join(1, "a", 2);
        d = doc_named("a");
        for (int i = 0; i < 400; i++) {
            type(a, 3000);
            turns(2);
            await_job(d);
        }
        pass(6000);
        await_job(d);
        checks_every = 1;
        type(a, 1000);
        turns(2);
        await_job(d);
        sure(agree(a, b, "a"));
        gate_set(true);
        clock_ms += 5500;
        for (int i = 0; i < 5 && !d->job.busy; i++)
            turn();
        sure(d->job.busy && d->job.kind == DOC_JOB_MERGE);
        gate_await();
        type(a, 500);
        turns(3);
        sure(case_no % 2 == 1 || b->updates == 402);
        if (case_no >= 2)
            disk_will(DISK_FAIL, DISK_PWRITEV, 1, false, ENOSPC);
        gate_set(false);
        (void)usleep(50000);
        clock = run_next_clock(blob_span(&b->holds), 1);
        type(a, 40); /* in the turn in which the job is back */
        for (int i = 0; i < 3; i++) {
            struct blob run;
            turn();
            run = doc_run(d);
            sure(run_next_clock(blob_span(&run), 1) >= clock);
            blob_free(&run);
        }
        await_job(d);
        pass(4000);
        await_job(d);
        turns(3);
        await_job(d);
        sure(agree(a, b, "a"));
        sure(d->shown == d->tail_len);
        c = enter(2, "a", 3);
        say_step1(c);
        turns(400);
        sure(agree(a, c, "a"));
        stop();
        empty_folder();
    }
}

/* The same while there is always something under way to the disk. */
static void
a_joiner_is_let_in_while_others_type_on(void **state)
{
    struct peer *a, *b;
    struct doc *d;
    int i;

    (void)state;
    with_thread();
    start_kept("--fsync", "always");
    checks_every = 20;
    a = join(0, "a", 1);
    d = doc_named("a");
    for (i = 0; i < 100; i++) {
        type(a, 4000);
        turns(2);
        await_job(d);
    }
    b = enter(1, "a", 2);
    b->deaf = true;
    say_step1(b);
    turns(3);
    for (i = 0; i < 30; i++) {
        type(a, 4000);
        turns(2);
        await_job(d);
    }
    sure(room_named("a")->ring.tail > block_of(b)->entry);
    b->deaf = false;
    gate_set(true);
    for (i = 0; i < 100 && conn_of(b)->in.outside; i++) {
        type(a, 100);
        turns(2);
        gate_await(); /* a sync is in flight, */
        type(a, 100);
        turns(3);     /* and more has come */
        gate_pass_one();
        (void)usleep(2000);
        turns(1);
    }
    sure(i < 100);
    gate_set(false);
    await_job(d);
    turns(5);
    await_job(d);
    turns(50);
    sure(agree(a, b, "a"));
}

/* Who was answered while a tail was there gets no more than what came since. */
static void
a_difference_is_short_also_beside_a_tail(void **state)
{
    struct peer *a, *b;
    struct doc *d;

    (void)state;
    with_thread();
    start_kept("--fsync", "interval", "--doc-memory", "32M");
    checks_every = 20;
    a = join(0, "a", 1);
    d = doc_named("a");
    for (int i = 0; i < 400; i++) {
        type(a, 3000);
        turns(2);
        await_job(d);
    }
    gate_set(true);
    b = enter(1, "a", 2);
    b->deaf = true;
    say_step1(b);
    for (int i = 0; i < 6; i++) { /* merges that it waits for, and edits */
        turns(3);
        type(a, 100);
        turns(3);
        if (!d->job.busy)
            continue;
        gate_await();
        type(a, 100);
        turns(3);
        gate_pass_one();
        (void)usleep(5000);
    }
    gate_set(false);
    await_job(d);
    turns(3);
    await_job(d);
    for (int i = 0; i < 30; i++) {
        type(a, 4000);
        turns(2);
        await_job(d);
    }
    sure(room_named("a")->ring.tail > block_of(b)->entry);
    sure(block_of(b)->head_len > 0);
    b->deaf = false;
    for (int i = 0; i < 500 && b->step2 == 0; i++)
        turn();
    sure(b->step2 == 1);
    b->longest = 0;
    turns(400);
    sure(!conn_of(b)->in.outside && agree(a, b, "a"));
    sure(b->longest < 300000);
}

/* Who waits for a merge is known again nevertheless. */
static void
who_waits_to_join_speaks_of_itself(void **state)
{
    struct peer *a, *b;
    struct doc *d;

    (void)state;
    with_thread();
    start_kept("--fsync", "interval", "--doc-memory", "32M");
    checks_every = 20;
    a = join(0, "a", 1);
    d = doc_named("a");
    for (int i = 0; i < 400; i++) {
        type(a, 3000);
        turns(2);
        await_job(d);
    }
    b = join_seen(1, "a", 2, 5, "{\"x\":1}");
    turns(300);
    sure(a->states == 1);
    leave(b);
    sure(a->gone == 1);
    type(a, 10);
    turns(3);
    gate_set(true);
    b = enter_quietly(1, "a", 2, true);
    say_step1(b);
    say_state(b, 2, 5, "{\"x\":1}");
    gate_await(); /* a merge */
    for (int i = 0; i < 10; i++) {
        clock_ms += 100;
        turn();
    }
    gate_set(false);
    for (int i = 0; i < 50; i++) {
        (void)usleep(1000);
        clock_ms += 10;
        turn();
    }
    sure(a->states == 2 && a->their_clock == 6);
}

/* A merge costs as much in vain as with success: it is not tried every turn. */
static void
a_merge_that_finds_no_memory_is_tried_now_and_then(void **state)
{
    struct peer *a, *b, *c;
    struct doc *d;

    (void)state;
    start_with("--doc-memory", "4M", "--max-doc", "4M");
    checks_every = 20;
    a = join(0, "a", 1);
    d = doc_named("a");
    fill(a, 600000);
    pass(6000);
    b = enter(1, "a", 2);
    b->deaf = true;
    say_step1(b);
    turns(3);
    sure(d->now.pins == 1 && d->tail_len == 0);
    for (int i = 0; i < 20; i++) {
        type(a, 5000);
        turn();
    }
    c = join(2, "c", 3);
    c->mute = true;
    for (int i = 0; c->denied == 0; i++) {
        sure(i < 2000);
        type(c, 3000);
        turn();
    }
    clock_ms += 6000;
    turns(3);
    if (d->now.pins == 0)
        return; /* it was merged, there was room */
    mmaps = 0;
    for (int i = 0; i < 100; i++) {
        say_state(a, 1, 1 + (uint64_t)i, "{}");
        turn();
    }
    sure(mmaps < 50);
}

/* Full memory, and a document that is merged beside the turn if it can. */
static void
a_long_document_is_merged_in_full_memory(void **state)
{
    struct peer *a;
    struct doc *d;

    (void)state;
    start_with("--doc-memory", "8M", "--max-doc", "8M");
    checks_every = 20;
    a = join(0, "a", 1);
    a->mute = true;
    d = doc_named("a");
    for (int i = 0; a->denied == 0; i++) {
        sure(i < 5000);
        type(a, 3000);
        turn();
    }
    sure(d->now.len + d->tail_len > DOC_LONG);
    sure(strstr(a->denial, "--doc-memory") != NULL);
    pass(10000);
    sure(d->tail_len == 0);
}

/* Who types faster than the disk syncs has a short tail nevertheless. */
static void
always_does_not_keep_merges_away(void **state)
{
    struct peer *a, *b;
    struct doc *d;

    (void)state;
    with_thread();
    start_kept("--fsync", "always", "--doc-memory", "16M");
    checks_every = 30;
    a = join(0, "a", 1);
    b = join(1, "a", 2);
    d = doc_named("a");
    gate_set(true);
    for (int i = 0; i < 60; i++) {
        type(a, 3000);
        turns(3);
        gate_await(); /* there is always a sync in flight, */
        type(a, 3000);
        turns(2);     /* and always more than it covers */
        gate_pass_one();
        for (int k = 0; k < 5; k++)
            turn();
    }
    sure(s->count.doc_merges > 0);
    gate_set(false);
    await_job(d);
    turns(3);
    await_job(d);
    sure(agree(a, b, "a"));
}

/* Nobody is left, and what is on the disk is not certain. */
static void
what_may_not_be_on_the_disk_is_not_closed(void **state)
{
    struct peer *a;
    struct doc *d;

    (void)state;
    start_kept("--fsync", "interval");
    a = join(0, "a", 1);
    type(a, 100);
    turns(2);
    d = doc_named("a");
    disk_will(DISK_FAIL, DISK_FDATASYNC, 1, true, EIO);
    pass(1500);
    sure(d->file.broken);
    leave(a);
    turns(2);
    sure(!room_close_oldest(s, true));
    disk_is_fine();
    pass(5000);
    sure(!d->file.broken && room_close_oldest(s, true));
}

/* ----- crashes ----------------------------------------------------------- */

/* What the child has seen before it died, shared with the parent. */
static struct seen {
    uint64_t clock; /* of client 1: others have it all up to there */
    bool erased;
    unsigned calls;
    int stage;
} *seen;

static void
seen_by(const struct peer *reader)
{
    uint64_t clock = run_next_clock(blob_span(&reader->holds), 1);

    sure(clock >= seen->clock);
    seen->clock = clock;
    seen->erased |= run_ranges(blob_span(&reader->holds)) > 0;
}

#define OTHER 1234u

/* Another document stands beside the one that is to suffer. */
static void
make_folder(void)
{
    struct peer *p;

    empty_folder();
    disk_is_fine();
    start_kept("--fsync", "interval");
    p = join(0, "other", 1);
    type(p, OTHER);
    turns(2);
    stop();
}

/* A child's end is told; what it had to say, if it was not meant to end so. */
static int
await_child(pid_t child)
{
    int status;

    sure(waitpid(child, &status, 0) == child);
    if (WIFEXITED(status) &&
        (WEXITSTATUS(status) == 0 || WEXITSTATUS(status) == DIED))
        return WEXITSTATUS(status);
    if (test_heard >= 0) {
        static char text[4000];
        off_t at = lseek(test_heard, 0, SEEK_END) - (off_t)sizeof text + 1;
        ssize_t n = pread(test_heard, text, sizeof text - 1, at < 0 ? 0 : at);
        text[n < 0 ? 0 : n] = '\0';
        (void)dprintf(test_stderr, "%s\n", text);
    }
    fail_msg("case %d, stage %d: the child ended with %x", case_no,
             seen->stage, (unsigned)status);
    return -1;
}

/* All that was shown is there, as it was typed; the other document is whole,
 * and life goes on. */
static void
look_after(const char *fsync)
{
    struct peer *p, *q;
    struct blob expected = { NULL, 0, 0 };
    uint64_t clock;

    disk_is_fine();
    start_kept("--fsync", fsync);
    p = join(0, "other", 2);
    sure(run_next_clock(blob_span(&p->holds), 1) == OTHER);
    leave(p);
    p = join(0, "a", 3);
    clock = run_next_clock(blob_span(&p->holds), 1);
    sure(clock >= seen->clock);
    sure(!seen->erased || run_ranges(blob_span(&p->holds)) > 0);
    if (clock > 0)
        run_add(&expected, typed(1, 0, (size_t)clock));
    if (run_ranges(blob_span(&p->holds)) > 0)
        run_add(&expected, erased(1, 10, 20));
    sure(runs_are_equal(blob_span(&expected), blob_span(&p->holds)));
    blob_free(&expected);
    q = join(1, "a", 4);
    type(p, 10);
    turns(4);
    sure(p->denied == 0 && agree(p, q, "a"));
    stop();
}

/* Edits, a compaction with edits behind, all leave, one comes back. */
static void
live(const char *fsync)
{
    struct peer *a, *b;

    seen->stage = 1;
    start_kept("--fsync", fsync);
    a = join(0, "a", 1);
    b = join(1, "a", 2);
    for (int i = 0; i < 4; i++) {
        seen->stage = 10 + i;
        type(a, 700);
        turns(2);
        seen_by(b);
    }
    erase(a, 1, 10, 20);
    turns(2);
    seen_by(b);
    seen->stage = 20;
    (void)doc_compact(s, doc_named("a"), sync_job_done);
    for (int i = 0; i < 3; i++) {
        seen->stage = 30 + i;
        type(a, 700);
        turns(2);
        seen_by(b);
        pass(500);
    }
    seen->stage = 40;
    leave(a);
    leave(b);
    pass(3000);
    seen->stage = 50;
    a = join(0, "a", 1);
    b = join(1, "a", 2);
    a->clock = run_next_clock(blob_span(&a->holds), 1);
    type(a, 5);
    turns(2);
    seen_by(b);
    seen->stage = 60;
}

static void
killed_at_every_call(const char *fsync, enum disk_how how)
{
    int ended = DIED;

    for (unsigned at = 1; ended == DIED; at++) {
        pid_t child;
        case_no = (int)at;
        make_folder();
        *seen = (struct seen){ 0, false, 0, 0 };
        child = fork();
        sure(child >= 0);
        if (child == 0) {
            in_child = true;
            disk_will(how, how == DISK_DIE_SHORT ? DISK_PWRITEV : DISK_ALL, at,
                      false, 0);
            live(fsync);
            _exit(0);
        }
        ended = await_child(child);
        look_after(fsync);
        sure(at < 500);
    }
    sure(case_no > (how == DISK_DIE_SHORT ? 12 : 30));
    sure(seen->clock == 7 * 700 + 5 && seen->erased);
}

static void
a_kill_before_any_call_loses_nothing_that_was_seen(void **state)
{
    (void)state;
    killed_at_every_call("interval", DISK_DIE);
    killed_at_every_call("always", DISK_DIE);
}

static void
a_kill_behind_any_call_loses_nothing_that_was_seen(void **state)
{
    (void)state;
    killed_at_every_call("interval", DISK_DIE_AFTER);
    killed_at_every_call("always", DISK_DIE_AFTER);
}

static void
a_kill_within_any_write_loses_nothing_that_was_seen(void **state)
{
    (void)state;
    killed_at_every_call("interval", DISK_DIE_SHORT);
    killed_at_every_call("always", DISK_DIE_SHORT);
}

/* What was accepted is found again after a crash, however long it is and the
 * log behind it. */
static void
what_was_accepted_can_be_opened_again(void **state)
{
    pid_t child;
    struct peer *p;

    (void)state;
    for (case_no = 0; case_no < 3; case_no++) {
        size_t each = case_no == 0 ? 4000 : case_no == 1 ? 100 : 10;
        make_folder();
        *seen = (struct seen){ 0, false, 0, 0 };
        child = fork();
        sure(child >= 0);
        if (child == 0) {
            struct peer *a, *b;
            in_child = true;
            checks_every = 1000;
            start_kept("--doc-memory", "2M");
            a = join(0, "a", 1);
            b = join(1, "a", 2);
            a->mute = true;
            for (int i = 0; a->denied == 0 && i < 30000; i++) {
                type(a, each);
                if (i % 20 == 0)
                    turn();
            }
            turns(3);
            seen_by(b);
            _exit(0);
        }
        sure(await_child(child) == 0);
        sure(seen->clock >= 200000);
        start_kept("--doc-memory", "2M");
        p = join(0, "a", 3);
        turns(100);
        sure(p->code == 0 && p->step2 == 1);
        sure(run_next_clock(blob_span(&p->holds), 1) == seen->clock);
        stop();
    }
}

/* ----- a disk that fails at every call ----------------------------------- */

/* Edits while the disk fails, then it is well again.  Its end is a kill. */
static void
suffer(const char *fsync, enum disk_how how, unsigned mask, unsigned at,
       bool for_ever, int error)
{
    struct peer *a, *b;

    seen->stage = 1;
    start_kept("--fsync", fsync);
    a = join(0, "a", 1);
    b = join(1, "a", 2);
    type(a, 300);
    turns(3);
    seen_by(b);
    disk_will(how, mask, at, for_ever, error);
    for (int i = 0; i < 8; i++) {
        seen->stage = 10 + i;
        type(a, 700);
        turns(2);
        seen_by(b);
        if (i == 2)
            erase(a, 1, 10, 20);
        if (i == 3)
            (void)doc_compact(s, doc_named("a"), sync_job_done);
        turns(1);
        seen_by(b);
        pass(400);
        seen_by(b);
    }
    seen->calls = disk.calls;
    seen->stage = 20;
    disk_is_fine();
    for (int i = 0; i < 8; i++) {
        pass(1000);
        seen_by(b);
    }
    seen->stage = 30;
    sure(agree(a, b, "a"));
    sure(seen->clock == a->clock && seen->erased);
    type(a, 11);
    turns(3);
    seen_by(b);
    sure(seen->clock == a->clock);
    seen->stage = 40;
}

static void
fails_at_every_call(const char *fsync, enum disk_how how, unsigned mask,
                    int error)
{
    for (int for_ever = 0; for_ever < 2; for_ever++) {
        bool more = true;
        for (unsigned at = 1; more; at++) {
            pid_t child;
            case_no = (int)(at + (for_ever ? 1000 : 0));
            make_folder();
            *seen = (struct seen){ 0, false, 0, 0 };
            child = fork();
            sure(child >= 0);
            if (child == 0) {
                in_child = true;
                suffer(fsync, how, mask, at, for_ever, error);
                _exit(0);
            }
            sure(await_child(child) == 0);
            look_after(fsync);
            more = seen->calls >= at;
            sure(at < 300);
        }
    }
}

static void
every_write_may_find_the_disk_full(void **state)
{
    (void)state;
    fails_at_every_call("interval", DISK_FAIL, DISK_PWRITEV, ENOSPC);
    fails_at_every_call("always", DISK_FAIL, DISK_PWRITEV, ENOSPC);
    fails_at_every_call("interval", DISK_SHORT, DISK_PWRITEV, 0);
    fails_at_every_call("always", DISK_SHORT, DISK_PWRITEV, 0);
}

static void
every_sync_may_fail(void **state)
{
    (void)state;
    fails_at_every_call("interval", DISK_FAIL, DISK_FDATASYNC | DISK_FSYNC,
                        EIO);
    fails_at_every_call("always", DISK_FAIL, DISK_FDATASYNC | DISK_FSYNC, EIO);
}

static void
every_call_may_fail(void **state)
{
    (void)state;
    fails_at_every_call("interval", DISK_FAIL, DISK_ALL, EIO);
    fails_at_every_call("always", DISK_FAIL, DISK_ALL, EIO);
    fails_at_every_call("interval", DISK_FAIL, DISK_PWRITEV | DISK_FTRUNCATE,
                        EIO);
}

/* The disk becomes full while a new file waits to take the old one's place. */
static void
a_full_disk_during_an_install_loses_nothing(void **state)
{
    (void)state;
    for (case_no = 0; case_no < 6; case_no++) {
        pid_t child;
        make_folder();
        *seen = (struct seen){ 0, false, 0, 0 };
        child = fork();
        sure(child >= 0);
        if (child == 0) {
            struct peer *a, *b;
            struct doc *d;
            in_child = true;
            with_thread();
            start_kept("--fsync", "interval");
            a = join(0, "a", 1);
            b = join(1, "a", 2);
            d = doc_named("a");
            type(a, 5000);
            turns(3);
            gate_set(true);
            sure(doc_compact(s, d, sync_job_done));
            gate_await();
            gate_pass_one();
            gate_await();
            sure(d->job.kind == DOC_JOB_INSTALL);
            /* the old file's append, then the new one's */
            disk_will(DISK_FAIL, DISK_PWRITEV | DISK_FTRUNCATE,
                      1 + (unsigned)case_no % 3, case_no >= 3, ENOSPC);
            type(a, 100);
            turns(2);
            seen_by(b);
            disk_is_fine();
            gate_set(false);
            while (d->job.busy)
                sure(collabd_step(s, 20) == 0);
            collabd_check(s);
            type(a, 50);
            turns(2);
            seen_by(b);
            _exit(0);
        }
        sure(await_child(child) == 0);
        look_after("interval");
    }
}

/* A file whose head is damaged is written anew before it is added to; as long
 * as that cannot be, writers are refused, not kept waiting until they fall. */
static void
a_file_that_cannot_be_written_anew_refuses(void **state)
{
    struct peer *a, *b;
    char path[100];
    int fd;

    (void)state;
    start_kept("--fsync", "interval");
    a = join(0, "a", 1);
    type(a, 100);
    turns(2);
    stop();
    (void)snprintf(path, sizeof path, "%s/a.ydoc", folder);
    fd = open(path, O_RDWR);
    sure(fd >= 0 && pwrite(fd, "?", 1, 3) == 1);
    (void)close(fd);
    start_kept("--fsync", "interval");
    disk_will(DISK_FAIL, DISK_PWRITEV, 1, true, ENOSPC);
    a = join(0, "a", 3);
    b = join(1, "a", 2);
    sure(run_next_clock(blob_span(&a->holds), 1) == 100);
    type(a, 50);
    turns(3);
    pass(15000);
    sure(a->code == 0 && a->denied >= 1);
    disk_is_fine();
    pass(6000);
    sure(agree(a, b, "a") && run_next_clock(blob_span(&b->holds), 3) == 50);
}

/* The folder's sync fails behind the rename. */
static void
a_doubtful_install_loses_nothing(void **state)
{
    pid_t child;

    (void)state;
    make_folder();
    *seen = (struct seen){ 0, false, 0, 0 };
    child = fork();
    sure(child >= 0);
    if (child == 0) {
        struct peer *a, *b;
        in_child = true;
        start_kept("--fsync", "interval");
        a = join(0, "a", 1);
        b = join(1, "a", 2);
        type(a, 5000);
        turns(3);
        pass(1500);
        disk_will(DISK_FAIL, DISK_FSYNC, 1, false, EIO);
        (void)doc_compact(s, doc_named("a"), sync_job_done);
        sure(disk.calls == 1);
        type(a, 100);
        turns(2);
        seen_by(b);
        _exit(0);
    }
    sure(await_child(child) == 0);
    look_after("interval");
}

/* ----- awareness --------------------------------------------------------- */

static void
a_higher_clock_wins(void **state)
{
    struct peer *a, *b;

    (void)state;
    start_with("--fsync", "interval");
    a = join(0, "a", 1);
    b = join(1, "a", 2);
    say_state(a, 1, 0, "{}"); /* as clients do, 0 says nothing */
    turns(2);
    sure(b->states == 0);
    say_state(a, 1, 1, "{\"x\":1}");
    turns(2);
    sure(b->states == 1 && b->their_clock == 1);
    sure(a->states == 1); /* its own, too */
    say_state(a, 1, 1, "{\"x\":2}");
    say_state(a, 1, 0, "{\"x\":3}");
    say_state(a, 1, 0, NULL);
    turns(2);
    sure(b->states == 1 && b->gone == 0);
    say_state(a, 1, 7, "{\"x\":4,\"long\":\"longer than it was before\"}");
    turns(2);
    sure(b->states == 2 && b->their_clock == 7);
    say_state(a, 1, 7, NULL);
    turns(2);
    sure(b->gone == 1 && b->their_clock == 7);
    say_state(a, 1, 7, NULL);
    turns(2);
    sure(b->gone == 1);
    say_state(a, 9, 3, NULL); /* nobody knew it */
    turns(2);
    sure(b->gone == 1);
}

static void
who_comes_back_is_seen_at_once(void **state)
{
    struct peer *a, *b;

    (void)state;
    start_with("--fsync", "interval");
    a = join(0, "a", 1);
    b = join(1, "a", 2);
    say_state(a, 1, 5, "{\"x\":1}");
    turns(2);
    leave(a);
    sure(b->gone == 1 && b->their_clock == 5);
    a = join_seen(0, "a", 1, 5, "{\"x\":1}");
    sure(b->states == 2 && b->their_clock == 6);
    sure(a->states == 1 && a->their_clock == 6); /* and learns it */
}

static void
a_socket_left_behind_buries_nobody(void **state)
{
    struct peer *old, *new, *b;

    (void)state;
    start_with("--fsync", "interval");
    old = join(0, "a", 1);
    b = join(1, "a", 2);
    say_state(old, 1, 5, "{\"x\":1}");
    turns(2);
    new = join_seen(2, "a", 1, 5, "{\"x\":1}"); /* with the same clock */
    leave(old);
    sure(b->gone == 0);
    leave(new);
    sure(b->gone == 1);
}

static void
one_speaks_for_so_many(void **state)
{
    struct peer *a, *b;

    (void)state;
    start_with("--fsync", "interval");
    a = join(0, "a", 1);
    b = join(1, "a", 2);
    for (unsigned i = 0; i < AWARE_IDS_MAX + 5; i++) {
        say_state(a, 100 + i, 1, "{}");
        turns(1);
    }
    turns(2);
    sure(b->states == AWARE_IDS_MAX);
    say_state(a, 100, 2, NULL); /* one less, so one more */
    say_state(a, 5000, 1, "{}");
    turns(2);
    sure(b->states == AWARE_IDS_MAX + 1);
    leave(a);
    sure(b->gone == AWARE_IDS_MAX + 1);
}

static void
who_does_not_renew_is_gone(void **state)
{
    struct peer *a, *b;

    (void)state;
    start_with("--fsync", "interval");
    a = join(0, "a", 1);
    b = join(1, "a", 2);
    say_state(a, 1, 1, "{}");
    say_state(b, 2, 1, "{}");
    turns(2);
    pass(15000);
    say_state(b, 2, 2, "{}");
    turns(2);
    pass(14000);
    sure(b->gone == 0);
    pass(1500);
    sure(b->gone == 1 && b->state[0] == 'n' && a->gone == 1);
    pass(15000);
    sure(a->gone == 2);
}

/* Thousands come and go while somebody stays. */
static void
newcomers_are_seen_however_many_there_were(void **state)
{
    struct peer *a, *b;
    char json[1000];

    (void)state;
    start_with("--fsync", "interval");
    a = join(0, "a", 1);
    b = join(1, "a", 2);
    memset(json, 'x', sizeof json);
    (void)snprintf(json, sizeof json, "{\"x\":\"%0900d\"}", 7);
    for (unsigned i = 0; i < 3000; i++) {
        say_state(a, 1000 + i, 1, json);
        say_state(a, 1000 + i, 1, NULL);
        turn();
        if (i % 20 == 0)
            pass(2000);
        sure(doc_named("a")->aware_len <= AWARE_MAX);
    }
    pass(1000);
    b->states = 0;
    say_state(a, 1, 1, json);
    turns(3);
    sure(b->states == 1);
}

static void
bad_states_reach_nobody(void **state)
{
    static const char *const bad[] = { "{", "[1]", "1", "{\"x\":}", "nul",
                                       "{}{}", "" };
    struct peer *a, *b;

    (void)state;
    start_with("--fsync", "interval");
    b = join(1, "a", 2);
    for (case_no = 0; case_no < (int)(sizeof bad / sizeof *bad); case_no++) {
        a = join(0, "a", 1);
        say_state(a, 1, 1 + (uint64_t)case_no, bad[case_no]);
        turns(3);
        sure(a->code == 4400);
        leave(a);
    }
    sure(b->states == 0 && b->gone == 0 && b->code == 0);
}

static void
no_clock_is_raised_beyond_what_clients_hold(void **state)
{
    struct peer *a, *b;

    (void)state;
    start_with("--fsync", "interval");
    a = join(0, "a", 1);
    b = join(1, "a", 2);
    say_state(a, 1, Y_MAX, "{}");
    turns(2);
    say_state(a, 1, Y_MAX, NULL);
    turns(2);
    say_state(a, 1, Y_MAX, "{}");
    turns(2);
    sure(b->their_clock <= Y_MAX); /* peer_understands would have stumbled */
}

/* Whatever the intervals, no client's watchdog bites. */
static void
a_lone_client_hears_something(void **state)
{
    static const char *const every[] = { "5", "25", "300" };

    (void)state;
    for (case_no = 0; case_no < 3; case_no++) {
        struct peer *a;
        int64_t silent = 0;
        unsigned heard = 0;
        start_with("--ping-interval", every[case_no], "--dead-after", "7200");
        a = join(0, "a", 1);
        heard = a->keepalives;
        for (int i = 0; i < 300; i++) {
            pass(500);
            silent += 500;
            if (a->keepalives > heard)
                silent = 0;
            heard = a->keepalives;
            sure(silent < 29000);
        }
        stop();
    }
}

/* ----- at the edges of message memory ------------------------------------ */

/* What of the longest message is new may be longer than that. */
static void
the_longest_message_may_grow(void **state)
{
    struct peer *a, *b;
    struct span update;
    uint64_t client = Y_MAX;

    (void)state;
    start_with("--max-message", "64K", "--message-memory", "128K");
    a = join(0, "a", 1);
    b = join(1, "a", 2);
    say_sync(a, SYNC_UPDATE, typed(client, 0, 1));
    turns(2);
    for (unsigned i = 0; i < 12; i++) {
        /* ends up to 12 bytes below the longest */
        size_t len = 65536 - i - (size_t)(2 + 3 + 2 + 8 + 1 + 4 + 3 + 1);
        update = typed(client, 0, len);
        sure(span_len(update) + 5 == 65536 - i);
        say_sync(a, SYNC_UPDATE, update);
        turns(6);
        sure(a->code == 0);
        client--;
        say_sync(a, SYNC_UPDATE, typed(client, 0, 1));
        turns(3);
    }
    sure(b->updates == 25);
}

#define test_case(t) cmocka_unit_test_setup_teardown(t, begin, end)

int
main(int argc, char *argv[])
{
    const struct CMUnitTest tests[] = {
        test_case(what_one_types_the_other_has),
        test_case(random_updates_in_any_order_are_one_document),
        test_case(nothing_is_taken_twice),
        test_case(all_memory_comes_back),
        test_case(a_document_has_a_longest_length),
        test_case(what_was_accepted_can_be_merged_in_full_memory),
        test_case(a_document_has_so_many_clients_and_gaps),
        test_case(a_refused_update_leaves_no_memory_behind),
        test_case(what_is_held_back_comes_back),
        test_case(a_document_that_is_full_does_not_close_others),
        test_case(who_was_refused_may_leave),
        test_case(who_was_refused_is_asked_again),
        test_case(a_snapshot_that_is_being_sent_stays),
        test_case(who_leaves_halfway_gives_its_pin_back),
        test_case(a_joiner_goes_on_in_the_ring),
        test_case(a_joiner_that_the_ring_has_left_gets_the_difference),
        test_case(a_joiner_is_led_in_again_and_again),
        test_case(a_long_document_comes_in_pieces),
        test_case(a_joiner_gets_all_cursors_however_many_have_written),
        test_case(one_may_ask_again_at_any_time),
        test_case(what_cannot_be_kept_is_taken_back_exactly),
        test_case(taking_back_needs_no_memory),
        test_case(always_means_before_anybody_sees_it),
        test_case(a_sync_in_flight_shows_nothing_that_was_taken_back),
        test_case(a_merge_may_overtake_a_sync),
        test_case(edits_during_a_compaction_are_kept),
        test_case(a_merge_beside_the_turn_loses_nothing),
        test_case(a_joiner_is_let_in_while_others_type_on),
        test_case(a_difference_is_short_also_beside_a_tail),
        test_case(who_waits_to_join_speaks_of_itself),
        test_case(a_merge_that_finds_no_memory_is_tried_now_and_then),
        test_case(a_long_document_is_merged_in_full_memory),
        test_case(what_was_accepted_can_be_opened_again),
        test_case(always_does_not_keep_merges_away),
        test_case(what_may_not_be_on_the_disk_is_not_closed),
        test_case(a_kill_before_any_call_loses_nothing_that_was_seen),
        test_case(a_kill_behind_any_call_loses_nothing_that_was_seen),
        test_case(a_kill_within_any_write_loses_nothing_that_was_seen),
        test_case(every_write_may_find_the_disk_full),
        test_case(every_sync_may_fail),
        test_case(every_call_may_fail),
        test_case(a_full_disk_during_an_install_loses_nothing),
        test_case(a_doubtful_install_loses_nothing),
        test_case(a_file_that_cannot_be_written_anew_refuses),
        test_case(a_higher_clock_wins),
        test_case(who_comes_back_is_seen_at_once),
        test_case(a_socket_left_behind_buries_nobody),
        test_case(one_speaks_for_so_many),
        test_case(who_does_not_renew_is_gone),
        test_case(newcomers_are_seen_however_many_there_were),
        test_case(bad_states_reach_nobody),
        test_case(no_clock_is_raised_beyond_what_clients_hold),
        test_case(a_lone_client_hears_something),
        test_case(the_longest_message_may_grow),
    };

    seen = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
                -1, 0);
    if (seen == MAP_FAILED)
        return 1;
    if (argc > 1)
        cmocka_set_test_filter(argv[1]); /* only these, and the log is seen */
    return argc > 1 ? cmocka_run_group_tests(tests, NULL, NULL)
                    : cmocka_run_group_tests(tests, test_group_listen_in,
                                             test_group_listen_no_more);
}
