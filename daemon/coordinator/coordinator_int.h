/* coordinator_int.h: what the files of this folder share. */
#ifndef ATTN_DAEMON_COORDINATOR_INT_H
#define ATTN_DAEMON_COORDINATOR_INT_H

#include "daemon/certs.h"
#include "daemon/coordinator/thin.h"
#include "daemon/monitor/monitor.h"
#include "daemon/process.h"
#include "daemon/ticket.h"

#include <pthread.h>
#include <stdatomic.h>

typedef struct coordinator {
    coordinator_options_t options;
    certs_t certs;
    char join_secret[JOIN_SECRET_MAX];    /* that workers show; empty: any may join */
    uint8_t ticket_secret[TICKET_SECRET]; /* random: it goes with instance */
    _Atomic uint64_t period;              /* of tickets; counted by the ticker */
    char address[PROCESS_ADDRESS_MAX];
    uint64_t instance; /* random: another one is another coordinator */
    rpc_client_t *rpc; /* towards workers */
    links_t *links;
    cluster_t *cluster;
    attn_client_t *door; /* libattn, for steps of thin clients */
    thin_t *thin;
    jobs_t *jobs;
    rpc_server_t *server;
    unary_t *attention, *members;
    steps_t *steps;
    pthread_t ticker;
    bool ticking; /* the thread was started */
    atomic_bool stop_ticking, draining;
    monitor_t *monitor; /* NULL: without */
} coordinator_t;

/** attention.c: add attn.v1.Attention but its steps. */
attn_status_t coordinator_serve_attention(coordinator_t *coordinator);

/** members.c: add attn.v1.Coordinator. */
attn_status_t coordinator_serve_members(coordinator_t *coordinator);

/** figures.c: open the metrics' port. */
attn_status_t coordinator_monitor(coordinator_t *coordinator);

/** A ticket of now. */
void coordinator_ticket(const coordinator_t *coordinator, ticket_role_t role, uint32_t client,
                        char text[TICKET_MAX]);

/** Copy a peer's string. @return ATTN_ERR_INVALID naming the field when it has room bytes or more
 */
attn_status_t coordinator_take_text(const char *field, const char *text, char *into, size_t room);

#endif
