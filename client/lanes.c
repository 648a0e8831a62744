#include "client/lanes.h"

#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"
#include "client/client_int.h"

#include <stdlib.h>

#define LAST_WAIT_NS (1000 * ATTN_NS_PER_MS)

typedef struct kept_lane {
    attn_lane_t *lane;
    bool busy;             /* a step has it */
    bool adrift;           /* what was queued for its last step runs still, with ... */
    attn_shared_t *memory; /* ... this */
    struct kept_lane *next;
} kept_lane_t;

struct lanes {
    kept_lane_t *first; /* the oldest */
};

/* Is it anybody's again? Under the client's lock. */
static bool
is_free(kept_lane_t *kept)
{
    if (kept->adrift && attn_lane_wait(kept->lane, 0) && attn_lane_end(kept->lane, 0)) {
        attn_shared_unref(kept->memory);
        kept->memory = NULL;
        kept->adrift = false;
    }
    return !kept->busy && !kept->adrift;
}

/* Under the client's lock. */
static kept_lane_t *
find(attn_client_t *client, int gpu)
{
    kept_lane_t *found = NULL;

    for (kept_lane_t *k = client->lanes != NULL ? client->lanes->first : NULL; k != NULL;
         k              = k->next) {
        if (is_free(k) && found == NULL && attn_lane_gpu(k->lane) == gpu) {
            found = k;
        }
    }
    if (found != NULL) {
        found->busy = true;
    }
    return found;
}

/* Under the client's lock. */
static void
add(attn_client_t *client, kept_lane_t *kept)
{
    kept_lane_t **at = &client->lanes->first;

    while (*at != NULL) {
        at = &(*at)->next;
    }
    *at = kept;
}

attn_status_t
lanes_take(attn_client_t *client, int gpu, attn_lane_t **lane_p)
{
    pthread_mutex_lock(&client->lock);
    if (client->lanes == NULL) {
        client->lanes = calloc(1, sizeof(*client->lanes));
    }
    bool room         = client->lanes != NULL;
    kept_lane_t *kept = find(client, gpu);
    pthread_mutex_unlock(&client->lock);
    if (kept == NULL) {
        kept = room ? calloc(1, sizeof(*kept)) : NULL;
        if (kept == NULL) {
            return attn_fail(ATTN_ERR_NO_MEMORY, "no memory for a lane of GPU %d", gpu);
        }
        attn_status_t status = attn_lane_open(gpu, &kept->lane);
        if (status != ATTN_OK) {
            free(kept);
            return status;
        }
        kept->busy = true;
        pthread_mutex_lock(&client->lock);
        add(client, kept);
        pthread_mutex_unlock(&client->lock);
    }
    *lane_p = kept->lane;
    return ATTN_OK;
}

void
lanes_give(attn_client_t *client, attn_lane_t *lane, attn_shared_t *memory)
{
    bool over = attn_lane_wait(lane, 0) && attn_lane_end(lane, 0);

    pthread_mutex_lock(&client->lock);
    kept_lane_t *kept = client->lanes->first;
    while (kept->lane != lane) {
        kept = kept->next;
    }
    kept->busy   = false;
    kept->adrift = !over;
    kept->memory = over ? NULL : memory;
    pthread_mutex_unlock(&client->lock);
    if (over) {
        attn_shared_unref(memory);
    }
}

void
client_lanes_free(attn_client_t *client)
{
    uint64_t until = attn_now_ns() + LAST_WAIT_NS;
    kept_lane_t *kept;

    while (client->lanes != NULL && (kept = client->lanes->first) != NULL) {
        client->lanes->first = kept->next;
        if (!kept->adrift ||
            (attn_lane_wait(kept->lane, until) && attn_lane_end(kept->lane, until))) {
            attn_shared_unref(kept->memory);
            attn_lane_close(kept->lane);
        } else { /* its kernels may come to run: they find its memory, for as long as the process is
                  */
            attn_log(ATTN_LOG_WARN, "client.lane", "name=\"%s\" gpu=%d reason=\"%s\"", client->name,
                     attn_lane_gpu(kept->lane), "some stream that it was queued on is held up");
        }
        free(kept);
    }
    free(client->lanes);
    client->lanes = NULL;
}
