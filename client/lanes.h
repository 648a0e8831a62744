/* lanes.h: the runner's halves of steps that two GPUs drive (kernels/lane.h), as a client keeps
 * them. Those that graphs were captured with stay until it closes. */
#ifndef ATTN_LANES_H
#define ATTN_LANES_H

#include "client/client.h"
#include "kernels/lane.h"
#include "kernels/memory.h"

/** One of a GPU: the oldest that no step has, or a new one. Any thread; likewise below.
 * @return as attn_lane_open() */
attn_status_t lanes_take(attn_client_t *client, int gpu, attn_lane_t **lane_p);

/** The step is over. What was queued for it may not be: then nobody gets the lane before it is, and
 * the memory that it works with, a reference of the caller's until now, is kept. */
void lanes_give(attn_client_t *client, attn_lane_t *lane, attn_shared_t *memory);

/** All go. What is queued still is waited for, a second at most, and then left alone. */
void client_lanes_free(attn_client_t *client);

#endif
