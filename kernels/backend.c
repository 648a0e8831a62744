/* The table of backends. A backend is one row: cuda and fault take theirs below cpu. */
#include "kernels/kernels.h"

#include "kernels/cpu/cpu.h"

#include <string.h>

static const attn_backend_ops_t *const rows[] = {
    &attn_cpu_backend_ops,
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
