/*
 * echo_server.h: the service that the tests of rpc/ call. What it does with a message is
 * written in the message's text; see echo_server.c.
 */
#ifndef ATTN_RPC_ECHO_SERVER_H
#define ATTN_RPC_ECHO_SERVER_H

#include "rpc/rpc.h"

#include "echo.pb-c.h"

#include <stdatomic.h>

#define ECHO_UNARY "/echo.Echo/Unary"
#define ECHO_TRACKED "/echo.Echo/Tracked" /* unary, with `closed` */
#define ECHO_STREAM "/echo.Echo/Stream"

typedef struct echo_server {
    rpc_server_t *server;
    char address[128];
    atomic_int handling;  /* handlers at this moment */
    atomic_int handled;   /* messages of all calls */
    atomic_int closed;    /* calls told to `closed` */
    atomic_int cancelled; /* handlers that saw a cancellation */
    atomic_int floods;    /* set by who asks for a flood, 0 when it is over */
    atomic_int flooded;   /* messages that "flood" could queue */
    atomic_int flood_status;
    atomic_int in_one_call_max; /* handlers of one stream at once */
} echo_server_t;

/** Start at this address ("127.0.0.1:0") with 4 threads, unless options say more. */
attn_status_t echo_server_start(echo_server_t *echo, const rpc_server_options_t *options);
void echo_server_stop(echo_server_t *echo, uint32_t grace_ms);

#endif
