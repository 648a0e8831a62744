/*
 * ucx_lib.h: the functions of UCX's that are used: a table that is filled when libucp is opened, at
 * run time. For ucx_lib.c, ucx_map.c (memory) and ucx_port.c (messages), the only files that know a
 * type of UCX's.
 */
#ifndef ATTN_RPC_UCX_LIB_H
#define ATTN_RPC_UCX_LIB_H

#include "base/status.h"

#include <ucp/api/ucp.h>

#define UCX_LIB_FUNCTIONS(F)                                                                       \
    F(ucp_init_version)                                                                            \
    F(ucp_cleanup)                                                                                 \
    F(ucp_get_version)                                                                             \
    F(ucp_config_read)                                                                             \
    F(ucp_config_modify)                                                                           \
    F(ucp_config_release)                                                                          \
    F(ucp_worker_create)                                                                           \
    F(ucp_worker_destroy)                                                                          \
    F(ucp_worker_progress)                                                                         \
    F(ucp_worker_get_address)                                                                      \
    F(ucp_worker_release_address)                                                                  \
    F(ucp_worker_get_efd)                                                                          \
    F(ucp_worker_arm)                                                                              \
    F(ucp_worker_set_am_recv_handler)                                                              \
    F(ucp_am_send_nbx)                                                                             \
    F(ucp_am_recv_data_nbx)                                                                        \
    F(ucp_mem_map)                                                                                 \
    F(ucp_mem_unmap)                                                                               \
    F(ucp_mem_query)                                                                               \
    F(ucp_rkey_pack)                                                                               \
    F(ucp_rkey_buffer_release)                                                                     \
    F(ucp_ep_create)                                                                               \
    F(ucp_ep_close_nbx)                                                                            \
    F(ucp_ep_print_info)                                                                           \
    F(ucp_ep_rkey_unpack)                                                                          \
    F(ucp_rkey_ptr)                                                                                \
    F(ucp_rkey_destroy)                                                                            \
    F(ucp_request_check_status)                                                                    \
    F(ucp_request_free)                                                                            \
    F(ucs_status_string)

#define UCX_LIB_FIELD(name) __typeof__(&name) name;
typedef struct ucx_lib {
    UCX_LIB_FUNCTIONS(UCX_LIB_FIELD)
} ucx_lib_t;
#undef UCX_LIB_FIELD

extern ucx_lib_t ucx_lib; /* valid once ucx_lib_need() was ATTN_OK */

/** Open the library, if it is not. Any thread. @return ATTN_ERR_UNSUPPORTED */
attn_status_t ucx_lib_need(void);

/** ATTN_ERR_UNSUPPORTED: UCX cannot `what`, and why. */
attn_status_t ucx_lib_failed(ucs_status_t status, const char *what);

#endif
