/* Chapter Bytes: spans, numbers, writers, UTF-8, base64, globs.
 *
 * SPDX-License-Identifier: MIT
 */
#include "test.h"

/* ----- spans ------------------------------------------------------------ */

static void
a_span_over_nothing_is_empty(void **state)
{
    (void)state;
    assert_true(span_is_empty(span_of(NULL, 0)));
    assert_true(span_is_empty(span_text("")));
    assert_int_equal(span_len(span_of("abc", 2)), 2);
    assert_true(span_equals(span_of(NULL, 0), span_text("")));
}

static void
equality_needs_length_and_bytes(void **state)
{
    (void)state;
    assert_true(span_is(span_text("Host"), "Host"));
    assert_false(span_is(span_text("Host"), "Hos"));
    assert_false(span_is(span_text("Hos"), "Host"));
    assert_false(span_is(span_text("Host"), "host"));
    assert_true(span_equals(span_of("a\0b", 3), span_of("a\0b", 3)));
    assert_false(span_equals(span_of("a\0b", 3), span_of("a\0c", 3)));
}

static void
folding_is_for_ascii_letters_only(void **state)
{
    (void)state;
    assert_true(span_is_folded(span_text("HoSt-@[`{"), "hOsT-@[`{"));
    assert_false(span_is_folded(span_text("@"), "`"));
    assert_false(span_is_folded(span_text("["), "{"));
    assert_false(span_is_folded(span_text("\xc4"), "\xe4"));
    for (unsigned b = 0; b < 256; b++)
        assert_int_equal(byte_lower((uint8_t)b),
                         b >= 'A' && b <= 'Z' ? b + 32 : b);
}

static void
starts_and_ends_do_not_read_beyond(void **state)
{
    (void)state;
    for (size_t n = 0; n <= 5; n++) {
        struct span s = test_span_at_edge("hello", n);
        assert_int_equal(span_starts(s, "hello"), n == 5);
        assert_int_equal(span_ends_folded(s, "HELLO"), n == 5);
        assert_true(span_starts(s, ""));
        assert_true(span_ends_folded(s, ""));
    }
    assert_true(span_ends_folded(span_text("box.LAN"), ".lan"));
    assert_false(span_ends_folded(span_text("boxlan"), ".lan"));
}

static void
a_byte_is_found_first_or_at_the_end(void **state)
{
    struct span s = span_text("a=b=c");

    (void)state;
    assert_ptr_equal(span_find(s, '='), s.at + 1);
    assert_ptr_equal(span_find(s, 'x'), s.end);
    assert_ptr_equal(span_find(span_of(NULL, 0), 'x'), NULL);
    assert_true(span_has(s, 'c'));
    assert_false(span_has(s, '\0'));
}

static void
cutting_gives_every_part_and_then_nothing(void **state)
{
    struct span s = span_text("a,,bc"), empty = span_of(NULL, 0);

    (void)state;
    assert_span_is(span_cut(&s, ','), "a");
    assert_span_is(span_cut(&s, ','), "");
    assert_span_is(span_cut(&s, ','), "bc");
    assert_true(span_is_empty(s));
    assert_span_is(span_cut(&s, ','), "");
    assert_span_is(span_cut(&empty, ','), "");
}

static void
trimming_takes_spaces_and_tabs_from_both_ends(void **state)
{
    (void)state;
    assert_span_is(span_trim(span_text(" \t a b\t ")), "a b");
    assert_span_is(span_trim(span_text("\t \t")), "");
    assert_span_is(span_trim(span_text("")), "");
    assert_span_is(span_trim(span_text("\nx\r")), "\nx\r");
}

/* ----- numbers ---------------------------------------------------------- */

static void
decimals_are_digits_only_and_at_most_the_most(void **state)
{
    static const struct {
        const char *text;
        uint64_t max;
        enum parse want;
        uint64_t value;
    } cases[] = {
        { "0", 255, PARSE_OK, 0 },
        { "255", 255, PARSE_OK, 255 },
        { "256", 255, PARSE_BAD, 0 },
        { "00013", 255, PARSE_OK, 13 },
        { "", 255, PARSE_BAD, 0 },
        { "-1", 255, PARSE_BAD, 0 },
        { "+1", 255, PARSE_BAD, 0 },
        { " 1", 255, PARSE_BAD, 0 },
        { "1 ", 255, PARSE_BAD, 0 },
        { "0x1", 255, PARSE_BAD, 0 },
        { "1e3", 9999, PARSE_BAD, 0 },
        { "9223372036854775807", INT64_MAX, PARSE_OK, INT64_MAX },
        { "9223372036854775808", INT64_MAX, PARSE_BAD, 0 },
        { "18446744073709551615", UINT64_MAX, PARSE_OK, UINT64_MAX },
        { "18446744073709551616", UINT64_MAX, PARSE_BAD, 0 },
        { "99999999999999999999999999", UINT64_MAX, PARSE_BAD, 0 },
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint64_t n = 4711;
        enum parse got = span_decimal(
            test_span_at_edge(cases[i].text, strlen(cases[i].text)),
            cases[i].max, &n);
        if (got != cases[i].want)
            fail_msg("%s: %d", cases[i].text, got);
        assert_true(n == (got == PARSE_OK ? cases[i].value : 4711));
    }
}

static void
hex_digits_have_values_and_nothing_else_has(void **state)
{
    (void)state;
    for (unsigned b = 0; b < 256; b++) {
        const char *digits = "00112233445566778899aAbBcCdDeEfF";
        int want = -1;
        for (int i = 0; i < 32; i++)
            if ((unsigned)digits[i] == b)
                want = i / 2;
        assert_int_equal(hex_value((uint8_t)b), want);
    }
}

/* ----- writers ---------------------------------------------------------- */

static void
a_writer_says_full_and_never_writes_beyond(void **state)
{
    uint8_t buf[9];

    (void)state;
    for (size_t room = 0; room <= 8; room++) {
        struct out o = out_over(buf, room);
        memset(buf, 0xee, sizeof buf);
        out_text(&o, "abc");
        out_u8(&o, 'd');
        out_span(&o, span_text("ef"));
        out_hex(&o, (const uint8_t *)"\x5a", 1);
        assert_int_equal(o.full, room < 8);
        assert_true(o.at <= o.end);
        assert_int_equal(buf[room], 0xee);
        if (room == 8)
            assert_memory_equal(buf, "abcdef5a", 8);
    }
}

static void
formatting_needs_room_for_a_zero_too(void **state)
{
    char buf[6];
    struct out o = out_over(buf, 5), p = out_over(buf, 6);

    (void)state;
    out_format(&o, "%s", "12345");
    assert_true(o.full);
    out_format(&p, "%s", "12345");
    assert_false(p.full);
    assert_memory_equal(buf, "12345", 6);
    assert_ptr_equal(p.at, buf + 5);
    out_bytes(&p, "", 0);
    assert_false(p.full);
}

/* ----- UTF-8 ---------------------------------------------------------------
 * The oracle decodes a whole text the slow way, by the table of RFC 3629. */

static bool
oracle(const uint8_t *b, size_t n)
{
    size_t i = 0;

    while (i < n) {
        size_t more;
        uint32_t c = b[i];
        if (c < 0x80)
            more = 0;
        else if (c >> 5 == 6)
            more = 1, c &= 0x1f;
        else if (c >> 4 == 14)
            more = 2, c &= 0x0f;
        else if (c >> 3 == 30)
            more = 3, c &= 0x07;
        else
            return false;
        if (n - i <= more)
            return false;
        for (size_t k = 1; k <= more; k++) {
            if (b[i + k] >> 6 != 2)
                return false;
            c = c << 6 | (b[i + k] & 0x3fu);
        }
        if ((more == 1 && c < 0x80) || (more == 2 && c < 0x800) ||
            (more == 3 && c < 0x10000) || c > 0x10ffff ||
            (c >= 0xd800 && c <= 0xdfff))
            return false;
        i += more + 1;
    }
    return true;
}

static size_t
encode(uint32_t c, uint8_t b[4])
{
    if (c < 0x80) {
        b[0] = (uint8_t)c;
        return 1;
    }
    if (c < 0x800) {
        b[0] = (uint8_t)(0xc0 | c >> 6);
        b[1] = (uint8_t)(0x80 | (c & 63));
        return 2;
    }
    if (c < 0x10000) {
        b[0] = (uint8_t)(0xe0 | c >> 12);
        b[1] = (uint8_t)(0x80 | (c >> 6 & 63));
        b[2] = (uint8_t)(0x80 | (c & 63));
        return 3;
    }
    b[0] = (uint8_t)(0xf0 | c >> 18);
    b[1] = (uint8_t)(0x80 | (c >> 12 & 63));
    b[2] = (uint8_t)(0x80 | (c >> 6 & 63));
    b[3] = (uint8_t)(0x80 | (c & 63));
    return 4;
}

static bool
utf8_whole(const void *text, size_t len)
{
    struct utf8 u = { 0, 0, 0 };

    return utf8_check(&u, span_of(text, len)) && utf8_is_complete(&u);
}

static void
every_scalar_value_is_utf8_and_every_surrogate_is_not(void **state)
{
    uint8_t b[4];

    (void)state;
    for (uint32_t c = 0; c <= 0x110400; c++) {
        size_t n = encode(c, b);
        bool want = c <= 0x10ffff && (c < 0xd800 || c > 0xdfff);
        if (utf8_whole(b, n) != want)
            fail_msg("U+%04X", c);
    }
}

static void
every_sequence_of_three_bytes_is_judged_as_the_table_says(void **state)
{
    uint8_t b[3];

    (void)state;
    for (uint32_t i = 0; i < 1u << 24; i += 1 + (i & 7) * 3) {
        b[0] = (uint8_t)(i >> 16);
        b[1] = (uint8_t)(i >> 8);
        b[2] = (uint8_t)i;
        for (size_t n = 1; n <= 3; n++)
            if (utf8_whole(b, n) != oracle(b, n))
                fail_msg("%02x %02x %02x, %zu of it", b[0], b[1], b[2], n);
    }
}

static const char *const boundary_texts[] = {
    /* first and last of each length, around surrogates, noncharacters */
    "\x01", "\x7f", "\xc2\x80", "\xdf\xbf", "\xe0\xa0\x80", "\xed\x9f\xbf",
    "\xee\x80\x80", "\xef\xbf\xbf", "\xf0\x90\x80\x80", "\xf4\x8f\xbf\xbf",
    "\xef\xb7\x90", "\xf3\xbf\xbf\xbe",
    "h\xc3\xa4tt \xe2\x82\xac \xf0\x9d\x84\x9e!",
};

static const char *const broken_texts[] = {
    "\x80", "\xbf", "\xc0\x80", "\xc1\xbf", "\xc2\x7f", "\xc2\xc0",
    "\xe0\x80\x80", "\xe0\x9f\xbf", "\xed\xa0\x80", "\xed\xbf\xbf",
    "\xef\xbf\x7f", "\xf0\x80\x80\x80", "\xf0\x8f\xbf\xbf", "\xf4\x90\x80\x80",
    "\xf5\x80\x80\x80", "\xf8\x88\x80\x80\x80", "\xfe", "\xff",
    "01234567\x80", "0123456\xc3(", "\xe2\x82(", "abc\xf0\x9f\x98(",
};

static void
a_text_may_be_split_anywhere(void **state)
{
    (void)state;
    for (size_t t = 0; t < sizeof boundary_texts / sizeof *boundary_texts;
         t++) {
        const char *text = boundary_texts[t];
        size_t len = strlen(text);
        for (size_t i = 0; i <= len; i++)
            for (size_t j = i; j <= len; j++) {
                struct utf8 u = { 0, 0, 0 };
                assert_true(utf8_check(&u, test_span_at_edge(text, i)));
                assert_int_equal(utf8_is_complete(&u),
                                 oracle((const uint8_t *)text, i));
                assert_true(utf8_check(&u, test_span_at_edge(text + i, j - i)));
                assert_true(
                    utf8_check(&u, test_span_at_edge(text + j, len - j)));
                assert_true(utf8_is_complete(&u));
            }
    }
}

static void
a_broken_text_is_refused_wherever_it_is_split(void **state)
{
    (void)state;
    for (size_t t = 0; t < sizeof broken_texts / sizeof *broken_texts; t++) {
        const char *text = broken_texts[t];
        size_t len = strlen(text);
        for (size_t i = 0; i <= len; i++) {
            struct utf8 u = { 0, 0, 0 };
            assert_false(utf8_check(&u, test_span_at_edge(text, i)) &&
                         utf8_check(&u, test_span_at_edge(text + i, len - i)));
        }
    }
}

/* RFC 6455 8.1 is served best by failing at once: Autobahn 6.4. */
static void
a_broken_text_is_refused_at_the_first_wrong_byte(void **state)
{
    struct utf8 u = { 0, 0, 0 };

    (void)state;
    assert_true(utf8_check(&u, span_text("ok \xf4")));
    assert_false(utf8_check(&u, span_text("\x90")));
    u = (struct utf8){ 0, 0, 0 };
    assert_true(utf8_check(&u, span_text("\xed")));
    assert_false(utf8_check(&u, span_text("\xa0")));
}

static void
ascii_is_passed_eight_at_a_time_without_missing_a_byte(void **state)
{
    uint8_t text[40];

    (void)state;
    for (size_t len = 0; len <= sizeof text; len++)
        for (size_t bad = 0; bad < len; bad++) {
            struct utf8 u = { 0, 0, 0 };
            memset(text, 'x', sizeof text);
            text[bad] = 0xff;
            assert_false(utf8_check(&u, test_span_at_edge(text, len)));
            u = (struct utf8){ 0, 0, 0 };
            assert_true(utf8_check(&u, test_span_at_edge(text, bad)));
        }
}

/* ----- base64 ----------------------------------------------------------- */

static void
base64_is_that_of_rfc_4648(void **state)
{
    static const char *const cases[][2] = {
        { "", "" }, { "f", "Zg==" }, { "fo", "Zm8=" }, { "foo", "Zm9v" },
        { "foob", "Zm9vYg==" }, { "fooba", "Zm9vYmE=" },
        { "foobar", "Zm9vYmFy" }, { "\xff\xff\xff", "////" },
        { "\xfb\xef\xbe", "++++" },
    };
    uint8_t buf[16];

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct out o = out_over(buf, sizeof buf);
        out_base64(&o, test_at_edge(cases[i][0], strlen(cases[i][0])),
                   strlen(cases[i][0]));
        assert_false(o.full);
        assert_span_is(((struct span){ buf, o.at }), cases[i][1]);
    }
}

static void
a_key_is_the_base64_of_sixteen_bytes_and_nothing_else(void **state)
{
    const char *good = "dGhlIHNhbXBsZSBub25jZQ==";
    uint8_t bytes[16], text[24];

    (void)state;
    assert_true(span_is_base64_of_16(span_text(good)));
    for (size_t n = 0; n < 24; n++)
        assert_false(span_is_base64_of_16(test_span_at_edge(good, n)));
    assert_false(span_is_base64_of_16(span_text("dGhlIHNhbXBsZSBub25jZQ===")));
    for (int i = 0; i < 1000; i++) {
        struct out o = out_over(text, sizeof text);
        for (size_t k = 0; k < 16; k++)
            bytes[k] = (uint8_t)test_random(256);
        out_base64(&o, bytes, 16);
        assert_false(o.full);
        assert_true(span_is_base64_of_16(span_of(text, 24)));
    }
    for (unsigned at = 0; at < 24; at++)
        for (unsigned b = 0; b < 256; b++) {
            bool digit = b != 0 && strchr(base64_digits, (int)b) != NULL;
            memcpy(text, good, 24);
            text[at] = (uint8_t)b;
            assert_int_equal(span_is_base64_of_16(span_of(text, 24)),
                             at >= 22   ? b == '='
                             : at == 21 ? b == 'A' || b == 'Q' || b == 'g' ||
                                              b == 'w'
                                        : digit);
        }
}

/* ----- globs ------------------------------------------------------------ */

/* The slow and obvious way. */
static bool
matches_slowly(const char *s, const char *glob)
{
    if (*glob == '*')
        return matches_slowly(s, glob + 1) ||
               (*s != '\0' && matches_slowly(s + 1, glob));
    return *s == *glob && (*s == '\0' || matches_slowly(s + 1, glob + 1));
}

static void
a_star_stands_for_any_bytes_also_none_also_slashes(void **state)
{
    (void)state;
    assert_true(span_matches(span_text("ws/a/b"), span_text("ws/*")));
    assert_true(span_matches(span_text("ws/"), span_text("ws/*")));
    assert_true(span_matches(span_text("ws/team/x/notes"),
                             span_text("ws/*/notes")));
    assert_false(span_matches(span_text("ws/notes"), span_text("ws/*/notes")));
    assert_false(span_matches(span_text("doc/a"), span_text("ws/*")));
    assert_true(span_matches(span_text(""), span_text("*")));
    assert_true(span_matches(span_text(""), span_text("")));
    assert_false(span_matches(span_text("a"), span_text("")));
    assert_false(span_matches(span_text("ws/a"), span_text("WS/a")));
}

static void
every_short_glob_matches_what_the_slow_way_matches(void **state)
{
    char s[7], g[6];

    (void)state;
    for (unsigned i = 0; i < 1u << 6; i++)
        for (unsigned sl = 0; sl <= 6; sl++)
            for (unsigned j = 0; j < 243; j++) {
                unsigned k = j;
                for (unsigned n = 0; n < sl; n++)
                    s[n] = i >> n & 1 ? 'a' : 'b';
                s[sl] = '\0';
                for (unsigned n = 0; n < 5; n++, k /= 3)
                    g[n] = "ab*"[k % 3];
                g[5] = '\0';
                for (unsigned gl = 0; gl <= 5; gl++) {
                    const char *glob = g + gl;
                    if (span_matches(span_text(s), span_text(glob)) !=
                        matches_slowly(s, glob))
                        fail_msg("\"%s\" and \"%s\"", s, glob);
                }
            }
}

static void
a_hostile_glob_takes_no_more_than_the_product(void **state)
{
    char s[129], g[133];

    (void)state;
    memset(s, 'a', 128);
    s[128] = '\0';
    for (size_t i = 0; i < 132; i += 2)
        memcpy(g + i, "*a", 2);
    g[131] = 'b';
    g[132] = '\0';
    for (int i = 0; i < 100; i++)
        assert_false(span_matches(span_text(s), span_text(g)));
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_span_over_nothing_is_empty),
        cmocka_unit_test(equality_needs_length_and_bytes),
        cmocka_unit_test(folding_is_for_ascii_letters_only),
        cmocka_unit_test(starts_and_ends_do_not_read_beyond),
        cmocka_unit_test(a_byte_is_found_first_or_at_the_end),
        cmocka_unit_test(cutting_gives_every_part_and_then_nothing),
        cmocka_unit_test(trimming_takes_spaces_and_tabs_from_both_ends),
        cmocka_unit_test(decimals_are_digits_only_and_at_most_the_most),
        cmocka_unit_test(hex_digits_have_values_and_nothing_else_has),
        cmocka_unit_test(a_writer_says_full_and_never_writes_beyond),
        cmocka_unit_test(formatting_needs_room_for_a_zero_too),
        cmocka_unit_test(every_scalar_value_is_utf8_and_every_surrogate_is_not),
        cmocka_unit_test(
            every_sequence_of_three_bytes_is_judged_as_the_table_says),
        cmocka_unit_test(a_text_may_be_split_anywhere),
        cmocka_unit_test(a_broken_text_is_refused_wherever_it_is_split),
        cmocka_unit_test(a_broken_text_is_refused_at_the_first_wrong_byte),
        cmocka_unit_test(
            ascii_is_passed_eight_at_a_time_without_missing_a_byte),
        cmocka_unit_test(base64_is_that_of_rfc_4648),
        cmocka_unit_test(a_key_is_the_base64_of_sixteen_bytes_and_nothing_else),
        cmocka_unit_test(a_star_stands_for_any_bytes_also_none_also_slashes),
        cmocka_unit_test(every_short_glob_matches_what_the_slow_way_matches),
        cmocka_unit_test(a_hostile_glob_takes_no_more_than_the_product),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
