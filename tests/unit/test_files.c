/* Chapter Files: what is found in a folder and what is not, ranges, tags,
 * packed twins.
 *
 * SPDX-License-Identifier: MIT
 */
#include "test.h"

static char folder[64];
static int www;

static const char *
path_of(const char *name)
{
    static char path[2][400];
    static unsigned turn;
    char *p = path[turn++ % 2];

    (void)snprintf(p, sizeof path[0], "%s/%s", folder, name);
    return p;
}

static void
put(const char *name, const char *text)
{
    FILE *f = fopen(path_of(name), "w");

    assert_non_null(f);
    (void)fputs(text, f);
    (void)fclose(f);
}

static const char *const all_files[] = {
    "www/index.html", "www/a.txt", "www/b.js", "www/b.js.gz", "www/only.css.gz",
    "www/empty", "www/with space", "www/.hidden", "www/sub/index.html",
    "www/sub/deep/x.wasm", "www/bare/x", "secret",
};

static int
begin_all(void **state)
{
    (void)state;
    (void)strcpy(folder, "/tmp/collabd-test-XXXXXX");
    assert_non_null(mkdtemp(folder));
    assert_int_equal(mkdir(path_of("www"), 0700), 0);
    assert_int_equal(mkdir(path_of("www/sub"), 0700), 0);
    assert_int_equal(mkdir(path_of("www/sub/deep"), 0700), 0);
    assert_int_equal(mkdir(path_of("www/bare"), 0700), 0);
    for (size_t i = 0; i < sizeof all_files / sizeof *all_files; i++)
        put(all_files[i], all_files[i]);
    put("www/empty", "");
    put("www/a.txt", "0123456789");
    assert_int_equal(symlink("../secret", path_of("www/link")), 0);
    assert_int_equal(symlink("a.txt", path_of("www/inner")), 0);
    assert_int_equal(symlink("sub", path_of("www/dirlink")), 0);
    assert_int_equal(symlink("a.txt", path_of("www/a.txt.gz")), 0);
    assert_int_equal(mkfifo(path_of("www/pipe"), 0600), 0);
    www = open(path_of("www"), O_RDONLY | O_DIRECTORY);
    return www < 0;
}

static int
end_all(void **state)
{
    static const char *const rest[] = { "www/link", "www/inner", "www/dirlink",
                                        "www/a.txt.gz", "www/pipe" };

    (void)state;
    (void)close(www);
    for (size_t i = 0; i < sizeof all_files / sizeof *all_files; i++)
        (void)unlink(path_of(all_files[i]));
    for (size_t i = 0; i < sizeof rest / sizeof *rest; i++)
        (void)unlink(path_of(rest[i]));
    (void)rmdir(path_of("www/sub/deep"));
    (void)rmdir(path_of("www/sub"));
    (void)rmdir(path_of("www/bare"));
    (void)rmdir(path_of("www"));
    return rmdir(folder);
}

/* ----- asking ----------------------------------------------------------- */

static struct file f;
static int first_free; /* descriptor: none may leak */

static int
ask(const struct http *h)
{
    int probe = dup(www);

    first_free = probe;
    (void)close(probe);
    f = file_find(www, h);
    return f.status;
}

static int
get(const char *path)
{
    return ask(&(struct http){ .path = test_span_at_edge(path, strlen(path)) });
}

/* The whole of what would be sent; closes it. */
static const char *
body(void)
{
    static char text[300];
    size_t len = (size_t)(f.to - f.from);
    int probe;

    memset(text, 0, sizeof text);
    if (f.fd >= 0) {
        assert_int_equal(pread(f.fd, text, len, (off_t)f.from), len);
        (void)close(f.fd);
    }
    probe = dup(www);
    assert_int_equal(probe, first_free);
    (void)close(probe);
    return text;
}

/* ----- what is found ---------------------------------------------------- */

static void
each_path_finds_its_file_or_nothing(void **state)
{
    static const struct {
        const char *path;
        int status;
        const char *text;
    } cases[] = {
        { "/", 200, "www/index.html" },
        { "/index.html", 200, "www/index.html" },
        { "/a.txt", 200, "0123456789" },
        { "/empty", 200, "" },
        { "/with%20space", 200, "www/with space" },
        { "/%61%2etxt", 200, "0123456789" },
        { "/.hidden", 200, "www/.hidden" },
        { "/sub/", 200, "www/sub/index.html" },
        { "/sub/deep/x.wasm", 200, "www/sub/deep/x.wasm" },
        { "/sub", 301, "" },
        { "/sub/deep", 301, "" },
        { "/bare", 301, "" },
        { "/bare/", 404, "" },
        { "/nothing", 404, "" },
        { "/nothing/x", 404, "" },
        { "/a.txt/", 404, "" },
        { "/a.txt/x", 404, "" },
        { "//a.txt", 404, "" },
        { "/sub//index.html", 404, "" },
        { "/.", 404, "" },
        { "/..", 404, "" },
        { "/./a.txt", 404, "" },
        { "/../secret", 404, "" },
        { "/sub/..", 404, "" },
        { "/sub/../a.txt", 404, "" },
        { "/sub/../../secret", 404, "" },
        { "/%2e%2e/secret", 404, "" },
        { "/..%2fsecret", 404, "" },
        { "/..%2Fsecret", 404, "" },
        { "/sub%2findex.html", 404, "" },
        { "/%2e%2e%2fsecret", 404, "" },
        { "/..\\secret", 404, "" },
        { "/link", 404, "" },
        { "/inner", 404, "" },
        { "/dirlink", 404, "" },
        { "/dirlink/", 404, "" },
        { "/dirlink/index.html", 404, "" },
        { "/pipe", 404, "" },
        { "/a.txt%00", 404, "" },
        { "/a.txt%00.html", 404, "" },
        { "/%", 404, "" },
        { "/%4", 404, "" },
        { "/%zz", 404, "" },
        { "/a.txt%2", 404, "" },
        { "*", 404, "" },
        { "a.txt", 404, "" },
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        if (get(cases[i].path) != cases[i].status)
            fail_msg("%s: %d", cases[i].path, f.status);
        assert_int_equal(f.fd >= 0, cases[i].status == 200);
        assert_string_equal(body(), cases[i].text);
        if (f.status == 200)
            assert_true(f.from == 0 && f.to == f.size &&
                        f.size == strlen(cases[i].text));
    }
}

static void
every_prefix_of_a_path_is_judged_without_reading_on(void **state)
{
    static const char path[] = "/sub/%64eep/../deep/x.wasm%2f%00";

    (void)state;
    for (size_t n = 0; n < sizeof path; n++) {
        struct http h = { .path = test_span_at_edge(path, n) };
        if (n == 0)
            h.path = span_text("/");
        (void)ask(&h);
        (void)body();
    }
}

static void
the_longest_target_does_not_overflow(void **state)
{
    static char path[COLLABD_TARGET_MAX + 1];

    (void)state;
    for (size_t len = COLLABD_TARGET_MAX - 20; len <= COLLABD_TARGET_MAX;
         len++) {
        path[0] = '/';
        memset(path + 1, 'x', len - 1);
        path[len] = '\0';
        assert_int_equal(get(path), 404);
        (void)body();
        path[len - 1] = '/';
        assert_int_equal(get(path), 404);
        (void)body();
        memset(path + 1, '/', len - 1);
        assert_int_equal(get(path), 404);
        (void)body();
        for (size_t i = 1; i + 1 < len; i += 2)
            memcpy(path + i, "a/", 2);
        assert_int_equal(get(path), 404);
        (void)body();
    }
}

static void
types_go_by_the_last_extension_in_any_case(void **state)
{
    (void)state;
    assert_string_equal(file_type("a.html"), "text/html; charset=utf-8");
    assert_string_equal(file_type("a.tar.JS"),
                        "text/javascript; charset=utf-8");
    assert_string_equal(file_type("x.wasm"), "application/wasm");
    assert_string_equal(file_type("x"), "application/octet-stream");
    assert_string_equal(file_type("html"), "application/octet-stream");
    assert_string_equal(file_type("x."), "application/octet-stream");
    assert_string_equal(file_type(".png"), "image/png");
    assert_string_equal(file_type("x.htmlx"), "application/octet-stream");
    (void)get("/sub/deep/x.wasm");
    assert_string_equal(f.type, "application/wasm");
    (void)body();
    (void)get("/sub/");
    assert_string_equal(f.type, "text/html; charset=utf-8");
    (void)body();
}

/* ----- packed twins ----------------------------------------------------- */

static int
get_accepting(const char *path, const char *encodings)
{
    return ask(&(struct http){ .path = span_text(path),
                               .accept_encoding = span_text(encodings) });
}

static void
the_packed_twin_is_sent_to_whom_it_pleases(void **state)
{
    char plain[48];

    (void)state;
    assert_int_equal(get_accepting("/b.js", "br, gzip"), 200);
    assert_true(f.gzip && f.has_gzip);
    assert_string_equal(f.type, "text/javascript; charset=utf-8");
    assert_string_equal(body(), "www/b.js.gz");
    assert_int_equal(get_accepting("/b.js", "br"), 200);
    assert_true(!f.gzip && f.has_gzip);
    assert_string_equal(body(), "www/b.js");
    (void)strcpy(plain, f.etag);
    (void)get_accepting("/b.js", "gzip");
    assert_string_not_equal(f.etag, plain);
    (void)body();
    /* none beside it; a link beside it; only the packed one is there */
    assert_int_equal(get_accepting("/sub/index.html", "gzip"), 200);
    assert_false(f.gzip || f.has_gzip);
    (void)body();
    assert_int_equal(get_accepting("/a.txt", "gzip"), 200);
    assert_false(f.gzip || f.has_gzip);
    (void)body();
    assert_int_equal(get_accepting("/only.css", "gzip"), 404);
    (void)body();
}

/* ----- tags ------------------------------------------------------------- */

static void
a_tag_changes_with_the_file(void **state)
{
    char tag[48];
    struct timespec times[2] = { { 1000, 5 }, { 1000, 5 } };

    (void)state;
    put("www/bare/x", "one");
    assert_int_equal(get("/bare/x"), 200);
    assert_true(f.etag[0] == '"' && f.etag[strlen(f.etag) - 1] == '"');
    (void)strcpy(tag, f.etag);
    (void)body();
    (void)get("/bare/x");
    assert_string_equal(f.etag, tag);
    (void)body();
    put("www/bare/x", "longer");
    (void)get("/bare/x");
    assert_string_not_equal(f.etag, tag);
    (void)body();
    for (int i = 0; i < 3; i++) { /* by size, by second, by nanosecond */
        times[1].tv_sec += i == 1;
        times[1].tv_nsec += i == 2;
        (void)strcpy(tag, f.etag);
        assert_int_equal(utimensat(AT_FDCWD, path_of("www/bare/x"), times, 0),
                         0);
        (void)get("/bare/x");
        assert_string_not_equal(f.etag, tag);
        (void)body();
    }
}

static void
a_known_tag_saves_the_body(void **state)
{
    char tag[48], list[200];
    struct http h = { .path = span_text("/a.txt") };

    (void)state;
    (void)ask(&h);
    (void)strcpy(tag, f.etag);
    (void)body();
#define IF_NONE_MATCH(format, status)                                        \
    do {                                                                     \
        (void)snprintf(list, sizeof list, format, tag);                      \
        h.if_none_match = span_text(list);                                   \
        assert_int_equal(ask(&h), status);                                   \
        assert_int_equal(f.fd >= 0, (status) < 300);                         \
        (void)body();                                                        \
    } while (0)
    IF_NONE_MATCH("%s", 304);
    IF_NONE_MATCH("\"x\", %s , \"y\"", 304);
    IF_NONE_MATCH("W/%s", 304);
    IF_NONE_MATCH("*%.0s", 304);
    IF_NONE_MATCH("\"x\"%.0s", 200);
    IF_NONE_MATCH("x%s", 200);
    h.range = span_text("bytes=0-1"); /* and no range then */
    IF_NONE_MATCH("%s", 304);
    IF_NONE_MATCH("\"x\"%.0s", 206);
}

/* ----- ranges ----------------------------------------------------------- */

static void
each_range_gives_its_part(void **state)
{
    static const struct {
        const char *range;
        int status;
        const char *text;
    } cases[] = {
        { "bytes=0-0", 206, "0" },
        { "bytes=0-9", 206, "0123456789" },
        { "bytes=2-4", 206, "234" },
        { "bytes=9-9", 206, "9" },
        { "bytes=5-", 206, "56789" },
        { "bytes=5-100", 206, "56789" },
        { "bytes=0-18446744073709551615", 206, "0123456789" },
        { "bytes=-1", 206, "9" },
        { "bytes=-3", 206, "789" },
        { "bytes=-10", 206, "0123456789" },
        { "bytes=-11", 206, "0123456789" },
        { "bytes=-99999999999999999999999", 206, "0123456789" },
        { "Bytes=1-1", 206, "1" },
        { "bytes= 1 - 2 ", 206, "12" },
        { "bytes=10-", 416, "" },
        { "bytes=10-10", 416, "" },
        { "bytes=99-100", 416, "" },
        { "bytes=99999999999999999999999-", 416, "" },
        { "bytes=-0", 416, "" },
        /* what is no range is passed over */
        { "", 200, "0123456789" },
        { "bytes", 200, "0123456789" },
        { "bytes=", 200, "0123456789" },
        { "bytes=-", 200, "0123456789" },
        { "bytes=3", 200, "0123456789" },
        { "bytes=a-b", 200, "0123456789" },
        { "bytes=1-x", 200, "0123456789" },
        { "bytes=+1-2", 200, "0123456789" },
        { "bytes=4-2", 200, "0123456789" },
        { "bytes=--1", 200, "0123456789" },
        { "bytes=0-1,3-4", 200, "0123456789" },
        { "items=0-1", 200, "0123456789" },
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct http h = { .path = span_text("/a.txt") };
        h.range = test_span_at_edge(cases[i].range, strlen(cases[i].range));
        if (ask(&h) != cases[i].status)
            fail_msg("%s: %d", cases[i].range, f.status);
        assert_int_equal(f.fd >= 0, cases[i].status != 416);
        assert_true(f.size == 10);
        if (f.status == 416)
            (void)body();
        else
            assert_string_equal(body(), cases[i].text);
    }
}

static void
an_empty_file_has_no_range(void **state)
{
    static const char *const ranges[] = { "bytes=0-", "bytes=0-0", "bytes=-1" };

    (void)state;
    for (size_t i = 0; i < 3; i++) {
        struct http h = { .path = span_text("/empty"),
                          .range = span_text(ranges[i]) };
        assert_int_equal(ask(&h), 416);
        (void)body();
    }
}

static void
if_range_needs_the_very_tag(void **state)
{
    char tag[60];
    struct http h = { .path = span_text("/a.txt"),
                      .range = span_text("bytes=1-2") };

    (void)state;
    (void)ask(&h);
    (void)snprintf(tag, sizeof tag, "%s", f.etag);
    (void)body();
    h.if_range = span_text(tag);
    assert_int_equal(ask(&h), 206);
    (void)body();
    h.if_range = span_text("\"other\"");
    assert_int_equal(ask(&h), 200);
    (void)body();
    (void)snprintf(tag, sizeof tag, "W/%.50s", f.etag); /* strong comparison */
    h.if_range = span_text(tag);
    assert_int_equal(ask(&h), 200);
    (void)body();
    h.if_range = span_text("Tue, 24 Nov 2026 00:00:00 GMT");
    assert_int_equal(ask(&h), 200);
    (void)body();
}

static void
a_head_opens_nothing_and_has_no_ranges(void **state)
{
    struct http h = { .method = HTTP_HEAD, .path = span_text("/a.txt"),
                      .range = span_text("bytes=1-2") };

    (void)state;
    assert_int_equal(ask(&h), 200);
    assert_int_equal(f.fd, -1);
    assert_true(f.to - f.from == 10);
    (void)body();
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_path_finds_its_file_or_nothing),
        cmocka_unit_test(every_prefix_of_a_path_is_judged_without_reading_on),
        cmocka_unit_test(the_longest_target_does_not_overflow),
        cmocka_unit_test(types_go_by_the_last_extension_in_any_case),
        cmocka_unit_test(the_packed_twin_is_sent_to_whom_it_pleases),
        cmocka_unit_test(a_tag_changes_with_the_file),
        cmocka_unit_test(a_known_tag_saves_the_body),
        cmocka_unit_test(each_range_gives_its_part),
        cmocka_unit_test(an_empty_file_has_no_range),
        cmocka_unit_test(if_range_needs_the_very_tag),
        cmocka_unit_test(a_head_opens_nothing_and_has_no_ranges),
    };
    return cmocka_run_group_tests(tests, begin_all, end_all);
}
