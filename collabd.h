/* collabd.h - limits, wire constants and the calls to embed collabd.
 *
 * SPDX-License-Identifier: MIT
 *
 * Every limit below yields to -D on the compiler's command line or to a header
 * named by -DCOLLABD_LOCAL='"my_limits.h"'.  What a user may change at run time
 * is not here but in the settings table of collabd.c (`collabd --help`).
 */
#ifndef COLLABD_H
#define COLLABD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef COLLABD_LOCAL
#include COLLABD_LOCAL
#endif

#define COLLABD_VERSION "0.1.0"

/* The day this release was made, in seconds since 1970.  A board without a
 * battery starts in 1970: a clock before this day counts as this day. */
#ifndef COLLABD_BUILD_EPOCH
#define COLLABD_BUILD_EPOCH 1795478400 /* 2026-11-24 00:00:00 UTC */
#endif

/* ----- limits ----------------------------------------------------------- */

/* Slots are numbered in 16 bits, and 65535 means "none". */
#ifndef COLLABD_CLIENTS_CEILING
#define COLLABD_CLIENTS_CEILING 65000
#endif
#ifndef COLLABD_ROOMS_CEILING
#define COLLABD_ROOMS_CEILING 65000
#endif

/* Longest name of a channel or document in bytes, decoded.  Long enough for a path or a
 * UUID with a prefix, short enough to stand in every room's slot. */
#ifndef COLLABD_NAME_MAX
#define COLLABD_NAME_MAX 128
#endif

/* The unit of message memory and the longest request head.  4 KiB is a page
 * and what wslay reads at once. */
#ifndef COLLABD_CHUNK
#define COLLABD_CHUNK 4096
#endif

/* Longest request target.  Leaves half of a head to the header fields. */
#ifndef COLLABD_TARGET_MAX
#define COLLABD_TARGET_MAX 2048
#endif

/* Bytes of an HTTP reply that are ready at a time; also the longest reply that
 * is not a file.  The metrics are the longest. */
#ifndef COLLABD_REPLY
#define COLLABD_REPLY 12288
#endif

/* Control bytes a client's slot holds: a Close (127) beside a Ping and a full
 * Pong (127), or an upgrade answer. */
#ifndef COLLABD_CONTROL
#define COLLABD_CONTROL 256
#endif

/* Sockets to listen on: plain, TLS, IPv4, IPv6 and unix, some twice. */
#ifndef COLLABD_LISTENERS
#define COLLABD_LISTENERS 8
#endif

/* Lines in a token file. */
#ifndef COLLABD_TOKENS
#define COLLABD_TOKENS 256
#endif

/* Text of all settings together, in bytes. */
#ifndef COLLABD_CFG_TEXT
#define COLLABD_CFG_TEXT 4096
#endif

/* Certificates that connections may still use after reloads. */
#ifndef COLLABD_TLS_GENERATIONS
#define COLLABD_TLS_GENERATIONS 4
#endif

/* ----- wire constants --------------------------------------------------- */

/* WebSocket close codes (RFC 6455 7.4.1; 1013 from the IANA registry; 44xx
 * final and 45xx come-back-later as y-websocket clients understand them). */
enum collabd_close_code {
    COLLABD_CLOSE_NORMAL = 1000,
    COLLABD_CLOSE_GOING_AWAY = 1001,
    COLLABD_CLOSE_PROTOCOL = 1002,
    COLLABD_CLOSE_UNSUPPORTED = 1003,
    COLLABD_CLOSE_NO_STATUS = 1005,
    COLLABD_CLOSE_NOT_UTF8 = 1007,
    COLLABD_CLOSE_POLICY = 1008,
    COLLABD_CLOSE_TOO_BIG = 1009,
    COLLABD_CLOSE_INTERNAL = 1011,
    COLLABD_CLOSE_TRY_LATER = 1013,
    COLLABD_CLOSE_MALFORMED = 4400,
    COLLABD_CLOSE_UNAUTHORIZED = 4401,
    COLLABD_CLOSE_FORBIDDEN = 4403,
    COLLABD_CLOSE_NO_NAME = 4404,
    COLLABD_CLOSE_MESSAGE_TOO_BIG = 4413,
    COLLABD_CLOSE_CANNOT_OPEN = 4513
};

/* ----- embedding -------------------------------------------------------- */

struct collabd;

/* What a program that embeds the server may want to watch. */
struct collabd_stats {
    unsigned clients, rooms;          /* now */
    uint64_t messages_in, messages_out;
    uint64_t bytes_in, bytes_out;     /* payload in, stream bytes out */
    uint64_t memory;                  /* bytes taken at start */
};

/* Starts a server from the same words the program takes ("--listen", "8080",
 * ...; argv[0] is skipped; actions such as --check are refused).  NULL: it
 * could not start; the reason has been logged.  Takes all memory it will need
 * (libraries aside).  One process may hold one server: the clock, the log and
 * the table of system calls are shared.  Signals and privileges are left
 * alone. */
struct collabd *collabd_init(int argc, char *const argv[]);

/* Runs one turn: waits at most timeout_ms (-1: as long as nothing is due) for
 * something to do and does it.  0: go on; 1: stopped after collabd_stop and
 * drained; -1: poll() failed, errno says why. */
int collabd_step(struct collabd *, int timeout_ms);

/* Begins to drain: refuses new clients, closes each with 1001.  At most two
 * seconds later collabd_step answers 1.  Calling it again changes nothing. */
void collabd_stop(struct collabd *);

/* Reads tokens, certificates and reloadable settings again.  0, or -1: nothing
 * was changed and the reason has been logged. */
int collabd_reload(struct collabd *);

/* The port of listener i (in the order given), 0 for a unix socket, -1 if
 * there is no such listener. */
int collabd_port(const struct collabd *, int i);

/* Walks every structure and asserts every invariant.  For tests. */
void collabd_check(const struct collabd *);

void collabd_stats(const struct collabd *, struct collabd_stats *);

/* Closes everything and gives the memory back.  NULL is fine. */
void collabd_free(struct collabd *);

#endif
