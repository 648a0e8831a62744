/*
 * groups.c: the row of the table for groups: inboxes mapped by CUDA IPC, an exchange behind an
 * attend on its stream, and the share of the answer down.
 *
 * What a group had stays for the next: others may have its inbox mapped still, and CUDA leaves open
 * what comes of that when memory goes back to the driver; and a driver that frees memory may wait
 * for the device. The inbox that was left first is used first, and none before there are enough of
 * them, so that who was held up seldom writes into another group's.
 *
 * While an exchange waits for other ranks its CTAs stay on their multiprocessors. Those of all
 * groups that a device may be in find room side by side, and leave half of it to others: otherwise
 * one group's could keep away what another's waits for, here and on another device in turn, and
 * both would wait until their steps' deadlines.
 */
#include "kernels/cuda/group.h"

#include "base/checked.h"
#include "base/clock.h"
#include "kernels/cuda/cuda_int.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#define HALVES 2u                         /* of the multiprocessors: one is for exchanges */
#define PINNED_MAX (UINT64_C(4) << 20)    /* of an answer that goes through pinned memory */
#define ROOM_MIN (UINT64_C(64) << 10)     /* of the answer, so that it seldom grows */
#define LIMIT_MIN_NS (1 * ATTN_NS_PER_MS) /* of the waits of an exchange that is late already */
#define LEFT_MIN (2 * ATTN_GROUPS_MAX)    /* that are not used again as long as there is room */

/* In front of the share's O and LSE, on the device and on the host. */
typedef struct answer_head {
    uint64_t error;
    uint64_t pad;
    cuda_exchange_control_t control;
} answer_head_t;

struct attn_group {
    cuda_backend_t *backend;
    attn_group_options_t options;
    cuda_group_t *group;
    uint64_t mapped[CUDA_RANKS]; /* other ranks' inboxes; 0: not mapped */
    cuda_exchange_plan_t plan;   /* of the batch */
    CUdeviceptr answer;          /* [room]: a head, O, LSE */
    uint64_t room;
    bool clean;    /* the head's error is all ones */
    uint8_t *host; /* pinned, the first of it */
    uint64_t host_room;
    attn_group_t *next; /* among those left */
};

/* ---- making ---- */

/* The one with room for such halves that was left first, if so many are left; or NULL. */
static attn_group_t *
take_left(cuda_backend_t *backend, uint64_t half, uint32_t least)
{
    attn_group_t **found = NULL, *g = NULL;
    uint32_t left = 0;

    pthread_mutex_lock(&backend->lock);
    for (attn_group_t **at = &backend->groups_left; *at != NULL; at = &(*at)->next) {
        left++;
        if (found == NULL && cuda_group_half_max((*at)->group) >= half) {
            found = at;
        }
    }
    if (found != NULL && left >= least) {
        g      = *found;
        *found = g->next;
    }
    pthread_mutex_unlock(&backend->lock);
    return g;
}

/* Behind all others. */
static void
leave(cuda_backend_t *backend, attn_group_t *g)
{
    attn_group_t **at = &backend->groups_left;

    pthread_mutex_lock(&backend->lock);
    while (*at != NULL) {
        at = &(*at)->next;
    }
    g->next = NULL;
    *at     = g;
    pthread_mutex_unlock(&backend->lock);
}

/* May there be so many bytes of inboxes more? */
static attn_status_t
add_inbox(cuda_backend_t *backend, uint64_t bytes)
{
    pthread_mutex_lock(&backend->lock);
    bool fits = bytes <= ATTN_INBOXES_MAX - backend->inbox_bytes;
    backend->inbox_bytes += fits ? bytes : 0;
    pthread_mutex_unlock(&backend->lock);
    return fits ? ATTN_OK
                : attn_fail(
                      ATTN_ERR_EXHAUSTED,
                      "no inbox of cuda:%d that is free has %llu bytes, and with one more they "
                      "would have more than %llu",
                      backend->ordinal, (unsigned long long)bytes,
                      (unsigned long long)ATTN_INBOXES_MAX);
}

static attn_status_t
group_new(cuda_backend_t *backend, const cuda_group_options_t *options, attn_group_t **group_p)
{
    uint64_t bytes       = cuda_inbox_bytes(options->half);
    attn_status_t status = add_inbox(backend, bytes);
    attn_group_t *g;

    if (status != ATTN_OK) {
        return status;
    }
    g      = calloc(1, sizeof(*g));
    status = g != NULL ? cuda_group_open(&backend->base, options, &g->group)
                       : attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a group of GPUs");
    if (status != ATTN_OK) {
        free(g);
        pthread_mutex_lock(&backend->lock);
        backend->inbox_bytes -= bytes;
        pthread_mutex_unlock(&backend->lock);
        return status;
    }
    g->backend = backend;
    *group_p   = g;
    return ATTN_OK;
}

static attn_status_t
groups_open(attn_backend_t *base, const attn_group_options_t *o, attn_group_t **group_p)
{
    cuda_backend_t *backend      = (cuda_backend_t *)base;
    uint32_t places              = HALVES * ATTN_GROUPS_MAX;
    cuda_group_options_t options = {
        .id         = o->id,
        .ranks      = o->ranks,
        .me         = o->me,
        .head_dim_v = o->head_dim_v,
        .half       = o->half_bytes,
        .ctas_max   = (uint32_t)attn_max((uint32_t)backend->processors / places, 1),
    };
    attn_status_t status = ATTN_OK;
    attn_group_t *g      = take_left(backend, o->half_bytes, LEFT_MIN);
    bool again           = g != NULL;

    if (!again && (status = group_new(backend, &options, &g)) != ATTN_OK) {
        g     = take_left(backend, o->half_bytes, 0);
        again = g != NULL;
    }
    if (again && (status = cuda_group_again(g->group, &options)) != ATTN_OK) {
        leave(backend, g);
    }
    if (status == ATTN_OK) {
        g->options = *o;
        *group_p   = g;
    }
    return status;
}

static attn_status_t
groups_handle(attn_group_t *g, uint8_t handle[ATTN_INBOX_HANDLE])
{
    CUipcMemHandle ipc;
    CUDA_VISIT(g->backend);

    _Static_assert(sizeof(ipc) + CUDA_CARD == ATTN_INBOX_HANDLE, "the driver's, and a card");
    attn_status_t status = visit.status;
    if (status == ATTN_OK) {
        status = CUDA_CALL(cuIpcGetMemHandle(&ipc, cuda_group_inbox(g->group)));
    }
    if (status == ATTN_OK) {
        memcpy(handle, &ipc, sizeof(ipc));
        memcpy(handle + sizeof(ipc), cuda_group_card(g->group), CUDA_CARD);
    }
    return status;
}

static void
groups_device(attn_backend_t *base, char device[ATTN_GROUP_DEVICE])
{
    cuda_backend_t *backend = (cuda_backend_t *)base;

    if (CUDA_CALL(cuDeviceGetPCIBusId(device, ATTN_GROUP_DEVICE, backend->device)) != ATTN_OK) {
        device[0] = '\0';
    }
}

static void
disconnect(attn_group_t *g)
{
    CUDA_VISIT(g->backend);

    cuda_group_leave(g->group);
    for (uint32_t r = 0; r < g->options.ranks; r++) {
        if (g->mapped[r] != 0 && visit.status == ATTN_OK) {
            g->backend->cu->cuIpcCloseMemHandle(g->mapped[r]);
        }
        g->mapped[r] = 0;
    }
}

static attn_status_t
groups_connect(attn_group_t *g, const uint8_t (*handles)[ATTN_INBOX_HANDLE])
{
    CUDA_VISIT(g->backend);
    attn_status_t status = visit.status;

    for (uint32_t r = 0; r < g->options.ranks && status == ATTN_OK; r++) {
        CUipcMemHandle ipc;
        CUdeviceptr at;
        if (r == g->options.me || g->mapped[r] != 0) {
            continue;
        }
        memcpy(&ipc, handles[r], sizeof(ipc));
        status = CUDA_CALL(cuIpcOpenMemHandle(&at, ipc, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS));
        if (status != ATTN_OK) {
            return attn_fail_in(ATTN_ERR_UNSUPPORTED, "rank %u's inbox is not mapped: ", r);
        }
        g->mapped[r] = at;
        status       = cuda_group_check_card(g->group, at, handles[r] + sizeof(ipc));
        if (status != ATTN_OK) {
            return attn_fail_in(status, "rank %u: ", r);
        }
    }
    if (status == ATTN_OK) {
        cuda_group_connect(g->group, g->mapped);
    }
    return status;
}

static void
drop_room(attn_group_t *g)
{
    if (g->answer != 0) {
        g->backend->cu->cuMemFree(g->answer);
        g->backend->cu->cuMemFreeHost(g->host);
    }
    g->answer = 0;
    g->host   = NULL;
    g->room = g->host_room = 0;
    g->clean               = false;
}

/* What its steps needed is kept if it is not much. */
static void
groups_close(attn_group_t *g)
{
    CUDA_VISIT(g->backend);

    disconnect(g);
    if (visit.status == ATTN_OK && g->room > PINNED_MAX) {
        drop_room(g);
    }
    cuda_exchange_plan_free(&g->plan);
    leave(g->backend, g);
}

void
cuda_groups_free(cuda_backend_t *backend)
{
    for (attn_group_t *g = backend->groups_left, *next; g != NULL; g = next) {
        next = g->next;
        drop_room(g);
        cuda_group_close(g->group);
        free(g);
    }
}

/* ---- a step ---- */

/* Room for an answer of so many bytes: it grows by doubling, for freeing may wait for the device.
 */
static attn_status_t
take_room(attn_group_t *g, uint64_t bytes)
{
    uint64_t room = attn_max(g->room, ROOM_MIN);
    CUDA_VISIT(g->backend);
    attn_status_t status = visit.status;

    while (room < bytes) {
        room *= 2;
    }
    if (status != ATTN_OK || room == g->room) {
        return status;
    }
    drop_room(g);
    uint64_t pinned = attn_min(room, PINNED_MAX);
    if ((status = CUDA_CALL(cuMemHostAlloc((void **)&g->host, pinned, 0))) == ATTN_OK &&
        (status = CUDA_CALL(cuMemAlloc(&g->answer, room))) == ATTN_OK) {
        g->room      = room;
        g->host_room = pinned;
    } else if (g->host != NULL) {
        g->backend->cu->cuMemFreeHost(g->host);
        g->host = NULL;
    }
    return status;
}

static attn_status_t
groups_load(attn_group_t *g, uint32_t q_heads, const attn_group_entry_t *entries, uint32_t n)
{
    cuda_exchange_batch_t batch = {.ranks      = g->options.ranks,
                                   .me         = g->options.me,
                                   .q_heads    = q_heads,
                                   .head_dim_v = g->options.head_dim_v,
                                   .n          = n,
                                   .entries    = entries,
                                   .half       = g->options.half_bytes};
    attn_status_t status        = cuda_exchange_plan(&batch, &g->plan);

    if (status == ATTN_OK) {
        uint64_t row = g->options.head_dim_v * sizeof(float) + sizeof(float);
        status       = take_room(g, sizeof(answer_head_t) + g->plan.n_rows * row + 16);
    }
    return status == ATTN_OK ? cuda_group_load(g->group, &g->plan) : status;
}

/* An exchange that is being queued behind an attend. */
typedef struct exchange {
    cuda_behind_t behind; /* first */
    attn_group_t *group;
    const attn_group_run_t *run;
    uint64_t o_bytes, lse_at, end; /* in the answer */
} exchange_t;

static attn_status_t
queue_exchange(cuda_behind_t *behind, const cuda_args_t *x, CUstream stream)
{
    exchange_t *e   = (exchange_t *)behind;
    attn_group_t *g = e->group;
    uint64_t now = attn_now_ns(), answer = g->answer;
    uint64_t left          = e->run->until_ns > now ? e->run->until_ns - now : 0;
    cuda_group_call_t call = {
        .a        = (uintptr_t)x->a,
        .l        = (uintptr_t)x->l,
        .e        = (uintptr_t)x->e,
        .o        = answer + sizeof(answer_head_t),
        .o_type   = e->run->o_dtype,
        .lse      = e->run->lse != NULL ? answer + e->lse_at : 0,
        .sink_l   = (uintptr_t)x->sink_l,
        .sink_e   = (uintptr_t)x->sink_e,
        .error    = answer + offsetof(answer_head_t, error),
        .limit_ns = attn_max(left, LIMIT_MIN_NS),
    };
    uint64_t bytes       = e->end <= g->host_room ? e->end : sizeof(answer_head_t);
    attn_status_t status = ATTN_OK;

    if (!g->clean) {
        status = CUDA_CALL(cuMemsetD8Async(call.error, 0xff, sizeof(uint64_t), stream));
    }
    if (status != ATTN_OK || (status = cuda_group_enqueue(g->group, &call, stream)) != ATTN_OK) {
        return status;
    }
    g->clean = false; /* until it is known */
    status   = CUDA_CALL(cuMemcpyDtoDAsync(answer + offsetof(answer_head_t, control),
                                           cuda_group_control(g->group),
                                           sizeof(cuda_exchange_control_t), stream));
    return status == ATTN_OK ? CUDA_CALL(cuMemcpyDtoHAsync(g->host, answer, bytes, stream))
                             : status;
}

/* What the exchange came to, and its answer to where it is wanted. */
static attn_status_t
take_answer(exchange_t *e)
{
    attn_group_t *g           = e->group;
    const answer_head_t *head = (const answer_head_t *)(const void *)g->host;
    uint64_t o_at = sizeof(*head), lse_bytes = e->run->lse != NULL ? e->end - e->lse_at : 0;
    attn_status_t status = cuda_group_verdict(g->group, &head->control);

    g->clean = status == ATTN_OK && head->error == UINT64_MAX;
    if (status == ATTN_OK && head->error != UINT64_MAX) {
        status = attn_fail(ATTN_ERR_NUMERIC,
                           "entry %llu of those that are merged in the group, query %llu, head "
                           "%llu: a sum that is not finite",
                           (unsigned long long)(head->error >> 40),
                           (unsigned long long)(head->error >> 12 & 0xfffffff),
                           (unsigned long long)(head->error & 0xfff));
    }
    if (status != ATTN_OK) {
        return status;
    }
    if (e->end <= g->host_room) {
        memcpy(e->run->o, g->host + o_at, e->o_bytes);
        if (lse_bytes > 0) {
            memcpy(e->run->lse, g->host + e->lse_at, lse_bytes);
        }
        return ATTN_OK;
    }
    CUDA_VISIT(g->backend);
    if ((status = visit.status) == ATTN_OK) {
        status = CUDA_CALL(cuMemcpyDtoH(e->run->o, g->answer + o_at, e->o_bytes));
    }
    if (status == ATTN_OK && lse_bytes > 0) {
        status = CUDA_CALL(cuMemcpyDtoH(e->run->lse, g->answer + e->lse_at, lse_bytes));
    }
    return status;
}

static exchange_t
exchange_of(attn_group_t *g, const attn_group_run_t *run)
{
    uint64_t o_bytes =
        g->plan.n_rows * g->options.head_dim_v * (uint64_t)attn_dtype_size(run->o_dtype);
    uint64_t lse_at = sizeof(answer_head_t) + attn_div_up(o_bytes, 16) * 16;

    return (exchange_t){.behind  = {.queue = queue_exchange},
                        .group   = g,
                        .run     = run,
                        .o_bytes = o_bytes,
                        .lse_at  = lse_at,
                        .end     = lse_at + g->plan.n_rows * sizeof(float)};
}

static attn_status_t
groups_run(attn_group_t *g, const attn_group_run_t *run)
{
    exchange_t e = exchange_of(g, run);
    attn_status_t status =
        run->plan->n_works > 0
            ? cuda_attend_before(run->workspace, run->kv, run->layer, run->q, run->answer,
                                 &e.behind)
            : attn_fail(ATTN_ERR_INTERNAL, "a rank of a group whose plan has no works");

    return status == ATTN_OK ? take_answer(&e) : status;
}

/* ---- a proof ---- */

#define PROOF_ROUNDS 8u
#define NODE_LEVEL 26u /* of each rank one of 64 */

/* Word w of a rank's state of a row, the same wherever it is asked for: A, and as word d l. */
static float
proof_word(uint32_t rank, uint32_t row, uint32_t w)
{
    uint32_t x = (rank * 2654435761u + row) * 2246822519u + w * 3266489917u;

    x = (x ^ x >> 15) * 668265263u;
    return (float)(x >> 8) * 0x1p-24f + 0x1p-10f;
}

static int32_t
proof_e(uint32_t rank, uint32_t row)
{
    return (int32_t)((rank * 5 + row) % 7) - 3;
}

/* What row `row` comes to, by the host. */
static void
proof_row(const attn_group_t *g, uint32_t row, float *o, float *lse)
{
    const uint32_t d = g->options.head_dim_v;
    float states[CUDA_RANKS][256], l[CUDA_RANKS];
    int32_t e[CUDA_RANKS];
    uint32_t stack[CUDA_RANKS], n = 0; /* ranks whose states wait, in the order of their nodes */

    for (uint32_t r = 0; r <= g->options.ranks; r++) {
        uint32_t level = r == 0 || r == g->options.ranks
                             ? 33
                             : attn_tree_lca((r - 1) << NODE_LEVEL, r << NODE_LEVEL);
        while (n >= 2 &&
               attn_tree_lca(stack[n - 2] << NODE_LEVEL, stack[n - 1] << NODE_LEVEL) < level) {
            attn_state_merge_row(states[stack[n - 2]], &l[stack[n - 2]], &e[stack[n - 2]],
                                 states[stack[n - 1]], l[stack[n - 1]], e[stack[n - 1]], d);
            n--;
        }
        if (r < g->options.ranks) {
            for (uint32_t w = 0; w < d; w++) {
                states[r][w] = proof_word(r, row, w);
            }
            l[r]       = proof_word(r, row, d);
            e[r]       = proof_e(r, row);
            stack[n++] = r;
        }
    }
    attn_state_finish_row(states[0], l[0], e[0], d, NULL, o, lse);
}

/* Memory for a proof: this rank's states of so many rows. */
typedef struct proof {
    cuda_block_t *block;
    uint64_t a, l, e, end;
    uint32_t rows;
} proof_t;

static attn_status_t
proof_load(attn_group_t *g, uint32_t rows, proof_t *p)
{
    const uint32_t d = g->options.head_dim_v, me = g->options.me;
    attn_group_entry_t entry = {.n_q = rows};
    attn_node_t nodes[CUDA_RANKS];

    for (uint32_t r = 0; r < g->options.ranks; r++) {
        nodes[r]         = (attn_node_t){.level = NODE_LEVEL, .index = r};
        entry.n_nodes[r] = 1;
        entry.nodes[r]   = &nodes[r];
    }
    *p                   = (proof_t){.rows = rows};
    p->a                 = cuda_take(&p->end, (uint64_t)rows * d * sizeof(float));
    p->l                 = cuda_take(&p->end, rows * sizeof(float));
    p->e                 = cuda_take(&p->end, rows * sizeof(int32_t));
    attn_status_t status = groups_load(g, 1, &entry, 1);
    if (status == ATTN_OK) {
        status = cuda_block_take(g->backend, p->end, &p->block);
    }
    if (status != ATTN_OK || p->block->host_bytes < p->end) {
        return status != ATTN_OK
                   ? status
                   : attn_fail(ATTN_ERR_TOO_LARGE, "a proof of %u rows is not pinned", rows);
    }
    for (uint32_t i = 0; i < rows; i++) {
        float *a = (float *)(void *)(p->block->host + p->a) + (uint64_t)i * d;
        for (uint32_t w = 0; w < d; w++) {
            a[w] = proof_word(me, i, w);
        }
        ((float *)(void *)(p->block->host + p->l))[i]   = proof_word(me, i, d);
        ((int32_t *)(void *)(p->block->host + p->e))[i] = proof_e(me, i);
    }
    return CUDA_CALL(cuMemcpyHtoDAsync(p->block->device, p->block->host, p->end, p->block->stream));
}

static attn_status_t
proof_check(exchange_t *e)
{
    const attn_group_t *g = e->group;
    uint32_t d            = g->options.head_dim_v;
    float o[256], lse;

    for (uint64_t i = 0; i < g->plan.n_rows; i++) {
        proof_row(g, (uint32_t)(g->plan.row_first + i), o, &lse);
        if (memcmp(o, (float *)e->run->o + i * d, d * sizeof(float)) != 0 ||
            memcmp(&lse, e->run->lse + i, sizeof(lse)) != 0) {
            return attn_fail(ATTN_ERR_INTERNAL,
                             "row %llu of an exchange between %u GPUs is not what it should be",
                             (unsigned long long)(g->plan.row_first + i), g->options.ranks);
        }
    }
    return ATTN_OK;
}

/* Exchanges of what is loaded: the first is for coming together. */
static attn_status_t
proof_run(exchange_t *e, const proof_t *p, double *seconds)
{
    const cuda_args_t x  = {.a = (float *)(uintptr_t)(p->block->device + p->a),
                            .l = (float *)(uintptr_t)(p->block->device + p->l),
                            .e = (int32_t *)(uintptr_t)(p->block->device + p->e)};
    uint64_t start       = 0;
    attn_status_t status = ATTN_OK;

    for (uint32_t i = 0; i <= PROOF_ROUNDS && status == ATTN_OK; i++) {
        status = queue_exchange(&e->behind, &x, p->block->stream);
        if (status == ATTN_OK && (i == 0 || i == PROOF_ROUNDS)) {
            status = CUDA_CALL(cuStreamSynchronize(p->block->stream));
        }
        start = i == 0 ? attn_now_ns() : start;
    }
    *seconds = (double)(attn_now_ns() - start) * 1e-9 / PROOF_ROUNDS;
    if (status == ATTN_OK) {
        status = take_answer(e);
    }
    return status == ATTN_OK ? proof_check(e) : status;
}

static attn_status_t
proof_of(attn_group_t *g, const proof_t *p, uint64_t until_ns, double *seconds)
{
    attn_group_run_t run = {.o_dtype = ATTN_F32, .until_ns = until_ns};

    run.o                = malloc(g->plan.n_rows * g->options.head_dim_v * sizeof(float) + 1);
    run.lse              = malloc(g->plan.n_rows * sizeof(float) + 1);
    exchange_t e         = exchange_of(g, &run);
    attn_status_t status = run.o != NULL && run.lse != NULL
                               ? proof_run(&e, p, seconds)
                               : attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a proof");
    free(run.o);
    free(run.lse);
    return status;
}

static attn_status_t
groups_prove(attn_group_t *g, const uint32_t *rows, uint32_t sizes, uint64_t until_ns,
             double *seconds)
{
    attn_status_t status = ATTN_OK;
    CUDA_VISIT(g->backend);

    for (uint32_t i = 0; i < sizes && status == ATTN_OK; i++) {
        proof_t p = {0};
        status    = visit.status == ATTN_OK ? proof_load(g, rows[i], &p) : visit.status;
        if (status == ATTN_OK) {
            status = proof_of(g, &p, until_ns, &seconds[i]);
        }
        if (p.block != NULL) {
            g->backend->cu->cuStreamSynchronize(p.block->stream);
            cuda_block_give(g->backend, p.block);
        }
    }
    return status;
}

static void
groups_abort(attn_group_t *g)
{
    cuda_group_abort(g->group);
}

const attn_group_ops_t cuda_group_ops = {
    .open    = groups_open,
    .handle  = groups_handle,
    .device  = groups_device,
    .connect = groups_connect,
    .load    = groups_load,
    .run     = groups_run,
    .prove   = groups_prove,
    .abort   = groups_abort,
    .close   = groups_close,
};
