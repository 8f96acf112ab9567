/* flood: peers that mean no good, for a while: half-open requests, or subscribers that talk without end.
 *
 * Story: keep `conns` connections to a hub, opened at `rate` per second at most and opened again whenever
 * the hub ends one; each sends half of a request (--say half), or becomes a subscriber and then sends
 * pings (--say pings) or text (--say text), `talk` frames a second, 0: as fast as the hub takes them.
 * Prints FLOODING when the first `conns` have been opened, FLOODED with its counts on SIGTERM or SIGINT,
 * or after `max-s`.
 */
#include "common.h"
#include <sys/epoll.h>

enum { PORT, CONNS, RATE, TALK, MAX_S, OPTIONS };
static option options[OPTIONS] = {
    [PORT] = {"--port", 0, "port of the hub"},
    [CONNS] = {"--conns", 1000, "connections kept"},
    [RATE] = {"--rate", 2000, "connections opened per second, at most"},
    [TALK] = {"--talk", 0, "frames per second and connection; 0: as fast as they are taken"},
    [MAX_S] = {"--max-s", 60, "longest time, s"},
};

enum { SAY, TEXTS };
static text_option texts[TEXTS] = {
    [SAY] = {"--say", "half", "half, pings or text"},
};

enum { MAX_READY = 1024, TURN_MS = 5, FRAMES = 64 };
typedef enum { NONE, CONNECTING, UPGRADING, TALKING } phase;

typedef struct {
    int fd;
    phase phase;
    double owed; /* frames that are due */
} peer;

static peer *peers;
static size_t total, open_now, opened, refused, ended;
static uint64_t frames_sent;
static int epoll;
static bool talks;
static char frame[FRAMES * 32];
static size_t frame_bytes;
static volatile sig_atomic_t stop_asked;

static void on_stop(int number) {
    (void)number;
    stop_asked = 1;
}

static void drop(peer *p) {
    if (p->phase == TALKING) ended++;
    else refused++;
    close(p->fd);
    p->phase = NONE;
    open_now--;
}

static void start(peer *p) {
    struct sockaddr_in address = loopback((int)options[PORT].value);
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET, .data.u32 = (uint32_t)(p - peers)};
    p->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (p->fd < 0) die("socket");
    p->phase = CONNECTING;
    p->owed = 0;
    open_now++;
    opened++;
    send_at_once(p->fd);
    if (connect(p->fd, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS) drop(p);
    else epoll_ctl(epoll, EPOLL_CTL_ADD, p->fd, &event);
}

static void on_connected(peer *p) {
    static const char half[] = "GET /ws HTTP/1.1\r\nHost: hub\r\nUpgrade: web";
    static const char whole[] = "GET /ws HTTP/1.1\r\nHost: hub\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                                "Sec-WebSocket-Key: " SAMPLE_KEY "\r\nSec-WebSocket-Version: 13\r\n\r\n";
    const char *request = talks ? whole : half;
    if (send(p->fd, request, strlen(request), MSG_NOSIGNAL) < 0) drop(p);
    else p->phase = UPGRADING;
}

static void on_readable(peer *p) {
    static char input[1 << 16];
    ssize_t got;
    while ((got = recv(p->fd, input, sizeof input, 0)) > 0) {
        if (p->phase == UPGRADING && talks && got >= 12 && !memcmp(input, "HTTP/1.1 101", 12)) p->phase = TALKING;
    }
    if (got == 0 || (errno != EAGAIN && errno != EINTR)) drop(p);
}

/* Masked with zeros, which leaves the payload as it is. */
static void build_frames(void) {
    bool pings = !strcmp(texts[SAY].value, "pings");
    for (int i = 0; i < FRAMES; i++) {
        size_t length = pings ? 8 : 24;
        frame[frame_bytes] = (char)(pings ? 0x89 : 0x81);
        frame[frame_bytes + 1] = (char)(0x80 | length);
        memset(frame + frame_bytes + 2, 0, 4);
        memset(frame + frame_bytes + 6, 'x', length);
        frame_bytes += 6 + length;
    }
}

static void talk(peer *p, double seconds) {
    size_t each = frame_bytes / FRAMES, wanted = FRAMES;
    if (options[TALK].value > 0) {
        p->owed += seconds * options[TALK].value;
        wanted = p->owed > FRAMES ? FRAMES : (size_t)p->owed;
        p->owed -= (double)wanted;
    }
    if (!wanted) return;
    ssize_t sent = send(p->fd, frame, wanted * each, MSG_NOSIGNAL);
    if (sent > 0) frames_sent += (uint64_t)sent / each;
    if (sent > 0 && (size_t)sent % each) drop(p); /* a frame was cut: this one has said enough */
    else if (sent < 0 && errno != EAGAIN) drop(p);
}

int main(int argc, char **argv) {
    read_options(argc, argv, options, OPTIONS, texts, TEXTS);
    prepare_process();
    signal(SIGTERM, on_stop);
    signal(SIGINT, on_stop);
    talks = strcmp(texts[SAY].value, "half");
    build_frames();
    total = (size_t)options[CONNS].value;
    peers = calloc(total, sizeof *peers);
    if (!peers) die("out of memory");
    epoll = epoll_create1(EPOLL_CLOEXEC);
    uint64_t began = clock_ns(CLOCK_MONOTONIC), turned = began;
    double allowed = 0;
    size_t next = 0;
    bool told = false;
    while (!stop_asked && (double)(turned - began) / 1e9 < options[MAX_S].value) {
        struct epoll_event ready[MAX_READY];
        int count = epoll_wait(epoll, ready, MAX_READY, TURN_MS);
        for (int i = 0; i < count; i++) {
            peer *p = &peers[ready[i].data.u32];
            if (p->phase == CONNECTING && (ready[i].events & EPOLLOUT)) on_connected(p);
            if (p->phase != NONE && (ready[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR))) on_readable(p);
        }
        uint64_t now = clock_ns(CLOCK_MONOTONIC);
        double seconds = (double)(now - turned) / 1e9;
        if (seconds * 1000 < TURN_MS) continue;
        turned = now;
        allowed += seconds * options[RATE].value;
        for (size_t i = 0; i < total && allowed >= 1; i++, next = (next + 1) % total) {
            if (peers[next].phase != NONE) continue;
            start(&peers[next]);
            allowed -= 1;
        }
        if (allowed > options[RATE].value) allowed = options[RATE].value;
        if (talks)
            for (size_t i = 0; i < total; i++)
                if (peers[i].phase == TALKING) talk(&peers[i], seconds);
        if (!told && opened >= total) {
            printf("FLOODING {\"opened\":%zu}\n", opened);
            fflush(stdout);
            told = true;
        }
    }
    printf("FLOODED {\"opened\":%zu,\"open\":%zu,\"refused\":%zu,\"ended\":%zu,\"frames\":%llu}\n", opened, open_now,
           refused, ended, (unsigned long long)frames_sent);
    fflush(stdout);
    return 0;
}
