/* Calls of libc that sockets.c answers in place of libc: this program's own of these names are its.
 */
#include "daemon/sockets.h"

#include "base/clock.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define LEAST (16 << 10) /* bytes of the shortest turn, and of the longest */
#define MOST (1 << 20)
#define BUFFER 8192
#define DESCRIPTORS 64 /* of which three quarters are for who connects */

/* A connection whose other end never stops sending: bytes count up. */
typedef struct source {
    int fd, from, set;
    uint8_t sent, read;
} source_t;

static source_t
source_open(uint32_t events)
{
    source_t s = {.set = epoll_create1(0)};
    int fds[2];

    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, fds), 0);
    s.fd                     = fds[0];
    s.from                   = fds[1];
    struct epoll_event event = {.events = events, .data.u64 = UINT64_C(0x123456789abcdef0)};
    assert_int_equal(epoll_ctl(s.set, EPOLL_CTL_ADD, s.fd, &event), 0);
    return s;
}

static void
source_close(source_t *s)
{
    close(s->fd);
    close(s->from);
    close(s->set);
}

/* Bytes that count up, from any value on: made once, for a turn counts the time that it takes. */
static const uint8_t *
bytes_from(uint8_t first)
{
    static uint8_t bytes[256 + BUFFER];

    for (size_t i = 0; bytes[1] == 0 && i < sizeof(bytes); i++) {
        bytes[sizeof(bytes) - 1 - i] = (uint8_t)(sizeof(bytes) - 1 - i);
    }
    return bytes + first;
}

static void
source_fill(source_t *s)
{
    ssize_t n;

    do {
        n = send(s->from, bytes_from(s->sent), BUFFER, 0);
        s->sent += n > 0 ? (uint8_t)n : 0;
    } while (n > 0);
}

static ssize_t
source_read(source_t *s, int flags)
{
    uint8_t bytes[4][BUFFER];
    struct iovec pieces[4];
    for (int i = 0; i < 4; i++) {
        pieces[i] = (struct iovec){bytes[i], BUFFER};
    }
    struct msghdr message = {.msg_iov = pieces, .msg_iovlen = 4};

    ssize_t n = recvmsg(s->fd, &message, flags);
    assert_int_equal(message.msg_iovlen, 4);
    for (ssize_t at = 0, piece; at < n && flags == 0; at += piece, s->read += (uint8_t)piece) {
        piece = n - at < BUFFER ? n - at : BUFFER;
        assert_memory_equal(bytes[at / BUFFER], bytes_from(s->read), piece);
    }
    return n;
}

/* As C core does: until there is nothing more. @return the bytes */
static uint64_t
source_turn(source_t *s, uint32_t pause_us, uint64_t most)
{
    uint64_t total = 0;

    for (;;) {
        source_fill(s);
        ssize_t n = source_read(s, 0);
        if (n < 0) {
            assert_int_equal(errno, EAGAIN);
            return total;
        }
        total += (uint64_t)n;
        if (total > most) {
            return total;
        }
        nanosleep(&(struct timespec){.tv_nsec = pause_us * 1000L}, NULL);
    }
}

/* Events that the set has now; each must be the connection's. */
static int
reported(source_t *s)
{
    struct epoll_event event = {0};
    int n                    = epoll_wait(s->set, &event, 1, 0);

    if (n == 1) {
        assert_true(event.events & EPOLLIN);
        assert_true(event.data.u64 == UINT64_C(0x123456789abcdef0));
    }
    return n;
}

static void
test_a_turn_ends_and_is_reported_again(void **state)
{
    source_t s = source_open(EPOLLIN | EPOLLOUT | EPOLLET);

    (void)state;
    for (int i = 0; i < 50; i++) {
        source_fill(&s);
        assert_int_equal(reported(&s), 1);
        assert_int_equal(reported(&s), 0); /* once for each change */
        uint64_t total = source_turn(&s, 0, 4 * MOST);
        assert_in_range(total, LEAST, MOST + 4 * BUFFER);
        /* What was read before may be looked at between: then it is the second that ends it. */
        assert_int_equal(source_read(&s, 0), -1);
        assert_int_equal(errno, EAGAIN);
    }
    source_close(&s);
}

static void
test_the_second_refusal_is_the_last(void **state)
{
    source_t s = source_open(EPOLLIN | EPOLLET);

    (void)state;
    source_turn(&s, 0, 4 * MOST);
    assert_int_equal(reported(&s), 1);
    assert_int_equal(source_read(&s, 0), -1);
    assert_int_equal(reported(&s), 1); /* nobody is left waiting, whichever was believed */
    assert_true(source_read(&s, 0) > 0);
    source_close(&s);
}

static void
test_a_turn_is_as_long_as_it_takes(void **state)
{
    source_t s       = source_open(EPOLLIN | EPOLLET);
    uint64_t longest = 0, slow = 0;

    (void)state;
    for (int i = 0; i < 40; i++) {
        uint64_t total = source_turn(&s, 0, 4 * MOST);
        source_read(&s, 0);
        longest = total > longest ? total : longest;
    }
    for (int i = 0; i < 4; i++) {
        slow = source_turn(&s, 1000, 4 * MOST);
        source_read(&s, 0);
    }
    assert_true(longest >= 2 * LEAST);
    assert_in_range(slow, LEAST, LEAST + 4 * BUFFER);
    source_close(&s);
}

static void
test_what_is_read_whole_is_not_held_up(void **state)
{
    source_t s = source_open(EPOLLIN | EPOLLET);

    (void)state;
    for (int i = 0; i < 500; i++) { /* far more than a turn in all */
        source_fill(&s);
        while (source_read(&s, 0) > 0) {
        }
        while (source_read(&s, 0) > 0 || reported(&s) == 1) { /* nothing is left behind */
        }
        assert_int_equal(s.sent, s.read);
    }
    source_close(&s);
}

static void
test_who_asks_for_states_has_no_turns(void **state)
{
    source_t s = source_open(EPOLLIN);

    (void)state;
    assert_true(source_turn(&s, 0, 4 * MOST) > 4 * MOST);
    source_close(&s);

    s = source_open(EPOLLIN | EPOLLET);
    assert_int_equal(epoll_ctl(s.set, EPOLL_CTL_DEL, s.fd, NULL), 0);
    assert_true(source_turn(&s, 0, 4 * MOST) > 4 * MOST);
    source_close(&s);
}

static void
test_other_ways_to_read_are_libcs(void **state)
{
    source_t s = source_open(EPOLLIN | EPOLLET);

    (void)state;
    source_fill(&s);
    for (int i = 0; i < 2 * MOST / (4 * BUFFER); i++) {
        assert_int_equal(source_read(&s, MSG_PEEK), 4 * BUFFER);
    }
    assert_int_equal(recvmsg(-1, &(struct msghdr){0}, 0), -1);
    assert_int_equal(errno, EBADF);
    assert_int_equal(epoll_ctl(s.set, EPOLL_CTL_ADD, s.fd, &(struct epoll_event){0}), -1);
    assert_int_equal(errno, EEXIST);
    source_close(&s);
}

static void
test_the_last_descriptors_are_ours(void **state)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t size             = sizeof(address);
    int listener               = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    int fds[DESCRIPTORS], n = 0, out[8];

    (void)state;
    assert_int_equal(bind(listener, (struct sockaddr *)&address, size), 0);
    assert_int_equal(listen(listener, DESCRIPTORS), 0);
    assert_int_equal(getsockname(listener, (struct sockaddr *)&address, &size), 0);
    for (bool full = false; !full;) {
        for (int i = 0; i < 8; i++) {
            out[i] = socket(AF_INET, SOCK_STREAM, 0);
            assert_int_equal(connect(out[i], (struct sockaddr *)&address, size), 0);
        }
        for (int fd; (fd = accept4(listener, NULL, NULL, 0)) >= 0; n++) {
            assert_true(fd < DESCRIPTORS * 3 / 4);
            fds[n] = fd;
        }
        assert_int_equal(errno, EAGAIN); /* also where there are no more descriptors */
        for (int i = 0; i < 8; i++) {
            char byte;
            full = full || recv(out[i], &byte, 1, MSG_DONTWAIT) == 0; /* turned away */
            close(out[i]);
        }
    }
    assert_in_range(n, DESCRIPTORS / 4, DESCRIPTORS * 3 / 4);
    while (n > 0) {
        close(fds[--n]);
    }
    close(listener);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_turn_ends_and_is_reported_again),
        cmocka_unit_test(test_the_second_refusal_is_the_last),
        cmocka_unit_test(test_a_turn_is_as_long_as_it_takes),
        cmocka_unit_test(test_what_is_read_whole_is_not_held_up),
        cmocka_unit_test(test_who_asks_for_states_has_no_turns),
        cmocka_unit_test(test_other_ways_to_read_are_libcs),
        cmocka_unit_test(test_the_last_descriptors_are_ours),
    };

    struct rlimit few = {DESCRIPTORS, DESCRIPTORS};
    if (setrlimit(RLIMIT_NOFILE, &few) != 0 || sockets_start() != ATTN_OK) {
        return 1;
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
