/* A request head, and all that the server asks of it: verdict, upgrade, room
 * name, token, host, origin, and a file in a small folder.
 *
 * SPDX-License-Identifier: MIT
 */
#include "fuzz.h"

static char folder[] = "/tmp/collabd-fuzz-XXXXXX";
static int www;
static struct stat secret;
static struct cfg cfg;

static const char *const files[] = { "www/index.html", "www/a.js",
                                     "www/a.js.gz", "www/sub/index.html",
                                     "secret" };

static void
path_of(char path[100], const char *name)
{
    (void)snprintf(path, 100, "%s/%s", folder, name);
}

static void
clean_up(void)
{
    char path[100];

    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        path_of(path, files[i]);
        (void)unlink(path);
    }
    path_of(path, "www/link");
    (void)unlink(path);
    path_of(path, "www/sub");
    (void)rmdir(path);
    path_of(path, "www");
    (void)rmdir(path);
    (void)rmdir(folder);
}

int
LLVMFuzzerInitialize(int *argc, char ***argv)
{
    char path[100];

    (void)argc, (void)argv;
    fuzz_quiet();
    if (mkdtemp(folder) == NULL)
        abort();
    (void)atexit(clean_up);
    path_of(path, "www");
    (void)mkdir(path, 0700);
    path_of(path, "www/sub");
    (void)mkdir(path, 0700);
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        int fd;
        path_of(path, files[i]);
        fd = open(path, O_CREAT | O_WRONLY, 0600);
        if (fd < 0 || write(fd, "0123456789", 10) != 10)
            abort();
        (void)close(fd);
    }
    (void)stat(path, &secret);
    path_of(path, "www/link");
    (void)symlink("../secret", path);
    path_of(path, "www");
    www = open(path, O_RDONLY | O_DIRECTORY);
    cfg_defaults(&cfg);
    (void)cfg_set(&cfg, cfg_find(span_text("origin")),
                  span_text("https://a.example"), "fuzz");
    (void)cfg_set(&cfg, cfg_find(span_text("host")), span_text("b.example"),
                  "fuzz");
    (void)cfg_set(&cfg, cfg_find(span_text("trust-proxy")),
                  span_text("10.0.0.1,::1"), "fuzz");
    return 0;
}

static void
check_verdict(struct verdict v)
{
    assert(v.status == 0 || (v.status >= 400 && v.status < 600));
    assert(v.status == 0 || (*v.why != '\0' && strchr(v.why, '\n') == NULL));
    assert(strcmp(http_reason(v.status == 0 ? 200 : v.status),
                  "Internal Server Error") != 0);
}

/* Does the span lie in the head, or is it empty or one of our own texts? */
static void
check_inside(struct span s, struct span head)
{
    assert(s.at <= s.end);
    if (!span_is_empty(s) && !span_is(s, "/"))
        assert(s.at >= head.at && s.end <= head.end);
}

static void
check_room_name(struct span path)
{
    uint8_t name[COLLABD_NAME_MAX], len = 0;
    struct verdict v = http_room_name(path, name, &len);
    struct utf8 utf8 = { 0, 0, 0 };
    struct span rest = span_of(name, len);

    check_verdict(v);
    if (v.status != 0)
        return;
    assert(len >= 1 && len <= COLLABD_NAME_MAX);
    assert(utf8_check(&utf8, rest) && utf8_is_complete(&utf8));
    while (!span_is_empty(rest)) {
        struct span part = span_cut(&rest, '/');
        assert(!span_is_empty(part) && !span_is(part, ".") &&
               !span_is(part, ".."));
        for (struct span s = part; s.at < s.end; s.at++)
            assert(*s.at >= ' ' && *s.at != 0x7f);
    }
}

static void
check_file(const struct http *h)
{
    struct file f = file_find(www, h);
    struct stat st;

    assert(f.status == 200 || f.status == 206 || f.status == 301 ||
           f.status == 304 || f.status == 404 || f.status == 416);
    if (f.status == 200 || f.status == 206)
        assert(f.from <= f.to && f.to <= f.size && f.type != NULL);
    if (f.fd < 0)
        return;
    assert(f.status == 200 || f.status == 206);
    assert(fstat(f.fd, &st) == 0 && S_ISREG(st.st_mode));
    assert(st.st_ino != secret.st_ino || st.st_dev != secret.st_dev);
    (void)close(f.fd);
}

static void
check_access(const struct http *h)
{
    uint8_t peer[16] = { 0 };
    char why[400];

    (void)access_host_is_ours(&cfg, "box", h->host);
    (void)access_origin(&cfg, h);
    access_why_foreign(h->origin, why, sizeof why);
    (void)access_forwarded(&cfg, h, peer);
}

static void
check_request(struct span head, const struct http *h)
{
    struct span value = { NULL, NULL }, path = h->path;
    uint8_t text[COLLABD_TARGET_MAX + 64];
    struct out o = out_over(text, sizeof text);
    uint64_t n;

    assert(h->method < HTTP_METHODS && h->method != HTTP_CONNECT);
    assert(h->minor >= 0 && h->minor <= 9);
    assert(h->forwarded_count <= HTTP_FORWARDED);
    assert(h->hosts > 0 || h->minor == 0);
    check_inside(h->path, head);
    check_inside(h->query, head);
    check_inside(h->host, head);
    check_inside(h->origin, head);
    check_inside(h->bearer, head);
    check_inside(h->cookies, head);
    check_inside(h->key, head);
    check_inside(h->accept_encoding, head);
    assert(!span_is_empty(path) && span_len(path) <= COLLABD_TARGET_MAX);
    for (struct span s = path; s.at < s.end; s.at++)
        assert(*s.at > ' ' && *s.at < 0x7f);
    (void)http_persists(h);
    (void)http_has_body(h);
    if (http_is_upgrade(h)) {
        struct verdict v = http_judge_upgrade(h);
        check_verdict(v);
        if (v.status == 0) {
            http_accept(h->key, &o);
            assert(!o.full && o.at - text == 28);
        }
    }
    if (span_starts(path, "/ws/")) {
        path.at += 4;
        check_room_name(path);
    }
    if (http_query(h->query, "token", &value))
        check_inside(value, head);
    if (http_query(h->query, "history", &value))
        (void)span_decimal(value, UINT32_MAX, &n);
    if (http_cookie(h->cookies, "collabd_token", &value))
        check_inside(value, head);
    (void)http_accepts_gzip(h->accept_encoding);
    check_access(h);
    check_file(h);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    struct span in = span_of(data, len), head, again, cut;
    struct http h;
    struct verdict v;
    enum parse found = http_head(&in, &head);

    /* any bytes as a head, too: it must not read on */
    (void)http_parse(span_of(data, len), &h);
    check_room_name(span_of(data, len));
    if (found != PARSE_OK) {
        assert(in.at == data);
        return 0;
    }
    assert(head.at >= data && head.end + 2 == in.at && in.end == data + len);
    /* one byte less is not yet a head, and what follows does not matter */
    again = (struct span){ data, in.at - 1 };
    assert(http_head(&again, &cut) == PARSE_MORE);
    again = (struct span){ data, in.at };
    assert(http_head(&again, &cut) == PARSE_OK && span_equals(cut, head));
    v = http_parse(head, &h);
    check_verdict(v);
    if (v.status == 0)
        check_request(head, &h);
    return 0;
}
