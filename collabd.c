/* ===== 1  Front page =======================================================
 * collabd.c - a real-time collaboration server that fits in a router.
 *
 * SPDX-License-Identifier: MIT
 *
 * What one client sends to the WebSocket /ws/NAME reaches every other client
 * of that name, whole, at once, and in one order that is the same for all.
 * A document, /yjs/NAME, is such a room that is also kept and caught up on: what
 * Yjs editors send is checked, written to a journal, and only then passed on.
 * Beside that there is what a browser needs to get there: HTTP, TLS, tokens,
 * and files from a folder.  The program is one process and one poll() loop; a
 * thread beside it does what takes long.  It takes its memory when it starts
 * and never more; two libraries, wslay and mbedTLS, do the framing and the
 * cryptography.
 *
 * A byte's way from one browser to the others:
 *
 *      browser A                                 browser B     browser C
 *          │ a frame, masked                           ▲             ▲
 *          ▼                                           │ the same    │
 *      net_recv                                    net_send      net_send
 *          │                                           ▲             ▲
 *   ┌──────▼──────────────────┐                        │             │
 *   │ receiver: lent to whom  │  ws_next: unmask,      │             │
 *   │ is read; wslay's buffer │  judge, check UTF-8    │             │
 *   │ is the receive buffer   │                        │             │
 *   └──┬───────────────────┬──┘                        └──────┬──────┘
 *      │ whole and short   │ long, or in pieces               │
 *      │                   ▼                                  │
 *      │ one copy    message memory, ──────▶ room_gather: spans of
 *      │             in chunks               ring and blocks, no copy
 *      ▼                   ▼ an entry that names it       ▲
 *   ┌─────────────────────────────────────────────────────┴──────────┐
 *   │ the room's ring   ┄┄┄▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓┄┄┄┄┄┄┄┄┄ │
 *   └──────────────────────┴───────────┴───────────────────┴─────────┘
 *                        tail      C's cursor     head = B's cursor
 *                                                 room_publish moves the head
 *
 *   A turn: poll ─▶ accept ─▶ read each readable client a little ─▶ whatever is
 *   due ─▶ append to journals ─▶ flush the rooms ─▶ flush and free connections
 *   ─▶ hand TLS handshakes to their thread.
 *
 * A document's update goes the same way, with one station more: sync_update
 * checks it and copies it into the document's tail and into the ring; before
 * the rooms are flushed, sync_commit appends the tail's new bytes to the file,
 * and what cannot be kept is taken back from both before anybody saw it.
 *
 * A publish costs one copy, however many members there are, and one system
 * call for each member and turn, however many messages there were.  Output has
 * three sources, control frames, a block of its own (a reply, a first sync) and
 * the ring, and changes between them only where a frame ends.
 *
 * The memory sum, all of it fixed by the settings (`collabd --show-memory`
 * prints each line, --memory refuses a sum that is too large):
 *
 *     max-clients      x  two slots, a place in the poll set
 *   + max-rooms        x  two slots, 2 x ring (the bytes, the table of entries)
 *   + message-memory      messages that are long or come in pieces
 *   + doc-memory          documents: pages that come and go below that cap
 *   + max-requests     x  a request head and a piece of a reply
 *   + receive-buffers  x  wslay's context, which holds the receive buffer
 *   + 2                x  the token table, the one in use and its successor
 *   + max-tls          x  mbedTLS's buffers, and more during a handshake
 *   + 3                x  a stack, for threads of handshakes, disk and merges
 *   + the server itself
 *
 * It is touched only when used.  On top come the kernel's socket buffers, which
 * socket-buffer bounds for each connection.  A pool that is dry is an answer,
 * not a failure: a client waits unread until a deadline, then gets 503 or 1013.
 *
 * What can go wrong, and where the answer stands:
 *
 *   bytes that lie about lengths        2  spans check every bound
 *   an update that would break editors  7  the whole of it is checked first
 *   a flipped bit, a torn write         8  CRCs; the rest is found again
 *   requests read two ways (smuggling) 11  strict heads, no two framings
 *   frames against the rules, bad text 12  judged before they are used
 *   a page of a stranger's site        13  Origin
 *   a stranger's name for this host    13  Host (DNS rebinding)
 *   forged X-Forwarded-For             13  only from --trust-proxy
 *   guessed or leaked tokens           13  hashes, constant time; never logged
 *   a crash or power cut               14  appended before anybody sees it
 *   a document without end             14  max-doc; memory to shrink held back
 *   a client that stops reading        15  overtaken and cut loose
 *   most clients slow                  15  their publishers wait, not for long
 *   a disk that is full or fails       16  taken back, told, asked for again
 *   awareness that crashes clients     16  parsed before it is passed on
 *   a TLS write that was half taken    17  what is owed goes first, same length
 *   handshakes that hold up the rest  4, 17, 21  a thread; max-handshakes
 *   a stolen CA key                    18  name constraints: this box only
 *   a clock that was never set         3, 18  not before the build
 *   a path that leaves the folder      19  walked without links, no `..`
 *   slow-loris, at every stage         20  each state has its deadline
 *   a peer that is gone silently       20  pings; any byte counts as life
 *   one client with all the buffers    21  stalled holders are evicted
 *   out of slots or descriptors        21  a spare one says 503; rest, no spin
 *   a reload with an error in it       22  all or nothing
 *
 * The book.  Each chapter uses only those before it: there are no forward
 * declarations of functions, so the compiler proves it.  A lower chapter never
 * calls an upper one; it returns a verdict or moves a field, and the turn acts
 * on it.  A function's name begins with its chapter's word, and its return type
 * stands on the line above, so `grep -n '^room_' collabd.c` is the index.
 *
 *    n  chapter       look for         there is
 *    1  Front page    -                the plan; build switches, includes
 *    2  Bytes         span_ out_       checked reading and writing, UTF-8
 *    3  Machine       sys_ log_        system calls, the clock, log lines
 *    4  Worker        work_            threads for what takes long
 *    5  Settings      cfg_             every knob, in one table
 *    6  Rings         ring_            cursors, and who may overwrite what
 *    7  Sync codec    y_               Yjs updates as bytes: check, merge, diff
 *    8  Journal       jrnl_            files that survive a power cut
 *    9  Tables        memory_ chunk_   every struct, its invariants, its place
 *   10  Counters      stat_            what is measured; text for /metrics
 *   11  HTTP          http_            a request head to a verdict
 *   12  Frames        ws_ receiver_    frames in; wslay's contexts, lent
 *   13  Access        access_          tokens, Origin, Host, proxies
 *   14  Documents     doc_ aware_      snapshot and tail; kept and made smaller
 *   15  Rooms         room_            publish once, read by cursor; laggards
 *   16  Sync          sync_            what a document's member says and is told
 *   17  Transport     net_ tls_        sockets and TLS behind one pair of calls
 *   18  Certificates  cert_            a CA for this box, and its leaf
 *   19  Files         file_            static files, and no way out
 *   20  Connections   conn_            the state machine; every way to leave
 *   21  The turn      loop_            wait, read, flush, deadlines
 *   22  The program   start_ program_  start and stop; collabd.h's calls; main
 *
 * collabd.h has the limits with the reason for each, the close codes and the
 * calls to embed the server.  Tests include this file (COLLABD_NO_MAIN) and so
 * reach everything in it.
 * ========================================================================= */

#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64 /* else inodes of large disks are an error */

#include "collabd.h"

#ifndef COLLABD_TLS
#define COLLABD_TLS 1
#endif

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <ifaddrs.h>
#include <inttypes.h>
#include <limits.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <pwd.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <syslog.h>
#include <time.h>
#include <unistd.h>

#include <mbedtls/md.h>
#include <mbedtls/version.h>
#if COLLABD_TLS
#include <mbedtls/asn1.h>
#include <mbedtls/ecp.h>
#include <mbedtls/entropy.h>
#include <mbedtls/error.h>
#include <mbedtls/pem.h>
#include <mbedtls/pk.h>
#include <mbedtls/ssl.h>
#include <mbedtls/ssl_ticket.h>
#include <mbedtls/x509_crt.h>
#if MBEDTLS_VERSION_NUMBER >= 0x03000000
#include <psa/crypto.h>
#endif
#endif
#include <wslay/wslay.h>

/* ===== 2  Bytes ============================================================
 * Reading and writing foreign bytes with every bound checked.
 *
 * A span borrows bytes.  A parser takes `struct span *in`, advances it only
 * when it succeeds and answers three ways, so that every prefix of an input
 * can be tested.  A writer writes on and is asked `full` once, at the end.
 * No other pointer arithmetic is done on bytes that come from outside.
 * ========================================================================= */

struct span {
    const uint8_t *at, *end;
};

enum parse { PARSE_BAD = -1, PARSE_MORE = 0, PARSE_OK = 1 };

static struct span
span_of(const void *at, size_t len)
{
    const uint8_t *p = at;
    return (struct span){ p, p == NULL ? NULL : p + len };
}

static struct span
span_text(const char *text)
{
    return span_of(text, strlen(text));
}

static size_t
span_len(struct span s)
{
    return (size_t)(s.end - s.at);
}

static bool
span_is_empty(struct span s)
{
    return s.at == s.end;
}

static uint8_t
byte_lower(uint8_t b)
{
    return b >= 'A' && b <= 'Z' ? (uint8_t)(b + 32) : b;
}

static bool
byte_is_digit(uint8_t b)
{
    return b >= '0' && b <= '9';
}

static bool
span_equals(struct span s, struct span t)
{
    return span_len(s) == span_len(t) &&
           (span_is_empty(s) || memcmp(s.at, t.at, span_len(s)) == 0);
}

static bool
span_is(struct span s, const char *text)
{
    return span_equals(s, span_text(text));
}

/* Equal but for the case of ASCII letters. */
static bool
span_equals_folded(struct span s, struct span t)
{
    if (span_len(s) != span_len(t))
        return false;
    for (size_t i = 0; i < span_len(s); i++)
        if (byte_lower(s.at[i]) != byte_lower(t.at[i]))
            return false;
    return true;
}

static bool
span_is_folded(struct span s, const char *text)
{
    return span_equals_folded(s, span_text(text));
}

static bool
span_starts(struct span s, const char *text)
{
    size_t n = strlen(text);
    return span_len(s) >= n && memcmp(s.at, text, n) == 0;
}

static bool
span_ends_folded(struct span s, const char *text)
{
    size_t n = strlen(text);
    return span_len(s) >= n &&
           span_is_folded(span_of(s.end - n, n), text);
}

/* Where b first stands, or the end. */
static const uint8_t *
span_find(struct span s, uint8_t b)
{
    const void *hit =
        span_is_empty(s) ? NULL : memchr(s.at, b, span_len(s));
    return hit == NULL ? s.end : hit;
}

static bool
span_has(struct span s, uint8_t b)
{
    return span_find(s, b) != s.end;
}

/* What stands before the first b; *in goes on behind it (or to the end). */
static struct span
span_cut(struct span *in, uint8_t b)
{
    const uint8_t *hit = span_find(*in, b);
    struct span part = { in->at, hit };
    in->at = hit == in->end ? in->end : hit + 1;
    return part;
}

/* Without spaces and tabs at both ends: OWS of RFC 9110 5.6.3. */
static struct span
span_trim(struct span s)
{
    while (s.at < s.end && (*s.at == ' ' || *s.at == '\t'))
        s.at++;
    while (s.at < s.end && (s.end[-1] == ' ' || s.end[-1] == '\t'))
        s.end--;
    return s;
}

/* The whole span as a decimal number.  PARSE_BAD: empty, not digits only, or
 * more than max. */
static enum parse
span_decimal(struct span s, uint64_t max, uint64_t *out)
{
    uint64_t n = 0;

    if (span_is_empty(s))
        return PARSE_BAD;
    for (; s.at < s.end; s.at++) {
        uint64_t digit;
        if (!byte_is_digit(*s.at))
            return PARSE_BAD;
        digit = (uint64_t)(*s.at - '0');
        if (n > (max - digit) / 10)
            return PARSE_BAD;
        n = n * 10 + digit;
    }
    if (n > max)
        return PARSE_BAD;
    *out = n;
    return PARSE_OK;
}

static int
hex_value(uint8_t b)
{
    if (byte_is_digit(b))
        return b - '0';
    b = byte_lower(b);
    return b >= 'a' && b <= 'f' ? b - 'a' + 10 : -1;
}

/* Host, as in RFC 9110 7.2: a name, an IPv4 address or [IPv6], perhaps with a
 * port.  *name is without port and brackets. */
static bool
span_cut_host(struct span host, struct span *name)
{
    struct span rest = host;

    if (span_starts(host, "[")) {
        rest.at++;
        *name = span_cut(&rest, ']');
        if (name->end == host.end)
            return false;
        for (struct span s = *name; s.at < s.end; s.at++)
            if (hex_value(*s.at) < 0 && *s.at != ':' && *s.at != '.')
                return false;
        if (!span_is_empty(rest) && *rest.at++ != ':')
            return false;
    } else {
        *name = span_cut(&rest, ':');
        for (struct span s = *name; s.at < s.end; s.at++)
            if (*s.at <= ' ' || *s.at >= 0x7f ||
                strchr("/\\?#@[]<>\"^`{|}%,", *s.at) != NULL)
                return false;
    }
    for (struct span s = rest; s.at < s.end; s.at++)
        if (!byte_is_digit(*s.at))
            return false;
    return !span_is_empty(*name) && span_len(*name) <= 255;
}

/* An IPv4 or IPv6 address; IPv4 becomes ::ffff:a.b.c.d. */
static bool
span_parse_address(struct span text, uint8_t a[16])
{
    char copy[INET6_ADDRSTRLEN];

    if (span_len(text) >= sizeof copy)
        return false;
    memcpy(copy, text.at, span_len(text));
    copy[span_len(text)] = '\0';
    memset(a, 0, 16);
    if (inet_pton(AF_INET, copy, a + 12) == 1) {
        a[10] = a[11] = 255;
        return true;
    }
    return inet_pton(AF_INET6, copy, a) == 1;
}

struct out {
    uint8_t *at, *end;
    bool full; /* something did not fit; what was written is cut short */
};

static struct out
out_over(void *at, size_t len)
{
    uint8_t *p = at;
    return (struct out){ p, p + len, false };
}

static void
out_bytes(struct out *o, const void *from, size_t len)
{
    if ((size_t)(o->end - o->at) < len) {
        o->full = true;
        return;
    }
    if (len > 0)
        memcpy(o->at, from, len);
    o->at += len;
}

static void
out_u8(struct out *o, uint8_t b)
{
    out_bytes(o, &b, 1);
}

static void
out_span(struct out *o, struct span s)
{
    out_bytes(o, s.at, span_len(s));
}

static void
out_text(struct out *o, const char *text)
{
    out_bytes(o, text, strlen(text));
}

static void __attribute__((format(printf, 2, 3)))
out_format(struct out *o, const char *format, ...)
{
    size_t room = (size_t)(o->end - o->at);
    va_list args;
    int n;

    va_start(args, format);
    n = vsnprintf((char *)o->at, room, format, args);
    va_end(args);
    if (n < 0 || (size_t)n >= room)
        o->full = true;
    else
        o->at += n;
}

static void
out_hex(struct out *o, const uint8_t *from, size_t len)
{
    for (size_t i = 0; i < len; i++) {
        out_u8(o, (uint8_t)"0123456789abcdef"[from[i] >> 4]);
        out_u8(o, (uint8_t)"0123456789abcdef"[from[i] & 15]);
    }
}

/* A UTF-8 checker that takes its text in pieces: how many continuation bytes
 * are still missing, and the range the next one must lie in (Unicode 15,
 * table 3-7; RFC 3629).  All zero is "between characters". */
struct utf8 {
    uint8_t need, low, high;
};

/* False: s cannot be the continuation of valid text, whatever follows. */
static bool
utf8_check(struct utf8 *u, struct span s)
{
    while (s.at < s.end) {
        uint8_t b = *s.at;
        if (u->need > 0) {
            if (b < u->low || b > u->high)
                return false;
            *u = (struct utf8){ (uint8_t)(u->need - 1), 0x80, 0xbf };
        } else if (b < 0x80) {
            uint64_t eight;
            while (span_len(s) >= 8) {
                memcpy(&eight, s.at, 8);
                if ((eight & UINT64_C(0x8080808080808080)) != 0)
                    break;
                s.at += 8;
            }
            while (s.at < s.end && *s.at < 0x80)
                s.at++;
            continue;
        } else if (b >= 0xc2 && b <= 0xdf) {
            *u = (struct utf8){ 1, 0x80, 0xbf };
        } else if (b >= 0xe0 && b <= 0xef) {
            *u = (struct utf8){ 2, b == 0xe0 ? 0xa0 : 0x80,
                                b == 0xed ? 0x9f : 0xbf };
        } else if (b >= 0xf0 && b <= 0xf4) {
            *u = (struct utf8){ 3, b == 0xf0 ? 0x90 : 0x80,
                                b == 0xf4 ? 0x8f : 0xbf };
        } else {
            return false;
        }
        s.at++;
    }
    return true;
}

static bool
utf8_is_complete(const struct utf8 *u)
{
    return u->need == 0;
}

static const char base64_digits[] =
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/* RFC 4648 4, with padding. */
static void
out_base64(struct out *o, const uint8_t *from, size_t len)
{
    for (size_t i = 0; i < len; i += 3) {
        size_t left = len - i;
        uint32_t v = (uint32_t)from[i] << 16 |
                     (left > 1 ? (uint32_t)from[i + 1] << 8 : 0) |
                     (left > 2 ? (uint32_t)from[i + 2] : 0);
        out_u8(o, (uint8_t)base64_digits[v >> 18]);
        out_u8(o, (uint8_t)base64_digits[v >> 12 & 63]);
        out_u8(o, left > 1 ? (uint8_t)base64_digits[v >> 6 & 63] : '=');
        out_u8(o, left > 2 ? (uint8_t)base64_digits[v & 63] : '=');
    }
}

/* Is this the base64 of exactly 16 bytes?  22 digits and two pads, the last
 * digit with its four spare bits zero. */
static bool
span_is_base64_of_16(struct span s)
{
    if (span_len(s) != 24 || s.at[22] != '=' || s.at[23] != '=')
        return false;
    for (int i = 0; i < 22; i++)
        if (s.at[i] == 0 || strchr(base64_digits, s.at[i]) == NULL)
            return false;
    return strchr("AQgw", s.at[21]) != NULL;
}

/* Does s match the pattern, in which * stands for any bytes (also none, also
 * `/`)?  Iterative with one point to return to, so time is at most the
 * product of the lengths. */
static bool
span_matches(struct span s, struct span glob)
{
    struct span back_s = { NULL, NULL }, back_glob = { NULL, NULL };

    for (;;) {
        if (glob.at < glob.end && *glob.at == '*') {
            glob.at++;
            back_glob = glob;
            back_s = s;
        } else if (s.at == s.end && glob.at == glob.end) {
            return true;
        } else if (s.at < s.end && glob.at < glob.end && *s.at == *glob.at) {
            s.at++;
            glob.at++;
        } else {
            if (back_glob.at == NULL || back_s.at == back_s.end)
                return false;
            back_s.at++;
            s = back_s;
            glob = back_glob;
        }
    }
}
/* ===== 3  Machine ==========================================================
 * What can fail outside, the clock, and how we speak.
 *
 * System calls that can fail go through `sys`, so that a test can make the
 * n-th one fail.  The clock is read once a turn.  A log line is one line: what
 * peers sent is escaped before it is printed.
 * ========================================================================= */

static struct {
    int (*ppoll)(struct pollfd *, nfds_t, const struct timespec *,
                 const sigset_t *);
    int (*accept4)(int, struct sockaddr *, socklen_t *, int);
    ssize_t (*recv)(int, void *, size_t, int);
    ssize_t (*send)(int, const void *, size_t, int);
    ssize_t (*sendmsg)(int, const struct msghdr *, int);
    int (*openat)(int, const char *, int, ...);
    ssize_t (*read)(int, void *, size_t);
    ssize_t (*pread)(int, void *, size_t, off_t);
    int (*close)(int);
    void *(*calloc)(size_t, size_t);
    int (*clock_gettime)(clockid_t, struct timespec *);
    ssize_t (*write)(int, const void *, size_t);
    int (*fsync)(int);
    int (*renameat)(int, const char *, int, const char *);
    int (*unlinkat)(int, const char *, int);
    int (*mkdirat)(int, const char *, mode_t);
    int (*faccessat)(int, const char *, int, int);
    int (*fstat)(int, struct stat *);
    int (*flock)(int, int);
    ssize_t (*pwritev)(int, const struct iovec *, int, off_t);
    int (*ftruncate)(int, off_t);
    int (*fdatasync)(int);
    DIR *(*fdopendir)(int);
    struct dirent *(*readdir)(DIR *);
    void *(*mmap)(void *, size_t, int, int, int, off_t);
    void *(*mremap)(void *, size_t, size_t, int, ...);
    int (*pthread_create)(pthread_t *, const pthread_attr_t *,
                          void *(*)(void *), void *);
} sys = { ppoll, accept4, recv, send, sendmsg, openat,
          read, pread, close, calloc, clock_gettime,
          write, fsync, renameat, unlinkat, mkdirat, faccessat, fstat,
          flock, pwritev, ftruncate, fdatasync, fdopendir, readdir,
          mmap, mremap, pthread_create };

/* Milliseconds since some moment in the past, never going back. */
static int64_t now_ms;

static uint64_t
sys_now_us(void)
{
    struct timespec t = { 0, 0 };

    (void)sys.clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

static void
sys_read_clock(void)
{
    now_ms = (int64_t)(sys_now_us() / 1000);
}

#if COLLABD_TLS
/* Seconds since 1970.  A board without a battery starts in 1970: a clock
 * before the build counts as the build. */
static int64_t
sys_now_real(void)
{
    struct timespec t = { 0, 0 };

    (void)sys.clock_gettime(CLOCK_REALTIME, &t);
    return t.tv_sec < COLLABD_BUILD_EPOCH ? COLLABD_BUILD_EPOCH : t.tv_sec;
}
#endif

enum log_level {
    LOG_LEVEL_ERROR,   /* act */
    LOG_LEVEL_WARNING, /* know */
    LOG_LEVEL_INFO,    /* lives and deaths */
    LOG_LEVEL_DEBUG    /* turns */
};

static const char *const log_names[] = { "error", "warning", "info",
                                         "debug" };

static enum log_level log_limit = LOG_LEVEL_INFO;
static bool log_to_syslog;

static void __attribute__((format(printf, 2, 3)))
log_say(enum log_level level, const char *format, ...)
{
    static const int priority[] = { LOG_ERR, LOG_WARNING, LOG_INFO,
                                    LOG_DEBUG };
    char line[640];
    size_t at, end;
    va_list args;
    int n;

    if (level > log_limit)
        return;
    at = (size_t)snprintf(line, 32, "%s: ", log_names[level]);
    va_start(args, format);
    n = vsnprintf(line + at, sizeof line - at - 1, format, args);
    va_end(args);
    if (n < 0)
        return;
    end = at + (size_t)n;
    if (end > sizeof line - 2)
        end = sizeof line - 2;
    for (size_t i = at; i < end; i++)
        if ((unsigned char)line[i] < 0x20 || line[i] == 0x7f)
            line[i] = '?';
    if (log_to_syslog) {
        syslog(priority[level], "%.*s", (int)(end - at), line + at);
        return;
    }
    line[end] = '\n';
    if (write(STDERR_FILENO, line, end + 1) < 0)
        return; /* nobody can be told */
}

/* An assertion that is never compiled out and says only where it stands: the
 * texts and function names that assert() keeps would be a twentieth of the
 * executable. */
#define must(fact) ((fact) ? (void)0 : sys_broken(__LINE__))

static void __attribute__((noreturn, cold))
sys_broken(int line)
{
    log_say(LOG_LEVEL_ERROR,
            "collabd.c line %d, version %s: an invariant is broken; please "
            "report this", line, COLLABD_VERSION);
    abort();
}

/* A quota of lines a second, so that a flood of peers is not a flood of lines.
 * What was held back is said with the next line that gets through. */
struct log_quota {
    int64_t since_ms;
    unsigned said, held;
};

#define LOG_QUOTA 20

static bool
log_may(struct log_quota *q)
{
    if (now_ms - q->since_ms >= 1000) {
        if (q->held > 0)
            log_say(LOG_LEVEL_WARNING, "%u more lines like this held back",
                    q->held);
        *q = (struct log_quota){ .since_ms = now_ms };
    }
    if (q->said >= LOG_QUOTA) {
        q->held++;
        return false;
    }
    q->said++;
    return true;
}

/* A folder kept open and the name of a file in it: what reload must still find
 * after chroot and a change of user. */
struct sys_file {
    int folder; /* -1: none */
    const char *name;
};

static struct sys_file
sys_file_at(const char *path)
{
    const char *slash = strrchr(path, '/');
    char folder[PATH_MAX] = ".";

    if (slash != NULL) {
        size_t n = (size_t)(slash - path);
        if (n >= sizeof folder) {
            errno = ENAMETOOLONG;
            return (struct sys_file){ -1, path };
        }
        memcpy(folder, path, n == 0 ? 1 : n);
        folder[n == 0 ? 1 : n] = '\0';
    }
    return (struct sys_file){
        sys.openat(AT_FDCWD, folder, O_PATH | O_DIRECTORY | O_CLOEXEC),
        slash == NULL ? path : slash + 1
    };
}

/* Reads a whole small file; its length, or -1 with errno (EFBIG: more than
 * max).  A zero byte follows what was read, so buf holds max + 1. */
static ssize_t
sys_read_file(struct sys_file file, uint8_t *buf, size_t max)
{
    int fd = sys.openat(file.folder, file.name,
                        O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    size_t len = 0;
    ssize_t n;

    if (fd < 0)
        return -1;
    while ((n = sys.read(fd, buf + len, max + 1 - len)) > 0) {
        len += (size_t)n;
        if (len > max) {
            n = -1;
            errno = EFBIG;
            break;
        }
    }
    if (n < 0) {
        int error = errno;
        (void)sys.close(fd);
        errno = error;
        return -1;
    }
    (void)sys.close(fd);
    buf[len] = 0;
    return (ssize_t)len;
}

/* Fills buf from the kernel's generator. */
static bool
sys_random(void *buf, size_t len)
{
    uint8_t *at = buf;

    while (len > 0) {
        ssize_t n = getrandom(at, len, 0);
        if (n < 0 && errno != EINTR)
            return false;
        if (n > 0) {
            at += n;
            len -= (size_t)n;
        }
    }
    return true;
}

/* SHA-1 and SHA-256 by one spelling that mbedTLS 2.28 and 3.6 share. */
static void
sys_hash(mbedtls_md_type_t type, struct span of, uint8_t *out)
{
    const mbedtls_md_info_t *info = mbedtls_md_info_from_type(type);
    int failed = info == NULL
                     ? -1
                     : mbedtls_md(info, of.at, span_len(of), out);

    must(failed == 0);
    (void)failed;
}

/* Tells the service manager; -1 as fd: there is none. */
static void
sys_notify(int fd, const char *state)
{
    if (fd >= 0 && sys.send(fd, state, strlen(state),
                            MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
        log_say(LOG_LEVEL_DEBUG, "NOTIFY_SOCKET: %s", strerror(errno));
}
/* ===== 4  Worker ===========================================================
 * Threads beside the turn, for work that would hold everybody up.
 *
 *    the turn  work_post ─▶ lane's todo ─▶ run() ─▶ done ─▶ work_collect
 *                                      a thread            the turn again
 *
 * A job is a struct inside its owner: from work_post until work_collect gives
 * it back it is the thread's, with all that its run() touches.  Nothing else is
 * shared, so one lock is enough, and it guards the lists.  The turn is woken
 * through a descriptor in its poll set; it waits for a thread only at the end.
 *
 * Each lane has a thread of its own, so that what is short never waits behind
 * what is long.  It begins with the lane's first job: whoever needs none has
 * none, and it never runs as the user of before start_drop.  Where there can be
 * no thread, work_post says so, and the caller does the work itself.
 * ========================================================================= */

enum work_lane {
    WORK_CRYPTO, /* handshakes: milliseconds, on a small router 100 */
    WORK_DISK,   /* what waits for the disk */
    WORK_MERGE,  /* merges of long documents: seconds on a small router */
    WORK_LANES
};

struct collabd;

struct work {
    void (*run)(struct work *);                    /* by a thread */
    void (*done)(struct collabd *, struct work *); /* by a turn, later */
    struct work *next;
};

/* First come, first served. */
struct work_list {
    struct work *first, *last;
};

struct workers {
    pthread_mutex_t lock;
    struct work_list done;
    bool stopping;
    int wake;    /* readable when something is done; -1: no thread yet */
    bool failed; /* there can be no thread */
    struct work_thread {
        struct workers *all;
        bool runs;
        pthread_t id;
        pthread_cond_t posted;
        struct work_list todo;
    } lane[WORK_LANES];
};

#define WORK_STACK (128u << 10) /* a handshake was seen to need 12 KiB */
#define WORK_NICE 10            /* on a single CPU the turn goes first */

static void
work_list_add(struct work_list *l, struct work *w)
{
    w->next = NULL;
    if (l->first == NULL)
        l->first = w;
    else
        l->last->next = w;
    l->last = w;
}

static void *
work_thread(void *lane)
{
    struct work_thread *t = lane;
    struct workers *all = t->all;
    const uint64_t one = 1;
    struct work *w;

    (void)nice(WORK_NICE); /* with Linux that is the thread's alone */
    (void)pthread_mutex_lock(&all->lock);
    for (;;) {
        while ((w = t->todo.first) == NULL && !all->stopping)
            (void)pthread_cond_wait(&t->posted, &all->lock);
        if (w == NULL)
            break;
        t->todo.first = w->next;
        (void)pthread_mutex_unlock(&all->lock);
        w->run(w);
        (void)pthread_mutex_lock(&all->lock);
        work_list_add(&all->done, w);
        /* the turn goes first: it shall not find the lock taken */
        (void)pthread_mutex_unlock(&all->lock);
        must(write(all->wake, &one, sizeof one) == sizeof one);
        (void)pthread_mutex_lock(&all->lock);
    }
    (void)pthread_mutex_unlock(&all->lock);
    return NULL;
}

/* Begins a lane's thread, with all signals blocked: they are for the turn. */
static bool
work_start(struct workers *all, struct work_thread *t)
{
    pthread_attr_t attr; /* nothing in it is to be freed */
    sigset_t ours, none;
    int error;

    if (all->wake < 0) {
        all->lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
        all->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    }
    t->all = all;
    t->posted = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
    (void)pthread_attr_init(&attr);
    (void)pthread_attr_setstacksize(&attr, WORK_STACK);
    (void)sigfillset(&none);
    (void)pthread_sigmask(SIG_SETMASK, &none, &ours);
    error = all->wake < 0
                ? errno
                : sys.pthread_create(&t->id, &attr, work_thread, t);
    (void)pthread_sigmask(SIG_SETMASK, &ours, NULL);
    if (error != 0)
        log_say(LOG_LEVEL_WARNING, "no thread for what takes long, so it will "
                "hold up the rest: %s", strerror(error));
    t->runs = error == 0;
    all->failed = error != 0;
    return t->runs;
}

/* Hands a job to a lane.  False: there is no thread; the caller is to do it
 * here and now.  (Without TLS nobody has any.) */
static bool __attribute__((unused))
work_post(struct workers *all, enum work_lane lane, struct work *w)
{
    struct work_thread *t = &all->lane[lane];

    if (!t->runs && (all->failed || !work_start(all, t)))
        return false;
    (void)pthread_mutex_lock(&all->lock);
    work_list_add(&t->todo, w);
    (void)pthread_cond_signal(&t->posted);
    (void)pthread_mutex_unlock(&all->lock);
    return true;
}

/* All that was done since the last time, linked by .next. */
static struct work *
work_collect(struct workers *all)
{
    struct work *first;
    uint64_t count;

    (void)sys.read(all->wake, &count, sizeof count);
    (void)pthread_mutex_lock(&all->lock);
    first = all->done.first;
    all->done.first = NULL;
    (void)pthread_mutex_unlock(&all->lock);
    return first;
}

/* Ends the threads; what was posted is done first.  From now on nothing can be
 * posted. */
static void
work_stop(struct workers *all)
{
    all->failed = true;
    if (all->wake < 0)
        return;
    (void)pthread_mutex_lock(&all->lock);
    all->stopping = true;
    (void)pthread_mutex_unlock(&all->lock);
    for (unsigned i = 0; i < WORK_LANES; i++) {
        struct work_thread *t = &all->lane[i];
        if (!t->runs)
            continue;
        (void)pthread_cond_signal(&t->posted);
        (void)pthread_join(t->id, NULL);
        t->runs = false;
    }
}
/* ===== 5  Settings =========================================================
 * Every knob, its range, default and effect, in one table.  A flag --name and
 * a line `name = value` of the configuration file are the same setting; flags
 * win.  The table makes the parser, --help and the check against the manual.
 *
 * A SIGHUP reads everything anew into a second struct.  Only if all of it is
 * right does it take effect, and only for settings marked LIVE; a change of
 * any other is reported as needing a restart.
 * ========================================================================= */

/* clang-format off */
/*   kind   name              default    least  most       when   value      help */
#define CFG_SETTINGS(X) \
    X(ADDR,  listen,           "",        0,     0,         START, "ADDR",    "serve http:// and ws:// on PORT, HOST:PORT, [V6]:PORT or unix:PATH (default 8080; port 0 picks one)") \
    X(ADDR,  tls_listen,       "",        0,     0,         START, "ADDR",    "serve https:// and wss:// there; needs tls-cert and tls-key") \
    X(TEXT,  tls_cert,         "",        0,     0,         START, "FILE",    "certificate chain (PEM), see --make-cert") \
    X(TEXT,  tls_key,          "",        0,     0,         START, "FILE",    "its private key (PEM)") \
    X(OCTAL, unix_mode,        "0660",    0,     0777,      START, "MODE",    "permissions of unix sockets") \
    X(TEXT,  tokens,           "",        0,     0,         START, "FILE",    "who may do what; without it everyone may read and write") \
    X(ORIGIN, origin,           "",        0,     0,         LIVE,  "ORIGIN",  "also let pages from there in: scheme://host[:port], a host, null, or *") \
    X(HOST,  host,             "",        0,     0,         LIVE,  "NAME",    "also answer to this host name") \
    X(PEER,  trust_proxy,      "",        0,     0,         LIVE,  "ADDR",    "believe X-Forwarded-For from this address, or from unix sockets with \"unix\"") \
    X(TEXT,  www,              "",        0,     0,         START, "DIR",     "serve the files in DIR") \
    X(TEXT,  data,             "",        0,     0,         START, "DIR",     "keep documents in DIR, made if it is not there; without it they live in memory") \
    X(CHOICE, fsync,           "interval", 0,    0,         START, "interval|always", "when what was written must be on the disk: within a second, or before anybody sees it") \
    X(SIZE,  write_budget,     "0",       0,     INT64_C(1) << 40, LIVE, "SIZE", "bytes an hour to spare flash: waits longer, up to 60 s, between syncs as it is used up (0: no limit)") \
    X(SIZE,  doc_memory,       "16M",     1 << 20, INT64_C(1) << 40, START, "SIZE", "for all open documents") \
    X(SIZE,  max_doc,          "0",       0,     1 << 30,   LIVE,  "SIZE",    "longest document (0: a quarter of doc-memory)") \
    X(CHOICE, gc,              "auto",    0,     0,         LIVE,  "auto|full|off", "deleted content: dropped where that saves space, all of it, or kept") \
    X(FLAG,  yjs_at_root,      "no",      0,     0,         START, "",        "serve documents at /NAME too, as stock examples expect") \
    X(SIZE,  max_clients,      "256",     1,     COLLABD_CLIENTS_CEILING, START, "N", "connections at a time") \
    X(SIZE,  max_rooms,        "64",      1,     COLLABD_ROOMS_CEILING, START, "N", "rooms at a time") \
    X(SIZE,  max_per_ip,       "0",       0,     COLLABD_CLIENTS_CEILING, LIVE, "N", "connections from one address, IPv6 by /64 (0: no limit)") \
    X(SIZE,  max_message,      "1M",      125,   1 << 30,   START, "SIZE",    "longest message") \
    X(SIZE,  max_tls,          "32",      0,     10000,     START, "N",       "TLS connections at a time; mbedTLS takes 40 KiB for each") \
    X(SIZE,  max_handshakes,   "4",       1,     10000,     START, "N",       "TLS handshakes at a time") \
    X(SIZE,  max_requests,     "16",      1,     10000,     START, "N",       "HTTP requests at a time; 16 KiB each") \
    X(SIZE,  receive_buffers,  "32",      1,     10000,     START, "N",       "clients in mid-message at a time; 4 KiB each") \
    X(POWER, ring,             "64K",     65536, 1 << 30,   START, "SIZE",    "a room's ring, a power of two; as much again for its table") \
    X(SIZE,  message_memory,   "0",       0,     INT64_C(1) << 32, START, "SIZE", "for messages longer than a quarter ring (0: 8 x max-message)") \
    X(SIZE,  socket_buffer,    "64K",     4096,  1 << 30,   START, "SIZE",    "kernel buffers of a connection, each way") \
    X(SIZE,  memory,           "0",       0,     INT64_C(1) << 40, START, "SIZE", "refuse to start if the sum of --show-memory is more (0: no limit)") \
    X(SIZE,  rate_messages,    "0",       0,     1 << 30,   LIVE,  "N",       "messages a client may send a second (0: no limit)") \
    X(SIZE,  rate_bytes,       "0",       0,     1 << 30,   LIVE,  "SIZE",    "bytes a client may send a second (0: no limit)") \
    X(SIZE,  coalesce,         "0",       0,     10000,     LIVE,  "MS",      "gather messages of a busy room for so many milliseconds") \
    X(SIZE,  ping_interval,    "25",      1,     3600,      LIVE,  "SECONDS", "ping a client that was silent for so long") \
    X(SIZE,  dead_after,       "50",      2,     7200,      LIVE,  "SECONDS", "drop a client that was silent for so long") \
    X(SIZE,  request_timeout,  "10",      1,     3600,      LIVE,  "SECONDS", "for a request head, a TLS handshake, a wait for memory") \
    X(CHOICE, log_level,       "info",    0,     0,         LIVE,  "error|warning|info|debug", "how much to say") \
    X(FLAG,  syslog,           "no",      0,     0,         START, "",        "log to syslog instead of standard error") \
    X(TEXT,  user,             "",        0,     0,         START, "NAME",    "become this user once the sockets are open") \
    X(TEXT,  chroot,           "",        0,     0,         START, "DIR",     "see only DIR from then on") \
    X(FLAG,  prefault,         "no",      0,     0,         START, "",        "touch and lock all memory at start")

#define CFG_ACTIONS(X) \
    X(config,      "FILE", "read settings from FILE, lines of `name = value`; flags win") \
    X(check,       "",     "check all settings and files, then exit") \
    X(show_memory, "",     "print the memory that these settings take, then exit") \
    X(make_cert,   "DIR",  "make a certificate authority and a certificate for this machine in DIR, then exit") \
    X(list,        "DIR",  "list the documents in DIR with their bytes and records, then exit") \
    X(fsck,        "DIR",  "look for damage in the documents of DIR, then exit; nothing is changed") \
    X(export,      "DIR NAME", "write a document to standard output as a Yjs update, then exit") \
    X(import,      "DIR NAME", "add a Yjs update from standard input to a document, then exit") \
    X(delete,      "DIR NAME", "remove a document and what was kept aside of it, then exit") \
    X(make_token,  "",     "print a new token and its line for the tokens file, then exit") \
    X(help,        "",     "print this") \
    X(version,     "",     "print the versions of collabd and its libraries")
/* clang-format on */

/* Texts stand in one store inside the struct, as offsets, so that a struct
 * can be copied. */
struct cfg_list {
    uint16_t count;
    uint16_t item[16];
};

#define CFG_FIELD_ADDR   struct cfg_list
#define CFG_FIELD_ORIGIN struct cfg_list
#define CFG_FIELD_HOST   struct cfg_list
#define CFG_FIELD_PEER   struct cfg_list
#define CFG_FIELD_TEXT  uint16_t
#define CFG_FIELD_OCTAL uint64_t
#define CFG_FIELD_SIZE  uint64_t
#define CFG_FIELD_POWER uint64_t
#define CFG_FIELD_CHOICE uint64_t
#define CFG_FIELD_FLAG  uint64_t

struct cfg {
#define X(kind, name, def, least, most, when, value, help) \
    CFG_FIELD_##kind name;
    CFG_SETTINGS(X)
#undef X
    uint16_t store_used; /* offset 0 is the empty text */
    char store[COLLABD_CFG_TEXT];
};

enum cfg_kind {
    CFG_ADDR, CFG_ORIGIN, CFG_HOST, CFG_PEER, /* lists of texts */
    CFG_TEXT, CFG_OCTAL, CFG_SIZE, CFG_POWER, CFG_CHOICE, CFG_FLAG
};
enum cfg_when { CFG_START, CFG_LIVE };

/* Short texts stand in the table itself: a pointer and its relocation would
 * take four times their place. */
static const struct cfg_setting {
    char name[16]; /* with underscores */
    enum cfg_kind kind;
    enum cfg_when when;
    size_t field;
    int64_t least, most;
    char def[10], value[26]; /* of a CHOICE: its words */
    const char *help;
} cfg_settings[] = {
#define X(kind, name, def, least, most, when, value, help)               \
    { #name, CFG_##kind, CFG_##when, offsetof(struct cfg, name), least, most, \
      def, value, help },
    CFG_SETTINGS(X)
#undef X
};

#define CFG_COUNT (sizeof cfg_settings / sizeof *cfg_settings)

enum cfg_action {
    CFG_ACTION_NONE,
#define X(name, value, help) CFG_ACTION_##name,
    CFG_ACTIONS(X)
#undef X
};

static const struct {
    const char *name, *value, *help;
} cfg_actions[] = {
    { "", "", "" },
#define X(name, value, help) { #name, value, help },
    CFG_ACTIONS(X)
#undef X
};

#define CFG_ACTION_COUNT (sizeof cfg_actions / sizeof *cfg_actions)

static const char *
cfg_text(const struct cfg *c, uint16_t text)
{
    return c->store + text;
}

/* The i-th text of a list. */
static const char *
cfg_item(const struct cfg *c, const struct cfg_list *list, unsigned i)
{
    return c->store + list->item[i];
}

static void *
cfg_field(struct cfg *c, const struct cfg_setting *set)
{
    return (char *)c + set->field;
}

/* Does a name as typed (dashes) say a name of the table (underscores)? */
static bool
cfg_is_named(const char *name, struct span typed)
{
    for (; *name != '\0'; name++, typed.at++)
        if (typed.at == typed.end ||
            *typed.at != (*name == '_' ? '-' : (uint8_t)*name))
            return false;
    return typed.at == typed.end;
}

/* How a setting is typed. */
static const char *
cfg_typed(const char *name, char typed[32])
{
    size_t i;

    for (i = 0; i < 31 && name[i] != '\0'; i++)
        typed[i] = name[i] == '_' ? '-' : name[i];
    typed[i] = '\0';
    return typed;
}

static enum parse
cfg_parse_size(struct span text, uint64_t *out)
{
    unsigned shift = 0;

    if (span_len(text) > 1)
        switch (byte_lower(text.end[-1])) {
        case 'k': shift = 10; break;
        case 'm': shift = 20; break;
        case 'g': shift = 30; break;
        }
    if (shift > 0)
        text.end--;
    if (span_decimal(text, (uint64_t)INT64_MAX >> shift, out) != PARSE_OK)
        return PARSE_BAD;
    *out <<= shift;
    return PARSE_OK;
}

static const char *
cfg_size_text(int64_t n, char text[24])
{
    const char *unit = "";

    if (n > 0 && n % (1 << 30) == 0) {
        n >>= 30;
        unit = "G";
    } else if (n > 0 && n % (1 << 20) == 0) {
        n >>= 20;
        unit = "M";
    } else if (n > 0 && n % (1 << 10) == 0) {
        n >>= 10;
        unit = "K";
    }
    (void)snprintf(text, 24, "%" PRId64 "%s", n, unit);
    return text;
}

static bool
cfg_is_list(const struct cfg_setting *set)
{
    return set->kind <= CFG_PEER;
}

/* Cuts PORT, HOST:PORT or [V6]:PORT; *host is empty if there is none, and
 * without brackets. */
static bool
cfg_cut_address(struct span s, struct span *host, uint64_t *port)
{
    struct span digits = s, whole = { s.at, s.at };
    uint8_t a[16];
    bool numeric = true;

    while (span_has(digits, ':'))
        whole.end = span_cut(&digits, ':').end;
    *host = whole;
    if (span_decimal(digits, 65535, port) != PARSE_OK)
        return false;
    if (span_is_empty(whole))
        return digits.at == s.at; /* no colon either */
    if (!span_cut_host(whole, host))
        return false;
    if (*whole.at == '[')
        return host->end + 1 == whole.end && span_parse_address(*host, a);
    for (struct span h = *host; h.at < h.end; h.at++)
        numeric &= byte_is_digit(*h.at) || *h.at == '.';
    return host->end == whole.end && (!numeric || span_parse_address(*host, a));
}

static bool
cfg_is_address(struct span s)
{
    struct span host;
    uint64_t port;

    if (span_starts(s, "unix:"))
        return span_len(s) > 5 &&
               span_len(s) < 5 + sizeof((struct sockaddr_un *)0)->sun_path;
    return cfg_cut_address(s, &host, &port);
}

/* What is wrong with an element of a list, or NULL. */
static const char *
cfg_judge_element(enum cfg_kind kind, struct span s)
{
    struct span one, name;
    uint8_t a[16];

    switch (kind) {
    case CFG_ADDR:
        return cfg_is_address(s) ? NULL
                                 : "give PORT, HOST:PORT, [V6]:PORT or unix:PATH";
    case CFG_ORIGIN:
        one = s;
        one.at = span_find(s, ':');
        one.at = span_starts(one, "://") ? one.at + 3 : s.at;
        return span_is(s, "*") || span_cut_host(one, &name)
                   ? NULL
                   : "give scheme://host[:port] without a path, a host, null or *";
    case CFG_HOST:
        return span_cut_host(s, &name) && span_equals(s, name)
                   ? NULL
                   : "give a host name without scheme and port";
    case CFG_PEER:
        while (!span_is_empty(s)) {
            one = span_trim(span_cut(&s, ','));
            if (!span_is(one, "unix") && !span_parse_address(one, a))
                return "give IP addresses or \"unix\", with commas between";
        }
        return NULL;
    case CFG_TEXT:
    case CFG_OCTAL:
    case CFG_SIZE:
    case CFG_POWER:
    case CFG_CHOICE:
    case CFG_FLAG:
        break;
    }
    return NULL;
}

/* Says that a value will not do, and what would. */
static bool
cfg_refuse(const struct cfg_setting *set, struct span value, const char *where,
           const char *wanted)
{
    char typed[32];
    int shown = (int)(span_len(value) > 200 ? 200 : span_len(value));

    log_say(LOG_LEVEL_ERROR, "%s: %s is \"%.*s\"; %s", where,
            cfg_typed(set->name, typed), shown, (const char *)value.at, wanted);
    return false;
}

#define CFG_TEXT_OF(number) #number
#define CFG_TEXT_IN(macro) CFG_TEXT_OF(macro)
#define CFG_STORE_TEXT CFG_TEXT_IN(COLLABD_CFG_TEXT)

_Static_assert(sizeof((struct cfg_list *)0)->item / sizeof(uint16_t) == 16,
               "the refusal below says so");

/* A text, or one more of a list, goes into the store. */
static bool
cfg_set_text(struct cfg *c, const struct cfg_setting *set, struct span value,
             const char *where)
{
    const char *wanted = cfg_judge_element(set->kind, value);
    struct cfg_list *list = cfg_field(c, set);
    char needs[64];

    if (span_has(value, 0) || span_is_empty(value)) {
        (void)snprintf(needs, sizeof needs, "it needs a value, %s", set->value);
        return cfg_refuse(set, value, where, needs);
    }
    if (wanted != NULL)
        return cfg_refuse(set, value, where, wanted);
    if (span_len(value) + 1 > sizeof c->store - c->store_used)
        return cfg_refuse(set, value, where,
                          "the texts of all settings are longer than "
                          CFG_STORE_TEXT " bytes together; shorten some");
    if (!cfg_is_list(set))
        *(uint16_t *)cfg_field(c, set) = c->store_used;
    else if (list->count < sizeof list->item / sizeof *list->item)
        list->item[list->count++] = c->store_used;
    else
        return cfg_refuse(set, value, where,
                          "there may be no more than 16 of them");
    memcpy(c->store + c->store_used, value.at, span_len(value));
    c->store_used = (uint16_t)(c->store_used + span_len(value) + 1);
    c->store[c->store_used - 1] = '\0';
    return true;
}

static bool
cfg_parse_octal(struct span text, uint64_t *out)
{
    *out = 0;
    if (span_is_empty(text) || span_len(text) > 4)
        return false;
    for (; text.at < text.end; text.at++) {
        if (*text.at < '0' || *text.at > '7')
            return false;
        *out = *out * 8 + (uint64_t)(*text.at - '0');
    }
    return true;
}

/* The number of a word among `one|two|three`. */
static bool
cfg_parse_choice(struct span words, struct span word, uint64_t *n)
{
    for (*n = 0; !span_is_empty(words); ++*n)
        if (span_equals(span_cut(&words, '|'), word))
            return true;
    return false;
}

static bool
cfg_set_size(const struct cfg_setting *set, struct span value,
             const char *where, uint64_t *n)
{
    char range[80], least[24], most[24];

    if (cfg_parse_size(value, n) != PARSE_OK)
        return cfg_refuse(set, value, where,
                          "give a number, with K, M or G behind it if you "
                          "like");
    if (*n < (uint64_t)set->least || *n > (uint64_t)set->most) {
        (void)snprintf(range, sizeof range, "it may be %s to %s",
                       cfg_size_text(set->least, least),
                       cfg_size_text(set->most, most));
        return cfg_refuse(set, value, where, range);
    }
    if (set->kind == CFG_POWER && (*n & (*n - 1)) != 0)
        return cfg_refuse(set, value, where,
                          "give a power of two, like 64K or 128K");
    return true;
}

/* Sets one setting from its text.  `where` is the file and line or the flag,
 * for the message.  False: refused and said. */
static bool
cfg_set(struct cfg *c, const struct cfg_setting *set, struct span value,
        const char *where)
{
    uint64_t n = 0;
    char words[64];

    switch (set->kind) {
    case CFG_ADDR:
    case CFG_ORIGIN:
    case CFG_HOST:
    case CFG_PEER:
    case CFG_TEXT:
        return cfg_set_text(c, set, value, where);
    case CFG_OCTAL:
        if (!cfg_parse_octal(value, &n) || n > (uint64_t)set->most)
            return cfg_refuse(set, value, where,
                              "give an octal mode like 0660, at most 0777");
        break;
    case CFG_SIZE:
    case CFG_POWER:
        if (!cfg_set_size(set, value, where, &n))
            return false;
        break;
    case CFG_CHOICE:
        if (!cfg_parse_choice(span_text(set->value), value, &n)) {
            (void)snprintf(words, sizeof words, "it may be %s", set->value);
            return cfg_refuse(set, value, where, words);
        }
        break;
    case CFG_FLAG:
        n = span_is(value, "yes");
        if (n == 0 && !span_is(value, "no"))
            return cfg_refuse(set, value, where, "it may be yes or no");
        break;
    }
    *(uint64_t *)cfg_field(c, set) = n;
    return true;
}

static const struct cfg_setting *
cfg_find(struct span typed)
{
    for (size_t i = 0; i < CFG_COUNT; i++)
        if (cfg_is_named(cfg_settings[i].name, typed))
            return &cfg_settings[i];
    return NULL;
}

static void
cfg_defaults(struct cfg *c)
{
    memset(c, 0, sizeof *c);
    c->store_used = 1;
    for (size_t i = 0; i < CFG_COUNT; i++)
        if (*cfg_settings[i].def != '\0')
            (void)cfg_set(c, &cfg_settings[i],
                          span_text(cfg_settings[i].def), "default");
}

/* One line of a configuration file: blank, # comment, or name = value. */
static bool
cfg_line(struct cfg *c, struct span line, const char *where)
{
    const struct cfg_setting *set;
    struct span name;

    if (!span_is_empty(line) && line.end[-1] == '\r')
        line.end--;
    line = span_trim(line);
    if (span_is_empty(line) || *line.at == '#')
        return true;
    if (!span_has(line, '=')) {
        log_say(LOG_LEVEL_ERROR, "%s: \"%.*s\" is no `name = value`", where,
                (int)(span_len(line) > 60 ? 60 : span_len(line)),
                (const char *)line.at);
        return false;
    }
    name = span_trim(span_cut(&line, '='));
    set = cfg_find(name);
    if (set == NULL) {
        log_say(LOG_LEVEL_ERROR,
                "%s: there is no setting \"%.*s\"; see --help", where,
                (int)(span_len(name) > 60 ? 60 : span_len(name)),
                (const char *)name.at);
        return false;
    }
    return cfg_set(c, set, span_trim(line), where);
}

/* All lines of a file's text; every wrong one is reported. */
static bool
cfg_lines(struct cfg *c, struct span text, const char *path)
{
    bool good = true;

    for (unsigned number = 1; !span_is_empty(text); number++) {
        char where[300];
        (void)snprintf(where, sizeof where, "%.250s:%u", path, number);
        good &= cfg_line(c, span_cut(&text, '\n'), where);
    }
    return good;
}

#define CFG_FILE_MAX 16384

/* The path of --config in argv, or NULL. */
static const char *
cfg_path(int argc, char *const argv[])
{
    const char *path = NULL;

    for (int i = 1; i < argc && argv[i] != NULL; i++) {
        if (strncmp(argv[i], "--config=", 9) == 0)
            path = argv[i] + 9;
        else if (strcmp(argv[i], "--config") == 0 && i + 1 < argc)
            path = argv[++i];
    }
    return path;
}

/* What flags say.  A list given by flags replaces the file's.  An action has
 * at most two operands. */
static bool
cfg_flags(struct cfg *c, int argc, char *const argv[], enum cfg_action *action,
          const char *operand[2])
{
    bool from_flags[CFG_COUNT] = { false };

    for (int i = 1; i < argc; i++) {
        struct span value = span_text(argv[i]), name;
        const struct cfg_setting *set;
        bool joined;
        size_t a;
        char where[64];

        if (span_is(value, "-h"))
            value = span_text("--help");
        if (!span_starts(value, "--")) {
            log_say(LOG_LEVEL_ERROR,
                    "\"%s\": flags begin with --; see collabd --help",
                    argv[i]);
            return false;
        }
        value.at += 2;
        joined = span_has(value, '=');
        name = span_cut(&value, '=');
        (void)snprintf(where, sizeof where, "--%.*s",
                       span_len(name) > 40 ? 40 : (int)span_len(name),
                       (const char *)name.at);
        for (a = 1; a < CFG_ACTION_COUNT; a++)
            if (cfg_is_named(cfg_actions[a].name, name))
                break;
        set = cfg_find(name);
        if (set == NULL && a == CFG_ACTION_COUNT) {
            log_say(LOG_LEVEL_ERROR, "%s: there is no such flag; see "
                    "collabd --help", where);
            return false;
        }
        if (joined && set == NULL && *cfg_actions[a].value == '\0') {
            log_say(LOG_LEVEL_ERROR, "%s takes no value", where);
            return false;
        }
        if (!joined && set != NULL && set->kind == CFG_FLAG) {
            value = span_text("yes");
        } else if (!joined &&
                   *(set != NULL ? set->value : cfg_actions[a].value) !=
                       '\0') {
            if (i + 1 == argc) {
                log_say(LOG_LEVEL_ERROR, "%s needs a value, %s", where,
                        set != NULL ? set->value : cfg_actions[a].value);
                return false;
            }
            value = span_text(argv[++i]);
        }
        if (set == NULL) {
            if (a != CFG_ACTION_config) {
                *action = (enum cfg_action)a;
                operand[0] = (const char *)value.at;
                if (strchr(cfg_actions[a].value, ' ') != NULL) {
                    if (i + 1 == argc) {
                        log_say(LOG_LEVEL_ERROR, "%s needs two values, %s",
                                where, cfg_actions[a].value);
                        return false;
                    }
                    operand[1] = argv[++i];
                }
            }
            continue;
        }
        if (cfg_is_list(set) && !from_flags[set - cfg_settings])
            *(struct cfg_list *)cfg_field(c, set) = (struct cfg_list){ 0 };
        from_flags[set - cfg_settings] = true;
        if (!cfg_set(c, set, value, where))
            return false;
    }
    return true;
}

/* What several settings must agree on, and defaults that depend on others. */
static bool
cfg_settle(struct cfg *c)
{
    if (c->listen.count == 0 && c->tls_listen.count == 0 &&
        !cfg_set(c, cfg_find(span_text("listen")), span_text("8080"),
                     "default"))
        return false;
    if (c->message_memory == 0)
        c->message_memory = 8 * c->max_message;
    if (c->listen.count + c->tls_listen.count > COLLABD_LISTENERS) {
        log_say(LOG_LEVEL_ERROR, "listen and tls-listen: more than %d sockets",
                COLLABD_LISTENERS);
        return false;
    }
    if (c->tls_listen.count > 0 && (c->tls_cert == 0 || c->tls_key == 0)) {
        log_say(LOG_LEVEL_ERROR,
                "tls-listen needs tls-cert and tls-key; collabd --make-cert "
                "DIR makes both");
        return false;
    }
    if (c->tls_listen.count == 0 && c->tls_cert != 0)
        log_say(LOG_LEVEL_WARNING,
                "tls-cert has no effect without tls-listen");
    if (c->message_memory < 2 * c->max_message) {
        log_say(LOG_LEVEL_ERROR,
                "message-memory is %" PRIu64 ", less than two messages of "
                "max-message %" PRIu64 "; raise the one or lower the other",
                c->message_memory, c->max_message);
        return false;
    }
    if (c->dead_after <= c->ping_interval) {
        log_say(LOG_LEVEL_ERROR,
                "dead-after %" PRIu64 " must be more than ping-interval "
                "%" PRIu64, c->dead_after, c->ping_interval);
        return false;
    }
    return true;
}

/* Settings from argv and the file it names (read through `file` when it is
 * already open as a folder).  False: refused and said. */
static bool
cfg_read(struct cfg *c, int argc, char *const argv[], struct sys_file file,
         enum cfg_action *action, const char *operand[2])
{
    const char *path = cfg_path(argc, argv);

    cfg_defaults(c);
    if (path != NULL) {
        uint8_t text[CFG_FILE_MAX + 1];
        ssize_t n = sys_read_file(file, text, CFG_FILE_MAX);
        if (n < 0) {
            log_say(LOG_LEVEL_ERROR, "config file %s: %s", path,
                    strerror(errno));
            return false;
        }
        if (!cfg_lines(c, span_of(text, (size_t)n), path))
            return false;
    }
    if (!cfg_flags(c, argc, argv, action, operand))
        return false;
    return *action == CFG_ACTION_help || *action == CFG_ACTION_version ||
           cfg_settle(c);
}

/* Do two structs say the same in one setting? */
static bool
cfg_agrees(struct cfg *a, struct cfg *b, const struct cfg_setting *set)
{
    if (set->kind == CFG_TEXT)
        return strcmp(cfg_text(a, *(uint16_t *)cfg_field(a, set)),
                      cfg_text(b, *(uint16_t *)cfg_field(b, set))) == 0;
    if (cfg_is_list(set)) {
        struct cfg_list *x = cfg_field(a, set), *y = cfg_field(b, set);
        for (unsigned i = 0; i < x->count && i < y->count; i++)
            if (strcmp(cfg_item(a, x, i), cfg_item(b, y, i)) != 0)
                return false;
        return x->count == y->count;
    }
    return *(uint64_t *)cfg_field(a, set) == *(uint64_t *)cfg_field(b, set);
}

/* A reload: what cannot change while running keeps its old number. */
static void
cfg_keep_start(struct cfg *fresh, struct cfg *old)
{
    for (size_t i = 0; i < CFG_COUNT; i++) {
        const struct cfg_setting *set = &cfg_settings[i];
        char typed[32];
        if (set->when == CFG_LIVE || cfg_agrees(fresh, old, set))
            continue;
        log_say(LOG_LEVEL_WARNING, "%s has changed; that takes a restart",
                cfg_typed(set->name, typed));
        if (!cfg_is_list(set) && set->kind != CFG_TEXT)
            *(uint64_t *)cfg_field(fresh, set) =
                *(uint64_t *)cfg_field(old, set);
    }
}

static void
cfg_help(FILE *to)
{
    char typed[32], flag[64];

    (void)fprintf(to,
                  "usage: collabd [--flag value]...\n\n"
                  "A server for clients that change things together on a "
                  "LAN: what one sends to\n/ws/NAME reaches all others "
                  "there, in one order; Yjs editors meet at /yjs/NAME,\nand "
                  "with --data their documents are kept.\n\n");
    for (size_t i = 0; i < CFG_COUNT; i++) {
        (void)snprintf(flag, sizeof flag, "--%s %s",
                       cfg_typed(cfg_settings[i].name, typed),
                       cfg_settings[i].value);
        (void)fprintf(to, "  %-26s %s", flag, cfg_settings[i].help);
        if (cfg_settings[i].kind != CFG_FLAG && *cfg_settings[i].def != '\0')
            (void)fprintf(to, " [%s]", cfg_settings[i].def);
        (void)fputc('\n', to);
    }
    (void)fputc('\n', to);
    for (size_t i = 1; i < CFG_ACTION_COUNT; i++) {
        (void)snprintf(flag, sizeof flag, "--%s %s",
                       cfg_typed(cfg_actions[i].name, typed),
                       cfg_actions[i].value);
        (void)fprintf(to, "  %-26s %s\n", flag, cfg_actions[i].help);
    }
    (void)fprintf(to, "\nSizes take K, M, G.  Manual: collabd(8).\n");
}
/* ===== 6  Rings ============================================================
 * A ring is lent memory, a table of entries, and numbers that only grow.
 * Readers are not in the ring: each keeps its own cursor, so one copy of a
 * message serves a whole room.
 *
 *   bytes    ready-made WebSocket frames, back to back, wrapping anywhere
 *   entries  where each frame begins, who sent it; number & mask is its place
 *   blocks   a frame too long for the bytes stands in message memory, and its
 *            entry names the block; the ring only counts it
 *
 *        tail_at          entry e.at           head_at
 *   ───────┴──────────────────┴───────────────────┴──────▶   bytes ever put in
 *
 *   invariants   1  tail <= shown <= head,  head - tail <= slots
 *                2  tail_at <= head_at,     head_at - tail_at <= size
 *                3  size is a power of two, slots = size / RING_CHARGE
 *                4  pos grows by the charge of each entry: its frame's length,
 *                   but at least RING_CHARGE, so one number measures lag in
 *                   bytes and in entries alike
 * ========================================================================= */

/* What an entry costs at least: its place in the table. */
#define RING_CHARGE 32u

enum ring_kind { RING_BYTES, RING_BLOCK };

struct conn_id {
    uint16_t slot, gen; /* gen grows when the slot is freed */
};

struct entry {
    uint64_t pos;        /* the ring's pos when this entry began */
    uint64_t at;         /* the ring's head_at then */
    uint32_t len;        /* of the frame, with its header */
    uint32_t block;      /* RING_BLOCK: first chunk; NONE32: no longer there */
    struct conn_id from; /* who sent it and need not get it; .slot NONE: all */
    uint16_t refs;       /* RING_BLOCK: members that have not passed it */
    uint8_t kind;        /* enum ring_kind */
    uint8_t block_skip;  /* RING_BLOCK: unused bytes ahead of the header */
};

_Static_assert(sizeof(struct entry) == RING_CHARGE,
               "an entry is charged with the memory it takes");

struct ring {
    uint8_t *bytes;
    struct entry *entries;
    uint64_t size;
    uint64_t tail, head;       /* entry numbers */
    uint64_t tail_at, head_at; /* bytes ever taken away, ever put in */
    uint64_t shown, shown_at;  /* so far members may see: at most the head */
    uint64_t pos;              /* charges of all entries ever */
};

#define NONE   UINT16_MAX
#define NONE32 UINT32_MAX

static struct entry *
ring_entry(const struct ring *r, uint64_t number)
{
    return &r->entries[number & (r->size / RING_CHARGE - 1)];
}

/* The pos at which an entry begins; of the head: where the next will. */
static uint64_t
ring_pos(const struct ring *r, uint64_t number)
{
    return number == r->head ? r->pos : ring_entry(r, number)->pos;
}

static uint64_t
ring_charge(uint64_t frame_len)
{
    return frame_len < RING_CHARGE ? RING_CHARGE : frame_len;
}

/* Does an entry of n bytes fit without taking anything away? */
static bool
ring_fits(const struct ring *r, uint64_t n)
{
    return r->head - r->tail < r->size / RING_CHARGE &&
           r->head_at - r->tail_at + n <= r->size;
}

/* Lets members see what was put in before that entry. */
static void
ring_show(struct ring *r, uint64_t entry)
{
    if (entry <= r->shown)
        return;
    must(entry <= r->head);
    r->shown = entry;
    r->shown_at = entry == r->head ? r->head_at : ring_entry(r, entry)->at;
}

/* Takes the oldest entry away. */
static void
ring_drop(struct ring *r)
{
    must(r->tail < r->head);
    if (r->shown == r->tail) { /* nobody saw it, and nobody will */
        r->shown++;
        r->shown_at = r->shown == r->head ? r->head_at
                                          : ring_entry(r, r->shown)->at;
    }
    r->tail++;
    r->tail_at = r->tail == r->head ? r->head_at : ring_entry(r, r->tail)->at;
}

static void
ring_copy_in(struct ring *r, const void *from, size_t len)
{
    size_t at = (size_t)(r->head_at & (r->size - 1));
    size_t first = len < r->size - at ? len : (size_t)r->size - at;

    if (len == 0)
        return;
    must(r->head_at - r->tail_at + len <= r->size);
    memcpy(r->bytes + at, from, first);
    if (first < len)
        memcpy(r->bytes, (const uint8_t *)from + first, len - first);
    r->head_at += len;
}

/* Begins a new entry at the head; the caller has made room and copies the
 * frame's bytes in behind. */
static struct entry *
ring_new(struct ring *r, uint32_t len, struct conn_id from)
{
    struct entry *e = ring_entry(r, r->head);

    must(r->head - r->tail < r->size / RING_CHARGE);
    *e = (struct entry){ .pos = r->pos, .at = r->head_at, .len = len,
                         .block = NONE32, .from = from, .kind = RING_BYTES };
    r->head++;
    r->pos += ring_charge(len);
    return e;
}

/* At most two spans of the bytes from `at` on, n of them. */
static int
ring_peek(const struct ring *r, uint64_t at, uint64_t n, struct iovec out[2])
{
    size_t off = (size_t)(at & (r->size - 1));
    size_t first = n < r->size - off ? (size_t)n : (size_t)r->size - off;

    must(at >= r->tail_at && at + n <= r->head_at);
    if (n == 0)
        return 0;
    out[0] = (struct iovec){ r->bytes + off, first };
    if (first == n)
        return 1;
    out[1] = (struct iovec){ r->bytes, (size_t)n - first };
    return 2;
}

/* The entry in [from, shown) that holds the byte `at`, which was put in later
 * than entry `from` began; `shown` if all of them lie before it.  Blocks take
 * no bytes, so the last entry that begins at or before `at` is the one, and a
 * binary search finds it. */
static uint64_t
ring_find(const struct ring *r, uint64_t from, uint64_t at)
{
    uint64_t low = from, high = r->shown;

    if (at == r->shown_at)
        return r->shown;
    while (high - low > 1) {
        uint64_t mid = low + (high - low) / 2;
        if (ring_entry(r, mid)->at <= at)
            low = mid;
        else
            high = mid;
    }
    return low;
}

static void
ring_check(const struct ring *r)
{
    uint64_t pos, at;

    must((r->size & (r->size - 1)) == 0);
    must(r->tail <= r->shown && r->shown <= r->head);
    must(r->head - r->tail <= r->size / RING_CHARGE);
    must(r->shown_at == (r->shown == r->head ? r->head_at
                                             : ring_entry(r, r->shown)->at));
    must(r->tail_at <= r->head_at && r->head_at - r->tail_at <= r->size);
    pos = ring_pos(r, r->tail);
    at = r->tail_at;
    for (uint64_t i = r->tail; i < r->head; i++) {
        const struct entry *e = ring_entry(r, i);
        must(e->pos == pos && e->at == at);
        pos += ring_charge(e->len);
        at += e->kind == RING_BYTES ? e->len : 0;
    }
    must(pos == r->pos && at == r->head_at);
}
/* ===== 7  Sync codec ========================================================
 * Yjs documents as bytes.  An update (encoding V1) is checked, merged, cut and
 * cleaned without ever building the document it describes.
 *
 *   update    := clients, clients x section, delete set
 *   section   := structs, client, clock, structs x struct
 *   struct    := info, [left id], [right id], [parent], [key], content
 *   deletes   := clients, clients x (client, ranges, ranges x (clock, length))
 *
 * Numbers are lib0's: seven bits a byte, the lowest first, at most 2^53 - 1.
 * A client numbers the units it makes (UTF-16 units, list elements, ...) with
 * clocks; a struct holds the units [clock, clock + length).  Its clock does not
 * stand in it: it is the section's plus the lengths before it.  All references
 * are absolute, so a struct is copied as it is wherever it goes; and a struct
 * of n units is n structs of one unit, each with the one before as its left
 * neighbour and all with the same right one.  Cutting and fusing rest on that.
 *
 * Every operation is the same few steps in lent memory:
 *
 *   load    each struct and each delete range becomes a part (48 bytes) that
 *           points to its bytes; parts are numbered in the order of arrival
 *   sort    an order of part numbers: structs, then ranges; clients descending,
 *           clocks ascending, of equals the earlier arrival first
 *   sweep   where parts overlap, the earlier arrival keeps the units and the
 *           later fills the holes.  Parts that only cover (what a state vector
 *           or a document has already) are then dropped: that makes diff and
 *           minus out of merge
 *   clean   deleted content is cut away, what lies below it becomes GC
 *   fuse    parts that continue the one before are marked
 *   write   twice: once to count, once for good
 *
 * All of it is O(n log n) in the bytes and parts that go in, whatever they say.
 * ========================================================================= */

/* The largest whole number a JavaScript client holds exactly. */
#define Y_MAX ((UINT64_C(1) << 53) - 1)

/* How deep lists and objects may be nested inside a value.  Clients read them
 * by recursion. */
#define Y_DEPTH 100

/* ----- lib0's numbers --------------------------------------------------- */

/* False: cut short, longer than 8 bytes, or more than Y_MAX. */
static bool
y_uint(struct span *in, uint64_t *v)
{
    size_t len = span_len(*in);
    uint64_t n = 0;

    for (unsigned i = 0; i < 8 && i < len; i++) {
        n |= (uint64_t)(in->at[i] & 127) << 7 * i;
        if (in->at[i] < 128) {
            if (n > Y_MAX)
                return false;
            in->at += i + 1;
            *v = n;
            return true;
        }
    }
    return false;
}

static void
out_uint(struct out *o, uint64_t v)
{
    uint8_t bytes[10];
    size_t n = 0;

    for (; v > 127; v >>= 7)
        bytes[n++] = (uint8_t)(v | 128);
    bytes[n++] = (uint8_t)v;
    out_bytes(o, bytes, n);
}

static size_t
y_uint_len(uint64_t v)
{
    size_t n = 1;

    for (; v > 127; v >>= 7)
        n++;
    return n;
}

/* ----- a reader ------------------------------------------------------------
 * Read on, ask `fault` once: after the first fault there is nothing left to
 * read and every number is 0. */

struct y_in {
    struct span in;
    const char *fault;
    const uint8_t *fault_at;
    bool odd; /* something was not written as we would write it */
};

static struct y_in
y_over(const uint8_t *at, size_t len)
{
    return (struct y_in){ .in = span_of(at, len) };
}

static void
y_fail(struct y_in *r, const char *fault)
{
    if (r->fault != NULL)
        return;
    r->fault = fault;
    r->fault_at = r->in.at;
    r->in.at = r->in.end;
}

static struct span
y_take(struct y_in *r, uint64_t n)
{
    struct span s = { r->in.at, r->in.at };

    if (n > span_len(r->in)) {
        y_fail(r, "cut short");
        return s;
    }
    r->in.at += n;
    s.end = r->in.at;
    return s;
}

static uint8_t
y_byte(struct y_in *r)
{
    struct span s = y_take(r, 1);

    return span_is_empty(s) ? 0 : *s.at;
}

static uint64_t
y_get(struct y_in *r)
{
    const uint8_t *from = r->in.at;
    uint64_t v;

    if (!y_uint(&r->in, &v)) {
        y_fail(r, "a number cut short or too large");
        return 0;
    }
    if (r->in.at - from > 1 && r->in.at[-1] == 0)
        r->odd = true;
    return v;
}

/* How many things follow, each of at least so many bytes. */
static uint64_t
y_count(struct y_in *r, size_t each)
{
    uint64_t n = y_get(r);

    if (n <= span_len(r->in) / each)
        return n;
    y_fail(r, "more announced than follows");
    return 0;
}

static struct span
y_text(struct y_in *r)
{
    struct span s = y_take(r, y_get(r));
    struct utf8 u = { 0 };

    if (!utf8_check(&u, s) || !utf8_is_complete(&u))
        y_fail(r, "text that is not UTF-8");
    return s;
}

/* A signed number: six bits in the first byte.  -0 is a number of its own. */
static void
y_skip_int(struct y_in *r)
{
    uint8_t b = y_byte(r);
    uint64_t v = b & 63;

    for (unsigned shift = 6; b > 127; shift += 7) {
        if (shift > 48) {
            y_fail(r, "a number cut short or too large");
            return;
        }
        b = y_byte(r);
        v |= (uint64_t)(b & 127) << shift;
    }
    if (v > Y_MAX)
        y_fail(r, "a number cut short or too large");
}

/* A value in lib0's any-encoding.  `left` counts what is still to come of each
 * open list or object, twice; the lowest bit says that it is an object. */
static void
y_skip_any(struct y_in *r)
{
    uint64_t left[Y_DEPTH];
    unsigned depth = 0;

    do {
        uint64_t n = 0;
        if (depth > 0 && (left[depth - 1] & 1) != 0)
            (void)y_text(r);
        switch (y_byte(r)) {
        case 127: case 126: case 121: case 120: /* undefined null false true */
            break;
        case 125:
            y_skip_int(r);
            break;
        case 124: /* float32 */
            (void)y_take(r, 4);
            break;
        case 123: case 122: /* float64, bigint */
            (void)y_take(r, 8);
            break;
        case 119:
            (void)y_text(r);
            break;
        case 118:
            n = y_count(r, 2) << 1 | 1;
            break;
        case 117:
            n = y_count(r, 1) << 1;
            break;
        case 116: /* bytes */
            (void)y_take(r, y_get(r));
            break;
        default:
            y_fail(r, "an unknown kind of value");
        }
        if (n > 1 && depth == Y_DEPTH)
            y_fail(r, "nested too deep");
        else if (n > 1)
            left[depth++] = n;
        else
            while (depth > 0 && (left[depth - 1] -= 2) < 2)
                depth--;
    } while (depth > 0 && r->fault == NULL);
}

/* ----- JSON ------------------------------------------------------------- */

/* The next byte that is not white space, taken; 0 at the end, and of a NUL,
 * which is left there. */
static uint8_t
json_next(struct span *s)
{
    while (s->at < s->end && *s->at != 0) {
        uint8_t b = *s->at++;
        if (b != ' ' && b != '\t' && b != '\n' && b != '\r')
            return b;
    }
    return 0;
}

/* The rest of a string, whose opening quote was taken. */
static bool
json_string(struct span *s)
{
    while (s->at < s->end) {
        uint8_t b = *s->at++;
        if (b == '"')
            return true;
        if (b < 0x20)
            return false;
        if (b != '\\')
            continue;
        b = s->at < s->end ? *s->at++ : 0;
        if (b == 0 || strchr("\"\\/bfnrtu", b) == NULL)
            return false;
        for (int i = 0; b == 'u' && i < 4; i++)
            if (s->at == s->end || hex_value(*s->at++) < 0)
                return false;
    }
    return false;
}

static bool
json_digits(struct span *s)
{
    const uint8_t *from = s->at;

    while (s->at < s->end && byte_is_digit(*s->at))
        s->at++;
    return s->at > from;
}

/* A number, true, false or null. */
static bool
json_scalar(struct span *s)
{
    static const char *const words[] = { "true", "false", "null" };

    for (int i = 0; i < 3; i++)
        if (span_starts(*s, words[i])) {
            s->at += strlen(words[i]);
            return true;
        }
    if (span_starts(*s, "-"))
        s->at++;
    if (span_starts(*s, "0"))
        s->at++;
    else if (!json_digits(s))
        return false;
    if (span_starts(*s, ".")) {
        s->at++;
        if (!json_digits(s))
            return false;
    }
    if (span_starts(*s, "e") || span_starts(*s, "E")) {
        s->at++;
        if (span_starts(*s, "+") || span_starts(*s, "-"))
            s->at++;
        return json_digits(s);
    }
    return true;
}

static bool
json_key(struct span *s)
{
    return json_next(s) == '"' && json_string(s) && json_next(s) == ':';
}

/* Is the whole span one JSON value (RFC 8259), as JSON.parse sees it?  The
 * caller has checked that it is UTF-8. */
static bool
json_check(struct span s)
{
    uint8_t closer[Y_DEPTH];
    unsigned depth = 0;

    for (;;) {
        uint8_t b = json_next(&s);
        if (b == '{' || b == '[') {
            struct span ahead = s;
            if (depth == Y_DEPTH)
                return false;
            closer[depth++] = b == '{' ? '}' : ']';
            if (json_next(&ahead) != closer[depth - 1]) {
                if (b == '{' && !json_key(&s))
                    return false;
                continue;
            }
        } else if (b == '"') {
            if (!json_string(&s))
                return false;
        } else {
            if (b == 0)
                return false;
            s.at--;
            if (!json_scalar(&s))
                return false;
        }
        for (;;) { /* behind a value */
            b = json_next(&s);
            if (depth == 0)
                return b == 0 && s.at == s.end;
            if (b == ',') {
                if (closer[depth - 1] == '}' && !json_key(&s))
                    return false;
                break;
            }
            if (b != closer[--depth])
                return false;
        }
    }
}

/* ----- parts ------------------------------------------------------------ */

enum y_kind { /* as on the wire, up to Y_SKIP */
    Y_GC,
    Y_DELETED,
    Y_JSON,
    Y_BINARY,
    Y_STRING,
    Y_EMBED,
    Y_FORMAT,
    Y_TYPE,
    Y_ANY,
    Y_DOC,
    Y_SKIP,
    Y_RANGE /* of the delete set */
};

/* Bits of a struct's info byte. */
enum { Y_INFO_KEY = 0x20, Y_INFO_RIGHT = 0x40, Y_INFO_LEFT = 0x80 };

enum {
    Y_CUT = 1,         /* a part was cut off in front: its left neighbour is
                          the unit before, it has no parent field */
    Y_HALF_FIRST = 2,  /* half of a surrogate pair goes ahead of the bytes, */
    Y_HALF_LAST = 4,   /* or follows them: U+FFFD in UTF-8 */
    Y_COVER = 8,       /* only covers what comes later */
    Y_FUSED = 16       /* continues the part before it */
};

/* A struct, what is left of one, or a delete range. */
struct y_part {
    uint64_t client;
    uint64_t clock, end;  /* its units are [clock, end) */
    const uint8_t *head;  /* the struct's first byte */
    uint32_t skip, bytes; /* its content: so many bytes at head + skip */
    uint32_t link;        /* the sweep's heap; who waits for this one's fate */
    uint8_t kind;         /* enum y_kind */
    uint8_t flags;
    uint8_t fate;         /* enum y_fate */
};

struct y_id {
    uint64_t client, clock;
};

/* What stands between a struct's info byte and its content. */
struct y_head {
    bool has_left, has_right;
    bool has_root, has_parent, has_key; /* none of them beside left or right */
    struct y_id left, right, parent;
    struct span root, key;
};

static struct y_id
y_get_id(struct y_in *r)
{
    struct y_id id;

    id.client = y_get(r);
    id.clock = y_get(r);
    return id;
}

static void
y_get_head(struct y_in *r, uint8_t info, struct y_head *h)
{
    *h = (struct y_head){ .has_left = (info & Y_INFO_LEFT) != 0,
                          .has_right = (info & Y_INFO_RIGHT) != 0 };
    if (h->has_left)
        h->left = y_get_id(r);
    if (h->has_right)
        h->right = y_get_id(r);
    if (h->has_left || h->has_right) {
        /* Yjs leaves the bit of a key that it does not write. */
        r->odd = r->odd || (info & Y_INFO_KEY) != 0;
        return;
    }
    switch (y_get(r)) {
    case 0:
        h->has_parent = true;
        h->parent = y_get_id(r);
        break;
    case 1:
        h->has_root = true;
        h->root = y_text(r);
        break;
    default:
        y_fail(r, "an unknown kind of parent");
    }
    h->has_key = (info & Y_INFO_KEY) != 0;
    if (h->has_key)
        h->key = y_text(r);
}

/* The head of a part that is a struct with one.  Of what it was cut from only
 * the right neighbour is read: names are long, and parts may be many. */
static void
y_head(const struct y_part *p, struct y_head *h)
{
    struct y_in r = y_over(p->head + 1, p->skip - 1);
    bool cut = (p->flags & Y_CUT) != 0;

    *h = (struct y_head){ .has_left = cut };
    if (!cut || (*p->head & (Y_INFO_LEFT | Y_INFO_RIGHT)) != 0)
        y_get_head(&r, *p->head, h);
    must(r.fault == NULL);
    if (cut) {
        h->has_left = true;
        h->left = (struct y_id){ p->client, p->clock - 1 };
    }
}

static bool
y_has_head(const struct y_part *p)
{
    return p->kind != Y_GC && p->kind < Y_SKIP;
}

/* UTF-16 units of valid UTF-8. */
static uint64_t
y_units(struct span s)
{
    uint64_t n = 0;

    for (; s.at < s.end; s.at++)
        n += (uint64_t)((*s.at & 0xc0) != 0x80) + (*s.at >= 0xf0);
    return n;
}

static void
y_skip_json(struct y_in *r, bool or_undefined)
{
    struct span s = y_text(r);

    if (r->fault == NULL && !json_check(s) &&
        !(or_undefined && span_is(s, "undefined")))
        y_fail(r, "text that is not JSON");
}

/* A struct's content; answers its length in units, leaves what of the bytes is
 * copied as it is. */
static uint64_t
y_get_content(struct y_in *r, uint8_t kind, struct span *raw)
{
    bool odd = r->odd;
    uint64_t n = 1;

    if (kind == Y_STRING) {
        *raw = y_text(r);
        return y_units(*raw);
    }
    if (kind == Y_DELETED || kind == Y_JSON || kind == Y_ANY) {
        n = kind == Y_DELETED ? y_get(r) : y_count(r, 1);
        odd = r->odd;
    }
    raw->at = r->in.at;
    switch (kind) {
    case Y_DELETED:
        break;
    case Y_JSON:
        for (uint64_t i = 0; i < n && r->fault == NULL; i++)
            y_skip_json(r, true);
        break;
    case Y_BINARY:
        (void)y_take(r, y_get(r));
        break;
    case Y_EMBED:
        y_skip_json(r, false);
        break;
    case Y_FORMAT:
        (void)y_text(r);
        y_skip_json(r, false);
        break;
    case Y_TYPE:
        switch (y_get(r)) {
        case 0: case 1: case 2: case 4: case 6:
            break;
        case 3: case 5: /* XmlElement, XmlHook: with a name */
            (void)y_text(r);
            break;
        default:
            y_fail(r, "an unknown type");
        }
        break;
    case Y_ANY:
        for (uint64_t i = 0; i < n && r->fault == NULL; i++)
            y_skip_any(r);
        break;
    case Y_DOC:
        (void)y_text(r);
        if (!span_is_empty(r->in) && *r->in.at != 118)
            y_fail(r, "a subdocument whose options are no object");
        y_skip_any(r);
        break;
    default:
        y_fail(r, "an unknown kind of content");
    }
    raw->end = r->in.at;
    r->odd = odd;
    return n;
}

/* A client's ids below its own clock are all it can have seen of itself. */
static bool
y_is_ahead(const struct y_part *p, bool has, struct y_id id)
{
    return has && id.client == p->client && id.clock >= p->clock;
}

/* Reads a struct; client and clock are filled in already. */
static void
y_get_struct(struct y_in *r, struct y_part *p)
{
    const uint8_t *head = r->in.at;
    uint8_t info = y_byte(r);
    struct span raw = { head, head };
    uint64_t len;

    p->kind = info & 31;
    if (p->kind == Y_GC || p->kind == Y_SKIP) {
        if (info != p->kind)
            y_fail(r, "flags on a GC or Skip");
        len = y_get(r);
    } else {
        struct y_head h;
        y_get_head(r, info, &h);
        if (r->fault != NULL)
            return;
        if (y_is_ahead(p, h.has_left, h.left) ||
            y_is_ahead(p, h.has_right, h.right) ||
            y_is_ahead(p, h.has_parent, h.parent))
            y_fail(r, "a reference to itself or later");
        len = y_get_content(r, p->kind, &raw);
    }
    if (len == 0)
        y_fail(r, "a struct of length 0");
    if (len > Y_MAX - p->clock)
        y_fail(r, "a clock that is too large");
    if (r->fault != NULL)
        return;
    p->end = p->clock + len;
    p->head = head;
    p->skip = (uint32_t)(raw.at - head);
    p->bytes = (uint32_t)(raw.end - raw.at);
}

/* ----- walking an update ------------------------------------------------ */

struct y_walk {
    struct y_in r;
    const uint8_t *from;    /* the update's first byte */
    bool in_deletes;
    size_t deletes_at;      /* known once in_deletes */
    uint64_t lists, left;   /* clients that follow; entries of this one */
    uint64_t client, clock; /* of what follows */
    bool opened;            /* the last entry was its list's first */
};

static struct y_walk
y_walk(struct span update)
{
    struct y_walk w = { .r = { .in = update }, .from = update.at };
    uint64_t len = span_len(update);

    if (len > UINT32_MAX)
        y_fail(&w.r, "too long");
    w.lists = y_count(&w.r, 3);
    return w;
}

/* Begins at the delete set, whose place is known. */
static struct y_walk
y_walk_deletes(struct span update, size_t deletes_at)
{
    struct y_walk w = { .r = { .in = update }, .from = update.at,
                        .in_deletes = true, .deletes_at = deletes_at };

    (void)y_take(&w.r, deletes_at);
    w.lists = y_count(&w.r, 2);
    return w;
}

/* Goes on to the next list that is not empty.  False: none, or a fault. */
static bool
y_walk_list(struct y_walk *w)
{
    while (w->left == 0) {
        if (w->lists == 0 && !w->in_deletes) {
            w->in_deletes = true;
            w->deletes_at = (size_t)(w->r.in.at - w->from);
            w->lists = y_count(&w->r, 2);
        }
        if (w->lists == 0) {
            if (!span_is_empty(w->r.in))
                y_fail(&w->r, "bytes behind the end");
            return false;
        }
        w->lists--;
        if (w->in_deletes) {
            w->client = y_get(&w->r);
            w->left = y_count(&w->r, 2);
        } else {
            w->left = y_count(&w->r, 2);
            w->client = y_get(&w->r);
            w->clock = y_get(&w->r);
        }
        if (w->r.fault != NULL)
            return false;
        if (w->left == 0)
            w->r.odd = true;
    }
    return true;
}

/* The next struct (also a Skip), then the ranges.  False: the end, or a
 * fault. */
static bool
y_walk_next(struct y_walk *w, struct y_part *p)
{
    w->opened = w->left == 0;
    if (!y_walk_list(w))
        return false;
    *p = (struct y_part){ .client = w->client, .clock = w->clock };
    if (w->in_deletes) {
        uint64_t len;
        p->kind = Y_RANGE;
        p->clock = y_get(&w->r);
        len = y_get(&w->r);
        if (len == 0)
            y_fail(&w->r, "a delete range of length 0");
        if (len > Y_MAX - p->clock)
            y_fail(&w->r, "a clock that is too large");
        p->end = p->clock + len;
    } else {
        y_get_struct(&w->r, p);
        w->clock = p->end;
    }
    w->left--;
    return w->r.fault == NULL;
}

/* What y_check found out about an update. */
struct y_report {
    const char *fault; /* NULL: fine.  Else what is wrong with it, */
    size_t at;         /* and where */
    bool canonical;    /* written as we would: it may be stored and relayed */
    size_t deletes_at; /* where its delete set begins */
    uint64_t clients, structs, ranges; /* sections; structs, Skips too */
    uint64_t stretches; /* at most so many, of clocks without a hole */
};

/* Judges an update by all that makes clients stumble, in one pass. */
static bool
y_check(struct span update, struct y_report *report)
{
    struct y_walk w = y_walk(update);
    struct y_part before = { 0 }, p;
    bool odd = false;

    *report = (struct y_report){ 0 };
    while (y_walk_next(&w, &p)) {
        bool is_range = p.kind == Y_RANGE, is_skip = p.kind == Y_SKIP;
        bool was_range = before.kind == Y_RANGE;
        bool first = report->structs + (is_range ? report->ranges : 0) == 0;
        if (w.opened) {
            if (is_skip || (!first && is_range == was_range &&
                            p.client >= before.client))
                odd = true;
            report->clients += !is_range;
        } else if (is_range ? p.clock <= before.end
                            : is_skip && before.kind == Y_SKIP) {
            odd = true;
        }
        if (is_skip && w.left == 0)
            odd = true;
        if (is_range)
            report->ranges++;
        else
            report->structs++;
        report->stretches += !is_range && (w.opened || is_skip);
        before = p;
    }
    report->fault = w.r.fault;
    report->at = (size_t)((w.r.fault ? w.r.fault_at : w.r.in.at) - w.from);
    report->canonical = w.r.fault == NULL && !w.r.odd && !odd;
    report->deletes_at = w.deletes_at;
    return w.r.fault == NULL;
}

/* Clocks of one client without a hole. */
struct y_stretch {
    uint64_t client, from, to;
};

/* The next stretch of an update's structs; begin with y_walk.  False: there is
 * none, and the walk stands in the delete set; or a fault. */
static bool
y_walk_stretch(struct y_walk *w, struct y_stretch *s)
{
    struct y_part p;

    do
        if (!y_walk_list(w) || w->in_deletes || !y_walk_next(w, &p))
            return false;
    while (p.kind == Y_SKIP);
    *s = (struct y_stretch){ p.client, p.clock, p.end };
    while (w->left > 0 && y_walk_next(w, &p) && p.kind != Y_SKIP)
        s->to = p.end;
    return w->r.fault == NULL;
}

/* ----- what is known of each client ----------------------------------------
 * Two tables in lent memory.  An open hash table says of each client up to
 * where everything is there; its seed is the owner's secret, so that nobody
 * can choose client ids that collide.  What came ahead of a gap is listed
 * beside it: islands, clients descending, clocks ascending, none touching
 * another or what is below its client's `next`.
 *
 *   client 7      0 ▓▓▓▓▓▓▓▓▓ next     ▓▓▓▓ island    ▓▓▓▓▓▓ end
 *
 * So what of an update is new can be told without looking at the document. */

struct y_known_client {
    uint64_t client;
    uint64_t next; /* everything below is there */
    uint64_t end;  /* of the highest struct; 0: this slot is free */
};

struct y_known {
    struct y_known_client *at;
    size_t slots; /* a power of two, or 0; at most three quarters are used */
    size_t used;
    struct y_stretch *islands; /* behind the slots, room for slots / 4 */
    size_t n_islands;
    uint64_t seed;
};

/* Slots for so many clients and islands. */
static size_t
y_known_slots(uint64_t clients, uint64_t islands)
{
    size_t slots = 8;

    while (slots / 4 * 3 < clients || slots / 4 < islands)
        slots *= 2;
    return slots;
}

/* What so many slots take. */
static size_t
y_known_bytes(size_t slots)
{
    return slots * sizeof(struct y_known_client) +
           slots / 4 * sizeof(struct y_stretch);
}

/* Is there room for what an update brings at most? */
static bool
y_known_fits(const struct y_known *k, uint64_t clients, uint64_t stretches)
{
    return clients <= k->slots / 4 * 3 - k->used &&
           stretches <= k->slots / 4 - k->n_islands;
}

/* The client's slot, or the free one where it belongs. */
static struct y_known_client *
y_known_slot(const struct y_known *k, uint64_t client)
{
    uint64_t h = (client ^ k->seed) * UINT64_C(0x9e3779b97f4a7c15);
    size_t i;

    h = (h ^ h >> 32) * (k->seed | 1);
    i = (size_t)(h >> 32);
    for (;; i++) {
        struct y_known_client *c = &k->at[i & (k->slots - 1)];
        if (c->end == 0 || c->client == client)
            return c;
    }
}

/* NULL: nothing is known of it. */
static const struct y_known_client *
y_known_get(const struct y_known *k, uint64_t client)
{
    const struct y_known_client *c;

    if (k->slots == 0)
        return NULL;
    c = y_known_slot(k, client);
    return c->end == 0 ? NULL : c;
}

static void
y_known_clear(struct y_known *k)
{
    if (k->slots > 0)
        memset(k->at, 0, k->slots * sizeof *k->at);
    k->used = k->n_islands = 0;
}

/* Moves the tables into other memory, y_known_bytes(slots) on a multiple of 8;
 * the old may then be given back. */
static void
y_known_move(struct y_known *k, void *to, size_t slots)
{
    struct y_known old = *k;

    must((slots & (slots - 1)) == 0 && old.used <= slots / 4 * 3 &&
         old.n_islands <= slots / 4);
    k->at = to;
    k->slots = slots;
    k->islands = (struct y_stretch *)(void *)(k->at + slots);
    y_known_clear(k);
    for (size_t i = 0; i < old.slots; i++)
        if (old.at[i].end > 0)
            *y_known_slot(k, old.at[i].client) = old.at[i];
    k->used = old.used;
    k->n_islands = old.n_islands;
    if (old.n_islands > 0)
        memcpy(k->islands, old.islands, old.n_islands * sizeof *k->islands);
}

/* Does every stretch begin at or behind the end of what is known?  Then
 * nothing in it can be there already. */
static bool
y_known_is_new(const struct y_known *k, struct span update)
{
    struct y_walk w = y_walk(update);
    struct y_stretch s;

    while (y_walk_stretch(&w, &s)) {
        const struct y_known_client *c = y_known_get(k, s.client);
        if (c != NULL && s.from < c->end)
            return false;
    }
    return true;
}

/* The first island of a client, or of one behind it in the order, that ends at
 * or behind a clock. */
static size_t
y_known_island(const struct y_known *k, uint64_t client, uint64_t clock)
{
    size_t low = 0, high = k->n_islands;

    while (low < high) {
        size_t mid = low + (high - low) / 2;
        const struct y_stretch *s = &k->islands[mid];
        if (s->client > client || (s->client == client && s->to < clock))
            low = mid + 1;
        else
            high = mid;
    }
    return low;
}

static void
y_known_add_stretch(struct y_known *k, struct y_stretch s)
{
    struct y_known_client *c = y_known_slot(k, s.client);
    size_t i = y_known_island(k, s.client, s.from), n = 0;
    struct y_stretch *island = k->islands + i;
    bool ahead;

    if (c->end == 0) {
        must(k->used < k->slots / 4 * 3);
        k->used++;
        *c = (struct y_known_client){ .client = s.client };
    }
    /* The islands it touches become part of it. */
    for (; i + n < k->n_islands && island[n].client == s.client &&
           island[n].from <= s.to; n++) {
        s.from = island[n].from < s.from ? island[n].from : s.from;
        s.to = island[n].to > s.to ? island[n].to : s.to;
    }
    ahead = s.from > c->next;
    if (!ahead && s.to > c->next)
        c->next = s.to;
    if (s.to > c->end)
        c->end = s.to;
    must(n > 0 || !ahead || k->n_islands < k->slots / 4);
    memmove(island + ahead, island + n, (k->n_islands - i - n) * sizeof s);
    k->n_islands += ahead - n;
    if (ahead)
        *island = s;
}

/* How many stretches of an update would come ahead of a gap, and how many are
 * of clients that are not known yet. */
static void
y_known_news(const struct y_known *k, struct span update, uint64_t *ahead,
             uint64_t *unknown)
{
    struct y_walk w = y_walk(update);
    struct y_stretch s;

    *ahead = *unknown = 0;
    while (y_walk_stretch(&w, &s)) {
        const struct y_known_client *c = y_known_get(k, s.client);
        *ahead += s.from > (c == NULL ? 0 : c->next);
        *unknown += c == NULL;
    }
}

/* Adds what an accepted update brings; y_known_fits has said that there is
 * room. */
static void
y_known_add(struct y_known *k, struct span update)
{
    struct y_walk w = y_walk(update);
    struct y_stretch s;

    while (y_walk_stretch(&w, &s))
        y_known_add_stretch(k, s);
    must(w.r.fault == NULL);
}

/* ----- state vectors ---------------------------------------------------- */

/* An entry of a state vector.  False: the end, or a fault. */
static bool
y_sv_next(struct y_in *r, uint64_t *left, struct y_id *entry)
{
    if (*left == 0)
        return false;
    --*left;
    *entry = y_get_id(r);
    return r->fault == NULL;
}

static bool
y_sv_check(struct span sv, const char **fault)
{
    struct y_in r = { .in = sv };
    uint64_t left = y_count(&r, 2);
    struct y_id entry;

    while (y_sv_next(&r, &left, &entry))
        ;
    if (!span_is_empty(r.in))
        y_fail(&r, "bytes behind the end");
    *fault = r.fault;
    return r.fault == NULL;
}

/* Where bytes go; NULL: they are only counted. */
struct y_sink {
    struct out *out;
    uint64_t n;
};

static void
y_put(struct y_sink *o, const void *from, size_t len)
{
    o->n += len;
    if (o->out != NULL)
        out_bytes(o->out, from, len);
}

static void
y_put_uint(struct y_sink *o, uint64_t v)
{
    o->n += y_uint_len(v);
    if (o->out != NULL)
        out_uint(o->out, v);
}

static void
y_put_text(struct y_sink *o, struct span s)
{
    y_put_uint(o, span_len(s));
    y_put(o, s.at, span_len(s));
}

static void
y_put_id(struct y_sink *o, struct y_id id)
{
    y_put_uint(o, id.client);
    y_put_uint(o, id.clock);
}

/* The state vector: what is there of each client without a gap.  Answers its
 * length; out may be NULL. */
static size_t
y_known_write_sv(const struct y_known *k, struct out *out)
{
    struct y_sink o = { out, 0 };
    uint64_t n = 0;

    for (size_t i = 0; i < k->slots; i++)
        n += k->at[i].next > 0;
    y_put_uint(&o, n);
    for (size_t i = 0; i < k->slots; i++)
        if (k->at[i].next > 0)
            y_put_id(&o, (struct y_id){ k->at[i].client, k->at[i].next });
    return (size_t)o.n;
}

/* The same of an update in which each client has one section. */
static size_t
y_update_write_sv(struct span update, struct out *out)
{
    struct y_sink o = { out, 0 };
    struct y_walk w = y_walk(update);
    struct y_stretch s;
    uint64_t n = 0;

    while (y_walk_stretch(&w, &s))
        n += s.from == 0;
    y_put_uint(&o, n);
    for (w = y_walk(update); y_walk_stretch(&w, &s);)
        if (s.from == 0)
            y_put_id(&o, (struct y_id){ s.client, s.to });
    return (size_t)o.n;
}

/* ----- cutting ---------------------------------------------------------- */

static const uint8_t y_fffd[3] = { 0xef, 0xbf, 0xbd };

/* Length of a code point's UTF-8 by its first byte. */
static uint32_t
utf8_width(uint8_t b)
{
    return b < 0x80 ? 1 : b < 0xe0 ? 2 : b < 0xf0 ? 3 : 4;
}

static void
y_cut_string(struct y_part *p, uint64_t units, struct y_part *left)
{
    const uint8_t *at = p->head + p->skip;
    bool half = false;
    uint32_t i = 0;

    p->flags &= (uint8_t)~Y_HALF_FIRST;
    left->flags &= (uint8_t)~Y_HALF_LAST;
    if (p->flags == left->flags && left->bytes == left->end - left->clock) {
        i = (uint32_t)units; /* all of it is ASCII */
        units = 0;
    }
    if ((left->flags & Y_HALF_FIRST) != 0)
        units--;
    while (units > 0) {
        uint32_t width;
        must(i < p->bytes);
        width = utf8_width(at[i]);
        half = width == 4 && units == 1;
        i += width;
        units -= width == 4 && !half ? 2 : 1;
    }
    left->bytes = half ? i - 4 : i;
    if (half) {
        left->flags |= Y_HALF_LAST;
        p->flags |= Y_HALF_FIRST;
    }
    p->skip += i;
    p->bytes -= i;
}

/* Cuts p at a clock inside it: *left gets what stands before, p keeps the
 * rest.  A cut through a surrogate pair leaves U+FFFD on both sides, as in
 * Yjs.  A string is walked from where the last cut was: cutting one into n
 * pieces, from left to right, walks it once. */
static void
y_cut(struct y_part *p, uint64_t at, struct y_part *left)
{
    uint64_t units = at - p->clock;

    must(p->clock < at && at < p->end);
    *left = *p;
    if (p->kind == Y_STRING) {
        y_cut_string(p, units, left);
    } else if (p->kind == Y_JSON || p->kind == Y_ANY) {
        struct y_in r = y_over(p->head + p->skip, p->bytes);
        for (; units > 0; units--) {
            if (p->kind == Y_ANY)
                y_skip_any(&r);
            else
                (void)y_text(&r);
        }
        left->bytes = p->bytes - (uint32_t)span_len(r.in);
        p->skip += left->bytes;
        p->bytes -= left->bytes;
    }
    left->end = at;
    p->clock = at;
    if (y_has_head(p))
        p->flags |= Y_CUT;
}

/* Bytes of its content. */
static uint64_t
y_size(const struct y_part *p)
{
    return (uint64_t)p->bytes + ((p->flags & Y_HALF_FIRST) != 0 ? 3 : 0) +
           ((p->flags & Y_HALF_LAST) != 0 ? 3 : 0);
}

/* ----- writing a struct ------------------------------------------------- */

static void
y_put_head(struct y_sink *o, const struct y_part *p)
{
    struct y_head h;
    uint8_t info = p->kind;

    if (!y_has_head(p)) {
        y_put(o, &info, 1);
        return;
    }
    y_head(p, &h);
    info |= h.has_left ? Y_INFO_LEFT : 0;
    info |= h.has_right ? Y_INFO_RIGHT : 0;
    info |= h.has_key ? Y_INFO_KEY : 0;
    y_put(o, &info, 1);
    if (h.has_left)
        y_put_id(o, h.left);
    if (h.has_right)
        y_put_id(o, h.right);
    if (h.has_root || h.has_parent)
        y_put_uint(o, h.has_root);
    if (h.has_root)
        y_put_text(o, h.root);
    if (h.has_parent)
        y_put_id(o, h.parent);
    if (h.has_key)
        y_put_text(o, h.key);
}

/* What stands ahead of the contents of a struct that is made of parts: the
 * head of the first, units and bytes of all. */
static void
y_put_open(struct y_sink *o, const struct y_part *first, uint64_t units,
           uint64_t bytes)
{
    y_put_head(o, first);
    switch (first->kind) {
    case Y_GC: case Y_SKIP: case Y_DELETED: case Y_JSON: case Y_ANY:
        y_put_uint(o, units);
        break;
    case Y_STRING:
        y_put_uint(o, bytes);
        break;
    default: /* the content has its own length */
        break;
    }
}

static void
y_put_content(struct y_sink *o, const struct y_part *p)
{
    if ((p->flags & Y_HALF_FIRST) != 0)
        y_put(o, y_fffd, sizeof y_fffd);
    y_put(o, p->head + p->skip, p->bytes);
    if ((p->flags & Y_HALF_LAST) != 0)
        y_put(o, y_fffd, sizeof y_fffd);
}

/* ----- load ------------------------------------------------------------- */

/* What a document holds. */
struct y_store {
    struct span snapshot;       /* one canonical update, or empty */
    size_t snapshot_deletes_at; /* where its delete set begins */
    struct span tail;           /* a run: (length, update) back to back */
};

/* The next update of a run. */
static bool
y_run_next(struct span *run, struct span *update)
{
    struct span in = *run;
    uint64_t n;

    if (!y_uint(&in, &n) || n > span_len(in))
        return false;
    *update = span_of(in.at, (size_t)n);
    run->at = update->end;
    return true;
}

struct y_work {
    uint8_t *at; /* on a multiple of 8 */
    size_t size;
};

/* How an operation ended. */
enum y_answer {
    Y_OK,
    Y_NO_ROOM, /* the work memory is too small */
    Y_BROKEN   /* bytes that y_check would refuse */
};

/* What an operation has prepared.  It borrows the inputs and the work memory
 * until it has been written. */
struct y_result {
    size_t bytes;      /* y_write writes exactly so many */
    uint64_t clients, structs, ranges;
    size_t deletes_at; /* in them */
    bool empty;        /* neither structs nor ranges */

    struct y_part *parts;    /* in the order of their arrival */
    uint32_t *order, *spare; /* part numbers: structs, then ranges */
    uint32_t used, room;     /* parts */
    uint32_t n, n_structs;   /* entries of order */
    bool gc_deletes;         /* GC structs belong to the delete set */
    enum y_answer answer;
};

enum { Y_PART_COST = sizeof(struct y_part) + 2 * sizeof(uint32_t) };

/* Work memory that is always enough for y_merge, and with a state vector's
 * entries as clients for y_diff.  The numbers are the sums of the reports over
 * snapshot and tail.  The sweep cuts at most one part more for each struct that
 * begins inside another (a document's own updates do not overlap, so half of
 * that will do), cleaning at most two for each delete range. */
static uint64_t
y_work_size(uint64_t structs, uint64_t ranges, uint64_t clients)
{
    return (2 * structs + 3 * ranges + clients) * Y_PART_COST;
}

/* The same for y_minus; `ranges` are the document's. */
static uint64_t
y_minus_size(const struct y_known *known, const struct y_report *update,
             uint64_t ranges)
{
    return (2 * (update->structs + update->ranges + ranges) +
            update->clients + 2 * known->n_islands) * Y_PART_COST;
}

static void
y_begin(struct y_result *r, struct y_work work)
{
    size_t room = work.size / Y_PART_COST;

    must(((uintptr_t)work.at & 7) == 0);
    *r = (struct y_result){ 0 };
    r->room = room < UINT32_MAX ? (uint32_t)room : UINT32_MAX - 1;
    r->parts = (struct y_part *)(void *)work.at;
    r->order = (uint32_t *)(void *)(r->parts + r->room);
    r->spare = r->order + r->room;
}

static struct y_part *
y_part(const struct y_result *r, uint32_t i)
{
    return &r->parts[r->order[i]];
}

/* A new part's number; without room, the last one's again. */
static uint32_t
y_new(struct y_result *r, const struct y_part *p)
{
    if (r->used == r->room) {
        r->answer = Y_NO_ROOM;
        return r->room - 1;
    }
    r->parts[r->used] = *p;
    return r->used++;
}

static void
y_add(struct y_result *r, const struct y_part *p)
{
    uint32_t i = y_new(r, p);

    if (r->answer == Y_OK)
        r->order[r->n++] = i;
}

enum y_want { Y_ALL, Y_COVERED_RANGES };

/* Loads an update's parts, or its delete ranges as a cover. */
static void
y_load(struct y_result *r, struct span update, size_t deletes_at,
       enum y_want want)
{
    struct y_walk w = want == Y_COVERED_RANGES && deletes_at > 0
                          ? y_walk_deletes(update, deletes_at)
                          : y_walk(update);
    struct y_part p;

    while (r->answer == Y_OK && y_walk_next(&w, &p)) {
        if (p.kind == Y_SKIP ||
            (p.kind != Y_RANGE && want == Y_COVERED_RANGES))
            continue;
        p.flags = want == Y_COVERED_RANGES ? Y_COVER : 0;
        y_add(r, &p);
    }
    if (w.r.fault != NULL)
        r->answer = Y_BROKEN;
}

/* ----- sort ------------------------------------------------------------- */

static bool
y_is_before(const struct y_part *a, const struct y_part *b)
{
    bool a_range = a->kind == Y_RANGE, b_range = b->kind == Y_RANGE;

    if (a_range != b_range)
        return b_range;
    if (a->client != b->client)
        return a->client > b->client;
    return a->clock < b->clock;
}

/* The end of what is in order from i on. */
static uint32_t
y_sorted_to(const struct y_result *r, uint32_t i)
{
    if (i < r->n)
        i++;
    while (i < r->n && !y_is_before(y_part(r, i), y_part(r, i - 1)))
        i++;
    return i;
}

/* Sorts the order from an entry on: a merge sort of the runs that are there.
 * A document's own updates are few of them. */
static void
y_sort(struct y_result *r, uint32_t from)
{
    while (y_sorted_to(r, from) < r->n) {
        uint32_t to = from;
        while (to < r->n) {
            uint32_t a = to, mid = y_sorted_to(r, a), b = mid;
            uint32_t end = y_sorted_to(r, mid);
            while (a < mid || b < end)
                r->spare[to++] =
                    b == end || (a < mid && !y_is_before(y_part(r, b),
                                                         y_part(r, a)))
                        ? r->order[a++]
                        : r->order[b++];
        }
        memcpy(r->order + from, r->spare + from,
               (r->n - from) * sizeof *r->order);
    }
}

/* Loads what is wanted of a document, in order. */
static void
y_load_store(struct y_result *r, const struct y_store *store,
             enum y_want want)
{
    struct span tail = store->tail, update;
    uint32_t n;

    if (!span_is_empty(store->snapshot))
        y_load(r, store->snapshot, store->snapshot_deletes_at, want);
    n = r->n;
    while (y_run_next(&tail, &update))
        y_load(r, update, 0, want);
    if (!span_is_empty(tail))
        r->answer = Y_BROKEN;
    y_sort(r, n); /* by itself first, it is small */
}

/* ----- sweep ------------------------------------------------------------ */

/* The heap of parts that hold the place the sweep is at, the earliest arrival
 * on top.  Its entries stand in the links of the first parts. */
struct y_heap {
    struct y_part *parts;
    uint32_t n;
};

static uint32_t
y_heap_top(const struct y_heap *h)
{
    return h->parts[0].link;
}

static void
y_heap_push(struct y_heap *h, uint32_t part)
{
    uint32_t i = h->n++;

    for (; i > 0 && h->parts[(i - 1) / 2].link > part; i = (i - 1) / 2)
        h->parts[i].link = h->parts[(i - 1) / 2].link;
    h->parts[i].link = part;
}

static void
y_heap_pop(struct y_heap *h)
{
    uint32_t last = h->parts[--h->n].link, i = 0;

    for (;;) {
        uint32_t child = 2 * i + 1;
        if (child >= h->n)
            break;
        if (child + 1 < h->n &&
            h->parts[child + 1].link < h->parts[child].link)
            child++;
        if (h->parts[child].link >= last)
            break;
        h->parts[i].link = h->parts[child].link;
        i = child;
    }
    h->parts[i].link = last;
}

/* Puts a part behind the others of the new order, unless it only covers. */
static void
y_keep(struct y_result *r, uint32_t *n, uint32_t part)
{
    if ((r->parts[part].flags & Y_COVER) == 0)
        r->spare[(*n)++] = part;
}

static void
y_swap_orders(struct y_result *r)
{
    uint32_t *order = r->order;

    r->order = r->spare;
    r->spare = order;
}

/* Makes the first `to` entries disjoint. */
static void
y_sweep(struct y_result *r, uint32_t to)
{
    struct y_heap heap = { r->parts, 0 };
    uint32_t i = 0, n = 0;

    while ((i < to || heap.n > 0) && r->answer == Y_OK) {
        struct y_part *top, *next = i < to ? y_part(r, i) : NULL, left;
        if (heap.n == 0) {
            y_heap_push(&heap, r->order[i++]);
            continue;
        }
        top = &r->parts[y_heap_top(&heap)];
        if (next != NULL && next->client == top->client &&
            (next->kind == Y_RANGE) == (top->kind == Y_RANGE) &&
            next->clock < top->end) {
            /* One begins inside; if it came earlier it interrupts. */
            if (next < top && top->clock < next->clock) {
                y_cut(top, next->clock, &left);
                y_keep(r, &n, y_new(r, &left));
            }
            y_heap_push(&heap, r->order[i++]);
            continue;
        }
        y_keep(r, &n, y_heap_top(&heap));
        y_heap_pop(&heap);
        while (heap.n > 0 && r->parts[y_heap_top(&heap)].end <= top->end)
            y_heap_pop(&heap);
        if (heap.n > 0) {
            struct y_part *under = &r->parts[y_heap_top(&heap)];
            if (under->clock < top->end)
                y_cut(under, top->end, &left);
        }
    }
    memcpy(r->spare + n, r->order + to, (r->n - to) * sizeof *r->order);
    r->n = n + r->n - to;
    y_swap_orders(r);
}

/* ----- fuse ------------------------------------------------------------- */

/* Does b, with its head, go on where a ends, so that both are one struct?  The
 * right neighbour must be the same: somebody may have seen a end where it did
 * and put something there. */
static bool
y_continues(const struct y_part *a, const struct y_head *ah,
            const struct y_part *b, const struct y_head *bh)
{
    if (a->kind != b->kind || a->client != b->client || a->end != b->clock)
        return false;
    if (a->kind == Y_GC)
        return true;
    if (a->kind != Y_DELETED && a->kind != Y_STRING && a->kind != Y_ANY &&
        a->kind != Y_JSON)
        return false;
    return bh->has_left && bh->left.client == b->client &&
           bh->left.clock == b->clock - 1 && ah->has_right == bh->has_right &&
           (!ah->has_right || (ah->right.client == bh->right.client &&
                               ah->right.clock == bh->right.clock));
}

/* Marks the structs that continue the one before, and counts. */
static void
y_fuse(struct y_result *r)
{
    const struct y_part *a = NULL;
    struct y_head heads[2] = { { 0 }, { 0 } };

    for (uint32_t i = 0; i < r->n_structs; i++) {
        struct y_part *b = y_part(r, i);
        struct y_head *ah = &heads[i % 2], *bh = &heads[(i + 1) % 2];
        if (y_has_head(b))
            y_head(b, bh);
        b->flags &= (uint8_t)~Y_FUSED;
        if (a != NULL && y_continues(a, ah, b, bh))
            b->flags |= Y_FUSED;
        a = b;
    }
}

/* The end of the struct that begins at entry i. */
static uint32_t
y_fused_to(const struct y_result *r, uint32_t i)
{
    do
        i++;
    while (i < r->n_structs && (y_part(r, i)->flags & Y_FUSED) != 0);
    return i;
}

/* Makes one of ranges that overlap or touch. */
static void
y_unite(struct y_result *r)
{
    uint32_t n = r->n_structs;

    for (uint32_t i = n; i < r->n; i++) {
        struct y_part *p = y_part(r, i);
        struct y_part *last = n > r->n_structs ? y_part(r, n - 1) : NULL;
        if (last == NULL || p->client != last->client || p->clock > last->end)
            r->order[n++] = r->order[i];
        else if (p->end > last->end)
            last->end = p->end;
    }
    r->n = n;
}

/* Everything between loading and cleaning. */
static void
y_settle(struct y_result *r, bool cover_ranges)
{
    uint32_t structs = 0;

    if (r->answer != Y_OK)
        return;
    y_sort(r, 0);
    while (structs < r->n && y_part(r, structs)->kind != Y_RANGE)
        structs++;
    y_sweep(r, cover_ranges ? r->n : structs);
    if (r->answer != Y_OK)
        return;
    while (r->n_structs < r->n && y_part(r, r->n_structs)->kind != Y_RANGE)
        r->n_structs++;
    y_unite(r);
    y_fuse(r);
}

/* ----- clean ------------------------------------------------------------ */

enum y_gc {
    Y_GC_OFF,
    Y_GC_AUTO, /* deleted content goes where that makes the update shorter */
    Y_GC_FULL  /* all deleted content goes */
};

/* A place in the parts of one struct, moving to the right. */
struct y_place {
    uint32_t i, end;    /* the entry; where the struct's entries end */
    struct y_part rest; /* what of the entry's part is to the right */
    uint64_t bytes;     /* of content to the left */
};

static struct y_place
y_place(const struct y_result *r, uint32_t i, uint32_t end)
{
    return (struct y_place){ .i = i, .end = end, .rest = *y_part(r, i) };
}

static void
y_place_next(const struct y_result *r, struct y_place *at)
{
    at->i++;
    if (at->i < at->end)
        at->rest = *y_part(r, at->i);
    else
        at->rest.clock = at->rest.end;
}

/* Goes to a clock; answers how many bytes of content stand before it.  A pair
 * that is cut counts two bytes on either side. */
static uint64_t
y_place_offset(const struct y_result *r, struct y_place *at, uint64_t clock)
{
    while (at->rest.clock < clock) {
        struct y_part left;
        uint64_t size = y_size(&at->rest);
        if (at->rest.end <= clock) {
            at->bytes += size;
            y_place_next(r, at);
            continue;
        }
        y_cut(&at->rest, clock, &left);
        at->bytes += size - y_size(&at->rest);
        if ((at->rest.flags & Y_HALF_FIRST) != 0)
            return at->bytes + 1; /* U+FFFD is one byte longer than a half */
    }
    return at->bytes;
}

/* Bytes of the head of a struct that begins with a cut of p at this clock. */
static uint64_t
y_cut_cost(const struct y_part *p, uint64_t clock)
{
    struct y_part cut = *p;
    struct y_head h;

    cut.flags |= Y_CUT;
    y_head(&cut, &h);
    return 2 + y_uint_len(p->client) + y_uint_len(clock - 1) +
           (h.has_right
                ? y_uint_len(h.right.client) + y_uint_len(h.right.clock)
                : 0);
}

/* Copies the parts up to a clock into the new order, deleted or as they are.
 * What is cut off last keeps its number. */
static void
y_place_copy(struct y_result *r, struct y_place *at, uint64_t clock,
             bool deleted, uint32_t *n)
{
    while (at->rest.clock < clock && r->answer == Y_OK) {
        struct y_part left = at->rest;
        uint32_t part = r->order[at->i];
        bool whole = at->rest.end <= clock;
        if (!whole)
            y_cut(&at->rest, clock, &left);
        if (deleted) {
            left.kind = Y_DELETED;
            left.flags &= (uint8_t)~(Y_HALF_FIRST | Y_HALF_LAST);
            left.bytes = 0;
        }
        if (whole) {
            r->parts[part] = left;
            y_place_next(r, at);
        } else {
            part = y_new(r, &left);
        }
        r->spare[(*n)++] = part;
    }
}

/* Takes deleted content out. */
static void
y_clean_content(struct y_result *r, enum y_gc mode)
{
    uint32_t n = 0, range = r->n_structs, next;

    for (uint32_t i = 0; i < r->n_structs && r->answer == Y_OK; i = next) {
        const struct y_part first = *y_part(r, i);
        struct y_place copied, probe;
        uint64_t end;
        next = y_fused_to(r, i);
        end = y_part(r, next - 1)->end;
        copied = probe = y_place(r, i, next);
        while (range < r->n && (y_part(r, range)->client > first.client ||
                                (y_part(r, range)->client == first.client &&
                                 y_part(r, range)->end <= first.clock)))
            range++;
        for (uint32_t x = range; x < r->n && r->answer == Y_OK; x++) {
            uint64_t from = y_part(r, x)->clock, to = y_part(r, x)->end, gain;
            if (y_part(r, x)->client != first.client || from >= end ||
                first.kind == Y_GC || first.kind == Y_DELETED)
                break;
            from = from > first.clock ? from : first.clock;
            to = to < end ? to : end;
            if (mode == Y_GC_AUTO) {
                gain = y_place_offset(r, &probe, from);
                gain = y_place_offset(r, &probe, to) - gain;
                if (gain < (from > first.clock ? y_cut_cost(&first, from) : 0)
                               + (to < end ? y_cut_cost(&first, to) : 0))
                    continue;
            }
            y_place_copy(r, &copied, from, false, &n);
            y_place_copy(r, &copied, to, true, &n);
        }
        y_place_copy(r, &copied, end, false, &n);
    }
    if (r->answer != Y_OK)
        return;
    memcpy(r->spare + n, r->order + r->n_structs,
           (r->n - r->n_structs) * sizeof *r->order);
    r->n = n + r->n - r->n_structs;
    r->n_structs = n;
    y_swap_orders(r);
}

/* The entry of the struct that holds an id, or n_structs. */
static uint32_t
y_find(const struct y_result *r, struct y_id id)
{
    const struct y_part want = { .client = id.client, .clock = id.clock };
    uint32_t low = 0, high = r->n_structs;

    while (low < high) { /* the first that begins behind it */
        uint32_t mid = low + (high - low) / 2;
        if (y_is_before(&want, y_part(r, mid)))
            high = mid;
        else
            low = mid + 1;
    }
    if (low == 0 || y_part(r, low - 1)->client != id.client ||
        y_part(r, low - 1)->end <= id.clock)
        return r->n_structs;
    return low - 1;
}

enum y_fate { Y_UNKNOWN, Y_ASKED, Y_LIVES }; /* the dead are GC */

/* Does a struct die with the one that holds this id?  1 or 0; -1: ask *first
 * about its own fate.  One that is being asked depends on itself: no. */
static int
y_dies_with(const struct y_result *r, struct y_id id, bool as_parent,
            uint32_t *first)
{
    const struct y_part *p;

    *first = y_find(r, id);
    if (*first == r->n_structs)
        return 0; /* not here: who knows */
    p = y_part(r, *first);
    if (p->kind == Y_GC || (as_parent && p->kind != Y_TYPE))
        return 1;
    return p->fate == Y_UNKNOWN ? -1 : 0;
}

static int
y_is_dead(const struct y_result *r, const struct y_part *p, uint32_t *first)
{
    struct y_head h;
    int dead = 0;

    y_head(p, &h);
    if (h.has_parent)
        return y_dies_with(r, h.parent, true, first);
    if (h.has_left)
        dead = y_dies_with(r, h.left, false, first);
    if (dead == 0 && h.has_right)
        dead = y_dies_with(r, h.right, false, first);
    return dead;
}

/* Makes GC of what lies below a deleted type, and of nothing else: clients
 * turn whatever refers to a GC into GC themselves.  Each struct is asked after
 * those it depends on; `link` leads back to who wanted to know. */
static void
y_clean_below(struct y_result *r)
{
    for (uint32_t i = 0; i < r->n_structs; i++) {
        uint32_t at = i;
        y_part(r, i)->link = NONE32;
        while (at != NONE32) {
            struct y_part *p = y_part(r, at);
            uint32_t first = 0;
            int dead;
            if (p->kind == Y_GC || p->fate == Y_LIVES) {
                at = p->link;
                continue;
            }
            p->fate = Y_ASKED;
            dead = y_is_dead(r, p, &first);
            if (dead < 0) {
                y_part(r, first)->link = at;
                at = first;
            } else if (dead == 0) {
                p->fate = Y_LIVES;
            } else {
                p->kind = Y_GC;
                p->flags = 0;
                p->bytes = 0;
            }
        }
    }
}

static void
y_clean(struct y_result *r, enum y_gc mode)
{
    if (r->answer == Y_OK)
        y_clean_content(r, mode);
    if (r->answer != Y_OK)
        return;
    y_clean_below(r);
    y_fuse(r);
    r->gc_deletes = true;
}

/* ----- write ------------------------------------------------------------ */

/* One struct: entries [i, end). */
static void
y_put_fused(struct y_sink *o, const struct y_result *r, uint32_t i,
            uint32_t end)
{
    const struct y_part *first = y_part(r, i);
    uint64_t bytes = 0;

    for (uint32_t k = i; k < end; k++)
        bytes += y_size(y_part(r, k));
    y_put_open(o, first, y_part(r, end - 1)->end - first->clock, bytes);
    for (uint32_t k = i; k < end; k++)
        y_put_content(o, y_part(r, k));
}

/* One client's section, from entry i on; answers where the next begins.
 * *structs: how many it has, Skips too. */
static uint32_t
y_put_section(struct y_sink *o, const struct y_result *r, uint32_t i,
              uint64_t *structs)
{
    uint64_t client = y_part(r, i)->client, clock = y_part(r, i)->clock;
    uint32_t end = i;

    *structs = 0;
    for (uint64_t at = clock;
         end < r->n_structs && y_part(r, end)->client == client; end++) {
        *structs += (uint64_t)((y_part(r, end)->flags & Y_FUSED) == 0) +
                    (y_part(r, end)->clock > at);
        at = y_part(r, end)->end;
    }
    y_put_uint(o, *structs);
    y_put_id(o, (struct y_id){ client, clock });
    for (uint32_t next; i < end; i = next) {
        const struct y_part skip = { .kind = Y_SKIP };
        if (y_part(r, i)->clock > clock)
            y_put_open(o, &skip, y_part(r, i)->clock - clock, 0);
        next = y_fused_to(r, i);
        y_put_fused(o, r, i, next);
        clock = y_part(r, next - 1)->end;
    }
    return end;
}

/* Where in the ranges, and in the GC structs that count as such. */
struct y_deletes {
    uint32_t range, gc;
};

static bool
y_deletes_next(const struct y_result *r, struct y_deletes *at,
               struct y_part *range)
{
    bool any = false;

    *range = (struct y_part){ 0 };
    for (;;) {
        const struct y_part *p = NULL, *gc;
        bool is_gc;
        while (at->gc < r->n_structs &&
               !(r->gc_deletes && y_part(r, at->gc)->kind == Y_GC))
            at->gc++;
        gc = at->gc < r->n_structs ? y_part(r, at->gc) : NULL;
        if (at->range < r->n)
            p = y_part(r, at->range);
        is_gc = gc != NULL &&
                (p == NULL || gc->client > p->client ||
                 (gc->client == p->client && gc->clock < p->clock));
        p = is_gc ? gc : p;
        if (p == NULL || (any && (p->client != range->client ||
                                  p->clock > range->end)))
            return any;
        if (!any)
            *range = *p;
        else if (p->end > range->end)
            range->end = p->end;
        any = true;
        if (is_gc)
            at->gc++;
        else
            at->range++;
    }
}

static void
y_put_deletes(struct y_sink *o, const struct y_result *r, uint64_t *ranges)
{
    const struct y_deletes start = { .range = r->n_structs };
    struct y_deletes at = start, ahead = start;
    struct y_part p;
    uint64_t clients = 0, client = 0, n;

    *ranges = 0;
    while (y_deletes_next(r, &ahead, &p)) {
        clients += *ranges == 0 || p.client != client;
        client = p.client;
        ++*ranges;
    }
    y_put_uint(o, clients);
    for (; clients > 0; clients--) {
        ahead = at;
        for (n = 0; y_deletes_next(r, &ahead, &p); n++) {
            if (n > 0 && p.client != client)
                break;
            client = p.client;
        }
        y_put_id(o, (struct y_id){ client, n });
        for (; n > 0; n--) {
            (void)y_deletes_next(r, &at, &p);
            y_put_id(o, (struct y_id){ p.clock, p.end - p.clock });
        }
    }
}

static void
y_put_result(struct y_sink *o, struct y_result *r)
{
    uint64_t n;

    r->clients = r->structs = 0;
    for (uint32_t i = 0; i < r->n_structs; i++)
        r->clients += i == 0 ||
                      y_part(r, i)->client != y_part(r, i - 1)->client;
    y_put_uint(o, r->clients);
    for (uint32_t i = 0; i < r->n_structs; r->structs += n)
        i = y_put_section(o, r, i, &n);
    r->deletes_at = (size_t)o->n;
    y_put_deletes(o, r, &r->ranges);
}

/* Writes what an operation has prepared: r->bytes bytes. */
static void
y_write(struct y_result *r, struct out *out)
{
    struct y_sink o = { out, 0 };

    must(r->answer == Y_OK);
    y_put_result(&o, r);
    must(o.n == r->bytes);
}

static enum y_answer
y_finish(struct y_result *r)
{
    struct y_sink count = { NULL, 0 };

    if (r->answer != Y_OK)
        return r->answer;
    y_put_result(&count, r);
    r->bytes = (size_t)count.n;
    r->empty = r->structs == 0 && r->ranges == 0;
    return Y_OK;
}

/* ----- the operations --------------------------------------------------- */

/* All of a document as one compact update. */
static enum y_answer
y_merge(const struct y_store *store, enum y_gc mode, struct y_work work,
        struct y_result *r)
{
    y_begin(r, work);
    y_load_store(r, store, Y_ALL);
    y_settle(r, false);
    if (mode != Y_GC_OFF)
        y_clean(r, mode);
    return y_finish(r);
}

static void
y_cover(struct y_result *r, struct y_stretch s)
{
    const struct y_part p = { .client = s.client, .clock = s.from,
                              .end = s.to, .kind = Y_GC, .flags = Y_COVER };

    if (s.from < s.to)
        y_add(r, &p);
}

/* What of a document somebody lacks who has what a state vector says, and the
 * whole delete set, of which it says nothing. */
static enum y_answer
y_diff(const struct y_store *store, struct span sv, struct y_work work,
       struct y_result *r)
{
    struct y_in in = { .in = sv };
    uint64_t left = y_count(&in, 2);
    struct y_id entry;

    y_begin(r, work);
    while (y_sv_next(&in, &left, &entry))
        y_cover(r, (struct y_stretch){ entry.client, 0, entry.clock });
    if (in.fault != NULL)
        r->answer = Y_BROKEN;
    y_load_store(r, store, Y_ALL);
    y_settle(r, false);
    return y_finish(r);
}

/* What of an update a document does not have yet.  Its structs need not be
 * looked at: `known` says which there are. */
static enum y_answer
y_minus(const struct y_store *store, const struct y_known *known,
        struct span update, struct y_work work, struct y_result *r)
{
    struct y_walk w = y_walk(update);
    const struct y_known_client *c;
    struct y_stretch s;
    uint64_t client = 0;

    y_begin(r, work);
    for (size_t i = 0; i < known->n_islands; i++)
        y_cover(r, known->islands[i]);
    for (bool first = true; y_walk_stretch(&w, &s); first = false) {
        if (!first && s.client == client)
            continue; /* its section goes on behind a Skip */
        client = s.client;
        if ((c = y_known_get(known, client)) != NULL)
            y_cover(r, (struct y_stretch){ client, 0, c->next });
    }
    if (w.left > 0)
        y_load_store(r, store, Y_COVERED_RANGES);
    y_load(r, update, 0, Y_ALL);
    y_settle(r, true);
    return y_finish(r);
}

/* ----- pieces ---------------------------------------------------------------
 * Cuts a canonical update into legal updates of about `most` bytes: first the
 * structs, then the delete set.  Two uses:
 *
 *   journal   a damaged record costs a piece, not the document
 *   joining   pieces go ahead of the SyncStep2 to a client, which must not act
 *             on half a document.  So each client's first struct (of a long
 *             one, its beginning) is held back: the others can only wait for
 *             it.  y_pieces_close writes what was held back, and the delete set
 * ------------------------------------------------------------------------- */

/* Bytes that are held back of a long struct. */
#define Y_HELD 256

/* Bytes a piece takes beside its structs, and each list in it. */
#define Y_PIECE_COST 8
#define Y_LIST_COST 24

struct y_pieces {
    struct y_walk walk; /* behind the part */
    struct y_part part; /* what comes next, if there is more */
    bool more;
    bool whole;         /* the update is one piece */
    bool joining;
    uint64_t most;
    /* of the piece that is being put together: */
    bool any;           /* there is something in it, */
    bool ranges;        /* ranges, not structs; */
    uint64_t client;    /* the last is of this client, */
    uint64_t room;      /* and so many bytes may follow */
};

/* Cuts off what of a long string, list of values or of JSON texts fits into so
 * many bytes.  False: all of p does, or it cannot be cut. */
static bool
y_cut_to_fit(struct y_part *p, uint64_t bytes, struct y_part *left)
{
    const uint8_t *content = p->head + p->skip;
    uint64_t units = 0;

    if (y_size(p) <= bytes)
        return false;
    if (p->kind == Y_STRING) {
        /* a character that is begun counts whole */
        units = y_units(span_of(content, bytes < p->bytes ? (size_t)bytes + 1
                                                          : p->bytes));
    } else if (p->kind == Y_ANY || p->kind == Y_JSON) {
        struct y_in in = y_over(content, p->bytes);
        do {
            if (p->kind == Y_ANY)
                y_skip_any(&in);
            else
                (void)y_text(&in);
            units++;
        } while ((uint64_t)(in.in.at - content) < bytes);
    }
    if (units == 0 || units >= p->end - p->clock)
        return false;
    y_cut(p, p->clock + units, left);
    return true;
}

/* Writes a struct that is one part, or a range. */
static void
y_put_part(struct y_sink *o, const struct y_part *p)
{
    if (p->kind == Y_RANGE) {
        y_put_id(o, (struct y_id){ p->clock, p->end - p->clock });
        return;
    }
    y_put_open(o, p, p->end - p->clock, y_size(p));
    y_put_content(o, p);
}

/* Goes on to the next part; holes are seen by their clocks. */
static void
y_pieces_step(struct y_pieces *c)
{
    struct y_part held;

    do {
        c->more = y_walk_next(&c->walk, &c->part) &&
                  !(c->joining && c->walk.in_deletes);
    } while (c->more && (c->part.kind == Y_SKIP ||
                         (c->joining && c->walk.opened &&
                          !y_cut_to_fit(&c->part, Y_HELD, &held))));
}

static struct y_pieces
y_pieces(struct span update, uint64_t most, bool joining)
{
    struct y_pieces c = { .walk = y_walk(update), .joining = joining,
                          .whole = !joining && span_len(update) <= most,
                          .most = most };

    y_pieces_step(&c);
    return c;
}

/* The next part of the piece that is being put together.  False: it is full.
 * A copy of c goes the same way again. */
static bool
y_pieces_take(struct y_pieces *c, struct y_part *p)
{
    struct y_sink size = { NULL, 9 }; /* a Skip may go ahead */
    bool cut = false;

    if (!c->any)
        c->ranges = c->part.kind == Y_RANGE;
    if (!c->more || c->ranges != (c->part.kind == Y_RANGE))
        return false;
    if (!c->any || c->part.client != c->client)
        size.n += Y_LIST_COST;
    y_put_part(&size, &c->part);
    if (size.n > c->room) {
        uint64_t fixed = size.n - y_size(&c->part);
        uint64_t fits = c->room > fixed ? c->room - fixed : 0;
        cut = (!c->any || fits >= Y_HELD) && y_cut_to_fit(&c->part, fits, p);
        if (!cut && c->any)
            return false;
    }
    if (!cut) {
        *p = c->part;
        y_pieces_step(c);
    }
    c->any = true;
    c->client = p->client;
    c->room = size.n > c->room ? 0 : c->room - size.n;
    return true;
}

/* One list of a piece. */
static void
y_pieces_put_list(struct y_sink *o, struct y_pieces *c)
{
    struct y_pieces ahead = *c;
    uint64_t n = 0, at = c->part.clock, client = c->part.client;
    struct y_part p;

    while (y_pieces_take(&ahead, &p) && p.client == client) {
        n += 1u + (p.kind != Y_RANGE && p.clock > at);
        at = p.end;
    }
    at = c->part.clock;
    if (c->part.kind == Y_RANGE) {
        y_put_id(o, (struct y_id){ client, n });
    } else {
        y_put_uint(o, n);
        y_put_id(o, (struct y_id){ client, at });
    }
    for (; n > 0; n--) {
        const struct y_part skip = { .kind = Y_SKIP };
        (void)y_pieces_take(c, &p);
        if (p.kind != Y_RANGE && p.clock > at) {
            y_put_open(o, &skip, p.clock - at, 0);
            n--;
        }
        y_put_part(o, &p);
        at = p.end;
    }
}

/* Writes the next piece, or with out NULL counts it; answers its length, 0 if
 * there is none.  To count without going on, count with a copy of c. */
static size_t
y_pieces_next(struct y_pieces *c, struct out *out)
{
    struct y_sink o = { out, 0 };
    struct y_pieces ahead;
    struct y_part p;
    uint64_t lists = 0, client = 0;

    if (!c->more)
        return 0;
    if (c->whole) {
        c->more = false;
        y_put(&o, c->walk.from, (size_t)(c->walk.r.in.end - c->walk.from));
        return (size_t)o.n;
    }
    c->any = false;
    c->room = c->most > Y_PIECE_COST ? c->most - Y_PIECE_COST : 0;
    for (ahead = *c; y_pieces_take(&ahead, &p); client = p.client)
        lists += lists == 0 || p.client != client;
    if (ahead.ranges)
        y_put_uint(&o, 0);
    y_put_uint(&o, lists);
    for (; lists > 0; lists--)
        y_pieces_put_list(&o, c);
    if (!ahead.ranges)
        y_put_uint(&o, 0);
    return (size_t)o.n;
}

/* Writes, or with out NULL counts, what ends a joining. */
static size_t
y_pieces_close(struct span update, struct out *out)
{
    struct y_walk w = y_walk(update);
    struct y_sink o = { out, 0 };
    struct y_part p, held;

    y_put_uint(&o, w.lists);
    while (y_walk_next(&w, &p) && !w.in_deletes) {
        if (!w.opened)
            continue;
        if (!y_cut_to_fit(&p, Y_HELD, &held))
            held = p;
        y_put_uint(&o, 1);
        y_put_id(&o, (struct y_id){ held.client, held.clock });
        y_put_part(&o, &held);
    }
    y_put(&o, w.from + w.deletes_at, span_len(update) - w.deletes_at);
    return (size_t)o.n;
}

/* ----- awareness ------------------------------------------------------------
 * Who is there, and where: a client's number, a clock that grows with every
 * change, and a JSON object, or `null` for one that is gone. */

#define Y_AWARE_ENTRIES 100
#define Y_AWARE_BYTES 16384

struct y_aware {
    uint64_t client, clock;
    struct span json;
    bool gone;
};

static struct y_in
y_aware_open(struct span message, uint64_t *left)
{
    struct y_in r = { .in = message };

    *left = y_count(&r, 3);
    if (*left > Y_AWARE_ENTRIES)
        y_fail(&r, "too many states");
    return r;
}

/* The next entry.  False: the end, or a fault. */
static bool
y_aware_next(struct y_in *r, uint64_t *left, struct y_aware *entry)
{
    struct span s;

    if (*left == 0 || r->fault != NULL) {
        if (!span_is_empty(r->in))
            y_fail(r, "bytes behind the end");
        return false;
    }
    --*left;
    entry->client = y_get(r);
    entry->clock = y_get(r);
    s = entry->json = y_text(r);
    if (span_len(s) > Y_AWARE_BYTES)
        y_fail(r, "a state that is too long");
    else if (r->fault == NULL && !json_check(s))
        y_fail(r, "a state that is not JSON");
    switch (json_next(&s)) {
    case '{':
        entry->gone = false;
        break;
    case 'n':
        entry->gone = true;
        break;
    default:
        y_fail(r, "a state that is no object");
    }
    return r->fault == NULL;
}

/* Checks a whole message, so that none of it is taken if some of it is bad. */
static bool
y_aware_check(struct span message, const char **fault)
{
    uint64_t left;
    struct y_in r = y_aware_open(message, &left);
    struct y_aware entry;

    while (y_aware_next(&r, &left, &entry))
        ;
    *fault = r.fault;
    return r.fault == NULL;
}

static void
out_aware(struct out *o, const struct y_aware *entry)
{
    struct span json = entry->gone ? span_text("null") : entry->json;

    out_uint(o, entry->client);
    out_uint(o, entry->clock);
    out_uint(o, span_len(json));
    out_span(o, json);
}
/* ===== 8  Journal ==========================================================
 * Documents on disk: one file each, appended to, read back after any accident,
 * written anew now and then.  Payloads are opaque here.  Nothing is owned but
 * open files; no threads, but jrnl_sync and jrnl_install touch only what they
 * are given, so a helper thread may run them.
 *
 *   DIR/lock                     flock: one process writes in DIR
 *   DIR/NAME.ydoc                a document, NAME escaped (see jrnl_path)
 *   DIR/NAME.ydoc.new            one in the making; removed at the next start
 *   DIR/NAME.ydoc.damaged-1..3   originals from which something was missing
 *
 * Format 1.  Numbers are little-endian.  A file is a head and records, back to
 * back, without padding:
 *
 *          0                        8         9   10       10+n
 *          ├────────────────────────┼─────────┼───┼────────┼─────────┬┄
 *   head   │ 89 y d o c  0d 0a 1a   │ version │ n │ name,  │ CRC of  │ records
 *          │ (shows text-mode copy) │ 1       │   │ n B    │ 0..9+n  │
 *          └────────────────────────┴─────────┴───┴────────┴─────────┴┄
 *          0          3      4         8         12        16
 *          ├──────────┼──────┼─────────┼─────────┼─────────┼──────────┐
 *   record │ fa 4a 52 │ kind │ length  │ CRC of  │ CRC of  │ payload, │
 *          │ the mark │      │         │ payload │ 0..11   │ length B │
 *          └──────────┴──────┴─────────┴─────────┴─────────┴──────────┘
 *
 *   CRC       CRC-32C (Castagnoli), as in iSCSI.  The last one of a record is
 *             taken over its offset in the file (8 bytes), then bytes 0..11.
 *   kind      1  a piece of the snapshot; they stand first in the file, so the
 *                first record of another kind says where the snapshot ends
 *             2  updates accepted since
 *             Others with good CRCs are passed over and counted.  The payload
 *             of both is a run: (varuint length, update), again and again.
 *   version   Every version keeps the file's head as it is here.  One that this
 *             program does not know is refused and left alone.
 *
 * Reading.  Where a good record should begin and none does, the next good one
 * is searched for by its mark.  Found: what lies between is damage, one flipped
 * bit costs one record.  Not found: it is the torn tail of a write that a crash
 * or power cut interrupted; nobody was promised anything in it.  (A good head
 * with a bad payload is called damage at the end, too, to be on the safe side.)
 *   - A payload may hold bytes that look like a record, even a whole journal
 *     that somebody pasted into a document.  So the head has a CRC of its own,
 *     and the offset in it makes a record good in one place only; nor do blocks
 *     of a deleted file count that a power cut left in this one.
 *   - If the head is good, its length is, so a bad payload is stepped over as
 *     a whole.  That makes the search linear, whatever stands in the file.
 *   - The mark begins with a byte that UTF-8 never has: text is passed quickly.
 *   - A file's head may be damaged, too: records do not need it.  Then the name
 *     is the one that the file's name says.
 *
 * Writing.  A record is one pwritev at the known end, not O_APPEND: what stands
 * behind the end, after a failed write or by a stranger's hand, never gets
 * between records.  What failed is cut off again, and if even that fails, the
 * file is not used any more (`broken`), like one whose fdatasync failed: the
 * kernel may have dropped what was dirty and forgotten the error.  The way out
 * is always the same, write the document whole to a new file:
 *
 *   jrnl_create ─▶ jrnl_append each piece ─▶ jrnl_sync ─▶ jrnl_install: rename
 *   over the old one, sync the folder.
 *
 * At each moment NAME.ydoc is whole, the old one or the new one.  With one
 * exception: a damaged original goes aside first, by a rename (FAT has no
 * links), so a crash may leave NAME.ydoc.damaged-N and NAME.ydoc.new, already
 * synced, and nothing between.  The next start finishes that.
 * ========================================================================= */

#define JRNL_VERSION 1
#define JRNL_MAGIC "\x89ydoc\r\n\x1a"
#define JRNL_MARK "\xfaJR"
#define JRNL_HEAD 16 /* bytes of a record ahead of the payload */

/* A file's head is at most 10 + 255 + 4; a reader needs room for it. */
#define JRNL_LENT_MIN 512

/* Any off_t can say it, and documents that stand in memory stay below. */
#define JRNL_FILE_MAX INT32_MAX

#define JRNL_PATH 256  /* NAME_MAX and a zero */
#define JRNL_STEM 128  /* longest escaped name; with ".ydoc.damaged-1" 143, the
                        * most that an encrypted folder (eCryptfs) takes */
#define JRNL_PREFIX 64 /* what is kept of a longer one, ahead of its hash */
#define JRNL_ASIDE 3   /* damaged originals kept of one document */

_Static_assert(COLLABD_NAME_MAX <= UINT8_MAX, "a file's head has one byte");

enum jrnl_kind {
    JRNL_SNAPSHOT = 1,
    JRNL_UPDATES = 2,
    JRNL_TRIAL = 255 /* only to see whether there is room; passed over */
};

struct jrnl_folder {
    int fd, lock; /* -1: not open; a reader has no lock */
};

/* A file that is open.  Small, so that a helper thread is given a copy. */
struct jrnl_file {
    int fd; /* -1: closed */
    bool broken;  /* not to be written again; write the document anew */
    bool damaged; /* something is missing in it: keep it aside */
    bool refused; /* a write failed and that was said; until jrnl_synced */
    uint64_t end;    /* written up to there; before jrnl_resume: its size */
    uint64_t synced; /* on the disk up to there, as far as we know */
    struct span name; /* the document's, borrowed while this lives */
};

#define JRNL_CLOSED { .fd = -1 }

struct jrnl_record {
    uint64_t from, to; /* its bytes in the file, with the head */
    uint8_t kind;
    struct span payload; /* .at NULL: longer than the memory lent */
};

enum jrnl_found {
    JRNL_ERROR = -1, /* errno; logged */
    JRNL_END,        /* of what is good; a torn tail if from < to */
    JRNL_RECORD,
    JRNL_DAMAGE      /* from .. to - 1; a good record follows */
};

/*   invariants   1  at <= size,  from + have <= size,  have <= lent_len
 *                2  lent[0 .. have - 1] are the file's bytes from `from` on
 *                3  at only grows
 */
struct jrnl_reader {
    int fd;
    bool headless; /* the file's head is bad; it has no version and no name */
    bool ended;
    uint8_t version, name_len;
    uint8_t name[UINT8_MAX];
    uint8_t *lent;
    size_t lent_len, have;
    uint64_t from, size; /* size: when reading began */
    uint64_t at;         /* behind the last record or damage that was found */
    unsigned damages, unknown; /* gaps; records of unknown kinds */
    uint64_t damaged;          /* bytes in those gaps */
    struct span asked; /* whose file it should be; empty: anybody's, no log */
};

/* ----- numbers ---------------------------------------------------------- */

/* A CRC is linear: that of a byte is the sum of those of its bits. */
/* clang-format off */
#define JRNL_CRC_1(n) \
    (((n) &   1 ? 0xf26b8303 : 0u) ^ ((n) &   2 ? 0xe13b70f7 : 0u) ^ \
     ((n) &   4 ? 0xc79a971f : 0u) ^ ((n) &   8 ? 0x8ad958cf : 0u) ^ \
     ((n) &  16 ? 0x105ec76f : 0u) ^ ((n) &  32 ? 0x20bd8ede : 0u) ^ \
     ((n) &  64 ? 0x417b1dbc : 0u) ^ ((n) & 128 ? 0x82f63b78 : 0u))
#define JRNL_CRC_4(n) JRNL_CRC_1(n), JRNL_CRC_1((n) + 1), \
                      JRNL_CRC_1((n) + 2), JRNL_CRC_1((n) + 3)
#define JRNL_CRC_16(n) JRNL_CRC_4(n), JRNL_CRC_4((n) + 4), \
                       JRNL_CRC_4((n) + 8), JRNL_CRC_4((n) + 12)
#define JRNL_CRC_64(n) JRNL_CRC_16(n), JRNL_CRC_16((n) + 16), \
                       JRNL_CRC_16((n) + 32), JRNL_CRC_16((n) + 48)
/* clang-format on */

/* CRC-32C of more bytes, after those of which `crc` is; of none it is 0. */
static uint32_t
jrnl_crc(uint32_t crc, const uint8_t *at, size_t len)
{
    static const uint32_t table[256] = { JRNL_CRC_64(0), JRNL_CRC_64(64),
                                         JRNL_CRC_64(128), JRNL_CRC_64(192) };

    crc = ~crc;
    for (size_t i = 0; i < len; i++)
        crc = crc >> 8 ^ table[(crc ^ at[i]) & 255];
    return ~crc;
}

static uint32_t
jrnl_get32(const uint8_t *at)
{
    return (uint32_t)at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 |
           (uint32_t)at[3] << 24;
}

static void
jrnl_put32(struct out *o, uint32_t n)
{
    for (int shift = 0; shift < 32; shift += 8)
        out_u8(o, (uint8_t)(n >> shift));
}

/* The CRC that belongs in a record's head at this offset. */
static uint32_t
jrnl_head_crc(uint64_t offset, const uint8_t *head)
{
    uint8_t place[8];
    struct out o = out_over(place, sizeof place);

    jrnl_put32(&o, (uint32_t)offset);
    jrnl_put32(&o, (uint32_t)(offset >> 32));
    return jrnl_crc(jrnl_crc(0, place, sizeof place), head, JRNL_HEAD - 4);
}

/* ----- names ------------------------------------------------------------ */

/* The name of a document's file in the folder, with a suffix behind ".ydoc".
 * Every byte but a-z 0-9 - _ and a `.` that is not the first becomes %xx.  So
 * names that differ in case, or in how an accent is spelt, are different files
 * on disks that see no difference there, none is hidden and none leaves the
 * folder.  Of an escaped name that is too long a prefix is kept, then "%-",
 * which no escape begins with, and a hash; which document's file it is, its
 * head says. */
static const char *
jrnl_path(struct span name, const char *suffix, char path[JRNL_PATH])
{
    struct out o = out_over(path, JRNL_STEM);
    uint8_t hash[32];

    must(!span_is_empty(name) && span_len(name) <= COLLABD_NAME_MAX);
    for (const uint8_t *b = name.at; b < name.end; b++) {
        if ((*b >= 'a' && *b <= 'z') || byte_is_digit(*b) || *b == '-' ||
            *b == '_' || (*b == '.' && b > name.at)) {
            out_u8(&o, *b);
        } else {
            out_u8(&o, '%');
            out_hex(&o, b, 1);
        }
    }
    o.end = (uint8_t *)path + JRNL_PATH;
    if (o.full) {
        sys_hash(MBEDTLS_MD_SHA256, name, hash);
        o.at = (uint8_t *)path + JRNL_PREFIX;
        o.full = false;
        out_text(&o, "%-");
        out_hex(&o, hash, 16);
    }
    out_text(&o, ".ydoc");
    out_text(&o, suffix);
    out_u8(&o, '\0');
    must(!o.full);
    return path;
}

/* The way back, for a file whose head is damaged.  False: no name has this
 * file, or the file's name has only its hash. */
static bool
jrnl_unescape(const char *file, struct out *name)
{
    const uint8_t *begin = name->at;
    struct span s = span_text(file);
    char path[JRNL_PATH];

    s.end -= span_len(s) < 5 ? span_len(s) : 5;
    while (s.at < s.end) {
        uint8_t b = *s.at++;
        if (b == '%') {
            if (span_len(s) < 2 || hex_value(s.at[0]) < 0 ||
                hex_value(s.at[1]) < 0)
                return false;
            b = (uint8_t)(hex_value(s.at[0]) << 4 | hex_value(s.at[1]));
            s.at += 2;
        }
        out_u8(name, b);
    }
    s = (struct span){ begin, name->at };
    return !name->full && !span_is_empty(s) &&
           strcmp(jrnl_path(s, "", path), file) == 0;
}

/* ----- what can go wrong ------------------------------------------------ */

/* What the operator can do about it. */
static const char *
jrnl_advice(int error)
{
    switch (error) {
    case ENOSPC:
    case EDQUOT: return "; make room on that disk";
    case EFBIG: return "; raise the limit on the size of files";
    case EROFS: return "; mount that disk writable";
    case EACCES:
    case EPERM: return "; let this user read and write there";
    case EMFILE:
    case ENFILE: return "; raise the limit on open files";
    case ENOENT: return "; it or its folder is not there";
    case EIO: return "; the disk may be failing, look into the kernel's log";
    case EWOULDBLOCK:
        return "; another collabd uses it: stop that one, or give each its "
               "own folder";
    case EPROTONOSUPPORT:
        return "; a newer collabd wrote it and can read it; it is left alone";
    case EEXIST: return "; it is another document's, give it its own name back";
    case ESTALE: return "; it was cut while it was read, try again";
    }
    return "";
}

/* Says what could not be done with a document's file.  -1, errno as before. */
static int
jrnl_fail(struct span name, const char *what)
{
    int error = errno;
    char path[JRNL_PATH];

    log_say(LOG_LEVEL_ERROR, "journal %s: %s: %s%s", jrnl_path(name, "", path),
            what, strerror(error), jrnl_advice(error));
    errno = error;
    return -1;
}

/* ----- the folder ------------------------------------------------------- */

/* EINVAL: a file system on which a folder needs no sync. */
static int
jrnl_sync_folder(int fd)
{
    return sys.fsync(fd) == 0 || errno == EINVAL ? 0 : -1;
}

/* What cannot be looked at counts as there. */
static bool
jrnl_is_absent(const struct jrnl_folder *d, const char *path)
{
    return sys.faccessat(d->fd, path, F_OK, 0) != 0 && errno == ENOENT;
}

/* Begins to list the folder; NULL: errno.  libc allocates a DIR, and frees it
 * in closedir. */
static DIR *
jrnl_list(const struct jrnl_folder *d)
{
    int fd = sys.openat(d->fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *dir = fd < 0 ? NULL : sys.fdopendir(fd);

    if (fd >= 0 && dir == NULL) {
        int error = errno;
        (void)sys.close(fd);
        errno = error;
    }
    return dir;
}

/* The next file whose name ends like this.  NULL: no more, or errno != 0. */
static const char *
jrnl_list_next(DIR *dir, const char *suffix)
{
    struct dirent *e;
    size_t n = strlen(suffix);

    while (errno = 0, (e = sys.readdir(dir)) != NULL) {
        size_t len = strlen(e->d_name);
        if (len > n && len < JRNL_PATH &&
            memcmp(e->d_name + len - n, suffix, n) == 0)
            return e->d_name;
    }
    return NULL;
}

/* After a crash: removes files in the making, and finishes the rename of one
 * whose damaged original had already gone aside. */
static int
jrnl_tidy(const struct jrnl_folder *d)
{
    DIR *dir = jrnl_list(d);
    const char *fresh;
    int error;

    if (dir == NULL)
        return -1;
    while ((fresh = jrnl_list_next(dir, ".ydoc.new")) != NULL) {
        char path[JRNL_PATH], aside[JRNL_PATH + 16];
        (void)snprintf(path, sizeof path, "%s", fresh);
        path[strlen(path) - strlen(".new")] = '\0';
        (void)snprintf(aside, sizeof aside, "%s.damaged-1", path);
        if ((jrnl_is_absent(d, path) && !jrnl_is_absent(d, aside)
                 ? sys.renameat(d->fd, fresh, d->fd, path)
                 : sys.unlinkat(d->fd, fresh, 0)) != 0)
            break;
    }
    error = errno; /* 0: came to the end */
    (void)closedir(dir);
    errno = error;
    return error != 0 ? -1 : jrnl_sync_folder(d->fd);
}

/* Makes a folder and sees to it that a power cut does not take it away. */
static int
jrnl_folder_make(const char *path)
{
    int fd, up;

    if (sys.mkdirat(AT_FDCWD, path, 0700) != 0)
        return -1;
    fd = sys.openat(AT_FDCWD, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    up = fd < 0 ? -1
                : sys.openat(fd, "..", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (up >= 0) { /* who may not read it cannot sync it */
        (void)jrnl_sync_folder(up);
        (void)sys.close(up);
    }
    return fd;
}

static void
jrnl_folder_close(struct jrnl_folder *d)
{
    if (d->lock >= 0)
        (void)sys.close(d->lock);
    if (d->fd >= 0)
        (void)sys.close(d->fd);
    *d = (struct jrnl_folder){ -1, -1 };
}

/* Makes a folder that is open ours to write in, and tidies it. */
static int
jrnl_folder_lock(struct jrnl_folder *d)
{
    int error;

    d->lock = sys.openat(d->fd, "lock", O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC,
                         0600);
    if (d->lock >= 0 && sys.flock(d->lock, LOCK_EX | LOCK_NB) == 0 &&
        jrnl_tidy(d) == 0)
        return 0;
    error = errno;
    if (d->lock >= 0)
        (void)sys.close(d->lock);
    d->lock = -1;
    errno = error;
    return -1;
}

/* Opens the folder of all files once; from then on nobody needs its path.  To
 * write: it is made if absent, locked and tidied.  Only to read, beside a
 * server that runs: nothing is changed. */
static int
jrnl_folder_open(struct jrnl_folder *d, const char *path, bool to_write)
{
    int error;

    d->lock = -1;
    d->fd = sys.openat(AT_FDCWD, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (d->fd < 0 && errno == ENOENT && to_write)
        d->fd = jrnl_folder_make(path);
    if (d->fd >= 0 && (!to_write || jrnl_folder_lock(d) == 0))
        return 0;
    error = errno;
    log_say(LOG_LEVEL_ERROR, "data folder %.255s: %s%s", path, strerror(error),
            jrnl_advice(error));
    jrnl_folder_close(d);
    errno = error;
    return -1;
}

/* ----- reading ---------------------------------------------------------- */

/* The n bytes of the file at `at`; they stand until the next call.  NULL: they
 * cannot be read, errno. */
static const uint8_t *
jrnl_peek(struct jrnl_reader *r, uint64_t at, size_t n)
{
    size_t want;

    must(n <= r->lent_len && at <= r->size && n <= r->size - at);
    if (at >= r->from && at + n <= r->from + r->have)
        return r->lent + (at - r->from);
    want = r->size - at < r->lent_len ? (size_t)(r->size - at) : r->lent_len;
    r->from = at;
    r->have = 0;
    while (r->have < want) {
        ssize_t got = sys.pread(r->fd, r->lent + r->have, want - r->have,
                                (off_t)(at + r->have));
        if (got < 0 && errno == EINTR)
            continue;
        if (got == 0)
            errno = ESTALE;
        if (got <= 0)
            return NULL;
        r->have += (size_t)got;
    }
    return r->lent;
}

/* Is there a good record at `at`?  JRNL_DAMAGE: no, and rec->to says from where
 * on there may be one. */
static enum jrnl_found
jrnl_judge(struct jrnl_reader *r, uint64_t at, struct jrnl_record *rec)
{
    const uint8_t *bytes;
    uint32_t len, wanted, crc = 0;

    *rec = (struct jrnl_record){ .from = at, .to = at + 1 };
    if (r->size - at < JRNL_HEAD)
        return JRNL_DAMAGE;
    bytes = jrnl_peek(r, at, JRNL_HEAD);
    if (bytes == NULL)
        return JRNL_ERROR;
    len = jrnl_get32(bytes + 4);
    if (memcmp(bytes, JRNL_MARK, 3) != 0 ||
        jrnl_get32(bytes + 12) != jrnl_head_crc(at, bytes) ||
        len > r->size - at - JRNL_HEAD)
        return JRNL_DAMAGE;
    rec->kind = bytes[3];
    rec->to = at + JRNL_HEAD + len;
    rec->payload = span_of(len == 0 ? bytes + JRNL_HEAD : NULL, 0);
    wanted = jrnl_get32(bytes + 8);
    for (at += JRNL_HEAD; at < rec->to;) {
        size_t n = rec->to - at < r->lent_len ? (size_t)(rec->to - at)
                                              : r->lent_len;
        bytes = jrnl_peek(r, at, n);
        if (bytes == NULL)
            return JRNL_ERROR;
        crc = jrnl_crc(crc, bytes, n);
        if (n == len)
            rec->payload = span_of(bytes, n);
        at += n;
    }
    return crc == wanted ? JRNL_RECORD : JRNL_DAMAGE;
}

/* Moves *at on to a byte that may begin a mark, or to the end. */
static int
jrnl_seek(struct jrnl_reader *r, uint64_t *at)
{
    while (*at < r->size) {
        struct span s;
        const uint8_t *hit;
        s.at = jrnl_peek(r, *at, 1);
        if (s.at == NULL)
            return -1;
        s.end = r->lent + r->have;
        hit = span_find(s, (uint8_t)JRNL_MARK[0]);
        *at += (uint64_t)(hit - s.at);
        if (hit < s.end)
            return 0;
    }
    return 0;
}

/* What comes next in a file.  Payloads stand until the next call, or, if the
 * memory lent holds the whole file, as long as that memory. */
static enum jrnl_found
jrnl_next(struct jrnl_reader *r, struct jrnl_record *rec)
{
    uint64_t at = r->at;
    enum jrnl_found found = JRNL_END;

    while (at < r->size) {
        found = jrnl_judge(r, at, rec);
        if (found == JRNL_RECORD && at > r->at) {
            *rec = (struct jrnl_record){ .from = r->at, .to = at };
            r->damages++;
            r->damaged += at - r->at;
            r->at = at; /* and there it is found again */
            return JRNL_DAMAGE;
        }
        if (found == JRNL_DAMAGE && rec->to > at + 1) {
            rec->from = r->at; /* its head is good, so it was written whole */
            r->damages++;
            r->damaged += rec->to - r->at;
            r->at = rec->to;
            return JRNL_DAMAGE;
        }
        at = rec->to;
        if (found == JRNL_RECORD) {
            r->at = at;
            if (rec->kind == JRNL_SNAPSHOT || rec->kind == JRNL_UPDATES)
                return JRNL_RECORD;
            r->unknown += rec->kind != JRNL_TRIAL;
        } else if (found == JRNL_ERROR || jrnl_seek(r, &at) != 0) {
            if (!span_is_empty(r->asked))
                (void)jrnl_fail(r->asked, "cannot be read");
            return JRNL_ERROR;
        }
    }
    *rec = (struct jrnl_record){ .from = r->at, .to = r->size };
    r->ended = true;
    return JRNL_END;
}

/* Begins to read a file of that size through lent memory, JRNL_LENT_MIN bytes
 * at least.  If that is as long as the file, it is read at once. */
static int
jrnl_read_head(struct jrnl_reader *r, int fd, uint64_t size, void *lent,
               size_t lent_len)
{
    size_t n = size < 14 + UINT8_MAX ? (size_t)size : 14 + UINT8_MAX, end;
    const uint8_t *head;

    must(lent_len >= JRNL_LENT_MIN);
    *r = (struct jrnl_reader){ .fd = fd, .headless = true, .lent = lent,
                               .lent_len = lent_len, .size = size };
    head = jrnl_peek(r, 0, n);
    if (head == NULL)
        return -1;
    if (n < 14 || memcmp(head, JRNL_MAGIC, 8) != 0)
        return 0;
    end = 10u + head[9];
    if (end + 4 > n || jrnl_get32(head + end) != jrnl_crc(0, head, end))
        return 0;
    r->headless = false;
    r->version = head[8];
    r->name_len = head[9];
    memcpy(r->name, head + 10, r->name_len);
    r->at = end + 4;
    return 0;
}

static struct span
jrnl_reader_name(const struct jrnl_reader *r)
{
    return span_of(r->name, r->name_len);
}

/* The same for a document's file.  Its head may be damaged; but if it is good,
 * it must be of this version and this document. */
static int
jrnl_read(struct jrnl_reader *r, const struct jrnl_file *f, void *lent,
          size_t lent_len)
{
    int done = jrnl_read_head(r, f->fd, f->end, lent, lent_len);
    bool known = r->headless || r->version == JRNL_VERSION;

    r->asked = f->name;
    if (done == 0 &&
        (!known || (!r->headless &&
                    !span_equals(jrnl_reader_name(r), f->name)))) {
        errno = known ? EEXIST : EPROTONOSUPPORT;
        done = -1;
    }
    return done == 0 ? 0 : jrnl_fail(f->name, "cannot be read");
}

/* ----- files ------------------------------------------------------------ */

static void
jrnl_close(struct jrnl_file *f)
{
    if (f->fd >= 0)
        (void)sys.close(f->fd);
    f->fd = -1;
}

/* Opens a regular file of the folder and says its size; -1: errno. */
static int
jrnl_open_path(const struct jrnl_folder *d, const char *path, int how,
               uint64_t *size)
{
    int fd = sys.openat(d->fd, path,
                        how | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    struct stat st;
    int error = EINVAL;

    if (fd < 0)
        return -1;
    if (sys.fstat(fd, &st) != 0) {
        error = errno;
    } else if (S_ISREG(st.st_mode)) {
        *size = (uint64_t)st.st_size;
        return fd;
    }
    (void)sys.close(fd);
    errno = error;
    return -1;
}

/* Opens a document's file to read it with jrnl_read, and to write behind that
 * after jrnl_resume.  On a disk that lets itself only be read, the file comes
 * out broken.  -1: logged, but for ENOENT, the document has none. */
static int
jrnl_open(const struct jrnl_folder *d, struct span name, bool to_write,
          struct jrnl_file *f)
{
    char path[JRNL_PATH];

    *f = (struct jrnl_file){ .fd = -1, .broken = !to_write, .name = name };
    f->fd = jrnl_open_path(d, jrnl_path(name, "", path),
                           to_write ? O_RDWR : O_RDONLY, &f->end);
    if (f->fd < 0 && to_write && (errno == EROFS || errno == EACCES)) {
        (void)jrnl_fail(name, "can only be read");
        f->broken = true;
        f->fd = jrnl_open_path(d, path, O_RDONLY, &f->end);
    }
    if (f->fd >= 0)
        return 0;
    return errno == ENOENT ? -1 : jrnl_fail(name, "cannot be opened");
}

/* After a reader has come to the end: says what was wrong, and cuts a torn tail
 * so that records follow records.  -1: it cannot be cut; the file is broken,
 * what was read from it is good. */
static int
jrnl_resume(struct jrnl_file *f, const struct jrnl_reader *r)
{
    uint64_t torn = r->size - r->at;
    char path[JRNL_PATH];

    must(r->ended && r->fd == f->fd);
    f->end = r->at;
    f->synced = 0; /* it may still be on its way since before a crash */
    f->damaged = r->damages > 0 || (r->headless && r->size > 0);
    f->broken |= r->headless;
    if (f->damaged || r->unknown > 0 || torn > 0)
        log_say(f->damaged ? LOG_LEVEL_ERROR : LOG_LEVEL_WARNING,
                "journal %s: read, but for %u damaged places (%" PRIu64
                " bytes%s), %u records of unknown kinds and a last write cut "
                "short (%" PRIu64 " bytes)",
                jrnl_path(f->name, "", path), r->damages, r->damaged,
                r->headless ? ", also its head" : "", r->unknown, torn);
    if (f->broken || torn == 0 || sys.ftruncate(f->fd, (off_t)f->end) == 0)
        return 0;
    f->broken = true;
    return jrnl_fail(f->name, "its torn tail cannot be cut off");
}

/* One write at the end: all of it, or none and -1. */
static ssize_t
jrnl_write(struct jrnl_file *f, const struct iovec *parts, int count)
{
    uint64_t want = 0;
    ssize_t done = -1;
    int error;

    for (int i = 0; i < count; i++)
        want += parts[i].iov_len;
    errno = EFBIG;
    if (want <= JRNL_FILE_MAX && f->end + want <= JRNL_FILE_MAX)
        do
            done = sys.pwritev(f->fd, parts, count, (off_t)f->end);
        while (done < 0 && errno == EINTR);
    if (done >= 0 && (uint64_t)done == want) {
        f->end += want;
        return done;
    }
    error = done < 0 ? errno : ENOSPC; /* the next byte would have told */
    f->broken = sys.ftruncate(f->fd, (off_t)f->end) != 0;
    errno = error;
    if (!f->refused)
        (void)jrnl_fail(f->name, f->broken ? "cannot be written, nor cut back"
                                           : "cannot be written");
    f->refused = true;
    return -1;
}

/* Appends a record; the bytes it took.  -1: the file is as before, or broken;
 * who tries again and again is heard once. */
static ssize_t
jrnl_append(struct jrnl_file *f, enum jrnl_kind kind, struct span payload)
{
    uint8_t head[JRNL_HEAD];
    struct out o = out_over(head, sizeof head);
    struct iovec parts[2] = { { head, sizeof head },
                              { (void *)payload.at, span_len(payload) } };

    if (f->broken) {
        errno = EIO;
        return -1;
    }
    out_bytes(&o, JRNL_MARK, 3);
    out_u8(&o, (uint8_t)kind);
    jrnl_put32(&o, (uint32_t)span_len(payload));
    jrnl_put32(&o, jrnl_crc(0, payload.at, span_len(payload)));
    jrnl_put32(&o, jrnl_head_crc(f->end, head));
    must(o.at == o.end);
    return jrnl_write(f, parts, 2);
}

/* Waits until the disk has all of a file up to copy->end; may run on another
 * thread, on a copy.  A file that somebody deleted is an error: nobody would
 * find again what is written to it. */
static int
jrnl_sync(const struct jrnl_file *copy)
{
    struct stat st = { .st_nlink = 1 };
    int done;

    do
        done = sys.fdatasync(copy->fd);
    while (done != 0 && errno == EINTR);
    if (done == 0)
        done = sys.fstat(copy->fd, &st);
    if (done == 0 && st.st_nlink == 0) {
        errno = ENOENT;
        done = -1;
    }
    return done == 0 ? 0
                     : jrnl_fail(copy->name, "may not have reached the disk, "
                                             "so it is written anew");
}

/* What jrnl_sync of a copy with that end came to. */
static void
jrnl_synced(struct jrnl_file *f, uint64_t end, int done)
{
    must(end <= f->end);
    f->broken |= done != 0;
    f->refused &= done != 0;
    if (done == 0 && end > f->synced)
        f->synced = end;
}

/* ----- a new file ------------------------------------------------------- */

/* Throws away a file in the making. */
static void
jrnl_discard(const struct jrnl_folder *d, struct jrnl_file *f)
{
    char fresh[JRNL_PATH];

    jrnl_close(f);
    (void)sys.unlinkat(d->fd, jrnl_path(f->name, ".new", fresh), 0);
}

/* Begins a file beside a document's present one, if there is one; the bytes it
 * took.  f comes closed and keeps its `refused`. */
static ssize_t
jrnl_create(const struct jrnl_folder *d, struct span name, struct jrnl_file *f)
{
    uint8_t head[14 + UINT8_MAX];
    struct out o = out_over(head, sizeof head);
    char fresh[JRNL_PATH];
    struct iovec all = { head, 0 };

    must(f->fd < 0);
    *f = (struct jrnl_file){ .fd = -1, .refused = f->refused, .name = name };
    (void)sys.unlinkat(d->fd, jrnl_path(name, ".new", fresh), 0);
    f->fd = sys.openat(d->fd, fresh, O_RDWR | O_CREAT | O_TRUNC | O_NOFOLLOW |
                                         O_CLOEXEC, 0600);
    if (f->fd < 0) {
        if (!f->refused)
            (void)jrnl_fail(name, "cannot be written anew");
        f->refused = true;
        return -1;
    }
    out_bytes(&o, JRNL_MAGIC, 8);
    out_u8(&o, JRNL_VERSION);
    out_u8(&o, (uint8_t)span_len(name));
    out_span(&o, name);
    jrnl_put32(&o, jrnl_crc(0, head, (size_t)(o.at - head)));
    all.iov_len = (size_t)(o.at - head);
    if (jrnl_write(f, &all, 1) > 0)
        return (ssize_t)all.iov_len;
    jrnl_discard(d, f);
    return -1;
}

/* Puts a new file in the place of the old one, or gives the first one its
 * name.  Only the folder's sync makes that last. */
static int
jrnl_rename(const struct jrnl_folder *d, const struct jrnl_file *f,
            bool keep_old)
{
    char fresh[JRNL_PATH], path[JRNL_PATH], aside[JRNL_PATH];
    char suffix[] = ".damaged-1", *number = suffix + sizeof suffix - 2;
    int error;

    (void)jrnl_path(f->name, ".new", fresh);
    (void)jrnl_path(f->name, "", path);
    if (keep_old) { /* under the first name that is free, or the last */
        while (!jrnl_is_absent(d, jrnl_path(f->name, suffix, aside)) &&
               *number < '0' + JRNL_ASIDE)
            ++*number;
        if (sys.renameat(d->fd, path, d->fd, aside) != 0 && errno != ENOENT)
            return jrnl_fail(f->name, "cannot be kept aside");
    }
    if (sys.renameat(d->fd, fresh, d->fd, path) != 0) {
        error = errno;
        if (keep_old)
            (void)sys.renameat(d->fd, aside, d->fd, path);
        errno = error;
        return jrnl_fail(f->name, "cannot be replaced");
    }
    return 0;
}

/* The same with a file that is complete and synced, for good; may run on
 * another thread, on a copy.  Records appended to the old file meanwhile are
 * lost with it, so the owner appends to the new one as well, or waits.  -1:
 * it is not certain which one a power cut would leave; use neither. */
static int
jrnl_install(const struct jrnl_folder *d, const struct jrnl_file *f,
             bool keep_old)
{
    if (jrnl_rename(d, f, keep_old) != 0)
        return -1;
    if (jrnl_sync_folder(d->fd) != 0)
        return jrnl_fail(f->name, "may come back as it was before");
    return 0;
}

/* Removes all there is of a document on disk, its damaged originals as well.
 * The file goes last: as long as it is there, so is the document. */
static int
jrnl_delete(const struct jrnl_folder *d, struct span name)
{
    static const char suffixes[][12] = { ".damaged-1", ".damaged-2",
                                         ".damaged-3", ".new", "" };
    char path[JRNL_PATH];

    for (size_t i = 0; i < sizeof suffixes / sizeof *suffixes; i++)
        if (sys.unlinkat(d->fd, jrnl_path(name, suffixes[i], path), 0) != 0 &&
            errno != ENOENT)
            return jrnl_fail(name, "cannot be deleted");
    return jrnl_sync_folder(d->fd) == 0
               ? 0
               : jrnl_fail(name, "may come back after a power cut");
}

/* Which document's file is it?  1: *name's.  0: a stranger's, or it is gone.
 * -1: errno.  What its head says counts, if that is good; but a document is
 * looked for under its own name only: a file with another one is a stranger. */
static int
jrnl_whose(const struct jrnl_folder *d, const char *file, uint64_t *bytes,
           struct out *name)
{
    uint8_t lent[JRNL_LENT_MIN];
    char path[JRNL_PATH];
    struct jrnl_reader r;
    struct span found;
    int fd = jrnl_open_path(d, file, O_RDONLY, bytes), done, error;

    if (fd < 0)
        return errno == ENOENT || errno == ELOOP || errno == EINVAL ? 0 : -1;
    done = jrnl_read_head(&r, fd, *bytes, lent, sizeof lent);
    error = errno;
    (void)sys.close(fd);
    errno = error;
    if (done != 0)
        return -1;
    if (r.headless)
        return jrnl_unescape(file, name);
    found = jrnl_reader_name(&r);
    if (span_is_empty(found) || span_len(found) > COLLABD_NAME_MAX ||
        strcmp(jrnl_path(found, "", path), file) != 0)
        return 0;
    out_span(name, found);
    return !name->full;
}

/* ----- a folder looked at from outside ------------------------------------
 * For --fsck and --list.  Nothing is written and no tail is cut, so it may be
 * done beside a server that runs; what that is just writing may then look like
 * a torn tail. */

#define JRNL_LOOK 65536 /* bytes of a file that are read at once */

/* What there is in a file. */
struct jrnl_sight {
    uint64_t bytes;
    unsigned records, damages;
    bool torn;     /* its last write is not whole */
    bool misnamed; /* another document's file stands under this name */
};

/* Reads a file of the folder to its end.  What is wrong with it is told to
 * `to`, if that is not NULL.  -1: errno. */
static int
jrnl_look(const struct jrnl_folder *d, const char *file,
          struct jrnl_sight *sight, FILE *to)
{
    static const char *const what[] = { "torn tail", "", "damage" };
    uint8_t lent[JRNL_LOOK];
    char path[JRNL_PATH];
    struct jrnl_reader r;
    struct jrnl_record rec = { 0 };
    enum jrnl_found found = JRNL_ERROR;
    int fd, error;

    *sight = (struct jrnl_sight){ 0 };
    fd = jrnl_open_path(d, file, O_RDONLY, &sight->bytes);
    if (fd < 0)
        return -1;
    if (jrnl_read_head(&r, fd, sight->bytes, lent, sizeof lent) == 0) {
        errno = EPROTONOSUPPORT;
        while (r.headless || r.version == JRNL_VERSION) {
            found = jrnl_next(&r, &rec);
            if (found == JRNL_RECORD)
                sight->records++;
            else if (found != JRNL_ERROR && rec.from < rec.to && to != NULL)
                (void)fprintf(to, "%s: %s, bytes %" PRIu64 " to %" PRIu64 "\n",
                              file, what[found], rec.from, rec.to - 1);
            if (found == JRNL_END || found == JRNL_ERROR)
                break;
        }
    }
    error = errno;
    (void)sys.close(fd);
    errno = error;
    if (found == JRNL_ERROR)
        return -1;
    sight->damages = r.damages + r.headless;
    sight->torn = rec.from < rec.to;
    sight->misnamed =
        !r.headless &&
        (r.name_len == 0 || r.name_len > COLLABD_NAME_MAX ||
         strcmp(jrnl_path(jrnl_reader_name(&r), "", path), file) != 0);
    return 0;
}

/* Ends a listing; 0, or 1 if it did not come to its end. */
static int
jrnl_look_end(struct jrnl_folder *d, DIR *dir, const char *path)
{
    int error = errno;

    if (dir != NULL)
        (void)closedir(dir);
    jrnl_folder_close(d);
    if (error != 0)
        log_say(LOG_LEVEL_ERROR, "data folder %.255s: %s", path,
                strerror(error));
    return error != 0;
}

/* `collabd --fsck DIR`: a line for each damage and each file.  The exit code is
 * 1 if something is missing or cannot be read. */
static int
jrnl_fsck(FILE *to, const char *path)
{
    struct jrnl_folder d;
    struct jrnl_sight sight;
    const char *file;
    DIR *dir;
    int bad = 0;

    if (jrnl_folder_open(&d, path, false) != 0)
        return 1;
    dir = jrnl_list(&d);
    while (dir != NULL && (file = jrnl_list_next(dir, ".ydoc")) != NULL) {
        if (jrnl_look(&d, file, &sight, to) != 0) {
            (void)fprintf(to, "%s: %s%s\n", file, strerror(errno),
                          jrnl_advice(errno));
            bad = 1;
            continue;
        }
        (void)fprintf(to, "%s: %u records, %" PRIu64 " bytes%s%s\n", file,
                      sight.records, sight.bytes,
                      sight.damages > 0 ? ", damaged" : "",
                      sight.misnamed ? ", another document's file" : "");
        bad |= sight.damages > 0 || sight.misnamed || sight.torn;
    }
    return jrnl_look_end(&d, dir, path) | bad;
}

/* `collabd --list DIR`: name, bytes and records of each document, with tabs
 * between; a name has no control characters. */
static int
jrnl_print_list(FILE *to, const char *path)
{
    struct jrnl_folder d;
    struct jrnl_sight sight;
    const char *file;
    DIR *dir;
    int bad = 0;

    if (jrnl_folder_open(&d, path, false) != 0)
        return 1;
    dir = jrnl_list(&d);
    while (dir != NULL && (file = jrnl_list_next(dir, ".ydoc")) != NULL) {
        uint8_t name[COLLABD_NAME_MAX];
        struct out o = out_over(name, sizeof name);
        int known = jrnl_whose(&d, file, &sight.bytes, &o);
        if (known == 0)
            continue;
        if (known < 0 || jrnl_look(&d, file, &sight, NULL) != 0) {
            log_say(LOG_LEVEL_ERROR, "journal %s: %s%s", file, strerror(errno),
                    jrnl_advice(errno));
            bad = 1;
            continue;
        }
        (void)fprintf(to, "%.*s\t%" PRIu64 "\t%u\n", (int)(o.at - name),
                      (const char *)name, sight.bytes, sight.records);
    }
    return jrnl_look_end(&d, dir, path) | bad;
}
/* ===== 9  Tables ===========================================================
 * Every struct of the program, its invariants, and where it lives.
 *
 * All of it stands in one allocation made at start, zeroed and touched only
 * when used.  Things that come and go live in slots with a free list; slots
 * never used yet are taken in order, so that idle memory stays untouched.
 * What outlives a turn holds a slot number with its generation (conn_id), not
 * a pointer.
 * ========================================================================= */

/* Every way a connection ends: code on the wire, log text, counter. */
/* clang-format off */
#define CLOSE_REASONS(X) \
    X(DONE,       0,    "finished") \
    X(PEER,       0,    "closed by the peer") \
    X(GONE,       0,    "left without a Close") \
    X(SHUTDOWN,   1001, "server is shutting down") \
    X(PROTOCOL,   1002, "broke the WebSocket protocol") \
    X(NOT_UTF8,   1007, "text is not UTF-8") \
    X(TOO_BIG,    1009, "message is longer than --max-message") \
    X(SLOW,       1013, "fell behind its room") \
    X(NO_MEMORY,  1013, "waited too long for memory") \
    X(UNAUTHORIZED, 4401, "token missing or unknown") \
    X(FORBIDDEN,  4403, "the token does not allow this") \
    X(READ_ONLY,  4403, "read only") \
    X(SILENT,     0,    "sent nothing for too long") \
    X(TIMEOUT,    1008, "did not finish in time") \
    X(TLS,        0,    "TLS failed") \
    X(MALFORMED,  4400, "malformed message") \
    X(NO_NAME,    4404, "no document can have this name") \
    X(DOC_MESSAGE, 4413, "message is longer than --max-message") \
    X(CANNOT_OPEN, 4513, "the document cannot be opened now")
/* clang-format on */

enum close_reason {
#define X(name, code, text) CLOSE_##name,
    CLOSE_REASONS(X)
#undef X
    CLOSE_REASON_COUNT
};

static const struct {
    char name[14];
    uint16_t code;
    char text[40];
} close_reasons[] = {
#define X(name, code, text) { #name, code, text },
    CLOSE_REASONS(X)
#undef X
};

/* Pools that can be dry. */
enum pool {
    POOL_REQUESTS = 1,
    POOL_RECEIVERS = 2,
    POOL_CHUNKS = 4,
    POOL_DOCUMENTS = 8 /* or what else a document's member waits for */
};

/* ----- message memory ---------------------------------------------------
 * Chunks of COLLABD_CHUNK bytes in chains: a message grows by chunks while it
 * is assembled, and the chain becomes a room's shared block as it is.  Chains
 * cannot fragment.  `next` says the following chunk; NONE32 ends. */

struct chunks {
    uint8_t *bytes;
    uint32_t *next;
    uint32_t count, fresh, free, used;
};

/* ----- HTTP requests ----------------------------------------------------- */

struct request {
    uint16_t conn; /* who holds it; NONE: free, then .next */
    uint16_t next;
    uint32_t head_len;             /* bytes in head */
    uint32_t reply_at, reply_end;  /* what of reply is still to be sent */
    int file;                      /* what follows it, or -1 */
    uint64_t file_at, file_end;
    uint8_t head[COLLABD_CHUNK];
    uint8_t reply[COLLABD_REPLY];
};

/* ----- pieces of WebSocket frames ----------------------------------------- */

enum ws_kind {
    WS_NOTHING, /* more input is needed */
    WS_DATA,    /* a piece of a message */
    WS_PART,    /* a piece of a control frame, kept until it is whole */
    WS_PING,
    WS_PONG,
    WS_CLOSE,   /* .code, 1005 if the peer gave none */
    WS_BAD      /* .why */
};

struct ws_piece {
    enum ws_kind kind;
    struct span data; /* in the receiver, until it is asked again */
    uint8_t opcode;   /* of the message */
    bool first, last; /* of the message's pieces */
    uint16_t code;
    enum close_reason why;
};

/* ----- receivers: borrowed wslay contexts -------------------------------
 *   fed   bytes the callback gave to wslay
 *   used  bytes of the frames that came out whole
 *   invariant: with fed == used the context is empty and fit for anyone */

struct receiver {
    wslay_frame_context_ptr wslay; /* its user_data is this receiver */
    struct collabd *server;
    uint64_t fed, used;
    uint64_t frame_got;      /* payload bytes of the frame at hand */
    struct ws_piece waiting; /* DATA: in wslay's buffer, found no memory */
    uint16_t conn;           /* who holds it; NONE: free, then .next */
    uint16_t next;
    uint8_t reads_left;      /* this turn */
    bool ended;              /* the stream has ended, or failed */
    uint8_t control_len;
    uint8_t control[125];    /* payload of the control frame at hand */
};

/* ----- TLS ---------------------------------------------------------------- */

#if COLLABD_TLS
/* One certificate with all that handshakes need.  Connections count it; a
 * reload makes the next. */
struct tls_config {
    uint32_t refs; /* connections, plus one while it is the current one */
    mbedtls_ssl_config conf;
    mbedtls_x509_crt chain;
    mbedtls_pk_context key;
#if defined(MBEDTLS_SSL_TICKET_C) && defined(MBEDTLS_SSL_SESSION_TICKETS)
    mbedtls_ssl_ticket_context tickets;
#endif
};

struct tls {
    struct work work; /* steps of the handshake; first, so that it is us */
    mbedtls_ssl_context ssl;
    size_t owed; /* length of a write that mbedTLS took but could not send */
    int fd;
    int answer;    /* of the last step */
    uint16_t conn; /* NONE: free, then .next */
    uint16_t next;
    uint8_t config;
    bool begun, done; /* the handshake */
    bool ready;       /* its next step has what it waits for */
};
#endif

/* ----- connections --------------------------------------------------------
 *   HANDSHAKE ─▶ HEAD ─▶ REPLY ─▶ HEAD (keep-alive)
 *                  │       └────▶ LINGER
 *                  └─▶ OPEN ─▶ CLOSING ─▶ LINGER ─▶ GONE ─▶ (free)
 *
 *   invariants   1  in_room only in OPEN and CLOSING
 *                2  a receiver only from OPEN on; a request in HEAD, REPLY, or
 *                   in OPEN while bytes behind the head are unread
 *                3  why is set exactly from CLOSING or LINGER on */

enum conn_state {
    CONN_FREE,
    CONN_HANDSHAKE, /* TLS; until --request-timeout */
    CONN_HEAD,      /* a request head; until --request-timeout */
    CONN_REPLY,     /* the reply goes out; until it stood still for long */
    CONN_OPEN,      /* WebSocket; pinged, until --dead-after */
    CONN_CLOSING,   /* Close goes out behind what is begun; 2 s */
    CONN_LINGER,    /* our side is shut; input is thrown away; 2 s */
    CONN_GONE       /* freed at the end of the turn */
};

enum access_right { RIGHT_NONE, RIGHT_READ, RIGHT_WRITE, RIGHT_ADMIN };

/* A connection's place in a room: its cursor is an entry and how much of that
 * entry's frame was sent. */
struct member {
    uint64_t entry;
    uint64_t own;     /* charges of its own entries from `entry` on */
    int64_t holds_since; /* ms: the minute in which held_ms counts */
    int64_t moved_ms; /* when its cursor last moved, or it had no lag */
    uint32_t off;     /* bytes of the entry's frame that were sent */
    uint16_t room;    /* NONE: in none */
    uint16_t prev, next; /* of the room's members, by slot */
    uint16_t held_ms; /* for so long this minute it slowed the room, */
    uint16_t burst_ms; /* and for so long when it was one of few */
    bool echo;        /* wants its own messages too */
    bool overtaken;   /* the ring no longer has what it was to get next */
    bool outside;     /* in its first sync: the ring is not yet for it */
    bool unkept;      /* something it sent was taken back */
    bool lagging;     /* counted when the room was last judged */
};

/* A message being assembled from frames or pieces. */
struct assembly {
    uint32_t first, last; /* chunks; NONE32: none yet */
    uint32_t len;
    struct utf8 utf8;
    uint8_t opcode; /* of its first frame; 0: no message has begun */
};

struct conn {
    struct conn_id id;
    int fd;
    enum conn_state state;
    enum close_reason why;
    uint16_t next;     /* free list, or the list of those to flush */
    uint16_t poll;     /* place in the poll set */
    uint16_t receiver; /* NONE: none */
    uint16_t request;  /* NONE: none */
    uint16_t tls;      /* NONE: plain */
    uint8_t listener;
    uint8_t right;     /* enum access_right, on its room */
    bool blocked;      /* the socket took less than we had */
    bool flushing;     /* in the list of those to flush */
    bool busy;         /* a thread has it, and its socket */
    bool more;         /* input that poll() does not know of */
    bool starved;      /* waits, unread, for a pool that is dry */
    bool proxied;      /* peer was told by a trusted proxy */
    bool close_after_reply;
    bool pinged;
    bool spoke_ws;     /* was OPEN once */
    uint16_t close_code;
    struct member in;
    struct assembly message;
    int64_t deadline;  /* ms, what it means depends on the state */
    int64_t heard_ms;  /* last byte from the peer */
    int64_t begun_ms;  /* when the message at hand began; 0: none is */
    int64_t credit_ms; /* when the credits were last raised */
    int64_t credit_messages, credit_bytes; /* in thousandths; below 0: debt */
    uint8_t peer[16];  /* IPv6, or IPv4 mapped; all zero: a unix socket */
    uint8_t direct[16]; /* who is connected: the peer, or its proxy */
    uint8_t token[16]; /* first half of the token's hash; zero: none */
    uint16_t control_at, control_end;
    uint8_t control[COLLABD_CONTROL]; /* whole control frames, or the 101 */
};

/* ----- documents -----------------------------------------------------------
 * A document is a snapshot and a tail.  The snapshot is one compact update and
 * never changes; the tail is a run of the updates accepted since:
 *
 *      snapshot            tail
 *     ┌────────────┐      ┌──────┬────┬───────┬────┬─────────┐
 *     │  one update│      │update│... │update │ ...│ update  │
 *     └────────────┘      └──────┴────┴───────┴────┴─────────┘
 *                          members have it ─┘shown    written┘ in the journal
 *
 *   invariants   1  shown <= written <= tail_len <= tail.size
 *                2  known, structs, ranges and clients say what snapshot and
 *                   whole tail hold together
 *                3  a room's ring ends where its tail does: both are taken
 *                   back to `shown` together */

/* Whole pages of document memory; .at NULL: none. */
struct extent {
    uint8_t *at;
    size_t size;
};

struct snapshot {
    struct extent memory;
    size_t len, deletes_at;
    uint16_t pins; /* members that are being sent it */
};

enum doc_state { DOC_CLOSED, DOC_OPEN };

/* One client's awareness: this head, then `room` bytes for its JSON. */
struct aware {
    uint64_t client, clock;
    int64_t seen_ms;
    struct conn_id owner;
    uint32_t len, room; /* of the JSON; len 0: it is gone */
};

enum doc_job_kind {
    DOC_JOB_SYNC,   /* the file */
    DOC_JOB_WRITE,  /* the snapshot into a new file */
    DOC_JOB_INSTALL, /* that, with what came meanwhile, in place of the old */
    DOC_JOB_MERGE   /* snapshot and tail into the next snapshot */
};

/* What the thread has in hand for a document, one thing at a time. */
struct doc_job {
    struct work work; /* first, so that it is us */
    enum doc_job_kind kind;
    bool busy;
    bool folder_dirty, keep_old;
    bool unsure; /* which of both files a power cut would leave */
    int answer;
    struct jrnl_folder folder;
    struct jrnl_file file;  /* a copy, to be synced */
    struct jrnl_file fresh; /* in the making */
    struct span snapshot;   /* pinned */
    struct extent buffer;
    size_t mark;            /* of the tail, that the sync covers */
    uint64_t base;          /* bytes of the new file behind which the log is */
    uint64_t entry;         /* of the room's ring, where the sync began */
    struct y_store store;   /* to be merged: the snapshot, pinned, and a copy */
    struct extent bench;    /* of the tail, in `buffer`; where it is done */
    struct y_result merged; /* of that */
    struct extent result;   /* the next snapshot, made by the thread, */
    uint64_t promised;      /* and what was counted for it beforehand */
    enum y_gc gc;
};

struct doc {
    enum doc_state state;
    struct snapshot now, before; /* before: superseded, but still pinned */
    struct extent tail;
    size_t tail_len, written, shown;
    uint64_t merged_entry; /* of the room's ring: the snapshot has all before */
    uint32_t merges;       /* so far */
    struct y_known known;
    struct extent known_memory;
    uint64_t structs, ranges, clients;
    struct extent aware; /* struct aware, back to back */
    size_t aware_len;
    struct jrnl_file file;
    uint64_t log_bytes;  /* of the file, behind its snapshot */
    int64_t edited_ms;   /* when the tail last grew */
    int64_t sync_at;     /* when the file is to be synced; 0: it is */
    int64_t merge_ms;    /* not before is the tail merged: it was in vain */
    int64_t compact_ms;  /* not before is the file written anew */
    int64_t retry_ms;    /* the disk failed: when to try again; 0: it did not */
    int64_t full_ms;     /* refused for want of room: when to look whether */
    struct y_report wanted; /* there is room for this now; 0: not refused */
    size_t wanted_len;
    bool folder_dirty;   /* a new file's name is not on the disk yet */
    bool aside;          /* it is damaged; the next compaction keeps it */
    struct doc_job job;
};

/* What a member of a document has beside a place in the room: a block of its
 * own, sent between frames of the ring, and a message that comes in pieces.
 * In an array beside the clients, touched only for members of documents. */
struct sync {
    uint8_t head[176];      /* small frames, or the head of a large one, */
    struct span body;       /* and what stands behind: in `memory`, or in a */
    struct extent memory;   /* snapshot that is pinned */
    size_t sent;            /* of head and body */
    uint8_t head_len;
    bool pins;              /* body, or `whole`, lies in a snapshot */
    bool joining;           /* this is one of several blocks of a long answer: */
    struct span whole;      /* all of it, in a snapshot or in `source` */
    struct extent source;
    struct y_pieces pieces; /* what comes next of it */
    bool first;             /* it is the answer that lets it into the ring, */
    uint64_t entry;         /* at this entry; should the ring have lost that, */
    struct extent sv;       /* this is what it has then */
    size_t sv_len;
    struct extent message;  /* comes in pieces */
    int64_t said_ms;        /* when it was last sent something */
    const char *refusal;    /* to be told when its block is gone; or NULL */
    bool refused;           /* it was told, and is to be asked again */
    bool ask;               /* a SyncStep1 is to be sent, */
    bool greet;             /* and all awareness */
    uint32_t patience;      /* for its first answer it waits until the document
                               was merged so often; 0: it did not ask yet */
    uint8_t strange;        /* messages of unknown types */
    uint8_t messages;       /* from it: 0, 1, 2 or more */
    uint64_t itself;        /* the id that it began with */
};

/* ----- rooms ---------------------------------------------------------------
 *   invariants   1  every member's cursor is >= ring.tail or it is overtaken
 *                2  slowest <= every cursor of a member not overtaken
 *                3  block_bytes is the sum over blocks still there
 *                4  empty rooms stand in the list of empty ones, oldest first */

enum room_kind { ROOM_CHANNEL, ROOM_DOCUMENT };

struct room {
    struct ring ring;
    enum room_kind kind;
    uint64_t flushed_pos;  /* ring.pos when last flushed */
    uint64_t slowest;      /* a lower bound of all cursors */
    uint64_t blocks_until; /* entry number behind the newest block */
    uint64_t block_bytes;
    int64_t flushed_ms, judged_ms;
    uint16_t first, count; /* members */
    uint16_t outside;      /* of those: in their first sync */
    uint16_t bucket_next;
    uint16_t prev, next;   /* of the list of empty rooms */
    uint16_t dirty_next;
    bool used;
    bool dirty;            /* in the list of rooms to flush */
    bool held;             /* by laggards: its publishers are not read */
    bool held_by_few;
    bool overtook;         /* some member is overtaken; the turn must act */
    uint8_t name_len;
    uint8_t name[COLLABD_NAME_MAX];
};

/* ----- the rest ------------------------------------------------------------ */

struct listener {
    int fd;
    bool tls, local;       /* local: a unix socket */
    int port;
    int64_t asleep_until;  /* out of the poll set until then */
    uint16_t refused;      /* since refused_ms, by the spare descriptor */
    int64_t refused_ms;
    char path[108];        /* local: to be removed at the end */
};

struct token {
    uint8_t hash[32];
    uint8_t right;
    uint8_t pattern_len;
    uint8_t pattern[COLLABD_NAME_MAX + 4];
};

struct tokens {
    bool on;
    unsigned count;
    struct token token[COLLABD_TOKENS];
};

/* clang-format off */
#define COUNTERS(X) \
    X(accepted,       "connections accepted") \
    X(refused,        "connections refused for want of slots or descriptors") \
    X(requests,       "HTTP requests, upgrades included") \
    X(upgrades,       "WebSocket upgrades") \
    X(messages_in,    "messages published") \
    X(messages_out,   "messages delivered whole to a socket or TLS record") \
    X(bytes_in,       "bytes received") \
    X(bytes_out,      "bytes sent") \
    X(sends,          "system calls and TLS writes that sent") \
    X(copied_bytes,   "payload bytes copied between receive and send") \
    X(assembled,      "messages that needed message memory") \
    X(pings,          "pings sent") \
    X(holds,          "times laggards stopped a room's publishers") \
    X(starved,        "times a client waited for a dry pool") \
    X(evicted,        "stalled clients closed because a pool was dry") \
    X(tls_handshakes, "TLS handshakes completed") \
    X(reloads,        "reloads that took effect") \
    X(reloads_failed, "reloads that changed nothing") \
    X(turns,          "turns of the loop") \
    X(doc_updates,    "updates accepted") \
    X(doc_bytes,      "bytes of updates accepted") \
    X(doc_known,      "updates that held nothing new") \
    X(doc_refused,    "updates refused: full, failing disk, read only") \
    X(doc_merges,     "tails merged into snapshots") \
    X(doc_compactions, "journal files written anew") \
    X(journal_bytes,  "bytes written to journal files") \
    X(journal_commits, "appends to journal files") \
    X(journal_syncs,  "syncs of journal files")
/* clang-format on */

struct counters {
#define X(name, help) uint64_t name;
    COUNTERS(X)
#undef X
    uint64_t closes[CLOSE_REASON_COUNT];
    uint64_t statuses[600 - 100];
    uint64_t turn_us_max, turn_us_sum;
    uint64_t doc_merge_us_max, doc_load_us_max, journal_write_us_max;
    int64_t journal_synced_ms;
};

struct collabd {
    struct cfg *cfg, *cfg_spare; /* of cfgs: now, and for the next reload */
    struct cfg cfgs[2];
    int argc;
    char *const *argv;
    struct sys_file config_file, tokens_file, cert_file, key_file;
    char file_names[4][NAME_MAX + 1]; /* of those files */
    int www; /* folder, or -1 */
    char hostname[65];

    struct conn *conns;
    struct pollfd *poll; /* listeners, connections, dense, then work.wake */
    uint16_t *poll_conn;
    unsigned conns_max, conns_fresh, conns_used, poll_used;
    uint16_t conns_free;
    uint16_t flush_first;
    unsigned more; /* connections with .more */
    unsigned gone; /* connections in CONN_GONE */

    struct room *rooms;
    uint8_t *ring_bytes;
    struct entry *ring_entries;
    uint16_t *buckets;
    uint16_t rooms_free;
    unsigned rooms_max, rooms_fresh, rooms_used, bucket_count;
    uint16_t empty_first, empty_last, dirty_first;
    uint64_t block_budget; /* bytes of blocks a room may hold */

    struct jrnl_folder data; /* .fd -1: documents live in memory */
    struct doc *docs;        /* beside the rooms */
    struct sync *syncs;      /* beside the clients */
    uint64_t doc_used;       /* bytes of all extents */
    uint64_t doc_reserve;    /* held back for the costliest merge */
    uint64_t budget_from;    /* journal_bytes when */
    int64_t budget_ms;       /* this hour began */
    char complaint[120];     /* what is malformed, for the Close */

    struct chunks chunks;

    struct request *requests;
    unsigned requests_max, requests_fresh, requests_used;
    uint16_t requests_free;

    struct receiver *receivers;
    unsigned receivers_max, receivers_used;
    uint16_t receivers_free;

#if COLLABD_TLS
    struct tls *tls;
    unsigned tls_max, tls_fresh, tls_used, handshakes;
    bool handshakes_ready;
    uint16_t tls_free;
    uint16_t handshake_at; /* TLS slot whose step was last */
    struct tls_config tls_configs[COLLABD_TLS_GENERATIONS];
    int tls_current; /* -1: none */
#endif

    struct listener listeners[COLLABD_LISTENERS];
    unsigned listener_count;
    int spare_fd;
    int notify_fd;
    int64_t watchdog_ms; /* half of what systemd allows; 0: none */
    int64_t watchdog_due;

    struct tokens *tokens, *tokens_spare;

    struct workers work;
    const sigset_t *wait_mask; /* while it waits; NULL: as it is */
    int64_t due; /* the earliest deadline of anything */
    bool stopping, stopped;
    int64_t stop_by;
    unsigned starving; /* enum pool bits: somebody waits for it */
    int64_t evicted_ms;
    struct log_quota close_quota, accept_quota;

    struct counters count;
    uint8_t page[COLLABD_REPLY - 1024]; /* a body while it is written */
    char cors[512]; /* CORS fields of the reply at hand */
    uint64_t slab_size;
    uint8_t *slab;
};

/* ----- layout --------------------------------------------------------------- */

static struct conn *
conn_at(struct collabd *s, uint16_t slot)
{
    must(slot < s->conns_fresh);
    return &s->conns[slot];
}

static struct conn *
conn_new(struct collabd *s)
{
    uint16_t slot = s->conns_free, gen;
    struct conn *c;

    if (slot != NONE) {
        c = &s->conns[slot];
        s->conns_free = c->next;
    } else if (s->conns_fresh < s->conns_max) {
        slot = (uint16_t)s->conns_fresh++;
        c = &s->conns[slot];
    } else {
        return NULL;
    }
    gen = c->id.gen;
    *c = (struct conn){ .id = { slot, gen }, .fd = -1, .next = NONE,
                        .poll = NONE, .receiver = NONE, .request = NONE,
                        .tls = NONE, .in = { .room = NONE },
                        .message = { NONE32, NONE32, 0, { 0, 0, 0 }, 0 } };
    s->conns_used++;
    return c;
}

static void
conn_free(struct collabd *s, struct conn *c)
{
    must(c->receiver == NONE && c->request == NONE && c->in.room == NONE);
    must(c->tls == NONE && c->message.first == NONE32 && !c->flushing);
    c->state = CONN_FREE;
    c->id.gen++;
    c->next = s->conns_free;
    s->conns_free = c->id.slot;
    s->conns_used--;
}

/* A chunk, or NONE32 if message memory is used up. */
static uint32_t
chunk_new(struct chunks *p)
{
    uint32_t i = p->free;

    if (i != NONE32)
        p->free = p->next[i];
    else if (p->fresh < p->count)
        i = p->fresh++;
    else
        return NONE32;
    p->next[i] = NONE32;
    p->used++;
    return i;
}

static void
chunk_free_chain(struct chunks *p, uint32_t first)
{
    while (first != NONE32) {
        uint32_t next = p->next[first];
        p->next[first] = p->free;
        p->free = first;
        p->used--;
        first = next;
    }
}

static uint8_t *
chunk_bytes(const struct chunks *p, uint32_t i)
{
    return p->bytes + (size_t)i * COLLABD_CHUNK;
}

static struct request *
request_new(struct collabd *s, struct conn *c)
{
    struct request *q;

    must(c->request == NONE);
    if (s->requests_free != NONE) {
        q = &s->requests[s->requests_free];
        s->requests_free = q->next;
    } else if (s->requests_fresh < s->requests_max) {
        q = &s->requests[s->requests_fresh++];
    } else {
        return NULL;
    }
    q->conn = c->id.slot;
    q->head_len = q->reply_at = q->reply_end = 0;
    q->file = -1;
    q->file_at = q->file_end = 0;
    c->request = (uint16_t)(q - s->requests);
    s->requests_used++;
    return q;
}

static void
request_free(struct collabd *s, struct conn *c)
{
    struct request *q;

    if (c->request == NONE)
        return;
    q = &s->requests[c->request];
    if (q->file >= 0)
        (void)sys.close(q->file);
    q->file = -1;
    q->conn = NONE;
    q->next = s->requests_free;
    s->requests_free = c->request;
    c->request = NONE;
    s->requests_used--;
}

/* All memory that the settings decide: field, name, count, bytes each. */
/* clang-format off */
#define MEMORY_TABLE(X) \
    X(conns,        "clients",           c->max_clients, sizeof(struct conn)) \
    X(poll,         "poll set",          c->max_clients + COLLABD_LISTENERS + 1, sizeof(struct pollfd)) \
    X(poll_conn,    "its owners",        c->max_clients + COLLABD_LISTENERS, sizeof(uint16_t)) \
    X(rooms,        "rooms",             c->max_rooms, sizeof(struct room)) \
    X(docs,         "documents",         c->max_rooms, sizeof(struct doc)) \
    X(syncs,        "their members",     c->max_clients, sizeof(struct sync)) \
    X(buckets,      "their hash table",  memory_buckets(c), sizeof(uint16_t)) \
    X(ring_bytes,   "rings",             c->max_rooms, c->ring) \
    X(ring_entries, "tables of entries", c->max_rooms, c->ring) \
    X(chunks.bytes, "message memory",    memory_chunks(c), COLLABD_CHUNK) \
    X(chunks.next,  "its chains",        memory_chunks(c), sizeof(uint32_t)) \
    X(requests,     "HTTP requests",     c->max_requests, sizeof(struct request)) \
    X(receivers,    "receivers",         c->receive_buffers, sizeof(struct receiver)) \
    X(tokens,       "token tables",      c->tokens != 0 ? 2u : 0u, sizeof(struct tokens)) \
    MEMORY_TABLE_TLS(X)
#if COLLABD_TLS
#define MEMORY_TABLE_TLS(X) \
    X(tls,          "TLS slots",         c->tls_listen.count > 0 ? c->max_tls : 0, sizeof(struct tls))
#else
#define MEMORY_TABLE_TLS(X)
#endif
/* clang-format on */

static uint64_t
memory_buckets(const struct cfg *c)
{
    uint64_t n = 1;

    while (n < c->max_rooms)
        n *= 2;
    return n;
}

static uint64_t
memory_chunks(const struct cfg *c)
{
    return (c->message_memory + COLLABD_CHUNK - 1) / COLLABD_CHUNK;
}

/* Every part begins on a cache line of its own. */
static uint64_t
memory_align(uint64_t n)
{
    return (n + 63) / 64 * 64;
}

/* What libraries take beside the table: wslay's contexts at start, mbedTLS for
 * each connection, as measured idle and during a handshake, and the stack of
 * the thread that it runs on. */
#define MEMORY_WSLAY 4256u
#define MEMORY_TLS_IDLE (40u << 10)
#define MEMORY_TLS_HANDSHAKE (15u << 10)

static uint64_t
memory_libraries(const struct cfg *c)
{
    uint64_t sum = c->receive_buffers * MEMORY_WSLAY;

    if (c->tls_listen.count > 0)
        sum += c->max_tls * MEMORY_TLS_IDLE +
               c->max_handshakes * MEMORY_TLS_HANDSHAKE + WORK_STACK;
    sum += (c->data != 0 ? 2 : 1) * WORK_STACK; /* merges, and the disk */
    return sum;
}

static uint64_t
memory_slab(const struct cfg *c)
{
    uint64_t sum = 64;

#define X(field, what, count, each) sum += memory_align((count) * (each));
    MEMORY_TABLE(X)
#undef X
    return sum;
}

static uint64_t
memory_sum(const struct cfg *c)
{
    return memory_slab(c) + c->doc_memory + sizeof(struct collabd) +
           memory_libraries(c);
}

static void
memory_show(const struct cfg *c, FILE *to)
{
    (void)fprintf(to, "%-20s %10s %10s %12s\n", "part", "count", "each",
                  "bytes");
#define X(field, what, count, each)                                          \
    (void)fprintf(to, "%-20s %10" PRIu64 " %10" PRIu64 " %12" PRIu64 "\n",   \
                  what, (uint64_t)(count), (uint64_t)(each),                 \
                  memory_align((count) * (each)));
    MEMORY_TABLE(X)
#undef X
    (void)fprintf(to, "%-20s %21s %12" PRIu64 "\n", "document memory", "",
                  c->doc_memory);
    (void)fprintf(to, "%-20s %10d %10zu %12zu\n", "the server itself", 1,
                  sizeof(struct collabd), sizeof(struct collabd) + 64);
    (void)fprintf(to, "%-20s %21s %12" PRIu64 "\n", "libraries, at most", "",
                  memory_libraries(c));
    (void)fprintf(to, "%-20s %21s %12" PRIu64 "\n", "sum", "", memory_sum(c));
    (void)fprintf(to,
                  "\nTaken at start, touched when used.  The kernel's socket "
                  "buffers come on top:\nat most 2 x %" PRIu64
                  " bytes each way for each client.\n",
                  c->socket_buffer);
}

/* Takes the memory and lays everything out.  False: there is not so much. */
static bool
memory_take(struct collabd *s, const struct cfg *c)
{
    uint64_t size = memory_slab(c);
    uint8_t *at;

    if (size > SIZE_MAX / 2)
        return false;
    s->slab = sys.calloc(1, (size_t)size);
    if (s->slab == NULL)
        return false;
    at = s->slab + (64 - (uintptr_t)s->slab % 64) % 64;
#define X(field, what, count, each)                                          \
    s->field = (count) > 0 ? (void *)at : NULL;                              \
    at += memory_align((count) * (each));
    MEMORY_TABLE(X)
#undef X
    must(at <= s->slab + size);
    s->slab_size = size;
    s->conns_max = (unsigned)c->max_clients;
    s->rooms_max = (unsigned)c->max_rooms;
    s->bucket_count = (unsigned)memory_buckets(c);
    s->requests_max = (unsigned)c->max_requests;
    s->receivers_max = (unsigned)c->receive_buffers;
    s->chunks.count = (uint32_t)memory_chunks(c);
    s->chunks.free = NONE32;
    /* what is new of an update may be a little longer than all of it */
    s->block_budget = c->message_memory / 4 > c->max_message + 64
                          ? c->message_memory / 4
                          : c->max_message + 64;
    if (s->tokens != NULL)
        s->tokens_spare = s->tokens + 1;
    for (unsigned i = 0; i < s->bucket_count; i++)
        s->buckets[i] = NONE;
    s->conns_free = s->requests_free = s->receivers_free = NONE;
    s->flush_first = s->dirty_first = NONE;
    s->empty_first = s->empty_last = s->rooms_free = NONE;
#if COLLABD_TLS
    s->tls_max = c->tls_listen.count > 0 ? (unsigned)c->max_tls : 0;
    s->tls_free = NONE;
    s->tls_current = -1;
#endif
    return true;
}
/* ===== 10  Counters ========================================================
 * What is measured, and its text for GET /metrics (Prometheus text format
 * 0.0.4).  Every name begins with collabd_.
 * ========================================================================= */

static void
stat_line(struct out *o, const char *name, const char *type, const char *help,
          uint64_t value)
{
    out_format(o, "# HELP collabd_%s %s\n# TYPE collabd_%s %s\n"
               "collabd_%s %" PRIu64 "\n",
               name, help, name, type, name, value);
}

/* One sample of a family whose samples differ by one label. */
static void
stat_pool(struct out *o, const char *family, const char *pool, uint64_t value)
{
    out_format(o, "collabd_%s{pool=\"%s\"} %" PRIu64 "\n", family, pool,
               value);
}

static void
stat_pools(const struct collabd *s, struct out *o, bool caps)
{
    const char *family = caps ? "memory_cap_bytes" : "memory_used_bytes";
    uint64_t ring = s->cfg->ring * 2;

    out_format(o, "# HELP collabd_%s memory by pool\n# TYPE collabd_%s gauge\n",
               family, family);
    stat_pool(o, family, "clients",
              sizeof(struct conn) * (caps ? s->conns_max : s->conns_used));
    stat_pool(o, family, "rings",
              ring * (caps ? s->rooms_max : s->rooms_used));
    stat_pool(o, family, "messages",
              (uint64_t)COLLABD_CHUNK *
                  (caps ? s->chunks.count : s->chunks.used));
    stat_pool(o, family, "documents",
              caps ? s->cfg->doc_memory : s->doc_used);
    stat_pool(o, family, "requests",
              sizeof(struct request) *
                  (caps ? s->requests_max : s->requests_used));
    stat_pool(o, family, "receivers",
              (sizeof(struct receiver) + MEMORY_WSLAY) *
                  (caps ? s->receivers_max : s->receivers_used));
#if COLLABD_TLS
    stat_pool(o, family, "tls",
              (uint64_t)MEMORY_TLS_IDLE * (caps ? s->tls_max : s->tls_used));
#endif
}

/* How far the slowest members are behind: the longest backlog, and the sum of
 * what the rings hold. */
static void
stat_backlog(const struct collabd *s, uint64_t *longest, uint64_t *held)
{
    *longest = *held = 0;
    for (unsigned i = 0; i < s->rooms_fresh; i++) {
        const struct room *room = &s->rooms[i];
        uint64_t pos;
        if (!room->used)
            continue;
        *held += room->ring.head_at - room->ring.tail_at;
        for (uint16_t m = room->first; m != NONE; m = s->conns[m].in.next) {
            const struct member *in = &s->conns[m].in;
            if (in->overtaken || in->outside)
                continue;
            pos = ring_pos(&room->ring, in->entry);
            if (room->ring.pos - pos - in->own > *longest)
                *longest = room->ring.pos - pos - in->own;
        }
    }
}

/* What there is of all open documents. */
struct stat_documents {
    unsigned open, failing;
    uint64_t bytes;   /* of snapshots and tails */
    uint64_t pending; /* stretches that came ahead of something missing */
    uint64_t lag;     /* bytes of files that are not known to be on the disk */
};

static struct stat_documents
stat_documents(const struct collabd *s)
{
    struct stat_documents sum = { 0 };

    for (unsigned i = 0; i < s->rooms_fresh; i++) {
        const struct doc *d = &s->docs[i];
        if (d->state != DOC_OPEN)
            continue;
        sum.open++;
        sum.failing += d->retry_ms > 0;
        sum.bytes += d->now.len + d->tail_len;
        sum.pending += d->known.n_islands;
        sum.lag += d->file.fd < 0 ? 0 : d->file.end - d->file.synced;
    }
    return sum;
}

static void
stat_about_documents(const struct collabd *s, struct out *o)
{
    struct stat_documents sum = stat_documents(s);
    int64_t synced = s->count.journal_synced_ms;

    stat_line(o, "documents", "gauge", "documents that are open", sum.open);
    stat_line(o, "documents_failing", "gauge",
              "those that the disk takes nothing of", sum.failing);
    stat_line(o, "documents_bytes", "gauge", "their snapshots and tails",
              sum.bytes);
    stat_line(o, "documents_pending", "gauge",
              "runs of structs that wait for something missing", sum.pending);
    stat_line(o, "journal_lag_bytes", "gauge",
              "written, but not known to be on the disk", sum.lag);
    stat_line(o, "journal_last_sync_seconds", "gauge",
              "since the last sync of a file; 0: there was none",
              synced == 0 ? 0 : (uint64_t)(now_ms - synced) / 1000);
    stat_line(o, "journal_write_us_max", "gauge",
              "longest append, microseconds", s->count.journal_write_us_max);
    stat_line(o, "doc_merge_us_max", "gauge", "longest merge, microseconds",
              s->count.doc_merge_us_max);
    stat_line(o, "doc_load_us_max", "gauge", "longest load, microseconds",
              s->count.doc_load_us_max);
}

static void
stat_metrics(const struct collabd *s, struct out *o)
{
    uint64_t longest, held;

    stat_backlog(s, &longest, &held);
    stat_line(o, "clients", "gauge", "connections now", s->conns_used);
    stat_line(o, "rooms", "gauge", "rooms now, empty ones that keep a ring "
              "included", s->rooms_used);
    stat_line(o, "backlog_bytes_max", "gauge",
              "how far the slowest member is behind", longest);
    stat_line(o, "ring_bytes", "gauge", "what all rings hold", held);
    stat_about_documents(s, o);
#define X(name, help)                                                        \
    stat_line(o, #name "_total", "counter", help, s->count.name);
    COUNTERS(X)
#undef X
    out_text(o, "# HELP collabd_closes_total ended connections by reason\n"
                "# TYPE collabd_closes_total counter\n");
    for (unsigned i = 0; i < CLOSE_REASON_COUNT; i++) {
        out_text(o, "collabd_closes_total{reason=\"");
        for (const char *n = close_reasons[i].name; *n != '\0'; n++)
            out_u8(o, byte_lower((uint8_t)*n));
        out_format(o, "\"} %" PRIu64 "\n", s->count.closes[i]);
    }
    out_text(o, "# HELP collabd_responses_total HTTP responses by status\n"
                "# TYPE collabd_responses_total counter\n");
    for (unsigned i = 0; i < 500; i++)
        if (s->count.statuses[i] > 0)
            out_format(o, "collabd_responses_total{status=\"%u\"} %" PRIu64
                       "\n", i + 100, s->count.statuses[i]);
    stat_pools(s, o, false);
    stat_pools(s, o, true);
    out_format(o, "# HELP collabd_turn_seconds_max longest turn of the loop\n"
               "# TYPE collabd_turn_seconds_max gauge\n"
               "collabd_turn_seconds_max %.6f\n"
               "# HELP collabd_turn_seconds_total time spent in turns\n"
               "# TYPE collabd_turn_seconds_total counter\n"
               "collabd_turn_seconds_total %.6f\n",
               (double)s->count.turn_us_max / 1e6,
               (double)s->count.turn_us_sum / 1e6);
}

/* False: the server is not well. */
static bool
stat_health(const struct collabd *s, struct out *o)
{
    struct stat_documents sum = stat_documents(s);

    out_format(o, "{\"status\":\"%s\",\"version\":\"" COLLABD_VERSION "\","
               "\"clients\":%u,\"rooms\":%u,\"documents\":%u,"
               "\"kept\":\"%s\"%s}\n",
               sum.failing > 0 ? "failing" : s->stopping ? "stopping" : "ok",
               s->conns_used, s->rooms_used, sum.open,
               s->data.fd < 0 ? "in memory only" : "in --data",
               sum.failing > 0 ? ",\"reason\":\"the disk takes no more of some "
                             "documents; see the log\""
                           : "");
    return sum.failing == 0;
}
/* ===== 11  HTTP ============================================================
 * A request head to a verdict, by hand: RFC 9110, 9112 and 6455 4.2.  Pure:
 * it reads the head and points into it; what is allowed is decided elsewhere.
 *
 * Strict where leniency has been used to smuggle requests: lines end in CRLF,
 * no space before a colon, no folded lines, no two framings.
 * ========================================================================= */

enum http_method {
    HTTP_GET, HTTP_HEAD, HTTP_OPTIONS, HTTP_POST, HTTP_PUT, HTTP_DELETE,
    HTTP_PATCH, HTTP_CONNECT, HTTP_TRACE, HTTP_METHODS
};

static const char *const http_method_names[HTTP_METHODS] = {
    "GET", "HEAD", "OPTIONS", "POST", "PUT", "DELETE", "PATCH", "CONNECT",
    "TRACE"
};

#define HTTP_FORWARDED 8

struct http {
    enum http_method method;
    int minor;                 /* HTTP/1.minor */
    struct span path, query;   /* as sent, without the ? */
    struct span host, origin, bearer, cookies, key, protocols;
    struct span if_none_match, if_range, range, accept_encoding, version;
    struct span forwarded[HTTP_FORWARDED]; /* the last lines, oldest first */
    unsigned forwarded_count;
    unsigned hosts, keys, versions, origins, ranges;
    uint64_t body;             /* Content-Length */
    bool has_length, chunked;
    bool keep_alive, close;
    bool upgrade_token;        /* Connection: upgrade */
    bool upgrade_websocket;    /* Upgrade: websocket */
    bool forwarded_https;      /* X-Forwarded-Proto */
};

/* The verdict on a head: 0, or the status that refuses it with a line that
 * says why. */
struct verdict {
    int status;
    const char *why;
};

static const struct verdict http_fine = { 0, "" };

#define HTTP_BAD(why) ((struct verdict){ 400, why })

/* tchar of RFC 9110 5.6.2 */
static bool
http_is_token_byte(uint8_t b)
{
    return byte_is_digit(b) || (byte_lower(b) >= 'a' && byte_lower(b) <= 'z') ||
           (b != 0 && strchr("!#$%&'*+-.^_`|~", b) != NULL);
}

static bool
http_is_token(struct span s)
{
    if (span_is_empty(s))
        return false;
    for (; s.at < s.end; s.at++)
        if (!http_is_token_byte(*s.at))
            return false;
    return true;
}

/* Finds the end of a head: the empty line.  PARSE_OK: *head is the head with
 * the CRLF of its last line, *in goes on behind the empty line.  PARSE_BAD: a
 * line ends in LF alone.  Empty lines ahead of a request are passed over
 * (RFC 9112 2.2). */
static enum parse
http_head(struct span *in, struct span *head)
{
    struct span s = *in;
    const uint8_t *line, *lf;

    while (span_starts(s, "\r\n"))
        s.at += 2;
    for (line = s.at; (lf = span_find((struct span){ line, s.end }, '\n')) !=
                      s.end; line = lf + 1) {
        if (lf == line || lf[-1] != '\r')
            return PARSE_BAD;
        if (lf == line + 1 && line > s.at) {
            *head = (struct span){ s.at, line };
            in->at = lf + 1;
            return PARSE_OK;
        }
    }
    return PARSE_MORE;
}

/* One line without its CRLF; a bare CR or LF in it is an error. */
static enum parse
http_line(struct span *in, struct span *line)
{
    const uint8_t *cr = span_find(*in, '\r');

    if (cr == in->end)
        return PARSE_MORE;
    if (cr + 1 == in->end)
        return PARSE_MORE;
    if (cr[1] != '\n')
        return PARSE_BAD;
    *line = (struct span){ in->at, cr };
    if (span_has(*line, '\n'))
        return PARSE_BAD;
    in->at = cr + 2;
    return PARSE_OK;
}

/* The next element of a comma-separated list; false: there are no more.
 * Empty elements are passed over (RFC 9110 5.6.1.2). */
static bool
http_list_next(struct span *list, struct span *element)
{
    while (!span_is_empty(*list)) {
        *element = span_trim(span_cut(list, ','));
        if (!span_is_empty(*element))
            return true;
    }
    return false;
}

static bool
http_list_has(struct span list, const char *token)
{
    struct span element;

    while (http_list_next(&list, &element))
        if (span_is_folded(element, token))
            return true;
    return false;
}

static struct verdict
http_request_line(struct span line, struct http *h)
{
    struct span method = span_cut(&line, ' '), target = span_cut(&line, ' ');
    struct span scheme = target;
    int m;

    if (!http_is_token(method))
        return HTTP_BAD("the request line does not begin with a method");
    if (!span_starts(line, "HTTP/") || span_len(line) != 8 ||
        !byte_is_digit(line.at[5]) || line.at[6] != '.' ||
        !byte_is_digit(line.at[7]))
        return HTTP_BAD("the request line is not: method, target, HTTP/1.1");
    if (line.at[5] != '1')
        return (struct verdict){ 505, "this server speaks HTTP/1.1" };
    h->minor = line.at[7] - '0';
    if (span_len(target) > COLLABD_TARGET_MAX)
        return (struct verdict){
            414, "the target is longer than COLLABD_TARGET_MAX (collabd.h)"
        };
    for (m = 0; m < HTTP_METHODS; m++)
        if (span_is(method, http_method_names[m]))
            break;
    if (m == HTTP_METHODS)
        return (struct verdict){ 501, "this method is not known here" };
    h->method = (enum http_method)m;
    if (h->method == HTTP_CONNECT)
        return (struct verdict){ 501, "this is no proxy" };
    for (struct span s = target; s.at < s.end; s.at++)
        if (*s.at <= ' ' || *s.at >= 0x7f || *s.at == '#')
            return HTTP_BAD("the target holds a byte that must be escaped");
    for (struct span s = target; span_len(s) >= 3; s.at++)
        if (span_starts(s, "%00"))
            return HTTP_BAD("the target holds an escaped NUL");
    scheme.end = span_find(scheme, ':');
    if ((span_is_folded(scheme, "http") || span_is_folded(scheme, "https")) &&
        span_starts((struct span){ scheme.end, target.end }, "://")) {
        /* absolute form: its authority counts, not Host (RFC 9112 3.2.2) */
        target.at = scheme.end + 3;
        h->host = (struct span){ target.at, span_find(target, '/') };
        h->host.end = span_find(h->host, '?');
        target.at = h->host.end;
        if (span_is_empty(h->host))
            return HTTP_BAD("the target names no host");
        h->hosts = 1;
    } else if (h->method == HTTP_OPTIONS && span_is(target, "*")) {
        h->path = target;
        return http_fine;
    } else if (!span_starts(target, "/")) {
        return HTTP_BAD("the target does not begin with /");
    }
    h->path = span_cut(&target, '?');
    if (span_is_empty(h->path))
        h->path = span_text("/");
    h->query = target;
    return http_fine;
}

/* A second line of a field that may stand only once. */
static bool
http_once(struct span *field, unsigned *seen, struct span value)
{
    *field = value;
    return ++*seen == 1;
}

static struct verdict
http_field(struct span name, struct span value, struct http *h,
           bool absolute, unsigned *lengths, unsigned *codings)
{
    if (span_is_folded(name, "Host")) {
        if (absolute) {
            if (++h->hosts > 2)
                return HTTP_BAD("there is more than one Host");
        } else if (!http_once(&h->host, &h->hosts, value)) {
            return HTTP_BAD("there is more than one Host");
        }
    } else if (span_is_folded(name, "Connection")) {
        h->close |= http_list_has(value, "close");
        h->keep_alive |= http_list_has(value, "keep-alive");
        h->upgrade_token |= http_list_has(value, "upgrade");
    } else if (span_is_folded(name, "Upgrade")) {
        h->upgrade_websocket |= http_list_has(value, "websocket");
    } else if (span_is_folded(name, "Sec-WebSocket-Key")) {
        if (!http_once(&h->key, &h->keys, value))
            return HTTP_BAD("there is more than one Sec-WebSocket-Key");
    } else if (span_is_folded(name, "Sec-WebSocket-Version")) {
        if (!http_once(&h->version, &h->versions, value))
            return HTTP_BAD("there is more than one Sec-WebSocket-Version");
    } else if (span_is_folded(name, "Origin")) {
        if (!http_once(&h->origin, &h->origins, value))
            return HTTP_BAD("there is more than one Origin");
    } else if (span_is_folded(name, "Authorization")) {
        if (span_len(value) > 7 &&
            span_is_folded(span_of(value.at, 7), "Bearer "))
            h->bearer = span_trim(
                (struct span){ value.at + 7, value.end });
    } else if (span_is_folded(name, "Cookie")) {
        h->cookies = value;
    } else if (span_is_folded(name, "Content-Length")) {
        uint64_t length;
        if (span_decimal(value, INT64_MAX, &length) != PARSE_OK)
            return HTTP_BAD("Content-Length is not a number");
        if (++*lengths > 1 && length != h->body)
            return HTTP_BAD("there are two different Content-Lengths");
        h->body = length;
        h->has_length = true;
    } else if (span_is_folded(name, "Transfer-Encoding")) {
        if (h->minor == 0)
            return HTTP_BAD("HTTP/1.0 has no Transfer-Encoding");
        if (++*codings > 1 || !span_is_folded(value, "chunked"))
            return (struct verdict){
                501, "no Transfer-Encoding but chunked is known here"
            };
        h->chunked = true;
    } else if (span_is_folded(name, "X-Forwarded-Proto")) {
        h->forwarded_https = span_is_folded(value, "https");
    } else if (span_is_folded(name, "X-Forwarded-For")) {
        if (h->forwarded_count == HTTP_FORWARDED)
            memmove(h->forwarded, h->forwarded + 1,
                    sizeof h->forwarded - sizeof *h->forwarded);
        else
            h->forwarded_count++;
        h->forwarded[h->forwarded_count - 1] = value;
    } else if (span_is_folded(name, "Range")) {
        if (!http_once(&h->range, &h->ranges, value))
            h->range = span_text("");
    } else if (span_is_folded(name, "If-Range")) {
        h->if_range = value;
    } else if (span_is_folded(name, "If-None-Match")) {
        h->if_none_match = value;
    } else if (span_is_folded(name, "Accept-Encoding")) {
        h->accept_encoding = value;
    } else if (span_is_folded(name, "Sec-WebSocket-Protocol")) {
        h->protocols = value;
    }
    return http_fine;
}

/* A whole head, as http_head found it. */
static struct verdict
http_parse(struct span head, struct http *h)
{
    struct verdict v;
    struct span line, name;
    unsigned lengths = 0, codings = 0;
    bool absolute;

    *h = (struct http){ .method = HTTP_GET };
    if (http_line(&head, &line) != PARSE_OK)
        return HTTP_BAD("a line does not end in CRLF");
    v = http_request_line(line, h);
    if (v.status != 0)
        return v;
    absolute = h->hosts > 0;
    while (!span_is_empty(head)) {
        if (http_line(&head, &line) != PARSE_OK)
            return HTTP_BAD("a line does not end in CRLF");
        if (!span_has(line, ':'))
            return HTTP_BAD("a header line has no colon");
        name = span_cut(&line, ':');
        if (!http_is_token(name))
            return HTTP_BAD("a field name holds a space or another byte it "
                            "must not");
        for (struct span s = line; s.at < s.end; s.at++)
            if ((*s.at < ' ' && *s.at != '\t') || *s.at == 0x7f)
                return HTTP_BAD("a field value holds a control character");
        v = http_field(name, span_trim(line), h, absolute, &lengths, &codings);
        if (v.status != 0)
            return v;
    }
    if (h->chunked && h->has_length)
        return HTTP_BAD("Content-Length and Transfer-Encoding stand together");
    if (h->hosts == 0 && h->minor > 0)
        return HTTP_BAD("there is no Host");
    if (h->hosts > 0 && !span_cut_host(h->host, &name))
        return HTTP_BAD("Host is not a host name or address");
    return http_fine;
}

static bool
http_has_body(const struct http *h)
{
    return h->chunked || h->body > 0;
}

/* RFC 9112 9.3 */
static bool
http_persists(const struct http *h)
{
    return !h->close && (h->minor > 0 || h->keep_alive);
}

/* Does this request mean to become a WebSocket? */
static bool
http_is_upgrade(const struct http *h)
{
    return h->upgrade_websocket && h->upgrade_token;
}

/* RFC 6455 4.2.1, for a request that http_is_upgrade. */
static struct verdict
http_judge_upgrade(const struct http *h)
{
    if (h->method != HTTP_GET)
        return (struct verdict){ 405, "a WebSocket begins with GET" };
    if (h->minor == 0)
        return HTTP_BAD("a WebSocket needs HTTP/1.1");
    if (h->versions == 0 || !span_is(h->version, "13"))
        return (struct verdict){
            426, "this server speaks WebSocket version 13"
        };
    if (h->keys == 0)
        return HTTP_BAD("there is no Sec-WebSocket-Key");
    if (!span_is_base64_of_16(h->key))
        return HTTP_BAD("Sec-WebSocket-Key is not the base64 of 16 bytes");
    return http_fine;
}

/* RFC 6455 4.2.2, 5.4: SHA-1 of the key and a constant, in base64. */
static void
http_accept(struct span key, struct out *o)
{
    static const char constant[] = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
    uint8_t text[24 + sizeof constant - 1], hash[20];

    must(span_len(key) == 24);
    memcpy(text, key.at, 24);
    memcpy(text + 24, constant, sizeof constant - 1);
    sys_hash(MBEDTLS_MD_SHA1, span_of(text, sizeof text), hash);
    out_base64(o, hash, sizeof hash);
}

/* Percent-decoding.  False: a % without two hex digits, or it did not fit. */
static bool
http_decode(struct span s, struct out *o)
{
    int high, low;

    while (s.at < s.end) {
        if (*s.at != '%') {
            out_u8(o, *s.at++);
            continue;
        }
        high = span_len(s) < 3 ? -1 : hex_value(s.at[1]);
        low = span_len(s) < 3 ? -1 : hex_value(s.at[2]);
        if (high < 0 || low < 0)
            return false;
        out_u8(o, (uint8_t)(high * 16 + low));
        s.at += 3;
    }
    return !o->full;
}

/* The value of one parameter of a query, as sent. */
static bool
http_query(struct span query, const char *name, struct span *value)
{
    while (!span_is_empty(query)) {
        struct span one = span_cut(&query, '&');
        if (span_is(span_cut(&one, '='), name)) {
            *value = one;
            return true;
        }
    }
    return false;
}

static bool
http_cookie(struct span cookies, const char *name, struct span *value)
{
    while (!span_is_empty(cookies)) {
        struct span one = span_trim(span_cut(&cookies, ';'));
        if (span_is(span_cut(&one, '='), name)) {
            *value = one;
            return true;
        }
    }
    return false;
}

/* Does a list like `gzip;q=0.5, br` accept gzip? */
static bool
http_accepts_gzip(struct span list)
{
    struct span one;
    bool any = false, gzip = false, gzip_said = false;

    while (http_list_next(&list, &one)) {
        struct span coding = span_trim(span_cut(&one, ';'));
        struct span q = span_trim(one);
        bool yes = true;
        if (span_len(q) > 2 && byte_lower(*q.at) == 'q' && q.at[1] == '=') { /* zero however written: 0, 0.000 */
            yes = false;
            for (q.at += 2; q.at < q.end; q.at++)
                yes |= *q.at >= '1' && *q.at <= '9';
        }
        if (span_is_folded(coding, "gzip")) {
            gzip_said = true;
            gzip = yes;
        } else if (span_is(coding, "*")) {
            any = yes;
        }
    }
    return gzip_said ? gzip : any;
}

/* A name: 1 to COLLABD_NAME_MAX bytes of UTF-8 without controls, no empty, `.`
 * or `..` segment. */
static struct verdict
http_judge_name(struct span name)
{
    struct utf8 utf8 = { 0, 0, 0 };
    struct span s = name;

    if (span_len(name) > COLLABD_NAME_MAX)
        return HTTP_BAD("the name is longer than 128 bytes");
    if (!utf8_check(&utf8, name) || !utf8_is_complete(&utf8))
        return HTTP_BAD("the name is not UTF-8");
    for (const uint8_t *b = name.at; b < name.end; b++)
        if (*b < ' ' || *b == 0x7f ||
            (*b == 0xc2 && b[1] < 0xa0)) /* C1, complete UTF-8 */
            return HTTP_BAD("the name holds a control character");
    do {
        struct span part = span_cut(&s, '/');
        if (span_is_empty(part) || span_is(part, ".") || span_is(part, ".."))
            return HTTP_BAD("the name has an empty, `.` or `..` segment");
    } while (!span_is_empty(s));
    if (span_is_empty(name) || name.end[-1] == '/')
        return HTTP_BAD("the name has an empty segment");
    return http_fine;
}

/* A room's name from the path behind /ws/, decoded. */
static struct verdict
http_room_name(struct span path, uint8_t name[COLLABD_NAME_MAX], uint8_t *len)
{
    struct out o = out_over(name, COLLABD_NAME_MAX);

    if (!http_decode(path, &o))
        return o.full ? HTTP_BAD("the name is longer than 128 bytes")
                      : HTTP_BAD("a % in the name lacks its two hex digits");
    *len = (uint8_t)(o.at - name);
    return http_judge_name((struct span){ name, o.at });
}

static const char *
http_reason(int status)
{
    switch (status) {
    case 101: return "Switching Protocols";
    case 200: return "OK";
    case 204: return "No Content";
    case 206: return "Partial Content";
    case 301: return "Moved Permanently";
    case 303: return "See Other";
    case 304: return "Not Modified";
    case 400: return "Bad Request";
    case 401: return "Unauthorized";
    case 403: return "Forbidden";
    case 404: return "Not Found";
    case 405: return "Method Not Allowed";
    case 408: return "Request Timeout";
    case 413: return "Content Too Large";
    case 414: return "URI Too Long";
    case 416: return "Range Not Satisfiable";
    case 421: return "Misdirected Request";
    case 426: return "Upgrade Required";
    case 429: return "Too Many Requests";
    case 431: return "Request Header Fields Too Large";
    case 501: return "Not Implemented";
    case 503: return "Service Unavailable";
    case 505: return "HTTP Version Not Supported";
    default: return "Internal Server Error";
    }
}
/* ===== 12  Frames ==========================================================
 * WebSocket frames, RFC 6455 5.  wslay's frame layer cuts the stream into
 * pieces of frames, unmasks them, and checks lengths; masks, reserved bits,
 * opcodes, fragment order, UTF-8 and close codes are checked here.
 *
 * A wslay context is borrowed while its client is read or in mid-frame, and
 * its buffer is the receive buffer.  It cannot be reset: it goes back only
 * when all bytes fed to it came out again as whole frames; else it is freed
 * and made anew.
 * ========================================================================= */

#define WS_HEADER_MAX 10 /* of a server's frame: no mask */

/* A frame's header; the frames of a server are final and carry no mask. */
static void
ws_header(struct out *o, uint8_t opcode, uint64_t len)
{
    out_u8(o, (uint8_t)(0x80 | opcode));
    if (len < 126) {
        out_u8(o, (uint8_t)len);
    } else {
        int bytes = len < 65536 ? 2 : 8;
        out_u8(o, bytes == 2 ? 126 : 127);
        while (bytes-- > 0)
            out_u8(o, (uint8_t)(len >> (8 * bytes)));
    }
}

static size_t
ws_header_len(uint64_t len)
{
    return len < 126 ? 2 : len < 65536 ? 4 : WS_HEADER_MAX;
}

/* RFC 6455 7.4: may a peer send this close code? */
static bool
ws_code_is_valid(uint16_t code)
{
    return (code >= 1000 && code <= 1014 && code != 1004 && code != 1005 &&
            code != 1006) ||
           (code >= 3000 && code <= 4999);
}

/* NULL: all are borrowed. */
static struct receiver *
receiver_borrow(struct collabd *s, struct conn *c)
{
    struct receiver *r;

    must(c->receiver == NONE);
    if (s->receivers_free == NONE)
        return NULL;
    r = &s->receivers[s->receivers_free];
    c->receiver = s->receivers_free;
    s->receivers_free = r->next;
    r->conn = c->id.slot;
    s->receivers_used++;
    return r;
}

static int
receiver_make(struct receiver *r, wslay_frame_recv_callback receive)
{
    struct wslay_frame_callbacks calls = { NULL, receive, NULL };

    r->fed = r->used = r->frame_got = 0;
    r->control_len = 0;
    r->waiting.kind = WS_NOTHING;
    return wslay_frame_context_init(&r->wslay, &calls, r);
}

/* Gives the receiver back, and its context anew if bytes are left in it.  If
 * the machine has no memory for that, the pool is smaller by one. */
static void
receiver_return(struct collabd *s, struct conn *c,
                wslay_frame_recv_callback receive)
{
    struct receiver *r;
    uint16_t slot = c->receiver;

    if (slot == NONE)
        return;
    r = &s->receivers[slot];
    c->receiver = NONE;
    s->receivers_used--;
    r->conn = NONE;
    r->waiting.kind = WS_NOTHING; /* it was of a message of this client */
    if (r->fed != r->used) {
        wslay_frame_context_free(r->wslay);
        r->wslay = NULL;
        if (receiver_make(r, receive) != 0) {
            log_say(LOG_LEVEL_ERROR, "no memory for a wslay context");
            s->receivers_max--;
            return;
        }
    }
    r->next = s->receivers_free;
    s->receivers_free = slot;
}

static bool
receiver_is_idle(const struct receiver *r)
{
    return r->fed == r->used && r->waiting.kind == WS_NOTHING;
}

/* What a frame's first piece must satisfy. */
static enum close_reason
ws_judge_frame(const struct wslay_frame_iocb *f, const struct assembly *m,
               uint64_t max_message)
{
    if (!f->mask || f->rsv != 0)
        return CLOSE_PROTOCOL;
    switch (f->opcode) {
    case WSLAY_CONNECTION_CLOSE:
    case WSLAY_PING:
    case WSLAY_PONG:
        return CLOSE_DONE;
    case WSLAY_TEXT_FRAME:
    case WSLAY_BINARY_FRAME:
        if (m->opcode != 0)
            return CLOSE_PROTOCOL;
        break;
    case WSLAY_CONTINUATION_FRAME:
        if (m->opcode == 0)
            return CLOSE_PROTOCOL;
        break;
    default:
        return CLOSE_PROTOCOL;
    }
    return f->payload_length > max_message - m->len ? CLOSE_TOO_BIG
                                                    : CLOSE_DONE;
}

static struct ws_piece
ws_bad(enum close_reason why)
{
    return (struct ws_piece){ .kind = WS_BAD, .why = why };
}

static struct ws_piece
ws_control(const struct receiver *r, uint8_t opcode)
{
    struct ws_piece p = { .kind = opcode == WSLAY_PING ? WS_PING : WS_PONG };
    struct utf8 utf8 = { 0, 0, 0 };

    p.data = span_of(r->control, r->control_len);
    if (opcode != WSLAY_CONNECTION_CLOSE)
        return p;
    p.kind = WS_CLOSE;
    p.code = COLLABD_CLOSE_NO_STATUS;
    if (span_is_empty(p.data))
        return p;
    if (span_len(p.data) < 2)
        return ws_bad(CLOSE_PROTOCOL);
    p.code = (uint16_t)(p.data.at[0] << 8 | p.data.at[1]);
    p.data.at += 2;
    if (!ws_code_is_valid(p.code))
        return ws_bad(CLOSE_PROTOCOL);
    if (!utf8_check(&utf8, p.data) || !utf8_is_complete(&utf8))
        return ws_bad(CLOSE_NOT_UTF8);
    return p;
}

/* The next piece that the receiver has or can get. */
static struct ws_piece
ws_next(struct receiver *r, struct assembly *m, uint64_t max_message)
{
    struct wslay_frame_iocb f;
    struct ws_piece p = { .kind = WS_DATA };
    ssize_t n = wslay_frame_recv(r->wslay, &f);
    bool frame_begins = r->frame_got == 0, frame_ends;

    if (n == WSLAY_ERR_WANT_READ)
        return (struct ws_piece){ .kind = WS_NOTHING };
    if (n < 0)
        return ws_bad(CLOSE_PROTOCOL);
    if (frame_begins) {
        enum close_reason why = ws_judge_frame(&f, m, max_message);
        if (why != CLOSE_DONE)
            return ws_bad(why);
    }
    r->frame_got += f.data_length;
    frame_ends = r->frame_got == f.payload_length;
    if (frame_ends) {
        r->used += ws_header_len(f.payload_length) + 4 + f.payload_length;
        r->frame_got = 0;
    }
    if (wslay_is_ctrl_frame(f.opcode)) {
        if (frame_begins)
            r->control_len = 0;
        memcpy(r->control + r->control_len, f.data, f.data_length);
        r->control_len = (uint8_t)(r->control_len + f.data_length);
        return frame_ends ? ws_control(r, f.opcode)
                          : (struct ws_piece){ .kind = WS_PART };
    }
    p.first = frame_begins && f.opcode != WSLAY_CONTINUATION_FRAME;
    p.last = frame_ends && f.fin;
    p.data = span_of(f.data, f.data_length);
    if (p.first) {
        m->opcode = f.opcode;
        m->utf8 = (struct utf8){ 0, 0, 0 };
    }
    p.opcode = m->opcode;
    if (m->opcode == WSLAY_TEXT_FRAME &&
        (!utf8_check(&m->utf8, p.data) ||
         (p.last && !utf8_is_complete(&m->utf8))))
        return ws_bad(CLOSE_NOT_UTF8);
    m->len += (uint32_t)span_len(p.data);
    if (p.last)
        m->opcode = 0;
    return p;
}

/* Puts a piece behind a message in message memory; the first chunk keeps room
 * for the frame's header.  False: there is not enough, nothing is changed. */
static bool
assembly_add(struct chunks *pool, struct assembly *m, uint32_t before,
             struct span piece)
{
    /* `before` bytes of the message are already there */
    size_t filled = m->first == NONE32 ? 0 : WS_HEADER_MAX + before;
    size_t room = m->first == NONE32
                      ? 0
                      : (COLLABD_CHUNK - filled % COLLABD_CHUNK) %
                            COLLABD_CHUNK;
    size_t total = span_len(piece) + (m->first == NONE32 ? WS_HEADER_MAX : 0);
    size_t chunks =
        total <= room ? 0 : (total - room + COLLABD_CHUNK - 1) / COLLABD_CHUNK;

    if (pool->count - pool->used < chunks)
        return false;
    if (m->first == NONE32) {
        m->first = m->last = chunk_new(pool);
        filled = WS_HEADER_MAX;
    }
    while (!span_is_empty(piece)) {
        size_t at = filled % COLLABD_CHUNK, n = COLLABD_CHUNK - at;
        if (at == 0) {
            uint32_t fresh = chunk_new(pool);
            pool->next[m->last] = fresh;
            m->last = fresh;
        }
        if (n > span_len(piece))
            n = span_len(piece);
        memcpy(chunk_bytes(pool, m->last) + at, piece.at, n);
        piece.at += n;
        filled += n;
    }
    return true;
}

static void
assembly_drop(struct chunks *pool, struct assembly *m)
{
    chunk_free_chain(pool, m->first);
    m->first = m->last = NONE32;
    m->len = 0;
    m->opcode = 0;
}
/* ===== 13  Access ==========================================================
 * Who may do what: tokens, origins, host names, proxies.  Owns the token
 * table; all else is pure.
 * ========================================================================= */

#define ACCESS_TOKEN_FILE_MAX 65535

static const char *const access_right_names[] = { "none", "read", "write",
                                                  "admin" };

/* Equal, in a time that does not depend on where they differ. */
static bool
access_same(const uint8_t *a, const uint8_t *b, size_t len)
{
    uint8_t differs = 0;

    for (size_t i = 0; i < len; i++)
        differs |= (uint8_t)(a[i] ^ b[i]);
    return differs == 0;
}

/* The next word of a line; empty at the end. */
static struct span
access_word(struct span *line)
{
    struct span word;

    while (line->at < line->end && (*line->at == ' ' || *line->at == '\t'))
        line->at++;
    word.at = line->at;
    while (line->at < line->end && *line->at != ' ' && *line->at != '\t')
        line->at++;
    word.end = line->at;
    return word;
}

/* One line of a token file; what is wrong with it, or NULL. */
static const char *
access_token_line(struct tokens *t, struct span line)
{
    struct span hash = access_word(&line), right = access_word(&line),
                pattern = access_word(&line);
    struct token *token = &t->token[t->count];

    if (span_is_empty(hash) || *hash.at == '#')
        return NULL;
    if (span_has((struct span){ hash.at, line.end }, 0))
        return "there is a NUL in it";
    if (t->count == COLLABD_TOKENS)
        return "more lines than COLLABD_TOKENS (collabd.h)";
    *token = (struct token){ .right = RIGHT_READ };
    if (span_len(hash) != 64)
        return "the first word is not the 64 hex digits of a SHA-256; "
               "collabd --make-token prints a line";
    for (size_t i = 0; i < 64; i++) {
        int digit = hex_value(hash.at[i]);
        if (digit < 0)
            return "the first word is not the 64 hex digits of a SHA-256; "
                   "collabd --make-token prints a line";
        token->hash[i / 2] = (uint8_t)(token->hash[i / 2] << 4 | digit);
    }
    while (!span_is(right, access_right_names[token->right]))
        if (++token->right > RIGHT_ADMIN)
            return "the second word is not read, write or admin";
    if (!span_is(pattern, "*") && !span_starts(pattern, "ws/") &&
        !span_starts(pattern, "doc/"))
        return "the third word is not ws/GLOB, doc/GLOB or *";
    if (span_len(pattern) > sizeof token->pattern)
        return "the pattern is longer than any name";
    if (!span_is_empty(access_word(&line)))
        return "there is a fourth word";
    token->pattern_len = (uint8_t)span_len(pattern);
    memcpy(token->pattern, pattern.at, span_len(pattern));
    t->count++;
    return NULL;
}

/* Reads a token file into t.  False: refused and said. */
static bool
access_load(struct tokens *t, struct sys_file file, const char *path)
{
    uint8_t text[ACCESS_TOKEN_FILE_MAX + 1];
    ssize_t n = sys_read_file(file, text, ACCESS_TOKEN_FILE_MAX);
    struct span rest = span_of(text, n < 0 ? 0 : (size_t)n);
    bool good = n >= 0;
    unsigned bad = 0;

    t->on = true;
    t->count = 0;
    if (n < 0)
        log_say(LOG_LEVEL_ERROR, "tokens file %s: %s", path, strerror(errno));
    for (unsigned number = 1; !span_is_empty(rest); number++) {
        struct span line = span_cut(&rest, '\n');
        const char *wrong;
        if (!span_is_empty(line) && line.end[-1] == '\r')
            line.end--;
        wrong = access_token_line(t, line);
        if (wrong == NULL)
            continue;
        good = false;
        log_say(LOG_LEVEL_ERROR, "tokens file %s:%u: %s", path, number, wrong);
        if (++bad == 5)
            break; /* it may be another kind of file altogether */
    }
    explicit_bzero(text, sizeof text);
    return good;
}

/* The name under which a connection remembers its token. */
static void
access_token_id(struct span token, uint8_t id[16])
{
    uint8_t hash[32];

    sys_hash(MBEDTLS_MD_SHA256, token, hash);
    memcpy(id, hash, 16);
}

/* The greatest right that a token has on a thing ("ws/NAME"); *known says
 * whether it stands in the table at all.  All lines are always compared. */
static enum access_right
access_judge(const struct tokens *t, const uint8_t id[16], struct span thing,
             bool *known)
{
    static const uint8_t none[16]; /* who gave no token */
    enum access_right best = RIGHT_NONE;

    *known = false;
    if (t == NULL || !t->on) {
        *known = true;
        return RIGHT_WRITE;
    }
    if (access_same(id, none, 16))
        return RIGHT_NONE;
    for (unsigned i = 0; i < t->count; i++) {
        const struct token *token = &t->token[i];
        if (!access_same(token->hash, id, 16))
            continue;
        *known = true;
        if (token->right > best &&
            span_matches(thing, span_of(token->pattern, token->pattern_len)))
            best = (enum access_right)token->right;
    }
    return best;
}

/* ----- addresses ---------------------------------------------------------- */

static bool
access_is_v4(const uint8_t a[16])
{
    static const uint8_t prefix[12] = { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255,
                                        255 };
    return memcmp(a, prefix, 12) == 0;
}

static void
access_address_text(const uint8_t a[16], char text[INET6_ADDRSTRLEN])
{
    static const uint8_t none[16];

    if (memcmp(a, none, 16) == 0)
        (void)snprintf(text, INET6_ADDRSTRLEN, "unix");
    else if (access_is_v4(a))
        (void)inet_ntop(AF_INET, a + 12, text, INET6_ADDRSTRLEN);
    else
        (void)inet_ntop(AF_INET6, a, text, INET6_ADDRSTRLEN);
}

static bool
access_is_loopback(const uint8_t a[16])
{
    static const uint8_t one[16] = { [15] = 1 };

    return access_is_v4(a) ? a[12] == 127 : memcmp(a, one, 16) == 0;
}

/* An address that only a LAN sees: RFC 1918, link-local, ULA, loopback. */
static bool
access_is_private(const uint8_t a[16])
{
    const uint8_t *v4 = a + 12;

    if (access_is_loopback(a))
        return true;
    if (access_is_v4(a))
        return v4[0] == 10 || (v4[0] == 172 && (v4[1] & 0xf0) == 16) ||
               (v4[0] == 192 && v4[1] == 168) ||
               (v4[0] == 169 && v4[1] == 254) ||
               (v4[0] == 100 && (v4[1] & 0xc0) == 64);
    return (a[0] & 0xfe) == 0xfc || (a[0] == 0xfe && (a[1] & 0xc0) == 0x80);
}

/* The same household for --max-per-ip: the IPv4 address, the IPv6 /64. */
static bool
access_same_site(const uint8_t a[16], const uint8_t b[16])
{
    return access_is_v4(a) == access_is_v4(b) &&
           memcmp(a, b, access_is_v4(a) ? 16 : 8) == 0;
}

static bool
access_is_trusted(const struct cfg *c, const uint8_t peer[16], bool local)
{
    for (unsigned i = 0; i < c->trust_proxy.count; i++) {
        struct span list = span_text(cfg_item(c, &c->trust_proxy, i)), one;
        uint8_t a[16];
        while (http_list_next(&list, &one))
            if (span_is(one, "unix") ? local
                                     : !local && span_parse_address(one, a) &&
                                           memcmp(a, peer, 16) == 0)
                return true;
    }
    return false;
}

/* An address as proxies write it: perhaps [v6], perhaps with a port. */
static bool
access_parse_hop(struct span hop, uint8_t a[16])
{
    struct span name;

    if (span_parse_address(hop, a))
        return true;
    return span_cut_host(hop, &name) && span_parse_address(name, a);
}

/* The rightmost address of X-Forwarded-For that is no trusted proxy.  False:
 * there is none, or something else stands before it; peer is unchanged. */
static bool
access_forwarded(const struct cfg *c, const struct http *h, uint8_t peer[16])
{
    for (unsigned i = h->forwarded_count; i-- > 0;) {
        struct span list = h->forwarded[i];
        while (!span_is_empty(list)) {
            struct span hop = { list.end, list.end };
            uint8_t a[16];
            while (hop.at > list.at && hop.at[-1] != ',')
                hop.at--;
            list.end = hop.at > list.at ? hop.at - 1 : hop.at;
            hop = span_trim(hop);
            if (span_is_empty(hop))
                continue;
            if (!access_parse_hop(hop, a))
                return false;
            if (access_is_trusted(c, a, false))
                continue;
            memcpy(peer, a, 16);
            return true;
        }
    }
    return false;
}

/* ----- Host and Origin ----------------------------------------------------- */

static bool
access_is_listed(const struct cfg *c, const struct cfg_list *list,
                 struct span name)
{
    for (unsigned i = 0; i < list->count; i++)
        if (span_equals_folded(name, span_text(cfg_item(c, list, i))))
            return true;
    return false;
}

/* Is Host one of ours?  A page of a stranger whose name was made to point at
 * this machine (DNS rebinding) sends that name. */
static bool
access_host_is_ours(const struct cfg *c, const char *hostname,
                    struct span host)
{
    static const char *const local[] = { ".local", ".lan", ".home.arpa",
                                         ".internal", ".localhost" };
    struct span name;
    uint8_t a[16];

    if (!span_cut_host(host, &name))
        return false;
    if (span_len(name) > 1 && name.end[-1] == '.')
        name.end--;
    if (span_parse_address(name, a) || !span_has(name, '.') ||
        span_is_folded(name, hostname) || access_is_listed(c, &c->host, name))
        return true;
    for (size_t i = 0; i < sizeof local / sizeof *local; i++)
        if (span_ends_folded(name, local[i]))
            return true;
    return false;
}

enum origin { ORIGIN_NONE, ORIGIN_SAME, ORIGIN_LISTED, ORIGIN_FOREIGN };

/* Cuts scheme://host[:port]; the port is left out where it is the scheme's
 * own.  False: it is no origin. */
static bool
access_cut_origin(struct span text, struct span *scheme, struct span *host)
{
    struct span name;

    scheme->at = text.at;
    scheme->end = span_find(text, ':');
    if (!span_starts((struct span){ scheme->end, text.end }, "://"))
        return false;
    *host = (struct span){ scheme->end + 3, text.end };
    if (!span_cut_host(*host, &name))
        return false;
    if ((span_is_folded(*scheme, "http") && span_ends_folded(*host, ":80")) ||
        (span_is_folded(*scheme, "https") && span_ends_folded(*host, ":443")))
        host->end = span_find((struct span){ name.end, host->end }, ':');
    return true;
}

/* Is an origin listed, as a whole, by its host, or by "*"? */
static bool
access_origin_is_listed(const struct cfg *c, struct span scheme,
                        struct span host)
{
    struct span name, s, h;

    (void)span_cut_host(host, &name);
    for (unsigned i = 0; i < c->origin.count; i++) {
        struct span item = span_text(cfg_item(c, &c->origin, i));
        if (span_is(item, "*") || span_equals_folded(item, name) ||
            (access_cut_origin(item, &s, &h) && span_equals_folded(s, scheme) &&
             span_equals_folded(h, host)))
            return true;
    }
    return false;
}

/* Where does the page come from that makes this request?  No Origin: it is
 * not a browser's. */
static enum origin
access_origin(const struct cfg *c, const struct http *h)
{
    struct span scheme, host, name, ours;

    if (h->origins == 0)
        return ORIGIN_NONE;
    if (span_is(h->origin, "null"))
        return access_is_listed(c, &c->origin, h->origin) ? ORIGIN_LISTED
                                                          : ORIGIN_FOREIGN;
    if (!access_cut_origin(h->origin, &scheme, &host))
        return ORIGIN_FOREIGN;
    if (span_cut_host(host, &name) && span_cut_host(h->host, &ours) &&
        span_equals_folded(name, ours))
        return ORIGIN_SAME;
    return access_origin_is_listed(c, scheme, host) ? ORIGIN_LISTED
                                                    : ORIGIN_FOREIGN;
}

/* May this Origin or Host be repeated in a message as it is?  Whoever reads it
 * may paste it into a shell or see it as HTML. */
static bool
access_is_harmless(struct span origin)
{
    for (struct span s = origin; s.at < s.end; s.at++)
        if (!byte_is_digit(*s.at) &&
            !(byte_lower(*s.at) >= 'a' && byte_lower(*s.at) <= 'z') &&
            (*s.at == 0 || strchr("-._:/[]", *s.at) == NULL))
            return false;
    return span_len(origin) <= 128;
}

/* Why a foreign origin is refused, and what would let it in. */
static void
access_why_foreign(struct span origin, char *why, size_t size)
{
    if (!access_is_harmless(origin))
        (void)snprintf(why, size, "pages from this Origin may not do this, and "
                       "it cannot be listed by --origin");
    else
        (void)snprintf(why, size,
                       "pages from %.*s may not do this; to let them, add "
                       "--origin %.*s",
                       (int)span_len(origin), (const char *)origin.at,
                       (int)span_len(origin), (const char *)origin.at);
}

/* Why a Host is not answered, and what would change that. */
static void
access_why_host(struct span host, char *why, size_t size)
{
    struct span name;

    if (!access_is_harmless(host) || !span_cut_host(host, &name))
        (void)snprintf(why, size, "this server does not answer to this Host");
    else
        (void)snprintf(why, size,
                       "this server is not %.*s; if it should be, add --host "
                       "%.*s",
                       (int)span_len(name), (const char *)name.at,
                       (int)span_len(name), (const char *)name.at);
}

/* ===== 14  Documents =======================================================
 * What a document holds, and how it is kept.
 *
 * A document is not integrated: it is a snapshot and a tail of updates as they
 * came (chapter Tables draws them).  To accept an update costs a copy into the
 * tail, whatever the document's size; now and then the tail is merged into a
 * new snapshot.  The journal's file follows: what the tail got in a turn is
 * appended, mostly as one record, before any member sees it.
 *
 * All memory of documents is pages that count against --doc-memory.  Of that
 * as much is held back as compacting the costliest open document takes, so
 * that what has been accepted can always be made smaller.
 * ========================================================================= */

#define DOC_TAIL_MIN 65536       /* a shorter tail is not worth a merge */
#define DOC_LOG_MIN (256u << 10) /* a shorter log is not worth a compaction */
#define DOC_LEFT_LOG_MIN 4096u   /* ... nor is this when all have left */
#define DOC_IDLE_MS 5000         /* without an edit: the tail is merged */
#define DOC_RETRY_MS 2000        /* after a failure: until the next trial */
#define DOC_SYNC_MS 1000         /* what a power cut may take */
#define DOC_SYNC_MAX_MS 60000    /* ... with --write-budget */
#define DOC_CLIENTS_MAX 100000   /* ids that have ever written in it */
#define DOC_GAPS_MAX 4096        /* what came ahead of something missing */
#define DOC_LONG (1u << 20)      /* merged beside the turn */
#define DOC_GROW 65536           /* of the tail, while a file is read */
#define DOC_WINDOW (128u << 10)  /* to read a file through; longer if need be */
#define DOC_PIECE 65536          /* of a snapshot, in a record */
#define AWARE_MAX (1u << 20)     /* bytes of awareness, of a document */
#define AWARE_IDS_MAX 32         /* that one connection speaks for */
#define AWARE_CLOCK_MAX UINT32_MAX
#define AWARE_LIFE_MS 30000      /* without being renewed */

/* ----- memory ----------------------------------------------------------------- */

/* One page at least. */
static uint64_t
extent_round(uint64_t size)
{
    return size == 0 ? 4096 : (size + 4095) / 4096 * 4096;
}

/* What is left beyond what is held back. */
static uint64_t
extent_left(const struct collabd *s)
{
    uint64_t free = s->cfg->doc_memory - s->doc_used;

    return free > s->doc_reserve ? free - s->doc_reserve : 0;
}

/* Takes pages for at least so many bytes.  False: the machine or --doc-memory
 * has no more; `compacting` may use what is held back. */
static bool
extent_take(struct collabd *s, struct extent *e, uint64_t bytes,
            bool compacting)
{
    uint64_t size = extent_round(bytes);
    void *at;

    must(e->at == NULL);
    if (size > SIZE_MAX / 2 ||
        size > (compacting ? s->cfg->doc_memory - s->doc_used
                           : extent_left(s)))
        return false;
    at = sys.mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED)
        return false;
    *e = (struct extent){ at, (size_t)size };
    s->doc_used += size;
    return true;
}

static void
extent_give(struct collabd *s, struct extent *e)
{
    if (e->at == NULL)
        return;
    (void)munmap(e->at, e->size);
    s->doc_used -= e->size;
    *e = (struct extent){ NULL, 0 };
}

/* Makes an extent larger or smaller; its bytes stay.  False: as it was. */
static bool
extent_resize(struct collabd *s, struct extent *e, size_t bytes)
{
    size_t size = (size_t)extent_round(bytes);
    void *at;

    if (e->at == NULL)
        return extent_take(s, e, bytes, false);
    if (size == e->size)
        return true;
    if (size > e->size && size - e->size > extent_left(s))
        return false;
    at = sys.mremap(e->at, e->size, size, MREMAP_MAYMOVE);
    if (at == MAP_FAILED)
        return false;
    s->doc_used += size;
    s->doc_used -= e->size;
    *e = (struct extent){ at, size };
    return true;
}

/* As the words of --gc stand. */
static const enum y_gc doc_gc[] = { Y_GC_AUTO, Y_GC_FULL, Y_GC_OFF };

/* A cut puts a head before what follows it; two cuts for each deleted range. */
#define DOC_CUTS 82

/* What merging a document takes at most, besides what it has: room to work
 * and for the new snapshot; and what opening it takes more. */
static uint64_t
doc_cost(const struct collabd *s, const struct doc *d, uint64_t structs,
         uint64_t ranges, uint64_t clients, uint64_t bytes)
{
    uint64_t cuts = doc_gc[s->cfg->gc] == Y_GC_FULL ? d->ranges + ranges : 0;

    return extent_round(y_work_size(d->structs + structs, d->ranges + ranges,
                                    d->clients + clients)) +
           extent_round(d->now.len + d->tail_len + bytes + cuts * DOC_CUTS +
                        4096) +
           (s->data.fd >= 0 ? DOC_WINDOW + 2 * DOC_GROW : 0);
}

/* Holds back `cost`.  False: there is not so much. */
static bool
doc_hold_back(struct collabd *s, uint64_t cost)
{
    if (cost <= s->doc_reserve)
        return true;
    if (cost > s->cfg->doc_memory - s->doc_used)
        return false;
    s->doc_reserve = cost;
    return true;
}

/* A document has become smaller, or is gone: finds out how much is to be held
 * back now. */
static void
doc_hold_less(struct collabd *s)
{
    s->doc_reserve = 0;
    for (unsigned i = 0; i < s->rooms_fresh; i++) {
        const struct doc *d = &s->docs[i];
        uint64_t cost = d->state == DOC_OPEN ? doc_cost(s, d, 0, 0, 0, 0) : 0;
        if (cost > s->doc_reserve)
            s->doc_reserve = cost;
    }
}

/* ----- what is known ------------------------------------------------------------ */

static struct y_store
doc_store(const struct doc *d, size_t tail_len)
{
    return (struct y_store){
        .snapshot = span_of(d->now.memory.at, d->now.len),
        .snapshot_deletes_at = d->now.deletes_at,
        .tail = span_of(d->tail.at, tail_len)
    };
}

/* Sees to it that what an update brings finds a place in the tables of what is
 * known.  False: no memory. */
static bool
doc_grow_known(struct collabd *s, struct doc *d, uint64_t clients,
               uint64_t stretches)
{
    struct extent larger = { NULL, 0 };
    size_t slots;

    if (d->known.slots > 0 && y_known_fits(&d->known, clients, stretches))
        return true;
    slots = y_known_slots(d->known.used + clients,
                          d->known.n_islands + stretches);
    if (slots < 128)
        slots = 128; /* fills a page */
    if (!extent_take(s, &larger, y_known_bytes(slots), false))
        return false;
    y_known_move(&d->known, larger.at, slots);
    extent_give(s, &d->known_memory);
    d->known_memory = larger;
    return true;
}

/* Counts an update that the document holds from now on. */
static void
doc_count(struct doc *d, struct span update, const struct y_report *r)
{
    d->structs += r->structs;
    d->ranges += r->ranges;
    d->clients += r->clients;
    y_known_add(&d->known, update);
}

/* Learns anew what is known, from the snapshot and the tail.  False: no memory
 * for it; that cannot be if there was more before, so `grow` need not be. */
static bool
doc_recount(struct collabd *s, struct doc *d, bool grow)
{
    struct span run = span_of(d->tail.at, d->tail_len);
    struct span update = span_of(d->now.memory.at, d->now.len);
    struct y_report r;

    d->structs = d->ranges = d->clients = 0;
    y_known_clear(&d->known);
    if (span_is_empty(update) && !y_run_next(&run, &update))
        return true;
    do {
        must(y_check(update, &r));
        if (grow && !doc_grow_known(s, d, r.clients, r.stretches))
            return false;
        doc_count(d, update, &r);
    } while (y_run_next(&run, &update));
    return true;
}

/* ----- merging ------------------------------------------------------------------- */

static void
snapshot_give(struct collabd *s, struct snapshot *old)
{
    must(old->pins == 0);
    extent_give(s, &old->memory);
    *old = (struct snapshot){ .len = 0 };
}

/* The snapshot holds what the tail had before that point. */
static void
doc_cut_tail(struct doc *d, size_t merged, const struct y_result *result)
{
    size_t rest = d->tail_len - merged;
    struct span run, update;
    struct y_report r;

    must(merged <= d->shown);
    memmove(d->tail.at, d->tail.at + merged, rest);
    d->tail_len = rest;
    d->written -= merged;
    d->shown -= merged;
    if (d->job.kind == DOC_JOB_SYNC)
        d->job.mark = d->job.mark > merged ? d->job.mark - merged : 0;
    d->structs = result->structs;
    d->ranges = result->ranges;
    d->clients = result->clients;
    for (run = span_of(d->tail.at, rest); y_run_next(&run, &update);) {
        must(y_check(update, &r));
        d->structs += r.structs;
        d->ranges += r.ranges;
        d->clients += r.clients;
    }
}

/* Puts a new snapshot in the place of the old one.  Members that are being sent
 * that keep it pinned; there is at most one such. */
static void
doc_swap_snapshot(struct collabd *s, struct doc *d, struct extent fresh,
                  const struct y_result *result, size_t merged)
{
    if (d->now.pins > 0)
        d->before = d->now;
    else
        snapshot_give(s, &d->now);
    d->now = (struct snapshot){ .memory = fresh, .len = result->bytes,
                                .deletes_at = result->deletes_at };
    doc_cut_tail(d, merged, result);
    if (d->tail_len == 0)
        extent_give(s, &d->tail);
    else
        (void)extent_resize(s, &d->tail, d->tail_len);
    doc_hold_less(s);
    s->count.doc_merges++;
    d->merges++;
}

/* May what members see of the tail become part of a new snapshot now?  Not
 * while the old one is being written to a file, or merged. */
static bool
doc_may_merge(const struct doc *d)
{
    return d->before.memory.at == NULL &&
           !(d->job.busy && (d->job.kind == DOC_JOB_WRITE ||
                             d->job.kind == DOC_JOB_MERGE));
}

/* Merges what members may see of the tail into a new snapshot.  False: not
 * now. */
static bool
doc_merge(struct collabd *s, struct doc *d)
{
    struct extent work = { NULL, 0 }, fresh = { NULL, 0 };
    size_t merged = d->shown;
    struct y_store store = doc_store(d, merged);
    struct y_result result;
    struct out o;
    uint64_t began = sys_now_us();

    if (merged == 0)
        return true;
    if (!doc_may_merge(d) ||
        !extent_take(s, &work, y_work_size(d->structs, d->ranges, d->clients),
                     true))
        return false;
    if (y_merge(&store, doc_gc[s->cfg->gc],
                (struct y_work){ work.at, work.size }, &result) != Y_OK ||
        !extent_take(s, &fresh, result.bytes, d->now.pins == 0)) {
        extent_give(s, &work);
        return false;
    }
    o = out_over(fresh.at, result.bytes);
    y_write(&result, &o);
    must(!o.full && o.at == fresh.at + result.bytes);
    extent_give(s, &work);
    doc_swap_snapshot(s, d, fresh, &result, merged);
    began = sys_now_us() - began;
    if (began > s->count.doc_merge_us_max)
        s->count.doc_merge_us_max = began;
    return true;
}

/* So long that a merge would hold up the turn: a thread does it. */
static bool
doc_is_long(const struct doc *d)
{
    return d->now.len + d->shown > DOC_LONG;
}

/* Is the tail long enough to be merged? */
static bool
doc_wants_merge(const struct doc *d)
{
    return d->shown > DOC_TAIL_MIN && d->shown > d->now.len / 4;
}

/* ----- accepting ------------------------------------------------------------------ */

/* How long a document may become. */
static uint64_t
doc_most(const struct collabd *s)
{
    return s->cfg->max_doc > 0 ? s->cfg->max_doc : s->cfg->doc_memory / 4;
}

/* May a document grow by an update?  NULL: yes; else what forbids it. */
static const char *
doc_limit(const struct collabd *s, const struct doc *d, struct span update,
          const struct y_report *r)
{
    uint64_t most = doc_most(s), ahead, unknown;

    if (r->structs == 0)
        most += most / 8; /* deletions make room */
    if (d->now.len + d->tail_len + span_len(update) + 8 > most)
        return "the document is full (--max-doc)";
    y_known_news(&d->known, update, &ahead, &unknown);
    if (unknown > 0 && d->known.used + unknown > DOC_CLIENTS_MAX)
        return "too many clients have written in the document";
    if (ahead > 0 && d->known.n_islands + ahead > DOC_GAPS_MAX)
        return "the document has too many gaps";
    return NULL;
}

/* Makes room for an update.  False: there is no memory, nothing was changed. */
static bool
doc_ask(struct collabd *s, struct doc *d, const struct y_report *r, size_t len)
{
    size_t need = d->tail_len + len + 8, had = d->tail.size, size = had;

    if (size < 4096)
        size = 4096;
    while (size < need)
        size *= 2;
    if (!extent_resize(s, &d->tail, size) &&
        !extent_resize(s, &d->tail, need))
        return false;
    if (doc_grow_known(s, d, r->clients, r->stretches) &&
        doc_hold_back(s, doc_cost(s, d, r->structs, r->ranges, r->clients,
                                  len + 8)))
        return true;
    if (had > 0)
        (void)extent_resize(s, &d->tail, had);
    else
        extent_give(s, &d->tail);
    return false;
}

/* Takes an update into the tail; doc_ask has made room. */
static void
doc_append(struct doc *d, struct span update, const struct y_report *r)
{
    struct out o = out_over(d->tail.at + d->tail_len,
                            d->tail.size - d->tail_len);

    out_uint(&o, span_len(update));
    out_span(&o, update);
    must(!o.full);
    d->tail_len = (size_t)(o.at - d->tail.at);
    d->edited_ms = now_ms;
    doc_count(d, update, r);
}

/* What of an update is new, into `fresh`, whose length is *len: 0 if all of it
 * is known.  False: no memory. */
static bool
doc_minus(struct collabd *s, const struct doc *d, struct span update,
          const struct y_report *r, struct extent *fresh, size_t *len)
{
    struct extent work = { NULL, 0 };
    struct y_store store = doc_store(d, d->tail_len);
    struct y_result result;
    struct out o;
    bool good;

    if (!extent_take(s, &work, y_minus_size(&d->known, r, d->ranges),
                     true))
        return false;
    good = y_minus(&store, &d->known, update,
                   (struct y_work){ work.at, work.size }, &result) == Y_OK;
    *len = good && !result.empty ? result.bytes : 0;
    if (*len > 0)
        good = extent_take(s, fresh, *len, true);
    if (good && *len > 0) {
        o = out_over(fresh->at, *len);
        y_write(&result, &o);
        must(!o.full);
    }
    extent_give(s, &work);
    return good;
}

/* What a client that has `sv` lacks of what members may see, into `fresh`. */
static bool
doc_diff(struct collabd *s, const struct doc *d, struct span sv,
         struct extent *fresh, size_t *len)
{
    struct extent work = { NULL, 0 };
    struct y_store store = doc_store(d, d->shown);
    struct y_result result;
    struct out o;
    bool good;

    /* an entry of a state vector takes two bytes at least */
    if (!extent_take(s, &work,
                     y_work_size(d->structs, d->ranges,
                                         d->clients + span_len(sv) / 2),
                     true))
        return false;
    good = y_diff(&store, sv, (struct y_work){ work.at, work.size },
                  &result) == Y_OK &&
           extent_take(s, fresh, result.bytes, false);
    if (good) {
        *len = result.bytes;
        o = out_over(fresh->at, result.bytes);
        y_write(&result, &o);
        must(!o.full);
    }
    extent_give(s, &work);
    return good;
}

/* ----- awareness ------------------------------------------------------------------ */

/* Records stand on 8 bytes. */
static size_t
aware_size(const struct aware *a)
{
    return sizeof *a + a->room;
}

static struct aware *
aware_at(const struct doc *d, size_t at)
{
    return (struct aware *)(void *)(d->aware.at + at);
}

static struct span
aware_json(const struct aware *a)
{
    return span_of(a + 1, a->len);
}

static struct aware *
aware_find(const struct doc *d, uint64_t client)
{
    for (size_t at = 0; at < d->aware_len; at += aware_size(aware_at(d, at)))
        if (aware_at(d, at)->client == client)
            return aware_at(d, at);
    return NULL;
}

static void
aware_remove(struct doc *d, struct aware *a)
{
    uint8_t *at = (uint8_t *)a, *end = d->aware.at + d->aware_len;
    size_t size = aware_size(a);

    memmove(at, at + size, (size_t)(end - at) - size);
    d->aware_len -= size;
}

/* How many ids of a document one connection speaks for. */
static unsigned
aware_count(const struct doc *d, struct conn_id owner)
{
    unsigned n = 0;

    for (size_t at = 0; at < d->aware_len; at += aware_size(aware_at(d, at))) {
        const struct aware *a = aware_at(d, at);
        n += a->len > 0 && a->owner.slot == owner.slot &&
             a->owner.gen == owner.gen;
    }
    return n;
}

/* Remembers a state.  False: there is no room for it, all is as before. */
static bool
aware_set(struct collabd *s, struct doc *d, const struct y_aware *new,
          struct conn_id owner)
{
    size_t len = new->gone ? 0 : span_len(new->json);
    size_t room = (len + 7) / 8 * 8, size = d->aware_len + room;
    struct aware *a = aware_find(d, new->client);

    if (a == NULL || a->room < len) {
        size += sizeof *a;
        if (size > AWARE_MAX ||
            (size > d->aware.size && !extent_resize(s, &d->aware, size)))
            return false;
        a = aware_find(d, new->client); /* it may have moved */
        if (a != NULL)
            aware_remove(d, a);
        a = aware_at(d, d->aware_len);
        a->room = (uint32_t)room;
        d->aware_len += aware_size(a);
    }
    *a = (struct aware){ .client = new->client, .clock = new->clock,
                         .seen_ms = now_ms, .owner = owner,
                         .len = (uint32_t)len, .room = a->room };
    if (len > 0)
        memcpy(a + 1, new->json.at, len);
    return true;
}

enum aware_verdict {
    AWARE_OLD,  /* everybody knows that or better */
    AWARE_NEW,  /* to be relayed */
    AWARE_FULL
};

/* Judges one state as clients do (y-protocols): a higher clock wins; with an
 * equal one only `gone` says anything new.  A client that comes back announces
 * itself with the clock it left with, which nobody would believe: it is raised
 * here, and the client learns that from its own echo.  `itself`: the client
 * speaks of itself, while others only pass on what they were told. */
static enum aware_verdict
aware_judge(struct collabd *s, struct doc *d, struct y_aware *new,
            struct conn_id owner, bool itself)
{
    struct aware *a = aware_find(d, new->client);
    uint64_t known = a == NULL ? 0 : a->clock;

    if (new->clock > AWARE_CLOCK_MAX)
        return AWARE_OLD; /* nobody changed so often; it could not be raised */
    if (itself && a != NULL && a->len == 0 && !new->gone &&
        new->clock == known)
        new->clock++;
    if (itself && a != NULL && a->len > 0 && !new->gone && new->clock == known)
        a->owner = owner; /* the one before is a socket that was left behind */
    if (new->clock < known ||
        (new->clock == known && !(new->gone && a != NULL && a->len > 0)))
        return AWARE_OLD;
    if (!new->gone && (a == NULL || a->owner.slot != owner.slot ||
                       a->owner.gen != owner.gen) &&
        aware_count(d, owner) >= AWARE_IDS_MAX)
        return AWARE_FULL;
    if (a == NULL && new->gone)
        return AWARE_OLD;
    return aware_set(s, d, new, owner) ? AWARE_NEW : AWARE_FULL;
}

/* ----- opening and closing -------------------------------------------------------- */

/* One good update of a file. */
static bool
doc_take_old(struct collabd *s, struct doc *d, struct span update)
{
    struct y_report r;
    struct out o;

    if (!y_check(update, &r)) {
        d->aside = true;
        return true;
    }
    if (d->tail_len + span_len(update) + 8 > d->tail.size &&
        !extent_resize(s, &d->tail, d->tail_len + span_len(update) + DOC_GROW))
        return false;
    o = out_over(d->tail.at + d->tail_len, d->tail.size - d->tail_len);
    out_uint(&o, span_len(update));
    out_span(&o, update);
    must(!o.full);
    d->tail_len = d->written = d->shown = (size_t)(o.at - d->tail.at);
    d->structs += r.structs;
    d->ranges += r.ranges;
    d->clients += r.clients;
    return true;
}

enum doc_opened { DOC_OPENED, DOC_UNREADABLE, DOC_NO_MEMORY, DOC_LONG_RECORD };

/* Takes all records of a file: first the snapshot's pieces together, then the
 * log, merged whenever the tail has become long. */
static enum doc_opened
doc_read_file(struct collabd *s, struct doc *d, struct jrnl_reader *r)
{
    struct jrnl_record rec;
    enum jrnl_found found;
    struct span update;

    while ((found = jrnl_next(r, &rec)) > JRNL_END) {
        if (found == JRNL_DAMAGE)
            continue;
        if (rec.payload.at == NULL)
            return DOC_LONG_RECORD;
        if (rec.kind == JRNL_UPDATES) {
            if ((d->log_bytes == 0 || doc_wants_merge(d)) && !doc_merge(s, d))
                return DOC_NO_MEMORY;
            d->log_bytes += rec.to - rec.from;
        }
        while (y_run_next(&rec.payload, &update))
            if (!doc_take_old(s, d, update))
                return DOC_NO_MEMORY;
        d->aside |= !span_is_empty(rec.payload);
    }
    if (found == JRNL_ERROR)
        return DOC_UNREADABLE;
    return doc_merge(s, d) ? DOC_OPENED : DOC_NO_MEMORY;
}

/* Reads a document's file into a snapshot, through a window of that size. */
static enum doc_opened
doc_load(struct collabd *s, struct doc *d, uint64_t window)
{
    struct extent lent = { NULL, 0 };
    enum doc_opened how = DOC_UNREADABLE;
    struct jrnl_reader r;

    if (window > d->file.end)
        window = d->file.end;
    if (!extent_take(s, &lent, window + JRNL_LENT_MIN, true))
        return DOC_NO_MEMORY;
    if (jrnl_read(&r, &d->file, lent.at, lent.size) == 0)
        how = doc_read_file(s, d, &r);
    extent_give(s, &lent);
    if (how != DOC_OPENED)
        return how;
    (void)jrnl_resume(&d->file, &r);
    d->aside |= d->file.damaged;
    if (r.size == 0)
        jrnl_close(&d->file); /* a crash left it empty: as if there were none */
    return doc_recount(s, d, true) &&
                   doc_hold_back(s, doc_cost(s, d, 0, 0, 0, 0))
               ? DOC_OPENED
               : DOC_NO_MEMORY;
}

/* Gives all back that a document has in memory. */
static void
doc_close(struct collabd *s, struct doc *d)
{
    extent_give(s, &d->now.memory);
    extent_give(s, &d->before.memory);
    extent_give(s, &d->tail);
    extent_give(s, &d->known_memory);
    extent_give(s, &d->aware);
    jrnl_close(&d->file);
    d->state = DOC_CLOSED;
    doc_hold_less(s);
}

/* Opens a document's file and what is in it. */
static enum doc_opened
doc_open_file(struct collabd *s, struct doc *d, struct span name,
              uint64_t window)
{
    *d = (struct doc){ .state = DOC_OPEN, .file = JRNL_CLOSED,
                       .job.fresh = JRNL_CLOSED, .edited_ms = now_ms };
    d->file.name = name;
    (void)sys_random(&d->known.seed, sizeof d->known.seed);
    if (s->data.fd >= 0 &&
        jrnl_open(&s->data, name, s->data.lock >= 0, &d->file) != 0 &&
        errno != ENOENT)
        return DOC_UNREADABLE;
    if (!doc_grow_known(s, d, 1, 1))
        return DOC_NO_MEMORY;
    return d->file.fd >= 0 ? doc_load(s, d, window) : DOC_OPENED;
}

/* Opens a document, from its file if it has one.  The name is borrowed as long
 * as it is open. */
static enum doc_opened
doc_open(struct collabd *s, struct doc *d, struct span name)
{
    uint64_t began = sys_now_us(), window = DOC_WINDOW;
    enum doc_opened how;

    must(d->state == DOC_CLOSED);
    how = doc_open_file(s, d, name, window);
    while (how == DOC_LONG_RECORD) {
        doc_close(s, d);
        window *= 8;
        how = doc_open_file(s, d, name, window);
    }
    if (how == DOC_NO_MEMORY)
        log_say(LOG_LEVEL_WARNING, "document %.*s: to open it takes more "
                "memory than there is; raise --doc-memory",
                (int)span_len(name), (const char *)name.at);
    if (how != DOC_OPENED)
        doc_close(s, d);
    began = sys_now_us() - began;
    if (began > s->count.doc_load_us_max)
        s->count.doc_load_us_max = began;
    return how;
}

/* May it be closed without losing anything?  A file that failed is still to be
 * written anew. */
static bool
doc_is_idle(const struct collabd *s, const struct doc *d)
{
    return d->written == d->tail_len && d->sync_at == 0 && !d->job.busy &&
           d->now.pins == 0 && d->before.pins == 0 &&
           (!d->file.broken || s->data.lock < 0);
}

/* ----- keeping ---------------------------------------------------------------------- */

/* How long written bytes may stay where a power cut loses them: longer as the
 * hour's budget is used up. */
static int64_t
doc_sync_delay(struct collabd *s)
{
    uint64_t budget = s->cfg->write_budget, used;

    if (budget == 0)
        return DOC_SYNC_MS;
    if (now_ms - s->budget_ms >= 3600000) {
        s->budget_ms = now_ms;
        s->budget_from = s->count.journal_bytes;
    }
    used = s->count.journal_bytes - s->budget_from;
    if (used >= budget)
        return DOC_SYNC_MAX_MS;
    return DOC_SYNC_MS +
           (int64_t)(used * (DOC_SYNC_MAX_MS - DOC_SYNC_MS) / budget);
}

/* The document's first file.  It gets its name at once, as a crash of ours
 * must not lose it; the folder is synced with the file. */
static bool
doc_make_file(struct collabd *s, struct doc *d)
{
    ssize_t n = jrnl_create(&s->data, d->file.name, &d->file);

    if (n < 0)
        return false;
    s->count.journal_bytes += (uint64_t)n;
    if (jrnl_rename(&s->data, &d->file, false) != 0) {
        jrnl_discard(&s->data, &d->file);
        return false;
    }
    d->folder_dirty = true;
    return true;
}

/* The end of the updates of the tail that make up a record: as many as go into
 * a piece, one at least. */
static size_t
doc_record_end(const struct doc *d, size_t from, size_t to)
{
    struct span run = span_of(d->tail.at + from, to - from), update;
    size_t end = from;

    if (to - from <= DOC_PIECE)
        return to;
    while (y_run_next(&run, &update) &&
           (end == from ||
            (size_t)(update.end - d->tail.at) - from <= DOC_PIECE))
        end = (size_t)(update.end - d->tail.at);
    return end;
}

/* Appends a part of the tail to a file, in records that a small window can
 * hold. */
static bool
doc_write(struct collabd *s, struct jrnl_file *f, const struct doc *d,
          size_t from, size_t to)
{
    while (from < to) {
        size_t end = doc_record_end(d, from, to);
        ssize_t n = jrnl_append(f, JRNL_UPDATES,
                                span_of(d->tail.at + from, end - from));
        if (n < 0)
            return false;
        s->count.journal_bytes += (uint64_t)n;
        from = end;
    }
    return true;
}

/* Brings what the tail got since last time into the journal; while a new file
 * waits to take the old one's place, into both.  False: it cannot be kept. */
static bool
doc_commit(struct collabd *s, struct doc *d)
{
    if (d->written < d->tail_len && s->data.fd >= 0) {
        uint64_t before, began = sys_now_us();
        if (d->file.fd < 0 && !doc_make_file(s, d))
            return false;
        before = d->file.end;
        if (!doc_write(s, &d->file, d, d->written, d->tail_len) ||
            (d->job.kind == DOC_JOB_INSTALL && d->job.fresh.fd >= 0 &&
             !doc_write(s, &d->job.fresh, d, d->written, d->tail_len)))
            return false;
        began = sys_now_us() - began;
        if (began > s->count.journal_write_us_max)
            s->count.journal_write_us_max = began;
        d->log_bytes += d->file.end - before;
        s->count.journal_commits++;
        if (d->sync_at == 0)
            d->sync_at = now_ms + doc_sync_delay(s);
    }
    d->written = d->tail_len;
    if (!s->cfg->fsync || s->data.fd < 0)
        d->shown = d->written;
    return true;
}

/* Forgets what members have not seen: the journal could not keep it. */
static void
doc_take_back(struct collabd *s, struct doc *d)
{
    if (d->tail_len - d->shown > d->wanted_len)
        d->wanted_len = d->tail_len - d->shown;
    d->tail_len = d->written = d->shown;
    if (d->job.kind == DOC_JOB_SYNC) { /* one in flight shows nothing more */
        d->job.mark = 0;
        d->job.entry = 0;
    }
    must(doc_recount(s, d, false));
    d->retry_ms = now_ms + DOC_RETRY_MS;
}

/* Tries whether the disk takes as much again as it refused, and cuts that off
 * at once.  A file that must not be used any more is first written anew. */
static bool
doc_trial(struct collabd *s, struct doc *d)
{
    size_t most = d->known_memory.size;
    struct span bytes = span_of(d->known_memory.at,
                                d->wanted_len < most ? d->wanted_len : most);
    struct jrnl_file copy;
    bool good;

    d->retry_ms = now_ms + DOC_RETRY_MS;
    if ((s->data.lock < 0 && jrnl_folder_lock(&s->data) != 0) ||
        (d->file.fd < 0 && !doc_make_file(s, d)) || d->file.broken)
        return false;
    copy = d->file;
    good = jrnl_append(&copy, JRNL_TRIAL, bytes) > 0;
    if (good && sys.ftruncate(d->file.fd, (off_t)d->file.end) != 0)
        copy.broken = true;
    d->file.broken = copy.broken;
    d->file.refused = copy.refused && !good;
    if (copy.broken || !good)
        return false;
    d->retry_ms = 0;
    d->wanted_len = 0;
    return true;
}

/* ----- work beside the turn --------------------------------------------------------- */

/* Writes a snapshot into a new file, in pieces that are legal alone. */
static int
doc_write_pieces(struct doc_job *j)
{
    struct y_pieces pieces = y_pieces(j->snapshot, DOC_PIECE, false), next;
    size_t len;

    while (next = pieces, (len = y_pieces_next(&next, NULL)) > 0) {
        struct out o = out_over(j->buffer.at, j->buffer.size);
        out_uint(&o, len);
        (void)y_pieces_next(&pieces, &o);
        if (o.full) {
            errno = EMSGSIZE;
            return jrnl_fail(j->fresh.name, "has a struct that is too long");
        }
        if (jrnl_append(&j->fresh, JRNL_SNAPSHOT,
                        (struct span){ j->buffer.at, o.at }) < 0)
            return -1;
    }
    /* what follows a piece shows that damage in it is no torn tail */
    if (jrnl_append(&j->fresh, JRNL_UPDATES, span_of("", 0)) < 0)
        return -1;
    return jrnl_sync(&j->fresh);
}

/* Makes the next snapshot.  The turn has counted memory for it, but how much it
 * takes is known only now. */
static int
doc_merge_beside(struct doc_job *j)
{
    size_t size;
    struct out o;
    void *at;

    if (y_merge(&j->store, j->gc, (struct y_work){ j->bench.at, j->bench.size },
                &j->merged) != Y_OK)
        return -1;
    size = (size_t)extent_round(j->merged.bytes);
    at = size > j->promised
             ? MAP_FAILED
             : sys.mmap(NULL, size, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED)
        return -1;
    j->result = (struct extent){ at, size };
    o = out_over(at, j->merged.bytes);
    y_write(&j->merged, &o);
    must(!o.full);
    return 0;
}

static void
doc_job_run(struct work *w)
{
    struct doc_job *j = (struct doc_job *)w;

    switch (j->kind) {
    case DOC_JOB_SYNC:
        j->answer = jrnl_sync(&j->file);
        if (j->answer == 0 && j->folder_dirty)
            j->answer = jrnl_sync_folder(j->folder.fd);
        break;
    case DOC_JOB_MERGE:
        j->answer = doc_merge_beside(j);
        break;
    case DOC_JOB_WRITE:
        j->answer = doc_write_pieces(j);
        break;
    case DOC_JOB_INSTALL:
        j->answer = jrnl_sync(&j->fresh);
        j->unsure = j->answer == 0;
        if (j->unsure)
            j->answer = jrnl_install(&j->folder, &j->fresh, j->keep_old);
        break;
    }
}

/* Hands the job to the thread, or does it here if there is none. */
static void
doc_post(struct collabd *s, struct doc *d, enum doc_job_kind kind,
         void (*done)(struct collabd *, struct work *))
{
    struct doc_job *j = &d->job;

    must(!j->busy);
    j->busy = true;
    j->kind = kind;
    j->folder = s->data;
    j->work.run = doc_job_run;
    j->work.done = done;
    if (!work_post(&s->work, kind == DOC_JOB_MERGE ? WORK_MERGE : WORK_DISK,
                   &j->work)) {
        doc_job_run(&j->work);
        done(s, &j->work);
    }
}

/* Begins to merge beside the turn; the thread gets a copy of the tail, as that
 * may grow and move meanwhile.  False: not now. */
static bool
doc_merge_begin(struct collabd *s, struct doc *d,
                void (*done)(struct collabd *, struct work *))
{
    struct doc_job *j = &d->job;
    uint64_t most;

    if (d->shown == 0)
        return true;
    if (j->busy || !doc_may_merge(d) ||
        !extent_take(s, &j->bench, y_work_size(d->structs, d->ranges,
                                              d->clients), true))
        return false;
    most = doc_cost(s, d, 0, 0, 0, 0) - j->bench.size;
    if (!extent_take(s, &j->buffer, d->shown, true) ||
        most > s->cfg->doc_memory - s->doc_used) {
        extent_give(s, &j->buffer);
        extent_give(s, &j->bench);
        return false;
    }
    memcpy(j->buffer.at, d->tail.at, d->shown);
    j->promised = most;
    s->doc_used += most;
    j->mark = d->shown;
    j->store = doc_store(d, d->shown);
    j->store.tail = span_of(j->buffer.at, d->shown);
    j->gc = doc_gc[s->cfg->gc];
    d->now.pins++;
    doc_post(s, d, DOC_JOB_MERGE, done);
    return true;
}

static void
doc_merge_end(struct collabd *s, struct doc *d)
{
    struct doc_job *j = &d->job;
    struct extent fresh = j->result;
    size_t merged = j->mark;

    extent_give(s, &j->buffer);
    extent_give(s, &j->bench);
    s->doc_used -= j->promised;
    j->mark = 0;
    d->now.pins--;
    j->result = (struct extent){ NULL, 0 };
    if (j->answer != 0)
        return;
    s->doc_used += fresh.size;
    doc_swap_snapshot(s, d, fresh, &j->merged, merged);
    d->merged_entry = j->entry;
}

/* Is the file to be written anew? */
static bool
doc_wants_compaction(const struct collabd *s, const struct doc *d, bool left)
{
    uint64_t snapshot = d->now.len, log = d->log_bytes;

    if (d->file.fd < 0 || s->data.lock < 0)
        return false;
    if (d->file.broken || d->aside)
        return true;
    if (left && doc_gc[s->cfg->gc] == Y_GC_FULL)
        return log > JRNL_HEAD; /* nothing deleted stays on the disk */
    if (left)
        return log > DOC_LEFT_LOG_MIN && log > snapshot / 16;
    return log > DOC_LOG_MIN && log > 2 * snapshot;
}

/* Begins to write the document anew.  False: not now. */
static bool
doc_compact(struct collabd *s, struct doc *d,
            void (*done)(struct collabd *, struct work *))
{
    struct doc_job *j = &d->job;
    struct y_pieces pieces;
    size_t most = 0, len;

    if (j->busy || (!doc_is_long(d) && !doc_merge(s, d)))
        return false;
    pieces = y_pieces(span_of(d->now.memory.at, d->now.len), DOC_PIECE, false);
    for (; (len = y_pieces_next(&pieces, NULL)) > 0;)
        most = len > most ? len : most;
    if (!extent_take(s, &j->buffer, most + 8, true))
        return false;
    j->fresh = (struct jrnl_file){ .fd = -1, .refused = d->file.refused };
    if (jrnl_create(&s->data, d->file.name, &j->fresh) < 0) {
        d->file.refused = j->fresh.refused;
        extent_give(s, &j->buffer);
        return false;
    }
    j->snapshot = span_of(d->now.memory.at, d->now.len);
    j->keep_old = d->aside;
    d->now.pins++;
    doc_post(s, d, DOC_JOB_WRITE, done);
    return true;
}

/* Begins a sync of what has been written. */
static void
doc_sync(struct collabd *s, struct doc *d,
         void (*done)(struct collabd *, struct work *))
{
    d->job.file = d->file;
    d->job.folder_dirty = d->folder_dirty;
    d->job.mark = d->written;
    d->sync_at = 0;
    doc_post(s, d, DOC_JOB_SYNC, done);
}

static void
doc_drop_fresh(struct collabd *s, struct doc *d)
{
    jrnl_discard(&s->data, &d->job.fresh);
    d->retry_ms = d->file.broken ? now_ms + DOC_RETRY_MS : d->retry_ms;
}

/* The new file has taken the old one's place. */
static void
doc_swap_files(struct doc *d)
{
    struct span name = d->file.name;

    jrnl_close(&d->file);
    d->file = d->job.fresh;
    d->file.name = name;
    d->job.fresh = (struct jrnl_file)JRNL_CLOSED;
    d->log_bytes = d->file.end - d->job.base;
    d->aside = d->folder_dirty = false;
    if (d->retry_ms > 0)
        d->retry_ms = now_ms; /* the disk takes something again */
}

/* What a job came to.  False: what members have not seen is to be taken
 * back. */
static bool
doc_job_done(struct collabd *s, struct doc *d,
             void (*done)(struct collabd *, struct work *))
{
    struct doc_job *j = &d->job;

    must(j->busy);
    j->busy = false;
    switch (j->kind) {
    case DOC_JOB_SYNC:
        s->count.journal_syncs++;
        s->count.journal_synced_ms = now_ms;
        jrnl_synced(&d->file, j->file.end, j->answer);
        if (j->answer != 0)
            return false;
        d->folder_dirty &= !j->folder_dirty;
        d->shown = j->mark > d->shown ? j->mark : d->shown;
        if (d->written > d->shown && d->sync_at == 0)
            d->sync_at = now_ms; /* --fsync always: more has come */
        return true;
    case DOC_JOB_MERGE:
        doc_merge_end(s, d);
        return true;
    case DOC_JOB_WRITE:
        extent_give(s, &j->buffer);
        d->now.pins--;
        s->count.journal_bytes += j->fresh.end;
        j->base = j->fresh.end;
        if (j->answer != 0 ||
            !doc_write(s, &j->fresh, d, 0, d->written)) {
            doc_drop_fresh(s, d);
            return true;
        }
        doc_post(s, d, DOC_JOB_INSTALL, done);
        return true;
    case DOC_JOB_INSTALL:
        if (j->answer != 0) {
            d->file.broken |= j->unsure;
            doc_drop_fresh(s, d);
            return true;
        }
        s->count.doc_compactions++;
        doc_swap_files(d);
        return true;
    }
    return true;
}

/* ----- invariants -------------------------------------------------------------------- */

/* Is that known, and as one stretch? */
static bool
doc_knows(const struct doc *d, struct y_stretch s)
{
    const struct y_known_client *c = y_known_get(&d->known, s.client);
    size_t i = y_known_island(&d->known, s.client, s.to);

    if (c == NULL || s.to > c->end)
        return false;
    return s.to <= c->next || (i < d->known.n_islands &&
                               d->known.islands[i].client == s.client &&
                               d->known.islands[i].from <= s.from);
}

/* Units of clients that are known: nothing in a document is there twice. */
static uint64_t
doc_known_units(const struct doc *d)
{
    uint64_t units = 0;

    for (size_t i = 0; i < d->known.slots; i++)
        units += d->known.at[i].next;
    for (size_t i = 0; i < d->known.n_islands; i++)
        units += d->known.islands[i].to - d->known.islands[i].from;
    return units;
}

static void
doc_check(const struct collabd *s, const struct doc *d)
{
    struct span run = span_of(d->tail.at, d->tail_len);
    struct span update = span_of(d->now.memory.at, d->now.len);
    uint64_t structs = 0, ranges = 0, clients = 0, units = 0;
    struct y_report r;
    bool more = !span_is_empty(update) || y_run_next(&run, &update);

    must(d->shown <= d->written && d->written <= d->tail_len);
    must(d->tail_len <= d->tail.size && d->now.len <= d->now.memory.size);
    must((d->before.memory.at != NULL) == (d->before.pins > 0));
    must(d->job.busy ||
         (d->job.buffer.at == NULL && d->job.bench.at == NULL));
    must(d->tail_len == 0 || doc_cost(s, d, 0, 0, 0, 0) <= s->doc_reserve);
    for (; more; more = y_run_next(&run, &update)) {
        struct y_walk w = y_walk(update);
        struct y_stretch stretch;
        must(y_check(update, &r));
        structs += r.structs;
        ranges += r.ranges;
        clients += r.clients;
        for (; y_walk_stretch(&w, &stretch); units += stretch.to - stretch.from)
            must(doc_knows(d, stretch));
    }
    must(span_is_empty(run) && units == doc_known_units(d));
    must(structs == d->structs && ranges == d->ranges && clients == d->clients);
}

/* Bytes of all it has in memory. */
static uint64_t
doc_extents(const struct doc *d)
{
    return d->now.memory.size + d->before.memory.size + d->tail.size +
           d->known_memory.size + d->aware.size + d->job.buffer.size +
           d->job.bench.size +
           (d->job.busy && d->job.kind == DOC_JOB_MERGE ? d->job.promised : 0);
}
/* ===== 15  Rooms ===========================================================
 * Who shares what, and the fan-out: publish once, read by cursor.
 *
 * A room is a ring and its members.  Publishing copies one frame into the ring
 * and moves its head; nothing is done per member.  Each member's output is
 * gathered from its cursor to the head, straight out of the ring, stepping
 * over its own entries.  This chapter knows no sockets: it says what to send,
 * and is told how much of it was taken.
 *
 * A frame longer than a quarter ring stays in message memory and is counted:
 * by its members that have not passed it, and gone with the last.
 * ========================================================================= */

#define ROOM_STALL_MS 2000       /* a laggard that has not moved for so long */
#define ROOM_HOLD_MS 5000        /* so long a member may slow a room ... */
#define ROOM_HOLD_WINDOW_MS 60000 /* ... within so long */

/* A healthy reader in a burst is a laggard for a moment, and whether it is
 * one of few or of most is chance: while it moves this quickly, it may slow
 * its room for so long alone. */
#define ROOM_BURST_STALL_MS 100
#define ROOM_BURST_HOLD_MS 1000

static uint32_t
room_hash(enum room_kind kind, struct span name)
{
    uint32_t h = 2166136261u + (uint32_t)kind; /* FNV-1a */

    for (; name.at < name.end; name.at++)
        h = (h ^ *name.at) * 16777619u;
    return h;
}

static uint16_t *
room_bucket(struct collabd *s, enum room_kind kind, struct span name)
{
    return &s->buckets[room_hash(kind, name) & (s->bucket_count - 1)];
}

static struct span
room_name(const struct room *room)
{
    return span_of(room->name, room->name_len);
}

static uint16_t
room_slot(const struct collabd *s, const struct room *room)
{
    return (uint16_t)(room - s->rooms);
}

/* What a document's room is about. */
static struct doc *
room_doc(const struct collabd *s, const struct room *room)
{
    must(room->kind == ROOM_DOCUMENT);
    return &s->docs[room_slot(s, room)];
}

/* May an empty room's slot be taken from it?  Nothing of a document may be in
 * memory alone. */
static bool
room_may_close(const struct collabd *s, const struct room *room)
{
    const struct doc *d;

    if (room->kind != ROOM_DOCUMENT)
        return true;
    d = room_doc(s, room);
    return doc_is_idle(s, d) &&
           (s->data.fd >= 0 || d->now.len + d->tail_len == 0);
}

static void
room_empty_remove(struct collabd *s, struct room *room)
{
    *(room->prev == NONE ? &s->empty_first : &s->rooms[room->prev].next) =
        room->next;
    *(room->next == NONE ? &s->empty_last : &s->rooms[room->next].prev) =
        room->prev;
    room->prev = room->next = NONE;
}

static void
room_empty_add(struct collabd *s, struct room *room)
{
    room->prev = s->empty_last;
    room->next = NONE;
    *(s->empty_last == NONE ? &s->empty_first
                            : &s->rooms[s->empty_last].next) =
        room_slot(s, room);
    s->empty_last = room_slot(s, room);
}

static void
room_forget_block(struct collabd *s, struct room *room, struct entry *e)
{
    if (e->kind != RING_BLOCK || e->block == NONE32)
        return;
    chunk_free_chain(&s->chunks, e->block);
    room->block_bytes -= e->len;
    e->block = NONE32;
}

static void
room_drop_oldest(struct collabd *s, struct room *room)
{
    room_forget_block(s, room, ring_entry(&room->ring, room->ring.tail));
    ring_drop(&room->ring);
}

/* Gives an empty room's slot up. */
static void
room_close(struct collabd *s, struct room *room)
{
    uint16_t *link = room_bucket(s, room->kind, room_name(room));

    must(room->count == 0);
    if (room->kind == ROOM_DOCUMENT && room_doc(s, room)->state != DOC_CLOSED)
        doc_close(s, room_doc(s, room));
    if (room->dirty) { /* it was still gathering for members that left */
        uint16_t *dirty = &s->dirty_first;
        while (*dirty != room_slot(s, room))
            dirty = &s->rooms[*dirty].dirty_next;
        *dirty = room->dirty_next;
    }
    while (room->ring.tail < room->ring.head)
        room_drop_oldest(s, room);
    while (*link != room_slot(s, room))
        link = &s->rooms[*link].bucket_next;
    *link = room->bucket_next;
    room_empty_remove(s, room);
    room->used = false;
    room->next = s->rooms_free;
    s->rooms_free = room_slot(s, room);
    s->rooms_used--;
}

static struct room *
room_find(struct collabd *s, enum room_kind kind, struct span name)
{
    uint16_t slot = *room_bucket(s, kind, name);

    while (slot != NONE && (s->rooms[slot].kind != kind ||
                            !span_equals(room_name(&s->rooms[slot]), name)))
        slot = s->rooms[slot].bucket_next;
    return slot == NONE ? NULL : &s->rooms[slot];
}

/* Closes the room, or only a document, that has been empty for longest.
 * False: there is none that may be closed. */
static bool
room_close_oldest(struct collabd *s, bool document)
{
    uint16_t slot = s->empty_first;

    while (slot != NONE &&
           (!room_may_close(s, &s->rooms[slot]) ||
            (document && (s->rooms[slot].kind != ROOM_DOCUMENT ||
                          s->docs[slot].state == DOC_CLOSED))))
        slot = s->rooms[slot].next;
    if (slot == NONE)
        return false;
    room_close(s, &s->rooms[slot]);
    return true;
}

/* The room of that name, made if need be: in a free slot, else in that of the
 * room that has been empty for longest.  NULL: all are in use. */
static struct room *
room_open(struct collabd *s, enum room_kind kind, struct span name)
{
    struct room *room = room_find(s, kind, name);
    uint16_t *bucket, slot;

    if (room != NULL)
        return room;
    if (s->rooms_free == NONE && s->rooms_fresh == s->rooms_max &&
        !room_close_oldest(s, false))
        return NULL;
    slot = s->rooms_free;
    if (slot != NONE)
        s->rooms_free = s->rooms[slot].next;
    else
        slot = (uint16_t)s->rooms_fresh++;
    room = &s->rooms[slot];
    *room = (struct room){
        .ring = { .bytes = s->ring_bytes + slot * s->cfg->ring,
                  .entries = s->ring_entries +
                             slot * (s->cfg->ring / RING_CHARGE),
                  .size = s->cfg->ring },
        .first = NONE, .prev = NONE, .next = NONE, .dirty_next = NONE,
        .used = true, .kind = kind, .name_len = (uint8_t)span_len(name),
        .flushed_ms = now_ms - 1000,
    };
    memcpy(room->name, name.at, span_len(name));
    bucket = room_bucket(s, kind, name);
    room->bucket_next = *bucket;
    *bucket = slot;
    s->rooms_used++;
    room_empty_add(s, room);
    return room;
}

/* How far back a new member may begin that asks for the last n entries: not
 * behind the tail, a quarter ring, or a block. */
static uint64_t
room_history(const struct room *room, uint64_t n)
{
    const struct ring *r = &room->ring;
    uint64_t entry = r->shown;

    while (n-- > 0 && entry > r->tail && entry > room->blocks_until &&
           r->pos - ring_entry(r, entry - 1)->pos <= r->size / 4)
        entry--;
    return entry;
}

/* Is this entry not for that connection? */
static bool
room_is_own(const struct entry *e, const struct conn *c)
{
    return !c->in.echo && e->from.slot == c->id.slot &&
           e->from.gen == c->id.gen;
}

/* Sets a member's cursor. */
static void
room_enter(struct collabd *s, struct room *room, struct conn *c,
           uint64_t entry)
{
    (void)s;
    c->in.entry = entry;
    c->in.off = 0;
    c->in.own = 0;
    c->in.outside = false;
    c->in.moved_ms = now_ms;
    for (uint64_t i = entry; i < room->ring.head; i++)
        if (room_is_own(ring_entry(&room->ring, i), c))
            c->in.own += ring_charge(ring_entry(&room->ring, i)->len);
    if (room->count == room->outside || entry < room->slowest)
        room->slowest = entry;
}

/* A new member; one that is `outside` gets nothing of the ring until it is
 * let in. */
static void
room_join(struct collabd *s, struct room *room, struct conn *c, bool echo,
          uint64_t history, bool outside)
{
    must(c->in.room == NONE);
    if (room->count == 0)
        room_empty_remove(s, room);
    c->in = (struct member){ .room = room_slot(s, room), .prev = NONE,
                             .next = room->first, .echo = echo };
    if (outside)
        room->outside++;
    else
        room_enter(s, room, c, room_history(room, history));
    c->in.outside = outside;
    c->in.moved_ms = now_ms;
    if (room->first != NONE)
        s->conns[room->first].in.prev = c->id.slot;
    room->first = c->id.slot;
    room->count++;
}

/* Lets a member in whose first sync holds all before that entry; from now on it
 * counts for the blocks ahead.  False: the ring no longer has all that
 * followed. */
static bool
room_let_in(struct collabd *s, struct room *room, struct conn *c,
            uint64_t entry)
{
    must(c->in.outside);
    if (entry < room->ring.tail)
        return false;
    for (uint64_t i = entry; i < room->blocks_until; i++) {
        const struct entry *e = ring_entry(&room->ring, i);
        if (e->kind == RING_BLOCK && e->block == NONE32 && !room_is_own(e, c))
            return false;
    }
    room_enter(s, room, c, entry);
    for (uint64_t i = entry; i < room->blocks_until; i++) {
        struct entry *e = ring_entry(&room->ring, i);
        e->refs = (uint16_t)(e->refs + (e->kind == RING_BLOCK &&
                                        !room_is_own(e, c)));
    }
    room->outside--;
    return true;
}

/* One member passes an entry. */
static void
room_pass(struct collabd *s, struct room *room, struct conn *c,
          struct entry *e)
{
    if (room_is_own(e, c)) {
        c->in.own -= ring_charge(e->len);
    } else if (e->kind == RING_BLOCK && e->block != NONE32) {
        must(e->refs > 0);
        if (--e->refs == 0)
            room_forget_block(s, room, e);
    }
}

static void
room_leave(struct collabd *s, struct conn *c)
{
    struct room *room;

    if (c->in.room == NONE)
        return;
    room = &s->rooms[c->in.room];
    if (c->in.outside) {
        room->outside--;
    } else if (c->in.entry < room->blocks_until) {
        uint64_t i = c->in.entry > room->ring.tail ? c->in.entry
                                                   : room->ring.tail;
        c->in.own = UINT64_MAX; /* no longer kept */
        for (; i < room->blocks_until; i++)
            room_pass(s, room, c, ring_entry(&room->ring, i));
    }
    if (c->in.prev == NONE)
        room->first = c->in.next;
    else
        s->conns[c->in.prev].in.next = c->in.next;
    if (c->in.next != NONE)
        s->conns[c->in.next].in.prev = c->in.prev;
    c->in.room = NONE;
    if (--room->count == 0) {
        room->held = false;
        room_empty_add(s, room);
    }
}

/* The ring's tail has moved over the lower bound of all cursors: finds the
 * new one, and who was overtaken. */
static void
room_find_slowest(struct collabd *s, struct room *room)
{
    room->slowest = room->ring.head;
    for (uint16_t m = room->first; m != NONE; m = s->conns[m].in.next) {
        struct member *in = &s->conns[m].in;
        if (in->overtaken || in->outside)
            continue;
        if (in->entry < room->ring.tail)
            in->overtaken = room->overtook = true;
        else if (in->entry < room->slowest)
            room->slowest = in->entry;
    }
}

/* Makes room for a frame of n bytes, in the ring or as a block. */
static void
room_make_room(struct collabd *s, struct room *room, uint64_t n, bool block)
{
    while (!ring_fits(&room->ring, block ? 0 : n) ||
           (block && room->block_bytes + n > s->block_budget))
        room_drop_oldest(s, room);
    if (room->ring.tail > room->slowest)
        room_find_slowest(s, room);
}

static void
room_mark_dirty(struct collabd *s, struct room *room)
{
    if (room->dirty)
        return;
    room->dirty = true;
    room->dirty_next = s->dirty_first;
    s->dirty_first = room_slot(s, room);
}

static bool
room_frame_fits_ring(const struct room *room, uint64_t len)
{
    return ws_header_len(len) + len <= room->ring.size / 4;
}

/* What follows every new entry.  A channel's can be seen at once, a
 * document's when the journal has it. */
static void
room_published(struct collabd *s, struct room *room, struct conn *from,
               const struct entry *e)
{
    if (from != NULL && !from->in.echo && !from->in.outside)
        from->in.own += ring_charge(e->len);
    if (room->kind == ROOM_CHANNEL)
        ring_show(&room->ring, room->ring.head);
    s->count.messages_in++;
    room_mark_dirty(s, room);
}

/* Nobody's: all members get it. */
static const struct conn_id room_nobody = { NONE, 0 };

/* Publishes a message that lies in one piece behind a short prefix: the one
 * copy.  `from` does not get it, unless it asked for an echo; NULL: all do. */
static void
room_publish(struct collabd *s, struct room *room, struct conn *from,
             uint8_t opcode, struct span prefix, struct span message)
{
    uint8_t header[WS_HEADER_MAX];
    struct out o = out_over(header, sizeof header);
    size_t len = span_len(prefix) + span_len(message), header_len;
    struct entry *e;

    ws_header(&o, opcode, len);
    header_len = (size_t)(o.at - header);
    room_make_room(s, room, header_len + len, false);
    e = ring_new(&room->ring, (uint32_t)(header_len + len),
                 from == NULL ? room_nobody : from->id);
    ring_copy_in(&room->ring, header, header_len);
    ring_copy_in(&room->ring, prefix.at, span_len(prefix));
    ring_copy_in(&room->ring, message.at, span_len(message));
    s->count.copied_bytes += span_len(message);
    room_published(s, room, from, e);
}

/* Publishes an assembled message of `len` bytes and takes its chunks over. */
static void
room_publish_assembly(struct collabd *s, struct room *room, struct conn *from,
                      uint8_t opcode, struct assembly *m)
{
    uint8_t header[WS_HEADER_MAX];
    struct out o = out_over(header, sizeof header);
    struct conn_id id = from == NULL ? room_nobody : from->id;
    size_t header_len, skip;
    struct entry *e;
    uint32_t i = m->first, left = m->len;

    ws_header(&o, opcode, m->len);
    header_len = (size_t)(o.at - header);
    skip = WS_HEADER_MAX - header_len;
    memcpy(chunk_bytes(&s->chunks, i) + skip, header, header_len);
    if (!room_frame_fits_ring(room, m->len)) {
        room_make_room(s, room, header_len + m->len, true);
        e = ring_new(&room->ring, (uint32_t)(header_len + m->len), id);
        e->kind = RING_BLOCK;
        e->block = m->first;
        e->block_skip = (uint8_t)skip;
        e->refs = (uint16_t)(room->count - room->outside -
                             (from != NULL && !from->in.outside &&
                              !from->in.echo));
        room->block_bytes += e->len;
        room->blocks_until = room->ring.head;
        m->first = m->last = NONE32;
        if (e->refs == 0)
            room_forget_block(s, room, e);
    } else {
        room_make_room(s, room, header_len + m->len, false);
        e = ring_new(&room->ring, (uint32_t)(header_len + m->len), id);
        s->count.copied_bytes += left;
        for (left += (uint32_t)header_len; left > 0;
             i = s->chunks.next[i], skip = 0) {
            size_t n = COLLABD_CHUNK - skip < left ? COLLABD_CHUNK - skip
                                                   : left;
            ring_copy_in(&room->ring, chunk_bytes(&s->chunks, i) + skip, n);
            left -= (uint32_t)n;
        }
    }
    room_published(s, room, from, e);
    assembly_drop(&s->chunks, m);
}

/* Takes back what no member has seen: the journal could not keep it.  Who sent
 * such an entry is marked. */
static void
room_take_back(struct collabd *s, struct room *room)
{
    struct ring *r = &room->ring;

    r->pos = ring_pos(r, r->shown);
    while (r->head > r->shown) {
        struct entry *e = ring_entry(r, --r->head);
        struct conn *c = e->from.slot == NONE ? NULL : &s->conns[e->from.slot];
        room_forget_block(s, room, e);
        if (c != NULL && c->id.gen == e->from.gen &&
            c->in.room == room_slot(s, room)) {
            c->in.unkept = true;
            if (!c->in.outside && !c->in.echo)
                c->in.own -= ring_charge(e->len);
        }
    }
    r->head_at = r->shown_at;
    if (room->blocks_until > r->head)
        room->blocks_until = r->head;
    if (room->flushed_pos > r->pos)
        room->flushed_pos = r->pos;
}

/* Has the room appended a quarter ring since its last flush?  Then its members
 * are not read until it is flushed, so nobody is overtaken without a write
 * attempt in between. */
static bool
room_wants_flush(const struct room *room)
{
    return room->ring.pos - room->flushed_pos >= room->ring.size / 4;
}

/* The most that may be appended between two flushes beyond that quarter: one
 * more message in the ring, or a receive buffer of the smallest frames. */
#define ROOM_BURST (4096 / 6 * RING_CHARGE)

/* Whose lag is more than this counts as a laggard: half a ring or, in small
 * rings, so much less that it cannot be overtaken before it was judged. */
static uint64_t
room_lag_limit(const struct room *room)
{
    uint64_t quarter = room->ring.size / 4;

    return 3 * quarter - (quarter > ROOM_BURST ? quarter : ROOM_BURST);
}

/* Bytes between a member's cursor and the head that it is yet to be sent. */
static uint64_t
room_lag(const struct room *room, const struct conn *c)
{
    const struct ring *r = &room->ring;

    if (c->in.overtaken || c->in.outside)
        return 0;
    return r->pos - ring_pos(r, c->in.entry) - c->in.off - c->in.own;
}

/* A member's cursor can go straight through the ring's bytes: nothing of its
 * own and no block lies ahead. */
static bool
room_is_plain(const struct room *room, const struct conn *c)
{
    return c->in.own == 0 && c->in.entry >= room->blocks_until;
}

/* Steps over own entries at the cursor. */
static void
room_skip_own(struct collabd *s, struct room *room, struct conn *c)
{
    while (c->in.own > 0 && c->in.off == 0 &&
           c->in.entry < room->ring.shown &&
           room_is_own(ring_entry(&room->ring, c->in.entry), c)) {
        room_pass(s, room, c, ring_entry(&room->ring, c->in.entry));
        c->in.entry++;
    }
}

/* The spans of a block from `off` on. */
static int
room_gather_block(const struct collabd *s, const struct entry *e, uint32_t off,
                  struct iovec *out, int max)
{
    uint32_t chunk = e->block, left = e->len - off;
    size_t at = (size_t)e->block_skip + off;
    int n = 0;

    for (; at >= COLLABD_CHUNK; at -= COLLABD_CHUNK)
        chunk = s->chunks.next[chunk];
    while (left > 0 && n < max) {
        size_t len = COLLABD_CHUNK - at < left ? COLLABD_CHUNK - at : left;
        out[n++] = (struct iovec){ chunk_bytes(&s->chunks, chunk) + at, len };
        left -= (uint32_t)len;
        at = 0;
        chunk = s->chunks.next[chunk];
    }
    return n;
}

/* What a member is to be sent next, at most `max` spans: from its cursor to
 * the head or, with one_frame, only to the end of the frame it is in. */
static int
room_gather(struct collabd *s, struct conn *c, bool one_frame,
            struct iovec *out, int max)
{
    struct room *room = &s->rooms[c->in.room];
    const struct ring *r = &room->ring;
    uint32_t off = c->in.off;
    int n = 0;

    must(!c->in.overtaken && !c->in.outside);
    room_skip_own(s, room, c);
    if (c->in.entry == r->shown)
        return 0;
    if (!one_frame && room_is_plain(room, c)) {
        uint64_t at = ring_entry(r, c->in.entry)->at + off;
        return ring_peek(r, at, r->shown_at - at, out);
    }
    for (uint64_t i = c->in.entry; i < r->shown && n + 2 <= max;
         i++, off = 0) {
        const struct entry *e = ring_entry(r, i);
        if (room_is_own(e, c))
            continue;
        if (e->kind == RING_BLOCK)
            n += room_gather_block(s, e, off, out + n, max - n);
        else
            n += ring_peek(r, e->at + off, e->len - off, out + n);
        if (one_frame)
            break;
        if (n >= 2 && (uint8_t *)out[n - 2].iov_base + out[n - 2].iov_len ==
                          out[n - 1].iov_base) {
            out[n - 2].iov_len += out[n - 1].iov_len;
            n--;
        }
    }
    return n;
}

/* So many bytes of what was gathered have been taken. */
static void
room_advance(struct collabd *s, struct conn *c, uint64_t taken)
{
    struct room *room = &s->rooms[c->in.room];
    const struct ring *r = &room->ring;

    c->in.moved_ms = now_ms;
    if (room_is_plain(room, c)) {
        uint64_t at = ring_entry(r, c->in.entry)->at + c->in.off + taken;
        uint64_t entry = ring_find(r, c->in.entry, at);
        s->count.messages_out += entry - c->in.entry;
        c->in.off = entry == r->shown
                        ? 0
                        : (uint32_t)(at - ring_entry(r, entry)->at);
        c->in.entry = entry;
        return;
    }
    while (c->in.entry < r->shown) {
        struct entry *e = ring_entry(r, c->in.entry);
        if (!room_is_own(e, c)) {
            uint64_t left = e->len - c->in.off;
            if (taken < left) {
                c->in.off += (uint32_t)taken;
                return;
            }
            taken -= left;
            c->in.off = 0;
            s->count.messages_out++;
        }
        room_pass(s, room, c, e);
        c->in.entry++;
    }
    must(taken == 0);
}

/* May this laggard slow its room?  Only while it moves, and not for long. */
static bool
room_may_hold(struct member *in, bool alone)
{
    if (now_ms - in->holds_since >= ROOM_HOLD_WINDOW_MS) {
        in->holds_since = now_ms;
        in->held_ms = in->burst_ms = 0;
    }
    return now_ms - in->moved_ms <
               (alone ? ROOM_BURST_STALL_MS : ROOM_STALL_MS) &&
           (alone ? in->burst_ms < ROOM_BURST_HOLD_MS
                  : in->held_ms < ROOM_HOLD_MS);
}

/* Judges after a flush whether laggards hold the room: half of those who hear
 * a message or more, or a few in a burst.  Who is a laggard stays one until it
 * is less than a quarter ring behind, so that the verdict does not flicker. */
static void
room_judge(struct collabd *s, struct room *room)
{
    unsigned lagging = 0, bursting = 0;
    int64_t passed = now_ms - room->judged_ms;
    bool was = room->held;

    for (uint16_t m = room->first; m != NONE; m = s->conns[m].in.next) {
        struct member *in = &s->conns[m].in;
        uint64_t lag = room_lag(room, &s->conns[m]);
        if (lag == 0)
            in->moved_ms = now_ms;
        if (room->held && in->lagging && passed < ROOM_HOLD_MS) {
            in->held_ms = (uint16_t)(in->held_ms + passed);
            in->burst_ms =
                (uint16_t)(in->burst_ms + (room->held_by_few ? passed : 0));
        }
        in->lagging = lag > (in->lagging ? room->ring.size / 4
                                         : room_lag_limit(room)) &&
                      room_may_hold(in, false);
        lagging += in->lagging;
        bursting += in->lagging && room_may_hold(in, true);
    }
    room->held_by_few = lagging * 2 + 1 < room->count;
    room->held = lagging > 0 && (!room->held_by_few || bursting > 0);
    s->count.holds += room->held && !was;
    room->judged_ms = now_ms;
}

static void
room_check(const struct collabd *s, const struct room *room)
{
    uint64_t blocks = 0;
    uint16_t members = 0, outside = 0, prev = NONE;

    ring_check(&room->ring);
    for (uint64_t i = room->ring.tail; i < room->ring.head; i++) {
        const struct entry *e = ring_entry(&room->ring, i);
        if (e->kind != RING_BLOCK || e->block == NONE32)
            continue;
        blocks += e->len;
        must(e->refs > 0 && i < room->blocks_until);
    }
    must(blocks == room->block_bytes && blocks <= s->block_budget);
    for (uint16_t m = room->first; m != NONE; prev = m,
                  m = s->conns[m].in.next, members++) {
        const struct conn *c = &s->conns[m];
        uint64_t own = 0;
        must(c->in.prev == prev && c->in.room == room_slot(s, room));
        must(c->state == CONN_OPEN || c->state == CONN_CLOSING);
        outside += c->in.outside;
        if (c->in.overtaken || c->in.outside || c->in.entry < room->ring.tail)
            continue;
        must(c->in.entry >= room->slowest && c->in.entry <= room->ring.shown);
        for (uint64_t i = c->in.entry; i < room->ring.head; i++)
            if (room_is_own(ring_entry(&room->ring, i), c))
                own += ring_charge(ring_entry(&room->ring, i)->len);
        must(own == c->in.own);
        must(c->in.entry < room->ring.head || c->in.off == 0);
    }
    must(members == room->count && outside == room->outside);
}
/* ===== 16  Sync ============================================================
 * What a member of a document says and is told: y-protocols over the WebSocket
 * /yjs/NAME, one message a frame.
 *
 *      00 00 SV        SyncStep1: this is what I have
 *      00 01 update    SyncStep2: what you lack; the answer to that
 *      00 02 update    Update
 *      01 ...          awareness: cursors, names
 *      02 00 text      auth: refused, and why (only from us)
 *      03              asks for all awareness
 *
 * A new member is outside the ring until its first SyncStep2 has left: it is
 * neither overtaken nor slow.  Then its cursor starts where the document stood
 * when that was made; if the ring has gone on, it gets the difference first.
 *
 * Besides the ring a member has one block of its own: a few small frames, or
 * one large one whose body stands in a snapshot or an extent.  While it has
 * one, what would need another waits, unread.
 * ========================================================================= */

#define SYNC_QUIET_MS 20000    /* told nothing for so long: clients give up
                                  after 30 s */
#define SYNC_KEEP_SV 262144    /* a longer first sync may outlast the ring */
#define SYNC_WHOLE_MAX (4u << 20) /* a longer message may outlast a client's
                                     watchdog: it comes in pieces */
#define SYNC_PIECE (1u << 20)
#define SYNC_PATIENCE 2        /* merges a joiner of a long document waits for */
#define SYNC_STRANGE_MAX 100   /* messages of unknown types */

enum sync_type { SYNC_SYNC, SYNC_AWARENESS, SYNC_AUTH, SYNC_QUERY };
enum sync_step { SYNC_STEP1, SYNC_STEP2, SYNC_UPDATE };

/* What is to be done with the member after a message. */
struct sync_verdict {
    bool wait;             /* the message stays; try it again later */
    enum close_reason why; /* not CLOSE_DONE: close; s->complaint may say more */
};

static const struct sync_verdict sync_fine = { false, CLOSE_DONE };
static const struct sync_verdict sync_wait = { true, CLOSE_DONE };

static struct sync *
sync_of(const struct collabd *s, const struct conn *c)
{
    return &s->syncs[c->id.slot];
}

static struct room *
sync_room(const struct collabd *s, const struct conn *c)
{
    return &s->rooms[c->in.room];
}

static struct doc *
sync_doc(const struct collabd *s, const struct conn *c)
{
    return room_doc(s, sync_room(s, c));
}

static struct sync_verdict
sync_bad(struct collabd *s, const char *what, size_t at)
{
    (void)snprintf(s->complaint, sizeof s->complaint,
                   "malformed: %s at byte %zu", what, at);
    return (struct sync_verdict){ false, CLOSE_MALFORMED };
}

/* ----- a member's own block --------------------------------------------------- */

static bool
sync_is_free(const struct sync *y)
{
    return y->head_len == 0 && !y->joining;
}

/* Gives a pinned snapshot back, which may be superseded by now. */
static void
sync_unpin(struct collabd *s, struct doc *d, struct sync *y)
{
    const uint8_t *at = y->joining ? y->whole.at : y->body.at;
    struct snapshot *pinned;
    bool now;

    if (!y->pins)
        return;
    now = at >= d->now.memory.at &&
          at < d->now.memory.at + d->now.memory.size;
    pinned = now ? &d->now : &d->before;
    y->pins = false;
    must(pinned->pins > 0);
    if (--pinned->pins == 0 && !now)
        snapshot_give(s, pinned);
}

/* A block has been sent. */
static void
sync_block_drop(struct collabd *s, struct conn *c)
{
    struct sync *y = sync_of(s, c);

    if (!y->joining)
        sync_unpin(s, sync_doc(s, c), y);
    extent_give(s, &y->memory);
    y->body = (struct span){ NULL, NULL };
    y->head_len = 0;
    y->sent = 0;
}

/* So have all that belong together, or nobody is there to get them. */
static void
sync_joining_drop(struct collabd *s, struct conn *c)
{
    struct sync *y = sync_of(s, c);

    sync_unpin(s, sync_doc(s, c), y);
    extent_give(s, &y->source);
    y->joining = false;
}

/* Writes a small frame behind what stands in the head.  False: it does not
 * fit. */
static bool
sync_put(struct sync *y, struct span payload)
{
    struct out o = out_over(y->head + y->head_len,
                            sizeof y->head - y->head_len);

    must(span_is_empty(y->body));
    ws_header(&o, WSLAY_BINARY_FRAME, span_len(payload));
    out_span(&o, payload);
    if (o.full)
        return false;
    y->head_len = (uint8_t)(o.at - y->head);
    return true;
}

/* Begins a large frame: `prefix`, the body's length, and the body. */
static void
sync_put_large(struct sync *y, struct span prefix, struct span body)
{
    size_t len = span_len(prefix) + y_uint_len(span_len(body)) + span_len(body);
    struct out o = out_over(y->head + y->head_len,
                            sizeof y->head - y->head_len);

    ws_header(&o, WSLAY_BINARY_FRAME, len);
    out_span(&o, prefix);
    out_uint(&o, span_len(body));
    must(!o.full);
    y->head_len = (uint8_t)(o.at - y->head);
    y->body = body;
}

/* SyncStep1: the member is to send what we lack.  It may be large, then it
 * takes an extent.  False: no memory for it. */
static bool
sync_put_step1(struct collabd *s, struct conn *c)
{
    static const uint8_t prefix[] = { SYNC_SYNC, SYNC_STEP1 };
    struct sync *y = sync_of(s, c);
    struct doc *d = sync_doc(s, c);
    uint8_t small[128];
    struct out o = out_over(small, sizeof small), sv;
    size_t len = y_known_write_sv(&d->known, NULL);

    out_bytes(&o, prefix, sizeof prefix);
    out_uint(&o, len);
    (void)y_known_write_sv(&d->known, &o);
    if (!o.full && sync_put(y, (struct span){ small, o.at }))
        return true;
    if (!extent_take(s, &y->memory, len, false))
        return false;
    sv = out_over(y->memory.at, len);
    (void)y_known_write_sv(&d->known, &sv);
    must(!sv.full);
    sync_put_large(y, span_of(prefix, sizeof prefix),
                   span_of(y->memory.at, len));
    return true;
}

/* All awareness there is, as one message; none if there is none. */
static bool
sync_put_awareness(struct collabd *s, struct conn *c)
{
    static const uint8_t prefix[] = { SYNC_AWARENESS };
    struct sync *y = sync_of(s, c);
    struct doc *d = sync_doc(s, c);
    size_t len, live = 0;
    struct out o;

    for (size_t at = 0; at < d->aware_len; at += aware_size(aware_at(d, at)))
        live += aware_at(d, at)->len > 0;
    if (live == 0)
        return true;
    len = d->aware_len + 8; /* a state is shorter than its record */
    if (!extent_take(s, &y->memory, len, false))
        return false;
    o = out_over(y->memory.at, len);
    out_uint(&o, live);
    for (size_t at = 0; at < d->aware_len; at += aware_size(aware_at(d, at))) {
        const struct aware *a = aware_at(d, at);
        if (a->len > 0)
            out_aware(&o, &(struct y_aware){ a->client, a->clock,
                                             aware_json(a), false });
    }
    must(!o.full);
    sync_put_large(y, span_of(prefix, sizeof prefix),
                   (struct span){ y->memory.at, o.at });
    return true;
}

/* The next block of a long answer: pieces that the client can only hold, then
 * all that makes it act on them at once (a client that integrates half a
 * document mends what looks broken, and sends that to everybody).  No memory
 * for it: later. */
static void
sync_put_piece(struct collabd *s, struct conn *c)
{
    struct sync *y = sync_of(s, c);
    struct y_pieces ahead = y->pieces;
    size_t len = y_pieces_next(&ahead, NULL);
    bool last = len == 0;
    uint8_t prefix[] = { SYNC_SYNC, last ? SYNC_STEP2 : SYNC_UPDATE };
    struct out o;

    if (last)
        len = y_pieces_close(y->whole, NULL);
    if (!extent_take(s, &y->memory, len, false))
        return;
    o = out_over(y->memory.at, len);
    if (last)
        (void)y_pieces_close(y->whole, &o);
    else
        (void)y_pieces_next(&y->pieces, &o);
    must(!o.full);
    if (last)
        sync_joining_drop(s, c);
    sync_put_large(y, span_of(prefix, sizeof prefix),
                   span_of(y->memory.at, len));
}

/* The answer to a SyncStep1: all the member lacks. */
static void
sync_put_answer(struct collabd *s, struct conn *c, struct span update)
{
    static const uint8_t prefix[] = { SYNC_SYNC, SYNC_STEP2 };
    struct sync *y = sync_of(s, c);

    if (span_len(update) <= SYNC_WHOLE_MAX) {
        sync_put_large(y, span_of(prefix, sizeof prefix), update);
        return;
    }
    y->joining = true;
    y->whole = update;
    y->source = y->memory;
    y->memory = (struct extent){ NULL, 0 };
    y->pieces = y_pieces(update, SYNC_PIECE, true);
    sync_put_piece(s, c);
}

/* What a free block is to be used for next. */
static void
sync_next_block(struct collabd *s, struct conn *c)
{
    struct sync *y = sync_of(s, c);
    uint8_t text[120];
    struct out o = out_over(text, sizeof text);

    if (y->joining) {
        sync_put_piece(s, c);
    } else if (y->refusal != NULL) {
        out_u8(&o, SYNC_AUTH);
        out_u8(&o, 0);
        out_uint(&o, strlen(y->refusal));
        out_text(&o, y->refusal);
        must(!o.full && sync_put(y, (struct span){ text, o.at }));
        y->refusal = NULL;
    } else if (y->ask && sync_put_step1(s, c)) {
        y->ask = false;
    } else if (y->greet && sync_put_awareness(s, c)) {
        y->greet = false;
    }
}

/* The spans that are still to be sent. */
static int
sync_gather(const struct collabd *s, const struct conn *c,
            struct iovec out[2], size_t most)
{
    struct sync *y = sync_of(s, c);
    size_t skip = y->sent > y->head_len ? y->sent - y->head_len : 0;
    size_t left = span_len(y->body) - skip;
    int n = 0;

    if (y->sent < y->head_len)
        out[n++] = (struct iovec){ y->head + y->sent,
                                   y->head_len - y->sent };
    if (left > 0)
        out[n++] = (struct iovec){ (uint8_t *)(uintptr_t)y->body.at + skip,
                                   left < most ? left : most };
    return n;
}

/* What a member is sent is so long that the ring may not wait: remembers what it
 * has then, all of a snapshot or, if that is empty, all that is known now. */
static void
sync_keep_sv(struct collabd *s, struct conn *c, size_t answer,
             struct span snapshot)
{
    struct sync *y = sync_of(s, c);
    struct doc *d = sync_doc(s, c);
    bool all = span_is_empty(snapshot);
    size_t len;
    struct out o;

    if (answer < SYNC_KEEP_SV || (all && d->shown < d->tail_len))
        return; /* what it said or had before is less, but true */
    len = all ? y_known_write_sv(&d->known, NULL)
              : y_update_write_sv(snapshot, NULL);
    extent_give(s, &y->sv);
    y->sv_len = 0;
    if (!extent_take(s, &y->sv, len, false))
        return;
    o = out_over(y->sv.at, len);
    y->sv_len = all ? y_known_write_sv(&d->known, &o)
                    : y_update_write_sv(snapshot, &o);
}

/* The first sync has left: into the ring, or first what came meanwhile. */
static void
sync_let_in(struct collabd *s, struct conn *c)
{
    static const uint8_t prefix[] = { SYNC_SYNC, SYNC_UPDATE };
    struct sync *y = sync_of(s, c);
    struct room *room = sync_room(s, c);
    struct doc *d = sync_doc(s, c);
    struct span sv = span_of(y->sv.at, y->sv_len);
    struct extent fresh = { NULL, 0 };
    size_t len;

    if (!c->in.outside)
        return;
    if (room_let_in(s, room, c, y->entry)) {
        extent_give(s, &y->sv);
        return;
    }
    if (y->entry == room->ring.shown && room->ring.shown < room->ring.head) {
        y->first = true; /* it has all there is to be seen; what bars its way */
        return;          /* is still on its way to the disk */
    }
    if (span_is_empty(sv))
        sv = span_of("", 1); /* of nothing */
    if (!doc_diff(s, d, sv, &fresh, &len)) {
        c->in.overtaken = true; /* no memory to help it */
        room->overtook = true;
        room_mark_dirty(s, room);
        return;
    }
    y->memory = fresh;
    y->first = true;
    y->entry = room->ring.shown;
    sync_keep_sv(s, c, len, span_of(NULL, 0));
    sync_put_large(y, span_of(prefix, sizeof prefix), span_of(fresh.at, len));
}

/* Goes on with what waited while there was no block to be sent. */
static void
sync_go_on(struct collabd *s, struct conn *c)
{
    struct sync *y = sync_of(s, c);

    if (y->head_len > 0)
        return;
    if (y->joining) {
        sync_put_piece(s, c);
    } else if (y->first) {
        y->first = false;
        sync_let_in(s, c);
    }
}

/* So many bytes were taken. */
static void
sync_advance(struct collabd *s, struct conn *c, size_t taken)
{
    struct sync *y = sync_of(s, c);

    y->sent += taken;
    if (taken > 0)
        y->said_ms = now_ms;
    if (y->sent < y->head_len + span_len(y->body))
        return;
    sync_block_drop(s, c);
    if (y->first && !y->joining) {
        y->first = false;
        sync_let_in(s, c);
    }
    if (y->head_len == 0)
        sync_next_block(s, c);
}

/* ----- what members publish ------------------------------------------------------- */

/* Is there memory for a message of `len` bytes in the ring? */
static bool
sync_may_publish(const struct collabd *s, const struct room *room, size_t len)
{
    return room_frame_fits_ring(room, len) ||
           (uint64_t)(s->chunks.count - s->chunks.used) * COLLABD_CHUNK >=
               len + COLLABD_CHUNK;
}

/* To all members, but not to `from` if it is given: type and length ahead, the
 * body behind. */
static void
sync_publish(struct collabd *s, struct room *room, struct conn *from,
             struct span type, struct span head, struct span body)
{
    uint8_t text[48];
    struct out o = out_over(text, sizeof text);
    struct assembly m = { NONE32, NONE32, 0, { 0, 0, 0 }, 0 };

    out_span(&o, type);
    out_uint(&o, span_len(head) + span_len(body));
    out_span(&o, head);
    must(!o.full);
    head = (struct span){ text, o.at };
    m.len = (uint32_t)(span_len(head) + span_len(body));
    if (room_frame_fits_ring(room, m.len)) {
        room_publish(s, room, from, WSLAY_BINARY_FRAME, head, body);
    } else if (assembly_add(&s->chunks, &m, 0, head) &&
               assembly_add(&s->chunks, &m, (uint32_t)span_len(head), body)) {
        room_publish_assembly(s, room, from, WSLAY_BINARY_FRAME, &m);
    } else {
        assembly_drop(&s->chunks, &m);
        must(false); /* it was asked before */
    }
}

/* One state, to everybody: whose it is learns a raised clock from its echo. */
static void
sync_publish_aware(struct collabd *s, struct room *room,
                   const struct y_aware *entry)
{
    static const uint8_t type[] = { SYNC_AWARENESS };
    struct span json = entry->gone ? span_text("null") : entry->json;
    uint8_t head[32];
    struct out o = out_over(head, sizeof head);

    out_u8(&o, 1);
    out_uint(&o, entry->client);
    out_uint(&o, entry->clock);
    out_uint(&o, span_len(json));
    sync_publish(s, room, NULL, span_of(type, sizeof type),
                 (struct span){ head, o.at }, json);
}

/* ----- committing ---------------------------------------------------------------- */

/* Refuses an update without losing it: the member stays, is told once, and is
 * asked for all it has when there is room again. */
static struct sync_verdict
sync_refuse(struct collabd *s, struct conn *c, const char *why)
{
    struct sync *y = sync_of(s, c);

    s->count.doc_refused++;
    if (!y->refused)
        y->refusal = why;
    y->refused = true;
    if (sync_is_free(y))
        sync_next_block(s, c);
    return sync_fine;
}

/* Takes back what was not kept, and tells who sent it. */
static void
sync_take_back(struct collabd *s, struct room *room)
{
    room_take_back(s, room);
    doc_take_back(s, room_doc(s, room));
    for (uint16_t m = room->first; m != NONE; m = s->conns[m].in.next) {
        struct conn *c = &s->conns[m];
        if (c->in.unkept)
            (void)sync_refuse(s, c, "the server's disk takes no more");
        c->in.unkept = false;
    }
}

/* Brings what the room's document got into the journal and, if that is enough,
 * before its members. */
static void
sync_commit(struct collabd *s, struct room *room)
{
    struct doc *d = room_doc(s, room);

    if (!doc_commit(s, d))
        sync_take_back(s, room);
    else if (d->shown == d->tail_len)
        ring_show(&room->ring, room->ring.head);
}

/* A job of the thread has come back. */
static void
sync_job_done(struct collabd *s, struct work *w)
{
    struct doc *d = (struct doc *)(void *)((uint8_t *)w -
                                           offsetof(struct doc, job));
    struct room *room = &s->rooms[d - s->docs];
    enum doc_job_kind kind = d->job.kind;

    if (!doc_job_done(s, d, sync_job_done))
        sync_take_back(s, room);
    else if (kind == DOC_JOB_SYNC)
        ring_show(&room->ring, d->job.entry);
    room_mark_dirty(s, room);
}

/* Merges what members see into the snapshot, or has the thread do it. */
static void
sync_merge(struct collabd *s, struct room *room)
{
    struct doc *d = room_doc(s, room);

    if (doc_is_long(d)) {
        if (d->job.busy || d->shown == 0)
            return;
        d->job.entry = room->ring.shown;
        if (doc_merge_begin(s, d, sync_job_done))
            return; /* else memory is so short that it is to be done here */
    }
    if (doc_merge(s, d))
        d->merged_entry = room->ring.shown;
}

/* Has the ring all that came since the snapshot was made? */
static bool
sync_snapshot_is_fresh(const struct collabd *s, const struct room *room)
{
    const struct doc *d = room_doc(s, room);
    uint64_t i = d->merged_entry;

    if (i < room->ring.tail || (d->now.len == 0 && d->shown > 0))
        return false;
    while (i < room->blocks_until &&
           (ring_entry(&room->ring, i)->kind != RING_BLOCK ||
            ring_entry(&room->ring, i)->block != NONE32))
        i++;
    return i >= room->blocks_until;
}

/* ----- joining and leaving -------------------------------------------------------- */

/* The first frames to a new member.  A reader is not asked for what it has. */
static void
sync_join(struct collabd *s, struct conn *c)
{
    struct sync *y = sync_of(s, c);

    *y = (struct sync){ .said_ms = now_ms, .ask = c->right >= RIGHT_WRITE,
                        .greet = true };
    if (y->ask && sync_put_step1(s, c))
        y->ask = false;
    if (y->memory.at == NULL && sync_put_awareness(s, c))
        y->greet = false;
}

/* Tells everybody that a state is gone. */
static void
sync_bury(struct collabd *s, struct room *room, struct aware *a)
{
    a->len = 0;
    sync_publish_aware(s, room, &(struct y_aware){ a->client, a->clock,
                                                   { NULL, NULL }, true });
}

/* A member leaves its document, and what it spoke for is gone. */
static void
sync_leave(struct collabd *s, struct conn *c)
{
    struct room *room = sync_room(s, c);
    struct doc *d = sync_doc(s, c);
    struct sync *y = sync_of(s, c);

    for (size_t at = 0; at < d->aware_len; at += aware_size(aware_at(d, at))) {
        struct aware *a = aware_at(d, at);
        if (a->len > 0 && a->owner.slot == c->id.slot &&
            a->owner.gen == c->id.gen)
            sync_bury(s, room, a);
    }
    sync_joining_drop(s, c);
    sync_block_drop(s, c);
    extent_give(s, &y->sv);
    extent_give(s, &y->message);
    room_leave(s, c);
    room_mark_dirty(s, room); /* the turn sees whether all have left */
}

/* ----- messages ------------------------------------------------------------------- */

/* SyncStep1: answers with all the member lacks. */
static struct sync_verdict
sync_step1(struct collabd *s, struct conn *c, struct span sv)
{
    struct sync *y = sync_of(s, c);
    struct room *room = sync_room(s, c);
    struct doc *d = sync_doc(s, c);
    const char *fault;
    uint64_t entry;
    bool whole;
    size_t len;

    if (!y_sv_check(sv, &fault))
        return sync_bad(s, fault, 0);
    sync_commit(s, room); /* what came in this turn is part of it */
    if (!sync_is_free(y))
        return sync_wait;
    whole = span_len(sv) == 1;
    entry = room->ring.shown;
    if (whole && y->patience == 0)
        y->patience = d->merges + SYNC_PATIENCE;
    if (whole && (d->merges < y->patience || !sync_snapshot_is_fresh(s, room)))
        sync_merge(s, room);
    if (whole && d->merges < y->patience && d->job.busy &&
        d->job.kind == DOC_JOB_MERGE)
        return sync_wait; /* others type on; in the end the ring has that */
    if (whole && sync_snapshot_is_fresh(s, room)) {
        entry = d->merged_entry;
        y->pins = d->now.len > 0;
        d->now.pins += y->pins;
        sync_put_answer(s, c, y->pins ? span_of(d->now.memory.at, d->now.len)
                                      : span_of("\0", 2));
    } else if (whole && d->job.busy && d->job.kind == DOC_JOB_MERGE) {
        return sync_wait;
    } else if (doc_diff(s, d, sv, &y->memory, &len)) {
        sync_put_answer(s, c, span_of(y->memory.at, len));
    } else {
        return sync_wait;
    }
    if (!c->in.outside)
        return sync_fine;
    y->first = true;
    y->entry = entry;
    y->sv_len = 0;
    extent_give(s, &y->sv);
    sync_keep_sv(s, c, y->joining ? SYNC_WHOLE_MAX : span_len(y->body),
                 y->pins ? span_of(d->now.memory.at, d->now.len)
                         : span_of(NULL, 0));
    return sync_fine;
}

/* Sees to it that there is room for an update; documents that nobody is in make
 * way.  NULL: there is; else what is full. */
static const char *
sync_make_room(struct collabd *s, struct doc *d, struct span update,
               const struct y_report *r)
{
    const char *full = doc_limit(s, d, update, r);

    while (full == NULL && !doc_ask(s, d, r, span_len(update)))
        if (!room_close_oldest(s, true))
            full = "memory for documents is full (--doc-memory)";
    return full;
}

/* Is there room by now for what was refused last? */
static bool
sync_has_room(struct collabd *s, struct doc *d)
{
    if (d->now.len + d->tail_len + d->wanted_len + 8 > doc_most(s) ||
        d->known.n_islands >= DOC_GAPS_MAX ||
        d->known.used >= DOC_CLIENTS_MAX)
        return false; /* asked now, they would only be refused again */
    while (!doc_ask(s, d, &d->wanted, d->wanted_len))
        if (!room_close_oldest(s, true))
            return false;
    return true;
}

/* Takes an update that is all new into the document and the ring. */
static struct sync_verdict
sync_accept(struct collabd *s, struct conn *c, struct span update,
            const struct y_report *r)
{
    static const uint8_t type[] = { SYNC_SYNC, SYNC_UPDATE };
    struct room *room = sync_room(s, c);
    struct doc *d = sync_doc(s, c);
    const char *full;

    if (c->right < RIGHT_WRITE)
        return sync_refuse(s, c, "read only");
    if (d->file.broken && d->retry_ms == 0 && s->data.lock >= 0)
        return sync_wait; /* it is being written anew */
    if (d->retry_ms > 0 && (r->structs > 0 || d->file.broken))
        return sync_refuse(s, c, "the server's disk takes no more");
    if (!sync_may_publish(s, room, span_len(update) + 16))
        return sync_wait;
    full = sync_make_room(s, d, update, r);
    if (full != NULL) {
        d->full_ms = now_ms + DOC_RETRY_MS;
        d->wanted = *r;
        d->wanted_len = span_len(update);
        room_mark_dirty(s, room); /* so that somebody looks at full_ms */
        return sync_refuse(s, c, full);
    }
    doc_append(d, update, r);
    sync_publish(s, room, c, span_of(type, sizeof type), span_of(NULL, 0),
                 update);
    s->count.doc_updates++;
    s->count.doc_bytes += span_len(update);
    return sync_fine;
}

/* An update, or the answer to our SyncStep1.  What is known already goes
 * nowhere. */
static struct sync_verdict
sync_update(struct collabd *s, struct conn *c, struct span update, bool answer)
{
    struct doc *d = sync_doc(s, c);
    struct extent fresh = { NULL, 0 };
    struct sync_verdict v;
    struct y_report r;
    size_t len;

    if (!y_check(update, &r))
        return sync_bad(s, r.fault, r.at);
    if (r.canonical && y_known_is_new(&d->known, update) &&
        (r.structs > 0 ? !answer || r.ranges == 0 : !answer && r.ranges > 0))
        return sync_accept(s, c, update, &r);
    if (!doc_minus(s, d, update, &r, &fresh, &len))
        return sync_wait;
    if (len == 0) {
        s->count.doc_known++;
        return sync_fine;
    }
    update = span_of(fresh.at, len);
    must(y_check(update, &r));
    v = sync_accept(s, c, update, &r);
    extent_give(s, &fresh);
    return v;
}

static struct sync_verdict
sync_awareness(struct collabd *s, struct conn *c, struct span message)
{
    struct sync *y = sync_of(s, c);
    struct room *room = sync_room(s, c);
    struct doc *d = sync_doc(s, c);
    const char *fault;
    struct y_aware entry;
    uint64_t left;
    struct y_in in;
    bool alone;

    if (!y_aware_check(message, &fault))
        return sync_bad(s, fault, 0);
    if (!sync_may_publish(s, room, Y_AWARE_BYTES * 2))
        return sync_wait;
    in = y_aware_open(message, &left);
    alone = left == 1;
    while (y_aware_next(&in, &left, &entry)) {
        if (y->messages < 2 && alone)
            y->itself = entry.client; /* clients begin with themselves */
        if (!sync_may_publish(s, room, span_len(entry.json) + 64))
            break; /* it is said again within 15 s */
        if (aware_judge(s, d, &entry, c->id, entry.client == y->itself) ==
            AWARE_NEW)
            sync_publish_aware(s, room, &entry);
    }
    return sync_fine;
}

/* The body of a message: a length, and so many bytes to its end. */
static bool
sync_body(struct span *message)
{
    uint64_t len;

    return y_uint(message, &len) && len == span_len(*message);
}

static struct sync_verdict
sync_message(struct collabd *s, struct conn *c, struct span message)
{
    struct sync *y = sync_of(s, c);
    uint64_t type, step;
    struct span m = message;

    if (!y_uint(&m, &type))
        return sync_bad(s, "a message without a type", 0);
    if (type == SYNC_SYNC) {
        if (!y_uint(&m, &step) || step > SYNC_UPDATE)
            return sync_bad(s, "a sync message of unknown type", 1);
        if (!sync_body(&m))
            return sync_bad(s, "a body whose length is wrong", 2);
        return step == SYNC_STEP1 ? sync_step1(s, c, m)
                                  : sync_update(s, c, m, step == SYNC_STEP2);
    }
    if (type == SYNC_AWARENESS)
        return sync_body(&m) ? sync_awareness(s, c, m)
                             : sync_bad(s, "a body whose length is wrong", 1);
    if (type == SYNC_QUERY) {
        if (!sync_is_free(y) || !sync_put_awareness(s, c))
            return sync_wait;
        return sync_fine;
    }
    if (++y->strange > SYNC_STRANGE_MAX)
        return sync_bad(s, "too many messages of unknown types", 0);
    return sync_fine;
}

/* ----- time ------------------------------------------------------------------------- */

/* Says nothing, so that a lone client's watchdog does not bite.  True: there is
 * something to be sent. */
static bool
sync_keep_alive(struct collabd *s, struct conn *c)
{
    static const uint8_t nothing[] = { SYNC_AWARENESS, 1, 0 };
    struct sync *y = sync_of(s, c);

    return now_ms - y->said_ms >= SYNC_QUIET_MS && sync_is_free(y) &&
           sync_put(y, span_of(nothing, sizeof nothing));
}

/* Buries states that nobody renews, and forgets the buried after as long again;
 * answers when to look next. */
static int64_t
sync_expire(struct collabd *s, struct room *room)
{
    struct doc *d = room_doc(s, room);
    int64_t next = INT64_MAX;

    for (size_t at = 0; at < d->aware_len;) {
        struct aware *a = aware_at(d, at);
        int64_t end = a->seen_ms + (a->len > 0 ? 1 : 2) * AWARE_LIFE_MS;
        if (a->len == 0 && end <= now_ms) {
            aware_remove(d, a);
            continue;
        }
        if (end <= now_ms) {
            sync_bury(s, room, a);
            end = a->seen_ms + 2 * AWARE_LIFE_MS;
        }
        next = end < next ? end : next;
        at += aware_size(a);
    }
    return next;
}

/* The disk or memory takes something again: who was refused is asked for all
 * it has. */
static void
sync_ask_again(struct collabd *s, struct room *room)
{
    for (uint16_t m = room->first; m != NONE; m = s->conns[m].in.next) {
        struct conn *c = &s->conns[m];
        struct sync *y = sync_of(s, c);
        if (!y->refused || c->right < RIGHT_WRITE)
            continue;
        y->refused = false;
        y->ask = true;
        if (sync_is_free(y))
            sync_next_block(s, c);
    }
    room_mark_dirty(s, room); /* so that they are flushed */
}

/* ----- the document behind ------------------------------------------------------------ */

/* Whatever is due for a document; answers when to look again. */
static int64_t
sync_tend(struct collabd *s, struct room *room)
{
    struct doc *d = room_doc(s, room);
    int64_t next = sync_expire(s, room), idle = d->edited_ms + DOC_IDLE_MS;
    bool left = room->count == 0;

    sync_commit(s, room);
    if (left)
        d->full_ms = 0; /* nobody waits for it */
    if (d->retry_ms > 0 && d->retry_ms <= now_ms &&
        doc_trial(s, d))
        sync_ask_again(s, room);
    if ((doc_wants_merge(d) || left || idle <= now_ms ||
         (d->full_ms > 0 && d->full_ms <= now_ms)) &&
        d->merge_ms <= now_ms) {
        sync_merge(s, room);
        d->merge_ms = d->shown > 0 && !d->job.busy ? now_ms + DOC_RETRY_MS : 0;
    }
    if (d->full_ms > 0 && d->full_ms <= now_ms) {
        d->full_ms = now_ms + DOC_RETRY_MS;
        if (sync_has_room(s, d)) {
            d->full_ms = 0;
            sync_ask_again(s, room);
        }
    }
    if (!d->job.busy && doc_wants_compaction(s, d, left) &&
        d->compact_ms <= now_ms) {
        d->compact_ms = now_ms + DOC_RETRY_MS;
        if (!doc_compact(s, d, sync_job_done) && d->file.broken &&
            !d->job.busy)
            d->retry_ms = now_ms + DOC_RETRY_MS; /* refused, not waiting */
    }
    if (!d->job.busy && d->sync_at > 0 &&
        (d->sync_at <= now_ms || s->cfg->fsync || left)) {
        d->job.entry = room->ring.head;
        doc_sync(s, d, sync_job_done);
    }
    if (d->tail_len > 0 && idle > now_ms && idle < next)
        next = idle; /* later on a job or a sync wakes us */
    if (d->merge_ms > now_ms && d->merge_ms < next)
        next = d->merge_ms;
    if (d->sync_at > 0 && !d->job.busy && d->sync_at < next)
        next = d->sync_at;
    if (d->retry_ms > 0 && d->retry_ms < next)
        next = d->retry_ms;
    if (d->full_ms > 0 && d->full_ms < next)
        next = d->full_ms;
    if (!d->job.busy && doc_wants_compaction(s, d, left) &&
        d->compact_ms < next)
        next = d->compact_ms;
    return next;
}

/* The end: everything is written, and the file anew if its log is long. */
static void
sync_finish(struct collabd *s, struct room *room)
{
    struct doc *d = room_doc(s, room);

    sync_commit(s, room);
    (void)doc_merge(s, d);
    if (!d->job.busy && doc_wants_compaction(s, d, true))
        (void)doc_compact(s, d, sync_job_done);
    if (!d->job.busy && d->sync_at > 0)
        doc_sync(s, d, sync_job_done);
    doc_close(s, d);
}

/* ----- invariants ----------------------------------------------------------------------- */

/* Whose pins are counted, and that a room's document is as it should be. */
static void
sync_check(const struct collabd *s, const struct room *room)
{
    const struct doc *d = room_doc(s, room);
    unsigned before = 0, pins = d->job.busy &&
                                (d->job.kind == DOC_JOB_WRITE ||
                                 d->job.kind == DOC_JOB_MERGE);

    if (d->state == DOC_CLOSED) {
        must(room->count == 0);
        return;
    }
    doc_check(s, d);
    for (uint16_t m = room->first; m != NONE; m = s->conns[m].in.next) {
        const struct sync *y = &s->syncs[m];
        const uint8_t *at = y->joining ? y->whole.at : y->body.at;
        const struct extent *e = &d->now.memory;
        if (!y->pins)
            continue;
        if (at < e->at || at >= e->at + e->size) {
            e = &d->before.memory;
            must(at >= e->at && at < e->at + e->size);
            before++;
        } else {
            pins++;
        }
    }
    must(pins == d->now.pins && before == d->before.pins);
}
/* ===== 17  Transport =======================================================
 * Plain sockets and TLS behind one pair of calls, net_recv and net_send: they
 * answer bytes, or IO_WANT_READ, IO_WANT_WRITE, IO_GONE.  Nobody above looks
 * at errno or at codes of mbedTLS.
 * ========================================================================= */

enum io { IO_WANT_READ = -1, IO_WANT_WRITE = -2, IO_GONE = -3 };

/* ----- listening ----------------------------------------------------------- */

/* What a listener is called in the log: its address as a URL. */
static void
net_announce(const struct listener *l)
{
    struct sockaddr_storage at = { .ss_family = AF_UNSPEC };
    socklen_t len = sizeof at;
    char host[64] = "", port[8] = "";

    if (l->local) {
        log_say(LOG_LEVEL_INFO, "listening on unix:%s", l->path);
        return;
    }
    (void)getsockname(l->fd, (struct sockaddr *)&at, &len);
    (void)getnameinfo((struct sockaddr *)&at, len, host, sizeof host, port,
                      sizeof port, NI_NUMERICHOST | NI_NUMERICSERV);
    log_say(LOG_LEVEL_INFO,
            at.ss_family == AF_INET6 ? "listening on %s://[%s]:%s"
                                     : "listening on %s://%s:%s",
            l->tls ? "https" : "http", host, port);
}

/* Is anybody listening on that unix socket? */
static bool
net_unix_is_alive(const struct sockaddr_un *at)
{
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    bool alive = fd < 0 || connect(fd, (const struct sockaddr *)at,
                                   sizeof *at) == 0 || errno == EAGAIN;

    if (fd >= 0)
        (void)sys.close(fd);
    return alive;
}

static int
net_listen_unix(struct listener *l, const char *path, unsigned mode)
{
    struct sockaddr_un at = { .sun_family = AF_UNIX };
    struct stat st;

    if (strlen(path) >= sizeof at.sun_path || *path == '\0') {
        errno = ENAMETOOLONG;
        return -1;
    }
    memcpy(at.sun_path, path, strlen(path) + 1);
    if (lstat(path, &st) == 0) {
        if (!S_ISSOCK(st.st_mode)) {
            errno = EEXIST;
            return -1;
        }
        if (net_unix_is_alive(&at)) {
            errno = EADDRINUSE;
            return -1;
        }
        if (unlink(path) != 0)
            return -1;
    }
    l->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (l->fd < 0 ||
        bind(l->fd, (struct sockaddr *)&at, sizeof at) != 0 ||
        chmod(path, mode) != 0 || listen(l->fd, SOMAXCONN) != 0)
        return -1;
    l->local = true;
    memcpy(l->path, at.sun_path, sizeof l->path);
    return 0;
}

static int
net_bind(const struct addrinfo *a, int buffer)
{
    int fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK,
                    0);
    int one = 1, zero = 0, error;

    if (fd < 0)
        return -1;
    (void)setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (a->ai_family == AF_INET6)
        (void)setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &zero, sizeof zero);
    /* accepted sockets inherit these */
    (void)setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &buffer, sizeof buffer);
    (void)setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &buffer, sizeof buffer);
    (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (bind(fd, a->ai_addr, a->ai_addrlen) == 0 &&
        listen(fd, SOMAXCONN) == 0)
        return fd;
    error = errno;
    (void)sys.close(fd);
    errno = error;
    return -1;
}

static int
net_listen_ip(struct listener *l, struct span text, int buffer)
{
    struct addrinfo want = { .ai_socktype = SOCK_STREAM,
                             .ai_flags = AI_PASSIVE | AI_NUMERICSERV };
    struct addrinfo *found;
    char host[256] = "::", port[8];
    struct span name;
    uint64_t number;

    if (!cfg_cut_address(text, &name, &number) ||
        span_len(name) >= sizeof host) {
        errno = EINVAL;
        return -1;
    }
    (void)snprintf(port, sizeof port, "%" PRIu64, number);
    if (!span_is_empty(name))
        (void)snprintf(host, sizeof host, "%.*s", (int)span_len(name),
                       (const char *)name.at);
    if (getaddrinfo(host, port, &want, &found) != 0) {
        errno = EADDRNOTAVAIL;
        return -1;
    }
    l->fd = net_bind(found, buffer);
    freeaddrinfo(found);
    if (l->fd < 0 && span_is_empty(name) &&
        (errno == EAFNOSUPPORT || errno == EADDRNOTAVAIL)) {
        /* a kernel without IPv6 */
        if (getaddrinfo("0.0.0.0", port, &want, &found) != 0)
            return -1;
        l->fd = net_bind(found, buffer);
        freeaddrinfo(found);
    }
    return l->fd < 0 ? -1 : 0;
}

static int
net_port(int fd)
{
    struct sockaddr_storage at = { .ss_family = AF_UNSPEC };
    socklen_t len = sizeof at;

    if (getsockname(fd, (struct sockaddr *)&at, &len) != 0)
        return -1;
    if (at.ss_family == AF_INET)
        return ntohs(((struct sockaddr_in *)&at)->sin_port);
    if (at.ss_family == AF_INET6)
        return ntohs(((struct sockaddr_in6 *)&at)->sin6_port);
    return 0;
}

/* Opens one listener; said if it cannot. */
static bool
net_listen(struct collabd *s, const char *text, bool tls)
{
    struct listener *l = &s->listeners[s->listener_count];
    int failed;

    *l = (struct listener){ .fd = -1, .tls = tls };
    if (strncmp(text, "unix:", 5) == 0)
        failed = net_listen_unix(l, text + 5, (unsigned)s->cfg->unix_mode);
    else
        failed = net_listen_ip(l, span_text(text),
                               (int)s->cfg->socket_buffer);
    if (failed != 0) {
        log_say(LOG_LEVEL_ERROR, "%slisten %s: %s", tls ? "tls-" : "", text,
                errno == EINVAL ? "give PORT, HOST:PORT, [V6]:PORT or unix:PATH"
                                : strerror(errno));
        if (l->fd >= 0)
            (void)sys.close(l->fd);
        return false;
    }
    l->port = net_port(l->fd);
    s->listener_count++;
    return true;
}

static void
net_peer_address(const struct sockaddr_storage *at, uint8_t peer[16])
{
    memset(peer, 0, 16);
    if (at->ss_family == AF_INET) {
        peer[10] = peer[11] = 255;
        memcpy(peer + 12, &((const struct sockaddr_in *)at)->sin_addr, 4);
    } else if (at->ss_family == AF_INET6) {
        memcpy(peer, &((const struct sockaddr_in6 *)at)->sin6_addr, 16);
    }
}

/* Is a listener's address one that others than a LAN can reach? */
static bool
net_is_public(int fd)
{
    struct sockaddr_storage at = { .ss_family = AF_UNSPEC };
    socklen_t len = sizeof at;
    struct ifaddrs *all, *i;
    uint8_t address[16], any[16] = { 0 };
    bool public = false;

    if (getsockname(fd, (struct sockaddr *)&at, &len) != 0 ||
        at.ss_family == AF_UNIX)
        return false;
    net_peer_address(&at, address);
    if (access_is_v4(address) ? memcmp(address + 12, any, 4) != 0
                              : memcmp(address, any, 16) != 0)
        return !access_is_private(address);
    if (getifaddrs(&all) != 0)
        return false;
    for (i = all; i != NULL; i = i->ifa_next) {
        if (i->ifa_addr == NULL || (i->ifa_addr->sa_family != AF_INET &&
                                    i->ifa_addr->sa_family != AF_INET6))
            continue;
        memcpy(&at, i->ifa_addr, i->ifa_addr->sa_family == AF_INET
                                     ? sizeof(struct sockaddr_in)
                                     : sizeof(struct sockaddr_in6));
        net_peer_address(&at, address);
        public |= !access_is_private(address);
    }
    freeifaddrs(all);
    return public;
}

/* ----- TLS ------------------------------------------------------------------ */

#if COLLABD_TLS

/* Where mbedTLS 2.28 and 3.6 differ: here and nowhere else. */

/* Random bytes for mbedTLS (its f_rng, p_rng NULL), straight from the kernel:
 * no generator of our own to seed, to reseed and to keep in memory. */
static int
tls_random(void *unused, unsigned char *buf, size_t len)
{
    (void)unused;
    return sys_random(buf, len) ? 0 : MBEDTLS_ERR_ENTROPY_SOURCE_FAILED;
}

/* To be called before anything else of mbedTLS; again does no harm.  Waits, as
 * getrandom() does, until the kernel has gathered entropy after power-on. */
static int
tls_random_start(void)
{
    unsigned char probe[16];

#if MBEDTLS_VERSION_NUMBER >= 0x03000000 && defined(MBEDTLS_PSA_CRYPTO_C)
    if (psa_crypto_init() != PSA_SUCCESS) {
        log_say(LOG_LEVEL_ERROR, "mbedTLS does not start (psa_crypto_init)");
        return -1;
    }
#endif
    if (tls_random(NULL, probe, sizeof probe) != 0) {
        log_say(LOG_LEVEL_ERROR, "no random numbers from the kernel: %s",
                strerror(errno));
        return -1;
    }
    return 0;
}

/* A private key without password from PEM (len counts the zero at the end) or
 * DER.  0 or an mbedTLS error. */
static int
tls_parse_key(mbedtls_pk_context *key, const uint8_t *text, size_t len)
{
#if MBEDTLS_VERSION_NUMBER >= 0x03000000
    return mbedtls_pk_parse_key(key, text, len, NULL, 0, tls_random, NULL);
#else
    return mbedtls_pk_parse_key(key, text, len, NULL, 0);
#endif
}

/* Do a certificate's public key and a private key belong together? */
static bool
tls_keys_match(const mbedtls_pk_context *pub, const mbedtls_pk_context *key)
{
#if MBEDTLS_VERSION_NUMBER >= 0x03000000
    return mbedtls_pk_check_pair(pub, key, tls_random, NULL) == 0;
#else
    return mbedtls_pk_check_pair(pub, key) == 0;
#endif
}

/* The serial number as big-endian bytes; the first must be 1 to 127. */
static int
tls_set_serial(mbedtls_x509write_cert *crt, uint8_t *serial, size_t len)
{
#if MBEDTLS_VERSION_NUMBER >= 0x03000000
    return mbedtls_x509write_crt_set_serial_raw(crt, serial, len);
#else
    mbedtls_mpi number;
    int error;

    mbedtls_mpi_init(&number);
    error = mbedtls_mpi_read_binary(&number, serial, len);
    if (error == 0)
        error = mbedtls_x509write_crt_set_serial(crt, &number);
    mbedtls_mpi_free(&number);
    return error;
#endif
}

/* mbedTLS does not know name constraints and would refuse a CA for them, as
 * they are critical.  Whoever only issues from that CA may let them pass. */
static int
tls_pass_constraints(void *unused, const mbedtls_x509_crt *crt,
                     const mbedtls_x509_buf *oid, int critical,
                     const unsigned char *at, const unsigned char *end)
{
    (void)unused, (void)crt, (void)critical, (void)at, (void)end;
    return oid->len == 3 && memcmp(oid->p, "\x55\x1d\x1e", 3) == 0 ? 0 : -1;
}

/* One certificate from PEM text; name constraints are let pass. */
static int
tls_parse_ca(mbedtls_x509_crt *crt, const uint8_t *text)
{
    mbedtls_pem_context pem;
    const unsigned char *der;
    size_t used, len;
    int error;

    mbedtls_pem_init(&pem);
    error = mbedtls_pem_read_buffer(&pem, "-----BEGIN CERTIFICATE-----",
                                    "-----END CERTIFICATE-----", text, NULL, 0,
                                    &used);
    if (error == 0) {
#if MBEDTLS_VERSION_NUMBER >= 0x03000000
        der = mbedtls_pem_get_buffer(&pem, &len);
#else
        der = pem.buf;
        len = pem.buflen;
#endif
        error = mbedtls_x509_crt_parse_der_with_ext_cb(
            crt, der, len, 1, tls_pass_constraints, NULL);
    }
    mbedtls_pem_free(&pem);
    return error;
}

/* TLS 1.2 at least. */
static void
tls_set_versions(mbedtls_ssl_config *conf)
{
#if MBEDTLS_VERSION_NUMBER >= 0x03000000
    mbedtls_ssl_conf_min_tls_version(conf, MBEDTLS_SSL_VERSION_TLS1_2);
#else
    mbedtls_ssl_conf_min_version(conf, MBEDTLS_SSL_MAJOR_VERSION_3,
                                 MBEDTLS_SSL_MINOR_VERSION_3);
#endif
}

/* The quick curves first; 2.28 would begin with the slowest. */
static void
tls_set_curves(mbedtls_ssl_config *conf)
{
#if MBEDTLS_VERSION_NUMBER >= 0x03000000
    static const uint16_t groups[] = { MBEDTLS_SSL_IANA_TLS_GROUP_X25519,
                                       MBEDTLS_SSL_IANA_TLS_GROUP_SECP256R1,
                                       MBEDTLS_SSL_IANA_TLS_GROUP_SECP384R1,
                                       MBEDTLS_SSL_IANA_TLS_GROUP_NONE };
    mbedtls_ssl_conf_groups(conf, groups);
#else
    static const mbedtls_ecp_group_id curves[] = {
        MBEDTLS_ECP_DP_CURVE25519, MBEDTLS_ECP_DP_SECP256R1,
        MBEDTLS_ECP_DP_SECP384R1, MBEDTLS_ECP_DP_NONE
    };
    mbedtls_ssl_conf_curves(conf, curves);
#endif
}

static bool
tls_is_over(mbedtls_ssl_context *ssl)
{
#if MBEDTLS_VERSION_NUMBER >= 0x03000000
    return mbedtls_ssl_is_handshake_over(ssl) != 0;
#else
    return ssl->state == MBEDTLS_SSL_HANDSHAKE_OVER;
#endif
}

#if MBEDTLS_VERSION_NUMBER >= 0x03000000 && defined(MBEDTLS_SSL_PROTO_TLS1_3)
#define TLS_VERSIONS "TLS 1.2 and 1.3"
#else
#define TLS_VERSIONS "TLS 1.2"
#endif

#define TLS_FILE_MAX 32767
#define TLS_TICKET_LIFE_S 86400u

static void
tls_config_unref(struct tls_config *t)
{
    must(t->refs > 0);
    if (--t->refs > 0)
        return;
    mbedtls_ssl_config_free(&t->conf);
    mbedtls_x509_crt_free(&t->chain);
    mbedtls_pk_free(&t->key);
#if defined(MBEDTLS_SSL_TICKET_C) && defined(MBEDTLS_SSL_SESSION_TICKETS)
    mbedtls_ssl_ticket_free(&t->tickets);
#endif
}

static const char *
tls_read_pem(struct sys_file file, bool key, struct tls_config *t)
{
    unsigned char text[TLS_FILE_MAX + 1];
    ssize_t n = sys_read_file(file, text, TLS_FILE_MAX);
    int failed;

    if (n < 0)
        return strerror(errno);
    if (key)
        failed = tls_parse_key(&t->key, text, (size_t)n + 1);
    else
        failed = mbedtls_x509_crt_parse(&t->chain, text, (size_t)n + 1);
    explicit_bzero(text, sizeof text);
    /* more than 0: some of the chain were passed over, as our own CA is, whose
     * critical name constraints mbedTLS does not know; the leaf is there */
    if (failed == 0 || (failed > 0 && !key && t->chain.raw.p != NULL))
        return NULL;
    return key ? "holds no private key in PEM that mbedTLS can read"
               : "holds no certificate in PEM that mbedTLS can read";
}

/* Makes a generation from the two files.  NULL, or what is wrong; *file says
 * in which file. */
static const char *
tls_config_make(struct tls_config *t, const struct collabd *s,
                const struct cfg *c, const char **file)
{
    static const char *alpn[] = { "http/1.1", NULL };
    const char *wrong;

    mbedtls_ssl_config_init(&t->conf);
    mbedtls_x509_crt_init(&t->chain);
    mbedtls_pk_init(&t->key);
#if defined(MBEDTLS_SSL_TICKET_C) && defined(MBEDTLS_SSL_SESSION_TICKETS)
    mbedtls_ssl_ticket_init(&t->tickets);
#endif
    *file = cfg_text(c, c->tls_cert);
    wrong = tls_read_pem(s->cert_file, false, t);
    if (wrong != NULL)
        return wrong;
    *file = cfg_text(c, c->tls_key);
    wrong = tls_read_pem(s->key_file, true, t);
    if (wrong != NULL)
        return wrong;
    if (!tls_keys_match(&t->chain.pk, &t->key))
        return "is not the key of the first certificate in tls-cert";
    if (mbedtls_ssl_config_defaults(&t->conf, MBEDTLS_SSL_IS_SERVER,
                                    MBEDTLS_SSL_TRANSPORT_STREAM,
                                    MBEDTLS_SSL_PRESET_DEFAULT) != 0 ||
        mbedtls_ssl_conf_own_cert(&t->conf, &t->chain, &t->key) != 0 ||
        mbedtls_ssl_conf_alpn_protocols(&t->conf, alpn) != 0)
        return "no memory for TLS";
    mbedtls_ssl_conf_rng(&t->conf, tls_random, NULL);
    tls_set_versions(&t->conf);
    tls_set_curves(&t->conf);
#if defined(MBEDTLS_SSL_RENEGOTIATION)
    mbedtls_ssl_conf_renegotiation(&t->conf,
                                   MBEDTLS_SSL_RENEGOTIATION_DISABLED);
#endif
#if defined(MBEDTLS_SSL_TICKET_C) && defined(MBEDTLS_SSL_SESSION_TICKETS)
    if (mbedtls_ssl_ticket_setup(&t->tickets, tls_random, NULL,
                                 MBEDTLS_CIPHER_AES_256_GCM,
                                 TLS_TICKET_LIFE_S) == 0)
        mbedtls_ssl_conf_session_tickets_cb(&t->conf, mbedtls_ssl_ticket_write,
                                            mbedtls_ssl_ticket_parse,
                                            &t->tickets);
#endif
    return NULL;
}

/* Reads certificate and key anew; connections keep what they began with.
 * False: refused and said, nothing has changed. */
static bool
tls_load(struct collabd *s, const struct cfg *c)
{
    const char *wrong = NULL, *file = "";
    int i = 0;

    while (i < COLLABD_TLS_GENERATIONS && s->tls_configs[i].refs > 0)
        i++;
    if (i == COLLABD_TLS_GENERATIONS) {
        log_say(LOG_LEVEL_ERROR,
                "connections still use %d older certificates; try again when "
                "some are gone", i - 1);
        return false;
    }
    s->tls_configs[i].refs = 1;
    wrong = tls_config_make(&s->tls_configs[i], s, c, &file);
    if (wrong != NULL) {
        log_say(LOG_LEVEL_ERROR, "%s: %s", file, wrong);
        tls_config_unref(&s->tls_configs[i]);
        return false;
    }
    if (s->tls_current >= 0)
        tls_config_unref(&s->tls_configs[s->tls_current]);
    s->tls_current = i;
    return true;
}

static int
tls_bio_send(void *p, const unsigned char *from, size_t len)
{
    struct tls *t = p;
    ssize_t n = sys.send(t->fd, from, len, MSG_NOSIGNAL | MSG_DONTWAIT);

    if (n >= 0)
        return (int)n;
    return errno == EAGAIN || errno == EINTR ? MBEDTLS_ERR_SSL_WANT_WRITE
                                             : MBEDTLS_ERR_SSL_INTERNAL_ERROR;
}

static int
tls_bio_recv(void *p, unsigned char *to, size_t len)
{
    struct tls *t = p;
    ssize_t n = sys.recv(t->fd, to, len, MSG_DONTWAIT);

    if (n >= 0)
        return (int)n; /* 0: end of the stream */
    return errno == EAGAIN || errno == EINTR ? MBEDTLS_ERR_SSL_WANT_READ
                                             : MBEDTLS_ERR_SSL_INTERNAL_ERROR;
}

/* Gives a connection its TLS slot.  False: all are taken. */
static bool
tls_open(struct collabd *s, struct conn *c)
{
    uint16_t slot = s->tls_free;
    struct tls *t;

    if (slot != NONE)
        s->tls_free = s->tls[slot].next;
    else if (s->tls_fresh < s->tls_max)
        slot = (uint16_t)s->tls_fresh++;
    else
        return false;
    t = &s->tls[slot];
    *t = (struct tls){ .fd = c->fd, .conn = c->id.slot, .config = (uint8_t)s->tls_current };
    mbedtls_ssl_init(&t->ssl);
    c->tls = slot;
    s->tls_used++;
    s->tls_configs[t->config].refs++;
    return true;
}

static void
tls_close(struct collabd *s, struct conn *c)
{
    struct tls *t;

    if (c->tls == NONE)
        return;
    t = &s->tls[c->tls];
    mbedtls_ssl_free(&t->ssl);
    tls_config_unref(&s->tls_configs[t->config]);
    if (t->begun)
        s->handshakes -= !t->done;
    t->conn = NONE;
    t->next = s->tls_free;
    s->tls_free = c->tls;
    c->tls = NONE;
    s->tls_used--;
}

/* May a thread take steps of handshakes while the turn reads and writes what
 * is beyond them?  Their only common ground are tickets and, from 3.6 on, keys:
 * mbedTLS locks both if it was built to.  Signing with our key is done by that
 * thread alone. */
#if defined(MBEDTLS_THREADING_C)
#define TLS_HAS_THREAD true
#else
#define TLS_HAS_THREAD false
#endif

/* Takes a step of a handshake, never waiting, and with a thread to do so all
 * steps that can be taken.  The answer: 0 done, 1 go on at once, IO_WANT_READ,
 * IO_WANT_WRITE, IO_GONE. */
static void
tls_shake(struct work *w)
{
    struct tls *t = (struct tls *)w;
    int n;

    do {
        n = mbedtls_ssl_handshake_step(&t->ssl);
        t->answer = n == MBEDTLS_ERR_SSL_WANT_READ    ? IO_WANT_READ
                    : n == MBEDTLS_ERR_SSL_WANT_WRITE ? IO_WANT_WRITE
                    : n != 0                          ? IO_GONE
                                                      : !tls_is_over(&t->ssl);
    } while (t->answer == 1 && TLS_HAS_THREAD);
}

/* Before the first step.  False: no memory. */
static bool
tls_begin(struct collabd *s, struct tls *t)
{
    t->begun = true;
    s->handshakes++;
    if (mbedtls_ssl_setup(&t->ssl, &s->tls_configs[t->config].conf) != 0)
        return false;
    mbedtls_ssl_set_bio(&t->ssl, t, tls_bio_send, tls_bio_recv, NULL);
    return true;
}

static ssize_t
tls_recv(struct tls *t, uint8_t *to, size_t len)
{
    int n = mbedtls_ssl_read(&t->ssl, to, len);

    if (n > 0)
        return n;
    if (n == MBEDTLS_ERR_SSL_WANT_READ)
        return IO_WANT_READ;
    if (n == MBEDTLS_ERR_SSL_WANT_WRITE)
        return IO_WANT_WRITE;
    return IO_GONE;
}

/* What mbedTLS took but could not send goes first: a retry must name the same
 * length, and answers that length. */
static ssize_t
tls_send(struct tls *t, const struct iovec *from, int count)
{
    static const uint8_t nothing[1];
    ssize_t sent = 0;
    int n;

    if (t->owed > 0) {
        n = mbedtls_ssl_write(&t->ssl, nothing, t->owed);
        if (n == MBEDTLS_ERR_SSL_WANT_WRITE)
            return IO_WANT_WRITE;
        if (n < 0)
            return IO_GONE;
        t->owed = 0;
    }
    for (int i = 0; i < count; i++) {
        const uint8_t *at = from[i].iov_base;
        size_t left = from[i].iov_len;
        while (left > 0) {
            int most = mbedtls_ssl_get_max_out_record_payload(&t->ssl);
            size_t len = most > 0 && left > (size_t)most ? (size_t)most : left;
            n = mbedtls_ssl_write(&t->ssl, at, len);
            if (n == MBEDTLS_ERR_SSL_WANT_WRITE) {
                t->owed = len;
                return sent + (ssize_t)len;
            }
            if (n <= 0)
                return IO_GONE;
            sent += n;
            at += n;
            left -= (size_t)n;
        }
    }
    return sent;
}

#endif /* COLLABD_TLS */

/* ----- both ------------------------------------------------------------------ */

static ssize_t
net_recv(struct collabd *s, struct conn *c, uint8_t *to, size_t len)
{
    ssize_t n;

#if COLLABD_TLS
    if (c->tls != NONE) {
        n = tls_recv(&s->tls[c->tls], to, len);
        if (n > 0)
            s->count.bytes_in += (uint64_t)n;
        return n;
    }
#endif
    n = sys.recv(c->fd, to, len, MSG_DONTWAIT);
    if (n > 0) {
        s->count.bytes_in += (uint64_t)n;
        return n;
    }
    return n < 0 && (errno == EAGAIN || errno == EINTR) ? IO_WANT_READ
                                                        : IO_GONE;
}

/* Sends what it can of the spans: bytes taken (with TLS some may still be
 * owed), or IO_WANT_WRITE, IO_GONE. */
static ssize_t
net_send(struct collabd *s, struct conn *c, struct iovec *from, int count)
{
    ssize_t n;

    s->count.sends++;
#if COLLABD_TLS
    if (c->tls != NONE) {
        n = tls_send(&s->tls[c->tls], from, count);
        if (n > 0)
            s->count.bytes_out += (uint64_t)n;
        return n;
    }
#endif
    if (count == 1) {
        n = sys.send(c->fd, from->iov_base, from->iov_len,
                     MSG_NOSIGNAL | MSG_DONTWAIT);
    } else {
        struct msghdr m = { .msg_iov = from, .msg_iovlen = (size_t)count };
        n = sys.sendmsg(c->fd, &m, MSG_NOSIGNAL | MSG_DONTWAIT);
    }
    if (n >= 0) {
        s->count.bytes_out += (uint64_t)n;
        return n;
    }
    return errno == EAGAIN || errno == EINTR || errno == ENOBUFS
               ? IO_WANT_WRITE
               : IO_GONE;
}

/* A 503 for whom there is no buffer, straight into a plain socket. */
static void
net_say_503(struct collabd *s, int fd, const char *why)
{
    char text[256];
    int n = snprintf(text, sizeof text,
                     "HTTP/1.1 503 Service Unavailable\r\n"
                     "Content-Type: text/plain\r\nContent-Length: %zu\r\n"
                     "Retry-After: 5\r\nConnection: close\r\n\r\n%s\n",
                     strlen(why) + 1, why);

    s->count.statuses[503 - 100]++;
    (void)sys.send(fd, text, (size_t)n, MSG_NOSIGNAL | MSG_DONTWAIT);
}

/* Is there input that poll() does not know of? */
static bool
net_has_pending(const struct collabd *s, const struct conn *c)
{
#if COLLABD_TLS
    return c->tls != NONE && mbedtls_ssl_check_pending(&s->tls[c->tls].ssl);
#else
    (void)s;
    (void)c;
    return false;
#endif
}

/* Is there output that net_send took and could not send? */
static bool
net_owes(const struct collabd *s, const struct conn *c)
{
#if COLLABD_TLS
    return c->tls != NONE && s->tls[c->tls].owed > 0;
#else
    (void)s;
    (void)c;
    return false;
#endif
}

/* Says the end of our side; what is in flight still arrives. */
static void
net_shut(struct collabd *s, struct conn *c)
{
#if COLLABD_TLS
    if (c->tls != NONE && s->tls[c->tls].done)
        (void)mbedtls_ssl_close_notify(&s->tls[c->tls].ssl);
#endif
    (void)shutdown(c->fd, SHUT_WR);
    (void)s;
}
#if COLLABD_TLS

/* ===== 18  Certificates ====================================================
 * `collabd --make-cert DIR`: a CA for this box, to be installed once on each
 * device, and a leaf that is issued again as often as need be.
 *
 *     ca-key.pem --- signs ---> ca.pem     10 years; ca.crt is the same as DER,
 *          |                               the form that phones install
 *          '-------- signs ---> cert.pem   396 days; ca.pem's text behind it
 *     key.pem                              the key of cert.pem
 *
 *   Whoever steals ca-key.pem can play this box and nobody else: ca.pem has
 *   name constraints (RFC 5280 4.2.1.10), which permit this box's names and
 *   private addresses only.
 *
 *   A file that is there is kept, or it is an error that says what to do.
 *   Only a cert.pem that was issued by the ca.pem beside it is replaced.
 *
 *   The clock may be wrong: a board without a battery starts in the past.  So
 *   time is never before the birth of what was made here, and nothing is
 *   thrown away merely because it seems to have ended.
 *
 *   A leaf with more names than the machine has is not due: an interface that
 *   comes up late will find the address it had before.
 * ========================================================================= */

#define CERT_DAY 86400
#define CERT_CA_DAYS 3650
#define CERT_LEAF_DAYS 395 /* and one before now: browsers take 397 */
#define CERT_RENEW_DAYS 30
#define CERT_WARN_DAYS 90 /* a CA that ends this soon is spoken of */

/* cert.pem is, in base64, GeneralNames of CERT_SAN, less than 1 KiB besides,
 * and ca.pem. */
#define CERT_SAN 1024
#define CERT_CA_TEXT 3072
#define CERT_TEXT 6144

#define CERT_DNS 0x82 /* GeneralName: dNSName [2] and iPAddress [7] */
#define CERT_IP 0x87

#define CERT_AFRESH                                                            \
    "move all files there away, run --make-cert again and install the new "    \
    "ca.crt on each device"

/* Private addresses: what the CA may sign, and so what a leaf may hold. */
static const struct cert_range {
    uint8_t size, bits, first[2];
} cert_ranges[] = {
    { 4, 8, { 10 } },        { 4, 12, { 172, 16 } },
    { 4, 16, { 192, 168 } }, { 4, 16, { 169, 254 } },
    { 4, 10, { 100, 64 } },  { 4, 8, { 127 } },
    { 16, 7, { 0xfc } },     { 16, 10, { 0xfe, 0x80 } },
    { 16, 128, { 0 } }, /* ::1 */
};

/* A folder, what was found in it and what the machine is called now. */
struct cert {
    int folder;                     /* -1: not open */
    char dir[256];                  /* its name and a slash, for messages */
    int64_t now;                    /* seconds; see the chapter's head */
    mbedtls_pk_context ca_key, key; /* of type NONE: no such file */
    mbedtls_x509_crt ca, leaf;      /* raw.p NULL: no such file */
    size_t ca_len;                  /* of ca_text, without the zero */
    bool chained;                   /* cert.pem ends with ca.pem's text */

    char names[3][72]; /* host in lower case, its first label.local, ... */
    struct out san;    /* the GeneralNames so far, in san_bytes */
    struct out listed; /* the same for people */
    bool leaf_lacks;   /* the leaf has not all of san */
    bool quiet;        /* only judging: nothing is said of what is left out */

    uint8_t san_bytes[CERT_SAN];
    char listed_text[400], day_text[40];
    uint8_t ca_text[CERT_CA_TEXT + 1], text[CERT_TEXT + 1];
};

/* ----- dates --------------------------------------------------------------
 * time_t may end in 2038, before a CA does: hence no gmtime(). */

/* Days since 1970.  Years begin in March here, so that the leap day comes
 * last; (153 m + 2) / 5 days lie before their m-th month. */
static int64_t
cert_days(int year, int month, int day)
{
    int64_t y = month > 2 ? year : year - 1, m = (month + 9) % 12;

    return y * 365 + y / 4 - y / 100 + y / 400 + (153 * m + 2) / 5 + day - 1 -
           719468;
}

static int64_t
cert_seconds(const mbedtls_x509_time *t)
{
    return cert_days(t->year, t->mon, t->day) * CERT_DAY + t->hour * 3600 +
           t->min * 60 + t->sec;
}

/* YYYYMMDDhhmmss, as mbedTLS wants it. */
static void
cert_date(int64_t seconds, char text[40])
{
    int64_t days = seconds / CERT_DAY;
    int rest = (int)(seconds % CERT_DAY), month = 1;
    int year = 1970 + (int)(days / 366);

    while (year < 9999 && cert_days(year + 1, 1, 1) <= days)
        year++;
    while (month < 12 && cert_days(year, month + 1, 1) <= days)
        month++;
    (void)snprintf(text, 40, "%04d%02d%02d%02d%02d%02d", year, month,
                   (int)(days - cert_days(year, month, 1)) + 1, rest / 3600,
                   rest / 60 % 60, rest % 60);
}

static const char *
cert_day(struct cert *c, const mbedtls_x509_time *t)
{
    (void)snprintf(c->day_text, sizeof c->day_text, "%04d-%02d-%02d", t->year,
                   t->mon, t->day);
    return c->day_text;
}

/* ----- names, addresses and their DER -------------------------------------
 * DER has one form for each value, and what is compared came out of cert_der
 * on both sides: so searching for the bytes is enough. */

static void
cert_der(struct out *o, uint8_t tag, const void *value, size_t len)
{
    must(len <= 0xffff);
    out_u8(o, tag);
    if (len > 0xff) {
        out_u8(o, 0x82);
        out_u8(o, (uint8_t)(len >> 8));
    } else if (len > 0x7f) {
        out_u8(o, 0x81);
    }
    out_u8(o, (uint8_t)len);
    out_bytes(o, value, len);
}

/* GeneralSubtree: a name and all below it, or an address and its mask. */
static void
cert_subtree(struct out *o, uint8_t tag, const void *value, size_t len)
{
    uint8_t name[80];
    struct out n = out_over(name, sizeof name);

    cert_der(&n, tag, value, len);
    must(!n.full);
    cert_der(o, 0x30, name, (size_t)(n.at - name));
}

/* A range's first address and its mask, one behind the other. */
static void
cert_range(const struct cert_range *r, uint8_t both[32])
{
    memset(both, 0, 32);
    memcpy(both, r->first, 2);
    if (r->bits == 128)
        both[15] = 1;
    for (unsigned i = 0; i < r->bits; i++)
        both[r->size + i / 8] |= (uint8_t)(0x80 >> i % 8);
}

static bool
cert_is_private(const uint8_t *address, size_t size)
{
    uint8_t both[32];

    for (size_t i = 0; i < sizeof cert_ranges / sizeof cert_ranges[0]; i++) {
        size_t n = 0;

        cert_range(&cert_ranges[i], both);
        while (n < size && (address[n] & both[size + n]) == both[n])
            n++;
        if (n == size && size == cert_ranges[i].size)
            return true;
    }
    return false;
}

/* NameConstraints for three names and the private ranges. */
static void
cert_constraints(struct out *o, char names[3][72])
{
    uint8_t trees[512], permitted[520], both[32];
    struct out t = out_over(trees, sizeof trees);
    struct out p = out_over(permitted, sizeof permitted);

    for (int i = 0; i < 3; i++)
        cert_subtree(&t, CERT_DNS, names[i], strlen(names[i]));
    for (size_t i = 0; i < sizeof cert_ranges / sizeof cert_ranges[0]; i++) {
        cert_range(&cert_ranges[i], both);
        cert_subtree(&t, CERT_IP, both, 2 * (size_t)cert_ranges[i].size);
    }
    cert_der(&p, 0xa0, trees, (size_t)(t.at - trees));
    must(!t.full && !p.full);
    cert_der(o, 0x30, permitted, (size_t)(p.at - permitted));
}

/* Labels of at most 63 letters, digits and inner hyphens (RFC 1123 2.1). */
static bool
cert_is_hostname(const char *s)
{
    size_t label = 0;

    for (; *s != '\0'; s++) {
        bool alnum = (*s >= 'a' && *s <= 'z') || (*s >= '0' && *s <= '9');

        if (*s == '.' ? label == 0 || s[-1] == '-'
                      : !alnum && (*s != '-' || label == 0))
            return false;
        label = *s == '.' ? 0 : label + 1;
        if (label > 63)
            return false;
    }
    return label > 0 && s[-1] != '-';
}

static int
cert_find_host(struct cert *c)
{
    char *host = c->names[0];

    if (gethostname(host, 65) != 0)
        host[0] = '\0';
    for (char *s = host; *s != '\0'; s++)
        *s = (char)byte_lower((uint8_t)*s);
    (void)snprintf(c->names[1], sizeof c->names[1], "%.*s.local",
                   (int)strcspn(host, "."), host);
    memcpy(c->names[2], "localhost", sizeof "localhost");
    if (cert_is_hostname(host))
        return 0;
    log_say(LOG_LEVEL_ERROR,
            "the hostname '%s' cannot stand in a certificate: set one of "
            "letters, digits, hyphens and dots, as in `hostname my-box` (and "
            "in /etc/hostname), and run --make-cert again",
            host);
    return -1;
}

static bool
cert_has(const mbedtls_x509_crt *crt, const void *bytes, size_t len)
{
    return crt->v3_ext.p != NULL &&
           memmem(crt->v3_ext.p, crt->v3_ext.len, bytes, len) != NULL;
}

/* A CA without constraints, brought from elsewhere, may sign any name. */
static bool
cert_permits(const mbedtls_x509_crt *ca, const char *name)
{
    uint8_t tree[80];
    struct out t = out_over(tree, sizeof tree);

    cert_subtree(&t, CERT_DNS, name, strlen(name));
    return !cert_has(ca, "\x06\x03\x55\x1d\x1e", 5) ||
           cert_has(ca, tree, (size_t)(t.at - tree));
}

/* Takes a name or an address into the list, once, if the CA may sign it. */
static void
cert_add(struct cert *c, uint8_t tag, const void *value, size_t len,
         const char *shown)
{
    uint8_t entry[80];
    struct out e = out_over(entry, sizeof entry);
    bool fits = tag == CERT_DNS ? cert_permits(&c->ca, shown)
                                : cert_is_private(value, len);

    cert_der(&e, tag, value, len);
    len = (size_t)(e.at - entry);
    if (memmem(c->san_bytes, (size_t)(c->san.at - c->san_bytes), entry, len))
        return;
    if (fits && (size_t)(c->san.end - c->san.at) >= len) {
        out_bytes(&c->san, entry, len);
        out_format(&c->listed, " %s", shown);
        c->leaf_lacks = c->leaf_lacks || !cert_has(&c->leaf, entry, len);
    } else if (!c->quiet) {
        log_say(tag == CERT_DNS ? LOG_LEVEL_WARNING : LOG_LEVEL_INFO,
                "%scert.pem is without %s, %s%s", c->dir, shown,
                fits ? "for which there is no room"
                     : "which ca.pem does not permit",
                tag == CERT_DNS ? ": for a new hostname " CERT_AFRESH : "");
    }
}

/* Lists what the machine is called now. */
static void
cert_find_names(struct cert *c)
{
    struct ifaddrs *all = NULL;

    for (int i = 0; i < 3; i++)
        cert_add(c, CERT_DNS, c->names[i], strlen(c->names[i]), c->names[i]);
    if (getifaddrs(&all) != 0)
        log_say(LOG_LEVEL_WARNING,
                "no addresses for the certificate: they cannot be listed: %s",
                strerror(errno));
    for (struct ifaddrs *a = all; a != NULL; a = a->ifa_next) {
        int family = a->ifa_addr == NULL ? AF_UNSPEC : a->ifa_addr->sa_family;
        char shown[INET6_ADDRSTRLEN];
        const void *at;

        if (family == AF_INET)
            at = &((struct sockaddr_in *)(void *)a->ifa_addr)->sin_addr;
        else if (family == AF_INET6)
            at = &((struct sockaddr_in6 *)(void *)a->ifa_addr)->sin6_addr;
        else
            continue;
        if ((a->ifa_flags & IFF_UP) != 0 &&
            inet_ntop(family, at, shown, sizeof shown) != NULL)
            cert_add(c, CERT_IP, at, family == AF_INET ? 4 : 16, shown);
    }
    if (all != NULL)
        freeifaddrs(all);
}

/* ----- files -------------------------------------------------------------- */

/* These two say what is wrong with a file and what to do, and return -1. */
static int
cert_bad(const struct cert *c, const char *name, const char *what)
{
    bool ca = strncmp(name, "ca", 2) == 0;

    log_say(LOG_LEVEL_ERROR, "%s%s %s: put the right file back, or %s", c->dir,
            name, what,
            ca ? CERT_AFRESH : "move it away and run --make-cert again");
    return -1;
}

static int
cert_barred(const struct cert *c, const char *name, int error)
{
    log_say(LOG_LEVEL_ERROR,
            "%s%s: %s: name a folder where this user may read and write, and "
            "that has room",
            c->dir, name, strerror(error));
    return -1;
}

/* The length counts the zero behind the text, as mbedTLS wants it of PEM.
 * 0: there is no such file.  -1: cannot be read, logged. */
static ssize_t
cert_read(const struct cert *c, const char *name, uint8_t *buf, size_t max)
{
    ssize_t n = sys_read_file((struct sys_file){ c->folder, name }, buf, max);

    if (n >= 0)
        return n + 1;
    return errno == ENOENT ? 0 : cert_barred(c, name, errno);
}

/* Replaces a file as a whole: after a power cut it is the old one or the new
 * one. */
static int
cert_write(const struct cert *c, const char *name, mode_t mode,
           const uint8_t *data, size_t len)
{
    char temp[32];
    int fd, error;

    (void)snprintf(temp, sizeof temp, ".%s.new", name);
    (void)unlinkat(c->folder, temp, 0);
    fd = sys.openat(c->folder, temp, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC,
                    mode);
    error = fd < 0 ? errno : 0;
    while (error == 0 && len > 0) {
        ssize_t n = sys.write(fd, data, len);

        if (n < 0 && errno != EINTR)
            error = errno;
        if (n > 0) {
            data += n;
            len -= (size_t)n;
        }
    }
    if (error == 0 && sys.fsync(fd) != 0)
        error = errno;
    if (fd >= 0 && sys.close(fd) != 0 && error == 0)
        error = errno;
    if (error == 0 && sys.renameat(c->folder, temp, c->folder, name) != 0)
        error = errno;
    /* EINVAL: a file system on which a folder needs no sync */
    if (error == 0 && sys.fsync(c->folder) != 0 && errno != EINVAL)
        error = errno;
    if (error == 0)
        return 0;
    (void)unlinkat(c->folder, temp, 0);
    return cert_barred(c, name, error);
}

static int
cert_load_key(struct cert *c, const char *name, mbedtls_pk_context *key)
{
    ssize_t n = cert_read(c, name, c->text, CERT_TEXT);

    if (n > 0 && tls_parse_key(key, c->text, (size_t)n) != 0)
        return cert_bad(c, name, "is not a private key without password");
    return n < 0 ? -1 : 0;
}

/* Time does not run before this certificate was born. */
static void
cert_set_now(struct cert *c, const mbedtls_x509_crt *crt, const char *name)
{
    int64_t birth = cert_seconds(&crt->valid_from);

    if (birth > sys_now_real())
        log_say(LOG_LEVEL_WARNING,
                "%s%s is not valid before %s: set the clock; or, if it was "
                "wrong then, %s",
                c->dir, name, cert_day(c, &crt->valid_from), CERT_AFRESH);
    if (c->now < birth + CERT_DAY)
        c->now = birth + CERT_DAY;
}

static int
cert_load_ca(struct cert *c)
{
    ssize_t n = cert_read(c, "ca.pem", c->ca_text, CERT_CA_TEXT);
    int64_t left;

    if (n <= 0)
        return (int)n;
    c->ca_len = (size_t)n - 1;
    if (tls_parse_ca(&c->ca, c->ca_text) != 0)
        return cert_bad(c, "ca.pem", "is not a certificate");
    if (mbedtls_pk_get_type(&c->ca_key) == MBEDTLS_PK_NONE)
        return cert_bad(c, "ca-key.pem", "is missing beside ca.pem");
    if (!tls_keys_match(&c->ca.pk, &c->ca_key))
        return cert_bad(c, "ca-key.pem", "does not belong to ca.pem");
    if (mbedtls_x509_crt_check_key_usage(&c->ca,
                                         MBEDTLS_X509_KU_KEY_CERT_SIGN) != 0)
        return cert_bad(c, "ca.pem", "is not a CA");

    cert_set_now(c, &c->ca, "ca.pem");
    left = cert_seconds(&c->ca.valid_to) - c->now;
    if (left < CERT_WARN_DAYS * CERT_DAY)
        log_say(left < 0 ? LOG_LEVEL_ERROR : LOG_LEVEL_WARNING,
                "%sca.pem ends on %s: if the clock is right, %s", c->dir,
                cert_day(c, &c->ca.valid_to), CERT_AFRESH);
    return left < 0 ? -1 : 0;
}

static int
cert_load_leaf(struct cert *c)
{
    ssize_t n = cert_read(c, "cert.pem", c->text, CERT_TEXT);

    if (n <= 0)
        return (int)n;
    /* More than 0: the CA behind it was skipped for its constraints. */
    if (mbedtls_x509_crt_parse(&c->leaf, c->text, (size_t)n) < 0)
        return cert_bad(c, "cert.pem", "is not a certificate");
    c->chained =
        (size_t)n > c->ca_len &&
        memcmp(c->text + (size_t)n - 1 - c->ca_len, c->ca_text, c->ca_len) == 0;
    cert_set_now(c, &c->leaf, "cert.pem");
    return 0;
}

static void
cert_close(struct cert *c)
{
    mbedtls_pk_free(&c->ca_key);
    mbedtls_pk_free(&c->key);
    mbedtls_x509_crt_free(&c->ca);
    mbedtls_x509_crt_free(&c->leaf);
    if (c->folder >= 0)
        (void)sys.close(c->folder);
    explicit_bzero(c, sizeof *c);
    c->folder = -1;
}

/* Opens the folder of a file, takes its lock and loads what is in it; path
 * names the file in messages.  To be closed even if it fails. */
static int
cert_open(struct cert *c, struct sys_file file, const char *path)
{
    const char *slash = strrchr(path, '/');

    memset(c, 0, sizeof *c);
    (void)snprintf(c->dir, sizeof c->dir, "%.*s",
                   slash == NULL ? 0 : (int)(slash + 1 - path), path);
    c->now = sys_now_real();
    c->san = out_over(c->san_bytes, sizeof c->san_bytes);
    c->listed = out_over(c->listed_text, sizeof c->listed_text);
    mbedtls_pk_init(&c->ca_key);
    mbedtls_pk_init(&c->key);
    mbedtls_x509_crt_init(&c->ca);
    mbedtls_x509_crt_init(&c->leaf);
    /* anew, as what O_PATH opened can be neither locked nor synced */
    c->folder =
        sys.openat(file.folder, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (c->folder < 0)
        return cert_barred(c, "", errno);
    (void)flock(c->folder, LOCK_EX);
    if (tls_random_start() != 0 || cert_find_host(c) != 0 ||
        cert_load_key(c, "ca-key.pem", &c->ca_key) != 0 ||
        cert_load_ca(c) != 0 || cert_load_key(c, "key.pem", &c->key) != 0)
        return -1;
    return cert_load_leaf(c);
}

/* ----- verdicts ----------------------------------------------------------- */

static bool
cert_is_ours(struct cert *c)
{
    uint32_t flags = 0;

    if (c->ca.raw.p == NULL)
        return false;
    (void)mbedtls_x509_crt_verify(&c->leaf, &c->ca, NULL, NULL, &flags, NULL,
                                  NULL);
    return (flags & MBEDTLS_X509_BADCERT_NOT_TRUSTED) == 0;
}

/* Why a leaf has to be issued; NULL: it has not. */
static const char *
cert_judge(const struct cert *c)
{
    int64_t end = cert_seconds(&c->leaf.valid_to);

    if (c->leaf.raw.p == NULL)
        return "there was none";
    if (!tls_keys_match(&c->leaf.pk, &c->key))
        return "key.pem was not its key";
    if (!c->chained)
        return "ca.pem was not behind it";
    if (end < c->now + CERT_RENEW_DAYS * CERT_DAY &&
        end < cert_seconds(&c->ca.valid_to))
        return "it had less than 30 days left";
    return c->leaf_lacks ? "the machine has a new name or address" : NULL;
}

/* ----- making ------------------------------------------------------------- */

/* What a chain of calls of mbedTLS came to. */
static int
cert_made(const char *what, int error)
{
    if (error == 0)
        return 0;
    log_say(LOG_LEVEL_ERROR, "mbedTLS cannot make a %s (-0x%04x)", what,
            (unsigned)-error);
    return -1;
}

/* Makes a key and writes it, unless one was loaded. */
static int
cert_need_key(struct cert *c, const char *name, mbedtls_pk_context *key)
{
    int error;

    if (mbedtls_pk_get_type(key) != MBEDTLS_PK_NONE)
        return 0;
    error = mbedtls_pk_setup(key, mbedtls_pk_info_from_type(MBEDTLS_PK_ECKEY));
    if (error == 0)
        error = mbedtls_ecp_gen_key(MBEDTLS_ECP_DP_SECP256R1,
                                    mbedtls_pk_ec(*key), tls_random, NULL);
    if (error == 0)
        error = mbedtls_pk_write_key_pem(key, c->text, CERT_TEXT);
    if (cert_made("key", error) != 0)
        return -1;
    return cert_write(c, name, 0600, c->text, strlen((char *)c->text));
}

/* What a CA is, or a leaf: all but names and keys. */
static int
cert_extend(struct cert *c, mbedtls_x509write_cert *w, bool is_ca)
{
    static const uint8_t basic[] = { 0x30, 6, 1, 1, 0xff, 2, 1, 0 };
    static const uint8_t signs[] = { 3, 2, 1, 0x06 }; /* certificates, CRLs */
    static const uint8_t usage[] = { 3, 2, 7, 0x80 }; /* digitalSignature */
    static const uint8_t server[] = {
        0x30, 10, 6, 8, 0x2b, 6, 1, 5, 5, 7, 3, 1
    }; /* serverAuth */
    uint8_t names[CERT_SAN + 4];
    struct out o = out_over(names, sizeof names);
    int error = 0;

    if (is_ca)
        cert_constraints(&o, c->names);
    else
        cert_der(&o, 0x30, c->san_bytes, (size_t)(c->san.at - c->san_bytes));
    must(!o.full);

    const struct {
        char id; /* of 2.5.29 */
        bool critical;
        const uint8_t *value;
        size_t len;
    } all[] = {
        { 15, true, is_ca ? signs : usage, sizeof usage },
        { is_ca ? 19 : 37, is_ca, is_ca ? basic : server,
          is_ca ? sizeof basic : sizeof server },
        { is_ca ? 30 : 17, is_ca, names, (size_t)(o.at - names) },
    };
    for (int i = 0; i < 3 && error == 0; i++)
        error = mbedtls_x509write_crt_set_extension(
            w, (char[]){ 0x55, 0x1d, all[i].id }, 3, all[i].critical,
            all[i].value, all[i].len);
    return error;
}

/* Signs a CA (which signs itself) or a leaf, as PEM into c->text. */
static int
cert_sign(struct cert *c, bool is_ca)
{
    int64_t end = c->now + (is_ca ? CERT_CA_DAYS : CERT_LEAF_DAYS) * CERT_DAY;
    char from[40], to[40], subject[256], issuer[256];
    uint8_t serial[16];
    mbedtls_x509write_cert w;
    int error = tls_random(NULL, serial, sizeof serial);

    serial[0] = (uint8_t)((serial[0] & 0x3f) | 0x40); /* positive, not 0 */
    if (is_ca) {
        /* at most 64 bytes; several boxes may have one hostname */
        (void)snprintf(subject, sizeof subject,
                       "CN=collabd CA %.40s %02x%02x%02x", c->names[0],
                       serial[1], serial[2], serial[3]);
        memcpy(issuer, subject, sizeof issuer);
    } else {
        (void)snprintf(subject, sizeof subject, "CN=%s", c->names[0]);
        (void)mbedtls_x509_dn_gets(issuer, sizeof issuer, &c->ca.subject);
        if (end > cert_seconds(&c->ca.valid_to))
            end = cert_seconds(&c->ca.valid_to);
    }
    cert_date(c->now - CERT_DAY, from);
    cert_date(end, to);

    mbedtls_x509write_crt_init(&w);
    mbedtls_x509write_crt_set_md_alg(&w, MBEDTLS_MD_SHA256);
    mbedtls_x509write_crt_set_subject_key(&w, is_ca ? &c->ca_key : &c->key);
    mbedtls_x509write_crt_set_issuer_key(&w, &c->ca_key);
    if (error == 0)
        error = tls_set_serial(&w, serial, sizeof serial);
    if (error == 0)
        error = mbedtls_x509write_crt_set_validity(&w, from, to);
    if (error == 0)
        error = mbedtls_x509write_crt_set_subject_name(&w, subject);
    if (error == 0)
        error = mbedtls_x509write_crt_set_issuer_name(&w, issuer);
    if (error == 0)
        error = cert_extend(c, &w, is_ca);
    if (error == 0)
        error = mbedtls_x509write_crt_set_subject_key_identifier(&w);
    if (error == 0)
        error = mbedtls_x509write_crt_set_authority_key_identifier(&w);
    if (error == 0)
        error =
            mbedtls_x509write_crt_pem(&w, c->text, CERT_TEXT, tls_random, NULL);
    mbedtls_x509write_crt_free(&w);
    return cert_made("certificate", error);
}

static int
cert_make_ca(struct cert *c)
{
    if (cert_sign(c, true) != 0 ||
        cert_write(c, "ca.pem", 0644, c->text, strlen((char *)c->text)) != 0)
        return -1;
    log_say(LOG_LEVEL_INFO,
            "%sca.pem made for %s, %s and private addresses: install ca.crt "
            "once on each device",
            c->dir, c->names[0], c->names[1]);
    return cert_load_ca(c);
}

static int
cert_make_leaf(struct cert *c, const char *why)
{
    size_t len;

    if (cert_sign(c, false) != 0)
        return -1;
    len = strlen((char *)c->text);
    if (len + c->ca_len > CERT_TEXT)
        return cert_bad(c, "ca.pem", "is too long");
    memcpy(c->text + len, c->ca_text, c->ca_len);
    if (cert_write(c, "cert.pem", 0644, c->text, len + c->ca_len) != 0)
        return -1;
    log_say(LOG_LEVEL_INFO, "%scert.pem issued, because %s, for%s%s", c->dir,
            why, c->listed_text, c->listed.full ? " ..." : "");
    return 0;
}

/* Makes what is missing or due. */
static int
cert_refresh(struct cert *c)
{
    const char *why;
    ssize_t n;

    if (c->leaf.raw.p != NULL && !cert_is_ours(c))
        return cert_bad(c, "cert.pem", "was not issued by the ca.pem there");
    if (cert_need_key(c, "ca-key.pem", &c->ca_key) != 0 ||
        cert_need_key(c, "key.pem", &c->key) != 0 ||
        (c->ca.raw.p == NULL && cert_make_ca(c) != 0))
        return -1;

    n = cert_read(c, "ca.crt", c->text, CERT_TEXT);
    if (n < 0)
        return -1;
    if (((size_t)n != c->ca.raw.len + 1 ||
         memcmp(c->text, c->ca.raw.p, c->ca.raw.len) != 0) &&
        cert_write(c, "ca.crt", 0644, c->ca.raw.p, c->ca.raw.len) != 0)
        return -1;

    cert_find_names(c);
    why = cert_judge(c);
    if (why != NULL)
        return cert_make_leaf(c, why);
    log_say(LOG_LEVEL_INFO, "%scert.pem kept, good until %s", c->dir,
            cert_day(c, &c->leaf.valid_to));
    return 0;
}

/* Makes or keeps what belongs beside the cert.pem at path, whose folder is
 * open.  0, or -1: it is logged what is wrong. */
static int
cert_make_at(struct sys_file file, const char *path)
{
    struct cert c;
    int done = cert_open(&c, file, path);

    if (done == 0)
        done = cert_refresh(&c);
    cert_close(&c);
    return done;
}

/* `collabd --make-cert DIR`. */
static int
cert_make(const char *dir)
{
    struct sys_file file = { -1, "" };
    size_t len = strlen(dir);
    char path[PATH_MAX];
    int done;

    while (len > 1 && dir[len - 1] == '/')
        len--;
    errno = ENAMETOOLONG;
    if (len + sizeof "/cert.pem" <= sizeof path &&
        (mkdir(dir, 0700) == 0 || errno == EEXIST)) {
        (void)snprintf(path, sizeof path, "%.*s/cert.pem", (int)len, dir);
        file = sys_file_at(path);
    }
    if (file.folder < 0) {
        log_say(LOG_LEVEL_ERROR,
                "%.255s: %s: name a folder inside one that this user may "
                "write to",
                dir, strerror(errno));
        return -1;
    }
    done = cert_make_at(file, path);
    (void)sys.close(file.folder);
    return done;
}

/* Does the leaf at path, whose folder is open, want to be issued again?
 * 1: yes, and *why says why.  0: no, or not by us: its name is not cert.pem,
 * this user finds no ca-key.pem beside it to read, or another CA issued it.
 * -1: it cannot be judged; logged. */
static int
cert_due(struct sys_file file, const char *path, const char **why)
{
    struct cert c;
    int due;

    *why = NULL;
    if (file.folder < 0 || strcmp(file.name, "cert.pem") != 0 ||
        faccessat(file.folder, "ca-key.pem", R_OK, AT_EACCESS) != 0)
        return 0;
    due = cert_open(&c, file, path);
    c.quiet = true;
    if (due == 0 && (c.leaf.raw.p == NULL || cert_is_ours(&c))) {
        cert_find_names(&c);
        *why = cert_judge(&c);
        due = *why != NULL;
    }
    cert_close(&c);
    return due;
}

/* Issues the certificate in use again if we made it and that is due.  Whether
 * it is good shows when it is loaded. */
static void
cert_renew(const struct collabd *s, const struct cfg *c)
{
    const char *path = cfg_text(c, c->tls_cert), *why;

    if (cert_due(s->cert_file, path, &why) == 1)
        (void)cert_make_at(s->cert_file, path);
}

#endif /* COLLABD_TLS */

/* ===== 19  Files ===========================================================
 * Static files under --www.  The folder is open since start; a path is walked
 * from it segment by segment and no symbolic link is followed, so there is no
 * way out.
 * ========================================================================= */

#define FILE_TURN_MAX 65536 /* bytes of a file per client and turn */

struct file {
    int status; /* 200, 206, 301, 304, 404, 416 */
    int fd;     /* 200, 206 */
    uint64_t size, from, to; /* bytes from .. to - 1 */
    bool gzip;     /* the .gz beside it is sent */
    bool has_gzip; /* there is one: Vary */
    const char *type;
    char etag[48];
};

static const char *
file_type(const char *name)
{
    static const char types[][2][32] = {
        { "html", "text/html; charset=utf-8" },
        { "htm", "text/html; charset=utf-8" },
        { "js", "text/javascript; charset=utf-8" },
        { "mjs", "text/javascript; charset=utf-8" },
        { "css", "text/css; charset=utf-8" },
        { "json", "application/json" },
        { "map", "application/json" },
        { "wasm", "application/wasm" },
        { "svg", "image/svg+xml" },
        { "png", "image/png" },
        { "jpg", "image/jpeg" },
        { "jpeg", "image/jpeg" },
        { "gif", "image/gif" },
        { "webp", "image/webp" },
        { "ico", "image/x-icon" },
        { "txt", "text/plain; charset=utf-8" },
        { "md", "text/plain; charset=utf-8" },
        { "xml", "application/xml" },
        { "pdf", "application/pdf" },
        { "woff2", "font/woff2" },
        { "woff", "font/woff" },
        { "ttf", "font/ttf" },
        { "otf", "font/otf" },
        { "crt", "application/x-x509-ca-cert" },
        { "webmanifest", "application/manifest+json" },
    };
    const char *dot = strrchr(name, '.');

    for (size_t i = 0; dot != NULL && i < sizeof types / sizeof *types; i++)
        if (span_is_folded(span_text(dot + 1), types[i][0]))
            return types[i][1];
    return "application/octet-stream";
}

/* Opens the folder that holds the path's last segment and says that segment's
 * name.  -1: there is no such folder. */
static int
file_walk(int folder, char *path, char **name)
{
    char *segment = path, *slash;
    int at = folder;

    while ((slash = strchr(segment, '/')) != NULL) {
        int next;
        *slash = '\0';
        next = *segment == '\0' || strcmp(segment, ".") == 0 ||
                       strcmp(segment, "..") == 0
                   ? -1
                   : sys.openat(at, segment,
                                O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        if (at != folder)
            (void)sys.close(at);
        if (next < 0)
            return -1;
        at = next;
        segment = slash + 1;
    }
    *name = segment;
    return at;
}

/* Opens a regular file; -1: there is none, or it is a link or a folder. */
static int
file_open(int folder, const char *name, struct stat *st)
{
    int fd = sys.openat(folder, name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC |
                                          O_NONBLOCK | O_NOCTTY);

    if (fd < 0)
        return -1;
    if (fstat(fd, st) == 0 && S_ISREG(st->st_mode))
        return fd;
    (void)sys.close(fd);
    return -1;
}

static bool
file_is_folder(int folder, const char *name)
{
    struct stat st;

    return fstatat(folder, name, &st, AT_SYMLINK_NOFOLLOW) == 0 &&
           S_ISDIR(st.st_mode);
}

/* Does the list of If-None-Match name this tag?  Weak comparison. */
static bool
file_tag_matches(struct span list, const char *etag)
{
    struct span one;

    if (span_is(span_trim(list), "*"))
        return true;
    while (http_list_next(&list, &one)) {
        if (span_starts(one, "W/"))
            one.at += 2;
        if (span_is(one, etag))
            return true;
    }
    return false;
}

/* A position in a range; one beyond all files counts as that. */
static bool
file_position(struct span digits, uint64_t *out)
{
    for (const uint8_t *p = digits.at; p < digits.end; p++)
        if (!byte_is_digit(*p))
            return false;
    if (span_is_empty(digits))
        return false;
    if (span_decimal(digits, INT64_MAX - 1, out) != PARSE_OK)
        *out = INT64_MAX - 1;
    return true;
}

/* RFC 9110 14.2: one range of bytes; a list of several, and what is no range
 * at all, is passed over and the whole is sent. */
static void
file_range(const struct http *h, struct file *f)
{
    struct span range = h->range, first;
    uint64_t from = 0, to = 0;

    if (span_len(range) < 6 ||
        !span_is_folded(span_of(range.at, 6), "bytes=") || h->method != HTTP_GET ||
        (!span_is_empty(h->if_range) && !span_is(h->if_range, f->etag)))
        return;
    range.at += 6;
    if (span_has(range, ',') || !span_has(range, '-'))
        return;
    first = span_trim(span_cut(&range, '-'));
    range = span_trim(range);
    if (span_is_empty(first)) { /* the last n */
        if (!file_position(range, &to))
            return;
        from = to < f->size ? f->size - to : 0;
        to = to == 0 ? 0 : f->size;
    } else {
        if (!file_position(first, &from))
            return;
        to = f->size;
        if (!span_is_empty(range)) {
            if (!file_position(range, &to) || to < from)
                return;
            to = to + 1 < f->size ? to + 1 : f->size;
        }
    }
    f->status = from < to ? 206 : 416;
    if (f->status == 206) {
        f->from = from;
        f->to = to;
    }
}

static struct file
file_find(int www, const struct http *h)
{
    struct file f = { .status = 404, .fd = -1 };
    char path[COLLABD_TARGET_MAX + 16], *name;
    struct out o = out_over(path, sizeof path - 16);
    struct stat st, plain;
    int folder, zipped;
    size_t len;

    for (struct span s = h->path; span_len(s) >= 3; s.at++)
        if (*s.at == '%' && s.at[1] == '2' && byte_lower(s.at[2]) == 'f')
            return f;
    if (!http_decode(h->path, &o) ||
        span_has((struct span){ (uint8_t *)path, o.at }, 0))
        return f;
    *o.at = '\0';
    if (path[0] != '/')
        return f;
    len = strlen(path);
    if (path[len - 1] == '/')
        memcpy(path + len, "index.html", sizeof "index.html");
    folder = file_walk(www, path + 1, &name);
    if (folder < 0)
        return f;
    f.fd = file_open(folder, name, &plain);
    if (f.fd < 0) {
        if (*name != '\0' && strcmp(name, "..") != 0 &&
            strcmp(name, ".") != 0 && file_is_folder(folder, name))
            f.status = 301;
        if (folder != www)
            (void)sys.close(folder);
        return f;
    }
    st = plain;
    f.type = file_type(name);
    memcpy(name + strlen(name), ".gz", sizeof ".gz");
    zipped = file_open(folder, name, &st);
    f.has_gzip = zipped >= 0;
    f.gzip = f.has_gzip && http_accepts_gzip(h->accept_encoding);
    if (f.gzip) {
        (void)sys.close(f.fd);
        f.fd = zipped;
    } else if (f.has_gzip) {
        (void)sys.close(zipped);
        st = plain;
    }
    if (folder != www)
        (void)sys.close(folder);
    f.status = 200;
    f.size = f.to = (uint64_t)st.st_size;
    (void)snprintf(f.etag, sizeof f.etag, "\"%" PRIx64 "-%lx-%" PRIx64 "%s\"",
                   (uint64_t)st.st_mtim.tv_sec, st.st_mtim.tv_nsec, f.size,
                   f.gzip ? "z" : "");
    if (!span_is_empty(h->if_none_match)) {
        if (file_tag_matches(h->if_none_match, f.etag))
            f.status = 304;
    }
    if (f.status == 200)
        file_range(h, &f);
    if (f.status == 304 || f.status == 416 || h->method == HTTP_HEAD) {
        (void)sys.close(f.fd);
        f.fd = -1;
    }
    return f;
}
/* ===== 20  Connections =====================================================
 * The life of a connection: the state machine drawn in Tables, and every
 * way a peer leaves.
 *
 * A connection is read when poll() says so and nothing forbids it, and written
 * once a turn when it has something to send.  Output has three sources, and
 * changes between them only where a frame ends: control frames, a reply, the
 * room's ring.  conn_close is the only way a connection ends; it frees
 * nothing, so no pointer dies under a caller: the turn does, when all events
 * are dealt with.
 * ========================================================================= */

#define CONN_CLOSE_MS 2000     /* to send Close, then to see the peer leave */
#define CONN_READS 16          /* of a receive buffer each, a turn */
#define CONN_SPANS 64          /* of one sendmsg */
#define CONN_SEND_MAX 262144   /* bytes to one client a turn */
#define CONN_MESSAGE_MS 60000  /* for a message, and 1 ms more for each byte */
#define CONN_RETRY_MS 100      /* to look again for document memory */
#define CONN_STALL_MS 2000     /* a holder silent for so long may be evicted */

static void
conn_set_deadline(struct collabd *s, struct conn *c, int64_t at)
{
    c->deadline = at;
    if (at < s->due)
        s->due = at;
}

static int64_t
conn_timeout_ms(const struct collabd *s)
{
    return (int64_t)s->cfg->request_timeout * 1000;
}

/* Sees to it that the turn flushes (or frees) this connection. */
static void
conn_schedule(struct collabd *s, struct conn *c)
{
    if (c->flushing)
        return;
    c->flushing = true;
    c->next = s->flush_first;
    s->flush_first = c->id.slot;
}

static void
conn_set_more(struct collabd *s, struct conn *c, bool more)
{
    s->more += (unsigned)more;
    s->more -= (unsigned)c->more;
    c->more = more;
}

static struct room *
conn_room(struct collabd *s, const struct conn *c)
{
    return c->in.room == NONE ? NULL : &s->rooms[c->in.room];
}

static bool
conn_is_member(const struct collabd *s, const struct conn *c)
{
    return c->in.room != NONE &&
           s->rooms[c->in.room].kind == ROOM_DOCUMENT;
}

/* Leaves its room, if it is in one. */
static void
conn_leave(struct collabd *s, struct conn *c)
{
    if (conn_is_member(s, c))
        sync_leave(s, c);
    else
        room_leave(s, c);
}

/* Is a frame of its own block begun? */
static bool
conn_is_in_block(const struct collabd *s, const struct conn *c)
{
    return conn_is_member(s, c) && sync_of(s, c)->sent > 0;
}

static struct request *
conn_request(struct collabd *s, const struct conn *c)
{
    return c->request == NONE ? NULL : &s->requests[c->request];
}

/* Has it used up its rate?  Debt is paid back with time. */
static bool
conn_is_in_debt(const struct conn *c)
{
    return c->credit_messages < 0 || c->credit_bytes < 0;
}

/* Is this connection to be read? */
static bool
conn_may_read(struct collabd *s, const struct conn *c)
{
    const struct room *room = conn_room(s, c);

    switch (c->state) {
    case CONN_FREE:
    case CONN_GONE:
    case CONN_REPLY:
    case CONN_CLOSING:
        return false;
    case CONN_HANDSHAKE:
#if COLLABD_TLS
        return !s->tls[c->tls].ready && !c->blocked;
#else
        return false;
#endif
    case CONN_HEAD:
        return !c->starved;
    case CONN_OPEN:
        return !c->starved && !conn_is_in_debt(c) &&
               (room == NULL || (!room->held && !room_wants_flush(room)));
    case CONN_LINGER:
        return true;
    }
    return false;
}

/* Tells poll() what this connection waits for. */
static void
conn_update_poll(struct collabd *s, struct conn *c)
{
    short events = 0;

    if (c->poll == NONE)
        return;
    if (conn_may_read(s, c))
        events |= POLLIN;
    if (c->blocked)
        events |= POLLOUT;
    s->poll[c->poll].events = events;
    s->poll[c->poll].fd = c->busy ? -1 : c->fd;
}

/* Is there input that poll() does not know of: bytes behind the request head,
 * or inside mbedTLS? */
static bool
conn_has_more(struct collabd *s, const struct conn *c)
{
    const struct request *q = conn_request(s, c);

    if (c->starved)
        return false;
    if (c->state == CONN_OPEN && q != NULL && q->head_len > 0)
        return true;
    return (c->state == CONN_OPEN || c->state == CONN_HEAD) &&
           net_has_pending(s, c) && conn_may_read(s, c);
}

/* What follows every event of a connection. */
static void
conn_update(struct collabd *s, struct conn *c)
{
    conn_set_more(s, c, conn_has_more(s, c));
    conn_update_poll(s, c);
}

static void
conn_log(struct collabd *s, const struct conn *c, enum log_level level,
         const char *what)
{
    char peer[INET6_ADDRSTRLEN];
    const struct room *room = conn_room(s, c);

    if (level > log_limit || !log_may(&s->close_quota))
        return;
    access_address_text(c->peer, peer);
    if (room != NULL)
        log_say(level, "client %u %s room %.*s: %s", c->id.slot, peer,
                room->name_len, (const char *)room->name, what);
    else
        log_say(level, "client %u %s: %s", c->id.slot, peer, what);
}

static void
conn_gone(struct collabd *s, struct conn *c)
{
    c->state = CONN_GONE;
    conn_schedule(s, c);
}

/* ----- control frames -------------------------------------------------------- */

/* Sends control frames, if no message's frame is begun.  False: the socket is
 * full or gone. */
static bool
conn_push_control(struct collabd *s, struct conn *c)
{
    const struct request *q = conn_request(s, c);
    struct iovec v = { c->control + c->control_at,
                       (size_t)(c->control_end - c->control_at) };
    ssize_t n;

    if (v.iov_len == 0)
        return true;
    if (c->blocked || c->in.off > 0 || conn_is_in_block(s, c) ||
        (q != NULL && q->reply_at < q->reply_end))
        return false;
    n = net_send(s, c, &v, 1);
    if (n == IO_GONE)
        conn_gone(s, c);
    if (n < 0)
        return false;
    c->control_at = (uint16_t)(c->control_at + n);
    if (c->control_at < c->control_end)
        return false;
    c->control_at = c->control_end = 0;
    return true;
}

/* Forgets pongs of which nothing was sent: only the newest ping needs its
 * answer (RFC 6455 5.5.3).  Sent frames go too, so that the first is the one
 * that is begun or next. */
static void
conn_drop_pongs(struct conn *c)
{
    uint16_t from = 0, to = 0, at = c->control_at;

    c->control_at = 0;
    while (from < c->control_end) {
        uint16_t len = (uint16_t)(2 + c->control[from + 1]);
        bool begun = from < at;
        if (from + len > at &&
            (begun || c->control[from] != (0x80 | WSLAY_PONG))) {
            memmove(c->control + to, c->control + from, len);
            if (begun)
                c->control_at = (uint16_t)(at - from);
            to = (uint16_t)(to + len);
        }
        from = (uint16_t)(from + len);
    }
    c->control_end = to;
}

static void
conn_control(struct collabd *s, struct conn *c, uint8_t opcode,
             struct span payload)
{
    struct out o;

    if (c->control_end + 2u + span_len(payload) > sizeof c->control) {
        if (!conn_push_control(s, c))
            conn_drop_pongs(c);
        if (c->control_end + 2u + span_len(payload) > sizeof c->control)
            return; /* only if nothing is sent: a Ping or Pong can miss */
    }
    o = out_over(c->control + c->control_end,
                 sizeof c->control - c->control_end);
    ws_header(&o, opcode, span_len(payload));
    out_span(&o, payload);
    c->control_end = (uint16_t)(o.at - c->control);
    conn_schedule(s, c);
}

/* ----- the end ------------------------------------------------------------------ */

/* Ends a connection for a reason; the first one counts.  A WebSocket peer is
 * told its code: behind the messages it is yet to get or, if it was overtaken,
 * behind the frame that is begun. */
static void
conn_close(struct collabd *s, struct conn *c, enum close_reason why)
{
    uint8_t payload[125];
    struct out o = out_over(payload, sizeof payload);
    uint16_t code = close_reasons[why].code;
    const char *text = why == CLOSE_MALFORMED || why == CLOSE_NO_NAME
                           ? s->complaint
                           : close_reasons[why].text;

    if (c->state >= CONN_CLOSING || c->state == CONN_FREE)
        return;
    c->why = why;
    s->count.closes[why]++;
    conn_log(s, c,
             why == CLOSE_SLOW || why == CLOSE_NO_MEMORY ? LOG_LEVEL_WARNING
             : c->state == CONN_OPEN                     ? LOG_LEVEL_INFO
                                                         : LOG_LEVEL_DEBUG,
             text);
    if (why == CLOSE_PEER)
        code = c->close_code;
    if (c->state != CONN_OPEN || code == 0 ||
        (c->in.overtaken && c->in.off > 0)) {
        conn_gone(s, c);
        return;
    }
    if (code != COLLABD_CLOSE_NO_STATUS) {
        out_u8(&o, (uint8_t)(code >> 8));
        out_u8(&o, (uint8_t)code);
        if (why != CLOSE_PEER)
            out_text(&o, text);
    }
    c->state = CONN_CLOSING;
    conn_control(s, c, WSLAY_CONNECTION_CLOSE,
                 (struct span){ payload, o.at });
    conn_set_deadline(s, c, now_ms + CONN_CLOSE_MS);
}

/* Our side has said all: shut it, and throw away what the peer still sends
 * until it leaves.  Closing at once would make the kernel answer unread bytes
 * with a reset, and that can destroy what we sent last. */
static void
conn_linger(struct collabd *s, struct conn *c)
{
    if (c->state != CONN_CLOSING) {
        c->why = c->starved ? CLOSE_NO_MEMORY : CLOSE_DONE;
        s->count.closes[c->why]++;
    }
    c->starved = false;
    c->state = CONN_LINGER;
    c->blocked = false;
    request_free(s, c);
    net_shut(s, c);
    conn_set_deadline(s, c, now_ms + CONN_CLOSE_MS);
}

/* ----- replies -------------------------------------------------------------------- */

struct reply {
    int status;
    const char *type;
    struct span body;
    const char *fields; /* more header lines, each with CRLF */
    uint64_t length;    /* Content-Length when a file follows */
    bool head_only, file;
};

/* RFC 9110 6.6.1: a date, unless the clock was never set. */
static void
conn_reply_date(struct out *o)
{
    struct timespec t = { 0, 0 };
    struct tm tm;
    char text[40];

    (void)sys.clock_gettime(CLOCK_REALTIME, &t);
    if (t.tv_sec < COLLABD_BUILD_EPOCH - 86400 || gmtime_r(&t.tv_sec, &tm) == NULL ||
        strftime(text, sizeof text, "%a, %d %b %Y %H:%M:%S GMT", &tm) == 0)
        return;
    out_format(o, "Date: %s\r\n", text);
}

/* Puts a reply into the request's buffer.  The request's head may lie in the
 * spans of `r`, never the reply buffer itself. */
static void
conn_reply(struct collabd *s, struct conn *c, const struct reply *r)
{
    struct request *q = conn_request(s, c);
    struct out o = out_over(q->reply, sizeof q->reply);
    uint64_t length = r->file ? r->length : span_len(r->body);

    s->count.statuses[r->status - 100]++;
    out_format(&o, "HTTP/1.1 %d %s\r\n", r->status, http_reason(r->status));
    if (r->type != NULL)
        out_format(&o, "Content-Type: %s\r\nX-Content-Type-Options: nosniff\r\n",
                   r->type);
    conn_reply_date(&o);
    if (r->status != 304 && r->status != 204)
        out_format(&o, "Content-Length: %" PRIu64 "\r\n", length);
    out_format(&o, "%s%s%s\r\n", s->cors,
               c->close_after_reply ? "Connection: close\r\n"
                                    : "Connection: keep-alive\r\n",
               r->fields == NULL ? "" : r->fields);
    s->cors[0] = '\0'; /* they were this reply's */
    if (!r->head_only)
        out_span(&o, r->body);
    must(!o.full);
    q->reply_at = 0;
    q->reply_end = (uint32_t)(o.at - q->reply);
    c->state = CONN_REPLY;
    conn_set_deadline(s, c, now_ms + conn_timeout_ms(s));
    conn_schedule(s, c);
}

/* A status with one line that says what was wrong. */
static void
conn_refuse(struct collabd *s, struct conn *c, const struct http *h,
            int status, const char *why, const char *fields)
{
    char body[512];
    int n = snprintf(body, sizeof body, "%s\n", why);

    if (n >= (int)sizeof body)
        n = sizeof body - 1;
    if (status == 400 || status == 408 || status == 413 || status == 414 ||
        status == 431 || status == 501 || status == 505 || h == NULL ||
        http_has_body(h))
        c->close_after_reply = true;
    conn_log(s, c, LOG_LEVEL_DEBUG, why);
    conn_reply(s, c, &(struct reply){
        .status = status, .type = "text/plain; charset=utf-8",
        .body = span_of(body, (size_t)n), .fields = fields,
        .head_only = h != NULL && h->method == HTTP_HEAD });
}

/* ----- who asks --------------------------------------------------------------------- */

/* The token of a request: Authorization, else ?token=, else the cookie.
 * False: none was given. */
static bool
conn_find_token(const struct http *h, struct span *token)
{
    *token = h->bearer;
    return !span_is_empty(*token) || http_query(h->query, "token", token) ||
           http_cookie(h->cookies, "collabd_token", token);
}

/* Remembers who asks.  What stands in a query is percent-encoded; elsewhere a
 * token may hold a % too, but ours never do. */
static void
conn_remember_token(struct conn *c, const struct http *h)
{
    uint8_t text[COLLABD_TARGET_MAX];
    struct out o = out_over(text, sizeof text);
    struct span token;

    memset(c->token, 0, sizeof c->token);
    if (conn_find_token(h, &token) && !span_is_empty(token) &&
        http_decode(token, &o))
        access_token_id((struct span){ text, o.at }, c->token);
}

static unsigned
conn_count_site(struct collabd *s, const uint8_t peer[16])
{
    unsigned n = 0;

    for (unsigned i = 0; i < s->conns_fresh; i++)
        n += s->conns[i].state != CONN_FREE &&
             access_same_site(s->conns[i].peer, peer);
    return n;
}

/* Are there already --max-per-ip connections from there?  Loopback and unix
 * sockets are not counted, nor are proxies, whose clients are. */
static bool
conn_is_one_too_many(struct collabd *s, const struct conn *c)
{
    static const uint8_t local[16];

    return s->cfg->max_per_ip > 0 && !access_is_loopback(c->peer) &&
           memcmp(c->peer, local, 16) != 0 &&
           conn_count_site(s, c->peer) > s->cfg->max_per_ip;
}

static enum access_right
conn_right_on(struct collabd *s, const struct conn *c, const char *kind,
              struct span name, bool *known)
{
    uint8_t thing[COLLABD_NAME_MAX + 8];
    struct out o = out_over(thing, sizeof thing);

    out_text(&o, kind);
    out_span(&o, name);
    return access_judge(s->tokens, c->token, (struct span){ thing, o.at },
                        known);
}

/* May it see the metrics?  An admin may, and whoever is on this machine. */
static bool
conn_is_operator(struct collabd *s, const struct conn *c, bool *known)
{
    static const uint8_t local[16];
    bool here = !c->proxied && (access_is_loopback(c->peer) ||
                                memcmp(c->peer, local, 16) == 0);

    return access_judge(s->tokens, c->token, span_text("*"), known) ==
               RIGHT_ADMIN ||
           here;
}

static void
conn_refuse_access(struct collabd *s, struct conn *c, const struct http *h,
                   bool known)
{
    if (known)
        conn_refuse(s, c, h, 403, "your token does not allow this (--tokens)",
                    NULL);
    else
        conn_refuse(s, c, h, 401,
                    "this needs a token that stands in the file of --tokens",
                    "WWW-Authenticate: Bearer\r\n");
}

/* ----- requests ------------------------------------------------------------------------ */

/* Opens the document that a room is for; if memory is short, others that
 * nobody is in are closed. */
static bool
conn_open_document(struct collabd *s, struct room *room)
{
    struct doc *d = room_doc(s, room);
    enum doc_opened how = DOC_OPENED;

    if (d->state == DOC_CLOSED)
        how = doc_open(s, d, room_name(room));
    if (how == DOC_NO_MEMORY && room_close_oldest(s, true)) {
        while (room_close_oldest(s, true))
            ;
        how = doc_open(s, d, room_name(room));
    }
    return how == DOC_OPENED;
}

/* The WebSocket begins; what can be wrong from now on is told by a Close, as
 * pages see nothing of a refused upgrade. */
static void
conn_upgrade(struct collabd *s, struct conn *c, const struct http *h,
             bool document)
{
    struct request *q = conn_request(s, c);
    struct span offered = h->protocols, protocol;
    struct out o = out_over(q->reply, sizeof q->reply);

    out_text(&o, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
                 "Connection: Upgrade\r\nSec-WebSocket-Accept: ");
    http_accept(h->key, &o);
    if (document && http_list_next(&offered, &protocol)) {
        /* editors offer what their own servers know; any one will do */
        out_text(&o, "\r\nSec-WebSocket-Protocol: ");
        out_span(&o, protocol);
    }
    out_text(&o, "\r\n\r\n");
    q->reply_at = 0;
    q->reply_end = (uint32_t)(o.at - q->reply);
    s->count.statuses[101 - 100]++;
    s->count.upgrades++;
    c->state = CONN_OPEN;
    c->spoke_ws = true;
    c->heard_ms = now_ms;
    conn_set_deadline(s, c, now_ms + (int64_t)s->cfg->ping_interval * 1000);
    conn_schedule(s, c);
}

/* What a room is called in the patterns of --tokens. */
static const char *
conn_room_prefix(enum room_kind kind)
{
    return kind == ROOM_DOCUMENT ? "doc/" : "ws/";
}

/* Lets a client into the room of that name. */
static void
conn_enter(struct collabd *s, struct conn *c, const struct http *h,
           enum room_kind kind, struct span name)
{
    struct span echo = { NULL, NULL }, history = { NULL, NULL };
    struct room *room = NULL;
    uint64_t last = 0;
    enum access_right right;
    bool known;

    if (kind == ROOM_CHANNEL && http_query(h->query, "history", &history) &&
        span_decimal(history, UINT32_MAX, &last) != PARSE_OK) {
        conn_refuse(s, c, h, 400, "history is not a number", NULL);
        return;
    }
    if (kind == ROOM_CHANNEL && http_query(h->query, "echo", &echo) &&
        !span_is(echo, "1") && !span_is(echo, "0")) {
        conn_refuse(s, c, h, 400, "echo is neither 0 nor 1", NULL);
        return;
    }
    right = conn_right_on(s, c, conn_room_prefix(kind), name, &known);
    if (right >= RIGHT_READ) {
        room = room_open(s, kind, name);
        if (room == NULL) {
            conn_refuse(s, c, h, 503,
                        "all rooms are in use; --max-rooms says how many "
                        "there are", "Retry-After: 5\r\n");
            return;
        }
    }
    c->right = (uint8_t)right;
    conn_upgrade(s, c, h, kind == ROOM_DOCUMENT);
    if (room == NULL) {
        conn_close(s, c, known ? CLOSE_FORBIDDEN : CLOSE_UNAUTHORIZED);
    } else if (kind == ROOM_CHANNEL) {
        room_join(s, room, c, span_is(echo, "1"), last, false);
    } else if (!conn_open_document(s, room)) {
        conn_close(s, c, CLOSE_CANNOT_OPEN);
    } else {
        room_join(s, room, c, false, 0, true);
        sync_join(s, c);
        room_mark_dirty(s, room); /* its document may need something */
        conn_set_deadline(s, c, now_ms + SYNC_QUIET_MS);
    }
}

static void
conn_answer_upgrade(struct collabd *s, struct conn *c, const struct http *h,
                    enum room_kind kind, struct span name_path)
{
    uint8_t name[COLLABD_NAME_MAX], len = 0;
    struct verdict named = http_room_name(name_path, name, &len);
    struct verdict v = http_judge_upgrade(h);
    char why[300];

    if (v.status == 0 && kind == ROOM_CHANNEL)
        v = named;
    if (v.status != 0) {
        conn_refuse(s, c, h, v.status, v.why,
                    v.status == 426 ? "Sec-WebSocket-Version: 13\r\n"
                    : v.status == 405 ? "Allow: GET\r\n"
                                      : NULL);
        return;
    }
    if (access_origin(s->cfg, h) == ORIGIN_FOREIGN) {
        access_why_foreign(h->origin, why, sizeof why);
        conn_refuse(s, c, h, 403, why, NULL);
        return;
    }
    if (named.status == 0) {
        conn_enter(s, c, h, kind, span_of(name, len));
    } else { /* a refused upgrade would be tried again and again */
        (void)snprintf(s->complaint, sizeof s->complaint, "%s", named.why);
        conn_upgrade(s, c, h, true);
        conn_close(s, c, CLOSE_NO_NAME);
    }
}

/* A path for Location.  Two slashes in front, or what browsers take for them,
 * would lead to another host. */
static void
conn_out_path(struct out *o, struct span path)
{
    while (path.at < path.end && (*path.at == '/' || *path.at == '\\'))
        path.at++;
    out_u8(o, '/');
    out_span(o, path);
}

/* ?token= on a page: the cookie takes its place, and the page is asked for
 * again without it, so that the token does not stay in address bars, histories
 * and Referer. */
static void
conn_move_token(struct collabd *s, struct conn *c, const struct http *h,
                struct span token)
{
    char fields[COLLABD_TARGET_MAX + 256];
    struct out o = out_over(fields, sizeof fields - 1);
    struct span rest = h->query;
    char separator = '?';

    out_text(&o, "Location: ");
    conn_out_path(&o, h->path);
    while (!span_is_empty(rest)) {
        struct span one = span_cut(&rest, '&');
        if (span_starts(one, "token="))
            continue;
        out_u8(&o, (uint8_t)separator);
        out_span(&o, one);
        separator = '&';
    }
    out_text(&o, "\r\nSet-Cookie: collabd_token=");
    out_span(&o, token);
    out_format(&o, "; Path=/; HttpOnly; SameSite=Strict%s\r\n"
               "Cache-Control: no-store\r\n",
               c->tls == NONE && !(c->proxied && h->forwarded_https)
                   ? ""
                   : "; Secure");
    *o.at = '\0';
    conn_reply(s, c, &(struct reply){ .status = 303, .fields = fields });
}

static bool
conn_token_is_plain(struct span token)
{
    for (; token.at < token.end; token.at++)
        if (!http_is_token_byte(*token.at) && *token.at != '/' &&
            *token.at != '=')
            return false;
    return true;
}

static void
conn_answer_file(struct collabd *s, struct conn *c, const struct http *h)
{
    struct request *q = conn_request(s, c);
    struct file f = file_find(s->www, h);
    char fields[COLLABD_TARGET_MAX + 600];
    struct out o = out_over(fields, sizeof fields - 1);
    struct reply r = { .status = f.status, .type = f.type, .file = true,
                       .fields = fields, .length = f.to - f.from,
                       .head_only = h->method == HTTP_HEAD };

    if (f.status == 404) {
        conn_refuse(s, c, h, 404, "there is no such file in --www", NULL);
        return;
    }
    if (f.status == 301) {
        out_text(&o, "Location: ");
        conn_out_path(&o, h->path);
        out_u8(&o, '/');
        if (!span_is_empty(h->query))
            out_u8(&o, '?');
        out_span(&o, h->query);
        out_text(&o, "\r\n");
        r.type = NULL;
    } else {
        out_format(&o, "ETag: %s\r\nAccept-Ranges: bytes\r\n"
                   "Cache-Control: no-cache\r\n", f.etag);
        if (f.has_gzip)
            out_text(&o, "Vary: Accept-Encoding\r\n");
        if (f.gzip)
            out_text(&o, "Content-Encoding: gzip\r\n");
        if (f.status == 206)
            out_format(&o, "Content-Range: bytes %" PRIu64 "-%" PRIu64
                       "/%" PRIu64 "\r\n", f.from, f.to - 1, f.size);
        if (f.status == 416) {
            out_format(&o, "Content-Range: bytes */%" PRIu64 "\r\n", f.size);
            *o.at = '\0';
            conn_refuse(s, c, h, 416, "the file has no such range", fields);
            return;
        }
        if (f.status == 304)
            r.type = NULL;
    }
    *o.at = '\0';
    q->file = f.fd;
    q->file_at = f.from;
    q->file_end = f.to;
    conn_reply(s, c, &r);
}

static void
conn_answer_page(struct collabd *s, struct conn *c, const struct http *h)
{
    uint8_t *body = s->page;
    struct out o = out_over(body, sizeof s->page);
    struct reply r = { .status = 200, .type = "text/plain; charset=utf-8",
                       .fields = "Cache-Control: no-store\r\n",
                       .head_only = h->method == HTTP_HEAD };
    bool known;

    if (span_is(h->path, "/healthz")) {
        r.type = "application/json";
        if (!stat_health(s, &o))
            r.status = 503;
    } else if (span_is(h->path, "/metrics")) {
        if (!conn_is_operator(s, c, &known)) {
            conn_refuse_access(s, c, h, known);
            return;
        }
        r.type = "text/plain; version=0.0.4; charset=utf-8";
        stat_metrics(s, &o);
    } else if (s->www >= 0) {
        conn_answer_file(s, c, h);
        return;
    } else if (span_is(h->path, "/")) {
        out_text(&o, "collabd " COLLABD_VERSION " is running.\n"
                     "Channels: connect a WebSocket to /ws/NAME.\n"
                     "Documents: connect a Yjs editor (y-websocket) to "
                     "/yjs/NAME.\n"
                     "Health: /healthz, metrics: /metrics.\n");
    } else {
        conn_refuse(s, c, h, 404,
                    "there is nothing here; channels are at /ws/NAME, "
                    "documents at /yjs/NAME, files need --www", NULL);
        return;
    }
    r.body = (struct span){ body, o.at };
    conn_reply(s, c, &r);
}

/* CORS lines for a listed origin go into every reply to this request.  False:
 * it is refused. */
static bool
conn_judge_origin(struct collabd *s, struct conn *c, const struct http *h)
{
    char why[300];
    struct span origin = h->origin;

    if (s->cfg->origin.count > 0) /* for caches: others get other fields */
        (void)snprintf(s->cors, sizeof s->cors, "Vary: Origin\r\n");
    switch (access_origin(s->cfg, h)) {
    case ORIGIN_NONE:
    case ORIGIN_SAME:
        return true;
    case ORIGIN_LISTED:
        if (span_len(origin) > 200)
            origin.end = origin.at + 200;
        (void)snprintf(s->cors, sizeof s->cors,
                       "Access-Control-Allow-Origin: %.*s\r\n"
                       "Access-Control-Allow-Credentials: true\r\n"
                       "Access-Control-Allow-Methods: GET, HEAD\r\n"
                       "Access-Control-Allow-Headers: Authorization\r\n"
                       "Vary: Origin\r\n",
                       (int)span_len(origin), (const char *)origin.at);
        return true;
    case ORIGIN_FOREIGN:
        if (h->method == HTTP_GET || h->method == HTTP_HEAD)
            return true;
        access_why_foreign(h->origin, why, sizeof why);
        conn_refuse(s, c, h, 403, why, NULL);
        return false;
    }
    return false;
}

/* Is a path that of a channel or of a document? */
static bool
conn_path_is_room(const struct collabd *s, const struct http *h,
                  enum room_kind *kind, struct span *name)
{
    static const char taken[][7] = { "/text/", "/d/", "/api/" };

    *name = h->path;
    *kind = ROOM_DOCUMENT;
    if (span_starts(*name, "/ws/")) {
        *kind = ROOM_CHANNEL;
        name->at += 4;
        return true;
    }
    if (span_starts(*name, "/yjs/")) {
        name->at += 5;
        return true;
    }
    for (size_t i = 0; i < sizeof taken / sizeof *taken; i++)
        if (span_starts(*name, taken[i]))
            return false;
    name->at += !span_is_empty(*name);
    return s->cfg->yjs_at_root && !span_is_empty(*name);
}

static void
conn_route(struct collabd *s, struct conn *c, const struct http *h)
{
    uint8_t text[COLLABD_TARGET_MAX];
    struct out o = out_over(text, sizeof text);
    struct span token, name;
    enum room_kind kind;
    bool room = conn_path_is_room(s, h, &kind, &name), known;

    if (room && http_is_upgrade(h)) {
        conn_answer_upgrade(s, c, h, kind, name);
        return;
    }
    if (!conn_judge_origin(s, c, h))
        return;
    if (h->method == HTTP_OPTIONS) {
        conn_reply(s, c, &(struct reply){
            .status = 204, .fields = "Allow: GET, HEAD, OPTIONS\r\n" });
    } else if (h->method != HTTP_GET && h->method != HTTP_HEAD) {
        conn_refuse(s, c, h, 405, "only GET and HEAD are served here",
                    "Allow: GET, HEAD, OPTIONS\r\n");
    } else if (room && kind == ROOM_DOCUMENT && !span_starts(h->path, "/yjs/")) {
        conn_answer_page(s, c, h); /* at the root */
    } else if (room) {
        conn_refuse(s, c, h, 426, "this is a room: connect a WebSocket",
                    "Upgrade: websocket\r\nConnection: Upgrade\r\n"
                    "Sec-WebSocket-Version: 13\r\n");
    } else if (s->tokens != NULL && s->tokens->on &&
               http_query(h->query, "token", &token)) {
        (void)access_judge(s->tokens, c->token, span_text("*"), &known);
        if (known && http_decode(token, &o) &&
            conn_token_is_plain((struct span){ text, o.at }))
            conn_move_token(s, c, h, (struct span){ text, o.at });
        else
            conn_refuse_access(s, c, h, false);
    } else {
        conn_answer_page(s, c, h);
    }
}

/* What holds for every request, whatever it asks for. */
static void
conn_answer(struct collabd *s, struct conn *c, struct span head)
{
    struct http h;
    struct verdict v = http_parse(head, &h);
    char why[400];
    struct listener *l = &s->listeners[c->listener];

    s->count.requests++;
    s->cors[0] = '\0';
    c->close_after_reply = !http_persists(&h) || s->stopping;
    if (v.status != 0) {
        conn_refuse(s, c, v.status == 400 ? NULL : &h, v.status, v.why, NULL);
        return;
    }
    if (access_is_trusted(s->cfg, c->direct, l->local)) {
        memcpy(c->peer, c->direct, 16);
        c->proxied = true;
        (void)access_forwarded(s->cfg, &h, c->peer);
        if (conn_is_one_too_many(s, c)) {
            conn_refuse(s, c, &h, 429,
                        "too many connections from your address "
                        "(--max-per-ip)", "Retry-After: 5\r\n");
            return;
        }
    }
    conn_remember_token(c, &h);
    if (conn_is_in_debt(c)) {
        conn_refuse(s, c, &h, 429,
                    "too many requests (--rate-messages, --rate-bytes)",
                    "Retry-After: 1\r\n");
    } else if (!span_is_empty(h.host) &&
               !access_host_is_ours(s->cfg, s->hostname, h.host)) {
        access_why_host(h.host, why, sizeof why);
        conn_refuse(s, c, &h, 421, why, NULL);
    } else if (http_has_body(&h) && h.method != HTTP_POST &&
               h.method != HTTP_PUT && h.method != HTTP_PATCH &&
               h.method != HTTP_DELETE) {
        conn_refuse(s, c, &h, 413, "no request here takes a body", NULL);
    } else {
        conn_route(s, c, &h);
    }
}

/* ----- reading: heads ------------------------------------------------------------------- */

static void
conn_heard(struct conn *c)
{
    c->heard_ms = now_ms;
    c->pinged = false;
}

static void
conn_charge(struct collabd *s, struct conn *c, uint64_t messages,
            uint64_t bytes)
{
    if (s->cfg->rate_messages > 0)
        c->credit_messages -= (int64_t)messages * 1000;
    if (s->cfg->rate_bytes > 0)
        c->credit_bytes -= (int64_t)bytes * 1000;
}

/* A wait for a dry pool begins, or goes on. */
static void
conn_starve(struct collabd *s, struct conn *c, enum pool pool)
{
    s->starving |= (unsigned)pool;
    if (c->starved)
        return;
    c->starved = true;
    s->count.starved++;
    if (c->state == CONN_OPEN) /* a head's deadline is already set */
        conn_set_deadline(s, c, now_ms + conn_timeout_ms(s));
}

static void
conn_fed(struct collabd *s, struct conn *c, int64_t deadline)
{
    if (!c->starved)
        return;
    c->starved = false;
    conn_set_deadline(s, c, deadline);
}

/* Answers the request at the front of the head buffer, if it is whole. */
static void
conn_try_head(struct collabd *s, struct conn *c)
{
    struct request *q = conn_request(s, c);
    struct span in = span_of(q->head, q->head_len), head;
    enum parse found = http_head(&in, &head);

    if (found == PARSE_OK) {
        if (!conn_is_in_debt(c)) /* a refusal costs nothing more */
            conn_charge(s, c, 1, span_len(head));
        conn_answer(s, c, head);
        q->head_len = (uint32_t)span_len(in);
        memmove(q->head, in.at, span_len(in));
    } else if (found == PARSE_BAD) {
        s->count.requests++;
        conn_refuse(s, c, NULL, 400, "a line ends in LF without CR", NULL);
    } else if (q->head_len == sizeof q->head) {
        s->count.requests++;
        if (span_len(span_cut(&in, '\n')) > COLLABD_TARGET_MAX + 32)
            conn_refuse(s, c, NULL, 414,
                        "the target is longer than COLLABD_TARGET_MAX "
                        "(collabd.h)", NULL);
        else
            conn_refuse(s, c, NULL, 431,
                        "the request head is longer than COLLABD_CHUNK "
                        "(collabd.h)", NULL);
    }
}

static void
conn_read_head(struct collabd *s, struct conn *c)
{
    struct request *q = conn_request(s, c);
    ssize_t n;

    if (q == NULL) {
        q = request_new(s, c);
        if (q == NULL) {
            conn_starve(s, c, POOL_REQUESTS);
            return;
        }
        conn_fed(s, c, c->deadline);
    }
    n = net_recv(s, c, q->head + q->head_len, sizeof q->head - q->head_len);
    if (n == IO_GONE) {
        conn_close(s, c, q->head_len == 0 ? CLOSE_DONE : CLOSE_GONE);
        return;
    }
    if (n > 0) {
        if (q->head_len == 0)
            conn_set_deadline(s, c, now_ms + conn_timeout_ms(s));
        conn_heard(c);
        q->head_len += (uint32_t)n;
        conn_try_head(s, c);
    }
    if (c->state == CONN_HEAD && q->head_len == 0)
        request_free(s, c);
}

/* ----- reading: frames --------------------------------------------------------------------- */

/* Feeds wslay: first what came behind the request head, then the socket, until
 * it has no more, the turn's share is used up, or the room must be flushed.
 * What was read is always used up; pauses act between reads. */
static ssize_t
conn_feed(uint8_t *to, size_t len, int flags, void *user)
{
    struct receiver *r = user;
    struct collabd *s = r->server;
    struct conn *c = conn_at(s, r->conn);
    struct request *q = conn_request(s, c);
    struct room *room = conn_room(s, c);
    ssize_t n;

    (void)flags;
    if (q != NULL && q->head_len > 0) {
        size_t have = q->head_len < len ? q->head_len : len;
        memcpy(to, q->head, have);
        q->head_len -= (uint32_t)have;
        memmove(q->head, q->head + have, q->head_len);
        r->fed += have;
        return (ssize_t)have;
    }
    if (r->reads_left == 0 || r->ended ||
        (c->state == CONN_OPEN && conn_is_in_debt(c)) ||
        (room != NULL && room_wants_flush(room)))
        return -1;
    n = net_recv(s, c, to, len);
    if (n <= 0) {
        r->ended = n == IO_GONE;
        r->reads_left = 0;
        return -1;
    }
    conn_heard(c);
    r->fed += (uint64_t)n;
    r->reads_left--;
    if ((size_t)n < len && c->tls == NONE)
        r->reads_left = 0; /* the socket is empty: spare a system call */
    return n;
}

/* A piece of a message of a document's member.  A message in pieces is put
 * together in one place, as it is read as a whole. */
static bool
conn_take_sync(struct collabd *s, struct conn *c, const struct ws_piece *p,
               uint32_t before)
{
    struct sync *y = sync_of(s, c);
    struct sync_verdict v;
    struct span message = p->data;

    if (p->opcode != WSLAY_BINARY_FRAME) {
        v = sync_bad(s, "a text message; documents take binary ones", 0);
        conn_close(s, c, v.why);
        return true;
    }
    if (!p->first || !p->last) {
        size_t size = before + span_len(p->data);
        if (size > y->message.size &&
            !extent_resize(s, &y->message, size + size / 2))
            return false;
        if (!span_is_empty(p->data))
            memcpy(y->message.at + before, p->data.at, span_len(p->data));
        s->count.copied_bytes += span_len(p->data);
        message = span_of(y->message.at, size);
    }
    if (!p->last)
        return true;
    v = sync_message(s, c, message);
    if (v.wait)
        return false;
    y->messages = (uint8_t)(y->messages + (y->messages < 2));
    conn_charge(s, c, 1, span_len(message));
    extent_give(s, &y->message);
    c->message.len = 0;
    c->begun_ms = 0;
    if (v.why != CLOSE_DONE)
        conn_close(s, c, v.why);
    else if (!sync_is_free(y))
        conn_schedule(s, c);
    return true;
}

/* A piece of a message.  False: there is no memory for it now; it stays in
 * the receiver. */
static bool
conn_take_piece(struct collabd *s, struct conn *c, const struct ws_piece *p)
{
    struct room *room = conn_room(s, c);
    uint64_t len = c->message.len;
    uint32_t before = (uint32_t)(len - span_len(p->data));

    if (room->kind == ROOM_DOCUMENT)
        return conn_take_sync(s, c, p, before);
    if (c->right < RIGHT_WRITE) {
        conn_close(s, c, CLOSE_READ_ONLY);
        return true;
    }
    if (p->first && p->last && room_frame_fits_ring(room, len)) {
        room_publish(s, room, c, p->opcode, span_of(NULL, 0), p->data);
    } else {
        if (!assembly_add(&s->chunks, &c->message, before, p->data))
            return false;
        s->count.copied_bytes += span_len(p->data);
        if (!p->last)
            return true;
        s->count.assembled++;
        room_publish_assembly(s, room, c, p->opcode, &c->message);
    }
    c->message.len = 0;
    c->begun_ms = 0;
    conn_charge(s, c, 1, len);
    return true;
}

static void
conn_take_close(struct collabd *s, struct conn *c, const struct ws_piece *p)
{
    c->close_code = p->code;
    conn_close(s, c, CLOSE_PEER);
}

/* False: no memory for this piece now. */
static bool
conn_take(struct collabd *s, struct conn *c, const struct ws_piece *p)
{
    switch (p->kind) {
    case WS_NOTHING:
    case WS_PART:
        return true;
    case WS_DATA:
        return conn_take_piece(s, c, p);
    case WS_PING:
    case WS_PONG:
        if (p->kind == WS_PING)
            conn_control(s, c, WSLAY_PONG, p->data);
        if (c->message.opcode == 0)
            c->begun_ms = 0;
        return true;
    case WS_CLOSE:
        conn_take_close(s, c, p);
        return true;
    case WS_BAD:
        conn_close(s, c, p->why == CLOSE_TOO_BIG && conn_is_member(s, c)
                             ? CLOSE_DOC_MESSAGE
                             : p->why);
        return true;
    }
    return true;
}

static int64_t
conn_next_ping(const struct collabd *s, const struct conn *c)
{
    /* rounded down to whole seconds, so that many idle clients wake the loop
     * once a second, not once each */
    int64_t at = c->heard_ms + 1000 * (int64_t)(c->pinged
                                                    ? s->cfg->dead_after
                                                    : s->cfg->ping_interval);

    return at - at % 1000;
}

/* What a message waits for that was not taken. */
static enum pool
conn_dry_pool(const struct collabd *s, const struct conn *c)
{
    return conn_is_member(s, c) && s->chunks.used < s->chunks.count
               ? POOL_DOCUMENTS
               : POOL_CHUNKS;
}

static void
conn_read_frames(struct collabd *s, struct conn *c)
{
    struct receiver *r;
    struct request *q = conn_request(s, c);
    struct ws_piece p;

    if (c->receiver == NONE && receiver_borrow(s, c) == NULL) {
        conn_starve(s, c, POOL_RECEIVERS);
        return;
    }
    r = &s->receivers[c->receiver];
    r->reads_left = CONN_READS;
    r->ended = false;
    if (r->waiting.kind != WS_NOTHING) {
        if (!conn_take(s, c, &r->waiting)) {
            conn_starve(s, c, conn_dry_pool(s, c));
            return;
        }
        r->waiting.kind = WS_NOTHING;
    }
    conn_fed(s, c, conn_next_ping(s, c));
    do {
        p = ws_next(r, &c->message, s->cfg->max_message);
        if (!conn_take(s, c, &p)) {
            r->waiting = p;
            conn_starve(s, c, conn_dry_pool(s, c));
            return;
        }
    } while (p.kind != WS_NOTHING && c->state == CONN_OPEN);
    if (r->ended)
        conn_close(s, c, CLOSE_GONE);
    if (c->state == CONN_OPEN) {
        if (q != NULL && q->head_len == 0 && q->reply_at == q->reply_end)
            request_free(s, c);
        if (receiver_is_idle(r))
            receiver_return(s, c, conn_feed);
        if (c->begun_ms == 0 && (c->receiver != NONE || c->message.opcode != 0))
            c->begun_ms = now_ms;
    }
}

/* Is the peer's stream still one of frames, in which its Close is to come? */
static bool
conn_awaits_close(const struct conn *c)
{
    switch (c->why) {
    case CLOSE_SHUTDOWN:
    case CLOSE_SLOW:
    case CLOSE_UNAUTHORIZED:
    case CLOSE_FORBIDDEN:
    case CLOSE_READ_ONLY:
        return c->spoke_ws;
    default:
        return false;
    }
}

/* Throws input away until the peer has left. */
static void
conn_read_nothing(struct collabd *s, struct conn *c)
{
    uint8_t waste[4096];
    ssize_t n = 1;

    for (int i = 0; i < CONN_READS && n > 0; i++)
        n = sys.recv(c->fd, waste, sizeof waste, MSG_DONTWAIT);
    if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
        conn_gone(s, c);
}

/* Reads frames only to find the Close that answers ours; then the server ends
 * the connection (RFC 6455 7.1.1). */
static void
conn_read_close(struct collabd *s, struct conn *c)
{
    struct receiver *r;
    struct ws_piece p;

    if (c->receiver == NONE && receiver_borrow(s, c) == NULL) {
        conn_read_nothing(s, c);
        return;
    }
    r = &s->receivers[c->receiver];
    r->reads_left = CONN_READS;
    r->ended = false;
    r->waiting.kind = WS_NOTHING;
    do {
        p = ws_next(r, &c->message, s->cfg->max_message);
        if (p.kind == WS_DATA && p.last)
            c->message.len = 0;
    } while (p.kind != WS_NOTHING && p.kind != WS_CLOSE && p.kind != WS_BAD);
    if (r->ended || p.kind == WS_CLOSE || p.kind == WS_BAD)
        conn_gone(s, c);
    else if (receiver_is_idle(r))
        receiver_return(s, c, conn_feed);
}

static void
conn_read(struct collabd *s, struct conn *c)
{
    switch (c->state) {
    case CONN_HEAD:
        conn_read_head(s, c);
        break;
    case CONN_OPEN:
        conn_read_frames(s, c);
        break;
    case CONN_LINGER:
        if (conn_awaits_close(c))
            conn_read_close(s, c);
        else
            conn_read_nothing(s, c);
        break;
    case CONN_HANDSHAKE:
#if COLLABD_TLS
        s->tls[c->tls].ready = true;
#endif
        break;
    case CONN_FREE:
    case CONN_REPLY:
    case CONN_CLOSING:
    case CONN_GONE:
        break;
    }
    conn_update(s, c);
}

/* ----- writing -------------------------------------------------------------------------------- */

/* Sends spans.  True: all went; false: the socket is full (then blocked) or
 * gone.  *sent says how much. */
static bool
conn_send(struct collabd *s, struct conn *c, struct iovec *v, int count,
          uint64_t *sent)
{
    uint64_t want = 0;
    ssize_t n;

    for (int i = 0; i < count; i++)
        want += v[i].iov_len;
    n = net_send(s, c, v, count);
    *sent = n < 0 ? 0 : (uint64_t)n;
    if (n == IO_GONE) {
        if (c->state < CONN_CLOSING)
            conn_close(s, c, CLOSE_GONE);
        else
            conn_gone(s, c);
        return false;
    }
    c->blocked = n < 0 || *sent < want || net_owes(s, c);
    return !c->blocked;
}

/* Fills the reply buffer anew from the file.  False: the file has become
 * shorter or cannot be read; only ending the connection can tell. */
static bool
conn_refill(struct request *q)
{
    size_t want = sizeof q->reply;
    ssize_t n;

    if (q->file_end - q->file_at < want)
        want = (size_t)(q->file_end - q->file_at);
    n = sys.pread(q->file, q->reply, want, (off_t)q->file_at);
    if (n <= 0)
        return false;
    q->file_at += (uint64_t)n;
    q->reply_at = 0;
    q->reply_end = (uint32_t)n;
    return true;
}

/* Sends a reply and the file behind it.  True: all went. */
static bool
conn_flush_reply(struct collabd *s, struct conn *c)
{
    struct request *q = conn_request(s, c);
    uint64_t sent, total = 0;

    for (;;) {
        struct iovec v = { q->reply + q->reply_at, q->reply_end - q->reply_at };
        if (v.iov_len > 0) {
            bool all = conn_send(s, c, &v, 1, &sent);
            q->reply_at += (uint32_t)sent;
            total += sent;
            if (sent > 0 && c->state == CONN_REPLY)
                conn_set_deadline(s, c, now_ms + conn_timeout_ms(s));
            if (!all)
                return false;
        }
        if (q->file < 0 || q->file_at == q->file_end)
            return true;
        if (total >= FILE_TURN_MAX) {
            c->blocked = true; /* poll says at once that there is room */
            return false;
        }
        if (!conn_refill(q)) {
            log_say(LOG_LEVEL_WARNING, "a file of --www became shorter or "
                    "unreadable while it was sent");
            conn_close(s, c, CLOSE_GONE);
            return false;
        }
    }
}

/* What follows a reply: the next request, or the end. */
static void
conn_replied(struct collabd *s, struct conn *c)
{
    struct request *q = conn_request(s, c);

    if (q->file >= 0)
        (void)sys.close(q->file);
    q->file = -1;
    q->reply_at = q->reply_end = 0;
    if (c->close_after_reply) {
        conn_linger(s, c);
        return;
    }
    c->state = CONN_HEAD;
    conn_set_deadline(s, c, now_ms + conn_timeout_ms(s));
    if (q->head_len > 0)
        conn_try_head(s, c); /* schedules itself again */
    else
        request_free(s, c);
}

/* Sends the room's messages: with one_frame only to the end of the frame that
 * is begun.  True: the cursor is where it was to get. */
static bool
conn_flush_room(struct collabd *s, struct conn *c, bool one_frame)
{
    struct iovec v[CONN_SPANS];
    uint64_t sent, total = 0;
    int count;

    while ((count = room_gather(s, c, one_frame, v, CONN_SPANS)) > 0) {
        bool all;
        if (total >= CONN_SEND_MAX) {
            c->blocked = true;
            return false;
        }
        all = conn_send(s, c, v, count, &sent);
        if (sent > 0) {
            room_advance(s, c, sent);
            if (conn_is_member(s, c))
                sync_of(s, c)->said_ms = now_ms;
        }
        total += sent;
        if (!all)
            return false;
        if (one_frame && c->in.off == 0)
            break;
    }
    return true;
}

/* Sends a member's own block.  True: there is none left. */
static bool
conn_flush_block(struct collabd *s, struct conn *c)
{
    struct iovec v[2];
    uint64_t sent, total = 0;
    int count;

    sync_go_on(s, c);
    while ((count = sync_gather(s, c, v, CONN_SEND_MAX)) > 0) {
        bool all;
        if (total >= CONN_SEND_MAX) {
            c->blocked = true;
            return false;
        }
        all = conn_send(s, c, v, count, &sent);
        if (c->starved && sent > 0) /* it waits for what is moving */
            conn_set_deadline(s, c, now_ms + conn_timeout_ms(s));
        sync_advance(s, c, (size_t)sent);
        total += sent;
        if (!all)
            return false;
    }
    if (sync_of(s, c)->joining) /* there was no memory for the next piece */
        conn_set_deadline(s, c, now_ms + CONN_RETRY_MS);
    if (c->starved && now_ms < s->due)
        s->due = now_ms; /* its message may go on, in the next turn */
    return true;
}

static void
conn_release(struct collabd *s, struct conn *c)
{
    if (!conn_awaits_close(c) || c->state == CONN_GONE)
        receiver_return(s, c, conn_feed);
    chunk_free_chain(&s->chunks, c->message.first);
    c->message.first = c->message.last = NONE32;
}

static bool
conn_hears_ring(const struct conn *c)
{
    return c->in.room != NONE && !c->in.overtaken && !c->in.outside;
}

/* Everything a WebSocket has to send, in order.  True: nothing is left. */
static bool
conn_flush_open(struct collabd *s, struct conn *c)
{
    struct request *q = conn_request(s, c);
    uint64_t sent;

    if (net_owes(s, c) && !conn_send(s, c, NULL, 0, &sent))
        return false;
    if (q != NULL && q->reply_at < q->reply_end && !conn_flush_reply(s, c))
        return false;
    if (q != NULL && q->head_len == 0)
        request_free(s, c);
    /* the frame that is begun; before a Close all messages, unless a control
     * frame is begun */
    if (conn_hears_ring(c) &&
        (c->in.off > 0 || (c->state == CONN_CLOSING && c->control_at == 0 &&
                           !conn_is_in_block(s, c))) &&
        !conn_flush_room(s, c, c->state != CONN_CLOSING))
        return false;
    if (conn_is_in_block(s, c) && !conn_flush_block(s, c))
        return false;
    if (!conn_push_control(s, c)) {
        if (c->state != CONN_GONE)
            c->blocked = true;
        return false;
    }
    if (c->state != CONN_OPEN)
        return true;
    if (conn_is_member(s, c) && !conn_flush_block(s, c))
        return false;
    return !conn_hears_ring(c) || conn_flush_room(s, c, false);
}

/* Sends what there is.  Called when something was added and when poll() says
 * that the socket has room again (blocked is false then). */
static void
conn_flush(struct collabd *s, struct conn *c)
{
    uint64_t sent;

    if (c->state == CONN_CLOSING)
        conn_release(s, c);
    if (c->blocked && c->state != CONN_GONE)
        return;
    switch (c->state) {
    case CONN_REPLY:
        if ((!net_owes(s, c) || conn_send(s, c, NULL, 0, &sent)) &&
            conn_flush_reply(s, c))
            conn_replied(s, c);
        break;
    case CONN_OPEN:
        (void)conn_flush_open(s, c);
        break;
    case CONN_CLOSING:
        if (c->in.overtaken && c->in.off > 0)
            conn_gone(s, c);
        else if (conn_flush_open(s, c)) {
            conn_leave(s, c);
            conn_linger(s, c);
        }
        break;
    case CONN_FREE:
    case CONN_HANDSHAKE:
    case CONN_HEAD:
    case CONN_LINGER:
    case CONN_GONE:
        break;
    }
    conn_update(s, c);
}

/* ----- begin and end ----------------------------------------------------------------------------- */

static void
conn_poll_add(struct collabd *s, struct conn *c)
{
    c->poll = (uint16_t)s->poll_used++;
    s->poll[c->poll] = (struct pollfd){ .fd = c->fd };
    s->poll_conn[c->poll] = c->id.slot;
    conn_update_poll(s, c);
}

static void
conn_poll_remove(struct collabd *s, struct conn *c)
{
    unsigned last = --s->poll_used;

    s->poll[c->poll] = s->poll[last];
    s->poll_conn[c->poll] = s->poll_conn[last];
    s->conns[s->poll_conn[last]].poll = c->poll;
    c->poll = NONE;
}

/* A new connection on an accepted socket.  NULL: no slot is free. */
static struct conn *
conn_begin(struct collabd *s, int fd, unsigned listener,
           const uint8_t peer[16])
{
    struct conn *c = conn_new(s);

    if (c == NULL)
        return NULL;
    c->fd = fd;
    c->listener = (uint8_t)listener;
    memcpy(c->peer, peer, 16);
    memcpy(c->direct, peer, 16);
    c->heard_ms = c->credit_ms = now_ms;
    c->credit_messages = (int64_t)s->cfg->rate_messages * 1000;
    c->credit_bytes = (int64_t)s->cfg->rate_bytes * 1000;
    c->state = CONN_HEAD;
#if COLLABD_TLS
    if (s->listeners[listener].tls) {
        c->state = CONN_HANDSHAKE;
        if (!tls_open(s, c)) {
            conn_free(s, c);
            return NULL;
        }
    }
#endif
    conn_set_deadline(s, c, now_ms + conn_timeout_ms(s));
    conn_poll_add(s, c);
    s->count.accepted++;
    return c;
}

/* 429 before anything was asked, and the end. */
static void
conn_refuse_early(struct collabd *s, struct conn *c)
{
    if (c->state != CONN_HEAD || request_new(s, c) == NULL) {
        conn_close(s, c, CLOSE_DONE);
        return;
    }
    conn_refuse(s, c, NULL, 429,
                "too many connections from your address (--max-per-ip)",
                "Retry-After: 5\r\n");
}

/* Frees all that a connection that is GONE holds. */
static void
conn_end(struct collabd *s, struct conn *c)
{
    must(c->state == CONN_GONE);
    conn_release(s, c);
    request_free(s, c);
    conn_leave(s, c);
    conn_set_more(s, c, false);
#if COLLABD_TLS
    tls_close(s, c);
#endif
    conn_poll_remove(s, c);
    (void)sys.close(c->fd);
    c->fd = -1;
    conn_free(s, c);
}

/* ----- time ------------------------------------------------------------------------------------------ */

/* Raises the credits with the time that has passed, up to one second's. */
static void
conn_earn(struct collabd *s, struct conn *c)
{
    int64_t passed = now_ms - c->credit_ms;
    int64_t messages = (int64_t)s->cfg->rate_messages;
    int64_t bytes = (int64_t)s->cfg->rate_bytes;

    if (passed > 3600000)
        passed = 3600000;
    c->credit_ms = now_ms;
    c->credit_messages += passed * messages;
    if (c->credit_messages > messages * 1000 || messages == 0)
        c->credit_messages = messages * 1000;
    c->credit_bytes += passed * bytes;
    if (c->credit_bytes > bytes * 1000 || bytes == 0)
        c->credit_bytes = bytes * 1000;
}

/* How many ms pay a debt back; a rate that was lifted asks for none. */
static int64_t
conn_debt_ms(int64_t credit, uint64_t rate)
{
    return credit >= 0 || rate == 0 ? 0 : -credit / (int64_t)rate;
}

/* When an indebted connection may be read again. */
static int64_t
conn_solvent_at(const struct collabd *s, const struct conn *c)
{
    int64_t messages = conn_debt_ms(c->credit_messages, s->cfg->rate_messages);
    int64_t bytes = conn_debt_ms(c->credit_bytes, s->cfg->rate_bytes);

    return now_ms + 1 + (messages > bytes ? messages : bytes);
}

static void
conn_expire_open(struct collabd *s, struct conn *c)
{
    int64_t quiet;

    if (!conn_may_read(s, c)) { /* deadlines stand still for it */
        conn_heard(c);
        c->begun_ms = c->begun_ms == 0 ? 0 : now_ms;
    }
    if (c->begun_ms > 0 && now_ms - c->begun_ms >
                               CONN_MESSAGE_MS + (int64_t)c->message.len) {
        conn_close(s, c, CLOSE_TIMEOUT);
        return;
    }
    if (conn_next_ping(s, c) <= now_ms && c->pinged) {
        conn_close(s, c, CLOSE_SILENT);
        return;
    }
    if (conn_next_ping(s, c) <= now_ms) {
        conn_control(s, c, WSLAY_PING, span_of(NULL, 0));
        c->pinged = true;
        s->count.pings++;
    }
    conn_set_deadline(s, c, conn_next_ping(s, c));
    if (!conn_is_member(s, c))
        return;
    if (sync_keep_alive(s, c) || sync_of(s, c)->joining)
        conn_schedule(s, c);
    quiet = (sync_is_free(sync_of(s, c)) ? sync_of(s, c)->said_ms : now_ms) +
            SYNC_QUIET_MS;
    if (quiet < c->deadline)
        conn_set_deadline(s, c, quiet);
}

/* A deadline has passed. */
static void
conn_expire(struct collabd *s, struct conn *c)
{
    struct request *q = conn_request(s, c);

    switch (c->state) {
    case CONN_HEAD:
        if (c->starved) {
            if (c->tls == NONE)
                net_say_503(s, c->fd, "too many requests are waiting "
                                      "(--max-requests)");
            conn_linger(s, c);
        } else if (q != NULL && q->head_len > 0)
            conn_refuse(s, c, NULL, 408,
                        "the request was not complete in time "
                        "(--request-timeout)", NULL);
        else
            conn_close(s, c, CLOSE_TIMEOUT);
        break;
    case CONN_OPEN:
        if (c->starved)
            conn_close(s, c, CLOSE_NO_MEMORY);
        else
            conn_expire_open(s, c);
        break;
    case CONN_HANDSHAKE:
    case CONN_REPLY:
        conn_close(s, c, CLOSE_TIMEOUT);
        break;
    case CONN_CLOSING:
    case CONN_LINGER:
        conn_gone(s, c);
        break;
    case CONN_FREE:
    case CONN_GONE:
        break;
    }
}
/* ===== 21  The turn ========================================================
 * One turn: poll, accept, read whoever is readable (a bounded amount each),
 * flush the rooms that got something, flush and free connections, hand TLS
 * handshakes to their thread, and whatever deadline has passed.
 * ========================================================================= */

#define LOOP_ACCEPTS 32      /* of a listener, a turn */
#define LOOP_REFUSALS 10     /* by the spare descriptor, a second */
#define LOOP_EVICT_MS 100

#define LOOP_NEVER INT64_MAX

static void
loop_due(struct collabd *s, int64_t at)
{
    if (at < s->due)
        s->due = at;
}

/* ----- accepting ------------------------------------------------------------ */

/* Accepts a connection only to say that there is no place for it, at most ten
 * a second; beyond that the listener rests. */
static void
loop_refuse(struct collabd *s, struct listener *l, int fd, const char *why)
{
    s->count.refused++;
    if (log_may(&s->accept_quota))
        log_say(LOG_LEVEL_WARNING, "refused a connection: %s", why);
    if (!l->tls)
        net_say_503(s, fd, why);
    (void)shutdown(fd, SHUT_WR);
    (void)sys.close(fd);
    if (now_ms - l->refused_ms >= 1000) {
        l->refused_ms = now_ms;
        l->refused = 0;
    }
    if (++l->refused >= LOOP_REFUSALS) {
        l->asleep_until = now_ms + 1000;
        loop_due(s, l->asleep_until);
    }
}

/* Out of descriptors: the spare one is given up for a moment. */
static void
loop_refuse_spare(struct collabd *s, struct listener *l, const char *why)
{
    int fd;

    if (s->spare_fd >= 0)
        (void)sys.close(s->spare_fd);
    fd = sys.accept4(l->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd >= 0)
        loop_refuse(s, l, fd, why);
    s->spare_fd = sys.openat(AT_FDCWD, "/dev/null", O_RDONLY | O_CLOEXEC);
    if (s->spare_fd < 0)
        s->spare_fd = dup(l->fd); /* after chroot */
    if (fd < 0) {
        l->asleep_until = now_ms + 1000;
        loop_due(s, l->asleep_until);
    }
}

static void
loop_accept(struct collabd *s, unsigned index)
{
    struct listener *l = &s->listeners[index];

    for (int i = 0; i < LOOP_ACCEPTS && l->asleep_until <= now_ms; i++) {
        struct sockaddr_storage at = { .ss_family = AF_UNSPEC };
        socklen_t len = sizeof at;
        uint8_t peer[16];
        struct conn *c;
        int fd = sys.accept4(l->fd, (struct sockaddr *)&at, &len,
                             SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0 && (errno == EMFILE || errno == ENFILE)) {
            loop_refuse_spare(s, l, "out of file descriptors (ulimit -n)");
            continue;
        }
        if (fd < 0 && (errno == ENOBUFS || errno == ENOMEM)) {
            l->asleep_until = now_ms + 1000;
            loop_due(s, l->asleep_until);
        }
        if (fd < 0) {
            if (errno == EINTR || errno == ECONNABORTED)
                continue;
            return;
        }
        net_peer_address(&at, peer);
        c = conn_begin(s, fd, index, peer);
        if (c == NULL)
            loop_refuse(s, l, fd,
                        "all places are taken (--max-clients, --max-tls)");
        else if (!access_is_trusted(s->cfg, peer, l->local) &&
                 conn_is_one_too_many(s, c))
            conn_refuse_early(s, c);
    }
}

/* ----- rooms ----------------------------------------------------------------- */

/* Who was overtaken is cut loose: told so if it is between frames. */
static void
loop_cut_overtaken(struct collabd *s, struct room *room)
{
    room->overtook = false;
    for (uint16_t m = room->first; m != NONE; m = s->conns[m].in.next) {
        struct conn *c = &s->conns[m];
        if (!c->in.overtaken)
            continue;
        conn_close(s, c, CLOSE_SLOW);
        if (c->state == CONN_CLOSING)
            conn_schedule(s, c);
    }
}

static void
loop_judge(struct collabd *s, struct room *room)
{
    bool was = room->held;

    room_judge(s, room);
    if (room->held)
        loop_due(s, now_ms + ROOM_BURST_STALL_MS);
    if (room->held == was)
        return;
    for (uint16_t m = room->first; m != NONE; m = s->conns[m].in.next) {
        if (was)
            conn_heard(&s->conns[m]);
        conn_update(s, &s->conns[m]);
    }
}

static void
loop_flush_room(struct collabd *s, struct room *room)
{
    bool behind = room->held;

    room->flushed_pos = ring_pos(&room->ring, room->ring.shown);
    room->flushed_ms = now_ms;
    if (room->overtook)
        loop_cut_overtaken(s, room);
    for (uint16_t m = room->first; m != NONE; m = s->conns[m].in.next) {
        struct conn *c = &s->conns[m];
        if (c->state == CONN_OPEN && !c->blocked)
            conn_flush(s, c);
        else
            conn_update(s, c); /* it may be read again */
        behind |= c->blocked;
    }
    if (behind)
        loop_judge(s, room);
}

/* With --coalesce: is this room to gather some more before it is flushed? */
static bool
loop_coalesces(struct collabd *s, struct room *room)
{
    int64_t due = room->flushed_ms + (int64_t)s->cfg->coalesce;

    if (s->cfg->coalesce == 0 || due <= now_ms || room->overtook ||
        s->stopping ||
        room->ring.pos - room->flushed_pos >= room->ring.size / 4)
        return false;
    loop_due(s, due);
    return true;
}

static void
loop_flush_rooms(struct collabd *s)
{
    uint16_t i = s->dirty_first;

    s->dirty_first = NONE;
    while (i != NONE) {
        struct room *room = &s->rooms[i];
        i = room->dirty_next;
        room->dirty = false;
        if (loop_coalesces(s, room)) {
            room_mark_dirty(s, room);
            continue;
        }
        if (room->kind == ROOM_DOCUMENT && s->docs[room_slot(s, room)].state == DOC_OPEN)
            loop_due(s, sync_tend(s, room));
        loop_flush_room(s, room);
    }
}

/* A laggard's socket took more: the room may be free again. */
static void
loop_rejudge(struct collabd *s, struct conn *c)
{
    struct room *room = conn_room(s, c);

    if (room != NULL && room->held)
        loop_judge(s, room);
}

static void
loop_flush_conns(struct collabd *s)
{
    while (s->flush_first != NONE) {
        struct conn *c = conn_at(s, s->flush_first);
        s->flush_first = c->next;
        c->flushing = false;
        if (c->state != CONN_GONE)
            conn_flush(s, c);
        if (c->state == CONN_GONE && !c->flushing && !c->busy)
            conn_end(s, c);
    }
}

/* ----- dry pools --------------------------------------------------------------- */

/* Holds it something of these pools, and has sent nothing for 2 s although it
 * was read? */
static bool
loop_is_stalled_holder(struct collabd *s, const struct conn *c, unsigned pools)
{
    if (c->starved || now_ms - c->heard_ms < CONN_STALL_MS ||
        !conn_may_read(s, c))
        return false;
    return ((pools & POOL_REQUESTS) != 0 && c->request != NONE &&
            c->state == CONN_HEAD) ||
           ((pools & POOL_RECEIVERS) != 0 && c->receiver != NONE) ||
           ((pools & POOL_CHUNKS) != 0 && c->message.first != NONE32) ||
           ((pools & POOL_DOCUMENTS) != 0 && conn_is_member(s, c) &&
            sync_of(s, c)->message.at != NULL);
}

/* Closes one stalled holder of a dry pool, of the address that holds most. */
static void
loop_evict(struct collabd *s)
{
    struct conn *worst = NULL;
    unsigned most = 0;

    if (now_ms - s->evicted_ms < LOOP_EVICT_MS)
        return;
    s->evicted_ms = now_ms;
    for (unsigned i = 0; i < s->conns_fresh; i++) {
        struct conn *c = &s->conns[i];
        unsigned held = 0;
        if (!loop_is_stalled_holder(s, c, s->starving))
            continue;
        for (unsigned j = 0; j < s->conns_fresh; j++)
            held += access_same_site(s->conns[j].peer, c->peer) &&
                    loop_is_stalled_holder(s, &s->conns[j], s->starving);
        if (held > most) {
            most = held;
            worst = c;
        }
    }
    if (worst == NULL)
        return;
    s->count.evicted++;
    conn_close(s, worst, CLOSE_NO_MEMORY);
}

/* Lets those who wait try again. */
static void
loop_feed_starved(struct collabd *s)
{
    loop_evict(s);
    s->starving = 0;
    for (unsigned i = 0; i < s->conns_fresh; i++)
        if (s->conns[i].starved && s->conns[i].state < CONN_CLOSING)
            conn_read(s, &s->conns[i]);
    if (s->starving != 0)
        loop_due(s, now_ms + LOOP_EVICT_MS);
}

/* ----- handshakes ---------------------------------------------------------------- */

#if COLLABD_TLS

/* What the answer to a handshake's steps means for its connection. */
static void
loop_shaken(struct collabd *s, struct work *w)
{
    struct tls *t = (struct tls *)w;
    struct conn *c = conn_at(s, t->conn);

    c->busy = false;
    t->ready = t->answer == 1;
    c->blocked = t->answer == IO_WANT_WRITE;
    if (t->answer == 0) {
        t->done = true;
        s->handshakes--;
        s->count.tls_handshakes++;
    }
    if (c->state == CONN_GONE) { /* in the meantime */
        conn_schedule(s, c);
        return;
    }
    if (t->answer == IO_GONE) {
        conn_close(s, c, CLOSE_TLS);
        return;
    }
    if (t->answer == 0) {
        c->state = CONN_HEAD;
        conn_set_deadline(s, c, now_ms + conn_timeout_ms(s));
        conn_heard(c);
    }
    conn_update(s, c);
}

/* Has this handshake what its next step waits for? */
static bool
loop_may_step(const struct collabd *s, const struct tls *t)
{
    return t->conn != NONE && t->ready &&
           (t->begun || s->handshakes < s->cfg->max_handshakes);
}

/* Hands the handshakes that can go on to their thread, in turn, or without one
 * takes a step of the next.  Handshakes that have not begun wait for those in
 * flight. */
static void
loop_handshakes(struct collabd *s)
{
    unsigned at = s->handshake_at;

    s->handshakes_ready = false;
    for (unsigned i = 0; i < s->tls_fresh; i++) {
        struct tls *t = &s->tls[++at % s->tls_fresh];
        struct conn *c;
        if (!loop_may_step(s, t))
            continue;
        c = conn_at(s, t->conn);
        s->handshake_at = c->tls;
        t->ready = false;
        t->work = (struct work){ tls_shake, loop_shaken, NULL };
        if (!t->begun && !tls_begin(s, t)) {
            conn_close(s, c, CLOSE_TLS);
            continue;
        }
        if (TLS_HAS_THREAD && work_post(&s->work, WORK_CRYPTO, &t->work)) {
            c->busy = true;
            conn_update_poll(s, c);
            continue;
        }
        tls_shake(&t->work);
        loop_shaken(s, &t->work);
        s->handshakes_ready = true; /* perhaps */
        return;
    }
}

#endif

/* ----- time ------------------------------------------------------------------------ */

static void
loop_conn_time(struct collabd *s, struct conn *c)
{
    if (c->state == CONN_FREE || c->state == CONN_GONE)
        return;
    if (c->deadline <= now_ms)
        conn_expire(s, c);
    if (c->state == CONN_OPEN && conn_is_in_debt(c)) {
        conn_earn(s, c);
        if (conn_is_in_debt(c))
            loop_due(s, conn_solvent_at(s, c));
        else
            conn_update(s, c);
    }
    if (c->state != CONN_GONE)
        loop_due(s, c->deadline);
}

/* Looks at everything that waits for a time, and finds the next one. */
static void
loop_time(struct collabd *s)
{
    s->due = LOOP_NEVER;
    for (unsigned i = 0; i < s->conns_fresh; i++)
        loop_conn_time(s, &s->conns[i]);
    for (unsigned i = 0; i < s->rooms_fresh; i++) {
        struct room *room = &s->rooms[i];
        if (room->used && room->held)
            loop_judge(s, room);
        if (room->used && room->kind == ROOM_DOCUMENT &&
            s->docs[i].state == DOC_OPEN)
            loop_due(s, sync_tend(s, room));
    }
    for (unsigned i = 0; i < s->listener_count; i++) {
        struct listener *l = &s->listeners[i];
        if (l->asleep_until > now_ms)
            loop_due(s, l->asleep_until);
        else
            l->asleep_until = 0;
    }
    if (s->stopping)
        loop_due(s, s->stop_by);
    if (s->watchdog_ms > 0) {
        if (now_ms >= s->watchdog_due) {
            sys_notify(s->notify_fd, "WATCHDOG=1");
            s->watchdog_due = now_ms + s->watchdog_ms;
        }
        loop_due(s, s->watchdog_due);
    }
    if (s->starving != 0)
        loop_due(s, now_ms + LOOP_EVICT_MS);
}

/* ----- the turn ---------------------------------------------------------------------- */

static int
loop_timeout(const struct collabd *s, int most_ms)
{
    int64_t wait = s->due == LOOP_NEVER ? INT32_MAX : s->due - now_ms;

#if COLLABD_TLS
    if (s->handshakes_ready)
        return 0;
#endif
    if (s->more > 0 || wait <= 0)
        return 0;
    if (most_ms >= 0 && wait > most_ms)
        wait = most_ms;
    return wait >= INT32_MAX ? -1 : (int)wait;
}

static void
loop_listeners(struct collabd *s)
{
    for (unsigned i = 0; i < s->listener_count; i++) {
        bool on = !s->stopping && s->listeners[i].asleep_until <= now_ms;
        s->poll[i].fd = s->listeners[i].fd;
        s->poll[i].events = on ? POLLIN : 0;
    }
}

/* Everything one descriptor reported. */
static void
loop_event(struct collabd *s, struct conn *c, short events)
{
    if ((events & POLLOUT) != 0) {
        c->blocked = false;
        if (c->state == CONN_HANDSHAKE)
            conn_read(s, c);
        else
            conn_flush(s, c);
        loop_rejudge(s, c);
    }
    if ((events & (POLLIN | POLLHUP | POLLERR)) == 0)
        return;
    if ((events & POLLIN) == 0 && !conn_may_read(s, c)) {
        /* it is gone, and nobody would read it */
        if (c->state < CONN_CLOSING)
            conn_close(s, c, CLOSE_GONE);
        if (c->state != CONN_GONE)
            conn_gone(s, c);
        return;
    }
    if (s->cfg->rate_messages > 0 || s->cfg->rate_bytes > 0 ||
        conn_is_in_debt(c))
        conn_earn(s, c);
    conn_read(s, c);
    if (c->state == CONN_OPEN && conn_is_in_debt(c))
        loop_due(s, conn_solvent_at(s, c));
}

static void
loop_events(struct collabd *s, int ready)
{
    for (unsigned i = 0; i < s->listener_count; i++)
        if (s->poll[i].revents != 0) {
            ready--;
            loop_accept(s, i);
        }
    for (unsigned i = s->listener_count; i < s->poll_used && ready > 0; i++) {
        short events = s->poll[i].revents;
        if (events == 0)
            continue;
        ready--;
        s->poll[i].revents = 0;
        loop_event(s, conn_at(s, s->poll_conn[i]), events);
    }
}

/* Reads whoever has input that poll() cannot see. */
static void
loop_more(struct collabd *s)
{
    for (unsigned i = s->listener_count; i < s->poll_used && s->more > 0; i++) {
        struct conn *c = conn_at(s, s->poll_conn[i]);
        if (c->more)
            conn_read(s, c);
    }
}

/* Takes back what threads have done. */
static void
loop_collect(struct collabd *s)
{
    struct work *w = work_collect(&s->work), *next;

    for (; w != NULL; w = next) {
        next = w->next;
        w->done(s, w);
    }
}

static int
loop_turn(struct collabd *s, int most_ms)
{
    struct pollfd *wake = &s->poll[s->poll_used];
    struct timespec wait;
    uint64_t began;
    int ready, wait_ms;

    loop_listeners(s);
    wait_ms = loop_timeout(s, most_ms);
    wait = (struct timespec){ wait_ms / 1000, wait_ms % 1000 * 1000000 };
    *wake = (struct pollfd){ .fd = s->work.wake, .events = POLLIN };
    ready = sys.ppoll(s->poll, s->poll_used + 1, wait_ms < 0 ? NULL : &wait,
                      s->wait_mask);
    sys_read_clock();
    if (ready < 0 && errno != EINTR)
        return -1;
    began = sys_now_us();
    s->count.turns++;
    if (ready > 0 && wake->revents != 0) {
        ready--;
        loop_collect(s);
    }
    if (s->more > 0)
        loop_more(s);
    if (ready > 0)
        loop_events(s, ready);
    if (s->starving != 0)
        loop_feed_starved(s);
    if (now_ms >= s->due)
        loop_time(s);
    if (s->dirty_first != NONE)
        loop_flush_rooms(s);
    loop_flush_conns(s);
    if (s->dirty_first != NONE) { /* what is said of who has just left */
        loop_flush_rooms(s);
        loop_flush_conns(s);
    }
#if COLLABD_TLS
    if (s->tls_used > 0)
        loop_handshakes(s);
    loop_flush_conns(s);
#endif
    began = sys_now_us() - began;
    s->count.turn_us_sum += began;
    if (began > s->count.turn_us_max)
        s->count.turn_us_max = began;
    return 0;
}
/* ===== 22  The program =====================================================
 * Start and stop, reload, signals: the calls of collabd.h, and main.
 * ========================================================================= */

/* ----- start ---------------------------------------------------------------- */

/* Raises the soft limit of descriptors to the hard one and checks the sum. */
static bool
start_descriptors(const struct cfg *c)
{
    struct rlimit limit;
    uint64_t files = c->data != 0 ? c->max_rooms : 0;
    uint64_t need = c->max_clients + c->max_requests + files +
                    c->listen.count + c->tls_listen.count + 16;

    if (getrlimit(RLIMIT_NOFILE, &limit) != 0)
        return true;
    limit.rlim_cur = limit.rlim_max;
    (void)setrlimit(RLIMIT_NOFILE, &limit);
    if (limit.rlim_max == RLIM_INFINITY || limit.rlim_max >= need)
        return true;
    log_say(LOG_LEVEL_ERROR,
            "these settings need %" PRIu64 " file descriptors (max-clients "
            "%" PRIu64 " + max-requests %" PRIu64 " + documents %" PRIu64
            " + listeners and %d more), "
            "the hard limit is %" PRIu64 "; lower max-clients or raise "
            "ulimit -Hn", need, c->max_clients, c->max_requests, files, 16,
            (uint64_t)limit.rlim_max);
    return false;
}

static bool
start_memory(struct collabd *s, const struct cfg *c)
{
    uint64_t sum = memory_sum(c);
    long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);

    if (c->memory > 0 && sum > c->memory) {
        log_say(LOG_LEVEL_ERROR,
                "these settings take %" PRIu64 " bytes, --memory allows "
                "%" PRIu64 "; --show-memory says what for", sum, c->memory);
        return false;
    }
    if (pages > 0 && page > 0 && sum > (uint64_t)pages * (uint64_t)page)
        log_say(LOG_LEVEL_WARNING,
                "these settings take %" PRIu64 " bytes, this machine has "
                "%" PRIu64, sum, (uint64_t)pages * (uint64_t)page);
    if (!memory_take(s, c)) {
        log_say(LOG_LEVEL_ERROR,
                "cannot take %" PRIu64 " bytes of memory; --show-memory says "
                "what for", sum);
        return false;
    }
    if (c->prefault) {
        for (uint64_t i = 0; i < s->slab_size; i += 1024)
            ((volatile uint8_t *)s->slab)[i] = s->slab[i]; /* touched */
        if (mlockall(MCL_CURRENT) != 0)
            log_say(LOG_LEVEL_WARNING, "prefault: memory is not locked: %s",
                    strerror(errno));
    }
    return true;
}

static bool
start_receivers(struct collabd *s)
{
    for (unsigned i = s->receivers_max; i-- > 0;) {
        struct receiver *r = &s->receivers[i];
        r->server = s;
        r->conn = NONE;
        if (receiver_make(r, conn_feed) != 0) {
            log_say(LOG_LEVEL_ERROR, "no memory for wslay's contexts");
            return false;
        }
        r->next = s->receivers_free;
        s->receivers_free = (uint16_t)i;
    }
    return true;
}

/* Opens a file's folder; the name is copied, as settings are replaced. */
static void
start_folder(struct sys_file *file, char name[NAME_MAX + 1], const char *path)
{
    if (path == NULL || *path == '\0')
        return;
    *file = sys_file_at(path);
    (void)snprintf(name, NAME_MAX + 1, "%s", file->name);
    file->name = name;
}

/* Opens the folders of the files that a reload reads again. */
static void
start_folders(struct collabd *s, const struct cfg *c)
{
    const char *path = cfg_path(s->argc, s->argv);

    start_folder(&s->config_file, s->file_names[0], path);
    start_folder(&s->tokens_file, s->file_names[1], cfg_text(c, c->tokens));
    start_folder(&s->cert_file, s->file_names[2], cfg_text(c, c->tls_cert));
    start_folder(&s->key_file, s->file_names[3], cfg_text(c, c->tls_key));
}

/* Opens the folder of documents; it belongs to the user we will be. */
static bool
start_data(struct collabd *s, const struct cfg *c)
{
    const char *user = cfg_text(c, c->user);
    struct passwd *pw = *user == '\0' ? NULL : getpwnam(user);
    struct stat st;

    if (jrnl_folder_open(&s->data, cfg_text(c, c->data), true) != 0) {
        if (errno != EROFS ||
            jrnl_folder_open(&s->data, cfg_text(c, c->data), false) != 0)
            return false;
        log_say(LOG_LEVEL_WARNING, "documents can be read, but not changed");
        return true;
    }
    if (pw != NULL && fstat(s->data.fd, &st) == 0 && st.st_uid == 0 &&
        (fchown(s->data.fd, pw->pw_uid, pw->pw_gid) != 0 ||
         fchown(s->data.lock, pw->pw_uid, pw->pw_gid) != 0))
        log_say(LOG_LEVEL_WARNING, "data folder %s: cannot be given to %s: %s",
                cfg_text(c, c->data), user, strerror(errno));
    return true;
}

/* Reads what the settings name: tokens, certificate, files. */
static bool
start_files(struct collabd *s, const struct cfg *c)
{
    if (c->tokens != 0 &&
        !access_load(s->tokens, s->tokens_file, cfg_text(c, c->tokens)))
        return false;
#if COLLABD_TLS
    if (c->tls_listen.count > 0) {
        if (tls_random_start() != 0)
            return false;
        cert_renew(s, c);
        if (!tls_load(s, c))
            return false;
    }
#else
    if (c->tls_listen.count > 0) {
        log_say(LOG_LEVEL_ERROR, "tls-listen: this collabd was built without "
                "TLS (COLLABD_TLS=0)");
        return false;
    }
#endif
    if (c->data != 0 && !start_data(s, c))
        return false;
    s->www = -1;
    if (c->www != 0) {
        const char *www = cfg_text(c, c->www);
        s->www = sys.openat(AT_FDCWD, www, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (s->www < 0) {
            log_say(LOG_LEVEL_ERROR, "www %s: %s", www, strerror(errno));
            return false;
        }
    }
    return true;
}

static bool
start_listeners(struct collabd *s, const struct cfg *c)
{
    for (unsigned i = 0; i < c->listen.count; i++)
        if (!net_listen(s, cfg_item(c, &c->listen, i), false))
            return false;
    for (unsigned i = 0; i < c->tls_listen.count; i++)
        if (!net_listen(s, cfg_item(c, &c->tls_listen, i), true))
            return false;
    s->poll_used = s->listener_count;
    for (unsigned i = 0; i < s->listener_count && c->tokens == 0; i++)
        if (net_is_public(s->listeners[i].fd)) {
            log_say(LOG_LEVEL_WARNING,
                    "an address of this machine is not private, and without "
                    "--tokens everyone who reaches it may read and write");
            break;
        }
    s->spare_fd = sys.openat(AT_FDCWD, "/dev/null", O_RDONLY | O_CLOEXEC);
    return true;
}

/* What service managers set: where to report, how often. */
static void
start_notify(struct collabd *s)
{
    const char *path = getenv("NOTIFY_SOCKET"), *usec = getenv("WATCHDOG_USEC"),
               *pid = getenv("WATCHDOG_PID");
    struct sockaddr_un at = { .sun_family = AF_UNIX };
    uint64_t n;
    size_t len;

    s->notify_fd = -1;
    if (path == NULL || (len = strlen(path)) == 0 ||
        len >= sizeof at.sun_path)
        return;
    memcpy(at.sun_path, path, len);
    if (*path == '@')
        at.sun_path[0] = '\0';
    s->notify_fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (s->notify_fd >= 0 &&
        connect(s->notify_fd, (struct sockaddr *)&at,
                (socklen_t)(offsetof(struct sockaddr_un, sun_path) + len)) !=
            0) {
        log_say(LOG_LEVEL_WARNING, "NOTIFY_SOCKET %s: %s", path,
                strerror(errno));
        (void)sys.close(s->notify_fd);
        s->notify_fd = -1;
    }
    if (pid != NULL && (span_decimal(span_text(pid), INT32_MAX, &n) != PARSE_OK ||
                        n != (uint64_t)getpid()))
        usec = NULL; /* it is meant for another process */
    if (usec != NULL &&
        span_decimal(span_text(usec), UINT64_C(1) << 40, &n) == PARSE_OK &&
        n >= 2000)
        s->watchdog_ms = (int64_t)n / 2000;
    if (s->watchdog_ms > 0)
        loop_due(s, now_ms);
}

/* Gives up root and the view of the whole machine. */
static bool
start_drop(const struct cfg *c)
{
    const char *user = cfg_text(c, c->user), *folder = cfg_text(c, c->chroot);
    struct passwd *pw = *user == '\0' ? NULL : getpwnam(user);

    if (*user != '\0' && pw == NULL) {
        log_say(LOG_LEVEL_ERROR, "user %s: there is no such user", user);
        return false;
    }
    if (*folder != '\0' && (chroot(folder) != 0 || chdir("/") != 0)) {
        log_say(LOG_LEVEL_ERROR, "chroot %s: %s", folder, strerror(errno));
        return false;
    }
    if (pw != NULL && (initgroups(user, pw->pw_gid) != 0 ||
                       setgid(pw->pw_gid) != 0 || setuid(pw->pw_uid) != 0)) {
        log_say(LOG_LEVEL_ERROR, "user %s: %s", user, strerror(errno));
        return false;
    }
    return true;
}

static void
start_log(const struct cfg *c)
{
    log_limit = (enum log_level)c->log_level;
    if (c->syslog) {
        openlog("collabd", LOG_PID | LOG_NDELAY, LOG_DAEMON);
        log_to_syslog = true;
    }
}

/* Everything between settings and the first turn. */
static bool
start(struct collabd *s)
{
    struct cfg *c = s->cfg;

    (void)gethostname(s->hostname, sizeof s->hostname - 1);
    tzset(); /* libc reads its time zone, and allocates for it, now */
    start_folders(s, c);
    if (!start_descriptors(c) || !start_memory(s, c) || !start_receivers(s) ||
        !start_files(s, c) || !start_listeners(s, c))
        return false;
    start_notify(s);
    return true;
}

static void
start_announce(struct collabd *s)
{
    for (unsigned i = 0; i < s->listener_count; i++)
        net_announce(&s->listeners[i]);
    if (s->data.fd < 0)
        log_say(LOG_LEVEL_INFO, "documents live in memory only; --data DIR "
                "keeps them");
    log_say(LOG_LEVEL_INFO, "ready");
    sys_notify(s->notify_fd, "READY=1");
}

static struct collabd *
program_new(int argc, char *const argv[])
{
    struct collabd *s = sys.calloc(1, sizeof *s);

    if (s == NULL) {
        log_say(LOG_LEVEL_ERROR, "no memory");
        return NULL;
    }
    s->cfg = &s->cfgs[0];
    s->cfg_spare = &s->cfgs[1];
    s->argc = argc;
    s->argv = argv;
    s->www = s->spare_fd = s->notify_fd = s->work.wake = -1;
    s->data = (struct jrnl_folder){ -1, -1 };
    s->due = LOOP_NEVER;
    s->config_file = s->tokens_file = s->cert_file = s->key_file =
        (struct sys_file){ -1, "" };
    s->flush_first = s->dirty_first = NONE;
    sys_read_clock();
    return s;
}

static void
program_close_fd(int fd)
{
    if (fd >= 0)
        (void)sys.close(fd);
}

void
collabd_free(struct collabd *s)
{
    if (s == NULL)
        return;
    work_stop(&s->work);
    if (s->work.wake >= 0)
        loop_collect(s);
    for (unsigned i = 0; i < s->conns_fresh; i++) {
        struct conn *c = &s->conns[i];
        if (c->state == CONN_FREE)
            continue;
        c->state = CONN_GONE;
        c->flushing = false;
        conn_end(s, c);
    }
    for (unsigned i = 0; i < s->rooms_fresh; i++)
        if (s->rooms[i].used && s->rooms[i].kind == ROOM_DOCUMENT &&
            s->docs[i].state == DOC_OPEN)
            sync_finish(s, &s->rooms[i]);
    jrnl_folder_close(&s->data);
    for (unsigned i = 0; s->receivers != NULL && i < s->cfg->receive_buffers;
         i++)
        if (s->receivers[i].wslay != NULL)
            wslay_frame_context_free(s->receivers[i].wslay);
#if COLLABD_TLS
    if (s->tls_current >= 0 && s->slab != NULL)
        tls_config_unref(&s->tls_configs[s->tls_current]);
#endif
    for (unsigned i = 0; i < s->listener_count; i++) {
        program_close_fd(s->listeners[i].fd);
        if (s->listeners[i].local)
            (void)unlink(s->listeners[i].path);
    }
    program_close_fd(s->config_file.folder);
    program_close_fd(s->tokens_file.folder);
    program_close_fd(s->cert_file.folder);
    program_close_fd(s->key_file.folder);
    program_close_fd(s->www);
    program_close_fd(s->spare_fd);
    program_close_fd(s->notify_fd);
    program_close_fd(s->work.wake);
    free(s->slab);
    free(s);
}

/* Reads the settings, and what to do. */
static bool
program_read(struct collabd *s, enum cfg_action *action, const char *operand[2])
{
    const char *path = cfg_path(s->argc, s->argv);
    struct sys_file file = { -1, "" };
    bool good;

    *action = CFG_ACTION_NONE;
    operand[0] = operand[1] = NULL;
    if (path != NULL)
        file = sys_file_at(path);
    good = cfg_read(s->cfg, s->argc, s->argv, file, action, operand);
    program_close_fd(file.folder);
    if (good)
        start_log(s->cfg);
    return good;
}

struct collabd *
collabd_init(int argc, char *const argv[])
{
    struct collabd *s = program_new(argc, argv);
    enum cfg_action action;
    const char *operand[2];
    bool good;

    if (s == NULL)
        return NULL;
    good = program_read(s, &action, operand);
    if (good && action != CFG_ACTION_NONE) {
        log_say(LOG_LEVEL_ERROR, "--%s is not for an embedded server",
                cfg_actions[action].name);
        good = false;
    }
    if (!good || !start(s)) {
        collabd_free(s);
        return NULL;
    }
    return s;
}

/* ----- running --------------------------------------------------------------- */

void
collabd_stop(struct collabd *s)
{
    if (s->stopping)
        return;
    s->stopping = true;
    s->stop_by = now_ms + CONN_CLOSE_MS - 100;
    loop_due(s, now_ms); /* what is queued here is flushed without a wait */
    sys_notify(s->notify_fd, "STOPPING=1");
    for (unsigned i = 0; i < s->conns_fresh; i++) {
        struct conn *c = &s->conns[i];
        if (c->state == CONN_FREE)
            continue;
        c->close_after_reply = true;
        if (c->state != CONN_REPLY)
            conn_close(s, c, CLOSE_SHUTDOWN);
    }
}

int
collabd_step(struct collabd *s, int timeout_ms)
{
    if (loop_turn(s, timeout_ms) != 0)
        return -1;
    if (!s->stopping)
        return 0;
    return s->conns_used == 0 || now_ms >= s->stop_by ? 1 : 0;
}

/* After new tokens: every connection's right on its room is judged again. */
static void
program_judge_again(struct collabd *s)
{
    for (unsigned i = 0; i < s->conns_fresh; i++) {
        struct conn *c = &s->conns[i];
        struct room *room = conn_room(s, c);
        bool known;
        if (c->state != CONN_OPEN || room == NULL)
            continue;
        c->right = (uint8_t)conn_right_on(s, c, conn_room_prefix(room->kind),
                                          room_name(room), &known);
        if (c->right < RIGHT_READ)
            conn_close(s, c, known ? CLOSE_FORBIDDEN : CLOSE_UNAUTHORIZED);
    }
}

static bool
program_reload(struct collabd *s)
{
    struct cfg *fresh = s->cfg_spare;
    struct tokens *tokens = s->tokens_spare;
    enum cfg_action action = CFG_ACTION_NONE;
    const char *operand[2];

    if (!cfg_read(fresh, s->argc, s->argv, s->config_file, &action,
                  operand))
        return false;
    cfg_keep_start(fresh, s->cfg);
    if (fresh->tokens == 0)
        tokens = NULL; /* that takes a restart; the table stays */
    if (tokens != NULL &&
        !access_load(tokens, s->tokens_file, cfg_text(fresh, fresh->tokens)))
        return false;
#if COLLABD_TLS
    if (s->tls_current >= 0) {
        cert_renew(s, fresh);
        if (!tls_load(s, fresh))
            return false;
    }
#endif
    s->cfg_spare = s->cfg;
    s->cfg = fresh;
    log_limit = (enum log_level)fresh->log_level;
    if (tokens != NULL) {
        s->tokens_spare = s->tokens;
        s->tokens = tokens;
        program_judge_again(s);
    }
    return true;
}

int
collabd_reload(struct collabd *s)
{
    bool good = program_reload(s);

    if (good) {
        s->count.reloads++;
        log_say(LOG_LEVEL_INFO, "reloaded");
    } else {
        s->count.reloads_failed++;
        log_say(LOG_LEVEL_ERROR, "reload failed; all stays as it was");
    }
    loop_due(s, now_ms);
    return good ? 0 : -1;
}

int
collabd_port(const struct collabd *s, int i)
{
    return i >= 0 && (unsigned)i < s->listener_count ? s->listeners[i].port
                                                     : -1;
}

void
collabd_stats(const struct collabd *s, struct collabd_stats *out)
{
    *out = (struct collabd_stats){
        .clients = s->conns_used, .rooms = s->rooms_used,
        .messages_in = s->count.messages_in,
        .messages_out = s->count.messages_out,
        .bytes_in = s->count.bytes_in, .bytes_out = s->count.bytes_out,
        .memory = s->slab_size + sizeof *s,
    };
}

/* ----- invariants ----------------------------------------------------------------- */

static void
check_conn(const struct collabd *s, const struct conn *c)
{
    must(c->poll != NONE && s->poll_conn[c->poll] == c->id.slot);
    must(s->poll[c->poll].fd == (c->busy ? -1 : c->fd));
    must(c->control_at <= c->control_end &&
           c->control_end <= sizeof c->control);
    if (c->in.room != NONE)
        must(c->state == CONN_OPEN || c->state == CONN_CLOSING);
    if (c->receiver != NONE) {
        const struct receiver *r = &s->receivers[c->receiver];
        must(r->conn == c->id.slot && c->spoke_ws);
        must(r->fed >= r->used);
    }
    if (c->request != NONE) {
        const struct request *q = &s->requests[c->request];
        must(q->conn == c->id.slot);
        must(q->head_len <= sizeof q->head && q->reply_at <= q->reply_end);
    }
}

void
collabd_check(const struct collabd *s)
{
    unsigned conns = 0, more = 0, receivers = 0, requests = 0, rooms = 0;
    unsigned dirty = 0;
    uint64_t chunks = 0, extents = 0;

    for (unsigned i = 0; i < s->conns_fresh; i++) {
        const struct conn *c = &s->conns[i];
        must(c->id.slot == i);
        if (c->state == CONN_FREE)
            continue;
        check_conn(s, c);
        conns++;
        more += c->more;
        receivers += c->receiver != NONE;
        requests += c->request != NONE;
        for (uint32_t k = c->message.first; k != NONE32;
             k = s->chunks.next[k])
            chunks++;
    }
    must(conns == s->conns_used && more == s->more);
    must(conns + s->listener_count == s->poll_used);
    must(receivers == s->receivers_used && requests == s->requests_used);
    for (uint16_t i = s->conns_free; i != NONE; i = s->conns[i].next)
        conns++;
    must(conns == s->conns_fresh);
    for (uint16_t i = s->receivers_free; i != NONE; i = s->receivers[i].next)
        receivers++;
    must(receivers == s->receivers_max);
    for (uint16_t i = s->requests_free; i != NONE; i = s->requests[i].next)
        requests++;
    must(requests == s->requests_fresh);
    for (unsigned i = 0; i < s->rooms_fresh; i++) {
        const struct room *room = &s->rooms[i];
        if (!room->used)
            continue;
        rooms++;
        dirty += room->dirty;
        room_check(s, room);
        if (room->kind == ROOM_DOCUMENT)
            sync_check(s, room);
        for (uint64_t e = room->ring.tail; e < room->ring.head; e++)
            for (uint32_t k = ring_entry(&room->ring, e)->block; k != NONE32;
                 k = s->chunks.next[k])
                chunks++;
    }
    must(rooms == s->rooms_used);
    for (unsigned i = 0; i < s->rooms_fresh; i++)
        extents += doc_extents(&s->docs[i]);
    for (unsigned i = 0; i < s->conns_fresh; i++)
        extents += s->syncs[i].memory.size + s->syncs[i].source.size +
                   s->syncs[i].sv.size + s->syncs[i].message.size;
    must(extents == s->doc_used);
    for (uint16_t i = s->dirty_first; i != NONE; i = s->rooms[i].dirty_next) {
        must(s->rooms[i].used && s->rooms[i].dirty && dirty > 0);
        dirty--;
    }
    must(dirty == 0);
    must(chunks == s->chunks.used);
    for (uint32_t k = s->chunks.free; k != NONE32; k = s->chunks.next[k])
        chunks++;
    must(chunks == s->chunks.fresh);
}

/* ----- main -------------------------------------------------------------------------- */

static int
program_make_token(void)
{
    uint8_t secret[24], hash[32], token[33], text[65];
    struct out t = out_over(token, sizeof token), h = out_over(text, 65);

    if (!sys_random(secret, sizeof secret)) {
        log_say(LOG_LEVEL_ERROR, "the kernel gives no random bytes: %s",
                strerror(errno));
        return 1;
    }
    out_base64(&t, secret, sizeof secret);
    for (uint8_t *p = token; p < t.at; p++)
        *p = *p == '+' ? '-' : *p == '/' ? '_' : *p;
    sys_hash(MBEDTLS_MD_SHA256, (struct span){ token, t.at }, hash);
    out_hex(&h, hash, sizeof hash);
    /* so that `collabd --make-token >> FILE` does it */
    (void)fprintf(stderr, "the client's token: %.32s\n", (char *)token);
    (void)printf("%.64s write *\n", (char *)text);
    return 0;
}

static int
program_version(void)
{
    (void)printf("collabd " COLLABD_VERSION "\nmbedTLS " MBEDTLS_VERSION_STRING
                 ", "
#if COLLABD_TLS
                 TLS_VERSIONS
#else
                 "built without TLS"
#endif
                 "\n");
    return 0;
}

/* Are all settings good, and can all files be read as the user we will be? */
static int
program_check(struct collabd *s)
{
    struct cfg without = *s->cfg;

    without.chroot = 0;
    start_folders(s, s->cfg);
    if (!start_descriptors(s->cfg) || !start_memory(s, s->cfg) ||
        !start_drop(&without) || !start_files(s, s->cfg))
        return 1;
    (void)printf("all settings are good\n");
    return 0;
}

/* ----- documents from outside ----------------------------------------------------------- */

/* Memory for one document without a server.  It is not short then: the limit
 * is for those that run for long. */
static bool
program_take_memory(struct collabd *s)
{
    if (!start_memory(s, s->cfg))
        return false;
    s->cfg->doc_memory = UINT64_C(1) << 40;
    s->rooms_fresh = 1;
    return true;
}

/* Opens one document of a folder. */
static bool
program_open_document(struct collabd *s, const char *folder, const char *name,
                      bool to_write)
{
    struct verdict v = http_judge_name(span_text(name));

    if (v.status != 0) {
        log_say(LOG_LEVEL_ERROR, "document \"%s\": %s", name, v.why);
        return false;
    }
    if (jrnl_folder_open(&s->data, folder, to_write) != 0)
        return false;
    return doc_open(s, &s->docs[0], span_text(name)) == DOC_OPENED;
}

/* `collabd --export DIR NAME`, also beside a server that runs. */
static int
program_export(struct collabd *s, const char *folder, const char *name)
{
    const struct doc *d;

    if (!program_take_memory(s) ||
        !program_open_document(s, folder, name, false))
        return 1;
    d = &s->docs[0];
    if (d->file.fd < 0) {
        log_say(LOG_LEVEL_ERROR, "document \"%s\": there is none in %s; "
                "--list shows what there is", name, folder);
        return 1;
    }
    if (fwrite(d->now.len > 0 ? (const char *)d->now.memory.at : "\0", 1,
               d->now.len > 0 ? d->now.len : 2, stdout) == 0 ||
        fflush(stdout) != 0) {
        log_say(LOG_LEVEL_ERROR, "standard output: %s", strerror(errno));
        return 1;
    }
    return 0;
}

/* All of standard input.  False: logged. */
static bool
program_read_input(struct collabd *s, struct extent *e, size_t *len)
{
    ssize_t n = 1;

    for (*len = 0; n > 0; *len += (size_t)(n > 0 ? n : 0)) {
        if (*len == e->size && !extent_resize(s, e, *len * 2 + 65536)) {
            log_say(LOG_LEVEL_ERROR, "no memory for the update");
            return false;
        }
        n = sys.read(STDIN_FILENO, e->at + *len, e->size - *len);
    }
    if (n < 0)
        log_say(LOG_LEVEL_ERROR, "standard input: %s", strerror(errno));
    return n == 0;
}

/* `collabd --import DIR NAME < update`. */
static int
program_import(struct collabd *s, const char *folder, const char *name)
{
    struct extent input = { NULL, 0 }, fresh = { NULL, 0 };
    struct y_report r;
    struct span update;
    struct doc *d;
    size_t len;

    if (!program_take_memory(s) || !program_read_input(s, &input, &len))
        return 1;
    update = span_of(input.at, len);
    if (!y_check(update, &r)) {
        log_say(LOG_LEVEL_ERROR, "standard input is no Yjs update: %s at byte "
                "%zu", r.fault, r.at);
        return 1;
    }
    if (!program_open_document(s, folder, name, true))
        return 1;
    d = &s->docs[0];
    if (!doc_minus(s, d, update, &r, &fresh, &len)) {
        log_say(LOG_LEVEL_ERROR, "no memory for the update");
        return 1;
    }
    if (len == 0)
        return 0; /* all of it is known */
    s->cfg->max_doc = UINT32_MAX;
    update = span_of(fresh.at, len);
    must(y_check(update, &r));
    if (!doc_ask(s, d, &r, len)) {
        log_say(LOG_LEVEL_ERROR, "document \"%s\": it would be too large",
                name);
        return 1;
    }
    doc_append(d, update, &r);
    if (!doc_commit(s, d))
        return 1;
    return jrnl_sync(&d->file) == 0 && jrnl_sync_folder(s->data.fd) == 0 ? 0
                                                                         : 1;
}

/* `collabd --delete DIR NAME`. */
static int
program_delete(struct collabd *s, const char *folder, const char *name)
{
    struct verdict v = http_judge_name(span_text(name));

    if (v.status != 0) {
        log_say(LOG_LEVEL_ERROR, "document \"%s\": %s", name, v.why);
        return 1;
    }
    return jrnl_folder_open(&s->data, folder, true) == 0 &&
                   jrnl_delete(&s->data, span_text(name)) == 0
               ? 0
               : 1;
}

#ifndef COLLABD_NO_MAIN

static volatile sig_atomic_t signal_stop, signal_reload;

static void
program_on_signal(int number)
{
    if (number == SIGHUP)
        signal_reload = 1;
    else
        signal_stop = 1;
}

/* Signals are let in only while the loop waits, so none is missed between a
 * look at the flags and the wait. */
static void
program_catch_signals(sigset_t *outside)
{
    static const int numbers[] = { SIGTERM, SIGINT, SIGHUP };
    struct sigaction act = { .sa_handler = program_on_signal };
    sigset_t ours;

    (void)sigemptyset(&ours);
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        (void)sigaction(numbers[i], &act, NULL);
        (void)sigaddset(&ours, numbers[i]);
    }
    (void)pthread_sigmask(SIG_BLOCK, &ours, outside);
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        (void)sigdelset(outside, numbers[i]);
    (void)signal(SIGPIPE, SIG_IGN);
    (void)signal(SIGXFSZ, SIG_IGN); /* write() says EFBIG */
}

static int
program_run(struct collabd *s)
{
    static sigset_t outside;
    int answer = 0;

    program_catch_signals(&outside);
    s->wait_mask = &outside;
    start_announce(s);
    while (answer == 0) {
        if (signal_stop)
            collabd_stop(s);
        if (signal_reload) {
            signal_reload = 0;
            (void)collabd_reload(s);
        }
        answer = collabd_step(s, -1);
    }
    if (answer < 0)
        log_say(LOG_LEVEL_ERROR, "poll: %s", strerror(errno));
    return answer < 0;
}

static int
program_act(struct collabd *s, enum cfg_action action,
            const char *const operand[2])
{
    switch (action) {
    case CFG_ACTION_NONE:
    case CFG_ACTION_config:
        if (!start(s) || !start_drop(s->cfg))
            return 1;
        return program_run(s);
    case CFG_ACTION_check:
        return program_check(s);
    case CFG_ACTION_show_memory:
        memory_show(s->cfg, stdout);
        return 0;
    case CFG_ACTION_make_cert:
#if COLLABD_TLS
        return cert_make(operand[0]) == 0 ? 0 : 1;
#else
        (void)operand;
        log_say(LOG_LEVEL_ERROR, "this collabd was built without TLS");
        return 1;
#endif
    case CFG_ACTION_list:
        return jrnl_print_list(stdout, operand[0]);
    case CFG_ACTION_fsck:
        return jrnl_fsck(stdout, operand[0]);
    case CFG_ACTION_export:
        return program_export(s, operand[0], operand[1]);
    case CFG_ACTION_import:
        return program_import(s, operand[0], operand[1]);
    case CFG_ACTION_delete:
        return program_delete(s, operand[0], operand[1]);
    case CFG_ACTION_make_token:
        return program_make_token();
    case CFG_ACTION_help:
        cfg_help(stdout);
        return 0;
    case CFG_ACTION_version:
        return program_version();
    }
    return 1;
}

int
main(int argc, char *argv[])
{
    struct collabd *s = program_new(argc, argv);
    enum cfg_action action;
    const char *operand[2];
    int status = 2;

    if (s == NULL)
        return 1;
    if (program_read(s, &action, operand))
        status = program_act(s, action, operand);
    collabd_free(s);
    return status;
}

#endif
