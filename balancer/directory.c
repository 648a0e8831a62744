/*
 * The directory's life and its clockwork. Everything is in memory and soft: what a chunk
 * holds is the workers' truth, so a directory that starts anew starts empty, with an epoch
 * above any that was given out before.
 */
#include "balancer/directory_int.h"
#include "base/clock.h"
#include "base/status.h"

#include <assert.h>

#define LOST_NS_DEFAULT (2000 * ATTN_NS_PER_MS)
#define LEASE_NS_DEFAULT (30000 * ATTN_NS_PER_MS)

void
directory_options_init(directory_options_t *options)
{
    *options = (directory_options_t){
        .lost_ns     = LOST_NS_DEFAULT,
        .lease_ns    = LEASE_NS_DEFAULT,
        .first_epoch = 1,
    };
}

attn_status_t
directory_create(const directory_options_t *options, dir_effect_fn effect, void *arg,
                 directory_t **directory_p)
{
    directory_t *directory = calloc(1, sizeof(*directory));
    attn_status_t status;

    assert(effect);
    if (!directory) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a directory");
    }
    directory->options     = *options;
    directory->effect      = effect;
    directory->effect_arg  = arg;
    directory->epoch       = options->first_epoch;
    directory->next_worker = 1;
    directory->next_client = 1 + (uint32_t)seq_first_id(options->id_seed, 3, 31);
    directory->next_cache  = 1 + seq_first_id(options->id_seed, 4, 62);
    cost_constants_init(&directory->cost);
    directory->cost_version = 1;

    directory->workers = calloc(DIR_WORKERS_MAX, sizeof(*directory->workers));
    if (!directory->workers) {
        free(directory);
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a directory of %u workers",
                         DIR_WORKERS_MAX);
    }
    status = seq_table_create(options->id_seed, &directory->sequences);
    if (status) {
        free(directory->workers);
        free(directory);
        return status;
    }
    *directory_p = directory;
    return ATTN_OK;
}

void
directory_destroy(directory_t *directory)
{
    dir_client_t *client, *next_client;
    dir_cache_entry_t *cache, *next_cache;

    if (!directory) {
        return;
    }
    HASH_ITER(hh, directory->clients, client, next_client)
    {
        HASH_DEL(directory->clients, client);
        free(client->opens);
        free(client);
    }
    HASH_CLEAR(hh_name, directory->by_name);
    HASH_ITER(hh_id, directory->by_id, cache, next_cache)
    {
        HASH_DELETE(hh_id, directory->by_id, cache);
        free(cache->spots);
        free(cache->table);
        free(cache);
    }
    free(directory->nobody.opens);
    seq_table_destroy(directory->sequences);
    free(directory->workers);
    free(directory);
}

uint64_t
directory_epoch(const directory_t *directory)
{
    return directory->epoch;
}

const seq_table_t *
directory_sequences(const directory_t *directory)
{
    return directory->sequences;
}

static bool
is_silent(uint64_t seen_ns, uint64_t now_ns, uint64_t limit_ns)
{
    return now_ns > seen_ns && now_ns - seen_ns >= limit_ns;
}

const dir_counts_t *
directory_counts(const directory_t *directory)
{
    return &directory->counts;
}

void
directory_tick(directory_t *directory, uint64_t now_ns)
{
    dir_client_t *client, *next;
    bool leaving = false;

    for (uint32_t i = 0; i < directory->n_workers; i++) {
        const dir_worker_t *worker = &directory->workers[i];
        if (worker->alive && is_silent(worker->seen_ns, now_ns, directory->options.lost_ns)) {
            directory_worker_lose(directory, worker->id);
        }
    }
    HASH_ITER(hh, directory->clients, client, next)
    {
        client->leaving = is_silent(client->seen_ns, now_ns, directory->options.lease_ns);
        leaving |= client->leaving;
        directory->counts.leases_expired += client->leaving;
    }
    if (leaving) {
        dir_sweep(directory); /* one pass over the sequences for all clients that went together */
    }
}
