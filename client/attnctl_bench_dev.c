/* attnctl_bench_dev.c: a cluster for one measurement: attnd dev, found beside this program. */
#include "client/attnctl_bench.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define START_MS 60000u
#define LOOK_MS 20u

/* attnctl's own folder has attnd where it is installed; ../daemon has it in a build. */
static bool
find_attnd(const bench_options_t *b, char path[PATH_MAX])
{
    static const char *const places[] = {"attnd", "../daemon/attnd"};
    char self[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", self, sizeof(self) - 1);

    if (b->attnd != NULL) {
        snprintf(path, PATH_MAX, "%s", b->attnd);
        return true;
    }
    self[n > 0 ? n : 0] = '\0';
    char *slash         = strrchr(self, '/');
    for (uint32_t i = 0; slash != NULL && i < 2; i++) {
        slash[1] = '\0';
        if ((size_t)snprintf(path, PATH_MAX, "%s%s", self, places[i]) < PATH_MAX &&
            access(path, X_OK) == 0) {
            return true;
        }
    }
    return false;
}

static bool
read_address(const char *file, char address[64])
{
    FILE *f    = fopen(file, "r");
    bool there = f != NULL && fscanf(f, "%63s", address) == 1;

    if (f != NULL) {
        fclose(f);
    }
    return there;
}

/* In the child: never returns. Its log goes nowhere; what ends early says why by its code. */
static void
become(const char *attnd, const bench_options_t *b, const char *file)
{
    char workers[16];

    snprintf(workers, sizeof(workers), "%u", b->dev);
    dup2(open("/dev/null", O_WRONLY), STDOUT_FILENO);
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    execl(attnd, "attnd", "dev", "--workers", workers, "--listen", "127.0.0.1:0", "--ready-file",
          file, "--log-level", "error", (char *)NULL);
    fprintf(stderr, "attnctl: %s: %s\n", attnd, strerror(errno));
    _exit(127);
}

int
bench_dev_start(const bench_options_t *b, char address[64])
{
    char attnd[PATH_MAX], folder[] = "/tmp/attnctl-bench-XXXXXX", file[64];

    if (!find_attnd(b, attnd) || mkdtemp(folder) == NULL) {
        fprintf(stderr, "attnctl: attnd is not beside attnctl, or /tmp cannot be written: say "
                        "--attnd PATH\n");
        return -1;
    }
    snprintf(file, sizeof(file), "%s/address", folder);
    pid_t pid = fork();
    if (pid == 0) {
        become(attnd, b, file);
    }
    bool there = false, ended = pid < 0;
    for (uint32_t ms = 0; !there && !ended && ms < START_MS; ms += LOOK_MS) {
        nanosleep(&(struct timespec){.tv_nsec = LOOK_MS * 1000000}, NULL);
        there = read_address(file, address);
        ended = waitpid(pid, NULL, WNOHANG) == pid;
    }
    unlink(file);
    rmdir(folder);
    if (!there) {
        fprintf(stderr, "attnctl: attnd dev --workers %u did not start\n", b->dev);
        if (!ended) {
            bench_dev_stop(pid);
        }
        return -1;
    }
    return pid;
}

void
bench_dev_stop(int pid)
{
    kill(pid, SIGTERM);
    while (waitpid(pid, NULL, 0) < 0 && errno == EINTR) {
    }
}
