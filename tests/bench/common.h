/* What floor.c, load.c and publish.c share: clocks, options, loopback sockets, percentiles.
 *
 * Every tool talks to 127.0.0.1 only, takes numbers as options, prints JSON on
 * stdout and its complaints on stderr, and dies with the process that started it.
 */
#ifndef BENCH_COMMON_H
#define BENCH_COMMON_H
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define CHANNEL "events.critical"
/* RFC 6455 section 1.3: the sample key and the answer to it. load.c sends this
 * key only and floor.c serves load.c only, so neither needs SHA-1. */
#define SAMPLE_KEY "dGhlIHNhbXBsZSBub25jZQ=="
#define SAMPLE_ACCEPT "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
#define NS_PER_S 1000000000ull

static inline _Noreturn void die(const char *what) {
    if (errno) perror(what);
    else fprintf(stderr, "%s\n", what);
    exit(1);
}

static inline uint64_t clock_ns(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

/* One numeric option; `value` holds the default until read_options() ran. */
typedef struct {
    const char *name;
    double value;
    const char *help;
} option;

/* The same with a text. */
typedef struct {
    const char *name, *value, *help;
} text_option;

static inline _Noreturn void show_options(const option *options, size_t count, const text_option *texts,
                                          size_t text_count) {
    for (size_t i = 0; i < count; i++)
        fprintf(stderr, "%-14s %s (%g)\n", options[i].name, options[i].help, options[i].value);
    for (size_t i = 0; i < text_count; i++)
        fprintf(stderr, "%-14s %s (%s)\n", texts[i].name, texts[i].help, texts[i].value);
    exit(2);
}

static inline void read_options(int argc, char **argv, option *options, size_t count, text_option *texts,
                                size_t text_count) {
    for (int i = 1; i < argc; i += 2) {
        size_t which = 0, text = 0;
        while (which < count && strcmp(argv[i], options[which].name)) which++;
        while (text < text_count && strcmp(argv[i], texts[text].name)) text++;
        if ((which == count && text == text_count) || i + 1 == argc)
            show_options(options, count, texts, text_count);
        if (which < count) options[which].value = atof(argv[i + 1]);
        else texts[text].value = argv[i + 1];
    }
}

/* Sockets up to the hard limit, exact sleeps, no SIGPIPE, no life without the parent. */
static inline void prepare_process(void) {
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    signal(SIGPIPE, SIG_IGN);
    prctl(PR_SET_TIMERSLACK, 1);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
}

static inline struct sockaddr_in loopback(int port) {
    return (struct sockaddr_in){.sin_family = AF_INET,
                                .sin_port = htons((uint16_t)port),
                                .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
}

static inline void send_at_once(int fd) {
    int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

static inline int connect_redis(int port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in address = loopback(port);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address)) die("connect to Redis");
    send_at_once(fd);
    return fd;
}

static inline int by_value(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static inline void sort_samples(float *samples, size_t count) {
    qsort(samples, count, sizeof *samples, by_value);
}

/* The smallest of the *sorted* samples that at least the share `q` of them does not exceed. */
static inline double percentile(const float *sorted, size_t count, double q) {
    if (!count) return 0;
    size_t rank = (size_t)(q * (double)count + 0.999999);
    return sorted[rank ? rank - 1 : 0];
}
#endif
