/*
 * fake_exchange.c: what exchange.cu does, by one thread: as long as something is missing the kernel
 * is not ready, and is asked again. Packets are those of the device, and so is their order of
 * states, but by the host's merge.
 */
#include "tests/integration/fake_kernels.h"

#include "base/clock.h"
#include "kernels/cuda/exchange.h"
#include "kernels/kernels.h"

#include <string.h>

#define DIM 64u /* of V: other kernels of the file are not played */
#define DEPTH_MAX 64u

typedef struct state {
    float a[DIM + 2]; /* and l, and e as its bits */
} state_t;

static cuda_inbox_t *
inbox_of(const cuda_exchange_t *x, uint32_t rank)
{
    return (cuda_inbox_t *)(void *)x->inboxes[rank];
}

static uint8_t *
place(const cuda_exchange_t *x, uint32_t rank, uint32_t line)
{
    uint32_t epoch = x->control->epoch + 1;

    return x->inboxes[rank] + sizeof(cuda_inbox_t) + (epoch & 1) * x->half +
           (uint64_t)line * CUDA_LINE_BYTES(DIM);
}

static void
load_own(const cuda_exchange_t *x, uint64_t at, state_t *state)
{
    memcpy(state->a, x->a + at * DIM, DIM * sizeof(float));
    state->a[DIM] = x->l[at];
    memcpy(&state->a[DIM + 1], &x->e[at], sizeof(float));
}

static void
send(uint8_t *to, uint32_t epoch, const state_t *state)
{
    uint32_t packets = CUDA_LINE_PACKETS(DIM);

    for (uint32_t p = 0; p < packets; p++) {
        float words[3] = {0};
        for (uint32_t k = 0; k < 3; k++) {
            uint32_t w = k * packets + p;
            words[k]   = w < DIM + 2 ? state->a[w] : 0.0f;
        }
        memcpy(to + 16 * p, words, sizeof(words));
        __atomic_store_n((uint32_t *)(void *)(to + 16 * p + 12), epoch, __ATOMIC_RELEASE);
    }
}

static bool
receive(const uint8_t *from, uint32_t epoch, state_t *state)
{
    uint32_t packets = CUDA_LINE_PACKETS(DIM);

    for (uint32_t p = 0; p < packets; p++) {
        float words[3];
        if (__atomic_load_n((const uint32_t *)(const void *)(from + 16 * p + 12),
                            __ATOMIC_ACQUIRE) != epoch) {
            return false;
        }
        memcpy(words, from + 16 * p, sizeof(words));
        for (uint32_t k = 0; k < 3; k++) {
            uint32_t w = k * packets + p;
            if (w < DIM + 2) {
                state->a[w] = words[k];
            }
        }
    }
    return true;
}

static void
fail(const cuda_exchange_t *x, uint32_t kind, uint32_t rank)
{
    x->control->failed = kind | rank << 8;
    for (uint32_t r = 0; r < x->ranks; r++) {
        __atomic_store_n(&inbox_of(x, r)->abort, x->first, __ATOMIC_RELEASE);
    }
}

/* Has the rank begun the epoch before? */
static bool
is_fresh(const cuda_exchange_t *x, uint32_t rank)
{
    uint32_t beat = __atomic_load_n(&inbox_of(x, x->me)->beats[rank].epoch, __ATOMIC_ACQUIRE);

    return beat - x->control->epoch <= 3;
}

/* Sends what may be sent. Returns the rank that is waited for, or the number of ranks. */
static uint32_t
missing(const cuda_exchange_t *x)
{
    uint32_t epoch = x->control->epoch + 1;
    state_t state;

    for (uint32_t r = 0; r < x->ranks; r++) {
        if (r != x->me) {
            __atomic_store_n(&inbox_of(x, r)->beats[x->me].epoch, epoch, __ATOMIC_RELEASE);
        }
    }
    for (uint32_t i = 0; i < x->n_sends; i++) {
        const cuda_send_t *s = &x->sends[i];
        if (!is_fresh(x, s->rank)) {
            return s->rank;
        }
        load_own(x, s->state, &state);
        send(place(x, s->rank, s->line), epoch, &state);
    }
    for (uint32_t i = 0; i < x->n_rows; i++) {
        for (uint32_t p = 0; p < x->rows[i].n_parts; p++) {
            const cuda_exchange_part_t *part = &x->parts[x->rows[i].part_first + p];
            if ((part->from & 255) != x->me && !receive(place(x, x->me, part->at), epoch, &state)) {
                return part->from & 255;
            }
        }
    }
    for (uint32_t r = 0; r < x->ranks; r++) {
        if (r != x->me && !is_fresh(x, r)) {
            return r;
        }
    }
    return x->ranks;
}

bool
fake_exchange_ready(uint64_t begun_ns, void *const *args)
{
    const cuda_exchange_t *x = args[0];
    uint32_t rank;

    if (x->control->failed != 0 || (rank = missing(x)) == x->ranks) {
        return true;
    }
    if (__atomic_load_n(&inbox_of(x, x->me)->abort, __ATOMIC_ACQUIRE) == x->first ||
        __atomic_load_n(x->stop, __ATOMIC_ACQUIRE) != 0) {
        fail(x, CUDA_EXCHANGE_ABORTED, rank);
    } else if (attn_now_ns() >= begun_ns + x->limit_ns) {
        fail(x, CUDA_EXCHANGE_LATE, rank);
    }
    return x->control->failed != 0;
}

static void
merge_into(state_t *into, const state_t *from)
{
    int32_t e_into, e_from;

    memcpy(&e_into, &into->a[DIM + 1], sizeof(e_into));
    memcpy(&e_from, &from->a[DIM + 1], sizeof(e_from));
    attn_state_merge_row(into->a, &into->a[DIM], &e_into, from->a, from->a[DIM], e_from, DIM);
    memcpy(&into->a[DIM + 1], &e_into, sizeof(e_into));
}

static void
answer(const cuda_exchange_t *x, uint32_t at, const cuda_exchange_row_t *row, const state_t *s)
{
    uint8_t *to = (uint8_t *)x->o + (uint64_t)at * DIM * attn_dtype_size((attn_dtype_t)x->o_type);
    float o[DIM], lse;
    int32_t e;

    (void)row; /* sinks are of no test with this */
    memcpy(&e, &s->a[DIM + 1], sizeof(e));
    attn_state_finish_row(s->a, s->a[DIM], e, DIM, NULL, o, &lse);
    attn_convert(to, (attn_dtype_t)x->o_type, o, ATTN_F32, DIM);
    if (x->lse != NULL) {
        x->lse[at] = lse;
    }
}

void
fake_exchange_play(const fake_kernel_t *kernel, uint32_t grid, void *const *args)
{
    static state_t stack[DEPTH_MAX];
    static uint32_t levels[DEPTH_MAX];
    const cuda_exchange_t *x = args[0];
    uint32_t epoch           = x->control->epoch + 1;

    (void)kernel;
    (void)grid;
    for (uint32_t i = 0; i < x->n_rows && x->control->failed == 0; i++) {
        uint32_t n = 0;
        for (uint32_t p = 0; p <= x->rows[i].n_parts; p++) {
            bool end                         = p == x->rows[i].n_parts;
            const cuda_exchange_part_t *part = &x->parts[x->rows[i].part_first + (end ? 0 : p)];
            uint32_t level                   = end ? 65 : part->from >> 8;
            for (; n >= 2 && levels[n - 1] < level; n--) {
                merge_into(&stack[n - 2], &stack[n - 1]);
            }
            if (!end && (part->from & 255) == x->me) {
                load_own(x, part->at, &stack[n]);
            } else if (!end) {
                receive(place(x, x->me, part->at), epoch, &stack[n]);
            }
            levels[n] = level;
            n += !end;
        }
        answer(x, i, &x->rows[i], &stack[0]);
    }
    x->control->epoch++;
}
