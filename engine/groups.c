/*
 * groups.c: the groups that this worker's device is a rank of. Who makes a group decides what its
 * exchanges are and in which order they come, for all ranks must make the same ones: so a group has
 * one step at a time, whose runs come one at a time.
 *
 * A group that failed is over: who made it makes another. So is one that nobody used for a while.
 * The lock is held for moments alone; what waits for the device, and an exchange that is under way
 * there, is done by who opens or connects a group and by who sweeps up those that are over.
 */
#include "engine/engine_int.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/status.h"

#include <stdlib.h>
#include <string.h>

/* Rows of a proof at most: a few hundred KiB each way. */
#define PROOF_ROWS_MAX 1024u

/* Unused for so long a group is over. */
#define IDLE_NS (UINT64_C(30000) * ATTN_NS_PER_MS)

typedef enum group_state {
    GROUP_OPEN,      /* its inbox is there */
    GROUP_CONNECTED, /* and those of others are mapped */
    GROUP_OVER,      /* it goes when nobody has it */
} group_state_t;

struct engine_group {
    uint64_t id;         /* key */
    attn_group_t *group; /* NULL: it is being opened */
    engine_group_options_t options;
    uint64_t used_ns; /* last */
    group_state_t state;
    bool taken; /* by a step, or by who opens, connects or proves it */
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

/* Its exchanges end, also the one that may be under way. Under the lock. */
static void
group_end(const engine_t *engine, engine_group_t *g)
{
    g->state = GROUP_OVER;
    if (g->group != NULL) {
        engine->backend->ops->groups->abort(g->group);
    }
}

/* Whoever took a group gives it back. */
static void
group_give(engine_t *engine, engine_group_t *g, attn_status_t status)
{
    pthread_mutex_lock(&engine->groups_lock);
    if (status != ATTN_OK) {
        group_end(engine, g);
    }
    g->taken   = false;
    g->used_ns = attn_now_ns();
    pthread_mutex_unlock(&engine->groups_lock);
}

/* ---- making ---- */

static attn_status_t
check_options(const engine_t *engine, const engine_group_options_t *o)
{
    if (engine->backend->ops->groups == NULL) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "%s has no device that merges in groups",
                         engine->name);
    }
    if (o->id == 0 || o->half_bytes < ENGINE_HALF_MIN || o->half_bytes > ATTN_HALF_MAX) {
        return attn_fail(ATTN_ERR_INVALID,
                         "group %016llx with half an inbox of %llu bytes: not 0, and %u to %llu",
                         (unsigned long long)o->id, (unsigned long long)o->half_bytes,
                         ENGINE_HALF_MIN, (unsigned long long)ATTN_HALF_MAX);
    }
    return ATTN_OK;
}

/* Put it among the others; it is taken at first. */
static attn_status_t
group_add(engine_t *engine, engine_group_t *g)
{
    attn_status_t status = ATTN_OK;

    pthread_mutex_lock(&engine->groups_lock);
    if (group_find(engine, g->id) != NULL) {
        status = attn_fail(ATTN_ERR_EXISTS, "group %016llx is open", (unsigned long long)g->id);
    } else if (HASH_COUNT(engine->groups) >= ATTN_GROUPS_MAX) {
        status = attn_fail(ATTN_ERR_EXHAUSTED, "%s is in %u groups: at most so many", engine->name,
                           ATTN_GROUPS_MAX);
    } else {
        HASH_ADD(hh, engine->groups, id, sizeof(g->id), g);
        if (!table_has(hh, g)) {
            status = attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a group");
        }
    }
    pthread_mutex_unlock(&engine->groups_lock);
    return status;
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
    attn_group_t *group;
    status = ops->open(engine->backend,
                       &(attn_group_options_t){.id         = o->id,
                                               .ranks      = o->ranks,
                                               .me         = o->me,
                                               .head_dim_v = o->head_dim_v,
                                               .half_bytes = o->half_bytes},
                       &group);
    if (status == ATTN_OK) {
        ops->device(engine->backend, device);
        status = ops->handle(group, handle);
        pthread_mutex_lock(&engine->groups_lock);
        g->group = group;
        pthread_mutex_unlock(&engine->groups_lock);
    }
    group_give(engine, g, status);
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
    g->state = g->state == GROUP_OPEN ? GROUP_CONNECTED : g->state;
    pthread_mutex_unlock(&engine->groups_lock);
    group_give(engine, g, status);
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
        g->taken = true;
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
    group_give(engine, g, status);
    return status;
}

/* ---- the end ---- */

attn_status_t
engine_group_close(engine_t *engine, uint64_t id)
{
    pthread_mutex_lock(&engine->groups_lock);
    engine_group_t *g = group_find(engine, id);
    if (g != NULL) {
        group_end(engine, g);
    }
    pthread_mutex_unlock(&engine->groups_lock);
    engine_groups_sweep(engine, attn_now_ns());
    return ATTN_OK;
}

/* One that goes: nobody has it, and it is over, or was not used for too long. Under the lock. */
static engine_group_t *
find_going(const engine_t *engine, uint64_t now_ns)
{
    engine_group_t *g = engine->groups;

    while (g != NULL && (g->taken || (g->state != GROUP_OVER && now_ns < g->used_ns + IDLE_NS))) {
        g = g->hh.next;
    }
    return g;
}

bool
engine_groups_due(engine_t *engine, uint64_t now_ns)
{
    pthread_mutex_lock(&engine->groups_lock);
    bool due = find_going(engine, now_ns) != NULL;
    pthread_mutex_unlock(&engine->groups_lock);
    return due;
}

void
engine_groups_sweep(engine_t *engine, uint64_t now_ns)
{
    engine_group_t *g;

    do {
        pthread_mutex_lock(&engine->groups_lock);
        if ((g = find_going(engine, now_ns)) != NULL) {
            HASH_DEL(engine->groups, g);
        }
        pthread_mutex_unlock(&engine->groups_lock);
        if (g != NULL && g->group != NULL) {
            engine->backend->ops->groups->close(g->group);
        }
        free(g);
    } while (g != NULL);
}

void
engine_groups_free(engine_t *engine)
{
    engine_groups_sweep(engine, UINT64_MAX); /* there are no steps any more */
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
    pthread_mutex_unlock(&engine->groups_lock);
    if (g != NULL) {
        group_give(engine, g, ATTN_OK);
    }
}

attn_status_t
engine_group_run(engine_t *engine, engine_step_t *step, const attn_group_run_t *run)
{
    engine_group_t *g = step->group;

    pthread_mutex_lock(&engine->groups_lock);
    bool over = g->state == GROUP_OVER;
    pthread_mutex_unlock(&engine->groups_lock);
    return over ? attn_fail(ATTN_ERR_ABORTED, "the step's group on %s is over", engine->name)
                : engine->backend->ops->groups->run(g->group, run);
}

void
engine_group_interrupt(engine_t *engine, engine_step_t *step)
{
    pthread_mutex_lock(&engine->groups_lock);
    if (step->group != NULL) {
        group_end(engine, step->group);
    }
    pthread_mutex_unlock(&engine->groups_lock);
}
