/* load: many WebSocket subscribers in one process, and the clock that judges a hub.
 *
 * Story: connect `conns` subscribers at `ramp` per second (and `frozen` more that never
 * read again), print READY, receive the events `first` to `last`, print RESULT.
 * It ends when every subscriber has every event, when all connections are
 * gone, on SIGTERM or SIGINT, or after `max-s`.
 *
 * What counts as an event, and how late it was: tally.h.
 *
 * A compressed event is inflated once: all subscribers get the same bytes, and what
 * each of them does with them is not what is measured.
 */
#include "common.h"
#include "tally.h"
#if __has_include(<zlib.h>)
#include <zlib.h>
#endif
#include <sys/epoll.h>

enum { PORT, CONNS, RAMP, IN_FLIGHT, FROZEN, FIRST, LAST, EACH, BY_OFFSET, GROUPS,
       PINGS, CONNECT_S, MAX_S, STAY, OPTIONS };
static option options[OPTIONS] = {
    [PORT] = {"--port", 0, "port of the hub"},
    [CONNS] = {"--conns", 50, "subscribers that read"},
    [RAMP] = {"--ramp", 2000, "connections offered per second"},
    [IN_FLIGHT] = {"--in-flight", 128, "most unfinished handshakes; keeps the hub's accept queue short"},
    [FROZEN] = {"--frozen", 0, "further subscribers that never read after the handshake"},
    [FIRST] = {"--first", 1, "first sequence expected; earlier ones are counted as outside"},
    [LAST] = {"--last", 0, "last sequence expected; below --first: stay idle until a signal"},
    [EACH] = {"--each", 0, "how many of these events each subscriber is to get; 0: all"},
    [BY_OFFSET] = {"--by-offset", 0, "1: number events by offset; to a reader they rise by one, for ever"},
    [GROUPS] = {"--groups", 1, "what the number of a connection in --path is counted modulo"},
    [PINGS] = {"--pings", 0, "print PINGED once every reader has answered so many pings"},
    [CONNECT_S] = {"--connect-s", 30, "deadline for all handshakes, s"},
    [MAX_S] = {"--max-s", 60, "longest time from READY to RESULT, s"},
    [STAY] = {"--stay", 0, "1: stay connected after RESULT, and read on, until a signal"},
};

enum { PATH, SAMPLES, TOKENS, FORM, TEXTS };
static text_option texts[TEXTS] = {
    [PATH] = {"--path", "/ws", "what is asked for; a %d in it becomes the number of the connection"},
    [SAMPLES] = {"--samples", "", "file for every counted delivery: due us, latency ns (int64 each)"},
    [TOKENS] = {"--tokens", "", "file of tokens, one a line, which the connections show in turn"},
    [FORM] = {"--form", "", "how events are asked for: `deflate` (permessage-deflate) or `sse`"},
};

enum { INPUT_BYTES = 1 << 20, MAX_READY = 1024 };
enum { OP_TEXT = 1, OP_CLOSE = 8, OP_PING = 9 };
typedef enum { WAITING, CONNECTING, UPGRADING, OPEN, CLOSED } phase;

typedef struct {
    int fd;
    phase phase;
    bool frozen;
    int pings;
    uint64_t started_ns;     /* monotonic */
    reader heard;
    char *partial;           /* a frame whose end has not come yet */
    size_t partial_bytes, partial_room;
} subscriber;

static subscriber *subscribers;
static size_t total;
static float *connect_us;                /* raw samples, sorted at the end */
static int epoll;
static char input[INPUT_BYTES];
static char *tokens, **token_at;         /* the file, and where each token begins in it */
static size_t token_count;
static volatile sig_atomic_t stop_asked;
static bool by_deflate, by_sse;

static struct {
    size_t failed, in_flight, pinged;
    uint64_t began_ns;                   /* wall clock */
} connects;

static void on_stop(int number) {
    (void)number;
    stop_asked = 1;
}

/* ---- one connection ----------------------------------------------------------------- */

static void drop(subscriber *s) {
    if (s->phase == OPEN) counts.closed++;
    else connects.failed++, connects.in_flight--;
    close(s->fd);
    free(s->partial);
    s->partial = NULL;
    s->phase = CLOSED;
}

static void watch(subscriber *s, int operation, uint32_t interest) {
    struct epoll_event event = {.events = interest, .data.u32 = (uint32_t)(s - subscribers)};
    epoll_ctl(epoll, operation, s->fd, &event);
}

static void start(subscriber *s) {
    struct sockaddr_in address = loopback((int)options[PORT].value);
    s->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (s->fd < 0) die("socket");
    s->phase = CONNECTING;
    s->started_ns = clock_ns(CLOCK_MONOTONIC);
    connects.in_flight++;
    send_at_once(s->fd);
    if (connect(s->fd, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS) drop(s);
    else watch(s, EPOLL_CTL_ADD, EPOLLOUT);
}

/* Writes the request of a connection, with its number in the path, and returns its length. */
static ssize_t put_request(char *at, size_t room, const subscriber *s) {
    const char *path = texts[PATH].value, *mark = strstr(path, "%d");
    char number[24] = "";
    int before = mark ? (int)(mark - path) : (int)strlen(path);
    if (mark) snprintf(number, sizeof number, "%d", (int)(s - subscribers) % (int)options[GROUPS].value);
    const char *upgrade = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: " SAMPLE_KEY "\r\n"
                          "Sec-WebSocket-Version: 13\r\n";
    return snprintf(at, room, "GET %.*s%s%s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n%s%s%s%s%s\r\n",
                    before, path, number, mark ? mark + 2 : "", (int)options[PORT].value, by_sse ? "" : upgrade,
                    by_deflate ? "Sec-WebSocket-Extensions: permessage-deflate\r\n" : "",
                    token_count ? "Authorization: Bearer " : "",
                    token_count ? token_at[(size_t)(s - subscribers) % token_count] : "", token_count ? "\r\n" : "");
}

static void on_connected(subscriber *s) {
    char request[4096];
    ssize_t length = put_request(request, sizeof request, s); /* a refused connection fails here: */
    if (send(s->fd, request, (size_t)length, MSG_NOSIGNAL) != length) {
        drop(s);
        return;
    }
    s->phase = UPGRADING;
    watch(s, EPOLL_CTL_MOD, EPOLLIN);
}

/* Consumes the answer to the upgrade; returns how many bytes it was, 0: more has to come. */
static size_t read_answer(subscriber *s, const char *bytes, size_t length) {
    const char *end = memmem(bytes, length, "\r\n\r\n", 4);
    if (!end) return 0;
    if (length < 12 || memcmp(bytes, by_sse ? "HTTP/1.1 200" : "HTTP/1.1 101", 12)) {
        if (!connects.failed) fprintf(stderr, "upgrade refused: %.*s\n", (int)(length < 64 ? length : 64), bytes);
        drop(s);
        return length;
    }
    s->phase = OPEN;
    connects.in_flight--;
    connect_us[counts.open++] = (float)((double)(clock_ns(CLOCK_MONOTONIC) - s->started_ns) / 1e3);
    if (s->frozen) watch(s, EPOLL_CTL_DEL, 0);
    return (size_t)(end + 4 - bytes);
}

static void answer_ping(subscriber *s, const char *payload, size_t length) {
    char pong[6 + 125] = {(char)0x8a, (char)(0x80 | length)}; /* the mask 0 leaves bytes as they are */
    memcpy(pong + 6, payload, length);
    if (send(s->fd, pong, 6 + length, MSG_NOSIGNAL) < 0) return;
    if (++s->pings == (int)options[PINGS].value) connects.pinged++;
}

static void on_frame(subscriber *s, int opcode, const char *payload, size_t length, uint64_t now_ns) {
    if (opcode == OP_TEXT) on_event(&s->heard, payload, length, now_ns);
    else if (opcode == OP_PING && length <= 125) answer_ping(s, payload, length);
    else if (opcode == OP_CLOSE && length >= 2)
        counts.close_code = (unsigned char)payload[0] << 8 | (unsigned char)payload[1];
    else counts.other++;
}

#ifdef Z_SYNC_FLUSH
/* What a compressed message says; it is kept, as the next subscriber gets the same one. */
static const char *inflated(const char *payload, size_t length, size_t *size) {
    static char last[INPUT_BYTES], text[INPUT_BYTES];
    static size_t last_length, text_length;
    if (length != last_length || memcmp(payload, last, length)) {
        z_stream z = {0};
        if (length + 4 > sizeof last || inflateInit2(&z, -12) != Z_OK) die("inflate");
        memcpy(last, payload, length);
        memcpy(last + length, "\0\0\xff\xff", 4);
        z.next_in = (Bytef *)last, z.avail_in = (uInt)length + 4;
        z.next_out = (Bytef *)text, z.avail_out = sizeof text;
        if (inflate(&z, Z_SYNC_FLUSH) != Z_OK) die("inflate");
        last_length = length, text_length = sizeof text - z.avail_out;
        inflateEnd(&z);
    }
    *size = text_length;
    return text;
}
#else
static const char *inflated(const char *payload, size_t length, size_t *size) {
    die("built without zlib");
    return *size = length, payload;
}
#endif

/* Handles every whole event of a stream; returns how many bytes they were. */
static size_t read_stream(subscriber *s, const char *bytes, size_t length, uint64_t now_ns) {
    size_t done = 0;
    const char *end;
    while ((end = memmem(bytes + done, length - done, "\n\n", 2))) {
        const char *at = bytes + done, *line = at;
        while (line < end && memcmp(line, "data: ", 6)) {
            const char *next = memchr(line, '\n', (size_t)(end - line));
            line = next ? next + 1 : end;
        }
        if (line < end && memcmp(at, "event: ", 7)) on_event(&s->heard, line + 6, (size_t)(end - line - 6), now_ns);
        else counts.other++;
        done = (size_t)(end - bytes) + 2;
    }
    return done;
}

/* Length of the header at `bytes` and, in *payload, of what follows it. 0: more has to come. */
static size_t read_header(const unsigned char *bytes, size_t length, size_t *payload) {
    if (length < 2) return 0;
    size_t extra = bytes[1] == 126 ? 2 : bytes[1] == 127 ? 8 : 0;
    if (length < 2 + extra) return 0;
    *payload = extra ? 0 : bytes[1];
    for (size_t i = 0; i < extra; i++) *payload = *payload << 8 | bytes[2 + i];
    return 2 + extra;
}

/* Handles every whole frame; returns how many bytes they were. A frame that no hub of
 * events may send (masked, in fragments, larger than the buffer) ends the connection. */
static size_t read_frames(subscriber *s, const char *bytes, size_t length, uint64_t now_ns) {
    size_t done = 0, header, payload;
    while ((header = read_header((const unsigned char *)bytes + done, length - done, &payload))) {
        const char *frame = bytes + done;
        if ((frame[1] & 0x80) || !(frame[0] & 0x80) || payload > INPUT_BYTES / 2) {
            fprintf(stderr, "malformed frame\n");
            drop(s);
            return length;
        }
        if (length - done < header + payload) break;
        size_t size = payload;
        const char *text = frame + header;
        if (frame[0] & 0x40) text = inflated(text, payload, &size);
        on_frame(s, frame[0] & 0x0f, text, size, now_ns);
        done += header + payload;
    }
    return done;
}

static void keep_partial(subscriber *s, const char *bytes, size_t length) {
    if (length > s->partial_room) {
        s->partial_room = length * 2;
        s->partial = realloc(s->partial, s->partial_room);
        if (!s->partial) die("out of memory");
    }
    if (length) memcpy(s->partial, bytes, length);
    s->partial_bytes = length;
}

static void on_readable(subscriber *s) {
    size_t length = s->partial_bytes, done = 0;
    if (length) memcpy(input, s->partial, length);
    ssize_t got = recv(s->fd, input + length, sizeof input - length, 0);
    uint64_t now_ns = clock_ns(CLOCK_REALTIME);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (got <= 0) {
        drop(s);
        return;
    }
    length += (size_t)got;
    if (s->phase == UPGRADING) done = read_answer(s, input, length);
    if (s->phase == OPEN && !s->frozen)
        done += (by_sse ? read_stream : read_frames)(s, input + done, length - done, now_ns);
    if (s->phase != CLOSED) keep_partial(s, input + done, length - done);
}

/* ---- the run ------------------------------------------------------------------------ */

static void pump(int timeout_ms) {
    struct epoll_event ready[MAX_READY];
    int count = epoll_wait(epoll, ready, MAX_READY, timeout_ms);
    for (int i = 0; i < count; i++) {
        subscriber *s = &subscribers[ready[i].data.u32];
        if (s->phase == CONNECTING) on_connected(s);
        else if (s->phase != CLOSED) on_readable(s);
    }
}

static void read_tokens(const char *path) {
    FILE *file = fopen(path, "r");
    if (!file || fseek(file, 0, SEEK_END)) die(path);
    size_t length = (size_t)ftell(file), room = 0;
    rewind(file);
    tokens = zeroed(length + 1, 1);
    if (fread(tokens, 1, length, file) != length) die(path);
    fclose(file);
    for (size_t i = 0; i < length; i++) room += tokens[i] == '\n';
    token_at = zeroed(room + 1, sizeof *token_at);
    for (char *line = strtok(tokens, "\n"); line; line = strtok(NULL, "\n")) token_at[token_count++] = line;
}

static double seconds_since(uint64_t monotonic_ns) {
    return (double)(clock_ns(CLOCK_MONOTONIC) - monotonic_ns) / 1e9;
}

static void connect_all(void) {
    uint64_t began = clock_ns(CLOCK_MONOTONIC);
    size_t started = 0;
    connects.began_ns = clock_ns(CLOCK_REALTIME);
    while ((started < total || connects.in_flight) && !stop_asked) {
        double elapsed_s = seconds_since(began);
        if (elapsed_s > options[CONNECT_S].value) break;
        while (started < total && connects.in_flight < (size_t)options[IN_FLIGHT].value &&
               (double)started <= elapsed_s * options[RAMP].value)
            start(&subscribers[started++]);
        pump(1);
    }
    sort_samples(connect_us, counts.open);
    printf("READY {\"open\":%zu,\"failed\":%zu,\"connect_s\":%.3f,"
           "\"connect_us\":{\"p50\":%.1f,\"p99\":%.1f}}\n",
           counts.open, total - counts.open, seconds_since(began),
           percentile(connect_us, counts.open, .5), percentile(connect_us, counts.open, .99));
    fflush(stdout);
}

/* Receives until there is a reason to stop, and returns it. */
static const char *receive_all(void) {
    uint64_t began = clock_ns(CLOCK_MONOTONIC);
    bool pings_told = options[PINGS].value == 0;
    for (;;) {
        if (run.events && counts.whole == run.conns) return "delivered";
        if (counts.closed == counts.open) return "closed";
        if (stop_asked) return "signal";
        if (seconds_since(began) > options[MAX_S].value) return "max-s";
        if (!pings_told && connects.pinged == run.conns) {
            printf("PINGED {\"subscribers\":%zu}\n", connects.pinged);
            fflush(stdout);
            pings_told = true;
        }
        pump(20);
    }
}

static double cpu_s(void) {
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    return (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
           (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

/* Takes all memory of the run now, so that nothing is allocated while the clock counts. */
static void prepare_run(void) {
    double wanted = options[LAST].value - options[FIRST].value + 1;
    run.conns = (size_t)options[CONNS].value;
    run.events = wanted > 0 ? (size_t)wanted : 0;
    run.each = options[EACH].value > 0 ? (size_t)options[EACH].value : run.events;
    run.first = (int64_t)options[FIRST].value;
    run.by_offset = options[BY_OFFSET].value > 0;
    run.samples_path = texts[SAMPLES].value;
    prepare_tally();
    total = run.conns + (size_t)options[FROZEN].value;
    subscribers = zeroed(total, sizeof *subscribers);
    connect_us = zeroed(total, sizeof *connect_us);
    for (size_t i = 0; i < total; i++) {
        subscribers[i].frozen = i >= run.conns;
        prepare_reader(&subscribers[i].heard);
    }
    epoll = epoll_create1(EPOLL_CLOEXEC);
}

int main(int argc, char **argv) {
    read_options(argc, argv, options, OPTIONS, texts, TEXTS);
    prepare_process();
    signal(SIGTERM, on_stop);
    signal(SIGINT, on_stop);
    if (strlen(texts[PATH].value) > 1024 || options[GROUPS].value < 1) die("bad --path or --groups");
    by_deflate = !strcmp(texts[FORM].value, "deflate"), by_sse = !strcmp(texts[FORM].value, "sse");
    if (*texts[TOKENS].value) read_tokens(texts[TOKENS].value);
    prepare_run();
    connect_all();
    double cpu_before_s = cpu_s();
    const char *end = receive_all();
    print_result(end, connects.began_ns, cpu_s() - cpu_before_s);
    fflush(stdout);
    while (options[STAY].value > 0 && !stop_asked) pump(20);
    return 0;
}
