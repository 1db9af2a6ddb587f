/* Chapter Rooms: who gets what, how far back, what blocks cost, who is
 * overtaken, when a slow majority holds a room; and a long random walk beside a
 * model that remembers everything that was ever published.
 *
 * SPDX-License-Identifier: MIT
 */
#include "test.h"

#define RING 65536u
#define MAX_MESSAGE 60000u
#define CLIENTS 12

static struct collabd *s;

static int
begin(void **state)
{
    (void)state;
    s = calloc(1, sizeof *s);
    s->cfg = &s->cfgs[0];
    cfg_defaults(s->cfg);
    s->cfg->max_clients = CLIENTS;
    s->cfg->max_rooms = 3;
    s->cfg->max_message = MAX_MESSAGE;
    s->cfg->message_memory = 0;
    s->cfg->ring = RING;
    assert_true(cfg_settle(s->cfg));
    assert_true(memory_take(s, s->cfg));
    now_ms = 1000000;
    return 0;
}

static int
end(void **state)
{
    (void)state;
    free(s->slab);
    free(s);
    return 0;
}

/* ----- members ---------------------------------------------------------- */

static struct conn *
join(const char *name, bool echo, uint64_t history)
{
    struct room *room = room_open(s, ROOM_CHANNEL, span_text(name));
    struct conn *c = room == NULL ? NULL : conn_new(s);

    if (c == NULL)
        return NULL;
    c->state = CONN_OPEN;
    room_join(s, room, c, echo, history, false);
    room_check(s, room);
    return c;
}

static struct room *
room_of(const struct conn *c)
{
    return &s->rooms[c->in.room];
}

static void
leave(struct conn *c)
{
    struct room *room = room_of(c);

    room_leave(s, c);
    room_leave(s, c); /* twice does no harm */
    room_check(s, room);
    conn_free(s, c);
}

static uint8_t letters[MAX_MESSAGE + 256];

static void
publish(struct conn *c, size_t len, unsigned from)
{
    room_publish(s, room_of(c), c, WSLAY_BINARY_FRAME, span_of(NULL, 0),
                 span_of(letters + from % 256, len));
    room_check(s, room_of(c));
}

/* As assembled from fragments or pieces. */
static void
publish_assembled(struct conn *c, size_t len, unsigned from)
{
    struct assembly m = { NONE32, NONE32, 0, { 0, 0, 0 }, 0 };

    for (size_t done = 0; done < len || m.first == NONE32;) {
        size_t n = (size_t)test_random(len - done + 1);
        assert_true(assembly_add(&s->chunks, &m, m.len,
                                 span_of(letters + from % 256 + done, n)));
        m.len += (uint32_t)n;
        done += n;
    }
    room_publish_assembly(s, room_of(c), c, WSLAY_BINARY_FRAME, &m);
    assert_int_equal(m.first, NONE32);
    room_check(s, room_of(c));
}

/* Takes at most `most` bytes of what a member is to be sent. */
static size_t
take(struct conn *c, size_t most, uint8_t *to)
{
    struct iovec v[CONN_SPANS];
    size_t sum = 0;
    int count = room_gather(s, c, false, v, CONN_SPANS);

    for (int i = 0; i < count && sum < most; i++) {
        size_t n = v[i].iov_len < most - sum ? v[i].iov_len : most - sum;
        memcpy(to + sum, v[i].iov_base, n);
        sum += n;
    }
    if (sum > 0)
        room_advance(s, c, sum);
    room_check(s, room_of(c));
    return sum;
}

static uint8_t got[4 * RING];

static size_t
take_all(struct conn *c)
{
    size_t sum = 0, n;

    while ((n = take(c, sizeof got - sum, got + sum)) > 0)
        sum += n;
    assert_true(room_lag(room_of(c), c) == 0);
    return sum;
}

/* ----- facts: who gets what --------------------------------------------- */

static void
a_message_reaches_all_others_once_and_its_sender_not(void **state)
{
    struct conn *a = join("r", false, 0), *b = join("r", false, 0),
                *c = join("r", true, 0);

    (void)state;
    room_publish(s, room_of(a), a, WSLAY_TEXT_FRAME, span_of(NULL, 0),
                 span_text("hello"));
    assert_int_equal(take_all(b), 7);
    assert_memory_equal(got, "\x81\x05hello", 7);
    assert_int_equal(take_all(c), 7);
    assert_int_equal(take_all(a), 0);
    assert_int_equal(take_all(b), 0);
    assert_true(s->count.messages_in == 1 && s->count.messages_out == 2);
    room_publish(s, room_of(c), c, WSLAY_BINARY_FRAME, span_of(NULL, 0),
                 span_text(""));
    assert_int_equal(take_all(c), 2); /* asked for its echo */
    assert_memory_equal(got, "\x82\x00", 2);
    assert_int_equal(take_all(a), 2);
}

static void
rooms_do_not_hear_each_other(void **state)
{
    struct conn *a = join("a", true, 0), *b = join("b", true, 0);

    (void)state;
    publish(a, 10, 0);
    assert_int_equal(take_all(b), 0);
    assert_int_equal(take_all(a), 12);
}

static void
everyone_sees_one_order(void **state)
{
    struct conn *a = join("r", true, 0), *b = join("r", true, 0),
                *c = join("r", false, 0);
    static uint8_t first[sizeof got];
    size_t n;

    (void)state;
    for (unsigned i = 0; i < 100; i++)
        publish(i % 3 == 0 ? b : a, i, i);
    n = take_all(a);
    memcpy(first, got, n);
    assert_int_equal(take_all(b), n);
    assert_memory_equal(first, got, n);
    assert_int_equal(take_all(c), n);
    assert_memory_equal(first, got, n);
}

static void
a_newcomer_gets_nothing_old_unless_it_asks(void **state)
{
    struct conn *a = join("r", false, 0), *b;

    (void)state;
    for (unsigned i = 0; i < 10; i++)
        publish(a, 100 + i, 0);
    b = join("r", false, 0);
    assert_int_equal(take_all(b), 0);
    b = join("r", false, 1);
    assert_int_equal(take_all(b), 2 + 109);
    b = join("r", false, 3);
    assert_int_equal(take_all(b), 3 * 2 + 107 + 108 + 109);
    b = join("r", false, UINT64_MAX);
    assert_int_equal(take_all(b), 10 * 2 + 1045);
}

static void
history_is_a_quarter_ring_at_most(void **state)
{
    struct conn *a = join("r", false, 0), *b;
    size_t n;

    (void)state;
    for (unsigned i = 0; i < 100; i++)
        publish(a, 996, 0); /* 1000 on the wire */
    b = join("r", false, 100);
    n = take_all(b);
    assert_in_range(n, RING / 4 - 1000, RING / 4);
    for (unsigned i = 0; i < 2000; i++)
        publish(a, 0, 0); /* charged with 32 each */
    b = join("r", false, 2000);
    assert_int_equal(take_all(b), RING / 4 / RING_CHARGE * 2);
}

static void
history_does_not_reach_behind_a_block(void **state)
{
    struct conn *a = join("r", false, 0), *b = join("r", false, 0), *c;

    (void)state;
    publish(a, 10, 0);
    publish_assembled(a, RING / 4, 0);
    c = join("r", false, 9);
    assert_int_equal(take_all(c), 0);
    publish(a, 20, 0);
    c = join("r", false, 9);
    assert_int_equal(take_all(c), 22);
    (void)take_all(b);
}

static void
a_newcomer_may_be_further_back_than_all_others(void **state)
{
    struct conn *a = join("r", false, 0), *b = join("r", false, 0), *c;

    (void)state;
    for (unsigned i = 0; i < 200; i++) {
        publish(a, 1000, i);
        (void)take_all(a);
        (void)take_all(b);
        c = join("r", false, 9); /* room_check: a bound of all cursors */
        assert_int_equal(take_all(c), 1004 * (i < 8 ? i + 1 : 9));
        leave(c);
    }
}

static void
history_survives_an_empty_room(void **state)
{
    struct conn *a = join("r", false, 0), *b;

    (void)state;
    publish(a, 10, 0);
    leave(a);
    assert_int_equal(s->rooms_used, 1);
    b = join("r", false, 5);
    assert_int_equal(take_all(b), 12);
}

/* A slot is used again and again until its 16-bit generation comes round. */
static void
an_old_namesake_does_not_disturb_a_newcomer(void **state)
{
    struct conn *quiet = join("r", false, 0), *a = join("r", false, 0), *b;

    (void)state;
    publish(a, 10, 0);
    publish(a, 10, 0);
    leave(a);
    for (unsigned i = 0; i < 65535; i++) {
        b = conn_new(s);
        conn_free(s, b);
    }
    b = join("r", false, 5);
    assert_int_equal(b->id.gen, 0);
    publish(quiet, 30, 0);
    assert_int_equal(take_all(b), 32);
    assert_true(b->in.own == 0);
}

/* ----- facts: rooms ----------------------------------------------------- */

static void
one_room_too_many_is_none_while_all_have_members(void **state)
{
    struct conn *a = join("a", false, 0);

    (void)state;
    assert_non_null(join("b", false, 0));
    assert_non_null(join("c", false, 0));
    assert_null(room_open(s, ROOM_CHANNEL, span_text("d")));
    assert_ptr_equal(room_open(s, ROOM_CHANNEL, span_text("a")), room_of(a));
    leave(a);
    assert_non_null(join("d", false, 0));
    assert_int_equal(s->rooms_used, 3);
}

static void
the_room_that_was_empty_longest_makes_place(void **state)
{
    struct conn *a = join("a", false, 0), *b = join("b", false, 0),
                *c = join("c", false, 0), *d;

    (void)state;
    publish(a, 1, 0);
    publish(b, 2, 0);
    publish(c, 3, 0);
    leave(b);
    leave(a);
    leave(c);
    d = join("d", false, 9); /* in place of b */
    assert_int_equal(take_all(d), 0);
    a = join("a", false, 9);
    assert_int_equal(take_all(a), 3);
    b = join("b", false, 9); /* in place of c, and it is new */
    assert_int_equal(take_all(b), 0);
    assert_null(room_open(s, ROOM_CHANNEL, span_text("c")));
}

static void
a_member_that_comes_back_makes_its_room_young_again(void **state)
{
    struct conn *a = join("a", false, 0), *b = join("b", false, 0);

    (void)state;
    assert_non_null(join("c", false, 0));
    publish(a, 1, 0);
    publish(b, 2, 0);
    leave(a);
    leave(b);
    leave(join("a", false, 0));
    assert_non_null(join("d", false, 0)); /* in place of b */
    a = join("a", false, 9);
    assert_int_equal(take_all(a), 3);
}

/* With --coalesce a room may still wait for its flush when its last member
 * leaves. */
static void
a_room_may_make_place_while_it_waits_for_its_flush(void **state)
{
    struct conn *a = join("a", false, 0);

    (void)state;
    assert_non_null(join("b", false, 0));
    assert_non_null(join("c", false, 0));
    publish(a, 10, 0);
    assert_true(room_of(a)->dirty);
    leave(a);
    a = join("d", false, 0);
    assert_non_null(a);
    assert_false(room_of(a)->dirty);
    assert_int_equal(s->dirty_first, NONE);
    publish(a, 10, 0);
    assert_int_equal(s->dirty_first, room_slot(s, room_of(a)));
}

static void
names_that_share_a_bucket_are_told_apart(void **state)
{
    char name[3][10];
    unsigned found = 0;

    (void)state;
    for (unsigned i = 0; found < 3; i++) {
        (void)snprintf(name[found], sizeof name[found], "n%u", i);
        found += (room_hash(ROOM_CHANNEL, span_text(name[found])) & (s->bucket_count - 1)) ==
                 0;
    }
    for (int round = 0; round < 50; round++) {
        struct conn *c[3];
        int gone = (int)test_random(3), first = (int)test_random(2);
        for (int i = 0; i < 3; i++)
            c[i] = join(name[i], false, 0);
        for (int i = 0; i < 3; i++)
            assert_ptr_equal(room_open(s, ROOM_CHANNEL, span_text(name[i])), room_of(c[i]));
        assert_ptr_not_equal(room_of(c[0]), room_of(c[1]));
        assert_ptr_not_equal(room_of(c[1]), room_of(c[2]));
        leave(c[gone]);
        c[gone] = join("other", false, 0);
        assert_non_null(c[gone]);
        for (int i = 0; i < 3; i++)
            if (i != gone)
                assert_ptr_equal(room_open(s, ROOM_CHANNEL, span_text(name[i])),
                                 room_of(c[i]));
        for (int i = 0; i < 3; i++)
            leave(c[(gone + (first + 1) * i) % 3]);
    }
}

/* ----- facts: blocks ---------------------------------------------------- */

static void
a_quarter_ring_is_the_border_between_ring_and_block(void **state)
{
    struct conn *a = join("r", false, 0), *b = join("r", false, 0);

    (void)state;
    assert_true(room_frame_fits_ring(room_of(a), RING / 4 - 4));
    assert_false(room_frame_fits_ring(room_of(a), RING / 4 - 3));
    publish_assembled(a, RING / 4 - 4, 0);
    assert_int_equal(s->chunks.used, 0);
    publish_assembled(a, RING / 4 - 3, 0);
    assert_int_equal(s->chunks.used, 5);
    assert_int_equal(take_all(b), RING / 2 + 1);
    assert_int_equal(s->chunks.used, 0);
}

static void
a_block_is_forgotten_with_the_last_that_passes(void **state)
{
    struct conn *a = join("r", false, 0), *b = join("r", false, 0),
                *c = join("r", true, 0);
    struct room *room = room_of(a);
    struct entry *e = ring_entry(&room->ring, 0);

    (void)state;
    publish_assembled(a, 50000, 3);
    assert_int_equal(e->refs, 2);
    assert_int_equal(take(b, 50003, got), 50003); /* all but one byte */
    assert_int_equal(e->refs, 2);
    assert_int_equal(take(b, 5, got + 50003), 1);
    assert_int_equal(e->refs, 1);
    assert_memory_equal(got, "\x82\x7e\xc3\x50", 4);
    assert_memory_equal(got + 4, letters + 3, 50000);
    assert_true(s->chunks.used > 0);
    (void)take_all(a);
    assert_true(s->chunks.used > 0);
    leave(c); /* without having read it */
    assert_int_equal(s->chunks.used, 0);
    assert_true(room->block_bytes == 0 && e->block == NONE32);
}

static void
a_block_that_nobody_is_to_get_is_forgotten_at_once(void **state)
{
    struct conn *a = join("r", false, 0);

    (void)state;
    publish_assembled(a, 50000, 0);
    assert_int_equal(s->chunks.used, 0);
    assert_int_equal(take_all(a), 0);
    publish_assembled(a, 50000, 0);
    assert_int_equal(s->chunks.used, 0);
}

static void
an_echo_of_a_block_is_counted_too(void **state)
{
    struct conn *a = join("r", true, 0);

    (void)state;
    publish_assembled(a, 50000, 0);
    assert_true(s->chunks.used > 0);
    assert_int_equal(take_all(a), 50004);
    assert_int_equal(s->chunks.used, 0);
}

static void
blocks_beyond_the_budget_overtake_who_has_not_read_them(void **state)
{
    struct conn *a = join("r", false, 0), *b = join("r", false, 0),
                *c = join("r", false, 0);
    struct room *room = room_of(a);
    unsigned n = 0;

    (void)state;
    while (!b->in.overtaken) {
        publish_assembled(a, MAX_MESSAGE, n++);
        assert_true(room->block_bytes <= s->block_budget);
        (void)take_all(c);
    }
    assert_int_equal(n, s->block_budget / (MAX_MESSAGE + 4) + 1);
    assert_true(room->overtook);
    assert_false(c->in.overtaken);
    leave(b);
    assert_int_equal(s->chunks.used, 0);
}

static void
a_newcomer_has_no_part_in_older_blocks(void **state)
{
    struct conn *a = join("r", false, 0), *b = join("r", false, 0), *c;

    (void)state;
    publish_assembled(a, 50000, 0);
    c = join("r", false, 0);
    leave(c);
    assert_true(s->chunks.used > 0);
    assert_int_equal(take_all(b), 50004);
    assert_int_equal(s->chunks.used, 0);
}

/* ----- facts: laggards -------------------------------------------------- */

static void
a_laggard_is_overtaken_when_the_ring_needs_its_bytes(void **state)
{
    struct conn *a = join("r", false, 0), *b = join("r", false, 0),
                *c = join("r", false, 0);
    struct room *room = room_of(a);

    (void)state;
    for (unsigned i = 0; i < 64; i++)
        publish(a, 1020, 0); /* 1024 on the wire: exactly a ring */
    assert_false(b->in.overtaken);
    assert_int_equal(take(c, 1023, got), 1023);
    publish(a, 0, 0);
    assert_true(room->overtook && b->in.overtaken && c->in.overtaken);
    assert_true(room_lag(room, b) == 0); /* no longer judged */
}

static void
a_member_within_an_entry_is_safe_while_the_entry_stands(void **state)
{
    struct conn *a = join("r", false, 0), *b = join("r", false, 0);

    (void)state;
    for (unsigned i = 0; i < 64; i++)
        publish(a, 1020, 0);
    assert_int_equal(take(b, 1500, got), 1500);
    publish(a, 1020, 0);
    assert_false(b->in.overtaken);
    assert_true(take_all(b) == RING - 1500 + 1024);
}

static void
own_messages_are_no_backlog(void **state)
{
    struct conn *a = join("r", false, 0), *b = join("r", false, 0);

    (void)state;
    for (unsigned i = 0; i < 30; i++)
        publish(a, 1000, 0);
    assert_true(room_lag(room_of(a), a) == 0);
    assert_true(room_lag(room_of(b), b) == 30 * 1004);
    publish(b, 10, 0);
    assert_true(room_lag(room_of(a), a) == RING_CHARGE);
    assert_int_equal(take_all(a), 12);
}

static void
a_quarter_ring_wants_a_flush(void **state)
{
    struct conn *a = join("r", false, 0);
    struct room *room = room_of(a);

    (void)state;
    for (unsigned i = 0; i < 15; i++)
        publish(a, 1020, 0);
    assert_false(room_wants_flush(room));
    publish(a, 1020, 0);
    assert_true(room_wants_flush(room));
    room->flushed_pos = room->ring.pos;
    assert_false(room_wants_flush(room));
}

/* ----- facts: slow majorities ------------------------------------------- */

/* Lets all members that take nothing fall behind just far enough to count. */
static void
let_them_lag(struct conn *from)
{
    struct room *room = room_of(from);

    for (uint64_t lag = 0; lag <= room_lag_limit(room); lag += 1024)
        publish(from, 1020, 0);
    now_ms += ROOM_BURST_STALL_MS; /* a burst is over */
}

static void
a_laggard_is_judged_before_it_can_be_overtaken(void **state)
{
    struct room room = { .name_len = 0 };

    (void)state;
    for (uint64_t size = RING; size <= 1u << 30; size *= 2) {
        uint64_t limit;
        room.ring.size = size;
        limit = room_lag_limit(&room);
        assert_true(limit > size / 4 && limit <= size / 2);
        assert_true(limit + size / 4 + ROOM_BURST <= size);
        assert_true(limit + size / 4 + size / 4 <= size);
    }
}

static void
a_lag_counts_only_beyond_its_limit(void **state)
{
    struct conn *from = join("r", false, 0), *b = join("r", false, 0);
    struct room *room = room_of(from);

    (void)state;
    while (room_lag(room, b) + 1024 <= room_lag_limit(room))
        publish(from, 1020, 0);
    room_judge(s, room);
    assert_false(room->held);
    publish(from, 1020, 0);
    room_judge(s, room);
    assert_true(room->held);
}

static void
half_of_the_hearers_or_more_hold_a_room(void **state)
{
    struct conn *from = join("r", false, 0), *m[4];
    struct room *room = room_of(from);

    (void)state;
    for (int i = 0; i < 4; i++)
        m[i] = join("r", false, 0);
    let_them_lag(from);
    for (int i = 0; i < 4; i++) {
        room_judge(s, room);
        assert_int_equal(room->held, 4 - i >= 2);
        (void)take_all(m[i]);
    }
    room_judge(s, room);
    assert_false(room->held);
    assert_true(s->count.holds == 1);
}

static void
a_few_hold_a_room_only_in_a_burst(void **state)
{
    struct conn *from = join("r", false, 0), *m[4];
    struct room *room = room_of(from);

    (void)state;
    for (int i = 0; i < 4; i++)
        m[i] = join("r", false, 0);
    let_them_lag(from);
    for (int i = 1; i < 4; i++)
        (void)take_all(m[i]);
    room_judge(s, room);
    assert_false(room->held); /* it stood still for too long */
    (void)take(m[0], 1, got);
    now_ms += ROOM_BURST_STALL_MS - 1;
    room_judge(s, room);
    assert_true(room->held);
    now_ms += 1;
    room_judge(s, room);
    assert_false(room->held);
}

static void
a_few_hold_a_room_for_a_second_a_minute(void **state)
{
    struct conn *from = join("r", false, 0), *m[4];
    struct room *room = room_of(from);
    int64_t held = 0, began = now_ms;

    (void)state;
    for (int i = 0; i < 4; i++)
        m[i] = join("r", false, 0);
    let_them_lag(from);
    for (; now_ms < began + ROOM_HOLD_WINDOW_MS - 100; now_ms += 10) {
        (void)take(m[0], 1, got); /* ever so slowly */
        for (int i = 1; i < 4; i++)
            (void)take_all(m[i]);
        if (room_lag(room, m[0]) < room_lag_limit(room))
            publish(from, 1020, 0);
        room_judge(s, room);
        held += room->held ? 10 : 0;
    }
    assert_in_range(held, ROOM_BURST_HOLD_MS, ROOM_BURST_HOLD_MS + 20);
}

static void
a_laggard_stays_one_until_it_is_less_than_a_quarter_behind(void **state)
{
    struct conn *from = join("r", false, 0), *b = join("r", false, 0);
    struct room *room = room_of(from);

    (void)state;
    let_them_lag(from);
    room_judge(s, room);
    assert_true(room->held);
    (void)take(b, (size_t)(room_lag(room, b) - RING / 4 - 1), got);
    room_judge(s, room);
    assert_true(room->held);
    (void)take(b, 1, got);
    room_judge(s, room);
    assert_false(room->held);
}

static void
who_stands_still_for_two_seconds_holds_nobody(void **state)
{
    struct conn *from = join("r", false, 0), *b = join("r", false, 0);
    struct room *room = room_of(from);

    (void)state;
    room_judge(s, room); /* no lag: it moves */
    let_them_lag(from);
    now_ms += ROOM_STALL_MS - 1 - ROOM_BURST_STALL_MS;
    room_judge(s, room);
    assert_true(room->held);
    now_ms += 1;
    room_judge(s, room);
    assert_false(room->held);
    (void)take(b, 1, got); /* it moves again */
    room_judge(s, room);
    assert_true(room->held);
}

static void
nobody_holds_a_room_for_more_than_five_seconds_a_minute(void **state)
{
    struct conn *from = join("r", false, 0), *b = join("r", false, 0);
    struct room *room = room_of(from);
    int64_t held = 0, began = now_ms;

    (void)state;
    let_them_lag(from);
    for (; now_ms < began + 2 * ROOM_HOLD_WINDOW_MS; now_ms += 100) {
        (void)take(b, 1, got); /* ever so slowly */
        if (room_lag(room, b) <= room_lag_limit(room))
            publish(from, 1020, 0);
        room_judge(s, room);
        held += room->held ? 100 : 0;
        if (now_ms - began < ROOM_HOLD_WINDOW_MS - 100)
            assert_true(held <= ROOM_HOLD_MS + 100);
    }
    assert_in_range(held, ROOM_HOLD_MS, 3 * ROOM_HOLD_MS);
}

static void
a_room_that_empties_is_no_longer_held(void **state)
{
    struct conn *from = join("r", false, 0), *b = join("r", false, 0);
    struct room *room = room_of(from);

    (void)state;
    let_them_lag(from);
    room_judge(s, room);
    assert_true(room->held);
    leave(from);
    leave(b);
    assert_false(room->held);
}

/* ----- a long walk beside a model ------------------------------------------
 * One room.  Entries and messages have the same numbers, so the model is the
 * list of all messages; a member is its place in it. */

#define MESSAGES 40000

static struct {
    uint32_t len, from;
    unsigned seed;
} said[MESSAGES];

static struct player {
    struct conn *c; /* NULL: not in the room */
    uint32_t name;  /* new with every join */
    bool echo;
    uint64_t at;    /* message number */
    size_t off;
} players[CLIENTS];

static uint32_t names;
static uint64_t delivered;

static bool
is_for(const struct player *p, uint64_t message)
{
    return p->echo || said[message].from != p->name;
}

static size_t
frame_len(uint64_t message)
{
    return ws_header_len(said[message].len) + said[message].len;
}

/* The byte at `off` of a message's frame. */
static uint8_t
frame_byte(uint64_t message, size_t off)
{
    uint32_t len = said[message].len;
    size_t header = ws_header_len(len);

    if (off == 0)
        return 0x82;
    if (off >= header)
        return letters[said[message].seed % 256 + off - header];
    if (header == 2)
        return (uint8_t)len;
    return off == 1 ? 126 : off == 2 ? (uint8_t)(len >> 8) : (uint8_t)len;
}

static void
player_hears(struct player *p, const uint8_t *bytes, size_t n, uint64_t head)
{
    for (size_t i = 0; i < n;) {
        size_t len, part;
        while (p->at < head && !is_for(p, p->at))
            p->at++;
        if (p->at == head)
            fail_msg("got more than was said");
        len = frame_len(p->at);
        part = len - p->off < n - i ? len - p->off : n - i;
        for (size_t k = 0; k < part; k++)
            if (bytes[i + k] != frame_byte(p->at, p->off + k))
                fail_msg("message %" PRIu64 " is wrong at %zu", p->at,
                         p->off + k);
        i += part;
        p->off += part;
        if (p->off == len) {
            p->off = 0;
            p->at++;
            delivered++;
        }
    }
}

static void
player_sends(struct player *p, struct room *room)
{
    size_t len = (size_t)test_random(test_random(20) == 0   ? MAX_MESSAGE
                                     : test_random(4) == 0 ? 3000
                                                           : 60);
    uint64_t n = room->ring.head;

    assert_true(n < MESSAGES);
    said[n].len = (uint32_t)len;
    said[n].from = p->name;
    said[n].seed = (unsigned)test_random(256);
    if (len + 4 > RING / 4 || test_random(3) == 0)
        publish_assembled(p->c, len, said[n].seed);
    else
        publish(p->c, len, said[n].seed);
    assert_true(room->ring.head == n + 1);
}

static void
player_takes(struct player *p, struct room *room)
{
    struct iovec v[CONN_SPANS];
    int max = 2 + (int)test_random(CONN_SPANS - 1);
    bool one_frame = test_random(4) == 0;
    int count = room_gather(s, p->c, one_frame, v, max);
    size_t sum = 0, want;

    assert_true(count <= max);
    for (int i = 0; i < count; i++) {
        assert_true(v[i].iov_len > 0);
        sum += v[i].iov_len;
    }
    want = test_random(2) == 0 ? sum : (size_t)test_random(sum + 1);
    if (want > 0)
        room_advance(s, p->c, want);
    /* what was gathered is still there: nothing has been published since */
    for (int i = 0; i < count && want > 0; i++) {
        size_t n = v[i].iov_len < want ? v[i].iov_len : want;
        player_hears(p, v[i].iov_base, n, room->ring.head);
        want -= n;
    }
    if (one_frame && sum > 0)
        assert_true(p->c->in.off != 0 || p->off == 0);
}

static void
player_joins(struct player *p, struct room *room)
{
    uint64_t history = test_random(3) == 0 ? test_random(3000) : 0, n;
    const struct ring *r = &room->ring;

    *p = (struct player){ .name = ++names, .echo = test_random(2) == 0,
                          .at = r->head };
    for (n = history; n > 0 && p->at > r->tail && p->at > room->blocks_until &&
                      r->pos - ring_pos(r, p->at - 1) <= RING / 4; n--)
        p->at--;
    p->c = join("r", p->echo, history);
    assert_true(p->c->in.entry == p->at);
}

/* Everything the room knows against everything the model knows. */
static void
compare(struct room *room)
{
    const struct ring *r = &room->ring;
    uint64_t chunks = 0;
    unsigned members = 0;

    room_check(s, room);
    for (int i = 0; i < CLIENTS; i++) {
        struct player *p = &players[i];
        uint64_t at;
        if (p->c == NULL)
            continue;
        members++;
        if (p->c->in.overtaken) {
            assert_true(p->c->in.entry < r->tail);
            assert_true(room->overtook);
            continue;
        }
        /* both may stand before or behind the member's own messages */
        at = p->c->in.entry;
        while (at < r->head && !is_for(p, at))
            at++;
        while (p->at < r->head && !is_for(p, p->at))
            p->at++;
        assert_true(at == p->at && p->c->in.off == p->off);
    }
    assert_int_equal(members, room->count);
    for (uint64_t e = r->tail; e < r->head; e++) {
        const struct entry *entry = ring_entry(r, e);
        unsigned refs = 0;
        assert_int_equal(entry->len, frame_len(e));
        if (entry->kind != RING_BLOCK)
            continue;
        for (int i = 0; i < CLIENTS; i++)
            refs += players[i].c != NULL && players[i].c->in.entry <= e &&
                    is_for(&players[i], e);
        assert_int_equal(entry->refs, refs);
        assert_int_equal(entry->block == NONE32, refs == 0);
        if (refs > 0)
            chunks += (entry->len + entry->block_skip + COLLABD_CHUNK - 1) /
                      COLLABD_CHUNK;
    }
    assert_int_equal(s->chunks.used, chunks);
    assert_true(s->count.messages_out == delivered);
}

static void
whatever_happens_each_gets_what_was_said_to_it(void **state)
{
    struct room *room = room_open(s, ROOM_CHANNEL, span_text("r"));
    unsigned overtaken = 0;

    (void)state;
    memset(players, 0, sizeof players);
    delivered = 0;
    for (int step = 0; step < 12000; step++) {
        struct player *p = &players[test_random(CLIENTS)];
        bool slow = p - players < 3; /* these read rarely */
        unsigned what = (unsigned)test_random(100);
        now_ms += (int64_t)test_random(3);
        if (p->c == NULL) {
            if (what < 50)
                player_joins(p, room);
        } else if (p->c->in.overtaken && what < 50) {
            overtaken++;
            room->overtook = false;
            leave(p->c);
            p->c = NULL;
            for (int i = 0; i < CLIENTS; i++)
                room->overtook |= players[i].c != NULL &&
                                  players[i].c->in.overtaken;
        } else if (what < 40) {
            player_sends(p, room);
        } else if (what < 97) {
            if (!p->c->in.overtaken && (!slow || what < 42))
                player_takes(p, room);
        } else if (what < 98) {
            leave(p->c);
            p->c = NULL;
            for (int i = 0; i < CLIENTS && room->overtook; i++) {
                if (players[i].c != NULL && players[i].c->in.overtaken)
                    break;
                if (i == CLIENTS - 1)
                    room->overtook = false;
            }
        } else {
            room_judge(s, room);
        }
        compare(room);
    }
    assert_true(overtaken > 20);
    assert_true(delivered > 3000);
    assert_true(room->ring.head_at > 20 * RING);
    for (int i = 0; i < CLIENTS; i++) {
        if (players[i].c == NULL)
            continue;
        leave(players[i].c);
        players[i].c = NULL;
    }
    assert_int_equal(s->chunks.used, 0);
}

#define fact(f) cmocka_unit_test_setup_teardown(f, begin, end)

int
main(void)
{
    const struct CMUnitTest tests[] = {
        fact(a_message_reaches_all_others_once_and_its_sender_not),
        fact(rooms_do_not_hear_each_other),
        fact(everyone_sees_one_order),
        fact(a_newcomer_gets_nothing_old_unless_it_asks),
        fact(history_is_a_quarter_ring_at_most),
        fact(history_does_not_reach_behind_a_block),
        fact(a_newcomer_may_be_further_back_than_all_others),
        fact(history_survives_an_empty_room),
        fact(an_old_namesake_does_not_disturb_a_newcomer),
        fact(one_room_too_many_is_none_while_all_have_members),
        fact(the_room_that_was_empty_longest_makes_place),
        fact(a_member_that_comes_back_makes_its_room_young_again),
        fact(a_room_may_make_place_while_it_waits_for_its_flush),
        fact(names_that_share_a_bucket_are_told_apart),
        fact(a_quarter_ring_is_the_border_between_ring_and_block),
        fact(a_block_is_forgotten_with_the_last_that_passes),
        fact(a_block_that_nobody_is_to_get_is_forgotten_at_once),
        fact(an_echo_of_a_block_is_counted_too),
        fact(blocks_beyond_the_budget_overtake_who_has_not_read_them),
        fact(a_newcomer_has_no_part_in_older_blocks),
        fact(a_laggard_is_overtaken_when_the_ring_needs_its_bytes),
        fact(a_member_within_an_entry_is_safe_while_the_entry_stands),
        fact(own_messages_are_no_backlog),
        fact(a_quarter_ring_wants_a_flush),
        fact(a_laggard_is_judged_before_it_can_be_overtaken),
        fact(half_of_the_hearers_or_more_hold_a_room),
        fact(a_lag_counts_only_beyond_its_limit),
        fact(a_few_hold_a_room_only_in_a_burst),
        fact(a_few_hold_a_room_for_a_second_a_minute),
        fact(a_laggard_stays_one_until_it_is_less_than_a_quarter_behind),
        fact(who_stands_still_for_two_seconds_holds_nobody),
        fact(nobody_holds_a_room_for_more_than_five_seconds_a_minute),
        fact(a_room_that_empties_is_no_longer_held),
        fact(whatever_happens_each_gets_what_was_said_to_it),
    };

    for (size_t i = 0; i < sizeof letters; i++)
        letters[i] = (uint8_t)(i * 7 + i / 251);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
