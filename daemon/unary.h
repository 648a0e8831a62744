/*
 * unary.h: unary methods as plain functions. A row names path, request and function; decoding,
 * the reply, failures and the thread that runs it are the same for all.
 */
#ifndef ATTN_DAEMON_UNARY_H
#define ATTN_DAEMON_UNARY_H

#include "client/wire.h"
#include "daemon/jobs.h"
#include "rpc/rpc.h"

/** A call as a method's function sees it. */
typedef struct unary_call {
    void *service;
    const rpc_call_t *call; /**< for its deadline, and whether it was given up */
    const void *request;    /**< unpacked, of the method's type */
    void *reply;            /**< initialised, of the method's type; lies in block */
    wire_block_t *block;    /**< for what the reply points to: lives until it was packed */
} unary_call_t;

typedef struct unary_method {
    const char *path; /**< "/attn.v1.Worker/Status" */
    const ProtobufCMessageDescriptor *request, *reply;
    /** Serve it. A failure ends the call with its status and attn_last_error(). */
    attn_status_t (*serve)(const unary_call_t *call);
    /** May this caller call it, by what its metadata show (daemon/ticket.h)? Asked before the
     * request is looked at, on the thread that serves. NULL: everybody. @return ATTN_ERR_DENIED if
     * not */
    attn_status_t (*admit)(void *service, const rpc_call_t *call);
    /** The same, if it depends on what is requested. */
    attn_status_t (*admit_request)(void *service, const rpc_call_t *call,
                                   const ProtobufCMessage *request);
    bool blocks; /**< it may wait for others: run as a job, if there are jobs */
} unary_method_t;

typedef struct unary unary_t; /* the methods as added to one server */

/** Add methods (copied). jobs may be NULL: the server's threads run all. Destroy after the server.
 */
attn_status_t unary_add(rpc_server_t *server, jobs_t *jobs, const unary_method_t *methods,
                        uint32_t n, void *service, unary_t **unary_p);
void unary_destroy(unary_t *unary); /* NULL is allowed */

/** End a call, of either kind, with a failure of this thread. */
void unary_fail(rpc_call_t *call, attn_status_t status);

#endif
