/* options_print.c: --help and --print-config, both from the table. */
#include "base/status.h"
#include "daemon/options_int.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

#define PAGE_WIDTH 92
#define HELP_INDENT 8

/* Words of text, wrapped, every line after `lead`. */
static void
print_wrapped(FILE *out, const char *lead, const char *text)
{
    size_t column = 0;

    while (*text != '\0') {
        size_t n = strcspn(text, " ");
        if (column > 0 && column + 1 + n > PAGE_WIDTH) {
            fputc('\n', out);
            column = 0;
        }
        column += (size_t)fprintf(out, "%s", column == 0 ? lead : " ");
        column += fwrite(text, 1, n, out);
        text += n;
        text += strspn(text, " ");
    }
    fputc('\n', out);
}

const char *
option_value_name(const option_t *row)
{
    static const char *const names[] = {
        [OPTION_TEXT] = "TEXT", [OPTION_ADDRESS] = "HOST:PORT",
        [OPTION_COUNT] = "N",   [OPTION_BYTES] = "BYTES",
        [OPTION_MS] = "MS",     [OPTION_US] = "US",
        [OPTION_SWITCH] = "",   [OPTION_CHOICE] = "NAME",
    };
    return row->value_name != NULL ? row->value_name : names[row->kind];
}

static const char *
or_none(const char *text)
{
    return text[0] != '\0' ? text : "(empty)";
}

static void
print_option(FILE *out, const option_t *row)
{
    char line[2 * OPTIONS_VALUE_MAX], kind[OPTIONS_VALUE_MAX], lead[HELP_INDENT + 1];
    const char *value = option_value_name(row);

    memset(lead, ' ', HELP_INDENT);
    lead[HELP_INDENT] = '\0';
    fprintf(out, "  --%s%s%s\n", row->name, value[0] != '\0' ? " " : "", value);
    print_wrapped(out, lead, row->help);
    option_describe_kind(row, kind);
    snprintf(line, sizeof(line), "%s; default %s", kind, or_none(row->initial));
    print_wrapped(out, lead, line);
}

void
options_print_help(const option_set_t *set, FILE *out)
{
    fprintf(out, "%s: %s\n\nusage: %s [--name value | --name=value ...]\n\n", set->program,
            set->summary, set->program);
    for (size_t i = 0; i < set->n; i++) {
        print_option(out, &set->table[i]);
    }
    fprintf(out,
            "  --config FILE\n"
            "        Read these options from FILE first: lines of 'name = value', those below\n"
            "        [%s] for this command only. Flags win over the file.\n"
            "  --print-config\n"
            "        Print a documented config file with the values in force, and exit.\n"
            "  --help, -h\n"
            "        Print this, and exit.\n",
            set->section);
}

/* Would the file's reader find this value again? It ends lines at OPTIONS_LINE_MAX, values before
 * a ; that white space precedes, and takes white space from both ends. */
static bool
fits_a_file(const char *name, const char *value)
{
    size_t n = strlen(value);

    if (strlen(name) + strlen(" = ") + n > OPTIONS_LINE_MAX || *value == ';') {
        return false;
    }
    for (size_t i = 0; i < n; i++) {
        bool space = isspace((unsigned char)value[i]);
        if ((space && (i == 0 || i == n - 1 || value[i + 1] == ';')) ||
            iscntrl((unsigned char)value[i])) {
            return false;
        }
    }
    return true;
}

void
options_print_config(const option_set_t *set, const void *values, FILE *out)
{
    char line[2 * OPTIONS_VALUE_MAX], kind[OPTIONS_VALUE_MAX], value[OPTIONS_VALUE_MAX];

    fprintf(out, "# %s: %s\n[%s]\n", set->program, set->summary, set->section);
    for (size_t i = 0; i < set->n; i++) {
        const option_t *row = &set->table[i];
        option_describe_kind(row, kind);
        snprintf(line, sizeof(line), "%s; default %s", kind, or_none(row->initial));
        option_get_value(row, values, value);
        fputc('\n', out);
        print_wrapped(out, "# ", row->help);
        print_wrapped(out, "# ", line);
        if (!fits_a_file(row->name, value)) {
            fprintf(out, "# %s cannot be written here: give it as the flag --%s\n", row->name,
                    row->name);
        } else {
            fprintf(out, "%s =%s%s\n", row->name, value[0] != '\0' ? " " : "", value);
        }
    }
}
