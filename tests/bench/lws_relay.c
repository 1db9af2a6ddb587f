/* lws_relay.c - the relay of `make bench` on libwebsockets.
 *
 * SPDX-License-Identifier: MIT
 *
 * Written as its documentation says: one lws_ring for all, a tail for each
 * member, and one message for each LWS_CALLBACK_SERVER_WRITEABLE.  To know what
 * may be freed the ring walks all tails at each step of one, which shows with a
 * thousand members.  Any path is the one room.  No extensions, so no
 * compression.
 *
 *   lws_relay [PORT]  0, the default, picks one; says it as collabd does
 */
#define _GNU_SOURCE
#include <libwebsockets.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#define RING_MESSAGES 1024
#define RECEIVE_BYTES 65536 /* longer messages come in pieces */

struct message {
    unsigned char *memory; /* LWS_PRE bytes, then the payload */
    size_t length;
    struct lws *sender;
    enum lws_write_protocol kind;
};

struct member {
    struct member *next;
    struct lws *wsi;
    uint32_t tail;
};

static struct lws_ring *ring;
static struct member *members;

static void
message_free(void *message)
{
    free(((struct message *)message)->memory);
}

static void
publish(struct lws *wsi, const void *in, size_t length)
{
    struct message m = {.memory = malloc(LWS_PRE + length),
                        .length = length,
                        .sender = wsi,
                        .kind = lws_frame_is_binary(wsi) ? LWS_WRITE_BINARY
                                                         : LWS_WRITE_TEXT};

    if (!m.memory)
        return;
    memcpy(m.memory + LWS_PRE, in, length);
    if (lws_ring_insert(ring, &m, 1) != 1) {
        message_free(&m); /* somebody is too slow: all miss it */
        return;
    }
    for (struct member *at = members; at; at = at->next)
        lws_callback_on_writable(at->wsi);
}

/* Sends the next message that is not the member's own. */
static int
deliver(struct member *member)
{
    const struct message *m = lws_ring_get_element(ring, &member->tail);
    int sent = 0;

    while (m && !sent) {
        if (m->sender != member->wsi) {
            if (lws_write(member->wsi, m->memory + LWS_PRE, m->length,
                          m->kind) < (int)m->length)
                return -1;
            sent = 1;
        }
        lws_ring_consume_and_update_oldest_tail(
            ring, struct member, &member->tail, 1, members, tail, next);
        m = lws_ring_get_element(ring, &member->tail);
    }
    if (m)
        lws_callback_on_writable(member->wsi);
    return 0;
}

static int
on_event(struct lws *wsi, enum lws_callback_reasons reason, void *user,
         void *in, size_t length)
{
    struct member *member = user;

    switch ((int)reason) {
    case LWS_CALLBACK_ESTABLISHED:
        member->wsi = wsi;
        member->tail = lws_ring_get_oldest_tail(ring);
        if (!members)
            lws_ring_update_oldest_tail(ring, member->tail);
        lws_ll_fwd_insert(member, next, members);
        break;
    case LWS_CALLBACK_CLOSED:
        lws_ll_fwd_remove(struct member, next, member, members);
        break;
    case LWS_CALLBACK_RECEIVE:
        publish(wsi, in, length);
        break;
    case LWS_CALLBACK_SERVER_WRITEABLE:
        return deliver(member);
    }
    return 0;
}

int
main(int argc, char **argv)
{
    static const struct lws_protocols protocols[] = {
        {.name = "relay",
         .callback = on_event,
         .per_session_data_size = sizeof(struct member),
         .rx_buffer_size = RECEIVE_BYTES},
        {.name = NULL},
    };
    struct lws_context_creation_info info = {
        .port = argc > 1 ? atoi(argv[1]) : 0,
        .iface = "127.0.0.1",
        .protocols = protocols,
    };
    struct rlimit limit;
    struct lws_context *context;

    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max < 8192 ? limit.rlim_max : 8192;
    setrlimit(RLIMIT_NOFILE, &limit);
    lws_set_log_level(LLL_ERR, NULL);
    ring = lws_ring_create(sizeof(struct message), RING_MESSAGES, message_free);
    context = lws_create_context(&info);
    if (!ring || !context) {
        fprintf(stderr, "error: libwebsockets did not start\n");
        return 1;
    }
    fprintf(
        stderr, "info: listening on http://127.0.0.1:%d\ninfo: ready\n",
        lws_get_vhost_listen_port(lws_get_vhost_by_name(context, "default")));
    while (lws_service(context, 0) >= 0)
        continue;
    return 0;
}
