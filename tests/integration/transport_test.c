/*
 * Runs through UCX: that they go there, with the bits they have over gRPC; that whoever cannot have
 * it is told why; and that killed and stopped peers leave neither waiters nor memory. Through
 * shared memory, and as messages where ATTN_TEST_APART is set (cluster.h).
 */
#include "tests/integration/fixture.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

static bool
apart(void)
{
    return getenv("ATTN_TEST_APART") != NULL;
}

static const char *
way(void)
{
    return apart() ? "ucx tcp" : "ucx shm";
}

static void
fixture_up(fixture_t *f, uint32_t workers, const char *transport)
{
    setenv("ATTN_TRANSPORT", transport, 1);
    /* A worker that stops for a while is not lost. */
    fixture_open(f, &(cluster_options_t){.workers = workers, .lost_ms = "8000"}, 2000, 11);
}

/* Over all links. */
static attn_link_info_t
totals(attn_client_t *client)
{
    attn_link_info_t all = {.transport = "none"};
    attn_links_info_t info;

    OK(attn_client_links(client, &info));
    for (uint32_t i = 0; i < info.n_links; i++) {
        const attn_link_info_t *l = &info.links[i];
        memcpy(all.transport, l->transport, sizeof(all.transport));
        memcpy(all.reason, l->reason, sizeof(all.reason));
        all.runs_ucx += l->runs_ucx;
        all.runs_grpc += l->runs_grpc;
        all.steps_no_slot += l->steps_no_slot;
        all.slabs_lost += l->slabs_lost;
    }
    attn_links_info_free(&info);
    return all;
}

/* Shared memory that these processes made and that still is: ours, a cluster's, and another one's.
 */
static unsigned
segments(const test_cluster_t *cluster, pid_t other)
{
    char line[512];
    unsigned n = 0;
    int maker;
    FILE *file = fopen("/proc/sysvipc/shm", "r");

    while (file != NULL && fgets(line, sizeof(line), file) != NULL) {
        if (sscanf(line, "%*d %*d %*o %*u %d", &maker) != 1) {
            continue; /* the heading */
        }
        n += maker == getpid() || maker == other || maker == cluster->coordinator.pid;
        for (uint32_t i = 0; i < cluster->options.workers; i++) {
            n += maker == cluster->workers[i].pid;
        }
    }
    if (file != NULL) {
        fclose(file);
    }
    return n;
}

static void
await_segments(const test_cluster_t *cluster, pid_t other, unsigned n)
{
    uint64_t end = now_ms() + 5000;

    while (segments(cluster, other) > n && now_ms() < end) {
        sleep_ms(20);
    }
    assert_int_equal(segments(cluster, other), n);
}

/* ---- which way ---- */

static uint64_t
story(const char *transport, attn_link_info_t *links)
{
    fixture_t f;

    fixture_up(&f, 3, transport);
    model_story(&f.model, 60);
    uint64_t digest = f.model.digest;
    *links          = totals(f.client);
    fixture_down(&f);
    return digest;
}

static void
test_the_same_bits_either_way(void **state)
{
    attn_link_info_t ucx, grpc, either;

    (void)state;
    uint64_t through = story("ucx", &ucx), over = story("grpc", &grpc);
    assert_true(story("auto", &either) == over);
    assert_true(through == over);
    assert_string_equal(ucx.transport, way());
    assert_true(ucx.runs_ucx > 50);
    assert_int_equal(ucx.runs_grpc, 0);
    assert_string_equal(either.transport, way());
    assert_true(either.runs_ucx == ucx.runs_ucx);
    assert_string_equal(grpc.transport, "grpc");
    assert_int_equal(grpc.runs_ucx, 0);
    assert_true(grpc.runs_grpc == ucx.runs_ucx);
}

/* What a client gets of workers without shared memory, or if it has none itself. */
static void
check_without(fixture_t *f, const char *reason)
{
    attn_client_options_t options;
    attn_client_t *strict;
    attn_cache_t *cache;
    attn_step_t *step;
    attn_seq_t seq;

    model_create(&f->model, 0);
    OK(model_append(&f->model, 0, 300));
    attn_link_info_t links = totals(f->client);
    assert_string_equal(links.transport, "grpc");
    assert_non_null(strstr(links.reason, reason));
    assert_int_equal(links.runs_ucx, 0);
    assert_true(links.runs_grpc > 0);

    attn_client_options_init(&options);
    options.transport = ATTN_TRANSPORT_UCX;
    OK(attn_client_open(f->cluster.coordinator.address, &options, &strict));
    attn_geometry_t geometry = *attn_cache_geometry(f->cache);
    OK(attn_cache_open(strict, "strict", &geometry, &cache));
    OK(attn_seq_create(cache, NULL, &seq));
    attn_entry_t entry   = {.seq = seq, .n_q = 1, .n_new = 1};
    attn_status_t status = attn_step_begin(
        cache,
        &(attn_batch_t){
            .size = sizeof(attn_batch_t), .n = 1, .entries = &entry, .q_dtype = ATTN_F32},
        &step);
    assert_int_equal(status, ATTN_ERR_UNSUPPORTED);
    assert_non_null(strstr(attn_last_error(), reason));
    assert_non_null(strstr(attn_last_error(), "transport is ucx"));
    attn_cache_close(cache);
    attn_client_close(strict);
}

static void
test_workers_without(void **state)
{
    fixture_t f;

    (void)state;
    setenv("UCX_TLS", apart() ? "sysv" : "tcp", 1); /* of the daemons */
    setenv("ATTN_TRANSPORT", "auto", 1);
    fixture_open(&f, &(cluster_options_t){.workers = 2}, 2000, 11);
    unsetenv("UCX_TLS");
    check_without(&f, apart() ? "UCX cannot" : "UCX_TLS is tcp");
    fixture_down(&f);
}

static void
test_a_client_without(void **state)
{
    fixture_t f;

    (void)state;
    fixture_up(&f, 2, "auto");
    setenv("UCX_TLS", apart() ? "sysv" : "^sysv", 1);
    check_without(&f, apart() ? "UCX cannot" : "UCX_TLS is ^sysv");
    unsetenv("UCX_TLS");
    fixture_down(&f);
}

static void
test_a_transport_that_is_none(void **state)
{
    attn_client_options_t options;
    attn_client_t *client;
    fixture_t f;

    (void)state;
    fixture_up(&f, 1, "auto");
    attn_client_options_init(&options);
    options.transport = (attn_transport_t)17;
    assert_int_equal(attn_client_open(f.cluster.coordinator.address, &options, &client),
                     ATTN_ERR_INVALID);
    setenv("ATTN_TRANSPORT", "pigeon", 1);
    assert_int_equal(attn_client_open(f.cluster.coordinator.address, NULL, &client),
                     ATTN_ERR_INVALID);
    assert_non_null(strstr(attn_last_error(), "pigeon"));
    setenv("ATTN_TRANSPORT", "auto", 1);
    fixture_down(&f);
}

/* ---- more steps than slots ---- */

#define STEPS 70u
#define SLOTS 64u /* of a session */

static attn_status_t
run_zeros(attn_step_t *step, uint32_t layer)
{
    static float q[MODEL_Q_HEADS * MODEL_D_K], k[MODEL_KV_HEADS * MODEL_D_K],
        v[MODEL_KV_HEADS * MODEL_D_V];
    float o[MODEL_Q_HEADS * MODEL_D_V];

    return attn_step_run(step, layer, &(attn_tensor_t){.data = q, .dtype = ATTN_F32},
                         &(attn_tensor_t){.data = k, .dtype = ATTN_F32},
                         &(attn_tensor_t){.data = v, .dtype = ATTN_F32},
                         &(attn_tensor_t){.data = o, .dtype = ATTN_F32}, NULL);
}

static attn_status_t
begin_one(fixture_t *f, attn_seq_t seq, uint64_t base, uint32_t timeout_ms, attn_step_t **step)
{
    attn_entry_t entry = {.seq = seq, .base = base, .n_q = 1, .n_new = 1};

    return attn_step_begin(f->cache,
                           &(attn_batch_t){.size       = sizeof(attn_batch_t),
                                           .n          = 1,
                                           .entries    = &entry,
                                           .q_dtype    = ATTN_F32,
                                           .timeout_ms = timeout_ms},
                           step);
}

static void
test_steps_beyond_the_slots_go_over_grpc(void **state)
{
    fixture_t f;
    attn_seq_t seqs[STEPS];
    attn_step_t *steps[STEPS];

    (void)state;
    setenv("ATTN_TRANSPORT", "ucx", 1);
    fixture_open(&f, &(cluster_options_t){.workers = 1, .slab = "128MiB"}, 2000, 11);
    attn_cache_close(f.cache);
    attn_geometry_t geometry;
    model_geometry(&geometry);
    geometry.region_bytes = 96u << 20;
    OK(attn_cache_open(f.client, "large", &geometry, &f.cache));
    for (uint32_t i = 0; i < STEPS; i++) {
        OK(attn_seq_create(f.cache, NULL, &seqs[i]));
        OK(begin_one(&f, seqs[i], 0, 0, &steps[i]));
    }
    for (uint32_t i = 0; i < STEPS; i++) {
        for (uint32_t l = 0; l < MODEL_LAYERS; l++) {
            OK(run_zeros(steps[i], l));
        }
        OK(attn_step_commit(steps[i], NULL));
    }
    attn_link_info_t links = totals(f.client);
    assert_int_equal(links.steps_no_slot, STEPS - SLOTS);
    assert_int_equal(links.runs_ucx, SLOTS * MODEL_LAYERS);
    assert_int_equal(links.runs_grpc, (STEPS - SLOTS) * MODEL_LAYERS);
    for (uint32_t i = 0; i < STEPS; i++) { /* the places came back */
        OK(begin_one(&f, seqs[i], 1, 0, &steps[i]));
        OK(run_zeros(steps[i], 0));
        attn_step_abort(steps[i]);
    }
    links = totals(f.client);
    assert_int_equal(links.runs_ucx, SLOTS * MODEL_LAYERS + STEPS);
    assert_int_equal(links.slabs_lost, 0);
    fixture_down(&f);
}

/* Whether a step fits is the worker's to say: one of 36 MiB does not, by default. */
static void
append_much(const char *ucx_slab, uint64_t no_slot)
{
    enum { TOKENS = 64 * 1024 };
    uint64_t k = TOKENS * MODEL_KV_HEADS * MODEL_D_K, v = TOKENS * MODEL_KV_HEADS * MODEL_D_V;
    float *zeros = calloc(k + v, sizeof(*zeros));
    attn_geometry_t geometry;
    attn_step_t *step;
    attn_seq_t seq;
    fixture_t f;

    assert_non_null(zeros);
    setenv("ATTN_TRANSPORT", "ucx", 1);
    fixture_open(&f, &(cluster_options_t){.workers = 1, .slab = "192MiB", .ucx_slab = ucx_slab},
                 10000, 11);
    model_geometry(&geometry);
    geometry.region_bytes = UINT64_C(160) << 20;
    attn_cache_close(f.cache);
    OK(attn_cache_open(f.client, "large", &geometry, &f.cache));
    OK(attn_seq_create(f.cache, NULL, &seq));
    attn_entry_t entry = {.seq = seq, .n_new = TOKENS};
    OK(attn_step_begin(
        f.cache,
        &(attn_batch_t){
            .size = sizeof(attn_batch_t), .n = 1, .entries = &entry, .q_dtype = ATTN_F32},
        &step));
    for (uint32_t l = 0; l < MODEL_LAYERS; l++) {
        OK(attn_step_run(step, l, NULL, &(attn_tensor_t){.data = zeros, .dtype = ATTN_F32},
                         &(attn_tensor_t){.data = zeros + k, .dtype = ATTN_F32}, NULL, NULL));
    }
    OK(attn_step_commit(step, NULL));
    attn_link_info_t links = totals(f.client);
    assert_int_equal(links.steps_no_slot, no_slot);
    assert_int_equal(links.runs_ucx, no_slot > 0 ? 0 : MODEL_LAYERS);
    fixture_down(&f);
    free(zeros);
}

static void
test_the_worker_says_how_much_fits(void **state)
{
    (void)state;
    append_much(NULL, 1);
    append_much("64MiB", 0);
}

/* ---- peers that stop, or are killed ---- */

/* A worker that stops amid a run, and goes on: the slab of the step that broke off is given up,
 * since the answer may come into it still, and steps go through a new one. */
static void
test_a_worker_that_stops_amid_a_run(void **state)
{
    fixture_t f;
    attn_step_t *step;

    (void)state;
    fixture_up(&f, 1, "ucx");
    model_create(&f.model, 0);
    OK(model_append(&f.model, 0, 100));
    unsigned before = segments(&f.cluster, 0);
    OK(begin_one(&f, f.model.seqs[0].seq, 100, 600, &step));
    OK(run_zeros(step, 0));
    uint64_t start = now_ms();
    process_signal(&f.cluster.workers[0], SIGSTOP);
    attn_status_t status = run_zeros(step, 1);
    assert_true(status == ATTN_ERR_DEADLINE || status == ATTN_ERR_UNAVAILABLE);
    assert_true(now_ms() - start <= 600 + 250);
    process_signal(&f.cluster.workers[0], SIGCONT);
    attn_step_abort(step);
    for (int i = 0; i < 20; i++) {
        status = model_append(&f.model, 0, 3);
        if (status == ATTN_OK) {
            break;
        }
        sleep_ms(100); /* the worker hears of the broken stream first */
    }
    OK(status);
    OK(model_append(&f.model, 0, 3));
    attn_link_info_t links = totals(f.client);
    assert_int_equal(links.slabs_lost, 1);
    assert_int_equal(links.runs_grpc, 0);
    assert_string_equal(links.transport, way());
    await_segments(&f.cluster, 0, before); /* the former slab is gone */
    fixture_down(&f);
}

static void
test_a_worker_that_is_killed_leaves_no_memory(void **state)
{
    fixture_t f;
    attn_step_t *step;

    (void)state;
    fixture_up(&f, 1, "ucx");
    model_create(&f.model, 0);
    OK(model_append(&f.model, 0, 100));
    OK(begin_one(&f, f.model.seqs[0].seq, 100, 5000, &step));
    OK(run_zeros(step, 0));
    pid_t worker = f.cluster.workers[0].pid;
    assert_true(segments(&f.cluster, worker) >= 2 || apart());
    process_kill(&f.cluster.workers[0]);
    uint64_t start = now_ms();
    assert_int_not_equal(run_zeros(step, 1), ATTN_OK);
    assert_true(now_ms() - start <= 1000); /* its connection says so */
    attn_step_abort(step);
    fixture_close(&f);
    cluster_kill(&f.cluster);
    await_segments(&f.cluster, worker, 0);
}

/* What the other client does until it is killed or stopped: steps on a sequence of its own. */
static int
be_other(const char *address)
{
    attn_client_t *client;
    attn_cache_t *cache;
    attn_step_t *step;
    attn_seq_t seq;

    if (attn_client_open(address, NULL, &client) != ATTN_OK) {
        return 3;
    }
    attn_geometry_t geometry;
    model_geometry(&geometry);
    if (attn_cache_open(client, "other", &geometry, &cache) != ATTN_OK ||
        attn_seq_create(cache, NULL, &seq) != ATTN_OK) {
        return 4;
    }
    fixture_t f = {.client = client, .cache = cache};
    for (uint64_t i = 0;; i++) {
        if (begin_one(&f, seq, i, 2000, &step) != ATTN_OK || run_zeros(step, 0) != ATTN_OK ||
            run_zeros(step, 1) != ATTN_OK || attn_step_commit(step, NULL) != ATTN_OK) {
            fprintf(stderr, "other: %s\n", attn_last_error());
            return 5;
        }
        if (i == 20 && write(STDOUT_FILENO, "r", 1) != 1) {
            return 6;
        }
    }
}

static pid_t
start_other(const char *address)
{
    int fds[2];
    char ready;

    assert_int_equal(pipe(fds), 0);
    pid_t pid = fork();
    if (pid == 0) {
        dup2(fds[1], STDOUT_FILENO);
        execl("/proc/self/exe", "transport_test", "other", address, (char *)NULL);
        _exit(127);
    }
    close(fds[1]);
    assert_int_equal(read(fds[0], &ready, 1), 1);
    close(fds[0]);
    return pid;
}

static void
test_a_client_that_is_killed_harms_nobody(void **state)
{
    fixture_t f;

    (void)state;
    fixture_up(&f, 2, "ucx");
    model_create(&f.model, 0);
    OK(model_append(&f.model, 0, 600)); /* on both workers */
    unsigned before = segments(&f.cluster, 0);
    for (int round = 0; round < 3; round++) {
        pid_t pid = start_other(f.cluster.coordinator.address);
        OK(model_append(&f.model, 0, 2));
        sleep_ms((uint32_t)(7 * round));
        kill(pid, SIGKILL);
        assert_int_equal(waitpid(pid, NULL, 0), pid);
        OK(model_append(&f.model, 0, 2));
        await_segments(&f.cluster, pid, before);
    }
    assert_int_equal(totals(f.client).runs_grpc, 0);
    fixture_down(&f);
}

static void
test_a_client_that_stops_harms_nobody(void **state)
{
    fixture_t f;

    (void)state;
    fixture_up(&f, 2, "ucx");
    model_create(&f.model, 0);
    OK(model_append(&f.model, 0, 600));
    pid_t pid = start_other(f.cluster.coordinator.address);
    kill(pid, SIGSTOP);
    uint64_t start = now_ms();
    for (int i = 0; i < 10; i++) {
        OK(model_append(&f.model, 0, 2));
    }
    assert_true(now_ms() - start < 5000);
    kill(pid, SIGKILL);
    assert_int_equal(waitpid(pid, NULL, 0), pid);
    OK(model_append(&f.model, 0, 2));
    fixture_down(&f);
}

/* ---- idle ---- */

static uint64_t
cpu_ms(pid_t pid)
{
    char path[64];
    unsigned long long user, system;

    snprintf(path, sizeof(path), "/proc/%d/stat", (int)pid);
    FILE *file = fopen(path, "r");
    assert_non_null(file);
    assert_int_equal(fscanf(file, "%*d %*s %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %llu %llu",
                            &user, &system),
                     2);
    fclose(file);
    return (user + system) * 1000 / (unsigned long long)sysconf(_SC_CLK_TCK);
}

static void
test_an_idle_worker_sleeps(void **state)
{
    fixture_t f;
    attn_step_t *step;

    (void)state;
    fixture_up(&f, 1, "ucx");
    model_create(&f.model, 0);
    OK(model_append(&f.model, 0, 10));
    OK(begin_one(&f, f.model.seqs[0].seq, 10, 5000, &step)); /* with a slot open, too */
    OK(run_zeros(step, 0));
    sleep_ms(100);
    uint64_t before = cpu_ms(f.cluster.workers[0].pid);
    sleep_ms(1000);
    assert_true(cpu_ms(f.cluster.workers[0].pid) - before <= 50);
    attn_step_abort(step);
    fixture_down(&f);
}

int
main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_the_same_bits_either_way),
        cmocka_unit_test(test_workers_without),
        cmocka_unit_test(test_a_client_without),
        cmocka_unit_test(test_a_transport_that_is_none),
        cmocka_unit_test(test_steps_beyond_the_slots_go_over_grpc),
        cmocka_unit_test(test_the_worker_says_how_much_fits),
        cmocka_unit_test(test_a_worker_that_stops_amid_a_run),
        cmocka_unit_test(test_a_worker_that_is_killed_leaves_no_memory),
        cmocka_unit_test(test_a_client_that_is_killed_harms_nobody),
        cmocka_unit_test(test_a_client_that_stops_harms_nobody),
        cmocka_unit_test(test_an_idle_worker_sleeps),
    };

    if (argc == 3 && strcmp(argv[1], "other") == 0) {
        return be_other(argv[2]);
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
