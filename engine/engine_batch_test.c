/*
 * engine_batch_test.c: every rule that a batch must keep, broken one at a time, and then fields
 * with anything in them. What is refused changes nothing.
 */
#include "engine/test_engine.h"

/* Two entries, dense and sparse; the second one over the end of a chunk. */
typedef struct fixture {
    world_t w;
    sequence_t a, b;
    ask_t asks[2];
    uint32_t indptr[3], pages[8]; /* of the second entry */
    built_t step;
    kv_step_chunk_t many[4200];
    attn_node_t many_nodes[CHUNKS_MAX + 600];
    figures_t before;
} fixture_t;

static void
fixture_build(fixture_t *f)
{
    static const uint32_t indptr[] = {0, 3, 5}, pages[] = {0, 5, 31, 2, 30};

    memcpy(f->indptr, indptr, sizeof(indptr));
    memcpy(f->pages, pages, sizeof(pages));
    f->asks[0] = (ask_t){.seq = &f->a, .base = 300, .n_q = 5, .n_new = 5};
    f->asks[1] = (ask_t){.seq     = &f->b,
                         .base    = 500,
                         .n_q     = 2,
                         .n_new   = 20,
                         .n_lists = 2,
                         .indptr  = f->indptr,
                         .pages   = f->pages};
    build(&f->step, &f->w, f->asks, 2, ALL_CHUNKS);
}

static int
setup(void **state)
{
    fixture_t *f = calloc(1, sizeof(*f));

    world_open(&f->w, &plain_geometry, 1);
    sequence_init(&f->w, &f->a);
    sequence_init(&f->w, &f->b);
    append(&f->w, &f->a, 300);
    append(&f->w, &f->b, 500);
    fixture_build(f);
    f->before = figures_of(&f->w, &f->a, &f->b);
    *state    = f;
    return 0;
}

static int
teardown(void **state)
{
    fixture_t *f = *state;

    sequence_free(&f->a);
    sequence_free(&f->b);
    world_close(&f->w);
    free(f);
    return 0;
}

static void
unchanged(fixture_t *f)
{
    figures_t after = figures_of(&f->w, &f->a, &f->b);

    assert_memory_equal(&after, &f->before, sizeof(after));
    OK(engine_check(f->w.engine));
}

/* The step as it stands is refused so; then a fresh one is built. */
static void
refused(fixture_t *f, attn_status_t status, const char *text)
{
    engine_sizes_t sizes;

    FAILS(engine_step_begin(f->w.engine, &f->step.batch, &sizes), status, text);
    unchanged(f);
    fixture_build(f);
}

static void
taken(fixture_t *f)
{
    OK(engine_step_begin(f->w.engine, &f->step.batch, &f->step.sizes));
    OK(engine_step_abort(f->w.engine, f->step.batch.step_id, "enough"));
    unchanged(f);
    fixture_build(f);
}

/* Set one field and see the refusal. */
#define REFUSED(field, value, status, text)                                                        \
    do {                                                                                           \
        f->step.field = (value);                                                                   \
        refused(f, (status), (text));                                                              \
    } while (0)

#define INVALID(field, value, text) REFUSED(field, value, ATTN_ERR_INVALID, text)

static void
test_fields_of_the_batch(void **state)
{
    fixture_t *f = *state;

    taken(f);
    INVALID(batch.step_id, 0, "step_id");
    INVALID(batch.n, 0, "0 entries");
    INVALID(batch.n, ATTN_KV_ENTRIES_MAX + 1, "4097 entries");
    INVALID(batch.n, UINT32_MAX, "entries");
    INVALID(batch.q_dtype, ATTN_DTYPE_NONE, "q_dtype 0");
    INVALID(batch.q_dtype, (attn_dtype_t)4, "q_dtype 4");
    INVALID(batch.o_dtype, ATTN_DTYPE_NONE, "o_dtype 0");
    INVALID(batch.o_dtype, (attn_dtype_t)-1, "o_dtype -1");
    REFUSED(batch.cache, 78, ATTN_ERR_NOT_FOUND, "no cache 78");
    REFUSED(batch.cache, 0, ATTN_ERR_NOT_FOUND, "no cache 0");
    taken(f);
}

static void
test_positions_and_counts(void **state)
{
    fixture_t *f = *state;

    INVALID(entries[1].base, UINT64_MAX, "entry 1: base");
    INVALID(entries[1].base, UINT64_MAX - 19, "entry 1: base");
    INVALID(entries[1].base, UINT64_C(1) << 62, "entry 1: base");
    INVALID(entries[0].base, 301, "entry 0: chunk");
    INVALID(entries[0].base, 299, "entry 0: chunk");
    INVALID(entries[0].base, 0, "entry 0: chunk");
    INVALID(entries[0].n_new, UINT32_MAX, "entry 0: chunk");
    INVALID(entries[0].n_new, 6, "entry 0: chunk"); /* who stores the sixth? */
    INVALID(entries[0].n_new, 4, "entry 0: chunk");
    INVALID(entries[0].n_q, 306, "entry 0: n_q is 306");
    INVALID(entries[1].n_q, UINT32_MAX, "entry 1: n_q");
    f->step.entries[0].n_q = 305; /* every position asks */
    taken(f);
}

static void
test_chunks(void **state)
{
    fixture_t *f = *state;

    INVALID(chunks[0][1].number, 0, "entry 0: chunk numbers must ascend");
    f->step.chunks[1][2].number = 1;
    refused(f, ATTN_ERR_INVALID, "entry 1: chunk numbers must ascend: 1 after 1");
    INVALID(chunks[0][1].length, 257, "exceed chunk_size 256");
    INVALID(chunks[0][1].length, UINT32_MAX, "exceed chunk_size 256");
    INVALID(chunks[0][1].n_new, 213, "exceed chunk_size 256");
    INVALID(chunks[0][1].n_new, UINT32_MAX, "exceed chunk_size 256");
    INVALID(chunks[0][1].n_new, 6, "entry 0: chunk");
    INVALID(chunks[0][1].n_new, 4, "entry 0: chunk");
    INVALID(chunks[0][1].length, 43, "entry 0: chunk");
    INVALID(chunks[0][1].number, 2, "entry 0: chunk");
    INVALID(chunks[0][1].number, UINT32_MAX, "entry 0: chunk");
    INVALID(chunks[1][1].n_new, 11, "entry 1: chunk"); /* a gap before the next chunk's */
    INVALID(chunks[1][2].length, 3, "entry 1: chunk");
    INVALID(chunks[0][0].length, 255, "255 of the 256 tokens");
    INVALID(chunks[0][0].length, 0, "0 of the 256 tokens");
    INVALID(entries[0].n_chunks, 0, "entry 0: n_q is 5, but no chunk");
    INVALID(entries[0].n_chunks, 1, "asks for O over 305 tokens, but the chunks named hold 256");
    INVALID(entries[1].n_chunks, 2, "asks for O over 520 tokens, but the chunks named hold 512");
    f->step.entries[0].n_q      = 0;
    f->step.entries[0].n_chunks = 0; /* only held */
    taken(f);
    /* A query over a prefix may name chunks behind it: they are not seen. */
    f->step.entries[0].base  = 200;
    f->step.entries[0].n_new = f->step.chunks[0][1].n_new = 0;
    taken(f);
}

/* Without queries, too, every new token has its place. */
static void
test_chunks_of_entries_that_only_append(void **state)
{
    fixture_t *f = *state;

    for (int round = 0; round < 7; round++) {
        f->step.entries[0].n_q = f->step.entries[1].n_q = 0;
        switch (round) {
        case 0:
            f->step.chunks[0][1].n_new = 4;
            break;
        case 1:
            f->step.chunks[0][1].n_new = 6;
            break;
        case 2:
            f->step.chunks[0][1].number = 2;
            break;
        case 3:
            f->step.chunks[0][1].length = 43;
            break;
        case 4:
            f->step.chunks[0][1].length = 0;
            break;
        case 5:
            f->step.entries[0].base = 299;
            break;
        case 6:
            f->step.chunks[1][1].n_new = 11;
            break;
        }
        refused(f, ATTN_ERR_INVALID,
                round < 6 ? "entry 0: chunk 1002: its new" : "entry 1: chunk 1011: its new");
    }
    f->step.entries[0].n_q = f->step.entries[1].n_q = 0;
    taken(f);
}

/* Rules that the store has: refused all the same, and nothing is left. */
static void
test_what_the_store_refuses(void **state)
{
    fixture_t *f = *state;

    INVALID(entries[1].seq, f->a.id, "named twice");
    INVALID(chunks[1][2].chunk, f->a.chunk[1], "named twice");
    REFUSED(chunks[0][0].chunk, f->b.chunk[1], ATTN_ERR_STALE, "length 244");
    REFUSED(chunks[0][1].generation, 0, ATTN_ERR_STALE, "generation");
    REFUSED(chunks[0][1].generation, UINT32_MAX, ATTN_ERR_STALE, "generation");
    REFUSED(chunks[0][0].generation, 7, ATTN_ERR_STALE, "generation");
    REFUSED(chunks[1][2].generation, 1, ATTN_ERR_NOT_FOUND, "not here");
    REFUSED(chunks[0][1].chunk, 5, ATTN_ERR_NOT_FOUND, "not here");
}

static void
test_sparse_lists(void **state)
{
    fixture_t *f = *state;

    INVALID(entries[1].n_lists, 3, "entry 1: sparse has 3 lists");
    INVALID(entries[1].n_lists, UINT32_MAX, "entry 1: sparse has");
    f->indptr[0] = 1;
    refused(f, ATTN_ERR_INVALID, "entry 1: sparse list 0");
    f->indptr[1] = 6;
    refused(f, ATTN_ERR_INVALID, "entry 1: sparse list");
    f->indptr[2] = 2;
    refused(f, ATTN_ERR_INVALID, "entry 1: sparse list 1 has a negative length");
    f->pages[1] = 0;
    refused(f, ATTN_ERR_INVALID, "entry 1: sparse list 0: page 0");
    f->pages[4] = 1;
    refused(f, ATTN_ERR_INVALID, "entry 1: sparse list 1: page 1");
    f->pages[4] = 48; /* 520 tokens: chunks 0 to 2 of 16 pages each */
    refused(f, ATTN_ERR_INVALID, "entry 1: sparse list 1: page 48");
    f->pages[2] = UINT32_MAX;
    refused(f, ATTN_ERR_INVALID, "entry 1: sparse list 0: page 4294967295");
    f->pages[4] = 47; /* of a chunk that is there, though no token is */
    taken(f);
    f->step.entries[1].n_lists = 1;
    taken(f);
    f->indptr[1] = f->indptr[2] = 0;
    taken(f);
}

static void
set_nodes(fixture_t *f, uint32_t n, attn_node_t first, attn_node_t second)
{
    f->step.entries[0].n_nodes = n;
    f->step.nodes[0][0]        = first;
    f->step.nodes[0][1]        = second;
}

static void
test_nodes(void **state)
{
    fixture_t *f           = *state;
    const attn_node_t root = {32, 0}, none = {0, 0};
    const attn_node_t zero = {0, attn_tree_key(0)}, one = {0, attn_tree_key(1)};
    const attn_node_t left = {31, 0}, right = {31, 1};

    set_nodes(f, 1, root, none);
    taken(f);
    set_nodes(f, 2, zero, one);
    taken(f);
    set_nodes(f, 2, left, right);
    taken(f);
    set_nodes(f, 1, (attn_node_t){33, 0}, none);
    refused(f, ATTN_ERR_INVALID, "entry 0: node 0 (level 33, index 0)");
    set_nodes(f, 1, (attn_node_t){UINT32_MAX, 0}, none);
    refused(f, ATTN_ERR_INVALID, "entry 0: node 0");
    set_nodes(f, 1, (attn_node_t){32, 1}, none);
    refused(f, ATTN_ERR_INVALID, "entry 0: node 0");
    set_nodes(f, 1, (attn_node_t){1, UINT32_MAX}, none);
    refused(f, ATTN_ERR_INVALID, "entry 0: node 0");
    set_nodes(f, 2, one, zero);
    refused(f, ATTN_ERR_INVALID, "entry 0: node 1");
    set_nodes(f, 2, root, root);
    refused(f, ATTN_ERR_INVALID, "entry 0: node 1");
    set_nodes(f, 2, root, one);
    refused(f, ATTN_ERR_INVALID, "entry 0: node 1");
    set_nodes(f, 2, zero, root);
    refused(f, ATTN_ERR_INVALID, "entry 0: node 1");
    set_nodes(f, 1, zero, none);
    refused(f, ATTN_ERR_INVALID, "entry 0: chunk number 1 is below none");
    set_nodes(f, 1, right, none);
    refused(f, ATTN_ERR_INVALID, "entry 0: chunk number 0 is below none");
}

/* ---- sizes ---- */

/* One entry over many tokens of which chunk 0 lies here. */
static void
make_long(fixture_t *f, uint64_t base, uint32_t n_q)
{
    f->step.batch.n     = 1;
    f->step.entries[0]  = (engine_entry_t){.seq      = f->a.id,
                                           .base     = base,
                                           .n_q      = n_q,
                                           .n_chunks = 1,
                                           .chunks   = f->step.chunks[0],
                                           .n_nodes  = 1,
                                           .nodes    = f->step.nodes[0]};
    f->step.nodes[0][0] = (attn_node_t){0, 0};
}

static void
test_sizes(void **state)
{
    fixture_t *f = *state;

    make_long(f, 1u << 22, 1);
    taken(f);
    make_long(f, 1u << 22, ENGINE_ROWS_MAX + 1);
    refused(f, ATTN_ERR_TOO_LARGE, "query rows");
    make_long(f, UINT32_MAX, UINT32_MAX);
    refused(f, ATTN_ERR_TOO_LARGE, "query rows");
    make_long(f, (UINT64_C(1) << 31) + 5, 1); /* passes here; a plan has a limit of its own */
    refused(f, ATTN_ERR_TOO_LARGE, "entry 0");

    /* An answer above 1 GiB: states of 136 bytes, 4 heads, 601 nodes. */
    make_long(f, 1u << 22, 4096);
    f->step.entries[0].nodes   = f->many_nodes;
    f->step.entries[0].n_nodes = 601;
    for (uint32_t i = 0; i < 601; i++) {
        f->many_nodes[i] = (attn_node_t){0, i};
    }
    refused(f, ATTN_ERR_TOO_LARGE, "1 GiB");

    /* More new tokens than a step may have, over chunks that are all to be made. */
    f->step.batch.n = 1;
    f->step.entries[0] =
        (engine_entry_t){.seq = f->a.id, .n_new = 4097 * 256, .n_chunks = 4097, .chunks = f->many};
    for (uint32_t c = 0; c < 4097; c++) {
        f->many[c] = (kv_step_chunk_t){.chunk = 1000000 + c, .n_new = 256, .number = c};
    }
    refused(f, ATTN_ERR_TOO_LARGE, "new tokens");
    f->step.batch.n = 1;
    f->step.entries[0] =
        (engine_entry_t){.seq = f->a.id, .n_new = 4096 * 256, .n_chunks = 4096, .chunks = f->many};
    refused(f, ATTN_ERR_EXHAUSTED, "pages");
}

/* ---- anything ---- */

static uint64_t
any_number(void)
{
    static const uint64_t numbers[] = {0,
                                       1,
                                       2,
                                       3,
                                       5,
                                       12,
                                       31,
                                       32,
                                       33,
                                       244,
                                       256,
                                       257,
                                       300,
                                       305,
                                       500,
                                       512,
                                       520,
                                       UINT32_MAX,
                                       UINT32_MAX - 1,
                                       UINT64_MAX,
                                       UINT64_C(1) << 31,
                                       UINT64_C(1) << 32,
                                       UINT64_C(1) << 40,
                                       UINT64_C(1) << 63};

    return pick(3) == 0 ? random_bits() >> pick(32)
                        : numbers[pick(sizeof(numbers) / sizeof(numbers[0]))];
}

static void
break_something(fixture_t *f)
{
    uint32_t i         = pick(2);
    engine_entry_t *e  = &f->step.entries[i];
    kv_step_chunk_t *c = &f->step.chunks[i][pick(3)];
    attn_node_t *n     = &f->step.nodes[i][pick(4)];
    uint64_t x         = any_number();

    switch (pick(18)) {
    case 0:
        e->base = x;
        break;
    case 1:
        e->n_q = (uint32_t)x;
        break;
    case 2:
        e->n_new = (uint32_t)x;
        break;
    case 3:
        e->n_chunks = (uint32_t)x % 4;
        break;
    case 4:
        e->n_nodes = (uint32_t)x % 4;
        break;
    case 5:
        e->n_lists = i == 1 ? (uint32_t)x % 3 : 0;
        break;
    case 6:
        e->seq = x;
        break;
    case 7:
        c->chunk = pick(2) ? x : f->b.chunk[pick(3)];
        break;
    case 8:
        c->generation = (uint32_t)x;
        break;
    case 9:
        c->length = (uint32_t)x;
        break;
    case 10:
        c->n_new = (uint32_t)x;
        break;
    case 11:
        c->number = (uint32_t)x;
        break;
    case 12:
        n->level = (uint32_t)x;
        break;
    case 13:
        n->index = (uint32_t)x;
        break;
    case 14:
        f->indptr[pick(3)] = (uint32_t)x % 9;
        break;
    case 15:
        f->pages[pick(8)] = (uint32_t)x;
        break;
    case 16:
        f->step.batch.q_dtype = (attn_dtype_t)(x % 5);
        break;
    default:
        f->step.batch.o_dtype = (attn_dtype_t)(x % 5);
        break;
    }
}

/* A batch that was taken is run as it says, with tensors of exactly the sizes that it told. */
static void
run_taken(fixture_t *f)
{
    const engine_sizes_t *s = &f->step.sizes;
    uint64_t id             = f->step.batch.step_id;

    OK(engine_check(f->w.engine));
    if (s->q < 1u << 20 && s->answer < 1u << 24) {
        void *q = calloc(1, s->q + 1), *k = calloc(1, s->k + 1), *v = calloc(1, s->v + 1);
        void *answer = answer_room(&f->step);
        OK(engine_step_run(f->w.engine, id, 1, q, k, v, answer, NULL));
        OK(engine_step_run(f->w.engine, id, 1, q, NULL, NULL, answer, NULL));
        free(q), free(k), free(v), free(answer);
    }
    OK(engine_step_abort(f->w.engine, id, "enough"));
}

static void
test_random_batches_are_taken_or_refused(void **state)
{
    fixture_t *f     = *state;
    uint32_t n_taken = 0, n_refused = 0;

    for (int round = 0; round < 6000; round++) {
        for (uint32_t i = 0, n = 1 + pick(3); i < n; i++) {
            break_something(f);
        }
        attn_status_t status = engine_step_begin(f->w.engine, &f->step.batch, &f->step.sizes);
        if (status == ATTN_OK) {
            n_taken++;
            run_taken(f);
        } else {
            n_refused++;
            assert_true(strlen(attn_last_error()) > 10);
            assert_int_not_equal(status, ATTN_ERR_INTERNAL);
        }
        unchanged(f);
        fixture_build(f);
    }
    assert_true(n_taken > 300 && n_refused > 3000);
    check_content(&f->w, &f->a);
    check_content(&f->w, &f->b);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_fields_of_the_batch, setup, teardown),
        cmocka_unit_test_setup_teardown(test_positions_and_counts, setup, teardown),
        cmocka_unit_test_setup_teardown(test_chunks, setup, teardown),
        cmocka_unit_test_setup_teardown(test_chunks_of_entries_that_only_append, setup, teardown),
        cmocka_unit_test_setup_teardown(test_what_the_store_refuses, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sparse_lists, setup, teardown),
        cmocka_unit_test_setup_teardown(test_nodes, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sizes, setup, teardown),
        cmocka_unit_test_setup_teardown(test_random_batches_are_taken_or_refused, setup, teardown),
    };
    return cmocka_run_group_tests_name("engine_batch", tests, NULL, NULL);
}
