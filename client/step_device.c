/*
 * step_device.c: tensors in a GPU's memory. A worker in this process on that GPU works with them
 * where they are, if it owns all that the step needs: a run then waits for the device, and
 * attn_step_enqueue() leaves it to the caller's stream. For any other worker a run takes copies: in
 * memory of the worker's GPU, if the link maps some, else in pinned memory of the host, the same
 * way that strided tensors of the host are packed. The first run of a step settles which.
 */
#include "client/step_int.h"

#include "base/status.h"
#include "client/stages.h"

static const char *const names[STAGES] = {"q", "k", "v", "o", "lse"};

/* ---- where tensors are ---- */

int
step_gpu(const attn_step_t *step)
{
    const share_t *share = &step->shares[0];

    return step->n_shares == 1 && step->n_gathers == 0 && step->list_room == 0 &&
                   share->link != NULL && share->link->ops->gpu != NULL
               ? share->link->ops->gpu(share->link)
               : -1;
}

typedef struct shape {
    attn_dtype_t dtype;
    uint64_t rows;
    uint32_t heads, dim;
} shape_t;

/* What tensors of that number are like. */
static shape_t
shape_of(const attn_step_t *step, int which)
{
    const attn_geometry_t *g = &step->cache->geometry;
    bool of_q                = which == TENSOR_Q || which == TENSOR_O;

    return (shape_t){
        .dtype = which == TENSOR_Q   ? step->q_dtype
                 : which == TENSOR_O ? step->o_dtype
                                     : g->kv_dtype,
        .rows  = of_q ? step->q_rows : step->new_rows,
        .heads = of_q ? g->q_heads : g->kv_heads,
        .dim   = which == TENSOR_Q || which == TENSOR_K ? g->head_dim_k : g->head_dim_v,
    };
}

/* A tensor of that number as it is given, strides filled in. */
static attn_status_t
check_shape(const attn_tensor_t *tensor, int which, const shape_t *shape, attn_tensor_t *whole)
{
    return step_tensor_check(tensor, names[which], shape->dtype, shape->heads, shape->dim, whole);
}

/* The tensors of a run that count. */
static void
tensors_of(const attn_step_t *step, const attn_run_t *run, const attn_tensor_t *tensors[TENSORS])
{
    tensors[TENSOR_Q] = step->q_rows > 0 ? run->q : NULL;
    tensors[TENSOR_K] = step->new_rows > 0 ? run->k : NULL;
    tensors[TENSOR_V] = step->new_rows > 0 ? run->v : NULL;
    tensors[TENSOR_O] = tensors[TENSOR_Q] != NULL ? run->o : NULL;
}

/* The GPU in whose memory it is; -1: the host's. What is told to be a GPU's is looked at, too: an
 * address that is not mapped there ends the CUDA context of the whole process. */
static attn_status_t
gpu_of(int which, const void *at, attn_memory_t memory, int *gpu_p)
{
    *gpu_p = memory == ATTN_MEMORY_HOST ? -1 : attn_memory_gpu(at);
    if (memory == ATTN_MEMORY_CUDA && *gpu_p < 0) {
        return attn_fail(
            ATTN_ERR_INVALID,
            "%s is at %p: no GPU's memory, as it was told to be (ATTN_MEMORY_CUDA), as "
            "far as a CUDA driver in this process knows",
            names[which], at);
    }
    return ATTN_OK;
}

/* The GPU that all are of; -1: none is of any. */
static attn_status_t
gpu_of_all(const attn_tensor_t *const tensors[TENSORS], const float *lse, int *gpu_p)
{
    int first = STAGES;

    *gpu_p = -1;
    for (int i = 0; i < STAGES; i++) {
        const attn_tensor_t *t = tensors[i < TENSORS ? i : TENSOR_O]; /* the LSE is where o is */
        const void *at         = t == NULL ? NULL : i < TENSORS ? t->data : lse;
        int gpu;
        if (at == NULL) {
            continue;
        }
        if ((unsigned)t->memory > ATTN_MEMORY_CUDA) {
            return attn_fail(ATTN_ERR_INVALID, "%s.memory is %d: 0 (auto), 1 (host) or 2 (CUDA)",
                             names[i], (int)t->memory);
        }
        attn_status_t status = gpu_of(i, at, t->memory, &gpu);
        if (status != ATTN_OK) {
            return status;
        }
        if (first == STAGES) {
            first  = i;
            *gpu_p = gpu;
        } else if (gpu != *gpu_p) {
            return attn_fail(ATTN_ERR_INVALID,
                             "%s is in the memory of GPU %d, %s of GPU %d (-1: the host): all of a "
                             "run are in one",
                             names[first], *gpu_p, names[i], gpu);
        }
    }
    return ATTN_OK;
}

/* ---- as they are ---- */

/* Row and head strides, and that o is packed. */
static attn_status_t
rows_of(attn_step_t *step, int which, const attn_tensor_t *tensor, const attn_rows_t **rows_p)
{
    shape_t shape = shape_of(step, which);
    attn_tensor_t whole;

    *rows_p = NULL;
    if (tensor == NULL) {
        return ATTN_OK;
    }
    uint64_t row         = (uint64_t)shape.heads * shape.dim;
    attn_status_t status = check_shape(tensor, which, &shape, &whole);
    if (status != ATTN_OK) {
        return status;
    }
    if (which == TENSOR_O &&
        (whole.head_stride != shape.dim || (shape.rows > 1 && whole.token_stride != row))) {
        return attn_fail(ATTN_ERR_INVALID,
                         "o has strides %llu (token) and %llu (head): in a GPU's memory it is "
                         "packed, %llu and %u",
                         (unsigned long long)whole.token_stride,
                         (unsigned long long)whole.head_stride, (unsigned long long)row, shape.dim);
    }
    step->rows[which] = (attn_rows_t){
        .at = whole.data, .row_stride = whole.token_stride, .head_stride = whole.head_stride};
    *rows_p = &step->rows[which];
    return ATTN_OK;
}

static attn_status_t
call_of(attn_step_t *step, const attn_run_t *run, const attn_tensor_t *const tensors[TENSORS],
        void *stream)
{
    engine_call_t call = {.layer = run->layer, .stream = stream};
    const attn_rows_t *o;
    attn_status_t status;

    if ((status = rows_of(step, TENSOR_Q, tensors[TENSOR_Q], &call.q)) != ATTN_OK ||
        (status = rows_of(step, TENSOR_K, tensors[TENSOR_K], &call.k)) != ATTN_OK ||
        (status = rows_of(step, TENSOR_V, tensors[TENSOR_V], &call.v)) != ATTN_OK ||
        (status = rows_of(step, TENSOR_O, tensors[TENSOR_O], &o)) != ATTN_OK) {
        return status;
    }
    call.o     = o != NULL ? o->at : NULL;
    call.lse   = o != NULL ? run->lse : NULL;
    step->call = call;
    return ATTN_OK;
}

/* ---- copies ---- */

_Static_assert(STAGES == STAGES_MAX, "a piece for each tensor");

/* How many workers would have to work with the same tensors, and other reasons against it. */
bool
step_is_whole(const attn_step_t *step)
{
    return step->n_shares == 1 && step->n_gathers == 0 && step->list_room == 0;
}

/* A caller that does not say where tensors will be has memory lent for it once some were a GPU's.
 */
bool
step_may_map(const attn_step_t *step)
{
    const attn_client_t *client = step->client;
    const link_t *link          = step->shares[0].link;
    bool seen                   = client->gpu_way == ATTN_GPU_MAPPED ||
                atomic_load(&client->runs_staged) + atomic_load(&client->runs_mapped) > 0;

    return step_is_whole(step) && link->ops->map != NULL && client->gpu_way != ATTN_GPU_STAGED &&
           (step->memory == ATTN_MEMORY_CUDA ||
            (step->memory == ATTN_MEMORY_AUTO && seen && attn_memory_has_cuda()));
}

void
step_stages_free(attn_step_t *step)
{
    if (step->way == WAY_MAPPED) {
        const share_t *share = &step->shares[0];
        if (step->stages != NULL && attn_copies_wait(step->stages->copies, 0) != ATTN_OK) {
            share->link->ops->adrift(share->remote);
        }
        if (step->stages != NULL) {
            step->stages->mapped = step->mapped.memory;
        } else {
            attn_shared_unref(step->mapped.memory);
        }
        step->way = WAY_OPEN;
    }
    stages_give(step->client, step->stages);
    step->stages = NULL;
}

/* Why a step with tensors of a GPU has them go through the host's memory, whatever the worker
 * lends.
 */
static attn_status_t
may_map(const attn_step_t *step)
{
    const char *transport = step->shares[0].link->ops->name;

    if (step->client->gpu_way == ATTN_GPU_STAGED) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "gpu_way is staged");
    }
    if (step->n_shares > 1) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "the step's KV is on %u workers", step->n_shares);
    }
    if (!step_is_whole(step)) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, step->list_room > 0
                                                   ? "an entry of the step has list_room"
                                                   : "the worker answers with partials");
    }
    return step->shares[0].link->ops->map != NULL
               ? ATTN_OK
               : attn_fail(ATTN_ERR_UNSUPPORTED, "the worker is reached by way of %s", transport);
}

static attn_status_t
map_step(attn_step_t *step, int gpu, uint64_t until_ns)
{
    const share_t *share = &step->shares[0];
    attn_status_t status = may_map(step);

    return status == ATTN_OK
               ? share->link->ops->map(share->remote, gpu, step->client->gpu_way == ATTN_GPU_MAPPED,
                                       until_ns, &step->mapped)
               : status;
}

static void
note_way(const attn_step_t *step, const char *reason)
{
    for (uint32_t s = 0; s < step->n_shares; s++) {
        link_note_gpu(step->shares[s].link, reason);
    }
}

/* Which way the step's tensors go: as its first run's. */
static attn_status_t
open_way(attn_step_t *step, int gpu, uint64_t until_ns)
{
    bool insists         = step->client->gpu_way == ATTN_GPU_MAPPED;
    attn_status_t status = map_step(step, gpu, insists ? until_ns : 0);

    if (status == ATTN_ERR_DEADLINE && insists) {
        return attn_fail(status,
                         "the memory of the worker's GPU was not mapped for GPU %d before the "
                         "deadline",
                         gpu);
    }
    note_way(step, status == ATTN_OK ? "" : attn_last_error());
    if (status != ATTN_OK && insists) {
        return attn_fail_in(ATTN_ERR_UNSUPPORTED,
                            "gpu_way is mapped, but tensors of GPU %d would go through the host's "
                            "memory: ",
                            gpu);
    }
    step->way        = status == ATTN_OK ? WAY_MAPPED : WAY_STAGED;
    step->mapped_gpu = gpu;
    return ATTN_OK;
}

/* After that. */
static attn_status_t
check_way(const attn_step_t *step, int gpu)
{
    if (step->way == WAY_MAPPED && step->mapped_gpu != gpu) {
        return attn_fail(ATTN_ERR_INVALID,
                         "the tensors are in the memory of GPU %d (-1: the host's), those of the "
                         "step's first run were in GPU %d's: all runs of a step alike",
                         gpu, step->mapped_gpu);
    }
    if (step->way == WAY_STAGED && step->mapped_gpu < 0 && gpu >= 0) {
        note_way(step, "the tensors of the step's first run were in the host's memory");
        if (step->client->gpu_way == ATTN_GPU_MAPPED) {
            return attn_fail(ATTN_ERR_UNSUPPORTED,
                             "gpu_way is mapped, but the tensors of the step's first run were in "
                             "the host's memory, and those of GPU %d would go through it: all runs "
                             "of a step alike",
                             gpu);
        }
    }
    return ATTN_OK;
}

/* Room for the copy of a tensor. */
static attn_status_t
take_room(attn_step_t *step, int which, uint64_t bytes)
{
    bool in        = which < TENSOR_O;
    uint64_t *used = in ? &step->mapped_in : &step->mapped_out;
    uint64_t most  = in ? step->mapped.in_bytes : step->mapped.out_bytes;
    uint8_t *at    = in ? step->mapped.in : step->mapped.out;

    if (!step->mapped_run) {
        attn_status_t status   = stages_room(step->stages, (uint32_t)which, bytes);
        step->packed_at[which] = (attn_packed_t){.at = step->stages->pieces[which].at};
        return status;
    }
    if (bytes > most - *used) {
        return attn_fail(ATTN_ERR_INTERNAL, "%s has %llu bytes: %llu of %llu are left in the slot",
                         names[which], (unsigned long long)bytes,
                         (unsigned long long)(most - *used), (unsigned long long)most);
    }
    step->packed_at[which] = (attn_packed_t){.at = at + *used, .on_gpu = true};
    *used += bytes;
    return ATTN_OK;
}

static attn_strided_t
strided_of(const attn_tensor_t *whole, const shape_t *shape)
{
    uint64_t size = attn_dtype_size(whole->dtype);

    return (attn_strided_t){.at          = whole->data,
                            .rows        = shape->rows,
                            .row_stride  = whole->token_stride * size,
                            .heads       = shape->heads,
                            .head_stride = whole->head_stride * size,
                            .head_bytes  = shape->dim * size};
}

/* A tensor's copy: checked, and with room. */
static attn_status_t
stage_tensor(attn_step_t *step, int which, const attn_tensor_t *tensor, attn_tensor_t *whole,
             const attn_tensor_t **out)
{
    shape_t shape = shape_of(step, which);

    *out = NULL;
    if (tensor == NULL) {
        return ATTN_OK;
    }
    attn_status_t status = check_shape(tensor, which, &shape, whole);
    if (status == ATTN_OK) {
        status = take_room(step, which,
                           shape.rows * shape.heads * shape.dim * attn_dtype_size(shape.dtype));
    }
    step->staged_tensors[which] = (attn_tensor_t){
        .data = step->packed_at[which].at, .dtype = shape.dtype, .memory = ATTN_MEMORY_HOST};
    *out = &step->staged_tensors[which];
    return status;
}

/* All that can be wrong is found before anything is queued. */
static attn_status_t
stage_all(attn_step_t *step, const attn_run_t *run, const attn_tensor_t *const tensors[TENSORS],
          attn_tensor_t whole[TENSORS], attn_run_t *out)
{
    attn_status_t status;

    if ((status = stage_tensor(step, TENSOR_Q, tensors[TENSOR_Q], &whole[TENSOR_Q], &out->q)) !=
            ATTN_OK ||
        (status = stage_tensor(step, TENSOR_K, tensors[TENSOR_K], &whole[TENSOR_K], &out->k)) !=
            ATTN_OK ||
        (status = stage_tensor(step, TENSOR_V, tensors[TENSOR_V], &whole[TENSOR_V], &out->v)) !=
            ATTN_OK ||
        (status = stage_tensor(step, TENSOR_O, tensors[TENSOR_O], &step->o_on_gpu, &out->o)) !=
            ATTN_OK) {
        return status;
    }
    step->lse_on_gpu = out->q != NULL ? run->lse : NULL;
    if (step->lse_on_gpu != NULL) {
        uint64_t bytes = step->q_rows * step->cache->geometry.q_heads * sizeof(float);
        status         = take_room(step, TENSOR_LSE, bytes);
        out->lse       = (float *)(void *)step->packed_at[TENSOR_LSE].at;
    }
    return status;
}

static attn_status_t
fetch_all(attn_step_t *step, const attn_tensor_t *const tensors[TENSORS],
          const attn_tensor_t whole[TENSORS])
{
    attn_status_t status = ATTN_OK;

    for (int i = 0; i < TENSOR_O && status == ATTN_OK; i++) {
        shape_t shape       = shape_of(step, i);
        attn_strided_t from = strided_of(&whole[i], &shape);
        if (tensors[i] != NULL) {
            status = attn_copies_fetch(step->stages->copies, &from, &step->packed_at[i]);
        }
    }
    return status;
}

/* Copies of the tensors, on their way to where the way leads. */
static attn_status_t
stage_run(attn_step_t *step, int gpu, const attn_run_t *run,
          const attn_tensor_t *const tensors[TENSORS], attn_run_t *out)
{
    attn_tensor_t whole[TENSORS];
    attn_status_t status = ATTN_OK;

    if (step->stages != NULL && step->stages->gpu != gpu) {
        step_stages_free(step);
    }
    step->mapped_run = step->way == WAY_MAPPED;
    step->mapped_in = step->mapped_out = 0;
    if (step->stages == NULL) {
        status = stages_take(step->client, gpu, &step->stages);
    }
    if (status == ATTN_OK) {
        status = stage_all(step, run, tensors, whole, out);
    }
    if (status != ATTN_OK) {
        return status;
    }
    step->staging = true;
    step->staged  = out->q != NULL;
    return fetch_all(step, tensors, whole);
}

/* Until the way is open: step_tensors_look(). */
static void
put_off(attn_step_t *step, int gpu, const attn_tensor_t *const tensors[TENSORS], attn_run_t *out)
{
    const attn_tensor_t **to[TENSORS] = {&out->q, &out->k, &out->v, &out->o};

    for (int i = 0; i < TENSORS; i++) {
        *to[i] = NULL;
        if (tensors[i] != NULL) {
            step->staged_tensors[i] = *tensors[i];
            *to[i]                  = &step->staged_tensors[i];
        }
    }
    step->mapped_gpu = gpu;
    step->staging    = true;
}

attn_status_t
step_tensors_wait(attn_step_t *step, uint64_t until_ns)
{
    return step->stages != NULL ? attn_copies_wait(step->stages->copies, until_ns) : ATTN_OK;
}

attn_status_t
step_tensors_look(attn_step_t *step)
{
    const attn_tensor_t *tensors[TENSORS];
    attn_run_t run = step->staged_run;

    if (step->staging && step->way == WAY_OPEN) {
        attn_status_t status = open_way(step, step->mapped_gpu, 0);
        if (status != ATTN_OK) {
            return status;
        }
        tensors_of(step, &run, tensors);
        status = stage_run(step, step->mapped_gpu, &run, tensors, &step->staged_run);
        if (status != ATTN_OK) {
            step_tensors_wait(step, step->deadline_ns); /* what was queued of them */
            return status;
        }
    }
    return step_tensors_wait(step, 0);
}

attn_status_t
step_tensors_return(attn_step_t *step)
{
    stages_t *stages     = step->stages;
    shape_t shape        = shape_of(step, TENSOR_O);
    attn_strided_t to    = strided_of(&step->o_on_gpu, &shape);
    attn_status_t status = attn_copies_send(stages->copies, &step->packed_at[TENSOR_O], &to);

    if (status == ATTN_OK && step->lse_on_gpu != NULL) {
        uint64_t bytes = shape.rows * shape.heads * sizeof(float);
        to             = (attn_strided_t){
                        .at = (uint8_t *)step->lse_on_gpu, .rows = 1, .heads = 1, .head_bytes = bytes};
        status = attn_copies_send(stages->copies, &step->packed_at[TENSOR_LSE], &to);
    }
    return status;
}

/* Of a GPU that is not the worker's, or not in this process. */
static attn_status_t
take_copies(attn_step_t *step, int gpu, const attn_run_t *run,
            const attn_tensor_t *const tensors[TENSORS], bool waits, attn_run_t *out)
{
    attn_status_t status = ATTN_OK;

    if (step->way == WAY_OPEN) {
        status = open_way(step, gpu, waits ? step->deadline_ns : 0);
        if (status == ATTN_ERR_DEADLINE && !waits) {
            put_off(step, gpu, tensors, out);
            return ATTN_OK;
        }
    }
    if (status == ATTN_OK) {
        status = check_way(step, gpu);
    }
    return status == ATTN_OK ? stage_run(step, gpu, run, tensors, out) : status;
}

attn_status_t
step_tensors_take(attn_step_t *step, const attn_run_t *run, bool waits, attn_run_t *out)
{
    const attn_tensor_t *tensors[TENSORS];
    int worker = step_gpu(step), gpu;

    *out             = *run;
    step->direct     = false;
    step->staged     = false;
    step->staging    = false;
    step->mapped_run = false;
    tensors_of(step, run, tensors);
    attn_status_t status = gpu_of_all(tensors, run->lse, &gpu);
    if (status != ATTN_OK || (tensors[TENSOR_Q] == NULL && tensors[TENSOR_K] == NULL)) {
        return status;
    }
    if (gpu < 0) {
        if (step->way == WAY_OPEN) {
            step->way        = WAY_STAGED;
            step->mapped_gpu = gpu;
        }
        return check_way(step, gpu);
    }
    if (gpu != worker) {
        return take_copies(step, gpu, run, tensors, waits, out);
    }
    if ((status = call_of(step, run, tensors, NULL)) == ATTN_OK) {
        step->direct = true;
        atomic_fetch_add(&step->client->runs_cuda, 1);
    }
    return status;
}

/* ---- on the caller's stream ---- */

/* Why a step has nothing to do with streams. */
static attn_status_t
refuse_stream(const attn_step_t *step)
{
    const share_t *share = &step->shares[0];

    if (step_gpu(step) >= 0) {
        return attn_fail(ATTN_ERR_INVALID,
                         "the step was not begun with memory = ATTN_MEMORY_CUDA, so nothing is "
                         "ready for a stream");
    }
    if (step->on_stream) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "the step is for attn_step_run(): %s",
                         step->not_driven);
    }
    if (step->n_shares > 1) {
        return attn_fail(ATTN_ERR_UNSUPPORTED,
                         "the step's KV is on %u workers: what is enqueued is all on one",
                         step->n_shares);
    }
    if (step->list_room > 0) {
        return attn_fail(ATTN_ERR_UNSUPPORTED,
                         "an entry has list_room: lists of a run cannot be enqueued");
    }
    return attn_fail(ATTN_ERR_UNSUPPORTED,
                     "the worker (%s) does not compute on a GPU in this process: open "
                     "inproc://cuda:N to enqueue steps, or begin them with on_stream, or use "
                     "attn_step_run()",
                     share->link != NULL ? share->link->ops->name : "none");
}

static attn_status_t
stream_check(const attn_step_t *step)
{
    if (!step->on_device && !step->is_driven) {
        return refuse_stream(step);
    }
    if (!atomic_load(&step->idle)) {
        return attn_fail(ATTN_ERR_BUSY,
                         "a run of the step is outstanding: wait for its completion");
    }
    return step->dead || atomic_load(&step->aborting)
               ? attn_fail(ATTN_ERR_ABORTED, "the step was aborted: %s", step->sentence)
               : ATTN_OK;
}

/* As a run of these tensors: which of them there must be. */
static attn_status_t
enqueue_check(const attn_step_t *step, const attn_run_t *run)
{
    const char *missing = NULL;

    if (run->layer >= step->cache->geometry.layers) {
        return attn_fail(ATTN_ERR_INVALID, "layer is %u: the cache has %u", run->layer,
                         step->cache->geometry.layers);
    }
    if (run->lse != NULL && !step->want_lse) {
        return attn_fail(ATTN_ERR_INVALID, "lse is given, but the batch has want_lse = false");
    }
    if (step->q_rows > 0 && run->q != NULL && run->o == NULL) {
        missing = "o";
    } else if ((run->k == NULL) != (run->v == NULL)) {
        missing = run->k == NULL ? "k" : "v";
    }
    return missing == NULL
               ? ATTN_OK
               : attn_fail(ATTN_ERR_INVALID, "%s is NULL, but not what goes with it", missing);
}

attn_status_t
attn_step_enqueue(attn_step_t *step, uint32_t layer, const attn_tensor_t *q, const attn_tensor_t *k,
                  const attn_tensor_t *v, const attn_tensor_t *o, float *lse, void *stream)
{
    attn_run_t run       = {.layer = layer, .q = q, .k = k, .v = v, .o = o, .lse = lse};
    attn_status_t status = stream_check(step);
    const attn_tensor_t *tensors[TENSORS];
    int gpu    = -1;
    int worker = status != ATTN_OK ? -1 : step->is_driven ? step->drive.gpu : step_gpu(step);

    if (status != ATTN_OK || (status = enqueue_check(step, &run)) != ATTN_OK) {
        return status;
    }
    tensors_of(step, &run, tensors);
    bool any = tensors[TENSOR_Q] != NULL || tensors[TENSOR_K] != NULL;
    if (!any) {
        return ATTN_OK;
    }
    if ((status = gpu_of_all(tensors, run.lse, &gpu)) != ATTN_OK) {
        return status;
    }
    if (gpu != worker) {
        return attn_fail(ATTN_ERR_INVALID,
                         "the tensors are in the memory of GPU %d (-1: the host's), the worker "
                         "computes on GPU %d, or that is the batch's",
                         gpu, worker);
    }
    status = call_of(step, &run, tensors, stream);
    if (status == ATTN_OK && step->is_driven) {
        return step_driven_enqueue(step, &run, stream);
    }
    return status == ATTN_OK
               ? step->shares[0].link->ops->enqueue(step->shares[0].remote, &step->call)
               : status;
}

attn_status_t
attn_step_graph(attn_step_t *step, uint64_t *graph_p)
{
    attn_status_t status = stream_check(step);

    if (status == ATTN_OK && step->is_driven) {
        *graph_p = step_driven_graph(step);
        return ATTN_OK;
    }
    return status == ATTN_OK ? step->shares[0].link->ops->graph(step->shares[0].remote, graph_p)
                             : status;
}

attn_status_t
attn_step_replay(attn_step_t *step, void *stream)
{
    attn_status_t status = stream_check(step);

    if (status == ATTN_OK && step->is_driven) {
        return step_driven_replay(step, stream, false);
    }
    return status == ATTN_OK
               ? step->shares[0].link->ops->replay(step->shares[0].remote, stream, false)
               : status;
}

attn_status_t
attn_step_replayed(attn_step_t *step, void *stream)
{
    attn_status_t status = stream_check(step);

    if (status == ATTN_OK && step->is_driven) {
        return step_driven_replay(step, stream, true);
    }
    return status == ATTN_OK
               ? step->shares[0].link->ops->replay(step->shares[0].remote, stream, true)
               : status;
}
