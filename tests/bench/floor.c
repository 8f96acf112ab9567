/* floor: what the machine itself needs. A hub with nothing in it: it subscribes
 * to Redis with raw RESP, puts a WebSocket header in front of each payload once,
 * and does one send() of those bytes per client and event.
 *
 * It serves load.c only (see SAMPLE_KEY), answers 200 to every other request so
 * that it can be polled like a real hub, and cuts a client whose socket is full.
 */
#include "common.h"
#include <sys/epoll.h>

enum { PORT, REDIS_PORT, OPTIONS };
static option options[OPTIONS] = {
    [PORT] = {"--port", 0, "port to listen on"},
    [REDIS_PORT] = {"--redis-port", 0, "port of Redis"},
};

enum { MAX_CLIENTS = 65536, INPUT_BYTES = 1 << 20 };
static int clients[MAX_CLIENTS];      /* descriptors that were upgraded */
static int place_of[MAX_CLIENTS];     /* descriptor -> its place in clients, plus 1; 0: not upgraded */
static int client_count;
static char input[INPUT_BYTES];       /* what Redis sent and was not yet broadcast */
static size_t input_bytes;

static void disconnect(int fd) {
    int place = place_of[fd] - 1;
    if (place >= 0) { /* the last client takes the empty place */
        int moved = clients[--client_count];
        clients[place] = moved;
        place_of[moved] = place + 1;
        place_of[fd] = 0;
    }
    close(fd);
}

static void broadcast(const char *frame, size_t length) {
    for (int i = client_count - 1; i >= 0; i--) { /* downwards: disconnect() moves the last one */
        ssize_t sent = send(clients[i], frame, length, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent != (ssize_t)length) disconnect(clients[i]);
    }
}

/* Writes the header of a final text frame so that it ends where the payload
 * begins, over RESP bytes that were already read. Returns where it begins. */
static char *put_header(char *payload, size_t length) {
    unsigned char *at = (unsigned char *)payload;
    size_t extra = length < 126 ? 0 : length < 65536 ? 2 : 8;
    for (size_t i = 0; i < extra; i++) *--at = (unsigned char)(length >> (8 * i));
    *--at = (unsigned char)(extra == 0 ? length : extra == 2 ? 126 : 127);
    *--at = 0x81;
    return (char *)at;
}

/* Reads "$<length>\r\n<text>\r\n" and returns what follows, or NULL when it is not all there. */
static char *read_bulk(char *at, char *end, char **text, size_t *length) {
    char *line_end = at < end ? memchr(at, '\n', (size_t)(end - at)) : NULL;
    if (!line_end) return NULL;
    *length = strtoul(at + 1, NULL, 10);
    *text = line_end + 1;
    return (size_t)(end - *text) < *length + 2 ? NULL : *text + *length + 2;
}

/* Reads "*3" and the three bulks "message", channel, payload; returns as read_bulk does. */
static char *read_message(char *at, char *end, char **payload, size_t *length) {
    if (end - at < 4) return NULL;
    if (memcmp(at, "*3\r\n", 4)) die("Redis sent something that is no message");
    at += 4;
    for (int part = 0; at && part < 3; part++) at = read_bulk(at, end, payload, length);
    return at;
}

static void on_redis(int redis) {
    ssize_t got = recv(redis, input + input_bytes, sizeof input - input_bytes, 0);
    if (got <= 0) die("Redis is gone");
    char *at = input, *end = input + input_bytes + got, *next, *payload;
    size_t length;
    while ((next = read_message(at, end, &payload, &length))) {
        char *frame = put_header(payload, length);
        broadcast(frame, (size_t)(payload + length - frame));
        at = next;
    }
    input_bytes = (size_t)(end - at);
    memmove(input, at, input_bytes);
}

static const char *answer_to(const char *request) {
    if (strstr(request, SAMPLE_KEY))
        return "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
               "Sec-WebSocket-Accept: " SAMPLE_ACCEPT "\r\n\r\n";
    return "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
}

/* A request (it comes in one piece on loopback), or what an upgraded client says: ignored. */
static void on_client(int fd) {
    char text[4096];
    ssize_t got = recv(fd, text, sizeof text - 1, 0);
    if (got > 0 && place_of[fd]) return;
    if (got <= 0) {
        disconnect(fd);
        return;
    }
    text[got] = 0;
    const char *answer = answer_to(text);
    bool upgraded = strstr(answer, " 101 ") != NULL;
    if (send(fd, answer, strlen(answer), MSG_NOSIGNAL) < 0 || !upgraded) {
        disconnect(fd);
        return;
    }
    clients[client_count++] = fd;
    place_of[fd] = client_count;
}

static void watch(int epoll, int fd) {
    struct epoll_event interest = {.events = EPOLLIN, .data.fd = fd};
    epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &interest);
}

static void on_listener(int epoll, int listener) {
    int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0) return;
    if (fd >= MAX_CLIENTS) {
        close(fd);
        return;
    }
    send_at_once(fd);
    watch(epoll, fd);
}

static int subscribe(int port) {
    int redis = connect_redis(port);
    char command[128], reply[512];
    int length = snprintf(command, sizeof command, "*2\r\n$9\r\nSUBSCRIBE\r\n$%zu\r\n%s\r\n",
                          strlen(CHANNEL), CHANNEL);
    if (send(redis, command, (size_t)length, MSG_NOSIGNAL) != length) die("subscribe");
    size_t got = 0;
    do { /* byte by byte: whatever follows the confirmation is a message */
        if (got == sizeof reply || recv(redis, reply + got, 1, 0) != 1) die("no confirmation");
        got++;
    } while (got < 4 || memcmp(reply + got - 4, ":1\r\n", 4));
    return redis;
}

static int listen_on(int port) {
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), on = 1;
    struct sockaddr_in address = loopback(port);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 4096))
        die("listen");
    return listener;
}

int main(int argc, char **argv) {
    read_options(argc, argv, options, OPTIONS, NULL, 0);
    prepare_process();
    int redis = subscribe((int)options[REDIS_PORT].value);
    int listener = listen_on((int)options[PORT].value);
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    watch(epoll, redis);
    watch(epoll, listener);
    struct epoll_event ready[256];
    for (;;) {
        int count = epoll_wait(epoll, ready, 256, -1);
        for (int i = 0; i < count; i++) {
            int fd = ready[i].data.fd;
            if (fd == redis) on_redis(redis);
            else if (fd == listener) on_listener(epoll, listener);
            else on_client(fd);
        }
    }
}
