/* test_directory.h: a directory whose effects are kept, for the tests of this folder. */
#ifndef ATTN_BALANCER_TEST_DIRECTORY_H
#define ATTN_BALANCER_TEST_DIRECTORY_H

#include "balancer/directory.h"
#include "base/clock.h"
#include "base/status.h"

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHUNK 256u
#define PAGE 16u
#define CHUNK_PAGES (CHUNK / PAGE)

typedef struct fixture {
    directory_t *directory;
    uint64_t now_ns;
    dir_effect_t effects[4096];
    uint32_t n_effects;
} fixture_t;

static inline void
keep_effect(void *arg, const dir_effect_t *effect)
{
    fixture_t *f = arg;

    assert_true(f->n_effects < sizeof(f->effects) / sizeof(f->effects[0]));
    f->effects[f->n_effects++] = *effect;
}

static inline void
fixture_open(fixture_t *f, uint64_t break_even_tokens)
{
    directory_options_t options;

    memset(f, 0, sizeof(*f));
    f->now_ns = 1000;
    directory_options_init(&options);
    options.break_even_tokens = break_even_tokens;
    assert_int_equal(directory_create(&options, keep_effect, f, &f->directory), ATTN_OK);
}

static inline void
fixture_close(fixture_t *f)
{
    assert_int_equal(seq_table_check(directory_sequences(f->directory)), ATTN_OK);
    directory_destroy(f->directory);
}

static inline dir_worker_t
hello_of(uint32_t port, uint64_t incarnation)
{
    dir_worker_t hello = {
        .incarnation = incarnation, .slab_bytes = 1 << 20, .speed.read_bandwidth = 1e10};

    snprintf(hello.address, sizeof(hello.address), "10.0.0.1:%u", port);
    snprintf(hello.kind, sizeof(hello.kind), "cpu-avx2/1/128");
    return hello;
}

/* A worker at an address of its own. */
static inline uint32_t
join(fixture_t *f, uint32_t port)
{
    dir_worker_t hello = hello_of(port, 1000 + port);
    uint32_t id        = 0;

    assert_int_equal(directory_worker_join(f->directory, &hello, f->now_ns, &id), ATTN_OK);
    return id;
}

static inline attn_geometry_t
small_geometry(attn_placement_t placement)
{
    return (attn_geometry_t){
        .size       = sizeof(attn_geometry_t),
        .layers     = 2,
        .q_heads    = 4,
        .kv_heads   = 2,
        .head_dim_k = 64,
        .head_dim_v = 32,
        .kv_dtype   = ATTN_F16,
        .page_size  = PAGE,
        .chunk_size = CHUNK,
        .placement  = placement,
    };
}

static inline uint64_t
open_cache(fixture_t *f, uint32_t client, const char *name, attn_placement_t placement)
{
    attn_geometry_t geometry = small_geometry(placement);
    uint64_t cache           = 0;
    bool created;

    assert_int_equal(directory_cache_open(f->directory, client, name, &geometry, &cache, &created),
                     ATTN_OK);
    return cache;
}

static inline attn_seq_t
make_seq(fixture_t *f, uint64_t cache, uint32_t client, uint64_t expected_tokens)
{
    attn_seq_t seq = {0};

    assert_int_equal(directory_seq_create(f->directory, cache, client, expected_tokens, &seq),
                     ATTN_OK);
    return seq;
}

static inline uint32_t
n_chunks_of(fixture_t *f, attn_seq_t seq)
{
    seq_info_t info;

    assert_int_equal(seq_describe(directory_sequences(f->directory), seq, &info), ATTN_OK);
    return info.n_chunks;
}

/* The owner of chunk i; 0 if there is no such chunk. */
static inline uint32_t
owner_of(fixture_t *f, attn_seq_t seq, uint32_t i)
{
    const seq_chunk_t *chunk = seq_chunk_at(directory_sequences(f->directory), seq, i);
    return chunk ? chunk->worker : 0;
}

/* The id of chunk i. */
static inline uint64_t
chunk_of(fixture_t *f, attn_seq_t seq, uint32_t i)
{
    const seq_chunk_t *chunk = seq_chunk_at(directory_sequences(f->directory), seq, i);

    assert_non_null(chunk);
    return chunk->id;
}

static inline void
assert_effect(const fixture_t *f, uint32_t i, dir_effect_type_t type, uint32_t worker,
              uint64_t cache, uint64_t chunk)
{
    assert_true(i < f->n_effects);
    assert_int_equal(f->effects[i].type, type);
    assert_int_equal(f->effects[i].worker, worker);
    assert_int_equal(f->effects[i].cache, cache);
    assert_int_equal(f->effects[i].chunk, chunk);
}

static inline void
assert_sentence(const char *words)
{
    if (!strstr(attn_last_error(), words)) {
        fail_msg("\"%s\" lacks \"%s\"", attn_last_error(), words);
    }
}

#endif
