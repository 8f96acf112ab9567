/* What the subscribers of load.c have received: which events, in which order, and how late.
 *
 * Latency = the wall clock after recv() returned minus `published_at_ns` (else
 * `published_at_us`) of the event, so it includes everything from the due time to
 * the moment when a program holds the bytes. Nothing is clamped: a delivery
 * that seems to arrive before it was published is counted as `negative`.
 */
#ifndef BENCH_TALLY_H
#define BENCH_TALLY_H
#include "common.h"

static struct {
    size_t conns, events, each; /* each: events that one subscriber is to get */
    int64_t first;              /* number of the first event */
    bool by_offset;
    const char *samples_path;
} run;

/* What one subscriber has received. */
typedef struct {
    int64_t last;               /* highest number */
    size_t received;            /* counted deliveries */
    uint8_t *seen;              /* one bit per expected event */
} reader;

typedef struct {
    uint64_t published_ns, last_ns; /* wall clock */
    uint32_t received;
} event_record;

typedef struct {
    int64_t due_us, latency_ns;
} sample;

static event_record *events;
static float *latency_us;       /* of every counted delivery; sorted at the end */
static sample *samples;         /* the same with the due time, if there is a file for it */

static struct {
    size_t open, closed, whole; /* whole: subscribers that have all they are to get */
    uint64_t deliveries, duplicates, out_of_order, holes, surplus, negative, outside, other;
    int close_code;             /* of the last close frame, 0: none came */
    uint64_t first_ns, last_ns; /* first and last counted delivery, wall clock */
} counts;

static void *zeroed(size_t count, size_t size) {
    void *memory = calloc(count + 1, size);
    if (!memory) die("out of memory");
    return memory;
}

static void prepare_tally(void) {
    size_t expected = run.conns * run.each;
    events = zeroed(run.events, sizeof *events);
    latency_us = zeroed(expected, sizeof *latency_us);
    memset(latency_us, 1, expected * sizeof *latency_us); /* touch the pages */
    if (!*run.samples_path) return;
    samples = zeroed(expected, sizeof *samples);
    memset(samples, 1, expected * sizeof *samples);
}

static void prepare_reader(reader *r) {
    r->seen = zeroed((run.events + 7) / 8, 1);
    if (run.by_offset) r->last = run.first - 1;
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
static json_key offset_key = JSON_KEY("offset");
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
static bool mark_seen(reader *r, size_t index) {
    uint8_t bit = (uint8_t)(1 << (index & 7));
    if (r->seen[index >> 3] & bit) return false;
    r->seen[index >> 3] |= bit;
    return true;
}

static void check_order(reader *r, int64_t number) {
    if (number < r->last) {
        counts.out_of_order++;
        return;
    }
    if (run.by_offset && number != r->last + 1) counts.holes++;
    r->last = number;
}

static void record(reader *r, size_t index, uint64_t published_ns, uint64_t now_ns) {
    if (r->received == run.each) {
        counts.surplus++;
        return;
    }
    if (++r->received == run.each) counts.whole++;
    if (now_ns < published_ns) counts.negative++;
    int64_t late_ns = (int64_t)(now_ns - published_ns);
    if (samples) samples[counts.deliveries] = (sample){(int64_t)(published_ns / 1000), late_ns};
    latency_us[counts.deliveries++] = (float)((double)late_ns / 1e3);
    if (!counts.first_ns) counts.first_ns = now_ns;
    counts.last_ns = now_ns;
    events[index].published_ns = published_ns;
    events[index].last_ns = now_ns;
    events[index].received++;
}

static void on_event(reader *r, const char *payload, size_t length, uint64_t now_ns) {
    int64_t number = number_after(run.by_offset ? &offset_key : &sequence_key, payload, length);
    int64_t published_ns = published_ns_of(payload, length);
    if (number < 0 || published_ns < 0) {
        counts.other++;
        return;
    }
    int64_t index = number - run.first;
    bool inside = index >= 0 && index < (int64_t)run.events;
    if (inside && !mark_seen(r, (size_t)index)) {
        counts.duplicates++;
        return;
    }
    if (inside || run.by_offset) check_order(r, number);
    if (inside) record(r, (size_t)index, (uint64_t)published_ns, now_ns);
    else counts.outside++;
}

/* ---- the result --------------------------------------------------------------------- */

/* Time from publishing to the *last* subscriber, of every event that reached all who were to get it. */
static size_t last_samples(float *us) {
    size_t count = 0, readers = run.events ? run.conns * run.each / run.events : 0;
    for (size_t i = 0; i < run.events; i++)
        if (events[i].received == readers)
            us[count++] = (float)((double)(int64_t)(events[i].last_ns - events[i].published_ns) / 1e3);
    sort_samples(us, count);
    return count;
}

static void write_samples(void) {
    FILE *file = fopen(run.samples_path, "wb");
    if (!file || fwrite(samples, sizeof *samples, counts.deliveries, file) != counts.deliveries || fclose(file))
        die("--samples");
}

static void print_result(const char *end, uint64_t began_ns, double used_cpu_s) {
    size_t n = (size_t)counts.deliveries, expected = run.conns * run.each;
    float *last_us = zeroed(run.events, sizeof *last_us);
    size_t whole_events = last_samples(last_us);
    if (samples) write_samples();
    sort_samples(latency_us, n);
    printf("RESULT {\"end\":\"%s\",\"open\":%zu,\"closed\":%zu,\"close_code\":%d,\"whole\":%zu,",
           end, counts.open, counts.closed, counts.close_code, counts.whole);
    printf("\"deliveries\":%zu,\"expected\":%zu,\"missing\":%zu,\"duplicates\":%llu,"
           "\"out_of_order\":%llu,\"holes\":%llu,\"surplus\":%llu,\"negative\":%llu,\"outside\":%llu,"
           "\"other\":%llu,",
           n, expected, expected - n, (unsigned long long)counts.duplicates,
           (unsigned long long)counts.out_of_order, (unsigned long long)counts.holes,
           (unsigned long long)counts.surplus, (unsigned long long)counts.negative,
           (unsigned long long)counts.outside, (unsigned long long)counts.other);
    printf("\"latency_us\":{\"p50\":%.1f,\"p95\":%.1f,\"p99\":%.1f,\"max\":%.1f},",
           percentile(latency_us, n, .5), percentile(latency_us, n, .95),
           percentile(latency_us, n, .99), percentile(latency_us, n, 1));
    printf("\"last_us\":{\"p50\":%.1f,\"p99\":%.1f,\"max\":%.1f},",
           percentile(last_us, whole_events, .5), percentile(last_us, whole_events, .99),
           percentile(last_us, whole_events, 1));
    printf("\"began_at_us\":%llu,\"ended_at_us\":%llu,\"active_s\":%.3f,\"cpu_s\":%.3f}\n",
           (unsigned long long)(began_ns / 1000), (unsigned long long)(counts.last_ns / 1000),
           (double)(counts.last_ns - counts.first_ns) / 1e9, used_cpu_s);
}
#endif
