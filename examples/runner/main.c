/*
 * runner: text generation with a Llama model whose attention runs in attnd.
 *
 *   gguf, quant, half            the model's file
 *   tokenizer, words, unicode    text to tokens and back
 *   llama, forward               the model, without attention
 *   multiply, pool               matrix products on all cores
 *   session                      libattn: client, cache, sequence, steps
 *   prompt, options, report, meter, failure
 *
 * Begin with session.c, then attend() in forward.c; then run_target() below.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "failure.h"
#include "options.h"
#include "prompt.h"
#include "report.h"

#define EXIT_USAGE 2
#define EXIT_INTERRUPTED 130

/* What all targets share. */
typedef struct runner {
    options_t options;
    gguf_t *gguf;
    tokenizer_t *tokenizer;
    llama_t *model;
    tokens_t prompt;
    float *logits; /* [vocab] */
    FILE *logits_file;
} runner_t;

/* What one target answered. */
typedef struct answer {
    tokens_t tokens;
    uint64_t digest;
    phase_t prompt, generation;
} answer_t;

/* ---- one target ---- */

/** --logits: what each position of this piece of the prompt predicts. */
static bool
write_logits(runner_t *r, const forward_t *f, uint32_t n)
{
    size_t vocab = r->model->config.vocab;

    for (uint32_t row = 0; row < n; row++) {
        forward_logits(f, row, r->logits);
        if (fwrite(r->logits, sizeof(float), vocab, r->logits_file) != vocab) {
            return failure("%s: %s", r->options.logits, strerror(errno));
        }
    }
    return true;
}

/** Pass the prompt in pieces. Only the last position's logits are of use. */
static bool
read_prompt(runner_t *r, session_t *s, forward_t *f, phase_t *phase)
{
    uint64_t start = now_ns();
    uint32_t n     = 0;

    for (size_t at = 0; at < r->prompt.n; at += n) {
        size_t left = r->prompt.n - at;
        n           = left < f->batch ? (uint32_t)left : f->batch;
        if (!session_pass(s, f, r->prompt.ids + at, n, &phase->runs)) {
            return false;
        }
        if (r->logits_file && !write_logits(r, f, n)) {
            return false;
        }
        if (!r->options.quiet) {
            report_progress(at + n, r->prompt.n);
        }
    }
    forward_logits(f, n - 1, r->logits);
    phase->tokens = r->prompt.n;
    phase->ns     = now_ns() - start;
    return true;
}

/** Greedy: the likeliest token, which is printed and passed, until one ends the message. */
static bool
generate(runner_t *r, session_t *s, forward_t *f, answer_t *answer)
{
    uint32_t vocab    = r->model->config.vocab;
    meter_t *runs     = &answer->generation.runs;
    printer_t printer = {.n = 0};
    uint64_t start    = now_ns();
    bool ok           = true;

    while (ok && answer->tokens.n < r->options.max_tokens) {
        uint32_t id = greedy(r->logits, vocab);
        if (tokenizer_is_control(r->tokenizer, id)) {
            break;
        }
        printer_put(&printer, r->tokenizer, id);
        ok = tokens_add(&answer->tokens, id) && session_pass(s, f, &id, 1, runs);
        if (ok) {
            forward_logits(f, 0, r->logits);
        }
    }
    printer_end(&printer);
    putchar('\n');
    answer->generation.tokens = answer->tokens.n;
    answer->generation.ns     = now_ns() - start;
    return ok;
}

static void
print_tokens(const char *name, const tokens_t *tokens)
{
    printf("%s:", name);
    for (size_t i = 0; i < tokens->n; i++) {
        printf(" %" PRIu32, tokens->ids[i]);
    }
    putchar('\n');
}

static bool
run_session(runner_t *r, session_t *s, const char *target, answer_t *answer)
{
    forward_t f;

    if (!forward_create(&f, r->model, r->options.batch, r->options.shape.kv_dtype)) {
        return false;
    }
    f.digesting    = r->options.digest || r->options.n_targets > 1;
    bool ok        = read_prompt(r, s, &f, &answer->prompt) && generate(r, s, &f, answer);
    answer->digest = f.digest;
    if (ok) {
        print_tokens("tokens", &answer->tokens);
        if (f.digesting) {
            printf("digest: %016" PRIx64 "\n", f.digest);
        }
        ok = r->options.quiet || report_table(s, target, &answer->prompt, &answer->generation);
    }
    fflush(stdout);
    forward_destroy(&f);
    return ok;
}

static bool
run_target(runner_t *r, const char *target, answer_t *answer)
{
    uint64_t expected = (uint64_t)r->prompt.n + r->options.max_tokens;
    session_t s;

    if (!session_open(&s, target, &r->options.shape, &r->model->config, expected)) {
        return false;
    }
    bool ok = run_session(r, &s, target, answer);
    session_close(&s);
    return ok;
}

/* ---- all targets ---- */

static bool
same_answer(const answer_t *a, const answer_t *b)
{
    return a->digest == b->digest && a->tokens.n == b->tokens.n &&
           (a->tokens.n == 0 ||
            memcmp(a->tokens.ids, b->tokens.ids, a->tokens.n * sizeof(*a->tokens.ids)) == 0);
}

static bool
run_targets(runner_t *r)
{
    const options_t *o            = &r->options;
    answer_t answers[TARGETS_MAX] = {0};
    bool ok                       = true;

    for (uint32_t i = 0; ok && i < o->n_targets; i++) {
        ok = run_target(r, o->targets[i], &answers[i]);
        if (ok && i > 0 && !same_answer(&answers[0], &answers[i])) {
            ok = failure("%s and %s gave different answers", o->targets[0], o->targets[i]);
        }
    }
    if (ok && o->n_targets > 1) {
        printf("\nall %" PRIu32 " targets: the same tokens, and the same bits of attention\n",
               o->n_targets);
    }
    for (uint32_t i = 0; i < o->n_targets; i++) {
        free(answers[i].tokens.ids);
        free(answers[i].prompt.runs.ns);
        free(answers[i].generation.runs.ns);
    }
    return ok;
}

/* ---- start and end ---- */

static bool
load_model(runner_t *r)
{
    uint64_t start = now_ns();

    r->gguf      = gguf_open(r->options.model);
    r->tokenizer = r->gguf ? tokenizer_create(r->gguf) : NULL;
    r->model     = r->tokenizer ? llama_load(r->gguf) : NULL;
    if (!r->model) {
        return false;
    }
    const llama_config_t *c = &r->model->config;
    if (tokenizer_size(r->tokenizer) != c->vocab) {
        return failure("%" PRIu32 " tokens have an embedding, and %" PRIu32 " a text", c->vocab,
                       tokenizer_size(r->tokenizer));
    }
    r->logits = malloc(c->vocab * sizeof(float));
    if (!r->logits) {
        return failure("out of memory");
    }
    if (!r->options.quiet) {
        fprintf(stderr,
                "model: %" PRIu32 " layers, %" PRIu32 " query heads, %" PRIu32
                " KV heads of %" PRIu32 ", loaded in %.1f s\n",
                c->layers, c->heads, c->kv_heads, c->head_dim, (double)(now_ns() - start) / 1e9);
    }
    return true;
}

static bool
load_prompt(runner_t *r)
{
    const options_t *o = &r->options;
    uint32_t context   = r->model->config.context;
    char *document     = o->prompt_file ? read_text(o->prompt_file) : NULL;

    if (o->prompt_file && !document) {
        return false;
    }
    bool ok = make_prompt(r->tokenizer, document, o->question, !o->no_template, &r->prompt);
    free(document);
    if (!ok) {
        return false;
    }
    if (r->prompt.n == 0) {
        return failure("the prompt is empty");
    }
    if (r->prompt.n + o->max_tokens > context) {
        return failure("%zu tokens of prompt and %" PRIu32 " to generate are more than the model's "
                       "context of %" PRIu32,
                       r->prompt.n, o->max_tokens, context);
    }
    if (o->logits) {
        print_tokens("prompt tokens", &r->prompt);
        r->logits_file = fopen(o->logits, "wb");
        return r->logits_file || failure("%s: %s", o->logits, strerror(errno));
    }
    return true;
}

static bool
unload(runner_t *r)
{
    bool ok = !r->logits_file || fclose(r->logits_file) == 0 ||
              failure("%s: %s", r->options.logits, strerror(errno));

    free(r->logits);
    free(r->prompt.ids);
    llama_destroy(r->model);
    tokenizer_destroy(r->tokenizer);
    gguf_close(r->gguf);
    return ok;
}

static void
on_interrupt(int signal)
{
    (void)signal;
    forward_stop = 1;
}

int
main(int argc, char **argv)
{
    /* The second interrupt kills, should the first find no way to end in time. */
    const struct sigaction interrupt = {.sa_handler = on_interrupt, .sa_flags = (int)SA_RESETHAND};
    runner_t r                       = {0};
    bool help;

    if (!options_parse(argc, argv, &r.options, &help)) {
        fprintf(stderr, "runner: %s\n", failure_text());
        return EXIT_USAGE;
    }
    if (help) {
        fputs(options_help, stdout);
        return EXIT_SUCCESS;
    }
    sigaction(SIGINT, &interrupt, NULL);
    bool ok = load_model(&r) && load_prompt(&r) && run_targets(&r);
    ok      = unload(&r) && ok;
    if (!ok) {
        fprintf(stderr, "runner: %s\n", failure_text());
        return forward_stop ? EXIT_INTERRUPTED : EXIT_FAILURE;
    }
    return EXIT_SUCCESS;
}
