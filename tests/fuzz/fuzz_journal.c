/* A journal in memory, by a program of appends, accidents and resumptions:
 * every record that no accident touched is found, whatever lies around it, and
 * what is found is what a simpler reader finds.
 *
 * The input is the name's length, the name, then steps: a byte that says which,
 * and its numbers, of two bytes each.
 *
 * SPDX-License-Identifier: MIT
 */
#include "fuzz.h"

#define FILE_MOST 65536
#define RECORDS_MOST 200

static uint8_t image[FILE_MOST];
static size_t image_len, write_room;

/* What was appended, as far as the file still has it. */
static struct {
    size_t from, to;
    bool hit; /* by an accident */
} records[RECORDS_MOST];
static size_t record_count;
static bool foreign; /* bytes of the input's own stand in the file */

/* ----- a disk ----------------------------------------------------------- */

static ssize_t
fake_pread(int fd, void *to, size_t len, off_t at)
{
    size_t left = image_len - (size_t)at;

    (void)fd;
    len = len < left ? len : left;
    if (len > 100)
        len -= len / 3; /* it may come in parts */
    memcpy(to, image + at, len);
    return (ssize_t)len;
}

static ssize_t
fake_pwritev(int fd, const struct iovec *parts, int count, off_t at)
{
    size_t done = 0;

    (void)fd;
    assert((size_t)at <= image_len);
    for (int i = 0; i < count; i++) {
        size_t n = parts[i].iov_len < write_room ? parts[i].iov_len
                                                 : write_room;
        if (n > 0)
            memcpy(image + at + done, parts[i].iov_base, n);
        done += n;
        write_room -= n;
    }
    if (image_len < (size_t)at + done)
        image_len = (size_t)at + done;
    errno = ENOSPC;
    return done > 0 ? (ssize_t)done : -1;
}

static int
fake_ftruncate(int fd, off_t len)
{
    (void)fd;
    assert((size_t)len <= image_len);
    image_len = (size_t)len;
    return 0;
}

static int
fake_openat(int folder, const char *name, int how, ...)
{
    (void)folder, (void)name, (void)how;
    return 1000;
}

static int
fake_unlinkat(int folder, const char *name, int how)
{
    (void)folder, (void)name, (void)how;
    return 0;
}

static int
fake_close(int fd)
{
    assert(fd == 1000);
    return 0;
}

/* ----- a simpler reader ------------------------------------------------- */

static uint32_t
simple_crc(uint32_t crc, const uint8_t *at, size_t len)
{
    crc = ~crc;
    while (len-- > 0) {
        crc ^= *at++;
        for (int i = 0; i < 8; i++)
            crc = (crc & 1) != 0 ? crc >> 1 ^ 0x82f63b78 : crc >> 1;
    }
    return ~crc;
}

static uint64_t
simple_number(const uint8_t *at, int bytes)
{
    uint64_t n = 0;

    while (bytes-- > 0)
        n = n << 8 | at[bytes];
    return n;
}

/* Is there a record at `at`?  *to is where to look next. */
static bool
simple_judge(size_t at, size_t *to)
{
    const uint8_t *head = image + at;
    uint8_t place[8] = { (uint8_t)at, (uint8_t)(at >> 8), (uint8_t)(at >> 16) };
    uint64_t len;

    *to = at + 1;
    if (image_len - at < 16 || memcmp(head, "\xfaJR", 3) != 0 ||
        simple_number(head + 12, 4) !=
            simple_crc(simple_crc(0, place, 8), head, 12))
        return false;
    len = simple_number(head + 4, 4);
    if (len > image_len - at - 16)
        return false;
    *to = at + 16 + (size_t)len;
    return simple_number(head + 8, 4) == simple_crc(0, head + 16, (size_t)len);
}

/* ----- reading ---------------------------------------------------------- */

static uint8_t lent[FILE_MOST];
static bool found_at[FILE_MOST + 1]; /* a record was found there */

/* Reads the image through so much memory, and compares. */
static void
read_all(struct jrnl_reader *r, const struct jrnl_file *f, size_t lent_len)
{
    struct jrnl_record rec;
    enum jrnl_found found;
    size_t at, unknown = 0;

    if (jrnl_read(r, f, lent, lent_len) != 0) {
        assert(foreign && (errno == EEXIST || errno == EPROTONOSUPPORT));
        r->ended = false;
        return;
    }
    memset(found_at, 0, sizeof found_at);
    at = (size_t)r->at;
    assert(r->headless == (at == 0));
    do {
        size_t to, good;
        bool whole;
        found = jrnl_next(r, &rec);
        for (;; at = to) {
            for (good = at, whole = false; good < image_len; good = to)
                if ((whole = simple_judge(good, &to)) || to > good + 1)
                    break;
            if (!whole || good > at || image[at + 3] == 1 || image[at + 3] == 2)
                break;
            unknown += image[at + 3] != JRNL_TRIAL;
            found_at[at] = true;
        }
        if (good == image_len) {
            assert(found == JRNL_END && rec.from == at && rec.to == image_len);
        } else if (!whole || good > at) {
            assert(found == JRNL_DAMAGE && rec.from == at);
            at = whole ? good : to; /* behind a bad payload */
            assert(rec.to == at);
        } else {
            assert(found == JRNL_RECORD && rec.from == at && rec.to == to);
            assert(rec.kind == image[at + 3]);
            found_at[at] = true;
            if (to - at - 16 <= lent_len)
                assert(span_equals(rec.payload,
                                   span_of(image + at + 16, to - at - 16)));
            else
                assert(rec.payload.at == NULL);
            at = to;
        }
        assert(r->unknown == unknown && r->at == at);
    } while (found != JRNL_END);
}

static void
hit(size_t from, size_t to)
{
    for (size_t i = 0; i < record_count; i++)
        if (records[i].from < to && records[i].to > from)
            records[i].hit = true;
}

/* ----- names ------------------------------------------------------------ */

static void
try_name(struct span name)
{
    char path[JRNL_PATH], file[COLLABD_NAME_MAX + 6];
    uint8_t back[COLLABD_NAME_MAX];
    struct out o = out_over(back, sizeof back);

    (void)jrnl_path(name, ".damaged-3", path);
    assert(strlen(path) <= 143 && path[0] != '.' && strchr(path, '/') == NULL);
    for (const char *c = path; *c != '\0'; c++)
        assert(*c > ' ' && *c < 0x7f && !(*c >= 'A' && *c <= 'Z'));
    (void)jrnl_path(name, "", path);
    if (jrnl_unescape(path, &o))
        assert(span_equals((struct span){ back, o.at }, name));
    else
        assert(strstr(path, "%-") != NULL);
    /* and as the name of a file */
    memcpy(file, name.at, span_len(name));
    memcpy(file + span_len(name), ".ydoc", 6);
    o = out_over(back, sizeof back);
    if (jrnl_unescape(file, &o))
        assert(strcmp(jrnl_path((struct span){ back, o.at }, "", path),
                      file) == 0);
}

/* ----- the program ------------------------------------------------------ */

static struct span input;

static size_t
number(void)
{
    size_t n = 0;

    for (int i = 0; i < 2 && input.at < input.end; i++)
        n = n << 8 | *input.at++;
    return n;
}

static struct span
some(size_t len)
{
    struct span s = input;

    if (len < span_len(s))
        s.end = s.at + len;
    input.at = s.end;
    return s;
}

static void
append(struct jrnl_file *f, uint8_t kind, size_t len)
{
    static uint8_t payload[FILE_MOST];
    struct span given = some(len % 64);
    size_t at = (size_t)f->end, room = write_room;

    len %= 3000;
    if (record_count == RECORDS_MOST || at + 16 + len > sizeof image)
        return;
    memset(payload, (int)(at & 255), len);
    if (!span_is_empty(given))
        memcpy(payload, given.at,
               span_len(given) < len ? span_len(given) : len);
    if (jrnl_append(f, (enum jrnl_kind)kind, span_of(payload, len)) < 0) {
        assert(room < 16 + len && f->end == at && image_len == at);
    } else {
        assert(room >= 16 + len && f->end == at + 16 + len);
        records[record_count].from = at;
        records[record_count].to = (size_t)f->end;
        records[record_count++].hit = false;
    }
    write_room = SIZE_MAX;
}

/* The file is opened again; false: it is not for us. */
static bool
resume(struct jrnl_file *f)
{
    struct jrnl_reader r;
    size_t before = image_len;

    f->end = image_len;
    f->broken = f->damaged = false;
    read_all(&r, f, JRNL_LENT_MIN);
    read_all(&r, f, sizeof lent);
    if (!r.ended)
        return false;
    for (size_t i = 0; i < record_count; i++)
        assert(records[i].hit || found_at[records[i].from]);
    assert(jrnl_resume(f, &r) == 0);
    assert(f->broken == r.headless);
    assert(f->broken ? image_len == before : image_len == f->end);
    while (record_count > 0 && records[record_count - 1].to > image_len)
        record_count--;
    return !f->broken;
}

int
LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc, (void)argv;
    fuzz_quiet();
    sys.pread = fake_pread;
    sys.pwritev = fake_pwritev;
    sys.ftruncate = fake_ftruncate;
    sys.openat = fake_openat;
    sys.unlinkat = fake_unlinkat;
    sys.close = fake_close;
    return 0;
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    static const struct jrnl_folder folder = { -1, -1 };
    struct jrnl_file f = JRNL_CLOSED;
    struct span name;
    bool goes_on = true;
    size_t at, n;

    input = span_of(data, len);
    if (len < 2)
        return 0;
    n = 1 + *input.at++ % COLLABD_NAME_MAX;
    name = some(n);
    try_name(name);
    image_len = record_count = 0;
    foreign = false;
    write_room = SIZE_MAX;
    assert(jrnl_create(&folder, name, &f) == (ssize_t)(14 + span_len(name)));
    for (int steps = 0; goes_on && steps < 100 && input.at < input.end; steps++)
        switch (*input.at++ % 8) {
        case 0:
        case 1:
            append(&f, (uint8_t)(1 + steps % 2), number());
            break;
        case 2: /* a kind yet to come, or none */
            at = number();
            append(&f, (uint8_t)at, at >> 8);
            break;
        case 3: /* a full disk */
            write_room = number() % 3000;
            break;
        case 4: /* bytes change */
            at = number() % (image_len + 1);
            n = number();
            for (size_t i = at; i < image_len && i < at + 1 + n % 50; i++)
                image[i] ^= (uint8_t)(1 + (n >> 8) % 255);
            hit(at, at + 1 + n % 50);
            goes_on = resume(&f);
            break;
        case 5: /* the end is gone */
            image_len -= number() % (image_len + 1);
            hit(image_len, SIZE_MAX);
            goes_on = resume(&f);
            break;
        case 6: /* a torn write left this at the end, or over something */
            name = some(number() % 1000);
            at = number() % (image_len + 1);
            if (span_is_empty(name) || at + span_len(name) > sizeof image)
                break;
            foreign = true;
            memcpy(image + at, name.at, span_len(name));
            hit(at, at + span_len(name));
            if (image_len < at + span_len(name))
                image_len = at + span_len(name);
            record_count = 0; /* a head that lies may hide others */
            goes_on = resume(&f);
            break;
        case 7:
            goes_on = resume(&f);
            break;
        }
    if (goes_on)
        (void)resume(&f);
    return 0;
}
