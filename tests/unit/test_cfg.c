/* Chapter Settings: every setting's default, least, most and what lies beyond;
 * lines, flags, lists; what settings must agree on; reloads.  Whatever is
 * refused is said.
 *
 * SPDX-License-Identifier: MIT
 */
#include "test.h"

static struct cfg c;

static const struct cfg_setting *
setting(const char *typed)
{
    const struct cfg_setting *set = cfg_find(span_text(typed));

    if (set == NULL)
        fail_msg("there is no setting %s", typed);
    return set;
}

static uint64_t
number(struct cfg *of, const struct cfg_setting *set)
{
    return *(uint64_t *)cfg_field(of, set);
}

static bool
set_to(const char *typed, const char *value)
{
    return cfg_set(&c, setting(typed),
                   test_span_at_edge(value, strlen(value)), "here");
}

static bool
line(const char *text)
{
    return cfg_line(&c, test_span_at_edge(text, strlen(text)), "file:7");
}

static int
begin(void **state)
{
    (void)state;
    cfg_defaults(&c);
    (void)test_said("");
    return 0;
}

/* ----- defaults and ranges ---------------------------------------------- */

static void
the_defaults_are_those_of_the_manual(void **state)
{
    static const struct {
        const char *name;
        uint64_t value;
    } cases[] = {
        { "unix-mode", 0660 },       { "max-clients", 256 },
        { "max-rooms", 64 },         { "max-per-ip", 0 },
        { "max-message", 1 << 20 },  { "max-tls", 32 },
        { "max-handshakes", 4 },     { "receive-buffers", 32 },
        { "message-memory", 0 },     { "socket-buffer", 65536 },
        { "memory", 0 },             { "rate-messages", 0 },
        { "rate-bytes", 0 },         { "coalesce", 0 },
        { "ping-interval", 25 },     { "dead-after", 50 },
        { "request-timeout", 10 },   { "log-level", LOG_LEVEL_INFO },
        { "syslog", 0 },             { "prefault", 0 },
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        if (number(&c, setting(cases[i].name)) != cases[i].value)
            fail_msg("%s", cases[i].name);
    assert_true(c.listen.count == 0 && c.origin.count == 0);
    assert_string_equal(cfg_text(&c, c.www), "");
    assert_false(test_said("default:")); /* every default is a good value */
    assert_true(cfg_settle(&c));
}

static void
every_number_goes_from_its_least_to_its_most(void **state)
{
    unsigned seen = 0;

    (void)state;
    for (size_t i = 0; i < CFG_COUNT; i++) {
        const struct cfg_setting *set = &cfg_settings[i];
        bool octal = set->kind == CFG_OCTAL;
        char typed[32], text[40];
        uint64_t before;
        if (!octal && set->kind != CFG_SIZE && set->kind != CFG_POWER)
            continue;
        seen++;
        (void)cfg_typed(set->name, typed);
        for (int most = 0; most < 2; most++) {
            int64_t at = most ? set->most : set->least;
            int64_t beyond = most ? at + 1 : at - 1;
            (void)snprintf(text, sizeof text, octal ? "%" PRIo64 : "%" PRId64,
                           at);
            if (!set_to(typed, text))
                fail_msg("%s did not take %s", typed, text);
            assert_true(number(&c, set) == (uint64_t)at);
            before = number(&c, set);
            (void)snprintf(text, sizeof text, octal ? "%" PRIo64 : "%" PRId64,
                           beyond);
            if (set_to(typed, text))
                fail_msg("%s took %s", typed, text);
            assert_true(test_said(typed));
            assert_true(number(&c, set) == before);
        }
        assert_false(set_to(typed, "99999999999999999999999999"));
        assert_false(set_to(typed, ""));
        assert_false(set_to(typed, "x"));
        assert_false(set_to(typed, "-1"));
        assert_false(set_to(typed, " 1"));
    }
    assert_true(seen > 15);
}

static void
a_refusal_says_where_what_and_the_range(void **state)
{
    (void)state;
    assert_false(line("max-message = 100"));
    assert_true(test_said(
        "error: file:7: max-message is \"100\"; it may be 125 to 1G\n"));
    assert_false(line("max-message = much"));
    assert_true(test_said("file:7: max-message is \"much\"; give a number"));
    assert_false(line("ring = 100000"));
    assert_true(test_said("give a power of two, like 64K or 128K"));
    assert_false(line("syslog = maybe"));
    assert_true(test_said("it may be yes or no"));
    assert_false(line("log-level = loud"));
    assert_true(test_said("it may be error|warning|info|debug"));
    assert_false(line("unix-mode = 0888"));
    assert_true(test_said("give an octal mode like 0660"));
    assert_false(line("www ="));
    assert_true(test_said("www is \"\"; it needs a value, DIR"));
}

static void
control_bytes_of_a_value_do_not_reach_the_log(void **state)
{
    (void)state;
    assert_false(line("log-level = a\x1b[2Jb\rc"));
    assert_true(test_said("\"a?[2Jb?c\""));
}

static void
sizes_take_k_m_and_g(void **state)
{
    static const struct {
        const char *text;
        uint64_t value;
    } cases[] = {
        { "0", 0 },          { "1", 1 },         { "1k", 1024 },
        { "1K", 1024 },      { "3M", 3 << 20 },  { "2g", UINT64_C(2) << 30 },
        { "0G", 0 },         { "0010", 10 },
        { "8589934592", UINT64_C(8589934592) },
        { "8589934591G", UINT64_C(8589934591) << 30 },
    };
    static const char *const bad[] = { "", "K", "k", "1KK", "1T", "K1", "1 K",
                                       "1.5K", "-1K", "8589934592G",
                                       "9223372036854775808" };
    uint64_t n;

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct span text =
            test_span_at_edge(cases[i].text, strlen(cases[i].text));
        assert_int_equal(cfg_parse_size(text, &n), PARSE_OK);
        assert_true(n == cases[i].value);
    }
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        if (cfg_parse_size(test_span_at_edge(bad[i], strlen(bad[i])), &n) !=
            PARSE_BAD)
            fail_msg("%s", bad[i]);
}

static void
sizes_are_said_as_short_as_they_can_be(void **state)
{
    static const struct {
        int64_t n;
        const char *text;
    } cases[] = {
        { 0, "0" }, { 1, "1" }, { 1023, "1023" }, { 1024, "1K" },
        { 1 << 20, "1M" }, { 3 << 19, "1536K" },
        { INT64_C(1) << 40, "1024G" },
    };
    char text[24];

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        assert_string_equal(cfg_size_text(cases[i].n, text), cases[i].text);
}

static void
levels_and_flags_take_their_words_only(void **state)
{
    (void)state;
    for (unsigned i = 0; i < 4; i++) {
        assert_true(set_to("log-level", log_names[i]));
        assert_true(c.log_level == i);
    }
    assert_false(set_to("log-level", "Info"));
    assert_false(set_to("log-level", "inf"));
    assert_false(set_to("log-level", "infos"));
    assert_true(set_to("prefault", "yes") && c.prefault == 1);
    assert_true(set_to("prefault", "no") && c.prefault == 0);
    assert_false(set_to("prefault", "1"));
    assert_false(set_to("prefault", "YES"));
}

/* ----- texts and lists -------------------------------------------------- */

static void
the_last_of_a_text_counts_and_all_of_a_list(void **state)
{
    (void)state;
    assert_true(set_to("www", "/a") && set_to("www", "/b c"));
    assert_string_equal(cfg_text(&c, c.www), "/b c");
    assert_true(set_to("host", "one.example") && set_to("host", "two.example"));
    assert_int_equal(c.host.count, 2);
    assert_string_equal(cfg_item(&c, &c.host, 0), "one.example");
    assert_string_equal(cfg_item(&c, &c.host, 1), "two.example");
}

static void
a_seventeenth_element_is_too_much(void **state)
{
    (void)state;
    for (int i = 0; i < 16; i++)
        assert_true(set_to("host", "a.example"));
    assert_false(set_to("host", "a.example"));
    assert_true(test_said(
        "host is \"a.example\"; there may be no more than 16 of them\n"));
    assert_int_equal(c.host.count, 16);
}

static void
texts_may_fill_their_store_and_no_more(void **state)
{
    char text[COLLABD_CFG_TEXT];

    (void)state;
    memset(text, 'x', sizeof text);
    for (size_t left = sizeof c.store - c.store_used; left > 0;
         left = sizeof c.store - c.store_used) {
        size_t n = left > 1000 ? 999 : left - 1;
        assert_false(cfg_set(&c, setting("www"), span_of(text, left), "here"));
        assert_true(test_said("longer than 4096 bytes together"));
        if (n == 0)
            break;
        assert_true(cfg_set(&c, setting("www"), span_of(text, n), "here"));
        assert_int_equal(strlen(cfg_text(&c, c.www)), n);
    }
}

static void
a_text_has_no_zero_in_it(void **state)
{
    (void)state;
    assert_false(cfg_set(&c, setting("www"), span_of("a\0b", 3), "here"));
    assert_true(test_said("it needs a value, DIR"));
}

static void
each_element_has_its_form(void **state)
{
    static const struct {
        const char *name, *value;
        bool good;
    } cases[] = {
        { "listen", "0", true },
        { "listen", "65535", true },
        { "listen", "65536", false },
        { "listen", "", false },
        { "listen", ":80", false },
        { "listen", "box:80", true },
        { "listen", "box.lan:80", true },
        { "listen", "1box:80", true },
        { "listen", "127.0.0.1:80", true },
        { "listen", "127.0.0:80", false },
        { "listen", "256.0.0.1:80", false },
        { "listen", "1.2.3.4.5:80", false },
        { "listen", "[::1]:80", true },
        { "listen", "[::]:0", true },
        { "listen", "[::1]", false },
        { "listen", "[::1:80", false },
        { "listen", "[1.2.3.4.5]:80", false },
        { "listen", "::1", false },
        { "listen", "::1:80", false },
        { "listen", "box:", false },
        { "listen", "box:http", false },
        { "listen", "box", false },
        { "listen", "a/b:80", false },
        { "listen", "http://box:80", false },
        { "listen", "unix:/run/x", true },
        { "listen", "unix:x", true },
        { "listen", "unix:", false },
        { "tls-listen", "8443", true },
        { "tls-listen", "x", false },
        { "origin", "https://pages.example", true },
        { "origin", "http://pages.example:8080", true },
        { "origin", "app://x", true },
        { "origin", "pages.example", true },
        { "origin", "null", true },
        { "origin", "*", true },
        { "origin", "https://pages.example/", false },
        { "origin", "https://pages.example/path", false },
        { "origin", "https://", false },
        { "origin", "https://*.example", true }, /* a host byte, no glob */
        { "host", "board.example", true },
        { "host", "BOARD", true },
        { "host", "board.example:80", false },
        { "host", "http://board", false },
        { "host", "a b", false },
        { "host", "[::1]", false },
        { "trust-proxy", "127.0.0.1", true },
        { "trust-proxy", "::1", true },
        { "trust-proxy", "unix", true },
        { "trust-proxy", "127.0.0.1, ::1,unix", true },
        { "trust-proxy", "box", false },
        { "trust-proxy", "127.0.0.1:80", false },
        { "trust-proxy", "10.0.0.0/8", false },
        { "trust-proxy", "1.2.3.4,,5.6.7.8", false },
        { "trust-proxy", "unix,x", false },
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        cfg_defaults(&c);
        if (set_to(cases[i].name, cases[i].value) != cases[i].good)
            fail_msg("%s = %s", cases[i].name, cases[i].value);
        if (!cases[i].good)
            assert_true(test_said(cases[i].name));
    }
}

static void
a_unix_path_must_fit_its_address(void **state)
{
    char text[5 + 200] = "unix:";

    (void)state;
    memset(text + 5, 'x', 107);
    assert_true(set_to("listen", text));
    text[5 + 107] = 'x';
    assert_false(set_to("listen", text));
}

/* ----- lines ------------------------------------------------------------ */

static void
a_line_is_blank_a_comment_or_a_setting(void **state)
{
    static const char *const good[] = {
        "", " ", "\t \r", "# comment", "  # = comment", "max-rooms=3",
        "  max-rooms \t= \t3  ", "max-rooms = 3\r", "www = a = b",
        "syslog = no",
    };
    static const char *const bad[] = {
        "max-rooms", "max-rooms 3", "= 3", "max_rooms = 3", "Max-rooms = 3",
        "max-room = 3", "max-roomss = 3", "max-rooms = 3 # three",
        "max-rooms = 3 4", "--max-rooms = 3", "check = yes", "config = x",
        "max-rooms =", "listen =", "max-rooms\0 = 3",
    };

    (void)state;
    for (size_t i = 0; i < sizeof good / sizeof *good; i++)
        if (!line(good[i]))
            fail_msg("\"%s\"", good[i]);
    assert_true(c.max_rooms == 3);
    assert_string_equal(cfg_text(&c, c.www), "a = b");
    assert_false(test_said("error"));
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        if (line(bad[i]))
            fail_msg("\"%s\"", bad[i]);
        assert_true(test_said("file:7: "));
    }
}

static void
every_wrong_line_is_reported_with_its_number(void **state)
{
    static char log[2000];
    ssize_t n;

    (void)state;
    assert_false(cfg_lines(&c, span_text("max-rooms = 5\nrubbish\n\n# fine\n"
                                         "max-clients = 0\r\nno-such = 1\n"
                                         "max-requests = 7"),
                           "/etc/collabd.conf"));
    n = pread(test_heard, log, sizeof log - 1, 0);
    assert_true(n > 0);
    assert_non_null(strstr(log, "/etc/collabd.conf:2: \"rubbish\" is no"));
    assert_non_null(strstr(log, "/etc/collabd.conf:5: max-clients is \"0\""));
    assert_non_null(strstr(log, "/etc/collabd.conf:6: there is no setting"));
    assert_true(c.max_rooms == 5 && c.max_requests == 7);
}

static void
every_prefix_of_a_file_is_good_or_said_to_be_bad(void **state)
{
    static const char text[] =
        "# collabd\nlisten = 127.0.0.1:8080\r\nlisten = [::1]:81\n"
        "origin = https://a.example\nmax-message = 2M\nsyslog = yes\n"
        "log-level = debug\nunix-mode = 0600\ntrust-proxy = unix, ::1\n";

    (void)state;
    for (size_t n = 0; n < sizeof text; n++) {
        bool good;
        cfg_defaults(&c);
        good = cfg_lines(&c, test_span_at_edge(text, n), "f");
        assert_int_equal(test_said("error: f:"), !good);
    }
    assert_true(c.max_message == 2 << 20 && c.syslog == 1);
    assert_true(c.listen.count == 2 && c.log_level == LOG_LEVEL_DEBUG);
}

/* ----- flags ------------------------------------------------------------ */

static enum cfg_action action;
static const char *operand[2];

static bool
flags(const char *words)
{
    static char copy[1000];
    char *argv[40] = { copy }, *next = copy;
    int argc = 1;

    (void)snprintf(copy, sizeof copy, "collabd|%s", words);
    while ((next = strchr(next, '|')) != NULL) {
        *next++ = '\0';
        argv[argc++] = next;
    }
    if (*words == '\0')
        argc = 1;
    action = CFG_ACTION_NONE;
    operand[0] = operand[1] = NULL;
    return cfg_flags(&c, argc, argv, &action, operand);
}

static void
a_flag_takes_its_value_behind_it_or_behind_an_equals_sign(void **state)
{
    (void)state;
    assert_true(flags(""));
    assert_true(flags("--max-rooms|3|--max-clients=4|--www=/a=b|--syslog|"
                      "--prefault=no|--log-level|debug"));
    assert_true(c.max_rooms == 3 && c.max_clients == 4 && c.syslog == 1);
    assert_true(c.prefault == 0 && c.log_level == LOG_LEVEL_DEBUG);
    assert_string_equal(cfg_text(&c, c.www), "/a=b");
    assert_int_equal(action, CFG_ACTION_NONE);
}

static void
a_wrong_flag_is_said(void **state)
{
    static const char *const cases[][2] = {
        { "8080", "\"8080\": flags begin with --" },
        { "-v", "\"-v\": flags begin with --" },
        { "--", "there is no such flag" },
        { "--max_rooms|3", "--max_rooms: there is no such flag" },
        { "--nonsense", "--nonsense: there is no such flag" },
        { "--max-rooms", "--max-rooms needs a value, N" },
        { "--syslog|yes", "\"yes\": flags begin with --" },
        { "--max-rooms|--syslog", "--max-rooms: max-rooms is \"--syslog\"" },
        { "--max-rooms=", "--max-rooms: max-rooms is \"\"" },
        { "--config", "--config needs a value, FILE" },
        { "--make-cert", "--make-cert needs a value, DIR" },
        { "--syslog=perhaps", "it may be yes or no" },
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        assert_false(flags(cases[i][0]));
        if (!test_said(cases[i][1]))
            fail_msg("%s did not say %s", cases[i][0], cases[i][1]);
    }
}

static void
actions_are_told_from_settings(void **state)
{
    (void)state;
    assert_true(flags("--check"));
    assert_int_equal(action, CFG_ACTION_check);
    assert_true(flags("--max-rooms|2|--show-memory"));
    assert_int_equal(action, CFG_ACTION_show_memory);
    assert_true(flags("--make-cert|/tmp/x"));
    assert_int_equal(action, CFG_ACTION_make_cert);
    assert_string_equal(operand[0], "/tmp/x");
    assert_true(flags("--make-cert=/tmp/y"));
    assert_string_equal(operand[0], "/tmp/y");
    assert_true(flags("--config|/tmp/z"));
    assert_int_equal(action, CFG_ACTION_NONE);
}

static void
a_list_given_by_flags_replaces_that_of_the_file(void **state)
{
    (void)state;
    assert_true(line("host = a.example") && line("host = b.example"));
    assert_true(line("origin = null"));
    assert_true(flags("--host|c.example|--host|d.example"));
    assert_int_equal(c.host.count, 2);
    assert_string_equal(cfg_item(&c, &c.host, 0), "c.example");
    assert_int_equal(c.origin.count, 1);
}

static void
every_setting_is_a_flag_and_a_line(void **state)
{
    (void)state;
    for (size_t i = 0; i < CFG_COUNT; i++) {
        char typed[32];
        (void)cfg_typed(cfg_settings[i].name, typed);
        assert_ptr_equal(cfg_find(span_text(typed)), &cfg_settings[i]);
        assert_null(strchr(typed, '_'));
        assert_null(cfg_find(span_of(typed, strlen(typed) - 1)));
        assert_int_equal(cfg_settings[i].kind == CFG_FLAG,
                         *cfg_settings[i].value == '\0');
        for (size_t a = 1; a < CFG_ACTION_COUNT; a++)
            assert_string_not_equal(cfg_actions[a].name, cfg_settings[i].name);
    }
}

/* ----- what settings must agree on -------------------------------------- */

static void
what_is_left_out_is_settled(void **state)
{
    (void)state;
    assert_true(set_to("max-message", "64K"));
    assert_true(cfg_settle(&c));
    assert_int_equal(c.listen.count, 1);
    assert_string_equal(cfg_item(&c, &c.listen, 0), "8080");
    assert_true(c.message_memory == 8 * 65536);
    assert_true(cfg_settle(&c)); /* again changes nothing */
    assert_int_equal(c.listen.count, 1);
}

static void
what_does_not_fit_together_is_refused_and_said(void **state)
{
    static const struct {
        const char *words, *said; /* NULL: it fits */
    } cases[] = {
        { "--tls-listen|1", "tls-listen needs tls-cert and tls-key" },
        { "--tls-listen|1|--tls-cert|a", "tls-listen needs" },
        { "--tls-listen|1|--tls-key|a", "tls-listen needs" },
        { "--tls-listen|1|--tls-key|a|--tls-cert|b", NULL },
        { "--max-message|1M|--message-memory|2097151", "message-memory is" },
        { "--max-message|1M|--message-memory|2M", NULL },
        { "--dead-after|25", "must be more than ping-interval 25" },
        { "--dead-after|26", NULL },
        { "--ping-interval|50", "must be more than ping-interval" },
        { "--listen|1|--listen|2|--listen|3|--listen|4|--listen|5|--listen|6|"
          "--listen|7|--listen|8", NULL },
        { "--listen|1|--listen|2|--listen|3|--listen|4|--listen|5|--listen|6|"
          "--listen|7|--listen|8|--listen|9", "more than 8 sockets" },
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        cfg_defaults(&c);
        assert_true(flags(cases[i].words));
        if (cfg_settle(&c) != (cases[i].said == NULL))
            fail_msg("%s", cases[i].words);
        if (cases[i].said != NULL && !test_said(cases[i].said))
            fail_msg("%s did not say %s", cases[i].words, cases[i].said);
    }
}

/* ----- files ------------------------------------------------------------ */

static void
flags_win_over_the_file(void **state)
{
    char folder[] = "/tmp/collabd-test-XXXXXX", path[64], arg[80];
    char *argv[] = { "collabd", "--max-rooms", "9", arg, "--check" };
    struct sys_file file;
    FILE *f;

    (void)state;
    assert_non_null(mkdtemp(folder));
    (void)snprintf(path, sizeof path, "%s/config", folder);
    (void)snprintf(arg, sizeof arg, "--config=%s", path);
    f = fopen(path, "w");
    (void)fputs("max-rooms = 8\nmax-clients = 7\n", f);
    (void)fclose(f);
    assert_string_equal(cfg_path(5, argv), path);
    file = sys_file_at(path);
    assert_true(cfg_read(&c, 5, argv, file, &action, operand));
    assert_true(c.max_rooms == 9 && c.max_clients == 7);
    assert_int_equal(action, CFG_ACTION_check);

    /* exactly the most, and one more */
    for (int more = 0; more < 2; more++) {
        f = fopen(path, "w");
        (void)fputs("max-clients = 6\n#", f);
        for (int i = 17; i < CFG_FILE_MAX + more; i++)
            (void)fputc('x', f);
        (void)fclose(f);
        assert_int_equal(cfg_read(&c, 5, argv, file, &action, operand), !more);
    }
    assert_true(test_said("File too large"));
    assert_int_equal(unlink(path), 0);
    assert_false(cfg_read(&c, 5, argv, file, &action, operand));
    assert_true(test_said("No such file"));
    (void)close(file.folder);
    assert_int_equal(rmdir(folder), 0);
}

static void
help_needs_no_settings_that_fit(void **state)
{
    char *argv[] = { "collabd", "--help", "--tls-listen", "1" };

    (void)state;
    action = CFG_ACTION_NONE;
    assert_true(cfg_read(&c, 4, argv, (struct sys_file){ -1, "" }, &action,
                         operand));
    assert_int_equal(action, CFG_ACTION_help);
}

static void
help_names_every_setting_and_action_with_its_default(void **state)
{
    char *text = NULL, want[64], typed[32];
    size_t len = 0;
    FILE *f = open_memstream(&text, &len);

    (void)state;
    cfg_help(f);
    (void)fclose(f);
    for (size_t i = 0; i < CFG_COUNT; i++) {
        (void)snprintf(want, sizeof want, "  --%s ",
                       cfg_typed(cfg_settings[i].name, typed));
        assert_non_null(strstr(text, want));
        assert_non_null(strstr(text, cfg_settings[i].help));
    }
    for (size_t i = 1; i < CFG_ACTION_COUNT; i++) {
        (void)snprintf(want, sizeof want, "  --%s ",
                       cfg_typed(cfg_actions[i].name, typed));
        assert_non_null(strstr(text, want));
    }
    assert_non_null(strstr(text, "[256]"));
    free(text);
}

/* ----- reloads ---------------------------------------------------------- */

static void
a_reload_keeps_what_needs_a_restart_and_says_it(void **state)
{
    static struct cfg fresh;

    (void)state;
    for (size_t i = 0; i < CFG_COUNT; i++) {
        const struct cfg_setting *set = &cfg_settings[i];
        char typed[32], said[64];
        bool numeric = !cfg_is_list(set) && set->kind != CFG_TEXT;
        cfg_defaults(&c);
        cfg_defaults(&fresh);
        if (numeric)
            *(uint64_t *)cfg_field(&fresh, set) += 1;
        else
            assert_true(cfg_set(&fresh, set,
                                span_text(set->kind == CFG_PEER ? "::1" : "1"),
                                "here"));
        cfg_keep_start(&fresh, &c);
        (void)snprintf(said, sizeof said, "%s has changed; that takes a "
                       "restart", cfg_typed(set->name, typed));
        assert_int_equal(test_said(said), set->when == CFG_START);
        if (numeric)
            assert_true(number(&fresh, set) - number(&c, set) ==
                        (set->when == CFG_LIVE ? 1 : 0));
    }
}

static void
a_reload_that_changes_nothing_says_nothing(void **state)
{
    static struct cfg fresh;

    (void)state;
    assert_true(flags("--host|a.example|--www|/x|--listen|1|--listen|2"));
    assert_true(cfg_settle(&c));
    cfg_defaults(&fresh);
    /* the same in another order, at other places of the store */
    assert_true(cfg_lines(&fresh, span_text("origin = null\nlisten = 1\n"
                                            "www = /y\nwww = /x\n"
                                            "listen = 2\nhost = a.example\n"),
                          "f"));
    assert_true(cfg_settle(&fresh));
    cfg_keep_start(&fresh, &c);
    assert_false(test_said("restart"));
    /* one element more, one other element */
    assert_true(cfg_set(&fresh, setting("listen"), span_text("3"), "here"));
    cfg_keep_start(&fresh, &c);
    assert_true(test_said("listen has changed"));
}

static void
live_settings_change_at_a_reload(void **state)
{
    static const char *const live[] = {
        "origin", "host", "trust-proxy", "max-per-ip", "rate-messages",
        "rate-bytes", "coalesce", "ping-interval", "dead-after",
        "request-timeout", "log-level",
    };

    (void)state;
    for (size_t i = 0; i < sizeof live / sizeof *live; i++)
        assert_int_equal(setting(live[i])->when, CFG_LIVE);
}

#define fact(f) cmocka_unit_test_setup(f, begin)

int
main(void)
{
    const struct CMUnitTest tests[] = {
        fact(the_defaults_are_those_of_the_manual),
        fact(every_number_goes_from_its_least_to_its_most),
        fact(a_refusal_says_where_what_and_the_range),
        fact(control_bytes_of_a_value_do_not_reach_the_log),
        fact(sizes_take_k_m_and_g),
        fact(sizes_are_said_as_short_as_they_can_be),
        fact(levels_and_flags_take_their_words_only),
        fact(the_last_of_a_text_counts_and_all_of_a_list),
        fact(a_seventeenth_element_is_too_much),
        fact(texts_may_fill_their_store_and_no_more),
        fact(a_text_has_no_zero_in_it),
        fact(each_element_has_its_form),
        fact(a_unix_path_must_fit_its_address),
        fact(a_line_is_blank_a_comment_or_a_setting),
        fact(every_wrong_line_is_reported_with_its_number),
        fact(every_prefix_of_a_file_is_good_or_said_to_be_bad),
        fact(a_flag_takes_its_value_behind_it_or_behind_an_equals_sign),
        fact(a_wrong_flag_is_said),
        fact(actions_are_told_from_settings),
        fact(a_list_given_by_flags_replaces_that_of_the_file),
        fact(every_setting_is_a_flag_and_a_line),
        fact(what_is_left_out_is_settled),
        fact(what_does_not_fit_together_is_refused_and_said),
        fact(flags_win_over_the_file),
        fact(help_needs_no_settings_that_fit),
        fact(help_names_every_setting_and_action_with_its_default),
        fact(a_reload_keeps_what_needs_a_restart_and_says_it),
        fact(a_reload_that_changes_nothing_says_nothing),
        fact(live_settings_change_at_a_reload),
    };
    return cmocka_run_group_tests(tests, test_group_listen_in,
                                  test_group_listen_no_more);
}
