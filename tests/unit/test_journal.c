/* Chapter Journal: what was acknowledged is found again, whatever happens to
 * the file, the disk or the process.
 *
 * SPDX-License-Identifier: MIT
 */
#include "test.h"

/* ----- a file in memory -------------------------------------------------
 * Where many files are read, reading goes to `image` instead of the disk. */

static uint8_t image[1 << 17];
static size_t image_len;
static size_t pread_most = SIZE_MAX; /* bytes at a time */
static unsigned preads;

static ssize_t
image_pread(int fd, void *to, size_t len, off_t at)
{
    size_t left = (size_t)at < image_len ? image_len - (size_t)at : 0;

    (void)fd;
    preads++;
    if (preads % 5 == 0) {
        errno = EINTR;
        return -1;
    }
    len = len < left ? len : left;
    len = len < pread_most ? len : pread_most;
    memcpy(to, image + at, len);
    return (ssize_t)len;
}

static ssize_t
image_pwritev(int fd, const struct iovec *parts, int count, off_t at)
{
    size_t end = (size_t)at;

    (void)fd;
    for (int i = 0; i < count; i++) {
        assert_true(end + parts[i].iov_len <= sizeof image);
        if (parts[i].iov_len > 0)
            memcpy(image + end, parts[i].iov_base, parts[i].iov_len);
        end += parts[i].iov_len;
    }
    image_len = end > image_len ? end : image_len;
    return (ssize_t)(end - (size_t)at);
}

static int
image_ftruncate(int fd, off_t len)
{
    (void)fd;
    assert_true((size_t)len <= image_len);
    image_len = (size_t)len;
    return 0;
}

static int
image_openat(int folder, const char *name, int how, ...)
{
    (void)folder, (void)name;
    if ((how & O_TRUNC) != 0)
        image_len = 0;
    return 99;
}

static int
image_unlinkat(int folder, const char *name, int how)
{
    (void)folder, (void)name, (void)how;
    return 0;
}

static int
image_close(int fd)
{
    assert_int_equal(fd, 99);
    return 0;
}

static void
use_disk(void)
{
    sys.pread = pread;
    sys.pwritev = pwritev;
    sys.ftruncate = ftruncate;
    sys.openat = openat;
    sys.unlinkat = unlinkat;
    sys.close = close;
}

static void
use_image(void)
{
    sys.pread = image_pread;
    sys.pwritev = image_pwritev;
    sys.ftruncate = image_ftruncate;
    sys.openat = image_openat;
    sys.unlinkat = image_unlinkat;
    sys.close = image_close;
}

static int
end_image(void **state)
{
    (void)state;
    use_disk();
    pread_most = SIZE_MAX;
    return 0;
}

/* ----- a journal with known records ------------------------------------- */

#define RECORDS 8

static uint8_t good[8192]; /* a sound file of these records */
static size_t good_len, begins[RECORDS + 1];
static uint8_t bodies[RECORDS][1024];
static struct span payloads[RECORDS];
static uint8_t lent[1 << 17];

static const struct jrnl_folder nowhere = { -1, -1 };

static struct span
the_name(void)
{
    return span_text("Notes/1");
}

static enum jrnl_kind
kind_of(size_t i)
{
    return i < 2 ? JRNL_SNAPSHOT : JRNL_UPDATES;
}

/* Writes the records to the image and remembers where each began.  Payload 4 is
 * a whole journal, 5 is made of marks, 6 is empty. */
static void
make_good(void)
{
    struct jrnl_file f = JRNL_CLOSED;

    use_image();
    image_len = 0;
    assert_int_equal(jrnl_create(&nowhere, the_name(), &f), 14 + 7);
    for (size_t i = 0; i < RECORDS; i++) {
        size_t len = i == 6 ? 0 : 1 + 13 * i;
        for (size_t k = 0; k < len; k++)
            bodies[i][k] = i == 5 ? (uint8_t)JRNL_MARK[k % 3]
                                  : (uint8_t)test_random(256);
        if (i == 4) {
            len = image_len;
            memcpy(bodies[4], image, len);
        }
        payloads[i] = span_of(bodies[i], len);
        begins[i] = image_len;
        assert_int_equal(f.end, image_len);
        assert_int_equal(jrnl_append(&f, kind_of(i), payloads[i]), 16 + len);
    }
    begins[RECORDS] = good_len = image_len;
    memcpy(good, image, good_len);
}

static int
begin_good(void **state)
{
    (void)state;
    make_good();
    (void)test_said("");
    return 0;
}

/* Reads the image to its end, through so much memory.  The records that were
 * found, as bits; each must be one of ours, in order, and what is found must
 * cover the file. */
static struct jrnl_reader reader;
static struct jrnl_record last; /* JRNL_END's */

static unsigned
read_image(size_t lent_len)
{
    struct jrnl_file f = { .fd = 99, .end = image_len, .name = the_name() };
    struct jrnl_record rec;
    enum jrnl_found found;
    unsigned seen = 0;
    uint64_t at;

    assert_int_equal(jrnl_read(&reader, &f, lent, lent_len), 0);
    at = reader.at;
    while ((found = jrnl_next(&reader, &rec)) != JRNL_END) {
        size_t i = 0;
        assert_int_equal(rec.from, at);
        assert_true(rec.to > rec.from);
        at = rec.to;
        if (found == JRNL_DAMAGE)
            continue;
        assert_int_equal(found, JRNL_RECORD);
        while (i < RECORDS && begins[i] != rec.from)
            i++;
        assert_true(i < RECORDS);
        assert_int_equal(rec.kind, kind_of(i));
        assert_int_equal(rec.to, begins[i + 1]);
        if (span_len(payloads[i]) <= lent_len)
            assert_true(span_equals(rec.payload, payloads[i]));
        else
            assert_null(rec.payload.at);
        seen |= 1u << i;
    }
    assert_int_equal(rec.from, at);
    assert_int_equal(rec.to, image_len);
    last = rec;
    return seen;
}

static const size_t lents[] = { sizeof lent, JRNL_LENT_MIN };
#define ALL_RECORDS ((1u << RECORDS) - 1)

/* ----- the pieces ------------------------------------------------------- */

static void
the_checksum_is_the_one_of_the_standard(void **state)
{
    /* RFC 3720 B.4, and the check value of the catalogues */
    static const uint8_t digits[] = "123456789";
    uint8_t bytes[32];

    (void)state;
    assert_int_equal(jrnl_crc(0, digits, 9), 0xe3069283);
    assert_int_equal(jrnl_crc(jrnl_crc(0, digits, 4), digits + 4, 5),
                     0xe3069283);
    assert_int_equal(jrnl_crc(0, digits, 0), 0);
    memset(bytes, 0, sizeof bytes);
    assert_int_equal(jrnl_crc(0, bytes, 32), 0x8a9136aa);
    memset(bytes, 255, sizeof bytes);
    assert_int_equal(jrnl_crc(0, bytes, 32), 0x62a8ab43);
    for (uint8_t i = 0; i < 32; i++)
        bytes[i] = i;
    assert_int_equal(jrnl_crc(0, bytes, 32), 0x46dd794e);
}

static const char *
path_of(const char *name)
{
    static char path[JRNL_PATH];

    return jrnl_path(span_text(name), "", path);
}

static void
a_name_becomes_the_name_of_a_file(void **state)
{
    static const char *const cases[][2] = {
        { "notes", "notes.ydoc" },
        { "a-b_c.9", "a-b_c.9.ydoc" },
        { "Notes", "%4eotes.ydoc" },
        { "a/b", "a%2fb.ydoc" },
        { "../x", "%2e.%2fx.ydoc" },
        { ".hidden", "%2ehidden.ydoc" },
        { "..", "%2e..ydoc" },
        { "a.ydoc", "a.ydoc.ydoc" },
        { "a.ydoc.new", "a.ydoc.new.ydoc" },
        { "lock", "lock.ydoc" },
        { "%41", "%2541.ydoc" },
        { "a b~", "a%20b%7e.ydoc" },
        { "\xc3\xa4", "%c3%a4.ydoc" },
        { "con:*?", "con%3a%2a%3f.ydoc" },
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        assert_string_equal(path_of(cases[i][0]), cases[i][1]);
}

/* n bytes, the last one different. */
static struct span
long_name(uint8_t fill, size_t n, uint8_t end)
{
    static uint8_t text[4][COLLABD_NAME_MAX];
    static unsigned turn;
    uint8_t *name = text[turn++ % 4];

    memset(name, fill, n);
    name[n - 1] = end;
    return span_of(name, n);
}

static void
a_long_name_fits_and_stays_its_own(void **state)
{
    char a[JRNL_PATH], b[JRNL_PATH];
    uint8_t text[COLLABD_NAME_MAX];
    struct out o;

    (void)state;
    (void)jrnl_path(long_name('a', 128, 'a'), ".damaged-3", a);
    assert_int_equal(strlen(a), 128 + 15);
    for (size_t n = 1; n <= COLLABD_NAME_MAX; n++) {
        (void)jrnl_path(long_name(0xe4, n, 'x'), ".damaged-3", a);
        (void)jrnl_path(long_name(0xe4, n, 'y'), ".damaged-3", b);
        assert_true(strlen(a) <= 143);
        assert_string_not_equal(a, b);
        assert_true((strstr(a, "%-") != NULL) == (n > 43));
    }
    /* and only one that is not cut can be told from its file */
    (void)jrnl_path(long_name(0xe4, 43, 0xe4), "", a);
    o = out_over(text, sizeof text);
    assert_false(jrnl_unescape(a, &o));
    (void)jrnl_path(long_name(0xe4, 42, 0xe4), "", a);
    o = out_over(text, sizeof text);
    assert_true(jrnl_unescape(a, &o));
    assert_int_equal(o.at - text, 42);
}

static void
no_two_names_share_a_file_on_a_disk_without_case(void **state)
{
    static char seen[4000][JRNL_PATH];
    static uint8_t names[4000][4];
    static const uint8_t letters[] = { 'a', 'A', 'e', 'E', '%', '4', '1', '.',
                                       '/', 0xc3 };
    size_t count = 0;

    (void)state;
    for (size_t i = 0; i < 10; i++)
        for (size_t k = 0; k < 10; k++)
            for (size_t m = 0; m < 10; m++) {
                uint8_t back[COLLABD_NAME_MAX];
                struct out o = out_over(back, sizeof back);
                const uint8_t name[3] = { letters[i], letters[k], letters[m] };
                memcpy(names[count], name, 3);
                (void)jrnl_path(span_of(name, 3), "", seen[count]);
                assert_true(jrnl_unescape(seen[count], &o));
                assert_true(span_equals((struct span){ back, o.at },
                                        span_of(name, 3)));
                assert_null(strchr(seen[count], '/'));
                assert_true(seen[count][0] != '.');
                for (size_t p = 0; p < count; p++)
                    assert_false(span_equals_folded(span_text(seen[p]),
                                                    span_text(seen[count])));
                count++;
            }
}

static void
a_file_that_no_name_has_is_not_unescaped(void **state)
{
    static const char *const cases[] = {
        "", ".ydoc", "ydoc", "x", "A.ydoc", "%41", "%4E.ydoc", "%61.ydoc",
        "%4.ydoc", "%.ydoc", "%zz.ydoc", ".x.ydoc", "a b.ydoc", "a%-00.ydoc",
        "\xc3\xa4.ydoc",
    };
    uint8_t text[COLLABD_NAME_MAX];

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct out o = out_over(text, sizeof text);
        assert_false(jrnl_unescape(cases[i], &o));
    }
}

/* ----- reading ---------------------------------------------------------- */

static void
all_records_come_back(void **state)
{
    (void)state;
    for (size_t i = 0; i < 2; i++)
        for (pread_most = 1; pread_most < 2000; pread_most *= 7) {
            assert_int_equal(read_image(lents[i]), ALL_RECORDS);
            assert_int_equal(last.from, good_len);
            assert_false(reader.headless);
            assert_int_equal(reader.damages, 0);
        }
}

static void
with_room_for_the_file_it_is_read_once_and_payloads_stay(void **state)
{
    struct jrnl_file f = { .fd = 99, .end = image_len, .name = the_name() };
    struct jrnl_record rec[RECORDS], end;

    (void)state;
    preads = 0;
    assert_int_equal(jrnl_read(&reader, &f, lent, image_len), 0);
    for (size_t i = 0; i < RECORDS; i++)
        assert_int_equal(jrnl_next(&reader, &rec[i]), JRNL_RECORD);
    assert_int_equal(jrnl_next(&reader, &end), JRNL_END);
    assert_int_equal(jrnl_next(&reader, &end), JRNL_END);
    assert_int_equal(preads, 1);
    for (size_t i = 0; i < RECORDS; i++)
        assert_true(span_equals(rec[i].payload, payloads[i]));
}

static void
a_record_longer_than_the_memory_is_checked_not_shown(void **state)
{
    struct jrnl_file f = { .fd = 99, .name = the_name() };
    static uint8_t big[100000];
    struct jrnl_record rec;
    uint64_t at = good_len;

    (void)state;
    for (size_t i = 0; i < sizeof big; i++)
        big[i] = (uint8_t)test_random(256);
    f.end = good_len;
    assert_int_equal(jrnl_append(&f, JRNL_UPDATES, span_of(big, sizeof big)),
                     16 + sizeof big);
    for (unsigned broken = 0; broken < 2; broken++) {
        assert_int_equal(jrnl_read(&reader, &f, lent, 1000), 0);
        for (size_t i = 0; i < RECORDS; i++)
            assert_int_equal(jrnl_next(&reader, &rec), JRNL_RECORD);
        assert_int_equal(jrnl_next(&reader, &rec),
                         broken ? JRNL_DAMAGE : JRNL_RECORD);
        assert_int_equal(rec.from, at);
        assert_int_equal(rec.to, image_len);
        assert_null(rec.payload.at);
        image[image_len - 1] ^= 1;
    }
}

/* Reads, resumes, appends, and reads that again. */
static void
goes_on_behind(unsigned seen)
{
    struct jrnl_file f = { .fd = 99, .end = image_len, .name = the_name() };
    bool damaged = reader.damages > 0;
    struct jrnl_record rec;
    enum jrnl_found found = JRNL_DAMAGE;
    unsigned count = 0;

    assert_int_equal(jrnl_resume(&f, &reader), 0);
    assert_int_equal(f.end, last.from);
    assert_int_equal(f.end, image_len);
    assert_int_equal(f.damaged, damaged);
    assert_false(f.broken);
    assert_int_equal(jrnl_append(&f, JRNL_UPDATES, span_text("new")), 19);
    assert_int_equal(jrnl_read(&reader, &f, lent, sizeof lent), 0);
    while (found != JRNL_END) {
        found = jrnl_next(&reader, &rec);
        count += found == JRNL_RECORD;
        if (found == JRNL_RECORD && rec.to == image_len)
            assert_span_is(rec.payload, "new");
    }
    assert_int_equal(rec.from, rec.to);
    assert_int_equal(reader.damages > 0, damaged);
    assert_int_equal(count, __builtin_popcount(seen) + 1);
}

static void
cut_anywhere_every_whole_record_is_found(void **state)
{
    (void)state;
    for (size_t cut = 0; cut <= good_len; cut++)
        for (size_t k = 0; k < 2; k++) {
            size_t whole = 0;
            memcpy(image, good, good_len);
            image_len = cut;
            while (whole < RECORDS && begins[whole + 1] <= cut)
                whole++;
            assert_int_equal(read_image(lents[k]), (1u << whole) - 1);
            assert_int_equal(reader.damages, 0);
            if (cut < begins[0]) {
                struct jrnl_file f = { .fd = 99, .end = cut,
                                       .name = the_name() };
                assert_true(reader.headless);
                assert_int_equal(last.from, 0);
                assert_int_equal(jrnl_resume(&f, &reader), 0);
                assert_true(f.broken);
                assert_int_equal(f.damaged, cut > 0);
                assert_int_equal(image_len, cut); /* left as it is */
            } else {
                assert_false(reader.headless);
                assert_int_equal(last.from, begins[whole]);
                goes_on_behind((1u << whole) - 1);
            }
        }
}

static void
a_byte_changed_anywhere_costs_one_record(void **state)
{
    (void)state;
    for (size_t at = 0; at < good_len; at++)
        for (unsigned turn = 0; turn < 10; turn++) {
            unsigned expected = ALL_RECORDS, seen;
            size_t hit = 0;
            memcpy(image, good, good_len);
            image_len = good_len;
            image[at] ^= (uint8_t)(turn < 8 ? 1u << turn
                                            : 1 + test_random(255));
            while (hit < RECORDS && begins[hit + 1] <= at)
                hit++;
            if (at >= begins[0])
                expected &= ~(1u << hit);
            seen = read_image(lents[turn % 2]);
            assert_int_equal(seen, expected);
            assert_int_equal(reader.headless, at < begins[0]);
            if (at < begins[0]) {
                assert_int_equal(reader.damages, 1);
                assert_int_equal(reader.damaged, begins[0]);
                assert_int_equal(last.from, good_len);
            } else if (hit < RECORDS - 1 || at >= begins[hit] + 16) {
                assert_int_equal(reader.damages, 1);
                assert_int_equal(reader.damaged, begins[hit + 1] - begins[hit]);
                assert_int_equal(last.from, good_len);
                goes_on_behind(seen);
            } else { /* of the last one's head: it may be a torn write */
                assert_int_equal(reader.damages, 0);
                assert_int_equal(last.from, begins[hit]);
                goes_on_behind(seen);
            }
        }
}

static void
a_hole_costs_what_it_touches(void **state)
{
    (void)state;
    for (unsigned turn = 0; turn < 3000; turn++) {
        size_t from = (size_t)test_random(good_len);
        size_t to = from + 1 + (size_t)test_random(400);
        unsigned expected = 0;
        memcpy(image, good, good_len);
        image_len = good_len;
        to = to < good_len ? to : good_len;
        for (size_t i = from; i < to; i++)
            image[i] = turn % 2 ? 0 : (uint8_t)test_random(256);
        for (size_t i = 0; i < RECORDS; i++)
            if (begins[i + 1] <= from || begins[i] >= to ||
                memcmp(image + begins[i], good + begins[i],
                       begins[i + 1] - begins[i]) == 0)
                expected |= 1u << i;
        assert_int_equal(read_image(lents[turn % 2]), expected);
    }
}

static void
a_record_counts_only_in_its_place(void **state)
{
    (void)state;
    /* the third one again, behind the end and over the head of the fourth */
    memcpy(image + good_len, good + begins[2], begins[3] - begins[2]);
    image_len = good_len + begins[3] - begins[2];
    assert_int_equal(read_image(sizeof lent), ALL_RECORDS);
    assert_int_equal(last.from, good_len);
    memcpy(image, good, good_len);
    image_len = good_len;
    memcpy(image + begins[3], good + begins[2], begins[3] - begins[2]);
    assert_int_equal(read_image(sizeof lent), ALL_RECORDS & ~(1u << 3));
}

static void
a_length_beyond_the_end_hides_nothing(void **state)
{
    struct jrnl_file f = { .fd = 99, .name = the_name() };

    (void)state;
    /* a good head in the third record's place, for more than is left */
    f.end = begins[2];
    memset(bodies[7], 0, sizeof bodies[7]);
    assert_int_equal(jrnl_append(&f, JRNL_UPDATES, span_of(lent, 20000)),
                     20016);
    memcpy(image + begins[2] + 16, good + begins[2] + 16,
           good_len - begins[2] - 16);
    image_len = good_len;
    memcpy(bodies[7], good + begins[7] + 16, sizeof bodies[7]);
    assert_int_equal(read_image(sizeof lent), ALL_RECORDS & ~(1u << 2));
    assert_int_equal(read_image(JRNL_LENT_MIN), ALL_RECORDS & ~(1u << 2));
}

static void
many_false_heads_take_no_longer(void **state)
{
    /* each begins a record with a good head that takes the rest of the file */
    struct jrnl_file f = JRNL_CLOSED;
    struct jrnl_record rec;

    (void)state;
    image_len = 0;
    assert_true(jrnl_create(&nowhere, the_name(), &f) > 0);
    for (size_t at = (size_t)f.end; at + 16 <= sizeof image; at += 16) {
        f.end = at;
        assert_true(jrnl_append(&f, JRNL_UPDATES,
                                span_of(lent, sizeof image - at - 16)) > 0);
    }
    memset(image + sizeof image - 8, 1, 8);
    preads = 0;
    f.end = image_len;
    assert_int_equal(jrnl_read(&reader, &f, lent, 4096), 0);
    while (jrnl_next(&reader, &rec) != JRNL_END)
        continue;
    assert_true(preads < 3 * sizeof image / 4096);
}

static void
kinds_yet_to_come_are_passed_over(void **state)
{
    struct jrnl_file f = { .fd = 99, .end = good_len, .name = the_name() };
    struct jrnl_record rec;

    (void)state;
    assert_true(jrnl_append(&f, (enum jrnl_kind)3, span_text("?")) > 0);
    assert_true(jrnl_append(&f, (enum jrnl_kind)4, span_text("?")) > 0);
    assert_true(jrnl_append(&f, JRNL_UPDATES, span_text("new")) > 0);
    assert_int_equal(jrnl_read(&reader, &f, lent, sizeof lent), 0);
    for (size_t i = 0; i < RECORDS; i++)
        assert_int_equal(jrnl_next(&reader, &rec), JRNL_RECORD);
    assert_int_equal(jrnl_next(&reader, &rec), JRNL_RECORD);
    assert_span_is(rec.payload, "new");
    assert_int_equal(jrnl_next(&reader, &rec), JRNL_END);
    assert_int_equal(reader.unknown, 2);
    assert_int_equal(jrnl_resume(&f, &reader), 0);
    assert_true(test_said("%4eotes%2f1.ydoc: read, but for 0 damaged "
                          "places (0 bytes), 2 records of unknown kinds"));
    assert_false(f.damaged || f.broken);
}

static void
a_disk_that_cannot_be_read_is_no_damage(void **state)
{
    struct jrnl_file f = { .fd = 99, .end = good_len + 1, .name = the_name() };
    struct jrnl_record rec;
    enum jrnl_found found;

    (void)state;
    /* the file is shorter than it was: somebody cuts it */
    assert_int_equal(jrnl_read(&reader, &f, lent, sizeof lent), -1);
    assert_int_equal(errno, ESTALE);
    assert_true(test_said("cut while it was read"));
    assert_int_equal(jrnl_read(&reader, &f, lent, JRNL_LENT_MIN), 0);
    while ((found = jrnl_next(&reader, &rec)) == JRNL_RECORD)
        continue;
    assert_int_equal(found, JRNL_ERROR);
    assert_false(reader.ended);
    assert_true(test_said("%4eotes%2f1.ydoc: cannot be read"));
}

/* Gives the image's head another version or another name. */
static void
put_head(uint8_t version, struct span name)
{
    struct out o = out_over(image, 300);

    out_bytes(&o, JRNL_MAGIC, 8);
    out_u8(&o, version);
    out_u8(&o, (uint8_t)span_len(name));
    out_span(&o, name);
    jrnl_put32(&o, jrnl_crc(0, image, (size_t)(o.at - image)));
}

static void
a_file_of_another_version_or_document_is_refused(void **state)
{
    struct jrnl_file f = { .fd = 99, .end = good_len, .name = the_name() };
    static const uint8_t versions[] = { 0, 2, 255 };

    (void)state;
    for (size_t i = 0; i < sizeof versions; i++) {
        put_head(versions[i], the_name());
        assert_int_equal(jrnl_read(&reader, &f, lent, sizeof lent), -1);
        assert_int_equal(errno, EPROTONOSUPPORT);
        assert_true(test_said("a newer collabd wrote it"));
    }
    put_head(JRNL_VERSION, span_text("Notes/2"));
    assert_int_equal(jrnl_read(&reader, &f, lent, sizeof lent), -1);
    assert_int_equal(errno, EEXIST);
    assert_true(test_said("it is another document's"));
    put_head(JRNL_VERSION, the_name());
    assert_int_equal(jrnl_read(&reader, &f, lent, sizeof lent), 0);
    assert_false(reader.headless);
}

static void
another_kind_of_file_has_no_head(void **state)
{
    (void)state;
    put_head(JRNL_VERSION, the_name());
    image[0] ^= 1;
    for (size_t i = 0; i < 4; i++) /* with the CRC that belongs to it */
        image[17 + i] = (uint8_t)(jrnl_crc(0, image, 17) >> 8 * i);
    assert_int_equal(read_image(sizeof lent), ALL_RECORDS);
    assert_true(reader.headless);
}

/* ----- on a disk -------------------------------------------------------- */

static char top[64];
static struct jrnl_folder data = { -1, -1 };

static const char *
in_top(const char *name)
{
    static char path[4][700];
    static unsigned turn;
    char *p = path[turn++ % 4];

    (void)snprintf(p, sizeof path[0], "%s/%s", top, name);
    return p;
}

static int
begin_disk(void **state)
{
    (void)state;
    use_disk();
    (void)strcpy(top, "/tmp/collabd-test-XXXXXX");
    assert_non_null(mkdtemp(top));
    assert_int_equal(jrnl_folder_open(&data, in_top("d"), true), 0);
    (void)test_said("");
    return 0;
}

static void
empty_folder(const char *path)
{
    DIR *dir = opendir(path);
    struct dirent *e;

    if (dir == NULL)
        return;
    while ((e = readdir(dir)) != NULL)
        if (strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0 &&
            unlinkat(dirfd(dir), e->d_name, 0) != 0)
            (void)unlinkat(dirfd(dir), e->d_name, AT_REMOVEDIR);
    (void)closedir(dir);
}

static int
end_disk(void **state)
{
    (void)state;
    jrnl_folder_close(&data);
    empty_folder(in_top("d"));
    empty_folder(top);
    return rmdir(top);
}

static void
put(const char *file, const void *bytes, size_t len)
{
    int fd = openat(data.fd, file, O_WRONLY | O_CREAT | O_TRUNC, 0600);

    assert_true(fd >= 0);
    assert_int_equal(write(fd, bytes, len), len);
    (void)close(fd);
}

static bool
is_there(const char *file)
{
    return faccessat(data.fd, file, F_OK, 0) == 0;
}

static size_t
size_of(const char *file)
{
    struct stat st;

    assert_int_equal(fstatat(data.fd, file, &st, 0), 0);
    return (size_t)st.st_size;
}

/* How many descriptors are open. */
static int
descriptors(void)
{
    int count = 0;

    for (int fd = 0; fd < 64; fd++)
        count += fcntl(fd, F_GETFD) >= 0;
    return count;
}

/* A document with one record that holds a text. */
static void
put_document(const char *name, const char *text)
{
    struct jrnl_file f = JRNL_CLOSED;

    assert_true(jrnl_create(&data, span_text(name), &f) > 0);
    assert_true(jrnl_append(&f, JRNL_SNAPSHOT, span_text(text)) > 0);
    assert_int_equal(jrnl_sync(&f), 0);
    assert_int_equal(jrnl_install(&data, &f, false), 0);
    jrnl_close(&f);
}

/* The text in the first record of a document's file. */
static const char *
text_in(const char *name)
{
    static char text[100];
    struct jrnl_file f;
    struct jrnl_record rec;

    text[0] = '\0';
    if (jrnl_open(&data, span_text(name), false, &f) != 0)
        return NULL;
    if (jrnl_read(&reader, &f, lent, sizeof lent) == 0 &&
        jrnl_next(&reader, &rec) == JRNL_RECORD)
        (void)snprintf(text, sizeof text, "%.*s", (int)span_len(rec.payload),
                       (const char *)rec.payload.at);
    jrnl_close(&f);
    return text;
}

static void
a_document_is_made_read_and_written_on(void **state)
{
    struct span name = span_text("a");
    struct jrnl_file f = JRNL_CLOSED, g;
    struct jrnl_record rec;
    struct stat st;
    int first = descriptors();

    (void)state;
    assert_int_equal(jrnl_open(&data, name, true, &g), -1);
    assert_int_equal(errno, ENOENT);
    assert_int_equal(g.fd, -1);
    assert_false(test_said("error"));
    assert_int_equal(jrnl_create(&data, name, &f), 15);
    assert_false(is_there("a.ydoc"));
    assert_true(is_there("a.ydoc.new"));
    assert_int_equal(jrnl_append(&f, JRNL_SNAPSHOT, span_text("one")), 19);
    assert_int_equal(f.end, 34);
    assert_int_equal(f.synced, 0);
    assert_int_equal(jrnl_sync(&f), 0);
    jrnl_synced(&f, f.end, 0);
    assert_int_equal(f.synced, 34);
    assert_int_equal(jrnl_install(&data, &f, true), 0); /* no old one */
    assert_true(is_there("a.ydoc"));
    assert_false(is_there("a.ydoc.new"));
    assert_int_equal(jrnl_append(&f, JRNL_UPDATES, span_text("two")), 19);
    jrnl_synced(&f, 30, 0); /* late, of a shorter one */
    assert_int_equal(f.synced, 34);
    assert_int_equal(fstat(f.fd, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0600);
    assert_true(fcntl(f.fd, F_GETFD) & FD_CLOEXEC);
    jrnl_close(&f);
    jrnl_close(&f);

    assert_int_equal(jrnl_open(&data, name, true, &g), 0);
    assert_int_equal(g.end, 53);
    assert_int_equal(jrnl_read(&reader, &g, lent, sizeof lent), 0);
    assert_int_equal(jrnl_next(&reader, &rec), JRNL_RECORD);
    assert_int_equal(rec.kind, JRNL_SNAPSHOT);
    assert_int_equal(jrnl_next(&reader, &rec), JRNL_RECORD);
    assert_int_equal(rec.kind, JRNL_UPDATES);
    assert_int_equal(jrnl_next(&reader, &rec), JRNL_END);
    assert_int_equal(jrnl_resume(&g, &reader), 0);
    assert_int_equal(g.synced, 0);
    assert_int_equal(jrnl_append(&g, JRNL_UPDATES, span_text("three")), 21);
    jrnl_close(&g);
    assert_int_equal(size_of("a.ydoc"), 74);

    /* the second time a file is made, the first one's leavings are gone */
    put("a.ydoc.new", good, good_len);
    assert_true(jrnl_create(&data, name, &f) > 0);
    assert_int_equal(size_of("a.ydoc.new"), 15);
    jrnl_discard(&data, &f);
    assert_false(is_there("a.ydoc.new"));
    assert_int_equal(jrnl_open(&data, name, false, &g), 0);
    assert_int_equal(jrnl_append(&g, JRNL_UPDATES, span_text("x")), -1);
    jrnl_close(&g);
    assert_int_equal(size_of("a.ydoc"), 74);
    assert_int_equal(jrnl_delete(&data, name), 0);
    assert_int_equal(jrnl_delete(&data, name), 0);
    assert_false(is_there("a.ydoc"));
    assert_int_equal(descriptors(), first);
    assert_false(test_said("error"));
}

static void
one_process_writes_in_a_folder(void **state)
{
    struct jrnl_folder other, reading;
    struct stat st;
    int first = descriptors();

    (void)state;
    assert_int_equal(fstat(data.fd, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0700);
    assert_int_equal(jrnl_folder_open(&other, in_top("d"), true), -1);
    assert_true(test_said("another collabd uses it"));
    assert_int_equal(jrnl_folder_open(&reading, in_top("d"), false), 0);
    jrnl_folder_close(&data);
    assert_int_equal(jrnl_folder_open(&other, in_top("d"), true), 0);
    jrnl_folder_close(&other);
    jrnl_folder_close(&other);
    jrnl_folder_close(&reading);
    assert_int_equal(jrnl_folder_open(&data, in_top("d"), true), 0);
    assert_int_equal(descriptors(), first);
}

static ino_t synced_folder;

static int
noting_fsync(int fd)
{
    struct stat st;

    if (synced_folder == 0 && fstat(fd, &st) == 0)
        synced_folder = st.st_ino;
    return 0;
}

static void
a_new_folder_is_synced_into_the_one_above(void **state)
{
    struct jrnl_folder d;
    struct stat st;

    (void)state;
    synced_folder = 0;
    sys.fsync = noting_fsync;
    assert_int_equal(jrnl_folder_open(&d, in_top("fresh"), true), 0);
    sys.fsync = fsync;
    assert_int_equal(stat(top, &st), 0);
    assert_int_equal(synced_folder, st.st_ino);
    jrnl_folder_close(&d);
    empty_folder(in_top("fresh"));
}

static void
a_folder_that_cannot_be_had_is_told(void **state)
{
    struct jrnl_folder d;
    int first = descriptors();

    (void)state;
    assert_int_equal(jrnl_folder_open(&d, in_top("none"), false), -1);
    assert_int_equal(errno, ENOENT);
    assert_int_equal(access(in_top("none"), F_OK), -1);
    assert_true(test_said("No such file or directory"));
    assert_int_equal(jrnl_folder_open(&d, in_top("none/deeper"), true), -1);
    assert_true(test_said("none/deeper: No such file"));
    assert_int_equal(jrnl_folder_open(&d, in_top("d/lock"), true), -1);
    assert_true(test_said("Not a directory"));
    assert_int_equal(descriptors(), first);
}

static void
a_start_clears_away_what_was_in_the_making(void **state)
{
    (void)state;
    put_document("one", "old");
    put("one.ydoc.new", "half", 4);
    put("two.ydoc.new", "half", 4);
    put_document("three", "whole, its original is damaged");
    assert_int_equal(renameat(data.fd, "three.ydoc", data.fd, "three.ydoc.new"),
                     0);
    put("three.ydoc.damaged-1", "damaged", 7);
    put_document("four", "old");
    put("four.ydoc.damaged-1", "damaged", 7);
    put("four.ydoc.new", "half", 4);
    put("stranger.new", "", 0);
    jrnl_folder_close(&data);
    assert_int_equal(jrnl_folder_open(&data, in_top("d"), true), 0);
    assert_string_equal(text_in("one"), "old");
    assert_null(text_in("two"));
    assert_string_equal(text_in("three"), "whole, its original is damaged");
    assert_string_equal(text_in("four"), "old");
    assert_false(is_there("one.ydoc.new") || is_there("two.ydoc.new") ||
                 is_there("three.ydoc.new") || is_there("four.ydoc.new"));
    assert_true(is_there("three.ydoc.damaged-1"));
    assert_true(is_there("stranger.new"));
}

static void
damaged_originals_are_kept_until_the_document_is_deleted(void **state)
{
    struct span name = span_text("doc");

    (void)state;
    put_document("doc", "0");
    for (char i = '1'; i <= '5'; i++) {
        struct jrnl_file f = JRNL_CLOSED;
        char text[2] = { i, '\0' };
        assert_true(jrnl_create(&data, name, &f) > 0);
        assert_true(jrnl_append(&f, JRNL_SNAPSHOT, span_text(text)) > 0);
        assert_int_equal(jrnl_install(&data, &f, true), 0);
        jrnl_close(&f);
    }
    assert_string_equal(text_in("doc"), "5");
    assert_true(is_there("doc.ydoc.damaged-1"));
    assert_false(is_there("doc.ydoc.damaged-4"));
    assert_int_equal(renameat(data.fd, "doc.ydoc.damaged-1", data.fd,
                              "doc.ydoc"), 0);
    assert_string_equal(text_in("doc"), "0"); /* the first stays */
    assert_int_equal(renameat(data.fd, "doc.ydoc.damaged-3", data.fd,
                              "doc.ydoc"), 0);
    assert_string_equal(text_in("doc"), "4"); /* the last makes room */
    put("doc.ydoc.damaged-3", "", 0);
    put("doc.ydoc.new", "", 0);
    assert_int_equal(jrnl_delete(&data, name), 0);
    assert_false(is_there("doc.ydoc") || is_there("doc.ydoc.new") ||
                 is_there("doc.ydoc.damaged-2") ||
                 is_there("doc.ydoc.damaged-3"));
}

static void
links_pipes_and_folders_are_no_documents(void **state)
{
    static const char *const names[] = { "link", "pipe", "folder" };
    struct jrnl_file f = JRNL_CLOSED;
    int first = descriptors();

    (void)state;
    put_document("real", "x");
    assert_int_equal(symlinkat("real.ydoc", data.fd, "link.ydoc"), 0);
    assert_int_equal(symlinkat("real.ydoc", data.fd, "real.ydoc.new"), 0);
    assert_int_equal(mkfifoat(data.fd, "pipe.ydoc", 0600), 0);
    assert_int_equal(mkdirat(data.fd, "folder.ydoc", 0700), 0);
    for (int write = 0; write < 2; write++)
        for (size_t i = 0; i < 3; i++) {
            assert_int_equal(
                jrnl_open(&data, span_text(names[i]), write == 1, &f), -1);
            assert_true(test_said("cannot be opened"));
        }
    assert_true(jrnl_create(&data, span_text("real"), &f) > 0);
    jrnl_discard(&data, &f);
    assert_string_equal(text_in("real"), "x");
    assert_int_equal(descriptors(), first);
}

/* ----- a disk that fails ------------------------------------------------ */

static size_t disk_room; /* bytes that can still be written */

static ssize_t
full_pwritev(int fd, const struct iovec *parts, int count, off_t at)
{
    size_t done = 0;

    for (int i = 0; i < count; i++) {
        size_t n = parts[i].iov_len < disk_room ? parts[i].iov_len : disk_room;
        ssize_t put_in = pwrite(fd, parts[i].iov_base, n, at + (off_t)done);
        assert_int_equal(put_in, n);
        done += n;
        disk_room -= n;
    }
    errno = done > 0 ? 0 : ENOSPC;
    return done > 0 ? (ssize_t)done : -1;
}

static int
failing(void)
{
    errno = EIO;
    return -1;
}

static int
bad_ftruncate(int fd, off_t len)
{
    (void)fd, (void)len;
    return failing();
}

static int
bad_fdatasync(int fd)
{
    (void)fd;
    return failing();
}

static int
read_only_openat(int folder, const char *name, int how, ...)
{
    if ((how & O_ACCMODE) != O_RDONLY || (how & O_CREAT) != 0) {
        errno = EROFS;
        return -1;
    }
    return openat(folder, name, how);
}

static void
a_full_disk_changes_nothing_however_much_went_in(void **state)
{
    struct jrnl_file f = JRNL_CLOSED;
    size_t before;

    (void)state;
    assert_true(jrnl_create(&data, span_text("doc"), &f) > 0);
    assert_int_equal(jrnl_install(&data, &f, false), 0);
    assert_true(jrnl_append(&f, JRNL_SNAPSHOT, span_text("kept")) > 0);
    before = (size_t)f.end;
    sys.pwritev = full_pwritev;
    (void)test_said("");
    for (size_t room = 0; room < 16 + 10; room++) {
        disk_room = room;
        assert_int_equal(
            jrnl_append(&f, JRNL_UPDATES, span_text("ten bytes.")), -1);
        assert_int_equal(errno, ENOSPC);
        assert_int_equal(f.end, before);
        assert_false(f.broken);
        assert_int_equal(size_of("doc.ydoc"), before);
        /* told once, not for every try */
        assert_int_equal(test_said("doc.ydoc: cannot be written: No space"),
                         room == 0);
    }
    disk_room = 26;
    assert_int_equal(jrnl_append(&f, JRNL_UPDATES, span_text("ten bytes.")),
                     26);
    jrnl_synced(&f, f.end, 0);
    disk_room = 0;
    assert_int_equal(jrnl_append(&f, JRNL_UPDATES, span_text("more")), -1);
    assert_true(test_said("make room on that disk"));
    sys.pwritev = pwritev;
    jrnl_close(&f);
    assert_string_equal(text_in("doc"), "kept");
    assert_int_equal(reader.size, before + 26);
}

static void
what_cannot_be_cut_back_is_not_written_again(void **state)
{
    struct jrnl_file f = JRNL_CLOSED;
    struct jrnl_record rec;

    (void)state;
    assert_true(jrnl_create(&data, span_text("doc"), &f) > 0);
    assert_int_equal(jrnl_install(&data, &f, false), 0);
    assert_true(jrnl_append(&f, JRNL_SNAPSHOT, span_text("kept")) > 0);
    sys.pwritev = full_pwritev;
    sys.ftruncate = bad_ftruncate;
    disk_room = 20;
    assert_int_equal(jrnl_append(&f, JRNL_UPDATES, span_text("ten bytes.")),
                     -1);
    assert_int_equal(errno, ENOSPC);
    assert_true(f.broken);
    assert_true(test_said("cannot be written, nor cut back"));
    use_disk();
    assert_int_equal(jrnl_append(&f, JRNL_UPDATES, span_text("x")), -1);
    assert_int_equal(errno, EIO);
    jrnl_close(&f);
    /* another process finds a torn tail, and cuts it */
    assert_int_equal(jrnl_open(&data, span_text("doc"), true, &f), 0);
    assert_int_equal(jrnl_read(&reader, &f, lent, sizeof lent), 0);
    assert_int_equal(jrnl_next(&reader, &rec), JRNL_RECORD);
    assert_int_equal(jrnl_next(&reader, &rec), JRNL_END);
    assert_int_equal(rec.to - rec.from, 20);
    sys.ftruncate = bad_ftruncate;
    assert_int_equal(jrnl_resume(&f, &reader), -1);
    assert_true(f.broken);
    assert_true(test_said("torn tail cannot be cut off"));
    sys.ftruncate = ftruncate;
    f.broken = false;
    assert_int_equal(jrnl_resume(&f, &reader), 0);
    assert_true(test_said("cut short (20 bytes)"));
    assert_int_equal(size_of("doc.ydoc"), f.end);
    jrnl_close(&f);
}

static unsigned renames;

static int
second_renameat(int d, const char *from, int e, const char *to)
{
    return ++renames == 2 ? failing() : renameat(d, from, e, to);
}

static void
what_cannot_be_replaced_stays_in_its_place(void **state)
{
    struct jrnl_file f = JRNL_CLOSED;

    (void)state;
    put_document("doc", "old");
    assert_true(jrnl_create(&data, span_text("doc"), &f) > 0);
    renames = 0;
    sys.renameat = second_renameat;
    assert_int_equal(jrnl_install(&data, &f, true), -1);
    assert_int_equal(errno, EIO);
    sys.renameat = renameat;
    assert_true(test_said("doc.ydoc: cannot be replaced"));
    jrnl_discard(&data, &f);
    assert_string_equal(text_in("doc"), "old");
    assert_false(is_there("doc.ydoc.damaged-1"));
}

static int folder_error;

static int
folder_fsync(int fd)
{
    assert_int_equal(fd, data.fd);
    errno = folder_error;
    return -1;
}

static void
a_rename_counts_when_the_folder_is_synced(void **state)
{
    struct jrnl_file f = JRNL_CLOSED;

    (void)state;
    for (int i = 0; i < 2; i++) {
        sys.fsync = folder_fsync;
        folder_error = i == 0 ? EIO : EINVAL; /* it knows no such thing */
        assert_true(jrnl_create(&data, span_text("doc"), &f) > 0);
        assert_int_equal(jrnl_install(&data, &f, false), i - 1);
        assert_int_equal(jrnl_delete(&data, span_text("doc")), i - 1);
        assert_int_equal(test_said("may come back"), i == 0);
        sys.fsync = fsync;
        jrnl_close(&f);
    }
}

static void
a_file_that_was_not_synced_is_not_written_again(void **state)
{
    struct jrnl_file f = JRNL_CLOSED;

    (void)state;
    assert_true(jrnl_create(&data, span_text("doc"), &f) > 0);
    assert_int_equal(jrnl_install(&data, &f, false), 0);
    sys.fdatasync = bad_fdatasync;
    jrnl_synced(&f, f.end, jrnl_sync(&f));
    sys.fdatasync = fdatasync;
    assert_true(test_said("may not have reached the disk"));
    assert_true(f.broken);
    assert_int_equal(f.synced, 0);
    assert_int_equal(jrnl_append(&f, JRNL_UPDATES, span_text("x")), -1);
    jrnl_close(&f);
}

static void
a_file_that_somebody_deletes_is_noticed_at_the_next_sync(void **state)
{
    struct jrnl_file f = JRNL_CLOSED;

    (void)state;
    assert_true(jrnl_create(&data, span_text("doc"), &f) > 0);
    assert_int_equal(jrnl_install(&data, &f, false), 0);
    assert_int_equal(unlinkat(data.fd, "doc.ydoc", 0), 0);
    assert_true(jrnl_append(&f, JRNL_UPDATES, span_text("x")) > 0);
    assert_int_equal(jrnl_sync(&f), -1);
    assert_int_equal(errno, ENOENT);
    assert_true(test_said("it or its folder is not there"));
    jrnl_close(&f);
}

static void
a_disk_that_turns_read_only_still_gives_what_it_has(void **state)
{
    struct jrnl_file f;
    struct jrnl_record rec;
    int first = descriptors();

    (void)state;
    put_document("doc", "kept");
    sys.openat = read_only_openat;
    assert_int_equal(jrnl_open(&data, span_text("doc"), true, &f), 0);
    assert_true(test_said("mount that disk writable"));
    assert_true(f.broken);
    assert_int_equal(jrnl_read(&reader, &f, lent, sizeof lent), 0);
    assert_int_equal(jrnl_next(&reader, &rec), JRNL_RECORD);
    assert_int_equal(jrnl_next(&reader, &rec), JRNL_END);
    assert_int_equal(jrnl_resume(&f, &reader), 0);
    assert_int_equal(jrnl_append(&f, JRNL_UPDATES, span_text("x")), -1);
    jrnl_close(&f);
    assert_int_equal(jrnl_create(&data, span_text("doc"), &f), -1);
    assert_true(test_said("doc.ydoc: cannot be written anew"));
    assert_int_equal(jrnl_create(&data, span_text("doc"), &f), -1);
    assert_false(test_said("doc.ydoc")); /* once */
    sys.openat = openat;
    assert_int_equal(descriptors(), first);
}

static void
a_folder_that_is_gone_is_told(void **state)
{
    struct jrnl_file f = JRNL_CLOSED;

    (void)state;
    empty_folder(in_top("d"));
    assert_int_equal(rmdir(in_top("d")), 0);
    assert_int_equal(jrnl_open(&data, span_text("doc"), true, &f), -1);
    assert_int_equal(jrnl_create(&data, span_text("doc"), &f), -1);
    assert_int_equal(errno, ENOENT);
    assert_true(test_said("it or its folder is not there"));
}

static void
a_file_grows_to_two_gigabytes_and_no_further(void **state)
{
    struct jrnl_file f = JRNL_CLOSED;

    (void)state;
    assert_true(jrnl_create(&data, span_text("doc"), &f) > 0);
    f.end = JRNL_FILE_MAX - 17;
    assert_int_equal(jrnl_append(&f, JRNL_UPDATES, span_text("ab")), -1);
    assert_int_equal(errno, EFBIG);
    assert_int_equal(jrnl_append(&f, JRNL_UPDATES, span_text("a")), 17);
    assert_int_equal(f.end, JRNL_FILE_MAX);
    jrnl_discard(&data, &f);
}

/* ----- the n-th system call fails ---------------------------------------
 * A life of a document, with an owner who does as the chapter says.  In each
 * run one call fails, or all from one on, as if the process died there.  Then
 * everything works again, and what was acknowledged must be found. */

static unsigned calls, fail_at, fail_to;
static int fail_with;

static bool
call_fails(void)
{
    calls++;
    if (calls < fail_at || calls >= fail_to)
        return false;
    errno = fail_with;
    return true;
}

#define FAILING(type, call, params, args)                                    \
    static type failing_##call params                                        \
    {                                                                        \
        return call_fails() ? (type)-1 : call args;                          \
    }
FAILING(int, mkdirat, (int d, const char *p, mode_t m), (d, p, m))
FAILING(int, renameat, (int d, const char *p, int e, const char *q),
        (d, p, e, q))
FAILING(int, unlinkat, (int d, const char *p, int how), (d, p, how))
FAILING(int, faccessat, (int d, const char *p, int m, int how), (d, p, m, how))
FAILING(int, fstat, (int fd, struct stat *st), (fd, st))
FAILING(int, flock, (int fd, int how), (fd, how))
FAILING(int, ftruncate, (int fd, off_t len), (fd, len))
FAILING(ssize_t, pread, (int fd, void *to, size_t n, off_t at),
        (fd, to, n, at))

static int
failing_openat(int d, const char *p, int how, ...)
{
    return call_fails() ? -1 : openat(d, p, how, 0600);
}

static ssize_t
failing_pwritev(int fd, const struct iovec *parts, int count, off_t at)
{
    if (!call_fails())
        return pwritev(fd, parts, count, at);
    if (calls % 2 == 0) /* some of it went in */
        return pwritev(fd, parts, 1, at);
    return -1;
}

static int
failing_sync(int fd)
{
    (void)fd;
    return call_fails() ? -1 : 0; /* real ones would take minutes */
}

static int
failing_close(int fd)
{
    (void)close(fd); /* Linux closes it in any case */
    return call_fails() ? -1 : 0;
}

static DIR *
failing_fdopendir(int fd)
{
    return call_fails() ? NULL : fdopendir(fd);
}

static struct dirent *
failing_readdir(DIR *dir)
{
    return call_fails() ? NULL : readdir(dir);
}

static void
use_failing(bool on)
{
    sys.openat = on ? failing_openat : openat;
    sys.pread = on ? failing_pread : pread;
    sys.close = on ? failing_close : close;
    sys.fsync = on ? failing_sync : fsync;
    sys.renameat = on ? failing_renameat : renameat;
    sys.unlinkat = on ? failing_unlinkat : unlinkat;
    sys.mkdirat = on ? failing_mkdirat : mkdirat;
    sys.faccessat = on ? failing_faccessat : faccessat;
    sys.fstat = on ? failing_fstat : fstat;
    sys.flock = on ? failing_flock : flock;
    sys.pwritev = on ? failing_pwritev : pwritev;
    sys.ftruncate = on ? failing_ftruncate : ftruncate;
    sys.fdatasync = on ? failing_sync : fdatasync;
    sys.fdopendir = on ? failing_fdopendir : fdopendir;
    sys.readdir = on ? failing_readdir : readdir;
}

/* Each entry is one letter, each record holds one. */
struct owner {
    struct jrnl_folder folder;
    struct jrnl_file file;
    char acked[32]; /* letters, as a set */
};

static bool
has(const char *set, char letter)
{
    return strchr(set, letter) != NULL;
}

static void
ack(struct owner *o, char letter)
{
    if (!has(o->acked, letter))
        o->acked[strlen(o->acked)] = letter;
}

/* The document whole, to a new file. */
static bool
write_anew(struct owner *o)
{
    struct jrnl_file fresh = { .fd = -1, .refused = o->file.refused };
    bool done = jrnl_create(&o->folder, span_text("doc"), &fresh) > 0;

    if (!done)
        return false;
    for (const char *c = o->acked; done && *c != '\0'; c++)
        done = jrnl_append(&fresh, JRNL_SNAPSHOT, span_of(c, 1)) > 0;
    done = done && jrnl_sync(&fresh) == 0;
    if (done) {
        jrnl_synced(&fresh, fresh.end, 0);
        done = jrnl_install(&o->folder, &fresh, o->file.damaged) == 0;
        o->file.broken |= !done;
    }
    if (!done) {
        jrnl_discard(&o->folder, &fresh);
        return false;
    }
    jrnl_close(&o->file);
    o->file = fresh;
    return true;
}

static void
enter(struct owner *o, char letter)
{
    if ((o->file.fd < 0 || o->file.broken || o->file.damaged) &&
        !write_anew(o))
        return; /* refused */
    if (jrnl_append(&o->file, JRNL_UPDATES, span_of(&letter, 1)) > 0)
        ack(o, letter);
}

/* False: it cannot be opened now. */
static bool
load(struct owner *o)
{
    struct jrnl_record rec;
    enum jrnl_found found = JRNL_ERROR;

    if (jrnl_open(&o->folder, span_text("doc"), true, &o->file) != 0)
        return errno == ENOENT;
    if (jrnl_read(&reader, &o->file, lent, sizeof lent) == 0)
        while ((found = jrnl_next(&reader, &rec)) > JRNL_END)
            if (found == JRNL_RECORD) {
                assert_int_equal(span_len(rec.payload), 1);
                ack(o, (char)*rec.payload.at);
            }
    if (found != JRNL_END) {
        jrnl_close(&o->file);
        return false;
    }
    (void)jrnl_resume(&o->file, &reader);
    return true;
}

static void
live(struct owner *o)
{
    if (jrnl_folder_open(&o->folder, in_top("d"), true) != 0 &&
        jrnl_folder_open(&o->folder, in_top("d"), true) != 0)
        return;
    if (load(o) || load(o)) {
        enter(o, 'a');
        enter(o, 'b');
        if (o->file.fd >= 0)
            jrnl_synced(&o->file, o->file.end, jrnl_sync(&o->file));
        enter(o, 'c');
        (void)write_anew(o);
        enter(o, 'd');
        enter(o, 'e');
    }
    jrnl_close(&o->file);
    jrnl_folder_close(&o->folder);
}

enum before { ABSENT, SOUND, TORN, DAMAGED, HEADLESS, BEFORES };

/* What is on the disk when the life begins; acknowledged are X, Y and Z. */
static const char *
set_scene(enum before before)
{
    struct jrnl_file f = JRNL_CLOSED;
    const char *letters = "XYQZ";

    empty_folder(in_top("d"));
    (void)rmdir(in_top("d"));
    if (before == ABSENT)
        return "";
    assert_int_equal(mkdir(in_top("d"), 0700), 0);
    data.fd = open(in_top("d"), O_RDONLY | O_DIRECTORY);
    assert_true(jrnl_create(&data, span_text("doc"), &f) > 0);
    for (const char *c = letters; *c != '\0'; c++)
        assert_true(jrnl_append(&f, JRNL_UPDATES, span_of(c, 1)) == 17);
    if (before == TORN)
        assert_int_equal(pwrite(f.fd, JRNL_MARK, 3, (off_t)f.end), 3);
    if (before == DAMAGED)
        assert_int_equal(pwrite(f.fd, "?", 1, (off_t)f.end - 18), 1);
    if (before == HEADLESS)
        assert_int_equal(pwrite(f.fd, "?", 1, 3), 1);
    assert_int_equal(renameat(data.fd, "doc.ydoc.new", data.fd, "doc.ydoc"), 0);
    put("doc.ydoc.new", "half", 4);
    put("doc.ydoc.damaged-1", "from before", 11);
    jrnl_close(&f);
    (void)close(data.fd);
    data.fd = -1;
    return before == DAMAGED ? "XYZ" : "XYQZ";
}

static void
whatever_call_fails_what_was_acknowledged_is_found(void **state)
{
    static const int errors[] = { EIO, ENOSPC, EROFS, EMFILE };
    int first;
    unsigned runs = 0;

    (void)state;
    jrnl_folder_close(&data);
    first = descriptors();
    for (unsigned scene = 0; scene < BEFORES; scene++)
        for (unsigned way = 0; way < 8; way++)
            for (fail_at = 1;; fail_at++) {
                struct owner o = { { -1, -1 }, JRNL_CLOSED, "" },
                             after = { { -1, -1 }, JRNL_CLOSED, "" };
                const char *was = set_scene((enum before)scene);
                calls = 0;
                fail_to = way < 4 ? fail_at + 1 : UINT_MAX;
                fail_with = errors[way % 4];
                use_failing(true);
                live(&o);
                use_failing(false);
                assert_int_equal(descriptors(), first);
                if (calls < fail_at)
                    break;
                runs++;
                assert_int_equal(jrnl_folder_open(&after.folder, in_top("d"),
                                                  true), 0);
                assert_true(load(&after));
                for (const char *c = was; *c != '\0'; c++)
                    assert_true(has(after.acked, *c));
                for (const char *c = o.acked; *c != '\0'; c++)
                    assert_true(has(after.acked, *c));
                for (const char *c = after.acked; *c != '\0'; c++)
                    assert_true(has("abcdeXYQZ", *c));
                assert_int_equal(
                    faccessat(after.folder.fd, "doc.ydoc.new", F_OK, 0), -1);
                jrnl_close(&after.file);
                jrnl_folder_close(&after.folder);
            }
    assert_true(runs > 1000);
    assert_int_equal(jrnl_folder_open(&data, in_top("d"), true), 0);
}

/* ----- from outside ----------------------------------------------------- */

static const char *
told(int (*tell)(FILE *, const char *), int expected)
{
    static char text[4096];
    FILE *f = tmpfile();
    size_t n;

    assert_non_null(f);
    assert_int_equal(tell(f, in_top("d")), expected);
    rewind(f);
    n = fread(text, 1, sizeof text - 1, f);
    text[n] = '\0';
    (void)fclose(f);
    return text;
}

static void
listing_finds_documents_and_no_strangers(void **state)
{
    static const char *const strangers[] = {
        "readme.txt", "x.ydoc.damaged-1", "y.ydoc.new", ".ydoc", "Big.ydoc",
    };
    struct jrnl_file f = JRNL_CLOSED;
    const char *text;
    int first;

    (void)state;
    put_document("a/B", "text");
    put_document("other", "text");
    put_document("\xe4\xb8\xad", "text");
    for (size_t i = 0; i < 5; i++)
        put(strangers[i], good, good_len);
    put("headless.ydoc", "nothing like a journal", 22);
    put("headless%-0123.ydoc", "nothing like a journal", 22);
    assert_int_equal(linkat(data.fd, "other.ydoc", data.fd, "copy.ydoc", 0), 0);
    assert_int_equal(symlinkat("other.ydoc", data.fd, "link.ydoc"), 0);
    assert_int_equal(mkfifoat(data.fd, "pipe.ydoc", 0600), 0);
    first = descriptors();
    text = told(jrnl_print_list, 0);
    assert_non_null(strstr(text, "a/B\t37\t1\n"));
    assert_non_null(strstr(text, "other\t39\t1\n"));
    assert_non_null(strstr(text, "\xe4\xb8\xad\t37\t1\n"));
    assert_non_null(strstr(text, "headless\t22\t0\n"));
    assert_int_equal(strlen(text), strlen("a/B\t37\t1\nother\t39\t1\nxxx\t37\t1"
                                          "\nheadless\t22\t0\n"));
    assert_int_equal(descriptors(), first);

    /* a newer one has a name, but cannot be counted */
    assert_true(jrnl_create(&data, span_text("newer"), &f) > 0);
    image_len = 0;
    put_head(2, span_text("newer"));
    put("newer.ydoc", image, 19);
    jrnl_discard(&data, &f);
    text = told(jrnl_print_list, 1);
    assert_null(strstr(text, "newer"));
    assert_true(test_said("newer.ydoc: Protocol not supported"));
}

static void
a_check_says_what_is_where_and_changes_nothing(void **state)
{
    static const char file[] = "%4eotes%2f1.ydoc";
    char expected[300];

    (void)state;
    make_good();
    use_disk();
    put(file, good, good_len);
    (void)snprintf(expected, sizeof expected, "%s: 8 records, %zu bytes\n",
                   file, good_len);
    assert_string_equal(told(jrnl_fsck, 0), expected);
    image[begins[2] + 5] ^= 1;
    put(file, image, good_len - 1); /* damaged and torn */
    (void)snprintf(expected, sizeof expected,
                   "%s: damage, bytes %zu to %zu\n"
                   "%s: torn tail, bytes %zu to %zu\n"
                   "%s: 6 records, %zu bytes, damaged\n",
                   file, begins[2], begins[3] - 1, file, begins[7],
                   good_len - 2, file, good_len - 1);
    assert_string_equal(told(jrnl_fsck, 1), expected);
    put(file, good, good_len - 1); /* only torn */
    assert_non_null(strstr(told(jrnl_fsck, 1), "torn tail, bytes "));
    assert_int_equal(size_of(file), good_len - 1);
    assert_int_equal(renameat(data.fd, "%4eotes%2f1.ydoc", data.fd, "b.ydoc"),
                     0);
    assert_non_null(strstr(told(jrnl_fsck, 1), ", another document's file\n"));
    put_head(2, span_text("b"));
    put("b.ydoc", image, 15);
    assert_string_equal(told(jrnl_fsck, 1),
                        "b.ydoc: Protocol not supported; a newer collabd wrote "
                        "it and can read it; it is left alone\n");
    put("b.ydoc", "", 0);
    assert_string_equal(told(jrnl_fsck, 1),
                        "b.ydoc: 0 records, 0 bytes, damaged\n");
    assert_int_equal(unlinkat(data.fd, "b.ydoc", 0), 0);
    assert_string_equal(told(jrnl_fsck, 0), "");
}

/* ----- released versions ------------------------------------------------ */

static void
a_journal_of_version_1_is_read_for_ever(void **state)
{
    static const struct {
        enum jrnl_found found;
        uint8_t kind;
        uint64_t from;
        const char *payload; /* its hexadecimal digits */
    } expected[] = {
        { JRNL_RECORD, 1, 22, "0c010101000401017402616200" },
        { JRNL_RECORD, 1, 51, "0b0101020004010174016300" },
        { JRNL_DAMAGE, 0, 79, "" },
        { JRNL_RECORD, 2, 139, "060001010101010a01010102840101016400" },
        { JRNL_END, 0, 173, "" },
    };
    struct jrnl_file f = { .name = span_text("Notes/\xc3\xa4") };
    struct jrnl_record rec;
    struct stat st;

    (void)state;
    f.fd = open("tests/fixtures/journal-v1.ydoc", O_RDONLY | O_CLOEXEC);
    assert_true(f.fd >= 0);
    assert_int_equal(fstat(f.fd, &st), 0);
    f.end = (uint64_t)st.st_size;
    assert_int_equal(jrnl_read(&reader, &f, lent, sizeof lent), 0);
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++) {
        char hex[100] = "";
        struct out o = out_over(hex, sizeof hex);
        assert_int_equal(jrnl_next(&reader, &rec), expected[i].found);
        assert_int_equal(rec.from, expected[i].from);
        if (expected[i].found != JRNL_RECORD)
            continue;
        assert_int_equal(rec.kind, expected[i].kind);
        out_hex(&o, rec.payload.at, span_len(rec.payload));
        assert_string_equal(hex, expected[i].payload);
    }
    assert_int_equal(rec.to, st.st_size);
    assert_int_equal(reader.unknown, 1);
    assert_int_equal(reader.damaged, 23);
    jrnl_close(&f);
}

#define IN_MEMORY(test) \
    cmocka_unit_test_setup_teardown(test, begin_good, end_image)
#define ON_DISK(test) \
    cmocka_unit_test_setup_teardown(test, begin_disk, end_disk)

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_checksum_is_the_one_of_the_standard),
        cmocka_unit_test(a_name_becomes_the_name_of_a_file),
        cmocka_unit_test(a_long_name_fits_and_stays_its_own),
        cmocka_unit_test(no_two_names_share_a_file_on_a_disk_without_case),
        cmocka_unit_test(a_file_that_no_name_has_is_not_unescaped),
        IN_MEMORY(all_records_come_back),
        IN_MEMORY(with_room_for_the_file_it_is_read_once_and_payloads_stay),
        IN_MEMORY(a_record_longer_than_the_memory_is_checked_not_shown),
        IN_MEMORY(cut_anywhere_every_whole_record_is_found),
        IN_MEMORY(a_byte_changed_anywhere_costs_one_record),
        IN_MEMORY(a_hole_costs_what_it_touches),
        IN_MEMORY(a_record_counts_only_in_its_place),
        IN_MEMORY(a_length_beyond_the_end_hides_nothing),
        IN_MEMORY(many_false_heads_take_no_longer),
        IN_MEMORY(kinds_yet_to_come_are_passed_over),
        IN_MEMORY(a_disk_that_cannot_be_read_is_no_damage),
        IN_MEMORY(a_file_of_another_version_or_document_is_refused),
        IN_MEMORY(another_kind_of_file_has_no_head),
        ON_DISK(a_document_is_made_read_and_written_on),
        ON_DISK(one_process_writes_in_a_folder),
        ON_DISK(a_new_folder_is_synced_into_the_one_above),
        ON_DISK(a_folder_that_cannot_be_had_is_told),
        ON_DISK(a_start_clears_away_what_was_in_the_making),
        ON_DISK(damaged_originals_are_kept_until_the_document_is_deleted),
        ON_DISK(links_pipes_and_folders_are_no_documents),
        ON_DISK(a_full_disk_changes_nothing_however_much_went_in),
        ON_DISK(what_cannot_be_cut_back_is_not_written_again),
        ON_DISK(what_cannot_be_replaced_stays_in_its_place),
        ON_DISK(a_rename_counts_when_the_folder_is_synced),
        ON_DISK(a_file_that_was_not_synced_is_not_written_again),
        ON_DISK(a_file_that_somebody_deletes_is_noticed_at_the_next_sync),
        ON_DISK(a_disk_that_turns_read_only_still_gives_what_it_has),
        ON_DISK(a_folder_that_is_gone_is_told),
        ON_DISK(a_file_grows_to_two_gigabytes_and_no_further),
        ON_DISK(whatever_call_fails_what_was_acknowledged_is_found),
        ON_DISK(listing_finds_documents_and_no_strangers),
        ON_DISK(a_check_says_what_is_where_and_changes_nothing),
        cmocka_unit_test(a_journal_of_version_1_is_read_for_ever),
    };

    return cmocka_run_group_tests(tests, test_group_listen_in,
                                  test_group_listen_no_more);
}
