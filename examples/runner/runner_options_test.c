#include "options.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
/* cmocka.h uses the four above. */
#include <cmocka.h>

#include <getopt.h>
#include <string.h>

#include "failure.h"

#define ARGS_MAX 40

/** Parse a line of words; none holds a space. */
static bool
parse(const char *line, options_t *options, bool *help)
{
    static char words[1024];
    char *argv[ARGS_MAX] = {"runner"};
    int argc             = 1;

    assert_true(strlen(line) < sizeof(words));
    strcpy(words, line);
    for (char *word = strtok(words, " "); word; word = strtok(NULL, " ")) {
        assert_true(argc < ARGS_MAX - 1);
        argv[argc++] = word;
    }
    optind = 0; /* getopt starts over */
    opterr = 0;
    return options_parse(argc, argv, options, help);
}

static void
test_defaults(void **state)
{
    options_t o;
    bool help;
    (void)state;

    assert_true(parse("--model m --prompt hi", &o, &help));
    assert_false(help || o.digest || o.quiet || o.no_template || o.shape.spread);
    assert_string_equal(o.model, "m");
    assert_string_equal(o.question, "hi");
    assert_null(o.prompt_file);
    assert_int_equal(o.n_targets, 1);
    assert_string_equal(o.targets[0], "inproc://cpu");
    assert_int_equal(o.max_tokens, 128);
    assert_int_equal(o.batch, 512);
    assert_int_equal(o.shape.kv_dtype, ATTN_F16);
    assert_int_equal(o.shape.page, 0);
    assert_int_equal(o.shape.chunk, 0);
}

static void
test_every_option(void **state)
{
    options_t o;
    bool help;
    (void)state;

    assert_true(parse("--model m --target a --target b --prompt-file f --question q --no-template "
                      "--max-tokens 0 --batch 64 --kv-dtype bf16 --page 8 --chunk 256 --spread "
                      "--digest --quiet",
                      &o, &help));
    assert_int_equal(o.n_targets, 2);
    assert_string_equal(o.targets[1], "b");
    assert_string_equal(o.prompt_file, "f");
    assert_string_equal(o.question, "q");
    assert_true(o.no_template && o.digest && o.quiet && o.shape.spread);
    assert_int_equal(o.max_tokens, 0);
    assert_int_equal(o.batch, 64);
    assert_int_equal(o.shape.kv_dtype, ATTN_BF16);
    assert_int_equal(o.shape.page, 8);
    assert_int_equal(o.shape.chunk, 256);
    assert_true(parse("--help --nonsense", &o, &help) && help);
    assert_true(parse("--model m --prompt p --logits l", &o, &help));
    assert_string_equal(o.logits, "l");
}

static void
test_wrong_lines_are_refused(void **state)
{
    static const char *const lines[][2] = {
        {"--prompt hi", "--model is missing"},
        {"--model m", "--prompt or --prompt-file is missing"},
        {"--model m --prompt a --prompt b", "go once"},
        {"--model m --prompt a --question b", "go once"},
        {"--model m --prompt a --prompt-file b", "without --prompt"},
        {"--model m --prompt-file b --prompt a", "without --prompt-file"},
        {"--model m --prompt a extra", "'extra' is no option"},
        {"--model m --prompt a --nonsense", "see runner --help"},
        {"--model m --prompt a --batch", "see runner --help"},
        {"--model m --prompt a --batch 0", "--batch is '0'; 1 to 8192 is allowed"},
        {"--model m --prompt a --batch 12x", "--batch is '12x'"},
        {"--model m --prompt a --max-tokens -1", "--max-tokens is '-1'"},
        {"--model m --prompt a --max-tokens 99999999999999999999", "--max-tokens"},
        {"--model m --prompt a --page 257", "--page is '257'"},
        {"--model m --prompt a --chunk 128", "--chunk is '128'"},
        {"--model m --prompt a --kv-dtype f64", "--kv-dtype is 'f64'"},
        {"--model m --prompt a --logits l --target a --target b", "--logits goes with one"},
        {"--model m --prompt a --target 1 --target 2 --target 3 --target 4 --target 5 --target 6 "
         "--target 7 --target 8 --target 9",
         "more than 8 times --target"},
    };
    options_t o;
    bool help;
    (void)state;

    for (size_t i = 0; i < sizeof(lines) / sizeof(lines[0]); i++) {
        assert_false(parse(lines[i][0], &o, &help));
        assert_non_null(strstr(failure_text(), lines[i][1]));
    }
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_defaults),
        cmocka_unit_test(test_every_option),
        cmocka_unit_test(test_wrong_lines_are_refused),
    };
    return cmocka_run_group_tests_name("examples.runner.options", tests, NULL, NULL);
}
