/*
 * Clients and their leases. What a client or a cache leaves behind is freed by one sweep:
 * mark who is leaving, collect their sequences in one pass over the table, free them, then
 * close. So a thousand clients whose leases run out together cost one pass, not a thousand.
 */
#include "balancer/directory_int.h"
#include "base/checked.h"
#include "base/status.h"

#include <assert.h>

#define SWEEP_FEW 64 /* collected on the stack when there is no memory for all at once */

attn_status_t
dir_client_get(const directory_t *directory, uint32_t id, dir_client_t **client_p)
{
    dir_client_t *client = NULL;

    if (id == 0) {
        *client_p = (dir_client_t *)&directory->nobody;
        return ATTN_OK;
    }
    HASH_FIND(hh, directory->clients, &id, sizeof(id), client);
    if (!client) {
        return attn_fail(ATTN_ERR_NOT_FOUND, "client %u is not known: its lease ran out, open anew",
                         id);
    }
    *client_p = client;
    return ATTN_OK;
}

static uint32_t
unused_id(directory_t *directory)
{
    dir_client_t *taken;

    do {
        uint32_t id = directory->next_client++;
        taken       = NULL;
        if (id == 0) {
            continue; /* after 2^32 clients the numbers begin again */
        }
        HASH_FIND(hh, directory->clients, &id, sizeof(id), taken);
        if (!taken) {
            return id;
        }
    } while (true);
}

attn_status_t
directory_client_open(directory_t *directory, const char *name, uint64_t now_ns, uint32_t *client_p)
{
    if (directory->n_clients == DIR_CLIENTS_MAX) {
        return attn_fail(ATTN_ERR_EXHAUSTED, "client %s: %u clients are here already, the limit",
                         name ? name : "", DIR_CLIENTS_MAX);
    }
    dir_client_t *client = calloc(1, sizeof(*client));
    if (!client) {
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for client %s", name ? name : "");
    }
    client->id      = unused_id(directory);
    client->seen_ns = now_ns;
    strncpy(client->name, name ? name : "", sizeof(client->name) - 1);
    HASH_ADD(hh, directory->clients, id, sizeof(client->id), client);
    if (!client->hh.tbl) {
        free(client);
        return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for client %s", name ? name : "");
    }
    directory->n_clients++;
    *client_p = client->id;
    return ATTN_OK;
}

attn_status_t
directory_client_renew(directory_t *directory, uint32_t id, uint64_t now_ns)
{
    dir_client_t *client;
    attn_status_t status = dir_client_get(directory, id, &client);

    if (status == ATTN_OK) {
        client->seen_ns = attn_max(client->seen_ns, now_ns);
    }
    return status;
}

void
directory_client_close(directory_t *directory, uint32_t id)
{
    dir_client_t *client = NULL;

    HASH_FIND(hh, directory->clients, &id, sizeof(id), client);
    if (client) {
        client->leaving = true;
        dir_sweep(directory);
    }
}

uint32_t
directory_clients(const directory_t *directory)
{
    return directory->n_clients;
}

static dir_open_t *
find_open(const dir_client_t *client, uint64_t cache)
{
    for (uint32_t i = 0; i < client->n_opens; i++) {
        if (client->opens[i].cache == cache) {
            return &client->opens[i];
        }
    }
    return NULL;
}

attn_status_t
dir_client_note_open(dir_client_t *client, uint64_t cache)
{
    dir_open_t *open = find_open(client, cache);

    if (open) {
        open->times++;
        return ATTN_OK;
    }
    if (client->n_opens == client->room_opens) {
        uint32_t room    = client->room_opens ? 2 * client->room_opens : 4;
        dir_open_t *more = realloc(client->opens, room * sizeof(*more));
        if (!more) {
            return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for another cache of client %u",
                             client->id);
        }
        client->opens      = more;
        client->room_opens = room;
    }
    client->opens[client->n_opens++] = (dir_open_t){.cache = cache, .times = 1};
    return ATTN_OK;
}

attn_status_t
dir_client_note_close(dir_client_t *client, uint64_t cache)
{
    dir_open_t *open = find_open(client, cache);

    if (!open) {
        return attn_fail(ATTN_ERR_NOT_FOUND, "client %u (%s) has not opened cache %llu", client->id,
                         client->name, (unsigned long long)cache);
    }
    if (--open->times == 0) {
        *open = client->opens[--client->n_opens];
    }
    return ATTN_OK;
}

/* ---- the sweep ---- */

typedef struct leavers {
    const directory_t *directory;
    attn_seq_t *seqs;
    seq_info_t *infos;
    size_t n, room;
} leavers_t;

static void
collect_leaver(void *arg, attn_seq_t seq, const seq_info_t *info)
{
    leavers_t *leavers = arg;
    dir_client_t *client;

    if (leavers->n == leavers->room) {
        return;
    }
    dir_cache_entry_t *cache = dir_cache_find(leavers->directory, info->cache);
    assert(cache);
    if (!cache->leaving) {
        attn_status_t status = dir_client_get(leavers->directory, info->client, &client);
        assert(status == ATTN_OK); /* a client is forgotten after its sequences */
        if (!client->leaving) {
            return;
        }
    }
    leavers->seqs[leavers->n]  = seq;
    leavers->infos[leavers->n] = *info;
    leavers->n++;
}

/* At most `most` sequences leave (one of a leaving client in a leaving cache is counted twice). */
static void
free_leavers(directory_t *directory, uint64_t most)
{
    attn_seq_t few[SWEEP_FEW];
    seq_info_t few_infos[SWEEP_FEW];
    attn_seq_t *seqs  = malloc(most * sizeof(*seqs));
    seq_info_t *infos = malloc(most * sizeof(*infos));
    leavers_t leavers = {
        .directory = directory, .seqs = few, .infos = few_infos, .room = SWEEP_FEW};

    if (seqs && infos) {
        leavers.seqs  = seqs;
        leavers.infos = infos;
        leavers.room  = most;
    }
    uint64_t freed = 0;
    do {
        leavers.n = 0;
        seq_for_each(directory->sequences, collect_leaver, &leavers);
        for (size_t i = 0; i < leavers.n; i++) {
            attn_status_t status = dir_seq_free(directory, leavers.seqs[i], &leavers.infos[i]);
            assert(status == ATTN_OK);
        }
        freed += leavers.n;
    } while (leavers.n == leavers.room && freed < most);
    free(seqs);
    free(infos);
}

static void
client_forget(directory_t *directory, dir_client_t *client)
{
    assert(client->n_sequences == 0);
    HASH_DEL(directory->clients, client);
    directory->n_clients--;
    free(client->opens);
    free(client);
}

void
dir_sweep(directory_t *directory)
{
    dir_client_t *client, *next_client;
    dir_cache_entry_t *cache, *next_cache;
    uint64_t most = 0;

    HASH_ITER(hh, directory->clients, client, next_client)
    {
        for (uint32_t i = 0; client->leaving && i < client->n_opens; i++) {
            dir_cache_leave(dir_cache_find(directory, client->opens[i].cache),
                            client->opens[i].times);
        }
        most += client->leaving ? client->n_sequences : 0;
    }
    HASH_ITER(hh_id, directory->by_id, cache, next_cache)
    {
        most += cache->leaving ? cache->n_sequences : 0;
    }
    if (most > 0) {
        free_leavers(directory, most);
    }
    HASH_ITER(hh_id, directory->by_id, cache, next_cache)
    {
        if (cache->leaving) {
            dir_cache_drop(directory, cache);
        }
    }
    HASH_ITER(hh, directory->clients, client, next_client)
    {
        if (client->leaving) {
            client_forget(directory, client);
        }
    }
}
