/* load: many WebSocket subscribers in one process, and the clock that judges a hub.
 *
 * Story: connect `conns` subscribers at `ramp` per second (and `frozen` more that never
 * read again), print READY, receive the events `first` to `last`, print RESULT.
 * It ends when every subscriber has every event, when all connections are
 * gone, on SIGTERM or SIGINT, or after `max-s`.
 *
 * Latency = the wall clock after recv() returned minus `published_at_ns` (else
 * `published_at_us`) of the event, so it includes everything from the due time to
 * the moment when a program holds the bytes. Nothing is clamped: a delivery
 * that seems to arrive before it was published is counted as `negative`.
 */
#include "common.h"
#include <sys/epoll.h>

enum { PORT, CONNS, RAMP, IN_FLIGHT, FROZEN, FIRST, LAST, PINGS, CONNECT_S, MAX_S, OPTIONS };
static option options[OPTIONS] = {
    [PORT] = {"--port", 0, "port of the hub"},
    [CONNS] = {"--conns", 50, "subscribers that read"},
    [RAMP] = {"--ramp", 2000, "connections offered per second"},
    [IN_FLIGHT] = {"--in-flight", 128, "most unfinished handshakes; keeps the hub's accept queue short"},
    [FROZEN] = {"--frozen", 0, "further subscribers that never read after the handshake"},
    [FIRST] = {"--first", 1, "first sequence expected; earlier ones are counted as outside"},
    [LAST] = {"--last", 0, "last sequence expected; below --first: stay idle until a signal"},
    [PINGS] = {"--pings", 0, "print PINGED once every reader has answered so many pings"},
    [CONNECT_S] = {"--connect-s", 30, "deadline for all handshakes, s"},
    [MAX_S] = {"--max-s", 60, "longest time from READY to RESULT, s"},
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
    int64_t last_sequence;
    uint8_t *seen;           /* one bit per expected event */
    char *partial;           /* a frame whose end has not come yet */
    size_t partial_bytes, partial_room;
} subscriber;

typedef struct {
    uint64_t published_ns, last_ns; /* wall clock */
    uint32_t received;
} event_record;

static subscriber *subscribers;
static event_record *events;
static size_t conns, total, event_count;
static float *latency_us, *connect_us;   /* raw samples, sorted at the end */
static int epoll;
static char input[INPUT_BYTES];
static char request[512];
static volatile sig_atomic_t stop_asked;

static struct {
    size_t open, failed, closed, in_flight, pinged;
    uint64_t deliveries, duplicates, out_of_order, negative, outside, other;
    int close_code;                      /* of the last close frame, 0: none came */
    uint64_t first_ns, last_ns;          /* first and last counted delivery, wall clock */
} counts;

static void on_stop(int number) {
    (void)number;
    stop_asked = 1;
}

/* ---- one event ---------------------------------------------------------------------- */

/* A key of the JSON text and where it was found last: broadcast events look alike, so
 * the guess is nearly always right, and it is checked before it is believed. */
typedef struct {
    const char *text;
    size_t length, guess;
} json_key;
#define JSON_KEY(name) {"\"" name "\"", sizeof name + 1, 0}
static json_key sequence_key = JSON_KEY("sequence");
static json_key ns_key = JSON_KEY("published_at_ns");
static json_key us_key = JSON_KEY("published_at_us");

/* The number that follows the key, or -1. */
static int64_t number_after(json_key *key, const char *payload, size_t length) {
    if (key->guess + key->length > length || memcmp(payload + key->guess, key->text, key->length)) {
        const char *found = memmem(payload, length, key->text, key->length);
        if (!found) return -1;
        key->guess = (size_t)(found - payload);
    }
    const char *at = payload + key->guess + key->length, *end = payload + length;
    while (at < end && (*at == ':' || *at == ' ')) at++;
    if (at == end || *at < '0' || *at > '9') return -1;
    int64_t number = 0;
    while (at < end && *at >= '0' && *at <= '9') number = number * 10 + (*at++ - '0');
    return number;
}

static int64_t published_ns_of(const char *payload, size_t length) {
    int64_t ns = number_after(&ns_key, payload, length);
    if (ns >= 0) return ns;
    int64_t us = number_after(&us_key, payload, length);
    return us < 0 ? -1 : us * 1000;
}

/* False for a second copy. */
static bool mark_seen(subscriber *s, size_t index) {
    uint8_t bit = (uint8_t)(1 << (index & 7));
    if (s->seen[index >> 3] & bit) return false;
    s->seen[index >> 3] |= bit;
    return true;
}

static void record(subscriber *s, size_t index, int64_t sequence, uint64_t published_ns, uint64_t now_ns) {
    if (sequence < s->last_sequence) counts.out_of_order++;
    else s->last_sequence = sequence;
    if (now_ns < published_ns) counts.negative++;
    latency_us[counts.deliveries++] = (float)((double)(int64_t)(now_ns - published_ns) / 1e3);
    if (!counts.first_ns) counts.first_ns = now_ns;
    counts.last_ns = now_ns;
    events[index].published_ns = published_ns;
    events[index].last_ns = now_ns;
    events[index].received++;
}

static void on_event(subscriber *s, const char *payload, size_t length, uint64_t now_ns) {
    int64_t sequence = number_after(&sequence_key, payload, length);
    int64_t published_ns = published_ns_of(payload, length);
    if (sequence < 0 || published_ns < 0) {
        counts.other++;
        return;
    }
    int64_t index = sequence - (int64_t)options[FIRST].value;
    if (index < 0 || index >= (int64_t)event_count) counts.outside++;
    else if (!mark_seen(s, (size_t)index)) counts.duplicates++;
    else record(s, (size_t)index, sequence, (uint64_t)published_ns, now_ns);
}

/* ---- one connection ----------------------------------------------------------------- */

static void drop(subscriber *s) {
    if (s->phase == OPEN) counts.closed++;
    else counts.failed++, counts.in_flight--;
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
    counts.in_flight++;
    send_at_once(s->fd);
    if (connect(s->fd, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS) drop(s);
    else watch(s, EPOLL_CTL_ADD, EPOLLOUT);
}

static void on_connected(subscriber *s) {
    ssize_t length = (ssize_t)strlen(request); /* a refused connection fails here */
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
    if (length < 12 || memcmp(bytes, "HTTP/1.1 101", 12)) {
        if (!counts.failed) fprintf(stderr, "upgrade refused: %.*s\n", (int)(length < 64 ? length : 64), bytes);
        drop(s);
        return length;
    }
    s->phase = OPEN;
    counts.in_flight--;
    connect_us[counts.open++] = (float)((double)(clock_ns(CLOCK_MONOTONIC) - s->started_ns) / 1e3);
    if (s->frozen) watch(s, EPOLL_CTL_DEL, 0);
    return (size_t)(end + 4 - bytes);
}

static void answer_ping(subscriber *s, const char *payload, size_t length) {
    char pong[6 + 125] = {(char)0x8a, (char)(0x80 | length)}; /* the mask 0 leaves bytes as they are */
    memcpy(pong + 6, payload, length);
    if (send(s->fd, pong, 6 + length, MSG_NOSIGNAL) < 0) return;
    if (++s->pings == (int)options[PINGS].value) counts.pinged++;
}

static void on_frame(subscriber *s, int opcode, const char *payload, size_t length, uint64_t now_ns) {
    if (opcode == OP_TEXT) on_event(s, payload, length, now_ns);
    else if (opcode == OP_PING && length <= 125) answer_ping(s, payload, length);
    else if (opcode == OP_CLOSE && length >= 2)
        counts.close_code = (unsigned char)payload[0] << 8 | (unsigned char)payload[1];
    else counts.other++;
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
        on_frame(s, frame[0] & 0x0f, frame + header, payload, now_ns);
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
    if (s->phase == OPEN && !s->frozen) done += read_frames(s, input + done, length - done, now_ns);
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

static double seconds_since(uint64_t monotonic_ns) {
    return (double)(clock_ns(CLOCK_MONOTONIC) - monotonic_ns) / 1e9;
}

static void connect_all(void) {
    uint64_t began = clock_ns(CLOCK_MONOTONIC);
    size_t started = 0;
    while ((started < total || counts.in_flight) && !stop_asked) {
        double elapsed_s = seconds_since(began);
        if (elapsed_s > options[CONNECT_S].value) break;
        while (started < total && counts.in_flight < (size_t)options[IN_FLIGHT].value &&
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
        if (event_count && counts.deliveries == (uint64_t)conns * event_count) return "delivered";
        if (counts.closed == counts.open) return "closed";
        if (stop_asked) return "signal";
        if (seconds_since(began) > options[MAX_S].value) return "max-s";
        if (!pings_told && counts.pinged == conns) {
            printf("PINGED {\"subscribers\":%zu}\n", counts.pinged);
            fflush(stdout);
            pings_told = true;
        }
        pump(20);
    }
}

/* Time from publishing to the *last* subscriber, of every event that reached all of them. */
static size_t last_samples(float *us) {
    size_t count = 0;
    for (size_t i = 0; i < event_count; i++)
        if (events[i].received == conns)
            us[count++] = (float)((double)(int64_t)(events[i].last_ns - events[i].published_ns) / 1e3);
    sort_samples(us, count);
    return count;
}

static double cpu_s(void) {
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    return (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
           (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

static void print_result(const char *end, double used_cpu_s) {
    size_t n = (size_t)counts.deliveries;
    uint64_t expected = (uint64_t)conns * event_count;
    float *last_us = calloc(event_count + 1, sizeof *last_us);
    size_t whole = last_samples(last_us);
    sort_samples(latency_us, n);
    printf("RESULT {\"end\":\"%s\",\"open\":%zu,\"closed\":%zu,\"close_code\":%d,",
           end, counts.open, counts.closed, counts.close_code);
    printf("\"deliveries\":%zu,\"expected\":%llu,\"missing\":%llu,\"duplicates\":%llu,"
           "\"out_of_order\":%llu,\"negative\":%llu,\"outside\":%llu,\"other\":%llu,",
           n, (unsigned long long)expected, (unsigned long long)(expected - n),
           (unsigned long long)counts.duplicates, (unsigned long long)counts.out_of_order,
           (unsigned long long)counts.negative, (unsigned long long)counts.outside,
           (unsigned long long)counts.other);
    printf("\"latency_us\":{\"p50\":%.1f,\"p95\":%.1f,\"p99\":%.1f,\"max\":%.1f},",
           percentile(latency_us, n, .5), percentile(latency_us, n, .95),
           percentile(latency_us, n, .99), percentile(latency_us, n, 1));
    printf("\"last_us\":{\"p50\":%.1f,\"p99\":%.1f,\"max\":%.1f},\"active_s\":%.3f,\"cpu_s\":%.3f}\n",
           percentile(last_us, whole, .5), percentile(last_us, whole, .99), percentile(last_us, whole, 1),
           (double)(counts.last_ns - counts.first_ns) / 1e9, used_cpu_s);
}

static void *zeroed(size_t count, size_t size) {
    void *memory = calloc(count + 1, size);
    if (!memory) die("out of memory");
    return memory;
}

/* Takes all memory of the run now, so that nothing is allocated while the clock counts. */
static void prepare_run(void) {
    conns = (size_t)options[CONNS].value;
    total = conns + (size_t)options[FROZEN].value;
    double wanted = options[LAST].value - options[FIRST].value + 1;
    event_count = wanted > 0 ? (size_t)wanted : 0;
    subscribers = zeroed(total, sizeof *subscribers);
    events = zeroed(event_count, sizeof *events);
    connect_us = zeroed(total, sizeof *connect_us);
    latency_us = zeroed(conns * event_count, sizeof *latency_us);
    memset(latency_us, 1, conns * event_count * sizeof *latency_us); /* touch the pages */
    for (size_t i = 0; i < total; i++) {
        subscribers[i].frozen = i >= conns;
        subscribers[i].seen = zeroed((event_count + 7) / 8, 1);
    }
    snprintf(request, sizeof request,
             "GET /ws HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
             "Sec-WebSocket-Key: " SAMPLE_KEY "\r\nSec-WebSocket-Version: 13\r\n\r\n",
             (int)options[PORT].value);
    epoll = epoll_create1(EPOLL_CLOEXEC);
}

int main(int argc, char **argv) {
    read_options(argc, argv, options, OPTIONS);
    prepare_process();
    signal(SIGTERM, on_stop);
    signal(SIGINT, on_stop);
    prepare_run();
    connect_all();
    double cpu_before_s = cpu_s();
    const char *end = receive_all();
    print_result(end, cpu_s() - cpu_before_s);
    return 0;
}
