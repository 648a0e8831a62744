/* Up and down: exit codes, draining, the development cluster and the deaths in it. */
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

/* ---- commands ---- */

static int
run(const char *const *argv, const char *words)
{
    process_t process;

    process_start(&process, argv);
    close(process.ready_fd);
    int code = process_wait(&process, 5000);
    if (words != NULL && !process_logged(&process, words)) {
        print_error("no \"%s\" in %s\n", words, process.log);
        code = -2;
    }
    unlink(process.log);
    return code;
}

static void
test_commands_and_their_exit_codes(void **state)
{
    (void)state;
    assert_int_equal(run((const char *[]){ATTND_PATH, "--help", NULL}, "usage: attnd COMMAND"), 0);
    assert_int_equal(run((const char *[]){ATTND_PATH, "--version", NULL}, "attnd 0."), 0);
    assert_int_equal(run((const char *[]){ATTND_PATH, NULL}, "usage"), 2);
    assert_int_equal(run((const char *[]){ATTND_PATH, "wrker", NULL}, "\"worker\"?"), 2);
    assert_int_equal(run((const char *[]){ATTND_PATH, "worker", "--slap", "1GiB", NULL}, "--slab"),
                     2);
    assert_int_equal(run((const char *[]){ATTND_PATH, "dev", "--help", NULL}, "--ready-file"), 0);
    /* An address of nobody's. */
    assert_int_equal(run((const char *[]){ATTND_PATH, "worker", "--listen", "192.0.2.1:1",
                                          "--allow-plaintext", NULL},
                         "worker.failed"),
                     1);
    assert_int_equal(run((const char *[]){ATTND_PATH, "worker", "--listen", "0.0.0.0:0",
                                          "--allow-plaintext", NULL},
                         "--advertise"),
                     1);
}

/* ---- draining ---- */

typedef struct open_step {
    attn_client_t *client;
    attn_cache_t *cache;
    attn_seq_t seq;
    attn_step_t *step;
} open_step_t;

static attn_status_t
begin_one(open_step_t *open, attn_seq_t seq, attn_step_t **step_p)
{
    attn_entry_t entry = {.seq = seq, .n_q = 1, .n_new = 1};

    return attn_step_begin(open->cache,
                           &(attn_batch_t){.size       = sizeof(attn_batch_t),
                                           .n          = 1,
                                           .entries    = &entry,
                                           .q_dtype    = ATTN_F32,
                                           .timeout_ms = 10000},
                           step_p);
}

static void
open_step(open_step_t *open, const char *address)
{
    attn_geometry_t geometry;

    model_geometry(&geometry);
    open->client = open_client(address, 3000);
    OK(attn_cache_open(open->client, "drain", &geometry, &open->cache));
    OK(attn_seq_create(open->cache, NULL, &open->seq));
    OK(begin_one(open, open->seq, &open->step));
}

static attn_status_t
run_all(open_step_t *open)
{
    static float q[MODEL_Q_HEADS * MODEL_D_K], k[MODEL_KV_HEADS * MODEL_D_K],
        v[MODEL_KV_HEADS * MODEL_D_V], o[MODEL_Q_HEADS * MODEL_D_V];
    attn_status_t status = ATTN_OK;

    for (uint32_t l = 0; l < MODEL_LAYERS && status == ATTN_OK; l++) {
        status = attn_step_run(open->step, l, &(attn_tensor_t){.data = q, .dtype = ATTN_F32},
                               &(attn_tensor_t){.data = k, .dtype = ATTN_F32},
                               &(attn_tensor_t){.data = v, .dtype = ATTN_F32},
                               &(attn_tensor_t){.data = o, .dtype = ATTN_F32}, NULL);
    }
    return status;
}

static void
close_all(open_step_t *open)
{
    attn_cache_close(open->cache);
    attn_client_close(open->client);
}

/* SIGTERM with a step open: the step may end, a new one may not begin, and then it is over. */
static void
test_a_draining_worker_lets_open_steps_end(void **state)
{
    test_cluster_t cluster;
    open_step_t open;
    attn_seq_t other;
    attn_step_t *refused = NULL;

    (void)state;
    cluster_up(&cluster, &(cluster_options_t){.workers = 1});
    open_step(&open, cluster.coordinator.address);
    OK(attn_seq_create(open.cache, NULL, &other));

    process_signal(&cluster.workers[0], SIGTERM);
    assert_int_equal(process_wait(&cluster.workers[0], 300), -1); /* it waits for the step */
    attn_status_t status = begin_one(&open, other, &refused);
    assert_int_equal(status, ATTN_ERR_CANCELLED);
    assert_non_null(strstr(attn_last_error(), "drain"));
    OK(run_all(&open));
    OK(attn_step_commit(open.step, NULL));
    assert_int_equal(process_wait(&cluster.workers[0], 2000), 0);
    close_all(&open);
    cluster_down(&cluster);
}

static void
test_draining_is_over_in_time(void **state)
{
    test_cluster_t cluster;
    open_step_t open;

    (void)state;
    cluster_up(&cluster, &(cluster_options_t){.workers = 1, .drain_ms = "300"});
    open_step(&open, cluster.coordinator.address);
    uint64_t start = now_ms();
    process_signal(&cluster.workers[0], SIGTERM);
    assert_int_equal(process_wait(&cluster.workers[0], 3000), 0);
    assert_in_range(now_ms() - start, 280, 2000);
    assert_true(process_logged(&cluster.workers[0], "worker.drain_over"));
    attn_status_t status = run_all(&open);
    assert_true(status == ATTN_ERR_UNAVAILABLE || status == ATTN_ERR_ABORTED ||
                status == ATTN_ERR_CANCELLED);
    attn_step_abort(open.step);
    close_all(&open);
    cluster_down(&cluster);
}

static void
test_a_second_signal_ends_at_once(void **state)
{
    test_cluster_t cluster;
    open_step_t open;

    (void)state;
    cluster_up(&cluster, &(cluster_options_t){.workers = 1, .drain_ms = "20000"});
    open_step(&open, cluster.coordinator.address);
    process_signal(&cluster.workers[0], SIGINT);
    assert_int_equal(process_wait(&cluster.workers[0], 200), -1);
    process_signal(&cluster.workers[0], SIGTERM);
    assert_int_equal(process_wait(&cluster.workers[0], 2500), 128 + SIGTERM);
    attn_step_abort(open.step);
    close_all(&open);
    cluster_down(&cluster);
}

/* ---- the development cluster ---- */

typedef struct dev {
    process_t process;
    char ready[64];
    char address[64];
} dev_cluster_t;

static void
dev_up(dev_cluster_t *dev, const char *workers)
{
    snprintf(dev->ready, sizeof(dev->ready), "/tmp/attn-test-ready-%d", (int)getpid());
    unlink(dev->ready);
    process_start(&dev->process, (const char *[]){ATTND_PATH, "dev", "--workers", workers,
                                                  "--listen", "127.0.0.1:0", "--slab", "16MiB",
                                                  "--ready-file", dev->ready, NULL});
    close(dev->process.ready_fd);
    uint64_t end = now_ms() + CLUSTER_START_MS;
    FILE *file   = NULL;
    while (file == NULL && now_ms() < end) {
        sleep_ms(10);
        file = fopen(dev->ready, "r");
    }
    assert_non_null(file);
    assert_int_equal(fscanf(file, "%63s", dev->address), 1);
    fclose(file);
}

/* The pid of the first child of that name, from the log of dev's children: it is in /proc. */
static pid_t
child_pid(pid_t parent, const char *role)
{
    char path[64], line[256];
    pid_t found = 0;
    int child;

    snprintf(path, sizeof(path), "/proc/%d/task/%d/children", (int)parent, (int)parent);
    FILE *children = fopen(path, "r");
    assert_non_null(children);
    while (found == 0 && fscanf(children, "%d", &child) == 1) {
        snprintf(path, sizeof(path), "/proc/%d/cmdline", child);
        FILE *file = fopen(path, "r");
        size_t n   = file != NULL ? fread(line, 1, sizeof(line) - 1, file) : 0;
        line[n]    = '\0';
        if (file != NULL) {
            fclose(file);
        }
        if (n > 6 && strcmp(line + 6, role) == 0) { /* behind "attnd" */
            found = child;
        }
    }
    fclose(children);
    assert_true(found > 0);
    return found;
}

static bool
alive(pid_t pid)
{
    char path[64], line[256];
    bool found = false;
    FILE *file;

    snprintf(path, sizeof(path), "/proc/%d/stat", (int)pid);
    if ((file = fopen(path, "r")) != NULL) {
        found = fgets(line, sizeof(line), file) != NULL && strstr(line, ") Z") == NULL;
        fclose(file);
    }
    return found;
}

static void
wait_gone(pid_t pid)
{
    uint64_t end = now_ms() + 3000;

    while (alive(pid) && now_ms() < end) {
        sleep_ms(10);
    }
    assert_false(alive(pid));
}

static void
test_dev_serves_and_goes_without_a_trace(void **state)
{
    dev_cluster_t dev;
    attn_cluster_info_t info;

    (void)state;
    dev_up(&dev, "3");
    attn_client_t *client = open_client(dev.address, 3000);
    OK(attn_cluster_describe(client, &info));
    assert_int_equal(info.n_workers, 3);
    for (uint32_t i = 0; i < 3; i++) {
        assert_true(info.workers[i].alive);
        assert_int_equal(info.workers[i].slab_bytes, 16 << 20);
    }
    attn_cluster_info_free(&info);
    attn_client_close(client);
    assert_true(process_logged(&dev.process, "attnd dev: 3 workers are ready"));

    pid_t worker = child_pid(dev.process.pid, "worker");
    process_signal(&dev.process, SIGINT);
    assert_int_equal(process_wait(&dev.process, 5000), 0);
    assert_false(alive(worker));
    assert_int_not_equal(access(dev.ready, F_OK), 0);
    unlink(dev.process.log);
}

static void
test_dev_and_the_death_of_its_children(void **state)
{
    dev_cluster_t dev;

    (void)state;
    dev_up(&dev, "2");
    pid_t coordinator = child_pid(dev.process.pid, "coordinator");
    kill(child_pid(dev.process.pid, "worker"), SIGKILL);
    assert_int_equal(process_wait(&dev.process, 500), -1); /* the rest goes on */
    assert_true(process_logged(&dev.process, "event=dev.child_ended role=dev name=worker-"));
    pid_t worker = child_pid(dev.process.pid, "worker");
    kill(coordinator, SIGKILL);
    assert_int_equal(process_wait(&dev.process, 5000), 1);
    assert_false(alive(worker));
    unlink(dev.process.log);
    unlink(dev.ready);
}

static void
test_children_end_with_dev(void **state)
{
    dev_cluster_t dev;

    (void)state;
    dev_up(&dev, "1");
    pid_t coordinator = child_pid(dev.process.pid, "coordinator");
    pid_t worker      = child_pid(dev.process.pid, "worker");
    process_kill(&dev.process);
    wait_gone(coordinator);
    wait_gone(worker);
    unlink(dev.process.log);
    unlink(dev.ready);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_commands_and_their_exit_codes),
        cmocka_unit_test(test_a_draining_worker_lets_open_steps_end),
        cmocka_unit_test(test_draining_is_over_in_time),
        cmocka_unit_test(test_a_second_signal_ends_at_once),
        cmocka_unit_test(test_dev_serves_and_goes_without_a_trace),
        cmocka_unit_test(test_dev_and_the_death_of_its_children),
        cmocka_unit_test(test_children_end_with_dev),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
