/*
 * monitor.h: the HTTP port for those who watch a daemon. Everything there is read, nothing can be
 * changed:
 *
 *     GET /             a page for people, which asks for /status.json every second
 *     GET /status.json  what it shows
 *     GET /metrics      for Prometheus
 *     GET /healthz      200 when the daemon serves, or 503 and why not
 *
 * With certificates it speaks HTTPS by them, and asks clients for theirs as the other ports do;
 * only /healthz is told to anybody.
 *
 * One thread serves it, started here. The source's functions are called by it.
 */
#ifndef ATTN_DAEMON_MONITOR_H
#define ATTN_DAEMON_MONITOR_H

#include "daemon/monitor/expose.h"
#include "rpc/tls.h"

#include <cjson/cJSON.h>

/** What there is to see of a daemon. */
typedef struct monitor_source {
    void *service;
    void (*metrics)(void *service, expose_t *expose);
    cJSON *(*status)(void *service); /**< NULL: no memory */
    /** A sentence why it does not serve, or NULL when it does. */
    const char *(*ailment)(void *service);
} monitor_source_t;

typedef struct monitor_options {
    const char *listen;    /**< HOST:PORT; port 0 takes a free one */
    rpc_tls_t *tls;        /**< NULL: plain HTTP; otherwise outlives the monitor */
    bool clients_need_not; /**< show a certificate */
} monitor_options_t;

typedef struct monitor monitor_t;

/**
 * Serve, and log where.
 * @return ATTN_ERR_UNAVAILABLE  the address cannot be bound
 * @return ATTN_ERR_INVALID      it is none
 */
attn_status_t monitor_start(const monitor_options_t *options, const monitor_source_t *source,
                            monitor_t **monitor_p);

/** Take new certificates when there are some. Every 100 ms or so. NULL is allowed. */
void monitor_tick(monitor_t *monitor);

void monitor_stop(monitor_t *monitor); /* NULL is allowed */

#endif
