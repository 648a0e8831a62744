/*
 * Constants of the cost model. A sequence may come to be on any of the workers, so the slowest that
 * lives counts, and the slowest way to one. What a client's own runs took on their way there counts
 * in place of what the owner measured: it is the client that waits, and it may have shared memory
 * where the owner has the network.
 */
#include "balancer/directory_int.h"

/* Take over what is known of a link. */
static void
link_take(cost_link_t *into, const cost_link_t *link)
{
    if (!(link->hop_seconds > 0)) {
        return;
    }
    into->hop_seconds = link->hop_seconds;
    into->send_seconds =
        link->send_seconds > 0 ? link->send_seconds : link->hop_seconds / COST_SEND_SHARE;
    if (link->bandwidth > 0) {
        into->bandwidth = link->bandwidth;
    }
}

void
dir_cost_update(directory_t *directory)
{
    cost_constants_t assumed;
    cost_worker_t slowest = {0};
    cost_link_t link      = {0};
    bool told             = false;

    for (uint32_t i = 0; i < directory->n_workers; i++) {
        const dir_worker_t *worker = &directory->workers[i];
        if (worker->alive) {
            cost_worker_slowest(&slowest, &worker->speed);
            cost_link_slowest(&link, &worker->link);
            told = told || worker->speed.read_bandwidth > 0;
        }
    }
    cost_constants_init(&assumed);
    directory->cost.worker = told ? slowest : assumed.worker;
    directory->cost.link   = assumed.link;
    link_take(&directory->cost.link, &link);
    directory->cost_version++;
}

void
directory_worker_link(directory_t *directory, uint32_t id, const cost_link_t *link)
{
    dir_worker_t *worker = dir_worker_find(directory, id);

    if (worker && link->hop_seconds > 0) {
        link_take(&worker->link, link);
        dir_cost_update(directory);
    }
}

void
directory_client_link(directory_t *directory, uint32_t id, const cost_link_t *link)
{
    dir_client_t *client;

    if (id != 0 && link->hop_seconds > 0 && dir_client_get(directory, id, &client) == ATTN_OK) {
        link_take(&client->link, link);
        directory->cost_version++;
    }
}

cost_link_t
directory_clients_link(const directory_t *directory)
{
    cost_link_t slowest = {0};

    for (const dir_client_t *c = directory->clients; c != NULL; c = c->hh.next) {
        cost_link_slowest(&slowest, &c->link);
    }
    return slowest;
}

void
directory_set_merge(directory_t *directory, double bytes_per_second)
{
    if (bytes_per_second > 0) {
        directory->cost.merge_bandwidth = bytes_per_second;
        directory->cost_version++;
    }
}

cost_constants_t
directory_cost(const directory_t *directory, uint32_t id)
{
    cost_constants_t constants = directory->cost;
    dir_client_t *client       = NULL;

    if (id != 0) {
        HASH_FIND(hh, directory->clients, &id, sizeof(id), client);
    }
    if (client) {
        link_take(&constants.link, &client->link);
    }
    return constants;
}

uint64_t
dir_break_even(const directory_t *directory, dir_cache_entry_t *cache, uint32_t client)
{
    struct dir_break_even *known = &cache->break_even;

    if (known->version != directory->cost_version || known->client != client ||
        known->n_spots != cache->n_spots) {
        cost_constants_t constants = directory_cost(directory, client);
        *known                     = (struct dir_break_even){
                                .tokens  = cost_break_even_tokens(&constants, &cache->cache.geometry, cache->n_spots),
                                .version = directory->cost_version,
                                .client  = client,
                                .n_spots = cache->n_spots,
        };
    }
    return known->tokens;
}
