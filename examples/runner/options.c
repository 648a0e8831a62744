#include "options.h"

#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "failure.h"

const char options_help[] =
    "usage: runner --model FILE.gguf [option ...] --prompt TEXT\n"
    "       runner --model FILE.gguf [option ...] --prompt-file FILE [--question TEXT]\n"
    "\n"
    "Generate text with a model of the Llama architecture whose attention runs in\n"
    "attnd. The runner keeps no KV: it lives where the targets say.\n"
    "\n"
    "  --model FILE         a GGUF file with F32, F16, Q8_0 or Q4_1 tensors\n"
    "  --target TARGET      HOST:PORT of a coordinator, or inproc://cpu (or cuda:0) for attention\n"
    "                       inside this process (the default); up to 8 of them run the\n"
    "                       prompt one after the other, and their answers are compared\n"
    "  --prompt TEXT        what to say to the model\n"
    "  --prompt-file FILE   a document to say instead\n"
    "  --question TEXT      a question to put behind the document\n"
    "  --no-template        give the model the bare text, without the chat template\n"
    "  --max-tokens N       generate at most N tokens, 0 to 1,000,000 (128)\n"
    "  --batch TOKENS       pass the prompt in pieces of so many, 1 to 8,192 (512)\n"
    "  --kv-dtype TYPE      of the cache: f16 (the default), bf16 or f32\n"
    "  --page TOKENS        page size of the cache, 1 to 256 (libattn's default)\n"
    "  --chunk TOKENS       chunk size, a power of two from 256 on (libattn's default)\n"
    "  --spread             put every chunk on another worker\n"
    "  --digest             print a digest of every bit that attention answered\n"
    "  --logits FILE        write the logits of every prompt position, as floats\n"
    "  --quiet              print the text, its tokens and the digest only\n"
    "  --help               print this\n";

enum {
    OPT_MODEL = 256,
    OPT_TARGET,
    OPT_PROMPT,
    OPT_PROMPT_FILE,
    OPT_QUESTION,
    OPT_NO_TEMPLATE,
    OPT_MAX_TOKENS,
    OPT_BATCH,
    OPT_KV_DTYPE,
    OPT_PAGE,
    OPT_CHUNK,
    OPT_SPREAD,
    OPT_DIGEST,
    OPT_LOGITS,
    OPT_QUIET,
    OPT_HELP
};

static const struct option table[] = {
    {"model", required_argument, NULL, OPT_MODEL},
    {"target", required_argument, NULL, OPT_TARGET},
    {"prompt", required_argument, NULL, OPT_PROMPT},
    {"prompt-file", required_argument, NULL, OPT_PROMPT_FILE},
    {"question", required_argument, NULL, OPT_QUESTION},
    {"no-template", no_argument, NULL, OPT_NO_TEMPLATE},
    {"max-tokens", required_argument, NULL, OPT_MAX_TOKENS},
    {"batch", required_argument, NULL, OPT_BATCH},
    {"kv-dtype", required_argument, NULL, OPT_KV_DTYPE},
    {"page", required_argument, NULL, OPT_PAGE},
    {"chunk", required_argument, NULL, OPT_CHUNK},
    {"spread", no_argument, NULL, OPT_SPREAD},
    {"digest", no_argument, NULL, OPT_DIGEST},
    {"logits", required_argument, NULL, OPT_LOGITS},
    {"quiet", no_argument, NULL, OPT_QUIET},
    {"help", no_argument, NULL, OPT_HELP},
    {NULL, 0, NULL, 0},
};

static bool
parse_number(const char *name, const char *text, uint32_t min, uint32_t max, uint32_t *number)
{
    char *end;

    errno           = 0;
    long long value = strtoll(text, &end, 10);
    if (errno != 0 || end == text || *end != 0 || value < min || value > max) {
        return failure("--%s is '%s'; %" PRIu32 " to %" PRIu32 " is allowed", name, text, min, max);
    }
    *number = (uint32_t)value;
    return true;
}

static bool
parse_dtype(const char *text, attn_dtype_t *dtype)
{
    *dtype = strcmp(text, "f16") == 0    ? ATTN_F16
             : strcmp(text, "bf16") == 0 ? ATTN_BF16
             : strcmp(text, "f32") == 0  ? ATTN_F32
                                         : ATTN_DTYPE_NONE;
    return *dtype != ATTN_DTYPE_NONE ||
           failure("--kv-dtype is '%s'; f16, bf16 and f32 are allowed", text);
}

static bool
add_target(options_t *o, const char *target)
{
    if (o->n_targets == TARGETS_MAX) {
        return failure("more than %d times --target", TARGETS_MAX);
    }
    o->targets[o->n_targets++] = target;
    return true;
}

/** --prompt and --question fill the same place: what is said last. */
static bool
set_question(options_t *o, const char *text, bool alone)
{
    if (o->question || (alone && o->prompt_file)) {
        return failure("--prompt and --question go once, and --prompt goes without --prompt-file");
    }
    o->question = text;
    o->alone    = alone;
    return true;
}

static bool
set_document(options_t *o, const char *path)
{
    if (o->prompt_file || o->alone) {
        return failure("--prompt-file goes once, and without --prompt");
    }
    o->prompt_file = path;
    return true;
}

static bool
parse_option(int option, const char *argument, options_t *o)
{
    switch (option) {
    case OPT_MODEL:
        o->model = argument;
        return true;
    case OPT_TARGET:
        return add_target(o, argument);
    case OPT_PROMPT:
        return set_question(o, argument, true);
    case OPT_QUESTION:
        return set_question(o, argument, false);
    case OPT_PROMPT_FILE:
        return set_document(o, argument);
    case OPT_NO_TEMPLATE:
        o->no_template = true;
        return true;
    case OPT_MAX_TOKENS:
        return parse_number("max-tokens", argument, 0, 1000000, &o->max_tokens);
    case OPT_BATCH:
        return parse_number("batch", argument, 1, 8192, &o->batch);
    case OPT_KV_DTYPE:
        return parse_dtype(argument, &o->shape.kv_dtype);
    case OPT_PAGE:
        return parse_number("page", argument, 1, 256, &o->shape.page);
    case OPT_CHUNK:
        return parse_number("chunk", argument, 256, 1u << 20, &o->shape.chunk);
    case OPT_SPREAD:
        o->shape.spread = true;
        return true;
    case OPT_DIGEST:
        o->digest = true;
        return true;
    case OPT_LOGITS:
        o->logits = argument;
        return true;
    case OPT_QUIET:
        o->quiet = true;
        return true;
    default:
        return failure("see runner --help");
    }
}

static bool
check(options_t *o)
{
    if (!o->model) {
        return failure("--model is missing; see runner --help");
    }
    if (!o->question && !o->prompt_file) {
        return failure("--prompt or --prompt-file is missing; see runner --help");
    }
    if (o->n_targets == 0) {
        o->targets[o->n_targets++] = "inproc://cpu";
    }
    if (o->logits && o->n_targets > 1) {
        return failure("--logits goes with one --target");
    }
    return true;
}

bool
options_parse(int argc, char **argv, options_t *options, bool *help)
{
    int option;

    *help    = false;
    *options = (options_t){.max_tokens = 128, .batch = 512, .shape.kv_dtype = ATTN_F16};
    while ((option = getopt_long(argc, argv, "", table, NULL)) != -1) {
        if (option == OPT_HELP) {
            *help = true;
            return true;
        }
        if (!parse_option(option, optarg, options)) {
            return false;
        }
    }
    if (optind < argc) {
        return failure("'%s' is no option; see runner --help", argv[optind]);
    }
    return check(options);
}
