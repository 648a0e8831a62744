/*
 * stress.c: many clients that verify every answer, while processes are killed and stopped.
 *
 *     supervisor (this) --+-- coordinator, workers       killed, stopped, restarted
 *                         +-- direct clients             threads over libattn
 *                         +-- thin clients               threads over the Attention service
 *                         +-- inproc clients             the engine inside: nothing disturbs them
 *
 * Every client keeps a shadow of its sequences and judges each answer against float64, some also
 * bit by bit against an engine of its own; holds each error against what was promised (none in
 * calm; what a disturbance causes, in one); and times each call against its deadline. At the end
 * nothing of the clients may be left in the daemons. Every actor's acts follow from --seed, but
 * for what the others and the disturbances do to it.
 */
#include "tests/stress/actor.h"
#include "tests/stress/supervisor.h"

#include "base/checked.h"
#include "base/clock.h"

#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define THREADS_PER_PROCESS 4u
#define END_MS 60000u       /* for the clients to leave */
#define END_FAILED_MS 3000u /* when it is known that something is wrong */

static const char usage[] =
    "usage: stress [options]\n"
    "\n"
    "  --steps N        end after N verified steps (100000)\n"
    "  --seconds N      or after N seconds, whichever comes first (3600)\n"
    "  --clients N      client threads, of all kinds together (8 and 4 per core); at most 256\n"
    "  --kinds LIST     how many of each: direct,thin,inproc (2,1,1)\n"
    "  --workers N      2 to 8 (4)\n"
    "  --chaos LIST     kill,stop,long-stop,coordinator,client; all or none (all)\n"
    "  --seed N         (1)\n"
    "  --late-ms N      how late behind its deadline a call may end (250)\n"
    "  --timeout-ms N, --step-timeout-ms N, --lost-ms N, --lease-ms N\n"
    "  --unended-ms N   how long behind its deadline a call counts as never ending (10000)\n"
    "  --settle-ms N    for what was closed to be gone, beside leases (25000)\n"
    "  --break KIND     do it wrong on purpose, once, which must be seen: answer, lse, tokens,\n"
    "                   unended, descriptor, thread or memory\n"
    "  --no-twins       do not compare bits with a second engine\n"
    "  --check-store    workers verify their stores all the time\n"
    "  --tls            certificates on every port, asked of everybody, renewed now and then\n"
    "  --json FILE      append the figures as a line of JSON\n"
    "  --attnd PATH, --attnctl PATH  the programs; default: those built beside\n"
    "\n"
    "Exit codes: 0 all was right; 1 something was not, told with seed and history; 2 arguments.\n";

/* ---- options ---- */

static bool
take_sabotage(const char *name, sabotage_t *sabotage)
{
    static const char *const names[SABOTAGES] = {
        [SABOTAGE_ANSWER] = "answer",         [SABOTAGE_LSE] = "lse",
        [SABOTAGE_TOKENS] = "tokens",         [SABOTAGE_UNENDED] = "unended",
        [SABOTAGE_DESCRIPTOR] = "descriptor", [SABOTAGE_THREAD] = "thread",
        [SABOTAGE_MEMORY] = "memory",
    };

    for (uint32_t i = SABOTAGE_NONE + 1; i < SABOTAGES; i++) {
        if (strcmp(name, names[i]) == 0) {
            *sabotage = (sabotage_t)i;
            return true;
        }
    }
    return false;
}

static bool
take_chaos(const char *list, stress_options_t *o)
{
    char text[128];

    snprintf(text, sizeof(text), "%s", list);
    for (char *word = strtok(text, ","); word != NULL; word = strtok(NULL, ",")) {
        bool all = strcmp(word, "all") == 0;
        if (!all && strcmp(word, "none") != 0 && strcmp(word, "kill") != 0 &&
            strcmp(word, "stop") != 0 && strcmp(word, "long-stop") != 0 &&
            strcmp(word, "coordinator") != 0 && strcmp(word, "client") != 0) {
            return false;
        }
        o->chaos_kill        = o->chaos_kill || all || strcmp(word, "kill") == 0;
        o->chaos_stop        = o->chaos_stop || all || strcmp(word, "stop") == 0;
        o->chaos_long_stop   = o->chaos_long_stop || all || strcmp(word, "long-stop") == 0;
        o->chaos_coordinator = o->chaos_coordinator || all || strcmp(word, "coordinator") == 0;
        o->chaos_client      = o->chaos_client || all || strcmp(word, "client") == 0;
    }
    return true;
}

enum {
    STEPS = 1,
    SECONDS,
    CLIENTS,
    KINDS,
    WORKERS,
    CHAOS,
    SEED,
    LATE,
    TIMEOUT,
    STEP_TIMEOUT,
    LOST,
    LEASE,
    UNENDED,
    SETTLE,
    BREAK,
    NO_TWINS,
    CHECK_STORE,
    TLS,
    JSON,
    ATTND,
    ATTNCTL,
    HELP
};

static const struct option options[] = {
    {"steps", required_argument, NULL, STEPS},
    {"seconds", required_argument, NULL, SECONDS},
    {"clients", required_argument, NULL, CLIENTS},
    {"kinds", required_argument, NULL, KINDS},
    {"workers", required_argument, NULL, WORKERS},
    {"chaos", required_argument, NULL, CHAOS},
    {"seed", required_argument, NULL, SEED},
    {"late-ms", required_argument, NULL, LATE},
    {"timeout-ms", required_argument, NULL, TIMEOUT},
    {"step-timeout-ms", required_argument, NULL, STEP_TIMEOUT},
    {"lost-ms", required_argument, NULL, LOST},
    {"lease-ms", required_argument, NULL, LEASE},
    {"unended-ms", required_argument, NULL, UNENDED},
    {"settle-ms", required_argument, NULL, SETTLE},
    {"break", required_argument, NULL, BREAK},
    {"no-twins", no_argument, NULL, NO_TWINS},
    {"check-store", no_argument, NULL, CHECK_STORE},
    {"tls", no_argument, NULL, TLS},
    {"json", required_argument, NULL, JSON},
    {"attnd", required_argument, NULL, ATTND},
    {"attnctl", required_argument, NULL, ATTNCTL},
    {"help", no_argument, NULL, HELP},
    {NULL, 0, NULL, 0},
};

static bool
take_number(const char *text, uint64_t least, uint64_t most, uint64_t *number)
{
    char *end;

    errno   = 0;
    *number = strtoull(text, &end, 10);
    return errno == 0 && text[0] >= '0' && text[0] <= '9' && *end == '\0' && *number >= least &&
           *number <= most;
}

static bool
take_u32(const char *text, uint32_t least, uint32_t most, uint32_t *number)
{
    uint64_t wide;
    bool fine = take_number(text, least, most, &wide);

    *number = (uint32_t)wide;
    return fine;
}

static bool
take_option(int option, stress_options_t *o, const char **chaos)
{
    switch (option) {
    case STEPS:
        return take_number(optarg, 1, UINT64_MAX, &o->steps);
    case SECONDS:
        return take_number(optarg, 1, 1000000, &o->seconds);
    case CLIENTS:
        return take_u32(optarg, 1, 256, &o->clients);
    case KINDS:
        return sscanf(optarg, "%u,%u,%u", &o->shares[0], &o->shares[1], &o->shares[2]) == 3 &&
               o->shares[0] + o->shares[1] + o->shares[2] > 0;
    case WORKERS:
        return take_u32(optarg, 2, CLUSTER_WORKERS_MAX, &o->workers);
    case CHAOS:
        *chaos = optarg;
        return take_chaos(optarg, &(stress_options_t){0});
    case SEED:
        return take_number(optarg, 0, UINT64_MAX, &o->seed);
    case LATE:
        return take_u32(optarg, 0, 60000, &o->late_ms);
    case TIMEOUT:
        return take_u32(optarg, 100, 60000, &o->timeout_ms);
    case STEP_TIMEOUT:
        return take_u32(optarg, 100, 60000, &o->step_timeout_ms);
    case LOST:
        return take_u32(optarg, 200, 60000, &o->lost_ms);
    case LEASE:
        return take_u32(optarg, 1000, 60000, &o->lease_ms);
    case UNENDED:
        return take_u32(optarg, 100, 60000, &o->unended_ms);
    case SETTLE:
        return take_u32(optarg, 100, 60000, &o->settle_ms);
    case BREAK:
        return take_sabotage(optarg, &o->sabotage);
    case NO_TWINS:
        o->twins = false;
        return true;
    case CHECK_STORE:
        o->check_store = true;
        return true;
    case TLS:
        o->tls = true;
        return true;
    case JSON:
        o->json = optarg;
        return true;
    case ATTND:
        o->attnd = optarg;
        return true;
    case ATTNCTL:
        o->attnctl = optarg;
        return true;
    default:
        return false;
    }
}

/* @return -1, or the code to exit with */
static int
take_options(int argc, char **argv, stress_options_t *o)
{
    const char *chaos = "all";
    long cores        = sysconf(_SC_NPROCESSORS_ONLN);
    int option;

    *o = (stress_options_t){
        .seed            = 1,
        .steps           = 100000,
        .seconds         = 3600,
        .clients         = (uint32_t)attn_min(8 + 4 * (uint64_t)attn_max((uint64_t)cores, 1), 256),
        .workers         = 4,
        .late_ms         = 250,
        .timeout_ms      = 3000,
        .step_timeout_ms = 4000,
        .lost_ms         = 2500, /* more than a worker is starved for on a busy machine */
        .lease_ms        = 8000,
        .unended_ms      = 10000,
        .settle_ms       = 25000,
        .twins           = true,
        .shares          = {2, 1, 1},
        .attnd           = ATTND_PATH,
        .attnctl         = ATTNCTL_PATH};
    while ((option = getopt_long(argc, argv, "h", options, NULL)) != -1) {
        if (option == HELP || option == 'h') {
            fputs(usage, stdout);
            return 0;
        }
        if (!take_option(option, o, &chaos)) {
            fprintf(stderr, "stress: wrong option or value%s%s (see --help)\n",
                    optarg != NULL ? ": " : "", optarg != NULL ? optarg : "");
            return 2;
        }
    }
    if (optind < argc) {
        fprintf(stderr, "stress: %s is no option (see --help)\n", argv[optind]);
        return 2;
    }
    take_chaos(chaos, o);
    return -1;
}

/* ---- the clients ---- */

/* Actors by kind in proportion to the shares, in processes of a few threads each. */
static void
plan_clients(supervisor_t *s)
{
    const stress_options_t *o = &s->stress->options;
    uint32_t all = o->shares[0] + o->shares[1] + o->shares[2], first = 0;

    for (uint32_t kind = 0, given = 0, share = 0; kind < TARGET_KINDS; kind++) {
        share += o->shares[kind];
        uint32_t n = o->clients * share / all - given;
        given += n;
        while (n > 0 && s->n_processes < PROCESSES_MAX) {
            uint32_t take = n < THREADS_PER_PROCESS || s->n_processes == PROCESSES_MAX - 1
                                ? n
                                : THREADS_PER_PROCESS;
            s->plans[s->n_processes] = (client_plan_t){.stress   = s->stress,
                                                       .kind     = (target_kind_t)kind,
                                                       .process  = s->n_processes,
                                                       .first    = first,
                                                       .n        = take,
                                                       .geometry = s->n_processes};
            s->plans[s->n_processes].geometry %= TRUTH_GEOMETRIES;
            s->n_processes++;
            first += take;
            n -= take;
        }
    }
}

/* In a process of its own: clients of both kinds write to all workers, and go. */
static bool
warm_up_clients(supervisor_t *s)
{
    bool fine = true;

    for (uint32_t i = 0; i < 2 * TRUTH_GEOMETRIES && fine; i++) {
        client_plan_t plan = {.stress   = s->stress,
                              .kind     = i % 2 == 0 ? TARGET_DIRECT : TARGET_THIN,
                              .geometry = i / 2};
        actor_t actor;
        target_t target;
        shadow_t shadow = {0};
        fine            = actor_init(&actor, &plan, 0, NULL) &&
               target_open(&target, plan.kind, s->stress->address, "warm-up", 5000,
                           ATTN_TRANSPORT_DEFAULT, "warm-up", actor.geometry) == ATTN_OK;
        for (uint32_t n = 0; fine && n < s->cluster.options.workers; n++) {
            fine = target_create(&target, &shadow.seq) == ATTN_OK &&
                   actor_ingest(&actor, &target, &shadow, 8 * actor.geometry->chunk_size, n) ==
                       ATTN_OK;
            shadow_clear(&shadow);
        }
        target_close(&target);
        actor_fini(&actor);
    }
    if (!fine) {
        fprintf(stderr, "warm-up: %s\n", attn_last_error());
    }
    return fine;
}

/* Clients come and go once, so that what daemons keep for later is there when their threads and
 * descriptors are counted. */
static void
warm_up(supervisor_t *s)
{
    cluster_view_t view = {0};
    int status;
    pid_t pid = fork();

    if (pid == 0) {
        exit(warm_up_clients(s) ? 0 : 1);
    }
    if (waitpid(pid, &status, 0) != pid || status != 0) {
        stress_fail(s->stress, "the cluster does not serve: the warm-up ended with %d\n", status);
    }
    sleep_ms(500);
    if (!supervisor_view(s, &view)) {
        stress_fail(s->stress, "attnctl status fails\n");
    }
    s->clients_before = view.clients;
    proc_count(s->cluster.coordinator.pid, &s->coordinator_before);
    for (uint32_t w = 0; w < s->cluster.options.workers; w++) {
        proc_counts_t now;
        proc_count(s->cluster.workers[w].pid, &now);
        s->worker_before.threads = (uint32_t)attn_max(s->worker_before.threads, now.threads);
        s->worker_before.core_threads =
            (uint32_t)attn_max(s->worker_before.core_threads, now.core_threads);
        s->worker_before.descriptors =
            (uint32_t)attn_max(s->worker_before.descriptors, now.descriptors);
        s->worker_before.heap_bytes = attn_max(s->worker_before.heap_bytes, now.heap_bytes);
    }
}

static void
wait_for_clients(supervisor_t *s)
{
    uint64_t end = now_ms() + END_MS;
    bool failed  = false;
    uint32_t n   = 1;

    while (n > 0) {
        n = 0;
        supervisor_watch(s, 20);
        if (!failed && atomic_load(&s->stress->failed)) {
            failed = true;
            end    = now_ms() + END_FAILED_MS;
        }
        sleep_ms(5);
        for (uint32_t i = 0; i < s->n_processes; i++) {
            n += s->pids[i] > 0;
        }
        if (n > 0 && now_ms() >= end) {
            stress_fail(s->stress, "UNENDED: %u client processes do not end\n", n);
            for (uint32_t i = 0; i < s->n_processes; i++) {
                if (s->pids[i] > 0) {
                    kill(s->pids[i], failed ? SIGKILL : SIGABRT);
                }
            }
            return;
        }
    }
}

/* ---- the run ---- */

static void
run(supervisor_t *s)
{
    const stress_options_t *o = &s->stress->options;
    uint64_t next_told        = 10;

    for (uint32_t i = 0; i < s->n_processes; i++) {
        supervisor_start_client(s, i);
    }
    s->began_ns = attn_now_ns();
    while (!atomic_load(&s->stress->stop)) {
        uint64_t seconds = (attn_now_ns() - s->began_ns) / UINT64_C(1000000000);
        supervisor_watch(s, (uint32_t)chance_in(&s->chance, 100, 2000));
        if (seconds >= o->seconds) {
            atomic_store(&s->stress->stop, true);
        } else if (!atomic_load(&s->stress->stop)) {
            supervisor_disturb(s);
        }
        if (seconds >= next_told) {
            printf("%4llu s: %llu steps verified\n", (unsigned long long)seconds,
                   (unsigned long long)atomic_load(&s->stress->steps));
            fflush(stdout);
            next_told = seconds + 10;
        }
    }
    wait_for_clients(s);
    s->seconds = (double)(attn_now_ns() - s->began_ns) / 1e9;
}

static stress_t *
shared_memory(void)
{
    stress_t *stress =
        mmap(NULL, sizeof(*stress), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

    if (stress == MAP_FAILED) {
        perror("stress: mmap");
        exit(1);
    }
    return stress;
}

/* Certificates in a folder of their own, and an environment that has all clients use them. */
static void
make_certs(supervisor_t *s)
{
    static const char *const variables[] = {"ATTN_TLS_CA", "ATTN_TLS_CERT", "ATTN_TLS_KEY"};
    static const char *const files[]     = {"ca.pem", "client.pem", "client.key"};
    const char *tmp                      = getenv("TMPDIR");
    char path[256];

    snprintf(s->certs, sizeof(s->certs), "%s/attn-stress-XXXXXX", tmp != NULL ? tmp : "/tmp");
    if (mkdtemp(s->certs) == NULL || !supervisor_renew_certs(s)) {
        fprintf(stderr, "stress: no certificates in %s\n", s->certs);
        exit(1);
    }
    for (uint32_t i = 0; i < 3; i++) {
        snprintf(path, sizeof(path), "%s/%s", s->certs, files[i]);
        setenv(variables[i], path, 1);
    }
}

static void
remove_certs(const supervisor_t *s)
{
    char command[256];

    snprintf(command, sizeof(command), "rm -rf '%s'", s->certs);
    if (s->certs[0] != '\0' && system(command) != 0) {
        fprintf(stderr, "stress: %s was not removed\n", s->certs);
    }
}

int
main(int argc, char **argv)
{
    static supervisor_t s;
    char lost[16], lease[16];

    s.stress = shared_memory();
    int code = take_options(argc, argv, &s.stress->options);
    if (code >= 0) {
        return code;
    }
    const stress_options_t *o = &s.stress->options;
    s.chance.state            = o->seed;
    setenv("ATTN_TEST_ATTND", o->attnd, 1);
    if (o->tls) {
        make_certs(&s);
    }
    snprintf(lost, sizeof(lost), "%u", o->lost_ms);
    snprintf(lease, sizeof(lease), "%u", o->lease_ms);
    cluster_up(&s.cluster, &(cluster_options_t){.workers     = o->workers,
                                                .slab        = "96MiB",
                                                .lost_ms     = lost,
                                                .lease_ms    = lease,
                                                .certs       = o->tls ? s.certs : NULL,
                                                .check_store = o->check_store});
    snprintf(s.stress->address, sizeof(s.stress->address), "%s", s.cluster.coordinator.address);
    atomic_store(&s.stress->coordinators, 1);
    truth_init();
    plan_clients(&s);
    warm_up(&s);
    if (!atomic_load(&s.stress->failed)) {
        run(&s);
    }
    if (!atomic_load(&s.stress->failed)) {
        supervisor_check_leaks(&s);
        supervisor_check_logs(&s);
    }
    supervisor_report(&s);
    remove_certs(&s);
    if (atomic_load(&s.stress->failed)) {
        cluster_kill(&s.cluster);
        return 1;
    }
    cluster_down(&s.cluster); /* each daemon must end well */
    return 0;
}
