/* A stand-in for the python interpreter in tests: asks a server that has already imported the heavy packages to fork a process
   that runs the same command, and behaves as that process: same standard streams, signals, exit status. Falls back to the real
   interpreter where the server declines. Usage: as python; FOVEA_WARM_SOCKET and FOVEA_WARM_PYTHON name server and interpreter. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;
static volatile sig_atomic_t child = 0;
static const int FORWARDED[] = {SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2};
static volatile sig_atomic_t pending[65];

static void forward(int number) {
    if (child) kill(child, number);
    else pending[number] = 1;
}

static void real(char **argv) {
    const char *python = getenv("FOVEA_WARM_PYTHON");
    if (python == NULL) { fprintf(stderr, "FOVEA_WARM_PYTHON is not set\n"); _exit(127); }
    argv[0] = (char *)python;
    execv(python, argv);
    perror(python);
    _exit(127);
}

static int put(int to, const void *data, size_t size) {
    while (size) {
        ssize_t n = send(to, data, size, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return -1;
        data = (const char *)data + n;
        size -= n;
    }
    return 0;
}

static int get(int from, void *data, size_t size) {
    while (size) {
        ssize_t n = recv(from, data, size, 0);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return -1;
        data = (char *)data + n;
        size -= n;
    }
    return 0;
}

static int fits(char **argv) {
    for (char **word = argv + 1; *word; word++) {
        if (!strcmp(*word, "-I") || !strcmp(*word, "-S") || !strcmp(*word, "-E")) return 0;
        if (!strncmp(*word, "launch.rank_main", 16) || !strncmp(*word, "launch.cli", 10)) return 1;
    }
    return 0;
}

int main(int argc, char **argv) {
    const char *path = getenv("FOVEA_WARM_SOCKET");
    if (path == NULL || !fits(argv)) real(argv);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    int server = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (server < 0 || connect(server, (struct sockaddr *)&address, sizeof address)) real(argv);

    char *cwd = get_current_dir_name();
    if (cwd == NULL) real(argv);
    size_t size = strlen(cwd) + 1, words = argc - 1, variables = 0;
    for (int i = 1; i < argc; i++) size += strlen(argv[i]) + 1;
    for (char **one = environ; *one; one++, variables++) size += strlen(*one) + 1;
    uint32_t head[3] = {(uint32_t)size, (uint32_t)words, (uint32_t)variables};
    char *body = malloc(size), *at = body;
    if (body == NULL) real(argv);
    at = stpcpy(at, cwd) + 1;
    for (int i = 1; i < argc; i++) at = stpcpy(at, argv[i]) + 1;
    for (char **one = environ; *one; one++) at = stpcpy(at, *one) + 1;

    struct sigaction action = {.sa_handler = forward}, before;
    for (size_t i = 0; i < sizeof FORWARDED / sizeof *FORWARDED; i++) {
        sigaction(FORWARDED[i], NULL, &before);
        if (before.sa_handler != SIG_IGN) sigaction(FORWARDED[i], &action, NULL);
    }
    uint64_t ignored = 0;
    for (int n = 1; n < 32; n++) {
        sigaction(n, NULL, &before);
        if (before.sa_handler == SIG_IGN) ignored |= 1ull << n;
    }
    int streams[3] = {0, 1, 2};
    char control[CMSG_SPACE(sizeof streams)] = {0};
    struct iovec parts[2] = {{head, sizeof head}, {&ignored, sizeof ignored}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2, .msg_control = control, .msg_controllen = sizeof control};
    struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(sizeof streams);
    memcpy(CMSG_DATA(rights), streams, sizeof streams);
    int32_t answer = 0;
    if (sendmsg(server, &message, MSG_NOSIGNAL) < 0 || put(server, body, size) || get(server, &answer, sizeof answer) || answer <= 0) {
        for (size_t i = 0; i < sizeof FORWARDED / sizeof *FORWARDED; i++) {
            sigaction(FORWARDED[i], NULL, &before);
            if (before.sa_handler == forward) signal(FORWARDED[i], SIG_DFL);
        }
        close(server);
        real(argv);
    }
    child = answer;
    for (int n = 1; n < 65; n++) if (pending[n]) kill(child, n);
    int32_t status = 0;
    if (get(server, &status, sizeof status)) _exit(255); /* the server is gone */
    if (WIFEXITED(status)) _exit(WEXITSTATUS(status));
    signal(WTERMSIG(status), SIG_DFL);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    kill(getpid(), WTERMSIG(status));
    pause();
    return 255;
}
