/*
 * tls.h: the certificates of a process, read from PEM files and read again when the files change.
 * One rpc_tls_t serves any number of servers and clients, and whoever else wants the files'
 * contents (a port that is not gRPC, say).
 *
 * A file that cannot be used (unreadable, no certificate, a key of another certificate) changes
 * nothing: what was in use stays, and the error is logged, once for each state of the files.
 * Connections that stand keep the certificates of their handshake.
 */
#ifndef ATTN_RPC_TLS_H
#define ATTN_RPC_TLS_H

#include "base/attn_types.h"

typedef struct rpc_tls rpc_tls_t;

/** Paths are copied. */
typedef struct rpc_tls_options {
    const char *ca;        /**< peers' certificates are of one of these issuers; never NULL */
    const char *cert;      /**< our own, with what leads up to the CA; NULL: none (clients) */
    const char *key;       /**< of cert, without a passphrase; NULL with cert */
    bool clients_need_not; /**< servers ask clients for no certificate */
} rpc_tls_options_t;

/**
 * Read the files.
 * @return ATTN_ERR_INVALID  a file cannot be read, or is not what it should be; names it
 */
attn_status_t rpc_tls_open(const rpc_tls_options_t *options, rpc_tls_t **tls_p);

/** Give it up; what uses it keeps it alive. NULL is allowed. */
void rpc_tls_close(rpc_tls_t *tls);

/** Look whether the files changed (three calls of stat), and if so, or if `always`, read them.
 * Servers look before every handshake by themselves; processes that only connect call this every
 * second or so. Any thread; logs what came of it. */
void rpc_tls_refresh(rpc_tls_t *tls, bool always);

/** What is in use: strings of the caller's, to be freed with rpc_tls_pem_free(). cert and key are
 * NULL if there are none. Another version, another content. */
typedef struct rpc_tls_pem {
    char *ca, *cert, *key;
    uint64_t version;
} rpc_tls_pem_t;

void rpc_tls_pem(rpc_tls_t *tls, rpc_tls_pem_t *pem);
void rpc_tls_pem_free(rpc_tls_pem_t *pem);

/** Counts the contents that were in use; a load. */
uint64_t rpc_tls_version(const rpc_tls_t *tls);

#endif
