/*
 * One layer of a step on the device: q up, a launch for each class of works, the merge of what was
 * cut, and the answer down, on the workspace's stream.
 */
#include "base/checked.h"
#include "kernels/cuda/cuda_int.h"
#include "kernels/cuda/store.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define LOG2_E 1.44269504088896340736f

/* Sinks beyond this overflow the range of exponents. */
#define SINK_MAX 5e8f

/* States of a segment of the merge kernel at least, of few rows or of more than there are
 * processors for, and segments at most. */
#define MERGE_SEGMENT_FEW 4u
#define MERGE_SEGMENT_MANY 8u
#define MERGE_WARPS 16u

/* Larger tables leave no memory for the next ones. */
#define IMAGE_KEPT_BYTES (UINT64_C(16) << 20)

/* Levels of stacks that the ring leaves room for. */
#define LEVELS 4u

#define STATIC_SHARED 1536u /* of attend.cu, and some room */

/* Bytes of a level of all stacks of a CTA, in shared memory or beyond it. */
static uint64_t
level_bytes(const cuda_class_t *class, uint32_t d_v)
{
    return (uint64_t)CUDA_STATE_BYTES(d_v / CUDA_WARPS, class->rows / 8, class->pairs) *
           CUDA_WARPS * class->teams;
}

/* Stages of the rings, and levels of the stacks beside them, in what shared memory there is beside
 * `near`. Every second leaf needs one level, every fourth two: the first ones are worth a stage. */
static void
divide_shared(const cuda_backend_t *backend, const cuda_class_t *class, uint64_t near, uint32_t d_k,
              cuda_args_t *x)
{
    uint64_t room  = (uint64_t)backend->shared_bytes - STATIC_SHARED - near;
    uint64_t level = level_bytes(class, x->head_dim_v);
    uint64_t pair  = 2ull * CUDA_STAGE(d_k, x->head_dim_v) * class->teams; /* K and V */
    uint64_t ring  = attn_max(room - attn_min(LEVELS * level, room / 8), pair);

    x->stages = (uint32_t)(2 * attn_min(ring / pair, CUDA_STAGES_MAX / 2 / class->teams));
    x->levels = (uint32_t)((room - x->stages / 2 * pair) / level);
}

/* Bytes of the stacks beyond shared memory of the classes before one: all run side by side. */
static uint64_t
deep_before(const cuda_image_t *image, uint32_t end, uint32_t d_v)
{
    uint64_t deep = 0;

    for (uint32_t c = 0; c < end; c++) {
        const cuda_class_t *class = &image->classes[c];
        deep += (uint64_t) class->grid * image->depth * level_bytes(class, d_v);
    }
    return deep;
}

uint64_t
cuda_deep_bytes(const cuda_image_t *image, uint32_t d_v)
{
    return deep_before(image, CUDA_CLASSES, d_v) +
           (uint64_t)image->many_grid * CUDA_MANY_GROUPS * image->many_depth * CUDA_MANY_STATE(d_v);
}

/* Offsets of everything in the block: the image first. */
static void
lay_out(attn_workspace_t *w)
{
    const attn_problem_t *p = &w->plan->problem;
    uint64_t d_v = p->head_dim_v, q_rows = w->plan->n_queries * p->q_heads;
    uint64_t o_rows = w->plan->o_rows * p->q_heads;
    uint64_t end    = 0;

    cuda_take(&end, w->image.bytes);
    w->params = cuda_take(&end, 3 * (uint64_t)p->q_heads * sizeof(float));
    w->q      = cuda_take(&end, q_rows * p->head_dim_k * attn_dtype_size(w->q_dtype));
    w->answer = cuda_take(&end, o_rows * d_v * attn_dtype_size(w->o_dtype));
    w->lse    = cuda_take(&end, o_rows * sizeof(float));
    w->a      = cuda_take(&end, w->plan->states * d_v * sizeof(float));
    w->l      = cuda_take(&end, w->plan->states * sizeof(float));
    w->e      = cuda_take(&end, w->plan->states * sizeof(int32_t));
    w->error  = cuda_take(&end, sizeof(uint64_t));

    w->answer_end = end;
    w->parts      = cuda_take(&end, w->q_parts > 1 ? q_rows * p->head_dim_k * 2 * w->q_parts : 0);
    w->q_scale    = cuda_take(&end, w->q_parts > 1 ? q_rows * sizeof(float) : 0);
    w->slot_a     = cuda_take(&end, w->image.slots * d_v * sizeof(float));
    w->slot_l     = cuda_take(&end, w->image.slots * sizeof(float));
    w->slot_e     = cuda_take(&end, w->image.slots * sizeof(int32_t));
    w->deep       = cuda_take(&end, cuda_deep_bytes(&w->image, p->head_dim_v));
    w->end        = end;
}

/* ---- memory that images are made in: kept from step to step ---- */

void
cuda_image_take(cuda_backend_t *backend, cuda_image_t *image)
{
    pthread_mutex_lock(&backend->lock);
    if (backend->n_images > 0) {
        *image = backend->images[--backend->n_images];
    }
    pthread_mutex_unlock(&backend->lock);
}

void
cuda_image_give(cuda_backend_t *backend, cuda_image_t *image)
{
    bool kept = false;

    if (image->memory != NULL && image->bytes <= IMAGE_KEPT_BYTES) {
        pthread_mutex_lock(&backend->lock);
        kept = backend->n_images < CUDA_IMAGES_KEPT;
        if (kept) {
            backend->images[backend->n_images++] = *image;
        }
        pthread_mutex_unlock(&backend->lock);
    }
    if (!kept) {
        cuda_image_free(image);
    }
}

void
cuda_images_free(cuda_backend_t *backend)
{
    while (backend->n_images > 0) {
        cuda_image_free(&backend->images[--backend->n_images]);
    }
}

/* The tables of the plan as it is now, and a block that holds them and the rest. They are written
 * to its pinned memory, where that reaches, so that one copy takes them to the device. */
static attn_status_t
make_image(attn_workspace_t *w)
{
    attn_status_t status = cuda_image_build(w->plan, (uint32_t)w->backend->cut_for, &w->image);
    if (status != ATTN_OK) {
        return status;
    }
    lay_out(w);
    w->uploaded = false;
    if (w->block != NULL && w->block->bytes < w->end) {
        cuda_block_give(w->backend, w->block);
        w->block = NULL;
    }
    if (w->block == NULL && (status = cuda_block_take(w->backend, w->end, &w->block)) != ATTN_OK) {
        return status;
    }
    if (w->image.bytes <= w->block->host_bytes) {
        cuda_image_write(&w->image, w->block->host);
    }
    return ATTN_OK;
}

attn_status_t
cuda_workspace_create(attn_backend_t *backend, const attn_plan_t *plan, attn_dtype_t q_dtype,
                      attn_dtype_t o_dtype, attn_workspace_t **workspace_p)
{
    attn_workspace_t *w = calloc(1, sizeof(*w));

    if (w == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a workspace");
    }
    *w = (attn_workspace_t){.backend = (cuda_backend_t *)backend,
                            .plan    = plan,
                            .q_dtype = q_dtype,
                            .o_dtype = o_dtype,
                            .q_parts = CUDA_QUERY_PARTS};
    CUDA_VISIT(w->backend);
    attn_status_t status = visit.status;
    if (status == ATTN_OK && plan->n_works > 0) {
        cuda_image_take(w->backend, &w->image);
        status = make_image(w);
    }
    if (status != ATTN_OK) {
        cuda_workspace_destroy(backend, w);
        return status;
    }
    *workspace_p = w;
    return ATTN_OK;
}

void
cuda_workspace_destroy(attn_backend_t *backend, attn_workspace_t *w)
{
    (void)backend;
    if (w != NULL) {
        if (w->block != NULL) {
            cuda_block_give(w->backend, w->block);
        }
        cuda_image_give(w->backend, &w->image);
        free(w);
    }
}

/* ---- copies ---- */

/* Bytes of the caller to the block: through pinned memory where it reaches. */
static attn_status_t
upload(const attn_workspace_t *w, uint64_t at, const void *from, uint64_t bytes)
{
    const void *source = from;

    if (bytes == 0) {
        return ATTN_OK;
    }
    if (at + bytes <= w->block->host_bytes) {
        memcpy(w->block->host + at, from, bytes);
        source = w->block->host + at;
    }
    return CUDA_CALL(cuMemcpyHtoDAsync(w->block->device + at, source, bytes, w->block->stream));
}

/* One piece of the answer, from the block or its pinned copy. */
static attn_status_t
fetch(const attn_workspace_t *w, uint64_t at, void *to, uint64_t bytes)
{
    if (bytes == 0 || to == NULL) {
        return ATTN_OK;
    }
    if (w->answer_end <= w->block->host_bytes) {
        memcpy(to, w->block->host + at, bytes);
        return ATTN_OK;
    }
    attn_status_t status =
        CUDA_CALL(cuMemcpyDtoHAsync(to, w->block->device + at, bytes, w->block->stream));
    return status == ATTN_OK ? CUDA_CALL(cuStreamSynchronize(w->block->stream)) : status;
}

static attn_status_t
fetch_answer(const attn_workspace_t *w, const attn_answer_t *answer)
{
    const attn_problem_t *p = &w->plan->problem;
    uint64_t o_rows = w->plan->o_rows * p->q_heads, states = w->plan->states;
    attn_status_t status;

    if ((status = fetch(w, w->answer, answer->o,
                        o_rows * p->head_dim_v * attn_dtype_size(w->o_dtype))) != ATTN_OK ||
        (status = fetch(w, w->lse, answer->lse, o_rows * sizeof(float))) != ATTN_OK ||
        (status = fetch(w, w->a, answer->a, states * p->head_dim_v * sizeof(float))) != ATTN_OK ||
        (status = fetch(w, w->l, answer->l, states * sizeof(float))) != ATTN_OK) {
        return status;
    }
    return fetch(w, w->e, answer->e, states * sizeof(int32_t));
}

/* ---- the layer ---- */

static float
default_scale(uint32_t head_dim_k)
{
    return 1.0f / sqrtf((float)head_dim_k);
}

attn_status_t
cuda_layer_check(uint32_t q_heads, const attn_layer_t *layer)
{
    if (!isfinite(layer->scale) || !isfinite(layer->softcap) || layer->softcap < 0) {
        return attn_fail(ATTN_ERR_INVALID,
                         "scale is %g and softcap %g: both must be finite, softcap not negative",
                         (double)layer->scale, (double)layer->softcap);
    }
    for (uint32_t h = 0; h < q_heads; h++) {
        if (layer->slopes != NULL && !isfinite(layer->slopes[h])) {
            return attn_fail(ATTN_ERR_INVALID, "slopes[%u] is not finite", h);
        }
        if (layer->sinks != NULL && !(layer->sinks[h] <= SINK_MAX)) {
            return attn_fail(ATTN_ERR_INVALID, "sinks[%u] is %g: at most %g", h,
                             (double)layer->sinks[h], (double)SINK_MAX);
        }
    }
    return ATTN_OK;
}

/* Slopes, and sinks as states, of the layer. */
static attn_status_t
upload_params(const attn_workspace_t *w, const attn_layer_t *layer, cuda_args_t *x)
{
    uint32_t heads       = w->plan->problem.q_heads;
    const uint8_t *base  = (const uint8_t *)(uintptr_t)w->block->device + w->params;
    attn_status_t status = ATTN_OK;
    float l[CUDA_HEADS_MAX];
    int32_t e[CUDA_HEADS_MAX];

    if (layer->slopes != NULL) {
        x->slopes = (const float *)(const void *)base;
        status    = upload(w, w->params, layer->slopes, heads * sizeof(float));
    }
    if (layer->sinks != NULL && status == ATTN_OK) {
        for (uint32_t h = 0; h < heads; h++) {
            attn_state_of_sink(layer->sinks[h], &l[h], &e[h]);
        }
        x->sink_l = (const float *)(const void *)(base + heads * sizeof(float));
        x->sink_e = (const int32_t *)(const void *)(base + 2 * heads * sizeof(float));
        status    = upload(w, w->params + heads * sizeof(float), l, heads * sizeof(float));
        if (status == ATTN_OK) {
            status = upload(w, w->params + 2 * heads * sizeof(float), e, heads * sizeof(float));
        }
    }
    return status;
}

void
cuda_attend_fill(const attn_workspace_t *w, const attn_kv_t *kv, const attn_layer_t *layer,
                 const attn_answer_t *answer, cuda_args_t *x)
{
    const attn_problem_t *p = &w->plan->problem;
    float scale             = layer->scale != 0.0f ? layer->scale : default_scale(p->head_dim_k);
    const cuda_image_t *i   = &w->image;
    uint8_t *base           = (uint8_t *)(uintptr_t)w->block->device;
    uint64_t size           = attn_dtype_size(kv->dtype);
    uint32_t page           = kv->page_size;

#define AT(offset) ((void *)(base + (offset)))
    *x = (cuda_args_t){
        .leaves        = AT(i->leaves),
        .blocks        = AT(i->blocks),
        .queries       = AT(i->queries),
        .items         = AT(i->items),
        .refs          = AT(i->refs),
        .pages         = AT(i->pages),
        .present       = AT(i->present),
        .masks         = AT(i->masks),
        .k             = kv->k,
        .v             = kv->v,
        .k_page_stride = kv->k_page_stride * size,
        .v_page_stride = kv->v_page_stride * size,
        .page_size     = page,
        .page_shift    = (page & (page - 1)) == 0 ? (uint32_t)__builtin_ctz(page) : CUDA_NONE,
        .kv_heads      = p->kv_heads,
        .q_heads       = p->q_heads,
        .group         = w->plan->group,
        .head_dim_v    = p->head_dim_v,
        .q             = AT(w->q),
        .q_row_stride  = (uint64_t)p->q_heads * p->head_dim_k * 2,
        .q_head_stride = (uint64_t)p->head_dim_k * 2,
        .q_parts       = 1,
        .scale         = layer->softcap > 0 || layer->slopes != NULL ? scale : scale * LOG2_E,
        .softcap       = layer->softcap,
        .window        = (int32_t)attn_min(p->window, INT32_MAX),
        .causal        = p->causal,
        .o             = answer->o != NULL ? AT(w->answer) : NULL,
        .o_type        = (uint32_t)w->o_dtype,
        .lse           = answer->lse != NULL ? AT(w->lse) : NULL,
        .a             = AT(w->a),
        .l             = AT(w->l),
        .e             = AT(w->e),
        .slot_a        = AT(w->slot_a),
        .slot_l        = AT(w->slot_l),
        .slot_e        = AT(w->slot_e),
        .deep          = AT(w->deep),
        .bulk          = w->backend->major >= 9 && page % 8 == 0,
        .tiles         = AT(i->many_tiles),
        .leaf_sets     = i->leaf_sets,
        .box           = (uint32_t)attn_min(page & (0u - page), CUDA_LEAF),
        .error         = AT(w->error),
    };
    if (w->q_dtype != kv->dtype) {
        x->q             = AT(w->parts);
        x->q_parts       = w->q_parts;
        x->q_part_stride = w->plan->n_queries * p->q_heads * p->head_dim_k * 2;
        x->q_scale       = AT(w->q_scale);
    }
#undef AT
}

/* Queries of another type than the cache's: as sums of values of that. */
static attn_status_t
launch_split(const attn_workspace_t *w, const attn_kv_t *kv, const attn_rows_t *q,
             const cuda_args_t *x, CUstream stream)
{
    const attn_problem_t *p = &w->plan->problem;
    uint64_t rows           = w->plan->n_queries * p->q_heads;
    cuda_split_t split      = {
             .from             = q->at,
             .from_row_stride  = q->row_stride,
             .from_head_stride = q->head_stride,
             .to               = (void *)(uintptr_t)x->q,
             .from_type        = (uint32_t)w->q_dtype,
             .to_type          = (uint32_t)kv->dtype,
             .heads            = p->q_heads,
             .d                = p->head_dim_k,
             .parts            = w->q_parts,
             .part_stride      = rows * p->head_dim_k,
             .scale            = (float *)(uintptr_t)x->q_scale,
    };
    return cuda_launch(w->backend->split_queries, (uint32_t)rows, 1, 64, 0, false, stream,
                       (void *[]){&split});
}

static attn_status_t
launch_class(const attn_workspace_t *w, uint32_t c, bool general, cuda_args_t *x, CUstream stream)
{
    bool listed               = w->image.room.blocks > 0;
    const cuda_class_t *class = &w->image.classes[c];
    uint8_t *base             = (uint8_t *)(uintptr_t)w->block->device;
    uint32_t d_k = w->plan->problem.head_dim_k, d_v = x->head_dim_v;
    uint64_t near  = CUDA_NEAR_BYTES((uint64_t) class->rows, d_k) * class->teams;
    uint64_t least = 2ull * CUDA_STAGE(d_k, d_v) * class->teams + STATIC_SHARED;

    x->pieces      = (const cuda_piece_t *)(const void *)(base + class->pieces);
    x->queue       = (cuda_queue_t *)(void *)(base + w->image.queues) + c;
    x->deep        = base + w->deep + deep_before(&w->image, c, d_v);
    x->deep_levels = w->image.depth;
    x->teams       = class->teams;
    x->pairs       = class->pairs;
    x->near_q      = near + least <= (uint64_t)w->backend->shared_bytes;
    if (!x->near_q) { /* its place is there, with nothing in it, and nobody looks */
        near -= (uint64_t) class->rows * d_k * 2;
        general = true;
    }
    divide_shared(w->backend, class, near, d_k, x);
    uint64_t shared = (uint64_t) class->teams * x->stages * CUDA_STAGE(d_k, d_v) +
                      x->levels * level_bytes(class, d_v) + near;
    return cuda_launch(w->shape->attend[c][general  ? 2
                                           : listed ? 1
                                                    : 0],
                       class->grid, 1, CUDA_THREADS(class->rows, d_k, d_v), (uint32_t)shared,
                       w->backend->major >= 9, stream, (void *[]){x});
}

/*
 * Pages as boxes for the copy engine, in the order of tile.h: 64 elements of 8 tokens, all parts of
 * 64 of these tokens, all 8 tokens of a head after the other, pages. A box is x->box tokens.
 */
static attn_status_t
make_map(const attn_kv_t *kv, const cuda_args_t *x, bool values, cuda_map_t *map)
{
    uint64_t row = (values ? kv->head_dim_v : kv->head_dim_k) * 2ull, parts = row / 128;
    cuuint64_t sizes[5]   = {64, 8, parts, (uint64_t)kv->kv_heads * kv->page_size / 8, kv->n_pages};
    cuuint64_t strides[4] = {row, 128, 8 * row, values ? x->v_page_stride : x->k_page_stride};
    cuuint32_t box[5]     = {64, 8, (cuuint32_t)parts, x->box / 8, 1};
    cuuint32_t steps[5]   = {1, 1, 1, 1, 1};
    CUtensorMap made;

    _Static_assert(sizeof(made) == sizeof(*map), "a map of the driver");
    attn_status_t status = CUDA_CALL(cuTensorMapEncodeTiled(
        &made, CU_TENSOR_MAP_DATA_TYPE_UINT16, 5, (void *)(uintptr_t)(values ? x->v : x->k), sizes,
        strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
    memcpy(map, &made, sizeof(*map));
    return status;
}

/* The first of an attend: it begins when all before it on the stream is over, and what follows
 * begins beside it. */
static attn_status_t
launch_many(const attn_workspace_t *w, const attn_kv_t *kv, bool general, cuda_args_t *x,
            CUstream stream)
{
    cuda_map_t k_map = {{0}}, v_map = {{0}};
    bool listed          = w->image.room.present > 0;
    int mode             = x->q_parts > 1 ? 2 : general || listed ? 1 : 0;
    attn_status_t status = ATTN_OK;

    if (x->bulk) {
        status = make_map(kv, x, false, &k_map);
        status = status == ATTN_OK ? make_map(kv, x, true, &v_map) : status;
    }
    if (status != ATTN_OK) {
        return status;
    }
    x->deep = (uint8_t *)(uintptr_t)w->block->device + w->deep +
              deep_before(&w->image, CUDA_CLASSES, x->head_dim_v);
    x->deep_levels = w->image.many_depth;
    return cuda_launch(w->shape->prefill[mode], w->image.many_grid, 1, CUDA_MANY_THREADS,
                       CUDA_MANY_SHARED(kv->head_dim_k, kv->head_dim_v), false, stream,
                       (void *[]){x, &k_map, &v_map});
}

/* What the device says of the first row that went wrong. */
static attn_status_t
check_error(const attn_workspace_t *w)
{
    uint64_t error = UINT64_MAX;
    attn_status_t status;

    if ((status = fetch(w, w->error, &error, sizeof(error))) != ATTN_OK || error == UINT64_MAX) {
        return status;
    }
    return attn_fail(
        ATTN_ERR_NUMERIC,
        "entry %llu, query %llu, head %llu: a NaN, a logit beyond 2^30 or a sum that is not finite",
        (unsigned long long)(error >> 40), (unsigned long long)(error >> 12 & 0xfffffff),
        (unsigned long long)(error & 0xfff));
}

/* The tables of the plan, in one copy. Beyond what is pinned, through memory of their own. */
static attn_status_t
upload_image(const attn_workspace_t *w)
{
    if (w->image.bytes <= w->block->host_bytes) {
        return CUDA_CALL(
            cuMemcpyHtoDAsync(w->block->device, w->block->host, w->image.bytes, w->block->stream));
    }
    uint8_t *tables = malloc(w->image.bytes);
    if (tables == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for the tables of a step");
    }
    cuda_image_write(&w->image, tables);
    attn_status_t status = upload(w, 0, tables, w->image.bytes); /* returns when they are read */
    free(tables);
    return status;
}

/* The tables of the plan and the queries, on their way to the device. */
static attn_status_t
upload_all(attn_workspace_t *w, const attn_layer_t *layer, const void *q, cuda_args_t *x)
{
    const attn_problem_t *p    = &w->plan->problem;
    static const uint64_t none = UINT64_MAX;
    attn_status_t status;

    if (w->image.changes && w->uploaded && (status = make_image(w)) != ATTN_OK) {
        return status;
    }
    if (!w->uploaded) {
        if ((status = upload_image(w)) != ATTN_OK ||
            (status = upload(w, w->error, &none, sizeof(none))) != ATTN_OK) {
            return status;
        }
        w->uploaded = true;
    }
    status = upload(w, w->q, q,
                    w->plan->n_queries * p->q_heads * p->head_dim_k * attn_dtype_size(w->q_dtype));
    return status == ATTN_OK ? upload_params(w, layer, x) : status;
}

attn_status_t
cuda_attend_prepare(attn_workspace_t *w, const attn_kv_t *kv, const attn_layer_t *layer,
                    const void *q, const attn_answer_t *answer, cuda_args_t *x)
{
    const attn_problem_t *p = &w->plan->problem;
    attn_status_t status    = cuda_layer_check(p->q_heads, layer);

    if (status == ATTN_OK && w->shape == NULL &&
        (status = cuda_shape_find(w->backend, kv->dtype, p->head_dim_k, p->head_dim_v,
                                  &w->shape)) != ATTN_OK) {
        return status;
    }
    if (status != ATTN_OK) {
        return status;
    }
    cuda_attend_fill(w, kv, layer, answer, x);
    return upload_all(w, layer, q, x);
}

/* The states of the largest item are cut into segments, as shared memory allows. The lists of those
 * become lists of a quarter as many, and so on: at most one more than a third of them in all. */
static attn_status_t
launch_merge(const attn_workspace_t *w, cuda_args_t *x, CUstream stream)
{
    uint32_t refs = w->image.item_refs, state = (x->head_dim_v + 3) * (uint32_t)sizeof(float), size;
    uint64_t depth = attn_max(w->image.depth, w->image.many_depth);
    bool few = (uint64_t)w->image.n_items * w->image.item_rows <= (uint64_t)w->backend->processors;

    x->depth    = (uint32_t)attn_min(refs, 2 * depth) + 1;
    x->segments = (uint32_t)attn_min(
        attn_div_up(refs, few ? MERGE_SEGMENT_FEW : MERGE_SEGMENT_MANY), MERGE_WARPS);
    do {
        uint32_t per     = (uint32_t)attn_div_up(refs, x->segments);
        x->segment_depth = (uint32_t)attn_min(per + 1, x->depth);
        size = (x->segments * x->segment_depth + (x->segments / 3 + 2) * x->depth) * state;
    } while (size > (uint32_t)w->backend->shared_bytes && --x->segments > 0);
    assert(x->segments > 0);
    return cuda_launch(w->backend->merge[x->head_dim_v / 128], w->image.n_items, w->image.item_rows,
                       32 * x->segments, size, w->backend->major >= 9, stream, (void *[]){x});
}

attn_status_t
cuda_attend_launch(const attn_workspace_t *w, const attn_kv_t *kv, const attn_rows_t *q,
                   cuda_args_t *x, CUstream stream)
{
    bool general =
        w->image.masked || x->q_parts > 1 || x->softcap > 0 || x->window > 0 || x->slopes != NULL;
    attn_status_t status = ATTN_OK;

    x->beside = 0;
    if (x->q_parts > 1) {
        status = launch_split(w, kv, q, x, stream);
    }
    if (status == ATTN_OK && w->image.many_grid > 0) {
        status    = launch_many(w, kv, general, x, stream);
        x->beside = 1;
    }
    for (uint32_t c = 0; c < CUDA_CLASSES && status == ATTN_OK; c++) {
        if (w->image.classes[c].grid > 0) {
            status    = launch_class(w, c, general, x, stream);
            x->beside = 1;
        }
    }
    if (status == ATTN_OK && w->image.n_items > 0) {
        status = launch_merge(w, x, stream);
    }
    return status;
}

attn_status_t
cuda_attend_enqueue(const attn_workspace_t *w, const attn_kv_t *kv, cuda_args_t *x, CUstream stream)
{
    const attn_problem_t *p = &w->plan->problem;
    attn_rows_t q           = {.at          = (void *)(uintptr_t)(w->block->device + w->q),
                               .row_stride  = (uint64_t)p->q_heads * p->head_dim_k,
                               .head_stride = p->head_dim_k};

    return cuda_attend_launch(w, kv, &q, x, stream);
}

/* Bytes [at, end) of the block to where fetch() looks for them. */
static attn_status_t
bring(const attn_workspace_t *w, uint64_t at, uint64_t end)
{
    return CUDA_CALL(
        cuMemcpyDtoHAsync(w->block->host + at, w->block->device + at, end - at, w->block->stream));
}

/* Queue all of it, and wait. Who is behind takes the states: they stay where they are. */
static attn_status_t
attend(attn_workspace_t *w, const attn_kv_t *kv, const attn_layer_t *layer, const void *q,
       const attn_answer_t *answer, cuda_behind_t *behind)
{
    CUstream stream = w->block->stream;
    cuda_args_t x;
    attn_status_t status;

    if ((status = cuda_attend_prepare(w, kv, layer, q, answer, &x)) != ATTN_OK ||
        (status = cuda_attend_enqueue(w, kv, &x, stream)) != ATTN_OK ||
        (behind != NULL && (status = behind->queue(behind, &x, stream)) != ATTN_OK)) {
        return status;
    }
    if (w->answer_end <= w->block->host_bytes) {
        status = bring(w, w->answer, behind == NULL ? w->answer_end : w->a);
        if (status == ATTN_OK && behind != NULL) {
            status = bring(w, w->error, w->answer_end);
        }
    }
    if (status == ATTN_OK) {
        status = CUDA_CALL(cuStreamSynchronize(stream));
    }
    return status == ATTN_OK ? check_error(w) : status;
}

attn_status_t
cuda_attend(attn_backend_t *base, const attn_plan_t *plan, const attn_kv_t *kv,
            const attn_layer_t *layer, const void *q, attn_dtype_t q_dtype, attn_workspace_t *w,
            const attn_answer_t *answer)
{
    (void)base;
    assert(w->plan == plan && w->q_dtype == q_dtype &&
           (answer->o == NULL || w->o_dtype == answer->o_dtype));
    return plan->n_works > 0 ? cuda_attend_before(w, kv, layer, q, answer, NULL) : ATTN_OK;
}

attn_status_t
cuda_attend_before(attn_workspace_t *w, const attn_kv_t *kv, const attn_layer_t *layer,
                   const void *q, const attn_answer_t *answer, cuda_behind_t *behind)
{
    const attn_problem_t *p = &w->plan->problem;

    assert(kv->kv_heads == p->kv_heads && kv->page_size == p->page_size &&
           kv->chunk_size == p->chunk_size);
    CUDA_VISIT(w->backend);
    attn_status_t status = visit.status;
    if (status == ATTN_OK) {
        status = attend(w, kv, layer, q, answer, behind);
    }
    if (status == ATTN_OK) {
        return fetch_answer(w, answer);
    }
    /* Nothing of it may still run when its memory goes to another, and the next begins anew. */
    if (w->block != NULL) {
        w->backend->cu->cuStreamSynchronize(w->block->stream);
    }
    w->uploaded = false;
    return status;
}
