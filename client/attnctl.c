/*
 * attnctl.c: look at a cluster from a shell.
 *
 *     attnctl status                    workers, memory, sequences, rates
 *     attnctl status --watch --json     a line of JSON every interval
 *     attnctl top                       the same as a table that renews itself
 *     attnctl doctor                    what is wrong, and what to do
 *     attnctl seq 4294967297 --cache chat    where a sequence's chunks live
 *     attnctl explain --tokens 131072  what a layer would take, by where it is merged
 *     attnctl move 4294967297 --cache chat --to 2    to another worker
 *     attnctl drain 3                   empty a worker, before it is stopped
 *     attnctl bench --context 8192     drive it, measure, and verify
 *
 * Exit codes: 0 fine, 1 a problem of the cluster, 2 a mistake in the arguments.
 */
#include "client/attnctl.h"

#include "client/attnctl_bench.h"
#include "client/attnctl_explain.h"
#include "client/attnctl_words.h"

#include <getopt.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define INTERVAL_MS_MAX 3600000u

volatile sig_atomic_t attnctl_stop;

static const char usage[] =
    "usage: attnctl [--target HOST:PORT] COMMAND\n"
    "\n"
    "  status [--json] [--watch] [--interval MS]\n"
    "        Workers, memory, sequences, and rates measured over MS milliseconds (1000; 0: means\n"
    "        since start). --watch repeats until it is interrupted.\n"
    "  top [--interval MS] [--once]\n"
    "        Workers by load, renewed every MS milliseconds (1000) until it is interrupted.\n"
    "  doctor [--json]\n"
    "        Check the cluster, a step on every worker included; say what is wrong and what to "
    "do.\n"
    "  seq ID --cache NAME [--json]\n"
    "        Where the chunks of a sequence live. NAME is a cache that is open.\n"
    "  explain [ID] [options]\n"
    "        What a layer of a step would take, whole and spread, and which is taken: see explain\n"
    "        --help.\n"
    "  move ID --cache NAME --to WORKER [--from WORKER] [--json]\n"
    "        Move the chunks of a sequence to another worker: all, or those of one. Sequences stay "
    "in\n"
    "        use, and answers the same.\n"
    "  drain WORKER [--to WORKER] [--undo] [--json]\n"
    "        Empty a worker, before it is stopped: nothing new is placed there, and its chunks go "
    "to\n"
    "        other workers. --undo: place chunks there again. Workers are those of status, by "
    "number.\n"
    "  bench [options]\n"
    "        Drive the cluster with decode steps, measure, and verify answers: see bench --help.\n"
    "\n"
    "  --target HOST:PORT  the coordinator; default 127.0.0.1:7070\n"
    "  --timeout MS        for an answer; default 5000\n"
    "  --tls-ca FILE       the CA of the cluster's certificates: speak TLS; all in PEM\n"
    "  --tls-cert FILE, --tls-key FILE    ours, where clients must present one\n"
    "  --tls-server-name NAME             in the coordinator's certificate, in place of HOST\n"
    "        These default to $ATTN_TLS_CA, _CERT, _KEY and _SERVER_NAME.\n"
    "  --version, --help\n"
    "\n"
    "Exit codes: 0 fine; 1 the cluster does not answer, has no live worker, or lost tokens of the\n"
    "sequence asked for, or a check of doctor failed; 2 wrong arguments.\n";

static int
mistake(const char *what, const char *argument)
{
    fprintf(stderr, "attnctl: %s%s%s (see attnctl --help)\n", what, argument != NULL ? ": " : "",
            argument != NULL ? argument : "");
    return ATTNCTL_USAGE;
}

int
attnctl_failed(const attnctl_t *ctl, attn_status_t status)
{
    fprintf(stderr, "attnctl: %s: %s (%s)\n", ctl->target, attn_last_error(),
            attn_strerror(status));
    return ATTNCTL_PROBLEM;
}

void
attnctl_json_u64(cJSON *object, const char *name, uint64_t value)
{
    char text[24];

    snprintf(text, sizeof(text), "%" PRIu64, value);
    cJSON_AddRawToObject(object, name, text);
}

void
attnctl_json_print(cJSON *object)
{
    char *text = cJSON_PrintUnformatted(object);

    puts(text != NULL ? text : "{}");
    fflush(stdout);
    cJSON_free(text);
    cJSON_Delete(object);
}

const char *
attnctl_bytes(uint64_t bytes, char text[16])
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    double value                     = (double)bytes;
    size_t unit                      = 0;

    for (; value >= 1024 && unit < 6; unit++) {
        value /= 1024;
    }
    snprintf(text, 16, unit == 0 ? "%.0f %s" : "%.1f %s", value, units[unit]);
    return text;
}

static void
on_signal(int number)
{
    (void)number;
    attnctl_stop = 1;
}

static bool
worker_from_text(const char *text, uint32_t *worker)
{
    uint64_t number;

    if (!attnctl_number(text, UINT32_MAX, &number) || number == 0) {
        return false;
    }
    *worker = (uint32_t)number;
    return true;
}

typedef struct arguments {
    const char *words[3]; /* that are no options: the command and what it is about */
    int n_words;
    uint64_t timeout_ms, interval_ms;
    attn_client_options_t tls; /* its TLS fields */
    bool done;                 /* --help or --version was served */
} arguments_t;

/* Options without a letter. */
enum { TLS_CA = 256, TLS_CERT, TLS_KEY, TLS_SERVER_NAME, FROM, TO };

/* Returns 0, or the code to exit with. */
static int
read_arguments(int argc, char **argv, attnctl_t *ctl, arguments_t *arguments)
{
    static const struct option options[] = {
        {"target", required_argument, NULL, 't'},
        {"timeout", required_argument, NULL, 'o'},
        {"interval", required_argument, NULL, 'i'},
        {"cache", required_argument, NULL, 'c'},
        {"tls-ca", required_argument, NULL, TLS_CA},
        {"tls-cert", required_argument, NULL, TLS_CERT},
        {"tls-key", required_argument, NULL, TLS_KEY},
        {"tls-server-name", required_argument, NULL, TLS_SERVER_NAME},
        {"from", required_argument, NULL, FROM},
        {"to", required_argument, NULL, TO},
        {"undo", no_argument, NULL, 'u'},
        {"json", no_argument, NULL, 'j'},
        {"watch", no_argument, NULL, 'w'},
        {"once", no_argument, NULL, '1'},
        {"help", no_argument, NULL, 'h'},
        {"version", no_argument, NULL, 'v'},
        {NULL, 0, NULL, 0},
    };
    int option;

    while ((option = getopt_long(argc, argv, "-h", options, NULL)) != -1) {
        switch (option) {
        case 't':
            ctl->target = optarg;
            break;
        case 'c':
            ctl->cache = optarg;
            break;
        case 'j':
            ctl->json = true;
            break;
        case 'w':
            ctl->watch = true;
            break;
        case '1':
            ctl->once = true;
            break;
        case TLS_CA:
            arguments->tls.tls_ca = optarg;
            break;
        case TLS_CERT:
            arguments->tls.tls_cert = optarg;
            break;
        case TLS_KEY:
            arguments->tls.tls_key = optarg;
            break;
        case TLS_SERVER_NAME:
            arguments->tls.tls_server_name = optarg;
            break;
        case 'u':
            ctl->undo = true;
            break;
        case FROM:
        case TO:
            if (!worker_from_text(optarg, option == TO ? &ctl->to : &ctl->from)) {
                return mistake("a WORKER is a number above 0", optarg);
            }
            break;
        case 'o':
            if (!attnctl_number(optarg, 60000, &arguments->timeout_ms)) {
                return mistake("--timeout is 0 to 60000 ms", optarg);
            }
            break;
        case 'i':
            if (!attnctl_number(optarg, INTERVAL_MS_MAX, &arguments->interval_ms)) {
                return mistake("--interval is 0 to 3600000 ms", optarg);
            }
            break;
        case 'h':
            fputs(usage, stdout);
            arguments->done = true;
            return 0;
        case 'v':
            printf("attnctl %s\n", attn_version());
            arguments->done = true;
            return 0;
        case 1:
            if (arguments->n_words == 3) {
                return mistake("one command is enough", optarg);
            }
            arguments->words[arguments->n_words++] = optarg;
            break;
        default:
            return mistake("wrong option", NULL);
        }
    }
    return 0;
}

/* Which command, and has it what it needs? NULL after a sentence. */
static int (*pick_command(attnctl_t *ctl, const arguments_t *arguments))(const attnctl_t *)
{
    const char *command = arguments->n_words > 0 ? arguments->words[0] : NULL;

    if (command == NULL) {
        mistake("which command? status, top, doctor, seq, explain, move, drain or bench", NULL);
    } else if (strcmp(command, "status") == 0) {
        if (arguments->n_words == 1) {
            return attnctl_status;
        }
        mistake("status takes no argument", arguments->words[1]);
    } else if (strcmp(command, "top") == 0 || strcmp(command, "doctor") == 0) {
        if (arguments->n_words == 1) {
            return command[0] == 't' ? attnctl_top : attnctl_doctor;
        }
        mistake("top and doctor take no argument", arguments->words[1]);
    } else if (strcmp(command, "seq") == 0 || strcmp(command, "move") == 0) {
        bool move = command[0] == 'm';
        if (arguments->n_words != 2 || ctl->cache == NULL) {
            mistake("seq and move want an ID and --cache NAME", NULL);
        } else if (!attnctl_number(arguments->words[1], UINT64_MAX, &ctl->seq) || ctl->seq == 0) {
            mistake("a sequence's ID is a number above 0", arguments->words[1]);
        } else if (move && ctl->to == 0 && ctl->from == 0) {
            mistake("move wants --to WORKER, or --from WORKER", NULL);
        } else {
            return move ? attnctl_move : attnctl_seq;
        }
    } else if (strcmp(command, "drain") == 0) {
        if (arguments->n_words == 2 && worker_from_text(arguments->words[1], &ctl->worker)) {
            return attnctl_drain;
        }
        mistake("drain wants a WORKER, by number", NULL);
    } else {
        mistake(
            "there is no such command; there are status, top, doctor, seq, explain, move, drain "
            "and bench",
            command);
    }
    return NULL;
}

/* Commands with options of their own. */
static const struct {
    const char *name;
    int (*run)(int argc, char **argv, const char *target, const attn_client_options_t *options);
} programs[] = {{"bench", attnctl_bench}, {"explain", attnctl_explain}};

#define PROGRAMS (sizeof(programs) / sizeof(programs[0]))

/* Where such a command stands, behind options of all commands; its own come behind it. Or argc. */
static int
program_at(int argc, char **argv, size_t *program)
{
    int i = 1;

    while (i < argc && strncmp(argv[i], "--", 2) == 0) {
        bool alone = strchr(argv[i], '=') != NULL || strcmp(argv[i], "--json") == 0 ||
                     strcmp(argv[i], "--watch") == 0 || strcmp(argv[i], "--once") == 0;
        i += alone ? 1 : 2;
    }
    for (*program = 0; i < argc && *program < PROGRAMS; ++*program) {
        if (strcmp(argv[i], programs[*program].name) == 0) {
            return i;
        }
    }
    return argc;
}

int
main(int argc, char **argv)
{
    attnctl_t ctl         = {.target = "127.0.0.1:7070"};
    arguments_t arguments = {.timeout_ms = 5000, .interval_ms = 1000};
    attn_client_options_t options;
    size_t program;
    int own = program_at(argc, argv, &program);

    attn_client_options_init(&arguments.tls);
    int code = read_arguments(own, argv, &ctl, &arguments);
    if (code != 0 || arguments.done) {
        return code;
    }
    if (own < argc) {
        return programs[program].run(argc - own, argv + own, ctl.target, &arguments.tls);
    }
    int (*command)(const attnctl_t *) = pick_command(&ctl, &arguments);
    if (command == NULL) {
        return ATTNCTL_USAGE;
    }
    ctl.interval_ms = (uint32_t)arguments.interval_ms;
    sigaction(SIGINT, &(struct sigaction){.sa_handler = on_signal}, NULL);
    sigaction(SIGTERM, &(struct sigaction){.sa_handler = on_signal}, NULL);

    options            = arguments.tls;
    options.name       = "attnctl";
    options.timeout_ms = (uint32_t)arguments.timeout_ms;
    options.spin_us    = 0;
    ctl.options        = &options;
    if (command == attnctl_doctor) {
        return attnctl_doctor(&ctl);
    }
    attn_status_t status = attn_client_open(ctl.target, &options, &ctl.client);
    if (status != ATTN_OK) {
        attnctl_failed(&ctl, status);
        return status == ATTN_ERR_INVALID ? ATTNCTL_USAGE : ATTNCTL_PROBLEM;
    }
    code = command(&ctl);
    attn_client_close(ctl.client);
    return code;
}
