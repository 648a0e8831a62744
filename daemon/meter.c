#include "daemon/meter.h"

meter_t meter;

void
meter_took(meter_times_t *times, uint64_t start_ns)
{
    uint64_t ns = attn_now_ns() - start_ns;
    uint32_t i  = 0;

    while (i + 1 < METER_TIMES && ns > METER_TIME_LEAST_NS << i) {
        i++;
    }
    meter_add(&times->total_ns, ns);
    meter_add(&times->counts[i], 1);
}

void
meter_refused(attn_status_t status)
{
    unsigned i = (unsigned)-(int)status;

    if (i < METER_STATUSES) {
        meter_add(&meter.refused[i], 1);
    }
}
