/* Chapter Frames: streams of frames through a receiver, whole, byte by byte and
 * in every split; what is refused and when; receivers lent and taken back;
 * messages put together in message memory.
 *
 * SPDX-License-Identifier: MIT
 */
#include "test.h"

#include <dlfcn.h>

#define MAX_MESSAGE (1u << 20)

/* ----- a machine without memory for wslay ------------------------------- */

static bool no_memory_for_wslay;

int
wslay_frame_context_init(wslay_frame_context_ptr *ctx,
                         const struct wslay_frame_callbacks *calls, void *user)
{
    int (*real)(wslay_frame_context_ptr *, const struct wslay_frame_callbacks *,
                void *);

    if (no_memory_for_wslay)
        return WSLAY_ERR_NOMEM;
    *(void **)&real = dlsym(RTLD_NEXT, "wslay_frame_context_init");
    return real(ctx, calls, user);
}

/* ----- what a client sends ---------------------------------------------- */

static uint8_t stream[400000];
static size_t stream_len;
static size_t borders[400]; /* where frames end */
static size_t border_count;

static void
begin_stream(void)
{
    stream_len = border_count = 0;
}

/* Appends a frame: first byte (FIN, RSV, opcode), masked. */
static void
frame(unsigned first, const void *payload, size_t len)
{
    const uint8_t key[4] = { 0x37, 0xfa, 0x21, (uint8_t)(0x3d + stream_len) };
    uint8_t *p = stream + stream_len;

    assert_true(stream_len + len + 14 <= sizeof stream);
    *p++ = (uint8_t)first;
    if (len < 126) {
        *p++ = (uint8_t)(0x80 | len);
    } else {
        int bytes = len < 65536 ? 2 : 8;
        *p++ = bytes == 2 ? 0xfe : 0xff;
        while (bytes-- > 0)
            *p++ = (uint8_t)(len >> (8 * bytes));
    }
    memcpy(p, key, 4);
    p += 4;
    for (size_t i = 0; i < len; i++)
        *p++ = ((const uint8_t *)payload)[i] ^ key[i % 4];
    stream_len = (size_t)(p - stream);
    borders[border_count++] = stream_len;
}

static void
frame_text(unsigned first, const char *text)
{
    frame(first, text, strlen(text));
}

/* ----- how it arrives --------------------------------------------------- */

static struct receiver receiver;
static struct assembly message;

static size_t fed, arrived; /* of the stream */
static size_t chunk_max;    /* bytes at a time */

static ssize_t
feed(uint8_t *to, size_t len, int flags, void *user)
{
    struct receiver *r = user;
    size_t n = arrived - fed;

    (void)flags;
    if (n == 0)
        return -1;
    if (n > len)
        n = len;
    if (n > chunk_max)
        n = chunk_max;
    memcpy(to, stream + fed, n);
    fed += n;
    r->fed += n;
    return (ssize_t)n;
}

/* What came out, as text: "T5:hello P:x C1000:bye !PROTOCOL". */
static char heard[800000];
static uint8_t body[MAX_MESSAGE];
static size_t body_len;

static void
begin_hearing(void)
{
    no_memory_for_wslay = false;
    if (receiver.wslay != NULL)
        wslay_frame_context_free(receiver.wslay);
    assert_int_equal(receiver_make(&receiver, feed), 0);
    message = (struct assembly){ NONE32, NONE32, 0, { 0, 0, 0 }, 0 };
    fed = arrived = body_len = 0;
    chunk_max = SIZE_MAX;
    heard[0] = '\0';
}

static void
note(const char *kind, unsigned number, struct span data)
{
    size_t at = strlen(heard);
    uint32_t sum = 0;

    assert_true(at + span_len(data) + 64 < sizeof heard);
    at += (size_t)sprintf(heard + at, "%s%s%u:", at > 0 ? " " : "", kind,
                          number);
    if (span_len(data) <= 200) {
        for (const uint8_t *p = data.at; p < data.end; p++)
            at += (size_t)sprintf(heard + at, *p > ' ' && *p < 127 ? "%c"
                                                                   : "%02x",
                                  *p);
        return;
    }
    for (const uint8_t *p = data.at; p < data.end; p++)
        sum = sum * 31 + *p;
    (void)sprintf(heard + at, "#%08x", sum);
}

/* Takes all that can be had.  False: it was refused. */
static bool
hear(void)
{
    for (;;) {
        struct ws_piece p = ws_next(&receiver, &message, MAX_MESSAGE);
        switch (p.kind) {
        case WS_NOTHING:
            if (fed == arrived)
                return true;
            break; /* wslay calls back only once */
        case WS_PART:
            break;
        case WS_DATA:
            if (p.first) {
                assert_int_equal(body_len, 0);
                assert_in_range(p.opcode, 1, 2);
            }
            memcpy(body + body_len, p.data.at, span_len(p.data));
            body_len += span_len(p.data);
            assert_int_equal(message.len, body_len);
            if (p.last) {
                note(p.opcode == WSLAY_TEXT_FRAME ? "T" : "B",
                     (unsigned)body_len, span_of(body, body_len));
                body_len = message.len = 0;
            }
            break;
        case WS_PING:
            note("I", (unsigned)span_len(p.data), p.data);
            break;
        case WS_PONG:
            note("O", (unsigned)span_len(p.data), p.data);
            break;
        case WS_CLOSE:
            note("C", p.code, p.data);
            break;
        case WS_BAD:
            note("!", (unsigned)p.why, span_of(NULL, 0));
            return false;
        }
    }
}

static bool
hear_upto(size_t n)
{
    arrived = n;
    return hear();
}

/* The whole stream at once; what came out. */
static const char *
hear_whole(void)
{
    begin_hearing();
    (void)hear_upto(stream_len);
    return heard;
}

static void
expect(const char *want)
{
    if (strcmp(heard, want) != 0)
        fail_msg("heard \"%.300s\", not \"%.300s\"", heard, want);
}

static const char *
bad(enum close_reason why)
{
    static char text[20];

    (void)sprintf(text, "!%u:", (unsigned)why);
    return text;
}

static bool
is_border(size_t n)
{
    for (size_t i = 0; i < border_count; i++)
        if (borders[i] == n)
            return true;
    return n == 0;
}

/* The stream must sound the same whole, byte by byte, and in two parts split
 * anywhere (at every `step`, and around every border of a frame). */
static void
sounds_the_same_in_every_split(const char *want, size_t step)
{
    static char whole[sizeof heard];

    (void)hear_whole();
    if (want != NULL)
        expect(want);
    strcpy(whole, heard);
    assert_true(receiver_is_idle(&receiver));
    assert_true(receiver.fed == stream_len && receiver.used == stream_len);

    begin_hearing();
    for (size_t n = 1; n <= stream_len; n++) {
        assert_true(hear_upto(n));
        assert_true(receiver.fed == n && receiver.used <= n);
        assert_int_equal(receiver_is_idle(&receiver), is_border(n));
    }
    expect(whole);

    for (size_t n = 0, i = 0; n <= stream_len;) {
        begin_hearing();
        assert_true(hear_upto(n));
        assert_int_equal(receiver_is_idle(&receiver), is_border(n));
        assert_true(hear_upto(stream_len));
        expect(whole);
        n += step;
        for (; i < border_count && n > borders[i] + 16; i++)
            for (size_t k = borders[i] < 16 ? 0 : borders[i] - 16;
                 k < borders[i] + 16 && k < stream_len; k++) {
                begin_hearing();
                assert_true(hear_upto(k));
                assert_true(hear_upto(stream_len));
                expect(whole);
            }
    }
}

/* ----- facts: what is understood ---------------------------------------- */

static void
every_kind_of_frame_is_understood_in_every_split(void **state)
{
    (void)state;
    begin_stream();
    frame_text(0x81, "hello");
    frame_text(0x82, "");
    frame_text(0x89, "");
    frame_text(0x89, "ping");
    frame_text(0x8a, "pong");
    frame(0x82, "\x00\xff\x80", 3);
    frame_text(0x81, "");
    frame(0x88, "\x03\xe8" "bye", 5);
    sounds_the_same_in_every_split(
        "T5:hello B0: I0: I4:ping O4:pong B3:00ff80 T0: C1000:bye", 1);
}

static void
control_frames_may_stand_between_fragments(void **state)
{
    (void)state;
    begin_stream();
    frame_text(0x01, "H\xc3"); /* split inside a character */
    frame_text(0x89, "1");
    frame_text(0x00, "\xa4");
    frame_text(0x8a, "2");
    frame_text(0x00, "");
    frame_text(0x89, "\xff");
    frame_text(0x80, "llo");
    frame_text(0x02, "");
    frame_text(0x80, "");
    frame_text(0x02, "\xff");
    frame_text(0x80, "\xfe");
    sounds_the_same_in_every_split(
        "I1:1 O1:2 I1:ff T6:Hc3a4llo B0: B2:fffe", 1);
}

static void
lengths_around_the_forms_of_the_header_are_understood(void **state)
{
    static const size_t lengths[] = { 0, 1, 124, 125, 126, 127, 128, 4081,
                                      4096, 65534, 65535, 65536, 65537 };
    static uint8_t payload[65537];
    char want[30];

    (void)state;
    for (size_t i = 0; i < sizeof payload; i++)
        payload[i] = (uint8_t)(i * 11);
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        begin_stream();
        frame(0x82, payload, lengths[i]);
        frame_text(0x89, "x");
        (void)hear_whole();
        (void)snprintf(want, sizeof want, "B%zu:", lengths[i]);
        assert_memory_equal(heard, want, strlen(want));
        sounds_the_same_in_every_split(NULL, lengths[i] < 200 ? 1 : 4093);
    }
}

static void
a_message_of_many_fragments_is_one_message(void **state)
{
    (void)state;
    for (unsigned round = 0; round < 2; round++) {
        begin_stream();
        for (int i = 0; i < 300; i++)
            frame_text(i == 0 ? 0x01 : i == 299 ? 0x80 : 0x00, "a");
        begin_hearing();
        if (round == 1)
            chunk_max = 1;
        assert_true(hear_upto(stream_len));
        assert_memory_equal(heard, "T300:", 5);
        assert_true(receiver_is_idle(&receiver));
    }
}

static void
a_control_frame_of_125_bytes_is_kept_whole(void **state)
{
    uint8_t payload[125];

    (void)state;
    memset(payload, 'p', sizeof payload);
    begin_stream();
    frame(0x89, payload, 125);
    frame(0x8a, payload, 125);
    (void)hear_whole();
    assert_memory_equal(heard, "I125:ppp", 8);
    sounds_the_same_in_every_split(NULL, 1);
}

static void
a_close_may_have_no_code_or_a_code_or_a_reason(void **state)
{
    (void)state;
    begin_stream();
    frame_text(0x88, "");
    sounds_the_same_in_every_split("C1005:", 1);
    begin_stream();
    frame(0x88, "\x0f\xa1", 2);
    sounds_the_same_in_every_split("C4001:", 1);
    begin_stream();
    frame(0x88, "\x03\xe9" "caf\xc3\xa9", 7);
    sounds_the_same_in_every_split("C1001:cafc3a9", 1);
}

/* ----- facts: what is refused ------------------------------------------- */

static void
each_broken_frame_is_refused_for_its_reason(void **state)
{
    static const struct {
        enum close_reason why;
        size_t len;
        const char *bytes;
    } cases[] = {
        { CLOSE_PROTOCOL, 3, "\x81\x01x" },               /* no mask */
        { CLOSE_PROTOCOL, 2, "\x81\x00" },
        { CLOSE_PROTOCOL, 7, "\xc1\x81\0\0\0\0x" },       /* RSV1 */
        { CLOSE_PROTOCOL, 7, "\xa1\x81\0\0\0\0x" },       /* RSV2 */
        { CLOSE_PROTOCOL, 7, "\x91\x81\0\0\0\0x" },       /* RSV3 */
        { CLOSE_PROTOCOL, 7, "\xc9\x81\0\0\0\0x" },       /* RSV1, Ping */
        { CLOSE_PROTOCOL, 6, "\x83\x80\0\0\0\0" },        /* opcodes */
        { CLOSE_PROTOCOL, 6, "\x84\x80\0\0\0\0" },
        { CLOSE_PROTOCOL, 6, "\x85\x80\0\0\0\0" },
        { CLOSE_PROTOCOL, 6, "\x86\x80\0\0\0\0" },
        { CLOSE_PROTOCOL, 6, "\x87\x80\0\0\0\0" },
        { CLOSE_PROTOCOL, 6, "\x8b\x80\0\0\0\0" },
        { CLOSE_PROTOCOL, 6, "\x8c\x80\0\0\0\0" },
        { CLOSE_PROTOCOL, 6, "\x8d\x80\0\0\0\0" },
        { CLOSE_PROTOCOL, 6, "\x8e\x80\0\0\0\0" },
        { CLOSE_PROTOCOL, 6, "\x8f\x80\0\0\0\0" },
        { CLOSE_PROTOCOL, 6, "\x80\x80\0\0\0\0" },        /* nothing to go on */
        { CLOSE_PROTOCOL, 6, "\x00\x80\0\0\0\0" },
        { CLOSE_PROTOCOL, 6, "\x09\x80\0\0\0\0" },        /* Ping in parts */
        { CLOSE_PROTOCOL, 6, "\x08\x80\0\0\0\0" },
        { CLOSE_PROTOCOL, 8, "\x89\xfe\x00\x7e\0\0\0\0" }, /* Ping of 126 */
        { CLOSE_PROTOCOL, 8, "\x81\xfe\x00\x7d\0\0\0\0" }, /* too long a form */
        { CLOSE_PROTOCOL, 14, "\x81\xff\0\0\0\0\0\0\xff\xff\0\0\0\0" },
        { CLOSE_PROTOCOL, 14, "\x81\xff\x80\0\0\0\0\0\0\0\0\0\0\0" },
        /* wslay tells of a frame with its first byte of payload */
        { CLOSE_TOO_BIG, 15, "\x82\xff\0\0\0\0\0\x10\0\x01\0\0\0\0x" },
        { CLOSE_TOO_BIG, 15,
          "\x82\xff\x7f\xff\xff\xff\xff\xff\xff\xff\0\0\0\0x" },
        { CLOSE_TOO_BIG, 15, "\x82\xff\0\0\0\1\0\0\0\0\0\0\0\0x" },
        { CLOSE_PROTOCOL, 7, "\x88\x81\0\0\0\0\x03" },    /* half a code */
        { CLOSE_PROTOCOL, 8, "\x88\x82\0\0\0\0\x03\xed" }, /* 1005 */
        { CLOSE_NOT_UTF8, 9, "\x88\x83\0\0\0\0\x03\xe8\xff" },
        { CLOSE_NOT_UTF8, 9, "\x88\x83\0\0\0\0\x03\xe8\xc3" },
        { CLOSE_NOT_UTF8, 7, "\x81\x81\0\0\0\0\xff" },
        { CLOSE_NOT_UTF8, 7, "\x81\x81\0\0\0\0\xc3" },    /* ends too early */
        { CLOSE_NOT_UTF8, 9, "\x81\x83\0\0\0\0\xed\xa0\x80" },
        /* a second message inside the first */
        { CLOSE_PROTOCOL, 14, "\x01\x81\0\0\0\0x\x81\x81\0\0\0\0y" },
        { CLOSE_PROTOCOL, 14, "\x02\x81\0\0\0\0x\x01\x81\0\0\0\0y" },
        /* too long only with its second fragment */
        { CLOSE_TOO_BIG, 22,
          "\x02\x81\0\0\0\0x\x80\xff\0\0\0\0\0\x10\0\0\0\0\0\0y" },
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (size_t split = 0; split <= cases[i].len; split++) {
            begin_stream();
            memcpy(stream, cases[i].bytes, cases[i].len);
            stream_len = cases[i].len;
            begin_hearing();
            if (!hear_upto(split))
                arrived = stream_len; /* refused before all had come: fine */
            else
                (void)hear_upto(stream_len);
            if (strcmp(heard, bad(cases[i].why)) != 0)
                fail_msg("case %zu: \"%s\", not \"%s\"", i, heard,
                         bad(cases[i].why));
        }
}

static void
a_message_of_exactly_the_most_is_not_too_big(void **state)
{
    static const uint8_t header[] = { 0x82, 0xff, 0, 0, 0, 0, 0, 0x10, 0, 0,
                                      0, 0, 0, 0 };

    (void)state;
    begin_stream();
    memcpy(stream, header, sizeof header);
    stream_len = sizeof header + 100;
    memset(stream + sizeof header, 'x', 100);
    begin_hearing();
    assert_true(hear_upto(stream_len));
    assert_int_equal(message.len, 100);
}

static void
text_fails_at_its_first_wrong_byte_inside_a_frame(void **state)
{
    const char *texts[] = { "ok \xf4\x90", "\xed\xa0", "abcdefghij\xc0",
                            "\xce\xba\xe1\xbd\xb9\xcf\x83\xf4\x90" };

    (void)state;
    for (size_t t = 0; t < sizeof texts / sizeof *texts; t++) {
        size_t len = strlen(texts[t]);
        char longer[200];
        (void)snprintf(longer, sizeof longer, "%s%s", texts[t],
                       "much more that never arrives");
        begin_stream();
        frame_text(0x01, longer);
        begin_hearing();
        for (size_t n = 0; n < 6 + len; n++)
            assert_true(hear_upto(n)); /* all but the wrong byte is fine */
        assert_false(hear_upto(6 + len));
        expect(bad(CLOSE_NOT_UTF8));
    }
}

static void
binary_need_not_be_utf8(void **state)
{
    (void)state;
    begin_stream();
    frame_text(0x02, "\xff");
    frame_text(0x80, "\xc0");
    sounds_the_same_in_every_split("B2:ffc0", 1);
}

static void
close_codes_are_those_of_the_rfc(void **state)
{
    (void)state;
    for (unsigned code = 0; code < 65536; code++) {
        bool good = (code >= 1000 && code <= 1003) ||
                    (code >= 1007 && code <= 1014) ||
                    (code >= 3000 && code <= 4999);
        uint8_t payload[2] = { (uint8_t)(code >> 8), (uint8_t)code };
        if (ws_code_is_valid((uint16_t)code) != good)
            fail_msg("%u", code);
        if (code % 97 != 0)
            continue;
        begin_stream();
        frame(0x88, payload, 2);
        (void)hear_whole();
        assert_int_equal(heard[0], good ? 'C' : '!');
    }
}

/* ----- facts: receivers ------------------------------------------------- */

static struct collabd *
server_with_receivers(unsigned n)
{
    struct collabd *s = calloc(1, sizeof *s);

    s->cfg = &s->cfgs[0];
    cfg_defaults(s->cfg);
    s->cfg->receive_buffers = n;
    s->cfg->max_clients = 8;
    assert_true(cfg_settle(s->cfg));
    assert_true(memory_take(s, s->cfg));
    for (unsigned i = n; i-- > 0;) {
        struct receiver *r = &s->receivers[i];
        r->server = s;
        r->conn = NONE;
        assert_int_equal(receiver_make(r, feed), 0);
        r->next = s->receivers_free;
        s->receivers_free = (uint16_t)i;
    }
    return s;
}

static void
free_server(struct collabd *s)
{
    for (unsigned i = 0; i < s->cfg->receive_buffers; i++)
        if (s->receivers[i].wslay != NULL)
            wslay_frame_context_free(s->receivers[i].wslay);
    free(s->slab);
    free(s);
}

static void
one_receiver_too_many_is_none(void **state)
{
    struct collabd *s = server_with_receivers(2);
    struct conn *a = conn_new(s), *b = conn_new(s), *c = conn_new(s);

    (void)state;
    assert_non_null(receiver_borrow(s, a));
    assert_non_null(receiver_borrow(s, b));
    assert_int_not_equal(a->receiver, b->receiver);
    assert_null(receiver_borrow(s, c));
    assert_int_equal(c->receiver, NONE);
    receiver_return(s, a, feed);
    assert_int_equal(a->receiver, NONE);
    assert_non_null(receiver_borrow(s, c));
    receiver_return(s, b, feed);
    receiver_return(s, c, feed);
    receiver_return(s, c, feed); /* twice does no harm */
    assert_int_equal(s->receivers_used, 0);
    free_server(s);
}

static void
a_receiver_serves_two_clients_in_turn_between_their_frames(void **state)
{
    struct assembly one = { NONE32, NONE32, 0, { 0, 0, 0 }, 0 }, two = one;

    (void)state;
    begin_stream();
    frame_text(0x01, "a\xc3");
    frame_text(0x02, "\xff");
    frame_text(0x80, "\xa4");
    frame_text(0x80, "\xfe");
    begin_hearing();
    for (size_t i = 0; i < 4; i++) {
        struct ws_piece p;
        arrived = borders[i];
        p = ws_next(&receiver, i % 2 == 0 ? &one : &two, MAX_MESSAGE);
        assert_int_equal(p.kind, WS_DATA);
        assert_int_equal(p.opcode, i % 2 == 0 ? 1 : 2);
        assert_int_equal(p.first, i < 2);
        assert_int_equal(p.last, i >= 2);
        assert_true(receiver_is_idle(&receiver));
    }
    assert_int_equal(one.len, 3);
    assert_int_equal(two.len, 2);
}

static void
a_receiver_that_comes_back_in_mid_frame_is_made_anew(void **state)
{
    struct collabd *s = server_with_receivers(1);
    struct conn *c = conn_new(s);

    (void)state;
    begin_stream();
    frame_text(0x81, "hello");
    for (size_t n = 0; n <= stream_len; n++) {
        struct receiver *r = receiver_borrow(s, c);
        struct ws_piece p;
        struct assembly m = { NONE32, NONE32, 0, { 0, 0, 0 }, 0 };
        assert_non_null(r);
        fed = 0;
        arrived = n;
        chunk_max = SIZE_MAX;
        do
            p = ws_next(r, &m, MAX_MESSAGE);
        while (p.kind != WS_NOTHING);
        receiver_return(s, c, feed);
        /* whoever is next begins at a frame */
        r = receiver_borrow(s, c);
        m = (struct assembly){ NONE32, NONE32, 0, { 0, 0, 0 }, 0 };
        fed = 0;
        arrived = stream_len;
        p = ws_next(r, &m, MAX_MESSAGE);
        assert_int_equal(p.kind, WS_DATA);
        assert_span_is(p.data, "hello");
        assert_int_equal(ws_next(r, &m, MAX_MESSAGE).kind, WS_NOTHING);
        assert_true(receiver_is_idle(r));
        receiver_return(s, c, feed);
    }
    free_server(s);
}

static void
without_memory_the_pool_is_smaller_by_one(void **state)
{
    struct collabd *s = server_with_receivers(3);
    struct conn *c = conn_new(s);
    struct assembly m = { NONE32, NONE32, 0, { 0, 0, 0 }, 0 };

    (void)state;
    test_listen_in();
    begin_stream();
    frame_text(0x81, "hello");
    for (unsigned left = 3; left-- > 0;) {
        struct receiver *r = receiver_borrow(s, c);
        fed = 0;
        arrived = 3;
        chunk_max = SIZE_MAX;
        assert_int_equal(ws_next(r, &m, MAX_MESSAGE).kind, WS_NOTHING);
        no_memory_for_wslay = true;
        receiver_return(s, c, feed);
        no_memory_for_wslay = false;
        assert_true(test_said("no memory for a wslay context"));
        assert_int_equal(s->receivers_max, left);
        assert_int_equal(s->receivers_used, 0);
    }
    assert_null(receiver_borrow(s, c));
    test_listen_no_more();
    free_server(s);
}

/* ----- facts: headers we send ------------------------------------------- */

static void
a_header_says_its_length_in_the_shortest_form(void **state)
{
    static const struct {
        uint64_t len;
        size_t n;
        const char *bytes;
    } cases[] = {
        { 0, 2, "\x81\x00" },
        { 125, 2, "\x81\x7d" },
        { 126, 4, "\x81\x7e\x00\x7e" },
        { 65535, 4, "\x81\x7e\xff\xff" },
        { 65536, 10, "\x81\x7f\0\0\0\0\0\x01\0\0" },
        { UINT64_C(0x0102030405060708), 10,
          "\x81\x7f\x01\x02\x03\x04\x05\x06\x07\x08" },
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint8_t buf[WS_HEADER_MAX];
        struct out o = out_over(buf, sizeof buf);
        ws_header(&o, WSLAY_TEXT_FRAME, cases[i].len);
        assert_false(o.full);
        assert_int_equal(o.at - buf, cases[i].n);
        assert_int_equal(ws_header_len(cases[i].len), cases[i].n);
        assert_memory_equal(buf, cases[i].bytes, cases[i].n);
    }
}

/* ----- facts: messages in message memory -------------------------------- */

#define POOL_CHUNKS_MAX 40

static struct chunks
pool_of(uint32_t count)
{
    static uint8_t bytes[POOL_CHUNKS_MAX * COLLABD_CHUNK];
    static uint32_t next[POOL_CHUNKS_MAX];

    memset(bytes, 0xee, sizeof bytes);
    return (struct chunks){ bytes, next, count, 0, NONE32, 0 };
}

static void
add(struct chunks *pool, struct assembly *m, const uint8_t *from, size_t len)
{
    assert_true(assembly_add(pool, m, m->len, span_of(from, len)));
    m->len += (uint32_t)len;
}

/* Does the chain hold these bytes behind the room for a header, and no chunk
 * more than they need? */
static void
holds(const struct chunks *pool, const struct assembly *m, const uint8_t *want,
      size_t len)
{
    size_t at = WS_HEADER_MAX;
    size_t need = (len + WS_HEADER_MAX + COLLABD_CHUNK - 1) / COLLABD_CHUNK;
    uint32_t i = m->first, last = NONE32;

    assert_int_equal(pool->used, need);
    assert_int_equal(m->len, len);
    while (len > 0) {
        size_t n = COLLABD_CHUNK - at < len ? COLLABD_CHUNK - at : len;
        assert_int_not_equal(i, NONE32);
        assert_memory_equal(chunk_bytes(pool, i) + at, want, n);
        want += n;
        len -= n;
        at = 0;
        last = i;
        i = pool->next[i];
    }
    if (last == NONE32) { /* nothing, in one chunk */
        last = i;
        i = pool->next[i];
    }
    assert_int_equal(i, NONE32);
    assert_int_equal(last, m->last);
}

static const struct assembly nothing_yet = { .first = NONE32, .last = NONE32 };
static uint8_t letters[POOL_CHUNKS_MAX * COLLABD_CHUNK];

static void
pieces_around_every_chunk_border_come_out_whole(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof letters; i++)
        letters[i] = (uint8_t)(i * 7 + i / 251);
    for (size_t first = 0; first < 2 * COLLABD_CHUNK + 30;
         first += first % COLLABD_CHUNK < 30 ||
                          first % COLLABD_CHUNK > COLLABD_CHUNK - 30
                      ? 1
                      : 997)
        for (size_t second = 0; second < 3 * COLLABD_CHUNK;
             second += second < 25 ? 1 : 4079) {
            struct chunks pool = pool_of(POOL_CHUNKS_MAX);
            struct assembly m = nothing_yet;
            add(&pool, &m, letters, first);
            holds(&pool, &m, letters, first);
            add(&pool, &m, letters + first, second);
            holds(&pool, &m, letters, first + second);
            add(&pool, &m, letters + first + second, 1);
            holds(&pool, &m, letters, first + second + 1);
            assembly_drop(&pool, &m);
            assert_int_equal(pool.used, 0);
            assert_int_equal(m.first, NONE32);
            assembly_drop(&pool, &m); /* twice does no harm */
        }
}

static void
random_pieces_come_out_whole_until_memory_ends(void **state)
{
    (void)state;
    for (int round = 0; round < 200; round++) {
        uint32_t count = 1 + (uint32_t)test_random(POOL_CHUNKS_MAX);
        struct chunks pool = pool_of(count);
        struct assembly m = nothing_yet;
        for (;;) {
            size_t len = (size_t)test_random(test_random(3) == 0 ? 20000 : 300);
            size_t room = (size_t)count * COLLABD_CHUNK - WS_HEADER_MAX - m.len;
            uint32_t used = pool.used, fresh = pool.fresh;
            struct assembly before = m;
            if (len <= room) {
                add(&pool, &m, letters + m.len, len);
                holds(&pool, &m, letters, m.len);
                continue;
            }
            /* no room: nothing at all has changed */
            assert_false(
                assembly_add(&pool, &m, m.len, span_of(letters, len)));
            assert_true(pool.used == used && pool.fresh == fresh);
            assert_memory_equal(&m, &before, sizeof m);
            break;
        }
        assembly_drop(&pool, &m);
        assert_int_equal(pool.used, 0);
    }
}

static void
two_messages_share_the_pool_and_nothing_else(void **state)
{
    struct chunks pool = pool_of(POOL_CHUNKS_MAX);
    struct assembly a = nothing_yet, b = nothing_yet;
    uint32_t used;

    (void)state;
    for (int i = 0; i < 12; i++) {
        add(&pool, &a, letters + a.len, 1500);
        add(&pool, &b, letters + 5 + b.len, 3001);
    }
    used = pool.used;
    assembly_drop(&pool, &a);
    assert_true(pool.used < used);
    holds(&pool, &b, letters + 5, b.len);
    for (int i = 0; i < 12; i++)
        add(&pool, &a, letters + 9 + a.len, 1500);
    assert_int_equal(pool.used, used);
    assembly_drop(&pool, &b);
    holds(&pool, &a, letters + 9, a.len);
    assembly_drop(&pool, &a);
}

static int
free_receiver(void **state)
{
    (void)state;
    if (receiver.wslay != NULL)
        wslay_frame_context_free(receiver.wslay);
    return 0;
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_kind_of_frame_is_understood_in_every_split),
        cmocka_unit_test(control_frames_may_stand_between_fragments),
        cmocka_unit_test(lengths_around_the_forms_of_the_header_are_understood),
        cmocka_unit_test(a_message_of_many_fragments_is_one_message),
        cmocka_unit_test(a_control_frame_of_125_bytes_is_kept_whole),
        cmocka_unit_test(a_close_may_have_no_code_or_a_code_or_a_reason),
        cmocka_unit_test(each_broken_frame_is_refused_for_its_reason),
        cmocka_unit_test(a_message_of_exactly_the_most_is_not_too_big),
        cmocka_unit_test(text_fails_at_its_first_wrong_byte_inside_a_frame),
        cmocka_unit_test(binary_need_not_be_utf8),
        cmocka_unit_test(close_codes_are_those_of_the_rfc),
        cmocka_unit_test(one_receiver_too_many_is_none),
        cmocka_unit_test(
            a_receiver_serves_two_clients_in_turn_between_their_frames),
        cmocka_unit_test(a_receiver_that_comes_back_in_mid_frame_is_made_anew),
        cmocka_unit_test(without_memory_the_pool_is_smaller_by_one),
        cmocka_unit_test(a_header_says_its_length_in_the_shortest_form),
        cmocka_unit_test(pieces_around_every_chunk_border_come_out_whole),
        cmocka_unit_test(random_pieces_come_out_whole_until_memory_ends),
        cmocka_unit_test(two_messages_share_the_pool_and_nothing_else),
    };
    return cmocka_run_group_tests(tests, NULL, free_receiver);
}
