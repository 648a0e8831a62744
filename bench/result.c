/* result.c: see result.h. */
#include "bench/result.h"

#include "base/status.h"

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

int
result_options(result_options_t *options, int argc, char **argv)
{
    int left = 1;

    *options = (result_options_t){0};
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--quick") == 0) {
            options->quick = true;
        } else if (strcmp(argv[i], "--json") == 0 && i + 1 < argc) {
            options->file = fopen(argv[++i], "w");
            if (options->file == NULL) {
                perror(argv[i]);
                exit(2);
            }
        } else {
            argv[left++] = argv[i];
        }
    }
    return left;
}

void
result_json(const result_options_t *options, const char *bench, const char *format, ...)
{
    va_list args;

    if (options->file == NULL) {
        return;
    }
    fprintf(options->file, "{\"bench\":\"%s\",", bench);
    va_start(args, format);
    vfprintf(options->file, format, args);
    va_end(args);
    fprintf(options->file, "}\n");
    fflush(options->file);
}

void
result_text(const char *sentence, char text[256])
{
    uint32_t n = 0;

    for (const char *c = sentence; *c != '\0' && n < 255; c++) {
        text[n++] = *c == '"' || *c == '\\' ? '\'' : (unsigned char)*c < ' ' ? ' ' : *c;
    }
    text[n] = '\0';
}

void
result_must(attn_status_t status)
{
    if (status != ATTN_OK) {
        fprintf(stderr, "%s\n", attn_last_error());
        exit(1);
    }
}

static int
by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

double
result_quantile(double *samples, uint64_t n, double q)
{
    if (n == 0) {
        return 0;
    }
    qsort(samples, n, sizeof(*samples), by_value);
    return samples[(uint64_t)(q * (double)(n - 1) + 0.5)];
}
