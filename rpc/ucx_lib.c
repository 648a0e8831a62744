/* ucx_lib.c: see ucx_lib.h. */
#include "rpc/ucx_lib.h"
#include "rpc/ucx.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>

ucx_lib_t ucx_lib;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static bool opened; /* under the lock */

/* Signals and malloc belong to whoever uses us, and what UCX has to say of a failure is in our own
 * sentences. The library reads these while it is loaded, so no call can tell it. */
void
ucx_environment(void)
{
    setenv("UCX_HANDLE_ERRORS", "none", 0);
    setenv("UCX_MEM_EVENTS", "n", 0);
    setenv("UCX_LOG_LEVEL", "fatal", 0);
}

/* Under the lock. */
static attn_status_t
library_open(void)
{
    void *handle = dlopen("libucp.so.0", RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (handle == NULL) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "there is no UCX here: %s", dlerror());
    }
#define FIND(name)                                                                                 \
    *(void **)&ucx_lib.name = dlsym(handle, #name);                                                \
    if (ucx_lib.name == NULL) {                                                                    \
        dlclose(handle);                                                                           \
        return attn_fail(ATTN_ERR_UNSUPPORTED, "libucp.so.0 is too old or too new: no " #name);    \
    }
    UCX_LIB_FUNCTIONS(FIND)
    opened = true;
    return ATTN_OK;
}

attn_status_t
ucx_lib_need(void)
{
    pthread_mutex_lock(&lock);
    attn_status_t status = opened ? ATTN_OK : library_open();
    pthread_mutex_unlock(&lock);
    return status;
}

attn_status_t
ucx_lib_failed(ucs_status_t status, const char *what)
{
    return attn_fail(ATTN_ERR_UNSUPPORTED, "UCX cannot %s: %s", what,
                     ucx_lib.ucs_status_string(status));
}
