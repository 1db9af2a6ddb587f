/* ===== 1  Front page =====================================================
 * collabd.c - a real-time collaboration server that fits in a router.
 *
 * SPDX-License-Identifier: MIT
 *
 * What one client sends to the WebSocket /ws/NAME reaches every other client
 * of that name, whole, at once, and in one order that is the same for all.
 * Beside that there is what a browser needs to get there: HTTP, TLS, tokens,
 * and files from a folder.  The program is one process, one thread and one
 * poll() loop.  It takes its memory when it starts and never more; two
 * libraries, wslay and mbedTLS, do the framing and the cryptography.
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
 *   due ─▶ flush the rooms ─▶ flush and free connections ─▶ one step of one TLS
 *   handshake.
 *
 * A publish costs one copy, however many members there are, and one system
 * call for each member and turn, however many messages there were.  Output has
 * three sources, control frames, a reply, the ring, and changes between them
 * only where a frame ends.
 *
 * The memory sum, all of it fixed by the settings (`collabd --show-memory`
 * prints each line, --memory refuses a sum that is too large):
 *
 *     max-clients      x  a slot, its place in the poll set
 *   + max-rooms        x  a slot, 2 x ring (the bytes, the table of entries)
 *   + message-memory      messages that are long or come in pieces
 *   + max-requests     x  a request head and a piece of a reply
 *   + receive-buffers  x  wslay's context, which holds the receive buffer
 *   + 2                x  the token table, the one in use and its successor
 *   + max-tls          x  mbedTLS's buffers, and more during a handshake
 *   + the server itself
 *
 * It is touched only when used.  On top come the kernel's socket buffers, which
 * socket-buffer bounds for each connection.  A pool that is dry is an answer,
 * not a failure: a client waits unread until a deadline, then gets 503 or 1013.
 *
 * What can go wrong, and where the answer stands:
 *
 *   bytes that lie about lengths        2  spans check every bound
 *   requests read two ways (smuggling)  8  strict heads, no two framings
 *   frames against the rules, bad text  9  judged before they are used
 *   a page of a stranger's site        10  Origin
 *   a stranger's name for this host    10  Host (DNS rebinding)
 *   forged X-Forwarded-For             10  only from --trust-proxy
 *   guessed or leaked tokens           10  hashes, constant time; never logged
 *   a client that stops reading        11  overtaken and cut loose
 *   most clients slow                  11  their publishers wait, not for long
 *   a TLS write that was half taken    12  what is owed goes first, same length
 *   handshakes that hold up the rest   12, 16  max-handshakes, a step a turn
 *   a stolen CA key                    13  name constraints: this box only
 *   a clock that was never set         3, 13  not before the build
 *   a path that leaves the folder      14  walked without links, no `..`
 *   slow-loris, at every stage         15  each state has its deadline
 *   a peer that is gone silently       15  pings; any byte counts as life
 *   one client with all the buffers    16  stalled holders are evicted
 *   out of slots or descriptors        16  a spare one says 503; rest, no spin
 *   a reload with an error in it       17  all or nothing
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
 *    4  Settings      cfg_             every knob, in one table
 *    5  Rings         ring_            cursors, and who may overwrite what
 *    6  Tables        memory_ chunk_   every struct, its invariants, its place
 *    7  Counters      stat_            what is measured; text for /metrics
 *    8  HTTP          http_            a request head to a verdict
 *    9  Frames        ws_ receiver_    frames in; wslay's contexts, lent
 *   10  Access        access_          tokens, Origin, Host, proxies
 *   11  Rooms         room_            publish once, read by cursor; laggards
 *   12  Transport     net_ tls_        sockets and TLS behind one pair of calls
 *   13  Certificates  cert_            a CA for this box, and its leaf
 *   14  Files         file_            static files, and no way out
 *   15  Connections   conn_            the state machine; every way to leave
 *   16  The turn      loop_            wait, read, flush, deadlines
 *   17  The program   start_ program_  start and stop; collabd.h's calls; main
 *
 * collabd.h has the limits with the reason for each, the close codes and the
 * calls to embed the server.  Tests include this file (COLLABD_NO_MAIN) and so
 * reach everything in it.
 * ========================================================================= */

#define _GNU_SOURCE

#include "collabd.h"

#ifndef COLLABD_TLS
#define COLLABD_TLS 1
#endif

#include <arpa/inet.h>
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
#include <pwd.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
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

/* ===== 2  Bytes =============================================================
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
/* ===== 3  Machine ===========================================================
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
} sys = { ppoll, accept4, recv, send, sendmsg, openat,
          read, pread, close, calloc, clock_gettime,
          write, fsync, renameat };

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
/* ===== 4  Settings ==========================================================
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
    X(LEVEL, log_level,        "info",    0,     0,         LIVE,  "LEVEL",   "error, warning, info or debug") \
    X(FLAG,  syslog,           "no",      0,     0,         START, "",        "log to syslog instead of standard error") \
    X(TEXT,  user,             "",        0,     0,         START, "NAME",    "become this user once the sockets are open") \
    X(TEXT,  chroot,           "",        0,     0,         START, "DIR",     "see only DIR from then on") \
    X(FLAG,  prefault,         "no",      0,     0,         START, "",        "touch and lock all memory at start")

#define CFG_ACTIONS(X) \
    X(config,      "FILE", "read settings from FILE, lines of `name = value`; flags win") \
    X(check,       "",     "check all settings and files, then exit") \
    X(show_memory, "",     "print the memory that these settings take, then exit") \
    X(make_cert,   "DIR",  "make a certificate authority and a certificate for this machine in DIR, then exit") \
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
#define CFG_FIELD_LEVEL uint64_t
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
    CFG_TEXT, CFG_OCTAL, CFG_SIZE, CFG_POWER, CFG_LEVEL, CFG_FLAG
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
    char def[8], value[8];
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
    case CFG_LEVEL:
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
    char needs[40];

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
    case CFG_LEVEL:
        while (n < 4 && !span_is(value, log_names[n]))
            n++;
        if (n == 4)
            return cfg_refuse(set, value, where,
                              "it may be error, warning, info or debug");
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

/* What flags say.  A list given by flags replaces the file's. */
static bool
cfg_flags(struct cfg *c, int argc, char *const argv[], enum cfg_action *action,
          const char **operand)
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
                *operand = (const char *)value.at;
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
         enum cfg_action *action, const char **operand)
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
                  "there, in one order.\n\n");
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
/* ===== 5  Rings =============================================================
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
 *   invariants   1  tail <= head,           head - tail <= slots
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

/* Takes the oldest entry away. */
static void
ring_drop(struct ring *r)
{
    must(r->tail < r->head);
    r->tail++;
    r->tail_at = r->tail == r->head ? r->head_at : ring_entry(r, r->tail)->at;
}

static void
ring_copy_in(struct ring *r, const void *from, size_t len)
{
    size_t at = (size_t)(r->head_at & (r->size - 1));
    size_t first = len < r->size - at ? len : (size_t)r->size - at;

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

/* The entry in [from, head) that holds the byte `at`, which was put in later
 * than entry `from` began; the head if all of them lie before it.  Blocks take
 * no bytes, so the last entry that begins at or before `at` is the one, and a
 * binary search finds it. */
static uint64_t
ring_find(const struct ring *r, uint64_t from, uint64_t at)
{
    uint64_t low = from, high = r->head;

    if (at == r->head_at)
        return r->head;
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
    must(r->tail <= r->head && r->head - r->tail <= r->size / RING_CHARGE);
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
/* ===== 6  Tables ============================================================
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
    X(TLS,        0,    "TLS failed")
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
enum pool { POOL_REQUESTS = 1, POOL_RECEIVERS = 2, POOL_CHUNKS = 4 };

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
    mbedtls_ssl_context ssl;
    size_t owed; /* length of a write that mbedTLS took but could not send */
    int fd;
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

/* ----- rooms ---------------------------------------------------------------
 *   invariants   1  every member's cursor is >= ring.tail or it is overtaken
 *                2  slowest <= every cursor of a member not overtaken
 *                3  block_bytes is the sum over blocks still there
 *                4  empty rooms stand in the list of empty ones, oldest first */

struct room {
    struct ring ring;
    uint64_t flushed_pos;  /* ring.pos when last flushed */
    uint64_t slowest;      /* a lower bound of all cursors */
    uint64_t blocks_until; /* entry number behind the newest block */
    uint64_t block_bytes;
    int64_t flushed_ms, judged_ms;
    uint16_t first, count; /* members */
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
    X(turns,          "turns of the loop")
/* clang-format on */

struct counters {
#define X(name, help) uint64_t name;
    COUNTERS(X)
#undef X
    uint64_t closes[CLOSE_REASON_COUNT];
    uint64_t statuses[600 - 100];
    uint64_t turn_us_max, turn_us_sum;
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
    struct pollfd *poll; /* listeners first, then connections, dense */
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
    unsigned rooms_max, rooms_fresh, rooms_used, bucket_count;
    uint16_t empty_first, empty_last, dirty_first;
    uint64_t block_budget; /* bytes of blocks a room may hold */

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
    X(poll,         "poll set",          c->max_clients + COLLABD_LISTENERS, sizeof(struct pollfd)) \
    X(poll_conn,    "its owners",        c->max_clients + COLLABD_LISTENERS, sizeof(uint16_t)) \
    X(rooms,        "rooms",             c->max_rooms, sizeof(struct room)) \
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
 * each connection, as measured idle and during a handshake. */
#define MEMORY_WSLAY 4256u
#define MEMORY_TLS_IDLE (40u << 10)
#define MEMORY_TLS_HANDSHAKE (15u << 10)

static uint64_t
memory_libraries(const struct cfg *c)
{
    uint64_t sum = c->receive_buffers * MEMORY_WSLAY;

    if (c->tls_listen.count > 0)
        sum += c->max_tls * MEMORY_TLS_IDLE +
               c->max_handshakes * MEMORY_TLS_HANDSHAKE;
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
    return memory_slab(c) + sizeof(struct collabd) + memory_libraries(c);
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
    s->block_budget = c->message_memory / 4 > c->max_message + 10
                          ? c->message_memory / 4
                          : c->max_message + 10;
    if (s->tokens != NULL)
        s->tokens_spare = s->tokens + 1;
    for (unsigned i = 0; i < s->bucket_count; i++)
        s->buckets[i] = NONE;
    s->conns_free = s->requests_free = s->receivers_free = NONE;
    s->flush_first = s->dirty_first = NONE;
    s->empty_first = s->empty_last = NONE;
#if COLLABD_TLS
    s->tls_max = c->tls_listen.count > 0 ? (unsigned)c->max_tls : 0;
    s->tls_free = NONE;
    s->tls_current = -1;
#endif
    return true;
}
/* ===== 7  Counters ==========================================================
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
            pos = in->overtaken ? 0 : ring_pos(&room->ring, in->entry);
            if (!in->overtaken &&
                room->ring.pos - pos - in->own > *longest)
                *longest = room->ring.pos - pos - in->own;
        }
    }
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

static void
stat_health(const struct collabd *s, struct out *o)
{
    out_format(o, "{\"status\":\"%s\",\"version\":\"" COLLABD_VERSION "\","
               "\"clients\":%u,\"rooms\":%u}\n",
               s->stopping ? "stopping" : "ok", s->conns_used, s->rooms_used);
}
/* ===== 8  HTTP ==============================================================
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

/* A room's name from the path behind /ws/: decoded, 1 to COLLABD_NAME_MAX
 * bytes of UTF-8 without controls, no empty, `.` or `..` segment. */
static struct verdict
http_room_name(struct span path, uint8_t name[COLLABD_NAME_MAX], uint8_t *len)
{
    struct out o = out_over(name, COLLABD_NAME_MAX);
    struct utf8 utf8 = { 0, 0, 0 };
    struct span s;

    if (!http_decode(path, &o))
        return o.full ? HTTP_BAD("the name is longer than 128 bytes")
                      : HTTP_BAD("a % in the name lacks its two hex digits");
    s = (struct span){ name, o.at };
    if (!utf8_check(&utf8, s) || !utf8_is_complete(&utf8))
        return HTTP_BAD("the name is not UTF-8");
    *len = (uint8_t)span_len(s);
    for (size_t i = 0; i < span_len(s); i++)
        if (name[i] < ' ' || name[i] == 0x7f ||
            (name[i] == 0xc2 && name[i + 1] < 0xa0)) /* C1, complete UTF-8 */
            return HTTP_BAD("the name holds a control character");
    do {
        struct span part = span_cut(&s, '/');
        if (span_is_empty(part) || span_is(part, ".") || span_is(part, ".."))
            return HTTP_BAD("the name has an empty, `.` or `..` segment");
    } while (!span_is_empty(s));
    if (*len == 0 || name[*len - 1] == '/')
        return HTTP_BAD("the name has an empty segment");
    return http_fine;
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
/* ===== 9  Frames ============================================================
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
/* ===== 10  Access ===========================================================
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

/* ===== 11  Rooms ============================================================
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
room_hash(struct span name)
{
    uint32_t h = 2166136261u; /* FNV-1a */

    for (; name.at < name.end; name.at++)
        h = (h ^ *name.at) * 16777619u;
    return h;
}

static uint16_t *
room_bucket(struct collabd *s, struct span name)
{
    return &s->buckets[room_hash(name) & (s->bucket_count - 1)];
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
    uint16_t *link = room_bucket(s, room_name(room));

    must(room->count == 0);
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
    s->rooms_used--;
}

/* The room of that name, made if need be: in a slot never used, else in that
 * of the room that has been empty for longest.  NULL: all have members. */
static struct room *
room_open(struct collabd *s, struct span name)
{
    uint16_t *bucket = room_bucket(s, name), slot;
    struct room *room;

    for (slot = *bucket; slot != NONE; slot = s->rooms[slot].bucket_next)
        if (span_equals(room_name(&s->rooms[slot]), name))
            return &s->rooms[slot];
    if (s->rooms_fresh < s->rooms_max) {
        slot = (uint16_t)s->rooms_fresh++;
    } else if (s->empty_first != NONE) {
        slot = s->empty_first;
        room_close(s, &s->rooms[slot]);
    } else {
        return NULL;
    }
    room = &s->rooms[slot];
    *room = (struct room){
        .ring = { .bytes = s->ring_bytes + slot * s->cfg->ring,
                  .entries = s->ring_entries +
                             slot * (s->cfg->ring / RING_CHARGE),
                  .size = s->cfg->ring },
        .first = NONE, .prev = NONE, .next = NONE, .dirty_next = NONE,
        .used = true, .name_len = (uint8_t)span_len(name),
        .flushed_ms = now_ms - 1000,
    };
    memcpy(room->name, name.at, span_len(name));
    bucket = room_bucket(s, name);
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
    uint64_t entry = r->head;

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

static void
room_join(struct collabd *s, struct room *room, struct conn *c, bool echo,
          uint64_t history)
{
    must(c->in.room == NONE);
    if (room->count == 0)
        room_empty_remove(s, room);
    c->in = (struct member){ .entry = room_history(room, history),
                             .room = room_slot(s, room), .prev = NONE,
                             .next = room->first, .echo = echo,
                             .moved_ms = now_ms };
    for (uint64_t i = c->in.entry; i < room->ring.head; i++)
        if (room_is_own(ring_entry(&room->ring, i), c)) /* gen came round */
            c->in.own += ring_charge(ring_entry(&room->ring, i)->len);
    if (room->first != NONE)
        s->conns[room->first].in.prev = c->id.slot;
    room->first = c->id.slot;
    if (room->count++ == 0 || c->in.entry < room->slowest)
        room->slowest = c->in.entry;
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
    if (c->in.entry < room->blocks_until) {
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
        if (in->overtaken)
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

/* What follows every new entry. */
static void
room_published(struct collabd *s, struct room *room, struct conn *from,
               const struct entry *e)
{
    if (!from->in.echo)
        from->in.own += ring_charge(e->len);
    s->count.messages_in++;
    room_mark_dirty(s, room);
}

/* Publishes a message that lies in one piece: the one copy. */
static void
room_publish(struct collabd *s, struct conn *from, uint8_t opcode,
             struct span message)
{
    struct room *room = &s->rooms[from->in.room];
    uint8_t header[WS_HEADER_MAX];
    struct out o = out_over(header, sizeof header);
    size_t header_len;
    struct entry *e;

    ws_header(&o, opcode, span_len(message));
    header_len = (size_t)(o.at - header);
    room_make_room(s, room, header_len + span_len(message), false);
    e = ring_new(&room->ring, (uint32_t)(header_len + span_len(message)),
                 from->id);
    ring_copy_in(&room->ring, header, header_len);
    ring_copy_in(&room->ring, message.at, span_len(message));
    s->count.copied_bytes += span_len(message);
    room_published(s, room, from, e);
}

/* Publishes an assembled message of `len` bytes and takes its chunks over. */
static void
room_publish_assembly(struct collabd *s, struct conn *from, uint8_t opcode,
                      struct assembly *m)
{
    struct room *room = &s->rooms[from->in.room];
    uint8_t header[WS_HEADER_MAX];
    struct out o = out_over(header, sizeof header);
    size_t header_len, skip;
    struct entry *e;
    uint32_t i = m->first, left = m->len;

    ws_header(&o, opcode, m->len);
    header_len = (size_t)(o.at - header);
    skip = WS_HEADER_MAX - header_len;
    memcpy(chunk_bytes(&s->chunks, i) + skip, header, header_len);
    if (!room_frame_fits_ring(room, m->len)) {
        room_make_room(s, room, header_len + m->len, true);
        e = ring_new(&room->ring, (uint32_t)(header_len + m->len), from->id);
        e->kind = RING_BLOCK;
        e->block = m->first;
        e->block_skip = (uint8_t)skip;
        e->refs = (uint16_t)(room->count - (from->in.echo ? 0 : 1));
        room->block_bytes += e->len;
        room->blocks_until = room->ring.head;
        m->first = m->last = NONE32;
        if (e->refs == 0)
            room_forget_block(s, room, e);
    } else {
        room_make_room(s, room, header_len + m->len, false);
        e = ring_new(&room->ring, (uint32_t)(header_len + m->len), from->id);
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

    if (c->in.overtaken)
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
           c->in.entry < room->ring.head &&
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

    must(!c->in.overtaken);
    room_skip_own(s, room, c);
    if (c->in.entry == r->head)
        return 0;
    if (!one_frame && room_is_plain(room, c)) {
        uint64_t at = ring_entry(r, c->in.entry)->at + off;
        return ring_peek(r, at, r->head_at - at, out);
    }
    for (uint64_t i = c->in.entry; i < r->head && n + 2 <= max; i++, off = 0) {
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
        c->in.off = entry == r->head
                        ? 0
                        : (uint32_t)(at - ring_entry(r, entry)->at);
        c->in.entry = entry;
        return;
    }
    while (c->in.entry < r->head) {
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
    uint16_t members = 0, prev = NONE;

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
        if (c->in.overtaken || c->in.entry < room->ring.tail)
            continue;
        must(c->in.entry >= room->slowest);
        for (uint64_t i = c->in.entry; i < room->ring.head; i++)
            if (room_is_own(ring_entry(&room->ring, i), c))
                own += ring_charge(ring_entry(&room->ring, i)->len);
        must(own == c->in.own);
        must(c->in.entry < room->ring.head || c->in.off == 0);
    }
    must(members == room->count);
}
/* ===== 12  Transport ========================================================
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

/* The quick curves first: a handshake's step holds everybody up, and 2.28
 * would begin with the slowest. */
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

/* One step of a handshake, never waiting: 0 done, 1 go on at once,
 * IO_WANT_READ, IO_WANT_WRITE, IO_GONE. */
static int
tls_step(struct collabd *s, struct conn *c)
{
    struct tls *t = &s->tls[c->tls];
    int n;

    if (!t->begun) {
        t->begun = true;
        s->handshakes++;
        if (mbedtls_ssl_setup(&t->ssl, &s->tls_configs[t->config].conf) != 0)
            return IO_GONE;
        mbedtls_ssl_set_bio(&t->ssl, t, tls_bio_send, tls_bio_recv, NULL);
    }
    n = mbedtls_ssl_handshake_step(&t->ssl);
    if (n == MBEDTLS_ERR_SSL_WANT_READ)
        return IO_WANT_READ;
    if (n == MBEDTLS_ERR_SSL_WANT_WRITE)
        return IO_WANT_WRITE;
    if (n != 0)
        return IO_GONE;
    if (!tls_is_over(&t->ssl))
        return 1;
    t->done = true;
    s->handshakes--;
    s->count.tls_handshakes++;
    return 0;
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

/* ===== 13  Certificates =====================================================
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

/* ===== 14  Files ============================================================
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
/* ===== 15  Connections ======================================================
 * The life of a connection: the state machine drawn in chapter 6, and every
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
    if (c->blocked || c->in.off > 0 || (q != NULL && q->reply_at < q->reply_end))
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

    if (c->state >= CONN_CLOSING || c->state == CONN_FREE)
        return;
    c->why = why;
    s->count.closes[why]++;
    conn_log(s, c,
             why == CLOSE_SLOW || why == CLOSE_NO_MEMORY ? LOG_LEVEL_WARNING
             : c->state == CONN_OPEN                     ? LOG_LEVEL_INFO
                                                         : LOG_LEVEL_DEBUG,
             close_reasons[why].text);
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
            out_text(&o, close_reasons[why].text);
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

static void
conn_open_channel(struct collabd *s, struct conn *c, const struct http *h,
                  struct span name)
{
    struct request *q = conn_request(s, c);
    struct span echo = { NULL, NULL }, history = { NULL, NULL };
    struct room *room = NULL;
    uint64_t last = 0;
    enum access_right right;
    bool known;
    struct out o = out_over(q->reply, sizeof q->reply);

    if (http_query(h->query, "history", &history) &&
        span_decimal(history, UINT32_MAX, &last) != PARSE_OK) {
        conn_refuse(s, c, h, 400, "history is not a number", NULL);
        return;
    }
    if (http_query(h->query, "echo", &echo) && !span_is(echo, "1") &&
        !span_is(echo, "0")) {
        conn_refuse(s, c, h, 400, "echo is neither 0 nor 1", NULL);
        return;
    }
    right = conn_right_on(s, c, "ws/", name, &known);
    if (right >= RIGHT_READ) {
        room = room_open(s, name);
        if (room == NULL) {
            conn_refuse(s, c, h, 503,
                        "all rooms are in use; --max-rooms says how many "
                        "there are", "Retry-After: 5\r\n");
            return;
        }
    }
    out_text(&o, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
                 "Connection: Upgrade\r\nSec-WebSocket-Accept: ");
    http_accept(h->key, &o);
    out_text(&o, "\r\n\r\n");
    q->reply_at = 0;
    q->reply_end = (uint32_t)(o.at - q->reply);
    s->count.statuses[101 - 100]++;
    s->count.upgrades++;
    c->state = CONN_OPEN;
    c->spoke_ws = true;
    c->right = (uint8_t)right;
    c->heard_ms = now_ms;
    conn_set_deadline(s, c, now_ms + (int64_t)s->cfg->ping_interval * 1000);
    conn_schedule(s, c);
    if (room == NULL)
        conn_close(s, c, known ? CLOSE_FORBIDDEN : CLOSE_UNAUTHORIZED);
    else
        room_join(s, room, c, span_is(echo, "1"), last);
}

static void
conn_answer_upgrade(struct collabd *s, struct conn *c, const struct http *h,
                    struct span name_path)
{
    uint8_t name[COLLABD_NAME_MAX], len;
    struct verdict v = http_room_name(name_path, name, &len);
    char why[300];

    if (v.status == 0)
        v = http_judge_upgrade(h);
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
    conn_open_channel(s, c, h, span_of(name, len));
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
        stat_health(s, &o);
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
                     "Health: /healthz, metrics: /metrics.\n");
    } else {
        conn_refuse(s, c, h, 404,
                    "there is nothing here; channels are at /ws/NAME, files "
                    "need --www", NULL);
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

static void
conn_route(struct collabd *s, struct conn *c, const struct http *h)
{
    uint8_t text[COLLABD_TARGET_MAX];
    struct out o = out_over(text, sizeof text);
    struct span path = h->path, token;
    bool channel = span_starts(path, "/ws/"), known;

    if (channel && http_is_upgrade(h)) {
        path.at += 4;
        conn_answer_upgrade(s, c, h, path);
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
    } else if (channel) {
        conn_refuse(s, c, h, 426, "this is a channel: connect a WebSocket",
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

/* A piece of a message.  False: there is no memory for it now; it stays in
 * the receiver. */
static bool
conn_take_piece(struct collabd *s, struct conn *c, const struct ws_piece *p)
{
    struct room *room = conn_room(s, c);
    uint64_t len = c->message.len;
    uint32_t before = (uint32_t)(len - span_len(p->data));

    if (c->right < RIGHT_WRITE) {
        conn_close(s, c, CLOSE_READ_ONLY);
        return true;
    }
    if (p->first && p->last && room_frame_fits_ring(room, len)) {
        room_publish(s, c, p->opcode, p->data);
    } else {
        if (!assembly_add(&s->chunks, &c->message, before, p->data))
            return false;
        s->count.copied_bytes += span_len(p->data);
        if (!p->last)
            return true;
        s->count.assembled++;
        room_publish_assembly(s, c, p->opcode, &c->message);
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
        conn_close(s, c, p->why);
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
            conn_starve(s, c, POOL_CHUNKS);
            return;
        }
        r->waiting.kind = WS_NOTHING;
    }
    conn_fed(s, c, conn_next_ping(s, c));
    do {
        p = ws_next(r, &c->message, s->cfg->max_message);
        if (!conn_take(s, c, &p)) {
            r->waiting = p;
            conn_starve(s, c, POOL_CHUNKS);
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
        if (sent > 0)
            room_advance(s, c, sent);
        total += sent;
        if (!all)
            return false;
        if (one_frame && c->in.off == 0)
            break;
    }
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
    if (c->in.room != NONE && !c->in.overtaken &&
        (c->in.off > 0 ||
         (c->state == CONN_CLOSING && c->control_at == 0)) &&
        !conn_flush_room(s, c, c->state != CONN_CLOSING))
        return false;
    if (!conn_push_control(s, c)) {
        if (c->state != CONN_GONE)
            c->blocked = true;
        return false;
    }
    return c->state != CONN_OPEN || c->in.room == NONE || c->in.overtaken ||
           conn_flush_room(s, c, false);
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
            room_leave(s, c);
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
    room_leave(s, c);
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
/* ===== 16  The turn =========================================================
 * One turn: poll, accept, read whoever is readable (a bounded amount each),
 * flush the rooms that got something, flush and free connections, one step of
 * one TLS handshake, and whatever deadline has passed.
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

    room->flushed_pos = room->ring.pos;
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
        if (loop_coalesces(s, room))
            room_mark_dirty(s, room);
        else
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
        if (c->state == CONN_GONE && !c->flushing)
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
           ((pools & POOL_CHUNKS) != 0 && c->message.first != NONE32);
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

/* What a step's answer means for its connection. */
static void
loop_after_step(struct collabd *s, struct conn *c, int answer)
{
    struct tls *t = &s->tls[c->tls];

    t->ready = answer == 1;
    c->blocked = answer == IO_WANT_WRITE;
    if (answer == IO_GONE) {
        conn_close(s, c, CLOSE_TLS);
        return;
    }
    if (answer == 0) {
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
    return t->conn != NONE && t->ready && !t->done &&
           (t->begun || s->handshakes < s->cfg->max_handshakes);
}

/* One step of one handshake, the next in turn that can go on.  Handshakes that
 * have not begun wait for those in flight. */
static void
loop_handshake(struct collabd *s)
{
    unsigned i = 1, slot = 0;

    s->handshakes_ready = false;
    for (; i <= s->tls_fresh; i++) {
        slot = (s->handshake_at + i) % s->tls_fresh;
        if (loop_may_step(s, &s->tls[slot]))
            break;
    }
    if (i > s->tls_fresh)
        return;
    s->handshake_at = (uint16_t)slot;
    loop_after_step(s, conn_at(s, s->tls[slot].conn),
                    tls_step(s, conn_at(s, s->tls[slot].conn)));
    for (i = 0; i < s->tls_fresh; i++)
        s->handshakes_ready |= loop_may_step(s, &s->tls[i]);
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
    for (unsigned i = 0; i < s->rooms_fresh; i++)
        if (s->rooms[i].used && s->rooms[i].held)
            loop_judge(s, &s->rooms[i]);
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

static int
loop_turn(struct collabd *s, int most_ms)
{
    struct timespec wait;
    uint64_t began;
    int ready, wait_ms;

    loop_listeners(s);
    wait_ms = loop_timeout(s, most_ms);
    wait = (struct timespec){ wait_ms / 1000, wait_ms % 1000 * 1000000 };
    ready = sys.ppoll(s->poll, s->poll_used, wait_ms < 0 ? NULL : &wait,
                      s->wait_mask);
    sys_read_clock();
    if (ready < 0 && errno != EINTR)
        return -1;
    began = sys_now_us();
    s->count.turns++;
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
#if COLLABD_TLS
    if (s->tls_used > 0)
        loop_handshake(s);
    loop_flush_conns(s);
#endif
    began = sys_now_us() - began;
    s->count.turn_us_sum += began;
    if (began > s->count.turn_us_max)
        s->count.turn_us_max = began;
    return 0;
}
/* ===== 17  The program ======================================================
 * Start and stop, reload, signals: the calls of collabd.h, and main.
 * ========================================================================= */

/* ----- start ---------------------------------------------------------------- */

/* Raises the soft limit of descriptors to the hard one and checks the sum. */
static bool
start_descriptors(const struct cfg *c)
{
    struct rlimit limit;
    uint64_t need = c->max_clients + c->max_requests + c->listen.count +
                    c->tls_listen.count + 16;

    if (getrlimit(RLIMIT_NOFILE, &limit) != 0)
        return true;
    limit.rlim_cur = limit.rlim_max;
    (void)setrlimit(RLIMIT_NOFILE, &limit);
    if (limit.rlim_max == RLIM_INFINITY || limit.rlim_max >= need)
        return true;
    log_say(LOG_LEVEL_ERROR,
            "these settings need %" PRIu64 " file descriptors (max-clients "
            "%" PRIu64 " + max-requests %" PRIu64 " + listeners and %d more), "
            "the hard limit is %" PRIu64 "; lower max-clients or raise "
            "ulimit -Hn", need, c->max_clients, c->max_requests, 16,
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
    s->www = s->spare_fd = s->notify_fd = -1;
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
    for (unsigned i = 0; i < s->conns_fresh; i++) {
        struct conn *c = &s->conns[i];
        if (c->state == CONN_FREE)
            continue;
        c->state = CONN_GONE;
        c->flushing = false;
        conn_end(s, c);
    }
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
    free(s->slab);
    free(s);
}

/* Reads the settings, and what to do. */
static bool
program_read(struct collabd *s, enum cfg_action *action, const char **operand)
{
    const char *path = cfg_path(s->argc, s->argv);
    struct sys_file file = { -1, "" };
    bool good;

    *action = CFG_ACTION_NONE;
    *operand = NULL;
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
    const char *operand;
    bool good;

    if (s == NULL)
        return NULL;
    good = program_read(s, &action, &operand);
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
        c->right = (uint8_t)conn_right_on(s, c, "ws/", room_name(room),
                                          &known);
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
    const char *operand;

    if (!cfg_read(fresh, s->argc, s->argv, s->config_file, &action, &operand))
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
    must(s->poll[c->poll].fd == c->fd);
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
    uint64_t chunks = 0;

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
        for (uint64_t e = room->ring.tail; e < room->ring.head; e++)
            for (uint32_t k = ring_entry(&room->ring, e)->block; k != NONE32;
                 k = s->chunks.next[k])
                chunks++;
    }
    must(rooms == s->rooms_used);
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
    (void)sigprocmask(SIG_BLOCK, &ours, outside);
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        (void)sigdelset(outside, numbers[i]);
    (void)signal(SIGPIPE, SIG_IGN);
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
program_act(struct collabd *s, enum cfg_action action, const char *operand)
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
        return cert_make(operand) == 0 ? 0 : 1;
#else
        (void)operand;
        log_say(LOG_LEVEL_ERROR, "this collabd was built without TLS");
        return 1;
#endif
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
    const char *operand;
    int status = 2;

    if (s == NULL)
        return 1;
    if (program_read(s, &action, &operand))
        status = program_act(s, action, operand);
    collabd_free(s);
    return status;
}

#endif
