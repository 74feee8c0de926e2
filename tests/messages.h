/* messages.h - what every message of the library must be, whatever went into it: UTF-8 ([RFC 3629]
 * 4, written out) without a control character. */
#ifndef MESSAGES_H
#define MESSAGES_H

#include <stddef.h>

/* Bytes of the character at p, 0 if it is none.  The bytes end with a 0. */
static inline size_t message_char(const unsigned char *p)
{
    static const struct { unsigned char from, to, second_from, second_to; size_t bytes; } rows[] = {
        { 0x20, 0x7E, 0, 0, 1 },          { 0xC2, 0xC2, 0xA0, 0xBF, 2 },   /* not U+0080 .. 9F */
        { 0xC3, 0xDF, 0x80, 0xBF, 2 },    { 0xE0, 0xE0, 0xA0, 0xBF, 3 },
        { 0xE1, 0xEC, 0x80, 0xBF, 3 },    { 0xED, 0xED, 0x80, 0x9F, 3 },
        { 0xEE, 0xEF, 0x80, 0xBF, 3 },    { 0xF0, 0xF0, 0x90, 0xBF, 4 },
        { 0xF1, 0xF3, 0x80, 0xBF, 4 },    { 0xF4, 0xF4, 0x80, 0x8F, 4 },
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        if (p[0] < rows[i].from || p[0] > rows[i].to) continue;
        if (rows[i].bytes > 1 && (p[1] < rows[i].second_from || p[1] > rows[i].second_to)) return 0;
        for (size_t k = 2; k < rows[i].bytes; k++) if (p[k] < 0x80 || p[k] > 0xBF) return 0;
        return rows[i].bytes;
    }
    return 0;
}

/* 1 if message [room] ends with a 0, is not empty and holds nothing but such characters. */
static inline int message_is_clean(const char *message, size_t room)
{
    size_t n = 0;
    while (n < room && message[n]) n++;
    if (n == 0 || n == room) return 0;
    for (size_t i = 0; i < n;) {
        const size_t bytes = message_char((const unsigned char *)message + i);
        if (bytes == 0) return 0;
        i += bytes;
    }
    return 1;
}

#endif
