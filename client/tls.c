/* tls.c: the certificates of a client: as its options say, or else its environment. */
#include "client/client.h"

#include "base/status.h"

#include <stdlib.h>

/* NULL: not said anywhere. An empty string, in the options or the environment, says "none". */
static const char *
said(const char *option, const char *variable)
{
    const char *value = option != NULL ? option : secure_getenv(variable);

    return value != NULL && value[0] != '\0' ? value : NULL;
}

attn_status_t
client_tls_open(rpc_client_t *rpc, const attn_client_options_t *o, rpc_tls_t **tls_p)
{
    rpc_tls_options_t files = {
        .ca   = said(o->tls_ca, "ATTN_TLS_CA"),
        .cert = said(o->tls_cert, "ATTN_TLS_CERT"),
        .key  = said(o->tls_key, "ATTN_TLS_KEY"),
    };

    if (files.ca == NULL && (files.cert != NULL || files.key != NULL)) {
        return attn_fail(ATTN_ERR_INVALID, "there is a certificate or key for TLS, but no CA to "
                                           "tell the right server by: set tls_ca (ATTN_TLS_CA)");
    }
    if (files.ca == NULL) {
        return ATTN_OK;
    }
    attn_status_t status = rpc_tls_open(&files, tls_p);
    if (status == ATTN_OK) {
        rpc_client_set_tls(rpc, *tls_p, said(o->tls_server_name, "ATTN_TLS_SERVER_NAME"));
    }
    return status;
}
