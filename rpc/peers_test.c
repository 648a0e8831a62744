/* Calls by connection, against an array that is too simple to be wrong. */
#include "rpc/rpc_int.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>

#define NAMES 500

static void
test_each_connection_for_itself(void **state)
{
    rpc_peers_t *peers = NULL;
    char name[]        = "ipv4:127.0.0.1:1";

    (void)state;
    assert_int_equal(rpc_peers_count(peers), 0);
    assert_int_equal(rpc_peers_began(&peers, name), 1);
    assert_int_equal(rpc_peers_began(&peers, name), 2);
    name[sizeof(name) - 2] = '2'; /* the name was copied */
    assert_int_equal(rpc_peers_began(&peers, name), 1);
    assert_int_equal(rpc_peers_began(&peers, "ipv4:127.0.0.1:11"), 1);
    assert_int_equal(rpc_peers_began(&peers, "ipv4:127.0.0.1:1"), 3);
    assert_int_equal(rpc_peers_began(&peers, ""), 1);
    assert_int_equal(rpc_peers_count(peers), 4);

    rpc_peers_ended(&peers, "ipv4:127.0.0.1:3"); /* nobody */
    rpc_peers_ended(&peers, name);
    assert_int_equal(rpc_peers_count(peers), 3);
    for (int i = 0; i < 3; i++) {
        rpc_peers_ended(&peers, "ipv4:127.0.0.1:1");
    }
    rpc_peers_ended(&peers, "ipv4:127.0.0.1:11");
    rpc_peers_ended(&peers, "");
    assert_int_equal(rpc_peers_count(peers), 0);
    assert_null(peers);
    assert_int_equal(rpc_peers_began(&peers, name), 1); /* from the beginning */
    rpc_peers_ended(&peers, name);
}

static void
test_as_many_as_there_are(void **state)
{
    rpc_peers_t *peers    = NULL;
    uint32_t calls[NAMES] = {0}, open = 0;
    uint64_t random = 1;

    (void)state;
    for (int i = 0; i < 100000; i++) {
        char name[32];
        random     = random * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
        uint32_t n = (uint32_t)(random >> 33) % NAMES;
        snprintf(name, sizeof(name), "ipv6:[::1]:%u", n);
        if ((random >> 20) % 2 == 0) {
            open += calls[n] == 0;
            assert_int_equal(rpc_peers_began(&peers, name), ++calls[n]);
        } else {
            open -= calls[n] == 1;
            calls[n] -= calls[n] > 0;
            rpc_peers_ended(&peers, name);
        }
        assert_int_equal(rpc_peers_count(peers), open);
    }
    for (uint32_t n = 0; n < NAMES; n++) {
        char name[32];
        snprintf(name, sizeof(name), "ipv6:[::1]:%u", n);
        for (; calls[n] > 0; calls[n]--) {
            rpc_peers_ended(&peers, name);
        }
    }
    assert_null(peers);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_each_connection_for_itself),
        cmocka_unit_test(test_as_many_as_there_are),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
