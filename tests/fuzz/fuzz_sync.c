/* SPDX-License-Identifier: MIT */
/* The sync codec.  The input is a run of updates (length, bytes) as a tail
 * holds them; behind a length of 0 follows a state vector.  Of what y_check
 * accepts:
 *   - a merge is canonical, merges to itself, holds all there was and nothing
 *     more, and takes exactly the bytes that were announced;
 *   - merging what was merged in two halves comes to the same;
 *   - cleaning again changes nothing in the end, and never what is known;
 *   - a diff by the own state vector has no structs, by a foreign one nothing
 *     that is not in the merge;
 *   - minus leaves nothing of what is there, and what it leaves of one half
 *     completes the other;
 *   - pieces are legal and make the whole again, those of a joining are of no
 *     use before the last.
 * And the same bytes are read as awareness and as JSON.
 */
#include "fuzz.h"

#define UPDATES 64

static uint8_t *lent[4096];
static size_t lent_n;

static uint8_t *
lend(uint64_t n)
{
    uint8_t *p = malloc(n > 0 ? (size_t)n : 1);

    assert(p != NULL && lent_n < sizeof lent / sizeof lent[0]);
    lent[lent_n++] = p;
    return p;
}

static struct y_work
lend_work(uint64_t n)
{
    return (struct y_work){ lend(n), (size_t)n };
}

static struct span
run_of(const struct span *updates, size_t n)
{
    size_t room = 0;
    struct out o;
    uint8_t *at;

    for (size_t i = 0; i < n; i++)
        room += span_len(updates[i]) + 8;
    at = lend(room);
    o = out_over(at, room);
    for (size_t i = 0; i < n; i++) {
        out_uint(&o, span_len(updates[i]));
        out_span(&o, updates[i]);
    }
    assert(!o.full);
    return span_of(at, (size_t)(o.at - at));
}

static struct y_report
report_of(struct span update)
{
    struct y_report r;

    assert(y_check(update, &r));
    return r;
}

static struct y_report
sums_of(const struct y_store *s)
{
    struct y_report sum = { 0 };
    struct span tail = s->tail, update;

    if (!span_is_empty(s->snapshot))
        sum = report_of(s->snapshot);
    while (y_run_next(&tail, &update)) {
        struct y_report r = report_of(update);
        sum.structs += r.structs;
        sum.ranges += r.ranges;
        sum.clients += r.clients;
    }
    return sum;
}

static struct span
written(struct y_result *result)
{
    uint8_t *at = lend(result->bytes);
    struct out o = out_over(at, result->bytes);
    struct y_report r;

    y_write(result, &o);
    assert(!o.full && o.at == o.end);
    r = report_of(span_of(at, result->bytes));
    assert(r.canonical && r.structs == result->structs &&
           r.ranges == result->ranges && r.clients == result->clients &&
           r.deletes_at == result->deletes_at);
    return span_of(at, result->bytes);
}

static struct span
merge(struct y_store s, enum y_gc mode)
{
    struct y_report sum = sums_of(&s);
    struct y_result r;

    assert(y_merge(&s, mode, lend_work(y_work_size(sum.structs, sum.ranges,
                                                   sum.clients)), &r) == Y_OK);
    return written(&r);
}

static struct y_store
snapshot_of(struct span update)
{
    return (struct y_store){
        .snapshot = update, .snapshot_deletes_at = report_of(update).deletes_at
    };
}

static void
learn(struct y_known *k, struct span update)
{
    struct y_report r = report_of(update);

    if (!y_known_fits(k, r.clients, r.stretches)) {
        size_t slots = y_known_slots(k->used + r.clients,
                                     k->n_islands + r.stretches);
        y_known_move(k, lend(y_known_bytes(slots)), slots);
    }
    y_known_add(k, update);
}

static struct y_known
know(struct y_store s)
{
    struct y_known k = { .seed = 1 };
    struct span update;

    if (!span_is_empty(s.snapshot))
        learn(&k, s.snapshot);
    while (y_run_next(&s.tail, &update))
        learn(&k, update);
    for (size_t i = 0; i < k.n_islands; i++) {
        const struct y_stretch *a = &k.islands[i];
        const struct y_known_client *c = y_known_get(&k, a->client);
        assert(a->from < a->to && c != NULL && a->from > c->next &&
               a->to <= c->end);
        assert(i == 0 || a[-1].client > a->client ||
               (a[-1].client == a->client && a[-1].to < a->from));
    }
    return k;
}

static struct span
state_vector(struct y_store s)
{
    struct y_known k = know(s);
    size_t n = y_known_write_sv(&k, NULL);
    uint8_t *at = lend(n);
    struct out o = out_over(at, n);
    const char *fault;

    assert(y_known_write_sv(&k, &o) == n && o.at == o.end && !o.full);
    assert(y_sv_check(span_of(at, n), &fault));
    return span_of(at, n);
}

/* Do both know the same? */
static void
assert_same_known(struct y_store a, struct y_store b)
{
    struct y_known x = know(a), y = know(b);

    assert(x.used == y.used && x.n_islands == y.n_islands);
    for (size_t i = 0; i < x.slots; i++) {
        const struct y_known_client *c;
        if (x.at[i].end == 0)
            continue;
        c = y_known_get(&y, x.at[i].client);
        assert(c != NULL && c->next == x.at[i].next && c->end == x.at[i].end);
    }
    for (size_t i = 0; i < x.n_islands; i++)
        assert(x.islands[i].client == y.islands[i].client &&
               x.islands[i].from == y.islands[i].from &&
               x.islands[i].to == y.islands[i].to);
}

static struct span
minus(struct y_store s, struct span update, bool *empty)
{
    struct y_known k = know(s);
    struct y_report r = report_of(update);
    struct y_result result;

    assert(y_minus(&s, &k, update,
                   lend_work(y_minus_size(&k, &r, sums_of(&s).ranges)),
                   &result) == Y_OK);
    *empty = result.empty;
    return written(&result);
}

static struct span
diff(struct y_store s, struct span sv)
{
    struct y_report sum = sums_of(&s);
    struct y_result r;

    assert(y_diff(&s, sv, lend_work(y_work_size(sum.structs, sum.ranges,
                                                span_len(sv))), &r) == Y_OK);
    return written(&r);
}

/* ----- what must hold ----------------------------------------------------- */

static void
try_pieces(struct span whole, uint64_t most, bool joining)
{
    struct span pieces[2048];
    struct y_pieces c = y_pieces(whole, most, joining), ahead;
    size_t n = 0, len;

    while (ahead = c, (len = y_pieces_next(&ahead, NULL)) > 0) {
        uint8_t *at = lend(len);
        struct out o = out_over(at, len);
        assert(n < 2047 && y_pieces_next(&c, &o) == len && o.at == o.end);
        pieces[n++] = span_of(at, len);
        assert(report_of(pieces[n - 1]).canonical);
        assert(!joining || report_of(pieces[n - 1]).ranges == 0);
    }
    if (joining) {
        uint8_t *at = lend(len = y_pieces_close(whole, NULL));
        struct out o = out_over(at, len);
        assert(y_pieces_close(whole, &o) == len && o.at == o.end);
        pieces[n++] = span_of(at, len);
        assert(report_of(pieces[n - 1]).canonical);
    }
    if (n > 0)
        assert(span_equals(merge((struct y_store){ .tail = run_of(pieces, n) },
                                 Y_GC_OFF), whole));
}

static void
try_modes(struct y_store all, struct span whole)
{
    for (int mode = Y_GC_OFF; mode <= Y_GC_FULL; mode++) {
        struct span once = merge(all, (enum y_gc)mode), now = once, twice;
        /* Structs that wait for each other may die one after the other. */
        for (uint64_t left = report_of(once).structs; ; left--) {
            twice = merge(snapshot_of(now), (enum y_gc)mode);
            if (span_equals(now, twice))
                break;
            assert(mode != Y_GC_OFF && left > 0);
            now = twice;
        }
        assert(span_equals(once, merge(snapshot_of(whole), (enum y_gc)mode)));
        assert_same_known(all, snapshot_of(once));
        assert(mode == Y_GC_FULL || span_len(once) <= span_len(whole) + 64 *
               report_of(whole).structs);
    }
}

static void
try_store(const struct span *updates, size_t n, struct span sv)
{
    struct y_store all = { .tail = run_of(updates, n) }, first, both;
    struct span whole = merge(all, Y_GC_OFF), half, rest, back;
    const char *fault;
    bool empty;

    try_modes(all, whole);
    first = snapshot_of(half = merge(
        (struct y_store){ .tail = run_of(updates, n / 2) }, Y_GC_OFF));
    both = first;
    both.tail = run_of(updates + n / 2, n - n / 2);
    assert(span_equals(merge(both, Y_GC_OFF), whole));
    /* minus */
    (void)minus(all, whole, &empty);
    assert(empty);
    for (size_t i = 0; i < n; i++) {
        (void)minus(all, updates[i], &empty);
        assert(empty);
    }
    rest = minus(first, whole, &empty);
    both.tail = run_of(&rest, 1);
    assert_same_known(both, all);
    assert(empty == span_equals(half, whole));
    back = merge(both, Y_GC_OFF);
    assert(report_of(back).ranges == report_of(whole).ranges);
    /* diff */
    assert(report_of(diff(all, state_vector(all))).clients ==
           report_of(diff(snapshot_of(whole), state_vector(all))).clients);
    assert(span_equals(diff(all, span_of("", 1)), whole));
    if (y_sv_check(sv, &fault)) {
        struct span some = diff(all, sv);
        (void)minus(all, some, &empty);
        assert(empty);
        assert(report_of(some).ranges == report_of(whole).ranges);
    }
    /* pieces */
    if (span_len(whole) < 4096) {
        try_pieces(whole, 100 + span_len(sv) * 8, false);
        try_pieces(whole, 100 + span_len(sv) * 8, true);
    }
}

static void
try_awareness(struct span message)
{
    const char *fault;
    struct y_aware entry;
    uint64_t left;
    struct y_in r = y_aware_open(message, &left);
    bool good = y_aware_check(message, &fault);

    assert(good == (fault == NULL));
    while (y_aware_next(&r, &left, &entry))
        assert(entry.json.at >= message.at && entry.json.end <= message.end);
    assert(good == (r.fault == NULL));
    (void)json_check(message);
}

int
LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc, (void)argv;
    fuzz_quiet();
    return 0;
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    struct span in = span_of(data, len), updates[UPDATES], update;
    size_t n = 0;

    try_awareness(in);
    while (n < UPDATES && y_run_next(&in, &update)) {
        struct y_report r;
        if (span_is_empty(update))
            break;
        if (y_check(update, &r))
            updates[n++] = update;
        else
            assert(r.fault != NULL && r.at <= span_len(update));
    }
    if (n > 0)
        try_store(updates, n, in);
    while (lent_n > 0)
        free(lent[--lent_n]);
    return 0;
}
