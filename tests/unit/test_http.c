/* Chapter HTTP: heads to verdicts, upgrades, names, queries, cookies, lists.
 * Every input ends where an unreadable page begins.
 *
 * SPDX-License-Identifier: MIT
 */
#include "test.h"

#define KEY "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
#define UPGRADE                                                              \
    "Host: box.lan\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"         \
    "Sec-WebSocket-Version: 13\r\n" KEY

/* Parses a whole request head (with its empty line), as the server does. */
static struct verdict
parse(const char *text, struct http *h)
{
    struct span in = test_span_at_edge(text, strlen(text)), head;
    const uint8_t *begin = in.at, *end = in.end;
    enum parse found = http_head(&in, &head);

    if (found == PARSE_BAD) {
        assert_ptr_equal(in.at, begin);
        return HTTP_BAD("a line ends in LF alone");
    }
    assert_int_equal(found, PARSE_OK);
    assert_ptr_equal(in.at, end);
    return http_parse(head, h);
}

static struct http
parsed(const char *text)
{
    struct http h;
    struct verdict v = parse(text, &h);

    if (v.status != 0)
        fail_msg("%d %s for\n%s", v.status, v.why, text);
    return h;
}

static const char *const good_heads[] = {
    "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "GET / HTTP/1.0\r\n\r\n",
    "\r\nHEAD /x?y=z HTTP/1.1\r\nhost:a:80\r\n\r\n",
    "OPTIONS * HTTP/1.1\r\nHost: [::1]:8080\r\n\r\n",
    "GET http://box.lan:8080/ws/a?b HTTP/1.1\r\nHost: other\r\n\r\n",
    "GET http://box.lan?b HTTP/1.1\r\nHost: other\r\n\r\n",
    "POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n"
    "Content-Length: 5\r\n\r\n",
    "PUT /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
    "GET / HTTP/1.9\r\nHost: a\r\nX: \t \r\nY:\r\nZ: a\tb\r\n\r\n",
    "GET /ws/notes HTTP/1.1\r\n" UPGRADE "\r\n",
    "GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 1.2.3.4, ::1\r\n"
    "Cookie: a=b; c=d\r\nAuthorization: Bearer abc\r\n\r\n",
};

#define GOOD_HEADS (sizeof good_heads / sizeof *good_heads)

/* ----- where a head ends ------------------------------------------------ */

static void
every_prefix_of_a_head_is_more_and_takes_nothing(void **state)
{
    (void)state;
    for (size_t i = 0; i < GOOD_HEADS; i++)
        for (size_t n = 0; n < strlen(good_heads[i]); n++) {
            struct span in = test_span_at_edge(good_heads[i], n), head;
            const uint8_t *at = in.at;
            assert_int_equal(http_head(&in, &head), PARSE_MORE);
            assert_ptr_equal(in.at, at);
        }
}

static void
what_stands_behind_a_head_is_left(void **state)
{
    char text[1024];

    (void)state;
    for (size_t i = 0; i < GOOD_HEADS; i++)
        for (size_t more = 0; more < 5; more++) {
            struct span in, head;
            int n = snprintf(text, sizeof text, "%s%.*s", good_heads[i],
                             (int)more, "\r\n\r\nG");
            in = test_span_at_edge(text, (size_t)n);
            assert_int_equal(http_head(&in, &head), PARSE_OK);
            assert_int_equal(span_len(in), more);
            assert_memory_equal(head.end - 2, "\r\n", 2);
            assert_memory_equal(in.at - 4, "\r\n\r\n", 4);
        }
}

static void
empty_lines_ahead_are_passed_over(void **state)
{
    struct http h;

    (void)state;
    assert_int_equal(parse("\r\nGET / HTTP/1.0\r\n\r\n", &h).status, 0);
    assert_int_equal(parse("\r\n\r\nGET / HTTP/1.0\r\n\r\n", &h).status, 0);
    assert_int_equal(parse("\r\n \r\n\r\n", &h).status, 400);
}

static void
a_line_that_ends_in_lf_alone_is_bad_at_once(void **state)
{
    static const char *const texts[] = { "\n", "\r\n\n", "GET / HTTP/1.1\n",
                                         "GET / HTTP/1.1\r\nHost: a\n",
                                         "GET / HTTP/1.1\r\n\n" };

    (void)state;
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        size_t len = strlen(texts[i]);
        for (size_t n = 0; n <= len; n++) {
            struct span in = test_span_at_edge(texts[i], n), head;
            assert_int_equal(http_head(&in, &head),
                             n < len ? PARSE_MORE : PARSE_BAD);
        }
    }
}

/* A head cut anywhere and judged nevertheless: there is always a reason. */
static void
a_head_that_was_cut_gets_a_clear_verdict(void **state)
{
    (void)state;
    for (size_t i = 0; i < GOOD_HEADS; i++) {
        const char *text = good_heads[i];
        text += text[0] == '\r' ? 2 : 0;
        for (size_t n = 0; n + 2 <= strlen(text); n++) {
            struct http h;
            struct verdict v = http_parse(test_span_at_edge(text, n), &h);
            assert_true(v.status == 0 || (v.status >= 400 && *v.why != '\0'));
            if (v.status == 0 && n > 0)
                assert_memory_equal(test_edge - 2, "\r\n", 2);
        }
    }
}

/* ----- verdicts --------------------------------------------------------- */

#define GET "GET / HTTP/1.1\r\nHost: a\r\n"

static const struct {
    int status;
    const char *text;
} heads[] = {
    /* the request line */
    { 400, " / HTTP/1.1\r\nHost: a\r\n\r\n" },
    { 400, "G(T / HTTP/1.1\r\nHost: a\r\n\r\n" },
    { 400, "GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n" },
    { 400, "GET / \r\nHost: a\r\n\r\n" },
    { 400, "GET /\r\nHost: a\r\n\r\n" },
    { 400, "GET\r\nHost: a\r\n\r\n" },
    { 400, "GET  / HTTP/1.1\r\nHost: a\r\n\r\n" },
    { 400, "GET /  HTTP/1.1\r\nHost: a\r\n\r\n" },
    { 400, "GET / HTTP/1.1 \r\nHost: a\r\n\r\n" },
    { 400, "GET / http/1.1\r\nHost: a\r\n\r\n" },
    { 400, "GET / HTTP/1.10\r\nHost: a\r\n\r\n" },
    { 400, "GET / HTTP/11\r\nHost: a\r\n\r\n" },
    { 400, "GET / HTTP/x.1\r\nHost: a\r\n\r\n" },
    { 400, "GET / HTTP/1.x\r\nHost: a\r\n\r\n" },
    { 400, "GET / HTTP\r\nHost: a\r\n\r\n" },
    { 505, "GET / HTTP/2.0\r\nHost: a\r\n\r\n" },
    { 505, "GET / HTTP/0.9\r\nHost: a\r\n\r\n" },
    { 0, "GET / HTTP/1.2\r\nHost: a\r\n\r\n" },
    { 501, "get / HTTP/1.1\r\nHost: a\r\n\r\n" },
    { 501, "BREW /pot HTTP/1.1\r\nHost: a\r\n\r\n" },
    { 501, "CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n" },
    { 400, "GET a HTTP/1.1\r\nHost: a\r\n\r\n" },
    { 400, "GET * HTTP/1.1\r\nHost: a\r\n\r\n" },
    { 400, "GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n" },
    { 400, "GET /\xc3\xa4 HTTP/1.1\r\nHost: a\r\n\r\n" },
    { 400, "GET /\x7f HTTP/1.1\r\nHost: a\r\n\r\n" },
    { 400, "GET /a\tb HTTP/1.1\r\nHost: a\r\n\r\n" },
    { 400, "GET /a\nb HTTP/1.1\r\nHost: a\r\n\r\n" },
    { 400, "GET /a%00b HTTP/1.1\r\nHost: a\r\n\r\n" },
    { 400, "GET /a?b%00 HTTP/1.1\r\nHost: a\r\n\r\n" },
    { 0, "GET /a%0 HTTP/1.1\r\nHost: a\r\n\r\n" },
    { 400, "GET http:/a HTTP/1.1\r\nHost: a\r\n\r\n" },
    { 400, "GET http: HTTP/1.1\r\nHost: a\r\n\r\n" },
    { 400, "GET https:// HTTP/1.1\r\nHost: a\r\n\r\n" },
    { 0, "GET HTTP://a HTTP/1.1\r\nHost: a\r\n\r\n" },
    { 400, "GET http:///x HTTP/1.1\r\nHost: a\r\n\r\n" },
    { 400, "GET http://?x HTTP/1.1\r\nHost: a\r\n\r\n" },
    { 400, "GET ftp://a/x HTTP/1.1\r\nHost: a\r\n\r\n" },
    { 400, "GET http://u@a/ HTTP/1.1\r\nHost: a\r\n\r\n" },
    /* Host */
    { 400, "GET / HTTP/1.1\r\n\r\n" },
    { 0, "GET / HTTP/1.0\r\n\r\n" },
    { 0, "GET http://a/ HTTP/1.1\r\n\r\n" },
    { 400, GET "Host: a\r\n\r\n" },
    { 400, GET "hOST: b\r\n\r\n" },
    { 0, "GET http://a/ HTTP/1.1\r\nHost: b\r\n\r\n" },
    { 400, "GET http://a/ HTTP/1.1\r\nHost: b\r\nHost: b\r\n\r\n" },
    { 400, "GET / HTTP/1.1\r\nHost:\r\n\r\n" },
    { 400, "GET / HTTP/1.1\r\nHost: a b\r\n\r\n" },
    { 400, "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n" },
    { 400, "GET / HTTP/1.1\r\nHost: a,b\r\n\r\n" },
    { 400, "GET / HTTP/1.1\r\nHost: u@a\r\n\r\n" },
    { 400, "GET / HTTP/1.1\r\nHost: a:b\r\n\r\n" },
    { 400, "GET / HTTP/1.1\r\nHost: ::1\r\n\r\n" },
    { 400, "GET / HTTP/1.1\r\nHost: [::1\r\n\r\n" },
    { 400, "GET / HTTP/1.1\r\nHost: []\r\n\r\n" },
    { 400, "GET / HTTP/1.1\r\nHost: [::1]x\r\n\r\n" },
    { 400, "GET / HTTP/1.1\r\nHost: [::g]\r\n\r\n" },
    { 400, "GET / HTTP/1.1\r\nHost: \xc3\xa4\r\n\r\n" },
    { 0, "GET / HTTP/1.1\r\nHost: a:\r\n\r\n" },
    { 0, "GET / HTTP/1.1\r\nHost: [::1]\r\n\r\n" },
    /* lines and fields */
    { 400, GET "no colon\r\n\r\n" },
    { 400, GET " folded: line\r\n\r\n" },
    { 400, GET "X: a\r\n folded\r\n\r\n" },
    { 400, GET "X : a\r\n\r\n" },
    { 400, GET ": a\r\n\r\n" },
    { 400, GET "X(: a\r\n\r\n" },
    { 400, GET "\xc3\xa4: a\r\n\r\n" },
    { 400, GET "X: a\rb\r\n\r\n" },
    { 400, GET "X: a\nb\r\n\r\n" },
    { 400, GET "X: a\n\r\n\r\n" },
    { 400, GET "X: \x01\r\n\r\n" },
    { 400, GET "X: \x7f\r\n\r\n" },
    { 0, GET "X: \xc3\xa4 \xff\r\n\r\n" },
    { 0, GET "!#$%&'*+-.^_`|~09azAZ: x\r\n\r\n" },
    /* bodies: what has been used to smuggle */
    { 400, GET "Content-Length: -1\r\n\r\n" },
    { 400, GET "Content-Length: +1\r\n\r\n" },
    { 400, GET "Content-Length:\r\n\r\n" },
    { 400, GET "Content-Length: 1, 1\r\n\r\n" },
    { 400, GET "Content-Length: 0x1\r\n\r\n" },
    { 400, GET "Content-Length: 99999999999999999999\r\n\r\n" },
    { 400, GET "Content-Length: 1\r\nContent-Length: 2\r\n\r\n" },
    { 0, GET "Content-Length: 2\r\nContent-Length: 2\r\n\r\n" },
    { 400, GET "Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n" },
    { 400, GET "Transfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n" },
    { 400, "GET / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n" },
    { 501, GET "Transfer-Encoding: gzip, chunked\r\n\r\n" },
    { 501, GET "Transfer-Encoding: identity\r\n\r\n" },
    { 501, GET "Transfer-Encoding: chunked\r\n"
               "Transfer-Encoding: chunked\r\n\r\n" },
    { 501, GET "Transfer-Encoding: xchunked\r\n\r\n" },
    { 0, GET "Transfer-Encoding: Chunked\r\n\r\n" },
    /* what may stand only once */
    { 400, GET KEY KEY "\r\n" },
    { 400, GET "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Version: 13\r\n"
               "\r\n" },
    { 400, GET "Origin: http://a\r\nOrigin: http://a\r\n\r\n" },
    { 0, GET "Range: bytes=0-1\r\nRange: bytes=2-3\r\n\r\n" },
};

static void
each_head_gets_its_status(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof heads / sizeof *heads; i++) {
        struct http h;
        struct verdict v = parse(heads[i].text, &h);
        if (v.status != heads[i].status)
            fail_msg("%d (%s), not %d, for\n%s", v.status, v.why,
                     heads[i].status, heads[i].text);
        assert_true(v.status == 0 || strlen(v.why) > 10);
    }
}

static void
every_method_is_told_from_every_other(void **state)
{
    char text[100];

    (void)state;
    for (int m = 0; m < HTTP_METHODS; m++) {
        struct http h;
        (void)snprintf(text, sizeof text, "%s / HTTP/1.1\r\nHost: a\r\n\r\n",
                       http_method_names[m]);
        if (m == HTTP_CONNECT)
            assert_int_equal(parse(text, &h).status, 501);
        else
            assert_int_equal(parsed(text).method, m);
    }
}

static void
a_target_may_be_as_long_as_the_limit_and_no_longer(void **state)
{
    static char text[COLLABD_TARGET_MAX + 100];

    (void)state;
    for (int more = 0; more < 2; more++) {
        size_t len = COLLABD_TARGET_MAX + (size_t)more;
        struct http h;
        memcpy(text, "GET /", 5);
        memset(text + 5, 'x', len - 1);
        strcpy(text + 4 + len, " HTTP/1.1\r\nHost: a\r\n\r\n");
        assert_int_equal(parse(text, &h).status, more ? 414 : 0);
    }
}

static void
a_control_byte_is_refused_wherever_it_stands(void **state)
{
    char text[sizeof GET + 20];

    (void)state;
    for (unsigned b = 0; b < 256; b++) {
        struct span in, head;
        struct http h;
        size_t n = sizeof GET - 1;
        bool bad = (b < ' ' && b != '\t') || b == 0x7f;
        memcpy(text, GET, n);
        memcpy(text + n, "X: a?b\r\n\r\n", 10);
        text[n + 4] = (char)b;
        in = test_span_at_edge(text, n + 10);
        if (http_head(&in, &head) == PARSE_BAD)
            assert_int_equal(b, '\n');
        else
            assert_int_equal(http_parse(head, &h).status, bad ? 400 : 0);
    }
}

/* ----- what is read out of a head --------------------------------------- */

static void
fields_are_found_in_any_case_and_trimmed(void **state)
{
    struct http h = parsed(
        "GET /p%20q?a=1&b HTTP/1.1\r\nhOsT: \tBox.LAN:81 \t\r\n"
        "orIGIN: http://x\r\nCOOKIE: k=v\r\nrange: bytes=0-\r\n"
        "if-range: \"t\"\r\nIF-NONE-MATCH: *\r\naccept-encoding: gzip\r\n"
        "sec-websocket-protocol: a, b\r\nauthorization: bEARER  to.ken \r\n"
        "\r\n");

    (void)state;
    assert_span_is(h.path, "/p%20q");
    assert_span_is(h.query, "a=1&b");
    assert_span_is(h.host, "Box.LAN:81");
    assert_span_is(h.origin, "http://x");
    assert_span_is(h.cookies, "k=v");
    assert_span_is(h.range, "bytes=0-");
    assert_span_is(h.if_range, "\"t\"");
    assert_span_is(h.if_none_match, "*");
    assert_span_is(h.accept_encoding, "gzip");
    assert_span_is(h.protocols, "a, b");
    assert_span_is(h.bearer, "to.ken");
}

static void
the_absolute_form_overrules_host(void **state)
{
    struct http h = parsed("GET http://Real:81?q HTTP/1.1\r\nHost: a\r\n\r\n");

    (void)state;
    assert_span_is(h.host, "Real:81");
    assert_span_is(h.path, "/");
    assert_span_is(h.query, "q");
    h = parsed("GET https://b/p/q HTTP/1.1\r\n\r\n");
    assert_span_is(h.host, "b");
    assert_span_is(h.path, "/p/q");
    assert_true(span_is_empty(h.query));
}

static void
a_path_ends_at_the_first_question_mark(void **state)
{
    struct http h = parsed("GET /a?b?c HTTP/1.1\r\nHost: a\r\n\r\n");

    (void)state;
    assert_span_is(h.path, "/a");
    assert_span_is(h.query, "b?c");
}

static void
only_bearer_tokens_are_taken(void **state)
{
    (void)state;
    assert_true(span_is_empty(
        parsed(GET "Authorization: Basic abc\r\n\r\n").bearer));
    assert_true(span_is_empty(
        parsed(GET "Authorization: Bearer\r\n\r\n").bearer));
    assert_true(span_is_empty(
        parsed(GET "Authorization: Bearer \r\n\r\n").bearer));
    assert_span_is(parsed(GET "Authorization: BEARER x\r\n\r\n").bearer, "x");
}

static void
two_ranges_are_none(void **state)
{
    (void)state;
    assert_true(span_is_empty(
        parsed(GET "Range: bytes=0-1\r\nRange: bytes=2-3\r\n\r\n").range));
}

static void
the_last_forwarded_lines_are_kept(void **state)
{
    char text[2000] = GET;
    struct http h;

    (void)state;
    for (int i = 0; i < HTTP_FORWARDED + 3; i++)
        (void)sprintf(text + strlen(text), "X-Forwarded-For: h%d\r\n", i);
    strcat(text, "\r\n");
    h = parsed(text);
    assert_int_equal(h.forwarded_count, HTTP_FORWARDED);
    assert_span_is(h.forwarded[0], "h3");
    assert_span_is(h.forwarded[HTTP_FORWARDED - 1], "h10");
}

static void
connections_persist_as_rfc_9112_says(void **state)
{
    static const struct {
        bool persists;
        const char *text;
    } cases[] = {
        { true, GET "\r\n" },
        { false, GET "Connection: close\r\n\r\n" },
        { false, GET "Connection: Keep-Alive, CLOSE\r\n\r\n" },
        { false, GET "Connection: upgrade\r\nConnection: close\r\n\r\n" },
        { true, GET "Connection: closed\r\n\r\n" },
        { false, "GET / HTTP/1.0\r\n\r\n" },
        { true, "GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" },
        { false, "GET / HTTP/1.0\r\nConnection: keep-alive, close\r\n\r\n" },
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct http h = parsed(cases[i].text);
        assert_int_equal(http_persists(&h), cases[i].persists);
    }
}

static void
a_body_is_a_length_above_zero_or_chunks(void **state)
{
    struct http h = parsed(GET "Content-Length: 0\r\n\r\n");

    (void)state;
    assert_false(http_has_body(&h));
    h = parsed(GET "Content-Length: 1\r\n\r\n");
    assert_true(http_has_body(&h));
    assert_true(h.body == 1);
    h = parsed(GET "Transfer-Encoding: chunked\r\n\r\n");
    assert_true(http_has_body(&h));
    h = parsed(GET "\r\n");
    assert_false(http_has_body(&h));
}

/* ----- upgrades --------------------------------------------------------- */

static void
an_upgrade_names_websocket_and_upgrade_among_its_tokens(void **state)
{
    static const struct {
        bool is;
        const char *fields;
    } cases[] = {
        { true, "Upgrade: websocket\r\nConnection: Upgrade\r\n" },
        { true, "Upgrade: h2c, WebSocket\r\n"
                "Connection: keep-alive,UPGRADE\r\n" },
        { true, "Upgrade: h2c\r\nUpgrade: websocket\r\n"
                "Connection: keep-alive\r\nConnection: , upgrade ,\r\n" },
        { false, "Upgrade: websocket\r\n" },
        { false, "Connection: upgrade\r\n" },
        { false, "Upgrade: websockets\r\nConnection: Upgrade\r\n" },
        { false, "Upgrade: websocket\r\nConnection: Upgraded\r\n" },
        { false, "Upgrade: web socket\r\nConnection: Upgrade\r\n" },
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char text[300];
        struct http h;
        (void)snprintf(text, sizeof text, GET "%s\r\n", cases[i].fields);
        h = parsed(text);
        if (http_is_upgrade(&h) != cases[i].is)
            fail_msg("%s", cases[i].fields);
    }
}

static void
each_upgrade_gets_its_status(void **state)
{
#define ASK GET "Upgrade: websocket\r\nConnection: Upgrade\r\n"
#define V13 "Sec-WebSocket-Version: 13\r\n"
    static const struct {
        int status;
        const char *text;
    } cases[] = {
        { 0, ASK V13 KEY "\r\n" },
        { 426, ASK "Sec-WebSocket-Version: 013\r\n" KEY "\r\n" },
        { 0, ASK V13 KEY "Sec-WebSocket-Extensions: permessage-deflate\r\n"
                         "\r\n" },
        { 426, ASK KEY "\r\n" },
        { 426, ASK KEY "Sec-WebSocket-Version: 12\r\n\r\n" },
        { 426, ASK KEY "Sec-WebSocket-Version: 14\r\n\r\n" },
        { 426, ASK KEY "Sec-WebSocket-Version: 8, 13\r\n\r\n" },
        { 426, ASK KEY "Sec-WebSocket-Version: x\r\n\r\n" },
        { 426, ASK KEY "Sec-WebSocket-Version: 269\r\n\r\n" },
        { 426, ASK KEY "Sec-WebSocket-Version:\r\n\r\n" },
        { 400, ASK V13 "\r\n" },
        { 400, ASK V13 "Sec-WebSocket-Key:\r\n\r\n" },
        { 400, ASK V13 "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=\r\n\r\n" },
        { 400, ASK V13 "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZR==\r\n\r\n" },
        { 400, ASK V13 "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==,\r\n\r\n" },
        { 400, "GET / HTTP/1.0\r\n" UPGRADE "\r\n" },
        { 405, "POST / HTTP/1.1\r\n" UPGRADE "\r\n" },
        { 405, "HEAD / HTTP/1.1\r\n" UPGRADE "\r\n" },
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct http h = parsed(cases[i].text);
        struct verdict v;
        assert_true(http_is_upgrade(&h));
        v = http_judge_upgrade(&h);
        if (v.status != cases[i].status)
            fail_msg("%d (%s) for\n%s", v.status, v.why, cases[i].text);
    }
}

static void
the_accept_value_is_that_of_the_rfc(void **state)
{
    uint8_t buf[28];
    struct out o = out_over(buf, sizeof buf);

    (void)state;
    http_accept(span_text("dGhlIHNhbXBsZSBub25jZQ=="), &o);
    assert_false(o.full);
    assert_span_is(((struct span){ buf, o.at }),
                   "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
}

/* ----- small parts ------------------------------------------------------ */

static void
a_list_has_no_empty_elements(void **state)
{
    struct span list = span_text(" , a,,\tb c ,"), one;

    (void)state;
    assert_true(http_list_next(&list, &one));
    assert_span_is(one, "a");
    assert_true(http_list_next(&list, &one));
    assert_span_is(one, "b c");
    assert_false(http_list_next(&list, &one));
    assert_true(http_list_has(span_text("x, Y"), "y"));
    assert_false(http_list_has(span_text("x, Y"), ""));
    assert_false(http_list_has(span_text(""), "y"));
}

static void
gzip_is_accepted_if_said_or_starred_and_not_refused(void **state)
{
    static const struct {
        bool yes;
        const char *list;
    } cases[] = {
        { false, "" },
        { true, "gzip" },
        { true, "GZip" },
        { true, "br, gzip;q=0.5" },
        { true, "gzip ; q=0.001" },
        { true, "gzip;q=1" },
        { true, "*" },
        { true, "identity, *;q=0.1" },
        { false, "gzip;q=0" },
        { false, "gzip;q=0.000" },
        { false, "gzip;q=0, *" },
        { true, "gzip, *;q=0" },
        { false, "*;q=0" },
        { false, "br" },
        { false, "gzipped" },
        { false, "gzip;Q=0" }, /* RFC 9110 2.1: "q=" in any case */
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        if (http_accepts_gzip(test_span_at_edge(
                cases[i].list, strlen(cases[i].list))) != cases[i].yes)
            fail_msg("\"%s\"", cases[i].list);
}

static void
a_query_gives_the_first_value_of_a_name(void **state)
{
    struct span v = span_text("old");

    (void)state;
    assert_true(http_query(span_text("a=1&echo=1&echo=2"), "echo", &v));
    assert_span_is(v, "1");
    assert_true(http_query(span_text("echo"), "echo", &v));
    assert_span_is(v, "");
    assert_true(http_query(span_text("&&x=a=b"), "x", &v));
    assert_span_is(v, "a=b");
    assert_false(http_query(span_text("xecho=1&echox=1"), "echo", &v));
    assert_false(http_query(span_text(""), "echo", &v));
}

static void
a_cookie_is_found_among_others(void **state)
{
    struct span v;

    (void)state;
    assert_true(http_cookie(span_text("a=b;  t=x=y ;c=d"), "t", &v));
    assert_span_is(v, "x=y");
    assert_true(http_cookie(span_text("t="), "t", &v));
    assert_span_is(v, "");
    assert_false(http_cookie(span_text("T=1; xt=2; tx=3"), "t", &v));
    assert_false(http_cookie(span_text(""), "t", &v));
}

static void
decoding_needs_two_hex_digits_and_room(void **state)
{
    static const char *const bad[] = { "%", "%4", "%4g", "%g4", "a%", "%%41" };
    uint8_t buf[4];
    struct out o = out_over(buf, 4);

    (void)state;
    assert_true(http_decode(test_span_at_edge("%41b%2F%00", 10), &o));
    assert_memory_equal(buf, "Ab/", 4);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        o = out_over(buf, 4);
        assert_false(
            http_decode(test_span_at_edge(bad[i], strlen(bad[i])), &o));
    }
    o = out_over(buf, 4);
    assert_false(http_decode(span_text("abcde"), &o));
    assert_true(o.full);
}

/* ----- names of rooms --------------------------------------------------- */

static void
each_name_is_decoded_or_refused(void **state)
{
    static const struct {
        const char *path, *name; /* NULL: refused */
    } cases[] = {
        { "notes", "notes" },
        { "a/b/c", "a/b/c" },
        { "a%20b", "a b" },
        { "%c3%a4", "\xc3\xa4" },
        { "a%2Fb", "a/b" },
        { "...", "..." },
        { ".a/..b", ".a/..b" },
        { "a+b&c=d", "a+b&c=d" },
        { "", NULL },
        { "/", NULL },
        { "a/", NULL },
        { "/a", NULL },
        { "a//b", NULL },
        { ".", NULL },
        { "..", NULL },
        { "a/..", NULL },
        { "a/../b", NULL },
        { "a/./b", NULL },
        { "%2e%2e", NULL },
        { "a%2f..%2fb", NULL },
        { "a%2f", NULL },
        { "a%00b", NULL },
        { "a%0ab", NULL },
        { "a%7f", NULL },
        { "%c2%80", NULL },
        { "%c2%9f", NULL },
        { "%c2%a0", "\xc2\xa0" },
        { "%", NULL },
        { "%zz", NULL },
        { "%c3", NULL },
        { "%ed%a0%80", NULL },
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint8_t name[COLLABD_NAME_MAX], len = 0;
        struct verdict v = http_room_name(
            test_span_at_edge(cases[i].path, strlen(cases[i].path)), name,
            &len);
        if (v.status != (cases[i].name == NULL ? 400 : 0))
            fail_msg("\"%s\": %d %s", cases[i].path, v.status, v.why);
        if (cases[i].name != NULL)
            assert_span_is(span_of(name, len), cases[i].name);
    }
}

static void
a_name_may_have_128_bytes_and_no_more(void **state)
{
    char path[3 * (COLLABD_NAME_MAX + 1)];
    uint8_t name[COLLABD_NAME_MAX], len;
    struct span long_path;

    (void)state;
    memset(path, 'x', sizeof path);
    assert_int_equal(
        http_room_name(test_span_at_edge(path, COLLABD_NAME_MAX), name, &len)
            .status,
        0);
    assert_int_equal(len, COLLABD_NAME_MAX);
    long_path = test_span_at_edge(path, COLLABD_NAME_MAX + 1);
    assert_int_equal(http_room_name(long_path, name, &len).status, 400);
    for (size_t i = 0; i < sizeof path; i += 3)
        memcpy(path + i, "%41", 3);
    long_path = test_span_at_edge(path, 3 * COLLABD_NAME_MAX);
    assert_int_equal(http_room_name(long_path, name, &len).status, 0);
    long_path = test_span_at_edge(path, sizeof path);
    assert_int_equal(http_room_name(long_path, name, &len).status, 400);
}

static void
every_prefix_of_a_name_is_judged_without_reading_on(void **state)
{
    const char *path = "caf%C3%A9/%F0%9F%98%80/a%2Fb/.x";

    (void)state;
    for (size_t n = 0; n <= strlen(path); n++) {
        uint8_t name[COLLABD_NAME_MAX], len = 0;
        struct verdict v =
            http_room_name(test_span_at_edge(path, n), name, &len);
        assert_true(v.status == 0 || v.status == 400);
    }
}

static void
every_status_we_send_has_its_phrase(void **state)
{
    static const int used[] = { 101, 200, 204, 206, 301, 303, 304, 400, 401,
                                403, 404, 405, 408, 413, 414, 416, 421, 426,
                                429, 431, 501, 503, 505 };

    (void)state;
    for (size_t i = 0; i < sizeof used / sizeof *used; i++)
        assert_string_not_equal(http_reason(used[i]), "Internal Server Error");
    assert_string_equal(http_reason(500), "Internal Server Error");
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_prefix_of_a_head_is_more_and_takes_nothing),
        cmocka_unit_test(what_stands_behind_a_head_is_left),
        cmocka_unit_test(empty_lines_ahead_are_passed_over),
        cmocka_unit_test(a_line_that_ends_in_lf_alone_is_bad_at_once),
        cmocka_unit_test(a_head_that_was_cut_gets_a_clear_verdict),
        cmocka_unit_test(each_head_gets_its_status),
        cmocka_unit_test(every_method_is_told_from_every_other),
        cmocka_unit_test(a_target_may_be_as_long_as_the_limit_and_no_longer),
        cmocka_unit_test(a_control_byte_is_refused_wherever_it_stands),
        cmocka_unit_test(fields_are_found_in_any_case_and_trimmed),
        cmocka_unit_test(the_absolute_form_overrules_host),
        cmocka_unit_test(a_path_ends_at_the_first_question_mark),
        cmocka_unit_test(only_bearer_tokens_are_taken),
        cmocka_unit_test(two_ranges_are_none),
        cmocka_unit_test(the_last_forwarded_lines_are_kept),
        cmocka_unit_test(connections_persist_as_rfc_9112_says),
        cmocka_unit_test(a_body_is_a_length_above_zero_or_chunks),
        cmocka_unit_test(
            an_upgrade_names_websocket_and_upgrade_among_its_tokens),
        cmocka_unit_test(each_upgrade_gets_its_status),
        cmocka_unit_test(the_accept_value_is_that_of_the_rfc),
        cmocka_unit_test(a_list_has_no_empty_elements),
        cmocka_unit_test(gzip_is_accepted_if_said_or_starred_and_not_refused),
        cmocka_unit_test(a_query_gives_the_first_value_of_a_name),
        cmocka_unit_test(a_cookie_is_found_among_others),
        cmocka_unit_test(decoding_needs_two_hex_digits_and_room),
        cmocka_unit_test(each_name_is_decoded_or_refused),
        cmocka_unit_test(a_name_may_have_128_bytes_and_no_more),
        cmocka_unit_test(every_prefix_of_a_name_is_judged_without_reading_on),
        cmocka_unit_test(every_status_we_send_has_its_phrase),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
