/*
 * exchange_gpu_test.c: the exchange between real GPUs, a process each, inboxes mapped by CUDA IPC.
 * Rows against the host's merge, bit by bit; a rank that does not come; and how long an exchange
 * and its merge take, from a CUDA graph. Where there is one GPU, the bits alone: two to four ranks
 * of one process share it, a stream and a part of its multiprocessors each.
 *
 *     exchange_gpu_test [RANKS]       as many as there are GPUs, at most 8
 *
 * Prints, for 32, 256 and 2,048 rows of 128 columns, all ranks' states complete: microseconds of a
 * launch in a graph of 20, median of 30, of the slowest rank.
 */
#include "base/status.h"
#include "kernels/cuda/cuda.h"
#include "kernels/cuda/cuda_int.h"
#include "kernels/cuda/group.h"
#include "tests/exchange/batches.h"

#include <dlfcn.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define D 128u
#define HALF (UINT64_C(64) << 20)
#define BATCHES 40
#define GRAPH 20 /* launches */
#define REPEATS 30
#define SKIPPED 77

/* What the processes have in common. */
typedef struct common {
    pthread_barrier_t barrier;
    CUipcMemHandle handles[CUDA_RANKS];
    double us[CUDA_RANKS];
} common_t;

typedef struct ipc {
    __typeof__(&cuIpcGetMemHandle) get;
    __typeof__(&cuIpcOpenMemHandle) open;
    __typeof__(&cuIpcCloseMemHandle) close;
} ipc_t;

typedef struct world {
    common_t *common;
    uint32_t ranks, me;
    const cuda_driver_t *cu;
    ipc_t ipc;
    attn_backend_t *backend;
    cuda_group_t *group;
    uint64_t mapped[CUDA_RANKS];
    CUstream stream;
    uint64_t limit_ns; /* of launches */
} world_t;

static void
must(attn_status_t status, const char *what)
{
    if (status != ATTN_OK) {
        fprintf(stderr, "%s: %s\n", what, attn_last_error());
        exit(1);
    }
}

#define MUST(call) must(cuda_check(call, #call), #call)

static void
expect(bool is_true, const char *what)
{
    if (!is_true) {
        fprintf(stderr, "failed: %s\n", what);
        exit(1);
    }
}

/* Calls of the driver here are made in the backend's context. */
static void
have_context(attn_backend_t *backend)
{
    MUST(cuda_driver()->cuCtxPushCurrent(((cuda_backend_t *)backend)->context));
}

/* ---- groups ---- */

static void
find_ipc(ipc_t *ipc)
{
    void *lib = dlopen("libcuda.so.1", RTLD_NOW);
    expect(lib != NULL, "libcuda");
    ipc->get   = (__typeof__(ipc->get))dlsym(lib, "cuIpcGetMemHandle");
    ipc->open  = (__typeof__(ipc->open))dlsym(lib, "cuIpcOpenMemHandle_v2");
    ipc->close = (__typeof__(ipc->close))dlsym(lib, "cuIpcCloseMemHandle");
    expect(ipc->get != NULL && ipc->open != NULL && ipc->close != NULL, "cuIpc*");
}

static void
join_group(world_t *w, uint64_t limit_ns)
{
    cuda_group_options_t options = {.ranks = w->ranks, .me = w->me, .head_dim_v = D, .half = HALF};
    CUdeviceptr at;

    w->limit_ns = limit_ns;
    must(cuda_group_open(w->backend, &options, &w->group), "group");
    MUST(w->ipc.get(&w->common->handles[w->me], cuda_group_inbox(w->group)));
    pthread_barrier_wait(&w->common->barrier);
    for (uint32_t r = 0; r < w->ranks; r++) {
        if (r != w->me) {
            MUST(w->ipc.open(&at, w->common->handles[r], CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS));
            w->mapped[r] = at;
        }
    }
    cuda_group_connect(w->group, w->mapped);
    pthread_barrier_wait(&w->common->barrier);
}

static void
leave_group(world_t *w)
{
    pthread_barrier_wait(&w->common->barrier); /* nobody sends any more */
    for (uint32_t r = 0; r < w->ranks; r++) {
        if (r != w->me) {
            MUST(w->ipc.close(w->mapped[r]));
        }
    }
    pthread_barrier_wait(&w->common->barrier); /* nobody has it mapped */
    cuda_group_close(w->group);
}

/* ---- states ---- */

/* A word of a state, the same wherever it is asked for. */
static uint32_t
noise(uint64_t seed, uint32_t rank, uint64_t state, uint32_t word)
{
    uint64_t x = (seed * 8 + rank) * 0x9e3779b97f4a7c15u + state * 0xbf58476d1ce4e5b9u + word;
    x          = (x ^ x >> 29) * 0x94d049bb133111ebu;
    x          = (x ^ x >> 32) * 0x9e3779b97f4a7c15u;
    return (uint32_t)(x >> 33);
}

static void
make_state(uint64_t seed, uint32_t rank, uint64_t state, float *a, float *l, int32_t *e)
{
    bool empty = noise(seed, rank, state, D) % 7 == 0;

    *l = empty ? 0.0f : (float)(1 + noise(seed, rank, state, D + 1) % 100000) / 1024.0f;
    *e = empty ? INT32_MIN : (int32_t)(noise(seed, rank, state, D + 2) % 40) - 20;
    for (uint32_t i = 0; i < D; i++) {
        a[i] = empty ? NAN : (float)((int)(noise(seed, rank, state, i) % 20001) - 10000) / 4096.0f;
    }
}

/* Device memory of a launch. */
typedef struct launch {
    cuda_exchange_plan_t plan;
    cuda_group_call_t call;
    CUdeviceptr memory;
} launch_t;

static void
make_launch(world_t *w, const batch_t *b, uint64_t seed, launch_t *launch)
{
    attn_group_entry_t entries[ENTRIES_MAX];
    cuda_exchange_batch_t batch;
    uint64_t n = b->states[w->me], rows, end = 0, at[6], none = UINT64_MAX;

    batch_of(b, w->me, HALF, entries, &batch);
    must(cuda_exchange_plan(&batch, &launch->plan), "plan");
    must(cuda_group_load(w->group, &launch->plan), "tables");
    rows                   = launch->plan.n_rows;
    const uint64_t sizes[] = {n * D * 4, n * 4, n * 4, rows * D * 4, rows * 4, 8};
    for (int i = 0; i < 6; i++) {
        at[i] = end;
        end += (sizes[i] + 255) / 256 * 256;
    }
    MUST(w->cu->cuMemAlloc(&launch->memory, end));
    float *a = malloc((n + 1) * D * 4), *l = malloc((n + 1) * 4);
    int32_t *e = malloc((n + 1) * 4);
    for (uint64_t i = 0; i < n; i++) {
        make_state(seed, w->me, i, a + i * D, l + i, e + i);
    }
    if (n > 0) {
        MUST(w->cu->cuMemcpyHtoD(launch->memory + at[0], a, sizes[0]));
        MUST(w->cu->cuMemcpyHtoD(launch->memory + at[1], l, sizes[1]));
        MUST(w->cu->cuMemcpyHtoD(launch->memory + at[2], e, sizes[2]));
    }
    MUST(w->cu->cuMemcpyHtoD(launch->memory + at[5], &none, sizeof(none)));
    free(a);
    free(l);
    free(e);
    launch->call = (cuda_group_call_t){.a        = launch->memory + at[0],
                                       .l        = launch->memory + at[1],
                                       .e        = launch->memory + at[2],
                                       .o        = launch->memory + at[3],
                                       .o_type   = ATTN_F32,
                                       .lse      = launch->memory + at[4],
                                       .error    = launch->memory + at[5],
                                       .limit_ns = w->limit_ns};
}

static void
free_launch(world_t *w, launch_t *launch)
{
    MUST(w->cu->cuMemFree(launch->memory));
    cuda_exchange_plan_free(&launch->plan);
}

/* ---- right or not ---- */

typedef struct state {
    float a[D], l;
    int32_t e;
} state_t;

static void
merge_trie(uint64_t seed, const leaf_t *leaves, uint32_t n, state_t *into)
{
    uint32_t cut = 1;
    state_t right;

    if (n == 1) {
        make_state(seed, leaves[0].rank, leaves[0].state, into->a, &into->l, &into->e);
        return;
    }
    uint32_t bit = 63u - (uint32_t)__builtin_clzll(leaves[0].key ^ leaves[n - 1].key);
    while (!(leaves[cut].key >> bit & 1)) {
        cut++;
    }
    merge_trie(seed, leaves, cut, into);
    merge_trie(seed, leaves + cut, n - cut, &right);
    attn_state_merge_row(into->a, &into->l, &into->e, right.a, right.l, right.e, D);
}

static void
check_launch(world_t *w, const batch_t *b, uint64_t seed, const launch_t *launch)
{
    uint64_t rows = launch->plan.n_rows;
    float *o = malloc((rows + 1) * D * 4), *lse = malloc((rows + 1) * 4), want[D], want_lse;

    if (rows > 0) {
        MUST(w->cu->cuMemcpyDtoH(o, launch->call.o, rows * D * 4));
        MUST(w->cu->cuMemcpyDtoH(lse, launch->call.lse, rows * 4));
    }
    for (uint64_t i = 0; i < rows; i++) {
        leaf_t leaves[CHUNKS_MAX];
        uint32_t n    = leaves_of(b, launch->plan.row_first + i, leaves);
        state_t state = {.e = INT32_MIN};
        if (n > 0) {
            merge_trie(seed, leaves, n, &state);
        }
        attn_state_finish_row(state.a, state.l, state.e, D, NULL, want, &want_lse);
        expect(memcmp(want, o + i * D, sizeof(want)) == 0, "a row has the host's bits");
        expect(memcmp(&want_lse, lse + i, 4) == 0, "an LSE has the host's bits");
    }
    free(o);
    free(lse);
}

/* Ranks that are all in this process, on one GPU. */
static void
test_bits_on_one(attn_backend_t *backend, uint32_t ranks)
{
    static world_t of[CUDA_RANKS];
    cuda_group_options_t options = {.ranks = ranks, .head_dim_v = D, .half = HALF};
    uint64_t inboxes[CUDA_RANKS];

    attn_cuda_cut_for(backend, 64 / ranks); /* CTAs of all ranks have room at once */
    for (uint32_t r = 0; r < ranks; r++) {
        of[r]      = (world_t){.ranks    = ranks,
                               .me       = r,
                               .cu       = cuda_driver(),
                               .backend  = backend,
                               .limit_ns = UINT64_C(5000000000)};
        options.me = r;
        must(cuda_group_open(backend, &options, &of[r].group), "group");
        MUST(of[r].cu->cuStreamCreate(&of[r].stream, CU_STREAM_NON_BLOCKING));
        inboxes[r] = cuda_group_inbox(of[r].group);
    }
    for (uint32_t r = 0; r < ranks; r++) {
        cuda_group_connect(of[r].group, inboxes);
    }
    for (uint64_t seed = 1; seed <= BATCHES; seed++) {
        batch_t b;
        launch_t launches[CUDA_RANKS] = {0};
        chance_seed(seed);
        make_batch(&b, ranks, chance_in(1, 64), D);
        for (uint32_t r = 0; r < ranks; r++) {
            make_launch(&of[r], &b, seed, &launches[r]);
        }
        for (uint32_t r = 0; r < ranks; r++) {
            must(cuda_group_enqueue(of[r].group, &launches[r].call, of[r].stream), "launch");
        }
        for (uint32_t r = 0; r < ranks; r++) {
            MUST(of[r].cu->cuStreamSynchronize(of[r].stream));
            must(cuda_group_check(of[r].group), "exchange");
            check_launch(&of[r], &b, seed, &launches[r]);
        }
        for (uint32_t r = 0; r < ranks; r++) {
            free_launch(&of[r], &launches[r]);
        }
    }
    for (uint32_t r = 0; r < ranks; r++) {
        of[r].cu->cuStreamDestroy(of[r].stream);
        cuda_group_close(of[r].group);
    }
    printf("bits: %d batches of %u ranks on one GPU are the host's\n", BATCHES, ranks);
}

static int
run_on_one(void)
{
    attn_backend_t *backend;

    must(attn_cuda_backend_ops.open(1, 0, &backend), "cuda");
    have_context(backend);
    for (uint32_t ranks = 2; ranks <= 4; ranks++) {
        test_bits_on_one(backend, ranks);
    }
    attn_cuda_backend_ops.close(backend);
    return 0;
}

static void
test_bits(world_t *w)
{
    join_group(w, UINT64_C(5000000000));
    for (uint64_t seed = 1; seed <= BATCHES; seed++) {
        batch_t b;
        launch_t launch = {0};
        chance_seed(seed);
        make_batch(&b, w->ranks, chance_in(1, 64), D);
        make_launch(w, &b, seed, &launch);
        must(cuda_group_enqueue(w->group, &launch.call, w->stream), "launch");
        MUST(w->cu->cuStreamSynchronize(w->stream));
        must(cuda_group_check(w->group), "exchange");
        check_launch(w, &b, seed, &launch);
        free_launch(w, &launch);
    }
    leave_group(w);
    if (w->me == 0) {
        printf("bits: %d batches on %u GPUs are the host's\n", BATCHES, w->ranks);
    }
}

/* So many rows of which each rank has a state, as of chunks that are placed by turns. */
static batch_t
whole_batch(uint32_t ranks, uint32_t rows)
{
    batch_t b = {.ranks = ranks, .q_heads = 32, .d = D, .n = 1, .rows = rows};

    b.entries[0].n_q = rows / 32;
    for (uint32_t r = 0; r < ranks; r++) {
        b.nodes[0][r][0]        = (attn_node_t){.level = 28, .index = r};
        b.entries[0].n_nodes[r] = 1;
        b.states[r]             = rows;
    }
    return b;
}

/* The last rank comes once and no more: the others end by their limit and say who it was. */
static void
test_late(world_t *w)
{
    batch_t b       = whole_batch(w->ranks, 32);
    launch_t launch = {0};

    join_group(w, UINT64_C(50000000));
    make_launch(w, &b, 7, &launch);
    for (int i = 0; i < 2; i++) {
        if (w->me + 1 < w->ranks || i == 0) {
            must(cuda_group_enqueue(w->group, &launch.call, w->stream), "launch");
        }
    }
    MUST(w->cu->cuStreamSynchronize(w->stream));
    attn_status_t status = cuda_group_check(w->group);
    if (w->me + 1 < w->ranks) {
        expect(status == ATTN_ERR_DEADLINE || status == ATTN_ERR_ABORTED, "a late rank is noticed");
    }
    leave_group(w);
    free_launch(w, &launch);
    if (w->me == 0) {
        printf("a rank that does not come: %s\n", attn_last_error());
    }
}

/* ---- time ---- */

static int
by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double
time_graph(world_t *w, const launch_t *launch)
{
    double us[REPEATS];
    CUgraph graph;
    CUgraphExec run;
    CUevent from, to;

    MUST(w->cu->cuEventCreate(&from, CU_EVENT_DEFAULT));
    MUST(w->cu->cuEventCreate(&to, CU_EVENT_DEFAULT));
    MUST(w->cu->cuStreamBeginCapture(w->stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
    for (int i = 0; i < GRAPH; i++) {
        must(cuda_group_enqueue(w->group, &launch->call, w->stream), "launch");
    }
    MUST(w->cu->cuStreamEndCapture(w->stream, &graph));
    MUST(w->cu->cuGraphInstantiateWithFlags(&run, graph, 0));
    for (int i = -3; i < REPEATS; i++) {
        float ms;
        pthread_barrier_wait(&w->common->barrier);
        MUST(w->cu->cuEventRecord(from, w->stream));
        MUST(w->cu->cuGraphLaunch(run, w->stream));
        MUST(w->cu->cuEventRecord(to, w->stream));
        MUST(w->cu->cuEventSynchronize(to));
        MUST(w->cu->cuEventElapsedTime(&ms, from, to));
        us[i < 0 ? 0 : i] = (double)ms * 1e3 / GRAPH;
    }
    must(cuda_group_check(w->group), "exchange");
    w->cu->cuGraphExecDestroy(run);
    w->cu->cuGraphDestroy(graph);
    w->cu->cuEventDestroy(from);
    w->cu->cuEventDestroy(to);
    qsort(us, REPEATS, sizeof(*us), by_size);
    return us[REPEATS / 2];
}

static void
test_time(world_t *w)
{
    static const uint32_t all[] = {32, 256, 2048};

    join_group(w, UINT64_C(2000000000));
    for (int i = 0; i < 3; i++) {
        batch_t b       = whole_batch(w->ranks, all[i]);
        launch_t launch = {0};
        make_launch(w, &b, (uint64_t)i + 1, &launch);
        w->common->us[w->me] = time_graph(w, &launch);
        check_launch(w, &b, (uint64_t)i + 1, &launch);
        free_launch(w, &launch);
        pthread_barrier_wait(&w->common->barrier);
        double worst = 0;
        for (uint32_t r = 0; r < w->ranks; r++) {
            worst = fmax(worst, w->common->us[r]);
        }
        if (w->me == 0) {
            printf("exchange and merge, %u GPUs, %u rows: %.2f us\n", w->ranks, all[i], worst);
        }
        pthread_barrier_wait(&w->common->barrier);
    }
    leave_group(w);
}

/* ---- processes ---- */

static int
run_rank(common_t *common, uint32_t ranks, uint32_t me)
{
    world_t w = {.common = common, .ranks = ranks, .me = me, .cu = cuda_driver()};

    must(attn_cuda_backend_ops.open(1, me, &w.backend), "cuda");
    have_context(w.backend);
    find_ipc(&w.ipc);
    MUST(w.cu->cuStreamCreate(&w.stream, CU_STREAM_NON_BLOCKING));
    test_bits(&w);
    test_late(&w);
    test_time(&w);
    w.cu->cuStreamDestroy(w.stream);
    attn_cuda_backend_ops.close(w.backend);
    fflush(stdout);
    return 0;
}

/* GPUs that there are, asked by a process of its own: a forked one cannot use the driver of its
 * parent. */
static uint32_t
count_gpus(void)
{
    pid_t child = fork();
    int status  = 0;

    if (child == 0) {
        int n                   = 0;
        const cuda_driver_t *cu = cuda_driver();
        _exit(cu != NULL && cu->cuDeviceGetCount(&n) == CUDA_SUCCESS ? n : 0);
    }
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? (uint32_t)WEXITSTATUS(status) : 0;
}

int
main(int argc, char **argv)
{
    uint32_t gpus = count_gpus(), ranks = argc > 1 ? (uint32_t)atoi(argv[1]) : gpus;
    pthread_barrierattr_t shared;
    pid_t ranks_at[CUDA_RANKS];
    int failed = 0, status;

    if (gpus == 1) {
        return run_on_one();
    }
    if (gpus == 0 || ranks < 2 || ranks > gpus) {
        printf("skipped: %u GPUs here\n", gpus);
        return SKIPPED;
    }
    ranks = ranks < CUDA_RANKS ? ranks : CUDA_RANKS;
    common_t *common =
        mmap(NULL, sizeof(*common), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    expect(common != MAP_FAILED, "mmap");
    pthread_barrierattr_init(&shared);
    pthread_barrierattr_setpshared(&shared, PTHREAD_PROCESS_SHARED);
    pthread_barrier_init(&common->barrier, &shared, ranks);
    for (uint32_t r = 0; r < ranks; r++) {
        ranks_at[r] = fork();
        expect(ranks_at[r] >= 0, "fork");
        if (ranks_at[r] == 0) {
            exit(run_rank(common, ranks, r));
        }
    }
    for (pid_t ended; (ended = wait(&status)) > 0;) {
        bool bad = !WIFEXITED(status) || WEXITSTATUS(status) != 0;
        for (uint32_t r = 0; r < ranks; r++) {
            ranks_at[r] = ranks_at[r] == ended ? 0 : ranks_at[r];
            if (bad && ranks_at[r] > 0) { /* it would wait for the one that failed */
                kill(ranks_at[r], SIGKILL);
            }
        }
        failed = failed || bad;
    }
    return failed;
}
