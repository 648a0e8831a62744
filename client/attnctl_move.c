/* attnctl_move.c: `attnctl move` and `attnctl drain`: chunks go to other workers. */
#include "client/attnctl.h"

#include <inttypes.h>
#include <stdio.h>
#include <time.h>

/* A call moves for a second. So often in a row nothing may be moved, for steps that do not end or
 * workers that do not answer, before it is given up. */
#define TRIES 10u
#define PAUSE_MS 500u

typedef attn_status_t (*move_fn)(const attnctl_t *ctl, attn_cache_t *cache, attn_moved_t *moved);

static attn_status_t
move_some(const attnctl_t *ctl, attn_cache_t *cache, attn_moved_t *moved)
{
    return attn_seq_move(cache, (attn_seq_t){ctl->seq}, ctl->from, ctl->to, moved);
}

static attn_status_t
drain_some(const attnctl_t *ctl, attn_cache_t *cache, attn_moved_t *moved)
{
    (void)cache;
    return attn_worker_drain(ctl->client, ctl->worker, ctl->to, false, moved);
}

static void
print(const attnctl_t *ctl, const attn_moved_t *all, double seconds)
{
    char bytes[16];

    if (ctl->json) {
        cJSON *object = cJSON_CreateObject();
        attnctl_json_u64(object, "chunks", all->chunks);
        attnctl_json_u64(object, "bytes", all->bytes);
        attnctl_json_u64(object, "left", all->left);
        attnctl_json_u64(object, "failed", all->failed);
        cJSON_AddNumberToObject(object, "seconds", seconds);
        attnctl_json_print(object);
        return;
    }
    printf("%" PRIu64 " chunks moved, %s, in %.1f s; %" PRIu64 " left\n", all->chunks,
           attnctl_bytes(all->bytes, bytes), seconds, all->left);
    fflush(stdout);
}

static double
now_s(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

/* Again and again until nothing is left, or nothing more comes of it. */
static int
move_all(const attnctl_t *ctl, attn_cache_t *cache, move_fn some)
{
    attn_moved_t all = {0}, moved;
    double start     = now_s();
    uint32_t in_vain = 0;

    do {
        attn_status_t status = some(ctl, cache, &moved);
        bool retry           = status == ATTN_ERR_UNAVAILABLE || status == ATTN_ERR_DEADLINE;
        if (status != ATTN_OK && (!retry || in_vain + 1 >= TRIES)) {
            return attnctl_failed(ctl, status);
        }
        all.chunks += moved.chunks;
        all.bytes += moved.bytes;
        all.failed += moved.failed;
        all.left = status == ATTN_OK ? moved.left : all.left + retry;
        in_vain  = moved.chunks > 0 ? 0 : in_vain + 1;
        if (all.left > 0 && !ctl->json && moved.chunks > 0) {
            print(ctl, &all, now_s() - start);
        }
        if (all.left > 0 && moved.chunks == 0) {
            nanosleep(&(struct timespec){.tv_nsec = PAUSE_MS * 1000000}, NULL);
        }
    } while (all.left > 0 && in_vain < TRIES && attnctl_stop == 0);
    print(ctl, &all, now_s() - start);
    if (all.left > 0 && moved.failed > 0) {
        fprintf(stderr, "attnctl: the last that failed: %s (%s)\n", moved.reason,
                attn_strerror(moved.why));
    }
    return all.left == 0 ? ATTNCTL_OK : ATTNCTL_PROBLEM;
}

int
attnctl_move(const attnctl_t *ctl)
{
    attn_cache_t *cache;
    attn_status_t status = attn_cache_open(ctl->client, ctl->cache, NULL, &cache);

    if (status != ATTN_OK) {
        return attnctl_failed(ctl, status);
    }
    int code = move_all(ctl, cache, move_some);
    attn_cache_close(cache);
    return code;
}

int
attnctl_drain(const attnctl_t *ctl)
{
    attn_moved_t moved;

    if (!ctl->undo) {
        return move_all(ctl, NULL, drain_some);
    }
    attn_status_t status = attn_worker_drain(ctl->client, ctl->worker, 0, true, &moved);
    return status == ATTN_OK ? ATTNCTL_OK : attnctl_failed(ctl, status);
}
