/*
 * fixture.h: a cluster of processes with a client, a cache and a model of its sequences, and ways
 * to find and lose the owner of a chunk. For tests with CMocka.
 */
#ifndef ATTN_TESTS_FIXTURE_H
#define ATTN_TESTS_FIXTURE_H

#include "tests/integration/cluster.h"
#include "tests/integration/model.h"

typedef struct fixture {
    test_cluster_t cluster;
    attn_client_t *client;
    attn_cache_t *cache;
    model_t model; /* of no sequences yet */
} fixture_t;

void fixture_open(fixture_t *f, const cluster_options_t *options, uint32_t timeout_ms,
                  uint64_t seed);

/** Close the client; the cluster stays. */
void fixture_close(fixture_t *f);

/** And then end the cluster, which must end well. */
void fixture_down(fixture_t *f);

/** The process that owns chunk i of sequence s of the model. */
process_t *fixture_owner(fixture_t *f, uint32_t s, uint32_t i);

/** The id of the worker at this address. */
uint32_t fixture_worker_id(fixture_t *f, const char *address);

/** Wait until the coordinator counts the worker at this address as lost. */
void fixture_await_lost(fixture_t *f, const char *address);

#endif
