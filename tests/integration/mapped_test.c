/*
 * Runs whose tensors are in a GPU's memory, and whose worker is another process with a GPU: from
 * GPU to GPU, by memory that the worker lends; what becomes of them where it does not, or when one
 * of the two stops, is killed, or its device stands still. On a GPU, which both then share, and on
 * the fake one, where both can be made to go wrong.
 */
#include "tests/integration/cluster.h"

#undef OK
#include "tests/integration/stream_runner.h"

#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#define PEER_UNSUPPORTED ((CUresult)217)
#define OUT_OF_MEMORY ((CUresult)2)

static test_cluster_t cluster;
static const char *self; /* this program */
static char idle_file[64], hold_file[64];
static char stall_file[64], stall_here_file[64]; /* of workers, and of this process */
static bool same_gpu;                            /* as ours, of workers to come */

static void
file_there(const char *path, bool there)
{
    int fd = there ? open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0600) : -1;

    if (fd >= 0) {
        close(fd);
    } else if (!there) {
        unlink(path);
    }
}

/* ---- a cluster of a worker with a GPU, and a client ---- */

typedef struct remote {
    runner_t *r; /* whose tensors they are */
    sequence_t s;
    attn_client_t *client;
    attn_cache_t *cache;
    attn_seq_t seq;
} remote_t;

static void
cluster_with(const cluster_options_t *options)
{
    cluster_options_t o = *options;

    o.workers = 1;
    o.lost_ms = "20000"; /* a worker that stops for a while is not lost */
    o.device  = o.device != NULL ? o.device : "cuda:0";
    o.slab    = "64MiB";
    file_there(idle_file, true); /* a worker that starts measures itself */
    setenv("FAKE_CUDA_UUID", same_gpu ? "0" : "1", 1);
    setenv("FAKE_CUDA_STALL", stall_file, 1);
    cluster_up(&cluster, &o);
    unsetenv("FAKE_CUDA_UUID");
    setenv("FAKE_CUDA_STALL", stall_here_file, 1);
    file_there(idle_file, false);
}

static attn_client_t *
client_with(attn_gpu_way_t way)
{
    attn_client_options_t options;
    attn_client_t *client = NULL;

    attn_client_options_init(&options);
    options.gpu_way = way;
    OK(attn_client_open(cluster.coordinator.address, &options, &client));
    return client;
}

/* As a runner's, with room for more sequences. */
static void
open_cache(attn_client_t *client, attn_cache_t **cache_p)
{
    attn_cache_t *small;

    runner_open_cache(client, 16, &small);
    attn_geometry_t g = *attn_cache_geometry(small);
    g.region_bytes    = UINT64_C(48) << 20;
    OK(attn_cache_open(client, "mapped", &g, cache_p));
    attn_cache_close(small);
}

static void
remote_open(remote_t *x, attn_gpu_way_t way)
{
    *x        = (remote_t){.r = runner_open(16)};
    x->s      = sequence_new(x->r);
    x->client = client_with(way);
    open_cache(x->client, &x->cache);
    OK(attn_seq_create(x->cache, NULL, &x->seq));
}

static void
remote_close(remote_t *x)
{
    int contexts = 0;

    attn_cache_close(x->cache);
    attn_client_close(x->client);
    runner_close(x->r);
    if (fake.alive != NULL) {
        assert_int_equal(fake.alive(&contexts), 0);
    }
}

static attn_status_t
run(remote_t *x, attn_step_t *step, uint32_t l)
{
    views_t t = gpu_views(x->r, l);

    return attn_step_run(step, l, &t.q, &t.k, &t.v, &t.o, (float *)x->r->lse[l]);
}

/* A step of n tokens that all goes well, and answers what the CPU does. */
static void
good_step(remote_t *x, uint32_t n, attn_memory_t memory)
{
    attn_step_t *step;

    draw(x->r, n);
    send(x->r);
    OK(begin_with(x->cache, x->seq, x->s.length, n, n, memory, 0, &step));
    for (uint32_t l = 0; l < LAYERS; l++) {
        OK(run(x, step, l));
    }
    OK(attn_step_commit(step, NULL));
    compare(x->r, &x->s, n);
}

typedef struct ways {
    uint64_t staged, mapped, over_link;
    char reason[256];
    uint64_t slabs_lost;
} ways_t;

static ways_t
ways(const remote_t *x)
{
    attn_links_info_t info;

    OK(attn_client_links(x->client, &info));
    assert_int_equal(info.n_links, 1);
    ways_t w = {.staged     = info.runs_staged,
                .mapped     = info.runs_mapped,
                .over_link  = info.links[0].runs_mapped,
                .slabs_lost = info.links[0].slabs_lost};
    memcpy(w.reason, info.links[0].gpu_reason, sizeof(w.reason));
    attn_links_info_free(&info);
    return w;
}

static void
assert_ways(const remote_t *x, uint64_t staged, uint64_t mapped, const char *reason)
{
    ways_t w = ways(x);

    if (strstr(w.reason, reason) == NULL) {
        print_error("the reason is: %s; expected: %s\n", w.reason, reason);
    }
    assert_int_equal(w.staged, staged);
    assert_int_equal(w.mapped, mapped);
    assert_int_equal(w.over_link, mapped);
    assert_non_null(strstr(w.reason, reason));
    assert_true(reason[0] != '\0' || w.reason[0] == '\0');
}

/* As the worker says, by way of the coordinator. */
static attn_worker_info_t
worker(attn_client_t *client)
{
    attn_cluster_info_t info;

    OK(attn_cluster_describe(client, &info));
    attn_worker_info_t w = info.workers[0];
    attn_cluster_info_free(&info);
    return w;
}

static void
await_gpu_clients(attn_client_t *client, uint32_t n)
{
    uint64_t end = now_ms() + 10000;

    while (worker(client).gpu_clients != n && now_ms() < end) {
        sleep_ms(20);
    }
    assert_int_equal(worker(client).gpu_clients, n);
}

/* Steps through the host's memory, until that is for this reason; empty: until one is mapped. */
static void
steps_until(remote_t *x, attn_memory_t memory, const char *reason)
{
    uint64_t end = now_ms() + 10000;
    ways_t w;

    do {
        good_step(x, 1, memory);
        sleep_ms(5);
        w = ways(x);
    } while ((reason[0] != '\0' ? strstr(w.reason, reason) == NULL : w.mapped == 0) &&
             now_ms() < end);
    assert_ways(x, w.staged, reason[0] != '\0' ? 0 : LAYERS, reason);
}

/* ---- from GPU to GPU ---- */

static void
test_the_same_answers(void **state)
{
    remote_t x;

    (void)state;
    cluster_with(&(cluster_options_t){0});
    remote_open(&x, ATTN_GPU_MAPPED);
    int of_runner = fake.count != NULL ? fake.count("cuMemHostAlloc") : 0;
    good_step(&x, 1, ATTN_MEMORY_CUDA);
    good_step(&x, 3, ATTN_MEMORY_CUDA);
    good_step(&x, 64, ATTN_MEMORY_CUDA); /* the kernels for many rows */
    good_step(&x, 1, ATTN_MEMORY_AUTO);
    assert_ways(&x, 0, 4 * LAYERS, "");
    if (fake.count != NULL) { /* no memory of the host was pinned, but to look at the card */
        assert_int_equal(fake.count("cuMemHostAlloc"), of_runner + 1);
    }
    await_gpu_clients(x.client, 1);
    uint64_t end = now_ms() + 5000;
    while (worker(x.client).gpu_runs < 4 * LAYERS && now_ms() < end) {
        sleep_ms(20);
    }
    assert_int_equal(worker(x.client).gpu_runs, 4 * LAYERS);
    assert_int_equal(worker(x.client).ucx_runs, 4 * LAYERS);
    remote_close(&x);
    attn_client_t *other = client_with(ATTN_GPU_AUTO);
    await_gpu_clients(other, 0); /* it was given back */
    attn_client_close(other);
    cluster_down(&cluster);
}

static void
count_done(void *arg, attn_status_t status, const char *error)
{
    (void)error;
    atomic_fetch_add((atomic_int *)arg, status == ATTN_OK ? 1 : 1000);
}

static void
await_count(atomic_int *count, int n)
{
    uint64_t end = now_ms() + 5000;

    while (atomic_load(count) < n && now_ms() < end) {
        sleep_ms(1);
    }
    assert_int_equal(atomic_load(count), n);
}

/* Runs that nobody waits for, a layer again, one that is only stored, and one that is only asked.
 */
static void
test_all_kinds_of_runs(void **state)
{
    remote_t x;
    attn_step_t *step;
    atomic_int done = 0;

    (void)state;
    cluster_with(&(cluster_options_t){0});
    remote_open(&x, ATTN_GPU_MAPPED);
    draw(x.r, 2);
    send(x.r);
    OK(begin_with(x.cache, x.seq, 0, 2, 2, ATTN_MEMORY_CUDA, 0, &step));
    for (uint32_t l = 0; l < LAYERS; l++) {
        views_t t = gpu_views(x.r, l);
        OK(attn_step_submit(step, l, &t.q, &t.k, &t.v, &t.o, NULL, count_done, &done));
        await_count(&done, 4 * (int)l + 1);
        OK(attn_step_run(step, l, &t.q, &t.k, &t.v, &t.o, NULL));
        OK(attn_step_submit(step, l, NULL, &t.k, &t.v, NULL, NULL, count_done, &done));
        await_count(&done, 4 * (int)l + 2);
        OK(attn_step_submit(step, l, &t.q, NULL, NULL, &t.o, (float *)x.r->lse[l], count_done,
                            &done));
        await_count(&done, 4 * (int)l + 3);
        atomic_fetch_add(&done, 1);
    }
    OK(attn_step_commit(step, NULL));
    compare(x.r, &x.s, 2);

    /* What is wrong with a layer is told, and leaves the step as it was. */
    views_t t = gpu_views(x.r, 0), other = gpu_views(x.r, 1);
    OK(begin_with(x.cache, x.seq, 2, 2, 2, ATTN_MEMORY_CUDA, 0, &step));
    assert_says(attn_step_run(step, 0, &t.q, NULL, NULL, &t.o, NULL), ATTN_ERR_INCOMPLETE, "k");
    OK(attn_step_run(step, 0, &t.q, &t.k, &t.v, &t.o, NULL));
    assert_says(attn_step_run(step, 0, &t.q, &other.k, &other.v, &t.o, NULL), ATTN_ERR_CONFLICT,
                "differ");
    x.r->host[0][0] = (_Float16)(0.0f / 0.0f);
    send(x.r);
    assert_int_equal(attn_step_run(step, 0, &t.q, NULL, NULL, &t.o, NULL), ATTN_ERR_NUMERIC);
    attn_step_abort(step);
    good_step(&x, 5, ATTN_MEMORY_CUDA);

    /* A step that asks nothing, and one that brings nothing: its answer is the last token's. */
    draw(x.r, 4);
    send(x.r);
    OK(begin_with(x.cache, x.seq, x.s.length, 0, 4, ATTN_MEMORY_CUDA, 0, &step));
    for (uint32_t l = 0; l < LAYERS; l++) {
        t = gpu_views(x.r, l);
        OK(attn_step_run(step, l, NULL, &t.k, &t.v, NULL, NULL));
    }
    OK(attn_step_commit(step, NULL));
    OK(begin_with(x.cache, x.seq, x.s.length + 4, 4, 0, ATTN_MEMORY_CUDA, 0, &step));
    for (uint32_t l = 0; l < LAYERS; l++) {
        t = gpu_views(x.r, l);
        OK(attn_step_run(step, l, &t.q, NULL, NULL, &t.o, (float *)x.r->lse[l]));
    }
    OK(attn_step_commit(step, NULL));
    compare(x.r, &x.s, 4);
    assert_int_equal(ways(&x).staged, 0);
    remote_close(&x);
    cluster_down(&cluster);
}

/* Steps that are open at once have places of their own. */
static void
test_many_steps_at_once(void **state)
{
    remote_t x;
    attn_seq_t seqs[8];
    attn_step_t *steps[8];

    (void)state;
    cluster_with(&(cluster_options_t){0});
    remote_open(&x, ATTN_GPU_MAPPED);
    draw(x.r, 8);
    send(x.r);
    for (uint32_t i = 0; i < 8; i++) {
        OK(attn_seq_create(x.cache, NULL, &seqs[i]));
        OK(begin_with(x.cache, seqs[i], 0, 1, 1, ATTN_MEMORY_CUDA, 0, &steps[i]));
    }
    for (uint32_t l = 0; l < LAYERS; l++) {
        for (uint32_t i = 0; i < 8; i++) { /* token i, whose answer is its v */
            views_t t = views_of((_Float16 *)x.r->rows[l] + i * ROW, (float *)x.r->o[l] + i * ROW_Q,
                                 ATTN_MEMORY_CUDA);
            OK(attn_step_run(steps[i], l, &t.q, &t.k, &t.v, &t.o, NULL));
        }
    }
    for (uint32_t i = 0; i < 8; i++) {
        OK(attn_step_commit(steps[i], NULL));
        for (uint32_t l = 0; l < LAYERS; l++) {
            float answer[ROW_Q];
            CU(cuMemcpyDtoH(answer, (CUdeviceptr)((float *)x.r->o[l] + i * ROW_Q), sizeof(answer)));
            for (uint32_t c = 0; c < ROW_Q; c++) {
                uint32_t kv_head = c / DIM / (Q_HEADS / KV_HEADS);
                uint32_t at      = i * ROW + ROW_Q + ROW_KV + kv_head * DIM + c % DIM;
                assert_true(fabsf(answer[c] - (float)x.r->host[l][at]) < 1e-4f);
            }
        }
    }
    assert_ways(&x, 0, 8 * LAYERS, "");
    remote_close(&x);
    cluster_down(&cluster);
}

/* A caller that does not say where its tensors will be has memory lent once some were a GPU's. */
static void
test_of_any_memory(void **state)
{
    remote_t x;
    attn_step_t *step;
    static float o[ROW_Q];

    (void)state;
    if (fake.count == NULL) {
        return; /* they may share a GPU */
    }
    cluster_with(&(cluster_options_t){0});
    remote_open(&x, ATTN_GPU_AUTO);
    good_step(&x, 1, ATTN_MEMORY_AUTO);
    assert_ways(&x, LAYERS, 0, "was not asked for when the step began");
    steps_until(&x, ATTN_MEMORY_AUTO, "");
    good_step(&x, 1, ATTN_MEMORY_AUTO);
    uint64_t staged = ways(&x).staged;
    assert_ways(&x, staged, 2 * LAYERS, "");

    /* All runs of a step alike: as the first. */
    views_t gpu = gpu_views(x.r, 0), host = views_of(x.r->host[0], o, ATTN_MEMORY_AUTO);
    OK(begin_with(x.cache, x.seq, x.s.length, 1, 1, ATTN_MEMORY_AUTO, 0, &step));
    OK(attn_step_run(step, 0, &gpu.q, &gpu.k, &gpu.v, &gpu.o, NULL));
    assert_says(attn_step_run(step, 1, &host.q, &host.k, &host.v, &host.o, NULL), ATTN_ERR_INVALID,
                "alike");
    attn_step_abort(step);
    OK(begin_with(x.cache, x.seq, x.s.length, 1, 1, ATTN_MEMORY_AUTO, 0, &step));
    OK(attn_step_run(step, 0, NULL, &host.k, &host.v, NULL, NULL));
    OK(attn_step_run(step, 0, &gpu.q, NULL, NULL, &gpu.o, (float *)x.r->lse[0]));
    OK(run(&x, step, 1)); /* through the host, too */
    OK(attn_step_commit(step, NULL));
    compare(x.r, &x.s, 1);
    assert_ways(&x, staged + 2, 2 * LAYERS + 1, "first run were in the host's memory");
    remote_close(&x);

    /* Who insists is told so. */
    remote_open(&x, ATTN_GPU_MAPPED);
    gpu  = gpu_views(x.r, 0);
    host = views_of(x.r->host[0], o, ATTN_MEMORY_AUTO);
    OK(begin_with(x.cache, x.seq, 0, 1, 1, ATTN_MEMORY_AUTO, 0, &step));
    OK(attn_step_run(step, 0, NULL, &host.k, &host.v, NULL, NULL));
    assert_says(attn_step_run(step, 0, &gpu.q, NULL, NULL, &gpu.o, NULL), ATTN_ERR_UNSUPPORTED,
                "alike");
    attn_step_abort(step);
    remote_close(&x);
    cluster_down(&cluster);
}

/* Where both share a GPU, what is small goes through the host, unless the caller insists. */
static void
test_a_gpu_that_is_shared(void **state)
{
    enum { MUCH = 2048 };
    remote_t x;
    attn_step_t *step;
    CUdeviceptr rows;

    (void)state;
    if (fake.count == NULL) {
        return;
    }
    same_gpu = true;
    cluster_with(&(cluster_options_t){0});
    same_gpu = false;
    remote_open(&x, ATTN_GPU_AUTO);
    steps_until(&x, ATTN_MEMORY_CUDA, "on the same GPU");
    good_step(&x, 64, ATTN_MEMORY_CUDA);
    assert_ways(&x, ways(&x).staged, 0, "on the same GPU");

    CU(cuMemAlloc(&rows, MUCH * ROW_KV * 2));
    attn_tensor_t kv = {.data = (void *)rows, .dtype = ATTN_F16, .memory = ATTN_MEMORY_CUDA};
    uint64_t end     = now_ms() + 10000;
    for (uint32_t n = MUCH / 2; n == MUCH / 2 || (ways(&x).mapped == 0 && now_ms() < end);
         n          = MUCH) { /* half of a MiB, and all of it until that is mapped */
        OK(begin_with(x.cache, x.seq, x.s.length, 0, n, ATTN_MEMORY_CUDA, 0, &step));
        OK(attn_step_run(step, 0, NULL, &kv, &kv, NULL, NULL));
        attn_step_abort(step);
        assert_true(n == MUCH || strstr(ways(&x).reason, "on the same GPU") != NULL);
    }
    CU(cuMemFree(rows));
    assert_ways(&x, ways(&x).staged, 1, "");
    good_step(&x, 1, ATTN_MEMORY_CUDA);
    assert_ways(&x, ways(&x).staged, 1, "on the same GPU");
    remote_close(&x);
    remote_open(&x, ATTN_GPU_MAPPED);
    good_step(&x, 1, ATTN_MEMORY_CUDA);
    assert_ways(&x, 0, LAYERS, "");
    remote_close(&x);
    cluster_down(&cluster);
}

/* ---- where it cannot be ---- */

static void
without(const cluster_options_t *options, const char *reason)
{
    attn_step_t *step;
    remote_t x;

    cluster_with(options);
    remote_open(&x, ATTN_GPU_AUTO);
    steps_until(&x, ATTN_MEMORY_CUDA, reason);
    good_step(&x, 64, ATTN_MEMORY_CUDA);
    assert_ways(&x, ways(&x).staged, 0, reason);
    remote_close(&x);

    remote_open(&x, ATTN_GPU_MAPPED);
    send(x.r);
    OK(begin_with(x.cache, x.seq, 0, 1, 1, ATTN_MEMORY_CUDA, 0, &step));
    assert_says(run(&x, step, 0), ATTN_ERR_UNSUPPORTED, "gpu_way is mapped");
    assert_non_null(strstr(attn_last_error(), reason));
    attn_step_abort(step);
    remote_close(&x);
    cluster_down(&cluster);
}

static void
test_a_worker_that_lends_none(void **state)
{
    (void)state;
    without(&(cluster_options_t){.gpu_lend = "0"}, "lends no memory of a GPU");
    without(&(cluster_options_t){.device = "cpu"}, "lends no memory of a GPU");
    if (fake.count != NULL) {
        setenv("FAKE_CUDA_IPC", "none", 1);
        without(&(cluster_options_t){0}, "cuIpcGetMemHandle");
        setenv("FAKE_CUDA_IPC", "other", 1);
        without(&(cluster_options_t){0}, "is not the memory that it lent");
        unsetenv("FAKE_CUDA_IPC");
    }
}

static void
test_a_client_that_cannot_map(void **state)
{
    remote_t x;

    (void)state;
    if (fake.spoil == NULL) {
        return;
    }
    cluster_with(&(cluster_options_t){0});
    remote_open(&x, ATTN_GPU_AUTO);
    fake.spoil("cuIpcOpenMemHandle", PEER_UNSUPPORTED, 1);
    steps_until(&x, ATTN_MEMORY_CUDA, "cannot reach each other's memory");
    sleep_ms(1100); /* which is not tried again */
    good_step(&x, 2, ATTN_MEMORY_CUDA);
    good_step(&x, 2, ATTN_MEMORY_CUDA);
    assert_ways(&x, ways(&x).staged, 0, "cannot reach each other's memory");
    remote_close(&x);
    remote_open(&x, ATTN_GPU_AUTO);
    fake.spoil("cuIpcOpenMemHandle", OUT_OF_MEMORY, 1);
    steps_until(&x, ATTN_MEMORY_CUDA, "CUDA error 2");
    steps_until(&x, ATTN_MEMORY_CUDA, ""); /* this is */
    remote_close(&x);
    remote_open(&x, ATTN_GPU_STAGED);
    await_gpu_clients(x.client, 0);
    good_step(&x, 2, ATTN_MEMORY_CUDA);
    assert_ways(&x, LAYERS, 0, "gpu_way is staged");
    assert_int_equal(worker(x.client).gpu_clients, 0); /* it was not asked for */
    remote_close(&x);
    cluster_down(&cluster);
}

/* All that the worker may lend is lent: who is refused asks again. */
static void
test_memory_that_is_lent_already(void **state)
{
    remote_t x, y;

    (void)state;
    if (fake.count == NULL) {
        return; /* they may share a GPU */
    }
    cluster_with(&(cluster_options_t){.gpu_lend = "36MiB"}); /* as a slab and lanes */
    remote_open(&x, ATTN_GPU_MAPPED);
    good_step(&x, 1, ATTN_MEMORY_CUDA);
    y        = (remote_t){.r = x.r, .s = sequence_new(x.r)};
    y.client = client_with(ATTN_GPU_AUTO);
    open_cache(y.client, &y.cache);
    OK(attn_seq_create(y.cache, NULL, &y.seq));
    steps_until(&y, ATTN_MEMORY_CUDA, "above gpu-lend");
    attn_cache_close(x.cache);
    attn_client_close(x.client);
    steps_until(&y, ATTN_MEMORY_CUDA, "");
    await_gpu_clients(y.client, 1);
    remote_close(&y);
    cluster_down(&cluster);
}

static void
test_a_way_that_is_none(void **state)
{
    attn_client_options_t options;
    attn_client_t *client;

    (void)state;
    attn_client_options_init(&options);
    options.gpu_way = (attn_gpu_way_t)9;
    assert_says(attn_client_open("inproc://cpu", &options, &client), ATTN_ERR_INVALID, "gpu_way");
    setenv("ATTN_GPU_WAY", "pigeon", 1);
    assert_says(attn_client_open("inproc://cpu", NULL, &client), ATTN_ERR_INVALID, "pigeon");
    setenv("ATTN_GPU_WAY", "mapped", 1);
    OK(attn_client_open("inproc://cpu", NULL, &client));
    attn_client_close(client);
    unsetenv("ATTN_GPU_WAY");
}

/* ---- peers that stop, stand still, or are killed ---- */

/* The worker stops amid a run, and goes on: the slab is given up, for an answer may come into it.
 */
static void
test_a_worker_that_stops(void **state)
{
    remote_t x;
    attn_step_t *step;

    (void)state;
    cluster_with(&(cluster_options_t){0});
    remote_open(&x, ATTN_GPU_MAPPED);
    good_step(&x, 2, ATTN_MEMORY_CUDA);
    OK(begin_with(x.cache, x.seq, 2, 2, 2, ATTN_MEMORY_CUDA, 500, &step));
    OK(run(&x, step, 0));
    process_signal(&cluster.workers[0], SIGSTOP);
    uint64_t start       = now_ms();
    attn_status_t status = run(&x, step, 1);
    assert_true(status == ATTN_ERR_DEADLINE || status == ATTN_ERR_UNAVAILABLE);
    assert_true(now_ms() - start <= 500 + 250);
    process_signal(&cluster.workers[0], SIGCONT);
    attn_step_abort(step);
    sleep_ms(200);
    good_step(&x, 2, ATTN_MEMORY_CUDA);
    assert_int_equal(ways(&x).slabs_lost, 1);
    assert_int_equal(ways(&x).staged, 0);
    await_gpu_clients(x.client, 1); /* the former slab's is gone */
    remote_close(&x);
    cluster_down(&cluster);
}

/* Its device stands still: what was asked ends in time, and nothing is given to others before what
 * was queued has run. */
static void
test_a_device_that_stands_still(void **state)
{
    remote_t x;
    attn_step_t *step;

    (void)state;
    if (fake.hold == NULL) {
        return;
    }
    cluster_with(&(cluster_options_t){0});
    remote_open(&x, ATTN_GPU_MAPPED);
    good_step(&x, 2, ATTN_MEMORY_CUDA);
    OK(begin_with(x.cache, x.seq, 2, 2, 2, ATTN_MEMORY_CUDA, 400, &step));
    process_signal(&cluster.workers[0], SIGSTOP);
    views_t t       = gpu_views(x.r, 0);
    atomic_int done = 0;
    OK(attn_step_submit(step, 0, &t.q, &t.k, &t.v, &t.o, NULL, count_done, &done));
    sleep_ms(50); /* q, k and v are there */
    file_there(hold_file, true);
    process_signal(&cluster.workers[0], SIGCONT);
    await_count(&done, 1000);
    attn_step_abort(step);
    sleep_ms(1600); /* longer than an abort waits, and until the coordinator would have heard */
    assert_int_equal(worker(x.client).gpu_clients, 1);
    file_there(hold_file, false);
    await_gpu_clients(x.client, 0);
    good_step(&x, 2, ATTN_MEMORY_CUDA);
    assert_int_equal(ways(&x).slabs_lost, 1);
    remote_close(&x);
    cluster_down(&cluster);
}

/* Its driver does not return from a call that takes memory to be lent: no step waits for that, but
 * one whose client insists, and nothing else of the worker's. */
static void
test_a_driver_that_stands_still(void **state)
{
    remote_t x, y;
    attn_step_t *step;

    (void)state;
    if (fake.hold == NULL) {
        return;
    }
    cluster_with(&(cluster_options_t){0});
    remote_open(&x, ATTN_GPU_AUTO);
    file_there(stall_file, true);
    for (uint32_t i = 0; i < 3; i++) {
        uint64_t start = now_ms();
        good_step(&x, 1, ATTN_MEMORY_CUDA);
        assert_true(now_ms() - start < 1000);
        assert_non_null(strstr(ways(&x).reason, "did not say yet"));
    }
    y        = (remote_t){.r = x.r, .s = sequence_new(x.r)};
    y.client = client_with(ATTN_GPU_MAPPED);
    open_cache(y.client, &y.cache);
    OK(attn_seq_create(y.cache, NULL, &y.seq));
    OK(begin_with(y.cache, y.seq, 0, 1, 1, ATTN_MEMORY_CUDA, 4000, &step));
    assert_says(run(&y, step, 0), ATTN_ERR_UNSUPPORTED, "did not say yet");
    attn_step_abort(step);
    attn_cache_close(y.cache);
    attn_client_close(y.client); /* and its worker finds nobody to lend to */
    good_step(&x, 1, ATTN_MEMORY_CUDA);
    file_there(stall_file, false);
    steps_until(&x, ATTN_MEMORY_CUDA, "");
    await_gpu_clients(x.client, 1);
    remote_close(&x);
    cluster_down(&cluster);
}

/* The client's, when it maps that memory: who submits a run does not wait for it, nor any step of a
 * client that does not insist. */
static void
test_a_map_that_is_late(void **state)
{
    remote_t x;
    attn_step_t *step;
    atomic_int done = 0;

    (void)state;
    if (fake.hold == NULL) {
        return;
    }
    cluster_with(&(cluster_options_t){0});
    remote_open(&x, ATTN_GPU_MAPPED);
    draw(x.r, 2);
    send(x.r);
    OK(begin_with(x.cache, x.seq, 0, 2, 2, ATTN_MEMORY_CUDA, 0, &step));
    attn_step_abort(step); /* it is lent */
    file_there(stall_here_file, true);
    for (uint32_t i = 0; i < 2; i++) { /* the first ends by its deadline */
        OK(begin_with(x.cache, x.seq, 0, 2, 2, ATTN_MEMORY_CUDA, i == 0 ? 2000 : 0, &step));
        views_t t      = gpu_views(x.r, 0);
        uint64_t start = now_ms();
        OK(attn_step_submit(step, 0, &t.q, &t.k, &t.v, &t.o, (float *)x.r->lse[0], count_done,
                            &done));
        assert_true(now_ms() - start < 1000);
        if (i == 0) {
            await_count(&done, 1000);
            assert_true(now_ms() - start < 2000 + 1000);
            attn_step_abort(step);
        }
    }
    assert_int_equal(atomic_load(&done), 1000);
    file_there(stall_here_file, false);
    await_count(&done, 1001);
    OK(run(&x, step, 1));
    OK(attn_step_commit(step, NULL));
    compare(x.r, &x.s, 2);
    assert_ways(&x, 0, LAYERS, "");
    remote_close(&x);

    remote_open(&x, ATTN_GPU_AUTO);
    file_there(stall_here_file, true);
    steps_until(&x, ATTN_MEMORY_CUDA, "is not mapped for GPU 0 yet");
    file_there(stall_here_file, false);
    steps_until(&x, ATTN_MEMORY_CUDA, "");
    remote_close(&x);
    cluster_down(&cluster);
}

/* The client's does: nobody else gets the place that its copies go to. */
static void
test_copies_that_are_late(void **state)
{
    remote_t x;
    attn_step_t *step;

    (void)state;
    if (fake.hold_all == NULL) {
        return;
    }
    cluster_with(&(cluster_options_t){0});
    remote_open(&x, ATTN_GPU_MAPPED);
    send(x.r);
    OK(begin_with(x.cache, x.seq, 0, 2, 2, ATTN_MEMORY_CUDA, 0, &step));
    attn_step_abort(step);             /* it is lent */
    for (uint32_t i = 0; i < 2; i++) { /* what was lent is looked at by copies, too */
        OK(begin_with(x.cache, x.seq, 0, 2, 2, ATTN_MEMORY_CUDA, 1000, &step));
        fake.hold_all(1);
        uint64_t start = now_ms();
        assert_says(run(&x, step, 0), ATTN_ERR_DEADLINE, "before the deadline");
        assert_true(now_ms() - start < 1000 + 1000);
        attn_step_abort(step);
    }
    fake.hold_all(0);
    good_step(&x, 2, ATTN_MEMORY_CUDA);
    uint64_t lost = ways(&x).slabs_lost;

    OK(begin_with(x.cache, x.seq, 2, 2, 2, ATTN_MEMORY_CUDA, 1000, &step));
    fake.hold_all(1);
    assert_says(run(&x, step, 0), ATTN_ERR_DEADLINE, "did not end before the deadline");
    attn_step_abort(step);
    assert_int_equal(ways(&x).slabs_lost, lost + 1);
    fake.hold_all(0);
    good_step(&x, 2, ATTN_MEMORY_CUDA);
    assert_int_equal(ways(&x).slabs_lost, lost + 1);
    await_gpu_clients(x.client, 1);

    /* The client may close while copies are late: their memory is there until they ended. */
    OK(begin_with(x.cache, x.seq, 4, 2, 2, ATTN_MEMORY_CUDA, 1000, &step));
    fake.hold_all(1);
    assert_says(run(&x, step, 0), ATTN_ERR_DEADLINE, "did not end before the deadline");
    attn_step_abort(step);
    attn_cache_close(x.cache);
    attn_client_close(x.client);
    fake.hold_all(0);
    x.client = client_with(ATTN_GPU_AUTO);
    open_cache(x.client, &x.cache);
    await_gpu_clients(x.client, 0);
    OK(attn_seq_create(x.cache, NULL, &x.seq));
    OK(attn_seq_create(x.r->on_cpu, NULL, &x.s.cpu));
    x.s.length = 0;
    good_step(&x, 1, ATTN_MEMORY_CUDA); /* whose copies find what the others left */
    remote_close(&x);
    cluster_down(&cluster);
}

static void
test_a_worker_that_is_killed(void **state)
{
    remote_t x;
    attn_step_t *step;

    (void)state;
    cluster_with(&(cluster_options_t){0});
    remote_open(&x, ATTN_GPU_MAPPED);
    good_step(&x, 2, ATTN_MEMORY_CUDA);
    OK(begin_with(x.cache, x.seq, 2, 2, 2, ATTN_MEMORY_CUDA, 4000, &step));
    OK(run(&x, step, 0));
    uint64_t start = now_ms();
    file_there(stall_here_file, true);
    process_kill(&cluster.workers[0]);
    attn_status_t status = run(&x, step, 1);
    assert_true(status != ATTN_OK);
    assert_true(now_ms() - start < 4250);
    attn_step_abort(step);
    assert_true(now_ms() - start < 4250 + 1000); /* while the driver may wait to unmap */
    (void)worker(x.client);
    file_there(stall_here_file, false);
    remote_close(&x); /* nothing is left mapped */
    cluster_down(&cluster);
}

/* ---- two clients at once ---- */

/* In a process of its own, started anew, for a driver does not survive a fork: steps until it is
 * told to end, or is killed amid them. */
static int
be_a_client(const char *coordinator)
{
    remote_t x;

    snprintf(cluster.coordinator.address, sizeof(cluster.coordinator.address), "%s", coordinator);
    if (runner_driver() != 0) {
        return 1;
    }
    remote_open(&x, ATTN_GPU_MAPPED);
    good_step(&x, 3, ATTN_MEMORY_CUDA);
    dprintf(atoi(getenv("ATTND_READY_FD")), "ready\n");
    for (;;) {
        good_step(&x, 1, ATTN_MEMORY_CUDA);
        if (x.s.length > 2000) {
            return 0;
        }
    }
}

static void
test_two_clients_one_is_killed(void **state)
{
    remote_t x;
    process_t other;
    const char *argv[4] = {self, "client", NULL};

    (void)state;
    cluster_with(&(cluster_options_t){0});
    remote_open(&x, ATTN_GPU_MAPPED);
    argv[2] = cluster.coordinator.address;
    for (uint32_t round = 0; round < 2; round++) {
        process_start(&other, argv);
        process_wait_ready(&other);
        for (uint32_t i = 0; i < 10; i++) {
            good_step(&x, 1, ATTN_MEMORY_CUDA);
        }
        await_gpu_clients(x.client, 2);
        assert_int_equal(process_wait(&other, 0), -1); /* its answers are right so far */
        process_kill(&other);
        await_gpu_clients(x.client, 1);
        unlink(other.log);
        good_step(&x, 2, ATTN_MEMORY_CUDA);
    }
    assert_int_equal(ways(&x).staged, 0);
    remote_close(&x);
    cluster_down(&cluster);
}

int
main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_the_same_answers),
        cmocka_unit_test(test_all_kinds_of_runs),
        cmocka_unit_test(test_many_steps_at_once),
        cmocka_unit_test(test_of_any_memory),
        cmocka_unit_test(test_a_gpu_that_is_shared),
        cmocka_unit_test(test_a_worker_that_lends_none),
        cmocka_unit_test(test_a_client_that_cannot_map),
        cmocka_unit_test(test_memory_that_is_lent_already),
        cmocka_unit_test(test_a_way_that_is_none),
        cmocka_unit_test(test_a_worker_that_stops),
        cmocka_unit_test(test_a_device_that_stands_still),
        cmocka_unit_test(test_a_driver_that_stands_still),
        cmocka_unit_test(test_a_map_that_is_late),
        cmocka_unit_test(test_copies_that_are_late),
        cmocka_unit_test(test_a_worker_that_is_killed),
        cmocka_unit_test(test_two_clients_one_is_killed),
    };

    self = argv[0];
    setenv("ATTN_TRANSPORT", "ucx", 1);
    if (argc == 3 && strcmp(argv[1], "client") == 0) {
        return be_a_client(argv[2]);
    }
    snprintf(idle_file, sizeof(idle_file), "/tmp/attn-mapped-idle-%d", (int)getpid());
    snprintf(hold_file, sizeof(hold_file), "/tmp/attn-mapped-hold-%d", (int)getpid());
    setenv("FAKE_CUDA_IDLE", idle_file, 1);
    snprintf(stall_file, sizeof(stall_file), "/tmp/attn-mapped-stall-%d", (int)getpid());
    snprintf(stall_here_file, sizeof(stall_here_file), "/tmp/attn-mapped-here-%d", (int)getpid());
    setenv("FAKE_CUDA_HOLD", hold_file, 1);
    setenv("FAKE_CUDA_STALL", stall_here_file, 1);
    int skipped = runner_driver();
    unlink(idle_file);
    unlink(stall_file);
    unlink(stall_here_file);
    return skipped != 0 ? skipped
                        : cmocka_run_group_tests_name("integration.mapped", tests, NULL, NULL);
}
