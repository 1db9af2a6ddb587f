/* Chapter Access: token files and rights, addresses, proxies, host names and
 * origins.
 *
 * SPDX-License-Identifier: MIT
 */
#include "test.h"

static struct cfg c;
static struct tokens tokens;

static int
begin(void **state)
{
    (void)state;
    cfg_defaults(&c);
    memset(&tokens, 0, sizeof tokens);
    tokens.on = true;
    (void)test_said("");
    return 0;
}

static void
set(const char *name, const char *value)
{
    assert_true(
        cfg_set(&c, cfg_find(span_text(name)), span_text(value), "test"));
}

/* ----- tokens ----------------------------------------------------------- */

#define HASH_ONE                                                             \
    "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
#define HASH_TWO                                                             \
    "3FC4CCFE745870E2C0D99F71F30FF0656C8DEDD41CC1D7D3D376B0DBE685E2F3"
#define NAME_100                                                             \
    "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"                     \
    "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"

static const char *
token_line(const char *text)
{
    return access_token_line(&tokens, test_span_at_edge(text, strlen(text)));
}

static enum access_right
right(const char *token, const char *thing, bool *known)
{
    uint8_t id[16];

    access_token_id(span_text(token), id);
    return access_judge(&tokens, id, span_text(thing), known);
}

static void
each_token_line_is_taken_or_its_fault_is_named(void **state)
{
    static const struct {
        const char *line, *wrong; /* NULL: it is good */
        unsigned count;
    } cases[] = {
        { "", NULL, 0 },
        { "  \t ", NULL, 0 },
        { "# a comment", NULL, 0 },
        { "   #" HASH_ONE " read *", NULL, 0 },
        { HASH_ONE " read *", NULL, 1 },
        { HASH_TWO " write ws/*", NULL, 1 },
        { "\t" HASH_ONE "\t\tadmin \t doc/a/*  ", NULL, 1 },
        { HASH_ONE " read ws/", NULL, 1 },
        { HASH_ONE " read ws/" NAME_100 "01234567890123456789012345678", NULL,
          1 },
        { HASH_ONE " read ws/" NAME_100 "012345678901234567890123456789",
          "the pattern is longer", 0 },
        { "rubbish", "the first word is not the 64 hex digits", 0 },
        { HASH_ONE "0 read *", "the first word", 0 },
        { "g" HASH_ONE, "the first word", 0 },
        { "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431eg "
          "read *", "the first word", 0 },
        { HASH_ONE, "the second word is not read, write or admin", 0 },
        { HASH_ONE " none *", "the second word", 0 },
        { HASH_ONE " Read *", "the second word", 0 },
        { HASH_ONE " reads *", "the second word", 0 },
        { HASH_ONE " read", "the third word is not ws/GLOB", 0 },
        { HASH_ONE " read notes", "the third word", 0 },
        { HASH_ONE " read **", "the third word", 0 },
        { HASH_ONE " read /ws/*", "the third word", 0 },
        { HASH_ONE " read * *", "there is a fourth word", 0 },
        { HASH_ONE " read * # me", "there is a fourth word", 0 },
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *wrong;
        tokens.count = 0;
        wrong = token_line(cases[i].line);
        if ((wrong == NULL) != (cases[i].wrong == NULL) ||
            (wrong != NULL && strncmp(wrong, cases[i].wrong,
                                      strlen(cases[i].wrong)) != 0))
            fail_msg("\"%s\": %s", cases[i].line, wrong);
        assert_int_equal(tokens.count, cases[i].count);
    }
}

static void
a_zero_byte_in_a_line_is_wrong(void **state)
{
    static const char text[] = HASH_ONE " read *\0evil";

    (void)state;
    assert_non_null(
        access_token_line(&tokens, span_of(text, sizeof text - 1)));
    assert_int_equal(tokens.count, 0);
}

static void
every_prefix_of_a_line_is_judged_without_reading_on(void **state)
{
    static const char text[] = HASH_ONE " write ws/notes";

    (void)state;
    for (size_t n = 0; n < sizeof text; n++) {
        const char *wrong;
        tokens.count = 0;
        wrong = access_token_line(&tokens, test_span_at_edge(text, n));
        assert_int_equal(wrong == NULL, n == 0 || n >= sizeof HASH_ONE + 9);
    }
}

static void
one_line_more_than_the_table_holds_is_wrong(void **state)
{
    (void)state;
    for (unsigned i = 0; i < COLLABD_TOKENS; i++)
        assert_null(token_line(HASH_ONE " read *"));
    assert_string_equal(token_line(HASH_ONE " read *"),
                        "more lines than COLLABD_TOKENS (collabd.h)");
    assert_null(token_line("# but comments may follow"));
    assert_int_equal(tokens.count, COLLABD_TOKENS);
}

static void
the_greatest_right_of_all_lines_wins(void **state)
{
    bool known;

    (void)state;
    assert_null(token_line(HASH_ONE " read ws/*"));
    assert_null(token_line(HASH_ONE " admin ws/mine"));
    assert_null(token_line(HASH_ONE " write ws/m*"));
    assert_null(token_line(HASH_TWO " write *"));
    assert_int_equal(right("one", "ws/mine", &known), RIGHT_ADMIN);
    assert_int_equal(right("one", "ws/many", &known), RIGHT_WRITE);
    assert_int_equal(right("one", "ws/other", &known), RIGHT_READ);
    assert_true(known);
    assert_int_equal(right("one", "doc/mine", &known), RIGHT_NONE);
    assert_true(known);
    assert_int_equal(right("two", "doc/a/b", &known), RIGHT_WRITE);
    assert_int_equal(right("two", "*", &known), RIGHT_WRITE);
    assert_int_equal(right("three", "ws/mine", &known), RIGHT_NONE);
    assert_false(known);
    assert_int_equal(right("", "ws/mine", &known), RIGHT_NONE);
    assert_false(known);
}

static void
who_gives_no_token_is_nobody_even_if_a_hash_is_zero(void **state)
{
    static const uint8_t none[16];
    bool known = true;

    (void)state;
    assert_null(token_line("00000000000000000000000000000000"
                           "00000000000000000000000000000000 admin *"));
    assert_int_equal(access_judge(&tokens, none, span_text("*"), &known),
                     RIGHT_NONE);
    assert_false(known);
}

static void
without_a_table_everyone_may_write(void **state)
{
    static const uint8_t none[16];
    bool known;

    (void)state;
    assert_int_equal(access_judge(NULL, none, span_text("ws/a"), &known),
                     RIGHT_WRITE);
    assert_true(known);
    tokens.on = false;
    assert_int_equal(access_judge(&tokens, none, span_text("ws/a"), &known),
                     RIGHT_WRITE);
}

static void
an_empty_table_lets_nobody_in(void **state)
{
    bool known;

    (void)state;
    assert_int_equal(right("one", "ws/a", &known), RIGHT_NONE);
    assert_false(known);
}

static void
a_token_file_is_read_whole_and_every_fault_is_said(void **state)
{
    char folder[] = "/tmp/collabd-test-XXXXXX", path[64];
    static char log[2000];
    struct sys_file file;
    FILE *f;
    bool known;

    (void)state;
    assert_non_null(mkdtemp(folder));
    (void)snprintf(path, sizeof path, "%s/tokens", folder);
    file = sys_file_at(path);
    f = fopen(path, "w");
    (void)fputs("# mine\r\n" HASH_ONE " read ws/*\r\n\r\n" HASH_TWO " admin *",
                f);
    (void)fclose(f);
    memset(&tokens, 0xff, sizeof tokens);
    assert_true(access_load(&tokens, file, path));
    assert_true(tokens.on && tokens.count == 2);
    assert_int_equal(right("two", "ws/x", &known), RIGHT_ADMIN);

    f = fopen(path, "w");
    (void)fputs("one\n" HASH_ONE " read ws/*\n" HASH_ONE " rule ws/*\n", f);
    (void)fclose(f);
    assert_false(access_load(&tokens, file, path));
    assert_true(pread(test_heard, log, sizeof log - 1, 0) > 0);
    assert_non_null(strstr(log, "tokens:1: the first word"));
    assert_non_null(strstr(log, "tokens:3: the second word"));
    assert_null(strstr(log, "tokens:2:"));
    assert_null(strstr(log, "7692c3")); /* hashes are nobody's business */

    f = fopen(path, "w");
    for (int i = 0; i <= ACCESS_TOKEN_FILE_MAX; i++)
        (void)fputc('#', f);
    (void)fclose(f);
    assert_false(access_load(&tokens, file, path));
    assert_true(test_said("File too large"));
    assert_int_equal(unlink(path), 0);
    assert_false(access_load(&tokens, file, path));
    assert_true(test_said("No such file"));
    (void)close(file.folder);
    assert_int_equal(rmdir(folder), 0);
}

static void
equality_takes_all_bytes(void **state)
{
    uint8_t a[16], b[16];

    (void)state;
    for (size_t i = 0; i < 16; i++) {
        memset(a, 7, 16);
        memset(b, 7, 16);
        assert_true(access_same(a, b, 16));
        b[i] ^= 0x80;
        assert_false(access_same(a, b, 16));
        assert_true(access_same(a, b, i));
    }
}

/* ----- addresses -------------------------------------------------------- */

static void
address(const char *text, uint8_t a[16])
{
    if (!span_parse_address(test_span_at_edge(text, strlen(text)), a))
        fail_msg("%s is no address", text);
}

static void
addresses_are_parsed_and_said(void **state)
{
    static const char *const good[] = { "1.2.3.4", "::1", "fe80::1",
                                        "2001:db8::ff" };
    static const char *const bad[] = {
        "", "1.2.3", "1.2.3.4.5", "1.2.3.256", "a", "::g", "[::1]", "1.2.3.4:5",
        " 1.2.3.4", "fe80::1%eth0",
        "1111:1111:1111:1111:1111:1111:1111:1111:1111:1111:1111:1111"
    };
    uint8_t a[16] = { 0 };
    char text[INET6_ADDRSTRLEN];

    (void)state;
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        address(good[i], a);
        access_address_text(a, text);
        assert_string_equal(text, good[i]);
    }
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_false(
            span_parse_address(test_span_at_edge(bad[i], strlen(bad[i])), a));
    address("::ffff:9.8.7.6", a);
    access_address_text(a, text);
    assert_string_equal(text, "9.8.7.6");
    memset(a, 0, sizeof a);
    access_address_text(a, text);
    assert_string_equal(text, "unix");
}

static void
private_addresses_are_those_of_a_lan(void **state)
{
    static const struct {
        const char *text;
        bool private, loopback;
    } cases[] = {
        { "127.0.0.1", true, true },     { "127.255.255.255", true, true },
        { "128.0.0.1", false, false },   { "::1", true, true },
        { "::2", false, false },         { "9.255.255.255", false, false },
        { "10.0.0.0", true, false },     { "10.255.255.255", true, false },
        { "11.0.0.0", false, false },    { "172.15.255.255", false, false },
        { "172.16.0.0", true, false },   { "172.31.255.255", true, false },
        { "172.32.0.0", false, false },  { "192.168.0.0", true, false },
        { "192.169.0.0", false, false }, { "192.167.255.255", false, false },
        { "169.254.1.1", true, false },  { "169.255.0.0", false, false },
        { "100.63.255.255", false, false }, { "100.64.0.0", true, false },
        { "100.127.255.255", true, false }, { "100.128.0.0", false, false },
        { "fc00::", true, false },       { "fdff::1", true, false },
        { "fe00::1", false, false },     { "fe80::1", true, false },
        { "febf::1", true, false },      { "fec0::1", false, false },
        { "2001:db8::1", false, false }, { "8.8.8.8", false, false },
        { "::ffff:10.0.0.1", true, false },
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint8_t a[16];
        address(cases[i].text, a);
        if (access_is_private(a) != cases[i].private ||
            access_is_loopback(a) != cases[i].loopback)
            fail_msg("%s", cases[i].text);
    }
}

static void
a_site_is_an_ipv4_address_or_an_ipv6_64(void **state)
{
    static const struct {
        const char *a, *b;
        bool same;
    } cases[] = {
        { "1.2.3.4", "1.2.3.4", true },
        { "1.2.3.4", "1.2.3.5", false },
        { "2001:db8:1:2::1", "2001:db8:1:2:ffff::", true },
        { "2001:db8:1:2::1", "2001:db8:1:3::1", false },
        { "::1", "1.2.3.4", false },
        { "1.2.3.4", "::1", false },
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint8_t a[16], b[16];
        address(cases[i].a, a);
        address(cases[i].b, b);
        if (access_same_site(a, b) != cases[i].same)
            fail_msg("%s and %s", cases[i].a, cases[i].b);
    }
}

/* ----- proxies ---------------------------------------------------------- */

static void
only_named_proxies_are_trusted(void **state)
{
    uint8_t a[16], b[16], unix_peer[16] = { 0 };

    (void)state;
    address("10.0.0.1", a);
    address("::1", b);
    assert_false(access_is_trusted(&c, a, false));
    assert_false(access_is_trusted(&c, unix_peer, true));
    set("trust-proxy", "10.0.0.1, unix");
    assert_true(access_is_trusted(&c, a, false));
    assert_true(access_is_trusted(&c, unix_peer, true));
    assert_false(access_is_trusted(&c, unix_peer, false));
    assert_false(access_is_trusted(&c, b, false));
    set("trust-proxy", "::1");
    assert_true(access_is_trusted(&c, b, false));
}

static void
the_rightmost_untrusted_hop_is_the_peer(void **state)
{
    static const struct {
        const char *lines[3];
        const char *peer; /* NULL: as it was */
    } cases[] = {
        { { NULL }, NULL },
        { { "" }, NULL },
        { { "5.5.5.5" }, "5.5.5.5" },
        { { "1.1.1.1, 5.5.5.5" }, "5.5.5.5" },
        { { "1.1.1.1,5.5.5.5,10.0.0.1" }, "5.5.5.5" },
        { { "5.5.5.5, 10.0.0.1, 10.0.0.2" }, "5.5.5.5" },
        { { "10.0.0.1" }, NULL },
        { { "1.1.1.1", "5.5.5.5", "10.0.0.2" }, "5.5.5.5" },
        { { "5.5.5.5, ,", ",", "" }, "5.5.5.5" },
        { { "5.5.5.5:1234" }, "5.5.5.5" },
        { { "[2001:db8::5]:1234" }, "2001:db8::5" },
        { { "[2001:db8::5]" }, "2001:db8::5" },
        { { "2001:db8::5" }, "2001:db8::5" },
        { { "1.1.1.1, unknown" }, NULL },
        { { "1.1.1.1, _hidden, 10.0.0.1" }, NULL },
        { { "1.1.1.1, 5.5.5.5 5.5.5.6" }, NULL },
    };

    (void)state;
    set("trust-proxy", "10.0.0.1");
    set("trust-proxy", "10.0.0.2");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct http h = { .method = HTTP_GET };
        uint8_t peer[16], want[16];
        address("10.0.0.1", peer);
        address(cases[i].peer == NULL ? "10.0.0.1" : cases[i].peer, want);
        for (; h.forwarded_count < 3 &&
               cases[i].lines[h.forwarded_count] != NULL; h.forwarded_count++)
            h.forwarded[h.forwarded_count] =
                span_text(cases[i].lines[h.forwarded_count]);
        if (access_forwarded(&c, &h, peer) != (cases[i].peer != NULL) ||
            memcmp(peer, want, 16) != 0)
            fail_msg("case %zu, %s", i, cases[i].lines[0]);
    }
}

/* ----- Host and Origin -------------------------------------------------- */

static void
a_host_is_cut_into_name_and_port(void **state)
{
    static const struct {
        const char *host, *name; /* NULL: it is none */
    } cases[] = {
        { "box", "box" }, { "box:80", "box" }, { "box:", "box" },
        { "1.2.3.4:80", "1.2.3.4" }, { "[::1]", "::1" }, { "[::1]:80", "::1" },
        { "[::ffff:1.2.3.4]", "::ffff:1.2.3.4" },
        { "a_b~!$&'()*+;=", "a_b~!$&'()*+;=" },
        { "", NULL }, { ":80", NULL }, { "box:8o", NULL },
        { "box:80:80", NULL },
        { "[::1", NULL }, { "[::1]80", NULL }, { "[::1]:x", NULL },
        { "[]", NULL },
        { "::1", NULL }, { "a b", NULL }, { "a/b", NULL }, { "a@b", NULL },
        { "a#b", NULL }, { "a?b", NULL }, { "a\\b", NULL }, { "a<b", NULL },
        { "a%b", NULL }, { "a\"b", NULL }, { "\xc3\xa4", NULL },
        { "a\x01", NULL },
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct span name;
        bool good = span_cut_host(
            test_span_at_edge(cases[i].host, strlen(cases[i].host)), &name);
        if (good != (cases[i].name != NULL))
            fail_msg("%s", cases[i].host);
        if (good)
            assert_span_is(name, cases[i].name);
    }
}

static void
a_host_name_has_255_bytes_at_most(void **state)
{
    char text[257];
    struct span name;

    (void)state;
    memset(text, 'x', sizeof text);
    assert_true(span_cut_host(span_of(text, 255), &name));
    assert_false(span_cut_host(span_of(text, 256), &name));
}

static void
our_hosts_are_those_a_stranger_cannot_own(void **state)
{
    static const struct {
        const char *host;
        bool ours;
    } cases[] = {
        { "localhost", true }, { "localhost:8080", true }, { "box", true },
        { "BOX:1", true }, { "127.0.0.1", true }, { "8.8.8.8", true },
        { "[::1]:80", true }, { "[2001:db8::1]", true },
        { "x.local", true }, { "x.y.LAN", true }, { "x.home.arpa", true },
        { "x.internal", true }, { "a.localhost", true }, { "x.lan.", true },
        { "my.host.example", true }, { "MY.HOST.EXAMPLE:80", true },
        { "listed.example", true }, { "Listed.Example", true },
        { "evil.example", false }, { "x.lan.evil.example", false },
        { "xlan.example", false }, { "notlocal.com", false },
        { "1.2.3.4.evil.example", false }, { "sub.listed.example", false },
        { "1.2.3.4.5", false }, { "evil.example.", false }, { "", false },
        { "a/b", false },
    };

    (void)state;
    set("host", "listed.example");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        if (access_host_is_ours(&c, "my.host.example",
                                test_span_at_edge(cases[i].host,
                                                  strlen(cases[i].host))) !=
            cases[i].ours)
            fail_msg("%s", cases[i].host);
}

static void
each_origin_is_the_same_listed_or_foreign(void **state)
{
    static const struct {
        const char *origin, *host;
        enum origin is;
    } cases[] = {
        { NULL, "box", ORIGIN_NONE },
        { "http://box", "box", ORIGIN_SAME },
        { "http://box:81", "BOX:80", ORIGIN_SAME },
        { "https://Box", "box:80", ORIGIN_SAME },
        { "http://[::1]:3", "[::1]:4", ORIGIN_SAME },
        { "http://box.evil", "box", ORIGIN_FOREIGN },
        { "http://ox", "box", ORIGIN_FOREIGN },
        { "box", "box", ORIGIN_FOREIGN },
        { "", "box", ORIGIN_FOREIGN },
        { "http://", "box", ORIGIN_FOREIGN },
        { "http:/box", "box", ORIGIN_FOREIGN },
        { "http://box/", "box", ORIGIN_FOREIGN },
        { "http://u@box", "box", ORIGIN_FOREIGN },
        { "null", "box", ORIGIN_FOREIGN },
        { "null", "null", ORIGIN_FOREIGN },
        { "https://pages.example", "box", ORIGIN_LISTED },
        { "https://pages.example:443", "box", ORIGIN_LISTED },
        { "HTTPS://Pages.Example", "box", ORIGIN_LISTED },
        { "http://pages.example", "box", ORIGIN_FOREIGN },
        { "https://pages.example:444", "box", ORIGIN_FOREIGN },
        { "https://pages.example.evil", "box", ORIGIN_FOREIGN },
        { "http://dev.example:8080", "box", ORIGIN_LISTED },
        { "http://dev.example", "box", ORIGIN_FOREIGN },
        { "http://any.example", "box", ORIGIN_LISTED },
        { "https://any.example:9", "box", ORIGIN_LISTED },
        { "https://sub.any.example", "box", ORIGIN_FOREIGN },
    };

    (void)state;
    set("origin", "https://pages.example");
    set("origin", "http://dev.example:8080");
    set("origin", "any.example");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct http h = { .host = span_text(cases[i].host) };
        if (cases[i].origin != NULL) {
            h.origins = 1;
            h.origin = test_span_at_edge(cases[i].origin,
                                         strlen(cases[i].origin));
        }
        if (access_origin(&c, &h) != cases[i].is)
            fail_msg("%s at %s", cases[i].origin, cases[i].host);
    }
    set("origin", "null");
    assert_int_equal(access_origin(&c, &(struct http){ .origins = 1,
                         .origin = span_text("null") }), ORIGIN_LISTED);
}

static void
a_star_lists_all_but_null(void **state)
{
    struct http h = { .origins = 1, .host = span_text("box") };

    (void)state;
    set("origin", "*");
    h.origin = span_text("https://whoever.example:7");
    assert_int_equal(access_origin(&c, &h), ORIGIN_LISTED);
    h.origin = span_text("null");
    assert_int_equal(access_origin(&c, &h), ORIGIN_FOREIGN);
}

static void
only_a_harmless_origin_is_repeated(void **state)
{
    char why[400], text[200];

    (void)state;
    access_why_foreign(span_text("https://a-b.example:80"), why, sizeof why);
    assert_non_null(strstr(why, "--origin https://a-b.example:80"));
    access_why_foreign(span_text("http://a;rm -rf"), why, sizeof why);
    assert_null(strstr(why, "rm"));
    access_why_foreign(span_text("http://<b>"), why, sizeof why);
    assert_null(strstr(why, "<"));
    memset(text, 'x', sizeof text);
    access_why_foreign(span_of(text, 128), why, sizeof why);
    assert_non_null(strstr(why, "xxx"));
    access_why_foreign(span_of(text, 129), why, sizeof why);
    assert_null(strstr(why, "xxx"));
}

#define fact(f) cmocka_unit_test_setup(f, begin)

int
main(void)
{
    const struct CMUnitTest tests[] = {
        fact(each_token_line_is_taken_or_its_fault_is_named),
        fact(a_zero_byte_in_a_line_is_wrong),
        fact(every_prefix_of_a_line_is_judged_without_reading_on),
        fact(one_line_more_than_the_table_holds_is_wrong),
        fact(the_greatest_right_of_all_lines_wins),
        fact(who_gives_no_token_is_nobody_even_if_a_hash_is_zero),
        fact(without_a_table_everyone_may_write),
        fact(an_empty_table_lets_nobody_in),
        fact(a_token_file_is_read_whole_and_every_fault_is_said),
        fact(equality_takes_all_bytes),
        fact(addresses_are_parsed_and_said),
        fact(private_addresses_are_those_of_a_lan),
        fact(a_site_is_an_ipv4_address_or_an_ipv6_64),
        fact(only_named_proxies_are_trusted),
        fact(the_rightmost_untrusted_hop_is_the_peer),
        fact(a_host_is_cut_into_name_and_port),
        fact(a_host_name_has_255_bytes_at_most),
        fact(our_hosts_are_those_a_stranger_cannot_own),
        fact(each_origin_is_the_same_listed_or_foreign),
        fact(a_star_lists_all_but_null),
        fact(only_a_harmless_origin_is_repeated),
    };
    return cmocka_run_group_tests(tests, test_group_listen_in,
                                  test_group_listen_no_more);
}
