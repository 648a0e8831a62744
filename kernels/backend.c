/* The table of backends. A backend is one row: fault takes its own below. */
#include "kernels/kernels.h"

#include "base/status.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cuda/cuda.h"

#include <stdlib.h>
#include <string.h>

static const attn_backend_ops_t *const rows[] = {
    &attn_cpu_backend_ops,
    &attn_cuda_backend_ops,
};

#define ROWS_N (sizeof(rows) / sizeof(rows[0]))

const attn_backend_ops_t *
attn_backend_find(const char *name)
{
    for (size_t i = 0; i < ROWS_N; i++) {
        if (strcmp(rows[i]->name, name) == 0) {
            return rows[i];
        }
    }
    return NULL;
}

const char *
attn_backend_name(uint32_t i)
{
    return i < ROWS_N ? rows[i]->name : NULL;
}

attn_status_t
attn_backend_parse(const char *device, const attn_backend_ops_t **ops_p, uint32_t *ordinal_p)
{
    char name[16]        = "";
    size_t length        = strcspn(device, ":");
    const char *number   = device[length] == ':' ? device + length + 1 : "0";
    char *end            = NULL;
    unsigned long long n = strtoull(number, &end, 10);

    if (length < sizeof(name)) {
        memcpy(name, device, length);
    }
    *ops_p = attn_backend_find(name);
    if (*ops_p == NULL) {
        return attn_fail(ATTN_ERR_UNSUPPORTED, "no device \"%.64s\" in this build: cpu and cuda:N",
                         device);
    }
    if (number[0] < '0' || number[0] > '9' || *end != 0 || n > UINT16_MAX) {
        return attn_fail(ATTN_ERR_INVALID,
                         "device is \"%.64s\": a number up to %u follows the colon", device,
                         UINT16_MAX);
    }
    *ordinal_p = (uint32_t)n;
    return ATTN_OK;
}
