#include "tokenizer.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "failure.h"
#include "unicode.h"
#include "words.h"

#define NONE UINT32_MAX
#define TOKENS_MAX (1u << 20)
#define TYPE_CONTROL 3 /* in tokenizer.ggml.token_type */

/* A pair of tokens that merge; slots of an open hash table. */
typedef struct merge {
    uint32_t left, right; /* left is NONE in a free slot */
    uint32_t rank, result;
} merge_t;

struct tokenizer {
    gguf_text_t *texts; /* [n], in the byte alphabet; they lie in the file */
    int32_t *types;     /* [n] */
    uint32_t n;
    uint32_t *by_text; /* open hash table of ids */
    uint32_t text_slots;
    merge_t *merges;
    uint32_t merge_slots;
    uint32_t byte_token[256]; /* NONE where the vocabulary has none */
    int16_t byte_of[512];     /* of a character of the byte alphabet; -1: none */
};

/* ---- the byte alphabet ---- */

/** GPT-2's printable character for a byte: itself where it is printable in Latin-1, and the
 * others, in their order, from U+0100 on. */
static uint32_t
byte_char(unsigned byte)
{
    uint32_t next = 0x100;

    for (unsigned b = 0;; b++) {
        bool printable = (b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
        if (b == byte) {
            return printable ? b : next;
        }
        next += !printable;
    }
}

/* ---- vocabulary: text to id ---- */

static uint64_t
hash_text(const char *head, size_t n_head, const char *tail, size_t n_tail)
{
    uint64_t hash = UINT64_C(0xcbf29ce484222325); /* FNV-1a */

    for (size_t i = 0; i < n_head + n_tail; i++) {
        hash ^= (unsigned char)(i < n_head ? head[i] : tail[i - n_head]);
        hash *= UINT64_C(0x100000001b3);
    }
    return hash ^ hash >> 32;
}

/** The slot of the token whose text is head followed by tail, or the free slot where it belongs. */
static uint32_t *
text_slot(const tokenizer_t *t, gguf_text_t head, gguf_text_t tail)
{
    uint64_t at = hash_text(head.data, head.length, tail.data, tail.length);

    for (;; at++) {
        uint32_t *slot = &t->by_text[at & (t->text_slots - 1)];
        if (*slot == NONE) {
            return slot;
        }
        gguf_text_t text = t->texts[*slot];
        if (text.length == head.length + tail.length &&
            memcmp(text.data, head.data, head.length) == 0 &&
            memcmp(text.data + head.length, tail.data, tail.length) == 0) {
            return slot;
        }
    }
}

static const gguf_text_t no_text = {"", 0};

static uint32_t
find_text(const tokenizer_t *t, const char *string)
{
    return *text_slot(t, (gguf_text_t){string, strlen(string)}, no_text);
}

/** A power of two with room for n at a load of at most a half. */
static uint32_t
slots_for(uint32_t n)
{
    uint32_t slots = 16;
    while (slots < 2 * n) {
        slots *= 2;
    }
    return slots;
}

static bool
load_vocabulary(tokenizer_t *t, const gguf_t *gguf)
{
    uint32_t n_types;

    if (!gguf_get_texts(gguf, "tokenizer.ggml.tokens", &t->texts, &t->n) ||
        !gguf_get_ints(gguf, "tokenizer.ggml.token_type", &t->types, &n_types)) {
        return false;
    }
    if (t->n == 0 || t->n > TOKENS_MAX || n_types != t->n) {
        return failure("%" PRIu32 " tokens with %" PRIu32 " types; 1 to %u of both are allowed",
                       t->n, n_types, TOKENS_MAX);
    }
    t->text_slots = slots_for(t->n);
    t->by_text    = malloc(t->text_slots * sizeof(*t->by_text));
    if (!t->by_text) {
        return failure("out of memory");
    }
    memset(t->by_text, 0xff, t->text_slots * sizeof(*t->by_text)); /* NONE */
    for (uint32_t id = 0; id < t->n; id++) {
        *text_slot(t, t->texts[id], no_text) = id;
    }
    return true;
}

static void
load_alphabet(tokenizer_t *t)
{
    memset(t->byte_of, 0xff, sizeof(t->byte_of)); /* -1 */
    for (unsigned byte = 0; byte < 256; byte++) {
        uint32_t code = byte_char(byte);
        char utf8[3]  = {(char)(0xc0 | code >> 6), (char)(0x80 | (code & 0x3f)), 0};
        if (code < 0x80) {
            utf8[0] = (char)code;
            utf8[1] = 0;
        }
        t->byte_of[code]    = (int16_t)byte;
        t->byte_token[byte] = find_text(t, utf8);
    }
}

/* ---- merges ---- */

static merge_t *
merge_slot(const tokenizer_t *t, uint32_t left, uint32_t right)
{
    uint64_t at = ((uint64_t)left << 32 | right) * UINT64_C(0x9e3779b97f4a7c15) >> 32;

    for (;; at++) {
        merge_t *slot = &t->merges[at & (t->merge_slots - 1)];
        if (slot->left == NONE || (slot->left == left && slot->right == right)) {
            return slot;
        }
    }
}

/** "Ġ t": two tokens of the vocabulary, a space between, whose texts together are a third. */
static bool
add_merge(tokenizer_t *t, gguf_text_t line, uint32_t rank)
{
    const char *space = line.length > 2 ? memchr(line.data + 1, ' ', line.length - 1) : NULL;

    if (space) {
        gguf_text_t left  = {line.data, (uint64_t)(space - line.data)};
        gguf_text_t right = {space + 1, line.length - left.length - 1};
        merge_t merge     = {*text_slot(t, left, no_text), *text_slot(t, right, no_text), rank,
                             *text_slot(t, left, right)};
        if (merge.left != NONE && merge.right != NONE && merge.result != NONE) {
            merge_t *slot = merge_slot(t, merge.left, merge.right);
            if (slot->left == NONE) { /* of two equal lines the first counts */
                *slot = merge;
            }
            return true;
        }
    }
    return failure("merge %" PRIu32 " of tokenizer.ggml.merges is not two tokens that make a third",
                   rank);
}

static bool
load_merges(tokenizer_t *t, const gguf_t *gguf)
{
    gguf_text_t *lines;
    uint32_t n;

    if (!gguf_get_texts(gguf, "tokenizer.ggml.merges", &lines, &n)) {
        return false;
    }
    bool ok = n <= TOKENS_MAX || failure("%" PRIu32 " merges; the limit is %u", n, TOKENS_MAX);
    if (ok) {
        t->merge_slots = slots_for(n);
        t->merges      = malloc(t->merge_slots * sizeof(*t->merges));
        ok             = t->merges || failure("out of memory");
    }
    if (ok) {
        memset(t->merges, 0xff, t->merge_slots * sizeof(*t->merges)); /* left is NONE */
    }
    for (uint32_t rank = 0; ok && rank < n; rank++) {
        ok = add_merge(t, lines[rank], rank);
    }
    free(lines);
    return ok;
}

/* ---- life ---- */

static bool
want_text(const gguf_t *gguf, const char *key, const char *wanted)
{
    gguf_text_t text;

    if (!gguf_get_text(gguf, key, &text)) {
        return false;
    }
    return gguf_text_is(text, wanted) ||
           failure("key '%s' is '%.*s'; this runner knows '%s'", key,
                   (int)(text.length < 64 ? text.length : 64), text.data, wanted);
}

tokenizer_t *
tokenizer_create(const gguf_t *gguf)
{
    tokenizer_t *t = calloc(1, sizeof(*t));

    if (!t) {
        failure("out of memory");
        return NULL;
    }
    if (!want_text(gguf, "tokenizer.ggml.model", "gpt2") ||
        !want_text(gguf, "tokenizer.ggml.pre", "smollm") || !load_vocabulary(t, gguf) ||
        !load_merges(t, gguf)) {
        tokenizer_destroy(t);
        return NULL;
    }
    load_alphabet(t);
    return t;
}

void
tokenizer_destroy(tokenizer_t *t)
{
    if (t) {
        free(t->texts);
        free(t->types);
        free(t->by_text);
        free(t->merges);
        free(t);
    }
}

uint32_t
tokenizer_size(const tokenizer_t *t)
{
    return t->n;
}

/* ---- encode ---- */

bool
tokens_add(tokens_t *tokens, uint32_t id)
{
    if (tokens->n == tokens->room) {
        size_t room   = tokens->room ? 2 * tokens->room : 256;
        uint32_t *ids = realloc(tokens->ids, room * sizeof(*ids));
        if (!ids) {
            return failure("out of memory");
        }
        tokens->ids  = ids;
        tokens->room = room;
    }
    tokens->ids[tokens->n++] = id;
    return true;
}

/** Merge neighbours of ids[n] in place, best rank first and of equals the leftmost; returns how
 * many are left. Quadratic in the length of one word, which is short but in contrived texts. */
static size_t
merge_word(const tokenizer_t *t, uint32_t *ids, size_t n)
{
    for (;;) {
        const merge_t *best = NULL;
        size_t best_at      = 0;
        for (size_t i = 0; i + 1 < n; i++) {
            const merge_t *merge = merge_slot(t, ids[i], ids[i + 1]);
            if (merge->left != NONE && (!best || merge->rank < best->rank)) {
                best    = merge;
                best_at = i;
            }
        }
        if (!best) {
            return n;
        }
        ids[best_at] = best->result;
        memmove(&ids[best_at + 1], &ids[best_at + 2], (n - best_at - 2) * sizeof(*ids));
        n--;
    }
}

bool
tokenizer_encode(const tokenizer_t *t, const char *text, size_t length, tokens_t *tokens)
{
    while (length > 0) {
        size_t word = next_word(text, length), first = tokens->n;
        for (size_t i = 0; i < word; i++) {
            uint32_t id = t->byte_token[(unsigned char)text[i]];
            if (id != NONE && !tokens_add(tokens, id)) {
                return false;
            }
        }
        if (tokens->n > first) {
            tokens->n = first + merge_word(t, tokens->ids + first, tokens->n - first);
        }
        text += word;
        length -= word;
    }
    return true;
}

bool
tokenizer_control(const tokenizer_t *t, const char *name, tokens_t *tokens)
{
    uint32_t id = find_text(t, name);

    if (!tokenizer_is_control(t, id)) {
        return failure("the model has no control token '%s'", name);
    }
    return tokens_add(tokens, id);
}

bool
tokenizer_is_control(const tokenizer_t *t, uint32_t id)
{
    return id < t->n && t->types[id] == TYPE_CONTROL;
}

/* ---- decode ---- */

size_t
tokenizer_decode(const tokenizer_t *t, uint32_t id, char *bytes, size_t room)
{
    size_t n = 0;

    if (id >= t->n || tokenizer_is_control(t, id)) {
        return 0;
    }
    for (uint64_t at = 0; at < t->texts[id].length && n < room;) {
        uint32_t code;
        at += utf8_decode(t->texts[id].data + at, t->texts[id].length - at, &code);
        if (code < 512 && t->byte_of[code] >= 0) {
            bytes[n++] = (char)t->byte_of[code];
        }
    }
    return n;
}
