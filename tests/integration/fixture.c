#include "tests/integration/fixture.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

#define NOTICED_MS 8000u /* that a worker is lost */

void
fixture_open(fixture_t *f, const cluster_options_t *options, uint32_t timeout_ms, uint64_t seed)
{
    attn_geometry_t geometry;

    cluster_up(&f->cluster, options);
    f->client = open_client(f->cluster.coordinator.address, timeout_ms);
    model_geometry(&geometry);
    OK(attn_cache_open(f->client, "cache", &geometry, &f->cache));
    model_init(&f->model, f->cache, seed);
}

void
fixture_close(fixture_t *f)
{
    model_free(&f->model);
    attn_cache_close(f->cache);
    attn_client_close(f->client);
}

void
fixture_down(fixture_t *f)
{
    fixture_close(f);
    cluster_down(&f->cluster);
}

/* The worker at this address, or of this id; id 0: none. */
static attn_worker_info_t
worker_of(attn_client_t *client, const char *address, uint32_t id)
{
    attn_cluster_info_t info;
    attn_worker_info_t found = {0};

    OK(attn_cluster_describe(client, &info));
    for (uint32_t w = 0; w < info.n_workers; w++) {
        if (address != NULL ? strcmp(info.workers[w].address, address) == 0
                            : info.workers[w].id == id) {
            found = info.workers[w];
        }
    }
    attn_cluster_info_free(&info);
    return found;
}

process_t *
fixture_owner(fixture_t *f, uint32_t s, uint32_t i)
{
    attn_seq_info_t info;

    OK(attn_seq_describe(f->cache, f->model.seqs[s].seq, &info));
    assert_true(i < info.n_chunks);
    attn_worker_info_t worker = worker_of(f->client, NULL, info.chunks[i].worker);
    process_t *owner          = cluster_worker_at(&f->cluster, worker.address);
    attn_seq_info_free(&info);
    assert_non_null(owner);
    return owner;
}

uint32_t
fixture_worker_id(fixture_t *f, const char *address)
{
    return worker_of(f->client, address, 0).id;
}

void
fixture_await_lost(fixture_t *f, const char *address)
{
    uint64_t end = now_ms() + NOTICED_MS;

    while (worker_of(f->client, address, 0).alive) {
        assert_true(now_ms() < end);
        sleep_ms(20);
    }
}
