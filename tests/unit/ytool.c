// SPDX-License-Identifier: MIT
/* ytool: the sync codec behind a pipe, for tests that compare it with Yjs.
 *
 *   request    op (1 byte), arguments (1 byte), each: length (4 bytes, little
 *              endian), bytes
 *   answer     0 or 1 (1 byte), length (4 bytes), bytes
 *
 *   c update                  report, or 1 and the fault
 *   m mode snapshot tail      merge; mode 0 off, 1 auto, 2 full
 *   d snapshot tail sv        diff
 *   n snapshot tail update    minus; no bytes: nothing is new
 *   s snapshot tail           state vector
 *   p most update             pieces, as a run
 *   j most update             pieces of a joining, the close last, as a run
 *   a message                 awareness: 1 and the fault, or the entries again
 *
 * SPDX-License-Identifier: MIT
 */
#define COLLABD_NO_MAIN
#include "../../collabd.c"

#define ARGS 3

static void *
some(size_t n)
{
    void *p = malloc(n > 0 ? n : 1);

    must(p != NULL);
    return p;
}

static uint32_t
read_u32(void)
{
    uint8_t b[4];

    if (fread(b, 1, 4, stdin) != 4)
        exit(1);
    return b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 |
           (uint32_t)b[3] << 24;
}

static void
answer(uint8_t status, const void *bytes, size_t n)
{
    uint8_t head[5] = { status, (uint8_t)n, (uint8_t)(n >> 8),
                        (uint8_t)(n >> 16), (uint8_t)(n >> 24) };

    (void)fwrite(head, 1, 5, stdout);
    if (n > 0)
        (void)fwrite(bytes, 1, n, stdout);
    (void)fflush(stdout);
}

static void
answer_text(uint8_t status, const char *text)
{
    answer(status, text, strlen(text));
}

/* ----- what a document's owner does -------------------------------------- */

static struct y_report sums;

static bool
add_up(struct span update, size_t *deletes_at)
{
    struct y_report report;

    if (!y_check(update, &report)) {
        answer_text(1, report.fault);
        return false;
    }
    sums.structs += report.structs;
    sums.ranges += report.ranges;
    sums.clients += report.clients;
    *deletes_at = report.deletes_at;
    return true;
}

static bool
open_store(struct y_store *store, struct span snapshot, struct span tail)
{
    struct span update;
    size_t at;

    *store = (struct y_store){ .snapshot = snapshot, .tail = tail };
    sums = (struct y_report){ 0 };
    if (!span_is_empty(snapshot) &&
        !add_up(snapshot, &store->snapshot_deletes_at))
        return false;
    while (y_run_next(&tail, &update))
        if (!add_up(update, &at))
            return false;
    must(span_is_empty(tail));
    return true;
}

static struct y_work
lend_work(uint64_t size)
{
    return (struct y_work){ some((size_t)size), (size_t)size };
}

static void
add_known(struct y_known *k, struct span update)
{
    struct y_report report;

    (void)y_check(update, &report);
    if (!y_known_fits(k, report.clients, report.stretches)) {
        size_t slots = y_known_slots(k->used + report.clients,
                                     k->n_islands + report.stretches);
        struct y_known_client *old = k->at;
        y_known_move(k, some(y_known_bytes(slots)), slots);
        free(old);
    }
    y_known_add(k, update);
}

static struct y_known
know(const struct y_store *store)
{
    struct y_known k = { .seed = 0x1234567 };
    struct span tail = store->tail, update;

    if (!span_is_empty(store->snapshot))
        add_known(&k, store->snapshot);
    while (y_run_next(&tail, &update))
        add_known(&k, update);
    return k;
}

static void
answer_result(enum y_answer verdict, struct y_result *r, bool or_nothing)
{
    struct out o;
    uint8_t *at;

    if (verdict != Y_OK) {
        answer_text(1, verdict == Y_NO_ROOM ? "no room" : "broken");
        return;
    }
    if (or_nothing && r->empty) {
        answer(0, NULL, 0);
        return;
    }
    at = some(r->bytes);
    o = out_over(at, r->bytes);
    y_write(r, &o);
    must(!o.full && o.at == o.end);
    answer(0, at, r->bytes);
    free(at);
}

/* ----- the operations ---------------------------------------------------- */

static void
do_check(struct span update)
{
    struct y_report r;
    char text[160];

    if (y_check(update, &r))
        (void)snprintf(text, sizeof text,
                       "{\"canonical\":%s,\"deletesAt\":%zu,"
                       "\"clients\":%" PRIu64 ",\"structs\":%" PRIu64
                       ",\"ranges\":%" PRIu64 "}",
                       r.canonical ? "true" : "false", r.deletes_at, r.clients,
                       r.structs, r.ranges);
    else
        (void)snprintf(text, sizeof text, "%s", r.fault);
    answer_text(r.fault != NULL, text);
}

static void
do_state_vector(const struct y_store *store)
{
    struct y_known k = know(store);
    size_t n = y_known_write_sv(&k, NULL);
    uint8_t *at = some(n);
    struct out o = out_over(at, n);

    (void)y_known_write_sv(&k, &o);
    must(!o.full && o.at == o.end);
    answer(0, at, n);
    free(at);
    free(k.at);
}

static void
do_pieces(struct span most, struct span update, bool joining)
{
    struct y_pieces c, copy;
    struct y_report r;
    struct out o;
    uint8_t *run;
    size_t n, room = 0;
    uint64_t bytes = 0;

    if (!y_check(update, &r) || !r.canonical) {
        answer_text(1, r.fault != NULL ? r.fault : "not canonical");
        return;
    }
    must(y_uint(&most, &bytes));
    c = y_pieces(update, bytes, joining);
    for (copy = c; (n = y_pieces_next(&copy, NULL)) > 0;)
        room += n + y_uint_len(n);
    if (joining) {
        n = y_pieces_close(update, NULL);
        room += n + y_uint_len(n);
    }
    run = some(room);
    o = out_over(run, room);
    while (copy = c, (n = y_pieces_next(&copy, NULL)) > 0) {
        out_uint(&o, n);
        must(y_pieces_next(&c, &o) == n);
    }
    if (joining) {
        out_uint(&o, y_pieces_close(update, NULL));
        (void)y_pieces_close(update, &o);
    }
    must(!o.full && o.at == o.end);
    answer(0, run, room);
    free(run);
}

static void
do_awareness(struct span message)
{
    const char *fault;
    struct y_aware entry;
    uint64_t left;
    struct y_in in = y_aware_open(message, &left);
    uint8_t *at = some(span_len(message) + 8);
    struct out o = out_over(at, span_len(message) + 8);

    if (!y_aware_check(message, &fault)) {
        answer_text(1, fault);
    } else {
        out_uint(&o, left);
        while (y_aware_next(&in, &left, &entry))
            out_aware(&o, &entry);
        must(!o.full);
        answer(0, at, (size_t)(o.at - at));
    }
    free(at);
}

static void
do_request(uint8_t op, struct span arg[ARGS])
{
    struct y_store store;
    struct y_known known = { 0 };
    struct y_work work = { NULL, 0 };
    struct y_result r;
    struct y_report report;
    uint64_t entries = 0;

    switch (op) {
    case 'c':
        do_check(arg[0]);
        break;
    case 'm':
        if (!open_store(&store, arg[1], arg[2]))
            break;
        work = lend_work(y_work_size(sums.structs, sums.ranges, sums.clients));
        answer_result(y_merge(&store, (enum y_gc)*arg[0].at, work, &r), &r,
                      false);
        break;
    case 'd':
        if (!open_store(&store, arg[0], arg[1]))
            break;
        (void)y_uint(&(struct span){ arg[2].at, arg[2].end }, &entries);
        work = lend_work(y_work_size(sums.structs, sums.ranges, entries));
        answer_result(y_diff(&store, arg[2], work, &r), &r, false);
        break;
    case 'n':
        if (!open_store(&store, arg[0], arg[1]))
            break;
        known = know(&store);
        if (!y_check(arg[2], &report)) {
            answer_text(1, report.fault);
            break;
        }
        work = lend_work(y_minus_size(&known, &report, sums.ranges));
        answer_result(y_minus(&store, &known, arg[2], work, &r), &r, true);
        break;
    case 's':
        if (open_store(&store, arg[0], arg[1]))
            do_state_vector(&store);
        break;
    case 'p': case 'j':
        do_pieces(arg[0], arg[1], op == 'j');
        break;
    case 'a':
        do_awareness(arg[0]);
        break;
    default:
        exit(2);
    }
    free(work.at);
    free(known.at);
}

int
main(void)
{
    for (int op; (op = getchar()) != EOF;) {
        struct span arg[ARGS] = { 0 };
        uint8_t *bytes[ARGS] = { 0 };
        int n = getchar();
        must(n >= 0 && n <= ARGS);
        for (int i = 0; i < n; i++) {
            size_t len = read_u32();
            bytes[i] = some(len);
            if (fread(bytes[i], 1, len, stdin) != len)
                exit(1);
            arg[i] = span_of(bytes[i], len);
        }
        do_request((uint8_t)op, arg);
        for (int i = 0; i < n; i++)
            free(bytes[i]);
    }
    return 0;
}
