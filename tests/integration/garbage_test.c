/* Bytes that are no gRPC, connections that say nothing: the daemons live, and serve the others. */
#include "tests/integration/cluster.h"
#include "tests/integration/model.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <cmocka.h>

#define HALF_OPEN 50u

static int
connect_to(const char *address)
{
    struct sockaddr_in to = {.sin_family = AF_INET};
    const char *colon     = strrchr(address, ':');
    int fd                = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

    assert_non_null(colon);
    to.sin_port        = htons((uint16_t)atoi(colon + 1));
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    assert_true(fd >= 0);
    assert_int_equal(connect(fd, (struct sockaddr *)&to, sizeof(to)), 0);
    return fd;
}

/* Send, and let the peer answer or hang up. */
static void
say(const char *address, const void *bytes, size_t n)
{
    struct timeval patience = {.tv_usec = 20000};
    char answer[4096];
    int fd = connect_to(address);

    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
    if (send(fd, bytes, n, MSG_NOSIGNAL) == (ssize_t)n) {
        while (recv(fd, answer, sizeof(answer), 0) > 0) {
        }
    }
    close(fd);
}

static size_t
put_frame(uint8_t *at, uint32_t size, uint8_t type, uint8_t flags, uint32_t stream)
{
    const uint8_t head[9] = {(uint8_t)(size >> 16),
                             (uint8_t)(size >> 8),
                             (uint8_t)size,
                             type,
                             flags,
                             (uint8_t)(stream >> 24),
                             (uint8_t)(stream >> 16),
                             (uint8_t)(stream >> 8),
                             (uint8_t)stream};

    memcpy(at, head, sizeof(head));
    return sizeof(head);
}

/* Random bytes, plain HTTP, and HTTP/2 that begins well and then lies. */
static void
throw_garbage(const char *address, model_t *random)
{
    static const char preface[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    static const char http[]    = "GET / HTTP/1.1\r\nHost: attnd\r\n\r\n";
    uint8_t bytes[4096];

    say(address, http, sizeof(http) - 1);
    for (uint32_t round = 0; round < 8; round++) {
        size_t n = 1 + model_random(random, sizeof(bytes));
        for (size_t i = 0; i < n; i++) {
            bytes[i] = (uint8_t)model_random(random, 256);
        }
        say(address, bytes, n);

        /* Preface, settings, then a frame of any type that says more, or less, than it has. */
        memcpy(bytes, preface, sizeof(preface) - 1);
        size_t at = sizeof(preface) - 1;
        at += put_frame(bytes + at, 0, 4, 0, 0);
        at += put_frame(bytes + at, (uint32_t)model_random(random, 1u << 24),
                        (uint8_t)model_random(random, 12), (uint8_t)model_random(random, 256),
                        (uint32_t)model_random(random, 8));
        say(address, bytes, at + model_random(random, sizeof(bytes) - at));
    }
}

static void
test_garbage_on_the_ports(void **state)
{
    test_cluster_t cluster;
    attn_geometry_t geometry;
    attn_cache_t *cache;
    model_t model;
    int half_open[2][HALF_OPEN];

    (void)state;
    cluster_up(&cluster, &(cluster_options_t){.workers = 2});
    const char *addresses[] = {cluster.coordinator.address, cluster.workers[0].address,
                               cluster.workers[1].address};
    attn_client_t *client   = open_client(cluster.coordinator.address, 3000);
    model_geometry(&geometry);
    OK(attn_cache_open(client, "garbage", &geometry, &cache));
    model_init(&model, cache, 3);
    model_create(&model, 0);
    OK(model_append(&model, 0, 300));

    for (uint32_t i = 0; i < HALF_OPEN; i++) { /* connected, silent, until the end */
        half_open[0][i] = connect_to(addresses[0]);
        half_open[1][i] = connect_to(addresses[1]);
    }
    for (uint32_t round = 0; round < 3; round++) {
        throw_garbage(addresses[round], &model);
        OK(model_append(&model, 0, 1));
    }
    attn_client_t *newcomer = open_client(cluster.coordinator.address, 3000);
    attn_client_close(newcomer);
    model_story(&model, 5);
    for (uint32_t i = 0; i < HALF_OPEN; i++) {
        close(half_open[0][i]);
        close(half_open[1][i]);
    }
    model_story(&model, 5);
    model_free(&model);
    attn_cache_close(cache);
    attn_client_close(client);
    cluster_down(&cluster);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_garbage_on_the_ports),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
