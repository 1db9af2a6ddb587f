/* floor.c - the least a relay must do: what collabd is measured against.
 *
 * SPDX-License-Identifier: MIT
 *
 * Completes the upgrade, reads frame lengths, undoes the mask, and calls send()
 * once per member and message.  One room, no checks, no limits, no closing
 * handshake; a member whose socket is full misses the message.  Not a server.
 *
 *   floor [PORT]      0, the default, picks one; says it as collabd does
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <mbedtls/base64.h>
#include <mbedtls/md.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#define CLIENTS 4096
#define BUFFER 65536 /* bytes per client, and so the longest message */

struct client {
    int joined; /* has been upgraded */
    size_t got;
    uint8_t *in;
};

/* Slot 0 is the listener.  A client's slot moves when another one leaves. */
static struct pollfd polls[CLIENTS];
static struct client clients[CLIENTS];
static nfds_t count = 1;

static void
fail(const char *what)
{
    fprintf(stderr, "error: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void
listen_on(uint16_t port)
{
    struct sockaddr_in a = {.sin_family = AF_INET,
                            .sin_port = htons(port),
                            .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof a;
    int on = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);

    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (fd < 0 || bind(fd, (struct sockaddr *)&a, sizeof a) < 0 ||
        listen(fd, 1024) < 0 ||
        getsockname(fd, (struct sockaddr *)&a, &length) < 0)
        fail("listen");
    polls[0] = (struct pollfd){.fd = fd, .events = POLLIN};
    fprintf(stderr, "info: listening on http://127.0.0.1:%u\ninfo: ready\n",
            ntohs(a.sin_port));
}

static void
join(void)
{
    int on = 1, fd = accept4(polls[0].fd, NULL, NULL, SOCK_NONBLOCK);

    if (fd < 0)
        return;
    if (count == CLIENTS) {
        close(fd);
        return;
    }
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    polls[count] = (struct pollfd){.fd = fd, .events = POLLIN};
    clients[count] = (struct client){.in = malloc(BUFFER)};
    if (!clients[count++].in)
        fail("malloc");
}

static void
leave(nfds_t i)
{
    close(polls[i].fd);
    free(clients[i].in);
    polls[i] = polls[--count];
    clients[i] = clients[count];
}

static int
upgrade(nfds_t i)
{
    static const char guid[] = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
    struct client *c = &clients[i];
    char key[24 + sizeof guid], answer[256];
    uint8_t digest[20], accept[32] = "";
    size_t length;
    uint8_t *end = memmem(c->in, c->got, "\r\n\r\n", 4);
    uint8_t *at = memmem(c->in, c->got, "Sec-WebSocket-Key: ", 19);

    if (!end)
        return 0;
    if (!at || end - at < 19 + 24)
        return -1;
    memcpy(key, at + 19, 24);
    memcpy(key + 24, guid, sizeof guid);
    mbedtls_md(mbedtls_md_info_from_type(MBEDTLS_MD_SHA1), (const uint8_t *)key,
               60, digest);
    mbedtls_base64_encode(accept, sizeof accept, &length, digest, 20);
    length = (size_t)snprintf(
        answer, sizeof answer,
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n\r\n",
        accept);
    if (send(polls[i].fd, answer, length, MSG_NOSIGNAL) < 0)
        return -1;
    c->joined = 1;
    c->got -= (size_t)(end + 4 - c->in);
    memmove(c->in, end + 4, c->got);
    return 0;
}

/* The server's header is four bytes shorter: it is written over the mask. */
static void
relay(nfds_t from, uint8_t *frame, size_t header, size_t length)
{
    uint8_t *payload = frame + header, mask[4], *out = frame + 4;

    memcpy(mask, payload - 4, 4);
    memmove(out, frame, header - 4);
    out[1] &= 127;
    for (size_t i = 0; i < length; i++)
        payload[i] ^= mask[i % 4];
    for (nfds_t to = 1; to < count; to++)
        if (to != from && clients[to].joined)
            send(polls[to].fd, out, header - 4 + length, MSG_NOSIGNAL);
}

static int
frames(nfds_t i)
{
    struct client *c = &clients[i];
    size_t at = 0;

    while (c->got - at >= 8) {
        uint8_t *frame = c->in + at;
        size_t length = frame[1] & 127, header = length == 126 ? 8 : 6;
        if (length == 127)
            return -1;
        if (length == 126)
            length = (size_t)frame[2] << 8 | frame[3];
        if (c->got - at < header + length)
            break;
        if ((frame[0] & 15) == 8)
            return -1;
        relay(i, frame, header, length);
        at += header + length;
    }
    c->got -= at;
    memmove(c->in, c->in + at, c->got);
    return 0;
}

static int
serve(nfds_t i)
{
    struct client *c = &clients[i];
    ssize_t n = recv(polls[i].fd, c->in + c->got, BUFFER - c->got, 0);

    if (n <= 0)
        return n < 0 && errno == EAGAIN ? 0 : -1;
    c->got += (size_t)n;
    if (!c->joined && upgrade(i) < 0)
        return -1;
    return c->joined ? frames(i) : 0;
}

int
main(int argc, char **argv)
{
    struct rlimit limit;

    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    listen_on((uint16_t)(argc > 1 ? atoi(argv[1]) : 0));
    for (;;) {
        if (poll(polls, count, -1) < 0)
            fail("poll");
        for (nfds_t i = count - 1; i > 0; i--)
            if (polls[i].revents && serve(i) < 0)
                leave(i);
        if (polls[0].revents)
            join();
    }
}
