/*
 * A worker's device through real processes: what names it takes, what it makes of the memory, what
 * it tells of it, and how it ends when the device fails for good. GPUs are those of fake_cuda.c,
 * where GPU kernels are built; numbers are for the conformance suite, and for machines that have
 * a GPU.
 */
#include "tests/integration/cluster.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#define MIB (UINT64_C(1) << 20)
#define DIM 64u
#define KV_HEADS 2u
#define Q_HEADS 4u
#define LAYERS 2u

/* ---- steps ---- */

typedef struct stepper {
    attn_client_t *client;
    attn_cache_t *cache;
    attn_seq_t seq;
    uint64_t base;
} stepper_t;

static void
stepper_open(stepper_t *s, const test_cluster_t *cluster, const char *name)
{
    attn_geometry_t geometry;

    s->base   = 0;
    s->client = open_client(cluster->coordinator.address, 5000);
    attn_geometry_init(&geometry);
    geometry.layers = LAYERS, geometry.q_heads = Q_HEADS, geometry.kv_heads = KV_HEADS;
    geometry.head_dim_k = geometry.head_dim_v = DIM;
    geometry.kv_dtype                         = ATTN_F16;
    geometry.region_bytes                     = 4 * MIB;
    OK(attn_cache_open(s->client, name, &geometry, &s->cache));
    OK(attn_seq_create(s->cache, NULL, &s->seq));
}

static void
stepper_close(stepper_t *s)
{
    attn_cache_close(s->cache);
    attn_client_close(s->client);
}

/* A step of 8 tokens, zeros. */
static attn_status_t
step(stepper_t *s)
{
    static uint16_t rows[8 * Q_HEADS * DIM], o[8 * Q_HEADS * DIM];
    attn_entry_t entry   = {.seq = s->seq, .base = s->base, .n_q = 8, .n_new = 8};
    attn_tensor_t tensor = {.data = rows, .dtype = ATTN_F16};
    attn_batch_t batch   = {
          .size = sizeof(batch), .n = 1, .entries = &entry, .q_dtype = ATTN_F16, .o_dtype = ATTN_F16};
    attn_step_t *open;

    attn_status_t status = attn_step_begin(s->cache, &batch, &open);
    if (status != ATTN_OK) {
        return status;
    }
    for (uint32_t l = 0; l < LAYERS && status == ATTN_OK; l++) {
        status = attn_step_run(open, l, &tensor, &tensor, &tensor,
                               &(attn_tensor_t){.data = o, .dtype = ATTN_F16}, NULL);
    }
    if (status == ATTN_OK) {
        status = attn_step_commit(open, NULL);
        s->base += 8;
    } else {
        attn_step_abort(open);
    }
    return status;
}

/* ---- what is told ---- */

/* The first worker that is alive, when the coordinator knows it so; id 0: none. */
static attn_worker_info_t
alive(attn_client_t *client)
{
    attn_worker_info_t found = {0};
    attn_cluster_info_t info;

    OK(attn_cluster_describe(client, &info));
    for (uint32_t i = 0; i < info.n_workers && found.id == 0; i++) {
        if (info.workers[i].alive) {
            found = info.workers[i];
        }
    }
    attn_cluster_info_free(&info);
    return found;
}

/* Steps until heartbeats tell of what was read. */
static void
assert_rate_is_told(stepper_t *s)
{
    uint64_t end = now_ms() + 15000;

    while (!(alive(s->client).kv_bytes_per_s > 0)) {
        assert_true(now_ms() < end);
        OK(step(s));
        usleep(20000); /* or the region is full before a heartbeat comes */
    }
}

static void
test_a_worker_on_the_cpu(void **state)
{
    test_cluster_t cluster;
    stepper_t s;

    (void)state;
    cluster_up(&cluster, &(cluster_options_t){.workers = 1, .device = "cpu"});
    stepper_open(&s, &cluster, "cpu");
    attn_worker_info_t w = alive(s.client);
    assert_int_equal(w.slab_bytes, 32 * MIB);
    assert_true(w.device_bytes > w.device_free_bytes && w.device_free_bytes > 0);
    assert_true(w.read_bandwidth > 1e8 && w.kv_bytes_per_s == 0);
    assert_rate_is_told(&s);
    stepper_close(&s);
    cluster_down(&cluster);
}

/* ---- names ---- */

static int
run_worker(const char *device, const char *slab, const char *reserve, const char *words)
{
    const char *argv[] = {ATTND_PATH,  "worker", "--device",      device,        "--slab", slab,
                          "--reserve", reserve,  "--coordinator", "127.0.0.1:1", NULL};
    process_t process;

    process_start(&process, argv);
    close(process.ready_fd);
    int code = process_wait(&process, 10000);
    if (code == -1) {
        process_kill(&process);
    }
    if (!process_logged(&process, words)) {
        print_error("no \"%s\" in %s\n", words, process.log);
        code = -2;
    }
    unlink(process.log);
    return code;
}

static void
test_devices_that_are_not_there(void **state)
{
    (void)state;
    assert_int_equal(run_worker("gpu", "0", "0", "no device \"gpu\" in this build: cpu and cuda:N"),
                     2);
    assert_int_equal(run_worker("cpu:1", "0", "0", "no device cpu:1: there is one cpu"), 1);
#ifdef FAKE_CUDA
    setenv("FAKE_CUDA_DEVICES", "0", 1);
    assert_int_equal(run_worker("cuda", "0", "0", "the CUDA driver finds no GPU"), 1);
    setenv("FAKE_CUDA_DEVICES", "2", 1);
    assert_int_equal(run_worker("cuda:2", "0", "0", "no device cuda:2: there are 2"), 1);
    unsetenv("FAKE_CUDA_DEVICES");
#else
    assert_int_equal(run_worker("cuda:0", "0", "0", "this build has no GPU kernels"), 1);
#endif
}

#ifdef FAKE_CUDA

static void
test_a_slab_of_what_is_free(void **state)
{
    test_cluster_t cluster;

    (void)state;
    assert_int_equal(
        run_worker("cuda:0", "0", "256MiB", " of 536870912 bytes free, and 268435456 are reserved"),
        1);
    assert_int_equal(run_worker("cuda:0", "512MiB", "0", "a slab of 536870912 bytes on cuda:0"), 1);
    setenv("FAKE_CUDA_FREE_MIB", "2100", 1); /* the default leaves 2 GiB */
    cluster_up(&cluster, &(cluster_options_t){.workers = 1, .device = "cuda:0", .slab = "0"});
    attn_client_t *client = open_client(cluster.coordinator.address, 5000);
    attn_worker_info_t w  = alive(client);
    /* Some of 52 MiB went to the workspaces that the worker measured itself with, and keeps. */
    assert_in_range(w.slab_bytes, 48 * MIB, 52 * MIB);
    assert_int_equal(w.slab_bytes % MIB, 0);
    assert_string_equal(w.device, "Fake GPU 0");
    assert_int_equal(w.device_bytes, 4200 * MIB);
    assert_in_range(w.device_free_bytes, 2048 * MIB, 2049 * MIB);
    attn_client_close(client);
    cluster_down(&cluster);
    unsetenv("FAKE_CUDA_FREE_MIB");
}

static void
write_failure(const char *path, unsigned code)
{
    char draft[128];

    snprintf(draft, sizeof(draft), "%s.new", path);
    FILE *file = fopen(draft, "w");
    assert_non_null(file);
    fprintf(file, "%u\n", code);
    fclose(file);
    assert_int_equal(rename(draft, path), 0);
}

static void
test_a_device_that_fails(void **state)
{
    char path[96];
    test_cluster_t cluster;
    stepper_t s;

    (void)state;
    snprintf(path, sizeof(path), "/tmp/attn-fake-cuda-%d", (int)getpid());
    setenv("FAKE_CUDA_FAIL", path, 1);
    cluster_up(&cluster, &(cluster_options_t){.workers = 1, .device = "cuda:0"});
    stepper_open(&s, &cluster, "device");
    OK(step(&s));
    assert_rate_is_told(&s);

    /* An error of one call: the step fails and names it, and the worker goes on. */
    write_failure(path, 801); /* CUDA_ERROR_NOT_SUPPORTED */
    assert_int_equal(step(&s), ATTN_ERR_INTERNAL);
    assert_non_null(strstr(attn_last_error(), "cuLaunchKernelEx: CUDA_ERROR_FAKE (801)"));
    unlink(path);
    sleep_ms(300);
    OK(step(&s));

    /* One that stays: as if the worker were killed, but that it says why. */
    write_failure(path, 700); /* CUDA_ERROR_ILLEGAL_ADDRESS */
    attn_status_t status = step(&s);
    assert_true(status == ATTN_ERR_INTERNAL || status == ATTN_ERR_UNAVAILABLE ||
                status == ATTN_ERR_ABORTED);
    assert_int_equal(process_wait(&cluster.workers[0], 3000), 3);
    assert_true(process_logged(&cluster.workers[0], "worker.device_failed"));
    assert_true(
        process_logged(&cluster.workers[0], "cuLaunchKernelEx: CUDA_ERROR_ILLEGAL_ADDRESS (700)"));
    for (uint64_t end = now_ms() + 5000; alive(s.client).id != 0; sleep_ms(20)) {
        assert_true(now_ms() < end);
    }
    assert_int_not_equal(step(&s), ATTN_OK);

    /* What started it starts it again: the cluster never ended. */
    unlink(path);
    cluster_start_worker(&cluster, 0);
    stepper_close(&s);
    stepper_open(&s, &cluster, "device"); /* its region is gone, and made again */
    OK(step(&s));
    stepper_close(&s);
    cluster_down(&cluster);
    unsetenv("FAKE_CUDA_FAIL");
}

#endif

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_devices_that_are_not_there),
        cmocka_unit_test(test_a_worker_on_the_cpu),
#ifdef FAKE_CUDA
        cmocka_unit_test(test_a_slab_of_what_is_free),
        cmocka_unit_test(test_a_device_that_fails),
#endif
    };
#ifdef FAKE_CUDA
    setenv("LD_LIBRARY_PATH", FAKE_CUDA, 1);
#endif
    return cmocka_run_group_tests(tests, NULL, NULL);
}
