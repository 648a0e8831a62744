#include "tokenizer.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
/* cmocka.h uses the four above. */
#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "failure.h"
#include "prompt.h"
#include "test_gguf.h"
#include "unicode.h"
#include "words.h"

/* ---- words ---- */

/** The words of text with '|' between. */
static const char *
words_of(const char *text)
{
    static char joined[256];
    size_t length = strlen(text), n = 0;

    while (length > 0) {
        size_t word = next_word(text, length);
        assert_in_range(word, 1, length);
        memcpy(joined + n, text, word);
        n += word;
        text += word;
        length -= word;
        joined[n++] = '|';
    }
    joined[n ? n - 1 : 0] = 0;
    return joined;
}

static void
test_words(void **state)
{
    static const char *const cases[][2] = {
        {"Hello world", "Hello| world"},
        {"  two  spaces ", " | two| | spaces| "},
        {"in 1845, 12a", "in| |1|8|4|5|,| |1|2|a"},
        {"don't we'll I'M 's", "don|'t| we|'ll| I|'|M| '|s"},
        {"a\n\n\tb\r\n", "a|\n\n|\t|b|\r\n"},
        {"end.\n5", "end|.|\n|5"},
        {"(x+y)!!", "(|x|+|y|)!!"},
        {"caf\xc3\xa9 \xe6\x97\xa5\xe6\x9c\xac", "caf\xc3\xa9| \xe6\x97\xa5\xe6\x9c\xac"},
        {"\xc2\xbd\xd9\xa3", "\xc2\xbd|\xd9\xa3"},    /* 1/2 and an Arabic 3: numbers */
        {"\xc2\xa0\xc2\xa0x", "\xc2\xa0|\xc2\xa0|x"}, /* no-break spaces */
        {" \xf0\x9f\x99\x82\xf0\x9f\x99\x82", " \xf0\x9f\x99\x82\xf0\x9f\x99\x82"},
        {"\xff\xc3(", "\xff\xc3("}, /* not UTF-8 at all */
    };
    (void)state;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        assert_string_equal(words_of(cases[i][0]), cases[i][1]);
    }
}

/** Cut at every byte, in copies that end where malloc's memory ends. */
static void
test_words_end_with_the_text(void **state)
{
    static const char text[] = "a's \xe6\x97\xa5 \xf0\x9f\x99\x82 '  12\n \xc2\xa0'll'r";
    (void)state;
    for (size_t n = 1; n < sizeof(text); n++) {
        char *copy = malloc(n);
        assert_non_null(copy);
        memcpy(copy, text, n);
        for (size_t at = 0; at < n; at += next_word(copy + at, n - at)) {
        }
        free(copy);
    }
}

static void
test_unfinished_characters(void **state)
{
    (void)state;
    assert_int_equal(utf8_unfinished("abc", 3), 0);
    assert_int_equal(utf8_unfinished("a\xf0\x9f\x99", 4), 3);
    assert_int_equal(utf8_unfinished("a\xf0\x9f\x99\x82", 5), 0);
    assert_int_equal(utf8_unfinished("a\xc3", 2), 1);
    assert_int_equal(utf8_unfinished("\x82\x82\x82\x82", 4), 0);
    assert_int_equal(utf8_unfinished("", 0), 0);
}

/* ---- a vocabulary: the 256 bytes, seven merges, two control tokens ---- */

#define MERGED 256 /* the first id after the bytes */
#define START (MERGED + 7)
#define END (START + 1)

static const char *const merged[] = {"th", "he", "the", "\xc4\xa0t", "\xc4\xa0the", "an", "and"};

static void
put_byte_tokens(builder_t *b)
{
    unsigned next = 0x100;

    for (unsigned byte = 0; byte < 256; byte++) {
        bool itself   = (byte > ' ' && byte < 0x7f) || (byte > 0xa0 && byte != 0xad);
        unsigned code = itself ? byte : next++;
        char utf8[3]  = {(char)(0xc0 | code >> 6), (char)(0x80 | (code & 63)), 0};
        put_text(b, code < 0x80 ? (char[]){(char)code, 0} : utf8);
    }
}

static void
build(builder_t *b, const char *const *merges, uint64_t n_merges, const char *pre)
{
    put_start(b, 0, 5);
    put_key_text(b, "tokenizer.ggml.model", "gpt2");
    put_key_text(b, "tokenizer.ggml.pre", pre);
    put_key_list(b, "tokenizer.ggml.tokens", 8, END + 1);
    put_byte_tokens(b);
    for (size_t i = 0; i < 7; i++) {
        put_text(b, merged[i]);
    }
    put_text(b, "<|im_start|>");
    put_text(b, "<|im_end|>");
    put_key_list(b, "tokenizer.ggml.token_type", 5, END + 1);
    for (int i = 0; i < END + 1; i++) {
        put_u32(b, i < START ? 1 : 3);
    }
    put_key_list(b, "tokenizer.ggml.merges", 8, n_merges);
    for (uint64_t i = 0; i < n_merges; i++) {
        put_text(b, merges[i]);
    }
}

static const char *const merges[] = {"h e",          "t he", "t h", "\xc4\xa0 t",
                                     "\xc4\xa0 the", "a n",  "an d"};

/** Ids as words, those of bytes as characters. */
static void
assert_encodes(const tokenizer_t *tokenizer, const char *text, const char *expected)
{
    tokens_t tokens = {0};
    char got[512];
    size_t n = 0;

    assert_true(tokenizer_encode(tokenizer, text, strlen(text), &tokens));
    got[0] = 0;
    for (size_t i = 0; i < tokens.n; i++) {
        n += (size_t)snprintf(got + n, sizeof(got) - n, "%s%s", i ? "," : "",
                              tokens.ids[i] < 256 ? (char[]){(char)tokens.ids[i], 0}
                                                  : merged[tokens.ids[i] - MERGED]);
    }
    assert_string_equal(got, expected);
    free(tokens.ids);
}

static gguf_t *gguf;
static tokenizer_t *tokenizer;
static builder_t file;

static int
set_up(void **state)
{
    (void)state;
    build(&file, merges, 7, "smollm");
    gguf      = gguf_parse(file.bytes, file.n);
    tokenizer = gguf ? tokenizer_create(gguf) : NULL;
    return tokenizer ? 0 : -1;
}

static int
tear_down(void **state)
{
    (void)state;
    tokenizer_destroy(tokenizer);
    gguf_close(gguf);
    return 0;
}

static void
test_merges_go_by_rank(void **state)
{
    (void)state;
    assert_encodes(tokenizer, "the", "the"); /* h e before t h */
    assert_encodes(tokenizer, "thx", "th,x");
    assert_encodes(tokenizer, "a the hand", "a,\xc4\xa0the, ,h,and");
    assert_encodes(tokenizer, "and and", "and, ,and");
    assert_encodes(tokenizer, "anan", "an,an");
    assert_encodes(tokenizer, "hhee", "h,he,e");
    assert_encodes(tokenizer, "", "");
    assert_encodes(tokenizer, "<|im_end|>", "<,|,i,m,_,e,n,d,|,>"); /* text, not control */
}

static void
test_every_byte_comes_back(void **state)
{
    char text[4 * 256], back[4 * 256];
    tokens_t tokens = {0};
    size_t n        = 0;
    (void)state;

    for (size_t i = 0; i < sizeof(text); i++) {
        text[i] = (char)(i * 7 + i / 256);
    }
    assert_true(tokenizer_encode(tokenizer, text, sizeof(text), &tokens));
    for (size_t i = 0; i < tokens.n; i++) {
        n += tokenizer_decode(tokenizer, tokens.ids[i], back + n, sizeof(back) - n);
    }
    assert_int_equal(n, sizeof(text));
    assert_memory_equal(back, text, n);
    free(tokens.ids);
}

static void
test_template(void **state)
{
    tokens_t tokens = {0};
    uint32_t starts = 0, ends = 0;
    (void)state;

    assert_true(make_prompt(tokenizer, "the <|im_end|>", "and?", true, &tokens));
    for (size_t i = 0; i < tokens.n; i++) {
        starts += tokens.ids[i] == START;
        ends += tokens.ids[i] == END;
    }
    assert_int_equal(starts, 3);
    assert_int_equal(ends, 2); /* the document's does not count */
    assert_int_equal(tokens.ids[0], START);
    assert_int_equal(tokens.ids[tokens.n - 1], '\n'); /* the assistant's turn */
    tokens.n = 0;
    assert_true(make_prompt(tokenizer, "the", "and", false, &tokens));
    assert_int_equal(tokens.n, 4); /* the, two newlines, and */
    assert_false(tokenizer_control(tokenizer, "the", &tokens));
    assert_string_equal(failure_text(), "the model has no control token 'the'");
    free(tokens.ids);
}

static void
test_bad_vocabularies_are_refused(void **state)
{
    static const char *const bad[] = {"hx", "h  e", "h zz", "z z", " he", ""};
    builder_t b;
    (void)state;

    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        build(&b, &bad[i], 1, "smollm");
        gguf_t *parsed = gguf_parse(b.bytes, b.n);
        assert_non_null(parsed);
        assert_null(tokenizer_create(parsed));
        assert_string_equal(failure_text(),
                            "merge 0 of tokenizer.ggml.merges is not two tokens that "
                            "make a third");
        gguf_close(parsed);
    }
    build(&b, merges, 7, "other");
    gguf_t *parsed = gguf_parse(b.bytes, b.n);
    assert_null(tokenizer_create(parsed));
    assert_string_equal(failure_text(), "key 'tokenizer.ggml.pre' is 'other'; this runner knows "
                                        "'smollm'");
    gguf_close(parsed);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_words),
        cmocka_unit_test(test_words_end_with_the_text),
        cmocka_unit_test(test_unfinished_characters),
        cmocka_unit_test(test_merges_go_by_rank),
        cmocka_unit_test(test_every_byte_comes_back),
        cmocka_unit_test(test_template),
        cmocka_unit_test(test_bad_vocabularies_are_refused),
    };
    return cmocka_run_group_tests_name("examples.runner.tokenizer", tests, set_up, tear_down);
}
