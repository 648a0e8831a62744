/* Who gets in: TLS and mTLS between real processes, certificates that are renewed, and the rule
 * that a daemon without certificates stays on loopback. */
#include "tests/integration/cluster.h"
#include "tests/integration/model.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#define ACTS 25u
#define SEED 3u
#define EVENT_MS 20000u

static char folder[128];

/* Make, or renew, the certificates. */
static void
make_certs(void)
{
    char command[512];

    snprintf(command, sizeof(command), "%s %s", MAKE_TEST_CERTS, folder);
    assert_int_equal(system(command), 0);
}

static void
write_file(const char *name, const char *text)
{
    char path[256];

    snprintf(path, sizeof(path), "%s/%s", folder, name);
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    fputs(text, file);
    fclose(file);
}

/* What a client's environment says: NULL unsets. */
static void
say(const char *variable, const char *file)
{
    char path[256];

    snprintf(path, sizeof(path), "%s/%s", folder, file != NULL ? file : "");
    if (file != NULL) {
        setenv(variable, path, 1);
    } else {
        unsetenv(variable);
    }
}

static void
say_all(const char *ca, const char *cert, const char *key)
{
    say("ATTN_TLS_CA", ca);
    say("ATTN_TLS_CERT", cert);
    say("ATTN_TLS_KEY", key);
}

static int
setup(void **state)
{
    const char *tmp = getenv("TMPDIR");

    (void)state;
    snprintf(folder, sizeof(folder), "%s/attn-security-XXXXXX", tmp != NULL ? tmp : "/tmp");
    assert_non_null(mkdtemp(folder));
    make_certs();
    return 0;
}

static int
teardown(void **state)
{
    char command[256];

    (void)state;
    snprintf(command, sizeof(command), "rm -rf %s", folder);
    return system(command);
}

static uint64_t
tell(const char *target)
{
    attn_client_t *client = open_client(target, 10000);
    attn_geometry_t geometry;
    attn_cache_t *cache;
    model_t model;

    model_geometry(&geometry);
    geometry.region_bytes = 24 << 20;
    OK(attn_cache_open(client, "story", &geometry, &cache));
    model_init(&model, cache, SEED);
    model_story(&model, ACTS);
    model_free(&model);
    attn_cache_close(cache);
    attn_client_close(client);
    return model.digest;
}

/* Run a program to its end; returns its exit code. says: words of its output. */
static int
run(const char *const *argv, const char *says)
{
    process_t process;

    process_start(&process, argv);
    int code = process_wait(&process, EVENT_MS);
    assert_true(process_logged(&process, says));
    remove(process.log);
    return code;
}

/* ---- a cluster with mTLS ---- */

static void
expect_no_entrance(const char *address, const char *says)
{
    attn_client_t *client = NULL;
    uint64_t start        = now_ms();

    assert_int_equal(attn_client_open(address, NULL, &client), ATTN_ERR_UNAVAILABLE);
    assert_null(client);
    assert_true(now_ms() - start < 8000); /* of the 10 s that it has */
    if (strstr(attn_last_error(), says) == NULL) {
        fail_msg("\"%s\" does not say \"%s\"", attn_last_error(), says);
    }
}

static void
test_a_cluster_with_tls(void **state)
{
    test_cluster_t cluster;

    (void)state;
    say_all(NULL, NULL, NULL);
    uint64_t digest = tell("inproc://cpu?workers=1&threads=1&slab=32MiB");
    cluster_up(&cluster, &(cluster_options_t){.workers = 2, .lost_ms = "5000", .certs = folder});
    const char *address = cluster.coordinator.address;

    expect_no_entrance(address, "speak TLS?");
    say_all("ca.pem", NULL, NULL);
    expect_no_entrance(address, "certificate from us");
    say_all("ca.pem", "client.pem", "client.key");
    assert_true(tell(address) == digest);

    /* attnctl takes the environment, and flags. */
    const char *const status[] = {ATTNCTL_PATH, "--target", address, "status", NULL};
    assert_int_equal(run(status, cluster.workers[0].address), 0);
    say_all(NULL, NULL, NULL);
    assert_int_equal(run(status, "speak TLS?"), 1);
    char ca[256], cert[256], key[256];
    snprintf(ca, sizeof(ca), "--tls-ca=%s/ca.pem", folder);
    snprintf(cert, sizeof(cert), "--tls-cert=%s/client.pem", folder);
    snprintf(key, sizeof(key), "--tls-key=%s/client.key", folder);
    const char *const flags[] = {ATTNCTL_PATH, "--target", address, ca, cert, key, "status", NULL};
    assert_int_equal(run(flags, cluster.workers[0].address), 0);
    const char *const thin[] = {ATTNCTL_PATH, "--target",  address, ca,        cert, key, "bench",
                                "--thin",     "--context", "64",    "--steps", "8",  NULL};
    assert_int_equal(run(thin, " 0 wrong"), 0);
    cluster_down(&cluster);
}

/* Wait until all daemons have logged it. */
static void
await_logged(test_cluster_t *cluster, const char *words)
{
    uint64_t end = now_ms() + EVENT_MS;

    for (uint32_t i = 0; i <= cluster->options.workers; i++) {
        process_t *process = i == 0 ? &cluster->coordinator : &cluster->workers[i - 1];
        while (!process_logged(process, words)) {
            if (now_ms() > end) {
                cluster_print_logs(cluster);
                fail_msg("not all daemons say %s", words);
            }
            sleep_ms(20);
        }
    }
}

static void
test_certificates_are_renewed(void **state)
{
    test_cluster_t cluster;
    attn_geometry_t geometry;
    attn_cache_t *cache;
    model_t model;

    (void)state;
    make_certs();
    say_all("ca.pem", "client.pem", "client.key");
    cluster_up(&cluster, &(cluster_options_t){.workers = 2, .lost_ms = "5000", .certs = folder});
    attn_client_t *client = open_client(cluster.coordinator.address, 10000);
    model_geometry(&geometry);
    geometry.region_bytes = 8 << 20;
    OK(attn_cache_open(client, "renewal", &geometry, &cache));
    model_init(&model, cache, SEED);
    model.check = true;
    model_create(&model, 0);
    OK(model_append(&model, 0, 300));

    make_certs(); /* noticed without a word */
    OK(model_append(&model, 0, 5));
    await_logged(&cluster, "tls.reloaded");
    OK(model_append(&model, 0, 300));
    expect_no_entrance("127.0.0.1:1", "refused");
    attn_client_close(open_client(cluster.coordinator.address, 10000));

    write_file("server.pem", "no certificate\n");
    for (uint32_t i = 0; i <= 2; i++) {
        process_signal(i == 0 ? &cluster.coordinator : &cluster.workers[i - 1], SIGHUP);
    }
    await_logged(&cluster, "tls.kept");
    attn_client_close(open_client(cluster.coordinator.address, 10000)); /* with the old ones */
    OK(model_append(&model, 0, 5));

    model_free(&model);
    attn_cache_close(cache);
    attn_client_close(client);
    make_certs();
    cluster_down(&cluster);
}

/* ---- tickets ---- */

static void
test_a_client_outlives_its_tickets(void **state)
{
    test_cluster_t cluster;
    attn_geometry_t geometry;
    attn_cache_t *cache;
    model_t model;

    (void)state;
    say_all(NULL, NULL, NULL);
    cluster_up(&cluster, &(cluster_options_t){.workers = 2, .lost_ms = "5000", .lease_ms = "1000"});
    attn_client_t *client = open_client(cluster.coordinator.address, 10000);
    model_geometry(&geometry);
    geometry.region_bytes = 8 << 20;
    OK(attn_cache_open(client, "tickets", &geometry, &cache));
    model_init(&model, cache, SEED);
    model_create(&model, 0);
    OK(model_append(&model, 0, 300));
    /* Four periods: the ticket that the first streams were opened with is refused from the third
     * on. */
    for (uint64_t end = now_ms() + 3600; now_ms() < end; sleep_ms(20)) {
        OK(model_append(&model, 0, 1));
    }
    model_free(&model);
    attn_cache_close(cache);
    attn_client_close(client);
    cluster_down(&cluster);
}

/* A process with --join-secret-file (NULL: without). */
static void
start_with_secret(process_t *process, const char *command, const char *option, const char *address,
                  const char *file)
{
    char path[256];
    const char *argv[] = {ATTND_PATH, command, option, address, file != NULL ? path : NULL, NULL};

    snprintf(path, sizeof(path), "--join-secret-file=%s/%s", folder, file != NULL ? file : "");
    process_start(process, argv);
}

static void
test_workers_show_the_join_secret(void **state)
{
    static const char *const wrong[] = {NULL, "other"};
    process_t coordinator, worker;

    (void)state;
    write_file("secret", "a secret of some length\n");
    write_file("other", "another-secret-of-some-length");
    write_file("short", "short\nsecond line\n");
    start_with_secret(&coordinator, "coordinator", "--listen", "127.0.0.1:0", "secret");
    assert_int_equal(process_wait(&coordinator, EVENT_MS), 1); /* blanks */
    assert_true(process_logged(&coordinator, "without blanks"));
    remove(coordinator.log);
    start_with_secret(&coordinator, "coordinator", "--listen", "127.0.0.1:0", "short");
    assert_int_equal(process_wait(&coordinator, EVENT_MS), 1);
    assert_true(process_logged(&coordinator, "16 to 256"));
    remove(coordinator.log);

    write_file("secret", "a-secret-of-some-length\n");
    start_with_secret(&coordinator, "coordinator", "--listen", "127.0.0.1:0", "secret");
    process_wait_ready(&coordinator);
    for (int i = 0; i < 2; i++) {
        start_with_secret(&worker, "worker", "--coordinator", coordinator.address, wrong[i]);
        uint64_t end = now_ms() + EVENT_MS;
        do {
            assert_true(now_ms() < end);
            sleep_ms(50);
        } while (access(worker.log, F_OK) != 0 || !process_logged(&worker, "join secret"));
        assert_false(process_logged(&worker, "worker.joined"));
        process_kill(&worker);
        remove(worker.log);
    }
    start_with_secret(&worker, "worker", "--coordinator", coordinator.address, "secret");
    process_wait_ready(&worker);
    assert_true(process_logged(&worker, "worker.joined"));
    process_kill(&worker);
    process_kill(&coordinator);
    remove(worker.log);
    remove(coordinator.log);
}

/* ---- loopback ---- */

static void
test_without_certificates_only_loopback(void **state)
{
    static const char *const commands[] = {"worker", "coordinator", "dev"};

    (void)state;
    for (int i = 0; i < 3; i++) {
        const char *const argv[] = {ATTND_PATH, commands[i], "--listen", "0.0.0.0:0", NULL};
        assert_int_equal(run(argv, "--allow-plaintext"), 2);
    }
    char cert[256];
    snprintf(cert, sizeof(cert), "--tls-cert=%s/server.pem", folder);
    assert_int_equal(
        run((const char *const[]){ATTND_PATH, "coordinator", cert, NULL}, "--tls-key is missing"),
        2);
    assert_int_equal(run((const char *const[]){ATTND_PATH, "coordinator", cert,
                                               "--tls-key=/no/where", "--tls-ca=/no/where", NULL},
                         "/no/where: No such file"),
                     1);
    assert_int_equal(
        run((const char *const[]){ATTND_PATH, "worker", "--coordinator", "192.0.2.1:7070", NULL},
            "--coordinator 192.0.2.1:7070 reaches beyond this machine"),
        2);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_cluster_with_tls),
        cmocka_unit_test(test_certificates_are_renewed),
        cmocka_unit_test(test_a_client_outlives_its_tickets),
        cmocka_unit_test(test_workers_show_the_join_secret),
        cmocka_unit_test(test_without_certificates_only_loopback),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
