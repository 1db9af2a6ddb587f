/* Chapters Tables and Counters: slots, pools that are full, chains of chunks,
 * the one allocation and its sum.
 *
 * SPDX-License-Identifier: MIT
 */
#include "test.h"

static struct collabd *s;

static struct collabd *
server(void)
{
    struct collabd *new = calloc(1, sizeof *new);

    assert_non_null(new);
    new->cfg = &new->cfgs[0];
    cfg_defaults(new->cfg);
    new->cfg->max_clients = 5;
    new->cfg->max_rooms = 3;
    new->cfg->max_requests = 2;
    new->cfg->receive_buffers = 2;
    new->cfg->max_message = 4096;
    assert_true(cfg_settle(new->cfg));
    return new;
}

static int
begin(void **state)
{
    (void)state;
    s = server();
    assert_true(memory_take(s, s->cfg));
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

/* ----- connections ------------------------------------------------------ */

static void
one_connection_too_many_is_none(void **state)
{
    struct conn *c[5];

    (void)state;
    for (unsigned round = 0; round < 3; round++) {
        for (unsigned i = 0; i < 5; i++) {
            c[i] = conn_new(s);
            assert_non_null(c[i]);
            assert_ptr_equal(conn_at(s, c[i]->id.slot), c[i]);
            for (unsigned k = 0; k < i; k++)
                assert_ptr_not_equal(c[i], c[k]);
        }
        assert_int_equal(s->conns_used, 5);
        assert_null(conn_new(s));
        for (unsigned i = 0; i < 5; i++)
            conn_free(s, c[(i * 3 + round) % 5]);
        assert_int_equal(s->conns_used, 0);
    }
}

static void
slots_never_used_stay_untouched_while_used_ones_are_free(void **state)
{
    (void)state;
    for (int i = 0; i < 100; i++)
        conn_free(s, conn_new(s));
    assert_int_equal(s->conns_fresh, 1);
}

static void
a_freed_slot_is_reused_with_another_generation(void **state)
{
    struct conn *c = conn_new(s);
    struct conn_id old = c->id;

    (void)state;
    c->blocked = c->starved = true;
    c->control_end = 99;
    c->token[3] = 1;
    conn_free(s, c);
    c = conn_new(s);
    assert_int_equal(c->id.slot, old.slot);
    assert_int_not_equal(c->id.gen, old.gen);
    assert_false(c->blocked || c->starved);
    assert_int_equal(c->control_end, 0);
    assert_int_equal(c->token[3], 0);
    assert_int_equal(c->fd, -1);
    assert_true(c->in.room == NONE && c->receiver == NONE &&
                c->request == NONE && c->tls == NONE && c->poll == NONE);
    assert_int_equal(c->message.first, NONE32);
}

/* ----- requests --------------------------------------------------------- */

static int closed;

static int
counting_close(int fd)
{
    closed = fd;
    return 0;
}

static void
one_request_too_many_is_none(void **state)
{
    struct conn *a = conn_new(s), *b = conn_new(s), *c = conn_new(s);
    struct request *q;

    (void)state;
    assert_non_null(request_new(s, a));
    q = request_new(s, b);
    assert_non_null(q);
    assert_ptr_equal(q, &s->requests[b->request]);
    assert_int_equal(q->conn, b->id.slot);
    assert_null(request_new(s, c));
    assert_int_equal(c->request, NONE);
    q->head_len = q->reply_end = 7;
    request_free(s, b);
    request_free(s, b); /* twice does no harm */
    assert_int_equal(b->request, NONE);
    assert_ptr_equal(request_new(s, c), q);
    assert_true(q->head_len == 0 && q->reply_end == 0 && q->file == -1);
    request_free(s, a);
    request_free(s, c);
    assert_int_equal(s->requests_used, 0);
}

static void
a_freed_request_closes_its_file(void **state)
{
    struct conn *a = conn_new(s);

    (void)state;
    sys.close = counting_close;
    closed = -1;
    request_new(s, a)->file = 77;
    request_free(s, a);
    assert_int_equal(closed, 77);
    closed = -1;
    (void)request_new(s, a);
    request_free(s, a);
    assert_int_equal(closed, -1);
    sys.close = close;
}

/* ----- chunks ----------------------------------------------------------- */

static void
one_chunk_too_many_is_none(void **state)
{
    struct chunks *p = &s->chunks;
    uint32_t n = p->count;

    (void)state;
    assert_int_equal(n, 8 * 4096 / COLLABD_CHUNK);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t k = chunk_new(p);
        assert_int_equal(k, i);
        assert_int_equal(p->next[k], NONE32);
        memset(chunk_bytes(p, k), (int)k, COLLABD_CHUNK);
    }
    assert_int_equal(chunk_new(p), NONE32);
    assert_int_equal(p->used, n);
    for (uint32_t i = 0; i < n; i++) /* and they do not overlap */
        for (size_t at = 0; at < COLLABD_CHUNK; at += COLLABD_CHUNK - 1)
            assert_int_equal(chunk_bytes(p, i)[at], i);
    chunk_free_chain(p, 5);
    assert_int_equal(chunk_new(p), 5);
}

static void
a_chain_is_freed_whole(void **state)
{
    struct chunks *p = &s->chunks;
    uint32_t a = chunk_new(p), b = chunk_new(p), c = chunk_new(p),
             other = chunk_new(p);
    bool seen[8] = { false };

    (void)state;
    p->next[c] = a;
    p->next[a] = b;
    chunk_free_chain(p, c);
    chunk_free_chain(p, NONE32);
    assert_int_equal(p->used, 1);
    for (int i = 0; i < 3; i++) {
        uint32_t k = chunk_new(p);
        assert_true(k != other && k < 4 && !seen[k]);
        seen[k] = true;
    }
    assert_int_equal(p->used, 4);
    assert_int_equal(p->fresh, 4);
}

/* ----- the one allocation ----------------------------------------------- */

static size_t asked;
static bool no_memory;

static void *
watching_calloc(size_t n, size_t each)
{
    asked = n * each;
    return no_memory ? NULL : calloc(n, each);
}

static void
without_memory_nothing_is_taken(void **state)
{
    struct collabd *t = server();

    (void)state;
    sys.calloc = watching_calloc;
    no_memory = true;
    assert_false(memory_take(t, t->cfg));
    assert_null(t->slab);
    assert_true(asked == memory_slab(t->cfg));
    no_memory = false;
    assert_true(memory_take(t, t->cfg));
    free(t->slab);
    sys.calloc = calloc;
    free(t);
}

static void
every_part_has_its_place_and_begins_on_a_cache_line(void **state)
{
    const struct cfg *c = s->cfg;
    const uint8_t *at = s->slab;

    (void)state;
#define X(field, what, count, each)                                          \
    do {                                                                     \
        const uint8_t *part = (const void *)s->field;                        \
        if ((count) == 0) {                                                  \
            assert_null(part);                                               \
            break;                                                           \
        }                                                                    \
        assert_int_equal((uintptr_t)part % 64, 0);                           \
        assert_true(part >= at);                                             \
        at = part + (count) * (each);                                        \
        assert_true(at <= s->slab + s->slab_size);                           \
    } while (0);
    MEMORY_TABLE(X)
#undef X
}

static void
all_of_it_may_be_written(void **state)
{
    const struct cfg *c = s->cfg;

    (void)state;
#define X(field, what, count, each)                                          \
    if ((count) > 0)                                                         \
        memset((void *)s->field, 0xee, (size_t)((count) * (each)));
    MEMORY_TABLE(X)
#undef X
}

static void
what_is_not_asked_for_takes_no_memory(void **state)
{
    (void)state;
    assert_null(s->tokens);
    assert_null(s->tokens_spare);
#if COLLABD_TLS
    assert_null(s->tls);
    assert_int_equal(s->tls_max, 0);
#endif
}

static void
the_sum_is_what_show_memory_prints(void **state)
{
    static const char *const flags[][6] = {
        { "collabd" },
        { "collabd", "--max-clients", "65000", "--ring", "1M" },
        { "collabd", "--tokens", "x", "--max-rooms", "1" },
        { "collabd", "--tls-listen=1", "--tls-cert=a", "--tls-key=b",
          "--max-tls=100" },
    };

    (void)state;
    for (size_t i = 0; i < sizeof flags / sizeof *flags; i++) {
        static struct cfg c;
        enum cfg_action action = CFG_ACTION_NONE;
        const char *operand[2], *line;
        char *text = NULL, *next;
        size_t len = 0;
        uint64_t sum = 0, said = 0;
        int argc = 0;
        FILE *f = open_memstream(&text, &len);
        while (argc < 6 && flags[i][argc] != NULL)
            argc++;
        assert_true(cfg_read(&c, argc, (char **)(uintptr_t)flags[i],
                             (struct sys_file){ -1, "" }, &action, operand));
        memory_show(&c, f);
        (void)fclose(f);
        /* the last number of every line up to "sum" */
        line = strchr(text, '\n') + 1;
        for (; (next = strchr(line, '\n')) != NULL && *line != '\n';
             line = next + 1) {
            const char *number;
            *next = '\0';
            number = strrchr(line, ' ') + 1;
            if (strncmp(line, "sum ", 4) == 0)
                said = strtoull(number, NULL, 10);
            else
                sum += strtoull(number, NULL, 10);
        }
        assert_true(sum == said);
        assert_true(said == memory_sum(&c));
        free(text);
    }
}

static void
message_memory_is_for_several_messages_of_several_rooms(void **state)
{
    (void)state;
    for (uint64_t times = 2; times < 40; times++) {
        struct collabd *t = server();
        t->cfg->message_memory = times * t->cfg->max_message;
        assert_true(cfg_settle(t->cfg));
        assert_true(memory_take(t, t->cfg));
        /* the longest message always fits into a room's budget */
        assert_true(t->block_budget >= t->cfg->max_message + WS_HEADER_MAX);
        assert_true(t->chunks.count * (uint64_t)COLLABD_CHUNK >=
                    t->cfg->message_memory);
        free(t->slab);
        free(t);
    }
}

/* ----- reasons and counters --------------------------------------------- */

static void
every_close_code_we_send_may_be_sent_and_fits_its_frame(void **state)
{
    (void)state;
    for (unsigned i = 0; i < CLOSE_REASON_COUNT; i++) {
        assert_true(strlen(close_reasons[i].text) <= 123);
        if (close_reasons[i].code != 0)
            assert_true(ws_code_is_valid(close_reasons[i].code));
    }
}

static void
metrics_are_lines_of_the_text_format(void **state)
{
    static uint8_t page[sizeof s->page];
    struct out o = out_over(page, sizeof page);
    struct span rest;
    unsigned samples = 0;

    (void)state;
    s->count.statuses[200 - 100] = 3;
    stat_metrics(s, &o);
    assert_false(o.full);
    rest = (struct span){ page, o.at };
    while (!span_is_empty(rest)) {
        struct span line = span_cut(&rest, '\n'), name;
        if (span_starts(line, "# HELP collabd_") ||
            span_starts(line, "# TYPE collabd_"))
            continue;
        assert_true(span_starts(line, "collabd_"));
        name = span_cut(&line, ' ');
        assert_true(span_len(name) > 8 && !span_is_empty(line));
        for (struct span v = line; v.at < v.end; v.at++)
            assert_true(byte_is_digit(*v.at) || *v.at == '.');
        samples++;
    }
    assert_true(samples > 30);
    *o.at = '\0';
    assert_non_null(strstr((char *)page,
                           "collabd_responses_total{status=\"200\"} 3\n"));
    assert_non_null(strstr((char *)page,
                           "collabd_closes_total{reason=\"slow\"} 0\n"));
}

#define fact(f) cmocka_unit_test_setup_teardown(f, begin, end)

int
main(void)
{
    const struct CMUnitTest tests[] = {
        fact(one_connection_too_many_is_none),
        fact(slots_never_used_stay_untouched_while_used_ones_are_free),
        fact(a_freed_slot_is_reused_with_another_generation),
        fact(one_request_too_many_is_none),
        fact(a_freed_request_closes_its_file),
        fact(one_chunk_too_many_is_none),
        fact(a_chain_is_freed_whole),
        fact(without_memory_nothing_is_taken),
        fact(every_part_has_its_place_and_begins_on_a_cache_line),
        fact(all_of_it_may_be_written),
        fact(what_is_not_asked_for_takes_no_memory),
        fact(the_sum_is_what_show_memory_prints),
        fact(message_memory_is_for_several_messages_of_several_rooms),
        fact(every_close_code_we_send_may_be_sent_and_fits_its_frame),
        fact(metrics_are_lines_of_the_text_format),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
