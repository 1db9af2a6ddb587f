/* Chapter Worker: order, waking the turn, the end, a machine without threads.
 * And handshakes, which run there: a peer that is slow or gone, a reload and a
 * deadline while the thread has the connection.
 *
 * SPDX-License-Identifier: MIT
 */
#include "test.h"

#include <dirent.h>

static int others; /* threads that were there before all: a sanitizer's */

static int
count_threads(void)
{
    DIR *d = opendir("/proc/self/task");
    int n = -2 - others; /* . and .. */

    assert_non_null(d);
    while (readdir(d) != NULL)
        n++;
    (void)closedir(d);
    return n;
}

/* ----- a gate that threads wait at ---------------------------------------- */

static pthread_t the_turn;
static pthread_mutex_t gate_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t gate_changed = PTHREAD_COND_INITIALIZER;
static bool gate_shut;
static int gate_waiting;

static void
gate_set(bool shut)
{
    (void)pthread_mutex_lock(&gate_lock);
    gate_shut = shut;
    (void)pthread_cond_broadcast(&gate_changed);
    (void)pthread_mutex_unlock(&gate_lock);
}

static void
gate_pass(void)
{
    (void)pthread_mutex_lock(&gate_lock);
    gate_waiting++;
    (void)pthread_cond_broadcast(&gate_changed);
    while (gate_shut)
        (void)pthread_cond_wait(&gate_changed, &gate_lock);
    gate_waiting--;
    (void)pthread_mutex_unlock(&gate_lock);
}

/* Until so many threads stand there. */
static void
gate_await(int n)
{
    (void)pthread_mutex_lock(&gate_lock);
    while (gate_waiting < n)
        (void)pthread_cond_wait(&gate_changed, &gate_lock);
    (void)pthread_mutex_unlock(&gate_lock);
}

/* ----- jobs ----------------------------------------------------------------- */

#define JOBS 100

struct job {
    struct work work;
    pthread_t by;
    int nth; /* to be run, of its lane */
    bool gate, signals;
};

static struct job jobs[JOBS];
static int ran[WORK_LANES]; /* each touched by its lane only */
static int came_back;

static void
job_run(struct job *j, enum work_lane lane)
{
    sigset_t blocked;

    if (j->gate)
        gate_pass();
    (void)pthread_sigmask(SIG_SETMASK, NULL, &blocked);
    j->signals = sigismember(&blocked, SIGTERM) == 0 ||
                 sigismember(&blocked, SIGUSR1) == 0;
    j->by = pthread_self();
    j->nth = ++ran[lane];
}

static void
run_first(struct work *w)
{
    job_run((struct job *)w, WORK_CRYPTO);
}

static void
run_last(struct work *w)
{
    job_run((struct job *)w, WORK_LANES - 1);
}

static void
job_done(struct collabd *s, struct work *w)
{
    (void)s, (void)w;
    came_back++;
}

static struct workers all;

static int
begin_workers(void **state)
{
    (void)state;
    memset(&all, 0, sizeof all);
    memset(jobs, 0, sizeof jobs);
    memset(ran, 0, sizeof ran);
    all.wake = -1;
    gate_set(false);
    came_back = 0;
    for (int i = 0; i < JOBS; i++)
        jobs[i].work = (struct work){ run_first, job_done, NULL };
    return 0;
}

static int
end_workers(void **state)
{
    (void)state;
    gate_set(false);
    work_stop(&all);
    if (all.wake >= 0)
        (void)close(all.wake);
    assert_int_equal(count_threads(), 1);
    sys.pthread_create = pthread_create;
    return 0;
}

static bool
is_awake(int ms)
{
    struct pollfd p = { .fd = all.wake, .events = POLLIN };

    return poll(&p, 1, ms) == 1;
}

/* Takes back n jobs, waiting as a turn does; in what order is checked. */
static void
take_back(int n)
{
    int last = 0;

    while (n > 0) {
        struct work *w;
        assert_true(is_awake(10000));
        for (w = work_collect(&all); w != NULL; w = w->next) {
            w->done(NULL, w);
            if (w->run == run_first) {
                assert_true(((struct job *)w)->nth > last);
                last = ((struct job *)w)->nth;
            }
            n--;
        }
    }
    assert_int_equal(n, 0);
}

static void
jobs_are_run_in_order_by_a_thread_and_come_back(void **state)
{
    (void)state;
    assert_int_equal(count_threads(), 1);
    for (int i = 0; i < JOBS; i++)
        assert_true(work_post(&all, WORK_CRYPTO, &jobs[i].work));
    assert_int_equal(count_threads(), 2);
    take_back(JOBS);
    assert_int_equal(came_back, JOBS);
    for (int i = 0; i < JOBS; i++) {
        assert_int_equal(jobs[i].nth, i + 1);
        assert_false(pthread_equal(jobs[i].by, the_turn));
        assert_true(pthread_equal(jobs[i].by, jobs[0].by));
    }
}

static void
the_turn_is_woken_when_something_is_done_and_not_before(void **state)
{
    (void)state;
    gate_set(true);
    jobs[0].gate = true;
    assert_true(work_post(&all, WORK_CRYPTO, &jobs[0].work));
    gate_await(1);
    assert_false(is_awake(20));
    assert_null(work_collect(&all));
    gate_set(false);
    take_back(1);
    /* that was all: it sleeps again */
    (void)work_collect(&all);
    assert_false(is_awake(20));
    assert_null(work_collect(&all));
}

static void
a_job_that_came_back_may_be_posted_again(void **state)
{
    (void)state;
    for (int i = 1; i <= 50; i++) {
        assert_true(work_post(&all, WORK_CRYPTO, &jobs[0].work));
        take_back(1);
        assert_int_equal(jobs[0].nth, i);
    }
}

static void
what_is_short_does_not_wait_behind_what_is_long(void **state)
{
    (void)state;
    if (WORK_LANES < 2)
        skip();
    gate_set(true);
    jobs[0].gate = true;
    jobs[0].work.run = run_last;
    assert_true(work_post(&all, WORK_LANES - 1, &jobs[0].work));
    gate_await(1);
    assert_true(work_post(&all, WORK_CRYPTO, &jobs[1].work));
    take_back(1);
    assert_int_equal(jobs[1].nth, 1);
    assert_int_equal(jobs[0].nth, 0);
    assert_int_equal(count_threads(), 1 + 2);
    gate_set(false);
    take_back(1);
    assert_false(pthread_equal(jobs[0].by, jobs[1].by));
}

static void
two_lanes_busy_at_once_lose_nothing(void **state)
{
    (void)state;
    for (int i = 0; i < JOBS; i++) {
        jobs[i].work.run = i % 2 ? run_last : run_first;
        assert_true(work_post(&all, i % 2 ? WORK_LANES - 1 : WORK_CRYPTO,
                              &jobs[i].work));
    }
    take_back(JOBS);
    assert_int_equal(came_back, JOBS);
    for (int i = 0; i < JOBS; i++)
        assert_int_equal(jobs[i].nth, WORK_LANES < 2 ? i + 1 : i / 2 + 1);
}

static void
the_end_waits_for_all_that_was_posted(void **state)
{
    (void)state;
    gate_set(true);
    jobs[0].gate = true;
    for (int i = 0; i < 10; i++)
        assert_true(work_post(&all, WORK_CRYPTO, &jobs[i].work));
    gate_await(1);
    gate_set(false);
    work_stop(&all);
    assert_int_equal(count_threads(), 1);
    assert_int_equal(ran[WORK_CRYPTO], 10);
    take_back(10);
    /* and nothing begins afterwards */
    assert_false(work_post(&all, WORK_CRYPTO, &jobs[10].work));
    assert_false(work_post(&all, WORK_LANES - 1, &jobs[10].work));
    work_stop(&all);
    assert_int_equal(count_threads(), 1);
}

static void
an_end_without_a_beginning_is_fine(void **state)
{
    (void)state;
    work_stop(&all);
    assert_int_equal(all.wake, -1);
    assert_false(work_post(&all, WORK_CRYPTO, &jobs[0].work));
}

static void
signals_are_for_the_turn(void **state)
{
    sigset_t now;

    (void)state;
    assert_true(work_post(&all, WORK_CRYPTO, &jobs[0].work));
    take_back(1);
    assert_false(jobs[0].signals);
    (void)pthread_sigmask(SIG_SETMASK, NULL, &now);
    assert_int_equal(sigismember(&now, SIGTERM), 0);
}

static int creations;

static int
no_thread(pthread_t *id, const pthread_attr_t *attr, void *(*run)(void *),
          void *arg)
{
    (void)id, (void)attr, (void)run, (void)arg;
    creations++;
    return EAGAIN;
}

static void
without_threads_the_caller_is_told_once_and_does_it(void **state)
{
    (void)state;
    creations = 0;
    sys.pthread_create = no_thread;
    (void)test_said("");
    assert_false(work_post(&all, WORK_CRYPTO, &jobs[0].work));
    assert_true(test_said("warning: no thread for what takes long"));
    assert_false(work_post(&all, WORK_CRYPTO, &jobs[0].work));
    assert_false(work_post(&all, WORK_LANES - 1, &jobs[0].work));
    assert_false(test_said("no thread"));
    assert_int_equal(creations, 1);
    assert_null(work_collect(&all));
}

static void
without_descriptors_there_is_no_thread(void **state)
{
    struct rlimit old, none;

    (void)state;
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &old), 0);
    none = old;
    none.rlim_cur = 0;
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &none), 0);
    assert_false(work_post(&all, WORK_CRYPTO, &jobs[0].work));
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &old), 0);
    assert_true(test_said("Too many open files"));
    assert_int_equal(count_threads(), 1);
}

/* ----- handshakes: a server, and clients that use the same library ----------- */

#if COLLABD_TLS

static struct collabd *s;
static char folder[64];
static int64_t skew_ms; /* of the server's clock */

static int
skewed_clock(clockid_t id, struct timespec *t)
{
    int n = clock_gettime(id, t);

    t->tv_sec += id == CLOCK_MONOTONIC ? skew_ms / 1000 : 0;
    return n;
}

/* The thread waits at the gate before it reads. */
static ssize_t
gated_recv(int fd, void *to, size_t len, int flags)
{
    if (!pthread_equal(pthread_self(), the_turn))
        gate_pass();
    return recv(fd, to, len, flags);
}

static struct client {
    int fd;
    bool done;
    mbedtls_ssl_context ssl;
    mbedtls_ssl_config conf;
} clients[12];

static int
client_send(void *c, const unsigned char *from, size_t len)
{
    ssize_t n = send(((struct client *)c)->fd, from, len,
                     MSG_NOSIGNAL | MSG_DONTWAIT);
    return n < 0 ? MBEDTLS_ERR_SSL_WANT_WRITE : (int)n;
}

static int
client_recv(void *c, unsigned char *to, size_t len)
{
    ssize_t n = recv(((struct client *)c)->fd, to, len, MSG_DONTWAIT);
    return n < 0 ? MBEDTLS_ERR_SSL_WANT_READ : (int)n;
}

static int
dial(int listener)
{
    struct sockaddr_in at = {
        .sin_family = AF_INET,
        .sin_port = htons((uint16_t)collabd_port(s, listener)),
        .sin_addr = { htonl(INADDR_LOOPBACK) }
    };
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

    assert_int_equal(connect(fd, (struct sockaddr *)&at, sizeof at), 0);
    return fd;
}

static struct client *
client_begin(int i)
{
    struct client *c = &clients[i];

    *c = (struct client){ .fd = dial(1) };
    mbedtls_ssl_init(&c->ssl);
    mbedtls_ssl_config_init(&c->conf);
    assert_int_equal(mbedtls_ssl_config_defaults(
        &c->conf, MBEDTLS_SSL_IS_CLIENT, MBEDTLS_SSL_TRANSPORT_STREAM,
        MBEDTLS_SSL_PRESET_DEFAULT), 0);
    mbedtls_ssl_conf_authmode(&c->conf, MBEDTLS_SSL_VERIFY_NONE);
    mbedtls_ssl_conf_rng(&c->conf, tls_random, NULL);
    assert_int_equal(mbedtls_ssl_setup(&c->ssl, &c->conf), 0);
    mbedtls_ssl_set_bio(&c->ssl, c, client_send, client_recv, NULL);
    return c;
}

static void
client_leave(struct client *c)
{
    if (c->fd < 0)
        return;
    (void)close(c->fd);
    c->fd = -1;
    mbedtls_ssl_free(&c->ssl);
    mbedtls_ssl_config_free(&c->conf);
}

/* Goes on with its handshake.  False: the server has ended it. */
static bool
client_shake(struct client *c)
{
    int n = c->done ? 0 : mbedtls_ssl_handshake(&c->ssl);

    c->done = n == 0;
    return n == 0 || n == MBEDTLS_ERR_SSL_WANT_READ;
}

static void
turn(int ms)
{
    (void)collabd_step(s, ms);
    collabd_check(s);
}

static void
turns(int n)
{
    while (n-- > 0)
        turn(1);
}

/* Turns until the first n clients have shaken hands. */
static void
all_shake(int n)
{
    int left = n;

    for (int i = 0; left > 0 && i < 5000; i++) {
        turn(1);
        left = 0;
        for (int k = 0; k < n; k++) {
            assert_true(client_shake(&clients[k]));
            left += !clients[k].done;
        }
    }
    assert_int_equal(left, 0);
    for (int i = 0; i < 1000 && s->handshakes > 0; i++)
        turn(1);
    assert_int_equal(s->handshakes, 0);
}

/* The first client's hello is there, and the thread has it. */
static struct client *
one_in_mid_step(void)
{
    struct client *c = client_begin(0);

    gate_set(true);
    assert_true(client_shake(c));
    for (int i = 0; i < 5000 && s->handshakes == 0; i++)
        turn(1);
    gate_await(1);
    return c;
}

static void
plain_is_well(void)
{
    static const char ask[] = "GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
                              "Connection: close\r\n\r\n";
    char got[500];
    ssize_t n = -1;
    int fd = dial(0);

    assert_int_equal(send(fd, ask, sizeof ask - 1, 0), sizeof ask - 1);
    for (int i = 0; i < 5000 && n <= 0; i++) {
        turn(1);
        n = recv(fd, got, sizeof got, MSG_DONTWAIT);
    }
    (void)close(fd);
    turns(3);
    assert_true(n > 12);
    assert_memory_equal(got, "HTTP/1.1 200", 12);
}

static int
begin_server(void **state)
{
    static char words[4][100];
    static char *argv[] = {
        "collabd", "--listen", "127.0.0.1:0", "--tls-listen", "127.0.0.1:0",
        "--tls-cert", words[0], "--tls-key", words[1], "--max-tls", "12",
        "--max-handshakes", "3", "--log-level", "debug", NULL
    };

    (void)state;
    (void)snprintf(words[0], sizeof words[0], "%s/cert.pem", folder);
    (void)snprintf(words[1], sizeof words[1], "%s/key.pem", folder);
    for (size_t i = 0; i < sizeof clients / sizeof *clients; i++)
        clients[i].fd = -1;
    skew_ms = 0;
    sys.clock_gettime = skewed_clock;
    sys.recv = gated_recv;
    gate_set(false);
    s = collabd_init(sizeof argv / sizeof *argv - 1, argv);
    return s == NULL;
}

static int
end_server(void **state)
{
    (void)state;
    gate_set(false);
    for (size_t i = 0; i < sizeof clients / sizeof *clients; i++)
        client_leave(&clients[i]);
    collabd_free(s);
    sys.recv = recv;
    sys.clock_gettime = clock_gettime;
    sys.pthread_create = pthread_create;
    assert_int_equal(count_threads(), 1);
    return 0;
}

static void
without_handshakes_there_is_no_thread(void **state)
{
    (void)state;
    plain_is_well();
    assert_int_equal(count_threads(), 1);
}

static void
handshakes_in_a_crowd_all_succeed(void **state)
{
    (void)state;
    for (int i = 0; i < 12; i++)
        (void)client_begin(i);
    all_shake(12);
    assert_int_equal(s->count.tls_handshakes, 12);
    assert_int_equal(count_threads(), TLS_HAS_THREAD ? 2 : 1);
}

static void
without_a_thread_handshakes_succeed_all_the_same(void **state)
{
    (void)state;
    sys.pthread_create = no_thread;
    for (int i = 0; i < 12; i++)
        (void)client_begin(i);
    all_shake(12);
    assert_int_equal(s->count.tls_handshakes, 12);
    assert_int_equal(count_threads(), 1);
}

static void
a_slow_step_holds_up_nobody(void **state)
{
    (void)state;
    if (!TLS_HAS_THREAD)
        skip();
    (void)one_in_mid_step();
    plain_is_well();
    for (int i = 1; i < 6; i++) {
        (void)client_begin(i);
        assert_true(client_shake(&clients[i]));
    }
    plain_is_well();
    assert_int_equal(s->handshakes, 3); /* --max-handshakes */
    gate_set(false);
    all_shake(6);
}

static void
a_deadline_waits_for_the_step(void **state)
{
    struct client *c;

    (void)state;
    if (!TLS_HAS_THREAD)
        skip();
    c = one_in_mid_step();
    skew_ms = 11000; /* --request-timeout is 10 s */
    turns(3);
    assert_int_equal(s->count.closes[CLOSE_TIMEOUT], 1);
    assert_int_equal(s->conns_used, 1);
    assert_int_equal(s->tls_used, 1);
    plain_is_well();
    gate_set(false);
    for (int i = 0; i < 5000 && s->conns_used > 0; i++)
        turn(1);
    assert_int_equal(s->conns_used, 0);
    assert_int_equal(s->tls_used, 0);
    assert_int_equal(s->handshakes, 0);
    for (int i = 0; i < 100 && client_shake(c); i++)
        turn(1);
    assert_false(client_shake(c));
    client_leave(c);
    (void)client_begin(0);
    all_shake(1);
}

static void
a_peer_may_leave_in_the_middle_of_a_step(void **state)
{
    struct linger at_once = { 1, 0 };
    struct client *c;
    uint64_t turns_before;

    (void)state;
    if (!TLS_HAS_THREAD)
        skip();
    c = one_in_mid_step();
    (void)setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    client_leave(c);
    /* the dead socket does not make the loop spin */
    turns_before = s->count.turns;
    turn(50);
    turn(50);
    assert_int_equal(s->count.turns, turns_before + 2);
    assert_int_equal(s->conns_used, 1);
    gate_set(false);
    for (int i = 0; i < 5000 && s->conns_used > 0; i++)
        turn(1);
    assert_int_equal(s->conns_used, 0);
    assert_int_equal(s->count.closes[CLOSE_TLS], 1);
    assert_int_equal(s->handshakes, 0);
}

static void
reloads_leave_the_certificate_in_use_alone(void **state)
{
    (void)state;
    if (!TLS_HAS_THREAD)
        skip();
    (void)one_in_mid_step();
    for (int i = 0; i < 10; i++) {
        assert_int_equal(collabd_reload(s), 0);
        turn(0);
    }
    assert_int_equal(s->tls_configs[s->tls[0].config].refs, 1);
    assert_true(s->tls[0].config != s->tls_current);
    gate_set(false);
    all_shake(1);
    client_leave(&clients[0]);
    for (int i = 0; i < 5000 && s->conns_used > 0; i++)
        turn(1);
    assert_int_equal(s->tls_configs[s->tls[0].config].refs, 0);
    (void)client_begin(0);
    all_shake(1);
}

static void *
open_soon(void *unused)
{
    (void)usleep(50000);
    gate_set(false);
    return unused;
}

static void
a_drain_waits_for_the_step_but_not_for_ever(void **state)
{
    (void)state;
    if (!TLS_HAS_THREAD)
        skip();
    (void)one_in_mid_step();
    collabd_stop(s);
    assert_int_equal(collabd_step(s, 1), 0);
    skew_ms = 3000;
    assert_int_equal(collabd_step(s, 1), 1);
}

static void
free_waits_for_the_step(void **state)
{
    pthread_t opener;

    (void)state;
    if (!TLS_HAS_THREAD)
        skip();
    (void)one_in_mid_step();
    for (int i = 1; i < 6; i++) {
        (void)client_begin(i);
        assert_true(client_shake(&clients[i]));
    }
    turns(3);
    assert_int_equal(pthread_create(&opener, NULL, open_soon, NULL), 0);
    collabd_free(s);
    s = NULL;
    (void)pthread_join(opener, NULL);
}

static int
begin_certificate(void **state)
{
    (void)test_group_listen_in(state);
    (void)snprintf(folder, sizeof folder, "/tmp/collabd-worker-XXXXXX");
    return mkdtemp(folder) == NULL || cert_make(folder) != 0;
}

static int
end_certificate(void **state)
{
    static const char *const names[] = { "ca-key.pem", "ca.pem", "ca.crt",
                                         "cert.pem", "key.pem" };
    char path[100];

    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        (void)snprintf(path, sizeof path, "%s/%s", folder, names[i]);
        (void)unlink(path);
    }
    (void)rmdir(folder);
    return test_group_listen_no_more(state);
}

#define with_server(f) cmocka_unit_test_setup_teardown(f, begin_server, end_server)

#endif

static void *
do_nothing(void *unused)
{
    return unused;
}

#define with_workers(f)                                                      \
    cmocka_unit_test_setup_teardown(f, begin_workers, end_workers)

int
main(void)
{
    const struct CMUnitTest workers[] = {
        with_workers(jobs_are_run_in_order_by_a_thread_and_come_back),
        with_workers(the_turn_is_woken_when_something_is_done_and_not_before),
        with_workers(a_job_that_came_back_may_be_posted_again),
        with_workers(what_is_short_does_not_wait_behind_what_is_long),
        with_workers(two_lanes_busy_at_once_lose_nothing),
        with_workers(the_end_waits_for_all_that_was_posted),
        with_workers(an_end_without_a_beginning_is_fine),
        with_workers(signals_are_for_the_turn),
        with_workers(without_threads_the_caller_is_told_once_and_does_it),
        with_workers(without_descriptors_there_is_no_thread),
    };
    pthread_t first;
    int failed;

    the_turn = pthread_self();
    /* a sanitizer's begins with the first of ours */
    if (pthread_create(&first, NULL, do_nothing, NULL) != 0)
        return 1;
    (void)pthread_join(first, NULL);
    others = count_threads() - 1;
    failed = cmocka_run_group_tests(workers, test_group_listen_in,
                                    test_group_listen_no_more);
#if COLLABD_TLS
    const struct CMUnitTest handshakes[] = {
        with_server(without_handshakes_there_is_no_thread),
        with_server(handshakes_in_a_crowd_all_succeed),
        with_server(without_a_thread_handshakes_succeed_all_the_same),
        with_server(a_slow_step_holds_up_nobody),
        with_server(a_deadline_waits_for_the_step),
        with_server(a_peer_may_leave_in_the_middle_of_a_step),
        with_server(reloads_leave_the_certificate_in_use_alone),
        with_server(a_drain_waits_for_the_step_but_not_for_ever),
        with_server(free_waits_for_the_step),
    };
    failed += cmocka_run_group_tests(handshakes, begin_certificate,
                                     end_certificate);
#endif
    return failed;
}
