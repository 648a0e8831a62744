/*
 * Random operations on several caches of one store, against a model that shares nothing
 * with it. The model keeps for every chunk the values of its tokens, and of its pages only
 * who holds them (serial numbers, counted by looking at all holders). Beside it a memory is
 * kept per page, written through kv_step_pages() and kv_step_copies() the way the engine
 * does it, at a random time while the step is open: a page that is shared where it must not
 * be, or freed too early, shows as a wrong value.
 */
#include "kvstore/test_random.h"
#include "kvstore/test_world.h"

#include <string.h>

#define SEEDS 20
#define OPERATIONS 10000 /* of a seed */

#define POISON 0xdeadbeefu

static kv_store_t *store;
static world_t worlds[WORLDS];

/* That the test reaches what it is for. */
static struct {
    uint64_t begun, copies, exhausted, busy, stale, forks_in_step, partial, aborted;
} seen;

static bool
is_in(attn_status_t status, const attn_status_t *allowed, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        if (allowed[i] == status) {
            return true;
        }
    }
    return n == 0 && status == ATTN_OK;
}

/* ---- content ---- */

static uint32_t *
memory_at(const world_t *world, const uint32_t *pages, uint32_t position)
{
    uint32_t page = pages[position / world->page_size];
    CHECK(page < world->n_pages);
    return &world->memory[page * world->page_size + position % world->page_size];
}

static void
do_copies(world_t *world, model_step_t *step)
{
    uint32_t n;
    const kv_copy_t *copies = kv_step_copies(step->step, &n);

    CHECK(n == step->n_copies);
    for (uint32_t i = 0; i < n; i++) {
        CHECK(copies[i].tokens > 0 && copies[i].tokens < world->page_size);
        memcpy(world->memory + copies[i].to * world->page_size,
               world->memory + copies[i].from * world->page_size,
               copies[i].tokens * sizeof(*world->memory));
    }
}

static void
do_writes(world_t *world, model_step_t *step)
{
    for (uint32_t e = 0; e < step->n_entries; e++) {
        uint32_t n_spares;
        const uint32_t *spares = kv_step_spares(step->step, e, &n_spares);
        for (uint32_t t = 0; t < step->entries[e].n_spare; t++) { /* nobody else may see these */
            *memory_at(world, spares, t) = POISON;
        }
        for (uint32_t p = 0; p < step->entries[e].n_parts; p++) {
            const model_part_t *part = &step->entries[e].parts[p];
            uint32_t n;
            const uint32_t *pages = kv_step_pages(step->step, e, p, &n);
            for (uint32_t t = 0; t < part->named.n_new; t++) {
                *memory_at(world, pages, part->named.length + t) = part->values[t];
            }
        }
    }
}

/* Whatever the step may write to holds garbage before it does. */
static void
do_poison(world_t *world, model_step_t *step)
{
    for (uint32_t e = 0; e < step->n_entries; e++) {
        for (uint32_t p = 0; p < step->entries[e].n_parts; p++) {
            const kv_step_chunk_t *named = &step->entries[e].parts[p].named;
            uint32_t n;
            const uint32_t *pages = kv_step_pages(step->step, e, p, &n);
            for (uint32_t t = named->length; named->n_new > 0 && t < n * world->page_size; t++) {
                *memory_at(world, pages, t) = POISON;
            }
        }
    }
}

static void
check_step_content(world_t *world, const model_step_t *step)
{
    for (uint32_t e = 0; e < step->n_entries; e++) {
        for (uint32_t p = 0; p < step->entries[e].n_parts; p++) {
            const model_part_t *part   = &step->entries[e].parts[p];
            const model_chunk_t *chunk = chunk_of(world, part->named.chunk);
            uint32_t n, n_new = step->progress == WRITTEN ? part->named.n_new : 0;
            const uint32_t *pages = kv_step_pages(step->step, e, p, &n);
            CHECK(n == pages_for(world, part->named.length + part->named.n_new));
            if (step->progress == BEGUN && step->n_copies > 0) {
                continue;
            }
            for (uint32_t t = 0; t < part->named.length; t++) {
                CHECK(*memory_at(world, pages, t) == chunk->tokens[t]);
            }
            for (uint32_t t = 0; t < n_new; t++) {
                CHECK(*memory_at(world, pages, part->named.length + t) == part->values[t]);
            }
        }
    }
}

/* All committed content, read the way a query reads it. */
static void
check_committed_content(world_t *world)
{
    kv_step_chunk_t named[CHUNKS];
    kv_step_entry_t entry = {.seq = 1000, .chunks = named};
    kv_step_t *step;
    uint32_t n;

    for (uint32_t c = 0; c < CHUNKS; c++) {
        const model_chunk_t *chunk = &world->chunks[c];
        if (chunk->live && !chunk->appended) {
            named[entry.n_chunks++] = (kv_step_chunk_t){
                .chunk      = c + 1,
                .generation = chunk->generation,
                .length     = chunk->length,
                .number     = c,
            };
        }
    }
    CHECK(kv_step_begin(store, world->cache, 1000000, &entry, 1, &step) == ATTN_OK);
    for (uint32_t i = 0; i < entry.n_chunks; i++) {
        const model_chunk_t *chunk = chunk_of(world, named[i].chunk);
        const uint32_t *pages      = kv_step_pages(step, 0, i, &n);
        CHECK(n == chunk->n_pages);
        for (uint32_t t = 0; t < chunk->length; t++) {
            CHECK(*memory_at(world, pages, t) == chunk->tokens[t]);
        }
    }
    kv_step_abort(store, step);
}

static void
check_content(world_t *world)
{
    check_committed_content(world);
    for (uint32_t s = 0; s < STEPS; s++) {
        if (world->steps[s].step != NULL) {
            check_step_content(world, &world->steps[s]);
        }
    }
}

static void
check_numbers(world_t *world)
{
    uint32_t held, shared, n_chunks = 0;
    kv_region_info_t info;
    kv_chunk_info_t chunk_info;

    for (uint32_t c = 0; c < CHUNKS; c++) {
        const model_chunk_t *chunk = &world->chunks[c];
        bool there                 = chunk->live || chunk->appended;
        n_chunks += there;
        CHECK(kv_chunk_describe(store, world->cache, c + 1, &chunk_info) ==
              (there ? ATTN_OK : ATTN_ERR_NOT_FOUND));
        if (there) {
            CHECK(chunk_info.generation == (chunk->live ? chunk->generation : 0));
            CHECK(chunk_info.length == (chunk->live ? chunk->length : 0));
            CHECK(chunk_info.n_pages == pages_for(world, chunk_info.length));
            CHECK(chunk_info.in_step == (chunk->named > 0));
        }
    }
    count_pages(world, &held, &shared);
    held += spare_pages(world);
    CHECK(kv_region_describe(store, world->cache, &info) == ATTN_OK);
    CHECK(info.chunks == n_chunks);
    CHECK(info.free_pages == world->n_pages - held);
    CHECK(info.shared_pages == shared);
}

/* ---- begin ---- */

static void
make_part(world_t *world, model_part_t *part, uint32_t number)
{
    uint64_t id                = 1 + pick(CHUNKS);
    const model_chunk_t *chunk = chunk_of(world, id);
    uint32_t length            = chunk->live ? chunk->length : 0;
    uint32_t room              = world->chunk_size - length;

    part->named = (kv_step_chunk_t){
        .chunk      = id,
        .generation = chunk->live ? chunk->generation : 0,
        .length     = length,
        .number     = number,
    };
    if (room > 0 && chance(60)) {
        part->named.n_new = 1 + pick(chance(50) ? room : room < 4 ? room : 4);
    }
    switch (pick(100)) {
    case 0:
        part->named.generation++;
        break;
    case 1:
        part->named.length++;
        break;
    case 2:
        part->named.n_new = room + 1;
        break;
    default:
        break;
    }
}

static void
make_request(world_t *world, model_step_t *step)
{
    step->n_entries = pick(ENTRIES_MAX + 1);
    for (uint32_t e = 0; e < step->n_entries; e++) {
        model_entry_t *entry = &step->entries[e];
        entry->seq           = pick(SEQUENCES);
        entry->n_parts       = pick(PARTS_MAX + 1);
        entry->n_spare       = chance(20) ? pick(3 * world->page_size) : 0;
        for (uint32_t p = 0; p < entry->n_parts; p++) {
            make_part(world, &entry->parts[p], p);
        }
    }
}

static bool
seq_is_held(const world_t *world, uint64_t seq)
{
    for (uint32_t s = 0; s < STEPS; s++) {
        const model_step_t *step = &world->steps[s];
        for (uint32_t e = 0; step->step != NULL && e < step->n_entries; e++) {
            if (step->entries[e].seq == seq) {
                return true;
            }
        }
    }
    return false;
}

/* Do two parts of one request exclude each other? */
static bool
parts_clash(const model_step_t *step, uint32_t e, uint32_t p)
{
    const kv_step_chunk_t *a = &step->entries[e].parts[p].named;

    for (uint32_t f = 0; f <= e; f++) {
        for (uint32_t q = 0; q < (f == e ? p : step->entries[f].n_parts); q++) {
            const kv_step_chunk_t *b = &step->entries[f].parts[q].named;
            if (a->chunk == b->chunk && (e == f || a->n_new > 0 || b->n_new > 0)) {
                return true;
            }
        }
    }
    return false;
}

/* All that is wrong with the request; returns how many. Also what it needs. */
static uint32_t
predict_begin(world_t *world, model_step_t *step, attn_status_t *wrong)
{
    uint32_t n = 0, need = 0, held, shared;

    step->n_copies = 0;
    for (uint32_t e = 0; e < step->n_entries; e++) {
        const model_entry_t *entry = &step->entries[e];
        for (uint32_t f = 0; f < e; f++) {
            if (step->entries[f].seq == entry->seq) {
                wrong[n++] = ATTN_ERR_INVALID;
            }
        }
        if (seq_is_held(world, entry->seq)) {
            wrong[n++] = ATTN_ERR_BUSY;
        }
        need += pages_for(world, entry->n_spare);
        for (uint32_t p = 0; p < entry->n_parts; p++) {
            const kv_step_chunk_t *want = &entry->parts[p].named;
            const model_chunk_t *chunk  = chunk_of(world, want->chunk);
            if (want->length + want->n_new > world->chunk_size || parts_clash(step, e, p)) {
                wrong[n++] = ATTN_ERR_INVALID;
            }
            if (chunk->appended || (chunk->named > 0 && want->n_new > 0)) {
                wrong[n++] = ATTN_ERR_BUSY;
            }
            if (!chunk->live && !chunk->appended && want->generation > 0) {
                wrong[n++] = ATTN_ERR_NOT_FOUND;
            } else if (want->generation != (chunk->live ? chunk->generation : 0) ||
                       want->length != (chunk->live ? chunk->length : 0)) {
                wrong[n++] = ATTN_ERR_STALE;
            }
            if (want->n_new > 0) {
                bool copy = tail_is_shared(world, chunk);
                step->n_copies += copy;
                need += pages_for(world, want->length + want->n_new) -
                        pages_for(world, want->length) + copy;
            }
        }
    }
    count_pages(world, &held, &shared);
    held += spare_pages(world);
    if (n == 0 && need > world->n_pages - held) {
        wrong[n++] = ATTN_ERR_EXHAUSTED;
    }
    return n;
}

static void
model_begin_part(world_t *world, model_part_t *part)
{
    model_chunk_t *chunk = chunk_of(world, part->named.chunk);
    bool copy            = tail_is_shared(world, chunk);

    for (uint32_t t = 0; t < part->named.n_new; t++) {
        part->values[t] = world->next_value++;
    }
    if (part->named.n_new == 0) {
        chunk->named += chunk->live; /* what is not there is not held */
        return;
    }
    chunk->named++;
    chunk->n_seen = pages_for(world, part->named.length + part->named.n_new);
    for (uint32_t i = 0; i < chunk->n_seen; i++) {
        bool own       = chunk->live && i < chunk->n_pages && !(copy && i + 1 == chunk->n_pages);
        chunk->seen[i] = own ? chunk->pages[i] : world->next_serial++;
    }
    chunk->appended = true;
}

static void
model_begin(world_t *world, model_step_t *step)
{
    for (uint32_t e = 0; e < step->n_entries; e++) {
        for (uint32_t p = 0; p < step->entries[e].n_parts; p++) {
            model_begin_part(world, &step->entries[e].parts[p]);
        }
    }
    step->progress = BEGUN;
}

static attn_status_t
call_begin(world_t *world, model_step_t *step, uint64_t step_id)
{
    kv_step_entry_t entries[ENTRIES_MAX];
    kv_step_chunk_t chunks[ENTRIES_MAX][PARTS_MAX];

    for (uint32_t e = 0; e < step->n_entries; e++) {
        const model_entry_t *entry = &step->entries[e];
        for (uint32_t p = 0; p < entry->n_parts; p++) {
            chunks[e][p] = entry->parts[p].named;
        }
        entries[e] = (kv_step_entry_t){entry->seq, entry->n_parts, chunks[e], entry->n_spare};
    }
    attn_status_t status =
        kv_step_begin(store, world->cache, step_id, entries, step->n_entries, &step->step);
    memset(entries, 0x77, sizeof(entries)); /* the caller's copy is not needed any more */
    memset(chunks, 0x77, sizeof(chunks));
    return status;
}

static void
op_begin(world_t *world)
{
    attn_status_t wrong[ENTRIES_MAX * (2 + PARTS_MAX * 4) + ENTRIES_MAX];
    static model_step_t request;
    uint32_t s       = pick(STEPS);
    uint64_t step_id = world->cache * 100 + s + 1;

    request.step = NULL;
    make_request(world, &request);
    if (world->steps[s].step != NULL) {
        CHECK(kv_step_find(store, step_id) == world->steps[s].step);
        CHECK(call_begin(world, &request, step_id) == ATTN_ERR_EXISTS);
        return;
    }
    uint32_t n_wrong     = predict_begin(world, &request, wrong);
    attn_status_t status = call_begin(world, &request, step_id);
    CHECK(is_in(status, wrong, n_wrong));
    seen.exhausted += status == ATTN_ERR_EXHAUSTED;
    seen.busy += status == ATTN_ERR_BUSY;
    seen.stale += status == ATTN_ERR_STALE;
    if (status == ATTN_OK) {
        CHECK(kv_step_find(store, step_id) == request.step);
        seen.begun++;
        seen.copies += request.n_copies;
        world->steps[s] = request;
        model_begin(world, &world->steps[s]);
    }
}

/* ---- open steps ---- */

static void
advance(world_t *world, model_step_t *step)
{
    if (step->progress == BEGUN) {
        do_poison(world, step);
        do_copies(world, step);
        step->progress = COPIED;
    } else if (step->progress == COPIED) {
        do_writes(world, step);
        step->progress = WRITTEN;
    }
}

static void
model_end_part(world_t *world, const model_part_t *part, uint32_t n)
{
    model_chunk_t *chunk = chunk_of(world, part->named.chunk);

    if (part->named.n_new == 0) {
        chunk->named -= part->named.generation > 0;
        return;
    }
    chunk->named--;
    chunk->appended = false;
    if (n == 0) {
        return;
    }
    memcpy(chunk->tokens + part->named.length, part->values, n * sizeof(*part->values));
    chunk->length  = part->named.length + n;
    chunk->n_pages = pages_for(world, chunk->length);
    memcpy(chunk->pages, chunk->seen, chunk->n_pages * sizeof(*chunk->seen));
    chunk->generation = chunk->live ? chunk->generation : 1;
    chunk->live       = true;
}

static void
model_end(world_t *world, model_step_t *step, const uint32_t *accepted)
{
    for (uint32_t e = 0; e < step->n_entries; e++) {
        uint32_t left = accepted[e];
        for (uint32_t p = 0; p < step->entries[e].n_parts; p++) {
            const model_part_t *part = &step->entries[e].parts[p];
            uint32_t n               = left < part->named.n_new ? left : part->named.n_new;
            model_end_part(world, part, n);
            left -= n;
        }
    }
    step->step = NULL;
}

static void
commit(world_t *world, model_step_t *step)
{
    uint32_t accepted[ENTRIES_MAX] = {0};
    bool all = chance(30), too_many = false;

    while (step->progress != WRITTEN) {
        advance(world, step);
    }
    check_step_content(world, step);
    for (uint32_t e = 0; e < step->n_entries; e++) {
        uint32_t n_new = 0;
        for (uint32_t p = 0; p < step->entries[e].n_parts; p++) {
            n_new += step->entries[e].parts[p].named.n_new;
        }
        accepted[e] = all ? n_new : pick(n_new + 1);
        seen.partial += accepted[e] < n_new;
        if (!all && chance(3)) {
            accepted[e] = n_new + 1;
            too_many    = true;
        }
    }
    attn_status_t status = kv_step_commit(store, step->step, all ? NULL : accepted);
    CHECK(status == (too_many ? ATTN_ERR_INVALID : ATTN_OK));
    if (status == ATTN_OK) {
        model_end(world, step, accepted);
    }
}

static void
op_step(world_t *world)
{
    static const uint32_t none[ENTRIES_MAX];
    model_step_t *step = &world->steps[pick(STEPS)];

    if (step->step == NULL) {
        return;
    }
    if (chance(40)) {
        advance(world, step);
    } else if (chance(70)) {
        commit(world, step);
    } else {
        kv_step_abort(store, step->step);
        model_end(world, step, none);
        seen.aborted++;
    }
}

/* ---- chunks ---- */

static void
op_fork(world_t *world)
{
    uint64_t from = 1 + pick(CHUNKS), to = 1 + pick(CHUNKS);
    model_chunk_t *source = chunk_of(world, from), *chunk = chunk_of(world, to);
    uint32_t length = source->live ? pick(source->length + 1) : 0;
    attn_status_t wrong[3];
    uint32_t n_wrong = 0;

    if (chance(40)) {
        length = source->live ? source->length : 0;
    } else if (chance(3)) {
        length = source->length + 1;
    }
    if (!source->live) {
        wrong[n_wrong++] = ATTN_ERR_NOT_FOUND;
    }
    if (source->live && length > source->length) {
        wrong[n_wrong++] = ATTN_ERR_INVALID;
    }
    if (chunk->live || chunk->appended) {
        wrong[n_wrong++] = ATTN_ERR_EXISTS;
    }
    attn_status_t status = kv_chunk_fork(store, world->cache, from, length, to);
    CHECK(is_in(status, wrong, n_wrong));
    if (status == ATTN_OK) {
        seen.forks_in_step += source->appended;
        *chunk            = *source;
        chunk->generation = 1;
        chunk->length     = length;
        chunk->n_pages    = pages_for(world, length);
        chunk->named      = 0;
        chunk->appended   = false;
    }
}

static void
op_truncate(world_t *world)
{
    uint64_t id          = 1 + pick(CHUNKS);
    model_chunk_t *chunk = chunk_of(world, id);
    uint32_t length      = chunk->live ? pick(chunk->length + 1) : 0;
    uint32_t generation = chunk->generation + chance(5), now = 0;
    attn_status_t wrong[4];
    uint32_t n_wrong = 0;

    if (chance(5)) {
        length = chunk->length + 1;
    }
    if (!chunk->live && !chunk->appended) {
        wrong[n_wrong++] = ATTN_ERR_NOT_FOUND;
    } else {
        if (chunk->named > 0) {
            wrong[n_wrong++] = ATTN_ERR_BUSY;
        }
        if (generation != chunk->generation) {
            wrong[n_wrong++] = ATTN_ERR_STALE;
        }
        if (length > chunk->length) {
            wrong[n_wrong++] = ATTN_ERR_INVALID;
        }
    }
    attn_status_t status = kv_chunk_truncate(store, world->cache, id, generation, length, &now);
    CHECK(is_in(status, wrong, n_wrong));
    if (status == ATTN_OK) {
        chunk->generation++;
        chunk->length  = length;
        chunk->n_pages = pages_for(world, length);
        CHECK(now == chunk->generation);
    }
}

static void
op_release(world_t *world)
{
    uint64_t id          = 1 + pick(CHUNKS);
    model_chunk_t *chunk = chunk_of(world, id);
    bool there           = chunk->live || chunk->appended;

    attn_status_t status = kv_chunk_release(store, world->cache, id);
    CHECK(status == (!there ? ATTN_ERR_NOT_FOUND : chunk->named > 0 ? ATTN_ERR_BUSY : ATTN_OK));
    if (status == ATTN_OK) {
        chunk->live = false;
    }
}

/* ---- the run ---- */

static void
open_worlds(void)
{
    static const struct {
        uint32_t page_size, chunk_size, n_pages;
    } shapes[WORLDS] = {{1, 12, 60}, {3, 10, 30}, {16, 64, 24}, {256, 300, 14}};

    CHECK(kv_store_create(1 << 20, &store) == ATTN_OK);
    for (uint32_t w = 0; w < WORLDS; w++) {
        world_t *world = &worlds[w];
        kv_region_info_t info;
        memset(world, 0, sizeof(*world));
        world->cache      = w + 1;
        world->page_size  = shapes[w].page_size;
        world->chunk_size = shapes[w].chunk_size;
        world->n_pages    = shapes[w].n_pages;
        world->next_value = 1 + w * 100000000;
        world->memory     = calloc(world->n_pages * world->page_size, sizeof(*world->memory));
        assert_non_null(world->memory);
        CHECK(kv_region_open(store, world->cache, 4096, world->page_size, world->chunk_size,
                             world->n_pages * UINT64_C(4096), &info) == ATTN_OK);
        CHECK(info.n_pages == world->n_pages);
    }
}

static void
close_world(world_t *world)
{
    kv_region_info_t info;

    for (uint32_t s = 0; s < STEPS; s++) {
        if (world->steps[s].step != NULL) {
            CHECK(kv_region_close(store, world->cache) == ATTN_ERR_BUSY);
            kv_step_abort(store, world->steps[s].step);
        }
    }
    for (uint32_t c = 0; c < CHUNKS; c++) {
        attn_status_t status = kv_chunk_release(store, world->cache, c + 1);
        CHECK(status == (world->chunks[c].live ? ATTN_OK : ATTN_ERR_NOT_FOUND));
    }
    CHECK(kv_region_describe(store, world->cache, &info) == ATTN_OK);
    CHECK(info.free_pages == world->n_pages && info.chunks == 0 && info.shared_pages == 0);
    CHECK(kv_region_close(store, world->cache) == ATTN_OK);
    CHECK(kv_store_check(store) == ATTN_OK);
    free(world->memory);
}

static void
run(void)
{
    open_worlds();
    for (test_op = 0; test_op < OPERATIONS; test_op++) {
        world_t *world = &worlds[pick(WORLDS)];
        uint32_t what  = pick(100);
        if (what < 35) {
            op_begin(world);
        } else if (what < 75) {
            op_step(world);
        } else if (what < 85) {
            op_fork(world);
        } else if (what < 90) {
            op_truncate(world);
        } else {
            op_release(world);
        }
        CHECK(kv_store_check(store) == ATTN_OK);
        check_numbers(world);
        if (test_op % 8 == 0) {
            check_content(world);
        }
    }
    for (uint32_t w = 0; w < WORLDS; w++) {
        check_content(&worlds[w]);
        close_world(&worlds[w]);
    }
    kv_store_destroy(store);
}

static void
test_random_operations_agree_with_a_model(void **state)
{
    (void)state;
    memset(&seen, 0, sizeof(seen));
    for_each_seed(SEEDS, run);
    print_message("begun %llu, copies %llu, exhausted %llu, busy %llu, stale %llu, forks of a "
                  "chunk in a step %llu, partial %llu, aborted %llu\n",
                  (unsigned long long)seen.begun, (unsigned long long)seen.copies,
                  (unsigned long long)seen.exhausted, (unsigned long long)seen.busy,
                  (unsigned long long)seen.stale, (unsigned long long)seen.forks_in_step,
                  (unsigned long long)seen.partial, (unsigned long long)seen.aborted);
    assert_true(seen.begun > 100 && seen.copies > 100 && seen.exhausted > 100);
    assert_true(seen.busy > 100 && seen.stale > 10 && seen.forks_in_step > 100);
    assert_true(seen.partial > 100 && seen.aborted > 100);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_random_operations_agree_with_a_model),
    };
    return cmocka_run_group_tests_name("kvstore.kvstore_model", tests, NULL, NULL);
}
