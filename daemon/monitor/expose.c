#include "daemon/monitor/expose.h"

#include <inttypes.h>
#include <stdarg.h>

bool
expose_open(expose_t *e)
{
    *e     = (expose_t){0};
    e->out = open_memstream(&e->text, &e->size);
    return e->out != NULL;
}

bool
expose_close(expose_t *e)
{
    bool broken = ferror(e->out) != 0;

    return fclose(e->out) == 0 && !broken;
}

void
expose_family(expose_t *e, const char *name, const char *type, const char *help)
{
    fprintf(e->out, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, type);
}

/* Peers choose some of these values: the three characters that end or escape are escaped. */
static void
put_label_value(FILE *out, const char *value)
{
    for (; *value != '\0'; value++) {
        if (*value == '\n') {
            fputs("\\n", out);
            continue;
        }
        if (*value == '"' || *value == '\\') {
            fputc('\\', out);
        }
        fputc(*value, out);
    }
}

/* Counters are whole numbers and are shown as such, as far as a double holds them. */
static void
put_number(FILE *out, double value)
{
    if (value >= 0 && value < 9007199254740992.0 && value == (double)(uint64_t)value) {
        fprintf(out, " %" PRIu64 "\n", (uint64_t)value);
    } else {
        fprintf(out, " %.9g\n", value);
    }
}

void
expose_sample(expose_t *e, const char *name, double value, ...)
{
    const char *label;
    bool first = true;
    va_list args;

    fputs(name, e->out);
    va_start(args, value);
    while ((label = va_arg(args, const char *)) != NULL) {
        fprintf(e->out, "%s%s=\"", first ? "{" : ",", label);
        put_label_value(e->out, va_arg(args, const char *));
        fputc('"', e->out);
        first = false;
    }
    va_end(args);
    if (!first) {
        fputc('}', e->out);
    }
    put_number(e->out, value);
}

void
expose_counter(expose_t *e, const char *name, const char *help, uint64_t value)
{
    expose_family(e, name, "counter", help);
    expose_sample(e, name, (double)value, NULL);
}

void
expose_gauge(expose_t *e, const char *name, const char *help, double value)
{
    expose_family(e, name, "gauge", help);
    expose_sample(e, name, value, NULL);
}

void
expose_times(expose_t *e, const char *name, const char *help, uint64_t total_ns,
             const uint64_t *counts, uint32_t n, uint64_t least_ns)
{
    uint64_t sum = 0;

    expose_family(e, name, "histogram", help);
    for (uint32_t i = 0; i < n; i++) {
        sum += counts[i];
        if (i + 1 < n) {
            fprintf(e->out, "%s_bucket{le=\"%.9g\"} %" PRIu64 "\n", name,
                    (double)(least_ns << i) / 1e9, sum);
        }
    }
    /* The count is the sum of the buckets, so that the two agree whenever they are read. */
    fprintf(e->out, "%s_bucket{le=\"+Inf\"} %" PRIu64 "\n", name, sum);
    fprintf(e->out, "%s_sum %.9g\n%s_count %" PRIu64 "\n", name, (double)total_ns / 1e9, name, sum);
}
