/* Chapter Sync codec: numbers, the check of updates, merge, diff, minus,
 * cleaning, what is known, pieces, awareness.
 *
 * SPDX-License-Identifier: MIT
 */
#include "test.h"

#define BYTES(...)                                                           \
    span_of((const uint8_t[]){ __VA_ARGS__ },                                \
            sizeof((const uint8_t[]){ __VA_ARGS__ }))

/* ----- memory that is given back when a test ends ------------------------ */

static void *kept[4096];
static size_t kept_n;

static void *
keep(size_t n)
{
    void *p = malloc(n > 0 ? n : 1);

    assert_non_null(p);
    assert_true(kept_n < sizeof kept / sizeof kept[0]);
    kept[kept_n++] = p;
    return p;
}

static int
give_back(void **state)
{
    (void)state;
    while (kept_n > 0)
        free(kept[--kept_n]);
    return 0;
}

/* ----- updates ------------------------------------------------------------ */

static struct span
run_of(const struct span *updates, size_t n)
{
    size_t room = 0;
    struct out o;
    uint8_t *at;

    for (size_t i = 0; i < n; i++)
        room += span_len(updates[i]) + 8;
    at = keep(room);
    o = out_over(at, room);
    for (size_t i = 0; i < n; i++) {
        out_uint(&o, span_len(updates[i]));
        out_span(&o, updates[i]);
    }
    return span_of(at, (size_t)(o.at - at));
}

/* Sums over snapshot and tail. */
static struct y_report
sums_of(const struct y_store *store)
{
    struct y_report sum = { 0 }, r;
    struct span tail = store->tail, update = store->snapshot;

    if (!span_is_empty(update)) {
        assert_true(y_check(update, &r));
        sum = r;
    }
    while (y_run_next(&tail, &update)) {
        assert_true(y_check(update, &r));
        sum.structs += r.structs;
        sum.ranges += r.ranges;
        sum.clients += r.clients;
        sum.stretches += r.stretches;
    }
    assert_true(span_is_empty(tail));
    return sum;
}

static struct y_work
work_of(uint64_t size)
{
    return (struct y_work){ keep((size_t)size), (size_t)size };
}

static struct span
written(struct y_result *r)
{
    uint8_t *at = keep(r->bytes);
    struct out o = out_over(at, r->bytes);
    struct y_report report;

    y_write(r, &o);
    assert_false(o.full);
    assert_ptr_equal(o.at, o.end);
    assert_true(y_check(span_of(at, r->bytes), &report));
    assert_true(report.canonical);
    assert_int_equal(report.structs, r->structs);
    assert_int_equal(report.ranges, r->ranges);
    assert_int_equal(report.clients, r->clients);
    assert_int_equal(report.deletes_at, r->deletes_at);
    assert_int_equal(r->empty, r->structs + r->ranges == 0);
    return span_of(at, r->bytes);
}

static struct y_store
store_of(const struct span *updates, size_t n)
{
    return (struct y_store){ .tail = run_of(updates, n) };
}

static struct span
merge(const struct y_store *store, enum y_gc mode)
{
    struct y_report sum = sums_of(store);
    struct y_result r;

    assert_int_equal(y_merge(store, mode,
                             work_of(y_work_size(sum.structs, sum.ranges,
                                                 sum.clients)), &r), Y_OK);
    return written(&r);
}

static struct span
merge_two(struct span a, struct span b)
{
    struct y_store store = store_of((struct span[]){ a, b }, 2);

    return merge(&store, Y_GC_OFF);
}

static struct span
clean(struct span update, enum y_gc mode)
{
    struct y_store store = store_of(&update, 1);

    return merge(&store, mode);
}

static struct span
diff(struct span update, struct span sv)
{
    struct y_store store = store_of(&update, 1);
    struct y_report sum = sums_of(&store);
    struct y_result r;

    assert_int_equal(y_diff(&store, sv,
                            work_of(y_work_size(sum.structs, sum.ranges,
                                                span_len(sv))), &r), Y_OK);
    return written(&r);
}

static void
learn(struct y_known *k, struct span update)
{
    struct y_report r;

    assert_true(y_check(update, &r));
    if (!y_known_fits(k, r.clients, r.stretches)) {
        size_t slots = y_known_slots(k->used + r.clients,
                                     k->n_islands + r.stretches);
        y_known_move(k, keep(y_known_bytes(slots)), slots);
    }
    y_known_add(k, update);
}

/* What of an update is new; an empty span: nothing. */
static struct span
minus(struct span base, struct span update)
{
    struct y_store store = store_of(&base, 1);
    struct y_known known = { .seed = 42 };
    struct y_report sum = sums_of(&store), r;
    struct y_result result;

    learn(&known, base);
    assert_true(y_check(update, &r));
    assert_int_equal(y_minus(&store, &known, update,
                             work_of(y_minus_size(&known, &r, sum.ranges)),
                             &result), Y_OK);
    if (result.empty)
        return span_of(NULL, 0);
    return written(&result);
}

static struct span
state_vector(struct span update)
{
    struct y_known k = { .seed = 7 };
    uint8_t *at;
    struct out o;
    size_t n;

    learn(&k, update);
    n = y_known_write_sv(&k, NULL);
    at = keep(n);
    o = out_over(at, n);
    assert_int_equal(y_known_write_sv(&k, &o), n);
    assert_false(o.full);
    return span_of(at, n);
}

static void
assert_bytes_(struct span got, struct span want, int line)
{
    if (span_equals(got, want))
        return;
    print_error("line %d: got", line);
    for (const uint8_t *p = got.at; p < got.end; p++)
        print_error(" %02x", *p);
    print_error("\n    want");
    for (const uint8_t *p = want.at; p < want.end; p++)
        print_error(" %02x", *p);
    print_error("\n");
    fail();
}
#define assert_bytes(got, want) assert_bytes_(got, want, __LINE__)

/* ----- numbers ------------------------------------------------------------ */

static void
numbers_are_written_as_short_as_they_can_be(void **state)
{
    static const uint64_t some[] = { 0, 1, 127, 128, 16383, 16384, 1u << 21,
                                     UINT32_MAX, (uint64_t)1 << 42, Y_MAX };

    (void)state;
    for (size_t i = 0; i < sizeof some / sizeof some[0]; i++) {
        uint8_t bytes[10];
        struct out o = out_over(bytes, sizeof bytes);
        struct span in;
        uint64_t v = 1;
        out_uint(&o, some[i]);
        assert_int_equal(o.at - bytes, y_uint_len(some[i]));
        for (size_t n = 0; n < y_uint_len(some[i]); n++) {
            in = test_span_at_edge(bytes, n);
            assert_false(y_uint(&in, &v));
            assert_int_equal(span_len(in), n);
        }
        in = test_span_at_edge(bytes, y_uint_len(some[i]));
        assert_true(y_uint(&in, &v));
        assert_true(span_is_empty(in));
        assert_true(v == some[i]);
    }
}

static void
numbers_end_at_2_to_53_and_8_bytes(void **state)
{
    struct span most = BYTES(255, 255, 255, 255, 255, 255, 255, 15);
    struct span more = BYTES(128, 128, 128, 128, 128, 128, 128, 16);
    struct span padded = BYTES(129, 128, 128, 128, 128, 128, 128, 0);
    struct span nine = BYTES(129, 128, 128, 128, 128, 128, 128, 128, 0);
    uint64_t v;

    (void)state;
    assert_true(y_uint(&most, &v));
    assert_true(v == Y_MAX);
    assert_false(y_uint(&more, &v));
    assert_true(y_uint(&padded, &v));
    assert_int_equal(v, 1);
    assert_false(y_uint(&nine, &v));
}

/* ----- updates that are fine ----------------------------------------------
 * One of each kind of content, and of each kind of head. */

static const struct {
    const char *bytes;
    size_t len;
} good[] = {
#define GOOD(s) { s, sizeof s - 1 }
    GOOD("\0\0"),                                               /* nothing */
    GOOD("\0\1\1\1\1\1"),                                /* only a deletion */
    GOOD("\1\1\1\0\4\1\1t\2ab\0"),                                /* String */
    GOOD("\1\1\1\5\0\7\0"),                                           /* GC */
    GOOD("\1\3\1\0\0\1\12\4\0\1\0"),                           /* with Skip */
    GOOD("\1\1\1\0\1\1\1t\3\0"),                                 /* Deleted */
    GOOD("\1\1\1\0\2\1\1t\2\4null\11undefined\0"),                  /* JSON */
    GOOD("\1\1\1\0\3\1\1t\3\0\1\2\0"),                            /* Binary */
    GOOD("\1\1\1\0\5\1\1t\10{\"a\":[]}\0"),                        /* Embed */
    GOOD("\1\1\1\0\6\1\1t\1b\4true\0"),                           /* Format */
    GOOD("\1\2\1\0\7\1\1t\0\7\1\1t\3\1p\0"),                /* Array, element */
    GOOD("\1\1\1\0\10\1\1t\12\177\176\171\170\175\100\174\1\2\3\4"
         "\173\1\2\3\4\5\6\7\10\172\1\2\3\4\5\6\7\10\167\1x"
         "\166\1\1k\165\2\176\164\1\0\0"),                   /* Any: each tag */
    GOOD("\1\1\1\0\11\1\1t\1g\166\1\4meta\176\0"),                   /* Doc */
    GOOD("\1\1\1\2\304\2\5\3\7\1x\0"),                     /* left and right */
    GOOD("\1\1\1\1\44\0\1\0\1k\1x\0"),                     /* parent and key */
    GOOD("\2\1\200\200\200\200\40\0\0\1\1\1\0\0\1\0"),   /* a client of 2^33 */
    GOOD("\1\1\1\0\4\1\1t\4\360\237\230\200\0"),            /* U+1F600: two */
};

static void
every_kind_of_content_is_accepted(void **state)
{
    struct y_report r;

    (void)state;
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
        struct span u = test_span_at_edge(good[i].bytes, good[i].len);
        assert_true(y_check(u, &r));
        assert_null(r.fault);
        assert_true(r.canonical);
        assert_int_equal(r.at, good[i].len);
    }
    assert_true(y_check(BYTES(1, 2, 1, 0, 4, 1, 1, 't', 1, 'a', 0, 1,
                              1, 1, 2, 0, 1, 5, 2), &r));
    assert_int_equal(r.clients, 1);
    assert_int_equal(r.structs, 2);
    assert_int_equal(r.ranges, 2);
    assert_int_equal(r.deletes_at, 12);
}

static void
length_is_counted_in_utf_16(void **state)
{
    struct y_stretch s;
    struct y_walk w = y_walk(BYTES(1, 1, 1, 7, 4, 1, 1, 't', 10, 'a', 0xc3,
                                   0xa4, 0xe4, 0xb8, 0xad, 0xf0, 0x9f, 0x98,
                                   0x80, 0));

    (void)state;
    assert_true(y_walk_stretch(&w, &s));
    assert_int_equal(s.to - s.from, 5);
    assert_false(y_walk_stretch(&w, &s));
    assert_int_equal(w.deletes_at, 19);
}

static void
every_prefix_is_refused_and_nothing_is_read_behind_it(void **state)
{
    struct y_report r;

    (void)state;
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++)
        for (size_t n = 0; n < good[i].len; n++) {
            struct span u = test_span_at_edge(good[i].bytes, n);
            assert_false(y_check(u, &r));
            assert_non_null(r.fault);
            assert_true(r.at <= n);
        }
}

static void
anything_behind_the_end_is_refused(void **state)
{
    uint8_t bytes[128];
    struct y_report r;

    (void)state;
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
        memcpy(bytes, good[i].bytes, good[i].len);
        bytes[good[i].len] = 0;
        assert_false(y_check(span_of(bytes, good[i].len + 1), &r));
        assert_string_equal(r.fault, "bytes behind the end");
    }
}

static void
any_byte_may_be_wrong_and_nothing_breaks(void **state)
{
    uint8_t bytes[128];
    struct y_report r;

    (void)state;
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++)
        for (size_t k = 0; k < good[i].len; k++)
            for (unsigned b = 0; b < 256; b++) {
                struct span u;
                memcpy(bytes, good[i].bytes, good[i].len);
                bytes[k] = (uint8_t)b;
                u = test_span_at_edge(bytes, good[i].len);
                if (y_check(u, &r) && b % 16 == 0)
                    (void)clean(u, Y_GC_AUTO);
                (void)give_back(NULL);
            }
}

/* ----- what is refused ---------------------------------------------------- */

static const struct {
    const char *bytes;
    size_t len;
    const char *fault;
} bad[] = {
#define BAD(s, fault) { s, sizeof s - 1, fault }
#define NUMBER "a number cut short or too large"
#define COUNT "more announced than follows"
#define EMPTY "a struct of length 0"
#define CLOCK "a clock that is too large"
#define SELF "a reference to itself or later"
#define MOST "\377\377\377\377\377\377\377\17"
    BAD("", NUMBER),
    BAD("\1\1\1\0\0\200\200\200\200\200\200\200\20\0", NUMBER),
    BAD("\1\1\1\0\0\201\200\200\200\200\200\200\200\0\0", NUMBER),
    /* clock + length */
    BAD("\1\1\1" MOST "\0\1\0", CLOCK),
    BAD("\1\2\1\1\0" MOST "\0\1\0", CLOCK),
    BAD("\0\1\1\1" MOST "\1", CLOCK),
    /* length 0 */
    BAD("\1\1\1\0\0\0\0", EMPTY),
    BAD("\1\1\1\0\12\0\0", EMPTY),
    BAD("\1\1\1\0\1\1\1t\0\0", EMPTY),
    BAD("\1\1\1\0\2\1\1t\0\0", EMPTY),
    BAD("\1\1\1\0\4\1\1t\0\0", EMPTY),
    BAD("\1\1\1\0\10\1\1t\0\0", EMPTY),
    BAD("\0\1\1\1\5\0", "a delete range of length 0"),
    /* kinds there are not */
    BAD("\1\1\1\0\13\1\1t\1\0", "an unknown kind of content"),
    BAD("\1\1\1\0\37\1\1t\1\0", "an unknown kind of content"),
    BAD("\1\1\1\0\40\1\0", "flags on a GC or Skip"),
    BAD("\1\1\1\0\200\1\0", "flags on a GC or Skip"),
    BAD("\1\1\1\0\112\1\0", "flags on a GC or Skip"),
    BAD("\1\1\1\0\4\2\1t\1a\0", "an unknown kind of parent"),
    BAD("\1\1\1\0\7\1\1t\7\0", "an unknown type"),
    BAD("\1\1\1\0\10\1\1t\1\163\0", "an unknown kind of value"),
    BAD("\1\1\1\0\10\1\1t\1\0\0", "an unknown kind of value"),
    BAD("\1\1\1\0\11\1\1t\1g\176\0",
        "a subdocument whose options are no object"),
    /* counts */
    BAD("\177\0", COUNT),
    BAD(MOST "\1\1\0\0\1\0", COUNT),
    BAD("\1\377\1\1\0\0\1\0", COUNT),
    BAD("\0\5\1\1\1\1", COUNT),
    BAD("\0\1\1\177\1\1", COUNT),
    BAD("\1\1\1\0\10\1\1t\177\176\0", COUNT),
    BAD("\1\1\1\0\2\1\1t\177\4null\0", COUNT),
    BAD("\1\1\1\0\10\1\1t\1\165\177\176\0", COUNT),
    BAD("\1\1\1\0\10\1\1t\1\166\3\1k\176\0", COUNT),
    /* text */
    BAD("\1\1\1\0\4\1\1\377\1a\0", "text that is not UTF-8"),
    BAD("\1\1\1\0\44\1\1t\1\377\1a\0", "text that is not UTF-8"),
    BAD("\1\1\1\0\4\1\1t\2\300\200\0", "text that is not UTF-8"),
    BAD("\1\1\1\0\4\1\1t\3\355\240\200\0", "text that is not UTF-8"),
    BAD("\1\1\1\0\4\1\1t\4\364\220\200\200\0", "text that is not UTF-8"),
    BAD("\1\1\1\0\4\1\1t\3\360\237\230\0", "text that is not UTF-8"),
    BAD("\1\1\1\0\6\1\1t\1\377\4null\0", "text that is not UTF-8"),
    BAD("\1\1\1\0\11\1\1t\1\377\166\0\0", "text that is not UTF-8"),
    BAD("\1\1\1\0\10\1\1t\1\166\1\1\377\176\0", "text that is not UTF-8"),
    /* JSON */
    BAD("\1\1\1\0\5\1\1t\2{]\0", "text that is not JSON"),
    BAD("\1\1\1\0\5\1\1t\11undefined\0", "text that is not JSON"),
    BAD("\1\1\1\0\6\1\1t\1b\3tru\0", "text that is not JSON"),
    BAD("\1\1\1\0\2\1\1t\1\1x\0", "text that is not JSON"),
    BAD("\1\1\1\0\5\1\1t\5\357\273\277{}\0", "text that is not JSON"),
    /* its own clock */
    BAD("\1\1\1\5\204\1\5\1a\0", SELF),
    BAD("\1\1\1\5\104\1\6\1a\0", SELF),
    BAD("\1\1\1\5\4\0\1\5\1a\0", SELF),
    /* V2, behind its V1 look */
    BAD("\0\0\1\1\0\0\1\1\0", "bytes behind the end"),
};

static void
what_makes_clients_stumble_is_refused(void **state)
{
    struct y_report r;

    (void)state;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        struct span u = test_span_at_edge(bad[i].bytes, bad[i].len);
        if (y_check(u, &r))
            print_error("accepted: row %zu\n", i);
        assert_string_equal(r.fault, bad[i].fault);
        assert_false(r.canonical);
    }
}

static void
what_is_written_otherwise_is_accepted_but_not_canonical(void **state)
{
    struct y_report r;

    (void)state;
#define ODD(...)                                                             \
    do {                                                                     \
        assert_true(y_check(BYTES(__VA_ARGS__), &r));                        \
        assert_false(r.canonical);                                           \
    } while (0)
    ODD(0x80, 0, 0);                               /* a padded number */
    ODD(1, 1, 1, 0, 4, 1, 1, 't', 0x81, 0, 'a', 0);
    ODD(1, 0, 1, 0, 0);                            /* an empty section */
    ODD(0, 1, 1, 0);                               /* a client without ranges */
    ODD(2, 1, 1, 0, 0, 1, 1, 2, 0, 0, 1, 0);       /* clients ascending */
    ODD(2, 1, 1, 0, 0, 1, 1, 1, 5, 0, 1, 0);       /* a client twice */
    ODD(1, 2, 1, 0, 10, 1, 0, 1, 0);               /* Skip first */
    ODD(1, 2, 1, 0, 0, 1, 10, 1, 0);               /* Skip last */
    ODD(1, 4, 1, 0, 0, 1, 10, 1, 10, 1, 0, 1, 0);  /* Skip twice */
    ODD(1, 1, 1, 1, 0xa4, 2, 0, 1, 'a', 0);        /* the bit of a key */
    ODD(0, 2, 1, 1, 0, 1, 2, 1, 0, 1);             /* deletes ascending */
    ODD(0, 1, 1, 2, 5, 1, 0, 1);                   /* ranges not in order */
    ODD(0, 1, 1, 2, 0, 2, 2, 1);                   /* ranges that touch */
    ODD(0, 1, 1, 2, 0, 5, 1, 1);                   /* ranges that overlap */
    /* but content is copied as it is, whatever its numbers look like */
    assert_true(y_check(BYTES(1, 1, 1, 0, 8, 1, 1, 't', 1, 119, 0x81, 0, 'x',
                              0), &r));
    assert_true(r.canonical);
}

static struct span
nested(uint8_t *at, unsigned depth, const char *open, const char *inner)
{
    struct out o = out_over(at, 512);

    for (unsigned i = 0; i < depth; i++)
        out_text(&o, open);
    out_text(&o, inner);
    return span_of(at, (size_t)(o.at - at));
}

static void
nesting_ends_at_a_hundred(void **state)
{
    uint8_t any[512], json[512];

    (void)state;
    for (unsigned depth = 99; depth <= 101; depth++) {
        struct span s = nested(any, depth, "\165\1", "\176");
        struct y_in r = { .in = s };
        struct out o;
        y_skip_any(&r);
        assert_int_equal(r.fault == NULL, depth <= 100);
        r = (struct y_in){ .in = nested(any, depth, "\166\1\1k", "\176") };
        y_skip_any(&r);
        assert_int_equal(r.fault == NULL, depth <= 100);
        s = nested(json, depth, "[", "");
        o = out_over(json + depth, sizeof json - depth);
        for (unsigned i = 0; i < depth; i++)
            out_u8(&o, ']');
        s.end = o.at;
        assert_int_equal(json_check(s), depth <= 100);
    }
}

static void
siblings_do_not_count_as_nesting(void **state)
{
    uint8_t bytes[2048];
    struct out o = out_over(bytes, sizeof bytes);
    struct y_in r;

    (void)state;
    out_u8(&o, 117);
    out_uint(&o, 300);
    for (int i = 0; i < 300; i++)
        out_text(&o, i % 2 ? "\165\1\176" : "\166\1\1k\170");
    out_u8(&o, 126); /* the next value */
    r = (struct y_in){ .in = span_of(bytes, (size_t)(o.at - bytes)) };
    y_skip_any(&r);
    assert_null(r.fault);
    assert_int_equal(span_len(r.in), 1);
}

static void
json_is_what_json_parse_takes(void **state)
{
    static const char *const yes[] = {
        "null", "true", " \t\r\nfalse ", "0", "-0", "12", "1.50", "1e5",
        "-1.5E-10", "0e+1", "\"\"", "\"a\\n\\u00ff\\\"\\/\"", "\"\x7f\"", "[]",
        "[ ]", "[1,2]", "{}", "{ }", "{\"\":0}", "{\"a\":{\"b\":[[],{}]}}",
        "[\"\\ud800\"]", " [ 1 , { \"a\" : null } ] ",
    };
    static const char *const no[] = {
        "", " ", "nul", "nulll", "tru", "True", "01", "-", "+1", "1.", ".5",
        "1e", "1e+", "0x1", "NaN", "\"", "\"\\x\"", "\"\\u12g4\"", "\"\\u12\"",
        "\"\n\"", "\"\t\"", "'a'", "[", "]", "[1", "[1,]", "[,1]", "[1 2]",
        "{", "{\"a\"}", "{\"a\":}", "{\"a\":1,}", "{a:1}", "{\"a\":1 \"b\":2}",
        "{1:2}", "[}", "{]", "[1}", "1 1", "[] []", "\xa0", "undefined",
    };

    (void)state;
    for (size_t i = 0; i < sizeof yes / sizeof yes[0]; i++) {
        size_t n = strlen(yes[i]);
        assert_true(json_check(test_span_at_edge(yes[i], n)));
    }
    for (size_t i = 0; i < sizeof no / sizeof no[0]; i++) {
        size_t n = strlen(no[i]);
        if (json_check(test_span_at_edge(no[i], n)))
            print_error("accepted: %s\n", no[i]);
        assert_false(json_check(test_span_at_edge(no[i], n)));
    }
    assert_false(json_check(span_of("1\0", 2)));
    assert_false(json_check(span_of("\0", 1)));
}

/* ----- merge -------------------------------------------------------------- */

/* Client 1 types "a", "b" and "c" into root text "t", one by one. */
#define TYPED_A BYTES(1, 1, 1, 0, 4, 1, 1, 't', 1, 'a', 0)
#define TYPED_B BYTES(1, 1, 1, 1, 0x84, 1, 0, 1, 'b', 0)
#define TYPED_C BYTES(1, 1, 1, 2, 0x84, 1, 1, 1, 'c', 0)
#define TYPED_AB BYTES(1, 1, 1, 0, 4, 1, 1, 't', 2, 'a', 'b', 0)
#define TYPED_ABC BYTES(1, 1, 1, 0, 4, 1, 1, 't', 3, 'a', 'b', 'c', 0)
/* 0x84 1 0: behind the unit (1, 0) */

static void
typing_becomes_one_struct(void **state)
{
    struct y_store store = store_of(
        (struct span[]){ TYPED_A, TYPED_B, TYPED_C }, 3);

    (void)state;
    assert_bytes(merge(&store, Y_GC_OFF), TYPED_ABC);
    store = store_of((struct span[]){ TYPED_C, TYPED_A, TYPED_B, TYPED_A }, 4);
    assert_bytes(merge(&store, Y_GC_OFF), TYPED_ABC);
    store.snapshot = TYPED_ABC;
    assert_bytes(merge(&store, Y_GC_OFF), TYPED_ABC);
    store = (struct y_store){ .snapshot = TYPED_AB };
    assert_bytes(merge(&store, Y_GC_OFF), TYPED_AB);
    store.tail = run_of((struct span[]){ TYPED_C }, 1);
    assert_bytes(merge(&store, Y_GC_OFF), TYPED_ABC);
}

static void
a_hole_becomes_a_skip_and_what_is_behind_it_stays(void **state)
{
    struct span holed = merge_two(TYPED_C, TYPED_A);

    (void)state;
    assert_bytes(holed, BYTES(1, 3, 1, 0, 4, 1, 1, 't', 1, 'a', 10, 1,
                              0x84, 1, 1, 1, 'c', 0));
    assert_bytes(merge_two(holed, TYPED_B), TYPED_ABC);
    /* none at the beginning */
    assert_bytes(merge_two(TYPED_C, TYPED_C), TYPED_C);
}

static void
what_came_first_keeps_its_units(void **state)
{
    struct span gc = BYTES(1, 1, 1, 1, 0, 1, 0);
    struct span deleted = BYTES(1, 1, 1, 0, 1, 1, 1, 't', 3, 0);

    (void)state;
    assert_bytes(merge_two(TYPED_ABC, deleted), TYPED_ABC);
    assert_bytes(merge_two(deleted, TYPED_ABC), deleted);
    /* the later one fills what is left at both ends */
    assert_bytes(merge_two(gc, TYPED_ABC),
                 BYTES(1, 3, 1, 0, 4, 1, 1, 't', 1, 'a', 0, 1,
                       0x84, 1, 1, 1, 'c', 0));
    /* three, each ahead of the next */
    assert_bytes(merge_two(gc, merge_two(BYTES(1, 1, 1, 0, 0, 1, 0),
                                         TYPED_ABC)),
                 BYTES(1, 2, 1, 0, 0, 2, 0x84, 1, 1, 1, 'c', 0));
}

static void
clients_and_deletes_come_out_in_order(void **state)
{
    struct span a = BYTES(2, 1, 1, 0, 0, 1, 1, 3, 0, 0, 1,
                          2, 1, 3, 7, 1, 1, 2, 3, 1, 3, 1, 0, 1);
    struct span b = BYTES(1, 1, 2, 0, 0, 1, 1, 1, 1, 0, 1);

    (void)state;
    assert_bytes(merge_two(a, b),
                 BYTES(3, 1, 3, 0, 0, 1, 1, 2, 0, 0, 1, 1, 1, 0, 0, 1,
                       2, 3, 1, 0, 1, 1, 2, 0, 4, 7, 1));
}

static void
a_client_in_two_sections_loses_nothing(void **state)
{
    struct span u = BYTES(2, 1, 1, 1, 0x84, 1, 0, 1, 'b', 1, 1, 0, 4, 1, 1,
                          't', 1, 'a', 0);

    (void)state;
    assert_bytes(clean(u, Y_GC_OFF), TYPED_AB);
}

static void
the_bit_of_a_key_goes_where_no_key_is(void **state)
{
    (void)state;
    assert_bytes(clean(BYTES(1, 1, 1, 1, 0xa4, 2, 0, 1, 'a', 0), Y_GC_OFF),
                 BYTES(1, 1, 1, 1, 0x84, 2, 0, 1, 'a', 0));
    assert_bytes(clean(BYTES(1, 1, 1, 1, 0x64, 2, 0, 1, 'a', 0), Y_GC_OFF),
                 BYTES(1, 1, 1, 1, 0x44, 2, 0, 1, 'a', 0));
}

static void
values_are_copied_as_they_are(void **state)
{
    /* -0, a padded length, undefined, a bigint */
    struct span u = BYTES(1, 1, 1, 0, 8, 1, 1, 't', 4, 125, 0x40,
                          119, 0x81, 0, 'x', 127, 122, 1, 2, 3, 4, 5, 6, 7, 8,
                          0);

    (void)state;
    assert_bytes(clean(u, Y_GC_OFF), u);
}

/* ----- what may be fused -------------------------------------------------- */

static void
another_right_neighbour_forbids_fusing(void **state)
{
    /* 5 types A, 1 puts X behind it, 5 puts B between: fused to AB, a client
     * would see AXB. */
    struct span a = BYTES(1, 1, 5, 0, 4, 1, 1, 't', 1, 'A', 0);
    struct span x = BYTES(1, 1, 1, 0, 0x84, 5, 0, 1, 'X', 0);
    struct span b = BYTES(1, 1, 5, 1, 0xc4, 5, 0, 1, 0, 1, 'B', 0);

    (void)state;
    assert_bytes(merge_two(merge_two(a, x), b),
                 BYTES(2, 2, 5, 0, 4, 1, 1, 't', 1, 'A', 0xc4, 5, 0, 1, 0, 1,
                       'B', 1, 1, 0, 0x84, 5, 0, 1, 'X', 0));
    /* the same one: fused */
    assert_bytes(merge_two(BYTES(1, 1, 5, 0, 0x44, 1, 0, 1, 'A', 0), b),
                 BYTES(1, 1, 5, 0, 0x44, 1, 0, 2, 'A', 'B', 0));
    /* another clock, another client */
    assert_int_equal(span_len(merge_two(
        BYTES(1, 1, 5, 0, 0x44, 1, 1, 1, 'A', 0), b)), 17);
    assert_int_equal(span_len(merge_two(
        BYTES(1, 1, 5, 0, 0x44, 2, 0, 1, 'A', 0), b)), 17);
}

static void
another_left_neighbour_forbids_fusing(void **state)
{
    struct span front = BYTES(1, 1, 1, 1, 0x44, 1, 0, 1, 'b', 0);
    struct span other = BYTES(1, 1, 1, 1, 0x84, 2, 0, 1, 'b', 0);

    (void)state;
    assert_bytes(merge_two(TYPED_A, front),
                 BYTES(1, 2, 1, 0, 4, 1, 1, 't', 1, 'a', 0x44, 1, 0, 1, 'b',
                       0));
    assert_bytes(merge_two(TYPED_A, other),
                 BYTES(1, 2, 1, 0, 4, 1, 1, 't', 1, 'a', 0x84, 2, 0, 1, 'b',
                       0));
}

static void
only_equal_kinds_that_have_a_length_are_fused(void **state)
{
    struct span json = merge_two(BYTES(1, 1, 1, 0, 2, 1, 1, 't', 1, 1, '1', 0),
                                 BYTES(1, 1, 1, 1, 0x82, 1, 0, 1, 1, '2', 0));
    struct span any = merge_two(BYTES(1, 1, 1, 0, 8, 1, 1, 't', 1, 126, 0),
                                BYTES(1, 1, 1, 1, 0x88, 1, 0, 1, 127, 0));
    struct span gc = merge_two(BYTES(1, 1, 1, 0, 0, 4, 0),
                               BYTES(1, 1, 1, 4, 0, 3, 0));
    struct span type = BYTES(1, 2, 1, 0, 7, 1, 1, 't', 0, 0x87, 1, 0, 0, 0);
    struct span mixed = BYTES(1, 2, 1, 0, 4, 1, 1, 't', 1, 'a', 0x88, 1, 0, 1,
                              126, 0);

    (void)state;
    assert_bytes(json, BYTES(1, 1, 1, 0, 2, 1, 1, 't', 2, 1, '1', 1, '2', 0));
    assert_bytes(any, BYTES(1, 1, 1, 0, 8, 1, 1, 't', 2, 126, 127, 0));
    assert_bytes(gc, BYTES(1, 1, 1, 0, 0, 7, 0));
    assert_bytes(clean(type, Y_GC_OFF), type);
    assert_bytes(clean(mixed, Y_GC_OFF), mixed);
}

/* ----- diff --------------------------------------------------------------- */

static void
a_diff_begins_inside_a_struct(void **state)
{
    (void)state;
    assert_bytes(diff(TYPED_ABC, BYTES(0)), TYPED_ABC);
    assert_bytes(diff(TYPED_ABC, BYTES(1, 1, 1)),
                 BYTES(1, 1, 1, 1, 0x84, 1, 0, 2, 'b', 'c', 0));
    assert_bytes(diff(TYPED_ABC, BYTES(1, 1, 3)), BYTES(0, 0));
    assert_bytes(diff(TYPED_ABC, BYTES(1, 1, 77)), BYTES(0, 0));
    assert_bytes(diff(TYPED_ABC, BYTES(1, 2, 5)), TYPED_ABC);
}

static void
a_cut_keeps_the_right_neighbour_and_drops_parent_and_key(void **state)
{
    struct span right = BYTES(1, 1, 1, 5, 0xc4, 2, 0, 2, 1, 2, 'a', 'b', 0);
    struct span key = BYTES(1, 1, 1, 0, 0x28, 1, 1, 'm', 1, 'k', 2, 120, 121,
                            0);

    (void)state;
    assert_bytes(diff(right, BYTES(1, 1, 6)),
                 BYTES(1, 1, 1, 6, 0xc4, 1, 5, 2, 1, 1, 'b', 0));
    assert_bytes(diff(key, BYTES(1, 1, 1)),
                 BYTES(1, 1, 1, 1, 0x88, 1, 0, 1, 121, 0));
}

static void
a_diff_has_the_whole_delete_set_and_no_skip_in_front(void **state)
{
    struct span u = BYTES(1, 3, 1, 0, 0, 1, 10, 4, 0, 2, 1, 1, 1, 0, 7);

    (void)state;
    assert_bytes(diff(u, BYTES(1, 1, 1)),
                 BYTES(1, 1, 1, 5, 0, 2, 1, 1, 1, 0, 7));
    assert_bytes(diff(u, BYTES(1, 1, 6)),
                 BYTES(1, 1, 1, 6, 0, 1, 1, 1, 1, 0, 7));
    assert_bytes(diff(u, BYTES(1, 1, 9)), BYTES(0, 1, 1, 1, 0, 7));
}

static void
half_a_pair_is_fffd_on_both_sides(void **state)
{
    /* U+1F600, "x" */
    struct span u = BYTES(1, 1, 1, 0, 4, 1, 1, 't', 5, 0xf0, 0x9f, 0x98, 0x80,
                          'x', 0);
    struct span gc = BYTES(1, 1, 1, 1, 0, 1, 0);

    (void)state;
    assert_bytes(diff(u, BYTES(1, 1, 1)),
                 BYTES(1, 1, 1, 1, 0x84, 1, 0, 4, 0xef, 0xbf, 0xbd, 'x', 0));
    assert_bytes(diff(u, BYTES(1, 1, 2)),
                 BYTES(1, 1, 1, 2, 0x84, 1, 1, 1, 'x', 0));
    assert_bytes(merge_two(gc, u),
                 BYTES(1, 3, 1, 0, 4, 1, 1, 't', 3, 0xef, 0xbf, 0xbd, 0, 1,
                       0x84, 1, 1, 1, 'x', 0));
    /* both halves of one pair cut off: what is between is half a pair twice */
    u = BYTES(1, 1, 1, 0, 4, 1, 1, 't', 8, 0xf0, 0x9f, 0x98, 0x80,
              0xf0, 0x9f, 0x98, 0x80, 0);
    gc = BYTES(2, 1, 1, 0, 0, 1, 1, 1, 3, 0, 1, 0);
    assert_bytes(merge_two(gc, u),
                 BYTES(1, 3, 1, 0, 0, 1, 0x84, 1, 0, 6, 0xef, 0xbf, 0xbd,
                       0xef, 0xbf, 0xbd, 0, 1, 0));
}

/* ----- minus -------------------------------------------------------------- */

static void
what_is_known_leaves_nothing(void **state)
{
    (void)state;
    assert_true(span_is_empty(minus(TYPED_ABC, TYPED_ABC)));
    assert_true(span_is_empty(minus(TYPED_ABC, TYPED_B)));
    assert_true(span_is_empty(minus(TYPED_ABC, BYTES(0, 0))));
    assert_bytes(minus(TYPED_AB, TYPED_ABC), TYPED_C);
    assert_bytes(minus(TYPED_C, TYPED_ABC), TYPED_AB);
    assert_bytes(minus(merge_two(TYPED_A, TYPED_C), TYPED_ABC), TYPED_B);
    assert_bytes(minus(BYTES(0, 0), TYPED_ABC), TYPED_ABC);
    assert_bytes(minus(TYPED_B, TYPED_ABC), merge_two(TYPED_A, TYPED_C));
}

static void
deletes_that_are_known_go_too(void **state)
{
    struct span base = BYTES(0, 1, 1, 2, 2, 3, 10, 5);

    (void)state;
    assert_true(span_is_empty(minus(base, BYTES(0, 1, 1, 1, 3, 1))));
    assert_bytes(minus(base, BYTES(0, 1, 1, 1, 0, 20)),
                 BYTES(0, 1, 1, 3, 0, 2, 5, 5, 15, 5));
    assert_bytes(minus(base, BYTES(0, 1, 2, 1, 3, 1)),
                 BYTES(0, 1, 2, 1, 3, 1));
    /* not in order, overlapping */
    assert_bytes(minus(base, BYTES(0, 1, 1, 3, 12, 5, 1, 2, 14, 1)),
                 BYTES(0, 1, 1, 2, 1, 1, 15, 2));
}

static void
another_struct_with_known_clocks_does_not_come_in(void **state)
{
    (void)state;
    assert_true(span_is_empty(
        minus(TYPED_A, BYTES(1, 1, 1, 0, 4, 1, 1, 'u', 1, 'X', 0))));
}

/* ----- cleaning ----------------------------------------------------------- */

/* n letters by client 1, and a delete range. */
static struct span
letters_deleted(size_t n, uint64_t from, uint64_t len)
{
    uint8_t *at = keep(n + 64);
    struct out o = out_over(at, n + 64);

    out_bytes(&o, (const uint8_t[]){ 1, 1, 1, 0, 4, 1, 1, 't' }, 8);
    out_uint(&o, n);
    for (size_t i = 0; i < n; i++)
        out_u8(&o, (uint8_t)('a' + i % 26));
    out_bytes(&o, (const uint8_t[]){ 1, 1, 1 }, 3);
    out_uint(&o, from);
    out_uint(&o, len);
    return span_of(at, (size_t)(o.at - at));
}

static void
deleted_text_goes_where_that_pays(void **state)
{
    struct span all = letters_deleted(10, 0, 10);
    struct span few = letters_deleted(60, 10, 7);
    struct span many = letters_deleted(60, 10, 8);
    struct span tail = letters_deleted(60, 56, 4);
    struct span none = letters_deleted(60, 57, 3);

    (void)state;
    assert_bytes(clean(all, Y_GC_AUTO),
                 BYTES(1, 1, 1, 0, 1, 1, 1, 't', 10, 1, 1, 1, 0, 10));
    assert_bytes(clean(few, Y_GC_AUTO), few);
    assert_bytes(clean(none, Y_GC_AUTO), none);
    /* two cuts are two heads of four bytes */
    assert_bytes(clean(many, Y_GC_AUTO),
                 BYTES(1, 3, 1, 0, 4, 1, 1, 't', 10, 'a', 'b', 'c', 'd', 'e',
                       'f', 'g', 'h', 'i', 'j', 0x81, 1, 9, 8, 0x84, 1, 17,
                       42, 's', 't', 'u', 'v', 'w', 'x', 'y', 'z', 'a', 'b',
                       'c', 'd', 'e', 'f', 'g', 'h', 'i', 'j', 'k', 'l', 'm',
                       'n', 'o', 'p', 'q', 'r', 's', 't', 'u', 'v', 'w', 'x',
                       'y', 'z', 'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h', 1, 1,
                       1, 10, 8));
    assert_int_equal(span_len(clean(tail, Y_GC_AUTO)), span_len(tail));
    assert_false(span_equals(clean(tail, Y_GC_AUTO), tail));
    /* full: all of it, pay or not */
    assert_false(span_equals(clean(few, Y_GC_FULL), few));
    assert_bytes(clean(few, Y_GC_OFF), few);
}

static void
half_a_pair_weighs_two_bytes(void **state)
{
    struct span keeps = BYTES(1, 1, 1, 0, 4, 1, 1, 't', 5, 0xf0, 0x9f, 0x98,
                              0x80, 'a', 1, 1, 1, 1, 2);
    struct span cuts = BYTES(1, 1, 1, 0, 4, 1, 1, 't', 6, 'a', 'b', 0xf0, 0x9f,
                             0x98, 0x80, 1, 1, 1, 0, 3);

    (void)state;
    assert_bytes(clean(keeps, Y_GC_AUTO), keeps);
    assert_bytes(clean(cuts, Y_GC_AUTO),
                 BYTES(1, 2, 1, 0, 1, 1, 1, 't', 3, 0x84, 1, 2, 3, 0xef, 0xbf,
                       0xbd, 1, 1, 1, 0, 3));
}

static void
cleaning_twice_changes_nothing(void **state)
{
    (void)state;
    for (uint64_t from = 0; from < 30; from++)
        for (uint64_t len = 1; len <= 30 - from; len++) {
            struct span u = letters_deleted(30, from, len);
            for (int mode = Y_GC_OFF; mode <= Y_GC_FULL; mode++) {
                struct span once = clean(u, (enum y_gc)mode);
                assert_bytes(clean(once, (enum y_gc)mode), once);
            }
            (void)give_back(NULL);
        }
}

static void
deleted_below_a_living_parent_stays_an_item(void **state)
{
    /* others may have put things beside it */
    (void)state;
    assert_bytes(clean(BYTES(1, 2, 1, 0, 4, 1, 1, 't', 1, 'a', 0xc4, 1, 0, 9,
                             0, 1, 'b', 1, 1, 1, 0, 2), Y_GC_FULL),
                 BYTES(1, 2, 1, 0, 1, 1, 1, 't', 1, 0xc1, 1, 0, 9, 0, 1,
                       1, 1, 1, 0, 2));
}

static void
an_overwritten_map_entry_stays_an_item(void **state)
{
    struct span u = BYTES(1, 2, 1, 0, 0x28, 1, 1, 'm', 1, 'k', 1, 120,
                          0xa8, 1, 0, 1, 121, 1, 1, 1, 0, 1);

    (void)state;
    assert_bytes(clean(u, Y_GC_FULL),
                 BYTES(1, 2, 1, 0, 0x21, 1, 1, 'm', 1, 'k', 1,
                       0x88, 1, 0, 1, 121, 1, 1, 1, 0, 1));
}

static void
what_lies_below_a_deleted_type_becomes_gc(void **state)
{
    /* an array at m.k, in it an array, in that a value, beside it another of
     * client 2 that nobody deleted; the first array is deleted */
    struct span u = BYTES(2, 1, 2, 0, 0x88, 1, 2, 1, 121,
                          3, 1, 0, 0x27, 1, 1, 'm', 1, 'k', 0,
                          7, 0, 1, 0, 0, 8, 0, 1, 1, 1, 120,
                          1, 1, 1, 0, 1);
    struct span want = BYTES(2, 1, 2, 0, 0, 1,
                             2, 1, 0, 0x21, 1, 1, 'm', 1, 'k', 1, 0, 2,
                             2, 2, 1, 0, 1, 1, 1, 0, 3);

    (void)state;
    assert_bytes(clean(u, Y_GC_FULL), want);
    assert_bytes(clean(u, Y_GC_AUTO), want);
    assert_bytes(clean(want, Y_GC_AUTO), want);
}

static void
what_stands_beside_something_dead_becomes_gc(void **state)
{
    /* below a deleted array: a value, one that only names it as its right
     * neighbour, one that only names it as its left */
    struct span u = BYTES(3, 1, 3, 0, 0x88, 1, 1, 1, 121,
                          1, 2, 0, 0x48, 1, 1, 1, 127,
                          2, 1, 0, 0x27, 1, 1, 'm', 1, 'k', 0,
                          8, 0, 1, 0, 1, 120, 1, 1, 1, 0, 1);

    (void)state;
    assert_bytes(clean(u, Y_GC_FULL),
                 BYTES(3, 1, 3, 0, 0, 1, 1, 2, 0, 0, 1,
                       2, 1, 0, 0x21, 1, 1, 'm', 1, 'k', 1, 0, 1,
                       3, 3, 1, 0, 1, 2, 1, 0, 1, 1, 1, 0, 2));
}

/* Clients 1 and 2 by turns, each struct behind one of the other's; the last one
 * is below a deleted type. */
static void
a_long_chain_is_followed_without_recursion(void **state)
{
    enum { N = 50000 };
    struct out o = out_over(keep(N * 32), N * 32);
    const uint8_t *from = o.at;
    struct span got;
    struct y_report r;

    (void)state;
    out_bytes(&o, (const uint8_t[]){ 3, 1, 3, 0, 7, 1, 1, 't', 0 }, 9);
    for (uint64_t client = 2; client >= 1; client--) {
        out_uint(&o, N);
        out_uint(&o, client);
        out_u8(&o, 0);
        for (uint64_t i = 0; i < N; i++) {
            bool last = client == 1 && i == N - 1;
            out_u8(&o, last ? 7 : 0x87);
            if (last)
                out_u8(&o, 0);
            out_uint(&o, last ? 3 : 3 - client);
            out_uint(&o, last ? 0 : client == 2 ? i : i + 1);
            out_u8(&o, 0);
        }
    }
    out_bytes(&o, (const uint8_t[]){ 1, 3, 1, 0, 1 }, 5);
    assert_false(o.full);
    got = clean(span_of(from, (size_t)(o.at - from)), Y_GC_FULL);
    assert_true(y_check(got, &r));
    assert_int_equal(r.structs, 3);
    assert_int_equal(r.ranges, 3);
}

static void
without_its_parent_a_struct_is_kept(void **state)
{
    struct span orphan = BYTES(1, 1, 2, 0, 8, 0, 1, 5, 1, 120, 0);
    struct span child_of_text = BYTES(2, 1, 2, 0, 8, 0, 1, 0, 1, 120,
                                      1, 1, 0, 4, 1, 1, 't', 1, 'a', 0);

    (void)state;
    assert_bytes(clean(orphan, Y_GC_FULL), orphan);
    /* but what is there and no type cannot be a parent: clients drop it */
    assert_bytes(clean(child_of_text, Y_GC_FULL),
                 BYTES(2, 1, 2, 0, 0, 1, 1, 1, 0, 4, 1, 1, 't', 1, 'a',
                       1, 2, 1, 0, 1));
}

static void
a_circle_of_parents_ends(void **state)
{
    struct span u = BYTES(2, 1, 2, 0, 7, 0, 1, 0, 0, 1, 1, 0, 7, 0, 2, 0, 0,
                          0);

    (void)state;
    assert_bytes(clean(u, Y_GC_FULL), u);
}

static void
deletes_of_unknown_clocks_are_kept(void **state)
{
    struct span u = BYTES(1, 1, 1, 0, 4, 1, 1, 't', 1, 'a',
                          2, 9, 1, 4, 4, 1, 1, 7, 2);

    (void)state;
    assert_bytes(clean(u, Y_GC_FULL), u);
    assert_bytes(clean(u, Y_GC_AUTO), u);
}

/* ----- memory ------------------------------------------------------------- */

static void
too_little_memory_is_an_answer(void **state)
{
    struct span updates[] = {
        BYTES(1, 1, 1, 1, 0, 1, 0), TYPED_ABC, letters_deleted(60, 10, 20),
        BYTES(1, 1, 1, 30, 0, 2, 1, 1, 2, 40, 5, 3, 3),
        BYTES(1, 1, 2, 0, 0x84, 1, 30, 1, 'q', 0)
    };
    struct y_store store = store_of(updates, 5);
    struct y_report sum = sums_of(&store);
    uint64_t most = y_work_size(sum.structs, sum.ranges, sum.clients);
    bool fine = false;

    (void)state;
    for (uint64_t size = 0; size <= most; size += 8)
        for (int mode = Y_GC_OFF; mode <= Y_GC_FULL; mode++) {
            struct y_result r;
            enum y_answer got = y_merge(&store, (enum y_gc)mode,
                                        work_of(size), &r);
            assert_true(got == Y_NO_ROOM || got == Y_OK);
            fine = got == Y_OK;
            free(kept[--kept_n]);
        }
    assert_true(fine);
}

static void
bytes_that_rot_are_an_answer(void **state)
{
    struct y_store store = { .snapshot = BYTES(1, 1, 1, 0, 0, 0, 0) };
    struct y_result r;

    (void)state;
    assert_int_equal(y_merge(&store, Y_GC_OFF, work_of(4096), &r), Y_BROKEN);
    store = (struct y_store){ .tail = BYTES(5, 0, 0) };
    assert_int_equal(y_merge(&store, Y_GC_OFF, work_of(4096), &r), Y_BROKEN);
    store = (struct y_store){ .tail = BYTES(2, 0, 0) };
    assert_int_equal(y_diff(&store, BYTES(2, 0, 0), work_of(4096), &r),
                     Y_BROKEN);
    assert_int_equal(y_diff(&store, BYTES(0), work_of(4096), &r), Y_OK);
    assert_true(r.empty);
}

/* ----- what is known ------------------------------------------------------ */

static void
assert_known(const struct y_known *k, uint64_t client, uint64_t next,
             uint64_t end, size_t islands)
{
    const struct y_known_client *c = y_known_get(k, client);

    assert_non_null(c);
    assert_true(c->next == next);
    assert_true(c->end == end);
    assert_int_equal(k->n_islands, islands);
}

/* An update of client 1 with GC in [from, to). */
static struct span
stretch(uint64_t client, uint64_t from, uint64_t to)
{
    uint8_t *at = keep(32);
    struct out o = out_over(at, 32);

    out_bytes(&o, "\1\1", 2);
    out_uint(&o, client);
    out_uint(&o, from);
    out_u8(&o, 0);
    out_uint(&o, to - from);
    out_u8(&o, 0);
    return span_of(at, (size_t)(o.at - at));
}

static void
gaps_open_and_close(void **state)
{
    struct y_known k = { .seed = 3 };

    (void)state;
    assert_null(y_known_get(&k, 1));
    assert_true(y_known_is_new(&k, stretch(1, 0, 5)));
    learn(&k, stretch(1, 0, 5));
    assert_known(&k, 1, 5, 5, 0);
    learn(&k, stretch(1, 10, 12));
    assert_known(&k, 1, 5, 12, 1);
    learn(&k, stretch(1, 20, 22));
    assert_known(&k, 1, 5, 22, 2);
    learn(&k, stretch(1, 12, 15));
    assert_known(&k, 1, 5, 22, 2);
    learn(&k, stretch(2, 7, 9));
    assert_known(&k, 2, 0, 9, 3);
    learn(&k, stretch(1, 8, 10));
    assert_known(&k, 1, 5, 22, 3);
    assert_false(y_known_is_new(&k, stretch(1, 5, 8)));
    assert_true(y_known_is_new(&k, stretch(1, 22, 23)));
    learn(&k, stretch(1, 5, 8));
    assert_known(&k, 1, 15, 22, 2);
    learn(&k, stretch(1, 0, 21));
    assert_known(&k, 1, 22, 22, 1);
    learn(&k, stretch(1, 3, 4));
    assert_known(&k, 1, 22, 22, 1);
    learn(&k, stretch(2, 0, 7));
    assert_known(&k, 2, 9, 9, 0);
}

static void
many_clients_are_known_while_the_table_grows(void **state)
{
    struct y_known k = { .seed = 11 };

    (void)state;
    for (uint64_t c = 0; c < 1000; c++)
        learn(&k, stretch(c * 64, 0, c + 1));
    assert_int_equal(k.used, 1000);
    for (uint64_t c = 0; c < 1000; c++)
        assert_known(&k, c * 64, c + 1, c + 1, 0);
    assert_null(y_known_get(&k, 63));
    y_known_clear(&k);
    assert_null(y_known_get(&k, 64));
}

/* Known clocks as one bit each, and as islands. */
static void
islands_are_what_a_bitmap_says(void **state)
{
    (void)state;
    for (int round = 0; round < 40; round++) {
        struct y_known k = { .seed = 5 };
        bool bits[3][64] = { { false } };
        for (int i = 0; i < 40; i++) {
            uint64_t client = test_random(3), from = test_random(60);
            uint64_t to = from + 1 + test_random(4);
            size_t islands = 0, n_clients = 0;
            learn(&k, stretch(client, from, to));
            for (uint64_t u = from; u < to && u < 64; u++)
                bits[client][u] = true;
            for (uint64_t c = 0; c < 3; c++) {
                const struct y_known_client *got = y_known_get(&k, c);
                uint64_t next = 0, end = 0;
                for (uint64_t u = 0; u < 64; u++) {
                    end = bits[c][u] ? u + 1 : end;
                    next += bits[c][u] && next == u;
                    islands += bits[c][u] && u > 0 && !bits[c][u - 1];
                }
                assert_int_equal(got == NULL, end == 0);
                if (got == NULL)
                    continue;
                n_clients++;
                assert_true(got->next == next && got->end == end);
            }
            assert_int_equal(k.used, n_clients);
            assert_int_equal(k.n_islands, islands);
        }
        (void)give_back(NULL);
    }
}

static void
a_state_vector_stops_at_a_gap(void **state)
{
    (void)state;
    assert_bytes(state_vector(TYPED_ABC), BYTES(1, 1, 3));
    assert_bytes(state_vector(merge_two(TYPED_A, TYPED_C)), BYTES(1, 1, 1));
    assert_bytes(state_vector(TYPED_C), BYTES(0));
    assert_bytes(state_vector(BYTES(0, 0)), BYTES(0));
}

static void
state_vectors_are_checked_to_their_end(void **state)
{
    const char *fault;

    (void)state;
    assert_true(y_sv_check(BYTES(0), &fault));
    assert_true(y_sv_check(BYTES(2, 1, 5, 9, 0), &fault));
    assert_false(y_sv_check(BYTES(0, 0), &fault));
    assert_string_equal(fault, "bytes behind the end");
    assert_false(y_sv_check(BYTES(2, 1, 5), &fault));
    assert_string_equal(fault, COUNT);
    assert_false(y_sv_check(BYTES(1, 1, 0x80), &fault));
    assert_false(y_sv_check(span_of(NULL, 0), &fault));
}

/* ----- pieces ------------------------------------------------------------- */

/* Structs of three clients, holes, a long string, a long list, deletes. */
static struct span
something_long(void)
{
    struct out o = out_over(keep(65536), 65536);
    const uint8_t *from = o.at;

    out_u8(&o, 3);
    out_bytes(&o, (const uint8_t[]){ 1, 9, 0, 4, 1, 1, 't' }, 7);
    out_uint(&o, 8000);
    for (int i = 0; i < 2000; i++)
        out_bytes(&o, "\xf0\x9f\x98\x80", 4);
    out_uint(&o, 258);
    out_bytes(&o, (const uint8_t[]){ 8, 3 }, 2);
    for (int i = 0; i < 128; i++) {
        out_bytes(&o, (const uint8_t[]){ 0x44, 9, 1, 1, 'x' }, 5);
        out_bytes(&o, (const uint8_t[]){ 10, 1 }, i < 127 ? 2 : 0);
    }
    out_bytes(&o, (const uint8_t[]){ 0x44, 9, 7, 1, 'y' }, 5);
    out_bytes(&o, (const uint8_t[]){ 0x44, 9, 8, 1, 'z' }, 5);
    out_bytes(&o, (const uint8_t[]){ 0x44, 9, 9, 1, 'z' }, 5);
    out_bytes(&o, (const uint8_t[]){ 1, 7, 0, 8, 1, 1, 'a' }, 7);
    out_uint(&o, 3000);
    for (int i = 0; i < 3000; i++)
        out_bytes(&o, i % 3 ? "\176" : "\175\5", i % 3 ? 1 : 2);
    out_bytes(&o, (const uint8_t[]){ 1, 9 }, 2);
    out_uint(&o, 500);
    for (uint64_t i = 0; i < 500; i++) {
        out_uint(&o, i * 3);
        out_u8(&o, 2);
    }
    assert_false(o.full);
    return span_of(from, (size_t)(o.at - from));
}

static struct span
pieces_of(struct span update, uint64_t most, bool joining, size_t *n)
{
    struct span pieces[2048];
    struct y_pieces c = y_pieces(update, most, joining), ahead;
    size_t len;

    for (*n = 0; ahead = c, (len = y_pieces_next(&ahead, NULL)) > 0; ++*n) {
        uint8_t *at = keep(len);
        struct out o = out_over(at, len);
        struct y_report r;
        assert_true(*n < 2047);
        assert_int_equal(y_pieces_next(&c, &o), len);
        assert_ptr_equal(o.at, at + len);
        pieces[*n] = span_of(at, len);
        assert_true(y_check(pieces[*n], &r));
        assert_true(r.canonical);
        assert_true(r.structs + r.ranges > 0);
        assert_true(len <= most || len < 64);
        assert_true(!joining || r.ranges == 0);
        /* nothing in it can be acted upon */
        if (joining)
            assert_bytes(state_vector(pieces[*n]), BYTES(0));
    }
    if (joining) {
        struct y_report r;
        struct out o;
        uint8_t *at;
        len = y_pieces_close(update, NULL);
        at = keep(len);
        o = out_over(at, len);
        assert_int_equal(y_pieces_close(update, &o), len);
        assert_ptr_equal(o.at, at + len);
        pieces[*n] = span_of(at, len);
        assert_true(y_check(pieces[*n], &r));
        assert_true(r.canonical);
        ++*n;
    }
    return run_of(pieces, *n);
}

static void
pieces_are_legal_updates_and_make_the_whole_again(void **state)
{
    struct span update = clean(something_long(), Y_GC_OFF);
    struct y_report r;

    (void)state;
    assert_true(y_check(update, &r) && r.canonical);
    for (uint64_t most = 100; most < 20000; most += most / 3)
        for (int joining = 0; joining <= 1; joining++) {
            size_t n;
            struct y_store store = {
                .tail = pieces_of(update, most, joining, &n)
            };
            assert_true(n >= span_len(update) / most);
            assert_bytes(merge(&store, Y_GC_OFF), update);
            while (kept_n > 8)
                free(kept[--kept_n]);
        }
}

static void
what_is_short_is_one_piece(void **state)
{
    size_t n;
    struct span run = pieces_of(TYPED_ABC, 64, false, &n), piece;

    (void)state;
    assert_int_equal(n, 1);
    assert_true(y_run_next(&run, &piece));
    assert_bytes(piece, TYPED_ABC);
    run = pieces_of(BYTES(0, 0), 64, false, &n);
    assert_int_equal(n, 0);
    run = pieces_of(TYPED_ABC, 64, true, &n);
    assert_int_equal(n, 1);
    assert_true(y_run_next(&run, &piece));
    assert_bytes(piece, TYPED_ABC);
    run = pieces_of(BYTES(0, 1, 1, 1, 0, 1), 64, true, &n);
    assert_int_equal(n, 1);
    assert_true(y_run_next(&run, &piece));
    assert_bytes(piece, BYTES(0, 1, 1, 1, 0, 1));
}

/* ----- awareness ---------------------------------------------------------- */

static void
awareness_is_objects_or_null(void **state)
{
    struct span m = BYTES(3, 5, 1, 2, '{', '}', 6, 2, 4, 'n', 'u', 'l', 'l',
                          7, 0, 9, ' ', '{', '"', 'a', '"', ':', '1', '}',
                          ' ');
    const char *fault;
    struct y_aware e;
    uint64_t left;
    struct y_in r = y_aware_open(m, &left);
    uint8_t bytes[64];
    struct out o = out_over(bytes, sizeof bytes);

    (void)state;
    assert_true(y_aware_check(m, &fault));
    assert_true(y_aware_check(BYTES(0), &fault));
    out_uint(&o, left);
    assert_true(y_aware_next(&r, &left, &e));
    out_aware(&o, &e);
    assert_true(e.client == 5 && e.clock == 1 && !e.gone);
    assert_span_is(e.json, "{}");
    assert_true(y_aware_next(&r, &left, &e));
    out_aware(&o, &e);
    assert_true(e.client == 6 && e.clock == 2 && e.gone);
    assert_true(y_aware_next(&r, &left, &e));
    out_aware(&o, &e);
    assert_false(e.gone);
    assert_false(y_aware_next(&r, &left, &e));
    assert_null(r.fault);
    assert_bytes(span_of(bytes, (size_t)(o.at - bytes)), m);
    for (size_t n = 0; n < span_len(m); n++)
        assert_false(y_aware_check(test_span_at_edge(m.at, n), &fault));
}

static void
bad_awareness_is_refused(void **state)
{
    uint8_t *long_one = keep(20000);
    struct out o = out_over(long_one, 20000);
    const char *fault;

    (void)state;
#define REFUSED(what, ...)                                                   \
    do {                                                                     \
        assert_false(y_aware_check(BYTES(__VA_ARGS__), &fault));             \
        assert_string_equal(fault, what);                                    \
    } while (0)
    REFUSED("a state that is not JSON", 1, 5, 1, 1, '{');
    REFUSED("a state that is not JSON", 1, 5, 1, 0);
    REFUSED("a state that is no object", 1, 5, 1, 2, '[', ']');
    REFUSED("a state that is no object", 1, 5, 1, 1, '1');
    REFUSED("a state that is no object", 1, 5, 1, 4, 't', 'r', 'u', 'e');
    REFUSED("text that is not UTF-8", 1, 5, 1, 3, '"', 0xff, '"');
    REFUSED("bytes behind the end", 1, 5, 1, 2, '{', '}', 0);
    REFUSED("bytes behind the end", 0, 0);
    REFUSED(COUNT, 2, 5, 1, 1, '{');
    out_bytes(&o, (const uint8_t[]){ 1, 5, 1 }, 3);
    out_uint(&o, Y_AWARE_BYTES + 1);
    out_u8(&o, '"');
    for (int i = 0; i < Y_AWARE_BYTES - 1; i++)
        out_u8(&o, 'x');
    out_u8(&o, '"');
    assert_false(y_aware_check((struct span){ long_one, o.at }, &fault));
    assert_string_equal(fault, "a state that is too long");
    o = out_over(long_one, 20000);
    out_uint(&o, Y_AWARE_ENTRIES + 1);
    for (int i = 0; i <= Y_AWARE_ENTRIES; i++)
        out_bytes(&o, (const uint8_t[]){ 1, 1, 2, '{', '}' }, 5);
    assert_false(y_aware_check((struct span){ long_one, o.at }, &fault));
    assert_string_equal(fault, "too many states");
}

#define T(f) cmocka_unit_test_teardown(f, give_back)

int
main(void)
{
    const struct CMUnitTest tests[] = {
        T(numbers_are_written_as_short_as_they_can_be),
        T(numbers_end_at_2_to_53_and_8_bytes),
        T(every_kind_of_content_is_accepted),
        T(length_is_counted_in_utf_16),
        T(every_prefix_is_refused_and_nothing_is_read_behind_it),
        T(anything_behind_the_end_is_refused),
        T(any_byte_may_be_wrong_and_nothing_breaks),
        T(what_makes_clients_stumble_is_refused),
        T(what_is_written_otherwise_is_accepted_but_not_canonical),
        T(nesting_ends_at_a_hundred),
        T(siblings_do_not_count_as_nesting),
        T(json_is_what_json_parse_takes),
        T(typing_becomes_one_struct),
        T(a_hole_becomes_a_skip_and_what_is_behind_it_stays),
        T(what_came_first_keeps_its_units),
        T(clients_and_deletes_come_out_in_order),
        T(a_client_in_two_sections_loses_nothing),
        T(the_bit_of_a_key_goes_where_no_key_is),
        T(values_are_copied_as_they_are),
        T(another_right_neighbour_forbids_fusing),
        T(another_left_neighbour_forbids_fusing),
        T(only_equal_kinds_that_have_a_length_are_fused),
        T(a_diff_begins_inside_a_struct),
        T(a_cut_keeps_the_right_neighbour_and_drops_parent_and_key),
        T(a_diff_has_the_whole_delete_set_and_no_skip_in_front),
        T(half_a_pair_is_fffd_on_both_sides),
        T(what_is_known_leaves_nothing),
        T(deletes_that_are_known_go_too),
        T(another_struct_with_known_clocks_does_not_come_in),
        T(deleted_text_goes_where_that_pays),
        T(half_a_pair_weighs_two_bytes),
        T(cleaning_twice_changes_nothing),
        T(deleted_below_a_living_parent_stays_an_item),
        T(an_overwritten_map_entry_stays_an_item),
        T(what_lies_below_a_deleted_type_becomes_gc),
        T(what_stands_beside_something_dead_becomes_gc),
        T(a_long_chain_is_followed_without_recursion),
        T(without_its_parent_a_struct_is_kept),
        T(a_circle_of_parents_ends),
        T(deletes_of_unknown_clocks_are_kept),
        T(too_little_memory_is_an_answer),
        T(bytes_that_rot_are_an_answer),
        T(gaps_open_and_close),
        T(many_clients_are_known_while_the_table_grows),
        T(islands_are_what_a_bitmap_says),
        T(a_state_vector_stops_at_a_gap),
        T(state_vectors_are_checked_to_their_end),
        T(pieces_are_legal_updates_and_make_the_whole_again),
        T(what_is_short_is_one_piece),
        T(awareness_is_objects_or_null),
        T(bad_awareness_is_refused),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
