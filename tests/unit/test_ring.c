/* Chapter Rings: cursors that only grow, wrapping, finding, dropping; and a
 * long random walk beside a model that keeps everything that was ever put in.
 *
 * SPDX-License-Identifier: MIT
 */
#include "test.h"

#define SIZE 1024u
#define SLOTS (SIZE / RING_CHARGE)

static const struct conn_id nobody = { NONE, 0 };

/* Where cursors are started: at birth, and where too narrow a type or a wrong
 * sign would show. */
static const uint64_t starts[] = {
    0,
    1,
    UINT64_C(1) << 31,
    (UINT64_C(1) << 32) - 300,
    (UINT64_C(1) << 32) - 1,
    (UINT64_C(1) << 63) - 300,
    UINT64_C(1) << 63,
};

#define STARTS (sizeof starts / sizeof *starts)

static uint8_t bytes[SIZE];
static struct entry entries[SLOTS];

static struct ring
ring_at(uint64_t start)
{
    memset(bytes, 0xaa, sizeof bytes);
    return (struct ring){ .bytes = bytes, .entries = entries, .size = SIZE,
                          .tail = start, .head = start, .tail_at = start,
                          .head_at = start, .shown = start,
                          .shown_at = start, .pos = start };
}

static void
put(struct ring *r, const void *frame, uint32_t len)
{
    while (!ring_fits(r, len))
        ring_drop(r);
    (void)ring_new(r, len, nobody);
    ring_copy_in(r, frame, len);
    ring_show(r, r->head);
}

/* What stands in the ring from `at` on. */
static void
take(const struct ring *r, uint64_t at, size_t n, uint8_t *to)
{
    struct iovec v[2];
    int count = ring_peek(r, at, n, v);
    size_t sum = 0;

    assert_in_range(count, n == 0 ? 0 : 1, n == 0 ? 0 : 2);
    for (int i = 0; i < count; i++) {
        assert_true(v[i].iov_len > 0);
        assert_true((uint8_t *)v[i].iov_base >= bytes);
        assert_true((uint8_t *)v[i].iov_base + v[i].iov_len <= bytes + SIZE);
        memcpy(to + sum, v[i].iov_base, v[i].iov_len);
        sum += v[i].iov_len;
    }
    assert_int_equal(sum, n);
}

/* ----- facts ------------------------------------------------------------ */

static void
an_entry_is_charged_with_its_frame_but_at_least_its_place(void **state)
{
    (void)state;
    assert_int_equal(ring_charge(2), RING_CHARGE);
    assert_int_equal(ring_charge(RING_CHARGE), RING_CHARGE);
    assert_int_equal(ring_charge(RING_CHARGE + 1), RING_CHARGE + 1);
    assert_true(ring_charge(UINT32_MAX) == UINT32_MAX);
}

static void
a_frame_comes_out_as_it_went_in_at_every_offset(void **state)
{
    uint8_t frame[SIZE], got[SIZE];

    (void)state;
    for (size_t i = 0; i < sizeof frame; i++)
        frame[i] = (uint8_t)(i * 7);
    for (size_t k = 0; k < STARTS; k++)
        for (uint64_t offset = 0; offset < SIZE; offset++)
            for (uint32_t len = 1; len <= SIZE; len = len * 5 + 3) {
                struct ring r = ring_at(starts[k] + offset);
                struct iovec v[2];
                uint64_t at = r.head_at;
                put(&r, frame, len);
                ring_check(&r);
                take(&r, at, len, got);
                assert_memory_equal(frame, got, len);
                assert_int_equal(
                    ring_peek(&r, at, len, v),
                    (at & (SIZE - 1)) + len > SIZE ? 2 : 1);
            }
}

static void
a_peek_of_any_part_gives_that_part(void **state)
{
    uint8_t frame[SIZE], got[SIZE];

    (void)state;
    for (size_t i = 0; i < sizeof frame; i++)
        frame[i] = (uint8_t)(i * 13 + 1);
    for (size_t k = 0; k < STARTS; k++) {
        struct ring r = ring_at(starts[k] + SIZE - 5);
        uint64_t at = r.head_at;
        put(&r, frame, 12);
        for (size_t from = 0; from <= 12; from++)
            for (size_t to = from; to <= 12; to++) {
                take(&r, at + from, to - from, got);
                assert_memory_equal(frame + from, got, to - from);
            }
    }
}

static void
it_is_full_by_bytes_or_by_entries_whichever_comes_first(void **state)
{
    struct ring r = ring_at(starts[3]);
    uint8_t frame[SIZE] = { 0 };

    (void)state;
    assert_true(ring_fits(&r, SIZE));
    assert_false(ring_fits(&r, SIZE + 1));
    put(&r, frame, SIZE);
    assert_false(ring_fits(&r, 1));
    assert_true(ring_fits(&r, 0));
    ring_drop(&r);
    for (unsigned i = 0; i < SLOTS; i++) {
        assert_true(ring_fits(&r, 2));
        put(&r, frame, 2);
        ring_check(&r);
    }
    assert_int_equal(r.head - r.tail, SLOTS);
    assert_false(ring_fits(&r, 0));
    ring_drop(&r);
    assert_true(ring_fits(&r, SIZE - 2 * (SLOTS - 1)));
    assert_false(ring_fits(&r, SIZE - 2 * (SLOTS - 1) + 1));
}

static void
dropping_all_leaves_it_empty_and_its_numbers_grown(void **state)
{
    (void)state;
    for (size_t k = 0; k < STARTS; k++) {
        struct ring r = ring_at(starts[k]);
        for (int i = 0; i < 5; i++)
            put(&r, "0123456789", 10);
        for (int i = 0; i < 5; i++) {
            ring_drop(&r);
            ring_check(&r);
        }
        assert_true(r.tail == starts[k] + 5 && r.head == r.tail);
        assert_true(r.head_at == starts[k] + 50 && r.tail_at == r.head_at);
        assert_true(r.pos == starts[k] + 5 * RING_CHARGE);
        assert_true(ring_pos(&r, r.head) == r.pos);
    }
}

static void
the_position_of_an_entry_is_the_sum_of_the_charges_before_it(void **state)
{
    struct ring r = ring_at(starts[4]);
    uint8_t frame[100] = { 0 };
    uint64_t first = r.head;

    (void)state;
    put(&r, frame, 2);
    put(&r, frame, 100);
    put(&r, frame, 33);
    assert_true(ring_pos(&r, first) == starts[4]);
    assert_true(ring_pos(&r, first + 1) == starts[4] + 32);
    assert_true(ring_pos(&r, first + 2) == starts[4] + 132);
    assert_true(ring_pos(&r, first + 3) == starts[4] + 165);
}

static void
a_block_takes_a_place_but_no_bytes(void **state)
{
    struct ring r = ring_at(starts[5]);
    struct entry *e;

    (void)state;
    put(&r, "abc", 3);
    e = ring_new(&r, 1u << 20, nobody);
    e->kind = RING_BLOCK;
    put(&r, "de", 2);
    ring_check(&r);
    assert_true(r.head_at - r.tail_at == 5);
    assert_true(r.pos == starts[5] + 2 * RING_CHARGE + (1u << 20));
    /* the byte behind a block is in the entry behind it */
    assert_true(ring_find(&r, r.tail, starts[5] + 3) == r.tail + 2);
}

/* ----- a long walk beside a model --------------------------------------- */

#define KEPT 4096

static struct {
    uint32_t len;
    bool block;
    uint64_t at, pos;
} kept[KEPT]; /* by entry number modulo KEPT */

static uint8_t
byte_at(uint64_t at)
{
    return (uint8_t)(at * 2654435761u >> 13);
}

static void
compare(const struct ring *r)
{
    uint8_t got[SIZE];

    ring_check(r);
    for (uint64_t i = r->tail; i < r->head; i++) {
        const struct entry *e = ring_entry(r, i);
        assert_int_equal(e->len, kept[i % KEPT].len);
        assert_true(e->at == kept[i % KEPT].at);
        assert_true(ring_pos(r, i) == kept[i % KEPT].pos);
    }
    take(r, r->tail_at, (size_t)(r->head_at - r->tail_at), got);
    for (uint64_t at = r->tail_at; at < r->head_at; at++)
        assert_int_equal(got[at - r->tail_at], byte_at(at));
}

static void
compare_find(const struct ring *r)
{
    uint64_t from, want, at;

    if (r->tail == r->head)
        return;
    from = r->tail + test_random(r->head - r->tail);
    at = kept[from % KEPT].at;
    at += test_random(r->head_at - at + 1);
    want = from;
    for (uint64_t i = from; i < r->head; i++)
        if (kept[i % KEPT].at <= at)
            want = i;
    if (at == r->head_at)
        want = r->head;
    assert_true(ring_find(r, from, at) == want);
}

static void
add_random(struct ring *r)
{
    uint32_t len = (uint32_t)(2 + test_random(test_random(8) ? 60 : SIZE / 4));
    bool block = test_random(10) == 0;
    uint8_t frame[SIZE];
    struct entry *e;

    while (!ring_fits(r, block ? 0 : len))
        ring_drop(r);
    kept[r->head % KEPT].len = len;
    kept[r->head % KEPT].block = block;
    kept[r->head % KEPT].at = r->head_at;
    kept[r->head % KEPT].pos = r->pos;
    e = ring_new(r, len, nobody);
    if (block) {
        e->kind = RING_BLOCK;
        ring_show(r, r->head);
        return;
    }
    for (uint32_t i = 0; i < len; i++)
        frame[i] = byte_at(r->head_at + i);
    for (uint32_t done = 0; done < len;) { /* in pieces, as they come */
        uint32_t n = 1 + (uint32_t)test_random(len - done);
        ring_copy_in(r, frame + done, n);
        done += n;
    }
    ring_show(r, r->head);
}

static void
whatever_is_done_the_ring_holds_what_the_model_holds(void **state)
{
    (void)state;
    for (size_t k = 0; k < STARTS; k++) {
        struct ring r = ring_at(starts[k]);
        for (int step = 0; step < 4000; step++) {
            if (test_random(4) == 0 && r.tail < r.head)
                ring_drop(&r);
            else
                add_random(&r);
            compare(&r);
            for (int i = 0; i < 4; i++)
                compare_find(&r);
        }
        assert_true(r.head > starts[k] + 2000);
    }
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(
            an_entry_is_charged_with_its_frame_but_at_least_its_place),
        cmocka_unit_test(a_frame_comes_out_as_it_went_in_at_every_offset),
        cmocka_unit_test(a_peek_of_any_part_gives_that_part),
        cmocka_unit_test(
            it_is_full_by_bytes_or_by_entries_whichever_comes_first),
        cmocka_unit_test(dropping_all_leaves_it_empty_and_its_numbers_grown),
        cmocka_unit_test(
            the_position_of_an_entry_is_the_sum_of_the_charges_before_it),
        cmocka_unit_test(a_block_takes_a_place_but_no_bytes),
        cmocka_unit_test(whatever_is_done_the_ring_holds_what_the_model_holds),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
