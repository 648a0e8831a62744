#include "client/attnctl_words.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static bool
read_number(const char *text, int base, const char **end_p, uint64_t *number)
{
    char *end;

    errno   = 0;
    *number = strtoull(text, &end, base);
    *end_p  = end;
    return errno == 0 && text[0] >= '0' && text[0] <= '9';
}

bool
attnctl_number(const char *text, uint64_t most, uint64_t *number)
{
    const char *end;

    return read_number(text, 0, &end, number) && *end == '\0' && *number <= most;
}

bool
attnctl_number_at(const char *text, const char **end_p, uint64_t least, uint64_t most,
                  uint64_t *number)
{
    return read_number(text, 10, end_p, number) && *number >= least && *number <= most;
}

bool
attnctl_take_number(const attnctl_limits_t *numbers, size_t n, int option, const char *text)
{
    for (size_t i = 0; i < n; i++) {
        if (numbers[i].option == option) {
            uint64_t number;
            bool right = attnctl_number_at(text, &text, numbers[i].least, numbers[i].most, &number);
            *numbers[i].to = (uint32_t)number;
            return right && *text == '\0';
        }
    }
    return false;
}

static const char *const dtypes[] = {[ATTN_F32] = "f32", [ATTN_F16] = "f16", [ATTN_BF16] = "bf16"};

bool
attnctl_dtype(const char *text, attn_dtype_t *dtype)
{
    for (attn_dtype_t d = ATTN_F32; d <= ATTN_BF16; d++) {
        if (strcmp(text, dtypes[d]) == 0) {
            *dtype = d;
            return true;
        }
    }
    return false;
}

const char *
attnctl_dtype_name(attn_dtype_t dtype)
{
    return dtypes[dtype];
}
