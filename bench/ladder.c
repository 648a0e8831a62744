/* ladder.c: see ladder.h. */
#include "bench/ladder.h"

#include "base/clock.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

void
samples_take(samples_t *s, uint64_t ns)
{
    s->us[s->n++] = (double)ns / 1e3;
}

samples_t
samples_of(uint32_t steps)
{
    return (samples_t){.us = calloc((uint64_t)steps * LADDER_LAYERS, sizeof(double))};
}

double
samples_p50(samples_t *s)
{
    return result_quantile(s->us, s->n, 0.5);
}

attn_client_options_t
side_options(attn_transport_t transport)
{
    attn_client_options_t options;

    attn_client_options_init(&options);
    options.spin_us   = LADDER_SPIN_US;
    options.transport = transport;
    return options;
}

void
side_open(side_t *side, const char *name, const char *target, const shape_t *shape, uint32_t length,
          const attn_client_options_t *options, uint32_t steps)
{
    shape_t prompt = *shape;

    prompt.rows = length;
    *side       = (side_t){.name = name, .net = samples_of(steps), .computed = samples_of(steps)};
    ours_open(&side->ours, target, &prompt, LADDER_LAYERS, options, LADDER_CHUNK,
              ATTN_PLACE_SPREAD);
    ours_append(&side->ours);
    ours_reshape(&side->ours, 1);
}

void
side_close(side_t *side)
{
    if (side->direct != NULL) {
        direct_close(side->direct);
    }
    ours_close(&side->ours);
    free(side->net.us);
    free(side->computed.us);
}

void
side_turn(side_t *side)
{
    attn_step_t *step = ours_begin(&side->ours);

    for (uint32_t l = 0; l < LADDER_LAYERS; l++) {
        uint64_t start   = attn_now_ns();
        uint64_t compute = ours_run(&side->ours, step, l, side->direct);
        uint64_t all     = attn_now_ns() - start;
        samples_take(&side->net, all > compute ? all - compute : 0);
        samples_take(&side->computed, compute);
    }
    attn_step_abort(step);
}

/* ---- telling ---- */

typedef struct line {
    double p50, p99, p999, computed, hop, send, bound, target; /* 0: none */
} line_t;

static void
tell(const result_options_t *options, const char *shape, const char *name, const line_t *l)
{
    double ratio = l->bound > 0 ? l->p50 / l->bound : 0;

    printf("%-7s %-24s | %8.2f %8.2f %8.2f |", shape, name, l->p50, l->p99, l->p999);
    if (l->computed > 0) {
        printf(" %8.2f", l->computed);
    }
    if (l->hop > 0) {
        printf(" | %6.2f %6.2f", l->hop, l->send);
    }
    if (l->target > 0) {
        printf(" | %.2fx the bare one, target %.1f: %s", ratio, l->target,
               ratio <= l->target ? "met" : "MISSED");
    }
    printf("\n");
    fflush(stdout);
    result_json(options, "latency",
                "\"case\":\"%s %s\",\"shape\":\"%s\",\"rung\":\"%s\",\"value\":%.3f,"
                "\"unit\":\"us\",\"p99\":%.3f,\"p999\":%.3f,\"computed\":%.3f,\"hop\":%.3f,"
                "\"send\":%.3f,\"bound\":%.3f,\"ratio\":%.3f,\"target\":%.2f",
                shape, name, shape, name, l->p50, l->p99, l->p999, l->computed, l->hop, l->send,
                l->bound, ratio, l->target);
}

static line_t
line_of(samples_t *s, samples_t *computed)
{
    return (line_t){.p50      = samples_p50(s),
                    .p99      = result_quantile(s->us, s->n, 0.99),
                    .p999     = result_quantile(s->us, s->n, 0.999),
                    .computed = computed != NULL ? samples_p50(computed) : 0};
}

void
rung_tell(const result_options_t *options, const char *shape, const char *name, samples_t *s,
          samples_t *computed)
{
    line_t line = line_of(s, computed);

    tell(options, shape, name, &line);
}

void
side_tell(const result_options_t *options, const char *shape, side_t *side, double bound,
          double target)
{
    attn_links_info_t info;

    if (side->why[0] != '\0') {
        rung_absent(options, shape, side->name, side->why);
        return;
    }
    line_t line = line_of(&side->net, &side->computed);
    line.bound = bound, line.target = target;
    if (side->direct == NULL && attn_client_links(side->ours.client, &info) == ATTN_OK) {
        for (uint32_t i = 0; i < info.n_links; i++) {
            line.hop  = fmax(line.hop, info.links[i].hop_seconds * 1e6);
            line.send = fmax(line.send, info.links[i].send_seconds * 1e6);
        }
        attn_links_info_free(&info);
    }
    tell(options, shape, side->name, &line);
}

void
rung_absent(const result_options_t *options, const char *shape, const char *name, const char *why)
{
    char text[256];

    result_text(why, text);
    printf("%-7s %-24s | left out: %s\n", shape, name, text);
    fflush(stdout);
    result_json(options, "latency",
                "\"case\":\"%s %s\",\"shape\":\"%s\",\"rung\":\"%s\",\"absent\":\"%s\"", shape,
                name, shape, name, text);
}
