#include "meter.h"

#include <stdlib.h>
#include <string.h>

#include "failure.h"

bool
meter_add(meter_t *meter, uint64_t ns)
{
    if (meter->n == meter->room) {
        size_t room     = meter->room ? 2 * meter->room : 1024;
        uint64_t *grown = realloc(meter->ns, room * sizeof(*grown));
        if (!grown) {
            return failure("out of memory");
        }
        meter->ns   = grown;
        meter->room = room;
    }
    meter->ns[meter->n++] = ns;
    return true;
}

static int
compare(const void *a, const void *b)
{
    uint64_t left = *(const uint64_t *)a, right = *(const uint64_t *)b;
    return left < right ? -1 : left > right;
}

double
meter_percentile(meter_t *meter, double p)
{
    if (meter->n == 0) {
        return 0;
    }
    qsort(meter->ns, meter->n, sizeof(*meter->ns), compare);
    size_t rank = (size_t)(p / 100 * (double)meter->n);
    return (double)meter->ns[rank < meter->n ? rank : meter->n - 1] / 1000;
}

double
meter_mean(const meter_t *meter)
{
    double sum = 0;

    for (size_t i = 0; i < meter->n; i++) {
        sum += (double)meter->ns[i];
    }
    return meter->n == 0 ? 0 : sum / (double)meter->n / 1000;
}

uint64_t
digest_add(uint64_t digest, const float *values, size_t n)
{
    for (size_t i = 0; i + 1 < n; i += 2) {
        uint64_t word;
        memcpy(&word, &values[i], sizeof(word));
        digest = (digest ^ word) * UINT64_C(0x100000001b3);
        digest ^= digest >> 32; /* or a word's high bits would never reach the low ones */
    }
    return digest;
}
