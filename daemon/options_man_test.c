/*
 * The lists of options in attnd(1) and attnd.conf(5) are made from the option tables, as
 * deploy/attnd.conf is. In a page they stand between the lines
 *
 *     .\" generated: worker
 *     .\" end
 *
 * This test fails when a page says anything else than the tables. With ATTN_UPDATE=1 in the
 * environment it writes the pages instead.
 */
#include "daemon/options_int.h"
#include "daemon/options_tables.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#define PAGE_MAX 262144

static const option_set_t *const all_sets[] = {&coordinator_option_set, &worker_option_set,
                                               &dev_option_set};
#define N_SETS (sizeof(all_sets) / sizeof(all_sets[0]))

/* How a page lists one option. */
typedef void (*print_fn)(FILE *out, const option_t *row);

/* A text for mdoc: a line for each sentence, and nothing that it takes for a request. */
static void
print_sentences(FILE *out, const char *text)
{
    for (const char *at = text; *at != '\0'; at++) {
        bool first = at == text || at[-1] == '\n';
        if (*at == ' ' && at > text && at[-1] == '.') {
            fputc('\n', out);
            continue;
        }
        if ((first || (at[-1] == ' ' && at > text + 1 && at[-2] == '.')) &&
            (*at == '.' || *at == '\'')) {
            fputs("\\&", out);
        }
        fputs(*at == '\\' ? "\\e" : (char[]){*at, '\0'}, out);
    }
    fputc('\n', out);
}

static void
print_default(FILE *out, const option_t *row)
{
    char kind[OPTIONS_VALUE_MAX];

    option_describe_kind(row, kind);
    if (row->initial[0] == '\0') {
        fprintf(out, "Default: empty; %s.\n", kind);
    } else {
        fprintf(out, "Default:\n.Ql %s ;\n%s.\n", row->initial, kind);
    }
}

static void
print_flag(FILE *out, const option_t *row)
{
    const char *value = option_value_name(row);

    fprintf(out, ".It Fl -%s%s%s\n", row->name, value[0] != '\0' ? " Ar " : "", value);
    print_sentences(out, row->help);
    print_default(out, row);
}

static void
print_line(FILE *out, const option_t *row)
{
    const char *value = option_value_name(row);

    fprintf(out, ".It Cm %s No = %s%s\n", row->name, value[0] != '\0' ? "Ar " : "",
            value[0] != '\0' ? value : "Cm yes | no");
    print_default(out, row);
}

static void
print_set(FILE *out, const option_set_t *set, print_fn print)
{
    fprintf(out, ".Bl -tag -width Ds\n");
    for (size_t i = 0; i < set->n; i++) {
        print(out, &set->table[i]);
    }
    fprintf(out, ".El\n");
}

static char *
read_page(const char *path)
{
    char *text = malloc(PAGE_MAX);
    FILE *file = fopen(path, "r");

    assert_non_null(text);
    assert_non_null(file);
    size_t n = fread(text, 1, PAGE_MAX, file);
    fclose(file);
    assert_in_range(n, 1, PAGE_MAX - 1);
    text[n] = '\0';
    return text;
}

/* The page with what stands between its marks made anew; to be freed. */
static char *
made_anew(const char *page, print_fn print)
{
    char *text = NULL, mark[80];
    size_t size;
    FILE *out      = open_memstream(&text, &size);
    const char *at = page;

    assert_non_null(out);
    for (size_t i = 0; i < N_SETS; i++) {
        snprintf(mark, sizeof(mark), ".\\\" generated: %s\n", all_sets[i]->section);
        const char *begin = strstr(at, mark);
        if (begin == NULL) {
            fail_msg("no line '%.*s', or not in the order of the tables", (int)strlen(mark) - 1,
                     mark);
        }
        begin += strlen(mark);
        fwrite(at, 1, (size_t)(begin - at), out);
        print_set(out, all_sets[i], print);
        at = strstr(begin, ".\\\" end\n");
        assert_non_null(at);
    }
    fputs(at, out);
    fclose(out);
    return text;
}

static void
check_page(const char *name, print_fn print)
{
    char path[1024];

    snprintf(path, sizeof(path), ATTN_MAN "/%s", name);
    char *page     = read_page(path);
    char *expected = made_anew(page, print);
    if (getenv("ATTN_UPDATE") != NULL) {
        FILE *file = fopen(path, "w");
        assert_non_null(file);
        assert_int_equal(fwrite(expected, 1, strlen(expected), file), strlen(expected));
        assert_int_equal(fclose(file), 0);
        free(page);
        page = read_page(path);
    }
    if (strcmp(page, expected) != 0) {
        fail_msg("docs/man/%s is not what the option tables say: run options_man_test with "
                 "ATTN_UPDATE=1",
                 name);
    }
    free(page);
    free(expected);
}

static void
test_attnd_1_lists_the_options(void **state)
{
    (void)state;
    check_page("attnd.1", print_flag);
}

static void
test_attnd_conf_5_lists_the_options(void **state)
{
    (void)state;
    check_page("attnd.conf.5", print_line);
}

static void
test_text_is_no_request(void **state)
{
    char *text = NULL;
    size_t size;
    (void)state;
    FILE *out = open_memstream(&text, &size);
    assert_non_null(out);
    print_sentences(out, ".a b. 'c. \\d e.g");
    fclose(out);
    assert_string_equal(text, "\\&.a b.\n\\&'c.\n\\ed e.g\n");
    free(text);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_attnd_1_lists_the_options),
        cmocka_unit_test(test_attnd_conf_5_lists_the_options),
        cmocka_unit_test(test_text_is_no_request),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
