#include "kernels/cuda/group.h"

#include "base/checked.h"
#include "kernels/cuda/cuda_int.h"

#include <assert.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

/* Beyond half of a device's memory nobody asks for it on purpose. */
#define HALF_MAX (UINT64_C(1) << 36)

/* Bytes of tables that stay for the next group. */
#define TABLES_KEPT (UINT64_C(4) << 20)

/* Other processes that map memory map all of the driver's pieces that it has a part of. */
#define LENT (UINT64_C(2) << 20)

/* What the host and the device tell each other. */
typedef struct pinned {
    cuda_exchange_control_t control; /* as it was read, or is to begin */
    cuda_inbox_t head;               /* likewise */
    uint32_t first;                  /* abort words of this group */
    uint32_t stop;                   /* its launches are to end: the device reads it here */
} pinned_t;

struct cuda_group {
    cuda_backend_t *backend;
    cuda_group_options_t options;
    CUdeviceptr inbox, control, tables;
    uint64_t inbox_bytes, tables_bytes;
    CUfunction kernel;
    CUstream side; /* for what is said and asked while launches run */
    pinned_t *pinned;
    uint8_t card[CUDA_CARD];
    cuda_exchange_t x;
    uint64_t limit_ns; /* of the latest launch */
    uint32_t epoch;    /* as it was seen last */
    bool failed;       /* and so all ranks were told */
};

static attn_status_t
check_options(const cuda_backend_t *backend, const cuda_group_options_t *o)
{
    if (o->ranks == 0 || o->ranks > CUDA_RANKS || o->me >= o->ranks) {
        return attn_fail(ATTN_ERR_INVALID, "rank %u of %u: at most %u ranks", o->me, o->ranks,
                         CUDA_RANKS);
    }
    if (o->head_dim_v != 64 && o->head_dim_v != 128 && o->head_dim_v != 256) {
        return attn_fail(ATTN_ERR_INVALID, "states of %u columns: 64, 128 or 256", o->head_dim_v);
    }
    if (o->half == 0 || o->half % 16 != 0 || o->half > HALF_MAX) {
        return attn_fail(ATTN_ERR_INVALID,
                         "half an inbox of %llu bytes: a multiple of 16, at most %llu",
                         (unsigned long long)o->half, (unsigned long long)HALF_MAX);
    }
    if (backend->major < 8) {
        return attn_fail(ATTN_ERR_UNSUPPORTED,
                         "cuda:%d is of compute capability %d.%d: 8.0 is the least",
                         backend->ordinal, backend->major, backend->minor);
    }
    return ATTN_OK;
}

uint64_t
cuda_inbox_bytes(uint64_t half)
{
    return attn_div_up(sizeof(cuda_inbox_t) + 2 * half, LENT) * LENT;
}

static attn_status_t
take_memory(cuda_group_t *g, uint64_t half)
{
    attn_status_t status;

    g->inbox_bytes = cuda_inbox_bytes(half);
    if ((status = CUDA_CALL(cuStreamCreate(&g->side, CU_STREAM_NON_BLOCKING))) != ATTN_OK ||
        (status = CUDA_CALL(cuMemHostAlloc((void **)&g->pinned, sizeof(*g->pinned),
                                           CU_MEMHOSTALLOC_DEVICEMAP))) != ATTN_OK ||
        (status = CUDA_CALL(cuMemAlloc(&g->inbox, g->inbox_bytes))) != ATTN_OK) {
        return status;
    }
    return CUDA_CALL(cuMemAlloc(&g->control, sizeof(cuda_exchange_control_t)));
}

/* Everything as before the group's first exchange. */
static attn_status_t
begin(cuda_group_t *g)
{
    uint32_t first = 1 + (uint32_t)(g->options.id % CUDA_FIRST_MAX);
    pinned_t *p    = g->pinned;
    attn_status_t status;

    if (getrandom(g->card, CUDA_CARD, 0) != CUDA_CARD) {
        return attn_fail(ATTN_ERR_INTERNAL, "no random bytes for an inbox's card");
    }
    *p = (pinned_t){.control = {.epoch = first}, .first = first};
    for (uint32_t r = 0; r < CUDA_RANKS; r++) {
        p->head.beats[r].epoch = first;
    }
    memcpy(p->head.card, g->card, CUDA_CARD);
    if ((status = CUDA_CALL(cuMemsetD8Async(g->inbox, 0, g->inbox_bytes, g->side))) != ATTN_OK ||
        (status = CUDA_CALL(cuMemcpyHtoDAsync(g->inbox, &p->head, sizeof(p->head), g->side))) !=
            ATTN_OK ||
        (status = CUDA_CALL(
             cuMemcpyHtoDAsync(g->control, &p->control, sizeof(p->control), g->side))) != ATTN_OK ||
        (status = CUDA_CALL(cuStreamSynchronize(g->side))) != ATTN_OK) {
        return status;
    }
    g->kernel                   = g->backend->exchange[g->options.head_dim_v / 128];
    g->epoch                    = first;
    g->failed                   = false;
    g->x                        = (cuda_exchange_t){.me      = g->options.me,
                                                    .ranks   = g->options.ranks,
                                                    .half    = g->options.half,
                                                    .first   = first,
                                                    .stop    = &p->stop,
                                                    .depth   = 1,
                                                    .control = (cuda_exchange_control_t *)(uintptr_t)g->control};
    g->x.inboxes[g->options.me] = (uint8_t *)(uintptr_t)g->inbox;
    return ATTN_OK;
}

attn_status_t
cuda_group_open(attn_backend_t *base, const cuda_group_options_t *options, cuda_group_t **group_p)
{
    cuda_backend_t *backend = (cuda_backend_t *)base;
    attn_status_t status    = check_options(backend, options);
    cuda_group_t *g;
    CUDA_VISIT(backend);

    status = status == ATTN_OK ? visit.status : status;
    if (status != ATTN_OK) {
        return status;
    }
    if ((g = calloc(1, sizeof(*g))) == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a group of GPUs");
    }
    g->backend = backend;
    g->options = *options;
    status     = take_memory(g, options->half);
    if (status == ATTN_OK) {
        status = begin(g);
    }
    if (status != ATTN_OK) {
        cuda_group_close(g);
        return status;
    }
    *group_p = g;
    return ATTN_OK;
}

attn_status_t
cuda_group_again(cuda_group_t *g, const cuda_group_options_t *options)
{
    attn_status_t status = check_options(g->backend, options);
    CUDA_VISIT(g->backend);

    status = status == ATTN_OK ? visit.status : status;
    if (status == ATTN_OK && options->half > cuda_group_half_max(g)) {
        status = attn_fail(ATTN_ERR_TOO_LARGE, "half an inbox of %llu bytes: %llu",
                           (unsigned long long)options->half,
                           (unsigned long long)cuda_group_half_max(g));
    }
    if (status != ATTN_OK) {
        return status;
    }
    g->options = *options;
    return begin(g);
}

uint64_t
cuda_group_half_max(const cuda_group_t *g)
{
    return (g->inbox_bytes - sizeof(cuda_inbox_t)) / 32 * 16;
}

uint64_t
cuda_group_inbox(const cuda_group_t *group)
{
    return group->inbox;
}

const uint8_t *
cuda_group_card(const cuda_group_t *group)
{
    return group->card;
}

attn_status_t
cuda_group_check_card(cuda_group_t *g, uint64_t inbox, const uint8_t card[CUDA_CARD])
{
    uint8_t *seen = g->pinned->head.card;
    attn_status_t status;
    CUDA_VISIT(g->backend);

    if ((status = visit.status) != ATTN_OK ||
        (status = CUDA_CALL(cuMemcpyDtoHAsync(seen, inbox + offsetof(cuda_inbox_t, card), CUDA_CARD,
                                              g->side))) != ATTN_OK ||
        (status = CUDA_CALL(cuStreamSynchronize(g->side))) != ATTN_OK) {
        return status;
    }
    return memcmp(seen, card, CUDA_CARD) == 0
               ? ATTN_OK
               : attn_fail(ATTN_ERR_STALE, "what was mapped is not the inbox that was offered");
}

void
cuda_group_connect(cuda_group_t *g, const uint64_t inboxes[CUDA_RANKS])
{
    for (uint32_t r = 0; r < g->options.ranks; r++) {
        if (r != g->options.me) {
            g->x.inboxes[r] = (uint8_t *)(uintptr_t)inboxes[r];
        }
    }
}

static void
drop_tables(cuda_group_t *g)
{
    if (g->tables != 0) {
        g->backend->cu->cuMemFree(g->tables);
    }
    g->tables       = 0;
    g->tables_bytes = 0;
}

void
cuda_group_leave(cuda_group_t *g)
{
    CUDA_VISIT(g->backend);

    for (uint32_t r = 0; r < g->options.ranks; r++) {
        if (r == g->options.me || g->x.inboxes[r] == NULL) {
            continue;
        }
        if (visit.status == ATTN_OK && !g->failed) {
            g->backend->cu->cuMemcpyHtoDAsync((CUdeviceptr)(uintptr_t)g->x.inboxes[r] +
                                                  offsetof(cuda_inbox_t, abort),
                                              &g->pinned->first, sizeof(uint32_t), g->side);
        }
        g->x.inboxes[r] = NULL;
    }
    if (visit.status == ATTN_OK) {
        g->backend->cu->cuStreamSynchronize(g->side);
        if (g->tables_bytes > TABLES_KEPT) {
            drop_tables(g);
        }
    }
}

/* Room for so many bytes of tables. */
static attn_status_t
take_tables(cuda_group_t *g, uint64_t bytes)
{
    if (bytes <= g->tables_bytes) {
        return ATTN_OK;
    }
    drop_tables(g);
    attn_status_t status = CUDA_CALL(cuMemAlloc(&g->tables, bytes));
    g->tables_bytes      = status == ATTN_OK ? bytes : 0;
    return status;
}

attn_status_t
cuda_group_load(cuda_group_t *g, const cuda_exchange_plan_t *plan)
{
    uint64_t sends = attn_div_up(plan->n_sends * sizeof(*plan->sends), 256) * 256;
    uint64_t rows  = attn_div_up(plan->n_rows * sizeof(*plan->rows), 256) * 256;
    uint64_t parts = plan->n_parts * sizeof(*plan->parts);
    uint64_t need  = CUDA_EXCHANGE_SHARED(g->options.head_dim_v, (uint64_t)plan->depth);
    attn_status_t status;

    if (need > (uint64_t)g->backend->shared_bytes) {
        return attn_fail(ATTN_ERR_TOO_LARGE,
                         "rows of an exchange need stacks of %u states, %llu bytes: cuda:%d has %d",
                         plan->depth, (unsigned long long)need, g->backend->ordinal,
                         g->backend->shared_bytes);
    }
    if (g->epoch - g->x.first >= CUDA_EPOCHS) {
        return attn_fail(ATTN_ERR_STALE, "the group's numbers are used up: make it anew");
    }
    CUDA_VISIT(g->backend);
    if ((status = visit.status) != ATTN_OK ||
        (status = take_tables(g, attn_max(sends + rows + parts, 256))) != ATTN_OK) {
        return status;
    }
    const struct {
        const void *from;
        uint64_t at, bytes;
    } tables[] = {{plan->sends, 0, plan->n_sends * sizeof(*plan->sends)},
                  {plan->rows, sends, plan->n_rows * sizeof(*plan->rows)},
                  {plan->parts, sends + rows, parts}};
    for (int i = 0; i < 3 && status == ATTN_OK; i++) {
        if (tables[i].bytes > 0) {
            status = CUDA_CALL(cuMemcpyHtoDAsync(g->tables + tables[i].at, tables[i].from,
                                                 tables[i].bytes, g->side));
        }
    }
    status       = status == ATTN_OK ? CUDA_CALL(cuStreamSynchronize(g->side)) : status;
    g->x.sends   = (const cuda_send_t *)(uintptr_t)g->tables;
    g->x.rows    = (const cuda_exchange_row_t *)(uintptr_t)(g->tables + sends);
    g->x.parts   = (const cuda_exchange_part_t *)(uintptr_t)(g->tables + sends + rows);
    g->x.n_sends = (uint32_t)plan->n_sends;
    g->x.n_rows  = (uint32_t)plan->n_rows;
    g->x.depth   = plan->depth;
    return status;
}

attn_status_t
cuda_group_enqueue(cuda_group_t *g, const cuda_group_call_t *call, CUstream stream)
{
    uint64_t tasks    = attn_max(g->x.n_sends, g->x.n_rows);
    uint64_t ctas     = attn_max(attn_div_up(tasks, CUDA_EXCHANGE_WARPS), 1);
    uint64_t most     = (uint64_t)g->backend->cut_for;
    cuda_exchange_t x = g->x;
    CUDA_VISIT(g->backend);

    assert(x.inboxes[0] != NULL && (x.ranks < 2 || x.inboxes[1] != NULL)); /* connected */
    x.a        = (const float *)(uintptr_t)call->a;
    x.l        = (const float *)(uintptr_t)call->l;
    x.e        = (const int32_t *)(uintptr_t)call->e;
    x.o        = (void *)(uintptr_t)call->o;
    x.o_type   = (uint32_t)call->o_type;
    x.lse      = (float *)(uintptr_t)call->lse;
    x.sink_l   = (const float *)(uintptr_t)call->sink_l;
    x.sink_e   = (const int32_t *)(uintptr_t)call->sink_e;
    x.error    = (unsigned long long *)(uintptr_t)call->error;
    x.limit_ns = g->limit_ns = call->limit_ns;
    if (g->options.ctas_max > 0) {
        most = attn_min(most, g->options.ctas_max);
    }
    if (visit.status != ATTN_OK) {
        return visit.status;
    }
    return cuda_launch(g->kernel, (uint32_t)attn_min(ctas, most), 1, 32 * CUDA_EXCHANGE_WARPS,
                       (uint32_t)CUDA_EXCHANGE_SHARED(g->options.head_dim_v, x.depth),
                       g->backend->major >= 9, stream, (void *[]){&x});
}

void
cuda_group_abort(cuda_group_t *g)
{
    __atomic_store_n(&g->pinned->stop, 1, __ATOMIC_RELEASE);
}

attn_status_t
cuda_group_check(cuda_group_t *g)
{
    cuda_exchange_control_t *seen = &g->pinned->control;
    attn_status_t status;
    CUDA_VISIT(g->backend);

    if ((status = visit.status) != ATTN_OK ||
        (status = CUDA_CALL(cuMemcpyDtoHAsync(seen, g->control, sizeof(*seen), g->side))) !=
            ATTN_OK ||
        (status = CUDA_CALL(cuStreamSynchronize(g->side))) != ATTN_OK) {
        return status;
    }
    return cuda_group_verdict(g, seen);
}

uint64_t
cuda_group_control(const cuda_group_t *g)
{
    return g->control;
}

attn_status_t
cuda_group_verdict(cuda_group_t *g, const cuda_exchange_control_t *seen)
{
    g->epoch  = seen->epoch;
    g->failed = g->failed || seen->failed != 0;
    if ((seen->failed & 255) == CUDA_EXCHANGE_LATE) {
        return attn_fail(ATTN_ERR_DEADLINE,
                         "rank %u of a group of %u GPUs did not come to exchange %u within %llu us",
                         seen->failed >> 8, g->options.ranks, seen->epoch - g->x.first,
                         (unsigned long long)g->limit_ns / 1000);
    }
    if (seen->failed != 0) {
        return attn_fail(ATTN_ERR_ABORTED, "the group's exchange %u was aborted, with rank %u due",
                         seen->epoch - g->x.first, seen->failed >> 8);
    }
    return ATTN_OK;
}

void
cuda_group_close(cuda_group_t *g)
{
    if (g == NULL) {
        return;
    }
    const cuda_driver_t *cu = g->backend->cu;
    CUDA_VISIT(g->backend);
    if (visit.status == ATTN_OK) {
        CUdeviceptr memory[] = {g->inbox, g->control, g->tables};
        for (int i = 0; i < 3; i++) {
            if (memory[i] != 0) {
                cu->cuMemFree(memory[i]);
            }
        }
        if (g->pinned != NULL) {
            cu->cuMemFreeHost(g->pinned);
        }
        if (g->side != NULL) {
            cu->cuStreamDestroy(g->side);
        }
    }
    free(g);
}
