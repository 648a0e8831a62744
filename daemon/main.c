/* main.c: attnd, one program with a command for each role. */
#include "client/attn.h"
#include "daemon/coordinator/coordinator.h"
#include "daemon/dev/dev.h"
#include "daemon/options_tables.h"
#include "daemon/worker/worker.h"

#include <stdio.h>
#include <string.h>

static const struct {
    const char *name;
    const option_set_t *options;
    int (*run)(int argc, char **argv);
} commands[] = {
    {"dev", &dev_option_set, dev_main},
    {"coordinator", &coordinator_option_set, coordinator_main},
    {"worker", &worker_option_set, worker_main},
};

#define COMMANDS (sizeof(commands) / sizeof(commands[0]))

static void
print_help(FILE *out)
{
    fprintf(out, "attnd %s: attention as a network service\n\nusage: attnd COMMAND [options]\n\n",
            attn_version());
    for (size_t i = 0; i < COMMANDS; i++) {
        fprintf(out, "  %-12s %s\n", commands[i].name, commands[i].options->summary);
    }
    fprintf(out, "\nattnd COMMAND --help explains the options of a command.\n"
                 "Begin with `attnd dev`; attnctl looks into a running cluster.\n");
}

int
main(int argc, char **argv)
{
    const char *names[COMMANDS];
    const char *command = argc > 1 ? argv[1] : "";

    if (strcmp(command, "--help") == 0 || strcmp(command, "-h") == 0 ||
        strcmp(command, "help") == 0) {
        print_help(stdout);
        return 0;
    }
    if (strcmp(command, "--version") == 0) {
        printf("attnd %s\n", attn_version());
        return 0;
    }
    for (size_t i = 0; i < COMMANDS; i++) {
        names[i] = commands[i].name;
        if (strcmp(command, commands[i].name) == 0) {
            return commands[i].run(argc - 2, argv + 2);
        }
    }
    if (argc > 1) {
        fprintf(stderr, "attnd: no command \"%s\"; did you mean \"%s\"?\n\n", command,
                options_nearest(command, names, COMMANDS));
    }
    print_help(stderr);
    return 2;
}
