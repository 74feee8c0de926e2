/* sign.h - for tests that change a session file: only with its hashes right does it get further.
 * Include after qwen3next.h with Q3N_IMPLEMENTATION. */
#ifndef Q3N_TESTS_SIGN_H
#define Q3N_TESTS_SIGN_H

#include <stdint.h>
#include <string.h>

/* Make both hashes of the file right again; one that is too short for them is left alone. */
static inline void sign_session(uint8_t *data, size_t bytes)
{
    q3n__session_header h;
    uint64_t hash;
    if (bytes < sizeof h + sizeof hash) return;
    memcpy(&h, data, sizeof h);
    h.header_hash = q3n__session_header_hash(h);
    memcpy(data, &h, sizeof h);
    const size_t rest = bytes - sizeof h - sizeof hash;
    hash = q3n__hash_of(h.header_hash, data + sizeof h, rest);
    memcpy(data + sizeof h + rest, &hash, sizeof hash);
}

#endif
