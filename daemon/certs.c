#include "daemon/certs.h"

#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"
#include "daemon/process.h"

#define LOOK_NS (UINT64_C(1000) * ATTN_NS_PER_MS)

attn_status_t
certs_open(certs_t *certs, const tls_options_t *options)
{
    if (options->cert[0] == '\0') {
        return ATTN_OK;
    }
    return rpc_tls_open(&(rpc_tls_options_t){.ca               = options->ca,
                                             .cert             = options->cert,
                                             .key              = options->key,
                                             .clients_need_not = !options->client_certs},
                        &certs->tls);
}

void
certs_tick(certs_t *certs)
{
    bool asked   = process_reload();
    uint64_t now = attn_now_ns();

    if (certs->tls == NULL) {
        if (asked) {
            attn_log(ATTN_LOG_INFO, "tls.none", "reason=\"SIGHUP reads certificates again\"");
        }
    } else if (asked || now >= certs->looked_ns + LOOK_NS) {
        certs->looked_ns = now;
        rpc_tls_refresh(certs->tls, asked);
    }
}

void
certs_close(certs_t *certs)
{
    rpc_tls_close(certs->tls);
    certs->tls = NULL;
}
