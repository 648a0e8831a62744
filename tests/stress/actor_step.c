/* actor_step.c: a random step: its batch, its runs in any order and more than once, calls that
 * must be refused while it is open, and its end. */
#include "tests/stress/actor.h"

#include "base/checked.h"
#include "base/clock.h"
#include "base/status.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define JUDGED_ROWS 6u  /* of an entry's answer; of more, so many drawn by chance */
#define SETTLE_MS 1000u /* behind a step's deadline its workers have ended it */
#define INGEST_PIECE 350u

/* A step as it is being taken. */
typedef struct trial {
    actor_t *a;
    attn_batch_t batch;
    attn_entry_t entries[ACTOR_ENTRIES];
    part_t parts[ACTOR_ENTRIES];
    uint32_t rows, new_rows;
    target_step_t step;
    uint64_t ends_ns;
    bool stored[ACTOR_LAYERS];
    int32_t twin; /* the entry to be asked again elsewhere, or -1 */
    bool over;    /* it met a disturbance */
} trial_t;

/* ---- rows ---- */

void
actor_write_rows(const actor_t *a, const part_t *p, uint32_t layer, bool with_q, bool with_kv)
{
    const attn_geometry_t *g = a->geometry;
    size_t size              = attn_dtype_size(g->kv_dtype);
    uint32_t nq = g->q_heads * g->head_dim_k, nk = g->kv_heads * g->head_dim_k,
             nv = g->kv_heads * g->head_dim_v;

    for (uint32_t i = 0; with_q && i < p->n_q; i++) {
        truth_write(ROW_Q, p->q_content, i, layer, nq, g->kv_dtype,
                    (uint8_t *)a->q + (uint64_t)(p->q_row + i) * nq * size);
    }
    for (uint32_t i = 0; with_kv && i < p->n_new; i++) {
        truth_write(ROW_K, p->content, p->base + p->shift + i, layer, nk, g->kv_dtype,
                    (uint8_t *)a->k + (uint64_t)(p->new_row + i) * nk * size);
        truth_write(ROW_V, p->content, p->base + p->shift + i, layer, nv, g->kv_dtype,
                    (uint8_t *)a->v + (uint64_t)(p->new_row + i) * nv * size);
    }
}

question_t
actor_question(const actor_t *a, const part_t *p, uint32_t layer, attn_dtype_t o_dtype)
{
    return (question_t){.geometry  = a->geometry,
                        .layer     = layer,
                        .seq       = &a->seqs[p->s],
                        .base      = p->base,
                        .n_q       = p->n_q,
                        .n_new     = p->n_new,
                        .content   = p->content,
                        .q_content = p->q_content,
                        .n_lists   = p->n_lists,
                        .indptr    = p->indptr,
                        .pages     = p->pages,
                        .mask      = p->masked ? p->mask : NULL,
                        .o_dtype   = o_dtype};
}

/* ---- the batch ---- */

static void
draw_sizes(actor_t *a, part_t *p, uint64_t length)
{
    uint64_t kind = chance_below(&a->chance, 20);
    uint32_t few  = (uint32_t)chance_in(&a->chance, 2, 8);
    uint32_t many = (uint32_t)chance_in(&a->chance, 9, 300);

    p->base  = length;
    p->n_q   = 1;
    p->n_new = 1;
    if (kind < 4) {
        p->n_q = p->n_new = few;
    } else if (kind < 6) {
        p->n_q = p->n_new = many;
    } else if (kind < 8) {
        p->n_q   = 0;
        p->n_new = many;
    } else if (kind < 11 && length > 0) { /* asks only, perhaps about a part */
        p->n_new = 0;
        p->base  = chance_one_in(&a->chance, 2) ? length : chance_in(&a->chance, 1, length);
        p->n_q   = (uint32_t)attn_min(p->base, few);
    } else if (kind == 11) {
        p->n_new = few + 3;
        p->n_q   = (uint32_t)chance_in(&a->chance, 1, few);
    } else if (kind == 12) {
        p->n_new = 1;
        p->n_q   = (uint32_t)attn_min(length + 1, few);
    }
}

/* Lists of some of the committed pages, for all heads or for each. */
static void
draw_lists(actor_t *a, part_t *p)
{
    const attn_geometry_t *g = a->geometry;
    uint32_t per_chunk = (g->chunk_size + g->page_size - 1) / g->page_size, n = 0;

    p->n_lists   = chance_one_in(&a->chance, 2) ? 1 : g->kv_heads;
    p->indptr[0] = 0;
    for (uint32_t l = 0; l < p->n_lists; l++) {
        uint64_t keep = chance_in(&a->chance, 1, 4);
        for (uint64_t at = 0; at < p->base; at += g->page_size) {
            if (at / g->chunk_size != (at - attn_min(at, g->page_size)) / g->chunk_size) {
                at = at / g->chunk_size * g->chunk_size; /* pages count from their chunk's start */
            }
            uint64_t page = at / g->chunk_size * per_chunk + at % g->chunk_size / g->page_size;
            if (chance_below(&a->chance, 4) < keep && n < LIST_PAGES) {
                p->pages[n++] = (uint32_t)page;
            }
        }
        p->indptr[l + 1] = n;
    }
}

/* A tree of new tokens: each query names a token and its ancestors, and one branch is kept. */
static void
draw_mask(actor_t *a, part_t *p)
{
    uint32_t stride = (p->n_new + 7) / 8, parent[ACTOR_DRAFT], n = 0;

    p->masked = p->n_q == p->n_new && p->n_new > 1 && p->n_new <= ACTOR_DRAFT &&
                chance_one_in(&a->chance, 2);
    if (!p->masked) {
        return;
    }
    memset(p->mask, 0, sizeof(p->mask));
    for (uint32_t i = 0; i < p->n_new; i++) {
        uint32_t before = (uint32_t)chance_below(&a->chance, 3);
        parent[i]       = before < i ? i - 1 - before : UINT32_MAX;
        for (uint32_t at = i; at != UINT32_MAX; at = parent[at]) {
            p->mask[i * stride + at / 8] |= (uint8_t)(1 << at % 8);
        }
    }
    uint32_t leaf = (uint32_t)chance_below(&a->chance, p->n_new);
    for (uint32_t i = 0; i <= leaf; i++) {
        if (p->mask[leaf * stride + i / 8] >> i % 8 & 1) {
            p->path[n++] = i;
        }
    }
    p->accepted = attn_min(p->accepted, n);
}

static void
add_part(trial_t *t, uint32_t s)
{
    actor_t *a = t->a;
    uint32_t i = t->batch.n;
    part_t *p  = &t->parts[i];
    p->s       = s;
    draw_sizes(a, p, a->seqs[s].length);
    if (t->rows + p->n_q > ACTOR_ROWS || t->new_rows + p->n_new > ACTOR_ROWS ||
        p->base + p->n_new > TRUTH_TOKENS_MAX) {
        return;
    }
    uint64_t lists = chance_below(&a->chance, 6);
    p->n_lists     = 0;
    p->by_run      = lists == 0 && p->n_q > 0;
    if (lists == 1 && p->n_q > 0) {
        draw_lists(a, p);
    }
    p->content   = a->next_content++;
    p->q_content = a->next_content++;
    p->q_row     = t->rows;
    p->new_row   = t->new_rows;
    p->accepted =
        chance_one_in(&a->chance, 4) ? (uint32_t)chance_below(&a->chance, p->n_new + 1) : p->n_new;
    draw_mask(a, p);
    t->rows += p->n_q;
    t->new_rows += p->n_new;
    t->entries[i] = (attn_entry_t){.seq           = a->seqs[s].seq,
                                   .base          = p->base,
                                   .n_q           = p->n_q,
                                   .n_new         = p->n_new,
                                   .n_lists       = p->n_lists,
                                   .sparse_indptr = p->indptr,
                                   .sparse_pages  = p->pages,
                                   .list_room     = p->by_run ? LIST_PAGES : 0,
                                   .mask          = p->masked ? p->mask : NULL};
    t->batch.n++;
}

static void
draw_batch(trial_t *t)
{
    actor_t *a    = t->a;
    uint32_t most = chance_one_in(&a->chance, 3) ? ACTOR_ENTRIES : 1;
    uint32_t s    = (uint32_t)chance_below(&a->chance, ACTOR_SEQS);

    t->batch =
        (attn_batch_t){.size     = sizeof(t->batch),
                       .entries  = t->entries,
                       .q_dtype  = a->geometry->kv_dtype,
                       .o_dtype  = chance_one_in(&a->chance, 3) ? a->geometry->kv_dtype : ATTN_F32,
                       .want_lse = !chance_one_in(&a->chance, 4),
                       .timeout_ms = a->stress->options.step_timeout_ms};
    for (uint32_t i = 0; i < ACTOR_SEQS && t->batch.n < most; i++, s = (s + 1) % ACTOR_SEQS) {
        if (a->seqs[s].used && a->seqs[s].length == a->seqs[s].maybe) {
            add_part(t, s);
        }
    }
    t->twin = -1;
    if (a->stress->options.twins && t->batch.n > 0 && chance_one_in(&a->chance, 16)) {
        uint32_t i = (uint32_t)chance_below(&a->chance, t->batch.n);
        t->twin = !t->parts[i].by_run && t->parts[i].n_q > 0 && t->parts[i].n_q <= ACTOR_TWIN_ROWS
                      ? (int32_t)i
                      : -1;
    }
}

/* ---- begin ---- */

static void
log_batch(trial_t *t)
{
    actor_t *a = t->a;

    for (uint32_t i = 0; i < t->batch.n; i++) {
        const part_t *p = &t->parts[i];
        actor_log(a,
                  "  entry %u: sequence %llx of %llu, base %llu, n_q %u, n_new %u, accepts %u, "
                  "%u lists, content %llx%s",
                  i, (unsigned long long)a->seqs[p->s].seq.id,
                  (unsigned long long)a->seqs[p->s].length, (unsigned long long)p->base, p->n_q,
                  p->n_new, p->accepted, p->n_lists, (unsigned long long)p->content,
                  p->by_run   ? ", lists by run"
                  : p->masked ? ", a tree"
                              : "");
    }
}

/* The step met a disturbance: at some worker it may stay open until its deadline. */
static void
unsettle(trial_t *t)
{
    for (uint32_t i = 0; i < t->batch.n; i++) {
        t->a->unsettled_until_ns[t->parts[i].s] = attn_max(t->a->unsettled_until_ns[t->parts[i].s],
                                                           t->ends_ns + SETTLE_MS * ATTN_NS_PER_MS);
    }
}

static bool
any_unsettled(const trial_t *t)
{
    for (uint32_t i = 0; i < t->batch.n; i++) {
        if (attn_now_ns() < t->a->unsettled_until_ns[t->parts[i].s]) {
            return true;
        }
    }
    return false;
}

static bool
begin(trial_t *t)
{
    actor_t *a = t->a;

    t->ends_ns = attn_now_ns() + t->batch.timeout_ms * ATTN_NS_PER_MS;
    actor_call(a, "begin", t->ends_ns);
    attn_status_t status = actor_called(a, target_begin(&a->connection->target, &t->batch,
                                                        !chance_one_in(&a->chance, 4), &t->step));
    actor_log(a, "begin of %u entries: %s", t->batch.n, attn_strerror(status));
    log_batch(t);
    if (status == ATTN_OK) {
        return true;
    }
    if ((status == ATTN_ERR_BUSY || status == ATTN_ERR_STALE) && any_unsettled(t)) {
        actor_log(a, "begin: %.150s", attn_last_error());
    } else {
        actor_accepts(a, "begin", status);
    }
    unsettle(t);
    for (uint32_t i = 0; i < t->batch.n && !atomic_load(&a->stress->stop); i++) {
        if (a->seqs[t->parts[i].s].used) {
            actor_resolve(a, t->parts[i].s);
        }
    }
    return false;
}

/* ---- runs ---- */

static void
keep_for_twin(trial_t *t, uint32_t layer)
{
    actor_t *a               = t->a;
    const attn_geometry_t *g = a->geometry;
    const part_t *p          = &t->parts[t->twin];
    uint64_t row = (uint64_t)g->q_heads * g->head_dim_v * attn_dtype_size(t->batch.o_dtype);

    memcpy((uint8_t *)a->twin_o + (uint64_t)layer * ACTOR_TWIN_ROWS * row,
           (uint8_t *)a->o + p->q_row * row, p->n_q * row);
    if (t->batch.want_lse) {
        memcpy(a->twin_lse + (uint64_t)layer * ACTOR_TWIN_ROWS * g->q_heads,
               a->lse + (uint64_t)p->q_row * g->q_heads,
               (uint64_t)p->n_q * g->q_heads * sizeof(float));
    }
}

/* What --break asks for. */
static void
spoil(trial_t *t)
{
    actor_t *a = t->a;

    if (stress_sabotage(a->stress, a->number, SABOTAGE_ANSWER)) {
        ((uint8_t *)a->o)[attn_dtype_size(t->batch.o_dtype) - 1] ^= 0x40; /* of the exponent */
    }
    if (t->batch.want_lse && stress_sabotage(a->stress, a->number, SABOTAGE_LSE)) {
        a->lse[0] += 1e-3f * (1 + (a->lse[0] < 0 ? -a->lse[0] : a->lse[0]));
    }
}

static bool
judge(trial_t *t, uint32_t layer)
{
    actor_t *a               = t->a;
    const attn_geometry_t *g = a->geometry;
    uint64_t row = (uint64_t)g->q_heads * g->head_dim_v * attn_dtype_size(t->batch.o_dtype);
    verdict_t w;

    for (uint32_t i = 0; i < t->batch.n; i++) {
        const part_t *p     = &t->parts[i];
        question_t question = actor_question(a, p, layer, t->batch.o_dtype);
        int rows            = truth_judge(&question, (uint8_t *)a->o + p->q_row * row,
                               t->batch.want_lse ? a->lse + (uint64_t)p->q_row * g->q_heads : NULL,
                                          JUDGED_ROWS, &a->chance, &w);
        if (rows < 0) {
            actor_fail(a,
                       "WRONG ANSWER: sequence %llx, layer %u, entry %u, query %u, head %u, %s "
                       "%d: got %.9g, expected %.9g within %.3g",
                       (unsigned long long)a->seqs[p->s].seq.id, layer, i, w.row, w.head,
                       w.element < 0 ? "lse" : "o", w.element, w.got, w.expected, w.allowed);
            return false;
        }
        atomic_fetch_add(&a->figures->rows, (uint64_t)rows);
    }
    atomic_fetch_add(&a->figures->answers, 1);
    return true;
}

/* Lists for the entries that have room for them. @return lists, or NULL if none has */
static const attn_lists_t *
draw_run_lists(trial_t *t, attn_lists_t lists[ACTOR_ENTRIES])
{
    bool any = false;

    for (uint32_t i = 0; i < t->batch.n; i++) {
        part_t *p = &t->parts[i];
        lists[i]  = (attn_lists_t){0};
        if (p->by_run) {
            draw_lists(t->a, p);
            lists[i] =
                (attn_lists_t){.n_lists = p->n_lists, .indptr = p->indptr, .pages = p->pages};
            any = true;
        }
    }
    atomic_fetch_add(&t->a->figures->run_lists, any);
    return any ? lists : NULL;
}

/* @return the status, which may be that of a disturbance; a wrong answer ends the trial */
static attn_status_t
run(trial_t *t, uint32_t layer, bool with_q, bool with_kv)
{
    actor_t *a               = t->a;
    const attn_geometry_t *g = a->geometry;
    target_run_t r           = {.layer = layer, .submit = chance_one_in(&a->chance, 4)};

    with_q  = with_q && t->rows > 0;
    with_kv = with_kv && t->new_rows > 0;
    if (!with_q && !with_kv) {
        return ATTN_OK; /* nothing to say */
    }
    for (uint32_t i = 0; i < t->batch.n; i++) {
        actor_write_rows(a, &t->parts[i], layer, with_q, with_kv);
    }
    r.q   = with_q ? a->q : NULL;
    r.k   = with_kv ? a->k : NULL;
    r.v   = with_kv ? a->v : NULL;
    r.o   = with_q ? a->o : NULL;
    r.lse = with_q && t->batch.want_lse ? a->lse : NULL;
    attn_lists_t lists[ACTOR_ENTRIES];
    r.lists = with_q ? draw_run_lists(t, lists) : NULL;
    if (with_q) {
        memset(a->o, 0xff,
               (uint64_t)t->rows * g->q_heads * g->head_dim_v *
                   attn_dtype_size(t->batch.o_dtype)); /* NaN */
    }
    actor_call(a, "run", t->ends_ns);
    if (stress_sabotage(a->stress, a->number, SABOTAGE_UNENDED)) {
        for (;;) {
            pause();
        }
    }
    attn_status_t status =
        actor_called(a, target_run(&a->connection->target, &t->step, &t->batch, &r));
    actor_log(a, "run layer %u%s%s%s: %s", layer, with_q ? " q" : "", with_kv ? " kv" : "",
              r.submit ? " submitted" : "", attn_strerror(status));
    if (status == ATTN_OK) {
        t->stored[layer] = t->stored[layer] || with_kv;
        if (with_q) {
            spoil(t);
        }
        if (with_q && !judge(t, layer)) {
            t->over = true;
        } else if (with_q && t->twin >= 0) {
            keep_for_twin(t, layer);
        }
    }
    return status;
}

/* Other k, v for a stored layer: refused, and the step goes on. */
static attn_status_t
run_conflict(trial_t *t, uint32_t layer)
{
    actor_t *a = t->a;
    uint64_t contents[ACTOR_ENTRIES];

    for (uint32_t i = 0; i < t->batch.n; i++) {
        contents[i]         = t->parts[i].content;
        t->parts[i].content = a->next_content++;
    }
    int32_t twin         = t->twin;
    t->twin              = -1;
    attn_status_t status = run(t, layer, false, true);
    t->twin              = twin;
    for (uint32_t i = 0; i < t->batch.n; i++) {
        t->parts[i].content = contents[i];
    }
    if (status == ATTN_OK) {
        actor_fail(a, "A CONFLICT WENT THROUGH: layer %u was stored with other k, v", layer);
        t->over = true;
    }
    return status == ATTN_ERR_CONFLICT ? ATTN_OK : status;
}

/* What is refused, or not, while the step is open. */
static void
meddle(trial_t *t)
{
    actor_t *a         = t->a;
    const part_t *p    = &t->parts[chance_below(&a->chance, t->batch.n)];
    shadow_t *s        = &a->seqs[p->s];
    uint64_t ends      = attn_now_ns() + a->stress->options.timeout_ms * ATTN_NS_PER_MS;
    attn_entry_t entry = {.seq = s->seq, .base = s->length, .n_q = 1, .n_new = 1};
    attn_batch_t batch = {.size       = sizeof(batch),
                          .n          = 1,
                          .entries    = &entry,
                          .q_dtype    = ATTN_F32,
                          .timeout_ms = a->stress->options.step_timeout_ms};
    target_step_t other;
    attn_status_t status;

    if (chance_one_in(&a->chance, 2)) {
        actor_call(a, "second begin", attn_now_ns() + batch.timeout_ms * ATTN_NS_PER_MS);
        status = actor_called(a, target_begin(&a->connection->target, &batch, true, &other));
        if (status == ATTN_OK) {
            target_abort(&other);
        }
    } else {
        actor_call(a, "truncate in a step", ends);
        status = actor_called(a, target_truncate(&a->connection->target, s->seq, s->length / 2));
    }
    actor_log(a, "%s on %llx: %s", a->call, (unsigned long long)s->seq.id, attn_strerror(status));
    if (status == ATTN_OK && !actor_excused(a)) {
        actor_fail(a, "%s WAS NOT REFUSED on sequence %llx", a->call,
                   (unsigned long long)s->seq.id);
        t->over = true;
    } else if (status == ATTN_OK && strcmp(a->call, "truncate in a step") == 0) {
        shadow_cut(s, s->length / 2); /* a worker was away, and with it the step */
        t->over = true;
    } else if (status != ATTN_OK && status != ATTN_ERR_BUSY) {
        actor_accepts(a, a->call, status);
    }
}

static bool
all_stored(const trial_t *t)
{
    for (uint32_t l = 0; l < t->a->geometry->layers; l++) {
        if (!t->stored[l] && t->new_rows > 0) {
            return false;
        }
    }
    return true;
}

/* A run of this layer, perhaps in two, perhaps again. */
static attn_status_t
run_layer(trial_t *t, uint32_t layer)
{
    chance_t *c          = &t->a->chance;
    uint64_t way         = chance_below(c, 12);
    attn_status_t status = way == 0 ? run(t, layer, false, true) : run(t, layer, true, true);

    if (status == ATTN_OK && !t->over && way == 0) {
        status = run(t, layer, true, false);
    } else if (status == ATTN_OK && !t->over && way <= 2) {
        status = run(t, layer, true, way == 1); /* the same again */
    } else if (status == ATTN_OK && !t->over && way == 3 && t->new_rows > 0) {
        status = run_conflict(t, layer);
    }
    return status;
}

/* ---- the end ---- */

static void
abort_step(trial_t *t)
{
    actor_call(t->a, "abort", attn_now_ns() + 2000 * ATTN_NS_PER_MS);
    target_abort(&t->step);
    actor_called(t->a, ATTN_OK);
    actor_log(t->a, "aborted");
    atomic_fetch_add(&t->a->figures->aborts, 1);
}

static void
append_accepted(shadow_t *s, const part_t *p)
{
    if (p->masked) {
        shadow_append_path(s, p->base, p->content, p->path, p->accepted);
    } else {
        shadow_append(s, p->base, p->content);
    }
}

static void
committed(trial_t *t)
{
    actor_t *a = t->a;

    for (uint32_t i = 0; i < t->batch.n; i++) {
        const part_t *p = &t->parts[i];
        shadow_t *s     = &a->seqs[p->s];
        if (p->accepted > 0) {
            shadow_cut(s, p->base);
            append_accepted(s, p);
            s->length = s->maybe = p->base + p->accepted;
            atomic_fetch_add(&a->figures->paths, p->masked);
            atomic_fetch_add(&a->figures->tokens, p->accepted);
        }
        a->unsettled_until_ns[p->s] = 0;
        atomic_fetch_add(&a->figures->partial_commits, p->accepted < p->n_new);
    }
}

/* Some owners may have committed, others not. */
static void
half_committed(trial_t *t)
{
    for (uint32_t i = 0; i < t->batch.n; i++) {
        const part_t *p = &t->parts[i];
        shadow_t *s     = &t->a->seqs[p->s];
        if (p->accepted > 0) {
            append_accepted(s, p);
            s->maybe = p->base + p->accepted;
        }
    }
}

static attn_status_t
commit_step(trial_t *t)
{
    uint32_t accepted[ACTOR_ENTRIES], path[ACTOR_ENTRIES * ACTOR_DRAFT];
    attn_commit_t what = {.size = sizeof(what), .accepted = accepted, .path = path};

    for (uint32_t i = 0; i < t->batch.n; i++) {
        const part_t *p = &t->parts[i];
        accepted[i]     = p->accepted;
        for (uint32_t j = 0; p->masked && j < p->accepted; j++) {
            path[what.n_path++] = p->path[j];
        }
    }
    return target_commit(&t->step, &what);
}

/* @return the step ended as it was meant to */
static bool
commit(trial_t *t)
{
    actor_t *a = t->a;

    actor_call(a, "commit", t->ends_ns);
    attn_status_t status = actor_called(a, commit_step(t));
    actor_log(a, "commit: %s", attn_strerror(status));
    if (status == ATTN_OK) {
        committed(t);
        return true;
    }
    actor_accepts(a, "commit", status);
    abort_step(t);
    unsettle(t);
    half_committed(t);
    return false;
}

/* A commit with a layer missing is refused, naming it, and the step goes on. */
static void
commit_too_early(trial_t *t)
{
    actor_t *a   = t->a;
    uint32_t any = 0;

    for (uint32_t i = 0; i < t->batch.n; i++) {
        any += t->parts[i].accepted;
    }
    if (any == 0) {
        return;
    }
    actor_call(a, "commit", t->ends_ns);
    attn_status_t status = actor_called(a, commit_step(t));
    actor_log(a, "commit too early: %s", attn_strerror(status));
    if (status == ATTN_OK) {
        actor_fail(a, "AN INCOMPLETE STEP WAS COMMITTED");
        t->over = true;
    } else if (status != ATTN_ERR_INCOMPLETE) {
        actor_accepts(a, "commit too early", status);
        abort_step(t);
        unsettle(t);
        half_committed(t);
        t->over = true;
    }
}

/* ---- a whole step ---- */

static void
take_runs(trial_t *t)
{
    actor_t *a      = t->a;
    uint32_t layers = a->geometry->layers, order[ACTOR_LAYERS];

    for (uint32_t l = 0; l < layers; l++) { /* a random order */
        uint32_t at = (uint32_t)chance_below(&a->chance, l + 1);
        order[l]    = order[at];
        order[at]   = l;
    }
    for (uint32_t l = 0; l < layers && !t->over; l++) {
        attn_status_t status = run_layer(t, order[l]);
        if (status != ATTN_OK) {
            actor_accepts(a, "run", status);
            t->over = true;
        }
        if (!t->over && chance_one_in(&a->chance, 40)) {
            meddle(t);
        }
        if (!t->over && !all_stored(t) && chance_one_in(&a->chance, 40)) {
            commit_too_early(t);
        }
    }
}

void
actor_step(actor_t *a)
{
    trial_t t = {.a = a};

    draw_batch(&t);
    if (t.batch.n == 0 || !begin(&t)) {
        return;
    }
    take_runs(&t);
    bool well = !t.over;
    if (t.step.step == NULL && t.step.door == NULL) {
        return; /* it ended on the way */
    }
    if (!well || chance_one_in(&a->chance, 10)) {
        abort_step(&t);
        if (!well) {
            unsettle(&t);
        }
    } else {
        well = commit(&t);
    }
    if (well && t.twin >= 0) {
        actor_twin(a, &t.parts[t.twin], &t.batch);
    }
    if (well && !atomic_load(&a->stress->failed)) {
        atomic_fetch_add(&a->figures->steps, 1);
        if (atomic_fetch_add(&a->stress->steps, 1) + 1 >= a->stress->options.steps) {
            atomic_store(&a->stress->stop, true);
        }
    }
}
