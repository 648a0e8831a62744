/* certs.h: the certificates of a daemon, as its options name them, and when they are read again.
 * Whatever port the daemon opens uses these: rpc servers and clients take certs_t.tls as it is,
 * anything else the PEM texts of rpc_tls_pem(). */
#ifndef ATTN_DAEMON_CERTS_H
#define ATTN_DAEMON_CERTS_H

#include "daemon/options_tables.h"
#include "rpc/tls.h"

typedef struct certs {
    rpc_tls_t *tls; /**< NULL: plaintext */
    uint64_t looked_ns;
} certs_t;

/** Read the files, if there are any. @return ATTN_ERR_INVALID naming the file that is wrong */
attn_status_t certs_open(certs_t *certs, const tls_options_t *options);

/** To be called every 100 ms or so: looks after the files every second, and reads them on SIGHUP
 * (process_reload()). */
void certs_tick(certs_t *certs);

void certs_close(certs_t *certs);

/* What workers show the coordinator to be let in as such. */
#define JOIN_HEADER "attn-join" /* the metadata that it goes in */
#define JOIN_SECRET_MAX 257u    /* bytes, its end included */

/**
 * Read the join secret: the first line of a file, 16 to 256 printable ASCII characters without
 * blanks. path "": none, secret is empty.
 * @return ATTN_ERR_INVALID  it cannot be read, or is not of that form
 */
attn_status_t join_secret_read(const char *path, char secret[JOIN_SECRET_MAX]);

#endif
