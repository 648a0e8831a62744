/* door_step.c: the thin client's steps, on a stream or as unary calls. */
#include "client/door_int.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/status.h"
#include "client/rpc_call.h"
#include "client/wire.h"

#include <stdlib.h>

#define DEFAULT_TIMEOUT_MS 60000u
#define ABORT_TIMEOUT_MS 2000u
#define PIECES 3u

struct door_step {
    door_cache_t *cache;
    line_t *line; /* NULL: unary calls */
    bool broken;  /* something may still be on its way on the line */
    uint64_t id, deadline_ns;
    uint32_t n;
    uint64_t q, k, v, o, lse; /* bytes of a layer */
};

static void
step_free(door_step_t *step, bool clean)
{
    if (step->line != NULL) {
        line_give(step->line, clean && !step->broken);
    }
    free(step);
}

/* After these the line is in order, and what failed is the operation. */
static bool
is_an_answer(attn_status_t status)
{
    return status != ATTN_ERR_DEADLINE && status != ATTN_ERR_UNAVAILABLE &&
           status != ATTN_ERR_CANCELLED && status != ATTN_ERR_INTERNAL;
}

/* One operation on the step's line, answered by one message. */
static attn_status_t
exchange(door_step_t *step, const Attn__V1__StepRequest *request, uint64_t deadline_ns,
         Attn__V1__StepReply__OpCase wanted, uint64_t *id_p)
{
    Attn__V1__StepReply *reply;
    rpc_message_t *message;

    line_send(step->line, request, NULL, 0);
    attn_status_t status = line_next(step->line, deadline_ns, &reply, &message);
    if (status != ATTN_OK) {
        step->broken = step->broken || !is_an_answer(status);
        return status;
    }
    if (reply->op_case != wanted) {
        step->broken = true;
        status       = attn_fail(ATTN_ERR_INTERNAL, "the coordinator answered operation %d, not %d",
                                 (int)reply->op_case, (int)wanted);
    } else if (id_p != NULL) {
        *id_p = reply->begin->step_id;
    }
    rpc_message_free(message);
    return status;
}

/* ---- begin ---- */

static door_step_t *
step_new(door_cache_t *cache, const attn_batch_t *batch)
{
    const attn_geometry_t *g = &cache->geometry;
    attn_dtype_t o_dtype     = batch->o_dtype != ATTN_DTYPE_NONE ? batch->o_dtype : batch->q_dtype;
    uint64_t rows = 0, new_rows = 0, element = attn_dtype_size(g->kv_dtype);
    door_step_t *step = calloc(1, sizeof(*step));

    if (step == NULL) {
        attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a step");
        return NULL;
    }
    for (uint32_t i = 0; i < batch->n; i++) {
        rows += batch->entries[i].n_q;
        new_rows += batch->entries[i].n_new;
    }
    step->cache = cache;
    step->n     = batch->n;
    step->deadline_ns =
        attn_now_ns() +
        ATTN_NS_PER_MS * (batch->timeout_ms != 0 ? batch->timeout_ms : DEFAULT_TIMEOUT_MS);
    step->q   = rows * g->q_heads * g->head_dim_k * attn_dtype_size(batch->q_dtype);
    step->k   = new_rows * g->kv_heads * g->head_dim_k * element;
    step->v   = new_rows * g->kv_heads * g->head_dim_v * element;
    step->o   = rows * g->q_heads * g->head_dim_v * attn_dtype_size(o_dtype);
    step->lse = batch->want_lse ? rows * g->q_heads * sizeof(float) : 0;
    return step;
}

attn_status_t
door_step_begin(door_cache_t *cache, const attn_batch_t *batch, bool stream, door_step_t **step_p)
{
    wire_block_t block               = {0};
    Attn__V1__BeginStepRequest begin = ATTN__V1__BEGIN_STEP_REQUEST__INIT;
    Attn__V1__StepRequest request    = ATTN__V1__STEP_REQUEST__INIT;
    Attn__V1__BeginStepReply *reply  = NULL;
    rpc_message_t *message;
    door_step_t *step = step_new(cache, batch);

    if (step == NULL) {
        return ATTN_ERR_NO_MEMORY;
    }
    attn_status_t status = stream ? line_take(cache->door, &step->line) : ATTN_OK;
    if (status == ATTN_OK) {
        begin.cache_id = cache->id;
        status         = wire_begin_encode(&block, batch, &begin);
    }
    if (status == ATTN_OK && stream) {
        request.op_case = ATTN__V1__STEP_REQUEST__OP_BEGIN;
        request.begin   = &begin;
        status =
            exchange(step, &request, step->deadline_ns, ATTN__V1__STEP_REPLY__OP_BEGIN, &step->id);
    } else if (status == ATTN_OK) {
        status = rpc_call_typed(cache->door->channel, "/attn.v1.Attention/Begin", &begin,
                                step->deadline_ns, &attn__v1__begin_step_reply__descriptor, &reply,
                                &message);
        if (status == ATTN_OK) {
            step->id = reply->step_id;
            rpc_message_free(message);
        }
    }
    wire_free(&block);
    if (status != ATTN_OK) {
        step_free(step, true);
        return status;
    }
    *step_p = step;
    return ATTN_OK;
}

/* ---- run ---- */

/* The tensors' bytes [offset, offset + size), as pieces. */
static uint32_t
cut(const struct iovec tensors[PIECES], uint64_t offset, uint64_t size, struct iovec part[PIECES])
{
    uint32_t n = 0;

    for (uint32_t t = 0; t < PIECES && size > 0; t++) {
        uint64_t length = tensors[t].iov_len;
        if (offset < length) {
            uint64_t take = attn_min(length - offset, size);
            part[n++]     = (struct iovec){.iov_base = (uint8_t *)tensors[t].iov_base + offset,
                                           .iov_len  = take};
            size -= take;
            offset += take;
        }
        offset -= attn_min(offset, length);
    }
    return n;
}

/* Bytes of an answer into o and then lse. */
static void
scatter(const door_step_t *step, const rpc_message_t *message, uint64_t at, uint64_t size,
        uint8_t *o, uint8_t *lse)
{
    uint64_t first = at < step->o ? attn_min(step->o - at, size) : 0;

    if (first > 0) {
        rpc_message_data_copy(message, 0, o + at, first);
    }
    if (size > first) {
        rpc_message_data_copy(message, first, lse + (at + first - step->o), size - first);
    }
}

static attn_status_t
run_receive(door_step_t *step, uint32_t layer, uint64_t expected, void *o, float *lse)
{
    uint64_t received    = 0;
    attn_status_t status = ATTN_OK;

    do {
        Attn__V1__StepReply *reply;
        rpc_message_t *message;
        status = line_next(step->line, step->deadline_ns, &reply, &message);
        if (status != ATTN_OK) {
            step->broken = step->broken || received > 0 || !is_an_answer(status);
            return status;
        }
        uint64_t size = rpc_message_data_size(message);
        if (reply->op_case != ATTN__V1__STEP_REPLY__OP_RUN || reply->run->layer != layer ||
            reply->run->offset != received || size > expected - received ||
            (size == 0 && expected > 0)) {
            step->broken = true;
            status       = attn_fail(ATTN_ERR_INTERNAL,
                                     "the coordinator's answer is not that of the run asked");
        } else {
            scatter(step, message, received, size, o, (uint8_t *)lse);
            received += size;
        }
        rpc_message_free(message);
    } while (status == ATTN_OK && received < expected);
    return status;
}

static attn_status_t
run_unary(door_step_t *step, Attn__V1__RunRequest *head, const struct iovec tensors[PIECES],
          uint64_t expected, void *o, float *lse)
{
    struct iovec part[PIECES];
    rpc_message_t *message;
    Attn__V1__RunReply *reply;
    rpc_outgoing_t outgoing = {
        .head = &head->base, .data = part, .n_data = cut(tensors, 0, UINT64_MAX, part)};

    attn_status_t status = rpc_call_unary_wait(step->cache->door->channel, "/attn.v1.Attention/Run",
                                               &outgoing, step->deadline_ns, &message);
    if (status != ATTN_OK) {
        return status;
    }
    status =
        rpc_message_unpack(message, &attn__v1__run_reply__descriptor, (ProtobufCMessage **)&reply);
    if (status == ATTN_OK && rpc_message_data_size(message) != expected) {
        status = attn_fail(ATTN_ERR_INTERNAL, "the coordinator answered %llu bytes of %llu",
                           (unsigned long long)rpc_message_data_size(message),
                           (unsigned long long)expected);
    } else if (status == ATTN_OK) {
        scatter(step, message, 0, expected, o, (uint8_t *)lse);
    }
    rpc_message_free(message);
    return status;
}

/* Those of the entries that have lists, as the wire names them. */
static attn_status_t
encode_lists(wire_block_t *block, const door_step_t *step, const attn_lists_t *lists,
             Attn__V1__RunRequest *head)
{
    engine_lists_t *given = wire_alloc(block, step->n, sizeof(*given));
    uint32_t n            = 0;

    if (given == NULL) {
        return ATTN_ERR_NO_MEMORY;
    }
    for (uint32_t i = 0; i < step->n; i++) {
        if (lists[i].n_lists > 0) {
            given[n++] = (engine_lists_t){.entry   = i,
                                          .n_lists = lists[i].n_lists,
                                          .indptr  = lists[i].indptr,
                                          .pages   = lists[i].pages};
        }
    }
    head->n_lists = n;
    return wire_lists_encode(block, given, n, &head->lists);
}

/* The layer's tensors in parts, the lists with the first. */
static void
send_parts(door_step_t *step, Attn__V1__RunRequest *head, const struct iovec tensors[PIECES],
           uint64_t total)
{
    Attn__V1__StepRequest request = ATTN__V1__STEP_REQUEST__INIT;
    struct iovec part[PIECES];

    request.op_case = ATTN__V1__STEP_REQUEST__OP_RUN;
    request.run     = head;
    head->total     = total;
    do {
        uint64_t size = attn_min(total - head->offset, RPC_DATA_PART_MAX);
        line_send(step->line, &request, part, cut(tensors, head->offset, size, part));
        head->offset += size;
        head->n_lists = 0;
    } while (head->offset < total);
}

attn_status_t
door_step_run(door_step_t *step, uint32_t layer, const void *q, const void *k, const void *v,
              void *o, float *lse, const attn_lists_t *lists)
{
    Attn__V1__RunRequest head    = ATTN__V1__RUN_REQUEST__INIT;
    wire_block_t block           = {0};
    attn_status_t status         = ATTN_OK;
    struct iovec tensors[PIECES] = {
        {.iov_base = (void *)q, .iov_len = q != NULL ? step->q : 0},
        {.iov_base = (void *)k, .iov_len = k != NULL ? step->k : 0},
        {.iov_base = (void *)v, .iov_len = v != NULL ? step->v : 0},
    };
    uint64_t total    = tensors[0].iov_len + tensors[1].iov_len + tensors[2].iov_len;
    uint64_t expected = q != NULL ? step->o + step->lse : 0;

    head.step_id = step->id;
    head.layer   = layer;
    head.no_kv   = k == NULL;
    head.no_q    = q == NULL;
    if (lists != NULL) {
        status = encode_lists(&block, step, lists, &head);
    }
    if (status == ATTN_OK && step->line == NULL) {
        status = run_unary(step, &head, tensors, expected, o, lse);
    } else if (status == ATTN_OK) {
        send_parts(step, &head, tensors, total);
        status = run_receive(step, layer, expected, o, lse);
    }
    wire_free(&block);
    return status;
}

/* ---- commit and abort ---- */

attn_status_t
door_step_commit(door_step_t *step, const attn_commit_t *what)
{
    Attn__V1__CommitRequest commit = ATTN__V1__COMMIT_REQUEST__INIT;
    Attn__V1__StepRequest request  = ATTN__V1__STEP_REQUEST__INIT;
    attn_status_t status;

    commit.step_id = step->id;
    if (what != NULL) {
        commit.n_accepted = what->accepted != NULL ? step->n : 0;
        commit.accepted   = (uint32_t *)what->accepted;
        commit.n_path     = what->n_path;
        commit.path       = (uint32_t *)what->path;
    }
    if (step->line != NULL) {
        request.op_case = ATTN__V1__STEP_REQUEST__OP_COMMIT;
        request.commit  = &commit;
        status = exchange(step, &request, step->deadline_ns, ATTN__V1__STEP_REPLY__OP_COMMIT, NULL);
    } else {
        status = rpc_call_typed(step->cache->door->channel, "/attn.v1.Attention/Commit", &commit,
                                step->deadline_ns, NULL, NULL, NULL);
    }
    if (status == ATTN_OK) {
        step_free(step, true);
    }
    return status;
}

void
door_step_abort(door_step_t *step)
{
    Attn__V1__AbortRequest abort  = ATTN__V1__ABORT_REQUEST__INIT;
    Attn__V1__StepRequest request = ATTN__V1__STEP_REQUEST__INIT;
    uint64_t deadline             = attn_now_ns() + ABORT_TIMEOUT_MS * ATTN_NS_PER_MS;

    if (step == NULL) {
        return;
    }
    abort.step_id = step->id;
    if (step->line != NULL && !step->broken) {
        request.op_case = ATTN__V1__STEP_REQUEST__OP_ABORT;
        request.abort   = &abort;
        exchange(step, &request, deadline, ATTN__V1__STEP_REPLY__OP_ABORT, NULL);
    } else if (step->line == NULL) {
        rpc_call_typed(step->cache->door->channel, "/attn.v1.Attention/Abort", &abort, deadline,
                       NULL, NULL, NULL);
    }
    step_free(step, true); /* closing a broken line aborts the step there */
}
