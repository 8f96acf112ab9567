/* publish: an open-loop publisher by Redis PUBLISH.
 *
 * `burst` events are due together, the next ones `period-ms` later, whatever
 * happened meanwhile. An event carries the time it was *due*, so a publisher (or a
 * machine) that is late makes latencies longer and never hides them. All events
 * that are due go out in one write. Prints one JSON line at the end.
 */
#include "common.h"
#include <sys/random.h>

enum { PORT, COUNT, BURST, PERIOD_MS, BYTES, FIRST, DELAY_MS, SOURCES, OPTIONS };
static option options[OPTIONS] = {
    [PORT] = {"--port", 0, "port of Redis"},
    [COUNT] = {"--count", 50, "events in all"},
    [BURST] = {"--burst", 1, "events that are due together"},
    [PERIOD_MS] = {"--period-ms", 100, "from one burst to the next, ms"},
    [BYTES] = {"--bytes", 256, "size of an event; never below its fixed part"},
    [FIRST] = {"--first", 1, "sequence of the first event"},
    [DELAY_MS] = {"--delay-ms", 20, "before the first event is due, ms"},
    [SOURCES] = {"--sources", 1, "how many sources take turns, src-0 first; 1: all events are of `bench`"},
};

enum { DATA, TEXTS };
static text_option texts[TEXTS] = {
    [DATA] = {"--data", "", "file with the `data` of every event, a JSON object; else it is padding"},
};
static char data[1 << 20];
static size_t data_length;

enum { WRITE_BYTES = 4 << 20, MAX_EVENT_BYTES = 1 << 20, REPLY_WAIT_S = 5 };
static char output[WRITE_BYTES];
static struct { uint64_t answered, heard, errors; } replies;

/* A random UUID (version 4), as text. */
static void put_uuid(char text[37]) {
    uint16_t r[8];
    if (getrandom(r, sizeof r, 0) != sizeof r) die("getrandom");
    snprintf(text, 37, "%04x%04x-%04x-4%03x-%04x-%04x%04x%04x", r[0], r[1], r[2], r[3] & 0xfff,
             (r[4] & 0x3fff) | 0x8000, r[5], r[6], r[7]);
}

/* Writes one valid event, due at `due_ns` on the wall clock, and returns its length. */
static size_t put_event(char *at, uint64_t sequence, uint64_t due_ns, size_t bytes) {
    char id[37], source[24] = "bench";
    uint64_t sources = (uint64_t)options[SOURCES].value;
    if (sources > 1) snprintf(source, sizeof source, "src-%u", (unsigned)((sequence - 1) % sources));
    put_uuid(id);
    size_t length = (size_t)sprintf(
        at,
        "{\"event_id\":\"%s\",\"event_type\":\"SERVER_DOWN\",\"source\":\"%s\",\"sequence\":%llu,"
        "\"published_at_ms\":%llu,\"published_at_us\":%llu,\"published_at_ns\":%llu,\"data\":",
        id, source, (unsigned long long)sequence, (unsigned long long)(due_ns / 1000000),
        (unsigned long long)(due_ns / 1000), (unsigned long long)due_ns);
    if (data_length) {
        memcpy(at + length, data, data_length);
        at[length + data_length] = '}';
        return length + data_length + 1;
    }
    length += (size_t)sprintf(at + length, "{\"pad\":\"");
    size_t padding = bytes > length + 3 ? bytes - length - 3 : 0;
    memset(at + length, 'x', padding);
    memcpy(at + length + padding, "\"}}", 3);
    return length + padding + 3;
}

/* Writes one PUBLISH command and returns its length. */
static size_t put_command(char *at, uint64_t sequence, uint64_t due_ns, size_t bytes) {
    static char event[MAX_EVENT_BYTES + 512];
    size_t event_length = put_event(event, sequence, due_ns, bytes);
    size_t length = (size_t)sprintf(at, "*3\r\n$7\r\nPUBLISH\r\n$%zu\r\n%s\r\n$%zu\r\n",
                                    strlen(CHANNEL), CHANNEL, event_length);
    memcpy(at + length, event, event_length);
    memcpy(at + length + event_length, "\r\n", 2);
    return length + event_length + 2;
}

static void count_reply(char kind, uint64_t number) {
    replies.answered++;
    if (kind == ':') replies.heard += number;
    else replies.errors++;
}

/* Reads replies (":<subscriptions>" or "-<error>") until there are no more just now. */
static void read_replies(int redis, int flags) {
    static char kind; /* first byte of a reply that is being read, 0 between two */
    static uint64_t number;
    char bytes[16384];
    ssize_t got = recv(redis, bytes, sizeof bytes, flags);
    if (got == 0) die("Redis closed the connection");
    for (ssize_t i = 0; i < got; i++) {
        if (!kind) kind = bytes[i], number = 0;
        else if (bytes[i] >= '0' && bytes[i] <= '9') number = number * 10 + (uint64_t)(bytes[i] - '0');
        else if (bytes[i] == '\n') count_reply(kind, number), kind = 0;
    }
}

static void send_all(int redis, size_t length) {
    for (size_t sent = 0; sent < length;) { /* Redis buffers its answers: this cannot lock up */
        ssize_t part = send(redis, output + sent, length - sent, MSG_NOSIGNAL);
        if (part < 0 && errno != EINTR) die("send to Redis");
        if (part > 0) sent += (size_t)part;
    }
}

static void sleep_until(uint64_t monotonic_ns) {
    struct timespec until = {(time_t)(monotonic_ns / NS_PER_S), (long)(monotonic_ns % NS_PER_S)};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL) == EINTR) {}
}

/* Publishes everything; late_us[i] becomes how long after its due time event i was written. */
static void publish_all(int redis, float *late_us) {
    uint64_t count = (uint64_t)options[COUNT].value, first = (uint64_t)options[FIRST].value;
    uint64_t burst = (uint64_t)options[BURST].value;
    size_t bytes = (size_t)options[BYTES].value + data_length;
    uint64_t start = clock_ns(CLOCK_MONOTONIC) + (uint64_t)(options[DELAY_MS].value * 1e6);
    uint64_t to_wall = clock_ns(CLOCK_REALTIME) - clock_ns(CLOCK_MONOTONIC);
    for (uint64_t next = 0; next < count;) {
#define DUE(i) (start + (uint64_t)((double)((i) / burst) * options[PERIOD_MS].value * 1e6))
        sleep_until(DUE(next));
        uint64_t now = clock_ns(CLOCK_MONOTONIC);
        size_t length = 0;
        while (next < count && DUE(next) <= now && length + bytes + 1024 < sizeof output) {
            length += put_command(output + length, first + next, DUE(next) + to_wall, bytes);
            late_us[next] = (float)((double)(now - DUE(next)) / 1e3);
            next++;
        }
#undef DUE
        send_all(redis, length);
        read_replies(redis, MSG_DONTWAIT);
    }
}

static void read_data(const char *path) {
    FILE *file = fopen(path, "r");
    if (!file) die(path);
    data_length = fread(data, 1, sizeof data - 1024, file);
    fclose(file);
}

static void await_replies(int redis) {
    struct timeval wait = {.tv_sec = 1};
    setsockopt(redis, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof wait);
    uint64_t deadline = clock_ns(CLOCK_MONOTONIC) + REPLY_WAIT_S * NS_PER_S;
    while (replies.answered < (uint64_t)options[COUNT].value && clock_ns(CLOCK_MONOTONIC) < deadline)
        read_replies(redis, 0);
}

int main(int argc, char **argv) {
    read_options(argc, argv, options, OPTIONS, texts, TEXTS);
    if (*texts[DATA].value) read_data(texts[DATA].value);
    if (options[BURST].value < 1 || options[BYTES].value > MAX_EVENT_BYTES) die("bad --burst or --bytes");
    prepare_process();
    size_t count = (size_t)options[COUNT].value;
    float *late_us = calloc(count + 1, sizeof *late_us);
    int redis = connect_redis((int)options[PORT].value);
    publish_all(redis, late_us);
    await_replies(redis);
    sort_samples(late_us, count);
    printf("PUBLISHED {\"published\":%zu,\"answered\":%llu,\"heard\":%llu,\"errors\":%llu,"
           "\"late_us\":{\"p50\":%.1f,\"p99\":%.1f,\"max\":%.1f}}\n",
           count, (unsigned long long)replies.answered, (unsigned long long)replies.heard,
           (unsigned long long)replies.errors, percentile(late_us, count, .5),
           percentile(late_us, count, .99), percentile(late_us, count, 1));
    return 0;
}
