/* A model file of anybody's making, through all that the runner reads of one. */
#include "examples/runner/failure.h"
#include "examples/runner/llama.h"
#include "examples/runner/tokenizer.h"

#include <stdlib.h>
#include <string.h>

static void
read_words(const gguf_t *gguf)
{
    static const char text[] = "The keeper wrote: 1,234 ships\n  pass'd \xc3\xa9\xff.";
    tokenizer_t *tokenizer   = tokenizer_create(gguf);
    tokens_t tokens          = {0};
    char bytes[16];

    if (tokenizer == NULL) {
        return;
    }
    if (tokenizer_encode(tokenizer, text, sizeof(text) - 1, &tokens)) {
        for (size_t i = 0; i < tokens.n; i++) {
            if (tokens.ids[i] >= tokenizer_size(tokenizer)) {
                abort();
            }
            tokenizer_decode(tokenizer, tokens.ids[i], bytes, sizeof(bytes));
        }
    }
    free(tokens.ids);
    tokenizer_destroy(tokenizer);
}

int
LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n)
{
    void *copy = malloc(n + (n == 0)); /* its own block: a read beyond it is seen */

    if (copy == NULL) {
        return 0;
    }
    memcpy(copy, bytes, n);
    gguf_t *gguf = gguf_parse(copy, n);
    if (gguf != NULL) {
        read_words(gguf);
        llama_destroy(llama_load(gguf));
        gguf_close(gguf);
    } else if (*failure_text() == 0) {
        abort();
    }
    free(copy);
    return 0;
}
