/* A stand-in for the python interpreter in tests: asks a server that has already imported the heavy packages to fork a process
   that runs the same command, and behaves as that process: same standard streams, signals, exit status. The first client starts
   the server. Falls back to the real interpreter for other commands, and where the server declines. Files that it has inherited
   besides the streams are passed on under their numbers. Usage: as python.

   Compiled with PYTHON (the real interpreter), FOLDER (of socket, lock and log), SERVER (server.py), OWNER (the process whose
   end ends the server) and KIND (of the server) as strings; FOLDER/environment holds the server's variables, each with a final zero byte. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;
static volatile sig_atomic_t child = 0;
static const int FORWARDED[] = {SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2};
enum { MOST = 64 }; /* files that are passed on */
static const char *const OURS[] = {"launch.rank_main", "launch.rank_server", "launch.replay", "launch.cli", "pipeline.", "tests.helpers."};
static const char *const NEW[] = {"pipeline.bench.prove.runner"}; /* it ends with its parent, which of a fork is the server */
static volatile sig_atomic_t pending[65];

static void forward(int number) {
    if (child) kill(child, number);
    else pending[number] = 1;
}

static void real(char **argv) {
    argv[0] = (char *)PYTHON;
    execv(PYTHON, argv);
    perror(PYTHON);
    _exit(127);
}

/* In a child: becomes the server. */
static void serve(void) {
    struct stat about;
    int file = open(FOLDER "/environment", O_RDONLY | O_CLOEXEC);
    if (file < 0 || fstat(file, &about)) _exit(1);
    char *text = malloc(about.st_size + 1), **variables = malloc((about.st_size + 2) * sizeof(char *));
    if (!text || !variables || read(file, text, about.st_size) != about.st_size) _exit(1);
    size_t count = 0;
    for (char *at = text; at < text + about.st_size; at += strlen(at) + 1) variables[count++] = at;
    variables[count] = NULL;
    int null = open("/dev/null", O_RDWR), log = open(FOLDER "/server.log", O_CREAT | O_WRONLY | O_APPEND, 0600);
    dup2(null, 0);
    dup2(log, 1);
    dup2(log, 2);
    setsid();
    for (int n = 1; n < 32; n++) signal(n, SIG_DFL);
    execle(PYTHON, PYTHON, "-P", SERVER, FOLDER "/socket", OWNER, KIND, (char *)NULL, variables);
    _exit(1);
}

static int reach(void) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strncpy(address.sun_path, FOLDER "/socket", sizeof address.sun_path - 1);
    int server = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (server < 0) return -1;
    if (connect(server, (struct sockaddr *)&address, sizeof address) == 0) return server;
    close(server);
    return -1;
}

/* A connection to the server, which the first client starts; those that come meanwhile wait. */
static int connected(void) {
    int server = reach();
    if (server >= 0) return server;
    int lock = open(FOLDER "/lock", O_CREAT | O_RDWR | O_CLOEXEC, 0600);
    if (lock < 0) return -1;
    while (flock(lock, LOCK_EX) && errno == EINTR) {}
    if ((server = reach()) < 0) {
        pid_t made = fork();
        if (made == 0) serve();
        while (made > 0 && (server = reach()) < 0 && waitpid(made, NULL, WNOHANG) == 0) usleep(20000);
    }
    close(lock);
    return server;
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
        for (size_t i = 0; i < sizeof NEW / sizeof *NEW; i++)
            if (!strcmp(*word, NEW[i])) return 0;
        for (size_t i = 0; i < sizeof OURS / sizeof *OURS; i++)
            if (!strncmp(*word, OURS[i], strlen(OURS[i]))) return 1;
    }
    return 0;
}

/* Numbers of the open files, the standard streams first; 0 if there are more than MOST. */
static size_t inherited(int *files) {
    size_t count = 3;
    for (int n = 0; n < 3; n++) files[n] = n;
    DIR *folder = opendir("/proc/self/fd");
    if (!folder) return 0;
    for (struct dirent *one; (one = readdir(folder));) {
        int number = atoi(one->d_name);
        if (number < 3 || number == dirfd(folder)) continue;
        if (count == MOST) { count = 0; break; }
        files[count++] = number;
    }
    closedir(folder);
    return count;
}

int main(int argc, char **argv) {
    const char *wanted = getenv("FOVEA_WARM");
    int files[MOST];
    size_t opened = 0;
    if (!fits(argv) || (wanted && !strcmp(wanted, "0")) || !(opened = inherited(files))) real(argv);
    int server = connected();
    if (server < 0) real(argv);

    char *cwd = get_current_dir_name();
    if (cwd == NULL) real(argv);
    char numbers[12 * MOST] = "", *end = numbers;
    for (size_t i = 3; i < opened; i++) end += sprintf(end, "%d ", files[i]);
    size_t size = strlen(cwd) + strlen(numbers) + 2, words = argc - 1, variables = 0;
    for (int i = 1; i < argc; i++) size += strlen(argv[i]) + 1;
    for (char **one = environ; *one; one++, variables++) size += strlen(*one) + 1;
    uint32_t head[3] = {(uint32_t)size, (uint32_t)words, (uint32_t)variables};
    char *body = malloc(size), *at = body;
    if (body == NULL) real(argv);
    at = stpcpy(at, cwd) + 1;
    at = stpcpy(at, numbers) + 1;
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
    char control[CMSG_SPACE(sizeof files)] = {0};
    size_t passed = opened * sizeof *files;
    struct iovec parts[2] = {{head, sizeof head}, {&ignored, sizeof ignored}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2, .msg_control = control, .msg_controllen = CMSG_SPACE(passed)};
    struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(passed);
    memcpy(CMSG_DATA(rights), files, passed);
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
