/*
 * track.c: tracks and the steps on them. A graph holds addresses, and how large launches are. So
 * tables lie in rooms that are larger than what they hold (image.h, image_host.h), a launch is as
 * large as the room would need, and a step whose tables fit gets the track of the one before.
 *
 * As lengths grow a step comes not to fit any more: it gets another track, twice as roomy, and who
 * captures graphs captures another. What no graph was captured of is put to another use.
 */
#include "kernels/cuda/track_int.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/status.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#define TRACKS_MAX 256u
#define SPARE_TRACKS 8u         /* that no graph was captured of */
#define CLEAR_NS ATTN_NS_PER_MS /* how long clear() waits at least: it takes some microseconds */

/* ---- making and freeing ---- */

/* During a visit. It is in no list. */
static void
track_free(attn_track_t *t)
{
    const cuda_driver_t *cu = t->backend->cu;

    cuda_order_close(&t->order);
    track_driven_free(t);
    if (t->host != NULL) {
        cu->cuMemFreeHost(t->host);
    }
    if (t->device != 0) {
        cu->cuMemFree(t->device);
    }
    free(t->views);
    free(t->blocks);
    free(t);
}

/* Where everything is, once the images are placed. */
static void
lay_out(attn_track_t *t, const attn_geometry_t *g)
{
    uint64_t d_v = g->head_dim_v, q_rows = t->shape.n_queries * g->q_heads;
    uint64_t end = 0, slots = 0, deep = 0;
    bool split = t->shape.q_dtype != g->kv_dtype;

    cuda_take(&end, sizeof(cuda_head_t));
    t->marks   = cuda_take(&end, t->layers * sizeof(cuda_mark_t));
    t->pages   = cuda_take(&end, t->shape.n_rows * sizeof(uint32_t));
    t->offsets = cuda_take(&end, t->shape.n_rows * sizeof(uint32_t));
    for (uint32_t i = 0; i < t->shape.n_plans; i++) {
        const cuda_image_t *image = &t->views[i].image;
        t->blocks[i].device       = cuda_take(&end, image->bytes); /* the base comes to it later */
        slots                     = attn_max(slots, image->slots);
        deep                      = attn_max(deep, cuda_deep_bytes(image, g->head_dim_v));
    }
    t->sent    = end;
    t->params  = cuda_take(&end, (uint64_t)t->layers * 3 * g->q_heads * sizeof(float));
    t->parts   = cuda_take(&end, split ? q_rows * g->head_dim_k * 2 * CUDA_QUERY_PARTS : 0);
    t->q_scale = cuda_take(&end, split ? q_rows * sizeof(float) : 0);
    t->slot_a  = cuda_take(&end, slots * d_v * sizeof(float));
    t->slot_l  = cuda_take(&end, slots * sizeof(float));
    t->slot_e  = cuda_take(&end, slots * sizeof(int32_t));
    t->deep    = cuda_take(&end, deep);
    t->bytes   = end;
}

/* A view's offsets count from where its tables begin. */
static void
set_views(attn_track_t *t)
{
    for (uint32_t i = 0; i < t->shape.n_plans; i++) {
        attn_workspace_t *w = &t->views[i];
        uint64_t at         = t->blocks[i].device;
        t->blocks[i].device = t->device + at;
        w->block            = &t->blocks[i];
        w->parts            = t->parts - at;
        w->q_scale          = t->q_scale - at;
        w->slot_a           = t->slot_a - at;
        w->slot_l           = t->slot_l - at;
        w->slot_e           = t->slot_e - at;
        w->deep             = t->deep - at;
    }
}

/* Slopes, and sinks as states, of all layers. */
static attn_status_t
send_params(attn_track_t *t, const attn_geometry_t *g)
{
    uint64_t heads = g->q_heads, bytes = 3 * heads * sizeof(float);
    uint8_t *rows        = calloc(t->layers, bytes);
    attn_status_t status = rows != NULL ? ATTN_OK
                                        : attn_fail(ATTN_ERR_NO_MEMORY, "no memory for the "
                                                                        "parameters of layers");

    for (uint32_t l = 0; l < t->layers && status == ATTN_OK; l++) {
        const attn_layer_t *layer = &g->layer_table[l];
        float *slopes             = (float *)(void *)(rows + l * bytes);
        if ((status = cuda_layer_check(g->q_heads, layer)) != ATTN_OK) {
            attn_fail_in(status, "layer %u: ", l);
        }
        if (status == ATTN_OK && layer->slopes != NULL) {
            memcpy(slopes, layer->slopes, heads * sizeof(float));
        }
        for (uint32_t h = 0; h < heads && status == ATTN_OK && layer->sinks != NULL; h++) {
            int32_t e;
            attn_state_of_sink(layer->sinks[h], &slopes[heads + h], &e);
            memcpy(&slopes[2 * heads + h], &e, sizeof(e));
        }
    }
    if (status == ATTN_OK) {
        status = track_send(t, t->params, rows, t->layers * bytes);
    }
    free(rows);
    return status;
}

static attn_status_t
take_memory(attn_track_t *t)
{
    attn_status_t status;

    if ((status = CUDA_CALL(cuMemAlloc(&t->device, t->bytes))) != ATTN_OK ||
        (status = CUDA_CALL(cuMemHostAlloc((void **)&t->host, t->sent, 0))) != ATTN_OK ||
        (status = cuda_order_open(&t->order)) != ATTN_OK) {
        return attn_fail_in(status,
                            "%llu bytes for a step on a stream: ", (unsigned long long)t->bytes);
    }
    return ATTN_OK;
}

/* A track that such images fit on, in no list. */
static attn_status_t
track_new(cuda_backend_t *backend, const track_shape_t *shape, const attn_geometry_t *g,
          const cuda_image_t *images, attn_track_t **track_p)
{
    attn_track_t *t = calloc(1, sizeof(*t));
    attn_status_t status;

    if (t == NULL || (t->views = calloc(shape->n_plans, sizeof(*t->views))) == NULL ||
        (t->blocks = calloc(shape->n_plans, sizeof(*t->blocks))) == NULL) {
        if (t != NULL) {
            free(t->views);
        }
        free(t);
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a step on a stream");
    }
    t->backend  = backend;
    t->shape    = *shape;
    t->layers   = g->layers;
    t->kv_heads = g->kv_heads;
    for (uint32_t i = 0; i < shape->n_plans; i++) {
        cuda_room_t room = cuda_room_above(&images[i].room);
        t->views[i]      = (attn_workspace_t){.backend = backend,
                                              .q_dtype = shape->q_dtype,
                                              .o_dtype = shape->o_dtype,
                                              .image   = images[i],
                                              .q_parts = CUDA_QUERY_PARTS};
        cuda_image_place(&t->views[i].image, &room, shape->ctas);
        t->views[i].image.memory = NULL; /* the step's */
    }
    lay_out(t, g);
    if ((status = take_memory(t)) != ATTN_OK || (status = send_params(t, g)) != ATTN_OK ||
        (status = cuda_shape_find(backend, g->kv_dtype, g->head_dim_k, g->head_dim_v,
                                  &t->views[0].shape)) != ATTN_OK) {
        track_free(t);
        return status;
    }
    for (uint32_t i = 1; i < shape->n_plans; i++) {
        t->views[i].shape = t->views[0].shape;
    }
    set_views(t);
    *track_p = t;
    return ATTN_OK;
}

/* ---- the list ---- */

static bool
fits(const attn_track_t *t, const track_shape_t *shape, const cuda_image_t *images)
{
    const track_shape_t *of = &t->shape;
    bool same               = of->cache == shape->cache && of->n_queries == shape->n_queries &&
                of->n_rows == shape->n_rows && of->q_dtype == shape->q_dtype &&
                of->o_dtype == shape->o_dtype && of->n_plans == shape->n_plans &&
                of->ctas == shape->ctas;

    for (uint32_t i = 0; same && i < shape->n_plans; i++) {
        same = cuda_room_holds(&t->views[i].image.room, &images[i].room);
    }
    return same;
}

/* The oldest that fits, for graphs were most likely captured of it; NULL: none. */
static attn_track_t *
find(cuda_backend_t *backend, const track_shape_t *shape, const cuda_image_t *images)
{
    attn_track_t *found = NULL;

    pthread_mutex_lock(&backend->lock);
    for (attn_track_t *t = backend->tracks; t != NULL; t = t->next) {
        if (!t->busy && fits(t, shape, images)) {
            found = t; /* the newest stand in front */
        }
    }
    if (found != NULL) {
        found->busy = true;
    }
    pthread_mutex_unlock(&backend->lock);
    return found;
}

/* Tracks of the list that no step is on, and that shall go. Under the backend's lock. */
static attn_track_t *
unlink_some(cuda_backend_t *backend, const uint64_t *cache, uint32_t spares)
{
    attn_track_t *going = NULL, **at = &backend->tracks;

    while (*at != NULL) {
        attn_track_t *t = *at;
        bool goes = cache != NULL ? !t->busy && t->shape.cache == *cache : !t->busy && !t->captured;
        if (goes && cache == NULL && spares > 0) {
            spares--;
            goes = false;
        }
        if (!goes) {
            at = &t->next;
            continue;
        }
        *at     = t->next;
        t->next = going;
        going   = t;
        backend->n_tracks--;
    }
    return going;
}

/* Those of a cache go; or, without one, all but the newest few that no graph was captured of.
 * During a visit. */
static void
sweep(cuda_backend_t *backend, const uint64_t *cache, uint32_t spares)
{
    pthread_mutex_lock(&backend->lock);
    attn_track_t *going = unlink_some(backend, cache, spares);
    pthread_mutex_unlock(&backend->lock);
    while (going != NULL) {
        attn_track_t *t = going;
        going           = t->next;
        backend->cu->cuStreamSynchronize(t->order.stream); /* nothing, unless clear() failed */
        track_free(t);
    }
}

/* A new one in the list, a step's. */
static attn_status_t
add(cuda_backend_t *backend, const track_shape_t *shape, const attn_geometry_t *g,
    const cuda_image_t *images, attn_track_t **track_p)
{
    attn_track_t *t = NULL;

    if (!cuda_is_driving(backend)) { /* to give memory back is to wait for the device */
        sweep(backend, NULL, SPARE_TRACKS);
    }
    attn_status_t status = track_new(backend, shape, g, images, &t);
    if (status == ATTN_ERR_NO_MEMORY) {
        sweep(backend, NULL, 0);
        status = track_new(backend, shape, g, images, &t);
    }
    if (status != ATTN_OK) {
        return status;
    }
    pthread_mutex_lock(&backend->lock);
    bool room = backend->n_tracks < TRACKS_MAX;
    if (room) {
        t->busy         = true;
        t->id           = ++backend->last_track;
        t->next         = backend->tracks;
        backend->tracks = t;
        backend->n_tracks++;
    }
    pthread_mutex_unlock(&backend->lock);
    if (!room) {
        track_free(t);
        return attn_fail(ATTN_ERR_EXHAUSTED,
                         "graphs were captured of steps of %u shapes, or that many steps are open: "
                         "more there cannot be, and what was captured stays until its cache is "
                         "closed",
                         TRACKS_MAX);
    }
    *track_p = t;
    return ATTN_OK;
}

/* ---- steps ---- */

/* The step's tables, and that it is open. */
static attn_status_t
send_tables(attn_track_t *t, const attn_track_step_t *step, cuda_image_t *images)
{
    cuda_head_t head  = {.serial = t->serial, .n_rows = step->n_rows};
    cuda_mark_t *mark = (cuda_mark_t *)(void *)(t->host + t->marks);
    attn_status_t status;

    memcpy(t->host, &head, sizeof(head));
    for (uint32_t l = 0; l < t->layers; l++) {
        mark[l] = (cuda_mark_t){.error = UINT64_MAX};
    }
    if (step->n_rows > 0) {
        memcpy(t->host + t->pages, step->pages, step->n_rows * sizeof(uint32_t));
        memcpy(t->host + t->offsets, step->offsets, step->n_rows * sizeof(uint32_t));
    }
    for (uint32_t i = 0; i < t->shape.n_plans; i++) {
        attn_workspace_t *w = &t->views[i];
        cuda_image_place(&images[i], &w->image.room, t->shape.ctas);
        cuda_image_write(&images[i], t->host + (t->blocks[i].device - t->device));
        w->plan = step->plans[i];
    }
    /* The head last: with the step's serial there all else is the step's, too. */
    uint64_t rest = sizeof(head);
    if ((status = CUDA_CALL(cuMemcpyHtoDAsync(t->device + rest, t->host + rest, t->sent - rest,
                                              t->order.stream))) != ATTN_OK ||
        (status = CUDA_CALL(cuMemcpyHtoDAsync(t->device, t->host, rest, t->order.stream))) !=
            ATTN_OK) {
        return status;
    }
    return cuda_order_ready(&t->order);
}

/* What there is of images, built. */
static attn_status_t
build_images(cuda_backend_t *backend, const attn_track_step_t *step, uint32_t ctas,
             cuda_image_t *images)
{
    attn_status_t status = ATTN_OK;

    for (uint32_t i = 0; i < step->n_plans && status == ATTN_OK; i++) {
        cuda_image_take(backend, &images[i]);
        status = cuda_image_build_steady(step->plans[i], ctas, &images[i]);
        assert(status != ATTN_OK || (!images[i].changes && step->plans[i]->states == 0));
    }
    return status;
}

static attn_status_t
take_on(cuda_backend_t *backend, const attn_track_step_t *step, const track_shape_t *shape,
        cuda_image_t *images, attn_track_t **track_p)
{
    attn_status_t status = build_images(backend, step, shape->ctas, images);
    attn_track_t *t      = status == ATTN_OK ? find(backend, shape, images) : NULL;

    if (status == ATTN_OK && t == NULL) {
        status = add(backend, shape, step->geometry, images, &t);
    }
    if (status != ATTN_OK) {
        return status;
    }
    pthread_mutex_lock(&backend->lock);
    t->serial = ++backend->last_serial;
    pthread_mutex_unlock(&backend->lock);
    cuda_order_anew(&t->order);
    t->clearing   = false;
    t->marks_come = false;
    if ((status = send_tables(t, step, images)) != ATTN_OK) {
        cuda_track_ops.clear(t, UINT64_MAX);
        cuda_track_ops.give(t);
        return status;
    }
    *track_p = t;
    return ATTN_OK;
}

static attn_status_t
track_take(attn_backend_t *base, const attn_track_step_t *step, attn_track_t **track_p)
{
    cuda_backend_t *backend = (cuda_backend_t *)base;
    cuda_image_t *images    = calloc(step->n_plans, sizeof(*images));
    CUDA_VISIT(backend);
    track_shape_t shape  = {.cache     = step->cache,
                            .n_queries = step->plans[0]->n_queries,
                            .n_rows    = step->n_rows,
                            .q_dtype   = step->q_dtype,
                            .o_dtype   = step->o_dtype,
                            .n_plans   = step->n_plans,
                            .ctas      = (uint32_t)backend->cut_for};
    attn_status_t status = visit.status;

    if (images == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a step on a stream");
    }
    if (status == ATTN_OK) {
        status = take_on(backend, step, &shape, images, track_p);
    }
    for (uint32_t i = 0; i < step->n_plans; i++) {
        cuda_image_give(backend, &images[i]);
    }
    free(images);
    return status;
}

static uint64_t
track_id(const attn_track_t *t)
{
    return t->id;
}

static void
fill(attn_track_t *t, CUdeviceptr at, uint8_t byte, uint64_t n)
{
    if (n > 0) {
        t->backend->cu->cuMemsetD8Async(at, byte, n, t->order.stream);
    }
}

static void
fill_tables(attn_track_t *t)
{
    fill(t, t->device, 0, sizeof(cuda_head_t));
    for (uint32_t i = 0; i < t->shape.n_plans; i++) {
        const cuda_image_t *image = &t->views[i].image;
        uint64_t pieces = image->classes[0].pieces; /* all classes', tiles, up to the pages */
        fill(t, t->blocks[i].device + pieces, 0xff, image->pages - pieces);
        fill(t, t->blocks[i].device + image->items, 0, image->refs - image->items);
    }
}

/*
 * Nothing is open any more, so that a graph that is launched all the same does nothing: its first
 * kernels see it in the head, its others have no piece and no item. What fails here fails again
 * when the track is taken.
 */
static bool
track_clear(attn_track_t *t, uint64_t until_ns)
{
    uint64_t soon = attn_now_ns() + CLEAR_NS;
    CUDA_VISIT(t->backend);

    if (!t->clearing && visit.status == ATTN_OK) {
        fill_tables(t);
        t->order.lost = cuda_order_ready(&t->order) != ATTN_OK;
    }
    t->clearing = true;
    return track_wait(t, attn_max(until_ns, soon));
}

static void
track_give(attn_track_t *t)
{
    track_driven_give(t);
    pthread_mutex_lock(&t->backend->lock);
    t->busy = false;
    pthread_mutex_unlock(&t->backend->lock);
}

static void
track_forget(attn_backend_t *base, uint64_t cache)
{
    cuda_backend_t *backend = (cuda_backend_t *)base;
    CUDA_VISIT(backend);

    if (visit.status == ATTN_OK) {
        sweep(backend, &cache, 0);
    }
}

void
cuda_tracks_free(cuda_backend_t *backend)
{
    while (backend->tracks != NULL) {
        assert(!backend->tracks->busy);
        uint64_t cache = backend->tracks->shape.cache;
        sweep(backend, &cache, 0);
    }
}

const attn_track_ops_t cuda_track_ops = {
    .take      = track_take,
    .id        = track_id,
    .enqueue   = track_enqueue,
    .drive     = track_drive,
    .interrupt = track_interrupt,
    .before    = track_before,
    .after     = track_after,
    .wait      = track_wait,
    .results   = track_results,
    .clear     = track_clear,
    .give      = track_give,
    .forget    = track_forget,
};
