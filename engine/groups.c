/*
 * groups.c: the groups that this worker's device is a rank of. Who makes a group decides what its
 * exchanges are and in which order they come, for all ranks must make the same ones: so a group has
 * one step at a time, whose runs come one at a time.
 *
 * A group that failed is over: who made it makes another. One that nobody used for a while ends by
 * itself, in two steps: first this rank writes to no other one any more, and when all others have
 * had the time for that, too, its inbox goes.
 */
#include "engine/engine_int.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/status.h"

#include <stdlib.h>
#include <string.h>

/* Rows of a proof at most: a few hundred KiB each way. */
#define PROOF_ROWS_MAX 1024u

/* Memory of all inboxes together. */
#define INBOXES_MAX (UINT64_C(1) << 30)

/* Unused for so long a group is over, and after as long again it goes. */
#define IDLE_NS (UINT64_C(30000) * ATTN_NS_PER_MS)

typedef enum group_state {
    GROUP_OPEN,      /* its inbox is there */
    GROUP_CONNECTED, /* and those of others are mapped */
    GROUP_OVER,      /* nothing comes of it any more */
} group_state_t;

struct engine_group {
    uint64_t id; /* key */
    attn_group_t *group;
    engine_group_options_t options;
    uint64_t used_ns; /* last; of one that is over, when it became so */
    group_state_t state;
    bool taken;   /* by a step, or by who connects or ends it: nobody else does anything with it */
    bool running; /* an exchange is being made, or about to be */
    bool mapped;  /* others' inboxes are */
    bool leaving; /* it goes when it is given back */
    UT_hash_handle hh;
};

static engine_group_t *
group_find(engine_t *engine, uint64_t id)
{
    engine_group_t *g;

    HASH_FIND(hh, engine->groups, &id, sizeof(id), g);
    return g;
}

static attn_status_t
no_group(const engine_t *engine, uint64_t id)
{
    return attn_fail(ATTN_ERR_STALE, "no group %016llx on %s: make it anew", (unsigned long long)id,
                     engine->name);
}

/* Under the lock. */
static void
group_end(engine_group_t *g)
{
    if (g->state != GROUP_OVER) {
        g->state   = GROUP_OVER;
        g->used_ns = attn_now_ns();
    }
}

/* ---- making ---- */

static attn_status_t
check_room(const engine_t *engine, const engine_group_options_t *o)
{
    uint64_t bytes = 2 * o->half_bytes;

    for (const engine_group_t *g = engine->groups; g != NULL; g = g->hh.next) {
        bytes += 2 * g->options.half_bytes;
    }
    if (HASH_COUNT(engine->groups) >= ATTN_GROUPS_MAX || bytes > INBOXES_MAX) {
        return attn_fail(ATTN_ERR_EXHAUSTED,
                         "%s is in %u groups, and their inboxes and this one have %llu bytes: at "
                         "most %u groups and %llu bytes",
                         engine->name, HASH_COUNT(engine->groups), (unsigned long long)bytes,
                         ATTN_GROUPS_MAX, (unsigned long long)INBOXES_MAX);
    }
    return ATTN_OK;
}

static attn_status_t
check_options(const engine_t *engine, const engine_group_options_t *o)
{
    if (engine->backend->ops->groups == NULL) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "%s has no device that merges in groups",
                         engine->name);
    }
    if (o->id == 0 || o->half_bytes < ENGINE_HALF_MIN || o->half_bytes > INBOXES_MAX / 2) {
        return attn_fail(ATTN_ERR_INVALID,
                         "group %016llx with half an inbox of %llu bytes: not 0, and %u to %llu",
                         (unsigned long long)o->id, (unsigned long long)o->half_bytes,
                         ENGINE_HALF_MIN, (unsigned long long)(INBOXES_MAX / 2));
    }
    return ATTN_OK;
}

/* Put it among the others; it is taken at first. */
static attn_status_t
group_add(engine_t *engine, engine_group_t *g)
{
    attn_status_t status;

    pthread_mutex_lock(&engine->groups_lock);
    if (group_find(engine, g->id) != NULL) {
        status = attn_fail(ATTN_ERR_EXISTS, "group %016llx is open", (unsigned long long)g->id);
    } else if ((status = check_room(engine, &g->options)) == ATTN_OK) {
        HASH_ADD(hh, engine->groups, id, sizeof(g->id), g);
        if (!table_has(hh, g)) {
            status = attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a group");
        }
    }
    pthread_mutex_unlock(&engine->groups_lock);
    return status;
}

/*
 * Whoever took a group gives it back. What came of it meanwhile is done now, without the lock: a
 * driver that frees memory may wait for the device, which may be in an exchange that is to be
 * interrupted.
 */
static void
group_give(engine_t *engine, engine_group_t *g)
{
    const attn_group_ops_t *ops = engine->backend->ops->groups;
    bool goes, unmap;

    pthread_mutex_lock(&engine->groups_lock);
    goes  = g->leaving;
    unmap = !goes && g->state == GROUP_OVER && g->mapped;
    if (goes) {
        HASH_DEL(engine->groups, g);
    } else if (!unmap) {
        g->taken = false;
    }
    pthread_mutex_unlock(&engine->groups_lock);
    if (goes) {
        ops->close(g->group);
        free(g);
    } else if (unmap) {
        ops->disconnect(g->group);
        pthread_mutex_lock(&engine->groups_lock);
        g->mapped = false;
        pthread_mutex_unlock(&engine->groups_lock);
        group_give(engine, g); /* it may have been told to go */
    }
}

attn_status_t
engine_group_open(engine_t *engine, const engine_group_options_t *o,
                  uint8_t handle[ATTN_INBOX_HANDLE], char device[ATTN_GROUP_DEVICE])
{
    const attn_group_ops_t *ops = engine->backend->ops->groups;
    attn_status_t status        = check_options(engine, o);
    engine_group_t *g;

    if (status != ATTN_OK) {
        return status;
    }
    if ((g = calloc(1, sizeof(*g))) == NULL) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a group");
    }
    *g = (engine_group_t){.id = o->id, .options = *o, .used_ns = attn_now_ns(), .taken = true};
    if ((status = group_add(engine, g)) != ATTN_OK) {
        free(g);
        return status;
    }
    status = ops->open(engine->backend,
                       &(attn_group_options_t){.ranks      = o->ranks,
                                               .me         = o->me,
                                               .head_dim_v = o->head_dim_v,
                                               .half_bytes = o->half_bytes},
                       &g->group);
    if (status == ATTN_OK && (status = ops->handle(g->group, handle)) != ATTN_OK) {
        ops->close(g->group);
    }
    if (status == ATTN_OK) {
        ops->device(engine->backend, device);
        group_give(engine, g);
        return ATTN_OK;
    }
    pthread_mutex_lock(&engine->groups_lock);
    HASH_DEL(engine->groups, g);
    pthread_mutex_unlock(&engine->groups_lock);
    free(g);
    return status;
}

attn_status_t
engine_group_connect(engine_t *engine, const engine_inboxes_t *inboxes)
{
    uint64_t id          = inboxes->group;
    attn_status_t status = ATTN_OK;

    pthread_mutex_lock(&engine->groups_lock);
    engine_group_t *g = group_find(engine, id);
    if (g == NULL || g->state == GROUP_OVER) {
        status = no_group(engine, id);
    } else if (g->options.ranks != inboxes->ranks || g->options.half_bytes != inboxes->half_bytes) {
        status = attn_fail(ATTN_ERR_INVALID, "group %016llx has %u ranks and other inboxes here",
                           (unsigned long long)id, g->options.ranks);
    } else if (g->state == GROUP_CONNECTED || g->taken) {
        status = attn_fail(ATTN_ERR_EXISTS, "group %016llx is connected, or about to be",
                           (unsigned long long)id);
    } else {
        g->taken = true;
    }
    pthread_mutex_unlock(&engine->groups_lock);
    if (status != ATTN_OK) {
        return status;
    }
    status = engine->backend->ops->groups->connect(g->group, inboxes->handles);
    pthread_mutex_lock(&engine->groups_lock);
    g->mapped  = status == ATTN_OK;
    g->used_ns = attn_now_ns();
    if (g->mapped && g->state == GROUP_OPEN) {
        g->state = GROUP_CONNECTED;
    }
    pthread_mutex_unlock(&engine->groups_lock);
    group_give(engine, g);
    return status;
}

attn_status_t
engine_group_prove(engine_t *engine, uint64_t id, uint64_t until_ns, double seconds[2],
                   uint32_t *many_p)
{
    engine_group_t *g;
    attn_status_t status = ATTN_OK;

    pthread_mutex_lock(&engine->groups_lock);
    g = group_find(engine, id);
    if (g == NULL || g->state != GROUP_CONNECTED) {
        status = no_group(engine, id);
    } else if (g->taken) {
        status = attn_fail(ATTN_ERR_BUSY, "a step is in group %016llx", (unsigned long long)id);
    } else {
        g->taken = g->running = true;
    }
    pthread_mutex_unlock(&engine->groups_lock);
    if (status != ATTN_OK) {
        return status;
    }
    /* A rank gets a state less than it has, of each row of its share. */
    uint64_t lines   = g->options.half_bytes / attn_group_line_bytes(g->options.head_dim_v);
    uint32_t rows[2] = {ENGINE_PROOF_FEW, (uint32_t)attn_min(lines, PROOF_ROWS_MAX)};

    *many_p = rows[1];
    status  = engine->backend->ops->groups->prove(g->group, rows, 2, until_ns, seconds);
    pthread_mutex_lock(&engine->groups_lock);
    g->running = false;
    g->used_ns = attn_now_ns();
    if (status != ATTN_OK) {
        group_end(g);
    }
    pthread_mutex_unlock(&engine->groups_lock);
    group_give(engine, g);
    return status;
}

/* ---- the end ---- */

attn_status_t
engine_group_close(engine_t *engine, uint64_t id, bool forget)
{
    pthread_mutex_lock(&engine->groups_lock);
    engine_group_t *g = group_find(engine, id);
    bool mine         = g != NULL && !g->taken;
    if (g != NULL) {
        group_end(g);
        g->leaving = g->leaving || forget;
        g->taken   = true;
    }
    pthread_mutex_unlock(&engine->groups_lock);
    if (mine) {
        group_give(engine, g);
    }
    return ATTN_OK;
}

/* One that was not used for too long, taken; or NULL. */
static engine_group_t *
take_idle(engine_t *engine, uint64_t now_ns)
{
    engine_group_t *found = NULL;

    pthread_mutex_lock(&engine->groups_lock);
    for (engine_group_t *g = engine->groups; g != NULL && found == NULL; g = g->hh.next) {
        if (!g->taken && now_ns >= g->used_ns + IDLE_NS) {
            g->leaving = g->state == GROUP_OVER;
            g->taken   = true;
            group_end(g);
            found = g;
        }
    }
    pthread_mutex_unlock(&engine->groups_lock);
    return found;
}

void
engine_groups_tick(engine_t *engine, uint64_t now_ns)
{
    engine_group_t *g;

    while ((g = take_idle(engine, now_ns)) != NULL) {
        group_give(engine, g);
    }
}

void
engine_groups_free(engine_t *engine)
{
    engine_group_t *g, *next;

    HASH_ITER(hh, engine->groups, g, next)
    {
        HASH_DEL(engine->groups, g);
        engine->backend->ops->groups->close(g->group);
        free(g);
    }
}

bool
engine_group_device(const engine_t *engine, char device[ATTN_GROUP_DEVICE])
{
    const attn_group_ops_t *ops = engine->backend->ops->groups;

    if (ops != NULL) {
        ops->device(engine->backend, device);
    }
    return ops != NULL;
}

uint32_t
engine_groups_count(engine_t *engine)
{
    uint32_t n = 0;

    pthread_mutex_lock(&engine->groups_lock);
    for (const engine_group_t *g = engine->groups; g != NULL; g = g->hh.next) {
        n += g->state == GROUP_CONNECTED;
    }
    pthread_mutex_unlock(&engine->groups_lock);
    return n;
}

/* ---- steps ---- */

/* The entries of all ranks, as anybody may have sent them: nodes, and no more rows and states than
 * a step of its own could have on each. */
static attn_status_t
check_grouped(const engine_step_t *step, const engine_batch_t *batch)
{
    const attn_geometry_t *g = &step->cache->geometry;
    uint32_t ranks           = step->group->options.ranks;
    uint64_t rows = 0, states = 0, most = ranks * (ENGINE_ANSWER_MAX / (8 + 4 * g->head_dim_v));

    for (uint32_t i = 0; i < batch->n_grouped; i++) {
        const attn_group_entry_t *e = &batch->grouped[i];
        rows += e->n_q;
        for (uint32_t r = 0; r < ranks; r++) {
            attn_status_t status = engine_nodes_check(e->nodes[r], e->n_nodes[r]);
            if (status != ATTN_OK) {
                return attn_fail_in(status, "group: entry %u, rank %u: ", i, r);
            }
            states += (uint64_t)e->n_q * e->n_nodes[r] * g->q_heads; /* < 2^50 each */
            if (rows > ENGINE_ROWS_MAX || states > most ||
                rows * g->q_heads * g->head_dim_v > ENGINE_ANSWER_MAX / 8) {
                return attn_fail(ATTN_ERR_TOO_LARGE,
                                 "group: entries up to %u have %llu queries and %llu states: cut "
                                 "the batch into several steps",
                                 i, (unsigned long long)rows, (unsigned long long)states);
            }
        }
    }
    return ATTN_OK;
}

/* What the batch says of this rank's entries is what it says of the group's: the same queries and
 * nodes, in the same order. Sets where the states of each are. */
static attn_status_t
check_entries(const engine_step_t *step, const engine_batch_t *batch, uint32_t me,
              attn_group_entry_t *entries)
{
    uint64_t state = 0;
    uint32_t at    = 0;

    for (uint32_t i = 0; i < batch->n_grouped; i++) {
        attn_group_entry_t *e = &entries[i];
        *e                    = batch->grouped[i];
        e->state              = state;
        if (e->n_nodes[me] == 0) {
            continue;
        }
        while (at < step->n && (step->entries[at].n_nodes == 0 || step->entries[at].n_q == 0)) {
            at++;
        }
        const engine_entry_t *mine = at < step->n ? &step->entries[at++] : NULL;
        if (mine == NULL || mine->n_q != e->n_q || mine->n_nodes != e->n_nodes[me] ||
            memcmp(mine->nodes, e->nodes[me], mine->n_nodes * sizeof(*mine->nodes)) != 0) {
            return attn_fail(ATTN_ERR_INVALID,
                             "group: entry %u is not as the step's own entries with nodes are", i);
        }
        state += (uint64_t)e->n_q * e->n_nodes[me] * step->cache->geometry.q_heads;
    }
    while (at < step->n && (step->entries[at].n_nodes == 0 || step->entries[at].n_q == 0)) {
        at++;
    }
    return at == step->n && state > 0
               ? ATTN_OK
               : attn_fail(ATTN_ERR_INVALID,
                           "group: entries with nodes are merged in the group, all or none, and "
                           "every rank has one");
}

/* Sizes of a step whose states stay here. */
static void
set_sizes(engine_step_t *step, const engine_batch_t *batch)
{
    const attn_geometry_t *g = &step->cache->geometry;
    uint64_t rows            = 0;

    for (uint32_t i = 0; i < batch->n_grouped; i++) {
        rows += (uint64_t)batch->grouped[i].n_q * g->q_heads;
    }
    attn_group_share_t share =
        attn_group_share(rows, step->group->options.me, step->group->options.ranks);
    step->own_o   = step->sizes.o;
    step->own_lse = step->sizes.lse;
    step->sizes.o += share.n * g->head_dim_v * attn_dtype_size(step->o_dtype);
    step->sizes.lse += batch->want_lse ? share.n * sizeof(float) : 0;
    step->sizes.states  = 0;
    step->sizes.answer  = step->sizes.o + step->sizes.lse;
    step->sizes.grouped = true;
}

static attn_status_t
group_take(engine_t *engine, engine_step_t *step, uint64_t id)
{
    attn_status_t status = ATTN_OK;

    pthread_mutex_lock(&engine->groups_lock);
    engine_group_t *g = group_find(engine, id);
    if (g == NULL || g->state != GROUP_CONNECTED) {
        status = no_group(engine, id);
    } else if (g->taken) {
        status = attn_fail(ATTN_ERR_BUSY, "a step is in group %016llx: one at a time",
                           (unsigned long long)id);
    } else if (g->options.head_dim_v != step->cache->geometry.head_dim_v) {
        status = attn_fail(ATTN_ERR_INVALID, "group %016llx is for states of %u columns, not %u",
                           (unsigned long long)id, g->options.head_dim_v,
                           step->cache->geometry.head_dim_v);
    } else {
        g->taken    = true;
        step->group = g;
    }
    pthread_mutex_unlock(&engine->groups_lock);
    return status;
}

attn_status_t
engine_group_take(engine_t *engine, engine_step_t *step, const engine_batch_t *batch)
{
    attn_group_entry_t *entries = calloc(batch->n_grouped + 1u, sizeof(*entries));
    attn_status_t status        = entries != NULL
                                      ? group_take(engine, step, batch->group)
                                      : attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a group's step");

    if (status == ATTN_OK) {
        status = check_grouped(step, batch);
    }
    if (status == ATTN_OK) {
        status = check_entries(step, batch, step->group->options.me, entries);
    }
    if (status == ATTN_OK) {
        status = engine->backend->ops->groups->load(
            step->group->group, step->cache->geometry.q_heads, entries, batch->n_grouped);
    }
    if (status == ATTN_OK) {
        set_sizes(step, batch);
    }
    free(entries);
    return status;
}

void
engine_group_give(engine_t *engine, engine_step_t *step)
{
    engine_group_t *g;

    pthread_mutex_lock(&engine->groups_lock);
    g           = step->group;
    step->group = NULL;
    if (g != NULL) {
        g->used_ns = attn_now_ns();
    }
    pthread_mutex_unlock(&engine->groups_lock);
    if (g != NULL) {
        group_give(engine, g);
    }
}

static attn_status_t
run_begins(engine_t *engine, engine_group_t *g)
{
    pthread_mutex_lock(&engine->groups_lock);
    bool over  = g->state == GROUP_OVER;
    g->running = !over;
    pthread_mutex_unlock(&engine->groups_lock);
    return over ? attn_fail(ATTN_ERR_ABORTED, "the step's group on %s is over", engine->name)
                : ATTN_OK;
}

attn_status_t
engine_group_run(engine_t *engine, engine_step_t *step, const attn_group_run_t *run)
{
    engine_group_t *g    = step->group;
    attn_status_t status = run_begins(engine, g);

    if (status != ATTN_OK) {
        return status;
    }
    status = engine->backend->ops->groups->run(g->group, run);
    pthread_mutex_lock(&engine->groups_lock);
    g->running = false;
    if (status != ATTN_OK && status != ATTN_ERR_NUMERIC && status != ATTN_ERR_INVALID) {
        group_end(g);
    }
    pthread_mutex_unlock(&engine->groups_lock);
    return status;
}

void
engine_group_interrupt(engine_t *engine, engine_step_t *step)
{
    pthread_mutex_lock(&engine->groups_lock);
    engine_group_t *g = step->group;
    if (g != NULL) {
        group_end(g);
        if (g->running) {
            engine->backend->ops->groups->abort(g->group);
        }
    }
    pthread_mutex_unlock(&engine->groups_lock);
}
