#include "client/slab_lanes.h"

#include "base/status.h"

void
slab_lanes_init(slab_lanes_t *lanes)
{
    *lanes = (slab_lanes_t){.next = 1};
    pthread_mutex_init(&lanes->lock, NULL);
}

void
slab_lanes_fini(slab_lanes_t *lanes)
{
    pthread_mutex_destroy(&lanes->lock);
}

void
slab_lanes_offered(slab_lanes_t *lanes, const Attn__V1__GpuSlab *words)
{
    pthread_mutex_lock(&lanes->lock);
    lanes->offered = words->lanes == SLAB_LANES && words->lane_bytes == SLAB_LANE_BYTES;
    pthread_mutex_unlock(&lanes->lock);
}

/* Under the lock. */
static attn_status_t
take(slab_lanes_t *lanes, uint32_t layers, uint32_t *lane_p)
{
    if (!lanes->offered) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "the worker's memory has no lanes for it");
    }
    if (lanes->lost) {
        return attn_fail(ATTN_ERR_UNAVAILABLE, "the worker gave up the slab of the step");
    }
    if (layers > UINT32_MAX - lanes->next) {
        return attn_fail(ATTN_ERR_EXHAUSTED, "the numbers of the slab's lanes are used up");
    }
    for (uint32_t i = 0; i < SLAB_LANES; i++) {
        if (!lanes->of[i].taken) {
            *lane_p = i;
            return ATTN_OK;
        }
    }
    return attn_fail(ATTN_ERR_EXHAUSTED,
                     "%u steps to the worker are driven by devices: as many as "
                     "may be",
                     SLAB_LANES);
}

attn_status_t
slab_lane_take(slab_lanes_t *lanes, attn_lane_t *runner, uint32_t layers, uint32_t *lane_p,
               uint32_t *first_p)
{
    pthread_mutex_lock(&lanes->lock);
    attn_status_t status = take(lanes, layers, lane_p);
    if (status == ATTN_OK) {
        *first_p = lanes->next;
        lanes->next += layers;
        lanes->of[*lane_p] = (struct slab_lane){.taken = true, .runner = runner, .first = *first_p};
    }
    pthread_mutex_unlock(&lanes->lock);
    return status;
}

void
slab_lane_give(slab_lanes_t *lanes, uint32_t lane, bool adrift)
{
    pthread_mutex_lock(&lanes->lock);
    lanes->of[lane] = (struct slab_lane){.taken = adrift};
    pthread_mutex_unlock(&lanes->lock);
}

void
slab_lanes_lost(slab_lanes_t *lanes)
{
    pthread_mutex_lock(&lanes->lock);
    lanes->lost = true;
    for (uint32_t i = 0; i < SLAB_LANES; i++) {
        if (lanes->of[i].runner != NULL) {
            attn_lane_abort(lanes->of[i].runner, lanes->of[i].first);
        }
    }
    pthread_mutex_unlock(&lanes->lock);
}
