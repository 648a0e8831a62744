/*
 * attnctl_explain.c: `attnctl explain`: what a layer of a batch would take, by where its answers
 * are merged, which place is taken and why. The figures are the library's (attn_explain()); here
 * they are printed. With --measure real steps are taken beside them (attnctl_measure.c).
 */
#include "client/attnctl_explain.h"

#include "client/attnctl.h"
#include "client/attnctl_words.h"

#include <getopt.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define CHUNK_DEFAULT 2048u /* what workers take at most, where a cache does not say */

static const char usage[] =
    "usage: attnctl [--target HOST:PORT] [--tls-... FILE] explain [ID] [options]\n"
    "\n"
    "What a layer of a step would take, by where its answers are merged, and which is taken. "
    "Nothing\n"
    "is run: the figures are those of the cost model, with constants that were measured.\n"
    "\n"
    "  ID                      a sequence, of --cache\n"
    "  --cache NAME            a cache that is open; without one, of a shape:\n"
    "  --heads N --kv-heads N --head-dim N --dtype f32|f16|bf16 --chunk N\n"
    "                          (32, 8, 128, bf16, 0: the backend's default)\n"
    "  --tokens N,...          of each sequence, without ID (131072)\n"
    "  --rows N,...            query rows of each (1)\n"
    "  --new N                 new tokens of each (0)\n"
    "  --sequences N           alike, in one step (1)\n"
    "  --merging auto|client|group\n"
    "                          what the client's options say of workers that merge among\n"
    "                          themselves (client)\n"
    "  --measure               take such steps, of one sequence that is whole and of one that is\n"
    "                          spread, over each transport, and print what they took beside it\n"
    "  --ms N                  of measuring each (300)\n"
    "  --dev N                 start `attnd dev --workers N` for it, and end it\n"
    "  --attnd PATH            for --dev; default: beside attnctl\n"
    "  --json                  one JSON object a line\n"
    "\n"
    "Exit codes: 0 fine; 1 the cluster failed, or the sequence lost tokens; 2 wrong arguments.\n";

/* ---- options ---- */

enum {
    CACHE = 256, /* 1 is a word that is no option */
    HEADS,
    KV_HEADS,
    HEAD_DIM,
    DTYPE,
    CHUNK,
    TOKENS,
    ROWS,
    NEW,
    SEQUENCES,
    MERGING,
    MEASURE,
    MS,
    DEV,
    ATTND,
    JSON,
    TARGET,
    HELP
};

static const struct option options[] = {
    {"cache", required_argument, NULL, CACHE},
    {"heads", required_argument, NULL, HEADS},
    {"kv-heads", required_argument, NULL, KV_HEADS},
    {"head-dim", required_argument, NULL, HEAD_DIM},
    {"dtype", required_argument, NULL, DTYPE},
    {"chunk", required_argument, NULL, CHUNK},
    {"tokens", required_argument, NULL, TOKENS},
    {"rows", required_argument, NULL, ROWS},
    {"new", required_argument, NULL, NEW},
    {"sequences", required_argument, NULL, SEQUENCES},
    {"merging", required_argument, NULL, MERGING},
    {"measure", no_argument, NULL, MEASURE},
    {"ms", required_argument, NULL, MS},
    {"dev", required_argument, NULL, DEV},
    {"attnd", required_argument, NULL, ATTND},
    {"json", no_argument, NULL, JSON},
    {"target", required_argument, NULL, TARGET},
    {"help", no_argument, NULL, HELP},
    {NULL, 0, NULL, 0},
};

static bool
take_list(const char *text, uint32_t most, explain_list_t *list)
{
    uint64_t n;

    *list = (explain_list_t){0};
    while (list->n < EXPLAIN_VALUES_MAX && attnctl_number_at(text, &text, 1, most, &n)) {
        list->at[list->n++] = (uint32_t)n;
        if (*text != ',') {
            return *text == '\0';
        }
        text++;
    }
    return false;
}

static bool
take_number(explain_options_t *o, int option, const char *text)
{
    const attnctl_limits_t numbers[] = {{HEADS, &o->heads, 1, 256},
                                        {KV_HEADS, &o->kv_heads, 1, 256},
                                        {HEAD_DIM, &o->head_dim, 32, 256},
                                        {CHUNK, &o->chunk, 0, 1u << 20},
                                        {NEW, &o->n_new, 0, 1u << 20},
                                        {SEQUENCES, &o->sequences, 1, 4096},
                                        {MS, &o->ms, 1, 60000},
                                        {DEV, &o->dev, 1, 64}};

    return attnctl_take_number(numbers, sizeof(numbers) / sizeof(numbers[0]), option, text);
}

static bool
take_option(explain_options_t *o, int option)
{
    switch (option) {
    case CACHE:
        o->cache = optarg;
        return true;
    case TARGET:
        o->target = optarg;
        return true;
    case ATTND:
        o->attnd = optarg;
        return true;
    case JSON:
        o->json = true;
        return true;
    case MEASURE:
        o->measure = true;
        return true;
    case DTYPE:
        return attnctl_dtype(optarg, &o->dtype);
    case MERGING:
        return explain_merging(optarg, &o->merging);
    case TOKENS:
        return take_list(optarg, 1u << 24, &o->tokens);
    case ROWS:
        return take_list(optarg, 4096, &o->rows);
    default:
        return take_number(o, option, optarg);
    }
}

/* @return -1, or the code to exit with */
static int
take_options(int argc, char **argv, explain_options_t *o)
{
    const char *id = NULL;
    int option;

    optind = 0; /* attnctl has looked at these already */
    while ((option = getopt_long(argc, argv, "-h", options, NULL)) != -1) {
        if (option == HELP || option == 'h') {
            fputs(usage, stdout);
            return ATTNCTL_OK;
        }
        if (option == 1 && id == NULL) {
            id = optarg;
        } else if (!take_option(o, option)) {
            fprintf(stderr,
                    "attnctl: explain: wrong option or value%s%s (see attnctl explain --help)\n",
                    optarg != NULL ? ": " : "", optarg != NULL ? optarg : "");
            return ATTNCTL_USAGE;
        }
    }
    bool is_id = id != NULL && attnctl_number(id, UINT64_MAX, &o->seq) && o->seq != 0;
    const char *mistake =
        id != NULL && !is_id             ? "a sequence's ID is a number above 0"
        : id != NULL && o->cache == NULL ? "a sequence is of a --cache"
        : id != NULL && (o->measure || o->dev > 0)
            ? "--measure and --dev take steps of a shape, not of a sequence"
        : o->cache != NULL && o->dev > 0    ? "a cluster that --dev starts has no --cache"
        : o->heads % o->kv_heads != 0       ? "--heads is a multiple of --kv-heads"
        : o->heads * o->head_dim > 1u << 15 ? "--heads times --head-dim: at most 32768"
        : o->measure && o->merging == ATTN_MERGING_AUTO
            ? "--measure takes steps that merge in one place: --merging client or group"
        : o->measure && (o->sequences > 1 || o->n_new > 0)
            ? "--measure is of one sequence, and of nothing new"
            : NULL;
    if (mistake != NULL) {
        fprintf(stderr, "attnctl: explain: %s (see attnctl explain --help)\n", mistake);
        return ATTNCTL_USAGE;
    }
    return -1;
}

/* ---- what is printed ---- */

const char *
explain_place(attn_merge_place_t place)
{
    static const char *const names[] = {[ATTN_MERGE_LOCAL]       = "local",
                                        [ATTN_MERGE_GROUP]       = "group",
                                        [ATTN_MERGE_CLIENT]      = "client",
                                        [ATTN_MERGE_COORDINATOR] = "coordinator"};

    return names[place];
}

bool
explain_merging(const char *name, attn_merging_t *merging)
{
    static const char *const names[] = {[ATTN_MERGING_AUTO]   = "auto",
                                        [ATTN_MERGING_CLIENT] = "client",
                                        [ATTN_MERGING_GROUP]  = "group"};

    for (int i = ATTN_MERGING_AUTO; i <= ATTN_MERGING_GROUP; i++) {
        if (strcmp(name, names[i]) == 0) {
            *merging = (attn_merging_t)i;
            return true;
        }
    }
    return false;
}

const char *
explain_over(const attn_way_t *way)
{
    return way->transport[0] != '\0' ? way->transport : "clients";
}

static const char *
break_even(const attn_way_t *way, char text[32])
{
    if (way->break_even_tokens == UINT64_MAX) {
        return "never";
    }
    snprintf(text, 32, "%" PRIu64, way->break_even_tokens);
    return text;
}

static void
print_costs(const attn_explanation_t *x)
{
    printf("%-12s %7s %-8s %9s %9s %9s %9s %9s %9s %10s\n", "place", "workers", "over", "attend",
           "read", "compute", "hop", "link", "merge", "total us");
    for (uint32_t i = 0; i < x->n_costs; i++) {
        const attn_cost_t *c = &x->costs[i];
        if (!c->available) {
            printf("%-12s not available: %s\n", explain_place(c->place), c->reason);
            continue;
        }
        printf("%-12s %7u %-8s %9.1f %9.1f %9.1f %9.1f %9.1f %9.1f %10.1f%s%s",
               explain_place(c->place), c->workers, explain_over(&x->ways[c->way]), 1e6 * c->attend,
               1e6 * c->read, 1e6 * c->compute, 1e6 * c->hop, 1e6 * c->link, 1e6 * c->merge,
               1e6 * c->total, c->taken ? "  taken" : "", c->cheapest ? "  cheapest" : "");
        bool refused = c->place == ATTN_MERGE_GROUP && !c->taken && c->reason[0] != '\0';
        printf("%s%s\n", refused ? "  not taken: " : "", refused ? c->reason : "");
    }
}

static bool
has_group(const attn_explanation_t *x)
{
    bool has = false;

    for (uint32_t i = 0; i < x->n_costs; i++) {
        has = has || (x->costs[i].place == ATTN_MERGE_GROUP && x->costs[i].available);
    }
    return has;
}

static void
print_table(const attn_geometry_t *g, const attn_explain_t *asked, const attn_explanation_t *x)
{
    char text[32];

    if (asked->seq.id != 0) {
        printf("sequence %" PRIu64 ": ", asked->seq.id);
    } else if (asked->sequences > 1) {
        printf("%u sequences of ", asked->sequences);
    }
    printf("%" PRIu64 " tokens, %u query rows, %u new; %u heads on %u of %u and %u, %s; %u "
           "workers\n\n",
           x->tokens, asked->n_q, asked->n_new, g->q_heads, g->kv_heads, g->head_dim_k,
           g->head_dim_v, attnctl_dtype_name(g->kv_dtype), x->workers);
    print_costs(x);
    for (uint32_t i = 0; i < x->n_costs; i++) {
        if (x->costs[i].taken) {
            printf("\ntaken: %s: %s\n", explain_place(x->costs[i].place), x->costs[i].reason);
        }
    }
    printf("\nwhole up to this many tokens:\n");
    for (uint32_t i = 0; i < x->n_ways; i++) {
        const attn_way_t *w = &x->ways[i];
        printf("%10s  over %s: hop %.1f us, of it sending %.1f, %.2f GB/s; by %s\n",
               break_even(w, text), explain_over(w), 1e6 * w->hop_seconds, 1e6 * w->send_seconds,
               1e-9 * w->link_bandwidth, w->source);
    }
    if (has_group(x)) {
        printf("workers that merge among themselves exchange in %.1f us, and %.1f for each other "
               "one, at %.2f GB/s; %s\n",
               1e6 * x->exchange_seconds, 1e6 * x->exchange_peer_seconds,
               1e-9 * x->exchange_bandwidth,
               x->exchange_measured ? "by this client's groups" : "assumed");
    }
    printf(
        "the slowest worker reads %.2f GB/s, begins in %.1f us, computes %.1f GFLOP/s; the client "
        "merges %.2f GB/s\n\n",
        1e-9 * x->read_bandwidth, 1e6 * x->attend_seconds, 1e-9 * x->flops,
        1e-9 * x->merge_bandwidth);
    fflush(stdout);
}

static void
add_costs(cJSON *object, const attn_explanation_t *x)
{
    cJSON *costs = cJSON_AddArrayToObject(object, "costs");

    for (uint32_t i = 0; i < x->n_costs; i++) {
        const attn_cost_t *c = &x->costs[i];
        cJSON *item          = cJSON_CreateObject();
        cJSON_AddStringToObject(item, "place", explain_place(c->place));
        cJSON_AddBoolToObject(item, "available", c->available);
        cJSON_AddStringToObject(item, "reason", c->reason);
        if (c->available) {
            const struct {
                const char *name;
                double seconds;
            } parts[] = {{"attend", c->attend}, {"read", c->read}, {"compute", c->compute},
                         {"hop", c->hop},       {"link", c->link}, {"merge", c->merge},
                         {"total", c->total}};
            cJSON_AddBoolToObject(item, "taken", c->taken);
            cJSON_AddBoolToObject(item, "cheapest", c->cheapest);
            cJSON_AddNumberToObject(item, "workers", c->workers);
            cJSON_AddNumberToObject(item, "way", c->way);
            for (size_t p = 0; p < sizeof(parts) / sizeof(parts[0]); p++) {
                cJSON_AddNumberToObject(item, parts[p].name, parts[p].seconds);
            }
        }
        cJSON_AddItemToArray(costs, item);
    }
}

static void
print_json(const attn_explain_t *asked, const attn_explanation_t *x)
{
    cJSON *object = cJSON_CreateObject();

    attnctl_json_u64(object, "seq", asked->seq.id);
    attnctl_json_u64(object, "tokens", x->tokens);
    cJSON_AddNumberToObject(object, "rows", asked->n_q);
    cJSON_AddNumberToObject(object, "new", asked->n_new);
    cJSON_AddNumberToObject(object, "sequences", asked->sequences);
    cJSON_AddNumberToObject(object, "workers", x->workers);
    cJSON_AddNumberToObject(object, "read_bandwidth", x->read_bandwidth);
    cJSON_AddNumberToObject(object, "attend_seconds", x->attend_seconds);
    cJSON_AddNumberToObject(object, "flops", x->flops);
    cJSON_AddNumberToObject(object, "merge_bandwidth", x->merge_bandwidth);
    cJSON_AddNumberToObject(object, "exchange_seconds", x->exchange_seconds);
    cJSON_AddNumberToObject(object, "exchange_peer_seconds", x->exchange_peer_seconds);
    cJSON_AddNumberToObject(object, "exchange_bandwidth", x->exchange_bandwidth);
    cJSON_AddBoolToObject(object, "exchange_measured", x->exchange_measured);
    cJSON *ways = cJSON_AddArrayToObject(object, "ways");
    for (uint32_t i = 0; i < x->n_ways; i++) {
        const attn_way_t *w = &x->ways[i];
        cJSON *item         = cJSON_CreateObject();
        cJSON_AddStringToObject(item, "transport", w->transport);
        cJSON_AddStringToObject(item, "source", w->source);
        cJSON_AddNumberToObject(item, "hop_seconds", w->hop_seconds);
        cJSON_AddNumberToObject(item, "send_seconds", w->send_seconds);
        cJSON_AddNumberToObject(item, "link_bandwidth", w->link_bandwidth);
        if (w->break_even_tokens != UINT64_MAX) {
            attnctl_json_u64(item, "break_even_tokens", w->break_even_tokens);
        } else {
            cJSON_AddNullToObject(item, "break_even_tokens"); /* never */
        }
        cJSON_AddItemToArray(ways, item);
    }
    add_costs(object, x);
    attnctl_json_print(object);
}

/* ---- explaining ---- */

attn_status_t
explain_shape(const explain_options_t *o, attn_client_t *client, attn_geometry_t *g)
{
    attn_cache_t *named;

    attn_geometry_init(g);
    if (o->cache == NULL) {
        g->q_heads    = o->heads;
        g->kv_heads   = o->kv_heads;
        g->head_dim_k = g->head_dim_v = o->head_dim;
        g->kv_dtype                   = o->dtype;
        g->chunk_size                 = o->chunk;
    } else {
        attn_status_t status = attn_cache_open(client, o->cache, NULL, &named);
        if (status != ATTN_OK) {
            return status;
        }
        *g             = *attn_cache_geometry(named);
        g->layer_table = NULL;
        attn_cache_close(named);
    }
    g->layers = 1;
    return ATTN_OK;
}

#define CHUNKS_BESIDE 4u /* room for what is stored besides */
#define BEYOND_CACHES (UINT64_C(64) << 20)
#define LAYERS_MOST 32u

attn_status_t
explain_cache(const explain_options_t *o, attn_client_t *client, attn_placement_t placement,
              uint64_t tokens, char name[64], attn_cache_t **cache_p)
{
    struct timespec now;
    attn_geometry_t g;
    attn_status_t status = explain_shape(o, client, &g);

    if (status != ATTN_OK) {
        return status;
    }
    clock_gettime(CLOCK_REALTIME, &now);
    snprintf(name, 64, "explain/%d-%lld-%ld", (int)getpid(), (long long)now.tv_sec, now.tv_nsec);
    uint64_t chunk = g.chunk_size > 0 ? g.chunk_size : CHUNK_DEFAULT;
    uint64_t row_bytes =
        (uint64_t)g.kv_heads * (g.head_dim_k + g.head_dim_v) * (g.kv_dtype == ATTN_F32 ? 4 : 2);
    g.placement = placement;
    if (tokens > 0) {
        uint64_t layers = BEYOND_CACHES / (tokens * row_bytes) + 1;
        g.layers        = layers < LAYERS_MOST ? (uint32_t)layers : LAYERS_MOST;
    }
    g.region_bytes = (tokens > 0 ? tokens + CHUNKS_BESIDE * chunk : chunk) * row_bytes * g.layers;
    return attn_cache_open(client, name, &g, cache_p);
}

static attn_status_t
explain_each(const explain_options_t *o, attn_cache_t *cache)
{
    attn_explanation_t x;
    attn_status_t status = ATTN_OK;
    uint32_t lengths     = o->seq != 0 ? 1 : o->tokens.n;

    for (uint32_t t = 0; t < lengths && status == ATTN_OK; t++) {
        for (uint32_t r = 0; r < o->rows.n && status == ATTN_OK; r++) {
            attn_explain_t asked = {.size      = sizeof(asked),
                                    .seq       = {o->seq},
                                    .tokens    = o->tokens.at[t],
                                    .n_q       = o->rows.at[r],
                                    .n_new     = o->n_new,
                                    .sequences = o->sequences};
            status               = attn_explain(cache, &asked, &x);
            if (status == ATTN_OK && o->json) {
                print_json(&asked, &x);
            } else if (status == ATTN_OK) {
                print_table(attn_cache_geometry(cache), &asked, &x);
            }
        }
    }
    return status;
}

static attn_status_t
explain(const explain_options_t *o)
{
    attn_client_t *client;
    attn_cache_t *cache = NULL;
    char name[64];
    attn_status_t status = attn_client_open(o->target, o->client, &client);

    if (status != ATTN_OK) {
        return status;
    }
    status = o->cache != NULL ? attn_cache_open(client, o->cache, NULL, &cache)
                              : explain_cache(o, client, ATTN_PLACE_AUTO, 0, name, &cache);
    if (status == ATTN_OK) {
        status = explain_each(o, cache);
        attn_cache_close(cache);
    }
    attn_client_close(client);
    return status;
}

#define PINGS_MS 3000u
#define LOOK_MS 50u

/* A cluster that has just begun: until the coordinator has measured its way to all workers. */
static void
wait_for_pings(const explain_options_t *o)
{
    attn_client_t *client;
    bool known = false;

    if (attn_client_open(o->target, o->client, &client) != ATTN_OK) {
        return; /* who goes on to use the cluster will say it */
    }
    for (uint32_t ms = 0; !known && ms < PINGS_MS; ms += LOOK_MS) {
        attn_cluster_info_t info = {0};
        known                    = attn_cluster_describe(client, &info) == ATTN_OK;
        for (uint32_t i = 0; known && i < info.n_workers; i++) {
            known = info.workers[i].hop_seconds > 0;
        }
        known = known && info.n_workers == o->dev;
        attn_cluster_info_free(&info);
        nanosleep(&(struct timespec){.tv_nsec = LOOK_MS * 1000000}, NULL);
    }
    attn_client_close(client);
}

int
attnctl_explain(int argc, char **argv, const char *target, const attn_client_options_t *all)
{
    attn_client_options_t client = *all;
    explain_options_t o          = {.target    = target,
                                    .tokens    = {1, {131072}},
                                    .rows      = {1, {1}},
                                    .sequences = 1,
                                    .heads     = 32,
                                    .kv_heads  = 8,
                                    .head_dim  = 128,
                                    .dtype     = ATTN_BF16,
                                    .ms        = 300,
                                    .merging   = ATTN_MERGING_CLIENT,
                                    .client    = &client};
    char address[64];
    int pid = -1, code = take_options(argc, argv, &o);

    if (code >= 0) {
        return code;
    }
    client.name    = "attnctl explain";
    client.merging = o.merging;
    if (o.dev > 0) {
        pid = bench_dev_start(&(bench_options_t){.dev = o.dev, .attnd = o.attnd}, address);
        if (pid < 0) {
            return ATTNCTL_PROBLEM;
        }
        o.target = address;
        wait_for_pings(&o);
    }
    attn_status_t status = o.measure ? explain_measure(&o) : explain(&o);
    if (status != ATTN_OK) {
        fprintf(stderr, "attnctl: explain: %s: %s (%s)\n", o.target, attn_last_error(),
                attn_strerror(status));
        code = status == ATTN_ERR_INVALID || status == ATTN_ERR_UNSUPPORTED ? ATTNCTL_USAGE
                                                                            : ATTNCTL_PROBLEM;
    }
    if (pid >= 0) {
        bench_dev_stop(pid);
    }
    return code >= 0 ? code : ATTNCTL_OK;
}
