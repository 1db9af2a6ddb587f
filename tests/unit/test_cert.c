/* Chapter Certificates: dates, DER and verdicts; wrong clocks; a machine that
 * fails at every system call in turn.  What clients make of the certificates is
 * in tests/e2e/40-certificates.test.js.
 *
 * SPDX-License-Identifier: MIT
 */
#include "test.h"

#include <dirent.h>

/* ----- a folder, what was said, a clock ----------------------------------- */

static char folder[64];
static int real_stderr, capture;

static int
set_up(void **state)
{
    (void)state;
    strcpy(folder, "/tmp/collabd-test-XXXXXX");
    assert_non_null(mkdtemp(folder));
    real_stderr = dup(STDERR_FILENO);
    capture = open("/tmp", O_TMPFILE | O_RDWR | O_APPEND, 0600);
    if (capture < 0) {
        FILE *f = tmpfile();
        capture = dup(fileno(f));
        fclose(f);
    }
    dup2(capture, STDERR_FILENO);
    return 0;
}

static const char *
path_of(const char *name)
{
    static char path[400];

    (void)snprintf(path, sizeof path, "%s/%s", folder, name);
    return path;
}

static void
empty_folder(void)
{
    DIR *d = opendir(folder);

    for (struct dirent *e; (e = readdir(d)) != NULL;)
        if (e->d_name[0] != '.' || strlen(e->d_name) > 2)
            (void)unlink(path_of(e->d_name));
    closedir(d);
}

static int
tear_down(void **state)
{
    (void)state;
    dup2(real_stderr, STDERR_FILENO);
    close(real_stderr);
    close(capture);
    empty_folder();
    return rmdir(folder);
}

/* Was this said since the last question? */
static bool
said(const char *what)
{
    static char text[16384];
    off_t end = lseek(capture, 0, SEEK_END);
    ssize_t n = pread(capture, text, sizeof text - 1, 0);

    assert_true(end < (off_t)sizeof text);
    text[n < 0 ? 0 : n] = '\0';
    assert_int_equal(ftruncate(capture, 0), 0);
    return strstr(text, what) != NULL;
}

static int64_t fake_now;

static int
fake_clock(clockid_t id, struct timespec *t)
{
    (void)id;
    *t = (struct timespec){ .tv_sec = (time_t)fake_now };
    return 0;
}

/* ----- a machine that fails ----------------------------------------------- */

static int calls_until_failure; /* 0: never */
static bool lost;               /* what failed was part of writing a file */

static bool
fails_now(void)
{
    if (calls_until_failure == 0 || --calls_until_failure > 0)
        return false;
    errno = EIO;
    return true;
}

static int
failing_openat(int fd, const char *path, int flags, ...)
{
    mode_t mode = 0;

    if ((flags & O_CREAT) != 0) {
        va_list args;
        va_start(args, flags);
        mode = (mode_t)va_arg(args, int);
        va_end(args);
    }
    return fails_now() ? -1 : openat(fd, path, flags, mode);
}

static ssize_t
failing_read(int fd, void *buf, size_t len)
{
    return fails_now() ? -1 : read(fd, buf, len);
}

static ssize_t
failing_write(int fd, const void *buf, size_t len)
{
    if (!fails_now())
        return write(fd, buf, len);
    lost = true;
    return -1;
}

static int
failing_fsync(int fd)
{
    (void)fd;
    if (!fails_now())
        return 0;
    lost = true;
    return -1;
}

static int
failing_renameat(int from, const char *a, int to, const char *b)
{
    if (!fails_now())
        return renameat(from, a, to, b);
    lost = true;
    return -1;
}

static int
failing_close(int fd)
{
    close(fd);
    return fails_now() ? -1 : 0;
}

static int syncs, renames;

static int
counting_fsync(int fd)
{
    syncs++;
    return fsync(fd);
}

/* Once its bytes are safe a file takes its name, then the name is made safe. */
static int
counting_renameat(int from, const char *a, int to, const char *b)
{
    assert_int_equal(syncs, 2 * renames + 1);
    renames++;
    return renameat(from, a, to, b);
}

static unsigned interrupted;

/* A byte at a time, every other call interrupted by a signal. */
static ssize_t
slow_write(int fd, const void *buf, size_t len)
{
    if (interrupted++ % 2 == 0) {
        errno = EINTR;
        return -1;
    }
    return write(fd, buf, len > 0);
}

/* ----- files -------------------------------------------------------------- */

static const char *const files[] = { "ca-key.pem", "key.pem", "ca.pem",
                                     "ca.crt", "cert.pem" };
enum { CA_KEY, KEY, CA, CA_DER, LEAF, FILES };

static char kept[FILES][8192];
static size_t kept_len[FILES];

static size_t
slurp(const char *name, char *buf, size_t size)
{
    int fd = open(path_of(name), O_RDONLY);
    ssize_t n = fd < 0 ? 0 : read(fd, buf, size);

    if (fd >= 0)
        close(fd);
    return n < 0 ? 0 : (size_t)n;
}

static void
keep(void)
{
    for (int i = 0; i < FILES; i++)
        kept_len[i] = slurp(files[i], kept[i], sizeof kept[i]);
}

static bool
is_kept(int i)
{
    char now[8192];
    size_t n = slurp(files[i], now, sizeof now);

    return n == kept_len[i] && memcmp(now, kept[i], n) == 0;
}

static int
count_files(const char *of)
{
    DIR *d = opendir(of);
    int n = 0;

    for (struct dirent *e; (e = readdir(d)) != NULL;)
        n += strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0;
    closedir(d);
    return n;
}

static void
put(const char *name, const char *text, size_t len)
{
    int fd = open(path_of(name), O_WRONLY | O_CREAT | O_TRUNC, 0600);

    assert_true(fd >= 0);
    assert_int_equal(write(fd, text, len), len);
    close(fd);
}

/* The dates of a certificate in the folder. */
static void
dates_of(const char *name, int64_t *from, int64_t *to)
{
    static char text[8192];
    mbedtls_x509_crt crt;

    memset(text, 0, sizeof text);
    (void)slurp(name, text, sizeof text - 1);
    mbedtls_x509_crt_init(&crt);
    assert_int_equal(tls_parse_ca(&crt, (uint8_t *)text), 0);
    *from = cert_seconds(&crt.valid_from);
    *to = cert_seconds(&crt.valid_to);
    mbedtls_x509_crt_free(&crt);
}

static int
due_at(const char *path, const char **why)
{
    struct sys_file file = sys_file_at(path);
    int due = cert_due(file, path, why);

    if (file.folder >= 0)
        close(file.folder);
    return due;
}

static int
due(const char **why)
{
    return due_at(path_of("cert.pem"), why);
}

static void
assert_due(const char *expected)
{
    const char *why = NULL;

    assert_int_equal(due(&why), 1);
    assert_string_equal(why, expected);
}

static void
assert_not_due(void)
{
    const char *why = "";

    assert_int_equal(due(&why), 0);
    assert_null(why);
}

/* ----- pure parts --------------------------------------------------------- */

static void
dates_agree_with_gmtime(void **state)
{
    (void)state;
    /* a step of almost a month visits every day and hour of the calendar */
    for (int64_t at = 0; at < INT64_C(8000000000); at += 2591999) {
        time_t t = (time_t)at;
        char ours[40], theirs[40];
        struct tm tm;
        mbedtls_x509_time x;

        if ((int64_t)t != at)
            break; /* a machine where time ends in 2038 */
        gmtime_r(&t, &tm);
        (void)strftime(theirs, sizeof theirs, "%Y%m%d%H%M%S", &tm);
        cert_date(at, ours);
        assert_string_equal(ours, theirs);
        x = (mbedtls_x509_time){ .year = tm.tm_year + 1900,
                                 .mon = tm.tm_mon + 1,
                                 .day = tm.tm_mday,
                                 .hour = tm.tm_hour,
                                 .min = tm.tm_min,
                                 .sec = tm.tm_sec };
        assert_true(cert_seconds(&x) == at);
    }
}

static void
dates_cross_2038_and_leap_days(void **state)
{
    static const struct {
        int64_t at;
        const char *text;
    } cases[] = {
        { 0, "19700101000000" },
        { INT64_C(2147483647), "20380119031407" },
        { INT64_C(2147483648), "20380119031408" },
        { INT64_C(951782399), "20000228235959" },
        { INT64_C(951782400), "20000229000000" },
        { INT64_C(951868800), "20000301000000" },
        { INT64_C(4107542399), "21000228235959" },
        { INT64_C(4107542400), "21000301000000" }, /* no leap year */
        { INT64_C(1798761599), "20261231235959" },
        { INT64_C(1798761600), "20270101000000" },
        { INT64_C(253402300799), "99991231235959" },
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char text[40];
        cert_date(cases[i].at, text);
        assert_string_equal(text, cases[i].text);
    }
}

static void
der_lengths_have_the_shortest_form(void **state)
{
    static const struct {
        size_t len, head_len;
        uint8_t head[4];
    } cases[] = {
        { 0, 2, { 0x30, 0 } },
        { 127, 2, { 0x30, 127 } },
        { 128, 3, { 0x30, 0x81, 128 } },
        { 255, 3, { 0x30, 0x81, 255 } },
        { 256, 4, { 0x30, 0x82, 1, 0 } },
        { 65535, 4, { 0x30, 0x82, 0xff, 0xff } },
    };
    static uint8_t value[65535], buf[65540];

    (void)state;
    memset(value, 0xa5, sizeof value);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        size_t n = cases[i].head_len, all = n + cases[i].len, len;
        struct out o = out_over(buf, all);
        unsigned char *p = buf;

        cert_der(&o, 0x30, value, cases[i].len);
        assert_false(o.full);
        assert_ptr_equal(o.at, buf + all);
        assert_memory_equal(buf, cases[i].head, n);
        assert_memory_equal(buf + n, value, cases[i].len);
        assert_int_equal(mbedtls_asn1_get_tag(&p, buf + all, &len, 0x30), 0);
        assert_int_equal(len, cases[i].len);

        o = out_over(buf, all - 1);
        cert_der(&o, 0x30, value, cases[i].len);
        assert_true(o.full);
    }
}

static void
the_longest_constraints_fit_and_are_der(void **state)
{
    char names[3][72];
    uint8_t buf[540];
    struct out o = out_over(buf, sizeof buf);
    unsigned char *p = buf, *end;
    int trees = 0;
    size_t len;

    (void)state;
    for (int i = 0; i < 3; i++) {
        memset(names[i], 'a' + i, 71);
        names[i][71] = '\0';
    }
    cert_constraints(&o, names);
    assert_false(o.full);
    assert_int_equal(mbedtls_asn1_get_tag(&p, o.at, &len, 0x30), 0);
    assert_ptr_equal(p + len, o.at);
    assert_int_equal(mbedtls_asn1_get_tag(&p, o.at, &len, 0xa0), 0);
    end = p + len;
    assert_ptr_equal(end, o.at);
    for (; p < end; p += len, trees++) {
        size_t inner;
        assert_int_equal(mbedtls_asn1_get_tag(&p, end, &len, 0x30), 0);
        assert_true(p[0] == CERT_DNS || p[0] == CERT_IP);
        unsigned char *q = p;
        assert_int_equal(mbedtls_asn1_get_tag(&q, p + len, &inner, p[0]), 0);
        assert_ptr_equal(q + inner, p + len);
        if (p[0] == CERT_IP)
            assert_true(inner == 8 || inner == 32);
    }
    assert_int_equal(trees, 3 + 9);
}

static void
private_ranges_end_where_they_end(void **state)
{
    static const struct {
        const char *address;
        bool private;
    } cases[] = {
        { "9.255.255.255", false },
        { "10.0.0.0", true },
        { "10.255.255.255", true },
        { "11.0.0.0", false },
        { "172.15.255.255", false },
        { "172.16.0.0", true },
        { "172.31.255.255", true },
        { "172.32.0.0", false },
        { "192.167.255.255", false },
        { "192.168.0.0", true },
        { "192.168.255.255", true },
        { "192.169.0.0", false },
        { "169.253.255.255", false },
        { "169.254.0.0", true },
        { "169.255.0.0", false },
        { "126.255.255.255", false },
        { "127.0.0.1", true },
        { "128.0.0.0", false },
        { "100.63.255.255", false },
        { "100.64.0.0", true },
        { "100.127.255.255", true },
        { "100.128.0.0", false },
        { "0.0.0.0", false },
        { "255.255.255.255", false },
        { "::", false },
        { "::1", true },
        { "::2", false },
        { "::1:0:0:1", false },
        { "fbff::1", false },
        { "fc00::", true },
        { "fdff:ffff::1", true },
        { "fe00::", false },
        { "fe7f::", false },
        { "fe80::1", true },
        { "febf::1", true },
        { "fec0::1", false },
        { "2001:db8::1", false },
        { "::ffff:10.0.0.1", false },
        { "a00::1", false },
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        bool six = strchr(cases[i].address, ':') != NULL;
        uint8_t at[16];
        assert_int_equal(
            inet_pton(six ? AF_INET6 : AF_INET, cases[i].address, at), 1);
        if (cert_is_private(at, six ? 16 : 4) != cases[i].private)
            fail_msg("%s", cases[i].address);
    }
}

static void
hostnames_are_letters_digits_and_inner_hyphens(void **state)
{
    static const char *const good[] = { "a",    "box",  "my-box",
                                        "3",    "a.b",  "box.example.org",
                                        "x--y", "9-9.a" };
    static const char *const bad[] = { "",     ".",      "-",         "a.",
                                       ".a",   "a..b",   "-a",        "a-",
                                       "a-.b", "a.-b",   "my_box",    "a b",
                                       "Box",  "(none)", "b\xc3\xbc", "a\n",
                                       "*.a",  "a,CN=b", "a\\",       "a+b" };
    char label[66] = "";

    (void)state;
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++)
        assert_true(cert_is_hostname(good[i]));
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        if (cert_is_hostname(bad[i]))
            fail_msg("%s", bad[i]);
    memset(label, 'a', 63);
    assert_true(cert_is_hostname(label));
    label[63] = 'a';
    assert_false(cert_is_hostname(label));
}

/* ----- verdicts ----------------------------------------------------------- */

static void
a_fresh_leaf_is_not_due(void **state)
{
    (void)state;
    assert_int_equal(cert_make(folder), 0);
    assert_true(said("info: "));
    assert_not_due();
    assert_false(said(":")); /* judging says nothing */
    assert_int_equal(count_files(folder), FILES);
}

static void
a_spoiled_folder_is_due_or_cannot_be_judged(void **state)
{
    const char *why;

    (void)state;
    assert_int_equal(cert_make(folder), 0);
    keep();
    unlink(path_of("cert.pem"));
    assert_due("there was none");
    put("cert.pem", kept[LEAF], kept_len[LEAF] - kept_len[CA]);
    assert_due("ca.pem was not behind it");
    put("cert.pem", kept[LEAF], kept_len[LEAF]);
    put("key.pem", kept[CA_KEY], kept_len[CA_KEY]);
    assert_due("key.pem was not its key");
    unlink(path_of("key.pem"));
    assert_due("key.pem was not its key");
    put("key.pem", kept[KEY], kept_len[KEY]);
    assert_not_due();

    for (size_t cut = 0; cut < kept_len[LEAF] - kept_len[CA] - 1; cut += 37) {
        put("cert.pem", kept[LEAF], cut);
        assert_int_equal(due(&why), -1);
        assert_true(said("cert.pem is not a certificate"));
    }
    put("cert.pem", kept[LEAF], kept_len[LEAF]);
    for (size_t cut = 0; cut < kept_len[CA] - 1; cut += 37) {
        put("ca.pem", kept[CA], cut);
        assert_int_equal(due(&why), -1);
        assert_true(said("ca.pem is not a certificate"));
    }
    put("ca.pem", kept[CA], kept_len[CA]);
    for (size_t cut = 0; cut < kept_len[KEY] - 1; cut += 37) {
        put("key.pem", kept[KEY], cut);
        assert_int_equal(due(&why), -1);
        assert_true(said("key.pem is not a private key"));
    }
}

static void
what_is_not_ours_is_not_due(void **state)
{
    const char *why = "";

    (void)state;
    assert_int_equal(cert_make(folder), 0);
    keep();
    empty_folder();
    assert_int_equal(cert_make(folder), 0); /* another CA */
    put("cert.pem", kept[LEAF], kept_len[LEAF]);
    put("key.pem", kept[KEY], kept_len[KEY]);
    assert_not_due();
    assert_int_equal(cert_make(folder), -1);
    assert_true(said("was not issued by the ca.pem there"));

    assert_int_equal(due_at(path_of("other.pem"), &why), 0);
    assert_null(why);
    unlink(path_of("ca-key.pem"));
    assert_not_due();
    assert_int_equal(due_at("/nowhere/at/all/cert.pem", &why), 0);
}

/* ----- clocks ------------------------------------------------------------- */

static void
a_clock_before_the_build_counts_as_the_build(void **state)
{
    int64_t from, to;

    (void)state;
    sys.clock_gettime = fake_clock;
    fake_now = 1000;
    assert_int_equal(cert_make(folder), 0);
    dates_of("ca.pem", &from, &to);
    assert_true(from == COLLABD_BUILD_EPOCH - CERT_DAY);
    assert_true(to == COLLABD_BUILD_EPOCH + 3650 * (int64_t)CERT_DAY);
    dates_of("cert.pem", &from, &to);
    assert_true(from == COLLABD_BUILD_EPOCH - CERT_DAY);
    assert_true(to - from < 397 * (int64_t)CERT_DAY);
    sys.clock_gettime = clock_gettime;
}

static void
a_leaf_is_due_thirty_days_before_its_end(void **state)
{
    int64_t from, to, next;

    (void)state;
    sys.clock_gettime = fake_clock;
    fake_now = COLLABD_BUILD_EPOCH + 1000;
    assert_int_equal(cert_make(folder), 0);
    keep();
    dates_of("cert.pem", &from, &to);
    fake_now = to - 30 * CERT_DAY;
    assert_not_due();
    fake_now++;
    assert_due("it had less than 30 days left");
    assert_int_equal(cert_make(folder), 0);
    assert_true(said("cert.pem issued, because it had less than 30 days"));
    dates_of("cert.pem", &from, &next);
    assert_true(next == fake_now + 395 * (int64_t)CERT_DAY);
    assert_true(is_kept(CA) && is_kept(CA_KEY) && is_kept(KEY));
    assert_not_due();
    sys.clock_gettime = clock_gettime;
}

static void
a_clock_set_back_throws_nothing_away(void **state)
{
    int64_t from, to;

    (void)state;
    sys.clock_gettime = fake_clock;
    fake_now = COLLABD_BUILD_EPOCH + 500 * (int64_t)CERT_DAY;
    assert_int_equal(cert_make(folder), 0);
    keep();
    fake_now = 0;
    assert_not_due();
    assert_true(said("is not valid before"));
    assert_int_equal(cert_make(folder), 0);
    for (int i = 0; i < FILES; i++)
        assert_true(is_kept(i));

    /* issued now, it begins no earlier than the CA: it will still be good when
     * the clock is right */
    unlink(path_of("cert.pem"));
    assert_int_equal(cert_make(folder), 0);
    dates_of("cert.pem", &from, &to);
    assert_true(from == COLLABD_BUILD_EPOCH + 499 * (int64_t)CERT_DAY);
    sys.clock_gettime = clock_gettime;
}

static void
a_ca_warns_then_ends_and_is_never_replaced(void **state)
{
    int64_t from, to, leaf_from, leaf_to;
    const char *why;

    (void)state;
    sys.clock_gettime = fake_clock;
    fake_now = COLLABD_BUILD_EPOCH;
    assert_int_equal(cert_make(folder), 0);
    dates_of("ca.pem", &from, &to);
    keep();
    fake_now = to - 90 * CERT_DAY;
    assert_int_equal(cert_make(folder), 0);
    assert_false(said("warning: "));
    dates_of("cert.pem", &leaf_from, &leaf_to);
    assert_true(leaf_to == to); /* clipped, and so not due for ever */
    fake_now++;
    assert_not_due();
    assert_true(said("ca.pem ends on "));
    fake_now = to;
    assert_not_due();
    fake_now++;
    assert_int_equal(due(&why), -1);
    (void)said("");
    assert_int_equal(cert_make(folder), -1);
    assert_true(said("if the clock is right, move all files there away"));
    assert_true(is_kept(CA) && is_kept(CA_KEY));
    sys.clock_gettime = clock_gettime;
}

static void
dates_beyond_2050_are_written_right(void **state)
{
    int64_t from, to;

    (void)state;
    if (sizeof(time_t) < 8)
        skip();
    sys.clock_gettime = fake_clock;
    fake_now = (time_t)INT64_C(2400000000); /* 2046; the CA ends in 2056 */
    assert_int_equal(cert_make(folder), 0);
    dates_of("ca.pem", &from, &to);
    assert_true(to == fake_now + 3650 * (int64_t)CERT_DAY);
    assert_not_due();
    sys.clock_gettime = clock_gettime;
}

/* ----- failures ----------------------------------------------------------- */

static void
fail_at(int n)
{
    calls_until_failure = n;
    sys.openat = n > 0 ? failing_openat : openat;
    sys.read = n > 0 ? failing_read : read;
    sys.write = n > 0 ? failing_write : write;
    sys.fsync = n > 0 ? failing_fsync : fsync;
    sys.renameat = n > 0 ? failing_renameat : renameat;
    sys.close = n > 0 ? failing_close : close;
}

/* Runs `cert_make` once for each n with the n-th call failing.  Each time the
 * folder is whole, nothing is left open, and the next run mends it.  Files not
 * in `may_change` stay. */
static void
every_call_fails_once(bool fresh, unsigned may_change)
{
    int open_before = count_files("/proc/self/fd");
    int n = 1, failed = 0;

    if (!fresh) {
        assert_int_equal(cert_make(folder), 0);
        unlink(path_of("cert.pem"));
    }
    keep();
    for (;; n++) {
        bool reached;
        int done;

        if (fresh)
            empty_folder();
        else
            unlink(path_of("cert.pem"));
        (void)said("");
        lost = false;
        fail_at(n);
        done = cert_make(folder);
        reached = calls_until_failure == 0;
        fail_at(0);
        if (done != 0) {
            assert_true(said("error: "));
            failed++;
        }
        assert_true(done != 0 || !lost);
        for (int i = 0; i < FILES; i++)
            if ((may_change >> i & 1) == 0)
                assert_true(is_kept(i));
        for (int i = 0; i < FILES; i++) {
            char temp[32];
            (void)snprintf(temp, sizeof temp, ".%s.new", files[i]);
            assert_int_equal(access(path_of(temp), F_OK), -1);
        }
        assert_int_equal(count_files("/proc/self/fd"), open_before);
        assert_int_equal(cert_make(folder), 0);
        (void)said("");
        assert_not_due();
        if (!reached) {
            assert_int_equal(done, 0);
            break;
        }
    }
    assert_true(failed > n / 2);
}

static void
every_call_may_fail_in_a_new_folder(void **state)
{
    (void)state;
    every_call_fails_once(true, ~0u);
}

static void
every_call_may_fail_when_a_leaf_is_issued(void **state)
{
    (void)state;
    every_call_fails_once(false, 1u << LEAF);
}

static void
bytes_are_safe_before_they_take_their_name(void **state)
{
    (void)state;
    syncs = renames = 0;
    sys.fsync = counting_fsync;
    sys.renameat = counting_renameat;
    assert_int_equal(cert_make(folder), 0);
    fail_at(0);
    assert_int_equal(renames, FILES);
    assert_int_equal(syncs, 2 * FILES);
}

static void
interrupted_and_short_writes_go_on(void **state)
{
    (void)state;
    sys.write = slow_write;
    assert_int_equal(cert_make(folder), 0);
    sys.write = write;
    assert_true(interrupted > 4000);
    assert_not_due();
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(dates_agree_with_gmtime),
        cmocka_unit_test(dates_cross_2038_and_leap_days),
        cmocka_unit_test(der_lengths_have_the_shortest_form),
        cmocka_unit_test(the_longest_constraints_fit_and_are_der),
        cmocka_unit_test(private_ranges_end_where_they_end),
        cmocka_unit_test(hostnames_are_letters_digits_and_inner_hyphens),
#define IN_A_FOLDER(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)
        IN_A_FOLDER(a_fresh_leaf_is_not_due),
        IN_A_FOLDER(a_spoiled_folder_is_due_or_cannot_be_judged),
        IN_A_FOLDER(what_is_not_ours_is_not_due),
        IN_A_FOLDER(a_clock_before_the_build_counts_as_the_build),
        IN_A_FOLDER(a_leaf_is_due_thirty_days_before_its_end),
        IN_A_FOLDER(a_clock_set_back_throws_nothing_away),
        IN_A_FOLDER(a_ca_warns_then_ends_and_is_never_replaced),
        IN_A_FOLDER(dates_beyond_2050_are_written_right),
        IN_A_FOLDER(every_call_may_fail_in_a_new_folder),
        IN_A_FOLDER(every_call_may_fail_when_a_leaf_is_issued),
        IN_A_FOLDER(bytes_are_safe_before_they_take_their_name),
        IN_A_FOLDER(interrupted_and_short_writes_go_on),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
