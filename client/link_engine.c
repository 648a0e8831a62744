/* link_engine.c: the row for an engine inside the process: every call is made where it stands. */
#include "client/link.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/status.h"

#include <stdlib.h>
#include <string.h>

typedef struct engine_link {
    link_t link;
    engine_t *engine;
} engine_link_t;

struct link_step {
    const link_ops_t *ops;
    engine_t *engine;
    uint64_t id;
    engine_sizes_t sizes;
    bool ended;
    uint8_t *scratch; /* q, k, v, answer where the caller's pieces are not contiguous */
};

static void
engine_link_close(link_t *link)
{
    free(link);
}

static engine_t *
engine_of(link_t *link)
{
    return ((engine_link_t *)(void *)link)->engine;
}

/* ---- control ---- */

static attn_status_t
engine_link_ping(link_t *link, uint32_t bytes, uint64_t deadline_ns)
{
    (void)link, (void)bytes, (void)deadline_ns;
    return ATTN_OK;
}

static attn_status_t
engine_link_cache_open(link_t *link, uint64_t epoch, uint64_t cache, const char *name,
                       const attn_geometry_t *geometry, uint64_t deadline_ns,
                       kv_region_info_t *info)
{
    (void)epoch, (void)name, (void)deadline_ns;
    return engine_cache_open(engine_of(link), cache, geometry, info);
}

static attn_status_t
engine_link_cache_close(link_t *link, uint64_t epoch, uint64_t cache, uint64_t deadline_ns)
{
    (void)epoch, (void)deadline_ns;
    return engine_cache_close(engine_of(link), cache);
}

static attn_status_t
engine_link_chunk_fork(link_t *link, uint64_t epoch, uint64_t cache, uint64_t from, uint32_t length,
                       uint64_t to, uint64_t deadline_ns)
{
    (void)epoch, (void)deadline_ns;
    return engine_chunk_fork(engine_of(link), cache, from, length, to);
}

static attn_status_t
engine_link_chunk_truncate(link_t *link, uint64_t epoch, uint64_t cache, uint64_t chunk,
                           uint32_t generation, uint32_t length, uint32_t *generation_p,
                           uint64_t deadline_ns)
{
    (void)epoch, (void)deadline_ns;
    return engine_chunk_truncate(engine_of(link), cache, chunk, generation, length, generation_p);
}

static attn_status_t
engine_link_chunks_release(link_t *link, uint64_t epoch, uint64_t cache, const uint64_t *chunks,
                           uint32_t n, uint64_t deadline_ns)
{
    (void)epoch, (void)deadline_ns;
    return engine_chunks_release(engine_of(link), cache, chunks, n);
}

static attn_status_t
engine_link_chunk_export(link_t *link, const engine_export_t *what, void *k, void *v,
                         uint64_t k_bytes, uint64_t v_bytes, uint64_t deadline_ns)
{
    return attn_now_ns() < deadline_ns
               ? engine_chunk_export(engine_of(link), what, k, v, k_bytes, v_bytes)
               : attn_fail(ATTN_ERR_DEADLINE, "the deadline passed before all was read");
}

static attn_status_t
engine_link_chunks_describe(link_t *link, uint64_t cache, const uint64_t *chunks, uint32_t n,
                            kv_chunk_info_t *infos, const uint64_t *seqs, uint32_t n_seqs,
                            bool *in_step, uint64_t deadline_ns)
{
    (void)deadline_ns;
    return engine_chunks_describe(engine_of(link), cache, chunks, n, infos, seqs, n_seqs, in_step);
}

static attn_status_t
engine_link_chunk_copy(link_t *link, link_t *source, uint64_t epoch, const engine_copy_t *copy,
                       uint64_t deadline_ns)
{
    (void)epoch;
    return source->ops == link->ops
               ? engine_copy_between(engine_of(source), engine_of(link), copy, deadline_ns)
               : attn_fail(ATTN_ERR_UNSUPPORTED, "a chunk goes between engines of one process");
}

static attn_status_t
engine_link_chunk_leave(link_t *link, uint64_t epoch, uint64_t cache, const kv_leaving_t *leaving,
                        uint64_t deadline_ns, kv_chunk_info_t *info)
{
    kv_leaving_t until = *leaving;

    (void)epoch, (void)deadline_ns;
    until.until_ns =
        attn_now_ns() + attn_min(leaving->until_ns, ENGINE_HOLD_MS_MAX * ATTN_NS_PER_MS);
    return engine_chunk_leave(engine_of(link), cache, &until, info);
}

/* ---- steps ---- */

static void
finish(link_done_fn done, void *arg, attn_status_t status)
{
    /* The sentence lives in this thread until the next failure: done may cause one. */
    char sentence[512] = "";

    if (status != ATTN_OK) {
        strncpy(sentence, attn_last_error(), sizeof(sentence) - 1);
    }
    done(arg, status, sentence);
}

static attn_status_t
engine_link_begin(link_t *link, const engine_batch_t *batch, const link_room_t *most,
                  link_done_fn done, void *arg, link_step_t **step_p)
{
    link_step_t *step = calloc(1, sizeof(*step));

    (void)most; /* the engine itself says it */
    if (step == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a step");
    }
    step->ops            = link->ops;
    step->engine         = engine_of(link);
    step->id             = batch->step_id;
    attn_status_t status = engine_step_begin(step->engine, batch, &step->sizes);
    if (status == ATTN_OK && !batch->on_device) {
        /* Room for whatever has to be made contiguous, taken here so that run allocates nothing. */
        uint64_t room = step->sizes.q + step->sizes.k + step->sizes.v + step->sizes.answer + 64 * 5;
        step->scratch = malloc(room);
        if (step->scratch == NULL) {
            engine_step_abort(step->engine, step->id, "its client is out of memory");
            status = attn_fail(ATTN_ERR_NO_MEMORY, "no memory for %llu bytes of tensors",
                               (unsigned long long)room);
        }
    }
    step->ended = status != ATTN_OK;
    *step_p     = step;
    finish(done, arg, status);
    return ATTN_OK;
}

/* One pointer to the pieces: theirs if there is one, else gathered at *scratch. */
static const void *
contiguous(const struct iovec *pieces, uint32_t n, uint64_t size, uint8_t **scratch)
{
    if (n == 0) {
        return NULL;
    }
    if (n == 1) {
        return pieces[0].iov_base;
    }
    uint8_t *start = *scratch, *at = start;
    for (uint32_t i = 0; i < n; i++) {
        memcpy(at, pieces[i].iov_base, pieces[i].iov_len);
        at += pieces[i].iov_len;
    }
    *scratch += attn_div_up(size, 64) * 64;
    return start;
}

static void
scatter(const uint8_t *from, const struct iovec *pieces, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        memcpy(pieces[i].iov_base, from, pieces[i].iov_len);
        from += pieces[i].iov_len;
    }
}

static void
engine_link_run(link_step_t *step, const link_run_t *run, link_done_fn done, void *arg)
{
    uint8_t *scratch = step->scratch;
    const void *q    = contiguous(run->q, run->n_q, step->sizes.q, &scratch);
    const void *k    = contiguous(run->k, run->n_k, step->sizes.k, &scratch);
    const void *v    = contiguous(run->v, run->n_v, step->sizes.v, &scratch);
    bool direct      = run->n_answer == 1;
    void *answer     = direct ? run->answer[0].iov_base : scratch;

    uint64_t start       = attn_now_ns();
    attn_status_t status = run->device != NULL
                               ? engine_step_run_device(step->engine, step->id, run->device)
                               : engine_step_run_lists(step->engine, step->id, run->layer, q, k, v,
                                                       answer, NULL, run->lists, run->n_lists);
    *run->compute_ns     = attn_now_ns() - start;
    if (status == ATTN_OK && q != NULL && !direct) {
        scatter(answer, run->answer, run->n_answer);
    }
    finish(done, arg, status);
}

static void
engine_link_commit(link_step_t *step, const engine_commit_t *commit, link_done_fn done, void *arg)
{
    attn_status_t status = engine_step_commit_paths(step->engine, step->id, commit);

    step->ended = step->ended || status == ATTN_OK;
    finish(done, arg, status);
}

static void
engine_link_abort(link_step_t *step, link_done_fn done, void *arg)
{
    step->ended = true;
    finish(done, arg, engine_step_abort(step->engine, step->id, ENGINE_BY_CLIENT));
}

static void
engine_link_cancel(link_step_t *step)
{
    (void)step; /* nothing is ever outstanding: calls end inside themselves */
}

static void
engine_link_step_free(link_step_t *step)
{
    if (step != NULL) {
        if (!step->ended) {
            engine_step_abort(step->engine, step->id, ENGINE_BY_CLIENT);
        }
        free(step->scratch);
        free(step);
    }
}

/* ---- tensors in the device's memory ---- */

static int
engine_link_gpu(link_t *link)
{
    return engine_gpu(engine_of(link));
}

static attn_status_t
engine_link_enqueue(link_step_t *step, const engine_call_t *call)
{
    return engine_step_enqueue(step->engine, step->id, call);
}

static attn_status_t
engine_link_replay(link_step_t *step, void *stream, bool launched)
{
    return engine_step_replay(step->engine, step->id, stream, launched);
}

static attn_status_t
engine_link_graph(link_step_t *step, uint64_t *graph_p)
{
    return engine_step_graph(step->engine, step->id, graph_p);
}

static const link_ops_t engine_link_ops = {
    .name            = "engine",
    .close           = engine_link_close,
    .ping            = engine_link_ping,
    .cache_open      = engine_link_cache_open,
    .cache_close     = engine_link_cache_close,
    .chunk_fork      = engine_link_chunk_fork,
    .chunk_truncate  = engine_link_chunk_truncate,
    .chunks_release  = engine_link_chunks_release,
    .chunks_describe = engine_link_chunks_describe,
    .chunk_export    = engine_link_chunk_export,
    .chunk_copy      = engine_link_chunk_copy,
    .chunk_leave     = engine_link_chunk_leave,
    .begin           = engine_link_begin,
    .run             = engine_link_run,
    .commit          = engine_link_commit,
    .abort           = engine_link_abort,
    .cancel          = engine_link_cancel,
    .step_free       = engine_link_step_free,
    .gpu             = engine_link_gpu,
    .enqueue         = engine_link_enqueue,
    .replay          = engine_link_replay,
    .graph           = engine_link_graph,
};

attn_status_t
link_engine_open(engine_t *engine, link_t **link_p)
{
    engine_link_t *link = calloc(1, sizeof(*link));

    if (link == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a link");
    }
    link->link.ops = &engine_link_ops;
    link->engine   = engine;
    *link_p        = &link->link;
    return ATTN_OK;
}
