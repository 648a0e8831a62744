/*
 * plans.c: the plans of a step, one for each variant of layers, and their workspaces, or the track
 * that has them all.
 *
 * Steps follow each other with batches of about the same size. So the plans of an ended step are
 * kept for their memory: those of the next are made in it, and planning allocates nothing.
 */
#include "engine/engine_int.h"

#include <string.h>

/* A plan to make a new one in, or NULL. */
static attn_plan_t *
take_spare(engine_t *engine)
{
    attn_plan_t *plan = NULL;

    pthread_mutex_lock(&engine->spare_lock);
    if (engine->n_spares > 0) {
        plan = engine->spares[--engine->n_spares];
    }
    pthread_mutex_unlock(&engine->spare_lock);
    return plan;
}

static void
give_spare(engine_t *engine, attn_plan_t *plan)
{
    bool kept = false;

    if (plan == NULL) {
        return;
    }
    if (attn_plan_bytes(plan) <= SPARE_BYTES) {
        pthread_mutex_lock(&engine->spare_lock);
        kept = engine->n_spares < SPARE_PLANS;
        if (kept) {
            engine->spares[engine->n_spares++] = plan;
        }
        pthread_mutex_unlock(&engine->spare_lock);
    }
    if (!kept) {
        attn_plan_free(plan);
    }
}

attn_status_t
engine_plans_make(engine_t *engine, engine_step_t *step)
{
    const attn_backend_ops_t *ops = engine->backend->ops;
    const attn_geometry_t *g      = &step->cache->geometry;
    attn_problem_t problem        = {
               .n          = step->n,
               .entries    = step->problem,
               .q_heads    = g->q_heads,
               .kv_heads   = g->kv_heads,
               .head_dim_k = g->head_dim_k,
               .head_dim_v = g->head_dim_v,
               .page_size  = g->page_size,
               .chunk_size = g->chunk_size,
    };

    for (uint32_t v = 0; v < step->cache->n_variants; v++) {
        problem.window = step->cache->variants[v].window;
        problem.causal = step->cache->variants[v].causal;
        step->plans[v] = take_spare(engine);
        attn_status_t status =
            attn_plan_renew(&problem, ops->parallelism(engine->backend), engine->leaf_few,
                            engine->leaf_many, &step->plans[v]);
        if (status == ATTN_OK && !step->on_device) {
            status = ops->workspace_create(engine->backend, step->plans[v], step->q_dtype,
                                           step->o_dtype, &step->workspaces[v]);
        }
        if (status != ATTN_OK) {
            return status;
        }
    }
    return step->on_device ? engine_track_take(engine, step) : ATTN_OK;
}

void
engine_plans_free(engine_t *engine, engine_step_t *step)
{
    engine_track_give(engine, step);
    engine_group_give(engine, step);
    for (uint32_t v = 0; v < step->cache->n_variants; v++) {
        if (step->workspaces[v] != NULL) {
            engine->backend->ops->workspace_destroy(engine->backend, step->workspaces[v]);
        }
        give_spare(engine, step->plans[v]);
    }
    step->plans = NULL;
}

void
engine_spares_free(engine_t *engine)
{
    attn_plan_t *plan;

    while ((plan = take_spare(engine)) != NULL) {
        attn_plan_free(plan);
    }
}
