/* actor_twin.c: the same question to an engine of another shape: one worker in this process, the
 * sequence alone in its batch, written in other pieces. The promise is that not a bit differs. */
#include "tests/stress/actor.h"

#include "base/status.h"

#include <string.h>

/* The step that was committed may have changed the shadow: what is below base is as it was. */
static attn_status_t
write_prefix(actor_t *a, const part_t *p, shadow_t *copy)
{
    const shadow_t *s    = &a->seqs[p->s];
    attn_status_t status = target_create(&a->twin, &copy->seq);

    return status == ATTN_OK ? actor_write(a, &a->twin, copy->seq, s, 0, p->base) : status;
}

static bool
same_bits(actor_t *a, const part_t *p, uint32_t layer, const attn_batch_t *batch)
{
    const attn_geometry_t *g = a->geometry;
    uint64_t row = (uint64_t)g->q_heads * g->head_dim_v * attn_dtype_size(batch->o_dtype);
    uint64_t lse = (uint64_t)g->q_heads * sizeof(float);

    return memcmp((uint8_t *)a->twin_o + (uint64_t)layer * ACTOR_TWIN_ROWS * row, a->o,
                  p->n_q * row) == 0 &&
           (!batch->want_lse ||
            memcmp((uint8_t *)a->twin_lse + (uint64_t)layer * ACTOR_TWIN_ROWS * lse, a->lse,
                   p->n_q * lse) == 0);
}

static attn_status_t
ask(actor_t *a, const part_t *original, const attn_batch_t *like, shadow_t *copy)
{
    part_t p           = *original;
    attn_entry_t entry = {.seq           = copy->seq,
                          .base          = p.base,
                          .n_q           = p.n_q,
                          .n_new         = p.n_new,
                          .n_lists       = p.n_lists,
                          .sparse_indptr = p.indptr,
                          .sparse_pages  = p.pages,
                          .mask          = p.masked ? p.mask : NULL};
    attn_batch_t batch = *like;
    target_step_t step;

    p.q_row = p.new_row  = 0;
    batch.n              = 1;
    batch.entries        = &entry;
    attn_status_t status = target_begin(&a->twin, &batch, true, &step);
    for (uint32_t l = 0; status == ATTN_OK && l < a->geometry->layers; l++) {
        bool kv = p.n_new > 0;
        actor_write_rows(a, &p, l, true, true);
        status = target_run(&a->twin, &step, &batch,
                            &(target_run_t){.layer = l,
                                            .q     = a->q,
                                            .k     = kv ? a->k : NULL,
                                            .v     = kv ? a->v : NULL,
                                            .o     = a->o,
                                            .lse   = batch.want_lse ? a->lse : NULL});
        if (status == ATTN_OK && !same_bits(a, &p, l, &batch)) {
            actor_fail(a,
                       "OTHER BITS: sequence %llx, layer %u, base %llu, n_q %u, n_new %u, %u "
                       "lists: one worker alone answers differently",
                       (unsigned long long)a->seqs[p.s].seq.id, l, (unsigned long long)p.base,
                       p.n_q, p.n_new, p.n_lists);
        }
    }
    target_abort(&step);
    return status;
}

void
actor_twin(actor_t *a, const part_t *part, const attn_batch_t *batch)
{
    shadow_t copy = {0};

    if (!a->twin_open) {
        if (target_open(&a->twin, TARGET_INPROC, "inproc://cpu?workers=1&threads=1&slab=32MiB",
                        "twin", 10000, ATTN_TRANSPORT_DEFAULT, "twin", a->geometry) != ATTN_OK) {
            actor_fail(a, "no engine to compare with: %s", attn_last_error());
            return;
        }
        a->twin_open = true;
    }
    attn_status_t status = write_prefix(a, part, &copy);
    if (status == ATTN_OK) {
        status = ask(a, part, batch, &copy);
    }
    if (status != ATTN_OK) {
        actor_fail(a, "the engine to compare with: %s: %s", attn_strerror(status),
                   attn_last_error());
    }
    target_free(&a->twin, copy.seq);
    shadow_clear(&copy);
    atomic_fetch_add(&a->figures->twins, 1);
}
