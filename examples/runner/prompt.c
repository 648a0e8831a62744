#include "prompt.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "failure.h"
#include "unicode.h"

#define TOKEN_MAX 4096 /* bytes of a token that are printed */

static const char system_text[] =
    "system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face";

char *
read_text(const char *path)
{
    FILE *file  = fopen(path, "rb");
    char *text  = NULL;
    size_t room = 0;

    /* All of it, or up to a 0, which no text has. */
    if (!file || getdelim(&text, &room, 0, file) < 0) {
        failure("%s: %s", path, !file || ferror(file) ? strerror(errno) : "empty");
        free(text);
        text = NULL;
    }
    if (file) {
        fclose(file);
    }
    return text;
}

/** A text is encoded as one: words may reach from the role's line into what follows. */
static bool
encode_user(const tokenizer_t *tokenizer, const char *role, const char *document,
            const char *question, tokens_t *tokens)
{
    const char *between = document && question ? "\n\n" : "";
    size_t n            = strlen(role) + (document ? strlen(document) : 0) + strlen(between) +
               (question ? strlen(question) : 0);
    char *text = malloc(n + 1);

    if (!text) {
        return failure("out of memory");
    }
    snprintf(text, n + 1, "%s%s%s%s", role, document ? document : "", between,
             question ? question : "");
    bool ok = tokenizer_encode(tokenizer, text, n, tokens);
    free(text);
    return ok;
}

static bool
encode(const tokenizer_t *tokenizer, const char *text, tokens_t *tokens)
{
    return tokenizer_encode(tokenizer, text, strlen(text), tokens);
}

bool
make_prompt(const tokenizer_t *tokenizer, const char *document, const char *question,
            bool use_template, tokens_t *tokens)
{
    if (!use_template) {
        return encode_user(tokenizer, "", document, question, tokens);
    }
    /* ChatML: <|im_start|>role newline text <|im_end|> newline, for each message. */
    return tokenizer_control(tokenizer, "<|im_start|>", tokens) &&
           encode(tokenizer, system_text, tokens) &&
           tokenizer_control(tokenizer, "<|im_end|>", tokens) && encode(tokenizer, "\n", tokens) &&
           tokenizer_control(tokenizer, "<|im_start|>", tokens) &&
           encode_user(tokenizer, "user\n", document, question, tokens) &&
           tokenizer_control(tokenizer, "<|im_end|>", tokens) && encode(tokenizer, "\n", tokens) &&
           tokenizer_control(tokenizer, "<|im_start|>", tokens) &&
           encode(tokenizer, "assistant\n", tokens);
}

void
printer_put(printer_t *printer, const tokenizer_t *tokenizer, uint32_t id)
{
    char bytes[sizeof(printer->held) + TOKEN_MAX];
    size_t n = printer->n;

    memcpy(bytes, printer->held, n);
    n += tokenizer_decode(tokenizer, id, bytes + n, TOKEN_MAX);
    printer->n = utf8_unfinished(bytes, n);
    fwrite(bytes, 1, n - printer->n, stdout);
    memcpy(printer->held, bytes + n - printer->n, printer->n);
    fflush(stdout);
}

void
printer_end(printer_t *printer)
{
    if (printer->n > 0) {
        fputs("\xef\xbf\xbd", stdout); /* U+FFFD: a character without its end */
        printer->n = 0;
    }
    fflush(stdout);
}
