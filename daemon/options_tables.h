/* options_tables.h: the options of attnd's commands, as structs of values. */
#ifndef ATTN_DAEMON_OPTIONS_TABLES_H
#define ATTN_DAEMON_OPTIONS_TABLES_H

#include "daemon/options.h"

/** Of every command: its certificates. All empty: plaintext. */
typedef struct tls_options {
    char cert[OPTIONS_TEXT_MAX]; /**< paths of PEM files */
    char key[OPTIONS_TEXT_MAX];
    char ca[OPTIONS_TEXT_MAX];
    bool client_certs; /**< clients must present one */
    bool allow_plaintext;
} tls_options_t;

/* What a slab for one client may have: UCX_SLAB_MIN and _MAX of rpc/ucx.h. */
#define WORKER_UCX_SLAB_LEAST (UINT64_C(64) << 10)
#define WORKER_UCX_SLAB_MOST (UINT64_C(1) << 30)

/** `attnd worker` */
typedef struct worker_options {
    char listen[OPTIONS_TEXT_MAX];
    char coordinator[OPTIONS_TEXT_MAX];
    char advertise[OPTIONS_TEXT_MAX]; /**< empty: the address it listens on */
    char name[OPTIONS_TEXT_MAX];      /**< empty: its address */
    char device[OPTIONS_TEXT_MAX];    /**< as attn_backend_parse() takes it */
    uint64_t threads;                 /**< 0: one per core */
    uint64_t slab, reserve;           /**< bytes; slab 0: what the device has, less reserve */
    uint64_t spin_us;
    bool batch;
    uint64_t drain_ms;
    uint64_t stall_ms;
    uint64_t message_memory, run_memory; /**< bytes */
    uint64_t gpu_lend;                   /**< bytes; 0: none */
    uint64_t ucx_memory, ucx_slab;       /**< bytes; ucx_memory 0: none, else ucx_slab or more */
    char ucx_net[OPTIONS_TEXT_MAX];      /**< devices; empty: no messages */
    bool ucx_net_plaintext;
    bool groups;
    bool check_store;
    char metrics_listen[OPTIONS_TEXT_MAX]; /**< empty: no such port */
    uint32_t log_level;                    /**< attn_log_level_t */
    tls_options_t tls;
    char join_secret_file[OPTIONS_TEXT_MAX];
} worker_options_t;

/** `attnd coordinator` */
typedef struct coordinator_options {
    char listen[OPTIONS_TEXT_MAX];
    uint64_t lost_ms;
    uint64_t lease_ms;
    uint64_t heartbeat_ms;
    uint64_t break_even_tokens; /**< 0: from the cost model */
    uint64_t handler_threads;
    uint64_t drain_ms;
    uint64_t stall_ms;
    uint64_t message_memory, run_memory; /**< bytes */
    uint32_t transport;                  /**< attn_transport_t, less 1 */
    char metrics_listen[OPTIONS_TEXT_MAX];
    uint32_t log_level;
    tls_options_t tls;
    char join_secret_file[OPTIONS_TEXT_MAX];
} coordinator_options_t;

/** `attnd dev` */
typedef struct dev_options {
    uint64_t workers;
    char listen[OPTIONS_TEXT_MAX];
    uint64_t slab; /**< bytes, of each worker */
    char device[OPTIONS_TEXT_MAX];
    uint64_t threads; /**< of each worker; 0: cores / workers, at least 1 */
    char ready_file[OPTIONS_TEXT_MAX];
    char metrics_listen[OPTIONS_TEXT_MAX];
    uint32_t log_level;
    tls_options_t tls;
} dev_options_t;

extern const option_set_t worker_option_set;
extern const option_set_t coordinator_option_set;
extern const option_set_t dev_option_set;

#endif
