/*
 * slab_lanes.h: the lanes behind a slab in the memory of the worker's GPU, by which steps come
 * whose layers two GPUs drive (kernels/lane.h). A step has one at a time, and numbers for its
 * layers that no step before had: a slab's numbers only grow.
 */
#ifndef ATTN_SLAB_LANES_H
#define ATTN_SLAB_LANES_H

#include "attn/v1/attn.pb-c.h"
#include "client/slab_card.h"
#include "kernels/lane.h"

#include <pthread.h>

typedef struct slab_lanes {
    pthread_mutex_t lock;
    bool offered, lost;
    uint32_t next; /* number that no layer had */
    struct slab_lane {
        bool taken;
        attn_lane_t *runner; /* of the step that has it; NULL: its waits need no end */
        uint32_t first;
    } of[SLAB_LANES];
} slab_lanes_t;

void slab_lanes_init(slab_lanes_t *lanes);
void slab_lanes_fini(slab_lanes_t *lanes);

/** As the worker lent memory of its GPU. */
void slab_lanes_offered(slab_lanes_t *lanes, const Attn__V1__GpuSlab *words);

/**
 * For a step of so many layers, whose runner's half is `runner`: that is aborted when the slab is
 * lost.
 * @return ATTN_ERR_UNSUPPORTED, ATTN_ERR_EXHAUSTED, ATTN_ERR_UNAVAILABLE
 */
attn_status_t slab_lane_take(slab_lanes_t *lanes, attn_lane_t *runner, uint32_t layers,
                             uint32_t *lane_p, uint32_t *first_p);

/** The runner's half is over, or adrift: then the lane is for nobody else. */
void slab_lane_give(slab_lanes_t *lanes, uint32_t lane, bool adrift);

/** The worker is gone, or wants the memory back. */
void slab_lanes_lost(slab_lanes_t *lanes);

#endif
